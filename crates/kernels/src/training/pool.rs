//! Gradients of pooling layers, channels last.

use super::{get, put};
use crate::arch::{Kernel, Simd, dispatch};
use crate::pool::PoolShape;
use crate::threads::{Shareable, ThreadPool};

struct Image<'a> {
    s: &'a PoolShape,
    dy: *const f32,
    dx: *mut f32,
    /// Operand and result of a maximum; null for averages.
    x: *const f32,
    y: *const f32,
    count_include_pad: bool,
}

impl Kernel for Image<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let s = self.s;
        let c = s.channels;
        // SAFETY: who builds the kernel vouches for the picture and the result.
        unsafe { std::ptr::write_bytes(self.dx, 0, s.in_h * s.in_w * c) };
        for oy in 0..s.out_h {
            for ox in 0..s.out_w {
                let out = (oy * s.out_w + ox) * c;
                // Taps inside the picture, and inside the padded picture.
                let (top, left) = (oy * s.stride[0], ox * s.stride[1]);
                let tap = |k: usize| {
                    let y = (top + k / s.kernel[1] * s.dilation[0]).wrapping_sub(s.pads[0]);
                    let x = (left + k % s.kernel[1] * s.dilation[1]).wrapping_sub(s.pads[1]);
                    (y < s.in_h && x < s.in_w).then(|| y * s.in_w + x)
                };
                let taps = s.kernel[0] * s.kernel[1];
                let share = if self.x.is_null() {
                    let padded = |size: usize, at: usize, k: usize, d: usize| {
                        (0..k).filter(|i| at + i * d < size).count()
                    };
                    let count = if self.count_include_pad {
                        padded(s.pads[0] + s.in_h + s.pads[2], top, s.kernel[0], s.dilation[0])
                            * padded(s.pads[1] + s.in_w + s.pads[3], left, s.kernel[1], s.dilation[1])
                    } else {
                        (0..taps).filter(|&k| tap(k).is_some()).count()
                    };
                    1.0 / count.max(1) as f32
                } else {
                    1.0
                };
                let mut i = 0;
                while i < c {
                    let n = S::LANES.min(c - i);
                    // SAFETY: pixels have `c` channels.
                    unsafe {
                        let mut left = simd.mul(get(simd, self.dy.add(out + i), n), simd.splat(share));
                        let zero = simd.splat(0.0);
                        for k in 0..taps {
                            let Some(pixel) = tap(k) else { continue };
                            let to = self.dx.add(pixel * c + i);
                            let before = get(simd, to, n);
                            if self.x.is_null() {
                                put(simd, to, n, simd.add(before, left));
                                continue;
                            }
                            // The first element that is not below the maximum takes what is left.
                            let x = get(simd, self.x.add(pixel * c + i), n);
                            let below = simd.lt(x, get(simd, self.y.add(out + i), n));
                            put(simd, to, n, simd.add(before, simd.select(below, zero, left)));
                            left = simd.select(below, left, zero);
                        }
                    }
                    i += S::LANES;
                }
            }
        }
    }
}

fn run(
    pool: &ThreadPool,
    s: &PoolShape,
    batch: usize,
    dy: &[f32],
    maximum: Option<(&[f32], &[f32])>,
    count_include_pad: bool,
    dx: &mut [f32],
) {
    let (image_in, image_out) = (s.in_h * s.in_w * s.channels, s.out_h * s.out_w * s.channels);
    assert!(dx.len() >= batch * image_in && dy.len() >= batch * image_out, "pictures are too short: {s:?}");
    if let Some((x, y)) = maximum {
        assert!(x.len() >= batch * image_in && y.len() >= batch * image_out, "pictures are too short: {s:?}");
    }
    let out = Shareable(dx.as_mut_ptr());
    pool.parallel_for(batch, &|image, _| {
        dispatch(
            pool.isa(),
            Image {
                s,
                dy: dy[image * image_out..].as_ptr(),
                dx: out.get().wrapping_add(image * image_in),
                x: maximum.map_or(std::ptr::null(), |(x, _)| x[image * image_in..].as_ptr()),
                y: maximum.map_or(std::ptr::null(), |(_, y)| y[image * image_out..].as_ptr()),
                count_include_pad,
            },
        );
    });
}

/// Gradient of a maximum over windows of `batch` pictures `x` with result `y`; the first of several largest elements of a
/// window takes all.
///
/// # Panics
/// Panics when a slice is too short.
pub fn max_pool_grad(
    pool: &ThreadPool,
    shape: &PoolShape,
    batch: usize,
    dy: &[f32],
    x: &[f32],
    y: &[f32],
    dx: &mut [f32],
) {
    run(pool, shape, batch, dy, Some((x, y)), false, dx);
}

/// Gradient of a mean over windows of `batch` pictures.
///
/// # Panics
/// Panics when a slice is too short.
pub fn average_pool_grad(
    pool: &ThreadPool,
    shape: &PoolShape,
    batch: usize,
    count_include_pad: bool,
    dy: &[f32],
    dx: &mut [f32],
) {
    run(pool, shape, batch, dy, None, count_include_pad, dx);
}
