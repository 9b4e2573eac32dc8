//! Functions of one or two 8-bit operands and average pools of them: dequantise, compute, quantise in one sweep.
//!
//! Bytes are handed over as `u8`; [`ByteQuantization::signed`] says whether they are in two's complement.

use super::binary::Binary;
use super::block::{Broadcast, parallel_parts};
use super::pooling::{PoolingShape, padded_count};
use super::quantize::quantize_value;
use super::rows::Shared;
use super::unary::{Unary, unary_f32};
use super::{OpError, Window};
use crate::arch::{Kernel, Simd, dispatch};
use crate::{ThreadPool, activate};

/// Elements that are worth a thread of their own.
const GRAIN: usize = 32 << 10;

/// Channels whose sums a pool keeps at a time.
const CHANNELS: usize = 256;

/// Additions of bytes that a `u32` holds for certain.
const SAFE_ADDITIONS: usize = 1 << 24;

/// What 8-bit elements stand for: `(element - zero) * scale`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ByteQuantization {
    /// Whether elements are `i8` rather than `u8`.
    pub signed: bool,
    /// Zero point, a value of the element type.
    pub zero: i32,
    /// Size of a step.
    pub scale: f32,
}

impl ByteQuantization {
    /// Lowest and highest element.
    pub fn bounds(&self) -> (i32, i32) {
        if self.signed { (-128, 127) } else { (0, 255) }
    }

    /// Flipping these bits turns an element into an unsigned one.
    fn flip(&self) -> u8 {
        if self.signed { 0x80 } else { 0 }
    }

    /// The zero point of elements after [`flip`](Self::flip).
    fn flipped_zero(&self) -> i32 {
        self.zero + if self.signed { 128 } else { 0 }
    }

    fn real(&self, byte: u8) -> f32 {
        (i32::from(byte ^ self.flip()) - self.flipped_zero()) as f32 * self.scale
    }

    fn quantized(&self, x: f32) -> u8 {
        let (low, high) = self.bounds();
        quantize_value(x, self.scale, self.zero, low, high) as u8
    }
}

/// An operand of [`quantized_binary`].
#[derive(Clone, Copy, Debug)]
pub struct ByteOperand<'a> {
    /// The elements.
    pub data: &'a [u8],
    /// Their shape, which broadcasts to that of the result.
    pub dims: &'a [usize],
    /// What they stand for.
    pub quantization: ByteQuantization,
}

/// `quantize(op(dequantize(x)))` for each of the 256 bytes `x`.
///
/// # Errors
/// [`OpError::Unsupported`] when `op` is not defined on real numbers.
pub fn byte_table(
    pool: &ThreadPool,
    op: Unary,
    x: ByteQuantization,
    y: ByteQuantization,
) -> Result<[u8; 256], OpError> {
    if op == Unary::BitwiseNot {
        return Err(OpError::Unsupported(format!("{op:?} of quantised numbers")));
    }
    let mut values: [f32; 256] = std::array::from_fn(|byte| x.real(byte as u8));
    // The functions that compute floats elsewhere, so that the table has their bits.
    match op.activation() {
        Some(activation) => activate(pool, activation, &mut values),
        None => unary_f32(op, &mut values),
    }
    Ok(values.map(|v| y.quantized(v)))
}

/// `y[i] = table[x[i]]`.
///
/// # Errors
/// [`OpError::Invalid`] when the lengths differ.
pub fn quantized_unary(pool: &ThreadPool, table: &[u8; 256], x: &[u8], y: &mut [u8]) -> Result<(), OpError> {
    if x.len() != y.len() {
        return Err(OpError::Invalid(format!("{} elements give {}", x.len(), y.len())));
    }
    parallel_parts(pool, y, GRAIN, &|start, part| {
        let x = &x[start..start + part.len()];
        part.iter_mut().zip(x).for_each(|(y, &x)| *y = table[usize::from(x)]);
    });
    Ok(())
}

