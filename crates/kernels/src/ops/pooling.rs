//! Windows that yield one number, and regions of interest.

use super::block::parallel_parts;
use super::convolution::Window;
use super::tile::{Real, RealCompute, SharedResult, with_number, with_real};
use super::{OpError, TensorView, TensorViewMut};
use crate::ThreadPool;

/// Which number a window yields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The largest.
    Max,
    /// The mean.
    Average,
    /// The p-norm.
    Lp(i64),
}

/// Everything about a pooling operator but its data.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolingShape {
    /// Which number.
    pub kind: Pooling,
    /// Samples.
    pub batch: usize,
    /// Channels.
    pub channels: usize,
    /// The windows.
    pub window: Window,
    /// Padding after the last element, per spatial axis.
    pub pads_end: Vec<i64>,
    /// Averages over the padding, too.
    pub count_include_pad: bool,
    /// Indices of maxima count column by column.
    pub column_major: bool,
    /// `[batch, spatial…, channels]` rather than `[batch, channels, spatial…]`.
    pub channels_last: bool,
}

/// Pools; `indices` are those of the maxima in the flattened input.
///
/// # Errors
/// [`OpError::Invalid`] when sizes do not fit, [`OpError::Unsupported`] for types without a kernel.
pub fn pooling(
    pool: &ThreadPool,
    shape: &PoolingShape,
    x: &TensorView,
    y: &mut TensorViewMut,
    indices: Option<&mut [i64]>,
) -> Result<(), OpError> {
    let planes = shape.batch * shape.channels;
    let fits = x.len() == planes * shape.window.pixels()
        && y.len() == planes * shape.window.positions()
        && x.dtype == y.dtype
        && indices.as_ref().is_none_or(|i| i.len() == y.len());
    if !fits {
        return Err(OpError::Invalid(format!("pooling of {:?} does not give {:?}", x.dims, y.dims)));
    }
    match shape.kind {
        Pooling::Max => with_number!(x.dtype, "MaxPool", S => {
            run::<S>(pool, shape, x.as_slice(), y.as_mut_slice(), indices);
        }),
        _ => with_real!(x.dtype, "pooling", S => {
            run::<S>(pool, shape, x.as_slice(), y.as_mut_slice(), indices);
        }),
    }
    Ok(())
}

fn run<S: Real>(pool: &ThreadPool, shape: &PoolingShape, x: &[S], y: &mut [S], indices: Option<&mut [i64]>) {
    let window = &shape.window;
    let (positions, pixels) = (window.positions(), window.pixels());
    // Elements of a window that can lie on the input, which says how much work one result is.
    let taps = window.kernel.iter().zip(&window.input).fold(1usize, |n, (&k, &i)| n.saturating_mul(k.min(i)));
    let of = <S::C as RealCompute>::of;
    let indices = indices.map(SharedResult::new);
    parallel_parts(pool, y, (16 << 10) / taps.clamp(1, 1024), &|start, part| {
        for (i, out) in part.iter_mut().enumerate() {
            let index = start + i;
            let (sample, channel, position) = if shape.channels_last {
                let (rest, channel) = (index / shape.channels, index % shape.channels);
                (rest / positions, channel, rest % positions)
            } else {
                let (plane, position) = (index / positions, index % positions);
                (plane / shape.channels, plane % shape.channels, position)
            };
            let place = |pixel: usize| {
                if shape.channels_last {
                    (sample * pixels + pixel) * shape.channels + channel
                } else {
                    (sample * shape.channels + channel) * pixels + pixel
                }
            };
            match shape.kind {
                Pooling::Max => {
                    let mut best: Option<(usize, S)> = None;
                    window.for_pixels(position, |pixel| {
                        let value = x[place(pixel)];
                        if best.is_none_or(|(_, b)| value.up() > b.up() || value.up().is_nan()) {
                            best = Some((pixel, value));
                        }
                    });
                    *out = best.map_or(S::down(of(f64::NEG_INFINITY)), |(_, v)| v);
                    if let (Some(indices), Some((pixel, _))) = (&indices, best) {
                        let pixel =
                            if shape.column_major { column_major(pixel, &window.input) } else { pixel };
                        let at = (sample * shape.channels + channel) * pixels + pixel;
                        // SAFETY: element `index` belongs to this task alone.
                        unsafe { indices.set(index, at as i64) };
                    }
                }
                Pooling::Average => {
                    let (mut sum, mut count) = (of(0.0), 0usize);
                    window.for_pixels(position, |pixel| {
                        sum += x[place(pixel)].up();
                        count += 1;
                    });
                    if shape.count_include_pad {
                        count = padded_count(shape, position);
                    }
                    *out = S::down(sum / of(count as f64));
                }
                Pooling::Lp(p) => {
                    let mut sum = of(0.0);
                    window.for_pixels(position, |pixel| {
                        let v = x[place(pixel)].up().abs();
                        sum += match p {
                            1 => v,
                            2 => v * v,
                            _ => v.powf(of(p as f64)),
                        };
                    });
                    *out = S::down(match p {
                        1 => sum,
                        2 => sum.sqrt(),
                        _ => sum.powf(of(1.0 / p as f64)),
                    });
                }
            }
        }
    });
}

