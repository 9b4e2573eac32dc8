//! How each operator is spelled.

use lightering_graph::{
    AspectRatio, BinaryOp, ConvAttributes, CoordinateMode, DType, Direction, Distribution, ElementwiseStep,
    GridPadding, Layout, LossReduction, MatMulAttributes, NearestMode, Node, Op, PadMode, Padding,
    PixelFormat, PoolAttributes, PoolKind, QkOutput, QuantizeAttributes, RecurrentAttributes, ReduceOp,
    ResizeAttributes, ResizeMode, ScatterReduction, Tensor, TfIdfMode, UnaryOp, VariadicOp, WindowKind,
};

use super::attributes::NodeWriter;
use super::{Exporter, Scope, ml, type_proto, unsupported};
use crate::Result;

const MICROSOFT: &str = "com.microsoft";

impl Exporter<'_> {
    pub(super) fn node(&mut self, scope: &mut Scope, node: &Node) -> Result<()> {
        let (inputs, outputs) = (scope.inputs(node), scope.outputs(node));
        let write =
            |op_type: &str| NodeWriter::new(op_type, inputs.clone(), outputs.clone()).named(&node.name);
        let done = match &node.op {
            Op::Unary(op) => {
                let (x, y) = (scope.input(node, 0), scope.output(node));
                let dtype = node.input(0).and_then(|id| scope.dtype(id)).unwrap_or(DType::F32);
                return self.unary(scope, *op, dtype, x, y);
            }
            Op::Binary(op) => binary(*op, inputs.clone(), outputs.clone()),
            Op::Variadic(op) => write(match op {
                VariadicOp::Sum => "Sum",
                VariadicOp::Mean => "Mean",
                VariadicOp::Max => "Max",
                VariadicOp::Min => "Min",
            }),
            Op::Where => write("Where"),
            Op::Clip => write("Clip"),
            Op::Cast { to, saturate } => write("Cast").dtype("to", *to).flag("saturate", *saturate),
            Op::Elementwise(steps) => return self.elementwise(scope, node, steps),
            Op::Dropout { seed } => write("Dropout").int_if("seed", *seed),
            Op::MatMul(a) => return self.mat_mul(scope, node, a),
            Op::Gemm(a) => write("Gemm")
                .float("alpha", a.alpha)
                .float("beta", a.beta)
                .flag("transA", a.trans_a)
                .flag("transB", a.trans_b),
            Op::Einsum { equation } => write("Einsum").string("equation", equation),
            Op::Det => write("Det"),
            Op::MatMulInteger => write("MatMulInteger"),
            Op::QLinearMatMul(a) => {
                if *a != MatMulAttributes::default() || node.inputs.len() > 8 {
                    return Err(unsupported(node, "a quantised product with a bias or activation"));
                }
                write("QLinearMatMul")
            }
            Op::Conv(a) => return self.conv(scope, node, a),
            Op::ConvTranspose(a) => {
                if node.inputs.len() > 3 || a.conv.activation.is_some() {
                    return Err(unsupported(node, "a fused transposed convolution"));
                }
                conv_attributes(write("ConvTranspose"), node, &a.conv)?
                    .sizes_if_any("output_padding", &a.output_padding)
                    .sizes_if_any("output_shape", &a.output_shape)
            }
            Op::DeformConv { conv, offset_groups } => {
                conv_attributes(write("DeformConv"), node, conv)?.size("offset_group", *offset_groups)
            }
            Op::ConvInteger(a) => conv_attributes(write("ConvInteger"), node, a)?,
            Op::QLinearConv(a) => conv_attributes(write("QLinearConv"), node, a)?,
            Op::Col2Im { dilations, pads, strides } => write("Col2Im")
                .sizes_if_any("dilations", dilations)
                .sizes_if_any("pads", pads)
                .sizes_if_any("strides", strides),
            Op::Pool(a) => pool_attributes(write(pool_name(a.kind)), node, a)?,
            Op::GlobalPool { kind, layout } => {
                if *layout != Layout::ChannelsFirst {
                    return Err(unsupported(node, "channels in the last axis"));
                }
                match kind {
                    PoolKind::Max => write("GlobalMaxPool"),
                    PoolKind::Average => write("GlobalAveragePool"),
                    PoolKind::Lp(p) => write("GlobalLpPool").int("p", *p),
                }
            }
            Op::MaxUnpool { kernel, strides, pads } => write("MaxUnpool")
                .sizes("kernel_shape", kernel)
                .sizes_if_any("strides", strides)
                .sizes_if_any("pads", pads),
            Op::MaxRoiPool { pooled_shape, spatial_scale } => {
                write("MaxRoiPool").sizes("pooled_shape", pooled_shape).float("spatial_scale", *spatial_scale)
            }
            Op::RoiAlign(a) => write("RoiAlign")
                .string("mode", if a.max { "max" } else { "avg" })
                .size("output_height", a.output_height)
                .size("output_width", a.output_width)
                .size("sampling_ratio", a.sampling_ratio)
                .float("spatial_scale", a.spatial_scale)
                .string(
                    "coordinate_transformation_mode",
                    if a.half_pixel { "half_pixel" } else { "output_half_pixel" },
                ),
            Op::BatchNorm { epsilon, momentum, training } => write("BatchNormalization")
                .float("epsilon", *epsilon)
                .float("momentum", *momentum)
                .flag("training_mode", *training),
            Op::InstanceNorm { epsilon } => write("InstanceNormalization").float("epsilon", *epsilon),
            Op::GroupNorm { groups, epsilon } => {
                write("GroupNormalization").size("num_groups", *groups).float("epsilon", *epsilon)
            }
            Op::LayerNorm { axis, epsilon } => {
                write("LayerNormalization").int("axis", *axis).float("epsilon", *epsilon)
            }
            Op::RmsNorm { axis, epsilon } => {
                write("RMSNormalization").int("axis", *axis).float("epsilon", *epsilon)
            }
            Op::LpNorm { axis, p } => write("LpNormalization").int("axis", *axis).int("p", *p),
            Op::MeanVarianceNorm { axes } => write("MeanVarianceNormalization").ints("axes", axes),
            Op::Lrn { alpha, beta, bias, size } => write("LRN")
                .float("alpha", *alpha)
                .float("beta", *beta)
                .float("bias", *bias)
                .size("size", *size),
            Op::Softmax { axis, log } => {
                write(if *log { "LogSoftmax" } else { "Softmax" }).int("axis", *axis)
            }
            Op::Hardmax { axis } => write("Hardmax").int("axis", *axis),
            Op::Reduce { op, keep_dims, noop_with_empty_axes } => write(reduce_name(*op))
                .flag("keepdims", *keep_dims)
                .flag("noop_with_empty_axes", *noop_with_empty_axes),
            Op::ArgReduce { largest, axis, keep_dims, select_last_index } => {
                write(if *largest { "ArgMax" } else { "ArgMin" })
                    .int("axis", *axis)
                    .flag("keepdims", *keep_dims)
                    .flag("select_last_index", *select_last_index)
            }
            Op::CumSum { exclusive, reverse } => {
                write("CumSum").flag("exclusive", *exclusive).flag("reverse", *reverse)
            }
            Op::Attention(a) => {
                if node.inputs.len() > 6 {
                    self.need("", 24);
                }
                let mut n = write("Attention")
                    .flag("is_causal", a.causal)
                    .float_if("scale", a.scale)
                    .float("softcap", a.softcap)
                    .dtype_if("softmax_precision", a.softmax_precision)
                    .int(
                        "qk_matmul_output_mode",
                        match a.qk_output {
                            QkOutput::Raw => 0,
                            QkOutput::Masked => 1,
                            QkOutput::Capped => 2,
                            QkOutput::Softmax => 3,
                        },
                    );
                if a.q_num_heads > 0 {
                    n = n.size("q_num_heads", a.q_num_heads).size("kv_num_heads", a.kv_num_heads);
                }
                n
            }
            Op::RotaryEmbedding { interleaved, num_heads, rotary_dim } => write("RotaryEmbedding")
                .flag("interleaved", *interleaved)
                .size("num_heads", *num_heads)
                .size("rotary_embedding_dim", *rotary_dim),
            Op::Reshape { allow_zero } => write("Reshape").flag("allowzero", *allow_zero),
            Op::Flatten { axis } => write("Flatten").int("axis", *axis),
            Op::Squeeze => write("Squeeze"),
            Op::Unsqueeze => write("Unsqueeze"),
            Op::Transpose { perm } => match perm {
                Some(perm) => write("Transpose").sizes("perm", perm),
                None => write("Transpose"),
            },
            Op::Expand => write("Expand"),
            Op::Tile => write("Tile"),
            Op::Concat { axis } => write("Concat").int("axis", *axis),
            Op::Split { axis } => {
                let n = write("Split").int("axis", *axis);
                if node.inputs.len() < 2 { n.size("num_outputs", node.outputs.len()) } else { n }
            }
            Op::Slice => write("Slice"),
            Op::Pad { mode } => write("Pad").string(
                "mode",
                match mode {
                    PadMode::Constant => "constant",
                    PadMode::Edge => "edge",
                    PadMode::Reflect => "reflect",
                    PadMode::Wrap => "wrap",
                },
            ),
            Op::Gather { axis } => write("Gather").int("axis", *axis),
            Op::GatherElements { axis } => write("GatherElements").int("axis", *axis),
            Op::GatherNd { batch_dims } => write("GatherND").size("batch_dims", *batch_dims),
            Op::ScatterElements { axis, reduction } => {
                write("ScatterElements").int("axis", *axis).string("reduction", scatter_name(*reduction))
            }
            Op::ScatterNd { reduction } => write("ScatterND").string("reduction", scatter_name(*reduction)),
            Op::TensorScatter { axis, circular } => {
                self.need("", 24);
                write("TensorScatter")
                    .int("axis", *axis)
                    .string("mode", if *circular { "circular" } else { "linear" })
            }
            Op::DepthToSpace { block, crd } => write("DepthToSpace")
                .size("blocksize", *block)
                .string("mode", if *crd { "CRD" } else { "DCR" }),
            Op::SpaceToDepth { block } => write("SpaceToDepth").size("blocksize", *block),
            Op::Resize(a) => resize_attributes(write("Resize"), a),
            Op::GridSample { mode, padding, align_corners } => write("GridSample")
                .string("mode", resize_mode(*mode))
                .string(
                    "padding_mode",
                    match padding {
                        GridPadding::Zeros => "zeros",
                        GridPadding::Border => "border",
                        GridPadding::Reflection => "reflection",
                    },
                )
                .flag("align_corners", *align_corners),
            Op::AffineGrid { align_corners } => write("AffineGrid").flag("align_corners", *align_corners),
            Op::CenterCropPad { axes } => match axes {
                Some(axes) => write("CenterCropPad").ints("axes", axes),
                None => write("CenterCropPad"),
            },
            Op::ReverseSequence { batch_axis, time_axis } => {
                write("ReverseSequence").size("batch_axis", *batch_axis).size("time_axis", *time_axis)
            }
            Op::Trilu { upper } => write("Trilu").flag("upper", *upper),
            Op::EyeLike { dtype, k } => write("EyeLike").dtype_if("dtype", *dtype).int("k", *k),
            Op::OneHot { axis } => write("OneHot").int("axis", *axis),
            Op::Range => write("Range"),
            Op::ConstantOfShape { value } => write("ConstantOfShape").tensor("value", value),
            Op::Shape { start, end } => write("Shape").int("start", *start).int_if("end", *end),
            Op::Size => write("Size"),
            Op::NonZero => write("NonZero"),
            Op::Compress { axis } => write("Compress").int_if("axis", *axis),
            Op::Unique { axis, sorted } => write("Unique").int_if("axis", *axis).flag("sorted", *sorted),
            Op::TopK { axis, largest, sorted } => {
                write("TopK").int("axis", *axis).flag("largest", *largest).flag("sorted", *sorted)
            }
            Op::NonMaxSuppression { center_point_box } => {
                write("NonMaxSuppression").flag("center_point_box", *center_point_box)
            }
            Op::Random(a) => {
                let like = if a.dims.is_some() { "" } else { "Like" };
                let n = match a.distribution {
                    Distribution::Normal { mean, scale } => {
                        write(&format!("RandomNormal{like}")).float("mean", mean).float("scale", scale)
                    }
                    Distribution::Uniform { low, high } => {
                        write(&format!("RandomUniform{like}")).float("low", low).float("high", high)
                    }
                };
                let n = n.dtype_if("dtype", a.dtype).float_if("seed", a.seed);
                match &a.dims {
                    Some(dims) => n.sizes("shape", dims),
                    None => n,
                }
            }
            Op::Bernoulli { dtype, seed } => {
                write("Bernoulli").dtype_if("dtype", *dtype).float_if("seed", *seed)
            }
            Op::Multinomial { dtype, sample_size, seed } => write("Multinomial")
                .dtype("dtype", *dtype)
                .size("sample_size", *sample_size)
                .float_if("seed", *seed),
            Op::Dft { inverse, onesided } => {
                write("DFT").flag("inverse", *inverse).flag("onesided", *onesided)
            }
            Op::Stft { onesided } => write("STFT").flag("onesided", *onesided),
            Op::MelWeightMatrix { dtype } => write("MelWeightMatrix").dtype("output_datatype", *dtype),
            Op::Window { kind, periodic, dtype } => write(match kind {
                WindowKind::Hann => "HannWindow",
                WindowKind::Hamming => "HammingWindow",
                WindowKind::Blackman => "BlackmanWindow",
            })
            .flag("periodic", *periodic)
            .dtype("output_datatype", *dtype),
            Op::Rnn(a) => recurrent_attributes(write("RNN"), node, a)?,
            Op::Gru(a) => recurrent_attributes(write("GRU"), node, a)?
                .flag("linear_before_reset", a.linear_before_reset),
            Op::Lstm(a) => recurrent_attributes(write("LSTM"), node, a)?.flag("input_forget", a.input_forget),
            Op::If { then_body, else_body } => {
                let then_proto = self.body(scope, node, then_body, 1)?;
                let else_proto = self.body(scope, node, else_body, 1)?;
                with_operands(node, "If", &inputs[..1], &outputs)
                    .graph("then_branch", then_proto)
                    .graph("else_branch", else_proto)
            }
            Op::Loop { carried, body } => {
                let proto = self.body(scope, node, body, carried + 2)?;
                with_operands(node, "Loop", &inputs[..carried + 2], &outputs).graph("body", proto)
            }
            Op::Scan { attributes: a, body } => {
                let own = a.states + a.scan_inputs;
                let proto = self.body(scope, node, body, own)?;
                with_operands(node, "Scan", &inputs[..own], &outputs)
                    .graph("body", proto)
                    .size("num_scan_inputs", a.scan_inputs)
                    .ints("scan_input_axes", &a.input_axes)
                    .flags("scan_input_directions", &a.input_reverse)
                    .ints("scan_output_axes", &a.output_axes)
                    .flags("scan_output_directions", &a.output_reverse)
            }
            Op::SequenceMap { operands, body } => {
                let proto = self.body(scope, node, body, *operands)?;
                with_operands(node, "SequenceMap", &inputs[..*operands], &outputs).graph("body", proto)
            }
            Op::SequenceConstruct => write("SequenceConstruct"),
            Op::SequenceEmpty { dtype } => write("SequenceEmpty").dtype("dtype", *dtype),
            Op::SequenceAt => write("SequenceAt"),
            Op::SequenceErase => write("SequenceErase"),
            Op::SequenceInsert => write("SequenceInsert"),
            Op::SequenceLength => write("SequenceLength"),
            Op::ConcatFromSequence { axis, new_axis } => {
                write("ConcatFromSequence").int("axis", *axis).flag("new_axis", *new_axis)
            }
            Op::SplitToSequence { axis, keep_dims } => {
                write("SplitToSequence").int("axis", *axis).flag("keepdims", *keep_dims)
            }
            Op::OptionalConstruct { ty } => write("Optional").type_if("type", ty.as_ref().map(type_proto)),
            Op::OptionalGetElement => write("OptionalGetElement"),
            Op::OptionalHasElement => write("OptionalHasElement"),
            Op::QuantizeLinear(a) => {
                quantize_attributes(write("QuantizeLinear"), a).flag("saturate", a.saturate)
            }
            Op::DequantizeLinear(a) => quantize_attributes(write("DequantizeLinear"), a),
            Op::DynamicQuantizeLinear => write("DynamicQuantizeLinear"),
            Op::QLinearUnary(op) => {
                let x = self.dequantized(scope, node, 0);
                let y = self.fresh(&format!("{}/real", node.name));
                self.unary(scope, *op, DType::F32, x, y.clone())?;
                quantized(scope, node, y, 3);
                return Ok(());
            }
            Op::QLinearBinary { op, activation } => {
                let operands = vec![self.dequantized(scope, node, 0), self.dequantized(scope, node, 3)];
                let mut y = self.fresh(&format!("{}/real", node.name));
                binary(*op, operands, vec![y.clone()]).push(scope);
                if let Some(activation) = activation {
                    let activated = self.fresh(&format!("{}/activated", node.name));
                    self.unary(scope, *activation, DType::F32, y, activated.clone())?;
                    y = activated;
                }
                quantized(scope, node, y, 6);
                return Ok(());
            }
            Op::QLinearPool(a) => {
                let x = self.dequantized(scope, node, 0);
                let y = self.fresh(&format!("{}/real", node.name));
                let n = NodeWriter::new(pool_name(a.kind), vec![x], vec![y.clone()]);
                pool_attributes(n, node, a)?.push(scope);
                quantized(scope, node, y, 3);
                return Ok(());
            }
            Op::NllLoss(a) => write("NegativeLogLikelihoodLoss")
                .string("reduction", loss_name(a.reduction))
                .int_if("ignore_index", a.ignore_index),
            Op::SoftmaxCrossEntropyLoss(a) => write("SoftmaxCrossEntropyLoss")
                .string("reduction", loss_name(a.reduction))
                .int_if("ignore_index", a.ignore_index),
            Op::StringNormalizer(a) => {
                let n = write("StringNormalizer")
                    .string(
                        "case_change_action",
                        match a.upper {
                            None => "NONE",
                            Some(true) => "UPPER",
                            Some(false) => "LOWER",
                        },
                    )
                    .flag("is_case_sensitive", a.case_sensitive);
                let n = if a.stopwords.is_empty() { n } else { n.strings("stopwords", &a.stopwords) };
                if a.locale.is_empty() { n } else { n.string("locale", &a.locale) }
            }
            Op::StringConcat => write("StringConcat"),
            Op::StringSplit { delimiter, maxsplit } => {
                let n = write("StringSplit").int_if("maxsplit", *maxsplit);
                match delimiter {
                    Some(delimiter) => n.string("delimiter", delimiter),
                    None => n,
                }
            }
            Op::RegexFullMatch { pattern } => write("RegexFullMatch").string("pattern", pattern),
            Op::TfIdfVectorizer(a) => {
                let n = write("TfIdfVectorizer")
                    .string(
                        "mode",
                        match a.mode {
                            TfIdfMode::Tf => "TF",
                            TfIdfMode::Idf => "IDF",
                            TfIdfMode::TfIdf => "TFIDF",
                        },
                    )
                    .size("min_gram_length", a.min_gram_length)
                    .size("max_gram_length", a.max_gram_length)
                    .size("max_skip_count", a.max_skip_count)
                    .sizes("ngram_counts", &a.ngram_counts)
                    .sizes("ngram_indexes", &a.ngram_indexes)
                    .floats_if_any("weights", &a.weights);
                match &a.pool {
                    Some(pool) if pool.dtype() == DType::String => {
                        n.strings("pool_strings", pool.as_strings())
                    }
                    Some(pool) => n.ints("pool_int64s", &pool.to_i64s().unwrap_or_default()),
                    None => n,
                }
            }
            Op::ImageDecode { format } => write("ImageDecoder").string(
                "pixel_format",
                match format {
                    PixelFormat::Rgb => "RGB",
                    PixelFormat::Bgr => "BGR",
                    PixelFormat::Gray => "Grayscale",
                },
            ),
            Op::Ml(op) => ml::write(self, write(ml::name(op)), node, op)?,
            _ => return Err(unsupported(node, "this operator")),
        };
        done.push(scope);
        Ok(())
    }

    fn unary(&mut self, scope: &mut Scope, op: UnaryOp, dtype: DType, x: String, y: String) -> Result<()> {
        let write = |name: &str| NodeWriter::new(name, vec![x.clone()], vec![y.clone()]);
        let n = match op {
            UnaryOp::Abs => write("Abs"),
            UnaryOp::Acos => write("Acos"),
            UnaryOp::Acosh => write("Acosh"),
            UnaryOp::Asin => write("Asin"),
            UnaryOp::Asinh => write("Asinh"),
            UnaryOp::Atan => write("Atan"),
            UnaryOp::Atanh => write("Atanh"),
            UnaryOp::BitwiseNot => write("BitwiseNot"),
            UnaryOp::Ceil => write("Ceil"),
            UnaryOp::Celu { alpha } => write("Celu").float("alpha", alpha),
            UnaryOp::ClipTo { min, max } => {
                // An open end is an operand that is not there.
                let min = if min == f32::NEG_INFINITY {
                    String::new()
                } else {
                    self.new_constant(scope, &format!("{y}/min"), &scalar(dtype, min))
                };
                let max = if max == f32::INFINITY {
                    String::new()
                } else {
                    self.new_constant(scope, &format!("{y}/max"), &scalar(dtype, max))
                };
                NodeWriter::new("Clip", vec![x, min, max], vec![y])
            }
            UnaryOp::Cos => write("Cos"),
            UnaryOp::Cosh => write("Cosh"),
            UnaryOp::Elu { alpha } => write("Elu").float("alpha", alpha),
            UnaryOp::Erf => write("Erf"),
            UnaryOp::Exp => write("Exp"),
            UnaryOp::Floor => write("Floor"),
            UnaryOp::Gelu { tanh } => write("Gelu").string("approximate", if tanh { "tanh" } else { "none" }),
            UnaryOp::HardSigmoid { alpha, beta } => {
                write("HardSigmoid").float("alpha", alpha).float("beta", beta)
            }
            UnaryOp::HardSwish => write("HardSwish"),
            UnaryOp::Identity => write("Identity"),
            UnaryOp::IsInf { negative, positive } => {
                write("IsInf").flag("detect_negative", negative).flag("detect_positive", positive)
            }
            UnaryOp::IsNan => write("IsNaN"),
            UnaryOp::LeakyRelu { alpha } => write("LeakyRelu").float("alpha", alpha),
            UnaryOp::Log => write("Log"),
            UnaryOp::Mish => write("Mish"),
            UnaryOp::Neg => write("Neg"),
            UnaryOp::Not => write("Not"),
            UnaryOp::Reciprocal => write("Reciprocal"),
            UnaryOp::Relu => write("Relu"),
            UnaryOp::Round => write("Round"),
            UnaryOp::Rsqrt => {
                let root = self.fresh(&format!("{y}/root"));
                NodeWriter::new("Sqrt", vec![x], vec![root.clone()]).push(scope);
                NodeWriter::new("Reciprocal", vec![root], vec![y])
            }
            UnaryOp::Selu { alpha, gamma } => write("Selu").float("alpha", alpha).float("gamma", gamma),
            UnaryOp::Shrink { bias, lambd } => write("Shrink").float("bias", bias).float("lambd", lambd),
            UnaryOp::Sigmoid => write("Sigmoid"),
            UnaryOp::Sign => write("Sign"),
            UnaryOp::Sin => write("Sin"),
            UnaryOp::Sinh => write("Sinh"),
            UnaryOp::Softplus => write("Softplus"),
            UnaryOp::Softsign => write("Softsign"),
            UnaryOp::Sqrt => write("Sqrt"),
            UnaryOp::Swish { alpha } => {
                self.need("", 24);
                write("Swish").float("alpha", alpha)
            }
            UnaryOp::Tan => write("Tan"),
            UnaryOp::Tanh => write("Tanh"),
            UnaryOp::ThresholdedRelu { alpha } => write("ThresholdedRelu").float("alpha", alpha),
        };
        n.push(scope);
        Ok(())
    }

    /// Several element-wise steps, each as a node of its own.
    fn elementwise(&mut self, scope: &mut Scope, node: &Node, steps: &[ElementwiseStep]) -> Result<()> {
        let mut running = scope.input(node, 0);
        let dtype = node.input(0).and_then(|id| scope.dtype(id)).unwrap_or(DType::F32);
        for (i, step) in steps.iter().enumerate() {
            let last = i + 1 == steps.len();
            let y = if last { scope.output(node) } else { self.fresh(&format!("{}/step{i}", node.name)) };
            match *step {
                ElementwiseStep::Unary(op) => self.unary(scope, op, dtype, running, y.clone())?,
                ElementwiseStep::Binary { op, operand, swapped } => {
                    let mut operands = vec![running, scope.input(node, operand)];
                    if swapped {
                        operands.swap(0, 1);
                    }
                    binary(op, operands, vec![y.clone()]).push(scope);
                }
            }
            running = y;
        }
        if steps.is_empty() {
            NodeWriter::new("Identity", vec![running], vec![scope.output(node)]).push(scope);
        }
        Ok(())
    }

    /// Writes a result through the steps that fusion put into a product: scale, bias, residual and activation.
    fn epilogue(
        &mut self,
        scope: &mut Scope,
        node: &Node,
        steps: Vec<(BinaryOp, String)>,
        activation: Option<UnaryOp>,
    ) -> (String, Vec<(BinaryOp, String, String)>, Option<(UnaryOp, String, String)>) {
        let out = scope.output(node);
        let mut remaining = steps.len() + usize::from(activation.is_some());
        let mut next = |this: &mut Self| {
            let name = if remaining == 0 {
                out.clone()
            } else {
                this.fresh(&format!("{}/part{remaining}", node.name))
            };
            remaining = remaining.wrapping_sub(1);
            name
        };
        let first = next(self);
        let mut running = first.clone();
        let mut binaries = Vec::new();
        for (op, operand) in steps {
            let y = next(self);
            binaries.push((op, operand, y.clone()));
            running = y;
        }
        let last = activation.map(|op| (op, running, next(self)));
        (first, binaries, last)
    }

    fn mat_mul(&mut self, scope: &mut Scope, node: &Node, a: &MatMulAttributes) -> Result<()> {
        let mut steps = Vec::new();
        // The scale of the columns comes before the bias.
        for (index, op) in [(4, BinaryOp::Mul), (2, BinaryOp::Add), (3, BinaryOp::Add)] {
            if node.input(index).is_some() {
                steps.push((op, scope.input(node, index)));
            }
        }
        let dtype = node.input(0).and_then(|id| scope.dtype(id)).unwrap_or(DType::F32);
        let (first, binaries, last) = self.epilogue(scope, node, steps, a.activation);
        let operands = vec![scope.input(node, 0), scope.input(node, 1)];
        let plain = !a.trans_a && !a.trans_b && a.alpha == 1.0;
        let n = NodeWriter::new(if plain { "MatMul" } else { "FusedMatMul" }, operands, vec![first.clone()])
            .named(&node.name);
        if plain {
            n.push(scope);
        } else {
            self.need(MICROSOFT, 1);
            n.domain(MICROSOFT)
                .flag("transA", a.trans_a)
                .flag("transB", a.trans_b)
                .float("alpha", a.alpha)
                .push(scope);
        }
        self.write_epilogue(scope, first, binaries, last, dtype)
    }

    fn write_epilogue(
        &mut self,
        scope: &mut Scope,
        mut running: String,
        binaries: Vec<(BinaryOp, String, String)>,
        last: Option<(UnaryOp, String, String)>,
        dtype: DType,
    ) -> Result<()> {
        for (op, operand, y) in binaries {
            binary(op, vec![running, operand], vec![y.clone()]).push(scope);
            running = y;
        }
        match last {
            Some((op, x, y)) => self.unary(scope, op, dtype, x, y),
            None => Ok(()),
        }
    }

    fn conv(&mut self, scope: &mut Scope, node: &Node, a: &ConvAttributes) -> Result<()> {
        let dtype = node.input(0).and_then(|id| scope.dtype(id)).unwrap_or(DType::F32);
        let mut weights = scope.input(node, 1);
        if node.input(4).is_some() {
            let rank = node
                .input(1)
                .and_then(|id| scope.rank(id))
                .ok_or_else(|| unsupported(node, "scaled weights of unknown rank"))?;
            let axes: Vec<i64> = (1..rank as i64).collect();
            let axes = self.ints(scope, &format!("{}/axes", node.name), &axes);
            let scale = self.fresh(&format!("{}/scale", node.name));
            NodeWriter::new("Unsqueeze", vec![scope.input(node, 4), axes], vec![scale.clone()]).push(scope);
            let scaled = self.fresh(&format!("{}/weights", node.name));
            binary(BinaryOp::Mul, vec![weights, scale], vec![scaled.clone()]).push(scope);
            weights = scaled;
        }
        let mut steps = Vec::new();
        if node.input(3).is_some() {
            steps.push((BinaryOp::Add, scope.input(node, 3)));
        }
        let (first, binaries, last) = self.epilogue(scope, node, steps, a.activation);
        let operands = vec![scope.input(node, 0), weights, scope.input(node, 2)];
        let n = NodeWriter::new("Conv", operands, vec![first.clone()]).named(&node.name);
        let plain = ConvAttributes { activation: None, ..a.clone() };
        conv_attributes(n, node, &plain)?.push(scope);
        self.write_epilogue(scope, first, binaries, last, dtype)
    }

    /// The operand at `index`, with its scale and zero point behind it, as a real number.
    fn dequantized(&mut self, scope: &mut Scope, node: &Node, index: usize) -> String {
        let real = self.fresh(&format!("{}/real{index}", node.name));
        let operands = (index..index + 3).map(|i| scope.input(node, i)).collect();
        NodeWriter::new("DequantizeLinear", operands, vec![real.clone()]).push(scope);
        real
    }
}

