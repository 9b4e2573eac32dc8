//! What a node costs: arithmetic, bytes moved, parameters.
//!
//! A multiplication with its addition counts as two operations, any other arithmetic operation on one element as one,
//! a transcendental function as eight. With `out` the elements of the first result and `x` those of the first operand:
//!
//! | family | operations |
//! |---|---|
//! | element by element | `out` per step (8 for exponentials and the like) |
//! | `MatMul`, `Gemm` and their 8-bit forms | `2·out·k`, plus `out` per fused addition or activation |
//! | `Einsum` | `2·` the product of all axis sizes |
//! | convolution | `2·out·(in/groups)·kernel`, plus fused additions and activation |
//! | transposed convolution | `2·x·(out/groups)·kernel` |
//! | pooling | `out·kernel`; global: `x` |
//! | normalisation | batch 2, others 8 per element; softmax 12 |
//! | reduction, running sums | `x`; 8 more per element where it takes exponentials or logarithms |
//! | attention | `2·batch·heads·queries·keys·(size + value size)` and a softmax over the scores |
//! | recurrent layers | `2·time·batch·directions·gates·hidden·(inputs + hidden)`, 8 per gate element |
//! | Fourier transforms | `5·n·log2 n` per transform |
//! | resampling | `2·out` per tap: 1, 2 or 4 per resampled axis |
//! | quantisation | 2 per element |
//! | sorting (`TopK`, `Unique`) | `x·log2 n` |
//! | trees | `2·rows·trees·log2(nodes per tree)`; linear models and vectors: products |
//! | control flow | `If`: the dearer branch; `Scan`: the body per step; `Loop`: one round |
//! | everything else | 0 |
//!
//! Bytes are those that a run on a cold cache moves: every operand read once and every result written once, but only
//! the rows that a gather takes, and nothing at all for operators that only rename a shape. Sizes that are not known
//! count as 1, and the cost says so.

use std::collections::HashSet;

use lightering_units::{Bytes, Flops};
use serde::{Deserialize, Serialize};

use crate::infer::{Einsum, EinsumAxis};
use crate::{
    Activation, Constant, Direction, ElementwiseStep, Graph, LmOp, MlOp, Node, NodeId, Op, PoolAttributes,
    RecurrentCell, ReduceOp, ResizeMode, TensorType, TrainOp, UnaryOp, ValueId,
};

/// What a node or a graph costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Arithmetic operations.
    pub flops: Flops,
    /// Bytes of operands, parameters included.
    pub bytes_read: Bytes,
    /// Bytes of results.
    pub bytes_written: Bytes,
    /// Elements of the floating-point or quantised constants among the operands that are not mere attributes (more
    /// than one element); in a graph, each constant counts once.
    pub parameters: u64,
    /// Some size was not known, so that the true cost is higher.
    pub is_lower_bound: bool,
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, o: Cost) {
        self.flops += o.flops;
        self.bytes_read = Bytes(self.bytes_read.0.saturating_add(o.bytes_read.0));
        self.bytes_written = Bytes(self.bytes_written.0.saturating_add(o.bytes_written.0));
        self.parameters = self.parameters.saturating_add(o.parameters);
        self.is_lower_bound |= o.is_lower_bound;
    }
}

/// Operations of a normally distributed number.
const NORMAL: f64 = 30.0;
/// Operations of a transcendental function.
const TRANSCENDENTAL: f64 = 8.0;

fn unary_operations(op: &UnaryOp) -> f64 {
    use UnaryOp::*;
    match op {
        Identity => 0.0,
        Abs
        | BitwiseNot
        | Ceil
        | ClipTo { .. }
        | Floor
        | IsInf { .. }
        | IsNan
        | LeakyRelu { .. }
        | Neg
        | Not
        | Reciprocal
        | Relu
        | Round
        | Shrink { .. }
        | Sign
        | Sqrt
        | Rsqrt
        | ThresholdedRelu { .. } => 1.0,
        HardSigmoid { .. } | HardSwish | Softsign => 3.0,
        _ => TRANSCENDENTAL,
    }
}

fn activation_operations(a: &Option<Activation>) -> f64 {
    a.as_ref().map_or(0.0, unary_operations)
}

/// Sizes of a node's operands and results; unknown ones count as 1.
struct Sizes<'a> {
    inputs: &'a [Option<&'a TensorType>],
    outputs: &'a [Option<&'a TensorType>],
}

