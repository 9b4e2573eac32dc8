//! Measurements of this machine for `lighter doctor`.

mod compute;
mod disk;
mod memory;

pub use compute::{gemm_f32 as gemm_f32_rates, gemm_int8 as gemm_int8_rates, isa};
pub use disk::measure as disk_rates;
pub use memory::measure as memory_rates;

/// 1, 2, 4, … and `cores` itself.
pub fn thread_counts(cores: u32) -> Vec<u32> {
    let mut counts: Vec<u32> = (0..).map(|shift| 1u32 << shift).take_while(|n| *n < cores).collect();
    counts.push(cores.max(1));
    counts
}

/// A sequence of numbers without a pattern that a disk or a processor could use (xorshift64).
#[derive(Debug)]
pub struct Scramble(u64);

impl Scramble {
    /// A sequence that depends only on `seed`.
    pub fn new(seed: u64) -> Scramble {
        Scramble(seed | 1)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_threads() {
        assert_eq!(thread_counts(1), [1]);
        assert_eq!(thread_counts(2), [1, 2]);
        assert_eq!(thread_counts(6), [1, 2, 4, 6]);
        assert_eq!(thread_counts(0), [1]);
    }
}
