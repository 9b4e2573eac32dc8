//! Products `A' B` of two matrices whose rows are long ago in time or many in number: the gradient of a weight.
//!
//! C is cut into blocks of rows and columns; one task computes one block over all of K, or over a fixed part of K when
//! there are few blocks. Pieces of A and B are copied to scratch that stays in the second-level cache. Which pieces there
//! are follows from the shape alone, so the bits do not depend on the number of threads.

use crate::arch::{Kernel, Simd, dispatch};
use crate::gemm::tile::tile_rows;
use crate::threads::{Shareable, ThreadPool};
use std::ops::Range;

/// Most rows of C per task.
const ROW_BLOCK: usize = 192;
/// Values of a piece of B.
const PIECE: usize = 36 << 10;
/// Rows of A that lie closer than this are read where they are.
const NEAR: usize = 192;
/// Tasks that keep a few cores busy.
const TASKS: usize = 16;

/// The columns of B in blocks.
pub(super) trait Columns: Sync {
    /// Blocks.
    fn blocks(&self) -> usize;
    /// Columns of a block.
    fn width(&self, block: usize) -> usize;
    /// Where a block's rows lie already: pointer to row `row` and distance of rows.
    fn in_place(&self, _batch: usize, _block: usize, _row: usize) -> Option<(*const f32, usize)> {
        None
    }
    /// Writes rows `rows` of a block to `out`, `stride` apart.
    ///
    /// # Safety
    /// `out` is valid for writing `rows.len() * stride` values; `stride` is at least the width.
    unsafe fn fill<S: Simd>(
        &self,
        s: S,
        batch: usize,
        block: usize,
        rows: Range<usize>,
        out: *mut f32,
        stride: usize,
    );
}

/// A plain matrix `[k, n]` per batch entry.
pub(super) struct Plain {
    pub(super) data: *const f32,
    pub(super) batch_stride: usize,
    pub(super) row_stride: usize,
    pub(super) n: usize,
}

// SAFETY: the data is only read.
unsafe impl Sync for Plain {}

const PLAIN_BLOCK: usize = 128;

impl Columns for Plain {
    fn blocks(&self) -> usize {
        self.n.div_ceil(PLAIN_BLOCK)
    }
    fn width(&self, block: usize) -> usize {
        PLAIN_BLOCK.min(self.n - block * PLAIN_BLOCK)
    }
    fn in_place(&self, batch: usize, block: usize, row: usize) -> Option<(*const f32, usize)> {
        let near = self.row_stride <= NEAR && self.width(block).is_multiple_of(16);
        near.then(|| {
            let at = batch * self.batch_stride + row * self.row_stride + block * PLAIN_BLOCK;
            (self.data.wrapping_add(at), self.row_stride)
        })
    }
    #[inline(always)]
    unsafe fn fill<S: Simd>(
        &self,
        _: S,
        batch: usize,
        block: usize,
        rows: Range<usize>,
        out: *mut f32,
        stride: usize,
    ) {
        let width = self.width(block);
        let from = self.data.wrapping_add(batch * self.batch_stride + block * PLAIN_BLOCK);
        for (i, row) in rows.enumerate() {
            // SAFETY: by contract; the row exists.
            unsafe {
                std::ptr::copy_nonoverlapping(from.add(row * self.row_stride), out.add(i * stride), width);
            }
        }
    }
}

/// The product: A is `[k, m]`, B is `[k, columns]`.
pub(super) struct Outer<'a, C> {
    pub(super) a: *const f32,
    pub(super) a_batch: usize,
    pub(super) a_stride: usize,
    pub(super) batch: usize,
    pub(super) m: usize,
    pub(super) k: usize,
    pub(super) columns: &'a C,
}

// SAFETY: A is only read.
unsafe impl<C: Sync> Sync for Outer<'_, C> {}

