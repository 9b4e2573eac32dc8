//! `/metrics`: the counters as Prometheus reads them (text format 0.0.4).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use axum::response::Response;
use lightering_lm::LatencyHistogram;

use crate::state::Shared;

/// Answers by path and status.
#[derive(Debug, Default)]
pub(crate) struct HttpCounters {
    counts: Mutex<BTreeMap<(&'static str, u16), u64>>,
}

impl HttpCounters {
    pub fn count(&self, path: &'static str, status: u16) {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner).entry((path, status)).or_default() += 1;
    }

    pub fn all(&self) -> BTreeMap<(&'static str, u16), u64> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Writing to a String cannot fail, so results are dropped here.
struct Page(String);

impl Page {
    fn describe(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn counter(&mut self, name: &str, help: &str, value: f64) {
        self.describe(name, "counter", help);
        let _ = writeln!(self.0, "{name} {value}");
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.describe(name, "gauge", help);
        let _ = writeln!(self.0, "{name} {value}");
    }

    fn labelled(&mut self, name: &str, label: &str, values: &[(&str, u64)]) {
        for (value, count) in values {
            let _ = writeln!(self.0, "{name}{{{label}=\"{value}\"}} {count}");
        }
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &LatencyHistogram) {
        self.describe(name, "histogram", help);
        let mut sum = 0;
        for (bound, count) in LatencyHistogram::BOUNDS.iter().zip(histogram.counts) {
            sum += count;
            let _ = writeln!(self.0, "{name}_bucket{{le=\"{bound}\"}} {sum}");
        }
        let _ = writeln!(self.0, "{name}_bucket{{le=\"+Inf\"}} {}", histogram.count);
        let _ = writeln!(self.0, "{name}_sum {}\n{name}_count {}", histogram.sum.0, histogram.count);
    }
}

fn render(shared: &Shared) -> String {
    let state = shared.scheduler.state();
    let c = state.counters;
    let mut page = Page(String::new());
    let name = "lighter_server_responses_total";
    page.describe(name, "counter", "Answers by path and status.");
    for ((path, status), count) in shared.http.all() {
        let _ = writeln!(page.0, "{name}{{path=\"{path}\",status=\"{status}\"}} {count}");
    }
    let connections = shared.connections.load(Ordering::Relaxed);
    page.gauge("lighter_server_connections", "Open connections.", connections as f64);
    let name = "lighter_lm_requests_total";
    page.describe(name, "counter", "Requests by how they ended.");
    page.labelled(
        name,
        "end",
        &[
            ("stop", c.requests_stopped),
            ("length", c.requests_length),
            ("cancelled", c.requests_cancelled),
            ("error", c.requests_failed),
            ("refused", c.requests_refused),
        ],
    );
    for (name, help, value) in [
        ("lighter_lm_generated_tokens_total", "Tokens of answers.", c.generated_tokens),
        ("lighter_lm_prefill_tokens_total", "Tokens of prompts that were computed.", c.prefill_tokens),
        ("lighter_lm_embedded_tokens_total", "Tokens whose embeddings were computed.", c.embedded_tokens),
        (
            "lighter_lm_prefix_lookup_tokens_total",
            "Tokens of prompts looked up in the cache.",
            c.prefix_lookup_tokens,
        ),
        ("lighter_lm_prefix_hit_tokens_total", "Tokens of prompts found in the cache.", c.prefix_hit_tokens),
        ("lighter_lm_drafted_tokens_total", "Tokens drafted by n-gram lookup.", c.drafted_tokens),
        ("lighter_lm_accepted_tokens_total", "Drafted tokens that were right.", c.accepted_tokens),
        ("lighter_lm_steps_total", "Steps of the model.", c.steps),
        ("lighter_lm_steps_failed_total", "Steps of the model that failed.", c.steps_failed),
        ("lighter_lm_rows_total", "Rows of all steps.", c.rows),
        ("lighter_lm_decode_rows_total", "Rows that continued answers.", c.decode_rows),
        ("lighter_lm_preemptions_total", "Sequences whose cache pages were taken.", c.preemptions),
        ("lighter_lm_read_bytes_total", "Weight bytes read.", c.bytes_read.0),
    ] {
        page.counter(name, help, value as f64);
    }
    page.counter("lighter_lm_step_seconds_total", "Time of all steps.", c.step_time.0);
    page.counter("lighter_lm_stall_seconds_total", "Time spent waiting for weights.", c.stall_time.0);
    for (name, help, value) in [
        ("lighter_lm_running_sequences", "Sequences that are computed side by side.", state.running),
        ("lighter_lm_queued_requests", "Requests that wait.", state.queued),
        ("lighter_lm_batch_rows", "Rows of the last step.", state.batch_rows),
        ("lighter_lm_cache_pages_held", "Cache pages that sequences hold.", state.pages_held),
        ("lighter_lm_cache_pages_cached", "Cache pages kept for later requests.", state.pages_cached),
        ("lighter_lm_cache_pages", "All cache pages.", state.pages_total),
    ] {
        page.gauge(name, help, value as f64);
    }
    page.histogram("lighter_lm_first_token_seconds", "Time from asking to the first token.", &c.first_token);
    page.histogram(
        "lighter_lm_inter_token_seconds",
        "Time between two tokens of a sequence.",
        &c.inter_token,
    );
    let status = shared.status();
    if let Some(budget) = status.memory_budget {
        page.gauge("lighter_lm_memory_budget_bytes", "Most memory that the model may hold.", budget.0 as f64);
    }
    if let Some(used) = status.memory_used {
        page.gauge("lighter_lm_memory_used_bytes", "Memory that the model holds.", used.0 as f64);
    }
    if let Some(experts) = status.experts {
        let resident = experts.tiers.iter().filter(|tier| **tier == 0).count();
        page.gauge("lighter_lm_experts_resident", "Experts in memory.", resident as f64);
        page.counter("lighter_lm_expert_lookups_total", "Look-ups of experts.", experts.lookups as f64);
        page.counter("lighter_lm_expert_hits_total", "Look-ups of experts in memory.", experts.hits as f64);
    }
    page.0
}

pub(crate) async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let mut response = Response::new(Body::from(render(&shared)));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
