//! Pictures and volumes at other resolutions and places.

use super::block::{Compute, parallel_parts};
use super::tile::{Real, RealCompute, with_number, with_real};
use super::{OpError, TensorView, TensorViewMut};
use crate::ThreadPool;

/// Interpolation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interpolation {
    /// One element.
    Nearest,
    /// Two per axis.
    Linear,
    /// Four per axis.
    Cubic,
}

/// From output to input coordinates; names as in ONNX.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coordinates {
    HalfPixel,
    HalfPixelSymmetric,
    PytorchHalfPixel,
    AlignCorners,
    Asymmetric,
    TfCropAndResize,
    TfHalfPixelForNearest,
}

/// Rounding of [`Interpolation::Nearest`].
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    RoundPreferFloor,
    RoundPreferCeil,
    Floor,
    Ceil,
}

/// Everything about [`resize`] but its data.
#[derive(Clone, Debug, PartialEq)]
pub struct ResizeShape {
    /// Interpolation.
    pub mode: Interpolation,
    /// Coordinates.
    pub coordinates: Coordinates,
    /// Rounding of the nearest mode.
    pub rounding: Rounding,
    /// Parameter of the cubic mode.
    pub cubic_a: f32,
    /// Drops weights outside the picture and scales up the others.
    pub exclude_outside: bool,
    /// Value outside the region of interest.
    pub extrapolation_value: f32,
    /// Widens the filter when shrinking.
    pub antialias: bool,
    /// Result size over input size, per axis.
    pub scales: Vec<f64>,
    /// Begin and end of the region of interest per axis.
    pub roi: Vec<(f64, f64)>,
}

/// Which input elements one result index along an axis mixes; `None` is outside the region of interest.
pub(super) type Taps = Option<Vec<(usize, f64)>>;

impl ResizeShape {
    fn coordinate(&self, axis: usize, x: usize, input: usize, output: usize) -> f64 {
        let (x, scale, input) = (x as f64, self.scales[axis], input as f64);
        let width = scale * input;
        match self.coordinates {
            Coordinates::AlignCorners if width == 1.0 => 0.0,
            Coordinates::AlignCorners => x * (input - 1.0) / (width - 1.0),
            Coordinates::Asymmetric => x / scale,
            Coordinates::TfHalfPixelForNearest => (x + 0.5) / scale,
            Coordinates::TfCropAndResize => {
                let (from, to) = self.roi[axis];
                let inside = if width == 1.0 {
                    (to - from) * (input - 1.0) / 2.0
                } else {
                    x * (to - from) * (input - 1.0) / (width - 1.0)
                };
                inside + from * (input - 1.0)
            }
            Coordinates::PytorchHalfPixel if width == 1.0 => -0.5,
            Coordinates::PytorchHalfPixel | Coordinates::HalfPixel => (x + 0.5) / scale - 0.5,
            Coordinates::HalfPixelSymmetric => {
                let adjustment = output as f64 / width;
                input / 2.0 * (1.0 - adjustment) + (x + 0.5) / scale - 0.5
            }
        }
    }

    fn coefficients(&self, ratio: f64, scale: f64) -> Vec<f64> {
        let shrink = scale.min(1.0);
        let normalised = |c: Vec<f64>| {
            let total: f64 = c.iter().sum();
            c.into_iter().map(|v| v / total).collect()
        };
        let a = f64::from(self.cubic_a);
        match self.mode {
            Interpolation::Nearest => {
                let second = match self.rounding {
                    _ if ratio == 1.0 => true,
                    Rounding::RoundPreferFloor => ratio > 0.5,
                    Rounding::RoundPreferCeil => ratio >= 0.5,
                    Rounding::Floor => false,
                    Rounding::Ceil => true,
                };
                if second { vec![0.0, 1.0] } else { vec![1.0, 0.0] }
            }
            Interpolation::Linear if self.antialias => {
                let start = (-1.0 / shrink).floor() as i64 + 1;
                normalised(
                    (start..2 - start)
                        .map(|i| (1.0 - ((i as f64 - ratio) * shrink).abs()).clamp(0.0, 1.0))
                        .collect(),
                )
            }
            Interpolation::Linear => vec![1.0 - ratio, ratio],
            Interpolation::Cubic if self.antialias => {
                let start = (-2.0 / shrink).floor() as i64 + 1;
                normalised((start..2 - start).map(|i| cubic(shrink * (i as f64 - ratio), a)).collect())
            }
            Interpolation::Cubic => {
                [ratio + 1.0, ratio, 1.0 - ratio, 2.0 - ratio].map(|d| cubic(d, a)).to_vec()
            }
        }
    }

