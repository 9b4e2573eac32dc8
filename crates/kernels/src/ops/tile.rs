//! Matrix products over operands that are read through a function: one tile loop behind matrix products,
//! convolutions of any rank and deformable ones.

use bytemuck::Pod;
use half::{bf16, f16};

use super::block::Compute;
use crate::ThreadPool;
use crate::threads::Shareable;

/// Rows of a tile of the result.
pub(crate) const ROWS: usize = 16;
/// Columns of a tile of the result.
pub(crate) const COLS: usize = 64;
/// Products that are accumulated per pass over a tile.
pub(crate) const DEPTH: usize = 64;

/// A part of the left operand: `[row][k]`.
pub(crate) type LeftTile<C> = [[C; DEPTH]; ROWS];
/// A part of the right operand: `[k][column]`.
pub(crate) type RightTile<C> = [[C; COLS]; DEPTH];
/// A part of the result: `[row][column]`.
pub(crate) type ResultTile<C> = [[C; COLS]; ROWS];

/// A stored number and the float type it is computed in. Integers truncate on the way back.
pub(crate) trait Real: Pod + Send + Sync {
    /// Compute type.
    type C: Compute + RealCompute;
    /// To the compute type.
    fn up(self) -> Self::C;
    /// Rounded.
    fn down(x: Self::C) -> Self;
}

/// The float functions that generic kernels need.
#[allow(missing_docs)]
pub(crate) trait RealCompute:
    std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
    + PartialOrd
    + Copy
{
    fn sqrt(self) -> Self;
    fn floor(self) -> Self;
    fn abs(self) -> Self;
    fn powf(self, e: Self) -> Self;
    fn is_nan(self) -> bool;
    fn of(x: f64) -> Self;
}

macro_rules! real_compute {
    ($($t:ident),*) => { $(
        impl RealCompute for $t {
            #[inline(always)]
            fn sqrt(self) -> $t { $t::sqrt(self) }
            #[inline(always)]
            fn floor(self) -> $t { $t::floor(self) }
            #[inline(always)]
            fn abs(self) -> $t { $t::abs(self) }
            #[inline(always)]
            fn powf(self, e: $t) -> $t { $t::powf(self, e) }
            #[inline(always)]
            fn is_nan(self) -> bool { $t::is_nan(self) }
            #[inline(always)]
            fn of(x: f64) -> $t { x as $t }
        }
    )* };
}
real_compute!(f32, f64);

macro_rules! real {
    ($($t:ty => $c:ty, $up:expr, $down:expr);* $(;)?) => { $(
        impl Real for $t {
            type C = $c;
            #[inline(always)]
            fn up(self) -> $c { $up(self) }
            #[inline(always)]
            fn down(x: $c) -> $t { $down(x) }
        }
    )* };
}
real! {
    f32 => f32, |x| x, |x| x;
    f64 => f64, |x| x, |x| x;
    f16 => f32, f16::to_f32, f16::from_f32;
    bf16 => f32, bf16::to_f32, bf16::from_f32;
    i8 => f32, f32::from, |x| x as i8;
    u8 => f32, f32::from, |x| x as u8;
    i16 => f32, f32::from, |x| x as i16;
    u16 => f32, f32::from, |x| x as u16;
    i32 => f64, f64::from, |x| x as i32;
    u32 => f64, f64::from, |x| x as u32;
    i64 => f64, |x| x as f64, |x| x as i64;
    u64 => f64, |x| x as f64, |x| x as u64;
}

/// Runs a generic kernel on the Rust type of a float element type.
macro_rules! with_real {
    ($dtype:expr, $what:expr, $S:ident => $body:expr) => {
        match $dtype {
            lightering_units::DType::F32 => {
                type $S = f32;
                $body
            }
            lightering_units::DType::F64 => {
                type $S = f64;
                $body
            }
            lightering_units::DType::F16 => {
                type $S = half::f16;
                $body
            }
            lightering_units::DType::BF16 => {
                type $S = half::bf16;
                $body
            }
            other => return Err($crate::ops::OpError::Unsupported(format!("{} of {other}", $what))),
        }
    };
}
pub(crate) use with_real;

