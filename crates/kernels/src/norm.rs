//! Softmax and normalisations over the last dimension.

use crate::arch::{Kernel, Simd, dispatch};
use crate::epilogue::check_rows;
use crate::math;
use crate::threads::{Shareable, ThreadPool};

/// Runs `f(first_row, rows)` over chunks of rows.
fn over_rows(pool: &ThreadPool, rows: usize, n: usize, f: &(dyn Fn(usize, usize) + Sync)) {
    let few = pool.threads() == 1 || rows * n < 20_000;
    let step = if few { rows } else { rows.div_ceil(pool.threads() * 4) }.max(1);
    pool.parallel_for(rows.div_ceil(step), &|index, _| f(index * step, step.min(rows - index * step)));
}

/// `softmax(x * scale + mask)` of rows in memory.
pub(crate) struct SoftmaxRows {
    pub(crate) input: *const f32,
    pub(crate) in_stride: usize,
    pub(crate) output: *mut f32,
    pub(crate) out_stride: usize,
    pub(crate) rows: usize,
    pub(crate) n: usize,
    pub(crate) scale: f32,
    /// Null for none.
    pub(crate) mask: *const f32,
    pub(crate) mask_stride: usize,
}

impl Kernel for SoftmaxRows {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = self.n;
        if n == 0 {
            return;
        }
        for row in 0..self.rows {
            // SAFETY: who builds the kernel vouches for `rows` rows of `n` values in each buffer.
            unsafe {
                let x = self.input.add(row * self.in_stride);
                let y = self.output.add(row * self.out_stride);
                let scale = s.splat(self.scale);
                let lowest = s.splat(f32::NEG_INFINITY);
                let mut top = lowest;
                if self.mask.is_null() {
                    // A negative scale turns the order around, so the scaled values are compared.
                    let mut i = 0;
                    while i + S::LANES <= n {
                        top = s.max(top, s.mul(s.load(x.add(i)), scale));
                        i += S::LANES;
                    }
                    while i < n {
                        top = s.max(top, s.mul(s.splat(*x.add(i)), scale));
                        i += 1;
                    }
                } else {
                    let mask = self.mask.add(row * self.mask_stride);
                    let mut i = 0;
                    while i + S::LANES <= n {
                        let v = s.fma(s.load(x.add(i)), scale, s.load(mask.add(i)));
                        s.store(y.add(i), v);
                        top = s.max(top, v);
                        i += S::LANES;
                    }
                    while i < n {
                        let v = s.fma(s.splat(*x.add(i)), scale, s.splat(*mask.add(i)));
                        s.store_n(y.add(i), 1, v);
                        top = s.max(top, v);
                        i += 1;
                    }
                }
                let (x, scale) =
                    if self.mask.is_null() { (x, scale) } else { (y.cast_const(), s.splat(1.0)) };
                let top = s.splat(s.maximum(top));
                let mut sum = s.splat(0.0);
                let mut i = 0;
                while i + S::LANES <= n {
                    let e = math::exp(s, s.sub(s.mul(s.load(x.add(i)), scale), top));
                    s.store(y.add(i), e);
                    sum = s.add(sum, e);
                    i += S::LANES;
                }
                if i < n {
                    let e = math::exp(s, s.sub(s.mul(s.load_n(x.add(i), n - i), scale), top));
                    s.store_n(y.add(i), n - i, e);
                    // Read back, so that the lanes past the end are zero.
                    sum = s.add(sum, s.load_n(y.add(i), n - i));
                }
                let factor = s.splat(1.0 / s.sum(sum));
                let mut i = 0;
                while i + S::LANES <= n {
                    s.store(y.add(i), s.mul(s.load(y.add(i)), factor));
                    i += S::LANES;
                }
                if i < n {
                    s.store_n(y.add(i), n - i, s.mul(s.load_n(y.add(i), n - i), factor));
                }
            }
        }
    }
}

/// Softmax of each of `rows` rows of `n` values.
///
/// # Panics
/// Panics when a slice is too short.
pub fn softmax(
    pool: &ThreadPool,
    rows: usize,
    n: usize,
    input: &[f32],
    in_stride: usize,
    output: &mut [f32],
    out_stride: usize,
) {
    check_rows("input", input.len(), rows, n, in_stride);
    check_rows("output", output.len(), rows, n, out_stride);
    let (x, y) = (Shareable(input.as_ptr().cast_mut()), Shareable(output.as_mut_ptr()));
    over_rows(pool, rows, n * 4, &|first, rows| {
        dispatch(
            pool.isa(),
            SoftmaxRows {
                input: x.get().wrapping_add(first * in_stride),
                in_stride,
                output: y.get().wrapping_add(first * out_stride),
                out_stride,
                rows,
                n,
                scale: 1.0,
                mask: std::ptr::null(),
                mask_stride: 0,
            },
        );
    });
}

