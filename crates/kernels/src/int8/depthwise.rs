//! Depthwise convolution of bytes. Products of bytes and their sums over a kernel are integers below 2^24, so
//! f32 arithmetic is exact for them and vectors of f32 do the work.

use super::finish::{Columns, Sink};
use super::{ByteWeights, PANEL};
use crate::arch::{Kernel, Simd, dispatch};
use crate::conv::{ConvShape, Taps};
use crate::threads::ThreadPool;
use std::ops::Range;

/// Output columns per tile.
const COLUMNS: usize = 4;
/// Most kernel taps: 255 * 255 * 256 < 2^24.
const TAPS: usize = 256;

/// Computes the rows `rows`; `conv2d_bytes` has checked all sizes.
pub(super) fn depthwise(
    pool: &ThreadPool,
    shape: &ConvShape,
    source: &Taps<u8>,
    signed: bool,
    zero: i32,
    weights: &ByteWeights<'_>,
    sink: &Sink<'_>,
    rows: Range<usize>,
) {
    let taps = shape.kernel[0] * shape.kernel[1];
    assert!(taps <= TAPS, "a depthwise kernel of {taps} taps; at most {TAPS} sum exactly");
    let few = pool.threads() == 1 || shape.multiply_adds() < 100_000;
    let step = if few { rows.len() } else { rows.len().div_ceil(pool.threads() * 4) };
    pool.parallel_for(rows.len().div_ceil(step), &|index, _| {
        let start = rows.start + index * step;
        let part = start..rows.end.min(start + step);
        let first_row = rows.start;
        if signed {
            dispatch(pool.isa(), Part::<true> { shape, source, zero, weights, sink, first_row, rows: part });
        } else {
            dispatch(pool.isa(), Part::<false> { shape, source, zero, weights, sink, first_row, rows: part });
        }
    });
}

struct Part<'a, const SIGNED: bool> {
    shape: &'a ConvShape,
    source: &'a Taps<u8>,
    zero: i32,
    weights: &'a ByteWeights<'a>,
    sink: &'a Sink<'a>,
    first_row: usize,
    rows: Range<usize>,
}

impl<const SIGNED: bool> Kernel for Part<'_, SIGNED> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Part { shape, source, zero, weights, sink, first_row, rows } = self;
        let [kernel_h, kernel_w] = shape.kernel;
        let taps = kernel_h * kernel_w;
        let channels = shape.out_c;
        let mut table = [[source.outside; COLUMNS]; TAPS];
        for block in (0..channels).step_by(PANEL) {
            let n = PANEL.min(channels - block);
            let constants = Columns::new(weights.sums, weights.zeros, zero, taps, sink, block, n);
            for y in rows.clone() {
                for x in (0..shape.out_w).step_by(COLUMNS) {
                    let columns = COLUMNS.min(shape.out_w - x);
                    table[..taps].fill([source.outside; COLUMNS]);
                    let mut tap = 0;
                    for ky in 0..kernel_h {
                        let iy = (y * shape.stride[0] + ky * shape.dilation[0]).wrapping_sub(shape.pads[0]);
                        for kx in 0..kernel_w {
                            let left =
                                (x * shape.stride[1] + kx * shape.dilation[1]).wrapping_sub(shape.pads[1]);
                            for c in 0..columns {
                                let ix = left.wrapping_add(c * shape.stride[1]);
                                if iy < shape.in_h && ix < shape.in_w {
                                    let index = (iy * shape.in_w + ix) * source.pixel_stride + block;
                                    table[tap][c] = source.data.wrapping_add(index);
                                }
                            }
                            tap += 1;
                        }
                    }
                    let mut sums = [[0i32; PANEL]; COLUMNS];
                    let mut c = 0;
                    while c < n {
                        let mut totals = [s.splat(0.0); COLUMNS];
                        // SAFETY: every pointer has the `n` channels of the block, weights have all channels; no
                        // vector is wider than what is left of a line of sums.
                        unsafe {
                            macro_rules! taps {
                                ($lanes:expr) => {
                                    for (tap, pixels) in table[..taps].iter().enumerate() {
                                        let w = weights.packed.as_ptr().add(tap * channels + block + c);
                                        let w = s.load_bytes_n::<true>(w.cast(), $lanes);
                                        for x in 0..COLUMNS {
                                            let a = s.load_bytes_n::<SIGNED>(pixels[x].add(c), $lanes);
                                            totals[x] = s.fma(a, w, totals[x]);
                                        }
                                    }
                                };
                            }
                            if n - c >= S::LANES {
                                taps!(S::LANES);
                            } else {
                                taps!(n - c);
                            }
                            for x in 0..COLUMNS {
                                s.store_integers(sums[x].as_mut_ptr().add(c), totals[x]);
                            }
                        }
                        c += S::LANES;
                    }
                    for c in 0..columns {
                        if constants.has_zeros {
                            // Each channel has a sum of activations of its own here.
                            for i in 0..n {
                                let bytes = table[..taps].iter().map(|pixels| {
                                    // SAFETY: as above.
                                    let b = unsafe { *pixels[c].add(i) };
                                    if SIGNED { i32::from(b as i8) } else { i32::from(b) }
                                });
                                sums[c][i] -= weights.zeros.map_or(0, |z| z[block + i]) * bytes.sum::<i32>();
                            }
                        }
                        let pixel = (y - first_row) * shape.out_w + x + c;
                        // SAFETY: `conv2d_bytes` has checked that the output holds this pixel. The products with
                        // the zero points are subtracted already, hence 0.
                        unsafe { sink.finish(s, &constants, &mut sums[c], n, 0, pixel, block) };
                    }
                }
            }
        }
    }
}
