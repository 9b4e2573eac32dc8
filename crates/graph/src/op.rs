use serde::{Deserialize, Serialize};

use crate::op_attributes::*;
use crate::{Activation, DType, Graph, LmOp, MlOp, Tensor, TrainOp};

/// One operand, element by element. Unless said otherwise the result has the operand's type.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum UnaryOp {
    /// Absolute value.
    Abs,
    /// Arc cosine.
    Acos,
    /// Inverse hyperbolic cosine.
    Acosh,
    /// Arc sine.
    Asin,
    /// Inverse hyperbolic sine.
    Asinh,
    /// Arc tangent.
    Atan,
    /// Inverse hyperbolic tangent.
    Atanh,
    /// Bitwise complement of integers.
    BitwiseNot,
    /// Smallest integer not below.
    Ceil,
    /// `max(0,x) + min(0, alpha·(exp(x/alpha) − 1))`.
    Celu {
        /// Width of the negative part.
        alpha: f32,
    },
    /// Limits with bounds known beforehand; see [`Op::Clip`] for bounds that are operands.
    ClipTo {
        /// Lower bound.
        #[serde(with = "crate::text::float")]
        min: f32,
        /// Upper bound.
        #[serde(with = "crate::text::float")]
        max: f32,
    },
    /// Cosine.
    Cos,
    /// Hyperbolic cosine.
    Cosh,
    /// `x` if positive, else `alpha·(exp(x) − 1)`.
    Elu {
        /// Scale of the negative part.
        alpha: f32,
    },
    /// Error function.
    Erf,
    /// Exponential.
    Exp,
    /// Largest integer not above.
    Floor,
    /// Gaussian error linear unit.
    Gelu {
        /// The tanh approximation instead of erf.
        tanh: bool,
    },
    /// `clamp(alpha·x + beta, 0, 1)`.
    HardSigmoid {
        /// Slope.
        alpha: f32,
        /// Offset.
        beta: f32,
    },
    /// `x · clamp(x/6 + 1/2, 0, 1)`.
    HardSwish,
    /// The operand itself.
    Identity,
    /// Whether infinite; result is bool.
    IsInf {
        /// Count −∞.
        negative: bool,
        /// Count +∞.
        positive: bool,
    },
    /// Whether not a number; result is bool.
    IsNan,
    /// `x` if not negative, else `alpha·x`.
    LeakyRelu {
        /// Slope of the negative part.
        alpha: f32,
    },
    /// Natural logarithm.
    Log,
    /// `x · tanh(softplus(x))`.
    Mish,
    /// Negation.
    Neg,
    /// Logical complement of bool.
    Not,
    /// `1/x`.
    Reciprocal,
    /// `max(0, x)`.
    Relu,
    /// Nearest integer, ties to even.
    Round,
    /// `1/√x`.
    Rsqrt,
    /// Scaled exponential linear unit.
    Selu {
        /// Scale of the exponential part.
        alpha: f32,
        /// Scale of the whole.
        gamma: f32,
    },
    /// Pulls towards zero by `bias` outside `[-lambd, lambd]`, zero inside.
    Shrink {
        /// How far.
        bias: f32,
        /// Half-width of the dead zone.
        lambd: f32,
    },
    /// `1/(1 + exp(−x))`.
    Sigmoid,
    /// −1, 0 or 1.
    Sign,
    /// Sine.
    Sin,
    /// Hyperbolic sine.
    Sinh,
    /// `ln(1 + exp(x))`.
    Softplus,
    /// `x/(1 + |x|)`.
    Softsign,
    /// Square root.
    Sqrt,
    /// `x · sigmoid(alpha·x)` (SiLU at alpha 1, QuickGelu at 1.702).
    Swish {
        /// Steepness.
        alpha: f32,
    },
    /// Tangent.
    Tan,
    /// Hyperbolic tangent.
    Tanh,
    /// `x` if above `alpha`, else 0.
    ThresholdedRelu {
        /// The threshold.
        alpha: f32,
    },
}

