//! Errors as OpenAI's interface writes them.

use axum::body::Body;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use lightering_lm::Error as LmError;
use serde_json::{Value, json};

/// Why a request gets no answer.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    pub status: StatusCode,
    pub message: String,
    /// The field of the request that is to blame.
    pub param: Option<String>,
    pub code: Option<&'static str>,
    pub retry_after_s: Option<u64>,
}

impl Refusal {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Refusal {
        Refusal { status, message: message.into(), param: None, code: None, retry_after_s: None }
    }

    /// A wrong field.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Refusal {
        Refusal { param: Some(param.into()), ..Refusal::new(StatusCode::BAD_REQUEST, message) }
    }

    /// A field that is understood, but not supported.
    pub fn unsupported(param: &str, what: &str) -> Refusal {
        let message = format!("{what} is not supported by this server; leave `{param}` out");
        Refusal { code: Some("unsupported_parameter"), ..Refusal::field(param, message) }
    }

    pub fn draining() -> Refusal {
        let message = "the server is shutting down and takes no more requests; try again later";
        Refusal {
            retry_after_s: Some(5),
            code: Some("shutting_down"),
            ..Refusal::new(StatusCode::SERVICE_UNAVAILABLE, message)
        }
    }

    pub fn internal(message: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// What the floors below say about a request; `param` is the field that they look at.
    pub fn from_lm(error: &LmError, param: Option<&str>) -> Refusal {
        let message = error.to_string();
        let bad = |code| Refusal {
            param: param.map(str::to_owned),
            code,
            ..Refusal::new(StatusCode::BAD_REQUEST, message.clone())
        };
        match error {
            LmError::Busy { waiting, .. } => Refusal {
                // Longer queues take longer to get shorter.
                retry_after_s: Some(1 + (*waiting as u64) / 16),
                code: Some("queue_full"),
                ..Refusal::new(StatusCode::TOO_MANY_REQUESTS, message)
            },
            LmError::Closed => Refusal::draining(),
            LmError::TooLong { prompt, answer, limit } => Refusal {
                message: format!(
                    "the model's context holds {limit} tokens, but {} were asked for: {prompt} in the prompt and {answer} for the answer; shorten the prompt or lower max_tokens",
                    prompt + answer
                ),
                ..bad(Some("context_length_exceeded"))
            },
            LmError::Internal(_) => Refusal::internal(message),
            LmError::Unsupported { .. } => bad(Some("unsupported_value")),
            _ => bad(None),
        }
    }

    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    pub fn json(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind(),
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = json_response(self.status, &self.json());
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// A JSON body.
pub(crate) fn json_response(status: StatusCode, value: &Value) -> Response {
    let mut response = Response::new(Body::from(value.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
