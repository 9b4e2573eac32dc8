//! From a graph with open inputs to one whose shapes are known.

use std::collections::HashMap;
use std::sync::Arc;

use crate::{Constant, Dim, Graph, GraphError, Op, Tensor, TensorType, ValueId, ValueKind, ValueType};

/// Size of a symbol, and the input that says so.
type Sizes = HashMap<Arc<str>, (usize, String)>;

impl Graph {
    /// Fixes the types of inputs and puts the sizes of their symbols into the types of all values. Types that stay
    /// open (data-dependent ones) are refined by [`infer`](Self::infer) or [`Fold`](crate::passes::Fold) afterwards.
    ///
    /// A given dimension may be open itself; then it fixes nothing.
    ///
    /// # Errors
    /// [`GraphError::Input`] when a value is not an input, or when element type, rank, a fixed size or the size that
    /// another input gives to the same symbol differ. The graph is unchanged then.
    pub fn bind(&mut self, inputs: &[(ValueId, TensorType)]) -> Result<(), GraphError> {
        let mut sizes = Sizes::new();
        let mut types = Vec::new();
        for (id, given) in inputs {
            types.push((*id, self.bound_type(*id, given, &mut sizes)?));
        }
        for (id, ty) in types {
            self.value_mut(id).ty = ty.into();
        }
        if !sizes.is_empty() {
            substitute(self, &sizes);
        }
        Ok(())
    }

    /// Turns an input into a constant: used where the elements of an input decide shapes and are known before
    /// planning. Checks and binds its type first.
    ///
    /// # Errors
    /// As for [`bind`](Self::bind).
    pub fn bind_value(&mut self, input: ValueId, tensor: Tensor) -> Result<(), GraphError> {
        let ty = tensor.tensor_type();
        self.bind(&[(input, ty.clone())])?;
        self.inputs.retain(|&v| v != input);
        let value = self.value_mut(input);
        value.ty = ty.into();
        value.kind = ValueKind::Constant(Constant::Inline(Arc::new(tensor)));
        Ok(())
    }

    /// The declared type of an input, refined by the given one.
    fn bound_type(
        &self,
        id: ValueId,
        given: &TensorType,
        sizes: &mut Sizes,
    ) -> Result<TensorType, GraphError> {
        let Some(value) = self.values.get(id.index()).filter(|_| self.inputs.contains(&id)) else {
            return Err(GraphError::structure(self, format!("value %{} is not an input", id.0)));
        };
        let error = |problem: String| GraphError::Input { input: value.name.clone(), problem };
        let declared = match &value.ty {
            ValueType::Tensor(t) => t,
            ValueType::Unknown => return Ok(given.clone()),
            other => return Err(error(format!("a tensor {given} is given, expected {other}"))),
        };
        if declared.dtype != given.dtype {
            return Err(error(format!("element type {} is given, expected {}", given.dtype, declared.dtype)));
        }
        let (Some(dims), Some(found)) = (&declared.shape, &given.shape) else {
            let shape = declared.shape.clone().or(given.shape.clone());
            return Ok(TensorType { dtype: declared.dtype, shape });
        };
        if dims.len() != found.len() {
            let problem = format!(
                "{given} is given, which has rank {}, expected {declared} of rank {}",
                found.len(),
                dims.len()
            );
            return Err(error(problem));
        }
        let mut shape = Vec::new();
        for (i, (d, f)) in dims.iter().zip(found).enumerate() {
            shape.push(match (d, f) {
                (Dim::Fixed(n), Dim::Fixed(m)) if n != m => {
                    return Err(error(format!(
                        "{given} is given: dimension {i} is {m}, expected {n} ({declared})"
                    )));
                }
                (Dim::Symbol(s), Dim::Fixed(m)) => {
                    match sizes.get(s) {
                        Some((n, by)) if n != m => {
                            return Err(error(format!(
                                "{given} is given: dimension {i} ({s}) is {m}, but input {by:?} makes {s} {n}"
                            )));
                        }
                        Some(_) => {}
                        None => {
                            sizes.insert(s.clone(), (*m, value.name.clone()));
                        }
                    }
                    f.clone()
                }
                (Dim::Unknown(()), f) => f.clone(),
                (d, _) => d.clone(),
            });
        }
        Ok(TensorType { dtype: declared.dtype, shape: Some(shape) })
    }

