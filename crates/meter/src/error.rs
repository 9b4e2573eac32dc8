use crate::Holder;
use lightering_units::Bytes;
use std::path::PathBuf;

/// What can go wrong while asking for memory or reading the machine's counts.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MeterError {
    /// The memory pool refused: the caller may spill, split or fail with this message.
    #[error("{name} asked for {asked}, but {available} of the {limit} budget are free; largest holders: {}", holders(.largest))]
    Budget {
        /// Who asked.
        name: String,
        /// How much was asked for.
        asked: Bytes,
        /// How much was free.
        available: Bytes,
        /// The pool's limit.
        limit: Bytes,
        /// The largest live reservations, largest first.
        largest: Vec<Holder>,
    },
    /// This operating system or container does not offer the count.
    #[error("{what} is unavailable here: {reason}")]
    Unavailable {
        /// The count that was asked for.
        what: &'static str,
        /// Why it cannot be had.
        reason: String,
    },
    /// A file could not be read or written.
    #[error("cannot access {}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A file was read but does not hold what it should.
    #[error("{} is not a valid {expected}: {reason}", .path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What it should have been.
        expected: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

fn holders(largest: &[Holder]) -> String {
    if largest.is_empty() {
        return "none".to_owned();
    }
    largest.iter().map(|h| format!("{} ({})", h.name, h.size)).collect::<Vec<_>>().join(", ")
}
