//! What a matrix product or convolution does to its results before they leave the registers or the first-level
//! cache: bias, residual, activation.

use crate::arch::{Kernel, Simd, dispatch};
use crate::math;
use crate::threads::{Shareable, ThreadPool};

/// A function of one value, applied elementwise. NaN stays NaN.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Activation {
    /// `x`
    #[default]
    None,
    /// `max(x, 0)`
    Relu,
    /// `min(max(x, min), max)`; ReLU6 is `Clip { min: 0.0, max: 6.0 }`.
    Clip {
        /// Lower bound.
        min: f32,
        /// Upper bound.
        max: f32,
    },
    /// `x * clip(x / 6 + 1/2, 0, 1)`
    HardSwish,
    /// `clip(alpha x + beta, 0, 1)`
    HardSigmoid {
        /// Slope.
        alpha: f32,
        /// Offset.
        beta: f32,
    },
    /// `1 / (1 + e^-x)`
    Sigmoid,
    /// `x / (1 + e^-x)`, also called Swish.
    Silu,
    /// `x (1 + erf(x / sqrt 2)) / 2`
    Gelu,
    /// `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`
    GeluTanh,
    /// `x < 0 ? slope x : x`
    LeakyRelu {
        /// Slope below zero.
        slope: f32,
    },
    /// `x < 0 ? alpha (e^x - 1) : x`
    Elu {
        /// Scale below zero.
        alpha: f32,
    },
    /// `tanh x`
    Tanh,
    /// `erf x`
    Erf,
    /// `e^x`
    Exp,
    /// `sqrt x`
    Sqrt,
    /// `|x|`
    Abs,
    /// `-x`
    Neg,
}

impl Activation {
    /// Bounds of the clamp that the register tile applies, and whether a second pass must follow.
    pub(crate) fn split(self) -> (f32, f32, bool) {
        match self {
            Activation::None => (f32::NEG_INFINITY, f32::INFINITY, false),
            Activation::Relu => (0.0, f32::INFINITY, false),
            Activation::Clip { min, max } => (min, max, false),
            _ => (f32::NEG_INFINITY, f32::INFINITY, true),
        }
    }

    /// The value for one scalar in the system's mathematics: the reference of the vector version.
    pub fn reference(self, x: f32) -> f32 {
        let y = f64::from(x);
        match self {
            Activation::None => x,
            Activation::Relu => {
                if x < 0.0 {
                    0.0
                } else {
                    x
                }
            }
            Activation::Clip { min, max } => {
                let x = if x < min { min } else { x };
                if x > max { max } else { x }
            }
            Activation::HardSwish => {
                let g = x / 6.0 + 0.5;
                x * if g.is_nan() { g } else { g.clamp(0.0, 1.0) }
            }
            Activation::HardSigmoid { alpha, beta } => {
                let g = alpha * x + beta;
                if g.is_nan() { g } else { g.clamp(0.0, 1.0) }
            }
            Activation::Sigmoid => (1.0 / (1.0 + (-y).exp())) as f32,
            Activation::Silu => (y / (1.0 + (-y).exp())) as f32,
            Activation::Gelu => (0.5 * y * (1.0 + erf_reference(y * std::f64::consts::FRAC_1_SQRT_2))) as f32,
            Activation::GeluTanh => {
                let t = (2.0 / std::f64::consts::PI).sqrt() * (y + 0.044715 * y * y * y);
                (0.5 * y * (1.0 + t.tanh())) as f32
            }
            Activation::LeakyRelu { slope } => {
                if x < 0.0 {
                    slope * x
                } else {
                    x
                }
            }
            Activation::Elu { alpha } => {
                if x < 0.0 {
                    (f64::from(alpha) * y.exp_m1()) as f32
                } else {
                    x
                }
            }
            Activation::Tanh => y.tanh() as f32,
            Activation::Erf => erf_reference(y) as f32,
            Activation::Exp => y.exp() as f32,
            Activation::Sqrt => x.sqrt(),
            Activation::Abs => x.abs(),
            Activation::Neg => -x,
        }
    }
}

