use std::fmt::Display;

/// Why a file could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The input is well-formed, but says something that is not allowed here.
    #[error("{place}: {what}; expected {expected}")]
    Invalid {
        /// Where: a node with its op, a tensor, a key or a byte offset.
        place: String,
        /// What stands there.
        what: String,
        /// What may stand there.
        expected: String,
    },
    /// The input is valid, but uses something that this program does not implement.
    #[error("{place}: {what} is not supported")]
    Unsupported {
        /// Where: a node with its op, a tensor, a file.
        place: String,
        /// The feature that is missing.
        what: String,
    },
    /// The input asks for more than a named limit allows.
    #[error("{place}: {what} is {found}, and the limit is {limit}")]
    Limit {
        /// Where the quantity stands.
        place: String,
        /// The quantity, with its unit.
        what: String,
        /// Its value in the input.
        found: u64,
        /// The largest value that is accepted.
        limit: u64,
    },
    /// The operating system refused.
    #[error("{place}: {source}")]
    Io {
        /// The file, or what was being read.
        place: String,
        /// The system's own error.
        source: std::io::Error,
    },
    /// The bytes are not in the format that they claim to be in.
    #[error("{place}: corrupt data: {what}")]
    Corrupt {
        /// Where: a message type and byte offset, or an array name.
        place: String,
        /// What is wrong with the bytes.
        what: String,
    },
}

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn invalid(place: impl Display, what: impl Display, expected: impl Display) -> Error {
        Error::Invalid { place: place.to_string(), what: what.to_string(), expected: expected.to_string() }
    }

    pub(crate) fn unsupported(place: impl Display, what: impl Display) -> Error {
        Error::Unsupported { place: place.to_string(), what: what.to_string() }
    }

    pub(crate) fn limit(place: impl Display, what: impl Display, found: u64, limit: u64) -> Error {
        Error::Limit { place: place.to_string(), what: what.to_string(), found, limit }
    }

    pub(crate) fn corrupt(place: impl Display, what: impl Display) -> Error {
        Error::Corrupt { place: place.to_string(), what: what.to_string() }
    }

    pub(crate) fn io(place: impl Display, source: std::io::Error) -> Error {
        Error::Io { place: place.to_string(), source }
    }

    /// The same error with `prefix` (a file name, say) put before its place.
    #[must_use]
    pub fn within(mut self, prefix: impl Display) -> Error {
        match &mut self {
            Error::Invalid { place, .. }
            | Error::Unsupported { place, .. }
            | Error::Limit { place, .. }
            | Error::Io { place, .. }
            | Error::Corrupt { place, .. } => *place = format!("{prefix}: {place}"),
        }
        self
    }
}
