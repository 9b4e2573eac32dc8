//! The standard domain.

use std::sync::Arc;

use lightering_graph::{
    AspectRatio, AttentionAttributes, BinaryOp, Constant, ConvAttributes, ConvTransposeAttributes,
    CoordinateMode, DType, Distribution, GemmAttributes, GridPadding, Layout, LossAttributes, LossReduction,
    MatMulAttributes, NearestMode, Op, PadMode, Padding, PixelFormat, PoolAttributes, PoolKind, QkOutput,
    QuantizeAttributes, RandomAttributes, ReduceOp, ResizeAttributes, ResizeMode, RoiAlignAttributes,
    ScatterReduction, StringNormalizerAttributes, Tensor, TfIdfAttributes, TfIdfMode, UnaryOp, ValueId,
    VariadicOp, WindowKind,
};

use super::builder::GraphBuilder;
use super::node::NodeReader;
use super::{Importer, control, recurrent, value_type};
use crate::Result;

/// Converts one node of the standard domain.
pub(super) fn convert(im: &mut Importer, b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let v = n.opset;
    if v < 6 {
        // A leftover of the first framework that wrote these files; it never meant anything for the result.
        n.ignore("consumed_inputs");
    }
    if let Some(op) = unary(n)? {
        return done(b.finish(n, Op::Unary(op), n.inputs.clone()));
    }
    if let Some(op) = binary(n)? {
        let inputs = broadcast_inputs(b, n)?;
        return done(b.finish(n, Op::Binary(op), inputs));
    }
    if let Some(op) = reduction(n.op_type()) {
        return reduce(b, n, op);
    }
    let simple = |b: &mut GraphBuilder, op: Op| done(b.finish(n, op, n.inputs.clone()));
    match n.op_type() {
        "Sum" | "Mean" | "Max" | "Min" => variadic(b, n),
        "Where" => simple(b, Op::Where),
        "Clip" => clip(b, n),
        "Cast" => {
            let to = if v < 6 { cast_target_by_name(n)? } else { n.dtype_if_any("to")? };
            let to = to.ok_or_else(|| n.no_attribute("to"))?;
            let saturate = v < 19 || n.flag("saturate", true)?;
            round_mode(n)?;
            simple(b, Op::Cast { to, saturate })
        }
        "CastLike" => {
            let like = n.required(1, "target_type")?;
            let to = b
                .dtype(like)
                .ok_or_else(|| n.unsupported("a target whose element type is known only at run time"))?;
            let saturate = v < 19 || n.flag("saturate", true)?;
            round_mode(n)?;
            done(b.finish(n, Op::Cast { to, saturate }, vec![n.input(0)]))
        }
        "Dropout" => dropout(b, n),
        "Constant" => constant(im, b, n),

        "MatMul" => simple(b, Op::MatMul(MatMulAttributes::default())),
        "Gemm" => {
            if v < 7 {
                // The bias may always be broadcast today.
                n.ignore("broadcast");
            }
            simple(
                b,
                Op::Gemm(GemmAttributes {
                    alpha: n.float("alpha", 1.0)?,
                    beta: n.float("beta", 1.0)?,
                    trans_a: n.flag("transA", false)?,
                    trans_b: n.flag("transB", false)?,
                }),
            )
        }
        "Einsum" => {
            let equation = n.string_if_any("equation")?.ok_or_else(|| n.no_attribute("equation"))?;
            simple(b, Op::Einsum { equation: equation.to_owned() })
        }
        "Det" => simple(b, Op::Det),
        "MatMulInteger" => simple(b, Op::MatMulInteger),
        "QLinearMatMul" => {
            n.max_inputs(8)?;
            simple(b, Op::QLinearMatMul(MatMulAttributes::default()))
        }
        "Conv" => {
            n.max_inputs(3)?;
            simple(b, Op::Conv(conv(n)?))
        }
        "ConvInteger" => simple(b, Op::ConvInteger(conv(n)?)),
        "QLinearConv" => simple(b, Op::QLinearConv(conv(n)?)),
        "ConvTranspose" => {
            n.max_inputs(3)?;
            let attributes = ConvTransposeAttributes {
                conv: conv(n)?,
                output_padding: n.sizes("output_padding")?,
                output_shape: n.sizes("output_shape")?,
            };
            simple(b, Op::ConvTranspose(attributes))
        }
        "DeformConv" => {
            let offset_groups = n.size("offset_group", 1)?;
            if offset_groups == 0 {
                return Err(n.invalid("attribute \"offset_group\" is 0", "1 or more"));
            }
            simple(b, Op::DeformConv { conv: conv(n)?, offset_groups })
        }
        "Col2Im" => simple(
            b,
            Op::Col2Im {
                dilations: n.positive("dilations")?,
                pads: n.sizes("pads")?,
                strides: n.positive("strides")?,
            },
        ),
        "MaxPool" => simple(b, Op::Pool(pool(n, PoolKind::Max)?)),
        "AveragePool" => simple(b, Op::Pool(pool(n, PoolKind::Average)?)),
        "LpPool" => {
            let p = norm_order(n)?;
            simple(b, Op::Pool(pool(n, PoolKind::Lp(p))?))
        }
        "GlobalMaxPool" => global_pool(b, n, PoolKind::Max),
        "GlobalAveragePool" => global_pool(b, n, PoolKind::Average),
        "GlobalLpPool" => {
            let p = norm_order(n)?;
            global_pool(b, n, PoolKind::Lp(p))
        }
        "MaxUnpool" => {
            let kernel = n.positive("kernel_shape")?;
            if kernel.is_empty() {
                return Err(n.no_attribute("kernel_shape"));
            }
            let (strides, pads) = (n.positive("strides")?, n.sizes("pads")?);
            simple(b, Op::MaxUnpool { kernel, strides, pads })
        }
        "MaxRoiPool" => {
            let shape = n.positive("pooled_shape")?;
            let pooled_shape = <[usize; 2]>::try_from(shape)
                .map_err(|s| n.invalid(format!("attribute \"pooled_shape\" is {s:?}"), "two numbers"))?;
            simple(b, Op::MaxRoiPool { pooled_shape, spatial_scale: n.float("spatial_scale", 1.0)? })
        }
        "RoiAlign" => {
            let half_pixel = v >= 16
                && n.choice(
                    "coordinate_transformation_mode",
                    "half_pixel",
                    &[("half_pixel", true), ("output_half_pixel", false)],
                )?;
            let attributes = RoiAlignAttributes {
                max: n.choice("mode", "avg", &[("avg", false), ("max", true)])?,
                output_height: n.size("output_height", 1)?,
                output_width: n.size("output_width", 1)?,
                sampling_ratio: n.size("sampling_ratio", 0)?,
                spatial_scale: n.float("spatial_scale", 1.0)?,
                half_pixel,
            };
            simple(b, Op::RoiAlign(attributes))
        }

        "BatchNormalization" => batch_norm(b, n),
        "InstanceNormalization" => simple(b, Op::InstanceNorm { epsilon: n.float("epsilon", 1e-5)? }),
        "GroupNormalization" => group_norm(b, n),
        "LayerNormalization" => {
            stash_type(n)?;
            let (axis, epsilon) = (n.int("axis", -1)?, n.float("epsilon", 1e-5)?);
            simple(b, Op::LayerNorm { axis, epsilon })
        }
        // The second name is that of onnxruntime's optimiser, which puts it into the standard domain.
        "RMSNormalization" | "SimplifiedLayerNormalization" => {
            stash_type(n)?;
            let (axis, epsilon) = (n.int("axis", -1)?, n.float("epsilon", 1e-5)?);
            simple(b, Op::RmsNorm { axis, epsilon })
        }
        "LpNormalization" => simple(b, Op::LpNorm { axis: n.int("axis", -1)?, p: norm_order(n)? }),
        "MeanVarianceNormalization" => {
            let axes = n.ints("axes")?.unwrap_or(&[0, 2, 3]).to_vec();
            simple(b, Op::MeanVarianceNorm { axes })
        }
        "LRN" => {
            let size = n.size("size", 0)?;
            if size == 0 {
                return Err(n.no_attribute("size"));
            }
            let (alpha, beta, bias) =
                (n.float("alpha", 1e-4)?, n.float("beta", 0.75)?, n.float("bias", 1.0)?);
            simple(b, Op::Lrn { alpha, beta, bias, size })
        }
        "Softmax" => softmax(b, n, |axis| Op::Softmax { axis, log: false }),
        "LogSoftmax" => softmax(b, n, |axis| Op::Softmax { axis, log: true }),
        "Hardmax" => softmax(b, n, |axis| Op::Hardmax { axis }),
        "ArgMax" | "ArgMin" => {
            let op = Op::ArgReduce {
                largest: n.op_type() == "ArgMax",
                axis: n.int("axis", 0)?,
                keep_dims: n.flag("keepdims", true)?,
                select_last_index: v >= 12 && n.flag("select_last_index", false)?,
            };
            simple(b, op)
        }
        "CumSum" => simple(
            b,
            Op::CumSum { exclusive: n.flag("exclusive", false)?, reverse: n.flag("reverse", false)? },
        ),

        "Attention" => {
            let attributes = attention(n)?;
            simple(b, Op::Attention(attributes))
        }
        "RotaryEmbedding" => simple(
            b,
            Op::RotaryEmbedding {
                interleaved: n.flag("interleaved", false)?,
                num_heads: n.size("num_heads", 0)?,
                rotary_dim: n.size("rotary_embedding_dim", 0)?,
            },
        ),

        "Reshape" => {
            let inputs = if v < 5 { attribute_input(b, n, "shape", 1)? } else { n.inputs.clone() };
            let allow_zero = v >= 14 && n.flag("allowzero", false)?;
            done(b.finish(n, Op::Reshape { allow_zero }, inputs))
        }
        "Flatten" => simple(b, Op::Flatten { axis: n.int("axis", 1)? }),
        "Squeeze" => {
            let inputs = if v < 13 { attribute_input(b, n, "axes", 1)? } else { n.inputs.clone() };
            done(b.finish(n, Op::Squeeze, inputs))
        }
        "Unsqueeze" => {
            let inputs = if v < 13 { attribute_input(b, n, "axes", 1)? } else { n.inputs.clone() };
            done(b.finish(n, Op::Unsqueeze, inputs))
        }
        "Transpose" => {
            let perm = if n.has("perm") { Some(n.sizes("perm")?) } else { None };
            if let Some(perm) = &perm {
                let mut sorted = perm.clone();
                sorted.sort_unstable();
                if sorted.iter().enumerate().any(|(i, p)| i != *p) {
                    return Err(n.invalid(
                        format!("attribute \"perm\" is {perm:?}"),
                        format!("each of the axes 0 to {} once", perm.len().saturating_sub(1)),
                    ));
                }
            }
            simple(b, Op::Transpose { perm })
        }
        "Expand" => simple(b, Op::Expand),
        "Tile" if v >= 6 => simple(b, Op::Tile),
        "Concat" => {
            let axis = if v < 4 { n.int("axis", 1)? } else { n.int_required("axis")? };
            simple(b, Op::Concat { axis })
        }
        "Split" => split(b, n),
        "Slice" => {
            if v >= 10 {
                return simple(b, Op::Slice);
            }
            n.max_inputs(1)?;
            let (starts, ends) = (n.ints_required("starts")?, n.ints_required("ends")?);
            if starts.len() != ends.len() || n.ints("axes")?.is_some_and(|a| a.len() != starts.len()) {
                return Err(n.invalid(
                    "attributes \"starts\", \"ends\" and \"axes\" of different lengths",
                    "one entry of each per axis",
                ));
            }
            let starts = b.ints(n, "starts", starts);
            let ends = b.ints(n, "ends", ends);
            let axes = n.ints("axes")?.map(|axes| b.ints(n, "axes", axes));
            done(b.finish(n, Op::Slice, vec![n.input(0), Some(starts), Some(ends), axes]))
        }
        "Pad" => pad(b, n),
        "Gather" => simple(b, Op::Gather { axis: n.int("axis", 0)? }),
        "GatherElements" => simple(b, Op::GatherElements { axis: n.int("axis", 0)? }),
        "GatherND" => {
            let batch_dims = if v >= 12 { n.size("batch_dims", 0)? } else { 0 };
            simple(b, Op::GatherNd { batch_dims })
        }
        "Scatter" | "ScatterElements" => {
            simple(b, Op::ScatterElements { axis: n.int("axis", 0)?, reduction: scatter_reduction(n)? })
        }
        "ScatterND" => simple(b, Op::ScatterNd { reduction: scatter_reduction(n)? }),
        "TensorScatter" => {
            let circular = n.choice("mode", "linear", &[("linear", false), ("circular", true)])?;
            simple(b, Op::TensorScatter { axis: n.int("axis", -2)?, circular })
        }
        "DepthToSpace" => {
            let crd = v >= 11 && n.choice("mode", "DCR", &[("DCR", false), ("CRD", true)])?;
            simple(b, Op::DepthToSpace { block: block_size(n)?, crd })
        }
        "SpaceToDepth" => simple(b, Op::SpaceToDepth { block: block_size(n)? }),
        "Resize" | "Upsample" => resize(b, n),
        "GridSample" => {
            let mode = if v >= 20 {
                n.choice(
                    "mode",
                    "linear",
                    &[
                        ("linear", ResizeMode::Linear),
                        ("nearest", ResizeMode::Nearest),
                        ("cubic", ResizeMode::Cubic),
                    ],
                )?
            } else {
                n.choice(
                    "mode",
                    "bilinear",
                    &[
                        ("bilinear", ResizeMode::Linear),
                        ("nearest", ResizeMode::Nearest),
                        ("bicubic", ResizeMode::Cubic),
                    ],
                )?
            };
            let padding = n.choice(
                "padding_mode",
                "zeros",
                &[
                    ("zeros", GridPadding::Zeros),
                    ("border", GridPadding::Border),
                    ("reflection", GridPadding::Reflection),
                ],
            )?;
            simple(b, Op::GridSample { mode, padding, align_corners: n.flag("align_corners", false)? })
        }
        "AffineGrid" => simple(b, Op::AffineGrid { align_corners: n.flag("align_corners", false)? }),
        "CenterCropPad" => {
            let axes = n.ints("axes")?.map(<[i64]>::to_vec);
            simple(b, Op::CenterCropPad { axes })
        }
        "ReverseSequence" => {
            let (batch_axis, time_axis) = (n.size("batch_axis", 1)?, n.size("time_axis", 0)?);
            if batch_axis + time_axis != 1 {
                return Err(n.invalid(
                    format!("batch_axis {batch_axis} and time_axis {time_axis}"),
                    "0 for one of them and 1 for the other",
                ));
            }
            simple(b, Op::ReverseSequence { batch_axis, time_axis })
        }
        "Trilu" => simple(b, Op::Trilu { upper: n.flag("upper", true)? }),
        "EyeLike" => simple(b, Op::EyeLike { dtype: n.dtype_if_any("dtype")?, k: n.int("k", 0)? }),
        "OneHot" => simple(b, Op::OneHot { axis: n.int("axis", -1)? }),
        "Range" => simple(b, Op::Range),
        "ConstantOfShape" => {
            let value = match n.tensor_ref("value")? {
                None => Tensor::from_slice(&[1], &[0f32]),
                Some(proto) => im.file.tensor(proto).map_err(|e| e.within(n.place()))?,
            };
            if value.len() != 1 {
                return Err(
                    n.invalid(format!("attribute \"value\" of {} elements", value.len()), "one element")
                );
            }
            simple(b, Op::ConstantOfShape { value: value.into_shape(&[1]) })
        }
        "Shape" => {
            let (start, end) = if v >= 15 { (n.int("start", 0)?, n.int_if_any("end")?) } else { (0, None) };
            simple(b, Op::Shape { start, end })
        }
        "Size" => simple(b, Op::Size),
        "NonZero" => simple(b, Op::NonZero),
        "Compress" => simple(b, Op::Compress { axis: n.int_if_any("axis")? }),
        "Unique" => simple(b, Op::Unique { axis: n.int_if_any("axis")?, sorted: n.flag("sorted", true)? }),
        "TopK" => {
            let inputs = if v < 10 {
                n.max_inputs(1)?;
                let k = n.int_required("k")?;
                vec![n.input(0), Some(b.ints(n, "k", &[k]))]
            } else {
                n.inputs.clone()
            };
            let (largest, sorted) =
                if v >= 11 { (n.flag("largest", true)?, n.flag("sorted", true)?) } else { (true, true) };
            done(b.finish(n, Op::TopK { axis: n.int("axis", -1)?, largest, sorted }, inputs))
        }
        "NonMaxSuppression" => {
            simple(b, Op::NonMaxSuppression { center_point_box: n.flag("center_point_box", false)? })
        }

        "RandomNormal" | "RandomNormalLike" | "RandomUniform" | "RandomUniformLike" => random(b, n),
        "Bernoulli" => {
            simple(b, Op::Bernoulli { dtype: n.dtype_if_any("dtype")?, seed: n.float_if_any("seed")? })
        }
        "Multinomial" => {
            let dtype = n.dtype("dtype", DType::I32)?;
            if !matches!(dtype, DType::I32 | DType::I64) {
                return Err(n.invalid(format!("attribute \"dtype\" is {dtype}"), "i32 or i64"));
            }
            let sample_size = n.size("sample_size", 1)?;
            simple(b, Op::Multinomial { dtype, sample_size, seed: n.float_if_any("seed")? })
        }

        "DFT" => {
            let mut inputs = n.inputs.clone();
            if v < 20 {
                n.max_inputs(2)?;
                let axis = n.int("axis", 1)?;
                inputs.resize(2, None);
                inputs.push(Some(b.constant(n, "axis", Tensor::scalar(axis))));
            }
            let op = Op::Dft { inverse: n.flag("inverse", false)?, onesided: n.flag("onesided", false)? };
            done(b.finish(n, op, inputs))
        }
        "STFT" => simple(b, Op::Stft { onesided: n.flag("onesided", true)? }),
        "MelWeightMatrix" => {
            simple(b, Op::MelWeightMatrix { dtype: n.dtype("output_datatype", DType::F32)? })
        }
        "HannWindow" => window(b, n, WindowKind::Hann),
        "HammingWindow" => window(b, n, WindowKind::Hamming),
        "BlackmanWindow" => window(b, n, WindowKind::Blackman),

        "RNN" | "LSTM" | "GRU" => recurrent::convert(b, n),
        "If" => control::convert_if(im, b, n),
        "Loop" => control::convert_loop(im, b, n),
        "Scan" => control::convert_scan(im, b, n),
        "SequenceMap" => control::convert_sequence_map(im, b, n),

        "SequenceConstruct" => simple(b, Op::SequenceConstruct),
        "SequenceEmpty" => simple(b, Op::SequenceEmpty { dtype: n.dtype("dtype", DType::F32)? }),
        "SequenceAt" => simple(b, Op::SequenceAt),
        "SequenceErase" => simple(b, Op::SequenceErase),
        "SequenceInsert" => simple(b, Op::SequenceInsert),
        "SequenceLength" => simple(b, Op::SequenceLength),
        "ConcatFromSequence" => simple(
            b,
            Op::ConcatFromSequence { axis: n.int_required("axis")?, new_axis: n.flag("new_axis", false)? },
        ),
        "SplitToSequence" => {
            simple(b, Op::SplitToSequence { axis: n.int("axis", 0)?, keep_dims: n.flag("keepdims", true)? })
        }
        "Optional" => {
            let ty = n.type_ref("type")?.map(|t| value_type(n.place(), t)).transpose()?;
            if ty.is_none() && n.input(0).is_none() {
                return Err(n.invalid("neither an input nor a type", "one of them"));
            }
            simple(b, Op::OptionalConstruct { ty })
        }
        "OptionalGetElement" => simple(b, Op::OptionalGetElement),
        "OptionalHasElement" => simple(b, Op::OptionalHasElement),

        "QuantizeLinear" | "DequantizeLinear" => {
            let attributes = quantize(n)?;
            simple(
                b,
                if n.op_type() == "QuantizeLinear" {
                    Op::QuantizeLinear(attributes)
                } else {
                    Op::DequantizeLinear(attributes)
                },
            )
        }
        "DynamicQuantizeLinear" => simple(b, Op::DynamicQuantizeLinear),

        "NegativeLogLikelihoodLoss" => simple(b, Op::NllLoss(loss(n)?)),
        "SoftmaxCrossEntropyLoss" => simple(b, Op::SoftmaxCrossEntropyLoss(loss(n)?)),

        "StringNormalizer" => {
            let upper = n.choice(
                "case_change_action",
                "NONE",
                &[("NONE", None), ("UPPER", Some(true)), ("LOWER", Some(false))],
            )?;
            simple(
                b,
                Op::StringNormalizer(StringNormalizerAttributes {
                    upper,
                    case_sensitive: n.flag("is_case_sensitive", false)?,
                    stopwords: n.strings("stopwords")?.unwrap_or_default(),
                    locale: n.string("locale", "")?.to_owned(),
                }),
            )
        }
        "StringConcat" => simple(b, Op::StringConcat),
        "StringSplit" => {
            // An empty delimiter means whitespace, as a missing one does.
            let delimiter = n.string_if_any("delimiter")?.filter(|d| !d.is_empty()).map(str::to_owned);
            simple(b, Op::StringSplit { delimiter, maxsplit: n.int_if_any("maxsplit")? })
        }
        "RegexFullMatch" => {
            let pattern = n.string_if_any("pattern")?.ok_or_else(|| n.no_attribute("pattern"))?;
            simple(b, Op::RegexFullMatch { pattern: pattern.to_owned() })
        }
        "TfIdfVectorizer" => {
            let attributes = tf_idf(n)?;
            simple(b, Op::TfIdfVectorizer(Box::new(attributes)))
        }
        "ImageDecoder" => {
            let format = n.choice(
                "pixel_format",
                "RGB",
                &[("RGB", PixelFormat::Rgb), ("BGR", PixelFormat::Bgr), ("Grayscale", PixelFormat::Gray)],
            )?;
            simple(b, Op::ImageDecode { format })
        }
        _ => Err(n.unknown_operator()),
    }
}

