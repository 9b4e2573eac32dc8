use super::Editor;
use super::product::{binary, plus_scalar, unary};
use crate::passes::simplify::reduced_axes;
use crate::{BinaryOp, Graph, GraphError, NodeId, Op, Pass, ReduceOp, Tensor, UnaryOp, ValueId};

/// Layer and root-mean-square normalisation from their spellings in arithmetic.
///
/// Recognises `(x − mean)/√(variance + ε)·scale + bias` with divisions or reciprocal roots, with or without scale and
/// bias, and the spelling of batch-normalisation style exporters `x·a + (bias − mean·a)`.
#[derive(Clone, Copy, Debug, Default)]
pub struct NormalizationFusion;

impl Pass for NormalizationFusion {
    fn name(&self) -> &'static str {
        "normalisations"
    }

    fn run(&self, graph: &mut Graph) -> Result<usize, GraphError> {
        let mut e = Editor::new(graph);
        for id in e.ids() {
            let Some(node) = e.get(id) else { continue };
            let Some(out) = node.output(0).filter(|&v| e.is_f32(v)) else { continue };
            let Op::Binary(op) = node.op else { continue };
            if op == BinaryOp::Add && affine_spelling(&mut e, id, out) {
                continue;
            }
            if matches!(op, BinaryOp::Div | BinaryOp::Mul)
                && let Some(norm) = normalised(&e, out)
            {
                emit(&mut e, id, norm);
            }
        }
        e.finish()
    }
}

/// A normalisation that has been found.
struct Norm {
    x: ValueId,
    axis: usize,
    epsilon: f64,
    centred: bool,
}

/// `v = mean(u)` over the last axes, kept: u and the first of the axes.
fn mean(e: &Editor, v: ValueId) -> Option<(ValueId, usize)> {
    let (id, node) = e.producer(v)?;
    let Op::Reduce { op: ReduceOp::Mean, keep_dims: true, .. } = node.op else { return None };
    let u = node.input(0)?;
    let rank = e.dims(u)?.len();
    let axes = reduced_axes(e, id)?;
    let first = *axes.first()?;
    axes.iter().copied().eq(first..rank).then_some((u, first))
}

/// The operand of a square.
fn square(e: &Editor, v: ValueId) -> Option<ValueId> {
    if let Some((a, b)) = binary(e, v, BinaryOp::Mul) {
        return (a == b).then_some(a);
    }
    let (x, p) = binary(e, v, BinaryOp::Pow)?;
    (e.scalar(p) == Some(2.0)).then_some(x)
}

/// The numerator and the sum `mean square + ε` of `v = d/√(…)`, in any spelling.
fn over_root(e: &Editor, v: ValueId) -> Option<(ValueId, ValueId)> {
    if let Some((d, root)) = binary(e, v, BinaryOp::Div) {
        return Some((d, unary(e, root, UnaryOp::Sqrt)?));
    }
    let (a, b) = binary(e, v, BinaryOp::Mul)?;
    [(a, b), (b, a)].into_iter().find_map(|(d, inverse)| Some((d, inverse_root(e, inverse)?)))
}

/// `u` of `v = 1/√u`.
fn inverse_root(e: &Editor, v: ValueId) -> Option<ValueId> {
    if let Some(u) = unary(e, v, UnaryOp::Rsqrt) {
        return Some(u);
    }
    if let Some(root) = unary(e, v, UnaryOp::Reciprocal) {
        return unary(e, root, UnaryOp::Sqrt);
    }
    let (u, p) = binary(e, v, BinaryOp::Pow)?;
    (e.scalar(p) == Some(-0.5)).then_some(u)
}

fn normalised(e: &Editor, out: ValueId) -> Option<Norm> {
    let (d, sum) = over_root(e, out)?;
    let (mean_square, epsilon) = plus_scalar(e, sum)?;
    let (squares, axis) = mean(e, mean_square)?;
    let squared = square(e, squares)?;
    if !same_value(e, squared, d) || epsilon.is_nan() || epsilon < 0.0 {
        return None;
    }
    match centred(e, d) {
        Some((x, mean_axis)) if mean_axis == axis => Some(Norm { x, axis, epsilon, centred: true }),
        _ => Some(Norm { x: d, axis, epsilon, centred: false }),
    }
}

/// `d = x − mean(x)`: x and the first axis.
fn centred(e: &Editor, d: ValueId) -> Option<(ValueId, usize)> {
    let (x, m) = binary(e, d, BinaryOp::Sub)?;
    let (u, axis) = mean(e, m)?;
    (u == x).then_some((x, axis))
}

/// Equal by identity, or both the same centring of the same value.
fn same_value(e: &Editor, a: ValueId, b: ValueId) -> bool {
    a == b || matches!((centred(e, a), centred(e, b)), (Some(a), Some(b)) if a == b)
}

