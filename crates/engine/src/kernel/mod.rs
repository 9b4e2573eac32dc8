//! Which kernel computes a node, how it wants its weights, and the call itself.

mod call;
mod lower;
mod packing;
mod training;

use lightering_graph::UnaryOp;
use std::sync::Arc;

use lightering_kernels::{Activation, AttentionShape, Binary, ConvShape, HeadStrides, PoolKind, PoolShape};
use lightering_units::BlockFormat;

use crate::experts::ExpertsShape;
pub(crate) use call::Call;
pub(crate) use lower::{Lowered, absorbed_transposes, lower};
pub(crate) use packing::{Packing, Scale};
pub(crate) use training::TrainKernel;

/// A kernel with everything that does not change between runs.
#[derive(Clone, Debug)]
pub(crate) enum Kernel {
    /// The general implementation behind [`crate::ops::compute`].
    Generic,
    /// Has a tensor written to the disk, beside what follows: number of the spill in the program.
    SpillStart(usize),
    /// Waits until it is there.
    SpillEnd(usize),
    /// Results on the counted heap; sizes are known when the node runs.
    Dynamic,
    /// `Gather` along axis 0 of a table that stays in its store.
    GatherStored,
    /// Two-dimensional convolution, channels last, packed weights.
    Conv {
        shape: ConvShape,
        batch: usize,
        activation: Activation,
        /// The operand is still in planes (`[batch, channels, height, width]`).
        planes: bool,
        columns: Columns,
    },
    /// Matrix product with packed weights: `[rows, k]` by `[k, n]`.
    MatMul { rows: usize, k: usize, n: usize, activation: Activation, columns: Columns },
    /// Pooling, channels last.
    Pool { shape: PoolShape, batch: usize, kind: PoolKind },
    /// Mean over the picture, channels last.
    GlobalAverage { batch: usize, pixels: usize, channels: usize },
    /// An activation over contiguous elements.
    Activate { activation: Activation },
    /// Element-wise steps in one sweep over rows of `n` elements; operand 0 has the shape of the result.
    Chain { n: usize, steps: Vec<ChainStep> },
    /// Matrix product with weights in blocks, read where they lie: `[rows, k]` by `[n, k]`.
    BlockMatMul { format: BlockFormat, k: usize, n: usize, columns: Columns },
    /// The experts of a layer; of the store's group, once they are in one.
    Experts { shape: ExpertsShape, group: Option<u32> },
    /// Another operator of language models, row by row; see [`crate::ops`].
    Language,
    /// Rows of a table in blocks that stays in its store.
    BlockGatherStored { format: BlockFormat },
    /// Batched product of two activations; strides 0 repeat a matrix.
    Product {
        batch: usize,
        shape: [usize; 3],
        a_step: usize,
        b_step: usize,
        transposed: bool,
        activation: Activation,
    },
    /// `softmax(q·k'·scale + mask)·v` per head.
    Attention { batch: usize, shape: AttentionShape, at: HeadPlaces, mask: Option<MaskPlace> },
    /// Softmax along the last axis.
    Softmax { rows: usize, n: usize },
    /// Layer normalisation over the last axis.
    LayerNorm { rows: usize, n: usize, epsilon: f32 },
    /// Root-mean-square normalisation over the last axis.
    RmsNorm { rows: usize, n: usize, epsilon: f32 },
    /// 8-bit convolution, channels last, packed weights.
    ByteConv { shape: ConvShape, batch: usize, bytes: Arc<Bytes8>, columns: Columns },
    /// 8-bit matrix product with packed weights.
    ByteMatMul { rows: usize, k: usize, n: usize, bytes: Arc<Bytes8> },
    /// A step of training: nothing of it is a constant.
    Train(Box<TrainKernel>),
}

/// Which output channels a kernel computes, when a large weight is read in chunks of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Columns {
    /// First of them.
    pub first: usize,
    /// Channels of the whole result: the distance between its rows.
    pub total: usize,
}

impl Columns {
    /// All of them.
    pub fn all(total: usize) -> Columns {
        Columns { first: 0, total }
    }
}

/// One step of [`Kernel::Chain`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum ChainStep {
    Unary(Activation),
    /// The running value with operand `operand`.
    Binary(Binary, usize, Broadcast),
}

/// How an operand of a chain lies against rows of `n` elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broadcast {
    Scalar,
    Column,
    Row,
    /// Rows of `n` elements that this many rows of the result share.
    Shared(usize),
    Full,
}

/// Distances of heads, positions and batches in the operands of an attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadPlaces {
    pub q: HeadStrides,
    pub k: HeadStrides,
    pub v: HeadStrides,
    pub y: HeadStrides,
    /// Elements per batch entry of q, k, v and the result.
    pub batch: [usize; 4],
}

/// Distances in a mask; 0 shares.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MaskPlace {
    pub batch: usize,
    pub head: usize,
    pub row: usize,
}

/// Parameters of an 8-bit product: what turns sums into bytes.
#[derive(Clone, Debug)]
pub(crate) struct Bytes8 {
    pub x_signed: bool,
    pub x_zero: i32,
    /// `x_scale · w_scale / y_scale`, one value or one per column.
    pub scale: Vec<f32>,
    pub w_zeros: Option<Vec<i32>>,
    pub y_signed: bool,
    pub y_zero: i32,
    pub limits: Option<(i32, i32)>,
}

