//! The operators of the domain `com.microsoft` that onnxruntime's optimiser and quantiser write, each in terms of the
//! standard ones.

use lightering_graph::{
    AttentionAttributes, BinaryOp, DType, GemmAttributes, Layout, MatMulAttributes, Op, PoolKind, QkOutput,
    QuantizeAttributes, ReduceOp, Tensor, UnaryOp, ValueId,
};

use super::Importer;
use super::builder::GraphBuilder;
use super::node::NodeReader;
use super::standard::{conv, done, pool, quantize};
use crate::Result;

pub(super) fn convert(_im: &mut Importer, b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let simple = |b: &mut GraphBuilder, op: Op| done(b.finish(n, op, n.inputs.clone()));
    match n.op_type() {
        "Gelu" => simple(b, Op::Unary(UnaryOp::Gelu { tanh: false })),
        "QuickGelu" => simple(b, Op::Unary(UnaryOp::Swish { alpha: n.float("alpha", 1.702)? })),
        "FastGelu" => biased(b, n, UnaryOp::Gelu { tanh: true }),
        "BiasGelu" => biased(b, n, UnaryOp::Gelu { tanh: false }),
        "FusedConv" => {
            let mut attributes = conv(n)?;
            attributes.activation = activation(n)?;
            n.max_inputs(4)?;
            simple(b, Op::Conv(attributes))
        }
        "FusedGemm" => {
            let attributes = GemmAttributes {
                alpha: n.float("alpha", 1.0)?,
                beta: n.float("beta", 1.0)?,
                trans_a: n.flag("transA", false)?,
                trans_b: n.flag("transB", false)?,
            };
            let activation = match n.string_if_any("activation")? {
                Some("LeakyRelu") => UnaryOp::LeakyRelu { alpha: n.float("activation_alpha", 0.01)? },
                Some(name) => named_activation(n, name)?,
                None => UnaryOp::Identity,
            };
            let product = b.emit_many(n, "product", Op::Gemm(attributes), &n.inputs, 1)[0];
            done(b.finish(n, Op::Unary(activation), vec![Some(product)]))
        }
        "FusedMatMul" | "TransposeMatMul" => {
            if n.flag("transBatchA", false)? || n.flag("transBatchB", false)? {
                return Err(n.unsupported("a matrix product with transposed batch dimensions"));
            }
            let attributes = MatMulAttributes {
                trans_a: n.flag("transA", false)?,
                trans_b: n.flag("transB", false)?,
                alpha: n.float("alpha", 1.0)?,
                activation: None,
            };
            n.max_inputs(2)?;
            simple(b, Op::MatMul(attributes))
        }
        "SkipLayerNormalization" => skip_norm(b, n, false),
        "SkipSimplifiedLayerNormalization" => skip_norm(b, n, true),
        "SimplifiedLayerNormalization" => {
            n.ignore("stash_type");
            let (axis, epsilon) = (n.int("axis", -1)?, n.float("epsilon", 1e-5)?);
            simple(b, Op::RmsNorm { axis, epsilon })
        }
        "EmbedLayerNormalization" => embed_norm(b, n),
        "Attention" => attention(b, n),
        "MultiHeadAttention" => multi_head_attention(b, n),
        "RotaryEmbedding" => rotary(b, n),

        "QuantizeLinear" => {
            let attributes = quantize(n)?;
            simple(b, Op::QuantizeLinear(attributes))
        }
        "DequantizeLinear" => {
            let attributes = quantize(n)?;
            simple(b, Op::DequantizeLinear(attributes))
        }
        "QLinearAdd" => quantized_binary(b, n, BinaryOp::Add),
        "QLinearMul" => quantized_binary(b, n, BinaryOp::Mul),
        "QLinearSigmoid" => simple(b, Op::QLinearUnary(UnaryOp::Sigmoid)),
        "QLinearLeakyRelu" => {
            let alpha = n.float("alpha", 0.01)?;
            simple(b, Op::QLinearUnary(UnaryOp::LeakyRelu { alpha }))
        }
        "QLinearAveragePool" => {
            let mut attributes = pool(n, PoolKind::Average)?;
            if n.flag("channels_last", false)? {
                attributes.layout = Layout::ChannelsLast;
            }
            simple(b, Op::QLinearPool(attributes))
        }
        "QLinearGlobalAveragePool" => {
            let layout =
                if n.flag("channels_last", false)? { Layout::ChannelsLast } else { Layout::ChannelsFirst };
            let x = dequantized(b, n, "x", [n.input(0), n.input(1), n.input(2)])?;
            let mean = b.emit(n, "mean", Op::GlobalPool { kind: PoolKind::Average, layout }, &[x]);
            quantized(b, n, mean, n.input(3), n.input(4))
        }
        "QLinearConcat" => {
            let axis = n.int_required("axis")?;
            if n.inputs.len() < 5 || !(n.inputs.len() - 2).is_multiple_of(3) {
                return Err(n.invalid(
                    format!("{} inputs", n.inputs.len()),
                    "a scale, a zero point, and three for each part",
                ));
            }
            let mut parts = Vec::new();
            for i in (2..n.inputs.len()).step_by(3) {
                parts.push(dequantized(
                    b,
                    n,
                    &format!("x{}", parts.len()),
                    [n.input(i), n.input(i + 1), n.input(i + 2)],
                )?);
            }
            let whole = b.emit(n, "whole", Op::Concat { axis }, &parts);
            quantized(b, n, whole, n.input(0), n.input(1))
        }
        "QLinearSoftmax" => {
            let axis = n.int("axis", -1)?;
            // Before version 13 of the standard operators the softmax ran over all axes from this one on.
            let x = dequantized(b, n, "x", [n.input(0), n.input(1), n.input(2)])?;
            let last = axis == -1 || b.rank(x).is_some_and(|r| axis == r as i64 - 1);
            if n.int("opset", 13)? < 13 && !last {
                return Err(n.unsupported("a softmax over several axes"));
            }
            let y = b.emit(n, "softmax", Op::Softmax { axis, log: false }, &[x]);
            quantized(b, n, y, n.input(3), n.input(4))
        }
        "QGemm" => qgemm(b, n),
        "MatMulIntegerToFloat" => {
            // (A, B, a_scale, b_scale, a_zero?, b_zero?, bias?)
            let operands = [n.input(0), n.input(1), n.input(4), n.input(5)];
            let product = b.emit_many(n, "product", Op::MatMulInteger, &operands, 1)[0];
            let scales = [n.required(2, "a_scale")?, n.required(3, "b_scale")?];
            scaled_product(b, n, product, scales, n.input(6))
        }
        "DynamicQuantizeMatMul" => {
            // (A, B, b_scale, b_zero?, bias?)
            let a = n.required(0, "A")?;
            let parts = b.emit_many(n, "quantized", Op::DynamicQuantizeLinear, &[Some(a)], 3);
            let operands = [Some(parts[0]), n.input(1), Some(parts[2]), n.input(3)];
            n.required(1, "B")?;
            let product = b.emit_many(n, "product", Op::MatMulInteger, &operands, 1)[0];
            let scales = [parts[1], n.required(2, "b_scale")?];
            scaled_product(b, n, product, scales, n.input(4))
        }
        "Trilu" => simple(b, Op::Trilu { upper: n.flag("upper", true)? }),
        "GatherND" => simple(b, Op::GatherNd { batch_dims: 0 }),
        "Range" => simple(b, Op::Range),
        _ => Err(n.unknown_operator()),
    }
}

