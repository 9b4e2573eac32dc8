//! Results of the forward pass that are computed again for the backward pass instead of being kept (segment
//! checkpointing: Chen et al., arXiv 1604.06174; the cuts by dynamic programming over the order of the nodes).

use std::collections::HashMap;

use crate::{Graph, GraphError, NodeId, ValueId, ValueKind};

/// Results up to this size are always kept: computing them again costs more than they take.
const KEPT_BYTES_MAX: usize = 16 << 10;

/// A training step as recomputation sees it: the nodes that the loss depends on, in order, and the rest.
#[derive(Clone, Debug)]
pub struct ForwardPass {
    nodes: Vec<NodeId>,
    /// Per value: its bytes if it is a result of the forward pass, else 0.
    bytes: Vec<usize>,
    /// Per value: position in `nodes` of its node; of the last node in the forward pass that reads it.
    made: Vec<usize>,
    last_read: Vec<usize>,
    /// Per value: read by the backward pass.
    read_later: Vec<bool>,
}

const NOWHERE: usize = usize::MAX;

impl ForwardPass {
    /// The nodes that `loss` depends on; `graph` has inferred types.
    pub fn of(graph: &Graph, loss: ValueId) -> ForwardPass {
        let mut needed = vec![false; graph.values.len()];
        needed[loss.index()] = true;
        for (_, node) in graph.iter_nodes().rev() {
            if node.outputs.iter().flatten().any(|v| needed[v.index()]) {
                for v in node.inputs.iter().flatten() {
                    needed[v.index()] = true;
                }
            }
        }
        // What is prepared on the way for the backward pass (signs, slices of channels) belongs to the forward pass.
        let mut made_here = vec![false; graph.values.len()];
        let mut nodes: Vec<NodeId> = Vec::new();
        let mut before_loss = true;
        for (id, node) in graph.iter_nodes() {
            let prepares = before_loss
                && node.op.updated_states() == 0
                && node.inputs.iter().flatten().any(|v| made_here[v.index()])
                && node.inputs.iter().flatten().all(|v| {
                    made_here[v.index()] || !matches!(graph.value(*v).kind, ValueKind::Output { .. })
                });
            if prepares || node.outputs.iter().flatten().any(|v| needed[v.index()]) {
                nodes.push(id);
                for v in node.outputs.iter().flatten() {
                    made_here[v.index()] = true;
                    before_loss &= *v != loss;
                }
            }
        }
        let n = graph.values.len();
        let mut pass = ForwardPass {
            bytes: vec![0; n],
            made: vec![NOWHERE; n],
            last_read: vec![0; n],
            read_later: vec![false; n],
            nodes,
        };
        let mut is_forward = vec![false; graph.nodes.len()];
        for (at, &id) in pass.nodes.iter().enumerate() {
            is_forward[id.index()] = true;
            let node = graph.node(id);
            for v in node.inputs.iter().flatten() {
                pass.last_read[v.index()] = at;
            }
            for v in node.outputs.iter().flatten() {
                pass.made[v.index()] = at;
                pass.bytes[v.index()] = graph.value(*v).ty.tensor().and_then(|t| t.size_bytes()).unwrap_or(0);
            }
        }
        for (id, node) in graph.iter_nodes() {
            if !is_forward[id.index()] {
                for v in node.inputs.iter().flatten() {
                    pass.read_later[v.index()] = true;
                }
            }
        }
        pass
    }

    /// Bytes that are kept from the forward pass for the backward pass when nothing is computed again.
    pub fn kept_bytes(&self) -> usize {
        (0..self.bytes.len()).filter(|&v| self.read_later[v]).map(|v| self.bytes[v]).sum()
    }

