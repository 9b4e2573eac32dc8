//! The planner and the executor: where every byte of a graph lives, when it moves, and the walk that does it.
//!
//! Invariants: knows no file formats and no command line; takes weights through
//! [`ByteSource`](lightering_tier::ByteSource) and asks the memory pool before it allocates.
#![forbid(unsafe_code)]

mod interpreter;
pub mod ops;
mod value;

pub use interpreter::{Evaluator, execute_op, interpret, run_graph};
pub use value::RuntimeValue;
