//! A recorded run again, without its model: what other policies, other capacities or another disk would have done.

use lightering_units::{Bytes, BytesPerSecond, Seconds};
use serde::Serialize;

use crate::cache::{ChunkCache, Job, Shape, Wanted};
use crate::policy::PolicySet;
use crate::{ChunkId, ChunkTrace, StoreStats, TierError};

/// A medium that serves one read after the other.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct DiskModel {
    /// Rate while a read moves bytes.
    pub rate: BytesPerSecond,
    /// Time before it does; what several reads at once hide of it is left out.
    pub latency: Seconds,
}

impl DiskModel {
    fn read(&self, bytes: Bytes) -> f64 {
        self.latency.0 + bytes.0 as f64 / self.rate.0
    }

    fn check(&self) -> Result<(), TierError> {
        if self.rate.0 > 0.0 && self.latency.0 >= 0.0 && self.latency.0.is_finite() {
            return Ok(());
        }
        Err(TierError::Invalid(format!(
            "a disk of {} with a latency of {}; expected a positive rate and no negative latency",
            self.rate, self.latency
        )))
    }
}

/// What a replay found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReplayReport {
    /// Name of the eviction policy, or `load-on-demand`.
    pub eviction: &'static str,
    /// Name of the predictor.
    pub prefetch: &'static str,
    /// Name of the admission policy.
    pub admission: &'static str,
    /// Slots of the replayed store.
    pub slots: u64,
    /// What the store did.
    pub stats: StoreStats,
    /// Share of the uses that found their chunk resident.
    pub hit_rate: f64,
    /// Bytes read.
    pub bytes_read: Bytes,
    /// Time in which computing waited for chunks.
    pub stall: Seconds,
    /// Time in which it did not, as recorded.
    pub computing: Seconds,
}

struct Replay {
    cache: ChunkCache,
    disk: DiskModel,
    piece_bytes: Bytes,
    running: Option<(Job, f64)>,
    now: f64,
}

impl Replay {
    fn start_reading(&mut self, now: f64) {
        if self.running.is_none() {
            self.running = self.cache.next_job(now).map(|job| (job, now + self.disk.read(self.piece_bytes)));
        }
    }

    /// Lets the disk work until `until`.
    fn pass(&mut self, until: f64) {
        self.start_reading(self.now);
        while let Some((job, done)) = self.running
            && done <= until
        {
            self.cache.finish(&job, Ok(()), done);
            self.running = None;
            self.start_reading(done);
        }
        self.now = until;
    }

    /// Takes one of the chunks, waiting for it if there is none, and computes on it.
    fn compute_on_any(&mut self, left: &mut Vec<u32>, computing: f64) -> Result<(), TierError> {
        let wanted = self.cache.begin_want_any(left)?;
        if !wanted.iter().any(|w| matches!(w, Wanted::Resident)) {
            self.cache.begin_stall(self.now);
            self.start_reading(self.now);
            while !left.iter().any(|&n| self.cache.slot_of(n).is_some()) {
                let Some((_, done)) = self.running else {
                    return Err(TierError::Internal(
                        "the replay waits for a read that never begins".to_owned(),
                    ));
                };
                self.pass(done);
            }
            self.cache.end_stall(self.now);
        }
        let position = left.iter().position(|&n| self.cache.slot_of(n).is_some()).unwrap_or(0);
        self.cache.end_want_any(left);
        let n = left.remove(position);
        self.cache.access_taken(n);
        self.cache.pin(n);
        self.pass(self.now + computing);
        self.cache.unpin(n);
        Ok(())
    }
}

