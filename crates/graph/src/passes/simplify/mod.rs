//! Algebraic simplification: the same values with fewer or plainer operators.

mod algebra;
mod movement;
mod window;

pub(crate) use algebra::{bounds, limit};
pub(crate) use movement::reshape_groups;
pub(crate) use window::{reduced_axes, spatial};

use super::editor::Editor;
use crate::{Graph, GraphError, NodeId, Pass};

/// Most rewrites of one node in one run; the pipeline runs again until nothing changes.
const REWRITES_PER_NODE_MAX: usize = 16;

/// Removes operators that change nothing (adding 0, dropout, reshapes to the same shape, …) and brings the rest to
/// one spelling each, so that later passes have to know that one only: reshapes of all kinds to `Reshape`, limits to
/// `Relu` and `ClipTo`, `Gemm` to `MatMul`, paddings to explicit numbers, means over the picture to `GlobalPool`.
///
/// Values change by rounding at most where a scale moves into a product; everything else is exact.
#[derive(Clone, Copy, Debug, Default)]
pub struct Simplify;

/// A rewrite of one node; true when it has changed something.
type Rule = fn(&mut Editor, NodeId) -> bool;

const RULES: &[Rule] = &[
    algebra::neutral_operand,
    algebra::identity,
    algebra::power,
    algebra::division,
    algebra::reciprocal,
    algebra::limits,
    algebra::limits_of_limits,
    algebra::variadic,
    algebra::leaky,
    algebra::gemm,
    algebra::requantised,
    algebra::transposed_operand,
    movement::no_movement,
    movement::reshape_kinds,
    movement::reshape_of_reshape,
    movement::transpose,
    movement::gather_one,
    movement::slice_of_transpose,
    movement::slice_of_reshape,
    movement::expanded_operand,
    window::explicit,
    window::padded,
    window::whole_picture,
    window::spatial_mean,
];

impl Pass for Simplify {
    fn name(&self) -> &'static str {
        "simplification"
    }

    fn run(&self, graph: &mut Graph) -> Result<usize, GraphError> {
        let mut e = Editor::new(graph);
        for id in e.ids() {
            for _ in 0..REWRITES_PER_NODE_MAX {
                if !RULES.iter().any(|rule| e.get(id).is_some() && rule(&mut e, id)) {
                    break;
                }
            }
        }
        e.finish()
    }
}

#[cfg(test)]
mod tests;
