//! Weights in blocks: decoding and encoding of rows, and products that read the blocks where they lie.
//!
//! Products with quantised weights quantise the activations too, to 8 bits with one scale for each 32 (or, for formats
//! with blocks of 256, each 256) of a row; everything within such a block is exact integer arithmetic. An element of
//! the result is computed in one order of operations that depends on nothing but the format and the row length: not on
//! the number of rows, not on the threads, not on the instruction set, and not on how the output channels are divided
//! over calls.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod expert;
mod portable;
mod quantize;
#[cfg(test)]
mod tests;
mod unpack;
#[cfg(target_arch = "x86_64")]
mod vnni;

use lightering_units::BlockFormat;

pub use expert::{BlockWeights, ExpertFfn, expert_ffn, expert_ffn_scratch_len};
pub use quantize::{can_quantize, quantize_row};
pub use unpack::dequantize_row;
pub(crate) use unpack::half_to_f32;

use crate::arch::{Isa, Kernel, Simd, dispatch};
use crate::threads::{Shareable, ThreadPool};
use unpack::{SUPER, checked_row_bytes};

/// Rows of activations are padded to this many elements.
const PAD: usize = 512;
/// Output channels of one task; their weights stay in the second-level cache while rows of activations pass by.
const CHANNELS: usize = 16;
/// Rows of activations that share one pass over the weights in the plain code.
const TILE: usize = 4;

/// Quantised rows of activations: for each row, `padded` bytes, then a scale for each 32 (or 256) of them, then the
/// sums of each 32 as f32 (or of each 16 as i16).
#[derive(Clone, Copy)]
struct Quantized<'a> {
    words: &'a [f32],
    padded: usize,
}

impl<'a> Quantized<'a> {
    fn stride(padded: usize) -> usize {
        padded / 4 + padded / 32 + padded / 32
    }

    fn parts(self, row: usize) -> (&'a [i8], &'a [f32], &'a [f32]) {
        let words = &self.words[row * Self::stride(self.padded)..][..Self::stride(self.padded)];
        let (codes, rest) = words.split_at(self.padded / 4);
        let (scales, sums) = rest.split_at(self.padded / 32);
        (bytemuck::cast_slice(codes), scales, sums)
    }
}

/// Values of scratch that the product of `rows` rows of `k` activations with weights in `format` needs.
pub fn block_matmul_scratch_len(format: BlockFormat, k: usize, rows: usize) -> usize {
    if format.is_plain() { 0 } else { rows * Quantized::stride(k.next_multiple_of(PAD)) }
}

/// Rows of activations, made ready for products with weights in blocks. They serve several products, such as those of
/// query, key and value, and any division of the output channels over calls.
#[derive(Clone, Copy)]
pub struct BlockActivations<'a> {
    rows: usize,
    k: usize,
    block_len: usize,
    x: &'a [f32],
    quantized: Quantized<'a>,
    /// Which rows of those that were made ready; all of them if none.
    selected: Option<&'a [u32]>,
}

impl std::fmt::Debug for BlockActivations<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockActivations")
            .field("rows", &self.rows)
            .field("k", &self.k)
            .finish_non_exhaustive()
    }
}

struct QuantizeRow<'a> {
    x: &'a [f32],
    group: usize,
    codes: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [f32],
}

impl Kernel for QuantizeRow<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let QuantizeRow { x, group, codes, scales, sums } = self;
        codes[x.len()..].fill(0);
        scales.fill(0.0);
        sums.fill(0.0);
        for (g, (x, codes)) in x.chunks_exact(group).zip(codes.chunks_exact_mut(group)).enumerate() {
            // As integers, magnitudes are ordered as the numbers are, and infinities and NaN come last.
            let largest = x.iter().fold(0u32, |m, x| m.max(x.to_bits() & 0x7fff_ffff));
            let finite = largest < f32::INFINITY.to_bits();
            let largest = f32::from_bits(largest);
            let inverse = if finite && largest >= 1e-30 { 127.0 / largest } else { 0.0 };
            scales[g] = if !finite {
                f32::NAN
            } else if inverse == 0.0 {
                0.0
            } else {
                largest / 127.0
            };
            // Adding and taking off this number rounds to the nearest integer, half to even.
            const ROUND: f32 = 12_582_912.0;
            for (code, x) in codes.iter_mut().zip(x) {
                let scaled = if finite { *x * inverse } else { 0.0 };
                // SAFETY: the product lies within 127 of zero, up to rounding.
                *code = unsafe { ((scaled + ROUND) - ROUND).to_int_unchecked::<i32>() } as i8;
            }
        }
        if group == 32 {
            for (sum, codes) in sums.iter_mut().zip(codes.as_chunks::<32>().0) {
                *sum = codes.iter().map(|c| i32::from(*c)).sum::<i32>() as f32;
            }
        } else {
            let sums: &mut [i16] = bytemuck::cast_slice_mut(sums);
            for (sum, codes) in sums.iter_mut().zip(codes.as_chunks::<16>().0) {
                *sum = codes.iter().map(|c| i16::from(*c)).sum();
            }
        }
    }
}

