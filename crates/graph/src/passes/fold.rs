use std::collections::HashSet;
use std::sync::Arc;

use lightering_units::Bytes;

use super::dead_code::{body_input, first_capture};
use super::{Evaluate, Pass};
use crate::infer::{Fact, Sweep, SymbolicInt, upper_bound};
use crate::{
    Constant, DType, Graph, GraphError, Node, NodeId, Op, SourceId, Tensor, TensorType, UnaryOp, Value,
    ValueId, ValueKind, ValueType,
};

/// Infers types and folds constants in one pass over the graph, so that chains like
/// Shape → Gather → Concat → Reshape resolve.
///
/// - `Shape` and `Size` of known shapes, and the arithmetic on them, need no evaluation.
/// - `Identity`, `Dropout` at inference and casts to the same type vanish.
/// - An `If` with a constant condition is replaced by its branch; bodies are folded as well, constant captures
///   becoming constants of the body.
/// - Other nodes whose operands are all constants in memory are evaluated, when the results take no more than
///   [`inline_max`](Self::inline_max) or than the operands did. Constants in a store are not touched.
pub struct Fold<'a> {
    /// Who computes.
    pub evaluate: &'a dyn Evaluate,
    /// Largest result (all of a node together) that is kept in memory, unless the operands were larger.
    pub inline_max: Bytes,
}

/// Default of [`Fold::inline_max`].
pub const INLINE_MAX: Bytes = Bytes::kib(64);

/// What one text element counts as.
const TEXT_ELEMENT_BYTES: u64 = 32;

impl<'a> Fold<'a> {
    /// Folds with the default limit.
    pub fn new(evaluate: &'a dyn Evaluate) -> Fold<'a> {
        Fold { evaluate, inline_max: INLINE_MAX }
    }
}

impl Pass for Fold<'_> {
    fn name(&self) -> &'static str {
        "constant folding"
    }

    fn run(&self, graph: &mut Graph) -> Result<usize, GraphError> {
        fold(self, graph, 0)
    }
}

/// What is still to be done, last first.
enum Task {
    Node(Box<Node>),
    /// Readers of the first value read the second, which an inlined branch yields.
    Redirect(ValueId, ValueId, String),
}

struct Folder<'f> {
    fold: &'f Fold<'f>,
    sweep: Sweep<'static>,
    depth: usize,
    /// What to read instead of a value.
    alias: Vec<ValueId>,
    /// Whether anybody reads a value.
    used: Vec<bool>,
    outputs: HashSet<ValueId>,
    /// Names of all values; filled when the first branch is inlined.
    names: HashSet<String>,
    tasks: Vec<Task>,
    changed: usize,
}

fn fold(fold: &Fold<'_>, graph: &mut Graph, depth: usize) -> Result<usize, GraphError> {
    let mut used = vec![false; graph.values.len()];
    for v in graph.nodes.iter().flatten().flat_map(|n| n.inputs.iter().flatten()).chain(&graph.outputs) {
        used[v.index()] = true;
    }
    let nodes = std::mem::take(&mut graph.nodes);
    let mut folder = Folder {
        fold,
        sweep: Sweep::at_depth(depth),
        depth,
        alias: (0..graph.values.len() as u32).map(ValueId).collect(),
        used,
        outputs: graph.outputs.iter().copied().collect(),
        names: HashSet::new(),
        tasks: nodes.into_iter().flatten().rev().map(|n| Task::Node(Box::new(n))).collect(),
        changed: 0,
    };
    let mut result = Ok(());
    while let Some(task) = folder.tasks.pop() {
        let done = match task {
            Task::Node(node) => folder.node(graph, *node),
            Task::Redirect(output, source, name) => folder.redirect_or_copy(graph, output, source, name),
        };
        if done.is_err() {
            // What is left stays as it was, so that the graph remains whole.
            result = done;
            while let Some(task) = folder.tasks.pop() {
                match task {
                    Task::Node(mut node) => {
                        folder.resolve_inputs(&mut node);
                        push(graph, *node);
                    }
                    Task::Redirect(output, source, name) => {
                        let source = folder.resolve(source);
                        push(graph, copy(name, source, output));
                    }
                }
            }
        }
    }
    result.map(|()| folder.changed)
}

