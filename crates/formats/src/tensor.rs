use lightering_graph::{DType, Tensor};

use crate::{Error, Result};

/// Largest tensor that is decoded into memory in one piece.
pub const MAX_TENSOR_BYTES: u64 = 1 << 36;

/// A value as test data and program inputs carry it.
#[derive(Clone, Debug, PartialEq)]
pub enum HostValue {
    /// A tensor.
    Tensor(Tensor),
    /// A sequence of values.
    Sequence(Vec<HostValue>),
    /// A value that may be absent.
    Optional(Option<Box<HostValue>>),
    /// A map: its keys (a vector of integers or texts) and a value for each.
    Map(Tensor, Vec<HostValue>),
}

/// The number of elements of `shape`, and of bytes they take; an error past [`MAX_TENSOR_BYTES`].
pub(crate) fn checked_size(place: &str, dtype: DType, shape: &[usize]) -> Result<(usize, usize)> {
    // The product is taken in order and may not overflow even where a later dimension is 0, because whoever
    // multiplies the dimensions again does not look ahead either.
    let count = shape.iter().try_fold(1u64, |product, &d| product.checked_mul(d as u64));
    // A text takes at least the header of its string.
    let element = match dtype {
        DType::String => size_of::<String>(),
        dtype => dtype.size_bytes(),
    } as u64;
    let size = count.and_then(|count| count.checked_mul(element));
    match (count, size) {
        (Some(count), Some(size)) if size <= MAX_TENSOR_BYTES => Ok((count as usize, size as usize)),
        _ => Err(Error::limit(
            place,
            format!("size in bytes of a {dtype} tensor of shape {shape:?}"),
            size.unwrap_or(u64::MAX),
            MAX_TENSOR_BYTES,
        )),
    }
}

/// A tensor from its bytes; an error if their number does not fit.
pub(crate) fn from_bytes(place: &str, dtype: DType, shape: &[usize], bytes: &[u8]) -> Result<Tensor> {
    Tensor::from_bytes(dtype, shape, bytes).map_err(|e| Error::corrupt(place, e))
}
