use std::fmt::Display;
use std::path::Path;

/// What can go wrong around training.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// What was asked for, or what a file says, is not allowed here.
    #[error("{place}: {what}; expected {expected}")]
    Invalid {
        /// Where: a file, a sample, an option.
        place: String,
        /// What stands there.
        what: String,
        /// What may stand there, or what to do.
        expected: String,
    },
    /// Valid, but not implemented.
    #[error("{place}: {what} is not supported")]
    Unsupported {
        /// Where.
        place: String,
        /// The feature that is missing.
        what: String,
    },
    /// The bytes are not in the format that they claim to be in.
    #[error("{place}: corrupt data: {what}")]
    Corrupt {
        /// Where: a file, with an offset or a line where it is known.
        place: String,
        /// What is wrong with the bytes.
        what: String,
    },
    /// More than a named limit allows.
    #[error("{place}: {what} is {found}, and the limit is {limit}")]
    Limit {
        /// Where the quantity stands.
        place: String,
        /// The quantity, with its unit.
        what: &'static str,
        /// Its value.
        found: u64,
        /// The largest value that is accepted.
        limit: u64,
    },
    /// A sample's label is none of the classes.
    #[error("{place}: label {label} is none of the {classes} classes (0 to {})", .classes.saturating_sub(1))]
    Label {
        /// The sample.
        place: String,
        /// Its label.
        label: i64,
        /// Number of classes.
        classes: usize,
    },
    /// A sample holds an infinite value or none at all (NaN).
    #[error(
        "{place}: element {at} of {feature} is {value}, which no training survives; repair or remove the sample"
    )]
    NonFinite {
        /// The sample.
        place: String,
        /// The feature's name.
        feature: String,
        /// Index of the element in the sample.
        at: usize,
        /// The value.
        value: f32,
    },
    /// The loss is no number any more.
    #[error(
        "step {step}: the loss is {loss} at a learning rate of {rate}; try a tenth of that rate, a warm-up, or --clip 1"
    )]
    Diverged {
        /// The step.
        step: u64,
        /// The loss.
        loss: f32,
        /// Its learning rate.
        rate: f32,
    },
    /// Too many samples cannot be read.
    #[error("{place}: {broken} of {total} samples cannot be read, more than the {allowed_percent} % that are left out; the first: {}", .first.join("; "))]
    Broken {
        /// The data set.
        place: String,
        /// How many are broken.
        broken: usize,
        /// Out of how many.
        total: usize,
        /// Up to which share they are only left out.
        allowed_percent: u32,
        /// Some of them, with the reason.
        first: Vec<String>,
    },
    /// No checkpoint of a folder can be loaded.
    #[error("{folder}: no checkpoint can be loaded{}", refused(.damaged))]
    NoCheckpoint {
        /// The folder.
        folder: String,
        /// Those that are damaged, with the reason.
        damaged: Vec<String>,
    },
    /// The operating system refused.
    #[error("{place}: {source}")]
    Io {
        /// The file.
        place: String,
        /// The system's own error.
        #[source]
        source: std::io::Error,
    },
    /// The memory budget does not allow it.
    #[error(transparent)]
    Budget(#[from] lightering_meter::MeterError),
    /// A file format's reader or writer failed.
    #[error(transparent)]
    Format(#[from] lightering_formats::Error),
    /// A graph that was built or changed is wrong.
    #[error(transparent)]
    Graph(#[from] lightering_graph::GraphError),
    /// Planning or running failed.
    #[error(transparent)]
    Engine(#[from] lightering_engine::EngineError),
}

fn refused(damaged: &[String]) -> String {
    if damaged.is_empty() { String::new() } else { format!("; damaged: {}", damaged.join("; ")) }
}

impl TrainError {
    pub(crate) fn invalid(place: impl Display, what: impl Display, expected: impl Display) -> TrainError {
        TrainError::Invalid {
            place: place.to_string(),
            what: what.to_string(),
            expected: expected.to_string(),
        }
    }

    pub(crate) fn unsupported(place: impl Display, what: impl Display) -> TrainError {
        TrainError::Unsupported { place: place.to_string(), what: what.to_string() }
    }

    pub(crate) fn corrupt(place: impl Display, what: impl Display) -> TrainError {
        TrainError::Corrupt { place: place.to_string(), what: what.to_string() }
    }

    pub(crate) fn limit(place: impl Display, what: &'static str, found: u64, limit: u64) -> TrainError {
        TrainError::Limit { place: place.to_string(), what, found, limit }
    }

    pub(crate) fn io(path: &Path, source: std::io::Error) -> TrainError {
        TrainError::Io { place: path.display().to_string(), source }
    }
}
