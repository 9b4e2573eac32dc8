//! Compute on slices that the caller owns.
//!
//! Activations lie **channels last** (`[height, width, channels]`, a pixel is a row), weights are packed once
//! into panels by `pack_*` functions, and every buffer, scratch included, comes from the caller: no function
//! allocates or does I/O. Work is shared out over a [`ThreadPool`]; results have the same bits for any number of
//! threads and for any stripe of rows computed alone.
//!
//! ```
//! use lightering_kernels::{Activation, Epilogue, ThreadPool, gemm, pack_kn, packed_len};
//! let pool = ThreadPool::new(1);
//! let (m, k, n) = (2, 3, 4);
//! let a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
//! let b = [1.0; 12];
//! let mut panels = vec![0.0; packed_len(k, n)];
//! pack_kn(k, n, &b, n, &mut panels);
//! let mut c = [0.0; 8];
//! let epilogue = Epilogue { activation: Activation::Clip { min: 0.0, max: 10.0 }, ..Epilogue::NONE };
//! gemm(&pool, m, n, k, &a, k, &panels, &mut c, n, &epilogue);
//! assert_eq!(c, [6.0, 6.0, 6.0, 6.0, 10.0, 10.0, 10.0, 10.0]);
//! ```
//!
//! Sizes are the caller's promise: a slice that is too short for the stated shape is a bug in the caller and
//! panics at the entry of the function, before anything is written.

pub mod arch;
mod blocks;
mod cached_attention;
mod conv;
mod depthwise;
mod elementwise;
mod epilogue;
mod gemm;
mod int8;
mod layout;
mod math;
mod matmul;
mod noise;
mod norm;
pub mod ops;
mod pack_rows;
mod pool;
mod rope;
mod routing;
mod threads;
pub mod training;

pub use arch::Isa;
pub use blocks::{
    BlockActivations, BlockWeights, ExpertFfn, block_matmul, block_matmul_scratch_len, can_quantize,
    dequantize_row, expert_ffn, expert_ffn_scratch_len, quantize_row,
};
pub use cached_attention::{
    CacheFormat, CachePart, CacheRows, CachedAttentionShape, cache_page_bytes, cached_attention,
    cached_attention_scratch_len, store_in_cache,
};
pub use conv::{
    ConvInput, ConvShape, ConvTransposeShape, conv_packed_len, conv_scratch_len, conv_transpose_packed_len,
    conv_transpose2d, conv2d, pack_conv, pack_conv_transpose, rows_under_window,
};
pub use elementwise::{Binary, Operand, Step, elementwise};
pub use epilogue::{Activation, Epilogue, Residual, activate};
pub use gemm::{gemm, pack_kn, pack_nk, packed_len};
pub use int8::{
    ByteInput, ByteOutput, ByteWeights, conv_bytes_supported, conv_packed_bytes_len, conv2d_bytes,
    gemm_bytes, pack_bytes, pack_bytes_rows, pack_conv_bytes, pack_conv_bytes_rows, packed_bytes_len,
};
pub use layout::transpose;
pub use matmul::{
    AttentionMask, AttentionShape, HeadStrides, Matrices, attention, attention_scratch_len, matmul,
    matmul_scratch_len,
};
pub use noise::{
    Noise, Pending, PerturbStep, Perturbation, ReplayStep, add_noise, gather_perturbed, perturb, replay_steps,
};
pub use norm::{layer_norm, rms_norm, softmax};
pub use pack_rows::{pack_conv_rows, pack_kn_rows, pack_nk_rows};
pub use pool::{PoolKind, PoolShape, global_average_pool, pool2d};
pub use rope::{RopePairing, RopeScaling, RopeShape, llama3_rope_factors, rope_angles, rotate};
pub use routing::{Scoring, choose_experts};
pub use threads::ThreadPool;
