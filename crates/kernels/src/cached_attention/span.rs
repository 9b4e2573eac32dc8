//! The computation of one span of positions for the query vectors that share its keys and values.

use super::{CacheFormat, CachedAttentionShape, SPAN, STRIP};
use crate::arch::{Kernel, Simd};
use crate::math;

/// Positions side by side in decoded keys: a row of each panel.
const PANEL: usize = 64;

/// One span of consecutive rows of one sequence, for the query heads that share `kv_head`. A *lane* is one such query
/// vector; those of one row are neighbours.
pub(super) struct Span<'a> {
    pub(super) shape: &'a CachedAttentionShape,
    pub(super) k_cache: &'a [u8],
    pub(super) v_cache: &'a [u8],
    /// Pages of the sequence.
    pub(super) table: &'a [i32],
    pub(super) kv_head: usize,
    pub(super) span: usize,
    /// Position of the first row.
    pub(super) position: usize,
    pub(super) rows: usize,
    /// `[rows, heads · key_dim]`
    pub(super) q: &'a [f32],
    /// Room for the decoded keys, `[SPAN / PANEL, key_dim, PANEL]`.
    pub(super) keys: &'a mut [f32],
    /// Room for the decoded values, `[SPAN, value_dim]`.
    pub(super) values: &'a mut [f32],
    /// Room for the scores, `[lanes, SPAN]`.
    pub(super) scores: &'a mut [f32],
    /// For each lane the weighted sum of values, the maximum of the scores and the sum of the weights.
    pub(super) out: *mut f32,
    pub(super) row_stride: usize,
    pub(super) head_stride: usize,
}

impl Kernel for Span<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let seen = self.all_seen();
        self.decode_keys(s, seen.0, seen.1);
        if S::LANES == 16 {
            self.scores::<S, 4>(s)
        } else {
            self.scores::<S, 2>(s)
        };
        self.softmax(s);
        self.decode_values(s, seen.0, seen.1);
        if S::LANES == 16 {
            self.weigh::<S, 4>(s)
        } else {
            self.weigh::<S, 2>(s)
        };
    }
}