/// The error function independently of the vector polynomial: Maclaurin series near zero, continued fraction of
/// the complement beyond, where the series cancels.
fn erf_reference(x: f64) -> f64 {
    if x.is_nan() {
        return x;
    }
    if x.abs() > 2.0 {
        let t = x.abs();
        let fraction = (1..80).rev().fold(t, |f, n| t + f64::from(n) * 0.5 / f);
        return ((1.0 - (-t * t).exp() / (fraction * std::f64::consts::PI.sqrt())).min(1.0)).copysign(x);
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..60 {
        let n = f64::from(n);
        term *= -x * x / n;
        sum += term / (2.0 * n + 1.0);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

/// Another tensor of the output's shape that is added before the activation.
#[derive(Clone, Copy, Debug)]
pub struct Residual<'a> {
    /// Row `i` starts at `data[i * stride]`; row 0 belongs to the first output row of this call.
    pub data: &'a [f32],
    /// Distance between rows, at least the number of columns.
    pub stride: usize,
}

/// `activation(product + bias + residual)`
#[derive(Clone, Copy, Debug, Default)]
pub struct Epilogue<'a> {
    /// One value per column (output channel).
    pub bias: Option<&'a [f32]>,
    /// Added row by row.
    pub residual: Option<Residual<'a>>,
    /// Applied last.
    pub activation: Activation,
}

impl Epilogue<'_> {
    /// Leaves the product as it is.
    pub const NONE: Epilogue<'static> = Epilogue { bias: None, residual: None, activation: Activation::None };

    pub(crate) fn check(&self, rows: usize, columns: usize) {
        if let Some(bias) = self.bias {
            assert!(bias.len() >= columns, "bias has {} values for {columns} columns", bias.len());
        }
        if let Some(residual) = self.residual {
            check_rows("residual", residual.data.len(), rows, columns, residual.stride);
        }
    }
}

/// Asserts that `rows` rows of `columns` values at `stride` fit into a slice of `len` values.
#[track_caller]
pub(crate) fn check_rows(what: &str, len: usize, rows: usize, columns: usize, stride: usize) {
    assert!(stride >= columns || rows <= 1, "{what}: row stride {stride} is below the row length {columns}");
    let need = if rows == 0 || columns == 0 { 0 } else { (rows - 1) * stride + columns };
    assert!(
        len >= need,
        "{what}: {len} values, {need} needed for {rows} rows of {columns} at stride {stride}"
    );
}

#[inline(always)]
pub(crate) fn activate_vector<S: Simd>(s: S, activation: Activation, x: S::F) -> S::F {
    let (zero, half, one) = (s.splat(0.0), s.splat(0.5), s.splat(1.0));
    match activation {
        Activation::None => x,
        Activation::Relu => s.max(zero, x),
        Activation::Clip { min, max } => s.min(s.splat(max), s.max(s.splat(min), x)),
        Activation::HardSwish => {
            let g = s.fma(x, s.splat(1.0 / 6.0), half);
            s.mul(x, s.min(one, s.max(zero, g)))
        }
        Activation::HardSigmoid { alpha, beta } => {
            s.min(one, s.max(zero, s.fma(x, s.splat(alpha), s.splat(beta))))
        }
        Activation::Sigmoid => math::scaled_sigmoid(s, x, one),
        Activation::Silu => math::scaled_sigmoid(s, x, x),
        Activation::Gelu => {
            let e = math::erf(s, s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2)));
            let h = s.mul(x, half);
            s.fma(h, e, h)
        }
        Activation::GeluTanh => {
            let x2 = s.mul(x, x);
            let inner = s.mul(x, s.fma(x2, s.splat(0.044715 * 0.797_884_6), s.splat(0.797_884_6)));
            let h = s.mul(x, half);
            s.fma(h, math::tanh(s, inner), h)
        }
        Activation::LeakyRelu { slope } => s.select(s.lt(x, zero), s.mul(x, s.splat(slope)), x),
        Activation::Elu { alpha } => s.select(s.lt(x, zero), s.mul(math::expm1(s, x), s.splat(alpha)), x),
        Activation::Tanh => math::tanh(s, x),
        Activation::Erf => math::erf(s, x),
        Activation::Exp => math::exp(s, x),
        Activation::Sqrt => s.sqrt(x),
        Activation::Abs => s.abs(x),
        Activation::Neg => s.sub(s.splat(-0.0), x),
    }
}

/// Applies `activation` to `rows` rows of `n` values in place.
pub(crate) struct ActivateRows {
    pub(crate) activation: Activation,
    pub(crate) data: *mut f32,
    pub(crate) rows: usize,
    pub(crate) n: usize,
    pub(crate) stride: usize,
}