/// How an [`Outer`] is cut, and what scratch it takes.
#[derive(Clone, Copy, Debug)]
struct Cut {
    row_block: usize,
    row_blocks: usize,
    stride: usize,
    depth: usize,
    splits: usize,
    split_len: usize,
    tiles: usize,
}

impl Cut {
    fn of(batch: usize, m: usize, k: usize, blocks: usize, width: usize) -> Cut {
        let row_blocks = m.div_ceil(ROW_BLOCK).max(1);
        let row_block = if row_blocks == 1 { m } else { m.div_ceil(row_blocks).next_multiple_of(24) };
        let row_blocks = m.div_ceil(row_block.max(1)).max(1);
        let stride = width.next_multiple_of(16);
        let depth = (PIECE / stride.max(1)).clamp(32, 256).min(k.max(1));
        let tiles = batch * row_blocks * blocks;
        let wanted = if tiles >= TASKS / 2 { 1 } else { TASKS.div_ceil(tiles.max(1)) };
        let splits = wanted.min(k / (2 * depth)).max(1);
        let split_len = k.div_ceil(splits).next_multiple_of(depth);
        let splits = k.div_ceil(split_len.max(1)).max(1);
        Cut { row_block, row_blocks, stride, depth, splits, split_len, tiles }
    }

    fn worker_len(&self) -> usize {
        self.depth * self.stride + self.depth * self.row_block + self.tile_len()
    }

    fn tile_len(&self) -> usize {
        (self.row_block * self.stride).next_multiple_of(16)
    }

    fn scratch_len(&self, threads: usize) -> usize {
        let parts = if self.splits > 1 { self.splits * self.tiles * self.tile_len() } else { 0 };
        threads * self.worker_len() + parts
    }
}

/// Scratch of a product with `blocks` blocks of at most `width` columns.
pub(super) fn outer_scratch_len(
    batch: usize,
    m: usize,
    k: usize,
    blocks: usize,
    width: usize,
    threads: usize,
) -> usize {
    Cut::of(batch, m, k, blocks, width).scratch_len(threads)
}

/// As [`outer_scratch_len`] for a plain matrix of `n` columns.
pub(super) fn plain_scratch_len(batch: usize, m: usize, n: usize, k: usize, threads: usize) -> usize {
    outer_scratch_len(batch, m, k, n.div_ceil(PLAIN_BLOCK), PLAIN_BLOCK.min(n), threads)
}

impl<C: Columns> Outer<'_, C> {
    /// Computes all blocks; `sink(batch, rows, block, values, stride)` gets each once, on some thread, and may change it.
    pub(super) fn run(
        &self,
        pool: &ThreadPool,
        scratch: &mut [f32],
        sink: &(dyn Fn(usize, Range<usize>, usize, *mut f32, usize) + Sync),
    ) {
        let blocks = self.columns.blocks();
        if blocks == 0 || self.m == 0 || self.batch == 0 {
            return;
        }
        let width = (0..blocks.min(2)).map(|b| self.columns.width(b)).max().unwrap_or(0);
        let cut = Cut::of(self.batch, self.m, self.k, blocks, width);
        let need = cut.scratch_len(pool.threads());
        assert!(scratch.len() >= need, "scratch has {} values, {need} needed", scratch.len());
        let (worker_len, tile_len) = (cut.worker_len(), cut.tile_len());
        let base = Shareable(scratch.as_mut_ptr());
        let partials = pool.threads() * worker_len;
        let place = |tile: usize| {
            let (batch, rest) = (tile / (cut.row_blocks * blocks), tile % (cut.row_blocks * blocks));
            let (row, block) = (rest % cut.row_blocks, rest / cut.row_blocks);
            let rows = row * cut.row_block..self.m.min((row + 1) * cut.row_block);
            (batch, rows, block)
        };
        pool.parallel_for(cut.tiles * cut.splits, &|index, worker| {
            let (tile, split) = (index / cut.splits, index % cut.splits);
            let (batch, rows, block) = place(tile);
            let depth = split * cut.split_len..self.k.min((split + 1) * cut.split_len);
            let mine = base.get().wrapping_add(worker * worker_len);
            let pieces = mine.wrapping_add(tile_len);
            let c = if cut.splits == 1 { mine } else { base.get().wrapping_add(partials + index * tile_len) };
            dispatch(
                pool.isa(),
                Block { outer: self, cut, batch, rows: rows.clone(), block, depth, pieces, c },
            );
            if cut.splits == 1 {
                sink(batch, rows, block, c, cut.stride);
            }
        });
        if cut.splits == 1 {
            return;
        }
        pool.parallel_for(cut.tiles, &|tile, _| {
            let (batch, rows, block) = place(tile);
            let first = base.get().wrapping_add(partials + tile * cut.splits * tile_len);
            for split in 1..cut.splits {
                let other = first.wrapping_add(split * tile_len);
                dispatch(pool.isa(), Add { to: first, from: other, n: rows.len() * cut.stride });
            }
            sink(batch, rows, block, first, cut.stride);
        });
    }
}

