//! Scaled dot-product attention with grouped heads, masks, caches and soft caps, and rotary position embedding.

use super::real::Real;
use super::rows::{Shared, parallel_rows_with_scratch};
use crate::ThreadPool;

/// Where the rows of a `[batch, heads, sequence, size]` operand lie, so that `[batch, sequence, heads · size]` can be
/// read without a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadRows {
    /// Heads.
    pub heads: usize,
    /// Rows per head.
    pub sequence: usize,
    /// Elements per row.
    pub size: usize,
    /// Heads lie side by side in one row per position, rather than one after another.
    pub packed: bool,
}

impl HeadRows {
    /// First element of a row.
    #[inline(always)]
    pub fn offset(&self, batch: usize, head: usize, position: usize) -> usize {
        let row = if self.packed {
            (batch * self.sequence + position) * self.heads + head
        } else {
            (batch * self.heads + head) * self.sequence + position
        };
        row * self.size
    }

    /// Batch, head and position of a row, counted in memory order.
    pub fn locate(&self, row: usize) -> (usize, usize, usize) {
        if self.packed {
            let (position, head) = (row / self.heads, row % self.heads);
            (position / self.sequence, head, position % self.sequence)
        } else {
            let (head, position) = (row / self.sequence, row % self.sequence);
            (head / self.heads, head % self.heads, position)
        }
    }
}

/// Which score the fourth result of [`attention`] shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScoreStage {
    /// Scaled products.
    Raw,
    /// After the soft cap.
    Capped,
    /// After soft cap and mask.
    Masked,
    /// After the softmax.
    Softmax,
}

/// A mask over `[batch, heads, query, key]`, one stride per dimension (0 where it is broadcast).
#[derive(Clone, Copy, Debug)]
pub struct Mask<'a, T> {
    /// What is added to the scores, or which keys are seen.
    pub values: MaskValues<'a, T>,
    /// Elements between neighbours of each dimension.
    pub strides: [usize; 4],
    /// Keys that the mask talks of; the rest is not seen.
    pub keys: usize,
}

/// The elements of a [`Mask`].
#[derive(Clone, Copy, Debug)]
pub enum MaskValues<'a, T> {
    /// Added to the scores.
    Bias(&'a [T]),
    /// Non-zero where the key is seen.
    Seen(&'a [u8]),
}

/// What [`attention`] computes, but for the operands.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Pictures, sentences, ….
    pub batch: usize,
    /// Rows of the queries.
    pub query: HeadRows,
    /// Rows of the new keys.
    pub key: HeadRows,
    /// Rows of the new values.
    pub value: HeadRows,
    /// Cached keys before the new ones.
    pub past: usize,
    /// Scale of the products.
    pub scale: f32,
    /// `softcap · tanh(score / softcap)` when positive.
    pub softcap: f32,
    /// Query `i` sees keys up to `past + i` only.
    pub causal: bool,
    /// Which score to show.
    pub stage: ScoreStage,
}

impl AttentionShape {
    /// Keys in all.
    pub fn keys(&self) -> usize {
        self.past + self.key.sequence
    }

    /// Rows of the result.
    pub fn output(&self) -> HeadRows {
        HeadRows { size: self.value.size, ..self.query }
    }

    /// Elements of scratch that each thread needs.
    pub fn scratch_len(&self) -> usize {
        self.keys() + self.query.size + self.value.size
    }
}

/// Operands of [`attention`]; caches are `[batch, heads, past, size]`.
#[derive(Clone, Copy, Debug)]
pub struct AttentionOperands<'a, T> {
    /// Queries.
    pub query: &'a [T],
    /// New keys.
    pub key: &'a [T],
    /// New values.
    pub value: &'a [T],
    /// Keys of earlier calls; empty for none.
    pub past_key: &'a [T],
    /// Values of earlier calls; empty for none.
    pub past_value: &'a [T],
    /// Added or selected.
    pub mask: Option<Mask<'a, T>>,
    /// Keys of each batch entry that count, for caches that are longer than their content; the last query then sits
    /// at the last of them.
    pub key_lengths: Option<&'a [i64]>,
}

