//! Products and convolutions of bytes, accumulated exactly in i32.
//!
//! Activations are bytes, unsigned or signed, channels last; weights are signed bytes in panels of 64 columns,
//! `[K / 4][width][4]`, every kernel tap padded to a multiple of four with zeros (all taps together where a tap has few
//! channels, as in the first layer of most networks). With `a` the activations, `w`
//! the weights and their zero points, the sum is `sum (a - a_zero) (w - w_zero) + bias`; pixels outside an image
//! count as `a_zero`. What becomes of the sum is the [`ByteOutput`].

mod depthwise;
mod finish;
mod tile;

pub use finish::ByteOutput;

use crate::arch::{ByteKernel, Bytes, dispatch_bytes};
use crate::conv::{ConvShape, Taps};
use crate::epilogue::check_rows;
use crate::gemm::{GRAIN, PANEL, RowSource, Strided};
use crate::threads::ThreadPool;
use finish::{Columns, Sink};
use std::ops::Range;
use tile::{Tile, run_tile, tile_rows};

/// Most kernel taps per tile.
const SEGMENTS: usize = 64;
const ROWS_MAX: usize = 12;
/// Most bytes per row that are gathered.
const GATHERED: usize = 512;
/// Length of the row that stands for pixels outside the image; a multiple of four.
const OUTSIDE: usize = 2048;

const ONES: [u8; PANEL] = [1; PANEL];

/// Bytes of activations.
#[derive(Clone, Copy, Debug)]
pub struct ByteInput<'a> {
    /// The bytes; signed ones in two's complement.
    pub data: &'a [u8],
    /// Whether the bytes are signed.
    pub signed: bool,
    /// The zero point.
    pub zero: i32,
    /// Distance between rows (pixels).
    pub stride: usize,
}

/// Packed weights.
#[derive(Clone, Copy, Debug)]
pub struct ByteWeights<'a> {
    /// From a `pack_*_bytes` function.
    pub packed: &'a [i8],
    /// Sum of each column's weights, from the same function.
    pub sums: &'a [i32],
    /// Zero point of each column, `None` for zeros. Unsigned weights are packed as `w - 128`, so 128 is
    /// subtracted from their zero points, too.
    pub zeros: Option<&'a [i32]>,
}

fn packed_len_runs(taps: usize, run: usize, n: usize) -> usize {
    taps * run.next_multiple_of(4) * n.next_multiple_of(GRAIN)
}

/// Whether the taps of a pixel are copied beside each other before the product, because padding each of them to a
/// multiple of four would cost more.
fn gathers(shape: &ConvShape) -> bool {
    let (taps, run) = (shape.kernel[0] * shape.kernel[1], shape.in_c / shape.groups);
    taps > 1 && run < 16 && !run.is_multiple_of(4) && taps * run <= GATHERED
}

/// Runs per row of A, and their length.
fn runs_of(shape: &ConvShape) -> (usize, usize) {
    let (taps, run) = (shape.kernel[0] * shape.kernel[1], shape.in_c / shape.groups);
    if gathers(shape) { (1, taps * run) } else { (taps, run) }
}

/// Bytes that the panels of a `[k, n]` matrix take.
pub fn packed_bytes_len(k: usize, n: usize) -> usize {
    packed_len_runs(1, k, n)
}

/// Packs some columns of a `[taps · run, n]` matrix into their places in the panels of the whole; the padding of a panel
/// is written with its last column.
fn pack_columns(
    taps: usize,
    run: usize,
    n: usize,
    columns: Range<usize>,
    out: &mut [i8],
    sums: &mut [i32],
    at: impl Fn(usize, usize, usize) -> i8,
) {
    let groups = run.div_ceil(4);
    for column in columns {
        let first = column / PANEL * PANEL;
        let (j, count) = (column - first, PANEL.min(n - first));
        let width = count.next_multiple_of(GRAIN);
        let panel = &mut out[first * taps * groups * 4..][..taps * groups * width * 4];
        let mut sum = 0i32;
        for tap in 0..taps {
            for group in 0..groups {
                let start = (tap * groups + group) * width;
                let slot = &mut panel[(start + j) * 4..][..4];
                for (i, to) in slot.iter_mut().enumerate() {
                    let k = group * 4 + i;
                    *to = if k < run { at(tap, k, column) } else { 0 };
                    sum = sum.wrapping_add(i32::from(*to));
                }
                if j + 1 == count {
                    panel[(start + count) * 4..(start + width) * 4].fill(0);
                }
            }
        }
        sums[column] = sum;
    }
}

