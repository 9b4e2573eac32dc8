//! Matrix products with packed weights, rows of A read in place.
//!
//! `C[m, n] = activation(sum over k of A[m, k] B[k, n] + bias[n] + residual[m, n])`. B lies in panels of
//! [`PANEL`] columns: panel `p` is `[K][width]`, `width = min(PANEL, N - p PANEL)` rounded up to [`GRAIN`], padded
//! with zeros; the layout does not depend on the instruction set.
//!
//! **Promise.** Each element of C is one chain of `fma` over ascending `k`, then bias, residual, activation.
//! Blocking over K stores partial sums and resumes from them, which is exact in f32; so the bits do not depend
//! on blocking, on the other rows of the call, or on the number of threads.

mod pack;
pub(crate) mod tile;

pub(crate) use pack::pack_with;
pub use pack::{pack_kn, pack_nk, packed_len};

use crate::arch::{Kernel, Simd, dispatch};
use crate::epilogue::{ActivateRows, Activation, Epilogue, check_rows};
use crate::threads::{Shareable, ThreadPool};
use std::ops::Range;
use tile::{Tile, run_tile, tile_rows};

/// Columns per panel.
pub(crate) const PANEL: usize = 64;
/// Panels are padded to a multiple of this many columns.
pub(crate) const GRAIN: usize = 16;
/// Values of K per block when several row tiles reuse the block: 256 KiB of weights.
const BLOCK_K: usize = 1024;
/// Most segments (kernel taps) per block, which bounds the pointer table.
const SEGMENTS: usize = 64;
const ROWS_MAX: usize = 12;
/// Values of A that a row block may hold before the next panel evicts them.
const BLOCK_A: usize = 96 << 10;
/// What a padding tap points to; longer runs are cut.
pub(crate) const ZEROS_LEN: usize = 2048;
static ZEROS: [f32; ZEROS_LEN] = [0.0; ZEROS_LEN];
/// Below this many multiply-adds a second thread costs more than it brings.
const PARALLEL_MIN: usize = 200_000;

/// A row of [`ZEROS_LEN`] zeros.
pub(crate) fn zeros() -> *const f32 {
    ZEROS.as_ptr()
}

/// Where the rows of A are: row `m` of A is `taps` segments of `run` contiguous values.
pub(crate) trait RowSource<T>: Sync {
    fn taps(&self) -> usize;
    fn run(&self) -> usize;
    /// Distinct values of A per output row, for the choice of block sizes.
    fn footprint(&self) -> usize;
    /// Whether segments may point to [`ZEROS`], so that they must not be longer.
    fn padded(&self) -> bool;
    /// Writes `out[t * rows + r]`, the start of row `row + r`, tap `tap + t`, at `offset` inside the run.
    ///
    /// # Safety
    /// `out` is valid for `taps * rows` pointers; rows and taps exist.
    unsafe fn pointers(
        &self,
        row: usize,
        rows: usize,
        tap: usize,
        taps: usize,
        offset: usize,
        out: *mut *const T,
    );
    /// Copies the rows `row..row + rows`, the runs of all taps beside each other, to `out`, `stride` apart.
    ///
    /// # Safety
    /// Rows exist, `stride` is at least the length of a row, and `out` is valid for writing `rows * stride` values; what
    /// stands for values outside an image has as many values as a row of a kernel.
    #[inline(always)]
    unsafe fn gather(&self, row: usize, rows: usize, out: *mut T, stride: usize) {
        for r in 0..rows {
            for tap in 0..self.taps() {
                let mut run = std::ptr::null();
                // SAFETY: by contract.
                unsafe {
                    self.pointers(row + r, 1, tap, 1, 0, &raw mut run);
                    let to = out.add(r * stride + tap * self.run());
                    std::ptr::copy_nonoverlapping(run, to, self.run());
                }
            }
        }
    }
}

/// Rows at a constant distance.
#[derive(Clone, Copy)]
pub(crate) struct Strided<T> {
    pub(crate) data: *const T,
    pub(crate) stride: usize,
    pub(crate) k: usize,
}

// SAFETY: the data is only read.
unsafe impl<T: Sync> Sync for Strided<T> {}

