//! Serving many sequences with one model: continuous batching over a pool of cache pages.
//!
//! Each step packs the next token of every running sequence first, then pieces of the prompts of those that are not that
//! far yet (Yu et al., 2022, Orca; Agrawal et al., 2024, Sarathi-Serve). Cache memory is handed out in pages on demand
//! and shared between sequences that begin alike (Kwon et al., 2023, vLLM). When pages run out, the youngest sequence
//! gives its pages back and is computed again later. Drafts come from the sequence itself (Saxena, 2023, prompt lookup)
//! and are verified in the same step.
//!
//! What a request gets never depends on the requests beside it: a model's rows do not see each other, shared pages are
//! never written, and a sequence that is computed again is fed the tokens that were chosen before.

mod channel;
mod counters;
mod inbox;
mod lookup;
mod pages;
mod request;
mod sequence;
mod spill;
mod stops;
mod worker;

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::{
    Constraint, Error, ModelStatus, Result, Sampler, TokenModel, TokenTable, Tokenizer, WindowCache,
};

pub use channel::Events;
pub use counters::{Counters, LatencyHistogram, SchedulerState};
pub use request::{Done, Event, FinishReason, GeneratedToken, GenerationRequest, Timings, Usage};
pub use spill::{SpillFile, SpillStore, SpillWarning};

use counters::Telemetry;
use inbox::{Inbox, Job};
use sequence::Task;

/// Most strings at which one request may stop.
pub const MAX_STOPS: usize = 16;

/// The longest string at which a request may stop, in bytes.
pub const MAX_STOP_BYTES: usize = 1024;

/// Most alternatives that are told for each token.
pub const MAX_LOGPROBS: usize = 20;

/// How a scheduler divides its model between requests.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SchedulerOptions {
    /// Most sequences that are computed side by side.
    pub sequences_max: usize,
    /// Most requests that wait for a place; more are refused with [`Error::Busy`].
    pub queue_max: usize,
    /// Most events that one request may have waiting for their receiver; then it is left out until there is room.
    pub events_max: usize,
    /// Most rows of prompts in a step that also continues running sequences, which bounds what these wait; 0 takes a
    /// quarter of the model's rows.
    pub prefill_rows_max: usize,
    /// Whether pages are kept and shared with later requests that begin alike.
    pub prefix_reuse: bool,
    /// Most tokens that are drafted by n-gram lookup for each step of a sequence; 0 for none. Requests can ask for less.
    pub draft_len_max: usize,
}

impl Default for SchedulerOptions {
    fn default() -> SchedulerOptions {
        SchedulerOptions {
            sequences_max: 16,
            queue_max: 64,
            events_max: 256,
            prefill_rows_max: 0,
            prefix_reuse: true,
            draft_len_max: 0,
        }
    }
}

/// What a model allows, as it was when the scheduler took it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelLimits {
    /// Tokens of the vocabulary.
    pub vocabulary_len: usize,
    /// Width of an embedding.
    pub embedding_len: usize,
    /// Most tokens of one sequence, prompt and answer together: the model's context or what the cache holds.
    pub sequence_len_max: usize,
    /// Positions of one cache page.
    pub page_len: usize,
    /// Pages of the cache.
    pub page_count: usize,
}

