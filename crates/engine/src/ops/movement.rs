use lightering_graph::{Op, PadMode, ScatterReduction, TensorType};
use lightering_kernels::ops::{self, Along, Binary, Padding, row_major};

use super::operands::{integer_scalar, normal_axis, optional, required};
use super::{OpContext, OpError, TensorView, TensorViewMut};

fn invalid(problem: impl Into<String>) -> OpError {
    OpError::Invalid(problem.into())
}

/// An optional operand as integers.
pub(super) fn integers(inputs: &[Option<TensorView>], index: usize) -> Option<Vec<i64>> {
    optional(inputs, index).map(|x| ops::block::to_vec::<i64>(&x))
}

fn merging(reduction: ScatterReduction) -> Option<Binary> {
    match reduction {
        ScatterReduction::None => None,
        ScatterReduction::Add => Some(Binary::Add),
        ScatterReduction::Mul => Some(Binary::Mul),
        ScatterReduction::Max => Some(Binary::Max),
        ScatterReduction::Min => Some(Binary::Min),
    }
}

/// Copies with the axes in another order: result axis i is source axis `perm[i]`, after `x` is read as `dims`.
fn permuted(
    context: &OpContext,
    x: &TensorView,
    dims: &[usize],
    perm: &[usize],
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let strides = row_major(dims);
    let mut seen = vec![false; dims.len()];
    for &p in perm {
        if p >= dims.len() || std::mem::replace(&mut seen[p], true) {
            return Err(invalid(format!("{perm:?} is no order of {} axes", dims.len())));
        }
    }
    if perm.len() != dims.len() {
        return Err(invalid(format!("{perm:?} is no order of {} axes", dims.len())));
    }
    let result: Vec<usize> = perm.iter().map(|&p| dims[p]).collect();
    let strides: Vec<isize> = perm.iter().map(|&p| strides[p]).collect();
    ops::strided(context.threads, x, 0, &result, &strides, y)
}

fn slice(inputs: &[Option<TensorView>], y: &mut TensorViewMut, context: &OpContext) -> Result<(), OpError> {
    let x = required(inputs, 0, "x")?;
    let starts = integers(inputs, 1).ok_or_else(|| invalid("operand 1 (starts) is missing"))?;
    let axes = integers(inputs, 3).unwrap_or_else(|| (0..starts.len() as i64).collect());
    let steps = integers(inputs, 4).unwrap_or_else(|| vec![1; starts.len()]);
    if axes.len() != starts.len() || steps.len() != starts.len() {
        return Err(invalid(format!("{} starts, {} axes, {} steps", starts.len(), axes.len(), steps.len())));
    }
    if y.is_empty() {
        return Ok(());
    }
    let mut strides = row_major(x.dims);
    let mut base = 0;
    for ((&start, &axis), &step) in starts.iter().zip(&axes).zip(&steps) {
        let axis = normal_axis(axis, x.dims.len())?;
        let size = x.dims[axis] as i64;
        let start = if start < 0 { start.saturating_add(size) } else { start };
        let start = if step < 0 { start.clamp(0, size - 1) } else { start.clamp(0, size) };
        base += start as usize * strides[axis] as usize;
        strides[axis] = isize::try_from(step)
            .ok()
            .and_then(|s| s.checked_mul(strides[axis]))
            // A step beyond the operand is never taken.
            .unwrap_or(0);
        if y.dims.get(axis) == Some(&1) {
            strides[axis] = 0;
        }
    }
    let dims = y.dims;
    ops::strided(context.threads, &x, base, dims, &strides, y)
}

