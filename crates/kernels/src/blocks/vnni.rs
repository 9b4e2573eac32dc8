//! Products with the byte dot product of AVX-512.

use std::arch::x86_64::*;
use std::sync::OnceLock;

use lightering_units::BlockFormat;

use super::unpack::{IQ4_NL_VALUES, MXFP4_VALUES, offset, six_bit_scales};
use super::{CHANNELS, Part, SUPER, TILE};
use crate::arch::Avx512;

/// Rows from which on the codes of several channels are brought side by side.
const FEW_ROWS: usize = 4;
/// Rows that share codes once unpacked.
const SHARING: usize = 128;

fn detected() -> bool {
    static DETECTED: OnceLock<bool> = OnceLock::new();
    *DETECTED.get_or_init(|| {
        Avx512::detect().is_some()
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("f16c")
    })
}

/// Computes the part, if this processor has the instructions.
pub(super) fn run(part: &Part<'_>) -> bool {
    if !detected() {
        return false;
    }
    use BlockFormat as B;
    // SAFETY: the features were detected; the part's slices hold what its shape says, see `matmul`.
    unsafe {
        match part.format {
            B::F32 => plain_rows::<F32>(part),
            B::F16 => plain_rows::<F16>(part),
            B::BF16 => plain_rows::<Bf16>(part),
            B::Q4_0 => small_rows::<Q4_0>(part),
            B::Q4_1 => small_rows::<Q4_1>(part),
            B::Q5_0 => small_rows::<Q5_0>(part),
            B::Q5_1 => small_rows::<Q5_1>(part),
            B::Q8_0 => small_rows::<Q8_0>(part),
            B::IQ4_NL => small_rows::<Iq4Nl>(part),
            B::MXFP4 => small_rows::<Mxfp4>(part),
            B::Q2_K => super_rows::<Q2K>(part),
            B::Q3_K => super_rows::<Q3K>(part),
            B::Q4_K => super_rows::<Q4K>(part),
            B::Q5_K => super_rows::<Q5K>(part),
            B::Q6_K => super_rows::<Q6K>(part),
        }
    }
    true
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,avx2,fma")]
unsafe fn small_rows<F: Small>(part: &Part<'_>) {
    // SAFETY: as the caller's.
    unsafe {
        if part.activations.rows >= FEW_ROWS {
            many_small::<F>(part);
        } else {
            (0..part.activations.rows).for_each(|row| small::<F>(part, row));
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,avx2,fma")]
unsafe fn super_rows<F: Super>(part: &Part<'_>) {
    // SAFETY: as the caller's.
    unsafe {
        if part.activations.rows >= FEW_ROWS {
            many_super::<F>(part);
        } else {
            (0..part.activations.rows).for_each(|row| super_blocks::<F>(part, row));
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,avx2,fma")]
unsafe fn plain_rows<F: Plain>(part: &Part<'_>) {
    let rows = part.activations.rows;
    for channel in (0..part.channels).step_by(4) {
        let full = channel + 4 <= part.channels;
        for row in (0..rows).step_by(TILE) {
            // SAFETY: as the caller's; channels and rows are counted here.
            unsafe {
                match (full, row + TILE <= rows) {
                    (true, true) => plain::<F, 4, TILE>(part, channel, row),
                    (true, false) => (row..rows).for_each(|row| plain::<F, 4, 1>(part, channel, row)),
                    (false, true) => {
                        (channel..part.channels).for_each(|channel| plain::<F, 1, TILE>(part, channel, row));
                    }
                    (false, false) => (channel..part.channels).for_each(|channel| {
                        (row..rows).for_each(|row| plain::<F, 1, 1>(part, channel, row));
                    }),
                }
            }
        }
    }
}

// SAFETY of every unsafe function and block below: they are only reached from `run`, behind the detection, and are
// inlined into a function with the features; pointers lead to whole blocks, as each function says.

/// Asks for as many bytes as are being read at `p`, some way ahead: of this channel, or of the next ones behind it.
/// Where codes cost much to unpack, the processor does not look as far ahead by itself.
#[inline(always)]
unsafe fn prefetch(p: *const u8, bytes: usize) {
    const AHEAD: usize = 2048;
    for at in (0..bytes).step_by(64) {
        // A prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD + at).cast()) };
    }
}

#[inline(always)]
unsafe fn sum8(v: __m256) -> f32 {
    unsafe {
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps(v, v, 1)))
    }
}

#[inline(always)]
unsafe fn sum16(v: __m512) -> f32 {
    unsafe { sum8(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1))) }
}

#[inline(always)]
unsafe fn half(p: *const u8) -> f32 {
    unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(p.cast::<u16>().read_unaligned())))) }
}

/// The lower half of both: `a` in the lower 256 bits, `b` in the upper.
#[inline(always)]
unsafe fn join(a: __m256i, b: __m256i) -> __m512i {
    unsafe { _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1) }
}

/// Words of `low` in the even and of `high` in the odd quarters.
#[inline(always)]
unsafe fn quarters(low: i16, high: i16) -> __m512i {
    unsafe {
        let pair = _mm256_inserti128_si256(_mm256_set1_epi16(low), _mm_set1_epi16(high), 1);
        join(pair, pair)
    }
}

/// Words of `low` in the lower and of `high` in the upper half.
#[inline(always)]
unsafe fn halves_of(low: i16, high: i16) -> __m512i {
    unsafe { join(_mm256_set1_epi16(low), _mm256_set1_epi16(high)) }
}

/// A format with blocks of 32.
trait Small {
    const FORMAT: BlockFormat;
    const MINIMUM: bool = false;
    /// Unsigned codes of the block at `p` and the one behind it.
    unsafe fn codes(p: *const u8) -> __m512i;
}

/// Nibbles of 16 bytes at `p` and 16 at `q`, each in the order low, high.
#[inline(always)]
unsafe fn nibbles(p: *const u8, q: *const u8) -> __m512i {
    unsafe {
        let v = join(
            _mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast())),
            _mm256_broadcastsi128_si256(_mm_loadu_si128(q.cast())),
        );
        _mm512_and_si512(_mm512_srlv_epi16(v, quarters(0, 4)), _mm512_set1_epi8(15))
    }
}

