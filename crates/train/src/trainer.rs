//! Planned training: the step inside its budget, one batch after the other.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use lightering_engine::{
    Decision, EngineError, Feed, OutputView, Part, Plan, PlanOptions, RunReport, RuntimeValue, Session,
    SessionOptions, plan_graph,
};
use lightering_formats::safetensors::NewTensor;
use lightering_graph::passes::{ForwardPass, Pass, PlaceUpdates};
use lightering_graph::{Graph, Tensor, TensorType, UpdateRule, ValueType};
use lightering_tier::ByteSource;
use lightering_units::{Bytes, Seconds};

use crate::step::{EVALUATION, LOSS, SCHEDULE, Step};
use crate::{Checkpoint, Checkpoints, LABEL, TrainError, TrainState};

/// Ways to recompute that are planned at most, each in full.
const RECOMPUTATIONS_MAX: usize = 16;

/// The step with what a budget makes of it, and why.
#[derive(Clone, Debug)]
pub struct ChosenStep {
    /// The graph to plan.
    pub graph: Graph,
    /// Whether tensors may wait on the disk.
    pub spill: bool,
    /// What was looked at and what was taken.
    pub decisions: Vec<Decision>,
}

/// Finds the fastest way to keep a step within the budget of `options`: as it is; with parts of the forward pass computed
/// again; with tensors waiting on the disk, if `options` names a folder. All of them give the same bits.
///
/// # Errors
/// [`EngineError::Budget`] when nothing fits.
pub fn choose(step: &Step, options: &PlanOptions) -> Result<ChosenStep, EngineError> {
    let plain = |graph: Graph, decisions| ChosenStep { graph, spill: false, decisions };
    let Some(budget) = options.budget else { return Ok(plain(step.graph.clone(), Vec::new())) };
    let unbounded = PlanOptions { budget: None, spill: None, ..options.clone() };
    let resident = plan_graph(&step.graph, &[], &unbounded)?;
    if resident.predicted_peak <= budget {
        return Ok(plain(step.graph.clone(), Vec::new()));
    }
    let pass = ForwardPass::of(&step.graph, step.loss);
    let mut best: Option<(Seconds, ChosenStep)> = None;
    let mut take = |seconds: Seconds, chosen: ChosenStep| {
        if best.as_ref().is_none_or(|(s, _)| seconds < *s) {
            best = Some((seconds, chosen));
        }
    };
    let mut least: Option<(Bytes, Graph)> = None;
    for cuts in pass.cuts().into_iter().take(RECOMPUTATIONS_MAX) {
        let mut graph = step.graph.clone();
        let count = pass.recompute(&mut graph, &cuts)?;
        PlaceUpdates.run(&mut graph)?;
        graph.compact();
        let plan = plan_graph(&graph, &[], &unbounded)?;
        if least.as_ref().is_none_or(|(bytes, _)| plan.predicted_peak < *bytes) {
            least = Some((plan.predicted_peak, graph.clone()));
        }
        if plan.predicted_peak <= budget {
            let decision = Decision {
                technique: "recompute".to_owned(),
                what: format!("{count} nodes in {} segments", cuts.len() + 1),
                bytes: resident.predicted_peak.saturating_sub(plan.predicted_peak),
                why: format!(
                    "their results are not kept for the backward pass but computed again: {} instead of {} for a step",
                    plan.predicted_seconds, resident.predicted_seconds
                ),
            };
            take(plan.predicted_seconds, plain(graph, vec![decision]));
        }
    }
    let mut refused = None;
    let mut variants = vec![(&step.graph, Vec::new())];
    if let Some((bytes, graph)) = &least {
        let decision = Decision {
            technique: "recompute".to_owned(),
            what: "results of the forward pass".to_owned(),
            bytes: resident.predicted_peak.saturating_sub(*bytes),
            why: "alone it does not fit the budget".to_owned(),
        };
        variants.push((graph, vec![decision]));
    }
    for (graph, decisions) in variants {
        match plan_graph(graph, &[], options) {
            Ok(plan) => take(
                plan.predicted_seconds,
                ChosenStep { graph: graph.clone(), spill: options.spill.is_some(), decisions },
            ),
            Err(error) => {
                refused.get_or_insert(error);
            }
        }
    }
    match (best, refused) {
        (Some((_, chosen)), _) => Ok(chosen),
        (None, Some(error)) => Err(error),
        (None, None) => Err(EngineError::Internal("no way to plan the step was looked at".to_owned())),
    }
}

/// What one step did.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// Mean loss of the batch, before the update.
    pub loss: f32,
    /// The run.
    pub run: RunReport,
}

