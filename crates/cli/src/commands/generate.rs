//! `lighter generate`

use crate::arguments::GenerateArguments;
use crate::failure::{Exit, Failure, Outcome};
use crate::language::{Language, LanguageFile};
use crate::model::{Means, ModelSource, load_profile, plan_summary};
use crate::output::Output;
use crate::text_input::read_text;
use crate::usage::{self, Baseline};
use lightering_kernels::Isa;
use lightering_lm::{
    ChatTemplate, Conversation, Done, Error as LmError, Event, FinishReason, GenerationRequest, Grammar,
    Json, MAX_TEXT_BYTES, Message, Scheduler, SchedulerOptions, TokenModel, Tokenizer, Usage,
};
use lightering_meter::{EnergyMeter, MemoryPool, Receipt, Stopwatch, Tier};
use lightering_units::{Bytes, Seconds};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

/// The longest grammar or schema that is read.
const GRAMMAR_BYTES_MAX: u64 = 1 << 20;

/// `--json`
#[derive(Debug, Serialize)]
struct GenerateReport<'a> {
    schema: &'static str,
    text: String,
    tokens: &'a [Told],
    finish_reason: String,
    usage: Usage,
    prompt_tokens_per_second: Option<f64>,
    tokens_per_second: Option<f64>,
    first_token: Option<Seconds>,
    drafted_tokens: usize,
    accepted_tokens: usize,
    receipt: &'a Receipt,
}

/// A token of the answer.
#[derive(Debug, Serialize)]
struct Told {
    id: u32,
    text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    log_probability: Option<f32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    top: Vec<(u32, f32)>,
}

/// Continues a text.
pub fn run(arguments: &GenerateArguments, output: Output) -> Outcome {
    let baseline = Baseline::now();
    let resources = &arguments.resources;
    let profile = load_profile(resources.machine.as_deref())?;
    let pool = MemoryPool::new(resources.memory);
    let progress = output.progress(1);
    let load = Stopwatch::start();
    progress.set_message("reading the model");
    let file =
        LanguageFile::open(&arguments.model, &resources.decoder, resources.memory, 1, arguments.draft)?;
    let constraint = constraint(arguments)?;
    let prompt = prompt(arguments, &file)?;
    progress.set_message("planning and loading");
    let threads = resources.threads.unwrap_or_else(lightering_meter::host::cores);
    let means = Means { threads, profile: &profile, pool: &pool, baseline: &baseline };
    let language = file.start(means, false)?;
    let load_seconds = load.elapsed();
    progress.finish_and_clear();

    let Language { model, tokenizer, source, held, .. } = language;
    let planned = model.plan().predicted_peak + held;
    let predicted = model.plan().predicted_seconds;
    let summary = plan_summary(model.plan());
    let context = model.context_len();
    let fixed_assumed = baseline.fixed_cost_assumed(&profile, Bytes::ZERO);
    let energy = EnergyMeter::start(arguments.receipt.energy_model.map(super::run::energy_model));
    let watch = Stopwatch::start();
    let mut options = SchedulerOptions::default();
    options.sequences_max = 1;
    options.draft_len_max = arguments.draft;
    let scheduler = Scheduler::start(Box::new(model), tokenizer, options)?;
    let request = GenerationRequest {
        prompt,
        max_tokens: arguments.tokens,
        sampler: (&arguments.sampler).into(),
        stop: arguments.stop.clone(),
        constraint,
        logprobs: arguments.logprobs.map(usize::from),
        prompt_logprobs: None,
        ignore_end: arguments.ignore_end,
        draft_len_max: None,
    };
    let mut events = scheduler.generate(request).map_err(|error| match &error {
        LmError::TooLong { .. } => {
            let hint = format!("--context, which is {context}, or a shorter prompt");
            Failure::from(error).context("the prompt").or_hint(hint)
        }
        _ => error.into(),
    })?;
    let mut told = Vec::new();
    let mut text = String::new();
    let mut say = |piece: &str| -> Outcome<()> {
        text.push_str(piece);
        if !output.json {
            let mut out = io::stdout().lock();
            out.write_all(piece.as_bytes())?;
            out.flush()?;
        }
        Ok(())
    };
    let mut done: Option<Box<Done>> = None;
    while let Some(event) = events.recv() {
        match event {
            Event::Token(token) => {
                say(&token.text)?;
                let top = token.top.iter().map(|t| (t.token, t.log_probability)).collect();
                told.push(Told {
                    id: token.id,
                    text: token.text,
                    log_probability: token.log_probability,
                    top,
                });
            }
            Event::Done(end) => {
                say(&end.text)?;
                done = Some(end);
            }
            _ => {}
        }
    }
    let done = done.ok_or_else(|| anyhow::anyhow!("the answer ended without saying why"))?;
    if !output.json {
        say("\n")?;
    }
    let reason = match &done.reason {
        FinishReason::Error(problem) => return Err(Failure::new(Exit::Input, anyhow::anyhow!("{problem}"))),
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        _ => "cancelled",
    };
    let seconds = watch.elapsed();
    let energy = energy.finish();
    let mut measured = baseline.measured(seconds, Some(load_seconds), Bytes::ZERO);
    measured.pool_peak_bytes = Some(pool.peak().max(planned));
    let read = source.bytes_read();
    let by_tier = match read {
        Bytes::ZERO => BTreeMap::new(),
        read => BTreeMap::from([(Tier::Ssd.name().to_owned(), read)]),
    };
    let model_source = ModelSource::File(arguments.model.clone());
    let receipt = usage::Account {
        command: "generate",
        model: model_source.identity(arguments.receipt.receipt.is_some())?,
        profile: &profile,
        isa: Isa::best().name().to_owned(),
        threads,
        memory: resources.memory,
        planned,
        fixed_assumed,
        predicted_seconds: Some(predicted),
        measured,
        bytes_read_by_tier: by_tier,
        energy,
        plan: summary,
        outputs: Vec::new(),
    }
    .settle();
    if let Some(path) = &arguments.receipt.receipt {
        receipt.save(path)?;
    }
    let timings = done.timings;
    let computed = done.usage.prompt_tokens - done.usage.cached_tokens;
    let first = timings.first_token.map(|t| t - timings.queue);
    let report = GenerateReport {
        schema: "lightering.generate/1",
        text,
        tokens: &told,
        finish_reason: reason.to_owned(),
        usage: done.usage,
        prompt_tokens_per_second: first.map(|t| computed as f64 / t.0.max(1e-9)),
        tokens_per_second: timings.inter_token_mean.map(|t| 1.0 / t.0.max(1e-9)),
        first_token: timings.first_token,
        drafted_tokens: timings.drafted_tokens,
        accepted_tokens: timings.accepted_tokens,
        receipt: &receipt,
    };
    if output.json {
        output.result(&report, "")?;
    } else if !output.quiet {
        // Nothing depends on this note, so that it does not matter where stderr goes.
        let _ = writeln!(io::stderr(), "\n{}{}", rates(&report), usage::summary(&receipt));
    }
    drop(scheduler);
    usage::check_budget(&receipt)?;
    Ok(Exit::Done)
}

