//! Two or more operands with broadcasting, element by element.

use bytemuck::cast_slice_mut;
use lightering_units::DType;

use super::block::{BLOCK, Broadcast, Class, Compute, class, for_blocks, gather_bytes, to_vec};
use super::unary::{Unary, UnaryCompute};
use super::{OpError, TensorView, TensorViewMut};
use crate::ThreadPool;

/// A function of two numbers. Names are those of ONNX; `Mod` has the sign of the divisor, `FMod` that of the
/// dividend.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    Mod,
    FMod,
    Pow,
    PRelu,
    And,
    Or,
    Xor,
    BitAnd,
    BitOr,
    BitXor,
    ShiftLeft,
    ShiftRight,
    Equal,
    Greater,
    GreaterOrEqual,
    Less,
    LessOrEqual,
    Max,
    Min,
}

impl Binary {
    /// Whether the result is bool whatever the operands are.
    pub fn is_comparison(self) -> bool {
        matches!(
            self,
            Binary::Equal | Binary::Greater | Binary::GreaterOrEqual | Binary::Less | Binary::LessOrEqual
        )
    }
}

fn each<T: Copy>(a: &mut [T], b: &[T], f: impl Fn(T, T) -> T) {
    a.iter_mut().zip(b).for_each(|(a, &b)| *a = f(*a, b));
}

/// A compute type that binary operators are defined on.
pub(crate) trait BinaryCompute: UnaryCompute {
    /// `a = op(a, b)`; `false` when the operator is not defined on this type. `bits` is the width of the storage.
    fn combine(op: Binary, a: &mut [Self], b: &[Self], bits: u32) -> bool;
}

macro_rules! float_binary {
    ($t:ident) => {
        impl BinaryCompute for $t {
            fn combine(op: Binary, a: &mut [$t], b: &[$t], _bits: u32) -> bool {
                match op {
                    Binary::Add => each(a, b, |x, y| x + y),
                    Binary::Sub => each(a, b, |x, y| x - y),
                    Binary::Mul => each(a, b, |x, y| x * y),
                    Binary::Div => each(a, b, |x, y| x / y),
                    Binary::Mod => each(a, b, |x, y| {
                        let r = x % y;
                        if r != 0.0 && (r < 0.0) != (y < 0.0) { r + y } else { r }
                    }),
                    Binary::FMod => each(a, b, |x, y| x % y),
                    Binary::Pow => each(a, b, |x, y| if y == 2.0 { x * x } else { x.powf(y) }),
                    Binary::PRelu => each(a, b, |x, slope| if x < 0.0 { slope * x } else { x }),
                    Binary::Max => each(a, b, <$t>::larger),
                    Binary::Min => each(a, b, <$t>::smaller),
                    _ => return false,
                }
                true
            }
        }
    };
}
float_binary!(f32);
float_binary!(f64);

macro_rules! integer_binary {
    ($t:ident, $floor_mod:expr) => {
        impl BinaryCompute for $t {
            fn combine(op: Binary, a: &mut [$t], b: &[$t], bits: u32) -> bool {
                match op {
                    Binary::Add => each(a, b, $t::wrapping_add),
                    Binary::Sub => each(a, b, $t::wrapping_sub),
                    Binary::Mul => each(a, b, $t::wrapping_mul),
                    // Zero divisors are refused before any block is computed; the check here only keeps blocks
                    // free of panics.
                    Binary::Div => each(a, b, |x, y| if y == 0 { 0 } else { x.wrapping_div(y) }),
                    Binary::Mod => each(a, b, |x, y| if y == 0 { 0 } else { $floor_mod(x, y) }),
                    Binary::FMod => each(a, b, |x, y| if y == 0 { 0 } else { x.wrapping_rem(y) }),
                    Binary::PRelu => {
                        each(a, b, |x, slope| if x < $t::ZERO { slope.wrapping_mul(x) } else { x })
                    }
                    Binary::And | Binary::BitAnd => each(a, b, |x, y| x & y),
                    Binary::Or | Binary::BitOr => each(a, b, |x, y| x | y),
                    Binary::Xor | Binary::BitXor => each(a, b, |x, y| x ^ y),
                    Binary::ShiftLeft => {
                        each(a, b, |x, y| if (y as u64) < u64::from(bits) { x << (y as u32) } else { 0 })
                    }
                    Binary::ShiftRight => {
                        each(a, b, |x, y| if (y as u64) < u64::from(bits) { x >> (y as u32) } else { 0 })
                    }
                    Binary::Max => each(a, b, |x, y| x.max(y)),
                    Binary::Min => each(a, b, |x, y| x.min(y)),
                    _ => return false,
                }
                true
            }
        }
    };
}
#[allow(unused_comparisons)]
mod integers {
    use super::*;
    integer_binary!(i64, |x: i64, y: i64| {
        let r = x.wrapping_rem(y);
        if r != 0 && (r < 0) != (y < 0) { r.wrapping_add(y) } else { r }
    });
    integer_binary!(u64, |x: u64, y: u64| x % y);
}

