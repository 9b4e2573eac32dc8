use serde::{Deserialize, Serialize};
use std::sync::Arc;

use crate::error::{missing_node, missing_value};
use crate::{Constant, GraphError, Op, StoredTensor, Tensor, TensorType, ValueType};

/// Index of a [`Value`] in its graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ValueId(pub u32);

/// Index of a [`Node`] in its graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub u32);

impl ValueId {
    /// The index as `usize`.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl NodeId {
    /// The index as `usize`.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum ValueKind {
    /// Given by the caller at each run.
    Input,
    /// Fixed.
    Constant(Constant),
    /// Kept between runs and updated in place: optimizer moments, KV caches, running statistics.
    /// The constant, if any, is its first content; without one it starts as zeros.
    State(Option<Constant>),
    /// Output `output` of `node`.
    Output {
        /// The producer.
        node: NodeId,
        /// Which of its outputs.
        output: u32,
    },
}

/// A tensor, sequence or optional that flows through the graph.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// Name in the model; unique within a graph.
    pub name: String,
    /// What it holds, as far as it is known.
    pub ty: ValueType,
    /// Where it comes from.
    pub kind: ValueKind,
}

impl Value {
    /// The constant, if the value is one.
    pub fn constant(&self) -> Option<&Constant> {
        match &self.kind {
            ValueKind::Constant(c) => Some(c),
            _ => None,
        }
    }

    /// The constant's tensor, if the value is a constant in memory.
    pub fn tensor(&self) -> Option<&Tensor> {
        self.constant()?.inline()
    }
}

/// One operation.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Name in the model, or one made from the operator; for messages and profiles.
    pub name: String,
    /// What it does.
    pub op: Op,
    /// Operands; `None` for an optional one that is absent.
    pub inputs: Vec<Option<ValueId>>,
    /// Results; `None` for an optional one that nobody wants.
    pub outputs: Vec<Option<ValueId>>,
}

impl Node {
    /// Operand `index`, if it is there.
    pub fn input(&self, index: usize) -> Option<ValueId> {
        self.inputs.get(index).copied().flatten()
    }

    /// Result `index`, if somebody wants it.
    pub fn output(&self, index: usize) -> Option<ValueId> {
        self.outputs.get(index).copied().flatten()
    }

    /// The first result.
    ///
    /// # Panics
    /// When the node has none, which [`Graph::verify`] refuses.
    pub fn out(&self) -> ValueId {
        self.output(0).expect("a verified node has a first output")
    }
}

/// A graph of operations.
///
/// Nodes are kept in an order in which every operand comes before its use ([`verify`](Self::verify) checks it,
/// [`sort`](Self::sort) restores it). Removed nodes leave a tombstone until [`compact`](Self::compact).
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Graph {
    /// Name in the model.
    pub name: String,
    /// All values; [`ValueId`] is an index into this.
    pub values: Vec<Value>,
    /// All nodes in execution order; [`NodeId`] is an index into this. `None` is a removed node.
    pub nodes: Vec<Option<Node>>,
    /// What the caller gives, in order.
    pub inputs: Vec<ValueId>,
    /// What the caller gets, in order.
    pub outputs: Vec<ValueId>,
    /// Names of the stores that [`StoredTensor::source`] refers to, such as the path of the model file.
    pub sources: Vec<String>,
}

impl Graph {
    /// An empty graph.
    pub fn new(name: impl Into<String>) -> Graph {
        Graph { name: name.into(), ..Graph::default() }
    }

    fn push_value(&mut self, name: String, ty: ValueType, kind: ValueKind) -> ValueId {
        let id = ValueId(u32::try_from(self.values.len()).expect("fewer than 2^32 values"));
        self.values.push(Value { name, ty, kind });
        id
    }

    /// Adds an input.
    pub fn add_input(&mut self, name: impl Into<String>, ty: impl Into<ValueType>) -> ValueId {
        let id = self.push_value(name.into(), ty.into(), ValueKind::Input);
        self.inputs.push(id);
        id
    }

