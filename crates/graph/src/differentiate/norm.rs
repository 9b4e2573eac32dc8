//! Normalisations.

use super::backward::{Backward, Step, from_front};
use super::elementwise::give_reduced;
use crate::{
    BinaryOp, Layout, Node, Op, Padding, PoolAttributes, PoolKind, ReduceOp, TrainOp, UnaryOp, ValueId,
    ValueKind,
};

pub(super) fn rule(b: &mut Backward<'_>, n: &Node, dy: &[Option<ValueId>]) -> Step {
    if let Op::Train(op) = &n.op {
        return train(b, op, n, dy);
    }
    b.refuse_results(dy, 1)?;
    let Some(dy) = dy.first().copied().flatten() else { return Ok(()) };
    match &n.op {
        Op::BatchNorm { epsilon, training, .. } => batch_norm(b, *epsilon, *training, n, dy),
        Op::InstanceNorm { epsilon } => {
            let channels = b.dims(n.out())?[1];
            group_norm(b, channels, *epsilon, n, dy)
        }
        Op::GroupNorm { groups, epsilon } => group_norm(b, *groups, *epsilon, n, dy),
        Op::LayerNorm { axis, epsilon } => layer_norm(b, *axis, *epsilon, false, n, dy),
        Op::RmsNorm { axis, epsilon } => layer_norm(b, *axis, *epsilon, true, n, dy),
        Op::LpNorm { axis, p } => lp_norm(b, *axis, *p, n, dy),
        Op::MeanVarianceNorm { axes } => mean_variance_norm(b, axes, n, dy),
        Op::Lrn { alpha, beta, bias, size } => {
            response_norm(b, [*alpha, *beta, *bias].map(f64::from), *size, n, dy)
        }
        _ => b.unsupported("it is no normalisation"),
    }
}

/// Normalises `x` per channel with given statistics and hands all gradients on; operands of the node are given in the
/// order x, scale, bias, mean, variance.
fn normalise(
    b: &mut Backward<'_>,
    axis: usize,
    epsilon: f32,
    batch: Option<[ValueId; 2]>,
    n: &Node,
    [scale, bias, mean, variance]: [usize; 4],
    dy: ValueId,
) -> Step {
    let (wants_statistics, x) = (b.wants(mean) || b.wants(variance), b.node_input(n, 0)?);
    let statistics = match batch {
        Some(statistics) => statistics,
        None => [b.node_input(n, mean)?, b.node_input(n, variance)?],
    };
    let wants_scale = b.wants(scale);
    let needs_scale = wants_scale || (batch.is_none() && b.wants(variance));
    let needs_x = b.wants(0) || (batch.is_none() && b.wants(mean));
    if !needs_scale && !needs_x {
        // The bias alone needs no statistics.
        if b.wants(bias) {
            let db = b.train(TrainOp::ChannelSum { axis }, &[dy])?;
            b.give(bias, db)?;
        }
        return Ok(());
    }
    if batch.is_none() && !needs_scale && !b.wants(mean) {
        // Given statistics make it an affine function, whose operand need not be kept.
        let zero = b.zeros_like(statistics[0])?;
        let mut inputs = vec![Some(dy), Some(zero), Some(statistics[1])];
        inputs.extend(n.input(scale).map(Some));
        let dx = b.emit_with(Op::Train(Box::new(TrainOp::Normalise { axis, epsilon })), inputs)?;
        if b.wants(bias) {
            let db = b.train(TrainOp::ChannelSum { axis }, &[dy])?;
            b.give(bias, db)?;
        }
        return b.give(0, dx);
    }
    let mut inputs = vec![Some(x), Some(dy), Some(statistics[0]), Some(statistics[1])];
    if let Some(scale) = n.input(scale) {
        inputs.push(Some(scale));
    }
    let op = TrainOp::NormaliseGrad { axis, epsilon, batch: batch.is_some() };
    let made = b.emit_some(Op::Train(Box::new(op)), inputs, &[needs_x, needs_scale, b.wants(bias)])?;
    if let Some(db) = made[2] {
        b.give(bias, db)?;
    }
    if let Some(ds) = made[1].filter(|_| wants_scale) {
        b.give(scale, ds)?;
    }
    if batch.is_none() && wants_statistics {
        if let Some(dx) = made[0].filter(|_| b.wants(mean)) {
            let sum = b.train(TrainOp::ChannelSum { axis }, &[dx])?;
            let dmean = b.neg(sum)?;
            b.give(mean, dmean)?;
        }
        if let Some(ds) = made[1].filter(|_| b.wants(variance)) {
            // -scale · dscale / (2 · (variance + epsilon))
            let dtype = b.dtype(ds)?;
            let epsilon = b.scalar(f64::from(epsilon), dtype)?;
            let spread = b.add(statistics[1], epsilon)?;
            let mut slope = b.div(ds, spread)?;
            if let Some(scale) = n.input(scale) {
                slope = b.mul(slope, scale)?;
            }
            let dv = b.scale(slope, -0.5)?;
            b.give(variance, dv)?;
        }
    }
    match made[0].filter(|_| b.wants(0)) {
        Some(dx) => b.give(0, dx),
        None => Ok(()),
    }
}

