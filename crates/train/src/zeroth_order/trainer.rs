//! Steps, one after the other.

use std::collections::HashMap;
use std::sync::Arc;

use lightering_engine::{
    EngineError, Feed, OutputView, Part, Plan, PlanOptions, RunReport, RuntimeValue, Session, SessionOptions,
};
use lightering_graph::{Graph, Tensor, TensorType, ValueType};
use lightering_kernels::{
    Noise, Pending, PerturbStep, Perturbation, ReplayStep, ThreadPool, add_noise, perturb, replay_steps,
};
use lightering_tier::ByteSource;

use super::{LoggedStep, ZO, ZO_SEEDS, ZoHeader, ZoStep};
use crate::export::StateReader;
use crate::trainer::Prediction;
use crate::{LABEL, Random, TrainError};

/// What tells the seeds of steps from other random numbers of a training.
const PURPOSE: u64 = 0x5A4F;
/// After so many steps in a row whose loss is no number the learning rate is halved.
const BAD_STEPS: u32 = 5;
/// Elements of each parameter that are looked at to see whether `eps` changes them.
const SAMPLE: usize = 1024;

/// Where a training stands, its weights apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ZoState {
    /// The seed that those of the steps come from.
    pub seed: u64,
    /// Steps so far.
    pub step: u64,
    /// The step before, as long as it is not done.
    pub pending: Option<LoggedStep>,
    /// What the learning rates of the schedule are multiplied with.
    pub rate_factor: f32,
    /// Steps whose loss was no number, in all and in a row.
    pub skipped: [u64; 2],
}

impl ZoState {
    /// The beginning.
    pub fn new(seed: u64) -> ZoState {
        ZoState { seed, step: 0, pending: None, rate_factor: 1.0, skipped: [0; 2] }
    }

    /// The seed of the next step.
    pub fn next_seed(&self) -> u64 {
        Random::derived(self.seed, &[PURPOSE, self.step]).bits()
    }

    /// Counts a step with these losses and says what becomes of it.
    pub fn advance(&mut self, losses: [f32; 2], eps: f32, rate: f32) -> LoggedStep {
        let gradient = (losses[0] - losses[1]) / (2.0 * eps);
        let finite = losses.iter().all(|l| l.is_finite()) && gradient.is_finite();
        let step = LoggedStep {
            seed: self.next_seed(),
            gradient: finite.then_some(gradient),
            rate: rate * self.rate_factor,
        };
        self.count(&step);
        step
    }

    /// Counts a step, one that was logged before.
    pub fn count(&mut self, step: &LoggedStep) {
        self.step += 1;
        if step.gradient.is_some() {
            self.skipped[1] = 0;
            return;
        }
        self.skipped[0] += 1;
        self.skipped[1] += 1;
        if self.skipped[1] == u64::from(BAD_STEPS) {
            self.rate_factor /= 2.0;
            self.skipped[1] = 0;
        }
    }
}

/// What one step did.
#[derive(Clone, Debug)]
pub struct ZoReport {
    /// The losses at both sides.
    pub losses: [f32; 2],
    /// What goes into the log.
    pub step: LoggedStep,
    /// The run; for plain MeZO the second of both.
    pub run: RunReport,
}

impl ZoReport {
    /// The mean of both losses.
    pub fn loss(&self) -> f32 {
        0.5 * (self.losses[0] + self.losses[1])
    }
}

/// Part numbers of the session.
const TRAIN: usize = 0;
const EVALUATE: usize = 1;

/// A step in memory, with the parameters that it changes.
pub struct ZoTrainer {
    session: Session,
    step: ZoStep,
    state: ZoState,
    threads: ThreadPool,
    /// A step broke off; some parameters have it behind them and others have not.
    torn: bool,
}

/// Tensors of a batch under the names of a graph's inputs.
struct BatchFeed<'a> {
    tensors: HashMap<String, &'a Tensor>,
    zo: [f32; 4],
    seeds: [i64; 2],
}