    /// Adds a constant that lives in memory.
    pub fn add_constant(&mut self, name: impl Into<String>, tensor: Tensor) -> ValueId {
        let ty = tensor.tensor_type().into();
        self.push_value(name.into(), ty, ValueKind::Constant(Constant::Inline(Arc::new(tensor))))
    }

    /// Adds a constant whose bytes stay in a store.
    pub fn add_stored(&mut self, name: impl Into<String>, ty: TensorType, stored: StoredTensor) -> ValueId {
        self.push_value(name.into(), ty.into(), ValueKind::Constant(Constant::Stored(stored)))
    }

    /// Adds a state; see [`ValueKind::State`].
    pub fn add_state(
        &mut self,
        name: impl Into<String>,
        ty: impl Into<ValueType>,
        initial: Option<Constant>,
    ) -> ValueId {
        self.push_value(name.into(), ty.into(), ValueKind::State(initial))
    }

    /// Appends a node with all `inputs` present and `output_count` outputs named after the node.
    pub fn add_node(
        &mut self,
        name: impl Into<String>,
        op: Op,
        inputs: &[ValueId],
        output_count: usize,
    ) -> Vec<ValueId> {
        let name = name.into();
        let names =
            (0..output_count).map(|i| if i == 0 { name.clone() } else { format!("{name}:{i}") }).collect();
        let inputs = inputs.iter().map(|&v| Some(v)).collect();
        self.add_node_named(name, op, inputs, names)
    }

    /// Appends a node whose outputs have the given names.
    pub fn add_node_named(
        &mut self,
        name: impl Into<String>,
        op: Op,
        inputs: Vec<Option<ValueId>>,
        output_names: Vec<String>,
    ) -> Vec<ValueId> {
        let node = NodeId(u32::try_from(self.nodes.len()).expect("fewer than 2^32 nodes"));
        let outputs: Vec<ValueId> = (0u32..)
            .zip(output_names)
            .map(|(output, name)| {
                self.push_value(name, ValueType::Unknown, ValueKind::Output { node, output })
            })
            .collect();
        let outputs_wanted = outputs.iter().map(|&v| Some(v)).collect();
        self.nodes.push(Some(Node { name: name.into(), op, inputs, outputs: outputs_wanted }));
        outputs
    }

    /// The value with this id.
    ///
    /// # Panics
    /// When it is not of this graph.
    pub fn value(&self, id: ValueId) -> &Value {
        self.values.get(id.index()).unwrap_or_else(|| panic!("{}", missing_value(id)))
    }

    /// The value with this id, to be changed.
    ///
    /// # Panics
    /// When it is not of this graph.
    pub fn value_mut(&mut self, id: ValueId) -> &mut Value {
        self.values.get_mut(id.index()).unwrap_or_else(|| panic!("{}", missing_value(id)))
    }

    /// The node with this id.
    ///
    /// # Panics
    /// When it was removed or is not of this graph.
    pub fn node(&self, id: NodeId) -> &Node {
        self.nodes.get(id.index()).and_then(Option::as_ref).unwrap_or_else(|| panic!("{}", missing_node(id)))
    }

