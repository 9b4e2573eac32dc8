//! Attention and recurrent layers.

use super::backward::{Backward, Step};
use crate::{AttentionAttributes, Node, Op, RecurrentAttributes, RecurrentCell, TrainOp, ValueId};

pub(super) fn rule(b: &mut Backward<'_>, n: &Node, dy: &[Option<ValueId>]) -> Step {
    match &n.op {
        Op::Attention(a) => attention(b, a, n, dy),
        Op::RotaryEmbedding { .. } => {
            let Some(dy) = dy.first().copied().flatten() else { return Ok(()) };
            b.refuse(1, "cosines")?;
            b.refuse(2, "sines")?;
            // The rotation back is by the opposite angle.
            let sines = b.node_input(n, 2)?;
            let back = b.neg(sines)?;
            let mut inputs = n.inputs.clone();
            (inputs[0], inputs[2]) = (Some(dy), Some(back));
            let dx = b.emit_with(n.op.clone(), inputs)?;
            b.give(0, dx)
        }
        Op::Rnn(a) => layer(b, RecurrentCell::Rnn, a, n, dy),
        Op::Gru(a) => layer(b, RecurrentCell::Gru, a, n, dy),
        Op::Lstm(a) => layer(b, RecurrentCell::Lstm, a, n, dy),
        _ => b.unsupported("it is neither attention nor a recurrent layer"),
    }
}

fn attention(b: &mut Backward<'_>, a: &AttentionAttributes, n: &Node, dy: &[Option<ValueId>]) -> Step {
    b.refuse_results(dy, 1)?;
    b.refuse(3, "mask")?;
    let Some(dy) = dy.first().copied().flatten() else { return Ok(()) };
    if (4..n.inputs.len()).any(|i| n.input(i).is_some()) {
        return b.unsupported("attention over a cache has no gradient");
    }
    let inputs = vec![n.input(0), n.input(1), n.input(2), n.input(3), Some(dy)];
    let wanted = [b.wants(0), b.wants(1), b.wants(2)];
    let made = b.emit_some(Op::Train(Box::new(TrainOp::AttentionGrad(a.clone()))), inputs, &wanted)?;
    for (i, g) in made.into_iter().enumerate() {
        if let Some(g) = g {
            b.give(i, g)?;
        }
    }
    Ok(())
}

fn layer(
    b: &mut Backward<'_>,
    cell: RecurrentCell,
    a: &RecurrentAttributes,
    n: &Node,
    dy: &[Option<ValueId>],
) -> Step {
    // Operands of the layer for each result of the gradient.
    let operands = [0, 1, 2, 3, 5, 6, 7];
    let mut inputs: Vec<Option<ValueId>> = (0..8).map(|i| n.input(i)).collect();
    inputs.extend((0..3).map(|i| dy.get(i).copied().flatten()));
    let wanted = operands.map(|i| b.wants(i));
    let op = TrainOp::RecurrentGrad { cell, attributes: a.clone() };
    let made = b.emit_some(Op::Train(Box::new(op)), inputs, &wanted)?;
    for (i, g) in operands.into_iter().zip(made) {
        if let Some(g) = g {
            b.give(i, g)?;
        }
    }
    Ok(())
}
