//! Rewrites of a graph into an equal, better graph.

use crate::{Graph, GraphError, Node, Tensor};

/// Computes a node whose operands are all known. The executor implements it; passes use it to fold constants.
pub trait Evaluate {
    /// The results of `node` (one per entry of `node.outputs`), or `None` when this node cannot be folded
    /// (random numbers, results that would be too large, operators without a kernel).
    ///
    /// # Errors
    /// When the operands contradict the operator.
    fn evaluate(&self, node: &Node, inputs: &[Option<&Tensor>]) -> Result<Option<Vec<Tensor>>, GraphError>;
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
