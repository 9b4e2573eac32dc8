//! Encoding of rows.

use half::{bf16, f16};
use lightering_units::BlockFormat;

use super::unpack::{SUPER, checked_row_bytes, six_bit_pairs};

/// True for the formats that [`quantize_row`] writes.
pub fn can_quantize(format: BlockFormat) -> bool {
    use BlockFormat::*;
    matches!(format, F32 | F16 | BF16 | Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Q2_K | Q3_K | Q4_K | Q5_K | Q6_K)
}

/// Encodes a row of finite values in `format`.
///
/// The formats of 32 elements take the scale that the largest element asks for, as ggml does. Those of 256 search the
/// scales of their groups for the least error, weighted as in ggml's reference (`make_qkx2_quants`, `make_q3_quants` and
/// `make_qx_quants` of ggml-quants.c).
///
/// # Panics
/// Panics when `x` is no whole number of blocks, `out` has not exactly the bytes of such a row, or
/// [`can_quantize`] is false.
pub fn quantize_row(format: BlockFormat, x: &[f32], out: &mut [u8]) {
    let need = checked_row_bytes(format, x.len());
    assert_eq!(out.len(), need, "bytes of a row of {} {format} elements", x.len());
    assert!(can_quantize(format), "{format} cannot be written");
    match format {
        BlockFormat::F32 => {
            for (o, x) in out.as_chunks_mut().0.iter_mut().zip(x) {
                *o = x.to_le_bytes();
            }
        }
        BlockFormat::F16 => {
            for (o, x) in out.as_chunks_mut().0.iter_mut().zip(x) {
                *o = f16::from_f32(*x).to_le_bytes();
            }
        }
        BlockFormat::BF16 => {
            for (o, x) in out.as_chunks_mut().0.iter_mut().zip(x) {
                *o = bf16::from_f32(*x).to_le_bytes();
            }
        }
        BlockFormat::Q2_K => {
            for (x, out) in x.as_chunks::<SUPER>().0.iter().zip(out.as_chunks_mut::<84>().0) {
                q2_k(x, out);
            }
        }
        BlockFormat::Q3_K => {
            for (x, out) in x.as_chunks::<SUPER>().0.iter().zip(out.as_chunks_mut::<110>().0) {
                q3_k(x, out);
            }
        }
        BlockFormat::Q5_K => {
            for (x, out) in x.as_chunks::<SUPER>().0.iter().zip(out.as_chunks_mut::<176>().0) {
                q5_k(x, out);
            }
        }
        BlockFormat::Q4_K => {
            for (x, out) in x.as_chunks::<SUPER>().0.iter().zip(out.as_chunks_mut::<144>().0) {
                q4_k(x, out);
            }
        }
        BlockFormat::Q6_K => {
            for (x, out) in x.as_chunks::<SUPER>().0.iter().zip(out.as_chunks_mut::<210>().0) {
                q6_k(x, out);
            }
        }
        _ => {
            for (x, out) in x.as_chunks::<32>().0.iter().zip(out.chunks_exact_mut(format.block_bytes())) {
                small(format, x, out);
            }
        }
    }
}

