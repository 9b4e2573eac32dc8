//! Pictures at other resolutions and places.

use super::add_to;
use crate::ops::real::Real;
use crate::ops::resampling::{cubic, reflect};
use crate::ops::{Interpolation, OpError, Outside, ResizeShape};

/// Gradient of a resizing: every element of `dy` goes where its value came from.
///
/// # Errors
/// [`OpError::Invalid`] when shapes and scales do not fit.
pub fn resize_grad<T: Real>(
    shape: &ResizeShape,
    out_dims: &[usize],
    dims: &[usize],
    dy: &[T],
    dx: &mut [T],
) -> Result<(), OpError> {
    let rank = dims.len();
    let fits = out_dims.len() == rank
        && shape.scales.len() == rank
        && shape.scales.iter().all(|s| s.is_finite() && *s > 0.0)
        && (!dx.is_empty() || dy.is_empty());
    if !fits {
        return Err(OpError::Invalid(format!(
            "the gradient of a resizing of {dims:?} by {:?} to {out_dims:?}",
            shape.scales
        )));
    }
    dx.fill(T::from_f64(0.0));
    let taps: Vec<_> = (0..rank).map(|axis| shape.taps(axis, dims[axis], out_dims[axis])).collect();
    let (mut corners, mut next) = (Vec::new(), Vec::new());
    for (index, g) in dy.iter().enumerate() {
        corners.clear();
        corners.push((0usize, g.to_f64()));
        let (mut rest, mut step) = (index, 1);
        for axis in (0..rank).rev() {
            next.clear();
            if let Some(taps) = &taps[axis][rest % out_dims[axis]] {
                for &(offset, weight) in &corners {
                    next.extend(taps.iter().map(|&(i, w)| (offset + i * step, weight * w)));
                }
            }
            std::mem::swap(&mut corners, &mut next);
            rest /= out_dims[axis];
            step *= dims[axis];
        }
        for &(offset, value) in &corners {
            add_to(&mut dx[offset], value);
        }
    }
    Ok(())
}

/// Most spatial dimensions of a picture that is sampled.
const SPATIAL_MAX: usize = 3;

/// Slope of [`cubic`] for distances from 0 to 2.
fn cubic_slope(x: f64, a: f64) -> f64 {
    if x <= 1.0 {
        (3.0 * (a + 2.0) * x - 2.0 * (a + 3.0)) * x
    } else if x < 2.0 {
        (3.0 * a * x - 10.0 * a) * x + 8.0 * a
    } else {
        0.0
    }
}

/// Slope of [`reflect`].
fn reflect_slope(x: f64, low: f64, high: f64) -> f64 {
    let range = high - low;
    if range <= 0.0 || !x.is_finite() {
        return 0.0;
    }
    let distance = if x < low {
        low - x
    } else if x > high {
        x - high
    } else {
        return 1.0;
    };
    if (distance / range).floor() % 2.0 == 0.0 { -1.0 } else { 1.0 }
}

/// One element under a sample: its place (`None` outside), its weight, and the slope of the weight along each axis.
type Corner = (Option<usize>, f64, [f64; SPATIAL_MAX]);