/// A node that was finished has nothing more to say.
pub(super) fn done(result: Result<Vec<Option<ValueId>>>) -> Result<()> {
    result.map(|_| ())
}

fn round_mode(n: &NodeReader) -> Result<()> {
    // Only the 8-bit exponent type, which is not known here, rounds in several ways.
    n.choice("round_mode", "up", &[("up", ())])
}

fn stash_type(n: &NodeReader) -> Result<()> {
    match n.int("stash_type", 1)? {
        1 => Ok(()),
        other => Err(n.unsupported(format!("a stash_type of {other} (other than f32)"))),
    }
}

fn norm_order(n: &NodeReader) -> Result<i64> {
    if n.opset < 2 && n.float_ref("p").is_ok_and(|p| p.is_some()) {
        return Ok(n.float("p", 2.0)? as i64);
    }
    match n.int("p", 2)? {
        p if p >= 1 => Ok(p),
        p => Err(n.invalid(format!("attribute \"p\" is {p}"), "1 or more")),
    }
}

fn block_size(n: &NodeReader) -> Result<usize> {
    match n.size("blocksize", 0)? {
        0 => Err(n.invalid("attribute \"blocksize\" is 0 or missing", "1 or more")),
        block => Ok(block),
    }
}

pub(super) fn unary(n: &NodeReader) -> Result<Option<UnaryOp>> {
    Ok(Some(match n.op_type() {
        "Abs" => UnaryOp::Abs,
        "Acos" => UnaryOp::Acos,
        "Acosh" => UnaryOp::Acosh,
        "Asin" => UnaryOp::Asin,
        "Asinh" => UnaryOp::Asinh,
        "Atan" => UnaryOp::Atan,
        "Atanh" => UnaryOp::Atanh,
        "BitwiseNot" => UnaryOp::BitwiseNot,
        "Ceil" => UnaryOp::Ceil,
        "Celu" => UnaryOp::Celu { alpha: n.float("alpha", 1.0)? },
        "Cos" => UnaryOp::Cos,
        "Cosh" => UnaryOp::Cosh,
        "Elu" => UnaryOp::Elu { alpha: n.float("alpha", 1.0)? },
        "Erf" => UnaryOp::Erf,
        "Exp" => UnaryOp::Exp,
        "Floor" => UnaryOp::Floor,
        "Gelu" => {
            UnaryOp::Gelu { tanh: n.choice("approximate", "none", &[("none", false), ("tanh", true)])? }
        }
        "HardSigmoid" => UnaryOp::HardSigmoid { alpha: n.float("alpha", 0.2)?, beta: n.float("beta", 0.5)? },
        "HardSwish" => UnaryOp::HardSwish,
        "Identity" => UnaryOp::Identity,
        "IsInf" => UnaryOp::IsInf {
            negative: n.flag("detect_negative", true)?,
            positive: n.flag("detect_positive", true)?,
        },
        "IsNaN" => UnaryOp::IsNan,
        "LeakyRelu" => UnaryOp::LeakyRelu { alpha: n.float("alpha", 0.01)? },
        "Log" => UnaryOp::Log,
        "Mish" => UnaryOp::Mish,
        "Neg" => UnaryOp::Neg,
        "Not" => UnaryOp::Not,
        "Reciprocal" => UnaryOp::Reciprocal,
        "Relu" => UnaryOp::Relu,
        "Round" => UnaryOp::Round,
        "Selu" if n.opset < 6 => {
            UnaryOp::Selu { alpha: n.float("alpha", 1.6732)?, gamma: n.float("gamma", 1.0507)? }
        }
        "Selu" => {
            UnaryOp::Selu { alpha: n.float("alpha", 1.673_263_2)?, gamma: n.float("gamma", 1.050_701)? }
        }
        "Shrink" => UnaryOp::Shrink { bias: n.float("bias", 0.0)?, lambd: n.float("lambd", 0.5)? },
        "Sigmoid" => UnaryOp::Sigmoid,
        "Sign" => UnaryOp::Sign,
        "Sin" => UnaryOp::Sin,
        "Sinh" => UnaryOp::Sinh,
        "Softplus" => UnaryOp::Softplus,
        "Softsign" => UnaryOp::Softsign,
        "Sqrt" => UnaryOp::Sqrt,
        "Swish" => UnaryOp::Swish { alpha: n.float("alpha", 1.0)? },
        "Tan" => UnaryOp::Tan,
        "Tanh" => UnaryOp::Tanh,
        "ThresholdedRelu" => UnaryOp::ThresholdedRelu { alpha: n.float("alpha", 1.0)? },
        _ => return Ok(None),
    }))
}

