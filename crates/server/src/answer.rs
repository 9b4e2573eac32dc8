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
    /// Characters of the answer so far, for `text_offset`.
    characters: usize,
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
            characters: 0,
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
    fn log_probabilities(&mut self, tokens: &[GeneratedToken]) -> Value {
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
                    offsets.push(self.characters);
                    self.characters += text.chars().count();
                    let top: serde_json::Map<String, Value> = token
                        .top
                        .iter()
                        .map(|top| (self.spelling(top.token).0, Value::from(top.log_probability)))
                        .collect();
                    tops.push(Value::Object(top));
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
    fn chunk(&self, delta: &Value, logprobs: &Value, finish: Option<&str>) -> Value {
        let choice = match self.flavour {
            Flavour::Chat => {
                let delta = match delta {
                    Value::String(text) => json!({"content": text}),
                    other => other.clone(),
                };
                json!({"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish})
            }
            Flavour::Completion => {
                let text = delta.as_str().unwrap_or_default();
                json!({"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish})
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

/// Waits for the whole answer.
pub(crate) async fn whole(mut events: Events, mut head: Head) -> Result<Response, Refusal> {
    let mut text = String::new();
    let mut tokens: Vec<GeneratedToken> = Vec::new();
    loop {
        match poll_fn(|context| events.poll_recv(context)).await {
            Some(Event::Token(token)) => {
                text.push_str(&token.text);
                if head.logprobs {
                    tokens.push(token);
                }
            }
            Some(Event::Done(done)) => {
                text.push_str(&done.text);
                let finish = finish_word(&done.reason)?;
                let logprobs = head.log_probabilities(&tokens);
                let choice = match head.flavour {
                    Flavour::Chat => json!({
                        "index": 0,
                        "message": {"role": "assistant", "content": text, "refusal": null},
                        "logprobs": logprobs,
                        "finish_reason": finish,
                    }),
                    Flavour::Completion => json!({
                        "index": 0,
                        "text": text,
                        "logprobs": logprobs,
                        "finish_reason": finish,
                    }),
                };
                let mut value = head.envelope(json!([choice]));
                value["usage"] = usage_json(done.usage);
                value["timings"] = timings_json(&done.timings);
                return Ok(json_response(StatusCode::OK, &value));
            }
            Some(_) => {}
            None => return Err(model_stopped()),
        }
    }
}

/// The answer as server-sent events.
pub(crate) fn streamed(events: Events, head: Head) -> Response {
    let mut ready = VecDeque::new();
    if head.flavour == Flavour::Chat {
        ready.push_back(event(&head.chunk(&json!({"role": "assistant", "content": ""}), &Value::Null, None)));
    }
    let timer = Box::pin(sleep(head.keep_alive));
    let stream = AnswerStream { events: Some(events), head, ready, timer };
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
    /// `None` behind the end.
    events: Option<Events>,
    head: Head,
    ready: VecDeque<Bytes>,
    timer: Pin<Box<Sleep>>,
}

impl AnswerStream {
    fn take_event(&mut self, received: Option<Event>) {
        match received {
            Some(Event::Token(token)) => {
                if token.text.is_empty() && !self.head.logprobs {
                    return;
                }
                let logprobs = self.head.log_probabilities(std::slice::from_ref(&token));
                let chunk = self.head.chunk(&Value::from(token.text), &logprobs, None);
                self.ready.push_back(event(&chunk));
            }
            Some(Event::Done(done)) => {
                self.events = None;
                self.finish(&done);
            }
            Some(_) => {}
            None => {
                self.events = None;
                self.ready.push_back(event(&model_stopped().json()));
            }
        }
    }

    fn finish(&mut self, done: &Done) {
        let head = &self.head;
        if !done.text.is_empty() {
            self.ready.push_back(event(&head.chunk(&Value::from(done.text.as_str()), &Value::Null, None)));
        }
        match finish_word(&done.reason) {
            Ok(finish) => {
                let nothing = if head.flavour == Flavour::Chat { json!({}) } else { json!("") };
                self.ready.push_back(event(&head.chunk(&nothing, &Value::Null, Some(finish))));
                if head.include_usage {
                    let mut value = head.envelope(json!([]));
                    value["usage"] = usage_json(done.usage);
                    value["timings"] = timings_json(&done.timings);
                    self.ready.push_back(event(&value));
                }
                self.ready.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
            }
            Err(refusal) => self.ready.push_back(event(&refusal.json())),
        }
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
            let Some(events) = &mut this.events else { return Poll::Ready(None) };
            match events.poll_recv(context) {
                Poll::Ready(received) => this.take_event(received),
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
