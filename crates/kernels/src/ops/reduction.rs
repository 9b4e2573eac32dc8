//! Statistics over some axes, positions of extremes, running sums.

use lightering_units::DType;

use super::block::{BLOCK, Broadcast, Class, Compute, class, for_blocks};
use super::normalisation::Along;
use super::{OpError, TensorView, TensorViewMut};
use crate::ThreadPool;

/// Which statistic.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    L1,
    L2,
    LogSum,
    LogSumExp,
    Max,
    Mean,
    Min,
    Prod,
    Sum,
    SumSquare,
}

/// The elements of a tensor as pairs of a position that stays and one that is reduced.
pub struct Spaces {
    kept: Broadcast,
    reduced: Broadcast,
}

fn offset(walk: &Broadcast, mut index: usize) -> usize {
    let mut offset = 0;
    for axis in (0..walk.dims.len()).rev() {
        offset += index % walk.dims[axis] * walk.strides[0][axis];
        index /= walk.dims[axis];
    }
    offset
}

impl Spaces {
    /// Splits a shape by which axes are reduced.
    pub fn new(dims: &[usize], reduced: &[bool]) -> Spaces {
        let mut step = 1;
        let (mut kept, mut gone) = (Vec::new(), Vec::new());
        for (&size, &reduce) in dims.iter().zip(reduced).rev() {
            if reduce { &mut gone } else { &mut kept }.push((size, step));
            step *= size;
        }
        let build = |pairs: &[(usize, usize)]| {
            let dims: Vec<usize> = pairs.iter().rev().map(|p| p.0).collect();
            let strides: Vec<usize> = pairs.iter().rev().map(|p| p.1).collect();
            Broadcast::from_strides(&dims, &[&strides])
        };
        Spaces { kept: build(&kept), reduced: build(&gone) }
    }

    /// Number of results.
    pub fn kept_count(&self) -> usize {
        self.kept.dims.iter().product()
    }

    /// Number of elements behind each result.
    pub fn reduced_count(&self) -> usize {
        self.reduced.dims.iter().product()
    }

    /// Where the elements of result `index` start.
    pub fn kept_offset(&self, index: usize) -> usize {
        offset(&self.kept, index)
    }

    /// Where element `index` of a result lies after its start.
    pub fn reduced_offset(&self, index: usize) -> usize {
        offset(&self.reduced, index)
    }

    /// Whether neighbours in memory belong to different results.
    fn kept_is_inner(&self) -> bool {
        let inner = |w: &Broadcast| w.strides[0].last() == Some(&1) && w.dims.last().is_some_and(|&d| d > 1);
        inner(&self.kept)
    }
}

/// Folds `values` into `acc`, one to one or all into one.
fn accumulate<C: Compute>(op: Reduction, acc: &mut C, values: &[C]) {
    fn fold<C: Compute>(acc: &mut C, values: &[C], f: impl Fn(C, C) -> C, one: impl Fn(C) -> C, start: C) {
        let mut lanes = [start; 8];
        let mut chunks = values.chunks_exact(8);
        for chunk in &mut chunks {
            for (lane, &v) in lanes.iter_mut().zip(chunk) {
                *lane = f(*lane, one(v));
            }
        }
        let rest = chunks.remainder().iter().fold(start, |a, &v| f(a, one(v)));
        *acc = lanes.into_iter().fold(f(*acc, rest), &f);
    }
    match op {
        Reduction::Sum | Reduction::Mean | Reduction::LogSum => fold(acc, values, C::plus, |v| v, C::ZERO),
        Reduction::L1 => fold(acc, values, C::plus, absolute, C::ZERO),
        Reduction::L2 | Reduction::SumSquare => fold(acc, values, C::plus, |v| v.times(v), C::ZERO),
        Reduction::Prod => fold(acc, values, C::times, |v| v, C::ONE),
        Reduction::Max | Reduction::LogSumExp => fold(acc, values, C::larger, |v| v, C::LEAST),
        Reduction::Min => fold(acc, values, C::smaller, |v| v, C::GREATEST),
    }
}

fn absolute<C: Compute>(v: C) -> C {
    if v < C::ZERO { C::ZERO.minus(v) } else { v }
}

fn start<C: Compute>(op: Reduction) -> C {
    match op {
        Reduction::Prod => C::ONE,
        Reduction::Max | Reduction::LogSumExp => C::LEAST,
        Reduction::Min => C::GREATEST,
        _ => C::ZERO,
    }
}

