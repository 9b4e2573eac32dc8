//! How good a model is, and when to stop.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::TrainError;

/// Most classes for which a confusion matrix is kept.
pub const MAX_CONFUSION_CLASSES: usize = 1024;
/// Bins of the calibration error.
const BINS: usize = 15;

/// Counts of a classification, added up batch by batch.
///
/// ```
/// use lightering_train::Classification;
/// let mut counts = Classification::new(2);
/// counts.add(&[2.0, 0.0, 0.0, 1.0, 3.0, 0.0], &[0, 1, 1], 3);
/// assert_eq!(counts.accuracy(), 2.0 / 3.0);
/// assert_eq!(counts.confusion(1, 0), Some(1));
/// ```
#[derive(Clone, Debug)]
pub struct Classification {
    classes: usize,
    rows: u64,
    right: u64,
    in_top: [u64; TOP_MAX],
    matrix: Vec<u64>,
    /// Rows, right ones and confidence of each bin.
    bins: [(u64, u64, f64); BINS],
    log_loss: f64,
}

/// Largest k of [`Classification::top`].
pub const TOP_MAX: usize = 10;

impl Classification {
    /// Counts for so many classes.
    pub fn new(classes: usize) -> Classification {
        let matrix = if classes <= MAX_CONFUSION_CLASSES { vec![0; classes * classes] } else { Vec::new() };
        Classification {
            classes,
            rows: 0,
            right: 0,
            in_top: [0; TOP_MAX],
            matrix,
            bins: [(0, 0, 0.0); BINS],
            log_loss: 0.0,
        }
    }

    /// Adds the first `rows` rows of logits `[rows, classes]` and their classes `[rows]`. Labels that are no class (to
    /// be ignored) count for nothing.
    ///
    /// # Panics
    /// When a slice is too short.
    pub fn add(&mut self, logits: &[f32], labels: &[i64], rows: usize) {
        for (row, &label) in logits.chunks_exact(self.classes.max(1)).zip(labels).take(rows) {
            let Some(label) = usize::try_from(label).ok().filter(|l| *l < self.classes) else { continue };
            let right = row[label];
            // The first of equal scores wins, so a model that says nothing has no luck with it.
            let rank =
                row.iter().enumerate().filter(|(i, v)| **v > right || (**v == right && *i < label)).count();
            let (best, top) = row
                .iter()
                .enumerate()
                .fold((0, f32::NEG_INFINITY), |b, (i, &v)| if v > b.1 { (i, v) } else { b });
            let sum: f64 = row.iter().map(|v| libm::exp(f64::from(*v - top))).sum();
            self.rows += 1;
            self.right += u64::from(rank == 0);
            for k in rank..TOP_MAX {
                self.in_top[k] += 1;
            }
            self.log_loss += libm::log(sum) - f64::from(right - top);
            let confidence = 1.0 / sum;
            let bin = &mut self.bins[((confidence * BINS as f64) as usize).min(BINS - 1)];
            *bin = (bin.0 + 1, bin.1 + u64::from(best == label), bin.2 + confidence);
            if let Some(cell) = self.matrix.get_mut(label * self.classes + best) {
                *cell += 1;
            }
        }
    }

    /// Rows that were counted.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Share of rows whose class has the largest logit, 0 to 1.
    pub fn accuracy(&self) -> f64 {
        self.right as f64 / self.rows.max(1) as f64
    }

    /// Share of rows whose class is among the `k` largest logits; `k` from 1 to [`TOP_MAX`].
    pub fn top(&self, k: usize) -> f64 {
        self.in_top[k.clamp(1, TOP_MAX) - 1] as f64 / self.rows.max(1) as f64
    }

    /// Mean cross-entropy, nats per row.
    pub fn log_loss(&self) -> f64 {
        self.log_loss / self.rows.max(1) as f64
    }

    /// `e` to the mean cross-entropy.
    pub fn perplexity(&self) -> f64 {
        libm::exp(self.log_loss())
    }

    /// Rows of `class` that were taken for `predicted`; `None` for more than [`MAX_CONFUSION_CLASSES`] classes.
    pub fn confusion(&self, class: usize, predicted: usize) -> Option<u64> {
        self.matrix.get(class * self.classes + predicted).copied()
    }