fn compare<C: Compute>(op: Binary, a: &[C], b: &[C], out: &mut [u8]) {
    fn each<C: Copy>(a: &[C], b: &[C], out: &mut [u8], f: impl Fn(C, C) -> bool) {
        out.iter_mut().zip(a.iter().zip(b)).for_each(|(o, (&a, &b))| *o = u8::from(f(a, b)));
    }
    match op {
        Binary::Equal => each(a, b, out, |a, b| a == b),
        Binary::Greater => each(a, b, out, |a, b| a > b),
        Binary::GreaterOrEqual => each(a, b, out, |a, b| a >= b),
        Binary::Less => each(a, b, out, |a, b| a < b),
        _ => each(a, b, out, |a, b| a <= b),
    }
}

fn mismatch(y: &TensorViewMut, operands: &[&[usize]]) -> OpError {
    OpError::Invalid(format!("operands of shapes {operands:?} do not broadcast to {:?}", y.dims))
}

fn blocks<C: BinaryCompute>(
    pool: &ThreadPool,
    op: Binary,
    a: &TensorView,
    b: &TensorView,
    y: &mut TensorViewMut,
    walk: &Broadcast,
) {
    let dtype = y.dtype;
    let bits = 8 * a.dtype.size_bytes() as u32;
    for_blocks(pool, y, &|start, bytes| {
        let (mut left, mut right) = ([C::ZERO; BLOCK], [C::ZERO; BLOCK]);
        let count = bytes.len() / dtype.size_bytes();
        let (left, right) = (&mut left[..count], &mut right[..count]);
        C::gather(a.dtype, a.bytes, &walk.walk(0), start, left);
        C::gather(b.dtype, b.bytes, &walk.walk(1), start, right);
        if op.is_comparison() {
            compare(op, left, right, bytes);
        } else {
            C::combine(op, left, right, bits);
            C::store(dtype, left, bytes);
        }
    });
}

/// Contiguous or scalar f32 operands need no copies into blocks.
fn fast_f32(pool: &ThreadPool, op: Binary, a: &[f32], b: &[f32], y: &mut [f32]) -> bool {
    fn run(pool: &ThreadPool, a: &[f32], b: &[f32], y: &mut [f32], f: impl Fn(f32, f32) -> f32 + Sync) {
        let (one_a, one_b) = (a.len() == 1 && y.len() > 1, b.len() == 1 && y.len() > 1);
        super::block::parallel_parts(pool, y, 16 << 10, &|start, out| {
            let range = start..start + out.len();
            match (one_a, one_b) {
                (false, false) => out
                    .iter_mut()
                    .zip(a[range.clone()].iter().zip(&b[range]))
                    .for_each(|(o, (&a, &b))| *o = f(a, b)),
                (true, _) => {
                    let a = a[0];
                    let right = if one_b { &b[..1] } else { &b[range] };
                    out.iter_mut().zip(right.iter().cycle()).for_each(|(o, &b)| *o = f(a, b));
                }
                (false, true) => {
                    let b = b[0];
                    out.iter_mut().zip(&a[range]).for_each(|(o, &a)| *o = f(a, b));
                }
            }
        });
    }
    match op {
        Binary::Add => run(pool, a, b, y, |a, b| a + b),
        Binary::Sub => run(pool, a, b, y, |a, b| a - b),
        Binary::Mul => run(pool, a, b, y, |a, b| a * b),
        Binary::Div => run(pool, a, b, y, |a, b| a / b),
        _ => return false,
    }
    true
}

