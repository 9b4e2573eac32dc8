use lightering_units::{DType, Element};

use crate::{Error, Result};

/// Largest tensor that is decoded into memory in one piece.
pub const MAX_TENSOR_BYTES: u64 = 1 << 36;

/// A tensor in ordinary memory, elements little-endian in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    dtype: DType,
    shape: Vec<usize>,
    values: TensorValues,
}

/// The elements of a [`HostTensor`].
#[derive(Clone, Debug, PartialEq)]
pub enum TensorValues {
    /// Elements of fixed size, in the layout that [`DType`] describes.
    Bytes(Vec<u8>),
    /// Texts.
    Strings(Vec<String>),
}

/// A value as test data and program inputs carry it.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A tensor.
    Tensor(HostTensor),
    /// A sequence of values.
    Sequence(Vec<Value>),
    /// A value that may be absent.
    Optional(Option<Box<Value>>),
    /// A map: its keys (a vector of integers or texts) and a value for each.
    Map(HostTensor, Vec<Value>),
}

/// The number of elements of `shape`, and of bytes they take; an error past [`MAX_TENSOR_BYTES`].
pub(crate) fn checked_size(place: &str, dtype: DType, shape: &[usize]) -> Result<(usize, usize)> {
    let count = if shape.contains(&0) {
        Some(0)
    } else {
        shape.iter().try_fold(1u64, |product, &d| product.checked_mul(d as u64))
    };
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

impl HostTensor {
    /// A tensor from its bytes, whose number must fit the shape.
    pub fn from_bytes(dtype: DType, shape: &[usize], bytes: Vec<u8>) -> Result<HostTensor> {
        let (count, _) = checked_size("tensor", dtype, shape)?;
        if dtype == DType::String || bytes.len() != count * dtype.size_bytes() {
            return Err(Error::invalid(
                "tensor",
                format!("{} bytes for a {dtype} tensor of shape {shape:?}", bytes.len()),
                format!("{} bytes", count * dtype.size_bytes()),
            ));
        }
        Ok(HostTensor { dtype, shape: shape.to_vec(), values: TensorValues::Bytes(bytes) })
    }

    /// A tensor from typed elements, whose number must fit the shape.
    pub fn from_slice<T: Element>(shape: &[usize], elements: &[T]) -> Result<HostTensor> {
        Self::from_bytes(T::DTYPE, shape, bytemuck::cast_slice(elements).to_vec())
    }

    /// A tensor of texts, whose number must fit the shape.
    pub fn from_strings(shape: &[usize], strings: Vec<String>) -> Result<HostTensor> {
        let (count, _) = checked_size("tensor", DType::String, shape)?;
        if strings.len() != count {
            return Err(Error::invalid(
                "tensor",
                format!("{} texts for a tensor of shape {shape:?}", strings.len()),
                format!("{count} texts"),
            ));
        }
        let values = TensorValues::Strings(strings);
        Ok(HostTensor { dtype: DType::String, shape: shape.to_vec(), values })
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The number of elements.
    pub fn element_count(&self) -> usize {
        self.shape.iter().product()
    }

    /// The elements.
    pub fn values(&self) -> &TensorValues {
        &self.values
    }

    /// The elements as bytes; empty for texts.
    pub fn bytes(&self) -> &[u8] {
        match &self.values {
            TensorValues::Bytes(bytes) => bytes,
            TensorValues::Strings(_) => &[],
        }
    }

    /// The texts, if the tensor holds texts.
    pub fn strings(&self) -> Option<&[String]> {
        match &self.values {
            TensorValues::Bytes(_) => None,
            TensorValues::Strings(strings) => Some(strings),
        }
    }

    /// A copy of the elements as `T`, if that is their type.
    pub fn to_vec<T: Element>(&self) -> Option<Vec<T>> {
        (self.dtype == T::DTYPE).then(|| bytemuck::pod_collect_to_vec(self.bytes()))
    }

    /// Its parts: type, shape, elements.
    pub fn into_parts(self) -> (DType, Vec<usize>, TensorValues) {
        (self.dtype, self.shape, self.values)
    }
}
