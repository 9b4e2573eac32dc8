//! The layouts of blocks, in plain Rust: the reference that everything else is held against.

use half::{bf16, f16};
use lightering_units::BlockFormat;

/// Values of the 4-bit codes of IQ4_NL.
pub(super) const IQ4_NL_VALUES: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// Twice the values of the 4-bit floats of MXFP4.
pub(super) const MXFP4_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Elements of a block with scales of its groups.
pub(super) const SUPER: usize = 256;

/// What has to be taken off the codes of a block of 32, which are made unsigned.
pub(super) const fn offset(format: BlockFormat) -> u8 {
    match format {
        BlockFormat::Q4_0 => 8,
        BlockFormat::Q5_0 => 16,
        BlockFormat::Q8_0 | BlockFormat::IQ4_NL => 128,
        BlockFormat::MXFP4 => 12,
        _ => 0,
    }
}

#[inline(always)]
pub(super) fn half_at(block: &[u8], at: usize) -> f32 {
    half_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// The f16 of these bits, exactly, in operations that the compiler can do on many at once.
#[inline(always)]
pub(crate) fn half_to_f32(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    // Moves the exponent's bias from 15 to 127; right for subnormal numbers too.
    let finite = f32::from_bits(magnitude) * f32::from_bits(239 << 23);
    let special = bits & 0x7c00 == 0x7c00;
    let magnitude = if special { magnitude | 0x7f80_0000 } else { finite.to_bits() };
    f32::from_bits(magnitude | u32::from(bits & 0x8000) << 16)
}

/// `N` bytes from `at` on; arrays, because their loops become vector code.
#[inline(always)]
fn bytes<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..].first_chunk().expect("a block is whole")
}

/// The power of two that a byte without mantissa stands for, halved because the codes of MXFP4 are doubled.
#[inline(always)]
pub(super) fn half_power_of_two(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (u32::from(e) - 1) << 23 })
}

#[inline(always)]
fn nibbles(codes: &mut [u8; 32], packed: &[u8; 16]) {
    for i in 0..16 {
        codes[i] = packed[i] & 15;
    }
    for i in 0..16 {
        codes[i + 16] = packed[i] >> 4;
    }
}

#[inline(always)]
fn fifth_bits(codes: &mut [u8; 32], high: &[u8; 4]) {
    let high = u32::from_le_bytes(*high);
    for i in 0..32 {
        codes[i] |= ((high >> i & 1) << 4) as u8;
    }
}

/// Unpacks a block of 32 elements into unsigned codes; element `i` is `scale * (codes[i] - offset) + minimum`. Returns
/// scale and minimum.
#[inline(always)]
pub(super) fn unpack_small(format: BlockFormat, block: &[u8], codes: &mut [u8; 32]) -> (f32, f32) {
    match format {
        BlockFormat::Q4_0 => {
            nibbles(codes, bytes(block, 2));
            (half_at(block, 0), 0.0)
        }
        BlockFormat::Q4_1 => {
            nibbles(codes, bytes(block, 4));
            (half_at(block, 0), half_at(block, 2))
        }
        BlockFormat::Q5_0 => {
            nibbles(codes, bytes(block, 6));
            fifth_bits(codes, bytes(block, 2));
            (half_at(block, 0), 0.0)
        }
        BlockFormat::Q5_1 => {
            nibbles(codes, bytes(block, 8));
            fifth_bits(codes, bytes(block, 4));
            (half_at(block, 0), half_at(block, 2))
        }
        BlockFormat::Q8_0 => {
            let stored: &[u8; 32] = bytes(block, 2);
            for i in 0..32 {
                codes[i] = stored[i] ^ 0x80;
            }
            (half_at(block, 0), 0.0)
        }
        BlockFormat::IQ4_NL => {
            nibbles(codes, bytes(block, 2));
            codes.iter_mut().for_each(|c| *c = (IQ4_NL_VALUES[usize::from(*c)] as u8) ^ 0x80);
            (half_at(block, 0), 0.0)
        }
        BlockFormat::MXFP4 => {
            nibbles(codes, bytes(block, 1));
            codes.iter_mut().for_each(|c| *c = (MXFP4_VALUES[usize::from(*c)] + 12) as u8);
            (half_power_of_two(block[0]), 0.0)
        }
        _ => unreachable!("{format} has no blocks of 32"),
    }
}