    /// Taps of every result index along an axis.
    pub(super) fn taps(&self, axis: usize, input: usize, output: usize) -> Vec<Taps> {
        let identity = self.scales[axis] == 1.0
            && input == output
            && self.coordinates != Coordinates::TfCropAndResize
            && self.coordinates != Coordinates::TfHalfPixelForNearest;
        (0..output)
            .map(|x| {
                if identity {
                    return Some(vec![(x, 1.0)]);
                }
                let at = self.coordinate(axis, x, input, output);
                if self.coordinates == Coordinates::TfCropAndResize
                    && !(at >= 0.0 && at <= input as f64 - 1.0)
                {
                    return None;
                }
                let whole = at.floor();
                let ratio = if at == whole { 1.0 } else { at - whole };
                let mut weights = self.coefficients(ratio, self.scales[axis]);
                let first = at.ceil() as i64 - weights.len() as i64 / 2;
                if self.exclude_outside {
                    for (i, w) in weights.iter_mut().enumerate() {
                        if !(0..input as i64).contains(&(first + i as i64)) {
                            *w = 0.0;
                        }
                    }
                    let total: f64 = weights.iter().sum();
                    weights.iter_mut().for_each(|w| *w /= total);
                }
                let clamp = |i: usize| (first + i as i64).clamp(0, input as i64 - 1) as usize;
                Some(
                    weights
                        .iter()
                        .enumerate()
                        .filter(|(_, w)| **w != 0.0)
                        .map(|(i, &w)| (clamp(i), w))
                        .collect(),
                )
            })
            .collect()
    }
}

/// The cubic convolution kernel at distance `x`.
pub(super) fn cubic(x: f64, a: f64) -> f64 {
    let x = x.abs();
    if x <= 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    } else {
        0.0
    }
}

/// Resamples every axis whose scale is not 1.
///
/// # Errors
/// [`OpError::Invalid`] when the input is empty but the result is not, or scales are not positive numbers.
pub fn resize(
    pool: &ThreadPool,
    shape: &ResizeShape,
    x: &TensorView,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let rank = x.dims.len();
    let fits = x.dtype == y.dtype
        && y.dims.len() == rank
        && shape.scales.len() == rank
        && shape.roi.len() == rank
        && shape.scales.iter().all(|s| s.is_finite() && *s > 0.0)
        && (!x.is_empty() || y.is_empty());
    if !fits {
        return Err(OpError::Invalid(format!(
            "Resize of {:?} by {:?} does not give {:?}",
            x.dims, shape.scales, y.dims
        )));
    }
    if y.is_empty() {
        return Ok(());
    }
    if rank == 0 {
        return super::movement::copy(x, y);
    }
    let taps: Vec<Vec<Taps>> = (0..rank).map(|axis| shape.taps(axis, x.dims[axis], y.dims[axis])).collect();
    let strides = super::movement::row_major(x.dims);
    let out_dims = y.dims;
    let row = out_dims[rank - 1];
    with_number!(x.dtype, "Resize", S => {
        type C = <S as Real>::C;
        let source = x.as_slice::<S>();
        let of = <C as RealCompute>::of;
        let rows_per_task = ((4 << 10) / row).max(1);
        parallel_parts(pool, y.as_mut_slice::<S>(), row * rows_per_task, &|start, part| {
            let mut corners: Vec<(usize, f64)> = Vec::new();
            let mut next: Vec<(usize, f64)> = Vec::new();
            for (r, out) in part.chunks_mut(row).enumerate() {
                // Offsets and weights that the outer axes choose for this row.
                corners.clear();
                corners.push((0, 1.0));
                let mut rest = start / row + r;
                let mut inside = true;
                for axis in (0..rank - 1).rev() {
                    let index = rest % out_dims[axis];
                    rest /= out_dims[axis];
                    match &taps[axis][index] {
                        Some(taps) => {
                            next.clear();
                            for &(offset, weight) in &corners {
                                next.extend(
                                    taps.iter().map(|&(i, w)| (offset + i * strides[axis] as usize, weight * w)),
                                );
                            }
                            std::mem::swap(&mut corners, &mut next);
                        }
                        None => inside = false,
                    }
                }
                for (column, out) in out.iter_mut().enumerate() {
                    *out = match &taps[rank - 1][column] {
                        Some(taps) if inside => match (&corners[..], &taps[..]) {
                            ([(offset, 1.0)], [(i, 1.0)]) => source[offset + i],
                            _ => {
                                let mut total = of(0.0);
                                for &(offset, weight) in &corners {
                                    let mut line = of(0.0);
                                    for &(i, w) in taps {
                                        line += source[offset + i].up() * of(w);
                                    }
                                    total += line * of(weight);
                                }
                                S::down(total)
                            }
                        },
                        _ => S::down(of(f64::from(shape.extrapolation_value))),
                    };
                }
            }
        });
    });
    Ok(())
}

