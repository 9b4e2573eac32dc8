//! Normal noise that nobody stores: any element of it can be made again at any time, in any order, on any thread.
//!
//! Element `k` of a stream follows from the key, the stream and `k` alone: Philox4x32-10 (Salmon et al., SC 2011) turns
//! a counter into four words, Box and Muller's transformation turns two words into two normals. Blocks of 64 elements
//! share 16 counters; within a block element `16·j + l` is word `j` of counter `l`, so that vectors need no shuffling.

use crate::arch::{Kernel, Simd, dispatch};
use crate::threads::{Shareable, ThreadPool};

/// Elements of a block.
const BLOCK: usize = 64;
const LANES: usize = BLOCK / 4;
/// Elements of a task.
const TASK: usize = 64 * BLOCK;

/// Which noise: the key (the seed of a step) and the stream (the number of a tensor).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Noise {
    /// Seed.
    pub key: u64,
    /// Number of the tensor.
    pub stream: u32,
}

/// Words stand in 64-bit lanes throughout: their products then need no widening and no narrowing.
#[inline(always)]
fn philox(key: [u32; 2], counter: [[u32; LANES]; 4]) -> [[u32; LANES]; 4] {
    const LOW: u64 = 0xFFFF_FFFF;
    let (mut k0, mut k1) = (key[0], key[1]);
    let [mut a, mut b, mut c, mut d] = counter.map(|words| words.map(u64::from));
    for _ in 0..10 {
        let (key0, key1) = (u64::from(k0), u64::from(k1));
        for l in 0..LANES {
            let p = (a[l] & LOW) * 0xD251_1F53;
            let q = (c[l] & LOW) * 0xCD9E_8D57;
            a[l] = (q >> 32) ^ b[l] ^ key0;
            b[l] = q & LOW;
            c[l] = (p >> 32) ^ d[l] ^ key1;
            d[l] = p & LOW;
        }
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [a, b, c, d].map(|words| words.map(|w| w as u32))
}

/// Natural logarithm of a number in `[2^-24, 1]`, to about 1e-7.
#[inline(always)]
fn ln(x: f32) -> f32 {
    let bits = x.to_bits();
    // Mantissa in [sqrt(1/2), sqrt(2)).
    let shifted = bits.wrapping_sub(0x3F35_04F3);
    let exponent = (shifted as i32) >> 23;
    let m = f32::from_bits((shifted & 0x007F_FFFF).wrapping_add(0x3F35_04F3)) - 1.0;
    let z = m * m;
    let mut p = 7.037_683_6e-2f32;
    p = p * m - 1.151_461e-1;
    p = p * m + 1.167_699_87e-1;
    p = p * m - 1.242_014_1e-1;
    p = p * m + 1.424_932_3e-1;
    p = p * m - 1.666_805_7e-1;
    p = p * m + 2.000_071_5e-1;
    p = p * m - 2.499_999_4e-1;
    p = p * m + 3.333_333e-1;
    let e = exponent as f32;
    let y = p * m * z + e * -2.121_944_4e-4 - 0.5 * z;
    m + y + e * 0.693_359_4
}

/// Sine and cosine of `2π·v` for `v` in `[0, 1)`.
#[inline(always)]
fn sin_cos_turns(v: f32) -> (f32, f32) {
    // SAFETY: `v` is in [0, 1), so the number is in [0, 5).
    let quarter = unsafe { (v * 4.0 + 0.5).to_int_unchecked::<i32>() };
    let x = (v * 4.0 - quarter as f32) * std::f32::consts::FRAC_PI_2;
    let z = x * x;
    let sin = x + x * z * (-1.666_665_5e-1 + z * (8.332_161e-3 + z * -1.951_529_6e-4));
    let cos = 1.0 - 0.5 * z + z * z * (4.166_664_6e-2 + z * (-1.388_731_6e-3 + z * 2.443_315_7e-5));
    let swap = quarter & 1 != 0;
    let (s, c) = if swap { (cos, sin) } else { (sin, cos) };
    let sin_sign = ((quarter as u32 >> 1) & 1) << 31;
    let cos_sign = (((quarter + 1) as u32 >> 1) & 1) << 31;
    (f32::from_bits(s.to_bits() ^ sin_sign), f32::from_bits(c.to_bits() ^ cos_sign))
}

/// The normals of block `block`.
#[inline(always)]
fn block_normals(noise: Noise, block: u64, z: &mut [f32; BLOCK]) {
    let first = block * LANES as u64;
    let mut counter = [[0u32; LANES]; 4];
    for l in 0..LANES {
        // A block's counters do not cross a multiple of 2^32, because 16 divides it.
        counter[0][l] = (first as u32).wrapping_add(l as u32);
        counter[1][l] = (first >> 32) as u32;
        counter[2][l] = noise.stream;
    }
    let words = philox([noise.key as u32, (noise.key >> 32) as u32], counter);
    for pair in 0..2 {
        for l in 0..LANES {
            let u = ((words[2 * pair][l] >> 8) + 1) as f32 * (1.0 / (1 << 24) as f32);
            let v = (words[2 * pair + 1][l] >> 8) as f32 * (1.0 / (1 << 24) as f32);
            let r = (-2.0 * ln(u)).sqrt();
            let (sin, cos) = sin_cos_turns(v);
            z[2 * pair * LANES + l] = r * cos;
            z[(2 * pair + 1) * LANES + l] = r * sin;
        }
    }
}

/// Adds `amount · z` to elements from `start`, a multiple of [`BLOCK`], on.
struct AddNoise<'a> {
    noise: Noise,
    start: usize,
    amount: f32,
    target: &'a mut [f32],
}