fn dim(t: Option<&TensorType>, i: usize) -> f64 {
    t.and_then(|t| t.shape.as_ref()?.get(i)?.fixed()).map_or(1.0, |n| n as f64)
}

fn last(t: Option<&TensorType>, from_end: usize) -> f64 {
    t.and_then(|t| t.shape.as_ref()?.iter().rev().nth(from_end)?.fixed()).map_or(1.0, |n| n as f64)
}

fn rank(t: Option<&TensorType>) -> usize {
    t.and_then(|t| t.shape.as_ref()).map_or(0, Vec::len)
}

fn elements(t: &TensorType) -> f64 {
    t.shape.iter().flatten().map(|d| d.fixed().unwrap_or(1) as f64).product()
}

fn bytes(t: &TensorType) -> Bytes {
    let n = elements(t) * t.dtype.size_bytes() as f64;
    Bytes(if n < u64::MAX as f64 { n as u64 } else { u64::MAX })
}

impl Sizes<'_> {
    fn input(&self, i: usize) -> Option<&TensorType> {
        self.inputs.get(i).copied().flatten()
    }

    fn output(&self, i: usize) -> Option<&TensorType> {
        self.outputs.get(i).copied().flatten()
    }

    fn x(&self) -> f64 {
        self.input(0).map_or(0.0, elements)
    }

    fn out(&self) -> f64 {
        self.outputs.iter().flatten().next().map_or(0.0, |t| elements(t))
    }

    /// One addition per element of the result for each operand that is there.
    fn additions(&self, operands: &[usize]) -> f64 {
        operands.iter().filter(|&&i| self.input(i).is_some()).count() as f64 * self.out()
    }

    /// `2·out·(in/groups)·kernel`, from the weights `[out, in/groups, kernel…]`.
    fn convolution(&self, w: usize) -> f64 {
        let w = self.input(w);
        2.0 * self.out() * w.map_or(0.0, elements) / dim(w, 0).max(1.0)
    }

    /// `2·out·k`; a vector on the left is its own inner dimension.
    fn product(&self, a: usize, trans_a: bool) -> f64 {
        let a = self.input(a);
        2.0 * self.out() * last(a, usize::from(trans_a && rank(a) > 1))
    }
}

fn window(a: &PoolAttributes) -> f64 {
    a.kernel.iter().map(|&n| n as f64).product()
}