fn rates(report: &GenerateReport<'_>) -> String {
    let rate = |r: Option<f64>| r.map_or("-".to_owned(), |r| format!("{r:.1} tokens/s"));
    let usage = report.usage;
    let mut text = format!(
        "prompt            {} tokens, {}\nanswer            {} tokens, {}\n",
        usage.prompt_tokens,
        rate(report.prompt_tokens_per_second),
        usage.generated_tokens,
        rate(report.tokens_per_second)
    );
    if report.drafted_tokens > 0 {
        let (drafted, accepted) = (report.drafted_tokens, report.accepted_tokens);
        text.push_str(&format!("drafts            {accepted} of {drafted} were right\n"));
    }
    text
}

/// What the answer has to look like.
fn constraint(arguments: &GenerateArguments) -> Outcome<Option<Grammar>> {
    let explained =
        |path: &Path, error: lightering_lm::Error| Failure::from(error).context(path.display().to_string());
    if let Some(path) = &arguments.json_schema {
        let text = read_text(Some(path), GRAMMAR_BYTES_MAX)?;
        let schema: Json = serde_json::from_str(&text)
            .map_err(|e| Failure::input(format!("{}: {e}", path.display()), "a JSON schema"))?;
        return Grammar::from_json_schema(&schema).map(Some).map_err(|e| explained(path, e));
    }
    if let Some(path) = &arguments.grammar {
        let text = read_text(Some(path), GRAMMAR_BYTES_MAX)?;
        return Grammar::from_gbnf(&text).map(Some).map_err(|e| explained(path, e));
    }
    match &arguments.regex {
        Some(pattern) => Ok(Some(Grammar::from_regex(pattern)?)),
        None => Ok(None),
    }
}

fn prompt(arguments: &GenerateArguments, file: &LanguageFile) -> Outcome<Vec<u32>> {
    let text = match (&arguments.prompt, &arguments.file) {
        (Some(text), _) => text.clone(),
        (None, file) => read_text(file.as_deref(), MAX_TEXT_BYTES as u64)?,
    };
    if !arguments.chat {
        return file
            .tokenizer
            .encode(&text, true, false)
            .map_err(|e| Failure::from(e).context("tokenizing the prompt"));
    }
    let template = ChatTemplate::from_gguf(&file.metadata, &file.tokenizer)?;
    encode_conversation(&template, &file.tokenizer, &[Message::new("user", &text)])
}

/// A conversation in tokens, up to where the answer begins.
pub fn encode_conversation(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    messages: &[Message],
) -> Outcome<Vec<u32>> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).ok();
    let conversation = Conversation {
        messages,
        add_generation_prompt: true,
        guard: Some(tokenizer),
        now_unix_seconds: now.and_then(|now| i64::try_from(now.as_secs()).ok()),
        ..Conversation::default()
    };
    let rendered = template.render(&conversation)?;
    Ok(tokenizer.encode_rendered(&rendered)?)
}