/// `y = op(a, b)` with broadcasting to the shape of `y`.
///
/// # Errors
/// [`OpError::Invalid`] when shapes or types do not fit or an integer is divided by zero;
/// [`OpError::Unsupported`] when the operator is not defined on the types.
pub fn binary(
    pool: &ThreadPool,
    op: Binary,
    a: &TensorView,
    b: &TensorView,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let walk = Broadcast::new(y.dims, &[a.dims, b.dims]).ok_or_else(|| mismatch(y, &[a.dims, b.dims]))?;
    let undefined = || OpError::Unsupported(format!("{op:?} of {} and {}", a.dtype, b.dtype));
    let (left, right) = (class(a.dtype).ok_or_else(undefined)?, class(b.dtype).ok_or_else(undefined)?);
    if op == Binary::Pow && matches!(left, Class::I64 | Class::U64) {
        integer_power(pool, a, b, y, &walk);
        return Ok(());
    }
    if a.dtype != b.dtype && op != Binary::Pow {
        return Err(OpError::Invalid(format!("operands of {op:?} are {} and {}", a.dtype, b.dtype)));
    }
    if matches!(op, Binary::Div | Binary::Mod | Binary::FMod)
        && matches!(right, Class::I64 | Class::U64)
        && !y.is_empty()
        && contains_zero(b)
    {
        return Err(OpError::Invalid(format!("{op:?} of an integer by zero")));
    }
    let defined = op.is_comparison()
        || match left {
            Class::F32 => f32::combine(op, &mut [1.0], &[1.0], 32),
            Class::F64 => f64::combine(op, &mut [1.0], &[1.0], 64),
            Class::I64 => i64::combine(op, &mut [1], &[1], 64),
            Class::U64 => u64::combine(op, &mut [1], &[1], 64),
        };
    if !defined {
        return Err(undefined());
    }
    if a.dtype == DType::F32 && b.dtype == DType::F32 && y.dtype == DType::F32 {
        let whole = |i: usize, x: &TensorView| walk.is_contiguous(i) || x.len() == 1;
        if whole(0, a) && whole(1, b) && fast_f32(pool, op, a.as_slice(), b.as_slice(), y.as_mut_slice()) {
            return Ok(());
        }
    }
    match left {
        Class::F32 => blocks::<f32>(pool, op, a, b, y, &walk),
        Class::F64 => blocks::<f64>(pool, op, a, b, y, &walk),
        Class::I64 => blocks::<i64>(pool, op, a, b, y, &walk),
        Class::U64 => blocks::<u64>(pool, op, a, b, y, &walk),
    }
    Ok(())
}

fn contains_zero(x: &TensorView) -> bool {
    let size = x.dtype.size_bytes();
    x.bytes.chunks_exact(size).any(|e| e.iter().all(|&b| b == 0))
}

/// Integer base: exact for integer exponents, by way of `f64` for fractional ones.
fn integer_power(pool: &ThreadPool, a: &TensorView, b: &TensorView, y: &mut TensorViewMut, walk: &Broadcast) {
    fn power(base: i64, exponent: i64) -> i64 {
        match (base, exponent) {
            (_, 0) | (1, _) => 1,
            (-1, e) => {
                if e % 2 == 0 {
                    1
                } else {
                    -1
                }
            }
            (_, e) if e < 0 => 0,
            (b, e) => b.wrapping_pow(u32::try_from(e).unwrap_or(u32::MAX)),
        }
    }
    let dtype = y.dtype;
    let integer = matches!(class(b.dtype), Some(Class::I64 | Class::U64));
    for_blocks(pool, y, &|start, bytes| {
        let count = bytes.len() / dtype.size_bytes();
        let mut base = [0i64; BLOCK];
        i64::gather(a.dtype, a.bytes, &walk.walk(0), start, &mut base[..count]);
        if integer {
            let mut exponent = [0i64; BLOCK];
            i64::gather(b.dtype, b.bytes, &walk.walk(1), start, &mut exponent[..count]);
            each(&mut base[..count], &exponent[..count], power);
        } else {
            let mut exponent = [0f64; BLOCK];
            f64::gather(b.dtype, b.bytes, &walk.walk(1), start, &mut exponent[..count]);
            base[..count].iter_mut().zip(&exponent).for_each(|(b, &e)| *b = (*b as f64).powf(e) as i64);
        }
        i64::store(dtype, &base[..count], bytes);
    });
}