fn signed_weight(byte: u8, signed: bool) -> i8 {
    (if signed { byte } else { byte ^ 0x80 }) as i8
}

/// Packs B, `[k, n]` or, when `transposed`, `[n, k]`, into `out` of [`packed_bytes_len`]`(k, n)` bytes and
/// `sums` of `n` values.
///
/// # Panics
/// Panics when a slice is too short.
pub fn pack_bytes(
    k: usize,
    n: usize,
    b: &[u8],
    signed: bool,
    transposed: bool,
    out: &mut [i8],
    sums: &mut [i32],
) {
    assert!(b.len() >= k * n, "B has {} bytes, {} needed", b.len(), k * n);
    pack_columns(1, k, n, 0..n, &mut out[..packed_bytes_len(k, n)], &mut sums[..n], |_, row, column| {
        signed_weight(b[if transposed { column * k + row } else { row * n + column }], signed)
    });
}

/// Packs rows `first_row..` of a matrix given transposed, as `[n, k]`, into their places; packing all rows in any
/// number of pieces gives the same bytes as [`pack_bytes`].
///
/// # Panics
/// Panics when a slice is too short.
pub fn pack_bytes_rows(
    k: usize,
    n: usize,
    first_row: usize,
    rows: &[u8],
    signed: bool,
    out: &mut [i8],
    sums: &mut [i32],
) {
    let columns = first_row..first_row + rows.len() / k.max(1);
    pack_rows(k, n, columns, rows, signed, &mut out[..packed_bytes_len(k, n)], &mut sums[..n]);
}

/// Side of the squares in which rows are transposed, in groups of four bytes: a cache line.
const SQUARE: usize = 16;

/// [`pack_columns`] where each column is a row of `rows`, one after the other.
fn pack_rows(
    k: usize,
    n: usize,
    columns: Range<usize>,
    rows: &[u8],
    signed: bool,
    out: &mut [i8],
    sums: &mut [i32],
) {
    let (first, groups) = (columns.start, k.div_ceil(4));
    let flip = if signed { 0 } else { 0x80 };
    let out: &mut [u8] = bytemuck::cast_slice_mut(out);
    let mut column = first;
    while column < columns.end {
        let start = column / PANEL * PANEL;
        let count = PANEL.min(n - start);
        let width = count.next_multiple_of(GRAIN);
        let panel = &mut out[start * groups * 4..][..groups * width * 4];
        // Within one panel and one square.
        let across = SQUARE.min(columns.end - column).min(start + count - column);
        for group in (0..groups).step_by(SQUARE) {
            let bytes = (4 * SQUARE).min(k - group * 4);
            let mut square = [[0u8; 4 * SQUARE]; SQUARE];
            for (j, line) in square[..across].iter_mut().enumerate() {
                let from = &rows[(column + j - first) * k + group * 4..][..bytes];
                line.iter_mut().zip(from).for_each(|(to, byte)| *to = byte ^ flip);
            }
            for depth in 0..bytes.div_ceil(4) {
                let target = &mut panel[((group + depth) * width + column - start) * 4..][..across * 4];
                for (to, line) in target.chunks_exact_mut(4).zip(&square) {
                    to.copy_from_slice(&line[depth * 4..depth * 4 + 4]);
                }
            }
        }
        for (j, sum) in sums[column..column + across].iter_mut().enumerate() {
            let row = &rows[(column + j - first) * k..][..k];
            *sum = row.iter().map(|&byte| i32::from(signed_weight(byte, signed))).sum();
        }
        column += across;
        if column == start + count {
            for line in panel.chunks_exact_mut(width * 4) {
                line[count * 4..].fill(0);
            }
        }
    }
}