/// How bytes become reals and reals bytes.
#[derive(Clone, Copy)]
struct Steps {
    flips: [u8; 2],
    zeros: [i32; 2],
    scales: [f32; 2],
    y_scale: f32,
    y_zero: i32,
    low: f32,
    high: f32,
}

impl Steps {
    #[inline(always)]
    fn real(&self, operand: usize, byte: u8) -> f32 {
        (i32::from(byte ^ self.flips[operand]) - self.zeros[operand]) as f32 * self.scales[operand]
    }

    /// As [`quantize_value`]; the bits of the sum hold the integer, which spares the loop a conversion that
    /// saturates.
    #[inline(always)]
    fn byte(&self, x: f32) -> u8 {
        const ROUND: f32 = 12_582_912.0;
        let clamped = (x / self.y_scale).max(self.low).min(self.high);
        let integer = (clamped + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32;
        integer.wrapping_add(self.y_zero) as u8
    }
}

/// Elements `start..` of a broadcast result.
struct BinaryPart<'a, F> {
    steps: Steps,
    f: F,
    walk: &'a Broadcast,
    a: &'a [u8],
    b: &'a [u8],
    start: usize,
    out: &'a mut [u8],
}

impl<F: Fn(f32, f32) -> f32 + Copy> Kernel for BinaryPart<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let BinaryPart { steps, f, walk, a, b, start, out } = self;
        let rank = walk.dims.len();
        let inner = walk.dims[rank - 1];
        let strides = [walk.strides[0][rank - 1], walk.strides[1][rank - 1]];
        let (mut done, mut column, mut outer) = (0, start % inner, start / inner);
        while done < out.len() {
            let run = (inner - column).min(out.len() - done);
            let (mut rest, mut at) = (outer, [column * strides[0], column * strides[1]]);
            for axis in (0..rank - 1).rev() {
                let position = rest % walk.dims[axis];
                rest /= walk.dims[axis];
                at[0] += position * walk.strides[0][axis];
                at[1] += position * walk.strides[1][axis];
            }
            let row = &mut out[done..done + run];
            match strides {
                [1, 1] => {
                    let (a, b) = (&a[at[0]..at[0] + run], &b[at[1]..at[1] + run]);
                    for ((y, &a), &b) in row.iter_mut().zip(a).zip(b) {
                        *y = steps.byte(f(steps.real(0, a), steps.real(1, b)));
                    }
                }
                [1, 0] => {
                    let (a, b) = (&a[at[0]..at[0] + run], steps.real(1, b[at[1]]));
                    for (y, &a) in row.iter_mut().zip(a) {
                        *y = steps.byte(f(steps.real(0, a), b));
                    }
                }
                [0, 1] => {
                    let (a, b) = (steps.real(0, a[at[0]]), &b[at[1]..at[1] + run]);
                    for (y, &b) in row.iter_mut().zip(b) {
                        *y = steps.byte(f(a, steps.real(1, b)));
                    }
                }
                _ => {
                    for (i, y) in row.iter_mut().enumerate() {
                        let (a, b) = (a[at[0] + i * strides[0]], b[at[1] + i * strides[1]]);
                        *y = steps.byte(f(steps.real(0, a), steps.real(1, b)));
                    }
                }
            }
            done += run;
            column = 0;
            outer += 1;
        }
    }
}

