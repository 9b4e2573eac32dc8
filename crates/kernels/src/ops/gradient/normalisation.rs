//! Normalisations and softmax.

use super::add_to;
use crate::ThreadPool;
use crate::ops::Along;
use crate::ops::real::Real;
use crate::ops::rows::parallel_rows;

/// `dx` of softmax, or of its logarithm, from its result `y`.
pub fn softmax_grad<T: Real>(pool: &ThreadPool, along: Along, log: bool, y: &[T], dy: &[T], dx: &mut [T]) {
    let row = along.size * along.inner;
    parallel_rows(pool, dx, row, 1, &|first, dx| {
        for (r, dx) in dx.chunks_exact_mut(row).enumerate() {
            let base = (first + r) * row;
            for j in 0..along.inner {
                let at = |i: usize| i * along.inner + j;
                let (y, g) = (|i: usize| y[base + at(i)].to_f64(), |i: usize| dy[base + at(i)].to_f64());
                let total: f64 = (0..along.size).map(|i| if log { g(i) } else { g(i) * y(i) }).sum();
                for i in 0..along.size {
                    let value = if log { g(i) - y(i).exp() * total } else { y(i) * (g(i) - total) };
                    dx[at(i)] = T::from_f64(value);
                }
            }
        }
    });
}

/// Gradients of layer normalisation over rows of `row` elements, or of root-mean-square normalisation if `rms`:
/// `(dx, dscale, dbias)`, each as far as it is wanted.
pub fn layer_norm_grad<T: Real>(
    row: usize,
    rms: bool,
    epsilon: f32,
    x: &[T],
    scale: Option<&[T]>,
    dy: &[T],
    [mut dx, mut dscale, mut dbias]: [Option<&mut [T]>; 3],
) {
    for out in [&mut dscale, &mut dbias].into_iter().flatten() {
        out.fill(T::from_f64(0.0));
    }
    let n = row as f64;
    for (r, (x, dy)) in x.chunks_exact(row).zip(dy.chunks_exact(row)).enumerate() {
        let mean = if rms { 0.0 } else { x.iter().map(|v| v.to_f64()).sum::<f64>() / n };
        let square = x.iter().map(|v| (v.to_f64() - mean).powi(2)).sum::<f64>() / n;
        let inverse = 1.0 / (square + f64::from(epsilon)).sqrt();
        let normal = |i: usize| (x[i].to_f64() - mean) * inverse;
        let g = |i: usize| dy[i].to_f64() * scale.map_or(1.0, |s| s[i].to_f64());
        let level = if rms { 0.0 } else { (0..row).map(g).sum::<f64>() / n };
        let along = (0..row).map(|i| g(i) * normal(i)).sum::<f64>() / n;
        for i in 0..row {
            if let Some(dx) = dx.as_deref_mut() {
                dx[r * row + i] = T::from_f64(inverse * (g(i) - level - normal(i) * along));
            }
            if let Some(dscale) = dscale.as_deref_mut() {
                add_to(&mut dscale[i], dy[i].to_f64() * normal(i));
            }
            if let Some(dbias) = dbias.as_deref_mut() {
                add_to(&mut dbias[i], dy[i].to_f64());
            }
        }
    }
}

/// Sizes around the axis of the channels.
pub type Channels = Along;

/// Indices of the elements of channel `c`.
fn members(sizes: Channels, c: usize) -> impl Iterator<Item = usize> + Clone {
    (0..sizes.outer).flat_map(move |o| {
        let base = (o * sizes.size + c) * sizes.inner;
        base..base + sizes.inner
    })
}

