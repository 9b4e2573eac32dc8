//! Splits forward nodes that hide what their gradient needs.

use std::collections::HashSet;

use super::{DifferentiateOptions, GradientRule, rule_of};
use crate::infer::{Fact, infer_node};
use crate::{ElementwiseStep, Graph, GraphError, NodeId, Op, TrainOp, UnaryOp, ValueId, ValueKind};

/// Whether the gradient of an activation can be had from the result of the operator that it is part of.
pub(super) fn from_result(op: &UnaryOp) -> bool {
    match op {
        // The sign of the result says nothing of the operand's then.
        UnaryOp::LeakyRelu { alpha } => *alpha > 0.0,
        _ => TrainOp::unary_saves_result(op),
    }
}

/// Nodes to be put behind a place, and the nodes they replace.
struct Splitter<'g> {
    graph: &'g mut Graph,
    names: HashSet<String>,
    /// Where in the old order a new node goes.
    places: Vec<(usize, usize)>,
}

impl Splitter<'_> {
    fn fresh(&mut self, base: &str) -> String {
        let mut name = base.to_owned();
        let mut n = 1;
        while !self.names.insert(name.clone()) {
            n += 1;
            name = format!("{base}.{n}");
        }
        name
    }

    /// A node with one result, behind the old node at `place`.
    fn insert(
        &mut self,
        place: usize,
        base: &str,
        op: Op,
        inputs: Vec<Option<ValueId>>,
    ) -> Result<ValueId, GraphError> {
        let name = self.fresh(base);
        let v = self.graph.add_node_named(name.clone(), op, inputs, vec![name])[0];
        self.places.push((place, self.graph.nodes.len() - 1));
        self.infer(NodeId(self.graph.nodes.len() as u32 - 1))?;
        Ok(v)
    }

    fn infer(&mut self, id: NodeId) -> Result<(), GraphError> {
        let node = self.graph.node(id);
        let facts: Vec<Option<Fact<'_>>> = node
            .inputs
            .iter()
            .map(|v| v.map(|v| Fact::new(&self.graph.value(v).ty, self.graph.value(v).tensor())))
            .collect();
        let (types, outputs) = (infer_node(node, &facts)?, node.outputs.clone());
        for (v, ty) in outputs.into_iter().zip(types) {
            if let Some(v) = v {
                self.graph.value_mut(v).ty = ty;
            }
        }
        Ok(())
    }

    /// Lets the last inserted node make `old`, in place of the result it was given.
    fn takes_over(&mut self, old: ValueId) {
        let id = NodeId(self.graph.nodes.len() as u32 - 1);
        self.graph.node_mut(id).outputs[0] = Some(old);
        self.graph.value_mut(old).kind = ValueKind::Output { node: id, output: 0 };
    }

    fn chain(&mut self, id: NodeId) -> Result<(), GraphError> {
        let node = self.graph.node(id).clone();
        let (Op::Elementwise(steps), Some(mut running)) = (&node.op, node.input(0)) else { return Ok(()) };
        if steps.is_empty() {
            self.graph.node_mut(id).op = Op::Unary(UnaryOp::Identity);
            return Ok(());
        }
        for (i, step) in steps.iter().enumerate() {
            let (op, inputs) = match *step {
                ElementwiseStep::Unary(op) => (Op::Unary(op), vec![Some(running)]),
                ElementwiseStep::Binary { op, operand, swapped } => {
                    let other = node.input(operand);
                    let inputs =
                        if swapped { vec![other, Some(running)] } else { vec![Some(running), other] };
                    (Op::Binary(op), inputs)
                }
            };
            running = self.insert(id.index(), &format!("{}.step{i}", node.name), op, inputs)?;
        }
        self.takes_over(node.out());
        self.graph.remove_node(id);
        Ok(())
    }

    fn activation(&mut self, id: NodeId, act: UnaryOp) -> Result<(), GraphError> {
        let old = self.graph.node(id).out();
        match &mut self.graph.node_mut(id).op {
            Op::Conv(a) => a.activation = None,
            Op::ConvTranspose(a) => a.conv.activation = None,
            Op::MatMul(a) => a.activation = None,
            _ => return Ok(()),
        }
        let name = self.fresh(&format!("{}.before", self.graph.value(old).name));
        let ty = self.graph.value(old).ty.clone();
        // A value of the same type that the node makes from now on.
        let before = self.graph.add_state(name, ty, None);
        self.graph.value_mut(before).kind = ValueKind::Output { node: id, output: 0 };
        self.graph.node_mut(id).outputs[0] = Some(before);
        let base = format!("{}.activation", self.graph.node(id).name);
        self.insert(id.index(), &base, Op::Unary(act), vec![Some(before)])?;
        self.takes_over(old);
        Ok(())
    }
}

/// Splits chains of element-wise steps into nodes, and activations whose gradient needs their operand off the operator
/// that they are part of, where a gradient passes.
pub(super) fn split(
    graph: &mut Graph,
    asked: &[Option<ValueId>],
    options: &DifferentiateOptions,
) -> Result<(), GraphError> {
    let values = graph.values.iter().map(|v| v.name.clone());
    let names = values.chain(graph.iter_nodes().map(|(_, n)| n.name.clone())).collect();
    let ids = graph.node_ids();
    let mut s = Splitter { graph, names, places: Vec::new() };
    for id in ids.iter().copied() {
        let node = s.graph.node(id);
        let passes = node.outputs.iter().flatten().any(|v| asked[v.index()].is_some());
        if !passes || rule_of(node, options) != GradientRule::Exact {
            continue;
        }
        match (&node.op, node.op.activation()) {
            (Op::Elementwise(_), _) => s.chain(id)?,
            (_, Some(Some(act))) if !from_result(act) => {
                let act = *act;
                s.activation(id, act)?;
            }
            _ => {}
        }
    }
    if s.places.is_empty() {
        return Ok(());
    }
    let mut order: Vec<(usize, usize)> = s
        .graph
        .iter_nodes()
        .filter(|(id, _)| !s.places.iter().any(|p| p.1 == id.index()))
        .map(|(id, _)| (id.index(), 0))
        .collect();
    order.extend(s.places.iter().map(|&(place, node)| (place, node)));
    order.sort_unstable();
    // A node itself comes before what was put behind it.
    let order: Vec<usize> =
        order.into_iter().map(|(place, node)| if node == 0 { place } else { node }).collect();
    s.graph.reorder(&order);
    Ok(())
}