fn binary(n: &NodeReader) -> Result<Option<BinaryOp>> {
    Ok(Some(match n.op_type() {
        "Add" => BinaryOp::Add,
        "Sub" => BinaryOp::Sub,
        "Mul" => BinaryOp::Mul,
        "Div" => BinaryOp::Div,
        "Mod" if n.flag("fmod", false)? => BinaryOp::FMod,
        "Mod" => BinaryOp::Mod,
        "Pow" => BinaryOp::Pow,
        "PRelu" => BinaryOp::PRelu,
        "And" => BinaryOp::And,
        "Or" => BinaryOp::Or,
        "Xor" => BinaryOp::Xor,
        "BitwiseAnd" => BinaryOp::BitAnd,
        "BitwiseOr" => BinaryOp::BitOr,
        "BitwiseXor" => BinaryOp::BitXor,
        "BitShift" => {
            if !n.has("direction") {
                return Err(n.no_attribute("direction"));
            }
            n.choice("direction", "", &[("LEFT", BinaryOp::ShiftLeft), ("RIGHT", BinaryOp::ShiftRight)])?
        }
        "Equal" => BinaryOp::Equal,
        "Greater" => BinaryOp::Greater,
        "GreaterOrEqual" => BinaryOp::GreaterOrEqual,
        "Less" => BinaryOp::Less,
        "LessOrEqual" => BinaryOp::LessOrEqual,
        _ => return Ok(None),
    }))
}

