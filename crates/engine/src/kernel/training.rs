//! The choice and the call of kernels of training, where no operand is a constant.

use lightering_graph::{
    Constant, ConvAttributes, Direction, GemmAttributes, Graph, Layout, MaskRule, MatMulAttributes, Node, Op,
    PerturbPart, PoolAttributes, RecurrentAttributes, RecurrentCell, ReduceOp, TrainOp, UnaryOp, UpdateRule,
};
use lightering_kernels::training::{
    self as kernels, AdamRule, LossShape, LstmGradients, LstmOperands, LstmShape, Schedule, Target,
    TrainConv, Transposed, UnaryGrad, UpdatePlace,
};
use lightering_kernels::{Activation, AttentionMask, AttentionShape, Matrices, PoolShape, transpose};
use lightering_kernels::{Pending, PerturbStep, Perturbation};
use lightering_units::DType;

use super::lower::{Lowered, attention_of, dims_of, f32_dims, pair, shape_of, window_pads};
use super::{Call, HeadPlaces, Kernel, MaskPlace, activation_of};
use crate::EngineError;
use crate::ops::{OpError, TensorView, TensorViewMut};

/// A kernel of training with everything that does not change between runs.
#[derive(Clone, Debug)]
pub(crate) enum TrainKernel {
    /// Batched product of two operands, either of which may lie transposed.
    Product {
        batch: usize,
        shape: [usize; 3],
        alpha: f32,
        a: Matrices,
        b: Matrices,
        transposed: Transposed,
        activation: Activation,
    },
    /// Convolution whose weights are packed at each call.
    Conv {
        conv: TrainConv,
        activation: Activation,
    },
    ConvInputGrad(TrainConv),
    ConvWeightGrad(TrainConv),
    MaxPoolGrad {
        shape: PoolShape,
        batch: usize,
    },
    AveragePoolGrad {
        shape: PoolShape,
        batch: usize,
        count_include_pad: bool,
    },
    BatchStatistics {
        rows: usize,
        channels: usize,
    },
    TrackStatistics {
        rate: f32,
        unbias: f32,
    },
    Normalise {
        rows: usize,
        channels: usize,
        epsilon: f32,
    },
    NormaliseGrad {
        rows: usize,
        channels: usize,
        epsilon: f32,
        batch: bool,
    },
    UnaryGrad(UnaryGrad),
    SignMask(MaskRule),
    MaskGrad,
    SoftmaxGrad {
        rows: usize,
        n: usize,
        log: bool,
    },
    LayerNormGrad {
        rows: usize,
        n: usize,
        epsilon: f32,
    },
    RmsNormGrad {
        rows: usize,
        n: usize,
        epsilon: f32,
    },
    CrossEntropy(LossShape),
    CrossEntropyGrad(LossShape),
    GatherGrad {
        rows: usize,
        n: usize,
    },
    /// Sum over the middle of `[outer, middle, inner]`, times a factor.
    Sum {
        shape: [usize; 3],
        scale: f32,
    },
    /// `[a, b, c, n]` to `[a, c, b, n]`.
    SwapAxes([usize; 4]),
    AttentionGrad {
        batch: usize,
        shape: AttentionShape,
        at: HeadPlaces,
        mask: Option<MaskPlace>,
    },
    LstmGrad(LstmShape),
    Update {
        rule: UpdateRule,
        outer: usize,
        axis: usize,
        inner: usize,
    },
    Perturb {
        stream: u32,
        step: PerturbStep,
        decay: f32,
    },
    /// Rows of a table of so many columns.
    GatherPerturbed {
        stream: u32,
        decay: f32,
        width: usize,
    },
}

impl TrainKernel {
    /// The kernel's name in plans and profiles.
    pub fn name(&self) -> &'static str {
        match self {
            TrainKernel::Product { .. } => "product packed",
            TrainKernel::Conv { conv, .. } if conv.shape.is_depthwise() => "conv depthwise, packing",
            TrainKernel::Conv { .. } => "conv, packing",
            TrainKernel::ConvInputGrad(conv) if conv.shape.is_depthwise() => "conv depthwise input grad",
            TrainKernel::ConvInputGrad(_) => "conv input grad",
            TrainKernel::ConvWeightGrad(conv) if conv.shape.is_depthwise() => "conv depthwise weight grad",
            TrainKernel::ConvWeightGrad(_) => "conv weight grad",
            TrainKernel::MaxPoolGrad { .. } | TrainKernel::AveragePoolGrad { .. } => "pool grad",
            TrainKernel::BatchStatistics { .. } => "batch statistics",
            TrainKernel::TrackStatistics { .. } => "track statistics",
            TrainKernel::Normalise { .. } => "normalise",
            TrainKernel::NormaliseGrad { .. } => "normalise grad",
            TrainKernel::UnaryGrad(_) => "unary grad",
            TrainKernel::SignMask(_) => "sign mask",
            TrainKernel::MaskGrad => "mask grad",
            TrainKernel::SoftmaxGrad { .. } => "softmax grad",
            TrainKernel::LayerNormGrad { .. } => "layer norm grad",
            TrainKernel::RmsNormGrad { .. } => "rms norm grad",
            TrainKernel::CrossEntropy(_) => "cross entropy",
            TrainKernel::CrossEntropyGrad(_) => "cross entropy grad",
            TrainKernel::GatherGrad { .. } => "gather grad",
            TrainKernel::Sum { .. } => "sum",
            TrainKernel::SwapAxes(_) => "swap axes",
            TrainKernel::AttentionGrad { .. } => "attention grad",
            TrainKernel::LstmGrad(_) => "lstm grad",
            TrainKernel::Update { .. } => "update",
            TrainKernel::Perturb { .. } => "perturb",
            TrainKernel::GatherPerturbed { .. } => "gather perturbed",
        }
    }

    /// See [`Kernel::efficiency`].
    pub fn efficiency(&self) -> f64 {
        match self {
            TrainKernel::Conv { conv, .. }
            | TrainKernel::ConvInputGrad(conv)
            | TrainKernel::ConvWeightGrad(conv)
                if conv.shape.is_depthwise() =>
            {
                0.3
            }
            TrainKernel::Product { .. }
            | TrainKernel::Conv { .. }
            | TrainKernel::ConvInputGrad(_)
            | TrainKernel::ConvWeightGrad(_) => 0.8,
            TrainKernel::AttentionGrad { .. } | TrainKernel::LstmGrad(_) => 0.6,
            _ => 0.1,
        }
    }
}