/// Gradients of sampling `x` (`[batch, channels, spatial…]`) at the places of `grid`
/// (`[batch, positions…, spatial rank]`), each as far as it is wanted.
///
/// # Errors
/// [`OpError::Unsupported`] for more than three spatial dimensions.
pub fn grid_sample_grad<T: Real>(
    mode: Interpolation,
    outside: Outside,
    align_corners: bool,
    dims: &[usize],
    (x, grid, dy): (&[T], &[T], &[T]),
    mut dx: Option<&mut [T]>,
    mut dgrid: Option<&mut [T]>,
) -> Result<(), OpError> {
    let &[batch, channels, ref sizes @ ..] = dims else {
        return Err(OpError::Invalid(format!("GridSample of a picture of shape {dims:?}")));
    };
    let spatial = sizes.len();
    if spatial > SPATIAL_MAX {
        return Err(OpError::Unsupported(format!("gradients of GridSample in {spatial} dimensions")));
    }
    if let Some(dx) = dx.as_deref_mut() {
        dx.fill(T::from_f64(0.0));
    }
    let pixels: usize = sizes.iter().product();
    let places = grid.len() / spatial.max(1);
    let positions = places.checked_div(batch).unwrap_or(0);
    let (mut corners, mut next): (Vec<Corner>, Vec<Corner>) = (Vec::new(), Vec::new());
    for place in 0..places {
        let (sample, position) = (place / positions, place % positions);
        corners.clear();
        corners.push((Some(0), 1.0, [1.0; SPATIAL_MAX]));
        let mut step = 1;
        for axis in (0..spatial).rev() {
            let size = sizes[axis] as f64;
            // The innermost axis comes first in the grid.
            let at = grid[place * spatial + spatial - 1 - axis].to_f64();
            let (low, high) = if align_corners { (0.0, size - 1.0) } else { (-0.5, size - 0.5) };
            let (mut v, mut slope) = if align_corners {
                ((at + 1.0) / 2.0 * (size - 1.0), (size - 1.0) / 2.0)
            } else {
                (((at + 1.0) * size - 1.0) / 2.0, size / 2.0)
            };
            if mode == Interpolation::Nearest {
                v = v.round_ties_even();
            }
            if v < low || v > high {
                match outside {
                    Outside::Zeros => {}
                    Outside::Border => (v, slope) = (v.clamp(0.0, size - 1.0), 0.0),
                    Outside::Reflection => {
                        slope *= reflect_slope(v, low, high);
                        v = reflect(v, low, high);
                    }
                }
            }
            let index = |i: f64| -> Option<usize> {
                let i = match outside {
                    Outside::Zeros => i,
                    Outside::Border => i.clamp(0.0, size - 1.0),
                    Outside::Reflection => reflect(i, low, high),
                };
                (i >= 0.0 && i < size).then(|| i as usize * step)
            };
            let whole = v.floor();
            let r = v - whole;
            let (first, weights, slopes): (f64, [f64; 4], [f64; 4]) = match mode {
                Interpolation::Nearest => (v, [1.0, 0.0, 0.0, 0.0], [0.0; 4]),
                Interpolation::Linear => (whole, [1.0 - r, r, 0.0, 0.0], [-1.0, 1.0, 0.0, 0.0]),
                Interpolation::Cubic => {
                    let d = [r + 1.0, r, 1.0 - r, 2.0 - r];
                    let s = d.map(|d| cubic_slope(d, -0.75));
                    (whole - 1.0, d.map(|d| cubic(d, -0.75)), [s[0], s[1], -s[2], -s[3]])
                }
            };
            next.clear();
            for &(offset, weight, along) in &corners {
                for i in (0..4).filter(|&i| weights[i] != 0.0 || slopes[i] != 0.0) {
                    let target = offset.zip(index(first + i as f64)).map(|(a, b)| a + b);
                    // The slope along an axis has the weights of all other axes as factors.
                    let mut along = along;
                    for (other, value) in along.iter_mut().enumerate().take(spatial) {
                        *value *= if other == axis { slopes[i] * slope } else { weights[i] };
                    }
                    next.push((target, weight * weights[i], along));
                }
            }
            std::mem::swap(&mut corners, &mut next);
            step *= sizes[axis];
        }
        let mut pull = [0.0; SPATIAL_MAX];
        for channel in 0..channels {
            let plane = (sample * channels + channel) * pixels;
            let g = dy[(sample * channels + channel) * positions + position].to_f64();
            for &(offset, weight, along) in &corners {
                let Some(offset) = offset else { continue };
                if let Some(dx) = dx.as_deref_mut() {
                    add_to(&mut dx[plane + offset], g * weight);
                }
                let value = g * x[plane + offset].to_f64();
                pull.iter_mut().zip(along).for_each(|(p, a)| *p += value * a);
            }
        }
        if let Some(dgrid) = dgrid.as_deref_mut() {
            for axis in 0..spatial {
                dgrid[place * spatial + spatial - 1 - axis] = T::from_f64(pull[axis]);
            }
        }
    }
    Ok(())
}