/// Mean and biased variance of each channel.
pub fn batch_statistics<T: Real>(
    sizes: Channels,
    x: &[T],
    mut mean: Option<&mut [T]>,
    mut variance: Option<&mut [T]>,
) {
    let count = (sizes.outer * sizes.inner).max(1) as f64;
    for c in 0..sizes.size {
        let m = members(sizes, c).map(|i| x[i].to_f64()).sum::<f64>() / count;
        if let Some(mean) = mean.as_deref_mut() {
            mean[c] = T::from_f64(m);
        }
        if let Some(variance) = variance.as_deref_mut() {
            let square = members(sizes, c).map(|i| (x[i].to_f64() - m).powi(2)).sum::<f64>();
            variance[c] = T::from_f64(square / count);
        }
    }
}

/// Sum of each channel.
pub fn channel_sum<T: Real>(sizes: Channels, x: &[T], out: &mut [T]) {
    for (c, out) in out.iter_mut().enumerate() {
        *out = T::from_f64(members(sizes, c).map(|i| x[i].to_f64()).sum());
    }
}

/// What a normalisation per channel knows of its channels.
#[derive(Clone, Copy, Debug)]
pub struct ChannelStatistics<'a, T> {
    /// Mean of each channel.
    pub mean: &'a [T],
    /// Variance of each channel.
    pub variance: &'a [T],
    /// Factor of each channel.
    pub scale: Option<&'a [T]>,
    /// Added to the variance.
    pub epsilon: f32,
}

impl<T: Real> ChannelStatistics<'_, T> {
    fn inverse(&self, c: usize) -> f64 {
        1.0 / (self.variance[c].to_f64() + f64::from(self.epsilon)).sqrt()
    }

    fn factor(&self, c: usize) -> f64 {
        self.scale.map_or(1.0, |s| s[c].to_f64())
    }
}

/// `y = (x − mean) / sqrt(variance + epsilon) · scale + bias`, per channel.
pub fn normalise<T: Real>(
    pool: &ThreadPool,
    sizes: Channels,
    known: &ChannelStatistics<'_, T>,
    bias: Option<&[T]>,
    x: &[T],
    y: &mut [T],
) {
    parallel_rows(pool, y, sizes.inner, 1, &|first, y| {
        for (r, y) in y.chunks_exact_mut(sizes.inner).enumerate() {
            let c = (first + r) % sizes.size;
            let (mean, factor) = (known.mean[c].to_f64(), known.inverse(c) * known.factor(c));
            let offset = bias.map_or(0.0, |b| b[c].to_f64());
            for (y, x) in y.iter_mut().zip(&x[(first + r) * sizes.inner..]) {
                *y = T::from_f64((x.to_f64() - mean) * factor + offset);
            }
        }
    });
}

/// Gradients `(dx, dscale, dbias)` of [`normalise`], each as far as it is wanted. With `batch`, mean and variance are
/// those of `x`, and what flows through them is part of `dx`.
pub fn normalise_grad<T: Real>(
    sizes: Channels,
    known: &ChannelStatistics<'_, T>,
    batch: bool,
    x: &[T],
    dy: &[T],
    [mut dx, mut dscale, mut dbias]: [Option<&mut [T]>; 3],
) {
    let count = (sizes.outer * sizes.inner).max(1) as f64;
    for c in 0..sizes.size {
        let (mean, inverse) = (known.mean[c].to_f64(), known.inverse(c));
        let normal = |i: usize| (x[i].to_f64() - mean) * inverse;
        let (mut sum, mut along) = (0.0, 0.0);
        for i in members(sizes, c) {
            sum += dy[i].to_f64();
            along += dy[i].to_f64() * normal(i);
        }
        if let Some(dscale) = dscale.as_deref_mut() {
            dscale[c] = T::from_f64(along);
        }
        if let Some(dbias) = dbias.as_deref_mut() {
            dbias[c] = T::from_f64(sum);
        }
        if let Some(dx) = dx.as_deref_mut() {
            let factor = inverse * known.factor(c);
            for i in members(sizes, c) {
                let own = if batch { (sum + normal(i) * along) / count } else { 0.0 };
                dx[i] = T::from_f64(factor * (dy[i].to_f64() - own));
            }
        }
    }
}
