use super::Editor;
use crate::{BinaryOp, ElementwiseStep, Graph, GraphError, NodeId, Op, Pass, UnaryOp, ValueId};

/// Chains of element-wise operators become one sweep over memory.
///
/// Runs last, when convolutions and matrix products have taken what they can. A chain follows the operand that has
/// the shape of the result; other operands broadcast.
#[derive(Clone, Copy, Debug, Default)]
pub struct ElementwiseFusion;

/// Most steps of a chain, so that a kernel can hold it in a fixed table.
pub const STEPS_MAX: usize = 16;
/// Most operands of a chain.
pub const OPERANDS_MAX: usize = 8;

impl Pass for ElementwiseFusion {
    fn name(&self) -> &'static str {
        "element-wise chains"
    }

    fn run(&self, graph: &mut Graph) -> Result<usize, GraphError> {
        let mut e = Editor::new(graph);
        // Backwards, so that a chain is taken whole from its end.
        for id in e.ids().into_iter().rev() {
            if e.get(id).is_some() {
                fuse(&mut e, id);
            }
        }
        e.finish()
    }
}

fn is_arithmetic(op: BinaryOp) -> bool {
    matches!(
        op,
        BinaryOp::Add
            | BinaryOp::Sub
            | BinaryOp::Mul
            | BinaryOp::Div
            | BinaryOp::Pow
            | BinaryOp::PRelu
            | BinaryOp::Max
            | BinaryOp::Min
    )
}

fn is_smooth(op: UnaryOp) -> bool {
    !matches!(
        op,
        UnaryOp::IsInf { .. } | UnaryOp::IsNan | UnaryOp::Not | UnaryOp::BitwiseNot | UnaryOp::Identity
    )
}

/// Whether the node can be part of a chain.
fn joins(e: &Editor, id: NodeId) -> bool {
    let Some(node) = e.get(id) else { return false };
    let Some(out) = node.output(0).filter(|&v| e.is_f32(v)) else { return false };
    let kind = match &node.op {
        Op::Unary(op) => is_smooth(*op),
        Op::Binary(op) => is_arithmetic(*op),
        Op::Elementwise(_) => true,
        _ => false,
    };
    kind && e.dims(out).is_some() && node.inputs.iter().flatten().all(|&v| e.is_f32(v))
}

/// The operand that the chain goes on with: it has the shape of the result; better one that can join.
fn spine(e: &Editor, id: NodeId) -> Option<ValueId> {
    let node = e.node(id);
    let out = node.out();
    if let Op::Elementwise(_) = node.op {
        return node.input(0);
    }
    let full: Vec<ValueId> = node.inputs.iter().flatten().copied().filter(|&v| e.same_dims(v, out)).collect();
    let chained = |v: &&ValueId| e.private(**v) && e.producer(**v).is_some_and(|(p, _)| joins(e, p));
    // The later of two chains, so that the earlier one is finished by then.
    let best = full.iter().filter(chained).max_by_key(|v| e.producer(**v).map(|(p, _)| e.place(p)));
    best.or_else(|| full.iter().find(|&&v| !e.is_constant(v))).or(full.first()).copied()
}

fn fuse(e: &mut Editor, root: NodeId) {
    if !joins(e, root) {
        return;
    }
    let Some(mut at) = spine(e, root) else { return };
    let mut members = vec![(root, at)];
    let mut step_count = step_count_of(&e.node(root).op);
    loop {
        // A chain that reads its own start again needs it in memory.
        if members.last().is_some_and(|&(id, _)| reads_start(&e.node(id).op)) {
            break;
        }
        let Some((id, node)) = e.producer(at).filter(|_| e.private(at)) else { break };
        let more = step_count_of(&node.op);
        if !joins(e, id) || step_count + more > STEPS_MAX {
            break;
        }
        let Some(next) = spine(e, id) else { break };
        step_count += more;
        members.push((id, next));
        at = next;
        if operands(e, &members, at).len() > OPERANDS_MAX {
            members.pop();
            at = members.last().expect("the root stays").1;
            break;
        }
    }
    if members.len() < 2 {
        return;
    }
    let operands = operands(e, &members, at);
    if operands.len() > OPERANDS_MAX {
        return;
    }
    let place = |v: ValueId| operands.iter().position(|&o| o == v).expect("every operand was collected");
    let mut steps = Vec::new();
    for &(id, running) in members.iter().rev() {
        let node = e.node(id);
        match &node.op {
            Op::Unary(op) => steps.push(ElementwiseStep::Unary(*op)),
            Op::Binary(op) => {
                let (a, b) = (node.inputs[0], node.inputs[1]);
                let (Some(a), Some(b)) = (a, b) else { return };
                let swapped = a != running;
                steps.push(ElementwiseStep::Binary {
                    op: *op,
                    operand: place(if swapped { a } else { b }),
                    swapped,
                });
            }
            Op::Elementwise(inner) => {
                for step in inner {
                    steps.push(match *step {
                        ElementwiseStep::Binary { op, operand, swapped } => {
                            let Some(v) = node.input(operand) else { return };
                            ElementwiseStep::Binary { op, operand: place(v), swapped }
                        }
                        unary => unary,
                    });
                }
            }
            _ => return,
        }
    }
    let first = members.last().expect("a chain has members").0;
    e.absorb(root, first, Op::Elementwise(steps), operands.into_iter().map(Some).collect());
}

fn step_count_of(op: &Op) -> usize {
    match op {
        Op::Elementwise(steps) => steps.len(),
        _ => 1,
    }
}

fn reads_start(op: &Op) -> bool {
    let again = |s: &ElementwiseStep| matches!(s, ElementwiseStep::Binary { operand: 0, .. });
    matches!(op, Op::Elementwise(steps) if steps.iter().any(again))
}

/// What the chain reads: its start, then the other operands, each once.
fn operands(e: &Editor, members: &[(NodeId, ValueId)], start: ValueId) -> Vec<ValueId> {
    let mut operands = vec![start];
    for &(id, running) in members.iter().rev() {
        let node = e.node(id);
        let mut seen_running = false;
        for (i, v) in node.inputs.iter().enumerate() {
            let Some(v) = *v else { continue };
            // The running value itself is no operand, unless it is the start or read a second time.
            if v == running && !seen_running {
                seen_running = true;
                continue;
            }
            if matches!(node.op, Op::Elementwise(_)) && i == 0 {
                continue;
            }
            if !operands.contains(&v) {
                operands.push(v);
            }
        }
    }
    operands
}
