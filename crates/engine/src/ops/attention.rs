//! Attention and rotary position embedding.

use lightering_graph::{AttentionAttributes, DType, Op, QkOutput, TensorType};
use lightering_kernels::ThreadPool;
use lightering_kernels::ops::attention::{
    AttentionOperands, AttentionShape, HeadRows, Mask, MaskValues, RotaryShape, ScoreStage, attention,
    rotary_embedding,
};
use lightering_kernels::ops::real::Real;
use lightering_units::Bytes;

use super::operands::*;
use super::{OpError, TensorView, TensorViewMut};

/// Dispatch of this family.
pub(super) fn compute(
    op: &Op,
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
    workspace: &mut [u8],
    pool: &ThreadPool,
) -> Result<(), OpError> {
    match op {
        Op::Attention(a) => {
            let dtype = required(inputs, 0, "q")?.dtype;
            with_real!(dtype, T => run_attention::<T>(a, inputs, outputs, workspace, pool))
        }
        Op::RotaryEmbedding { interleaved, num_heads, rotary_dim } => {
            let Some(Some(out)) = outputs.first_mut() else { return Ok(()) };
            with_real!(out.dtype, T => run_rotary::<T>(*interleaved, *num_heads, *rotary_dim, inputs, out))
        }
        _ => Err(super::no_kernel(op)),
    }
}

/// Scratch of this family.
pub(super) fn workspace_bytes(op: &Op, inputs: &[Option<&TensorType>], threads: usize) -> Bytes {
    let Op::Attention(a) = op else { return Bytes::ZERO };
    let dims = |i: usize| inputs.get(i).copied().flatten().and_then(TensorType::dims);
    let (Some(q), Some(k), Some(v)) = (dims(0), dims(1), dims(2)) else { return Bytes::ZERO };
    match shape_of(a, &q, &k, &v, dims(4).as_deref()) {
        Ok(shape) => Bytes((4 * shape.scratch_len() * threads.max(1)) as u64),
        Err(_) => Bytes::ZERO,
    }
}

fn head_rows(dims: &[usize], heads: usize, name: &str) -> Result<(usize, HeadRows), OpError> {
    match *dims {
        [batch, heads, sequence, size] => Ok((batch, HeadRows { heads, sequence, size, packed: false })),
        [batch, sequence, width] if heads > 0 && width.is_multiple_of(heads) => {
            Ok((batch, HeadRows { heads, sequence, size: width / heads, packed: true }))
        }
        _ => invalid(format!("{name} has shape {dims:?} for {heads} heads, expected 3 or 4 dimensions")),
    }
}

/// Sizes of an attention whose operands have these shapes.
pub(super) fn shape_of(
    a: &AttentionAttributes,
    q: &[usize],
    k: &[usize],
    v: &[usize],
    past: Option<&[usize]>,
) -> Result<AttentionShape, OpError> {
    let (batch, query) = head_rows(q, a.q_num_heads, "q")?;
    let (k_batch, key) = head_rows(k, a.kv_num_heads, "k")?;
    let (v_batch, value) = head_rows(v, a.kv_num_heads, "v")?;
    let past = past.map_or(Ok(0), |d| match *d {
        [_, _, n, _] => Ok(n),
        _ => invalid(format!("past_key has shape {d:?}, expected 4 dimensions")),
    })?;
    let fits = k_batch == batch
        && v_batch == batch
        && key.size == query.size
        && key.sequence == value.sequence
        && key.heads == value.heads
        && key.heads > 0
        && query.heads.is_multiple_of(key.heads);
    if !fits {
        return invalid(format!("attention of q {q:?}, k {k:?} and v {v:?}"));
    }
    Ok(AttentionShape {
        batch,
        query,
        key,
        value,
        past,
        scale: a.scale.unwrap_or(1.0 / (query.size as f32).sqrt()),
        softcap: a.softcap,
        causal: a.causal,
        stage: match a.qk_output {
            QkOutput::Raw => ScoreStage::Raw,
            QkOutput::Masked => ScoreStage::Masked,
            QkOutput::Capped => ScoreStage::Capped,
            QkOutput::Softmax => ScoreStage::Softmax,
        },
    })
}