    /// The inputs whose elements, not only their shapes, decide the shape of some value that is not known yet: the
    /// shape operand of a reshape, the bounds of a slice, and whatever they are computed from. Operators whose result
    /// shape always depends on the data ([`Op::NonZero`] and the like) do not count.
    pub fn shape_controlling_inputs(&self) -> Vec<ValueId> {
        let mut wanted = vec![false; self.values.len()];
        let mut stack = Vec::new();
        let want = |v: Option<ValueId>, wanted: &mut Vec<bool>, stack: &mut Vec<ValueId>| {
            if let Some(v) = v
                && !std::mem::replace(&mut wanted[v.index()], true)
            {
                stack.push(v);
            }
        };
        for (_, node) in self.iter_nodes() {
            let fixed = |v: &ValueId| self.value(*v).ty.tensor().is_some_and(|t| t.dims().is_some());
            if !node.outputs.iter().flatten().all(fixed) {
                for &i in shape_operands(&node.op) {
                    want(node.input(i), &mut wanted, &mut stack);
                }
            }
            for body in node.op.bodies() {
                for input in body.shape_controlling_inputs() {
                    let at = body.inputs.iter().position(|&v| v == input);
                    let operand = at.and_then(|at| operand_of_body_input(&node.op, at));
                    want(operand.and_then(|i| node.input(i)), &mut wanted, &mut stack);
                }
            }
        }
        while let Some(v) = stack.pop() {
            let Some(producer) = self.producer(v).and_then(|id| self.nodes.get(id.index())?.as_ref()) else {
                continue;
            };
            match producer.op {
                Op::Shape { .. } | Op::Size => {}
                Op::NonZero | Op::Compress { .. } | Op::Unique { .. } | Op::NonMaxSuppression { .. } => {}
                Op::EyeLike { .. } | Op::Random(_) => {}
                _ => producer.inputs.iter().for_each(|&i| want(i, &mut wanted, &mut stack)),
            }
        }
        self.inputs.iter().copied().filter(|v| wanted[v.index()]).collect()
    }
}

/// The operands whose elements decide the shapes of results.
fn shape_operands(op: &Op) -> &'static [usize] {
    match op {
        Op::Reshape { .. }
        | Op::Squeeze
        | Op::Unsqueeze
        | Op::Expand
        | Op::Tile
        | Op::Split { .. }
        | Op::CenterCropPad { .. }
        | Op::AffineGrid { .. }
        | Op::TopK { .. }
        | Op::OneHot { .. }
        | Op::Reduce { .. }
        | Op::SplitToSequence { .. } => &[1],
        Op::Slice => &[1, 2, 3, 4],
        Op::Pad { .. } => &[1, 3],
        Op::Resize(_) => &[1, 2, 3],
        Op::Range => &[0, 1, 2],
        Op::ConstantOfShape { .. } | Op::Window { .. } => &[0],
        Op::Col2Im { .. } => &[1, 2],
        Op::MaxUnpool { .. } => &[2],
        Op::Dft { .. } => &[1, 2],
        Op::Stft { .. } => &[1, 3],
        Op::MelWeightMatrix { .. } => &[0, 1],
        _ => &[],
    }
}

/// The operand of a control-flow node that a body's input stands for.
fn operand_of_body_input(op: &Op, input: usize) -> Option<usize> {
    match op {
        Op::If { .. } => input.checked_add(1),
        // The iteration and the condition are made by the loop itself.
        Op::Loop { .. } if input < 2 => None,
        _ => Some(input),
    }
}

fn substitute(graph: &mut Graph, sizes: &Sizes) {
    for value in &mut graph.values {
        substitute_type(&mut value.ty, sizes);
    }
    for node in graph.nodes.iter_mut().flatten() {
        if let Op::OptionalConstruct { ty: Some(ty) } = &mut node.op {
            substitute_type(ty, sizes);
        }
        for body in node.op.bodies_mut() {
            substitute(body, sizes);
        }
    }
}

