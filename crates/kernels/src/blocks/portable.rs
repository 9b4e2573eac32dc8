//! Products in plain Rust: what the vector code must match bit for bit. Compiled for each instruction set.

use lightering_units::BlockFormat;

use super::unpack::{SuperBlock, half_to_f32, offset, unpack_small, unpack_super};
use super::{Part, SUPER, TILE, sum4, sum16};
use crate::arch::{Kernel, Simd};

pub(super) struct Products<'a, 'b>(pub(super) &'a Part<'b>);

impl Kernel for Products<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let part = self.0;
        let rows = part.activations.rows;
        for row in (0..rows).step_by(TILE) {
            if row + TILE <= rows {
                tile::<TILE>(part, row);
            } else {
                // A closure would not take on the instruction set.
                for row in row..rows {
                    tile::<1>(part, row);
                }
            }
        }
    }
}

#[inline(always)]
fn tile<const R: usize>(part: &Part<'_>, row: usize) {
    for channel in 0..part.channels {
        let w = &part.w[channel * part.row_bytes..][..part.row_bytes];
        let sums = match part.format.block_len() {
            1 => plain::<R>(part, w, row),
            32 => small::<R>(part, w, row),
            _ => super_blocks::<R>(part, w, row),
        };
        for r in 0..R {
            part.put(row + r, channel, sums[r]);
        }
    }
}

/// Sums of four products each.
#[inline(always)]
fn dot(codes: &[i16; 64], a: &[i8]) -> [i32; 16] {
    let a = &a[..64];
    let mut sums = [0; 16];
    for l in 0..16 {
        for j in 0..4 {
            sums[l] += i32::from(codes[4 * l + j]) * i32::from(a[4 * l + j]);
        }
    }
    sums
}

#[inline(always)]
fn small<const R: usize>(part: &Part<'_>, w: &[u8], row: usize) -> [f32; R] {
    let format = part.format;
    let zero = i16::from(offset(format));
    let with_minimum = matches!(format, BlockFormat::Q4_1 | BlockFormat::Q5_1);
    let mut blocks = w.chunks_exact(format.block_bytes());
    let parts: [_; R] = std::array::from_fn(|r| part.activations.parts(row + r));
    let mut acc = [[0f32; 4]; R];
    let mut minima = [[0f32; 4]; R];
    for first in (0..part.activations.quantized.padded / 32).step_by(2) {
        let mut codes = [0i16; 64];
        let (mut scales, mut lows) = ([0f32; 2], [0f32; 2]);
        for b in 0..2 {
            let mut bytes = [0u8; 32];
            // What lies past the row has a scale of zero.
            let Some(block) = blocks.next() else { continue };
            (scales[b], lows[b]) = unpack_small(format, block, &mut bytes);
            for i in 0..32 {
                codes[32 * b + i] = i16::from(bytes[i]) - zero;
            }
        }
        for r in 0..R {
            let (a, d, group_sums) = parts[r];
            let sums = dot(&codes, &a[32 * first..]);
            for b in 0..2 {
                let (sum, d) = (sums[8 * b..8 * b + 8].iter().sum::<i32>(), d[first + b]);
                acc[r][(first + b) % 4] += sum as f32 * (scales[b] * d);
                if with_minimum {
                    minima[r][(first + b) % 4] += (lows[b] * d) * group_sums[first + b];
                }
            }
        }
    }
    std::array::from_fn(|r| if with_minimum { sum4(&acc[r]) + sum4(&minima[r]) } else { sum4(&acc[r]) })
}

#[inline(always)]
fn super_blocks<const R: usize>(part: &Part<'_>, w: &[u8], row: usize) -> [f32; R] {
    let parts: [_; R] = std::array::from_fn(|r| part.activations.parts(row + r));
    let mut acc = [[0f32; 4]; R];
    let mut minima = [[0f32; 4]; R];
    let mut b = SuperBlock::EMPTY;
    for (at, block) in w.chunks_exact(part.format.block_bytes()).enumerate() {
        unpack_super(part.format, block, &mut b);
        for r in 0..R {
            let (a, d, sums) = parts[r];
            let a = &a[SUPER * at..SUPER * at + SUPER];
            let group_sums: &[i16] = &bytemuck::cast_slice(sums)[16 * at..16 * at + 16];
            let mut lanes = [0i32; 16];
            for c in 0..4 {
                let mut codes = [0i16; 64];
                for i in 0..64 {
                    codes[i] = i16::from(b.codes[64 * c + i]);
                }
                let sums = dot(&codes, &a[64 * c..]);
                for l in 0..16 {
                    lanes[l] += sums[l] * i32::from(b.scales[4 * c + l / 4]);
                }
            }
            let mut total: i32 = lanes.iter().sum();
            let low: i32 = (0..16).map(|g| i32::from(b.minima[g]) * i32::from(group_sums[g])).sum();
            if b.zero > 0 {
                total -= low;
            } else {
                minima[r][at % 4] += low as f32 * (b.minimum * d[at]);
            }
            acc[r][at % 4] += total as f32 * (b.scale * d[at]);
        }
    }
    std::array::from_fn(|r| if b.zero > 0 { sum4(&acc[r]) } else { sum4(&acc[r]) - sum4(&minima[r]) })
}

#[inline(always)]
fn plain<const R: usize>(part: &Part<'_>, w: &[u8], row: usize) -> [f32; R] {
    let k = part.activations.k;
    let size = part.format.block_bytes();
    let mut acc = [[0f32; 16]; R];
    for at in (0..k).step_by(16) {
        let len = 16.min(k - at);
        let mut bytes = [0u8; 64];
        let stored = &w[at * size..(at + len) * size];
        bytes[..stored.len()].copy_from_slice(stored);
        let mut values = [0f32; 16];
        match part.format {
            BlockFormat::F32 => {
                for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                    *value = f32::from_le_bytes(*bytes);
                }
            }
            BlockFormat::F16 => {
                for i in 0..16 {
                    values[i] = half_to_f32(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]));
                }
            }
            _ => {
                for i in 0..16 {
                    values[i] = f32::from_bits(u32::from_le_bytes([0, 0, bytes[2 * i], bytes[2 * i + 1]]));
                }
            }
        }
        for r in 0..R {
            let mut padded = [0f32; 16];
            padded[..len].copy_from_slice(&part.activations.values(row + r)[at..][..len]);
            for l in 0..16 {
                acc[r][l] = values[l].mul_add(padded[l], acc[r][l]);
            }
        }
    }
    std::array::from_fn(|r| sum16(&acc[r]))
}
