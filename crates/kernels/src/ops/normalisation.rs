//! Normalisations and softmax.

use super::block::{Broadcast, Compute, parallel_parts, to_vec};
use super::tile::{Real, RealCompute, SharedResult, with_number, with_real};
use super::{OpError, TensorView, TensorViewMut, expect_same_count};
use crate::ThreadPool;

/// Sum in double precision, in short runs of the compute type so that it stays fast.
fn sum<S: Real>(values: &[S], f: impl Fn(S::C) -> S::C) -> f64 {
    values
        .chunks(128)
        .map(|run| {
            let mut lanes = [<S::C as RealCompute>::of(0.0); 8];
            let mut chunks = run.chunks_exact(8);
            for chunk in &mut chunks {
                for (lane, v) in lanes.iter_mut().zip(chunk) {
                    *lane += f(v.up());
                }
            }
            let rest: f64 = chunks.remainder().iter().map(|v| f(v.up()).to_f64()).sum();
            lanes.iter().map(|l| l.to_f64()).sum::<f64>() + rest
        })
        .sum()
}

fn mean_and_variance<S: Real>(values: &[S]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = sum(values, |v| v) / count;
    let centre = <S::C as RealCompute>::of(mean);
    let variance = sum(values, |v| (v - centre) * (v - centre)) / count;
    (mean, variance)
}

fn wrong(what: &str, x: &TensorView, y: &TensorViewMut) -> OpError {
    OpError::Invalid(format!("{what} of {}{:?} does not give {}{:?}", x.dtype, x.dims, y.dtype, y.dims))
}

/// Per-channel statistics of [`batch_norm`].
#[derive(Clone, Copy, Debug)]
pub struct BatchStatistics<'a> {
    /// Per channel.
    pub scale: TensorView<'a>,
    /// Per channel.
    pub bias: TensorView<'a>,
    /// Per channel.
    pub mean: TensorView<'a>,
    /// Per channel.
    pub variance: TensorView<'a>,
}

/// Batch normalisation of `[batch, channels, …]`. In training mode (`momentum` given) the statistics of the batch
/// are used, and the running ones are written to `running`.
///
/// # Errors
/// [`OpError::Invalid`] when sizes do not fit, [`OpError::Unsupported`] for types that are no floats.
pub fn batch_norm(
    pool: &ThreadPool,
    epsilon: f32,
    momentum: Option<f32>,
    x: &TensorView,
    given: &BatchStatistics,
    y: &mut TensorViewMut,
    running: [Option<&mut TensorViewMut>; 2],
) -> Result<(), OpError> {
    let channels = x.dims.get(1).copied().unwrap_or(1);
    let batch = x.dims.first().copied().unwrap_or(1);
    let inner: usize = x.dims.iter().skip(2).product();
    let parameters = [&given.scale, &given.bias, &given.mean, &given.variance];
    if x.len() != y.len() || x.dtype != y.dtype || parameters.iter().any(|p| p.len() != channels) {
        return Err(wrong("BatchNorm", x, y));
    }
    let [scale, bias, mut mean, mut variance] = parameters.map(to_vec::<f64>);
    if let Some(momentum) = momentum {
        let (old_mean, old_variance) = (mean.clone(), variance.clone());
        with_real!(x.dtype, "BatchNorm", S => {
            let values = x.as_slice::<S>();
            for c in 0..channels {
                let planes = || (0..batch).map(|n| &values[(n * channels + c) * inner..][..inner]);
                let count = (batch * inner) as f64;
                mean[c] = planes().map(|p| sum(p, |v| v)).sum::<f64>() / count;
                let centre = <<S as Real>::C as RealCompute>::of(mean[c]);
                variance[c] = planes().map(|p| sum(p, |v| (v - centre) * (v - centre))).sum::<f64>() / count;
            }
        });
        let m = f64::from(momentum);
        let news = [(&old_mean, &mean), (&old_variance, &variance)];
        for (target, (old, new)) in running.into_iter().zip(news) {
            let Some(target) = target else { continue };
            let mixed: Vec<f64> = old.iter().zip(new).map(|(o, n)| o * m + n * (1.0 - m)).collect();
            if target.len() != channels {
                return Err(wrong("BatchNorm statistics", x, target));
            }
            f64::store(target.dtype, &mixed, target.bytes);
        }
    }
    with_real!(x.dtype, "BatchNorm", S => {
        let values = x.as_slice::<S>();
        let of = <<S as Real>::C as RealCompute>::of;
        parallel_parts(pool, y.as_mut_slice::<S>(), inner.max(1), &|start, part| {
            let c = start / inner.max(1) % channels;
            let factor = scale[c] / (variance[c] + f64::from(epsilon)).sqrt();
            let (factor, centre, shift) = (of(factor), of(mean[c]), of(bias[c]));
            for (o, v) in part.iter_mut().zip(&values[start..]) {
                *o = S::down((v.up() - centre) * factor + shift);
            }
        });
    });
    Ok(())
}