/// Chooses a kernel of training for a node whose types are all known.
pub(super) fn lower(graph: &Graph, node: &Node, threads: usize) -> Option<Lowered> {
    let (kernel, workspace) = match &node.op {
        Op::Conv(a) => conv(graph, node, a, threads)?,
        Op::MatMul(a) => matmul(graph, node, a, threads)?,
        Op::Gemm(a) => gemm(graph, node, a, threads)?,
        Op::Reduce { op, noop_with_empty_axes, .. } => reduce(graph, node, *op, *noop_with_empty_axes)?,
        Op::Transpose { perm: Some(perm) } => (swap_axes(graph, node, perm)?, 0),
        Op::Train(op) => train(graph, node, op, threads)?,
        _ => return None,
    };
    let kernel = Kernel::Train(Box::new(kernel));
    Some(Lowered { workspace: workspace * size_of::<f32>(), ..Lowered::generic(kernel) })
}

type Choice = Option<(TrainKernel, usize)>;

fn conv(graph: &Graph, node: &Node, a: &ConvAttributes, threads: usize) -> Choice {
    let (x, w) = (f32_dims(graph, node, 0)?, f32_dims(graph, node, 1)?);
    let y = dims_of(graph, node.output(0)?, DType::F32)?;
    let conv = train_conv(&x, &w, &y, a)?;
    let bias = node.input(2).is_none_or(|_| {
        f32_dims(graph, node, 2).is_some_and(|d| d.iter().product::<usize>() == conv.shape.out_c)
    });
    let residual = node.input(3).is_none_or(|_| f32_dims(graph, node, 3).is_some_and(|d| d == y));
    if !bias || !residual || node.input(4).is_some() {
        return None;
    }
    let activation = activation_of(a.activation.as_ref())?;
    let workspace = kernels::conv_forward_scratch_len(&conv, threads);
    Some((TrainKernel::Conv { conv, activation }, workspace))
}

/// A channels-last convolution of pictures; `None` when it is something else.
fn train_conv(x: &[usize], w: &[usize], y: &[usize], a: &ConvAttributes) -> Option<TrainConv> {
    if a.layout != Layout::ChannelsLast {
        return None;
    }
    let shape = shape_of(x, w, y, a)?;
    let groups = shape.groups;
    let fits = groups > 0
        && shape.in_c.is_multiple_of(groups)
        && shape.out_c.is_multiple_of(groups)
        && w[0] == shape.out_c
        && w[1] * groups == shape.in_c
        && x.iter().chain(w).chain(y).all(|&d| d > 0);
    fits.then_some(TrainConv { shape, batch: x[0] })
}

fn matmul(graph: &Graph, node: &Node, a: &MatMulAttributes, threads: usize) -> Choice {
    let (x, w) = (f32_dims(graph, node, 0)?, f32_dims(graph, node, 1)?);
    let residual = node.input(3).is_some();
    if x.len() < 2 || w.len() < 2 || node.input(4).is_some() || (residual && a.trans_a) {
        return None;
    }
    let result = dims_of(graph, node.output(0)?, DType::F32)?;
    if residual && f32_dims(graph, node, 3)? != result {
        return None;
    }
    let (lead_x, lead_w) = (&x[..x.len() - 2], &w[..w.len() - 2]);
    let (count_x, count_w) = (lead_x.iter().product::<usize>(), lead_w.iter().product::<usize>());
    let (a_size, b_size) = (x[x.len() - 2] * x[x.len() - 1], w[w.len() - 2] * w[w.len() - 1]);
    let (batch, a_step, b_step) = if lead_x == lead_w {
        (count_x, a_size, b_size)
    } else if count_w == 1 {
        (count_x, a_size, 0)
    } else if count_x == 1 {
        (count_w, 0, b_size)
    } else {
        return None;
    };
    let activation = activation_of(a.activation.as_ref())?;
    let transposed = Transposed { a: a.trans_a, b: a.trans_b };
    product(graph, node, batch, &x, &w, [a_step, b_step], a.alpha, transposed, activation, threads)
}

fn gemm(graph: &Graph, node: &Node, a: &GemmAttributes, threads: usize) -> Choice {
    let (x, w) = (f32_dims(graph, node, 0)?, f32_dims(graph, node, 1)?);
    if x.len() != 2 || w.len() != 2 || (node.input(2).is_some() && a.beta != 1.0) {
        return None;
    }
    let transposed = Transposed { a: a.trans_a, b: a.trans_b };
    product(graph, node, 1, &x, &w, [0, 0], a.alpha, transposed, Activation::None, threads)
}

