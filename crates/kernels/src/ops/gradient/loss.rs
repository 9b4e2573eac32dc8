//! Cross-entropy.

use crate::ops::real::Real;

/// What a row of logits is compared with.
#[derive(Clone, Copy, Debug)]
pub enum Labels<'a, T> {
    /// One class per row.
    Classes(&'a [i64]),
    /// Probabilities of the shape of the logits.
    Probabilities(&'a [T]),
}

/// What [`cross_entropy`] computes, but for the logits.
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropy<'a, T> {
    /// Elements per row.
    pub classes: usize,
    /// Targets.
    pub labels: Labels<'a, T>,
    /// One factor per row.
    pub weights: Option<&'a [T]>,
    /// Part of the target that is spread over all classes.
    pub label_smoothing: f32,
    /// Rows with this label count for nothing.
    pub ignore: Option<i64>,
}

impl<T: Real> CrossEntropy<'_, T> {
    /// The class of a row, `None` for targets that are probabilities; `Err` when the row is ignored.
    fn class(&self, row: usize) -> Result<Option<usize>, ()> {
        match self.labels {
            Labels::Probabilities(_) => Ok(None),
            Labels::Classes(c) if Some(c[row]) == self.ignore => Err(()),
            // Checked before.
            Labels::Classes(c) => Ok(usize::try_from(c[row]).ok()),
        }
    }

    fn target(&self, row: usize, class: usize) -> f64 {
        let smoothing = f64::from(self.label_smoothing);
        let hard = match self.labels {
            Labels::Probabilities(p) => p[row * self.classes + class].to_f64(),
            Labels::Classes(c) => f64::from(u8::from(c[row] == class as i64)),
        };
        (1.0 - smoothing) * hard + smoothing / self.classes as f64
    }

    fn weight(&self, row: usize) -> f64 {
        self.weights.map_or(1.0, |w| w[row].to_f64())
    }

    /// Rows that count; `Err` is the first label that is no class.
    fn counted(&self, rows: usize) -> Result<usize, i64> {
        let Labels::Classes(labels) = self.labels else { return Ok(rows) };
        let mut counted = 0;
        for &label in labels.iter().filter(|&&l| Some(l) != self.ignore) {
            if label < 0 || label as usize >= self.classes {
                return Err(label);
            }
            counted += 1;
        }
        Ok(counted)
    }
}

/// `max + ln Σ exp(x − max)`.
fn log_sum_exp<T: Real>(x: &[T]) -> f64 {
    let largest = x.iter().map(|v| v.to_f64()).fold(f64::NEG_INFINITY, f64::max);
    largest + x.iter().map(|v| (v.to_f64() - largest).exp()).sum::<f64>().ln()
}

/// The loss of every row, times its weight, and their sum over the number of rows that count (0 when none does).
///
/// # Errors
/// The first label that is neither a class nor ignored.
pub fn cross_entropy<T: Real>(
    what: &CrossEntropy<'_, T>,
    logits: &[T],
    mut losses: Option<&mut [T]>,
) -> Result<f64, i64> {
    let count = logits.len() / what.classes;
    let counted = what.counted(count)?;
    let mut total = 0.0;
    for (row, x) in logits.chunks_exact(what.classes).enumerate() {
        let loss = if what.class(row).is_err() {
            0.0
        } else {
            let normal = log_sum_exp(x);
            let terms = x.iter().enumerate().map(|(c, v)| what.target(row, c) * (normal - v.to_f64()));
            terms.sum::<f64>() * what.weight(row)
        };
        total += loss;
        if let Some(losses) = losses.as_deref_mut() {
            losses[row] = T::from_f64(loss);
        }
    }
    Ok(if counted == 0 { 0.0 } else { total / counted as f64 })
}

/// Gradient of the mean that [`cross_entropy`] returns, times `dloss`.
///
/// # Errors
/// As [`cross_entropy`].
pub fn cross_entropy_grad<T: Real>(
    what: &CrossEntropy<'_, T>,
    logits: &[T],
    dloss: f64,
    dx: &mut [T],
) -> Result<(), i64> {
    let counted = what.counted(logits.len() / what.classes)?;
    for (row, (x, dx)) in logits.chunks_exact(what.classes).zip(dx.chunks_exact_mut(what.classes)).enumerate()
    {
        if what.class(row).is_err() {
            dx.fill(T::from_f64(0.0));
            continue;
        }
        let normal = log_sum_exp(x);
        let factor = dloss * what.weight(row) / counted as f64;
        let mass: f64 = (0..what.classes).map(|c| what.target(row, c)).sum();
        for (c, (out, v)) in dx.iter_mut().zip(x).enumerate() {
            let p = (v.to_f64() - normal).exp();
            *out = T::from_f64((p * mass - what.target(row, c)) * factor);
        }
    }
    Ok(())
}