fn one_to_one<C: Compute>(op: Reduction, acc: &mut [C], values: &[C]) {
    fn each<C: Copy>(acc: &mut [C], values: &[C], f: impl Fn(C, C) -> C) {
        acc.iter_mut().zip(values).for_each(|(a, &v)| *a = f(*a, v));
    }
    match op {
        Reduction::Sum | Reduction::Mean | Reduction::LogSum => each(acc, values, C::plus),
        Reduction::L1 => each(acc, values, |a, v| a.plus(absolute(v))),
        Reduction::L2 | Reduction::SumSquare => each(acc, values, |a, v| a.plus(v.times(v))),
        Reduction::Prod => each(acc, values, C::times),
        Reduction::Max | Reduction::LogSumExp => each(acc, values, C::larger),
        Reduction::Min => each(acc, values, C::smaller),
    }
}

fn finish<C: Compute>(op: Reduction, acc: C, count: usize) -> C {
    match op {
        Reduction::Mean => C::from_f64(acc.to_f64() / count as f64),
        Reduction::L2 => C::from_f64(acc.to_f64().sqrt()),
        Reduction::LogSum => C::from_f64(acc.to_f64().ln()),
        _ => acc,
    }
}

fn run<C: Compute>(pool: &ThreadPool, op: Reduction, spaces: &Spaces, x: &TensorView, y: &mut TensorViewMut) {
    let (count, dtype, size) = (spaces.reduced_count(), y.dtype, y.dtype.size_bytes());
    let at = |first: usize| &x.bytes[first * size..];
    for_blocks(pool, y, &|first, bytes| {
        let mut results = [start::<C>(op); BLOCK];
        let mut values = [C::ZERO; BLOCK];
        let n = bytes.len() / size;
        let results = &mut results[..n];
        if spaces.kept_is_inner() {
            let kept = spaces.kept.walk(0);
            for r in 0..count {
                C::gather(x.dtype, at(spaces.reduced_offset(r)), &kept, first, &mut values[..n]);
                one_to_one(op, results, &values[..n]);
            }
            if op == Reduction::LogSumExp {
                let largest: Vec<C> = results.to_vec();
                results.fill(C::ZERO);
                for r in 0..count {
                    C::gather(x.dtype, at(spaces.reduced_offset(r)), &kept, first, &mut values[..n]);
                    for ((s, &v), &m) in results.iter_mut().zip(&values[..n]).zip(&largest) {
                        *s = s.plus(shifted_exp(v, m));
                    }
                }
                results.iter_mut().zip(&largest).for_each(|(s, &m)| *s = log_plus(*s, m));
            }
        } else {
            let reduced = spaces.reduced.walk(0);
            for (i, result) in results.iter_mut().enumerate() {
                let base = spaces.kept_offset(first + i);
                let mut sweep = |f: &mut dyn FnMut(&[C])| {
                    let mut done = 0;
                    while done < count {
                        let n = BLOCK.min(count - done);
                        C::gather(x.dtype, at(base), &reduced, done, &mut values[..n]);
                        f(&values[..n]);
                        done += n;
                    }
                };
                sweep(&mut |values| accumulate(op, result, values));
                if op == Reduction::LogSumExp {
                    let largest = *result;
                    let mut total = C::ZERO;
                    sweep(&mut |values| {
                        total = values.iter().fold(total, |s, &v| s.plus(shifted_exp(v, largest)));
                    });
                    *result = log_plus(total, largest);
                }
            }
        }
        results.iter_mut().for_each(|r| *r = finish(op, *r, count));
        C::store(dtype, results, bytes);
    });
}

fn shifted_exp<C: Compute>(v: C, largest: C) -> C {
    let m = largest.to_f64();
    // Where everything is −∞ the difference would be NaN.
    let m = if m.is_finite() { m } else { 0.0 };
    C::from_f64((v.to_f64() - m).exp())
}

fn log_plus<C: Compute>(sum: C, largest: C) -> C {
    let m = largest.to_f64();
    let m = if m.is_finite() { m } else { 0.0 };
    C::from_f64(sum.to_f64().ln() + m)
}

/// Reduces the axes marked in `reduced`. Floats are accumulated in double precision, integers wrap.
///
/// # Errors
/// [`OpError::Invalid`] when sizes do not fit, [`OpError::Unsupported`] for types without arithmetic.
pub fn reduce(
    pool: &ThreadPool,
    op: Reduction,
    reduced: &[bool],
    x: &TensorView,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let spaces = Spaces::new(x.dims, reduced);
    if x.dtype != y.dtype || reduced.len() != x.dims.len() || spaces.kept_count() != y.len() {
        return Err(OpError::Invalid(format!("reducing {:?} does not give {:?}", x.dims, y.dims)));
    }
    let class = class(x.dtype).ok_or_else(|| OpError::Unsupported(format!("Reduce{op:?} of {}", x.dtype)))?;
    if x.is_empty() && matches!(op, Reduction::Max | Reduction::Min) {
        fill_extreme(y, op == Reduction::Max);
        return Ok(());
    }
    let fractional = matches!(op, Reduction::L2 | Reduction::LogSum | Reduction::LogSumExp);
    match class {
        Class::I64 if !fractional => run::<i64>(pool, op, &spaces, x, y),
        Class::U64 if !fractional => run::<u64>(pool, op, &spaces, x, y),
        _ => run::<f64>(pool, op, &spaces, x, y),
    }
    Ok(())
}

