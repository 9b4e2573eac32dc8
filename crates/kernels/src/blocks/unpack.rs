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

pub(super) fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The power of two that a byte without mantissa stands for, halved because the codes of MXFP4 are doubled.
#[inline(always)]
pub(super) fn half_power_of_two(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (u32::from(e) - 1) << 23 })
}

/// Unpacks a block of 32 elements into unsigned codes; element `i` is `scale * (codes[i] - offset) + minimum`. Returns
/// scale and minimum.
#[inline(always)]
pub(super) fn unpack_small(format: BlockFormat, block: &[u8], codes: &mut [u8; 32]) -> (f32, f32) {
    let nibbles = |codes: &mut [u8; 32], packed: &[u8]| {
        for i in 0..16 {
            codes[i] = packed[i] & 15;
            codes[i + 16] = packed[i] >> 4;
        }
    };
    let fifth_bits = |codes: &mut [u8; 32], high: &[u8]| {
        for i in 0..32 {
            codes[i] |= (high[i / 8] >> (i % 8) & 1) << 4;
        }
    };
    match format {
        BlockFormat::Q4_0 => {
            nibbles(codes, &block[2..18]);
            (half_at(block, 0), 0.0)
        }
        BlockFormat::Q4_1 => {
            nibbles(codes, &block[4..20]);
            (half_at(block, 0), half_at(block, 2))
        }
        BlockFormat::Q5_0 => {
            nibbles(codes, &block[6..22]);
            fifth_bits(codes, &block[2..6]);
            (half_at(block, 0), 0.0)
        }
        BlockFormat::Q5_1 => {
            nibbles(codes, &block[8..24]);
            fifth_bits(codes, &block[4..8]);
            (half_at(block, 0), half_at(block, 2))
        }
        BlockFormat::Q8_0 => {
            for i in 0..32 {
                codes[i] = block[2 + i] ^ 0x80;
            }
            (half_at(block, 0), 0.0)
        }
        BlockFormat::IQ4_NL => {
            nibbles(codes, &block[2..18]);
            codes.iter_mut().for_each(|c| *c = (IQ4_NL_VALUES[usize::from(*c)] as u8) ^ 0x80);
            (half_at(block, 0), 0.0)
        }
        BlockFormat::MXFP4 => {
            nibbles(codes, &block[1..17]);
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

/// Unpacks a block of 256 elements.
#[inline(always)]
pub(super) fn unpack_super(format: BlockFormat, block: &[u8], out: &mut SuperBlock) {
    let codes = &mut out.codes;
    match format {
        BlockFormat::Q2_K => {
            for i in 0..SUPER {
                codes[i] = block[16 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
            }
            for g in 0..16 {
                out.scales[g] = i16::from(block[g] & 15);
                out.minima[g] = i16::from(block[g] >> 4);
            }
            (out.scale, out.minimum, out.zero) = (half_at(block, 80), half_at(block, 82), 0);
        }
        BlockFormat::Q3_K => {
            for i in 0..SUPER {
                let low = block[32 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
                codes[i] = low | (block[i % 32] >> (i / 32) & 1) << 2;
            }
            let scales = six_bit_scales(&block[96..108]);
            for g in 0..16 {
                out.scales[g] = i16::from(scales[g]) - 32;
                out.minima[g] = out.scales[g] * 4;
            }
            out.scale = half_at(block, 108);
            (out.minimum, out.zero) = (out.scale, 4);
        }
        BlockFormat::Q4_K | BlockFormat::Q5_K => {
            let low = if format == BlockFormat::Q4_K { &block[16..144] } else { &block[48..176] };
            for i in 0..SUPER {
                codes[i] = low[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
            }
            if format == BlockFormat::Q5_K {
                for i in 0..SUPER {
                    codes[i] |= (block[16 + i % 32] >> (i / 32) & 1) << 4;
                }
            }
            let pairs = six_bit_pairs(&block[4..16]);
            for g in 0..16 {
                out.scales[g] = i16::from(pairs[g / 2]);
                out.minima[g] = i16::from(pairs[8 + g / 2]);
            }
            (out.scale, out.minimum, out.zero) = (half_at(block, 0), half_at(block, 2), 0);
        }
        BlockFormat::Q6_K => {
            for i in 0..SUPER {
                let (half, j, l) = (i / 128, i / 32 % 4, i % 32);
                let low = block[half * 64 + j % 2 * 32 + l] >> (j / 2 * 4) & 15;
                codes[i] = low | (block[128 + half * 32 + l] >> (j * 2) & 3) << 4;
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