/// Part numbers of the session.
const TRAIN: usize = 0;
const EVALUATE: usize = 1;

/// A step in memory, with the parameters that it changes.
pub struct Trainer {
    session: Session,
    step: Step,
    rule: UpdateRule,
    decisions: Vec<Decision>,
    steps: u64,
}

/// Tensors of a batch under the names of a graph's inputs.
struct BatchFeed<'a> {
    tensors: HashMap<String, &'a Tensor>,
    schedule: [f32; 4],
}

impl Feed for BatchFeed<'_> {
    fn fill(&mut self, name: &str, ty: &TensorType, target: &mut [u8]) -> Result<(), String> {
        if name == SCHEDULE {
            for (bytes, value) in target.chunks_exact_mut(4).zip(self.schedule) {
                bytes.copy_from_slice(&value.to_ne_bytes());
            }
            return Ok(());
        }
        let tensor = self.tensors.get(name).ok_or("is missing in the batch")?;
        if tensor.tensor_type() != *ty {
            return Err(format!("is {} in the batch, but the step was made for {ty}", tensor.tensor_type()));
        }
        target.copy_from_slice(tensor.as_bytes());
        Ok(())
    }

    fn value(&mut self, _: &str, ty: &ValueType) -> Result<RuntimeValue, String> {
        Err(format!("has the type {ty}, whose size is not known"))
    }
}

impl Trainer {
    /// Plans the step, allocates its arena and loads the parameters.
    ///
    /// # Errors
    /// As [`choose`] and [`Session::new`].
    pub fn new(
        step: Step,
        sources: Vec<Arc<dyn ByteSource>>,
        options: &PlanOptions,
        rule: UpdateRule,
        profile: bool,
    ) -> Result<Trainer, EngineError> {
        let chosen = choose(&step, options)?;
        let mut plan = options.clone();
        if !chosen.spill {
            plan.spill = None;
        }
        let [output, loss] = &step.evaluation;
        let parts = vec![
            Part { outputs: vec![LOSS.to_owned(), step.output.clone()], updates: true },
            Part { outputs: vec![loss.clone(), output.clone()], updates: false },
        ];
        let options = SessionOptions { profile, parts, ..SessionOptions::new(plan) };
        let session = Session::new(&chosen.graph, sources, &options)?;
        let mut step = step;
        // The session has all that is needed of it.
        step.graph = Graph::new("");
        Ok(Trainer { session, step, rule, decisions: chosen.decisions, steps: 0 })
    }

    /// The plan that is kept.
    pub fn plan(&self) -> &Plan {
        self.session.plan()
    }

    /// What was done to the step before it was planned.
    pub fn decisions(&self) -> &[Decision] {
        &self.decisions
    }

    /// Names of the step's parts.
    pub fn names(&self) -> &Step {
        &self.step
    }

