//! Chunks in a region of the arena, read by threads of their own.
//!
//! Reading is done by a few threads with `pread` past the page cache ([`DirectFile`](crate::DirectFile)). io_uring was
//! measured beside them, random reads of 64 KiB to 8 MiB with 1 to 16 of them under way on a virtual NVMe disk: the rates
//! differed by less than they varied from one run to the next, both reach the disk's own rate from two to four reads on,
//! and the threads take a tenth of a core. A chunk is large and a turn needs a handful, so there is nothing to save.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use lightering_units::Bytes;

use crate::cache::{Attempt, ChunkCache, Job, Shape, Wanted};
use crate::policy::{
    AdmissionPolicy, Always, EvictionPolicy, GroupLru, NoPrediction, PolicySet, Position, Prediction,
    Predictor, Use,
};
use crate::slots::{SlotPool, SlotRead};
use crate::trace::TraceWriter;
use crate::{
    ARENA_ALIGNMENT, Arena, ChunkCatalog, ChunkId, ChunkResidency, StoreStats, TierError, TraceHeader,
};

/// Most threads that read for one store.
pub const IO_THREADS_MAX: usize = 64;

/// Stack of a reading thread: a few calls deep, and three pages for what does not fill one.
const IO_STACK_BYTES: usize = 256 << 10;

/// How pressing a request is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Urgency {
    /// The chunk will be acquired soon.
    Demand,
    /// The chunk may be needed at a coming position; it is read when nothing is demanded, the nearest position first.
    Prefetch {
        /// How probable, between 0 and 1.
        score: f32,
        /// When.
        at: Position,
    },
}

/// How a store works.
pub struct StoreOptions {
    /// Reads under way at the same time, 1 to [`IO_THREADS_MAX`].
    pub io_threads: usize,
    /// Of these, reads ahead: those that have begun delay what is demanded next. At least 1.
    pub prefetch_reads: usize,
    /// Who leaves; equal shares for all groups by recency when absent.
    pub eviction: Option<Box<dyn EvictionPolicy>>,
    /// What is predicted.
    pub predictor: Box<dyn Predictor>,
    /// Which predictions are read ahead.
    pub admission: Box<dyn AdmissionPolicy>,
    /// For how many coming groups predictions are made.
    pub lookahead: usize,
    /// Where the chunk trace goes, and the most bytes it may take; see [`ChunkTrace`](crate::ChunkTrace).
    pub trace: Option<(Box<dyn std::io::Write + Send>, Bytes)>,
}

impl From<PolicySet> for StoreOptions {
    fn from(policies: PolicySet) -> StoreOptions {
        StoreOptions {
            eviction: Some(policies.eviction),
            predictor: policies.predictor,
            admission: policies.admission,
            lookahead: policies.lookahead,
            ..StoreOptions::default()
        }
    }
}

impl Default for StoreOptions {
    fn default() -> Self {
        StoreOptions {
            io_threads: 4,
            prefetch_reads: 2,
            eviction: None,
            predictor: Box::new(NoPrediction),
            admission: Box::new(Always),
            lookahead: 1,
            trace: None,
        }
    }
}

struct Guarded {
    cache: ChunkCache,
    recorder: Option<Recorder>,
    stopping: bool,
}

/// Writes the trace; a turn is written when the next one begins, because only then it is known how long it took.
struct Recorder {
    writer: TraceWriter<Box<dyn std::io::Write + Send>>,
    turn: Option<(u32, Vec<Use>)>,
    began: f64,
    stall_before: f64,
    failure: Option<TierError>,
}

impl Recorder {
    fn note(&mut self, result: Result<(), TierError>) {
        if let Err(error) = result {
            self.failure.get_or_insert(error);
        }
    }

    fn end_turn(&mut self, now: f64, stall: f64) {
        if let Some((group, uses)) = self.turn.take() {
            let computing = (now - self.began) - (stall - self.stall_before);
            let result = self.writer.turn(group, &uses, lightering_units::Seconds(computing.max(0.0)));
            self.note(result);
        }
        (self.began, self.stall_before) = (now, stall);
    }

    fn end_step(&mut self, now: f64, stall: f64) {
        self.end_turn(now, stall);
        let result = self.writer.end_step();
        self.note(result);
    }
}

