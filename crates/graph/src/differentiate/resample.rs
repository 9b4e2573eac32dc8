//! Pictures at other resolutions and places.

use super::backward::{Backward, Step, from_front};
use crate::{AspectRatio, CoordinateMode, Node, Op, ResizeAttributes, Tensor, TrainOp, ValueId};

pub(super) fn rule(b: &mut Backward<'_>, n: &Node, dy: &[Option<ValueId>]) -> Step {
    let Some(dy) = dy.first().copied().flatten() else { return Ok(()) };
    match &n.op {
        Op::Resize(a) => {
            if a.coordinates == CoordinateMode::TfCropAndResize {
                return b.unsupported("cropping and resizing at once has no gradient");
            }
            let x = b.node_input(n, 0)?;
            let input = b.dims(x)?;
            let scales = scales(b, a, n, &input)?;
            let dx = b.train(TrainOp::ResizeGrad { resize: a.clone(), input, scales }, &[dy])?;
            b.give(0, dx)
        }
        Op::GridSample { mode, padding, align_corners } => {
            let (x, grid) = (b.node_input(n, 0)?, b.node_input(n, 1)?);
            let op =
                TrainOp::GridSampleGrad { mode: *mode, padding: *padding, align_corners: *align_corners };
            let wanted = [b.wants(0), b.wants(1)];
            let inputs = vec![Some(x), Some(grid), Some(dy)];
            let made = b.emit_some(Op::Train(Box::new(op)), inputs, &wanted)?;
            for (i, g) in made.into_iter().enumerate() {
                if let Some(g) = g {
                    b.give(i, g)?;
                }
            }
            Ok(())
        }
        Op::AffineGrid { .. } => {
            // The grid is linear in theta: its places under the identity, and ones.
            let theta = b.node_input(n, 0)?;
            let (dims, size) = (b.dims(theta)?, b.node_input(n, 1)?);
            let [batch, rows, columns] = dims[..] else { return b.unsupported("its matrices have no batch") };
            let mut identity = vec![0f64; batch * rows * columns];
            for s in 0..batch {
                (0..rows).for_each(|r| identity[(s * rows + r) * columns + r] = 1.0);
            }
            let identity = b.constant("grad/identity", Tensor::from_slice(&dims, &identity));
            let identity = b.cast_like(identity, theta)?;
            let places = b.emit(n.op.clone(), &[identity, size])?;
            let positions = b.dims(places)?[1..=rows].iter().product();
            let places = b.reshape(places, &[batch, positions, rows])?;
            let ones = b.full(1.0, &[batch, positions, 1], b.dtype(places)?)?;
            let places = b.emit(Op::Concat { axis: 2 }, &[places, ones])?;
            let g = b.reshape(dy, &[batch, positions, rows])?;
            let dx = b.matmul(g, places, (true, false), 1.0)?;
            b.give(0, dx)
        }
        _ => b.unsupported("it is no resampling"),
    }
}

/// Output over input per dimension, as the forward operator reads its operands.
fn scales(b: &Backward<'_>, a: &ResizeAttributes, n: &Node, input: &[usize]) -> Step<Vec<f64>> {
    let rank = input.len();
    let axes: Vec<usize> = match &a.axes {
        Some(axes) => axes.iter().map(|&axis| from_front(axis, rank)).collect(),
        None => (0..rank).collect(),
    };
    let numbers = |i: usize| -> Step<Option<Vec<f64>>> {
        let Some(v) = n.input(i) else { return Ok(None) };
        match b.graph().value(v).tensor().and_then(Tensor::to_f64s) {
            Some(numbers) => Ok(Some(numbers).filter(|n| !n.is_empty())),
            None => b.unsupported("its sizes are not constant"),
        }
    };
    let mut scales = vec![1.0; rank];
    match (numbers(2)?, numbers(3)?) {
        (Some(given), None) if given.len() == axes.len() => {
            axes.iter().zip(given).for_each(|(&axis, s)| scales[axis] = s);
        }
        (None, Some(sizes)) if sizes.len() == axes.len() => {
            let ratios: Vec<f64> = axes.iter().zip(&sizes).map(|(&i, s)| s / input[i] as f64).collect();
            let common = match a.aspect_ratio {
                AspectRatio::Stretch => None,
                AspectRatio::NotLarger => ratios.iter().copied().reduce(f64::min),
                AspectRatio::NotSmaller => ratios.iter().copied().reduce(f64::max),
            };
            for (&axis, ratio) in axes.iter().zip(ratios) {
                scales[axis] = common.unwrap_or(ratio);
            }
        }
        _ => return b.unsupported("it has neither scales nor sizes for its axes"),
    }
    Ok(scales)
}