/// Two operands with broadcasting, element by element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum BinaryOp {
    /// Sum.
    Add,
    /// Difference.
    Sub,
    /// Product.
    Mul,
    /// Quotient; integers truncate.
    Div,
    /// Remainder with the sign of the divisor (integers).
    Mod,
    /// Remainder with the sign of the dividend, as C's `fmod`.
    FMod,
    /// Power; the result has the type of the base.
    Pow,
    /// `x` if not negative, else `slope·x`.
    PRelu,
    /// Logical and.
    And,
    /// Logical or.
    Or,
    /// Logical exclusive or.
    Xor,
    /// Bitwise and.
    BitAnd,
    /// Bitwise or.
    BitOr,
    /// Bitwise exclusive or.
    BitXor,
    /// Shift towards the high bits.
    ShiftLeft,
    /// Shift towards the low bits.
    ShiftRight,
    /// Result is bool.
    Equal,
    /// Result is bool.
    Greater,
    /// Result is bool.
    GreaterOrEqual,
    /// Result is bool.
    Less,
    /// Result is bool.
    LessOrEqual,
    /// The larger; NaN wins.
    Max,
    /// The smaller; NaN wins.
    Min,
}

/// Any number of operands with broadcasting, element by element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum VariadicOp {
    /// Sum of all.
    Sum,
    /// Arithmetic mean of all.
    Mean,
    /// Largest of all.
    Max,
    /// Smallest of all.
    Min,
}

