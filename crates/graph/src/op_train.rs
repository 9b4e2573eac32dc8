//! Operators of training: gradients that no composition of other operators computes well, statistics of batches,
//! losses, and updates of parameters in place.

use serde::{Deserialize, Serialize};

use crate::{
    AttentionAttributes, ConvAttributes, GridPadding, PoolAttributes, RecurrentAttributes, ResizeAttributes,
    ResizeMode, UnaryOp,
};

/// An operator of [`Op::Train`](crate::Op::Train).
///
/// In every gradient operator `dy` is the gradient of the loss with respect to the result of the forward operator,
/// and the results are gradients with respect to its operands, of the same shape as these. Where the forward operand
/// itself is not needed, its shape is an attribute, so that nothing keeps it in memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum TrainOp {
    /// `(dy, w) -> dx`: gradient of a convolution with respect to its input, of shape `input`. The attributes are those
    /// of the convolution; its activation is no part of this.
    ConvInputGrad {
        /// The convolution.
        conv: ConvAttributes,
        /// Shape of the input.
        input: Vec<usize>,
    },
    /// `(x, dy) -> dw`: gradient of a convolution with respect to its weights, of shape `weight` (`[out, in/groups,
    /// spatial…]`). With a slice of the channels of `x` it is the gradient of that slice of the weights.
    ConvWeightGrad {
        /// The convolution.
        conv: ConvAttributes,
        /// Shape of the weights.
        weight: Vec<usize>,
    },
    /// `(dy, x?, y?) -> dx`: gradient of a pooling layer whose input has shape `input`. Maxima need `x` and `y`; the
    /// first of several equal elements of a window, in row-major order, takes all.
    PoolGrad {
        /// The pooling layer.
        pool: PoolAttributes,
        /// Shape of the input.
        input: Vec<usize>,
    },
    /// `(indices, dy) -> dx`: rows of `dy` added up where `Gather` along `axis` took them from a table of shape `input`.
    GatherGrad {
        /// Axis of the gather, from the front.
        axis: usize,
        /// Shape of the table.
        input: Vec<usize>,
    },
    /// `(dy) -> dx`: gradient of a resizing of a picture of shape `input`, with the scales that it was made with (one
    /// per dimension).
    ResizeGrad {
        /// The resizing.
        resize: ResizeAttributes,
        /// Shape of the input.
        input: Vec<usize>,
        /// Output over input per dimension, as the coordinate transformation uses it.
        scales: Vec<f64>,
    },
    /// `(x, grid, dy) -> (dx, dgrid)`: gradient of sampling a picture at the places of a grid. Composed of gathers and
    /// scatters it would hold every corner of every sample in memory at once.
    GridSampleGrad {
        /// Interpolation.
        mode: ResizeMode,
        /// Outside the picture.
        padding: GridPadding,
        /// −1 and 1 are corner centres.
        align_corners: bool,
    },
    /// `(x, dy) -> dx`: gradient of the determinant, `dy` times the cofactors; no other operator inverts a matrix.
    DetGrad,
    /// `(saved, dy) -> dx`: gradient of a unary operator; `saved` is its result if
    /// [`TrainOp::unary_saves_result`], else its operand.
    UnaryGrad(UnaryOp),
    /// `(y, dy) -> dx`: gradient of (log-)softmax from its result.
    SoftmaxGrad {
        /// Axis, counted from the end when negative.
        axis: i64,
        /// Of the logarithm.
        log: bool,
    },
    /// `(x, scale?, dy) -> (dx, dscale, dbias)`: gradient of layer normalisation.
    LayerNormGrad {
        /// First normalised axis.
        axis: i64,
        /// As in the forward operator.
        epsilon: f32,
    },
    /// `(x, scale, dy) -> (dx, dscale)`: gradient of root-mean-square normalisation.
    RmsNormGrad {
        /// First normalised axis.
        axis: i64,
        /// As in the forward operator.
        epsilon: f32,
    },
    /// `(x) -> (mean, variance)` over all axes but `axis`; the variance is the biased one.
    BatchStatistics {
        /// The channels.
        axis: usize,
    },
    /// `(running_mean, running_variance, mean, variance) -> (running_mean, running_variance)`, in place:
    /// `running = (1 - rate)·running + rate·batch`, the variance of the batch times `unbias` first.
    TrackStatistics {
        /// Weight of the batch, 0 to 1.
        rate: f32,
        /// `n / (n - 1)` for `n` elements per channel.
        unbias: f32,
    },
    /// `(x, mean, variance, scale?, bias?) -> y = (x - mean) / sqrt(variance + epsilon) · scale + bias`, per channel.
    Normalise {
        /// The channels.
        axis: usize,
        /// Added to the variance.
        epsilon: f32,
    },
    /// `(x, dy, mean, variance, scale?) -> (dx, dscale, dbias)`: gradient of [`TrainOp::Normalise`].
    NormaliseGrad {
        /// The channels.
        axis: usize,
        /// Added to the variance.
        epsilon: f32,
        /// Mean and variance are those of `x` and have a gradient of their own; else they are constants.
        batch: bool,
    },
    /// `(dy) -> db`: sum over all axes but `axis`, the gradient of a bias.
    ChannelSum {
        /// The channels.
        axis: usize,
    },
    /// `(logits, labels, weights?) -> (loss, rows)`: cross-entropy of every row, times its weight, and the sum of these
    /// over the number of rows that count (0 when none does). `logits` is `[…, classes]`; `labels` are integers `[…]` or
    /// probabilities of the shape of `logits`; `weights` has one factor per row and does not change the number of rows.
    CrossEntropy {
        /// Part of the target that is spread over all classes.
        label_smoothing: f32,
        /// Rows with this label count for nothing, in the mean neither.
        ignore: Option<i64>,
    },
    /// `(logits, labels, dloss, weights?) -> dlogits`: gradient of the first result of [`TrainOp::CrossEntropy`].
    CrossEntropyGrad {
        /// As in the forward operator.
        label_smoothing: f32,
        /// As in the forward operator.
        ignore: Option<i64>,
    },
    /// `(x) -> bits`: one bit per element, the first in the lowest bit of the first byte; bytes of a flat `u8` tensor.
    SignMask(MaskRule),
    /// `(bits, dy) -> dx`: `dy` where the bit is set, else 0.
    MaskGrad,
    /// Gradient of a recurrent layer, its forward pass computed anew: `(x, w, r, b?, lengths?, initial_h?, initial_c?,
    /// peepholes?, dy?, dy_h?, dy_c?) -> (dx, dw, dr, db, dinitial_h, dinitial_c, dpeepholes)`. Networks without a cell
    /// have no `initial_c`, no `peepholes`: these operands stay absent.
    RecurrentGrad {
        /// Which layer.
        cell: RecurrentCell,
        /// As in the forward operator.
        attributes: RecurrentAttributes,
    },
    /// `(q, k, v, mask?, dy) -> (dq, dk, dv)`: gradient of attention, its probabilities computed anew.
    AttentionGrad(AttentionAttributes),
    /// `(parameter, moments…, gradient, schedule, channels?) -> (parameter, moments…)`, in place: one step of an
    /// optimizer. There are [`UpdateRule::moments`] moments. `schedule` is `[rate, scale, correction1, correction2]`: the
    /// learning rate, a factor for the gradient (clipping, loss scaling), and `1 - beta^t` of both moments. With
    /// `channels` (integers, ascending) the gradient and the moments are those of these channels along `axis` alone.
    Update {
        /// Which optimizer.
        rule: UpdateRule,
        /// Axis of `channels`.
        axis: usize,
    },
    /// `(parameter, zo, seeds) -> parameter`, in place: part of a step along random directions (MeZO). `zo` is `[eps, rate,
    /// gradient, pending]`: how far, then learning rate and projected gradient of the step before, and what is left of that:
    /// 0 nothing, 1 to go back, 2 to go back and to follow the gradient. `seeds` are the integers of the noise of the step
    /// before and of this one.
    Perturb {
        /// Number of the parameter, which tells its noise from that of others.
        stream: u32,
        /// Which part.
        part: PerturbPart,
        /// Weight decay.
        decay: f32,
    },
    /// `(table, indices, zo, seeds) -> (plus, minus)`: rows of a table of two dimensions as they are after
    /// [`PerturbPart::Begin`] and after [`PerturbPart::Cross`], the table staying as it is.
    GatherPerturbed {
        /// As in [`TrainOp::Perturb`].
        stream: u32,
        /// Weight decay.
        decay: f32,
    },
}

