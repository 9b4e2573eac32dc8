use std::fmt::Display;

/// Why a vocabulary, a template or a request cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The input is well-formed, but says something that is not allowed here.
    #[error("{place}: {what}; expected {expected}")]
    Invalid {
        /// Where: a key of the model's metadata, a token, an option.
        place: String,
        /// What stands there.
        what: String,
        /// What may stand there.
        expected: String,
    },
    /// The input is valid, but asks for something that this program does not implement.
    #[error("{place}: {what} is not supported")]
    Unsupported {
        /// Where: a key of the model's metadata.
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
    /// A model file's metadata has no such key, or it is of another type.
    #[error(transparent)]
    Format(#[from] lightering_formats::Error),
    /// The model cannot be planned or computed.
    #[error(transparent)]
    Engine(#[from] lightering_engine::EngineError),
    /// A training cannot be set up.
    #[error(transparent)]
    Train(#[from] lightering_train::TrainError),
    /// A chat template is wrong, or refuses the conversation.
    #[error("chat template, line {line}: {what}")]
    Template {
        /// The line of the template, from 1.
        line: usize,
        /// What is wrong, in the template's own words where it has some.
        what: String,
    },
    /// Too many requests wait already; try again later.
    #[error("{waiting} requests wait already, and the limit is {limit}; try again later")]
    Busy {
        /// Requests that wait.
        waiting: usize,
        /// Most that may wait.
        limit: usize,
    },
    /// The scheduler takes no more requests.
    #[error("the scheduler is shutting down and takes no more requests")]
    Closed,
    /// A sequence would be longer than the model's context or cache.
    #[error("prompt of {prompt} tokens and answer of {answer} tokens; expected at most {limit} together")]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens of the answer that was asked for.
        answer: usize,
        /// Most tokens of both together.
        limit: usize,
    },
    /// A bug in this program, or a system that refuses the basics.
    #[error("internal error: {0}")]
    Internal(String),
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
}