/// Zero mean and unit variance of each group of channels of each sample; scale and bias per channel. With as many
/// groups as channels this is instance normalisation.
///
/// # Errors
/// As [`batch_norm`].
pub fn group_norm(
    pool: &ThreadPool,
    groups: usize,
    epsilon: f32,
    x: &TensorView,
    scale: &TensorView,
    bias: &TensorView,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let channels = x.dims.get(1).copied().unwrap_or(1);
    let inner: usize = x.dims.iter().skip(2).product();
    if x.len() != y.len()
        || x.dtype != y.dtype
        || groups == 0
        || channels % groups != 0
        || scale.len() != channels
        || bias.len() != channels
    {
        return Err(wrong("GroupNorm", x, y));
    }
    let (scale, bias) = (to_vec::<f64>(scale), to_vec::<f64>(bias));
    let per_group = channels / groups;
    with_real!(x.dtype, "GroupNorm", S => {
        let values = x.as_slice::<S>();
        let of = <<S as Real>::C as RealCompute>::of;
        parallel_parts(pool, y.as_mut_slice::<S>(), (per_group * inner).max(1), &|start, part| {
            let source = &values[start..start + part.len()];
            let (mean, variance) = mean_and_variance(source);
            let inverse = 1.0 / (variance + f64::from(epsilon)).sqrt();
            let group = start / (per_group * inner) % groups;
            for (k, (out, source)) in part.chunks_mut(inner).zip(source.chunks(inner)).enumerate() {
                let c = group * per_group + k;
                let (factor, centre, shift) = (of(inverse * scale[c]), of(mean), of(bias[c]));
                out.iter_mut().zip(source).for_each(|(o, v)| *o = S::down((v.up() - centre) * factor + shift));
            }
        });
    });
    Ok(())
}

/// Normalises the trailing dimensions from `axis` on: to zero mean and unit variance, or (`rms`) by the root of the
/// mean square. Scale and bias broadcast to `x`; `statistics` receive the mean and the inverse deviation per row.
///
/// # Errors
/// As [`batch_norm`].
pub fn layer_norm(
    pool: &ThreadPool,
    axis: usize,
    epsilon: f32,
    rms: bool,
    x: &TensorView,
    scale: &TensorView,
    bias: Option<&TensorView>,
    y: &mut TensorViewMut,
    statistics: [Option<&mut TensorViewMut>; 2],
) -> Result<(), OpError> {
    if x.dims != y.dims || x.dtype != y.dtype || axis > x.dims.len() {
        return Err(wrong("LayerNorm", x, y));
    }
    let row: usize = x.dims[axis..].iter().product();
    let rows = x.dims[..axis].iter().product::<usize>();
    if row == 0 {
        return Ok(());
    }
    let fits =
        |p: &TensorView| Broadcast::new(x.dims, &[p.dims]).ok_or_else(|| wrong("LayerNorm scale", p, y));
    let scale_walk = fits(scale)?;
    let bias_walk = bias.map(fits).transpose()?;
    let [mut mean_out, mut inverse_out] = statistics;
    if [&mean_out, &inverse_out].iter().any(|s| s.as_ref().is_some_and(|s| s.len() != rows)) {
        return Err(wrong("LayerNorm statistics", x, y));
    }
    // (bytes, type) of each statistic, shared between the tasks of different rows.
    let share =
        |t: &mut Option<&mut TensorViewMut>| t.as_mut().map(|t| (SharedResult::new(t.bytes), t.dtype));
    let (mean_out, inverse_out) = (share(&mut mean_out), share(&mut inverse_out));
    with_real!(x.dtype, "LayerNorm", S => {
        type C = <S as Real>::C;
        let values = x.as_slice::<S>();
        let of = <C as RealCompute>::of;
        let rows_per_task = ((16 << 10) / row).max(1);
        parallel_parts(pool, y.as_mut_slice::<S>(), row * rows_per_task, &|start, part| {
            const RUN: usize = 256;
            let (mut factor, mut shift) = ([C::ZERO; RUN], [C::ZERO; RUN]);
            for (i, out) in part.chunks_mut(row).enumerate() {
                let begin = start + i * row;
                let source = &values[begin..begin + row];
                let (mean, spread) = if rms {
                    (0.0, sum(source, |v| v * v) / row as f64)
                } else {
                    mean_and_variance(source)
                };
                let inverse = 1.0 / (spread + f64::from(epsilon)).sqrt();
                for (target, value) in [(&mean_out, mean), (&inverse_out, inverse)] {
                    if let Some((bytes, dtype)) = target {
                        let size = dtype.size_bytes();
                        // SAFETY: each row belongs to one task.
                        f64::store(*dtype, &[value], unsafe { bytes.part(begin / row * size, size) });
                    }
                }
                let (centre, inverse) = (of(mean), of(inverse));
                for (k, (out, source)) in out.chunks_mut(RUN).zip(source.chunks(RUN)).enumerate() {
                    let n = out.len();
                    C::gather(scale.dtype, scale.bytes, &scale_walk.walk(0), begin + k * RUN, &mut factor[..n]);
                    if let (Some(bias), Some(walk)) = (bias, &bias_walk) {
                        C::gather(bias.dtype, bias.bytes, &walk.walk(0), begin + k * RUN, &mut shift[..n]);
                    }
                    for j in 0..n {
                        out[j] = S::down((source[j].up() - centre) * inverse * factor[j] + shift[j]);
                    }
                }
            }
        });
    });
    Ok(())
}

