use std::collections::HashMap;

use super::{Position, Prediction, Predictor, Use};
use crate::ChunkId;

/// `repeat-last`: a group will need what it needed in the step before.
#[derive(Debug, Default)]
pub struct RepeatLast {
    last: HashMap<u32, Vec<Use>>,
}

impl Predictor for RepeatLast {
    fn name(&self) -> &'static str {
        "repeat-last"
    }

    fn observed(&mut self, at: Position, used: &[Use]) {
        let last = self.last.entry(at.group).or_default();
        last.clear();
        last.extend_from_slice(used);
    }

    fn predict(&mut self, coming: Position, predictions: &mut Vec<Prediction>) {
        let last = self.last.get(&coming.group).map(Vec::as_slice).unwrap_or_default();
        predictions.extend(last.iter().map(|choice| Prediction {
            chunk: ChunkId::new(coming.group, choice.index),
            score: choice.score,
            at: coming,
        }));
    }
}
