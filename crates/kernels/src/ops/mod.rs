//! Every operator for every element type, on tensors that the caller owns: the general kernels.
//!
//! They are correct and broad first; the fast kernels for the element type and layout that matter most live beside
//! this module. Most of them compute on blocks in one of four compute types, see [`block`].

pub mod attention;
mod binary;
pub mod block;
mod cast;
mod convolution;
pub mod float8;
pub mod fourier;
pub mod gradient;
pub mod integer_product;
mod linear;
pub mod loss;
mod movement;
mod normalisation;
mod pooling;
pub mod quantize;
pub mod quantized_elementwise;
pub mod random;
pub mod real;
pub mod recurrent;
mod reduction;
mod resampling;
pub mod rows;
pub mod suppression;
pub(crate) mod tile;
mod unary;
mod view;

pub use binary::{Binary, Step, binary, chain, clip, select, variadic};
pub use cast::cast;
pub use convolution::{
    ConvolutionEpilogue, ConvolutionShape, Window, col2im, convolution, convolution_deformed,
    convolution_transposed,
};
pub use linear::{EinsumPlan, MatMulEpilogue, det, einsum, matmul};
pub use movement::{
    Padding, concat_part, copy, eye, gather, gather_elements, gather_nd, mapped, one_hot, pad_map, range,
    reverse_sequence, row_major, scatter_elements, scatter_nd, sort_key, split_part, strided, tensor_scatter,
    top_k, triangle,
};
pub use normalisation::{
    Along, BatchStatistics, SoftmaxKind, batch_norm, group_norm, layer_norm, local_response_norm, lp_norm,
    mean_variance_norm, softmax,
};
pub use pooling::{Pooling, PoolingShape, RoiAlignShape, max_roi_pool, max_unpool, pooling, roi_align};
pub use reduction::{Reduction, Spaces, arg_reduce, cumulative_sum, reduce};
pub use resampling::{
    Coordinates, Interpolation, Outside, ResizeShape, Rounding, affine_grid, grid_sample, resize,
};
pub use unary::{Unary, activate_tensor, unary, unary_f32, unary_f64};
pub use view::{OpError, TensorView, TensorViewMut};

/// Refuses results that do not have as many elements as the operand.
pub(crate) fn expect_same_count(x: &TensorView, y: &TensorViewMut) -> Result<(), OpError> {
    if x.len() == y.len() {
        return Ok(());
    }
    Err(OpError::Invalid(format!("an operand of shape {:?} gives a result of shape {:?}", x.dims, y.dims)))
}

#[cfg(test)]
mod tests;
