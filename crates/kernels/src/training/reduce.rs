//! Sums over leading, middle or trailing axes.

use super::{batch::batch_scratch_len, batch::channel_sum, get, over_rows, put};
use crate::arch::{Kernel, Simd, dispatch};
use crate::epilogue::check_rows;
use crate::threads::{Shareable, ThreadPool};

/// Values of scratch that [`sum_leading`] needs.
pub fn sum_leading_scratch_len(outer: usize, rows: usize, n: usize) -> usize {
    if outer == 1 { batch_scratch_len(rows, n) } else { 0 }
}

struct AddRows {
    x: *const f32,
    rows: usize,
    n: usize,
    scale: f32,
    y: *mut f32,
}

impl Kernel for AddRows {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut i = 0;
        while i < self.n {
            let n = S::LANES.min(self.n - i);
            let mut sum = s.splat(0.0);
            // SAFETY: who builds the kernel vouches for `rows` rows of `n` values.
            unsafe {
                for r in 0..self.rows {
                    sum = s.add(sum, get(s, self.x.add(r * self.n + i), n));
                }
                put(s, self.y.add(i), n, s.mul(sum, s.splat(self.scale)));
            }
            i += S::LANES;
        }
    }
}

/// `y[o, j] = scale · sum over r of x[o, r, j]` for x `[outer, rows, n]`. `scratch` has [`sum_leading_scratch_len`]
/// values.
///
/// # Panics
/// Panics when a slice is too short.
pub fn sum_leading(
    pool: &ThreadPool,
    [outer, rows, n]: [usize; 3],
    scale: f32,
    x: &[f32],
    y: &mut [f32],
    scratch: &mut [f32],
) {
    if outer == 1 {
        return channel_sum(pool, rows, n, scale, x, y, scratch);
    }
    check_rows("x", x.len(), outer * rows, n, n);
    check_rows("y", y.len(), outer, n, n);
    let out = Shareable(y.as_mut_ptr());
    over_rows(pool, outer, rows * n, &|first, count| {
        for o in first..first + count {
            let x = x[o * rows * n..].as_ptr();
            dispatch(pool.isa(), AddRows { x, rows, n, scale, y: out.get().wrapping_add(o * n) });
        }
    });
}

struct SumRows {
    x: *const f32,
    rows: usize,
    n: usize,
    scale: f32,
    y: *mut f32,
}

impl Kernel for SumRows {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for r in 0..self.rows {
            let mut sums = [s.splat(0.0); 4];
            let mut i = 0;
            // SAFETY: who builds the kernel vouches for `rows` rows of `n` values.
            unsafe {
                let x = self.x.add(r * self.n);
                while i + 4 * S::LANES <= self.n {
                    for (v, sum) in sums.iter_mut().enumerate() {
                        *sum = s.add(*sum, s.load(x.add(i + v * S::LANES)));
                    }
                    i += 4 * S::LANES;
                }
                while i < self.n {
                    let n = S::LANES.min(self.n - i);
                    sums[0] = s.add(sums[0], get(s, x.add(i), n));
                    i += S::LANES;
                }
                let sum = s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3]));
                *self.y.add(r) = s.sum(sum) * self.scale;
            }
        }
    }
}

/// `y[r] = scale · sum over j of x[r, j]`.
///
/// # Panics
/// Panics when a slice is too short.
pub fn sum_trailing(pool: &ThreadPool, rows: usize, n: usize, scale: f32, x: &[f32], y: &mut [f32]) {
    check_rows("x", x.len(), rows, n, n);
    check_rows("y", y.len(), rows, 1, 1);
    let out = Shareable(y.as_mut_ptr());
    over_rows(pool, rows, n, &|first, rows| {
        let x = x[first * n..].as_ptr();
        dispatch(pool.isa(), SumRows { x, rows, n, scale, y: out.get().wrapping_add(first) });
    });
}
