//! Units that never cross a crate border as bare numbers: bytes, seconds, joules, rates, element types.
//!
//! ```
//! use lightering_units::{Bytes, BytesPerSecond, DType};
//! let model: Bytes = "1.5GiB".parse().unwrap();
//! let disk = BytesPerSecond(2e9);
//! assert!((model / disk).0 < 1.0);
//! assert_eq!(DType::F16.size_bytes(), 2);
//! ```
//!
//! Invariants: this crate does no I/O, knows no other crate of the workspace, and cannot fail other than in parsing.
#![forbid(unsafe_code)]

mod block_format;
mod dtype;
mod quantity;

pub use block_format::{BlockFormat, ParseBlockFormatError};
pub use dtype::{DType, Element};
pub use quantity::{Bytes, BytesPerSecond, Flops, FlopsPerSecond, Joules, ParseUnitError, Seconds, Watts};
