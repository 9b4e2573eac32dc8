//! One file per command.

mod bench;
mod bench_language;
mod chat;
mod completions;
mod conformance;
mod convert;
mod demo;
mod doctor;
mod generate;
mod inspect;
mod lm;
mod man;
mod perplexity;
mod plan;
mod run;
mod serve;
pub mod tier;
mod tokenize;
mod train;

use crate::arguments::{Arguments, Command};
use crate::container::{Container, refuse_what_is_no_graph};
use crate::failure::{Failure, Outcome};

/// Runs the command that was typed.
pub fn run(arguments: Arguments) -> Outcome {
    let output = arguments.output.into();
    match arguments.command {
        Command::Run(arguments) => {
            arguments.model.as_deref().map_or(Ok(()), |model| refuse_what_is_no_graph(model, "run"))?;
            run::run(&arguments, output)
        }
        Command::Demo(arguments) => demo::run(&arguments, output),
        Command::Inspect(arguments) => inspect::run(&arguments, output),
        Command::Plan(arguments) => {
            if Container::of(&arguments.model) != Container::Gguf {
                refuse_what_is_no_graph(&arguments.model, "plan")?;
            }
            plan::run(&arguments, output)
        }
        Command::Bench(arguments) => {
            if Container::of(&arguments.model) == Container::Gguf {
                return bench_language::run(&arguments, output);
            }
            refuse_what_is_no_graph(&arguments.model, "bench")?;
            if arguments.report.is_some() || arguments.sustained.is_some() {
                return Err(Failure::input(
                    "--report and --sustained are about language models; expected a model as .gguf",
                    "--profile, or --json",
                ));
            }
            bench::run(&arguments, output)
        }
        Command::Train(arguments) => train::run(&arguments, output),
        Command::Tune(arguments) => train::tune(arguments, output),
        Command::Generate(arguments) => generate::run(&arguments, output),
        Command::Perplexity(arguments) => perplexity::run(&arguments, output),
        Command::Chat(arguments) => chat::run(&arguments, output),
        Command::Serve(arguments) => serve::run(&arguments, output),
        Command::Tokenize(arguments) => tokenize::run(&arguments, output),
        Command::Convert(arguments) => convert::run(&arguments, output),
        Command::Lm { command } => lm::run(&command, output),
        Command::Tier { command } => tier::run(&command, output),
        Command::Doctor(arguments) => doctor::run(&arguments, output),
        Command::Conformance(arguments) => conformance::run(&arguments, output),
        Command::Completions { shell } => completions::run(shell),
        Command::Man { output_dir } => man::run(output_dir.as_deref()),
    }
}
