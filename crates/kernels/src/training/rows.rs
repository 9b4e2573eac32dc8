//! Gradients of softmax and of normalisations over the last axis.

use super::{get, over_rows, part_rows, put};
use crate::arch::{Kernel, Simd, dispatch};
use crate::epilogue::check_rows;
use crate::math;
use crate::threads::{Shareable, ThreadPool};

struct SoftmaxGrad {
    y: *const f32,
    dy: *const f32,
    dx: *mut f32,
    rows: usize,
    n: usize,
    log: bool,
}

impl Kernel for SoftmaxGrad {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in 0..self.rows {
            // SAFETY: who builds the kernel vouches for `rows` rows of `n` values.
            unsafe {
                let at = row * self.n;
                let (y, dy, dx) = (self.y.add(at), self.dy.add(at), self.dx.add(at));
                let mut sums = [s.splat(0.0); 2];
                let mut i = 0;
                while i < self.n {
                    for sum in &mut sums {
                        if i < self.n {
                            let n = S::LANES.min(self.n - i);
                            let d = get(s, dy.add(i), n);
                            *sum =
                                if self.log { s.add(*sum, d) } else { s.fma(get(s, y.add(i), n), d, *sum) };
                            i += S::LANES;
                        }
                    }
                }
                let total = s.splat(s.sum(s.add(sums[0], sums[1])));
                let mut i = 0;
                while i < self.n {
                    let n = S::LANES.min(self.n - i);
                    let (y, d) = (get(s, y.add(i), n), get(s, dy.add(i), n));
                    let v = if self.log {
                        s.sub(d, s.mul(math::exp(s, y), total))
                    } else {
                        s.mul(y, s.sub(d, total))
                    };
                    put(s, dx.add(i), n, v);
                    i += S::LANES;
                }
            }
        }
    }
}

/// Gradient of (log-)softmax of rows of `n` values, from its result.
///
/// # Panics
/// Panics when a slice is too short.
pub fn softmax_grad(
    pool: &ThreadPool,
    rows: usize,
    n: usize,
    log: bool,
    y: &[f32],
    dy: &[f32],
    dx: &mut [f32],
) {
    check_rows("y", y.len(), rows, n, n);
    check_rows("dy", dy.len(), rows, n, n);
    check_rows("dx", dx.len(), rows, n, n);
    let out = Shareable(dx.as_mut_ptr());
    over_rows(pool, rows, n, &|first, rows| {
        let at = first * n;
        let (y, dy) = (y[at..].as_ptr(), dy[at..].as_ptr());
        dispatch(pool.isa(), SoftmaxGrad { y, dy, dx: out.get().wrapping_add(at), rows, n, log });
    });
}

/// Values of scratch that [`layer_norm_grad`] and [`rms_norm_grad`] need.
pub fn norm_grad_scratch_len(rows: usize, n: usize) -> usize {
    let parts = rows.div_ceil(part_rows(rows, n)).max(1);
    2 * parts * n.next_multiple_of(16)
}

struct NormGrad {
    x: *const f32,
    dy: *const f32,
    /// Null for ones.
    scale: *const f32,
    /// Null when nobody wants it.
    dx: *mut f32,
    rows: usize,
    n: usize,
    epsilon: f32,
    centre: bool,
    dscale: *mut f32,
    dbias: *mut f32,
}

impl Kernel for NormGrad {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = self.n;
        let share = 1.0 / n as f32;
        for row in 0..self.rows {
            // SAFETY: who builds the kernel vouches for `rows` rows of `n` values, and `n` factors and sums.
            unsafe {
                let (x, dy) = (self.x.add(row * n), self.dy.add(row * n));
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
                        sums[0] = s.add(sums[0], get(s, x.add(i), S::LANES.min(n - i)));
                        i += S::LANES;
                    }
                    mean = s.sum(s.add(sums[0], sums[1])) * share;
                }
                let means = s.splat(mean);
                // Sums of squares, of g, and of g times the centred value, where g = dy · scale.
                let mut squares = s.splat(0.0);
                let (mut plain, mut moved) = (s.splat(0.0), s.splat(0.0));
                let mut i = 0;
                while i + S::LANES <= n {
                    let d = s.sub(s.load(x.add(i)), means);
                    let mut g = s.load(dy.add(i));
                    if !self.scale.is_null() {
                        g = s.mul(g, s.load(self.scale.add(i)));
                    }
                    squares = s.fma(d, d, squares);
                    plain = s.add(plain, g);
                    moved = s.fma(g, d, moved);
                    i += S::LANES;
                }
                let (mut squares, mut plain, mut moved) = (s.sum(squares), s.sum(plain), s.sum(moved));
                while i < n {
                    let d = *x.add(i) - mean;
                    let scale = if self.scale.is_null() { 1.0 } else { *self.scale.add(i) };
                    let g = *dy.add(i) * scale;
                    squares += d * d;
                    plain += g;
                    moved += g * d;
                    i += 1;
                }
                let inverse = 1.0 / (squares * share + self.epsilon).sqrt();
                let inverses = s.splat(inverse);
                // dx = inverse · (g - mean g - d · inverse² · mean(g d))
                let along = s.splat(-inverse * inverse * inverse * moved * share);
                let offset = s.splat(if self.centre { -inverse * plain * share } else { 0.0 });
                let mut i = 0;
                while i < n {
                    let n = S::LANES.min(n - i);
                    let d = s.sub(get(s, x.add(i), n), means);
                    let dy = get(s, dy.add(i), n);
                    let unit = s.mul(d, inverses);
                    let before = get(s, self.dscale.add(i), n);
                    put(s, self.dscale.add(i), n, s.fma(dy, unit, before));
                    if self.centre {
                        put(s, self.dbias.add(i), n, s.add(get(s, self.dbias.add(i), n), dy));
                    }
                    if !self.dx.is_null() {
                        let g =
                            if self.scale.is_null() { dy } else { s.mul(dy, get(s, self.scale.add(i), n)) };
                        let rest = s.fma(d, along, offset);
                        put(s, self.dx.add(row * self.n + i), n, s.fma(g, inverses, rest));
                    }
                    i += S::LANES;
                }
            }
        }
    }
}

