//! Attention and recurrent layers.

use super::backward::{Backward, Step};
use crate::{
    AttentionAttributes, Node, Op, RecurrentAttributes, RecurrentCell, Tensor, TrainOp, UnaryOp, ValueId,
};

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
    if b.wants(3) { mask(b, a, n, dy) } else { Ok(()) }
}

/// `[batch, heads, sequence, size]`, whatever way the heads are packed.
fn heads_apart(b: &mut Backward<'_>, v: ValueId, heads: usize) -> Step<ValueId> {
    let dims = b.dims(v)?;
    let [batch, sequence, width] = dims[..] else { return Ok(v) };
    let apart = b.reshape(v, &[batch, sequence, heads, width.checked_div(heads).unwrap_or(0)])?;
    b.transpose(apart, &[0, 2, 1, 3])
}

/// The gradient of what is added to the scores (a learned bias of positions): the scores spelled out, because it has
/// their size anyway.
fn mask(b: &mut Backward<'_>, a: &AttentionAttributes, n: &Node, dy: ValueId) -> Step {
    let [q, k, v] = [b.node_input(n, 0)?, b.node_input(n, 1)?, b.node_input(n, 2)?];
    let bias = b.node_input(n, 3)?;
    let (q, k) = (heads_apart(b, q, a.q_num_heads)?, heads_apart(b, k, a.kv_num_heads)?);
    let (v, g) = (heads_apart(b, v, a.kv_num_heads)?, heads_apart(b, dy, a.q_num_heads)?);
    let (&[_, heads, queries, size], &[_, shared, keys, _]) = (&b.dims(q)?[..], &b.dims(k)?[..]) else {
        return b.unsupported("its operands have neither 3 nor 4 dimensions");
    };
    let bias_dims = b.dims(bias)?;
    if bias_dims.last().is_some_and(|&d| d != keys && d != 1) {
        return b.unsupported("its mask talks of fewer keys than there are");
    }
    let repeated = |b: &mut Backward<'_>, v: ValueId| -> Step<ValueId> {
        let [batch, _, rows, columns] = b.dims(v)?[..] else { return Ok(v) };
        let group = heads.checked_div(shared).unwrap_or(1);
        let one = b.reshape(v, &[batch, shared, 1, rows, columns])?;
        let all = b.expand(one, &[batch, shared, group, rows, columns])?;
        b.reshape(all, &[batch, heads, rows, columns])
    };
    let (k, v) = (repeated(b, k)?, repeated(b, v)?);
    let scale = a.scale.unwrap_or(1.0 / (size as f32).sqrt());
    let mut scores = b.matmul(q, k, (false, true), scale)?;
    if a.softcap > 0.0 {
        let cap = f64::from(a.softcap);
        let small = b.scale(scores, 1.0 / cap)?;
        let bent = b.unary(UnaryOp::Tanh, small)?;
        scores = b.scale(bent, cap)?;
    }
    scores = b.add(scores, bias)?;
    if a.causal {
        let seen: Vec<bool> = (0..queries * keys).map(|i| i % keys <= i / keys).collect();
        let seen = b.constant("grad/seen", Tensor::from_bools(&[queries, keys], &seen));
        let hidden = b.scalar(f64::NEG_INFINITY, b.dtype(scores)?)?;
        scores = b.select(seen, scores, hidden)?;
    }
    let p = b.emit(Op::Softmax { axis: -1, log: false }, &[scores])?;
    let dp = b.matmul(g, v, (false, true), 1.0)?;
    let ds = b.train(TrainOp::SoftmaxGrad { axis: -1, log: false }, &[p, dp])?;
    let dbias = b.reduce_to(ds, &bias_dims)?;
    b.give(3, dbias)
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