struct Inner {
    catalog: Arc<ChunkCatalog>,
    pool: Arc<SlotPool>,
    guarded: Mutex<Guarded>,
    /// There may be something to read.
    work: Condvar,
    /// Something was read.
    done: Condvar,
    started: Instant,
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Guarded> {
        self.guarded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Wakes one reading thread if there is work; it wakes the next one when it has taken its own. Threads that are woken
    /// for nothing would cost more than the chunks that are resident.
    fn signal_work(&self, guarded: &Guarded) {
        if guarded.cache.has_work() {
            self.work.notify_one();
        }
    }

    fn wait<'a>(&self, signal: &Condvar, guarded: MutexGuard<'a, Guarded>) -> MutexGuard<'a, Guarded> {
        signal.wait(guarded).unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, job: &Job) -> Result<(), TierError> {
        let part = self.catalog.part_of(job.chunk, job.piece);
        let mut target = self.pool.write(job.slot as usize, part)?;
        self.catalog.read_piece(job.chunk, job.piece, target.bytes())
    }

    fn read_until_stopped(&self) {
        let mut guarded = self.lock();
        loop {
            if guarded.stopping {
                return;
            }
            let Some(job) = guarded.cache.next_job(self.now()) else {
                guarded = self.wait(&self.work, guarded);
                continue;
            };
            self.signal_work(&guarded);
            drop(guarded);
            // A panic must reach those who wait for this chunk, or they would wait for ever.
            let result = catch_unwind(AssertUnwindSafe(|| self.read(&job))).unwrap_or_else(|_| {
                Err(TierError::Internal(format!("reading a piece of chunk {} panicked", job.chunk)))
            });
            guarded = self.lock();
            guarded.cache.finish(&job, result, self.now());
            self.done.notify_all();
        }
    }
}