struct NormRows {
    input: *const f32,
    in_stride: usize,
    output: *mut f32,
    out_stride: usize,
    rows: usize,
    n: usize,
    /// Null for ones.
    gain: *const f32,
    /// Null for zeros.
    bias: *const f32,
    epsilon: f32,
    centre: bool,
}

impl Kernel for NormRows {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = self.n;
        let lanes = |i: usize| S::LANES.min(n - i);
        for row in 0..self.rows {
            // SAFETY: who builds the kernel vouches for `rows` rows of `n` values, and `n` gains and biases.
            unsafe {
                let x = self.input.add(row * self.in_stride);
                let y = self.output.add(row * self.out_stride);
                let mut mean = 0.0;
                if self.centre {
                    let mut sums = [s.splat(0.0); 2];
                    let mut i = 0;
                    while i + 2 * S::LANES <= n {
                        sums[0] = s.add(sums[0], s.load(x.add(i)));
                        sums[1] = s.add(sums[1], s.load(x.add(i + S::LANES)));
                        i += 2 * S::LANES;
                    }
                    while i < n {
                        sums[0] = s.add(sums[0], s.load_n(x.add(i), lanes(i)));
                        i += S::LANES;
                    }
                    mean = s.sum(s.add(sums[0], sums[1])) / n as f32;
                }
                let mean = s.splat(mean);
                let mut squares = [s.splat(0.0); 2];
                let mut i = 0;
                while i + 2 * S::LANES <= n {
                    for v in 0..2 {
                        let d = s.sub(s.load(x.add(i + v * S::LANES)), mean);
                        squares[v] = s.fma(d, d, squares[v]);
                    }
                    i += 2 * S::LANES;
                }
                while i < n {
                    // Lanes past the end hold the mean, whose difference is zero.
                    let n = lanes(i);
                    let mut tail = [0.0f32; 16];
                    s.store(tail.as_mut_ptr(), mean);
                    std::ptr::copy_nonoverlapping(x.add(i), tail.as_mut_ptr(), n);
                    let d = s.sub(s.load(tail.as_ptr()), mean);
                    squares[0] = s.fma(d, d, squares[0]);
                    i += S::LANES;
                }
                let variance = s.sum(s.add(squares[0], squares[1])) / n as f32;
                let factor = s.splat(1.0 / (variance + self.epsilon).sqrt());
                let mut i = 0;
                while i < n {
                    let n = lanes(i);
                    let mut v = s.mul(s.sub(s.load_n(x.add(i), n), mean), factor);
                    if !self.gain.is_null() {
                        v = s.mul(v, s.load_n(self.gain.add(i), n));
                    }
                    if !self.bias.is_null() {
                        v = s.add(v, s.load_n(self.bias.add(i), n));
                    }
                    s.store_n(y.add(i), n, v);
                    i += S::LANES;
                }
            }
        }
    }
}

fn norm(
    pool: &ThreadPool,
    rows: usize,
    n: usize,
    input: &[f32],
    in_stride: usize,
    gain: Option<&[f32]>,
    bias: Option<&[f32]>,
    epsilon: f32,
    centre: bool,
    output: &mut [f32],
    out_stride: usize,
) {
    check_rows("input", input.len(), rows, n, in_stride);
    check_rows("output", output.len(), rows, n, out_stride);
    assert!(gain.is_none_or(|g| g.len() >= n), "gain is shorter than a row of {n}");
    assert!(bias.is_none_or(|b| b.len() >= n), "bias is shorter than a row of {n}");
    let (x, y) = (Shareable(input.as_ptr().cast_mut()), Shareable(output.as_mut_ptr()));
    over_rows(pool, rows, n, &|first, rows| {
        dispatch(
            pool.isa(),
            NormRows {
                input: x.get().wrapping_add(first * in_stride),
                in_stride,
                output: y.get().wrapping_add(first * out_stride),
                out_stride,
                rows,
                n,
                gain: gain.map_or(std::ptr::null(), <[f32]>::as_ptr),
                bias: bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
                epsilon,
                centre,
            },
        );
    });
}