    /// Ways to cut the pass into segments, from few cuts to many. A cut is a position among the nodes of the pass: what
    /// crosses it is kept, what lies between two cuts is computed again. For each bound on the bytes that one segment
    /// keeps while it is computed again, the cuts are those that least bytes cross.
    pub fn cuts(&self) -> Vec<Vec<usize>> {
        let n = self.nodes.len();
        let total = self.kept_bytes();
        // Bytes that cross each position: made before, read in the forward pass behind it.
        let mut crossing = vec![0usize; n + 1];
        // Kept bytes by the position of their node.
        let mut kept_at = vec![0usize; n + 1];
        for v in 0..self.bytes.len() {
            if self.made[v] == NOWHERE {
                continue;
            }
            for c in &mut crossing[self.made[v] + 1..=self.last_read[v].max(self.made[v])] {
                *c += self.bytes[v];
            }
            if self.read_later[v] && self.bytes[v] > KEPT_BYTES_MAX {
                kept_at[self.made[v] + 1] += self.bytes[v];
            }
        }
        for i in 0..n {
            kept_at[i + 1] += kept_at[i];
        }
        let mut found: Vec<Vec<usize>> = Vec::new();
        let mut parts = 2.0f64;
        while parts <= n as f64 && parts <= 256.0 {
            let bound = (total as f64 / parts) as usize;
            parts *= 1.5;
            // least[i]: fewest crossing bytes of cuts such that the nodes before i are in segments within the bound.
            let mut least: Vec<Option<(usize, usize)>> = vec![None; n + 1];
            least[0] = Some((0, 0));
            for i in 1..=n {
                let mut best: Option<(usize, usize)> = None;
                for j in (0..i).rev() {
                    let fits = kept_at[i] - kept_at[j] <= bound || j + 1 == i;
                    if !fits {
                        break;
                    }
                    if let Some((bytes, _)) = least[j] {
                        let here = bytes + if i < n { crossing[i] } else { 0 };
                        if best.is_none_or(|(b, _)| here < b) {
                            best = Some((here, j));
                        }
                    }
                }
                least[i] = best;
            }
            let mut cuts = Vec::new();
            let mut at = n;
            while let Some((_, from)) = least[at].filter(|_| at > 0) {
                if from > 0 {
                    cuts.push(from);
                }
                at = from;
            }
            cuts.reverse();
            if !cuts.is_empty() && !found.contains(&cuts) {
                found.push(cuts);
            }
        }
        found
    }

    /// Rewrites the step so that what lies between two of the `cuts` is computed again right before the backward pass
    /// first needs it; returns how many nodes are computed twice. What is random, small or updates a state is kept.
    ///
    /// # Errors
    /// When the graph turns out to be contradictory.
    pub fn recompute(&self, graph: &mut Graph, cuts: &[usize]) -> Result<usize, GraphError> {
        let segment_of = |at: usize| cuts.partition_point(|&c| c <= at);
        let last_segment = cuts.len();
        let is_forward: std::collections::HashSet<NodeId> = self.nodes.iter().copied().collect();
        // A value is computed again if nothing keeps it anyway: it ends inside its segment, which is not the last.
        let again = |graph: &Graph, v: ValueId| {
            let at = self.made.get(v.index()).copied().unwrap_or(NOWHERE);
            if at == NOWHERE || self.bytes[v.index()] <= KEPT_BYTES_MAX {
                return false;
            }
            let node = graph.node(self.nodes[at]);
            let segment = segment_of(at);
            segment != last_segment
                && segment_of(self.last_read[v.index()].max(at)) == segment
                && !node.op.is_random()
                && node.op.updated_states() == 0
                && !graph.outputs.contains(&v)
        };
        let before = graph.node_ids();
        let mut clones: HashMap<ValueId, ValueId> = HashMap::new();
        let mut order = Vec::with_capacity(before.len());
        let mut count = 0;
        for &id in &before {
            if !is_forward.contains(&id) {
                let operands: Vec<ValueId> = graph.node(id).inputs.iter().copied().flatten().collect();
                for v in operands {
                    if !again(graph, v) {
                        continue;
                    }
                    let clone = match clones.get(&v) {
                        Some(&clone) => clone,
                        None => {
                            let made = order.len();
                            self.clone_value(graph, v, &again, &mut clones, &mut order);
                            count += order.len() - made;
                            clones[&v]
                        }
                    };
                    for input in graph.node_mut(id).inputs.iter_mut().flatten() {
                        if *input == v {
                            *input = clone;
                        }
                    }
                }
            }
            order.push(id.index());
        }
        graph.reorder(&order);
        graph.infer()?;
        Ok(count)
    }