    /// Mean over the classes that occur (in labels or predictions) of the harmonic mean of precision and recall, 0 to 1.
    pub fn macro_f1(&self) -> f64 {
        let n = self.classes;
        let (mut sum, mut occurring) = (0.0, 0u64);
        for c in 0..n.min(MAX_CONFUSION_CLASSES) {
            let (Some(hits), Some(row)) = (self.confusion(c, c), self.matrix.get(c * n..(c + 1) * n)) else {
                return f64::NAN;
            };
            let labelled: u64 = row.iter().sum();
            let predicted: u64 = self.matrix.iter().skip(c).step_by(n).sum();
            if labelled + predicted > 0 {
                sum += 2.0 * hits as f64 / (labelled + predicted) as f64;
                occurring += 1;
            }
        }
        sum / occurring.max(1) as f64
    }

    /// Expected calibration error with 15 bins of equal width (Guo et al., 2017, equation 3).
    pub fn calibration_error(&self) -> f64 {
        let gaps = self.bins.iter().map(|(_, right, confidence)| (*right as f64 - confidence).abs());
        gaps.sum::<f64>() / self.rows.max(1) as f64
    }
}

/// Errors of predicted numbers, added up batch by batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Regression {
    count: f64,
    absolute: f64,
    squares: f64,
    mean: f64,
    spread: f64,
}

impl Regression {
    /// Adds predictions and what they should be.
    pub fn add(&mut self, predicted: &[f32], targets: &[f32]) {
        for (p, t) in predicted.iter().zip(targets) {
            let (p, t) = (f64::from(*p), f64::from(*t));
            self.absolute += (p - t).abs();
            self.squares += (p - t) * (p - t);
            // Welford's running variance, which does not lose digits for targets far from 0.
            self.count += 1.0;
            let before = t - self.mean;
            self.mean += before / self.count;
            self.spread += before * (t - self.mean);
        }
    }

    /// Mean absolute error.
    pub fn mean_absolute_error(&self) -> f64 {
        self.absolute / self.count.max(1.0)
    }

    /// Mean squared error.
    pub fn mean_squared_error(&self) -> f64 {
        self.squares / self.count.max(1.0)
    }

    /// Share of the targets' variance that is explained; 0 where they have none and there is an error.
    pub fn r_squared(&self) -> f64 {
        if self.spread > 0.0 { 1.0 - self.squares / self.spread } else { f64::from(self.squares == 0.0) }
    }
}

/// A mean over a sliding number of steps, for curves that can be read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunningMean {
    decay: f64,
    sum: f64,
    weight: f64,
}

impl RunningMean {
    /// A mean in which a value counts half after `half_life` more.
    pub fn new(half_life: f64) -> RunningMean {
        RunningMean { decay: libm::pow(0.5, 1.0 / half_life.max(1e-9)), sum: 0.0, weight: 0.0 }
    }

    /// Adds a value and yields the mean.
    pub fn add(&mut self, value: f64) -> f64 {
        self.sum = self.sum * self.decay + value;
        self.weight = self.weight * self.decay + 1.0;
        self.sum / self.weight
    }

    /// The mean so far.
    pub fn value(&self) -> Option<f64> {
        (self.weight > 0.0).then(|| self.sum / self.weight)
    }
}

/// Stops a training whose metric no longer gets better. Written as `patience=5` or `patience=5,delta=0.001`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EarlyStopping {
    /// Evaluations without improvement after which it stops.
    pub patience: u64,
    /// What counts as an improvement.
    pub delta: f64,
    /// Whether larger is better (accuracy) or smaller (loss).
    pub larger_is_better: bool,
    best: Option<f64>,
    waited: u64,
}

impl EarlyStopping {
    /// A rule that has seen nothing yet.
    pub fn new(patience: u64, delta: f64, larger_is_better: bool) -> EarlyStopping {
        EarlyStopping { patience, delta, larger_is_better, best: None, waited: 0 }
    }