impl<T: Sync> RowSource<T> for Strided<T> {
    fn taps(&self) -> usize {
        1
    }
    fn run(&self) -> usize {
        self.k
    }
    fn footprint(&self) -> usize {
        self.k
    }
    fn padded(&self) -> bool {
        false
    }
    #[inline(always)]
    unsafe fn pointers(
        &self,
        row: usize,
        rows: usize,
        _: usize,
        _: usize,
        offset: usize,
        out: *mut *const T,
    ) {
        for r in 0..rows {
            // SAFETY: the caller vouches for the rows and for `out`.
            unsafe { *out.add(r) = self.data.add((row + r) * self.stride + offset) }
        }
    }
}

/// Where the weights are.
#[derive(Clone, Copy)]
pub(crate) struct Panels {
    pub(crate) data: *const f32,
    /// 0 for packed panels; else the row distance of a plain `[K][N]` matrix with `N` a multiple of [`GRAIN`].
    pub(crate) plain_stride: usize,
}

// SAFETY: the data is only read.
unsafe impl Sync for Panels {}

/// One product; pointers are vouched for by the function that builds it.
pub(crate) struct Product<R> {
    pub(crate) source: R,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) panels: Panels,
    pub(crate) c: Shareable<f32>,
    pub(crate) c_stride: usize,
    pub(crate) bias: *const f32,
    pub(crate) residual: *const f32,
    pub(crate) residual_stride: usize,
    pub(crate) activation: Activation,
}

// SAFETY: `bias` and `residual` are only read; tasks write disjoint parts of `c`.
unsafe impl<R: RowSource<f32>> Sync for Product<R> {}

impl<R: RowSource<f32>> Product<R> {
    /// Shares the product out over the pool; the slices behind the pointers must outlive the call.
    pub(crate) fn run(&self, pool: &ThreadPool) {
        let (row_step, panel_step) = self.partition(pool.threads());
        let panels = self.columns.div_ceil(PANEL);
        let (row_tasks, panel_tasks) = (self.rows.div_ceil(row_step), panels.div_ceil(panel_step));
        pool.parallel_for(row_tasks * panel_tasks, &|index, _| {
            let (r, p) = (index / panel_tasks, index % panel_tasks);
            let rows = r * row_step..self.rows.min((r + 1) * row_step);
            let panels = p * panel_step..panels.min((p + 1) * panel_step);
            self.run_part(pool, rows, panels);
        });
    }

    pub(crate) fn run_part(&self, pool: &ThreadPool, rows: Range<usize>, panels: Range<usize>) {
        dispatch(pool.isa(), Part { product: self, rows, panels });
    }

    /// Rows and panels per task.
    pub(crate) fn partition(&self, threads: usize) -> (usize, usize) {
        let panels = self.columns.div_ceil(PANEL).max(1);
        let rows = self.rows.max(1);
        let work = rows * self.columns * self.source.taps() * self.source.run();
        if threads == 1 || work < PARALLEL_MIN {
            return (rows, panels);
        }
        // Four tasks per thread even out unequal cores; a task has at least some 20 microseconds of work.
        let tasks = (threads * 4).min(work / (PARALLEL_MIN / 4)).max(threads);
        if rows >= tasks * 24 {
            return (rows.div_ceil(tasks).next_multiple_of(12), panels);
        }
        if panels >= tasks {
            return (rows, panels.div_ceil(tasks));
        }
        let row_tasks = tasks.div_ceil(panels);
        (rows.div_ceil(row_tasks).next_multiple_of(6), 1)
    }
}

struct Part<'a, R> {
    product: &'a Product<R>,
    rows: Range<usize>,
    panels: Range<usize>,
}

