//! Convolution and pooling.

use super::add_to;
use crate::ThreadPool;
use crate::ops::real::Real;
use crate::ops::rows::{Shared, parallel_rows};
use crate::ops::{
    ConvolutionEpilogue, ConvolutionShape, OpError, Pooling, PoolingShape, TensorView, TensorViewMut, Window,
    convolution_transposed,
};

/// Gradient of a convolution with respect to its input: the transposed convolution of `dy`. `shape` is that of the
/// forward convolution.
///
/// # Errors
/// As for a convolution.
pub fn convolution_input_grad(
    pool: &ThreadPool,
    shape: &ConvolutionShape,
    dy: &TensorView,
    w: &TensorView,
    dx: &mut TensorViewMut,
) -> Result<(), OpError> {
    let back = ConvolutionShape {
        in_channels: shape.out_channels,
        out_channels: shape.in_channels,
        window: Window {
            input: shape.window.output.clone(),
            output: shape.window.input.clone(),
            ..shape.window.clone()
        },
        activation: None,
        ..shape.clone()
    };
    convolution_transposed(pool, &back, dy, w, &ConvolutionEpilogue::default(), dx)
}

/// Place of an element of a picture.
fn place(channels_last: bool, channels: usize, pixels: usize, at: [usize; 3]) -> usize {
    let [sample, channel, pixel] = at;
    if channels_last {
        (sample * pixels + pixel) * channels + channel
    } else {
        (sample * channels + channel) * pixels + pixel
    }
}

/// Gradient of a convolution with respect to its weights, `[out, in/groups, kernel…]`.
pub fn convolution_weight_grad<T: Real>(
    pool: &ThreadPool,
    shape: &ConvolutionShape,
    x: &[T],
    dy: &[T],
    dw: &mut [T],
) {
    let window = &shape.window;
    let (pixels, positions, taps) = (window.pixels(), window.positions(), window.taps());
    let (per_in, per_out) = (shape.in_channels / shape.groups, shape.out_channels / shape.groups);
    parallel_rows(pool, dw, taps, 1, &|first, dw| {
        for (r, dw) in dw.chunks_exact_mut(taps).enumerate() {
            let (out, within) = ((first + r) / per_in, (first + r) % per_in);
            let channel = out / per_out * per_in + within;
            for (tap, dw) in dw.iter_mut().enumerate() {
                let mut sum = 0.0;
                for position in 0..positions {
                    let Some(pixel) = window.pixel(position, tap) else { continue };
                    for sample in 0..shape.batch {
                        let from = [sample, channel, pixel];
                        let x = x[place(shape.channels_last, shape.in_channels, pixels, from)];
                        let at = [sample, out, position];
                        let g = dy[place(shape.channels_last, shape.out_channels, positions, at)];
                        sum += x.to_f64() * g.to_f64();
                    }
                }
                *dw = T::from_f64(sum);
            }
        }
    });
}

/// Gradient of a pooling layer; `x` and `y` are its operand and result, needed for all but averages. The first of several
/// equal elements of a window takes all.
///
/// # Errors
/// [`OpError::Invalid`] when `x` and `y` are needed and missing.
pub fn pooling_grad<T: Real>(
    pool: &ThreadPool,
    shape: &PoolingShape,
    dy: &[T],
    x: Option<&[T]>,
    y: Option<&[T]>,
    dx: &mut [T],
) -> Result<(), OpError> {
    let (x, y) = match (shape.kind, x, y) {
        (Pooling::Average, ..) => (dy, dy),
        (_, Some(x), Some(y)) => (x, y),
        _ => {
            return Err(OpError::Invalid(
                "the gradient of this pooling needs the operand and the result, which are missing".to_owned(),
            ));
        }
    };
    let window = &shape.window;
    let (pixels, positions) = (window.pixels(), window.positions());
    let planes = shape.batch * shape.channels;
    let shared = Shared::new(dx);
    pool.parallel_for(planes, &|plane, _| {
        let (sample, channel) = (plane / shape.channels, plane % shape.channels);
        let at = |pixel: usize| place(shape.channels_last, shape.channels, pixels, [sample, channel, pixel]);
        // SAFETY: every element belongs to one plane and every plane to one task.
        let element = |pixel: usize| unsafe { &mut shared.slice(at(pixel), 1)[0] };
        (0..pixels).for_each(|pixel| *element(pixel) = T::from_f64(0.0));
        for position in 0..positions {
            let from = place(shape.channels_last, shape.channels, positions, [sample, channel, position]);
            let g = dy[from].to_f64();
            match shape.kind {
                Pooling::Max => {
                    let mut best: Option<usize> = None;
                    window.for_pixels(position, |pixel| {
                        if best.is_none_or(|b| x[at(pixel)].to_f64() > x[at(b)].to_f64()) {
                            best = Some(pixel);
                        }
                    });
                    if let Some(best) = best {
                        add_to(element(best), g);
                    }
                }
                Pooling::Average => {
                    let mut count = 0;
                    window.for_pixels(position, |_| count += 1);
                    if shape.count_include_pad {
                        count = crate::ops::pooling::padded_count(shape, position);
                    }
                    window.for_pixels(position, |pixel| add_to(element(pixel), g / count as f64));
                }
                Pooling::Lp(p) => {
                    let norm = y[from].to_f64();
                    if norm == 0.0 {
                        continue;
                    }
                    let p = p as f64;
                    window.for_pixels(position, |pixel| {
                        let v = x[at(pixel)].to_f64();
                        if v != 0.0 {
                            add_to(element(pixel), g * v.signum() * (v.abs() / norm).powf(p - 1.0));
                        }
                    });
                }
            }
        }
    });
    Ok(())
}