/// Any number of operands, combined from the left by `op`; divided by their number when `mean`.
///
/// # Errors
/// As [`binary`].
pub fn variadic(
    pool: &ThreadPool,
    op: Binary,
    mean: bool,
    operands: &[TensorView],
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    fn run<C: BinaryCompute>(
        pool: &ThreadPool,
        op: Binary,
        mean: bool,
        operands: &[TensorView],
        walk: &Broadcast,
        y: &mut TensorViewMut,
    ) {
        let dtype = y.dtype;
        for_blocks(pool, y, &|start, bytes| {
            let (mut left, mut right) = ([C::ZERO; BLOCK], [C::ZERO; BLOCK]);
            let count = bytes.len() / dtype.size_bytes();
            let (left, right) = (&mut left[..count], &mut right[..count]);
            for (i, x) in operands.iter().enumerate() {
                if i == 0 {
                    C::gather(x.dtype, x.bytes, &walk.walk(0), start, left);
                } else {
                    C::gather(x.dtype, x.bytes, &walk.walk(i), start, right);
                    C::combine(op, left, right, 64);
                }
            }
            if mean {
                let count = operands.len() as f64;
                left.iter_mut().for_each(|v| *v = C::from_f64(v.to_f64() / count));
            }
            C::store(dtype, left, bytes);
        });
    }
    let shapes: Vec<&[usize]> = operands.iter().map(|x| x.dims).collect();
    let walk = Broadcast::new(y.dims, &shapes).ok_or_else(|| mismatch(y, &shapes))?;
    if let Some(other) = operands.iter().find(|x| x.dtype != y.dtype) {
        return Err(OpError::Invalid(format!("an operand is {}, the result {}", other.dtype, y.dtype)));
    }
    match class(y.dtype) {
        Some(Class::F32) => run::<f32>(pool, op, mean, operands, &walk, y),
        Some(Class::F64) => run::<f64>(pool, op, mean, operands, &walk, y),
        Some(Class::I64) => run::<i64>(pool, op, mean, operands, &walk, y),
        Some(Class::U64) => run::<u64>(pool, op, mean, operands, &walk, y),
        None => return Err(OpError::Unsupported(format!("{op:?} of {}", y.dtype))),
    }
    Ok(())
}

/// `y = condition ? a : b` with broadcasting.
///
/// # Errors
/// [`OpError::Invalid`] when shapes or types do not fit.
pub fn select(
    pool: &ThreadPool,
    condition: &TensorView,
    a: &TensorView,
    b: &TensorView,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let shapes = [condition.dims, a.dims, b.dims];
    let walk = Broadcast::new(y.dims, &shapes).ok_or_else(|| mismatch(y, &shapes))?;
    if condition.dtype != DType::Bool || a.dtype != y.dtype || b.dtype != y.dtype {
        return Err(OpError::Invalid(format!(
            "Where of {}, {} and {}: expected bool and two equal types",
            condition.dtype, a.dtype, b.dtype
        )));
    }
    let size = y.dtype.size_bytes();
    for_blocks(pool, y, &|start, bytes| {
        let count = bytes.len() / size;
        let mut mask = [0u8; BLOCK];
        // 16-byte elements are the widest.
        let mut other = [[0u64; 2]; BLOCK];
        let other = &mut cast_slice_mut::<[u64; 2], u8>(&mut other)[..bytes.len()];
        gather_bytes(1, condition.bytes, &walk.walk(0), start, &mut mask[..count]);
        gather_bytes(size, a.bytes, &walk.walk(1), start, bytes);
        gather_bytes(size, b.bytes, &walk.walk(2), start, other);
        for (i, &keep) in mask[..count].iter().enumerate() {
            if keep == 0 {
                bytes[i * size..(i + 1) * size].copy_from_slice(&other[i * size..(i + 1) * size]);
            }
        }
    });
    Ok(())
}

/// Limits every element to bounds of one element each; when they cross, `max` wins.
///
/// # Errors
/// [`OpError::Unsupported`] for types that have no order.
pub fn clip(
    pool: &ThreadPool,
    x: &TensorView,
    min: Option<&TensorView>,
    max: Option<&TensorView>,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    fn run<C: Compute>(
        pool: &ThreadPool,
        x: &TensorView,
        min: Option<&TensorView>,
        max: Option<&TensorView>,
        y: &mut TensorViewMut,
    ) {
        let first = |t: Option<&TensorView>| t.and_then(|t| to_vec::<C>(t).first().copied());
        let (min, max) = (first(min), first(max));
        let dtype = y.dtype;
        for_blocks(pool, y, &|start, bytes| {
            let mut buffer = [C::ZERO; BLOCK];
            let values = &mut buffer[..bytes.len() / dtype.size_bytes()];
            C::load(x.dtype, x.bytes, start, values);
            if let Some(min) = min {
                values.iter_mut().for_each(|v| *v = if *v < min { min } else { *v });
            }
            if let Some(max) = max {
                values.iter_mut().for_each(|v| *v = if *v > max { max } else { *v });
            }
            C::store(dtype, values, bytes);
        });
    }
    super::expect_same_count(x, y)?;
    match class(x.dtype) {
        Some(Class::F32) => run::<f32>(pool, x, min, max, y),
        Some(Class::F64) => run::<f64>(pool, x, min, max, y),
        Some(Class::I64) => run::<i64>(pool, x, min, max, y),
        Some(Class::U64) => run::<u64>(pool, x, min, max, y),
        None => return Err(OpError::Unsupported(format!("Clip of {}", x.dtype))),
    }
    Ok(())
}

