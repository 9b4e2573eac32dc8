//! The register tile: a few rows of A times a slice of a weight panel.

use crate::arch::{Kernel, Simd};

/// Everything one tile needs. Rows of A are read in place through `pointers`.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    /// `[segments][rows]`: where each row's values for this segment start.
    pub(crate) pointers: *const *const f32,
    pub(crate) segments: usize,
    /// Values per segment.
    pub(crate) len: usize,
    /// `[segments * len]` rows of weights at distance `w_stride`.
    pub(crate) w: *const f32,
    pub(crate) w_stride: usize,
    pub(crate) c: *mut f32,
    pub(crate) c_stride: usize,
    /// Columns that exist; the tile may be wider.
    pub(crate) columns: usize,
    /// Start from the partial sums in `c` instead of zero.
    pub(crate) resume: bool,
    /// Apply bias, residual and clamp.
    pub(crate) finish: bool,
    /// Null for none.
    pub(crate) bias: *const f32,
    /// Null for none.
    pub(crate) residual: *const f32,
    pub(crate) residual_stride: usize,
    pub(crate) low: f32,
    pub(crate) high: f32,
}

/// `ROWS` rows by `VECTORS` vectors, accumulators in registers. Every output is the chain
/// `fma(a[k], w[k], sum)` over ascending `k`, whatever the tile.
struct Micro<'a, const ROWS: usize, const VECTORS: usize>(&'a Tile);

impl<const ROWS: usize, const VECTORS: usize> Kernel for Micro<'_, ROWS, VECTORS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let t = self.0;
        let full = t.columns >= VECTORS * S::LANES;
        let lanes = |v: usize| t.columns.saturating_sub(v * S::LANES).min(S::LANES);
        // SAFETY: who builds the tile vouches for its pointers: `ROWS` rows of `len` values per segment,
        // `segments * len` weight rows of `VECTORS` vectors (panels are padded to whole vectors), and `columns`
        // values per row in `c`, `bias` and `residual`.
        unsafe {
            let get = |p: *const f32, v: usize| {
                if full {
                    s.load(p.add(v * S::LANES))
                } else {
                    s.load_n(p.wrapping_add(v * S::LANES), lanes(v))
                }
            };
            let mut sums = [[s.splat(0.0); VECTORS]; ROWS];
            if t.resume {
                for r in 0..ROWS {
                    for v in 0..VECTORS {
                        sums[r][v] = get(t.c.add(r * t.c_stride), v);
                    }
                }
            }
            let mut w = t.w;
            for segment in 0..t.segments {
                let p: [*const f32; ROWS] = std::array::from_fn(|r| *t.pointers.add(segment * ROWS + r));
                for k in 0..t.len {
                    let weights: [S::F; VECTORS] = std::array::from_fn(|v| s.load(w.add(v * S::LANES)));
                    for r in 0..ROWS {
                        let a = s.splat(*p[r].add(k));
                        for v in 0..VECTORS {
                            sums[r][v] = s.fma(a, weights[v], sums[r][v]);
                        }
                    }
                    w = w.add(t.w_stride);
                }
            }
            if t.finish {
                if !t.bias.is_null() {
                    for v in 0..VECTORS {
                        let bias = get(t.bias, v);
                        for r in 0..ROWS {
                            sums[r][v] = s.add(sums[r][v], bias);
                        }
                    }
                }
                if !t.residual.is_null() {
                    for r in 0..ROWS {
                        for v in 0..VECTORS {
                            sums[r][v] = s.add(sums[r][v], get(t.residual.add(r * t.residual_stride), v));
                        }
                    }
                }
                let (low, high) = (s.splat(t.low), s.splat(t.high));
                for r in 0..ROWS {
                    for v in 0..VECTORS {
                        sums[r][v] = s.min(high, s.max(low, sums[r][v]));
                    }
                }
            }
            for r in 0..ROWS {
                let c = t.c.add(r * t.c_stride);
                for v in 0..VECTORS {
                    if full {
                        s.store(c.add(v * S::LANES), sums[r][v]);
                    } else {
                        s.store_n(c.wrapping_add(v * S::LANES), lanes(v), sums[r][v]);
                    }
                }
            }
        }
    }
}

/// The tallest tile of `vectors` vectors that is at most `rows` high.
#[inline(always)]
pub(crate) fn tile_rows<S: Simd>(vectors: usize, rows: usize) -> usize {
    let limit = rows.min(S::TILE_ROWS[vectors - 1]);
    match limit {
        12.. => 12,
        8.. => 8,
        6.. => 6,
        5 if vectors != 4 => 4,
        _ => limit,
    }
}

/// Computes a tile of the given size, which [`tile_rows`] chose.
#[inline(always)]
pub(crate) fn run_tile<S: Simd>(s: S, rows: usize, vectors: usize, tile: &Tile) {
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
