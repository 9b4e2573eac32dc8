//! Shapes, and data that moves without being changed.

use super::broadcast::{broadcast, shown};
use super::operands::*;
use crate::{AspectRatio, CoordinateMode, DType, Dim, PadMode, ResizeAttributes, Shape, Tensor, ValueType};

/// A size from shape arithmetic as a dimension.
fn dim_of(size: &SymbolicInt, what: &str) -> Rule<Dim> {
    Ok(match size {
        SymbolicInt::Value(n) => Dim::Fixed(size_of(*n, what)?),
        SymbolicInt::Symbol(s) => Dim::Symbol(s.clone()),
        SymbolicInt::Unknown => Dim::UNKNOWN,
    })
}

fn dims_of(sizes: &[SymbolicInt], what: &str) -> Rule<Shape> {
    sizes.iter().map(|s| dim_of(s, what)).collect()
}

/// What is left of `whole` when the factors in `parts` are taken out; symbols cancel against themselves.
fn quotient(whole: &[Dim], parts: &[Dim]) -> Rule<Dim> {
    // Empty dimensions cancel as well, so that an empty batch can be flattened.
    let empty = |s: &[Dim]| s.iter().filter(|d| **d == Dim::Fixed(0)).count();
    if empty(parts) > 0 && empty(whole) >= empty(parts) {
        let rest = |s: &[Dim]| -> Shape { s.iter().filter(|d| **d != Dim::Fixed(0)).cloned().collect() };
        let left = vec![Dim::Fixed(0); empty(whole) - empty(parts)];
        return quotient(&[rest(whole), left].concat(), &rest(parts));
    }
    let mut symbols: Vec<&Dim> = whole.iter().filter(|d| d.fixed().is_none()).collect();
    let mut divisor = 1usize;
    for p in parts {
        match p {
            Dim::Fixed(n) => divisor = divisor.checked_mul(*n).ok_or("the requested shape is too large")?,
            Dim::Symbol(_) => match symbols.iter().position(|s| *s == p) {
                Some(at) => {
                    symbols.remove(at);
                }
                None => return Ok(Dim::UNKNOWN),
            },
            Dim::Unknown(()) => return Ok(Dim::UNKNOWN),
        }
    }
    let product = whole.iter().filter_map(Dim::fixed).try_fold(1usize, usize::checked_mul);
    let product = product.ok_or("x is too large")?;
    match symbols.as_slice() {
        [] if divisor == 0 => Err("-1 cannot be inferred next to a size of 0".to_owned()),
        [] if product % divisor != 0 => {
            Err(format!("{product} elements do not divide into slices of {divisor}"))
        }
        [] => Ok(Dim::Fixed(product / divisor)),
        // An unknown size times other sizes has no name, unless the other sizes cancel.
        [Dim::Symbol(s)] if product == divisor && divisor != 0 => Ok(Dim::Symbol(s.clone())),
        _ => Ok(Dim::UNKNOWN),
    }
}

pub(super) fn reshape(o: &Operands<'_>, allow_zero: bool) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    o.tensor(1, "shape")?.require(Class::Integer)?;
    let Some(wanted) = o.symbolic(1, "shape")? else {
        return Ok(vec![typed(x.dtype, o.length(1).filter(|&n| n <= RANK_MAX).map(open))]);
    };
    let mut shape = Vec::new();
    let mut inferred = None;
    for (i, size) in wanted.iter().enumerate() {
        shape.push(match size {
            SymbolicInt::Value(-1) => {
                if inferred.replace(i).is_some() {
                    return Err("the shape has two sizes of -1, expected at most one".to_owned());
                }
                Dim::UNKNOWN
            }
            SymbolicInt::Value(0) if !allow_zero => {
                if x.rank().is_some_and(|r| i >= r) {
                    return Err(format!(
                        "size {i} of the shape is 0 (copied from x), but x has shape {}",
                        shown(x.shape.as_deref().unwrap_or_default())
                    ));
                }
                x.dim(i)
            }
            // The number of a symbol is at least 0; should it be 0, it stands for an empty dimension all the same.
            other => dim_of(other, "a size of the shape")?,
        });
    }
    if let Some(whole) = &x.shape {
        match inferred {
            Some(at) => {
                let parts: Vec<Dim> =
                    shape.iter().enumerate().filter(|(i, _)| *i != at).map(|(_, d)| d.clone()).collect();
                shape[at] = quotient(whole, &parts)
                    .map_err(|e| format!("x {} to {}: {e}", shown(whole), requested(&wanted)))?;
            }
            None => {
                let count = |s: &[Dim]| s.iter().try_fold(1usize, |n, d| n.checked_mul(d.fixed()?));
                if let (Some(a), Some(b)) = (count(whole), count(&shape))
                    && a != b
                {
                    return Err(format!(
                        "x {} has {a} elements, but the shape {} has {b}",
                        shown(whole),
                        requested(&wanted)
                    ));
                }
                // One open size follows from all the others.
                let open_at: Vec<usize> = (0..shape.len()).filter(|&i| shape[i] == Dim::UNKNOWN).collect();
                if let [at] = open_at[..] {
                    let mut parts = shape.clone();
                    parts.remove(at);
                    if !parts.contains(&Dim::Fixed(0)) {
                        shape[at] = quotient(whole, &parts)
                            .map_err(|e| format!("x {} to {}: {e}", shown(whole), requested(&wanted)))?;
                    }
                }
            }
        }
    }
    Ok(vec![typed(x.dtype, Some(shape))])
}

fn requested(sizes: &[SymbolicInt]) -> String {
    let sizes: Vec<String> = sizes
        .iter()
        .map(|s| match s {
            SymbolicInt::Value(n) => n.to_string(),
            SymbolicInt::Symbol(s) => s.to_string(),
            SymbolicInt::Unknown => "?".to_owned(),
        })
        .collect();
    format!("[{}]", sizes.join(","))
}

/// The product of sizes, as far as it has a name.
fn product(dims: &[Dim]) -> Rule<Dim> {
    let mut out = Dim::Fixed(1);
    for d in dims {
        out = match (&out, d) {
            (_, Dim::Fixed(n)) => times(&out, *n)?,
            (Dim::Fixed(1), other) => other.clone(),
            (Dim::Fixed(0), _) => Dim::Fixed(0),
            _ => Dim::UNKNOWN,
        };
    }
    Ok(out)
}