fn batch_norm(b: &mut Backward<'_>, epsilon: f32, training: bool, n: &Node, dy: ValueId) -> Step {
    let batch = if training {
        // Statistics of the batch take the place of the operands.
        let x = b.node_input(n, 0)?;
        Some(statistics(b, x, 1)?)
    } else {
        None
    };
    normalise(b, 1, epsilon, batch, n, [1, 2, 3, 4], dy)
}

/// Mean and variance of `x` for each index of `axis`.
fn statistics(b: &mut Backward<'_>, x: ValueId, axis: usize) -> Step<[ValueId; 2]> {
    let op = Op::Train(Box::new(TrainOp::BatchStatistics { axis }));
    let made = b.emit_some(op, vec![Some(x)], &[true, true])?;
    Ok([made[0].expect("it was wanted"), made[1].expect("it was wanted")])
}

/// Samples and groups are the channels of a batch normalisation without a scale.
fn group_norm(b: &mut Backward<'_>, groups: usize, epsilon: f32, n: &Node, dy: ValueId) -> Step {
    let (x, scale) = (b.node_input(n, 0)?, b.node_input(n, 1)?);
    let dims = b.dims(x)?;
    if b.wants(2) {
        let db = b.train(TrainOp::ChannelSum { axis: 1 }, &[dy])?;
        b.give(2, db)?;
    }
    if !b.wants(0) && !b.wants(1) {
        return Ok(());
    }
    let rows = dims[0] * groups;
    let size = dims.iter().product::<usize>().checked_div(rows).unwrap_or(0);
    let flat = b.reshape(x, &[rows, size])?;
    let [mean, variance] = statistics(b, flat, 0)?;
    if b.wants(1) {
        let op = TrainOp::Normalise { axis: 0, epsilon };
        let normal = b.train(op, &[flat, mean, variance])?;
        let normal = b.reshape(normal, &dims)?;
        let share = b.mul(normal, dy)?;
        let ds = b.train(TrainOp::ChannelSum { axis: 1 }, &[share])?;
        b.give(1, ds)?;
    }
    if b.wants(0) {
        let mut scale_dims = vec![1; dims.len()];
        scale_dims[1] = dims[1];
        let scale = b.reshape(scale, &scale_dims)?;
        let g = b.mul(dy, scale)?;
        let g = b.reshape(g, &[rows, size])?;
        let op = TrainOp::NormaliseGrad { axis: 0, epsilon, batch: true };
        let dx = b.train(op, &[flat, g, mean, variance])?;
        let dx = b.reshape(dx, &dims)?;
        b.give(0, dx)?;
    }
    Ok(())
}

