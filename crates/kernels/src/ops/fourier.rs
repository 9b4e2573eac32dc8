//! Discrete Fourier transforms of any length, windows and mel filters.
//!
//! Lengths whose prime factors are at most 13 go through Stockham's self-sorting mixed-radix algorithm; others
//! become a circular convolution of a power-of-two length (Bluestein, 1970). Everything is computed in `f64`.

use bytemuck::{Pod, Zeroable};

/// A complex number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Complex {
    /// Real part.
    pub re: f64,
    /// Imaginary part.
    pub im: f64,
}

impl Complex {
    /// `re + i·im`.
    pub const fn new(re: f64, im: f64) -> Complex {
        Complex { re, im }
    }

    /// `e^(i·angle)`.
    fn from_angle(angle: f64) -> Complex {
        let (im, re) = angle.sin_cos();
        Complex { re, im }
    }

    fn conj(self) -> Complex {
        Complex { re: self.re, im: -self.im }
    }
}

impl std::ops::Add for Complex {
    type Output = Complex;
    #[inline(always)]
    fn add(self, b: Complex) -> Complex {
        Complex { re: self.re + b.re, im: self.im + b.im }
    }
}

impl std::ops::Mul for Complex {
    type Output = Complex;
    #[inline(always)]
    fn mul(self, b: Complex) -> Complex {
        Complex { re: self.re * b.re - self.im * b.im, im: self.re * b.im + self.im * b.re }
    }
}

const RADICES: [usize; 7] = [4, 2, 3, 5, 7, 11, 13];

fn is_smooth(mut n: usize) -> bool {
    for radix in RADICES {
        while n > 1 && n.is_multiple_of(radix) {
            n /= radix;
        }
    }
    n <= 1
}

/// Length of the convolution for lengths that are not smooth.
fn convolution_len(n: usize) -> usize {
    (2 * n - 1).next_power_of_two()
}

/// Elements of the tables of a [`FourierPlan`].
pub fn fourier_table_len(n: usize) -> usize {
    if is_smooth(n) { n } else { 2 * convolution_len(n) + n }
}

/// Elements of the buffer that [`FourierPlan::run`] works in.
pub fn fourier_buffer_len(n: usize) -> usize {
    if is_smooth(n) { n } else { 2 * convolution_len(n) }
}

/// Roots of unity for transforms of one length, in memory of the caller.
#[derive(Clone, Copy, Debug)]
pub struct FourierPlan<'a> {
    len: usize,
    /// Of the smooth length.
    roots: &'a [Complex],
    /// Chirp of the length and transformed filter of the convolution's length.
    bluestein: Option<(&'a [Complex], &'a [Complex])>,
}

fn fill_roots(roots: &mut [Complex]) {
    let step = -std::f64::consts::TAU / roots.len() as f64;
    for (k, root) in roots.iter_mut().enumerate() {
        *root = Complex::from_angle(step * k as f64);
    }
}