fn run_attention<T: Real>(
    a: &AttentionAttributes,
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
    workspace: &mut [u8],
    pool: &ThreadPool,
) -> Result<(), OpError> {
    let (q, k, v) = (required(inputs, 0, "q")?, required(inputs, 1, "k")?, required(inputs, 2, "v")?);
    let (past_key, past_value) = (optional(inputs, 4), optional(inputs, 5));
    for (view, name) in [(&q, "q"), (&k, "k"), (&v, "v")] {
        expect_dtype(view, T::DTYPE, name)?;
    }
    let shape = shape_of(a, q.dims, k.dims, v.dims, past_key.map(|p| p.dims))?;
    if past_key.is_some() != past_value.is_some() {
        return invalid("past_key and past_value come together or not at all");
    }
    for (past, rows, name) in [(past_key, shape.key, "past_key"), (past_value, shape.value, "past_value")] {
        if let Some(past) = past {
            expect_dtype(&past, T::DTYPE, name)?;
            expect_dims(past.dims, &[shape.batch, rows.heads, shape.past, rows.size], name)?;
        }
    }
    let keys = shape.keys();
    let mask = match optional(inputs, 3) {
        None => None,
        Some(m) => Some(mask_of::<T>(&m, [shape.batch, shape.query.heads, shape.query.sequence, keys])?),
    };
    let key_lengths = match optional(inputs, 6) {
        None => None,
        Some(l) => {
            expect_dtype(&l, DType::I64, "nonpad_kv_seqlen")?;
            expect_dims(l.dims, &[shape.batch], "nonpad_kv_seqlen")?;
            Some(l.as_slice::<i64>())
        }
    };
    let operands = AttentionOperands {
        query: q.as_slice::<T>(),
        key: k.as_slice::<T>(),
        value: v.as_slice::<T>(),
        past_key: past_key.map(|p| p.as_slice()).unwrap_or_default(),
        past_value: past_value.map(|p| p.as_slice()).unwrap_or_default(),
        mask,
        key_lengths,
    };
    let [out, present_key, present_value, scores] = &mut take4(outputs);
    let presents = [
        (present_key, operands.past_key, operands.key, shape.key, "present_key"),
        (present_value, operands.past_value, operands.value, shape.value, "present_value"),
    ];
    for (present, past, new, rows, name) in presents {
        if let Some(present) = present {
            expect_dims(present.dims, &[shape.batch, rows.heads, keys, rows.size], name)?;
            append(shape.batch, shape.past, rows, past, new, present.as_mut_slice::<T>());
        }
    }
    if let Some(scores) = scores {
        expect_dims(
            scores.dims,
            &[shape.batch, shape.query.heads, shape.query.sequence, keys],
            "the scores",
        )?;
    }
    let scratch = scratch::<f32>(workspace, shape.scratch_len() * pool.threads())?;
    let scores = scores.as_mut().map(|s| s.as_mut_slice::<T>());
    match out {
        Some(out) => {
            let rows = shape.batch * shape.query.heads * shape.query.sequence;
            expect_count(out.dims, rows * shape.value.size, "the result")?;
            attention(pool, &shape, &operands, out.as_mut_slice::<T>(), scores, scratch);
            Ok(())
        }
        None => unsupported("attention whose first result nobody wants"),
    }
}

/// The first four results.
fn take4<'a, 'b>(outputs: &'b mut [Option<TensorViewMut<'a>>]) -> [Option<&'b mut TensorViewMut<'a>>; 4] {
    let mut all = outputs.iter_mut();
    std::array::from_fn(|_| all.next().and_then(Option::as_mut))
}