/// What a node does. Operands are listed as `(a, b, c?)`; a question mark is an optional one.
///
/// Operators follow the newest ONNX definition of the same name unless said otherwise; older spellings are brought
/// to this form on import. Operands that say *how much* or *where* (axes, sizes, pads) are `i64` tensors and
/// usually constants.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Op {
    // ---- element by element ----
    /// `(x)`.
    Unary(UnaryOp),
    /// `(a, b)`.
    Binary(BinaryOp),
    /// `(a, …)`.
    Variadic(VariadicOp),
    /// `(condition, a, b)`.
    Where,
    /// `(x, min?, max?)` with scalar bounds.
    Clip,
    /// `(x)`: to another element type.
    Cast {
        /// Target type.
        to: DType,
        /// Out-of-range values saturate when the target is an 8-bit float.
        saturate: bool,
    },
    /// `(x, extra…)`: several element-wise steps in one sweep; made by fusion. See [`ElementwiseStep`].
    Elementwise(Vec<ElementwiseStep>),
    /// `(x)`: scales the inputs at training time; at inference the identity. Outputs `(y, mask?)`.
    /// `(x, ratio?, training?)`.
    Dropout {
        /// Seed of the random numbers, if one is given.
        seed: Option<i64>,
    },

    // ---- linear algebra ----
    /// `(a, b, bias?, residual?, weight_scale?)`: batched matrix product with NumPy broadcasting of the leading
    /// dimensions, then `activation(alpha·a·(b·weight_scale) + bias + residual)`. The bias `[n]` broadcasts over rows;
    /// the residual has the shape of the result. `weight_scale` `[n]` multiplies the columns of the product, which
    /// is done best while `b` is packed; fusion makes it where `b` is a stored weight that it must not touch.
    MatMul(MatMulAttributes),
    /// `(a, b, c?)`: `alpha·a'·b' + beta·c` for matrices.
    Gemm(GemmAttributes),
    /// `(operands…)`: sum of products in Einstein's notation.
    Einsum {
        /// Such as `"bij,bjk->bik"`.
        equation: String,
    },
    /// `(x)`: determinant of the last two dimensions.
    Det,
    /// `(a, b, a_zero?, b_zero?)`: 8-bit operands, i32 result.
    MatMulInteger,
    /// `(a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero, bias?)`: the bias is i32 in units of
    /// `a_scale·b_scale`, `[n]`. Of the attributes, `alpha` is 1 and the activation is one that limits the range: it
    /// applies to the real result before this is quantised.
    QLinearMatMul(MatMulAttributes),

    // ---- convolution and pooling ----
    /// `(x, w, bias?, residual?, weight_scale?)`: w is `[out, in/groups, kernel…]`;
    /// `activation(x∗(w·weight_scale) + bias + residual)`. The residual has the shape of the result. `weight_scale`
    /// `[out]` multiplies the weights of each output channel, which is done best while they are packed; fusion makes
    /// it of a batch normalisation whose convolution has stored weights, which it must not touch.
    Conv(ConvAttributes),
    /// `(x, w, bias?, residual?, weight_scale?)`: w is `[in, out/groups, kernel…]`; the rest as for
    /// [`Conv`](Self::Conv).
    ConvTranspose(ConvTransposeAttributes),
    /// `(x, w, offset, bias?, mask?)`.
    DeformConv {
        /// As for an ordinary convolution.
        conv: ConvAttributes,
        /// Number of offset groups.
        offset_groups: usize,
    },
    /// `(x, w, x_zero?, w_zero?)`: 8-bit operands, i32 result.
    ConvInteger(ConvAttributes),
    /// `(x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias?)`: the bias is i32 in units of
    /// `x_scale·w_scale`. An activation is one that limits the range ([`UnaryOp::Relu`], [`UnaryOp::ClipTo`]); it
    /// applies to the real result before this is quantised.
    QLinearConv(ConvAttributes),
    /// `(x, image_shape, block_shape)`.
    Col2Im {
        /// Per spatial axis.
        dilations: Vec<usize>,
        /// Begins, then ends.
        pads: Vec<usize>,
        /// Per spatial axis.
        strides: Vec<usize>,
    },
    /// `(x)`; outputs `(y, indices?)`.
    Pool(PoolAttributes),
    /// `(x)`: over all spatial dimensions.
    GlobalPool {
        /// Which statistic.
        kind: PoolKind,
        /// Where the channels are.
        layout: Layout,
    },
    /// `(x, indices, output_shape?)`.
    MaxUnpool {
        /// Window size per spatial axis.
        kernel: Vec<usize>,
        /// Per spatial axis.
        strides: Vec<usize>,
        /// Begins, then ends.
        pads: Vec<usize>,
    },
    /// `(x, rois)`.
    MaxRoiPool {
        /// Output height and width.
        pooled_shape: [usize; 2],
        /// From roi coordinates to input coordinates.
        spatial_scale: f32,
    },
    /// `(x, rois, batch_indices)`.
    RoiAlign(RoiAlignAttributes),

    // ---- normalisation ----
    /// `(x, scale, bias, mean, variance)`; outputs `(y, running_mean?, running_variance?)`.
    BatchNorm {
        /// Added to the variance.
        epsilon: f32,
        /// Weight of the old running statistics in training mode.
        momentum: f32,
        /// Uses and updates batch statistics.
        training: bool,
    },
    /// `(x, scale, bias)`: per sample and channel.
    InstanceNorm {
        /// Added to the variance.
        epsilon: f32,
    },
    /// `(x, scale, bias)`: scale and bias per channel.
    GroupNorm {
        /// Number of groups of channels.
        groups: usize,
        /// Added to the variance.
        epsilon: f32,
    },
    /// `(x, scale, bias?)`; outputs `(y, mean?, inverse_std?)`.
    LayerNorm {
        /// First normalised axis.
        axis: i64,
        /// Added to the variance.
        epsilon: f32,
    },
    /// `(x, scale)`.
    RmsNorm {
        /// First normalised axis.
        axis: i64,
        /// Added to the mean square.
        epsilon: f32,
    },
    /// `(x)`: divided by its p-norm along an axis.
    LpNorm {
        /// Along which.
        axis: i64,
        /// 1 or 2.
        p: i64,
    },
    /// `(x)`: to zero mean and unit variance over `axes`.
    MeanVarianceNorm {
        /// Over which.
        axes: Vec<i64>,
    },
    /// `(x)`: local response normalisation across channels.
    Lrn {
        /// Scale.
        alpha: f32,
        /// Exponent.
        beta: f32,
        /// Offset.
        bias: f32,
        /// Channels summed over.
        size: usize,
    },
    /// `(x)`: softmax, or its logarithm, along one axis (ONNX 13 semantics).
    Softmax {
        /// Along which.
        axis: i64,
        /// The logarithm.
        log: bool,
    },
    /// `(x)`: 1 at the first largest element along the axis.
    Hardmax {
        /// Along which.
        axis: i64,
    },

    // ---- reductions ----
    /// `(x, axes?)`.
    Reduce {
        /// Which statistic.
        op: ReduceOp,
        /// Reduced axes stay as size 1.
        keep_dims: bool,
        /// Absent or empty axes mean none instead of all.
        noop_with_empty_axes: bool,
    },
    /// `(x)`: index of the largest (or smallest) element; i64.
    ArgReduce {
        /// Largest rather than smallest.
        largest: bool,
        /// Along which.
        axis: i64,
        /// The axis stays as size 1.
        keep_dims: bool,
        /// Last rather than first of equals.
        select_last_index: bool,
    },
    /// `(x, axis)`: running sum.
    CumSum {
        /// Excludes the element itself.
        exclusive: bool,
        /// From the end.
        reverse: bool,
    },

    // ---- attention ----
    /// `(q, k, v, mask?, past_key?, past_value?)`; outputs `(y, present_key?, present_value?, qk?)`.
    Attention(AttentionAttributes),
    /// `(x, cos_cache, sin_cache, position_ids?)`.
    RotaryEmbedding {
        /// Pairs are neighbours rather than halves.
        interleaved: bool,
        /// Heads, for 3-D operands.
        num_heads: usize,
        /// Rotated part of each head; 0 for all.
        rotary_dim: usize,
    },

    // ---- shape and data movement ----
    /// `(x, shape)`: −1 infers, 0 copies unless `allow_zero`.
    Reshape {
        /// 0 means 0.
        allow_zero: bool,
    },
    /// `(x)`: to two dimensions, split before `axis`.
    Flatten {
        /// The split.
        axis: i64,
    },
    /// `(x, axes?)`.
    Squeeze,
    /// `(x, axes)`.
    Unsqueeze,
    /// `(x)`.
    Transpose {
        /// Source axis of each result axis; `None` reverses.
        perm: Option<Vec<usize>>,
    },
    /// `(x, shape)`: broadcast in both directions.
    Expand,
    /// `(x, repeats)`.
    Tile,
    /// `(x, …)`.
    Concat {
        /// Along which.
        axis: i64,
    },
    /// `(x, sizes?)`: one output per part; equal parts (the last smaller) without sizes.
    Split {
        /// Along which.
        axis: i64,
    },
    /// `(x, starts, ends, axes?, steps?)`.
    Slice,
    /// `(x, pads, value?, axes?)`.
    Pad {
        /// What fills.
        mode: PadMode,
    },
    /// `(x, indices)`: whole slices along an axis.
    Gather {
        /// Along which.
        axis: i64,
    },
    /// `(x, indices)`.
    GatherElements {
        /// Along which.
        axis: i64,
    },
    /// `(x, indices)`.
    GatherNd {
        /// Leading dimensions that match one to one.
        batch_dims: usize,
    },
    /// `(x, indices, updates)`.
    ScatterElements {
        /// Along which.
        axis: i64,
        /// What happens to the old element.
        reduction: ScatterReduction,
    },
    /// `(x, indices, updates)`.
    ScatterNd {
        /// What happens to the old element.
        reduction: ScatterReduction,
    },
    /// `(past_cache, update, write_indices?)`: writes along an axis at a per-batch position.
    TensorScatter {
        /// Along which.
        axis: i64,
        /// Wraps around.
        circular: bool,
    },
    /// `(x)`.
    DepthToSpace {
        /// Block size.
        block: usize,
        /// Column-row-depth order rather than depth-column-row.
        crd: bool,
    },
    /// `(x)`.
    SpaceToDepth {
        /// Block size.
        block: usize,
    },
    /// `(x, roi?, scales?, sizes?)`.
    Resize(ResizeAttributes),
    /// `(x, grid)`.
    GridSample {
        /// Interpolation.
        mode: ResizeMode,
        /// Outside the picture.
        padding: GridPadding,
        /// −1 and 1 are corner centres.
        align_corners: bool,
    },
    /// `(theta, size)`.
    AffineGrid {
        /// −1 and 1 are corner centres.
        align_corners: bool,
    },
    /// `(x, shape)`.
    CenterCropPad {
        /// Which axes `shape` talks of; all when absent.
        axes: Option<Vec<i64>>,
    },
    /// `(x, lengths)`.
    ReverseSequence {
        /// 0 or 1.
        batch_axis: usize,
        /// 0 or 1.
        time_axis: usize,
    },
    /// `(x, k?)`: keeps one triangle.
    Trilu {
        /// The upper one.
        upper: bool,
    },
    /// `(x)`: ones on a diagonal of a matrix shaped like x.
    EyeLike {
        /// Result type; that of x when absent.
        dtype: Option<DType>,
        /// Which diagonal.
        k: i64,
    },
    /// `(indices, depth, values)`.
    OneHot {
        /// Where the new axis goes.
        axis: i64,
    },
    /// `(start, limit, delta)`.
    Range,
    /// `(shape)`.
    ConstantOfShape {
        /// One element.
        value: Tensor,
    },
    /// `(x)`: the dimensions `start..end`, i64.
    Shape {
        /// First, negative from the end.
        start: i64,
        /// One past the last; all when absent.
        end: Option<i64>,
    },
    /// `(x)`: number of elements, i64.
    Size,
    /// `(x)`: `[rank, count]`, i64; data-dependent shape.
    NonZero,
    /// `(x, condition)`; data-dependent shape.
    Compress {
        /// Along which; flattened when absent.
        axis: Option<i64>,
    },
    /// `(x)`; outputs `(y, indices?, inverse?, counts?)`; data-dependent shape.
    Unique {
        /// Along which; flattened when absent.
        axis: Option<i64>,
        /// Ascending rather than in order of appearance.
        sorted: bool,
    },
    /// `(x, k)`; outputs `(values, indices)`.
    TopK {
        /// Along which.
        axis: i64,
        /// Largest rather than smallest.
        largest: bool,
        /// In order.
        sorted: bool,
    },
    /// `(boxes, scores, max_per_class?, iou_threshold?, score_threshold?)`; data-dependent shape.
    NonMaxSuppression {
        /// Boxes are centre and size rather than two corners.
        center_point_box: bool,
    },

    // ---- random numbers ----
    /// `(shape_or_like?)`: see [`RandomAttributes`].
    Random(RandomAttributes),
    /// `(p)`: 1 with probability p.
    Bernoulli {
        /// Result type; that of p when absent.
        dtype: Option<DType>,
        /// Seed, if one is given.
        seed: Option<f32>,
    },
    /// `(logits)`: `[batch, samples]`.
    Multinomial {
        /// i32 or i64.
        dtype: DType,
        /// Samples per row.
        sample_size: usize,
        /// Seed, if one is given.
        seed: Option<f32>,
    },

    // ---- signals ----
    /// `(x, length?, axis?)`.
    Dft {
        /// Backward transform.
        inverse: bool,
        /// Only the non-redundant half.
        onesided: bool,
    },
    /// `(signal, step, window?, length?)`.
    Stft {
        /// Only the non-redundant half.
        onesided: bool,
    },
    /// `(bins, dft_length, sample_rate, lower_hz, upper_hz)`.
    MelWeightMatrix {
        /// Result type.
        dtype: DType,
    },
    /// `(size)`.
    Window {
        /// Which window.
        kind: WindowKind,
        /// Periodic rather than symmetric.
        periodic: bool,
        /// Result type.
        dtype: DType,
    },

    // ---- recurrent ----
    /// `(x, w, r, b?, lengths?, h0?)`; outputs `(y?, h?)`.
    Rnn(RecurrentAttributes),
    /// `(x, w, r, b?, lengths?, h0?, c0?, peepholes?)`; outputs `(y?, h?, c?)`.
    Lstm(RecurrentAttributes),
    /// `(x, w, r, b?, lengths?, h0?)`; outputs `(y?, h?)`.
    Gru(RecurrentAttributes),

    // ---- control flow; a body's inputs are its formal inputs, then its captured values ----
    /// `(condition, captures…)`: both bodies take all captures as inputs.
    If {
        /// When true.
        #[serde(skip)]
        then_body: Box<Graph>,
        /// When false.
        #[serde(skip)]
        else_body: Box<Graph>,
    },
    /// `(trip_count?, condition?, carried…, captures…)`; outputs `(carried…, scans…)`.
    /// The body takes `(iteration, condition, carried…, captures…)` and yields `(condition, carried…, scans…)`.
    Loop {
        /// Number of carried values.
        carried: usize,
        /// The body.
        #[serde(skip)]
        body: Box<Graph>,
    },
    /// `(states…, scans…, captures…)`; outputs `(states…, scans…)`.
    Scan {
        /// Details.
        attributes: ScanAttributes,
        /// The body.
        #[serde(skip)]
        body: Box<Graph>,
    },
    /// `(sequence, extra…, captures…)`: the body once per element.
    SequenceMap {
        /// Number of operands before the captures.
        operands: usize,
        /// The body.
        #[serde(skip)]
        body: Box<Graph>,
    },

    // ---- sequences and optionals ----
    /// `(x, …)`.
    SequenceConstruct,
    /// `()`.
    SequenceEmpty {
        /// Element type of its tensors.
        dtype: DType,
    },
    /// `(sequence, position)`.
    SequenceAt,
    /// `(sequence, position?)`.
    SequenceErase,
    /// `(sequence, x, position?)`.
    SequenceInsert,
    /// `(sequence)`: i64 scalar.
    SequenceLength,
    /// `(sequence)`.
    ConcatFromSequence {
        /// Along which.
        axis: i64,
        /// Stacks along a new axis.
        new_axis: bool,
    },
    /// `(x, split?)`.
    SplitToSequence {
        /// Along which.
        axis: i64,
        /// Keeps the axis when no split is given.
        keep_dims: bool,
    },
    /// `(x?)`.
    OptionalConstruct {
        /// Type of the content, for an empty one.
        ty: Option<crate::ValueType>,
    },
    /// `(x)`.
    OptionalGetElement,
    /// `(x?)`: bool scalar.
    OptionalHasElement,

    // ---- quantisation ----
    /// `(x, scale, zero?)`.
    QuantizeLinear(QuantizeAttributes),
    /// `(x, scale, zero?)`.
    DequantizeLinear(QuantizeAttributes),
    /// `(x)`; outputs `(y, scale, zero)`.
    DynamicQuantizeLinear,
    /// `(x, x_scale, x_zero, y_scale, y_zero)`: `quantize(op(dequantize(x)))` of 8-bit elements, which is a table of
    /// 256 entries. [`UnaryOp::Identity`] changes the scale. Made by fusion.
    QLinearUnary(UnaryOp),
    /// `(a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero)`:
    /// `quantize(activation(op(dequantize(a), dequantize(b))))` of 8-bit elements with broadcasting. Made by fusion.
    QLinearBinary {
        /// Only arithmetic ones.
        op: BinaryOp,
        /// One that limits the range; applies to the real result before this is quantised.
        activation: Option<Activation>,
    },
    /// `(x, x_scale, x_zero, y_scale, y_zero)`: average pooling of 8-bit elements, rounded once at the end. Made by
    /// fusion; a global pool is one whose window is the whole picture.
    QLinearPool(PoolAttributes),

    // ---- losses ----
    /// `(log_probabilities, target, weight?)`.
    NllLoss(LossAttributes),
    /// `(scores, labels, weight?)`; outputs `(loss, log_probabilities?)`.
    SoftmaxCrossEntropyLoss(LossAttributes),

    // ---- text and pictures ----
    /// `(x)`: case folding and stop words.
    StringNormalizer(StringNormalizerAttributes),
    /// `(a, b)`.
    StringConcat,
    /// `(x)`; outputs `(parts, counts)`.
    StringSplit {
        /// Whitespace when absent.
        delimiter: Option<String>,
        /// Most splits; unlimited when absent.
        maxsplit: Option<i64>,
    },
    /// `(x)`: bool.
    RegexFullMatch {
        /// RE2 syntax.
        pattern: String,
    },
    /// `(x)`: n-gram counts.
    TfIdfVectorizer(Box<TfIdfAttributes>),
    /// `(bytes)`: `[height, width, channels]`, u8; data-dependent shape.
    ImageDecode {
        /// Order and number of channels.
        format: PixelFormat,
    },

    // ---- classical machine learning ----
    /// ONNX-ML operators.
    Ml(Box<MlOp>),

    // ---- language models ----
    /// Operators of decoder language models.
    Lm(Box<LmOp>),

    // ---- training ----
    /// Gradients, losses and updates of parameters.
    Train(Box<TrainOp>),
}

