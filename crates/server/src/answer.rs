//! Answers, as one JSON object or as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::Response;
use bytes::Bytes;
use lightering_lm::{Done, Event, Events, FinishReason, GeneratedToken, Timings, Tokenizer, Usage};
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::time::{Instant, Sleep, sleep};

use crate::fields::random;
use crate::refusal::{Refusal, json_response};
use crate::state::Shared;
use crate::tools::{Call, CallFinder, Piece};

/// In which of the two interfaces an answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flavour {
    Chat,
    Completion,
}

/// What stands in every part of an answer, and how it is to be written.
#[derive(Debug)]
pub(crate) struct Head {
    flavour: Flavour,
    pub stream: bool,
    include_usage: bool,
    logprobs: bool,
    id: String,
    created: u64,
    model: String,
    keep_alive: Duration,
    tokenizer: Arc<Tokenizer>,
}

/// One of the answers that were asked for.
#[derive(Debug)]
pub(crate) struct Choice {
    /// `None` behind the end.
    events: Option<Events>,
    index: usize,
    /// Whether it is the first of its prompt, for which the prompt's tokens count.
    counts_prompt: bool,
    /// What stands in front of the answer.
    echo: Option<Echo>,
    /// Finds calls of tools, if there are any.
    calls: Option<CallFinder>,
    calls_told: usize,
    /// Characters of the text so far, for `text_offset`.
    characters: usize,
}

/// The prompt in front of an answer.
#[derive(Debug, Clone)]
pub(crate) struct Echo {
    pub text: String,
    /// The prompt's first token is none of the client's, who did not write it.
    pub hides_first: bool,
    /// Nothing is wanted but this.
    pub alone: bool,
}

impl Choice {
    pub fn new(events: Events, index: usize, counts_prompt: bool) -> Choice {
        Choice {
            events: Some(events),
            index,
            counts_prompt,
            echo: None,
            calls: None,
            calls_told: 0,
            characters: 0,
        }
    }

    pub fn with_echo(self, echo: Option<Echo>) -> Choice {
        Choice { echo, ..self }
    }

    /// Finds calls of the tools with these names in the text.
    pub fn with_tools(self, names: Option<Vec<String>>) -> Choice {
        Choice { calls: names.map(CallFinder::new), ..self }
    }

    /// The answer itself is not wanted.
    fn is_echo_alone(&self) -> bool {
        self.echo.as_ref().is_some_and(|echo| echo.alone)
    }

    /// What a part of the text turns out to be.
    fn pieces(&mut self, text: &str) -> Vec<Piece> {
        match &mut self.calls {
            Some(calls) => calls.push(text),
            None if text.is_empty() => Vec::new(),
            None => vec![Piece::Text(text.to_owned())],
        }
    }

    fn last_pieces(&mut self, text: &str) -> Vec<Piece> {
        let mut pieces = self.pieces(text);
        pieces.extend(self.calls.iter_mut().flat_map(CallFinder::finish));
        pieces
    }

    /// A call as the interface writes it.
    fn call_json(&mut self, call: Call, with_index: bool) -> Value {
        let mut value = json!({
            "id": format!("call_{:016x}", random()),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        });
        if with_index {
            value["index"] = Value::from(self.calls_told);
        }
        self.calls_told += 1;
        value
    }

    /// The word for a regular end, or why it is none.
    fn finish_word(&self, reason: &FinishReason) -> Result<&'static str, Refusal> {
        match finish_word(reason)? {
            _ if self.is_echo_alone() => Ok("length"),
            "stop" if self.calls_told > 0 => Ok("tool_calls"),
            word => Ok(word),
        }
    }

    /// The tokens of the prompt that the client knows of.
    fn told_prompt<'t>(&self, tokens: &'t [GeneratedToken]) -> &'t [GeneratedToken] {
        let hides_first = self.echo.as_ref().is_some_and(|echo| echo.hides_first);
        tokens.get(usize::from(hides_first)..).unwrap_or_default()
    }
}

/// Tokens and times of all answers of a request.
#[derive(Debug, Default)]
struct Sums {
    usage: Usage,
    /// Of the answer that took longest.
    timings: Timings,
}

impl Sums {
    fn add(&mut self, choice: &Choice, done: &Done) {
        if choice.counts_prompt {
            self.usage.prompt_tokens += done.usage.prompt_tokens;
            self.usage.cached_tokens += done.usage.cached_tokens;
        }
        if !choice.is_echo_alone() {
            self.usage.generated_tokens += done.usage.generated_tokens;
        }
        if done.timings.total >= self.timings.total {
            self.timings = done.timings;
        }
    }
}

