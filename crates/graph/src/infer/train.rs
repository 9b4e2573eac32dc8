//! Operators of training.

use super::operands::*;
use crate::{DType, Dim, EIGHT_BIT_BLOCK, EIGHT_BIT_LEN, TrainOp, UpdateRule, ValueType};

fn fixed(dims: &[usize]) -> Option<Vec<Dim>> {
    Some(dims.iter().map(|&d| Dim::Fixed(d)).collect())
}

fn floats(o: &Operands<'_>, at: usize, role: &'static str) -> Rule<Known> {
    let x = o.tensor(at, role)?;
    x.require(Class::Float)?;
    Ok(x)
}

/// Both operands have the same shape, which is the shape of the result.
fn alike(a: &Known, b: &Known) -> Rule<ValueType> {
    if let Some(shape) = &a.shape {
        b.require_shape(shape)?;
    }
    Ok(typed(same_dtype(&[a, b])?, a.shape.clone().or_else(|| b.shape.clone())))
}

fn channels(x: &Known, axis: usize) -> Rule<Dim> {
    if let Some(rank) = x.rank() {
        axis_of(axis as i64, rank, "axis")?;
    }
    Ok(x.dim(axis))
}

/// A vector with one element per channel, if it is there.
fn per_channel(o: &Operands<'_>, at: usize, role: &'static str, channels: &Dim) -> Rule<()> {
    match o.optional(at, role)? {
        Some(v) => v.require_shape(std::slice::from_ref(channels)),
        None => Ok(()),
    }
}

/// The type of operand `at`, if it is there; a place holder otherwise.
fn like(o: &Operands<'_>, at: usize, role: &'static str) -> Rule<ValueType> {
    Ok(o.optional(at, role)?.map_or(ValueType::Unknown, |k| k.to_type()))
}

/// Operand `scale` of a normalisation, or a vector over the normalised axes.
fn scale_type(o: &Operands<'_>, x: &Known, axis: i64) -> Rule<ValueType> {
    if let Some(scale) = o.optional(1, "scale")? {
        return Ok(scale.to_type());
    }
    let shape = match &x.shape {
        Some(s) => Some(s[axis_of(axis, s.len(), "axis")?..].to_vec()),
        None => None,
    };
    Ok(typed(x.dtype, shape))
}

fn update(o: &Operands<'_>, rule: UpdateRule, axis: usize) -> Rule<Vec<ValueType>> {
    let moments = rule.moments();
    let parameter = floats(o, 0, "the parameter")?;
    let gradient = floats(o, 1 + moments, "the gradient")?;
    let mut expected = parameter.shape.clone();
    if let Some(list) = o.optional(3 + moments, "channels")? {
        list.require(Class::Integer)?;
        list.require_rank(1)?;
        if let Some(shape) = &mut expected {
            let axis = axis_of(axis as i64, shape.len(), "axis")?;
            shape[axis] = list.dim(0);
        }
    }
    if let Some(shape) = &expected {
        gradient.require_shape(shape)?;
    }
    o.tensor(2 + moments, "the schedule")?.require_shape(&[Dim::Fixed(4)])?;
    let mut results = vec![parameter.to_type()];
    for i in 0..moments {
        let moment = o.tensor(1 + i, "a moment")?;
        if matches!(rule, UpdateRule::Adam8 { .. }) {
            let blocks = gradient.elements().map(|n| Dim::Fixed(n.div_ceil(EIGHT_BIT_LEN)));
            moment.require_shape(&[blocks.unwrap_or(Dim::UNKNOWN), Dim::Fixed(EIGHT_BIT_BLOCK)])?;
        } else if let Some(shape) = &expected {
            moment.require_shape(shape)?;
        }
        results.push(moment.to_type());
    }
    Ok(results)
}

