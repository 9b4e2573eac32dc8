use super::Editor;
use crate::{BinaryOp, MatMulAttributes, NodeId, Op, Tensor, UnaryOp, ValueId, VariadicOp};

/// `x + 0`, `x − 0`, `x · 1`, `x / 1`, `x¹`.
pub fn neutral_operand(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let Op::Binary(op) = node.op else { return false };
    let (a, b) = (node.inputs[0], node.inputs[1]);
    let (Some(a), Some(b), Some(out)) = (a, b, node.output(0)) else { return false };
    let neutral = match op {
        BinaryOp::Add | BinaryOp::Sub => 0.0,
        BinaryOp::Mul | BinaryOp::Div | BinaryOp::Pow => 1.0,
        _ => return false,
    };
    let commutes = matches!(op, BinaryOp::Add | BinaryOp::Mul);
    let is_neutral = |v: ValueId| {
        let t = e.tensor(v)?;
        // A long constant of nothing but zeros is not worth looking for.
        (t.len() == 1).then(|| t.to_f64s()).flatten().map(|x| x[0] == neutral)
    };
    let kept = if is_neutral(b) == Some(true) {
        a
    } else if commutes && is_neutral(a) == Some(true) {
        b
    } else {
        return false;
    };
    e.same_dims(kept, out) && e.dtype(kept) == e.dtype(out) && e.replace_by(id, kept)
}

/// Operators that pass their operand on.
pub fn identity(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let Some(x) = node.input(0) else { return false };
    let Some(out) = node.output(0) else { return false };
    let alone = node.outputs.iter().flatten().count() == 1;
    let passes = alone
        && match &node.op {
            Op::Unary(UnaryOp::Identity) => true,
            Op::Unary(UnaryOp::ClipTo { min, max }) => *min == f32::NEG_INFINITY && *max == f32::INFINITY,
            Op::Dropout { .. } => match node.input(2) {
                None => true,
                Some(training) => e.ints(training).is_some_and(|t| t.iter().all(|&x| x == 0)),
            },
            Op::Cast { to, .. } => e.dtype(x) == Some(*to),
            Op::Clip => node.input(1).is_none() && node.input(2).is_none(),
            Op::Variadic(_) | Op::Concat { .. } => node.inputs.len() == 1,
            Op::Split { .. } => e.same_dims(x, out),
            _ => false,
        };
    passes && e.replace_by(id, x)
}

/// Small powers.
pub fn power(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let (Op::Binary(BinaryOp::Pow), Some(x), Some(p)) = (&node.op, node.input(0), node.input(1)) else {
        return false;
    };
    let out = node.out();
    if !e.is_f32(x) || !e.same_dims(x, out) {
        return false;
    }
    let op = match e.scalar(p) {
        Some(2.0) => {
            e.set_all(id, Op::Binary(BinaryOp::Mul), &[x, x]);
            return true;
        }
        Some(0.5) => UnaryOp::Sqrt,
        Some(-1.0) => UnaryOp::Reciprocal,
        _ => return false,
    };
    e.set_all(id, Op::Unary(op), &[x]);
    true
}

/// A division by a power of two is a product, exactly.
pub fn division(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let (Op::Binary(BinaryOp::Div), Some(x), Some(d)) = (&node.op, node.input(0), node.input(1)) else {
        return false;
    };
    if !e.is_f32(x) {
        return false;
    }
    let Some(divisor) = e.scalar(d) else { return false };
    let inverse = 1.0 / divisor;
    let exact = divisor.is_normal() && inverse.is_normal() && divisor.to_bits() & 0x007f_ffff == 0;
    if !exact {
        return false;
    }
    let dims = e.dims(d).expect("a constant has a shape");
    let c = e.add_constant("inverse", Tensor::from_slice(&dims, &[inverse]));
    e.set_all(id, Op::Binary(BinaryOp::Mul), &[x, c]);
    true
}

/// `1 / x`.
pub fn reciprocal(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let (Op::Binary(BinaryOp::Div), Some(one), Some(x)) = (&node.op, node.input(0), node.input(1)) else {
        return false;
    };
    if !e.is_f32(x) || e.scalar(one) != Some(1.0) || !e.same_dims(x, node.out()) {
        return false;
    }
    e.set_all(id, Op::Unary(UnaryOp::Reciprocal), &[x]);
    true
}