impl<'a> BlockActivations<'a> {
    /// Quantises `x`, `[rows, k]`, for weights in `format`, and any other format with blocks of as many elements.
    /// `scratch` has [`block_matmul_scratch_len`] values; plain formats need none.
    ///
    /// # Panics
    /// Panics when `k` is no whole number of blocks, or a slice is too short.
    pub fn new(
        pool: &ThreadPool,
        format: BlockFormat,
        k: usize,
        x: &'a [f32],
        rows: usize,
        scratch: &'a mut [f32],
    ) -> BlockActivations<'a> {
        checked_row_bytes(format, k);
        assert!(x.len() >= rows * k, "x has {} values, {rows} rows of {k} needed", x.len());
        let need = block_matmul_scratch_len(format, k, rows);
        assert!(scratch.len() >= need, "scratch has {} values, {need} needed", scratch.len());
        let padded = k.next_multiple_of(PAD);
        let stride = Quantized::stride(padded);
        if !format.is_plain() && k > 0 {
            let start = Shareable(scratch.as_mut_ptr());
            let isa = pool.isa();
            pool.parallel_for(rows, &|row, _| {
                // SAFETY: every row has a part of the scratch of its own, which was checked to hold all.
                let words = unsafe { std::slice::from_raw_parts_mut(start.get().add(row * stride), stride) };
                let (codes, rest) = words.split_at_mut(padded / 4);
                let (scales, sums) = rest.split_at_mut(padded / 32);
                let x = &x[row * k..row * k + k];
                let codes = bytemuck::cast_slice_mut(codes);
                dispatch(isa, QuantizeRow { x, group: format.block_len(), codes, scales, sums });
            });
        }
        let quantized = Quantized { words: &scratch[..need], padded };
        BlockActivations { rows, k, block_len: format.block_len(), x, quantized, selected: None }
    }

    /// Rows that products are computed for.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Some of the rows, in any order; products are computed for these alone, and have the same bits as in products for
    /// all.
    ///
    /// # Panics
    /// Panics when there is no such row, or these are already selected ones.
    pub fn select<'b>(&'b self, rows: &'b [u32]) -> BlockActivations<'b> {
        assert!(self.selected.is_none(), "rows are selected from all rows");
        for &row in rows {
            assert!((row as usize) < self.rows, "row {row} of {}", self.rows);
        }
        BlockActivations { rows: rows.len(), selected: Some(rows), ..*self }
    }

    #[inline(always)]
    fn source(&self, row: usize) -> usize {
        self.selected.map_or(row, |rows| rows[row] as usize)
    }

    /// Codes, scales and sums of a row.
    #[inline(always)]
    fn parts(&self, row: usize) -> (&'a [i8], &'a [f32], &'a [f32]) {
        self.quantized.parts(self.source(row))
    }

    /// The values of a row.
    #[inline(always)]
    fn values(&self, row: usize) -> &'a [f32] {
        &self.x[self.source(row) * self.k..][..self.k]
    }

    /// `y[row * y_stride + channel] = sum over i of w[channel, i] * x[row, i]` for `n` output channels whose weights
    /// `w`, `[n, row_bytes]`, are in `format`.
    ///
    /// # Panics
    /// Panics when a slice is too short for its shape, or the activations were made for another length of blocks.
    pub fn matmul(
        &self,
        pool: &ThreadPool,
        format: BlockFormat,
        w: &[u8],
        n: usize,
        y: &mut [f32],
        y_stride: usize,
    ) {
        assert_eq!(format.block_len(), self.block_len, "activations are for other blocks than {format}");
        let row_bytes = checked_row_bytes(format, self.k);
        assert!(w.len() >= n * row_bytes, "weights have {} bytes, {n} rows of {row_bytes} needed", w.len());
        if n == 0 || self.rows == 0 {
            return;
        }
        assert!(y_stride >= n || self.rows == 1, "rows of y overlap");
        assert!(
            y.len() >= (self.rows - 1) * y_stride + n,
            "y has {} values, {} rows of {n} at a distance of {y_stride} needed",
            y.len(),
            self.rows
        );
        let y = Shareable(y.as_mut_ptr());
        let isa = pool.isa();
        let groups = n.div_ceil(CHANNELS);
        let per_task = groups_per_task(pool, groups, CHANNELS * row_bytes * self.rows);
        pool.parallel_for(groups.div_ceil(per_task), &|task, _| {
            for group in task * per_task..groups.min((task + 1) * per_task) {
                let first = group * CHANNELS;
                let channels = first..n.min(first + CHANNELS);
                self.part(format, w, channels, y.get().wrapping_add(first), y_stride).run(isa);
            }
        });
    }

    /// The product of all rows with some of the channels, to `y`; the callers check all sizes.
    fn part<'b>(
        &'b self,
        format: BlockFormat,
        w: &'b [u8],
        channels: std::ops::Range<usize>,
        y: *mut f32,
        y_stride: usize,
    ) -> Part<'b> {
        let row_bytes = checked_row_bytes(format, self.k);
        let w = &w[channels.start * row_bytes..channels.end * row_bytes];
        Part { format, w, row_bytes, channels: channels.len(), activations: self, y, y_stride }
    }
}

