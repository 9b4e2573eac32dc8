//! The one place where the command line opens a language model inside a budget.

use crate::arguments::{CacheFormatName, DecoderArguments, ExpertArguments};
use crate::container::{Container, open_gguf};
use crate::failure::{Exit, Failure, Outcome};
use crate::model::{Means, held_beside, planned, within_budget};
use lightering_engine::{ExpertOptions, OpenTrace, Plan};
use lightering_formats::gguf::{GgufFile, Metadata};
use lightering_graph::CacheFormat;
use lightering_lm::{
    CacheOptions, Decoder, DecoderOptions, HyperParameters, LanguageModel, Tokenizer, WindowCache,
};
use lightering_meter::Reservation;
use lightering_tier::ByteSource;
use lightering_units::Bytes;
use std::path::Path;
use std::sync::Arc;

/// Most positions of a sequence for which room is made when nobody asks for more.
const CONTEXT_DEFAULT: usize = 4096;
/// Positions of a page of the cache.
const PAGE_LEN: usize = 32;
/// What choosing a token takes for each token of the vocabulary: a copy of the logits, and candidates with theirs.
const SAMPLING_BYTES_PER_TOKEN: u64 = 20;

/// What a tokenizer takes at least for each of its tokens, as measured on vocabularies of 150,000 and 260,000.
const TOKENIZER_BYTES_PER_TOKEN: u64 = 280;

/// Tokenizers below this size are built before the smallest budget is told exactly.
const LARGE_TOKENIZER: Bytes = Bytes::mib(16);

/// What threads that read and schedule, their queues and the events of an answer take.
const SERVING_BYTES: Bytes = Bytes::kib(256);

/// A language model that was read and not yet planned.
pub struct LanguageFile {
    decoder: Decoder,
    experts: ExpertOptions,
    source: Arc<dyn ByteSource>,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// What its file says.
    pub metadata: Metadata,
    /// Sequences side by side.
    parallel: usize,
}

/// A language model that is planned, loaded and ready.
pub struct Language {
    /// The model.
    pub model: LanguageModel,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// What its file says.
    pub metadata: Metadata,
    /// Where its weights are.
    pub source: Arc<dyn ByteSource>,
    /// What is held beside the plan.
    pub held: Bytes,
    _held: Reservation,
}

fn cache_format(name: CacheFormatName) -> CacheFormat {
    match name {
        CacheFormatName::F32 => CacheFormat::F32,
        CacheFormatName::F16 => CacheFormat::F16,
        CacheFormatName::Q8 => CacheFormat::Q8,
    }
}

