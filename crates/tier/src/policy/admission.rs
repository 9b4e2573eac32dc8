use super::{AdmissionPolicy, AdmissionView, Prediction};

/// `always`: every prediction is read ahead.
#[derive(Clone, Copy, Debug, Default)]
pub struct Always;

impl AdmissionPolicy for Always {
    fn name(&self) -> &'static str {
        "always"
    }

    fn admits(&mut self, _prediction: &Prediction, _view: &AdmissionView) -> bool {
        true
    }
}

/// `never`: nothing is read ahead.
#[derive(Clone, Copy, Debug, Default)]
pub struct Never;

impl AdmissionPolicy for Never {
    fn name(&self) -> &'static str {
        "never"
    }

    fn admits(&mut self, _prediction: &Prediction, _view: &AdmissionView) -> bool {
        false
    }
}

/// `pays`: a prediction is read ahead while that gains more than it costs.
///
/// With p the share of predictions that come true and d the share of time in which demanded chunks are being read, a
/// prefetch hides a read with probability p and delays a demanded one with probability (1 − p)·d; what it hides was
/// itself only to be hidden when the medium had time for it, (1 − d). So it pays when p·(1 − d) > (1 − p)·d, which is
/// p > d. And what is under way must be read before the position is reached (Fate, section 3: the window rule).
#[derive(Clone, Copy, Debug, Default)]
pub struct Pays;

impl AdmissionPolicy for Pays {
    fn name(&self) -> &'static str {
        "pays"
    }

    fn admits(&mut self, prediction: &Prediction, view: &AdmissionView) -> bool {
        let precision = view.precision.unwrap_or(f64::from(prediction.score));
        let reads = view.read.0 * (view.prefetches_under_way + 1) as f64;
        // Nothing is known of times before the first turns.
        let in_time = view.window.0 <= 0.0 || reads <= view.window.0;
        precision > view.demand_share && in_time
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ChunkId;
    use crate::policy::Position;
    use lightering_units::Seconds;

    #[test]
    fn what_is_worth_its_reads_is_admitted() {
        let at = Position { step: 1, group: 0 };
        let prediction = Prediction { chunk: ChunkId::new(0, 0), score: 0.9, at };
        let check = |precision, demand_share, under_way, expected: bool| {
            let view = AdmissionView {
                precision,
                demand_share,
                prefetches_under_way: under_way,
                read: Seconds(1.0),
                window: Seconds(4.0),
            };
            assert_eq!(Pays.admits(&prediction, &view), expected, "{view:?}");
            assert!(Always.admits(&prediction, &view) && !Never.admits(&prediction, &view));
        };
        check(Some(0.6), 0.5, 0, true);
        check(Some(0.4), 0.5, 0, false);
        check(None, 0.8, 0, true);
        check(Some(1.0), 0.0, 3, true);
        check(Some(1.0), 0.0, 4, false);
    }
}
