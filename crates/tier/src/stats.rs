use lightering_units::{Bytes, BytesPerSecond, Seconds};
use serde::Serialize;

use crate::ChunkId;

/// What a store has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StoreStats {
    /// Steps that have ended.
    pub steps: u64,
    /// Chunks that were needed.
    pub accesses: u64,
    /// Of these, resident when they were needed.
    pub hits: u64,
    /// Of these, already being read.
    pub late: u64,
    /// Of these, neither.
    pub misses: u64,
    /// Prefetches that were accepted.
    pub prefetches_issued: u64,
    /// Prefetches that admission refused.
    pub prefetches_refused: u64,
    /// Prefetches given up before reading began.
    pub prefetches_cancelled: u64,
    /// Prefetched chunks that were needed after all, in time or while being read.
    pub prefetches_used: u64,
    /// Prefetches that turned into demands before reading began.
    pub prefetches_promoted: u64,
    /// Prefetched chunks that left without having been needed.
    pub prefetches_wasted: u64,
    /// Chunks that left their slots.
    pub evictions: u64,
    /// Reads that failed.
    pub read_errors: u64,
    /// Bytes of chunks that were read because they were needed.
    pub demand_bytes: Bytes,
    /// Bytes of chunks that were read ahead.
    pub prefetch_bytes: Bytes,
    /// Time in which at least one thread waited for a chunk.
    pub stall: Seconds,
    /// Time in which at least one read was under way.
    pub reading: Seconds,
    /// Bytes read while somebody waited, each read counted by the share of its time that fell into waiting.
    pub stalled_bytes: Bytes,
}

impl StoreStats {
    /// Share of accesses that found their chunk resident; 0 before the first.
    pub fn hit_rate(&self) -> f64 {
        self.hits as f64 / (self.accesses.max(1)) as f64
    }

    /// What was done since `before`.
    pub fn since(&self, before: &StoreStats) -> StoreStats {
        StoreStats {
            steps: self.steps - before.steps,
            accesses: self.accesses - before.accesses,
            hits: self.hits - before.hits,
            late: self.late - before.late,
            misses: self.misses - before.misses,
            prefetches_issued: self.prefetches_issued - before.prefetches_issued,
            prefetches_refused: self.prefetches_refused - before.prefetches_refused,
            prefetches_cancelled: self.prefetches_cancelled - before.prefetches_cancelled,
            prefetches_used: self.prefetches_used - before.prefetches_used,
            prefetches_promoted: self.prefetches_promoted - before.prefetches_promoted,
            prefetches_wasted: self.prefetches_wasted - before.prefetches_wasted,
            evictions: self.evictions - before.evictions,
            read_errors: self.read_errors - before.read_errors,
            demand_bytes: self.demand_bytes - before.demand_bytes,
            prefetch_bytes: self.prefetch_bytes - before.prefetch_bytes,
            stall: self.stall - before.stall,
            reading: self.reading - before.reading,
            stalled_bytes: self.stalled_bytes - before.stalled_bytes,
        }
    }

    /// Bytes read for whatever reason.
    pub fn bytes_read(&self) -> Bytes {
        self.demand_bytes + self.prefetch_bytes
    }

    /// Rate of reading while somebody waited: what of the medium's rate reached those who needed it. `None` without a
    /// stall.
    pub fn stalled_rate(&self) -> Option<BytesPerSecond> {
        (self.stall.0 > 0.0).then(|| self.stalled_bytes / self.stall)
    }

    /// Share of the finished prefetches that were needed; `None` before the first.
    pub fn prefetch_precision(&self) -> Option<f64> {
        let done = self.prefetches_used + self.prefetches_wasted;
        (done > 0).then(|| self.prefetches_used as f64 / done as f64)
    }
}

/// Where a chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Residency {
    /// In its source only.
    Absent,
    /// Waiting to be read.
    Queued,
    /// Being read.
    Loading,
    /// In a slot.
    Resident,
    /// In a slot and held by a guard.
    Pinned,
}

/// A chunk and where it is, for a map of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ChunkResidency {
    /// Which.
    pub chunk: ChunkId,
    /// Where.
    pub residency: Residency,
}

/// Time in which at least one of several things was going on.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BusyTime {
    active: u32,
    since: f64,
    total: f64,
}

impl BusyTime {
    pub fn enter(&mut self, now: f64) {
        if self.active == 0 {
            self.since = now;
        }
        self.active += 1;
    }

    pub fn leave(&mut self, now: f64) {
        self.active = self.active.saturating_sub(1);
        if self.active == 0 {
            self.total += (now - self.since).max(0.0);
        }
    }

    pub fn at(&self, now: f64) -> f64 {
        self.total + if self.active > 0 { (now - self.since).max(0.0) } else { 0.0 }
    }
}
