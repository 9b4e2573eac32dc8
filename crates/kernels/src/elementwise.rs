//! Chains of elementwise operations in one pass over memory.

use crate::arch::{Kernel, Simd, dispatch};
use crate::epilogue::{ActivateRows, Activation, check_rows};
use crate::threads::{Shareable, ThreadPool};

/// An operation of two values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Binary {
    /// `x + y`
    Add,
    /// `x - y`
    Sub,
    /// `y - x`
    SubFrom,
    /// `x y`
    Mul,
    /// `x / y`
    Div,
    /// `y / x`
    DivInto,
    /// `min(x, y)`; NaN in `x` passes.
    Min,
    /// `max(x, y)`; NaN in `x` passes.
    Max,
}

impl Binary {
    /// The value for scalars.
    pub fn reference(self, x: f32, y: f32) -> f32 {
        match self {
            Binary::Add => x + y,
            Binary::Sub => x - y,
            Binary::SubFrom => y - x,
            Binary::Mul => x * y,
            Binary::Div => x / y,
            Binary::DivInto => y / x,
            Binary::Min => {
                if y < x {
                    y
                } else {
                    x
                }
            }
            Binary::Max => {
                if y > x {
                    y
                } else {
                    x
                }
            }
        }
    }
}

/// The second operand of a [`Binary`] over rows of `n` values.
#[derive(Clone, Copy, Debug)]
pub enum Operand<'a> {
    /// The same value everywhere.
    Scalar(f32),
    /// One value per column (channel): `n` values.
    Column(&'a [f32]),
    /// One value per row.
    Row(&'a [f32]),
    /// Rows that `repeat` rows after each other share: row `i` reads the `n` values from `data[i / repeat * n]` on.
    Shared {
        /// The values.
        data: &'a [f32],
        /// Rows that share.
        repeat: usize,
    },
    /// A value of its own for each: row `i` starts at `data[i * stride]`.
    Full {
        /// The values.
        data: &'a [f32],
        /// Distance between rows.
        stride: usize,
    },
}

/// A step of a chain.
#[derive(Clone, Copy, Debug)]
pub enum Step<'a> {
    /// A function of the value.
    Unary(Activation),
    /// The value with another.
    Binary(Binary, Operand<'a>),
}

/// Values per block; a block stays in the first-level cache through all steps.
const BLOCK: usize = 1024;

/// Combines `n` values at `x` with others, in place.
pub(crate) struct Combine {
    pub(crate) op: Binary,
    pub(crate) x: *mut f32,
    pub(crate) n: usize,
    /// Null: `scalar` everywhere.
    pub(crate) y: *const f32,
    pub(crate) scalar: f32,
}

impl Kernel for Combine {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        macro_rules! arms {
            ($($name:ident => $f:expr),* $(,)?) => {
                match self.op {
                    $(Binary::$name => {
                        let f = $f;
                        let mut i = 0;
                        // SAFETY: who builds the kernel vouches for `n` values.
                        unsafe {
                            while i + S::LANES <= self.n {
                                let y = if self.y.is_null() { s.splat(self.scalar) } else { s.load(self.y.add(i)) };
                                s.store(self.x.add(i), f(s.load(self.x.add(i)), y));
                                i += S::LANES;
                            }
                            if i < self.n {
                                let n = self.n - i;
                                let y = if self.y.is_null() { s.splat(self.scalar) } else { s.load_n(self.y.add(i), n) };
                                s.store_n(self.x.add(i), n, f(s.load_n(self.x.add(i), n), y));
                            }
                        }
                    })*
                }
            };
        }
        arms! {
            Add => |x, y| s.add(x, y),
            Sub => |x, y| s.sub(x, y),
            SubFrom => |x, y| s.sub(y, x),
            Mul => |x, y| s.mul(x, y),
            Div => |x, y| s.div(x, y),
            DivInto => |x, y| s.div(y, x),
            Min => |x, y| s.min(y, x),
            Max => |x, y| s.max(y, x),
        }
    }
}

