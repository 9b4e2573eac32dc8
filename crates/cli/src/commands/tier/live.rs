//! `lighter tier live`

use super::{capacities, combinations, context_of, percent, trace_of};
use crate::arguments::TierLiveArguments;
use crate::failure::{Exit, Failure, Outcome};
use crate::output::{Output, Table};
use anyhow::Context;
use lightering_tier::policy::PolicySet;
use lightering_tier::{
    Arena, ByteSource, ChunkCatalog, ChunkId, ChunkStore, ChunkTrace, DirectFile, DiskModel, Extent,
    ReplayReport, StoreOptions, StoreStats, ThrottledSource, drive, replay,
};
use lightering_units::{Bytes, BytesPerSecond, Seconds};
use serde::Serialize;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the disk's own rate is measured.
const RAW_SECONDS: f64 = 1.5;

/// `--json`
#[derive(Debug, Serialize)]
struct LiveResult<'t> {
    schema: &'static str,
    trace: String,
    data: String,
    direct: bool,
    io_threads: u32,
    chunks: u64,
    chunk_bytes: Bytes,
    steps: u64,
    /// Rate of reading chunks at random with as many threads and nothing else to do.
    raw_rate: BytesPerSecond,
    rows: &'t [LiveRow],
}

#[derive(Debug, Serialize)]
struct LiveRow {
    live: StoreStats,
    live_hit_rate: f64,
    live_total: Seconds,
    stalled_rate: Option<BytesPerSecond>,
    replayed: ReplayReport,
}

/// Runs the trace with real reads, once for each combination of policies.
pub fn run(arguments: &TierLiveArguments, output: Output) -> Outcome {
    let trace = trace_of(&arguments.policies)?;
    let header = trace.header();
    let path = &arguments.data;
    let file = if arguments.buffered { DirectFile::open_buffered(path) } else { DirectFile::open(path) };
    let file = file.context("opening the data")?;
    let direct = file.is_direct();
    let mut source: Arc<dyn ByteSource> = Arc::new(file);
    if arguments.disk_rate.is_some() || arguments.disk_latency.0 > 0.0 {
        let rate = arguments.disk_rate.unwrap_or(BytesPerSecond(f64::INFINITY));
        source = Arc::new(ThrottledSource::new(source, rate, arguments.disk_latency)?);
    }
    let catalog = Arc::new(catalog_of(&trace, source.clone()).map_err(|error| {
        error.or_hint("a file as large as all chunks together, so that no part of it is read twice")
    })?);
    let combinations = combinations(&arguments.policies);
    let capacities = capacities(&arguments.policies, &trace);
    let progress = output.progress((capacities.len() * combinations.len()) as u64);
    progress.set_message("the disk's own rate");
    let raw_rate = raw_rate(&*source, &catalog, arguments.io_threads)?;
    let latency = Seconds(0.0);
    let mut rows = Vec::new();
    for slots in capacities {
        let region = catalog.region_bytes(slots);
        let arena = Arc::new(Arena::new(region).context("memory for the chunks")?);
        let context = context_of(&trace, slots);
        for (eviction, prefetch, admission) in &combinations {
            progress.set_message(format!("{eviction}, {prefetch}, {slots} slots"));
            let policies = || PolicySet::named(eviction, prefetch, admission, &context);
            let options =
                StoreOptions { io_threads: arguments.io_threads as usize, ..StoreOptions::from(policies()?) };
            let store = ChunkStore::new(catalog.clone(), &arena, 0..region.to_usize(), options)?;
            // A sleep is always too long; what it was too long by is taken off the next one.
            let mut ahead = 0.0;
            let mut compute = |_: &[u8], time: Seconds| {
                let began = Instant::now();
                std::thread::sleep(Duration::from_secs_f64((time.0 - ahead).max(0.0)));
                ahead += began.elapsed().as_secs_f64() - time.0;
            };
            let live_total = drive(&store, &trace, &mut compute)?;
            let live = store.stats();
            rows.push(LiveRow {
                live,
                live_hit_rate: live.hit_rate(),
                live_total,
                stalled_rate: live.stalled_rate(),
                replayed: replay(&trace, policies()?, slots, DiskModel { rate: raw_rate, latency })?,
            });
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    let result = LiveResult {
        schema: "lightering.tier-live/1",
        trace: arguments.policies.trace.display().to_string(),
        data: path.display().to_string(),
        direct,
        io_threads: arguments.io_threads,
        chunks: header.chunks(),
        chunk_bytes: header.chunk_bytes,
        steps: trace.steps(),
        raw_rate,
        rows: &rows,
    };
    output.result(&result, &text(&result, &trace))?;
    Ok(Exit::Done)
}

/// The chunks one after the other, beginning again where the file ends.
fn catalog_of(trace: &ChunkTrace, source: Arc<dyn ByteSource>) -> Outcome<ChunkCatalog> {
    let header = trace.header();
    let size = Bytes(header.chunk_bytes.0.max(1));
    let stride = size.align_up(4096).0;
    let places = (source.len_bytes().0.saturating_sub(size.0)) / stride + 1;
    if source.len_bytes() < size {
        return Err(Failure::input(
            format!("{} has {}, less than one chunk of {size}", source.name(), source.len_bytes()),
            "a larger file",
        ));
    }
    let ids = header.groups.iter().flat_map(|&(g, n)| (0..n).map(move |i| ChunkId::new(g, i)));
    let chunks =
        ids.zip(0u64..).map(|(id, n)| (id, vec![Extent { source: 0, offset: n % places * stride, size }]));
    Ok(ChunkCatalog::new(vec![source], chunks)?)
}

/// Reads chunks at random for a while.
fn raw_rate(source: &dyn ByteSource, catalog: &ChunkCatalog, threads: u32) -> Outcome<BytesPerSecond> {
    let slot = catalog.slot_bytes();
    let arena = Arena::new(slot * u64::from(threads)).context("memory for measuring the disk")?;
    let places = source.len_bytes().0 / slot.0.max(1);
    let before = Instant::now();
    let read = |thread: u64| -> std::io::Result<u64> {
        let start = (thread * slot.0) as usize;
        let mut buffer = arena.write(start..start + slot.to_usize()).map_err(std::io::Error::other)?;
        let mut bytes = 0;
        let mut state = thread + 1;
        while before.elapsed().as_secs_f64() < RAW_SECONDS {
            state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
            let offset = (state >> 33) % places.max(1) * slot.0;
            bytes += source.read_pages(offset, &mut buffer)? as u64;
        }
        Ok(bytes)
    };
    let bytes = std::thread::scope(|s| {
        let read = &read;
        let threads: Vec<_> = (0..u64::from(threads)).map(|t| s.spawn(move || read(t))).collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|_| Err(std::io::Error::other("a reading thread panicked"))))
            .sum::<std::io::Result<u64>>()
    })?;
    Ok(Bytes(bytes) / Seconds(before.elapsed().as_secs_f64()))
}

