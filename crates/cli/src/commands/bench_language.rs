//! `lighter bench` of a language model.

mod report;
mod sustained;

use crate::arguments::BenchArguments;
use crate::commands::bench::quantile;
use crate::commands::run::{energy_model, profile_table};
use crate::failure::{Exit, Failure, Outcome};
use crate::language::{Language, LanguageFile};
use crate::model::{Means, ModelSource, NodeTime, load_profile, plan_summary};
use crate::output::Output;
use crate::probe::Scramble;
use crate::text_input::read_text;
use crate::usage::{self, Baseline};
use anyhow::Context;
use lightering_engine::BufferKind;
use lightering_kernels::Isa;
use lightering_lm::{LanguageModel, MAX_TEXT_BYTES, Row, SoleSequence, StepReport, TokenModel};
use lightering_meter::{EnergyMeter, MemoryPool, Receipt, Stopwatch, Tier};
use lightering_tier::StoreStats;
use lightering_units::{Bytes, Seconds};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use sustained::Sustained;

/// Rounds when nobody asks for a number: each reads a prompt and answers it.
const RUNS_DEFAULT: u32 = 3;
const WARMUP_DEFAULT: u32 = 1;
/// Ranges of the histogram of times.
const BUCKETS: usize = 40;

/// `--json`
#[derive(Debug, Serialize)]
struct LanguageBenchReport {
    schema: &'static str,
    prompt_tokens: usize,
    tokens: usize,
    /// Medians over the rounds.
    prompt_tokens_per_second: f64,
    tokens_per_second: f64,
    /// From the prompt to its last logits, each round.
    first_token_seconds: Vec<Seconds>,
    /// The same over all rounds.
    first_token: Percentiles,
    /// Time of one token of the answer, over all rounds.
    token_seconds: Percentiles,
    /// How many of them took how long.
    token_histogram: Vec<Bucket>,
    /// Share of the answers' time spent waiting for weights.
    stall_share: f64,
    /// Bytes read for one token of the answer.
    bytes_read_per_token: f64,
    /// Bytes read for one prompt.
    bytes_read_per_prompt: f64,
    /// Bytes of weights that one token of the answer passes, wherever they are.
    weight_bytes_per_token: Bytes,
    /// What is planned to lie in memory, by class.
    memory: Vec<MemoryClass>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sustained: Option<Sustained>,
    #[serde(skip_serializing_if = "Option::is_none")]
    experts: Option<Experts>,
    profile: Vec<NodeTime>,
    receipt: Receipt,
}

#[derive(Debug, Serialize)]
struct Percentiles {
    p50: Seconds,
    p90: Seconds,
    p99: Seconds,
    max: Seconds,
}

impl Percentiles {
    fn of(mut seconds: Vec<Seconds>) -> Percentiles {
        seconds.sort_by(|a, b| a.0.total_cmp(&b.0));
        Percentiles {
            p50: quantile(&seconds, 0.5),
            p90: quantile(&seconds, 0.9),
            p99: quantile(&seconds, 0.99),
            max: seconds.last().copied().unwrap_or_default(),
        }
    }
}

/// How many tokens took so long.
#[derive(Debug, Serialize)]
struct Bucket {
    from: Seconds,
    to: Seconds,
    count: usize,
}

/// Equal ranges from the shortest time to the longest.
fn histogram(seconds: &[Seconds]) -> Vec<Bucket> {
    let low = seconds.iter().map(|s| s.0).fold(f64::INFINITY, f64::min);
    let high = seconds.iter().map(|s| s.0).fold(0.0, f64::max);
    if seconds.is_empty() {
        return Vec::new();
    }
    let width = ((high - low) / BUCKETS as f64).max(1e-9);
    let mut buckets: Vec<Bucket> = (0..BUCKETS)
        .map(|i| Bucket {
            from: Seconds(low + i as f64 * width),
            to: Seconds(low + (i + 1) as f64 * width),
            count: 0,
        })
        .collect();
    for s in seconds {
        // The cast drops the fraction.
        buckets[(((s.0 - low) / width) as usize).min(BUCKETS - 1)].count += 1;
    }
    buckets
}

#[derive(Debug, Serialize)]
struct MemoryClass {
    class: &'static str,
    bytes: Bytes,
}

