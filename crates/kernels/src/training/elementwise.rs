//! Gradients of functions of one value, and masks of one bit per value.

use super::{get, over_chunks, put};
use crate::arch::{Kernel, Simd, dispatch};
use crate::math;
use crate::threads::{Shareable, ThreadPool};

/// The derivative of a function of one value, from its result `y` or its operand `x`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum UnaryGrad {
    /// 1
    Identity,
    /// -1
    Neg,
    /// Sign of `x`.
    Abs,
    /// 1 where `y > 0`
    Relu,
    /// 1 where `min < y < max`
    Clip {
        /// Lower bound.
        min: f32,
        /// Upper bound.
        max: f32,
    },
    /// `slope` where `y < 0`, else 1
    LeakyRelu {
        /// Slope below zero.
        slope: f32,
    },
    /// `y (1 - y)`
    Sigmoid,
    /// `1 - y²`
    Tanh,
    /// `y`
    Exp,
    /// `1 / (2 y)`
    Sqrt,
    /// `-y³ / 2`
    Rsqrt,
    /// `-y²`
    Reciprocal,
    /// `1 / x`
    Log,
    /// 0 below -3, 1 above 3, `x / 3 + 1/2` between
    HardSwish,
    /// `alpha` where `0 < alpha x + beta < 1`
    HardSigmoid {
        /// Slope.
        alpha: f32,
        /// Offset.
        beta: f32,
    },
    /// `s + alpha x s (1 - s)` with `s = sigmoid(alpha x)`
    Swish {
        /// Steepness.
        alpha: f32,
    },
    /// Of the Gaussian error linear unit.
    Gelu,
    /// Of its approximation by tanh.
    GeluTanh,
    /// `alpha e^x` where `x < 0`, else 1
    Elu {
        /// Scale below zero.
        alpha: f32,
    },
    /// `2 / sqrt(pi) e^(-x²)`
    Erf,
    /// `sigmoid(x)`
    Softplus,
    /// `1 / (1 + |x|)²`
    Softsign,
}

#[inline(always)]
fn derivative<S: Simd>(s: S, kind: UnaryGrad, x: S::F, dy: S::F) -> S::F {
    let (zero, half, one) = (s.splat(0.0), s.splat(0.5), s.splat(1.0));
    match kind {
        UnaryGrad::Identity => dy,
        UnaryGrad::Neg => s.sub(s.splat(-0.0), dy),
        UnaryGrad::Abs => {
            let below = s.select(s.lt(x, zero), s.sub(s.splat(-0.0), dy), zero);
            s.select(s.lt(zero, x), dy, below)
        }
        UnaryGrad::Relu => s.select(s.lt(zero, x), dy, zero),
        UnaryGrad::Clip { min, max } => {
            let above = s.select(s.lt(s.splat(min), x), dy, zero);
            s.select(s.lt(x, s.splat(max)), above, zero)
        }
        UnaryGrad::LeakyRelu { slope } => s.select(s.lt(x, zero), s.mul(dy, s.splat(slope)), dy),
        UnaryGrad::Sigmoid => s.mul(dy, s.mul(x, s.sub(one, x))),
        UnaryGrad::Tanh => s.mul(dy, s.sub(one, s.mul(x, x))),
        UnaryGrad::Exp => s.mul(dy, x),
        UnaryGrad::Sqrt => s.div(s.mul(dy, half), x),
        UnaryGrad::Rsqrt => s.mul(s.mul(dy, s.splat(-0.5)), s.mul(x, s.mul(x, x))),
        UnaryGrad::Reciprocal => s.sub(s.splat(-0.0), s.mul(dy, s.mul(x, x))),
        UnaryGrad::Log => s.div(dy, x),
        UnaryGrad::HardSwish => {
            let slope = s.fma(x, s.splat(1.0 / 3.0), half);
            let slope = s.select(s.lt(x, s.splat(-3.0)), zero, slope);
            s.mul(dy, s.select(s.lt(s.splat(3.0), x), one, slope))
        }
        UnaryGrad::HardSigmoid { alpha, beta } => {
            let g = s.fma(x, s.splat(alpha), s.splat(beta));
            let slope = s.select(s.lt(zero, g), s.mul(dy, s.splat(alpha)), zero);
            s.select(s.lt(g, one), slope, zero)
        }
        UnaryGrad::Swish { alpha } => {
            let z = s.mul(x, s.splat(alpha));
            let g = math::scaled_sigmoid(s, z, one);
            s.mul(dy, s.fma(s.mul(z, g), s.sub(one, g), g))
        }
        UnaryGrad::Gelu => {
            let e = math::erf(s, s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2)));
            let density = math::exp(s, s.mul(s.mul(x, x), s.splat(-0.5)));
            let first = s.fma(e, half, half);
            s.mul(dy, s.fma(s.mul(x, s.splat(0.398_942_3)), density, first))
        }
        UnaryGrad::GeluTanh => {
            let x2 = s.mul(x, x);
            let inner = s.mul(x, s.fma(x2, s.splat(0.044715 * 0.797_884_6), s.splat(0.797_884_6)));
            let t = math::tanh(s, inner);
            let slope = s.fma(x2, s.splat(3.0 * 0.044715 * 0.797_884_6), s.splat(0.797_884_6));
            let second = s.mul(s.mul(s.mul(x, half), s.sub(one, s.mul(t, t))), slope);
            s.mul(dy, s.add(s.fma(t, half, half), second))
        }
        UnaryGrad::Elu { alpha } => {
            let below = s.mul(s.mul(dy, s.splat(alpha)), math::exp(s, x));
            s.select(s.lt(x, zero), below, dy)
        }
        UnaryGrad::Erf => {
            let e = math::exp(s, s.sub(zero, s.mul(x, x)));
            s.mul(s.mul(dy, s.splat(std::f32::consts::FRAC_2_SQRT_PI)), e)
        }
        UnaryGrad::Softplus => math::scaled_sigmoid(s, x, dy),
        UnaryGrad::Softsign => {
            let d = s.add(one, s.abs(x));
            s.div(dy, s.mul(d, d))
        }
    }
}

