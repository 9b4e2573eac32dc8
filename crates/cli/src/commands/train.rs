//! `lighter train`

mod language;
mod method;
mod watch;

use crate::arguments::TrainArguments;
use crate::failure::{Exit, Failure, Outcome};
use crate::model::{Means, Model, ModelSource, load_profile};
use crate::output::{Output, Table};
use crate::usage::Baseline;
use anyhow::Context;
use language::LanguageTraining;
use lightering_engine::{Decision, PlanOptions};
use lightering_graph::passes::BatchNormMode;
use lightering_graph::{Graph, TensorType};
use lightering_meter::{MemoryPool, Reservation, process};
use lightering_tier::ByteSource;
use lightering_train::scheme::StepSummary;
use lightering_train::{
    Architecture, Augmentation, Change, Epoch, FitOptions, LABEL, Loader, LoaderOptions, Loss, Mixing,
    Normalise, OpenOptions, Optimizer, Schedule, Split, StepOptions, Trainer, Vocabulary, export_onnx, fit,
    open,
};
use lightering_units::{Bytes, Seconds};
use method::Maker;
use serde::Serialize;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use watch::{Watch, percent};

/// `--json`
#[derive(Debug, Serialize)]
struct TrainReport {
    schema: &'static str,
    data: String,
    parameters: usize,
    steps: u64,
    epochs: Vec<Epoch>,
    test_loss: Option<f64>,
    test_accuracy: Option<f64>,
    losses: Vec<f32>,
    step_seconds_median: Seconds,
    predicted_step_seconds: Seconds,
    budget_bytes: Option<Bytes>,
    predicted_peak_bytes: Bytes,
    peak_resident_bytes: Option<Bytes>,
    fixed_bytes: Option<Bytes>,
    bytes_spilled: Bytes,
    decisions: Vec<Decision>,
    seed: u64,
    /// What the written model expects to have been done to its input.
    normalisation: Option<(Vec<f32>, Vec<f32>)>,
    output: PathBuf,
}

/// What the words on the command line mean.
struct Meant {
    optimizer: Optimizer,
    schedule: Schedule,
    loss: Loss,
    augmentation: Option<Augmentation>,
    mixing: Option<Mixing>,
}

impl Meant {
    fn of(arguments: &TrainArguments, usual_rate: Option<f32>) -> Outcome<Meant> {
        let learning = &arguments.learning;
        let optimizer: Optimizer = learning.optimizer.parse()?;
        let schedule = match &learning.lr {
            Some(text) => text.parse()?,
            None => {
                let share = if learning.tune { TUNE_RATE } else { 1.0 };
                let rate = share * usual_rate.unwrap_or(optimizer.usual_rate);
                format!("cosine:{rate},warmup=5%").parse()?
            }
        };
        if let Some(clip) = learning.clip
            && !(clip.is_finite() && clip > 0.0)
        {
            return Err(Failure::input(format!("--clip {clip} is no norm"), "a number above 0, such as 1"));
        }
        let samples = &arguments.samples;
        Ok(Meant {
            optimizer,
            schedule,
            loss: learning.loss.parse()?,
            augmentation: samples.augment.as_deref().map(str::parse).transpose()?,
            mixing: samples.mix.as_deref().map(str::parse).transpose()?,
        })
    }
}

/// What `lighter tune` does with the usual learning rate.
const TUNE_RATE: f32 = 0.3;

/// `lighter tune`
pub fn tune(mut arguments: TrainArguments, output: Output) -> Outcome {
    arguments.learning.tune = true;
    arguments.learning.freeze_statistics = true;
    run(&arguments, output)
}

/// A model and what it learns from, whatever kind of model it is.
struct Prepared {
    split: Split,
    /// The forward graph for batches of this training.
    graph: Graph,
    sources: Vec<Arc<dyn ByteSource>>,
    /// What changes; everything if not given.
    scheme: Option<HashMap<String, Change>>,
    /// A learning rate where none is given and the optimizer's does not suit.
    usual_rate: Option<f32>,
    ending: Ending,
    _reserved: Option<Reservation>,
}

/// What becomes of the trained model.
enum Ending {
    /// The graph as it was imported, written as ONNX.
    Graph(Box<Graph>),
    /// A language model, written as GGUF.
    Language(Box<LanguageTraining>),
}

