use std::collections::HashSet;

use super::{EvictionPolicy, FrequencyTable, GroupLru};
use crate::ChunkId;

/// `static-hot`: half of the slots belong to the chunks that were used most often in an earlier run, and those never
/// leave for others; the rest is as `lru`.
#[derive(Debug)]
pub struct StaticHot {
    hot: HashSet<ChunkId>,
    /// Hot chunks that are resident.
    present: Vec<ChunkId>,
    rest: GroupLru,
}

impl StaticHot {
    /// Splits `slots` between the hottest of `table` and the rest.
    pub fn new(table: &FrequencyTable, groups: &[u32], slots: usize) -> StaticHot {
        let hot: HashSet<ChunkId> = table.ranked().into_iter().take(slots / 2).collect();
        let rest = GroupLru::new(groups, slots - hot.len());
        StaticHot { hot, present: Vec::new(), rest }
    }
}

impl EvictionPolicy for StaticHot {
    fn name(&self) -> &'static str {
        "static-hot"
    }

    fn inserted(&mut self, chunk: ChunkId, ahead: bool) {
        if self.hot.contains(&chunk) {
            self.present.push(chunk);
        } else {
            self.rest.inserted(chunk, ahead);
        }
    }

    fn removed(&mut self, chunk: ChunkId) {
        self.present.retain(|&c| c != chunk);
        self.rest.removed(chunk);
    }

    fn used(&mut self, chunk: ChunkId, score: f32) {
        self.rest.used(chunk, score);
    }

    fn victim(&mut self, incoming: ChunkId, evictable: &dyn Fn(ChunkId) -> bool) -> Option<ChunkId> {
        // A hot one leaves only when nothing else could make room.
        let rest = self.rest.victim(incoming, evictable);
        rest.or_else(|| self.present.iter().copied().find(|&c| evictable(c)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SyntheticTrace;

    #[test]
    fn the_hottest_stay() {
        let synthetic = SyntheticTrace { steps: 50, ..SyntheticTrace::default() };
        let trace = synthetic.make().unwrap();
        let table = FrequencyTable::of(&trace);
        let ranked = table.ranked();
        assert!(table.uses(ranked[0]) >= table.uses(ranked[1]) && table.uses(ranked[1]) > 0);
        let groups: Vec<u32> = trace.header().groups.iter().map(|g| g.0).collect();
        let mut policy = StaticHot::new(&table, &groups, 4);
        for &chunk in &ranked[..4] {
            policy.inserted(chunk, false);
        }
        let incoming = ranked[5];
        let victim = policy.victim(incoming, &|_| true).unwrap();
        assert!(ranked[2..4].contains(&victim));
        assert_eq!(policy.victim(incoming, &|c| ranked[..2].contains(&c)), Some(ranked[0]));
        policy.removed(ranked[0]);
        assert_eq!(policy.victim(incoming, &|c| ranked[..2].contains(&c)), Some(ranked[1]));
    }
}
