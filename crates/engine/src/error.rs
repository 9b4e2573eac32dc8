use lightering_graph::GraphError;
use lightering_units::Bytes;

use crate::ops::OpError;

/// Why a graph could not be planned or run; the variants are what the caller can do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The graph or an input is wrong; names the node or input, what was found and what was expected.
    #[error("{0}")]
    Invalid(String),
    /// Legal, but nothing here can do it.
    #[error("node {node:?} ({op}): not supported: {what}")]
    Unsupported {
        /// The node's name in the model.
        node: String,
        /// Its operator.
        op: String,
        /// What exactly is missing.
        what: String,
    },
    /// No plan fits the memory budget.
    #[error(
        "no plan fits into {budget}: the smallest budget that does is {smallest}; in the way at node {at:?} are \
         {holders}. Give --memory {smallest_mib}MiB or more"
    )]
    Budget {
        /// What was asked for.
        budget: Bytes,
        /// The smallest budget for which a plan exists.
        smallest: Bytes,
        /// The same, rounded up to something that can be typed.
        smallest_mib: u64,
        /// The node at which most memory is needed.
        at: String,
        /// The tensors that are alive there, largest first.
        holders: String,
    },
    /// The counted heap refused while running (data-dependent sizes).
    #[error("node {node:?} ({op}): {what}")]
    OutOfBudget {
        /// The node's name in the model.
        node: String,
        /// Its operator.
        op: String,
        /// The refusal, with the largest holders.
        what: String,
    },
    /// A weight could not be read.
    #[error("weight {weight:?} could not be read from {source_name}: {error}")]
    Io {
        /// The weight's name in the model.
        weight: String,
        /// The file.
        source_name: String,
        /// What the system said.
        error: std::io::Error,
    },
    /// A tensor could not be spilled to the disk.
    #[error("{0}; choose another folder to spill to, or a larger budget")]
    Spill(std::io::Error),
    /// An expert could not be read, or not so many fit at once.
    #[error("node {node:?}: {error}")]
    Experts {
        /// The layer's node.
        node: String,
        /// What happened; names layer and expert.
        error: lightering_tier::TierError,
    },
    /// A store of chunks could not be opened.
    #[error(transparent)]
    Tier(#[from] lightering_tier::TierError),
    /// The system refused memory that the budget allows.
    #[error("the system refused memory: {0}")]
    Memory(std::io::Error),
    /// A broken promise inside the engine: a bug, please report it.
    #[error("internal error: {0}")]
    Internal(String),
}

impl From<GraphError> for EngineError {
    fn from(error: GraphError) -> EngineError {
        match error {
            GraphError::Unsupported { node, op, what } => EngineError::Unsupported { node, op, what },
            other => EngineError::Invalid(other.to_string()),
        }
    }
}

impl EngineError {
    /// Adds the node's name to what an operator reports.
    pub(crate) fn at(node: &lightering_graph::Node, error: OpError) -> EngineError {
        let (name, op) = (node.name.clone(), node.op.name().to_owned());
        match error {
            OpError::Invalid(problem) => EngineError::Invalid(format!("node {name:?} ({op}): {problem}")),
            OpError::Unsupported(what) => EngineError::Unsupported { node: name, op, what },
            OpError::Budget(what) => EngineError::OutOfBudget { node: name, op, what },
            other => EngineError::Invalid(format!("node {name:?} ({op}): {other}")),
        }
    }
}
