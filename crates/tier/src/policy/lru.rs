use std::collections::{BTreeMap, HashMap};

use super::EvictionPolicy;
use crate::ChunkId;

/// Recency of what is resident: a stamp per chunk, and the chunks of each group by stamp.
#[derive(Debug, Default)]
pub(super) struct Recency {
    clock: u64,
    stamps: HashMap<ChunkId, u64>,
    groups: BTreeMap<u32, BTreeMap<u64, ChunkId>>,
}

impl Recency {
    /// Makes a resident chunk the most recent one, or adds it.
    pub fn touch(&mut self, chunk: ChunkId) {
        self.clock += 1;
        let group = self.groups.entry(chunk.group).or_default();
        if let Some(old) = self.stamps.insert(chunk, self.clock) {
            group.remove(&old);
        }
        group.insert(self.clock, chunk);
    }

    /// Makes a chunk the most recent one if it is resident.
    fn refresh(&mut self, chunk: ChunkId) {
        if self.contains(chunk) {
            self.touch(chunk);
        }
    }

    pub fn contains(&self, chunk: ChunkId) -> bool {
        self.stamps.contains_key(&chunk)
    }

    pub fn remove(&mut self, chunk: ChunkId) {
        if let Some(old) = self.stamps.remove(&chunk)
            && let Some(group) = self.groups.get_mut(&chunk.group)
        {
            group.remove(&old);
        }
    }

    /// All with their stamps; an older one has a smaller stamp.
    pub fn iter(&self) -> impl Iterator<Item = (u64, ChunkId)> + '_ {
        self.groups.values().flatten().map(|(&stamp, &chunk)| (stamp, chunk))
    }

    pub fn resident(&self, group: u32) -> usize {
        self.groups.get(&group).map_or(0, BTreeMap::len)
    }

    fn oldest_of(&self, group: u32, evictable: &dyn Fn(ChunkId) -> bool) -> Option<ChunkId> {
        self.groups.get(&group)?.values().copied().find(|&c| evictable(c))
    }

    pub fn oldest(&self, evictable: &dyn Fn(ChunkId) -> bool) -> Option<ChunkId> {
        let first = |group: &BTreeMap<u64, ChunkId>| {
            group.iter().find(|(_, c)| evictable(**c)).map(|(stamp, chunk)| (*stamp, *chunk))
        };
        self.groups.values().filter_map(first).min_by_key(|(stamp, _)| *stamp).map(|(_, chunk)| chunk)
    }
}

/// `lru`: the least recently used chunk of the same group leaves, so that a pass over all layers does not push out
/// what the next pass begins with.
///
/// Each group has an equal share of the slots, or the shares that it is given (Fate, section 3, gives the first
/// layers more). A group may exceed its share while others use less; what exceeds its share most leaves first.
#[derive(Debug)]
pub struct GroupLru {
    recency: Recency,
    shares: HashMap<u32, usize>,
}

impl GroupLru {
    /// Equal shares of `slots`; groups that come first get what cannot be divided.
    pub fn new(groups: &[u32], slots: usize) -> GroupLru {
        let (each, rest) = (slots / groups.len().max(1), slots % groups.len().max(1));
        GroupLru::with_shares(groups.iter().enumerate().map(|(i, &g)| (g, each + usize::from(i < rest))))
    }

    /// Slots for each group.
    pub fn with_shares(shares: impl IntoIterator<Item = (u32, usize)>) -> GroupLru {
        GroupLru { recency: Recency::default(), shares: shares.into_iter().collect() }
    }

    fn excess(&self, group: u32) -> isize {
        self.recency.resident(group) as isize - self.shares.get(&group).map_or(0, |&s| s as isize)
    }
}

impl EvictionPolicy for GroupLru {
    fn name(&self) -> &'static str {
        "lru"
    }

    fn inserted(&mut self, chunk: ChunkId, _ahead: bool) {
        self.recency.touch(chunk);
    }

    fn removed(&mut self, chunk: ChunkId) {
        self.recency.remove(chunk);
    }

    fn used(&mut self, chunk: ChunkId, _score: f32) {
        self.recency.refresh(chunk);
    }

    fn victim(&mut self, incoming: ChunkId, evictable: &dyn Fn(ChunkId) -> bool) -> Option<ChunkId> {
        if self.excess(incoming.group) >= 0
            && let Some(own) = self.recency.oldest_of(incoming.group, evictable)
        {
            return Some(own);
        }
        let mut groups: Vec<u32> = self.recency.groups.keys().copied().collect();
        groups.sort_by_key(|&g| std::cmp::Reverse(self.excess(g)));
        groups.into_iter().find_map(|g| self.recency.oldest_of(g, evictable))
    }
}

/// `lru-global`: the least recently used chunk of all groups leaves (SmallThinker's engine, section 3).
#[derive(Debug, Default)]
pub struct GlobalLru {
    recency: Recency,
}

impl EvictionPolicy for GlobalLru {
    fn name(&self) -> &'static str {
        "lru-global"
    }

    fn inserted(&mut self, chunk: ChunkId, _ahead: bool) {
        self.recency.touch(chunk);
    }

    fn removed(&mut self, chunk: ChunkId) {
        self.recency.remove(chunk);
    }

    fn used(&mut self, chunk: ChunkId, _score: f32) {
        self.recency.refresh(chunk);
    }

    fn victim(&mut self, _incoming: ChunkId, evictable: &dyn Fn(ChunkId) -> bool) -> Option<ChunkId> {
        self.recency.oldest(evictable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(group: u32, index: u32) -> ChunkId {
        ChunkId::new(group, index)
    }

    #[test]
    fn the_oldest_of_the_own_group_leaves_first() {
        let mut policy = GroupLru::new(&[0, 1], 4);
        for c in [chunk(0, 0), chunk(1, 0), chunk(0, 1), chunk(1, 1)] {
            policy.inserted(c, false);
        }
        policy.used(chunk(1, 0), 1.0);
        assert_eq!(policy.victim(chunk(1, 2), &|_| true), Some(chunk(1, 1)));
        assert_eq!(policy.victim(chunk(1, 2), &|c| c.group == 0), Some(chunk(0, 0)));
        assert_eq!(policy.victim(chunk(1, 2), &|_| false), None);
        // Below its share a group takes from the one that exceeds its own.
        policy.removed(chunk(1, 1));
        policy.inserted(chunk(0, 2), true);
        assert_eq!(policy.victim(chunk(1, 2), &|_| true), Some(chunk(0, 0)));
        let mut global = GlobalLru::default();
        for c in [chunk(0, 0), chunk(1, 0), chunk(0, 1)] {
            global.inserted(c, false);
        }
        global.used(chunk(0, 0), 1.0);
        global.used(chunk(7, 7), 1.0);
        assert_eq!(global.victim(chunk(0, 5), &|_| true), Some(chunk(1, 0)));
    }
}