/// Whether [`conv2d_bytes`] computes this layer: depthwise kernels have at most 64 taps.
pub fn conv_bytes_supported(shape: &ConvShape) -> bool {
    !shape.is_depthwise() || shape.kernel[0].saturating_mul(shape.kernel[1]) <= depthwise::TAPS
}

/// Bytes that the packed weights of this layer take.
pub fn conv_packed_bytes_len(shape: &ConvShape) -> usize {
    let taps = shape.kernel[0] * shape.kernel[1];
    if shape.is_depthwise() {
        return taps * shape.out_c;
    }
    let (taps, run) = runs_of(shape);
    shape.groups * packed_len_runs(taps, run, shape.out_c / shape.groups)
}

/// Packs weights given as `[out_c, in_c / groups, kernel_h, kernel_w]` into `out` of [`conv_packed_bytes_len`]
/// bytes and `sums` of `out_c` values.
///
/// # Panics
/// Panics when a slice is too short or the shape is not consistent.
pub fn pack_conv_bytes(shape: &ConvShape, weights: &[u8], signed: bool, out: &mut [i8], sums: &mut [i32]) {
    shape.check();
    let row = shape.kernel[0] * shape.kernel[1] * (shape.in_c / shape.groups);
    assert!(weights.len() >= shape.out_c * row, "{} weights for {shape:?}", weights.len());
    pack_conv_bytes_rows(shape, 0, &weights[..shape.out_c * row], signed, out, sums);
}

/// Packs output channels `first_row..` into their places: `rows` holds whole output channels. Packing all of them in any
/// number of pieces gives the same bytes as [`pack_conv_bytes`].
///
/// # Panics
/// Panics when a slice is too short.
pub fn pack_conv_bytes_rows(
    shape: &ConvShape,
    first_row: usize,
    rows: &[u8],
    signed: bool,
    out: &mut [i8],
    sums: &mut [i32],
) {
    let taps = shape.kernel[0] * shape.kernel[1];
    let (run, columns) = (shape.in_c / shape.groups, shape.out_c / shape.groups);
    let row = taps * run;
    let out = &mut out[..conv_packed_bytes_len(shape)];
    let end = first_row + rows.len() / row.max(1);
    if shape.is_depthwise() {
        for channel in first_row..end {
            let mut sum = 0;
            for tap in 0..taps {
                let w = signed_weight(rows[(channel - first_row) * taps + tap], signed);
                out[tap * shape.out_c + channel] = w;
                sum += i32::from(w);
            }
            sums[channel] = sum;
        }
        return;
    }
    let (runs, run_len) = runs_of(shape);
    let len = packed_len_runs(runs, run_len, columns);
    for group in 0..shape.groups {
        let first = group * columns;
        let (low, high) = (first_row.max(first), end.min(first + columns));
        if low >= high {
            continue;
        }
        let (out, sums) = (&mut out[group * len..][..len], &mut sums[first..][..columns]);
        let at = |tap: usize, channel: usize, column: usize| {
            signed_weight(rows[(first + column - first_row) * row + channel * taps + tap], signed)
        };
        let range = low - first..high - first;
        if taps == 1 {
            pack_rows(row, columns, range, &rows[(low - first_row) * row..], signed, out, sums);
        } else if runs == taps {
            pack_columns(runs, run_len, columns, range, out, sums, at);
        } else {
            pack_columns(runs, run_len, columns, range, out, sums, |_, k, column| {
                at(k / run, k % run, column)
            });
        }
    }
}

struct Product<'a, R> {
    source: R,
    /// Whether rows are copied beside each other first.
    gather: bool,
    signed: bool,
    /// Zero point in the unsigned range.
    zero: i32,
    rows: usize,
    columns: usize,
    packed: *const i8,
    sums: &'a [i32],
    weight_zeros: Option<&'a [i32]>,
    sink: Sink<'a>,
}

