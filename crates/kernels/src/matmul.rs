//! Products of two activations, and attention built from them.

use crate::arch::dispatch;
use crate::epilogue::{Activation, Epilogue, check_rows};
use crate::gemm::{GRAIN, PANEL, Panels, Product, Strided, pack_kn, pack_nk, packed_len};
use crate::norm::SoftmaxRows;
use crate::threads::{Shareable, ThreadPool};

/// A batch of matrices inside a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrices {
    /// Distance between matrices; 0 repeats one.
    pub batch_stride: usize,
    /// Distance between rows.
    pub row_stride: usize,
}

fn check_batch(what: &str, len: usize, batch: usize, rows: usize, columns: usize, m: Matrices) {
    if batch > 0 {
        let before = (batch - 1) * m.batch_stride;
        check_rows(what, len.saturating_sub(before), rows, columns, m.row_stride);
    }
}

fn reads_plain(n: usize, transposed: bool) -> bool {
    !transposed && n.is_multiple_of(GRAIN)
}

/// Values of scratch that [`matmul`] needs on a pool of `threads` threads.
pub fn matmul_scratch_len(n: usize, k: usize, transposed: bool, threads: usize) -> usize {
    if reads_plain(n, transposed) { 0 } else { threads * packed_len(k, n) }
}

/// `C[i] = epilogue(A[i] B[i])` for `i < batch`: A is `[m, k]`, C is `[m, n]`, B is `[k, n]` or, when
/// `transposed`, `[n, k]`. The epilogue's residual must be `None`; its bias is shared by the batch. `scratch` has
/// [`matmul_scratch_len`] values.
///
/// # Panics
/// Panics when a slice is too short for its shape.
pub fn matmul(
    pool: &ThreadPool,
    batch: usize,
    [m, n, k]: [usize; 3],
    a: &[f32],
    a_at: Matrices,
    b: &[f32],
    b_at: Matrices,
    transposed: bool,
    c: &mut [f32],
    c_at: Matrices,
    epilogue: &Epilogue<'_>,
    scratch: &mut [f32],
) {
    check_batch("A", a.len(), batch, m, k, a_at);
    let (b_rows, b_columns) = if transposed { (n, k) } else { (k, n) };
    check_batch("B", b.len(), batch, b_rows, b_columns, b_at);
    check_batch("C", c.len(), batch, m, n, c_at);
    assert!(
        batch <= 1 || m == 0 || c_at.batch_stride >= (m - 1) * c_at.row_stride + n,
        "matrices of C overlap"
    );
    assert!(epilogue.residual.is_none(), "a batched product takes no residual");
    epilogue.check(m, n);
    let len = packed_len(k, n);
    let need = matmul_scratch_len(n, k, transposed, pool.threads());
    assert!(scratch.len() >= need, "scratch has {} values, {need} needed", scratch.len());
    if batch == 0 || m == 0 || n == 0 {
        return;
    }
    let plain = reads_plain(n, transposed);
    let (c, scratch) = (Shareable(c.as_mut_ptr()), Shareable(scratch.as_mut_ptr()));
    let product = |index: usize, worker: usize| {
        let b = &b[index * b_at.batch_stride..];
        let panels = if plain {
            Panels { data: b.as_ptr(), plain_stride: b_at.row_stride.max(1) }
        } else {
            // SAFETY: every worker has a part of the scratch of its own.
            let packed = unsafe { std::slice::from_raw_parts_mut(scratch.get().add(worker * len), len) };
            if transposed {
                pack_nk(k, n, b, b_at.row_stride, packed);
            } else {
                pack_kn(k, n, b, b_at.row_stride, packed);
            }
            Panels { data: packed.as_ptr(), plain_stride: 0 }
        };
        Product {
            source: Strided { data: a[index * a_at.batch_stride..].as_ptr(), stride: a_at.row_stride, k },
            rows: m,
            columns: n,
            panels,
            c: Shareable(c.get().wrapping_add(index * c_at.batch_stride)),
            c_stride: c_at.row_stride,
            bias: epilogue.bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
            residual: std::ptr::null(),
            residual_stride: 0,
            activation: epilogue.activation,
        }
    };
    if batch < 2 * pool.threads() || m * n * k * batch < 200_000 {
        return (0..batch).for_each(|index| product(index, 0).run(pool));
    }
    pool.parallel_for(batch, &|index, worker| {
        product(index, worker).run_part(pool, 0..m, 0..n.div_ceil(PANEL));
    });
}