fn reduction(op_type: &str) -> Option<ReduceOp> {
    Some(match op_type {
        "ReduceL1" => ReduceOp::L1,
        "ReduceL2" => ReduceOp::L2,
        "ReduceLogSum" => ReduceOp::LogSum,
        "ReduceLogSumExp" => ReduceOp::LogSumExp,
        "ReduceMax" => ReduceOp::Max,
        "ReduceMean" => ReduceOp::Mean,
        "ReduceMin" => ReduceOp::Min,
        "ReduceProd" => ReduceOp::Prod,
        "ReduceSum" => ReduceOp::Sum,
        "ReduceSumSquare" => ReduceOp::SumSquare,
        _ => return None,
    })
}

/// The operands of a binary operator; before version 7 broadcasting was asked for by attributes, and an axis told where
/// the second operand's dimensions stand.
fn broadcast_inputs(b: &mut GraphBuilder, n: &NodeReader) -> Result<Vec<Option<ValueId>>> {
    let mut inputs = n.inputs.clone();
    if n.opset >= 7 {
        return Ok(inputs);
    }
    // The slope of the old PRelu belongs to the channels.
    let axis = if n.op_type() == "PRelu" {
        Some(1)
    } else if n.flag("broadcast", false)? {
        n.int_if_any("axis")?
    } else {
        n.ignore("axis");
        None
    };
    let Some(axis) = axis else { return Ok(inputs) };
    let (x, y) = (n.required(0, "A")?, n.required(1, "B")?);
    // A slope or bias of one element fits anywhere.
    if b.dims(y).is_some_and(|dims| dims.iter().product::<usize>() == 1 && dims.len() <= 1) {
        return Ok(inputs);
    }
    let (Some(rank), Some(inner)) = (b.rank(x), b.rank(y)) else {
        return Err(n.unsupported("an axis of broadcasting with operands of unknown rank"));
    };
    let axis = if axis < 0 { axis + rank as i64 } else { axis };
    let after = usize::try_from(axis).ok().and_then(|axis| rank.checked_sub(axis + inner));
    let Some(after) = after else {
        // A slope that already has the full rank needs no axis.
        if n.op_type() == "PRelu" {
            return Ok(inputs);
        }
        return Err(n.invalid(
            format!("axis {axis} for operands of rank {rank} and {inner}"),
            "an axis from which the second operand fits into the first",
        ));
    };
    if after > 0 {
        let axes: Vec<i64> = (0..after).map(|i| (inner + i) as i64).collect();
        let axes = b.ints(n, "axes", &axes);
        inputs[1] = Some(b.emit(n, "broadcast", Op::Unsqueeze, &[y, axes]));
    }
    Ok(inputs)
}