/// `y[row, channel] = sum over i of w[channel, i] * x[row, i]`: the product of `x`, `[rows, k]`, with weights `w`,
/// `[n, row_bytes]` in `format`, into `y`, `[rows, n]`. `scratch` has [`block_matmul_scratch_len`] values.
///
/// To use activations more than once, or to write into wider rows, see [`BlockActivations`].
///
/// # Panics
/// Panics when `k` is no whole number of blocks or a slice is too short for its shape.
pub fn block_matmul(
    pool: &ThreadPool,
    format: BlockFormat,
    w: &[u8],
    n: usize,
    k: usize,
    x: &[f32],
    rows: usize,
    y: &mut [f32],
    scratch: &mut [f32],
) {
    BlockActivations::new(pool, format, k, x, rows, scratch).matmul(pool, format, w, n, y, n);
}

/// How many of `groups` groups of channels make a task worth handing out, but enough tasks for all threads; `work` is
/// that of a group, in bytes times rows.
fn groups_per_task(pool: &ThreadPool, groups: usize, work: usize) -> usize {
    const WORTH: usize = 64 << 10;
    (WORTH / work.max(1)).min(groups / (4 * pool.threads())).max(1)
}

/// The product of all rows with a few channels.
struct Part<'a> {
    format: BlockFormat,
    w: &'a [u8],
    row_bytes: usize,
    channels: usize,
    activations: &'a BlockActivations<'a>,
    y: *mut f32,
    y_stride: usize,
}

impl Part<'_> {
    fn run(&self, isa: Isa) {
        #[cfg(target_arch = "x86_64")]
        if isa >= Isa::Avx512 && vnni::run(self) {
            return;
        }
        #[cfg(target_arch = "x86_64")]
        if isa >= Isa::Avx2 && avx2::run(self) {
            return;
        }
        dispatch(isa, portable::Products(self));
    }

    /// Stores an element of the result.
    #[inline(always)]
    fn put(&self, row: usize, channel: usize, value: f32) {
        debug_assert!(row < self.activations.rows && channel < self.channels);
        // SAFETY: `matmul` has checked that y has this element, and no other task writes it.
        unsafe { *self.y.add(row * self.y_stride + channel) = value };
    }
}

/// Sum of 16 lanes, halving.
#[inline(always)]
fn sum16(lanes: &[f32; 16]) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    sum4(&std::array::from_fn(|i| eight[i] + eight[i + 4]))
}

/// Sum of 4 lanes, halving.
#[inline(always)]
fn sum4(lanes: &[f32; 4]) -> f32 {
    (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])
}
