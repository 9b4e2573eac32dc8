//! Normalisation and reduction.

use super::broadcast::{broadcasts_to, shown};
use super::operands::*;
use crate::{DType, Dim, ReduceOp, Shape, ValueType};

/// The channel dimension of `[batch, channels, …]`; a list counts as one channel.
fn channels(x: &Known) -> Dim {
    match x.rank() {
        Some(0 | 1) => Dim::Fixed(1),
        _ => x.dim(1),
    }
}

fn per_channel(o: &Operands<'_>, x: &Known, operands: &[(usize, &'static str)]) -> Rule<Dim> {
    let mut count = channels(x);
    for &(i, role) in operands {
        let k = o.tensor(i, role)?;
        k.require(Class::Float)?;
        k.require_shape(std::slice::from_ref(&count))?;
        count = unify(&count, &k.dim(0)).unwrap_or(count);
    }
    Ok(count)
}

pub(super) fn batch_norm(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require(Class::Float)?;
    x.require_ranks(1, usize::MAX)?;
    let count = per_channel(o, &x, &[(1, "scale"), (2, "bias"), (3, "mean"), (4, "variance")])?;
    let (mean, variance) = (o.tensor(3, "mean")?, o.tensor(4, "variance")?);
    let list = Some(vec![count]);
    Ok(vec![x.to_type(), typed(mean.dtype, list.clone()), typed(variance.dtype, list)])
}

pub(super) fn instance_norm(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require(Class::Float)?;
    x.require_ranks(2, usize::MAX)?;
    per_channel(o, &x, &[(1, "scale"), (2, "bias")])?;
    Ok(vec![x.to_type()])
}

pub(super) fn group_norm(o: &Operands<'_>, groups: usize) -> Rule<Vec<ValueType>> {
    let types = instance_norm(o)?;
    divided(&o.tensor(0, "x")?.dim(1), groups, "the number of channels")?;
    Ok(types)
}

/// Scale and bias of a layer normalisation broadcast to the normalised dimensions.
fn require_normalised(k: &Known, x: &Known, axis: usize) -> Rule<()> {
    if let (Some(s), Some(t)) = (&k.shape, &x.shape)
        && !broadcasts_to(s, &t[axis..])
        && !broadcasts_to(s, t)
    {
        return Err(format!(
            "{} has shape {}, which does not broadcast to the normalised dimensions {}",
            k.role,
            shown(s),
            shown(&t[axis..])
        ));
    }
    Ok(())
}

pub(super) fn layer_norm(o: &Operands<'_>, axis: i64) -> Rule<Vec<ValueType>> {
    let (x, scale) = (o.tensor(0, "x")?, o.tensor(1, "scale")?);
    x.require(Class::Float)?;
    let bias = o.optional(2, "bias")?;
    same_dtype(&[&x, &scale])?;
    let statistics = match &x.shape {
        None => None,
        Some(s) => {
            let axis = axis_of(axis, s.len(), "axis")?;
            require_normalised(&scale, &x, axis)?;
            if let Some(bias) = &bias {
                same_dtype(&[&x, bias])?;
                require_normalised(bias, &x, axis)?;
            }
            Some(
                s.iter().enumerate().map(|(i, d)| if i < axis { d.clone() } else { Dim::Fixed(1) }).collect(),
            )
        }
    };
    // The statistics are f32 whatever x is, as ONNX's default stash type says.
    let statistics: Option<Shape> = statistics;
    Ok(vec![x.to_type(), typed(Some(DType::F32), statistics.clone()), typed(Some(DType::F32), statistics)])
}

pub(super) fn rms_norm(o: &Operands<'_>, axis: i64) -> Rule<Vec<ValueType>> {
    let (x, scale) = (o.tensor(0, "x")?, o.tensor(1, "scale")?);
    x.require(Class::Float)?;
    scale.require(Class::Float)?;
    if let Some(rank) = x.rank() {
        require_normalised(&scale, &x, axis_of(axis, rank, "axis")?)?;
    }
    // ONNX gives the result the type of the scale.
    Ok(vec![typed(scale.dtype, x.shape)])
}

/// `(x)` of floats with one axis, which keeps the type.
pub(super) fn along_axis(o: &Operands<'_>, axis: i64) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require(Class::Float)?;
    if let Some(rank) = x.rank() {
        axis_of(axis, rank, "axis")?;
    }
    Ok(vec![x.to_type()])
}

pub(super) fn mean_variance_norm(o: &Operands<'_>, axes: &[i64]) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require(Class::Float)?;
    if let Some(rank) = x.rank() {
        axes_of(axes, rank)?;
    }
    Ok(vec![x.to_type()])
}

pub(super) fn lrn(o: &Operands<'_>, size: usize) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require(Class::Float)?;
    x.require_ranks(2, usize::MAX)?;
    if size == 0 {
        return Err("size is 0, expected at least 1".to_owned());
    }
    Ok(vec![x.to_type()])
}

pub(super) fn reduce(o: &Operands<'_>, op: ReduceOp, keep_dims: bool, noop: bool) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require(match op {
        ReduceOp::Max | ReduceOp::Min => Class::NumericOrBool,
        _ => Class::Numeric,
    })?;
    let axes = o.ints(1, "axes")?;
    let Some(shape) = &x.shape else { return Ok(vec![typed(x.dtype, None)]) };
    let none_given = !o.has(1) || axes.as_ref().is_some_and(Vec::is_empty) || o.length(1) == Some(0);
    let reduced: Option<Vec<usize>> = match axes {
        _ if none_given && noop => Some(Vec::new()),
        _ if none_given => Some((0..shape.len()).collect()),
        Some(axes) => Some(axes_of(&axes, shape.len())?),
        None => None,
    };
    let out = match reduced {
        Some(reduced) => {
            let mut out = Vec::new();
            for (i, d) in shape.iter().enumerate() {
                match reduced.contains(&i) {
                    false => out.push(d.clone()),
                    true if keep_dims => out.push(Dim::Fixed(1)),
                    true => {}
                }
            }
            Some(out)
        }
        None if keep_dims => Some(open(shape.len())),
        None => match o.length(1) {
            Some(n) if n > shape.len() => {
                return Err(format!("{n} axes, but x has shape {}", shown(shape)));
            }
            n => n.map(|n| open(shape.len() - n)),
        },
    };
    Ok(vec![typed(x.dtype, out)])
}

pub(super) fn arg_reduce(o: &Operands<'_>, axis: i64, keep_dims: bool) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require(Class::Numeric)?;
    let shape = match x.shape {
        None => None,
        Some(mut s) => {
            let axis = axis_of(axis, s.len(), "axis")?;
            if s[axis] == Dim::Fixed(0) {
                return Err(format!("x has shape {}: there is no largest of no elements", shown(&s)));
            }
            if keep_dims {
                s[axis] = Dim::Fixed(1);
            } else {
                s.remove(axis);
            }
            Some(s)
        }
    };
    Ok(vec![typed(Some(DType::I64), shape)])
}

pub(super) fn cum_sum(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require(Class::Numeric)?;
    if let (Some(rank), Some(axis)) = (x.rank(), o.int(1, "axis")?) {
        axis_of(axis, rank, "axis")?;
    }
    Ok(vec![x.to_type()])
}
