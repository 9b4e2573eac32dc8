//! The command line: `lighter`.
//!
//! stdout carries the result and stderr the progress; the exit code is 0 when done, 1 when a check was missed, 2 for
//! wrong usage or bad input, 3 when the budget cannot be met, 4 when a peer failed, 70 for a bug in this program.
//!
//! Invariants: this is the only crate that knows `clap`, terminals and configuration files; what it computes, it
//! computes by calling the floors below.
#![forbid(unsafe_code)]

mod arguments;
mod array;
mod commands;
mod container;
mod embedded;
mod failure;
mod fixed_cost;
mod language;
mod model;
mod output;
mod probe;
mod text_input;
mod usage;
mod values;

use clap::Parser;
use failure::{Exit, Outcome};
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;

/// What the panic hook saw last: place and message.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

fn main() -> ExitCode {
    lightering_tier::keep_heap_small();
    std::panic::set_hook(Box::new(|info| {
        if let Ok(mut slot) = PANIC.lock() {
            slot.get_or_insert_with(|| info.to_string());
        }
    }));
    let arguments = match arguments::Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // A reader that went away while help was printed is no failure.
            let _ = error.print();
            return if error.use_stderr() { Exit::Input.into() } else { Exit::Done.into() };
        }
    };
    let json = arguments.output.json;
    finish(guard(|| commands::run(arguments)), json).into()
}

/// What the panic that was just caught said.
fn take_panic() -> String {
    PANIC.lock().ok().and_then(|mut slot| slot.take()).unwrap_or_default()
}

/// Runs `command` and turns a panic into exit code 70 with a request to report it.
fn guard(command: impl FnOnce() -> Outcome) -> Outcome {
    catch_unwind(AssertUnwindSafe(command)).unwrap_or_else(|_| {
        let what = take_panic();
        Err(failure::Failure {
            exit: Exit::Internal,
            error: anyhow::anyhow!("internal error: {what}"),
            hint: Some(format!(
                "this is a bug; please report it with the command line and `lighter --version` ({})",
                env!("CARGO_PKG_VERSION")
            )),
            smallest: None,
        })
    })
}

fn finish(outcome: Outcome, json: bool) -> Exit {
    match outcome {
        Ok(exit) => exit,
        Err(failure) if failure.is_broken_pipe() => Exit::Done,
        Err(failure) => {
            // Nothing can be told to anybody when these writes fail.
            let _ = writeln!(std::io::stderr(), "{}", failure.message());
            if json && !output::result_written() {
                let _ = writeln!(std::io::stdout(), "{:#}", failure.json());
            }
            failure.exit
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_exit_70_with_its_message() {
        let outcome = guard(|| panic!("the arena is too small"));
        let failure = outcome.unwrap_err();
        assert_eq!(failure.exit, Exit::Internal);
        assert!(failure.hint.as_deref().unwrap_or_default().contains("this is a bug"));
        assert_eq!(finish(Err(failure), false), Exit::Internal);
    }

    #[test]
    fn a_broken_pipe_is_success() {
        let failure = std::io::Error::from(std::io::ErrorKind::BrokenPipe).into();
        assert_eq!(finish(Err(failure), true), Exit::Done);
    }
}
