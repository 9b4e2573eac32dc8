//! From a graph operator to the kernel that computes it, on memory that the caller owns.
//!
//! Two doors: [`compute`] for operators whose result types are known before they run (the caller has allocated
//! the results, from the plan's arena or from the counted heap), and [`compute_dynamic`] for the rest (sequences,
//! optionals, text, control flow, `NonZero` and the like), which returns fresh values. [`is_dynamic`] says which.

mod attention;
mod context;
mod control_flow;
mod detection;
mod dictionary;
mod elementwise;
mod heap;
mod joining;
pub(crate) mod language;
mod linear;
mod loss;
mod ml;
mod movement;
mod operands;
mod quantization;
mod quantized_elementwise;
mod random;
mod recurrent;
mod resampling;
mod selection;
mod sequence;
mod signal;
mod statistics;
mod text;
mod training;
mod trees;
mod windows;

pub use context::{ImageDecoder, OpContext};
pub use lightering_kernels::ops::{OpError, TensorView, TensorViewMut};

use lightering_graph::{DType, Op, TensorType, UnaryOp, ValueType};
use lightering_units::Bytes;

use crate::RuntimeValue;

/// Computes `op` into results that the caller has allocated with the types that shape inference gave.
///
/// `workspace` has at least [`workspace_bytes`] bytes and starts at a multiple of 8; its content is arbitrary
/// before and after. A result that nobody wants is `None`.
///
/// # Errors
/// [`OpError::Invalid`] when the operands contradict the operator, [`OpError::Unsupported`] when there is no
/// kernel for these types or attributes.
pub fn compute(
    op: &Op,
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
    workspace: &mut [u8],
    context: &OpContext,
) -> Result<(), OpError> {
    if outputs.is_empty() {
        return Ok(());
    }
    match op {
        Op::Unary(_)
        | Op::Binary(_)
        | Op::Variadic(_)
        | Op::Where
        | Op::Clip
        | Op::Cast { .. }
        | Op::Elementwise(_) => elementwise::compute(op, inputs, only(outputs)?, context),
        Op::MatMul(_) | Op::Gemm(_) | Op::Einsum { .. } | Op::Det => {
            linear::compute(op, inputs, only(outputs)?, workspace, context)
        }
        Op::Conv(_)
        | Op::ConvTranspose(_)
        | Op::DeformConv { .. }
        | Op::Col2Im { .. }
        | Op::Pool(_)
        | Op::GlobalPool { .. }
        | Op::MaxUnpool { .. }
        | Op::MaxRoiPool { .. }
        | Op::RoiAlign(_) => windows::compute(op, inputs, outputs, context),
        Op::BatchNorm { .. }
        | Op::InstanceNorm { .. }
        | Op::GroupNorm { .. }
        | Op::LayerNorm { .. }
        | Op::RmsNorm { .. }
        | Op::LpNorm { .. }
        | Op::MeanVarianceNorm { .. }
        | Op::Lrn { .. }
        | Op::Softmax { .. }
        | Op::Hardmax { .. }
        | Op::Reduce { .. }
        | Op::ArgReduce { .. }
        | Op::CumSum { .. } => statistics::compute(op, inputs, outputs, context),
        Op::Reshape { .. }
        | Op::Flatten { .. }
        | Op::Squeeze
        | Op::Unsqueeze
        | Op::Transpose { .. }
        | Op::Expand
        | Op::Tile
        | Op::Concat { .. }
        | Op::Split { .. }
        | Op::Slice
        | Op::Pad { .. }
        | Op::Gather { .. }
        | Op::GatherElements { .. }
        | Op::GatherNd { .. }
        | Op::ScatterElements { .. }
        | Op::ScatterNd { .. }
        | Op::TensorScatter { .. }
        | Op::DepthToSpace { .. }
        | Op::SpaceToDepth { .. }
        | Op::CenterCropPad { .. }
        | Op::ReverseSequence { .. }
        | Op::Trilu { .. }
        | Op::EyeLike { .. }
        | Op::OneHot { .. }
        | Op::Range
        | Op::ConstantOfShape { .. }
        | Op::Shape { .. }
        | Op::Size
        | Op::TopK { .. } => movement::compute(op, inputs, outputs, workspace, context),
        Op::Resize(_) | Op::GridSample { .. } | Op::AffineGrid { .. } => {
            resampling::compute(op, inputs, only(outputs)?, context)
        }
        // Recurrent layers, attention, quantisation, losses, random numbers, signals, classical machine learning.
        Op::Attention(_) | Op::RotaryEmbedding { .. } => {
            attention::compute(op, inputs, outputs, workspace, context.threads)
        }
        Op::Rnn(_) | Op::Lstm(_) | Op::Gru(_) => {
            recurrent::compute(op, inputs, outputs, workspace, context.threads)
        }
        Op::QuantizeLinear(_)
        | Op::DequantizeLinear(_)
        | Op::DynamicQuantizeLinear
        | Op::MatMulInteger
        | Op::QLinearMatMul(_)
        | Op::ConvInteger(_)
        | Op::QLinearConv(_) => quantization::compute(op, inputs, outputs, workspace),
        Op::QLinearUnary(_) | Op::QLinearBinary { .. } | Op::QLinearPool(_) => {
            quantized_elementwise::compute(op, inputs, only(outputs)?, context)
        }
        Op::NllLoss(_) | Op::SoftmaxCrossEntropyLoss(_) => loss::compute(op, inputs, outputs),
        Op::Random(_) | Op::Bernoulli { .. } | Op::Multinomial { .. } | Op::Dropout { .. } => {
            random::compute(op, inputs, outputs, context)
        }
        Op::Dft { .. } | Op::Stft { .. } | Op::MelWeightMatrix { .. } | Op::Window { .. } => {
            signal::compute(op, inputs, outputs, workspace)
        }
        Op::TfIdfVectorizer(_) => text::compute(op, inputs, outputs),
        Op::Ml(ml) => ml::compute(ml, inputs, outputs, context.threads),
        Op::Lm(lm) => language::compute(lm, inputs, outputs, workspace, context),
        Op::Train(op) => training::compute(op, inputs, outputs, workspace, context),
        _ => Err(no_kernel(op)),
    }
}

