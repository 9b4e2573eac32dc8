//! Fourier transforms, windows and mel filters.

use lightering_graph::{Op, TensorType, WindowKind};
use lightering_kernels::ops::fourier::{
    Complex, FourierPlan, WindowShape, fourier_buffer_len, fourier_table_len, mel_weights, window_value,
};
use lightering_kernels::ops::real::Real;
use lightering_units::Bytes;

use super::operands::*;
use super::{OpError, TensorView, TensorViewMut};

/// Dispatch of this family.
pub(super) fn compute(
    op: &Op,
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
    workspace: &mut [u8],
) -> Result<(), OpError> {
    let Some(Some(out)) = outputs.first_mut() else { return Ok(()) };
    match op {
        Op::Dft { inverse, onesided } => {
            with_real!(out.dtype, T => dft::<T>(*inverse, *onesided, inputs, out, workspace))
        }
        Op::Stft { onesided } => with_real!(out.dtype, T => stft::<T>(*onesided, inputs, out, workspace)),
        Op::MelWeightMatrix { .. } => mel_weight_matrix(inputs, out),
        Op::Window { kind, periodic, .. } => {
            let shape = match kind {
                WindowKind::Hann => WindowShape::Hann,
                WindowKind::Hamming => WindowShape::Hamming,
                WindowKind::Blackman => WindowShape::Blackman,
            };
            let size = count(out.dims);
            (0..size).try_for_each(|n| store_number(out, n, window_value(shape, n, size, *periodic)))
        }
        _ => Err(super::no_kernel(op)),
    }
}

fn scratch_elements(n: usize) -> usize {
    n + fourier_table_len(n) + fourier_buffer_len(n)
}

/// Scratch of this family. The length of a transform may be an operand; the result's shape tells it.
pub(super) fn workspace_bytes(op: &Op, outputs: &[Option<&TensorType>]) -> Bytes {
    let Some(y) = outputs.first().copied().flatten().and_then(TensorType::dims) else { return Bytes::ZERO };
    // Any dimension of the result may be the transformed one, as the axis may be an operand. Half of a spectrum
    // belongs to one of two lengths.
    let lengths = |&bins: &usize, onesided: bool| {
        let halves =
            if onesided { [(2 * bins).saturating_sub(2), (2 * bins).saturating_sub(1)] } else { [0; 2] };
        [bins, halves[0], halves[1]].map(|n| scratch_elements(n.max(1))).into_iter().max().unwrap_or(0)
    };
    let longest = match op {
        Op::Dft { onesided, .. } => y.iter().map(|n| lengths(n, *onesided)).max().unwrap_or(0),
        Op::Stft { onesided } => y.get(2).map_or(0, |n| lengths(n, *onesided)),
        _ => 0,
    };
    Bytes((longest * size_of::<Complex>()) as u64)
}

/// Transforms strided lines: `load(line, i)` gives element `i` of `length` (zeros beyond), `store` takes the result.
fn transform_lines(
    lines: usize,
    length: usize,
    inverse: bool,
    workspace: &mut [u8],
    load: impl Fn(usize, usize) -> Complex,
    mut store: impl FnMut(usize, &[Complex]),
) -> Result<(), OpError> {
    if length == 0 {
        return invalid("a Fourier transform of length 0");
    }
    let all = scratch::<Complex>(workspace, scratch_elements(length))?;
    let (data, rest) = all.split_at_mut(length);
    let (table, buffer) = rest.split_at_mut(fourier_table_len(length));
    let plan = FourierPlan::new(length, table, buffer);
    for line in 0..lines {
        for (i, value) in data.iter_mut().enumerate() {
            *value = load(line, i);
        }
        plan.run(data, buffer, inverse);
        store(line, data);
    }
    Ok(())
}

fn read_complex<T: Real>(x: &[T], at: usize, parts: usize) -> Complex {
    let im = if parts == 2 { x[at * 2 + 1].to_f64() } else { 0.0 };
    Complex::new(x[at * parts].to_f64(), im)
}

