use crate::{NodeId, ValueId};

/// What can be wrong with a graph. Every variant names the node or value, what was found and what was expected.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GraphError {
    /// A node's inputs or attributes contradict its operator.
    #[error("node {node:?} ({op}): {problem}")]
    Node {
        /// The node's name in the model.
        node: String,
        /// Its operator.
        op: String,
        /// What is wrong and what was expected.
        problem: String,
    },
    /// The graph itself is broken: a cycle, a value without a producer, an index out of range.
    #[error("graph {graph:?}: {problem}")]
    Structure {
        /// The graph's name.
        graph: String,
        /// What is wrong.
        problem: String,
    },
    /// An input was bound to a shape or type that the graph does not accept.
    #[error("input {input:?}: {problem}")]
    Input {
        /// The input's name.
        input: String,
        /// What is wrong and what was expected.
        problem: String,
    },
    /// A text form that cannot be read back.
    #[error("line {line} of the graph text: {problem}")]
    Text {
        /// Counted from 1.
        line: usize,
        /// What is wrong and what was expected.
        problem: String,
    },
    /// A tensor whose bytes do not match its type and shape.
    #[error("tensor: {0}")]
    Tensor(String),
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
}

impl GraphError {
    pub(crate) fn structure(graph: &crate::Graph, problem: impl Into<String>) -> GraphError {
        GraphError::Structure { graph: graph.name.clone(), problem: problem.into() }
    }

    /// An error about `node`.
    pub fn at(node: &crate::Node, problem: impl Into<String>) -> GraphError {
        GraphError::Node { node: node.name.clone(), op: node.op.name().to_owned(), problem: problem.into() }
    }
}

/// Shown in place of a value that does not exist.
pub(crate) fn missing_value(id: ValueId) -> String {
    format!("value %{} does not exist", id.0)
}

/// Shown in place of a node that does not exist.
pub(crate) fn missing_node(id: NodeId) -> String {
    format!("node #{} does not exist", id.0)
}
