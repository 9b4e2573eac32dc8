//! Reductions, softmax and running sums.

use super::backward::{Backward, Step, from_front};
use crate::{BinaryOp, Node, Op, ReduceOp, TrainOp, UnaryOp, ValueId};

pub(super) fn rule(b: &mut Backward<'_>, n: &Node, dy: &[Option<ValueId>]) -> Step {
    let Some(dy) = dy.first().copied().flatten() else { return Ok(()) };
    match &n.op {
        Op::Softmax { axis, log } => {
            let dx = b.train(TrainOp::SoftmaxGrad { axis: *axis, log: *log }, &[n.out(), dy])?;
            b.give(0, dx)
        }
        Op::CumSum { exclusive, reverse } => {
            let axis = b.node_input(n, 1)?;
            let dx = b.emit(Op::CumSum { exclusive: *exclusive, reverse: !reverse }, &[dy, axis])?;
            b.give(0, dx)
        }
        Op::Reduce { op, noop_with_empty_axes, .. } => reduce(b, *op, *noop_with_empty_axes, n, dy),
        _ => b.unsupported("it is no reduction"),
    }
}

fn reduce(b: &mut Backward<'_>, op: ReduceOp, noop: bool, n: &Node, dy: ValueId) -> Step {
    let x = b.node_input(n, 0)?;
    let (dims, dtype) = (b.dims(x)?, b.dtype(x)?);
    let given = b.ints(1, "axes")?.unwrap_or_default();
    let axes: Vec<usize> = if given.is_empty() {
        if noop { Vec::new() } else { (0..dims.len()).collect() }
    } else {
        let mut axes: Vec<usize> = given.iter().map(|&a| from_front(a, dims.len())).collect();
        axes.sort_unstable();
        axes.dedup();
        axes
    };
    let kept: Vec<usize> =
        dims.iter().enumerate().map(|(i, &d)| if axes.contains(&i) { 1 } else { d }).collect();
    let count: usize = axes.iter().map(|&a| dims[a]).product();
    // A single number broadcasts as it is.
    let single = kept.iter().product::<usize>() == 1;
    let widen = |b: &mut Backward<'_>, v: ValueId| if single { Ok(v) } else { b.reshape(v, &kept) };
    let g = widen(b, dy)?;
    let slope = match op {
        ReduceOp::Sum => return spread(b, g, &dims),
        ReduceOp::Mean => {
            let share = b.scale(g, 1.0 / count.max(1) as f64)?;
            return spread(b, share, &dims);
        }
        ReduceOp::LogSum => {
            // 1 / sum
            let y = widen(b, n.out())?;
            let minus = b.neg(y)?;
            let inverse = b.unary(UnaryOp::Exp, minus)?;
            let share = b.mul(g, inverse)?;
            return spread(b, share, &dims);
        }
        ReduceOp::SumSquare => b.scale(x, 2.0)?,
        ReduceOp::L1 => b.unary(UnaryOp::Sign, x)?,
        ReduceOp::L2 => {
            let zero = b.scalar(0.0, dtype)?;
            let y = widen(b, n.out())?;
            let none = b.binary(BinaryOp::Equal, y, zero)?;
            let inverse = b.unary(UnaryOp::Reciprocal, y)?;
            let inverse = b.select(none, zero, inverse)?;
            b.mul(x, inverse)?
        }
        ReduceOp::LogSumExp => {
            let y = widen(b, n.out())?;
            let less = b.sub(x, y)?;
            b.unary(UnaryOp::Exp, less)?
        }
        ReduceOp::Max | ReduceOp::Min => {
            // Equal elements share.
            let y = widen(b, n.out())?;
            let mine = b.binary(BinaryOp::Equal, x, y)?;
            let mine = b.cast(mine, dtype)?;
            let total = b.reduce(ReduceOp::Sum, mine, &axes, true)?;
            b.div(mine, total)?
        }
        ReduceOp::Prod => {
            // The product of the others; where one factor is zero only that one has any.
            let (zero, one) = (b.scalar(0.0, dtype)?, b.scalar(1.0, dtype)?);
            let is_zero = b.binary(BinaryOp::Equal, x, zero)?;
            let number = b.cast(is_zero, dtype)?;
            let zeros = b.reduce(ReduceOp::Sum, number, &axes, true)?;
            let safe = b.select(is_zero, one, x)?;
            let product = b.reduce(ReduceOp::Prod, safe, &axes, true)?;
            let single = b.binary(BinaryOp::Equal, zeros, one)?;
            let at_zero = b.select(single, product, zero)?;
            let none = b.binary(BinaryOp::Equal, zeros, zero)?;
            let others = b.div(product, safe)?;
            let elsewhere = b.select(none, others, zero)?;
            b.select(is_zero, at_zero, elsewhere)?
        }
    };
    let dx = b.mul(slope, g)?;
    b.give(0, dx)
}

fn spread(b: &mut Backward<'_>, g: ValueId, dims: &[usize]) -> Step {
    let dx = b.expand(g, dims)?;
    b.give(0, dx)
}
