//! Types and shapes of results from those of operands.
//!
//! ```
//! use lightering_graph::infer::{Fact, infer_node};
//! use lightering_graph::{DType, MatMulAttributes, Node, Op, TensorType, ValueType};
//! let node = Node {
//!     name: "scores".into(),
//!     op: Op::MatMul(MatMulAttributes::default()),
//!     inputs: vec![None; 2],
//!     outputs: vec![None],
//! };
//! let a = ValueType::from(TensorType::fixed(DType::F32, &[8, 1, 4, 16]));
//! let b = ValueType::from(TensorType::fixed(DType::F32, &[2, 16, 5]));
//! let types = infer_node(&node, &[Some(Fact::of(&a)), Some(Fact::of(&b))]).unwrap();
//! assert_eq!(types[0].to_string(), "f32[8,2,4,5]");
//! let error = infer_node(&node, &[Some(Fact::of(&a)), Some(Fact::of(&a))]).unwrap_err();
//! assert!(error.to_string().contains("inner sizes 16 and 4 differ"));
//! ```
//!
//! The rules are exact when the shapes of all operands and the elements of those that decide shapes (axes, sizes) are
//! known. Otherwise they say what can be said: symbols are carried along, single dimensions are left open, and the
//! rank, too, when it depends on what is not known. They also check: element types, ranks, sizes and attributes that
//! contradict each other are errors that name what was found and what was expected. No input makes them panic.

mod bound;
pub mod broadcast;
mod classic;
mod control;
mod einsum;
mod elementwise;
mod language;
mod linear;
mod movement;
mod norm;
mod operands;
mod quantize;
mod recurrent;
mod signal;
mod sweep;
#[cfg(test)]
mod tests;
mod train;
pub mod window;
mod window_ops;

pub use bound::upper_bound;
pub use broadcast::{broadcast, broadcast_dim, broadcast_dims, broadcasts_to};
pub use einsum::{Einsum, EinsumAxis};
pub use operands::{Fact, SymbolicInt};
pub(crate) use sweep::Sweep;
pub use window::{ResolvedWindow, resolve_transposed, resolve_window};

use crate::{GraphError, Node, Op, ValueType};
use operands::{Operands, Rule};

