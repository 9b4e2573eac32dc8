//! `lighter chat`

use super::generate::encode_conversation;
use crate::arguments::ChatArguments;
use crate::failure::{Exit, Failure, Outcome};
use crate::language::{Language, LanguageFile};
use crate::model::{Means, load_profile};
use crate::output::Output;
use crate::usage::Baseline;
use lightering_lm::{
    ChatTemplate, Event, FinishReason, GenerationRequest, Message, Scheduler, SchedulerOptions,
};
use lightering_meter::MemoryPool;
use std::io::{self, BufRead, IsTerminal, Write};

/// Most bytes of one message that are read from stdin.
const MESSAGE_BYTES_MAX: u64 = 1 << 20;

const HELP: &str = "Type a message and press Enter. /new begins a new conversation, /exit or Ctrl-D ends.";

/// Talks until stdin ends.
pub fn run(arguments: &ChatArguments, output: Output) -> Outcome {
    let baseline = Baseline::now();
    let resources = &arguments.resources;
    let profile = load_profile(resources.machine.as_deref())?;
    let pool = MemoryPool::new(resources.memory);
    let progress = output.progress(1);
    progress.set_message("reading the model");
    let file = LanguageFile::open(&arguments.model, &resources.decoder, resources.memory, 1, 0)?;
    progress.set_message("planning and loading");
    let threads = resources.threads.unwrap_or_else(lightering_meter::host::cores);
    let means = Means { threads, profile: &profile, pool: &pool, baseline: &baseline };
    let Language { model, tokenizer, metadata, .. } = file.start(means, false)?;
    progress.finish_and_clear();
    let template = ChatTemplate::from_gguf(&metadata, &tokenizer)?;
    let mut options = SchedulerOptions::default();
    options.sequences_max = 1;
    let scheduler = Scheduler::start(Box::new(model), tokenizer.clone(), options)?;
    let first: Vec<Message> = arguments.system.iter().map(|text| Message::new("system", text)).collect();
    let mut messages = first.clone();
    let terminal = io::stdin().is_terminal() && !output.quiet;
    if terminal {
        eprintln!("{HELP}");
    }
    let mut input = io::stdin().lock();
    loop {
        if terminal {
            eprint!("> ");
            io::stderr().flush()?;
        }
        let mut line = String::new();
        if io::Read::take(&mut input, MESSAGE_BYTES_MAX).read_line(&mut line)? == 0 {
            return Ok(Exit::Done);
        }
        match line.trim() {
            "" => continue,
            "/exit" => return Ok(Exit::Done),
            "/new" => {
                messages.clone_from(&first);
                continue;
            }
            text => messages.push(Message::new("user", text)),
        }
        let prompt = encode_conversation(&template, &tokenizer, &messages)?;
        let request = GenerationRequest {
            prompt,
            max_tokens: arguments.tokens,
            sampler: (&arguments.sampler).into(),
            ..GenerationRequest::default()
        };
        let hint = "/new, which begins a new conversation, or a larger --context";
        let mut events = scheduler.generate(request).map_err(|e| Failure::from(e).or_hint(hint))?;
        let mut answer = String::new();
        let mut out = io::stdout().lock();
        while let Some(event) = events.recv() {
            let piece = match event {
                Event::Token(token) => token.text,
                Event::Done(done) => {
                    if let FinishReason::Error(problem) = done.reason {
                        return Err(Failure::new(Exit::Input, anyhow::anyhow!("{problem}")));
                    }
                    done.text
                }
                _ => continue,
            };
            out.write_all(piece.as_bytes())?;
            out.flush()?;
            answer.push_str(&piece);
        }
        out.write_all(b"\n")?;
        messages.push(Message::new("assistant", answer.trim()));
    }
}