fn column_major(mut pixel: usize, dims: &[usize]) -> usize {
    let mut coordinates = vec![0; dims.len()];
    for axis in (0..dims.len()).rev() {
        coordinates[axis] = pixel % dims[axis];
        pixel /= dims[axis];
    }
    coordinates.iter().zip(dims).rev().fold(0, |index, (&c, &d)| index * d + c)
}

/// Window elements that lie on the input or on its declared padding, but not beyond.
pub(super) fn padded_count(shape: &PoolingShape, mut position: usize) -> usize {
    let w = &shape.window;
    let mut count = 1;
    for axis in (0..w.input.len()).rev() {
        let o = position % w.output[axis];
        position /= w.output[axis];
        let first = (o * w.strides[axis]) as i64 - w.pads[axis];
        let end = w.input[axis] as i64 + shape.pads_end[axis];
        let step = w.dilations[axis] as i64;
        let inside = ((end - first + step - 1) / step).clamp(0, w.kernel[axis] as i64);
        count *= inside as usize;
    }
    count
}

/// Puts each element where its maximum came from; the rest is 0. `inferred` is the shape that the indices count in,
/// of which the result is at least as large.
///
/// # Errors
/// [`OpError::Invalid`] when an index is out of range or shapes do not fit.
pub fn max_unpool(
    x: &TensorView,
    indices: &TensorView,
    inferred: &[usize],
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let total: usize = inferred.iter().product();
    if x.len() != indices.len()
        || inferred.len() != y.dims.len()
        || indices.dtype != lightering_units::DType::I64
    {
        return Err(OpError::Invalid(format!("MaxUnpool of {:?} and {:?}", x.dims, indices.dims)));
    }
    let size = y.dtype.size_bytes();
    y.bytes.fill(0);
    for (i, &index) in indices.as_slice::<i64>().iter().enumerate() {
        let index = usize::try_from(index).ok().filter(|&v| v < total).ok_or_else(|| {
            OpError::Invalid(format!("MaxUnpool: index {index} is out of range for {total} elements"))
        })?;
        let (mut rest, mut target, mut step, mut inside) = (index, 0, 1, true);
        for axis in (0..inferred.len()).rev() {
            let coordinate = rest % inferred[axis];
            rest /= inferred[axis];
            inside &= coordinate < y.dims[axis];
            target += coordinate * step;
            step *= y.dims[axis];
        }
        if inside {
            y.bytes[target * size..(target + 1) * size].copy_from_slice(&x.bytes[i * size..(i + 1) * size]);
        }
    }
    Ok(())
}

