use lightering_graph::{CacheFormat, CachedAttentionAttributes, LmOp, RopeScaling, RouteScoring, TensorType};
use lightering_kernels::{
    self as kernels, BlockActivations, CachePart, CacheRows, CachedAttentionShape, RopePairing, RopeShape,
    Scoring, ThreadPool, block_matmul_scratch_len, cached_attention, cached_attention_scratch_len,
    choose_experts, dequantize_row, rope_angles, rotate, store_in_cache,
};
use lightering_units::{BlockFormat, Bytes};

use super::operands::{optional, required};
use super::{OpContext, OpError, TensorView, TensorViewMut, only};

/// Computes operators of decoder language models.
pub(super) fn compute(
    op: &LmOp,
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
    workspace: &mut [u8],
    context: &OpContext,
) -> Result<(), OpError> {
    let pool = context.threads;
    match op {
        LmOp::BlockMatMul { format } => {
            let (x, w) = (required(inputs, 0, "x")?, required(inputs, 1, "w")?);
            let n = w.dims[0];
            let bias = optional(inputs, 2).map(|b| bytemuck::cast_slice(b.bytes));
            let (x, y) = (bytemuck::cast_slice(x.bytes), only(outputs)?.as_mut_slice());
            let k = row_len(*format, w.bytes.len() / n.max(1));
            block_matmul(pool, *format, [k, n], x, w.bytes, bias, y, n, workspace);
        }
        LmOp::BlockGather { format } => {
            let (table, ids) = (required(inputs, 0, "table")?, required(inputs, 1, "ids")?);
            let ids: &[i32] = bytemuck::cast_slice(ids.bytes);
            let rows = table.dims[0];
            let row_bytes = table.bytes.len() / rows.max(1);
            let y: &mut [f32] = only(outputs)?.as_mut_slice();
            let width = y.len() / ids.len().max(1);
            for (id, y) in ids.iter().zip(y.chunks_exact_mut(width.max(1))) {
                let row = row_of(*id, rows)?;
                dequantize_row(*format, &table.bytes[row * row_bytes..][..row_bytes], y);
            }
        }
        LmOp::RopeAngles { dims, base, scaling, magnitude } => {
            let positions = required(inputs, 0, "positions")?;
            let factors = optional(inputs, 1).map(|f| bytemuck::cast_slice(f.bytes));
            let scaling = match *scaling {
                _ if factors.is_some() => kernels::RopeScaling::Factors {
                    factors: factors.unwrap_or_default(),
                    magnitude: *magnitude,
                },
                RopeScaling::None => kernels::RopeScaling::None,
                RopeScaling::Linear { factor } => kernels::RopeScaling::Linear { factor },
                RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow } => {
                    kernels::RopeScaling::Yarn {
                        factor,
                        original_context,
                        beta_fast,
                        beta_slow,
                        magnitude: *magnitude,
                    }
                }
            };
            let y = only(outputs)?.as_mut_slice();
            rope_angles(bytemuck::cast_slice(positions.bytes), *dims, *base, &scaling, y);
        }
        LmOp::Rope { heads, offset, interleaved } => {
            let (x, angles) = (required(inputs, 0, "x")?, required(inputs, 1, "angles")?);
            let dims = angles.dims[1];
            let head_len = x.dims[1] / (*heads).max(1);
            let y: &mut [f32] = only(outputs)?.as_mut_slice();
            y.copy_from_slice(bytemuck::cast_slice(x.bytes));
            let pairing = if *interleaved { RopePairing::Interleaved } else { RopePairing::Halves };
            let shape = RopeShape { dims, offset: *offset, ..RopeShape::whole(*heads, head_len, pairing) };
            rotate(pool, &shape, y, x.dims[0], bytemuck::cast_slice(angles.bytes));
        }
        LmOp::HeadMatMul { format, heads } => {
            let (x, w) = (required(inputs, 0, "x")?, required(inputs, 1, "w")?);
            let (rows, len, n) = (x.dims[0], x.dims[1] / heads, w.dims[0] / heads);
            let row_bytes = w.bytes.len() / w.dims[0].max(1);
            let k = row_len(*format, row_bytes);
            let x: &[f32] = bytemuck::cast_slice(x.bytes);
            let y: &mut [f32] = only(outputs)?.as_mut_slice();
            let (of_head, scratch) = bytemuck::cast_slice_mut(workspace).split_at_mut(rows * k);
            for head in 0..*heads {
                for (to, from) in of_head.chunks_exact_mut(k.max(1)).zip(x.chunks_exact(heads * len)) {
                    to.copy_from_slice(&from[head * len..][..k]);
                }
                let w = &w.bytes[head * n * row_bytes..][..n * row_bytes];
                BlockActivations::new(pool, *format, k, of_head, rows, scratch).matmul(
                    pool,
                    *format,
                    w,
                    n,
                    &mut y[head * n..],
                    heads * n,
                );
            }
        }
        LmOp::JoinHeads { heads, pieces } => {
            let y: &mut [f32] = only(outputs)?.as_mut_slice();
            let len: usize = pieces.iter().map(|p| p.len).sum();
            let mut at = 0;
            for piece in pieces {
                let x = required(inputs, piece.input, "a piece's operand")?;
                let (width, of) = (x.dims[1], if piece.shared { 1 } else { *heads });
                let x: &[f32] = bytemuck::cast_slice(x.bytes);
                for (y, x) in y.chunks_exact_mut((heads * len).max(1)).zip(x.chunks_exact(width.max(1))) {
                    for head in 0..*heads {
                        let from = if piece.shared { 0 } else { head * (width / of) } + piece.offset;
                        y[head * len + at..][..piece.len].copy_from_slice(&x[from..][..piece.len]);
                    }
                }
                at += piece.len;
            }
        }
        LmOp::CacheStore { values, format, heads, page_len } => {
            let rows = required(inputs, 1, "rows")?;
            let places = cache_rows(inputs, 2)?;
            let cache = only(outputs)?;
            places.verify(|position| position, *page_len, cache.dims[0]).map_err(OpError::Invalid)?;
            let len = rows.dims[1] / (*heads).max(1);
            let part = if *values { CachePart::Values } else { CachePart::Keys };
            let x = bytemuck::cast_slice(rows.bytes);
            let format = cache_format(*format);
            store_in_cache(pool, part, format, *heads, len, *page_len, x, places, cache.bytes);
        }
        LmOp::CachedAttention(a) => {
            let (q, keys) = (required(inputs, 0, "q")?, required(inputs, 1, "keys")?);
            let values = required(inputs, 2, "values")?;
            let places = cache_rows(inputs, 3)?;
            let (shape, page_count) = (shape_of(a), keys.dims[0].min(values.dims[0]));
            places
                .verify(|position| shape.first_seen(position), a.page_len, page_count)
                .map_err(OpError::Invalid)?;
            let sinks = optional(inputs, 5).map(|s| bytemuck::cast_slice(s.bytes));
            let y = only(outputs)?.as_mut_slice();
            cached_attention(
                pool,
                &shape,
                bytemuck::cast_slice(q.bytes),
                places,
                keys.bytes,
                values.bytes,
                sinks,
                y,
                bytemuck::cast_slice_mut(workspace),
            );
        }
        LmOp::Route { k, scoring, normalise, scale } => {
            let scores = required(inputs, 0, "scores")?;
            let experts = scores.dims[1];
            let bias = optional(inputs, 1).map(|b| bytemuck::cast_slice(b.bytes));
            let scoring = match scoring {
                RouteScoring::Softmax => Scoring::Softmax,
                RouteScoring::SoftmaxOfChosen => Scoring::SoftmaxOfChosen,
                RouteScoring::Sigmoid => Scoring::Sigmoid,
            };
            let scratch: &mut [f32] = bytemuck::cast_slice_mut(workspace);
            let [Some(ids), Some(weights)] = outputs else {
                return Err(OpError::Invalid("both results of a route are needed".to_owned()));
            };
            let ids: &mut [i32] = bytemuck::cast_slice_mut(ids.bytes);
            let weights: &mut [f32] = bytemuck::cast_slice_mut(weights.bytes);
            let scores: &[f32] = bytemuck::cast_slice(scores.bytes);
            for ((scores, ids), weights) in
                scores.chunks_exact(experts).zip(ids.chunks_exact_mut(*k)).zip(weights.chunks_exact_mut(*k))
            {
                choose_experts(scores, bias, scoring, *normalise, *scale, ids, weights, scratch);
            }
        }
        LmOp::Experts { .. } => return Err(OpError::Unsupported("experts without a store".to_owned())),
    }
    Ok(())
}