fn biased(b: &mut GraphBuilder, n: &NodeReader, activation: UnaryOp) -> Result<()> {
    n.max_inputs(2)?;
    let x = n.required(0, "X")?;
    let sum = match n.input(1) {
        Some(bias) => b.emit(n, "sum", Op::Binary(BinaryOp::Add), &[x, bias]),
        None => x,
    };
    done(b.finish(n, Op::Unary(activation), vec![Some(sum)]))
}

fn named_activation(n: &NodeReader, name: &str) -> Result<UnaryOp> {
    Ok(match name {
        "" => UnaryOp::Identity,
        "Relu" => UnaryOp::Relu,
        "Tanh" => UnaryOp::Tanh,
        "Sigmoid" => UnaryOp::Sigmoid,
        "HardSwish" => UnaryOp::HardSwish,
        other => return Err(n.unsupported(format!("the activation {other:?}"))),
    })
}

fn activation(n: &NodeReader) -> Result<Option<UnaryOp>> {
    let params = n.floats("activation_params")?;
    let two = || match params.as_slice() {
        [a, b] => Ok((*a, *b)),
        other => Err(n.invalid(format!("activation_params {other:?}"), "two numbers")),
    };
    Ok(match n.string("activation", "")? {
        "" => None,
        "LeakyRelu" => Some(UnaryOp::LeakyRelu { alpha: params.first().copied().unwrap_or(0.01) }),
        "Clip" => {
            let (min, max) = two()?;
            Some(UnaryOp::ClipTo { min, max })
        }
        "HardSigmoid" => {
            let (alpha, beta) = two()?;
            Some(UnaryOp::HardSigmoid { alpha, beta })
        }
        name => Some(named_activation(n, name)?),
    })
}