/// Sizes around one axis: elements are `[outer, size, inner]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Along {
    /// Product of the sizes before the axis.
    pub outer: usize,
    /// Size of the axis.
    pub size: usize,
    /// Product of the sizes behind the axis.
    pub inner: usize,
}

impl Along {
    /// The sizes around `axis` of a shape; a scalar has one axis of size 1.
    pub fn new(dims: &[usize], axis: usize) -> Along {
        Along {
            outer: dims.iter().take(axis).product(),
            size: dims.get(axis).copied().unwrap_or(1),
            inner: dims.iter().skip(axis + 1).product(),
        }
    }
}

/// What [`softmax`] yields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SoftmaxKind {
    /// Shares that sum to 1.
    Plain,
    /// Their logarithms.
    Log,
    /// 1 at the first largest element, 0 elsewhere.
    Hard,
}

/// Softmax and its kin along one axis.
///
/// # Errors
/// [`OpError::Invalid`] when shapes differ, [`OpError::Unsupported`] for types that are no floats.
pub fn softmax(
    pool: &ThreadPool,
    kind: SoftmaxKind,
    along: Along,
    x: &TensorView,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    expect_same_count(x, y)?;
    let Along { size, inner, .. } = along;
    if x.dtype != y.dtype || along.outer * size * inner != x.len() {
        return Err(wrong("Softmax", x, y));
    }
    if x.is_empty() {
        return Ok(());
    }
    with_real!(x.dtype, "Softmax", S => {
        let values = x.as_slice::<S>();
        let of = <<S as Real>::C as RealCompute>::of;
        let chunk = size * inner;
        let rows_per_task = ((4 << 10) / chunk).max(1);
        parallel_parts(pool, y.as_mut_slice::<S>(), chunk * rows_per_task, &|start, part| {
            for (i, out) in part.chunks_mut(chunk).enumerate() {
                let source = &values[start + i * chunk..][..chunk];
                for j in 0..inner {
                    let at = |k: usize| source[k * inner + j].up();
                    let (mut best, mut largest) = (0, at(0));
                    for k in 1..size {
                        let v = at(k);
                        if v > largest || (v.is_nan() && !largest.is_nan()) {
                            (best, largest) = (k, v);
                        }
                    }
                    match kind {
                        SoftmaxKind::Hard => {
                            for k in 0..size {
                                out[k * inner + j] = S::down(of(if k == best { 1.0 } else { 0.0 }));
                            }
                        }
                        SoftmaxKind::Log => {
                            let total: f64 = (0..size).map(|k| (at(k) - largest).exp().to_f64()).sum();
                            let log = of(total.ln());
                            for k in 0..size {
                                out[k * inner + j] = S::down(at(k) - largest - log);
                            }
                        }
                        SoftmaxKind::Plain => {
                            let mut total = 0.0f64;
                            for k in 0..size {
                                let e = (at(k) - largest).exp();
                                total += e.to_f64();
                                out[k * inner + j] = S::down(e);
                            }
                            // Half precision would round the exponentials twice; they are computed again there.
                            let exact = size_of::<S>() >= 4;
                            let inverse = of(1.0 / total);
                            for k in 0..size {
                                let e = if exact { out[k * inner + j].up() } else { (at(k) - largest).exp() };
                                out[k * inner + j] = S::down(e * inverse);
                            }
                        }
                    }
                }
            }
        });
    });
    Ok(())
}

