//! Classification losses.

use super::real::Real;

/// How a loss over elements becomes one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// It does not.
    None,
    /// Weighted mean.
    Mean,
    /// Sum.
    Sum,
}

/// Shape `[batch, classes, inner]` of the scores; targets are `[batch, inner]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LossShape {
    /// Samples.
    pub batch: usize,
    /// Classes.
    pub classes: usize,
    /// Positions per sample.
    pub inner: usize,
}

impl LossShape {
    /// `max` and `ln Σ exp(x − max)` over the classes at one position.
    fn log_sum_exp<T: Real>(&self, x: &[T], sample: usize, position: usize) -> (f64, f64) {
        let at = |class: usize| x[(sample * self.classes + class) * self.inner + position].to_f64();
        let largest = (0..self.classes).map(at).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = (0..self.classes).map(|c| (at(c) - largest).exp()).sum();
        (largest, sum.ln())
    }
}

/// `−weight[target] · log p[target]` per position, where `x` holds logarithms of probabilities, or raw scores when
/// `from_scores`. `out` has one element per target, or one when reduced.
///
/// # Errors
/// The first target that is neither a class nor `ignore`.
pub fn classification_loss<T: Real>(
    shape: &LossShape,
    x: &[T],
    from_scores: bool,
    target: impl Fn(usize) -> i64,
    weight: Option<&[T]>,
    ignore: Option<i64>,
    reduction: Reduction,
    out: &mut [T],
) -> Result<(), i64> {
    let (mut total, mut total_weight) = (0.0, 0.0);
    for sample in 0..shape.batch {
        for position in 0..shape.inner {
            let at = sample * shape.inner + position;
            let class = target(at);
            let (loss, weight) = if Some(class) == ignore {
                (0.0, 0.0)
            } else {
                if class < 0 || class as usize >= shape.classes {
                    return Err(class);
                }
                let class = class as usize;
                let mut log_probability =
                    x[(sample * shape.classes + class) * shape.inner + position].to_f64();
                if from_scores {
                    let (largest, log_sum) = shape.log_sum_exp(x, sample, position);
                    log_probability -= largest + log_sum;
                }
                let weight = weight.map_or(1.0, |w| w[class].to_f64());
                (-log_probability * weight, weight)
            };
            total += loss;
            total_weight += weight;
            if reduction == Reduction::None {
                out[at] = T::from_f64(loss);
            }
        }
    }
    match reduction {
        Reduction::None => {}
        Reduction::Sum => out[0] = T::from_f64(total),
        Reduction::Mean => out[0] = T::from_f64(total / total_weight),
    }
    Ok(())
}

/// Logarithm of the softmax over the classes.
pub fn log_probabilities<T: Real>(shape: &LossShape, x: &[T], out: &mut [T]) {
    for sample in 0..shape.batch {
        for position in 0..shape.inner {
            let (largest, log_sum) = shape.log_sum_exp(x, sample, position);
            for class in 0..shape.classes {
                let at = (sample * shape.classes + class) * shape.inner + position;
                out[at] = T::from_f64(x[at].to_f64() - largest - log_sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_is_weighted_and_skips_the_ignored() {
        let shape = LossShape { batch: 3, classes: 2, inner: 1 };
        let x = [-1f32, -2.0, -3.0, -4.0, -5.0, -6.0];
        let targets = [0i64, 1, -1];
        let mut out = [0f32];
        let weight = [2f32, 3.0];
        classification_loss(
            &shape,
            &x,
            false,
            |i| targets[i],
            Some(&weight),
            Some(-1),
            Reduction::Mean,
            &mut out,
        )
        .unwrap();
        assert_eq!(out[0], (2.0 + 12.0) / 5.0);
        assert_eq!(
            classification_loss(&shape, &x, false, |i| targets[i], None, None, Reduction::Sum, &mut out),
            Err(-1)
        );
    }

    #[test]
    fn scores_and_log_probabilities_agree() {
        let shape = LossShape { batch: 2, classes: 3, inner: 2 };
        let x: Vec<f32> = (0..12).map(|i| (i as f32 * 1.7).sin() * 3.0).collect();
        let mut logs = vec![0f32; 12];
        log_probabilities(&shape, &x, &mut logs);
        let (mut a, mut b) = (vec![0f32; 4], vec![0f32; 4]);
        classification_loss(&shape, &x, true, |i| i as i64 % 3, None, None, Reduction::None, &mut a).unwrap();
        classification_loss(&shape, &logs, false, |i| i as i64 % 3, None, None, Reduction::None, &mut b)
            .unwrap();
        for (a, b) in a.iter().zip(b) {
            assert!((a - b).abs() < 1e-6);
        }
    }
}
