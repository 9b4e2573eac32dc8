//! What a store decides, without threads, clocks or bytes: which chunk is read next, into which slot, and who leaves.
//! The live store drives it with real reads, the replay of a trace with simulated ones.
//!
//! A chunk that is not resident is read by a job of the queue. Jobs are ordered by urgency: those somebody waits for,
//! those that are demanded, prefetches by position. A slot is given to a job only when its read begins, so that a
//! prefetch that is cancelled or overtaken has cost nothing.
//!
//! Which chunks may be pushed out, by whom:
//!
//! | chunk | by a prefetch | by a demand | by a demand that somebody waits for |
//! |---|---|---|---|
//! | held by a guard, or waited for | no | no | no |
//! | chosen by the router just now | no | no | yes |
//! | prefetched and not used yet | no | yes | yes |
//! | any other | yes | yes | yes |
//!
//! No deadlock: whoever would wait is refused when the chunks that are held or waited for, with the new one, exceed the
//! slots. So a slot is always free, evictable by the waiting job, or about to become so.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, OnceLock};

use lightering_units::{Bytes, Seconds};

use crate::policy::{AdmissionView, PolicySet, Position, Prediction, Use};
use crate::stats::BusyTime;
use crate::{ChunkCatalog, ChunkId, ChunkResidency, Residency, StoreStats, TierError};

/// Weight of the newest value in running means: about the last 32 values count.
const RECENT: f64 = 1.0 / 32.0;

/// Steps after which a prefetched chunk that nobody asked for is no longer kept for its purpose.
const PREFETCH_KEPT_STEPS: u64 = 2;

/// What the cache must know of the chunks.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    /// In order.
    pub ids: Vec<ChunkId>,
    /// Bytes that reading one moves.
    pub payload: Vec<u64>,
    /// In how many parts it may be read.
    pub pieces: Vec<u32>,
    pub slot_bytes: Bytes,
}

impl Shape {
    pub fn of(catalog: &ChunkCatalog) -> Shape {
        let numbers = 0..catalog.len() as u32;
        Shape {
            ids: catalog.chunks().collect(),
            payload: numbers.clone().map(|n| catalog.payload_of(n)).collect(),
            pieces: numbers.map(|n| catalog.pieces_of(n)).collect(),
            slot_bytes: catalog.slot_bytes(),
        }
    }

    /// The groups in order.
    pub fn groups(&self) -> Vec<u32> {
        let mut groups: Vec<u32> = self.ids.iter().map(|id| id.group).collect();
        groups.dedup();
        groups
    }

    /// The groups in order, each with one more than its largest index.
    pub fn group_sizes(&self) -> Vec<(u32, u32)> {
        let groups = self.ids.chunk_by(|a, b| a.group == b.group);
        groups.filter_map(|ids| ids.last().map(|id| (id.group, id.index.saturating_add(1)))).collect()
    }
}

/// How pressing a read is; smaller is earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct QueueKey {
    class: Class,
    deadline: u64,
    order: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Waited,
    Demanded,
    Ahead,
}

/// One try to read a chunk; those who wait for it learn of its failure here.
#[derive(Debug, Default)]
pub(crate) struct Attempt {
    failure: OnceLock<TierError>,
}

impl Attempt {
    pub fn failure(&self) -> Option<&TierError> {
        self.failure.get()
    }
}

#[derive(Clone, Debug)]
enum Place {
    Absent,
    Queued { key: QueueKey, attempt: Arc<Attempt> },
    Loading { slot: u32, pieces_left: u32, error: Option<TierError>, ahead: bool, attempt: Arc<Attempt> },
    Resident { slot: u32 },
}

/// Why a chunk should stay for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claim {
    None,
    Ahead { step: u64 },
    Chosen,
}

#[derive(Clone, Debug)]
struct State {
    place: Place,
    claim: Claim,
    /// Announced by `used`, not acquired since.
    announced: bool,
    /// Read ahead, not needed since.
    unproven: bool,
    pins: u32,
    /// Who needs a slot for it: guards count as one, each who waits for this very chunk as part of the same one.
    waiters: u32,
    any_waiters: u32,
}

