//! Classification losses.

use lightering_graph::{LossAttributes, LossReduction, Op};
use lightering_kernels::ops::loss::{LossShape, Reduction, classification_loss, log_probabilities};

use super::operands::*;
use super::{OpError, TensorView, TensorViewMut};

/// Dispatch of this family.
pub(super) fn compute(
    op: &Op,
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
) -> Result<(), OpError> {
    let (a, from_scores): (&LossAttributes, bool) = match op {
        Op::NllLoss(a) => (a, false),
        Op::SoftmaxCrossEntropyLoss(a) => (a, true),
        _ => return Err(super::no_kernel(op)),
    };
    let (x, target) = (required(inputs, 0, "x")?, required(inputs, 1, "target")?);
    let &[batch, classes, ref inner @ ..] = x.dims else {
        return invalid(format!("the scores have shape {:?}, expected at least 2 dimensions", x.dims));
    };
    let shape = LossShape { batch, classes, inner: count(inner) };
    expect_count(target.dims, batch * shape.inner, "target")?;
    if !target.dtype.is_integer() {
        return invalid(format!("the targets have element type {}", target.dtype));
    }
    let weight = optional(inputs, 2);
    if let Some(weight) = &weight {
        expect_dtype(weight, x.dtype, "weight")?;
        expect_dims(weight.dims, &[classes], "weight")?;
    }
    let reduction = match a.reduction {
        LossReduction::None => Reduction::None,
        LossReduction::Mean => Reduction::Mean,
        LossReduction::Sum => Reduction::Sum,
    };
    let results = if reduction == Reduction::None { batch * shape.inner } else { 1 };
    with_real!(x.dtype, T => {
        if let Some(Some(out)) = outputs.get_mut(0) {
            expect_count(out.dims, results, "the loss")?;
            // Integer targets of any width were checked above.
            let at = |i: usize| integer_at(&target, i).unwrap_or(-1);
            let weight = weight.map(|w| w.as_slice::<T>());
            let out = out.as_mut_slice::<T>();
            classification_loss(&shape, x.as_slice::<T>(), from_scores, at, weight, a.ignore_index, reduction, out)
                .map_err(|class| OpError::Invalid(format!("target {class} is not one of {classes} classes")))?;
        }
        if let Some(Some(logs)) = outputs.get_mut(1) {
            expect_dims(logs.dims, x.dims, "the log probabilities")?;
            log_probabilities(&shape, x.as_slice::<T>(), logs.as_mut_slice::<T>());
        }
        Ok(())
    })
}