/// The next event of whichever answer has one, with the answer's place; those behind `first` are asked first.
fn poll_any(
    choices: &mut [Choice],
    first: usize,
    context: &mut Context<'_>,
) -> Poll<Option<(usize, Option<Event>)>> {
    let count = choices.len();
    let mut open = false;
    for index in (0..count).map(|i| (first + i) % count) {
        let Some(events) = &mut choices[index].events else { continue };
        open = true;
        if let Poll::Ready(event) = events.poll_recv(context) {
            return Poll::Ready(Some((index, event)));
        }
    }
    if open { Poll::Pending } else { Poll::Ready(None) }
}

impl Head {
    pub fn new(shared: &Shared, flavour: Flavour, stream: bool, include_usage: bool, logprobs: bool) -> Head {
        let prefix = if flavour == Flavour::Chat { "chatcmpl" } else { "cmpl" };
        Head {
            flavour,
            stream,
            include_usage,
            logprobs,
            id: format!("{prefix}-{:016x}{:016x}", random(), random()),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs()),
            model: shared.options.model_id.clone(),
            keep_alive: shared.options.keep_alive,
            tokenizer: Arc::clone(shared.scheduler.tokenizer()),
        }
    }

    fn object(&self) -> &'static str {
        match (self.flavour, self.stream) {
            (Flavour::Chat, true) => "chat.completion.chunk",
            (Flavour::Chat, false) => "chat.completion",
            (Flavour::Completion, _) => "text_completion",
        }
    }

    fn envelope(&self, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": self.object(),
            "created": self.created,
            "model": self.model,
            "system_fingerprint": concat!("lightering-", env!("CARGO_PKG_VERSION")),
            "choices": choices,
        })
    }

    /// The text of a token and its bytes; those are what counts where a character has several tokens.
    fn spelling(&self, token: u32) -> (String, Vec<u8>) {
        let bytes = self.tokenizer.token_bytes(token).unwrap_or_default();
        (String::from_utf8_lossy(bytes).into_owned(), bytes.to_vec())
    }

    /// The log-probabilities of some tokens of the answer.
    fn log_probabilities(&self, tokens: &[GeneratedToken], characters: &mut usize) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        match self.flavour {
            Flavour::Chat => {
                let entry = |token: u32, logprob: Option<f32>| {
                    let (text, bytes) = self.spelling(token);
                    json!({"token": text, "logprob": logprob, "bytes": bytes})
                };
                let content: Vec<Value> = tokens
                    .iter()
                    .map(|token| {
                        let mut value = entry(token.id, token.log_probability);
                        let top = token.top.iter().map(|top| entry(top.token, Some(top.log_probability)));
                        value["top_logprobs"] = top.collect();
                        value
                    })
                    .collect();
                json!({"content": content, "refusal": null})
            }
            Flavour::Completion => {
                let mut offsets = Vec::new();
                let mut texts = Vec::new();
                let mut tops = Vec::new();
                for token in tokens {
                    let (text, _) = self.spelling(token.id);
                    offsets.push(*characters);
                    *characters += text.chars().count();
                    let top: serde_json::Map<String, Value> = token
                        .top
                        .iter()
                        .map(|top| (self.spelling(top.token).0, Value::from(top.log_probability)))
                        .collect();
                    // Of the first token of a prompt nothing is known.
                    tops.push(if token.log_probability.is_some() { Value::Object(top) } else { Value::Null });
                    texts.push(text);
                }
                let logprobs: Vec<Option<f32>> = tokens.iter().map(|token| token.log_probability).collect();
                json!({
                    "tokens": texts,
                    "token_logprobs": logprobs,
                    "top_logprobs": tops,
                    "text_offset": offsets,
                })
            }
        }
    }

    /// A part of a stream.
    fn chunk(&self, index: usize, delta: &Value, logprobs: &Value, finish: Option<&str>) -> Value {
        let choice = match self.flavour {
            Flavour::Chat => {
                let delta = match delta {
                    Value::String(text) => json!({"content": text}),
                    other => other.clone(),
                };
                json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish})
            }
            Flavour::Completion => {
                let text = delta.as_str().unwrap_or_default();
                json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish})
            }
        };
        let mut value = self.envelope(json!([choice]));
        if self.include_usage {
            value["usage"] = Value::Null;
        }
        value
    }
}

fn usage_json(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.generated_tokens,
        "total_tokens": usage.prompt_tokens + usage.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    })
}

