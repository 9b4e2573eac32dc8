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
#[allow(clippy::excessive_precision, reason = "the coefficients as they are published")]
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

/// What of the step before is still to be done when a parameter is visited; see [`perturb`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pending {
    /// Nothing.
    Nothing,
    /// The parameter stands at `w - eps·z` and goes back.
    Restore,
    /// It goes back and follows the projected gradient.
    Update,
}

/// Which part of a zeroth-order step is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PerturbStep {
    /// What is pending of the step before, then `w += eps·z`.
    Begin,
    /// `w += -2·eps·z`.
    Cross,
    /// Only what is pending.
    Settle,
}

/// A step along random directions (MeZO, arXiv 2305.17333; ZO2, arXiv 2503.12668): what is needed to change any part of
/// a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Perturbation {
    /// Seeds of the step before and of this one.
    pub seeds: [u64; 2],
    /// Number of the parameter.
    pub stream: u32,
    /// How far from the parameters the loss is looked at; 0 leaves them where they are.
    pub eps: f32,
    /// Learning rate of the step before.
    pub rate: f32,
    /// Projected gradient of the step before.
    pub gradient: f32,
    /// Weight decay.
    pub decay: f32,
    /// What is left of the step before.
    pub pending: Pending,
}

impl Perturbation {
    fn noise(&self, step: usize) -> Noise {
        Noise { key: self.seeds[step], stream: self.stream }
    }

    /// Changes elements of one block; `before` and `now` are the noise of both steps.
    #[inline(always)]
    fn change(&self, step: PerturbStep, target: &mut [f32], before: &[f32], now: &[f32]) {
        if step != PerturbStep::Cross && self.pending != Pending::Nothing {
            for (w, z) in target.iter_mut().zip(before) {
                *w += self.eps * z;
            }
            if self.pending == Pending::Update {
                for (w, z) in target.iter_mut().zip(before) {
                    *w -= self.rate * (self.gradient * z + self.decay * *w);
                }
            }
        }
        let amount = match step {
            PerturbStep::Begin => self.eps,
            PerturbStep::Cross => -2.0 * self.eps,
            PerturbStep::Settle => return,
        };
        for (w, z) in target.iter_mut().zip(now) {
            *w += amount * z;
        }
    }
}

struct Perturb<'a> {
    what: Perturbation,
    step: PerturbStep,
    start: usize,
    target: &'a mut [f32],
}

impl Kernel for Perturb<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (mut before, mut now) = ([0f32; BLOCK], [0f32; BLOCK]);
        let needs_before = self.step != PerturbStep::Cross && self.what.pending != Pending::Nothing;
        let needs_now = self.step != PerturbStep::Settle;
        let mut at = self.start;
        let mut rest = self.target;
        while !rest.is_empty() {
            let (block, skip) = ((at / BLOCK) as u64, at % BLOCK);
            let len = rest.len().min(BLOCK - skip);
            let (chunk, tail) = rest.split_at_mut(len);
            if needs_before {
                block_normals(self.what.noise(0), block, &mut before);
            }
            if needs_now {
                block_normals(self.what.noise(1), block, &mut now);
            }
            match <&mut [f32; BLOCK]>::try_from(&mut *chunk) {
                Ok(whole) => self.what.change(self.step, whole, &before, &now),
                Err(_) => self.what.change(self.step, chunk, &before[skip..], &now[skip..]),
            }
            (at, rest) = (at + len, tail);
        }
    }
}

/// Changes elements `start..` of a parameter as a step says. The bits are the same for any number of threads, any
/// instruction set and any division into parts.
pub fn perturb(
    threads: &ThreadPool,
    what: &Perturbation,
    step: PerturbStep,
    start: usize,
    target: &mut [f32],
) {
    let idle = match step {
        PerturbStep::Begin => what.eps == 0.0 && what.pending == Pending::Nothing,
        PerturbStep::Cross => what.eps == 0.0,
        PerturbStep::Settle => what.pending == Pending::Nothing,
    };
    if idle {
        return;
    }
    let n = target.len();
    let shared = Shareable(target.as_mut_ptr());
    threads.parallel_for(n.div_ceil(TASK), &|task, _| {
        let first = task * TASK;
        let len = TASK.min(n - first);
        // SAFETY: tasks write disjoint ranges of `target`.
        let part = unsafe { std::slice::from_raw_parts_mut(shared.get().add(first), len) };
        dispatch(threads.isa(), Perturb { what: *what, step, start: start + first, target: part });
    });
}