/// `(input, skip, gamma, beta?, bias?)`, or without beta for the simplified one; outputs
/// `(y, mean?, inverse_std?, sum?)`.
fn skip_norm(b: &mut GraphBuilder, n: &NodeReader, simplified: bool) -> Result<()> {
    let epsilon = n.float("epsilon", 1e-12)?;
    let (x, skip) = (n.required(0, "input")?, n.required(1, "skip")?);
    let (beta, bias) = if simplified { (None, n.input(3)) } else { (n.input(3), n.input(4)) };
    let outputs: Vec<&str> = n.outputs().collect();
    if outputs.iter().skip(1).take(2).any(|o| !o.is_empty()) {
        return Err(n.unsupported("the mean and deviation as outputs"));
    }
    let mut sum = b.emit(n, "sum", Op::Binary(BinaryOp::Add), &[x, skip]);
    if let Some(bias) = bias {
        sum = b.emit(n, "biased_sum", Op::Binary(BinaryOp::Add), &[sum, bias]);
    }
    let mut inputs = vec![Some(sum), n.input(2)];
    let op = if simplified {
        Op::RmsNorm { axis: -1, epsilon }
    } else {
        inputs.push(beta);
        Op::LayerNorm { axis: -1, epsilon }
    };
    n.required(2, "gamma")?;
    b.finish_part(n, 0, op, inputs)?;
    if outputs.len() > 3 {
        b.finish_part(n, 3, Op::Unary(UnaryOp::Identity), vec![Some(sum)])?;
    }
    Ok(())
}

/// `(ids, segments?, words, positions, segment_table?, gamma, beta, mask?, position_ids?)`; outputs
/// `(y, mask_index?, sum?)`.
fn embed_norm(b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let epsilon = n.float("epsilon", 1e-12)?;
    if n.int("mask_index_type", 0)? != 0 {
        return Err(n.unsupported("a mask_index_type other than 0"));
    }
    n.max_inputs(9)?;
    let (ids, words, positions) =
        (n.required(0, "input_ids")?, n.required(2, "word_embedding")?, n.required(3, "position_embedding")?);
    let mut sum = b.emit(n, "words", Op::Gather { axis: 0 }, &[words, ids]);
    let at = match n.input(8) {
        Some(position_ids) => b.emit(n, "positions", Op::Gather { axis: 0 }, &[positions, position_ids]),
        None => {
            let length = b.emit(n, "length", Op::Shape { start: 1, end: Some(2) }, &[ids]);
            let start = b.ints(n, "start", &[0]);
            b.emit(n, "positions", Op::Slice, &[positions, start, length, start])
        }
    };
    sum = b.emit(n, "words_at", Op::Binary(BinaryOp::Add), &[sum, at]);
    if let Some(segments) = n.input(1) {
        let table = n.required(4, "segment_embedding")?;
        let segment = b.emit(n, "segments", Op::Gather { axis: 0 }, &[table, segments]);
        sum = b.emit(n, "sum", Op::Binary(BinaryOp::Add), &[sum, segment]);
    }
    let scale_and_bias = [n.required(5, "gamma")?, n.required(6, "beta")?];
    let norm = vec![Some(sum), Some(scale_and_bias[0]), Some(scale_and_bias[1])];
    b.finish_part(n, 0, Op::LayerNorm { axis: -1, epsilon }, norm)?;
    let outputs: Vec<&str> = n.outputs().collect();
    if outputs.get(1).is_some_and(|o| !o.is_empty()) {
        let mask = n.required(7, "mask")?;
        let axes = b.ints(n, "axes", &[1]);
        let op = Op::Reduce { op: ReduceOp::Sum, keep_dims: false, noop_with_empty_axes: false };
        b.finish_part(n, 1, op, vec![Some(mask), Some(axes)])?;
    }
    if outputs.len() > 2 {
        b.finish_part(n, 2, Op::Unary(UnaryOp::Identity), vec![Some(sum)])?;
    }
    Ok(())
}

fn heads(n: &NodeReader) -> Result<usize> {
    match n.size("num_heads", 0)? {
        0 => Err(n.invalid("attribute \"num_heads\" is 0 or missing", "1 or more")),
        heads => Ok(heads),
    }
}

