//! Memory that is asked for before it is allocated.
//!
//! An arena asks once and keeps its reservation; a streaming window grows and shrinks; a reader that holds a file for
//! a moment drops its reservation with the buffer. All three see the same limit, and whoever is refused learns who
//! holds the rest.

use crate::MeterError;
use lightering_units::{Bytes, Seconds};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

/// Most events that a pool's log keeps; later ones are counted but not kept.
pub const LOG_EVENTS_MAX: usize = 65_536;

/// Largest holders that a refusal names.
const HOLDERS_NAMED: usize = 5;

/// A live reservation: who holds how much.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Holder {
    /// The name given to [`MemoryPool::reserve`].
    pub name: String,
    /// Bytes held now.
    pub size: Bytes,
}

/// One change of a pool, in the order in which it happened.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PoolEvent {
    /// Time since the log was switched on.
    pub at: Seconds,
    /// Name of the reservation.
    pub name: String,
    /// Its size before.
    pub before: Bytes,
    /// Its size after.
    pub after: Bytes,
    /// What the whole pool held after the change.
    pub used: Bytes,
    /// True when the pool refused the change (`after` is then what was asked for).
    pub refused: bool,
}

#[derive(Debug, Default)]
struct State {
    used: u64,
    peak: u64,
    holders: Vec<Option<(Arc<str>, u64)>>,
    free_slots: Vec<usize>,
    log: Option<Log>,
}

#[derive(Debug)]
struct Log {
    start: Instant,
    events: Vec<PoolEvent>,
    dropped: u64,
}

#[derive(Debug)]
struct Shared {
    limit: Option<u64>,
    state: Mutex<State>,
}

/// A counted memory budget, shared by clones and safe to use from any thread.
#[derive(Clone, Debug)]
pub struct MemoryPool(Arc<Shared>);

impl MemoryPool {
    /// A pool that counts but never refuses.
    pub fn unbounded() -> MemoryPool {
        Self::new(None)
    }

    /// A pool whose reservations never sum to more than `limit`.
    pub fn with_limit(limit: Bytes) -> MemoryPool {
        Self::new(Some(limit))
    }