fn variadic(b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let op = match (n.op_type(), n.inputs.len()) {
        (_, 1) => Op::Unary(UnaryOp::Identity),
        ("Sum", 2) => Op::Binary(BinaryOp::Add),
        ("Max", 2) => Op::Binary(BinaryOp::Max),
        ("Min", 2) => Op::Binary(BinaryOp::Min),
        ("Sum", _) => Op::Variadic(VariadicOp::Sum),
        ("Max", _) => Op::Variadic(VariadicOp::Max),
        ("Min", _) => Op::Variadic(VariadicOp::Min),
        _ => Op::Variadic(VariadicOp::Mean),
    };
    if n.inputs.contains(&None) {
        return Err(n.invalid("an input is missing", "every input to be there"));
    }
    done(b.finish(n, op, n.inputs.clone()))
}

fn clip(b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    if n.opset < 11 {
        n.max_inputs(1)?;
        // The defaults of the time; nothing finite is cut off.
        let (min, max) = (n.float("min", f32::MIN)?, n.float("max", f32::MAX)?);
        return done(b.finish(n, Op::Unary(UnaryOp::ClipTo { min, max }), vec![n.input(0)]));
    }
    n.max_inputs(3)?;
    let bound = |index: usize, open: f32| match n.input(index) {
        None => Some(open),
        Some(id) => b
            .tensor(id)
            .filter(|t| t.dtype() == DType::F32 && t.len() == 1)
            .map(|t| t.as_slice::<f32>()[0])
            .filter(|bound| !bound.is_nan()),
    };
    if n.input(1).is_none() && n.input(2).is_none() {
        return done(b.finish(n, Op::Unary(UnaryOp::Identity), vec![n.input(0)]));
    }
    match (bound(1, f32::NEG_INFINITY), bound(2, f32::INFINITY)) {
        (Some(min), Some(max)) => {
            done(b.finish(n, Op::Unary(UnaryOp::ClipTo { min, max }), vec![n.input(0)]))
        }
        _ => done(b.finish(n, Op::Clip, n.inputs.clone())),
    }
}

fn cast_target_by_name(n: &NodeReader) -> Result<Option<DType>> {
    let Some(name) = n.string_if_any("to")? else { return Ok(None) };
    let spelled = match name {
        "FLOAT" => "f32",
        "DOUBLE" => "f64",
        "FLOAT16" => "f16",
        "INT8" => "i8",
        "INT16" => "i16",
        "INT32" => "i32",
        "INT64" => "i64",
        "UINT8" => "u8",
        "UINT16" => "u16",
        "UINT32" => "u32",
        "UINT64" => "u64",
        "BOOL" => "bool",
        "STRING" => "string",
        _ => return Err(n.invalid(format!("attribute \"to\" is {name:?}"), "the name of an element type")),
    };
    Ok(DType::from_name(spelled))
}

fn dropout(b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let (seed, inputs) = if n.opset < 12 {
        n.max_inputs(1)?;
        n.ignore("ratio");
        if n.opset < 7 && n.int("is_test", 0)? == 0 && n.has("is_test") {
            return Err(n.unsupported("dropout in training mode"));
        }
        (None, vec![n.input(0)])
    } else {
        (n.int_if_any("seed")?, n.inputs.clone())
    };
    let training = match inputs.get(2).copied().flatten() {
        None => false,
        Some(id) => b.tensor(id).is_none_or(|t| t.to_i64s().is_none_or(|v| v.first() != Some(&0))),
    };
    if !training && n.output_count() < 2 {
        return done(b.finish(n, Op::Unary(UnaryOp::Identity), vec![n.input(0)]));
    }
    if n.opset < 10 {
        // The mask had the type of the data then; at inference it keeps everything.
        let x = n.required(0, "data")?;
        let parts = b.emit_many(n, "dropout", Op::Dropout { seed }, &[Some(x)], 2);
        b.finish_part(n, 0, Op::Unary(UnaryOp::Identity), vec![Some(x)])?;
        let to = b.dtype(x).unwrap_or(DType::F32);
        return b.finish_part(n, 1, Op::Cast { to, saturate: true }, vec![Some(parts[1])]);
    }
    done(b.finish(n, Op::Dropout { seed }, inputs))
}

fn constant(im: &mut Importer, b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let name = n.outputs().next().unwrap_or_default();
    if name.is_empty() || n.output_count() != 1 || !n.inputs.is_empty() {
        return Err(n.invalid("inputs, or not one output", "no inputs and one output"));
    }
    let mut given: Option<(lightering_graph::TensorType, Constant)> = None;
    let mut count = 0;
    let mut take = |found: Option<(lightering_graph::TensorType, Constant)>| {
        if found.is_some() {
            count += 1;
            given = found;
        }
    };
    let inline = |t: Tensor| (t.tensor_type(), Constant::Inline(Arc::new(t)));
    if let Some(proto) = n.tensor_ref("value")? {
        take(Some(im.constant(proto).map_err(|e| e.within(n.place()))?));
    }
    if let Some(proto) = n.sparse_ref("sparse_value")? {
        take(Some(inline(im.dense(proto).map_err(|e| e.within(n.place()))?)));
    }
    take(n.float_if_any("value_float")?.map(|v| inline(Tensor::scalar(v))));
    take(n.int_if_any("value_int")?.map(|v| inline(Tensor::scalar(v))));
    take(n.string_if_any("value_string")?.map(|v| inline(Tensor::from_strings(&[], vec![v.to_owned()]))));
    if n.has("value_floats") {
        let values = n.floats("value_floats")?;
        take(Some(inline(Tensor::from_slice(&[values.len()], &values))));
    }
    take(n.ints("value_ints")?.map(|v| inline(Tensor::from_slice(&[v.len()], v))));
    take(n.strings("value_strings")?.map(|v| inline(Tensor::from_strings(&[v.len()], v))));
    match (count, given) {
        (1, Some((ty, constant))) => b.define_model_constant(n, name, ty, constant),
        _ => Err(n.invalid(format!("{count} values"), "exactly one of the value attributes")),
    }
}