/// What a plan puts into memory, and what is held beside it.
fn memory_classes(model: &LanguageModel, held: Bytes) -> Vec<MemoryClass> {
    let plan = model.plan();
    let of = |kind: BufferKind| plan.buffers.iter().filter(|b| b.kind == kind).map(|b| b.size).sum::<Bytes>();
    let (weights, cache) = (of(BufferKind::Weight), of(BufferKind::State));
    let experts = of(BufferKind::Experts);
    let rest = Bytes(plan.arena.0.saturating_sub((weights + cache + experts).0));
    [
        ("weights that stay", weights),
        ("experts", experts),
        ("cache of keys and values", cache),
        ("activations, scratch and weights on their way", rest),
        ("outside of the arena", plan.outside_arena),
        ("tokenizer, graph and the choice of tokens", held),
    ]
    .map(|(class, bytes)| MemoryClass { class, bytes })
    .into()
}

/// What the store of experts did over the timed rounds.
#[derive(Debug, Serialize)]
struct Experts {
    slots: usize,
    chunks: usize,
    hit_rate: f64,
    #[serde(flatten)]
    stats: StoreStats,
}

/// Times of one round.
#[derive(Default)]
struct Round {
    prompt: StepReport,
    tokens: Vec<StepReport>,
}

fn sum(into: &mut StepReport, step: StepReport) {
    into.seconds += step.seconds;
    into.stall += step.stall;
    into.bytes_read += step.bytes_read;
}

/// Reads the prompt, then answers it greedily with `count` tokens.
fn round(
    model: &mut LanguageModel,
    prompt: &[u32],
    count: usize,
    between: &mut dyn FnMut(&mut LanguageModel),
) -> Outcome<Round> {
    let sole = SoleSequence::of(model);
    let mut round = Round::default();
    let mut next = 0u32;
    let take = |logits: &mut [f32]| {
        let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        best.map_or(0, |(i, _)| i as u32)
    };
    let most = model.rows_max();
    for (i, part) in prompt.chunks(most).enumerate() {
        let rows: Vec<Row<'_>> = part
            .iter()
            .enumerate()
            .map(|(j, &token)| {
                let position = i * most + j;
                sole.row(token, position, position + 1 == prompt.len())
            })
            .collect();
        sum(&mut round.prompt, model.step(&rows, &mut |_, logits| next = take(logits))?);
    }
    between(model);
    for position in prompt.len()..prompt.len() + count {
        let row = sole.row(next, position, true);
        round.tokens.push(model.step(&[row], &mut |_, logits| next = take(logits))?);
    }
    Ok(round)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let sorted: Vec<Seconds> = values.into_iter().map(Seconds).collect();
    quantile(&sorted, 0.5).0
}