/// Scratch bytes that [`compute`] needs for these types; 0 for most operators.
pub fn workspace_bytes(
    op: &Op,
    inputs: &[Option<&TensorType>],
    outputs: &[Option<&TensorType>],
    threads: usize,
) -> Bytes {
    match op {
        Op::Det => Bytes(linear::workspace_bytes(op, inputs) as u64),
        Op::TopK { .. } => Bytes(movement::workspace_bytes(op, inputs) as u64),
        Op::Attention(_) => attention::workspace_bytes(op, inputs, threads),
        Op::Rnn(_) | Op::Lstm(_) | Op::Gru(_) => recurrent::workspace_bytes(op, inputs, outputs),
        Op::QLinearMatMul(_) | Op::QLinearConv(_) => quantization::workspace_bytes(op, inputs, outputs),
        Op::Dft { .. } | Op::Stft { .. } => signal::workspace_bytes(op, outputs),
        Op::Lm(lm) => language::workspace_bytes(lm, inputs, threads),
        Op::Train(op) => training::workspace_bytes(op, inputs),
        _ => Bytes::ZERO,
    }
}

/// Computes an operator whose results live outside the arena; see [`is_dynamic`].
///
/// Returns one entry per entry of `outputs_wanted`, `None` where nobody wants the result.
///
/// # Errors
/// As [`compute`], and [`OpError::Budget`] when the counted heap refuses.
pub fn compute_dynamic(
    op: &Op,
    inputs: &[Option<&RuntimeValue>],
    outputs_wanted: &[bool],
    context: &OpContext,
) -> Result<Vec<Option<RuntimeValue>>, OpError> {
    let has_text = inputs.iter().flatten().any(|v| v.tensor().is_some_and(|t| t.dtype() == DType::String));
    match op {
        Op::Unary(UnaryOp::Identity) => Ok(vec![inputs.first().copied().flatten().cloned()]),
        Op::Cast { to, saturate } => dictionary::cast(*to, *saturate, inputs, context),
        _ if has_text && dictionary::handles(op) => dictionary::compute(op, inputs, outputs_wanted, context),
        Op::NonZero | Op::Compress { .. } | Op::Unique { .. } => {
            selection::compute(op, inputs, outputs_wanted, context)
        }
        Op::If { .. } | Op::Loop { .. } | Op::Scan { .. } | Op::SequenceMap { .. } => {
            control_flow::compute_dynamic(op, inputs, outputs_wanted, context)
        }
        Op::SequenceConstruct
        | Op::SequenceEmpty { .. }
        | Op::SequenceAt
        | Op::SequenceErase
        | Op::SequenceInsert
        | Op::SequenceLength
        | Op::ConcatFromSequence { .. }
        | Op::SplitToSequence { .. }
        | Op::OptionalConstruct { .. }
        | Op::OptionalGetElement
        | Op::OptionalHasElement => sequence::compute_dynamic(op, inputs, context),
        Op::NonMaxSuppression { .. } => detection::compute_dynamic(op, inputs, context),
        Op::StringNormalizer(_)
        | Op::StringConcat
        | Op::StringSplit { .. }
        | Op::RegexFullMatch { .. }
        | Op::TfIdfVectorizer(_)
        | Op::ImageDecode { .. } => text::compute_dynamic(op, inputs, outputs_wanted, context),
        Op::Ml(ml) => ml::compute_dynamic(ml, inputs, outputs_wanted, context),
        _ => Err(no_kernel(op)),
    }
}