pub(super) fn flatten(o: &Operands<'_>, axis: i64) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    let shape = match &x.shape {
        None => open(2),
        Some(s) => {
            let rank = s.len() as i64;
            if axis < -rank || axis > rank {
                return Err(format!("axis is {axis}, expected {} to {rank}", -rank));
            }
            let axis = if axis < 0 { axis + rank } else { axis } as usize;
            vec![product(&s[..axis])?, product(&s[axis..])?]
        }
    };
    Ok(vec![typed(x.dtype, Some(shape))])
}

pub(super) fn squeeze(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    let axes = o.ints(1, "axes")?;
    let Some(shape) = x.shape else { return Ok(vec![typed(x.dtype, None)]) };
    let out = match axes {
        Some(axes) => {
            let axes = axes_of(&axes, shape.len())?;
            if let Some(&bad) = axes.iter().find(|&&a| shape[a].fixed().is_some_and(|n| n != 1)) {
                return Err(format!("axis {bad} of x {} does not have size 1", shown(&shape)));
            }
            Some((0..shape.len()).filter(|i| !axes.contains(i)).map(|i| shape[i].clone()).collect())
        }
        None if o.has(1) => match o.length(1) {
            Some(n) if n > shape.len() => return Err(format!("{n} axes, but x has shape {}", shown(&shape))),
            n => n.map(|n| open(shape.len() - n)),
        },
        None if shape.iter().all(|d| d.fixed().is_some()) => {
            Some(shape.into_iter().filter(|d| *d != Dim::Fixed(1)).collect())
        }
        None => None,
    };
    Ok(vec![typed(x.dtype, out)])
}

pub(super) fn unsqueeze(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    o.tensor(1, "axes")?.require(Class::Integer)?;
    let axes = o.ints(1, "axes")?;
    let out = match (&x.shape, axes) {
        (Some(s), Some(axes)) => {
            let rank = s.len() + axes.len();
            let added = axes_of(&axes, rank)?;
            let mut rest = s.iter();
            let dim = |i| if added.contains(&i) { None } else { rest.next().cloned() };
            Some((0..rank).map(dim).map(|d| d.unwrap_or(Dim::Fixed(1))).collect())
        }
        (Some(s), None) => {
            o.length(1).and_then(|n| s.len().checked_add(n)).filter(|&r| r <= RANK_MAX).map(open)
        }
        _ => None,
    };
    Ok(vec![typed(x.dtype, out)])
}

pub(super) fn transpose(o: &Operands<'_>, perm: Option<&[usize]>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    if let Some(perm) = perm {
        let mut seen = vec![false; perm.len()];
        let valid = perm.iter().all(|&p| p < perm.len() && !std::mem::replace(&mut seen[p], true));
        if !valid {
            return Err(format!("perm {perm:?} is not a permutation"));
        }
        x.require_rank(perm.len())?;
    }
    let shape = match (x.shape, perm) {
        (Some(s), Some(perm)) => Some(perm.iter().map(|&p| s[p].clone()).collect()),
        (Some(s), None) => Some(s.into_iter().rev().collect()),
        (None, perm) => perm.map(|p| open(p.len())),
    };
    Ok(vec![typed(x.dtype, shape)])
}

pub(super) fn expand(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    o.tensor(1, "shape")?.require(Class::Integer)?;
    let wanted = match o.symbolic(1, "shape")? {
        Some(sizes) => Some(dims_of(&sizes, "a size of the shape")?),
        None => o.length(1).filter(|&n| n <= RANK_MAX).map(open),
    };
    let shape = match (&x.shape, wanted) {
        (Some(s), Some(t)) => Some(broadcast(s, &t).map_err(|e| e.to_string())?),
        _ => None,
    };
    Ok(vec![typed(x.dtype, shape)])
}

pub(super) fn tile(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    o.tensor(1, "repeats")?.require(Class::Integer)?;
    let repeats = o.symbolic(1, "repeats")?;
    let rank = x.rank().or(repeats.as_ref().map(Vec::len)).or(o.length(1).filter(|&n| n <= RANK_MAX));
    let Some(rank) = rank else { return Ok(vec![typed(x.dtype, None)]) };
    let Some(repeats) = repeats else { return Ok(vec![typed(x.dtype, Some(open(rank)))]) };
    if repeats.len() != rank {
        return Err(format!("{} repeats for {rank} dimensions", repeats.len()));
    }
    let shape = (0..rank)
        .map(|i| match dim_of(&repeats[i], "a repeat")? {
            Dim::Fixed(n) => times(&x.dim(i), n),
            other if x.dim(i) == Dim::Fixed(1) => Ok(other),
            _ => Ok(Dim::UNKNOWN),
        })
        .collect::<Rule<Shape>>()?;
    Ok(vec![typed(x.dtype, Some(shape))])
}

/// Joins shapes along an axis.
fn concat_shapes(shapes: &[Option<Shape>], axis: i64) -> Rule<Option<Shape>> {
    let Some(known) = shapes.iter().flatten().next() else { return Ok(None) };
    let rank = known.len();
    let axis = axis_of(axis, rank, "axis")?;
    let mut out = known.clone();
    out[axis] = Dim::Fixed(0);
    for shape in shapes {
        let Some(s) = shape else {
            out[axis] = Dim::UNKNOWN;
            continue;
        };
        if s.len() != rank {
            return Err(format!("operands have shapes {} and {}, expected one rank", shown(known), shown(s)));
        }
        for (i, d) in s.iter().enumerate() {
            out[i] = match i == axis {
                true => plus(&out[i], d)?,
                false => unify(&out[i], d).ok_or_else(|| {
                    format!(
                        "operands have shapes {} and {}, which differ beside axis {axis}",
                        shown(known),
                        shown(s)
                    )
                })?,
            };
        }
    }
    Ok(Some(out))
}

pub(super) fn concat(o: &Operands<'_>, axis: i64) -> Rule<Vec<ValueType>> {
    let operands = (0..o.facts.len()).map(|i| o.tensor(i, "operand")).collect::<Rule<Vec<_>>>()?;
    if operands.is_empty() {
        return Err("has no operands, expected at least 1".to_owned());
    }
    let dtype = same_dtype(&operands.iter().collect::<Vec<_>>())?;
    let shapes: Vec<Option<Shape>> = operands.into_iter().map(|k| k.shape).collect();
    Ok(vec![typed(dtype, concat_shapes(&shapes, axis)?)])
}

