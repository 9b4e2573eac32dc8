//! Random numbers by counting: number `i` of a stream is a function of the key and `i` alone, so that results do
//! not depend on the order or the thread in which they are drawn. The function is Philox 4×32 with ten rounds
//! (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

/// A stream of random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Philox {
    key: u64,
}

impl Philox {
    /// The stream with this key.
    pub const fn new(key: u64) -> Philox {
        Philox { key }
    }

    /// Block `index` of the stream: 128 random bits.
    pub fn block(self, index: u64) -> [u32; 4] {
        let mut c = [index as u32, (index >> 32) as u32, 0, 0];
        let mut k = [self.key as u32, (self.key >> 32) as u32];
        for _ in 0..10 {
            let a = u64::from(c[0]) * 0xd251_1f53;
            let b = u64::from(c[2]) * 0xcd9e_8d57;
            c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
            k = [k[0].wrapping_add(0x9e37_79b9), k[1].wrapping_add(0xbb67_ae85)];
        }
        c
    }

    /// Two numbers of `[0, 1)` with 53 random bits each.
    pub fn uniform_pair(self, index: u64) -> [f64; 2] {
        let [a, b, c, d] = self.block(index);
        let unit = |high: u32, low: u32| {
            ((u64::from(high) << 32 | u64::from(low)) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
        };
        [unit(a, b), unit(c, d)]
    }

    /// Number `i` of `[0, 1)`.
    pub fn uniform(self, i: u64) -> f64 {
        self.uniform_pair(i / 2)[(i % 2) as usize]
    }

    /// Number `i` of the standard normal distribution (Box and Muller, 1958).
    pub fn normal(self, i: u64) -> f64 {
        let [a, b] = self.uniform_pair(i / 2);
        // 1 − a lies in (0, 1], so that the logarithm is finite.
        let radius = (-2.0 * (1.0 - a).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * b).sin_cos();
        radius * if i.is_multiple_of(2) { cos } else { sin }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        // From the authors' known-answer file (philox4x32-10, zero and all-ones counters and keys).
        assert_eq!(Philox::new(0).block(0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let stream = Philox::new(42);
        let n = 40_000u64;
        let moments = |f: &dyn Fn(u64) -> f64| {
            let mean = (0..n).map(f).sum::<f64>() / n as f64;
            let variance = (0..n).map(|i| (f(i) - mean).powi(2)).sum::<f64>() / n as f64;
            (mean, variance)
        };
        let (mean, variance) = moments(&|i| stream.uniform(i));
        assert!((mean - 0.5).abs() < 0.01 && (variance - 1.0 / 12.0).abs() < 0.003);
        let (mean, variance) = moments(&|i| stream.normal(i));
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.04);
        let pairs =
            (0..n / 2).map(|i| stream.normal(2 * i) * stream.normal(2 * i + 1)).sum::<f64>() / (n / 2) as f64;
        assert!(pairs.abs() < 0.03);
    }
}
