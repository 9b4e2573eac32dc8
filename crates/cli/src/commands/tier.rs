//! `lighter tier`

mod live;

use crate::arguments::{Capacity, TierCommand, TierPolicyArguments, TierReplayArguments, TierSynthArguments};
use crate::failure::{Exit, Failure, Outcome};
use crate::model::load_profile;
use crate::output::{Output, Table};
use anyhow::Context;
use lightering_meter::DiskPattern;
use lightering_tier::policy::{FrequencyTable, PolicyContext, PolicySet};
use lightering_tier::{
    ChunkId, ChunkTrace, DiskModel, ReplayReport, SyntheticTrace, replay, replay_load_on_demand,
};
use lightering_units::{Bytes, Seconds};
use serde::Serialize;
use std::fs::File;
use std::io::BufWriter;
use std::path::Path;
use std::sync::Arc;

/// What is printed of the most and least used chunks.
const HOTTEST_SHOWN: usize = 5;

/// Runs `lighter tier …`.
pub fn run(command: &TierCommand, output: Output) -> Outcome {
    match command {
        TierCommand::Replay(arguments) => replay_trace(arguments, output),
        TierCommand::Live(arguments) => live::run(arguments, output),
        TierCommand::Inspect { trace } => inspect(trace, output),
        TierCommand::Synth(arguments) => synthesize(arguments, output),
    }
}

/// A recorded run.
pub fn read_trace(path: &Path) -> Outcome<ChunkTrace> {
    ChunkTrace::open(path).map_err(|error| {
        Failure::from(error)
            .context(format!("{}: reading the chunk trace", path.display()))
            .or_hint("lighter tier synth, which writes one")
    })
}

/// `lighter tier replay --json`
#[derive(Debug, Serialize)]
struct ReplayResult<'t> {
    schema: &'static str,
    trace: String,
    chunks: u64,
    chunk_bytes: Bytes,
    steps: u64,
    disk: DiskModel,
    rows: &'t [ReplayReport],
}

/// The trace, or the first steps of it.
fn trace_of(arguments: &TierPolicyArguments) -> Outcome<Arc<ChunkTrace>> {
    let trace = read_trace(&arguments.trace)?;
    Ok(Arc::new(match arguments.steps {
        Some(steps) => trace.truncated(steps),
        None => trace,
    }))
}

/// The capacities that are compared, in slots.
fn capacities(arguments: &TierPolicyArguments, trace: &ChunkTrace) -> Vec<usize> {
    let header = trace.header();
    let chunks = header.chunks();
    let capacities = match arguments.capacity.as_slice() {
        [] if header.slots > 0 => &[Capacity::Slots(header.slots)][..],
        [] => &[Capacity::Share(0.5), Capacity::Share(0.25)][..],
        given => given,
    };
    let slots = |capacity: &Capacity| match *capacity {
        Capacity::Slots(slots) => slots.min(chunks),
        Capacity::Share(share) => ((chunks as f64 * share).round() as u64).max(1),
    };
    capacities.iter().map(|c| usize::try_from(slots(c)).unwrap_or(usize::MAX)).collect()
}

/// Eviction, predictor and admission of each row: what is wanted, and the controls: what nobody can beat without reading
/// ahead, and what nobody can beat by prediction.
fn combinations(arguments: &TierPolicyArguments) -> Vec<(&str, &str, &str)> {
    let mut combinations: Vec<(&str, &str, &str)> = Vec::new();
    for eviction in &arguments.policy {
        for prefetch in &arguments.prefetch {
            let admission = if prefetch == "none" { "never" } else { arguments.admission.as_str() };
            combinations.push((eviction, prefetch, admission));
        }
    }
    let first = arguments.policy.first().map_or("lru", String::as_str);
    for control in [("belady", "none", "never"), (first, "oracle", "always")] {
        if !combinations.contains(&control) {
            combinations.push(control);
        }
    }
    combinations
}

fn context_of(trace: &Arc<ChunkTrace>, slots: usize) -> PolicyContext {
    let groups = trace.header().groups.iter().map(|g| g.0).collect();
    PolicyContext { groups, slots, trace: Some(trace.clone()) }
}

