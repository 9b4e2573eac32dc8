//! Which kernel computes a node, how it wants its weights, and the call itself.

mod call;
mod lower;
mod packing;

use lightering_graph::{Op, UnaryOp};
use lightering_kernels::{Activation, ConvShape, PoolKind, PoolShape};

pub(crate) use call::Call;
pub(crate) use lower::{Lowered, absorbed_transposes, lower};
pub(crate) use packing::Packing;

/// A kernel with everything that does not change between runs.
#[derive(Clone, Debug)]
pub(crate) enum Kernel {
    /// The general implementation behind [`crate::ops::compute`].
    Generic,
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
    },
    /// Matrix product with packed weights: `[rows, k]` by `[k, n]`.
    MatMul { rows: usize, k: usize, n: usize, activation: Activation },
    /// Pooling, channels last.
    Pool { shape: PoolShape, batch: usize, kind: PoolKind },
    /// Mean over the picture, channels last.
    GlobalAverage { batch: usize, pixels: usize, channels: usize },
    /// An activation over contiguous elements.
    Activate { activation: Activation },
}

impl Kernel {
    /// The kernel's name in plans and profiles.
    pub fn name(&self) -> &'static str {
        match self {
            Kernel::Generic => "general",
            Kernel::Dynamic => "dynamic",
            Kernel::GatherStored => "gather from file",
            Kernel::Conv { shape, .. } if shape.is_depthwise() => "conv depthwise",
            Kernel::Conv { shape, .. } if shape.is_pointwise() => "conv pointwise",
            Kernel::Conv { .. } => "conv",
            Kernel::MatMul { .. } => "matmul packed",
            Kernel::Pool { .. } => "pool",
            Kernel::GlobalAverage { .. } => "global average",
            Kernel::Activate { .. } => "activate",
        }
    }

    /// Fraction of the machine's matrix-product rate that this kernel reaches on arithmetic.
    pub fn efficiency(&self, _op: &Op) -> f64 {
        match self {
            Kernel::Conv { shape, .. } if shape.is_depthwise() => 0.25,
            Kernel::Conv { shape, .. } if shape.in_c / shape.groups < 8 => 0.4,
            Kernel::Conv { .. } | Kernel::MatMul { .. } => 0.8,
            Kernel::Pool { .. } | Kernel::GlobalAverage { .. } | Kernel::Activate { .. } => 0.15,
            Kernel::Generic | Kernel::Dynamic | Kernel::GatherStored => 0.03,
        }
    }

    /// Whether the first result may take the place of the first operand.
    pub fn works_in_place(&self, _op: &Op) -> bool {
        matches!(self, Kernel::Activate { .. })
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