fn product(
    graph: &Graph,
    node: &Node,
    batch: usize,
    x: &[usize],
    w: &[usize],
    [a_step, b_step]: [usize; 2],
    alpha: f32,
    transposed: Transposed,
    activation: Activation,
    threads: usize,
) -> Choice {
    let last = |d: &[usize]| (d[d.len() - 2], d[d.len() - 1]);
    let ((a_rows, a_columns), (b_rows, b_columns)) = (last(x), last(w));
    let (m, k) = if transposed.a { (a_columns, a_rows) } else { (a_rows, a_columns) };
    let n = if transposed.b { b_rows } else { b_columns };
    if node.input(2).is_some() {
        let bias = f32_dims(graph, node, 2)?;
        let row = bias.last() == Some(&n) && bias.iter().product::<usize>() == n;
        if !row {
            return None;
        }
    }
    let shape = [m, n, k];
    let workspace = kernels::product_scratch_len(batch, shape, transposed, threads);
    let kernel = TrainKernel::Product {
        batch,
        shape,
        alpha,
        a: Matrices { batch_stride: a_step, row_stride: a_columns },
        b: Matrices { batch_stride: b_step, row_stride: b_columns },
        transposed,
        activation,
    };
    Some((kernel, workspace))
}

/// Sums and means over axes that lie beside each other.
fn reduce(graph: &Graph, node: &Node, op: ReduceOp, noop_with_empty_axes: bool) -> Choice {
    let x = f32_dims(graph, node, 0)?;
    let axes = match node.input(1) {
        None if noop_with_empty_axes => return None,
        None => (0..x.len()).collect(),
        Some(v) => {
            let Some(Constant::Inline(axes)) = graph.value(v).constant() else { return None };
            let axes = axes.to_i64s()?;
            if axes.is_empty() {
                return None;
            }
            let rank = x.len() as i64;
            let place = |a: i64| usize::try_from(if a < 0 { a + rank } else { a }).ok();
            axes.into_iter().map(place).collect::<Option<Vec<_>>>()?
        }
    };
    if axes.iter().any(|&a| a >= x.len()) || x.contains(&0) {
        return None;
    }
    // Axes of size 1 count on either side.
    let real = |i: &usize| x[*i] > 1;
    let first = (0..x.len()).filter(real).find(|i| axes.contains(i)).unwrap_or(0);
    let end = (0..x.len()).filter(real).rfind(|i| axes.contains(i)).map_or(first, |i| i + 1);
    if (first..end).filter(real).any(|i| !axes.contains(&i)) {
        return None;
    }
    let size = |r: std::ops::Range<usize>| x[r].iter().product::<usize>();
    let shape = [size(0..first), size(first..end), size(end..x.len())];
    let scale = match op {
        ReduceOp::Sum => 1.0,
        ReduceOp::Mean => 1.0 / shape[1] as f32,
        _ => return None,
    };
    let workspace =
        if shape[2] == 1 { 0 } else { kernels::sum_leading_scratch_len(shape[0], shape[1], shape[2]) };
    Some((TrainKernel::Sum { shape, scale }, workspace))
}

/// A transposition that makes two runs of axes change places.
fn swap_axes(graph: &Graph, node: &Node, perm: &[usize]) -> Option<TrainKernel> {
    let x = f32_dims(graph, node, 0)?;
    let rank = x.len();
    if perm.len() != rank {
        return None;
    }
    let prefix = (0..rank).take_while(|&i| perm[i] == i).count();
    if prefix == rank {
        return None;
    }
    let end = rank - (0..rank).rev().take_while(|&i| perm[i] == i).count();
    let first = perm[prefix];
    let turned = (first..end).chain(prefix..first);
    if first >= end || !turned.eq(perm[prefix..end].iter().copied()) {
        return None;
    }
    let size = |r: std::ops::Range<usize>| x[r].iter().product::<usize>();
    let sizes = [size(0..prefix), size(prefix..first), size(first..end), size(end..rank)];
    // Short rows are left to the general kernel.
    (sizes[3] == 1 || sizes[3] >= 8).then_some(TrainKernel::SwapAxes(sizes))
}

/// The derivative that a kernel has for `op`.
fn unary_grad(op: &UnaryOp) -> Option<UnaryGrad> {
    Some(match *op {
        UnaryOp::Identity => UnaryGrad::Identity,
        UnaryOp::Neg => UnaryGrad::Neg,
        UnaryOp::Abs => UnaryGrad::Abs,
        UnaryOp::Relu => UnaryGrad::Relu,
        UnaryOp::ClipTo { min, max } => UnaryGrad::Clip { min, max },
        UnaryOp::LeakyRelu { alpha } => UnaryGrad::LeakyRelu { slope: alpha },
        UnaryOp::Sigmoid => UnaryGrad::Sigmoid,
        UnaryOp::Tanh => UnaryGrad::Tanh,
        UnaryOp::Exp => UnaryGrad::Exp,
        UnaryOp::Sqrt => UnaryGrad::Sqrt,
        UnaryOp::Rsqrt => UnaryGrad::Rsqrt,
        UnaryOp::Reciprocal => UnaryGrad::Reciprocal,
        UnaryOp::Log => UnaryGrad::Log,
        UnaryOp::HardSwish => UnaryGrad::HardSwish,
        UnaryOp::HardSigmoid { alpha, beta } => UnaryGrad::HardSigmoid { alpha, beta },
        UnaryOp::Swish { alpha } => UnaryGrad::Swish { alpha },
        UnaryOp::Gelu { tanh: false } => UnaryGrad::Gelu,
        UnaryOp::Gelu { tanh: true } => UnaryGrad::GeluTanh,
        UnaryOp::Elu { alpha } => UnaryGrad::Elu { alpha },
        UnaryOp::Erf => UnaryGrad::Erf,
        UnaryOp::Softplus => UnaryGrad::Softplus,
        UnaryOp::Softsign => UnaryGrad::Softsign,
        _ => return None,
    })
}