/// What [`grid_sample`] sees outside the picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outside {
    /// Zeros.
    Zeros,
    /// The nearest element.
    Border,
    /// Mirrored.
    Reflection,
}

/// Mirrors a coordinate into a range.
pub(super) fn reflect(x: f64, low: f64, high: f64) -> f64 {
    let range = high - low;
    if range <= 0.0 || !x.is_finite() {
        return low;
    }
    let (distance, from, towards) = if x < low {
        (low - x, low, 1.0)
    } else if x > high {
        (x - high, high, -1.0)
    } else {
        return x;
    };
    let turns = (distance / range).floor();
    let rest = distance - turns * range;
    if turns % 2.0 == 0.0 {
        from + towards * rest
    } else {
        (if towards > 0.0 { high } else { low }) - towards * rest
    }
}

/// Samples `x` (`[batch, channels, spatial…]`) at the normalised coordinates of `grid`
/// (`[batch, output…, spatial rank]`, innermost axis first) (Jaderberg et al., 2015).
///
/// # Errors
/// [`OpError::Invalid`] when shapes do not fit.
pub fn grid_sample(
    pool: &ThreadPool,
    mode: Interpolation,
    outside: Outside,
    align_corners: bool,
    x: &TensorView,
    grid: &TensorView,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let spatial = x.dims.len().saturating_sub(2);
    let fits = spatial > 0
        && x.dtype == y.dtype
        && grid.dims.len() == spatial + 2
        && grid.dims[0] == x.dims[0]
        && grid.dims[spatial + 1] == spatial
        && y.dims.len() == spatial + 2
        && y.dims[..2] == x.dims[..2]
        && y.dims[2..] == grid.dims[1..=spatial]
        && (!x.is_empty() || y.is_empty());
    if !fits {
        return Err(OpError::Invalid(format!(
            "GridSample of {:?} at {:?} as {:?}",
            x.dims, grid.dims, y.dims
        )));
    }
    if y.is_empty() {
        return Ok(());
    }
    let (channels, sizes) = (x.dims[1], &x.dims[2..]);
    let positions: usize = y.dims[2..].iter().product();
    let pixels: usize = sizes.iter().product();
    let grid_type = grid.dtype;
    if !grid_type.is_float() {
        return Err(OpError::Invalid(format!("GridSample: the grid is {grid_type}")));
    }
    with_number!(x.dtype, "GridSample", S => {
        type C = <S as Real>::C;
        let source = x.as_slice::<S>();
        let of = <C as RealCompute>::of;
        parallel_parts(pool, y.as_mut_slice::<S>(), positions, &|start, part| {
            let plane_index = start / positions;
            let sample = plane_index / channels;
            let plane = &source[plane_index * pixels..][..pixels];
            let mut at = vec![0f64; spatial];
            let mut corners: Vec<(Option<usize>, f64)> = Vec::new();
            let mut next: Vec<(Option<usize>, f64)> = Vec::new();
            for (position, out) in part.iter_mut().enumerate() {
                f64::load(grid_type, grid.bytes, (sample * positions + position) * spatial, &mut at);
                at.reverse();
                corners.clear();
                corners.push((Some(0), 1.0));
                let mut step = 1;
                for axis in (0..spatial).rev() {
                    let size = sizes[axis] as f64;
                    let (low, high) = if align_corners { (0.0, size - 1.0) } else { (-0.5, size - 0.5) };
                    let mut v = if align_corners {
                        (at[axis] + 1.0) / 2.0 * (size - 1.0)
                    } else {
                        ((at[axis] + 1.0) * size - 1.0) / 2.0
                    };
                    if mode == Interpolation::Nearest {
                        v = v.round_ties_even();
                    }
                    if v < low || v > high {
                        v = match outside {
                            Outside::Zeros => v,
                            Outside::Border => v.clamp(0.0, size - 1.0),
                            Outside::Reflection => reflect(v, low, high),
                        };
                    }
                    let place = |i: f64| -> Option<usize> {
                        let i = match outside {
                            Outside::Zeros => i,
                            Outside::Border => i.clamp(0.0, size - 1.0),
                            Outside::Reflection => reflect(i, low, high),
                        };
                        (i >= 0.0 && i < size).then(|| i as usize * step)
                    };
                    let whole = v.floor();
                    let ratio = v - whole;
                    let (first, weights): (f64, [f64; 4]) = match mode {
                        Interpolation::Nearest => (v, [1.0, 0.0, 0.0, 0.0]),
                        Interpolation::Linear => (whole, [1.0 - ratio, ratio, 0.0, 0.0]),
                        Interpolation::Cubic => (
                            whole - 1.0,
                            [ratio + 1.0, ratio, 1.0 - ratio, 2.0 - ratio].map(|d| cubic(d, -0.75)),
                        ),
                    };
                    next.clear();
                    for &(offset, weight) in &corners {
                        for (i, w) in weights.iter().enumerate().filter(|(_, w)| **w != 0.0) {
                            let target = offset.zip(place(first + i as f64)).map(|(a, b)| a + b);
                            next.push((target, weight * w));
                        }
                    }
                    std::mem::swap(&mut corners, &mut next);
                    step *= sizes[axis];
                }
                let mut total = of(0.0);
                for &(offset, weight) in &corners {
                    if let Some(offset) = offset {
                        total += plane[offset].up() * of(weight);
                    }
                }
                *out = S::down(total);
            }
        });
    });
    Ok(())
}

