//! Elements in blocks: whatever the storage type, arithmetic happens in one of four compute types, on blocks that
//! fit in the first-level cache. So an operator is written four times by a macro instead of thirteen times.

use bytemuck::{Pod, cast_slice, cast_slice_mut};
use half::{bf16, f16};
use lightering_units::DType;

use super::float8;
use super::{TensorView, TensorViewMut};
use crate::ThreadPool;
use crate::threads::Shareable;

/// Elements per block.
pub const BLOCK: usize = 512;

/// Elements that are worth a thread of their own.
const GRAIN: usize = 16 << 10;

/// The type that arithmetic on a storage type happens in.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// f32, f16, bf16 and the narrower floats.
    F32,
    F64,
    /// Signed integers.
    I64,
    /// Unsigned integers and bool.
    U64,
}

/// The compute type of `dtype`; `None` for complex numbers and text.
pub fn class(dtype: DType) -> Option<Class> {
    Some(match dtype {
        DType::F32 | DType::F16 | DType::BF16 => Class::F32,
        DType::F8E4M3FN | DType::F8E4M3FNUZ | DType::F8E5M2 | DType::F8E5M2FNUZ | DType::F4E2M1 => Class::F32,
        DType::F64 => Class::F64,
        DType::I8 | DType::I16 | DType::I32 | DType::I64 | DType::I4 => Class::I64,
        DType::U8 | DType::U16 | DType::U32 | DType::U64 | DType::U4 | DType::Bool => Class::U64,
        DType::Complex64 | DType::Complex128 | DType::String => return None,
    })
}

/// A compute type: `f32`, `f64`, `i64` or `u64`. Integer arithmetic wraps.
pub trait Compute: Pod + PartialOrd + Send + Sync + std::fmt::Debug {
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// The smallest value: −∞ for floats.
    const LEAST: Self;
    /// The largest value: +∞ for floats.
    const GREATEST: Self;
    /// Sum.
    fn plus(self, other: Self) -> Self;
    /// Product.
    fn times(self, other: Self) -> Self;
    /// Difference.
    fn minus(self, other: Self) -> Self;
    /// Converts with `as`.
    fn from_f64(x: f64) -> Self;
    /// Converts with `as`.
    fn to_f64(self) -> f64;
    /// The larger; NaN wins.
    fn larger(self, other: Self) -> Self;
    /// The smaller; NaN wins.
    fn smaller(self, other: Self) -> Self;
    /// Reads elements `start..` of an operand whose element for linear index i of `dims` lies at the sum of
    /// index·stride.
    fn gather(dtype: DType, bytes: &[u8], at: &Walk, start: usize, out: &mut [Self]);
    /// Reads contiguous elements.
    fn load(dtype: DType, bytes: &[u8], start: usize, out: &mut [Self]);
    /// Writes contiguous elements: floats round, integers wrap, 8-bit floats saturate.
    fn store(dtype: DType, values: &[Self], bytes: &mut [u8]);
}

/// Sizes and strides of an operand over the (collapsed) result.
#[derive(Clone, Copy, Debug)]
pub struct Walk<'a> {
    /// Sizes of the result, outermost first; at least one.
    pub dims: &'a [usize],
    /// Elements of the operand between neighbours of the result.
    pub strides: &'a [usize],
}

/// Calls `row(offset, stride, out_range)` for each innermost run of result elements `start..start + len`.
#[inline(always)]
fn walk_rows(at: &Walk, start: usize, len: usize, mut row: impl FnMut(usize, usize, std::ops::Range<usize>)) {
    let rank = at.dims.len();
    let (inner, inner_stride) = (at.dims[rank - 1], at.strides[rank - 1]);
    if rank == 1 {
        return row(start * inner_stride, inner_stride, 0..len);
    }
    let mut done = 0;
    let mut column = start % inner;
    let mut outer = start / inner;
    while done < len {
        let run = (inner - column).min(len - done);
        let mut offset = column * inner_stride;
        let mut rest = outer;
        for axis in (0..rank - 1).rev() {
            offset += rest % at.dims[axis] * at.strides[axis];
            rest /= at.dims[axis];
        }
        row(offset, inner_stride, done..done + run);
        done += run;
        column = 0;
        outer += 1;
    }
}