/// The operands, with the attribute `name` (if there) as operand `index`.
fn attribute_input(
    b: &mut GraphBuilder,
    n: &NodeReader,
    name: &str,
    index: usize,
) -> Result<Vec<Option<ValueId>>> {
    n.max_inputs(index)?;
    let mut inputs = n.inputs.clone();
    if let Some(values) = n.ints(name)? {
        inputs.resize(index, None);
        inputs.push(Some(b.ints(n, name, values)));
    }
    Ok(inputs)
}

fn spatial_rank(n: &NodeReader, attributes: &[(&str, usize)]) -> Result<()> {
    let mut rank: Option<(&str, usize)> = None;
    for &(name, length) in attributes.iter().filter(|(_, length)| *length > 0) {
        match rank {
            Some((first, expected)) if expected != length => {
                return Err(n.invalid(
                    format!("attribute {name:?} is for {length} spatial axes"),
                    format!("{expected}, as {first:?} has it"),
                ));
            }
            _ => rank = Some((name, length)),
        }
    }
    Ok(())
}

fn padding(n: &NodeReader) -> Result<(Padding, usize)> {
    let pads = n.ints("pads")?.unwrap_or(&[]);
    if pads.len() % 2 != 0 {
        return Err(n.invalid(
            format!("attribute \"pads\" of {} entries", pads.len()),
            "a begin and an end per axis",
        ));
    }
    let explicit = if pads.iter().all(|p| *p == 0) {
        Padding::Valid
    } else if pads.iter().all(|p| p.unsigned_abs() <= i32::MAX as u64) {
        Padding::Explicit(pads.to_vec())
    } else {
        return Err(n.invalid(format!("attribute \"pads\" is {pads:?}"), "numbers of pixels"));
    };
    Ok(match n.string("auto_pad", "NOTSET")? {
        "NOTSET" | "" => (explicit, pads.len() / 2),
        "SAME_UPPER" => (Padding::SameUpper, 0),
        "SAME_LOWER" => (Padding::SameLower, 0),
        "VALID" => (Padding::Valid, 0),
        other => {
            return Err(n.invalid(
                format!("attribute \"auto_pad\" is {other:?}"),
                "NOTSET, SAME_UPPER, SAME_LOWER or VALID",
            ));
        }
    })
}

pub(super) fn conv(n: &NodeReader) -> Result<ConvAttributes> {
    let (padding, pad_rank) = padding(n)?;
    let kernel = n.positive("kernel_shape")?;
    let strides = n.positive("strides")?;
    let dilations = n.positive("dilations")?;
    let groups = n.size("group", 1)?;
    if groups == 0 {
        return Err(n.invalid("attribute \"group\" is 0", "1 or more"));
    }
    spatial_rank(
        n,
        &[
            ("kernel_shape", kernel.len()),
            ("strides", strides.len()),
            ("dilations", dilations.len()),
            ("pads", pad_rank),
        ],
    )?;
    Ok(ConvAttributes {
        kernel,
        strides,
        dilations,
        padding,
        groups,
        layout: Layout::ChannelsFirst,
        activation: None,
    })
}

pub(super) fn pool(n: &NodeReader, kind: PoolKind) -> Result<PoolAttributes> {
    let (padding, pad_rank) = padding(n)?;
    let kernel = n.positive("kernel_shape")?;
    if kernel.is_empty() {
        return Err(n.no_attribute("kernel_shape"));
    }
    let strides = n.positive("strides")?;
    let dilations = n.positive("dilations")?;
    spatial_rank(
        n,
        &[
            ("kernel_shape", kernel.len()),
            ("strides", strides.len()),
            ("dilations", dilations.len()),
            ("pads", pad_rank),
        ],
    )?;
    Ok(PoolAttributes {
        kind,
        kernel,
        strides,
        dilations,
        padding,
        ceil_mode: n.flag("ceil_mode", false)?,
        count_include_pad: kind == PoolKind::Average && n.flag("count_include_pad", false)?,
        storage_order_column: kind == PoolKind::Max && n.flag("storage_order", false)?,
        layout: Layout::ChannelsFirst,
    })
}

fn global_pool(b: &mut GraphBuilder, n: &NodeReader, kind: PoolKind) -> Result<()> {
    done(b.finish(n, Op::GlobalPool { kind, layout: Layout::ChannelsFirst }, n.inputs.clone()))
}

fn batch_norm(b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let (epsilon, momentum) = (n.float("epsilon", 1e-5)?, n.float("momentum", 0.9)?);
    if n.opset < 9 && !n.flag("spatial", true)? {
        return Err(n.unsupported("batch normalisation with statistics per element (spatial = 0)"));
    }
    let extra = n.outputs().skip(1).any(|o| !o.is_empty());
    let training = if n.opset >= 14 {
        n.flag("training_mode", false)?
    } else {
        if n.opset < 7 && !n.flag("is_test", false)? {
            return Err(n.unsupported("batch normalisation in training mode before version 14"));
        }
        if extra {
            return Err(n.unsupported("batch normalisation in training mode before version 14"));
        }
        false
    };
    if !training && extra {
        return Err(n.invalid("more than one output without training_mode", "one output"));
    }
    done(b.finish(n, Op::BatchNorm { epsilon, momentum, training }, n.inputs.clone()))
}

fn group_norm(b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let groups = n.size("num_groups", 0)?;
    if groups == 0 {
        return Err(n.invalid("attribute \"num_groups\" is 0 or missing", "1 or more"));
    }
    let epsilon = n.float("epsilon", 1e-5)?;
    let mut inputs = n.inputs.clone();
    if n.opset >= 21 {
        stash_type(n)?;
    } else {
        // Scale and bias were per group: each is repeated for the channels of its group.
        let x = n.required(0, "X")?;
        let channels = b.emit(n, "channels", Op::Shape { start: 1, end: Some(2) }, &[x]);
        let group_count = b.ints(n, "groups", &[groups as i64]);
        let per_group = b.emit(n, "per_group", Op::Binary(BinaryOp::Div), &[channels, group_count]);
        let shape = b.emit(n, "shape", Op::Concat { axis: 0 }, &[group_count, per_group]);
        let (last, flat) = (b.ints(n, "axis", &[1]), b.ints(n, "flat", &[-1]));
        for (i, what) in [(1, "scale"), (2, "bias")] {
            let value = n.required(i, what)?;
            let column = b.emit(n, &format!("{what}_column"), Op::Unsqueeze, &[value, last]);
            let wide = b.emit(n, &format!("{what}_wide"), Op::Expand, &[column, shape]);
            inputs[i] = Some(b.emit(n, what, Op::Reshape { allow_zero: false }, &[wide, flat]));
        }
    }
    done(b.finish(n, Op::GroupNorm { groups, epsilon }, inputs))
}

