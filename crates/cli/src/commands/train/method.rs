//! Which parameters learn: `--method` made into an update scheme, inside the budget.

use crate::arguments::TrainArguments;
use crate::failure::{Failure, Outcome};
use crate::model::Means;
use crate::output::Output;
use anyhow::Context;
use lightering_engine::{EngineError, Evaluator, PlanOptions};
use lightering_graph::passes::BatchNormMode;
use lightering_graph::{Graph, TensorType, UpdateRule};
use lightering_tier::ByteSource;
use lightering_train::scheme::{
    ActMask, Anatomy, Contributions, Peak, Scheme, SearchOptions, Sparse, SparseScheme, StepSummary, Updates,
    contributions_from_gradients, search,
};
use lightering_train::{
    Change, Loader, LoaderOptions, Schedule, Split, Step, StepOptions, TrainError, Trainer, build_step,
};
use lightering_units::Bytes;
use std::fmt::Write as _;
use std::sync::Arc;

/// Batches that gradients are averaged over in a quick search.
const QUICK_BATCHES: usize = 4;
/// Steps of each run of a measured search.
const MEASURED_STEPS: u64 = 20;
/// Layers whose weights a measured search tries, spread over the last ones.
const MEASURED_LAYERS: usize = 5;

/// All that a step is made of but its scheme.
pub struct Maker<'a> {
    pub arguments: &'a TrainArguments,
    pub graph: &'a Graph,
    pub label: &'a TensorType,
    pub evaluator: &'a Evaluator,
    pub sources: &'a [Arc<dyn ByteSource>],
    pub options: &'a StepOptions,
    pub means: Means<'a>,
    pub held: Bytes,
    pub split: &'a Split,
    pub loader: &'a LoaderOptions,
    pub schedule: &'a Schedule,
}