fn text(result: &LiveResult<'_>, trace: &ChunkTrace) -> String {
    let steps = trace.steps().max(1);
    let mut table = Table::new(&[
        ">capacity",
        "policy",
        "prefetch",
        ">hits",
        ">replayed",
        ">late",
        ">read/step",
        ">replayed",
        ">stall/step",
        ">replayed",
        ">time/step",
        ">stalled rate",
        ">of the disk",
    ]);
    let per_step = |time: Seconds| Seconds(time.0 / steps as f64).to_string();
    for row in result.rows {
        let share = row.stalled_rate.map(|rate| rate.0 / result.raw_rate.0);
        table.row([
            format!(
                "{} ({})",
                row.replayed.slots,
                percent(row.replayed.slots as f64 / result.chunks.max(1) as f64)
            ),
            row.replayed.eviction.to_owned(),
            row.replayed.prefetch.to_owned(),
            percent(row.live_hit_rate),
            percent(row.replayed.hit_rate),
            percent(row.live.late as f64 / row.live.accesses.max(1) as f64),
            Bytes(row.live.bytes_read().0 / steps).to_string(),
            Bytes(row.replayed.bytes_read.0 / steps).to_string(),
            per_step(row.live.stall),
            per_step(row.replayed.stall),
            per_step(row.live_total),
            row.stalled_rate.map_or("-".to_owned(), |rate| rate.to_string()),
            share.map_or("-".to_owned(), percent),
        ]);
    }
    format!(
        "{} steps of {} groups, {} chunks of {}; {}, {} threads: {} of random reads with nothing else to do\n\n{}\n\
         replayed: with a disk of that rate; stalled rate: bytes read while somebody waited\n",
        result.steps,
        trace.header().groups.len(),
        result.chunks,
        result.chunk_bytes,
        if result.direct { "O_DIRECT" } else { "through the page cache" },
        result.io_threads,
        result.raw_rate,
        table.text()
    )
}
