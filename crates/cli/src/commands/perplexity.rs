//! `lighter perplexity`

use crate::arguments::PerplexityArguments;
use crate::failure::{Exit, Failure, Outcome};
use crate::language::{Language, LanguageFile};
use crate::model::{Means, load_profile};
use crate::output::Output;
use crate::text_input::read_text;
use crate::usage::Baseline;
use lightering_lm::{MAX_TEXT_BYTES, Row, SoleSequence, TokenModel, log_probability};
use lightering_meter::{MemoryPool, Stopwatch};
use lightering_units::{Bytes, Seconds};
use serde::Serialize;

/// Rows whose logits are computed in one step: logits of large vocabularies take megabytes each.
const WANTED: usize = 32;

/// `--json`
#[derive(Debug, Serialize)]
struct PerplexityReport {
    schema: &'static str,
    perplexity: f64,
    /// Standard error of the mean of the logarithm, times the perplexity.
    uncertainty: f64,
    /// Mean negative log-probability of a token, natural logarithm.
    loss: f64,
    tokens: usize,
    windows: usize,
    window: usize,
    seconds: Seconds,
    memory: Option<Bytes>,
}

/// Tells how well a model foresees a text: in windows of `window` tokens, each begun as a text of its own, the second
/// half of each is judged, so that every judged token has at least half a window before it.
pub fn run(arguments: &PerplexityArguments, output: Output) -> Outcome {
    let baseline = Baseline::now();
    let resources = &arguments.resources;
    let profile = load_profile(resources.machine.as_deref())?;
    let pool = MemoryPool::new(resources.memory);
    let window = arguments.window as usize;
    let mut decoder = resources.decoder.clone();
    decoder.context.get_or_insert(arguments.window);
    if decoder.context.is_some_and(|c| (c as usize) < window) {
        return Err(Failure::input("--window is longer than --context", format!("--context {window}")));
    }
    let file = LanguageFile::open_for_logits(&arguments.model, &decoder, resources.memory, WANTED)?;
    let text = read_text(Some(&arguments.file), MAX_TEXT_BYTES as u64)?;
    let tokens = file.tokenizer.encode(&text, true, false)?;
    let (begin, adds) = (file.tokenizer.bos(), file.tokenizer.adds_bos());
    let threads = resources.threads.unwrap_or_else(lightering_meter::host::cores);
    let means = Means { threads, profile: &profile, pool: &pool, baseline: &baseline };
    let Language { mut model, .. } = file.start(means, false)?;
    let windows = (tokens.len() / window).min(arguments.windows.unwrap_or(usize::MAX));
    if windows == 0 {
        return Err(Failure::input(
            format!(
                "{} has {} tokens, less than one window of {window}",
                arguments.file.display(),
                tokens.len()
            ),
            "a longer text, or a smaller --window",
        ));
    }
    let progress = output.progress(windows as u64);
    let watch = Stopwatch::start();
    let sole = SoleSequence::of(&model);
    let judged = window / 2;
    let mut losses: Vec<f64> = Vec::with_capacity(windows * (window - judged));
    for chunk in tokens.chunks_exact(window).take(windows) {
        let mut chunk = chunk.to_vec();
        if let Some(begin) = begin.filter(|_| adds) {
            chunk[0] = begin;
        }
        let mut at = 0;
        while at < window {
            // Rows that are judged come in smaller steps.
            let most = if at < judged { (judged - at).min(model.rows_max()) } else { WANTED };
            let end = window.min(at + most.min(model.rows_max()));
            let rows: Vec<Row<'_>> =
                (at..end).map(|i| sole.row(chunk[i], i, i >= judged && i + 1 < window)).collect();
            let mut failed = None;
            model.step(&rows, &mut |row, logits| match log_probability(logits, chunk[at + row + 1]) {
                Ok(p) => losses.push(-f64::from(p)),
                Err(error) => failed = Some(error),
            })?;
            if let Some(error) = failed {
                return Err(error.into());
            }
            at = end;
        }
        progress.inc(1);
    }
    progress.finish_and_clear();
    let n = losses.len() as f64;
    let loss = losses.iter().sum::<f64>() / n;
    let variance = losses.iter().map(|l| (l - loss).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    let perplexity = loss.exp();
    let report = PerplexityReport {
        schema: "lightering.perplexity/1",
        perplexity,
        uncertainty: perplexity * (variance / n).sqrt(),
        loss,
        tokens: losses.len(),
        windows,
        window,
        seconds: watch.elapsed(),
        memory: resources.memory,
    };
    let text = format!(
        "perplexity {:.4} ± {:.4} ({} tokens judged in {} windows of {}, {})\n",
        report.perplexity, report.uncertainty, report.tokens, windows, window, report.seconds
    );
    output.result(&report, &text)?;
    Ok(Exit::Done)
}
