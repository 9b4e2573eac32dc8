use super::Editor;
use super::product::{close, plus_scalar, product, unary};
use crate::{BinaryOp, Graph, GraphError, NodeId, Op, Pass, UnaryOp, ValueId};

/// Activations that exporters spell out: Gelu (erf and tanh), Swish, HardSwish, HardSigmoid, Mish, Softplus.
///
/// Scalars match within 1e-4 of their value, as exporters write them with few digits.
#[derive(Clone, Copy, Debug, Default)]
pub struct ActivationFusion;

impl Pass for ActivationFusion {
    fn name(&self) -> &'static str {
        "activations"
    }

    fn run(&self, graph: &mut Graph) -> Result<usize, GraphError> {
        let mut e = Editor::new(graph);
        for id in e.ids() {
            let Some(node) = e.get(id) else { continue };
            let Some(out) = node.output(0).filter(|&v| e.is_f32(v)) else { continue };
            let found = match &node.op {
                Op::Binary(BinaryOp::Mul | BinaryOp::Div) => of_product(&e, id, out),
                Op::Unary(UnaryOp::ClipTo { min: 0.0, max: 1.0 }) => clipped_line(&e, id),
                Op::Unary(UnaryOp::Log) => softplus(&e, id),
                _ => None,
            };
            if let Some((op, x)) = found
                && e.same_dims(x, out)
            {
                e.set_all(id, Op::Unary(op), &[x]);
            }
        }
        e.finish()
    }
}

/// `clip(alpha·x + beta, 0, 1)`.
fn clipped_line(e: &Editor, id: NodeId) -> Option<(UnaryOp, ValueId)> {
    let u = e.node(id).input(0).filter(|&u| e.private(u))?;
    let (line, beta) = plus_scalar(e, u)?;
    let p = product(e, line, &[]);
    let [x] = p.factors[..] else { return None };
    Some((UnaryOp::HardSigmoid { alpha: p.scale as f32, beta: beta as f32 }, x))
}

/// `ln(1 + exp(x))`.
fn softplus(e: &Editor, id: NodeId) -> Option<(UnaryOp, ValueId)> {
    let u = e.node(id).input(0).filter(|&u| e.private(u))?;
    let (exp, one) = plus_scalar(e, u)?;
    let x = unary(e, exp, UnaryOp::Exp)?;
    (one == 1.0).then_some((UnaryOp::Softplus, x))
}

/// Everything whose last step is a product.
fn of_product(e: &Editor, id: NodeId, out: ValueId) -> Option<(UnaryOp, ValueId)> {
    // The outermost product decides; one that feeds another product by itself waits for that.
    let p = product(e, out, &[]);
    let _ = id;
    match p.factors[..] {
        [c] => {
            // clip(x + 3, 0, 6)/6
            let (x, shift) = six(e, c)?;
            close(p.scale, 1.0 / 6.0).then_some(())?;
            Some((UnaryOp::HardSigmoid { alpha: 1.0 / 6.0, beta: (shift / 6.0) as f32 }, x))
        }
        [a, b] => [(a, b), (b, a)].into_iter().find_map(|(x, gate)| gated(e, x, gate, p.scale)),
        _ => None,
    }
}

/// `clip(x + c, 0, 6)`: x and c.
fn six(e: &Editor, v: ValueId) -> Option<(ValueId, f64)> {
    plus_scalar(e, unary(e, v, UnaryOp::ClipTo { min: 0.0, max: 6.0 })?)
}

/// `scale · x · gate(x)`.
fn gated(e: &Editor, x: ValueId, gate: ValueId, scale: f64) -> Option<(UnaryOp, ValueId)> {
    // The factor itself may be a product that was taken apart, such as x/2; only whole values can be compared.
    if scale == 1.0 {
        if let Some(u) = unary(e, gate, UnaryOp::Sigmoid) {
            let p = product(e, u, &[x]);
            if p.factors == [x] {
                return Some((UnaryOp::Swish { alpha: p.scale as f32 }, x));
            }
        }
        if let Some(Op::Unary(UnaryOp::HardSigmoid { alpha, beta })) = e.maker(gate).map(|n| n.op.clone())
            && e.maker(gate)?.input(0) == Some(x)
            && close(alpha.into(), 1.0 / 6.0)
            && close(beta.into(), 0.5)
        {
            return Some((UnaryOp::HardSwish, x));
        }
        if let Some(u) = unary(e, gate, UnaryOp::Tanh)
            && unary(e, u, UnaryOp::Softplus) == Some(x)
        {
            return Some((UnaryOp::Mish, x));
        }
        // x · (erf(x/√2)/2 + 1/2)
        if let Some((half_erf, half)) = plus_scalar(e, gate) {
            let p = product(e, half_erf, &[]);
            if half == 0.5
                && p.scale == 0.5
                && let [erf] = p.factors[..]
                && is_erf(e, erf, x)
            {
                return Some((UnaryOp::Gelu { tanh: false }, x));
            }
        }
    }
    if let Some((y, shift)) = six(e, gate)
        && y == x
        && close(shift, 3.0)
        && close(scale, 1.0 / 6.0)
    {
        return Some((UnaryOp::HardSwish, x));
    }
    if scale == 0.5
        && let Some((inner, one)) = plus_scalar(e, gate)
        && one == 1.0
    {
        if is_erf(e, inner, x) {
            return Some((UnaryOp::Gelu { tanh: false }, x));
        }
        if let Some(u) = unary(e, inner, UnaryOp::Tanh)
            && is_gelu_tanh(e, u, x)
        {
            return Some((UnaryOp::Gelu { tanh: true }, x));
        }
    }
    None
}

/// `v = erf(x/√2)`.
fn is_erf(e: &Editor, v: ValueId, x: ValueId) -> bool {
    let Some(u) = unary(e, v, UnaryOp::Erf) else { return false };
    let p = product(e, u, &[x]);
    p.factors == [x] && close(p.scale, std::f64::consts::FRAC_1_SQRT_2)
}

/// `u = √(2/π)·(x + 0.044715·x³)`, or `√(2/π)·x·(1 + 0.044715·x²)`.
fn is_gelu_tanh(e: &Editor, u: ValueId, x: ValueId) -> bool {
    let p = product(e, u, &[x]);
    if !close(p.scale, (2.0 / std::f64::consts::PI).sqrt()) {
        return false;
    }
    let powers = |v: ValueId, n: usize| {
        let p = product(e, v, &[x]);
        let mut count = 0;
        // A square that several read is one factor; it counts as two.
        let all = p.factors.iter().all(|&f| {
            let square = super::product::binary(e, f, BinaryOp::Mul) == Some((x, x));
            count += if f == x { 1 } else { 2 };
            f == x || square
        });
        all && count == n && close(p.scale, 0.044715)
    };
    match p.factors[..] {
        [sum] => match super::product::binary(e, sum, BinaryOp::Add) {
            Some((a, b)) => (a == x && powers(b, 3)) || (b == x && powers(a, 3)),
            None => false,
        },
        [a, b] => [(a, b), (b, a)].into_iter().any(|(f, sum)| {
            f == x && plus_scalar(e, sum).is_some_and(|(square, one)| one == 1.0 && powers(square, 2))
        }),
        _ => false,
    }
}
