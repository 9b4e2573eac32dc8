use std::io;
use std::sync::Arc;

use lightering_units::Bytes;

use crate::ChunkId;

/// What can go wrong between a store and those who use its chunks.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TierError {
    /// What was given contradicts itself or what the sources hold.
    #[error("{0}")]
    Invalid(String),
    /// The catalog has no such chunk.
    #[error("{chunk} is not in the catalog, which holds {chunks} chunks")]
    UnknownChunk {
        /// What was asked for.
        chunk: ChunkId,
        /// How many there are.
        chunks: usize,
    },
    /// More chunks are in use at the same time than fit.
    #[error(
        "{chunk} needs one of {needed} slots in use at the same time, but the store has {slots} of {slot_bytes}; \
         give it at least {needed} slots, or drop guards before acquiring"
    )]
    TooFewSlots {
        /// What was asked for.
        chunk: ChunkId,
        /// Slots of the store.
        slots: usize,
        /// Slots that would do.
        needed: usize,
        /// Size of one.
        slot_bytes: Bytes,
    },
    /// The medium failed; the next request for the chunk tries again.
    #[error("{chunk}: reading {size} at offset {offset} of {source_name}: {error}")]
    Read {
        /// What was wanted.
        chunk: ChunkId,
        /// Name of the source, such as a file's path.
        source_name: String,
        /// Where in the source.
        offset: u64,
        /// How much.
        size: Bytes,
        /// What the medium said.
        error: Arc<io::Error>,
    },
    /// A trace that cannot be read.
    #[error("trace, at byte {offset}: {what}")]
    Corrupt {
        /// Where in the file.
        offset: u64,
        /// What was found and what was expected.
        what: String,
    },
    /// Reading or writing something other than a chunk.
    #[error("{what}: {error}")]
    Io {
        /// What was being done.
        what: String,
        /// What the system said.
        error: Arc<io::Error>,
    },
    /// Two holders of the same bytes: a fault of this program.
    #[error("internal error: {0}")]
    Internal(String),
}