pub(super) fn split(o: &Operands<'_>, axis: i64) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    let parts = o.node.outputs.len();
    let sizes = o.ints(1, "sizes")?;
    let Some(shape) = &x.shape else { return Ok(vec![typed(x.dtype, None); parts]) };
    let axis = axis_of(axis, shape.len(), "axis")?;
    let whole = &shape[axis];
    let sizes: Vec<Dim> = match sizes {
        Some(sizes) => {
            if sizes.len() != parts {
                return Err(format!("{} sizes for {parts} results", sizes.len()));
            }
            let sizes: Vec<usize> = sizes.iter().map(|&n| size_of(n, "a part")).collect::<Rule<_>>()?;
            let sum = sizes.iter().try_fold(0usize, |n, &s| n.checked_add(s));
            if let Dim::Fixed(n) = whole
                && sum != Some(*n)
            {
                return Err(format!("the parts {sizes:?} do not add up to {n}, the size of axis {axis}"));
            }
            sizes.into_iter().map(Dim::Fixed).collect()
        }
        None if o.has(1) => open(parts),
        None => match whole {
            _ if parts == 1 => vec![whole.clone()],
            Dim::Fixed(n) => {
                let part = n.div_ceil(parts.max(1));
                (0..parts).map(|i| Dim::Fixed(n.saturating_sub(i.saturating_mul(part)).min(part))).collect()
            }
            _ => open(parts),
        },
    };
    let with = |d: Dim| {
        let mut s = shape.clone();
        s[axis] = d;
        typed(x.dtype, Some(s))
    };
    Ok(sizes.into_iter().map(with).collect())
}

/// Number of elements that `start..end` by `step` takes out of `size`.
fn slice_length(size: usize, start: i64, end: i64, step: i64) -> Rule<usize> {
    let n = i64::try_from(size).map_err(|_| format!("size {size} is too large"))?;
    let wrap = |i: i64| if i < 0 { i.saturating_add(n) } else { i };
    let length = if step > 0 {
        let (s, e) = (wrap(start).clamp(0, n), wrap(end).clamp(0, n));
        (e - s).max(0) as u64
    } else {
        let (s, e) = (wrap(start).clamp(-1, n - 1), wrap(end).clamp(-1, n - 1));
        (s - e).max(0) as u64
    };
    Ok(length.div_ceil(step.unsigned_abs()) as usize)
}

pub(super) fn slice(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    o.tensor(1, "starts")?.require(Class::Integer)?;
    o.tensor(2, "ends")?.require(Class::Integer)?;
    let (starts, ends) = (o.symbolic(1, "starts")?, o.symbolic(2, "ends")?);
    let (axes, steps) = (o.ints(3, "axes")?, o.ints(4, "steps")?);
    let Some(shape) = &x.shape else { return Ok(vec![typed(x.dtype, None)]) };
    let lengths: Vec<usize> = (1..5).filter_map(|i| o.length(i)).collect();
    if lengths.windows(2).any(|w| w[0] != w[1]) {
        return Err(format!("starts, ends, axes and steps have {lengths:?} elements, expected the same"));
    }
    let Some(&count) = lengths.first() else { return Ok(vec![typed(x.dtype, Some(open(shape.len())))]) };
    let axes = match axes {
        Some(axes) => axes_of(&axes, shape.len())?,
        None if o.has(3) => return Ok(vec![typed(x.dtype, Some(open(shape.len())))]),
        None if count > shape.len() => {
            return Err(format!("{count} starts, but x has shape {}", shown(shape)));
        }
        None => (0..count).collect(),
    };
    let mut out = shape.clone();
    for (i, &axis) in axes.iter().enumerate() {
        let element = |list: &Option<Vec<SymbolicInt>>| {
            list.as_ref().and_then(|l| l.get(i)).cloned().unwrap_or(SymbolicInt::Unknown)
        };
        let (start, end) = (element(&starts), element(&ends));
        let step = match (&steps, o.has(4)) {
            (Some(s), _) => s.get(i).copied(),
            (None, false) => Some(1),
            (None, true) => None,
        };
        if step == Some(0) {
            return Err("a step is 0".to_owned());
        }
        out[axis] = match (&shape[axis], start, end, step) {
            (Dim::Fixed(n), SymbolicInt::Value(s), SymbolicInt::Value(e), Some(step)) => {
                Dim::Fixed(slice_length(*n, s, e, step)?)
            }
            // The whole axis, forwards or backwards.
            (d, SymbolicInt::Value(0), SymbolicInt::Value(e), Some(1)) if e >= i64::from(i32::MAX) => {
                d.clone()
            }
            (d, SymbolicInt::Value(0), SymbolicInt::Symbol(e), Some(1)) if *d == Dim::Symbol(e.clone()) => {
                d.clone()
            }
            (d, SymbolicInt::Value(-1), SymbolicInt::Value(e), Some(-1)) if e <= -i64::from(i32::MAX) => {
                d.clone()
            }
            _ => Dim::UNKNOWN,
        };
    }
    Ok(vec![typed(x.dtype, Some(out))])
}

pub(super) fn pad(o: &Operands<'_>, mode: PadMode) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    o.tensor(1, "pads")?.require(Class::Integer)?;
    if let Some(value) = o.optional(2, "value")? {
        value.require_single()?;
        same_dtype(&[&x, &value])?;
    }
    let (pads, axes) = (o.ints(1, "pads")?, o.ints(3, "axes")?);
    let Some(shape) = &x.shape else { return Ok(vec![typed(x.dtype, None)]) };
    let axes = match axes {
        Some(axes) => axes_of(&axes, shape.len())?,
        None if o.has(3) => return Ok(vec![typed(x.dtype, Some(open(shape.len())))]),
        None => (0..shape.len()).collect(),
    };
    let Some(pads) = pads else {
        let mut out = shape.clone();
        axes.iter().for_each(|&a| out[a] = Dim::UNKNOWN);
        return Ok(vec![typed(x.dtype, Some(out))]);
    };
    if pads.len() != 2 * axes.len() {
        return Err(format!("{} pads for {} axes, expected {}", pads.len(), axes.len(), 2 * axes.len()));
    }
    let mut out = shape.clone();
    for (i, &axis) in axes.iter().enumerate() {
        let (begin, end) = (pads[i], pads[i + axes.len()]);
        let by = begin.checked_add(end).ok_or("the pads are too large")?;
        out[axis] = match &shape[axis] {
            Dim::Fixed(0) if mode != PadMode::Constant && (begin > 0 || end > 0) => {
                return Err(format!("axis {axis} has no elements to pad with"));
            }
            Dim::Fixed(n) => {
                let size =
                    i64::try_from(*n).ok().and_then(|n| n.checked_add(by)).ok_or("the pads are too large")?;
                Dim::Fixed(size_of(size, &format!("the padded size of axis {axis}"))?)
            }
            d if begin == 0 && end == 0 => d.clone(),
            _ => Dim::UNKNOWN,
        };
    }
    Ok(vec![typed(x.dtype, Some(out))])
}

