//! Products with 256-bit vectors.

use std::arch::x86_64::*;

use lightering_units::BlockFormat;

use super::unpack::{SuperBlock, offset, six_bit_pairs, unpack_small, unpack_super};
use super::{Part, SUPER, TILE, sum4};
use crate::arch::Avx2;

/// Computes the part, if its weights are quantised and this processor has the instructions.
pub(super) fn run(part: &Part<'_>) -> bool {
    if part.format.is_plain() || Avx2::detect().is_none() {
        return false;
    }
    // SAFETY: the features were detected; the part's slices hold what its shape says, see `matmul`.
    unsafe { all_rows(part) };
    true
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn all_rows(part: &Part<'_>) {
    // With the format as a constant each has unpacking code of its own, without choices inside.
    macro_rules! rows {
        ($tile:ident: $($format:ident),*) => {
            match part.format {
                $(BlockFormat::$format => {
                    let (rows, mut row) = (part.activations.rows, 0);
                    while row + TILE <= rows {
                        // SAFETY: as the caller's.
                        unsafe { $tile::<TILE>(part, BlockFormat::$format, row) };
                        row += TILE;
                    }
                    while row < rows {
                        // SAFETY: as the caller's.
                        unsafe { $tile::<1>(part, BlockFormat::$format, row) };
                        row += 1;
                    }
                })*
                _ => {}
            }
        };
    }
    rows!(small: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, MXFP4);
    rows!(super_blocks: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K);
}

// SAFETY of every unsafe function and block below: they are only reached from `run`, behind the detection, and are
// inlined into a function with the features; activations are padded to whole groups of blocks.

#[inline(always)]
unsafe fn to_array(v: __m128) -> [f32; 4] {
    let mut out = [0f32; 4];
    unsafe { _mm_storeu_ps(out.as_mut_ptr(), v) };
    out
}

/// The sum of each of four vectors.
#[inline(always)]
unsafe fn sums(v: [__m256i; 4]) -> __m128i {
    unsafe {
        let pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
        _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1))
    }
}

#[inline(always)]
unsafe fn half_of(block: &[u8], at: usize) -> f32 {
    let bits = u16::from_le_bytes([block[at], block[at + 1]]);
    unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits)))) }
}

#[inline(always)]
unsafe fn load(block: &[u8], at: usize) -> __m256i {
    unsafe { _mm256_loadu_si256(block[at..at + 32].as_ptr().cast()) }
}

#[inline(always)]
unsafe fn low_bits(v: __m256i) -> __m256i {
    unsafe { _mm256_and_si256(v, _mm256_set1_epi8(15)) }
}

#[inline(always)]
unsafe fn high_bits(v: __m256i) -> __m256i {
    unsafe { _mm256_and_si256(v, _mm256_set1_epi8(0x30)) }
}

/// The lower halves of 16 bytes, then their upper halves.
#[inline(always)]
unsafe fn nibbles(block: &[u8], at: usize) -> __m256i {
    unsafe {
        let packed = _mm_loadu_si128(block[at..at + 16].as_ptr().cast());
        low_bits(_mm256_set_m128i(_mm_srli_epi16(packed, 4), packed))
    }
}

/// Byte `i` is 16 where bit `i` is set.
#[inline(always)]
unsafe fn fifth_bits(block: &[u8], at: usize) -> __m256i {
    unsafe {
        let bits = i32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
        let spread =
            _mm256_set_epi64x(0x0303_0303_0303_0303, 0x0202_0202_0202_0202, 0x0101_0101_0101_0101, 0);
        let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), spread);
        let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
        _mm256_and_si256(set, _mm256_set1_epi8(16))
    }
}

/// 32 unsigned codes of a small block, as [`unpack_small`] gives them; scale and minimum.
#[inline(always)]
unsafe fn unpack(format: BlockFormat, block: &[u8]) -> (__m256i, f32, f32) {
    unsafe {
        match format {
            BlockFormat::Q4_0 => (nibbles(block, 2), half_of(block, 0), 0.0),
            BlockFormat::Q4_1 => (nibbles(block, 4), half_of(block, 0), half_of(block, 2)),
            BlockFormat::Q5_0 => {
                (_mm256_or_si256(nibbles(block, 6), fifth_bits(block, 2)), half_of(block, 0), 0.0)
            }
            BlockFormat::Q5_1 => (
                _mm256_or_si256(nibbles(block, 8), fifth_bits(block, 4)),
                half_of(block, 0),
                half_of(block, 2),
            ),
            BlockFormat::Q8_0 => {
                let codes = _mm256_loadu_si256(block[2..34].as_ptr().cast());
                (_mm256_xor_si256(codes, _mm256_set1_epi8(-128)), half_of(block, 0), 0.0)
            }
            _ => {
                let mut codes = [0u8; 32];
                let (scale, minimum) = unpack_small(format, block, &mut codes);
                (_mm256_loadu_si256(codes.as_ptr().cast()), scale, minimum)
            }
        }
    }
}

