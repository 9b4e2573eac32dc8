use super::Editor;
use super::batch_norm::{channel_axis, is_per_channel};
use crate::{Activation, BinaryOp, Evaluate, Graph, GraphError, NodeId, Op, Pass, Tensor, UnaryOp, ValueId};

/// What follows a convolution or matrix product and touches each result once moves into it: bias, residual,
/// activation; also a scalar factor of a matrix product.
pub struct EpilogueFusion<'a> {
    /// Reads biases that have to be added up.
    pub evaluate: &'a dyn Evaluate,
}

/// Whether kernels can apply the operator while results are in registers.
pub fn is_epilogue(op: &UnaryOp) -> bool {
    matches!(
        op,
        UnaryOp::Relu
            | UnaryOp::ClipTo { .. }
            | UnaryOp::HardSwish
            | UnaryOp::HardSigmoid { .. }
            | UnaryOp::Sigmoid
            | UnaryOp::Gelu { .. }
            | UnaryOp::LeakyRelu { .. }
            | UnaryOp::Elu { .. }
            | UnaryOp::Tanh
            | UnaryOp::Mish
            | UnaryOp::Swish { .. }
    )
}

fn activation_mut(op: &mut Op) -> Option<&mut Option<Activation>> {
    match op {
        Op::Conv(a) => Some(&mut a.activation),
        Op::ConvTranspose(a) => Some(&mut a.conv.activation),
        Op::MatMul(a) => Some(&mut a.activation),
        _ => None,
    }
}

impl Pass for EpilogueFusion<'_> {
    fn name(&self) -> &'static str {
        "epilogues"
    }

    fn run(&self, graph: &mut Graph) -> Result<usize, GraphError> {
        let mut e = Editor::new(graph);
        for id in e.ids() {
            let mut at = Some(id);
            while let Some(id) = at {
                at = match e.get(id).map(|n| &n.op) {
                    Some(Op::Conv(_) | Op::ConvTranspose(_) | Op::MatMul(_)) => {
                        self.absorb_next(&mut e, id)?
                    }
                    _ => None,
                };
            }
        }
        e.finish()
    }
}

impl EpilogueFusion<'_> {
    /// Moves the only reader of the node's result into the node, which then stands where the reader stood.
    fn absorb_next(&self, e: &mut Editor, id: NodeId) -> Result<Option<NodeId>, GraphError> {
        let node = e.node(id);
        let mut op = node.op.clone();
        let mut inputs = node.inputs.clone();
        let out = node.out();
        let Some(next) = e.only_reader(out).filter(|_| e.is_f32(out)) else { return Ok(None) };
        if activation_mut(&mut op).is_none_or(|a| a.is_some()) {
            return Ok(None);
        }
        let reader = e.node(next);
        let result = reader.output(0);
        if result.is_none_or(|r| !e.same_dims(r, out)) {
            return Ok(None);
        }
        match &reader.op {
            Op::Unary(act) if is_epilogue(act) => {
                if let Some(slot) = activation_mut(&mut op) {
                    *slot = Some(*act);
                }
            }
            Op::Binary(binary @ (BinaryOp::Add | BinaryOp::Mul | BinaryOp::Div)) => {
                let (Some(a), Some(b)) = (reader.input(0), reader.input(1)) else { return Ok(None) };
                let other = if a == out { b } else { a };
                if other == out {
                    return Ok(None);
                }
                let done = match binary {
                    BinaryOp::Add => {
                        self.add_bias(e, &op, &mut inputs, out, other)?
                            || add_residual(e, id, &mut inputs, out, other)
                    }
                    BinaryOp::Mul => scale_product(e, &mut op, &inputs, other, false),
                    _ => a == out && scale_product(e, &mut op, &inputs, other, true),
                };
                if !done {
                    return Ok(None);
                }
            }
            _ => return Ok(None),
        }
        e.absorb(next, id, op, inputs);
        Ok(Some(next))
    }

    /// `… + other` with one element per channel.
    fn add_bias(
        &self,
        e: &mut Editor,
        op: &Op,
        inputs: &mut Vec<Option<ValueId>>,
        out: ValueId,
        other: ValueId,
    ) -> Result<bool, GraphError> {
        let (Some(axis), Some(dims), Some(other_dims)) =
            (channel_axis(e, op, out), e.dims(out), e.dims(other))
        else {
            return Ok(false);
        };
        let channels = dims[axis];
        if !e.is_f32(other) || !is_per_channel(&other_dims, &dims, axis) {
            return Ok(false);
        }
        // A full residual that happens to have one element per channel is a bias, too, if it is constant.
        let old = inputs.get(2).copied().flatten();
        let is_vector = other_dims.iter().product::<usize>() == channels;
        let bias = match old {
            None if e.is_constant(other) && is_vector => e.view_constant(other, &[channels]),
            None if other_dims == [channels] => Some(other),
            _ => {
                let Some(new) = e.load_f64s(other, self.evaluate)? else { return Ok(false) };
                let old = match old {
                    None => vec![0.0; channels],
                    Some(v) => match e.load_f64s(v, self.evaluate)? {
                        Some(old) if old.len() == channels => old,
                        _ => return Ok(false),
                    },
                };
                let sum: Vec<f32> = (0..channels)
                    .map(|i| (old[i] + new[if new.len() == 1 { 0 } else { i }]) as f32)
                    .collect();
                Some(e.add_constant("bias", Tensor::from_slice(&[channels], &sum)))
            }
        };
        let Some(bias) = bias else { return Ok(false) };
        if inputs.len() < 3 {
            inputs.resize(3, None);
        }
        inputs[2] = Some(bias);
        Ok(true)
    }
}

/// `… + other` of the same shape.
fn add_residual(
    e: &Editor,
    id: NodeId,
    inputs: &mut Vec<Option<ValueId>>,
    out: ValueId,
    other: ValueId,
) -> bool {
    if inputs.get(3).copied().flatten().is_some() || !e.same_dims(out, other) || !e.is_f32(other) {
        return false;
    }
    // Of two candidates the later one takes the sum, so that the earlier one need not wait.
    if let Some((rival, node)) = e.producer(other)
        && matches!(node.op, Op::Conv(_) | Op::ConvTranspose(_) | Op::MatMul(_))
        && node.op.activation() == Some(&None)
        && node.input(3).is_none()
        && e.private(other)
        && e.place(rival) > e.place(id)
    {
        return false;
    }
    if inputs.len() < 4 {
        inputs.resize(4, None);
    }
    inputs[3] = Some(other);
    true
}

/// `… · c` before anything else has been added.
fn scale_product(e: &Editor, op: &mut Op, inputs: &[Option<ValueId>], c: ValueId, divide: bool) -> bool {
    let Op::MatMul(a) = op else { return false };
    let Some(c) = e.scalar(c) else { return false };
    if inputs.iter().skip(2).any(Option::is_some) {
        return false;
    }
    a.alpha = if divide { a.alpha / c } else { a.alpha * c };
    true
}
