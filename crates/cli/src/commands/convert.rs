//! `lighter convert`

use crate::arguments::ConvertArguments;
use crate::container::Container;
use crate::failure::{Exit, Failure, Outcome};
use crate::output::{Output, Table};
use crate::usage::Baseline;
use lightering_lm::{CheckpointFiles, Conversion, ConversionOptions, ConversionReport};
use lightering_meter::Stopwatch;
use lightering_tier::FileSource;
use lightering_units::{Bytes, Seconds};
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Size of the output's buffer.
const BUFFER_BYTES: usize = 64 << 10;

/// `--json`
#[derive(Debug, Serialize)]
struct ConvertReport<'a> {
    schema: &'static str,
    source: String,
    output: String,
    architecture: &'a str,
    format: String,
    formats: Vec<FormatReport>,
    weights_before_bytes: Bytes,
    weights_after_bytes: Bytes,
    file_bytes: Bytes,
    seconds: Seconds,
    /// The limit, or what was taken where none was given.
    memory_bytes: Option<Bytes>,
    smallest_memory_bytes: Bytes,
    peak_beyond_fixed_bytes: Bytes,
    notes: &'a [String],
}

#[derive(Debug, Serialize)]
struct FormatReport {
    from: &'static str,
    to: &'static str,
    tensors: usize,
    elements: u64,
    before_bytes: Bytes,
    after_bytes: Bytes,
    mean_squared_error: f64,
    relative_error: Option<f64>,
}

/// A file that gets its name only when it is whole. Until then it has another one beside it, and is removed when the
/// work fails.
struct Draft {
    draft: PathBuf,
    target: PathBuf,
    kept: bool,
}

impl Draft {
    fn create(target: &Path) -> Outcome<(Draft, File)> {
        let name = target.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let draft = target.with_file_name(format!(".{name}.{}.part", std::process::id()));
        let file = OpenOptions::new().write(true).create_new(true).open(&draft);
        let file = file.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", draft.display())))?;
        Ok((Draft { draft, target: target.to_owned(), kept: false }, file))
    }

    /// Brings the bytes to the disk and gives the file its name.
    fn keep(mut self, file: &File) -> io::Result<()> {
        file.sync_all()?;
        std::fs::rename(&self.draft, &self.target)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.kept {
            // The failure that brought us here is what matters.
            let _ = std::fs::remove_file(&self.draft);
        }
    }
}

/// Converts a model to GGUF.
pub fn run(arguments: &ConvertArguments, output: Output) -> Outcome {
    let baseline = Baseline::now();
    let watch = Stopwatch::start();
    let target = arguments.output.as_path();
    if target.is_dir() {
        return Err(Failure::input(
            format!("{}: is a folder; expected a file", target.display()),
            "a name that ends in .gguf",
        ));
    }
    if target.exists() && !arguments.force {
        return Err(Failure::input(
            format!("{}: exists already", target.display()),
            "--force, which replaces it",
        ));
    }
    let mut conversion = plan(&arguments.source)?;
    conversion.set_recipe(arguments.format);
    let smallest = conversion.smallest_memory();
    if let Some(memory) = arguments.memory.filter(|memory| *memory < smallest) {
        let message = format!(
            "the tokenizer, the list of tensors and one row take {smallest}, and the budget is {memory}"
        );
        let mut failure = Failure::new(Exit::Budget, anyhow::Error::msg(message));
        failure.name_smallest(smallest);
        return Err(failure);
    }
    let total = conversion.data_size();
    let (architecture, notes) = (conversion.architecture().to_owned(), conversion.notes().to_vec());
    let (draft, file) = Draft::create(target)?;
    let progress = output.progress(total.0.max(2));
    let place = target.display();
    progress.set_message(format!("{place}: {total} of {}", arguments.format));
    let threads = arguments.threads.unwrap_or_else(lightering_meter::host::cores) as usize;
    let options = ConversionOptions { memory: arguments.memory, threads };
    let written = conversion.write(BufWriter::with_capacity(BUFFER_BYTES, file), options, &mut |done| {
        progress.set_position(done.0);
    });
    progress.finish_and_clear();
    let hint = "room on the disk, and a source that is whole";
    let (writer, report) =
        written.map_err(|e| Failure::from(e).context(format!("{place}: writing it")).or_hint(hint))?;
    let file = writer.into_inner().map_err(io::IntoInnerError::into_error)?;
    draft
        .keep(&file)
        .map_err(|e| Failure::from(e).context(format!("{place}: finishing it")).or_hint(hint))?;
    let peak = baseline.peak_so_far();
    let json = ConvertReport {
        schema: "lightering.convert/1",
        source: arguments.source.display().to_string(),
        output: place.to_string(),
        architecture: &architecture,
        format: arguments.format.to_string(),
        formats: report.formats.iter().map(told).collect(),
        weights_before_bytes: report.before,
        weights_after_bytes: report.after,
        file_bytes: report.file,
        seconds: watch.elapsed(),
        memory_bytes: arguments.memory,
        smallest_memory_bytes: smallest,
        peak_beyond_fixed_bytes: peak,
        notes: &notes,
    };
    output.result(&json, &text(&report, &json))?;
    if !output.quiet {
        for note in &notes {
            // A note that cannot be written is no reason to fail: the file is there.
            let _ = writeln!(io::stderr(), "note: {note}");
        }
    }
    if let Some(memory) = arguments.memory.filter(|memory| peak > *memory) {
        return Err(Failure::new(
            Exit::Missed,
            anyhow::anyhow!("converting held {peak}, more than the budget of {memory}"),
        )
        .or_hint("reporting this, since what was planned must hold; the file is good"));
    }
    Ok(Exit::Done)
}