/// As [`unpack_super`], with vectors for the codes of the most common formats.
#[inline(always)]
unsafe fn unpack_codes(format: BlockFormat, block: &[u8], b: &mut SuperBlock) {
    unsafe {
        let codes = b.codes.as_mut_ptr();
        match format {
            BlockFormat::Q4_K | BlockFormat::Q5_K => {
                let pairs = six_bit_pairs(&block[4..16]);
                let pairs = _mm_loadu_si128(pairs.as_ptr().cast());
                let scales = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(pairs, pairs));
                let minima = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(pairs, pairs));
                _mm256_storeu_si256(b.scales.as_mut_ptr().cast(), scales);
                _mm256_storeu_si256(b.minima.as_mut_ptr().cast(), minima);
                (b.scale, b.minimum, b.zero) = (half_of(block, 0), half_of(block, 2), 0);
                let with_fifth = format == BlockFormat::Q5_K;
                let from = if with_fifth { 48 } else { 16 };
                let mut high = load(block, 16);
                let fifth = _mm256_set1_epi8(16);
                for c in 0..4 {
                    let packed = load(block, from + 32 * c);
                    let mut first = low_bits(packed);
                    let mut second = low_bits(_mm256_srli_epi16(packed, 4));
                    if with_fifth {
                        first = _mm256_or_si256(first, _mm256_and_si256(_mm256_slli_epi16(high, 4), fifth));
                        second = _mm256_or_si256(second, _mm256_and_si256(_mm256_slli_epi16(high, 3), fifth));
                        high = _mm256_srli_epi16(high, 2);
                    }
                    _mm256_storeu_si256(codes.add(64 * c).cast(), first);
                    _mm256_storeu_si256(codes.add(64 * c + 32).cast(), second);
                }
            }
            BlockFormat::Q6_K => {
                let scales = _mm256_cvtepi8_epi16(_mm_loadu_si128(block[192..208].as_ptr().cast()));
                _mm256_storeu_si256(b.scales.as_mut_ptr().cast(), scales);
                _mm256_storeu_si256(b.minima.as_mut_ptr().cast(), _mm256_slli_epi16(scales, 5));
                b.scale = half_of(block, 208);
                (b.minimum, b.zero) = (b.scale, 32);
                for h in 0..2 {
                    let (p, q, high) =
                        (load(block, 64 * h), load(block, 64 * h + 32), load(block, 128 + 32 * h));
                    let quarters = [
                        (low_bits(p), high_bits(_mm256_slli_epi16(high, 4))),
                        (low_bits(q), high_bits(_mm256_slli_epi16(high, 2))),
                        (low_bits(_mm256_srli_epi16(p, 4)), high_bits(high)),
                        (low_bits(_mm256_srli_epi16(q, 4)), high_bits(_mm256_srli_epi16(high, 2))),
                    ];
                    for (i, (low, high)) in quarters.into_iter().enumerate() {
                        _mm256_storeu_si256(codes.add(128 * h + 32 * i).cast(), _mm256_or_si256(low, high));
                    }
                }
            }
            _ => unpack_super(format, block, b),
        }
    }
}

