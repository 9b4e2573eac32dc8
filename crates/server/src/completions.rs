//! `/v1/completions`

use lightering_lm::{GenerationRequest, MAX_LOGPROBS, Tokenizer};
use serde::Deserialize;

use crate::answer::{Choice, Echo, Flavour, Head};
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

/// Asks for `answers` answers to a prompt, each with a seed of its own; the first has place `index`.
pub(crate) fn submit(
    shared: &Shared,
    request: &GenerationRequest,
    answers: usize,
    index: usize,
) -> Result<Vec<Choice>, Refusal> {
    let one = |answer: usize| {
        let mut request = request.clone();
        request.sampler.seed = request.sampler.seed.wrapping_add(answer as u64);
        let events = shared.scheduler.generate(request).map_err(|error| Refusal::from_lm(&error, None))?;
        Ok(Choice::new(events, index + answer, answer == 0))
    };
    (0..answers).map(one).collect()
}

/// Understands a request and submits it.
pub(crate) fn prepare(shared: &Shared, body: &[u8]) -> Result<(Vec<Choice>, Head), Refusal> {
    let mut fields = Fields::parse(body)?;
    fields.model(&shared.options.model_id)?;
    let options = fields.answer_options()?;
    let texts: Texts = fields.need("prompt", Texts::EXPECTED)?;
    let answers = texts.count() * options.answers;
    let most = shared.scheduler.options().queue_max;
    if !(1..=most).contains(&answers) {
        let message = format!("`prompt` and `n` ask for {answers} answers; expected 1 to {most}");
        return Err(Refusal::field("prompt", message));
    }
    // What OpenAI's interface takes when nothing is said.
    let mut max_tokens: usize = fields.take("max_tokens", "a whole number of at least 1")?.unwrap_or(16);
    let logprobs: Option<usize> = fields.take("logprobs", "a whole number from 0 to 20")?;
    if let Some(count) = logprobs.filter(|count| *count > MAX_LOGPROBS) {
        let message = format!("`logprobs` is {count}; expected 0 to {MAX_LOGPROBS}");
        return Err(Refusal::field("logprobs", message));
    }
    let echo = fields.take("echo", "true or false")?.unwrap_or(false);
    let best_of: Option<usize> = fields.take("best_of", "a whole number")?;
    if best_of.is_some_and(|best_of| best_of != options.answers) {
        let what = "choosing among more answers than are given (`best_of`)";
        return Err(Refusal::unsupported("best_of", what));
    }
    fields.refuse("suffix", &["\"\""])?;
    fields.finish()?;
    // Nothing but the prompt is wanted; a model cannot compute nothing.
    let alone = echo && max_tokens == 0;
    if alone {
        max_tokens = 1;
    }
    let tokenizer = shared.scheduler.tokenizer();
    let written = match &texts {
        Texts::Text(text) => vec![text.clone()],
        Texts::Several(texts) => texts.clone(),
        Texts::Tokens(_) | Texts::SeveralTokens(_) => Vec::new(),
    };
    let mut choices = Vec::with_capacity(answers);
    for (place, prompt) in texts.into_tokens(tokenizer, "prompt")?.into_iter().enumerate() {
        let echo = match (echo, written.get(place)) {
            (false, _) => None,
            (true, Some(text)) => Some(Echo {
                text: text.clone(),
                hides_first: tokenizer.adds_bos() && tokenizer.bos().is_some(),
                alone,
            }),
            (true, None) => {
                let text = tokenizer.decode(&prompt).map_err(|e| Refusal::from_lm(&e, Some("prompt")))?;
                Some(Echo { text, hides_first: false, alone })
            }
        };
        let request = GenerationRequest {
            prompt,
            max_tokens: Some(max_tokens),
            sampler: options.sampler.clone(),
            stop: options.stop.clone(),
            constraint: options.constraint.clone(),
            logprobs,
            prompt_logprobs: logprobs.filter(|_| echo.is_some()),
            ignore_end: options.ignore_end,
            draft_len_max: None,
        };
        let submitted = submit(shared, &request, options.answers, choices.len())?;
        choices.extend(submitted.into_iter().map(|choice| choice.with_echo(echo.clone())));
    }
    let (stream, usage) = (options.stream, options.include_usage);
    Ok((choices, Head::new(shared, Flavour::Completion, stream, usage, logprobs.is_some())))
}
