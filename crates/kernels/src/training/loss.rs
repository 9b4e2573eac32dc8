//! Cross-entropy of rows of logits.

use super::{get, over_rows, put};
use crate::arch::{Kernel, Simd, dispatch};
use crate::epilogue::check_rows;
use crate::math;
use crate::threads::{Shareable, ThreadPool};

/// Sizes and attributes of a cross-entropy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossShape {
    /// Rows.
    pub rows: usize,
    /// Values per row.
    pub classes: usize,
    /// Part of the target that is spread over all classes.
    pub label_smoothing: f32,
    /// Rows with this label count for nothing.
    pub ignore: Option<i64>,
}

/// What a row should be.
#[derive(Clone, Copy)]
pub enum Target<'a> {
    /// One class per row.
    Class(&'a (dyn Fn(usize) -> i64 + Sync)),
    /// Probabilities, `[rows, classes]`.
    Probabilities(&'a [f32]),
}

impl std::fmt::Debug for Target<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Target::Class(_) => "Class",
            Target::Probabilities(_) => "Probabilities",
        })
    }
}

/// The class of a row; `None` when the row is ignored.
fn class(shape: &LossShape, label: i64) -> Result<Option<usize>, i64> {
    if shape.ignore == Some(label) {
        return Ok(None);
    }
    usize::try_from(label).ok().filter(|&c| c < shape.classes).map(Some).ok_or(label)
}

/// Checks the target and counts the rows that count.
fn counted(shape: &LossShape, target: Target<'_>) -> Result<usize, i64> {
    match target {
        Target::Probabilities(p) => {
            check_rows("probabilities", p.len(), shape.rows, shape.classes, shape.classes);
            Ok(shape.rows)
        }
        Target::Class(label) => {
            let mut count = 0;
            for row in 0..shape.rows {
                count += usize::from(class(shape, label(row))?.is_some());
            }
            Ok(count)
        }
    }
}

/// Largest value, logarithm of the sum of exponentials above it, sum of the values less the largest.
struct LogSum {
    x: *const f32,
    n: usize,
}

impl Kernel for LogSum {
    type Output = (f32, f32, f32);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> (f32, f32, f32) {
        let n = self.n;
        // SAFETY: who builds the kernel vouches for `n` values.
        unsafe {
            let lowest = s.splat(f32::NEG_INFINITY);
            let mut tops = [lowest; 2];
            let mut i = 0;
            while i + 2 * S::LANES <= n {
                tops[0] = s.max(tops[0], s.load(self.x.add(i)));
                tops[1] = s.max(tops[1], s.load(self.x.add(i + S::LANES)));
                i += 2 * S::LANES;
            }
            let mut top = s.maximum(s.max(tops[0], tops[1]));
            while i < n {
                top = top.max(*self.x.add(i));
                i += 1;
            }
            let tops = s.splat(top);
            let (mut sum, mut moved) = (s.splat(0.0), s.splat(0.0));
            let mut i = 0;
            while i + S::LANES <= n {
                let d = s.sub(s.load(self.x.add(i)), tops);
                sum = s.add(sum, math::exp(s, d));
                moved = s.add(moved, d);
                i += S::LANES;
            }
            let (mut sum, mut moved) = (s.sum(sum), s.sum(moved));
            let mut tail = [0.0f32; 16];
            if i < n {
                let d = s.sub(s.load_n(self.x.add(i), n - i), tops);
                s.store(tail.as_mut_ptr(), d);
                moved += tail[..n - i].iter().sum::<f32>();
                s.store(tail.as_mut_ptr(), math::exp(s, d));
                sum += tail[..n - i].iter().sum::<f32>();
            }
            (top, sum.ln(), moved)
        }
    }
}

