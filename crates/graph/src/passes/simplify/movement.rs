use super::Editor;
use crate::passes::editor::axis_index;
use crate::{AspectRatio, CoordinateMode, NodeId, Op, PadMode, TensorType, ValueId};

/// Operators that would move data nowhere.
pub fn no_movement(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let (Some(x), Some(out)) = (node.input(0), node.output(0)) else { return false };
    if !e.same_dims(x, out) {
        return false;
    }
    let dims = e.dims(x).expect("same_dims knows the shape");
    let all = |v: Option<ValueId>, wanted: i64| match v {
        Some(v) => e.ints(v).is_some_and(|x| x.iter().all(|&x| x == wanted)),
        None => false,
    };
    let nothing = match &node.op {
        Op::Reshape { .. } | Op::Flatten { .. } | Op::Squeeze | Op::Unsqueeze | Op::Expand => true,
        Op::Tile => true,
        Op::Transpose { perm } => match perm {
            Some(p) => p.iter().enumerate().all(|(i, &p)| i == p),
            None => dims.len() < 2,
        },
        Op::Pad { mode: PadMode::Constant } => all(node.input(1), 0),
        // As many elements in steps forward are all of them, in order.
        Op::Slice => match node.input(4) {
            None => true,
            Some(steps) => e.ints(steps).is_some_and(|s| s.iter().all(|&s| s > 0)),
        },
        Op::Resize(a) => {
            let scales_are_one = match node.input(2) {
                None => true,
                Some(s) => e.tensor(s).and_then(|t| t.to_f64s()).is_some_and(|s| s.iter().all(|&s| s == 1.0)),
            };
            scales_are_one
                && a.coordinates != CoordinateMode::TfCropAndResize
                && a.aspect_ratio == AspectRatio::Stretch
        }
        _ => false,
    };
    nothing && e.replace_by(id, x)
}

/// `Flatten`, `Squeeze`, `Unsqueeze` and reshapes whose shape has to be worked out, with the shape written out.
pub fn reshape_kinds(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let (Some(x), Some(out)) = (node.input(0), node.output(0)) else { return false };
    let Some(dims) = e.dims(out) else { return false };
    match &node.op {
        Op::Flatten { .. } | Op::Squeeze | Op::Unsqueeze => {}
        Op::Reshape { .. } => {
            let known = node.input(1).and_then(|s| e.ints(s));
            if known
                .is_some_and(|s| s.iter().map(|&d| usize::try_from(d).ok()).eq(dims.iter().map(|&d| Some(d))))
                && (node.op == Op::Reshape { allow_zero: true } || !dims.contains(&0))
            {
                return false;
            }
        }
        _ => return false,
    }
    let shape = e.add_dims("shape", &dims);
    e.set_all(id, Op::Reshape { allow_zero: true }, &[x, shape]);
    true
}

/// Only the last of several reshapes counts.
pub fn reshape_of_reshape(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let (Op::Reshape { .. }, Some(x), Some(shape)) = (&node.op, node.input(0), node.input(1)) else {
        return false;
    };
    // A shape with −1 or 0 may mean something else for another operand.
    if e.ints(shape).is_none_or(|s| s.iter().any(|&d| d <= 0)) {
        return false;
    }
    let Some(inner) = e.maker(x) else { return false };
    let (Op::Reshape { .. }, Some(y)) = (&inner.op, inner.input(0)) else { return false };
    let op = node.op.clone();
    e.set_all(id, op, &[y, shape]);
    true
}