/// Rows and channels when `axis` is the last one of an f32 operand.
fn last_axis(graph: &Graph, node: &Node, operand: usize, axis: i64) -> Option<(usize, usize)> {
    let x = f32_dims(graph, node, operand)?;
    let last = axis == -1 || axis == x.len() as i64 - 1;
    let n = *x.last()?;
    let rows = x[..x.len() - 1].iter().product();
    (last && n > 0 && rows > 0).then_some((rows, n))
}

/// Whether all operands that are there have f32 elements.
fn all_f32(graph: &Graph, node: &Node, operands: std::ops::Range<usize>) -> bool {
    operands.into_iter().all(|i| node.input(i).is_none() || f32_dims(graph, node, i).is_some())
}

fn is_index(graph: &Graph, node: &Node, operand: usize) -> bool {
    let ty = node.input(operand).and_then(|v| graph.value(v).ty.tensor());
    ty.is_some_and(|t| matches!(t.dtype, DType::I32 | DType::I64))
}

fn train(graph: &Graph, node: &Node, op: &TrainOp, threads: usize) -> Choice {
    Some(match op {
        TrainOp::ConvInputGrad { conv, input } => {
            let (dy, w) = (f32_dims(graph, node, 0)?, f32_dims(graph, node, 1)?);
            let conv = train_conv(input, &w, &dy, conv)?;
            (TrainKernel::ConvInputGrad(conv), kernels::conv_input_grad_scratch_len(&conv, threads))
        }
        TrainOp::ConvWeightGrad { conv, weight } => {
            let (x, dy) = (f32_dims(graph, node, 0)?, f32_dims(graph, node, 1)?);
            let conv = train_conv(&x, weight, &dy, conv)?;
            (TrainKernel::ConvWeightGrad(conv), kernels::conv_weight_grad_scratch_len(&conv, threads))
        }
        TrainOp::PoolGrad { pool, input } => (pool_grad(graph, node, pool, input)?, 0),
        TrainOp::GatherGrad { axis: 0, input } => {
            let (rows, n) = (*input.first()?, input[1..].iter().product());
            if !is_index(graph, node, 0) || f32_dims(graph, node, 1).is_none() || rows == 0 || n == 0 {
                return None;
            }
            (TrainKernel::GatherGrad { rows, n }, 0)
        }
        TrainOp::UnaryGrad(op) => {
            f32_dims(graph, node, 0)?;
            (TrainKernel::UnaryGrad(unary_grad(op)?), 0)
        }
        TrainOp::SoftmaxGrad { axis, log } => {
            let (rows, n) = last_axis(graph, node, 0, *axis)?;
            (TrainKernel::SoftmaxGrad { rows, n, log: *log }, 0)
        }
        TrainOp::LayerNormGrad { axis, epsilon } => {
            let (rows, n) = last_axis(graph, node, 0, *axis)?;
            let kernel = TrainKernel::LayerNormGrad { rows, n, epsilon: *epsilon };
            (kernel, kernels::norm_grad_scratch_len(rows, n))
        }
        TrainOp::RmsNormGrad { axis, epsilon } => {
            let (rows, n) = last_axis(graph, node, 0, *axis)?;
            let kernel = TrainKernel::RmsNormGrad { rows, n, epsilon: *epsilon };
            (kernel, kernels::norm_grad_scratch_len(rows, n))
        }
        TrainOp::BatchStatistics { axis } => {
            let (rows, channels) = last_axis(graph, node, 0, *axis as i64)?;
            // Room for a result that nobody wants.
            let workspace = kernels::batch_scratch_len(rows, channels) + channels;
            (TrainKernel::BatchStatistics { rows, channels }, workspace)
        }
        TrainOp::TrackStatistics { rate, unbias } => {
            let both = node.output(0).is_some() && node.output(1).is_some();
            if !both || !all_f32(graph, node, 0..4) {
                return None;
            }
            (TrainKernel::TrackStatistics { rate: *rate, unbias: *unbias }, 0)
        }
        TrainOp::Normalise { axis, epsilon } => {
            let (rows, channels) = last_axis(graph, node, 0, *axis as i64)?;
            if !all_f32(graph, node, 0..5) {
                return None;
            }
            (TrainKernel::Normalise { rows, channels, epsilon: *epsilon }, channels)
        }
        TrainOp::NormaliseGrad { axis, epsilon, batch } => {
            let (rows, channels) = last_axis(graph, node, 0, *axis as i64)?;
            if !all_f32(graph, node, 0..5) {
                return None;
            }
            let kernel = TrainKernel::NormaliseGrad { rows, channels, epsilon: *epsilon, batch: *batch };
            (kernel, kernels::batch_scratch_len(rows, channels))
        }
        TrainOp::ChannelSum { axis } => {
            let x = f32_dims(graph, node, 0)?;
            let (rows, channels) = last_axis(graph, node, 0, *axis as i64)?;
            debug_assert!(!x.is_empty());
            let kernel = TrainKernel::Sum { shape: [1, rows, channels], scale: 1.0 };
            (kernel, kernels::sum_leading_scratch_len(1, rows, channels))
        }
        TrainOp::CrossEntropy { label_smoothing, ignore } => {
            let shape = loss_shape(graph, node, *label_smoothing, *ignore, 2)?;
            // Room for a result that nobody wants.
            (TrainKernel::CrossEntropy(shape), shape.rows)
        }
        TrainOp::CrossEntropyGrad { label_smoothing, ignore } => {
            let shape = loss_shape(graph, node, *label_smoothing, *ignore, 3)?;
            f32_dims(graph, node, 2)?;
            (TrainKernel::CrossEntropyGrad(shape), 0)
        }
        TrainOp::SignMask(rule) => {
            f32_dims(graph, node, 0)?;
            (TrainKernel::SignMask(*rule), 0)
        }
        TrainOp::MaskGrad => {
            f32_dims(graph, node, 1)?;
            (TrainKernel::MaskGrad, 0)
        }
        TrainOp::AttentionGrad(a) => {
            let (batch, shape, at, mask) = attention_of(graph, node, a)?;
            f32_dims(graph, node, 4)?;
            if node.outputs.iter().skip(3).any(Option::is_some) {
                return None;
            }
            let workspace = kernels::attention_grad_scratch_len(&shape, threads);
            (TrainKernel::AttentionGrad { batch, shape, at, mask }, workspace)
        }
        TrainOp::RecurrentGrad { cell: RecurrentCell::Lstm, attributes } => {
            let shape = lstm_shape(graph, node, attributes)?;
            (TrainKernel::LstmGrad(shape), kernels::lstm_grad_scratch_len(&shape, threads))
        }
        TrainOp::Update { rule, axis } => {
            let parameter = f32_dims(graph, node, 0)?;
            let moments = rule.moments();
            let channels = node.input(3 + moments).is_some();
            if f32_dims(graph, node, 1 + moments).is_none()
                || f32_dims(graph, node, 2 + moments).is_none()
                || (channels && !is_index(graph, node, 3 + moments))
                || node.outputs.len() < 1 + moments
                || node.outputs[..1 + moments].iter().any(Option::is_none)
                || (!matches!(rule, UpdateRule::Adam8 { .. }) && !all_f32(graph, node, 1..1 + moments))
            {
                return None;
            }
            let size = |r: std::ops::Range<usize>| parameter[r].iter().product::<usize>();
            let rank = parameter.len();
            let (outer, axis, inner) = match channels {
                true => (size(0..*axis), *parameter.get(*axis)?, size(*axis + 1..rank)),
                false => (1, 1, size(0..rank)),
            };
            (TrainKernel::Update { rule: *rule, outer, axis, inner }, 0)
        }
        TrainOp::Perturb { stream, part, decay } => {
            f32_dims(graph, node, 0)?;
            f32_dims(graph, node, 1)?;
            if !is_index(graph, node, 2) {
                return None;
            }
            let step = match part {
                PerturbPart::Begin => PerturbStep::Begin,
                PerturbPart::Cross => PerturbStep::Cross,
            };
            (TrainKernel::Perturb { stream: *stream, step, decay: *decay }, 0)
        }
        TrainOp::GatherPerturbed { stream, decay } => {
            let table = f32_dims(graph, node, 0)?;
            f32_dims(graph, node, 2)?;
            if !is_index(graph, node, 1) || !is_index(graph, node, 3) {
                return None;
            }
            let rows = graph.value(node.outputs.iter().flatten().next().copied()?).ty.tensor()?.elements()?
                / table[1].max(1);
            // Where the rows of a result go that nobody wants.
            let unwanted = node.outputs.iter().take(2).filter(|o| o.is_none()).count() * rows * table[1];
            let kernel = TrainKernel::GatherPerturbed { stream: *stream, decay: *decay, width: table[1] };
            (kernel, unwanted)
        }
        _ => return None,
    })
}

