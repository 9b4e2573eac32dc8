//! `lighter run`

use crate::arguments::{NamedFile, RunArguments};
use crate::array::{Tolerance, top_k};
use crate::embedded;
use crate::failure::{Exit, Failure, Outcome};
use crate::model::{Means, Model, ModelSource, NodeTime, load_profile};
use crate::output::{Output, Table};
use crate::usage::{self, Baseline};
use crate::values::{self, InputBytes, Port};
use anyhow::Context;
use lightering_engine::RuntimeValue;
use lightering_graph::DType;
use lightering_meter::{EnergyMeter, EnergyModel, MemoryPool, Receipt, Stopwatch};
use lightering_units::Seconds;
use serde::Serialize;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Elements that are printed of an output for which no `--top-k` is asked.
const PREVIEW: usize = 8;

/// Largest file of labels that is read.
const LABELS_BYTES_MAX: u64 = 64 << 20;

/// `--json`
#[derive(Debug, Serialize)]
struct RunReport {
    schema: &'static str,
    outputs: Vec<OutputReport>,
    expect: Vec<ExpectReport>,
    profile: Vec<NodeTime>,
    receipt: Receipt,
}

#[derive(Debug, Serialize)]
struct OutputReport {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    files: Vec<PathBuf>,
    top_k: Vec<Ranked>,
    first: Vec<f64>,
}

#[derive(Debug, Serialize)]
struct Ranked {
    index: usize,
    value: f64,
    label: Option<String>,
}

#[derive(Debug, Serialize)]
struct ExpectReport {
    output: String,
    file: PathBuf,
    #[serde(flatten)]
    comparison: crate::array::Comparison,
}

