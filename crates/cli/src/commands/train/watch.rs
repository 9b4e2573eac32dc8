//! What is seen and kept of a training while it goes on.

use crate::arguments::TrainArguments;
use crate::failure::{Failure, Outcome};
use crate::output::{Output, Table};
use indicatif::ProgressBar;
use lightering_meter::process;
use lightering_train::{
    Checkpoints, Control, EarlyStopping, Epoch, Event, EventWriter, Found, Position, Report, ReportFile,
    TrainError, TrainState, Trainer,
};
use lightering_units::Bytes;
use std::collections::BTreeMap;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Checkpoints that are kept beside the best.
const CHECKPOINTS_KEPT: usize = 2;
/// Seconds between two drawings of the report.
const REPORT_SECONDS: f64 = 3.0;
/// Points of a curve that is drawn step by step.
const CURVE_POINTS: u64 = 2_000;

/// What decides the sequence of losses besides the data: a checkpoint of another training must not be gone on with.
fn settings(arguments: &TrainArguments) -> BTreeMap<String, serde_json::Value> {
    let learning = &arguments.learning;
    let text = |t: &str| serde_json::Value::from(t);
    let mut settings = BTreeMap::from([
        ("optimizer".to_owned(), text(&learning.optimizer)),
        ("loss".to_owned(), text(&learning.loss)),
        ("batch".to_owned(), learning.batch.into()),
        ("augment".to_owned(), text(arguments.samples.augment.as_deref().unwrap_or(""))),
        ("mix".to_owned(), text(arguments.samples.mix.as_deref().unwrap_or(""))),
        ("method".to_owned(), text(learning.method.as_deref().unwrap_or("full"))),
    ]);
    if super::language::is_one(&arguments.model) {
        settings.insert("context".to_owned(), arguments.samples.context.into());
    }
    settings
}

/// Takes note of every event.
pub struct Watch<'a> {
    arguments: &'a TrainArguments,
    output: Output,
    progress: ProgressBar,
    /// Loss of every step of this run.
    pub losses: Vec<f32>,
    /// Seconds of every step of this run.
    pub times: Vec<f64>,
    /// A row per epoch.
    pub table: Table,
    schedule: String,
    total: u64,
    per_epoch: u64,
    checkpoints: Option<Checkpoints>,
    stopping: Option<EarlyStopping>,
    best: Option<f64>,
    report: Option<(Report, ReportFile)>,
    events: Option<EventWriter>,
    began: Instant,
    /// The last checkpoint that was written or gone on with.
    last: Option<String>,
}

