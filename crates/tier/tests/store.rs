//! The chunk store keeps its promises: right bytes under any interleaving, no more than its slots, errors for those
//! whom they concern, no deadlock.

use std::collections::HashSet;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use lightering_tier::policy::{ADMISSIONS, EVICTIONS, PREDICTORS, PolicyContext, PolicySet, Position, Use};
use lightering_tier::*;
use lightering_units::Bytes;
use proptest::prelude::*;

fn byte_at(offset: u64) -> u8 {
    (offset.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8
}

/// A store of bytes that a test can hold up and make fail.
#[derive(Default)]
struct Medium {
    size: u64,
    failing: Mutex<HashSet<u64>>,
    /// Reads of these offsets wait.
    held: Mutex<HashSet<u64>>,
    released: Condvar,
    panicking: Mutex<HashSet<u64>>,
    reads: AtomicU64,
}

impl Medium {
    fn of(size: u64) -> Arc<Medium> {
        Arc::new(Medium { size, ..Medium::default() })
    }

    fn release(&self) {
        self.held.lock().unwrap().clear();
        self.released.notify_all();
    }
}

impl ByteSource for Medium {
    fn len_bytes(&self) -> Bytes {
        Bytes(self.size)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let mut held = self.held.lock().unwrap();
        while held.contains(&offset) {
            held = self.released.wait(held).unwrap();
        }
        drop(held);
        if self.panicking.lock().unwrap().contains(&offset) {
            panic!("the medium is on fire");
        }
        if self.failing.lock().unwrap().contains(&offset) {
            return Err(io::Error::other("bad sector"));
        }
        for (i, b) in buffer.iter_mut().enumerate() {
            *b = byte_at(offset + i as u64);
        }
        Ok(())
    }

    fn name(&self) -> String {
        "medium.bin".to_owned()
    }
}

const CHUNK: u64 = 1000;

/// `groups` × `each` chunks of one extent of 1000 bytes.
fn simple(medium: &Arc<Medium>, groups: u32, each: u32) -> Arc<ChunkCatalog> {
    let chunks = (0..groups).flat_map(|g| (0..each).map(move |i| ChunkId::new(g, i))).enumerate();
    let chunks =
        chunks.map(|(n, id)| (id, vec![Extent { source: 0, offset: n as u64 * CHUNK, size: Bytes(CHUNK) }]));
    Arc::new(ChunkCatalog::new(vec![medium.clone() as Arc<dyn ByteSource>], chunks).unwrap())
}

fn store(catalog: Arc<ChunkCatalog>, slots: usize, io_threads: usize) -> ChunkStore {
    let region = catalog.region_bytes(slots);
    let arena = Arc::new(Arena::new(region + Bytes(4096)).unwrap());
    let range = 4096..4096 + region.to_usize();
    ChunkStore::new(catalog, &arena, range, StoreOptions { io_threads, ..StoreOptions::default() }).unwrap()
}

fn assert_right(guard: &ChunkGuard, extents: &[Extent]) {
    assert_eq!(guard.extents(), extents.len());
    for (i, extent) in extents.iter().enumerate() {
        let bytes = guard.extent(i);
        assert_eq!(bytes.len() as u64, extent.size.0);
        assert_eq!(bytes.as_ptr().align_offset(EXTENT_ALIGNMENT), 0);
        let right = |(k, &b): (usize, &u8)| b == byte_at(extent.offset + k as u64);
        assert!(bytes.iter().enumerate().all(right), "extent {i} at {}", extent.offset);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Request(usize),
    Prefetch(usize),
    Cancel(usize),
    Acquire(usize),
    Try(usize),
    Any(Vec<usize>),
    Used(Vec<usize>),
    Drop,
    Over,
}

fn a_step(chunks: usize) -> impl Strategy<Value = Step> {
    let one = 0..chunks;
    prop_oneof![
        one.clone().prop_map(Step::Request),
        one.clone().prop_map(Step::Prefetch),
        one.clone().prop_map(Step::Cancel),
        one.clone().prop_map(Step::Acquire),
        one.clone().prop_map(Step::Acquire),
        one.clone().prop_map(Step::Try),
        prop::collection::vec(one.clone(), 1..5).prop_map(Step::Any),
        prop::collection::vec(one, 1..5).prop_map(Step::Used),
        Just(Step::Drop),
        Just(Step::Over),
    ]
}

const PER_GROUP: usize = 4;

fn id_of(n: usize) -> ChunkId {
    ChunkId::new((n / PER_GROUP) as u32, (n % PER_GROUP) as u32)
}

/// Runs the scripts at the same time, each on a thread that keeps at most one guard; with `tight`, too few slots and
/// failing reads are expected.
fn run_scripts(store: &ChunkStore, layout: &[Vec<Extent>], scripts: &[Vec<Step>], tight: bool) {
    fn fine<T>(result: Result<T, TierError>, tight: bool) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(TierError::TooFewSlots { .. } | TierError::Read { .. }) if tight => None,
            Err(error) => panic!("{error}"),
        }
    }
    std::thread::scope(|s| {
        for script in scripts {
            s.spawn(move || {
                let mut kept: Option<(usize, ChunkGuard)> = None;
                for step in script {
                    match step {
                        Step::Request(n) => store.request(id_of(*n), Urgency::Demand).unwrap(),
                        Step::Prefetch(n) => {
                            let at = Position { step: 0, group: id_of(*n).group };
                            store.request(id_of(*n), Urgency::Prefetch { score: 0.5, at }).unwrap();
                        }
                        Step::Cancel(n) => drop(store.cancel(id_of(*n)).unwrap()),
                        Step::Acquire(n) => {
                            if let Some(guard) = fine(store.acquire(id_of(*n)), tight) {
                                assert_right(&guard, &layout[*n]);
                                kept = Some((*n, guard));
                            }
                        }
                        Step::Try(n) => {
                            if let Some(Some(guard)) = fine(store.try_acquire(id_of(*n)), tight) {
                                assert_right(&guard, &layout[*n]);
                            }
                        }
                        Step::Any(list) => {
                            let ids: Vec<_> = list.iter().map(|&n| id_of(n)).collect();
                            if let Some((i, guard)) = fine(store.acquire_any(&ids), tight) {
                                assert_right(&guard, &layout[list[i]]);
                            }
                        }
                        Step::Used(list) => {
                            let group = id_of(list[0]).group;
                            let uses: Vec<Use> =
                                list.iter().map(|&n| Use { index: id_of(n).index, score: 0.5 }).collect();
                            store.used(group, &uses).unwrap();
                        }
                        Step::Drop => kept = None,
                        Step::Over => store.end_step(),
                    }
                    if let Some((n, guard)) = &kept {
                        assert_right(guard, &layout[*n]);
                    }
                    let inside =
                        |r: &ChunkResidency| !matches!(r.residency, Residency::Absent | Residency::Queued);
                    assert!(store.residency().iter().filter(|r| inside(r)).count() <= store.slots());
                }
            });
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn any_interleaving_gives_the_right_bytes_within_the_slots(
        scripts in prop::collection::vec(prop::collection::vec(a_step(12), 1..40), 3),
        sizes in prop::collection::vec((1u64..30_000, 1u64..9_000, any::<bool>(), 0u64..3), 12),
        spare in 0usize..3,
        io_threads in 1usize..4,
        in_file in any::<bool>(),
    ) {
        // Every chunk has two extents, neighbours or not, from offsets with several alignments.
        let mut offset = 0;
        let layout: Vec<Vec<Extent>> = sizes.iter().map(|&(a, b, apart, alignment)| {
            let a = if apart { a } else { a.next_multiple_of(64) };
            offset = u64::next_multiple_of(offset, [1, 64, 4096][alignment as usize]);
            let first = Extent { source: 0, offset, size: Bytes(a) };
            offset += a + if apart { 5000 } else { 0 };
            let second = Extent { source: 0, offset, size: Bytes(b) };
            offset += b;
            vec![first, second]
        }).collect();
        let folder = tempfile::tempdir().unwrap();
        let source: Arc<dyn ByteSource> = if in_file {
            let path = folder.path().join("f");
            std::fs::write(&path, (0..offset).map(byte_at).collect::<Vec<u8>>()).unwrap();
            Arc::new(DirectFile::open(&path).unwrap())
        } else {
            Medium::of(offset)
        };
        let chunks = layout.iter().cloned().enumerate().map(|(n, extents)| (id_of(n), extents));
        let catalog = Arc::new(ChunkCatalog::new(vec![source], chunks).unwrap());
        // Each of three threads holds at most one chunk while it waits for another.
        let slots = 6 + spare;
        let store = store(catalog, slots, io_threads);
        run_scripts(&store, &layout, &scripts, false);
        let stats = store.stats();
        prop_assert_eq!(stats.accesses, stats.hits + stats.late + stats.misses);
        prop_assert_eq!(stats.read_errors, 0);
    }

    #[test]
    fn too_few_slots_and_failing_reads_end_in_errors_and_never_in_a_deadlock(
        scripts in prop::collection::vec(prop::collection::vec(a_step(12), 1..60), 3),
        slots in 1usize..5,
        io_threads in 1usize..4,
        bad in prop::collection::hash_set(0u64..12, 0..4),
        policies in (0usize..3, 0usize..3, 0usize..3, 0usize..3),
    ) {
        let medium = Medium::of(12 * CHUNK);
        medium.failing.lock().unwrap().extend(bad.iter().map(|n| n * CHUNK));
        let layout: Vec<Vec<Extent>> = (0..12)
            .map(|n| vec![Extent { source: 0, offset: n * CHUNK, size: Bytes(CHUNK) }])
            .collect();
        let catalog = simple(&medium, 3, 4);
        let context = PolicyContext { groups: vec![0, 1, 2], slots, trace: None };
        let (eviction, predictor, admission, lookahead) = policies;
        let mut policies =
            PolicySet::named(EVICTIONS[eviction], PREDICTORS[predictor], ADMISSIONS[admission], &context).unwrap();
        policies.lookahead = lookahead;
        let options = StoreOptions { io_threads, ..StoreOptions::from(policies) };
        let region = catalog.region_bytes(slots);
        let arena = Arc::new(Arena::new(region).unwrap());
        let store = ChunkStore::new(catalog, &arena, 0..region.to_usize(), options).unwrap();
        run_scripts(&store, &layout, &scripts, true);
        // It lives on: every chunk can still be had, as soon as the medium is whole.
        medium.failing.lock().unwrap().clear();
        for (n, extents) in layout.iter().enumerate() {
            assert_right(&store.acquire(id_of(n)).unwrap(), extents);
        }
    }
}

#[test]
fn too_few_slots_are_an_error_that_says_how_many() {
    let medium = Medium::of(10 * CHUNK);
    let store = store(simple(&medium, 1, 8), 2, 2);
    let id = |i| ChunkId::new(0, i);
    let a = store.acquire(id(0)).unwrap();
    let b = store.acquire(id(1)).unwrap();
    let message = store.acquire(id(2)).unwrap_err().to_string();
    assert!(message.contains("chunk 2 of group 0") && message.contains("at least 3 slots"), "{message}");
    assert!(matches!(
        store.acquire_any(&[id(2), id(3)]),
        Err(TierError::TooFewSlots { slots: 2, needed: 3, .. })
    ));
    // Held already: no further slot is needed.
    let again = store.acquire(id(1)).unwrap();
    assert_eq!(again.extent(0)[0], byte_at(CHUNK));
    drop((a, again));
    let c = store.acquire(id(2)).unwrap();
    drop((b, c));
    // One slot at a time is enough for any number of chunks.
    let mut left: Vec<ChunkId> = (0..8).map(id).collect();
    store.used(0, &(0..8).map(|index| Use { index, score: 1.0 }).collect::<Vec<_>>()).unwrap();
    while !left.is_empty() {
        let (position, guard) = store.acquire_any(&left).unwrap();
        assert_eq!(guard.extent(0)[7], byte_at(u64::from(left[position].index) * CHUNK + 7));
        left.swap_remove(position);
    }
    assert!(store.acquire(id(8)).is_err_and(|e| e.to_string().contains("8 chunks")));
    assert!(store.acquire_any(&[]).is_err());
}

#[test]
fn regions_that_cannot_work_are_refused() {
    let medium = Medium::of(10 * CHUNK);
    let catalog = simple(&medium, 1, 8);
    let arena = Arc::new(Arena::new(Bytes(1 << 16)).unwrap());
    let make = |range| ChunkStore::new(catalog.clone(), &arena, range, StoreOptions::default());
    assert!(make(0..4095).unwrap_err().to_string().contains("at least one slot"));
    assert!(make(64..8000).unwrap_err().to_string().contains("multiple of 4096"));
    let first = make(0..8192).unwrap();
    assert!(matches!(make(4096..16384), Err(TierError::Internal(_))), "the region is taken");
    let guard = first.acquire(ChunkId::new(0, 3)).unwrap();
    drop(first);
    assert_eq!(guard.extent(0)[0], byte_at(3 * CHUNK), "guards outlive the store");
    assert!(make(0..8192).is_err());
    drop(guard);
    assert!(make(0..8192).is_ok());
}

#[test]
fn a_read_error_reaches_the_one_who_wanted_the_chunk_and_the_next_try_succeeds() {
    let medium = Medium::of(100 * CHUNK);
    let store = store(simple(&medium, 2, 8), 4, 2);
    medium.failing.lock().unwrap().insert(3 * CHUNK);
    medium.panicking.lock().unwrap().insert(4 * CHUNK);
    let id = |i| ChunkId::new(0, i);
    let message = store.acquire(id(3)).unwrap_err().to_string();
    for part in ["chunk 3 of group 0", "medium.bin", "offset 3000", "1000 B", "bad sector"] {
        assert!(message.contains(part), "{message}");
    }
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let panicked = store.acquire(id(4));
    std::panic::set_hook(hook);
    assert!(matches!(panicked, Err(TierError::Internal(_))));
    // Others are not concerned, and the failing ones come last.
    let (position, _) = store.acquire_any(&[id(3), id(5)]).unwrap();
    assert_eq!(position, 1);
    assert!(matches!(store.acquire_any(&[id(3)]), Err(TierError::Read { .. })));
    medium.failing.lock().unwrap().clear();
    medium.panicking.lock().unwrap().clear();
    assert_eq!(store.acquire(id(3)).unwrap().extent(0)[1], byte_at(3 * CHUNK + 1));
    assert_eq!(store.acquire(id(4)).unwrap().extent(0)[1], byte_at(4 * CHUNK + 1));
    assert!(store.stats().read_errors >= 3);
}

#[test]
fn a_failed_prefetch_is_nobodys_error() {
    let medium = Medium::of(100 * CHUNK);
    let store = store(simple(&medium, 1, 8), 2, 1);
    let id = |i| ChunkId::new(0, i);
    medium.failing.lock().unwrap().insert(0);
    let at = Position { step: 0, group: 0 };
    store.request(id(0), Urgency::Prefetch { score: 1.0, at }).unwrap();
    // One thread reads in order, so the prefetch has failed when this one arrives.
    drop(store.acquire(id(1)).unwrap());
    medium.failing.lock().unwrap().clear();
    while store.stats().reading.0 == 0.0 {}
    assert_eq!(store.acquire(id(0)).map(|g| g.extent(0)[0]).ok(), Some(byte_at(0)));
}

#[test]
fn prefetches_are_overtaken_promoted_and_cancelled() {
    let medium = Medium::of(100 * CHUNK);
    let store = store(simple(&medium, 1, 8), 6, 1);
    let id = |i| ChunkId::new(0, i);
    // The only thread is held up by chunk 0.
    medium.held.lock().unwrap().insert(0);
    store.request(id(0), Urgency::Demand).unwrap();
    while medium.reads.load(Ordering::Relaxed) == 0 {
        std::thread::yield_now();
    }
    let later = |step| Urgency::Prefetch { score: 1.0, at: Position { step, group: 0 } };
    for (i, step) in [(1, 9), (2, 2), (3, 1)] {
        store.request(id(i), later(step)).unwrap();
    }
    assert!(store.cancel(id(1)).unwrap());
    assert!(!store.cancel(id(1)).unwrap() && !store.cancel(id(0)).unwrap(), "0 is being read");
    store.request(id(2), Urgency::Demand).unwrap();
    std::thread::scope(|s| {
        let waiting = s.spawn(|| store.acquire(id(4)).unwrap().extent(0)[0]);
        // It waits as soon as it is in the queue.
        while !store.residency().iter().any(|r| r.chunk == id(4) && r.residency == Residency::Queued) {
            std::thread::yield_now();
        }
        medium.release();
        assert_eq!(waiting.join().unwrap(), byte_at(4 * CHUNK));
    });
    drop(store.acquire(id(3)).unwrap());
    assert!(!store.is_resident(id(1)) && store.is_resident(id(2)) && store.is_resident(id(0)));
    let stats = store.stats();
    assert_eq!(
        (stats.prefetches_issued, stats.prefetches_cancelled, stats.prefetches_promoted > 0),
        (3, 1, true)
    );
    assert!(stats.stall.0 > 0.0 && stats.reading.0 >= stats.stall.0 * 0.5);
}

#[test]
fn only_a_few_reads_ahead_are_under_way_so_that_demands_find_a_thread() {
    let medium = Medium::of(100 * CHUNK);
    let store = store(simple(&medium, 1, 8), 8, 4);
    medium.held.lock().unwrap().extend((0..4).map(|n| n * CHUNK));
    let at = Position { step: 0, group: 0 };
    for i in 0..4 {
        store.request(ChunkId::new(0, i), Urgency::Prefetch { score: 1.0, at }).unwrap();
    }
    // All reads ahead are held up, but this one is not.
    drop(store.acquire(ChunkId::new(0, 5)).unwrap());
    let with = |residency| store.residency().iter().filter(|r| r.residency == residency).count();
    while with(Residency::Loading) < 2 {
        std::thread::yield_now();
    }
    assert_eq!((with(Residency::Loading), with(Residency::Queued), with(Residency::Resident)), (2, 2, 1));
    medium.release();
    for i in 0..4 {
        drop(store.acquire(ChunkId::new(0, i)).unwrap());
    }
}

#[test]
fn wrong_prefetches_are_given_up_when_the_router_speaks() {
    let medium = Medium::of(100 * CHUNK);
    let store = store(simple(&medium, 2, 8), 6, 1);
    medium.held.lock().unwrap().insert(8 * CHUNK);
    store.request(ChunkId::new(1, 0), Urgency::Demand).unwrap();
    while medium.reads.load(Ordering::Relaxed) == 0 {
        std::thread::yield_now();
    }
    let at = Position { step: 0, group: 0 };
    for i in 0..3 {
        store.request(ChunkId::new(0, i), Urgency::Prefetch { score: 1.0, at }).unwrap();
    }
    store.used(0, &[Use { index: 1, score: 1.0 }]).unwrap();
    medium.release();
    drop(store.acquire(ChunkId::new(0, 1)).unwrap());
    let stats = store.stats();
    assert_eq!((stats.prefetches_cancelled, stats.prefetches_promoted), (2, 1));
    assert_eq!((stats.accesses, stats.misses), (1, 1));
    assert!(!store.is_resident(ChunkId::new(0, 0)) && !store.is_resident(ChunkId::new(0, 2)));
}

#[test]
fn dropping_the_store_stops_a_slow_read() {
    let medium = Medium::of(100 * CHUNK);
    let store = store(simple(&medium, 1, 8), 6, 2);
    medium.held.lock().unwrap().insert(0);
    store.request(ChunkId::new(0, 0), Urgency::Demand).unwrap();
    while medium.reads.load(Ordering::Relaxed) == 0 {
        std::thread::yield_now();
    }
    std::thread::scope(|s| {
        s.spawn(move || drop(store));
        medium.release();
    });
    assert_eq!(Arc::strong_count(&medium), 1, "nobody holds the source");
}