    /// The node with this id, to be changed. Keep the outputs' [`ValueKind::Output`] in step.
    ///
    /// # Panics
    /// When it was removed or is not of this graph.
    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes
            .get_mut(id.index())
            .and_then(Option::as_mut)
            .unwrap_or_else(|| panic!("{}", missing_node(id)))
    }

    /// The living nodes in execution order.
    pub fn iter_nodes(&self) -> impl DoubleEndedIterator<Item = (NodeId, &Node)> {
        self.nodes.iter().enumerate().filter_map(|(i, n)| Some((NodeId(i as u32), n.as_ref()?)))
    }

    /// Ids of the living nodes in execution order, detached from the graph so that it can be changed meanwhile.
    pub fn node_ids(&self) -> Vec<NodeId> {
        self.iter_nodes().map(|(id, _)| id).collect()
    }

    /// Number of living nodes.
    pub fn node_count(&self) -> usize {
        self.iter_nodes().count()
    }

    /// The node that makes `value`, if one does.
    pub fn producer(&self, value: ValueId) -> Option<NodeId> {
        match self.value(value).kind {
            ValueKind::Output { node, .. } => Some(node),
            _ => None,
        }
    }

    /// For each value, the nodes that read it (once per operand position), in execution order.
    pub fn consumers(&self) -> Vec<Vec<NodeId>> {
        let mut consumers = vec![Vec::new(); self.values.len()];
        for (id, node) in self.iter_nodes() {
            for input in node.inputs.iter().flatten() {
                consumers[input.index()].push(id);
            }
        }
        consumers
    }

    /// The value with this name.
    pub fn find(&self, name: &str) -> Option<ValueId> {
        self.values.iter().position(|v| v.name == name).map(|i| ValueId(i as u32))
    }

    /// Makes every reader of `old` (nodes and graph outputs) read `new`.
    pub fn replace_uses(&mut self, old: ValueId, new: ValueId) {
        for node in self.nodes.iter_mut().flatten() {
            for input in node.inputs.iter_mut().flatten() {
                if *input == old {
                    *input = new;
                }
            }
        }
        for output in &mut self.outputs {
            if *output == old {
                *output = new;
            }
        }
    }

    /// Removes a node. Its outputs stay as values without a producer until [`compact`](Self::compact) drops them;
    /// nobody may read them any more.
    pub fn remove_node(&mut self, id: NodeId) {
        self.nodes[id.index()] = None;
    }

    /// Turns a node's output into a constant and detaches it from the node.
    pub fn make_constant(&mut self, value: ValueId, tensor: Tensor) {
        if let ValueKind::Output { node, output } = self.value(value).kind
            && let Some(node) = self.nodes[node.index()].as_mut()
        {
            node.outputs[output as usize] = None;
        }
        let v = self.value_mut(value);
        v.ty = tensor.tensor_type().into();
        v.kind = ValueKind::Constant(Constant::Inline(Arc::new(tensor)));
    }

    /// Restores an order in which operands come before their uses; keeps the present order where it can.
    ///
    /// # Errors
    /// [`GraphError::Structure`] naming a node on a cycle.
    pub fn sort(&mut self) -> Result<(), GraphError> {
        let mut waiting: Vec<usize> = vec![0; self.nodes.len()];
        let mut readers: Vec<Vec<usize>> = vec![Vec::new(); self.nodes.len()];
        let mut ready = std::collections::BinaryHeap::new();
        for (id, node) in self.iter_nodes() {
            for producer in node.inputs.iter().flatten().filter_map(|&v| self.producer(v)) {
                waiting[id.index()] += 1;
                readers[producer.index()].push(id.index());
            }
            if waiting[id.index()] == 0 {
                ready.push(std::cmp::Reverse(id.index()));
            }
        }
        let mut order = Vec::with_capacity(self.nodes.len());
        while let Some(std::cmp::Reverse(i)) = ready.pop() {
            order.push(i);
            for &reader in &readers[i] {
                waiting[reader] -= 1;
                if waiting[reader] == 0 {
                    ready.push(std::cmp::Reverse(reader));
                }
            }
        }
        if order.len() != self.node_count() {
            let (_, stuck) = self
                .iter_nodes()
                .find(|(id, _)| waiting[id.index()] > 0)
                .expect("a node is missing from the order, so one is still waiting");
            let name = stuck.name.clone();
            return Err(GraphError::structure(self, format!("node {name:?} depends on its own result")));
        }
        self.reorder(&order);
        Ok(())
    }

    /// Puts the nodes into the given order (indices of living nodes) and renumbers them.
    pub(crate) fn reorder(&mut self, order: &[usize]) {
        let mut old: Vec<Option<Node>> = std::mem::take(&mut self.nodes);
        for &i in order {
            let node = old[i].take();
            let id = NodeId(self.nodes.len() as u32);
            for value in node.iter().flat_map(|n| n.outputs.iter().flatten()) {
                if let ValueKind::Output { node, .. } = &mut self.values[value.index()].kind {
                    *node = id;
                }
            }
            self.nodes.push(node);
        }
    }

    /// Appends the nodes of `other`, with `prefix` before every name. A value of `other` that `bound` names is that value of
    /// this graph; other inputs, constants and states are copied. Returns the value here for each value of `other`. The
    /// outputs of `other` do not become outputs, and its stores have to be those of this graph.
    pub fn embed(
        &mut self,
        other: &Graph,
        prefix: &str,
        bound: &std::collections::HashMap<ValueId, ValueId>,
    ) -> Vec<ValueId> {
        let offset = self.nodes.len() as u32;
        let mut here = Vec::with_capacity(other.values.len());
        for (i, value) in other.values.iter().enumerate() {
            let id = ValueId(i as u32);
            if let Some(&v) = bound.get(&id) {
                here.push(v);
                continue;
            }
            let kind = match &value.kind {
                ValueKind::Output { node, output } => {
                    ValueKind::Output { node: NodeId(node.0 + offset), output: *output }
                }
                other => other.clone(),
            };
            here.push(self.push_value(format!("{prefix}{}", value.name), value.ty.clone(), kind));
            if value.kind == ValueKind::Input && other.inputs.contains(&id) {
                self.inputs.push(here[i]);
            }
        }
        let renumber = |v: &Option<ValueId>| v.map(|v| here[v.index()]);
        for node in &other.nodes {
            self.nodes.push(node.as_ref().map(|n| Node {
                name: format!("{prefix}{}", n.name),
                op: n.op.clone(),
                inputs: n.inputs.iter().map(renumber).collect(),
                outputs: n.outputs.iter().map(renumber).collect(),
            }));
        }
        here
    }

    /// Drops tombstones and the values that nothing refers to; ids change.
    pub fn compact(&mut self) {
        let order: Vec<usize> = self.iter_nodes().map(|(id, _)| id.index()).collect();
        self.reorder(&order);
        let mut used = vec![false; self.values.len()];
        for v in self.inputs.iter().chain(&self.outputs) {
            used[v.index()] = true;
        }
        for node in self.nodes.iter().flatten() {
            for v in node.inputs.iter().chain(&node.outputs).flatten() {
                used[v.index()] = true;
            }
        }
        let mut new_id = vec![ValueId(u32::MAX); self.values.len()];
        let mut kept = Vec::new();
        for (i, value) in std::mem::take(&mut self.values).into_iter().enumerate() {
            if used[i] {
                new_id[i] = ValueId(kept.len() as u32);
                kept.push(value);
            }
        }
        self.values = kept;
        let renumber = |v: &mut ValueId| *v = new_id[v.index()];
        self.inputs.iter_mut().chain(&mut self.outputs).for_each(renumber);
        for node in self.nodes.iter_mut().flatten() {
            node.inputs.iter_mut().chain(&mut node.outputs).flatten().for_each(renumber);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BinaryOp, DType, UnaryOp};

    fn chain() -> (Graph, ValueId, ValueId) {
        let mut g = Graph::new("chain");
        let x = g.add_input("x", TensorType::fixed(DType::F32, &[4]));
        let a = g.add_node("a", Op::Unary(UnaryOp::Exp), &[x], 1)[0];
        let b = g.add_node("b", Op::Binary(BinaryOp::Add), &[a, x], 1)[0];
        g.outputs.push(b);
        (g, a, b)
    }

    #[test]
    fn sorting_restores_the_order_and_finds_cycles() {
        let (mut g, a, b) = chain();
        g.reorder(&[1, 0]);
        assert!(g.verify().is_err());
        g.sort().unwrap();
        g.verify().unwrap();
        let exp = g.producer(a).unwrap();
        g.node_mut(exp).inputs[0] = Some(b);
        assert!(g.sort().unwrap_err().to_string().contains("depends on its own result"));
    }

    #[test]
    fn compacting_drops_what_nobody_reads() {
        let (mut g, a, b) = chain();
        let x = g.inputs[0];
        g.replace_uses(a, x);
        g.remove_node(g.producer(a).unwrap());
        let unused = g.add_constant("unused", Tensor::scalar(1f32));
        assert_eq!(g.value(unused).name, "unused");
        g.compact();
        assert_eq!((g.node_count(), g.values.len()), (1, 2));
        assert_eq!(g.value(g.outputs[0]).name, "b");
        let _ = b;
        g.verify().unwrap();
    }
}
