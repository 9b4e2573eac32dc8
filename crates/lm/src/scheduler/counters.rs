//! What the scheduler did, for metrics and dashboards.

use std::sync::{Mutex, PoisonError};

use lightering_units::{Bytes, Seconds};
use serde::Serialize;

use crate::ModelStatus;

/// Counts of times in ranges, for quantiles.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct LatencyHistogram {
    /// How many times are at most the bound of the same place, and above the one before.
    pub counts: [u64; LatencyHistogram::BOUNDS.len()],
    /// How many there are, those above all bounds included.
    pub count: u64,
    /// Their sum.
    pub sum: Seconds,
}

impl LatencyHistogram {
    /// Upper bounds of the ranges, in seconds.
    pub const BOUNDS: [f64; 14] =
        [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0];

    /// Counts a time.
    pub fn add(&mut self, time: Seconds) {
        if let Some(place) = Self::BOUNDS.iter().position(|bound| time.0 <= *bound) {
            self.counts[place] += 1;
        }
        self.count += 1;
        self.sum += time;
    }

    fn merge(&mut self, other: &LatencyHistogram) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(count, more)| *count += more);
        self.count += other.count;
        self.sum += other.sum;
    }
}

/// Totals since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Counters {
    /// Steps of the model.
    pub steps: u64,
    /// Rows of all steps.
    pub rows: u64,
    /// Part of them that continued running sequences, drafts included.
    pub decode_rows: u64,
    /// Tokens of prompts that were computed, again ones included.
    pub prefill_tokens: u64,
    /// Tokens of answers.
    pub generated_tokens: u64,
    /// Tokens whose embeddings were computed.
    pub embedded_tokens: u64,
    /// Tokens of prompts that were looked up in the cache.
    pub prefix_lookup_tokens: u64,
    /// Part of them that was found there.
    pub prefix_hit_tokens: u64,
    /// Tokens that were drafted.
    pub drafted_tokens: u64,
    /// Drafted tokens that were right.
    pub accepted_tokens: u64,
    /// How often a sequence had to give its pages back.
    pub preemptions: u64,
    /// Cache pages that were written to the spill.
    pub pages_spilled: u64,
    /// Cache pages that were brought back from there.
    pub pages_restored: u64,
    /// Time of all steps.
    pub step_time: Seconds,
    /// Part of it spent waiting for weights.
    pub stall_time: Seconds,
    /// Weight bytes read.
    pub bytes_read: Bytes,
    /// Steps that failed.
    pub steps_failed: u64,
    /// Requests that ended by themselves or at a stop string.
    pub requests_stopped: u64,
    /// Requests that ended at their longest length.
    pub requests_length: u64,
    /// Requests that nobody wanted any more.
    pub requests_cancelled: u64,
    /// Requests that could not be computed.
    pub requests_failed: u64,
    /// Requests that were refused since too many waited or the scheduler was closed.
    pub requests_refused: u64,
    /// Times from asking to the first token.
    pub first_token: LatencyHistogram,
    /// Times between two tokens of a sequence.
    pub inter_token: LatencyHistogram,
}

impl Counters {
    pub(super) fn add(&mut self, other: &Counters) {
        self.steps += other.steps;
        self.rows += other.rows;
        self.decode_rows += other.decode_rows;
        self.prefill_tokens += other.prefill_tokens;
        self.generated_tokens += other.generated_tokens;
        self.embedded_tokens += other.embedded_tokens;
        self.prefix_lookup_tokens += other.prefix_lookup_tokens;
        self.prefix_hit_tokens += other.prefix_hit_tokens;
        self.drafted_tokens += other.drafted_tokens;
        self.accepted_tokens += other.accepted_tokens;
        self.preemptions += other.preemptions;
        self.pages_spilled += other.pages_spilled;
        self.pages_restored += other.pages_restored;
        self.step_time += other.step_time;
        self.stall_time += other.stall_time;
        self.bytes_read += other.bytes_read;
        self.steps_failed += other.steps_failed;
        self.requests_stopped += other.requests_stopped;
        self.requests_length += other.requests_length;
        self.requests_cancelled += other.requests_cancelled;
        self.requests_failed += other.requests_failed;
        self.requests_refused += other.requests_refused;
        self.first_token.merge(&other.first_token);
        self.inter_token.merge(&other.inter_token);
    }
}

/// Totals, and what is under way now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct SchedulerState {
    /// Totals since the start.
    pub counters: Counters,
    /// Sequences that are computed side by side.
    pub running: usize,
    /// Requests that wait, those whose pages were taken included.
    pub queued: usize,
    /// Part of them that had started or are next.
    pub parked: usize,
    /// Rows of the last step.
    pub batch_rows: usize,
    /// Cache pages that sequences hold.
    pub pages_held: usize,
    /// Cache pages that nobody holds, but that are kept for requests that begin alike.
    pub pages_cached: usize,
    /// All cache pages.
    pub pages_total: usize,
    /// Pages that sequences hold of the cache of layers with a window, where that is one of its own.
    pub window_pages_held: usize,
    /// All of those pages.
    pub window_pages_total: usize,
}

#[derive(Debug, Default)]
pub(super) struct Telemetry {
    state: Mutex<(SchedulerState, ModelStatus)>,
}

impl Telemetry {
    fn with<T>(&self, change: impl FnOnce(&mut (SchedulerState, ModelStatus)) -> T) -> T {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn state(&self) -> SchedulerState {
        self.with(|state| state.0)
    }

    pub fn model_status(&self) -> ModelStatus {
        self.with(|state| state.1.clone())
    }

    pub fn update(&self, change: impl FnOnce(&mut Counters)) {
        self.with(|state| change(&mut state.0.counters));
    }

    pub fn set_now(&self, change: impl FnOnce(&mut SchedulerState)) {
        self.with(|state| change(&mut state.0));
    }

    pub fn set_model_status(&self, status: ModelStatus) {
        self.with(|state| state.1 = status);
    }
}