/// The bounds of an operator that only limits.
pub fn bounds(op: &UnaryOp) -> Option<(f32, f32)> {
    match *op {
        UnaryOp::Relu => Some((0.0, f32::INFINITY)),
        UnaryOp::ClipTo { min, max } => Some((min, max)),
        _ => None,
    }
}

/// The operator that limits to these bounds.
pub fn limit(min: f32, max: f32) -> UnaryOp {
    if min == 0.0 && max == f32::INFINITY { UnaryOp::Relu } else { UnaryOp::ClipTo { min, max } }
}

/// `Clip`, `Max` and `Min` with constant bounds.
pub fn limits(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let Some(x) = node.input(0) else { return false };
    let Some(out) = node.output(0) else { return false };
    if !e.is_f32(out) {
        return false;
    }
    let (x, op) = match &node.op {
        Op::Unary(op @ UnaryOp::ClipTo { min, max }) => {
            let plain = limit(*min, *max);
            if plain == *op {
                return false;
            }
            (x, plain)
        }
        Op::Clip => {
            let bound = |v: Option<ValueId>, absent: f32| v.map_or(Some(absent), |v| e.scalar(v));
            let min = bound(node.input(1), f32::NEG_INFINITY);
            let max = bound(node.input(2), f32::INFINITY);
            let (Some(min), Some(max)) = (min, max) else { return false };
            (x, limit(min, max))
        }
        Op::Binary(op @ (BinaryOp::Max | BinaryOp::Min)) => {
            let Some(y) = node.input(1) else { return false };
            let (x, bound) = match (e.scalar(x), e.scalar(y)) {
                (None, Some(b)) => (x, b),
                (Some(b), None) => (y, b),
                _ => return false,
            };
            if !e.same_dims(x, out) {
                return false;
            }
            match op {
                BinaryOp::Max => (x, limit(bound, f32::INFINITY)),
                _ => (x, limit(f32::NEG_INFINITY, bound)),
            }
        }
        _ => return false,
    };
    // NaN as a bound is somebody's mistake that must stay visible.
    if bounds(&op).is_some_and(|(min, max)| min.is_nan() || max.is_nan()) {
        return false;
    }
    e.set_all(id, Op::Unary(op), &[x]);
    true
}

/// Two limits in a row are one.
pub fn limits_of_limits(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let (Op::Unary(outer), Some(x)) = (&node.op, node.input(0)) else { return false };
    let Some((min, max)) = bounds(outer) else { return false };
    let Some(inner) = e.maker(x) else { return false };
    let (Op::Unary(op), Some(y)) = (&inner.op, inner.input(0)) else { return false };
    let Some((inner_min, inner_max)) = bounds(op) else { return false };
    if !e.private(x) || min > max || inner_min > inner_max {
        return false;
    }
    let op = limit(inner_min.clamp(min, max), inner_max.clamp(min, max));
    e.set_all(id, Op::Unary(op), &[y]);
    true
}

/// `Sum`, `Max` and `Min` of two.
pub fn variadic(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let Op::Variadic(op) = node.op else { return false };
    let op = match op {
        VariadicOp::Sum => BinaryOp::Add,
        VariadicOp::Max => BinaryOp::Max,
        VariadicOp::Min => BinaryOp::Min,
        VariadicOp::Mean => return false,
    };
    let [Some(a), Some(b)] = node.inputs[..] else { return false };
    e.set_all(id, Op::Binary(op), &[a, b]);
    true
}

/// `max(x, a·x)` with `0 < a < 1`.
pub fn leaky(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let (Op::Binary(BinaryOp::Max), Some(a), Some(b)) = (&node.op, node.input(0), node.input(1)) else {
        return false;
    };
    for (x, scaled) in [(a, b), (b, a)] {
        let Some(mul) = e.maker(scaled).filter(|n| n.op == Op::Binary(BinaryOp::Mul)) else { continue };
        let (Some(p), Some(q)) = (mul.input(0), mul.input(1)) else { continue };
        let slope = match (p == x, q == x) {
            (true, false) => e.scalar(q),
            (false, true) => e.scalar(p),
            _ => None,
        };
        if let Some(alpha) = slope.filter(|s| *s > 0.0 && *s < 1.0)
            && e.is_f32(x)
            && e.same_dims(x, e.node(id).out())
        {
            e.set_all(id, Op::Unary(UnaryOp::LeakyRelu { alpha }), &[x]);
            return true;
        }
    }
    false
}

