//! The gradient of attention, block by block of queries; probabilities are computed anew.

use super::outer::Tiles;
use super::{get, put};
use crate::arch::{Kernel, Simd, dispatch};
use crate::epilogue::{Activation, check_rows};
use crate::gemm::{GRAIN, PANEL, Panels, Product, Strided, pack_nk, packed_len};
use crate::matmul::{AttentionMask, AttentionShape, HeadStrides};
use crate::norm::SoftmaxRows;
use crate::threads::{Shareable, ThreadPool};

/// Values of a block of scores.
const SCORES: usize = 24 << 10;

/// Where the gradients of queries, keys and values go, laid out as these; `None` for those that nobody wants.
#[derive(Debug)]
pub struct AttentionGradients<'a> {
    /// Of the queries.
    pub q: Option<&'a mut [f32]>,
    /// Of the keys.
    pub k: Option<&'a mut [f32]>,
    /// Of the values.
    pub v: Option<&'a mut [f32]>,
}

/// Sizes of the scratch of one thread.
#[derive(Clone, Copy)]
struct Parts {
    rows: usize,
    stride: usize,
    head: usize,
    value: usize,
    sizes: [usize; 9],
}

impl Parts {
    fn of(shape: &AttentionShape) -> Parts {
        let stride = shape.kv_len.next_multiple_of(GRAIN);
        let rows = (SCORES / stride.max(1)).clamp(16, 96).min(shape.q_len.max(1));
        let (head, value) = (shape.head_dim.next_multiple_of(GRAIN), shape.value_dim.next_multiple_of(GRAIN));
        let copied =
            |exact: usize, padded: usize, rows: usize| if exact == padded { 0 } else { rows * padded };
        let sizes = [
            packed_len(shape.head_dim, shape.kv_len),
            packed_len(shape.value_dim, shape.kv_len),
            copied(shape.head_dim, head, shape.kv_len),
            rows * stride,
            rows * stride,
            shape.kv_len * head,
            shape.kv_len * value,
            copied(shape.head_dim, head, rows),
            copied(shape.value_dim, value, rows),
        ];
        Parts { rows, stride, head, value, sizes }
    }

    fn len(&self) -> usize {
        self.sizes.iter().map(|n| n.next_multiple_of(16)).sum()
    }
}

/// Values of scratch that [`attention_grad`] needs on a pool of `threads` threads.
pub fn attention_grad_scratch_len(shape: &AttentionShape, threads: usize) -> usize {
    threads * Parts::of(shape).len()
}

/// `d = p · (d - sum of p d) · scale` per row.
struct ScoreGrad {
    p: *const f32,
    d: *mut f32,
    rows: usize,
    n: usize,
    stride: usize,
    scale: f32,
}

impl Kernel for ScoreGrad {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in 0..self.rows {
            // SAFETY: who builds the kernel vouches for `rows` rows of `n` values.
            unsafe {
                let (p, d) = (self.p.add(row * self.stride), self.d.add(row * self.stride));
                let mut sum = s.splat(0.0);
                let mut i = 0;
                while i < self.n {
                    let n = S::LANES.min(self.n - i);
                    sum = s.fma(get(s, p.add(i), n), get(s, d.add(i), n), sum);
                    i += S::LANES;
                }
                let (total, scale) = (s.splat(s.sum(sum)), s.splat(self.scale));
                let mut i = 0;
                while i < self.n {
                    let n = S::LANES.min(self.n - i);
                    let moved = s.sub(get(s, d.add(i), n), total);
                    put(s, d.add(i), n, s.mul(s.mul(get(s, p.add(i), n), moved), scale));
                    i += S::LANES;
                }
            }
        }
    }
}

