//! The loop: batches through the step, epoch after epoch, watched on data that the model does not learn from.

use std::sync::Arc;
use std::time::Instant;

use lightering_graph::{DType, Tensor};
use lightering_meter::MemoryPool;
use lightering_units::Seconds;
use serde::{Deserialize, Serialize};

use crate::trainer::{Prediction, Trainer};
use crate::{Batch, Dataset, LABEL, Loader, LoaderOptions, Schedule, TrainError};

/// How long and how fast.
#[derive(Clone, Debug)]
pub struct FitOptions {
    /// Passes over the data.
    pub epochs: u64,
    /// Learning rate of each step.
    pub schedule: Schedule,
    /// Ends after so many steps, if that is before the last epoch's end.
    pub steps: Option<u64>,
}

/// What is told while it goes on.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// After a step.
    Step {
        /// Steps so far.
        step: u64,
        /// Steps in all.
        total: u64,
        /// Epoch, from 0.
        epoch: u64,
        /// Mean loss of the batch.
        loss: f32,
        /// Learning rate.
        rate: f32,
        /// Time of the step.
        seconds: Seconds,
    },
    /// After an epoch.
    Epoch(Epoch),
}

/// What an epoch came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Epoch {
    /// From 0.
    pub epoch: u64,
    /// Steps so far.
    pub step: u64,
    /// Mean loss of its batches.
    pub loss: f64,
    /// Share of its samples that were classified rightly, before the step that learnt from them.
    pub accuracy: Option<f64>,
    /// Mean loss on the validation data.
    pub validation_loss: f64,
    /// Share of the validation data that is classified rightly.
    pub validation_accuracy: Option<f64>,
    /// Time of the epoch's steps, waiting for data included.
    pub seconds: Seconds,
}

/// What the caller wants after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Go on.
    Continue,
    /// Stop before the next step.
    Stop,
}

/// Counts right answers: the largest of the last axis of a prediction against the label.
#[derive(Clone, Copy, Debug, Default)]
pub struct RightAnswers {
    right: u64,
    rows: u64,
}

impl RightAnswers {
    /// Adds the first `samples` samples of a batch.
    pub fn add(&mut self, prediction: &Prediction<'_>, label: &Tensor, samples: usize) {
        let (Some(&batch), Some(&classes)) = (prediction.dims.first(), prediction.dims.last()) else {
            return;
        };
        let rows = prediction.data.len() / classes.max(1);
        let counted = rows / batch.max(1) * samples;
        let largest = |row: &[f32]| {
            // The first of equal ones, as everybody counts.
            row.iter()
                .enumerate()
                .fold((0, f32::NEG_INFINITY), |best, (i, &x)| if x > best.1 { (i, x) } else { best })
                .0
        };
        let predicted = prediction.data.chunks_exact(classes.max(1)).take(counted).map(largest);
        match label.dtype() {
            DType::I64 if label.len() == rows => {
                for (p, &y) in predicted.zip(label.as_slice::<i64>()) {
                    self.rows += 1;
                    self.right += u64::from(p as i64 == y);
                }
            }
            DType::F32 if label.len() == prediction.data.len() && classes > 1 => {
                for (p, y) in predicted.zip(label.as_slice::<f32>().chunks_exact(classes)) {
                    self.rows += 1;
                    self.right += u64::from(p == largest(y));
                }
            }
            _ => {}
        }
    }

    /// Adds the samples of a batch that count, if it has labels.
    pub(crate) fn add_batch(&mut self, prediction: &Prediction<'_>, batch: &Batch) {
        if let Some(label) = batch.tensor(LABEL) {
            self.add(prediction, label, batch.samples());
        }
    }

    /// The share; `None` when nothing was classified.
    pub fn share(self) -> Option<f64> {
        (self.rows > 0).then(|| self.right as f64 / self.rows as f64)
    }
}

/// Mean loss and share of right answers over a whole data set. The last batch is filled up with copies of its last sample,
/// which weigh in its loss but not in the share.
///
/// # Errors
/// A sample cannot be read, or a node fails.
pub fn evaluate(
    trainer: &mut Trainer,
    data: Arc<dyn Dataset>,
    batch: usize,
    pool: &MemoryPool,
) -> Result<(f64, Option<f64>), TrainError> {
    evaluate_with(data, batch, pool, &mut |batch, fetch| {
        Ok(trainer.evaluate(batch.tensors(), |prediction| fetch(prediction))?.loss)
    })
}