impl Feed for BatchFeed<'_> {
    fn fill(&mut self, name: &str, ty: &TensorType, target: &mut [u8]) -> Result<(), String> {
        if name == ZO {
            target.copy_from_slice(bytemuck::cast_slice(&self.zo));
            return Ok(());
        }
        if name == ZO_SEEDS {
            target.copy_from_slice(bytemuck::cast_slice(&self.seeds));
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

impl ZoTrainer {
    /// Plans the step, allocates its arena and loads the parameters. Under a budget that they do not fit in, they stay in
    /// the folder for spilled tensors and come into memory once per step.
    ///
    /// # Errors
    /// As [`Session::new`].
    pub fn new(
        step: &ZoStep,
        sources: Vec<Arc<dyn ByteSource>>,
        options: &PlanOptions,
        seed: u64,
        profile: bool,
    ) -> Result<ZoTrainer, EngineError> {
        let [plus, minus] = step.losses.clone();
        let plain = step.settings.plain;
        let train = if plain { vec![plus.clone()] } else { vec![plus.clone(), minus] };
        let with_output = |mut list: Vec<String>| {
            list.push(step.output.clone());
            list
        };
        let parts = vec![
            Part { outputs: with_output(train), updates: !plain },
            Part { outputs: with_output(vec![plus]), updates: false },
        ];
        let options = SessionOptions { profile, parts, ..SessionOptions::new(options.clone()) };
        let graph = if plain { &step.forward } else { &step.graph };
        let session = Session::new(graph, sources, &options)?;
        let mut step = step.clone();
        // The session has all that is needed of them.
        (step.graph, step.forward) = (Graph::new(""), Graph::new(""));
        let threads = ThreadPool::new(options.plan.threads);
        Ok(ZoTrainer { session, step, state: ZoState::new(seed), threads, torn: false })
    }

    /// The plan that is kept.
    pub fn plan(&self) -> &Plan {
        self.session.plan()
    }

    /// Names of the step's parts.
    pub fn names(&self) -> &ZoStep {
        &self.step
    }

    /// The session, for its counts and its states.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Where the training stands.
    pub fn state(&self) -> &ZoState {
        &self.state
    }

    /// The beginning of a log of this training.
    pub fn header(&self) -> ZoHeader {
        ZoHeader {
            eps: self.step.settings.eps,
            seed: self.state.seed,
            parameters: self.step.parameters.clone(),
        }
    }

    fn whole(&self) -> Result<(), TrainError> {
        match self.torn {
            false => Ok(()),
            true => Err(TrainError::invalid(
                "training from forward passes",
                "a step broke off between two parameters",
                "to begin again from the model and the log of the steps",
            )),
        }
    }

    /// One step with the tensors of a batch (those of the model's inputs in order, and [`LABEL`]) at a learning rate. Its
    /// update is carried out when the next step, or [`flush`](Self::flush), visits the parameters. `fetch` gets the model's
    /// first output.
    ///
    /// # Errors
    /// A tensor does not fit, or a node fails.
    pub fn step<'a>(
        &mut self,
        tensors: impl Iterator<Item = (&'a str, &'a Tensor)>,
        rate: f32,
        fetch: &mut dyn FnMut(&Prediction<'_>),
    ) -> Result<ZoReport, TrainError> {
        self.whole()?;
        let tensors: Vec<(&str, &Tensor)> = tensors.collect();
        // Whatever fails from here on leaves some parameters changed.
        self.torn = true;
        let eps = self.step.settings.eps;
        let (losses, run) = if self.step.settings.plain {
            let seed = self.state.next_seed();
            self.add(seed, eps)?;
            let (plus, _) = self.run(TRAIN, &tensors, [0.0; 4], [0; 2], fetch)?;
            self.add(seed, -2.0 * eps)?;
            let (minus, run) = self.run(TRAIN, &tensors, [0.0; 4], [0; 2], &mut |_| {})?;
            self.add(seed, eps)?;
            ([plus[0], minus[0]], run)
        } else {
            let (zo, before) = match self.state.pending {
                None => ([eps, 0.0, 0.0, 0.0], 0),
                Some(LoggedStep { seed, rate, gradient: None }) => ([eps, rate, 0.0, 1.0], seed),
                Some(LoggedStep { seed, rate, gradient: Some(g) }) => ([eps, rate, g, 2.0], seed),
            };
            let seeds = [before as i64, self.state.next_seed() as i64];
            self.run(TRAIN, &tensors, zo, seeds, fetch)?
        };
        let step = self.state.advance(losses, eps, rate);
        if self.step.settings.plain {
            self.follow(&step)?;
        } else {
            self.state.pending = Some(step);
        }
        self.torn = false;
        Ok(ZoReport { losses, step, run })
    }

    /// Loss of a batch without changing anything but what is left of the step before; `fetch` gets the model's first output.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn evaluate<'a>(
        &mut self,
        tensors: impl Iterator<Item = (&'a str, &'a Tensor)>,
        fetch: &mut dyn FnMut(&Prediction<'_>),
    ) -> Result<f32, TrainError> {
        self.flush()?;
        let tensors: Vec<(&str, &Tensor)> = tensors.collect();
        Ok(self.run(EVALUATE, &tensors, [0.0; 4], [0; 2], fetch)?.0[0])
    }

    fn run(
        &mut self,
        part: usize,
        tensors: &[(&str, &Tensor)],
        zo: [f32; 4],
        seeds: [i64; 2],
        fetch: &mut dyn FnMut(&Prediction<'_>),
    ) -> Result<([f32; 2], RunReport), TrainError> {
        let mut inputs = self.step.inputs.iter();
        let tensors = tensors.iter().filter_map(|&(name, tensor)| {
            let name = if name == LABEL { LABEL } else { inputs.next()? };
            Some((name.to_owned(), tensor))
        });
        let mut feed = BatchFeed { tensors: tensors.collect(), zo, seeds };
        let mut losses = [f32::NAN; 2];
        let [plus, minus] = &self.step.losses;
        let run = self.session.run_part(part, &mut feed, &mut |name, view| {
            let OutputView::Tensor(t) = view else { return Ok(()) };
            let data: &[f32] = bytemuck::cast_slice(t.bytes);
            if name == plus {
                losses[0] = data.first().copied().unwrap_or(f32::NAN);
            } else if name == minus {
                losses[1] = data.first().copied().unwrap_or(f32::NAN);
            } else {
                fetch(&Prediction { dims: t.dims, data });
            }
            Ok(())
        })?;
        Ok((losses, run))
    }

    /// `parameters += amount·z`, all of them, as plain MeZO does.
    fn add(&mut self, key: u64, amount: f32) -> Result<(), TrainError> {
        for (stream, p) in self.step.parameters.iter().enumerate() {
            let noise = Noise { key, stream: stream as u32 };
            self.session.change_state(&p.name, &mut |at, bytes| {
                add_noise(&self.threads, noise, at / 4, amount, bytemuck::cast_slice_mut(bytes));
            })?;
        }
        Ok(())
    }

    /// `parameters -= rate·(gradient·z + decay·parameters)`, as plain MeZO does.
    fn follow(&mut self, step: &LoggedStep) -> Result<(), TrainError> {
        let Some(gradient) = step.gradient else { return Ok(()) };
        // The noise of some elements at a time, because this one writes it down.
        let mut z = vec![0f32; 1 << 12];
        for (stream, p) in self.step.parameters.iter().enumerate() {
            let noise = Noise { key: step.seed, stream: stream as u32 };
            self.session.change_state(&p.name, &mut |at, bytes| {
                let elements: &mut [f32] = bytemuck::cast_slice_mut(bytes);
                for (i, part) in elements.chunks_mut(z.len()).enumerate() {
                    let z = &mut z[..part.len()];
                    z.fill(0.0);
                    add_noise(&self.threads, noise, at / 4 + (i << 12), 1.0, z);
                    for (w, z) in part.iter_mut().zip(&*z) {
                        *w -= step.rate * (gradient * z + p.decay * *w);
                    }
                }
            })?;
        }
        Ok(())
    }

    /// Carries out what is left of the step before, parameter by parameter. To be called before anything else than a step
    /// looks at the parameters; evaluation does so itself.
    ///
    /// # Errors
    /// The disk fails where parameters wait.
    pub fn flush(&mut self) -> Result<(), TrainError> {
        self.whole()?;
        let Some(pending) = self.state.pending else { return Ok(()) };
        self.torn = true;
        for (stream, p) in self.step.parameters.iter().enumerate() {
            let what = Perturbation {
                seeds: [pending.seed, 0],
                stream: stream as u32,
                eps: self.step.settings.eps,
                rate: pending.rate,
                gradient: pending.gradient.unwrap_or(0.0),
                decay: p.decay,
                pending: if pending.gradient.is_some() { Pending::Update } else { Pending::Restore },
            };
            self.session.change_state(&p.name, &mut |at, bytes| {
                perturb(&self.threads, &what, PerturbStep::Settle, at / 4, bytemuck::cast_slice_mut(bytes));
            })?;
        }
        (self.state.pending, self.torn) = (None, false);
        Ok(())
    }

    /// Makes logged steps again, from the parameters as they stand.
    ///
    /// # Errors
    /// As [`flush`](Self::flush).
    pub fn replay(&mut self, steps: &[LoggedStep]) -> Result<(), TrainError> {
        self.flush()?;
        self.torn = true;
        let replayed: Vec<ReplayStep> = steps.iter().map(|s| (*s).into()).collect();
        for (stream, p) in self.step.parameters.iter().enumerate() {
            let settings = [self.step.settings.eps, p.decay];
            self.session.change_state(&p.name, &mut |at, bytes| {
                let elements = bytemuck::cast_slice_mut(bytes);
                replay_steps(&self.threads, stream as u32, settings, &replayed, at / 4, elements);
            })?;
        }
        for step in steps {
            self.state.count(step);
        }
        self.torn = false;
        Ok(())
    }

    /// The share of some elements of each parameter that `eps·z` does not change, because it is too small for their
    /// precision.
    ///
    /// # Errors
    /// As [`flush`](Self::flush).
    pub fn unchanged_share(&self) -> Result<f64, TrainError> {
        let (mut unchanged, mut all) = (0usize, 0usize);
        for (stream, p) in self.step.parameters.iter().enumerate() {
            let noise = Noise { key: self.state.next_seed(), stream: stream as u32 };
            let mut first = true;
            self.session.read_state(&p.name, &mut |bytes| {
                if !std::mem::take(&mut first) {
                    return;
                }
                let elements: &[f32] = bytemuck::cast_slice(bytes);
                let before = &elements[..SAMPLE.min(elements.len())];
                let mut after = before.to_vec();
                add_noise(&self.threads, noise, 0, self.step.settings.eps, &mut after);
                unchanged += before.iter().zip(&after).filter(|(a, b)| a == b).count();
                all += before.len();
            })?;
        }
        Ok(unchanged as f64 / all.max(1) as f64)
    }
}

impl StateReader for ZoTrainer {
    fn states(&self) -> Vec<(String, TensorType)> {
        self.session.states().map(|(name, ty)| (name.to_owned(), ty)).collect()
    }

    fn read(&self, name: &str, read: &mut dyn FnMut(&[u8])) -> Result<(), TrainError> {
        Ok(self.session.read_state(name, read)?)
    }
}