fn plan(source: &Path) -> Outcome<Conversion> {
    let place = source.display();
    let explained = |e: lightering_lm::Error| {
        Failure::from(e)
            .context(format!("{place}: preparing it for conversion"))
            .or_hint("a folder with model.safetensors, config.json and tokenizer.json, or a GGUF file, all of them whole")
    };
    if !source.exists() {
        return Err(Failure::input(
            format!("{place}: there is no such file or folder"),
            "a folder with model.safetensors and config.json, or a GGUF file",
        ));
    }
    if source.is_file() && Container::of(source) == Container::Gguf {
        return Conversion::of_gguf(Arc::new(FileSource::open(source)?)).map_err(explained);
    }
    let is_index = source.extension().is_some_and(|e| e == "json");
    if source.is_file() && !is_index && Container::of(source) != Container::Safetensors {
        return Err(Failure::input(
            format!("{place}: is neither GGUF nor safetensors"),
            format!("lighter inspect {place}, which tells what it is"),
        ));
    }
    CheckpointFiles::find(source).and_then(|files| Conversion::of_checkpoint(&files)).map_err(explained)
}

fn told(format: &lightering_lm::ConvertedFormat) -> FormatReport {
    FormatReport {
        from: format.from.name(),
        to: format.to.name(),
        tensors: format.tensors,
        elements: format.elements,
        before_bytes: format.before,
        after_bytes: format.after,
        mean_squared_error: format.mean_squared_error,
        relative_error: format.relative_error,
    }
}

fn text(report: &ConversionReport, json: &ConvertReport<'_>) -> String {
    let titles =
        ["from", "to", ">tensors", ">weights", ">before", ">after", ">mean squared error", ">relative"];
    let mut table = Table::new(&titles);
    for f in &report.formats {
        let (error, relative) = match f.relative_error {
            None => ("copied".to_owned(), String::new()),
            Some(relative) => (format!("{:.3e}", f.mean_squared_error), format!("{:.3} %", 100.0 * relative)),
        };
        table.row([
            f.from.to_string(),
            f.to.to_string(),
            f.tensors.to_string(),
            f.elements.to_string(),
            f.before.to_string(),
            f.after.to_string(),
            error,
            relative,
        ]);
    }
    let tensors: usize = report.formats.iter().map(|f| f.tensors).sum();
    let elements: u64 = report.formats.iter().map(|f| f.elements).sum();
    table.row([
        "together".to_owned(),
        String::new(),
        tensors.to_string(),
        elements.to_string(),
        report.before.to_string(),
        report.after.to_string(),
        String::new(),
        String::new(),
    ]);
    format!(
        "{}\n{}: {}, {}, in {}, holding {} at most\n",
        table.text(),
        json.output,
        json.architecture,
        report.file,
        json.seconds,
        json.peak_beyond_fixed_bytes
    )
}