/// Rows of a table as a step sees them, the table itself staying as it is: row `i` of `plus` is row `rows[i]` after
/// [`PerturbStep::Begin`], that of `minus` after [`PerturbStep::Cross`], too.
///
/// # Panics
/// When a row is not in the table, or the results do not have one row per index.
pub fn gather_perturbed(
    threads: &ThreadPool,
    what: &Perturbation,
    table: &[f32],
    width: usize,
    rows: &[usize],
    plus: &mut [f32],
    minus: &mut [f32],
) {
    assert!(plus.len() == rows.len() * width && minus.len() == plus.len(), "one row per index");
    let (shared_plus, shared_minus) = (Shareable(plus.as_mut_ptr()), Shareable(minus.as_mut_ptr()));
    let single = ThreadPool::with_isa(1, threads.isa());
    threads.parallel_for(rows.len(), &|i, _| {
        let start = rows[i] * width;
        let row = &table[start..start + width];
        // SAFETY: tasks write disjoint rows.
        let (plus, minus) = unsafe {
            (
                std::slice::from_raw_parts_mut(shared_plus.get().add(i * width), width),
                std::slice::from_raw_parts_mut(shared_minus.get().add(i * width), width),
            )
        };
        plus.copy_from_slice(row);
        perturb(&single, what, PerturbStep::Begin, start, plus);
        minus.copy_from_slice(plus);
        perturb(&single, what, PerturbStep::Cross, start, minus);
    });
}

/// A step of a log.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReplayStep {
    /// Its seed.
    pub seed: u64,
    /// Its learning rate.
    pub rate: f32,
    /// Its projected gradient; `None` when the step was left out.
    pub gradient: Option<f32>,
}

struct Replay<'a> {
    stream: u32,
    eps: f32,
    decay: f32,
    steps: &'a [ReplayStep],
    start: usize,
    target: &'a mut [f32],
}

impl Kernel for Replay<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let mut z = [0f32; BLOCK];
        let mut at = self.start;
        let mut rest = self.target;
        while !rest.is_empty() {
            let (block, skip) = ((at / BLOCK) as u64, at % BLOCK);
            let len = rest.len().min(BLOCK - skip);
            let (chunk, tail) = rest.split_at_mut(len);
            for step in self.steps {
                block_normals(Noise { key: step.seed, stream: self.stream }, block, &mut z);
                for (w, z) in chunk.iter_mut().zip(&z[skip..]) {
                    *w += self.eps * z;
                    *w += -2.0 * self.eps * z;
                    *w += self.eps * z;
                }
                if let Some(gradient) = step.gradient {
                    for (w, z) in chunk.iter_mut().zip(&z[skip..]) {
                        *w -= step.rate * (gradient * z + self.decay * *w);
                    }
                }
            }
            (at, rest) = (at + len, tail);
        }
    }
}

