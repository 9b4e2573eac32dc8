use std::collections::HashMap;

use super::{Position, Prediction, Predictor, Use};
use crate::{ChunkId, ChunkTrace};

/// How often each chunk was used.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FrequencyTable {
    uses: HashMap<ChunkId, u64>,
}

impl FrequencyTable {
    /// Counts the uses of a recorded run.
    pub fn of(trace: &ChunkTrace) -> FrequencyTable {
        let mut uses = HashMap::new();
        for turn in trace.turns() {
            for choice in turn.uses {
                *uses.entry(ChunkId::new(turn.group, choice.index)).or_insert(0) += 1;
            }
        }
        FrequencyTable { uses }
    }

    /// Uses of a chunk.
    pub fn uses(&self, chunk: ChunkId) -> u64 {
        self.uses.get(&chunk).copied().unwrap_or(0)
    }

    /// All chunks that were used, the most frequent first.
    pub fn ranked(&self) -> Vec<ChunkId> {
        let mut chunks: Vec<(u64, ChunkId)> = self.uses.iter().map(|(&chunk, &n)| (n, chunk)).collect();
        chunks.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        chunks.into_iter().map(|(_, chunk)| chunk).collect()
    }
}

/// `frequency`: a group will need what it needed most often, recent turns counting more; as many as in its last turn.
#[derive(Debug, Default)]
pub struct FrequencyPredictor {
    groups: HashMap<u32, GroupCounts>,
}

#[derive(Debug, Default)]
struct GroupCounts {
    counts: HashMap<u32, f64>,
    last: usize,
}

/// What a use still counts one turn of its group later.
const KEPT_PER_TURN: f64 = 1.0 - 1.0 / 64.0;

impl Predictor for FrequencyPredictor {
    fn name(&self) -> &'static str {
        "frequency"
    }

    fn observed(&mut self, at: Position, used: &[Use]) {
        let group = self.groups.entry(at.group).or_default();
        group.last = used.len();
        group.counts.values_mut().for_each(|count| *count *= KEPT_PER_TURN);
        for choice in used {
            *group.counts.entry(choice.index).or_insert(0.0) += 1.0 - KEPT_PER_TURN;
        }
    }

    fn predict(&mut self, coming: Position, predictions: &mut Vec<Prediction>) {
        let Some(group) = self.groups.get(&coming.group) else { return };
        let mut ranked: Vec<(f64, u32)> = group.counts.iter().map(|(&i, &count)| (count, i)).collect();
        ranked.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        predictions.extend(ranked.into_iter().take(group.last).map(|(count, index)| Prediction {
            chunk: ChunkId::new(coming.group, index),
            score: count.min(1.0) as f32,
            at: coming,
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_frequent_are_predicted() {
        let mut predictor = FrequencyPredictor::default();
        let at = |step| Position { step, group: 3 };
        for (step, indices) in [[1, 2], [1, 5], [5, 1]].into_iter().enumerate() {
            let used = indices.map(|index| Use { index, score: 0.5 });
            predictor.observed(at(step as u64), &used);
        }
        let mut predictions = Vec::new();
        predictor.predict(at(3), &mut predictions);
        predictor.predict(Position { step: 3, group: 4 }, &mut predictions);
        let indices: Vec<u32> = predictions.iter().map(|p| p.chunk.index).collect();
        assert_eq!(indices, [1, 5]);
        assert!(predictions[0].score > predictions[1].score && predictions[0].at == at(3));
    }
}