/// `y[row, ..n] = x[row] · wᵀ + bias` for weights `[n, k]` in blocks, into rows of `stride` values.
pub(crate) fn block_matmul(
    pool: &ThreadPool,
    format: BlockFormat,
    [k, n]: [usize; 2],
    x: &[f32],
    w: &[u8],
    bias: Option<&[f32]>,
    y: &mut [f32],
    stride: usize,
    workspace: &mut [u8],
) {
    let rows = x.len() / k.max(1);
    let scratch = bytemuck::cast_slice_mut(workspace);
    BlockActivations::new(pool, format, k, x, rows, scratch).matmul(pool, format, w, n, y, stride);
    if let Some(bias) = bias {
        for y in y.chunks_mut(stride) {
            y.iter_mut().zip(&bias[..n]).for_each(|(y, b)| *y += b);
        }
    }
}

/// Elements of a row of so many bytes.
fn row_len(format: BlockFormat, row_bytes: usize) -> usize {
    row_bytes / format.block_bytes() * format.block_len()
}

fn row_of(id: i32, rows: usize) -> Result<usize, OpError> {
    usize::try_from(id)
        .ok()
        .filter(|&row| row < rows)
        .ok_or_else(|| OpError::Invalid(format!("token {id} is not in a vocabulary of {rows}")))
}