fn attention_attributes(n: &NodeReader, heads: usize) -> Result<AttentionAttributes> {
    // The value that a masked score gets; minus infinity is what it stands for.
    n.ignore("mask_filter_value");
    Ok(AttentionAttributes {
        causal: n.flag("unidirectional", false)?,
        q_num_heads: heads,
        kv_num_heads: heads,
        scale: n.float_if_any("scale")?.filter(|s| *s != 0.0),
        softcap: 0.0,
        qk_output: QkOutput::Raw,
        softmax_precision: None,
    })
}

/// A padding mask `[batch, keys]` of 0 and 1 as a boolean one that broadcasts over heads and queries.
fn padding_mask(b: &mut GraphBuilder, n: &NodeReader, mask: ValueId) -> Result<ValueId> {
    if b.rank(mask) != Some(2) {
        return Err(n.unsupported("a mask that is not known to be [batch, keys]"));
    }
    let keep = b.emit(n, "keep", Op::Cast { to: DType::Bool, saturate: true }, &[mask]);
    let axes = b.ints(n, "mask_axes", &[1, 2]);
    Ok(b.emit(n, "mask", Op::Unsqueeze, &[keep, axes]))
}

/// `(input, weights, bias?, mask?, past?, attention_bias?)`: one product for queries, keys and values.
fn attention(b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let heads = heads(n)?;
    if n.ints("qkv_hidden_sizes")?.is_some_and(|s| !s.is_empty() && s.windows(2).any(|w| w[0] != w[1])) {
        return Err(n.unsupported("queries, keys and values of different sizes"));
    }
    if n.flag("do_rotary", false)? || n.flag("past_present_share_buffer", false)? {
        return Err(n.unsupported("rotary embedding or a shared cache inside of attention"));
    }
    n.ignore("rotary_embedding_dim");
    if n.input(4).is_some() || n.output_count() > 1 || n.input(3).is_some() && n.input(5).is_some() {
        return Err(n.unsupported("attention with a cache, or with two masks"));
    }
    n.max_inputs(6)?;
    let operands = [n.input(0), n.input(1), n.input(2)];
    n.required(0, "input")?;
    n.required(1, "weights")?;
    let product = b.emit_many(n, "qkv", Op::MatMul(MatMulAttributes::default()), &operands, 1)[0];
    let parts = b.emit_many(n, "parts", Op::Split { axis: -1 }, &[Some(product)], 3);
    let mask = match (n.input(3), n.input(5)) {
        (Some(mask), _) => Some(padding_mask(b, n, mask)?),
        (None, bias) => bias,
    };
    let attributes = attention_attributes(n, heads)?;
    done(b.finish(n, Op::Attention(attributes), vec![Some(parts[0]), Some(parts[1]), Some(parts[2]), mask]))
}

/// `(q, k, v, bias?, key_padding_mask?, attention_bias?, …)` with 3-D operands.
fn multi_head_attention(b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let heads = heads(n)?;
    n.max_inputs(6)?;
    if n.output_count() > 1 || (n.input(4).is_some() && n.input(5).is_some()) {
        return Err(n.unsupported("attention with a cache, or with two masks"));
    }
    let mut parts = [n.required(0, "query")?, n.required(1, "key")?, n.required(2, "value")?];
    if let Some(bias) = n.input(3) {
        let width = b.dims(bias).filter(|d| d.len() == 1 && d[0] % 3 == 0).map(|d| d[0] / 3);
        if width.is_none() {
            return Err(n.unsupported("a bias of unknown size"));
        }
        let biases = b.emit_many(n, "bias", Op::Split { axis: 0 }, &[Some(bias)], 3);
        for (part, (bias, what)) in parts.iter_mut().zip(biases.into_iter().zip(["q", "k", "v"])) {
            *part = b.emit(n, what, Op::Binary(BinaryOp::Add), &[*part, bias]);
        }
    }
    let mask = match (n.input(4), n.input(5)) {
        (Some(mask), _) => Some(padding_mask(b, n, mask)?),
        (None, bias) => bias,
    };
    let attributes = attention_attributes(n, heads)?;
    done(b.finish(n, Op::Attention(attributes), vec![Some(parts[0]), Some(parts[1]), Some(parts[2]), mask]))
}

/// `(x, position_ids, cos, sin)`: the standard operator has the positions last.
fn rotary(b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    if n.flag("is_packed_batching", false)? || n.float("scale", 1.0)? != 1.0 {
        return Err(n.unsupported("packed batches or a scale"));
    }
    let positions = n.required(1, "position_ids")?;
    if b.rank(positions) != Some(2) {
        return Err(n.unsupported("positions that are not known to be [batch, sequence]"));
    }
    let op = Op::RotaryEmbedding {
        interleaved: n.flag("interleaved", false)?,
        num_heads: n.size("num_heads", 0)?,
        rotary_dim: n.size("rotary_embedding_dim", 0)?,
    };
    done(b.finish(n, op, vec![n.input(0), n.input(2), n.input(3), Some(positions)]))
}

