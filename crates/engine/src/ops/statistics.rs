use lightering_graph::{Op, ReduceOp};
use lightering_kernels::ops::{self, Along, BatchStatistics, Reduction, SoftmaxKind};

use super::operands::{normal_axis, optional, required};
use super::{OpContext, OpError, TensorView, TensorViewMut};

/// Sizes around an axis that may be counted from the end; a scalar is an axis of size 1.
pub(super) fn along(x: &TensorView, axis: i64) -> Result<Along, OpError> {
    if x.dims.is_empty() && (axis == 0 || axis == -1) {
        return Ok(Along { outer: 1, size: 1, inner: 1 });
    }
    Ok(Along::new(x.dims, normal_axis(axis, x.dims.len())?))
}

fn marked(axes: &[i64], rank: usize) -> Result<Vec<bool>, OpError> {
    let mut marks = vec![false; rank];
    for &axis in axes {
        marks[normal_axis(axis, rank)?] = true;
    }
    Ok(marks)
}

fn reduction(op: ReduceOp) -> Reduction {
    match op {
        ReduceOp::L1 => Reduction::L1,
        ReduceOp::L2 => Reduction::L2,
        ReduceOp::LogSum => Reduction::LogSum,
        ReduceOp::LogSumExp => Reduction::LogSumExp,
        ReduceOp::Max => Reduction::Max,
        ReduceOp::Mean => Reduction::Mean,
        ReduceOp::Min => Reduction::Min,
        ReduceOp::Prod => Reduction::Prod,
        ReduceOp::Sum => Reduction::Sum,
        ReduceOp::SumSquare => Reduction::SumSquare,
    }
}

/// Computes normalisations, softmax, reductions and running sums.
pub(super) fn compute(
    op: &Op,
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
    context: &OpContext,
) -> Result<(), OpError> {
    let pool = context.threads;
    let x = required(inputs, 0, "x")?;
    let (first, rest) = outputs.split_at_mut(1);
    let Some(y) = first[0].as_mut() else {
        return Err(OpError::Unsupported("leaving out the first result of a normalisation".to_owned()));
    };
    let (second, third) = rest.split_at_mut(rest.len().min(1));
    let extra = [second.first_mut().and_then(Option::as_mut), third.first_mut().and_then(Option::as_mut)];
    match op {
        Op::BatchNorm { epsilon, momentum, training } => {
            let given = BatchStatistics {
                scale: required(inputs, 1, "scale")?,
                bias: required(inputs, 2, "bias")?,
                mean: required(inputs, 3, "mean")?,
                variance: required(inputs, 4, "variance")?,
            };
            ops::batch_norm(pool, *epsilon, training.then_some(*momentum), &x, &given, y, extra)
        }
        Op::InstanceNorm { epsilon } => {
            let channels = x.dims.get(1).copied().unwrap_or(1);
            let (scale, bias) = (required(inputs, 1, "scale")?, required(inputs, 2, "bias")?);
            ops::group_norm(pool, channels, *epsilon, &x, &scale, &bias, y)
        }
        Op::GroupNorm { groups, epsilon } => {
            let (scale, bias) = (required(inputs, 1, "scale")?, required(inputs, 2, "bias")?);
            ops::group_norm(pool, *groups, *epsilon, &x, &scale, &bias, y)
        }
        Op::LayerNorm { axis, epsilon } => {
            let axis = normal_axis(*axis, x.dims.len())?;
            let (scale, bias) = (required(inputs, 1, "scale")?, optional(inputs, 2));
            ops::layer_norm(pool, axis, *epsilon, false, &x, &scale, bias.as_ref(), y, extra)
        }
        Op::RmsNorm { axis, epsilon } => {
            let axis = normal_axis(*axis, x.dims.len())?;
            let scale = required(inputs, 1, "scale")?;
            ops::layer_norm(pool, axis, *epsilon, true, &x, &scale, None, y, [None, None])
        }
        Op::LpNorm { axis, p } => ops::lp_norm(*p, along(&x, *axis)?, &x, y),
        Op::MeanVarianceNorm { axes } => ops::mean_variance_norm(&marked(axes, x.dims.len())?, &x, y),
        Op::Lrn { alpha, beta, bias, size } => {
            ops::local_response_norm(pool, *alpha, *beta, *bias, *size, &x, y)
        }
        Op::Softmax { axis, log } => {
            let kind = if *log { SoftmaxKind::Log } else { SoftmaxKind::Plain };
            ops::softmax(pool, kind, along(&x, *axis)?, &x, y)
        }
        Op::Hardmax { axis } => ops::softmax(pool, SoftmaxKind::Hard, along(&x, *axis)?, &x, y),
        Op::Reduce { op, noop_with_empty_axes, .. } => {
            let axes = optional(inputs, 1).map(|a| ops::block::to_vec::<i64>(&a)).unwrap_or_default();
            let marks = if axes.is_empty() {
                vec![!noop_with_empty_axes; x.dims.len()]
            } else {
                marked(&axes, x.dims.len())?
            };
            ops::reduce(pool, reduction(*op), &marks, &x, y)
        }
        Op::ArgReduce { largest, axis, select_last_index, .. } => {
            ops::arg_reduce(*largest, *select_last_index, along(&x, *axis)?, &x, y)
        }
        Op::CumSum { exclusive, reverse } => {
            let axis = super::operands::integer_scalar(&required(inputs, 1, "axis")?, "axis")?;
            ops::cumulative_sum(*exclusive, *reverse, along(&x, axis)?, &x, y)
        }
        other => Err(super::no_kernel(other)),
    }
}
