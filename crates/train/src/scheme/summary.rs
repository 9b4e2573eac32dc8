//! What a step holds and computes, counted on its graph.

use std::collections::HashMap;

use lightering_graph::passes::ForwardPass;
use lightering_graph::{Op, TensorType, TrainOp, ValueId, ValueKind};
use lightering_units::{Bytes, Flops};
use serde::Serialize;

use crate::Step;
use crate::step::EVALUATION;

/// Counts of a training step, its evaluation left out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepSummary {
    /// Nodes of forward pass, backward pass and updates.
    pub nodes: usize,
    /// Parameters and constants.
    pub weights: Bytes,
    /// Elements that change.
    pub trained_elements: u64,
    /// Results of the forward pass that the backward pass reads.
    pub saved_activations: Bytes,
    /// Gradients of parameters that are alive at once at most.
    pub gradients: Bytes,
    /// All gradients of parameters together: what would be alive without early apply.
    pub gradients_in_all: Bytes,
    /// The optimizer's moments.
    pub moments: Bytes,
    /// Arithmetic of the forward pass.
    pub forward_flops: Flops,
    /// Arithmetic of the backward pass, without updates.
    pub backward_flops: Flops,
}

impl StepSummary {
    /// Counts.
    pub fn of(step: &Step) -> StepSummary {
        let graph = &step.graph;
        let bytes =
            |v: ValueId| graph.value(v).ty.tensor().and_then(TensorType::size_bytes).unwrap_or(0) as u64;
        let mut forward = vec![false; graph.values.len()];
        forward[step.loss.index()] = true;
        let mut s = StepSummary {
            nodes: 0,
            weights: Bytes::ZERO,
            trained_elements: 0,
            saved_activations: Bytes(ForwardPass::of(graph, step.loss).kept_bytes() as u64),
            gradients: Bytes::ZERO,
            gradients_in_all: Bytes::ZERO,
            moments: Bytes::ZERO,
            forward_flops: Flops(0.0),
            backward_flops: Flops(0.0),
        };
        for (id, node) in graph.iter_nodes().rev() {
            let is_forward = node.outputs.iter().flatten().any(|v| forward[v.index()]);
            if is_forward {
                for v in node.inputs.iter().flatten() {
                    forward[v.index()] = true;
                }
            }
            if node.name.starts_with(EVALUATION) {
                continue;
            }
            s.nodes += 1;
            match &node.op {
                Op::Train(op) if matches!(**op, TrainOp::Update { .. }) => {}
                _ if is_forward => s.forward_flops += graph.node_cost(id).flops,
                _ => s.backward_flops += graph.node_cost(id).flops,
            }
        }
        // Position at which each gradient comes and at which it is used up.
        let mut made = HashMap::new();
        let mut lives = Vec::new();
        for (at, (_, node)) in graph.iter_nodes().enumerate() {
            for v in node.outputs.iter().flatten() {
                made.insert(*v, at);
            }
            if let Op::Train(op) = &node.op
                && let TrainOp::Update { rule, .. } = **op
                && let Some(parameter) = node.input(0)
                && let Some(gradient) = node.input(1 + rule.moments())
            {
                lives.push((made.get(&gradient).copied().unwrap_or(at), at, bytes(gradient)));
                s.gradients_in_all += Bytes(bytes(gradient));
                s.moments += (0..rule.moments())
                    .filter_map(|i| node.input(1 + i))
                    .map(|v| Bytes(bytes(v)))
                    .fold(Bytes::ZERO, |a, b| a + b);
                s.trained_elements += bytes(gradient) / 4;
                debug_assert!(matches!(graph.value(parameter).kind, ValueKind::State(_)));
            }
        }
        let alive = |at: usize| lives.iter().filter(|l| l.0 <= at && at <= l.1).map(|l| l.2).sum::<u64>();
        s.gradients = Bytes(lives.iter().map(|l| alive(l.1)).max().unwrap_or(0));
        for (i, value) in graph.values.iter().enumerate() {
            let moment = step.moments.contains(&value.name);
            if matches!(value.kind, ValueKind::Constant(_) | ValueKind::State(_)) && !moment {
                s.weights += Bytes(bytes(ValueId(i as u32)));
            }
        }
        s
    }
}