/// Layer normalisation of each of `rows` rows of `n` values:
/// `(x - mean) / sqrt(variance + epsilon) * gain + bias`.
///
/// # Panics
/// Panics when a slice is too short.
pub fn layer_norm(
    pool: &ThreadPool,
    rows: usize,
    n: usize,
    input: &[f32],
    in_stride: usize,
    gain: Option<&[f32]>,
    bias: Option<&[f32]>,
    epsilon: f32,
    output: &mut [f32],
    out_stride: usize,
) {
    norm(pool, rows, n, input, in_stride, gain, bias, epsilon, true, output, out_stride);
}

/// Root-mean-square normalisation of each of `rows` rows of `n` values: `x / sqrt(mean(x^2) + epsilon) * gain`.
///
/// # Panics
/// Panics when a slice is too short.
pub fn rms_norm(
    pool: &ThreadPool,
    rows: usize,
    n: usize,
    input: &[f32],
    in_stride: usize,
    gain: Option<&[f32]>,
    epsilon: f32,
    output: &mut [f32],
    out_stride: usize,
) {
    norm(pool, rows, n, input, in_stride, gain, None, epsilon, false, output, out_stride);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Isa;
    use crate::gemm::tests::{close, values};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn softmax_agrees_with_the_definition(rows in 1usize..20, n in 1usize..70, extra in 0usize..3, seed in 0u64..1000) {
            let stride = n + extra;
            let x: Vec<f32> = values(rows * stride, seed).into_iter().map(|x| x * 30.0).collect();
            for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
                let mut y = vec![9.0; rows * stride];
                softmax(&ThreadPool::with_isa(2, isa), rows, n, &x, stride, &mut y, stride);
                for r in 0..rows {
                    let row = &x[r * stride..][..n];
                    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let sum: f64 = row.iter().map(|&v| f64::from(v - top).exp()).sum();
                    for i in 0..n {
                        let want = f64::from(row[i] - top).exp() / sum;
                        prop_assert!((f64::from(y[r * stride + i]) - want).abs() <= 2e-6 * want + 1e-30);
                    }
                    prop_assert!(y[r * stride + n..(r + 1) * stride].iter().all(|&v| v == 9.0));
                }
            }
        }

        #[test]
        fn norms_agree_with_the_definition(rows in 1usize..20, n in 1usize..100, seed in 0u64..1000, with_gain: bool, centre: bool) {
            let x = values(rows * n, seed);
            let (gain, bias) = (values(n, seed + 1), values(n, seed + 2));
            let gain = with_gain.then_some(&gain[..]);
            let bias = (with_gain && centre).then_some(&bias[..]);
            for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
                let pool = ThreadPool::with_isa(2, isa);
                let mut y = vec![0.0; rows * n];
                if centre {
                    layer_norm(&pool, rows, n, &x, n, gain, bias, 1e-3, &mut y, n);
                } else {
                    rms_norm(&pool, rows, n, &x, n, gain, 1e-3, &mut y, n);
                }
                for r in 0..rows {
                    let row = &x[r * n..][..n];
                    let mean = if centre { row.iter().map(|&v| f64::from(v)).sum::<f64>() / n as f64 } else { 0.0 };
                    let variance = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n as f64;
                    for i in 0..n {
                        let unit = (f64::from(row[i]) - mean) / (variance + 1e-3).sqrt();
                        let want = unit * gain.map_or(1.0, |g| f64::from(g[i])) + bias.map_or(0.0, |b| f64::from(b[i]));
                        prop_assert!(close(y[r * n + i], want, 4.0), "{isa:?} {} {want}", y[r * n + i]);
                    }
                }
            }
        }
    }

    #[test]
    fn a_nan_spoils_its_own_row_only() {
        for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
            let pool = ThreadPool::with_isa(1, isa);
            let mut x = vec![1.0; 40];
            x[3] = f32::NAN;
            let mut y = vec![0.0; 40];
            softmax(&pool, 2, 20, &x, 20, &mut y, 20);
            assert!(
                y[..20].iter().all(|v| v.is_nan()) && y[20..].iter().all(|v| (v - 0.05).abs() < 1e-7),
                "{isa:?} {y:?}"
            );
            layer_norm(&pool, 2, 20, &x, 20, None, None, 1e-5, &mut y, 20);
            assert!(y[..20].iter().all(|v| v.is_nan()) && y[20..].iter().all(|&v| v == 0.0));
        }
    }
}