impl State {
    fn is_held(&self) -> bool {
        self.pins > 0 || self.waiters > 0
    }
}

/// A piece of a chunk to be read into a slot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    pub chunk: u32,
    pub piece: u32,
    pub slot: u32,
    ahead: bool,
    started: f64,
    stall_before: f64,
}

/// What one who wants a chunk finds.
#[derive(Debug)]
pub(crate) enum Wanted {
    Resident,
    Pending(Arc<Attempt>),
}

pub(crate) struct ChunkCache {
    shape: Shape,
    groups: Vec<u32>,
    states: Vec<State>,
    slots: usize,
    free: Vec<u32>,
    queue: BTreeMap<QueueKey, u32>,
    /// Pieces of chunks whose slot is known.
    pieces: VecDeque<Job>,
    /// Reads ahead that are under way, and the most that may be.
    ahead_reads: usize,
    ahead_reads_max: usize,
    order: u64,
    held: usize,
    any_waits: usize,
    /// Chunks with the claim `Chosen`.
    chosen: Vec<u32>,
    /// Chunks with the claim `Ahead`.
    ahead: Vec<u32>,
    policies: PolicySet,
    position: Position,
    /// Per group: what was predicted for its next turn.
    predicted: Vec<Vec<u32>>,
    stats: StoreStats,
    stall: BusyTime,
    reading: BusyTime,
    demand_reading: BusyTime,
    precision: Option<f64>,
    demand_share: f64,
    read_seconds: f64,
    group_seconds: f64,
    last_turn: Option<(f64, f64)>,
    scratch: Vec<Prediction>,
}

impl ChunkCache {
    pub fn new(shape: Shape, slots: usize, policies: PolicySet, ahead_reads_max: usize) -> ChunkCache {
        let empty = State {
            place: Place::Absent,
            claim: Claim::None,
            announced: false,
            unproven: false,
            pins: 0,
            waiters: 0,
            any_waiters: 0,
        };
        let groups = shape.groups();
        ChunkCache {
            states: vec![empty; shape.ids.len()],
            slots,
            free: (0..slots as u32).rev().collect(),
            queue: BTreeMap::new(),
            pieces: VecDeque::new(),
            ahead_reads: 0,
            ahead_reads_max: ahead_reads_max.max(1),
            order: 0,
            held: 0,
            any_waits: 0,
            chosen: Vec::new(),
            ahead: Vec::new(),
            policies,
            position: Position { step: 0, group: groups.first().copied().unwrap_or(0) },
            predicted: vec![Vec::new(); groups.len()],
            stats: StoreStats::default(),
            stall: BusyTime::default(),
            reading: BusyTime::default(),
            demand_reading: BusyTime::default(),
            precision: None,
            demand_share: 0.0,
            read_seconds: 0.0,
            group_seconds: 0.0,
            last_turn: None,
            scratch: Vec::new(),
            shape,
            groups,
        }
    }

    pub fn number(&self, chunk: ChunkId) -> Result<u32, TierError> {
        match self.shape.ids.binary_search(&chunk) {
            Ok(n) => Ok(n as u32),
            Err(_) => Err(TierError::UnknownChunk { chunk, chunks: self.shape.ids.len() }),
        }
    }

    pub fn position(&self) -> Position {
        self.position
    }

    pub fn slot_of(&self, n: u32) -> Option<u32> {
        match self.states[n as usize].place {
            Place::Resident { slot } => Some(slot),
            _ => None,
        }
    }

    /// Position as a number that grows along the run.
    fn deadline(&self, at: Position) -> u64 {
        let rank = self.groups.partition_point(|&g| g < at.group) as u64;
        at.step.saturating_mul(self.groups.len() as u64).saturating_add(rank)
    }