/// Loads, plans, runs, writes, compares and tells.
pub fn run(arguments: &RunArguments, output: Output) -> Outcome {
    let baseline = Baseline::now();
    let progress = output.progress(1);
    let resources = &arguments.resources;
    let profile = load_profile(resources.machine.as_deref())?;
    let pool = MemoryPool::new(resources.memory);
    let source = match &arguments.model {
        Some(path) => ModelSource::File(path.clone()),
        None => ModelSource::Embedded,
    };

    // An embedded model becomes resident page by page as it is read.
    let _embedded = pool.reserve("embedded model", source.embedded_bytes())?;
    let load = Stopwatch::start();
    progress.set_message("reading the model");
    let model = Model::open(&source)?;
    let ports = model.inputs();
    progress.set_message("reading the inputs");
    let threads = resources.threads.unwrap_or_else(lightering_meter::host::cores);
    let means = Means { threads, profile: &profile, pool: &pool, baseline: &baseline };
    let inputs = match load_inputs(arguments, &ports, &pool) {
        Ok(inputs) => inputs,
        Err(failure) => {
            let given = values::bind_dimensions(&resources.dimensions, &[], &ports)?;
            return Err(model.with_smallest(failure, &given, means));
        }
    };
    values::require_all(&inputs, &ports)?;
    let dimensions = values::bind_dimensions(&resources.dimensions, &inputs, &ports)?;
    let labels = match &arguments.labels {
        Some(path) => Some(read_labels(path)?),
        None if arguments.model.is_none() => Some(embedded::LABELS.lines().map(str::to_owned).collect()),
        None => None,
    };
    let expected = read_expected(&arguments.expect, &model.outputs(), &pool)?;

    progress.set_message("planning");
    let mut session = model.plan(&dimensions, &inputs, means, arguments.profile)?;
    let load_seconds = load.elapsed();

    progress.set_message("running");
    let fixed_assumed = baseline.fixed_cost_assumed(&profile, source.embedded_bytes());
    let energy = EnergyMeter::start(arguments.receipt.energy_model.map(energy_model));
    let watch = Stopwatch::start();
    let outputs = session.run(&inputs)?;
    let seconds = watch.elapsed();
    let energy = energy.finish();
    let mut measured = baseline.measured(seconds, Some(load_seconds), source.embedded_bytes());
    measured.pool_peak_bytes = Some(session.pool_peak().max(pool.peak()));
    progress.set_message("writing the outputs");

    let mut reports = Vec::new();
    let mut taken = Vec::new();
    let ranks = arguments.top_k.map(|k| k as usize).or(arguments.model.is_none().then_some(5));
    if let Some(folder) = &arguments.output_dir {
        std::fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    }
    for (name, value) in &outputs {
        let files = match &arguments.output_dir {
            Some(folder) => values::write_output(folder, name, value, &mut taken)?,
            None => Vec::new(),
        };
        for (suffix, tensor) in values::tensors_of(value) {
            let view = values::view(tensor).filter(|_| tensor.dtype() != DType::String);
            let top = match (ranks, view) {
                (Some(k), Some(view)) => top_k(view, k)
                    .into_iter()
                    .map(|(index, value)| Ranked {
                        index,
                        value,
                        label: labels.as_ref().and_then(|l: &Vec<String>| l.get(index).cloned()),
                    })
                    .collect(),
                _ => Vec::new(),
            };
            let first = match view {
                Some(view) if ranks.is_none() => {
                    (0..view.len().min(PREVIEW)).map(|i| view.value(i)).collect()
                }
                _ => Vec::new(),
            };
            reports.push(OutputReport {
                name: format!("{name}{suffix}"),
                dtype: tensor.dtype().name().to_owned(),
                shape: tensor.dims().to_vec(),
                files: files.clone(),
                top_k: top,
                first,
            });
        }
    }

    let tolerance = Tolerance { relative: arguments.rtol, absolute: arguments.atol };
    let mut expectations = Vec::new();
    for (name, file, expected) in &expected {
        let actual = outputs.iter().find(|(n, _)| n == name).map(|(_, v)| v).ok_or_else(|| {
            Failure::input(format!("the run made no output {name:?}"), "one of the model's outputs")
        })?;
        expectations.push(ExpectReport {
            output: name.clone(),
            file: file.clone(),
            comparison: values::compare_values(actual, expected, tolerance),
        });
    }

    let account = usage::Account {
        command: "run",
        model: source.identity(arguments.receipt.receipt.is_some())?,
        profile: &profile,
        isa: session.isa(),
        threads,
        memory: resources.memory,
        planned: session.planned(),
        fixed_assumed,
        predicted_seconds: session.predicted_seconds(),
        measured,
        bytes_read_by_tier: session.bytes_read_by_tier(),
        energy,
        plan: session.plan_summary(),
        outputs: outputs.iter().flat_map(|(name, value)| values::receipts_of(name, value)).collect(),
    };
    let receipt = account.settle();
    if let Some(path) = &arguments.receipt.receipt {
        receipt.save(path)?;
    }
    progress.finish_and_clear();
    let report = RunReport {
        schema: "lightering.run/1",
        outputs: reports,
        expect: expectations,
        profile: session.node_times(),
        receipt,
    };
    output.result(&report, &text(&report, arguments))?;

    usage::check_budget(&report.receipt)?;
    let missed: Vec<&ExpectReport> = report.expect.iter().filter(|e| !e.comparison.equal).collect();
    match missed.first() {
        None => Ok(Exit::Done),
        Some(first) => Err(Failure {
            exit: Exit::Missed,
            error: anyhow::anyhow!(
                "output {:?} differs from {}: {}",
                first.output,
                first.file.display(),
                first.comparison.difference
            ),
            hint: Some("--rtol and --atol set how much may differ".to_owned()),
            smallest: None,
        }),
    }
}

/// Reads the inputs that were given, or the embedded picture for the embedded model.
fn load_inputs(
    arguments: &RunArguments,
    ports: &[Port],
    pool: &MemoryPool,
) -> Outcome<Vec<values::LoadedInput>> {
    let preprocess = arguments.input.preprocess.as_deref();
    let mut inputs = values::load_inputs(&arguments.input.inputs, ports, preprocess, pool)?;
    if inputs.is_empty() && arguments.model.is_none() {
        let port =
            ports.first().ok_or_else(|| Failure::input("the embedded model has no input", "a new build"))?;
        let picture = InputBytes::Embedded(embedded::PICTURE, embedded::PICTURE_NAME);
        let value = values::read(&picture, port, preprocess, pool)?;
        let held = pool.reserve(format!("input {}", port.name), values::size_of_value(&value))?;
        inputs.push(values::LoadedInput { name: port.name.clone(), value, held });
    }
    Ok(inputs)
}

