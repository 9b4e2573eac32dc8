//! The intermediate representation: a typed graph of tensor operations, and everything that can be known about
//! it without running it.
//!
//! ```
//! use lightering_graph::{BinaryOp, DType, Graph, Op, TensorType, UnaryOp};
//! let mut graph = Graph::new("double_relu");
//! let x = graph.add_input("x", TensorType::fixed(DType::F32, &[2, 3]));
//! let y = graph.add_node("act", Op::Unary(UnaryOp::Relu), &[x], 1)[0];
//! let z = graph.add_node("twice", Op::Binary(BinaryOp::Add), &[y, y], 1)[0];
//! graph.outputs.push(z);
//! graph.verify().unwrap();
//! ```
//!
//! A [`Graph`] holds [`Value`]s and [`Node`]s by index. A value is an input, a constant, a state or the output of
//! exactly one node. Nodes have typed operators ([`Op`]) with typed attributes; whatever ONNX allows to be
//! computed at run time (the axes of a reduction, the shape of a reshape) stays an input, and turns into a
//! constant by folding. Bodies of `If`, `Loop`, `Scan` and `SequenceMap` are graphs of their own whose captured
//! values are explicit inputs.
//!
//! Invariants: knows nothing of devices, files or threads; evaluating a node is somebody else's work, which the
//! passes reach through the [`Evaluate`] trait.
#![forbid(unsafe_code)]

mod constant;
pub mod cost;
mod differentiate;
mod error;
mod graph;
mod op;
mod op_attributes;
mod op_lm;
mod op_ml;
mod op_train;
mod shape;
mod tensor;
mod text;
mod verify;

pub mod infer;
pub mod passes;

pub use constant::{Constant, SourceId, StoredTensor};
pub use cost::Cost;
pub use differentiate::{
    DIFFERENTIABLE, DifferentiateOptions, GradientRule, Selector, ZERO_GRADIENT, differentiate,
    parameters_to_states,
};
pub use error::GraphError;
pub use graph::{Graph, Node, NodeId, Value, ValueId, ValueKind};
pub use lightering_units::DType;
pub use op::{BinaryOp, Op, UnaryOp, VariadicOp};
pub use op_attributes::*;
pub use op_lm::*;
pub use op_ml::*;
pub use op_train::*;
pub use passes::{Evaluate, Pass};
pub use shape::{Dim, Shape, TensorType, ValueType};
pub use tensor::{Tensor, TensorData};