impl<'a> FourierPlan<'a> {
    /// Fills `table` ([`fourier_table_len`] elements) for transforms of `n` elements, `buffer`
    /// ([`fourier_buffer_len`]) being scratch.
    pub fn new(n: usize, table: &'a mut [Complex], buffer: &mut [Complex]) -> FourierPlan<'a> {
        if is_smooth(n) {
            let roots = &mut table[..n];
            fill_roots(roots);
            return FourierPlan { len: n, roots, bluestein: None };
        }
        let m = convolution_len(n);
        let (roots, rest) = table.split_at_mut(m);
        let (chirp, rest) = rest.split_at_mut(n);
        let filter = &mut rest[..m];
        fill_roots(roots);
        for (k, c) in chirp.iter_mut().enumerate() {
            // k² modulo 2n keeps the angle small and so exact.
            let square = (k as u128 * k as u128 % (2 * n as u128)) as f64;
            *c = Complex::from_angle(-std::f64::consts::PI * square / n as f64);
        }
        filter.fill(Complex::default());
        filter[0] = chirp[0].conj();
        for k in 1..n {
            filter[k] = chirp[k].conj();
            filter[m - k] = chirp[k].conj();
        }
        smooth_transform(roots, filter, &mut buffer[..m]);
        FourierPlan { len: n, roots, bluestein: Some((chirp, filter)) }
    }

    /// Transforms `data` in place: forward without a factor, backward divided by the length.
    pub fn run(&self, data: &mut [Complex], buffer: &mut [Complex], inverse: bool) {
        let data = &mut data[..self.len];
        if inverse {
            data.iter_mut().for_each(|x| *x = x.conj());
        }
        match self.bluestein {
            None => smooth_transform(self.roots, data, &mut buffer[..self.len]),
            Some((chirp, filter)) => {
                let m = self.roots.len();
                let (work, buffer) = buffer.split_at_mut(m);
                for ((w, &x), &c) in work.iter_mut().zip(data.iter()).zip(chirp) {
                    *w = x * c;
                }
                work[self.len..].fill(Complex::default());
                smooth_transform(self.roots, work, &mut buffer[..m]);
                // The backward transform is the forward one between two conjugations.
                for (w, &f) in work.iter_mut().zip(filter) {
                    *w = (*w * f).conj();
                }
                smooth_transform(self.roots, work, &mut buffer[..m]);
                let scale = 1.0 / m as f64;
                for ((x, &w), &c) in data.iter_mut().zip(work.iter()).zip(chirp) {
                    let y = w.conj() * c;
                    *x = Complex::new(y.re * scale, y.im * scale);
                }
            }
        }
        if inverse {
            let scale = 1.0 / self.len as f64;
            data.iter_mut().for_each(|x| *x = Complex::new(x.re * scale, -x.im * scale));
        }
    }
}

/// Forward transform of a length whose prime factors are at most 13; the roots are those of this length.
fn smooth_transform(roots: &[Complex], data: &mut [Complex], buffer: &mut [Complex]) {
    let n = data.len();
    let (mut stride, mut len, mut in_data) = (1, n, true);
    while len > 1 {
        let radix = *RADICES.iter().find(|&&r| len.is_multiple_of(r)).expect("the length is smooth");
        let (from, to): (&[Complex], &mut [Complex]) =
            if in_data { (&*data, &mut *buffer) } else { (&*buffer, &mut *data) };
        match radix {
            2 => stage::<2>(roots, from, to, stride, len),
            3 => stage::<3>(roots, from, to, stride, len),
            4 => stage::<4>(roots, from, to, stride, len),
            5 => stage::<5>(roots, from, to, stride, len),
            7 => stage::<7>(roots, from, to, stride, len),
            11 => stage::<11>(roots, from, to, stride, len),
            _ => stage::<13>(roots, from, to, stride, len),
        }
        stride *= radix;
        len /= radix;
        in_data = !in_data;
    }
    if !in_data {
        data.copy_from_slice(buffer);
    }
}

/// One step of Stockham's algorithm:
/// `to[q + s(Rp + k)] = w_len^(pk) · Σ_j w_R^(jk) · from[q + s(p + jm)]` with `m = len/R`.
fn stage<const R: usize>(roots: &[Complex], from: &[Complex], to: &mut [Complex], stride: usize, len: usize) {
    let m = len / R;
    let spread = roots.len() / R;
    let mut kernel = [[Complex::default(); R]; R];
    for (j, row) in kernel.iter_mut().enumerate() {
        for (k, w) in row.iter_mut().enumerate() {
            *w = roots[j * k % R * spread];
        }
    }
    for p in 0..m {
        let twiddles: [Complex; R] = std::array::from_fn(|k| roots[p * k * stride]);
        for q in 0..stride {
            let a: [Complex; R] = std::array::from_fn(|j| from[q + stride * (p + j * m)]);
            for k in 0..R {
                let mut sum = a[0];
                for j in 1..R {
                    sum = sum + a[j] * kernel[j][k];
                }
                to[q + stride * (R * p + k)] = sum * twiddles[k];
            }
        }
    }
}

/// Which window function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowShape {
    /// `sin²(πn/N)`.
    Hann,
    /// `25/46 − 21/46·cos(2πn/N)`.
    Hamming,
    /// `0.42 − 0.5·cos(2πn/N) + 0.08·cos(4πn/N)`.
    Blackman,
}

