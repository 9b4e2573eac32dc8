//! Depthwise convolution of bytes. The bytes of four kernel taps are brought beside each other, channel by channel, so
//! that the instruction for dot products of four bytes serves a layer without sums over channels.

use super::finish::{Columns, Sink};
use super::{ByteWeights, PANEL};
use crate::arch::{ByteKernel, Bytes, Requantization, dispatch_bytes, interleaved_column};
use crate::conv::{ConvShape, Taps};
use crate::threads::ThreadPool;
use std::ops::Range;

/// Most kernel taps.
pub(super) const TAPS: usize = 64;
/// A weight less its zero point lies in -255..=255: at most this many signed bytes add up to it.
const PARTS: usize = 3;
/// Vectors of weights of a block of channels: four per group of four taps and part.
const TABLE: usize = TAPS * PARTS;
/// Bytes of input that the blocks of channels go over before the next rows.
const BAND: usize = 256 << 10;

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
    assert!(taps <= TAPS, "a depthwise kernel of {taps} taps; at most {TAPS} are supported");
    let few = pool.threads() == 1 || shape.multiply_adds() < 100_000;
    let tasks = if few { 1 } else { pool.threads() * 4 };
    // Every task prepares the weights of its channels, so channels are divided before rows.
    let channel_step = shape.out_c.div_ceil(tasks).next_multiple_of(PANEL);
    let channel_tasks = shape.out_c.div_ceil(channel_step);
    let step = rows.len().div_ceil((tasks / channel_tasks).max(1));
    pool.parallel_for(rows.len().div_ceil(step) * channel_tasks, &|index, _| {
        let start = rows.start + index / channel_tasks * step;
        let first_channel = index % channel_tasks * channel_step;
        let part = Part {
            shape,
            source,
            flip: if signed { 0x80 } else { 0 },
            zero,
            weights,
            sink,
            first_row: rows.start,
            rows: start..rows.end.min(start + step),
            channels: first_channel..shape.out_c.min(first_channel + channel_step),
        };
        dispatch_bytes(pool.isa(), part);
    });
}

struct Part<'a> {
    shape: &'a ConvShape,
    source: &'a Taps<u8>,
    /// Turns activations into unsigned ones by exclusive or.
    flip: u8,
    /// Zero point in the unsigned range.
    zero: i32,
    weights: &'a ByteWeights<'a>,
    sink: &'a Sink<'a>,
    first_row: usize,
    rows: Range<usize>,
    channels: Range<usize>,
}

/// The weights of a block of channels: `[group of taps][part][4]` vectors of four taps per channel.
#[repr(align(64))]
struct Table([[u8; PANEL]; TABLE]);

/// A line of 32-bit numbers that vectors do not straddle.
#[repr(align(64))]
struct Aligned<N>([N; PANEL]);

/// A block of channels, as many as four vectors of sums have.
struct Block<'a, T> {
    t: T,
    shape: &'a ConvShape,
    source: &'a Taps<u8>,
    sink: &'a Sink<'a>,
    first_row: usize,
    flip: u8,
    channel: usize,
    n: usize,
    parts: usize,
    table: &'a Table,
    columns: Columns,
    /// What sums start with and are multiplied by, in the order of the vectors.
    start: Aligned<i32>,
    scale: Aligned<f32>,
}

/// Signed bytes that add up to a weight less its zero point.
#[inline(always)]
fn parts_of(weight: i32) -> [i32; PARTS] {
    let first = weight.clamp(-128, 127);
    let second = (weight - first).clamp(-128, 127);
    [first, second, weight - first - second]
}

/// Writes part `PART` of the weights less their zero points.
#[inline(always)]
fn take_part<const PART: usize>(weights: &[i8; PANEL], zeros: &[i32; PANEL], to: &mut [u8; PANEL]) {
    for ((to, w), z) in to.iter_mut().zip(weights).zip(zeros) {
        *to = parts_of(i32::from(*w) - z)[PART] as u8;
    }
}