/// The types of a node's results, one per entry of `node.outputs`, from what is known of its operands, one per entry
/// of `node.inputs` (`None` for an absent one). Control flow is followed into its bodies.
///
/// # Errors
/// [`GraphError::Node`] when operands or attributes contradict the operator or each other.
pub fn infer_node(node: &Node, inputs: &[Option<Fact<'_>>]) -> Result<Vec<ValueType>, GraphError> {
    let types = if node.op.bodies().is_empty() {
        rule(&Operands { node, facts: inputs }).map_err(|p| GraphError::at(node, p))?
    } else {
        control::control(&mut node.clone(), inputs, 0)?
    };
    finish(node, types)
}

/// Cuts the types to the results that the node has and refuses those that no memory could hold.
fn finish(node: &Node, mut types: Vec<ValueType>) -> Result<Vec<ValueType>, GraphError> {
    if node.outputs.len() > types.len() {
        let problem = format!("has {} results, expected at most {}", node.outputs.len(), types.len());
        return Err(GraphError::at(node, problem));
    }
    types.truncate(node.outputs.len());
    for ty in &types {
        if let Some(t) = ty.tensor()
            && t.dims().is_some()
            && t.size_bytes().is_none_or(|n| isize::try_from(n).is_err())
        {
            return Err(GraphError::at(node, format!("the result {t} is too large to be held")));
        }
    }
    Ok(types)
}

/// All results that the operator can have.
fn rule(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    match &o.node.op {
        Op::Unary(op) => elementwise::unary(o, op),
        Op::Binary(op) => elementwise::binary(o, *op),
        Op::Variadic(_) => elementwise::variadic(o),
        Op::Where => elementwise::select(o),
        Op::Clip => elementwise::clip(o),
        Op::Cast { to, .. } => elementwise::cast(o, *to),
        Op::Elementwise(steps) => elementwise::chain(o, steps),
        Op::Dropout { .. } => elementwise::dropout(o),

        Op::MatMul(a) => linear::matmul(o, a),
        Op::Gemm(a) => linear::gemm(o, a),
        Op::Einsum { equation } => linear::einsum(o, equation),
        Op::Det => linear::det(o),
        Op::MatMulInteger => linear::matmul_integer(o),
        Op::QLinearMatMul(a) => linear::qlinear_matmul(o, a),
        Op::Attention(a) => linear::attention(o, a),
        Op::RotaryEmbedding { num_heads, rotary_dim, .. } => {
            linear::rotary_embedding(o, *num_heads, *rotary_dim)
        }

        Op::Conv(a) => window_ops::conv(o, a),
        Op::ConvTranspose(a) => window_ops::conv_transpose(o, a),
        Op::DeformConv { conv, offset_groups } => window_ops::deform_conv(o, conv, *offset_groups),
        Op::ConvInteger(a) => window_ops::conv_integer(o, a),
        Op::QLinearConv(a) => window_ops::qlinear_conv(o, a),
        Op::Col2Im { dilations, pads, strides } => window_ops::col2im(o, dilations, pads, strides),
        Op::Pool(a) => window_ops::pool(o, a),
        Op::QLinearPool(a) => window_ops::qlinear_pool(o, a),
        Op::GlobalPool { layout, .. } => window_ops::global_pool(o, *layout),
        Op::MaxUnpool { kernel, strides, pads } => window_ops::max_unpool(o, kernel, strides, pads),
        Op::MaxRoiPool { pooled_shape, .. } => window_ops::max_roi_pool(o, *pooled_shape),
        Op::RoiAlign(a) => window_ops::roi_align(o, a),

        Op::BatchNorm { .. } => norm::batch_norm(o),
        Op::InstanceNorm { .. } => norm::instance_norm(o),
        Op::GroupNorm { groups, .. } => norm::group_norm(o, *groups),
        Op::LayerNorm { axis, .. } => norm::layer_norm(o, *axis),
        Op::RmsNorm { axis, .. } => norm::rms_norm(o, *axis),
        Op::LpNorm { axis, .. } | Op::Softmax { axis, .. } | Op::Hardmax { axis } => {
            norm::along_axis(o, *axis)
        }
        Op::MeanVarianceNorm { axes } => norm::mean_variance_norm(o, axes),
        Op::Lrn { size, .. } => norm::lrn(o, *size),
        Op::Reduce { op, keep_dims, noop_with_empty_axes } => {
            norm::reduce(o, *op, *keep_dims, *noop_with_empty_axes)
        }
        Op::ArgReduce { axis, keep_dims, .. } => norm::arg_reduce(o, *axis, *keep_dims),
        Op::CumSum { .. } => norm::cum_sum(o),

        Op::Reshape { allow_zero } => movement::reshape(o, *allow_zero),
        Op::Flatten { axis } => movement::flatten(o, *axis),
        Op::Squeeze => movement::squeeze(o),
        Op::Unsqueeze => movement::unsqueeze(o),
        Op::Transpose { perm } => movement::transpose(o, perm.as_deref()),
        Op::Expand => movement::expand(o),
        Op::Tile => movement::tile(o),
        Op::Concat { axis } => movement::concat(o, *axis),
        Op::Split { axis } => movement::split(o, *axis),
        Op::Slice => movement::slice(o),
        Op::Pad { mode } => movement::pad(o, *mode),
        Op::Gather { axis } => movement::gather(o, *axis),
        Op::GatherElements { axis } => movement::gather_elements(o, *axis),
        Op::GatherNd { batch_dims } => movement::gather_nd(o, *batch_dims),
        Op::ScatterElements { axis, .. } => movement::scatter_elements(o, *axis),
        Op::ScatterNd { .. } => movement::scatter_nd(o),
        Op::TensorScatter { axis, .. } => movement::tensor_scatter(o, *axis),
        Op::DepthToSpace { block, .. } => movement::depth_to_space(o, *block),
        Op::SpaceToDepth { block } => movement::space_to_depth(o, *block),
        Op::Resize(a) => movement::resize(o, a),
        Op::GridSample { .. } => movement::grid_sample(o),
        Op::AffineGrid { .. } => movement::affine_grid(o),
        Op::CenterCropPad { axes } => movement::center_crop_pad(o, axes.as_deref()),
        Op::ReverseSequence { batch_axis, time_axis } => {
            movement::reverse_sequence(o, *batch_axis, *time_axis)
        }
        Op::Trilu { .. } => movement::trilu(o),
        Op::EyeLike { dtype, .. } => movement::eye_like(o, *dtype),
        Op::OneHot { axis } => movement::one_hot(o, *axis),
        Op::Range => movement::range(o),
        Op::ConstantOfShape { value } => movement::constant_of_shape(o, value),
        Op::Shape { start, end } => movement::shape(o, *start, *end),
        Op::Size => movement::size(o),
        Op::NonZero => movement::non_zero(o),
        Op::Compress { axis } => movement::compress(o, *axis),
        Op::Unique { axis, .. } => movement::unique(o, *axis),
        Op::TopK { axis, .. } => movement::top_k(o, *axis),
        Op::NonMaxSuppression { .. } => movement::non_max_suppression(o),

        Op::Random(a) => signal::random(o, a),
        Op::Bernoulli { dtype, .. } => signal::bernoulli(o, *dtype),
        Op::Multinomial { dtype, sample_size, .. } => signal::multinomial(o, *dtype, *sample_size),
        Op::Dft { inverse, onesided } => signal::dft(o, *inverse, *onesided),
        Op::Stft { onesided } => signal::stft(o, *onesided),
        Op::MelWeightMatrix { dtype } => signal::mel_weight_matrix(o, *dtype),
        Op::Window { dtype, .. } => signal::window(o, *dtype),

        Op::Rnn(a) => recurrent::recurrent(o, a, 1),
        Op::Gru(a) => recurrent::recurrent(o, a, 3),
        Op::Lstm(a) => recurrent::recurrent(o, a, 4),

        Op::If { .. } | Op::Loop { .. } | Op::Scan { .. } | Op::SequenceMap { .. } => {
            Err("a body is inferred with its node".to_owned())
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
        | Op::OptionalHasElement => control::sequence(o),

        Op::QuantizeLinear(a) => quantize::quantize_linear(o, a),
        Op::DequantizeLinear(a) => quantize::dequantize_linear(o, a),
        Op::DynamicQuantizeLinear => quantize::dynamic_quantize(o),
        Op::QLinearUnary(_) => quantize::qlinear_unary(o),
        Op::QLinearBinary { .. } => quantize::qlinear_binary(o),

        Op::NllLoss(a) => signal::loss(o, a, false),
        Op::SoftmaxCrossEntropyLoss(a) => signal::loss(o, a, true),

        Op::StringNormalizer(a) => signal::string_normalizer(o, a),
        Op::StringConcat => movement::string_concat(o),
        Op::StringSplit { .. } => signal::string_split(o),
        Op::RegexFullMatch { .. } => signal::regex_full_match(o),
        Op::TfIdfVectorizer(a) => signal::tf_idf(o, a),
        Op::ImageDecode { format } => signal::image_decode(o, *format),

        Op::Ml(op) => classic::classic(o, op),
        Op::Lm(op) => language::language(o, op),
        Op::Train(op) => train::train(o, op),
    }
}
