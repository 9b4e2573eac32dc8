//! Losses of classifiers.

use super::backward::{Backward, Step};
use crate::{BinaryOp, LossAttributes, LossReduction, Node, Op, ReduceOp, Tensor, TrainOp, UnaryOp, ValueId};

pub(super) fn rule(b: &mut Backward<'_>, n: &Node, dy: &[Option<ValueId>]) -> Step {
    match &n.op {
        Op::Train(op) => {
            let TrainOp::CrossEntropy { label_smoothing, ignore } = **op else {
                return b.unsupported("it is no loss");
            };
            b.refuse_results(dy, 1)?;
            b.refuse(1, "labels")?;
            b.refuse(2, "weights")?;
            let Some(dloss) = dy.first().copied().flatten() else { return Ok(()) };
            let mut inputs = vec![b.node_input(n, 0)?, b.node_input(n, 1)?, dloss];
            inputs.extend(n.input(2));
            let dx = b.train(TrainOp::CrossEntropyGrad { label_smoothing, ignore }, &inputs)?;
            b.give(0, dx)
        }
        Op::NllLoss(a) => {
            b.refuse(2, "weight")?;
            let Some(dloss) = dy.first().copied().flatten() else { return Ok(()) };
            let (hot, share) = shares(b, a, n, dloss)?;
            let pull = b.mul(hot, share)?;
            let dx = b.neg(pull)?;
            b.give(0, dx)
        }
        Op::SoftmaxCrossEntropyLoss(a) => {
            b.refuse(2, "weight")?;
            let x = b.node_input(n, 0)?;
            let p = b.emit(Op::Softmax { axis: 1, log: false }, &[x])?;
            let mut total = None;
            if let Some(dloss) = dy.first().copied().flatten() {
                let (hot, share) = shares(b, a, n, dloss)?;
                let error = b.sub(p, hot)?;
                total = Some(b.mul(error, share)?);
            }
            if let Some(dlog) = dy.get(1).copied().flatten() {
                let sum = b.reduce(ReduceOp::Sum, dlog, &[1], true)?;
                let pull = b.mul(p, sum)?;
                let part = b.sub(dlog, pull)?;
                total = Some(match total {
                    Some(total) => b.add(total, part)?,
                    None => part,
                });
            }
            total.map_or(Ok(()), |dx| b.give(0, dx))
        }
        _ => b.unsupported("it is no loss"),
    }
}

/// The targets as ones among zeros, `[batch, classes, …]`, and the gradient that reaches each position,
/// `[batch, 1, …]`.
fn shares(b: &mut Backward<'_>, a: &LossAttributes, n: &Node, dloss: ValueId) -> Step<(ValueId, ValueId)> {
    let (x, target) = (b.node_input(n, 0)?, b.node_input(n, 1)?);
    let (dims, dtype) = (b.dims(x)?, b.dtype(x)?);
    let mut wide = dims.clone();
    wide[1] = 1;
    let target = b.cast(target, crate::DType::I64)?;
    let (mut counts, mut class) = (None, target);
    if let Some(ignore) = a.ignore_index {
        let ignore = b.constant("grad/ignored", Tensor::scalar(ignore));
        let ignored = b.binary(BinaryOp::Equal, target, ignore)?;
        let zero = b.constant("grad/class", Tensor::scalar(0i64));
        class = b.select(ignored, zero, target)?;
        let counted = b.unary(UnaryOp::Not, ignored)?;
        counts = Some(b.cast(counted, dtype)?);
    }
    let depth = b.list(&[dims[1] as i64]);
    let values = b.constant("grad/hot", Tensor::from_slice(&[2], &[0f64, 1.0]));
    let values = b.cast(values, dtype)?;
    let hot = b.emit(Op::OneHot { axis: 1 }, &[class, depth, values])?;
    let mut weight = counts;
    if let Some(weights) = n.input(2) {
        let own = b.emit(Op::Gather { axis: 0 }, &[weights, class])?;
        weight = Some(match counts {
            Some(counts) => b.mul(own, counts)?,
            None => own,
        });
    }
    let mut share = dloss;
    if a.reduction == LossReduction::Mean {
        let positions: usize = wide.iter().product();
        share = match weight {
            Some(weight) => {
                let axes: Vec<usize> = (0..b.dims(weight)?.len()).collect();
                let total = b.reduce(ReduceOp::Sum, weight, &axes, false)?;
                b.div(share, total)?
            }
            None => b.scale(share, 1.0 / positions.max(1) as f64)?,
        };
    }
    if let Some(weight) = weight {
        share = b.mul(share, weight)?;
    }
    // One number, or one per position.
    let share = if b.dims(share)?.is_empty() { share } else { b.reshape(share, &wide)? };
    Ok((hot, share))
}