impl Kernel for AddNoise<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let mut z = [0f32; BLOCK];
        let mut block = (self.start / BLOCK) as u64;
        let mut chunks = self.target.chunks_exact_mut(BLOCK);
        for chunk in &mut chunks {
            block_normals(self.noise, block, &mut z);
            for (w, z) in chunk.iter_mut().zip(&z) {
                *w += self.amount * z;
            }
            block += 1;
        }
        let rest = chunks.into_remainder();
        if !rest.is_empty() {
            block_normals(self.noise, block, &mut z);
            for (w, z) in rest.iter_mut().zip(&z) {
                *w += self.amount * z;
            }
        }
    }
}

/// `target += amount · z`, where `z` is elements `start..` of the noise. The bits are the same for any number of threads
/// and any instruction set.
///
/// # Panics
/// When `start` is no multiple of 64.
pub fn add_noise(threads: &ThreadPool, noise: Noise, start: usize, amount: f32, target: &mut [f32]) {
    assert!(start.is_multiple_of(BLOCK), "noise is made in blocks of {BLOCK} elements");
    let n = target.len();
    let shared = Shareable(target.as_mut_ptr());
    threads.parallel_for(n.div_ceil(TASK), &|task, _| {
        let first = task * TASK;
        let len = TASK.min(n - first);
        // SAFETY: tasks write disjoint ranges of `target`.
        let part = unsafe { std::slice::from_raw_parts_mut(shared.get().add(first), len) };
        dispatch(threads.isa(), AddNoise { noise, start: start + first, amount, target: part });
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[test]
    fn philox_gives_the_published_words() {
        // Known answers of Random123: kat_vectors, philox4x32 10 rounds.
        let cases: [([u32; 2], [u32; 4], [u32; 4]); 3] = [
            ([0, 0], [0; 4], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([!0, !0], [!0; 4], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0xa409_3822, 0x299f_31d0],
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (key, counter, expected) in cases {
            let words = philox(key, counter.map(|c| [c; LANES]));
            assert_eq!(words.map(|w| w[3]), expected);
        }
    }

    fn normals(n: usize, key: u64) -> Vec<f32> {
        let mut z = vec![0f32; n];
        add_noise(&ThreadPool::new(1), Noise { key, stream: 7 }, 0, 1.0, &mut z);
        z
    }

    #[test]
    fn any_part_on_any_machine_has_the_same_bits() {
        let n = 3 * TASK + 100;
        let whole = normals(n, 5);
        for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| *isa <= Isa::detected()) {
            for threads in [1, 3] {
                let pool = ThreadPool::with_isa(threads, isa);
                let mut part = vec![0f32; n - 128];
                add_noise(&pool, Noise { key: 5, stream: 7 }, 128, 1.0, &mut part);
                assert!(whole[128..] == part[..], "{isa:?} {threads}");
            }
        }
        assert_ne!(normals(64, 6), whole[..64]);
    }

    #[test]
    fn it_is_normal() {
        let z = normals(1 << 20, 1);
        let n = z.len() as f64;
        let moment = |p: i32| z.iter().map(|&x| f64::from(x).powi(p)).sum::<f64>() / n;
        // Four standard errors of each moment.
        assert!(moment(1).abs() < 0.004, "{}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.0056, "{}", moment(2));
        assert!(moment(3).abs() < 0.0155, "{}", moment(3));
        assert!((moment(4) - 3.0).abs() < 0.04, "{}", moment(4));
        let far = z.iter().filter(|x| x.abs() > 3.0).count() as f64 / n;
        assert!((far - 0.0027).abs() < 0.0003, "{far}");
        // Neighbours and the two of a pair are independent.
        for shift in [1, LANES, 64] {
            let correlation: f64 =
                z.windows(shift + 1).map(|w| f64::from(w[0]) * f64::from(w[shift])).sum::<f64>() / n;
            assert!(correlation.abs() < 0.005, "{shift}: {correlation}");
        }
    }
}
