use bytemuck::Pod;
use lightering_units::{Bytes, DType, Element};
use serde::{Deserialize, Serialize};

use crate::{GraphError, TensorType};

/// The elements of a [`Tensor`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum TensorData {
    /// Little-endian elements, row-major, in 8-byte aligned storage; the last word may be partly used.
    Words(Vec<u64>),
    /// Text elements.
    Strings(Vec<String>),
}

/// A tensor in ordinary memory: small constants, shapes, attribute values, test inputs.
///
/// Large weights are not held like this; see [`Constant::Stored`](crate::Constant::Stored).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "UncheckedTensor")]
pub struct Tensor {
    dtype: DType,
    dims: Vec<usize>,
    data: TensorData,
}

/// What a text form says of a tensor, before anybody has checked that it fits together.
#[derive(Deserialize)]
struct UncheckedTensor {
    dtype: DType,
    dims: Vec<usize>,
    data: TensorData,
}

impl TryFrom<UncheckedTensor> for Tensor {
    type Error = GraphError;

    fn try_from(t: UncheckedTensor) -> Result<Tensor, GraphError> {
        let count = element_count(&t.dims);
        let fits = match &t.data {
            TensorData::Strings(s) => t.dtype == DType::String && count == Some(s.len()),
            TensorData::Words(w) => {
                let bytes = count.and_then(|n| n.checked_mul(t.dtype.size_bytes()));
                t.dtype != DType::String && bytes.map(|b| b.div_ceil(8)) == Some(w.len())
            }
        };
        if !fits {
            return Err(GraphError::Tensor(format!(
                "{}{:?} does not hold the elements given",
                t.dtype, t.dims
            )));
        }
        Ok(Tensor { dtype: t.dtype, dims: t.dims, data: t.data })
    }
}

/// Number of elements of a shape, or `None` on overflow.
fn element_count(dims: &[usize]) -> Option<usize> {
    dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
}

impl Tensor {
    /// A tensor of zeros (empty strings for [`DType::String`]).
    ///
    /// # Panics
    /// When the number of bytes overflows `usize`; check untrusted shapes first.
    pub fn zeros(dtype: DType, dims: &[usize]) -> Tensor {
        let count = element_count(dims).expect("the element count of a tensor fits in usize");
        let data = match dtype {
            DType::String => TensorData::Strings(vec![String::new(); count]),
            _ => {
                let bytes =
                    count.checked_mul(dtype.size_bytes()).expect("the size of a tensor fits in usize");
                TensorData::Words(vec![0; bytes.div_ceil(8)])
            }
        };
        Tensor { dtype, dims: dims.to_vec(), data }
    }

    /// A tensor of shape `dims` with the given elements.
    ///
    /// # Panics
    /// When the number of elements does not match `dims`.
    pub fn from_slice<T: Element>(dims: &[usize], elements: &[T]) -> Tensor {
        assert_eq!(
            element_count(dims),
            Some(elements.len()),
            "shape {dims:?} does not hold the elements given"
        );
        let mut tensor = Tensor::zeros(T::DTYPE, dims);
        tensor.as_bytes_mut().copy_from_slice(bytemuck::cast_slice(elements));
        tensor
    }

    /// A tensor whose in-memory bytes are given.
    ///
    /// # Errors
    /// [`GraphError::Tensor`] when the size does not match or `dtype` is `String`.
    pub fn from_bytes(dtype: DType, dims: &[usize], bytes: &[u8]) -> Result<Tensor, GraphError> {
        let expected = element_count(dims).and_then(|n| n.checked_mul(dtype.size_bytes()));
        if dtype == DType::String || expected != Some(bytes.len()) {
            return Err(GraphError::Tensor(format!(
                "{dtype}{dims:?} takes {} bytes, but {} were given",
                expected.map_or("too many".to_owned(), |n| n.to_string()),
                bytes.len()
            )));
        }
        let mut tensor = Tensor::zeros(dtype, dims);
        tensor.as_bytes_mut().copy_from_slice(bytes);
        Ok(tensor)
    }

    /// A tensor of text.
    ///
    /// # Panics
    /// When the number of elements does not match `dims`.
    pub fn from_strings(dims: &[usize], elements: Vec<String>) -> Tensor {
        assert_eq!(
            element_count(dims),
            Some(elements.len()),
            "shape {dims:?} does not hold the elements given"
        );
        Tensor { dtype: DType::String, dims: dims.to_vec(), data: TensorData::Strings(elements) }
    }

    /// A tensor of rank 0.
    pub fn scalar<T: Element>(element: T) -> Tensor {
        Tensor::from_slice(&[], &[element])
    }

    /// A boolean tensor.
    pub fn from_bools(dims: &[usize], elements: &[bool]) -> Tensor {
        let bytes: Vec<u8> = elements.iter().map(|&b| u8::from(b)).collect();
        let mut tensor = Tensor::from_slice(dims, &bytes);
        tensor.dtype = DType::Bool;
        tensor
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sizes, outermost first.
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// True when a dimension is 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element type and shape.
    pub fn tensor_type(&self) -> TensorType {
        TensorType::fixed(self.dtype, &self.dims)
    }

    /// Bytes that the elements take (text: the sum of the lengths).
    pub fn size_bytes(&self) -> Bytes {
        match &self.data {
            TensorData::Words(_) => Bytes((self.len() * self.dtype.size_bytes()) as u64),
            TensorData::Strings(s) => Bytes(s.iter().map(|s| s.len() as u64).sum()),
        }
    }

    /// The in-memory bytes; empty for text.
    pub fn as_bytes(&self) -> &[u8] {
        match &self.data {
            TensorData::Words(words) => &bytemuck::cast_slice(words)[..self.len() * self.dtype.size_bytes()],
            TensorData::Strings(_) => &[],
        }
    }

    /// The in-memory bytes, to be overwritten; empty for text.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        let size = self.len() * self.dtype.size_bytes();
        match &mut self.data {
            TensorData::Words(words) => &mut bytemuck::cast_slice_mut(words)[..size],
            TensorData::Strings(_) => &mut [],
        }
    }

