//! Statistics of batches and normalisation by them, channels last: `[rows, channels]`.

use super::{get, over_rows, part_rows, put};
use crate::arch::{Kernel, Simd, dispatch};
use crate::epilogue::check_rows;
use crate::threads::{Shareable, ThreadPool};

/// Rows of a block that is read twice while it is in the first-level cache.
const BLOCK: usize = 16;

/// Values of scratch that [`batch_statistics`], [`channel_sum`] and [`normalise_grad`] need.
pub fn batch_scratch_len(rows: usize, channels: usize) -> usize {
    let parts = rows.div_ceil(part_rows(rows, channels)).max(1);
    (2 * parts + 3) * channels.next_multiple_of(16)
}

/// Mean and sum of squared differences of some rows, merged block by block (Chan, Golub and LeVeque, 1979).
struct Moments {
    x: *const f32,
    rows: usize,
    c: usize,
    mean: *mut f32,
    squares: *mut f32,
}

impl Kernel for Moments {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut first = 0;
        while first < self.rows {
            let rows = BLOCK.min(self.rows - first);
            let total = (first + rows) as f32;
            let (share, one) = (s.splat(rows as f32 / total), s.splat(1.0 / rows as f32));
            let cross = s.splat(first as f32 * (rows as f32 / total));
            let mut i = 0;
            while i < self.c {
                let n = S::LANES.min(self.c - i);
                // SAFETY: who builds the kernel vouches for `rows` rows of `c` values and `c` results.
                unsafe {
                    let x = self.x.add(first * self.c + i);
                    let mut sum = s.splat(0.0);
                    for r in 0..rows {
                        sum = s.add(sum, get(s, x.add(r * self.c), n));
                    }
                    let here = s.mul(sum, one);
                    let mut squares = s.splat(0.0);
                    for r in 0..rows {
                        let d = s.sub(get(s, x.add(r * self.c), n), here);
                        squares = s.fma(d, d, squares);
                    }
                    let (mean, before) = (get(s, self.mean.add(i), n), get(s, self.squares.add(i), n));
                    let delta = s.sub(here, mean);
                    put(s, self.mean.add(i), n, s.fma(delta, share, mean));
                    let between = s.mul(s.mul(delta, delta), cross);
                    put(s, self.squares.add(i), n, s.add(before, s.add(squares, between)));
                }
                i += S::LANES;
            }
            first += rows;
        }
    }
}

/// Mean and biased variance per channel of `x`, `[rows, channels]`. `scratch` has [`batch_scratch_len`] values.
///
/// # Panics
/// Panics when a slice is too short.
pub fn batch_statistics(
    pool: &ThreadPool,
    rows: usize,
    channels: usize,
    x: &[f32],
    mean: &mut [f32],
    variance: &mut [f32],
    scratch: &mut [f32],
) {
    check_rows("x", x.len(), rows, channels, channels);
    let (mean, variance) = (&mut mean[..channels], &mut variance[..channels]);
    let step = part_rows(rows, channels);
    let parts = rows.div_ceil(step);
    let len = channels.next_multiple_of(16);
    let scratch = &mut scratch[..2 * parts * len];
    scratch.fill(0.0);
    let sums = Shareable(scratch.as_mut_ptr());
    pool.parallel_for(parts, &|part, _| {
        let first = part * step;
        let mean = sums.get().wrapping_add(2 * part * len);
        let squares = mean.wrapping_add(len);
        let x = x[first * channels..].as_ptr();
        dispatch(pool.isa(), Moments { x, rows: step.min(rows - first), c: channels, mean, squares });
    });
    for c in 0..channels {
        let (mut count, mut m, mut q) = (0.0f64, 0.0f64, 0.0f64);
        for part in 0..parts {
            let n = step.min(rows - part * step) as f64;
            let at = 2 * part * len + c;
            let delta = f64::from(scratch[at]) - m;
            m += delta * n / (count + n);
            q += f64::from(scratch[at + len]) + delta * delta * count * n / (count + n);
            count += n;
        }
        mean[c] = m as f32;
        variance[c] = (q / count.max(1.0)) as f32;
    }
}

/// `running = (1 - rate) · running + rate · batch`; the variance of the batch times `unbias` first.
///
/// # Panics
/// Panics when slices have different lengths.
pub fn track_statistics(
    rate: f32,
    unbias: f32,
    running_mean: &mut [f32],
    running_variance: &mut [f32],
    mean: &[f32],
    variance: &[f32],
) {
    assert!(running_mean.len() == mean.len() && running_variance.len() == variance.len());
    for (r, m) in running_mean.iter_mut().zip(mean) {
        *r = (1.0 - rate) * *r + rate * m;
    }
    for (r, v) in running_variance.iter_mut().zip(variance) {
        *r = (1.0 - rate) * *r + rate * (v * unbias);
    }
}