fn replay_trace(arguments: &TierReplayArguments, output: Output) -> Outcome {
    let trace = trace_of(&arguments.policies)?;
    let header = trace.header();
    let rate = match arguments.disk_rate {
        Some(rate) => rate,
        None => {
            let profile = load_profile(arguments.machine.as_deref())?;
            let at = |direct| profile.disk_read_at(DiskPattern::Random, direct, header.chunk_bytes);
            at(true).or_else(|| at(false)).ok_or_else(|| {
                Failure::input(
                    "the machine profile has no rate of random reads",
                    "--disk-rate, or lighter doctor, which measures it",
                )
            })?
        }
    };
    let disk = DiskModel { rate, latency: arguments.disk_latency };
    let mut rows = vec![replay_load_on_demand(&trace, disk)?];
    let combinations = combinations(&arguments.policies);
    let capacities = capacities(&arguments.policies, &trace);
    let progress = output.progress((capacities.len() * combinations.len()) as u64);
    for slots in capacities {
        let context = context_of(&trace, slots);
        for (eviction, prefetch, admission) in &combinations {
            progress.set_message(format!("{eviction}, {prefetch}, {slots} slots"));
            let policies = PolicySet::named(eviction, prefetch, admission, &context)?;
            rows.push(replay(&trace, policies, slots, disk)?);
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    let result = ReplayResult {
        schema: "lightering.tier-replay/1",
        trace: arguments.policies.trace.display().to_string(),
        chunks: header.chunks(),
        chunk_bytes: header.chunk_bytes,
        steps: trace.steps(),
        disk,
        rows: &rows,
    };
    output.result(&result, &replay_text(&trace, disk, &rows))?;
    Ok(Exit::Done)
}

fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}

fn replay_text(trace: &ChunkTrace, disk: DiskModel, rows: &[ReplayReport]) -> String {
    let steps = trace.steps().max(1);
    let mut table = Table::new(&[
        ">capacity",
        "policy",
        "prefetch",
        "admission",
        ">hits",
        ">late",
        ">wasted",
        ">read/step",
        ">stall/step",
        ">time/step",
        ">speed",
    ]);
    let time = |row: &ReplayReport| row.computing.0 + row.stall.0;
    let baseline = rows.first().map_or(0.0, time);
    let mut last = 0;
    for row in rows {
        if row.slots != last {
            table.row([""]);
            last = row.slots;
        }
        let accesses = row.stats.accesses.max(1) as f64;
        let capacity = match row.slots {
            0 => "-".to_owned(),
            slots => format!("{slots} ({})", percent(slots as f64 / trace.header().chunks().max(1) as f64)),
        };
        table.row([
            capacity,
            row.eviction.to_owned(),
            row.prefetch.to_owned(),
            row.admission.to_owned(),
            percent(row.hit_rate),
            percent(row.stats.late as f64 / accesses),
            row.stats.prefetch_precision().map_or("-".to_owned(), |p| percent(1.0 - p)),
            Bytes(row.bytes_read.0 / steps).to_string(),
            Seconds(row.stall.0 / steps as f64).to_string(),
            Seconds(time(row) / steps as f64).to_string(),
            if time(row) > 0.0 { format!("{:.2}x", baseline / time(row)) } else { "-".to_owned() },
        ]);
    }
    format!(
        "{} steps of {} groups, {} chunks of {}, disk {} with {} before each read\n\n{}\n\
         hits: resident when needed; late: being read by then; wasted: of the prefetches; \
         speed: against load-on-demand\n",
        trace.steps(),
        trace.header().groups.len(),
        trace.header().chunks(),
        trace.header().chunk_bytes,
        disk.rate,
        disk.latency,
        table.text()
    )
}

/// `lighter tier inspect --json`
#[derive(Debug, Serialize)]
struct InspectResult {
    schema: &'static str,
    trace: String,
    groups: usize,
    chunks: u64,
    chunk_bytes: Bytes,
    recorded_slots: u64,
    steps: u64,
    turns: usize,
    uses: usize,
    /// Chunks that were used at least once.
    chunks_used: usize,
    /// Share of all uses that went to the most used tenth of the chunks.
    top_tenth_share: f64,
    /// Share of uses of chunks that the same group used in its turn before.
    repeated_share: f64,
    computing: Seconds,
    cut: bool,
    hottest: Vec<HotChunk>,
}

#[derive(Debug, Serialize)]
struct HotChunk {
    chunk: ChunkId,
    uses: u64,
}

fn inspect(path: &Path, output: Output) -> Outcome {
    let trace = read_trace(path)?;
    let header = trace.header();
    let table = FrequencyTable::of(&trace);
    let ranked = table.ranked();
    let tenth = usize::try_from(header.chunks().div_ceil(10)).unwrap_or(usize::MAX);
    let top: u64 = ranked.iter().take(tenth).map(|&c| table.uses(c)).sum();
    let mut last = std::collections::HashMap::new();
    let mut repeated = 0usize;
    let mut computing = Seconds(0.0);
    for turn in trace.turns() {
        computing += turn.computing;
        if let Some(before) = last.insert(turn.group, turn.uses) {
            let same = |u: &&lightering_tier::policy::Use| before.iter().any(|b| b.index == u.index);
            repeated += turn.uses.iter().filter(same).count();
        }
    }
    let uses = trace.use_count();
    let result = InspectResult {
        schema: "lightering.tier-trace/1",
        trace: path.display().to_string(),
        groups: header.groups.len(),
        chunks: header.chunks(),
        chunk_bytes: header.chunk_bytes,
        recorded_slots: header.slots,
        steps: trace.steps(),
        turns: trace.turn_count(),
        uses,
        chunks_used: ranked.len(),
        top_tenth_share: top as f64 / uses.max(1) as f64,
        repeated_share: repeated as f64 / uses.max(1) as f64,
        computing,
        cut: trace.is_cut(),
        hottest: ranked
            .iter()
            .take(HOTTEST_SHOWN)
            .map(|&chunk| HotChunk { chunk, uses: table.uses(chunk) })
            .collect(),
    };
    let mut text = format!(
        "{} steps, {} turns of {} groups, {} uses{}\n{} chunks of {}, {} of them used; the recorded store had {}\n\
         the most used tenth of the chunks has {} of the uses, the turn before {}; computing {}\n",
        result.steps,
        result.turns,
        result.groups,
        result.uses,
        if result.cut { " (the file was cut off)" } else { "" },
        result.chunks,
        result.chunk_bytes,
        result.chunks_used,
        if result.recorded_slots > 0 {
            format!("{} slots", result.recorded_slots)
        } else {
            "none".to_owned()
        },
        percent(result.top_tenth_share),
        percent(result.repeated_share),
        result.computing,
    );
    for hot in &result.hottest {
        text.push_str(&format!("  {}: {} uses\n", hot.chunk, hot.uses));
    }
    output.result(&result, &text)?;
    Ok(Exit::Done)
}

/// `lighter tier synth --json`
#[derive(Debug, Serialize)]
struct SynthResult {
    schema: &'static str,
    trace: String,
    bytes: Bytes,
}

fn synthesize(arguments: &TierSynthArguments, output: Output) -> Outcome {
    let path = &arguments.trace;
    let synthetic = SyntheticTrace {
        groups: arguments.groups,
        chunks: arguments.chunks,
        per_step: arguments.per_step,
        steps: arguments.steps,
        zipf: arguments.zipf,
        repeat: arguments.repeat,
        chunk_bytes: arguments.chunk_size,
        computing: arguments.computing,
        seed: arguments.seed,
    };
    // What cannot be is refused before a file is touched.
    synthetic.check()?;
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    let written = synthetic.write(BufWriter::new(&file));
    if let Err(error) = written {
        // A trace cut short would only mislead.
        let _ = std::fs::remove_file(path);
        return Err(Failure::from(error).context(format!("{}: writing the chunk trace", path.display())));
    }
    let bytes = Bytes(file.metadata().with_context(|| format!("reading {}", path.display()))?.len());
    let result = SynthResult { schema: "lightering.tier-synth/1", trace: path.display().to_string(), bytes };
    output.result(&result, &format!("{}: {bytes}\n", path.display()))?;
    Ok(Exit::Done)
}
