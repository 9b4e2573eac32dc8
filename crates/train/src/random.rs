//! Random numbers that are a function of a seed and of what they are for.

/// xoshiro256++ (Blackman and Vigna, 2019), seeded by SplitMix64.
///
/// A generator is made anew for each thing that needs one ([`Random::derived`]), so that no result depends on which
/// thread drew first. All functions give the same bits on every machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Random([u64; 4]);

fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Random {
    /// A generator of this seed.
    pub fn new(seed: u64) -> Random {
        let mut state = seed;
        Random([0; 4].map(|_: u64| split_mix(&mut state)))
    }

    /// A generator of this seed for one purpose, such as `[purpose, epoch, sample]`.
    pub fn derived(seed: u64, purpose: &[u64]) -> Random {
        let mut state = seed;
        for part in purpose {
            let mixed = split_mix(&mut state);
            state = mixed ^ part.wrapping_mul(0xff51_afd7_ed55_8ccd);
        }
        Random::new(split_mix(&mut state))
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        let s = &mut self.0;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// An integer from 0 to `end - 1`, all equally likely.
    ///
    /// # Panics
    /// When `end` is 0.
    pub fn below(&mut self, end: usize) -> usize {
        assert!(end > 0, "there is no integer below 0");
        let end = end as u64;
        loop {
            // Lemire, 2019: the high half is the number, the low half tells whether it would be over-represented.
            let product = u128::from(self.bits()) * u128::from(end);
            if product as u64 >= end.wrapping_neg() % end {
                return (product >> 64) as usize;
            }
        }
    }

    /// A number from 0 (included) to 1 (excluded).
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A number between two bounds.
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.uniform()
    }

    /// True with this probability.
    pub fn chance(&mut self, probability: f64) -> bool {
        self.uniform() < probability
    }

    /// A normally distributed number, mean 0, variance 1 (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * libm::log(1.0 - self.uniform())).sqrt();
        radius * libm::cos(std::f64::consts::TAU * self.uniform())
    }

    /// A gamma-distributed number of scale 1 (Marsaglia and Tsang, 2000).
    pub fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            let boost = libm::pow(1.0 - self.uniform(), 1.0 / shape);
            return self.gamma(shape + 1.0) * boost;
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = 1.0 + c * x;
            if v <= 0.0 {
                continue;
            }
            let v = v * v * v;
            if libm::log(1.0 - self.uniform()) < 0.5 * x * x + d - d * v + d * libm::log(v) {
                return d * v;
            }
        }
    }

    /// A number of the symmetric beta distribution.
    pub fn beta(&mut self, alpha: f64) -> f64 {
        let (a, b) = (self.gamma(alpha), self.gamma(alpha));
        if a + b > 0.0 { a / (a + b) } else { 0.5 }
    }

    /// Brings the elements into a random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, elements: &mut [T]) {
        for i in (1..elements.len()).rev() {
            elements.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_the_published_one() {
        // The reference implementation, state 1, 2, 3, 4.
        let mut r = Random([1, 2, 3, 4]);
        assert_eq!([r.bits(), r.bits(), r.bits()], [41_943_041, 58_720_359, 3_588_806_011_781_223]);
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let mut r = Random::new(1);
        let n = 20_000;
        let mean = |f: &mut dyn FnMut() -> f64| (0..n).map(|_| f()).sum::<f64>() / f64::from(n);
        assert!((mean(&mut || r.uniform()) - 0.5).abs() < 0.01);
        assert!(mean(&mut || r.normal()).abs() < 0.03);
        assert!((mean(&mut || r.normal().powi(2)) - 1.0).abs() < 0.05);
        assert!((mean(&mut || r.gamma(0.4)) - 0.4).abs() < 0.03);
        assert!((mean(&mut || r.gamma(3.0)) - 3.0).abs() < 0.1);
        assert!((mean(&mut || r.beta(0.2)) - 0.5).abs() < 0.02);
        let mut seen = [0; 7];
        (0..7_000).for_each(|_| seen[r.below(7)] += 1);
        assert!(seen.iter().all(|&c| (850..1150).contains(&c)), "{seen:?}");
    }

    #[test]
    fn purposes_have_streams_of_their_own() {
        let first = |purpose: &[u64]| Random::derived(3, purpose).bits();
        assert_eq!(first(&[1, 2]), first(&[1, 2]));
        assert_ne!(first(&[1, 2]), first(&[2, 1]));
        assert_ne!(first(&[1, 2]), first(&[1, 2, 0]));
    }
}