/// `y = quantize(op(dequantize(a), dequantize(b)))`, limited to `bounds`, with broadcasting to shape `dims`.
///
/// # Errors
/// [`OpError::Unsupported`] when `op` is none of sum, difference, product, maximum and minimum,
/// [`OpError::Invalid`] when shapes do not fit.
#[allow(clippy::too_many_arguments)]
pub fn quantized_binary(
    pool: &ThreadPool,
    op: Binary,
    a: ByteOperand<'_>,
    b: ByteOperand<'_>,
    quantization: ByteQuantization,
    bounds: (i32, i32),
    dims: &[usize],
    y: &mut [u8],
) -> Result<(), OpError> {
    let fits = |data: &[u8], dims: &[usize]| data.len() == dims.iter().product::<usize>();
    let walk = Broadcast::new(dims, &[a.dims, b.dims])
        .filter(|_| fits(a.data, a.dims) && fits(b.data, b.dims) && fits(y, dims))
        .ok_or_else(|| OpError::Invalid(format!("{:?} and {:?} do not give {dims:?}", a.dims, b.dims)))?;
    let q = [a.quantization, b.quantization];
    let steps = Steps {
        flips: q.map(|q| q.flip()),
        zeros: q.map(|q| q.flipped_zero()),
        scales: q.map(|q| q.scale),
        y_scale: quantization.scale,
        y_zero: quantization.zero,
        low: (bounds.0 - quantization.zero) as f32,
        high: (bounds.1 - quantization.zero) as f32,
    };
    macro_rules! run {
        ($f:expr) => {
            parallel_parts(pool, y, GRAIN, &|start, out| {
                let part = BinaryPart { steps, f: $f, walk: &walk, a: a.data, b: b.data, start, out };
                dispatch(pool.isa(), part);
            })
        };
    }
    match op {
        Binary::Add => run!(|a: f32, b: f32| a + b),
        Binary::Sub => run!(|a: f32, b: f32| a - b),
        Binary::Mul => run!(|a: f32, b: f32| a * b),
        Binary::Max => run!(|a: f32, b: f32| if a > b { a } else { b }),
        Binary::Min => run!(|a: f32, b: f32| if a < b { a } else { b }),
        other => return Err(OpError::Unsupported(format!("{other:?} of quantised numbers"))),
    }
    Ok(())
}

/// Calls `visit` with each input pixel under the window at `position` of the result.
#[inline(always)]
fn each_pixel(window: &Window, position: usize, mut visit: impl FnMut(usize)) {
    let ([height, width], [kh, kw]) = (&window.input[..], &window.kernel[..]) else {
        return (0..window.taps()).filter_map(|tap| window.pixel(position, tap)).for_each(visit);
    };
    let first = |o: usize, axis: usize| (o * window.strides[axis]) as i64 - window.pads[axis];
    let (top, left) = (first(position / window.output[1], 0), first(position % window.output[1], 1));
    for ky in 0..*kh {
        let y = top + (ky * window.dilations[0]) as i64;
        if y < 0 || y >= *height as i64 {
            continue;
        }
        for kx in 0..*kw {
            let x = left + (kx * window.dilations[1]) as i64;
            if x >= 0 && x < *width as i64 {
                visit(y as usize * width + x as usize);
            }
        }
    }
}

/// Whether every window is the whole picture.
fn is_global(window: &Window) -> bool {
    window.positions() == 1
        && window.kernel == window.input
        && window.pads.iter().all(|&p| p == 0)
        && window.dilations.iter().all(|&d| d == 1)
}

#[derive(Clone, Copy)]
struct AveragePool<'a> {
    shape: &'a PoolingShape,
    global: bool,
    x: &'a [u8],
    flip: u8,
    x_zero: i64,
    x_scale: f64,
    y: ByteQuantization,
}

impl AveragePool<'_> {
    /// The result for the exact sum of `visited` unsigned bytes at window `position`.
    #[inline(always)]
    fn finish(&self, sum: u64, visited: usize, divisor: f64) -> u8 {
        let sum = (sum as i64 - visited as i64 * self.x_zero) as f64;
        let (low, high) = self.y.bounds();
        let mean = (sum * self.x_scale / (divisor * f64::from(self.y.scale)))
            .max(f64::from(low - self.y.zero))
            .min(f64::from(high - self.y.zero));
        (mean.round_ties_even() as i32 + self.y.zero) as u8
    }

    fn divisor(&self, position: usize, visited: usize) -> f64 {
        let n = if self.shape.count_include_pad { padded_count(self.shape, position) } else { visited };
        n.max(1) as f64
    }
}