fn flops(op: &Op, s: &Sizes<'_>) -> f64 {
    match op {
        Op::Unary(u) => s.out() * unary_operations(u),
        Op::Binary(crate::BinaryOp::Pow) => s.out() * TRANSCENDENTAL,
        Op::Binary(_) | Op::Where | Op::Cast { .. } | Op::Trilu { .. } => s.out(),
        Op::Variadic(_) => s.out() * s.inputs.len().saturating_sub(1) as f64,
        Op::Clip => s.out() * 2.0,
        Op::Elementwise(steps) => {
            let one = |step: &ElementwiseStep| match step {
                ElementwiseStep::Unary(u) => unary_operations(u),
                ElementwiseStep::Binary { op: crate::BinaryOp::Pow, .. } => TRANSCENDENTAL,
                ElementwiseStep::Binary { .. } => 1.0,
            };
            s.out() * steps.iter().map(one).sum::<f64>()
        }

        Op::MatMul(a) => {
            s.product(0, a.trans_a) + s.additions(&[2, 3, 4]) + s.out() * activation_operations(&a.activation)
        }
        Op::Gemm(a) => s.product(0, a.trans_a) + s.additions(&[2]),
        Op::MatMulInteger => s.product(0, false),
        Op::QLinearMatMul(a) => s.product(0, a.trans_a) + s.additions(&[8]) + 2.0 * s.out(),
        Op::Einsum { equation } => einsum(equation, s),
        // Elimination: two thirds of n³.
        Op::Det => s.x() * last(s.input(0), 0) * 2.0 / 3.0,

        Op::Conv(a) => {
            s.convolution(1) + s.additions(&[2, 3]) + s.out() * activation_operations(&a.activation)
        }
        Op::ConvTranspose(a) => {
            let w = s.input(1);
            2.0 * s.x() * w.map_or(0.0, elements) / dim(w, 0).max(1.0)
                + s.additions(&[2, 3])
                + s.out() * activation_operations(&a.conv.activation)
        }
        // Each tap is read by bilinear interpolation.
        Op::DeformConv { .. } => s.convolution(1) * 5.0 + s.additions(&[3]),
        Op::ConvInteger(_) => s.convolution(1),
        Op::QLinearConv(_) => s.convolution(3) + s.additions(&[8]) + 2.0 * s.out(),
        Op::Col2Im { .. } | Op::MaxUnpool { .. } => s.x(),
        Op::Pool(a) | Op::QLinearPool(a) => s.out() * window(a),
        Op::GlobalPool { .. } => s.x(),
        Op::MaxRoiPool { .. } => s.out() * 4.0,
        Op::RoiAlign(a) => {
            let samples = if a.sampling_ratio == 0 { 2 } else { a.sampling_ratio } as f64;
            s.out() * samples * samples * 8.0
        }

        Op::BatchNorm { .. } => s.out() * 2.0,
        Op::InstanceNorm { .. }
        | Op::GroupNorm { .. }
        | Op::LayerNorm { .. }
        | Op::RmsNorm { .. }
        | Op::LpNorm { .. }
        | Op::MeanVarianceNorm { .. } => s.out() * 8.0,
        Op::Lrn { size, .. } => s.out() * (*size as f64 + TRANSCENDENTAL),
        Op::Softmax { .. } => s.out() * 12.0,
        Op::Hardmax { .. } => s.out() * 2.0,
        Op::NllLoss(_) => s.out() * 2.0,
        Op::SoftmaxCrossEntropyLoss(_) => s.x() * 12.0,

        Op::Reduce { op, .. } => match op {
            ReduceOp::LogSumExp => s.x() * (1.0 + TRANSCENDENTAL),
            ReduceOp::L2 | ReduceOp::SumSquare | ReduceOp::L1 => s.x() * 2.0,
            _ => s.x(),
        },
        Op::ArgReduce { .. } | Op::CumSum { .. } => s.x(),

        Op::Attention(a) => attention(a.q_num_heads, a.kv_num_heads, s),
        Op::RotaryEmbedding { .. } => s.out() * 3.0,

        Op::Resize(a) => {
            let resampled =
                match (s.input(0).and_then(TensorType::dims), s.output(0).and_then(TensorType::dims)) {
                    (Some(x), Some(y)) => x.iter().zip(&y).filter(|(a, b)| a != b).count() as i32,
                    _ => 0,
                };
            s.out() * taps(a.mode, resampled)
        }
        Op::GridSample { mode, .. } => {
            s.out() * taps(*mode, rank(s.input(0)).saturating_sub(2).min(8) as i32).max(1.0)
        }
        Op::AffineGrid { .. } => s.out() * 2.0 * last(s.input(0), 0),
        Op::ScatterElements { .. } | Op::ScatterNd { .. } => s.input(2).map_or(0.0, elements),

        Op::TopK { .. } | Op::Unique { .. } => s.x() * last(s.input(0), 0).max(2.0).log2(),
        Op::NonMaxSuppression { .. } => {
            // Every kept box is compared with the others; 16 operations an overlap.
            let scores = s.input(1).map_or(0.0, elements);
            scores * 16.0 * last(s.input(1), 0).max(2.0).log2()
        }

        Op::Random(_) | Op::Bernoulli { .. } | Op::Multinomial { .. } | Op::Dropout { .. } => s.out(),
        Op::Dft { .. } => fourier(s.out() / 2.0, s.out() / 2.0),
        Op::Stft { .. } => {
            let frame = s.input(2).map_or_else(|| 2.0 * last(s.output(0), 1), elements);
            let frames = s.out() / (2.0 * last(s.output(0), 1)).max(1.0);
            frames * fourier(frame, frame)
        }
        Op::MelWeightMatrix { .. } | Op::Window { .. } => s.out() * TRANSCENDENTAL,

        Op::Rnn(a) => recurrent(1.0, a.hidden_size, a.direction, s),
        Op::Gru(a) => recurrent(3.0, a.hidden_size, a.direction, s),
        Op::Lstm(a) => recurrent(4.0, a.hidden_size, a.direction, s),

        Op::QuantizeLinear(_) | Op::DequantizeLinear(_) => s.out() * 2.0,
        Op::QLinearUnary(_) => s.out(),
        Op::QLinearBinary { .. } => s.out() * 6.0,
        Op::DynamicQuantizeLinear => s.x() * 4.0,

        Op::Ml(op) => classic(op, s),
        Op::Lm(op) => language(op, s),
        Op::Train(op) => train(op, s),
        _ => 0.0,
    }
}