/// As [`with_real`], for integers and bool too.
macro_rules! with_number {
    ($dtype:expr, $what:expr, $S:ident => $body:expr) => {
        match $dtype {
            lightering_units::DType::I8 => {
                type $S = i8;
                $body
            }
            lightering_units::DType::U8 | lightering_units::DType::Bool => {
                type $S = u8;
                $body
            }
            lightering_units::DType::I16 => {
                type $S = i16;
                $body
            }
            lightering_units::DType::U16 => {
                type $S = u16;
                $body
            }
            lightering_units::DType::I32 => {
                type $S = i32;
                $body
            }
            lightering_units::DType::U32 => {
                type $S = u32;
                $body
            }
            lightering_units::DType::I64 => {
                type $S = i64;
                $body
            }
            lightering_units::DType::U64 => {
                type $S = u64;
                $body
            }
            other => with_real!(other, $what, $S => $body),
        }
    };
}
pub(crate) use with_number;

/// How the operands of a product are read. Unused parts of tiles may keep old values.
pub(crate) trait Operands<C>: Sync {
    /// Fills `tile[..rows][..depth]` from row `row` and position `k` of batch `batch`.
    fn left(&self, batch: usize, row: usize, rows: usize, k: usize, depth: usize, tile: &mut LeftTile<C>);
    /// Fills `tile[..depth][..columns]`.
    fn right(
        &self,
        batch: usize,
        k: usize,
        depth: usize,
        column: usize,
        columns: usize,
        tile: &mut RightTile<C>,
    );
}

/// Sizes of a batched product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) batches: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) depth: usize,
}

/// Computes every tile of the product and hands it to `finish(batch, row, rows, column, columns, tile)`, which
/// writes it out; different calls get disjoint parts.
pub(crate) fn product<C: Compute>(
    pool: &ThreadPool,
    sizes: Sizes,
    operands: &impl Operands<C>,
    finish: &(dyn Fn(usize, usize, usize, usize, usize, &mut ResultTile<C>) + Sync),
) {
    let (row_tiles, column_tiles) = (sizes.rows.div_ceil(ROWS), sizes.columns.div_ceil(COLS));
    let tasks = sizes.batches * row_tiles * column_tiles;
    let single = sizes.batches * sizes.rows * sizes.columns * sizes.depth < 50_000;
    let run = |task: usize| {
        let (tile_index, row_tile) = (task / row_tiles, task % row_tiles);
        let (batch, column_tile) = (tile_index / column_tiles, tile_index % column_tiles);
        let (row, column) = (row_tile * ROWS, column_tile * COLS);
        let (rows, columns) = (ROWS.min(sizes.rows - row), COLS.min(sizes.columns - column));
        let mut result: ResultTile<C> = [[C::ZERO; COLS]; ROWS];
        let mut left: LeftTile<C> = [[C::ZERO; DEPTH]; ROWS];
        let mut right: RightTile<C> = [[C::ZERO; COLS]; DEPTH];
        let mut k = 0;
        while k < sizes.depth {
            let depth = DEPTH.min(sizes.depth - k);
            operands.left(batch, row, rows, k, depth, &mut left);
            operands.right(batch, k, depth, column, columns, &mut right);
            for r in 0..rows {
                for d in 0..depth {
                    let a = left[r][d];
                    if columns == COLS {
                        for c in 0..COLS {
                            result[r][c] = result[r][c].plus(a.times(right[d][c]));
                        }
                    } else {
                        for c in 0..columns {
                            result[r][c] = result[r][c].plus(a.times(right[d][c]));
                        }
                    }
                }
            }
            k += depth;
        }
        finish(batch, row, rows, column, columns, &mut result);
    };
    if single {
        (0..tasks).for_each(run);
    } else {
        pool.parallel_for(tasks, &|task, _| run(task));
    }
}

/// A result buffer that several tasks write disjoint parts of.
#[derive(Clone, Copy)]
pub(crate) struct SharedResult<T> {
    base: Shareable<T>,
    len: usize,
}

impl<T: Pod + Send> SharedResult<T> {
    pub(crate) fn new(data: &mut [T]) -> SharedResult<T> {
        SharedResult { base: Shareable(data.as_mut_ptr()), len: data.len() }
    }

    /// Writes one element.
    ///
    /// # Safety
    /// No other task touches element `index` at the same time, and the buffer is still borrowed.
    #[inline(always)]
    pub(crate) unsafe fn set(&self, index: usize, value: T) {
        assert!(index < self.len);
        // SAFETY: in range; the caller vouches for the rest.
        unsafe { *self.base.get().add(index) = value }
    }

    /// A part of the buffer.
    ///
    /// # Safety
    /// No other task touches this part at the same time, and the buffer is still borrowed.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: in range; the caller vouches for the rest.
        unsafe { std::slice::from_raw_parts_mut(self.base.get().add(start), len) }
    }
}