/// `to += from`
struct Add {
    to: *mut f32,
    from: *const f32,
    n: usize,
}

impl Kernel for Add {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut i = 0;
        while i < self.n {
            let n = S::LANES.min(self.n - i);
            // SAFETY: who builds the kernel vouches for `n` values.
            unsafe {
                let sum = s.add(super::get(s, self.to.add(i), n), super::get(s, self.from.add(i), n));
                super::put(s, self.to.add(i), n, sum);
            }
            i += S::LANES;
        }
    }
}

struct Block<'a, 'b, C> {
    outer: &'a Outer<'b, C>,
    cut: Cut,
    batch: usize,
    rows: Range<usize>,
    block: usize,
    depth: Range<usize>,
    pieces: *mut f32,
    c: *mut f32,
}

impl<C: Columns> Kernel for Block<'_, '_, C> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Block { outer, cut, batch, rows, block, depth, pieces, c } = self;
        let m = rows.len();
        let width = outer.columns.width(block);
        let padded = width.next_multiple_of(16);
        let a_piece = pieces.wrapping_add(cut.depth * cut.stride);
        // SAFETY: `run` has checked that the scratch holds the pieces and the block; rows of A and B exist.
        unsafe {
            if depth.is_empty() {
                std::ptr::write_bytes(c, 0, m * cut.stride);
            }
            let mut k0 = depth.start;
            while k0 < depth.end {
                let len = cut.depth.min(depth.end - k0);
                let (b, b_stride) = match outer.columns.in_place(batch, block, k0) {
                    Some(there) => there,
                    None => {
                        outer.columns.fill(s, batch, block, k0..k0 + len, pieces, cut.stride);
                        (pieces.cast_const(), cut.stride)
                    }
                };
                let a = outer.a.wrapping_add(batch * outer.a_batch + k0 * outer.a_stride + rows.start);
                let (a, a_stride) = if outer.a_stride <= NEAR {
                    (a, outer.a_stride)
                } else {
                    for i in 0..len {
                        std::ptr::copy_nonoverlapping(a.add(i * outer.a_stride), a_piece.add(i * m), m);
                    }
                    (a_piece.cast_const(), m)
                };
                let tiles = Tiles {
                    a,
                    a_stride,
                    m,
                    k: len,
                    b,
                    b_stride,
                    padded,
                    c,
                    c_stride: cut.stride,
                    resume: k0 > depth.start,
                };
                tiles.run(s);
                k0 += len;
            }
        }
    }
}

/// `C = A' B` or `C += A' B` in register tiles: A is `[k, m]`, B is `[k, padded]` with `padded` a multiple of 16.
pub(super) struct Tiles {
    pub(super) a: *const f32,
    pub(super) a_stride: usize,
    pub(super) m: usize,
    pub(super) k: usize,
    pub(super) b: *const f32,
    pub(super) b_stride: usize,
    pub(super) padded: usize,
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    /// Adds to what is in C.
    pub(super) resume: bool,
}