/// Refuses constant indices that do not point into the axis.
fn require_indices(o: &Operands<'_>, i: usize, size: &Dim) -> Rule<()> {
    let (Some(t), Some(n)) = (o.value(i), size.fixed()) else { return Ok(()) };
    let n = i64::try_from(n).unwrap_or(i64::MAX);
    if let Some(bad) = t.to_i64s().unwrap_or_default().into_iter().find(|&x| x >= n || x < -n) {
        return Err(format!("index {bad} is outside an axis of size {n}"));
    }
    Ok(())
}

pub(super) fn gather(o: &Operands<'_>, axis: i64) -> Rule<Vec<ValueType>> {
    let (x, indices) = (o.tensor(0, "x")?, o.tensor(1, "indices")?);
    indices.require(Class::Integer)?;
    x.require_ranks(1, usize::MAX)?;
    let shape = match (&x.shape, &indices.shape) {
        (Some(s), Some(t)) => {
            let axis = axis_of(axis, s.len(), "axis")?;
            require_indices(o, 1, &s[axis])?;
            Some([&s[..axis], t, &s[axis + 1..]].concat())
        }
        _ => None,
    };
    Ok(vec![typed(x.dtype, shape)])
}

pub(super) fn gather_elements(o: &Operands<'_>, axis: i64) -> Rule<Vec<ValueType>> {
    let (x, indices) = (o.tensor(0, "x")?, o.tensor(1, "indices")?);
    indices.require(Class::Integer)?;
    if let (Some(s), Some(t)) = (&x.shape, &indices.shape) {
        let axis = axis_of(axis, s.len(), "axis")?;
        indices.require_rank(s.len())?;
        for i in (0..s.len()).filter(|&i| i != axis) {
            if let (Dim::Fixed(n), Dim::Fixed(m)) = (&s[i], &t[i])
                && m > n
            {
                return Err(format!("indices {} reach beyond x {} on axis {i}", shown(t), shown(s)));
            }
        }
        require_indices(o, 1, &s[axis])?;
    }
    let shape = indices.shape.or(x.rank().map(open));
    Ok(vec![typed(x.dtype, shape)])
}

/// The length of the index vectors of GatherNd and ScatterNd.
fn index_depth(indices: &Known, x: &Known, batch: usize) -> Rule<Option<usize>> {
    indices.require(Class::Integer)?;
    indices.require_ranks(batch + 1, usize::MAX)?;
    let depth = indices.shape.as_ref().and_then(|s| s.last()).and_then(Dim::fixed);
    if let (Some(k), Some(r)) = (depth, x.rank())
        && (k == 0 || batch.checked_add(k).is_none_or(|n| n > r))
    {
        return Err(format!(
            "indices are vectors of {k}, but x has shape {} and {batch} batch dimensions",
            shown(x.shape.as_deref().unwrap_or_default())
        ));
    }
    Ok(depth)
}

pub(super) fn gather_nd(o: &Operands<'_>, batch: usize) -> Rule<Vec<ValueType>> {
    let (x, indices) = (o.tensor(0, "x")?, o.tensor(1, "indices")?);
    if batch > RANK_MAX {
        return Err(format!("batch_dims is {batch}"));
    }
    x.require_ranks(batch + 1, usize::MAX)?;
    let depth = index_depth(&indices, &x, batch)?;
    let shape = match (&x.shape, &indices.shape, depth) {
        (Some(s), Some(t), Some(k)) => {
            if let Some(i) = (0..batch).find(|&i| unify(&s[i], &t[i]).is_none()) {
                return Err(format!("batch size {i} of x is {}, but of indices {}", s[i], t[i]));
            }
            Some([&t[..t.len() - 1], &s[batch + k..]].concat())
        }
        _ => None,
    };
    Ok(vec![typed(x.dtype, shape)])
}

pub(super) fn scatter_elements(o: &Operands<'_>, axis: i64) -> Rule<Vec<ValueType>> {
    let (x, indices, updates) = (o.tensor(0, "x")?, o.tensor(1, "indices")?, o.tensor(2, "updates")?);
    indices.require(Class::Integer)?;
    let dtype = same_dtype(&[&x, &updates])?;
    if let Some(t) = &indices.shape {
        updates.require_shape(t)?;
    }
    if let Some(s) = &x.shape {
        let axis = axis_of(axis, s.len(), "axis")?;
        indices.require_rank(s.len())?;
        require_indices(o, 1, &s[axis])?;
    }
    Ok(vec![typed(dtype, x.shape)])
}

pub(super) fn scatter_nd(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let (x, indices, updates) = (o.tensor(0, "x")?, o.tensor(1, "indices")?, o.tensor(2, "updates")?);
    let dtype = same_dtype(&[&x, &updates])?;
    x.require_ranks(1, usize::MAX)?;
    let depth = index_depth(&indices, &x, 0)?;
    if let (Some(s), Some(t), Some(k)) = (&x.shape, &indices.shape, depth) {
        updates.require_shape(&[&t[..t.len() - 1], &s[k..]].concat())?;
    }
    Ok(vec![typed(dtype, x.shape)])
}

pub(super) fn tensor_scatter(o: &Operands<'_>, axis: i64) -> Rule<Vec<ValueType>> {
    let (past, update) = (o.tensor(0, "past_cache")?, o.tensor(1, "update")?);
    let dtype = same_dtype(&[&past, &update])?;
    if let Some(s) = &past.shape {
        let axis = axis_of(axis, s.len(), "axis")?;
        if axis == 0 {
            return Err("axis is 0, which is the batch".to_owned());
        }
        let mut expected = s.clone();
        expected[axis] = Dim::UNKNOWN;
        update.require_shape(&expected)?;
        if let (Dim::Fixed(n), Dim::Fixed(m)) = (&s[axis], update.dim(axis))
            && m > *n
        {
            return Err(format!("an update of {m} does not fit into a cache of {n}"));
        }
        if let Some(indices) = o.optional(2, "write_indices")? {
            indices.require(Class::Integer)?;
            indices.require_shape(&s[..1])?;
        }
    }
    Ok(vec![typed(dtype, past.shape)])
}

pub(super) fn depth_to_space(o: &Operands<'_>, block: usize) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require_rank(4)?;
    let square = block.checked_mul(block).filter(|&n| n > 0).ok_or("the block size is out of range")?;
    let channels = divided(&x.dim(1), square, "the number of channels")?;
    let shape = vec![x.dim(0), channels, times(&x.dim(2), block)?, times(&x.dim(3), block)?];
    Ok(vec![typed(x.dtype, Some(shape))])
}