fn train(op: &TrainOp, s: &Sizes<'_>) -> f64 {
    match op {
        // Every element of dy meets the weights of its output channel; either way as much as the forward pass.
        TrainOp::ConvInputGrad { .. } => {
            let w = s.input(1);
            let columns = w.map_or(0.0, elements) / dim(w, 0).max(1.0);
            2.0 * s.x() * columns
        }
        TrainOp::ConvWeightGrad { weight, .. } => {
            let columns: usize = weight.iter().skip(1).product();
            2.0 * s.input(1).map_or(0.0, elements) * columns as f64
        }
        TrainOp::PoolGrad { pool, .. } => s.x() * pool.kernel.iter().product::<usize>().max(1) as f64,
        TrainOp::GatherGrad { .. } => s.input(1).map_or(0.0, elements),
        TrainOp::ResizeGrad { .. } => s.x() * 4.0,
        TrainOp::GridSampleGrad { .. } => s.input(2).map_or(0.0, elements) * 16.0,
        TrainOp::DetGrad => s.x() * 8.0,
        TrainOp::UnaryGrad(_) | TrainOp::SoftmaxGrad { .. } => s.out() * 4.0,
        TrainOp::LayerNormGrad { .. } | TrainOp::RmsNormGrad { .. } | TrainOp::NormaliseGrad { .. } => {
            s.out() * 8.0
        }
        TrainOp::BatchStatistics { .. } => s.x() * 4.0,
        TrainOp::TrackStatistics { .. } | TrainOp::SignMask(_) | TrainOp::MaskGrad => s.x(),
        TrainOp::ChannelSum { .. } => s.x(),
        TrainOp::Normalise { .. } => s.out() * 2.0,
        TrainOp::CrossEntropy { .. } | TrainOp::CrossEntropyGrad { .. } => s.x() * TRANSCENDENTAL,
        // The forward pass again, then twice as much for both gradients.
        TrainOp::RecurrentGrad { cell, attributes } => {
            let gates = match cell {
                RecurrentCell::Rnn => 1.0,
                RecurrentCell::Gru => 3.0,
                RecurrentCell::Lstm => 4.0,
            };
            let rows = s.x() / last(s.input(0), 0).max(1.0);
            let columns = last(s.input(0), 0) + attributes.hidden_size as f64;
            6.0 * rows * gates * attributes.hidden_size as f64 * columns
        }
        TrainOp::AttentionGrad(_) => {
            // Five products of q by k, once more than the forward pass has and then some.
            let keys = s.input(1).map_or(0.0, elements) / last(s.input(1), 0).max(1.0);
            10.0 * s.x() * keys
        }
        TrainOp::Update { rule, .. } => s.x() * (2 + 4 * rule.moments()) as f64,
        // A normal takes ten rounds of integers and half a Box-Muller pair; a visit makes three of them.
        TrainOp::Perturb { part, .. } => {
            let normals = if *part == crate::PerturbPart::Begin { 2.0 } else { 1.0 };
            s.x() * NORMAL * normals
        }
        TrainOp::GatherPerturbed { .. } => s.out() * NORMAL * 3.0,
    }
}

fn language(op: &LmOp, s: &Sizes<'_>) -> f64 {
    match op {
        LmOp::BlockMatMul { .. } => 2.0 * s.x() * dim(s.output(0), 1) + s.additions(&[2]),
        LmOp::BlockGather { .. } => s.out() * 2.0,
        LmOp::RopeAngles { .. } => s.out() * TRANSCENDENTAL,
        LmOp::Rope { .. } => s.out() * 3.0,
        LmOp::HeadMatMul { heads, .. } => 2.0 * s.x() * dim(s.output(0), 1) / (*heads).max(1) as f64,
        LmOp::JoinHeads { .. } => s.out(),
        LmOp::CacheStore { .. } => s.input(1).map_or(0.0, elements),
        // How many positions there will be is not known; a full cache page a row is the least that makes sense.
        LmOp::CachedAttention(a) => {
            dim(s.input(0), 0) * (a.heads * a.page_len * (a.key_len + a.value_len)) as f64 * 2.0
        }
        LmOp::Route { k, .. } => s.x() * (TRANSCENDENTAL + *k as f64),
        LmOp::Experts { .. } => 6.0 * s.x() * dim(s.input(1), 1) * dim(s.input(3), 1),
    }
}