fn cache_format(format: CacheFormat) -> kernels::CacheFormat {
    match format {
        CacheFormat::F32 => kernels::CacheFormat::F32,
        CacheFormat::F16 => kernels::CacheFormat::F16,
        CacheFormat::Q8 => kernels::CacheFormat::Q8,
    }
}

fn shape_of(a: &CachedAttentionAttributes) -> CachedAttentionShape {
    CachedAttentionShape {
        heads: a.heads,
        kv_heads: a.kv_heads,
        key_dim: a.key_len,
        value_dim: a.value_len,
        scale: a.scale,
        softcap: a.softcap,
        window: a.window,
        format: cache_format(a.format),
        page_len: a.page_len,
    }
}

/// Where the rows of a step are in their sequences, and where those lie in the cache.
fn cache_rows<'a>(inputs: &[Option<TensorView<'a>>], at: usize) -> Result<CacheRows<'a>, OpError> {
    let (positions, pages) = (required(inputs, at, "positions")?, required(inputs, at + 1, "pages")?);
    Ok(CacheRows {
        positions: bytemuck::cast_slice(positions.bytes),
        pages: bytemuck::cast_slice(pages.bytes),
        pages_per_row: pages.dims[1],
    })
}

/// Scratch bytes of these operators.
pub(super) fn workspace_bytes(op: &LmOp, inputs: &[Option<&TensorType>], threads: usize) -> Bytes {
    let dims = |i: usize| inputs.get(i).copied().flatten().and_then(TensorType::dims).unwrap_or_default();
    let values = match op {
        LmOp::BlockMatMul { format } => match dims(0)[..] {
            [rows, k] => block_matmul_scratch_len(*format, k, rows),
            _ => 0,
        },
        LmOp::HeadMatMul { format, .. } => match (&dims(0)[..], &dims(1)[..]) {
            (&[rows, _], &[_, row_bytes]) => {
                let k = row_len(*format, row_bytes);
                rows * k + block_matmul_scratch_len(*format, k, rows)
            }
            _ => 0,
        },
        LmOp::CachedAttention(a) => match (&dims(0)[..], &dims(4)[..]) {
            ([rows, _], [_, pages]) => {
                cached_attention_scratch_len(&shape_of(a), *rows, pages * a.page_len, threads)
            }
            _ => 0,
        },
        LmOp::Route { .. } => dims(0).last().copied().unwrap_or(0),
        _ => 0,
    };
    Bytes((values * size_of::<f32>()) as u64)
}
