//! One operand, element by element.

use lightering_units::DType;

use super::block::{BLOCK, Class, Compute, class, for_blocks, parallel_parts};
use super::{OpError, TensorView, TensorViewMut, expect_same_count};
use crate::{Activation, ThreadPool, activate};

/// A function of one number. Names and formulas are those of ONNX.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unary {
    Abs,
    Acos,
    Acosh,
    Asin,
    Asinh,
    Atan,
    Atanh,
    BitwiseNot,
    Ceil,
    Celu { alpha: f32 },
    ClipTo { min: f32, max: f32 },
    Cos,
    Cosh,
    Elu { alpha: f32 },
    Erf,
    Exp,
    Floor,
    Gelu { tanh: bool },
    HardSigmoid { alpha: f32, beta: f32 },
    HardSwish,
    Identity,
    IsInf { negative: bool, positive: bool },
    IsNan,
    LeakyRelu { alpha: f32 },
    Log,
    Mish,
    Neg,
    Not,
    Reciprocal,
    Relu,
    Round,
    Rsqrt,
    Selu { alpha: f32, gamma: f32 },
    Shrink { bias: f32, lambd: f32 },
    Sigmoid,
    Sign,
    Sin,
    Sinh,
    Softplus,
    Softsign,
    Sqrt,
    Swish { alpha: f32 },
    Tan,
    Tanh,
    ThresholdedRelu { alpha: f32 },
}

impl Unary {
    /// The vectorised function that computes the same, if there is one.
    pub fn activation(self) -> Option<Activation> {
        Some(match self {
            Unary::Relu => Activation::Relu,
            Unary::ClipTo { min, max } => Activation::Clip { min, max },
            Unary::HardSwish => Activation::HardSwish,
            Unary::HardSigmoid { alpha, beta } => Activation::HardSigmoid { alpha, beta },
            Unary::Sigmoid => Activation::Sigmoid,
            Unary::Swish { alpha: 1.0 } => Activation::Silu,
            Unary::Gelu { tanh: false } => Activation::Gelu,
            Unary::Gelu { tanh: true } => Activation::GeluTanh,
            Unary::LeakyRelu { alpha } => Activation::LeakyRelu { slope: alpha },
            Unary::Elu { alpha } => Activation::Elu { alpha },
            Unary::Tanh => Activation::Tanh,
            Unary::Erf => Activation::Erf,
            Unary::Exp => Activation::Exp,
            Unary::Sqrt => Activation::Sqrt,
            Unary::Abs => Activation::Abs,
            Unary::Neg => Activation::Neg,
            _ => return None,
        })
    }
}

fn each<T: Copy>(values: &mut [T], f: impl Fn(T) -> T) {
    values.iter_mut().for_each(|v| *v = f(*v));
}