/// Runs the trace through a store of `slots` slots with these policies and a simulated disk.
///
/// The policies are the ones of the live store, driven by the same decisions. Time is modelled: a group's computing is
/// divided equally among the chunks that it uses, which are computed on as they arrive.
///
/// ```
/// use std::sync::Arc;
/// use lightering_tier::policy::{PolicyContext, PolicySet};
/// use lightering_tier::{DiskModel, SyntheticTrace, replay};
/// use lightering_units::{BytesPerSecond, Seconds};
/// let trace = Arc::new(SyntheticTrace { steps: 50, ..SyntheticTrace::default() }.make()?);
/// let context = PolicyContext { groups: (0..8).collect(), slots: 128, trace: Some(trace.clone()) };
/// let disk = DiskModel { rate: BytesPerSecond(2e9), latency: Seconds(1e-4) };
/// let hits = |eviction| {
///     let policies = PolicySet::named(eviction, "none", "never", &context)?;
///     replay(&trace, policies, 128, disk).map(|report| report.stats.hits)
/// };
/// assert!(hits("belady")? > hits("lru")?);
/// # Ok::<(), lightering_tier::TierError>(())
/// ```
///
/// # Errors
/// `Invalid` for no slots or an impossible disk.
pub fn replay(
    trace: &ChunkTrace,
    policies: PolicySet,
    slots: usize,
    disk: DiskModel,
) -> Result<ReplayReport, TierError> {
    disk.check()?;
    if slots == 0 || slots > u32::MAX as usize {
        return Err(TierError::Invalid(format!("{slots} slots; expected at least one")));
    }
    let header = trace.header();
    let ids: Vec<ChunkId> = header
        .groups
        .iter()
        .flat_map(|&(group, count)| (0..count).map(move |index| ChunkId::new(group, index)))
        .collect();
    let slots = slots.min(ids.len());
    let shape = Shape {
        payload: vec![header.chunk_bytes.0; ids.len()],
        pieces: vec![1; ids.len()],
        slot_bytes: header.chunk_bytes,
        ids,
    };
    let names = (policies.eviction.name(), policies.predictor.name(), policies.admission.name());
    let cache = ChunkCache::new(shape, slots, policies, 1);
    let mut replay = Replay { cache, disk, piece_bytes: header.chunk_bytes, running: None, now: 0.0 };
    let mut step = 0;
    let mut computing = 0.0;
    for turn in trace.turns() {
        while step < turn.step {
            replay.cache.end_step();
            step += 1;
        }
        replay.cache.used(turn.group, turn.uses, replay.now)?;
        computing += turn.computing.0;
        let mut left = turn
            .uses
            .iter()
            .map(|u| replay.cache.number(ChunkId::new(turn.group, u.index)))
            .collect::<Result<Vec<u32>, TierError>>()?;
        let each = turn.computing.0 / left.len().max(1) as f64;
        if left.is_empty() {
            replay.pass(replay.now + turn.computing.0);
        }
        while !left.is_empty() {
            replay.compute_on_any(&mut left, each)?;
        }
    }
    while step < trace.steps() {
        replay.cache.end_step();
        step += 1;
    }
    let stats = replay.cache.stats(replay.now);
    Ok(ReplayReport {
        eviction: names.0,
        prefetch: names.1,
        admission: names.2,
        slots: slots as u64,
        hit_rate: stats.hit_rate(),
        bytes_read: stats.bytes_read(),
        stall: stats.stall,
        computing: Seconds(computing),
        stats,
    })
}

/// The baseline that keeps nothing: every chunk is read when it is needed (Fate's "Load on Demand", section 5).
///
/// # Errors
/// `Invalid` for an impossible disk.
pub fn replay_load_on_demand(trace: &ChunkTrace, disk: DiskModel) -> Result<ReplayReport, TierError> {
    disk.check()?;
    let read = disk.read(trace.header().chunk_bytes);
    let mut stats = StoreStats { steps: trace.steps(), ..StoreStats::default() };
    let (mut stall, mut computing) = (0.0, 0.0);
    for turn in trace.turns() {
        let each = turn.computing.0 / turn.uses.len().max(1) as f64;
        computing += turn.computing.0;
        // The first one is waited for, then the slower of reading and computing sets the pace.
        let uses = turn.uses.len() as f64;
        stall += if turn.uses.is_empty() { 0.0 } else { read + (uses - 1.0) * (read - each).max(0.0) };
        stats.accesses += turn.uses.len() as u64;
    }
    stats.misses = stats.accesses;
    stats.demand_bytes = trace.header().chunk_bytes * stats.accesses;
    stats.stall = Seconds(stall);
    stats.stalled_bytes = stats.demand_bytes;
    stats.reading = Seconds(read * stats.accesses as f64);
    Ok(ReplayReport {
        eviction: "load-on-demand",
        prefetch: "none",
        admission: "never",
        slots: 0,
        hit_rate: 0.0,
        bytes_read: stats.demand_bytes,
        stall: stats.stall,
        computing: Seconds(computing),
        stats,
    })
}
