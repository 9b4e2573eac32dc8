//! The planner and the executor: where every byte of a graph lives, when it moves, and the walk that does it.
//!
//! Invariants: knows no file formats and no command line; takes weights through
//! [`ByteSource`](lightering_tier::ByteSource) and asks the memory pool before it allocates.
#![forbid(unsafe_code)]

pub mod conformance;
mod error;
mod experts;
mod interpreter;
mod kernel;
mod loader;
pub mod ops;
mod plan;
mod prepare;
mod program;
mod rows;
mod session;
mod spill;
mod value;

pub use error::EngineError;
pub use experts::{ExpertOptions, OpenTrace};
pub use interpreter::{Evaluator, execute_op, interpret, run_graph};
pub use plan::{Decision, PLAN_SCHEMA, Plan, PlanOptions, PlannedBuffer, PlannedInstruction, PlannedWeight};
pub use prepare::{Bindings, PrepareOptions, prepare};
pub use program::BufferKind;
pub use session::{Feed, OutputView, Part, RunReport, Session, SessionOptions, plan_graph};
pub use value::RuntimeValue;
