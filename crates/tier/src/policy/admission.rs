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