/// The scale (or bias) that is applied to `v` next: the node and the operand.
fn next(e: &Editor, v: ValueId, op: BinaryOp, sizes: &[usize]) -> Option<(NodeId, ValueId)> {
    let id = e.only_reader(v)?;
    let node = e.node(id);
    if node.op != Op::Binary(op) {
        return None;
    }
    let other = if node.input(0) == Some(v) { node.input(1)? } else { node.input(0)? };
    let dims = e.dims(other)?;
    // Leading ones do not count.
    let ones = dims.len().checked_sub(sizes.len())?;
    let fits = dims[..ones].iter().all(|&d| d == 1) && dims[ones..] == *sizes;
    (fits && e.is_f32(other) && e.same_dims(v, node.out())).then_some((id, other))
}

/// The operand without leading ones.
fn without_leading_ones(e: &mut Editor, id: NodeId, v: ValueId, sizes: &[usize]) -> ValueId {
    match e.view_constant(v, sizes) {
        Some(v) => v,
        None => e.insert_reshape(id, "scale", v, sizes),
    }
}

fn emit(e: &mut Editor, id: NodeId, norm: Norm) {
    let out = e.node(id).out();
    let Some(dims) = e.dims(out).filter(|d| e.dims(norm.x).as_ref() == Some(d)) else { return };
    let sizes = &dims[norm.axis..];
    let mut root = id;
    let mut scale = None;
    let mut bias = None;
    if let Some((node, v)) = next(e, out, BinaryOp::Mul, sizes) {
        (root, scale) = (node, Some(v));
        if let Some((node, v)) = next(e, e.node(root).out(), BinaryOp::Add, sizes).filter(|_| norm.centred) {
            (root, bias) = (node, Some(v));
        }
    }
    let scale = match scale {
        Some(v) => without_leading_ones(e, root, v, sizes),
        None => {
            let ones = vec![1f32; sizes.iter().product()];
            e.add_constant("ones", Tensor::from_slice(sizes, &ones))
        }
    };
    let mut inputs = vec![Some(norm.x), Some(scale)];
    if let Some(b) = bias {
        inputs.push(Some(without_leading_ones(e, root, b, sizes)));
    }
    let (axis, epsilon) = (norm.axis as i64, norm.epsilon as f32);
    let op = if norm.centred { Op::LayerNorm { axis, epsilon } } else { Op::RmsNorm { axis, epsilon } };
    e.set(root, op, inputs);
}

/// `x·a + (bias − mean·a)` with `a = scale/√(variance + ε)`.
fn affine_spelling(e: &mut Editor, id: NodeId, out: ValueId) -> bool {
    let Some((p, q)) = binary(e, out, BinaryOp::Add) else { return false };
    for (xa, rest) in [(p, q), (q, p)] {
        let Some(found) = affine_parts(e, xa, rest) else { continue };
        let (x, axis, epsilon, scale, bias) = found;
        let Some(dims) = e.dims(x).filter(|d| e.dims(out).as_ref() == Some(d)) else { continue };
        let sizes = dims[axis..].to_vec();
        let fits = |v: ValueId| {
            e.is_f32(v)
                && e.dims(v).is_some_and(|d| {
                    let ones = d.len().saturating_sub(sizes.len());
                    d.len() >= sizes.len() && d[..ones].iter().all(|&d| d == 1) && d[ones..] == *sizes
                })
        };
        if !fits(scale) || !fits(bias) {
            continue;
        }
        let scale = without_leading_ones(e, id, scale, &sizes);
        let bias = without_leading_ones(e, id, bias, &sizes);
        let op = Op::LayerNorm { axis: axis as i64, epsilon: epsilon as f32 };
        e.set_all(id, op, &[x, scale, bias]);
        return true;
    }
    false
}

fn affine_parts(e: &Editor, xa: ValueId, rest: ValueId) -> Option<(ValueId, usize, f64, ValueId, ValueId)> {
    let (bias, ma) = binary(e, rest, BinaryOp::Sub)?;
    let (p, q) = binary(e, xa, BinaryOp::Mul)?;
    let (r, s) = binary(e, ma, BinaryOp::Mul)?;
    let pairs = [(p, q), (q, p)];
    pairs.into_iter().find_map(|(x, a)| {
        let m = if r == a {
            s
        } else if s == a {
            r
        } else {
            return None;
        };
        let (u, axis) = mean(e, m)?;
        (u == x).then_some(())?;
        let (f, g) = binary(e, a, BinaryOp::Mul)?;
        let (sum, scale) = [(f, g), (g, f)].into_iter().find_map(|(i, s)| Some((inverse_root(e, i)?, s)))?;
        let (variance, epsilon) = plus_scalar(e, sum)?;
        let (squares, variance_axis) = mean(e, variance)?;
        let (c, c_axis) = centred(e, square(e, squares)?)?;
        (c == x && axis == variance_axis && axis == c_axis).then_some((x, axis, epsilon, scale, bias))
    })
}
