//! The loop: batches through the step, epoch after epoch.

use std::sync::Arc;
use std::time::Instant;

use lightering_meter::MemoryPool;
use lightering_units::Seconds;

use super::{ZoReport, ZoTrainer};
use crate::fit::{Control, Epoch, EpochSums, Event, FitOptions, evaluate_with};
use crate::{Dataset, Loader, TrainError};

/// Mean loss and share of right answers over a whole data set, at the parameters themselves.
///
/// # Errors
/// A sample cannot be read, or a node fails.
pub(crate) fn evaluate(
    trainer: &mut ZoTrainer,
    data: Arc<dyn Dataset>,
    batch: usize,
    pool: &MemoryPool,
) -> Result<(f64, Option<f64>), TrainError> {
    evaluate_with(data, batch, pool, &mut |batch, fetch| trainer.evaluate(batch.tensors(), fetch))
}

impl ZoTrainer {
    /// Mean loss and share of right answers over a whole data set; what is left of the step before is done first.
    ///
    /// # Errors
    /// A sample cannot be read, or a node fails.
    pub fn evaluate_all(
        &mut self,
        data: Arc<dyn Dataset>,
        batch: usize,
        pool: &MemoryPool,
    ) -> Result<(f64, Option<f64>), TrainError> {
        evaluate(self, data, batch, pool)
    }
}

/// Trains from where `loader` stands; `logged` gets every step before it counts, `on` is told what happens and stops the
/// training when it says so. Returns the epochs that ended; the last update is done.
///
/// # Errors
/// A sample cannot be read, or a node fails.
#[allow(clippy::too_many_arguments, reason = "as `fit`, and where the steps are logged")]
pub fn fit_zeroth_order(
    trainer: &mut ZoTrainer,
    loader: &mut Loader,
    validation: &Arc<dyn Dataset>,
    batch: usize,
    options: &FitOptions,
    pool: &MemoryPool,
    logged: &mut dyn FnMut(&ZoReport) -> Result<(), TrainError>,
    on: &mut dyn FnMut(&Event) -> Result<Control, TrainError>,
) -> Result<Vec<Epoch>, TrainError> {
    let per_epoch = loader.batches_per_epoch();
    let total = options.steps.unwrap_or(u64::MAX).min(options.epochs * per_epoch);
    let mut epochs = Vec::new();
    let mut sums = EpochSums::start();
    while trainer.state().step < total {
        let Some(samples) = loader.next_batch()? else { break };
        let position = samples.position();
        let rate = options.schedule.rate_at(trainer.state().step, total);
        let began = Instant::now();
        let report = trainer
            .step(samples.tensors(), rate, &mut |prediction| sums.right.add_batch(prediction, &samples))?;
        let seconds = Seconds(began.elapsed().as_secs_f64());
        drop(samples);
        logged(&report)?;
        if report.step.gradient.is_some() {
            sums.add(report.loss());
        }
        let step = trainer.state().step;
        let (loss, rate) = (report.loss(), report.step.rate);
        let mut control = on(&Event::Step { step, total, epoch: position.epoch, loss, rate, seconds })?;
        if position.batch + 1 == per_epoch || step == total || control == Control::Stop {
            let seconds = sums.seconds();
            let validated = evaluate(trainer, validation.clone(), batch, pool)?;
            let epoch = sums.end(position.epoch, step, seconds, validated);
            epochs.push(epoch.clone());
            if on(&Event::Epoch(epoch))? == Control::Stop {
                control = Control::Stop;
            }
        }
        if control == Control::Stop {
            break;
        }
    }
    trainer.flush()?;
    Ok(epochs)
}
