//! Depthwise convolution, channels last: vectors run over channels, tiles over output columns.

use crate::arch::{Kernel, Simd, dispatch};
use crate::conv::ConvShape;
use crate::epilogue::{ActivateRows, Activation, Epilogue};
use crate::gemm::{ZEROS_LEN, zeros};
use crate::threads::{Shareable, ThreadPool};
use std::ops::Range;

/// Output columns per tile.
const COLUMNS: usize = 4;

#[derive(Clone, Copy)]
struct Depthwise<'a> {
    shape: &'a ConvShape,
    /// Where pixel (0, 0) of the whole image would be.
    data: *const f32,
    pixel_stride: usize,
    /// `[taps][channels]`
    weights: *const f32,
    output: *mut f32,
    out_stride: usize,
    first_row: usize,
    bias: *const f32,
    residual: *const f32,
    residual_stride: usize,
    activation: Activation,
}

// SAFETY: inputs are only read; tasks write disjoint rows of `output`.
unsafe impl Sync for Depthwise<'_> {}

/// Computes the rows `rows`; `origin` is where pixel (0, 0) would be, and `conv2d` has checked all sizes.
pub(crate) fn depthwise(
    pool: &ThreadPool,
    shape: &ConvShape,
    origin: *const f32,
    pixel_stride: usize,
    packed: &[f32],
    output: &mut [f32],
    out_stride: usize,
    rows: Range<usize>,
    epilogue: &Epilogue<'_>,
) {
    let layer = Depthwise {
        shape,
        data: origin,
        pixel_stride,
        weights: packed.as_ptr(),
        output: Shareable(output.as_mut_ptr()).get(),
        out_stride,
        first_row: rows.start,
        bias: epilogue.bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
        residual: epilogue.residual.map_or(std::ptr::null(), |r| r.data.as_ptr()),
        residual_stride: epilogue.residual.map_or(0, |r| r.stride),
        activation: epilogue.activation,
    };
    let work = shape.multiply_adds();
    let step = if pool.threads() == 1 || work < 50_000 {
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
    layer: &'a Depthwise<'a>,
    rows: Range<usize>,
}

impl Kernel for Part<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let shape = self.layer.shape;
        let plain = shape.dilation == [1, 1] && shape.out_w >= COLUMNS && shape.stride[0] == shape.stride[1];
        // SAFETY: `conv2d` has checked that the rows are stored and that the output holds them.
        unsafe {
            match (shape.kernel, shape.stride[1], plain) {
                ([3, 3], 1, true) => s.vectorize(Fixed::<3, 1, 6>(self)),
                ([3, 3], 2, true) => s.vectorize(Fixed::<3, 2, 9>(self)),
                ([5, 5], 1, true) => s.vectorize(Fixed::<5, 1, 8>(self)),
                ([5, 5], 2, true) => s.vectorize(Fixed::<5, 2, 11>(self)),
                ([7, 7], 1, true) => s.vectorize(Fixed::<7, 1, 10>(self)),
                _ => any(s, self.layer, self.rows),
            }
        }
    }
}

/// Tiles of [`COLUMNS`] outputs of a `K` by `K` kernel with stride `STRIDE`; `WIDTH` input columns feed a tile.
struct Fixed<'a, const K: usize, const STRIDE: usize, const WIDTH: usize>(Part<'a>);

impl<const K: usize, const STRIDE: usize, const WIDTH: usize> Kernel for Fixed<'_, K, STRIDE, WIDTH> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Part { layer, rows } = self.0;
        let shape = layer.shape;
        let (pad_top, pad_left) = (shape.pads[0], shape.pads[1]);
        let stride = layer.pixel_stride;
        // SAFETY: as above; pixels outside the image are replaced by a row of zeros.
        unsafe {
            for y in rows {
                let top = (y * STRIDE).wrapping_sub(pad_top);
                let rows_inside = top < shape.in_h && top + K <= shape.in_h;
                let mut column = 0;
                while column < shape.out_w {
                    // The last tile is moved back over outputs that are there already; they get the same bits.
                    let x = column.min(shape.out_w - COLUMNS);
                    let left = (x * STRIDE).wrapping_sub(pad_left);
                    let out = Out::at(layer, y, x);
                    let inside = rows_inside && left < shape.in_w && left + WIDTH <= shape.in_w;
                    if inside {
                        let corner = layer.data.wrapping_add((top * shape.in_w + left) * stride);
                        let below = shape.in_w * stride;
                        let row: [*const f32; K] = std::array::from_fn(|r| corner.wrapping_add(r * below));
                        tile::<S, K, STRIDE, WIDTH>(s, layer, &out, 0, shape.out_c, |r, j| {
                            row[r].wrapping_add(j * stride)
                        });
                    } else {
                        for channel in (0..shape.out_c).step_by(ZEROS_LEN) {
                            let mut table = [[zeros(); WIDTH]; K];
                            for r in 0..K {
                                let iy = top.wrapping_add(r);
                                for j in 0..WIDTH {
                                    let ix = left.wrapping_add(j);
                                    if iy < shape.in_h && ix < shape.in_w {
                                        let index = (iy * shape.in_w + ix) * stride + channel;
                                        table[r][j] = layer.data.wrapping_add(index);
                                    }
                                }
                            }
                            let channels = ZEROS_LEN.min(shape.out_c - channel);
                            tile::<S, K, STRIDE, WIDTH>(s, layer, &out, channel, channels, |r, j| {
                                table[r][j]
                            });
                        }
                    }
                    out.activate(s, layer, COLUMNS);
                    column += COLUMNS;
                }
            }
        }
    }
}

