//! Attributes of the operators in [`Op`](crate::Op).

use serde::{Deserialize, Serialize};

use crate::{BinaryOp, DType, Tensor, UnaryOp};

/// A unary operator applied to a result before it is stored.
pub type Activation = UnaryOp;

/// Where the channel dimension of a picture-like tensor is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Layout {
    /// `[batch, channels, spatial…]`.
    #[default]
    ChannelsFirst,
    /// `[batch, spatial…, channels]`.
    ChannelsLast,
}

/// How a window operator pads its spatial dimensions.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Padding {
    /// All begins, then all ends; a negative value crops.
    Explicit(Vec<i64>),
    /// Output size is input size over stride, rounded up; the odd pixel goes to the end.
    SameUpper,
    /// The same, with the odd pixel at the beginning.
    SameLower,
    /// None.
    Valid,
}

/// Attributes of every kind of convolution. Empty vectors mean ones (strides, dilations) or "from the weights"
/// (kernel).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConvAttributes {
    /// Window per spatial axis; read from the weights when empty.
    pub kernel: Vec<usize>,
    /// Per spatial axis.
    pub strides: Vec<usize>,
    /// Per spatial axis.
    pub dilations: Vec<usize>,
    /// Around the input.
    pub padding: Padding,
    /// Number of independent groups of channels.
    pub groups: usize,
    /// Layout of input, residual and output; weights keep theirs.
    pub layout: Layout,
    /// Applied last, after bias and residual; set by fusion.
    pub activation: Option<Activation>,
}

impl Default for ConvAttributes {
    fn default() -> Self {
        ConvAttributes {
            kernel: Vec::new(),
            strides: Vec::new(),
            dilations: Vec::new(),
            padding: Padding::Valid,
            groups: 1,
            layout: Layout::ChannelsFirst,
            activation: None,
        }
    }
}

/// Attributes of a transposed convolution.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConvTransposeAttributes {
    /// As for a convolution; `padding` crops the output.
    pub conv: ConvAttributes,
    /// Extra rows at the end, per spatial axis.
    pub output_padding: Vec<usize>,
    /// Spatial output shape, which decides the padding; empty when the padding decides.
    pub output_shape: Vec<usize>,
}

/// Which statistic a pooling window yields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PoolKind {
    /// Largest element.
    Max,
    /// Arithmetic mean.
    Average,
    /// p-norm.
    Lp(i64),
}

impl PoolKind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            PoolKind::Max => "Max",
            PoolKind::Average => "Average",
            PoolKind::Lp(_) => "Lp",
        }
    }
}

/// Attributes of a pooling window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PoolAttributes {
    /// Which statistic.
    pub kind: PoolKind,
    /// Per spatial axis.
    pub kernel: Vec<usize>,
    /// Per spatial axis; ones when empty.
    pub strides: Vec<usize>,
    /// Per spatial axis; ones when empty.
    pub dilations: Vec<usize>,
    /// Around the input.
    pub padding: Padding,
    /// Rounds the output size up.
    pub ceil_mode: bool,
    /// Averages over the padding, too.
    pub count_include_pad: bool,
    /// Indices of maxima count column by column.
    pub storage_order_column: bool,
    /// Layout of input and output.
    pub layout: Layout,
}

/// Attributes of [`Op::MatMul`](crate::Op::MatMul).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MatMulAttributes {
    /// Reads the last two dimensions of `a` transposed.
    pub trans_a: bool,
    /// Reads the last two dimensions of `b` transposed.
    pub trans_b: bool,
    /// Scale of the product.
    pub alpha: f32,
    /// Applied last; set by fusion.
    pub activation: Option<Activation>,
}

impl Default for MatMulAttributes {
    fn default() -> Self {
        MatMulAttributes { trans_a: false, trans_b: false, alpha: 1.0, activation: None }
    }
}

/// Attributes of [`Op::Gemm`](crate::Op::Gemm).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GemmAttributes {
    /// Scale of the product.
    pub alpha: f32,
    /// Scale of `c`.
    pub beta: f32,
    /// Transposes `a`.
    pub trans_a: bool,
    /// Transposes `b`.
    pub trans_b: bool,
}

/// One step of [`Op::Elementwise`](crate::Op::Elementwise). The running value starts as operand 0, which has the
/// shape of the result.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum ElementwiseStep {
    /// `running = op(running)`.
    Unary(UnaryOp),
    /// `running = op(running, operand)` or, when swapped, `op(operand, running)`.
    Binary {
        /// Which operator; only arithmetic ones.
        op: BinaryOp,
        /// Index into the node's operands; broadcasts to the result's shape.
        operand: usize,
        /// The running value is the right-hand side.
        swapped: bool,
    },
}