fn pad(mode: PadMode, inputs: &[Option<TensorView>], y: &mut TensorViewMut) -> Result<(), OpError> {
    let x = required(inputs, 0, "x")?;
    let rank = x.dims.len();
    let pads = integers(inputs, 1).ok_or_else(|| invalid("operand 1 (pads) is missing"))?;
    let axes = integers(inputs, 3).unwrap_or_else(|| (0..rank as i64).collect());
    if pads.len() != 2 * axes.len() {
        return Err(invalid(format!("{} pads for {} axes", pads.len(), axes.len())));
    }
    let mode = match mode {
        PadMode::Constant => Padding::Constant,
        PadMode::Edge => Padding::Edge,
        PadMode::Reflect => Padding::Reflect,
        PadMode::Wrap => Padding::Wrap,
    };
    let (mut before, mut after) = (vec![0; rank], vec![0; rank]);
    for (i, &axis) in axes.iter().enumerate() {
        let axis = normal_axis(axis, rank)?;
        (before[axis], after[axis]) = (pads[i], pads[i + axes.len()]);
    }
    let maps: Vec<Vec<i64>> = (0..rank)
        .map(|axis| {
            // The result is as large as it was inferred, so that a map cannot grow beyond it.
            let size =
                (x.dims[axis] as i64).checked_add(before[axis]).and_then(|s| s.checked_add(after[axis]));
            if size != y.dims.get(axis).map(|&d| d as i64) {
                return Err(invalid(format!("padding {:?} does not give {:?}", x.dims, y.dims)));
            }
            ops::pad_map(x.dims[axis], before[axis], after[axis], mode)
        })
        .collect::<Result<_, _>>()?;
    let zero = [0u8; 16];
    let value = optional(inputs, 2).filter(|v| !v.is_empty());
    let fill = match &value {
        Some(v) if v.dtype == x.dtype => &v.bytes[..x.dtype.size_bytes()],
        Some(v) => return Err(invalid(format!("Pad of {} with {}", x.dtype, v.dtype))),
        None => &zero[..x.dtype.size_bytes()],
    };
    ops::mapped(&x, &maps, fill, y)
}

fn center_crop_pad(
    axes: Option<&[i64]>,
    inputs: &[Option<TensorView>],
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let x = required(inputs, 0, "x")?;
    let rank = x.dims.len();
    if y.dims.len() != rank || axes.is_some_and(|a| a.len() > rank) {
        return Err(invalid(format!("CenterCropPad of {:?} does not give {:?}", x.dims, y.dims)));
    }
    let maps: Vec<Vec<i64>> = (0..rank)
        .map(|axis| {
            let (from, to) = (x.dims[axis] as i64, y.dims[axis] as i64);
            let first = if from >= to { (from - to) / 2 } else { -((to - from) / 2) };
            (0..to).map(|i| if (0..from).contains(&(i + first)) { i + first } else { -1 }).collect()
        })
        .collect();
    ops::mapped(&x, &maps, &[0; 16][..x.dtype.size_bytes()], y)
}

fn split(
    axis: i64,
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
) -> Result<(), OpError> {
    let x = required(inputs, 0, "x")?;
    let axis = normal_axis(axis, x.dims.len())?;
    let sizes: Vec<usize> = match integers(inputs, 1) {
        Some(sizes) => sizes
            .into_iter()
            .map(|s| usize::try_from(s).map_err(|_| invalid(format!("a part of size {s}"))))
            .collect::<Result<_, _>>()?,
        None => {
            let part = x.dims[axis].div_ceil(outputs.len().max(1));
            (0..outputs.len()).map(|i| part.min(x.dims[axis].saturating_sub(i * part))).collect()
        }
    };
    if sizes.len() != outputs.len() {
        return Err(invalid(format!("{} sizes for {} parts", sizes.len(), outputs.len())));
    }
    let mut offset = 0usize;
    for (output, size) in outputs.iter_mut().zip(sizes) {
        if let Some(y) = output {
            ops::split_part(&x, axis, offset, y)?;
        }
        offset = offset.saturating_add(size);
    }
    Ok(())
}

fn concat(axis: i64, inputs: &[Option<TensorView>], y: &mut TensorViewMut) -> Result<(), OpError> {
    let axis = normal_axis(axis, y.dims.len())?;
    let mut offset = 0;
    for x in inputs.iter().flatten() {
        ops::concat_part(x, axis, offset, y)?;
        offset += x.dims[axis];
    }
    if offset != y.dims[axis] {
        return Err(invalid(format!("the parts sum to {offset}, expected {}", y.dims[axis])));
    }
    Ok(())
}