/// How experts are kept and fetched, with the files that the flags name.
fn expert_options(arguments: &ExpertArguments) -> Outcome<ExpertOptions> {
    let recorded = match &arguments.recorded {
        None => None,
        Some(path) => Some(Arc::new(crate::commands::tier::read_trace(path)?)),
    };
    let trace = arguments.chunk_trace.clone().map(|path| -> OpenTrace {
        Arc::new(move || {
            let file = std::fs::File::create(&path)
                .map_err(|e| std::io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
            Ok(Box::new(std::io::BufWriter::new(file)))
        })
    });
    Ok(ExpertOptions {
        eviction: arguments.eviction.clone(),
        prefetch: arguments.prefetch.clone(),
        admission: arguments.admission.clone(),
        io_threads: arguments.reads as usize,
        trace,
        recorded,
    })
}

/// What is needed of the metadata once there is a tokenizer: the chat template. The lists of tokens are large.
fn what_is_left(metadata: &Metadata) -> Metadata {
    let mut left = Metadata::default();
    for (key, value) in metadata.iter().filter(|(key, _)| key.starts_with("tokenizer.chat_template")) {
        left.set(key, value.clone());
    }
    left
}

/// A tokenizer of large vocabularies takes more than reading the file did. Where a budget cannot hold it, that is told
/// before a control group of that size would end the process.
fn refuse_before_tokenizer(file: &GgufFile, memory: Option<Bytes>) -> Outcome<()> {
    let tokens = file.metadata.get_strings("tokenizer.ggml.tokens")?.map_or(0, <[String]>::len);
    let least = Bytes(tokens as u64 * TOKENIZER_BYTES_PER_TOKEN);
    match memory {
        Some(memory) if memory < least && least > LARGE_TOKENIZER => Err(Failure {
            hint: Some(format!(
                "--memory {}MiB or more; how much more, the next refusal tells exactly",
                least.0.div_ceil(1 << 20)
            )),
            ..Failure::new(
                Exit::Budget,
                anyhow::anyhow!(
                    "no plan fits into {memory}: the tokenizer of {tokens} tokens alone takes about {least}"
                ),
            )
        }),
        _ => Ok(()),
    }
}

impl LanguageFile {
    /// Reads everything but the weights, for `parallel` sequences side by side that each guess `drafts` tokens ahead.
    pub fn open(
        path: &Path,
        arguments: &DecoderArguments,
        memory: Option<Bytes>,
        parallel: usize,
        drafts: usize,
    ) -> Outcome<LanguageFile> {
        // A guess is checked by the logits of its own row.
        Self::read(path, arguments, memory, parallel, parallel * (1 + drafts))
    }

    /// The same for one sequence, with the logits of `wanted` rows in each step.
    pub fn open_for_logits(
        path: &Path,
        arguments: &DecoderArguments,
        memory: Option<Bytes>,
        wanted: usize,
    ) -> Outcome<LanguageFile> {
        Self::read(path, arguments, memory, 1, wanted)
    }

    fn read(
        path: &Path,
        arguments: &DecoderArguments,
        memory: Option<Bytes>,
        parallel: usize,
        wanted: usize,
    ) -> Outcome<LanguageFile> {
        let place = path.display();
        if path.is_file() && Container::of(path) != Container::Gguf {
            return Err(Failure::input(
                format!("{place}: is no GGUF file; expected a language model (.gguf)"),
                format!("lighter inspect {place}, which tells what it is"),
            ));
        }
        let (file, source) = open_gguf(path)?;
        refuse_before_tokenizer(&file, memory)?;
        let hint = format!("lighter inspect {place}, which lists what the file says about it");
        let explained = |what: &str, error: lightering_lm::Error| {
            Failure::from(error).context(format!("{place}: {what}")).or_hint(hint.clone())
        };
        let tokenizer =
            Tokenizer::from_gguf(&file.metadata).map_err(|e| explained("preparing its tokenizer", e))?;
        let parameters = HyperParameters::of(&file).map_err(|e| explained("reading its sizes", e))?;
        let context = arguments.context.map_or(parameters.context.min(CONTEXT_DEFAULT), |c| c as usize);
        let rows = (arguments.step_tokens as usize).max(wanted);
        let all = context.div_ceil(PAGE_LEN) * parallel;
        let pages = arguments.cache_tokens.map_or(all, |tokens| (tokens as usize).div_ceil(PAGE_LEN));
        // Layers with a window let go of what no later token sees, where that saves anything.
        let window_pages = parameters
            .cached_window()
            .map(|window| WindowCache::pages_for(window, PAGE_LEN, parallel, rows))
            .filter(|&window_pages| window_pages < pages)
            .unwrap_or(0);
        let cache = CacheOptions {
            format: cache_format(arguments.cache),
            page_len: PAGE_LEN,
            pages,
            window_pages,
            context,
        };
        let options = DecoderOptions { cache, rows, wanted };
        let decoder =
            Decoder::new(&file, source.clone(), options).map_err(|e| explained("building its layers", e))?;
        let experts = expert_options(&arguments.experts)?;
        Ok(LanguageFile {
            decoder,
            experts,
            source,
            tokenizer: Arc::new(tokenizer),
            metadata: what_is_left(&file.metadata),
            parallel,
        })
    }

    /// Bytes of a page of its cache.
    pub fn page_bytes(&self) -> usize {
        self.decoder.page_bytes()
    }

    /// Its sizes.
    pub fn parameters(&self) -> &HyperParameters {
        self.decoder.parameters()
    }

    fn held(&self, means: Means<'_>) -> Bytes {
        let sampling = self.parameters().vocabulary as u64 * SAMPLING_BYTES_PER_TOKEN;
        held_beside(means, Bytes::ZERO) + Bytes(sampling * self.parallel as u64) + SERVING_BYTES
    }

    /// Plans without allocating.
    pub fn plan(&self, means: Means<'_>) -> Outcome<Plan> {
        planned(means, self.held(means), |options| self.decoder.plan(options))
    }

    /// Plans, allocates and loads what stays in memory.
    pub fn start(self, means: Means<'_>, profile: bool) -> Outcome<Language> {
        let held = self.held(means);
        let (model, held) = within_budget(
            means,
            held,
            Bytes::ZERO,
            |options| self.decoder.start(options, &self.experts, profile),
            LanguageModel::plan,
        )?;
        let held_before = means.pool.used() + held;
        let reservation = means.pool.reserve("tokenizer, graph and the choice of tokens", held)?;
        Ok(Language {
            model,
            tokenizer: self.tokenizer,
            metadata: self.metadata,
            source: self.source,
            held: held_before,
            _held: reservation,
        })
    }
}
