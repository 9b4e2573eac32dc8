//! How the program ends: exit codes, and failures with a reason, a chain of causes and a suggested next step.

use lightering_engine::EngineError;
use lightering_graph::GraphError;
use lightering_meter::MeterError;
use lightering_tier::TierError;
use lightering_train::TrainError;
use lightering_units::Bytes;
use std::fmt::Write as _;
use std::io;
use std::process::ExitCode;

/// The exit codes that scripts may rely on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// It ran, but a check or a target was missed.
    Missed = 1,
    /// Wrong usage or bad input.
    Input = 2,
    /// The budget cannot be met.
    Budget = 3,
    /// Another machine or the network failed.
    #[allow(
        dead_code,
        reason = "part of the fixed set of codes; the first command that talks to a peer uses it"
    )]
    Peer = 4,
    /// A bug in this program.
    Internal = 70,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// Why a command stopped, with which exit code, and what the user can do next.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// The error with its chain of causes.
    pub error: anyhow::Error,
    /// A next step.
    pub hint: Option<String>,
    /// The smallest budget that would do, when that is known.
    pub smallest: Option<Bytes>,
}

/// The result of a command.
pub type Outcome<T = Exit> = Result<T, Failure>;

impl Failure {
    /// Bad input, with a next step.
    pub fn input(message: impl Into<String>, hint: impl Into<String>) -> Failure {
        Failure::new(Exit::Input, anyhow::Error::msg(message.into())).or_hint(hint)
    }

    /// A failure without a next step.
    pub fn new(exit: Exit, error: anyhow::Error) -> Failure {
        Failure { exit, error, hint: None, smallest: None }
    }

    /// Adds what was being done to the front of the chain.
    pub fn context(mut self, what: impl Into<String>) -> Failure {
        self.error = self.error.context(what.into());
        self
    }

    /// Sets the next step unless there is one.
    pub fn or_hint(mut self, hint: impl Into<String>) -> Failure {
        self.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// Tells the smallest budget that would do, and suggests it.
    pub fn name_smallest(&mut self, smallest: Bytes) {
        self.smallest = Some(smallest);
        self.hint = Some(format!("--memory {}MiB", smallest.0.div_ceil(1 << 20)));
    }

    /// True when the reader of our output went away, which is no failure.
    pub fn is_broken_pipe(&self) -> bool {
        self.error.chain().any(|cause| {
            cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
        })
    }

    /// True when the input is valid, but uses something that this program does not do.
    pub fn is_unsupported(&self) -> bool {
        use lightering_formats::Error as FormatError;
        self.error.chain().any(|cause| {
            matches!(cause.downcast_ref(), Some(GraphError::Unsupported { .. }))
                || matches!(cause.downcast_ref(), Some(EngineError::Unsupported { .. }))
                || matches!(cause.downcast_ref(), Some(FormatError::Unsupported { .. }))
        })
    }

    /// What lies behind the error, without what was said already: some errors end in the text of their cause.
    fn causes(&self) -> Vec<String> {
        let mut said = self.error.to_string();
        let mut causes = Vec::new();
        for cause in self.error.chain().skip(1).map(|cause| cause.to_string()) {
            if !said.ends_with(&cause) {
                causes.push(cause.clone());
                said = cause;
            }
        }
        causes
    }

    /// The message for people: what, why, and what to do.
    pub fn message(&self) -> String {
        let mut text = format!("error: {}", self.error);
        for cause in self.causes() {
            // Writing to a String cannot fail.
            let _ = write!(text, "\n  because: {cause}");
        }
        if let Some(hint) = &self.hint {
            let _ = write!(text, "\n  try: {hint}");
        }
        text
    }

    /// The same for scripts.
    pub fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "schema": "lightering.error/1",
            "exit": self.exit as u8,
            "error": self.error.to_string(),
            "because": self.causes(),
            "try": self.hint,
            "smallest_memory_bytes": self.smallest,
        })
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        let exit = error.chain().find_map(exit_of).unwrap_or(Exit::Input);
        Failure::new(exit, error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        anyhow::Error::new(error).into()
    }
}

macro_rules! from_library {
    ($($error:ty),*) => { $(
        impl From<$error> for Failure {
            fn from(error: $error) -> Failure {
                anyhow::Error::new(error).into()
            }
        }
    )* };
}
from_library!(
    MeterError,
    GraphError,
    EngineError,
    lightering_formats::Error,
    lightering_lm::Error,
    TrainError,
    TierError
);

/// The exit code that a typed error of the libraries asks for.
fn exit_of(cause: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    if let Some(error) = cause.downcast_ref() {
        return Some(match error {
            MeterError::Budget { .. } => Exit::Budget,
            _ => Exit::Input,
        });
    }
    if let Some(error) = cause.downcast_ref() {
        return Some(match error {
            TierError::TooFewSlots { .. } => Exit::Budget,
            TierError::Internal(_) => Exit::Internal,
            _ => Exit::Input,
        });
    }
    if let Some(error) = cause.downcast_ref() {
        return Some(match error {
            TrainError::Diverged { .. } => Exit::Missed,
            TrainError::Budget(_) => Exit::Budget,
            TrainError::Engine(error) => exit_of(error)?,
            _ => Exit::Input,
        });
    }
    Some(match cause.downcast_ref()? {
        EngineError::Budget { .. } | EngineError::OutOfBudget { .. } | EngineError::Memory(_) => Exit::Budget,
        EngineError::Internal(_) => Exit::Internal,
        _ => Exit::Input,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_refused_reservation_is_exit_3_however_deep_in_the_chain() {
        let pool = lightering_meter::MemoryPool::with_limit(Bytes(1));
        let error = pool.reserve("arena", Bytes(2)).unwrap_err();
        let failure = Failure::from(Err::<(), _>(error).context("loading m.onnx").unwrap_err());
        assert_eq!(failure.exit, Exit::Budget);
        let text = failure.or_hint("a larger budget").message();
        assert!(text.starts_with("error: loading m.onnx\n  because: arena asked for 2 B"), "{text}");
        assert!(text.ends_with("\n  try: a larger budget"), "{text}");
    }

    #[test]
    fn no_cause_is_told_twice() {
        let source = io::Error::new(io::ErrorKind::NotFound, "no such file");
        let error = lightering_formats::Error::Io { place: "m.gguf".to_owned(), source };
        let text = Failure::from(error).context("opening the model").message();
        assert_eq!(text, "error: opening the model\n  because: m.gguf: no such file");
    }

    #[test]
    fn a_broken_pipe_is_seen_through_context() {
        let pipe = Failure::from(io::Error::from(io::ErrorKind::BrokenPipe)).context("writing the result");
        assert!(pipe.is_broken_pipe());
        assert!(!Failure::from(io::Error::from(io::ErrorKind::NotFound)).is_broken_pipe());
    }
}
