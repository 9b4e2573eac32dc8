//! The replay of a recorded run agrees with the run, and the controls bound what policies can do.

use std::io::Write;
use std::sync::{Arc, Mutex};

use lightering_tier::policy::{EVICTIONS, PREDICTORS, PolicyContext, PolicySet};
use lightering_tier::*;
use lightering_units::{Bytes, BytesPerSecond, Seconds};

const FAST: DiskModel = DiskModel { rate: BytesPerSecond(1e15), latency: Seconds(0.0) };

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn context(trace: &Arc<ChunkTrace>, slots: usize) -> PolicyContext {
    let groups = trace.header().groups.iter().map(|g| g.0).collect();
    PolicyContext { groups, slots, trace: Some(trace.clone()) }
}

/// Runs a script through a live store and records it; `settle` lets every read end before the next turn.
fn live(
    script: &Arc<ChunkTrace>,
    policies: PolicySet,
    slots: usize,
    io_threads: usize,
    settle: bool,
) -> (StoreStats, ChunkTrace) {
    let ids = script.header().groups.iter().flat_map(|&(g, n)| (0..n).map(move |i| ChunkId::new(g, i)));
    let chunks = ids
        .enumerate()
        .map(|(n, id)| (id, vec![Extent { source: 0, offset: n as u64 * 64, size: Bytes(64) }]));
    let source: Arc<dyn ByteSource> = Arc::new(vec![0u8; 64 * script.header().chunks() as usize]);
    let catalog = Arc::new(ChunkCatalog::new(vec![source], chunks).unwrap());
    let region = catalog.region_bytes(slots);
    let arena = Arc::new(Arena::new(region).unwrap());
    let out = Shared::default();
    let options = StoreOptions {
        io_threads,
        trace: Some((Box::new(out.clone()), TRACE_MAX_BYTES)),
        ..StoreOptions::from(policies)
    };
    let store = ChunkStore::new(catalog, &arena, 0..region.to_usize(), options).unwrap();
    let mut step = 0;
    for turn in script.turns() {
        while step < turn.step {
            store.end_step();
            step += 1;
        }
        store.used(turn.group, turn.uses).unwrap();
        for choice in turn.uses {
            drop(store.acquire(ChunkId::new(turn.group, choice.index)).unwrap());
        }
        let moving = |r: &ChunkResidency| matches!(r.residency, Residency::Queued | Residency::Loading);
        while settle && store.residency().iter().any(moving) {
            std::thread::yield_now();
        }
    }
    store.end_step();
    store.finish_trace().unwrap();
    let bytes = out.0.lock().unwrap().clone();
    (store.stats(), ChunkTrace::parse(&bytes).unwrap())
}

fn script(seed: u64) -> Arc<ChunkTrace> {
    let synthetic =
        SyntheticTrace { groups: 4, chunks: 16, per_step: 3, steps: 120, seed, ..SyntheticTrace::default() };
    Arc::new(synthetic.make().unwrap())
}

#[test]
fn without_prefetch_live_and_replayed_hits_are_equal() {
    for (seed, eviction) in EVICTIONS.iter().enumerate() {
        let script = script(seed as u64);
        let slots = 24;
        let policies = || PolicySet::named(eviction, "none", "never", &context(&script, slots)).unwrap();
        let (stats, recorded) = live(&script, policies(), slots, 1, false);
        assert_eq!(recorded.header().slots, 24);
        assert!(
            recorded
                .turns()
                .zip(script.turns())
                .all(|(a, b)| (a.step, a.group, a.uses) == (b.step, b.group, b.uses))
        );
        assert_eq!((recorded.turn_count(), recorded.steps()), (script.turn_count(), script.steps()));
        for disk in [FAST, DiskModel { rate: BytesPerSecond(1e4), latency: Seconds(1e-3) }] {
            let report = replay(&recorded, policies(), slots, disk).unwrap();
            assert_eq!(
                (report.stats.accesses, report.stats.hits),
                (stats.accesses, stats.hits),
                "{eviction}"
            );
            assert_eq!(report.stats.evictions, stats.evictions, "{eviction}");
            assert_eq!(report.bytes_read, stats.bytes_read(), "{eviction}");
        }
        assert!(stats.hit_rate() > 0.2 && stats.hit_rate() < 0.95, "{eviction}: {}", stats.hit_rate());
    }
}

#[test]
fn with_threads_and_prefetch_they_agree_within_two_percent() {
    for predictor in PREDICTORS {
        let script = script(9);
        let policies = || PolicySet::named("lru", predictor, "always", &context(&script, 28)).unwrap();
        let (stats, recorded) = live(&script, policies(), 28, 3, true);
        // A disk as fast as the memory that the live store read from.
        let mut report = replay(&recorded, policies(), 28, FAST).unwrap();
        report.stats.late += report.stats.hits;
        let live_served = (stats.hits + stats.late) as f64 / stats.accesses as f64;
        let replayed = report.stats.late as f64 / report.stats.accesses as f64;
        assert!(
            (live_served - replayed).abs() <= 0.02,
            "{predictor}: live {live_served}, replayed {replayed}"
        );
    }
}

#[test]
fn belady_and_the_oracle_bound_the_others() {
    let trace = script(5);
    let disk = DiskModel { rate: BytesPerSecond(2e9), latency: Seconds(1e-4) };
    let demanding = replay_load_on_demand(&trace, disk).unwrap();
    for slots in [8, 16, 32, 64] {
        let run = |eviction, predictor, admission| {
            let policies = PolicySet::named(eviction, predictor, admission, &context(&trace, slots)).unwrap();
            replay(&trace, policies, slots, disk).unwrap()
        };
        let bound = run("belady", "none", "never");
        for eviction in EVICTIONS {
            let report = run(eviction, "none", "never");
            assert!(report.stats.hits <= bound.stats.hits, "{eviction} with {slots} slots");
            assert!(report.stall.0 <= demanding.stall.0 + 1e-9, "{eviction} with {slots} slots");
            assert_eq!(report.stats.prefetches_issued, 0);
        }
        if slots >= 16 {
            let told = run("lru", "oracle", "always");
            let blind = run("lru", "none", "never");
            assert!(told.stall.0 < blind.stall.0 || slots == 64, "{slots} slots: {told:?} {blind:?}");
            assert_eq!(told.stats.prefetches_wasted, 0);
            assert!(run("lru", "oracle", "never").stats.prefetches_issued == 0);
        }
    }
    // Everything fits: only the first use of a chunk misses.
    let all =
        replay(&trace, PolicySet::named("lru", "none", "never", &context(&trace, 64)).unwrap(), 64, disk)
            .unwrap();
    assert_eq!(all.stats.evictions, 0);
    assert!(all.stats.misses <= 64);
    let none = PolicySet::named("lru", "none", "never", &context(&trace, 1)).unwrap();
    assert!(replay(&trace, none, 0, disk).is_err());
    let none = PolicySet::named("lru", "none", "never", &context(&trace, 1)).unwrap();
    assert!(replay(&trace, none, 1, DiskModel { rate: BytesPerSecond(0.0), ..disk }).is_err());
}