macro_rules! float_unary {
    ($name:ident, $t:ident, $erf:path) => {
        /// Applies `op` in place. Functions with a bool result give 0 and 1.
        pub fn $name(op: Unary, v: &mut [$t]) {
            let softplus = |x: $t| x.max(0.0) + (-x.abs()).exp().ln_1p();
            match op {
                Unary::Identity => {}
                Unary::Abs => each(v, |x| x.abs()),
                Unary::Acos => each(v, |x| x.acos()),
                Unary::Acosh => each(v, |x| x.acosh()),
                Unary::Asin => each(v, |x| x.asin()),
                Unary::Asinh => each(v, |x| x.asinh()),
                Unary::Atan => each(v, |x| x.atan()),
                Unary::Atanh => each(v, |x| x.atanh()),
                Unary::Ceil => each(v, |x| x.ceil()),
                Unary::Celu { alpha } => {
                    let a = alpha as $t;
                    each(v, |x| if x > 0.0 { x } else { a * (x / a).exp_m1() })
                }
                Unary::ClipTo { min, max } => {
                    let (min, max) = (min as $t, max as $t);
                    each(v, |x| {
                        let x = if x < min { min } else { x };
                        if x > max { max } else { x }
                    })
                }
                Unary::Cos => each(v, |x| x.cos()),
                Unary::Cosh => each(v, |x| x.cosh()),
                Unary::Elu { alpha } => each(v, |x| if x < 0.0 { alpha as $t * x.exp_m1() } else { x }),
                Unary::Erf => each(v, $erf),
                Unary::Exp => each(v, |x| x.exp()),
                Unary::Floor => each(v, |x| x.floor()),
                Unary::Gelu { tanh: false } => {
                    each(v, |x| 0.5 * x * (1.0 + $erf(x * std::$t::consts::FRAC_1_SQRT_2)))
                }
                Unary::Gelu { tanh: true } => {
                    let c = (2.0 / std::$t::consts::PI).sqrt();
                    each(v, |x| 0.5 * x * (1.0 + (c * (x + 0.044715 * x * x * x)).tanh()))
                }
                Unary::HardSigmoid { alpha, beta } => {
                    each(v, |x| (alpha as $t * x + beta as $t).clamp(0.0, 1.0))
                }
                Unary::HardSwish => each(v, |x| x * (x / 6.0 + 0.5).clamp(0.0, 1.0)),
                Unary::IsInf { negative, positive } => each(v, |x| {
                    let hit = (negative && x == $t::NEG_INFINITY) || (positive && x == $t::INFINITY);
                    if hit { 1.0 } else { 0.0 }
                }),
                Unary::IsNan => each(v, |x| if x.is_nan() { 1.0 } else { 0.0 }),
                Unary::LeakyRelu { alpha } => each(v, |x| if x < 0.0 { alpha as $t * x } else { x }),
                Unary::Log => each(v, |x| x.ln()),
                Unary::Mish => each(v, |x| x * softplus(x).tanh()),
                Unary::Neg => each(v, |x| -x),
                Unary::Not => each(v, |x| if x == 0.0 { 1.0 } else { 0.0 }),
                Unary::Reciprocal => each(v, |x| 1.0 / x),
                Unary::Relu => each(v, |x| if x < 0.0 { 0.0 } else { x }),
                Unary::Round => each(v, |x| x.round_ties_even()),
                Unary::Rsqrt => each(v, |x| 1.0 / x.sqrt()),
                Unary::Selu { alpha, gamma } => {
                    let (a, g) = (alpha as $t, gamma as $t);
                    each(v, |x| if x > 0.0 { g * x } else { g * a * x.exp_m1() })
                }
                Unary::Shrink { bias, lambd } => {
                    let (b, l) = (bias as $t, lambd as $t);
                    each(v, |x| {
                        if x < -l {
                            x + b
                        } else if x > l {
                            x - b
                        } else if x.is_nan() {
                            x
                        } else {
                            0.0
                        }
                    })
                }
                Unary::Sigmoid => each(v, |x| 1.0 / (1.0 + (-x).exp())),
                Unary::Sign => each(v, |x| {
                    if x > 0.0 {
                        1.0
                    } else if x < 0.0 {
                        -1.0
                    } else {
                        x
                    }
                }),
                Unary::Sin => each(v, |x| x.sin()),
                Unary::Sinh => each(v, |x| x.sinh()),
                Unary::Softplus => each(v, softplus),
                Unary::Softsign => each(v, |x| x / (1.0 + x.abs())),
                Unary::Sqrt => each(v, |x| x.sqrt()),
                Unary::Swish { alpha } => each(v, |x| x / (1.0 + (-(alpha as $t) * x).exp())),
                Unary::Tan => each(v, |x| x.tan()),
                Unary::Tanh => each(v, |x| x.tanh()),
                Unary::ThresholdedRelu { alpha } => {
                    each(v, |x| if x > alpha as $t || x.is_nan() { x } else { 0.0 })
                }
                // Refused before any block is computed.
                Unary::BitwiseNot => {}
            }
        }
    };
}
float_unary!(unary_f32, f32, libm::erff);
float_unary!(unary_f64, f64, libm::erf);

/// Applies `op` to integers in place; `false` when the operator is not defined on them.
fn unary_i64(op: Unary, v: &mut [i64]) -> bool {
    match op {
        Unary::Identity => {}
        Unary::Abs => each(v, i64::wrapping_abs),
        Unary::Neg => each(v, i64::wrapping_neg),
        Unary::Sign => each(v, i64::signum),
        Unary::Relu => each(v, |x| x.max(0)),
        Unary::BitwiseNot => each(v, |x| !x),
        Unary::Ceil | Unary::Floor | Unary::Round => {}
        Unary::LeakyRelu { alpha } => {
            each(v, |x| if x < 0 { (x as f64 * f64::from(alpha)) as i64 } else { x })
        }
        Unary::ClipTo { min, max } => each(v, |x| {
            let x = if (x as f64) < f64::from(min) { min as i64 } else { x };
            if x as f64 > f64::from(max) { max as i64 } else { x }
        }),
        Unary::Shrink { bias, lambd } => each(v, |x| {
            let mut f = [x as f64];
            unary_f64(Unary::Shrink { bias, lambd }, &mut f);
            f[0] as i64
        }),
        _ => return false,
    }
    true
}

/// As [`unary_i64`], for unsigned integers and bool.
fn unary_u64(op: Unary, v: &mut [u64]) -> bool {
    match op {
        Unary::Identity | Unary::Abs | Unary::Relu | Unary::Ceil | Unary::Floor | Unary::Round => {}
        Unary::Sign => each(v, |x| x.min(1)),
        Unary::Not => each(v, |x| u64::from(x == 0)),
        Unary::BitwiseNot => each(v, |x| !x),
        Unary::ClipTo { min, max } => each(v, |x| {
            let x = if (x as f64) < f64::from(min) { min as u64 } else { x };
            if x as f64 > f64::from(max) { max as u64 } else { x }
        }),
        Unary::Shrink { bias, lambd } => each(v, |x| {
            let mut f = [x as f64];
            unary_f64(Unary::Shrink { bias, lambd }, &mut f);
            f[0] as u64
        }),
        _ => return false,
    }
    true
}