// SAFETY: inputs are only read; tasks write disjoint parts of the output.
unsafe impl<R: RowSource<u8>> Sync for Product<'_, R> {}

impl<R: RowSource<u8>> Product<'_, R> {
    fn run(&self, pool: &ThreadPool) {
        let panels = self.columns.div_ceil(PANEL);
        let work = self.rows * self.columns * self.source.taps() * self.source.run();
        let tasks = if work < 500_000 { 1 } else { pool.threads() * 4 };
        let (row_step, panel_step) = if pool.threads() == 1 || tasks == 1 {
            (self.rows, panels)
        } else if self.rows >= tasks * 24 {
            (self.rows.div_ceil(tasks).next_multiple_of(12), panels)
        } else if panels >= tasks {
            (self.rows, panels.div_ceil(tasks))
        } else {
            (self.rows.div_ceil(tasks.div_ceil(panels)).next_multiple_of(6), 1)
        };
        let panel_tasks = panels.div_ceil(panel_step);
        pool.parallel_for(self.rows.div_ceil(row_step) * panel_tasks, &|index, _| {
            let (r, p) = (index / panel_tasks, index % panel_tasks);
            let rows = r * row_step..self.rows.min((r + 1) * row_step);
            let panels = p * panel_step..panels.min((p + 1) * panel_step);
            dispatch_bytes(pool.isa(), Part { product: self, rows, panels });
        });
    }
}

/// The sums of a tile; aligned, for vectors that cross cache lines cost twice.
#[repr(align(64))]
struct Sums([i32; ROWS_MAX * PANEL]);

struct Part<'a, R> {
    product: &'a Product<'a, R>,
    rows: Range<usize>,
    panels: Range<usize>,
}

