//! Kernels of training: products of two activations in every transposition, gradients of layers, statistics of batches,
//! losses, and updates of parameters.
//!
//! As everywhere in this crate memory comes from the caller, pictures lie channels last, and results have the same bits
//! for any number of threads: sums are cut into parts by the shape alone and added in a fixed order.

mod attention;
mod batch;
mod conv;
mod depthwise;
mod elementwise;
mod gather;
mod loss;
mod outer;
mod pool;
mod product;
mod recurrent;
mod reduce;
mod rows;
mod update;

pub use attention::{AttentionGradients, attention_grad, attention_grad_scratch_len};
pub use batch::{
    batch_scratch_len, batch_statistics, channel_sum, normalise, normalise_grad, track_statistics,
};
pub use conv::{
    TrainConv, conv_forward, conv_forward_scratch_len, conv_input_grad, conv_input_grad_scratch_len,
    conv_weight_grad, conv_weight_grad_scratch_len,
};
pub use elementwise::{UnaryGrad, mask_above, mask_between, mask_grad, unary_grad};
pub use gather::{gather_grad, swap_middle_axes};
pub use loss::{LossShape, Target, cross_entropy, cross_entropy_grad};
pub use pool::{average_pool_grad, max_pool_grad};
pub use product::{Transposed, product, product_scratch_len};
pub use recurrent::{LstmGradients, LstmOperands, LstmShape, lstm_grad, lstm_grad_scratch_len};
pub use reduce::{sum_leading, sum_leading_scratch_len, sum_trailing};
pub use rows::{layer_norm_grad, norm_grad_scratch_len, rms_norm_grad, softmax_grad};
pub use update::{AdamRule, Schedule, UpdatePlace, accumulate, adam_step, adam8_step, lion_step, sgd_step};

use crate::arch::Simd;
use crate::threads::ThreadPool;

/// Values per task of a sweep over memory.
const SWEEP: usize = 16 << 10;

/// Runs `f(first, count)` over chunks of `len` values whose results do not depend on the chunk.
fn over_chunks(pool: &ThreadPool, len: usize, f: &(dyn Fn(usize, usize) + Sync)) {
    let chunk = if pool.threads() == 1 || len < 2 * SWEEP {
        len.max(1)
    } else {
        // Some eight tasks per thread, whole cache lines.
        len.div_ceil(pool.threads() * 8).clamp(SWEEP, 1 << 20).next_multiple_of(256)
    };
    pool.parallel_for(len.div_ceil(chunk), &|index, _| f(index * chunk, chunk.min(len - index * chunk)));
}

/// Runs `f(first, count)` over chunks of `rows` rows of `n` values whose results do not depend on the chunk.
fn over_rows(pool: &ThreadPool, rows: usize, n: usize, f: &(dyn Fn(usize, usize) + Sync)) {
    let few = pool.threads() == 1 || rows * n < 2 * SWEEP;
    let step = if few { rows } else { rows.div_ceil(pool.threads() * 8) }.max(1);
    pool.parallel_for(rows.div_ceil(step), &|index, _| f(index * step, step.min(rows - index * step)));
}

/// The parts into which a sum over `rows` rows of `n` values is cut: rows per part. Depends on the shape alone.
fn part_rows(rows: usize, n: usize) -> usize {
    let parts = (rows * n / SWEEP).clamp(1, 16);
    rows.div_ceil(parts).max(1)
}

/// Loads `n` values, `n <= LANES`.
///
/// # Safety
/// `p` is valid for reading `n` values.
#[inline(always)]
unsafe fn get<S: Simd>(s: S, p: *const f32, n: usize) -> S::F {
    // SAFETY: by contract.
    unsafe { if n == S::LANES { s.load(p) } else { s.load_n(p, n) } }
}

/// Stores `n` values, `n <= LANES`.
///
/// # Safety
/// `p` is valid for writing `n` values.
#[inline(always)]
unsafe fn put<S: Simd>(s: S, p: *mut f32, n: usize, v: S::F) {
    // SAFETY: by contract.
    unsafe { if n == S::LANES { s.store(p, v) } else { s.store_n(p, n, v) } }
}

#[cfg(test)]
mod tests;
