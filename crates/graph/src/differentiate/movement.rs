//! Operators that move elements.

use super::backward::{Backward, Step, from_front};
use super::elementwise::give_reduced;
use crate::{BinaryOp, Node, Op, PadMode, ReduceOp, ScatterReduction, Tensor, TrainOp, UnaryOp, ValueId};

pub(super) fn rule(b: &mut Backward<'_>, n: &Node, dy: &[Option<ValueId>]) -> Step {
    if let Op::Split { axis } = n.op {
        return split(b, axis, n, dy);
    }
    let Some(dy) = dy.first().copied().flatten() else { return Ok(()) };
    let x = b.node_input(n, 0)?;
    let dims = b.dims(x)?;
    let rank = dims.len();
    let dx = match &n.op {
        Op::Reshape { .. } | Op::Flatten { .. } | Op::Squeeze | Op::Unsqueeze => b.reshape(dy, &dims)?,
        Op::Transpose { perm } => {
            let perm = perm.clone().unwrap_or_else(|| (0..rank).rev().collect());
            let mut back = vec![0; rank];
            perm.iter().enumerate().for_each(|(i, &p)| back[p] = i);
            b.transpose(dy, &back)?
        }
        Op::Expand => b.reduce_to(dy, &dims)?,
        Op::Tile => {
            let out = b.dims(dy)?;
            let mut apart = Vec::new();
            for (&o, &d) in out.iter().zip(&dims) {
                apart.extend([o.checked_div(d).unwrap_or(0), d]);
            }
            let copies = b.reshape(dy, &apart)?;
            let axes: Vec<usize> = (0..rank).map(|i| 2 * i).collect();
            b.reduce(ReduceOp::Sum, copies, &axes, false)?
        }
        Op::Concat { axis } => return concat(b, *axis, n, dy),
        Op::Slice => slice(b, &dims, dy)?,
        Op::Pad { mode } => return pad(b, *mode, &dims, n, dy),
        Op::CenterCropPad { .. } => {
            let out = b.dims(dy)?;
            let first = |i: usize| {
                let (from, to) = (dims[i] as i64, out[i] as i64);
                if from >= to { (from - to) / 2 } else { -((to - from) / 2) }
            };
            let before: Vec<i64> = (0..rank).map(first).collect();
            let after: Vec<i64> = (0..rank).map(|i| dims[i] as i64 - out[i] as i64 - before[i]).collect();
            b.pad(dy, &before, &after)?
        }
        Op::Gather { axis } => {
            let indices = b.node_input(n, 1)?;
            let op = TrainOp::GatherGrad { axis: from_front(*axis, rank), input: dims };
            b.train(op, &[indices, dy])?
        }
        Op::GatherElements { axis } => {
            let indices = b.node_input(n, 1)?;
            scatter_elements(b, x, *axis, indices, dy)?
        }
        Op::GatherNd { batch_dims } => {
            let indices = b.node_input(n, 1)?;
            let indices = with_batch(b, indices, *batch_dims)?;
            let zeros = b.zeros_like(x)?;
            b.emit(Op::ScatterNd { reduction: ScatterReduction::Add }, &[zeros, indices, dy])?
        }
        Op::ScatterElements { .. } | Op::ScatterNd { .. } => return scatter(b, n, dy),
        Op::DepthToSpace { block, crd: false } => b.emit(Op::SpaceToDepth { block: *block }, &[dy])?,
        Op::DepthToSpace { block, crd: true } => {
            let &[batch, channels, height, width] = &dims[..] else {
                return b.unsupported("it is no picture");
            };
            let depth = channels / (block * block);
            let blocks = b.reshape(dy, &[batch, depth, height, *block, width, *block])?;
            let moved = b.transpose(blocks, &[0, 1, 3, 5, 2, 4])?;
            b.reshape(moved, &dims)?
        }
        Op::SpaceToDepth { block } => b.emit(Op::DepthToSpace { block: *block, crd: false }, &[dy])?,
        Op::ReverseSequence { .. } => {
            let lengths = b.node_input(n, 1)?;
            b.emit(n.op.clone(), &[dy, lengths])?
        }
        Op::Trilu { .. } => {
            let mut inputs = n.inputs.clone();
            inputs[0] = Some(dy);
            b.emit_with(n.op.clone(), inputs)?
        }
        Op::TopK { axis, .. } => {
            let indices = b.result(1)?;
            scatter_elements(b, x, *axis, indices, dy)?
        }
        _ => return b.unsupported("it has no derivative"),
    };
    b.give(0, dx)
}

