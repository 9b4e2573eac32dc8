//! Quantisation and 8-bit operators that fusion makes.

use super::broadcast::{broadcast, shown};
use super::operands::*;
use crate::{DType, Dim, QuantizeAttributes, ValueType};

/// Whether elements of this type are what quantisation yields.
fn is_quantized(d: DType) -> bool {
    d.is_integer() && d.size_bytes() <= 2
        || d == DType::I32
        || matches!(
            d,
            DType::F8E4M3FN | DType::F8E4M3FNUZ | DType::F8E5M2 | DType::F8E5M2FNUZ | DType::F4E2M1
        )
}

/// One scale, one per slice along the axis, or one per block.
fn require_scale_shape(x: &Known, scale: &Known, a: &QuantizeAttributes) -> Rule<()> {
    let (Some(s), Some(t)) = (&x.shape, &scale.shape) else { return Ok(()) };
    // One scale for all, in either spelling.
    if t.is_empty() || *t == [Dim::Fixed(1)] {
        return Ok(());
    }
    let axis = axis_of(a.axis, s.len(), "axis")?;
    if a.block_size == 0 {
        return scale.require_shape(&s[axis..=axis]);
    }
    let mut expected = s.clone();
    expected[axis] = match &s[axis] {
        Dim::Fixed(n) => Dim::Fixed(n.div_ceil(a.block_size)),
        _ => Dim::UNKNOWN,
    };
    scale.require_shape(&expected)
}

/// As many zero points as scales; a single one may be spelled as a scalar or a list.
fn require_zero_shape(zero: &Known, scale: &Known) -> Rule<()> {
    match &scale.shape {
        Some(s) if scale.elements() == Some(1) && s.len() <= 1 => zero.require_single(),
        Some(s) => zero.require_shape(s),
        None => Ok(()),
    }
}

pub(super) fn quantize_linear(o: &Operands<'_>, a: &QuantizeAttributes) -> Rule<Vec<ValueType>> {
    let (x, scale) = (o.tensor(0, "x")?, o.tensor(1, "scale")?);
    let zero = o.optional(2, "zero")?;
    require_scale_shape(&x, &scale, a)?;
    if let Some(zero) = &zero {
        require_zero_shape(zero, &scale)?;
    }
    let dtype = match (&zero, a.output_dtype) {
        (Some(zero), Some(d)) if zero.dtype.is_some_and(|z| z != d) => {
            return Err(format!("zero is {}, but the result type is {d}", zero.to_type()));
        }
        (Some(zero), _) => zero.dtype.or(a.output_dtype),
        (None, d) => d.or(Some(DType::U8)),
    };
    if let Some(d) = dtype.filter(|d| !is_quantized(*d)) {
        return Err(format!("the result type is {d}, expected a quantised one"));
    }
    Ok(vec![typed(dtype, x.shape)])
}

pub(super) fn dequantize_linear(o: &Operands<'_>, a: &QuantizeAttributes) -> Rule<Vec<ValueType>> {
    let (x, scale) = (o.tensor(0, "x")?, o.tensor(1, "scale")?);
    if let Some(d) = x.dtype.filter(|d| !is_quantized(*d)) {
        return Err(format!("x has element type {d}, expected a quantised one"));
    }
    require_scale_shape(&x, &scale, a)?;
    if let Some(zero) = o.optional(2, "zero")? {
        same_dtype(&[&x, &zero])?;
        require_zero_shape(&zero, &scale)?;
    }
    let dtype = a.output_dtype.or(scale.dtype);
    if let Some(d) = dtype.filter(|d| !d.is_float()) {
        return Err(format!("the result type is {d}, expected a floating-point type"));
    }
    Ok(vec![typed(dtype, x.shape)])
}

pub(super) fn dynamic_quantize(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require(Class::Float)?;
    let scalar = Some(Vec::new());
    Ok(vec![
        typed(Some(DType::U8), x.shape),
        typed(Some(DType::F32), scalar.clone()),
        typed(Some(DType::U8), scalar),
    ])
}

/// `(x, scale, zero)` starting at operand `first`.
pub(super) fn qlinear_operand(o: &Operands<'_>, first: usize) -> Rule<Known> {
    let x = o.tensor(first, "operand")?;
    x.require(Class::Byte)?;
    o.tensor(first + 1, "scale")?.require(Class::Float)?;
    if let Some(zero) = o.optional(first + 2, "zero")? {
        same_dtype(&[&x, &zero])?;
    }
    Ok(x)
}

/// The element type that `(y_scale, y_zero)` starting at operand `first` stand for.
pub(super) fn qlinear_result(o: &Operands<'_>, first: usize) -> Rule<Option<DType>> {
    o.tensor(first, "y_scale")?.require(Class::Float)?;
    let zero = o.tensor(first + 1, "y_zero")?;
    zero.require(Class::Byte)?;
    Ok(zero.dtype)
}

pub(super) fn qlinear_unary(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let x = qlinear_operand(o, 0)?;
    Ok(vec![typed(qlinear_result(o, 3)?, x.shape)])
}

pub(super) fn qlinear_binary(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let (a, b) = (qlinear_operand(o, 0)?, qlinear_operand(o, 3)?);
    let shape = match (&a.shape, &b.shape) {
        (Some(s), Some(t)) => {
            Some(broadcast(s, t).map_err(|e| format!("a {} and b {}: {e}", shown(s), shown(t)))?)
        }
        _ => None,
    };
    Ok(vec![typed(qlinear_result(o, 6)?, shape)])
}
