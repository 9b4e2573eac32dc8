//! Dot products of bytes, exact in i32.

use super::{Avx2, Isa, Portable, Simd};

/// A computation on bytes that is compiled once per instruction set.
pub(crate) trait ByteKernel {
    /// The body; implementations are `#[inline(always)]`.
    fn run<T: Bytes>(self, bytes: T);
}

/// Vectors of `LANES` i32 sums of products of four bytes each.
pub(crate) trait Bytes: Copy {
    /// Sums per vector.
    const LANES: usize;
    /// Widest register tile, in vectors.
    const TILE_VECTORS: usize;
    /// Tallest register tile for a width of 1, 2, 3 and 4 vectors.
    const TILE_ROWS: [usize; 4];
    /// The same set for f32.
    type Float: Simd;
    /// A vector of sums.
    type I: Copy;
    /// Four unsigned bytes, repeated.
    type A: Copy;
    /// `LANES` times four signed bytes.
    type W: Copy;

    /// Runs `kernel` compiled for this instruction set.
    fn vectorize<K: ByteKernel>(self, kernel: K);
    /// The token of the same set for f32.
    fn float(self) -> Self::Float;
    /// Zeros.
    fn zero(self) -> Self::I;
    /// Loads `LANES` sums.
    ///
    /// # Safety
    /// `p` is valid for reading `LANES` values.
    unsafe fn load(self, p: *const i32) -> Self::I;
    /// Stores `LANES` sums.
    ///
    /// # Safety
    /// `p` is valid for writing `LANES` values.
    unsafe fn store(self, p: *mut i32, v: Self::I);
    /// Repeats the four bytes of `quad`.
    fn repeat(self, quad: u32) -> Self::A;
    /// Loads `LANES` times four weights.
    ///
    /// # Safety
    /// `p` is valid for reading `4 * LANES` bytes.
    unsafe fn weights(self, p: *const i8) -> Self::W;
    /// Adds the products, without saturation.
    fn dot(self, sum: Self::I, a: Self::A, w: Self::W) -> Self::I;
}

/// Runs `kernel` with `isa`, or the best below it that this processor has.
pub(crate) fn dispatch_bytes<K: ByteKernel>(isa: Isa, kernel: K) {
    #[cfg(target_arch = "x86_64")]
    {
        if isa >= Isa::Avx512
            && let Some(token) = x86::Vnni::detect()
        {
            return Bytes::vectorize(token, kernel);
        }
        if isa >= Isa::Avx2
            && let Some(token) = Avx2::detect()
        {
            return Bytes::vectorize(token, kernel);
        }
    }
    let _ = isa;
    Bytes::vectorize(Portable, kernel);
}

impl Bytes for Portable {
    const LANES: usize = 8;
    const TILE_VECTORS: usize = 1;
    const TILE_ROWS: [usize; 4] = [4, 0, 0, 0];
    type Float = Portable;
    type I = [i32; 8];
    type A = [i32; 4];
    type W = [[i8; 4]; 8];