    /// Appends what computes `v` again, operands first.
    fn clone_value(
        &self,
        graph: &mut Graph,
        v: ValueId,
        again: &dyn Fn(&Graph, ValueId) -> bool,
        clones: &mut HashMap<ValueId, ValueId>,
        order: &mut Vec<usize>,
    ) {
        // A stack instead of recursion: segments may be long.
        let mut stack = vec![v];
        while let Some(&v) = stack.last() {
            if clones.contains_key(&v) {
                stack.pop();
                continue;
            }
            let ValueKind::Output { node: id, .. } = graph.value(v).kind else {
                stack.pop();
                continue;
            };
            let node = graph.node(id).clone();
            let missing: Vec<ValueId> = node
                .inputs
                .iter()
                .copied()
                .flatten()
                .filter(|&x| again(graph, x) && !clones.contains_key(&x))
                .collect();
            if !missing.is_empty() {
                stack.extend(missing);
                continue;
            }
            let inputs =
                node.inputs.iter().map(|x| x.map(|x| clones.get(&x).copied().unwrap_or(x))).collect();
            let names = node
                .outputs
                .iter()
                .enumerate()
                .map(|(i, o)| match o {
                    Some(o) => format!("{}/again", graph.value(*o).name),
                    None => format!("{}/again/{i}", node.name),
                })
                .collect();
            let outputs =
                graph.add_node_named(format!("{}/again", node.name), node.op.clone(), inputs, names);
            let made = graph.nodes.len() - 1;
            for (i, (old, &new)) in node.outputs.iter().zip(&outputs).enumerate() {
                match old {
                    Some(old) => {
                        graph.value_mut(new).ty = graph.value(*old).ty.clone();
                        clones.insert(*old, new);
                    }
                    None => graph.nodes[made].as_mut().expect("just made").outputs[i] = None,
                }
            }
            order.push(made);
            stack.pop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BinaryOp, DType, Op, ReduceOp, TensorType, UnaryOp};

    /// A chain of exponentials with a backward pass written by hand: each gradient reads the result of its layer.
    fn chain(layers: usize, elements: usize) -> (Graph, ValueId) {
        let mut g = Graph::new("chain");
        let mut x = g.add_input("x", TensorType::fixed(DType::F32, &[elements]));
        let mut results = Vec::new();
        for i in 0..layers {
            x = g.add_node(format!("f{i}"), Op::Unary(UnaryOp::Exp), &[x], 1)[0];
            results.push(x);
        }
        let sum = Op::Reduce { op: ReduceOp::Sum, keep_dims: true, noop_with_empty_axes: false };
        let loss = g.add_node("loss", sum, &[x], 1)[0];
        let mut dy = loss;
        for (i, &y) in results.iter().enumerate().rev() {
            dy = g.add_node(format!("b{i}"), Op::Binary(BinaryOp::Mul), &[y, dy], 1)[0];
        }
        g.outputs = vec![loss, dy];
        g.infer().unwrap();
        (g, loss)
    }

    #[test]
    fn segments_are_computed_again_before_they_are_needed() {
        let (mut g, loss) = chain(9, 10_000);
        let pass = ForwardPass::of(&g, loss);
        assert_eq!(pass.nodes.len(), 10);
        assert_eq!(pass.kept_bytes(), 9 * 40_000 + 4);
        let all = pass.cuts();
        assert!(all.iter().any(|c| c.len() == 2), "{all:?}");
        let count = pass.recompute(&mut g, &[3, 6]).unwrap();
        g.verify().unwrap();
        // f2 and f5 cross the cuts and stay; f0, f1, f3 and f4 are computed again.
        assert_eq!(count, 4);
        let names: Vec<_> = g.iter_nodes().map(|(_, n)| n.name.as_str()).collect();
        assert_eq!(
            names[10..],
            [
                "b8", "b7", "b6", "b5", "f3/again", "f4/again", "b4", "b3", "b2", "f0/again", "f1/again",
                "b1", "b0"
            ]
        );
    }

    #[test]
    fn what_is_small_is_kept() {
        let (mut g, loss) = chain(9, 100);
        let pass = ForwardPass::of(&g, loss);
        assert_eq!(pass.recompute(&mut g, &[3, 6]).unwrap(), 0);
    }
}