/// Transpositions without movement, and two in a row.
pub fn transpose(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let (Op::Transpose { perm }, Some(x)) = (&node.op, node.input(0)) else { return false };
    let (Some(dims), out) = (e.dims(x), node.out()) else { return false };
    let Some(perm) = perm.clone() else {
        let perm = (0..dims.len()).rev().collect();
        e.set_all(id, Op::Transpose { perm: Some(perm) }, &[x]);
        return true;
    };
    let moving: Vec<usize> = perm.iter().copied().filter(|&p| dims[p] != 1).collect();
    if moving.is_sorted() {
        let Some(out_dims) = e.dims(out) else { return false };
        let shape = e.add_dims("shape", &out_dims);
        e.set_all(id, Op::Reshape { allow_zero: true }, &[x, shape]);
        return true;
    }
    let Some(inner) = e.maker(x) else { return false };
    let (Op::Transpose { perm: Some(first) }, Some(y)) = (&inner.op, inner.input(0)) else { return false };
    let both: Vec<usize> = perm.iter().map(|&p| first[p]).collect();
    e.set_all(id, Op::Transpose { perm: Some(both) }, &[y]);
    true
}

/// `Gather` of one constant index is a slice.
pub fn gather_one(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let (Op::Gather { axis }, Some(x), Some(index)) = (&node.op, node.input(0), node.input(1)) else {
        return false;
    };
    let (Some(mut dims), Some(dtype), Some(out_dims)) = (e.dims(x), e.dtype(x), e.dims(node.out())) else {
        return false;
    };
    let (Some(axis), Some(index)) = (axis_index(*axis, dims.len()), e.ints(index)) else { return false };
    let [index] = index[..] else { return false };
    if e.is_constant(x) {
        return false;
    }
    let Some(at) = axis_index(index, dims[axis]) else { return false };
    let name = node.name.clone();
    let starts = e.add_ints(&format!("{name}.starts"), &[at as i64]);
    let ends = e.add_ints(&format!("{name}.ends"), &[at as i64 + 1]);
    let axes = e.add_ints(&format!("{name}.axes"), &[axis as i64]);
    dims[axis] = 1;
    let ty = TensorType::fixed(dtype, &dims);
    let part = e.insert(id, &format!("{name}.slice"), Op::Slice, &[x, starts, ends, axes], ty);
    let shape = e.add_dims(&format!("{name}.shape"), &out_dims);
    e.set_all(id, Op::Reshape { allow_zero: true }, &[part, shape]);
    true
}

/// A slice along one axis in steps of one: axis, first, one past the last.
fn simple_slice(e: &Editor, id: NodeId) -> Option<(ValueId, usize, usize, usize)> {
    let node = e.node(id);
    let (Op::Slice, Some(x)) = (&node.op, node.input(0)) else { return None };
    let dims = e.dims(x)?;
    let (starts, ends) = (e.ints(node.input(1)?)?, e.ints(node.input(2)?)?);
    let axes = e.optional_ints(node.input(3))?.unwrap_or_else(|| (0..starts.len() as i64).collect());
    let steps = e.optional_ints(node.input(4))?.unwrap_or_else(|| vec![1]);
    let ([start], [end], [axis], [1]) = (&starts[..], &ends[..], &axes[..], &steps[..]) else { return None };
    let axis = axis_index(*axis, dims.len())?;
    let size = dims[axis] as i64;
    let place = |i: i64| (if i < 0 { i.saturating_add(size) } else { i }).clamp(0, size) as usize;
    let (start, end) = (place(*start), place(*end));
    (start < end).then_some((x, axis, start, end))
}

fn insert_slice(e: &mut Editor, id: NodeId, x: ValueId, axis: usize, start: usize, end: usize) -> ValueId {
    let name = e.node(id).name.clone();
    let starts = e.add_ints(&format!("{name}.starts"), &[start as i64]);
    let ends = e.add_ints(&format!("{name}.ends"), &[end as i64]);
    let axes = e.add_ints(&format!("{name}.axes"), &[axis as i64]);
    let mut dims = e.dims(x).expect("a sliced value has a known shape");
    dims[axis] = end - start;
    let ty = TensorType::fixed(e.dtype(x).expect("a sliced value has a known type"), &dims);
    e.insert(id, &format!("{name}.slice"), Op::Slice, &[x, starts, ends, axes], ty)
}

