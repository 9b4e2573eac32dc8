use super::Editor;
use crate::passes::simplify::{bounds, limit, spatial};
use crate::{
    BinaryOp, DType, Evaluate, Graph, GraphError, NodeId, Op, PadMode, Padding, Pass, PoolAttributes,
    PoolKind, QuantizeAttributes, ResizeMode, Tensor, TensorType, UnaryOp, ValueId,
};

/// Networks that say "dequantise, compute, quantise" (QDQ) compute on 8-bit integers instead.
///
/// - `Conv`, `MatMul` with bias become `QLinearConv`, `QLinearMatMul`: sums are exact in i32 and rounded once, where
///   the spelled-out network rounds each f32 step; results differ by one quantisation step at most, where the exact
///   sum lies next to a tie.
/// - `Add`, `Sub`, `Mul`, `Max`, `Min` become `QLinearBinary`, average pools `QLinearPool`; unary functions, limits
///   and changes of scale `QLinearUnary`, a table that holds exactly what the spelled-out steps give.
/// - Limits before a `QuantizeLinear` vanish when they lie outside what it can represent, else limit the integers,
///   which is the same exactly.
/// - Operators that only move elements, and maximum pools, move integers: exact. So do linear resizes between equal
///   parameters, where interpolating integers rounds once: within one step.
pub struct QuantizedFusion<'a> {
    /// Reads scales and biases.
    pub evaluate: &'a dyn Evaluate,
}

impl Pass for QuantizedFusion<'_> {
    fn name(&self) -> &'static str {
        "quantised operators"
    }

    fn run(&self, graph: &mut Graph) -> Result<usize, GraphError> {
        let mut e = Editor::new(graph);
        for id in e.ids() {
            let Some(node) = e.get(id) else { continue };
            match node.op {
                Op::QuantizeLinear(_) => self.end_in_integers(&mut e, id)?,
                Op::ArgReduce { .. } => argument(&mut e, id),
                _ => movement(&mut e, id),
            }
        }
        e.finish()
    }
}

/// A value with its quantisation parameters.
#[derive(Clone, Copy)]
struct Quantized {
    /// The 8-bit elements.
    q: ValueId,
    scale: ValueId,
    zero: Option<ValueId>,
    axis: i64,
}

fn is_8_bit(e: &Editor, v: ValueId) -> bool {
    matches!(e.dtype(v), Some(DType::I8 | DType::U8))
}

/// The 8-bit value that `v` was dequantised from.
fn dequantised(e: &Editor, v: ValueId) -> Option<Quantized> {
    let node = e.maker(v)?;
    let Op::DequantizeLinear(a) = &node.op else { return None };
    let (q, scale) = (node.input(0)?, node.input(1)?);
    let plain = a.block_size == 0 && is_8_bit(e, q) && e.is_f32(scale) && e.is_f32(v);
    plain.then_some(Quantized { q, scale, zero: node.input(2), axis: a.axis })
}

/// The same with one scale for all.
fn dequantised_whole(e: &Editor, v: ValueId) -> Option<Quantized> {
    dequantised(e, v).filter(|d| e.scalar(d.scale).is_some_and(|s| s > 0.0 && s.is_finite()))
}

impl Quantized {
    /// The zero point, made where it is absent.
    fn zero_point(&self, e: &mut Editor) -> Option<ValueId> {
        if let Some(z) = self.zero {
            return Some(z);
        }
        let (dtype, dims) = (e.dtype(self.q)?, e.dims(self.scale)?);
        Some(e.add_constant("zero_point", Tensor::zeros(dtype, &dims)))
    }

    fn operands(&self, e: &mut Editor) -> Option<[ValueId; 3]> {
        Some([self.q, self.scale, self.zero_point(e)?])
    }