/// Which statistic a reduction yields.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ReduceOp {
    L1,
    L2,
    LogSum,
    LogSumExp,
    Max,
    Mean,
    Min,
    Prod,
    Sum,
    SumSquare,
}

/// Attributes of [`Op::Attention`](crate::Op::Attention) (ONNX 23 and 24).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionAttributes {
    /// Position i sees positions up to i only.
    pub causal: bool,
    /// Query heads, for 3-D operands; 0 for 4-D ones.
    pub q_num_heads: usize,
    /// Key and value heads, for 3-D operands; 0 for 4-D ones.
    pub kv_num_heads: usize,
    /// Of the scores; `1/√head_size` when absent.
    pub scale: Option<f32>,
    /// `softcap·tanh(score/softcap)`; 0 for none.
    pub softcap: f32,
    /// What the fourth output holds.
    pub qk_output: QkOutput,
    /// Type in which the softmax is computed; that of the operands when absent.
    pub softmax_precision: Option<DType>,
}

/// At which stage [`Op::Attention`](crate::Op::Attention) shows its scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum QkOutput {
    /// Scaled products.
    #[default]
    Raw,
    /// After the mask.
    Masked,
    /// After the soft cap.
    Capped,
    /// After the softmax.
    Softmax,
}

/// What fills the border in [`Op::Pad`](crate::Op::Pad).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PadMode {
    /// One value.
    Constant,
    /// The nearest element.
    Edge,
    /// Mirrored without the edge.
    Reflect,
    /// From the other end.
    Wrap,
}

/// What scattering does to the old element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ScatterReduction {
    /// Overwrites it.
    None,
    /// Adds.
    Add,
    /// Multiplies.
    Mul,
    /// Keeps the larger.
    Max,
    /// Keeps the smaller.
    Min,
}

/// Interpolation of [`Op::Resize`](crate::Op::Resize) and [`Op::GridSample`](crate::Op::GridSample).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ResizeMode {
    /// One element.
    Nearest,
    /// Two per axis.
    Linear,
    /// Four per axis.
    Cubic,
}

/// From output to input coordinates.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CoordinateMode {
    HalfPixel,
    HalfPixelSymmetric,
    PytorchHalfPixel,
    AlignCorners,
    Asymmetric,
    TfCropAndResize,
    TfHalfPixelForNearest,
}

/// Rounding of [`ResizeMode::Nearest`].
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum NearestMode {
    RoundPreferFloor,
    RoundPreferCeil,
    Floor,
    Ceil,
}

/// How `sizes` are read when some axes keep the aspect ratio.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum AspectRatio {
    /// As given.
    Stretch,
    /// Nothing is larger than given.
    NotLarger,
    /// Nothing is smaller than given.
    NotSmaller,
}

/// Attributes of [`Op::Resize`](crate::Op::Resize).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResizeAttributes {
    /// Interpolation.
    pub mode: ResizeMode,
    /// Coordinates.
    pub coordinates: CoordinateMode,
    /// Rounding of the nearest mode.
    pub nearest: NearestMode,
    /// Parameter of the cubic mode.
    pub cubic_coeff_a: f32,
    /// Weights outside the picture are dropped and the others scaled up.
    pub exclude_outside: bool,
    /// Value outside the roi for [`CoordinateMode::TfCropAndResize`].
    pub extrapolation_value: f32,
    /// Widens the filter when shrinking.
    pub antialias: bool,
    /// Which axes `scales`, `sizes` and `roi` talk of; all when absent.
    pub axes: Option<Vec<i64>>,
    /// Reading of `sizes`.
    pub aspect_ratio: AspectRatio,
}

/// Outside the picture in [`Op::GridSample`](crate::Op::GridSample).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GridPadding {
    /// Zeros.
    Zeros,
    /// The nearest element.
    Border,
    /// Mirrored.
    Reflection,
}

/// Attributes of [`Op::RoiAlign`](crate::Op::RoiAlign).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoiAlignAttributes {
    /// Maximum instead of mean of the samples.
    pub max: bool,
    /// Rows of the result.
    pub output_height: usize,
    /// Columns of the result.
    pub output_width: usize,
    /// Samples per bin and axis; adaptive when 0.
    pub sampling_ratio: usize,
    /// From roi coordinates to input coordinates.
    pub spatial_scale: f32,
    /// Pixel centres are at halves.
    pub half_pixel: bool,
}