impl<R: RowSource<f32>> Kernel for Part<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let p = self.product;
        let (taps, run) = (p.source.taps(), p.source.run());
        let k = taps * run;
        let reuse = self.rows.len() > 2 * ROWS_MAX;
        // A block is a group of whole taps or a piece of one.
        let (group, piece) = if taps == 1 || run > BLOCK_K {
            let limit = match (reuse, p.source.padded()) {
                (true, _) => BLOCK_K,
                (false, true) => ZEROS_LEN,
                (false, false) => usize::MAX,
            };
            // A little above the limit is better than two halves.
            let pieces =
                if run <= limit.saturating_add(limit / 4).min(ZEROS_LEN) { 1 } else { run.div_ceil(limit) };
            (1, run.div_ceil(pieces).max(1))
        } else {
            let most = (BLOCK_K / run.max(1)).clamp(1, SEGMENTS);
            (taps.div_ceil(taps.div_ceil(most).max(1)), run)
        };
        let row_block = if self.panels.len() == 1 {
            self.rows.len()
        } else {
            (BLOCK_A / p.source.footprint().max(1)).clamp(4 * ROWS_MAX, 1 << 20)
        };
        let (low, high, second_pass) = p.activation.split();
        let mut pointers = [std::ptr::null::<f32>(); SEGMENTS * ROWS_MAX];
        let mut row0 = self.rows.start;
        while row0 < self.rows.end {
            let row1 = self.rows.end.min(row0 + row_block);
            for panel in self.panels.clone() {
                let column0 = panel * PANEL;
                let columns = PANEL.min(p.columns - column0);
                let width = columns.next_multiple_of(GRAIN);
                let (w, w_stride) = if p.panels.plain_stride == 0 {
                    (p.panels.data.wrapping_add(column0 * k), width)
                } else {
                    (p.panels.data.wrapping_add(column0), p.panels.plain_stride)
                };
                let (mut tap, mut offset) = (0, 0);
                loop {
                    let segments = group.min(taps - tap);
                    let len = piece.min(run - offset);
                    let k0 = tap * run + offset;
                    let (resume, finish) = (k0 > 0, k0 + segments * len >= k);
                    let mut slice = 0;
                    while slice < width {
                        let vectors = ((width - slice) / S::LANES).min(S::TILE_VECTORS);
                        let mut row = row0;
                        while row < row1 {
                            let rows = tile_rows::<S>(vectors, row1 - row);
                            let column = column0 + slice;
                            let at = |base: *const f32, offset: usize| {
                                if base.is_null() { base } else { base.wrapping_add(offset) }
                            };
                            // SAFETY: the table holds `SEGMENTS * ROWS_MAX` pointers; rows and taps exist.
                            unsafe {
                                p.source.pointers(row, rows, tap, segments, offset, pointers.as_mut_ptr());
                            }
                            let tile = Tile {
                                pointers: pointers.as_ptr(),
                                segments,
                                len,
                                w: w.wrapping_add(k0 * w_stride + slice),
                                w_stride,
                                c: p.c.get().wrapping_add(row * p.c_stride + column),
                                c_stride: p.c_stride,
                                columns: (columns - slice.min(columns)).min(vectors * S::LANES),
                                resume,
                                finish,
                                bias: at(p.bias, column),
                                residual: at(p.residual, row * p.residual_stride + column),
                                residual_stride: p.residual_stride,
                                low,
                                high,
                            };
                            run_tile(s, rows, vectors, &tile);
                            if finish && second_pass {
                                s.vectorize(ActivateRows {
                                    activation: p.activation,
                                    data: tile.c,
                                    rows,
                                    n: tile.columns,
                                    stride: p.c_stride,
                                });
                            }
                            row += rows;
                        }
                        slice += vectors * S::LANES;
                    }
                    if finish {
                        break;
                    }
                    offset += len;
                    if offset >= run {
                        offset = 0;
                        tap += segments;
                    }
                }
            }
            row0 = row1;
        }
    }
}

/// `C = epilogue(A B)`: A is `[m, k]` with row distance `a_stride`, `packed` is B from [`pack_kn`] or
/// [`pack_nk`], C is `[m, n]` with row distance `c_stride`.
///
/// # Panics
/// Panics when a slice is too short for its shape.
pub fn gemm(
    pool: &ThreadPool,
    m: usize,
    n: usize,
    k: usize,
    a: &[f32],
    a_stride: usize,
    packed: &[f32],
    c: &mut [f32],
    c_stride: usize,
    epilogue: &Epilogue<'_>,
) {
    check_rows("A", a.len(), m, k, a_stride);
    check_rows("C", c.len(), m, n, c_stride);
    assert!(
        packed.len() >= packed_len(k, n),
        "packed B has {} values, {} needed",
        packed.len(),
        packed_len(k, n)
    );
    epilogue.check(m, n);
    Product {
        source: Strided { data: a.as_ptr(), stride: a_stride, k },
        rows: m,
        columns: n,
        panels: Panels { data: packed.as_ptr(), plain_stride: 0 },
        c: Shareable(c.as_mut_ptr()),
        c_stride,
        bias: epilogue.bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
        residual: epilogue.residual.map_or(std::ptr::null(), |r| r.data.as_ptr()),
        residual_stride: epilogue.residual.map_or(0, |r| r.stride),
        activation: epilogue.activation,
    }
    .run(pool);
}

#[cfg(test)]
pub(crate) mod tests;