fn with_operands(node: &Node, op_type: &str, inputs: &[String], outputs: &[String]) -> NodeWriter {
    NodeWriter::new(op_type, inputs.to_vec(), outputs.to_vec()).named(&node.name)
}

fn quantized(scope: &mut Scope, node: &Node, real: String, scale: usize) {
    let operands = vec![real, scope.input(node, scale), scope.input(node, scale + 1)];
    NodeWriter::new("QuantizeLinear", operands, vec![scope.output(node)]).push(scope);
}

fn scalar(dtype: DType, value: f32) -> Tensor {
    match dtype {
        DType::F64 => Tensor::scalar(f64::from(value)),
        DType::F16 => Tensor::scalar(half::f16::from_f32(value)),
        DType::BF16 => Tensor::scalar(half::bf16::from_f32(value)),
        DType::I8 => Tensor::scalar(value as i8),
        DType::U8 => Tensor::scalar(value as u8),
        DType::I16 => Tensor::scalar(value as i16),
        DType::I32 => Tensor::scalar(value as i32),
        DType::I64 => Tensor::scalar(value as i64),
        _ => Tensor::scalar(value),
    }
}

fn binary(op: BinaryOp, inputs: Vec<String>, outputs: Vec<String>) -> NodeWriter {
    let write = |name: &str| NodeWriter::new(name, inputs, outputs);
    match op {
        BinaryOp::Add => write("Add"),
        BinaryOp::Sub => write("Sub"),
        BinaryOp::Mul => write("Mul"),
        BinaryOp::Div => write("Div"),
        BinaryOp::Mod => write("Mod"),
        BinaryOp::FMod => write("Mod").int("fmod", 1),
        BinaryOp::Pow => write("Pow"),
        BinaryOp::PRelu => write("PRelu"),
        BinaryOp::And => write("And"),
        BinaryOp::Or => write("Or"),
        BinaryOp::Xor => write("Xor"),
        BinaryOp::BitAnd => write("BitwiseAnd"),
        BinaryOp::BitOr => write("BitwiseOr"),
        BinaryOp::BitXor => write("BitwiseXor"),
        BinaryOp::ShiftLeft => write("BitShift").string("direction", "LEFT"),
        BinaryOp::ShiftRight => write("BitShift").string("direction", "RIGHT"),
        BinaryOp::Equal => write("Equal"),
        BinaryOp::Greater => write("Greater"),
        BinaryOp::GreaterOrEqual => write("GreaterOrEqual"),
        BinaryOp::Less => write("Less"),
        BinaryOp::LessOrEqual => write("LessOrEqual"),
        BinaryOp::Max => write("Max"),
        BinaryOp::Min => write("Min"),
    }
}