/// Times prompts and answers.
pub fn run(arguments: &BenchArguments, output: Output) -> Outcome {
    let baseline = Baseline::now();
    let resources = &arguments.resources;
    let profile = load_profile(resources.machine.as_deref())?;
    let pool = MemoryPool::new(resources.memory);
    let load = Stopwatch::start();
    let mut decoder = arguments.decoder.clone();
    let (prompt_len, count) = (arguments.prompt_tokens as usize, arguments.tokens as usize);
    let needed = prompt_len + count;
    decoder.context.get_or_insert(needed as u32);
    if decoder.context.is_some_and(|c| (c as usize) < needed) {
        return Err(Failure::input(
            format!("a prompt of {prompt_len} tokens and an answer of {count} do not fit into --context"),
            format!("--context {needed}"),
        ));
    }
    let file = LanguageFile::open(&arguments.model, &decoder, resources.memory, 1, 0)?;
    let prompt = prompt(arguments, &file, prompt_len)?;
    let threads = resources.threads.unwrap_or_else(lightering_meter::host::cores);
    let means = Means { threads, profile: &profile, pool: &pool, baseline: &baseline };
    let Language { mut model, source, held, .. } =
        file.start(means, arguments.profile || arguments.report.is_some())?;
    let load_seconds = load.elapsed();
    let planned = model.plan().predicted_peak + held;
    let fixed_assumed = baseline.fixed_cost_assumed(&profile, Bytes::ZERO);

    let (warmup, runs) = (arguments.warmup.unwrap_or(WARMUP_DEFAULT), arguments.runs.unwrap_or(RUNS_DEFAULT));
    let progress = output.progress(u64::from(warmup) + u64::from(runs));
    for _ in 0..warmup {
        round(&mut model, &prompt, count.min(8), &mut |_| {})?;
        progress.inc(1);
    }
    let before = model.session().experts().map(|store| store.stats());
    let energy = EnergyMeter::start(arguments.receipt.energy_model.map(energy_model));
    let mut rounds = Vec::new();
    let mut decode_times = vec![0.0; model.plan().instructions.len()];
    for _ in 0..runs {
        let mut start = Vec::new();
        rounds.push(round(&mut model, &prompt, count, &mut |m| start = m.instruction_seconds().to_vec())?);
        for ((sum, now), then) in decode_times.iter_mut().zip(model.instruction_seconds()).zip(&start) {
            *sum += now - then;
        }
        progress.inc(1);
    }
    let energy = energy.finish();
    progress.finish_and_clear();
    let sustained = match arguments.sustained {
        Some(seconds) => Some(sustained_run(&mut model, prompt_len, count, seconds.0, output)?),
        None => None,
    };

    let tokens: Vec<StepReport> = rounds.iter().flat_map(|r| r.tokens.iter().copied()).collect();
    let mut all = StepReport::default();
    tokens.iter().for_each(|t| sum(&mut all, *t));
    let times: Vec<Seconds> = tokens.iter().map(|t| t.seconds).collect();
    let per_round = |r: &Round| r.tokens.len() as f64 / r.tokens.iter().map(|t| t.seconds.0).sum::<f64>();
    let answer_rate = median(rounds.iter().map(per_round).collect());
    let prompt_rate =
        median(rounds.iter().map(|r| prompt_len as f64 / r.prompt.seconds.0.max(1e-9)).collect());
    let total = Seconds(rounds.iter().map(|r| r.prompt.seconds.0).sum::<f64>() + all.seconds.0);
    let mut measured = baseline.measured(Seconds(total.0 / f64::from(runs)), Some(load_seconds), Bytes::ZERO);
    measured.pool_peak_bytes = Some(pool.peak().max(planned));
    let read = source.bytes_read();
    let receipt = usage::Account {
        command: "bench",
        model: ModelSource::File(arguments.model.clone()).identity(arguments.receipt.receipt.is_some())?,
        profile: &profile,
        isa: Isa::best().name().to_owned(),
        threads,
        memory: resources.memory,
        planned,
        fixed_assumed,
        predicted_seconds: None,
        measured,
        bytes_read_by_tier: match read {
            Bytes::ZERO => BTreeMap::new(),
            read => BTreeMap::from([(Tier::Ssd.name().to_owned(), read)]),
        },
        energy,
        plan: plan_summary(model.plan()),
        outputs: Vec::new(),
    }
    .settle();
    if let Some(path) = &arguments.receipt.receipt {
        receipt.save(path)?;
    }
    let experts = model.session().experts().zip(before).map(|(store, before)| {
        let stats = store.stats().since(&before);
        Experts { slots: store.slots(), chunks: store.catalog().len(), hit_rate: stats.hit_rate(), stats }
    });
    let answered = tokens.len().max(1) as f64;
    let report = LanguageBenchReport {
        schema: "lightering.bench-language/1",
        prompt_tokens: prompt_len,
        tokens: count,
        prompt_tokens_per_second: prompt_rate,
        tokens_per_second: answer_rate,
        first_token_seconds: rounds.iter().map(|r| r.prompt.seconds).collect(),
        first_token: Percentiles::of(rounds.iter().map(|r| r.prompt.seconds).collect()),
        token_histogram: histogram(&times),
        token_seconds: Percentiles::of(times),
        memory: memory_classes(&model, held),
        sustained,
        stall_share: all.stall.0 / all.seconds.0.max(1e-9),
        bytes_read_per_token: all.bytes_read.0 as f64 / answered,
        bytes_read_per_prompt: rounds.iter().map(|r| r.prompt.bytes_read.0 as f64).sum::<f64>()
            / f64::from(runs),
        weight_bytes_per_token: model.weight_bytes_per_token(),
        experts,
        profile: node_times(&model, &decode_times, tokens.len()),
        receipt,
    };
    if let Some(path) = &arguments.report {
        let name = arguments.model.file_name().map(|name| name.to_string_lossy().into_owned());
        let page = report::html(&report, &name.unwrap_or_default());
        std::fs::write(path, page).with_context(|| format!("writing {}", path.display()))?;
    }
    output.result(&report, &text(&report, arguments.profile))?;
    usage::check_budget(&report.receipt)?;
    Ok(Exit::Done)
}