impl Maker<'_> {
    fn options_of(&self, updates: &Updates) -> StepOptions {
        let mut options = self.options.clone();
        updates.install(&mut options);
        options
    }

    fn plan_options(&self) -> PlanOptions {
        let held = self.held + self.means.pool.used();
        let limit = self.means.pool.limit().map(|limit| limit.saturating_sub(held));
        PlanOptions { spill: self.arguments.spill.clone(), ..self.means.plan_options(limit) }
    }

    fn step(&self, options: &StepOptions) -> Result<Step, TrainError> {
        build_step(self.graph, self.label, self.evaluator, options)
    }

    /// The planned peak of a step with these updates, if it fits the budget.
    fn peak(&self, updates: &Updates) -> Result<Option<Bytes>, TrainError> {
        let step = self.step(&self.options_of(updates))?;
        let options = self.plan_options();
        let planned = lightering_train::choose(&step, &options).and_then(|chosen| {
            let options =
                PlanOptions { spill: options.spill.clone().filter(|_| chosen.spill), ..options.clone() };
            lightering_engine::plan_graph(&chosen.graph, &[], &options)
        });
        match planned {
            Ok(plan) => Ok(Some(plan.predicted_peak)),
            Err(EngineError::Budget { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The step of the method that was asked for, or of the richest that fits; and what to tell about it.
    pub fn make(&self, output: Output) -> Outcome<(Step, Vec<String>)> {
        let learning = &self.arguments.learning;
        let mut notes = Vec::new();
        // Of a language model the method has already been understood.
        if self.options.scheme.is_some() {
            return Ok((self.step(self.options)?, notes));
        }
        let asked: Option<Scheme> = learning.method.as_deref().map(str::parse).transpose()?;
        let mut scheme = match asked {
            Some(scheme) => scheme,
            None if !learning.tune || self.peak(&Updates::default())?.is_some() => Scheme::Full,
            None => {
                notes.push(
                    "all parameters together do not fit the budget; the best that fit were looked for"
                        .to_owned(),
                );
                Scheme::Sparse(Sparse::Auto)
            }
        };
        if learning.search && !matches!(scheme, Scheme::Sparse(_)) {
            return Err(Failure::input("--search goes with --method sparse:auto", "--method sparse:auto"));
        }
        let mask: ActMask = learning.act_mask.parse()?;
        if let Scheme::MobileTl(settings) = &mut scheme {
            settings.mask = mask;
            settings.train_squeeze = learning.se == "train";
        }
        if scheme == Scheme::Full {
            return Ok((self.step(self.options)?, notes));
        }
        let anatomy = Anatomy::of(self.graph, self.evaluator)?;
        if matches!(scheme, Scheme::Sparse(Sparse::Auto)) {
            scheme = Scheme::Sparse(Sparse::Given(self.searched(&anatomy, output, &mut notes)?));
        }
        let mut fits = |updates: &Updates| self.peak(updates);
        let fits: &mut Peak<'_> = &mut fits;
        let updates = scheme.updates(&anatomy, self.evaluator, fits)?;
        notes.extend(updates.notes.iter().cloned());
        Ok((self.step(&self.options_of(&updates))?, notes))
    }

    fn searched(&self, anatomy: &Anatomy, output: Output, notes: &mut Vec<String>) -> Outcome<SparseScheme> {
        let contributions = if self.arguments.learning.search {
            self.measured(anatomy, output)?
        } else {
            self.foreseen(anatomy)?
        };
        let options = SearchOptions { seed: self.arguments.learning.seed, ..SearchOptions::default() };
        let found = search(anatomy, &contributions, options, &mut |scheme| {
            let updates = Scheme::Sparse(Sparse::Given(scheme.clone()));
            let updates = updates.updates(anatomy, self.evaluator, &mut |_| Ok(None))?;
            self.peak(&updates)
        })?;
        notes.push(format!(
            "sparse:auto: weights of {} layers and biases of the last {} learn, {} planned; {} schemes were planned",
            found.scheme.weight_idx.len(),
            found.scheme.n_bias_update,
            found.peak,
            found.plans
        ));
        if let Some(path) = &self.arguments.learning.write_scheme {
            let text = serde_json::to_string_pretty(&found.scheme).map_err(anyhow::Error::from)?;
            std::fs::write(path, text + "\n").with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(found.scheme)
    }

    /// From the gradients of some batches, of as many layers from the last as the budget allows.
    fn foreseen(&self, anatomy: &Anatomy) -> Outcome<Contributions> {
        let mut count = anatomy.layers.len();
        loop {
            let layers = &anatomy.layers[anatomy.layers.len() - count..];
            let names = layers.iter().flat_map(|l| std::iter::once(&l.weight).chain(&l.shifts));
            let mut options = self.options.clone();
            options.rule = UpdateRule::Sgd { momentum: 0.0, nesterov: false, weight_decay: 0.0 };
            options.clip = None;
            options.batch_norm = BatchNormMode::Frozen;
            options.scheme = Some(names.map(|n| (n.clone(), Change::Whole)).collect());
            let step = self.step(&options)?;
            match Trainer::new(step, self.sources.to_vec(), &self.plan_options(), options.rule, false) {
                Ok(mut trainer) => {
                    let mut loader =
                        Loader::new(self.split.train.clone(), self.loader.clone(), self.means.pool)?;
                    return Ok(contributions_from_gradients(
                        anatomy,
                        self.evaluator,
                        &mut trainer,
                        &mut loader,
                        QUICK_BATCHES,
                    )?);
                }
                Err(EngineError::Budget { .. }) if count > 1 => count = count.div_ceil(2),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// From short runs: how much lower the validation loss is.
    fn measured(&self, anatomy: &Anatomy, output: Output) -> Outcome<Contributions> {
        let count = anatomy.layers.len();
        let eligible: Vec<usize> = (0..count).filter(|&i| anatomy.layers[i].axis.is_some()).collect();
        let tail = &eligible[eligible.len() / 2..];
        let stride = tail.len().div_ceil(MEASURED_LAYERS).max(1);
        let weights: Vec<usize> = tail.iter().rev().step_by(stride).copied().collect();
        let mut run = 0;
        let mut measure = |scheme: &SparseScheme| -> Result<f64, TrainError> {
            let updates = Scheme::Sparse(Sparse::Given(scheme.clone()));
            let updates = updates.updates(anatomy, self.evaluator, &mut |_| Ok(None))?;
            let options = self.options_of(&updates);
            let step = self.step(&options)?;
            let mut trainer =
                Trainer::new(step, self.sources.to_vec(), &self.plan_options(), options.rule, false)?;
            let mut loader = Loader::new(self.split.train.clone(), self.loader.clone(), self.means.pool)?;
            for step in 0..MEASURED_STEPS {
                let Some(batch) = loader.next_batch()? else { break };
                trainer.step(batch.tensors(), self.schedule.rate_at(step, MEASURED_STEPS), |_| ())?;
            }
            drop(loader);
            let batch = self.loader.batch;
            let validation = self.split.validation.clone();
            let (loss, _) = lightering_train::evaluate(&mut trainer, validation, batch, self.means.pool)?;
            run += 1;
            if !output.quiet {
                eprintln!("search: run {run}, validation loss {loss:.4}");
            }
            Ok(-loss)
        };
        Ok(Contributions::measured(anatomy, &[count / 3, 2 * count / 3, count], &weights, &mut measure)?)
    }

    /// What the plan says of a step, beside the step in which everything learns.
    pub fn compared(&self, step: &Step) -> Outcome<(StepSummary, StepSummary)> {
        Ok((StepSummary::of(step), StepSummary::of(&self.step(self.options)?)))
    }
}

/// Two columns: the step, and that in which everything learns.
pub fn text_of(step: &StepSummary, full: &StepSummary) -> String {
    let mut text = format!("{:<28}{:>14}{:>18}\n", "the step", "this method", "all parameters");
    let mut row = |name: &str, a: String, b: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<28}{a:>14}{b:>18}");
    };
    row("nodes", step.nodes.to_string(), full.nodes.to_string());
    row("elements that change", step.trained_elements.to_string(), full.trained_elements.to_string());
    row("weights", step.weights.to_string(), full.weights.to_string());
    row("saved activations", step.saved_activations.to_string(), full.saved_activations.to_string());
    row("gradients at once", step.gradients.to_string(), full.gradients.to_string());
    row("gradients in all", step.gradients_in_all.to_string(), full.gradients_in_all.to_string());
    row("moments", step.moments.to_string(), full.moments.to_string());
    row("forward arithmetic", step.forward_flops.to_string(), full.forward_flops.to_string());
    row("backward arithmetic", step.backward_flops.to_string(), full.backward_flops.to_string());
    text
}