/// What the user's figure is called in the receipt.
pub fn energy_model(watts: lightering_units::Watts) -> EnergyModel {
    EnergyModel { watts, source: "--energy-model".to_owned() }
}

fn read_labels(path: &Path) -> Outcome<Vec<String>> {
    let place = || format!("reading labels from {}", path.display());
    let size = std::fs::metadata(path).with_context(place)?.len();
    if size > LABELS_BYTES_MAX {
        return Err(Failure::input(
            format!("{} has {size} bytes, too many for labels", path.display()),
            "a text file with one label a line",
        ));
    }
    Ok(std::fs::read_to_string(path).with_context(place)?.lines().map(str::to_owned).collect())
}

/// Reads the files of `--expect`, so that a wrong name is told before the run.
fn read_expected(
    files: &[NamedFile],
    ports: &[Port],
    pool: &MemoryPool,
) -> Outcome<Vec<(String, PathBuf, RuntimeValue)>> {
    let names = || ports.iter().map(|p| p.name.as_str()).collect::<Vec<_>>().join(", ");
    files
        .iter()
        .map(|file| {
            let port = match &file.name {
                Some(name) => ports.iter().find(|p| p.name == *name).ok_or_else(|| {
                    Failure::input(
                        format!("the model has no output {name:?}"),
                        format!("one of its outputs: {}", names()),
                    )
                })?,
                None if ports.len() == 1 => &ports[0],
                None => {
                    return Err(Failure::input(
                        format!("which of the {} outputs is {} for?", ports.len(), file.file.display()),
                        format!("--expect NAME={}, where NAME is one of: {}", file.file.display(), names()),
                    ));
                }
            };
            let value = values::read(&InputBytes::File(&file.file), port, None, pool)
                .map_err(|f| f.context(format!("reading what output {:?} should be", port.name)))?;
            Ok((port.name.clone(), file.file.clone(), value))
        })
        .collect()
}

fn text(report: &RunReport, arguments: &RunArguments) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    for out in &report.outputs {
        let _ = write!(text, "{} {}{:?}", out.name, out.dtype, out.shape);
        if !out.first.is_empty() {
            let more = if out.shape.iter().product::<usize>() > out.first.len() { ", …" } else { "" };
            let numbers: Vec<String> = out.first.iter().map(|x| format!("{x}")).collect();
            let _ = write!(text, " = [{}{more}]", numbers.join(", "));
        }
        text.push('\n');
        if !out.top_k.is_empty() {
            let mut table = Table::new(&["", ">class", ">value", "label"]);
            for rank in &out.top_k {
                table.row([
                    String::new(),
                    rank.index.to_string(),
                    format!("{}", rank.value),
                    rank.label.clone().unwrap_or_default(),
                ]);
            }
            text.push_str(&table.text());
        }
        for file in &out.files {
            let _ = writeln!(text, "  written to {}", file.display());
        }
    }
    for expect in &report.expect {
        let verdict = if expect.comparison.equal { "as expected" } else { "DIFFERS" };
        let _ = writeln!(
            text,
            "{} {verdict}: {} of {} elements differ, largest difference {:.3e} (relative {:.3e})",
            expect.output,
            expect.comparison.mismatched,
            expect.comparison.elements,
            expect.comparison.max_absolute,
            expect.comparison.max_relative
        );
    }
    if arguments.profile {
        text.push('\n');
        text.push_str(&profile_table(&report.profile));
    }
    text.push('\n');
    text.push_str(&usage::summary(&report.receipt));
    text
}

/// The slowest nodes first, with their share.
pub fn profile_table(times: &[NodeTime]) -> String {
    let total: Seconds = times.iter().map(|t| t.total).sum();
    let mut sorted: Vec<&NodeTime> = times.iter().collect();
    sorted.sort_by(|a, b| b.total.0.total_cmp(&a.total.0));
    let mut table = Table::new(&["node", "op", "kernel", ">fastest", ">mean", ">predicted", ">share"]);
    for time in sorted {
        table.row([
            time.name.clone(),
            time.op.clone(),
            time.kernel.clone(),
            time.min.to_string(),
            Seconds(time.total.0 / time.count.max(1) as f64).to_string(),
            time.predicted.to_string(),
            format!("{:.1} %", if total.0 > 0.0 { time.total / total * 100.0 } else { 0.0 }),
        ]);
    }
    table.text()
}