impl<R: RowSource<u8>> ByteKernel for Part<'_, R> {
    #[inline(always)]
    fn run<T: Bytes>(self, t: T) {
        let p = self.product;
        let (mut taps, mut run) = (p.source.taps(), p.source.run());
        let mut gathered = [0u8; ROWS_MAX * GATHERED];
        if p.gather {
            (taps, run) = (1, taps * run);
        }
        let groups = run.div_ceil(4);
        let flip = if p.signed { 0x8080_8080 } else { 0 };
        let signs = t.repeat_byte(flip as u8);
        let ones = t.repeat_byte(1);
        let mut pointers = [std::ptr::null::<u8>(); SEGMENTS * ROWS_MAX];
        let mut sums = Sums([0; ROWS_MAX * PANEL]);
        // A piece is a group of whole taps, or a part of one tap whose length is a multiple of four.
        let (group, piece) = if taps > 1 && run <= OUTSIDE {
            (SEGMENTS.min(taps), run)
        } else if p.source.padded() {
            (1, OUTSIDE)
        } else {
            (1, run.max(1))
        };
        for panel in self.panels {
            let column0 = panel * PANEL;
            let columns = PANEL.min(p.columns - column0);
            let width = columns.next_multiple_of(GRAIN);
            let w = p.packed.wrapping_add(column0 * taps * groups * 4);
            let constants =
                Columns::new(p.sums, p.weight_zeros, p.zero, taps * run, &p.sink, column0, columns);
            let mut row = self.rows.start;
            while row < self.rows.end {
                // All slices of a panel take the same rows, so that the finish sees whole panel rows.
                let widest = (width / T::LANES).min(T::TILE_VECTORS);
                let rows = tile_rows::<T>(widest, self.rows.end - row);
                let mut row_sums = [t.zero(); ROWS_MAX];
                let (mut tap, mut offset) = (0, 0);
                loop {
                    let segments = group.min(taps - tap);
                    let len = piece.min(run - offset);
                    if p.gather {
                        // SAFETY: the buffer holds `ROWS_MAX` rows of `GATHERED >= run` bytes.
                        unsafe { p.source.gather(row, rows, gathered.as_mut_ptr(), GATHERED) };
                        for (to, from) in pointers[..rows].iter_mut().zip(gathered.chunks_exact(GATHERED)) {
                            *to = from.as_ptr();
                        }
                    } else {
                        // SAFETY: the table holds `SEGMENTS * ROWS_MAX` pointers; rows and taps exist.
                        unsafe { p.source.pointers(row, rows, tap, segments, offset, pointers.as_mut_ptr()) };
                    }
                    let mut slice = 0;
                    while slice < width {
                        let vectors = ((width - slice) / T::LANES).min(widest);
                        let tile = Tile {
                            pointers: pointers.as_ptr(),
                            segments,
                            // Gathered rows may be read to the next multiple of four.
                            len: if p.gather { len.next_multiple_of(4) } else { len },
                            flip,
                            w: w.wrapping_add(((tap * groups + offset / 4) * width + slice) * 4),
                            w_stride: width * 4,
                            sums: sums.0.as_mut_ptr().wrapping_add(slice),
                            resume: tap + offset > 0,
                        };
                        run_tile(t, rows, vectors, &tile);
                        slice += vectors * T::LANES;
                    }
                    if constants.has_zeros {
                        for segment in 0..segments {
                            for r in 0..rows {
                                let bytes = pointers[segment * rows + r];
                                let mut at = 0;
                                while at < len {
                                    let n = (4 * T::LANES).min(len - at);
                                    // SAFETY: each pointer has `len` bytes, the ones are `PANEL` many.
                                    unsafe {
                                        let some = t.flip(t.load_bytes(bytes.wrapping_add(at), n), signs);
                                        let mask = if n == 4 * T::LANES {
                                            ones
                                        } else {
                                            t.load_bytes(ONES.as_ptr(), n)
                                        };
                                        row_sums[r] = t.dot_bytes(row_sums[r], some, mask);
                                    }
                                    at += n;
                                }
                            }
                        }
                    }
                    offset += len;
                    if offset >= run {
                        offset = 0;
                        tap += segments;
                    }
                    if tap >= taps {
                        break;
                    }
                }
                let mut lines = sums.0.chunks_exact_mut(PANEL);
                for r in 0..rows {
                    let row_sum = if constants.has_zeros { t.total(row_sums[r]) } else { 0 };
                    let line = lines.next().and_then(|line| <&mut [i32; PANEL]>::try_from(line).ok());
                    let line = line.expect("the buffer has ROWS_MAX lines of PANEL sums");
                    // SAFETY: the entry function has checked that the output holds this row.
                    unsafe {
                        p.sink.finish(t, &constants, line, columns, row_sum, row + r, column0);
                    }
                }
                row += rows;
            }
        }
    }
}

/// The zero point and byte that stands for it, in the unsigned range and in memory.
fn zero_point(input: &ByteInput<'_>) -> (i32, u8) {
    let range = if input.signed { -128..128 } else { 0..256 };
    assert!(range.contains(&input.zero), "zero point {} outside {range:?}", input.zero);
    (input.zero + if input.signed { 128 } else { 0 }, input.zero as u8)
}

fn check_weights(weights: &ByteWeights<'_>, len: usize, n: usize) {
    assert!(weights.packed.len() >= len, "{} packed weights, {len} needed", weights.packed.len());
    assert!(weights.sums.len() >= n, "{} column sums for {n} columns", weights.sums.len());
    assert!(weights.zeros.is_none_or(|z| z.len() >= n), "too few zero points for {n} columns");
}

/// `C = output(A B)`: A is `[m, k]` bytes with row distance `a.stride`, B comes from [`pack_bytes`]. `bias` is
/// added to the sums.
///
/// # Panics
/// Panics when a slice is too short for its shape.
pub fn gemm_bytes(
    pool: &ThreadPool,
    m: usize,
    n: usize,
    k: usize,
    a: ByteInput<'_>,
    weights: ByteWeights<'_>,
    bias: Option<&[i32]>,
    output: ByteOutput<'_>,
) {
    check_rows("A", a.data.len(), m, k, a.stride);
    check_weights(&weights, packed_bytes_len(k, n), n);
    let sink = Sink::new(output, bias, m, n);
    let (zero, _) = zero_point(&a);
    Product {
        source: Strided { data: a.data.as_ptr(), stride: a.stride, k },
        gather: false,
        signed: a.signed,
        zero,
        rows: m,
        columns: n,
        packed: weights.packed.as_ptr(),
        sums: weights.sums,
        weight_zeros: weights.zeros,
        sink,
    }
    .run_if_any(pool);
}