/// Largest element of each bin of each region; `rois` are `[count, 5]`: sample, x1, y1, x2, y2.
///
/// # Errors
/// [`OpError::Invalid`] when a region names a sample that does not exist.
pub fn max_roi_pool(
    spatial_scale: f32,
    x: &TensorView,
    rois: &TensorView,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let ([batch, channels, height, width], [count, _, rows, columns]) = (four(x.dims)?, four(y.dims)?);
    if rois.len() != count * 5 || rois.dtype != x.dtype || x.dtype != y.dtype {
        return Err(OpError::Invalid(format!("MaxRoiPool with regions of shape {:?}", rois.dims)));
    }
    with_real!(x.dtype, "MaxRoiPool", S => {
        let (x, y, rois) = (x.as_slice::<S>(), y.as_mut_slice::<S>(), rois.as_slice::<S>());
        for n in 0..count {
            let roi: Vec<f64> = rois[n * 5..n * 5 + 5].iter().map(|v| super::block::Compute::to_f64(v.up())).collect();
            let sample = roi[0] as usize;
            if roi[0] < 0.0 || sample >= batch {
                return Err(OpError::Invalid(format!("MaxRoiPool: region {n} names sample {}", roi[0])));
            }
            // Far outside any picture is as good as infinitely far, and its sums do not overflow.
            const FAR: f64 = (1u64 << 40) as f64;
            let scaled = |v: f64| (v * f64::from(spatial_scale)).round().clamp(-FAR, FAR) as i64;
            let (x1, y1, x2, y2) = (scaled(roi[1]), scaled(roi[2]), scaled(roi[3]), scaled(roi[4]));
            let bin = |from: i64, to: i64, bins: usize, i: usize, limit: usize| {
                let size = (to - from + 1).max(1) as f64 / bins as f64;
                let start = (i as f64 * size).floor() as i64 + from;
                let end = ((i + 1) as f64 * size).ceil() as i64 + from;
                (start.clamp(0, limit as i64) as usize, end.clamp(0, limit as i64) as usize)
            };
            for c in 0..channels {
                let plane = &x[(sample * channels + c) * height * width..][..height * width];
                for r in 0..rows {
                    let (top, bottom) = bin(y1, y2, rows, r, height);
                    for q in 0..columns {
                        let (left, right) = bin(x1, x2, columns, q, width);
                        let mut best: Option<S> = None;
                        for v in top..bottom {
                            for u in left..right {
                                let value = plane[v * width + u];
                                if best.is_none_or(|b| value.up() > b.up()) {
                                    best = Some(value);
                                }
                            }
                        }
                        y[((n * channels + c) * rows + r) * columns + q] =
                            best.unwrap_or(S::down(RealCompute::of(0.0)));
                    }
                }
            }
        }
    });
    Ok(())
}

fn four(dims: &[usize]) -> Result<[usize; 4], OpError> {
    dims.try_into().map_err(|_| OpError::Invalid(format!("expected four dimensions, found {dims:?}")))
}

/// How [`roi_align`] samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoiAlignShape {
    /// Maximum instead of mean of the samples.
    pub max: bool,
    /// Samples per bin and axis; adaptive when 0.
    pub sampling_ratio: usize,
    /// From region coordinates to input coordinates.
    pub spatial_scale: f32,
    /// Pixel centres are at halves.
    pub half_pixel: bool,
}

