//! One file per command.

mod bench;
mod completions;
mod conformance;
mod demo;
mod doctor;
mod inspect;
mod man;
mod plan;
mod run;
mod tier;
mod tokenize;

use crate::arguments::{Arguments, Command};
use crate::container::refuse_language_model;
use crate::failure::Outcome;

/// Runs the command that was typed.
pub fn run(arguments: Arguments) -> Outcome {
    let output = arguments.output.into();
    match arguments.command {
        Command::Run(arguments) => {
            arguments.model.as_deref().map_or(Ok(()), |model| refuse_language_model(model, "run"))?;
            run::run(&arguments, output)
        }
        Command::Demo(arguments) => demo::run(&arguments, output),
        Command::Inspect(arguments) => inspect::run(&arguments, output),
        Command::Plan(arguments) => {
            refuse_language_model(&arguments.model, "plan")?;
            plan::run(&arguments, output)
        }
        Command::Bench(arguments) => {
            refuse_language_model(&arguments.model, "bench")?;
            bench::run(&arguments, output)
        }
        Command::Tokenize(arguments) => tokenize::run(&arguments, output),
        Command::Tier { command } => tier::run(&command, output),
        Command::Doctor(arguments) => doctor::run(&arguments, output),
        Command::Conformance(arguments) => conformance::run(&arguments, output),
        Command::Completions { shell } => completions::run(shell),
        Command::Man { output_dir } => man::run(output_dir.as_deref()),
    }
}