/// The products of `R` rows with all channels, four blocks at a time.
#[inline(always)]
unsafe fn small<const R: usize>(part: &Part<'_>, format: BlockFormat, row: usize) {
    unsafe {
        let with_minimum = matches!(format, BlockFormat::Q4_1 | BlockFormat::Q5_1);
        let parts: [_; R] = std::array::from_fn(|r| part.activations.parts(row + r));
        let zero = _mm256_set1_epi8(offset(format) as i8);
        let bytes = format.block_bytes();
        for channel in 0..part.channels {
            let w = &part.w[channel * part.row_bytes..][..part.row_bytes];
            let mut acc = [_mm_setzero_ps(); R];
            let mut minima = acc;
            for (group, blocks) in w.chunks(4 * bytes).enumerate() {
                let at = 4 * group;
                let mut codes = [_mm256_setzero_si256(); 4];
                let (mut scales, mut lows) = ([0f32; 4], [0f32; 4]);
                for (b, block) in blocks.chunks_exact(bytes).enumerate() {
                    let unpacked;
                    (unpacked, scales[b], lows[b]) = unpack(format, block);
                    codes[b] = _mm256_sub_epi8(unpacked, zero);
                }
                let scales = _mm_loadu_ps(scales.as_ptr());
                for r in 0..R {
                    let (a, d, group_sums) = parts[r];
                    let mut dots = [_mm256_setzero_si256(); 4];
                    for b in 0..4 {
                        let a = _mm256_loadu_si256(a[32 * (at + b)..][..32].as_ptr().cast());
                        // Magnitudes of at most 128 times 127, so that pairs do not saturate.
                        let (size, a) = (_mm256_abs_epi8(codes[b]), _mm256_sign_epi8(a, codes[b]));
                        dots[b] = _mm256_madd_epi16(_mm256_maddubs_epi16(size, a), _mm256_set1_epi16(1));
                    }
                    let d = _mm_loadu_ps(d[at..][..4].as_ptr());
                    let products = _mm_mul_ps(_mm_cvtepi32_ps(sums(dots)), _mm_mul_ps(scales, d));
                    acc[r] = _mm_add_ps(acc[r], products);
                    if with_minimum {
                        let low = _mm_mul_ps(_mm_loadu_ps(lows.as_ptr()), d);
                        let low = _mm_mul_ps(low, _mm_loadu_ps(group_sums[at..][..4].as_ptr()));
                        minima[r] = _mm_add_ps(minima[r], low);
                    }
                }
            }
            for r in 0..R {
                let sum = sum4(&to_array(acc[r]));
                part.put(row + r, channel, if with_minimum { sum + sum4(&to_array(minima[r])) } else { sum });
            }
        }
    }
}

/// The products of `R` rows with all channels.
#[inline(always)]
unsafe fn super_blocks<const R: usize>(part: &Part<'_>, format: BlockFormat, row: usize) {
    unsafe {
        let symmetric = matches!(format, BlockFormat::Q3_K | BlockFormat::Q6_K);
        let parts: [_; R] = std::array::from_fn(|r| part.activations.parts(row + r));
        let mut b = SuperBlock::EMPTY;
        for channel in 0..part.channels {
            let w = &part.w[channel * part.row_bytes..][..part.row_bytes];
            let mut acc = [[0f32; 4]; R];
            let mut minima = [[0f32; 4]; R];
            for (at, block) in w.chunks_exact(format.block_bytes()).enumerate() {
                unpack_codes(format, block, &mut b);
                let mut totals = [_mm256_setzero_si256(); R];
                for c in 0..8 {
                    let codes = _mm256_loadu_si256(b.codes[32 * c..][..32].as_ptr().cast());
                    let scales = _mm256_set_m128i(
                        _mm_set1_epi16(b.scales[2 * c + 1]),
                        _mm_set1_epi16(b.scales[2 * c]),
                    );
                    for r in 0..R {
                        let a = parts[r].0[SUPER * at + 32 * c..][..32].as_ptr();
                        let pairs = _mm256_maddubs_epi16(codes, _mm256_loadu_si256(a.cast()));
                        totals[r] = _mm256_add_epi32(totals[r], _mm256_madd_epi16(pairs, scales));
                    }
                }
                let low = _mm256_loadu_si256(b.minima.as_ptr().cast());
                for r in 0..R {
                    let (_, d, group_sums) = parts[r];
                    let group_sums: &[i16] = &bytemuck::cast_slice(group_sums)[16 * at..16 * at + 16];
                    let low = _mm256_madd_epi16(low, _mm256_loadu_si256(group_sums.as_ptr().cast()));
                    let none = _mm256_setzero_si256();
                    let both = sums([totals[r], low, none, none]);
                    let (mut total, low) = (_mm_cvtsi128_si32(both), _mm_extract_epi32(both, 1));
                    if symmetric {
                        total -= low;
                    } else {
                        minima[r][at % 4] += low as f32 * (b.minimum * d[at]);
                    }
                    acc[r][at % 4] += total as f32 * (b.scale * d[at]);
                }
            }
            for r in 0..R {
                let sum = sum4(&acc[r]);
                part.put(row + r, channel, if symmetric { sum } else { sum - sum4(&minima[r]) });
            }
        }
    }
}