/// Before version 13 these operators flattened their operand to two dimensions at the axis.
fn softmax(b: &mut GraphBuilder, n: &NodeReader, op: impl Fn(i64) -> Op) -> Result<()> {
    if n.opset >= 13 {
        return done(b.finish(n, op(n.int("axis", -1)?), n.inputs.clone()));
    }
    let axis = n.int("axis", 1)?;
    n.max_inputs(1)?;
    let x = n.required(0, "input")?;
    if axis == -1 || b.rank(x).is_some_and(|rank| axis == rank as i64 - 1) {
        return done(b.finish(n, op(-1), vec![Some(x)]));
    }
    let shape = b.emit(n, "shape", Op::Shape { start: 0, end: None }, &[x]);
    let flat = b.emit(n, "flat", Op::Flatten { axis }, &[x]);
    let result = b.emit(n, "rows", op(1), &[flat]);
    done(b.finish(n, Op::Reshape { allow_zero: true }, vec![Some(result), Some(shape)]))
}

fn reduce(b: &mut GraphBuilder, n: &NodeReader, op: ReduceOp) -> Result<()> {
    let first_with_input = if op == ReduceOp::Sum { 13 } else { 18 };
    let keep_dims = n.flag("keepdims", true)?;
    if n.opset >= first_with_input {
        let noop_with_empty_axes = n.flag("noop_with_empty_axes", false)?;
        return done(b.finish(n, Op::Reduce { op, keep_dims, noop_with_empty_axes }, n.inputs.clone()));
    }
    n.max_inputs(1)?;
    let mut inputs = n.inputs.clone();
    if let Some(axes) = n.ints("axes")?.filter(|axes| !axes.is_empty()) {
        inputs.push(Some(b.ints(n, "axes", axes)));
    }
    done(b.finish(n, Op::Reduce { op, keep_dims, noop_with_empty_axes: false }, inputs))
}

fn attention(n: &NodeReader) -> Result<AttentionAttributes> {
    let qk_output = match n.int("qk_matmul_output_mode", 0)? {
        0 => QkOutput::Raw,
        1 => QkOutput::Masked,
        2 => QkOutput::Capped,
        3 => QkOutput::Softmax,
        other => return Err(n.invalid(format!("attribute \"qk_matmul_output_mode\" is {other}"), "0 to 3")),
    };
    Ok(AttentionAttributes {
        causal: n.flag("is_causal", false)?,
        q_num_heads: n.size("q_num_heads", 0)?,
        kv_num_heads: n.size("kv_num_heads", 0)?,
        scale: n.float_if_any("scale")?,
        softcap: n.float("softcap", 0.0)?,
        qk_output,
        softmax_precision: n.dtype_if_any("softmax_precision")?,
    })
}

fn split(b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let axis = n.int("axis", 0)?;
    let mut inputs = n.inputs.clone();
    if n.opset < 13 {
        if n.opset >= 2 {
            n.max_inputs(1)?;
        }
        if let Some(sizes) = n.ints("split")? {
            if sizes.len() != n.output_count() {
                return Err(n.invalid(
                    format!("{} sizes", sizes.len()),
                    format!("one for each of {} outputs", n.output_count()),
                ));
            }
            inputs.push(Some(b.ints(n, "split", sizes)));
        }
    }
    if n.opset >= 18
        && let Some(count) = n.int_if_any("num_outputs")?
        && usize::try_from(count).ok() != Some(n.output_count())
    {
        return Err(n.invalid(
            format!("num_outputs {count}"),
            format!("{}, as many as there are outputs", n.output_count()),
        ));
    }
    if n.output_count() == 0 {
        return Err(n.invalid("no outputs", "at least one"));
    }
    done(b.finish(n, Op::Split { axis }, inputs))
}

fn pad(b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let mut modes =
        vec![("constant", PadMode::Constant), ("edge", PadMode::Edge), ("reflect", PadMode::Reflect)];
    if n.opset >= 19 {
        modes.push(("wrap", PadMode::Wrap));
    }
    let mode = n.choice("mode", "constant", &modes)?;
    let mut inputs = n.inputs.clone();
    if n.opset < 11 {
        n.max_inputs(1)?;
        let name = if n.opset < 2 { "paddings" } else { "pads" };
        let pads = n.ints_required(name)?;
        inputs.push(Some(b.ints(n, "pads", pads)));
        let value = n.float("value", 0.0)?;
        if mode == PadMode::Constant && value != 0.0 {
            let x = n.required(0, "data")?;
            inputs.push(Some(b.scalar_like(n, "value", value, x)?));
        }
    }
    done(b.finish(n, Op::Pad { mode }, inputs))
}

fn scatter_reduction(n: &NodeReader) -> Result<ScatterReduction> {
    if n.opset < 16 {
        return Ok(ScatterReduction::None);
    }
    n.choice(
        "reduction",
        "none",
        &[
            ("none", ScatterReduction::None),
            ("add", ScatterReduction::Add),
            ("mul", ScatterReduction::Mul),
            ("max", ScatterReduction::Max),
            ("min", ScatterReduction::Min),
        ],
    )
}