/// Samples regions by bilinear interpolation (He et al., 2017); `rois` are `[count, 4]`: x1, y1, x2, y2.
///
/// # Errors
/// [`OpError::Invalid`] when a region names a sample that does not exist or is absurdly large.
pub fn roi_align(
    pool: &ThreadPool,
    shape: RoiAlignShape,
    x: &TensorView,
    rois: &TensorView,
    samples: &[i64],
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let ([batch, channels, height, width], [count, _, rows, columns]) = (four(x.dims)?, four(y.dims)?);
    if rois.len() != count * 4 || samples.len() != count || rois.dtype != x.dtype || x.dtype != y.dtype {
        return Err(OpError::Invalid(format!("RoiAlign with regions of shape {:?}", rois.dims)));
    }
    if x.is_empty() && !y.is_empty() {
        return Err(OpError::Invalid(format!("RoiAlign of an empty picture {:?}", x.dims)));
    }
    if let Some(bad) = samples.iter().find(|&&s| s < 0 || s as usize >= batch) {
        return Err(OpError::Invalid(format!("RoiAlign: a region names sample {bad} of {batch}")));
    }
    /// Most samples per axis of a bin; a larger region is refused instead of running for ever.
    const SAMPLES_MAX: f64 = 4096.0;
    with_real!(x.dtype, "RoiAlign", S => {
        let (x, rois) = (x.as_slice::<S>(), rois.as_slice::<S>());
        let to_f64 = |v: S| super::block::Compute::to_f64(v.up());
        let geometry = |n: usize| {
            let scale = f64::from(shape.spatial_scale);
            let offset = if shape.half_pixel { 0.5 } else { 0.0 };
            let at = |i: usize| to_f64(rois[n * 4 + i]) * scale - offset;
            let (mut w, mut h) = (at(2) - at(0), at(3) - at(1));
            if !shape.half_pixel {
                (w, h) = (w.max(1.0), h.max(1.0));
            }
            (at(0), at(1), w / columns as f64, h / rows as f64)
        };
        for n in 0..count {
            let (_, _, bin_w, bin_h) = geometry(n);
            if !(bin_w.abs() <= SAMPLES_MAX && bin_h.abs() <= SAMPLES_MAX) {
                return Err(OpError::Invalid(format!("RoiAlign: region {n} is too large")));
            }
        }
        parallel_parts(pool, y.as_mut_slice::<S>(), rows * columns, &|start, part| {
            let plane_index = start / (rows * columns);
            let (n, c) = (plane_index / channels, plane_index % channels);
            let plane = &x[(samples[n] as usize * channels + c) * height * width..][..height * width];
            let (x0, y0, bin_w, bin_h) = geometry(n);
            let grid = |bin: f64| if shape.sampling_ratio > 0 { shape.sampling_ratio } else { bin.ceil().max(0.0) as usize };
            let (grid_h, grid_w) = (grid(bin_h), grid(bin_w));
            for (i, out) in part.iter_mut().enumerate() {
                let (r, q) = (i / columns, i % columns);
                let (mut sum, mut best) = (0.0f64, None::<f64>);
                for gy in 0..grid_h {
                    let v = y0 + r as f64 * bin_h + (gy as f64 + 0.5) * bin_h / grid_h as f64;
                    for gx in 0..grid_w {
                        let u = x0 + q as f64 * bin_w + (gx as f64 + 0.5) * bin_w / grid_w as f64;
                        if v < -1.0 || v > height as f64 || u < -1.0 || u > width as f64 {
                            if shape.max {
                                best = Some(best.map_or(0.0, |b: f64| b.max(0.0)));
                            }
                            continue;
                        }
                        let split = |p: f64, size: usize| {
                            let p = p.max(0.0);
                            let low = p as usize;
                            if low + 1 >= size { (size - 1, size - 1, 0.0) } else { (low, low + 1, p - low as f64) }
                        };
                        let ((v0, v1, fv), (u0, u1, fu)) = (split(v, height), split(u, width));
                        let at = |v: usize, u: usize| to_f64(plane[v * width + u]);
                        let corners = [
                            (1.0 - fv) * (1.0 - fu) * at(v0, u0),
                            (1.0 - fv) * fu * at(v0, u1),
                            fv * (1.0 - fu) * at(v1, u0),
                            fv * fu * at(v1, u1),
                        ];
                        sum += corners.iter().sum::<f64>();
                        // ONNX takes the maximum over the weighted corners, not over the interpolated samples.
                        let most = corners.into_iter().fold(f64::NEG_INFINITY, f64::max);
                        best = Some(best.map_or(most, |b| b.max(most)));
                    }
                }
                let value = if shape.max { best.unwrap_or(0.0) } else { sum / (grid_h * grid_w).max(1) as f64 };
                *out = S::down(RealCompute::of(value));
            }
        });
    });
    Ok(())
}