impl Op {
    /// The operator's name: the variant, with the kind for families (`Unary.Relu` prints as `Relu`).
    pub fn name(&self) -> &'static str {
        fn variant<T: std::fmt::Debug>(value: &T) -> String {
            let text = format!("{value:?}");
            text.split([' ', '(', '{']).next().unwrap_or_default().to_owned()
        }
        // Interned once per distinct name, so that messages, profiles and histograms share one spelling.
        let text = match self {
            Op::Unary(op) => variant(op),
            Op::Binary(op) => variant(op),
            Op::Variadic(op) => format!("{}Of", variant(op)),
            Op::Reduce { op, .. } => format!("Reduce{}", variant(op)),
            Op::ArgReduce { largest: true, .. } => "ArgMax".to_owned(),
            Op::ArgReduce { .. } => "ArgMin".to_owned(),
            Op::Pool(a) => format!("{}Pool", a.kind.name()),
            Op::GlobalPool { kind, .. } => format!("Global{}Pool", kind.name()),
            Op::Softmax { log: true, .. } => "LogSoftmax".to_owned(),
            Op::Ml(op) => variant(op),
            Op::Lm(op) => variant(op),
            Op::Train(op) => variant(op),
            // Printing a whole body just to find its first word would be slow.
            Op::If { .. } => "If".to_owned(),
            Op::Loop { .. } => "Loop".to_owned(),
            Op::Scan { .. } => "Scan".to_owned(),
            Op::SequenceMap { .. } => "SequenceMap".to_owned(),
            Op::ConstantOfShape { .. } => "ConstantOfShape".to_owned(),
            Op::TfIdfVectorizer(_) => "TfIdfVectorizer".to_owned(),
            other => variant(other),
        };
        intern(text)
    }

    /// Fewest and most operands (captures included) that the operator takes.
    pub fn input_count(&self) -> (usize, usize) {
        const MANY: usize = usize::MAX;
        match self {
            Op::Unary(_) | Op::Cast { .. } | Op::Det | Op::Pool(_) | Op::GlobalPool { .. } => (1, 1),
            Op::Binary(_) => (2, 2),
            Op::Variadic(_) | Op::Concat { .. } | Op::Einsum { .. } | Op::Elementwise(_) => (1, MANY),
            Op::Where => (3, 3),
            Op::Clip | Op::Dropout { .. } => (1, 3),
            Op::MatMul(_) => (2, 5),
            Op::Gemm(_) => (2, 3),
            Op::MatMulInteger => (2, 4),
            Op::QLinearMatMul(_) => (8, 9),
            Op::Conv(_) | Op::ConvTranspose(_) => (2, 5),
            Op::DeformConv { .. } => (3, 5),
            Op::ConvInteger(_) => (2, 4),
            Op::QLinearConv(_) => (8, 9),
            Op::Col2Im { .. } => (3, 3),
            Op::MaxUnpool { .. } => (2, 3),
            Op::MaxRoiPool { .. } => (2, 2),
            Op::RoiAlign(_) => (3, 3),
            Op::BatchNorm { .. } => (5, 5),
            Op::InstanceNorm { .. } | Op::GroupNorm { .. } => (3, 3),
            Op::LayerNorm { .. } => (2, 3),
            Op::RmsNorm { .. } => (2, 2),
            Op::LpNorm { .. }
            | Op::MeanVarianceNorm { .. }
            | Op::Lrn { .. }
            | Op::Softmax { .. }
            | Op::Hardmax { .. }
            | Op::ArgReduce { .. } => (1, 1),
            Op::Reduce { .. } => (1, 2),
            Op::CumSum { .. } => (2, 2),
            Op::Attention(_) => (3, 7),
            Op::RotaryEmbedding { .. } => (3, 4),
            Op::Reshape { .. } | Op::Unsqueeze | Op::Expand | Op::Tile | Op::CenterCropPad { .. } => (2, 2),
            Op::Flatten { .. } | Op::Transpose { .. } => (1, 1),
            Op::Squeeze | Op::Split { .. } | Op::Trilu { .. } => (1, 2),
            Op::Slice => (3, 5),
            Op::Pad { .. } => (2, 4),
            Op::Gather { .. } | Op::GatherElements { .. } | Op::GatherNd { .. } => (2, 2),
            Op::ScatterElements { .. } | Op::ScatterNd { .. } => (3, 3),
            Op::TensorScatter { .. } => (2, 3),
            Op::DepthToSpace { .. } | Op::SpaceToDepth { .. } => (1, 1),
            Op::Resize(_) => (1, 4),
            Op::GridSample { .. } | Op::AffineGrid { .. } | Op::ReverseSequence { .. } => (2, 2),
            Op::EyeLike { .. } | Op::ConstantOfShape { .. } | Op::Shape { .. } | Op::Size | Op::NonZero => {
                (1, 1)
            }
            Op::OneHot { .. } | Op::Range => (3, 3),
            Op::Compress { .. } | Op::TopK { .. } => (2, 2),
            Op::Unique { .. } => (1, 1),
            Op::NonMaxSuppression { .. } => (2, 5),
            Op::Random(_) => (0, 1),
            Op::Bernoulli { .. } | Op::Multinomial { .. } => (1, 1),
            Op::Dft { .. } => (1, 3),
            Op::Stft { .. } => (2, 4),
            Op::MelWeightMatrix { .. } => (5, 5),
            Op::Window { .. } => (1, 1),
            Op::Rnn(_) | Op::Gru(_) => (3, 6),
            Op::Lstm(_) => (3, 8),
            Op::If { .. } => (1, MANY),
            Op::Loop { carried, .. } => (2 + carried, MANY),
            Op::Scan { .. } | Op::SequenceMap { .. } => (1, MANY),
            Op::SequenceConstruct => (1, MANY),
            Op::SequenceEmpty { .. } => (0, 0),
            Op::SequenceAt => (2, 2),
            Op::SequenceErase => (1, 2),
            Op::SequenceInsert => (2, 3),
            Op::SequenceLength | Op::ConcatFromSequence { .. } => (1, 1),
            Op::SplitToSequence { .. } => (1, 2),
            Op::OptionalConstruct { .. } | Op::OptionalHasElement => (0, 1),
            Op::OptionalGetElement => (1, 1),
            Op::QuantizeLinear(_) | Op::DequantizeLinear(_) => (2, 3),
            Op::DynamicQuantizeLinear => (1, 1),
            Op::QLinearUnary(_) | Op::QLinearPool(_) => (5, 5),
            Op::QLinearBinary { .. } => (8, 8),
            Op::NllLoss(_) | Op::SoftmaxCrossEntropyLoss(_) => (2, 3),
            Op::StringNormalizer(_)
            | Op::StringSplit { .. }
            | Op::RegexFullMatch { .. }
            | Op::TfIdfVectorizer(_)
            | Op::ImageDecode { .. } => (1, 1),
            Op::StringConcat => (2, 2),
            Op::Ml(op) => op.input_count(),
            Op::Lm(op) => op.input_count(),
            Op::Train(op) => op.input_count(),
        }
    }

    /// How many of the first operands are states whose places the results of the same number take.
    pub fn updated_states(&self) -> usize {
        match self {
            Op::Lm(op) => op.updated_states(),
            Op::Train(op) => op.updated_states(),
            _ => 0,
        }
    }

    /// The graphs inside a control-flow operator.
    pub fn bodies(&self) -> Vec<&Graph> {
        match self {
            Op::If { then_body, else_body } => vec![then_body, else_body],
            Op::Loop { body, .. } | Op::Scan { body, .. } | Op::SequenceMap { body, .. } => vec![body],
            _ => Vec::new(),
        }
    }

    /// The graphs inside a control-flow operator, to be changed.
    pub fn bodies_mut(&mut self) -> Vec<&mut Graph> {
        match self {
            Op::If { then_body, else_body } => vec![then_body, else_body],
            Op::Loop { body, .. } | Op::Scan { body, .. } | Op::SequenceMap { body, .. } => vec![body],
            _ => Vec::new(),
        }
    }

    /// Whether two runs on the same operands may differ, so that the node can be neither folded nor merged.
    pub fn is_random(&self) -> bool {
        matches!(self, Op::Random(_) | Op::Bernoulli { .. } | Op::Multinomial { .. } | Op::Dropout { .. })
            || self.bodies().iter().any(|b| b.iter_nodes().any(|(_, n)| n.op.is_random()))
    }

    /// The activation that this operator applies to its result, where it can take one.
    pub fn activation(&self) -> Option<&Option<Activation>> {
        match self {
            Op::Conv(a) => Some(&a.activation),
            Op::MatMul(a) | Op::QLinearMatMul(a) => Some(&a.activation),
            Op::ConvTranspose(a) => Some(&a.conv.activation),
            Op::QLinearConv(a) => Some(&a.activation),
            Op::QLinearBinary { activation, .. } => Some(activation),
            _ => None,
        }
    }
}

/// One copy of each operator name, kept for the life of the process; their number is bounded by the operators.
fn intern(text: String) -> &'static str {
    use std::collections::HashSet;
    use std::sync::{LazyLock, Mutex, PoisonError};
    static NAMES: LazyLock<Mutex<HashSet<&'static str>>> = LazyLock::new(Mutex::default);
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(name) = names.get(text.as_str()) {
        return name;
    }
    let name: &'static str = Box::leak(text.into_boxed_str());
    names.insert(name);
    name
}
