//! Products with the byte dot product of AVX-512.

use std::arch::x86_64::*;
use std::sync::OnceLock;

use lightering_units::BlockFormat;

use super::unpack::{IQ4_NL_VALUES, MXFP4_VALUES, offset, six_bit_pairs, six_bit_scales};
use super::{Part, SUPER, TILE};
use crate::arch::Avx512;

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

macro_rules! over_rows {
    ($part:ident, $tile:ident, $format:ident) => {{
        let rows = $part.activations.rows;
        let mut row = 0;
        while row + 2 * TILE <= rows {
            // SAFETY: as the caller's.
            unsafe { $tile::<$format, { 2 * TILE }>($part, row) };
            row += 2 * TILE;
        }
        while row + TILE <= rows {
            // SAFETY: as the caller's.
            unsafe { $tile::<$format, TILE>($part, row) };
            row += TILE;
        }
        while row < rows {
            // SAFETY: as the caller's.
            unsafe { $tile::<$format, 1>($part, row) };
            row += 1;
        }
    }};
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,avx2,fma")]
unsafe fn small_rows<F: Small>(part: &Part<'_>) {
    over_rows!(part, small, F)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,avx2,fma")]
unsafe fn super_rows<F: Super>(part: &Part<'_>) {
    over_rows!(part, super_blocks, F)
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

/// Sixteen f16 at a distance of `stride` bytes.
#[inline(always)]
unsafe fn halves(p: *const u8, stride: usize) -> __m512 {
    unsafe {
        let h = |i: usize| i64::from(p.add(i * stride).cast::<u16>().read_unaligned());
        let quad = |i: usize| h(i) | h(i + 1) << 16 | h(i + 2) << 32 | h(i + 3) << 48;
        _mm512_cvtph_ps(_mm256_set_epi64x(quad(12), quad(8), quad(4), quad(0)))
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

/// Adds sixteen blocks at `w` to the sums; `at` is the first of them.
#[inline(always)]
unsafe fn sixteen<F: Small, const R: usize>(
    w: *const u8,
    at: usize,
    parts: &[(*const i8, *const f32, *const f32); R],
    acc: &mut [__m512; R],
    minima: &mut [__m512; R],
) {
    unsafe {
        let bytes = F::FORMAT.block_bytes();
        let scales = if matches!(F::FORMAT, BlockFormat::MXFP4) {
            half_powers_of_two(w, bytes)
        } else {
            halves(w, bytes)
        };
        let mut products = [_mm512_setzero_ps(); R];
        for r in 0..R {
            products[r] = _mm512_mul_ps(scales, _mm512_loadu_ps(parts[r].1.add(at)));
        }
        if F::MINIMUM {
            let low = halves(w.add(2), bytes);
            for r in 0..R {
                let m = _mm512_mul_ps(low, _mm512_loadu_ps(parts[r].1.add(at)));
                let m = _mm512_mul_ps(m, _mm512_loadu_ps(parts[r].2.add(at)));
                minima[r] = _mm512_add_ps(minima[r], m);
            }
        }
        let zero = _mm512_set1_epi8(offset(F::FORMAT) as i8);
        let mut pair = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
        for p in 0..8 {
            let codes = F::codes(w.add(2 * p * bytes));
            let signed = _mm512_sub_epi8(codes, zero);
            let magnitudes = _mm512_abs_epi8(signed);
            let negative = _mm512_movepi8_mask(signed);
            for r in 0..R {
                let a = _mm512_loadu_si512(parts[r].0.add(32 * at + 64 * p).cast());
                let none = _mm512_setzero_si512();
                // Both ways give the same integers; which one costs less depends on how often the codes are used.
                let sums = if F::MINIMUM {
                    _mm512_dpbusd_epi32(none, codes, a)
                } else if R == 1 {
                    _mm512_sub_epi32(_mm512_dpbusd_epi32(none, codes, a), _mm512_dpbusd_epi32(none, zero, a))
                } else {
                    _mm512_dpbusd_epi32(none, magnitudes, _mm512_mask_sub_epi8(a, negative, none, a))
                };
                let scale = _mm512_permutexvar_ps(pair, products[r]);
                acc[r] = _mm512_add_ps(acc[r], _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale));
            }
            pair = _mm512_add_epi32(pair, _mm512_set1_epi32(2));
        }
    }
}

#[inline(always)]
unsafe fn small<F: Small, const R: usize>(part: &Part<'_>, row: usize) {
    unsafe {
        let bytes = F::FORMAT.block_bytes();
        let blocks = part.row_bytes / bytes;
        let parts: [_; R] = std::array::from_fn(|r| {
            let (codes, scales, sums) = part.activations.parts(row + r);
            (codes.as_ptr(), scales.as_ptr(), sums.as_ptr())
        });
        for channel in 0..part.channels {
            let w = part.w.as_ptr().add(channel * part.row_bytes);
            let mut acc = [_mm512_setzero_ps(); R];
            let mut minima = acc;
            let mut at = 0;
            while at + 16 <= blocks {
                sixteen::<F, R>(w.add(at * bytes), at, &parts, &mut acc, &mut minima);
                at += 16;
            }
            if at < blocks {
                // The rest of the row, with blocks behind it whose scale is zero as that of the activations there.
                let mut rest = [0u8; 16 * 34];
                let left = (blocks - at) * bytes;
                std::ptr::copy_nonoverlapping(w.add(at * bytes), rest.as_mut_ptr(), left);
                sixteen::<F, R>(rest.as_ptr(), at, &parts, &mut acc, &mut minima);
            }
            for r in 0..R {
                let sum = sum16(acc[r]);
                part.put(row + r, channel, if F::MINIMUM { sum + sum16(minima[r]) } else { sum });
            }
        }
    }
}

/// A block of 256 in registers.
struct Unpacked {
    codes: [__m512i; 4],
    /// Scales of 16 groups; of 8 where `PAIRED`.
    scales: __m512i,
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

#[inline(always)]
unsafe fn scale_pairs(p: *const u8) -> (__m512i, __m256i) {
    unsafe {
        let pairs = six_bit_pairs(&*p.cast::<[u8; 12]>());
        let pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(pairs.as_ptr().cast()));
        let minima = _mm512_extracti64x4_epi64(pairs, 1);
        (pairs, _mm256_or_si256(minima, _mm256_slli_epi32(minima, 16)))
    }
}

struct Q2K;
impl Super for Q2K {
    const BYTES: usize = 84;
    const PAIRED: bool = false;
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
                scales: _mm512_cvtepu8_epi32(_mm_and_si128(packed, low)),
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
                scales: _mm512_cvtepi8_epi32(scales),
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
                scales: _mm512_cvtepi8_epi32(scales),
                minima: _mm256_slli_epi16(_mm256_cvtepi8_epi16(scales), 5),
                scale,
                minimum: scale,
            }
        }
    }
}

#[inline(always)]
unsafe fn super_blocks<F: Super, const R: usize>(part: &Part<'_>, row: usize) {
    unsafe {
        let blocks = part.row_bytes / F::BYTES;
        let parts: [(*const i8, *const f32, *const i16); R] = std::array::from_fn(|r| {
            let (codes, scales, sums) = part.activations.parts(row + r);
            (codes.as_ptr(), scales.as_ptr(), sums.as_ptr().cast())
        });
        let lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        let (base, step) =
            if F::PAIRED { (_mm512_srli_epi32(lanes, 3), 2) } else { (_mm512_srli_epi32(lanes, 2), 4) };
        for channel in 0..part.channels {
            let w = part.w.as_ptr().add(channel * part.row_bytes);
            let mut acc = [_mm512_setzero_ps(); R];
            let mut minima = [_mm256_setzero_ps(); R];
            for at in 0..blocks {
                let b = F::unpack(w.add(at * F::BYTES));
                let mut sums = [_mm512_setzero_si512(); R];
                for c in 0..4 {
                    let index = _mm512_add_epi32(base, _mm512_set1_epi32(step * c as i32));
                    let scale = _mm512_permutexvar_epi32(index, b.scales);
                    for r in 0..R {
                        let a = _mm512_loadu_si512(parts[r].0.add(SUPER * at + 64 * c).cast());
                        let dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), b.codes[c], a);
                        sums[r] = _mm512_add_epi32(sums[r], _mm512_mullo_epi32(dot, scale));
                    }
                }
                for r in 0..R {
                    let d = *parts[r].1.add(at);
                    let scale = _mm512_set1_ps(b.scale * d);
                    acc[r] = _mm512_add_ps(acc[r], _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r]), scale));
                    let groups = _mm256_loadu_si256(parts[r].2.add(16 * at).cast());
                    let low = _mm256_cvtepi32_ps(_mm256_madd_epi16(b.minima, groups));
                    let low = _mm256_mul_ps(low, _mm256_set1_ps(b.minimum * d));
                    minima[r] = _mm256_add_ps(minima[r], low);
                }
            }
            for r in 0..R {
                part.put(row + r, channel, sum16(acc[r]) - sum8(minima[r]));
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