fn reduce_name(op: ReduceOp) -> &'static str {
    match op {
        ReduceOp::L1 => "ReduceL1",
        ReduceOp::L2 => "ReduceL2",
        ReduceOp::LogSum => "ReduceLogSum",
        ReduceOp::LogSumExp => "ReduceLogSumExp",
        ReduceOp::Max => "ReduceMax",
        ReduceOp::Mean => "ReduceMean",
        ReduceOp::Min => "ReduceMin",
        ReduceOp::Prod => "ReduceProd",
        ReduceOp::Sum => "ReduceSum",
        ReduceOp::SumSquare => "ReduceSumSquare",
    }
}

fn pool_name(kind: PoolKind) -> &'static str {
    match kind {
        PoolKind::Max => "MaxPool",
        PoolKind::Average => "AveragePool",
        PoolKind::Lp(_) => "LpPool",
    }
}

fn scatter_name(reduction: ScatterReduction) -> &'static str {
    match reduction {
        ScatterReduction::None => "none",
        ScatterReduction::Add => "add",
        ScatterReduction::Mul => "mul",
        ScatterReduction::Max => "max",
        ScatterReduction::Min => "min",
    }
}

fn loss_name(reduction: LossReduction) -> &'static str {
    match reduction {
        LossReduction::None => "none",
        LossReduction::Mean => "mean",
        LossReduction::Sum => "sum",
    }
}