pub(super) fn space_to_depth(o: &Operands<'_>, block: usize) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require_rank(4)?;
    let square = block.checked_mul(block).filter(|&n| n > 0).ok_or("the block size is out of range")?;
    let (h, w) = (divided(&x.dim(2), block, "the height")?, divided(&x.dim(3), block, "the width")?);
    Ok(vec![typed(x.dtype, Some(vec![x.dim(0), times(&x.dim(1), square)?, h, w]))])
}

/// The size that a scale yields, computed in f32 as ONNX does.
fn scaled(size: usize, scale: f32, what: &str) -> Rule<usize> {
    if !(scale > 0.0 && scale.is_finite()) {
        return Err(format!("{what} is {scale}, expected above 0"));
    }
    let out = (size as f32 * scale).floor();
    if out >= 9.0e18 {
        return Err(format!("size {size} scaled by {scale} is too large"));
    }
    Ok(out as usize)
}

pub(super) fn resize(o: &Operands<'_>, a: &ResizeAttributes) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    let floats = |i: usize, role| -> Rule<Option<Vec<f64>>> {
        if let Some(k) = o.optional(i, role)? {
            k.require(Class::Float)?;
            k.require_ranks(1, 1)?;
        }
        Ok(o.value(i).and_then(Tensor::to_f64s))
    };
    let (roi, scales) = (floats(1, "roi")?, floats(2, "scales")?);
    let sizes = o.symbolic(3, "sizes")?;
    let given = |i: usize| o.has(i) && o.length(i) != Some(0);
    if given(2) == given(3) && !(given(2) && (scales.is_none() || sizes.is_none())) {
        return Err("expected either scales or sizes".to_owned());
    }
    let Some(shape) = &x.shape else {
        let rank = [2, 3].iter().find_map(|&i| o.length(i).filter(|&n| n > 0 && n <= RANK_MAX));
        return Ok(vec![typed(x.dtype, rank.filter(|_| a.axes.is_none()).map(open))]);
    };
    let axes = match &a.axes {
        Some(axes) => axes_of(axes, shape.len())?,
        None => (0..shape.len()).collect(),
    };
    let require_length = |n: usize, what: &str| match n == axes.len() {
        true => Ok(()),
        false => Err(format!("{n} {what} for {} axes", axes.len())),
    };
    let mut out = shape.clone();
    if given(3) {
        let Some(sizes) = sizes else {
            axes.iter().for_each(|&x| out[x] = Dim::UNKNOWN);
            return Ok(vec![typed(x.dtype, Some(out))]);
        };
        require_length(sizes.len(), "sizes")?;
        let wanted = dims_of(&sizes, "a size")?;
        // With an aspect-ratio policy all axes get the scale of the tightest (or loosest) one.
        let ratio = if a.aspect_ratio == AspectRatio::Stretch {
            None
        } else {
            let ratios: Option<Vec<f64>> = axes
                .iter()
                .zip(&wanted)
                .map(|(&axis, w)| Some(w.fixed()? as f64 / shape[axis].fixed().filter(|&n| n > 0)? as f64))
                .collect();
            let fold = if a.aspect_ratio == AspectRatio::NotLarger { f64::min } else { f64::max };
            Some(ratios.and_then(|r| r.into_iter().reduce(fold)))
        };
        for (&axis, w) in axes.iter().zip(wanted) {
            out[axis] = match (ratio, shape[axis].fixed()) {
                (None, _) => w,
                (Some(Some(ratio)), Some(n)) => Dim::Fixed((n as f64 * ratio + 0.5).floor() as usize),
                _ => Dim::UNKNOWN,
            };
        }
        return Ok(vec![typed(x.dtype, Some(out))]);
    }
    let Some(scales) = scales else {
        axes.iter().for_each(|&x| out[x] = Dim::UNKNOWN);
        return Ok(vec![typed(x.dtype, Some(out))]);
    };
    require_length(scales.len(), "scales")?;
    let crop = a.coordinates == CoordinateMode::TfCropAndResize;
    if crop && let Some(roi) = &roi {
        match roi.len() == 2 * axes.len() {
            true => {}
            false => return Err(format!("a roi of {} numbers for {} axes", roi.len(), axes.len())),
        }
    }
    for (i, &axis) in axes.iter().enumerate() {
        let mut scale = scales[i] as f32;
        if scale.is_nan() || scale <= 0.0 {
            return Err(format!("a scale is {scale}, expected above 0"));
        }
        let crop_factor = match (&roi, crop) {
            (Some(roi), true) => Some((roi[i + axes.len()] - roi[i]) as f32),
            (None, true) => None,
            _ => Some(1.0),
        };
        out[axis] = match (&shape[axis], crop_factor) {
            (Dim::Fixed(n), Some(crop)) => {
                scale *= crop;
                Dim::Fixed(scaled(*n, scale, "a scale")?)
            }
            (d, Some(1.0)) if scale == 1.0 => d.clone(),
            _ => Dim::UNKNOWN,
        };
    }
    Ok(vec![typed(x.dtype, Some(out))])
}

pub(super) fn grid_sample(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let (x, grid) = (o.tensor(0, "x")?, o.tensor(1, "grid")?);
    grid.require(Class::Float)?;
    x.require_ranks(3, usize::MAX)?;
    let shape = match (&x.shape, &grid.shape) {
        (Some(s), Some(t)) => {
            grid.require_rank(s.len())?;
            let spatial = s.len() - 2;
            if unify(&t[t.len() - 1], &Dim::Fixed(spatial)).is_none() {
                return Err(format!("grid has shape {}, expected vectors of {spatial}", shown(t)));
            }
            let batch =
                unify(&s[0], &t[0]).ok_or_else(|| format!("x has batch {} and grid {}", s[0], t[0]))?;
            let mut out = vec![batch, s[1].clone()];
            out.extend_from_slice(&t[1..t.len() - 1]);
            Some(out)
        }
        (s, t) => s.as_ref().or(t.as_ref()).map(|s| open(s.len())),
    };
    Ok(vec![typed(x.dtype, shape)])
}

