//! Fusion: several operators that one kernel computes in one sweep become one node.

mod activation;
mod attention;
mod batch_norm;
mod elementwise;
mod epilogue;
mod normalization;
mod product;
mod quantized;

pub use activation::ActivationFusion;
pub use attention::AttentionFusion;
pub use batch_norm::BatchNormFusion;
pub use elementwise::ElementwiseFusion;
pub use epilogue::EpilogueFusion;
pub use normalization::NormalizationFusion;
pub use quantized::QuantizedFusion;

use super::editor::Editor;

#[cfg(test)]
mod tests;