/// Element `n` of a window of `size` elements: symmetric, or one period of a periodic function.
pub fn window_value(shape: WindowShape, n: usize, size: usize, periodic: bool) -> f64 {
    use std::f64::consts::PI;
    let period = if periodic { size } else { size.saturating_sub(1) };
    let x = if period == 0 { 0.0 } else { n as f64 / period as f64 };
    match shape {
        // A symmetric window of one element is a one.
        _ if period == 0 => 1.0,
        WindowShape::Hann => (PI * x).sin().powi(2),
        WindowShape::Hamming => 25.0 / 46.0 - 21.0 / 46.0 * (2.0 * PI * x).cos(),
        WindowShape::Blackman => 0.42 - 0.5 * (2.0 * PI * x).cos() + 0.08 * (4.0 * PI * x).cos(),
    }
}

/// Triangular filters that lie evenly on the mel scale: writes `[dft_length/2 + 1, bins]` weights through
/// `set(row, column, weight)`, all others being zero.
///
/// Returns false, having written nothing more, when a filter lies outside the spectrum.
pub fn mel_weights(
    bins: usize,
    dft_length: usize,
    sample_rate: f64,
    (lower_hz, upper_hz): (f64, f64),
    mut set: impl FnMut(usize, usize, f64),
) -> bool {
    let mel = |hz: f64| 2595.0 * (1.0 + hz / 700.0).log10();
    let (low, high) = (mel(lower_hz), mel(upper_hz));
    let step = (high - low) / (bins + 2) as f64;
    let rows = dft_length / 2 + 1;
    let edge = |i: usize| {
        let hz = 700.0 * (10f64.powf((i as f64 * step + low) / 2595.0) - 1.0);
        ((dft_length + 1) as f64 * hz / sample_rate).floor()
    };
    for i in 0..bins {
        let (left, centre, right) = (edge(i), edge(i + 1), edge(i + 2));
        let inside = |x: f64| x >= 0.0 && x < rows as f64;
        if !(inside(left) && inside(centre) && right <= rows as f64 && left <= centre && centre <= right) {
            return false;
        }
        let (left, centre, right) = (left as usize, centre as usize, right as usize);
        if left == centre {
            set(centre, i, 1.0);
        } else {
            for j in left..=centre {
                set(j, i, (j - left) as f64 / (centre - left) as f64);
            }
        }
        for j in centre..right {
            set(j, i, (right - j) as f64 / (right - centre) as f64);
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transform(x: &[Complex], inverse: bool) -> Vec<Complex> {
        let n = x.len();
        let mut table = vec![Complex::default(); fourier_table_len(n)];
        let mut buffer = vec![Complex::default(); fourier_buffer_len(n)];
        let plan = FourierPlan::new(n, &mut table, &mut buffer);
        let mut data = x.to_vec();
        plan.run(&mut data, &mut buffer, inverse);
        data
    }

    #[test]
    fn every_length_matches_the_definition_and_inverts() {
        for n in (1..70).chain([97, 101, 128, 400, 17 * 19, 13 * 11 * 7]) {
            let x: Vec<Complex> =
                (0..n).map(|i| Complex::new((i as f64 * 1.3).sin(), (i as f64 * 0.7 + 1.0).cos())).collect();
            let y = transform(&x, false);
            for k in (0..n).step_by(1 + n / 20) {
                let mut sum = Complex::default();
                for (i, &x) in x.iter().enumerate() {
                    sum =
                        sum + x * Complex::from_angle(-std::f64::consts::TAU * (i * k % n) as f64 / n as f64);
                }
                assert!((sum.re - y[k].re).abs() + (sum.im - y[k].im).abs() < 1e-9 * n as f64, "{n} {k}");
            }
            for (a, b) in x.iter().zip(transform(&y, true)) {
                assert!((a.re - b.re).abs() + (a.im - b.im).abs() < 1e-11 * n as f64, "{n}");
            }
        }
    }

    #[test]
    fn windows_are_symmetric_or_periodic() {
        for shape in [WindowShape::Hann, WindowShape::Hamming, WindowShape::Blackman] {
            for n in 0..9 {
                let (a, b) = (window_value(shape, n, 9, false), window_value(shape, 8 - n, 9, false));
                assert!((a - b).abs() < 1e-12);
                // A periodic window is a symmetric one of one element more, cut at the end.
                assert!((a - window_value(shape, n, 8, true)).abs() < 1e-12);
            }
        }
    }
}