fn taps(mode: ResizeMode, axes: i32) -> f64 {
    match mode {
        ResizeMode::Nearest => 0.0,
        ResizeMode::Linear => 2.0 * 2f64.powi(axes),
        ResizeMode::Cubic => 2.0 * 4f64.powi(axes),
    }
}

/// `total` complex points in transforms of `length`, as the text-book radix-2 method counts.
fn fourier(total: f64, length: f64) -> f64 {
    5.0 * total * length.max(2.0).log2()
}

fn einsum(equation: &str, s: &Sizes<'_>) -> f64 {
    let Ok(parsed) = Einsum::parse(equation) else { return 0.0 };
    let mut seen = HashSet::new();
    let mut product = 1.0;
    for (i, term) in parsed.inputs.iter().enumerate() {
        if term.contains(&EinsumAxis::Ellipsis) {
            continue;
        }
        for (j, axis) in term.iter().enumerate() {
            if let EinsumAxis::Label(c) = axis
                && seen.insert(*c)
            {
                product *= dim(s.input(i), j);
            }
        }
    }
    let product = f64::max(product, s.out());
    product * if parsed.inputs.len() > 1 { 2.0 } else { 1.0 }
}

fn attention(q_heads: usize, kv_heads: usize, s: &Sizes<'_>) -> f64 {
    let (q, k, v) = (s.input(0), s.input(1), s.input(2));
    let past = s.input(4).map_or(0.0, |t| dim(Some(t), 2));
    // `pairs` is batch · heads · queries.
    let (pairs, keys, size, value_size) = match rank(q) {
        4 => (dim(q, 0) * dim(q, 1) * dim(q, 2), dim(k, 2), dim(q, 3), dim(v, 3)),
        _ => {
            let (h, kv) = (q_heads.max(1) as f64, kv_heads.max(1) as f64);
            (dim(q, 0) * h * dim(q, 1), dim(k, 1), dim(q, 2) / h, dim(v, 2) / kv)
        }
    };
    pairs * (keys + past) * (2.0 * (size + value_size) + 12.0)
}

fn recurrent(gates: f64, hidden: usize, direction: Direction, s: &Sizes<'_>) -> f64 {
    let x = s.input(0);
    let steps = dim(x, 0) * dim(x, 1) * if direction == Direction::Bidirectional { 2.0 } else { 1.0 };
    let hidden = hidden as f64;
    steps * gates * hidden * (2.0 * (dim(x, 2) + hidden) + TRANSCENDENTAL)
}

fn classic(op: &MlOp, s: &Sizes<'_>) -> f64 {
    let rows = if rank(s.input(0)) > 1 { dim(s.input(0), 0) } else { 1.0 };
    match op {
        MlOp::LinearClassifier { coefficients, .. } | MlOp::LinearRegressor { coefficients, .. } => {
            2.0 * rows * coefficients.len() as f64
        }
        MlOp::SvmClassifier { support_vectors, coefficients, .. }
        | MlOp::SvmRegressor { support_vectors, coefficients, .. } => {
            2.0 * rows * (support_vectors.len() + coefficients.len()) as f64
        }
        MlOp::TreeEnsembleClassifier { trees, .. } | MlOp::TreeEnsembleRegressor { trees } => {
            let count = trees.roots.len().max(1) as f64;
            let depth = (trees.branches.len() as f64 / count + 1.0).log2();
            2.0 * rows * count * depth.max(1.0)
        }
        MlOp::Scaler { .. } => 2.0 * s.x(),
        MlOp::Normalizer { .. } => 4.0 * s.x(),
        _ => s.x(),
    }
}

/// Operators that only give the same elements another shape.
fn is_view(op: &Op) -> bool {
    matches!(
        op,
        Op::Reshape { .. } | Op::Flatten { .. } | Op::Squeeze | Op::Unsqueeze | Op::Unary(UnaryOp::Identity)
    )
}

