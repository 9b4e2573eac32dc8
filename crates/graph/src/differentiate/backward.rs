//! The graph while its backward pass is being written.

use std::collections::{HashMap, HashSet};

use crate::infer::{Fact, infer_node};
use crate::{
    BinaryOp, DType, Dim, Graph, GraphError, MaskRule, MatMulAttributes, Node, NodeId, Op, ReduceOp, Tensor,
    TrainOp, UnaryOp, ValueId, ValueKind,
};

/// What a rule yields.
pub(super) type Step<T = ()> = Result<T, GraphError>;

/// Appends backward nodes and keeps the gradients so far.
pub(super) struct Backward<'g> {
    graph: &'g mut Graph,
    /// For each forward value that needs a gradient, who asked for it.
    asked: Vec<Option<ValueId>>,
    gradients: HashMap<ValueId, ValueId>,
    names: HashSet<String>,
    scalars: HashMap<(u64, DType), ValueId>,
    lists: HashMap<Vec<i64>, ValueId>,
    /// The forward node whose rule runs, and how many nodes there were when it started.
    current: Option<(NodeId, usize)>,
    /// Nodes before the backward pass.
    forward: usize,
    /// Forward-side helpers and the operand after whose producer they go.
    placed: Vec<(NodeId, ValueId)>,
    masks: HashMap<ValueId, Vec<(MaskRule, ValueId)>>,
}

/// A tensor of one element of a floating-point type.
pub(super) fn scalar_tensor(value: f64, dtype: DType) -> Option<Tensor> {
    Some(match dtype {
        DType::F32 => Tensor::scalar(value as f32),
        DType::F64 => Tensor::scalar(value),
        DType::F16 => Tensor::scalar(half::f16::from_f64(value)),
        DType::BF16 => Tensor::scalar(half::bf16::from_f64(value)),
        _ => return None,
    })
}

/// An axis counted from the front; inference has checked that it is in range.
pub(super) fn from_front(axis: i64, rank: usize) -> usize {
    let axis = if axis < 0 { axis + rank as i64 } else { axis };
    usize::try_from(axis).unwrap_or(0).min(rank.saturating_sub(1))
}