/// Whether `op` goes through [`compute_dynamic`]: a result or operand is no plain tensor of numbers, or the size
/// of a result depends on the content of an operand that is not a shape.
///
/// Operators whose result size depends on an operand that *is* a shape (`Reshape`, `Range`, `Tile` …) are not
/// dynamic here; whoever runs them with an operand that is not a constant infers the result at run time.
pub fn is_dynamic(op: &Op, inputs: &[Option<&ValueType>]) -> bool {
    let always = matches!(
        op,
        Op::If { .. }
            | Op::Loop { .. }
            | Op::Scan { .. }
            | Op::SequenceMap { .. }
            | Op::SequenceConstruct
            | Op::SequenceEmpty { .. }
            | Op::SequenceAt
            | Op::SequenceErase
            | Op::SequenceInsert
            | Op::SequenceLength
            | Op::ConcatFromSequence { .. }
            | Op::SplitToSequence { .. }
            | Op::OptionalConstruct { .. }
            | Op::OptionalGetElement
            | Op::OptionalHasElement
            | Op::NonZero
            | Op::Compress { .. }
            | Op::Unique { .. }
            | Op::NonMaxSuppression { .. }
            | Op::StringNormalizer(_)
            | Op::StringConcat
            | Op::StringSplit { .. }
            | Op::RegexFullMatch { .. }
            | Op::ImageDecode { .. }
            | Op::Cast { to: DType::String, .. }
    );
    always
        || matches!(op, Op::Ml(ml) if ml::is_dynamic(ml, inputs))
        || inputs.iter().flatten().any(|ty| !matches!(ty, ValueType::Tensor(t) if t.dtype != DType::String))
}

/// The first result, which most operators cannot do without.
fn only<'o, 'v>(outputs: &'o mut [Option<TensorViewMut<'v>>]) -> Result<&'o mut TensorViewMut<'v>, OpError> {
    outputs.first_mut().and_then(Option::as_mut).ok_or_else(|| {
        OpError::Invalid("the first result is not wanted, so there is nothing to compute".to_owned())
    })
}

/// The error for an operator that has no kernel here.
fn no_kernel(op: &Op) -> OpError {
    OpError::Unsupported(format!("operator {}", op.name()))
}