    /// The elements as `T`, whose size must be the element size: `u8` also reads bool, 4-bit and 8-bit floats.
    ///
    /// # Panics
    /// When the sizes differ or the tensor holds text.
    pub fn as_slice<T: Pod>(&self) -> &[T] {
        assert_eq!(size_of::<T>(), self.dtype.size_bytes(), "{} read as another type", self.dtype);
        bytemuck::cast_slice(self.as_bytes())
    }

    /// The elements, to be overwritten; see [`as_slice`](Self::as_slice).
    ///
    /// # Panics
    /// When the sizes differ or the tensor holds text.
    pub fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        assert_eq!(size_of::<T>(), self.dtype.size_bytes(), "{} read as another type", self.dtype);
        bytemuck::cast_slice_mut(self.as_bytes_mut())
    }

    /// The text elements; empty for numbers.
    pub fn as_strings(&self) -> &[String] {
        match &self.data {
            TensorData::Words(_) => &[],
            TensorData::Strings(s) => s,
        }
    }

    /// The text elements, to be overwritten; empty for numbers.
    pub fn as_mut_strings(&mut self) -> &mut [String] {
        match &mut self.data {
            TensorData::Words(_) => &mut [],
            TensorData::Strings(s) => s,
        }
    }

    /// Every element as an integer, for shapes, axes and the like; `None` when this is not an integer or bool tensor
    /// or an element does not fit.
    pub fn to_i64s(&self) -> Option<Vec<i64>> {
        Some(match self.dtype {
            DType::I64 => self.as_slice::<i64>().to_vec(),
            DType::I32 => self.as_slice::<i32>().iter().map(|&x| x.into()).collect(),
            DType::I16 => self.as_slice::<i16>().iter().map(|&x| x.into()).collect(),
            DType::I8 | DType::I4 => self.as_slice::<i8>().iter().map(|&x| x.into()).collect(),
            DType::U8 | DType::U4 | DType::Bool => self.as_slice::<u8>().iter().map(|&x| x.into()).collect(),
            DType::U16 => self.as_slice::<u16>().iter().map(|&x| x.into()).collect(),
            DType::U32 => self.as_slice::<u32>().iter().map(|&x| x.into()).collect(),
            DType::U64 => {
                self.as_slice::<u64>().iter().map(|&x| i64::try_from(x).ok()).collect::<Option<_>>()?
            }
            _ => return None,
        })
    }

    /// Every element as `f64`; `None` for text, complex and the 4-bit and 8-bit float types.
    pub fn to_f64s(&self) -> Option<Vec<f64>> {
        Some(match self.dtype {
            DType::F32 => self.as_slice::<f32>().iter().map(|&x| x.into()).collect(),
            DType::F64 => self.as_slice::<f64>().to_vec(),
            DType::F16 => self.as_slice::<half::f16>().iter().map(|&x| x.into()).collect(),
            DType::BF16 => self.as_slice::<half::bf16>().iter().map(|&x| x.into()).collect(),
            DType::U64 => self.as_slice::<u64>().iter().map(|&x| x as f64).collect(),
            _ => self.to_i64s()?.into_iter().map(|x| x as f64).collect(),
        })
    }

    /// The same elements under another shape.
    ///
    /// # Panics
    /// When the number of elements differs.
    pub fn into_shape(mut self, dims: &[usize]) -> Tensor {
        assert_eq!(element_count(dims), Some(self.len()), "{:?} does not reshape to {dims:?}", self.dims);
        self.dims = dims.to_vec();
        self
    }

    /// The same bytes under another element type of the same size (`u8` to `bool`, `u8` to an 8-bit float, …).
    ///
    /// # Panics
    /// When the element sizes differ.
    pub fn into_dtype(mut self, dtype: DType) -> Tensor {
        assert_eq!(dtype.size_bytes(), self.dtype.size_bytes(), "{} is not as wide as {dtype}", self.dtype);
        self.dtype = dtype;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_elements_agree() {
        let t = Tensor::from_slice(&[3], &[1i16, -2, 3]);
        assert_eq!(t.as_bytes().len(), 6);
        assert_eq!(t.to_i64s(), Some(vec![1, -2, 3]));
        let again = Tensor::from_bytes(DType::I16, &[3], t.as_bytes()).unwrap();
        assert_eq!(again, t);
        assert!(Tensor::from_bytes(DType::I16, &[4], t.as_bytes()).is_err());
        assert!(Tensor::from_bytes(DType::I16, &[usize::MAX, 2], t.as_bytes()).is_err());
    }

    #[test]
    fn empty_and_scalar() {
        assert!(Tensor::zeros(DType::F32, &[2, 0]).is_empty());
        assert_eq!(Tensor::scalar(5i64).to_i64s(), Some(vec![5]));
    }
}