/// Divides by the p-norm (p = 1 or 2) along an axis; where the norm is 0 the result is 0.
///
/// # Errors
/// As [`softmax`].
pub fn lp_norm(p: i64, along: Along, x: &TensorView, y: &mut TensorViewMut) -> Result<(), OpError> {
    expect_same_count(x, y)?;
    if x.dtype != y.dtype {
        return Err(wrong("LpNormalization", x, y));
    }
    with_real!(x.dtype, "LpNormalization", S => {
        let (values, out) = (x.as_slice::<S>(), y.as_mut_slice::<S>());
        for o in 0..along.outer {
            for j in 0..along.inner {
                let index = |k: usize| (o * along.size + k) * along.inner + j;
                let total: f64 = (0..along.size)
                    .map(|k| {
                        let v = values[index(k)].up().to_f64();
                        if p == 1 { v.abs() } else { v * v }
                    })
                    .sum();
                let norm = if p == 1 { total } else { total.sqrt() };
                for k in 0..along.size {
                    let v = values[index(k)].up().to_f64();
                    out[index(k)] = S::down(RealCompute::of(if norm == 0.0 { 0.0 } else { v / norm }));
                }
            }
        }
    });
    Ok(())
}

/// To zero mean and unit variance over the axes marked in `reduced`.
///
/// # Errors
/// As [`softmax`].
pub fn mean_variance_norm(reduced: &[bool], x: &TensorView, y: &mut TensorViewMut) -> Result<(), OpError> {
    expect_same_count(x, y)?;
    if x.dtype != y.dtype || reduced.len() != x.dims.len() {
        return Err(wrong("MeanVarianceNormalization", x, y));
    }
    let spaces = super::reduction::Spaces::new(x.dims, reduced);
    let count = spaces.reduced_count() as f64;
    with_real!(x.dtype, "MeanVarianceNormalization", S => {
        let (values, out) = (x.as_slice::<S>(), y.as_mut_slice::<S>());
        for k in 0..spaces.kept_count() {
            let base = spaces.kept_offset(k);
            let members = || (0..spaces.reduced_count()).map(|r| base + spaces.reduced_offset(r));
            let value = |i: usize| values[i].up().to_f64();
            let mean = members().map(value).sum::<f64>() / count;
            let square = members().map(|i| (value(i) - mean).powi(2)).sum::<f64>() / count;
            let deviation = square.sqrt() + 1e-9;
            for i in members() {
                out[i] = S::down(RealCompute::of((value(i) - mean) / deviation));
            }
        }
    });
    Ok(())
}

/// Local response normalisation across channels (Krizhevsky et al., 2012).
///
/// # Errors
/// As [`softmax`].
pub fn local_response_norm(
    pool: &ThreadPool,
    alpha: f32,
    beta: f32,
    bias: f32,
    size: usize,
    x: &TensorView,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    expect_same_count(x, y)?;
    if x.dims.len() < 2 || x.dtype != y.dtype || size == 0 {
        return Err(wrong("LRN", x, y));
    }
    let along = Along::new(x.dims, 1);
    with_number!(x.dtype, "LRN", S => {
        let values = x.as_slice::<S>();
        parallel_parts(pool, y.as_mut_slice::<S>(), along.inner.max(1), &|start, part| {
            let plane = start / along.inner;
            let (n, c) = (plane / along.size, plane % along.size);
            let first = c.saturating_sub((size - 1) / 2);
            let last = (c + size / 2).min(along.size - 1);
            for (j, out) in part.iter_mut().enumerate() {
                let at = |c: usize| values[(n * along.size + c) * along.inner + j].up().to_f64();
                let squares: f64 = (first..=last).map(|c| at(c) * at(c)).sum();
                let scale = f64::from(bias) + f64::from(alpha) / size as f64 * squares;
                *out = S::down(RealCompute::of(at(c) / scale.powf(f64::from(beta))));
            }
        });
    });
    Ok(())
}
