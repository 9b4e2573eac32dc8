//! What can be asked, and what comes back.

use lightering_units::Seconds;
use serde::Serialize;

use crate::{Grammar, SamplerOptions, TokenLogProbability};

/// A prompt and how to continue it.
#[derive(Debug, Clone, Default)]
pub struct GenerationRequest {
    /// The tokens to continue; at least one.
    pub prompt: Vec<u32>,
    /// Most tokens of the answer; as many as fit when not given.
    pub max_tokens: Option<usize>,
    /// How tokens are chosen.
    pub sampler: SamplerOptions,
    /// Ends before the first of these strings in the answer's text.
    pub stop: Vec<String>,
    /// What the answer's text has to look like.
    pub constraint: Option<Grammar>,
    /// Tells each token's log-probability and so many of the likeliest alternatives.
    pub logprobs: Option<usize>,
    /// Tells each token of the prompt with its log-probability behind those before it, and so many of the likeliest
    /// tokens in its place. The cache is not asked then, and logits are computed of all of the prompt.
    pub prompt_logprobs: Option<usize>,
    /// Goes on behind tokens that end generation; the end of what a constraint describes still ends the answer.
    pub ignore_end: bool,
    /// Most tokens drafted per step; what the scheduler allows when not given.
    pub draft_len_max: Option<usize>,
}

/// What happens to a request, in order. The last event is [`Event::Done`], unless the scheduler itself failed: then the
/// channel just ends.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// The tokens of the prompt, if their log-probabilities were asked for; comes before the answer. Of the first one
    /// there is none.
    Prompt(Vec<GeneratedToken>),
    /// A token of the answer.
    Token(GeneratedToken),
    /// The embedding that was asked for.
    Embedding(Vec<f32>),
    /// The end.
    Done(Box<Done>),
}

/// A token of the answer, or of the prompt; tokens that end generation are not told.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratedToken {
    /// The token.
    pub id: u32,
    /// The text that is certain with it; empty for tokens of the prompt, while a character is unfinished and while a
    /// stop string may have begun.
    pub text: String,
    /// The log-probability that the model gave it, if asked for.
    pub log_probability: Option<f32>,
    /// The likeliest tokens in its place, if asked for.
    pub top: Vec<TokenLogProbability>,
}

/// Why an answer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// The model ended it, or a stop string was met.
    Stop,
    /// It has as many tokens as were allowed.
    Length,
    /// Nobody listens any more, or the scheduler shut down.
    Cancelled,
    /// It could not be computed.
    Error(String),
}

/// The end of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Done {
    /// Why.
    pub reason: FinishReason,
    /// Text that was held back and turned out to belong to the answer.
    pub text: String,
    /// What was computed.
    pub usage: Usage,
    /// How long it took.
    pub timings: Timings,
}

/// Tokens of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Part of them that was found in the cache.
    pub cached_tokens: usize,
    /// Tokens of the answer, the one that ends it included.
    pub generated_tokens: usize,
}

/// How long a request took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Timings {
    /// From asking to the first step.
    pub queue: Seconds,
    /// From asking to the first token.
    pub first_token: Option<Seconds>,
    /// Mean time between two tokens.
    pub inter_token_mean: Option<Seconds>,
    /// Longest time between two tokens.
    pub inter_token_max: Option<Seconds>,
    /// From asking to the end.
    pub total: Seconds,
    /// Tokens that were drafted.
    pub drafted_tokens: usize,
    /// Drafted tokens that were right.
    pub accepted_tokens: usize,
    /// How often its pages were taken and it was computed again.
    pub preemptions: usize,
}