fn norm_grad(
    pool: &ThreadPool,
    rows: usize,
    n: usize,
    epsilon: f32,
    centre: bool,
    x: &[f32],
    scale: Option<&[f32]>,
    dy: &[f32],
    dx: Option<&mut [f32]>,
    dscale: Option<&mut [f32]>,
    dbias: Option<&mut [f32]>,
    scratch: &mut [f32],
) {
    check_rows("x", x.len(), rows, n, n);
    check_rows("dy", dy.len(), rows, n, n);
    assert!(scale.is_none_or(|s| s.len() >= n), "scale is shorter than a row of {n}");
    if let Some(dx) = &dx {
        check_rows("dx", dx.len(), rows, n, n);
    }
    let step = part_rows(rows, n);
    let parts = rows.div_ceil(step);
    let len = n.next_multiple_of(16);
    let scratch = &mut scratch[..2 * parts.max(1) * len];
    scratch.fill(0.0);
    let base = Shareable(scratch.as_mut_ptr());
    let out = Shareable(dx.map_or(std::ptr::null_mut(), <[f32]>::as_mut_ptr));
    pool.parallel_for(parts, &|part, _| {
        let first = part * step;
        let dscale = base.get().wrapping_add(2 * part * len);
        let dx = if out.get().is_null() { out.get() } else { out.get().wrapping_add(first * n) };
        dispatch(
            pool.isa(),
            NormGrad {
                x: x[first * n..].as_ptr(),
                dy: dy[first * n..].as_ptr(),
                scale: scale.map_or(std::ptr::null(), <[f32]>::as_ptr),
                dx,
                rows: step.min(rows - first),
                n,
                epsilon,
                centre,
                dscale,
                dbias: dscale.wrapping_add(len),
            },
        );
    });
    let (total, others) = scratch.split_at_mut(2 * len);
    for part in others.chunks_exact(2 * len) {
        for (t, p) in total.iter_mut().zip(part) {
            *t += p;
        }
    }
    if let Some(dscale) = dscale {
        dscale[..n].copy_from_slice(&total[..n]);
    }
    if let Some(dbias) = dbias {
        dbias[..n].copy_from_slice(&total[len..len + n]);
    }
}

/// Gradient of layer normalisation of rows of `n` values: `(dx, dscale, dbias)`. Results that nobody wants are `None`.
/// `scratch` has [`norm_grad_scratch_len`] values.
///
/// # Panics
/// Panics when a slice is too short.
pub fn layer_norm_grad(
    pool: &ThreadPool,
    rows: usize,
    n: usize,
    epsilon: f32,
    x: &[f32],
    scale: Option<&[f32]>,
    dy: &[f32],
    dx: Option<&mut [f32]>,
    dscale: Option<&mut [f32]>,
    dbias: Option<&mut [f32]>,
    scratch: &mut [f32],
) {
    norm_grad(pool, rows, n, epsilon, true, x, scale, dy, dx, dscale, dbias, scratch);
}

/// Gradient of root-mean-square normalisation: `(dx, dscale)`. See [`layer_norm_grad`].
///
/// # Panics
/// Panics when a slice is too short.
pub fn rms_norm_grad(
    pool: &ThreadPool,
    rows: usize,
    n: usize,
    epsilon: f32,
    x: &[f32],
    scale: Option<&[f32]>,
    dy: &[f32],
    dx: Option<&mut [f32]>,
    dscale: Option<&mut [f32]>,
    scratch: &mut [f32],
) {
    norm_grad(pool, rows, n, epsilon, false, x, scale, dy, dx, dscale, None, scratch);
}
