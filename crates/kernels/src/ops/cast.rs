//! From one element type to another.

use half::{bf16, f16};
use lightering_units::DType;

use super::block::{BLOCK, Class, Compute, class, for_blocks};
use super::{OpError, TensorView, TensorViewMut, expect_same_count, float8};
use crate::ThreadPool;

/// Converts every element: floats round to nearest even, floats to integers truncate, integers wrap, anything but
/// zero is true. `saturate` keeps 8-bit floats finite where they overflow.
///
/// # Errors
/// [`OpError::Unsupported`] for complex numbers.
pub fn cast(pool: &ThreadPool, x: &TensorView, saturate: bool, y: &mut TensorViewMut) -> Result<(), OpError> {
    expect_same_count(x, y)?;
    if x.dtype == y.dtype {
        y.bytes.copy_from_slice(x.bytes);
        return Ok(());
    }
    let refuse = || OpError::Unsupported(format!("Cast from {} to {}", x.dtype, y.dtype));
    let from = class(x.dtype).ok_or_else(refuse)?;
    let to = class(y.dtype).ok_or_else(refuse)?;
    let target = y.dtype;
    if matches!(
        target,
        DType::F8E4M3FN | DType::F8E4M3FNUZ | DType::F8E5M2 | DType::F8E5M2FNUZ | DType::F4E2M1
    ) {
        for_blocks(pool, y, &|start, bytes| {
            let mut buffer = [0f32; BLOCK];
            f32::load(x.dtype, x.bytes, start, &mut buffer[..bytes.len()]);
            bytes.iter_mut().zip(&buffer).for_each(|(o, &v)| *o = float8::encode(target, v, saturate));
        });
        return Ok(());
    }
    if matches!(target, DType::I4 | DType::U4) && matches!(from, Class::F32 | Class::F64) {
        let (low, high) = if target == DType::I4 { (-8.0, 7.0) } else { (0.0, 15.0) };
        for_blocks(pool, y, &|start, bytes| {
            let mut buffer = [0f64; BLOCK];
            let values = &mut buffer[..bytes.len()];
            f64::load(x.dtype, x.bytes, start, values);
            values.iter_mut().for_each(|v| *v = v.clamp(low, high));
            f64::store(target, values, bytes);
        });
        return Ok(());
    }
    match (x.dtype, target) {
        // The common pairs of half precision, by whole slices.
        (DType::F16, DType::F32) => {
            let (x, y) = (x.as_slice::<f16>(), y.as_mut_slice::<f32>());
            half::slice::HalfFloatSliceExt::convert_to_f32_slice(x, y);
        }
        (DType::F32, DType::F16) => {
            let (x, y) = (x.as_slice::<f32>(), y.as_mut_slice::<f16>());
            half::slice::HalfFloatSliceExt::convert_from_f32_slice(y, x);
        }
        (DType::BF16, DType::F32) => {
            let (x, y) = (x.as_slice::<bf16>(), y.as_mut_slice::<f32>());
            half::slice::HalfFloatSliceExt::convert_to_f32_slice(x, y);
        }
        (DType::F32, DType::BF16) => {
            let (x, y) = (x.as_slice::<f32>(), y.as_mut_slice::<bf16>());
            half::slice::HalfFloatSliceExt::convert_from_f32_slice(y, x);
        }
        _ => {
            let run_f64 = |start: usize, bytes: &mut [u8]| convert::<f64>(x, target, start, bytes);
            let run_i64 = |start: usize, bytes: &mut [u8]| convert::<i64>(x, target, start, bytes);
            let run_u64 = |start: usize, bytes: &mut [u8]| convert::<u64>(x, target, start, bytes);
            // Integers that stay integers must not pass through a float, and a float that becomes an integer
            // should see the widest range that the target has.
            let via_integer = !matches!(from, Class::F32 | Class::F64);
            match (via_integer, from, to) {
                (true, Class::U64, _) => for_blocks(pool, y, &run_u64),
                (true, _, _) => for_blocks(pool, y, &run_i64),
                (false, _, Class::I64) => for_blocks(pool, y, &run_i64),
                (false, _, Class::U64) if target == DType::U64 => for_blocks(pool, y, &run_u64),
                // Negative floats wrap into unsigned integers as the C cast by way of a signed one does.
                (false, _, Class::U64) if target != DType::Bool => for_blocks(pool, y, &run_i64),
                (false, _, _) => for_blocks(pool, y, &run_f64),
            }
        }
    }
    Ok(())
}

fn convert<C: Compute>(x: &TensorView, target: DType, start: usize, bytes: &mut [u8]) {
    let mut buffer = [C::ZERO; BLOCK];
    let values = &mut buffer[..bytes.len() / target.size_bytes()];
    C::load(x.dtype, x.bytes, start, values);
    C::store(target, values, bytes);
}
