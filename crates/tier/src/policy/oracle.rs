use std::sync::Arc;

use super::{Position, Prediction, Predictor, Use};
use crate::{ChunkId, ChunkTrace};

/// `oracle`: knows what a recorded run will need, to tell what any predictor could gain at most. It follows the run by
/// counting turns, so the run must be the recorded one.
#[derive(Debug)]
pub struct Oracle {
    trace: Arc<ChunkTrace>,
    turns_seen: usize,
}

impl Oracle {
    /// The oracle of a recorded run.
    pub fn new(trace: Arc<ChunkTrace>) -> Oracle {
        Oracle { trace, turns_seen: 0 }
    }
}

impl Predictor for Oracle {
    fn name(&self) -> &'static str {
        "oracle"
    }

    fn observed(&mut self, _at: Position, _used: &[Use]) {
        self.turns_seen += 1;
    }

    fn predict(&mut self, coming: Position, predictions: &mut Vec<Prediction>) {
        // A group comes once in a step, perhaps not at all.
        let within = self.trace.header().groups.len();
        let coming_turns = self.turns_seen..(self.turns_seen + within).min(self.trace.turn_count());
        let turn = coming_turns.map(|i| self.trace.turn(i)).find(|turn| turn.group == coming.group);
        predictions.extend(turn.iter().flat_map(|turn| turn.uses).map(|choice| Prediction {
            chunk: ChunkId::new(coming.group, choice.index),
            score: 1.0,
            at: coming,
        }));
    }
}