/// A layer with the usual activations that reads forwards, time first; sequences of full length.
fn lstm_shape(graph: &Graph, node: &Node, a: &RecurrentAttributes) -> Option<LstmShape> {
    let (x, w) = (f32_dims(graph, node, 0)?, f32_dims(graph, node, 1)?);
    let usual = [UnaryOp::Sigmoid, UnaryOp::Tanh, UnaryOp::Tanh];
    let plain = a.direction == Direction::Forward
        && !a.batch_first
        && !a.input_forget
        && a.clip.is_none()
        && (a.activations.is_empty() || a.activations == usual)
        && node.input(4).is_none()
        && node.input(7).is_none()
        && node.output(6).is_none()
        && all_f32(graph, node, 0..11);
    if !plain || x.len() != 3 || w.len() != 3 || w[0] != 1 || x.contains(&0) || a.hidden_size == 0 {
        return None;
    }
    let shape = LstmShape { steps: x[0], batch: x[1], input: x[2], hidden: a.hidden_size };
    (w[1] == 4 * shape.hidden && w[2] == shape.input).then_some(shape)
}

fn pool_grad(graph: &Graph, node: &Node, a: &PoolAttributes, x: &[usize]) -> Option<TrainKernel> {
    let dy = f32_dims(graph, node, 0)?;
    if a.layout != Layout::ChannelsLast || x.len() != 4 || a.kernel.len() != 2 || x.contains(&0) {
        return None;
    }
    let kernel = pair(&a.kernel);
    let (stride, dilation) = (pair(&a.strides), pair(&a.dilations));
    let pads = window_pads(x, kernel, stride, dilation, &a.padding, a.ceil_mode)?;
    let shape = PoolShape {
        in_h: x[1],
        in_w: x[2],
        channels: x[3],
        out_h: dy[1],
        out_w: dy[2],
        kernel,
        stride,
        dilation,
        pads,
    };
    match a.kind {
        lightering_graph::PoolKind::Max => {
            f32_dims(graph, node, 1)?;
            f32_dims(graph, node, 2)?;
            Some(TrainKernel::MaxPoolGrad { shape, batch: x[0] })
        }
        // With rounding up, a window may pass the padded end, where ONNX counts differently from the kernel.
        lightering_graph::PoolKind::Average if !(a.ceil_mode && a.count_include_pad) => {
            let count_include_pad = a.count_include_pad;
            Some(TrainKernel::AveragePoolGrad { shape, batch: x[0], count_include_pad })
        }
        _ => None,
    }
}

