//! Functions and average pools of 8-bit elements, which fusion makes of "dequantise, compute, quantise".

use lightering_graph::{DType, Op, PoolKind};
use lightering_kernels::ops::quantized_elementwise::{
    ByteOperand, ByteQuantization, byte_table, quantized_average_pool, quantized_binary, quantized_unary,
};

use super::elementwise::{binary, unary};
use super::operands::{expect_count, expect_dtype, integer_at, number_scalar, required, unsupported};
use super::quantization::activated_bounds;
use super::windows::pooling_shape;
use super::{OpContext, OpError, TensorView, TensorViewMut};

/// Scale and zero point at operands `first` and `first + 1` for elements of type `dtype`.
fn quantization(
    inputs: &[Option<TensorView>],
    first: usize,
    dtype: DType,
    name: &str,
) -> Result<ByteQuantization, OpError> {
    let signed = match dtype {
        DType::U8 => false,
        DType::I8 => true,
        other => return unsupported(format!("{name} of element type {other}, expected u8 or i8")),
    };
    let scale = number_scalar(&required(inputs, first, "scale")?, "the scale")? as f32;
    let zero = required(inputs, first + 1, "zero")?;
    expect_dtype(&zero, dtype, "the zero point")?;
    expect_count(zero.dims, 1, "the zero point")?;
    // A value of an 8-bit type.
    let zero = integer_at(&zero, 0)? as i32;
    Ok(ByteQuantization { signed, zero, scale })
}

/// Dispatch of this family.
pub(super) fn compute(
    op: &Op,
    inputs: &[Option<TensorView>],
    y: &mut TensorViewMut,
    context: &OpContext,
) -> Result<(), OpError> {
    let pool = context.threads;
    let x = required(inputs, 0, "x")?;
    let x_quantization = quantization(inputs, 1, x.dtype, "x")?;
    match op {
        Op::QLinearUnary(function) => {
            let y_quantization = quantization(inputs, 3, y.dtype, "the result")?;
            let table = byte_table(pool, unary(*function), x_quantization, y_quantization)?;
            quantized_unary(pool, &table, x.bytes, y.bytes)
        }
        Op::QLinearBinary { op, activation } => {
            let b = required(inputs, 3, "b")?;
            let b_quantization = quantization(inputs, 4, b.dtype, "b")?;
            let q = quantization(inputs, 6, y.dtype, "the result")?;
            let bounds = activated_bounds(*activation, q.bounds(), q.scale, q.zero)?;
            let a = ByteOperand { data: x.bytes, dims: x.dims, quantization: x_quantization };
            let b = ByteOperand { data: b.bytes, dims: b.dims, quantization: b_quantization };
            quantized_binary(pool, binary(*op), a, b, q, bounds, y.dims, y.bytes)
        }
        Op::QLinearPool(a) => {
            if a.kind != PoolKind::Average {
                return unsupported(format!("{:?} pooling of quantised numbers", a.kind));
            }
            let y_quantization = quantization(inputs, 3, y.dtype, "the result")?;
            let shape = pooling_shape(a, &x)?;
            quantized_average_pool(pool, &shape, x.bytes, x_quantization, y.bytes, y_quantization)
        }
        other => Err(super::no_kernel(other)),
    }
}