fn scatter_elements(
    b: &mut Backward<'_>,
    like: ValueId,
    axis: i64,
    indices: ValueId,
    dy: ValueId,
) -> Step<ValueId> {
    let zeros = b.zeros_like(like)?;
    b.emit(Op::ScatterElements { axis, reduction: ScatterReduction::Add }, &[zeros, indices, dy])
}

/// Indices that also name the place in the leading dimensions.
fn with_batch(b: &mut Backward<'_>, indices: ValueId, batch_dims: usize) -> Step<ValueId> {
    if batch_dims == 0 {
        return Ok(indices);
    }
    let mut dims = b.dims(indices)?;
    let Some(last) = dims.last_mut() else { return Ok(indices) };
    *last = batch_dims;
    let rows: usize = dims[..dims.len() - 1].iter().product();
    let inner: usize = dims[batch_dims..dims.len() - 1].iter().product();
    let mut places = Vec::with_capacity(rows * batch_dims);
    for row in 0..rows {
        let mut rest = row / inner.max(1);
        let mut place = vec![0i64; batch_dims];
        for axis in (0..batch_dims).rev() {
            place[axis] = (rest % dims[axis]) as i64;
            rest /= dims[axis];
        }
        places.extend(place);
    }
    let places = b.constant("grad/places", Tensor::from_slice(&dims, &places));
    let indices = b.cast(indices, crate::DType::I64)?;
    b.emit(Op::Concat { axis: -1 }, &[places, indices])
}

fn concat(b: &mut Backward<'_>, axis: i64, n: &Node, dy: ValueId) -> Step {
    let mut start = 0;
    for i in 0..n.inputs.len() {
        let part = b.node_input(n, i)?;
        let dims = b.dims(part)?;
        let axis = from_front(axis, dims.len());
        let end = start + dims[axis];
        if b.wants(i) {
            let dx = b.slice(dy, axis, start, end)?;
            b.give(i, dx)?;
        }
        start = end;
    }
    Ok(())
}

fn split(b: &mut Backward<'_>, axis: i64, n: &Node, dy: &[Option<ValueId>]) -> Step {
    let x = b.node_input(n, 0)?;
    let dims = b.dims(x)?;
    let axis = from_front(axis, dims.len());
    let dtype = b.dtype(x)?;
    let sizes = match b.ints(1, "sizes")? {
        Some(sizes) => sizes.iter().map(|&s| s.max(0) as usize).collect(),
        None => {
            let part = dims[axis].div_ceil(n.outputs.len().max(1));
            let size = |i: usize| part.min(dims[axis].saturating_sub(i * part));
            (0..n.outputs.len()).map(size).collect::<Vec<usize>>()
        }
    };
    let mut parts = Vec::new();
    for (size, g) in sizes.into_iter().zip(dy) {
        parts.push(match g {
            Some(g) => *g,
            None => {
                let dims: Vec<usize> =
                    dims.iter().enumerate().map(|(i, &d)| if i == axis { size } else { d }).collect();
                b.full(0.0, &dims, dtype)?
            }
        });
    }
    let dx = b.emit(Op::Concat { axis: axis as i64 }, &parts)?;
    b.give(0, dx)
}

/// Adds up `dy` along each axis where the forward operator took it from; `None` leaves an axis alone.
fn gather_back(
    b: &mut Backward<'_>,
    dims: &[usize],
    maps: Vec<Option<Vec<i64>>>,
    dy: ValueId,
) -> Step<ValueId> {
    let mut g = dy;
    for (axis, map) in maps.into_iter().enumerate() {
        let Some(map) = map else { continue };
        let mut input = b.dims(g)?;
        input[axis] = dims[axis];
        let indices = b.list(&map);
        g = b.train(TrainOp::GatherGrad { axis, input }, &[indices, g])?;
    }
    Ok(g)
}

fn slice(b: &mut Backward<'_>, dims: &[usize], dy: ValueId) -> Step<ValueId> {
    let starts = b.ints(1, "starts")?.unwrap_or_default();
    let axes = b.ints(3, "axes")?.unwrap_or_else(|| (0..starts.len() as i64).collect());
    let steps = b.ints(4, "steps")?.unwrap_or_else(|| vec![1; starts.len()]);
    let out = b.dims(dy)?;
    let (mut before, mut after) = (vec![0; dims.len()], vec![0; dims.len()]);
    let mut maps: Vec<Option<Vec<i64>>> = vec![None; dims.len()];
    let mut plain = true;
    for ((&start, &axis), &step) in starts.iter().zip(&axes).zip(&steps) {
        let axis = from_front(axis, dims.len());
        let (size, count) = (dims[axis] as i64, out[axis] as i64);
        let first = if start < 0 { start.saturating_add(size) } else { start };
        let first = if step > 0 { first.clamp(0, size) } else { first.clamp(-1, size - 1) };
        (before[axis], after[axis]) = (first, size - first - count);
        plain &= step == 1;
        let whole = step == 1 && first == 0 && count == size;
        maps[axis] = (!whole).then(|| (0..count).map(|i| first + i * step).collect());
    }
    if plain { b.pad(dy, &before, &after) } else { gather_back(b, dims, maps, dy) }
}