#[inline(always)]
unsafe fn fifth_bits(codes: __m512i, p: *const u8, q: *const u8) -> __m512i {
    unsafe {
        let low = u64::from(p.cast::<u32>().read_unaligned());
        let mask = low | u64::from(q.cast::<u32>().read_unaligned()) << 32;
        _mm512_mask_add_epi8(codes, mask, codes, _mm512_set1_epi8(16))
    }
}

#[inline(always)]
unsafe fn looked_up(codes: __m512i, values: &[i8; 16], zero: u8) -> __m512i {
    unsafe {
        let table = _mm_add_epi8(_mm_loadu_si128(values.as_ptr().cast()), _mm_set1_epi8(zero as i8));
        _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), codes)
    }
}

macro_rules! small_formats {
    ($($name:ident = $format:ident, $minimum:literal, |$p:ident| $codes:expr;)*) => { $(
        #[allow(non_camel_case_types)]
        struct $name;
        impl Small for $name {
            const FORMAT: BlockFormat = BlockFormat::$format;
            const MINIMUM: bool = $minimum;
            #[inline(always)]
            unsafe fn codes($p: *const u8) -> __m512i {
                // SAFETY: two whole blocks lie at `p`.
                unsafe { $codes }
            }
        }
    )* };
}

small_formats! {
    Q4_0 = Q4_0, false, |p| nibbles(p.add(2), p.add(20));
    Q4_1 = Q4_1, true, |p| nibbles(p.add(4), p.add(24));
    Q5_0 = Q5_0, false, |p| fifth_bits(nibbles(p.add(6), p.add(28)), p.add(2), p.add(24));
    Q5_1 = Q5_1, true, |p| fifth_bits(nibbles(p.add(8), p.add(32)), p.add(4), p.add(28));
    Q8_0 = Q8_0, false, |p| _mm512_xor_si512(
        join(_mm256_loadu_si256(p.add(2).cast()), _mm256_loadu_si256(p.add(36).cast())),
        _mm512_set1_epi8(-128),
    );
    Iq4Nl = IQ4_NL, false, |p| looked_up(nibbles(p.add(2), p.add(20)), &IQ4_NL_VALUES, 128);
    Mxfp4 = MXFP4, false, |p| looked_up(nibbles(p.add(1), p.add(18)), &MXFP4_VALUES, 12);
}

/// Sixteen f16, the first words of as many blocks behind each other; blocks have whole words.
#[inline(always)]
unsafe fn halves<F: Small>(p: *const u8) -> __m512 {
    unsafe {
        let words = F::FORMAT.block_bytes() / 2;
        // Blocks whose first words lie within 64 words.
        let together = 63 / words + 1;
        let mut all = _mm512_setzero_si512();
        let mut first = 0;
        while first < 16 {
            let end = 16.min(first + together);
            let mut index = [0i16; 32];
            for b in first..end {
                index[b] = ((b - first) * words) as i16;
            }
            let p = p.add(first * 2 * words).cast::<i16>();
            // Nothing behind the last of these words is read.
            let needed = (end - first - 1) * words + 1;
            let low = _mm512_maskz_loadu_epi16((!0u32) >> (32 - needed.min(32)), p);
            let high =
                if needed > 32 { _mm512_maskz_loadu_epi16((!0u32) >> (64 - needed), p.add(32)) } else { low };
            let index = _mm512_loadu_si512(index.as_ptr().cast());
            let mask = (1u32 << end) - (1u32 << first);
            all = _mm512_or_si512(all, _mm512_maskz_permutex2var_epi16(mask, low, index, high));
            first = end;
        }
        _mm512_cvtph_ps(_mm512_castsi512_si256(all))
    }
}

/// [`half_power_of_two`](super::unpack::half_power_of_two) of sixteen bytes at a distance of `stride`.
#[inline(always)]
unsafe fn half_powers_of_two(p: *const u8, stride: usize) -> __m512 {
    unsafe {
        let mut words = [0u64; 2];
        for i in 0..16 {
            words[i / 8] |= u64::from(*p.add(i * stride)) << (8 * (i % 8));
        }
        let e = _mm512_cvtepu8_epi32(_mm_set_epi64x(words[1] as i64, words[0] as i64));
        let normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
        let tiny = _mm512_cmplt_epu32_mask(e, _mm512_set1_epi32(2));
        let subnormal = _mm512_sllv_epi32(_mm512_set1_epi32(0x0020_0000), e);
        _mm512_castsi512_ps(_mm512_mask_blend_epi32(tiny, normal, subnormal))
    }
}

/// Sums of pairs of lanes: in each quarter, those of `a` and `b` in turns.
#[inline(always)]
unsafe fn add_pairs(a: __m512i, b: __m512i) -> __m512i {
    unsafe { _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)) }
}

/// Sums of the quarters of four vectors, side by side.
#[inline(always)]
unsafe fn add_quarters(a: __m512i, b: __m512i, c: __m512i, d: __m512i) -> __m512i {
    unsafe {
        let (ab, cd) = (add_pairs(a, b), add_pairs(c, d));
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
    }
}

/// Adds the quarters of `v` to `sums`, one after another.
#[inline(always)]
unsafe fn add_in_turn(sums: __m128, v: __m512) -> __m128 {
    unsafe {
        let sums = _mm_add_ps(sums, _mm512_castps512_ps128(v));
        let sums = _mm_add_ps(sums, _mm512_extractf32x4_ps(v, 1));
        let sums = _mm_add_ps(sums, _mm512_extractf32x4_ps(v, 2));
        _mm_add_ps(sums, _mm512_extractf32x4_ps(v, 3))
    }
}

#[inline(always)]
unsafe fn sum4(v: __m128) -> f32 {
    unsafe {
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps(v, v, 1)))
    }
}

/// Scales of sixteen blocks.
#[inline(always)]
unsafe fn block_scales<F: Small>(w: *const u8) -> __m512 {
    unsafe {
        if matches!(F::FORMAT, BlockFormat::MXFP4) {
            half_powers_of_two(w, F::FORMAT.block_bytes())
        } else {
            halves::<F>(w)
        }
    }
}

