use std::collections::HashSet;

use crate::{
    Constant, DType, Evaluate, Graph, GraphError, Node, NodeId, Op, Tensor, TensorType, ValueId, ValueKind,
    ValueType,
};

/// Longest vector that a pass asks [`Evaluate::load`] for.
const LOADED_ELEMENTS_MAX: usize = 1 << 16;

/// A graph while a pass rewrites it: knows who reads what, keeps that true under changes, and puts new nodes where
/// they belong.
pub(crate) struct Editor<'g> {
    graph: &'g mut Graph,
    readers: Vec<Vec<NodeId>>,
    is_output: Vec<bool>,
    /// Where a node belongs: position in the old order, then order of insertion.
    places: Vec<(u32, u32)>,
    names: HashSet<String>,
    inserted: u32,
    changes: usize,
}

impl<'g> Editor<'g> {
    pub fn new(graph: &'g mut Graph) -> Editor<'g> {
        let readers = graph.consumers();
        let mut is_output = vec![false; graph.values.len()];
        for v in &graph.outputs {
            is_output[v.index()] = true;
        }
        let names = graph.values.iter().map(|v| v.name.clone()).collect();
        let places = (0..graph.nodes.len() as u32).map(|i| (i, u32::MAX)).collect();
        Editor { graph, readers, is_output, places, names, inserted: 0, changes: 0 }
    }

    /// Ids of the living nodes at this moment.
    pub fn ids(&self) -> Vec<NodeId> {
        self.graph.node_ids()
    }

    pub fn get(&self, id: NodeId) -> Option<&Node> {
        self.graph.nodes[id.index()].as_ref()
    }

    pub fn node(&self, id: NodeId) -> &Node {
        self.graph.node(id)
    }

    pub fn value(&self, v: ValueId) -> &crate::Value {
        self.graph.value(v)
    }

    /// Where the node stands relative to others.
    pub fn place(&self, id: NodeId) -> (u32, u32) {
        self.places[id.index()]
    }

    /// The node that makes `v`.
    pub fn producer(&self, v: ValueId) -> Option<(NodeId, &Node)> {
        let id = self.graph.producer(v)?;
        Some((id, self.get(id)?))
    }

    /// The node that makes `v` as its first output.
    pub fn maker(&self, v: ValueId) -> Option<&Node> {
        self.producer(v).map(|(_, n)| n).filter(|n| n.output(0) == Some(v))
    }

    pub fn readers(&self, v: ValueId) -> &[NodeId] {
        &self.readers[v.index()]
    }

    pub fn is_output(&self, v: ValueId) -> bool {
        self.is_output[v.index()]
    }

    /// The one node that reads `v`, once, when nobody outside does.
    pub fn only_reader(&self, v: ValueId) -> Option<NodeId> {
        match self.readers(v) {
            [one] if !self.is_output(v) => Some(*one),
            _ => None,
        }
    }

    /// Whether `v` is read exactly once, so that it vanishes when its reader does.
    pub fn private(&self, v: ValueId) -> bool {
        self.only_reader(v).is_some()
    }

    pub fn ty(&self, v: ValueId) -> Option<&TensorType> {
        self.value(v).ty.tensor()
    }

    pub fn dtype(&self, v: ValueId) -> Option<DType> {
        self.ty(v).map(|t| t.dtype)
    }

    pub fn dims(&self, v: ValueId) -> Option<Vec<usize>> {
        self.ty(v)?.dims()
    }

    pub fn is_f32(&self, v: ValueId) -> bool {
        self.dtype(v) == Some(DType::F32)
    }

    /// Whether both have the same, known shape.
    pub fn same_dims(&self, a: ValueId, b: ValueId) -> bool {
        matches!((self.dims(a), self.dims(b)), (Some(a), Some(b)) if a == b)
    }

    pub fn is_constant(&self, v: ValueId) -> bool {
        self.value(v).constant().is_some()
    }

    /// The constant in memory behind `v`.
    pub fn tensor(&self, v: ValueId) -> Option<&Tensor> {
        self.value(v).tensor()
    }

    /// The only element of a constant in memory.
    pub fn scalar(&self, v: ValueId) -> Option<f32> {
        let t = self.tensor(v).filter(|t| t.len() == 1)?;
        if !t.dtype().is_float() {
            return None;
        }
        t.to_f64s().map(|x| x[0] as f32)
    }

    /// The elements of an integer constant in memory.
    pub fn ints(&self, v: ValueId) -> Option<Vec<i64>> {
        self.tensor(v)?.to_i64s()
    }

    /// The elements of an optional integer operand: `Some(None)` when it is absent, `None` when it is not known.
    pub fn optional_ints(&self, v: Option<ValueId>) -> Option<Option<Vec<i64>>> {
        match v {
            None => Some(None),
            Some(v) => self.ints(v).map(Some),
        }
    }

    /// The elements of a short constant, wherever it is.
    ///
    /// # Errors
    /// When its store cannot be read.
    pub fn load(&self, v: ValueId, evaluate: &dyn Evaluate) -> Result<Option<Tensor>, GraphError> {
        let Some(ty) = self.ty(v) else { return Ok(None) };
        if ty.elements().is_none_or(|n| n > LOADED_ELEMENTS_MAX) {
            return Ok(None);
        }
        match self.value(v).constant() {
            Some(Constant::Inline(t)) => Ok(Some((**t).clone())),
            Some(Constant::Stored(stored)) => evaluate.load(stored, ty),
            None => Ok(None),
        }
    }

    /// [`load`](Self::load), as numbers.
    pub fn load_f64s(&self, v: ValueId, evaluate: &dyn Evaluate) -> Result<Option<Vec<f64>>, GraphError> {
        Ok(self.load(v, evaluate)?.and_then(|t| t.to_f64s()))
    }

    fn track(&mut self) {
        self.readers.resize(self.graph.values.len(), Vec::new());
        self.is_output.resize(self.graph.values.len(), false);
    }

    /// `base`, or `base` with a number when that is taken.
    pub fn fresh_name(&mut self, base: &str) -> String {
        let mut name = base.to_owned();
        let mut n = 1;
        while !self.names.insert(name.clone()) {
            n += 1;
            name = format!("{base}.{n}");
        }
        name
    }

    pub fn add_constant(&mut self, base: &str, tensor: Tensor) -> ValueId {
        let name = self.fresh_name(base);
        let v = self.graph.add_constant(name, tensor);
        self.track();
        v
    }

    pub fn add_ints(&mut self, base: &str, ints: &[i64]) -> ValueId {
        self.add_constant(base, Tensor::from_slice(&[ints.len()], ints))
    }

    pub fn add_dims(&mut self, base: &str, dims: &[usize]) -> ValueId {
        let ints: Vec<i64> = dims.iter().map(|&d| d as i64).collect();
        self.add_ints(base, &ints)
    }

    /// The constant `v` under another shape with as many elements; no bytes move.
    pub fn view_constant(&mut self, v: ValueId, dims: &[usize]) -> Option<ValueId> {
        let old = self.dims(v)?;
        if old == dims {
            return Some(v);
        }
        if old.iter().product::<usize>() != dims.iter().product::<usize>() {
            return None;
        }
        let value = self.value(v);
        let base = value.name.clone();
        let dtype = self.dtype(v)?;
        match value.constant()?.clone() {
            Constant::Inline(t) => {
                let t = (*t).clone().into_shape(dims);
                Some(self.add_constant(&base, t))
            }
            Constant::Stored(stored) => {
                let name = self.fresh_name(&base);
                let v = self.graph.add_stored(name, TensorType::fixed(dtype, dims), stored);
                self.track();
                Some(v)
            }
        }
    }

    /// Adds a node with one output, before `anchor` in the order.
    pub fn insert(
        &mut self,
        anchor: NodeId,
        base: &str,
        op: Op,
        inputs: &[ValueId],
        ty: TensorType,
    ) -> ValueId {
        let inputs = inputs.iter().map(|&v| Some(v)).collect();
        self.insert_with(anchor, base, op, inputs, vec![ty])[0]
    }

    /// Adds a node, before `anchor` in the order.
    pub fn insert_with(
        &mut self,
        anchor: NodeId,
        base: &str,
        op: Op,
        inputs: Vec<Option<ValueId>>,
        types: Vec<TensorType>,
    ) -> Vec<ValueId> {
        let names: Vec<String> = types.iter().map(|_| self.fresh_name(base)).collect();
        let id = NodeId(self.graph.nodes.len() as u32);
        for v in inputs.iter().flatten() {
            self.readers[v.index()].push(id);
        }
        let outputs = self.graph.add_node_named(names[0].clone(), op, inputs, names);
        self.track();
        for (&v, ty) in outputs.iter().zip(types) {
            self.graph.value_mut(v).ty = ValueType::Tensor(ty);
        }
        let place = (self.places[anchor.index()].0, self.inserted);
        self.inserted += 1;
        self.places.push(place);
        self.changes += 1;
        outputs
    }

    /// A reshape of `v` before `anchor`, or `v` itself when it has that shape.
    pub fn insert_reshape(&mut self, anchor: NodeId, base: &str, v: ValueId, dims: &[usize]) -> ValueId {
        if self.dims(v).as_deref() == Some(dims) {
            return v;
        }
        let dtype = self.dtype(v).expect("a reshaped value has a known type");
        let shape = self.add_dims(&format!("{base}.shape"), dims);
        let op = Op::Reshape { allow_zero: true };
        self.insert(anchor, base, op, &[v, shape], TensorType::fixed(dtype, dims))
    }

    /// A transposition of `v` before `anchor`.
    pub fn insert_transpose(&mut self, anchor: NodeId, base: &str, v: ValueId, perm: &[usize]) -> ValueId {
        let dims = self.dims(v).expect("a transposed value has a known shape");
        let dtype = self.dtype(v).expect("a transposed value has a known type");
        let out: Vec<usize> = perm.iter().map(|&p| dims[p]).collect();
        let op = Op::Transpose { perm: Some(perm.to_vec()) };
        self.insert(anchor, base, op, &[v], TensorType::fixed(dtype, &out))
    }

    /// Turns a node into another one that makes the same outputs.
    pub fn set(&mut self, id: NodeId, op: Op, inputs: Vec<Option<ValueId>>) {
        self.changes += 1;
        let node = self.graph.node_mut(id);
        node.op = op;
        let old = std::mem::replace(&mut node.inputs, inputs);
        for v in old.into_iter().flatten() {
            let readers = &mut self.readers[v.index()];
            if let Some(i) = readers.iter().position(|&r| r == id) {
                readers.remove(i);
            }
        }
        let new: Vec<ValueId> = self.graph.node(id).inputs.iter().flatten().copied().collect();
        for v in new {
            self.readers[v.index()].push(id);
        }
    }

    /// [`set`](Self::set) with all operands present.
    pub fn set_all(&mut self, id: NodeId, op: Op, inputs: &[ValueId]) {
        self.set(id, op, inputs.iter().map(|&v| Some(v)).collect());
    }

    /// [`set`](Self::set) that also takes over the name of the node whose work this mostly is.
    pub fn absorb(&mut self, id: NodeId, from: NodeId, op: Op, inputs: Vec<Option<ValueId>>) {
        self.graph.node_mut(id).name = self.graph.node(from).name.clone();
        self.set(id, op, inputs);
    }

    /// Drops all results of a node but the first; nobody may read them.
    pub fn keep_first_output(&mut self, id: NodeId) {
        self.graph.node_mut(id).outputs.truncate(1);
    }

    pub fn rename(&mut self, id: NodeId, name: &str) {
        self.graph.node_mut(id).name = name.to_owned();
    }

    /// Makes everybody who reads `old` read `new`, which is equal. A graph output keeps its name: then the producer
    /// of `new` makes `old` instead. False, and nothing changed, when that cannot be done.
    pub fn redirect(&mut self, old: ValueId, new: ValueId) -> bool {
        if old == new {
            return false;
        }
        if !self.is_output(old) {
            self.move_readers(old, new);
            self.changes += 1;
            return true;
        }
        let ValueKind::Output { node, output } = self.value(new).kind else { return false };
        let taken = self.is_output(new) || self.get(node).is_none();
        if taken {
            return false;
        }
        if let ValueKind::Output { node: n, output: o } = self.value(old).kind
            && let Some(n) = self.graph.nodes[n.index()].as_mut()
        {
            n.outputs[o as usize] = None;
        }
        self.graph.node_mut(node).outputs[output as usize] = Some(old);
        self.graph.value_mut(old).kind = ValueKind::Output { node, output };
        self.move_readers(new, old);
        self.changes += 1;
        true
    }

    fn move_readers(&mut self, old: ValueId, new: ValueId) {
        let readers = std::mem::take(&mut self.readers[old.index()]);
        for &r in &readers {
            for input in self.graph.node_mut(r).inputs.iter_mut().flatten() {
                if *input == old {
                    *input = new;
                }
            }
        }
        self.readers[new.index()].extend(readers);
    }

    /// Makes the reader `id` read `new` wherever it read `old`.
    pub fn replace_input(&mut self, id: NodeId, old: ValueId, new: ValueId) {
        let node = self.graph.node(id);
        let inputs = node.inputs.iter().map(|v| if *v == Some(old) { Some(new) } else { *v }).collect();
        let op = node.op.clone();
        self.set(id, op, inputs);
    }

    /// Removes a node whose only output equals `v`. False when the output has to stay and already is a plain copy.
    pub fn replace_by(&mut self, id: NodeId, v: ValueId) -> bool {
        let out = self.node(id).out();
        if self.redirect(out, v) {
            self.remove(id);
            return true;
        }
        let identity = Op::Unary(crate::UnaryOp::Identity);
        if self.node(id).op == identity && self.node(id).input(0) == Some(v) {
            return false;
        }
        self.set_all(id, identity, &[v]);
        true
    }

    pub fn remove(&mut self, id: NodeId) {
        let inputs: Vec<ValueId> = self.node(id).inputs.iter().flatten().copied().collect();
        for v in inputs {
            let readers = &mut self.readers[v.index()];
            if let Some(i) = readers.iter().position(|&r| r == id) {
                readers.remove(i);
            }
        }
        self.graph.remove_node(id);
    }

    /// Whether nobody reads what a node makes. What updates a state is done for its own sake.
    fn is_useless(&self, node: &Node) -> bool {
        node.op.updated_states() == 0
            && node.outputs.iter().flatten().all(|&v| self.readers(v).is_empty() && !self.is_output(v))
    }

    fn remove_dead(&mut self) {
        loop {
            let dead: Vec<NodeId> =
                self.graph.iter_nodes().filter(|(_, n)| self.is_useless(n)).map(|(id, _)| id).collect();
            if dead.is_empty() {
                return;
            }
            // Backwards, so that a chain falls in one sweep.
            for &id in dead.iter().rev() {
                self.remove_with_feeders(id);
            }
        }
    }

    fn remove_with_feeders(&mut self, id: NodeId) {
        let mut stack = vec![id];
        while let Some(id) = stack.pop() {
            let Some(node) = self.get(id) else { continue };
            if self.is_useless(node) {
                stack.extend(node.inputs.iter().flatten().filter_map(|&v| self.graph.producer(v)));
                self.remove(id);
            }
        }
    }

    /// Puts everything in order and returns the number of changes.
    ///
    /// # Errors
    /// When a rewrite has made a cycle, which would be a mistake in the pass.
    pub fn finish(mut self) -> Result<usize, GraphError> {
        if self.changes == 0 {
            return Ok(0);
        }
        self.remove_dead();
        let mut order: Vec<usize> = self.graph.iter_nodes().map(|(id, _)| id.index()).collect();
        order.sort_by_key(|&i| self.places[i]);
        self.graph.reorder(&order);
        let mut made: Vec<bool> =
            self.graph.values.iter().map(|v| !matches!(v.kind, ValueKind::Output { .. })).collect();
        let mut sorted = true;
        for (_, node) in self.graph.iter_nodes() {
            sorted &= node.inputs.iter().flatten().all(|v| made[v.index()]);
            for v in node.outputs.iter().flatten() {
                made[v.index()] = true;
            }
        }
        if !sorted {
            self.graph.sort()?;
        }
        self.graph.compact();
        Ok(self.changes)
    }
}

/// Position of a possibly negative axis.
pub(crate) fn axis_index(axis: i64, rank: usize) -> Option<usize> {
    let a = if axis < 0 { axis + rank as i64 } else { axis };
    usize::try_from(a).ok().filter(|&a| a < rank)
}