/// `y = (x - mean) · factor + bias`
struct NormaliseRows {
    x: *const f32,
    y: *mut f32,
    rows: usize,
    c: usize,
    mean: *const f32,
    factor: *const f32,
    /// Null for zeros.
    bias: *const f32,
}

impl Kernel for NormaliseRows {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in 0..self.rows {
            let mut i = 0;
            while i < self.c {
                let n = S::LANES.min(self.c - i);
                // SAFETY: who builds the kernel vouches for `rows` rows of `c` values.
                unsafe {
                    let at = row * self.c + i;
                    let d = s.sub(get(s, self.x.add(at), n), get(s, self.mean.add(i), n));
                    let factor = get(s, self.factor.add(i), n);
                    let y = if self.bias.is_null() {
                        s.mul(d, factor)
                    } else {
                        s.fma(d, factor, get(s, self.bias.add(i), n))
                    };
                    put(s, self.y.add(at), n, y);
                }
                i += S::LANES;
            }
        }
    }
}

fn factors(scale: Option<&[f32]>, variance: &[f32], epsilon: f32, out: &mut [f32]) {
    for (c, f) in out.iter_mut().enumerate() {
        *f = scale.map_or(1.0, |s| s[c]) / (variance[c] + epsilon).sqrt();
    }
}

/// `y = (x - mean) / sqrt(variance + epsilon) · scale + bias` per channel. `scratch` has `channels` values.
///
/// # Panics
/// Panics when a slice is too short.
pub fn normalise(
    pool: &ThreadPool,
    rows: usize,
    channels: usize,
    epsilon: f32,
    x: &[f32],
    mean: &[f32],
    variance: &[f32],
    scale: Option<&[f32]>,
    bias: Option<&[f32]>,
    y: &mut [f32],
    scratch: &mut [f32],
) {
    check_rows("x", x.len(), rows, channels, channels);
    check_rows("y", y.len(), rows, channels, channels);
    assert!(mean.len() >= channels && variance.len() >= channels, "statistics of fewer than {channels}");
    assert!(bias.is_none_or(|b| b.len() >= channels), "bias of fewer than {channels}");
    let factor = &mut scratch[..channels];
    factors(scale, variance, epsilon, factor);
    let (factor, y) = (&*factor, Shareable(y.as_mut_ptr()));
    over_rows(pool, rows, channels, &|first, rows| {
        dispatch(
            pool.isa(),
            NormaliseRows {
                x: x[first * channels..].as_ptr(),
                y: y.get().wrapping_add(first * channels),
                rows,
                c: channels,
                mean: mean.as_ptr(),
                factor: factor.as_ptr(),
                bias: bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
            },
        );
    });
}

/// Sums over rows of `dy`, and of `dy · (x - mean)` if there is `x`.
struct Sums {
    dy: *const f32,
    /// Null for none.
    x: *const f32,
    mean: *const f32,
    rows: usize,
    c: usize,
    plain: *mut f32,
    moved: *mut f32,
}

impl Kernel for Sums {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut first = 0;
        while first < self.rows {
            let rows = BLOCK.min(self.rows - first);
            let mut i = 0;
            while i < self.c {
                let n = S::LANES.min(self.c - i);
                // SAFETY: who builds the kernel vouches for `rows` rows of `c` values and `c` sums.
                unsafe {
                    let at = first * self.c + i;
                    let mut plain = get(s, self.plain.add(i), n);
                    if self.x.is_null() {
                        for r in 0..rows {
                            plain = s.add(plain, get(s, self.dy.add(at + r * self.c), n));
                        }
                    } else {
                        let mean = get(s, self.mean.add(i), n);
                        let mut moved = get(s, self.moved.add(i), n);
                        for r in 0..rows {
                            let dy = get(s, self.dy.add(at + r * self.c), n);
                            let d = s.sub(get(s, self.x.add(at + r * self.c), n), mean);
                            plain = s.add(plain, dy);
                            moved = s.fma(dy, d, moved);
                        }
                        put(s, self.moved.add(i), n, moved);
                    }
                    put(s, self.plain.add(i), n, plain);
                }
                i += S::LANES;
            }
            first += rows;
        }
    }
}

/// Sums in parts; leaves the sums of `dy` at the start of `scratch` and those of `dy · (x - mean)` behind it.
fn sums(
    pool: &ThreadPool,
    rows: usize,
    channels: usize,
    dy: &[f32],
    x: Option<(&[f32], &[f32])>,
    scratch: &mut [f32],
) {
    let step = part_rows(rows, channels);
    let parts = rows.div_ceil(step);
    let len = channels.next_multiple_of(16);
    let scratch = &mut scratch[..2 * parts.max(1) * len];
    scratch.fill(0.0);
    let base = Shareable(scratch.as_mut_ptr());
    pool.parallel_for(parts, &|part, _| {
        let first = part * step;
        let plain = base.get().wrapping_add(2 * part * len);
        dispatch(
            pool.isa(),
            Sums {
                dy: dy[first * channels..].as_ptr(),
                x: x.map_or(std::ptr::null(), |(x, _)| x[first * channels..].as_ptr()),
                mean: x.map_or(std::ptr::null(), |(_, mean)| mean.as_ptr()),
                rows: step.min(rows - first),
                c: channels,
                plain,
                moved: plain.wrapping_add(len),
            },
        );
    });
    let (total, others) = scratch.split_at_mut(2 * len);
    for part in others.chunks_exact(2 * len) {
        for (t, p) in total.iter_mut().zip(part) {
            *t += p;
        }
    }
}

