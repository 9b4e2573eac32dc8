//! Element by element.

use crate::ThreadPool;
use crate::ops::Unary;
use crate::ops::real::Real;
use crate::ops::rows::parallel_rows;

/// Whether [`derivative`] takes the result of the operator rather than its operand.
pub fn saves_result(op: Unary) -> bool {
    matches!(
        op,
        Unary::Relu
            | Unary::ClipTo { .. }
            | Unary::LeakyRelu { .. }
            | Unary::Sigmoid
            | Unary::Tanh
            | Unary::Exp
            | Unary::Sqrt
            | Unary::Rsqrt
            | Unary::Reciprocal
    )
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn when(condition: bool, value: f64) -> f64 {
    if condition { value } else { 0.0 }
}

/// The derivative of `op`, from its result if [`saves_result`], else from its operand. At kinks it is that of one side:
/// for results at a bound, zero.
pub fn derivative(op: Unary, saved: f64) -> f64 {
    let v = saved;
    match op {
        Unary::Abs => when(v != 0.0, v.signum()),
        Unary::Acos => -1.0 / (1.0 - v * v).sqrt(),
        Unary::Acosh => 1.0 / (v * v - 1.0).sqrt(),
        Unary::Asin => 1.0 / (1.0 - v * v).sqrt(),
        Unary::Asinh => 1.0 / (v * v + 1.0).sqrt(),
        Unary::Atan => 1.0 / (1.0 + v * v),
        Unary::Atanh => 1.0 / (1.0 - v * v),
        Unary::Celu { alpha } => {
            if v > 0.0 {
                1.0
            } else {
                (v / f64::from(alpha)).exp()
            }
        }
        Unary::ClipTo { min, max } => when(v > f64::from(min) && v < f64::from(max), 1.0),
        Unary::Cos => -v.sin(),
        Unary::Cosh => v.sinh(),
        Unary::Elu { alpha } => {
            if v < 0.0 {
                f64::from(alpha) * v.exp()
            } else {
                1.0
            }
        }
        Unary::Erf => 2.0 / std::f64::consts::PI.sqrt() * (-v * v).exp(),
        Unary::Exp => v,
        Unary::Gelu { tanh: false } => {
            let below = 0.5 * (1.0 + libm::erf(v * std::f64::consts::FRAC_1_SQRT_2));
            below + v * (-0.5 * v * v).exp() / (2.0 * std::f64::consts::PI).sqrt()
        }
        Unary::Gelu { tanh: true } => {
            let c = (2.0 / std::f64::consts::PI).sqrt();
            let t = (c * (v + 0.044715 * v * v * v)).tanh();
            0.5 * (1.0 + t) + 0.5 * v * (1.0 - t * t) * c * (1.0 + 3.0 * 0.044715 * v * v)
        }
        Unary::HardSigmoid { alpha, beta } => {
            let (alpha, beta) = (f64::from(alpha), f64::from(beta));
            let y = alpha * v + beta;
            when(y > 0.0 && y < 1.0, alpha)
        }
        Unary::HardSwish => {
            if v >= 3.0 {
                1.0
            } else {
                when(v > -3.0, v / 3.0 + 0.5)
            }
        }
        Unary::Identity => 1.0,
        Unary::LeakyRelu { alpha } => {
            if v < 0.0 {
                f64::from(alpha)
            } else {
                1.0
            }
        }
        Unary::Log => 1.0 / v,
        Unary::Mish => {
            let t = (v.max(0.0) + (-v.abs()).exp().ln_1p()).tanh();
            t + v * (1.0 - t * t) * sigmoid(v)
        }
        Unary::Neg => -1.0,
        Unary::Reciprocal => -v * v,
        Unary::Relu => when(v > 0.0, 1.0),
        Unary::Rsqrt => -0.5 * v * v * v,
        Unary::Selu { alpha, gamma } => {
            let (alpha, gamma) = (f64::from(alpha), f64::from(gamma));
            if v > 0.0 { gamma } else { gamma * alpha * v.exp() }
        }
        Unary::Shrink { lambd, .. } => when(v.abs() > f64::from(lambd), 1.0),
        Unary::Sigmoid => v * (1.0 - v),
        Unary::Sin => v.cos(),
        Unary::Sinh => v.cosh(),
        Unary::Softplus => sigmoid(v),
        Unary::Softsign => {
            let d = 1.0 + v.abs();
            1.0 / (d * d)
        }
        Unary::Sqrt => 0.5 / v,
        Unary::Swish { alpha } => {
            let alpha = f64::from(alpha);
            let s = sigmoid(alpha * v);
            s + alpha * v * s * (1.0 - s)
        }
        Unary::Tan => {
            let t = v.tan();
            1.0 + t * t
        }
        Unary::Tanh => 1.0 - v * v,
        Unary::ThresholdedRelu { alpha } => when(v > f64::from(alpha), 1.0),
        Unary::BitwiseNot
        | Unary::Ceil
        | Unary::Floor
        | Unary::IsInf { .. }
        | Unary::IsNan
        | Unary::Not
        | Unary::Round
        | Unary::Sign => 0.0,
    }
}

/// Elements per task.
const STRETCH: usize = 16 << 10;

/// `dx = derivative(op, saved) · dy`; see [`derivative`] for what is saved.
pub fn unary_grad<T: Real>(pool: &ThreadPool, op: Unary, saved: &[T], dy: &[T], dx: &mut [T]) {
    parallel_rows(pool, dx, 1, STRETCH, &|first, dx| {
        for ((out, s), g) in dx.iter_mut().zip(&saved[first..]).zip(&dy[first..]) {
            // Where nothing passes, an infinite slope or gradient does not either.
            let g = g.to_f64();
            *out = T::from_f64(if g == 0.0 { 0.0 } else { derivative(op, s.to_f64()) * g });
        }
    });
}

/// Which elements a mask lets through.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ElementRule {
    /// Elements above a threshold.
    Above(f32),
    /// Elements strictly between two bounds.
    Between(f32, f32),
}

impl ElementRule {
    /// Whether an element passes.
    pub fn holds(self, v: f64) -> bool {
        match self {
            ElementRule::Above(t) => v > f64::from(t),
            ElementRule::Between(low, high) => v > f64::from(low) && v < f64::from(high),
        }
    }
}

/// One bit per element, the first in the lowest bit of the first byte.
pub fn sign_mask<T: Real>(pool: &ThreadPool, rule: ElementRule, x: &[T], bits: &mut [u8]) {
    parallel_rows(pool, bits, 1, STRETCH / 8, &|first, bits| {
        for (i, byte) in bits.iter_mut().enumerate() {
            let from = (first + i) * 8;
            let part = &x[from.min(x.len())..(from + 8).min(x.len())];
            *byte = part
                .iter()
                .enumerate()
                .fold(0, |byte, (bit, v)| byte | u8::from(rule.holds(v.to_f64())) << bit);
        }
    });
}

/// `dx = dy` where the bit is set, else 0.
pub fn mask_grad<T: Real>(pool: &ThreadPool, bits: &[u8], dy: &[T], dx: &mut [T]) {
    parallel_rows(pool, dx, 1, STRETCH, &|first, dx| {
        for (i, (out, &g)) in dx.iter_mut().zip(&dy[first..]).enumerate() {
            let at = first + i;
            *out = if bits[at / 8] >> (at % 8) & 1 == 1 { g } else { T::from_f64(0.0) };
        }
    });
}