struct GradValues {
    kind: UnaryGrad,
    saved: *const f32,
    dy: *const f32,
    dx: *mut f32,
    n: usize,
}

impl Kernel for GradValues {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // One loop per variant, so that the choice is made once and not per vector.
        macro_rules! arms {
            ($($pattern:pat => $kind:expr),* $(,)?) => {
                match self.kind {
                    $($pattern => {
                        let mut i = 0;
                        while i < self.n {
                            let n = S::LANES.min(self.n - i);
                            // SAFETY: who builds the kernel vouches for `n` values.
                            unsafe {
                                let (x, dy) = (get(s, self.saved.add(i), n), get(s, self.dy.add(i), n));
                                put(s, self.dx.add(i), n, derivative(s, $kind, x, dy));
                            }
                            i += S::LANES;
                        }
                    })*
                }
            };
        }
        arms! {
            UnaryGrad::Identity => UnaryGrad::Identity,
            UnaryGrad::Neg => UnaryGrad::Neg,
            UnaryGrad::Abs => UnaryGrad::Abs,
            UnaryGrad::Relu => UnaryGrad::Relu,
            UnaryGrad::Clip { min, max } => UnaryGrad::Clip { min, max },
            UnaryGrad::LeakyRelu { slope } => UnaryGrad::LeakyRelu { slope },
            UnaryGrad::Sigmoid => UnaryGrad::Sigmoid,
            UnaryGrad::Tanh => UnaryGrad::Tanh,
            UnaryGrad::Exp => UnaryGrad::Exp,
            UnaryGrad::Sqrt => UnaryGrad::Sqrt,
            UnaryGrad::Rsqrt => UnaryGrad::Rsqrt,
            UnaryGrad::Reciprocal => UnaryGrad::Reciprocal,
            UnaryGrad::Log => UnaryGrad::Log,
            UnaryGrad::HardSwish => UnaryGrad::HardSwish,
            UnaryGrad::HardSigmoid { alpha, beta } => UnaryGrad::HardSigmoid { alpha, beta },
            UnaryGrad::Swish { alpha } => UnaryGrad::Swish { alpha },
            UnaryGrad::Gelu => UnaryGrad::Gelu,
            UnaryGrad::GeluTanh => UnaryGrad::GeluTanh,
            UnaryGrad::Elu { alpha } => UnaryGrad::Elu { alpha },
            UnaryGrad::Erf => UnaryGrad::Erf,
            UnaryGrad::Softplus => UnaryGrad::Softplus,
            UnaryGrad::Softsign => UnaryGrad::Softsign,
        }
    }
}

