//! From a graph operator to the kernel that computes it, on memory that the caller owns.
//!
//! Two doors: [`compute`] for operators whose result types are known before they run (the caller has allocated
//! the results, from the plan's arena or from the counted heap), and [`compute_dynamic`] for the rest (sequences,
//! optionals, text, control flow, `NonZero` and the like), which returns fresh values.

mod view;

pub use view::{OpError, TensorView, TensorViewMut};