#[inline(always)]
fn gather_as<S: Pod, C: Copy>(
    bytes: &[u8],
    at: &Walk,
    start: usize,
    out: &mut [C],
    convert: impl Fn(S) -> C + Copy,
) {
    let source: &[S] = cast_slice(bytes);
    walk_rows(at, start, out.len(), |offset, stride, range| {
        let out = &mut out[range];
        match stride {
            0 => out.fill(convert(source[offset])),
            1 => out.iter_mut().zip(&source[offset..]).for_each(|(o, &s)| *o = convert(s)),
            _ => out.iter_mut().enumerate().for_each(|(i, o)| *o = convert(source[offset + i * stride])),
        }
    });
}

/// Copies elements of any width without reading them; see [`Compute::gather`].
pub fn gather_bytes(size: usize, bytes: &[u8], at: &Walk, start: usize, out: &mut [u8]) {
    match size {
        1 => gather_as(bytes, at, start, out, |x: u8| x),
        2 => gather_as(bytes, at, start, cast_slice_mut(out), |x: u16| x),
        4 => gather_as(bytes, at, start, cast_slice_mut(out), |x: u32| x),
        8 => gather_as(bytes, at, start, cast_slice_mut(out), |x: u64| x),
        16 => gather_as(bytes, at, start, cast_slice_mut::<u8, [u64; 2]>(out), |x: [u64; 2]| x),
        _ => {}
    }
}

macro_rules! loads {
    ($dtype:expr, $C:ty, $call:ident ! ($($arg:expr),*)) => {
        match $dtype {
            DType::F32 => $call!($($arg),*, f32, |x: f32| x as $C),
            DType::F64 => $call!($($arg),*, f64, |x: f64| x as $C),
            DType::F16 => $call!($($arg),*, f16, |x: f16| x.to_f32() as $C),
            DType::BF16 => $call!($($arg),*, bf16, |x: bf16| x.to_f32() as $C),
            DType::I8 | DType::I4 => $call!($($arg),*, i8, |x: i8| x as $C),
            DType::U8 | DType::U4 | DType::Bool => $call!($($arg),*, u8, |x: u8| x as $C),
            DType::I16 => $call!($($arg),*, i16, |x: i16| x as $C),
            DType::U16 => $call!($($arg),*, u16, |x: u16| x as $C),
            DType::I32 => $call!($($arg),*, i32, |x: i32| x as $C),
            DType::U32 => $call!($($arg),*, u32, |x: u32| x as $C),
            DType::I64 => $call!($($arg),*, i64, |x: i64| x as $C),
            DType::U64 => $call!($($arg),*, u64, |x: u64| x as $C),
            DType::F8E4M3FN | DType::F8E4M3FNUZ | DType::F8E5M2 | DType::F8E5M2FNUZ | DType::F4E2M1 => {
                $call!($($arg),*, u8, |x: u8| float8::decode($dtype, x) as $C)
            }
            DType::Complex64 | DType::Complex128 | DType::String => {
                unreachable!("callers check that the type has a compute class")
            }
        }
    };
}

macro_rules! gather_call {
    ($bytes:expr, $at:expr, $start:expr, $out:expr, $S:ty, $f:expr) => {
        gather_as::<$S, _>($bytes, $at, $start, $out, $f)
    };
}

macro_rules! load_call {
    ($bytes:expr, $start:expr, $out:expr, $S:ty, $f:expr) => {{
        let source: &[$S] = cast_slice($bytes);
        let len = $out.len();
        $out.iter_mut().zip(&source[$start..$start + len]).for_each(|(o, &s)| *o = $f(s))
    }};
}

fn put<S: Pod, C: Copy>(values: &[C], bytes: &mut [u8], convert: impl Fn(C) -> S) {
    let out: &mut [S] = cast_slice_mut(bytes);
    out[..values.len()].iter_mut().zip(values).for_each(|(o, &v)| *o = convert(v));
}

