//! Training of language models: the whole of a sequence at once, built of ordinary operators that pass gradients on.
//!
//! A model is a GGUF file, or one that does not exist yet ([`NewModel`]); of either, [`TrainingModel::graph`] makes a
//! forward graph from tokens `[batch, time]` to logits `[batch, time, vocabulary]`. What is trained lies in it as f32,
//! decoded while it is loaded; what stays as it is remains in the blocks of the file.

mod byte_pair_trainer;
mod export;
mod graph;
mod method;
mod new_model;
#[cfg(test)]
mod tests;
mod text;
mod weights;

pub use byte_pair_trainer::{VOCABULARY_RANGE, train_byte_pairs};
pub use export::{ExportReport, write_adapter, write_gguf};
pub use graph::{Adapter, TrainingGraph, TrainingModel};
pub use method::{LoraOptions, LoraTarget, Method};
pub use new_model::NewModel;
pub use text::TokenText;