fn put_half(out: &mut [u8], at: usize, value: f32) {
    out[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// The element of the largest magnitude, the first one of several.
fn extreme(x: &[f32]) -> f32 {
    x.iter().fold(0.0f32, |best, x| if x.abs() > best.abs() { *x } else { best })
}

fn small(format: BlockFormat, x: &[f32; 32], out: &mut [u8]) {
    let mut codes = [0u8; 32];
    let low = x.iter().copied().fold(f32::INFINITY, f32::min);
    let high = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let data = match format {
        BlockFormat::Q8_0 => {
            let scale = extreme(x).abs() / 127.0;
            let inverse = inverse(scale);
            put_half(out, 0, scale);
            for i in 0..32 {
                out[2 + i] = (x[i] * inverse).round() as i8 as u8;
            }
            return;
        }
        BlockFormat::Q4_0 | BlockFormat::Q5_0 => {
            let (steps, top) = if format == BlockFormat::Q4_0 { (8.0, 15) } else { (16.0, 31) };
            let scale = extreme(x) / -steps;
            let inverse = inverse(scale);
            put_half(out, 0, scale);
            for i in 0..32 {
                codes[i] = ((x[i] * inverse + (steps + 0.5)) as u8).min(top);
            }
            2
        }
        _ => {
            let top = if format == BlockFormat::Q4_1 { 15 } else { 31 };
            let scale = (high - low) / f32::from(top);
            let inverse = inverse(scale);
            put_half(out, 0, scale);
            put_half(out, 2, low);
            for i in 0..32 {
                codes[i] = (((x[i] - low) * inverse + 0.5) as u8).min(top);
            }
            4
        }
    };
    let mut at = data;
    if matches!(format, BlockFormat::Q5_0 | BlockFormat::Q5_1) {
        let high = (0..32).fold(0u32, |bits, i| bits | u32::from(codes[i] >> 4) << i);
        out[at..at + 4].copy_from_slice(&high.to_le_bytes());
        at += 4;
    }
    for i in 0..16 {
        out[at + i] = codes[i] & 15 | codes[i + 16] << 4;
    }
}

fn nearest(x: f32) -> i32 {
    x.round_ties_even() as i32
}

/// How scale and minimum of a group are searched.
struct Search {
    /// The largest code.
    top: f32,
    /// The first of the scales that are tried, in tenths of a code, and how many follow it.
    from: f32,
    steps: u32,
    /// Errors count by their size and not by its square.
    absolute: bool,
}

/// Scale and minimum (not positive; its negative is returned) with which codes from 0 on come nearest to `x`.
fn best_scale_and_minimum(x: &[f32], weights: &[f32], search: &Search) -> (f32, f32) {
    let top = search.top;
    let mut low = x[0];
    let mut high = x[0];
    let (mut sum_w, mut sum_x) = (0.0, 0.0);
    for (x, w) in x.iter().zip(weights) {
        low = low.min(*x);
        high = high.max(*x);
        sum_w += w;
        sum_x += w * x;
    }
    low = low.min(0.0);
    if high == low {
        return (0.0, -low);
    }
    let code = |x: f32, inverse: f32| nearest(inverse * (x - low)).clamp(0, top as i32) as f32;
    let error = |inverse: f32, scale: f32, minimum: f32| -> f32 {
        x.iter()
            .zip(weights)
            .map(|(x, w)| {
                let difference = scale * code(*x, inverse) + minimum - x;
                w * if search.absolute { difference.abs() } else { difference * difference }
            })
            .sum()
    };
    let first = top / (high - low);
    let (mut scale, mut minimum) = (1.0 / first, low);
    let mut best = error(first, scale, low);
    for step in 0..=search.steps {
        let inverse = (search.from + 0.1 * step as f32 + top) / (high - low);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0.0, 0.0, 0.0);
        for (x, w) in x.iter().zip(weights) {
            let l = code(*x, inverse);
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * x;
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant <= 0.0 {
            continue;
        }
        let mut this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        let mut this_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        if this_minimum > 0.0 {
            (this_scale, this_minimum) = (sum_xl / sum_l2, 0.0);
        }
        let this_error = error(inverse, this_scale, this_minimum);
        if this_error < best {
            (best, scale, minimum) = (this_error, this_scale, this_minimum);
        }
    }
    (scale, -minimum)
}

/// Scales and minima of eight groups, 6 bits each, behind the two halves that they are multiples of: the first 16 bytes
/// of Q4_K and Q5_K.
fn put_scales_and_minima(x: &[f32; SUPER], search: &Search, out: &mut [u8]) {
    let (mut scales, mut minima) = ([0.0f32; 8], [0.0f32; 8]);
    for (g, x) in x.as_chunks::<32>().0.iter().enumerate() {
        let mean = (x.iter().map(|x| x * x).sum::<f32>() / 32.0).sqrt();
        (scales[g], minima[g]) = best_scale_and_minimum(x, &x.map(|x| mean + x.abs()), search);
    }
    let max_scale = scales.iter().copied().fold(0.0, f32::max);
    let max_minimum = minima.iter().copied().fold(0.0, f32::max);
    let steps = |max: f32| if max > 0.0 { 63.0 / max } else { 0.0 };
    put_half(out, 0, max_scale / 63.0);
    put_half(out, 2, max_minimum / 63.0);
    let packed = &mut out[4..16];
    packed.fill(0);
    for g in 0..8 {
        let scale = nearest(steps(max_scale) * scales[g]).clamp(0, 63) as u8;
        let minimum = nearest(steps(max_minimum) * minima[g]).clamp(0, 63) as u8;
        if g < 4 {
            packed[g] = scale;
            packed[g + 4] = minimum;
        } else {
            packed[g + 4] = scale & 15 | (minimum & 15) << 4;
            packed[g - 4] |= scale >> 4 << 6;
            packed[g] |= minimum >> 4 << 6;
        }
    }
}

/// The codes of 0 to `top` that come nearest to `x` with the scales and minima in `out`.
fn codes_of_pairs(x: &[f32; SUPER], out: &[u8], top: i32) -> [u8; SUPER] {
    let pairs = six_bit_pairs(&out[4..16]);
    let (d, m) = (super::unpack::half_at(out, 0), super::unpack::half_at(out, 2));
    std::array::from_fn(|i| {
        let scale = d * f32::from(pairs[i / 32]);
        if scale == 0.0 {
            return 0;
        }
        nearest((x[i] + m * f32::from(pairs[8 + i / 32])) / scale).clamp(0, top) as u8
    })
}

fn q4_k(x: &[f32; SUPER], out: &mut [u8; 144]) {
    put_scales_and_minima(x, &Search { top: 15.0, from: -1.0, steps: 20, absolute: false }, out);
    let codes = codes_of_pairs(x, out, 15);
    for i in 0..128 {
        let at = i / 32 * 64 + i % 32;
        out[16 + i] = codes[at] | codes[at + 32] << 4;
    }
}

fn q5_k(x: &[f32; SUPER], out: &mut [u8; 176]) {
    put_scales_and_minima(x, &Search { top: 31.0, from: -0.5, steps: 15, absolute: false }, out);
    let codes = codes_of_pairs(x, out, 31);
    for l in 0..32 {
        out[16 + l] = (0..8).fold(0, |bits, j| bits | codes[32 * j + l] >> 4 << j);
    }
    for i in 0..128 {
        let at = i / 32 * 64 + i % 32;
        out[48 + i] = codes[at] & 15 | (codes[at + 32] & 15) << 4;
    }
}

/// Codes of two bits, four a byte, 32 elements apart.
fn put_two_bits(codes: &[u8; SUPER], out: &mut [u8]) {
    for (codes, out) in codes.as_chunks::<128>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        for l in 0..32 {
            out[l] = (0..4).fold(0, |bits, j| bits | (codes[32 * j + l] & 3) << (2 * j));
        }
    }
}

fn q2_k(x: &[f32; SUPER], out: &mut [u8; 84]) {
    let (mut scales, mut minima) = ([0.0f32; 16], [0.0f32; 16]);
    for (g, x) in x.as_chunks::<16>().0.iter().enumerate() {
        let search = Search { top: 3.0, from: -0.5, steps: 15, absolute: true };
        (scales[g], minima[g]) = best_scale_and_minimum(x, &x.map(f32::abs), &search);
    }
    let max_scale = scales.iter().copied().fold(0.0, f32::max);
    let max_minimum = minima.iter().copied().fold(0.0, f32::max);
    let step = |value: f32, max: f32| match max > 0.0 {
        true => nearest(15.0 / max * value).clamp(0, 15) as u8,
        false => 0,
    };
    for g in 0..16 {
        out[g] = step(scales[g], max_scale) | step(minima[g], max_minimum) << 4;
    }
    put_half(out, 80, max_scale / 15.0);
    put_half(out, 82, max_minimum / 15.0);
    let (d, m) = (super::unpack::half_at(out, 80), super::unpack::half_at(out, 82));
    let codes = std::array::from_fn(|i| {
        let group = out[i / 16];
        let scale = d * f32::from(group & 15);
        if scale == 0.0 {
            return 0;
        }
        nearest((x[i] + m * f32::from(group >> 4)) / scale).clamp(0, 3) as u8
    });
    put_two_bits(&codes, &mut out[16..80]);
}

/// The scale with which codes of -4 to 3 come nearest to `x`, errors weighted by the squares of the elements: codes are
/// changed one by one as long as that helps.
fn best_scale_by_turns(x: &[f32; 16]) -> f32 {
    let extreme = extreme(x);
    if extreme.abs() < 1e-15 {
        return 0.0;
    }
    let mut codes = x.map(|x| nearest(-4.0 / extreme * x).clamp(-4, 3) as f32);
    let (mut sum_lx, mut sum_l2) = (0.0f32, 0.0f32);
    for (x, l) in x.iter().zip(codes) {
        sum_lx += x * x * x * l;
        sum_l2 += x * x * l * l;
    }
    for _ in 0..5 {
        let mut changed = false;
        for (x, l) in x.iter().zip(&mut codes) {
            let w = x * x;
            let (lx, l2) = (sum_lx - w * x * *l, sum_l2 - w * *l * *l);
            if lx <= 0.0 {
                continue;
            }
            let new = nearest(x * l2 / lx).clamp(-4, 3) as f32;
            let (lx, l2) = (lx + w * x * new, l2 + w * new * new);
            if new != *l && l2 > 0.0 && lx * lx * sum_l2 > sum_lx * sum_lx * l2 {
                (*l, sum_lx, sum_l2, changed) = (new, lx, l2, true);
            }
        }
        if !changed {
            break;
        }
    }
    if sum_l2 > 0.0 { sum_lx / sum_l2 } else { 0.0 }
}

fn q3_k(x: &[f32; SUPER], out: &mut [u8; 110]) {
    out.fill(0);
    let mut scales = [0.0f32; 16];
    for (scale, x) in scales.iter_mut().zip(x.as_chunks::<16>().0) {
        *scale = best_scale_by_turns(x);
    }
    let max = extreme(&scales);
    if max == 0.0 {
        return;
    }
    let inverse = -32.0 / max;
    put_half(out, 108, 1.0 / inverse);
    for (g, scale) in scales.iter().enumerate() {
        let code = (nearest(inverse * scale).clamp(-32, 31) + 32) as u8;
        out[96 + g % 8] |= (code & 15) << (g / 8 * 4);
        out[104 + g % 4] |= code >> 4 << (g / 4 * 2);
    }
    let d = super::unpack::half_at(out, 108);
    let scales = super::unpack::six_bit_scales(&out[96..108]);
    let codes: [u8; SUPER] = std::array::from_fn(|i| {
        let scale = d * (f32::from(scales[i / 16]) - 32.0);
        if scale == 0.0 {
            return 4;
        }
        (nearest(x[i] / scale).clamp(-4, 3) + 4) as u8
    });
    for l in 0..32 {
        out[l] = (0..8).fold(0, |bits, j| bits | codes[32 * j + l] >> 2 << j);
    }
    put_two_bits(&codes, &mut out[32..96]);
}

/// The scale with which codes of -32 to 31 come nearest to `x`, errors weighted by the squares of the elements.
fn best_scale(x: &[f32]) -> f32 {
    let extreme = extreme(x);
    if extreme.abs() < 1e-15 {
        return 0.0;
    }
    let sums = |inverse: f32| {
        x.iter().fold((0.0f32, 0.0f32), |(sum_lx, sum_l2), x| {
            let l = nearest(inverse * x).clamp(-32, 31) as f32;
            (sum_lx + x * x * x * l, sum_l2 + x * x * l * l)
        })
    };
    let (sum_lx, sum_l2) = sums(-32.0 / extreme);
    let mut scale = if sum_l2 > 0.0 { sum_lx / sum_l2 } else { 0.0 };
    let mut best = scale * sum_lx;
    for step in -9..=9 {
        let (sum_lx, sum_l2) = sums(-(32.0 + 0.1 * step as f32) / extreme);
        if sum_l2 > 0.0 && sum_lx * sum_lx > best * sum_l2 {
            scale = sum_lx / sum_l2;
            best = scale * sum_lx;
        }
    }
    scale
}

fn q6_k(x: &[f32; SUPER], out: &mut [u8; 210]) {
    out.fill(0);
    let mut scales = [0.0f32; 16];
    for (scale, x) in scales.iter_mut().zip(x.as_chunks::<16>().0) {
        *scale = best_scale(x);
    }
    let max = extreme(&scales);
    if max.abs() < 1e-15 {
        return;
    }
    let inverse = -128.0 / max;
    put_half(out, 208, 1.0 / inverse);
    for g in 0..16 {
        out[192 + g] = nearest(inverse * scales[g]).clamp(-128, 127) as i8 as u8;
    }
    let d = super::unpack::half_at(out, 208);
    let mut codes = [32u8; SUPER];
    for i in 0..SUPER {
        let scale = d * f32::from(out[192 + i / 16] as i8);
        if scale != 0.0 {
            codes[i] = (nearest(x[i] / scale).clamp(-32, 31) + 32) as u8;
        }
    }
    for half in 0..2 {
        let c = &codes[half * 128..half * 128 + 128];
        for l in 0..32 {
            out[half * 64 + l] = c[l] & 15 | c[l + 64] << 4;
            out[half * 64 + 32 + l] = c[l + 32] & 15 | c[l + 96] << 4;
            out[128 + half * 32 + l] =
                c[l] >> 4 | c[l + 32] >> 4 << 2 | c[l + 64] >> 4 << 4 | c[l + 96] >> 4 << 6;
        }
    }
}