fn blocks(x: &TensorView) -> Result<[usize; 4], OpError> {
    x.dims.try_into().map_err(|_| invalid(format!("expected four dimensions, found {:?}", x.dims)))
}

/// Computes the operators that move elements.
pub(super) fn compute(
    op: &Op,
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
    workspace: &mut [u8],
    context: &OpContext,
) -> Result<(), OpError> {
    if let Op::Split { axis } = op {
        return split(*axis, inputs, outputs);
    }
    if let Op::TopK { axis, largest, .. } = op {
        return top_k(*axis, *largest, inputs, outputs, workspace);
    }
    let Some(y) = outputs.first_mut().and_then(Option::as_mut) else { return Ok(()) };
    let x = required(inputs, 0, "x")?;
    let rank = x.dims.len();
    match op {
        Op::Reshape { .. } | Op::Flatten { .. } | Op::Squeeze | Op::Unsqueeze => ops::copy(&x, y),
        Op::Transpose { perm } => match perm {
            Some(perm) => permuted(context, &x, x.dims, perm, y),
            None => permuted(context, &x, x.dims, &(0..rank).rev().collect::<Vec<_>>(), y),
        },
        Op::Expand => {
            let dims = y.dims;
            let skip = dims.len().checked_sub(rank).ok_or_else(|| invalid("Expand to fewer dimensions"))?;
            let own = row_major(x.dims);
            let mut strides = vec![0; dims.len()];
            for axis in 0..rank {
                if x.dims[axis] == dims[skip + axis] {
                    strides[skip + axis] = own[axis];
                } else if x.dims[axis] != 1 {
                    return Err(invalid(format!("{:?} does not broadcast to {dims:?}", x.dims)));
                }
            }
            ops::strided(context.threads, &x, 0, dims, &strides, y)
        }
        Op::Tile => {
            let own = row_major(x.dims);
            let (mut dims, mut strides) = (Vec::new(), Vec::new());
            for axis in 0..rank {
                let repeats = y.dims.get(axis).map_or(0, |d| d.checked_div(x.dims[axis]).unwrap_or(0));
                dims.extend([repeats, x.dims[axis]]);
                strides.extend([0, own[axis]]);
            }
            ops::strided(context.threads, &x, 0, &dims, &strides, y)
        }
        Op::Concat { axis } => concat(*axis, inputs, y),
        Op::Slice => slice(inputs, y, context),
        Op::Pad { mode } => pad(*mode, inputs, y),
        Op::Gather { axis } => {
            ops::gather(&x, &required(inputs, 1, "indices")?, normal_axis(*axis, rank)?, y)
        }
        Op::GatherElements { axis } => {
            ops::gather_elements(&x, &required(inputs, 1, "indices")?, normal_axis(*axis, rank)?, y)
        }
        Op::GatherNd { batch_dims } => ops::gather_nd(&x, &required(inputs, 1, "indices")?, *batch_dims, y),
        Op::ScatterElements { axis, reduction } => {
            let (indices, updates) = (required(inputs, 1, "indices")?, required(inputs, 2, "updates")?);
            ops::scatter_elements(&x, &indices, &updates, normal_axis(*axis, rank)?, merging(*reduction), y)
        }
        Op::ScatterNd { reduction } => {
            let (indices, updates) = (required(inputs, 1, "indices")?, required(inputs, 2, "updates")?);
            ops::scatter_nd(&x, &indices, &updates, merging(*reduction), y)
        }
        Op::TensorScatter { axis, circular } => {
            let (update, starts) = (required(inputs, 1, "update")?, optional(inputs, 2));
            let axis = normal_axis(*axis, rank)?;
            ops::tensor_scatter(&x, &update, starts.as_ref(), axis, *circular, y)
        }
        Op::DepthToSpace { block: b, crd } => {
            let [n, c, h, w] = blocks(&x)?;
            if *b == 0 || c % (b * b) != 0 {
                return Err(invalid(format!("{c} channels do not split into blocks of {b}²")));
            }
            if *crd {
                permuted(context, &x, &[n, c / (b * b), *b, *b, h, w], &[0, 1, 4, 2, 5, 3], y)
            } else {
                permuted(context, &x, &[n, *b, *b, c / (b * b), h, w], &[0, 3, 4, 1, 5, 2], y)
            }
        }
        Op::SpaceToDepth { block: b } => {
            let [n, c, h, w] = blocks(&x)?;
            if *b == 0 || h % b != 0 || w % b != 0 {
                return Err(invalid(format!("{h}×{w} does not split into blocks of {b}")));
            }
            permuted(context, &x, &[n, c, h / b, *b, w / b, *b], &[0, 3, 5, 1, 2, 4], y)
        }
        Op::CenterCropPad { axes } => center_crop_pad(axes.as_deref(), inputs, y),
        Op::ReverseSequence { batch_axis, time_axis } => {
            ops::reverse_sequence(&x, &required(inputs, 1, "lengths")?, *batch_axis, *time_axis, y)
        }
        Op::Trilu { upper } => {
            let k = optional(inputs, 1).map_or(Ok(0), |k| integer_scalar(&k, "k"))?;
            ops::triangle(*upper, k, &x, y)
        }
        Op::EyeLike { k, .. } => ops::eye(*k, y),
        Op::OneHot { axis } => {
            let axis = normal_axis(*axis, rank + 1)?;
            ops::one_hot(&x, &required(inputs, 2, "values")?, axis, y)
        }
        Op::Range => ops::range(&x, &required(inputs, 2, "delta")?, y),
        Op::ConstantOfShape { value } => {
            let size = y.dtype.size_bytes();
            if value.dtype() != y.dtype || value.len() != 1 {
                return Err(invalid(format!(
                    "the value is {}, expected one {}",
                    value.tensor_type(),
                    y.dtype
                )));
            }
            y.bytes.chunks_mut(size).for_each(|out| out.copy_from_slice(value.as_bytes()));
            Ok(())
        }
        Op::Shape { start, end } => {
            let clamp = |i: i64| {
                let i = if i < 0 { i.saturating_add(rank as i64) } else { i };
                i.clamp(0, rank as i64) as usize
            };
            let (start, end) = (clamp(*start), end.map_or(rank, clamp));
            let sizes: Vec<i64> =
                x.dims.get(start..end).unwrap_or_default().iter().map(|&d| d as i64).collect();
            let out = y.as_mut_slice::<i64>();
            if out.len() != sizes.len() {
                return Err(invalid(format!("{} sizes, expected {}", sizes.len(), out.len())));
            }
            out.copy_from_slice(&sizes);
            Ok(())
        }
        Op::Size => {
            y.as_mut_slice::<i64>().fill(x.len() as i64);
            Ok(())
        }
        other => Err(super::no_kernel(other)),
    }
}

fn top_k(
    axis: i64,
    largest: bool,
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
    workspace: &mut [u8],
) -> Result<(), OpError> {
    let x = required(inputs, 0, "x")?;
    let along = Along::new(x.dims, normal_axis(axis, x.dims.len())?);
    let (values, indices) = outputs.split_at_mut(1);
    let Some(values) = values[0].as_mut() else {
        return Err(OpError::Unsupported("TopK without its values".to_owned()));
    };
    let indices = indices.first_mut().and_then(Option::as_mut);
    let keys = super::operands::scratch(workspace, along.size)?;
    ops::top_k(largest, along, &x, values, indices, keys)
}

/// Scratch bytes of these operators.
pub(super) fn workspace_bytes(op: &Op, inputs: &[Option<&TensorType>]) -> usize {
    let Op::TopK { axis, .. } = op else { return 0 };
    let dims = inputs.first().copied().flatten().and_then(TensorType::dims).unwrap_or_default();
    normal_axis(*axis, dims.len()).map_or(0, |axis| dims[axis].saturating_mul(16))
}