fn layer_norm(b: &mut Backward<'_>, axis: i64, epsilon: f32, rms: bool, n: &Node, dy: ValueId) -> Step {
    let (x, scale) = (b.node_input(n, 0)?, b.node_input(n, 1)?);
    let dims = b.dims(x)?;
    let first = from_front(axis, dims.len());
    // The root mean square may have a scale of another type than its operand.
    let (x, dy) = (b.cast_like(x, dy)?, dy);
    if b.wants(2) {
        give_reduced(b, n, 2, dy)?;
    }
    if !b.wants(0) && !b.wants(1) {
        return Ok(());
    }
    let axis = first as i64;
    let op = |_: ()| {
        Op::Train(Box::new(if rms {
            TrainOp::RmsNormGrad { axis, epsilon }
        } else {
            TrainOp::LayerNormGrad { axis, epsilon }
        }))
    };
    let give_x = |b: &mut Backward<'_>, dx: Option<ValueId>| -> Step {
        let Some(dx) = dx else { return Ok(()) };
        let dx = b.cast_like(dx, n.input(0).unwrap_or(dx))?;
        b.give(0, dx)
    };
    if b.dims(scale)? == dims[first..] {
        let wanted = [b.wants(0), b.wants(1), false];
        let wanted = if rms { &wanted[..2] } else { &wanted[..] };
        let made = b.emit_some(op(()), vec![Some(x), Some(scale), Some(dy)], wanted)?;
        if let Some(ds) = made[1] {
            b.give(1, ds)?;
        }
        return give_x(b, made[0]);
    }
    // A scale that broadcasts: normalise without it.
    let dtype = b.dtype(dy)?;
    let ones = b.full(1.0, &dims[first..], dtype)?;
    if b.wants(1) {
        let forward = if rms { Op::RmsNorm { axis, epsilon } } else { Op::LayerNorm { axis, epsilon } };
        let normal = b.emit(forward, &[x, ones])?;
        let share = b.mul(normal, dy)?;
        give_reduced(b, n, 1, share)?;
    }
    if b.wants(0) {
        let g = b.mul(dy, scale)?;
        let wanted: &[bool] = if rms { &[true, false] } else { &[true, false, false] };
        let made = b.emit_some(op(()), vec![Some(x), Some(ones), Some(g)], wanted)?;
        give_x(b, made[0])?;
    }
    Ok(())
}

fn lp_norm(b: &mut Backward<'_>, axis: i64, p: i64, n: &Node, dy: ValueId) -> Step {
    let x = b.node_input(n, 0)?;
    let dims = b.dims(x)?;
    let axes = [from_front(axis, dims.len())];
    let dtype = b.dtype(x)?;
    let kind = if p == 1 { ReduceOp::L1 } else { ReduceOp::L2 };
    let norm = b.reduce(kind, x, &axes, true)?;
    // A vector of zeros stays one, and so does its gradient.
    let zero = b.scalar(0.0, dtype)?;
    let none = b.binary(BinaryOp::Equal, norm, zero)?;
    let inverse = b.unary(UnaryOp::Reciprocal, norm)?;
    let inverse = b.select(none, zero, inverse)?;
    let product = b.mul(dy, n.out())?;
    let along = b.reduce(ReduceOp::Sum, product, &axes, true)?;
    let direction = if p == 1 { b.unary(UnaryOp::Sign, x)? } else { n.out() };
    let pull = b.mul(direction, along)?;
    let g = b.sub(dy, pull)?;
    let dx = b.mul(g, inverse)?;
    b.give(0, dx)
}

fn mean_variance_norm(b: &mut Backward<'_>, axes: &[i64], n: &Node, dy: ValueId) -> Step {
    let x = b.node_input(n, 0)?;
    let rank = b.dims(x)?.len();
    let mut axes: Vec<usize> = axes.iter().map(|&a| from_front(a, rank)).collect();
    axes.sort_unstable();
    axes.dedup();
    let mean = b.reduce(ReduceOp::Mean, x, &axes, true)?;
    let centred = b.sub(x, mean)?;
    let square = b.mul(centred, centred)?;
    let variance = b.reduce(ReduceOp::Mean, square, &axes, true)?;
    let deviation = b.unary(UnaryOp::Sqrt, variance)?;
    // As the forward operator has it.
    let epsilon = b.scalar(1e-9, b.dtype(x)?)?;
    let deviation = b.add(deviation, epsilon)?;
    let level = b.reduce(ReduceOp::Mean, dy, &axes, true)?;
    let product = b.mul(dy, n.out())?;
    let along = b.reduce(ReduceOp::Mean, product, &axes, true)?;
    let pull = b.mul(n.out(), along)?;
    let g = b.sub(dy, level)?;
    let g = b.sub(g, pull)?;
    let dx = b.div(g, deviation)?;
    b.give(0, dx)
}