/// Part of a step along a random direction `z`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PerturbPart {
    /// What is left of the step before, then `parameter += eps·z`.
    Begin,
    /// `parameter -= 2·eps·z`.
    Cross,
}

/// Which elements a mask lets through.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum MaskRule {
    /// Elements above a threshold.
    Above(f32),
    /// Elements strictly between two bounds.
    Between(f32, f32),
}

/// A kind of recurrent layer.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RecurrentCell {
    Rnn,
    Gru,
    Lstm,
}

/// How a parameter follows its gradient `g`. Where nothing else is said, `weight_decay` is added to the gradient as
/// `weight_decay · parameter`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum UpdateRule {
    /// `parameter += g · scale`: accumulates gradients over small batches.
    Accumulate,
    /// Stochastic gradient descent; `velocity = momentum · velocity + g`, without a moment when `momentum` is 0.
    Sgd {
        /// Decay of the velocity.
        momentum: f32,
        /// Looks ahead by one velocity.
        nesterov: bool,
        /// See [`UpdateRule`].
        weight_decay: f32,
    },
    /// Adam; with `decoupled` weight decay it is AdamW.
    Adam {
        /// Decay of the first moment.
        beta1: f32,
        /// Decay of the second moment.
        beta2: f32,
        /// Added to the root of the second moment.
        epsilon: f32,
        /// See [`UpdateRule`]; decoupled: `parameter -= rate · weight_decay · parameter`.
        weight_decay: f32,
        /// Keeps the decay out of the moments.
        decoupled: bool,
    },
    /// Adam with both moments in 8 bits: blocks of 256 elements with one f32 scale each, stored as `u8` rows of
    /// [`EIGHT_BIT_BLOCK`] bytes. The decay is decoupled.
    Adam8 {
        /// Decay of the first moment.
        beta1: f32,
        /// Decay of the second moment.
        beta2: f32,
        /// Added to the root of the second moment.
        epsilon: f32,
        /// Decoupled.
        weight_decay: f32,
    },
    /// Lion: the sign of an interpolated momentum; the decay is decoupled.
    Lion {
        /// Interpolation of the step.
        beta1: f32,
        /// Decay of the momentum.
        beta2: f32,
        /// Decoupled.
        weight_decay: f32,
    },
}

