//! Access to operands and results with an error that names what is wrong.

use lightering_graph::DType;

use super::{OpError, TensorView, TensorViewMut};

/// An error about operands that contradict their operator.
pub(super) fn invalid<T>(problem: impl Into<String>) -> Result<T, OpError> {
    Err(OpError::Invalid(problem.into()))
}

/// An error about something legal that no kernel does.
pub(super) fn unsupported<T>(what: impl Into<String>) -> Result<T, OpError> {
    Err(OpError::Unsupported(what.into()))
}

/// Operand `index`, if it is there.
pub(super) fn optional<'a>(inputs: &[Option<TensorView<'a>>], index: usize) -> Option<TensorView<'a>> {
    inputs.get(index).copied().flatten()
}

/// Operand `index`, which the operator cannot do without.
pub(super) fn required<'a>(
    inputs: &[Option<TensorView<'a>>],
    index: usize,
    name: &str,
) -> Result<TensorView<'a>, OpError> {
    optional(inputs, index).ok_or_else(|| OpError::Invalid(format!("operand {index} ({name}) is missing")))
}

/// Refuses an element type other than `dtype`.
pub(super) fn expect_dtype(view: &TensorView<'_>, dtype: DType, name: &str) -> Result<(), OpError> {
    if view.dtype != dtype {
        return invalid(format!("{name} has element type {}, expected {dtype}", view.dtype));
    }
    Ok(())
}

/// Refuses a number of elements other than `count`.
pub(super) fn expect_count(dims: &[usize], count: usize, name: &str) -> Result<(), OpError> {
    if dims.iter().product::<usize>() != count {
        return invalid(format!("{name} has shape {dims:?}, expected {count} elements"));
    }
    Ok(())
}

/// Refuses a shape other than `expected`.
pub(super) fn expect_dims(dims: &[usize], expected: &[usize], name: &str) -> Result<(), OpError> {
    if dims != expected {
        return invalid(format!("{name} has shape {dims:?}, expected {expected:?}"));
    }
    Ok(())
}

/// Number of elements.
pub(super) fn count(dims: &[usize]) -> usize {
    dims.iter().product()
}

/// An axis counted from the front.
pub(super) fn normal_axis(axis: i64, rank: usize) -> Result<usize, OpError> {
    let from_front = if axis < 0 { axis + rank as i64 } else { axis };
    match usize::try_from(from_front) {
        Ok(a) if a < rank => Ok(a),
        _ => invalid(format!("axis {axis} is out of range for {rank} dimensions")),
    }
}

/// Element `index` of an integer tensor.
pub(super) fn integer_at(view: &TensorView<'_>, index: usize) -> Result<i64, OpError> {
    Ok(match view.dtype {
        DType::I64 => view.as_slice::<i64>()[index],
        DType::I32 => view.as_slice::<i32>()[index].into(),
        DType::I16 => view.as_slice::<i16>()[index].into(),
        DType::I8 | DType::I4 => view.as_slice::<i8>()[index].into(),
        DType::U8 | DType::U4 | DType::Bool => view.as_slice::<u8>()[index].into(),
        DType::U16 => view.as_slice::<u16>()[index].into(),
        DType::U32 => view.as_slice::<u32>()[index].into(),
        DType::U64 => i64::try_from(view.as_slice::<u64>()[index])
            .map_err(|_| OpError::Invalid("an integer operand is larger than 2^63 − 1".into()))?,
        other => return invalid(format!("expected an integer tensor, got {other}")),
    })
}

/// Element `index` of a tensor of numbers.
pub(super) fn number_at(view: &TensorView<'_>, index: usize) -> Result<f64, OpError> {
    Ok(match view.dtype {
        DType::F32 => view.as_slice::<f32>()[index].into(),
        DType::F64 => view.as_slice::<f64>()[index],
        DType::F16 => view.as_slice::<half::f16>()[index].into(),
        DType::BF16 => view.as_slice::<half::bf16>()[index].into(),
        _ => integer_at(view, index)? as f64,
    })
}

/// The only element of an integer tensor.
pub(super) fn integer_scalar(view: &TensorView<'_>, name: &str) -> Result<i64, OpError> {
    expect_count(view.dims, 1, name)?;
    integer_at(view, 0)
}

/// The only element of a tensor of numbers.
pub(super) fn number_scalar(view: &TensorView<'_>, name: &str) -> Result<f64, OpError> {
    expect_count(view.dims, 1, name)?;
    number_at(view, 0)
}

/// Stores a number, rounded to the element type; integers truncate and saturate.
pub(super) fn store_number(out: &mut TensorViewMut<'_>, index: usize, value: f64) -> Result<(), OpError> {
    match out.dtype {
        DType::F32 => out.as_mut_slice::<f32>()[index] = value as f32,
        DType::F64 => out.as_mut_slice::<f64>()[index] = value,
        DType::F16 => out.as_mut_slice::<half::f16>()[index] = half::f16::from_f64(value),
        DType::BF16 => out.as_mut_slice::<half::bf16>()[index] = half::bf16::from_f64(value),
        DType::I8 => out.as_mut_slice::<i8>()[index] = value as i8,
        DType::I16 => out.as_mut_slice::<i16>()[index] = value as i16,
        DType::I32 => out.as_mut_slice::<i32>()[index] = value as i32,
        DType::I64 => out.as_mut_slice::<i64>()[index] = value as i64,
        DType::U8 => out.as_mut_slice::<u8>()[index] = value as u8,
        DType::U16 => out.as_mut_slice::<u16>()[index] = value as u16,
        DType::U32 => out.as_mut_slice::<u32>()[index] = value as u32,
        DType::U64 => out.as_mut_slice::<u64>()[index] = value as u64,
        DType::Bool => out.as_mut_slice::<u8>()[index] = u8::from(value != 0.0),
        other => return unsupported(format!("results of element type {other}")),
    }
    Ok(())
}

/// The workspace as elements of `T`, `count` of them.
pub(super) fn scratch<T: bytemuck::Pod>(workspace: &mut [u8], count: usize) -> Result<&mut [T], OpError> {
    let bytes = count * size_of::<T>();
    if workspace.len() < bytes {
        return invalid(format!("the workspace has {} bytes, expected {bytes}", workspace.len()));
    }
    bytemuck::try_cast_slice_mut(&mut workspace[..bytes])
        .map_err(|_| OpError::Invalid("the workspace is not aligned to 8 bytes".into()))
}

/// Runs `$body` with `$t` standing for the Rust type of a floating-point element type.
macro_rules! with_real {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            lightering_graph::DType::F32 => {
                type $t = f32;
                $body
            }
            lightering_graph::DType::F64 => {
                type $t = f64;
                $body
            }
            lightering_graph::DType::F16 => {
                type $t = half::f16;
                $body
            }
            lightering_graph::DType::BF16 => {
                type $t = half::bf16;
                $body
            }
            other => $crate::ops::operands::unsupported(format!("element type {other}")),
        }
    };
}
pub(super) use with_real;