/// What the maximum (minimum) of nothing is: the least (greatest) value of the type.
fn fill_extreme(y: &mut TensorViewMut, least: bool) {
    let bits = 8 * y.dtype.size_bytes() as u32;
    let count = y.len();
    let signed = |least: bool| if least { i64::MIN >> (64 - bits) } else { i64::MAX >> (64 - bits) };
    let size = y.dtype.size_bytes();
    for i in 0..count {
        let out = &mut y.bytes[i * size..(i + 1) * size];
        match class(y.dtype) {
            Some(Class::I64) => i64::store(y.dtype, &[signed(least)], out),
            Some(Class::U64) if y.dtype == DType::Bool => out.fill(u8::from(!least)),
            Some(Class::U64) => u64::store(y.dtype, &[if least { 0 } else { u64::MAX >> (64 - bits) }], out),
            _ => f64::store(y.dtype, &[if least { f64::NEG_INFINITY } else { f64::INFINITY }], out),
        }
    }
}

/// Position of the largest (or smallest) element along an axis; NaN counts as the largest and the smallest.
///
/// # Errors
/// [`OpError::Invalid`] when the axis is empty or sizes do not fit.
pub fn arg_reduce(
    largest: bool,
    last: bool,
    along: Along,
    x: &TensorView,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    fn run<C: Compute>(largest: bool, last: bool, along: Along, x: &TensorView, y: &mut [i64]) {
        for o in 0..along.outer {
            for j in 0..along.inner {
                let at = |k: usize| {
                    let mut v = [C::ZERO];
                    C::load(x.dtype, x.bytes, (o * along.size + k) * along.inner + j, &mut v);
                    v[0]
                };
                let (mut best, mut value) = (0, at(0));
                for k in 1..along.size {
                    let v = at(k);
                    let better = if largest { v > value } else { v < value };
                    #[allow(clippy::eq_op)]
                    let nan = v != v && value == value;
                    if better || nan || (last && v == value) {
                        (best, value) = (k, v);
                    }
                }
                y[o * along.inner + j] = best as i64;
            }
        }
    }
    if y.dtype != DType::I64 || y.len() != along.outer * along.inner || (along.size == 0 && !y.is_empty()) {
        return Err(OpError::Invalid(format!("ArgMax of {:?} does not give {:?}", x.dims, y.dims)));
    }
    let y = y.as_mut_slice::<i64>();
    match class(x.dtype) {
        Some(Class::F32) => run::<f32>(largest, last, along, x, y),
        Some(Class::F64) => run::<f64>(largest, last, along, x, y),
        Some(Class::I64) => run::<i64>(largest, last, along, x, y),
        Some(Class::U64) => run::<u64>(largest, last, along, x, y),
        None => return Err(OpError::Unsupported(format!("ArgMax of {}", x.dtype))),
    }
    Ok(())
}

/// Running sum along an axis, from the end when `reverse`, without the element itself when `exclusive`.
///
/// # Errors
/// [`OpError::Invalid`] when shapes or types differ.
pub fn cumulative_sum(
    exclusive: bool,
    reverse: bool,
    along: Along,
    x: &TensorView,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    fn run<C: Compute>(exclusive: bool, reverse: bool, along: Along, x: &TensorView, y: &mut TensorViewMut) {
        let (dtype, size) = (y.dtype, y.dtype.size_bytes());
        for o in 0..along.outer {
            for j in 0..along.inner {
                let mut total = C::ZERO;
                for step in 0..along.size {
                    let k = if reverse { along.size - 1 - step } else { step };
                    let index = (o * along.size + k) * along.inner + j;
                    let mut v = [C::ZERO];
                    C::load(x.dtype, x.bytes, index, &mut v);
                    let next = total.plus(v[0]);
                    let out = [if exclusive { total } else { next }];
                    C::store(dtype, &out, &mut y.bytes[index * size..(index + 1) * size]);
                    total = next;
                }
            }
        }
    }
    super::expect_same_count(x, y)?;
    if x.dtype != y.dtype {
        return Err(OpError::Invalid(format!("CumSum of {} as {}", x.dtype, y.dtype)));
    }
    match class(x.dtype) {
        Some(Class::F32) => run::<f32>(exclusive, reverse, along, x, y),
        Some(Class::F64) => run::<f64>(exclusive, reverse, along, x, y),
        Some(Class::I64) => run::<i64>(exclusive, reverse, along, x, y),
        Some(Class::U64) => run::<u64>(exclusive, reverse, along, x, y),
        None => return Err(OpError::Unsupported(format!("CumSum of {}", x.dtype))),
    }
    Ok(())
}
