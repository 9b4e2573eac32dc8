//! Instruction sets: detection, capability tokens and the vector trait that kernel bodies are written against.
//!
//! A kernel is a type that implements [`Kernel`]; its `run` is generic over [`Simd`] and is compiled once per
//! instruction set by [`dispatch`]. A token such as [`Avx512`] can only be had from [`Avx512::detect`], so a
//! value of that type proves that the processor has the instructions.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod int8;
mod portable;

#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use avx512::Avx512;
pub(crate) use int8::{ByteKernel, Bytes, Requantization, dispatch_bytes, interleaved_column};
pub use portable::Portable;

use std::sync::OnceLock;

/// Instruction sets in ascending order of capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust; runs everywhere.
    Portable,
    /// 256-bit vectors with fused multiply-add.
    Avx2,
    /// 512-bit vectors (F, BW, DQ, VL).
    Avx512,
}

impl Isa {
    /// The name that `LIGHTER_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    /// The instruction set with this name, if there is one.
    pub fn from_name(name: &str) -> Option<Isa> {
        [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().find(|isa| isa.name() == name)
    }

    /// The best set of this processor.
    pub fn detected() -> Isa {
        #[cfg(target_arch = "x86_64")]
        {
            if Avx512::detect().is_some() {
                return Isa::Avx512;
            }
            if Avx2::detect().is_some() {
                return Isa::Avx2;
            }
        }
        Isa::Portable
    }

    /// The best set of this processor, capped by the environment variable `LIGHTER_ISA`
    /// (`portable`, `avx2` or `avx512`; other values are ignored). Read once per process.
    pub fn best() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            let cap = std::env::var("LIGHTER_ISA").ok().and_then(|name| Isa::from_name(&name));
            cap.map_or(Isa::detected(), |cap| cap.min(Isa::detected()))
        })
    }
}

/// A computation that is compiled once per instruction set.
pub trait Kernel {
    /// What the computation returns.
    type Output;
    /// The body; implementations are `#[inline(always)]` so that it takes on the caller's instruction set.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Runs `kernel` with the instruction set `isa`, or the best below it that this processor has.
#[inline]
pub fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if isa >= Isa::Avx512
            && let Some(token) = Avx512::detect()
        {
            return Simd::vectorize(token, kernel);
        }
        if isa >= Isa::Avx2
            && let Some(token) = Avx2::detect()
        {
            return Simd::vectorize(token, kernel);
        }
    }
    let _ = isa;
    Simd::vectorize(Portable, kernel)
}

/// Vectors of `LANES` f32 values and the operations that kernels need.
///
/// `min` and `max` return their *second* operand when either is NaN, as x86 does; kernels put the data second
/// so that NaN passes through.
pub trait Simd: Copy + Send + Sync + 'static {
    /// f32 values per vector.
    const LANES: usize;
    /// Widest register tile of the matrix kernel, in vectors.
    const TILE_VECTORS: usize;
    /// Tallest register tile of the matrix kernel for a width of 1, 2, 3 and 4 vectors.
    const TILE_ROWS: [usize; 4];
    /// A vector of f32.
    type F: Copy;
    /// A lane mask.
    type M: Copy;

    /// Runs `kernel` compiled for this instruction set.
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F;
    /// Loads `LANES` values.
    ///
    /// # Safety
    /// `p` is valid for reading `LANES` values; no alignment is needed.
    unsafe fn load(self, p: *const f32) -> Self::F;
    /// Loads `n <= LANES` values; the other lanes are zero.
    ///
    /// # Safety
    /// `p` is valid for reading `n` values.
    unsafe fn load_n(self, p: *const f32, n: usize) -> Self::F;
    /// Loads `LANES` values that are stored as f16.
    ///
    /// # Safety
    /// `p` is valid for reading `LANES` words; no alignment is needed.
    unsafe fn load_f16(self, p: *const u16) -> Self::F;
    /// Loads `LANES` values that are stored as i8.
    ///
    /// # Safety
    /// `p` is valid for reading `LANES` bytes.
    unsafe fn load_i8(self, p: *const i8) -> Self::F;
    /// Stores `LANES` values.
    ///
    /// # Safety
    /// `p` is valid for writing `LANES` values.
    unsafe fn store(self, p: *mut f32, v: Self::F);
    /// Stores the first `n <= LANES` values.
    ///
    /// # Safety
    /// `p` is valid for writing `n` values.
    unsafe fn store_n(self, p: *mut f32, n: usize, v: Self::F);

    /// `a + b`
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once where the instruction set can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a < b ? a : b`
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a > b ? a : b`
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// Square root.
    fn sqrt(self, a: Self::F) -> Self::F;
    /// Absolute value.
    fn abs(self, a: Self::F) -> Self::F;
    /// Magnitude of `a`, sign of `b`.
    fn copysign(self, a: Self::F, b: Self::F) -> Self::F;
    /// Nearest integer, half to even.
    fn round(self, a: Self::F) -> Self::F;
    /// Largest integer not above.
    fn floor(self, a: Self::F) -> Self::F;
    /// `a * 2^n` for integral `n` in `[-252, 252]`, with gradual underflow.
    fn scale(self, a: Self::F, n: Self::F) -> Self::F;
    /// `a < b`, false for NaN.
    fn lt(self, a: Self::F, b: Self::F) -> Self::M;
    /// `m ? a : b`
    fn select(self, m: Self::M, a: Self::F, b: Self::F) -> Self::F;
    /// The lanes of a mask as bits, the first in the lowest.
    fn bits(self, m: Self::M) -> u32;
    /// The mask whose lanes are these bits.
    fn mask(self, bits: u32) -> Self::M;
    /// Sum of the lanes, in a fixed order.
    fn sum(self, a: Self::F) -> f32;
    /// Maximum of the lanes; NaN lanes may be dropped.
    fn maximum(self, a: Self::F) -> f32;
    /// Hints that the cache line at `p` will be read; `p` may be any address.
    fn prefetch(self, p: *const f32);
}