fn resize_mode(mode: ResizeMode) -> &'static str {
    match mode {
        ResizeMode::Nearest => "nearest",
        ResizeMode::Linear => "linear",
        ResizeMode::Cubic => "cubic",
    }
}

fn padding(n: NodeWriter, padding: &Padding) -> NodeWriter {
    match padding {
        Padding::Explicit(pads) => n.ints("pads", pads),
        Padding::SameUpper => n.string("auto_pad", "SAME_UPPER"),
        Padding::SameLower => n.string("auto_pad", "SAME_LOWER"),
        Padding::Valid => n,
    }
}

fn conv_attributes(n: NodeWriter, node: &Node, a: &ConvAttributes) -> Result<NodeWriter> {
    if a.layout != Layout::ChannelsFirst {
        return Err(unsupported(node, "channels in the last axis"));
    }
    if a.activation.is_some() {
        return Err(unsupported(node, "a quantised convolution with an activation"));
    }
    let n = n
        .sizes_if_any("kernel_shape", &a.kernel)
        .sizes_if_any("strides", &a.strides)
        .sizes_if_any("dilations", &a.dilations)
        .size("group", a.groups);
    Ok(padding(n, &a.padding))
}

fn pool_attributes(n: NodeWriter, node: &Node, a: &PoolAttributes) -> Result<NodeWriter> {
    if a.layout != Layout::ChannelsFirst {
        return Err(unsupported(node, "channels in the last axis"));
    }
    let n = n
        .sizes("kernel_shape", &a.kernel)
        .sizes_if_any("strides", &a.strides)
        .sizes_if_any("dilations", &a.dilations)
        .flag("ceil_mode", a.ceil_mode);
    let n = match a.kind {
        PoolKind::Max => n.flag("storage_order", a.storage_order_column),
        PoolKind::Average => n.flag("count_include_pad", a.count_include_pad),
        PoolKind::Lp(p) => n.int("p", p),
    };
    Ok(padding(n, &a.padding))
}

