use std::collections::hash_map::DefaultHasher;
use std::collections::{HashMap, HashSet};
use std::hash::{Hash, Hasher};

use super::Pass;
use crate::{Constant, DType, Graph, GraphError, NodeId, Tensor, ValueId, ValueKind};

/// Merges nodes that do the same to the same operands, and equal small constants.
///
/// Nodes with random results and those with bodies are left alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct CommonSubexpression;

impl Pass for CommonSubexpression {
    fn name(&self) -> &'static str {
        "common subexpressions"
    }

    fn run(&self, graph: &mut Graph) -> Result<usize, GraphError> {
        Ok(merge(graph))
    }
}

/// Constants above this are not compared.
const CONSTANT_BYTES_MAX: u64 = 64 << 10;

fn fingerprint(tensor: &Tensor) -> u64 {
    let mut hasher = DefaultHasher::new();
    tensor.as_bytes().hash(&mut hasher);
    tensor.as_strings().hash(&mut hasher);
    hasher.finish()
}

/// Equal bit for bit: `0.0` and `-0.0` differ, a NaN equals itself.
fn is_same(a: &Tensor, b: &Tensor) -> bool {
    a.dtype() == b.dtype()
        && a.dims() == b.dims()
        && a.as_bytes() == b.as_bytes()
        && a.as_strings() == b.as_strings()
}

fn merge(graph: &mut Graph) -> usize {
    let mut changed = 0;
    let mut alias: Vec<ValueId> = (0..graph.values.len() as u32).map(ValueId).collect();
    let outputs: HashSet<ValueId> = graph.outputs.iter().copied().collect();

    let mut read = vec![false; graph.values.len()];
    for v in graph.nodes.iter().flatten().flat_map(|n| n.inputs.iter().flatten()) {
        read[v.index()] = true;
    }
    let mut constants: HashMap<(DType, Vec<usize>, u64), Vec<ValueId>> = HashMap::new();
    for i in 0..graph.values.len() {
        let id = ValueId(i as u32);
        let ValueKind::Constant(Constant::Inline(tensor)) = &graph.values[i].kind else { continue };
        if !read[i] || tensor.size_bytes().0 > CONSTANT_BYTES_MAX || outputs.contains(&id) {
            continue;
        }
        let same =
            constants.entry((tensor.dtype(), tensor.dims().to_vec(), fingerprint(tensor))).or_default();
        match same.iter().find(|v| graph.value(**v).tensor().is_some_and(|t| is_same(t, tensor))) {
            Some(&first) => {
                alias[i] = first;
                changed += 1;
            }
            None => same.push(id),
        }
    }

    let mut seen: HashMap<(&'static str, Vec<Option<ValueId>>), Vec<NodeId>> = HashMap::new();
    for id in graph.node_ids() {
        let node = graph.node_mut(id);
        for input in node.inputs.iter_mut().flatten() {
            *input = alias[input.index()];
        }
        if !node.op.bodies().is_empty() {
            changed += node.op.bodies_mut().into_iter().map(merge).sum::<usize>();
            continue;
        }
        let node = graph.node(id);
        if node.op.is_random() {
            continue;
        }
        let same = seen.entry((node.op.name(), node.inputs.clone())).or_default();
        // The graph's outputs keep their names, so a node that makes one stays.
        let keeps = node.outputs.iter().flatten().any(|v| outputs.contains(v));
        let first = same.iter().copied().find(|&first| {
            let first = graph.node(first);
            first.op == node.op && first.outputs.len() == node.outputs.len()
        });
        match first {
            Some(first) if !keeps => {
                let removed = node.outputs.clone();
                for (i, output) in removed.into_iter().enumerate() {
                    let Some(output) = output else { continue };
                    match graph.node(first).outputs[i] {
                        Some(kept) => alias[output.index()] = kept,
                        // The first node did not make this result so far; now it does.
                        None => {
                            graph.node_mut(first).outputs[i] = Some(output);
                            graph.value_mut(output).kind =
                                ValueKind::Output { node: first, output: i as u32 };
                        }
                    }
                }
                graph.remove_node(id);
                changed += 1;
            }
            _ => same.push(id),
        }
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BinaryOp, Distribution, Op, RandomAttributes, TensorType, UnaryOp};

    #[test]
    fn equal_nodes_and_constants_merge() {
        let mut g = Graph::new("g");
        let x = g.add_input("x", TensorType::fixed(DType::F32, &[4]));
        let add = |g: &mut Graph, name: &str, value: f32| {
            let c = g.add_constant(format!("{name}_c"), Tensor::from_slice(&[1], &[value]));
            g.add_node(name, Op::Binary(BinaryOp::Add), &[x, c], 1)[0]
        };
        let (a, b, c) = (add(&mut g, "a", 1.0), add(&mut g, "b", 1.0), add(&mut g, "c", 2.0));
        let exp_a = g.add_node("exp_a", Op::Unary(UnaryOp::Exp), &[a], 1)[0];
        let exp_b = g.add_node("exp_b", Op::Unary(UnaryOp::Exp), &[b], 1)[0];
        let exp_c = g.add_node("exp_c", Op::Unary(UnaryOp::Exp), &[c], 1)[0];
        let sum = g.add_node("sum", Op::Binary(BinaryOp::Mul), &[exp_a, exp_b], 1)[0];
        let out = g.add_node("out", Op::Binary(BinaryOp::Mul), &[sum, exp_c], 1)[0];
        // A twin that is an output keeps its name.
        let twin = g.add_node("twin", Op::Binary(BinaryOp::Mul), &[sum, exp_c], 1)[0];
        g.outputs = vec![out, twin];
        assert_eq!(CommonSubexpression.run(&mut g).unwrap(), 3);
        g.verify().unwrap();
        assert_eq!(g.node(g.producer(sum).unwrap()).inputs, [Some(exp_a), Some(exp_a)]);
        assert_eq!(g.outputs, [out, twin]);
        assert_eq!(CommonSubexpression.run(&mut g).unwrap(), 0);
    }

    #[test]
    fn random_nodes_stay_apart() {
        let mut g = Graph::new("g");
        let distribution = Distribution::Uniform { low: 0.0, high: 1.0 };
        let op = Op::Random(RandomAttributes { distribution, dtype: None, dims: Some(vec![4]), seed: None });
        let a = g.add_node("a", op.clone(), &[], 1)[0];
        let b = g.add_node("b", op, &[], 1)[0];
        let y = g.add_node("y", Op::Binary(BinaryOp::Sub), &[a, b], 1)[0];
        g.outputs.push(y);
        assert_eq!(CommonSubexpression.run(&mut g).unwrap(), 0);
    }
}