fn pad(b: &mut Backward<'_>, mode: PadMode, dims: &[usize], n: &Node, dy: ValueId) -> Step {
    let rank = dims.len();
    let pads = b.ints(1, "pads")?.unwrap_or_default();
    let axes = b.ints(3, "axes")?.unwrap_or_else(|| (0..rank as i64).collect());
    let (mut before, mut after) = (vec![0; rank], vec![0; rank]);
    for (i, &axis) in axes.iter().enumerate() {
        let axis = from_front(axis, rank);
        (before[axis], after[axis]) = (pads[i], pads[i + axes.len()]);
    }
    if mode == PadMode::Constant {
        let negative = |v: &[i64]| v.iter().map(|p| -p).collect::<Vec<i64>>();
        let dx = b.pad(dy, &negative(&before), &negative(&after))?;
        if b.wants(2) {
            // Whatever did not come from x.
            let total = b.reduce_to(dy, &[])?;
            let kept = b.reduce_to(dx, &[])?;
            let rest = b.sub(total, kept)?;
            let value = b.node_input(n, 2)?;
            let value_dims = b.dims(value)?;
            let rest = b.reshape(rest, &value_dims)?;
            b.give(2, rest)?;
        }
        return b.give(0, dx);
    }
    let maps = (0..rank)
        .map(|axis| {
            let size = dims[axis] as i64;
            let (before, after) = (before[axis], after[axis]);
            let source = |i: i64| {
                let at = i - before;
                match mode {
                    _ if (0..size).contains(&at) => at,
                    PadMode::Wrap => at.rem_euclid(size),
                    PadMode::Reflect if size > 1 => {
                        let at = at.rem_euclid(2 * (size - 1));
                        if at < size { at } else { 2 * (size - 1) - at }
                    }
                    _ => at.clamp(0, size - 1),
                }
            };
            (before != 0 || after != 0).then(|| (0..size + before + after).map(source).collect())
        })
        .collect();
    let dx = gather_back(b, dims, maps, dy)?;
    b.give(0, dx)
}

/// Scattering, by elements or by slices.
fn scatter(b: &mut Backward<'_>, n: &Node, dy: ValueId) -> Step {
    let (x, indices, updates) = (b.node_input(n, 0)?, b.node_input(n, 1)?, b.node_input(n, 2)?);
    let reduction = match n.op {
        Op::ScatterElements { reduction, .. } | Op::ScatterNd { reduction } => reduction,
        _ => return b.unsupported("it scatters nothing"),
    };
    let gather = match n.op {
        Op::ScatterElements { axis, .. } => Op::GatherElements { axis },
        _ => Op::GatherNd { batch_dims: 0 },
    };
    let zero = b.scalar(0.0, b.dtype(dy)?)?;
    if b.wants(0) {
        let dx = match reduction {
            ScatterReduction::Add => dy,
            // The old element is gone where it was overwritten, and multiplied where it was multiplied.
            ScatterReduction::None => {
                let zeros = b.zeros_like(updates)?;
                b.emit(n.op.clone(), &[dy, indices, zeros])?
            }
            ScatterReduction::Mul => b.emit(n.op.clone(), &[dy, indices, updates])?,
            ScatterReduction::Max | ScatterReduction::Min => {
                let kept = b.binary(BinaryOp::Equal, x, n.out())?;
                b.select(kept, dy, zero)?
            }
        };
        b.give(0, dx)?;
    }
    if b.wants(2) {
        let du = match reduction {
            ScatterReduction::None | ScatterReduction::Add => b.emit(gather, &[dy, indices])?,
            ScatterReduction::Mul => {
                let product = b.mul(dy, n.out())?;
                let product = b.emit(gather, &[product, indices])?;
                b.div(product, updates)?
            }
            ScatterReduction::Max | ScatterReduction::Min => {
                let result = b.emit(gather.clone(), &[n.out(), indices])?;
                let old = b.emit(gather.clone(), &[x, indices])?;
                let g = b.emit(gather, &[dy, indices])?;
                let hit = b.binary(BinaryOp::Equal, updates, result)?;
                let kept = b.binary(BinaryOp::Equal, old, result)?;
                let changed = b.unary(UnaryOp::Not, kept)?;
                let mine = b.binary(BinaryOp::And, hit, changed)?;
                b.select(mine, g, zero)?
            }
        };
        give_reduced(b, n, 2, du)?;
    }
    Ok(())
}
