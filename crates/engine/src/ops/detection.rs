//! Non-maximum suppression.

use lightering_graph::{DType, Op, Tensor};
use lightering_kernels::ops::suppression::{BoxFormat, suppress};

use super::heap::{allocate, as_view, ask, optional_input, tensor_input};
use super::operands::*;
use super::{OpContext, OpError};
use crate::RuntimeValue;

/// Dispatch of this family: boxes `[batch, boxes, 4]` and scores `[batch, classes, boxes]` give the chosen
/// `[batch, class, box]` triples.
pub(super) fn compute_dynamic(
    op: &Op,
    inputs: &[Option<&RuntimeValue>],
    context: &OpContext,
) -> Result<Vec<Option<RuntimeValue>>, OpError> {
    let Op::NonMaxSuppression { center_point_box } = op else { return Err(super::no_kernel(op)) };
    let (boxes, scores) = (tensor_input(inputs, 0, "the boxes")?, tensor_input(inputs, 1, "the scores")?);
    let (&[batch, count, 4], &[score_batch, classes, score_count]) = (boxes.dims(), scores.dims()) else {
        return invalid(format!("boxes of shape {:?} and scores of shape {:?}", boxes.dims(), scores.dims()));
    };
    if batch != score_batch || count != score_count {
        return invalid(format!("boxes of shape {:?} and scores of shape {:?}", boxes.dims(), scores.dims()));
    }
    for t in [boxes, scores] {
        expect_dtype(&as_view(t), DType::F32, "boxes and scores")?;
    }
    let number = |index: usize, name: &str| -> Result<Option<f64>, OpError> {
        match optional_input(inputs, index) {
            None => Ok(None),
            Some(_) => {
                let t = tensor_input(inputs, index, name)?;
                if t.is_empty() { Ok(None) } else { number_scalar(&as_view(t), name).map(Some) }
            }
        }
    };
    let max_kept = number(2, "max_output_boxes_per_class")?.unwrap_or(0.0).max(0.0) as usize;
    let iou = number(3, "iou_threshold")?.unwrap_or(0.0) as f32;
    let score = number(4, "score_threshold")?.map(|s| s as f32);
    let format = if *center_point_box { BoxFormat::Centre } else { BoxFormat::Corners };
    let (boxes, scores) = (boxes.as_slice::<f32>(), scores.as_slice::<f32>());
    ask(context, 4 * count)?;
    let mut order = vec![0u32; count];
    let mut chosen: Vec<i64> = Vec::new();
    for b in 0..batch {
        for class in 0..classes {
            let scores = &scores[(b * classes + class) * count..][..count];
            let boxes = &boxes[b * count * 4..][..count * 4];
            let kept = suppress(boxes, scores, format, max_kept, iou, score, &mut order);
            ask(context, 8 * (chosen.len() + 3 * kept))?;
            chosen.extend(order[..kept].iter().flat_map(|&i| [b as i64, class as i64, i.into()]));
        }
    }
    let mut out: Tensor = allocate(context, DType::I64, &[chosen.len() / 3, 3])?;
    out.as_mut_slice::<i64>().copy_from_slice(&chosen);
    Ok(vec![Some(out.into())])
}