pub(super) fn affine_grid(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let theta = o.tensor(0, "theta")?;
    theta.require(Class::Float)?;
    theta.require_rank(3)?;
    let size = o.symbolic(1, "size")?;
    let length =
        size.as_ref().map(Vec::len).or(o.length(1)).or(theta.dim(1).fixed().and_then(|n| n.checked_add(2)));
    let Some(length) = length else { return Ok(vec![typed(theta.dtype, None)]) };
    if length != 4 && length != 5 {
        return Err(format!("size has {length} elements, expected 4 or 5"));
    }
    let spatial = length - 2;
    theta.require_shape(&[Dim::UNKNOWN, Dim::Fixed(spatial), Dim::Fixed(spatial + 1)])?;
    let size = match size {
        Some(s) => dims_of(&s, "a size")?,
        None => open(length),
    };
    let batch = unify(&size[0], &theta.dim(0))
        .ok_or_else(|| format!("theta has batch {}, but size says {}", theta.dim(0), size[0]))?;
    let mut shape = vec![batch];
    shape.extend_from_slice(&size[2..]);
    shape.push(Dim::Fixed(spatial));
    Ok(vec![typed(theta.dtype, Some(shape))])
}

pub(super) fn center_crop_pad(o: &Operands<'_>, axes: Option<&[i64]>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    o.tensor(1, "shape")?.require(Class::Integer)?;
    let sizes = o.symbolic(1, "shape")?;
    let rank = x.rank().or(if axes.is_none() { sizes.as_ref().map(Vec::len) } else { None });
    let Some(rank) = rank else { return Ok(vec![typed(x.dtype, None)]) };
    let axes = match axes {
        Some(axes) => axes_of(axes, rank)?,
        None => (0..rank).collect(),
    };
    let sizes = match sizes {
        Some(s) => dims_of(&s, "a size of the shape")?,
        None => open(axes.len()),
    };
    if sizes.len() != axes.len() || o.length(1).is_some_and(|n| n != axes.len()) {
        return Err(format!("{} sizes for {} axes", sizes.len(), axes.len()));
    }
    let mut shape = x.shape.unwrap_or_else(|| open(rank));
    for (&axis, size) in axes.iter().zip(sizes) {
        shape[axis] = size;
    }
    Ok(vec![typed(x.dtype, Some(shape))])
}

pub(super) fn reverse_sequence(
    o: &Operands<'_>,
    batch_axis: usize,
    time_axis: usize,
) -> Rule<Vec<ValueType>> {
    let (x, lengths) = (o.tensor(0, "x")?, o.tensor(1, "lengths")?);
    x.require_ranks(2, usize::MAX)?;
    lengths.require(Class::Integer)?;
    if batch_axis == time_axis || batch_axis > 1 || time_axis > 1 {
        return Err(format!("batch and time axes are {batch_axis} and {time_axis}, expected 0 and 1"));
    }
    lengths.require_shape(&[x.dim(batch_axis)])?;
    Ok(vec![x.to_type()])
}

pub(super) fn trilu(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require_ranks(2, usize::MAX)?;
    o.int(1, "k")?;
    Ok(vec![x.to_type()])
}

pub(super) fn eye_like(o: &Operands<'_>, dtype: Option<DType>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require_rank(2)?;
    let shape = vec![x.dim(0), x.dim(1)];
    Ok(vec![typed(dtype.or(x.dtype), Some(shape))])
}

pub(super) fn one_hot(o: &Operands<'_>, axis: i64) -> Rule<Vec<ValueType>> {
    let (indices, depth, values) = (o.tensor(0, "indices")?, o.tensor(1, "depth")?, o.tensor(2, "values")?);
    indices.require(Class::Numeric)?;
    depth.require(Class::Numeric)?;
    depth.require_single()?;
    values.require_shape(&[Dim::Fixed(2)])?;
    let known = match (o.value(1).and_then(Tensor::to_f64s), o.fact(1).and_then(|f| f.symbolic)) {
        (Some(v), _) => match v.first() {
            Some(n) if (0.0..9.0e18).contains(n) => Dim::Fixed(*n as usize),
            n => return Err(format!("depth is {n:?}, expected at least 0")),
        },
        (None, Some([n])) => dim_of(n, "depth")?,
        _ => Dim::UNKNOWN,
    };
    let shape = match indices.shape {
        None => None,
        Some(mut s) => {
            let at = axis_of(axis, s.len() + 1, "axis")?;
            s.insert(at, known);
            Some(s)
        }
    };
    Ok(vec![typed(values.dtype, shape)])
}

pub(super) fn range(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let (start, limit, delta) = (o.tensor(0, "start")?, o.tensor(1, "limit")?, o.tensor(2, "delta")?);
    for k in [&start, &limit, &delta] {
        k.require(Class::Numeric)?;
        k.require_single()?;
    }
    let dtype = same_dtype(&[&start, &limit, &delta])?;
    let open_range = Ok(vec![typed(dtype, Some(open(1)))]);
    let count = if dtype.is_some_and(DType::is_integer) {
        let symbolic = |i, role| -> Rule<Option<SymbolicInt>> {
            Ok(o.symbolic(i, role)?.and_then(|v| v.into_iter().next()))
        };
        match (symbolic(0, "start")?, symbolic(1, "limit")?, symbolic(2, "delta")?) {
            (Some(SymbolicInt::Value(s)), Some(SymbolicInt::Value(e)), Some(SymbolicInt::Value(d))) => {
                if d == 0 {
                    return Err("delta is 0".to_owned());
                }
                let span = (i128::from(e) - i128::from(s)) * i128::from(d.signum());
                let by = i128::from(d.unsigned_abs());
                ((span.max(0) + by - 1) / by) as f64
            }
            (Some(SymbolicInt::Value(0)), Some(SymbolicInt::Symbol(n)), Some(SymbolicInt::Value(1))) => {
                return Ok(vec![typed(dtype, Some(vec![Dim::Symbol(n)]))]);
            }
            _ => return open_range,
        }
    } else {
        let float = |i: usize| o.value(i).and_then(Tensor::to_f64s).and_then(|v| v.first().copied());
        let (Some(s), Some(e), Some(d)) = (float(0), float(1), float(2)) else { return open_range };
        // The difference is taken in the operands' own precision, as ONNX Runtime does.
        let span = if dtype == Some(DType::F64) { e - s } else { f64::from(e as f32 - s as f32) };
        if d == 0.0 || !(span / d).is_finite() {
            return Err(format!("start {s}, limit {e} and delta {d} do not make a finite range"));
        }
        (span / d).ceil().max(0.0)
    };
    if count > 9.0e15 {
        return Err(format!("the range has {count} elements"));
    }
    Ok(vec![typed(dtype, Some(vec![Dim::Fixed(count as usize)]))])
}