/// Makes all of `steps` again on elements `start..` of parameter `stream`, with the roundings of the perturbations.
pub fn replay_steps(
    threads: &ThreadPool,
    stream: u32,
    [eps, decay]: [f32; 2],
    steps: &[ReplayStep],
    start: usize,
    target: &mut [f32],
) {
    let n = target.len();
    let shared = Shareable(target.as_mut_ptr());
    threads.parallel_for(n.div_ceil(TASK), &|task, _| {
        let first = task * TASK;
        let len = TASK.min(n - first);
        // SAFETY: tasks write disjoint ranges of `target`.
        let part = unsafe { std::slice::from_raw_parts_mut(shared.get().add(first), len) };
        let start = start + first;
        dispatch(threads.isa(), Replay { stream, eps, decay, steps, start, target: part });
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

    fn example(pending: Pending) -> Perturbation {
        Perturbation { seeds: [3, 4], stream: 9, eps: 1e-2, rate: 0.1, gradient: -1.5, decay: 0.01, pending }
    }

    #[test]
    fn a_step_is_the_sequence_of_its_parts_at_any_offset() {
        let pool = ThreadPool::new(2);
        let n = TASK + 333;
        let first: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
        let z = |key: u64| {
            let mut z = vec![0f32; n];
            add_noise(&pool, Noise { key, stream: 9 }, 0, 1.0, &mut z);
            z
        };
        let (before, now) = (z(3), z(4));
        let p = example(Pending::Update);
        let expected: Vec<f32> = (0..n)
            .map(|i| {
                let mut w = first[i];
                w += p.eps * before[i];
                w -= p.rate * (p.gradient * before[i] + p.decay * w);
                w += p.eps * now[i];
                w += -2.0 * p.eps * now[i];
                w
            })
            .collect();
        let mut whole = first.clone();
        perturb(&pool, &p, PerturbStep::Begin, 0, &mut whole);
        perturb(&pool, &p, PerturbStep::Cross, 0, &mut whole);
        assert_eq!(whole, expected);
        for cut in [1, 63, 100, TASK + 5] {
            let mut part = first[cut..].to_vec();
            perturb(&pool, &p, PerturbStep::Begin, cut, &mut part);
            perturb(&pool, &p, PerturbStep::Cross, cut, &mut part);
            assert_eq!(part, expected[cut..], "{cut}");
        }
        let mut kept = first.clone();
        let still = Perturbation { eps: 0.0, ..example(Pending::Nothing) };
        perturb(&pool, &still, PerturbStep::Begin, 0, &mut kept);
        assert_eq!(kept, first);
    }

    #[test]
    fn gathered_rows_have_the_bits_of_the_changed_table() {
        let pool = ThreadPool::new(2);
        let (height, width) = (11, 37);
        let table: Vec<f32> = (0..height * width).map(|i| (i as f32 * 0.71).cos()).collect();
        let p = example(Pending::Update);
        let rows = [3usize, 0, 10, 3];
        let (mut plus, mut minus) = (vec![0f32; 4 * width], vec![0f32; 4 * width]);
        gather_perturbed(&pool, &p, &table, width, &rows, &mut plus, &mut minus);
        let mut changed = table.clone();
        let check = |changed: &[f32], found: &[f32]| {
            for (i, &r) in rows.iter().enumerate() {
                assert_eq!(found[i * width..(i + 1) * width], changed[r * width..(r + 1) * width]);
            }
        };
        perturb(&pool, &p, PerturbStep::Begin, 0, &mut changed);
        check(&changed, &plus);
        perturb(&pool, &p, PerturbStep::Cross, 0, &mut changed);
        check(&changed, &minus);
    }

    #[test]
    fn a_replay_is_the_steps_one_after_the_other() {
        let pool = ThreadPool::new(2);
        let n = 500;
        let mut w: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
        let first = w.clone();
        let steps: Vec<ReplayStep> = (0..5u64)
            .map(|i| ReplayStep {
                seed: 100 + i,
                rate: 0.01 * (i + 1) as f32,
                gradient: (i != 2).then_some(0.5 - i as f32),
            })
            .collect();
        let mut before: Option<ReplayStep> = None;
        for next in steps.iter().map(Some).chain([None]) {
            let p = Perturbation {
                seeds: [before.map_or(0, |b| b.seed), next.map_or(0, |s| s.seed)],
                stream: 9,
                eps: 1e-3,
                rate: before.map_or(0.0, |b| b.rate),
                gradient: before.and_then(|b| b.gradient).unwrap_or(0.0),
                decay: 0.1,
                pending: match before {
                    None => Pending::Nothing,
                    Some(ReplayStep { gradient: None, .. }) => Pending::Restore,
                    Some(_) => Pending::Update,
                },
            };
            if next.is_some() {
                perturb(&pool, &p, PerturbStep::Begin, 0, &mut w);
                perturb(&pool, &p, PerturbStep::Cross, 0, &mut w);
            } else {
                perturb(&pool, &p, PerturbStep::Settle, 0, &mut w);
            }
            before = next.copied();
        }
        let mut replayed = first[70..].to_vec();
        replay_steps(&pool, 9, [1e-3, 0.1], &steps, 70, &mut replayed);
        assert_eq!(replayed, w[70..]);
    }
}
