//! How large a data-dependent result can get.

use super::{Fact, infer_node};
use crate::{DType, Node, Op, TensorType};

/// The largest types that a node's results can have, one per entry of `node.outputs`, for operators whose result
/// shapes depend on the data but have a natural limit; `None` when there is none or an operand's shape is open.
///
/// `NonZero`: every element. `Compress` and `Unique`: the whole operand. `NonMaxSuppression`:
/// `batch · classes · min(max_per_class, boxes)` rows of 3.
pub fn upper_bound(node: &Node, inputs: &[Option<Fact<'_>>]) -> Option<Vec<TensorType>> {
    let operand = |i: usize| inputs.get(i).copied().flatten().and_then(|f| f.ty.tensor());
    let x = operand(0)?;
    let (dims, elements) = (x.dims()?, x.elements()?);
    let list = |n: usize| TensorType::fixed(DType::I64, &[n]);
    let along = |axis: &Option<i64>| match axis {
        None => Some((vec![elements], elements)),
        Some(a) => {
            let at = super::operands::axis_of(*a, dims.len(), "axis").ok()?;
            Some((dims.clone(), dims[at]))
        }
    };
    let mut bounds = match &node.op {
        Op::NonZero => vec![TensorType::fixed(DType::I64, &[dims.len(), elements])],
        Op::Compress { axis } => {
            let (mut dims, _) = along(axis)?;
            // No more is kept than the condition has elements.
            if let Some(n) = operand(1).and_then(TensorType::elements) {
                let at = axis.map_or(Some(0), |a| super::operands::axis_of(a, dims.len(), "axis").ok())?;
                dims[at] = dims[at].min(n);
            }
            vec![TensorType::fixed(x.dtype, &dims)]
        }
        Op::Unique { axis, .. } => {
            let (dims, count) = along(axis)?;
            vec![TensorType::fixed(x.dtype, &dims), list(count), list(count), list(count)]
        }
        Op::NonMaxSuppression { .. } => {
            let scores = operand(1)?.dims()?;
            let [batch, classes, boxes] = scores[..] else { return None };
            let most = match inputs.get(2).copied().flatten() {
                // Absent means none at all.
                None => 0,
                Some(f) => match f.value.and_then(|t| t.to_i64s()).and_then(|v| v.first().copied()) {
                    Some(n) => usize::try_from(n.max(0)).ok()?.min(boxes),
                    None => boxes,
                },
            };
            let rows = batch.checked_mul(classes)?.checked_mul(most)?;
            vec![TensorType::fixed(DType::I64, &[rows, 3])]
        }
        _ => return None,
    };
    infer_node(node, inputs).ok()?;
    bounds.truncate(node.outputs.len());
    bounds.iter().all(|b| b.size_bytes().is_some()).then_some(bounds)
}