    fn enqueue(&mut self, n: u32, class: Class, deadline: u64) -> Arc<Attempt> {
        self.order += 1;
        let key = QueueKey { class, deadline, order: self.order };
        let attempt = match &self.states[n as usize].place {
            // A job keeps its turn within its class and changes only to a more urgent one.
            Place::Queued { key: old, attempt } => {
                let (old, attempt) = (*old, attempt.clone());
                if (class, deadline) >= (old.class, old.deadline) {
                    return attempt;
                }
                self.queue.remove(&old);
                if old.class == Class::Ahead && class != Class::Ahead {
                    self.stats.prefetches_promoted += 1;
                    self.release_ahead(n);
                }
                attempt
            }
            _ => Arc::new(Attempt::default()),
        };
        self.queue.insert(key, n);
        self.states[n as usize].place = Place::Queued { key, attempt: attempt.clone() };
        attempt
    }

    /// Asks for a chunk that will be acquired soon. True if there is new work.
    pub fn demand(&mut self, n: u32) -> bool {
        let deadline = self.deadline(self.position);
        if let Place::Loading { .. } = self.states[n as usize].place {
            self.hurry(n);
        }
        if matches!(self.states[n as usize].place, Place::Resident { .. } | Place::Loading { .. }) {
            return false;
        }
        self.enqueue(n, Class::Demanded, deadline);
        true
    }

    /// Asks for a chunk ahead of its use. True if there is new work.
    pub fn prefetch(&mut self, prediction: &Prediction) -> Result<bool, TierError> {
        let n = self.number(prediction.chunk)?;
        if let Ok(rank) = self.groups.binary_search(&prediction.chunk.group)
            && !self.predicted[rank].contains(&n)
        {
            self.predicted[rank].push(n);
        }
        let deadline = self.deadline(prediction.at);
        match self.states[n as usize].place {
            Place::Resident { .. } | Place::Loading { .. } => return Ok(false),
            Place::Queued { .. } => {
                self.enqueue(n, Class::Ahead, deadline);
                return Ok(false);
            }
            Place::Absent => {}
        }
        let groups_between = deadline.saturating_sub(self.deadline(self.position)).max(1);
        let view = AdmissionView {
            precision: self.precision,
            demand_share: self.demand_share,
            prefetches_under_way: self.ahead.len(),
            read: Seconds(self.read_seconds),
            window: Seconds(self.group_seconds * groups_between as f64),
        };
        if !self.policies.admission.admits(prediction, &view) {
            self.stats.prefetches_refused += 1;
            return Ok(false);
        }
        self.stats.prefetches_issued += 1;
        self.enqueue(n, Class::Ahead, deadline);
        self.states[n as usize].claim = Claim::Ahead { step: self.position.step.max(prediction.at.step) };
        self.ahead.push(n);
        Ok(true)
    }

    /// Gives up a prefetch whose read has not begun. True if there was one.
    pub fn cancel(&mut self, n: u32) -> bool {
        let Place::Queued { key, .. } = self.states[n as usize].place else { return false };
        if key.class != Class::Ahead {
            return false;
        }
        self.queue.remove(&key);
        self.states[n as usize].place = Place::Absent;
        self.release_ahead(n);
        self.stats.prefetches_cancelled += 1;
        true
    }

    /// Ends the protection of a prefetched chunk.
    fn release_ahead(&mut self, n: u32) {
        if let Claim::Ahead { .. } = self.states[n as usize].claim {
            self.states[n as usize].claim = Claim::None;
        }
        self.ahead.retain(|&m| m != n);
    }

    fn count_access(&mut self, n: u32) {
        self.stats.accesses += 1;
        let state = &mut self.states[n as usize];
        match state.place {
            Place::Resident { .. } => self.stats.hits += 1,
            Place::Loading { .. } => self.stats.late += 1,
            Place::Queued { key, .. } if key.class != Class::Ahead => self.stats.late += 1,
            Place::Queued { .. } | Place::Absent => self.stats.misses += 1,
        }
        if std::mem::take(&mut state.unproven) {
            self.stats.prefetches_used += 1;
        }
    }