pub(super) fn constant_of_shape(o: &Operands<'_>, value: &Tensor) -> Rule<Vec<ValueType>> {
    o.tensor(0, "shape")?.require(Class::Integer)?;
    if value.len() != 1 {
        return Err(format!("the value has {} elements, expected 1", value.len()));
    }
    let shape = match o.symbolic(0, "shape")? {
        Some(sizes) => Some(dims_of(&sizes, "a size of the shape")?),
        None => o.length(0).filter(|&n| n <= RANK_MAX).map(open),
    };
    Ok(vec![typed(Some(value.dtype()), shape)])
}

/// The range of dimensions that `Shape` takes out of a rank.
pub(super) fn shape_range(rank: usize, start: i64, end: Option<i64>) -> std::ops::Range<usize> {
    let r = rank as i64;
    let clamp = |i: i64| (if i < 0 { i.saturating_add(r) } else { i }).clamp(0, r) as usize;
    let (s, e) = (clamp(start), clamp(end.unwrap_or(r)));
    s..e.max(s)
}

pub(super) fn shape(o: &Operands<'_>, start: i64, end: Option<i64>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    let count = x.rank().map_or(Dim::UNKNOWN, |r| Dim::Fixed(shape_range(r, start, end).len()));
    Ok(vec![typed(Some(DType::I64), Some(vec![count]))])
}

pub(super) fn size(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    o.tensor(0, "x")?;
    Ok(vec![typed(Some(DType::I64), Some(Vec::new()))])
}

pub(super) fn non_zero(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    let rank = x.rank().map_or(Dim::UNKNOWN, Dim::Fixed);
    Ok(vec![typed(Some(DType::I64), Some(vec![rank, Dim::UNKNOWN]))])
}

pub(super) fn compress(o: &Operands<'_>, axis: Option<i64>) -> Rule<Vec<ValueType>> {
    let (x, condition) = (o.tensor(0, "x")?, o.tensor(1, "condition")?);
    condition.require(Class::Bool)?;
    condition.require_rank(1)?;
    x.require_ranks(1, usize::MAX)?;
    let Some(mut shape) = x.shape.clone() else {
        return Ok(vec![typed(x.dtype, if axis.is_none() { Some(open(1)) } else { None })]);
    };
    let (at, size) = match axis {
        Some(axis) => {
            let axis = axis_of(axis, shape.len(), "axis")?;
            (axis, shape[axis].fixed())
        }
        None => (0, x.elements()),
    };
    let kept = match (o.value(1).and_then(Tensor::to_i64s), size) {
        (Some(c), Some(n)) => Dim::Fixed(c.into_iter().take(n).filter(|&b| b != 0).count()),
        _ => Dim::UNKNOWN,
    };
    if axis.is_none() {
        shape = open(1);
    }
    shape[at] = kept;
    Ok(vec![typed(x.dtype, Some(shape))])
}

pub(super) fn unique(o: &Operands<'_>, axis: Option<i64>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    let (shape, inverse) = match (&x.shape, axis) {
        (Some(s), Some(axis)) => {
            let axis = axis_of(axis, s.len(), "axis")?;
            let mut out = s.clone();
            out[axis] = Dim::UNKNOWN;
            (Some(out), s[axis].clone())
        }
        (None, Some(_)) => (None, Dim::UNKNOWN),
        (s, None) => {
            let all = s.as_ref().map(|s| product(s)).transpose()?;
            (Some(open(1)), all.unwrap_or(Dim::UNKNOWN))
        }
    };
    let list = |d: Dim| typed(Some(DType::I64), Some(vec![d]));
    Ok(vec![typed(x.dtype, shape), list(Dim::UNKNOWN), list(inverse), list(Dim::UNKNOWN)])
}

pub(super) fn top_k(o: &Operands<'_>, axis: i64) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require(Class::Numeric)?;
    let k_operand = o.tensor(1, "k")?;
    k_operand.require_single()?;
    let k = match o.symbolic(1, "k")?.as_deref() {
        Some([k, ..]) => dim_of(k, "k")?,
        _ => Dim::UNKNOWN,
    };
    let shape = match x.shape {
        None => None,
        Some(mut s) => {
            let axis = axis_of(axis, s.len(), "axis")?;
            if let (Dim::Fixed(k), Dim::Fixed(n)) = (&k, &s[axis])
                && k > n
            {
                return Err(format!("k is {k}, but axis {axis} has {n} elements"));
            }
            s[axis] = k;
            Some(s)
        }
    };
    Ok(vec![typed(x.dtype, shape.clone()), typed(Some(DType::I64), shape)])
}

pub(super) fn non_max_suppression(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let (boxes, scores) = (o.tensor(0, "boxes")?, o.tensor(1, "scores")?);
    boxes.require(Class::Float)?;
    scores.require(Class::Float)?;
    boxes.require_shape(&[Dim::UNKNOWN, Dim::UNKNOWN, Dim::Fixed(4)])?;
    scores.require_rank(3)?;
    for (a, b, what) in
        [(boxes.dim(0), scores.dim(0), "batch"), (boxes.dim(1), scores.dim(2), "number of boxes")]
    {
        if unify(&a, &b).is_none() {
            return Err(format!("boxes have {what} {a}, but scores {b}"));
        }
    }
    o.int(2, "max_per_class")?;
    for (i, role) in [(3, "iou_threshold"), (4, "score_threshold")] {
        if let Some(k) = o.optional(i, role)? {
            k.require(Class::Float)?;
            k.require_single()?;
        }
    }
    Ok(vec![typed(Some(DType::I64), Some(vec![Dim::UNKNOWN, Dim::Fixed(3)]))])
}

/// Broadcasting of two text operands.
pub(super) fn string_concat(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let (a, b) = (o.tensor(0, "a")?, o.tensor(1, "b")?);
    a.require(Class::Text)?;
    b.require(Class::Text)?;
    let shape = match (&a.shape, &b.shape) {
        (Some(s), Some(t)) => Some(broadcast(s, t).map_err(|e| e.to_string())?),
        _ => None,
    };
    Ok(vec![typed(Some(DType::String), shape)])
}

pub(super) fn concat_sequence(
    element: Option<&Known>,
    axis: i64,
    new_axis: bool,
    dtype: Option<DType>,
) -> Rule<Vec<ValueType>> {
    let shape = match element.and_then(|e| e.shape.as_ref()) {
        None => None,
        Some(s) if new_axis => {
            let at = axis_of(axis, s.len() + 1, "axis")?;
            let mut out = s.clone();
            out.insert(at, Dim::UNKNOWN);
            Some(out)
        }
        Some(s) => {
            let at = axis_of(axis, s.len(), "axis")?;
            let mut out = s.clone();
            out[at] = Dim::UNKNOWN;
            Some(out)
        }
    };
    Ok(vec![typed(dtype, shape)])
}