    /// A pool with a limit, or without one when `limit` is `None`.
    pub fn new(limit: Option<Bytes>) -> MemoryPool {
        MemoryPool(Arc::new(Shared { limit: limit.map(|b| b.0), state: Mutex::new(State::default()) }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every critical section below leaves the counts consistent at each step, so a panic elsewhere in a thread
        // that held the lock does not invalidate them.
        self.0.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Reserves `size` bytes under `name`.
    ///
    /// # Errors
    /// [`MeterError::Budget`] when fewer than `size` bytes are free; nothing is then reserved.
    pub fn reserve(&self, name: impl Into<Arc<str>>, size: Bytes) -> Result<Reservation, MeterError> {
        let name = name.into();
        let mut state = self.state();
        state.change(self.0.limit, &name, 0, size.0)?;
        let slot = match state.free_slots.pop() {
            Some(slot) => slot,
            None => {
                state.holders.push(None);
                state.holders.len() - 1
            }
        };
        state.holders[slot] = Some((name.clone(), size.0));
        Ok(Reservation { pool: self.clone(), name, slot, size: size.0 })
    }

    /// The limit, or `None` for an unbounded pool.
    pub fn limit(&self) -> Option<Bytes> {
        self.0.limit.map(Bytes)
    }

    /// Bytes reserved now.
    pub fn used(&self) -> Bytes {
        Bytes(self.state().used)
    }

    /// The most that was ever reserved at one time (since [`reset_peak`](Self::reset_peak)).
    pub fn peak(&self) -> Bytes {
        Bytes(self.state().peak)
    }

    /// Bytes that may still be reserved; `None` for an unbounded pool.
    pub fn available(&self) -> Option<Bytes> {
        self.0.limit.map(|limit| Bytes(limit - self.state().used))
    }

    /// Starts a new peak at what is reserved now.
    pub fn reset_peak(&self) {
        let mut state = self.state();
        state.peak = state.used;
    }

    /// The live reservations, largest first; ties by name.
    pub fn holders(&self) -> Vec<Holder> {
        self.state().largest(usize::MAX)
    }

    /// Starts to record every change (at most [`LOG_EVENTS_MAX`]); a log that was already there is thrown away.
    pub fn start_log(&self) {
        self.state().log = Some(Log { start: Instant::now(), events: Vec::new(), dropped: 0 });
    }

    /// Takes the recorded changes and stops recording; also says how many did not fit.
    pub fn take_log(&self) -> (Vec<PoolEvent>, u64) {
        self.state().log.take().map_or((Vec::new(), 0), |log| (log.events, log.dropped))
    }
}

impl State {
    /// Moves one reservation from `before` to `after` bytes, or refuses and changes nothing.
    fn change(&mut self, limit: Option<u64>, name: &str, before: u64, after: u64) -> Result<(), MeterError> {
        let others = self.used - before;
        let next = others.checked_add(after);
        let fits = next.is_some_and(|next| limit.is_none_or(|limit| next <= limit));
        if fits {
            self.used = others + after;
            self.peak = self.peak.max(self.used);
        }
        let used = self.used;
        if let Some(log) = &mut self.log {
            if log.events.len() < LOG_EVENTS_MAX {
                log.events.push(PoolEvent {
                    at: Seconds(log.start.elapsed().as_secs_f64()),
                    name: name.to_owned(),
                    before: Bytes(before),
                    after: Bytes(after),
                    used: Bytes(used),
                    refused: !fits,
                });
            } else {
                log.dropped += 1;
            }
        }
        if fits {
            return Ok(());
        }
        let limit = limit.unwrap_or(u64::MAX);
        Err(MeterError::Budget {
            name: name.to_owned(),
            asked: Bytes(after - before),
            available: Bytes(limit - used),
            limit: Bytes(limit),
            largest: self.largest(HOLDERS_NAMED),
        })
    }

    fn largest(&self, count: usize) -> Vec<Holder> {
        let mut all: Vec<Holder> = self
            .holders
            .iter()
            .flatten()
            .map(|(name, size)| Holder { name: name.to_string(), size: Bytes(*size) })
            .collect();
        all.sort_by(|a, b| b.size.cmp(&a.size).then_with(|| a.name.cmp(&b.name)));
        all.truncate(count);
        all
    }
}

/// A named share of a [`MemoryPool`]; given back on drop.
#[derive(Debug)]
pub struct Reservation {
    pool: MemoryPool,
    name: Arc<str>,
    slot: usize,
    size: u64,
}

impl Reservation {
    /// The name given to [`MemoryPool::reserve`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes held.
    pub fn size(&self) -> Bytes {
        Bytes(self.size)
    }

    /// The pool that this is a share of.
    pub fn pool(&self) -> &MemoryPool {
        &self.pool
    }

    /// Changes the size, up or down.
    ///
    /// # Errors
    /// [`MeterError::Budget`] when growing past the limit; the reservation then keeps its size.
    pub fn resize(&mut self, size: Bytes) -> Result<(), MeterError> {
        let mut state = self.pool.state();
        state.change(self.pool.0.limit, &self.name, self.size, size.0)?;
        state.holders[self.slot] = Some((self.name.clone(), size.0));
        drop(state);
        self.size = size.0;
        Ok(())
    }

    /// Asks for `more` bytes on top of what is held.
    ///
    /// # Errors
    /// [`MeterError::Budget`] when they are not free; the reservation then keeps its size.
    pub fn grow(&mut self, more: Bytes) -> Result<(), MeterError> {
        self.resize(Bytes(self.size.saturating_add(more.0)))
    }

    /// Gives `less` bytes back, at most all of them.
    pub fn shrink(&mut self, less: Bytes) {
        let size = Bytes(self.size.saturating_sub(less.0));
        self.resize(size).expect("a smaller reservation always fits");
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.pool.state();
        state
            .change(self.pool.0.limit, &self.name, self.size, 0)
            .expect("giving a reservation back always fits");
        state.holders[self.slot] = None;
        state.free_slots.push(self.slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refusal_names_the_largest_holders() {
        let pool = MemoryPool::with_limit(Bytes(100));
        let _small = pool.reserve("small", Bytes(10)).unwrap();
        let _large = pool.reserve("large", Bytes(70)).unwrap();
        match pool.reserve("late", Bytes(21)).unwrap_err() {
            MeterError::Budget { name, asked, available, limit, largest } => {
                assert_eq!(
                    (name.as_str(), asked, available, limit),
                    ("late", Bytes(21), Bytes(20), Bytes(100))
                );
                assert_eq!(largest[0], Holder { name: "large".into(), size: Bytes(70) });
                assert_eq!(largest[1], Holder { name: "small".into(), size: Bytes(10) });
            }
            other => panic!("wrong kind: {other}"),
        }
        assert_eq!(pool.used(), Bytes(80), "a refusal reserves nothing");
        assert!(pool.reserve("late", Bytes(20)).is_ok(), "the limit itself may be reached");
    }

    #[test]
    fn absurd_sizes_are_refused_even_without_a_limit() {
        let pool = MemoryPool::unbounded();
        let _some = pool.reserve("some", Bytes(10)).unwrap();
        assert!(pool.reserve("absurd", Bytes(u64::MAX)).is_err());
        assert_eq!(pool.available(), None);
    }

    #[test]
    fn resize_keeps_its_size_when_refused() {
        let pool = MemoryPool::with_limit(Bytes(100));
        let mut window = pool.reserve("window", Bytes(60)).unwrap();
        assert!(window.grow(Bytes(41)).is_err());
        assert_eq!((window.size(), pool.used()), (Bytes(60), Bytes(60)));
        window.shrink(Bytes(50));
        assert_eq!((pool.used(), pool.peak()), (Bytes(10), Bytes(60)));
        pool.reset_peak();
        assert_eq!(pool.peak(), Bytes(10));
    }

    #[test]
    fn log_records_changes_and_refusals() {
        let pool = MemoryPool::with_limit(Bytes(8));
        pool.start_log();
        drop(pool.reserve("a", Bytes(8)).unwrap());
        let _ = pool.reserve("b", Bytes(9));
        let (events, dropped) = pool.take_log();
        let seen: Vec<_> = events.iter().map(|e| (e.name.as_str(), e.after.0, e.used.0, e.refused)).collect();
        assert_eq!(seen, [("a", 8, 8, false), ("a", 0, 0, false), ("b", 9, 0, true)]);
        assert_eq!(dropped, 0);
        assert!(pool.take_log().0.is_empty());
    }

    #[test]
    fn threads_never_exceed_the_limit() {
        let pool = MemoryPool::with_limit(Bytes(1000));
        std::thread::scope(|scope| {
            for t in 0..8u64 {
                let pool = &pool;
                scope.spawn(move || {
                    for i in 0..500u64 {
                        if let Ok(r) = pool.reserve(format!("t{t}"), Bytes(100 + (i * 37 + t) % 300)) {
                            assert!(pool.used() <= Bytes(1000));
                            drop(r);
                        }
                    }
                });
            }
        });
        assert_eq!(pool.used(), Bytes::ZERO);
        assert!(pool.peak() <= Bytes(1000));
        assert!(pool.holders().is_empty());
    }

    proptest! {
        /// The pool against the obvious model: a list of sizes.
        #[test]
        fn agrees_with_a_list_of_sizes(ops in proptest::collection::vec((0u8..3, 0usize..8, 0u64..600), 0..200)) {
            let pool = MemoryPool::with_limit(Bytes(1000));
            let mut live: Vec<Reservation> = Vec::new();
            let (mut sizes, mut peak) = (Vec::<u64>::new(), 0u64);
            for (op, index, size) in ops {
                let total: u64 = sizes.iter().sum();
                match op {
                    0 => {
                        let got = pool.reserve("x", Bytes(size));
                        prop_assert_eq!(got.is_ok(), total + size <= 1000);
                        if let Ok(r) = got { live.push(r); sizes.push(size); }
                    }
                    1 if !live.is_empty() => {
                        let i = index % live.len();
                        drop(live.swap_remove(i));
                        sizes.swap_remove(i);
                    }
                    2 if !live.is_empty() => {
                        let i = index % live.len();
                        let fits = total - sizes[i] + size <= 1000;
                        prop_assert_eq!(live[i].resize(Bytes(size)).is_ok(), fits);
                        if fits { sizes[i] = size; }
                    }
                    _ => {}
                }
                let total: u64 = sizes.iter().sum();
                peak = peak.max(total);
                prop_assert_eq!(pool.used(), Bytes(total));
                prop_assert_eq!(pool.peak(), Bytes(peak));
                let mut held: Vec<u64> = pool.holders().iter().map(|h| h.size.0).collect();
                let mut expected = sizes.clone();
                held.sort_unstable();
                expected.sort_unstable();
                prop_assert_eq!(held, expected);
            }
        }
    }
}
