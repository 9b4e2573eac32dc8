//! `/v1/completions`

use lightering_lm::{Events, GenerationRequest, MAX_LOGPROBS, Tokenizer};
use serde::Deserialize;

use crate::answer::{Flavour, Head};
use crate::fields::Fields;
use crate::refusal::Refusal;
use crate::state::Shared;

/// Texts as clients write them: as strings or as tokens, one or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Texts {
    Text(String),
    Tokens(Vec<u32>),
    Several(Vec<String>),
    SeveralTokens(Vec<Vec<u32>>),
}

impl Texts {
    pub const EXPECTED: &'static str =
        "a string, a list of strings, a list of token ids or a list of such lists";

    pub fn count(&self) -> usize {
        match self {
            Texts::Text(_) | Texts::Tokens(_) => 1,
            Texts::Several(texts) => texts.len(),
            Texts::SeveralTokens(texts) => texts.len(),
        }
    }

    /// The tokens of each text.
    pub fn into_tokens(self, tokenizer: &Tokenizer, param: &str) -> Result<Vec<Vec<u32>>, Refusal> {
        let encode = |text: &String| -> Result<Vec<u32>, Refusal> {
            let from = |error: lightering_lm::Error| Refusal::from_lm(&error, Some(param));
            let mut ids = tokenizer.encode(text, false, false).map_err(from)?;
            if let Some(bos) = tokenizer.bos()
                && tokenizer.adds_bos()
            {
                ids.insert(0, bos);
            }
            Ok(ids)
        };
        let all = match self {
            Texts::Text(text) => vec![encode(&text)?],
            Texts::Tokens(tokens) => vec![tokens],
            Texts::Several(texts) => texts.iter().map(encode).collect::<Result<_, _>>()?,
            Texts::SeveralTokens(texts) => texts,
        };
        if all.iter().any(Vec::is_empty) {
            return Err(Refusal::field(
                param,
                format!("`{param}` has a text without tokens; expected at least one"),
            ));
        }
        Ok(all)
    }
}

/// Understands a request and submits it.
pub(crate) fn prepare(shared: &Shared, body: &[u8]) -> Result<(Events, Head), Refusal> {
    let mut fields = Fields::parse(body)?;
    fields.model(&shared.options.model_id)?;
    let options = fields.answer_options()?;
    let texts: Texts = fields.need("prompt", Texts::EXPECTED)?;
    if texts.count() != 1 {
        let count = texts.count();
        let message =
            format!("`prompt` has {count} texts; expected one, since this server answers one at a time");
        return Err(Refusal::field("prompt", message));
    }
    // What OpenAI's interface takes when nothing is said.
    let max_tokens = Some(fields.take("max_tokens", "a whole number of at least 1")?.unwrap_or(16));
    let logprobs: Option<usize> = fields.take("logprobs", "a whole number from 0 to 20")?;
    if let Some(count) = logprobs.filter(|count| *count > MAX_LOGPROBS) {
        let message = format!("`logprobs` is {count}; expected 0 to {MAX_LOGPROBS}");
        return Err(Refusal::field("logprobs", message));
    }
    fields.refuse("best_of", &["1"])?;
    fields.refuse("echo", &["false"])?;
    fields.refuse("suffix", &["\"\""])?;
    fields.finish()?;
    let tokens = texts.into_tokens(shared.scheduler.tokenizer(), "prompt")?;
    let request = GenerationRequest {
        prompt: tokens.into_iter().next().unwrap_or_default(),
        max_tokens,
        sampler: options.sampler,
        stop: options.stop,
        constraint: options.constraint,
        logprobs,
        ignore_end: options.ignore_end,
        draft_len_max: None,
    };
    let events = shared.scheduler.generate(request).map_err(|error| Refusal::from_lm(&error, None))?;
    let (stream, usage) = (options.stream, options.include_usage);
    Ok((events, Head::new(shared, Flavour::Completion, stream, usage, logprobs.is_some())))
}