/// The cost of a node with operands and results of these types. Bodies of control flow are not looked into, and no
/// operand is known to be a parameter; see [`Graph::node_cost`].
pub fn node_cost(node: &Node, inputs: &[Option<&TensorType>], outputs: &[Option<&TensorType>]) -> Cost {
    let sizes = Sizes { inputs, outputs };
    let open = |t: &&TensorType| t.dims().is_none();
    let missing = node.inputs.iter().zip(inputs).any(|(v, t)| v.is_some() && t.is_none());
    let is_lower_bound = missing || inputs.iter().chain(outputs).flatten().any(open);
    let written: Bytes = match is_view(&node.op) {
        true => Bytes::ZERO,
        false => saturating_sum(outputs.iter().flatten().map(|t| bytes(t))),
    };
    let all = || saturating_sum(inputs.iter().flatten().map(|t| bytes(t)));
    let rest = |from: usize| saturating_sum(inputs.iter().skip(from).flatten().map(|t| bytes(t)));
    let plus = |a: Bytes, b: Bytes| Bytes(a.0.saturating_add(b.0));
    let read = match &node.op {
        op if is_view(op) => Bytes::ZERO,
        Op::Shape { .. } | Op::Size | Op::EyeLike { .. } => Bytes::ZERO,
        // As many elements as come out, and what says which.
        Op::Gather { .. } | Op::GatherElements { .. } | Op::GatherNd { .. } | Op::Slice => {
            plus(written, rest(1))
        }
        // Only the updated part is touched when it is done in place, which it is where it can be.
        Op::TensorScatter { .. } => rest(1),
        _ => all(),
    };
    Cost {
        flops: Flops(flops(&node.op, &sizes)),
        bytes_read: read,
        bytes_written: written,
        parameters: 0,
        is_lower_bound,
    }
}

fn saturating_sum(all: impl Iterator<Item = Bytes>) -> Bytes {
    Bytes(all.fold(0u64, |n, b| n.saturating_add(b.0)))
}

impl Graph {
    /// The cost of a node, its parameters and the bodies of control flow included.
    ///
    /// # Panics
    /// When the node was removed or is not of this graph.
    pub fn node_cost(&self, id: NodeId) -> Cost {
        let node = self.node(id);
        let ty = |v: &Option<ValueId>| v.and_then(|v| self.value(v).ty.tensor());
        let inputs: Vec<Option<&TensorType>> = node.inputs.iter().map(ty).collect();
        let outputs: Vec<Option<&TensorType>> = node.outputs.iter().map(ty).collect();
        let mut cost = node_cost(node, &inputs, &outputs);
        let constants: HashSet<ValueId> = node.inputs.iter().copied().flatten().collect();
        cost.parameters = constants.into_iter().map(|v| self.parameter_count(v)).fold(0, u64::saturating_add);
        match &node.op {
            Op::If { then_body, else_body } => {
                let (a, b) = (graph_cost(then_body), graph_cost(else_body));
                cost += if a.flops >= b.flops { a } else { b };
            }
            Op::Loop { body, .. } | Op::SequenceMap { body, .. } => {
                cost += graph_cost(body);
                cost.is_lower_bound = true;
            }
            Op::Scan { attributes, body } => {
                let scanned = inputs.get(attributes.states).copied().flatten();
                let axis = attributes.input_axes.first().copied().unwrap_or(0);
                let at = if axis < 0 { axis + rank(scanned) as i64 } else { axis };
                let steps = dim(scanned, usize::try_from(at).unwrap_or(usize::MAX));
                let once = graph_cost(body);
                let scaled = |b: Bytes| Bytes((b.0 as f64 * steps) as u64);
                cost += Cost {
                    flops: Flops(once.flops.0 * steps),
                    bytes_read: scaled(once.bytes_read),
                    bytes_written: scaled(once.bytes_written),
                    ..once
                };
            }
            _ => {}
        }
        cost
    }

    /// Elements of a constant that counts as a parameter, or 0.
    fn parameter_count(&self, v: ValueId) -> u64 {
        let value = self.value(v);
        let Some(t) = value.ty.tensor() else { return 0 };
        let is_weight = match value.constant() {
            // Lists of integers are axes and shapes.
            Some(Constant::Inline(_)) => !matches!(t.dtype.name(), "i64" | "bool" | "string"),
            Some(Constant::Stored(_)) => true,
            None => false,
        };
        t.elements().filter(|&n| is_weight && n > 1).map_or(0, |n| n as u64)
    }
}