/// Distribution of [`Op::Random`](crate::Op::Random).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Distribution {
    /// Gaussian.
    Normal {
        /// Mean.
        mean: f32,
        /// Standard deviation.
        scale: f32,
    },
    /// Even between two bounds.
    Uniform {
        /// Lower bound.
        low: f32,
        /// Upper bound.
        high: f32,
    },
}

/// Attributes of [`Op::Random`](crate::Op::Random).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RandomAttributes {
    /// Which numbers.
    pub distribution: Distribution,
    /// Result type; that of the operand when absent.
    pub dtype: Option<DType>,
    /// Result shape; that of the operand when absent.
    pub dims: Option<Vec<usize>>,
    /// Seed, if one is given.
    pub seed: Option<f32>,
}

/// Which window function.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum WindowKind {
    Hann,
    Hamming,
    Blackman,
}

/// Reading direction of a recurrent layer.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Direction {
    Forward,
    Reverse,
    Bidirectional,
}

/// Attributes of recurrent layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecurrentAttributes {
    /// Size of the hidden state.
    pub hidden_size: usize,
    /// Reading direction.
    pub direction: Direction,
    /// Activations per gate and direction, as in ONNX (`f`, `g`, `h` of each direction).
    pub activations: Vec<UnaryOp>,
    /// Limits the gates' inputs to ±clip.
    pub clip: Option<f32>,
    /// Operands are `[batch, time, …]` instead of `[time, batch, …]`.
    pub batch_first: bool,
    /// LSTM: the forget gate is one minus the input gate.
    pub input_forget: bool,
    /// GRU: the reset gate is applied after the linear transformation.
    pub linear_before_reset: bool,
}

/// Attributes of [`Op::Scan`](crate::Op::Scan).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScanAttributes {
    /// Number of carried states.
    pub states: usize,
    /// Number of scanned inputs.
    pub scan_inputs: usize,
    /// Per scanned input.
    pub input_axes: Vec<i64>,
    /// Per scanned input: from the end.
    pub input_reverse: Vec<bool>,
    /// Per scanned output.
    pub output_axes: Vec<i64>,
    /// Per scanned output: prepends.
    pub output_reverse: Vec<bool>,
}

/// Attributes of the quantisation operators.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantizeAttributes {
    /// Axis of per-axis or blocked scales.
    pub axis: i64,
    /// Elements per scale along the axis; 0 for one scale per slice.
    pub block_size: usize,
    /// Result type; from the zero point (quantise) or the scale (dequantise) when absent.
    pub output_dtype: Option<DType>,
    /// Out-of-range values saturate for 8-bit floats.
    pub saturate: bool,
}

/// How a loss over elements becomes one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LossReduction {
    /// It does not.
    None,
    /// Weighted mean.
    Mean,
    /// Sum.
    Sum,
}

/// Attributes of the classification losses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossAttributes {
    /// Over elements.
    pub reduction: LossReduction,
    /// A label that does not count.
    pub ignore_index: Option<i64>,
}

/// Attributes of [`Op::StringNormalizer`](crate::Op::StringNormalizer).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StringNormalizerAttributes {
    /// `Some(true)` to upper, `Some(false)` to lower case.
    pub upper: Option<bool>,
    /// Stop words match case-sensitively.
    pub case_sensitive: bool,
    /// Words to drop.
    pub stopwords: Vec<String>,
    /// As given; Unicode rules are used for every locale.
    pub locale: String,
}

/// Attributes of [`Op::TfIdfVectorizer`](crate::Op::TfIdfVectorizer).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TfIdfAttributes {
    /// `TF`, `IDF` or `TFIDF`.
    pub mode: TfIdfMode,
    /// Shortest n-gram.
    pub min_gram_length: usize,
    /// Longest n-gram.
    pub max_gram_length: usize,
    /// Most items skipped between two of an n-gram.
    pub max_skip_count: usize,
    /// Where the n-grams of each length start in the pool.
    pub ngram_counts: Vec<usize>,
    /// Column of each n-gram.
    pub ngram_indexes: Vec<usize>,
    /// The n-grams, all lengths one after another: i64 or text.
    pub pool: Option<Tensor>,
    /// Weight of each n-gram; ones when empty.
    pub weights: Vec<f32>,
}

/// What [`Op::TfIdfVectorizer`](crate::Op::TfIdfVectorizer) yields.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TfIdfMode {
    Tf,
    Idf,
    TfIdf,
}

/// Order of the channels of a decoded picture.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PixelFormat {
    Rgb,
    Bgr,
    Gray,
}
