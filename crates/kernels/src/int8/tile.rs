//! The register tile of bytes.

use super::PANEL;
use crate::arch::{ByteKernel, Bytes};

#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// `[segments][rows]`
    pub(super) pointers: *const *const u8,
    pub(super) segments: usize,
    /// Bytes per segment.
    pub(super) len: usize,
    /// Turns signed bytes into unsigned ones by exclusive or.
    pub(super) flip: u32,
    pub(super) w: *const i8,
    pub(super) w_stride: usize,
    /// `[rows][PANEL]`
    pub(super) sums: *mut i32,
    pub(super) resume: bool,
}

struct Micro<'a, const ROWS: usize, const VECTORS: usize>(&'a Tile);

impl<const ROWS: usize, const VECTORS: usize> ByteKernel for Micro<'_, ROWS, VECTORS> {
    #[inline(always)]
    fn run<T: Bytes>(self, b: T) {
        let t = self.0;
        // SAFETY: who builds the tile vouches for its pointers: `ROWS` rows of `len` bytes per segment, weights
        // for `segments * ceil(len / 4)` groups, and `ROWS` rows of sums.
        unsafe {
            let mut sums = [[b.zero(); VECTORS]; ROWS];
            if t.resume {
                for r in 0..ROWS {
                    for v in 0..VECTORS {
                        sums[r][v] = b.load(t.sums.add(r * PANEL + v * T::LANES));
                    }
                }
            }
            let mut w = t.w;
            for segment in 0..t.segments {
                let p: [*const u8; ROWS] = std::array::from_fn(|r| *t.pointers.add(segment * ROWS + r));
                let whole = t.len / 4 * 4;
                let mut k = 0;
                while k < whole {
                    let weights: [T::W; VECTORS] =
                        std::array::from_fn(|v| b.weights(w.add(v * T::LANES * 4)));
                    for r in 0..ROWS {
                        let a = b.repeat(p[r].add(k).cast::<u32>().read_unaligned() ^ t.flip);
                        for v in 0..VECTORS {
                            sums[r][v] = b.dot(sums[r][v], a, weights[v]);
                        }
                    }
                    w = w.add(t.w_stride);
                    k += 4;
                }
                if k < t.len {
                    let weights: [T::W; VECTORS] =
                        std::array::from_fn(|v| b.weights(w.add(v * T::LANES * 4)));
                    for r in 0..ROWS {
                        // The weights past the end are zero, so any bytes would do; none past the end are read.
                        let mut quad = 0;
                        for i in k..t.len {
                            quad |= u32::from(*p[r].add(i)) << (8 * (i - k));
                        }
                        let a = b.repeat(quad ^ t.flip);
                        for v in 0..VECTORS {
                            sums[r][v] = b.dot(sums[r][v], a, weights[v]);
                        }
                    }
                    w = w.add(t.w_stride);
                }
            }
            for r in 0..ROWS {
                for v in 0..VECTORS {
                    b.store(t.sums.add(r * PANEL + v * T::LANES), sums[r][v]);
                }
            }
        }
    }
}

/// The tallest tile of `vectors` vectors that is at most `rows` high.
#[inline(always)]
pub(super) fn tile_rows<T: Bytes>(vectors: usize, rows: usize) -> usize {
    match rows.min(T::TILE_ROWS[vectors - 1]) {
        12.. => 12,
        8.. => 8,
        6.. => 6,
        4.. => 4,
        limit => limit,
    }
}

/// Computes a tile of the given size, which [`tile_rows`] chose.
#[inline(always)]
pub(super) fn run_tile<T: Bytes>(b: T, rows: usize, vectors: usize, tile: &Tile) {
    macro_rules! sizes {
        ($($r:literal x $v:literal),*) => {
            match (rows, vectors) {
                $(($r, $v) if const { $v <= T::TILE_VECTORS && $r <= T::TILE_ROWS[$v - 1] } => {
                    b.vectorize(Micro::<$r, $v>(tile));
                })*
                _ => unreachable!("no tile of {rows} rows by {vectors} vectors"),
            }
        };
    }
    sizes!(
        6 x 4, 4 x 4, 3 x 4, 2 x 4, 1 x 4, 8 x 3, 6 x 3, 4 x 3, 3 x 3, 2 x 3, 1 x 3, 12 x 2, 8 x 2, 6 x 2, 4 x 2,
        3 x 2, 2 x 2, 1 x 2, 12 x 1, 8 x 1, 6 x 1, 4 x 1, 3 x 1, 2 x 1, 1 x 1
    )
}
