use super::Pass;
use crate::{Graph, GraphError, Op};

/// Removes nodes whose results nobody reads, unwants optional results that nobody reads (so that their memory is not
/// planned), and drops captures that no body reads and values that nothing refers to.
#[derive(Clone, Copy, Debug, Default)]
pub struct DeadCode;

impl Pass for DeadCode {
    fn name(&self) -> &'static str {
        "dead code"
    }

    fn run(&self, graph: &mut Graph) -> Result<usize, GraphError> {
        Ok(clean(graph))
    }
}

/// Whether a kernel can do without result `i`.
fn is_optional_result(op: &Op, i: usize) -> bool {
    match op {
        Op::Rnn(_) | Op::Gru(_) | Op::Lstm(_) => true,
        Op::Dropout { .. }
        | Op::Pool(_)
        | Op::BatchNorm { .. }
        | Op::LayerNorm { .. }
        | Op::Attention(_)
        | Op::Unique { .. }
        | Op::SoftmaxCrossEntropyLoss(_) => i > 0,
        _ => false,
    }
}

/// Operand index of the first capture.
pub(super) fn first_capture(op: &Op) -> usize {
    match op {
        Op::If { .. } => 1,
        Op::Loop { carried, .. } => carried.saturating_add(2),
        Op::Scan { attributes, .. } => attributes.states.saturating_add(attributes.scan_inputs),
        Op::SequenceMap { operands, .. } => *operands,
        _ => usize::MAX,
    }
}

/// Index of the body input that stands for operand `i`.
pub(super) fn body_input(op: &Op, i: usize) -> usize {
    if matches!(op, Op::If { .. }) { i - 1 } else { i }
}

fn clean(graph: &mut Graph) -> usize {
    let mut changed = 0;
    let mut live = vec![false; graph.values.len()];
    for v in &graph.outputs {
        live[v.index()] = true;
    }
    for id in graph.node_ids().into_iter().rev() {
        let node = graph.node_mut(id);
        // What updates a state is done for its own sake.
        if node.op.updated_states() == 0 && !node.outputs.iter().flatten().any(|v| live[v.index()]) {
            graph.remove_node(id);
            changed += 1;
            continue;
        }
        for i in 0..node.outputs.len() {
            if is_optional_result(&node.op, i) && node.outputs[i].is_some_and(|v| !live[v.index()]) {
                node.outputs[i] = None;
                changed += 1;
            }
        }
        while node.outputs.len() > 1
            && node.outputs.last() == Some(&None)
            && is_optional_result(&node.op, node.outputs.len() - 1)
        {
            node.outputs.pop();
        }
        for body in node.op.bodies_mut() {
            changed += clean(body);
        }
        for i in (first_capture(&node.op)..node.inputs.len()).rev() {
            let at = body_input(&node.op, i);
            let is_read = |body: &&Graph| match body.inputs.get(at) {
                Some(v) => {
                    body.outputs.contains(v)
                        || body.nodes.iter().flatten().any(|n| n.inputs.contains(&Some(*v)))
                }
                None => true,
            };
            if !node.op.bodies().iter().any(is_read) {
                node.inputs.remove(i);
                for body in node.op.bodies_mut() {
                    body.inputs.remove(at);
                    body.compact();
                }
                changed += 1;
            }
        }
        for input in graph.node(id).inputs.iter().flatten() {
            live[input.index()] = true;
        }
    }
    graph.compact();
    changed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, TensorType, UnaryOp, ValueType};

    #[test]
    fn what_nobody_reads_goes() {
        let mut g = Graph::new("g");
        let x = g.add_input("x", TensorType::fixed(DType::F32, &[4]));
        let c = g.add_input("c", TensorType::fixed(DType::Bool, &[]));
        let unused = g.add_node("unused", Op::Unary(UnaryOp::Exp), &[x], 1)[0];
        g.add_node("of_unused", Op::Unary(UnaryOp::Exp), &[unused], 1);
        let y = g.add_node("y", Op::Dropout { seed: None }, &[x], 2)[0];
        let body = |name: &str| {
            let mut b = Graph::new(name);
            let _ignored = b.add_input("ignored", ValueType::Unknown);
            let v = b.add_input("v", ValueType::Unknown);
            let out = b.add_node("out", Op::Unary(UnaryOp::Exp), &[v], 1)[0];
            b.add_node("dead", Op::Unary(UnaryOp::Exp), &[out], 1);
            b.outputs.push(out);
            Box::new(b)
        };
        let op = Op::If { then_body: body("then"), else_body: body("else") };
        let z = g.add_node("z", op, &[c, x, y], 1)[0];
        g.outputs.push(z);
        // Two nodes, the mask, one node per body, one capture.
        assert_eq!(DeadCode.run(&mut g).unwrap(), 6);
        g.verify().unwrap();
        g.infer().unwrap();
        assert_eq!(g.node_count(), 2);
        let last = g.node(g.producer(g.outputs[0]).unwrap());
        assert_eq!((last.inputs.len(), last.op.bodies()[0].inputs.len()), (2, 1));
        assert_eq!(last.op.bodies()[0].node_count(), 1);
        assert_eq!(g.node(g.node_ids()[0]).outputs.len(), 1);
        assert_eq!(DeadCode.run(&mut g).unwrap(), 0);
    }
}