    fn choose(&mut self, n: u32) {
        if let Claim::Ahead { .. } = self.states[n as usize].claim {
            self.release_ahead(n);
        }
        if self.states[n as usize].claim != Claim::Chosen {
            self.states[n as usize].claim = Claim::Chosen;
            self.chosen.push(n);
        }
    }

    /// What the router chose for a group: counts hits, demands what is missing, gives up prefetches that were wrong,
    /// and predicts for the groups that follow.
    pub fn used(&mut self, group: u32, uses: &[Use], now: f64) -> Result<(), TierError> {
        let numbers = uses
            .iter()
            .map(|u| self.number(ChunkId::new(group, u.index)))
            .collect::<Result<Vec<u32>, TierError>>()?;
        self.position = Position { step: self.position.step, group };
        for n in std::mem::take(&mut self.chosen) {
            self.states[n as usize].claim = Claim::None;
            self.states[n as usize].announced = false;
        }
        // Prefetches for this group that were wrong.
        let wrong = |n: &u32| self.shape.ids[*n as usize].group == group && !numbers.contains(n);
        let wrong: Vec<u32> = self.ahead.iter().copied().filter(wrong).collect();
        for n in wrong {
            if !self.cancel(n) {
                self.release_ahead(n);
            }
        }
        self.judge_prediction(group, &numbers);
        self.measure_turn(now);
        for (&n, choice) in numbers.iter().zip(uses) {
            self.count_access(n);
            self.policies.eviction.used(self.shape.ids[n as usize], choice.score);
            self.choose(n);
            self.states[n as usize].announced = true;
        }
        self.policies.eviction.group_used(self.position);
        for &n in &numbers {
            self.demand(n);
        }
        self.policies.predictor.observed(self.position, uses);
        self.predict()
    }

    fn judge_prediction(&mut self, group: u32, numbers: &[u32]) {
        let Ok(rank) = self.groups.binary_search(&group) else { return };
        let predicted = std::mem::take(&mut self.predicted[rank]);
        if !predicted.is_empty() {
            let right = predicted.iter().filter(|n| numbers.contains(n)).count();
            let precision = right as f64 / predicted.len() as f64;
            self.precision = Some(mean(self.precision, precision));
        }
    }

    /// Running means of how long a group's turn takes and how much of that time demanded chunks are being read.
    fn measure_turn(&mut self, now: f64) {
        let busy = self.demand_reading.at(now);
        if let Some((last, busy_before)) = self.last_turn.replace((now, busy)) {
            let passed = now - last;
            if passed > 0.0 {
                let share = ((busy - busy_before) / passed).clamp(0.0, 1.0);
                self.demand_share += RECENT * (share - self.demand_share);
                let known = (self.group_seconds > 0.0).then_some(self.group_seconds);
                self.group_seconds = mean(known, passed);
            }
        }
    }

    fn predict(&mut self) -> Result<(), TierError> {
        let Ok(rank) = self.groups.binary_search(&self.position.group) else { return Ok(()) };
        for ahead in 1..=self.policies.lookahead {
            let place = rank + ahead;
            let coming = Position {
                step: self.position.step + (place / self.groups.len()) as u64,
                group: self.groups[place % self.groups.len()],
            };
            let mut predictions = std::mem::take(&mut self.scratch);
            predictions.clear();
            self.policies.predictor.predict(coming, &mut predictions);
            for prediction in &predictions {
                // A predictor may name what this catalog does not hold, such as shared experts.
                if self.number(prediction.chunk).is_ok() {
                    self.prefetch(prediction)?;
                }
            }
            self.scratch = predictions;
        }
        Ok(())
    }