    fn same_parameters(&self, e: &Editor, scale: ValueId, zero: Option<ValueId>, dtype: DType) -> bool {
        let number = |z: Option<ValueId>| match z {
            None => Some(0),
            Some(z) => e.ints(z).filter(|z| z.len() == 1).map(|z| z[0]),
        };
        e.dtype(self.q) == Some(dtype)
            && e.scalar(self.scale).is_some()
            && e.scalar(self.scale) == e.scalar(scale)
            && number(self.zero).is_some()
            && number(self.zero) == number(zero)
    }
}

/// What a `QuantizeLinear` asks for.
struct Target {
    scale: ValueId,
    zero: Option<ValueId>,
    dtype: DType,
    /// Limits of the real value that integers do not imply.
    limits: Option<UnaryOp>,
}

impl Target {
    fn operands(&self, e: &mut Editor) -> [ValueId; 2] {
        let zero = self.zero.unwrap_or_else(|| e.add_constant("zero_point", Tensor::zeros(self.dtype, &[])));
        [self.scale, zero]
    }
}

impl QuantizedFusion<'_> {
    fn end_in_integers(&self, e: &mut Editor, id: NodeId) -> Result<(), GraphError> {
        let node = e.node(id);
        let Op::QuantizeLinear(_) = &node.op else { return Ok(()) };
        let (Some(mut y), Some(scale), zero) = (node.input(0), node.input(1), node.input(2)) else {
            return Ok(());
        };
        let Some(dtype) = e.dtype(node.out()).filter(|d| matches!(d, DType::I8 | DType::U8)) else {
            return Ok(());
        };
        let Some(s) = e.scalar(scale).filter(|s| *s > 0.0 && s.is_finite()) else { return Ok(()) };
        let z = match zero {
            None => 0,
            Some(z) => match e.ints(z).as_deref() {
                Some([z]) => *z,
                _ => return Ok(()),
            },
        };
        if !e.is_f32(y) {
            return Ok(());
        }
        // Limits between the operator and its quantisation.
        let mut range = (f32::NEG_INFINITY, f32::INFINITY);
        while let Some(maker) = e.maker(y)
            && let Op::Unary(op) = &maker.op
            && let Some((min, max)) = bounds(op)
            && let Some(x) = maker.input(0)
        {
            if !e.private(y) || range.0 > range.1 || min > max {
                return Ok(());
            }
            range = (min.clamp(range.0, range.1), max.clamp(range.0, range.1));
            y = x;
        }
        let quantise = |x: f32| {
            let (low, high) = if dtype == DType::U8 { (0.0, 255.0) } else { (-128.0, 127.0) };
            (((x / s).round_ties_even() + z as f32).clamp(low, high), low, high)
        };
        let (low, least, _) = quantise(range.0);
        let (high, _, most) = quantise(range.1);
        let limits = (low > least || high < most).then(|| limit(range.0, range.1));
        let target = Target { scale, zero, dtype, limits };
        // One scale to another.
        if let Some(x) = dequantised_whole(e, y) {
            let op = target.limits.unwrap_or(UnaryOp::Identity);
            let same = x.same_parameters(e, scale, zero, dtype);
            if same && op == UnaryOp::Identity {
                e.replace_by(id, x.q);
            } else {
                table(e, id, &x, op, &target);
            }
            return Ok(());
        }
        if !e.private(y) {
            return Ok(());
        }
        let Some((maker, node)) = e.producer(y) else { return Ok(()) };
        let (op, operand) = (node.op.clone(), node.input(0));
        match &op {
            Op::Conv(_) => self.convolution(e, id, maker, &target),
            Op::MatMul(_) => self.product(e, id, maker, None, &target),
            Op::Binary(BinaryOp::Add) if self.sum_is_bias(e, id, maker, &target)? => Ok(()),
            Op::Binary(op) => {
                binary(e, id, maker, *op, &target);
                Ok(())
            }
            Op::Unary(op) if target.limits.is_none() => {
                if let Some(x) = operand.and_then(|x| dequantised_whole(e, x)) {
                    table(e, id, &x, *op, &target);
                }
                Ok(())
            }
            Op::Pool(_) | Op::GlobalPool { .. } if target.limits.is_none() => {
                pool(e, id, maker, &target);
                Ok(())
            }
            Op::Resize(_) if target.limits.is_none() => {
                resize(e, id, maker, &target);
                Ok(())
            }
            Op::Concat { .. } if target.limits.is_none() => {
                concat(e, id, maker, &target);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn convolution(
        &self,
        e: &mut Editor,
        id: NodeId,
        maker: NodeId,
        target: &Target,
    ) -> Result<(), GraphError> {
        let node = e.node(maker);
        let Op::Conv(attributes) = &node.op else { return Ok(()) };
        let mut attributes = attributes.clone();
        if attributes.activation.is_some() || node.inputs.len() > 3 {
            return Ok(());
        }
        let bias = node.input(2);
        let (Some(x), Some(w)) = (node.input(0), node.input(1)) else { return Ok(()) };
        let (Some(x), Some(w)) = (dequantised_whole(e, x), dequantised(e, w)) else { return Ok(()) };
        let (Some(w_dims), Some(w_scales)) = (e.dims(w.q), e.load_f64s(w.scale, self.evaluate)?) else {
            return Ok(());
        };
        let channels = w_dims.first().copied().unwrap_or(0);
        let per_channel = w_scales.len() == channels && (w.axis == 0 || w.axis == -(w_dims.len() as i64));
        if w_scales.len() != 1 && !per_channel || !e.is_constant(w.q) {
            return Ok(());
        }
        let bias = match bias {
            None => None,
            Some(b) => match self.integer_bias(e, b, &x, &w_scales, channels)? {
                Some(b) => Some(b),
                None => return Ok(()),
            },
        };
        let (Some(x), Some(w)) = (x.operands(e), w.operands(e)) else { return Ok(()) };
        let y = target.operands(e);
        attributes.activation = target.limits;
        let mut inputs: Vec<_> = x.into_iter().chain(w).chain(y).map(Some).collect();
        inputs.extend(bias.map(Some));
        e.absorb(id, maker, Op::QLinearConv(attributes), inputs);
        Ok(())
    }

    /// `MatMul + bias` before the quantisation.
    fn sum_is_bias(
        &self,
        e: &mut Editor,
        id: NodeId,
        sum: NodeId,
        target: &Target,
    ) -> Result<bool, GraphError> {
        let node = e.node(sum);
        let (Some(a), Some(b)) = (node.input(0), node.input(1)) else { return Ok(false) };
        for (product, bias) in [(a, b), (b, a)] {
            let Some((maker, node)) = e.producer(product) else { continue };
            let vector = e.dims(bias).zip(e.dims(product)).is_some_and(|(b, p)| {
                b.iter().product::<usize>() == *p.last().unwrap_or(&0) && b.last() == p.last()
            });
            if matches!(node.op, Op::MatMul(_)) && e.private(product) && vector && node.inputs.len() == 2 {
                self.product(e, id, maker, Some(bias), target)?;
                return Ok(matches!(e.node(id).op, Op::QLinearMatMul(_)));
            }
        }
        Ok(false)
    }

    fn product(
        &self,
        e: &mut Editor,
        id: NodeId,
        maker: NodeId,
        bias: Option<ValueId>,
        target: &Target,
    ) -> Result<(), GraphError> {
        let node = e.node(maker);
        let Op::MatMul(attributes) = &node.op else { return Ok(()) };
        let mut attributes = attributes.clone();
        if attributes.activation.is_some()
            || attributes.trans_a
            || attributes.alpha != 1.0
            || node.inputs.len() > 3
        {
            return Ok(());
        }
        let bias = bias.or(node.input(2));
        let (Some(a), Some(b)) = (node.input(0), node.input(1)) else { return Ok(()) };
        let (Some(a), Some(b)) = (dequantised_whole(e, a), dequantised(e, b)) else { return Ok(()) };
        let (Some(b_dims), Some(b_scales)) = (e.dims(b.q), e.load_f64s(b.scale, self.evaluate)?) else {
            return Ok(());
        };
        let rank = b_dims.len();
        if rank < 2 || e.dims(a.q).is_none_or(|d| d.len() < 2) {
            return Ok(());
        }
        let column_axis = if attributes.trans_b { rank - 2 } else { rank - 1 };
        let columns = b_dims[column_axis];
        let axis = if b.axis < 0 { b.axis + rank as i64 } else { b.axis };
        let per_column = rank == 2 && b_scales.len() == columns && axis == column_axis as i64;
        if b_scales.len() != 1 && !per_column {
            return Ok(());
        }
        let bias = match bias {
            None => None,
            Some(v) => match self.integer_bias(e, v, &a, &b_scales, columns)? {
                Some(b) => Some(b),
                None => return Ok(()),
            },
        };
        let (Some(a), Some(b)) = (a.operands(e), b.operands(e)) else { return Ok(()) };
        let y = target.operands(e);
        attributes.activation = target.limits;
        let mut inputs: Vec<_> = a.into_iter().chain(b).chain(y).map(Some).collect();
        inputs.extend(bias.map(Some));
        e.absorb(id, maker, Op::QLinearMatMul(attributes), inputs);
        Ok(())
    }

    /// The bias in units of `x_scale·w_scale`.
    fn integer_bias(
        &self,
        e: &mut Editor,
        bias: ValueId,
        x: &Quantized,
        w_scales: &[f64],
        channels: usize,
    ) -> Result<Option<ValueId>, GraphError> {
        let Some(x_scale) = e.scalar(x.scale) else { return Ok(None) };
        let unit = |i: usize| f64::from(x_scale) * w_scales[if w_scales.len() == 1 { 0 } else { i }];
        let spelled = e.maker(bias).and_then(|node| match &node.op {
            Op::DequantizeLinear(a) if a.block_size == 0 => {
                Some((node.input(0)?, node.input(1)?, node.input(2)))
            }
            _ => None,
        });
        let values: Vec<f64> = match spelled {
            Some((q, scale, zero)) => {
                let Some(scales) = e.load_f64s(scale, self.evaluate)? else { return Ok(None) };
                if scales.len() != 1 && scales.len() != channels {
                    return Ok(None);
                }
                let zeros = match zero {
                    None => vec![0.0],
                    Some(z) => match e.load_f64s(z, self.evaluate)? {
                        Some(z) if z.len() == 1 || z.len() == channels => z,
                        _ => return Ok(None),
                    },
                };
                let at = |v: &[f64], i: usize| v[if v.len() == 1 { 0 } else { i }];
                let same_unit = (0..channels).all(|i| {
                    let (given, wanted) = (at(&scales, i), unit(i));
                    at(&zeros, i) == 0.0 && (given - wanted).abs() <= 1e-5 * wanted
                });
                if same_unit
                    && e.dtype(q) == Some(DType::I32)
                    && e.dims(q).is_some_and(|d| d.iter().product::<usize>() == channels)
                {
                    return Ok(e.view_constant(q, &[channels]));
                }
                match e.load_f64s(q, self.evaluate)? {
                    Some(v) if v.len() == channels => {
                        (0..channels).map(|i| (v[i] - at(&zeros, i)) * at(&scales, i)).collect()
                    }
                    _ => return Ok(None),
                }
            }
            None if e.is_f32(bias) => match e.load_f64s(bias, self.evaluate)? {
                Some(v) if v.len() == channels => v,
                _ => return Ok(None),
            },
            None => return Ok(None),
        };
        let mut integers = Vec::with_capacity(channels);
        for (i, v) in values.iter().enumerate() {
            let q = (v / unit(i)).round_ties_even();
            if q.is_nan() || q.abs() >= f64::from(i32::MAX) {
                return Ok(None);
            }
            integers.push(q as i32);
        }
        Ok(Some(e.add_constant("bias", Tensor::from_slice(&[channels], &integers))))
    }
}

/// A function of one 8-bit element.
fn table(e: &mut Editor, id: NodeId, x: &Quantized, op: UnaryOp, target: &Target) {
    let Some(x) = x.operands(e) else { return };
    let y = target.operands(e);
    let inputs: Vec<ValueId> = x.into_iter().chain(y).collect();
    e.set_all(id, Op::QLinearUnary(op), &inputs);
}

fn binary(e: &mut Editor, id: NodeId, maker: NodeId, op: BinaryOp, target: &Target) {
    if !matches!(op, BinaryOp::Add | BinaryOp::Sub | BinaryOp::Mul | BinaryOp::Max | BinaryOp::Min) {
        return;
    }
    let node = e.node(maker);
    let (Some(a), Some(b)) = (node.input(0), node.input(1)) else { return };
    let (Some(a), Some(b)) = (dequantised_whole(e, a), dequantised_whole(e, b)) else { return };
    let (Some(a), Some(b)) = (a.operands(e), b.operands(e)) else { return };
    let y = target.operands(e);
    let inputs = a.into_iter().chain(b).chain(y).map(Some).collect();
    e.absorb(id, maker, Op::QLinearBinary { op, activation: target.limits }, inputs);
}

fn pool(e: &mut Editor, id: NodeId, maker: NodeId, target: &Target) {
    let node = e.node(maker);
    let Some(source) = node.input(0) else { return };
    let Some(dims) = e.dims(source) else { return };
    let attributes = match &node.op {
        Op::Pool(a) if a.kind == PoolKind::Average => a.clone(),
        Op::GlobalPool { kind: PoolKind::Average, layout } => {
            let kernel = spatial(&dims, *layout).to_vec();
            let n = kernel.len();
            PoolAttributes {
                kind: PoolKind::Average,
                kernel,
                strides: vec![1; n],
                dilations: vec![1; n],
                padding: Padding::Explicit(vec![0; 2 * n]),
                ceil_mode: false,
                count_include_pad: false,
                storage_order_column: false,
                layout: *layout,
            }
        }
        _ => return,
    };
    let Some(x) = dequantised_whole(e, source) else { return };
    let Some(x) = x.operands(e) else { return };
    let y = target.operands(e);
    let inputs = x.into_iter().chain(y).map(Some).collect();
    e.absorb(id, maker, Op::QLinearPool(attributes), inputs);
}

fn resize(e: &mut Editor, id: NodeId, maker: NodeId, target: &Target) {
    let node = e.node(maker);
    let Some(x) = node.input(0).and_then(|x| dequantised_whole(e, x)) else { return };
    let Op::Resize(a) = &node.op else { return };
    // A cubic overshoots, and a value outside the picture would need quantising.
    if a.mode == ResizeMode::Cubic
        || a.coordinates == crate::CoordinateMode::TfCropAndResize
        || !x.same_parameters(e, target.scale, target.zero, target.dtype)
    {
        return;
    }
    let (op, mut inputs) = (node.op.clone(), node.inputs.clone());
    inputs[0] = Some(x.q);
    e.absorb(id, maker, op, inputs);
}

fn concat(e: &mut Editor, id: NodeId, maker: NodeId, target: &Target) {
    let node = e.node(maker);
    let (op, name) = (node.op.clone(), node.name.clone());
    let Some(parts) =
        node.inputs.iter().map(|v| dequantised_whole(e, (*v)?)).collect::<Option<Vec<Quantized>>>()
    else {
        return;
    };
    let mut inputs = Vec::new();
    for x in parts {
        if x.same_parameters(e, target.scale, target.zero, target.dtype) {
            inputs.push(Some(x.q));
            continue;
        }
        let (Some(dims), Some(operands)) = (e.dims(x.q), x.operands(e)) else { return };
        let operands: Vec<ValueId> = operands.into_iter().chain(target.operands(e)).collect();
        let ty = TensorType::fixed(target.dtype, &dims);
        let op = Op::QLinearUnary(UnaryOp::Identity);
        inputs.push(Some(e.insert(id, &format!("{name}.rescaled"), op, &operands, ty)));
    }
    e.absorb(id, maker, op, inputs);
}

/// The largest of dequantised elements is the largest of the elements.
fn argument(e: &mut Editor, id: NodeId) {
    let node = e.node(id);
    if let Some(x) = node.input(0).and_then(|x| dequantised_whole(e, x)) {
        let op = node.op.clone();
        e.set_all(id, op, &[x.q]);
    }
}

/// Moves dequantised elements before they are dequantised.
fn movement(e: &mut Editor, id: NodeId) {
    let node = e.node(id);
    let Some(x) = node.input(0).and_then(|x| dequantised_whole(e, x)) else { return };
    let one_output = node.outputs.iter().flatten().count() == 1;
    let mut inputs = node.inputs.clone();
    match &node.op {
        Op::Reshape { .. }
        | Op::Transpose { .. }
        | Op::Flatten { .. }
        | Op::Squeeze
        | Op::Unsqueeze
        | Op::Slice
        | Op::Gather { .. }
        | Op::Expand
        | Op::Tile
        | Op::DepthToSpace { .. }
        | Op::SpaceToDepth { .. }
        | Op::Split { .. } => {}
        Op::Pool(a) if a.kind == PoolKind::Max && one_output => {}
        Op::GlobalPool { kind: PoolKind::Max, .. } => {}
        Op::Resize(a)
            if a.mode == ResizeMode::Nearest && a.coordinates != crate::CoordinateMode::TfCropAndResize => {}
        Op::Pad { mode: PadMode::Constant } => {
            let zero_fill = node.input(2).is_none_or(|v| e.scalar(v) == Some(0.0));
            let Some(zero) = x.zero_point(e).filter(|_| zero_fill) else { return };
            let Some(zero) = e.view_constant(zero, &[]) else { return };
            if inputs.len() < 3 {
                inputs.resize(3, None);
            }
            inputs[2] = Some(zero);
        }
        Op::Pad { .. } => {}
        _ => return,
    }
    let node = e.node(id);
    let (op, name) = (node.op.clone(), node.name.clone());
    let outputs: Vec<ValueId> = node.outputs.iter().flatten().copied().collect();
    if outputs.len() != node.outputs.len() {
        return;
    }
    let Some(dtype) = e.dtype(x.q) else { return };
    let types: Option<Vec<TensorType>> =
        outputs.iter().map(|&v| Some(TensorType::fixed(dtype, &e.dims(v)?))).collect();
    let Some(types) = types else { return };
    // What follows quantises again or is dequantised later.
    inputs[0] = Some(x.q);
    let dequantise = Op::DequantizeLinear(QuantizeAttributes {
        axis: 0,
        block_size: 0,
        output_dtype: None,
        saturate: true,
    });
    let moved = e.insert_with(id, &format!("{name}.integers"), op, inputs, types);
    let parameters = |q: ValueId| {
        let mut v = vec![Some(q), Some(x.scale)];
        v.extend(x.zero.map(Some));
        v
    };
    if let [q] = moved[..] {
        e.set(id, dequantise, parameters(q));
        return;
    }
    for (&old, q) in outputs.iter().zip(moved) {
        let Some(ty) = e.ty(old).cloned() else { continue };
        let base = e.value(old).name.clone();
        let new = e.insert_with(id, &base, dequantise.clone(), parameters(q), vec![ty])[0];
        e.redirect(old, new);
    }
}