/// Beyond OpenAI's interface: how long it took, in seconds.
fn timings_json(timings: &Timings) -> Value {
    json!({
        "queue_s": timings.queue.0,
        "first_token_s": timings.first_token.map(|s| s.0),
        "inter_token_mean_s": timings.inter_token_mean.map(|s| s.0),
        "inter_token_max_s": timings.inter_token_max.map(|s| s.0),
        "total_s": timings.total.0,
        "drafted_tokens": timings.drafted_tokens,
        "accepted_tokens": timings.accepted_tokens,
        "preemptions": timings.preemptions,
    })
}

/// The word for a regular end, or why it is none.
fn finish_word(reason: &FinishReason) -> Result<&'static str, Refusal> {
    match reason {
        FinishReason::Stop => Ok("stop"),
        FinishReason::Length => Ok("length"),
        FinishReason::Cancelled => Err(Refusal::draining()),
        FinishReason::Error(message) => Err(Refusal::internal(message.clone())),
        _ => Err(Refusal::internal("the answer ended for a reason that this server does not know")),
    }
}

fn model_stopped() -> Refusal {
    Refusal::internal("the model stopped working; the server has to be started again")
}

/// What is known of an answer that is sent as a whole.
#[derive(Default)]
struct Gathered {
    text: String,
    calls: Vec<Value>,
    tokens: Vec<GeneratedToken>,
    finish: &'static str,
}

impl Gathered {
    fn add(&mut self, choice: &mut Choice, pieces: Vec<Piece>) {
        for piece in pieces {
            match piece {
                Piece::Text(text) => self.text.push_str(&text),
                Piece::Call(call) => self.calls.push(choice.call_json(call, false)),
            }
        }
    }

    fn json(self, head: &Head, choice: &mut Choice) -> Value {
        let logprobs = head.log_probabilities(&self.tokens, &mut choice.characters);
        match head.flavour {
            Flavour::Chat => {
                let mut message = json!({"role": "assistant", "content": self.text, "refusal": null});
                if !self.calls.is_empty() {
                    if self.text.is_empty() {
                        message["content"] = Value::Null;
                    }
                    message["tool_calls"] = Value::from(self.calls);
                }
                json!({
                    "index": choice.index,
                    "message": message,
                    "logprobs": logprobs,
                    "finish_reason": self.finish,
                })
            }
            Flavour::Completion => json!({
                "index": choice.index,
                "text": self.text,
                "logprobs": logprobs,
                "finish_reason": self.finish,
            }),
        }
    }
}

/// Waits for the whole answers.
pub(crate) async fn whole(mut choices: Vec<Choice>, head: Head) -> Result<Response, Refusal> {
    let mut gathered: Vec<Gathered> = choices.iter().map(|_| Gathered::default()).collect();
    for (gathered, choice) in gathered.iter_mut().zip(&choices) {
        gathered.text.extend(choice.echo.iter().map(|echo| echo.text.as_str()));
    }
    let mut sums = Sums::default();
    let mut last = 0;
    while let Some((index, event)) = poll_fn(|context| poll_any(&mut choices, last + 1, context)).await {
        last = index;
        let (choice, gathered) = (&mut choices[index], &mut gathered[index]);
        match event {
            Some(Event::Prompt(tokens)) => gathered.tokens.extend_from_slice(choice.told_prompt(&tokens)),
            Some(Event::Token(_)) if choice.is_echo_alone() => {}
            Some(Event::Token(token)) => {
                let pieces = choice.pieces(&token.text);
                gathered.add(choice, pieces);
                if head.logprobs {
                    gathered.tokens.push(token);
                }
            }
            Some(Event::Done(done)) => {
                choice.events = None;
                if !choice.is_echo_alone() {
                    let pieces = choice.last_pieces(&done.text);
                    gathered.add(choice, pieces);
                }
                gathered.finish = choice.finish_word(&done.reason)?;
                sums.add(choice, &done);
            }
            Some(_) => {}
            None => return Err(model_stopped()),
        }
    }
    let all: Vec<Value> = gathered.into_iter().zip(&mut choices).map(|(g, c)| g.json(&head, c)).collect();
    let mut value = head.envelope(Value::from(all));
    value["usage"] = usage_json(sums.usage);
    value["timings"] = timings_json(&sums.timings);
    Ok(json_response(StatusCode::OK, &value))
}

/// The answers as server-sent events.
pub(crate) fn streamed(choices: Vec<Choice>, head: Head) -> Response {
    let mut ready = VecDeque::new();
    for choice in &choices {
        if head.flavour == Flavour::Chat {
            let begin = json!({"role": "assistant", "content": ""});
            ready.push_back(event(&head.chunk(choice.index, &begin, &Value::Null, None)));
        }
        // With its log-probabilities, it comes when those are known.
        if let Some(echo) = choice.echo.as_ref().filter(|_| !head.logprobs) {
            ready.push_back(event(&head.chunk(
                choice.index,
                &Value::from(echo.text.as_str()),
                &Value::Null,
                None,
            )));
        }
    }
    let timer = Box::pin(sleep(head.keep_alive));
    let stream = AnswerStream { choices, head, ready, timer, sums: Sums::default(), last: 0 };
    let mut response = Response::new(Body::from_stream(stream));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies would otherwise wait for more.
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}