/// Chunks of which some are in memory, in slots of one size in a region of an [`Arena`]; the others are read when
/// they are asked for. The store allocates nothing that grows with the chunks' bytes.
///
/// ```
/// use std::sync::Arc;
/// use lightering_tier::policy::Use;
/// use lightering_tier::*;
/// use lightering_units::Bytes;
/// // Two layers of four experts, each of 10 bytes, in a store of 80.
/// let file: Arc<dyn ByteSource> = Arc::new((0..80u8).collect::<Vec<u8>>());
/// let chunks = (0..8u64).map(|i| {
///     let extent = Extent { source: 0, offset: i * 10, size: Bytes(10) };
///     (ChunkId::new((i / 4) as u32, (i % 4) as u32), vec![extent])
/// });
/// let catalog = Arc::new(ChunkCatalog::new(vec![file], chunks)?);
/// // The planner gives room for three.
/// let room = catalog.region_bytes(3);
/// let arena = Arc::new(Arena::new(room).unwrap());
/// let store = ChunkStore::new(catalog, &arena, 0..room.to_usize(), StoreOptions::default())?;
/// // The router of layer 1 chose experts 2 and 0; compute on whichever is there first.
/// store.used(1, &[Use { index: 2, score: 0.7 }, Use { index: 0, score: 0.3 }])?;
/// let mut waiting = vec![ChunkId::new(1, 2), ChunkId::new(1, 0)];
/// while !waiting.is_empty() {
///     let (position, expert) = store.acquire_any(&waiting)?;
///     assert_eq!(expert.extent(0)[0], 40 + 10 * waiting[position].index as u8);
///     waiting.swap_remove(position);
/// }
/// store.end_step();
/// assert_eq!(store.stats().misses, 2);
/// # Ok::<(), TierError>(())
/// ```
pub struct ChunkStore {
    inner: Arc<Inner>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for ChunkStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkStore")
            .field("catalog", &self.inner.catalog)
            .field("slots", &self.inner.pool.count())
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl ChunkStore {
    /// Takes `region` of the arena for as many slots as fit and starts the reading threads.
    ///
    /// # Errors
    /// `Invalid` when the region does not begin at a page or has not room for one slot, `Io` when threads cannot be
    /// started, `Internal` when somebody holds a part of the region.
    pub fn new(
        catalog: Arc<ChunkCatalog>,
        arena: &Arc<Arena>,
        region: Range<usize>,
        options: StoreOptions,
    ) -> Result<ChunkStore, TierError> {
        if !region.start.is_multiple_of(ARENA_ALIGNMENT) {
            return Err(TierError::Invalid(format!(
                "the region for chunks begins at {}; expected a multiple of {ARENA_ALIGNMENT}",
                region.start
            )));
        }
        let slot_bytes = catalog.slot_bytes();
        let slots = region.len() / slot_bytes.to_usize();
        if slots == 0 || !(1..=IO_THREADS_MAX).contains(&options.io_threads) {
            return Err(TierError::Invalid(format!(
                "a region of {} for slots of {slot_bytes}, read by {} threads; expected room for at least one slot, \
                 and 1 to {IO_THREADS_MAX} threads",
                Bytes(region.len() as u64),
                options.io_threads
            )));
        }
        let lease = arena.lease(region).map_err(|e| TierError::Internal(e.to_string()))?;
        let shape = Shape::of(&catalog);
        let eviction = options.eviction.unwrap_or_else(|| Box::new(GroupLru::new(&shape.groups(), slots)));
        let recorder = match options.trace {
            None => None,
            Some((out, limit)) => {
                let header = TraceHeader {
                    groups: shape.group_sizes(),
                    chunk_bytes: Bytes(shape.payload.iter().copied().max().unwrap_or(0)),
                    slots: slots as u64,
                };
                let writer = TraceWriter::new(out, &header, limit)?;
                Some(Recorder { writer, turn: None, began: 0.0, stall_before: 0.0, failure: None })
            }
        };
        let policies = PolicySet {
            eviction,
            predictor: options.predictor,
            admission: options.admission,
            lookahead: options.lookahead,
        };
        let inner = Arc::new(Inner {
            pool: Arc::new(SlotPool::new(lease, slot_bytes.to_usize())),
            guarded: Mutex::new(Guarded {
                cache: ChunkCache::new(shape, slots, policies, options.prefetch_reads),
                recorder,
                stopping: false,
            }),
            catalog,
            work: Condvar::new(),
            done: Condvar::new(),
            started: Instant::now(),
        });
        let mut store = ChunkStore { inner, threads: Vec::with_capacity(options.io_threads) };
        for i in 0..options.io_threads {
            let inner = store.inner.clone();
            let thread = std::thread::Builder::new()
                .name(format!("lighter-tier-{i}"))
                .stack_size(IO_STACK_BYTES)
                .spawn(move || inner.read_until_stopped())
                .map_err(|e| TierError::Io {
                    what: "starting a thread that reads chunks".to_owned(),
                    error: Arc::new(e),
                })?;
            store.threads.push(thread);
        }
        Ok(store)
    }

    /// What there is to be read.
    pub fn catalog(&self) -> &Arc<ChunkCatalog> {
        &self.inner.catalog
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.inner.pool.count()
    }

    /// Where the run is: steps ended so far, and the group whose choice was told last.
    pub fn position(&self) -> Position {
        self.inner.lock().cache.position()
    }

    /// Starts reading a chunk that is absent, or makes a waiting read more urgent. A prefetch is subject to admission.
    ///
    /// # Errors
    /// `UnknownChunk`.
    pub fn request(&self, chunk: ChunkId, urgency: Urgency) -> Result<(), TierError> {
        let mut guarded = self.inner.lock();
        let n = guarded.cache.number(chunk)?;
        let new = match urgency {
            Urgency::Demand => guarded.cache.demand(n),
            Urgency::Prefetch { score, at } => guarded.cache.prefetch(&Prediction { chunk, score, at })?,
        };
        if new {
            self.inner.signal_work(&guarded);
        }
        Ok(())
    }

    /// Reads ahead what a predictor outside of the store expects, as far as admission agrees.
    ///
    /// # Errors
    /// `UnknownChunk`; the predictions before it are taken.
    pub fn prefetch(&self, predictions: &[Prediction]) -> Result<(), TierError> {
        let mut guarded = self.inner.lock();
        let result = predictions.iter().try_for_each(|p| guarded.cache.prefetch(p).map(|_| ()));
        self.inner.signal_work(&guarded);
        result
    }

    /// Gives up a prefetch whose read has not begun; true if there was one.
    ///
    /// # Errors
    /// `UnknownChunk`.
    pub fn cancel(&self, chunk: ChunkId) -> Result<bool, TierError> {
        let mut guarded = self.inner.lock();
        let n = guarded.cache.number(chunk)?;
        Ok(guarded.cache.cancel(n))
    }

    /// Tells what the router really chose for a group, the most important first: this is what counts as hit or miss,
    /// what the policies learn from, and it starts reading what is absent. Prefetches for this group that were wrong
    /// are given up.
    ///
    /// # Errors
    /// `UnknownChunk`; nothing has been done then.
    pub fn used(&self, group: u32, uses: &[Use]) -> Result<(), TierError> {
        let mut guarded = self.inner.lock();
        let now = self.inner.now();
        let result = guarded.cache.used(group, uses, now);
        let stall = guarded.cache.stall_seconds(now);
        if let Some(recorder) = &mut guarded.recorder
            && result.is_ok()
        {
            recorder.end_turn(now, stall);
            recorder.turn = Some((group, uses.to_vec()));
        }
        self.inner.signal_work(&guarded);
        result
    }

    /// All groups have been computed once: a token, or a batch, is done.
    pub fn end_step(&self) {
        let mut guarded = self.inner.lock();
        guarded.cache.end_step();
        let now = self.inner.now();
        let stall = guarded.cache.stall_seconds(now);
        if let Some(recorder) = &mut guarded.recorder {
            recorder.end_step(now, stall);
        }
        self.inner.signal_work(&guarded);
    }

    /// Ends the trace, if one is being recorded, and says what went wrong with it: the run itself goes on when a trace
    /// cannot be written.
    ///
    /// # Errors
    /// `Io` when writing failed, `Invalid` when the trace reached its limit; what was written before is good.
    pub fn finish_trace(&self) -> Result<(), TierError> {
        let mut guarded = self.inner.lock();
        let now = self.inner.now();
        let stall = guarded.cache.stall_seconds(now);
        let Some(mut recorder) = guarded.recorder.take() else { return Ok(()) };
        drop(guarded);
        recorder.end_turn(now, stall);
        let flushed = recorder.writer.finish();
        recorder.failure.map_or(flushed, Err)
    }

    fn guard(&self, guarded: MutexGuard<'_, Guarded>, n: u32, slot: u32) -> Result<ChunkGuard, TierError> {
        drop(guarded);
        // The guard exists first, so that it takes the chunk's pin back if the loan is refused.
        let mut guard = ChunkGuard { inner: self.inner.clone(), number: n, loan: None };
        guard.loan = Some(self.inner.pool.read(slot as usize)?);
        Ok(guard)
    }

    /// Holds a chunk in memory, waiting until it is there.
    ///
    /// # Errors
    /// `Read` when the medium failed (the next call tries again), `TooFewSlots` when all slots are held or promised to
    /// others who wait, `UnknownChunk`.
    pub fn acquire(&self, chunk: ChunkId) -> Result<ChunkGuard, TierError> {
        let inner = &*self.inner;
        let mut guarded = inner.lock();
        let n = guarded.cache.number(chunk)?;
        let mut failure = None;
        if let Wanted::Pending(attempt) = guarded.cache.begin_want(n)? {
            inner.signal_work(&guarded);
            guarded.cache.begin_stall(inner.now());
            while guarded.cache.slot_of(n).is_none() {
                failure = attempt.failure().cloned();
                if failure.is_some() {
                    break;
                }
                guarded = inner.wait(&inner.done, guarded);
            }
            guarded.cache.end_stall(inner.now());
        }
        let slot = if failure.is_none() { guarded.cache.pin(n) } else { None };
        guarded.cache.end_want(n);
        // What was promised to this one may serve another job.
        inner.signal_work(&guarded);
        match (slot, failure) {
            (Some(slot), _) => self.guard(guarded, n, slot),
            (None, Some(error)) => Err(error),
            (None, None) => Err(TierError::Internal(format!("{chunk} left while it was waited for"))),
        }
    }

    /// Holds a chunk if it is in memory; `None` if it is not, without asking for it.
    ///
    /// # Errors
    /// `TooFewSlots` when all slots are promised to others who wait, `UnknownChunk`.
    pub fn try_acquire(&self, chunk: ChunkId) -> Result<Option<ChunkGuard>, TierError> {
        let mut guarded = self.inner.lock();
        let n = guarded.cache.number(chunk)?;
        if guarded.cache.slot_of(n).is_none() {
            return Ok(None);
        }
        guarded.cache.may_pin(n)?;
        guarded.cache.access_taken(n);
        match guarded.cache.pin(n) {
            Some(slot) => self.guard(guarded, n, slot).map(Some),
            None => Ok(None),
        }
    }

    /// Holds one of several chunks: the first in the list that is in memory, else the one that arrives first. Returns
    /// its position in the list. All of them are asked for; a chunk that cannot be read is an error only when no other
    /// one is left, and is tried again by the next call.
    ///
    /// # Errors
    /// As for [`ChunkStore::acquire`]; `Invalid` for an empty list.
    pub fn acquire_any(&self, chunks: &[ChunkId]) -> Result<(usize, ChunkGuard), TierError> {
        let inner = &*self.inner;
        let mut guarded = inner.lock();
        let numbers =
            chunks.iter().map(|&c| guarded.cache.number(c)).collect::<Result<Vec<u32>, TierError>>()?;
        let wanted = guarded.cache.begin_want_any(&numbers)?;
        let resident = |cache: &ChunkCache| numbers.iter().position(|&n| cache.slot_of(n).is_some());
        let mut found = resident(&guarded.cache);
        inner.signal_work(&guarded);
        let mut failure = None;
        if found.is_none() {
            guarded.cache.begin_stall(inner.now());
            loop {
                found = resident(&guarded.cache);
                let failures = || {
                    wanted.iter().filter_map(|w| match w {
                        Wanted::Pending(attempt) => Attempt::failure(attempt),
                        Wanted::Resident => None,
                    })
                };
                if found.is_none() && failures().count() == wanted.len() {
                    failure = failures().next().cloned();
                }
                if found.is_some() || failure.is_some() {
                    break;
                }
                guarded = inner.wait(&inner.done, guarded);
            }
            guarded.cache.end_stall(inner.now());
        }
        guarded.cache.end_want_any(&numbers);
        // What was promised to this one may serve another job.
        inner.signal_work(&guarded);
        match (found, failure) {
            (Some(position), _) => {
                let n = numbers[position];
                guarded.cache.access_taken(n);
                let slot = guarded.cache.pin(n).ok_or_else(|| {
                    TierError::Internal(format!("{} left while it was waited for", chunks[position]))
                })?;
                Ok((position, self.guard(guarded, n, slot)?))
            }
            (None, Some(error)) => Err(error),
            (None, None) => Err(TierError::Internal("the wait for chunks ended without one".to_owned())),
        }
    }

    /// True if the chunk is in memory now.
    pub fn is_resident(&self, chunk: ChunkId) -> bool {
        let guarded = self.inner.lock();
        guarded.cache.number(chunk).is_ok_and(|n| guarded.cache.slot_of(n).is_some())
    }

    /// What has been done so far.
    pub fn stats(&self) -> StoreStats {
        self.inner.lock().cache.stats(self.inner.now())
    }

    /// Where every chunk is, in the order of the catalog.
    pub fn residency(&self) -> Vec<ChunkResidency> {
        self.inner.lock().cache.residency().collect()
    }
}

impl Drop for ChunkStore {
    /// Stops the reading threads after the reads that are under way. Guards stay good.
    fn drop(&mut self) {
        self.inner.lock().stopping = true;
        self.inner.work.notify_all();
        for thread in self.threads.drain(..) {
            // A panic while reading has been told to those who waited.
            let _ = thread.join();
        }
        // Who wants to know what became of the trace asks before.
        let _ = self.finish_trace();
    }
}

/// A chunk that stays in memory until this drops.
pub struct ChunkGuard {
    inner: Arc<Inner>,
    number: u32,
    loan: Option<SlotRead>,
}

impl std::fmt::Debug for ChunkGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkGuard").field("number", &self.number).finish_non_exhaustive()
    }
}

impl ChunkGuard {
    /// The bytes of an extent, which begin at a multiple of [`EXTENT_ALIGNMENT`](crate::EXTENT_ALIGNMENT) bytes; empty
    /// when the chunk has no such extent.
    pub fn extent(&self, index: usize) -> &[u8] {
        let landing = self.inner.catalog.landings(self.number).get(index);
        let bytes = self.loan.as_ref().map(SlotRead::bytes).unwrap_or_default();
        landing.map_or(&[][..], |l| &bytes[l.start as usize..l.start as usize + l.size as usize])
    }

    /// Number of extents.
    pub fn extents(&self) -> usize {
        self.inner.catalog.landings(self.number).len()
    }
}

impl Drop for ChunkGuard {
    fn drop(&mut self) {
        // The loan ends before the slot may be filled again.
        self.loan = None;
        let mut guarded = self.inner.lock();
        guarded.cache.unpin(self.number);
        self.inner.signal_work(&guarded);
    }
}