pub(super) fn train(o: &Operands<'_>, op: &TrainOp) -> Rule<Vec<ValueType>> {
    Ok(match op {
        TrainOp::ConvInputGrad { input, .. } => {
            let dy = floats(o, 0, "dy")?;
            let dtype = same_dtype(&[&dy, &floats(o, 1, "w")?])?;
            vec![typed(dtype, fixed(input))]
        }
        TrainOp::ConvWeightGrad { weight, .. } => {
            let dtype = same_dtype(&[&floats(o, 0, "x")?, &floats(o, 1, "dy")?])?;
            vec![typed(dtype, fixed(weight))]
        }
        TrainOp::PoolGrad { input, .. } | TrainOp::ResizeGrad { input, .. } => {
            vec![typed(floats(o, 0, "dy")?.dtype, fixed(input))]
        }
        TrainOp::GatherGrad { input, .. } => {
            o.tensor(0, "indices")?.require(Class::Integer)?;
            vec![typed(floats(o, 1, "dy")?.dtype, fixed(input))]
        }
        TrainOp::GridSampleGrad { .. } => {
            floats(o, 2, "dy")?;
            vec![floats(o, 0, "x")?.to_type(), floats(o, 1, "grid")?.to_type()]
        }
        TrainOp::DetGrad => {
            floats(o, 1, "dy")?;
            vec![floats(o, 0, "x")?.to_type()]
        }
        TrainOp::UnaryGrad(_) => vec![alike(&floats(o, 0, "saved")?, &floats(o, 1, "dy")?)?],
        TrainOp::SoftmaxGrad { .. } => vec![alike(&floats(o, 0, "y")?, &floats(o, 1, "dy")?)?],
        TrainOp::LayerNormGrad { axis, .. } => {
            let (x, dy) = (floats(o, 0, "x")?, floats(o, 2, "dy")?);
            let scale = scale_type(o, &x, *axis)?;
            vec![alike(&x, &dy)?, scale.clone(), scale]
        }
        TrainOp::RmsNormGrad { axis, .. } => {
            let (x, dy) = (floats(o, 0, "x")?, floats(o, 2, "dy")?);
            vec![alike(&x, &dy)?, scale_type(o, &x, *axis)?]
        }
        TrainOp::BatchStatistics { axis } => {
            let x = floats(o, 0, "x")?;
            let ty = typed(x.dtype, Some(vec![channels(&x, *axis)?]));
            vec![ty.clone(), ty]
        }
        TrainOp::TrackStatistics { .. } => {
            let (mean, variance) = (floats(o, 0, "running mean")?, floats(o, 1, "running variance")?);
            alike(&mean, &floats(o, 2, "mean")?)?;
            alike(&variance, &floats(o, 3, "variance")?)?;
            vec![mean.to_type(), variance.to_type()]
        }
        TrainOp::Normalise { axis, .. } => {
            let x = floats(o, 0, "x")?;
            let c = channels(&x, *axis)?;
            for (at, role) in [(1, "mean"), (2, "variance"), (3, "scale"), (4, "bias")] {
                per_channel(o, at, role, &c)?;
            }
            vec![x.to_type()]
        }
        TrainOp::NormaliseGrad { axis, .. } => {
            let (x, dy) = (floats(o, 0, "x")?, floats(o, 1, "dy")?);
            let c = channels(&x, *axis)?;
            for (at, role) in [(2, "mean"), (3, "variance"), (4, "scale")] {
                per_channel(o, at, role, &c)?;
            }
            let vector = typed(x.dtype, Some(vec![c]));
            vec![alike(&x, &dy)?, vector.clone(), vector]
        }
        TrainOp::ChannelSum { axis } => {
            let dy = floats(o, 0, "dy")?;
            vec![typed(dy.dtype, Some(vec![channels(&dy, *axis)?]))]
        }
        TrainOp::CrossEntropy { .. } => {
            let (dtype, rows) = cross_entropy(o)?;
            vec![typed(dtype, Some(Vec::new())), typed(dtype, rows)]
        }
        TrainOp::CrossEntropyGrad { .. } => {
            cross_entropy(o)?;
            floats(o, 2, "dloss")?.require_single()?;
            vec![floats(o, 0, "logits")?.to_type()]
        }
        TrainOp::SignMask(_) => {
            let bytes = floats(o, 0, "x")?.elements().map_or(Dim::UNKNOWN, |n| Dim::Fixed(n.div_ceil(8)));
            vec![typed(Some(DType::U8), Some(vec![bytes]))]
        }
        TrainOp::MaskGrad => {
            let (bits, dy) = (o.tensor(0, "bits")?, floats(o, 1, "dy")?);
            if bits.dtype.is_some_and(|d| d != DType::U8) {
                return Err(format!("bits is {}, expected bytes", bits.to_type()));
            }
            bits.require_shape(&[dy.elements().map_or(Dim::UNKNOWN, |n| Dim::Fixed(n.div_ceil(8)))])?;
            vec![dy.to_type()]
        }
        TrainOp::RecurrentGrad { .. } => {
            let x = floats(o, 0, "x")?;
            vec![
                x.to_type(),
                floats(o, 1, "w")?.to_type(),
                floats(o, 2, "r")?.to_type(),
                like(o, 3, "b")?,
                like(o, 5, "initial_h")?,
                like(o, 6, "initial_c")?,
                like(o, 7, "peepholes")?,
            ]
        }
        TrainOp::AttentionGrad(_) => {
            floats(o, 4, "dy")?;
            vec![floats(o, 0, "q")?.to_type(), floats(o, 1, "k")?.to_type(), floats(o, 2, "v")?.to_type()]
        }
        TrainOp::Update { rule, axis } => update(o, *rule, *axis)?,
        TrainOp::Perturb { .. } => {
            zeroth_order_settings(o, 1)?;
            vec![floats(o, 0, "the parameter")?.to_type()]
        }
        TrainOp::GatherPerturbed { .. } => {
            let (table, indices) = (floats(o, 0, "the table")?, o.tensor(1, "the indices")?);
            table.require_rank(2)?;
            indices.require(Class::Integer)?;
            zeroth_order_settings(o, 2)?;
            let shape = indices.shape.as_ref().zip(table.shape.as_ref()).map(|(rows, table)| {
                let mut shape = rows.clone();
                shape.push(table[1].clone());
                shape
            });
            vec![typed(table.dtype, shape.clone()), typed(table.dtype, shape)]
        }
    })
}

/// `zo` and `seeds`, from operand `first` on.
fn zeroth_order_settings(o: &Operands<'_>, first: usize) -> Rule<()> {
    floats(o, first, "zo")?.require_shape(&[Dim::Fixed(4)])?;
    let seeds = o.tensor(first + 1, "the seeds")?;
    seeds.require(Class::Integer)?;
    seeds.require_shape(&[Dim::Fixed(2)])
}

/// Element type and shape of the rows that a cross-entropy is taken over.
fn cross_entropy(o: &Operands<'_>) -> Rule<(Option<DType>, Option<Vec<Dim>>)> {
    let (logits, labels) = (floats(o, 0, "logits")?, o.tensor(1, "labels")?);
    let rows = logits.shape.as_ref().map(|s| s[..s.len().saturating_sub(1)].to_vec());
    if let (Some(shape), Some(rows)) = (&logits.shape, &rows) {
        let soft = labels.dtype.is_some_and(DType::is_float);
        labels.require_shape(if soft { shape } else { rows })?;
    }
    Ok((logits.dtype, rows))
}
