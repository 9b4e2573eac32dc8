//! Readers and writers: ONNX, GGUF, safetensors, NumPy, images.
//!
//! Every parser here treats its input as hostile: sizes are checked against named limits before anything is allocated,
//! and whatever is wrong ends in an [`Error`] that says where and what was expected.
//!
//! ```
//! use lightering_formats::npy;
//! use lightering_graph::Tensor;
//! let tensor = Tensor::from_slice(&[2, 2], &[1.0f32, 2.0, 3.0, 4.0]);
//! let mut file = Vec::new();
//! npy::write(&tensor, &mut file).unwrap();
//! assert_eq!(npy::read(&mut &file[..]).unwrap(), tensor);
//! ```
//!
//! Invariants: no weights are read that nobody asked for (a tensor's payload stays in the file until it is decoded),
//! and no module knows of devices, plans or threads.
#![forbid(unsafe_code)]

mod error;
pub mod gguf;
pub mod image;
pub mod npy;
pub mod onnx;
pub mod protobuf;
pub mod safetensors;
mod tensor;

pub use error::{Error, Result};
pub use tensor::{HostValue, MAX_TENSOR_BYTES};
