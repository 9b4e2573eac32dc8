use lightering_graph::{
    AspectRatio, CoordinateMode, GridPadding, NearestMode, Op, ResizeAttributes, ResizeMode,
};
use lightering_kernels::ops::{self, Coordinates, Interpolation, Outside, ResizeShape, Rounding};

use super::operands::{normal_axis, optional, required};
use super::{OpContext, OpError, TensorView, TensorViewMut};

/// The kernels' name of an interpolation.
pub(super) fn interpolation(mode: ResizeMode) -> Interpolation {
    match mode {
        ResizeMode::Nearest => Interpolation::Nearest,
        ResizeMode::Linear => Interpolation::Linear,
        ResizeMode::Cubic => Interpolation::Cubic,
    }
}

/// The kernels' name of what lies outside a picture.
pub(super) fn outside(padding: GridPadding) -> Outside {
    match padding {
        GridPadding::Zeros => Outside::Zeros,
        GridPadding::Border => Outside::Border,
        GridPadding::Reflection => Outside::Reflection,
    }
}

fn resize_shape(
    a: &ResizeAttributes,
    inputs: &[Option<TensorView>],
    y: &TensorViewMut,
) -> Result<ResizeShape, OpError> {
    let invalid = |what: String| OpError::Invalid(format!("Resize: {what}"));
    let x = required(inputs, 0, "x")?;
    let rank = x.dims.len();
    if y.dims.len() != rank {
        return Err(invalid(format!("{:?} does not give {:?}", x.dims, y.dims)));
    }
    let axes: Vec<usize> = match &a.axes {
        Some(axes) => axes.iter().map(|&axis| normal_axis(axis, rank)).collect::<Result<_, _>>()?,
        None => (0..rank).collect(),
    };
    let numbers = |index: usize| {
        optional(inputs, index).map(|v| ops::block::to_vec::<f64>(&v)).filter(|v| !v.is_empty())
    };
    let mut scales = vec![1.0; rank];
    match (numbers(2), numbers(3)) {
        (Some(given), None) if given.len() == axes.len() => {
            axes.iter().zip(given).for_each(|(&axis, s)| scales[axis] = s);
        }
        (None, Some(sizes)) if sizes.len() == axes.len() => {
            let ratios = axes.iter().zip(&sizes).map(|(&axis, s)| s / x.dims[axis] as f64);
            let common = match a.aspect_ratio {
                AspectRatio::Stretch => None,
                AspectRatio::NotLarger => ratios.clone().reduce(f64::min),
                AspectRatio::NotSmaller => ratios.clone().reduce(f64::max),
            };
            for (&axis, ratio) in axes.iter().zip(ratios) {
                scales[axis] = common.unwrap_or(ratio);
            }
        }
        _ => return Err(invalid(format!("expected either scales or sizes for {} axes", axes.len()))),
    }
    let mut roi = vec![(0.0, 1.0); rank];
    if a.coordinates == CoordinateMode::TfCropAndResize {
        let given = numbers(1).filter(|r| r.len() == 2 * axes.len());
        let given = given.ok_or_else(|| invalid(format!("expected a roi of {} numbers", 2 * axes.len())))?;
        for (i, &axis) in axes.iter().enumerate() {
            roi[axis] = (given[i], given[i + axes.len()]);
        }
    }
    Ok(kernel_shape(a, scales, roi))
}

/// The kernels' description of a resizing.
pub(super) fn kernel_shape(a: &ResizeAttributes, scales: Vec<f64>, roi: Vec<(f64, f64)>) -> ResizeShape {
    ResizeShape {
        mode: interpolation(a.mode),
        coordinates: match a.coordinates {
            CoordinateMode::HalfPixel => Coordinates::HalfPixel,
            CoordinateMode::HalfPixelSymmetric => Coordinates::HalfPixelSymmetric,
            CoordinateMode::PytorchHalfPixel => Coordinates::PytorchHalfPixel,
            CoordinateMode::AlignCorners => Coordinates::AlignCorners,
            CoordinateMode::Asymmetric => Coordinates::Asymmetric,
            CoordinateMode::TfCropAndResize => Coordinates::TfCropAndResize,
            CoordinateMode::TfHalfPixelForNearest => Coordinates::TfHalfPixelForNearest,
        },
        rounding: match a.nearest {
            NearestMode::RoundPreferFloor => Rounding::RoundPreferFloor,
            NearestMode::RoundPreferCeil => Rounding::RoundPreferCeil,
            NearestMode::Floor => Rounding::Floor,
            NearestMode::Ceil => Rounding::Ceil,
        },
        cubic_a: a.cubic_coeff_a,
        exclude_outside: a.exclude_outside,
        extrapolation_value: a.extrapolation_value,
        antialias: a.antialias,
        scales,
        roi,
    }
}

/// Computes the operators that resample pictures.
pub(super) fn compute(
    op: &Op,
    inputs: &[Option<TensorView>],
    y: &mut TensorViewMut,
    context: &OpContext,
) -> Result<(), OpError> {
    let x = required(inputs, 0, "x")?;
    match op {
        Op::Resize(a) => ops::resize(context.threads, &resize_shape(a, inputs, y)?, &x, y),
        Op::GridSample { mode, padding, align_corners } => {
            let outside = outside(*padding);
            let grid = required(inputs, 1, "grid")?;
            ops::grid_sample(context.threads, interpolation(*mode), outside, *align_corners, &x, &grid, y)
        }
        Op::AffineGrid { align_corners } => ops::affine_grid(*align_corners, &x, y),
        other => Err(super::no_kernel(other)),
    }
}
