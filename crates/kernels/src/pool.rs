//! Pooling, channels last.

use crate::arch::{Kernel, Simd, dispatch};
use crate::conv::rows_under_window;
use crate::epilogue::check_rows;
use crate::threads::ThreadPool;
use std::ops::Range;

/// What a window is reduced to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PoolKind {
    /// The largest value; padding does not count. Which value wins beside a NaN is unspecified.
    Max,
    /// The mean.
    Average {
        /// Whether padding counts as zeros.
        count_include_pad: bool,
    },
}

/// Sizes of a two-dimensional pooling of one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PoolShape {
    /// Input height.
    pub in_h: usize,
    /// Input width.
    pub in_w: usize,
    /// Channels.
    pub channels: usize,
    /// Output height.
    pub out_h: usize,
    /// Output width.
    pub out_w: usize,
    /// Window height and width.
    pub kernel: [usize; 2],
    /// Vertical and horizontal stride.
    pub stride: [usize; 2],
    /// Vertical and horizontal dilation.
    pub dilation: [usize; 2],
    /// Padding: top, left, bottom, right.
    pub pads: [usize; 4],
}

impl PoolShape {
    /// The input rows that the output rows `rows` read; empty when they read padding alone.
    pub fn input_rows(&self, rows: Range<usize>) -> Range<usize> {
        rows_under_window(rows, self.in_h, self.kernel[0], self.stride[0], self.dilation[0], self.pads[0])
    }
}

#[derive(Clone, Copy)]
struct Pooling<'a> {
    shape: &'a PoolShape,
    kind: PoolKind,
    /// Where pixel (0, 0) of the whole image would be.
    data: *const f32,
    pixel_stride: usize,
    output: *mut f32,
    out_stride: usize,
    first_row: usize,
}

// SAFETY: the input is only read; tasks write disjoint rows of `output`.
unsafe impl Sync for Pooling<'_> {}

/// Pools: computes the output rows `rows` into `output`, whose first pixel is `(rows.start, 0)` and whose pixels
/// lie `out_stride` apart. `input` starts with image row `first_row` and holds [`PoolShape::input_rows`]`(rows)`,
/// pixels `pixel_stride` apart.
///
/// # Panics
/// Panics when a slice is too short or a size of the window is zero.
pub fn pool2d(
    pool: &ThreadPool,
    shape: &PoolShape,
    kind: PoolKind,
    input: &[f32],
    pixel_stride: usize,
    first_row: usize,
    output: &mut [f32],
    out_stride: usize,
    rows: Range<usize>,
) {
    let positive = shape.kernel.iter().chain(&shape.stride).chain(&shape.dilation).all(|&x| x > 0);
    assert!(positive, "kernel, stride and dilation must be positive: {shape:?}");
    assert!(rows.end <= shape.out_h, "output rows {rows:?} of {}", shape.out_h);
    check_rows("output", output.len(), rows.len() * shape.out_w, shape.channels, out_stride);
    let needed = shape.input_rows(rows.clone());
    assert!(
        needed.is_empty() || first_row <= needed.start,
        "input starts at row {first_row}, {needed:?} needed"
    );
    let stored = needed.end.saturating_sub(first_row);
    check_rows("input", input.len(), stored * shape.in_w, shape.channels, pixel_stride);
    if rows.is_empty() {
        return;
    }
    let layer = Pooling {
        shape,
        kind,
        data: input.as_ptr().wrapping_sub(first_row * shape.in_w * pixel_stride),
        pixel_stride,
        output: output.as_mut_ptr(),
        out_stride,
        first_row: rows.start,
    };
    let work = rows.len() * shape.out_w * shape.channels * shape.kernel[0] * shape.kernel[1];
    let step = if pool.threads() == 1 || work < 100_000 {
        rows.len()
    } else {
        rows.len().div_ceil(pool.threads() * 4)
    };
    let layer = &layer;
    pool.parallel_for(rows.len().div_ceil(step), &|index, _| {
        let start = rows.start + index * step;
        dispatch(pool.isa(), Part { layer, rows: start..rows.end.min(start + step) });
    });
}

