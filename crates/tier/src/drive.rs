use std::time::Instant;

use lightering_units::Seconds;

use crate::{ChunkId, ChunkStore, ChunkTrace, TierError};

/// Runs a trace through a live store, with real reads and `compute` in the place of the model: for each chunk, as it
/// arrives, it is given the first bytes of the chunk and the time to spend. Returns how long all of it took.
///
/// # Errors
/// As for [`ChunkStore::used`] and [`ChunkStore::acquire_any`].
pub fn drive(
    store: &ChunkStore,
    trace: &ChunkTrace,
    compute: &mut dyn FnMut(&[u8], Seconds),
) -> Result<Seconds, TierError> {
    let before = Instant::now();
    let mut step = 0;
    for turn in trace.turns() {
        while step < turn.step {
            store.end_step();
            step += 1;
        }
        store.used(turn.group, turn.uses)?;
        let each = Seconds(turn.computing.0 / turn.uses.len().max(1) as f64);
        let mut left: Vec<ChunkId> =
            turn.uses.iter().map(|choice| ChunkId::new(turn.group, choice.index)).collect();
        if left.is_empty() {
            compute(&[], turn.computing);
        }
        while !left.is_empty() {
            let (position, chunk) = store.acquire_any(&left)?;
            compute(chunk.extent(0), each);
            left.remove(position);
        }
    }
    while step < trace.steps() {
        store.end_step();
        step += 1;
    }
    Ok(Seconds(before.elapsed().as_secs_f64()))
}