/// Adds sixteen blocks at `w` to the sums; codes, scales and sums are those of the activations there.
#[inline(always)]
unsafe fn sixteen<F: Small>(
    w: *const u8,
    a: (*const i8, *const f32, *const f32),
    acc: &mut __m128,
    minima: &mut __m128,
) {
    unsafe {
        let bytes = F::FORMAT.block_bytes();
        let mut dots = [_mm512_setzero_si512(); 8];
        for p in 0..8 {
            let codes = F::codes(w.add(2 * p * bytes));
            dots[p] = _mm512_dpbusd_epi32(dots[p], codes, _mm512_loadu_si512(a.0.add(64 * p).cast()));
        }
        let low = add_quarters(dots[0], dots[1], dots[2], dots[3]);
        let high = add_quarters(dots[4], dots[5], dots[6], dots[7]);
        // Quarters 0 and 1 are of the even, 2 and 3 of the odd blocks.
        let sums = _mm512_add_epi32(
            _mm512_shuffle_i32x4(low, high, 0b10_00_10_00),
            _mm512_shuffle_i32x4(low, high, 0b11_01_11_01),
        );
        let order = _mm512_set_epi32(15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
        let sums = _mm512_cvtepi32_ps(_mm512_permutexvar_epi32(order, sums));
        let (d, group_sums) = (_mm512_loadu_ps(a.1), _mm512_loadu_ps(a.2));
        // Whole numbers below 2^24, so nothing is rounded.
        let sums = _mm512_fnmadd_ps(_mm512_set1_ps(f32::from(offset(F::FORMAT))), group_sums, sums);
        *acc = add_in_turn(*acc, _mm512_mul_ps(sums, _mm512_mul_ps(block_scales::<F>(w), d)));
        if F::MINIMUM {
            let m = _mm512_mul_ps(_mm512_mul_ps(halves::<F>(w.add(2)), d), group_sums);
            *minima = add_in_turn(*minima, m);
        }
    }
}

/// The first words of four blocks as f16.
#[inline(always)]
unsafe fn four_halves<F: Small>(p: *const u8) -> __m128 {
    unsafe {
        let bytes = F::FORMAT.block_bytes();
        let word = |b: usize| i32::from(p.add(b * bytes).cast::<u16>().read_unaligned());
        let words = _mm_setr_epi32(word(0) | word(1) << 16, word(2) | word(3) << 16, 0, 0);
        _mm_cvtph_ps(words)
    }
}

/// [`sixteen`] for four blocks: the rest of rows that are no whole number of sixteen.
#[inline(always)]
unsafe fn four_small<F: Small>(
    w: *const u8,
    a: (*const i8, *const f32, *const f32),
    acc: &mut __m128,
    minima: &mut __m128,
) {
    unsafe {
        let bytes = F::FORMAT.block_bytes();
        let zero = _mm512_setzero_si512();
        let first = _mm512_dpbusd_epi32(zero, F::codes(w), _mm512_loadu_si512(a.0.cast()));
        let second =
            _mm512_dpbusd_epi32(zero, F::codes(w.add(2 * bytes)), _mm512_loadu_si512(a.0.add(64).cast()));
        // Sums of neighbours, and then of the quarters that belong to one block.
        let pairs = add_pairs(first, second);
        let (even, odd) = (_mm512_castsi512_si256(pairs), _mm512_extracti64x4_epi64(pairs, 1));
        let even = _mm_add_epi32(_mm256_castsi256_si128(even), _mm256_extracti128_si256(even, 1));
        let odd = _mm_add_epi32(_mm256_castsi256_si128(odd), _mm256_extracti128_si256(odd, 1));
        // Words of `even` are of blocks 0, 2, 0, 2, of `odd` of 1, 3, 1, 3.
        let sums = _mm_add_epi32(_mm_unpacklo_epi32(even, odd), _mm_unpackhi_epi32(even, odd));
        let sums = _mm_cvtepi32_ps(sums);
        let (d, group_sums) = (_mm_loadu_ps(a.1), _mm_loadu_ps(a.2));
        let sums = _mm_fnmadd_ps(_mm_set1_ps(f32::from(offset(F::FORMAT))), group_sums, sums);
        let scales = if matches!(F::FORMAT, BlockFormat::MXFP4) {
            let scale = |b: usize| super::unpack::half_power_of_two(*w.add(b * bytes));
            _mm_setr_ps(scale(0), scale(1), scale(2), scale(3))
        } else {
            four_halves::<F>(w)
        };
        *acc = _mm_add_ps(*acc, _mm_mul_ps(sums, _mm_mul_ps(scales, d)));
        if F::MINIMUM {
            let m = _mm_mul_ps(_mm_mul_ps(four_halves::<F>(w.add(2)), d), group_sums);
            *minima = _mm_add_ps(*minima, m);
        }
    }
}

/// The products of one row.
#[inline(always)]
unsafe fn small<F: Small>(part: &Part<'_>, row: usize) {
    unsafe {
        let bytes = F::FORMAT.block_bytes();
        let blocks = part.row_bytes / bytes;
        let (codes, scales, sums) = part.activations.parts(row);
        let (codes, scales, sums) = (codes.as_ptr(), scales.as_ptr(), sums.as_ptr());
        for channel in 0..part.channels {
            let w = part.w.as_ptr().add(channel * part.row_bytes);
            let mut acc = _mm_setzero_ps();
            let mut minima = acc;
            let mut at = 0;
            while at + 16 <= blocks {
                if bytes < 32 {
                    prefetch(w.add(at * bytes), 16 * bytes);
                }
                let a = (codes.add(32 * at), scales.add(at), sums.add(at));
                sixteen::<F>(w.add(at * bytes), a, &mut acc, &mut minima);
                at += 16;
            }
            while at + 4 <= blocks {
                let a = (codes.add(32 * at), scales.add(at), sums.add(at));
                four_small::<F>(w.add(at * bytes), a, &mut acc, &mut minima);
                at += 4;
            }
            if at < blocks {
                // The rest of the row, with blocks behind it that stand against activations of zero.
                let rest = tail::<F, { 4 * 34 }>(w.add(at * bytes), blocks - at);
                let a = (codes.add(32 * at), scales.add(at), sums.add(at));
                four_small::<F>(rest.as_ptr(), a, &mut acc, &mut minima);
            }
            part.put(row, channel, if F::MINIMUM { sum4(acc) + sum4(minima) } else { sum4(acc) });
        }
    }
}

/// The last blocks of a row, filled up with zeros.
#[inline(always)]
unsafe fn tail<F: Small, const BYTES: usize>(w: *const u8, blocks: usize) -> [u8; BYTES] {
    let mut rest = [0u8; BYTES];
    unsafe { std::ptr::copy_nonoverlapping(w, rest.as_mut_ptr(), blocks * F::FORMAT.block_bytes()) };
    rest
}

/// Transposes sixteen times sixteen words.
#[inline(always)]
unsafe fn transpose(v: &mut [__m512i; CHANNELS]) {
    unsafe {
        let mut t = *v;
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
        }
        let mut u = t;
        for i in (0..16).step_by(4) {
            u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
            u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
            u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
            u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        for c in 0..4 {
            let a = _mm512_shuffle_i32x4(u[c], u[4 + c], 0x44);
            let b = _mm512_shuffle_i32x4(u[c], u[4 + c], 0xee);
            let d = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0x44);
            let e = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0xee);
            v[c] = _mm512_shuffle_i32x4(a, d, 0x88);
            v[4 + c] = _mm512_shuffle_i32x4(a, d, 0xdd);
            v[8 + c] = _mm512_shuffle_i32x4(b, e, 0x88);
            v[12 + c] = _mm512_shuffle_i32x4(b, e, 0xdd);
        }
    }
}