/// Answers for so long behind the prompt that is in the cache.
fn sustained_run(
    model: &mut LanguageModel,
    prompt_len: usize,
    count: usize,
    seconds: f64,
    output: Output,
) -> Outcome<Sustained> {
    let progress = output.progress(1);
    progress.set_message(format!("running for {seconds} s"));
    let mut next = 0u32;
    let result = sustained::run(model, prompt_len, count, seconds, |model, sole, position| {
        let row = sole.row(next, position, true);
        model.step(&[row], &mut |_, logits| {
            let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
            next = best.map_or(0, |(i, _)| i as u32);
        })?;
        Ok(())
    });
    progress.finish_and_clear();
    result
}

/// The prompt: the beginning of a text, or tokens at random.
fn prompt(arguments: &BenchArguments, file: &LanguageFile, len: usize) -> Outcome<Vec<u32>> {
    let Some(path) = &arguments.text else {
        let mut scramble = Scramble::new(1);
        let vocabulary = file.parameters().vocabulary as u64;
        return Ok((0..len).map(|_| (scramble.next() % vocabulary) as u32).collect());
    };
    let text = read_text(Some(path), MAX_TEXT_BYTES as u64)?;
    let mut tokens = file.tokenizer.encode(&text, true, false)?;
    if tokens.len() < len {
        return Err(Failure::input(
            format!("{} has {} tokens, fewer than the {len} of the prompt", path.display(), tokens.len()),
            format!("--prompt-tokens {}", tokens.len()),
        ));
    }
    tokens.truncate(len);
    Ok(tokens)
}

fn node_times(model: &LanguageModel, seconds: &[f64], count: usize) -> Vec<NodeTime> {
    if seconds.iter().all(|&s| s == 0.0) {
        return Vec::new();
    }
    let time = |(i, s): (&lightering_engine::PlannedInstruction, &f64)| {
        let mean = Seconds(s / count.max(1) as f64);
        NodeTime {
            name: i.name.clone(),
            op: i.op.clone(),
            kernel: i.kernel.clone(),
            flops: i.flops,
            bytes: i.bytes,
            predicted: i.seconds,
            count: count as u64,
            total: Seconds(*s),
            min: mean,
            max: mean,
        }
    };
    model.plan().instructions.iter().zip(seconds).map(time).collect()
}

fn text(report: &LanguageBenchReport, profile: bool) -> String {
    let mut text = String::new();
    let t = &report.token_seconds;
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "prompt  {:8.1} tokens/s ({} tokens, first token after {})",
        report.prompt_tokens_per_second, report.prompt_tokens, report.first_token_seconds[0]
    );
    let _ = writeln!(
        text,
        "answer  {:8.1} tokens/s ({} tokens; a token takes {}, 90th percentile {}, 99th {})",
        report.tokens_per_second, report.tokens, t.p50, t.p90, t.p99
    );
    let _ = writeln!(
        text,
        "weights {:>8} pass by for each token, {:.1} GB/s; {} are read from the file; {:.1} % of the time is waiting",
        report.weight_bytes_per_token.to_string(),
        report.weight_bytes_per_token.0 as f64 * report.tokens_per_second / 1e9,
        Bytes(report.bytes_read_per_token as u64),
        report.stall_share * 100.0
    );
    if let Some(e) = &report.experts {
        let rate = e.stats.stalled_rate().map_or(String::new(), |r| format!(", {r} while waiting"));
        let _ = writeln!(
            text,
            "experts {} of {} have a place, {:.1} % of those asked for were there{rate}",
            e.slots,
            e.chunks,
            e.hit_rate * 100.0
        );
    }
    if let Some(s) = &report.sustained {
        let _ = writeln!(
            text,
            "lasting {:+.1} % a minute over {:.0} s in {} windows; the last third {:.1} % slower than the first: {}",
            s.slope_per_minute * 100.0,
            s.windows.last().map_or(0.0, |w| w.at_seconds),
            s.windows.len(),
            s.slowdown * 100.0,
            s.verdict.text()
        );
    }
    text.push('\n');
    if profile {
        text.push_str(&profile_table(&report.profile));
        text.push('\n');
    }
    text.push_str(&usage::summary(&report.receipt));
    text
}
