use bytemuck::Pod;
use lightering_units::DType;

/// A tensor that somebody else owns: contiguous, row-major, at least 8-byte aligned.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Element type; never `String`.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub dims: &'a [usize],
    /// The elements.
    pub bytes: &'a [u8],
}

/// A tensor to be written that somebody else owns; see [`TensorView`].
#[derive(Debug)]
pub struct TensorViewMut<'a> {
    /// Element type; never `String`.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub dims: &'a [usize],
    /// The elements.
    pub bytes: &'a mut [u8],
}

impl<'a> TensorView<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// True when a dimension is 0.
    pub fn is_empty(&self) -> bool {
        self.dims.contains(&0)
    }

    /// The elements as `T`, which must be as wide as the element type.
    ///
    /// # Panics
    /// When the widths differ.
    pub fn as_slice<T: Pod>(&self) -> &'a [T] {
        assert_eq!(size_of::<T>(), self.dtype.size_bytes(), "{} read as another type", self.dtype);
        bytemuck::cast_slice(self.bytes)
    }
}

impl TensorViewMut<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// True when a dimension is 0.
    pub fn is_empty(&self) -> bool {
        self.dims.contains(&0)
    }

    /// The same tensor, to be read.
    pub fn as_view(&self) -> TensorView<'_> {
        TensorView { dtype: self.dtype, dims: self.dims, bytes: self.bytes }
    }

    /// The same tensor for a shorter time.
    pub fn reborrow(&mut self) -> TensorViewMut<'_> {
        TensorViewMut { dtype: self.dtype, dims: self.dims, bytes: self.bytes }
    }

    /// The elements, to be overwritten.
    ///
    /// # Panics
    /// When the widths differ.
    pub fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        assert_eq!(size_of::<T>(), self.dtype.size_bytes(), "{} written as another type", self.dtype);
        bytemuck::cast_slice_mut(self.bytes)
    }
}

/// Why an operator could not be computed; the caller adds the node's name.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum OpError {
    /// The operands contradict the operator: an index out of range, shapes that do not fit.
    #[error("{0}")]
    Invalid(String),
    /// Legal, but nothing here can do it; names the operator, type or attribute.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// The counted heap refused.
    #[error("memory: {0}")]
    Budget(String),
}