/// A word of the activations in all lanes.
#[inline(always)]
unsafe fn word(p: *const i8) -> __m512i {
    unsafe { _mm512_set1_epi32(p.cast::<i32>().read_unaligned()) }
}

/// A vector for each of the channels, in lanes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Lanes<T>([T; CHANNELS]);

impl<T> Lanes<T> {
    #[inline(always)]
    unsafe fn load(&self) -> __m512i {
        const { assert!(size_of::<T>() == 4) };
        unsafe { _mm512_load_si512((&raw const *self).cast()) }
    }
    #[inline(always)]
    unsafe fn load_ps(&self) -> __m512 {
        unsafe { _mm512_castsi512_ps(self.load()) }
    }
    #[inline(always)]
    unsafe fn store(&mut self, v: __m512i) {
        const { assert!(size_of::<T>() == 4) };
        unsafe { _mm512_store_si512((&raw mut *self).cast(), v) }
    }
}

/// Sixteen blocks of sixteen channels side by side.
struct SmallStrip {
    /// Four codes of each channel, eight times for each block.
    codes: [Lanes<[u8; 4]>; 128],
    scales: [Lanes<f32>; 16],
    minima: [Lanes<f32>; 16],
}

impl SmallStrip {
    /// Unpacks up to `blocks` blocks from block `at` of each channel; the last channel stands in for missing ones.
    #[inline(always)]
    unsafe fn fill<F: Small>(&mut self, part: &Part<'_>, at: usize, blocks: usize) {
        unsafe {
            let bytes = F::FORMAT.block_bytes();
            let mut from = [std::ptr::null(); CHANNELS];
            for c in 0..CHANNELS {
                let channel = c.min(part.channels - 1);
                from[c] = part.w.as_ptr().add(channel * part.row_bytes + at * bytes);
            }
            let mut tails = [[0u8; 16 * 34]; CHANNELS];
            if blocks < 16 {
                for c in 0..CHANNELS {
                    tails[c] = tail::<F, { 16 * 34 }>(from[c], blocks);
                    from[c] = tails[c].as_ptr();
                }
            }
            let mut v = [_mm512_setzero_si512(); CHANNELS];
            for pair in 0..blocks.min(16).div_ceil(2) {
                for c in 0..CHANNELS {
                    v[c] = F::codes(from[c].add(2 * pair * bytes));
                }
                transpose(&mut v);
                for c in 0..CHANNELS {
                    self.codes[16 * pair + c].store(v[c]);
                }
            }
            for c in 0..CHANNELS {
                v[c] = _mm512_castps_si512(block_scales::<F>(from[c]));
            }
            transpose(&mut v);
            for b in 0..16 {
                self.scales[b].store(v[b]);
            }
            if F::MINIMUM {
                for c in 0..CHANNELS {
                    v[c] = _mm512_castps_si512(halves::<F>(from[c].add(2)));
                }
                transpose(&mut v);
                for b in 0..16 {
                    self.minima[b].store(v[b]);
                }
            }
        }
    }

    /// Adds the products of `R` rows with the first `blocks` blocks, which are block `at` of the row and the following
    /// ones, to four sums of each row and channel: those of every fourth block. Behind them lie those of minima.
    #[inline(always)]
    unsafe fn multiply<F: Small, const R: usize>(
        &self,
        rows: *const (*const i8, *const f32, *const f32),
        at: usize,
        blocks: usize,
        sums: *mut [Lanes<f32>; 8],
    ) {
        unsafe {
            let zero = _mm512_set1_ps(f32::from(offset(F::FORMAT)));
            for class in 0..4.min(blocks) {
                let mut acc = [_mm512_setzero_ps(); R];
                let mut low = acc;
                if at > 0 {
                    for r in 0..R {
                        acc[r] = (&*sums.add(r))[class].load_ps();
                        if F::MINIMUM {
                            low[r] = (&*sums.add(r))[4 + class].load_ps();
                        }
                    }
                }
                for b in (class..blocks).step_by(4) {
                    let mut dots = [_mm512_setzero_si512(); R];
                    for j in 0..8 {
                        let codes = self.codes[8 * b + j].load();
                        for r in 0..R {
                            let a = word((*rows.add(r)).0.add(32 * (at + b) + 4 * j));
                            dots[r] = _mm512_dpbusd_epi32(dots[r], codes, a);
                        }
                    }
                    let scales = self.scales[b].load_ps();
                    for r in 0..R {
                        let (_, d, group_sums) = *rows.add(r);
                        let d = _mm512_set1_ps(*d.add(at + b));
                        let group_sum = _mm512_set1_ps(*group_sums.add(at + b));
                        let mut dot = _mm512_cvtepi32_ps(dots[r]);
                        if offset(F::FORMAT) > 0 {
                            dot = _mm512_fnmadd_ps(zero, group_sum, dot);
                        }
                        acc[r] = _mm512_add_ps(acc[r], _mm512_mul_ps(dot, _mm512_mul_ps(scales, d)));
                        if F::MINIMUM {
                            let m = _mm512_mul_ps(_mm512_mul_ps(self.minima[b].load_ps(), d), group_sum);
                            low[r] = _mm512_add_ps(low[r], m);
                        }
                    }
                }
                for r in 0..R {
                    (&mut *sums.add(r))[class].store(_mm512_castps_si512(acc[r]));
                    if F::MINIMUM {
                        (&mut *sums.add(r))[4 + class].store(_mm512_castps_si512(low[r]));
                    }
                }
            }
        }
    }
}