/// Sizes of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Query positions.
    pub q_len: usize,
    /// Key and value positions.
    pub kv_len: usize,
    /// Values per query and key.
    pub head_dim: usize,
    /// Values per value.
    pub value_dim: usize,
    /// Factor of the scores, most often `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Query position `i` sees the key positions `j <= i + offset`.
    pub causal: Option<usize>,
}

/// `[position, head, dim]` inside a slice, by strides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadStrides {
    /// Distance between positions.
    pub position: usize,
    /// Distance between heads.
    pub head: usize,
}

/// What is added to the scores: `data[head * head_stride + i * row_stride + j]`.
#[derive(Clone, Copy, Debug)]
pub struct AttentionMask<'a> {
    /// The addends.
    pub data: &'a [f32],
    /// Distance between heads; 0 shares one mask.
    pub head_stride: usize,
    /// Distance between query positions; 0 shares one row.
    pub row_stride: usize,
}

/// Query rows per block of scores.
const ROWS: usize = 48;

fn attention_part(shape: &AttentionShape) -> [usize; 3] {
    let keys = packed_len(shape.head_dim, shape.kv_len);
    let values =
        if shape.value_dim.is_multiple_of(GRAIN) { 0 } else { packed_len(shape.kv_len, shape.value_dim) };
    [keys, values, ROWS.min(shape.q_len) * shape.kv_len.next_multiple_of(GRAIN)]
}

/// Values of scratch that [`attention`] needs on a pool of `threads` threads.
pub fn attention_scratch_len(shape: &AttentionShape, threads: usize) -> usize {
    threads * attention_part(shape).iter().sum::<usize>()
}

