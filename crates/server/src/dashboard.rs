//! The dashboard: one page, and the state that it asks for every second.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::body::Body;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::Response;
use serde_json::json;

use crate::refusal::json_response;
use crate::state::Shared;

const PAGE: &str = include_str!("dashboard.html");

/// Everything that the page needs is in the page.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:";

pub(crate) async fn page() -> Response {
    let mut response = Response::new(Body::from(PAGE));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

pub(crate) async fn state(State(shared): State<Arc<Shared>>) -> Response {
    let limits = shared.scheduler.limits();
    let options = shared.scheduler.options();
    let status = shared.status();
    let body = json!({
        "schema": "lightering.dashboard/1",
        "version": env!("CARGO_PKG_VERSION"),
        "model": shared.options.model_id,
        "uptime_s": shared.started.elapsed().as_secs_f64(),
        "draining": shared.is_draining(),
        "connections": shared.connections.load(Ordering::Relaxed),
        "limits": {
            "sequences_max": options.sequences_max,
            "queue_max": options.queue_max,
            "sequence_len_max": limits.sequence_len_max,
            "page_len": limits.page_len,
        },
        "scheduler": shared.scheduler.state(),
        "status": status,
    });
    let mut response = json_response(StatusCode::OK, &body);
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
