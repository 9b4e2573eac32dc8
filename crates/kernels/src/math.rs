//! Elementary functions on vectors: relative error below 1e-6, NaN passes through.

use crate::arch::Simd;

/// `x = n ln 2 + r`; returns `(n, e^r - 1)`. Polynomial of Cephes `expf` (Moshier, 1984).
#[inline(always)]
fn reduced<S: Simd>(s: S, x: S::F) -> (S::F, S::F) {
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-0.693_359_4), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut q = s.splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        q = s.fma(q, r, s.splat(c));
    }
    (n, s.fma(s.mul(r, r), q, r))
}

/// `e^x`
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.min(s.splat(89.0), s.max(s.splat(-104.0), x));
    let (n, q) = reduced(s, x);
    s.scale(s.add(q, s.splat(1.0)), n)
}

/// `e^x - 1`
#[inline(always)]
pub(crate) fn expm1<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.min(s.splat(89.0), s.max(s.splat(-30.0), x));
    let (n, q) = reduced(s, x);
    // 2^128 is no f32, so one factor of two is taken last.
    let p = s.scale(s.splat(0.5), n);
    let half = s.fma(p, q, s.sub(p, s.splat(0.5)));
    s.add(half, half)
}

/// `tanh x`
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::F) -> S::F {
    let y = s.min(s.splat(10.0), s.max(s.splat(-10.0), x));
    let e = expm1(s, s.add(y, y));
    s.div(e, s.add(e, s.splat(2.0)))
}

/// `scale / (1 + e^-x)`
#[inline(always)]
pub(crate) fn scaled_sigmoid<S: Simd>(s: S, x: S::F, scale: S::F) -> S::F {
    // The exponent is never positive, so nothing overflows.
    let e = exp(s, s.sub(s.splat(0.0), s.abs(x)));
    let top = s.select(s.lt(x, s.splat(0.0)), e, s.splat(1.0));
    s.div(s.mul(top, scale), s.add(e, s.splat(1.0)))
}

/// The error function; two polynomials joined at 475/512 (after N. Juffa, 2016).
#[inline(always)]
pub(crate) fn erf<S: Simd>(s: S, x: S::F) -> S::F {
    let t = s.abs(x);
    let s2 = s.mul(x, x);
    let r = s.fma(s.splat(-1.728_534_7e-5), t, s.splat(3.831_972e-4));
    let u = s.fma(s.splat(-3.883_964_4e-3), t, s.splat(2.425_462_2e-2));
    let mut r = s.fma(r, s2, u);
    for c in [-1.067_778_8e-1, -6.348_467e-1, -1.287_175_1e-1] {
        r = s.fma(r, t, s.splat(c));
    }
    r = s.fma(r, t, s.sub(s.splat(0.0), t));
    let large = s.copysign(s.sub(s.splat(1.0), exp(s, r)), x);
    let mut q = s.splat(-5.967_617e-4);
    for c in [4.991_194_2e-3, -2.676_813_5e-2, 1.128_199_25e-1, -3.761_253_3e-1, 1.283_791_7e-1] {
        q = s.fma(q, s2, s.splat(c));
    }
    let small = s.fma(q, x, x);
    // Beyond 4 the polynomial in the exponent would overflow to the wrong side; erf is 1 there.
    let one = s.copysign(s.splat(1.0), x);
    let large = s.select(s.lt(s.splat(4.0), t), one, large);
    s.select(s.lt(s.splat(475.0 / 512.0), t), large, small)
}