/// One step of [`chain`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    /// `running = op(running)`.
    Unary(Unary),
    /// `running = op(running, operand)`, or `op(operand, running)` when swapped.
    Binary {
        /// Which operator.
        op: Binary,
        /// Index of the operand.
        operand: usize,
        /// The running value is the right-hand side.
        swapped: bool,
    },
}

/// Several steps in one sweep; the running value starts as operand 0.
///
/// # Errors
/// As [`binary`]; comparisons and integer division are refused.
pub fn chain(
    pool: &ThreadPool,
    steps: &[Step],
    operands: &[Option<TensorView>],
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    fn run<C: BinaryCompute>(
        pool: &ThreadPool,
        steps: &[Step],
        operands: &[Option<TensorView>],
        walk: &Broadcast,
        y: &mut TensorViewMut,
    ) {
        let dtype = y.dtype;
        let bits = 8 * dtype.size_bytes() as u32;
        for_blocks(pool, y, &|start, bytes| {
            let (mut running, mut other) = ([C::ZERO; BLOCK], [C::ZERO; BLOCK]);
            let count = bytes.len() / dtype.size_bytes();
            let (running, other) = (&mut running[..count], &mut other[..count]);
            let fetch = |i: usize, out: &mut [C]| {
                if let Some(Some(x)) = operands.get(i) {
                    C::gather(x.dtype, x.bytes, &walk.walk(i), start, out);
                }
            };
            fetch(0, running);
            for step in steps {
                match *step {
                    Step::Unary(op) => {
                        C::apply(op, running);
                    }
                    Step::Binary { op, operand, swapped } => {
                        fetch(operand, other);
                        if swapped {
                            C::combine(op, other, running, bits);
                            running.copy_from_slice(other);
                        } else {
                            C::combine(op, running, other, bits);
                        }
                    }
                }
                // Values of a narrow type are rounded after each step, as the separate operators would.
                if dtype.size_bytes() != size_of::<C>() {
                    C::store(dtype, running, bytes);
                    C::load(dtype, bytes, 0, running);
                }
            }
            C::store(dtype, running, bytes);
        });
    }
    let shapes: Vec<&[usize]> = operands.iter().map(|x| x.map_or(&[][..], |x| x.dims)).collect();
    let walk = Broadcast::new(y.dims, &shapes).ok_or_else(|| mismatch(y, &shapes))?;
    if let Some(other) = operands.iter().flatten().find(|x| x.dtype != y.dtype) {
        return Err(OpError::Invalid(format!("an operand is {}, the result {}", other.dtype, y.dtype)));
    }
    let class =
        class(y.dtype).ok_or_else(|| OpError::Unsupported(format!("element-wise steps on {}", y.dtype)))?;
    let is_float = matches!(class, Class::F32 | Class::F64);
    for step in steps {
        let fine = match *step {
            Step::Unary(op) => {
                !matches!(op, Unary::IsNan | Unary::IsInf { .. })
                    && match class {
                        Class::F32 => f32::apply(op, &mut [0.5]),
                        Class::F64 => f64::apply(op, &mut [0.5]),
                        Class::I64 => i64::apply(op, &mut [1]),
                        Class::U64 => u64::apply(op, &mut [1]),
                    }
            }
            Step::Binary { op, operand, .. } => {
                let divides = matches!(op, Binary::Div | Binary::Mod | Binary::FMod);
                operands.get(operand).is_some_and(Option::is_some)
                    && (is_float || !divides)
                    && match class {
                        Class::F32 => f32::combine(op, &mut [1.0], &[1.0], 32),
                        Class::F64 => f64::combine(op, &mut [1.0], &[1.0], 64),
                        Class::I64 => i64::combine(op, &mut [1], &[1], 64),
                        Class::U64 => u64::combine(op, &mut [1], &[1], 64),
                    }
            }
        };
        if !fine {
            return Err(OpError::Unsupported(format!("step {step:?} on {}", y.dtype)));
        }
    }
    match class {
        Class::F32 => run::<f32>(pool, steps, operands, &walk, y),
        Class::F64 => run::<f64>(pool, steps, operands, &walk, y),
        Class::I64 => run::<i64>(pool, steps, operands, &walk, y),
        Class::U64 => run::<u64>(pool, steps, operands, &walk, y),
    }
    Ok(())
}