    #[inline(never)]
    fn vectorize<K: ByteKernel>(self, kernel: K) {
        kernel.run(self);
    }
    #[inline(always)]
    fn float(self) -> Portable {
        self
    }
    #[inline(always)]
    fn zero(self) -> [i32; 8] {
        [0; 8]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const i32) -> [i32; 8] {
        // SAFETY: by contract.
        unsafe { p.cast::<[i32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut i32, v: [i32; 8]) {
        // SAFETY: by contract.
        unsafe { p.cast::<[i32; 8]>().write_unaligned(v) }
    }
    #[inline(always)]
    fn repeat(self, quad: u32) -> [i32; 4] {
        quad.to_le_bytes().map(i32::from)
    }
    #[inline(always)]
    unsafe fn weights(self, p: *const i8) -> [[i8; 4]; 8] {
        // SAFETY: by contract; bytes need no alignment.
        unsafe { p.cast::<[[i8; 4]; 8]>().read_unaligned() }
    }
    #[inline(always)]
    fn dot(self, sum: [i32; 8], a: [i32; 4], w: [[i8; 4]; 8]) -> [i32; 8] {
        std::array::from_fn(|i| {
            let products: [i32; 4] = std::array::from_fn(|j| a[j] * i32::from(w[i][j]));
            sum[i].wrapping_add(products[0] + products[1] + products[2] + products[3])
        })
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::Avx512;
    use super::{Avx2, ByteKernel, Bytes};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma")]
    #[inline(never)]
    fn with_avx2<K: ByteKernel>(token: Avx2, kernel: K) {
        kernel.run(token);
    }

    // SAFETY of every block below: the token proves that the processor has the instructions, and pointers are
    // covered by the contract of the trait method.
    impl Bytes for Avx2 {
        const LANES: usize = 8;
        const TILE_VECTORS: usize = 1;
        const TILE_ROWS: [usize; 4] = [4, 0, 0, 0];
        type Float = Avx2;
        type I = __m256i;
        type A = __m256i;
        type W = [__m256i; 2];

        #[inline(always)]
        fn vectorize<K: ByteKernel>(self, kernel: K) {
            // SAFETY: the token proves the features.
            unsafe { with_avx2(self, kernel) }
        }
        #[inline(always)]
        fn float(self) -> Avx2 {
            self
        }
        #[inline(always)]
        fn zero(self) -> __m256i {
            // SAFETY: as above.
            unsafe { _mm256_setzero_si256() }
        }
        #[inline(always)]
        unsafe fn load(self, p: *const i32) -> __m256i {
            // SAFETY: as above.
            unsafe { _mm256_loadu_si256(p.cast()) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut i32, v: __m256i) {
            // SAFETY: as above.
            unsafe { _mm256_storeu_si256(p.cast(), v) }
        }
        #[inline(always)]
        fn repeat(self, quad: u32) -> __m256i {
            // SAFETY: as above.
            unsafe { _mm256_cvtepu8_epi16(_mm_set1_epi32(quad as i32)) }
        }
        #[inline(always)]
        unsafe fn weights(self, p: *const i8) -> [__m256i; 2] {
            // SAFETY: as above.
            unsafe {
                [
                    _mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast())),
                    _mm256_cvtepi8_epi16(_mm_loadu_si128(p.add(16).cast())),
                ]
            }
        }
        #[inline(always)]
        fn dot(self, sum: __m256i, a: __m256i, w: [__m256i; 2]) -> __m256i {
            // Products of 16-bit values are exact; the byte instruction of this set would saturate.
            // SAFETY: as above.
            unsafe {
                let pairs = _mm256_hadd_epi32(_mm256_madd_epi16(a, w[0]), _mm256_madd_epi16(a, w[1]));
                _mm256_add_epi32(sum, _mm256_permute4x64_epi64::<0b11_01_10_00>(pairs))
            }
        }
    }

    /// Proof that the processor has AVX-512 with VNNI.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Vnni(Avx512);

    impl Vnni {
        #[inline]
        pub(crate) fn detect() -> Option<Vnni> {
            Avx512::detect().filter(|_| is_x86_feature_detected!("avx512vnni")).map(Vnni)
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
    #[inline(never)]
    fn with_vnni<K: ByteKernel>(token: Vnni, kernel: K) {
        kernel.run(token);
    }

    impl Bytes for Vnni {
        const LANES: usize = 16;
        const TILE_VECTORS: usize = 4;
        const TILE_ROWS: [usize; 4] = [12, 12, 8, 6];
        type Float = Avx512;
        type I = __m512i;
        type A = __m512i;
        type W = __m512i;

        #[inline(always)]
        fn vectorize<K: ByteKernel>(self, kernel: K) {
            // SAFETY: the token proves the features.
            unsafe { with_vnni(self, kernel) }
        }
        #[inline(always)]
        fn float(self) -> Avx512 {
            self.0
        }
        #[inline(always)]
        fn zero(self) -> __m512i {
            // SAFETY: as above.
            unsafe { _mm512_setzero_si512() }
        }
        #[inline(always)]
        unsafe fn load(self, p: *const i32) -> __m512i {
            // SAFETY: as above.
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut i32, v: __m512i) {
            // SAFETY: as above.
            unsafe { _mm512_storeu_si512(p.cast(), v) }
        }
        #[inline(always)]
        fn repeat(self, quad: u32) -> __m512i {
            // SAFETY: as above.
            unsafe { _mm512_set1_epi32(quad as i32) }
        }
        #[inline(always)]
        unsafe fn weights(self, p: *const i8) -> __m512i {
            // SAFETY: as above.
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline(always)]
        fn dot(self, sum: __m512i, a: __m512i, w: __m512i) -> __m512i {
            // SAFETY: as above; this instruction does not saturate.
            unsafe { _mm512_dpbusd_epi32(sum, a, w) }
        }
    }
}