/// A block of 256 elements: element `i` is `scale * scales[i / 16] * codes[i] - minimum * minima[i / 16]`.
pub(super) struct SuperBlock {
    pub(super) codes: [u8; SUPER],
    pub(super) scales: [i16; 16],
    pub(super) minima: [i16; 16],
    pub(super) scale: f32,
    pub(super) minimum: f32,
    /// The code of zero where the minima only stand for that.
    pub(super) zero: u8,
}

impl SuperBlock {
    pub(super) const EMPTY: SuperBlock =
        SuperBlock { codes: [0; SUPER], scales: [0; 16], minima: [0; 16], scale: 0.0, minimum: 0.0, zero: 0 };
}

/// The 8 scales and the 8 minima of Q4_K and Q5_K, 6 bits each, as bytes.
#[inline(always)]
pub(super) fn six_bit_pairs(packed: &[u8]) -> [u8; 16] {
    let word = |at: usize| u32::from_le_bytes([packed[at], packed[at + 1], packed[at + 2], packed[at + 3]]);
    let (a, b, c) = (word(0), word(4), word(8));
    let words = [
        a & 0x3f3f_3f3f,
        (c & 0x0f0f_0f0f) | ((a >> 6 & 0x0303_0303) << 4),
        b & 0x3f3f_3f3f,
        (c >> 4 & 0x0f0f_0f0f) | ((b >> 6 & 0x0303_0303) << 4),
    ];
    bytemuck::cast(words.map(u32::to_le))
}

/// The 16 scales of Q3_K, 6 bits each, still with their offset of 32.
#[inline(always)]
pub(super) fn six_bit_scales(packed: &[u8]) -> [u8; 16] {
    let word = |at: usize| u32::from_le_bytes([packed[at], packed[at + 1], packed[at + 2], packed[at + 3]]);
    let (a, b, high) = (word(0), word(4), word(8));
    let words = [
        (a & 0x0f0f_0f0f) | ((high & 0x0303_0303) << 4),
        (b & 0x0f0f_0f0f) | ((high >> 2 & 0x0303_0303) << 4),
        (a >> 4 & 0x0f0f_0f0f) | ((high >> 4 & 0x0303_0303) << 4),
        (b >> 4 & 0x0f0f_0f0f) | ((high >> 6 & 0x0303_0303) << 4),
    ];
    bytemuck::cast(words.map(u32::to_le))
}

/// Four codes of two bits a byte, 32 elements apart.
#[inline(always)]
fn two_bits(codes: &mut [u8; SUPER], packed: &[u8; 64]) {
    for (codes, packed) in codes.as_chunks_mut::<128>().0.iter_mut().zip(packed.as_chunks::<32>().0) {
        for (j, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for l in 0..32 {
                codes[l] = packed[l] >> (2 * j) & 3;
            }
        }
    }
}

/// Adds one bit for each element, those of 32 elements at the same place of as many bytes.
#[inline(always)]
fn one_bit(codes: &mut [u8; SUPER], packed: &[u8; 32], shift: u32) {
    for (j, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        for l in 0..32 {
            codes[l] |= (packed[l] >> j & 1) << shift;
        }
    }
}

