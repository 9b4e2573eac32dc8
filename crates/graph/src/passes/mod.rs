//! Rewrites of a graph into an equal, better graph.

mod batch_norm_for_training;
mod bind;
mod common_subexpression;
mod dead_code;
mod editor;
mod fold;
mod fuse;
mod layout;
mod pipeline;
mod place_updates;
mod recompute;
mod saved_tensors;
mod simplify;
#[cfg(test)]
pub(crate) mod testing;

pub use batch_norm_for_training::{BatchNormForTraining, BatchNormMode};
pub use common_subexpression::CommonSubexpression;
pub use dead_code::DeadCode;
pub use fold::{Fold, INLINE_MAX};
pub use fuse::{
    ActivationFusion, AttentionFusion, BatchNormFusion, ElementwiseFusion, EpilogueFusion,
    NormalizationFusion, QuantizedFusion,
};
pub use layout::LayoutChoice;
pub use pipeline::{PassReport, Pipeline, run_all};
pub use place_updates::PlaceUpdates;
pub use recompute::ForwardPass;
pub use saved_tensors::{keep_signs, slice_weight_gradient};
pub use simplify::Simplify;

use crate::{Graph, GraphError, Node, StoredTensor, Tensor, TensorType};

/// Computes a node whose operands are all known. The executor implements it; passes use it to fold constants.
pub trait Evaluate {
    /// The results of `node` (one per entry of `node.outputs`), or `None` when this node cannot be folded
    /// (random numbers, results that would be too large, operators without a kernel).
    ///
    /// # Errors
    /// When the operands contradict the operator.
    fn evaluate(&self, node: &Node, inputs: &[Option<&Tensor>]) -> Result<Option<Vec<Tensor>>, GraphError>;

    /// Reads a stored constant, or `None` when its store is not at hand. Passes ask only for vectors of one element
    /// per channel (statistics of a normalisation, scales, biases), never for weights.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn load(&self, stored: &StoredTensor, ty: &TensorType) -> Result<Option<Tensor>, GraphError> {
        let _ = (stored, ty);
        Ok(None)
    }
}

/// A rewrite with a name that shows in `lighter plan --passes`.
pub trait Pass {
    /// A noun phrase: `constant folding`, `layout`.
    fn name(&self) -> &'static str;

    /// Rewrites `graph`; returns how many places changed. The graph verifies before and after.
    ///
    /// # Errors
    /// When the graph turns out to be contradictory.
    fn run(&self, graph: &mut Graph) -> Result<usize, GraphError>;
}