/// Opens a graph or makes a new one, and the data that it learns from.
fn prepare_graph(arguments: &TrainArguments, pool: &MemoryPool) -> Outcome<Prepared> {
    let path = Path::new(&arguments.model);
    let file = if path.exists() || path.extension().is_some_and(|e| e == "onnx") {
        Some(Model::open(&ModelSource::File(path.to_owned()))?)
    } else {
        None
    };
    let split = open_data(arguments, file.as_ref(), pool)?;
    let model = match file {
        Some(model) => model,
        None => new_model(arguments, &split)?,
    };
    let batch = arguments.learning.batch as usize;
    let mut dims: Vec<Vec<usize>> = Vec::new();
    for feature in split.train.features().iter().filter(|f| f.name != LABEL) {
        dims.push(std::iter::once(batch).chain(feature.dims.iter().copied()).collect());
    }
    let imported = Box::new(model.graph().clone());
    let sources = model.sources().to_vec();
    let graph = model.for_training(&dims)?;
    let ending = Ending::Graph(imported);
    Ok(Prepared { split, graph, sources, scheme: None, usual_rate: None, ending, _reserved: None })
}

/// Trains, watches, and writes the model.
pub fn run(arguments: &TrainArguments, output: Output) -> Outcome {
    let baseline = Baseline::now();
    let (resources, learning) = (&arguments.resources, &arguments.learning);
    let profile = load_profile(resources.machine.as_deref())?;
    let pool = MemoryPool::new(resources.memory);
    let threads = resources.threads.unwrap_or_else(lightering_meter::host::cores);
    let means = Means { threads, profile: &profile, pool: &pool, baseline: &baseline };

    let language = language::is_one(&arguments.model);
    let prepared = match language {
        true => language::prepare(arguments, &pool)?,
        false => prepare_graph(arguments, &pool)?,
    };
    let Prepared { split, graph, sources, scheme, usual_rate, ending, _reserved } = prepared;
    let meant = Meant::of(arguments, usual_rate)?;
    if !output.quiet {
        eprintln!("{}", split.found);
    }
    let batch = learning.batch as usize;
    let loader_options = LoaderOptions {
        batch,
        seed: learning.seed,
        augmentation: meant.augmentation,
        mixing: meant.mixing,
        epochs: Some(learning.epochs),
        ..LoaderOptions::default()
    };
    let mut loader = Loader::new(split.train.clone(), loader_options.clone(), &pool)?;
    let label = label_type(&loader, batch)?;
    let step_options = StepOptions {
        decay_matrices_only: language,
        // Language models are trained so everywhere.
        clip: learning.clip.or(language.then_some(1.0)),
        batch_norm: if learning.freeze_statistics { BatchNormMode::Frozen } else { BatchNormMode::Train },
        scheme,
        ..StepOptions::new(meant.loss, meant.optimizer.rule)
    };
    let evaluator = lightering_engine::Evaluator::new(MemoryPool::unbounded(), sources.clone());
    let maker = Maker {
        arguments,
        graph: &graph,
        label: &label,
        evaluator: &evaluator,
        sources: &sources,
        options: &step_options,
        means,
        held: crate::model::held_beside(means, pool.used()),
        split: &split,
        loader: &loader_options,
        schedule: &meant.schedule,
    };
    let (step, notes) = maker.make(output)?;
    if !output.quiet {
        notes.iter().for_each(|note| eprintln!("{note}"));
    }
    if arguments.plan {
        let summaries = maker.compared(&step)?;
        return plan_only(arguments, &step, &summaries, means, maker.held, output);
    }
    drop(graph);
    let parameters = step.parameters.len();
    let held = crate::model::held_beside(means, pool.used());
    let rule = meant.optimizer.rule;
    let start = |plan: &PlanOptions| {
        let plan = PlanOptions { spill: arguments.spill.clone(), ..plan.clone() };
        Trainer::new(step.clone(), sources.clone(), &plan, rule, arguments.profile)
    };
    let (mut trainer, _) =
        crate::model::within_budget(means, held, pool.used(), start, |trainer: &Trainer| trainer.plan())?;
    drop(step);
    draw(arguments, trainer.plan())?;

    let steps = learning.steps.unwrap_or(u64::MAX).min(learning.epochs * loader.batches_per_epoch());
    let options =
        FitOptions { epochs: learning.epochs, schedule: meant.schedule.clone(), steps: learning.steps };
    let title = format!("{} on {}", arguments.model, arguments.data.display());
    let per_epoch = loader.batches_per_epoch();
    let mut watch = Watch::new(arguments, output, title, meant.schedule.to_string(), steps, per_epoch)?;
    if arguments.resume {
        let start = watch.resume(&mut trainer)?;
        // The buffers of the loader that will not be used first.
        drop(loader);
        loader = Loader::new(split.train.clone(), LoaderOptions { start, ..loader_options }, &pool)?;
    }
    let fitted =
        fit(&mut trainer, &mut loader, &split.validation, batch, &options, &pool, &mut |trainer, event| {
            watch.note(trainer, event)
        });
    watch.finish()?;
    let epochs = fitted.map_err(|error| {
        let hint = watch.last_checkpoint().map(|last| format!("--resume, from {last}"));
        let failure = Failure::from(error);
        match hint {
            Some(hint) => failure.or_hint(hint),
            None => failure,
        }
    })?;
    let Watch { losses, mut times, table, .. } = watch;
    let (mut test_loss, mut test_accuracy) = (None, None);
    if let Some(test) = &split.test {
        let (loss, accuracy) = lightering_train::evaluate(&mut trainer, test.clone(), batch, &pool)?;
        (test_loss, test_accuracy) = (Some(loss), accuracy);
    }
    drop(loader);
    let target = match (&arguments.output, &ending) {
        (Some(target), _) => target.clone(),
        (None, Ending::Graph(_)) => trained_name(Path::new(&arguments.model)),
        (None, Ending::Language(_)) => LanguageTraining::name(&arguments.model),
    };
    match &ending {
        Ending::Graph(imported) => export_onnx(&trainer, imported, &sources, &target)?,
        Ending::Language(language) => {
            for note in language.export(arguments, &trainer, &target)?.notes {
                if !output.quiet {
                    eprintln!("{note}");
                }
            }
        }
    }
    times.sort_by(f64::total_cmp);
    let measured = baseline.measured(Seconds(0.0), None, Bytes::ZERO);
    let mut decisions = trainer.decisions().to_vec();
    decisions.extend(trainer.plan().decisions.iter().cloned());
    let report = TrainReport {
        schema: "lightering.train/1",
        data: split.found.clone(),
        parameters,
        steps: trainer.steps(),
        epochs,
        test_loss,
        test_accuracy,
        losses,
        step_seconds_median: Seconds(times.get(times.len() / 2).copied().unwrap_or(0.0)),
        predicted_step_seconds: trainer.plan().predicted_seconds,
        budget_bytes: resources.memory,
        predicted_peak_bytes: trainer.plan().predicted_peak,
        peak_resident_bytes: process::memory().peak_resident,
        fixed_bytes: measured.fixed_bytes,
        bytes_spilled: trainer.session().bytes_spilled(),
        decisions,
        seed: learning.seed,
        normalisation: split
            .train
            .features()
            .first()
            .and_then(|f| f.normalisation.as_ref())
            .map(|n| (n.mean.clone(), n.std.clone())),
        output: target,
    };
    output.result(&report, &text_of(&report, &table))?;
    Ok(Exit::Done)
}