/// Unpacks a block of 256 elements.
#[inline(always)]
pub(super) fn unpack_super(format: BlockFormat, block: &[u8], out: &mut SuperBlock) {
    let codes = &mut out.codes;
    match format {
        BlockFormat::Q2_K => {
            two_bits(codes, bytes(block, 16));
            for g in 0..16 {
                out.scales[g] = i16::from(block[g] & 15);
                out.minima[g] = i16::from(block[g] >> 4);
            }
            (out.scale, out.minimum, out.zero) = (half_at(block, 80), half_at(block, 82), 0);
        }
        BlockFormat::Q3_K => {
            two_bits(codes, bytes(block, 32));
            one_bit(codes, bytes(block, 0), 2);
            let scales = six_bit_scales(&block[96..108]);
            for g in 0..16 {
                out.scales[g] = i16::from(scales[g]) - 32;
                out.minima[g] = out.scales[g] * 4;
            }
            out.scale = half_at(block, 108);
            (out.minimum, out.zero) = (out.scale, 4);
        }
        BlockFormat::Q4_K | BlockFormat::Q5_K => {
            let low: &[u8; 128] = bytes(block, if format == BlockFormat::Q4_K { 16 } else { 48 });
            for (codes, low) in codes.as_chunks_mut::<64>().0.iter_mut().zip(low.as_chunks::<32>().0) {
                for l in 0..32 {
                    codes[l] = low[l] & 15;
                }
                for l in 0..32 {
                    codes[l + 32] = low[l] >> 4;
                }
            }
            if format == BlockFormat::Q5_K {
                one_bit(codes, bytes(block, 16), 4);
            }
            let pairs = six_bit_pairs(&block[4..16]);
            for g in 0..16 {
                out.scales[g] = i16::from(pairs[g / 2]);
                out.minima[g] = i16::from(pairs[8 + g / 2]);
            }
            (out.scale, out.minimum, out.zero) = (half_at(block, 0), half_at(block, 2), 0);
        }
        BlockFormat::Q6_K => {
            for (half, codes) in codes.as_chunks_mut::<128>().0.iter_mut().enumerate() {
                let (low, high) = (bytes::<64>(block, 64 * half), bytes::<32>(block, 128 + 32 * half));
                for (j, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                    let low: &[u8; 32] = bytes(low, j % 2 * 32);
                    for l in 0..32 {
                        codes[l] = low[l] >> (j / 2 * 4) & 15 | (high[l] >> (j * 2) & 3) << 4;
                    }
                }
            }
            for g in 0..16 {
                out.scales[g] = i16::from(block[192 + g] as i8);
                out.minima[g] = out.scales[g] * 32;
            }
            out.scale = half_at(block, 208);
            (out.minimum, out.zero) = (out.scale, 32);
        }
        _ => unreachable!("{format} has no blocks of 256"),
    }
}

/// Bytes of a row of `len` elements.
pub(super) fn checked_row_bytes(format: BlockFormat, len: usize) -> usize {
    format
        .row_bytes(len)
        .unwrap_or_else(|| panic!("a row of {len} elements is no whole number of {format} blocks"))
}

/// Decodes a row: `bytes` in `format` into as many f32 as `out` has. It is exact, or rounded as ggml rounds it.
///
/// # Panics
/// Panics when `out` is no whole number of blocks or `bytes` has not exactly the bytes of such a row.
pub fn dequantize_row(format: BlockFormat, bytes: &[u8], out: &mut [f32]) {
    let need = checked_row_bytes(format, out.len());
    assert_eq!(bytes.len(), need, "bytes of a row of {} {format} elements", out.len());
    match format {
        BlockFormat::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *o = f32::from_le_bytes(*b);
            }
        }
        BlockFormat::F16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *o = f16::from_le_bytes(*b).to_f32();
            }
        }
        BlockFormat::BF16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *o = bf16::from_le_bytes(*b).to_f32();
            }
        }
        _ if format.block_len() == 32 => {
            let zero = i16::from(offset(format));
            let mut codes = [0; 32];
            for (block, out) in bytes.chunks_exact(format.block_bytes()).zip(out.as_chunks_mut::<32>().0) {
                let (scale, minimum) = unpack_small(format, block, &mut codes);
                for i in 0..32 {
                    out[i] = scale * f32::from(i16::from(codes[i]) - zero);
                }
                if matches!(format, BlockFormat::Q4_1 | BlockFormat::Q5_1) {
                    out.iter_mut().for_each(|o| *o += minimum);
                }
            }
        }
        _ => {
            let mut b = SuperBlock::EMPTY;
            for (block, out) in bytes.chunks_exact(format.block_bytes()).zip(out.as_chunks_mut::<SUPER>().0) {
                unpack_super(format, block, &mut b);
                for g in 0..16 {
                    let scale = b.scale * f32::from(b.scales[g]);
                    let minimum = b.minimum * f32::from(b.minima[g]);
                    for i in 16 * g..16 * g + 16 {
                        out[i] = if b.zero > 0 {
                            scale * f32::from(i16::from(b.codes[i]) - i16::from(b.zero))
                        } else {
                            scale * f32::from(b.codes[i]) - minimum
                        };
                    }
                }
            }
        }
    }
}