/// One stretch of channels of one pixel of a result with channels last.
struct PixelPart<'a> {
    pool: &'a AveragePool<'a>,
    sample: usize,
    position: usize,
    channel: usize,
    out: &'a mut [u8],
}

impl Kernel for PixelPart<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (pool, channels, n) = (self.pool, self.pool.shape.channels, self.out.len());
        let window = &pool.shape.window;
        let pixels = window.pixels();
        let (mut sums, mut totals) = ([0u32; CHANNELS], [0u64; CHANNELS]);
        let (mut visited, mut pending) = (0, 0);
        let first = self.sample * pixels * channels + self.channel;
        let mut visit = |pixel: usize| {
            let x = &pool.x[first + pixel * channels..][..n];
            for (sum, &x) in sums[..n].iter_mut().zip(x) {
                *sum += u32::from(x ^ pool.flip);
            }
            visited += 1;
            pending += 1;
            if pending == SAFE_ADDITIONS {
                totals.iter_mut().zip(&mut sums).for_each(|(t, s)| *t += u64::from(std::mem::take(s)));
                pending = 0;
            }
        };
        if pool.global {
            (0..pixels).for_each(visit);
        } else {
            each_pixel(window, self.position, &mut visit);
        }
        let divisor = pool.divisor(self.position, visited);
        for (y, (sum, total)) in self.out.iter_mut().zip(sums.iter().zip(&totals)) {
            *y = pool.finish(total + u64::from(*sum), visited, divisor);
        }
    }
}

/// Neighbouring elements of a result in planes.
struct PlanePart<'a> {
    pool: &'a AveragePool<'a>,
    start: usize,
    out: &'a mut [u8],
}

impl Kernel for PlanePart<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let pool = self.pool;
        let window = &pool.shape.window;
        let (positions, pixels) = (window.positions(), window.pixels());
        for (i, y) in self.out.iter_mut().enumerate() {
            let (plane, position) = ((self.start + i) / positions, (self.start + i) % positions);
            let x = &pool.x[plane * pixels..][..pixels];
            let (mut sum, mut visited) = (0u64, 0);
            if pool.global {
                visited = pixels;
                for x in x.chunks(SAFE_ADDITIONS) {
                    sum += u64::from(x.iter().map(|&x| u32::from(x ^ pool.flip)).sum::<u32>());
                }
            } else {
                each_pixel(window, position, |pixel| {
                    sum += u64::from(x[pixel] ^ pool.flip);
                    visited += 1;
                });
            }
            *y = pool.finish(sum, visited, pool.divisor(position, visited));
        }
    }
}