impl<'g> Backward<'g> {
    pub fn new(graph: &'g mut Graph, asked: Vec<Option<ValueId>>) -> Backward<'g> {
        let values = graph.values.iter().map(|v| v.name.clone());
        let names = values.chain(graph.iter_nodes().map(|(_, n)| n.name.clone())).collect();
        let forward = graph.nodes.len();
        Backward {
            graph,
            asked,
            gradients: HashMap::new(),
            names,
            scalars: HashMap::new(),
            lists: HashMap::new(),
            current: None,
            forward,
            placed: Vec::new(),
            masks: HashMap::new(),
        }
    }

    pub fn graph(&self) -> &Graph {
        self.graph
    }

    /// Starts with a gradient of 1 for the loss.
    pub fn seed(&mut self, loss: ValueId) -> Step {
        let value = self.graph.value(loss);
        let (dtype, dims) = match value.ty.tensor() {
            Some(t) if t.dtype.is_float() && t.elements() == Some(1) => {
                (t.dtype, t.dims().unwrap_or_default())
            }
            _ => {
                let problem = format!("the loss {:?} is {}, expected a single number", value.name, value.ty);
                return Err(GraphError::structure(self.graph, problem));
            }
        };
        let name = self.fresh(&format!("grad/{}", value.name.clone()));
        let one = scalar_tensor(1.0, dtype).ok_or_else(|| {
            GraphError::structure(self.graph, format!("losses of type {dtype} are not supported"))
        })?;
        let one = self.graph.add_constant(name, one.into_shape(&dims));
        self.gradients.insert(loss, one);
        Ok(())
    }

    /// Goes to the rule of the next forward node.
    pub fn enter(&mut self, id: NodeId) {
        self.current = Some((id, self.graph.nodes.len()));
    }

    fn node(&self) -> &Node {
        let (id, _) = self.current.expect("rules run for a node");
        self.graph.node(id)
    }

    /// The gradient of a forward value as far as its readers have contributed.
    pub fn gradient(&self, v: ValueId) -> Option<ValueId> {
        self.gradients.get(&v).copied()
    }

    /// Whether a forward value needs a gradient.
    pub fn wanted(&self, v: ValueId) -> bool {
        self.asked.get(v.index()).copied().flatten().is_some()
    }

    /// Whether operand `index` of the current node needs a gradient.
    pub fn wants(&self, index: usize) -> bool {
        self.node().input(index).is_some_and(|v| self.wanted(v))
    }

    /// The error for something without derivative; names who asked.
    pub fn unsupported<T>(&self, what: impl std::fmt::Display) -> Step<T> {
        let node = self.node();
        let by = node.inputs.iter().flatten().find_map(|v| self.asked.get(v.index()).copied().flatten());
        let by = by.map_or_else(String::new, |v| self.graph.value(v).name.clone());
        Err(GraphError::Unsupported {
            node: node.name.clone(),
            op: node.op.name().to_owned(),
            what: format!("the gradient for {by:?} has to pass, but {what}"),
        })
    }

    /// Refuses a gradient for operands for which the rule has none.
    pub fn refuse(&self, index: usize, role: &str) -> Step {
        if self.wants(index) {
            return self.unsupported(format!("there is no gradient with respect to its {role}"));
        }
        Ok(())
    }

    /// Refuses a gradient that arrives at results for which the rule has none.
    pub fn refuse_results(&self, dy: &[Option<ValueId>], from: usize) -> Step {
        if dy.iter().skip(from).any(Option::is_some) {
            return self.unsupported(format!("there is none for its results from number {from} on"));
        }
        Ok(())
    }

    /// The fixed shape of a value.
    pub fn dims(&self, v: ValueId) -> Step<Vec<usize>> {
        let value = self.graph.value(v);
        let shape = value.ty.tensor().and_then(|t| t.shape.clone());
        let problem = match shape {
            None => format!("{:?} is {}, expected a tensor of known shape", value.name, value.ty),
            Some(shape) => match shape.iter().position(|d| d.fixed().is_none()) {
                None => return Ok(shape.iter().filter_map(Dim::fixed).collect()),
                Some(axis) => format!(
                    "dimension {axis} ({}) of {:?} is not fixed; bind the inputs to fixed shapes first",
                    shape[axis], value.name
                ),
            },
        };
        Err(GraphError::at(self.node(), format!("to differentiate it: {problem}")))
    }

    /// The element type of a value.
    pub fn dtype(&self, v: ValueId) -> Step<DType> {
        match self.graph.value(v).ty.tensor() {
            Some(t) => Ok(t.dtype),
            None => Err(GraphError::at(self.node(), format!("{:?} is no tensor", self.graph.value(v).name))),
        }
    }

    /// The integers of a constant operand; `None` when it is absent.
    pub fn ints(&self, index: usize, role: &str) -> Step<Option<Vec<i64>>> {
        let Some(v) = self.node().input(index) else { return Ok(None) };
        match self.graph.value(v).tensor().and_then(Tensor::to_i64s) {
            Some(ints) => Ok(Some(ints)),
            None => self.unsupported(format!("its {role} {:?} is not constant", self.graph.value(v).name)),
        }
    }

    /// Hands a gradient to operand `index` of the current node, which must have asked for it.
    pub fn give(&mut self, index: usize, gradient: ValueId) -> Step {
        let Some(v) = self.node().input(index).filter(|&v| self.wanted(v)) else { return Ok(()) };
        let (expected, found) = (self.dims(v)?, self.dims(gradient)?);
        if expected != found {
            let problem =
                format!("the gradient of operand {index} has shape {found:?}, expected {expected:?}");
            return Err(GraphError::at(self.node(), problem));
        }
        let name = format!("grad/{}", self.graph.value(v).name);
        let total = match self.gradients.get(&v) {
            Some(&sum) => {
                let total = self.binary(BinaryOp::Add, sum, gradient)?;
                // The sum takes the name over from its first part.
                if self.graph.value(sum).name == name {
                    let part = self.fresh(&format!("{name}.part"));
                    self.graph.value_mut(sum).name = part;
                    self.names.remove(&name);
                }
                total
            }
            None => gradient,
        };
        let own = match self.graph.value(total).kind {
            ValueKind::Output { node, .. } => {
                self.current.is_some_and(|(_, first)| node.index() >= first)
                    && !self.gradients.values().any(|&g| g == total)
            }
            _ => false,
        };
        if own && self.names.insert(name.clone()) {
            self.graph.value_mut(total).name = name;
        }
        self.gradients.insert(v, total);
        Ok(())
    }

    /// `base`, or `base` with a number when that is taken.
    pub fn fresh(&mut self, base: &str) -> String {
        let mut name = base.to_owned();
        let mut n = 1;
        while !self.names.insert(name.clone()) {
            n += 1;
            name = format!("{base}.{n}");
        }
        name
    }

    /// Appends a node; results that are not wanted stay away.
    pub fn emit_some(
        &mut self,
        op: Op,
        inputs: Vec<Option<ValueId>>,
        wanted: &[bool],
    ) -> Step<Vec<Option<ValueId>>> {
        let base = format!("grad/{}", self.node().name);
        let name = self.fresh(&base);
        let mut names = vec![name.clone()];
        for i in 1..wanted.iter().filter(|&&w| w).count() {
            names.push(self.fresh(&format!("{name}:{i}")));
        }
        let made = self.graph.add_node_named(name, op, inputs, names);
        let id = NodeId(self.graph.nodes.len() as u32 - 1);
        let mut made = made.into_iter();
        let outputs: Vec<Option<ValueId>> =
            wanted.iter().map(|&w| if w { made.next() } else { None }).collect();
        for (i, v) in outputs.iter().enumerate() {
            if let Some(v) = v {
                self.graph.value_mut(*v).kind = ValueKind::Output { node: id, output: i as u32 };
            }
        }
        self.graph.node_mut(id).outputs.clone_from(&outputs);
        let node = self.graph.node(id);
        let facts: Vec<Option<Fact<'_>>> = node
            .inputs
            .iter()
            .map(|v| v.map(|v| Fact::new(&self.graph.value(v).ty, self.graph.value(v).tensor())))
            .collect();
        let types = infer_node(node, &facts)?;
        for (v, ty) in outputs.iter().zip(types) {
            if let Some(v) = v {
                self.graph.value_mut(*v).ty = ty;
            }
        }
        Ok(outputs)
    }

    /// Appends a node with one result.
    pub fn emit_with(&mut self, op: Op, inputs: Vec<Option<ValueId>>) -> Step<ValueId> {
        let made = self.emit_some(op, inputs, &[true])?;
        Ok(made[0].expect("the only result was wanted"))
    }

    /// Appends a node with one result and all operands present.
    pub fn emit(&mut self, op: Op, inputs: &[ValueId]) -> Step<ValueId> {
        self.emit_with(op, inputs.iter().map(|&v| Some(v)).collect())
    }

    pub fn train(&mut self, op: TrainOp, inputs: &[ValueId]) -> Step<ValueId> {
        self.emit(Op::Train(Box::new(op)), inputs)
    }

    pub fn unary(&mut self, op: UnaryOp, x: ValueId) -> Step<ValueId> {
        self.emit(Op::Unary(op), &[x])
    }

    pub fn binary(&mut self, op: BinaryOp, a: ValueId, b: ValueId) -> Step<ValueId> {
        self.emit(Op::Binary(op), &[a, b])
    }

    pub fn add(&mut self, a: ValueId, b: ValueId) -> Step<ValueId> {
        self.binary(BinaryOp::Add, a, b)
    }

    pub fn sub(&mut self, a: ValueId, b: ValueId) -> Step<ValueId> {
        self.binary(BinaryOp::Sub, a, b)
    }

    pub fn mul(&mut self, a: ValueId, b: ValueId) -> Step<ValueId> {
        self.binary(BinaryOp::Mul, a, b)
    }

    pub fn div(&mut self, a: ValueId, b: ValueId) -> Step<ValueId> {
        self.binary(BinaryOp::Div, a, b)
    }

    pub fn neg(&mut self, x: ValueId) -> Step<ValueId> {
        self.unary(UnaryOp::Neg, x)
    }

    /// `x` times a number.
    pub fn scale(&mut self, x: ValueId, by: f64) -> Step<ValueId> {
        if by == 1.0 {
            return Ok(x);
        }
        let by = self.scalar(by, self.dtype(x)?)?;
        self.mul(x, by)
    }

    /// `a` where `condition` holds, else `b`.
    pub fn select(&mut self, condition: ValueId, a: ValueId, b: ValueId) -> Step<ValueId> {
        self.emit(Op::Where, &[condition, a, b])
    }

    /// A constant of rank 0.
    pub fn scalar(&mut self, value: f64, dtype: DType) -> Step<ValueId> {
        if let Some(&v) = self.scalars.get(&(value.to_bits(), dtype)) {
            return Ok(v);
        }
        let Some(tensor) = scalar_tensor(value, dtype) else {
            return self.unsupported(format!("element type {dtype} has no gradients"));
        };
        let v = self.constant("grad/number", tensor);
        self.scalars.insert((value.to_bits(), dtype), v);
        Ok(v)
    }

    /// A constant list of integers.
    pub fn list(&mut self, ints: &[i64]) -> ValueId {
        if let Some(&v) = self.lists.get(ints) {
            return v;
        }
        let v = self.constant("grad/list", Tensor::from_slice(&[ints.len()], ints));
        self.lists.insert(ints.to_vec(), v);
        v
    }

    pub fn sizes(&mut self, dims: &[usize]) -> ValueId {
        let ints: Vec<i64> = dims.iter().map(|&d| d as i64).collect();
        self.list(&ints)
    }

    pub fn constant(&mut self, base: &str, tensor: Tensor) -> ValueId {
        let name = self.fresh(base);
        self.graph.add_constant(name, tensor)
    }

    /// A tensor that holds one number everywhere.
    pub fn full(&mut self, value: f64, dims: &[usize], dtype: DType) -> Step<ValueId> {
        let Some(tensor) = scalar_tensor(value, dtype) else {
            return self.unsupported(format!("element type {dtype} has no gradients"));
        };
        let shape = self.sizes(dims);
        self.emit(Op::ConstantOfShape { value: tensor.into_shape(&[1]) }, &[shape])
    }

    pub fn zeros_like(&mut self, x: ValueId) -> Step<ValueId> {
        let (dims, dtype) = (self.dims(x)?, self.dtype(x)?);
        self.full(0.0, &dims, dtype)
    }

    pub fn reshape(&mut self, x: ValueId, dims: &[usize]) -> Step<ValueId> {
        if self.dims(x)? == dims {
            return Ok(x);
        }
        let shape = self.sizes(dims);
        self.emit(Op::Reshape { allow_zero: true }, &[x, shape])
    }

    pub fn transpose(&mut self, x: ValueId, perm: &[usize]) -> Step<ValueId> {
        if perm.iter().enumerate().all(|(i, &p)| i == p) {
            return Ok(x);
        }
        self.emit(Op::Transpose { perm: Some(perm.to_vec()) }, &[x])
    }

    pub fn expand(&mut self, x: ValueId, dims: &[usize]) -> Step<ValueId> {
        if self.dims(x)? == dims {
            return Ok(x);
        }
        let shape = self.sizes(dims);
        self.emit(Op::Expand, &[x, shape])
    }

    pub fn cast(&mut self, x: ValueId, to: DType) -> Step<ValueId> {
        if self.dtype(x)? == to {
            return Ok(x);
        }
        self.emit(Op::Cast { to, saturate: true }, &[x])
    }

    pub fn cast_like(&mut self, x: ValueId, like: ValueId) -> Step<ValueId> {
        let to = self.dtype(like)?;
        self.cast(x, to)
    }

    /// A reduction over `axes`, which stay as size 1 if `keep`.
    pub fn reduce(&mut self, op: ReduceOp, x: ValueId, axes: &[usize], keep: bool) -> Step<ValueId> {
        if axes.is_empty() && matches!(op, ReduceOp::Sum | ReduceOp::Mean | ReduceOp::Max | ReduceOp::Prod) {
            return Ok(x);
        }
        let axes = self.sizes(axes);
        let op = Op::Reduce { op, keep_dims: keep, noop_with_empty_axes: true };
        self.emit(op, &[x, axes])
    }

    /// Sums up what broadcasting has spread: from the shape of `x` to `dims`.
    pub fn reduce_to(&mut self, x: ValueId, dims: &[usize]) -> Step<ValueId> {
        let from = self.dims(x)?;
        if from == dims {
            return Ok(x);
        }
        let lead = from.len().saturating_sub(dims.len());
        let spread = |i: usize| i < lead || (dims[i - lead] == 1 && from[i] != 1);
        let axes: Vec<usize> = (0..from.len()).filter(|&i| spread(i)).collect();
        let kept: Vec<usize> = (0..from.len()).filter(|i| !axes.contains(i) && from[*i] != 1).collect();
        let sum = match kept[..] {
            _ if axes.is_empty() => x,
            [axis] => self.train(TrainOp::ChannelSum { axis }, &[x])?,
            _ => self.reduce(ReduceOp::Sum, x, &axes, false)?,
        };
        self.reshape(sum, dims)
    }

    pub fn matmul(
        &mut self,
        a: ValueId,
        b: ValueId,
        (trans_a, trans_b): (bool, bool),
        alpha: f32,
    ) -> Step<ValueId> {
        self.emit(Op::MatMul(MatMulAttributes { trans_a, trans_b, alpha, activation: None }), &[a, b])
    }

    /// `x[start..end]` along one axis.
    pub fn slice(&mut self, x: ValueId, axis: usize, start: usize, end: usize) -> Step<ValueId> {
        let inputs = [start, end, axis].map(|i| self.list(&[i as i64]));
        self.emit(Op::Slice, &[x, inputs[0], inputs[1], inputs[2]])
    }

    /// Zeros around `x`; negative numbers crop.
    pub fn pad(&mut self, x: ValueId, before: &[i64], after: &[i64]) -> Step<ValueId> {
        let pads: Vec<i64> = before.iter().chain(after).copied().collect();
        if pads.iter().all(|&p| p == 0) {
            return Ok(x);
        }
        let pads = self.list(&pads);
        self.emit(Op::Pad { mode: crate::PadMode::Constant }, &[x, pads])
    }

    /// Result `output` of a forward node, added when nobody has wanted it so far.
    pub fn result(&mut self, output: usize) -> Step<ValueId> {
        let (id, _) = self.current.expect("rules run for a node");
        if let Some(v) = self.graph.node(id).output(output) {
            return Ok(v);
        }
        let name = self.fresh(&format!("{}:{output}", self.graph.node(id).name));
        // A value of this kind is made by a place holder node, which is taken away again.
        let v = self.graph.add_node_named("", Op::Size, Vec::new(), vec![name])[0];
        self.graph.nodes.pop();
        self.graph.value_mut(v).kind = ValueKind::Output { node: id, output: output as u32 };
        let node = self.graph.node_mut(id);
        if node.outputs.len() <= output {
            node.outputs.resize(output + 1, None);
        }
        node.outputs[output] = Some(v);
        let node = self.graph.node(id);
        let facts: Vec<Option<Fact<'_>>> = node
            .inputs
            .iter()
            .map(|v| v.map(|v| Fact::new(&self.graph.value(v).ty, self.graph.value(v).tensor())))
            .collect();
        let ty = infer_node(node, &facts)?.swap_remove(output);
        self.graph.value_mut(v).ty = ty;
        Ok(v)
    }

    /// The bits of `x`, made right behind `x` in the forward pass.
    pub fn sign_mask(&mut self, rule: MaskRule, x: ValueId) -> Step<ValueId> {
        if let Some((_, bits)) = self.masks.get(&x).and_then(|m| m.iter().find(|(r, _)| *r == rule)) {
            return Ok(*bits);
        }
        let bits = self.train(TrainOp::SignMask(rule), &[x])?;
        let id = NodeId(self.graph.nodes.len() as u32 - 1);
        let name = self.fresh(&format!("{}.bits", self.graph.value(x).name));
        let old = std::mem::replace(&mut self.graph.value_mut(bits).name, name.clone());
        self.names.remove(&old);
        self.graph.node_mut(id).name = name;
        self.placed.push((id, x));
        self.masks.entry(x).or_default().push((rule, bits));
        Ok(bits)
    }

    /// Brings forward-side helpers to their places.
    pub fn finish(self) {
        if self.placed.is_empty() {
            return;
        }
        let moved: HashSet<usize> = self.placed.iter().map(|(id, _)| id.index()).collect();
        let mut order = Vec::with_capacity(self.graph.nodes.len());
        let behind = |producer: Option<NodeId>, order: &mut Vec<usize>| {
            for (id, x) in &self.placed {
                if self.graph.producer(*x) == producer {
                    order.push(id.index());
                }
            }
        };
        behind(None, &mut order);
        for (id, _) in self.graph.iter_nodes() {
            if moved.contains(&id.index()) {
                continue;
            }
            order.push(id.index());
            if id.index() < self.forward {
                behind(Some(id), &mut order);
            }
        }
        self.graph.reorder(&order);
    }
}

impl Backward<'_> {
    /// Operand `index` of a node, which the operator cannot do without.
    pub fn node_input(&self, n: &Node, index: usize) -> Step<ValueId> {
        n.input(index).ok_or_else(|| GraphError::at(n, format!("operand {index} is missing")))
    }
}
