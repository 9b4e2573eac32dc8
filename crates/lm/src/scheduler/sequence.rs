//! One request under way: its tokens, its pages, and what turns logits into its answer.

use std::time::Instant;

use lightering_units::Seconds;

use super::channel::EventSender;
use super::inbox::{Job, Waiting};
use super::lookup;
use super::pages::{Found, NO_PAGE, Place, Pools, ROOT};
use super::request::{Done, Event, FinishReason, GeneratedToken, Timings, Usage};
use super::stops::StopMatcher;
use crate::{
    Constraint, PageKind, Result, Sampler, StreamDecoder, TokenLogProbability, TokenModel, Tokenizer,
    log_probability, top_log_probabilities,
};

/// A task with its place in the cache.
#[derive(Debug)]
pub(super) struct Sequence<'t> {
    pub task: Task<'t>,
    /// The pages of its positions, in order.
    pub pages: Vec<u32>,
    /// The same for layers with a window, [`NO_PAGE`] where those let go already; empty unless they have their own.
    pub window_pages: Vec<u32>,
    /// Positions whose keys and values are in the pages.
    pub computed: usize,
    /// The numbers of the pages whose content is told to the pool.
    numbers: Vec<u64>,
    /// Its age: smaller came first.
    pub order: u64,
    /// The step that it took part in last.
    pub last_step: u64,
    /// Its pages were taken in the step that is being packed.
    pub evicted: bool,
}

impl<'t> Sequence<'t> {
    pub fn new(task: Task<'t>, order: u64) -> Sequence<'t> {
        Sequence {
            task,
            pages: Vec::new(),
            window_pages: Vec::new(),
            computed: 0,
            numbers: Vec::new(),
            order,
            last_step: 0,
            evicted: false,
        }
    }

    /// Tokens that are not in the pages yet; at least one while it is under way.
    pub fn pending(&self) -> usize {
        self.task.tokens.len() - self.computed
    }

    /// What is in the cache of its beginning.
    pub fn find_prefix(&self, pools: &Pools) -> Found {
        if self.task.is_embedding() {
            return Found::default();
        }
        pools.find_prefix(&self.task.tokens[..self.task.usable_from_cache()])
    }

    /// Begins with what was found, bringing back what is in the spill. When that fails, it begins with nothing.
    pub fn take_prefix(&mut self, found: Found, pools: &mut Pools, model: &mut dyn TokenModel) {
        debug_assert!(self.pages.is_empty() && self.window_pages.is_empty() && self.computed == 0);
        let places = || {
            let shared = found.pages.iter().map(|(place, _)| (PageKind::Shared, *place));
            shared.chain(found.window_pages.iter().map(|place| (PageKind::Window, *place)))
        };
        // What is there is held first, so that no page for the rest is taken from it.
        for (kind, place) in places() {
            match place {
                Place::Page(page) => pools.hold(kind, page),
                Place::Slot(slot, _) => pools.touch(slot),
                Place::Gone => {}
            }
        }
        let mut failed = false;
        for (kind, place) in places() {
            let page = match place {
                Place::Gone => NO_PAGE,
                Place::Page(page) => page,
                Place::Slot(..) if failed => NO_PAGE,
                Place::Slot(slot, number) => pools.restore(model, kind, slot, number).unwrap_or_else(|| {
                    failed = true;
                    NO_PAGE
                }),
            };
            match kind {
                PageKind::Shared => self.pages.push(page),
                PageKind::Window => self.window_pages.push(page),
            }
        }
        if failed {
            self.release(pools);
            return;
        }
        self.numbers.extend(found.pages.iter().map(|(_, number)| *number));
        self.computed = found.pages.len() * pools.page_len();
    }

    /// Gets free pages for `positions` positions, as far as there are any, and says whether they are enough.
    pub fn cover(&mut self, positions: usize, pools: &mut Pools) -> bool {
        let page_len = pools.page_len();
        let first_seen = pools.first_window_page(self.computed);
        while self.pages.len() * page_len < positions {
            let Some(page) = pools.all.allocate() else { return false };
            self.pages.push(page);
        }
        if let Some(windows) = &mut pools.windows {
            while self.window_pages.len() * page_len < positions {
                let page = match self.window_pages.len() < first_seen {
                    true => NO_PAGE,
                    false => match windows.pool.allocate() {
                        Some(page) => page,
                        None => return false,
                    },
                };
                self.window_pages.push(page);
            }
        }
        true
    }

    /// For how many positions it has pages.
    pub fn covered(&self, pools: &Pools) -> usize {
        let pages = match pools.windows {
            Some(_) => self.pages.len().min(self.window_pages.len()),
            None => self.pages.len(),
        };
        pages * pools.page_len()
    }

    /// Whether it holds pages that others could use.
    pub fn holds_pages(&self) -> bool {
        !self.pages.is_empty() || !self.window_pages.is_empty()
    }

    /// Tells the pools what the full pages hold.
    pub fn register(&mut self, pools: &mut Pools) {
        if self.task.is_embedding() {
            return;
        }
        let page_len = pools.page_len();
        while (self.numbers.len() + 1) * page_len <= self.computed {
            let index = self.numbers.len();
            let before = self.numbers.last().copied().unwrap_or(ROOT);
            let tokens = &self.task.tokens[index * page_len..(index + 1) * page_len];
            let number = pools.register(PageKind::Shared, &mut self.pages[index], before, tokens);
            self.numbers.push(number);
            if let Some(page) = self.window_pages.get_mut(index).filter(|page| **page != NO_PAGE) {
                pools.register(PageKind::Window, page, number, &[]);
            }
        }
    }

    /// Lets go of the pages of windows that no later token sees.
    pub fn leave_behind(&mut self, pools: &mut Pools) {
        let first_seen = pools.first_window_page(self.computed).min(self.window_pages.len());
        let Some(windows) = &mut pools.windows else { return };
        // What was let go before is one run from the beginning on.
        let mut behind = Vec::new();
        for page in self.window_pages[..first_seen].iter_mut().rev().take_while(|page| **page != NO_PAGE) {
            behind.push(std::mem::replace(page, NO_PAGE));
        }
        windows.pool.release(&mut behind);
    }

    /// Gives all pages back; what they held has to be computed again.
    pub fn release(&mut self, pools: &mut Pools) {
        pools.all.release(&mut self.pages);
        if let Some(windows) = &mut pools.windows {
            windows.pool.release(&mut self.window_pages);
        }
        self.numbers.clear();
        self.computed = 0;
        self.task.restart();
    }

    /// Takes note that the rows of the last step are in the pages.
    pub fn advance(&mut self, rows: usize, step: u64) {
        self.last_step = step;
        self.computed += rows;
        if !self.task.is_embedding() {
            // Drafts behind the first wrong one do not count.
            self.computed = self.computed.min(self.task.tokens.len() - 1);
        }
    }
}

/// What was asked, how far it is, and the way back.
#[derive(Debug)]
pub(super) struct Task<'t> {
    /// The prompt, then the answer.
    pub tokens: Vec<u32>,
    prompt_len: usize,
    cached_len: Option<usize>,
    kind: Kind<'t>,
    sender: EventSender,
    pub finish: Option<FinishReason>,
    clock: Clock,
    preemptions: usize,
}

