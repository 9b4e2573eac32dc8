use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::{EvictionPolicy, Position};
use crate::{ChunkId, ChunkTrace};

/// `belady`: the chunk whose next use lies farthest ahead leaves (L. A. Bélády, 1966: the optimum when everything is
/// read on demand). It needs the future, so it is the bound that others are measured by.
#[derive(Debug)]
pub struct Belady {
    /// Per chunk: the turns that use it.
    turns: HashMap<ChunkId, Vec<u32>>,
    turns_seen: u32,
    resident: BTreeSet<ChunkId>,
}

impl Belady {
    /// For a run that is the recorded one.
    pub fn new(trace: &Arc<ChunkTrace>) -> Belady {
        let mut turns: HashMap<ChunkId, Vec<u32>> = HashMap::new();
        for (i, turn) in trace.turns().enumerate() {
            for choice in turn.uses {
                turns.entry(ChunkId::new(turn.group, choice.index)).or_default().push(i as u32);
            }
        }
        Belady { turns, turns_seen: 0, resident: BTreeSet::new() }
    }

    /// The next turn that uses the chunk, after all turns that have begun.
    fn next_use(&self, chunk: ChunkId) -> u32 {
        let turns = self.turns.get(&chunk).map(Vec::as_slice).unwrap_or_default();
        let passed = turns.partition_point(|&turn| turn < self.turns_seen);
        turns.get(passed).copied().unwrap_or(u32::MAX)
    }
}

impl EvictionPolicy for Belady {
    fn name(&self) -> &'static str {
        "belady"
    }

    fn inserted(&mut self, chunk: ChunkId, _ahead: bool) {
        self.resident.insert(chunk);
    }

    fn removed(&mut self, chunk: ChunkId) {
        self.resident.remove(&chunk);
    }

    fn used(&mut self, _chunk: ChunkId, _score: f32) {}

    fn group_used(&mut self, _at: Position) {
        self.turns_seen += 1;
    }

    fn victim(&mut self, _incoming: ChunkId, evictable: &dyn Fn(ChunkId) -> bool) -> Option<ChunkId> {
        self.resident.iter().copied().filter(|&c| evictable(c)).max_by_key(|&c| self.next_use(c))
    }
}