/// Elements of a block of 8-bit optimizer state.
pub const EIGHT_BIT_LEN: usize = 256;
/// Bytes of such a block: its scale as f32, then the elements.
pub const EIGHT_BIT_BLOCK: usize = 4 + EIGHT_BIT_LEN;

impl UpdateRule {
    /// States kept beside a parameter.
    pub fn moments(self) -> usize {
        match self {
            UpdateRule::Accumulate => 0,
            UpdateRule::Sgd { momentum, .. } => usize::from(momentum != 0.0),
            UpdateRule::Lion { .. } => 1,
            UpdateRule::Adam { .. } | UpdateRule::Adam8 { .. } => 2,
        }
    }
}

impl TrainOp {
    /// Fewest and most operands.
    pub fn input_count(&self) -> (usize, usize) {
        match self {
            TrainOp::ConvInputGrad { .. }
            | TrainOp::ConvWeightGrad { .. }
            | TrainOp::GatherGrad { .. }
            | TrainOp::UnaryGrad(_)
            | TrainOp::SoftmaxGrad { .. }
            | TrainOp::MaskGrad
            | TrainOp::DetGrad => (2, 2),
            TrainOp::GridSampleGrad { .. } => (3, 3),
            TrainOp::PoolGrad { .. } => (1, 3),
            TrainOp::ResizeGrad { .. }
            | TrainOp::BatchStatistics { .. }
            | TrainOp::ChannelSum { .. }
            | TrainOp::SignMask(_) => (1, 1),
            TrainOp::LayerNormGrad { .. } | TrainOp::RmsNormGrad { .. } => (3, 3),
            TrainOp::TrackStatistics { .. } => (4, 4),
            TrainOp::Normalise { .. } => (3, 5),
            TrainOp::NormaliseGrad { .. } => (4, 5),
            TrainOp::CrossEntropy { .. } => (2, 3),
            TrainOp::CrossEntropyGrad { .. } => (3, 4),
            TrainOp::RecurrentGrad { .. } => (9, 11),
            TrainOp::AttentionGrad(_) => (5, 5),
            TrainOp::Update { rule, .. } => (3 + rule.moments(), 4 + rule.moments()),
            TrainOp::Perturb { .. } => (3, 3),
            TrainOp::GatherPerturbed { .. } => (4, 4),
        }
    }

    /// How many of the first operands are states that the results of the same place overwrite.
    pub fn updated_states(&self) -> usize {
        match self {
            TrainOp::TrackStatistics { .. } => 2,
            TrainOp::Update { rule, .. } => 1 + rule.moments(),
            TrainOp::Perturb { .. } => 1,
            _ => 0,
        }
    }

    /// Whether the gradient of `op` is computed from its result, so that its operand need not be kept.
    pub fn unary_saves_result(op: &UnaryOp) -> bool {
        matches!(
            op,
            UnaryOp::Relu
                | UnaryOp::ClipTo { .. }
                | UnaryOp::LeakyRelu { .. }
                | UnaryOp::Sigmoid
                | UnaryOp::Tanh
                | UnaryOp::Exp
                | UnaryOp::Sqrt
                | UnaryOp::Rsqrt
                | UnaryOp::Reciprocal
        )
    }
}