/// How a mask is read.
pub(super) fn mask_of<'a, T: Real>(m: &TensorView<'a>, full: [usize; 4]) -> Result<Mask<'a, T>, OpError> {
    let values = match m.dtype {
        DType::Bool => MaskValues::Seen(m.as_slice()),
        other if other == T::DTYPE => MaskValues::Bias(m.as_slice()),
        other => return unsupported(format!("a mask of element type {other}")),
    };
    if m.dims.is_empty() || m.dims.len() > 4 {
        return invalid(format!("the mask has shape {:?}, expected 1 to 4 dimensions", m.dims));
    }
    let (mut strides, mut stride) = ([0; 4], 1);
    let mut keys = full[3];
    for (back, &size) in m.dims.iter().rev().enumerate() {
        let axis = 3 - back;
        // A mask may talk of fewer keys than there are; the others are not seen.
        let short = axis == 3 && size > 1 && size < full[3];
        if size != full[axis] && size != 1 && !short {
            return invalid(format!(
                "the mask has shape {:?}, expected one that broadcasts to {full:?}",
                m.dims
            ));
        }
        if short {
            keys = size;
        }
        strides[axis] = if size == 1 { 0 } else { stride };
        stride *= size;
    }
    Ok(Mask { values, strides, keys })
}

/// The cached rows, then the new ones, per head.
fn append<T: Real>(batch: usize, past: usize, rows: HeadRows, old: &[T], new: &[T], out: &mut [T]) {
    let (size, keys) = (rows.size, past + rows.sequence);
    for b in 0..batch {
        for h in 0..rows.heads {
            let head = b * rows.heads + h;
            let out = &mut out[head * keys * size..][..keys * size];
            out[..past * size].copy_from_slice(&old[head * past * size..][..past * size]);
            for (i, out) in out[past * size..].chunks_exact_mut(size.max(1)).enumerate() {
                out.copy_from_slice(&new[rows.offset(b, h, i)..][..size]);
            }
        }
    }
}

fn run_rotary<T: Real>(
    interleaved: bool,
    num_heads: usize,
    rotary_dim: usize,
    inputs: &[Option<TensorView>],
    out: &mut TensorViewMut,
) -> Result<(), OpError> {
    let (x, cos, sin) = (required(inputs, 0, "x")?, required(inputs, 1, "cos")?, required(inputs, 2, "sin")?);
    for (view, name) in [(&x, "x"), (&cos, "cos_cache"), (&sin, "sin_cache")] {
        expect_dtype(view, T::DTYPE, name)?;
    }
    expect_dims(out.dims, x.dims, "the result")?;
    expect_dims(sin.dims, cos.dims, "sin_cache")?;
    let (batch, rows) = head_rows(x.dims, num_heads, "x")?;
    let rotated = if rotary_dim == 0 { rows.size } else { rotary_dim };
    let cache_stride = cos.dims.last().copied().unwrap_or(0);
    if rotated > rows.size || !rotated.is_multiple_of(2) || cache_stride < rotated / 2 {
        return invalid(format!("{rotated} rotated elements of {} with caches {:?}", rows.size, cos.dims));
    }
    let shape = RotaryShape { rows, rotated, interleaved, cache_stride };
    let cache_rows = count(&cos.dims[..cos.dims.len() - 1]);
    let (x, cos, sin) = (x.as_slice::<T>(), cos.as_slice::<T>(), sin.as_slice::<T>());
    let out = out.as_mut_slice::<T>();
    if let Some(positions) = optional(inputs, 3) {
        expect_dims(positions.dims, &[batch, rows.sequence], "position_ids")?;
        expect_dtype(&positions, DType::I64, "position_ids")?;
        let positions: &[i64] = positions.as_slice();
        if let Some(bad) = positions.iter().find(|&&p| p < 0 || p as usize >= cache_rows) {
            return invalid(format!("position {bad} with caches of {cache_rows} rows"));
        }
        rotary_embedding(&shape, x, cos, sin, |b, i| positions[b * rows.sequence + i] as usize, out);
    } else {
        if cache_rows != batch * rows.sequence {
            return invalid(format!("caches of {cache_rows} rows for {batch} × {} positions", rows.sequence));
        }
        rotary_embedding(&shape, x, cos, sin, |b, i| b * rows.sequence + i, out);
    }
    Ok(())
}