macro_rules! stores {
    ($C:ty) => {
        fn store(dtype: DType, values: &[$C], bytes: &mut [u8]) {
            match dtype {
                DType::F32 => put(values, bytes, |x| x as f32),
                DType::F64 => put(values, bytes, |x| x as f64),
                DType::F16 => put(values, bytes, |x| f16::from_f64(x as f64)),
                DType::BF16 => put(values, bytes, |x| bf16::from_f64(x as f64)),
                DType::I8 => put(values, bytes, |x| x as i8),
                DType::U8 => put(values, bytes, |x| x as u8),
                DType::I16 => put(values, bytes, |x| x as i16),
                DType::U16 => put(values, bytes, |x| x as u16),
                DType::I32 => put(values, bytes, |x| x as i32),
                DType::U32 => put(values, bytes, |x| x as u32),
                DType::I64 => put(values, bytes, |x| x as i64),
                DType::U64 => put(values, bytes, |x| x as u64),
                DType::Bool => put(values, bytes, |x| u8::from(x != <$C>::ZERO)),
                DType::I4 => put(values, bytes, |x| ((x as i8) << 4) >> 4),
                DType::U4 => put(values, bytes, |x| x as u8 & 15),
                DType::F8E4M3FN | DType::F8E4M3FNUZ | DType::F8E5M2 | DType::F8E5M2FNUZ | DType::F4E2M1 => {
                    put(values, bytes, |x| float8::encode(dtype, x as f32, true))
                }
                DType::Complex64 | DType::Complex128 | DType::String => {
                    unreachable!("callers check that the type has a compute class")
                }
            }
        }
    };
}

macro_rules! plain_load {
    ($C:ident) => {
        fn load(dtype: DType, bytes: &[u8], start: usize, out: &mut [$C]) {
            loads!(dtype, $C, load_call!(bytes, start, out))
        }
    };
}