    pub fn end_step(&mut self) {
        self.stats.steps += 1;
        self.position.step += 1;
        self.position.group = self.groups.first().copied().unwrap_or(0);
        for n in std::mem::take(&mut self.chosen) {
            self.states[n as usize].claim = Claim::None;
            self.states[n as usize].announced = false;
        }
        let step = self.position.step;
        let old: Vec<u32> = self
            .ahead
            .iter()
            .copied()
            .filter(|&n| match self.states[n as usize].claim {
                Claim::Ahead { step: made } => made + PREFETCH_KEPT_STEPS <= step,
                _ => true,
            })
            .collect();
        for n in old {
            if !self.cancel(n) {
                self.release_ahead(n);
            }
        }
        self.policies.eviction.end_step();
    }

    fn check_capacity(&self, n: u32) -> Result<(), TierError> {
        let needed = self.held + self.any_waits + 1;
        if needed > self.slots {
            return Err(TierError::TooFewSlots {
                chunk: self.shape.ids[n as usize],
                slots: self.slots,
                needed,
                slot_bytes: self.shape.slot_bytes,
            });
        }
        Ok(())
    }

    /// Counts an access by one who did not announce it with `used`.
    fn access(&mut self, n: u32) {
        if !std::mem::take(&mut self.states[n as usize].announced) {
            self.count_access(n);
            self.policies.eviction.used(self.shape.ids[n as usize], 1.0);
            if let Claim::Ahead { .. } = self.states[n as usize].claim {
                self.release_ahead(n);
            }
        }
    }

    fn want(&mut self, n: u32) -> Wanted {
        if let Place::Loading { .. } = self.states[n as usize].place {
            self.hurry(n);
        }
        match &self.states[n as usize].place {
            Place::Resident { .. } => Wanted::Resident,
            Place::Loading { attempt, .. } => Wanted::Pending(attempt.clone()),
            Place::Queued { .. } | Place::Absent => {
                Wanted::Pending(self.enqueue(n, Class::Waited, self.deadline(self.position)))
            }
        }
    }

    /// Somebody wants this very chunk; `end_want` must follow.
    pub fn begin_want(&mut self, n: u32) -> Result<Wanted, TierError> {
        if !self.states[n as usize].is_held() {
            self.check_capacity(n)?;
            self.held += 1;
        }
        self.access(n);
        self.states[n as usize].waiters += 1;
        Ok(self.want(n))
    }

    /// The chunk is there, or the one who wanted it gives up.
    pub fn end_want(&mut self, n: u32) {
        self.states[n as usize].waiters -= 1;
        if !self.states[n as usize].is_held() {
            self.held -= 1;
        }
        self.unwait(n);
    }

    /// A job that nobody waits for any more must not stand before those that somebody waits for.
    fn unwait(&mut self, n: u32) {
        let state = &self.states[n as usize];
        if state.waiters + state.any_waiters == 0
            && let Place::Queued { key, attempt } = &state.place
            && key.class == Class::Waited
        {
            let (key, attempt) = (*key, attempt.clone());
            self.queue.remove(&key);
            let key = QueueKey { class: Class::Demanded, ..key };
            self.queue.insert(key, n);
            self.states[n as usize].place = Place::Queued { key, attempt };
        }
    }

    /// Somebody wants any of these; `end_want_any` must follow.
    pub fn begin_want_any(&mut self, numbers: &[u32]) -> Result<Vec<Wanted>, TierError> {
        let Some(&first) = numbers.first() else {
            return Err(TierError::Invalid("any chunk of an empty list was asked for".to_owned()));
        };
        let held = numbers.iter().any(|&n| self.states[n as usize].is_held());
        if !held {
            self.check_capacity(first)?;
        }
        self.any_waits += 1;
        Ok(numbers
            .iter()
            .map(|&n| {
                self.states[n as usize].any_waiters += 1;
                self.want(n)
            })
            .collect())
    }

    pub fn end_want_any(&mut self, numbers: &[u32]) {
        self.any_waits -= 1;
        for &n in numbers {
            self.states[n as usize].any_waiters -= 1;
            self.unwait(n);
        }
    }

    /// Counts the access of the one that was taken of several.
    pub fn access_taken(&mut self, n: u32) {
        self.access(n);
    }

