//! `lighter serve`

use crate::arguments::ServeArguments;
use crate::failure::{Exit, Failure, Outcome};
use crate::language::LanguageFile;
use crate::model::{Means, load_profile};
use crate::output::Output;
use crate::text_input::read_text;
use crate::usage::Baseline;
use anyhow::Context;
use lightering_lm::{
    ChatTemplate, Scheduler, SchedulerOptions, SpillFile, SpillStore, SpillWarning, TokenModel,
};
use lightering_meter::MemoryPool;
use lightering_server::{Server, ServerOptions};
use lightering_units::Bytes;
use serde::Serialize;
use std::io::{self, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

/// The part of a budget that bodies of requests may take together, and the bounds of that.
const BODIES_SHARE: u64 = 128;
const BODIES_MIN: Bytes = Bytes::mib(1);
const BODIES_MAX: Bytes = Bytes::mib(64);
/// A body, the values that are read from it and the prompt that is made of them.
const COPIES_OF_A_BODY: u64 = 3;
/// What connections, threads and events that wait for their receivers take.
const CONNECTIONS_BYTES: Bytes = Bytes::mib(12);

/// The longest file of keys.
const KEYS_BYTES_MAX: u64 = 1 << 20;

/// `--json`, once the server listens.
#[derive(Debug, Serialize)]
struct ServeReport {
    schema: &'static str,
    url: String,
    model: String,
    context: usize,
    parallel: u32,
    planned_bytes: Bytes,
    memory: Option<Bytes>,
    keys: usize,
}

/// Serves until a signal comes.
pub fn run(arguments: &ServeArguments, output: Output) -> Outcome {
    let baseline = Baseline::now();
    let resources = &arguments.resources;
    let keys = keys(arguments)?;
    // A port that is taken is known before anything is loaded.
    let (host, port) = (arguments.host.as_str(), arguments.port);
    let listener =
        TcpListener::bind((host, port)).with_context(|| format!("listening on {host}, port {port}"));
    let listener = listener.map_err(|e| Failure::from(e).or_hint("another --host or --port"))?;
    let address = listener.local_addr()?;
    let profile = load_profile(resources.machine.as_deref())?;
    let pool = MemoryPool::new(resources.memory);
    let mut serving = ServerOptions::named(name(arguments));
    serving.api_keys = keys;
    serving.drain_limit = Duration::from_secs(arguments.drain);
    serving.bodies_bytes_max = resources
        .memory
        .map_or(BODIES_MAX, |memory| Bytes(memory.0 / BODIES_SHARE).clamp(BODIES_MIN, BODIES_MAX));
    serving.body_bytes_max = serving.body_bytes_max.min(serving.bodies_bytes_max);
    let room = serving.bodies_bytes_max * COPIES_OF_A_BODY + CONNECTIONS_BYTES;
    let _room = pool.reserve("requests of the server", room)?;

    let progress = output.progress(1);
    progress.set_message("reading the model");
    let (parallel, draft) = (arguments.parallel as usize, arguments.draft as usize);
    let file = LanguageFile::open(&arguments.model, &resources.decoder, resources.memory, parallel, draft)?;
    let spill = spill(arguments, &file, output)?;
    let memory = if spill.is_some() { SpillFile::memory_for(file.page_bytes()) } else { Bytes::ZERO };
    let _staging = pool.reserve("a page of the cache on its way to its file", memory)?;
    progress.set_message("planning and loading");
    let threads = resources.threads.unwrap_or_else(lightering_meter::host::cores);
    let means = Means { threads, profile: &profile, pool: &pool, baseline: &baseline };
    let language = file.start(means, false)?;
    progress.finish_and_clear();

    let context = language.model.context_len();
    let planned = language.model.plan().predicted_peak + language.held;
    let template = ChatTemplate::from_gguf(&language.metadata, &language.tokenizer)?;
    let mut scheduling = SchedulerOptions::default();
    scheduling.sequences_max = parallel;
    scheduling.queue_max = arguments.queue as usize;
    scheduling.draft_len_max = draft;
    let model = Box::new(language.model);
    let scheduler = Scheduler::start_with_spill(model, language.tokenizer, scheduling, spill)?;
    serving.memory_budget = resources.memory;
    serving.memory_used = Some(Arc::new(move || baseline.anonymous_since()));
    let report = ServeReport {
        schema: "lightering.serve/1",
        url: format!("http://{address}"),
        model: serving.model_id.clone(),
        context,
        parallel: arguments.parallel,
        planned_bytes: planned,
        memory: resources.memory,
        keys: serving.api_keys.len(),
    };
    if !address.ip().is_loopback() && report.keys == 0 && !output.quiet {
        // A note that cannot be written is no reason to stop.
        let _ = writeln!(
            io::stderr(),
            "note: anybody who reaches {address} can use this server; --api-key asks for a key"
        );
    }
    let text = format!(
        "{} for {} conversations of {context} tokens in {planned}\n\
         interface  {url}/v1\n\
         dashboard  {url}/\n",
        report.model,
        report.parallel,
        url = report.url,
    );
    output.result(&report, &text)?;
    let server = Server::new(scheduler, template, serving);
    let drained = server.run(listener).map_err(|error| Failure::from(anyhow::Error::new(error)))?;
    if !output.quiet {
        let cut = drained.connections_cut;
        let _ = match cut {
            0 => writeln!(io::stderr(), "all answers are out"),
            _ => writeln!(io::stderr(), "{cut} connections were cut off after {} s", arguments.drain),
        };
    }
    Ok(Exit::Done)
}

/// Where pages of the cache go that have to make room.
fn spill(
    arguments: &ServeArguments,
    file: &LanguageFile,
    output: Output,
) -> Outcome<Option<(Box<dyn SpillStore>, SpillWarning)>> {
    let folder = &arguments.kv_spill;
    if folder.as_os_str() == "off" {
        return Ok(None);
    }
    let store = SpillFile::create(folder, arguments.kv_spill_size, file.page_bytes())
        .map_err(|e| Failure::from(e).or_hint("another folder for --kv-spill, or another --kv-spill-size"))?;
    let warning = SpillWarning::new(move |warning| {
        if !output.quiet {
            // A warning that cannot be written is no reason to stop.
            let _ = writeln!(io::stderr(), "warning: {warning}");
        }
    });
    Ok(Some((Box::new(store), warning)))
}

/// The keys from the command line, from a file and, without those, from the environment.
fn keys(arguments: &ServeArguments) -> Outcome<Vec<String>> {
    let mut keys = arguments.api_key.clone();
    if let Some(path) = &arguments.api_key_file {
        let text = read_text(Some(path), KEYS_BYTES_MAX)?;
        keys.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned));
        if keys.is_empty() {
            let place = path.display();
            return Err(Failure::input(
                format!("{place}: no keys; expected one a line"),
                "a file with a key",
            ));
        }
    }
    if keys.is_empty()
        && let Ok(key) = std::env::var("LIGHTER_API_KEY")
        && !key.trim().is_empty()
    {
        keys.push(key.trim().to_owned());
    }
    Ok(keys)
}

fn name(arguments: &ServeArguments) -> String {
    let from_file = || arguments.model.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    arguments.name.clone().or_else(from_file).unwrap_or_else(|| "model".to_owned())
}
