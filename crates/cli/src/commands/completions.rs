//! `lighter completions SHELL`

use crate::arguments::Arguments;
use crate::failure::{Exit, Outcome};
use clap::CommandFactory;
use clap_complete::Shell;
use std::io::Write;

/// Writes the completion script to stdout.
pub fn run(shell: Shell) -> Outcome {
    // Generated into memory first, because the generator panics when its writer fails.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "lighter", &mut script);
    std::io::stdout().write_all(&script)?;
    Ok(Exit::Done)
}