fn resize(b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let mode = n.choice(
        "mode",
        "nearest",
        &[
            ("nearest", ResizeMode::Nearest),
            ("linear", ResizeMode::Linear),
            ("bilinear", ResizeMode::Linear),
            ("cubic", ResizeMode::Cubic),
        ],
    )?;
    let mut attributes = ResizeAttributes {
        mode,
        coordinates: CoordinateMode::Asymmetric,
        nearest: NearestMode::Floor,
        cubic_coeff_a: -0.75,
        exclude_outside: false,
        extrapolation_value: 0.0,
        antialias: false,
        axes: None,
        aspect_ratio: AspectRatio::Stretch,
    };
    let x = n.input(0);
    if n.op_type() == "Upsample" && n.opset < 9 {
        n.max_inputs(1)?;
        let mut scales = n.floats("scales")?;
        if n.opset < 7 && scales.is_empty() {
            scales = vec![1.0, 1.0, n.float("height_scale", 1.0)?, n.float("width_scale", 1.0)?];
        }
        if scales.is_empty() {
            return Err(n.no_attribute("scales"));
        }
        let scales = b.constant(n, "scales", Tensor::from_slice(&[scales.len()], &scales));
        return done(b.finish(n, Op::Resize(attributes), vec![x, None, Some(scales)]));
    }
    if n.op_type() == "Upsample" || n.opset < 11 {
        n.max_inputs(2)?;
        return done(b.finish(n, Op::Resize(attributes), vec![x, None, Some(n.required(1, "scales")?)]));
    }
    attributes.coordinates = n.choice(
        "coordinate_transformation_mode",
        "half_pixel",
        &[
            ("half_pixel", CoordinateMode::HalfPixel),
            ("half_pixel_symmetric", CoordinateMode::HalfPixelSymmetric),
            ("pytorch_half_pixel", CoordinateMode::PytorchHalfPixel),
            ("align_corners", CoordinateMode::AlignCorners),
            ("asymmetric", CoordinateMode::Asymmetric),
            ("tf_crop_and_resize", CoordinateMode::TfCropAndResize),
            ("tf_half_pixel_for_nn", CoordinateMode::TfHalfPixelForNearest),
        ],
    )?;
    attributes.nearest = n.choice(
        "nearest_mode",
        "round_prefer_floor",
        &[
            ("round_prefer_floor", NearestMode::RoundPreferFloor),
            ("round_prefer_ceil", NearestMode::RoundPreferCeil),
            ("floor", NearestMode::Floor),
            ("ceil", NearestMode::Ceil),
            // The empty text is what some exporters write when the mode is not the nearest one.
            ("", NearestMode::RoundPreferFloor),
        ],
    )?;
    attributes.cubic_coeff_a = n.float("cubic_coeff_a", -0.75)?;
    attributes.exclude_outside = n.flag("exclude_outside", false)?;
    attributes.extrapolation_value = n.float("extrapolation_value", 0.0)?;
    if n.opset >= 18 {
        attributes.antialias = n.flag("antialias", false)?;
        attributes.axes = n.ints("axes")?.map(<[i64]>::to_vec);
        attributes.aspect_ratio = n.choice(
            "keep_aspect_ratio_policy",
            "stretch",
            &[
                ("stretch", AspectRatio::Stretch),
                ("not_larger", AspectRatio::NotLarger),
                ("not_smaller", AspectRatio::NotSmaller),
            ],
        )?;
    }
    n.max_inputs(4)?;
    // In version 11 an operand that is not given is an empty tensor.
    let given = |index: usize| n.input(index).filter(|id| b.dims(*id).is_none_or(|dims| !dims.contains(&0)));
    let (mut roi, mut scales, sizes) = (given(1), given(2), given(3));
    if attributes.coordinates != CoordinateMode::TfCropAndResize {
        roi = None;
    } else if roi.is_none() {
        return Err(n.invalid("no roi", "a roi for tf_crop_and_resize"));
    }
    if sizes.is_some() {
        // An exporter that gives both leaves the scales empty at run time.
        scales = None;
    } else if scales.is_none() {
        return Err(n.invalid("neither scales nor sizes", "one of them"));
    }
    done(b.finish(n, Op::Resize(attributes), vec![x, roi, scales, sizes]))
}

fn random(b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let op_type = n.op_type();
    let distribution = if op_type.starts_with("RandomNormal") {
        Distribution::Normal { mean: n.float("mean", 0.0)?, scale: n.float("scale", 1.0)? }
    } else {
        Distribution::Uniform { low: n.float("low", 0.0)?, high: n.float("high", 1.0)? }
    };
    let mut attributes = RandomAttributes {
        distribution,
        dtype: n.dtype_if_any("dtype")?,
        dims: None,
        seed: n.float_if_any("seed")?,
    };
    if op_type.ends_with("Like") {
        n.required(0, "input")?;
    } else {
        n.max_inputs(0)?;
        if !n.has("shape") {
            return Err(n.no_attribute("shape"));
        }
        attributes.dims = Some(n.sizes("shape")?);
        attributes.dtype = attributes.dtype.or(Some(DType::F32));
    }
    done(b.finish(n, Op::Random(attributes), n.inputs.clone()))
}

fn window(b: &mut GraphBuilder, n: &NodeReader, kind: WindowKind) -> Result<()> {
    let (periodic, dtype) = (n.flag("periodic", true)?, n.dtype("output_datatype", DType::F32)?);
    done(b.finish(n, Op::Window { kind, periodic, dtype }, n.inputs.clone()))
}

pub(super) fn quantize(n: &NodeReader) -> Result<QuantizeAttributes> {
    // Version 10 of the standard operators knew one scale for the whole tensor only, for which the axis is of no use.
    let axis = n.int("axis", 1)?;
    let block_size = n.size("block_size", 0)?;
    let output_dtype = match n.int("output_dtype", 0)? {
        0 => None,
        _ => n.dtype_if_any("output_dtype")?,
    };
    if n.int("precision", 0)? != 0 {
        return Err(n.unsupported("a precision of division other than that of the scale"));
    }
    Ok(QuantizeAttributes { axis, block_size, output_dtype, saturate: n.flag("saturate", true)? })
}

fn loss(n: &NodeReader) -> Result<LossAttributes> {
    Ok(LossAttributes {
        reduction: n.choice(
            "reduction",
            "mean",
            &[("none", LossReduction::None), ("mean", LossReduction::Mean), ("sum", LossReduction::Sum)],
        )?,
        ignore_index: n.int_if_any("ignore_index")?,
    })
}

fn tf_idf(n: &NodeReader) -> Result<TfIdfAttributes> {
    if !n.has("mode") {
        return Err(n.no_attribute("mode"));
    }
    let mode =
        n.choice("mode", "", &[("TF", TfIdfMode::Tf), ("IDF", TfIdfMode::Idf), ("TFIDF", TfIdfMode::TfIdf)])?;
    let min_gram_length = n.size("min_gram_length", 0)?;
    let max_gram_length = n.size("max_gram_length", 0)?;
    if min_gram_length == 0 || max_gram_length < min_gram_length {
        return Err(n.invalid(
            format!("n-grams of {min_gram_length} to {max_gram_length} items"),
            "1 or more, and no more at least than at most",
        ));
    }
    let numbers = n.ints("pool_int64s")?.map(|v| Tensor::from_slice(&[v.len()], v));
    let texts = n.strings("pool_strings")?.map(|v| Tensor::from_strings(&[v.len()], v));
    let pool = match (numbers, texts) {
        (Some(_), Some(_)) | (None, None) => {
            return Err(n.invalid("both or none of pool_int64s and pool_strings", "one of them"));
        }
        (numbers, texts) => numbers.or(texts),
    };
    let pool_len = pool.as_ref().map_or(0, Tensor::len);
    let ngram_counts = n.sizes("ngram_counts")?;
    let ngram_indexes = n.sizes("ngram_indexes")?;
    let ordered = ngram_counts.windows(2).all(|w| w[0] <= w[1]);
    if !ordered
        || ngram_counts.last().is_some_and(|last| *last > pool_len)
        || ngram_counts.len() < max_gram_length
    {
        return Err(n.invalid(
            format!("attribute \"ngram_counts\" is {ngram_counts:?} for a pool of {pool_len} items"),
            "rising starts inside the pool, one for each length of n-gram",
        ));
    }
    let grams: usize = (0..ngram_counts.len())
        .map(|i| (ngram_counts.get(i + 1).unwrap_or(&pool_len) - ngram_counts[i]) / (i + 1))
        .sum();
    let weights = n.floats("weights")?;
    if ngram_indexes.len() != grams || (!weights.is_empty() && weights.len() != grams) {
        return Err(n.invalid(
            format!("{} indexes and {} weights for {grams} n-grams", ngram_indexes.len(), weights.len()),
            "one of each per n-gram",
        ));
    }
    Ok(TfIdfAttributes {
        mode,
        min_gram_length,
        max_gram_length,
        max_skip_count: n.size("max_skip_count", 0)?,
        ngram_counts,
        ngram_indexes,
        pool,
        weights,
    })
}