/// Means over windows of 8-bit elements: sums are exact, and rounded once, half to even.
///
/// # Errors
/// [`OpError::Invalid`] when sizes do not fit.
pub fn quantized_average_pool(
    pool: &ThreadPool,
    shape: &PoolingShape,
    x: &[u8],
    x_quantization: ByteQuantization,
    y: &mut [u8],
    y_quantization: ByteQuantization,
) -> Result<(), OpError> {
    let (positions, channels) = (shape.window.positions(), shape.channels);
    let planes = shape.batch * channels;
    if x.len() != planes * shape.window.pixels() || y.len() != planes * positions {
        return Err(OpError::Invalid(format!(
            "pooling of {} elements does not give {}: {shape:?}",
            x.len(),
            y.len()
        )));
    }
    if y.is_empty() {
        return Ok(());
    }
    let layer = AveragePool {
        shape,
        global: is_global(&shape.window),
        x,
        flip: x_quantization.flip(),
        x_zero: x_quantization.flipped_zero().into(),
        x_scale: x_quantization.scale.into(),
        y: y_quantization,
    };
    let taps = shape.window.taps().max(1);
    if !shape.channels_last {
        parallel_parts(pool, y, (GRAIN / taps).max(1), &|start, out| {
            dispatch(pool.isa(), PlanePart { pool: &layer, start, out });
        });
        return Ok(());
    }
    let stretches = channels.div_ceil(CHANNELS);
    let units = shape.batch * positions * stretches;
    let per_task = (GRAIN / (taps * channels.min(CHANNELS))).max(1);
    let y = Shared::new(y);
    pool.parallel_for(units.div_ceil(per_task), &|task, _| {
        for unit in task * per_task..units.min((task + 1) * per_task) {
            let (pixel, channel) = (unit / stretches, unit % stretches * CHANNELS);
            let n = CHANNELS.min(channels - channel);
            // SAFETY: each unit has channels of its own, and the result stays borrowed until `parallel_for` returns.
            let out = unsafe { y.slice(pixel * channels + channel, n) };
            let (sample, position) = (pixel / positions, pixel % positions);
            dispatch(pool.isa(), PixelPart { pool: &layer, sample, position, channel, out });
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Isa;
    use crate::ops::Pooling;

    fn bytes(n: usize, seed: u32) -> Vec<u8> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..n).map(next).collect()
    }

    fn pools() -> Vec<ThreadPool> {
        [Isa::Portable, Isa::Avx2, Isa::Avx512]
            .into_iter()
            .flat_map(|isa| [1, 3].map(|threads| ThreadPool::with_isa(threads, isa)))
            .collect()
    }

    fn q(signed: bool, zero: i32, scale: f32) -> ByteQuantization {
        ByteQuantization { signed, zero, scale }
    }

    fn value(q: ByteQuantization, byte: u8) -> f64 {
        let element = if q.signed { i32::from(byte as i8) } else { i32::from(byte) };
        f64::from(element - q.zero) * f64::from(q.scale)
    }

    /// The element, as a number, that a byte stands for.
    fn element(q: ByteQuantization, byte: u8) -> i32 {
        if q.signed { i32::from(byte as i8) } else { i32::from(byte) }
    }

    /// Asserts that `byte` is `real` rounded to the nearest element within `bounds`; where f32 arithmetic may fall on
    /// either side of a tie, either neighbour.
    fn check(q: ByteQuantization, byte: u8, real: f64, bounds: (i32, i32)) {
        let exact =
            (real / f64::from(q.scale) + f64::from(q.zero)).clamp(f64::from(bounds.0), f64::from(bounds.1));
        let got = f64::from(element(q, byte));
        assert!((got - exact).abs() <= 0.5 + 1e-4, "{real} gave {got}, not {exact}: {q:?}");
        assert!(got >= f64::from(bounds.0) && got <= f64::from(bounds.1));
    }

    #[test]
    fn tables_hold_the_function_of_every_byte() {
        let pool = ThreadPool::new(1);
        let (x_q, y_q) = (q(true, -5, 0.05), q(false, 3, 1.0 / 250.0));
        let table = byte_table(&pool, Unary::Sigmoid, x_q, y_q).unwrap();
        for byte in 0..=255u8 {
            let x = value(x_q, byte);
            check(y_q, table[usize::from(byte)], 1.0 / (1.0 + (-x).exp()), (0, 255));
        }
        let same = byte_table(&pool, Unary::Identity, x_q, x_q).unwrap();
        assert!(same.iter().enumerate().all(|(i, &b)| i == usize::from(b)));
        assert!(matches!(byte_table(&pool, Unary::BitwiseNot, x_q, y_q), Err(OpError::Unsupported(_))));
        let x = bytes(100_003, 1);
        let mut y = vec![0; x.len()];
        quantized_unary(&ThreadPool::new(3), &table, &x, &mut y).unwrap();
        assert!(x.iter().zip(&y).all(|(&x, &y)| table[usize::from(x)] == y));
        assert!(quantized_unary(&pool, &table, &x, &mut y[1..]).is_err());
    }

    #[test]
    fn binary_operators_agree_with_real_arithmetic() {
        type Case = (&'static [usize], &'static [usize], &'static [usize]);
        let cases: [Case; 8] = [
            (&[1, 7, 9, 33], &[1, 7, 9, 33], &[1, 7, 9, 33]),
            (&[2, 5, 5, 24], &[24], &[2, 5, 5, 24]),
            (&[2, 5, 5, 24], &[2, 1, 1, 24], &[2, 5, 5, 24]),
            (&[2, 5, 5, 1], &[2, 5, 5, 24], &[2, 5, 5, 24]),
            (&[], &[4, 3], &[4, 3]),
            (&[4, 1, 3], &[2, 1], &[4, 2, 3]),
            (&[40_000], &[1], &[40_000]),
            (&[0, 3], &[3], &[0, 3]),
        ];
        let functions: [(Binary, fn(f64, f64) -> f64); 5] = [
            (Binary::Add, |a, b| a + b),
            (Binary::Sub, |a, b| a - b),
            (Binary::Mul, |a, b| a * b),
            (Binary::Max, f64::max),
            (Binary::Min, f64::min),
        ];
        let pools = pools();
        for (index, (a_dims, b_dims, dims)) in cases.into_iter().enumerate() {
            let (a_signed, b_signed, y_signed) = (index % 2 == 0, index % 3 == 0, index % 4 < 2);
            let (a_q, b_q) = (q(a_signed, 11, 0.02), q(b_signed, 100, 0.013));
            let y_q = q(y_signed, 7, 0.031);
            let bounds = if index == 1 { (7, 90) } else { y_q.bounds() };
            let n = |dims: &[usize]| dims.iter().product::<usize>();
            let (a, b) = (bytes(n(a_dims), 1), bytes(n(b_dims), 2));
            let a_operand = ByteOperand { data: &a, dims: a_dims, quantization: a_q };
            let b_operand = ByteOperand { data: &b, dims: b_dims, quantization: b_q };
            let place = |operand: &[usize], mut at: usize| {
                let (mut place, mut step) = (0, 1);
                for back in 1..=dims.len() {
                    let position = at % dims[dims.len() - back];
                    at /= dims[dims.len() - back];
                    if back <= operand.len() {
                        let size = operand[operand.len() - back];
                        place += if size == 1 { 0 } else { position * step };
                        step *= size;
                    }
                }
                place
            };
            for (op, f) in functions {
                let mut first: Option<Vec<u8>> = None;
                for pool in &pools {
                    let mut y = vec![0; n(dims)];
                    quantized_binary(pool, op, a_operand, b_operand, y_q, bounds, dims, &mut y).unwrap();
                    for (i, &byte) in y.iter().enumerate() {
                        let real = f(value(a_q, a[place(a_dims, i)]), value(b_q, b[place(b_dims, i)]));
                        check(y_q, byte, real, bounds);
                    }
                    let first = first.get_or_insert_with(|| y.clone());
                    assert_eq!(*first, y, "results depend on threads or instruction set");
                }
            }
            let pool = &pools[0];
            let mut y = vec![0; n(dims)];
            let refused =
                quantized_binary(pool, Binary::Div, a_operand, b_operand, y_q, bounds, dims, &mut y);
            assert!(matches!(refused, Err(OpError::Unsupported(_))));
        }
        let (a, mut y) = ([0; 6], [0; 6]);
        let operand = |dims| ByteOperand { data: &a, dims, quantization: q(false, 0, 1.0) };
        let (x, z) = (operand(&[2, 3]), operand(&[3, 2]));
        let refused =
            quantized_binary(&pools[0], Binary::Add, x, z, q(false, 0, 1.0), (0, 255), &[2, 3], &mut y);
        assert!(matches!(refused, Err(OpError::Invalid(_))));
    }

    #[test]
    fn sums_round_half_to_even() {
        let one = q(false, 0, 1.0);
        let (a, b) = ([1u8, 3, 5, 7], [0u8; 4]);
        let operand = |data| ByteOperand { data, dims: &[4], quantization: one };
        for pool in pools() {
            let mut y = [0; 4];
            let half = q(false, 0, 2.0);
            quantized_binary(&pool, Binary::Add, operand(&a), operand(&b), half, (0, 255), &[4], &mut y)
                .unwrap();
            assert_eq!(y, [0, 2, 2, 4]);
        }
    }

    #[test]
    fn pools_agree_with_exact_means() {
        // Sizes, kernel, strides, dilations, pads before and after.
        type Case = ([usize; 2], [usize; 2], [usize; 2], [usize; 2], [i64; 4]);
        let cases: [Case; 5] = [
            ([7, 7], [7, 7], [1, 1], [1, 1], [0; 4]),
            ([9, 6], [3, 3], [2, 1], [1, 1], [1, 1, 1, 1]),
            ([9, 8], [2, 2], [2, 2], [1, 1], [0; 4]),
            ([8, 8], [2, 3], [1, 2], [2, 1], [1, 0, 0, 1]),
            ([5, 5], [5, 5], [1, 1], [1, 1], [2, 2, 2, 2]),
        ];
        let pools = pools();
        for (index, (input, kernel, strides, dilations, pads)) in cases.into_iter().enumerate() {
            for (channels, channels_last, count_include_pad) in
                [(3, false, false), (5, false, true), (3, true, true), (300, true, false)]
            {
                let output: [usize; 2] = std::array::from_fn(|i| {
                    let padded = input[i] as i64 + pads[i] + pads[i + 2];
                    (padded as usize - (kernel[i] - 1) * dilations[i] - 1) / strides[i] + 1
                });
                let window = Window {
                    input: input.to_vec(),
                    output: output.to_vec(),
                    kernel: kernel.to_vec(),
                    strides: strides.to_vec(),
                    dilations: dilations.to_vec(),
                    pads: pads[..2].to_vec(),
                };
                let shape = PoolingShape {
                    kind: Pooling::Average,
                    batch: 2,
                    channels,
                    window: window.clone(),
                    pads_end: pads[2..].to_vec(),
                    count_include_pad,
                    column_major: false,
                    channels_last,
                };
                let (x_q, y_q) = (q(index % 2 == 0, 17, 0.5), q(index % 3 == 0, 9, 0.4));
                let (pixels, positions) = (window.pixels(), window.positions());
                let x = bytes(2 * channels * pixels, index as u32);
                for pool in &pools {
                    let mut y = vec![0; 2 * channels * positions];
                    quantized_average_pool(pool, &shape, &x, x_q, &mut y, y_q).unwrap();
                    for sample in 0..2 {
                        for channel in 0..channels {
                            for position in 0..positions {
                                let (mut sum, mut n) = (0.0, 0usize);
                                for tap in 0..window.taps() {
                                    let Some(pixel) = window.pixel(position, tap) else { continue };
                                    sum += value(
                                        x_q,
                                        x[if channels_last {
                                            (sample * pixels + pixel) * channels + channel
                                        } else {
                                            (sample * channels + channel) * pixels + pixel
                                        }],
                                    );
                                    n += 1;
                                }
                                // With these pads no window reaches beyond the padding.
                                let n = if count_include_pad { window.taps() } else { n };
                                let at = if channels_last {
                                    (sample * positions + position) * channels + channel
                                } else {
                                    (sample * channels + channel) * positions + position
                                };
                                check(y_q, y[at], sum / n as f64, y_q.bounds());
                            }
                        }
                    }
                }
                let refused = quantized_average_pool(&pools[0], &shape, &x[1..], x_q, &mut [], y_q);
                assert!(matches!(refused, Err(OpError::Invalid(_))));
            }
        }
    }
}