fn substitute_type(ty: &mut ValueType, sizes: &Sizes) {
    match ty {
        ValueType::Tensor(t) => {
            for d in t.shape.iter_mut().flatten() {
                if let Dim::Symbol(s) = d
                    && let Some((n, _)) = sizes.get(s)
                {
                    *d = Dim::Fixed(*n);
                }
            }
        }
        ValueType::Sequence(t) | ValueType::Optional(t) => substitute_type(t, sizes),
        ValueType::Map { .. } | ValueType::Unknown => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BinaryOp, DType};

    fn symbol(s: &str) -> Dim {
        Dim::Symbol(s.into())
    }

    fn graph() -> (Graph, ValueId, ValueId) {
        let mut g = Graph::new("g");
        let ty = |dims| TensorType { dtype: DType::F32, shape: Some(dims) };
        let x = g.add_input("x", ty(vec![symbol("batch"), Dim::Fixed(3)]));
        let y = g.add_input("y", ty(vec![symbol("batch"), Dim::UNKNOWN]));
        let z = g.add_node("z", Op::Binary(BinaryOp::Add), &[x, y], 1)[0];
        g.outputs.push(z);
        g.infer().unwrap();
        (g, x, y)
    }

    #[test]
    fn binding_reaches_every_value() {
        let (mut g, x, y) = graph();
        assert_eq!(g.value(g.outputs[0]).ty.to_string(), "f32[batch,3]");
        let ty = TensorType::fixed(DType::F32, &[2, 3]);
        g.bind(&[(x, ty.clone()), (y, ty)]).unwrap();
        assert_eq!(g.value(g.outputs[0]).ty.to_string(), "f32[2,3]");
    }

    #[track_caller]
    fn refuse(x: TensorType, y: TensorType, part: &str) {
        let (mut g, a, b) = graph();
        let before = g.clone();
        let error = g.bind(&[(a, x), (b, y)]).unwrap_err().to_string();
        assert!(error.contains(part), "{error}, expected {part:?}");
        assert_eq!(g, before);
    }

    #[test]
    fn contradictions_are_named() {
        let f32s = |dims: &[usize]| TensorType::fixed(DType::F32, dims);
        refuse(f32s(&[2, 4]), f32s(&[2, 4]), "input \"x\": f32[2,4] is given: dimension 1 is 4, expected 3");
        refuse(f32s(&[2, 3]), f32s(&[5, 3]), "dimension 0 (batch) is 5, but input \"x\" makes batch 2");
        refuse(f32s(&[2]), f32s(&[2, 3]), "rank 1");
        refuse(
            TensorType::fixed(DType::F64, &[2, 3]),
            f32s(&[2, 3]),
            "element type f64 is given, expected f32",
        );
        let (mut g, ..) = graph();
        let z = g.outputs[0];
        assert!(g.bind(&[(z, f32s(&[2, 3]))]).unwrap_err().to_string().contains("not an input"));
    }

    #[test]
    fn inputs_that_decide_shapes_are_found() {
        let mut g = Graph::new("g");
        let ty = |dims| TensorType { dtype: DType::F32, shape: Some(dims) };
        let x = g.add_input("x", ty(vec![symbol("n"), Dim::Fixed(3)]));
        let rows = g.add_input("rows", TensorType::fixed(DType::I64, &[1]));
        let bias = g.add_input("bias", TensorType::fixed(DType::F32, &[1]));
        let rest = g.add_constant("rest", Tensor::from_slice(&[1], &[-1i64]));
        let shape = g.add_node("shape", Op::Concat { axis: 0 }, &[rows, rest], 1)[0];
        let y = g.add_node("y", Op::Reshape { allow_zero: false }, &[x, shape], 1)[0];
        let z = g.add_node("z", Op::Binary(BinaryOp::Add), &[y, bias], 1)[0];
        let of_z = g.add_node("of_z", Op::Shape { start: 0, end: None }, &[z], 1)[0];
        let again = g.add_node("again", Op::Expand, &[bias, of_z], 1)[0];
        g.outputs.push(again);
        g.infer().unwrap();
        assert_eq!(g.shape_controlling_inputs(), [rows]);
        g.bind_value(rows, Tensor::from_slice(&[1], &[6i64])).unwrap();
        g.bind(&[(x, TensorType::fixed(DType::F32, &[4, 3]))]).unwrap();
        g.infer().unwrap();
        assert_eq!(g.inputs, [x, bias]);
        assert_eq!(g.value(again).ty.to_string(), "f32[6,2]");
        assert!(g.shape_controlling_inputs().is_empty());
        assert!(g.bind_value(x, Tensor::scalar(1f32)).is_err());
    }
}
