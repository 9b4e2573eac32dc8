//! Sequences and optionals.

use lightering_graph::{DType, Op, Tensor, TensorType, ValueType};

use super::heap::{optional_input, required_input, tensor_input};
use super::joining::{concat, slice, stack};
use super::operands::*;
use super::{OpContext, OpError};
use crate::RuntimeValue;

fn sequence_input<'a>(
    inputs: &[Option<&'a RuntimeValue>],
    index: usize,
) -> Result<(&'a ValueType, &'a [RuntimeValue]), OpError> {
    match required_input(inputs, index, "the sequence")? {
        RuntimeValue::Sequence(ty, items) => Ok((ty, items)),
        other => invalid(format!("operand {index} is {}, expected a sequence", other.value_type())),
    }
}

/// A position counted from the front; `past` allows the one after the last.
fn position(
    inputs: &[Option<&RuntimeValue>],
    index: usize,
    len: usize,
    past: bool,
) -> Result<Option<usize>, OpError> {
    if optional_input(inputs, index).is_none() {
        return Ok(None);
    }
    let at = tensor_input(inputs, index, "the position")?;
    let Some(&[at]) = at.to_i64s().as_deref() else { return invalid("the position is not one integer") };
    let from_front = if at < 0 { at + len as i64 } else { at };
    match usize::try_from(from_front) {
        Ok(i) if i < len || (past && i == len) => Ok(Some(i)),
        _ => invalid(format!("position {at} in a sequence of {len}")),
    }
}

/// What the elements of a sequence of `tensor` are, its shape left open.
fn element_type(value: &RuntimeValue) -> ValueType {
    match value {
        RuntimeValue::Tensor(t) => TensorType::unranked(t.dtype()).into(),
        other => other.value_type(),
    }
}

fn tensors(items: &[RuntimeValue]) -> Result<Vec<&Tensor>, OpError> {
    items
        .iter()
        .map(|i| i.tensor().ok_or_else(|| OpError::Invalid("an element of the sequence is no tensor".into())))
        .collect()
}

/// Dispatch of this family.
pub(super) fn compute_dynamic(
    op: &Op,
    inputs: &[Option<&RuntimeValue>],
    context: &OpContext,
) -> Result<Vec<Option<RuntimeValue>>, OpError> {
    let value = match op {
        Op::SequenceConstruct => {
            let items: Vec<RuntimeValue> = inputs.iter().flatten().map(|&v| v.clone()).collect();
            let ty = items.first().map_or(ValueType::Unknown, element_type);
            RuntimeValue::Sequence(ty, items)
        }
        Op::SequenceEmpty { dtype } => RuntimeValue::tensor_sequence(*dtype, Vec::new()),
        Op::SequenceAt => {
            let (_, items) = sequence_input(inputs, 0)?;
            match position(inputs, 1, items.len(), false)? {
                Some(at) => items[at].clone(),
                None => return invalid("the position is missing"),
            }
        }
        Op::SequenceErase => {
            let (ty, items) = sequence_input(inputs, 0)?;
            let at = position(inputs, 1, items.len(), false)?;
            let Some(at) = at.or(items.len().checked_sub(1)) else {
                return invalid("erasing from an empty sequence");
            };
            let kept = items.iter().enumerate().filter(|(i, _)| *i != at).map(|(_, v)| v.clone());
            RuntimeValue::Sequence(ty.clone(), kept.collect())
        }
        Op::SequenceInsert => {
            let (ty, items) = sequence_input(inputs, 0)?;
            let new = required_input(inputs, 1, "the new element")?;
            let at = position(inputs, 2, items.len(), true)?.unwrap_or(items.len());
            let mut items = items.to_vec();
            items.insert(at, new.clone());
            let ty = if *ty == ValueType::Unknown { element_type(new) } else { ty.clone() };
            RuntimeValue::Sequence(ty, items)
        }
        Op::SequenceLength => Tensor::scalar(sequence_input(inputs, 0)?.1.len() as i64).into(),
        Op::ConcatFromSequence { axis, new_axis } => {
            let parts = tensors(sequence_input(inputs, 0)?.1)?;
            let Some(first) = parts.first() else { return invalid("joining an empty sequence") };
            let rank = first.dims().len() + usize::from(*new_axis);
            let axis = normal_axis(*axis, rank)?;
            let joined =
                if *new_axis { stack(context, &parts, axis)? } else { concat(context, &parts, axis)? };
            joined.into()
        }
        Op::SplitToSequence { axis, keep_dims } => split_to_sequence(*axis, *keep_dims, inputs, context)?,
        Op::OptionalConstruct { ty } => match optional_input(inputs, 0) {
            Some(v) => RuntimeValue::Optional(
                ty.clone().unwrap_or_else(|| v.value_type()),
                Some(Box::new(v.clone())),
            ),
            None => RuntimeValue::Optional(ty.clone().unwrap_or(ValueType::Unknown), None),
        },
        Op::OptionalGetElement => match required_input(inputs, 0, "the optional")? {
            RuntimeValue::Optional(_, Some(content)) => (**content).clone(),
            RuntimeValue::Optional(_, None) => return invalid("the optional is empty"),
            other => other.clone(),
        },
        Op::OptionalHasElement => {
            let has = !matches!(optional_input(inputs, 0), None | Some(RuntimeValue::Optional(_, None)));
            Tensor::from_slice(&[], &[u8::from(has)]).into_dtype(DType::Bool).into()
        }
        _ => return Err(super::no_kernel(op)),
    };
    Ok(vec![Some(value)])
}

fn split_to_sequence(
    axis: i64,
    keep_dims: bool,
    inputs: &[Option<&RuntimeValue>],
    context: &OpContext,
) -> Result<RuntimeValue, OpError> {
    let x = tensor_input(inputs, 0, "x")?;
    let axis = normal_axis(axis, x.dims().len())?;
    let size = x.dims()[axis];
    let mut drop_axis = false;
    let lengths: Vec<usize> = if optional_input(inputs, 1).is_none() {
        drop_axis = !keep_dims;
        vec![1; size]
    } else {
        let split = tensor_input(inputs, 1, "split")?;
        let Some(values) = split.to_i64s() else { return invalid("split is not integral") };
        let values: Vec<usize> = values
            .into_iter()
            .map(|v| usize::try_from(v).map_err(|_| OpError::Invalid(format!("a part of {v} elements"))))
            .collect::<Result<_, _>>()?;
        match (split.dims().len(), values.as_slice()) {
            (0, &[0]) => return invalid("parts of 0 elements"),
            (0, &[each]) => (0..size).step_by(each).map(|first| each.min(size - first)).collect(),
            _ => values,
        }
    };
    if lengths.iter().try_fold(0usize, |sum, &l| sum.checked_add(l)) != Some(size) {
        return invalid(format!("parts {lengths:?} of {size} elements"));
    }
    let (mut first, mut parts) = (0, Vec::with_capacity(lengths.len()));
    for length in lengths {
        let mut part = slice(context, x, axis, first, length)?;
        if drop_axis {
            let mut dims = part.dims().to_vec();
            dims.remove(axis);
            part = part.into_shape(&dims);
        }
        parts.push(part);
        first += length;
    }
    Ok(RuntimeValue::tensor_sequence(x.dtype(), parts))
}
