use lightering_units::BlockFormat;
use serde::{Deserialize, Serialize};

use crate::Activation;

/// Operators of decoder language models.
///
/// All work row by row: the first dimension counts tokens, and a row's result does not depend on the rows beside it.
/// Weights are `u8` tensors `[outputs, bytes of a row]` whose rows are blocks of a [`BlockFormat`]. Caches are states of
/// `u8`, `[pages, bytes of a page]`; `pages` lists, for each row, the pages of its sequence in order, and is `-1` where
/// there is none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum LmOp {
    /// `(x f32 [rows, k], w u8 [n, row_bytes], bias? f32 [n])` to f32 `[rows, n]`: `x · wᵀ + bias`.
    BlockMatMul {
        /// Of the weights.
        format: BlockFormat,
    },
    /// `(table u8 [n, row_bytes], ids i32 [rows])` to f32 `[rows, k]`: rows of a table in blocks.
    BlockGather {
        /// Of the table.
        format: BlockFormat,
    },
    /// `(positions i32 [rows], factors? f32 [dims/2])` to f32 `[rows, dims]`: cosines, then sines, of the angles by
    /// which [`Rope`](LmOp::Rope) turns pairs. Factors divide the frequencies.
    RopeAngles {
        /// Turned elements of a head.
        dims: usize,
        /// Base of the frequencies, θ.
        base: f32,
        /// Stretching to longer contexts.
        scaling: RopeScaling,
        /// Multiplies cosines and sines.
        magnitude: f32,
    },
    /// `(x f32 [rows, heads · head_len], angles f32 [rows, dims])`: rotary position embedding (Su et al. 2021, §3.2).
    Rope {
        /// Heads in a row.
        heads: usize,
        /// The first turned element of each head.
        offset: usize,
        /// Pairs are neighbours rather than halves.
        interleaved: bool,
    },
    /// `(x f32 [rows, heads · len], w u8 [heads · n, row_bytes])` to f32 `[rows, heads · n]`: each head by a matrix of its
    /// own. Of the elements of a head, the product takes the first, as many as a row of weights has.
    HeadMatMul {
        /// Of the weights.
        format: BlockFormat,
        /// Heads in a row.
        heads: usize,
    },
    /// `(a f32 [rows, …], b? f32 [rows, …])` to f32 `[rows, heads · Σ len]`: each head is put together from pieces.
    JoinHeads {
        /// Heads in a row of the result.
        heads: usize,
        /// Of each head, in order.
        pieces: Vec<HeadPiece>,
    },
    /// `(cache, rows f32 [rows, heads · len], positions i32 [rows], pages i32 [rows, pages])` to the cache, updated in
    /// place.
    CacheStore {
        /// Values rather than keys, whose layout differs.
        values: bool,
        /// Of the cached elements.
        format: CacheFormat,
        /// Heads of keys and values.
        heads: usize,
        /// Positions of a page.
        page_len: usize,
    },
    /// `(q f32 [rows, heads · key_len], keys, values, positions i32 [rows], pages i32 [rows, pages], sinks? f32 [heads])`
    /// to f32 `[rows, heads · value_len]`: every row attends to the positions of its own sequence up to its own.
    CachedAttention(CachedAttentionAttributes),
    /// `(scores f32 [rows, experts], bias? f32 [experts])` to `(ids i32 [rows, k], weights f32 [rows, k])`: the k best
    /// experts of each row, best first. The bias takes part in the choice, not in the weight.
    Route {
        /// Experts of each row.
        k: usize,
        /// How scores become weights.
        scoring: RouteScoring,
        /// Divides the weights by their sum.
        normalise: bool,
        /// Multiplies the weights.
        scale: f32,
    },
    /// `(x f32 [rows, d], ids i32 [rows, k], weights f32 [rows, k], gate u8 [experts, h, …], up, down u8 [experts, d, …])`
    /// to f32 `[rows, d]`: the weighted sum of `down · (activation(gate·x) ∘ up·x)` over the experts of each row, in the
    /// order of `ids`.
    Experts {
        /// Of gate, up and down.
        formats: [BlockFormat; 3],
        /// Of the gate.
        activation: Activation,
    },
}

/// A run of elements of [`LmOp::JoinHeads`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadPiece {
    /// The operand that it comes from.
    pub input: usize,
    /// A row of that operand is one head, which all heads share, rather than as many heads as the result has.
    pub shared: bool,
    /// Where it begins within its head.
    pub offset: usize,
    /// Its elements.
    pub len: usize,
}

/// How rotary frequencies are stretched beyond the trained context.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All by the same factor (Chen et al. 2023).
    Linear {
        /// How much longer the context is.
        factor: f32,
    },
    /// YaRN (Peng et al. 2023, §3).
    Yarn {
        /// How much longer the context is.
        factor: f32,
        /// Positions that the model was trained on.
        original_context: usize,
        /// Rotations above which frequencies stay.
        beta_fast: f32,
        /// Rotations below which frequencies are stretched fully.
        beta_slow: f32,
    },
}

/// Element format of cached keys and values.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CacheFormat {
    F32,
    F16,
    /// 32 elements of 8 bits with one scale.
    Q8,
}

impl CacheFormat {
    /// Bytes of one head of one position; `None` where `len` is no whole number of blocks.
    pub fn head_bytes(self, len: usize) -> Option<usize> {
        match self {
            CacheFormat::F32 => len.checked_mul(4),
            CacheFormat::F16 => len.checked_mul(2),
            CacheFormat::Q8 => BlockFormat::Q8_0.row_bytes(len),
        }
    }
}

/// Attributes of [`LmOp::CachedAttention`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CachedAttentionAttributes {
    /// Of the cached elements.
    pub format: CacheFormat,
    /// Query heads.
    pub heads: usize,
    /// Heads of keys and values; they divide the query heads.
    pub kv_heads: usize,
    /// Elements of a key.
    pub key_len: usize,
    /// Elements of a value.
    pub value_len: usize,
    /// Positions of a page.
    pub page_len: usize,
    /// Of the scores.
    pub scale: f32,
    /// `softcap·tanh(score/softcap)`, if any.
    pub softcap: Option<f32>,
    /// A row sees only so many positions, its own included.
    pub window: Option<usize>,
}

/// How router scores become the weights of experts.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RouteScoring {
    /// Over all experts.
    Softmax,
    /// Over the chosen ones.
    SoftmaxOfChosen,
    Sigmoid,
}

impl LmOp {
    /// Fewest and most operands.
    pub fn input_count(&self) -> (usize, usize) {
        match self {
            LmOp::BlockMatMul { .. } => (2, 3),
            LmOp::BlockGather { .. } | LmOp::Rope { .. } | LmOp::HeadMatMul { .. } => (2, 2),
            LmOp::RopeAngles { .. } | LmOp::Route { .. } | LmOp::JoinHeads { .. } => (1, 2),
            LmOp::CacheStore { .. } => (4, 4),
            LmOp::CachedAttention(_) => (5, 6),
            LmOp::Experts { .. } => (6, 6),
        }
    }

    /// The operand that the first result replaces in place.
    pub fn updated_states(&self) -> usize {
        usize::from(matches!(self, LmOp::CacheStore { .. }))
    }
}