/// Runs `steps` over `rows` rows of `n` values from `input` to `output`; `None` works in place on `output`.
///
/// # Panics
/// Panics when a slice is too short for its shape.
pub fn elementwise(
    pool: &ThreadPool,
    rows: usize,
    n: usize,
    input: Option<(&[f32], usize)>,
    steps: &[Step<'_>],
    output: &mut [f32],
    out_stride: usize,
) {
    if let Some((data, stride)) = input {
        check_rows("input", data.len(), rows, n, stride);
    }
    check_rows("output", output.len(), rows, n, out_stride);
    let mut contiguous = out_stride == n && input.is_none_or(|(_, stride)| stride == n);
    for step in steps {
        match step {
            Step::Binary(_, Operand::Column(data)) => {
                assert!(data.len() >= n, "operand has {} values for {n} columns", data.len());
                contiguous = false;
            }
            Step::Binary(_, Operand::Row(data)) => {
                assert!(data.len() >= rows, "operand has {} values for {rows} rows", data.len());
                contiguous = false;
            }
            Step::Binary(_, Operand::Shared { data, repeat }) => {
                check_rows("operand", data.len(), rows.div_ceil((*repeat).max(1)), n, n);
                contiguous = false;
            }
            Step::Binary(_, Operand::Full { data, stride }) => {
                check_rows("operand", data.len(), rows, n, *stride);
                contiguous &= *stride == n;
            }
            Step::Binary(_, Operand::Scalar(_)) | Step::Unary(_) => {}
        }
    }
    // Without per-row or per-column operands the rows are one long row.
    let (rows, n) = if contiguous { (1, rows * n) } else { (rows, n) };
    if rows == 0 || n == 0 {
        return;
    }
    let per_row = n.div_ceil(BLOCK);
    let blocks = rows * per_row;
    let few = pool.threads() == 1 || rows * n < 30_000;
    let step_size = if few { blocks } else { blocks.div_ceil(pool.threads() * 4) };
    let out = Shareable(output.as_mut_ptr());
    let isa = pool.isa();
    pool.parallel_for(blocks.div_ceil(step_size), &|index, _| {
        for block in index * step_size..blocks.min((index + 1) * step_size) {
            let (row, first) = (block / per_row, block % per_row * BLOCK);
            let len = BLOCK.min(n - first);
            let x = out.get().wrapping_add(row * out_stride + first);
            if let Some((data, stride)) = input {
                let from = &data[row * stride + first..][..len];
                // SAFETY: the output holds this block, which belongs to this task alone; it cannot overlap the
                // input, which is borrowed beside it.
                unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), x, len) };
            }
            for step in steps {
                match *step {
                    Step::Unary(activation) => {
                        dispatch(isa, ActivateRows { activation, data: x, rows: 1, n: len, stride: len });
                    }
                    Step::Binary(op, operand) => {
                        let (y, scalar) = match operand {
                            Operand::Scalar(v) => (std::ptr::null(), v),
                            Operand::Row(data) => (std::ptr::null(), data[row]),
                            Operand::Column(data) => (data[first..].as_ptr(), 0.0),
                            Operand::Shared { data, repeat } => {
                                (data[row / repeat.max(1) * n + first..].as_ptr(), 0.0)
                            }
                            Operand::Full { data, stride } => (data[row * stride + first..].as_ptr(), 0.0),
                        };
                        dispatch(isa, Combine { op, x, n: len, y, scalar });
                    }
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Isa;
    use crate::gemm::tests::values;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn chains_agree_with_scalars(rows in 1usize..30, n in prop_oneof![1usize..50, 1000usize..2100], extra in 0usize..3, seed in 0u64..1000, in_place: bool, op in 0usize..8, kind in 0usize..5) {
            let op = [Binary::Add, Binary::Sub, Binary::SubFrom, Binary::Mul, Binary::Div, Binary::DivInto, Binary::Min, Binary::Max][op];
            let stride = n + extra;
            let x = values(rows * stride, seed);
            let y = values(rows * stride, seed + 1);
            let operand = [Operand::Scalar(0.7), Operand::Column(&y), Operand::Row(&y), Operand::Full { data: &y, stride }, Operand::Shared { data: &y, repeat: 3 }][kind];
            let steps = [Step::Binary(op, operand), Step::Unary(Activation::LeakyRelu { slope: 0.5 }), Step::Binary(Binary::Add, Operand::Scalar(1.0))];
            for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
                let pool = ThreadPool::with_isa(2, isa);
                let mut out = if in_place { x.clone() } else { vec![9.0; x.len()] };
                elementwise(&pool, rows, n, (!in_place).then_some((&x[..], stride)), &steps, &mut out, stride);
                for r in 0..rows {
                    for j in 0..n {
                        let other = match kind { 0 => 0.7, 1 => y[j], 2 => y[r], 3 => y[r * stride + j], _ => y[r / 3 * n + j] };
                        let v = op.reference(x[r * stride + j], other);
                        let want = Activation::LeakyRelu { slope: 0.5 }.reference(v) + 1.0;
                        prop_assert_eq!(out[r * stride + j], want);
                    }
                }
            }
        }
    }
}
