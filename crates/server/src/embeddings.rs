//! `/v1/embeddings`

use std::collections::VecDeque;
use std::future::poll_fn;

use axum::http::StatusCode;
use axum::response::Response;
use lightering_lm::{Event, Events, FinishReason};
use serde_json::{Value, json};

use crate::base64;
use crate::completions::Texts;
use crate::fields::{Fields, shortened};
use crate::refusal::{Refusal, json_response};
use crate::state::Shared;

/// Most texts of one request.
const TEXTS_MAX: usize = 2048;

/// So many texts of one request are computed side by side, so that it does not fill the queue alone.
const SIDE_BY_SIDE: usize = 4;

/// What was asked for.
#[derive(Debug)]
pub(crate) struct EmbeddingRequest {
    texts: Vec<Vec<u32>>,
    as_base64: bool,
}

/// Understands a request.
pub(crate) fn prepare(shared: &Shared, body: &[u8]) -> Result<EmbeddingRequest, Refusal> {
    let mut fields = Fields::parse(body)?;
    fields.model(&shared.options.model_id)?;
    let texts: Texts = fields.need("input", Texts::EXPECTED)?;
    if !(1..=TEXTS_MAX).contains(&texts.count()) {
        let count = texts.count();
        return Err(Refusal::field("input", format!("`input` has {count} texts; expected 1 to {TEXTS_MAX}")));
    }
    let format: Option<String> = fields.take("encoding_format", "float or base64")?;
    let as_base64 = match format.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(other) => {
            let message = format!("`encoding_format` is {:?}; expected float or base64", shortened(other));
            return Err(Refusal::field("encoding_format", message));
        }
    };
    let width = shared.scheduler.limits().embedding_len;
    if let Some(dimensions) = fields.take::<usize>("dimensions", "a whole number")?
        && dimensions != width
    {
        let message = format!("`dimensions` is {dimensions}; expected {width}, the width of this model");
        return Err(Refusal::field("dimensions", message));
    }
    fields.finish()?;
    Ok(EmbeddingRequest { texts: texts.into_tokens(shared.scheduler.tokenizer(), "input")?, as_base64 })
}

/// Computes and answers.
pub(crate) async fn answer(shared: &Shared, request: EmbeddingRequest) -> Result<Response, Refusal> {
    let mut tokens = 0;
    let mut data = Vec::with_capacity(request.texts.len());
    let mut waiting: VecDeque<Events> = VecDeque::new();
    let mut texts = request.texts.into_iter();
    loop {
        while waiting.len() < SIDE_BY_SIDE {
            let Some(text) = texts.next() else { break };
            tokens += text.len();
            let events = match shared.scheduler.embed(text) {
                Ok(events) => events,
                Err(error) => return Err(Refusal::from_lm(&error, Some("input"))),
            };
            waiting.push_back(events);
        }
        let Some(mut events) = waiting.pop_front() else { break };
        let values = receive(&mut events).await?;
        let index = data.len();
        let embedding = if request.as_base64 {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            Value::from(base64::encode(&bytes))
        } else {
            Value::from(values)
        };
        data.push(json!({"object": "embedding", "index": index, "embedding": embedding}));
    }
    let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
    let body = json!({"object": "list", "data": data, "model": shared.options.model_id, "usage": usage});
    Ok(json_response(StatusCode::OK, &body))
}

async fn receive(events: &mut Events) -> Result<Vec<f32>, Refusal> {
    let mut values = None;
    loop {
        match poll_fn(|context| events.poll_recv(context)).await {
            Some(Event::Embedding(embedding)) => values = Some(embedding),
            Some(Event::Done(done)) => {
                return match (done.reason, values) {
                    (FinishReason::Error(message), _) => Err(Refusal::internal(message)),
                    (FinishReason::Cancelled, _) => Err(Refusal::draining()),
                    (_, Some(values)) => Ok(values),
                    (_, None) => Err(Refusal::internal("the model gave no embedding")),
                };
            }
            Some(_) => {}
            None => return Err(Refusal::internal("the model stopped working")),
        }
    }
}