impl Kernel for Tiles {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // Slices of equal width, so that no narrow one is left over.
        let all = self.padded / S::LANES;
        let even = all.div_ceil(all.div_ceil(S::TILE_VECTORS).max(1));
        let mut slice = 0;
        while slice < self.padded {
            let vectors = ((self.padded - slice) / S::LANES).min(even);
            let mut row = 0;
            while row < self.m {
                let height = tile_rows::<S>(vectors, self.m - row);
                let tile = ColumnTile {
                    a: self.a.wrapping_add(row),
                    a_stride: self.a_stride,
                    len: self.k,
                    b: self.b.wrapping_add(slice),
                    b_stride: self.b_stride,
                    c: self.c.wrapping_add(row * self.c_stride + slice),
                    c_stride: self.c_stride,
                    resume: self.resume,
                };
                run_tile(s, height, vectors, &tile);
                row += height;
            }
            slice += vectors * S::LANES;
        }
    }
}

/// A register tile of `A' B`: a column of A is broadcast value by value. Columns of B and C are padded.
#[derive(Clone, Copy)]
struct ColumnTile {
    a: *const f32,
    a_stride: usize,
    len: usize,
    b: *const f32,
    b_stride: usize,
    c: *mut f32,
    c_stride: usize,
    resume: bool,
}

struct Micro<'a, const ROWS: usize, const VECTORS: usize>(&'a ColumnTile);

impl<const ROWS: usize, const VECTORS: usize> Kernel for Micro<'_, ROWS, VECTORS> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let t = self.0;
        // SAFETY: who builds the tile vouches for its pointers.
        unsafe {
            let mut sums = [[s.splat(0.0); VECTORS]; ROWS];
            if t.resume {
                for r in 0..ROWS {
                    for v in 0..VECTORS {
                        sums[r][v] = s.load(t.c.add(r * t.c_stride + v * S::LANES));
                    }
                }
            }
            let (mut a, mut b) = (t.a, t.b);
            for _ in 0..t.len {
                let row: [S::F; VECTORS] = std::array::from_fn(|v| s.load(b.add(v * S::LANES)));
                for r in 0..ROWS {
                    let x = s.splat(*a.add(r));
                    for v in 0..VECTORS {
                        sums[r][v] = s.fma(x, row[v], sums[r][v]);
                    }
                }
                a = a.wrapping_add(t.a_stride);
                b = b.wrapping_add(t.b_stride);
            }
            for r in 0..ROWS {
                for v in 0..VECTORS {
                    s.store(t.c.add(r * t.c_stride + v * S::LANES), sums[r][v]);
                }
            }
        }
    }
}

#[inline(always)]
fn run_tile<S: Simd>(s: S, rows: usize, vectors: usize, tile: &ColumnTile) {
    macro_rules! sizes {
        ($($r:literal x $v:literal),*) => {
            match (rows, vectors) {
                $(($r, $v) if const { $v <= S::TILE_VECTORS && $r <= S::TILE_ROWS[$v - 1] } => {
                    s.vectorize(Micro::<$r, $v>(tile));
                })*
                _ => unreachable!("no tile of {rows} rows by {vectors} vectors"),
            }
        };
    }
    sizes!(
        6 x 4, 5 x 4, 4 x 4, 3 x 4, 2 x 4, 1 x 4, 8 x 3, 6 x 3, 4 x 3, 3 x 3, 2 x 3, 1 x 3, 12 x 2, 8 x 2, 6 x 2,
        4 x 2, 3 x 2, 2 x 2, 1 x 2, 12 x 1, 8 x 1, 6 x 1, 4 x 1, 3 x 1, 2 x 1, 1 x 1
    )
}