/// Calls `tile` for runs of 8, 4, 2 and 1 rows.
macro_rules! in_tiles {
    ($rows:expr, |$row:ident, $R:ident| $tile:expr) => {{
        let mut $row = 0;
        in_tiles!(@ 8, $rows, $row, $R, $tile);
        in_tiles!(@ 4, $rows, $row, $R, $tile);
        in_tiles!(@ 2, $rows, $row, $R, $tile);
        in_tiles!(@ 1, $rows, $row, $R, $tile);
    }};
    (@ $n:literal, $rows:expr, $row:ident, $R:ident, $tile:expr) => {
        while $rows - $row >= $n {
            const $R: usize = $n;
            $tile;
            $row += $n;
        }
    };
}

/// Where the activations of up to [`SHARING`] rows from `first` on lie.
#[inline(always)]
fn rows_of(part: &Part<'_>, first: usize) -> ([(*const i8, *const f32, *const f32); SHARING], usize) {
    let rows = SHARING.min(part.activations.rows - first);
    let mut at = [(std::ptr::null(), std::ptr::null(), std::ptr::null()); SHARING];
    for r in 0..rows {
        let (codes, scales, sums) = part.activations.parts(first + r);
        at[r] = (codes.as_ptr(), scales.as_ptr(), sums.as_ptr());
    }
    (at, rows)
}

/// Stores a value for each channel of a row.
#[inline(always)]
unsafe fn put_all(part: &Part<'_>, row: usize, values: __m512) {
    debug_assert!(row < part.activations.rows && part.channels <= CHANNELS);
    unsafe {
        let mask = ((1u32 << part.channels) - 1) as __mmask16;
        _mm512_mask_storeu_ps(part.y.add(row * part.y_stride), mask, values);
    }
}

/// The four sums from `from` on together; there are none for blocks that a row has not.
#[inline(always)]
unsafe fn total(sums: &[Lanes<f32>; 8], from: usize, blocks: usize) -> __m512 {
    unsafe {
        let mut v = [_mm512_setzero_ps(); 4];
        for class in 0..4.min(blocks) {
            v[class] = sums[from + class].load_ps();
        }
        _mm512_add_ps(_mm512_add_ps(v[0], v[2]), _mm512_add_ps(v[1], v[3]))
    }
}

/// The products of many rows: sixteen channels in the lanes of each vector, so that no sum runs across lanes.
#[inline(always)]
unsafe fn many_small<F: Small>(part: &Part<'_>) {
    unsafe {
        let blocks = part.row_bytes / F::FORMAT.block_bytes();
        let mut strip = std::mem::MaybeUninit::<SmallStrip>::uninit();
        // All bits are numbers; what is read was written before.
        let strip = &mut *strip.as_mut_ptr();
        let mut sums = std::mem::MaybeUninit::<[[Lanes<f32>; 8]; SHARING]>::uninit();
        let sums = sums.as_mut_ptr().cast::<[Lanes<f32>; 8]>();
        for first in (0..part.activations.rows).step_by(SHARING) {
            let (at, rows) = rows_of(part, first);
            for block in (0..blocks).step_by(16) {
                let count = 16.min(blocks - block);
                strip.fill::<F>(part, block, count);
                in_tiles!(rows, |row, R| strip.multiply::<F, R>(
                    at.as_ptr().add(row),
                    block,
                    count,
                    sums.add(row)
                ));
            }
            for row in 0..rows {
                let sums = &*sums.add(row);
                let mut sum = total(sums, 0, blocks);
                if F::MINIMUM {
                    sum = _mm512_add_ps(sum, total(sums, 4, blocks));
                }
                put_all(part, first + row, sum);
            }
        }
    }
}

/// A block of 256 in registers.
struct Unpacked {
    codes: [__m512i; 4],
    /// Scales of 16 groups as words; of 8 where `PAIRED`.
    scales: __m256i,
    /// Minima of 16 groups as words.
    minima: __m256i,
    scale: f32,
    minimum: f32,
}

/// A format with blocks of 256.
trait Super {
    const BYTES: usize;
    /// Scales are those of 32 elements.
    const PAIRED: bool;
    /// Minima only stand for the code of zero, and have the scale of the block.
    const SYMMETRIC: bool;
    /// Unpacks the block at `p`.
    unsafe fn unpack(p: *const u8) -> Unpacked;
}

#[inline(always)]
unsafe fn twice(p: *const u8) -> __m512i {
    unsafe { _mm512_broadcast_i64x4(_mm256_loadu_si256(p.cast())) }
}

#[inline(always)]
unsafe fn and(v: __m512i, mask: i8) -> __m512i {
    unsafe { _mm512_and_si512(v, _mm512_set1_epi8(mask)) }
}

#[inline(always)]
unsafe fn shifted(v: __m512i, low: i16, high: i16) -> __m512i {
    unsafe { _mm512_srlv_epi16(v, halves_of(low, high)) }
}

