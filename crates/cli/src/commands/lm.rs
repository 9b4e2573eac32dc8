//! `lighter lm`

use crate::arguments::{LmCommand, LmSynthArguments};
use crate::failure::{Exit, Failure, Outcome};
use crate::output::Output;
use lightering_lm::{SyntheticOptions, write_synthetic};
use lightering_units::Bytes;
use serde::Serialize;
use std::fs::File;
use std::io::BufWriter;

/// `lighter lm synth --json`
#[derive(Debug, Serialize)]
struct SynthReport {
    schema: &'static str,
    file: String,
    like: String,
    architecture: String,
    layers: usize,
    layers_of_model: usize,
    parameters: u64,
    weights: Bytes,
}

/// Runs `lighter lm …`.
pub fn run(command: &LmCommand, output: Output) -> Outcome {
    match command {
        LmCommand::Synth(arguments) => synthesize(arguments, output),
    }
}

fn synthesize(arguments: &LmSynthArguments, output: Output) -> Outcome {
    let path = &arguments.output;
    let place = || format!("{}: writing a synthetic model", path.display());
    let mut options = SyntheticOptions::like(&arguments.like);
    options.tiny = arguments.tiny;
    options.layers = arguments.layers;
    options.size_max = arguments.disk;
    options.vocabulary = arguments.vocabulary;
    options.format = arguments.format;
    options.seed = arguments.seed;
    // Wrong options are found before a file is made.
    write_synthetic(&options, Refused).map(|_| ()).or_else(|error| match error {
        lightering_lm::Error::Format(_) => Ok(()),
        other => Err(Failure::from(other).context(place())),
    })?;
    let progress = output.progress(1);
    progress.set_message("writing weights");
    let file = File::create(path).map_err(|e| Failure::from(e).context(place()))?;
    let written = write_synthetic(&options, BufWriter::with_capacity(1 << 20, file));
    progress.finish_and_clear();
    let model = written.map_err(|error| {
        // Half a model is worth nothing, and takes room where there may be none left.
        let _ = std::fs::remove_file(path);
        Failure::from(error).context(place())
    })?;
    let [layers, layers_of_model] = model.layers;
    let report = SynthReport {
        schema: "lightering.lm-synth/1",
        file: path.display().to_string(),
        like: arguments.like.clone(),
        architecture: model.architecture,
        layers,
        layers_of_model,
        parameters: model.parameters,
        weights: model.size,
    };
    let text = format!(
        "{}: {layers} of {layers_of_model} layers of {}, {:.2} billion random weights, {}",
        report.file,
        report.like,
        report.parameters as f64 / 1e9,
        report.weights
    );
    output.result(&report, &text)?;
    Ok(Exit::Done)
}

/// Takes nothing: what is wrong before the first byte shows without a file.
struct Refused;

impl std::io::Write for Refused {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::StorageFull.into())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
