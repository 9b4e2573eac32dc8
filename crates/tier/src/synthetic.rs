use lightering_units::{Bytes, Seconds};

use crate::policy::Use;
use crate::{ChunkTrace, TRACE_MAX_BYTES, TierError, TraceHeader, TraceWriter};

/// A trace without a model: every group prefers its chunks by Zipf's law in an order of its own, and keeps some of what
/// it used in the step before. For trying policies; real routers differ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SyntheticTrace {
    /// Groups.
    pub groups: u32,
    /// Chunks of each group.
    pub chunks: u32,
    /// Chunks that a group uses in a step.
    pub per_step: u32,
    /// Steps.
    pub steps: u64,
    /// Exponent of Zipf's law: 0 for equal preference.
    pub zipf: f64,
    /// Probability that a chunk is used again because it was used in the step before.
    pub repeat: f64,
    /// Size of a chunk.
    pub chunk_bytes: Bytes,
    /// Time that a group is computed on.
    pub computing: Seconds,
    /// Same seed, same trace.
    pub seed: u64,
}

impl Default for SyntheticTrace {
    fn default() -> Self {
        SyntheticTrace {
            groups: 8,
            chunks: 32,
            per_step: 4,
            steps: 500,
            zipf: 0.8,
            repeat: 0.3,
            chunk_bytes: Bytes::mib(2),
            computing: Seconds(2e-3),
            seed: 1,
        }
    }
}

/// SplitMix64 (Steele, Lea and Flood, 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Between 0 and 1.
    fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

impl SyntheticTrace {
    fn header(&self) -> TraceHeader {
        let groups = (0..self.groups).map(|g| (g, self.chunks)).collect();
        TraceHeader { groups, chunk_bytes: self.chunk_bytes, slots: 0 }
    }

    /// Checks that there can be such a trace.
    ///
    /// # Errors
    /// `Invalid` for counts that contradict each other, `Corrupt` for more than a trace can hold.
    pub fn check(&self) -> Result<(), TierError> {
        let invalid = |what: String| Err(TierError::Invalid(what));
        if self.per_step == 0 || self.per_step > self.chunks || self.per_step > u32::from(u16::MAX) {
            return invalid(format!("{} of {} chunks cannot be used in a step", self.per_step, self.chunks));
        }
        if !(self.zipf.is_finite() && (0.0..=20.0).contains(&self.zipf) && (0.0..=1.0).contains(&self.repeat))
        {
            return invalid(format!(
                "the exponent {} and the probability {}; expected 0 to 20 and 0 to 1",
                self.zipf, self.repeat
            ));
        }
        if self.steps.saturating_mul(u64::from(self.groups)) > TRACE_MAX_BYTES.0 / 9 {
            return invalid(format!(
                "{} steps of {} groups are more than a trace holds",
                self.steps, self.groups
            ));
        }
        self.header().check(0)
    }

    /// Writes the trace file's bytes to `out`.
    ///
    /// # Errors
    /// As for [`SyntheticTrace::check`]; `Invalid` for more than a trace holds, `Io` when writing fails.
    pub fn write(&self, out: impl std::io::Write) -> Result<(), TierError> {
        self.check()?;
        let mut writer = TraceWriter::new(out, &self.header(), TRACE_MAX_BYTES)?;
        let mut random = Random(self.seed);
        // Each group's order of preference: shuffled, by Fisher and Yates.
        let mut orders: Vec<Vec<u32>> = (0..self.groups).map(|_| (0..self.chunks).collect()).collect();
        for order in &mut orders {
            for i in (1..order.len()).rev() {
                order.swap(i, (random.next() % (i as u64 + 1)) as usize);
            }
        }
        let mut sum = 0.0;
        let cumulative: Vec<f64> = (1..=self.chunks)
            .map(|rank| {
                sum += f64::from(rank).powf(-self.zipf);
                sum
            })
            .collect();
        let mut last: Vec<Vec<u32>> = vec![Vec::new(); self.groups as usize];
        for _ in 0..self.steps {
            for (group, order) in orders.iter().enumerate() {
                let mut chosen: Vec<u32> =
                    last[group].iter().copied().filter(|_| random.fraction() < self.repeat).collect();
                let mut tries = 0;
                while chosen.len() < self.per_step as usize {
                    let at = random.fraction() * sum;
                    let mut rank = cumulative.partition_point(|&c| c < at).min(order.len() - 1);
                    // A steep law hardly ever gives a new one; then the next in order is taken.
                    tries += 1;
                    while chosen.contains(&order[rank]) && tries > 8 {
                        rank = (rank + 1) % order.len();
                    }
                    if !chosen.contains(&order[rank]) {
                        chosen.push(order[rank]);
                    }
                }
                let weight = |i: usize| 2.0 * (chosen.len() - i) as f32;
                let total = (chosen.len() * (chosen.len() + 1)) as f32;
                let uses: Vec<Use> = chosen
                    .iter()
                    .enumerate()
                    .map(|(i, &index)| Use { index, score: weight(i) / total })
                    .collect();
                writer.turn(group as u32, &uses, self.computing)?;
                last[group] = chosen;
            }
            writer.end_step()?;
        }
        writer.finish()
    }

    /// Makes the trace in memory.
    ///
    /// # Errors
    /// As for [`SyntheticTrace::write`].
    pub fn make(&self) -> Result<ChunkTrace, TierError> {
        let mut bytes = Vec::new();
        self.write(&mut bytes)?;
        ChunkTrace::parse(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_trace_of_the_wanted_shape() {
        let synthetic = SyntheticTrace { steps: 20, zipf: 3.0, ..SyntheticTrace::default() };
        let trace = synthetic.make().unwrap();
        assert_eq!(trace, synthetic.make().unwrap());
        assert_ne!(trace, SyntheticTrace { seed: 2, ..synthetic }.make().unwrap());
        assert_eq!((trace.steps(), trace.turn_count(), trace.use_count()), (20, 160, 640));
        for turn in trace.turns() {
            let distinct: std::collections::HashSet<u32> = turn.uses.iter().map(|u| u.index).collect();
            assert_eq!(distinct.len(), 4);
            assert!((turn.uses.iter().map(|u| u.score).sum::<f32>() - 1.0).abs() < 0.02);
        }
        assert!(SyntheticTrace { per_step: 33, ..synthetic }.make().is_err());
        assert!(SyntheticTrace { groups: 0, ..synthetic }.make().is_err());
        assert!(SyntheticTrace { repeat: 1.5, ..synthetic }.make().is_err());
        assert!(SyntheticTrace { per_step: 32, ..synthetic }.make().is_ok());
    }
}