impl<'a> Watch<'a> {
    /// Opens folders and files.
    pub fn new(
        arguments: &'a TrainArguments,
        output: Output,
        title: String,
        schedule: String,
        total: u64,
        per_epoch: u64,
    ) -> Outcome<Watch<'a>> {
        let checkpoints = match &arguments.checkpoints {
            Some(folder) => Some(Checkpoints::new(folder, CHECKPOINTS_KEPT)?),
            None => None,
        };
        let events = match &arguments.events {
            Some(folder) => Some(EventWriter::create(folder, wall_time())?),
            None => None,
        };
        let report = arguments.report.as_ref().map(|path| {
            let mut report = Report::new(title);
            report.fact("Schedule", &schedule);
            report.fact("Optimizer", &arguments.learning.optimizer);
            report.fact("Batch", arguments.learning.batch.to_string());
            report.fact("Seed", arguments.learning.seed.to_string());
            (report, ReportFile::new(path, REPORT_SECONDS))
        });
        Ok(Watch {
            arguments,
            output,
            progress: output.progress(total.max(2)),
            losses: Vec::new(),
            times: Vec::new(),
            table: Table::new(&[">epoch", ">loss", ">accuracy", ">validation loss", ">accuracy", ">seconds"]),
            schedule,
            total,
            per_epoch,
            checkpoints,
            stopping: arguments.patience.map(|patience| EarlyStopping::new(patience, 0.0, false)),
            best: None,
            report,
            events,
            began: Instant::now(),
            last: None,
        })
    }

    /// Puts the newest good checkpoint into the trainer; gives the place of the next batch.
    pub fn resume(&mut self, trainer: &mut Trainer) -> Outcome<Position> {
        let Some(checkpoints) = &self.checkpoints else { return Ok(Position::default()) };
        let folder = checkpoints.folder().display().to_string();
        let Some(Found { checkpoint, damaged }) = checkpoints.latest_good()? else {
            return Err(Failure::input(
                format!("there is no checkpoint in {folder} to go on from"),
                "the folder that --checkpoints named before, or no --resume",
            ));
        };
        for damaged in damaged {
            self.say(&format!("passed over a damaged checkpoint: {damaged}"));
        }
        let state = &checkpoint.state;
        let (own, same_schedule) = (settings(self.arguments), state.schedule == self.schedule);
        let different = own.iter().find(|(key, value)| state.extra.get(*key) != Some(*value));
        if let Some((key, value)) = different {
            let then = state.extra.get(key).map_or_else(|| "nothing".to_owned(), ToString::to_string);
            return Err(Failure::input(
                format!("the checkpoint in {folder} was made with {key} {then}, not {value}"),
                "the same options, or another folder",
            ));
        }
        if !same_schedule || state.seed != self.arguments.learning.seed || state.total_steps != self.total {
            return Err(Failure::input(
                format!(
                    "the checkpoint in {folder} belongs to {} steps of {} with seed {}",
                    state.total_steps, state.schedule, state.seed
                ),
                "the same --lr, --epochs, --steps and --seed, or another folder",
            ));
        }
        trainer.restore(&checkpoint)?;
        if let (Some(own), Some(then)) = (&mut self.stopping, state.early_stopping) {
            let patience = own.patience;
            *own = then;
            own.patience = patience;
        }
        self.best = state.metric;
        self.last = Some(checkpoint.path().display().to_string());
        self.say(&format!("goes on behind step {} of {}", state.step, self.total));
        Ok(state.position)
    }

    fn say(&self, text: &str) {
        if !self.output.quiet {
            self.progress.suspend(|| eprintln!("{text}"));
        }
    }

    /// The last checkpoint that was written or gone on with.
    pub fn last_checkpoint(&self) -> Option<&str> {
        self.last.as_deref()
    }

    /// Notes an event; keeps and draws what was asked for.
    pub fn note(&mut self, trainer: &mut Trainer, event: &Event) -> Result<Control, TrainError> {
        let (step, epoch_ended) = match event {
            Event::Step { step, loss, seconds, rate, .. } => {
                self.losses.push(*loss);
                self.times.push(seconds.0);
                self.progress.set_position(*step);
                self.progress.set_message(format!("loss {loss:.4}, rate {rate:.2e}, {seconds} a step"));
                let samples = f64::from(self.arguments.learning.batch) / seconds.0.max(1e-9);
                self.draw(
                    *step,
                    &[
                        ("Loss", "", "training", f64::from(*loss)),
                        ("Learning rate", "", "rate", f64::from(*rate)),
                        ("Speed", "samples/s", "step", samples),
                    ],
                );
                self.memory(*step);
                if let Some(events) = &mut self.events {
                    let values = [("loss/training", *loss), ("rate", *rate)];
                    events.scalars(*step, wall_time(), &values)?;
                }
                (*step, None)
            }
            Event::Epoch(e) => {
                self.table.row(cells(e));
                if !self.output.json {
                    self.say(&line(e));
                }
                self.draw_always(e.step, "Loss", "", "validation", e.validation_loss);
                for (curve, value) in [("training", e.accuracy), ("validation", e.validation_accuracy)] {
                    if let Some(value) = value {
                        self.draw_always(e.step, "Accuracy", "%", curve, value * 100.0);
                    }
                }
                if let Some(events) = &mut self.events {
                    let mut values = vec![("loss/validation", e.validation_loss as f32)];
                    values.extend(e.validation_accuracy.map(|a| ("accuracy/validation", a as f32)));
                    events.scalars(e.step, wall_time(), &values)?;
                    events.flush()?;
                }
                (e.step, Some(e))
            }
        };
        let mut control = Control::Continue;
        if let (Some(e), Some(stopping)) = (epoch_ended, &mut self.stopping) {
            stopping.note(e.validation_loss);
            if stopping.is_over() {
                control = Control::Stop;
                self.say("stops: the validation loss no longer falls");
            }
        }
        let every = self.arguments.checkpoint_every.is_some_and(|n| step.is_multiple_of(n));
        if epoch_ended.is_some() || every {
            self.keep(trainer, step, epoch_ended)?;
        }
        let now = self.began.elapsed().as_secs_f64();
        if let Some((report, file)) = &mut self.report {
            file.update(report, now)?;
        }
        Ok(control)
    }

    fn keep(&mut self, trainer: &Trainer, step: u64, epoch: Option<&Epoch>) -> Result<(), TrainError> {
        let Some(checkpoints) = &self.checkpoints else { return Ok(()) };
        let state = TrainState {
            step,
            total_steps: self.total,
            position: Position { epoch: step / self.per_epoch, batch: step % self.per_epoch },
            seed: self.arguments.learning.seed,
            schedule: self.schedule.clone(),
            metric: epoch.map(|e| e.validation_loss),
            larger_is_better: false,
            early_stopping: self.stopping,
            extra: settings(self.arguments),
            ..TrainState::default()
        };
        let path = trainer.save(checkpoints, &state)?;
        self.last = Some(path.display().to_string());
        Ok(())
    }

    /// Adds to curves, at most [`CURVE_POINTS`] points each.
    fn draw(&mut self, step: u64, points: &[(&str, &str, &str, f64)]) {
        let stride = self.total.div_ceil(CURVE_POINTS).max(1);
        if let Some((report, _)) = &mut self.report
            && step.is_multiple_of(stride)
        {
            for &(panel, unit, curve, value) in points {
                report.add(panel, unit, curve, step, value);
            }
        }
    }

    fn draw_always(&mut self, step: u64, panel: &str, unit: &str, curve: &str, value: f64) {
        if let Some((report, _)) = &mut self.report {
            report.add(panel, unit, curve, step, value);
        }
    }

    fn memory(&mut self, step: u64) {
        let every = self.total.div_ceil(100).max(1);
        let Some((report, _)) = &mut self.report else { return };
        if step.is_multiple_of(every)
            && let Some(resident) = process::memory().resident
        {
            let mib = |b: Bytes| b.0 as f64 / (1 << 20) as f64;
            report.add("Memory", "MiB", "resident", step, mib(resident));
            if let Some(budget) = self.arguments.resources.memory {
                report.limit("Memory", "MiB", "budget", mib(budget));
            }
        }
    }

    /// Ends progress, report and event files.
    pub fn finish(&mut self) -> Result<(), TrainError> {
        self.progress.finish_and_clear();
        if let Some(events) = &mut self.events {
            events.flush()?;
        }
        if let Some((report, file)) = &self.report {
            file.finish(report)?;
        }
        Ok(())
    }
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// A share as people read it.
pub fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "-".to_owned(), |s| format!("{:.2} %", s * 100.0))
}

fn cells(e: &Epoch) -> [String; 6] {
    [
        (e.epoch + 1).to_string(),
        format!("{:.4}", e.loss),
        percent(e.accuracy),
        format!("{:.4}", e.validation_loss),
        percent(e.validation_accuracy),
        format!("{:.1}", e.seconds.0),
    ]
}

fn line(e: &Epoch) -> String {
    let [epoch, loss, accuracy, validation_loss, validation, seconds] = cells(e);
    format!(
        "epoch {epoch}: loss {loss}, accuracy {accuracy}; validation loss {validation_loss}, accuracy {validation}; {seconds} s"
    )
}