impl Kernel for ActivateRows {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // One loop per variant, so that the choice is made once and not per vector.
        macro_rules! arms {
            ($($pattern:pat => $act:expr),* $(,)?) => {
                match self.activation {
                    $($pattern => {
                        for row in 0..self.rows {
                            // SAFETY: who builds the kernel vouches for `rows` rows of `n` values.
                            unsafe {
                                let p = self.data.add(row * self.stride);
                                let mut i = 0;
                                while i + S::LANES <= self.n {
                                    s.store(p.add(i), activate_vector(s, $act, s.load(p.add(i))));
                                    i += S::LANES;
                                }
                                if i < self.n {
                                    let rest = self.n - i;
                                    let y = activate_vector(s, $act, s.load_n(p.add(i), rest));
                                    s.store_n(p.add(i), rest, y);
                                }
                            }
                        }
                    })*
                }
            };
        }
        arms! {
            Activation::None => Activation::None,
            Activation::Relu => Activation::Relu,
            Activation::Clip { min, max } => Activation::Clip { min, max },
            Activation::HardSwish => Activation::HardSwish,
            Activation::HardSigmoid { alpha, beta } => Activation::HardSigmoid { alpha, beta },
            Activation::Sigmoid => Activation::Sigmoid,
            Activation::Silu => Activation::Silu,
            Activation::Gelu => Activation::Gelu,
            Activation::GeluTanh => Activation::GeluTanh,
            Activation::LeakyRelu { slope } => Activation::LeakyRelu { slope },
            Activation::Elu { alpha } => Activation::Elu { alpha },
            Activation::Tanh => Activation::Tanh,
            Activation::Erf => Activation::Erf,
            Activation::Exp => Activation::Exp,
            Activation::Sqrt => Activation::Sqrt,
            Activation::Abs => Activation::Abs,
            Activation::Neg => Activation::Neg,
        }
    }
}

/// Applies `activation` to every value of `data`, in place.
pub fn activate(pool: &ThreadPool, activation: Activation, data: &mut [f32]) {
    const CHUNK: usize = 16 << 10;
    let len = data.len();
    let base = Shareable(data.as_mut_ptr());
    let chunk = if pool.threads() == 1 { len.max(1) } else { CHUNK };
    pool.parallel_for(len.div_ceil(chunk), &|index, _| {
        let start = index * chunk;
        // SAFETY: tasks touch disjoint chunks inside the slice.
        let data = unsafe { base.get().add(start) };
        let n = chunk.min(len - start);
        dispatch(pool.isa(), ActivateRows { activation, data, rows: 1, n, stride: n });
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Isa;

    pub(crate) const ALL: [Activation; 17] = [
        Activation::None,
        Activation::Relu,
        Activation::Clip { min: -1.0, max: 6.0 },
        Activation::HardSwish,
        Activation::HardSigmoid { alpha: 0.2, beta: 0.5 },
        Activation::Sigmoid,
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::LeakyRelu { slope: 0.1 },
        Activation::Elu { alpha: 1.5 },
        Activation::Tanh,
        Activation::Erf,
        Activation::Exp,
        Activation::Sqrt,
        Activation::Abs,
        Activation::Neg,
    ];

    #[test]
    fn vector_functions_agree_with_the_systems() {
        let mut xs: Vec<f32> = (-4000..4000).map(|i| i as f32 * 0.0251).collect();
        xs.extend((1..2000).flat_map(|i| [i as f32 * 1e-4, i as f32 * -1e-4]));
        xs.extend([0.0, 1e-40, -1e-40, 1e-30, -1e-30, 87.9, -87.9]);
        for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
            let pool = ThreadPool::with_isa(1, isa);
            for activation in ALL {
                let mut ys = xs.clone();
                activate(&pool, activation, &mut ys);
                for (&x, &y) in xs.iter().zip(&ys) {
                    let want = activation.reference(x);
                    // Gelu and its kin lose relative accuracy where 1 + erf cancels; there the absolute error counts.
                    let floor = match activation {
                        Activation::Gelu | Activation::GeluTanh => 4e-7,
                        Activation::HardSwish | Activation::HardSigmoid { .. } => 1e-6,
                        _ => 1e-37,
                    };
                    let close = (y - want).abs() <= 1e-6 * want.abs() + floor;
                    assert!(
                        close || y == want || (y.is_nan() && want.is_nan()),
                        "{isa:?} {activation:?}({x}) = {y}, not {want}"
                    );
                }
            }
        }
    }

    #[test]
    fn nan_and_infinity_pass() {
        for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
            let pool = ThreadPool::with_isa(1, isa);
            for activation in ALL {
                let mut x = [f32::NAN, 1.0, f32::NAN];
                activate(&pool, activation, &mut x);
                assert!(x[0].is_nan() && x[2].is_nan() && !x[1].is_nan(), "{isa:?} {activation:?}: {x:?}");
            }
            let mut x = [f32::NEG_INFINITY, f32::INFINITY];
            activate(&pool, Activation::Exp, &mut x);
            assert_eq!(x, [0.0, f32::INFINITY]);
            let mut x = [f32::NEG_INFINITY, f32::INFINITY];
            activate(&pool, Activation::Erf, &mut x);
            assert_eq!(x, [-1.0, 1.0]);
        }
    }
}