    /// Holds a resident chunk in its slot.
    pub fn pin(&mut self, n: u32) -> Option<u32> {
        let slot = self.slot_of(n)?;
        if !self.states[n as usize].is_held() {
            self.held += 1;
        }
        self.states[n as usize].pins += 1;
        Some(slot)
    }

    pub fn unpin(&mut self, n: u32) {
        self.states[n as usize].pins -= 1;
        if !self.states[n as usize].is_held() {
            self.held -= 1;
        }
    }

    /// A chunk may be taken at once without exceeding the slots.
    pub fn may_pin(&self, n: u32) -> Result<(), TierError> {
        if self.states[n as usize].is_held() { Ok(()) } else { self.check_capacity(n) }
    }

    fn slot_for(&mut self, n: u32, class: Class) -> Option<u32> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        let incoming = self.shape.ids[n as usize];
        let strengths: &[u8] = match class {
            Class::Ahead => &[0],
            Class::Demanded => &[0, 1],
            Class::Waited => &[0, 1, 2, 3],
        };
        for &strength in strengths {
            let (states, ids) = (&self.states, &self.shape.ids);
            let evictable = |chunk: ChunkId| {
                let Ok(m) = ids.binary_search(&chunk) else { return false };
                let state = &states[m];
                let resident = matches!(state.place, Place::Resident { .. });
                let needed = match state.claim {
                    Claim::None => 0,
                    Claim::Ahead { .. } => 1,
                    // Those that were acquired and let go may leave before those that are still to be acquired.
                    Claim::Chosen => 2 + u8::from(state.announced),
                };
                resident && !state.is_held() && state.any_waiters == 0 && needed <= strength
            };
            let Some(victim) = self.policies.eviction.victim(incoming, &evictable) else { continue };
            if evictable(victim)
                && let Ok(m) = self.number(victim)
                && let Some(slot) = self.slot_of(m)
            {
                self.states[m as usize].place = Place::Absent;
                if std::mem::take(&mut self.states[m as usize].unproven) {
                    self.stats.prefetches_wasted += 1;
                }
                self.release_ahead(m);
                self.policies.eviction.removed(victim);
                self.stats.evictions += 1;
                return Some(slot);
            }
        }
        None
    }

    /// Gives the first job of the queue a slot and takes its first piece; the others follow.
    fn start_first(&mut self, now: f64) -> Option<Job> {
        let (&key, &n) = self.queue.first_key_value()?;
        let slot = self.slot_for(n, key.class)?;
        self.queue.remove(&key);
        let ahead = key.class == Class::Ahead;
        let state = &mut self.states[n as usize];
        let Place::Queued { attempt, .. } = &state.place else { return None };
        let pieces_left = self.shape.pieces[n as usize].max(1);
        let attempt = attempt.clone();
        state.place = Place::Loading { slot, pieces_left, error: None, ahead, attempt };
        state.unproven = ahead;
        self.policies.eviction.inserted(self.shape.ids[n as usize], ahead);
        let job = Job { chunk: n, piece: 0, slot, ahead, started: now, stall_before: 0.0 };
        self.pieces.extend((1..pieces_left).map(|piece| Job { piece, ..job }));
        Some(job)
    }

    /// The next piece to read, if there is one and a slot for it. What is demanded goes first, and only a few reads
    /// ahead are under way at once: a read that has begun cannot be overtaken.
    pub fn next_job(&mut self, now: f64) -> Option<Job> {
        let head_is_ahead = self.queue.first_key_value().map(|(key, _)| key.class == Class::Ahead);
        let mut job = match self.pieces.iter().position(|job| !job.ahead) {
            Some(i) => self.pieces.remove(i),
            None if head_is_ahead == Some(false) => self.start_first(now),
            None => None,
        };
        if job.is_none() && self.ahead_reads < self.ahead_reads_max {
            job = self.pieces.pop_front();
            if job.is_none() && head_is_ahead == Some(true) {
                job = self.start_first(now);
            }
        }
        let job = Job { started: now, stall_before: self.stall.at(now), ..job? };
        self.reading.enter(now);
        if job.ahead {
            self.ahead_reads += 1;
        } else {
            self.demand_reading.enter(now);
        }
        Some(job)
    }

    /// Pieces of a chunk that was read ahead are demanded from now on.
    fn hurry(&mut self, n: u32) {
        self.pieces.iter_mut().filter(|job| job.chunk == n).for_each(|job| job.ahead = false);
    }

    /// Something waits to be read, though perhaps without a slot.
    pub fn has_work(&self) -> bool {
        !self.pieces.is_empty() || !self.queue.is_empty()
    }

    /// A piece has been read, or could not be.
    pub fn finish(&mut self, job: &Job, result: Result<(), TierError>, now: f64) {
        self.reading.leave(now);
        if job.ahead {
            self.ahead_reads -= 1;
        } else {
            self.demand_reading.leave(now);
        }
        let n = job.chunk as usize;
        let bytes = self.shape.payload[n] / u64::from(self.shape.pieces[n].max(1));
        let took = now - job.started;
        if took > 0.0 && result.is_ok() {
            let share = ((self.stall.at(now) - job.stall_before) / took).clamp(0.0, 1.0);
            self.stats.stalled_bytes += Bytes((bytes as f64 * share) as u64);
            let known = (self.read_seconds > 0.0).then_some(self.read_seconds);
            self.read_seconds = mean(known, took * f64::from(self.shape.pieces[n].max(1)));
        }
        let Place::Loading { slot, pieces_left, error, ahead, attempt } = &mut self.states[n].place else {
            return;
        };
        if let Err(e) = result {
            error.get_or_insert(e);
        }
        *pieces_left -= 1;
        if *pieces_left > 0 {
            return;
        }
        let (slot, ahead, attempt, error) = (*slot, *ahead, attempt.clone(), error.take());
        match error {
            None => {
                self.states[n].place = Place::Resident { slot };
                let bytes = Bytes(self.shape.payload[n]);
                if ahead {
                    self.stats.prefetch_bytes += bytes;
                } else {
                    self.stats.demand_bytes += bytes;
                }
            }
            Some(error) => {
                self.stats.read_errors += 1;
                self.states[n].place = Place::Absent;
                if std::mem::take(&mut self.states[n].unproven) {
                    self.stats.prefetches_wasted += 1;
                }
                self.release_ahead(job.chunk);
                self.free.push(slot);
                self.policies.eviction.removed(self.shape.ids[n]);
                // Nobody else sets it: the attempt ends here.
                let _ = attempt.failure.set(error);
            }
        }
    }

    /// Somebody begins to wait.
    pub fn begin_stall(&mut self, now: f64) {
        self.stall.enter(now);
    }

    pub fn end_stall(&mut self, now: f64) {
        self.stall.leave(now);
    }

    pub fn stall_seconds(&self, now: f64) -> f64 {
        self.stall.at(now)
    }

    pub fn stats(&self, now: f64) -> StoreStats {
        StoreStats {
            stall: Seconds(self.stall.at(now)),
            reading: Seconds(self.reading.at(now)),
            ..self.stats
        }
    }

    pub fn residency(&self) -> impl Iterator<Item = ChunkResidency> + '_ {
        self.shape.ids.iter().zip(&self.states).map(|(&chunk, state)| {
            let residency = match state.place {
                Place::Absent => Residency::Absent,
                Place::Queued { .. } => Residency::Queued,
                Place::Loading { .. } => Residency::Loading,
                Place::Resident { .. } if state.pins > 0 => Residency::Pinned,
                Place::Resident { .. } => Residency::Resident,
            };
            ChunkResidency { chunk, residency }
        })
    }
}

fn mean(known: Option<f64>, value: f64) -> f64 {
    known.map_or(value, |known| known + RECENT * (value - known))
}
