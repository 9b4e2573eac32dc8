//! The planner and the executor.