impl<R: RowSource<u8>> Product<'_, R> {
    fn run_if_any(&self, pool: &ThreadPool) {
        if self.rows > 0 && self.columns > 0 {
            self.run(pool);
        }
    }
}

/// Convolves bytes: computes the output rows `rows` of the layer. `input.data` starts with image row
/// `first_row`; the output's first pixel is `(rows.start, 0)`. Weights come from [`pack_conv_bytes`].
///
/// # Panics
/// Panics when a slice is too short or the shape is not consistent.
pub fn conv2d_bytes(
    pool: &ThreadPool,
    shape: &ConvShape,
    input: ByteInput<'_>,
    first_row: usize,
    weights: ByteWeights<'_>,
    bias: Option<&[i32]>,
    output: ByteOutput<'_>,
    rows: Range<usize>,
) {
    shape.check();
    assert!(rows.end <= shape.out_h, "output rows {rows:?} of {}", shape.out_h);
    let pixels = rows.len() * shape.out_w;
    check_weights(&weights, conv_packed_bytes_len(shape), shape.out_c);
    let sink = Sink::new(output, bias, pixels, shape.out_c);
    let needed = shape.input_rows(rows.clone());
    assert!(
        needed.is_empty() || first_row <= needed.start,
        "input starts at row {first_row}, {needed:?} needed"
    );
    let stored = needed.end.saturating_sub(first_row);
    check_rows("input", input.data.len(), stored * shape.in_w, shape.in_c, input.stride);
    let (zero, byte) = zero_point(&input);
    if pixels == 0 || shape.out_c == 0 {
        return;
    }
    let outside = [byte; OUTSIDE];
    let (run, columns) = (shape.in_c / shape.groups, shape.out_c / shape.groups);
    let source = Taps {
        data: input.data.as_ptr().wrapping_sub(first_row * shape.in_w * input.stride),
        outside: outside.as_ptr(),
        pixel_stride: input.stride,
        h: shape.in_h,
        w: shape.in_w,
        out_w: shape.out_w,
        first_out_row: rows.start,
        kernel: shape.kernel,
        stride: shape.stride,
        dilation: shape.dilation,
        pads: [shape.pads[0], shape.pads[1]],
        run,
        padded: true,
    };
    if shape.is_depthwise() {
        return depthwise::depthwise(pool, shape, &source, input.signed, zero, &weights, &sink, rows);
    }
    let (runs, run_len) = runs_of(shape);
    let len = packed_len_runs(runs, run_len, columns);
    // One pixel is one row.
    if shape.is_pointwise() {
        let first = input.data.as_ptr().wrapping_add((rows.start - first_row) * shape.in_w * input.stride);
        let product = Product {
            source: Strided { data: first, stride: input.stride, k: run },
            gather: false,
            signed: input.signed,
            zero,
            rows: pixels,
            columns,
            packed: weights.packed.as_ptr(),
            sums: weights.sums,
            weight_zeros: weights.zeros,
            sink,
        };
        return product.run(pool);
    }
    for group in 0..shape.groups {
        let first = group * columns;
        Product {
            source: Taps { data: source.data.wrapping_add(group * run), ..source },
            gather: gathers(shape),
            signed: input.signed,
            zero,
            rows: pixels,
            columns,
            packed: weights.packed[group * len..].as_ptr(),
            sums: &weights.sums[first..],
            weight_zeros: weights.zeros.map(|z| &z[first..]),
            sink: sink.columns_from(first),
        }
        .run(pool);
    }
}

#[cfg(test)]
mod tests;