fn dft<T: Real>(
    inverse: bool,
    onesided: bool,
    inputs: &[Option<TensorView>],
    out: &mut TensorViewMut,
    workspace: &mut [u8],
) -> Result<(), OpError> {
    let x = required(inputs, 0, "x")?;
    expect_dtype(&x, T::DTYPE, "x")?;
    let rank = x.dims.len();
    let axis = optional(inputs, 2).map_or(Ok(-2), |a| integer_scalar(&a, "the axis"))?;
    let axis = normal_axis(axis, rank)?;
    if rank < 2 || axis == rank - 1 || out.dims.len() != rank {
        return invalid(format!("a Fourier transform along axis {axis} of shape {:?}", x.dims));
    }
    let parts = x.dims[rank - 1];
    let out_parts = out.dims[rank - 1];
    if !matches!(parts, 1 | 2) || !matches!(out_parts, 1 | 2) {
        return invalid(format!("the last dimension of {:?} is neither 1 nor 2", x.dims));
    }
    // Half of a spectrum stands for a whole one when it is transformed back to real numbers.
    let halved = inverse && onesided && out_parts == 1;
    let given = x.dims[axis];
    let natural = if halved { 2 * given.max(1) - 2 } else { given };
    let length = match optional(inputs, 1) {
        None => natural,
        Some(l) => usize::try_from(integer_scalar(&l, "dft_length")?)
            .map_err(|_| OpError::Invalid("dft_length is negative".into()))?,
    };
    let bins = out.dims[axis];
    let expected = if onesided && !halved { length / 2 + 1 } else { length };
    if bins != expected {
        return invalid(format!("a transform of length {length} gives {expected} bins, not {bins}"));
    }
    let inner: usize = x.dims[axis + 1..rank - 1].iter().product();
    let outer: usize = x.dims[..axis].iter().product();
    let (x, y) = (x.as_slice::<T>(), out.as_mut_slice::<T>());
    let line_start = |line: usize, size: usize| line / inner * size * inner + line % inner;
    transform_lines(
        outer * inner,
        length,
        inverse,
        workspace,
        |line, i| {
            let at = |i: usize| read_complex(x, line_start(line, given) + i * inner, parts);
            if halved && i > length / 2 {
                let mirrored = if length - i < given { at(length - i) } else { Complex::default() };
                return Complex::new(mirrored.re, -mirrored.im);
            }
            if i < given { at(i) } else { Complex::default() }
        },
        |line, values| {
            for (i, value) in values[..bins].iter().enumerate() {
                let at = (line_start(line, bins) + i * inner) * out_parts;
                y[at] = T::from_f64(value.re);
                if out_parts == 2 {
                    y[at + 1] = T::from_f64(value.im);
                }
            }
        },
    )
}

fn stft<T: Real>(
    onesided: bool,
    inputs: &[Option<TensorView>],
    out: &mut TensorViewMut,
    workspace: &mut [u8],
) -> Result<(), OpError> {
    let x = required(inputs, 0, "the signal")?;
    expect_dtype(&x, T::DTYPE, "the signal")?;
    let (batch, samples, parts) = match *x.dims {
        [batch, samples] => (batch, samples, 1),
        [batch, samples, parts @ (1 | 2)] => (batch, samples, parts),
        _ => return invalid(format!("the signal has shape {:?}", x.dims)),
    };
    let step = integer_scalar(&required(inputs, 1, "the step")?, "the step")?;
    let Some(step) = usize::try_from(step).ok().filter(|&s| s > 0) else {
        return invalid(format!("a step of {step} samples"));
    };
    let window = optional(inputs, 2);
    if let Some(w) = &window {
        expect_dtype(w, T::DTYPE, "the window")?;
    }
    let length = match optional(inputs, 3) {
        Some(l) => usize::try_from(integer_scalar(&l, "frame_length")?)
            .map_err(|_| OpError::Invalid("frame_length is negative".into()))?,
        None => window.map_or(samples, |w| count(w.dims)),
    };
    let window = window.map(|w| w.as_slice::<T>());
    if window.is_some_and(|w| w.len() > length) || length > samples {
        return invalid(format!("frames of {length} samples in a signal of {samples}"));
    }
    let frames = (samples - length) / step + 1;
    let bins = if onesided { length / 2 + 1 } else { length };
    expect_dims(out.dims, &[batch, frames, bins, 2], "the result")?;
    let (x, y) = (x.as_slice::<T>(), out.as_mut_slice::<T>());
    transform_lines(
        batch * frames,
        length,
        false,
        workspace,
        |line, i| {
            let weight = match window {
                None => 1.0,
                Some(w) => w.get(i).map_or(0.0, |w| w.to_f64()),
            };
            let value = read_complex(x, line / frames * samples + line % frames * step + i, parts);
            Complex::new(value.re * weight, value.im * weight)
        },
        |line, values| {
            for (y, value) in y[line * bins * 2..].chunks_exact_mut(2).zip(&values[..bins]) {
                y[0] = T::from_f64(value.re);
                y[1] = T::from_f64(value.im);
            }
        },
    )
}

fn mel_weight_matrix(inputs: &[Option<TensorView>], out: &mut TensorViewMut) -> Result<(), OpError> {
    let number = |i: usize, name: &str| number_scalar(&required(inputs, i, name)?, name);
    let size = |i: usize, name: &str| {
        usize::try_from(integer_scalar(&required(inputs, i, name)?, name)?)
            .map_err(|_| OpError::Invalid(format!("{name} is negative")))
    };
    let (bins, length) = (size(0, "num_mel_bins")?, size(1, "dft_length")?);
    let (rate, low, high) = (number(2, "sample_rate")?, number(3, "lower_edge")?, number(4, "upper_edge")?);
    expect_dims(out.dims, &[length / 2 + 1, bins], "the result")?;
    out.bytes.fill(0);
    let mut stored = Ok(());
    let inside = mel_weights(bins, length, rate, (low, high), |row, column, weight| {
        if let Err(error) = store_number(out, row * bins + column, weight) {
            stored = Err(error);
        }
    });
    if !inside {
        return invalid(format!(
            "mel filters from {low} Hz to {high} Hz do not fit {length} samples at {rate} Hz"
        ));
    }
    stored
}
