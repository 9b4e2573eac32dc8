use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::DType;

/// One dimension of a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Dim {
    /// Known size.
    Fixed(usize),
    /// Named, bound when the inputs are ("batch").
    Symbol(Arc<str>),
    /// Not known before the node runs, or not yet inferred.
    Unknown(()),
}

impl Dim {
    /// A dimension that nobody knows yet.
    pub const UNKNOWN: Dim = Dim::Unknown(());

    /// The size, if it is fixed.
    pub fn fixed(&self) -> Option<usize> {
        match self {
            Dim::Fixed(n) => Some(*n),
            _ => None,
        }
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Fixed(n) => write!(f, "{n}"),
            Dim::Symbol(name) => f.write_str(name),
            Dim::Unknown(()) => f.write_str("?"),
        }
    }
}

/// The dimensions of a tensor, outermost first.
pub type Shape = Vec<Dim>;

/// Element type and shape of a tensor; the shape is `None` when not even the rank is known.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TensorType {
    /// Element type.
    pub dtype: DType,
    /// Dimensions, if the rank is known.
    pub shape: Option<Shape>,
}

impl TensorType {
    /// A tensor of known shape.
    pub fn fixed(dtype: DType, dims: &[usize]) -> TensorType {
        TensorType { dtype, shape: Some(dims.iter().map(|&d| Dim::Fixed(d)).collect()) }
    }

    /// A tensor of unknown rank.
    pub fn unranked(dtype: DType) -> TensorType {
        TensorType { dtype, shape: None }
    }

    /// The sizes, if every dimension is fixed.
    pub fn dims(&self) -> Option<Vec<usize>> {
        self.shape.as_ref()?.iter().map(Dim::fixed).collect()
    }

    /// Number of elements, if every dimension is fixed and the product does not overflow.
    pub fn elements(&self) -> Option<usize> {
        self.shape.as_ref()?.iter().try_fold(1usize, |n, d| n.checked_mul(d.fixed()?))
    }

    /// Bytes in memory, if every dimension is fixed.
    pub fn size_bytes(&self) -> Option<usize> {
        self.elements()?.checked_mul(self.dtype.size_bytes())
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.dtype)?;
        match &self.shape {
            None => f.write_str("[*]"),
            Some(dims) => {
                f.write_str("[")?;
                for (i, d) in dims.iter().enumerate() {
                    if i > 0 {
                        f.write_str(",")?;
                    }
                    write!(f, "{d}")?;
                }
                f.write_str("]")
            }
        }
    }
}

/// What a value holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ValueType {
    /// A tensor.
    Tensor(TensorType),
    /// A list of values of one type.
    Sequence(Box<ValueType>),
    /// A value that may be absent.
    Optional(Box<ValueType>),
    /// A dictionary from keys (`i64` or `string`) to values of one element type, as ONNX-ML classifiers yield.
    Map {
        /// Type of the keys.
        key: DType,
        /// Type of the values.
        value: DType,
    },
    /// Not inferred yet.
    Unknown,
}

impl ValueType {
    /// The tensor type, if this is a tensor.
    pub fn tensor(&self) -> Option<&TensorType> {
        match self {
            ValueType::Tensor(t) => Some(t),
            _ => None,
        }
    }
}

impl From<TensorType> for ValueType {
    fn from(t: TensorType) -> ValueType {
        ValueType::Tensor(t)
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ValueType::Tensor(t) => write!(f, "{t}"),
            ValueType::Sequence(t) => write!(f, "seq({t})"),
            ValueType::Optional(t) => write!(f, "opt({t})"),
            ValueType::Map { key, value } => write!(f, "map({key},{value})"),
            ValueType::Unknown => f.write_str("?"),
        }
    }
}