/// Appends a node and points its results at it.
fn push(graph: &mut Graph, node: Node) -> NodeId {
    let id = NodeId(graph.nodes.len() as u32);
    for (i, output) in node.outputs.iter().enumerate() {
        if let Some(v) = output {
            graph.values[v.index()].kind = ValueKind::Output { node: id, output: i as u32 };
        }
    }
    graph.nodes.push(Some(node));
    id
}

fn copy(name: String, source: ValueId, output: ValueId) -> Node {
    Node { name, op: Op::Unary(UnaryOp::Identity), inputs: vec![Some(source)], outputs: vec![Some(output)] }
}

/// What a tensor of this type takes, counting text by the element.
fn held_bytes(t: &TensorType) -> Option<u64> {
    match t.dtype {
        DType::String => (t.elements()? as u64).checked_mul(TEXT_ELEMENT_BYTES),
        _ => t.size_bytes().map(|n| n as u64),
    }
}

impl Folder<'_> {
    fn resolve(&mut self, mut v: ValueId) -> ValueId {
        let first = v;
        while self.alias[v.index()] != v {
            v = self.alias[v.index()];
        }
        // Shortens the way for the next reader.
        self.alias[first.index()] = v;
        v
    }

    fn resolve_inputs(&mut self, node: &mut Node) {
        for input in node.inputs.iter_mut().flatten() {
            *input = self.resolve(*input);
        }
    }

    fn node(&mut self, graph: &mut Graph, mut node: Node) -> Result<(), GraphError> {
        self.resolve_inputs(&mut node);
        if !node.op.bodies().is_empty() {
            return self.control_flow(graph, node);
        }
        let id = push(graph, node);
        self.sweep.visit(graph, id)?;
        if self.known_shape(graph, id) || self.vanishes(graph, id) || self.evaluated(graph, id)? {
            graph.remove_node(id);
            self.changed += 1;
        }
        Ok(())
    }

    /// Turns the result of shape arithmetic into a constant.
    fn known_shape(&mut self, graph: &mut Graph, id: NodeId) -> bool {
        let node = graph.node(id);
        if node.outputs.len() != 1 {
            return false;
        }
        let Some(out) = node.output(0) else { return false };
        let Some(list) = self.sweep.symbolic(out) else { return false };
        let value = |s: &SymbolicInt| if let SymbolicInt::Value(n) = s { Some(*n) } else { None };
        let Some(list) = list.iter().map(value).collect::<Option<Vec<i64>>>() else { return false };
        let Some(t) = graph.value(out).ty.tensor() else { return false };
        let Some(dims) = t.dims().filter(|_| t.elements() == Some(list.len())) else { return false };
        let tensor = match t.dtype {
            DType::I64 => Tensor::from_slice(&dims, &list),
            DType::I32 => match list.iter().map(|&n| i32::try_from(n).ok()).collect::<Option<Vec<_>>>() {
                Some(list) => Tensor::from_slice(&dims, &list),
                None => return false,
            },
            _ => return false,
        };
        graph.make_constant(out, tensor);
        true
    }

    /// Removes what does nothing.
    fn vanishes(&mut self, graph: &mut Graph, id: NodeId) -> bool {
        let node = graph.node(id);
        let (Some(x), Some(y)) = (node.input(0), node.output(0)) else { return false };
        let nothing = match &node.op {
            Op::Unary(UnaryOp::Identity) => true,
            Op::Cast { to, .. } => graph.value(x).ty.tensor().is_some_and(|t| t.dtype == *to),
            Op::Dropout { .. } => {
                let training = match node.input(2) {
                    None => Some(false),
                    Some(t) => graph.value(t).tensor().and_then(Tensor::to_i64s).map(|v| v != [0]),
                };
                let mask = node.output(1).is_some_and(|m| self.used[m.index()]);
                training == Some(false) && !mask
            }
            _ => false,
        };
        nothing && self.redirect(graph, y, x)
    }

    /// Makes readers of `output` read `source`; false when `output` must stay a value of its own.
    fn redirect(&mut self, graph: &mut Graph, output: ValueId, source: ValueId) -> bool {
        if !self.outputs.contains(&output) {
            self.alias[output.index()] = source;
            return true;
        }
        match &graph.value(source).kind {
            // The source becomes the output, under its name.
            ValueKind::Output { .. } if !self.outputs.contains(&source) => {
                let taken = std::mem::take(&mut graph.value_mut(source).name);
                let name = std::mem::replace(&mut graph.value_mut(output).name, taken);
                graph.value_mut(source).name = name;
                graph.outputs.iter_mut().filter(|v| **v == output).for_each(|v| *v = source);
                self.outputs.remove(&output);
                self.outputs.insert(source);
                self.alias[output.index()] = source;
                true
            }
            ValueKind::Constant(constant) => {
                let (kind, ty) = (ValueKind::Constant(constant.clone()), graph.value(source).ty.clone());
                let value = graph.value_mut(output);
                (value.kind, value.ty) = (kind, ty);
                true
            }
            _ => false,
        }
    }

    fn redirect_or_copy(
        &mut self,
        graph: &mut Graph,
        output: ValueId,
        source: ValueId,
        name: String,
    ) -> Result<(), GraphError> {
        let source = self.resolve(source);
        if !self.redirect(graph, output, source) {
            let id = push(graph, copy(name, source, output));
            self.sweep.visit(graph, id)?;
        }
        Ok(())
    }

    /// Evaluates a node whose operands are constants.
    fn evaluated(&mut self, graph: &mut Graph, id: NodeId) -> Result<bool, GraphError> {
        let node = graph.node(id);
        // The size of a picture is known only when it is decoded.
        if node.op.is_random() || matches!(node.op, Op::ImageDecode { .. }) {
            return Ok(false);
        }
        let mut operands = Vec::new();
        for input in &node.inputs {
            match input.map(|v| graph.value(v).tensor()) {
                None => operands.push(None),
                Some(Some(t)) => operands.push(Some(t)),
                Some(None) => return Ok(false),
            }
        }
        let wanted: Option<Vec<&TensorType>> =
            node.outputs.iter().flatten().map(|v| graph.value(*v).ty.tensor()).collect();
        let Some(wanted) = wanted.filter(|w| !w.is_empty()) else { return Ok(false) };
        let operand_bytes: u64 = operands.iter().flatten().map(|t| t.size_bytes().0).sum();
        let limit = self.fold.inline_max.0.max(operand_bytes);
        let total = |mut types: &mut dyn Iterator<Item = Option<u64>>| {
            Iterator::try_fold(&mut types, 0u64, |sum, n| sum.checked_add(n?))
        };
        let expected = total(&mut wanted.iter().map(|t| held_bytes(t))).or_else(|| {
            let facts: Vec<Option<Fact<'_>>> = node
                .inputs
                .iter()
                .zip(&operands)
                .map(|(v, t)| v.map(|v| Fact::new(&graph.value(v).ty, *t)))
                .collect();
            total(&mut upper_bound(node, &facts)?.iter().map(held_bytes))
        });
        let fits = match expected {
            Some(n) => n <= limit,
            // Without a bound, results are in the order of the operands.
            None => operand_bytes <= self.fold.inline_max.0,
        };
        if !fits {
            return Ok(false);
        }
        let Some(results) = self.fold.evaluate.evaluate(node, &operands)? else { return Ok(false) };
        if results.len() != node.outputs.len() {
            let problem = format!("evaluates to {} results, expected {}", results.len(), node.outputs.len());
            return Err(GraphError::at(node, problem));
        }
        if total(&mut results.iter().map(|t| held_bytes(&t.tensor_type()))).is_none_or(|n| n > limit) {
            return Ok(false);
        }
        for (output, result) in node.outputs.iter().zip(&results) {
            if let Some(v) = output
                && !is_of_type(result, &graph.value(*v).ty)
            {
                let (found, expected) = (result.tensor_type(), &graph.value(*v).ty);
                return Err(GraphError::at(node, format!("evaluates to {found}, expected {expected}")));
            }
        }
        for (output, result) in node.outputs.clone().into_iter().zip(results) {
            if let Some(v) = output {
                graph.make_constant(v, result);
            }
        }
        Ok(true)
    }

    fn control_flow(&mut self, graph: &mut Graph, mut node: Node) -> Result<(), GraphError> {
        if let Op::If { .. } = &node.op
            && let Some(condition) =
                node.input(0).and_then(|v| graph.value(v).tensor()?.to_i64s()?.first().copied())
            && self.can_inline(&node, condition != 0)
        {
            self.inline(graph, node, condition != 0);
            self.changed += 1;
            return Ok(());
        }
        self.changed += absorb_constants(graph, &mut node);
        let id = push(graph, node);
        self.sweep.visit(graph, id)?;
        let mut op = std::mem::replace(&mut graph.node_mut(id).op, Op::Size);
        let is_choice = matches!(op, Op::If { .. });
        let mut failure = None;
        for body in op.bodies_mut() {
            match fold(self.fold, body, self.depth + 1) {
                Ok(n) => self.changed += n,
                // A branch that cannot run may never be taken; inference has refused the node if none can.
                Err(_) if is_choice => {}
                Err(e) => failure = Some(e),
            }
        }
        graph.node_mut(id).op = op;
        match failure {
            Some(e) => Err(e),
            // Bodies that fold tell more of their results.
            None => self.sweep.visit(graph, id),
        }
    }

    fn can_inline(&self, node: &Node, condition: bool) -> bool {
        let Op::If { then_body, else_body } = &node.op else { return false };
        let body = if condition { then_body } else { else_body };
        body.inputs.len() + 1 == node.inputs.len()
            && node.outputs.len() <= body.outputs.len()
            && node.inputs.iter().all(Option::is_some)
            && !body.values.iter().any(|v| matches!(v.kind, ValueKind::State(_)))
            && body.verify().is_ok()
    }

    /// Queues the nodes of a branch in the place of its node.
    fn inline(&mut self, graph: &mut Graph, node: Node, condition: bool) {
        let Op::If { then_body, else_body } = node.op else { return };
        let mut body = if condition { *then_body } else { *else_body };
        if self.names.is_empty() {
            self.names = graph.values.iter().map(|v| v.name.clone()).collect();
        }
        let sources: Vec<SourceId> = std::mem::take(&mut body.sources)
            .into_iter()
            .map(|source| {
                let at = graph.sources.iter().position(|s| *s == source).unwrap_or_else(|| {
                    graph.sources.push(source);
                    graph.sources.len() - 1
                });
                SourceId(at as u32)
            })
            .collect();
        let inputs = std::mem::take(&mut body.inputs);
        let mut map: Vec<ValueId> = Vec::with_capacity(body.values.len());
        for (i, value) in std::mem::take(&mut body.values).into_iter().enumerate() {
            if let Some(at) = inputs.iter().position(|v| v.index() == i) {
                // `can_inline` has checked that all captures are there.
                map.push(node.inputs[at + 1].unwrap_or(ValueId(0)));
                continue;
            }
            let kind = match value.kind {
                ValueKind::Constant(Constant::Stored(mut stored)) => {
                    stored.source = sources.get(stored.source.0 as usize).copied().unwrap_or(stored.source);
                    ValueKind::Constant(Constant::Stored(stored))
                }
                other => other,
            };
            let id = ValueId(graph.values.len() as u32);
            let name = self.fresh_name(format!("{}/{}", node.name, value.name));
            graph.values.push(Value { name, ty: value.ty, kind });
            self.alias.push(id);
            self.used.push(true);
            map.push(id);
        }
        for (i, output) in node.outputs.iter().enumerate().rev() {
            if let Some(output) = output {
                let source = map[body.outputs[i].index()];
                self.tasks.push(Task::Redirect(*output, source, node.name.clone()));
            }
        }
        for mut inner in std::mem::take(&mut body.nodes).into_iter().flatten().rev() {
            for v in inner.inputs.iter_mut().chain(&mut inner.outputs).flatten() {
                *v = map[v.index()];
            }
            self.tasks.push(Task::Node(Box::new(inner)));
        }
    }

    fn fresh_name(&mut self, wanted: String) -> String {
        let mut name = wanted.clone();
        let mut n = 1;
        while !self.names.insert(name.clone()) {
            n += 1;
            name = format!("{wanted}_{n}");
        }
        name
    }
}

