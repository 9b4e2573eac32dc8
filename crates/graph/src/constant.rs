use std::sync::Arc;

use lightering_units::Bytes;
use serde::{Deserialize, Serialize};

use crate::Tensor;

/// Index into [`Graph::sources`](crate::Graph::sources): which file (or other store) holds a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SourceId(pub u32);

/// A constant whose bytes stay where they are until the plan moves them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StoredTensor {
    /// Which store.
    pub source: SourceId,
    /// First byte of the little-endian, row-major elements.
    pub offset: u64,
    /// How many bytes, which is the size of the value's type.
    pub size: Bytes,
}

/// Where the elements of a constant are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Constant {
    /// In memory; for small tensors, shapes and folded values.
    Inline(Arc<Tensor>),
    /// In a store outside, for weights.
    Stored(StoredTensor),
}

impl Constant {
    /// The tensor, if it is in memory.
    pub fn inline(&self) -> Option<&Tensor> {
        match self {
            Constant::Inline(t) => Some(t),
            Constant::Stored(_) => None,
        }
    }
}