/// Gradient of [`attention`](crate::attention) with respect to its operands, from the gradient `dy` of its result. All
/// are read and written by strides, `dq`, `dk`, `dv` as the operands; `batch` holds the distances of batch entries in q,
/// k, v and the result. `mask(b)` is the mask of an entry. A query position that sees no key has no part in the
/// gradient. `scratch` has [`attention_grad_scratch_len`] values.
///
/// # Panics
/// Panics when a slice is too short or `kv_heads` does not divide `heads`.
pub fn attention_grad<'m>(
    pool: &ThreadPool,
    shape: &AttentionShape,
    entries: usize,
    batch: [usize; 4],
    [q, k, v, dy]: [&[f32]; 4],
    [q_at, k_at, v_at, y_at]: [HeadStrides; 4],
    mask: &(dyn Fn(usize) -> Option<AttentionMask<'m>> + Sync),
    results: AttentionGradients<'_>,
    scratch: &mut [f32],
) {
    let AttentionShape { heads, kv_heads, q_len, kv_len, head_dim, value_dim, scale, causal } = *shape;
    if entries == 0 || heads == 0 || q_len == 0 {
        return;
    }
    assert!(kv_heads > 0 && heads % kv_heads == 0, "{kv_heads} key heads for {heads} query heads");
    let check =
        |what: &str, len: usize, step: usize, heads: usize, rows: usize, dim: usize, at: HeadStrides| {
            let before = (entries - 1) * step + (heads - 1) * at.head;
            check_rows(what, len.saturating_sub(before), rows, dim, at.position);
        };
    check("Q", q.len(), batch[0], heads, q_len, head_dim, q_at);
    check("K", k.len(), batch[1], kv_heads, kv_len, head_dim, k_at);
    check("V", v.len(), batch[2], kv_heads, kv_len, value_dim, v_at);
    check("dY", dy.len(), batch[3], heads, q_len, value_dim, y_at);
    let pointer = |what: &str, result: Option<&mut [f32]>, operand: &[f32]| {
        assert!(result.as_ref().is_none_or(|r| r.len() >= operand.len()), "{what} is too short");
        Shareable(result.map_or(std::ptr::null_mut(), <[f32]>::as_mut_ptr))
    };
    let dq = pointer("dQ", results.q, q);
    let dk = pointer("dK", results.k, k);
    let dv = pointer("dV", results.v, v);
    let parts = Parts::of(shape);
    let len = parts.len();
    let need = len * pool.threads();
    assert!(scratch.len() >= need, "scratch has {} values, {need} needed", scratch.len());
    let scratch = Shareable(scratch.as_mut_ptr());
    let group = heads / kv_heads;
    let isa = pool.isa();
    pool.parallel_for(entries * kv_heads, &|index, worker| {
        let (entry, kv_head) = (index / kv_heads, index % kv_heads);
        // SAFETY: every worker has a part of the scratch of its own.
        let mut rest = unsafe { std::slice::from_raw_parts_mut(scratch.get().add(worker * len), len) };
        let [keys, values, plain, scores, grads, dk_sum, dv_sum, q_block, dy_block] = parts.sizes.map(|n| {
            let (part, tail) = std::mem::take(&mut rest).split_at_mut(n.next_multiple_of(16));
            rest = tail;
            part
        });
        let k = &k[entry * batch[1] + kv_head * k_at.head..];
        let v = &v[entry * batch[2] + kv_head * v_at.head..];
        pack_nk(head_dim, kv_len, k, k_at.position, keys);
        pack_nk(value_dim, kv_len, v, v_at.position, values);
        let keys_plain = if plain.is_empty() {
            Panels { data: k.as_ptr(), plain_stride: k_at.position.max(1) }
        } else {
            copy_padded(k, k_at.position, kv_len, head_dim, parts.head, plain);
            Panels { data: plain.as_ptr(), plain_stride: parts.head }
        };
        dk_sum.fill(0.0);
        dv_sum.fill(0.0);
        let mask = mask(entry);
        for head in kv_head * group..(kv_head + 1) * group {
            let q = &q[entry * batch[0] + head * q_at.head..];
            let dy = &dy[entry * batch[3] + head * y_at.head..];
            for first in (0..q_len).step_by(parts.rows) {
                let rows = parts.rows.min(q_len - first);
                // Keys that some query of the block sees, whole panels.
                let seen = causal.map_or(kv_len, |o| (first + rows + o).min(kv_len));
                let seen = seen.next_multiple_of(PANEL).min(kv_len);
                let (q, dy) = (&q[first * q_at.position..], &dy[first * y_at.position..]);
                let product = |a: &[f32],
                               stride: usize,
                               k: usize,
                               columns: usize,
                               panels: Panels,
                               c: *mut f32,
                               c_stride: usize| {
                    let source = Strided { data: a.as_ptr(), stride, k };
                    Product {
                        source,
                        rows,
                        columns,
                        panels,
                        c: Shareable(c),
                        c_stride,
                        bias: std::ptr::null(),
                        residual: std::ptr::null(),
                        residual_stride: 0,
                        activation: Activation::None,
                    }
                    .run_part(pool, 0..rows, 0..columns.div_ceil(PANEL));
                };
                let packed = |data: &[f32]| Panels { data: data.as_ptr(), plain_stride: 0 };
                product(q, q_at.position, head_dim, seen, packed(keys), scores.as_mut_ptr(), parts.stride);
                for (r, row) in scores.chunks_exact_mut(parts.stride).take(rows).enumerate() {
                    if let Some(offset) = causal {
                        let visible = (first + r + offset + 1).min(seen);
                        let hidden = if scale < 0.0 { f32::INFINITY } else { f32::NEG_INFINITY };
                        row[visible..seen].fill(hidden);
                    }
                }
                let mask_row =
                    mask.map(|m| (&m.data[head * m.head_stride + first * m.row_stride..], m.row_stride));
                dispatch(
                    isa,
                    SoftmaxRows {
                        input: scores.as_ptr(),
                        in_stride: parts.stride,
                        output: scores.as_mut_ptr(),
                        out_stride: parts.stride,
                        rows,
                        n: seen,
                        scale,
                        mask: mask_row.map_or(std::ptr::null(), |(m, _)| m.as_ptr()),
                        mask_stride: mask_row.map_or(0, |(_, stride)| stride),
                    },
                );
                if let Some((m, stride)) = mask_row {
                    for (r, row) in scores.chunks_exact_mut(parts.stride).take(rows).enumerate() {
                        let visible = causal.map_or(seen, |o| (first + r + o + 1).min(seen));
                        if m[r * stride..][..visible].iter().all(|&m| m == f32::NEG_INFINITY) {
                            row[..seen].fill(0.0);
                        }
                    }
                }
                product(dy, y_at.position, value_dim, seen, packed(values), grads.as_mut_ptr(), parts.stride);
                let (p, d) = (scores.as_ptr(), grads.as_mut_ptr());
                dispatch(isa, ScoreGrad { p, d, rows, n: seen, stride: parts.stride, scale });
                if !dq.get().is_null() {
                    let at = entry * batch[0] + head * q_at.head + first * q_at.position;
                    let to = dq.get().wrapping_add(at);
                    product(grads, parts.stride, seen, head_dim, keys_plain, to, q_at.position);
                }
                let add = |a: &[f32], b: *const f32, b_stride: usize, padded: usize, c: &mut [f32]| {
                    let tiles = Tiles {
                        a: a.as_ptr(),
                        a_stride: parts.stride,
                        m: seen,
                        k: rows,
                        b,
                        b_stride,
                        padded,
                        c: c.as_mut_ptr(),
                        c_stride: padded,
                        resume: true,
                    };
                    dispatch(isa, tiles);
                };
                if !dv.get().is_null() {
                    let (b, stride) = aligned(dy, y_at.position, rows, value_dim, parts.value, dy_block);
                    add(scores, b, stride, parts.value, dv_sum);
                }
                if !dk.get().is_null() {
                    let (b, stride) = aligned(q, q_at.position, rows, head_dim, parts.head, q_block);
                    add(grads, b, stride, parts.head, dk_sum);
                }
            }
        }
        for (out, sums, padded, dim, step, at) in [
            (dk, &*dk_sum, parts.head, head_dim, batch[1], k_at),
            (dv, &*dv_sum, parts.value, value_dim, batch[2], v_at),
        ] {
            if out.get().is_null() {
                continue;
            }
            for j in 0..kv_len {
                let to = out.get().wrapping_add(entry * step + kv_head * at.head + j * at.position);
                // SAFETY: heads of entries are disjoint parts of the result, which is as long as the operand.
                unsafe { std::ptr::copy_nonoverlapping(sums[j * padded..].as_ptr(), to, dim) };
            }
        }
    });
}

/// Rows that are a whole number of vectors long: where they are, or a copy.
fn aligned(
    data: &[f32],
    stride: usize,
    rows: usize,
    dim: usize,
    padded: usize,
    block: &mut [f32],
) -> (*const f32, usize) {
    if dim == padded {
        return (data.as_ptr(), stride);
    }
    copy_padded(data, stride, rows, dim, padded, block);
    (block.as_ptr(), padded)
}

fn copy_padded(data: &[f32], stride: usize, rows: usize, dim: usize, padded: usize, out: &mut [f32]) {
    for (r, to) in out.chunks_exact_mut(padded.max(1)).take(rows).enumerate() {
        to[..dim].copy_from_slice(&data[r * stride..][..dim]);
        to[dim..].fill(0.0);
    }
}
