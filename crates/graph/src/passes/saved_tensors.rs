//! What a backward pass keeps of the forward pass, made smaller without changing a bit of what it computes.

use std::collections::HashSet;

use crate::{DType, Graph, GraphError, Layout, MaskRule, NodeId, Op, TrainOp, UnaryOp, ValueId, ValueKind};

/// Results with fewer elements are kept as they are.
const MASKED_ELEMENTS_MIN: usize = 1024;

/// Nodes that the loss depends on.
fn forward_nodes(graph: &Graph, loss: ValueId) -> HashSet<NodeId> {
    let mut needed = vec![false; graph.values.len()];
    needed[loss.index()] = true;
    let mut forward = HashSet::new();
    for (id, node) in graph.iter_nodes().rev() {
        if node.outputs.iter().flatten().any(|v| needed[v.index()]) {
            forward.insert(id);
            for v in node.inputs.iter().flatten() {
                needed[v.index()] = true;
            }
        }
    }
    forward
}

/// Brings nodes from the end of the order to the place behind the one that makes their value (to the front for values
/// that no node makes); those behind the same place keep their order.
fn place_behind(graph: &mut Graph, placed: &[(NodeId, ValueId)]) {
    let moved: HashSet<NodeId> = placed.iter().map(|(id, _)| *id).collect();
    let mut order = Vec::with_capacity(graph.nodes.len());
    let behind = |producer: Option<NodeId>, order: &mut Vec<usize>| {
        for (id, value) in placed {
            if graph.producer(*value) == producer {
                order.push(id.index());
            }
        }
    };
    behind(None, &mut order);
    for id in graph.node_ids() {
        if !moved.contains(&id) {
            order.push(id.index());
            behind(Some(id), &mut order);
        }
    }
    graph.reorder(&order);
}

/// Keeps one bit per element of what a ReLU or a clipping made, where the backward pass reads it for nothing but the
/// derivative of that ReLU or clipping (Cai et al., "TinyTL", 2020). Returns how many results it concerns.
pub fn keep_signs(graph: &mut Graph, loss: ValueId) -> usize {
    let forward = forward_nodes(graph, loss);
    let consumers = graph.consumers();
    let mut placed = Vec::new();
    for index in 0..consumers.len() {
        let v = ValueId(index as u32);
        let made = matches!(graph.value(v).kind, ValueKind::Output { node, .. } if forward.contains(&node));
        let large =
            graph.value(v).ty.tensor().is_some_and(|t| {
                t.dtype == DType::F32 && t.elements().is_some_and(|n| n >= MASKED_ELEMENTS_MIN)
            });
        if !made || !large {
            continue;
        }
        let later: Vec<NodeId> =
            consumers[index].iter().copied().filter(|id| !forward.contains(id)).collect();
        let rules: Option<Vec<MaskRule>> = later.iter().map(|&id| rule_of(graph, id, v)).collect();
        let Some([rule, others @ ..]) = rules.as_deref() else { continue };
        if others.iter().any(|other| other != rule) {
            continue;
        }
        let op = Op::Train(Box::new(TrainOp::SignMask(*rule)));
        let bits = graph.add_node(format!("{}/signs", graph.value(v).name), op, &[v], 1)[0];
        placed.push((NodeId(graph.nodes.len() as u32 - 1), v));
        for id in later {
            let node = graph.node_mut(id);
            node.op = Op::Train(Box::new(TrainOp::MaskGrad));
            node.inputs[0] = Some(bits);
        }
    }
    let count = placed.len();
    if count > 0 {
        place_behind(graph, &placed);
    }
    count
}

/// Which elements of its result `v` an activation passes a gradient for, if that is all that node `id` reads it for.
fn rule_of(graph: &Graph, id: NodeId, v: ValueId) -> Option<MaskRule> {
    let node = graph.node(id);
    let Op::Train(op) = &node.op else { return None };
    if node.input(0) != Some(v) || node.input(1) == Some(v) {
        return None;
    }
    match **op {
        TrainOp::UnaryGrad(UnaryOp::Relu) => Some(MaskRule::Above(0.0)),
        TrainOp::UnaryGrad(UnaryOp::ClipTo { min, max }) => Some(MaskRule::Between(min, max)),
        _ => None,
    }
}