fn per_tensor() -> QuantizeAttributes {
    QuantizeAttributes { axis: 1, block_size: 0, output_dtype: None, saturate: true }
}

fn dequantized(
    b: &mut GraphBuilder,
    n: &NodeReader,
    what: &str,
    operands: [Option<ValueId>; 3],
) -> Result<ValueId> {
    if operands[0].is_none() || operands[1].is_none() {
        return Err(n.invalid(format!("{what} or its scale is missing"), "both"));
    }
    Ok(b.emit_many(n, what, Op::DequantizeLinear(per_tensor()), &operands, 1)[0])
}

/// Ends the node by quantising `value`.
fn quantized(
    b: &mut GraphBuilder,
    n: &NodeReader,
    value: ValueId,
    scale: Option<ValueId>,
    zero: Option<ValueId>,
) -> Result<()> {
    done(b.finish(n, Op::QuantizeLinear(per_tensor()), vec![Some(value), scale, zero]))
}

fn quantized_binary(b: &mut GraphBuilder, n: &NodeReader, op: BinaryOp) -> Result<()> {
    // The operator of the graph takes no absent zero points; with one absent the composed form does.
    if (0..8).all(|i| n.input(i).is_some()) {
        return done(b.finish(n, Op::QLinearBinary { op, activation: None }, n.inputs.clone()));
    }
    let x = dequantized(b, n, "a", [n.input(0), n.input(1), n.input(2)])?;
    let y = dequantized(b, n, "b", [n.input(3), n.input(4), n.input(5)])?;
    let z = b.emit(n, "c", Op::Binary(op), &[x, y]);
    quantized(b, n, z, n.input(6), n.input(7))
}

/// `(a, a_scale, a_zero, b, b_scale, b_zero, c?, y_scale?, y_zero?)`: the bias is i32 in units of the product's scale.
fn qgemm(b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let attributes = GemmAttributes {
        alpha: n.float("alpha", 1.0)?,
        beta: 1.0,
        trans_a: n.flag("transA", false)?,
        trans_b: n.flag("transB", false)?,
    };
    let (a_scale, b_scale) = (n.required(1, "a_scale")?, n.required(4, "b_scale")?);
    if b.dims(b_scale).is_none_or(|d| d.iter().product::<usize>() != 1) {
        return Err(n.unsupported("scales per column"));
    }
    let x = dequantized(b, n, "a", [n.input(0), n.input(1), n.input(2)])?;
    let y = dequantized(b, n, "b", [n.input(3), n.input(4), n.input(5)])?;
    let mut operands = vec![Some(x), Some(y)];
    if let Some(c) = n.input(6) {
        let mut scale = b.emit(n, "c_scale", Op::Binary(BinaryOp::Mul), &[a_scale, b_scale]);
        if attributes.alpha != 1.0 {
            let alpha = b.constant(n, "alpha", Tensor::scalar(attributes.alpha));
            scale = b.emit(n, "c_scale_alpha", Op::Binary(BinaryOp::Mul), &[scale, alpha]);
        }
        let c = b.emit(n, "c_float", Op::Cast { to: DType::F32, saturate: true }, &[c]);
        operands.push(Some(b.emit(n, "c", Op::Binary(BinaryOp::Mul), &[c, scale])));
    }
    if n.input(7).is_none() {
        return done(b.finish(n, Op::Gemm(attributes), operands));
    }
    let product = b.emit_many(n, "product", Op::Gemm(attributes), &operands, 1)[0];
    quantized(b, n, product, n.input(7), n.input(8))
}

fn scaled_product(
    b: &mut GraphBuilder,
    n: &NodeReader,
    product: ValueId,
    scales: [ValueId; 2],
    bias: Option<ValueId>,
) -> Result<()> {
    let product = b.emit(n, "real", Op::Cast { to: DType::F32, saturate: true }, &[product]);
    let scale = b.emit(n, "scale", Op::Binary(BinaryOp::Mul), &scales);
    match bias {
        None => done(b.finish(n, Op::Binary(BinaryOp::Mul), vec![Some(product), Some(scale)])),
        Some(bias) => {
            let product = b.emit(n, "scaled", Op::Binary(BinaryOp::Mul), &[product, scale]);
            done(b.finish(n, Op::Binary(BinaryOp::Add), vec![Some(product), Some(bias)]))
        }
    }
}