impl Kernel {
    /// The kernel's name in plans and profiles.
    pub fn name(&self) -> &'static str {
        match self {
            Kernel::Generic => "general",
            Kernel::Dynamic => "dynamic",
            Kernel::SpillStart(_) => "spill",
            Kernel::SpillEnd(_) => "spilled",
            Kernel::GatherStored => "gather from file",
            Kernel::Conv { shape, .. } if shape.is_depthwise() => "conv depthwise",
            Kernel::Conv { shape, .. } if shape.is_pointwise() => "conv pointwise",
            Kernel::Conv { .. } => "conv",
            Kernel::MatMul { .. } => "matmul packed",
            Kernel::BlockMatMul { .. } => "block matmul",
            Kernel::Language => "language",
            Kernel::Experts { .. } => "experts",
            Kernel::BlockGatherStored { .. } => "gather from file",
            Kernel::Pool { .. } => "pool",
            Kernel::GlobalAverage { .. } => "global average",
            Kernel::Activate { .. } => "activate",
            Kernel::Chain { .. } => "chain",
            Kernel::Product { .. } => "product",
            Kernel::Attention { .. } => "attention",
            Kernel::Softmax { .. } => "softmax",
            Kernel::LayerNorm { .. } => "layer norm",
            Kernel::RmsNorm { .. } => "rms norm",
            Kernel::ByteConv { shape, .. } if shape.is_depthwise() => "byte conv depthwise",
            Kernel::ByteConv { .. } => "byte conv",
            Kernel::ByteMatMul { .. } => "byte matmul",
            Kernel::Train(kernel) => kernel.name(),
        }
    }

    /// Fraction of the machine's matrix-product rate that this kernel reaches on arithmetic, as measured over the models
    /// of `bench/` (`lighter bench --profile` shows predicted beside measured).
    pub fn efficiency(&self) -> f64 {
        match self {
            Kernel::Conv { shape, .. } if shape.is_depthwise() => 0.5,
            Kernel::Conv { shape, .. } if shape.in_c / shape.groups < 8 => 0.5,
            Kernel::Conv { shape, .. } if !shape.is_pointwise() => 0.92,
            Kernel::Conv { .. } | Kernel::MatMul { .. } => 0.88,
            Kernel::Product { .. } | Kernel::Attention { .. } => 0.68,
            Kernel::ByteConv { shape, .. } if shape.is_depthwise() => 0.53,
            Kernel::ByteConv { .. } | Kernel::ByteMatMul { .. } => 1.7,
            Kernel::BlockMatMul { .. } | Kernel::Experts { .. } => 1.0,
            Kernel::Language => 0.3,
            Kernel::Train(kernel) => kernel.efficiency(),
            Kernel::Chain { .. }
            | Kernel::Softmax { .. }
            | Kernel::LayerNorm { .. }
            | Kernel::RmsNorm { .. } => 0.1,
            Kernel::Pool { .. } | Kernel::GlobalAverage { .. } | Kernel::Activate { .. } => 0.15,
            Kernel::SpillStart(_) | Kernel::SpillEnd(_) => 1.0,
            Kernel::Generic | Kernel::Dynamic | Kernel::GatherStored | Kernel::BlockGatherStored { .. } => {
                0.03
            }
        }
    }

    /// Whether every row of the result comes from the same row of the operands that have rows, so that a program made
    /// for many rows can run for fewer.
    pub fn is_row_wise(&self, op: &lightering_graph::Op) -> bool {
        match self {
            Kernel::MatMul { .. }
            | Kernel::BlockMatMul { .. }
            | Kernel::Language
            | Kernel::Experts { .. }
            | Kernel::BlockGatherStored { .. }
            | Kernel::Chain { .. }
            | Kernel::Activate { .. }
            | Kernel::Softmax { .. }
            | Kernel::LayerNorm { .. }
            | Kernel::RmsNorm { .. } => true,
            Kernel::Generic => matches!(op, lightering_graph::Op::Gather { axis: 0 }),
            _ => false,
        }
    }

    /// Whether the first result may take the place of the first operand.
    pub fn works_in_place(&self) -> bool {
        matches!(self, Kernel::Activate { .. } | Kernel::Chain { .. })
    }
}

/// The fused activation that computes `op`, if there is one.
pub(crate) fn activation_of(op: Option<&UnaryOp>) -> Option<Activation> {
    Some(match *op.unwrap_or(&UnaryOp::Identity) {
        UnaryOp::Identity => Activation::None,
        UnaryOp::Relu => Activation::Relu,
        UnaryOp::ClipTo { min, max } => Activation::Clip { min, max },
        UnaryOp::HardSwish => Activation::HardSwish,
        UnaryOp::HardSigmoid { alpha, beta } => Activation::HardSigmoid { alpha, beta },
        UnaryOp::Sigmoid => Activation::Sigmoid,
        UnaryOp::Swish { alpha: 1.0 } => Activation::Silu,
        UnaryOp::Gelu { tanh: false } => Activation::Gelu,
        UnaryOp::Gelu { tanh: true } => Activation::GeluTanh,
        UnaryOp::LeakyRelu { alpha } => Activation::LeakyRelu { slope: alpha },
        UnaryOp::Elu { alpha } => Activation::Elu { alpha },
        UnaryOp::Tanh => Activation::Tanh,
        UnaryOp::Erf => Activation::Erf,
        UnaryOp::Exp => Activation::Exp,
        UnaryOp::Sqrt => Activation::Sqrt,
        UnaryOp::Abs => Activation::Abs,
        UnaryOp::Neg => Activation::Neg,
        _ => return None,
    })
}