/// `softmax(Q K^T scale + mask) V` per head. `q`, `k`, `v` and `output` are read and written by strides, so that
/// they may lie in one projection's result. `scratch` has [`attention_scratch_len`] values.
///
/// A query position that sees no key at all gives NaN.
///
/// # Panics
/// Panics when a slice is too short or `kv_heads` does not divide `heads`.
pub fn attention(
    pool: &ThreadPool,
    shape: &AttentionShape,
    q: &[f32],
    q_at: HeadStrides,
    k: &[f32],
    k_at: HeadStrides,
    v: &[f32],
    v_at: HeadStrides,
    mask: Option<AttentionMask<'_>>,
    output: &mut [f32],
    out_at: HeadStrides,
    scratch: &mut [f32],
) {
    let AttentionShape { heads, kv_heads, q_len, kv_len, head_dim, value_dim, scale, causal } = *shape;
    if heads == 0 || q_len == 0 {
        return;
    }
    assert!(kv_heads > 0 && heads % kv_heads == 0, "{kv_heads} key heads for {heads} query heads");
    let check = |what: &str, len: usize, heads: usize, rows: usize, dim: usize, at: HeadStrides| {
        check_rows(what, len.saturating_sub((heads - 1) * at.head), rows, dim, at.position);
    };
    check("Q", q.len(), heads, q_len, head_dim, q_at);
    check("K", k.len(), kv_heads, kv_len, head_dim, k_at);
    check("V", v.len(), kv_heads, kv_len, value_dim, v_at);
    check("output", output.len(), heads, q_len, value_dim, out_at);
    let apart = out_at.head >= value_dim && out_at.position >= (heads - 1) * out_at.head + value_dim
        || out_at.position >= value_dim && out_at.head >= (q_len - 1) * out_at.position + value_dim;
    assert!(apart || heads == 1, "heads of the output overlap");
    if let Some(mask) = mask {
        let need = (heads - 1) * mask.head_stride + (q_len - 1) * mask.row_stride + kv_len;
        assert!(mask.data.len() >= need, "mask has {} values, {need} needed", mask.data.len());
    }
    let parts = attention_part(shape);
    let len: usize = parts.iter().sum();
    let need = len * pool.threads();
    assert!(scratch.len() >= need, "scratch has {} values, {need} needed", scratch.len());

    // Few heads are cut into runs of blocks, so that all threads have work.
    let blocks = q_len.div_ceil(ROWS);
    let work = heads * q_len * kv_len * (head_dim + value_dim);
    let pieces = match pool.threads() {
        1 => 1,
        threads if work < 200_000 || heads >= 4 * threads => 1,
        threads => (4 * threads).div_ceil(heads).min(blocks),
    };
    let per_piece = blocks.div_ceil(pieces);
    let (scratch, out) = (Shareable(scratch.as_mut_ptr()), Shareable(output.as_mut_ptr()));
    let task = |index: usize, worker: usize| {
        let (head, piece) = (index / pieces, index % pieces);
        // SAFETY: every worker has a part of the scratch of its own.
        let mine = unsafe { std::slice::from_raw_parts_mut(scratch.get().add(worker * len), len) };
        let (keys, rest) = mine.split_at_mut(parts[0]);
        let (values, scores) = rest.split_at_mut(parts[1]);
        let kv_head = head * kv_heads / heads;
        pack_nk(head_dim, kv_len, &k[kv_head * k_at.head..], k_at.position, keys);
        let v = &v[kv_head * v_at.head..];
        let values = if parts[1] == 0 {
            Panels { data: v.as_ptr(), plain_stride: v_at.position.max(1) }
        } else {
            pack_kn(kv_len, value_dim, v, v_at.position, values);
            Panels { data: values.as_ptr(), plain_stride: 0 }
        };
        let score_stride = kv_len.next_multiple_of(GRAIN);
        for block in piece * per_piece..blocks.min((piece + 1) * per_piece) {
            let first = block * ROWS;
            let rows = ROWS.min(q_len - first);
            let product = Product {
                source: Strided {
                    data: q[head * q_at.head + first * q_at.position..].as_ptr(),
                    stride: q_at.position,
                    k: head_dim,
                },
                rows,
                columns: kv_len,
                panels: Panels { data: keys.as_ptr(), plain_stride: 0 },
                c: Shareable(scores.as_mut_ptr()),
                c_stride: score_stride,
                bias: std::ptr::null(),
                residual: std::ptr::null(),
                residual_stride: 0,
                activation: Activation::None,
            };
            product.run_part(pool, 0..rows, 0..kv_len.div_ceil(PANEL));
            if let Some(offset) = causal {
                for (r, row) in scores.chunks_exact_mut(score_stride.max(1)).take(rows).enumerate() {
                    let seen = (first + r + offset + 1).min(kv_len);
                    let hidden = if scale < 0.0 { f32::INFINITY } else { f32::NEG_INFINITY };
                    row[seen..kv_len].fill(hidden);
                }
            }
            let mask_row =
                mask.map(|m| (&m.data[head * m.head_stride + first * m.row_stride..], m.row_stride));
            dispatch(
                pool.isa(),
                SoftmaxRows {
                    input: scores.as_ptr(),
                    in_stride: score_stride,
                    output: scores.as_mut_ptr(),
                    out_stride: score_stride,
                    rows,
                    n: kv_len,
                    scale,
                    mask: mask_row.map_or(std::ptr::null(), |m| m.0.as_ptr()),
                    mask_stride: mask_row.map_or(0, |m| m.1),
                },
            );
            let product = Product {
                source: Strided { data: scores.as_ptr(), stride: score_stride, k: kv_len },
                rows,
                columns: value_dim,
                panels: values,
                c: Shareable(out.get().wrapping_add(head * out_at.head + first * out_at.position)),
                c_stride: out_at.position,
                bias: std::ptr::null(),
                residual: std::ptr::null(),
                residual_stride: 0,
                activation: Activation::None,
            };
            product.run_part(pool, 0..rows, 0..value_dim.div_ceil(PANEL));
        }
    };
    if work < 200_000 {
        return (0..heads * pieces).for_each(|index| task(index, 0));
    }
    pool.parallel_for(heads * pieces, &task);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Isa;
    use crate::gemm::tests::{close, values};
    use proptest::prelude::*;

    const ISAS: [Isa; 3] = [Isa::Portable, Isa::Avx2, Isa::Avx512];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn batches_agree_with_the_triple_loop(
            batch in 1usize..7, m in 1usize..30, n in prop_oneof![1usize..70, Just(16), Just(64)], k in 1usize..40,
            transposed: bool, shared: bool, seed in 0u64..1000,
        ) {
            let a = values(batch * m * k, seed);
            let b = values(batch * k * n, seed + 1);
            let bias = values(n, seed + 2);
            let row = if transposed { k } else { n };
            let a_at = Matrices { batch_stride: m * k, row_stride: k };
            let b_at = Matrices { batch_stride: if shared { 0 } else { k * n }, row_stride: row };
            let c_at = Matrices { batch_stride: m * n, row_stride: n };
            for isa in ISAS {
                for threads in [1, 2] {
                    let pool = ThreadPool::with_isa(threads, isa);
                    let mut scratch = vec![f32::NAN; matmul_scratch_len(n, k, transposed, threads)];
                    let mut c = vec![9.0; batch * m * n];
                    let epilogue = Epilogue { bias: Some(&bias), ..Epilogue::NONE };
                    matmul(&pool, batch, [m, n, k], &a, a_at, &b, b_at, transposed, &mut c, c_at, &epilogue, &mut scratch);
                    for (i, &got) in c.iter().enumerate() {
                        let (p, r, j) = (i / n / m, i / n % m, i % n);
                        let (mut want, mut size) = (f64::from(bias[j]), 1.0);
                        for l in 0..k {
                            let at = if transposed { j * row + l } else { l * row + j };
                            let (x, w) = (a[(p * m + r) * k + l], b[p * b_at.batch_stride + at]);
                            want += f64::from(x) * f64::from(w);
                            size += f64::from(x * w).abs();
                        }
                        prop_assert!(close(got, want, size), "{isa:?} {i}: {got}, not {want}");
                    }
                }
            }
        }

        #[test]
        fn attention_agrees_with_the_definition(
            groups in 1usize..3, kv_heads in 1usize..3, q_len in 1usize..110, kv_len in 1usize..90,
            head_dim in 1usize..40, value_dim in prop_oneof![1usize..40, Just(32)], masked: bool, causal: bool, seed in 0u64..1000,
        ) {
            let heads = groups * kv_heads;
            let shape = AttentionShape {
                heads, kv_heads, q_len, kv_len, head_dim, value_dim, scale: 0.3, causal: causal.then_some(2),
            };
            let strides = |heads: usize, dim: usize| HeadStrides { position: heads * dim + 1, head: dim };
            let (q_at, k_at) = (strides(heads, head_dim), strides(kv_heads, head_dim));
            let (v_at, out_at) = (strides(kv_heads, value_dim), strides(heads, value_dim));
            let q = values(q_len * q_at.position, seed);
            let k = values(kv_len * k_at.position, seed + 1);
            let v = values(kv_len * v_at.position, seed + 2);
            let addends = values(heads * q_len * kv_len, seed + 3);
            let mask = masked.then_some(AttentionMask { data: &addends, head_stride: q_len * kv_len, row_stride: kv_len });
            for isa in ISAS {
                let mut first: Option<Vec<f32>> = None;
                for threads in [1, 3] {
                    let pool = ThreadPool::with_isa(threads, isa);
                    let mut scratch = vec![f32::NAN; attention_scratch_len(&shape, threads)];
                    let mut out = vec![9.0; q_len * out_at.position];
                    attention(&pool, &shape, &q, q_at, &k, k_at, &v, v_at, mask, &mut out, out_at, &mut scratch);
                    for h in 0..heads {
                        let g = h / groups;
                        for i in 0..q_len {
                            let seen = if causal { (i + 3).min(kv_len) } else { kv_len };
                            let scores: Vec<f64> = (0..seen).map(|j| {
                                let dot: f64 = (0..head_dim).map(|d| {
                                    f64::from(q[i * q_at.position + h * head_dim + d]) * f64::from(k[j * k_at.position + g * head_dim + d])
                                }).sum();
                                dot * 0.3f32 as f64 + if masked { f64::from(addends[(h * q_len + i) * kv_len + j]) } else { 0.0 }
                            }).collect();
                            let sum: f64 = scores.iter().map(|s| s.exp()).sum();
                            for d in 0..value_dim {
                                let want: f64 = (0..seen).map(|j| scores[j].exp() / sum * f64::from(v[j * v_at.position + g * value_dim + d])).sum();
                                let got = out[i * out_at.position + h * value_dim + d];
                                prop_assert!(close(got, want, 1.0), "{isa:?} head {h} row {i}: {got}, not {want}");
                            }
                        }
                    }
                    if let Some(first) = &first {
                        prop_assert_eq!(first, &out);
                    }
                    first = Some(out);
                }
            }
        }
    }
}