/// Sums over neighbouring channels are average pools over `[batch, 1, channels, pixels]`.
fn response_norm(
    b: &mut Backward<'_>,
    [alpha, beta, bias]: [f64; 3],
    size: usize,
    n: &Node,
    dy: ValueId,
) -> Step {
    let x = b.node_input(n, 0)?;
    let dims = b.dims(x)?;
    let dtype = b.dtype(x)?;
    let pixels: usize = dims[2..].iter().product();
    let wide = [dims[0], 1, dims[1], pixels];
    let window = |b: &mut Backward<'_>, v: ValueId, before: usize, after: usize| -> Step<ValueId> {
        let v = b.reshape(v, &wide)?;
        let pool = PoolAttributes {
            kind: PoolKind::Average,
            kernel: vec![size, 1],
            strides: vec![1, 1],
            dilations: vec![1, 1],
            padding: Padding::Explicit(vec![before as i64, 0, after as i64, 0]),
            ceil_mode: false,
            count_include_pad: true,
            storage_order_column: false,
            layout: Layout::ChannelsFirst,
        };
        let mean = b.emit(Op::Pool(pool), &[v])?;
        b.reshape(mean, &dims)
    };
    let (before, after) = (size.saturating_sub(1) / 2, size / 2);
    let square = b.mul(x, x)?;
    let mean = window(b, square, before, after)?;
    let mean = b.scale(mean, alpha)?;
    let bias = b.scalar(bias, dtype)?;
    let scale = b.add(mean, bias)?;
    let exponent = b.scalar(-beta, dtype)?;
    let factor = b.binary(BinaryOp::Pow, scale, exponent)?;
    let direct = b.mul(dy, factor)?;
    // Channel i enters the scale of its neighbours on the other side.
    let share = b.mul(dy, n.out())?;
    let share = b.div(share, scale)?;
    let neighbours = window(b, share, after, before)?;
    let pull = b.mul(neighbours, x)?;
    let pull = b.scale(pull, 2.0 * alpha * beta)?;
    let dx = b.sub(direct, pull)?;
    b.give(0, dx)
}

/// The forward-side operators of training.
fn train(b: &mut Backward<'_>, op: &TrainOp, n: &Node, dy: &[Option<ValueId>]) -> Step {
    match op {
        TrainOp::Normalise { axis, epsilon } => {
            let Some(dy) = dy.first().copied().flatten() else { return Ok(()) };
            let batch = own_statistics(b, *axis, n);
            normalise(b, *axis, *epsilon, batch, n, [3, 4, 1, 2], dy)
        }
        TrainOp::BatchStatistics { axis } => {
            let x = b.node_input(n, 0)?;
            let dims = b.dims(x)?;
            let count = dims.iter().product::<usize>().checked_div(dims[*axis]).unwrap_or(0).max(1) as f64;
            let mut wide = vec![1; dims.len()];
            wide[*axis] = dims[*axis];
            let mut total = None;
            if let Some(dmean) = dy.first().copied().flatten() {
                let share = b.scale(dmean, 1.0 / count)?;
                let share = b.reshape(share, &wide)?;
                total = Some(b.expand(share, &dims)?);
            }
            if let Some(dvariance) = dy.get(1).copied().flatten() {
                let mean = b.result(0)?;
                let mean = b.reshape(mean, &wide)?;
                let centred = b.sub(x, mean)?;
                let share = b.scale(dvariance, 2.0 / count)?;
                let share = b.reshape(share, &wide)?;
                let part = b.mul(centred, share)?;
                total = Some(match total {
                    Some(total) => b.add(total, part)?,
                    None => part,
                });
            }
            total.map_or(Ok(()), |dx| b.give(0, dx))
        }
        TrainOp::ChannelSum { axis } => {
            let (Some(dy), x) = (dy.first().copied().flatten(), b.node_input(n, 0)?) else { return Ok(()) };
            let dims = b.dims(x)?;
            let mut wide = vec![1; dims.len()];
            wide[*axis] = dims[*axis];
            let dx = b.reshape(dy, &wide)?;
            let dx = b.expand(dx, &dims)?;
            b.give(0, dx)
        }
        _ => b.unsupported("it has no derivative of its own"),
    }
}

/// Mean and variance when they are those of the operand itself; their gradient is then inside.
fn own_statistics(b: &Backward<'_>, axis: usize, n: &Node) -> Option<[ValueId; 2]> {
    let (mean, variance) = (n.input(1)?, n.input(2)?);
    let made = |v: ValueId| match b.graph().value(v).kind {
        ValueKind::Output { node, output } => Some((node, output)),
        _ => None,
    };
    let ((node, 0), (other, 1)) = (made(mean)?, made(variance)?) else { return None };
    let statistics = b.graph().node(node);
    let same = node == other
        && statistics.op == Op::Train(Box::new(TrainOp::BatchStatistics { axis }))
        && statistics.input(0) == n.input(0);
    same.then_some([mean, variance])
}