    /// Notes an evaluation; true if it is the best so far. What is not a number is never an improvement.
    pub fn note(&mut self, metric: f64) -> bool {
        let better = match self.best {
            None => !metric.is_nan(),
            Some(best) if self.larger_is_better => metric > best + self.delta,
            Some(best) => metric < best - self.delta,
        };
        if better {
            self.best = Some(metric);
            self.waited = 0;
        } else {
            self.waited += 1;
        }
        better
    }

    /// Whether it is time to stop.
    pub fn is_over(&self) -> bool {
        self.waited >= self.patience
    }

    /// The best metric so far.
    pub fn best(&self) -> Option<f64> {
        self.best
    }
}

impl FromStr for EarlyStopping {
    type Err = TrainError;

    fn from_str(text: &str) -> Result<EarlyStopping, TrainError> {
        let mut s = crate::schedule::Settings::parse("early stopping", text)?;
        let patience = s.count("patience")?.unwrap_or(5);
        let delta = f64::from(s.number("delta", 0.0, 0.0..=1e9)?);
        s.finish("patience or delta")?;
        Ok(EarlyStopping::new(patience, delta, false))
    }
}

impl fmt::Display for EarlyStopping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "patience={},delta={}", self.patience, self.delta)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classification_counts() {
        let mut c = Classification::new(3);
        let logits = [
            2.0, 1.0, 0.0, // class 0, right
            0.0, 1.0, 2.0, // class 1, second
            5.0, 5.0, 5.0, // class 2, a tie is lost
            0.0, 9.0, 0.0, // ignored
            0.0, 9.0, 0.0, // not counted
        ];
        c.add(&logits, &[0, 1, 2, -100, 1], 4);
        assert_eq!((c.rows(), c.accuracy(), c.top(2), c.top(3)), (3, 1.0 / 3.0, 2.0 / 3.0, 1.0));
        let z = (1.0 + (-1f64).exp() + (-2f64).exp()).ln();
        let expected = (z + (z + 1.0) + 3f64.ln()) / 3.0;
        assert!((c.log_loss() - expected).abs() < 1e-9 && (c.perplexity() - expected.exp()).abs() < 1e-9);
        // Class 0: one hit, one label, two predictions. Classes 1 and 2: no hit.
        assert!((c.macro_f1() - (2.0 / 3.0) / 3.0).abs() < 1e-12);
        assert_eq!(c.confusion(2, 0), Some(1));
        let p = 1.0 / z.exp();
        // Right and wrong row of confidence p share a bin: |1 - 2p|; the tie is |0 - 1/3|.
        assert!((c.calibration_error() - ((1.0 - 2.0 * p).abs() + 1.0 / 3.0) / 3.0).abs() < 1e-6);
    }

    #[test]
    fn regression_errors() {
        let mut r = Regression::default();
        r.add(&[1.0, 2.0], &[1.0, 4.0]);
        r.add(&[3.0], &[1.0]);
        assert_eq!((r.mean_absolute_error(), r.mean_squared_error()), (4.0 / 3.0, 8.0 / 3.0));
        assert!((r.r_squared() - (1.0 - 8.0 / 6.0)).abs() < 1e-12);
        let mut far = Regression::default();
        far.add(&[1e7 + 1.0, 1e7 + 2.0], &[1e7 + 1.0, 1e7 + 2.0]);
        assert_eq!(far.r_squared(), 1.0);
    }

    #[test]
    fn stopping_waits_for_its_patience() {
        let mut s = EarlyStopping::new(2, 0.1, false);
        assert!(!s.note(f64::NAN) && s.note(1.0) && !s.note(0.95) && !s.is_over());
        assert!(s.note(0.8) && !s.note(0.9) && !s.note(f64::NAN) && s.is_over());
        assert_eq!(s.best(), Some(0.8));
        let mut up: EarlyStopping = "patience=1".parse().unwrap();
        up.larger_is_better = true;
        assert!(up.note(0.5) && up.note(0.6) && !up.note(0.6) && up.is_over());
        assert!("patience=0".parse::<EarlyStopping>().is_err());
    }

    #[test]
    fn running_means_forget() {
        let mut m = RunningMean::new(1.0);
        assert_eq!(m.value(), None);
        assert_eq!(m.add(4.0), 4.0);
        assert!((m.add(1.0) - 2.0).abs() < 1e-12);
    }
}