/// Adds `value` to the codes whose bit in `bits` (bit `2 * c` for the lower half, `2 * c + 1` for the upper) is set.
#[inline(always)]
unsafe fn add_bits(codes: __m512i, bits: __m512i, c: usize, value: i8) -> __m512i {
    unsafe {
        let test = join(_mm256_set1_epi8((1u8 << (2 * c)) as i8), _mm256_set1_epi8((2u8 << (2 * c)) as i8));
        _mm512_mask_add_epi8(codes, _mm512_test_epi8_mask(bits, test), codes, _mm512_set1_epi8(value))
    }
}

/// The scales of 8 groups, and the minima of 16, of Q4_K and Q5_K, as [`six_bit_pairs`](super::unpack::six_bit_pairs).
/// 16 bytes are read.
#[inline(always)]
unsafe fn scale_pairs(p: *const u8) -> (__m256i, __m256i) {
    unsafe {
        let v = _mm_loadu_si128(p.cast());
        let low = _mm_srlv_epi32(_mm_shuffle_epi32(v, 0b10_01_10_00), _mm_set_epi32(4, 0, 0, 0));
        let low = _mm_and_si128(low, _mm_set_epi32(0x0f0f_0f0f, 0x3f3f_3f3f, 0x0f0f_0f0f, 0x3f3f_3f3f));
        let high = _mm_srli_epi32(_mm_shuffle_epi32(v, 0b01_01_00_00), 2);
        let high = _mm_and_si128(high, _mm_set_epi32(0x3030_3030, 0, 0x3030_3030, 0));
        let pairs = _mm256_cvtepu8_epi16(_mm_or_si128(low, high));
        let twice = _mm256_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8);
        (pairs, _mm256_permutexvar_epi16(twice, pairs))
    }
}

struct Q2K;
impl Super for Q2K {
    const BYTES: usize = 84;
    const PAIRED: bool = false;
    const SYMMETRIC: bool = false;
    #[inline(always)]
    unsafe fn unpack(p: *const u8) -> Unpacked {
        unsafe {
            let (a, b) = (twice(p.add(16)), twice(p.add(48)));
            let codes =
                [shifted(a, 0, 2), shifted(a, 4, 6), shifted(b, 0, 2), shifted(b, 4, 6)].map(|v| and(v, 3));
            let packed = _mm_loadu_si128(p.cast());
            let low = _mm_set1_epi8(15);
            Unpacked {
                codes,
                scales: _mm256_cvtepu8_epi16(_mm_and_si128(packed, low)),
                minima: _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(packed, 4), low)),
                scale: half(p.add(80)),
                minimum: half(p.add(82)),
            }
        }
    }
}

struct Q3K;
impl Super for Q3K {
    const BYTES: usize = 110;
    const PAIRED: bool = false;
    const SYMMETRIC: bool = true;
    #[inline(always)]
    unsafe fn unpack(p: *const u8) -> Unpacked {
        unsafe {
            let high = twice(p);
            let (a, b) = (twice(p.add(32)), twice(p.add(64)));
            let low =
                [shifted(a, 0, 2), shifted(a, 4, 6), shifted(b, 0, 2), shifted(b, 4, 6)].map(|v| and(v, 3));
            let mut codes = low;
            for c in 0..4 {
                codes[c] = add_bits(low[c], high, c, 4);
            }
            let scales = six_bit_scales(&*p.add(96).cast::<[u8; 12]>());
            let scales = _mm_sub_epi8(_mm_loadu_si128(scales.as_ptr().cast()), _mm_set1_epi8(32));
            let scale = half(p.add(108));
            Unpacked {
                codes,
                scales: _mm256_cvtepi8_epi16(scales),
                minima: _mm256_slli_epi16(_mm256_cvtepi8_epi16(scales), 2),
                scale,
                minimum: scale,
            }
        }
    }
}

struct Q4K;
impl Super for Q4K {
    const BYTES: usize = 144;
    const PAIRED: bool = true;
    const SYMMETRIC: bool = false;
    #[inline(always)]
    unsafe fn unpack(p: *const u8) -> Unpacked {
        unsafe {
            let codes = [0, 1, 2, 3usize].map(|c| and(shifted(twice(p.add(16 + 32 * c)), 0, 4), 15));
            let (scales, minima) = scale_pairs(p.add(4));
            Unpacked { codes, scales, minima, scale: half(p), minimum: half(p.add(2)) }
        }
    }
}

struct Q5K;
impl Super for Q5K {
    const BYTES: usize = 176;
    const PAIRED: bool = true;
    const SYMMETRIC: bool = false;
    #[inline(always)]
    unsafe fn unpack(p: *const u8) -> Unpacked {
        unsafe {
            let high = twice(p.add(16));
            let mut codes = [high; 4];
            for c in 0..4 {
                let low = and(shifted(twice(p.add(48 + 32 * c)), 0, 4), 15);
                codes[c] = add_bits(low, high, c, 16);
            }
            let (scales, minima) = scale_pairs(p.add(4));
            Unpacked { codes, scales, minima, scale: half(p), minimum: half(p.add(2)) }
        }
    }
}

struct Q6K;
impl Super for Q6K {
    const BYTES: usize = 210;
    const PAIRED: bool = false;
    const SYMMETRIC: bool = true;
    #[inline(always)]
    unsafe fn unpack(p: *const u8) -> Unpacked {
        unsafe {
            let mut codes = [_mm512_setzero_si512(); 4];
            for h in 0..2 {
                let low = _mm512_loadu_si512(p.add(64 * h).cast());
                let high = twice(p.add(128 + 32 * h));
                let first = and(_mm512_sllv_epi16(high, halves_of(4, 2)), 0x30);
                let second = and(shifted(high, 0, 2), 0x30);
                codes[2 * h] = _mm512_or_si512(and(low, 15), first);
                codes[2 * h + 1] = _mm512_or_si512(and(_mm512_srli_epi16(low, 4), 15), second);
            }
            let scales = _mm_loadu_si128(p.add(192).cast());
            let scale = half(p.add(208));
            Unpacked {
                codes,
                scales: _mm256_cvtepi8_epi16(scales),
                minima: _mm256_slli_epi16(_mm256_cvtepi8_epi16(scales), 5),
                scale,
                minimum: scale,
            }
        }
    }
}