#[derive(Debug)]
enum Kind<'t> {
    Generation(Box<Generation<'t>>),
    Embedding { sum: Vec<f64>, done: bool },
}

#[derive(Debug)]
struct Generation<'t> {
    tokenizer: &'t Tokenizer,
    answer_len: usize,
    sampler: Box<Sampler>,
    constraint: Option<Box<Constraint>>,
    decoder: StreamDecoder<'t>,
    stops: StopMatcher,
    logprobs: Option<usize>,
    prompt_logprobs: Option<usize>,
    /// The tokens of the prompt behind the first whose log-probabilities are known.
    prompt: Vec<GeneratedToken>,
    ignore_end: bool,
    top: Vec<TokenLogProbability>,
    drafts_max: usize,
    /// How many tokens are drafted next: more while drafts are right.
    draft_len: usize,
    drafted: usize,
    accepted: usize,
}

#[derive(Debug)]
struct Clock {
    submitted: Instant,
    started: Option<Instant>,
    first: Option<Instant>,
    last: Option<Instant>,
    longest: Option<Seconds>,
}

fn seconds(from: Instant, to: Instant) -> Seconds {
    Seconds(to.saturating_duration_since(from).as_secs_f64())
}

/// The times that one accepted token adds.
#[derive(Debug, Clone, Copy)]
pub(super) enum TokenTime {
    First(Seconds),
    Next(Seconds),
}