/// The type of a batch's labels.
fn label_type(loader: &Loader, batch: usize) -> Outcome<TensorType> {
    let label = loader.features().iter().find(|f| f.name == LABEL);
    let label = label.ok_or_else(|| Failure::input("the data has no labels", "data with labels"))?;
    let dims: Vec<usize> = std::iter::once(batch).chain(label.dims.iter().copied()).collect();
    Ok(TensorType::fixed(label.dtype, &dims))
}

/// A network of a known architecture that fits the data.
fn new_model(arguments: &TrainArguments, split: &Split) -> Outcome<Model> {
    let architecture: Architecture = arguments.model.parse()?;
    let features = split.train.features();
    let (input, label) = match features {
        [input, .., label] if label.name == LABEL => (input, label),
        _ => return Err(Failure::input("the data has no labels", "data with labels")),
    };
    let outputs = match split.train.classes().len() {
        0 => label.dims.iter().product::<usize>().max(1),
        classes => classes,
    };
    Ok(Model::of_graph(architecture.build(input, label, outputs, None, arguments.learning.seed)?))
}

fn open_data(arguments: &TrainArguments, model: Option<&Model>, pool: &MemoryPool) -> Outcome<Split> {
    let samples = &arguments.samples;
    // A picture is as large as the model wants it, unless told otherwise.
    let input = model.and_then(|m| m.inputs().into_iter().next());
    let declared = input.and_then(|p| p.ty.tensor()?.shape.clone()).unwrap_or_default();
    let fixed = |i: usize| declared.get(i).and_then(|d| d.fixed());
    let own = fixed(2).zip(fixed(3)).filter(|_| declared.len() == 4);
    let size = match (samples.size, own) {
        (Some(size), _) => Some((size, size)),
        (None, Some((h, w))) => Some((w as u32, h as u32)),
        (None, None) => None,
    };
    let options = OpenOptions {
        size,
        channels: fixed(1).filter(|c| declared.len() == 4 && *c == 1).unwrap_or(3),
        seed: arguments.learning.seed,
        validation: samples.validation,
        context: samples.context as usize,
        label: samples.label.clone(),
        normalise: if samples.normalise == "none" { Normalise::None } else { Normalise::Measured },
        vocabulary: match samples.vocabulary.as_str() {
            "bytes" => Vocabulary::Bytes,
            _ => Vocabulary::Characters,
        },
        regression: samples.regression,
        pool: pool.clone(),
        ..OpenOptions::default()
    };
    Ok(open(&arguments.data, &options)?)
}