/// The products of one row.
#[inline(always)]
unsafe fn super_blocks<F: Super>(part: &Part<'_>, row: usize) {
    unsafe {
        let blocks = part.row_bytes / F::BYTES;
        let (codes, scales, group_sums) = part.activations.parts(row);
        let (codes, scales, group_sums) =
            (codes.as_ptr(), scales.as_ptr(), group_sums.as_ptr().cast::<i16>());
        for channel in 0..part.channels {
            let w = part.w.as_ptr().add(channel * part.row_bytes);
            let (mut acc, mut minima) = (_mm_setzero_ps(), _mm_setzero_ps());
            let mut at = 0;
            while at + 4 <= blocks {
                prefetch(w.add(at * F::BYTES), 4 * F::BYTES);
                let a = (codes.add(SUPER * at), scales.add(at), group_sums.add(16 * at));
                four::<F>(w.add(at * F::BYTES), 4, a, &mut acc, &mut minima);
                at += 4;
            }
            if at < blocks {
                let a = (codes.add(SUPER * at), scales.add(at), group_sums.add(16 * at));
                four::<F>(w.add(at * F::BYTES), blocks - at, a, &mut acc, &mut minima);
            }
            let sum = sum4(acc);
            part.put(row, channel, if F::SYMMETRIC { sum } else { sum - sum4(minima) });
        }
    }
}

/// Adds up to four blocks at `w` to the sums; codes, scales and sums are those of the activations there.
#[inline(always)]
unsafe fn four<F: Super>(
    w: *const u8,
    blocks: usize,
    a: (*const i8, *const f32, *const i16),
    acc: &mut __m128,
    minima: &mut __m128,
) {
    unsafe {
        let mut sums = [_mm512_setzero_si512(); 4];
        let (mut scale, mut minimum) = ([0f32; 4], [0f32; 4]);
        for at in 0..blocks {
            let b = F::unpack(w.add(at * F::BYTES));
            let words = _mm512_castsi256_si512(b.scales);
            let mut sum = _mm512_setzero_si512();
            for q in 0..4 {
                let codes = _mm512_loadu_si512(a.0.add(SUPER * at + 64 * q).cast());
                let pairs = _mm512_maddubs_epi16(b.codes[q], codes);
                sum = _mm512_dpwssd_epi32(sum, pairs, _mm512_permutexvar_epi16(scale_index::<F>(q), words));
            }
            let low = _mm256_madd_epi16(b.minima, _mm256_loadu_si256(a.2.add(16 * at).cast()));
            sums[at] = if F::SYMMETRIC {
                _mm512_sub_epi32(sum, _mm512_zextsi256_si512(low))
            } else {
                let sum = _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
                join(sum, low)
            };
            (scale[at], minimum[at]) = (b.scale, b.minimum);
        }
        let sums = add_quarters(sums[0], sums[1], sums[2], sums[3]);
        let (q0, q1) = (_mm512_castsi512_si128(sums), _mm512_extracti32x4_epi32(sums, 1));
        let (q2, q3) = (_mm512_extracti32x4_epi32(sums, 2), _mm512_extracti32x4_epi32(sums, 3));
        let (low, high) = (_mm_add_epi32(q0, q1), _mm_add_epi32(q2, q3));
        // The scales of activations are followed by as many zeros as this may read.
        let d = _mm_loadu_ps(a.1);
        let scale = _mm_mul_ps(_mm_loadu_ps(scale.as_ptr()), d);
        if F::SYMMETRIC {
            let sum = _mm_cvtepi32_ps(_mm_add_epi32(low, high));
            *acc = _mm_add_ps(*acc, _mm_mul_ps(sum, scale));
        } else {
            let minimum = _mm_mul_ps(_mm_loadu_ps(minimum.as_ptr()), d);
            *acc = _mm_add_ps(*acc, _mm_mul_ps(_mm_cvtepi32_ps(low), scale));
            *minima = _mm_add_ps(*minima, _mm_mul_ps(_mm_cvtepi32_ps(high), minimum));
        }
    }
}

/// Which scales belong to pairs of the codes from `64 * q` on.
#[inline(always)]
unsafe fn scale_index<F: Super>(q: usize) -> __m512i {
    let mut index = [0i16; 32];
    let (pairs, groups) = if F::PAIRED { (16, 2) } else { (8, 4) };
    for l in 0..32 {
        index[l] = (groups * q + l / pairs) as i16;
    }
    unsafe { _mm512_loadu_si512(index.as_ptr().cast()) }
}

/// One block of 256 of sixteen channels side by side.
struct SuperStrip {
    /// Four codes of each channel.
    codes: [Lanes<[u8; 4]>; 64],
    scales: [Lanes<i32>; 16],
    /// Minima of two groups.
    minima: [Lanes<[i16; 2]>; 8],
    scale: Lanes<f32>,
    minimum: Lanes<f32>,
}

impl SuperStrip {
    /// Unpacks block `at` of each channel; the last channel stands in for missing ones.
    #[inline(always)]
    unsafe fn fill<F: Super>(&mut self, part: &Part<'_>, at: usize) {
        unsafe {
            let mut codes = [[_mm512_setzero_si512(); CHANNELS]; 4];
            let mut scales = [_mm512_setzero_si512(); CHANNELS];
            let mut minima = scales;
            for c in 0..CHANNELS {
                let channel = c.min(part.channels - 1);
                let b = F::unpack(part.w.as_ptr().add(channel * part.row_bytes + at * F::BYTES));
                for q in 0..4 {
                    codes[q][c] = b.codes[q];
                }
                scales[c] = _mm512_cvtepi16_epi32(b.scales);
                minima[c] = _mm512_zextsi256_si512(b.minima);
                (self.scale.0[c], self.minimum.0[c]) = (b.scale, b.minimum);
            }
            for q in 0..4 {
                transpose(&mut codes[q]);
                for c in 0..CHANNELS {
                    self.codes[16 * q + c].store(codes[q][c]);
                }
            }
            transpose(&mut scales);
            transpose(&mut minima);
            for c in 0..CHANNELS {
                self.scales[c].store(scales[c]);
            }
            for c in 0..8 {
                self.minima[c].store(minima[c]);
            }
        }
    }