/// `dx = dy · f'(saved)` for `n` values; `saved` is the result or the operand, as [`UnaryGrad`] says.
///
/// # Panics
/// Panics when `saved` or `dy` is shorter than `dx`.
pub fn unary_grad(pool: &ThreadPool, kind: UnaryGrad, saved: &[f32], dy: &[f32], dx: &mut [f32]) {
    let len = dx.len();
    assert!(saved.len() >= len && dy.len() >= len, "operands are shorter than the result of {len}");
    let out = Shareable(dx.as_mut_ptr());
    over_chunks(pool, len, &|first, n| {
        let (saved, dy) = (saved[first..].as_ptr(), dy[first..].as_ptr());
        dispatch(pool.isa(), GradValues { kind, saved, dy, dx: out.get().wrapping_add(first), n });
    });
}

/// Writes the bits of `low < x`, and `x < high` if there is such a bound.
struct Bits {
    x: *const f32,
    n: usize,
    low: f32,
    high: Option<f32>,
    bits: *mut u8,
}

impl Kernel for Bits {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut i = 0;
        while i < self.n {
            let n = S::LANES.min(self.n - i);
            // SAFETY: who builds the kernel vouches for `n` values and a bit for each.
            unsafe {
                let x = get(s, self.x.add(i), n);
                let above = s.bits(s.lt(s.splat(self.low), x)) & ((1 << n) - 1);
                let bits = self.high.map_or(above, |high| above & s.bits(s.lt(x, s.splat(high))));
                for byte in 0..n.div_ceil(8) {
                    *self.bits.add(i / 8 + byte) = (bits >> (8 * byte)) as u8;
                }
            }
            i += S::LANES;
        }
    }
}

/// One bit per value of `x`, the first in the lowest bit of the first byte: whether it is above `threshold`.
///
/// # Panics
/// Panics when `bits` is too short.
pub fn mask_above(pool: &ThreadPool, threshold: f32, x: &[f32], bits: &mut [u8]) {
    mask(pool, threshold, None, x, bits);
}

/// One bit per value of `x`: whether it is strictly between `low` and `high`.
///
/// # Panics
/// Panics when `bits` is too short.
pub fn mask_between(pool: &ThreadPool, low: f32, high: f32, x: &[f32], bits: &mut [u8]) {
    mask(pool, low, Some(high), x, bits);
}

fn mask(pool: &ThreadPool, low: f32, high: Option<f32>, x: &[f32], bits: &mut [u8]) {
    assert!(bits.len() >= x.len().div_ceil(8), "{} bytes for {} bits", bits.len(), x.len());
    let out = Shareable(bits.as_mut_ptr());
    over_chunks(pool, x.len(), &|first, n| {
        let bits = out.get().wrapping_add(first / 8);
        dispatch(pool.isa(), Bits { x: x[first..].as_ptr(), n, low, high, bits });
    });
}

struct Masked {
    bits: *const u8,
    dy: *const f32,
    dx: *mut f32,
    n: usize,
}

impl Kernel for Masked {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut i = 0;
        while i < self.n {
            let n = S::LANES.min(self.n - i);
            // SAFETY: who builds the kernel vouches for `n` values and a bit for each.
            unsafe {
                let mut bits = 0;
                for byte in 0..n.div_ceil(8) {
                    bits |= u32::from(*self.bits.add(i / 8 + byte)) << (8 * byte);
                }
                let dx = s.select(s.mask(bits), get(s, self.dy.add(i), n), s.splat(0.0));
                put(s, self.dx.add(i), n, dx);
            }
            i += S::LANES;
        }
    }
}

/// `dx = dy` where the bit is set, else 0.
///
/// # Panics
/// Panics when an operand is too short.
pub fn mask_grad(pool: &ThreadPool, bits: &[u8], dy: &[f32], dx: &mut [f32]) {
    let len = dx.len();
    assert!(
        bits.len() >= len.div_ceil(8) && dy.len() >= len,
        "operands are shorter than the result of {len}"
    );
    let out = Shareable(dx.as_mut_ptr());
    over_chunks(pool, len, &|first, n| {
        let (bits, dy) = (bits[first / 8..].as_ptr(), dy[first..].as_ptr());
        dispatch(pool.isa(), Masked { bits, dy, dx: out.get().wrapping_add(first), n });
    });
}