fn loss_shape(
    graph: &Graph,
    node: &Node,
    label_smoothing: f32,
    ignore: Option<i64>,
    weights: usize,
) -> Option<LossShape> {
    let (rows, classes) = last_axis(graph, node, 0, -1)?;
    let soft = f32_dims(graph, node, 1).is_some();
    if (!soft && !is_index(graph, node, 1)) || !all_f32(graph, node, weights..weights + 1) {
        return None;
    }
    Some(LossShape { rows, classes, label_smoothing, ignore })
}

/// Integer `i` of an operand that is known to hold i32 or i64.
fn integer(view: &TensorView<'_>, i: usize) -> i64 {
    match view.dtype {
        DType::I32 => i64::from(view.as_slice::<i32>()[i]),
        _ => view.as_slice::<i64>()[i],
    }
}

impl Call<'_> {
    /// Computes a kernel of training.
    pub(super) fn train(
        &self,
        kernel: &TrainKernel,
        outputs: &mut [Option<TensorViewMut<'_>>],
        workspace: &mut [u8],
    ) -> Result<(), EngineError> {
        let pool = self.threads;
        let scratch: &mut [f32] = bytemuck::cast_slice_mut(workspace);
        let invalid = |problem: String| EngineError::at(&self.instruction.node, OpError::Invalid(problem));
        let no_label = |label: i64| invalid(format!("label {label} is no class"));
        if let TrainKernel::Update { rule, outer, axis, inner } = kernel {
            return self.update(*rule, [*outer, *axis, *inner], outputs);
        }
        if let TrainKernel::Perturb { stream, step, decay } = kernel {
            let what = self.perturbation(*stream, *decay, 1)?;
            let Some(Some(parameter)) = outputs.first_mut() else { return Err(self.missing("a state")) };
            lightering_kernels::perturb(pool, &what, *step, 0, parameter.as_mut_slice::<f32>());
            return Ok(());
        }
        if let TrainKernel::SignMask(rule) = kernel {
            let x = self.f32(0)?;
            let Some(Some(bits)) = outputs.first_mut() else { return Ok(()) };
            let bits = &mut *bits.bytes;
            match *rule {
                MaskRule::Above(threshold) => kernels::mask_above(pool, threshold, x, bits),
                MaskRule::Between(low, high) => kernels::mask_between(pool, low, high, x, bits),
            }
            return Ok(());
        }
        let mut results = outputs.iter_mut().map(|o| o.as_mut().map(|o| o.as_mut_slice::<f32>()));
        let mut next = || results.next().flatten();
        match kernel {
            TrainKernel::Product { batch, shape, alpha, a, b, transposed, activation } => {
                let c = next().ok_or_else(|| self.missing("the result"))?;
                let c_at = Matrices { batch_stride: shape[0] * shape[1], row_stride: shape[1] };
                kernels::product(
                    pool,
                    *batch,
                    *shape,
                    *alpha,
                    self.f32(0)?,
                    *a,
                    self.f32(1)?,
                    *b,
                    *transposed,
                    c,
                    c_at,
                    self.optional_f32(2),
                    self.optional_f32(3),
                    *activation,
                    scratch,
                );
            }
            TrainKernel::Conv { conv, activation } => {
                let y = next().ok_or_else(|| self.missing("the result"))?;
                let (bias, residual) = (self.optional_f32(2), self.optional_f32(3));
                let (x, w) = (self.f32(0)?, self.f32(1)?);
                kernels::conv_forward(pool, conv, x, w, bias, residual, *activation, y, scratch);
            }
            TrainKernel::ConvInputGrad(conv) => {
                let dx = next().ok_or_else(|| self.missing("the result"))?;
                kernels::conv_input_grad(pool, conv, self.f32(0)?, self.f32(1)?, dx, scratch);
            }
            TrainKernel::ConvWeightGrad(conv) => {
                let dw = next().ok_or_else(|| self.missing("the result"))?;
                kernels::conv_weight_grad(pool, conv, self.f32(0)?, self.f32(1)?, dw, scratch);
            }
            TrainKernel::MaxPoolGrad { shape, batch } => {
                let dx = next().ok_or_else(|| self.missing("the result"))?;
                let (dy, x, y) = (self.f32(0)?, self.f32(1)?, self.f32(2)?);
                kernels::max_pool_grad(pool, shape, *batch, dy, x, y, dx);
            }
            TrainKernel::AveragePoolGrad { shape, batch, count_include_pad } => {
                let dx = next().ok_or_else(|| self.missing("the result"))?;
                kernels::average_pool_grad(pool, shape, *batch, *count_include_pad, self.f32(0)?, dx);
            }
            TrainKernel::BatchStatistics { rows, channels } => {
                let (spare, scratch) = scratch.split_at_mut(*channels);
                let (mean, variance) = match (next(), next()) {
                    (Some(mean), Some(variance)) => (mean, variance),
                    (Some(mean), None) => (mean, spare),
                    (None, Some(variance)) => (spare, variance),
                    (None, None) => return Ok(()),
                };
                kernels::batch_statistics(pool, *rows, *channels, self.f32(0)?, mean, variance, scratch);
            }
            TrainKernel::TrackStatistics { rate, unbias } => {
                let (Some(mean), Some(variance)) = (next(), next()) else {
                    return Err(self.missing("a state"));
                };
                kernels::track_statistics(*rate, *unbias, mean, variance, self.f32(2)?, self.f32(3)?);
            }
            TrainKernel::Normalise { rows, channels, epsilon } => {
                let y = next().ok_or_else(|| self.missing("the result"))?;
                kernels::normalise(
                    pool,
                    *rows,
                    *channels,
                    *epsilon,
                    self.f32(0)?,
                    self.f32(1)?,
                    self.f32(2)?,
                    self.optional_f32(3),
                    self.optional_f32(4),
                    y,
                    scratch,
                );
            }
            TrainKernel::NormaliseGrad { rows, channels, epsilon, batch } => {
                kernels::normalise_grad(
                    pool,
                    *rows,
                    *channels,
                    *epsilon,
                    *batch,
                    self.f32(0)?,
                    self.f32(1)?,
                    self.f32(2)?,
                    self.f32(3)?,
                    self.optional_f32(4),
                    next(),
                    next(),
                    next(),
                    scratch,
                );
            }
            TrainKernel::UnaryGrad(kind) => {
                let dx = next().ok_or_else(|| self.missing("the result"))?;
                kernels::unary_grad(pool, *kind, self.f32(0)?, self.f32(1)?, dx);
            }
            TrainKernel::MaskGrad => {
                let dx = next().ok_or_else(|| self.missing("the result"))?;
                let Some(Some(bits)) = self.inputs.first() else { return Err(self.missing("the mask")) };
                kernels::mask_grad(pool, bits.bytes, self.f32(1)?, dx);
            }
            TrainKernel::SoftmaxGrad { rows, n, log } => {
                let dx = next().ok_or_else(|| self.missing("the result"))?;
                kernels::softmax_grad(pool, *rows, *n, *log, self.f32(0)?, self.f32(1)?, dx);
            }
            TrainKernel::LayerNormGrad { rows, n, epsilon } => {
                let (x, scale, dy) = (self.f32(0)?, self.optional_f32(1), self.f32(2)?);
                let (dx, ds, db) = (next(), next(), next());
                kernels::layer_norm_grad(pool, *rows, *n, *epsilon, x, scale, dy, dx, ds, db, scratch);
            }
            TrainKernel::RmsNormGrad { rows, n, epsilon } => {
                let (x, scale, dy) = (self.f32(0)?, self.optional_f32(1), self.f32(2)?);
                let (dx, ds) = (next(), next());
                kernels::rms_norm_grad(pool, *rows, *n, *epsilon, x, scale, dy, dx, ds, scratch);
            }
            TrainKernel::CrossEntropy(shape) => {
                let logits = self.f32(0)?;
                let (loss, rows) = (next(), next());
                let mut spare = 0.0;
                let loss = loss.and_then(<[f32]>::first_mut).unwrap_or(&mut spare);
                let rows = rows.unwrap_or(scratch);
                let labels = self.labels()?;
                let label = |i: usize| integer(labels, i);
                let target = target(labels, &label);
                let weights = self.optional_f32(2);
                kernels::cross_entropy(pool, shape, logits, target, weights, loss, rows).map_err(no_label)?;
            }
            TrainKernel::CrossEntropyGrad(shape) => {
                let dx = next().ok_or_else(|| self.missing("the result"))?;
                let logits = self.f32(0)?;
                let labels = self.labels()?;
                let label = |i: usize| integer(labels, i);
                let target = target(labels, &label);
                let dloss = self.f32(2)?[0];
                let weights = self.optional_f32(3);
                kernels::cross_entropy_grad(pool, shape, logits, target, dloss, weights, dx)
                    .map_err(no_label)?;
            }
            TrainKernel::GatherGrad { rows, n } => {
                let dx = next().ok_or_else(|| self.missing("the result"))?;
                let Some(Some(indices)) = self.inputs.first() else {
                    return Err(self.missing("the indices"));
                };
                let count = indices.dims.iter().product();
                let index = |i: usize| integer(indices, i);
                kernels::gather_grad(pool, *rows, *n, &index, count, self.f32(1)?, dx)
                    .map_err(|i| invalid(format!("index {i} is outside the table's {rows} rows")))?;
            }
            TrainKernel::Sum { shape: [outer, middle, inner], scale } => {
                let y = next().ok_or_else(|| self.missing("the result"))?;
                let x = self.f32(0)?;
                if *inner == 1 {
                    kernels::sum_trailing(pool, *outer, *middle, *scale, x, y);
                } else {
                    kernels::sum_leading(pool, [*outer, *middle, *inner], *scale, x, y, scratch);
                }
            }
            TrainKernel::SwapAxes([a, b, c, n]) => {
                let y = next().ok_or_else(|| self.missing("the result"))?;
                let x = self.f32(0)?;
                if *n > 1 {
                    kernels::swap_middle_axes(pool, [*a, *b, *c, *n], x, y);
                } else {
                    let size = b * c;
                    for (x, y) in x.chunks_exact(size).zip(y.chunks_exact_mut(size)).take(*a) {
                        transpose(pool, *b, *c, x, *c, y, *b);
                    }
                }
            }
            TrainKernel::AttentionGrad { batch, shape, at, mask } => {
                let data = self.optional_f32(3);
                let mask_of = |b: usize| {
                    let m = (*mask)?;
                    let data = &data?[b * m.batch..];
                    Some(AttentionMask { data, head_stride: m.head, row_stride: m.row })
                };
                let operands = [self.f32(0)?, self.f32(1)?, self.f32(2)?, self.f32(4)?];
                let places = [at.q, at.k, at.v, at.y];
                let results = kernels::AttentionGradients { q: next(), k: next(), v: next() };
                kernels::attention_grad(
                    pool, shape, *batch, at.batch, operands, places, &mask_of, results, scratch,
                );
            }
            TrainKernel::LstmGrad(shape) => {
                let operands = LstmOperands {
                    x: self.f32(0)?,
                    w: self.f32(1)?,
                    r: self.f32(2)?,
                    bias: self.optional_f32(3),
                    initial_h: self.optional_f32(5),
                    initial_c: self.optional_f32(6),
                    dy: self.optional_f32(8),
                    dy_h: self.optional_f32(9),
                    dy_c: self.optional_f32(10),
                };
                let results = LstmGradients {
                    x: next(),
                    w: next(),
                    r: next(),
                    bias: next(),
                    initial_h: next(),
                    initial_c: next(),
                };
                kernels::lstm_grad(pool, shape, &operands, results, scratch);
            }
            TrainKernel::GatherPerturbed { stream, decay, width } => {
                let what = self.perturbation(*stream, *decay, 2)?;
                let (plus, minus) = match (next(), next()) {
                    (Some(plus), Some(minus)) => (plus, minus),
                    (Some(plus), None) => (plus, &mut *scratch),
                    (None, Some(minus)) => (&mut *scratch, minus),
                    (None, None) => return Ok(()),
                };
                let table = self.f32(0)?;
                let height = table.len().checked_div(*width).unwrap_or(0) as i64;
                let indices = match self.inputs.get(1) {
                    Some(Some(indices)) => indices,
                    _ => return Err(self.missing("the indices")),
                };
                let count = indices.dims.iter().product();
                let rows: Result<Vec<usize>, EngineError> = (0..count)
                    .map(|i| {
                        let row = integer(indices, i);
                        let from_front = if row < 0 { row + height } else { row };
                        if (0..height).contains(&from_front) {
                            Ok(from_front as usize)
                        } else {
                            Err(invalid(format!("row {row} of a table with {height}")))
                        }
                    })
                    .collect();
                let size = count * width;
                lightering_kernels::gather_perturbed(
                    pool,
                    &what,
                    table,
                    *width,
                    &rows?,
                    &mut plus[..size],
                    &mut minus[..size],
                );
            }
            TrainKernel::Update { .. } | TrainKernel::SignMask(_) | TrainKernel::Perturb { .. } => {}
        }
        Ok(())
    }

    /// What `zo` and `seeds`, operands from `first` on, say about a parameter.
    fn perturbation(&self, stream: u32, decay: f32, first: usize) -> Result<Perturbation, EngineError> {
        let zo = self.f32(first)?;
        let seeds = match self.inputs.get(first + 1) {
            Some(Some(seeds)) => seeds,
            _ => return Err(self.missing("the seeds")),
        };
        Ok(Perturbation {
            seeds: [integer(seeds, 0) as u64, integer(seeds, 1) as u64],
            stream,
            eps: zo[0],
            rate: zo[1],
            gradient: zo[2],
            decay,
            pending: match zo[3] {
                x if x >= 2.0 => Pending::Update,
                x if x >= 1.0 => Pending::Restore,
                _ => Pending::Nothing,
            },
        })
    }

    fn labels(&self) -> Result<&TensorView<'_>, EngineError> {
        match self.inputs.get(1) {
            Some(Some(labels)) => Ok(labels),
            _ => Err(self.missing("the labels")),
        }
    }

    fn update(
        &self,
        rule: UpdateRule,
        [outer, axis, inner]: [usize; 3],
        outputs: &mut [Option<TensorViewMut<'_>>],
    ) -> Result<(), EngineError> {
        let (pool, moments) = (self.threads, rule.moments());
        let (gradient, schedule) = (self.f32(1 + moments)?, self.f32(2 + moments)?);
        let schedule = Schedule::from_values(std::array::from_fn(|i| schedule[i]));
        let channels = match self.inputs.get(3 + moments) {
            Some(Some(list)) => {
                let count = list.dims.iter().product();
                let list: Option<Vec<usize>> = (0..count)
                    .map(|i| usize::try_from(integer(list, i)).ok().filter(|&c| c < axis))
                    .collect();
                let list = list.filter(|l| l.windows(2).all(|w| w[0] < w[1])).ok_or_else(|| {
                    let problem = format!("channels must ascend and be below {axis}");
                    EngineError::at(&self.instruction.node, OpError::Invalid(problem))
                })?;
                Some(list)
            }
            _ => None,
        };
        let place = UpdatePlace { outer, axis, inner, channels: channels.as_deref() };
        let mut states = outputs.iter_mut().map(Option::as_mut);
        let mut state = || states.next().flatten().ok_or_else(|| self.missing("a state"));
        let p = state()?.as_mut_slice::<f32>();
        match rule {
            UpdateRule::Accumulate => kernels::accumulate(pool, schedule, &place, p, gradient),
            UpdateRule::Sgd { momentum, nesterov, weight_decay } => {
                let v = if moments > 0 { Some(state()?.as_mut_slice::<f32>()) } else { None };
                kernels::sgd_step(pool, momentum, nesterov, weight_decay, schedule, &place, p, v, gradient);
            }
            UpdateRule::Adam { beta1, beta2, epsilon, weight_decay, decoupled } => {
                let rule = AdamRule { beta1, beta2, epsilon, weight_decay, decoupled };
                let (m, v) = (state()?.as_mut_slice::<f32>(), state()?.as_mut_slice::<f32>());
                kernels::adam_step(pool, &rule, schedule, &place, p, m, v, gradient);
            }
            UpdateRule::Adam8 { beta1, beta2, epsilon, weight_decay } => {
                let rule = AdamRule { beta1, beta2, epsilon, weight_decay, decoupled: true };
                let (m, v) = (&mut *state()?.bytes, &mut *state()?.bytes);
                kernels::adam8_step(pool, &rule, schedule, &place, p, m, v, gradient);
            }
            UpdateRule::Lion { beta1, beta2, weight_decay } => {
                let m = state()?.as_mut_slice::<f32>();
                kernels::lion_step(pool, [beta1, beta2], weight_decay, schedule, &place, p, m, gradient);
            }
        }
        Ok(())
    }
}

fn target<'a>(labels: &'a TensorView<'_>, label: &'a (dyn Fn(usize) -> i64 + Sync)) -> Target<'a> {
    match labels.dtype {
        DType::F32 => Target::Probabilities(labels.as_slice::<f32>()),
        _ => Target::Class(label),
    }
}