fn resize_attributes(n: NodeWriter, a: &ResizeAttributes) -> NodeWriter {
    let n = n
        .string("mode", resize_mode(a.mode))
        .string(
            "coordinate_transformation_mode",
            match a.coordinates {
                CoordinateMode::HalfPixel => "half_pixel",
                CoordinateMode::HalfPixelSymmetric => "half_pixel_symmetric",
                CoordinateMode::PytorchHalfPixel => "pytorch_half_pixel",
                CoordinateMode::AlignCorners => "align_corners",
                CoordinateMode::Asymmetric => "asymmetric",
                CoordinateMode::TfCropAndResize => "tf_crop_and_resize",
                CoordinateMode::TfHalfPixelForNearest => "tf_half_pixel_for_nn",
            },
        )
        .string(
            "nearest_mode",
            match a.nearest {
                NearestMode::RoundPreferFloor => "round_prefer_floor",
                NearestMode::RoundPreferCeil => "round_prefer_ceil",
                NearestMode::Floor => "floor",
                NearestMode::Ceil => "ceil",
            },
        )
        .float("cubic_coeff_a", a.cubic_coeff_a)
        .flag("exclude_outside", a.exclude_outside)
        .float("extrapolation_value", a.extrapolation_value)
        .flag("antialias", a.antialias)
        .string(
            "keep_aspect_ratio_policy",
            match a.aspect_ratio {
                AspectRatio::Stretch => "stretch",
                AspectRatio::NotLarger => "not_larger",
                AspectRatio::NotSmaller => "not_smaller",
            },
        );
    match &a.axes {
        Some(axes) => n.ints("axes", axes),
        None => n,
    }
}