/// Slices of a transposed value, when nobody wants the whole: slice first.
pub fn slice_of_transpose(e: &mut Editor, id: NodeId) -> bool {
    let Some((x, axis, start, end)) = simple_slice(e, id) else { return false };
    let Some(inner) = e.maker(x) else { return false };
    let (Op::Transpose { perm: Some(perm) }, Some(y)) = (&inner.op, inner.input(0)) else { return false };
    if e.is_output(x) || !e.readers(x).iter().all(|&r| matches!(e.node(r).op, Op::Slice)) {
        return false;
    }
    let (perm, y_axis) = (perm.clone(), perm[axis]);
    let part = insert_slice(e, id, y, y_axis, start, end);
    e.set_all(id, Op::Transpose { perm: Some(perm) }, &[part]);
    true
}

/// Slices of a reshaped value along the outermost part of a split axis: slice the whole axis instead, so that the
/// reshape comes last and costs nothing.
pub fn slice_of_reshape(e: &mut Editor, id: NodeId) -> bool {
    let Some((x, axis, start, end)) = simple_slice(e, id) else { return false };
    let out = e.node(id).out();
    let Some(inner) = e.maker(x) else { return false };
    let (Op::Reshape { .. }, Some(y)) = (&inner.op, inner.input(0)) else { return false };
    let (Some(from), Some(to), Some(out_dims)) = (e.dims(y), e.dims(x), e.dims(out)) else { return false };
    let Some(groups) = reshape_groups(&from, &to) else { return false };
    let Some(group) = groups.iter().find(|g| g.to.first() == Some(&axis)) else { return false };
    let [from_axis] = group.from[..] else { return false };
    let inner_size: usize = group.to[1..].iter().map(|&a| to[a]).product();
    let part = insert_slice(e, id, y, from_axis, start * inner_size, end * inner_size);
    let shape = e.add_dims("shape", &out_dims);
    e.set_all(id, Op::Reshape { allow_zero: true }, &[part, shape]);
    true
}

/// An `Expand` before an operator that broadcasts by itself.
pub fn expanded_operand(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let (Op::Binary(_), Some(a), Some(b)) = (&node.op, node.input(0), node.input(1)) else { return false };
    let Some(out) = e.dims(node.out()) else { return false };
    for (expanded, other) in [(a, b), (b, a)] {
        let Some(inner) = e.maker(expanded).filter(|n| n.op == Op::Expand) else { continue };
        let Some(x) = inner.input(0) else { continue };
        let (Some(x_dims), Some(other_dims)) = (e.dims(x), e.dims(other)) else { continue };
        // The other operand must span the result, or the expansion was what made it that large.
        if x_dims.len() <= out.len() && other_dims == out {
            e.replace_input(id, expanded, x);
            return true;
        }
    }
    false
}

/// Axes that a reshape turns into each other; axes of size 1 belong to no group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ReshapeGroup {
    /// Axes of the operand.
    pub from: Vec<usize>,
    /// Axes of the result.
    pub to: Vec<usize>,
}

/// The smallest groups of axes with equal products; `None` when there are no elements.
pub(crate) fn reshape_groups(from: &[usize], to: &[usize]) -> Option<Vec<ReshapeGroup>> {
    if from.contains(&0) || to.contains(&0) {
        return None;
    }
    let solid = |dims: &[usize]| -> Vec<(usize, usize)> {
        dims.iter().copied().enumerate().filter(|&(_, d)| d != 1).collect()
    };
    let (a, b) = (solid(from), solid(to));
    let (mut a, mut b) = (a.into_iter().peekable(), b.into_iter().peekable());
    let mut groups = Vec::new();
    while a.peek().is_some() || b.peek().is_some() {
        let mut group = ReshapeGroup { from: Vec::new(), to: Vec::new() };
        let (mut m, mut n) = (1usize, 1usize);
        loop {
            let (axes, product, side) =
                if m <= n { (&mut a, &mut m, &mut group.from) } else { (&mut b, &mut n, &mut group.to) };
            let (axis, size) = axes.next()?;
            side.push(axis);
            *product = product.checked_mul(size)?;
            if m == n {
                break;
            }
        }
        groups.push(group);
    }
    Some(groups)
}