    /// The session, for its counts and its states.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Steps that were made, those before a resume included.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Goes on as if `steps` steps had been made.
    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
    }

    /// One step with the tensors of a batch (those of the model's inputs in order, and [`LABEL`]) at a learning rate.
    /// `fetch` gets the model's first output for the batch.
    ///
    /// # Errors
    /// A tensor does not fit, or a node fails.
    pub fn step<'a>(
        &mut self,
        tensors: impl Iterator<Item = (&'a str, &'a Tensor)>,
        rate: f32,
        mut fetch: impl FnMut(&Prediction<'_>),
    ) -> Result<StepReport, EngineError> {
        let schedule = self.schedule(rate);
        let mut feed = BatchFeed { tensors: self.named(tensors, ""), schedule };
        let mut loss = f32::NAN;
        let run = self.session.run_part(TRAIN, &mut feed, &mut |name, view| {
            receive(name, LOSS, &view, &mut loss, &mut fetch);
            Ok(())
        })?;
        self.steps += 1;
        Ok(StepReport { loss, run })
    }

    /// Loss of a batch without changing anything; `fetch` gets the model's first output.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn evaluate<'a>(
        &mut self,
        tensors: impl Iterator<Item = (&'a str, &'a Tensor)>,
        mut fetch: impl FnMut(&Prediction<'_>),
    ) -> Result<StepReport, EngineError> {
        let mut feed = BatchFeed { tensors: self.named(tensors, EVALUATION), schedule: [0.0; 4] };
        let mut loss = f32::NAN;
        let name_of_loss = self.step.evaluation[1].clone();
        let run = self.session.run_part(EVALUATE, &mut feed, &mut |name, view| {
            receive(name, &name_of_loss, &view, &mut loss, &mut fetch);
            Ok(())
        })?;
        Ok(StepReport { loss, run })
    }

    /// The tensors of a batch under the names of the graph: features in the order of the model's inputs, and the label.
    fn named<'a>(
        &self,
        tensors: impl Iterator<Item = (&'a str, &'a Tensor)>,
        prefix: &str,
    ) -> HashMap<String, &'a Tensor> {
        let mut inputs = self.step.inputs.iter();
        tensors
            .filter_map(|(name, tensor)| {
                let name = if name == LABEL { LABEL } else { inputs.next()? };
                Some((format!("{prefix}{name}"), tensor))
            })
            .collect()
    }

    fn schedule(&self, rate: f32) -> [f32; 4] {
        let power = |beta: f32| {
            let t = i32::try_from(self.steps + 1).unwrap_or(i32::MAX);
            (1.0 - f64::from(beta).powi(t)) as f32
        };
        let (first, second) = match self.rule {
            UpdateRule::Adam { beta1, beta2, .. }
            | UpdateRule::Adam8 { beta1, beta2, .. }
            | UpdateRule::Lion { beta1, beta2, .. } => (power(beta1), power(beta2)),
            UpdateRule::Sgd { .. } | UpdateRule::Accumulate => (1.0, 1.0),
        };
        [rate, 1.0, first, second]
    }

    /// Writes a checkpoint: parameters, moments and tracked statistics, one after the other from where they are.
    ///
    /// # Errors
    /// What the medium reports; older checkpoints are then as they were.
    pub fn save(&self, checkpoints: &Checkpoints, state: &TrainState) -> Result<PathBuf, TrainError> {
        let tensors: Vec<NewTensor> = self
            .session
            .states()
            .map(|(name, ty)| NewTensor {
                name: name.to_owned(),
                dtype: ty.dtype,
                dims: ty.dims().unwrap_or_default(),
            })
            .collect();
        checkpoints.save(state, &tensors, &mut |tensor, out| {
            let mut result = Ok(());
            let read = self.session.read_state(&tensor.name, &mut |piece| {
                if result.is_ok() {
                    result = out.write_all(piece);
                }
            });
            read.map_err(std::io::Error::other).and(result)
        })
    }

    /// Goes back to where a checkpoint stands.
    ///
    /// # Errors
    /// It is of another model or other options, or cannot be read; the trainer is then not to be used.
    pub fn restore(&mut self, checkpoint: &Checkpoint) -> Result<(), TrainError> {
        let states: Vec<(String, u64)> = self
            .session
            .states()
            .map(|(name, ty)| (name.to_owned(), ty.size_bytes().unwrap_or(0) as u64))
            .collect();
        for (name, size) in states {
            let (mut at, mut result) = (0, Ok(()));
            self.session.write_state(&name, &mut |piece| {
                if result.is_ok() {
                    result = checkpoint.read_part(&name, size, at, piece);
                    at += piece.len() as u64;
                }
            })?;
            result?;
        }
        self.steps = checkpoint.state.step;
        Ok(())
    }

    /// Names and types of everything that a checkpoint has to hold.
    pub fn states(&self) -> impl Iterator<Item = (&str, TensorType)> {
        self.session.states()
    }

    /// Lends the bytes of a state, in one or several pieces from the first to the last.
    ///
    /// # Errors
    /// There is no such state, or the disk fails where it waits.
    pub fn read_state(&self, name: &str, read: &mut dyn FnMut(&[u8])) -> Result<(), EngineError> {
        self.session.read_state(name, read)
    }

    /// Lends the bytes of a state to be overwritten, in one or several pieces from the first to the last.
    ///
    /// # Errors
    /// As [`read_state`](Self::read_state).
    pub fn write_state(&mut self, name: &str, write: &mut dyn FnMut(&mut [u8])) -> Result<(), EngineError> {
        self.session.write_state(name, write)
    }
}

/// What a model says of a batch, as it is lent.
#[derive(Clone, Copy, Debug)]
pub struct Prediction<'a> {
    /// Sizes.
    pub dims: &'a [usize],
    /// Elements.
    pub data: &'a [f32],
}

fn receive(
    name: &str,
    name_of_loss: &str,
    view: &OutputView<'_>,
    loss: &mut f32,
    fetch: &mut impl FnMut(&Prediction<'_>),
) {
    let OutputView::Tensor(t) = view else { return };
    let data: &[f32] = bytemuck::cast_slice(t.bytes);
    if name == name_of_loss {
        *loss = data.first().copied().unwrap_or(f32::NAN);
    } else {
        fetch(&Prediction { dims: t.dims, data });
    }
}