/// As [`evaluate`], with whatever computes the loss of a batch and hands its predictions on.
pub(crate) fn evaluate_with(
    data: Arc<dyn Dataset>,
    batch: usize,
    pool: &MemoryPool,
    loss_of: &mut dyn FnMut(&Batch, &mut dyn FnMut(&Prediction<'_>)) -> Result<f32, TrainError>,
) -> Result<(f64, Option<f64>), TrainError> {
    let mut loader = Loader::new(data, LoaderOptions::evaluation(batch), pool)?;
    let (mut loss, mut samples, mut right) = (0.0, 0usize, RightAnswers::default());
    while let Some(batch) = loader.next_batch()? {
        let of_batch = loss_of(&batch, &mut |prediction| right.add_batch(prediction, &batch))?;
        loss += f64::from(of_batch) * batch.samples() as f64;
        samples += batch.samples();
    }
    Ok((loss / samples.max(1) as f64, right.share()))
}

/// What an epoch has come to so far.
pub(crate) struct EpochSums {
    losses: f64,
    count: u64,
    pub right: RightAnswers,
    started: Instant,
}

impl EpochSums {
    pub fn start() -> EpochSums {
        EpochSums { losses: 0.0, count: 0, right: RightAnswers::default(), started: Instant::now() }
    }

    /// Adds the loss of a step.
    pub fn add(&mut self, loss: f32) {
        self.losses += f64::from(loss);
        self.count += 1;
    }

    /// Since the start.
    pub fn seconds(&self) -> Seconds {
        Seconds(self.started.elapsed().as_secs_f64())
    }

    /// The epoch, which took `seconds`; the next one starts.
    pub fn end(
        &mut self,
        epoch: u64,
        step: u64,
        seconds: Seconds,
        (validation_loss, validation_accuracy): (f64, Option<f64>),
    ) -> Epoch {
        let sums = std::mem::replace(self, EpochSums::start());
        Epoch {
            epoch,
            step,
            loss: sums.losses / sums.count.max(1) as f64,
            accuracy: sums.right.share(),
            validation_loss,
            validation_accuracy,
            seconds,
        }
    }
}

/// Trains from where `loader` stands; tells `on` what happens and stops when it says so. Returns the epochs that ended.
///
/// # Errors
/// [`TrainError::Diverged`] when a loss is no number any more; a sample cannot be read, or a node fails.
pub fn fit(
    trainer: &mut Trainer,
    loader: &mut Loader,
    validation: &Arc<dyn Dataset>,
    batch: usize,
    options: &FitOptions,
    pool: &MemoryPool,
    on: &mut dyn FnMut(&mut Trainer, &Event) -> Result<Control, TrainError>,
) -> Result<Vec<Epoch>, TrainError> {
    let per_epoch = loader.batches_per_epoch();
    let total = options.steps.unwrap_or(u64::MAX).min(options.epochs * per_epoch);
    let mut epochs = Vec::new();
    let mut sums = EpochSums::start();
    while trainer.steps() < total {
        let Some(samples) = loader.next_batch()? else { break };
        let position = samples.position();
        let rate = options.schedule.rate_at(trainer.steps(), total);
        let report =
            trainer.step(samples.tensors(), rate, |prediction| sums.right.add_batch(prediction, &samples))?;
        drop(samples);
        let step = trainer.steps();
        if !report.loss.is_finite() {
            return Err(TrainError::Diverged { step, loss: report.loss, rate });
        }
        sums.add(report.loss);
        let seconds = report.run.seconds;
        let event = Event::Step { step, total, epoch: position.epoch, loss: report.loss, rate, seconds };
        let mut control = on(trainer, &event)?;
        if position.batch + 1 == per_epoch || step == total || control == Control::Stop {
            let seconds = sums.seconds();
            let validated = evaluate(trainer, validation.clone(), batch, pool)?;
            let epoch = sums.end(position.epoch, step, seconds, validated);
            epochs.push(epoch.clone());
            if on(trainer, &Event::Epoch(epoch))? == Control::Stop {
                control = Control::Stop;
            }
        }
        if control == Control::Stop {
            break;
        }
    }
    Ok(epochs)
}