fn event(value: &Value) -> Bytes {
    Bytes::from(format!("data: {value}\n\n"))
}

struct AnswerStream {
    /// Empty behind the end.
    choices: Vec<Choice>,
    head: Head,
    ready: VecDeque<Bytes>,
    timer: Pin<Box<Sleep>>,
    sums: Sums,
    /// The choice that had an event last.
    last: usize,
}

impl AnswerStream {
    /// Sends pieces of a choice; `logprobs` go with the first of them.
    fn send(&mut self, index: usize, pieces: Vec<Piece>, mut logprobs: Value) {
        let Self { choices, head, ready, .. } = self;
        let choice = &mut choices[index];
        let deltas: Vec<Value> = pieces
            .into_iter()
            .map(|piece| match piece {
                Piece::Text(text) => Value::from(text),
                Piece::Call(call) => json!({"tool_calls": [choice.call_json(call, true)]}),
            })
            .collect();
        let nothing = deltas.is_empty() && !logprobs.is_null();
        for delta in deltas.into_iter().chain(nothing.then(|| Value::from(""))) {
            ready.push_back(event(&head.chunk(choice.index, &delta, &logprobs.take(), None)));
        }
    }

    fn take_event(&mut self, index: usize, received: Option<Event>) {
        let choice = &mut self.choices[index];
        match received {
            Some(Event::Prompt(tokens)) => {
                let tokens = choice.told_prompt(&tokens);
                let logprobs = self.head.log_probabilities(tokens, &mut choice.characters);
                let text = choice.echo.as_ref().map(|echo| echo.text.clone()).unwrap_or_default();
                self.send(index, vec![Piece::Text(text)], logprobs);
            }
            Some(Event::Token(_)) if choice.is_echo_alone() => {}
            Some(Event::Token(token)) => {
                let pieces = choice.pieces(&token.text);
                let tokens = std::slice::from_ref(&token);
                let logprobs = self.head.log_probabilities(tokens, &mut choice.characters);
                self.send(index, pieces, logprobs);
            }
            Some(Event::Done(done)) => self.finish(index, &done),
            Some(_) => {}
            None => self.fail(&model_stopped()),
        }
    }

    fn fail(&mut self, refusal: &Refusal) {
        // What is left of the other answers is of no use to anybody.
        self.choices.clear();
        self.ready.push_back(event(&refusal.json()));
    }

    fn finish(&mut self, index: usize, done: &Done) {
        let choice = &mut self.choices[index];
        choice.events = None;
        self.sums.add(choice, done);
        if !choice.is_echo_alone() {
            let pieces = choice.last_pieces(&done.text);
            self.send(index, pieces, Value::Null);
        }
        let (choice, head) = (&self.choices[index], &self.head);
        let finish = match choice.finish_word(&done.reason) {
            Ok(finish) => finish,
            Err(refusal) => return self.fail(&refusal),
        };
        let nothing = if head.flavour == Flavour::Chat { json!({}) } else { json!("") };
        self.ready.push_back(event(&head.chunk(choice.index, &nothing, &Value::Null, Some(finish))));
        if self.choices.iter().any(|choice| choice.events.is_some()) {
            return;
        }
        self.choices.clear();
        if self.head.include_usage {
            let mut value = self.head.envelope(json!([]));
            value["usage"] = usage_json(self.sums.usage);
            value["timings"] = timings_json(&self.sums.timings);
            self.ready.push_back(event(&value));
        }
        self.ready.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
    }
}

impl futures_core::Stream for AnswerStream {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if let Some(bytes) = this.ready.pop_front() {
                let next = Instant::now() + this.head.keep_alive;
                this.timer.as_mut().reset(next);
                return Poll::Ready(Some(Ok(bytes)));
            }
            match poll_any(&mut this.choices, this.last + 1, context) {
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Ready(Some((index, received))) => {
                    this.last = index;
                    this.take_event(index, received);
                }
                Poll::Pending => {
                    if this.timer.as_mut().poll(context).is_pending() {
                        return Poll::Pending;
                    }
                    // A comment, which clients skip: it keeps proxies from giving up.
                    this.ready.push_back(Bytes::from_static(b": waiting\n\n"));
                }
            }
        }
    }
}