/// Sum of products in 16 lanes, so that the compiler may use vectors.
#[inline(always)]
pub(crate) fn dot<T: Real>(a: &[f32], b: &[T]) -> f32 {
    let mut lanes = [0f32; 16];
    let (a_chunks, b_chunks) = (a.chunks_exact(16), b.chunks_exact(16));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * b.to_f32()).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for i in 0..16 {
            lanes[i] += a[i] * b[i].to_f32();
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// `out[b,h,i] = Σ_j softmax_j(mask(cap(scale · q[b,h,i]·k[b,h',j]))) · v[b,h',j]`, where `h'` is the key head that
/// query head `h` shares with its neighbours. Keys and values are the cached ones followed by the new ones.
///
/// Scores are computed in `f32` for every element type. A row whose keys are all masked gives zeros. `scores`, if
/// given, is `[batch, heads, query, keys]` and receives the stage that [`AttentionShape::stage`] names. `scratch`
/// has [`AttentionShape::scratch_len`] elements per thread of the pool.
pub fn attention<T: Real>(
    pool: &ThreadPool,
    shape: &AttentionShape,
    operands: &AttentionOperands<'_, T>,
    out: &mut [T],
    scores: Option<&mut [T]>,
    scratch: &mut [f32],
) {
    let keys = shape.keys();
    let output = shape.output();
    let group = shape.query.heads / shape.key.heads.max(1);
    let cached = |head_rows: HeadRows| HeadRows { sequence: shape.past, packed: false, ..head_rows };
    let (past_key, past_value) = (cached(shape.key), cached(shape.value));
    let all_scores = scores.map(Shared::new);
    let rows_per_task = 16.min(output.sequence.max(1));
    parallel_rows_with_scratch(pool, out, output.size, rows_per_task, scratch, &|first, out, scratch| {
        let (row, rest) = scratch[..shape.scratch_len()].split_at_mut(keys);
        let (query, sum) = rest.split_at_mut(shape.query.size);
        for (r, out) in out.chunks_exact_mut(output.size).enumerate() {
            let (batch, head, position) = output.locate(first + r);
            let key_head = head / group.max(1);
            let from = shape.query.offset(batch, head, position);
            super::real::widen(&operands.query[from..from + shape.query.size], query);
            // The scale goes in once per query rather than once per key.
            query.iter_mut().for_each(|q| *q *= shape.scale);
            for (j, score) in row.iter_mut().enumerate() {
                let key = if j < shape.past {
                    &operands.past_key[past_key.offset(batch, key_head, j)..]
                } else {
                    &operands.key[shape.key.offset(batch, key_head, j - shape.past)..]
                };
                *score = dot(query, &key[..shape.query.size]);
            }
            let show = |stage: ScoreStage, row: &[f32]| {
                if let Some(all) = &all_scores
                    && stage == shape.stage
                {
                    let at = ((batch * shape.query.heads + head) * shape.query.sequence + position) * keys;
                    // SAFETY: every (batch, head, position) is one row of the result and so visited once.
                    super::real::narrow(row, unsafe { all.slice(at, keys) });
                }
            };
            show(ScoreStage::Raw, row);
            if shape.softcap > 0.0 {
                row.iter_mut().for_each(|s| *s = shape.softcap * (*s / shape.softcap).tanh());
            }
            show(ScoreStage::Capped, row);
            let mut seen = false;
            for (j, score) in row.iter_mut().enumerate() {
                let bias = bias_of(shape, operands, [batch, head, position, j]);
                seen |= bias != f32::NEG_INFINITY;
                *score = if bias == f32::NEG_INFINITY { bias } else { *score + bias };
            }
            show(ScoreStage::Masked, row);
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut total = 0.0;
            for score in row.iter_mut() {
                *score = if seen { (*score - largest).exp() } else { 0.0 };
                total += *score;
            }
            let inverse = if seen { 1.0 / total } else { 0.0 };
            row.iter_mut().for_each(|s| *s *= inverse);
            show(ScoreStage::Softmax, row);
            sum.fill(0.0);
            for (j, &weight) in row.iter().enumerate() {
                if weight == 0.0 {
                    continue;
                }
                let value = if j < shape.past {
                    &operands.past_value[past_value.offset(batch, key_head, j)..]
                } else {
                    &operands.value[shape.value.offset(batch, key_head, j - shape.past)..]
                };
                for (sum, value) in sum.iter_mut().zip(value) {
                    *sum += weight * value.to_f32();
                }
            }
            super::real::narrow(sum, out);
        }
    });
}

/// What is added to the score of a query and a key; −∞ where the key is not seen.
#[inline(always)]
pub(super) fn bias_of<T: Real>(
    shape: &AttentionShape,
    operands: &AttentionOperands<'_, T>,
    at: [usize; 4],
) -> f32 {
    let (query, key) = (at[2] as i64, at[3] as i64);
    let mut newest = shape.past as i64 + query;
    if let Some(lengths) = operands.key_lengths {
        if key >= lengths[at[0]] {
            return f32::NEG_INFINITY;
        }
        newest = lengths[at[0]] - shape.query.sequence as i64 + query;
    }
    if shape.causal && key > newest {
        return f32::NEG_INFINITY;
    }
    let Some(mask) = &operands.mask else { return 0.0 };
    if at[3] >= mask.keys {
        return f32::NEG_INFINITY;
    }
    let index: usize = at.iter().zip(mask.strides).map(|(i, s)| i * s).sum();
    match mask.values {
        MaskValues::Bias(values) => values[index].to_f32(),
        MaskValues::Seen(values) if values[index] != 0 => 0.0,
        MaskValues::Seen(_) => f32::NEG_INFINITY,
    }
}

/// What [`rotary_embedding`] computes, but for the operands.
#[derive(Clone, Copy, Debug)]
pub struct RotaryShape {
    /// Rows of the operand and the result.
    pub rows: HeadRows,
    /// Rotated elements of each row.
    pub rotated: usize,
    /// Pairs are neighbours rather than halves.
    pub interleaved: bool,
    /// Elements between rows of the caches.
    pub cache_stride: usize,
}

/// Rotates pairs of elements by an angle that depends on their position (Su et al., "RoFormer", 2021).
///
/// `cache_row(batch, position)` tells which row of `cos` and `sin` (each `rotated / 2` angles or more) applies.
pub fn rotary_embedding<T: Real>(
    shape: &RotaryShape,
    x: &[T],
    cos: &[T],
    sin: &[T],
    cache_row: impl Fn(usize, usize) -> usize,
    out: &mut [T],
) {
    let size = shape.rows.size;
    let half = shape.rotated / 2;
    for (row, (x, out)) in x.chunks_exact(size).zip(out.chunks_exact_mut(size)).enumerate() {
        let (batch, _, position) = shape.rows.locate(row);
        let at = cache_row(batch, position) * shape.cache_stride;
        let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
        for i in 0..half {
            let (real, imaginary) = if shape.interleaved { (2 * i, 2 * i + 1) } else { (i, half + i) };
            let (a, b) = (x[real].to_f32(), x[imaginary].to_f32());
            let (c, s) = (cos[i].to_f32(), sin[i].to_f32());
            out[real] = T::from_f32(c * a - s * b);
            out[imaginary] = T::from_f32(s * a + c * b);
        }
        out[2 * half..].copy_from_slice(&x[2 * half..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(n: usize, seed: f32) -> Vec<f32> {
        (0..n).map(|i| ((i as f32 + seed) * 1.37).sin()).collect()
    }

    /// The same sum spelled out over `[batch, heads, sequence, size]` operands.
    fn reference(shape: &AttentionShape, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
        let mut out = Vec::new();
        let group = shape.query.heads / shape.key.heads;
        for b in 0..shape.batch {
            for h in 0..shape.query.heads {
                for i in 0..shape.query.sequence {
                    let visible =
                        if shape.causal { (i + 1).min(shape.key.sequence) } else { shape.key.sequence };
                    let scores: Vec<f64> = (0..visible)
                        .map(|j| {
                            (0..shape.query.size)
                                .map(|d| {
                                    f64::from(q[shape.query.offset(b, h, i) + d])
                                        * f64::from(k[shape.key.offset(b, h / group, j) + d])
                                })
                                .sum::<f64>()
                                * f64::from(shape.scale)
                        })
                        .collect();
                    let total: f64 = scores.iter().map(|s| s.exp()).sum();
                    for d in 0..shape.value.size {
                        let sum: f64 = (0..visible)
                            .map(|j| {
                                scores[j].exp() / total
                                    * f64::from(v[shape.value.offset(b, h / group, j) + d])
                            })
                            .sum();
                        out.push(sum as f32);
                    }
                }
            }
        }
        out
    }

    #[test]
    fn grouped_heads_and_causal_masks_match_the_definition() {
        let pool = ThreadPool::new(2);
        for (causal, threads_heads) in [(false, (4, 2)), (true, (6, 3)), (true, (3, 3))] {
            let rows = |heads, sequence, size| HeadRows { heads, sequence, size, packed: false };
            let shape = AttentionShape {
                batch: 2,
                query: rows(threads_heads.0, 5, 20),
                key: rows(threads_heads.1, 7, 20),
                value: rows(threads_heads.1, 7, 9),
                past: 0,
                scale: 0.3,
                softcap: 0.0,
                causal,
                stage: ScoreStage::Raw,
            };
            let q = wave(2 * threads_heads.0 * 5 * 20, 0.0);
            let k = wave(2 * threads_heads.1 * 7 * 20, 9.0);
            let v = wave(2 * threads_heads.1 * 7 * 9, 4.0);
            let operands = AttentionOperands {
                query: &q,
                key: &k,
                value: &v,
                past_key: &[],
                past_value: &[],
                mask: None,
                key_lengths: None,
            };
            let mut out = vec![0.0; 2 * threads_heads.0 * 5 * 9];
            let mut scratch = vec![0.0; 2 * shape.scratch_len()];
            attention(&pool, &shape, &operands, &mut out, None, &mut scratch);
            for (a, b) in out.iter().zip(reference(&shape, &q, &k, &v)) {
                assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
        }
    }

    #[test]
    fn a_fully_masked_row_is_zero() {
        let rows = |heads, sequence, size| HeadRows { heads, sequence, size, packed: false };
        let shape = AttentionShape {
            batch: 1,
            query: rows(1, 1, 4),
            key: rows(1, 3, 4),
            value: rows(1, 3, 4),
            past: 0,
            scale: 1.0,
            softcap: 0.0,
            causal: false,
            stage: ScoreStage::Softmax,
        };
        let (q, k, v) = (wave(4, 0.0), wave(12, 1.0), wave(12, 2.0));
        let mask = Mask { values: MaskValues::Seen(&[0, 0, 0]), strides: [0, 0, 0, 1], keys: 3 };
        let operands = AttentionOperands {
            query: &q,
            key: &k,
            value: &v,
            past_key: &[],
            past_value: &[],
            mask: Some(mask),
            key_lengths: None,
        };
        let (mut out, mut scores) = ([1.0; 4], [1.0; 3]);
        let mut scratch = vec![0.0; shape.scratch_len()];
        attention(&ThreadPool::new(1), &shape, &operands, &mut out, Some(&mut scores), &mut scratch);
        assert_eq!((out, scores), ([0.0; 4], [0.0; 3]));
    }

    #[test]
    fn packed_and_separate_heads_agree() {
        let separate = HeadRows { heads: 3, sequence: 4, size: 8, packed: false };
        let packed = HeadRows { packed: true, ..separate };
        for row in 0..24 {
            let (b, h, i) = packed.locate(row);
            assert_eq!(packed.offset(b, h, i), row * 8);
            let (b, h, i) = separate.locate(row);
            assert_eq!(separate.offset(b, h, i), row * 8);
        }
    }

    #[test]
    fn rotation_keeps_the_length_of_pairs() {
        let rows = HeadRows { heads: 2, sequence: 3, size: 8, packed: true };
        for interleaved in [false, true] {
            let shape = RotaryShape { rows, rotated: 6, interleaved, cache_stride: 3 };
            let x = wave(48, 0.0);
            let angles = wave(9, 5.0);
            let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
            let mut out = vec![0.0; 48];
            rotary_embedding(&shape, &x, &cos, &sin, |_, position| position, &mut out);
            for (x, y) in x.chunks(8).zip(out.chunks(8)) {
                let length = |v: &[f32]| v[..6].iter().map(|x| x * x).sum::<f32>();
                assert!((length(x) - length(y)).abs() < 1e-4);
                assert_eq!(x[6..], y[6..]);
            }
        }
    }
}
