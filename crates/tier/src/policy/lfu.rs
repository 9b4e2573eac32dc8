use std::collections::HashMap;

use super::EvictionPolicy;
use super::lru::Recency;
use crate::ChunkId;

/// `lfu`: the least frequently used chunk leaves; a use counts half after [`Lfu::HALF_LIFE_STEPS`] steps, and is
/// remembered after the chunk has left (the ghost history, one entry for each chunk that was ever used).
#[derive(Debug, Default)]
pub struct Lfu {
    recency: Recency,
    step: u64,
    /// Per chunk: logarithm of its decayed count, moved so that it need not be touched as time passes.
    weights: HashMap<ChunkId, f64>,
}

impl Lfu {
    /// Steps after which a use counts half.
    pub const HALF_LIFE_STEPS: f64 = 64.0;

    fn weight(&self, chunk: ChunkId) -> f64 {
        self.weights.get(&chunk).copied().unwrap_or(f64::NEG_INFINITY)
    }
}

impl EvictionPolicy for Lfu {
    fn name(&self) -> &'static str {
        "lfu"
    }

    fn inserted(&mut self, chunk: ChunkId, _ahead: bool) {
        self.recency.touch(chunk);
    }

    fn removed(&mut self, chunk: ChunkId) {
        self.recency.remove(chunk);
    }

    fn used(&mut self, chunk: ChunkId, _score: f32) {
        let now = self.step as f64 / Lfu::HALF_LIFE_STEPS;
        let weight = self.weights.entry(chunk).or_insert(f64::NEG_INFINITY);
        // A count c that was last touched at time t is now c·2^(t − now); its logarithm plus now is what is kept.
        *weight = ((*weight - now).exp2() + 1.0).log2() + now;
        if self.recency.contains(chunk) {
            self.recency.touch(chunk);
        }
    }

    fn end_step(&mut self) {
        self.step += 1;
    }

    fn victim(&mut self, _incoming: ChunkId, evictable: &dyn Fn(ChunkId) -> bool) -> Option<ChunkId> {
        let candidates = self.recency.iter().filter(|&(_, chunk)| evictable(chunk));
        candidates
            .min_by(|(s, a), (t, b)| self.weight(*a).total_cmp(&self.weight(*b)).then(s.cmp(t)))
            .map(|(_, chunk)| chunk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_outlive_eviction_and_decay() {
        let c = |index| ChunkId::new(0, index);
        let mut policy = Lfu::default();
        for index in 0..3 {
            policy.inserted(c(index), false);
        }
        for index in [0, 0, 0, 1, 2, 2] {
            policy.used(c(index), 1.0);
        }
        assert_eq!(policy.victim(c(9), &|_| true), Some(c(1)));
        // The ghost of 0 comes back with its count.
        policy.removed(c(0));
        policy.inserted(c(0), false);
        assert_eq!(policy.victim(c(9), &|x| x != c(1)), Some(c(2)));
        // After ten half-lives three uses count less than one new one.
        for _ in 0..640 {
            policy.end_step();
        }
        policy.used(c(1), 1.0);
        policy.used(c(2), 1.0);
        assert_eq!(policy.victim(c(9), &|_| true), Some(c(0)));
        assert!(policy.weights.values().all(|w| w.is_finite()));
    }
}