impl<'t> Task<'t> {
    pub fn new(waiting: Waiting, tokenizer: &'t Tokenizer) -> Task<'t> {
        let (tokens, kind) = match waiting.job {
            Job::Generation { request, answer_len, sampler, constraint, drafts_max } => {
                let request = *request;
                let generation = Generation {
                    tokenizer,
                    answer_len,
                    sampler,
                    constraint,
                    decoder: StreamDecoder::continuing(tokenizer),
                    stops: StopMatcher::new(request.stop),
                    logprobs: request.logprobs,
                    prompt_logprobs: request.prompt_logprobs,
                    prompt: Vec::new(),
                    ignore_end: request.ignore_end,
                    top: Vec::new(),
                    drafts_max,
                    draft_len: drafts_max.min(4),
                    drafted: 0,
                    accepted: 0,
                };
                (request.prompt, Kind::Generation(Box::new(generation)))
            }
            Job::Embedding { tokens } => (tokens, Kind::Embedding { sum: Vec::new(), done: false }),
        };
        Task {
            prompt_len: tokens.len(),
            cached_len: None,
            tokens,
            kind,
            sender: waiting.sender,
            finish: None,
            clock: Clock {
                submitted: waiting.submitted,
                started: None,
                first: None,
                last: None,
                longest: None,
            },
            preemptions: 0,
        }
    }

    pub fn is_embedding(&self) -> bool {
        matches!(self.kind, Kind::Embedding { .. })
    }

    pub fn is_cancelled(&self) -> bool {
        self.sender.is_cancelled()
    }

    /// How many events the receiver can take now.
    pub fn room(&self) -> usize {
        self.sender.room()
    }

    /// Takes note of the start, with so many tokens found in the cache. Says whether it is the first one.
    pub fn start(&mut self, cached_len: usize) -> bool {
        if self.cached_len.is_some() {
            return false;
        }
        self.cached_len = Some(cached_len);
        self.clock.started = Some(Instant::now());
        true
    }

    fn restart(&mut self) {
        if let Kind::Embedding { sum, .. } = &mut self.kind {
            sum.clear();
        }
    }

    /// Takes note that its pages were taken.
    pub fn count_preemption(&mut self) {
        self.preemptions += 1;
    }

    /// How many tokens of the prompt, the first apart, are not told yet.
    fn prompt_left(&self) -> usize {
        match &self.kind {
            Kind::Generation(g) if g.prompt_logprobs.is_some() => {
                (self.prompt_len - 1).saturating_sub(g.prompt.len())
            }
            _ => 0,
        }
    }

    /// Whether the logits of all rows are wanted, for the log-probabilities of the prompt.
    pub fn wants_prompt(&self) -> bool {
        self.prompt_left() > 0
    }

    /// How many of the first tokens need not be computed if they are in the cache.
    pub fn usable_from_cache(&self) -> usize {
        match self.prompt_left() {
            // The last token has to be computed, since its logits are wanted.
            0 => self.tokens.len() - 1,
            left => self.prompt_len - 1 - left,
        }
    }

    /// Takes the log-probability of the token of the prompt behind `position`, if it is the next that is to be told.
    pub fn note_prompt(&mut self, position: usize, logits: &[f32]) {
        let left = self.prompt_left();
        if self.finish.is_some() || left == 0 || position != self.prompt_len - 1 - left {
            return;
        }
        let id = self.tokens[position + 1];
        let Kind::Generation(generation) = &mut self.kind else { return };
        let mut top = Vec::new();
        let count = generation.prompt_logprobs.unwrap_or(0);
        let known = top_log_probabilities(logits, count, &mut top).and_then(|()| log_probability(logits, id));
        match known {
            Ok(probability) => generation.prompt.push(GeneratedToken {
                id,
                text: String::new(),
                log_probability: Some(probability),
                top,
            }),
            Err(error) => self.finish = Some(FinishReason::Error(error.to_string())),
        }
    }

    /// The tokens that may follow the last one, `rows` at most.
    pub fn draft(&mut self, rows: usize) -> Vec<u32> {
        let Kind::Generation(generation) = &self.kind else { return Vec::new() };
        // The last token of the answer needs no row of its own.
        let left = (self.prompt_len + generation.answer_len).saturating_sub(self.tokens.len() + 1);
        let count = generation.draft_len.min(rows).min(left);
        if count == 0 { Vec::new() } else { lookup::draft(&self.tokens, count).to_vec() }
    }

    /// Takes note of how many drafts there were, when the answer had `before` tokens before the step.
    pub fn judge_drafts(&mut self, drafted: usize, before: usize) -> usize {
        let gained = self.tokens.len() - before;
        let accepted = gained.saturating_sub(1).min(drafted);
        if let Kind::Generation(generation) = &mut self.kind {
            generation.drafted += drafted;
            generation.accepted += accepted;
            generation.draft_len = match accepted {
                _ if accepted == drafted => (generation.draft_len + 2).min(generation.drafts_max),
                0 => (generation.draft_len / 2).max(1),
                _ => generation.draft_len,
            };
        }
        accepted
    }

    /// Chooses the token behind `position`, where `token` was computed, if the answer goes that way.
    pub fn accept(&mut self, position: usize, token: u32, logits: &mut [f32]) -> Option<TokenTime> {
        if self.finish.is_some() || position + 1 != self.tokens.len() || self.tokens[position] != token {
            return None;
        }
        match self.choose(logits) {
            Ok(time) => Some(time),
            Err(error) => {
                self.finish = Some(FinishReason::Error(error.to_string()));
                None
            }
        }
    }

    fn choose(&mut self, logits: &mut [f32]) -> Result<TokenTime> {
        let Kind::Generation(generation) = &mut self.kind else {
            unreachable!("logits are only asked for answers")
        };
        let original = match generation.logprobs {
            Some(count) => {
                top_log_probabilities(logits, count, &mut generation.top)?;
                Some(logits.to_vec())
            }
            None => None,
        };
        // A model may have more logits than its tokenizer has tokens; those mean nothing.
        if let Some(padding) = logits.get_mut(generation.tokenizer.token_count()..) {
            padding.fill(f32::NEG_INFINITY);
        }
        if let Some(constraint) = &mut generation.constraint {
            constraint.mask(logits)?;
        }
        let token = generation.sampler.sample(logits, &self.tokens)?;
        if let Some(constraint) = &mut generation.constraint {
            constraint.accept(token)?;
        }
        if generation.prompt_logprobs.take().is_some() {
            let first = GeneratedToken {
                id: self.tokens[0],
                text: String::new(),
                log_probability: None,
                top: Vec::new(),
            };
            let rest = std::mem::take(&mut generation.prompt);
            self.sender.send(Event::Prompt(std::iter::once(first).chain(rest).collect()));
        }
        let probability = original.map(|logits| log_probability(&logits, token)).transpose()?;
        self.tokens.push(token);
        let now = Instant::now();
        let time = match self.clock.last.replace(now) {
            None => {
                self.clock.first = Some(now);
                TokenTime::First(seconds(self.clock.submitted, now))
            }
            Some(last) => {
                let time = seconds(last, now);
                self.clock.longest = Some(self.clock.longest.map_or(time, |longest| longest.max(time)));
                TokenTime::Next(time)
            }
        };
        // Nothing may follow the end of what a constraint describes.
        let ends = !generation.ignore_end || generation.constraint.is_some();
        if generation.tokenizer.is_end(token) && ends {
            self.finish = Some(FinishReason::Stop);
            return Ok(time);
        }
        let piece = generation.decoder.push(token)?;
        let (text, stopped) = generation.stops.push(piece);
        let top = std::mem::take(&mut generation.top);
        self.sender.send(Event::Token(GeneratedToken { id: token, text, log_probability: probability, top }));
        if stopped {
            self.finish = Some(FinishReason::Stop);
        } else if self.tokens.len() == self.prompt_len + generation.answer_len {
            self.finish = Some(FinishReason::Length);
        }
        Ok(time)
    }

    /// Adds the hidden state of one position.
    pub fn add_hidden(&mut self, hidden: &[f32]) {
        if let Kind::Embedding { sum, .. } = &mut self.kind {
            sum.resize(hidden.len(), 0.0);
            sum.iter_mut().zip(hidden).for_each(|(sum, value)| *sum += f64::from(*value));
        }
    }

    /// Sends the embedding once all positions are in it.
    pub fn finish_embedding(&mut self) {
        let Kind::Embedding { sum, done } = &mut self.kind else { return };
        // The direction of the mean is that of the sum.
        let length = sum.iter().map(|v| v * v).sum::<f64>().sqrt();
        if !length.is_finite() {
            let what = "a hidden state is not a finite number; expected finite numbers from the model";
            self.finish = Some(FinishReason::Error(what.to_owned()));
            return;
        }
        let scale = if length > 0.0 { 1.0 / length } else { 0.0 };
        self.sender.send(Event::Embedding(sum.iter().map(|v| (v * scale) as f32).collect()));
        *done = true;
        self.finish = Some(FinishReason::Stop);
    }

    /// Sends the end.
    pub fn end(mut self, reason: FinishReason) {
        let now = Instant::now();
        let generated_tokens = self.tokens.len() - self.prompt_len;
        let mut text = String::new();
        let (mut drafted_tokens, mut accepted_tokens) = (0, 0);
        if let Kind::Generation(generation) = &mut self.kind {
            text = generation.stops.finish();
            text.push_str(generation.decoder.finish());
            (drafted_tokens, accepted_tokens) = (generation.drafted, generation.accepted);
        }
        let between = match (self.clock.first, self.clock.last) {
            (Some(first), Some(last)) if generated_tokens > 1 => {
                Some(Seconds(seconds(first, last).0 / (generated_tokens - 1) as f64))
            }
            _ => None,
        };
        let submitted = self.clock.submitted;
        let timings = Timings {
            queue: seconds(submitted, self.clock.started.unwrap_or(now)),
            first_token: self.clock.first.map(|first| seconds(submitted, first)),
            inter_token_mean: between,
            inter_token_max: self.clock.longest,
            total: seconds(submitted, now),
            drafted_tokens,
            accepted_tokens,
            preemptions: self.preemptions,
        };
        let cached_tokens = self.cached_len.unwrap_or(0);
        let usage = Usage { prompt_tokens: self.prompt_len, cached_tokens, generated_tokens };
        self.sender.send(Event::Done(Box::new(Done { reason, text, usage, timings })));
    }
}
