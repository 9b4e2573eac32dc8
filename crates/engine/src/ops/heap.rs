//! Values on the counted heap.

use lightering_graph::{DType, Tensor};
use lightering_units::Bytes;

use super::operands::invalid;
use super::{OpContext, OpError, TensorView, TensorViewMut};
use crate::RuntimeValue;

/// Asks the pool whether `size` more bytes would fit. The caller of the operator holds the reservation for as long as
/// the value lives; this refuses before anything is allocated.
pub(super) fn ask(context: &OpContext, size: usize) -> Result<(), OpError> {
    match context.memory.reserve("operator result", Bytes(size as u64)) {
        Ok(_) => Ok(()),
        Err(error) => Err(OpError::Budget(error.to_string())),
    }
}

/// A tensor of zeros, if the pool allows it.
pub(super) fn allocate(context: &OpContext, dtype: DType, dims: &[usize]) -> Result<Tensor, OpError> {
    let element = if dtype == DType::String { size_of::<String>() } else { dtype.size_bytes() };
    let size = dims.iter().try_fold(element, |n, &d| n.checked_mul(d)).filter(|&n| n <= isize::MAX as usize);
    let Some(size) = size else { return invalid(format!("a tensor of shape {dims:?} is too large")) };
    ask(context, size)?;
    Ok(Tensor::zeros(dtype, dims))
}

/// A tensor of text.
pub(super) fn strings(context: &OpContext, dims: &[usize], values: Vec<String>) -> Result<Tensor, OpError> {
    ask(context, values.iter().map(|s| s.len() + size_of::<String>()).sum())?;
    let mut out = Tensor::zeros(DType::String, dims);
    for (to, from) in out.as_mut_strings().iter_mut().zip(values) {
        *to = from;
    }
    Ok(out)
}

/// A tensor as operands are passed.
pub(super) fn as_view(tensor: &Tensor) -> TensorView<'_> {
    TensorView { dtype: tensor.dtype(), dims: tensor.dims(), bytes: tensor.as_bytes() }
}

/// A tensor as results are passed.
///
/// The shape of a view is borrowed apart from its elements, so results written through this know only their number
/// of elements.
pub(super) fn as_view_mut(tensor: &mut Tensor) -> TensorViewMut<'_> {
    TensorViewMut { dtype: tensor.dtype(), dims: &[], bytes: tensor.as_bytes_mut() }
}

/// Operand `index`, if it is there.
pub(super) fn optional_input<'a>(
    inputs: &[Option<&'a RuntimeValue>],
    index: usize,
) -> Option<&'a RuntimeValue> {
    inputs.get(index).copied().flatten()
}

/// Operand `index`, which must be there.
pub(super) fn required_input<'a>(
    inputs: &[Option<&'a RuntimeValue>],
    index: usize,
    name: &str,
) -> Result<&'a RuntimeValue, OpError> {
    optional_input(inputs, index)
        .ok_or_else(|| OpError::Invalid(format!("operand {index} ({name}) is missing")))
}

/// Operand `index`, which must be a tensor.
pub(super) fn tensor_input<'a>(
    inputs: &[Option<&'a RuntimeValue>],
    index: usize,
    name: &str,
) -> Result<&'a Tensor, OpError> {
    required_input(inputs, index, name)?
        .tensor()
        .ok_or_else(|| OpError::Invalid(format!("operand {index} ({name}) is no tensor")))
}