/// Makes `gradient`, the gradient of a weight, that of the `count` channels in `list` along `axis` alone, by computing
/// it from these channels of the saved operand: the others are freed after the forward pass. The channels are copied
/// right behind where the operand is made. False, and nothing is changed, where the gradient is not one product or
/// convolution; it can then only be computed whole.
///
/// # Errors
/// When the graph turns out to be contradictory.
pub fn slice_weight_gradient(
    graph: &mut Graph,
    gradient: ValueId,
    axis: usize,
    list: ValueId,
    count: usize,
) -> Result<bool, GraphError> {
    let Some(id) = graph.producer(gradient) else { return Ok(false) };
    let node = graph.node(id).clone();
    let mut slicer = Slicer { placed: Vec::new(), list, name: graph.value(gradient).name.clone() };
    let (op, inputs) = match &node.op {
        Op::Train(op) => {
            let TrainOp::ConvWeightGrad { conv, weight } = &**op else { return Ok(false) };
            let (Some(x), Some(dy)) = (node.input(0), node.input(1)) else { return Ok(false) };
            let channels = match conv.layout {
                Layout::ChannelsFirst => 1,
                Layout::ChannelsLast => weight.len() - 1,
            };
            let (mut conv, mut weight) = (conv.clone(), weight.clone());
            let dy = match axis {
                1 if conv.groups == 1 => dy,
                0 if conv.groups == weight[0] && weight[1] == 1 => {
                    conv.groups = count;
                    slicer.take(graph, dy, channels)
                }
                _ => return Ok(false),
            };
            weight[axis] = count;
            let x = slicer.take(graph, x, channels);
            (Op::Train(Box::new(TrainOp::ConvWeightGrad { conv, weight })), vec![Some(x), Some(dy)])
        }
        Op::MatMul(a) => {
            let (Some(left), Some(right)) = (node.input(0), node.input(1)) else { return Ok(false) };
            let flat = |v: ValueId| {
                graph.value(v).ty.tensor().and_then(crate::TensorType::dims).is_some_and(|d| d.len() == 2)
            };
            if node.inputs.len() > 2 || a.activation.is_some() || !flat(left) || !flat(right) {
                return Ok(false);
            }
            match axis {
                0 if a.trans_a => (node.op.clone(), vec![Some(slicer.rows(graph, left, count)), Some(right)]),
                1 if !a.trans_b => {
                    (node.op.clone(), vec![Some(left), Some(slicer.rows(graph, right, count))])
                }
                _ => return Ok(false),
            }
        }
        _ => return Ok(false),
    };
    let made = graph.node_mut(id);
    made.op = op;
    made.inputs = inputs;
    place_behind(graph, &slicer.placed);
    graph.infer()?;
    Ok(true)
}

/// Copies channels out of operands.
struct Slicer {
    placed: Vec<(NodeId, ValueId)>,
    list: ValueId,
    name: String,
}

impl Slicer {
    fn take(&mut self, graph: &mut Graph, x: ValueId, axis: usize) -> ValueId {
        let name = format!("{}/channels{}", self.name, self.placed.len());
        let sliced = graph.add_node(name, Op::Gather { axis: axis as i64 }, &[x, self.list], 1)[0];
        self.placed.push((NodeId(graph.nodes.len() as u32 - 1), x));
        sliced
    }

    /// Columns of a matrix, which may be a view of an operand with the same columns.
    fn rows(&mut self, graph: &mut Graph, matrix: ValueId, count: usize) -> ValueId {
        let dims = |g: &Graph, v: ValueId| g.value(v).ty.tensor().and_then(crate::TensorType::dims);
        let Some(flat) = dims(graph, matrix) else { return self.take(graph, matrix, 1) };
        let base = graph.producer(matrix).and_then(|id| match graph.node(id).op {
            Op::Reshape { .. } => graph.node(id).input(0),
            _ => None,
        });
        let wide = base.and_then(|v| dims(graph, v)).filter(|d| d.last() == flat.last());
        let (Some(base), Some(wide)) = (base, wide) else { return self.take(graph, matrix, 1) };
        let sliced = self.take(graph, base, wide.len() - 1);
        let sizes = [flat[0] as i64, count as i64];
        let shape = graph
            .add_constant(format!("{}/channels.shape", self.name), crate::Tensor::from_slice(&[2], &sizes));
        let name = format!("{}/channels.view", self.name);
        let view = graph.add_node(name, Op::Reshape { allow_zero: true }, &[sliced, shape], 1)[0];
        self.placed.push((NodeId(graph.nodes.len() as u32 - 1), base));
        view
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DifferentiateOptions, ReduceOp, TensorType, differentiate};

    #[test]
    fn a_result_that_only_its_own_derivative_needs_is_kept_as_bits() {
        let mut g = Graph::new("net");
        let x = g.add_input("x", TensorType::fixed(DType::F32, &[2, 1024]));
        let b = g.add_state("b", TensorType::fixed(DType::F32, &[1024]), None);
        let y = g.add_node("shift", Op::Binary(crate::BinaryOp::Add), &[x, b], 1)[0];
        let y = g.add_node("relu", Op::Unary(UnaryOp::Relu), &[y], 1)[0];
        let sum = Op::Reduce { op: ReduceOp::Sum, keep_dims: false, noop_with_empty_axes: false };
        let loss = g.add_node("loss", sum, &[y], 1)[0];
        g.infer().unwrap();
        let gradient = differentiate(&mut g, loss, &[b], &DifferentiateOptions::default()).unwrap();
        g.outputs = vec![loss, gradient[0].unwrap()];
        assert_eq!(keep_signs(&mut g, loss), 1);
        g.infer().unwrap();
        g.verify().unwrap();
        let names: Vec<_> = g.iter_nodes().map(|(_, n)| n.op.name().to_owned()).collect();
        let at = |name: &str| names.iter().position(|n| n == name).unwrap();
        assert_eq!(at("SignMask"), at("Relu") + 1);
        assert!(at("MaskGrad") > at("SignMask"));
        assert!(!names.contains(&"UnaryGrad".to_owned()), "{names:?}");
    }
}