fn quantize_attributes(n: NodeWriter, a: &QuantizeAttributes) -> NodeWriter {
    n.int("axis", a.axis).size("block_size", a.block_size).dtype_if("output_dtype", a.output_dtype)
}

fn recurrent_attributes(n: NodeWriter, node: &Node, a: &RecurrentAttributes) -> Result<NodeWriter> {
    let (mut names, mut alphas, mut betas) = (Vec::new(), Vec::new(), Vec::new());
    for activation in &a.activations {
        let name = match *activation {
            UnaryOp::Relu => "Relu",
            UnaryOp::Tanh => "Tanh",
            UnaryOp::Sigmoid => "Sigmoid",
            UnaryOp::Softsign => "Softsign",
            UnaryOp::Softplus => "Softplus",
            UnaryOp::LeakyRelu { alpha } => {
                alphas.push(alpha);
                "LeakyRelu"
            }
            UnaryOp::ThresholdedRelu { alpha } => {
                alphas.push(alpha);
                "ThresholdedRelu"
            }
            UnaryOp::Elu { alpha } => {
                alphas.push(alpha);
                "Elu"
            }
            UnaryOp::HardSigmoid { alpha, beta } => {
                alphas.push(alpha);
                betas.push(beta);
                "HardSigmoid"
            }
            _ => return Err(unsupported(node, "this activation of a recurrent layer")),
        };
        names.push(name.to_owned());
    }
    Ok(n.size("hidden_size", a.hidden_size)
        .string(
            "direction",
            match a.direction {
                Direction::Forward => "forward",
                Direction::Reverse => "reverse",
                Direction::Bidirectional => "bidirectional",
            },
        )
        .strings("activations", &names)
        .floats_if_any("activation_alpha", &alphas)
        .floats_if_any("activation_beta", &betas)
        .float_if("clip", a.clip)
        .flag("layout", a.batch_first))
}