/// Grids of normalised coordinates under affine maps `theta` (`[batch, rank, rank + 1]`); the result is
/// `[batch, spatial…, rank]`.
///
/// # Errors
/// [`OpError::Invalid`] when shapes do not fit.
pub fn affine_grid(align_corners: bool, theta: &TensorView, y: &mut TensorViewMut) -> Result<(), OpError> {
    let rank = y.dims.len().saturating_sub(2);
    let fits = rank > 0
        && theta.dtype == y.dtype
        && theta.dims == [y.dims[0], rank, rank + 1]
        && y.dims[rank + 1] == rank;
    if !fits {
        return Err(OpError::Invalid(format!("AffineGrid of {:?} does not give {:?}", theta.dims, y.dims)));
    }
    let sizes = &y.dims[1..=rank];
    let positions: usize = sizes.iter().product();
    with_real!(theta.dtype, "AffineGrid", S => {
        let theta = theta.as_slice::<S>();
        for (i, out) in y.as_mut_slice::<S>().chunks_mut(rank).enumerate() {
            let (sample, mut rest) = (i / positions, i % positions);
            let matrix = &theta[sample * rank * (rank + 1)..][..rank * (rank + 1)];
            let mut sums: Vec<f64> = (0..rank).map(|r| matrix[r * (rank + 1) + rank].up().to_f64()).collect();
            for (column, &size) in sizes.iter().rev().enumerate() {
                let (index, size) = ((rest % size) as f64, size as f64);
                rest /= size as usize;
                let v = if !align_corners {
                    (2.0 * index + 1.0) / size - 1.0
                } else if size > 1.0 {
                    -1.0 + 2.0 * index / (size - 1.0)
                } else {
                    -1.0
                };
                for (r, total) in sums.iter_mut().enumerate() {
                    *total += matrix[r * (rank + 1) + column].up().to_f64() * v;
                }
            }
            for (o, &v) in out.iter_mut().zip(&sums) {
                *o = S::down(RealCompute::of(v));
            }
        }
    });
    Ok(())
}