/// What shape arithmetic yields for output 0: the elements of a short integer list as far as they are known.
pub(super) fn symbolic_result(o: &Operands<'_>) -> Option<Vec<SymbolicInt>> {
    use crate::{BinaryOp, Op, UnaryOp};
    /// Longest list that is followed.
    const LENGTH_MAX: usize = 64;
    let list = |i: usize| o.symbolic(i, "operand").ok().flatten().filter(|l| l.len() <= LENGTH_MAX);
    let is_list = |i: usize| {
        o.fact(i).and_then(|f| f.ty.tensor()).and_then(|t| t.shape.as_ref()).is_some_and(|s| s.len() == 1)
    };
    let is_scalar = |i: usize| {
        o.fact(i).and_then(|f| f.ty.tensor()).and_then(|t| t.shape.as_ref()).is_some_and(|s| s.is_empty())
    };
    let out = match &o.node.op {
        Op::Shape { start, end } => {
            let s = o.fact(0)?.ty.tensor()?.shape.as_ref()?;
            s[shape_range(s.len(), *start, *end)].iter().map(SymbolicInt::from).collect()
        }
        Op::Size => {
            let s = o.fact(0)?.ty.tensor()?.shape.as_ref()?;
            vec![SymbolicInt::from(&product(s).ok()?)]
        }
        Op::Unary(UnaryOp::Identity) | Op::Squeeze | Op::Unsqueeze => list(0)?,
        Op::Reshape { .. } if o.length(1)? <= 1 => list(0)?,
        Op::Cast { to: DType::I64, .. } => list(0)?,
        Op::Unary(UnaryOp::Neg) if o.fact(0)?.ty.tensor()?.dtype == DType::I64 => {
            let negated = |s: &SymbolicInt| match s {
                SymbolicInt::Value(n) => n.checked_neg().map_or(SymbolicInt::Unknown, SymbolicInt::Value),
                _ => SymbolicInt::Unknown,
            };
            list(0)?.iter().map(negated).collect()
        }
        Op::ConstantOfShape { value } if matches!(value.dtype(), DType::I64 | DType::I32) => {
            let count = match o.ints(0, "shape").ok()??.as_slice() {
                [] => 1,
                [n] => usize::try_from(*n).ok().filter(|&n| n <= LENGTH_MAX)?,
                _ => return None,
            };
            vec![SymbolicInt::Value(*value.to_i64s()?.first()?); count]
        }
        Op::Cast { to: DType::I32, .. } => {
            let fits = |s: &SymbolicInt| match s {
                SymbolicInt::Value(n) => i32::try_from(*n).is_ok(),
                _ => true,
            };
            list(0).filter(|l| l.iter().all(fits))?
        }
        Op::Concat { .. } => {
            let mut all = Vec::new();
            for i in 0..o.facts.len() {
                match list(i) {
                    Some(l) => all.extend(l),
                    None if is_list(i) => {
                        let n = o.length(i).filter(|&n| n <= LENGTH_MAX)?;
                        all.extend(std::iter::repeat_n(SymbolicInt::Unknown, n));
                    }
                    None => return None,
                }
                if all.len() > LENGTH_MAX {
                    return None;
                }
            }
            all
        }
        Op::Gather { .. } if is_list(0) && (is_list(1) || is_scalar(1)) => {
            let (x, indices) = (list(0)?, o.ints(1, "indices").ok()??);
            let at = |i: i64| {
                let at = if i < 0 { i.checked_add(x.len() as i64)? } else { i };
                x.get(usize::try_from(at).ok()?).cloned()
            };
            indices.into_iter().map(at).collect::<Option<Vec<_>>>()?
        }
        Op::Slice if is_list(0) => {
            let x = list(0)?;
            let one = |i, default| match o.has(i) {
                true => o.int(i, "operand").ok().flatten(),
                false => Some(default),
            };
            let (start, end, step) = (one(1, 0)?, one(2, 0)?, one(4, 1)?);
            let n = x.len() as i64;
            let count = if step == 0 { return None } else { slice_length(x.len(), start, end, step).ok()? };
            let start = if start < 0 { start.saturating_add(n) } else { start };
            let first = if step > 0 { start.clamp(0, n) } else { start.clamp(-1, n - 1) };
            (0..count as i64)
                .map(|i| x.get(usize::try_from(first + i * step).ok()?).cloned())
                .collect::<Option<Vec<_>>>()?
        }
        Op::Binary(op) if o.fact(0)?.ty.tensor()?.dtype == DType::I64 => {
            let (a, b) = (list(0)?, list(1)?);
            let n = match (a.len(), b.len()) {
                (n, m) if n == m => n,
                (n, 1) | (1, n) => n,
                _ => return None,
            };
            let at = |l: &[SymbolicInt], i: usize| l[if l.len() == 1 { 0 } else { i }].clone();
            let one = |i: usize| {
                use SymbolicInt::{Symbol, Unknown, Value};
                match (op, at(&a, i), at(&b, i)) {
                    (BinaryOp::Add, Value(x), Value(y)) => x.checked_add(y).map_or(Unknown, Value),
                    (BinaryOp::Sub, Value(x), Value(y)) => x.checked_sub(y).map_or(Unknown, Value),
                    (BinaryOp::Mul, Value(x), Value(y)) => x.checked_mul(y).map_or(Unknown, Value),
                    (BinaryOp::Div, Value(x), Value(y)) => x.checked_div(y).map_or(Unknown, Value),
                    (BinaryOp::Max, Value(x), Value(y)) => Value(x.max(y)),
                    (BinaryOp::Min, Value(x), Value(y)) => Value(x.min(y)),
                    (BinaryOp::Mul | BinaryOp::Div, Symbol(s), Value(1))
                    | (BinaryOp::Mul, Value(1), Symbol(s))
                    | (BinaryOp::Add | BinaryOp::Sub, Symbol(s), Value(0))
                    | (BinaryOp::Add, Value(0), Symbol(s)) => Symbol(s),
                    _ => Unknown,
                }
            };
            if !matches!(
                op,
                BinaryOp::Add | BinaryOp::Sub | BinaryOp::Mul | BinaryOp::Div | BinaryOp::Max | BinaryOp::Min
            ) {
                return None;
            }
            (0..n).map(one).collect()
        }
        _ => return None,
    };
    (out.len() <= LENGTH_MAX).then_some(out)
}