/// `Gemm` is a `MatMul` with a bias where `beta·c` can be one.
pub fn gemm(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let Op::Gemm(a) = &node.op else { return false };
    let attributes = MatMulAttributes {
        trans_a: a.trans_a,
        trans_b: a.trans_b,
        alpha: a.alpha,
        ..MatMulAttributes::default()
    };
    let (beta, c) = (a.beta, node.input(2));
    let (x, w, out) = (node.input(0), node.input(1), node.out());
    let (Some(x), Some(w), Some(dims)) = (x, w, e.dims(out)) else { return false };
    if !e.is_f32(x) || dims.len() != 2 {
        return false;
    }
    let mut inputs = vec![Some(x), Some(w)];
    if let Some(c) = c.filter(|_| beta != 0.0) {
        let Some(c_dims) = e.dims(c) else { return false };
        let n = dims[1];
        // Everything but the last dimension must be 1 for a bias, or all equal for a residual.
        let is_vector = c_dims.iter().product::<usize>() == n && c_dims.last() == Some(&n);
        let is_one = c_dims.iter().product::<usize>() == 1;
        if beta != 1.0 || is_one && n != 1 {
            let Some(t) = e.tensor(c).filter(|t| is_vector || t.len() == 1) else { return false };
            let Some(values) = t.to_f64s() else { return false };
            let bias: Vec<f32> =
                (0..n).map(|i| beta * values[if values.len() == 1 { 0 } else { i }] as f32).collect();
            let bias = e.add_constant("bias", Tensor::from_slice(&[n], &bias));
            inputs.push(Some(bias));
        } else if is_vector && e.is_constant(c) {
            let Some(bias) = e.view_constant(c, &[n]) else { return false };
            inputs.push(Some(bias));
        } else if c_dims == [n] {
            inputs.push(Some(c));
        } else if c_dims == dims {
            inputs.extend([None, Some(c)]);
        } else {
            return false;
        }
    }
    e.set(id, Op::MatMul(attributes), inputs);
    true
}

/// Quantising what was just dequantised with the same parameters gives it back.
pub fn requantised(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let (Op::QuantizeLinear(q), Some(x)) = (&node.op, node.input(0)) else { return false };
    let Some(inner) = e.maker(x) else { return false };
    let (Op::DequantizeLinear(d), Some(source)) = (&inner.op, inner.input(0)) else { return false };
    let same_constant = |a: Option<ValueId>, b: Option<ValueId>| match (a, b) {
        (a, b) if a == b => true,
        (Some(a), Some(b)) => e.tensor(a).is_some() && e.tensor(a) == e.tensor(b),
        // An absent zero point is 0 of the type that the dtype check below compares.
        (Some(z), None) | (None, Some(z)) => {
            e.tensor(z).is_some_and(|t| t.as_bytes().iter().all(|&b| b == 0))
        }
        (None, None) => true,
    };
    let scalar = node.input(1).and_then(|s| e.ty(s)).and_then(|t| t.elements()) == Some(1);
    let same = same_constant(node.input(1), inner.input(1))
        && same_constant(node.input(2), inner.input(2))
        && (scalar || q.axis == d.axis && q.block_size == d.block_size)
        && e.dtype(source) == e.dtype(node.out());
    same && e.replace_by(id, source)
}

/// Reads an operand that was transposed just for this product as it was before.
pub fn transposed_operand(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let Op::MatMul(attributes) = &node.op else { return false };
    for side in [0, 1] {
        let Some(v) = node.input(side) else { continue };
        let Some(maker) = e.maker(v) else { continue };
        let (Op::Transpose { perm: Some(perm) }, Some(source)) = (&maker.op, maker.input(0)) else {
            continue;
        };
        let n = perm.len();
        if n < 2 || !perm[..n - 2].iter().copied().eq(0..n - 2) || perm[n - 2..] != [n - 1, n - 2] {
            continue;
        }
        let mut attributes = attributes.clone();
        if side == 0 {
            attributes.trans_a = !attributes.trans_a;
        } else {
            attributes.trans_b = !attributes.trans_b;
        }
        let mut inputs = node.inputs.clone();
        inputs[side] = Some(source);
        e.set(id, Op::MatMul(attributes), inputs);
        return true;
    }
    false
}
