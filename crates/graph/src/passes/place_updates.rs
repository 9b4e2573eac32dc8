use super::Pass;
use crate::{Graph, GraphError, NodeId};

/// Puts every node that overwrites a state right behind what it needs and behind the last reader of the old content, so
/// that a gradient is used up and freed as soon as it is there (PockEngine, "early apply") and nobody reads too late.
///
/// Belongs at the end: passes that move a reader would have to know about it otherwise.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlaceUpdates;

impl Pass for PlaceUpdates {
    fn name(&self) -> &'static str {
        "places of updates"
    }

    fn run(&self, graph: &mut Graph) -> Result<usize, GraphError> {
        let ids = graph.node_ids();
        let consumers = graph.consumers();
        let mut emitted = vec![false; graph.nodes.len()];
        // Per updating node: what has to come first.
        let mut waiting: Vec<(NodeId, Vec<NodeId>)> = Vec::new();
        for &id in &ids {
            let node = graph.node(id);
            let updated = node.op.updated_states();
            if updated == 0 {
                continue;
            }
            let mut before: Vec<NodeId> =
                node.inputs.iter().flatten().filter_map(|&v| graph.producer(v)).collect();
            for state in node.inputs[..updated].iter().flatten() {
                before.extend(consumers[state.index()].iter().copied().filter(|&c| c != id));
            }
            waiting.push((id, before));
        }
        if waiting.is_empty() {
            return Ok(0);
        }
        let mut order = Vec::with_capacity(ids.len());
        for &id in &ids {
            if graph.node(id).op.updated_states() > 0 {
                continue;
            }
            // Whoever reads the new content gets it, whatever else still waits.
            let needed: Vec<NodeId> =
                graph.node(id).inputs.iter().flatten().filter_map(|&v| graph.producer(v)).collect();
            waiting.retain(|(update, _)| {
                let now = needed.contains(update) && !emitted[update.index()];
                if now {
                    emitted[update.index()] = true;
                    order.push(update.index());
                }
                !now
            });
            emitted[id.index()] = true;
            order.push(id.index());
            loop {
                let before = order.len();
                waiting.retain(|(update, needs)| {
                    let ready = needs.iter().all(|n| emitted[n.index()]);
                    if ready {
                        emitted[update.index()] = true;
                        order.push(update.index());
                    }
                    !ready
                });
                if order.len() == before {
                    break;
                }
            }
        }
        for (update, _) in waiting {
            order.push(update.index());
        }
        let moved = order.iter().zip(&ids).filter(|(a, b)| **a != b.index()).count();
        graph.reorder(&order);
        Ok(moved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BinaryOp, DType, Op, TensorType, TrainOp, UnaryOp, UpdateRule};

    #[test]
    fn updates_follow_their_gradient_and_the_last_reader() {
        let mut g = Graph::new("step");
        let ty = TensorType::fixed(DType::F32, &[4]);
        let x = g.add_input("x", ty.clone());
        let schedule = g.add_input("schedule", TensorType::fixed(DType::F32, &[4]));
        let w = g.add_state("w", ty, None);
        let late = g.add_node("late reader", Op::Binary(BinaryOp::Mul), &[x, w], 1)[0];
        let gradient = g.add_node("gradient", Op::Unary(UnaryOp::Neg), &[x], 1)[0];
        let other = g.add_node("other", Op::Unary(UnaryOp::Exp), &[late], 1)[0];
        let rule = UpdateRule::Sgd { momentum: 0.0, nesterov: false, weight_decay: 0.0 };
        let update = Op::Train(Box::new(TrainOp::Update { rule, axis: 0 }));
        g.add_node("update", update, &[w, gradient, schedule], 1);
        g.outputs.push(other);
        g.infer().unwrap();
        PlaceUpdates.run(&mut g).unwrap();
        g.verify().unwrap();
        let names: Vec<_> = g.iter_nodes().map(|(_, n)| n.name.as_str()).collect();
        assert_eq!(names, ["late reader", "gradient", "update", "other"]);
        crate::passes::DeadCode.run(&mut g).unwrap();
        assert_eq!(g.node_count(), 4, "an update is no dead code");
    }
}
