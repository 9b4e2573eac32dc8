//! Dot products of bytes, exact in i32.

use super::{Avx2, Isa, Portable};

/// A computation on bytes that is compiled once per instruction set.
pub(crate) trait ByteKernel {
    /// The body; implementations are `#[inline(always)]`.
    fn run<T: Bytes>(self, bytes: T);
}

/// How scaled sums become bytes, see [`Bytes::requantize`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Requantization {
    /// Highest result less the zero point.
    pub(crate) high: f32,
    /// Zero point in the unsigned range.
    pub(crate) zero: i16,
    /// Lowest result in the unsigned range.
    pub(crate) low: u8,
    /// Turns results of the unsigned range into those in memory by exclusive or.
    pub(crate) flip: u8,
}

/// The column of lane `lane` of vector `vector` among four vectors of sums that [`Bytes::interleave`] leads to.
pub(crate) fn interleaved_column(vector: usize, lane: usize) -> usize {
    lane / 4 * 16 + vector * 4 + lane % 4
}

/// Vectors of `LANES` i32 sums of products of four bytes each, and of `4 * LANES` bytes.
pub(crate) trait Bytes: Copy {
    /// Sums per vector.
    const LANES: usize;
    /// Widest register tile, in vectors.
    const TILE_VECTORS: usize;
    /// Tallest register tile for a width of 1, 2, 3 and 4 vectors.
    const TILE_ROWS: [usize; 4];
    /// A vector of sums.
    type I: Copy;
    /// Four unsigned bytes, repeated.
    type A: Copy;
    /// `LANES` times four signed bytes.
    type W: Copy;
    /// A vector of `4 * LANES` bytes.
    type B: Copy;

    /// Runs `kernel` compiled for this instruction set.
    fn vectorize<K: ByteKernel>(self, kernel: K);
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
    /// All bytes `byte`.
    fn repeat_byte(self, byte: u8) -> Self::B;
    /// Loads `n` bytes, at most as many as a vector has; the others are zero.
    ///
    /// # Safety
    /// `p` is valid for reading `n` bytes.
    unsafe fn load_bytes(self, p: *const u8, n: usize) -> Self::B;
    /// Stores a vector.
    ///
    /// # Safety
    /// `p` is valid for writing `4 * LANES` bytes.
    unsafe fn store_bytes(self, p: *mut u8, v: Self::B);
    /// Exclusive or.
    fn flip(self, a: Self::B, b: Self::B) -> Self::B;
    /// Brings the bytes of four rows that belong to the same column beside each other. Lane `l` of result `v` has
    /// those of column [`interleaved_column`]`(v, l)`.
    fn interleave(self, rows: [Self::B; 4]) -> [Self::B; 4];
    /// Adds to each sum the products of four unsigned bytes of `a` and four signed ones of `w`, without saturation.
    fn dot_bytes(self, sum: Self::I, a: Self::B, w: Self::B) -> Self::I;
    /// `out[c] = clamp(round_half_even(sum * scale) + zero, low, high)` for the columns `c < n <= 4 * LANES`; where
    /// the product is no number, the result is `low`. Sums and scales lie in the order of
    /// [`interleave`](Bytes::interleave), or in that of the columns when `ROW` is set.
    ///
    /// # Safety
    /// `scales` is valid for reading `4 * LANES` values, `out` for writing `n` bytes.
    unsafe fn requantize<const ROW: bool>(
        self,
        sums: [Self::I; 4],
        scales: *const f32,
        q: Requantization,
        out: *mut u8,
        n: usize,
    );
    /// `a + b`, wrapping.
    fn add(self, a: Self::I, b: Self::I) -> Self::I;
    /// `sum - a * b`, wrapping.
    fn subtract_product(self, sum: Self::I, a: Self::I, b: i32) -> Self::I;
    /// Sum of the lanes, wrapping.
    fn total(self, a: Self::I) -> i32;
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
    type I = [i32; 8];
    type A = [i32; 4];
    type W = [[i8; 4]; 8];
    type B = [u8; 32];