impl ByteKernel for Part<'_> {
    #[inline(always)]
    fn run<T: Bytes>(self, t: T) {
        let Part { shape, source, flip, zero, weights, sink, first_row, rows, channels } = self;
        let three = shape.kernel == [3, 3] && shape.dilation == [1, 1];
        let width = 4 * T::LANES;
        let mut table = Table([[0; PANEL]; TABLE]);
        let row_bytes = shape.in_w * source.pixel_stride * shape.stride[0];
        let band = (BAND / row_bytes.max(1)).max(4);
        for first in rows.clone().step_by(band) {
            let rows = first..rows.end.min(first + band);
            for channel in channels.clone().step_by(width) {
                let n = width.min(channels.end - channel);
                let taps = shape.kernel[0] * shape.kernel[1];
                let parts = fill(t, shape, weights, channel, n, three, &mut table);
                let mut columns = Columns::new(weights.sums, weights.zeros, zero, taps, sink, channel, n);
                // The weights in the table are less their zero points already.
                columns.has_zeros = false;
                let bytes = sink.bytes(0, 0).is_some();
                let (mut start, mut scale) = (Aligned([0; PANEL]), Aligned([0.0; PANEL]));
                for vector in 0..4 {
                    for lane in 0..T::LANES {
                        let (at, column) = (vector * T::LANES + lane, interleaved_column(vector, lane));
                        start.0[at] = if bytes { columns.offset[column] } else { 0 };
                        scale.0[at] = columns.scale[column];
                    }
                }
                let block = Block {
                    t,
                    shape,
                    source,
                    sink,
                    first_row,
                    flip,
                    channel,
                    n,
                    parts,
                    table: &table,
                    columns,
                    start,
                    scale,
                };
                for y in rows.clone() {
                    // SAFETY: `conv2d_bytes` has checked that input and output hold these rows.
                    unsafe {
                        match (three && T::LANES == 16, shape.stride[1], parts) {
                            (true, 1, 1) => block.three_by_three::<4, 1, 1>(y),
                            (true, 1, 2) => block.three_by_three::<4, 1, 2>(y),
                            (true, 2, 1) => block.three_by_three::<4, 2, 1>(y),
                            (true, 2, 2) => block.three_by_three::<4, 2, 2>(y),
                            _ => block.any(y, three),
                        }
                    }
                }
            }
        }
    }
}

/// The tap in place `place` of group `group`: groups are the columns of a 3x3 kernel, else four taps after another.
#[inline(always)]
fn tap_of(three: bool, taps: usize, group: usize, place: usize) -> Option<usize> {
    if three {
        (place < 3).then_some(place * 3 + group)
    } else {
        Some(group * 4 + place).filter(|&t| t < taps)
    }
}

fn groups_of(three: bool, taps: usize) -> usize {
    if three { 3 } else { taps.div_ceil(4) }
}

/// Fills the table for the channels `channel..channel + n`; returns how many parts the weights have.
#[inline(always)]
fn fill<T: Bytes>(
    t: T,
    shape: &ConvShape,
    weights: &ByteWeights<'_>,
    channel: usize,
    n: usize,
    three: bool,
    table: &mut Table,
) -> usize {
    let taps = shape.kernel[0] * shape.kernel[1];
    let mut zeros = [0i32; PANEL];
    if let Some(z) = weights.zeros {
        zeros[..n].copy_from_slice(&z[channel..channel + n]);
    }
    let (mut low, mut high) = (0, 0);
    for tap in 0..taps {
        // Loops of constant length become vectors.
        let mut row = [0; PANEL];
        row[..n].copy_from_slice(&weights.packed[tap * shape.out_c + channel..][..n]);
        for (w, z) in row.iter().zip(&zeros) {
            let w = i32::from(*w) - z;
            low = low.min(w);
            high = high.max(w);
        }
    }
    let parts = match (low, high) {
        (-128.., ..=127) => 1,
        (-256.., ..=254) => 2,
        _ => PARTS,
    };
    let width = 4 * T::LANES;
    for group in 0..groups_of(three, taps) {
        for part in 0..parts {
            let mut rows = [[0u8; PANEL]; 4];
            for (place, row) in rows.iter_mut().enumerate() {
                let Some(tap) = tap_of(three, taps, group, place) else { continue };
                let mut stored = [0; PANEL];
                stored[..n].copy_from_slice(&weights.packed[tap * shape.out_c + channel..][..n]);
                match part {
                    0 => take_part::<0>(&stored, &zeros, row),
                    1 => take_part::<1>(&stored, &zeros, row),
                    _ => take_part::<2>(&stored, &zeros, row),
                }
            }
            let mut vectors = [t.repeat_byte(0); 4];
            for place in 0..4 {
                // SAFETY: rows have `PANEL >= width` bytes.
                vectors[place] = unsafe { t.load_bytes(rows[place].as_ptr(), width) };
            }
            let vectors = t.interleave(vectors);
            let lines = &mut table.0[(group * parts + part) * 4..][..4];
            for v in 0..4 {
                // SAFETY: a line of the table has room for the vector.
                unsafe { t.store_bytes(lines[v].as_mut_ptr(), vectors[v]) };
            }
        }
    }
    parts
}