/// A model on a thread of its own that serves requests side by side.
///
/// Dropping it cancels what is under way and waits for the thread; [`close`](Scheduler::close) and
/// [`wait`](Scheduler::wait) let it finish first.
#[derive(Debug)]
pub struct Scheduler {
    inbox: Arc<Inbox>,
    telemetry: Arc<Telemetry>,
    tokenizer: Arc<Tokenizer>,
    table: Arc<std::sync::OnceLock<Arc<TokenTable>>>,
    limits: ModelLimits,
    options: SchedulerOptions,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Scheduler {
    /// Starts the thread that owns `model`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for options of zero, a model without rows or pages, and a tokenizer with more tokens than the
    /// model; [`Error::Internal`] when the system refuses the thread.
    pub fn start(
        model: Box<dyn TokenModel>,
        tokenizer: Arc<Tokenizer>,
        options: SchedulerOptions,
    ) -> Result<Scheduler> {
        Scheduler::start_with_spill(model, tokenizer, options, None)
    }

    /// As [`start`](Scheduler::start), with a store for what pages of the cache hold when they are needed for something
    /// else: it comes back when a request begins with it, or when a sequence whose pages were taken goes on. Implies
    /// [`SchedulerOptions::prefix_reuse`]. What the store fails at is told and computed again.
    ///
    /// # Errors
    /// As [`start`](Scheduler::start).
    pub fn start_with_spill(
        model: Box<dyn TokenModel>,
        tokenizer: Arc<Tokenizer>,
        options: SchedulerOptions,
        spill: Option<(Box<dyn SpillStore>, SpillWarning)>,
    ) -> Result<Scheduler> {
        let at_least_one = [
            ("scheduler option sequences_max", options.sequences_max),
            ("scheduler option queue_max", options.queue_max),
            ("scheduler option events_max", options.events_max),
            ("rows of a step of the model", model.rows_max()),
            ("wanted rows of a step of the model", model.wanted_rows_max()),
            ("positions of a cache page of the model", model.page_len()),
            ("cache pages of the model", model.page_count()),
            ("context of the model", model.context_len()),
        ];
        for (place, value) in at_least_one {
            if value == 0 {
                return Err(Error::invalid(place, 0, "at least 1"));
            }
        }
        if tokenizer.token_count() > model.vocabulary_len() {
            return Err(Error::invalid(
                "tokenizer",
                format!("{} tokens", tokenizer.token_count()),
                format!("at most the {} for which the model has logits", model.vocabulary_len()),
            ));
        }
        if let Some(window) = model.window() {
            let least = WindowCache::least_pages(window.len.max(1), model.page_len());
            if window.len == 0 || window.pages < least {
                let what = format!("{} pages for a window of {} positions", window.pages, window.len);
                return Err(Error::invalid(
                    "cache of windows of the model",
                    what,
                    format!("at least {least}"),
                ));
            }
        }
        let limits = ModelLimits {
            vocabulary_len: model.vocabulary_len(),
            embedding_len: model.embedding_len(),
            sequence_len_max: model.context_len().min(model.page_len().saturating_mul(model.page_count())),
            page_len: model.page_len(),
            page_count: model.page_count(),
        };
        let spill = spill.map(|(store, warning)| spill::Spill::new(store, warning));
        let inbox = Arc::new(Inbox::new(options.queue_max));
        let telemetry = Arc::new(Telemetry::default());
        let thread = {
            let (inbox, telemetry) = (Arc::clone(&inbox), Arc::clone(&telemetry));
            let (tokenizer, options) = (Arc::clone(&tokenizer), options.clone());
            std::thread::Builder::new()
                .name("lm scheduler".to_owned())
                .spawn(move || worker::run(model, &tokenizer, options, inbox, telemetry, spill))
                .map_err(|e| Error::Internal(format!("starting the thread of the scheduler: {e}")))?
        };
        let thread = Mutex::new(Some(thread));
        let table = Arc::default();
        Ok(Scheduler { inbox, telemetry, tokenizer, table, limits, options, thread })
    }

    /// The tokenizer of the model.
    #[must_use]
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// What the model allows.
    #[must_use]
    pub fn limits(&self) -> ModelLimits {
        self.limits
    }

    /// The options that it was started with.
    #[must_use]
    pub fn options(&self) -> &SchedulerOptions {
        &self.options
    }

    /// Asks for a continuation of a prompt. The events of the request arrive at the receiver; dropping that cancels the
    /// request.
    ///
    /// # Errors
    /// [`Error::Invalid`] for wrong options and tokens beyond the vocabulary, [`Error::TooLong`] for a request that can
    /// never fit, [`Error::Busy`] when too many wait already and [`Error::Closed`] behind [`close`](Scheduler::close).
    pub fn generate(&self, request: GenerationRequest) -> Result<Events> {
        self.check_tokens(&request.prompt)?;
        let limit = self.limits.sequence_len_max;
        let prompt_len = request.prompt.len();
        let answer_len = match request.max_tokens {
            Some(0) => return Err(Error::invalid("max_tokens", 0, "at least 1")),
            Some(count) if count > limit - prompt_len => {
                return Err(Error::TooLong { prompt: prompt_len, answer: count, limit });
            }
            Some(count) => count,
            None => limit - prompt_len,
        };
        if answer_len == 0 {
            return Err(Error::TooLong { prompt: prompt_len, answer: 1, limit });
        }
        if request.stop.len() > MAX_STOPS {
            let found = request.stop.len() as u64;
            return Err(Error::limit("stop", "the number of strings", found, MAX_STOPS as u64));
        }
        for stop in &request.stop {
            if stop.is_empty() || stop.len() > MAX_STOP_BYTES {
                let what = format!("a string of {} bytes", stop.len());
                return Err(Error::invalid("stop", what, format!("1 to {MAX_STOP_BYTES} bytes")));
            }
        }
        if let Some(count) = request.logprobs.max(request.prompt_logprobs)
            && count > MAX_LOGPROBS
        {
            return Err(Error::limit(
                "logprobs",
                "the number of alternatives",
                count as u64,
                MAX_LOGPROBS as u64,
            ));
        }
        if let Some(token) =
            request.sampler.logit_bias.keys().find(|t| **t as usize >= self.limits.vocabulary_len)
        {
            let expected = format!("a token below {}", self.limits.vocabulary_len);
            return Err(Error::invalid("logit_bias", format!("token {token}"), expected));
        }
        let sampler = Sampler::new(request.sampler.clone())?;
        let constraint = match &request.constraint {
            Some(grammar) => {
                let table = self.table.get_or_init(|| Arc::new(TokenTable::new(&self.tokenizer)));
                Some(Constraint::new(grammar, table)?)
            }
            None => None,
        };
        let drafts_max = request.draft_len_max.unwrap_or(usize::MAX).min(self.options.draft_len_max);
        self.submit(Job::generation(request, answer_len, sampler, constraint, drafts_max))
    }

    /// Asks for the mean of the normalised hidden states of `tokens`, scaled to length 1; it arrives as
    /// [`Event::Embedding`].
    ///
    /// # Errors
    /// As [`generate`](Scheduler::generate).
    pub fn embed(&self, tokens: Vec<u32>) -> Result<Events> {
        self.check_tokens(&tokens)?;
        self.submit(Job::embedding(tokens))
    }

    fn submit(&self, job: Job) -> Result<Events> {
        let (sender, events) = channel::channel(self.options.events_max, &self.inbox);
        let result = self.inbox.submit(job, sender);
        if result.is_err() {
            self.telemetry.update(|counters| counters.requests_refused += 1);
        }
        result.map(|()| events)
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::invalid("prompt", "no tokens", "at least one"));
        }
        let limit = self.limits.sequence_len_max;
        if tokens.len() > limit {
            return Err(Error::TooLong { prompt: tokens.len(), answer: 0, limit });
        }
        let count = self.limits.vocabulary_len;
        match tokens.iter().find(|token| **token as usize >= count) {
            Some(token) => {
                Err(Error::invalid("prompt", format!("token {token}"), format!("a token below {count}")))
            }
            None => Ok(()),
        }
    }

    /// What was done so far and what is under way now.
    #[must_use]
    pub fn state(&self) -> SchedulerState {
        let mut state = self.telemetry.state();
        state.queued = self.inbox.len() + state.parked;
        state
    }

    /// What the model said of itself last.
    #[must_use]
    pub fn model_status(&self) -> ModelStatus {
        self.telemetry.model_status()
    }

    /// Accepts no more requests; those under way and those that wait are still served.
    pub fn close(&self) {
        self.inbox.close();
    }

    /// Waits until a closed scheduler has served everything, `limit` at most. Says whether it has.
    #[must_use]
    pub fn wait(&self, limit: Duration) -> bool {
        self.inbox.wait_ended(Instant::now() + limit)
    }

    /// Whether the scheduler still takes requests.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.inbox.is_open()
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.inbox.abandon();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // A panic of the model was told on its thread, and every receiver has seen its channel end.
        let _ = thread.map(JoinHandle::join);
    }
}