macro_rules! float_compute {
    ($C:ident) => {
        impl Compute for $C {
            const ZERO: $C = 0.0;
            const ONE: $C = 1.0;
            const LEAST: $C = $C::NEG_INFINITY;
            const GREATEST: $C = $C::INFINITY;
            #[inline(always)]
            fn plus(self, other: $C) -> $C {
                self + other
            }
            #[inline(always)]
            fn times(self, other: $C) -> $C {
                self * other
            }
            #[inline(always)]
            fn minus(self, other: $C) -> $C {
                self - other
            }
            #[inline(always)]
            fn from_f64(x: f64) -> $C {
                x as $C
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn larger(self, other: $C) -> $C {
                if self > other || self.is_nan() { self } else { other }
            }
            #[inline(always)]
            fn smaller(self, other: $C) -> $C {
                if self < other || self.is_nan() { self } else { other }
            }
            fn gather(dtype: DType, bytes: &[u8], at: &Walk, start: usize, out: &mut [$C]) {
                loads!(dtype, $C, gather_call!(bytes, at, start, out))
            }
            plain_load!($C);
            stores!($C);
        }
    };
}

macro_rules! integer_compute {
    ($C:ident) => {
        impl Compute for $C {
            const ZERO: $C = 0;
            const ONE: $C = 1;
            const LEAST: $C = $C::MIN;
            const GREATEST: $C = $C::MAX;
            #[inline(always)]
            fn plus(self, other: $C) -> $C {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn times(self, other: $C) -> $C {
                self.wrapping_mul(other)
            }
            #[inline(always)]
            fn minus(self, other: $C) -> $C {
                self.wrapping_sub(other)
            }
            #[inline(always)]
            fn from_f64(x: f64) -> $C {
                x as $C
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn larger(self, other: $C) -> $C {
                self.max(other)
            }
            #[inline(always)]
            fn smaller(self, other: $C) -> $C {
                self.min(other)
            }
            fn gather(dtype: DType, bytes: &[u8], at: &Walk, start: usize, out: &mut [$C]) {
                loads!(dtype, $C, gather_call!(bytes, at, start, out))
            }
            plain_load!($C);
            stores!($C);
        }
    };
}
float_compute!(f32);
float_compute!(f64);
integer_compute!(i64);
integer_compute!(u64);

/// Sizes and strides of several operands that broadcast to one result, with as few dimensions as possible.
#[derive(Clone, Debug)]
pub struct Broadcast {
    /// Sizes of the result, neighbours merged where every operand allows it; never empty.
    pub dims: Vec<usize>,
    /// Per operand.
    pub strides: Vec<Vec<usize>>,
}

impl Broadcast {
    /// The walk over operands of shapes `operands` that gives a result of shape `result`; `None` when an operand
    /// does not broadcast to the result.
    pub fn new(result: &[usize], operands: &[&[usize]]) -> Option<Broadcast> {
        let mut strides = Vec::with_capacity(operands.len());
        for dims in operands {
            let skip = result.len().checked_sub(dims.len())?;
            let mut own = vec![0; result.len()];
            let mut step = 1;
            for axis in (0..dims.len()).rev() {
                if dims[axis] == result[skip + axis] {
                    if dims[axis] != 1 {
                        own[skip + axis] = step;
                    }
                } else if dims[axis] != 1 {
                    return None;
                }
                step *= dims[axis];
            }
            strides.push(own);
        }
        Some(Broadcast { dims: result.to_vec(), strides }.merged())
    }

    /// Any strides over a result, merged.
    pub fn from_strides(dims: &[usize], strides: &[&[usize]]) -> Broadcast {
        Broadcast { dims: dims.to_vec(), strides: strides.iter().map(|s| s.to_vec()).collect() }.merged()
    }

    fn merged(self) -> Broadcast {
        let mut dims: Vec<usize> = Vec::with_capacity(self.dims.len());
        let mut strides: Vec<Vec<usize>> = vec![Vec::with_capacity(self.dims.len()); self.strides.len()];
        for axis in 0..self.dims.len() {
            let size = self.dims[axis];
            if size == 1 {
                continue;
            }
            let fits = !dims.is_empty()
                && self
                    .strides
                    .iter()
                    .zip(&strides)
                    .all(|(old, new)| new.last().is_some_and(|&outer| outer == old[axis] * size));
            if fits {
                *dims.last_mut().expect("not empty") *= size;
                for (old, new) in self.strides.iter().zip(&mut strides) {
                    *new.last_mut().expect("as many as dims") = old[axis];
                }
            } else {
                dims.push(size);
                for (old, new) in self.strides.iter().zip(&mut strides) {
                    new.push(old[axis]);
                }
            }
        }
        if dims.is_empty() {
            dims.push(1);
            strides.iter_mut().for_each(|s| s.push(0));
        }
        Broadcast { dims, strides }
    }

    /// The walk of one operand.
    pub fn walk(&self, operand: usize) -> Walk<'_> {
        Walk { dims: &self.dims, strides: &self.strides[operand] }
    }

    /// Whether the operand is read from its start to its end.
    pub fn is_contiguous(&self, operand: usize) -> bool {
        self.dims.len() == 1 && (self.strides[operand][0] == 1 || self.dims[0] <= 1)
    }
}

/// Calls `task(start, part)` for parts of `data` of `chunk` elements, on several threads when that pays.
pub fn parallel_parts<T: Copy + Send>(
    pool: &ThreadPool,
    data: &mut [T],
    chunk: usize,
    task: &(dyn Fn(usize, &mut [T]) + Sync),
) {
    let (len, chunk) = (data.len(), chunk.max(1));
    let base = Shareable(data.as_mut_ptr());
    pool.parallel_for(len.div_ceil(chunk), &|index, _| {
        let start = index * chunk;
        // SAFETY: the parts are disjoint ranges inside the slice, which outlives the call.
        let part = unsafe { std::slice::from_raw_parts_mut(base.get().add(start), chunk.min(len - start)) };
        task(start, part);
    });
}

/// Calls `block(start, bytes)` for every block of at most [`BLOCK`] elements of the result.
pub fn for_blocks(pool: &ThreadPool, y: &mut TensorViewMut, block: &(dyn Fn(usize, &mut [u8]) + Sync)) {
    let size = y.dtype.size_bytes();
    if size == 0 {
        return;
    }
    parallel_parts(pool, y.bytes, GRAIN * size, &|start, part| {
        let mut first = start / size;
        for bytes in part.chunks_mut(BLOCK * size) {
            block(first, bytes);
            first += BLOCK;
        }
    });
}

/// Every element of a small operand as `C`.
pub fn to_vec<C: Compute>(x: &TensorView) -> Vec<C> {
    let mut out = vec![C::ZERO; x.len()];
    C::load(x.dtype, x.bytes, 0, &mut out);
    out
}