/// A compute type that unary operators are defined on.
pub(crate) trait UnaryCompute: Compute {
    /// Applies `op` in place; `false` when it is not defined on this type.
    fn apply(op: Unary, values: &mut [Self]) -> bool;
}

impl UnaryCompute for f32 {
    fn apply(op: Unary, values: &mut [f32]) -> bool {
        unary_f32(op, values);
        op != Unary::BitwiseNot
    }
}
impl UnaryCompute for f64 {
    fn apply(op: Unary, values: &mut [f64]) -> bool {
        unary_f64(op, values);
        op != Unary::BitwiseNot
    }
}
impl UnaryCompute for i64 {
    fn apply(op: Unary, values: &mut [i64]) -> bool {
        unary_i64(op, values)
    }
}
impl UnaryCompute for u64 {
    fn apply(op: Unary, values: &mut [u64]) -> bool {
        unary_u64(op, values)
    }
}

fn blocks<C: UnaryCompute>(pool: &ThreadPool, op: Unary, x: &TensorView, y: &mut TensorViewMut) {
    let dtype = y.dtype;
    for_blocks(pool, y, &|start, bytes| {
        let mut buffer = [C::ZERO; BLOCK];
        let values = &mut buffer[..bytes.len() / dtype.size_bytes()];
        C::load(x.dtype, x.bytes, start, values);
        C::apply(op, values);
        C::store(dtype, values, bytes);
    });
}

/// Applies `op` to every element of `x`. The result type is that of `x`, or bool for predicates.
///
/// # Errors
/// [`OpError::Unsupported`] when the operator is not defined on the type.
pub fn unary(pool: &ThreadPool, op: Unary, x: &TensorView, y: &mut TensorViewMut) -> Result<(), OpError> {
    expect_same_count(x, y)?;
    if op == Unary::Identity || (op == Unary::Not && x.is_empty()) {
        y.bytes.copy_from_slice(x.bytes);
        return Ok(());
    }
    let undefined = || OpError::Unsupported(format!("{op:?} of {}", x.dtype));
    if x.dtype == DType::F32
        && let Some(activation) = op.activation()
    {
        y.bytes.copy_from_slice(x.bytes);
        activate(pool, activation, y.as_mut_slice());
        return Ok(());
    }
    let class = class(x.dtype).ok_or_else(undefined)?;
    // One element decides whether the operator is defined at all, so that blocks cannot fail.
    let defined = match class {
        Class::F32 => f32::apply(op, &mut [0.5]),
        Class::F64 => f64::apply(op, &mut [0.5]),
        Class::I64 => i64::apply(op, &mut [1]),
        Class::U64 => u64::apply(op, &mut [1]),
    };
    if !defined {
        return Err(undefined());
    }
    match class {
        Class::F32 => blocks::<f32>(pool, op, x, y),
        Class::F64 => blocks::<f64>(pool, op, x, y),
        Class::I64 => blocks::<i64>(pool, op, x, y),
        Class::U64 => blocks::<u64>(pool, op, x, y),
    }
    Ok(())
}

/// Applies `op` to a float tensor in place, for activations that follow another operator.
///
/// # Errors
/// [`OpError::Unsupported`] when the type is no float.
pub fn activate_tensor(pool: &ThreadPool, op: Option<Unary>, y: &mut TensorViewMut) -> Result<(), OpError> {
    let Some(op) = op else { return Ok(()) };
    match (y.dtype, op.activation()) {
        (DType::F32, Some(activation)) => activate(pool, activation, y.as_mut_slice()),
        (DType::F32, None) => {
            parallel_parts::<f32>(pool, y.as_mut_slice(), 16 << 10, &|_, part| unary_f32(op, part))
        }
        (DType::F64, _) => {
            parallel_parts::<f64>(pool, y.as_mut_slice(), 16 << 10, &|_, part| unary_f64(op, part))
        }
        (DType::F16 | DType::BF16, _) => {
            let dtype = y.dtype;
            for_blocks(pool, y, &|_, bytes| {
                let mut buffer = [0f32; BLOCK];
                let values = &mut buffer[..bytes.len() / 2];
                f32::load(dtype, bytes, 0, values);
                unary_f32(op, values);
                f32::store(dtype, values, bytes);
            });
        }
        _ => return Err(OpError::Unsupported(format!("activation {op:?} of {}", y.dtype))),
    }
    Ok(())
}