struct Part<'a> {
    layer: &'a Pooling<'a>,
    rows: Range<usize>,
}

impl Kernel for Part<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        const VECTORS: usize = 4;
        let layer = self.layer;
        let shape = layer.shape;
        let max = layer.kind == PoolKind::Max;
        let start = s.splat(if max { f32::NEG_INFINITY } else { 0.0 });
        // Window positions that lie in the image, and in the image with its padding.
        let taps = |at: usize, axis: usize, size: usize| -> (Range<usize>, usize) {
            let d = shape.dilation[axis];
            let before = shape.pads[axis].saturating_sub(at).div_ceil(d).min(shape.kernel[axis]);
            let end = |limit: usize| limit.saturating_sub(at).div_ceil(d).min(shape.kernel[axis]);
            let inside = end(size + shape.pads[axis]);
            (before..inside.max(before), end(size + shape.pads[axis] + shape.pads[axis + 2]))
        };
        for y in self.rows {
            let top = y * shape.stride[0];
            let (ys, ys_padded) = taps(top, 0, shape.in_h);
            for x in 0..shape.out_w {
                let left = x * shape.stride[1];
                let (xs, xs_padded) = taps(left, 1, shape.in_w);
                let scale = match layer.kind {
                    PoolKind::Max => 1.0,
                    PoolKind::Average { count_include_pad: true } => {
                        1.0 / (ys_padded * xs_padded).max(1) as f32
                    }
                    PoolKind::Average { .. } => 1.0 / (ys.len() * xs.len()).max(1) as f32,
                };
                let pixel = ((y - layer.first_row) * shape.out_w + x) * layer.out_stride;
                let mut c = 0;
                while c < shape.channels {
                    let lanes: [usize; VECTORS] = std::array::from_fn(|v| {
                        shape.channels.saturating_sub(c + v * S::LANES).min(S::LANES)
                    });
                    let mut sums = [start; VECTORS];
                    for ky in ys.clone() {
                        let iy = top + ky * shape.dilation[0] - shape.pads[0];
                        for kx in xs.clone() {
                            let ix = left + kx * shape.dilation[1] - shape.pads[1];
                            let p = layer.data.wrapping_add((iy * shape.in_w + ix) * layer.pixel_stride + c);
                            for v in 0..VECTORS {
                                // SAFETY: the pixel is stored, and has the channels that are left.
                                let a = unsafe { s.load_n(p.wrapping_add(v * S::LANES), lanes[v]) };
                                sums[v] = if max { s.max(sums[v], a) } else { s.add(sums[v], a) };
                            }
                        }
                    }
                    for v in 0..VECTORS {
                        let y = if max { sums[v] } else { s.mul(sums[v], s.splat(scale)) };
                        // SAFETY: the output pixel exists, and has the channels that are left.
                        unsafe {
                            s.store_n(layer.output.wrapping_add(pixel + c + v * S::LANES), lanes[v], y)
                        };
                    }
                    c += VECTORS * S::LANES;
                }
            }
        }
    }
}

/// The mean over `pixels` pixels of `channels` values each, `pixel_stride` apart, into `output[..channels]`.
///
/// # Panics
/// Panics when a slice is too short.
pub fn global_average_pool(
    pool: &ThreadPool,
    pixels: usize,
    channels: usize,
    input: &[f32],
    pixel_stride: usize,
    output: &mut [f32],
) {
    let shape = PoolShape {
        in_h: 1,
        in_w: pixels,
        channels,
        out_h: 1,
        out_w: 1,
        kernel: [1, pixels.max(1)],
        stride: [1, 1],
        dilation: [1, 1],
        pads: [0; 4],
    };
    let kind = PoolKind::Average { count_include_pad: false };
    pool2d(pool, &shape, kind, input, pixel_stride, 0, output, channels, 0..1);
}

#[cfg(test)]
mod tests;
