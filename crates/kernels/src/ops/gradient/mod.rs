//! Gradients of operators, statistics of batches and losses for every floating-point type: the reference that fast
//! kernels are held to.
//!
//! Everything is computed in `f64` and rounded once per element where it is stored; where many terms meet in one
//! element, the sum is rounded at each.

mod attention;
mod elementwise;
mod linear;
mod loss;
mod movement;
mod normalisation;
mod recurrent;
mod resampling;
mod windows;

pub use attention::{AttentionGradients, attention_grad, attention_grad_scratch_len};
pub use elementwise::{ElementRule, derivative, mask_grad, saves_result, sign_mask, unary_grad};
pub use linear::det_grad;
pub use loss::{CrossEntropy, Labels, cross_entropy, cross_entropy_grad};
pub use movement::gather_grad;
pub use normalisation::{
    ChannelStatistics, Channels, batch_statistics, channel_sum, layer_norm_grad, normalise, normalise_grad,
    softmax_grad,
};
pub use recurrent::{RecurrentActivation, RecurrentGradients, recurrent_grad, recurrent_grad_scratch_len};
pub use resampling::{grid_sample_grad, resize_grad};
pub use windows::{convolution_input_grad, convolution_weight_grad, pooling_grad};

use super::real::Real;

/// `to += value`, rounded.
#[inline(always)]
fn add_to<T: Real>(to: &mut T, value: f64) {
    *to = T::from_f64(to.to_f64() + value);
}