    #[inline(never)]
    fn vectorize<K: ByteKernel>(self, kernel: K) {
        kernel.run(self);
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
    #[inline(always)]
    fn repeat_byte(self, byte: u8) -> [u8; 32] {
        [byte; 32]
    }
    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8, n: usize) -> [u8; 32] {
        let mut bytes = [0; 32];
        // SAFETY: by contract.
        unsafe { std::ptr::copy_nonoverlapping(p, bytes.as_mut_ptr(), n.min(32)) };
        bytes
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, v: [u8; 32]) {
        // SAFETY: by contract.
        unsafe { p.cast::<[u8; 32]>().write_unaligned(v) }
    }
    #[inline(always)]
    fn flip(self, a: [u8; 32], b: [u8; 32]) -> [u8; 32] {
        std::array::from_fn(|i| a[i] ^ b[i])
    }
    #[inline(always)]
    fn interleave(self, rows: [[u8; 32]; 4]) -> [[u8; 32]; 4] {
        std::array::from_fn(|vector| std::array::from_fn(|i| rows[i % 4][interleaved_column(vector, i / 4)]))
    }
    #[inline(always)]
    fn dot_bytes(self, sum: [i32; 8], a: [u8; 32], w: [u8; 32]) -> [i32; 8] {
        std::array::from_fn(|i| {
            let products: [i32; 4] =
                std::array::from_fn(|j| i32::from(a[4 * i + j]) * i32::from(w[4 * i + j] as i8));
            sum[i].wrapping_add(products[0] + products[1] + products[2] + products[3])
        })
    }
    #[inline(always)]
    unsafe fn requantize<const ROW: bool>(
        self,
        sums: [[i32; 8]; 4],
        scales: *const f32,
        q: Requantization,
        out: *mut u8,
        n: usize,
    ) {
        for vector in 0..4 {
            for lane in 0..8 {
                let at = vector * 8 + lane;
                let column = if ROW { at } else { interleaved_column(vector, lane) };
                if column < n {
                    // SAFETY: by contract.
                    unsafe {
                        let y = sums[vector][lane] as f32 * *scales.add(at);
                        let y = if y > q.high { q.high } else { y }.round_ties_even();
                        let y = y.max(f32::from(i16::MIN)) as i32 + i32::from(q.zero);
                        *out.add(column) = (y.max(0) as u8).max(q.low) ^ q.flip;
                    }
                }
            }
        }
    }
    #[inline(always)]
    fn add(self, a: [i32; 8], b: [i32; 8]) -> [i32; 8] {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    fn subtract_product(self, sum: [i32; 8], a: [i32; 8], b: i32) -> [i32; 8] {
        std::array::from_fn(|i| sum[i].wrapping_sub(a[i].wrapping_mul(b)))
    }
    #[inline(always)]
    fn total(self, a: [i32; 8]) -> i32 {
        a.into_iter().fold(0, i32::wrapping_add)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::Avx512;
    use super::{Avx2, ByteKernel, Bytes, Requantization};
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
        type I = __m256i;
        type A = __m256i;
        type W = [__m256i; 2];
        type B = __m256i;

        #[inline(always)]
        fn vectorize<K: ByteKernel>(self, kernel: K) {
            // SAFETY: the token proves the features.
            unsafe { with_avx2(self, kernel) }
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
        #[inline(always)]
        fn repeat_byte(self, byte: u8) -> __m256i {
            // SAFETY: as above.
            unsafe { _mm256_set1_epi8(byte as i8) }
        }
        #[inline(always)]
        unsafe fn load_bytes(self, p: *const u8, n: usize) -> __m256i {
            // SAFETY: only `n` bytes are read.
            unsafe {
                if n >= 32 {
                    return _mm256_loadu_si256(p.cast());
                }
                let mut bytes = [0u8; 32];
                std::ptr::copy_nonoverlapping(p, bytes.as_mut_ptr(), n);
                _mm256_loadu_si256(bytes.as_ptr().cast())
            }
        }
        #[inline(always)]
        unsafe fn store_bytes(self, p: *mut u8, v: __m256i) {
            // SAFETY: by contract.
            unsafe { _mm256_storeu_si256(p.cast(), v) }
        }
        #[inline(always)]
        fn flip(self, a: __m256i, b: __m256i) -> __m256i {
            // SAFETY: as above.
            unsafe { _mm256_xor_si256(a, b) }
        }
        #[inline(always)]
        fn interleave(self, [a, b, c, d]: [__m256i; 4]) -> [__m256i; 4] {
            // SAFETY: as above.
            unsafe {
                let (ab0, ab1) = (_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b));
                let (cd0, cd1) = (_mm256_unpacklo_epi8(c, d), _mm256_unpackhi_epi8(c, d));
                [
                    _mm256_unpacklo_epi16(ab0, cd0),
                    _mm256_unpackhi_epi16(ab0, cd0),
                    _mm256_unpacklo_epi16(ab1, cd1),
                    _mm256_unpackhi_epi16(ab1, cd1),
                ]
            }
        }
        #[inline(always)]
        fn dot_bytes(self, sum: __m256i, a: __m256i, w: __m256i) -> __m256i {
            // SAFETY: as above; products of 16-bit values are exact.
            unsafe {
                let a0 = _mm256_and_si256(a, _mm256_set1_epi16(0xff));
                let a1 = _mm256_srli_epi16::<8>(a);
                let w0 = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(w));
                let w1 = _mm256_srai_epi16::<8>(w);
                let products = _mm256_add_epi32(_mm256_madd_epi16(a0, w0), _mm256_madd_epi16(a1, w1));
                _mm256_add_epi32(sum, products)
            }
        }
        #[inline(always)]
        unsafe fn requantize<const ROW: bool>(
            self,
            sums: [__m256i; 4],
            scales: *const f32,
            q: Requantization,
            out: *mut u8,
            n: usize,
        ) {
            // SAFETY: as above; only `n` bytes are written. The minimum passes on what is no number, and the
            // conversion turns that and all that is too small into the lowest integer.
            unsafe {
                let high = _mm256_set1_ps(q.high);
                let mut integers = [_mm256_setzero_si256(); 4];
                for i in 0..4 {
                    let y = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[i]), _mm256_loadu_ps(scales.add(8 * i)));
                    integers[i] = _mm256_cvtps_epi32(_mm256_min_ps(high, y));
                }
                let zero = _mm256_set1_epi16(q.zero);
                let words0 = _mm256_adds_epi16(_mm256_packs_epi32(integers[0], integers[1]), zero);
                let words1 = _mm256_adds_epi16(_mm256_packs_epi32(integers[2], integers[3]), zero);
                let y = _mm256_packus_epi16(words0, words1);
                let y = _mm256_max_epu8(y, _mm256_set1_epi8(q.low as i8));
                let mut y = _mm256_xor_si256(y, _mm256_set1_epi8(q.flip as i8));
                if ROW {
                    y = _mm256_permutevar8x32_epi32(y, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
                }
                if n >= 32 {
                    return _mm256_storeu_si256(out.cast(), y);
                }
                let mut bytes = [0u8; 32];
                _mm256_storeu_si256(bytes.as_mut_ptr().cast(), y);
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), out, n);
            }
        }
        #[inline(always)]
        fn add(self, a: __m256i, b: __m256i) -> __m256i {
            // SAFETY: as above.
            unsafe { _mm256_add_epi32(a, b) }
        }
        #[inline(always)]
        fn subtract_product(self, sum: __m256i, a: __m256i, b: i32) -> __m256i {
            // SAFETY: as above.
            unsafe { _mm256_sub_epi32(sum, _mm256_mullo_epi32(a, _mm256_set1_epi32(b))) }
        }
        #[inline(always)]
        fn total(self, a: __m256i) -> i32 {
            let mut lanes = [0i32; 8];
            // SAFETY: as above.
            unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), a) };
            lanes.into_iter().fold(0, i32::wrapping_add)
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
        type I = __m512i;
        type A = __m512i;
        type W = __m512i;
        type B = __m512i;

        #[inline(always)]
        fn vectorize<K: ByteKernel>(self, kernel: K) {
            // SAFETY: the token proves the features.
            unsafe { with_vnni(self, kernel) }
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
        #[inline(always)]
        fn repeat_byte(self, byte: u8) -> __m512i {
            // SAFETY: as above.
            unsafe { _mm512_set1_epi8(byte as i8) }
        }
        #[inline(always)]
        unsafe fn load_bytes(self, p: *const u8, n: usize) -> __m512i {
            // SAFETY: masked bytes are not read.
            unsafe {
                if n >= 64 {
                    _mm512_loadu_si512(p.cast())
                } else {
                    _mm512_maskz_loadu_epi8((1u64 << n) - 1, p.cast())
                }
            }
        }
        #[inline(always)]
        unsafe fn store_bytes(self, p: *mut u8, v: __m512i) {
            // SAFETY: by contract.
            unsafe { _mm512_storeu_si512(p.cast(), v) }
        }
        #[inline(always)]
        fn flip(self, a: __m512i, b: __m512i) -> __m512i {
            // SAFETY: as above.
            unsafe { _mm512_xor_si512(a, b) }
        }
        #[inline(always)]
        fn interleave(self, [a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
            // SAFETY: as above.
            unsafe {
                let (ab0, ab1) = (_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b));
                let (cd0, cd1) = (_mm512_unpacklo_epi8(c, d), _mm512_unpackhi_epi8(c, d));
                [
                    _mm512_unpacklo_epi16(ab0, cd0),
                    _mm512_unpackhi_epi16(ab0, cd0),
                    _mm512_unpacklo_epi16(ab1, cd1),
                    _mm512_unpackhi_epi16(ab1, cd1),
                ]
            }
        }
        #[inline(always)]
        fn dot_bytes(self, sum: __m512i, a: __m512i, w: __m512i) -> __m512i {
            // SAFETY: as above; this instruction does not saturate.
            unsafe { _mm512_dpbusd_epi32(sum, a, w) }
        }
        #[inline(always)]
        unsafe fn requantize<const ROW: bool>(
            self,
            sums: [__m512i; 4],
            scales: *const f32,
            q: Requantization,
            out: *mut u8,
            n: usize,
        ) {
            // SAFETY: as above; masked bytes are not written. The minimum passes on what is no number, and the
            // conversion turns that and all that is too small into the lowest integer.
            unsafe {
                let high = _mm512_set1_ps(q.high);
                let mut integers = [_mm512_setzero_si512(); 4];
                for i in 0..4 {
                    let y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i]), _mm512_loadu_ps(scales.add(16 * i)));
                    integers[i] = _mm512_cvtps_epi32(_mm512_min_ps(high, y));
                }
                let zero = _mm512_set1_epi16(q.zero);
                let words0 = _mm512_adds_epi16(_mm512_packs_epi32(integers[0], integers[1]), zero);
                let words1 = _mm512_adds_epi16(_mm512_packs_epi32(integers[2], integers[3]), zero);
                let y = _mm512_packus_epi16(words0, words1);
                let y = _mm512_max_epu8(y, _mm512_set1_epi8(q.low as i8));
                let mut y = _mm512_xor_si512(y, _mm512_set1_epi8(q.flip as i8));
                if ROW {
                    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
                    y = _mm512_permutexvar_epi32(order, y);
                }
                match n {
                    64.. => _mm512_storeu_si512(out.cast(), y),
                    32 => _mm256_storeu_si256(out.cast(), _mm512_castsi512_si256(y)),
                    16 => _mm_storeu_si128(out.cast(), _mm512_castsi512_si128(y)),
                    _ => _mm512_mask_storeu_epi8(out.cast(), (1u64 << n) - 1, y),
                }
            }
        }
        #[inline(always)]
        fn add(self, a: __m512i, b: __m512i) -> __m512i {
            // SAFETY: as above.
            unsafe { _mm512_add_epi32(a, b) }
        }
        #[inline(always)]
        fn subtract_product(self, sum: __m512i, a: __m512i, b: i32) -> __m512i {
            // SAFETY: as above.
            unsafe { _mm512_sub_epi32(sum, _mm512_mullo_epi32(a, _mm512_set1_epi32(b))) }
        }
        #[inline(always)]
        fn total(self, a: __m512i) -> i32 {
            // SAFETY: as above.
            unsafe { _mm512_reduce_add_epi32(a) }
        }
    }
}
