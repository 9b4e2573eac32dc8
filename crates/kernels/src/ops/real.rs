//! The floating-point element types, as kernels that are generic over them see them.

use half::{bf16, f16};
use lightering_units::Element;

/// A floating-point element type.
pub trait Real: Element + Copy {
    /// Widened; exact but for `f64`.
    fn to_f32(self) -> f32;
    /// Rounded to this type.
    fn from_f32(value: f32) -> Self;
    /// Widened, exact.
    fn to_f64(self) -> f64;
    /// Rounded to this type.
    fn from_f64(value: f64) -> Self;
}

macro_rules! real {
    ($t:ty, $to32:expr, $from32:expr, $to64:expr, $from64:expr) => {
        impl Real for $t {
            #[inline(always)]
            fn to_f32(self) -> f32 {
                $to32(self)
            }
            #[inline(always)]
            fn from_f32(value: f32) -> Self {
                $from32(value)
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                $to64(self)
            }
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                $from64(value)
            }
        }
    };
}
real!(f32, |x| x, |x| x, f64::from, |x| x as f32);
real!(f64, |x| x as f32, f64::from, |x| x, |x| x);
real!(f16, f16::to_f32, f16::from_f32, f16::to_f64, f16::from_f64);
real!(bf16, bf16::to_f32, bf16::from_f32, bf16::to_f64, bf16::from_f64);

/// `to[i] = from[i]`, widened to `f32`.
pub fn widen<T: Real>(from: &[T], to: &mut [f32]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = from.to_f32();
    }
}

/// `to[i] = from[i]`, rounded to `T`.
pub fn narrow<T: Real>(from: &[f32], to: &mut [T]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = T::from_f32(from);
    }
}