/// `db[c] = scale · sum over rows of dy[row, c]`. `scratch` has [`batch_scratch_len`] values.
///
/// # Panics
/// Panics when a slice is too short.
pub fn channel_sum(
    pool: &ThreadPool,
    rows: usize,
    channels: usize,
    scale: f32,
    dy: &[f32],
    db: &mut [f32],
    scratch: &mut [f32],
) {
    check_rows("dy", dy.len(), rows, channels, channels);
    sums(pool, rows, channels, dy, None, scratch);
    for (to, from) in db[..channels].iter_mut().zip(&*scratch) {
        *to = from * scale;
    }
}

/// `dx = a · dy + b · (x - mean) + e`
struct GradRows {
    dy: *const f32,
    x: *const f32,
    dx: *mut f32,
    rows: usize,
    c: usize,
    mean: *const f32,
    a: *const f32,
    /// Null when the statistics are constants.
    b: *const f32,
    e: *const f32,
}

impl Kernel for GradRows {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in 0..self.rows {
            let mut i = 0;
            while i < self.c {
                let n = S::LANES.min(self.c - i);
                // SAFETY: who builds the kernel vouches for `rows` rows of `c` values.
                unsafe {
                    let at = row * self.c + i;
                    let (dy, a) = (get(s, self.dy.add(at), n), get(s, self.a.add(i), n));
                    let dx = if self.b.is_null() {
                        s.mul(dy, a)
                    } else {
                        let d = s.sub(get(s, self.x.add(at), n), get(s, self.mean.add(i), n));
                        let rest = s.fma(d, get(s, self.b.add(i), n), get(s, self.e.add(i), n));
                        s.fma(dy, a, rest)
                    };
                    put(s, self.dx.add(at), n, dx);
                }
                i += S::LANES;
            }
        }
    }
}

/// Gradient of [`normalise`]: `(dx, dscale, dbias)`; with `batch` the statistics are those of `x`. Results that nobody
/// wants are `None`. `scratch` has [`batch_scratch_len`] values.
///
/// # Panics
/// Panics when a slice is too short.
pub fn normalise_grad(
    pool: &ThreadPool,
    rows: usize,
    channels: usize,
    epsilon: f32,
    batch: bool,
    x: &[f32],
    dy: &[f32],
    mean: &[f32],
    variance: &[f32],
    scale: Option<&[f32]>,
    dx: Option<&mut [f32]>,
    dscale: Option<&mut [f32]>,
    dbias: Option<&mut [f32]>,
    scratch: &mut [f32],
) {
    check_rows("x", x.len(), rows, channels, channels);
    check_rows("dy", dy.len(), rows, channels, channels);
    assert!(mean.len() >= channels && variance.len() >= channels, "statistics of fewer than {channels}");
    let len = channels.next_multiple_of(16);
    if batch || dscale.is_some() || dbias.is_some() {
        sums(pool, rows, channels, dy, Some((x, mean)), scratch);
    }
    let (totals, coefficients) = scratch.split_at_mut(2 * len);
    let (plain, moved) = totals.split_at(len);
    if let Some(dbias) = dbias {
        dbias[..channels].copy_from_slice(&plain[..channels]);
    }
    if let Some(dscale) = dscale {
        for c in 0..channels {
            dscale[c] = moved[c] / (variance[c] + epsilon).sqrt();
        }
    }
    let Some(dx) = dx else { return };
    check_rows("dx", dx.len(), rows, channels, channels);
    let (a, rest) = coefficients.split_at_mut(len);
    let (b, e) = rest.split_at_mut(len);
    factors(scale, variance, epsilon, &mut a[..channels]);
    if batch {
        let share = 1.0 / rows.max(1) as f32;
        for c in 0..channels {
            b[c] = -a[c] * moved[c] * share / (variance[c] + epsilon);
            e[c] = -a[c] * plain[c] * share;
        }
    }
    let (a, b, e, dx) = (&*a, &*b, &*e, Shareable(dx.as_mut_ptr()));
    over_rows(pool, rows, channels, &|first, rows| {
        let at = first * channels;
        dispatch(
            pool.isa(),
            GradRows {
                dy: dy[at..].as_ptr(),
                x: x[at..].as_ptr(),
                dx: dx.get().wrapping_add(at),
                rows,
                c: channels,
                mean: mean.as_ptr(),
                a: a.as_ptr(),
                b: if batch { b.as_ptr() } else { std::ptr::null() },
                e: e.as_ptr(),
            },
        );
    });
}