impl Span<'_> {
    /// Which positions of the span the row sees; the second is not above the first if none.
    #[inline(always)]
    fn seen(&self, row: usize) -> (usize, usize) {
        let position = self.position + row;
        let first = self.span * SPAN;
        let from = self.shape.first_seen(position).saturating_sub(first);
        (from, (position + 1).saturating_sub(first).min(SPAN))
    }

    /// Which positions of the span some row sees. Rows have consecutive positions, so there is no hole.
    #[inline(always)]
    fn all_seen(&self) -> (usize, usize) {
        (self.seen(0).0, self.seen(self.rows - 1).1)
    }

    /// The row of a lane.
    #[inline(always)]
    fn row(&self, lane: usize) -> usize {
        lane / self.shape.group()
    }

    #[inline(always)]
    fn out(&self, lane: usize) -> *mut f32 {
        let group = self.shape.group();
        self.out.wrapping_add(lane / group * self.row_stride + lane % group * self.head_stride)
    }

    /// The bytes of the 16 positions from `at` of the span on, in either cache.
    #[inline(always)]
    fn strip<'a>(&self, cache: &'a [u8], dim: usize, at: usize) -> &'a [u8] {
        let CachedAttentionShape { kv_heads, page_len, format, .. } = *self.shape;
        let position = self.span * SPAN + at;
        let row_bytes = format.row_bytes(dim);
        let page = self.table[position / page_len] as usize;
        let row = (page * kv_heads + self.kv_head) * page_len + position % page_len;
        &cache[row * row_bytes..(row + STRIP) * row_bytes]
    }

    #[inline(always)]
    fn decode_keys<S: Simd>(&mut self, s: S, from: usize, to: usize) {
        let dim = self.shape.key_dim;
        for at in (from / STRIP * STRIP..to).step_by(STRIP) {
            let bytes = self.strip(self.k_cache, dim, at);
            let panel = &mut self.keys[at / PANEL * PANEL * dim..][..PANEL * dim];
            let (p, to) = (bytes.as_ptr(), panel.as_mut_ptr());
            for lane in (0..STRIP).step_by(S::LANES) {
                // SAFETY: the strip has `dim` rows of 16 elements, for Q8 whole blocks of 32 of them with 16 scales
                // before; the panel has `dim` rows, of which 16 elements lie at the place of this strip.
                unsafe {
                    let to = to.add(at % PANEL + lane);
                    match self.shape.format {
                        CacheFormat::F32 => {
                            for d in 0..dim {
                                s.store(to.add(d * PANEL), s.load(p.add((d * STRIP + lane) * 4).cast()));
                            }
                        }
                        CacheFormat::F16 => {
                            for d in 0..dim {
                                s.store(to.add(d * PANEL), s.load_f16(p.add((d * STRIP + lane) * 2).cast()));
                            }
                        }
                        CacheFormat::Q8 => {
                            for block in (0..dim).step_by(32) {
                                let p = p.add(block / 32 * 34 * STRIP);
                                let scale = s.load_f16(p.add(lane * 2).cast());
                                let codes = p.add(2 * STRIP + lane);
                                for d in 0..32.min(dim - block) {
                                    let code = s.load_i8(codes.add(d * STRIP).cast());
                                    s.store(to.add((block + d) * PANEL), s.mul(code, scale));
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn decode_values<S: Simd>(&mut self, s: S, from: usize, to: usize) {
        let (dim, format) = (self.shape.value_dim, self.shape.format);
        let row_bytes = format.row_bytes(dim);
        for at in from..to {
            let strip = self.strip(self.v_cache, dim, at / STRIP * STRIP);
            let bytes = &strip[at % STRIP * row_bytes..][..row_bytes];
            let row = &mut self.values[at * dim..][..dim];
            let (p, to) = (bytes.as_ptr(), row.as_mut_ptr());
            let mut d = 0;
            // SAFETY: the row has `dim` elements, for Q8 in blocks of 32 behind a scale; vectors stay within them.
            unsafe {
                match format {
                    CacheFormat::F32 => std::ptr::copy_nonoverlapping(p, to.cast::<u8>(), row_bytes),
                    CacheFormat::F16 => {
                        while d + S::LANES <= dim {
                            s.store(to.add(d), s.load_f16(p.add(2 * d).cast()));
                            d += S::LANES;
                        }
                        if d < dim {
                            let mut rest = [0u16; 16];
                            std::ptr::copy_nonoverlapping(
                                p.add(2 * d),
                                rest.as_mut_ptr().cast(),
                                2 * (dim - d),
                            );
                            s.store_n(to.add(d), dim - d, s.load_f16(rest.as_ptr()));
                        }
                    }
                    CacheFormat::Q8 => {
                        for block in (0..dim).step_by(32) {
                            let p = p.add(block / 32 * 34);
                            let bits = u16::from_le_bytes([*p, *p.add(1)]);
                            let scale = s.splat(crate::blocks::half_to_f32(bits));
                            for d in (0..32.min(dim - block)).step_by(S::LANES) {
                                let value = s.mul(s.load_i8(p.add(2 + d).cast()), scale);
                                s.store_n(to.add(block + d), S::LANES.min(dim - block - d), value);
                            }
                        }
                    }
                }
            }
        }
    }

    /// Products of all lanes with all keys that some lane of four sees; each is summed from the first element to the
    /// last.
    #[inline(always)]
    fn scores<S: Simd, const C: usize>(&mut self, s: S) {
        let lanes = self.rows * self.shape.group();
        let width = C * S::LANES;
        for at in (0..SPAN).step_by(width) {
            let mut lane = 0;
            while lane < lanes {
                let count = if lane + 4 <= lanes { 4 } else { if lane + 2 <= lanes { 2 } else { 1 } };
                let (from, to) = (self.seen(self.row(lane)).0, self.seen(self.row(lane + count - 1)).1);
                if from < at + width && at < to {
                    match count {
                        4 => self.score_tile::<S, 4, C>(s, lane, at),
                        2 => self.score_tile::<S, 2, C>(s, lane, at),
                        _ => self.score_tile::<S, 1, C>(s, lane, at),
                    }
                }
                lane += count;
            }
        }
    }

    #[inline(always)]
    fn score_tile<S: Simd, const R: usize, const C: usize>(&mut self, s: S, lane: usize, at: usize) {
        let dim = self.shape.key_dim;
        let group = self.shape.group();
        let mut q = [std::ptr::null(); R];
        for r in 0..R {
            let head = (lane + r) / group * self.shape.heads + self.kv_head * group + (lane + r) % group;
            q[r] = self.q[head * dim..][..dim].as_ptr();
        }
        let keys = self.keys[at / PANEL * PANEL * dim..][..PANEL * dim].as_ptr();
        let scores = self.scores[lane * SPAN..][..R * SPAN].as_mut_ptr();
        // SAFETY: each q has `dim` elements, the panel `dim` rows of `PANEL`; `at` is a multiple of the columns, whose
        // number divides `PANEL`.
        unsafe {
            let mut keys = keys.add(at % PANEL);
            let mut acc = [[s.splat(0.0); C]; R];
            for d in 0..dim {
                let mut k = [s.splat(0.0); C];
                for c in 0..C {
                    k[c] = s.load(keys.add(c * S::LANES));
                }
                for r in 0..R {
                    let q = s.splat(*q[r].add(d));
                    for c in 0..C {
                        acc[r][c] = s.fma(q, k[c], acc[r][c]);
                    }
                }
                keys = keys.add(PANEL);
            }
            for r in 0..R {
                for c in 0..C {
                    s.store(scores.add(r * SPAN + at + c * S::LANES), acc[r][c]);
                }
            }
        }
    }

    /// Turns scores into weights, relative to the largest score of the lane in this span.
    #[inline(always)]
    fn softmax<S: Simd>(&mut self, s: S) {
        let CachedAttentionShape { value_dim, scale, softcap, .. } = *self.shape;
        for lane in 0..self.rows * self.shape.group() {
            let (from, to) = self.seen(self.row(lane));
            if from >= to {
                continue;
            }
            // Whole groups of 16, so that every position has its lane in the sum for any width of vectors.
            let (first, end) = (from / 16 * 16, to.next_multiple_of(16));
            let out = self.out(lane);
            let row = &mut self.scores[lane * SPAN..][..SPAN];
            let p = row.as_mut_ptr();
            // SAFETY: `first` and `end` are multiples of 16 within the row, of which vectors are a whole part; `out`
            // has room for a partial result.
            unsafe {
                for i in (first..end).step_by(S::LANES) {
                    let mut v = s.mul(s.load(p.add(i)), s.splat(scale));
                    if let Some(cap) = softcap {
                        v = s.mul(math::tanh(s, s.div(v, s.splat(cap))), s.splat(cap));
                    }
                    s.store(p.add(i), v);
                }
                for i in (first..from).chain(to..end) {
                    *p.add(i) = f32::NEG_INFINITY;
                }
                let mut top = s.splat(f32::NEG_INFINITY);
                for i in (first..end).step_by(S::LANES) {
                    top = s.max(s.load(p.add(i)), top);
                }
                let maximum = s.maximum(top);
                for i in (first..end).step_by(S::LANES) {
                    s.store(p.add(i), math::exp(s, s.sub(s.load(p.add(i)), s.splat(maximum))));
                }
                for i in (first..from).chain(to..end) {
                    *p.add(i) = 0.0;
                }
                let mut sums = [0f32; 16];
                for half in (0..16).step_by(S::LANES) {
                    let mut sum = s.splat(0.0);
                    for i in (first + half..end).step_by(16) {
                        sum = s.add(sum, s.load(p.add(i)));
                    }
                    s.store(sums.as_mut_ptr().add(half), sum);
                }
                for width in [8, 4, 2, 1] {
                    for i in 0..width {
                        sums[i] += sums[i + width];
                    }
                }
                *out.add(value_dim) = maximum;
                *out.add(value_dim + 1) = sums[0];
            }
        }
    }

    /// Sums of values by the weights of each lane, from the first position that its row sees to the last.
    #[inline(always)]
    fn weigh<S: Simd, const C: usize>(&mut self, s: S) {
        let lanes = self.rows * self.shape.group();
        let mut lane = 0;
        while lane < lanes {
            let count = if lane + 4 <= lanes { 4 } else { if lane + 2 <= lanes { 2 } else { 1 } };
            match count {
                4 => self.weigh_tile::<S, 4, C>(s, lane),
                2 => self.weigh_tile::<S, 2, C>(s, lane),
                _ => self.weigh_tile::<S, 1, C>(s, lane),
            }
            lane += count;
        }
    }

    #[inline(always)]
    fn weigh_tile<S: Simd, const R: usize, const C: usize>(&mut self, s: S, lane: usize) {
        // Rows lie in the order of their positions, so the last starts last and the first ends first.
        let common = (self.seen(self.row(lane + R - 1)).0, self.seen(self.row(lane)).1);
        if common.0 >= common.1 {
            for r in 0..R {
                let (from, to) = self.seen(self.row(lane + r));
                self.add_values::<S, 1, C>(s, lane + r, from, to, true);
            }
            return;
        }
        // What only some rows see is never multiplied for the others, not even by zero, for it might be no number.
        let ragged = (0..R).any(|r| self.seen(self.row(lane + r)).0 < common.0);
        if ragged {
            for r in 0..R {
                let (from, _) = self.seen(self.row(lane + r));
                self.add_values::<S, 1, C>(s, lane + r, from, common.0, true);
            }
        }
        self.add_values::<S, R, C>(s, lane, common.0, common.1, !ragged);
        for r in 0..R {
            let (_, to) = self.seen(self.row(lane + r));
            if to > common.1 {
                self.add_values::<S, 1, C>(s, lane + r, common.1, to, false);
            }
        }
    }

    /// Adds the positions `from..to` to the sums of `R` lanes, which start from zero if `fresh`.
    #[inline(always)]
    fn add_values<S: Simd, const R: usize, const C: usize>(
        &mut self,
        s: S,
        lane: usize,
        from: usize,
        to: usize,
        fresh: bool,
    ) {
        // A row that sees nothing of this span has no partial result.
        if from > to {
            return;
        }
        let dim = self.shape.value_dim;
        let mut d = 0;
        while d + C * S::LANES <= dim {
            self.add_columns::<S, R, C>(s, lane, from, to, fresh, d, S::LANES);
            d += C * S::LANES;
        }
        while d < dim {
            self.add_columns::<S, R, 1>(s, lane, from, to, fresh, d, S::LANES.min(dim - d));
            d += S::LANES;
        }
    }

    #[inline(always)]
    fn add_columns<S: Simd, const R: usize, const C: usize>(
        &mut self,
        s: S,
        lane: usize,
        from: usize,
        to: usize,
        fresh: bool,
        d: usize,
        width: usize,
    ) {
        let dim = self.shape.value_dim;
        let weights = self.scores[lane * SPAN..][..R * SPAN].as_ptr();
        let values = self.values[..to * dim].as_ptr();
        // SAFETY: positions stay below `SPAN`, columns below `dim`: `width` is that of a vector unless it is the last;
        // `out` has room for the sums of each lane.
        unsafe {
            let mut acc = [[s.splat(0.0); C]; R];
            if !fresh {
                for r in 0..R {
                    for c in 0..C {
                        acc[r][c] = s.load_n(self.out(lane + r).add(d + c * S::LANES), width);
                    }
                }
            }
            for at in from..to {
                let row = values.add(at * dim + d);
                let mut v = [s.splat(0.0); C];
                for c in 0..C {
                    v[c] =
                        if width == S::LANES { s.load(row.add(c * S::LANES)) } else { s.load_n(row, width) };
                }
                for r in 0..R {
                    let weight = s.splat(*weights.add(r * SPAN + at));
                    for c in 0..C {
                        acc[r][c] = s.fma(weight, v[c], acc[r][c]);
                    }
                }
            }
            for r in 0..R {
                for c in 0..C {
                    s.store_n(self.out(lane + r).add(d + c * S::LANES), width, acc[r][c]);
                }
            }
        }
    }
}

/// `e^x` of one number, by the same operations as for many.
#[inline(always)]
fn exp<S: Simd>(s: S, x: f32) -> f32 {
    let mut y = 0.0;
    // SAFETY: one value is written.
    unsafe { s.store_n(&raw mut y, 1, math::exp(s, s.splat(x))) };
    y
}

/// Adds the partial result `from` to `into`.
pub(super) struct Merge {
    pub(super) value_dim: usize,
    pub(super) into: *mut f32,
    pub(super) from: *const f32,
}

impl Kernel for Merge {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Merge { value_dim: n, into, from } = self;
        // SAFETY: who builds the kernel vouches for two partial results, each of `n + 2` values.
        unsafe {
            let (a, b) = (*into.add(n), *from.add(n));
            let maximum = a.max(b);
            let (a, b) = (exp(s, a - maximum), exp(s, b - maximum));
            *into.add(n) = maximum;
            *into.add(n + 1) = *into.add(n + 1) * a + *from.add(n + 1) * b;
            for d in (0..n).step_by(S::LANES) {
                let width = S::LANES.min(n - d);
                let (x, y) = (s.load_n(into.add(d), width), s.load_n(from.add(d), width));
                s.store_n(into.add(d), width, s.add(s.mul(x, s.splat(a)), s.mul(y, s.splat(b))));
            }
        }
    }
}

/// Divides the sum of values by that of weights.
pub(super) struct Finish<'a> {
    pub(super) shape: &'a CachedAttentionShape,
    pub(super) sums: *const f32,
    pub(super) sink: Option<f32>,
    pub(super) y: *mut f32,
}

impl Kernel for Finish<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = self.shape.value_dim;
        // SAFETY: who builds the kernel vouches for a partial result and for `n` values of `y`.
        unsafe {
            let (maximum, sum) = (*self.sums.add(n), *self.sums.add(n + 1));
            let (factor, sum) = match self.sink {
                None => (1.0, sum),
                Some(sink) => {
                    let top = maximum.max(sink);
                    let factor = exp(s, maximum - top);
                    (factor, sum * factor + exp(s, sink - top))
                }
            };
            for d in (0..n).step_by(S::LANES) {
                let width = S::LANES.min(n - d);
                let x = s.mul(s.load_n(self.sums.add(d), width), s.splat(factor));
                s.store_n(self.y.add(d), width, s.div(x, s.splat(sum)));
            }
        }
    }
}