fn plan_only(
    arguments: &TrainArguments,
    step: &lightering_train::Step,
    (summary, full): &(StepSummary, StepSummary),
    means: Means<'_>,
    held: Bytes,
    output: Output,
) -> Outcome {
    let plan = crate::model::planned(means, held, |options| {
        let options = PlanOptions { spill: arguments.spill.clone(), ..options.clone() };
        let chosen = lightering_train::choose(step, &options)?;
        let options = PlanOptions { spill: options.spill.clone().filter(|_| chosen.spill), ..options };
        let mut plan = lightering_engine::plan_graph(&chosen.graph, &[], &options)?;
        plan.decisions.splice(0..0, chosen.decisions);
        Ok(plan)
    })?;
    draw(arguments, &plan)?;
    let report = PlanReport { plan: &plan, step: summary, all_parameters: full };
    output.result(&report, &format!("{plan}\n{}", method::text_of(summary, full)))?;
    Ok(Exit::Done)
}

/// `--plan --json`
#[derive(Serialize)]
struct PlanReport<'a> {
    #[serde(flatten)]
    plan: &'a lightering_engine::Plan,
    step: &'a StepSummary,
    all_parameters: &'a StepSummary,
}

fn draw(arguments: &TrainArguments, plan: &lightering_engine::Plan) -> Outcome<()> {
    if let Some(path) = &arguments.svg {
        std::fs::write(path, plan.to_svg()).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn trained_name(model: &Path) -> PathBuf {
    let stem = model.file_stem().map_or_else(|| "model".into(), |s| s.to_string_lossy().into_owned());
    PathBuf::from(format!("{stem}-trained.onnx"))
}

fn text_of(report: &TrainReport, table: &Table) -> String {
    let mut text = table.text();
    // Writing to a String cannot fail.
    if let Some(loss) = report.test_loss {
        let _ =
            writeln!(text, "test              loss {loss:.4}, accuracy {}", percent(report.test_accuracy));
    }
    let _ = writeln!(
        text,
        "a step            {} (median of {}; {} predicted)",
        report.step_seconds_median, report.steps, report.predicted_step_seconds
    );
    let beyond = report.peak_resident_bytes.zip(report.fixed_bytes).map(|(p, f)| p.saturating_sub(f));
    let _ = writeln!(
        text,
        "memory            {} planned for the step, {} at the peak of the program{}",
        report.predicted_peak_bytes,
        beyond.map_or_else(|| "unknown".to_owned(), |b| b.to_string()),
        report.budget_bytes.map_or_else(String::new, |b| format!(", of {b}"))
    );
    for d in &report.decisions {
        let _ = writeln!(text, "{:<17} {} ({}): {}", d.technique, d.what, d.bytes, d.why);
    }
    if let Some((mean, std)) = &report.normalisation {
        let _ = writeln!(text, "input             (x - {mean:?}) / {std:?}, as the model now expects it");
    }
    let _ = writeln!(text, "written to        {}", report.output.display());
    text
}