    /// Adds the products of `R` rows with the block, which is block `at` of the row, to one of four sums of each row and
    /// channel: that of every fourth block. Behind them lie those of minima.
    #[inline(always)]
    unsafe fn multiply<F: Super, const R: usize>(
        &self,
        rows: *const (*const i8, *const f32, *const f32),
        at: usize,
        sums: *mut [Lanes<f32>; 8],
    ) {
        unsafe {
            let groups = if F::PAIRED { 8 } else { 16 };
            let words = 64 / groups;
            let mut totals = [_mm512_setzero_si512(); R];
            for g in 0..groups {
                let mut dots = [_mm512_setzero_si512(); R];
                for j in g * words..(g + 1) * words {
                    let codes = self.codes[j].load();
                    for r in 0..R {
                        let a = word((*rows.add(r)).0.add(SUPER * at + 4 * j));
                        dots[r] = _mm512_dpbusd_epi32(dots[r], codes, a);
                    }
                }
                let scales = self.scales[g].load();
                for r in 0..R {
                    totals[r] = _mm512_add_epi32(totals[r], _mm512_mullo_epi32(dots[r], scales));
                }
            }
            let mut lows = [_mm512_setzero_si512(); R];
            for i in 0..8 {
                let minima = self.minima[i].load();
                for r in 0..R {
                    let group_sums = word((*rows.add(r)).2.cast::<i8>().add(32 * at + 4 * i));
                    lows[r] = _mm512_dpwssd_epi32(lows[r], minima, group_sums);
                }
            }
            for r in 0..R {
                let (sums, class) = (&mut *sums.add(r), at % 4);
                let d = _mm512_set1_ps(*(*rows.add(r)).1.add(at));
                let scale = _mm512_mul_ps(self.scale.load_ps(), d);
                let total = if F::SYMMETRIC { _mm512_sub_epi32(totals[r], lows[r]) } else { totals[r] };
                let mut acc = if at >= 4 { sums[class].load_ps() } else { _mm512_setzero_ps() };
                acc = _mm512_add_ps(acc, _mm512_mul_ps(_mm512_cvtepi32_ps(total), scale));
                sums[class].store(_mm512_castps_si512(acc));
                if !F::SYMMETRIC {
                    let minimum = _mm512_mul_ps(self.minimum.load_ps(), d);
                    let mut low = if at >= 4 { sums[4 + class].load_ps() } else { _mm512_setzero_ps() };
                    low = _mm512_add_ps(low, _mm512_mul_ps(_mm512_cvtepi32_ps(lows[r]), minimum));
                    sums[4 + class].store(_mm512_castps_si512(low));
                }
            }
        }
    }
}

/// As [`many_small`].
#[inline(always)]
unsafe fn many_super<F: Super>(part: &Part<'_>) {
    unsafe {
        let blocks = part.row_bytes / F::BYTES;
        let mut strip = std::mem::MaybeUninit::<SuperStrip>::uninit();
        // All bits are numbers; what is read was written before.
        let strip = &mut *strip.as_mut_ptr();
        let mut sums = std::mem::MaybeUninit::<[[Lanes<f32>; 8]; SHARING]>::uninit();
        let sums = sums.as_mut_ptr().cast::<[Lanes<f32>; 8]>();
        for first in (0..part.activations.rows).step_by(SHARING) {
            let (at, rows) = rows_of(part, first);
            for block in 0..blocks {
                strip.fill::<F>(part, block);
                in_tiles!(rows, |row, R| strip.multiply::<F, R>(at.as_ptr().add(row), block, sums.add(row)));
            }
            for row in 0..rows {
                let sums = &*sums.add(row);
                let mut sum = total(sums, 0, blocks);
                if !F::SYMMETRIC {
                    sum = _mm512_sub_ps(sum, total(sums, 4, blocks));
                }
                put_all(part, first + row, sum);
            }
        }
    }
}

/// A format of plain floats.
trait Plain {
    const BYTES: usize;
    /// The elements at `p` that `mask` names; the others are zero and not read.
    unsafe fn load(p: *const u8, mask: __mmask16) -> __m512;
}

struct F32;
impl Plain for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load(p: *const u8, mask: __mmask16) -> __m512 {
        unsafe { _mm512_maskz_loadu_ps(mask, p.cast()) }
    }
}

struct F16;
impl Plain for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load(p: *const u8, mask: __mmask16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p.cast())) }
    }
}

struct Bf16;
impl Plain for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load(p: *const u8, mask: __mmask16) -> __m512 {
        unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32(words, 16))
        }
    }
}

/// `C` channels times `R` rows.
#[inline(always)]
unsafe fn plain<F: Plain, const C: usize, const R: usize>(part: &Part<'_>, channel: usize, row: usize) {
    unsafe {
        let k = part.activations.k;
        let x: [*const f32; R] = std::array::from_fn(|r| part.activations.values(row + r).as_ptr());
        let w: [*const u8; C] = std::array::from_fn(|c| part.w.as_ptr().add((channel + c) * part.row_bytes));
        let mut acc = [[_mm512_setzero_ps(); R]; C];
        let mut at = 0;
        while at < k {
            let mask = if at + 16 <= k { !0 } else { ((1u32 << (k - at)) - 1) as __mmask16 };
            let mut a = [_mm512_setzero_ps(); R];
            for r in 0..R {
                a[r] = _mm512_maskz_loadu_ps(mask, x[r].add(at));
            }
            for c in 0..C {
                let values = F::load(w[c].add(at * F::BYTES), mask);
                for r in 0..R {
                    acc[c][r] = _mm512_fmadd_ps(values, a[r], acc[c][r]);
                }
            }
            at += 16;
        }
        for c in 0..C {
            for r in 0..R {
                part.put(row + r, channel + c, sum16(acc[c][r]));
            }
        }
    }
}
