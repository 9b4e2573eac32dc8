//! Which path leads where, and what stands in front of all of them.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_LENGTH};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use serde_json::json;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::answer::{self, Choice, Head};
use crate::refusal::{Refusal, json_response};
use crate::state::{BODY_UNIT, Shared};
use crate::{chat, completions, dashboard, embeddings, metrics};

/// Of a body that is too large, so much more is read and thrown away, so that the client gets to read why.
const OVERSIZE_READ_MAX: u64 = 64 << 20;

/// The paths that are known, for counting; others are counted together.
pub(crate) const PATHS: [&str; 8] = [
    "/",
    "/dashboard/state",
    "/health",
    "/metrics",
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
];

pub(crate) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/", get(dashboard::page))
        .route("/dashboard/state", get(dashboard::state))
        .route("/health", get(health))
        .route("/metrics", get(metrics::metrics))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/completions", post(post_completion))
        .route("/v1/chat/completions", post(post_chat))
        .route("/v1/embeddings", post(post_embeddings))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(Arc::clone(&shared), in_front))
        .with_state(shared)
}

/// Checks keys and counts what was answered.
async fn in_front(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    // The page itself holds nothing, and whoever watches the server's health should not need a key for that.
    let open = matches!(path, "/" | "/health");
    let known = PATHS.into_iter().find(|known| *known == path).unwrap_or("other");
    let key = request.headers().get(AUTHORIZATION).map(HeaderValue::as_bytes);
    let response = if open || shared.keys.accept(key) {
        next.run(request).await
    } else {
        let message = "no valid API key; expected the header `Authorization: Bearer KEY`";
        let refusal = Refusal::new(StatusCode::UNAUTHORIZED, message);
        let mut response = Refusal { code: Some("invalid_api_key"), ..refusal }.into_response();
        response.headers_mut().insert("www-authenticate", HeaderValue::from_static("Bearer"));
        response
    };
    shared.http.count(known, response.status().as_u16());
    response
}

async fn unknown(request: Request) -> Refusal {
    let path = crate::fields::shortened(request.uri().path());
    let message = format!("there is no {} {path}; expected one of {}", request.method(), PATHS.join(", "));
    Refusal { code: Some("unknown_url"), ..Refusal::new(StatusCode::NOT_FOUND, message) }
}

async fn wrong_method(request: Request) -> Refusal {
    let path = crate::fields::shortened(request.uri().path());
    let message = format!("{} is not possible on {path}; expected GET or POST", request.method());
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, message)
}

async fn health(State(shared): State<Arc<Shared>>) -> Response {
    if shared.is_draining() {
        return Refusal::draining().into_response();
    }
    json_response(StatusCode::OK, &json!({"status": "ok"}))
}

fn model_json(shared: &Shared) -> serde_json::Value {
    let limits = shared.scheduler.limits();
    json!({
        "id": shared.options.model_id,
        "object": "model",
        "created": 0,
        "owned_by": "lightering",
        "context_length": limits.sequence_len_max,
    })
}

async fn models(State(shared): State<Arc<Shared>>) -> Response {
    json_response(StatusCode::OK, &json!({"object": "list", "data": [model_json(&shared)]}))
}

async fn model(
    State(shared): State<Arc<Shared>>,
    axum::extract::Path(id): axum::extract::Path<String>,
) -> Response {
    if id == shared.options.model_id {
        return json_response(StatusCode::OK, &model_json(&shared));
    }
    let id = crate::fields::shortened(&id);
    let message = format!("the model {id:?} does not exist; this server has {:?}", shared.options.model_id);
    Refusal { code: Some("model_not_found"), ..Refusal::new(StatusCode::NOT_FOUND, message) }.into_response()
}

async fn post_chat(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    post_answer(shared, request, chat::prepare).await.unwrap_or_else(IntoResponse::into_response)
}

async fn post_completion(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    post_answer(shared, request, completions::prepare).await.unwrap_or_else(IntoResponse::into_response)
}

async fn post_answer(
    shared: Arc<Shared>,
    request: Request,
    prepare: fn(&Shared, &[u8]) -> Result<(Vec<Choice>, Head), Refusal>,
) -> Result<Response, Refusal> {
    let (choices, head) = prepared(&shared, request, prepare).await?;
    if head.stream { Ok(answer::streamed(choices, head)) } else { answer::whole(choices, head).await }
}

async fn post_embeddings(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let answer = async {
        let request = prepared(&shared, request, embeddings::prepare).await?;
        embeddings::answer(&shared, request).await
    };
    answer.await.unwrap_or_else(IntoResponse::into_response)
}

/// Reads a request and has it understood on a thread where that may take its time.
async fn prepared<T: Send + 'static>(
    shared: &Arc<Shared>,
    request: Request,
    prepare: fn(&Shared, &[u8]) -> Result<T, Refusal>,
) -> Result<T, Refusal> {
    if shared.is_draining() {
        return Err(Refusal::draining());
    }
    let (parts, body) = request.into_parts();
    let (body, room) = read_body(shared, &parts.headers, body).await?;
    let shared = Arc::clone(shared);
    let task = tokio::task::spawn_blocking(move || {
        let _room = room;
        prepare(&shared, &body)
    });
    task.await.unwrap_or_else(|_| Err(Refusal::internal("preparing the request failed; this is a bug")))
}

async fn read_body(
    shared: &Shared,
    headers: &HeaderMap,
    mut body: axum::body::Body,
) -> Result<(Bytes, OwnedSemaphorePermit), Refusal> {
    let limit = shared.options.body_bytes_max.0;
    let until = Instant::now() + shared.options.read_limit;
    let announced =
        headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<u64>().ok());
    let mut total = 0u64;
    let mut content = BytesMut::new();
    let room = if announced.is_some_and(|length| length > limit) {
        None
    } else {
        let units = announced.unwrap_or(limit).div_ceil(BODY_UNIT).min(u64::from(u32::MAX)) as u32;
        match Semaphore::try_acquire_many_owned(Arc::clone(&shared.bodies), units) {
            Ok(room) => Some(room),
            Err(_) => {
                let message = "too many large requests at one time; try again later";
                let refusal = Refusal::new(StatusCode::SERVICE_UNAVAILABLE, message);
                return Err(Refusal { retry_after_s: Some(1), code: Some("overloaded"), ..refusal });
            }
        }
    };
    loop {
        let frame = match timeout_at(until, body.frame()).await {
            Ok(None) => break,
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(error))) => {
                let message = format!("the body ended too early: {error}");
                return Err(Refusal::new(StatusCode::BAD_REQUEST, message));
            }
            Err(_) => {
                let seconds = shared.options.read_limit.as_secs();
                let message = format!("the body did not arrive within {seconds} s");
                return Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, message));
            }
        };
        let Ok(data) = frame.into_data() else { continue };
        total += data.len() as u64;
        if total <= limit {
            content.extend_from_slice(&data);
        } else {
            content = BytesMut::new();
        }
        if total > limit + OVERSIZE_READ_MAX {
            break;
        }
    }
    match room {
        Some(room) if total <= limit => Ok((content.freeze(), room)),
        _ => {
            let found = announced.unwrap_or(total);
            let message = format!("the body has {found} bytes or more, and the limit is {limit}");
            Err(Refusal {
                code: Some("request_too_large"),
                ..Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, message)
            })
        }
    }
}