/// Where a tile's results go.
struct Out {
    output: *mut f32,
    residual: *const f32,
}

impl Out {
    #[inline(always)]
    fn at(layer: &Depthwise<'_>, y: usize, x: usize) -> Out {
        let pixel = (y - layer.first_row) * layer.shape.out_w + x;
        let residual = if layer.residual.is_null() {
            layer.residual
        } else {
            layer.residual.wrapping_add(pixel * layer.residual_stride)
        };
        Out { output: layer.output.wrapping_add(pixel * layer.out_stride), residual }
    }

    #[inline(always)]
    fn activate<S: Simd>(&self, s: S, layer: &Depthwise<'_>, pixels: usize) {
        if layer.activation.split().2 {
            s.vectorize(ActivateRows {
                activation: layer.activation,
                data: self.output,
                rows: pixels,
                n: layer.shape.out_c,
                stride: layer.out_stride,
            });
        }
    }

    /// Bias, residual, clamp and store of `n` channels of pixel `x` of the tile.
    ///
    /// # Safety
    /// The pixel exists and has channels `channel..channel + n`.
    #[inline(always)]
    unsafe fn finish<S: Simd>(
        &self,
        s: S,
        layer: &Depthwise<'_>,
        x: usize,
        channel: usize,
        n: usize,
        sum: S::F,
    ) {
        // SAFETY: by contract.
        unsafe {
            let mut y = sum;
            if !layer.bias.is_null() {
                y = s.add(y, s.load_n(layer.bias.add(channel), n));
            }
            if !self.residual.is_null() {
                y = s.add(y, s.load_n(self.residual.add(x * layer.residual_stride + channel), n));
            }
            let (low, high, _) = layer.activation.split();
            y = s.min(s.splat(high), s.max(s.splat(low), y));
            s.store_n(self.output.add(x * layer.out_stride + channel), n, y);
        }
    }
}

/// One tile over `channels` channels from `first` on; `at(r, j)` is the input pixel in row `r`, column `j`,
/// already moved to channel `first`.
#[inline(always)]
unsafe fn tile<S: Simd, const K: usize, const STRIDE: usize, const WIDTH: usize>(
    s: S,
    layer: &Depthwise<'_>,
    out: &Out,
    first: usize,
    channels: usize,
    at: impl Fn(usize, usize) -> *const f32,
) {
    let all = layer.shape.out_c;
    let mut c = 0;
    while c < channels {
        let n = S::LANES.min(channels - c);
        let mut sums = [s.splat(0.0); COLUMNS];
        // SAFETY: `at` points to pixels with `channels` channels, weights have `all` per tap.
        unsafe {
            macro_rules! taps {
                ($load:expr) => {
                    for r in 0..K {
                        let row: [S::F; WIDTH] = std::array::from_fn(|j| $load(at(r, j).add(c)));
                        for j in 0..K {
                            let w = $load(layer.weights.add((r * K + j) * all + first + c));
                            for x in 0..COLUMNS {
                                sums[x] = s.fma(row[x * STRIDE + j], w, sums[x]);
                            }
                        }
                    }
                };
            }
            if n == S::LANES {
                taps!(|p| s.load(p));
            } else {
                taps!(|p| s.load_n(p, n));
            }
            for x in 0..COLUMNS {
                out.finish(s, layer, x, first + c, n, sums[x]);
            }
        }
        c += S::LANES;
    }
}

/// Any kernel, stride and dilation: pixel by pixel, taps outside the image left out.
///
/// # Safety
/// Sizes are checked.
#[inline(always)]
unsafe fn any<S: Simd>(s: S, layer: &Depthwise<'_>, rows: Range<usize>) {
    const VECTORS: usize = 4;
    let shape = layer.shape;
    let all = shape.out_c;
    for y in rows {
        for x in 0..shape.out_w {
            let out = Out::at(layer, y, x);
            let mut c = 0;
            while c < all {
                let lanes: [usize; VECTORS] =
                    std::array::from_fn(|v| all.saturating_sub(c + v * S::LANES).min(S::LANES));
                let mut sums = [s.splat(0.0); VECTORS];
                for ky in 0..shape.kernel[0] {
                    let iy = (y * shape.stride[0] + ky * shape.dilation[0]).wrapping_sub(shape.pads[0]);
                    for kx in 0..shape.kernel[1] {
                        let ix = (x * shape.stride[1] + kx * shape.dilation[1]).wrapping_sub(shape.pads[1]);
                        if iy >= shape.in_h || ix >= shape.in_w {
                            continue;
                        }
                        let p = layer.data.wrapping_add((iy * shape.in_w + ix) * layer.pixel_stride + c);
                        let w = layer.weights.wrapping_add((ky * shape.kernel[1] + kx) * all + c);
                        for v in 0..VECTORS {
                            let offset = v * S::LANES;
                            // SAFETY: the pixel is stored and has `all` channels.
                            unsafe {
                                let a = s.load_n(p.wrapping_add(offset), lanes[v]);
                                sums[v] = s.fma(a, s.load_n(w.wrapping_add(offset), lanes[v]), sums[v]);
                            }
                        }
                    }
                }
                for v in 0..VECTORS {
                    if lanes[v] > 0 {
                        // SAFETY: the channels exist.
                        unsafe { out.finish(s, layer, 0, c + v * S::LANES, lanes[v], sums[v]) };
                    }
                }
                c += VECTORS * S::LANES;
            }
            out.activate(s, layer, 1);
        }
    }
}