/// The cost of all nodes together; each constant counts once as parameters.
pub fn graph_cost(graph: &Graph) -> Cost {
    let mut total = Cost::default();
    let mut counted: HashSet<ValueId> = HashSet::new();
    for (id, node) in graph.iter_nodes() {
        let mut cost = graph.node_cost(id);
        let operands: HashSet<ValueId> = node.inputs.iter().copied().flatten().collect();
        for v in operands {
            if !counted.insert(v) {
                cost.parameters = cost.parameters.saturating_sub(graph.parameter_count(v));
            }
        }
        total += cost;
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        BinaryOp, ConvAttributes, DType, MatMulAttributes, Padding, SourceId, StoredTensor, Tensor, ValueType,
    };

    /// Infers a graph of one node, whose operands are inputs of these shapes, and returns its cost.
    fn cost(op: Op, shapes: &[&[usize]]) -> Cost {
        let mut g = Graph::new("g");
        let inputs: Vec<ValueId> = shapes
            .iter()
            .enumerate()
            .map(|(i, s)| g.add_input(format!("x{i}"), TensorType::fixed(DType::F32, s)))
            .collect();
        let y = g.add_node("y", op, &inputs, 1)[0];
        g.outputs.push(y);
        g.infer().unwrap();
        g.node_cost(g.node_ids()[0])
    }

    #[test]
    fn products_count_two_operations_a_term() {
        let c = cost(Op::MatMul(MatMulAttributes::default()), &[&[2, 3, 4], &[4, 5], &[5]]);
        assert_eq!(c.flops, Flops(2.0 * (2 * 3 * 5 * 4) as f64 + 30.0));
        assert_eq!((c.bytes_read, c.bytes_written), (Bytes(4 * (24 + 20 + 5)), Bytes(4 * 30)));
        let trans = MatMulAttributes { trans_a: true, ..Default::default() };
        assert_eq!(cost(Op::MatMul(trans), &[&[4, 3], &[4, 5]]).flops, Flops(120.0));
        assert_eq!(
            cost(Op::Einsum { equation: "ij,jk->ik".into() }, &[&[3, 4], &[4, 5]]).flops,
            Flops(120.0)
        );
    }

    #[test]
    fn convolutions_count_their_groups_and_epilogue() {
        let a = ConvAttributes {
            padding: Padding::SameUpper,
            groups: 4,
            activation: Some(UnaryOp::Relu),
            ..Default::default()
        };
        let c = cost(Op::Conv(a), &[&[1, 4, 8, 8], &[4, 1, 3, 3], &[4]]);
        assert_eq!(c.flops, Flops(256.0 * (2.0 * 9.0 + 2.0)));
    }

    #[test]
    fn graphs_count_each_parameter_once_and_views_are_free() {
        let mut g = Graph::new("g");
        let x = g.add_input("x", TensorType::fixed(DType::F32, &[2, 8]));
        let stored = StoredTensor { source: SourceId(0), offset: 0, size: Bytes(256) };
        let w = g.add_stored("w", TensorType::fixed(DType::F32, &[8, 8]), stored);
        let shape = g.add_constant("shape", Tensor::from_slice(&[2], &[2i64, 8]));
        let a = g.add_node("a", Op::MatMul(MatMulAttributes::default()), &[x, w], 1)[0];
        let b = g.add_node("b", Op::Reshape { allow_zero: false }, &[a, shape], 1)[0];
        let c = g.add_node("c", Op::MatMul(MatMulAttributes::default()), &[b, w], 1)[0];
        let d = g.add_node("d", Op::Binary(BinaryOp::Add), &[c, c], 1)[0];
        g.outputs.push(d);
        g.infer().unwrap();
        assert_eq!(graph_cost(&g).parameters, 64);
        assert_eq!(graph_cost(&g).flops, Flops(2.0 * 256.0 + 16.0));
        assert_eq!(g.node_cost(g.producer(b).unwrap()).bytes_read, Bytes::ZERO);
        assert!(!graph_cost(&g).is_lower_bound);
        g.value_mut(x).ty = ValueType::Unknown;
        g.value_mut(a).ty = TensorType::unranked(DType::F32).into();
        assert!(graph_cost(&g).is_lower_bound);
    }
}
