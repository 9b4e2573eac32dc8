//! Times per node that cost two clock readings each.

use lightering_units::{Bytes, Seconds};
use std::collections::HashMap;
use std::time::Instant;

/// Wall time since its start.
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    /// Starts now.
    pub fn start() -> Stopwatch {
        Stopwatch(Instant::now())
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Seconds {
        Seconds(self.0.elapsed().as_secs_f64())
    }
}

/// A span's name as a number, so that the hot path handles no text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Label(u32);

/// What all spans of one label add up to.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SpanTotal {
    /// The label's text.
    pub name: String,
    /// How many spans were recorded.
    pub count: u64,
    /// Their sum.
    pub total: Seconds,
    /// The shortest.
    pub min: Seconds,
    /// The longest.
    pub max: Seconds,
    /// Bytes that were read or written in them, as the caller counts.
    pub bytes: Bytes,
}

/// Adds up spans by label; owned by the thread that runs the plan, switched off by default.
///
/// ```
/// use lightering_meter::SpanRecorder;
/// let mut spans = SpanRecorder::enabled();
/// let conv = spans.label("conv1");
/// let watch = spans.start();
/// spans.stop(conv, watch);
/// assert_eq!(spans.totals()[0].count, 1);
/// ```
#[derive(Debug, Default)]
pub struct SpanRecorder {
    enabled: bool,
    labels: HashMap<String, Label>,
    totals: Vec<SpanTotal>,
}

impl SpanRecorder {
    /// A recorder that ignores everything and reads no clock.
    pub fn disabled() -> SpanRecorder {
        SpanRecorder::default()
    }

    /// A recorder that records.
    pub fn enabled() -> SpanRecorder {
        SpanRecorder { enabled: true, ..SpanRecorder::default() }
    }

    /// True when spans are recorded.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// The label with this text, created at first use.
    pub fn label(&mut self, name: &str) -> Label {
        if let Some(label) = self.labels.get(name) {
            return *label;
        }
        let label = Label(u32::try_from(self.totals.len()).expect("fewer than 2^32 labels"));
        self.labels.insert(name.to_owned(), label);
        self.totals.push(SpanTotal {
            name: name.to_owned(),
            count: 0,
            total: Seconds(0.0),
            min: Seconds(f64::INFINITY),
            max: Seconds(0.0),
            bytes: Bytes::ZERO,
        });
        label
    }

    /// Begins a span; `None` when disabled.
    #[inline]
    pub fn start(&self) -> Option<Stopwatch> {
        self.enabled.then(Stopwatch::start)
    }

    /// Ends a span that [`start`](Self::start) began.
    #[inline]
    pub fn stop(&mut self, label: Label, watch: Option<Stopwatch>) {
        if let Some(watch) = watch {
            self.add(label, watch.elapsed(), Bytes::ZERO);
        }
    }

    /// Records a span of known length.
    pub fn add(&mut self, label: Label, length: Seconds, bytes: Bytes) {
        if !self.enabled {
            return;
        }
        let total = &mut self.totals[label.0 as usize];
        total.count += 1;
        total.total += length;
        total.min = Seconds(total.min.0.min(length.0));
        total.max = total.max.max(length);
        total.bytes += bytes;
    }

    /// The totals of every label that was recorded at least once, in the order of their creation.
    pub fn totals(&self) -> Vec<SpanTotal> {
        self.totals.iter().filter(|t| t.count > 0).cloned().collect()
    }

    /// Forgets the recorded spans and keeps the labels.
    pub fn reset(&mut self) {
        for total in &mut self.totals {
            (total.count, total.bytes) = (0, Bytes::ZERO);
            (total.total, total.min, total.max) = (Seconds(0.0), Seconds(f64::INFINITY), Seconds(0.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_add_up_by_label() {
        let mut spans = SpanRecorder::enabled();
        let (a, b) = (spans.label("a"), spans.label("b"));
        assert_eq!(spans.label("a"), a);
        spans.add(a, Seconds(1.0), Bytes(10));
        spans.add(a, Seconds(3.0), Bytes(5));
        let totals = spans.totals();
        assert_eq!(totals.len(), 1, "b was never recorded");
        let t = &totals[0];
        assert_eq!(
            (t.count, t.total, t.min, t.max, t.bytes),
            (2, Seconds(4.0), Seconds(1.0), Seconds(3.0), Bytes(15))
        );
        spans.reset();
        assert!(spans.totals().is_empty());
        spans.add(b, Seconds(2.0), Bytes(0));
        assert_eq!(spans.totals()[0].name, "b");
    }

    #[test]
    fn a_disabled_recorder_records_nothing() {
        let mut spans = SpanRecorder::disabled();
        let a = spans.label("a");
        assert!(spans.start().is_none());
        spans.add(a, Seconds(1.0), Bytes(1));
        assert!(spans.totals().is_empty());
    }
}