fn is_of_type(tensor: &Tensor, ty: &ValueType) -> bool {
    ty.tensor().is_some_and(|t| {
        t.dtype == tensor.dtype()
            && t.shape.as_ref().is_none_or(|s| {
                s.len() == tensor.dims().len()
                    && s.iter().zip(tensor.dims()).all(|(d, n)| d.fixed().is_none_or(|m| m == *n))
            })
    })
}

/// Captured constants in memory become constants of the bodies.
fn absorb_constants(graph: &Graph, node: &mut Node) -> usize {
    let mut absorbed = 0;
    for i in (first_capture(&node.op)..node.inputs.len()).rev() {
        let Some(value) = node.inputs[i].map(|v| graph.value(v)) else { continue };
        let ValueKind::Constant(Constant::Inline(tensor)) = &value.kind else { continue };
        let at = body_input(&node.op, i);
        if node.op.bodies().iter().any(|b| b.inputs.len() <= at) {
            continue;
        }
        node.inputs.remove(i);
        for body in node.op.bodies_mut() {
            let input = body.inputs.remove(at);
            let inner = body.value_mut(input);
            inner.ty = value.ty.clone();
            inner.kind = ValueKind::Constant(Constant::Inline(Arc::clone(tensor)));
        }
        absorbed += 1;
    }
    absorbed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passes::DeadCode;
    use crate::{BinaryOp, Dim, StoredTensor};

    /// Adds and multiplies single i64 numbers, and nothing else.
    struct Adder;

    impl Evaluate for Adder {
        fn evaluate(
            &self,
            node: &Node,
            inputs: &[Option<&Tensor>],
        ) -> Result<Option<Vec<Tensor>>, GraphError> {
            let numbers: Option<Vec<i64>> =
                inputs.iter().map(|t| t.and_then(|t| t.to_i64s()).and_then(|v| v.first().copied())).collect();
            Ok(match (&node.op, numbers.as_deref()) {
                (Op::Binary(BinaryOp::BitAnd), Some([a, b])) => Some(vec![Tensor::scalar(a & b)]),
                (Op::Binary(BinaryOp::Equal), Some([a, b])) => Some(vec![Tensor::from_bools(&[], &[a == b])]),
                // Wrong on purpose: the type does not fit.
                (Op::Binary(BinaryOp::BitXor), Some(_)) => Some(vec![Tensor::scalar(0f32)]),
                _ => None,
            })
        }
    }

    fn run(g: &mut Graph) -> usize {
        g.verify().unwrap();
        let changed = Fold::new(&Adder).run(g).unwrap();
        g.verify().unwrap();
        changed
    }

    fn symbol(s: &str) -> Dim {
        Dim::Symbol(s.into())
    }

    #[test]
    fn shape_chains_resolve_without_evaluation() {
        let mut g = Graph::new("g");
        let dims = vec![symbol("n"), Dim::Fixed(3), Dim::Fixed(4)];
        let x = g.add_input("x", TensorType { dtype: DType::F32, shape: Some(dims) });
        let shape = g.add_node("shape", Op::Shape { start: 0, end: None }, &[x], 1)[0];
        let zero = g.add_constant("zero", Tensor::scalar(0i64));
        let axis = g.add_constant("axis", Tensor::from_slice(&[1], &[0i64]));
        let minus = g.add_constant("minus", Tensor::from_slice(&[1], &[-1i64]));
        let batch = g.add_node("batch", Op::Gather { axis: 0 }, &[shape, zero], 1)[0];
        let list = g.add_node("list", Op::Unsqueeze, &[batch, axis], 1)[0];
        let wanted = g.add_node("wanted", Op::Concat { axis: 0 }, &[list, minus], 1)[0];
        let y = g.add_node("y", Op::Reshape { allow_zero: false }, &[x, wanted], 1)[0];
        g.outputs.push(y);
        // The batch is open, but its symbol goes all the way.
        run(&mut g);
        assert_eq!(g.value(y).ty.to_string(), "f32[n,12]");
        assert_eq!(g.node_count(), 5);
        g.bind(&[(x, TensorType::fixed(DType::F32, &[2, 3, 4]))]).unwrap();
        assert_eq!(run(&mut g), 4);
        assert_eq!(g.value(y).ty.to_string(), "f32[2,12]");
        assert_eq!(g.node_count(), 1);
        assert_eq!(g.value(wanted).tensor().unwrap().to_i64s().unwrap(), [2, -1]);
    }

    #[test]
    fn evaluation_is_checked_and_limited() {
        let mut g = Graph::new("g");
        let a = g.add_constant("a", Tensor::scalar(6i64));
        let b = g.add_constant("b", Tensor::scalar(3i64));
        let and = g.add_node("and", Op::Binary(BinaryOp::BitAnd), &[a, b], 1)[0];
        let stored = StoredTensor { source: SourceId(0), offset: 0, size: Bytes(8) };
        g.sources.push("file".into());
        let s = g.add_stored("s", TensorType::fixed(DType::I64, &[]), stored);
        let kept = g.add_node("kept", Op::Binary(BinaryOp::BitAnd), &[and, s], 1)[0];
        g.outputs = vec![and, kept];
        assert_eq!(run(&mut g), 1);
        assert_eq!(g.value(and).tensor().unwrap().to_i64s().unwrap(), [2]);
        assert_eq!(g.node_count(), 1);

        let mut g = Graph::new("g");
        let a = g.add_constant("a", Tensor::scalar(6i64));
        let xor = g.add_node("xor", Op::Binary(BinaryOp::BitXor), &[a, a], 1)[0];
        g.outputs.push(xor);
        let error = Fold::new(&Adder).run(&mut g).unwrap_err().to_string();
        assert!(error.contains("evaluates to f32[], expected i64[]"), "{error}");
        g.verify().unwrap();

        let mut small = Fold::new(&Adder);
        small.inline_max = Bytes(4);
        let mut g = Graph::new("g");
        let a = g.add_constant("a", Tensor::from_bools(&[1], &[true]));
        let n = g.add_node("n", Op::NonZero, &[a], 1)[0];
        g.outputs.push(n);
        assert_eq!(small.run(&mut g).unwrap(), 0);
    }

    #[test]
    fn copies_vanish_but_outputs_keep_their_names() {
        let mut g = Graph::new("g");
        let x = g.add_input("x", TensorType::fixed(DType::F32, &[4]));
        let a = g.add_node("a", Op::Unary(UnaryOp::Identity), &[x], 1)[0];
        let b = g.add_node("b", Op::Cast { to: DType::F32, saturate: true }, &[a], 1)[0];
        let e = g.add_node("e", Op::Unary(UnaryOp::Exp), &[b], 1)[0];
        let y = g.add_node("y", Op::Dropout { seed: None }, &[e], 1)[0];
        let through = g.add_node("through", Op::Unary(UnaryOp::Identity), &[x], 1)[0];
        g.outputs = vec![y, through];
        assert_eq!(run(&mut g), 3);
        let names: Vec<&str> = g.outputs.iter().map(|&v| g.value(v).name.as_str()).collect();
        assert_eq!(names, ["y", "through"]);
        assert_eq!(g.node_count(), 2);
        DeadCode.run(&mut g).unwrap();
        g.verify().unwrap();
        assert_eq!(g.value(g.node(g.producer(g.outputs[0]).unwrap()).input(0).unwrap()).name, "x");
    }

    #[test]
    fn constant_choices_are_inlined() {
        let branch = |op: UnaryOp| {
            let mut b = Graph::new("b");
            let _unused = b.add_input("k", ValueType::Unknown);
            let v = b.add_input("v", ValueType::Unknown);
            let squeezed = b.add_node("squeezed", Op::Squeeze, &[v], 1)[0];
            let out = b.add_node("out", Op::Unary(op), &[squeezed], 1)[0];
            b.outputs.push(out);
            Box::new(b)
        };
        let choice = || Op::If { then_body: branch(UnaryOp::Exp), else_body: branch(UnaryOp::Log) };
        let mut g = Graph::new("g");
        let x = g.add_input("x", TensorType::fixed(DType::F32, &[1, 4]));
        let k = g.add_constant("k", Tensor::scalar(4i64));
        let same = g.add_node("same", Op::Binary(BinaryOp::Equal), &[k, k], 1)[0];
        let a = g.add_node("a", choice(), &[same, k, x], 1)[0];
        let b = g.add_node("b", choice(), &[same, k, a], 1)[0];
        g.outputs = vec![b];
        run(&mut g);
        DeadCode.run(&mut g).unwrap();
        g.verify().unwrap();
        let ops: Vec<&str> = g.iter_nodes().map(|(_, n)| n.op.name()).collect();
        assert_eq!(ops, ["Squeeze", "Exp", "Squeeze", "Exp"]);
        assert_eq!(g.value(g.outputs[0]).name, "b");
        assert_eq!(g.value(g.outputs[0]).ty.to_string(), "f32[4]");
    }

    #[test]
    fn bodies_fold_and_take_constants_in() {
        let mut body = Graph::new("body");
        let _i = body.add_input("i", ValueType::Unknown);
        let c = body.add_input("c", ValueType::Unknown);
        let v = body.add_input("v", ValueType::Unknown);
        let k = body.add_input("k", ValueType::Unknown);
        let shape = body.add_node("shape", Op::Shape { start: 0, end: None }, &[v], 1)[0];
        let sum = body.add_node("sum", Op::Binary(BinaryOp::Mul), &[shape, k], 1)[0];
        let wide = body.add_node("wide", Op::Expand, &[v, sum], 1)[0];
        let go_on = body.add_node("go_on", Op::Unary(UnaryOp::Identity), &[c], 1)[0];
        body.outputs = vec![go_on, v, wide];
        let mut g = Graph::new("g");
        let n = g.add_input("n", TensorType::fixed(DType::I64, &[]));
        let yes = g.add_constant("yes", Tensor::from_bools(&[], &[true]));
        let x = g.add_input("x", TensorType::fixed(DType::F32, &[1]));
        let k = g.add_constant("k", Tensor::from_slice(&[1], &[5i64]));
        let op = Op::Loop { carried: 1, body: Box::new(body) };
        let outs = g.add_node("loop", op, &[n, yes, x, k], 2);
        g.outputs = outs.clone();
        run(&mut g);
        let node = g.node(g.producer(outs[0]).unwrap());
        assert_eq!(node.inputs.len(), 3);
        let body = node.op.bodies()[0];
        assert_eq!(body.node_count(), 2, "{}", body.to_text());
        assert_eq!(g.value(outs[1]).ty.to_string(), "f32[?,5]");
    }
}