/// Which of `WIDTH` outputs reads input column `column` with the kernel's column `kx`.
#[inline(always)]
const fn output_of<const WIDTH: usize, const STRIDE: usize>(column: usize, kx: usize) -> Option<usize> {
    if column < kx || !(column - kx).is_multiple_of(STRIDE) || (column - kx) / STRIDE >= WIDTH {
        return None;
    }
    Some((column - kx) / STRIDE)
}

impl<T: Bytes> Block<'_, T> {
    /// Adds the products of four taps.
    #[inline(always)]
    fn accumulate(&self, sums: &mut [T::I; 4], quads: &[T::B; 4], group: usize, parts: usize) {
        for part in 0..parts {
            for v in 0..4 {
                // SAFETY: a line of the table has a whole vector.
                let w = unsafe {
                    let line = self.table.0.get_unchecked((group * parts + part) * 4 + v);
                    self.t.load_bytes(line.as_ptr(), 4 * T::LANES)
                };
                sums[v] = self.t.dot_bytes(sums[v], quads[v], w);
            }
        }
    }

    #[inline(always)]
    fn begin(&self) -> [T::I; 4] {
        let mut sums = [self.t.zero(); 4];
        for v in 0..4 {
            // SAFETY: the array has four vectors.
            sums[v] = unsafe { self.t.load(self.start.0.as_ptr().add(v * T::LANES)) };
        }
        sums
    }

    /// Writes a pixel.
    ///
    /// # Safety
    /// The output holds it, and no other thread writes it.
    #[inline(always)]
    unsafe fn finish(&self, sums: [T::I; 4], y: usize, x: usize) {
        let pixel = (y - self.first_row) * self.shape.out_w + x;
        // SAFETY: by contract.
        unsafe {
            if let Some((out, how)) = self.sink.bytes(pixel, self.channel) {
                let how: Requantization = how;
                return self.t.requantize::<false>(sums, self.scale.0.as_ptr(), how, out, self.n);
            }
            let mut lanes = [0; PANEL];
            for v in 0..4 {
                self.t.store(lanes.as_mut_ptr().add(v * T::LANES), sums[v]);
            }
            let mut row = [0; PANEL];
            for at in 0..4 * T::LANES {
                row[interleaved_column(at / T::LANES, at % T::LANES)] = lanes[at];
            }
            self.sink.finish(self.t, &self.columns, &mut row, self.n, 0, pixel, self.channel);
        }
    }

    /// Row `y` of the output for a 3x3 kernel without dilation: `WIDTH` pixels at a time, for which the taps of every
    /// input column are brought beside each other once.
    ///
    /// # Safety
    /// Input and output hold the row, and no other thread writes it.
    #[inline(always)]
    unsafe fn three_by_three<const WIDTH: usize, const STRIDE: usize, const PARTS: usize>(&self, y: usize) {
        let (t, shape, source) = (self.t, self.shape, self.source);
        let flip = t.repeat_byte(self.flip);
        // SAFETY: the row of outside pixels is longer than a vector.
        let outside = t.flip(t.repeat_byte(unsafe { *source.outside }), flip);
        let top = (y * shape.stride[0]).wrapping_sub(shape.pads[0]);
        let lines: [(*const u8, usize); 3] = std::array::from_fn(|ky| {
            let iy = top.wrapping_add(ky);
            if iy < shape.in_h {
                let start = source.data.wrapping_add(iy * shape.in_w * source.pixel_stride + self.channel);
                (start, source.pixel_stride)
            } else {
                (source.outside, 0)
            }
        });
        for x in (0..shape.out_w).step_by(WIDTH) {
            let left = (x * STRIDE).wrapping_sub(shape.pads[1]);
            let mut sums = [self.begin(); WIDTH];
            macro_rules! columns {
                ($($column:literal)*) => {$(
                    if $column < (WIDTH - 1) * STRIDE + 3 {
                        let ix = left.wrapping_add($column);
                        let quads = if ix < shape.in_w {
                            // Written out, for a closure need not be compiled for the instruction set.
                            let mut rows = [outside; 4];
                            for ky in 0..3 {
                                let (line, step) = lines[ky];
                                // SAFETY: the pixel is in the image, or the line is that of outside pixels.
                                rows[ky] = unsafe { t.load_bytes(line.wrapping_add(ix * step), self.n) };
                                rows[ky] = t.flip(rows[ky], flip);
                            }
                            t.interleave(rows)
                        } else {
                            [outside; 4]
                        };
                        if let Some(i) = output_of::<WIDTH, STRIDE>($column, 0) {
                            self.accumulate(&mut sums[i], &quads, 0, PARTS);
                        }
                        if let Some(i) = output_of::<WIDTH, STRIDE>($column, 1) {
                            self.accumulate(&mut sums[i], &quads, 1, PARTS);
                        }
                        if let Some(i) = output_of::<WIDTH, STRIDE>($column, 2) {
                            self.accumulate(&mut sums[i], &quads, 2, PARTS);
                        }
                    }
                )*};
            }
            columns!(0 1 2 3 4 5 6 7 8);
            for (i, sums) in sums.into_iter().enumerate() {
                if x + i < shape.out_w {
                    // SAFETY: by contract.
                    unsafe { self.finish(sums, y, x + i) };
                }
            }
        }
    }

    /// Row `y` of the output for any kernel.
    ///
    /// # Safety
    /// Input and output hold the row, and no other thread writes it.
    #[inline(always)]
    unsafe fn any(&self, y: usize, three: bool) {
        let (t, shape, source) = (self.t, self.shape, self.source);
        let [kernel_h, kernel_w] = shape.kernel;
        let taps = kernel_h * kernel_w;
        let flip = t.repeat_byte(self.flip);
        for x in 0..shape.out_w {
            let mut sums = self.begin();
            for group in 0..groups_of(three, taps) {
                let mut rows = [flip; 4];
                for place in 0..4 {
                    let mut pixel = source.outside;
                    if let Some(tap) = tap_of(three, taps, group, place) {
                        let (ky, kx) = (tap / kernel_w, tap % kernel_w);
                        let iy = (y * shape.stride[0] + ky * shape.dilation[0]).wrapping_sub(shape.pads[0]);
                        let ix = (x * shape.stride[1] + kx * shape.dilation[1]).wrapping_sub(shape.pads[1]);
                        if iy < shape.in_h && ix < shape.in_w {
                            let index = (iy * shape.in_w + ix) * source.pixel_stride;
                            pixel = source.data.wrapping_add(index.wrapping_add(self.channel));
                        }
                    }
                    // SAFETY: the pixel is in the image, or the one that stands for pixels outside; weights of taps
                    // past the last are zero.
                    rows[place] = t.flip(unsafe { t.load_bytes(pixel, self.n) }, flip);
                }
                self.accumulate(&mut sums, &t.interleave(rows), group, self.parts);
            }
            // SAFETY: by contract.
            unsafe { self.finish(sums, y, x) };
        }
    }
}