/// Mean cross-entropy over the rows into `loss`, and the loss of each row into `per_row`. Logits are `[rows, classes]`;
/// `weights` has one factor per row. The mean is over the rows that are not ignored, 0 when there are none.
///
/// # Errors
/// The first label that is no class.
///
/// # Panics
/// Panics when a slice is too short.
pub fn cross_entropy(
    pool: &ThreadPool,
    shape: &LossShape,
    logits: &[f32],
    target: Target<'_>,
    weights: Option<&[f32]>,
    loss: &mut f32,
    per_row: &mut [f32],
) -> Result<(), i64> {
    let n = shape.classes;
    check_rows("logits", logits.len(), shape.rows, n, n);
    assert!(weights.is_none_or(|w| w.len() >= shape.rows), "fewer weights than rows");
    let per_row = &mut per_row[..shape.rows];
    let count = counted(shape, target)?;
    let out = Shareable(per_row.as_mut_ptr());
    let (smooth, spread) = (shape.label_smoothing, shape.label_smoothing / n.max(1) as f32);
    over_rows(pool, shape.rows, 4 * n, &|first, rows| {
        for row in first..first + rows {
            let x = &logits[row * n..][..n];
            let wanted = match target {
                Target::Class(label) => match class(shape, label(row)) {
                    Ok(Some(c)) => Some(c),
                    _ => {
                        // SAFETY: rows are disjoint.
                        unsafe { *out.get().add(row) = 0.0 };
                        continue;
                    }
                },
                Target::Probabilities(_) => None,
            };
            let (top, log, moved) = dispatch(pool.isa(), LogSum { x: x.as_ptr(), n });
            // The value of class c is (x[c] - top) - log.
            let sum = match (wanted, target) {
                (Some(c), _) => (1.0 - smooth) * (x[c] - top - log) + spread * (moved - n as f32 * log),
                (None, Target::Probabilities(p)) => {
                    let p = &p[row * n..][..n];
                    p.iter().zip(x).map(|(p, x)| ((1.0 - smooth) * p + spread) * (x - top - log)).sum()
                }
                (None, Target::Class(_)) => 0.0,
            };
            // SAFETY: rows are disjoint.
            unsafe { *out.get().add(row) = -sum * weights.map_or(1.0, |w| w[row]) };
        }
    });
    let total: f64 = per_row.iter().map(|&l| f64::from(l)).sum();
    *loss = (total / count.max(1) as f64) as f32;
    Ok(())
}

struct GradRow {
    x: *const f32,
    dx: *mut f32,
    /// Probabilities; null for none.
    target: *const f32,
    n: usize,
    /// Largest value plus the logarithm of the sum above it.
    base: f32,
    /// Factor of the softmax.
    factor: f32,
    /// Factor of the target, and what is taken from every class.
    from_target: f32,
    from_all: f32,
}

impl Kernel for GradRow {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let base = s.splat(self.base);
        let (factor, all) = (s.splat(self.factor), s.splat(-self.from_all));
        let target = s.splat(-self.from_target);
        let mut i = 0;
        while i < self.n {
            let n = S::LANES.min(self.n - i);
            // SAFETY: who builds the kernel vouches for `n` values.
            unsafe {
                let p = math::exp(s, s.sub(get(s, self.x.add(i), n), base));
                let mut v = s.fma(p, factor, all);
                if !self.target.is_null() {
                    v = s.fma(get(s, self.target.add(i), n), target, v);
                }
                put(s, self.dx.add(i), n, v);
            }
            i += S::LANES;
        }
    }
}

/// Gradient of the mean loss of [`cross_entropy`], times `dloss`.
///
/// # Errors
/// The first label that is no class.
///
/// # Panics
/// Panics when a slice is too short.
pub fn cross_entropy_grad(
    pool: &ThreadPool,
    shape: &LossShape,
    logits: &[f32],
    target: Target<'_>,
    dloss: f32,
    weights: Option<&[f32]>,
    dx: &mut [f32],
) -> Result<(), i64> {
    let n = shape.classes;
    check_rows("logits", logits.len(), shape.rows, n, n);
    check_rows("dlogits", dx.len(), shape.rows, n, n);
    assert!(weights.is_none_or(|w| w.len() >= shape.rows), "fewer weights than rows");
    let count = counted(shape, target)?;
    let out = Shareable(dx.as_mut_ptr());
    let (smooth, spread) = (shape.label_smoothing, shape.label_smoothing / n.max(1) as f32);
    over_rows(pool, shape.rows, 4 * n, &|first, rows| {
        for row in first..first + rows {
            let x = &logits[row * n..][..n];
            // SAFETY: rows are disjoint.
            let dx = unsafe { std::slice::from_raw_parts_mut(out.get().add(row * n), n) };
            let share = dloss * weights.map_or(1.0, |w| w[row]) / count.max(1) as f32;
            let (wanted, p) = match target {
                Target::Class(label) => match class(shape, label(row)) {
                    Ok(Some(c)) => (Some(c), None),
                    _ => {
                        dx.fill(0.0);
                        continue;
                    }
                },
                Target::Probabilities(p) => (None, Some(&p[row * n..][..n])),
            };
            let mass = p.map_or(1.0, |p| (1.0 - smooth) * p.iter().sum::<f32>() + smooth);
            let (top, log, _) = dispatch(pool.isa(), LogSum { x: x.as_ptr(), n });
            dispatch(
                pool.isa(),
                GradRow {
                    x: x.as_ptr(),
                    dx: dx.as_mut_ptr(),
                    target: p.map_or(std::ptr::null(), <[f32]>::as_ptr),
                    n,
                    base: top + log,
                    factor: share * mass,
                    from_target: share * (1.0 - smooth),
                    from_all: share * spread,
                },
            );
            if let Some(c) = wanted {
                dx[c] -= share * (1.0 - smooth);
            }
        }
    });
    Ok(())
}
