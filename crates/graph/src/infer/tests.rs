//! Tables of operators, operands and results.

use super::{Fact, infer_node};
use crate::*;

/// Reads `f32[2,n,?]`, `i64[2]=[1,-1]` (a constant) or `_` (absent).
fn operand(text: &str) -> Option<(ValueType, Option<Tensor>)> {
    if text == "_" {
        return None;
    }
    let (ty, elements) = match text.split_once('=') {
        Some((ty, elements)) => (ty, Some(elements)),
        None => (text, None),
    };
    let graph = Graph::from_text(&format!("graph \"g\" {{\n%0 \"x\": {ty} = input\nreturn (%0)\n}}"))
        .unwrap_or_else(|e| panic!("{text}: {e}"));
    let ty = graph.value(graph.inputs[0]).ty.clone();
    let value = elements.map(|elements| {
        let t = ty.tensor().expect("a constant is a tensor");
        let dims = t.dims().expect("a constant has a shape");
        let numbers: Vec<f64> = serde_json::from_str(elements).unwrap();
        match t.dtype {
            DType::I64 => {
                // Written as text, so that the ends of the range survive.
                Tensor::from_slice(&dims, &serde_json::from_str::<Vec<i64>>(elements).unwrap())
            }
            DType::I32 => Tensor::from_slice(&dims, &numbers.iter().map(|&x| x as i32).collect::<Vec<_>>()),
            DType::F32 => Tensor::from_slice(&dims, &numbers.iter().map(|&x| x as f32).collect::<Vec<_>>()),
            DType::Bool => Tensor::from_bools(&dims, &numbers.iter().map(|&x| x != 0.0).collect::<Vec<_>>()),
            d => panic!("constants of {d} are not written in these tables"),
        }
    });
    Some((ty, value))
}

fn infer(op: Op, inputs: &[&str], outputs: usize) -> Result<String, GraphError> {
    let operands: Vec<_> = inputs.iter().map(|t| operand(t)).collect();
    let facts: Vec<Option<Fact<'_>>> =
        operands.iter().map(|o| o.as_ref().map(|(ty, value)| Fact::new(ty, value.as_ref()))).collect();
    let node = Node { name: "n".into(), op, inputs: vec![None; inputs.len()], outputs: vec![None; outputs] };
    let types = infer_node(&node, &facts)?;
    Ok(types.iter().map(ValueType::to_string).collect::<Vec<_>>().join(" "))
}

/// Expects result types (separated by blanks).
#[track_caller]
fn check(op: Op, inputs: &[&str], expected: &str) {
    let outputs = expected.split(' ').count();
    let shown = format!("{op:?}");
    match infer(op, inputs, outputs) {
        Ok(found) => assert_eq!(found, expected, "{shown} of {inputs:?}"),
        Err(e) => panic!("{shown} of {inputs:?}: {e}, expected {expected}"),
    }
}

/// Expects an error that contains `part`.
#[track_caller]
fn refuse(op: Op, inputs: &[&str], part: &str) {
    let shown = format!("{op:?}");
    match infer(op, inputs, 1) {
        Ok(found) => panic!("{shown} of {inputs:?} yields {found}, expected a refusal"),
        Err(e) => {
            let text = e.to_string();
            assert!(text.contains(part) && text.contains("node \"n\""), "{shown}: {text}, expected {part:?}");
        }
    }
}

fn json(text: &str) -> Op {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"))
}

#[test]
fn elementwise() {
    let unary = |u| Op::Unary(u);
    check(unary(UnaryOp::Relu), &["f32[n,3]"], "f32[n,3]");
    check(unary(UnaryOp::IsNan), &["f16[2]"], "bool[2]");
    check(unary(UnaryOp::Identity), &["seq(f32[*])"], "seq(f32[*])");
    check(unary(UnaryOp::Exp), &["?"], "?");
    refuse(unary(UnaryOp::Exp), &["i32[2]"], "x has element type i32, expected a floating-point type");
    refuse(unary(UnaryOp::Exp), &["seq(f32[*])"], "expected a tensor");
    refuse(unary(UnaryOp::Exp), &["_"], "operand 0 (x) is missing");
    refuse(unary(UnaryOp::IsNan), &["string[2]"], "string");
    let binary = |b| Op::Binary(b);
    check(binary(BinaryOp::Add), &["f32[2,1,3]", "f32[4,1]"], "f32[2,4,3]");
    check(binary(BinaryOp::Add), &["f32[n,1]", "f32[n,5]"], "f32[n,5]");
    check(binary(BinaryOp::Add), &["f32[n,m]", "f32[?,1]"], "f32[?,m]");
    check(binary(BinaryOp::Add), &["f32[*]", "f32[2]"], "f32[*]");
    check(binary(BinaryOp::Less), &["i64[2]", "i64[]"], "bool[2]");
    check(binary(BinaryOp::Pow), &["f32[2]", "i64[]"], "f32[2]");
    refuse(binary(BinaryOp::Add), &["f32[2]", "f64[2]"], "a has element type f32 and b f64");
    refuse(binary(BinaryOp::Add), &["f32[2]", "f32[3]"], "does not broadcast");
    refuse(binary(BinaryOp::And), &["f32[2]", "f32[2]"], "expected bool");
    refuse(binary(BinaryOp::PRelu), &["f32[2]", "f32[3,2]"], "slope");
    check(Op::Variadic(VariadicOp::Max), &["f32[2,1]", "f32[3]", "f32[]"], "f32[2,3]");
    check(Op::Where, &["bool[2,1]", "i8[3]", "i8[]"], "i8[2,3]");
    check(Op::Clip, &["f32[2]", "_", "f32[]"], "f32[2]");
    refuse(Op::Clip, &["f32[2]", "f32[2]"], "expected one element");
    check(Op::Cast { to: DType::BF16, saturate: true }, &["string[n]"], "bf16[n]");
    check(Op::Dropout { seed: None }, &["f32[2]"], "f32[2] bool[2]");
    let add = ElementwiseStep::Binary { op: BinaryOp::Add, operand: 1, swapped: false };
    check(
        Op::Elementwise(vec![ElementwiseStep::Unary(UnaryOp::Exp), add]),
        &["f32[2,3]", "f32[3]"],
        "f32[2,3]",
    );
    refuse(Op::Elementwise(vec![add]), &["f32[3]", "f32[2,3]"], "does not broadcast to [3]");
    refuse(Op::Elementwise(vec![add]), &["f32[3]"], "operand 1 (extra operand) is missing");
}

#[test]
fn products() {
    let mm = || Op::MatMul(MatMulAttributes::default());
    check(mm(), &["f32[n,4,5]", "f32[5,6]"], "f32[n,4,6]");
    check(mm(), &["f32[5]", "f32[2,5,6]"], "f32[2,6]");
    check(mm(), &["f32[5]", "f32[5]"], "f32[]");
    check(mm(), &["f32[2,3,4,5]", "f32[3,5,1]", "f32[1]", "f32[2,3,4,1]"], "f32[2,3,4,1]");
    check(
        Op::MatMul(MatMulAttributes { trans_b: true, ..Default::default() }),
        &["f32[4,5]", "f32[6,5]"],
        "f32[4,6]",
    );
    check(mm(), &["f32[4,5]", "f32[5,6]", "f32[6]", "_", "f32[6]"], "f32[4,6]");
    refuse(mm(), &["f32[4,5]", "f32[6,5]"], "inner sizes 5 and 6 differ");
    refuse(mm(), &["f32[4,5]", "f32[]"], "expected rank at least 1");
    refuse(mm(), &["f32[4,5]", "f32[5,6]", "f32[5]"], "bias");
    refuse(mm(), &["f32[4,5]", "f32[5,6]", "_", "f32[6]"], "residual");
    refuse(mm(), &["f32[4,5]", "f32[5,6]", "_", "_", "f32[5]"], "weight_scale");
    let gemm = |trans_a, trans_b| Op::Gemm(GemmAttributes { alpha: 1.0, beta: 1.0, trans_a, trans_b });
    check(gemm(true, true), &["f32[5,n]", "f32[6,5]", "f32[6]"], "f32[n,6]");
    check(gemm(false, false), &["f32[*]", "f32[5,6]"], "f32[?,6]");
    refuse(gemm(false, false), &["f32[2,5]", "f32[5,6]", "f32[5]"], "c [5]");
    refuse(gemm(false, false), &["f32[2,5,1]", "f32[5,6]"], "expected rank 2");
    check(Op::MatMulInteger, &["u8[2,3]", "i8[3,4]"], "i32[2,4]");
    let q = Op::QLinearMatMul(MatMulAttributes::default());
    check(q, &["u8[2,3]", "f32[]", "u8[]", "i8[3,4]", "f32[]", "i8[]", "f32[]", "i8[]"], "i8[2,4]");
    check(Op::Det, &["f32[n,3,3]"], "f32[n]");
    refuse(Op::Det, &["f32[2,3]"], "square");
    let einsum = |e: &str| Op::Einsum { equation: e.into() };
    check(einsum("bij, bjk -> bik"), &["f32[n,2,3]", "f32[n,3,4]"], "f32[n,2,4]");
    check(einsum("...ii->...i"), &["f32[2,3,3]"], "f32[2,3]");
    check(einsum("i,j"), &["f32[2]", "f32[3]"], "f32[2,3]");
    check(einsum("ij->"), &["f32[*]"], "f32[]");
    refuse(einsum("ij,jk"), &["f32[2,3]", "f32[4,5]"], "axis 'j'");
    refuse(einsum("ij"), &["f32[2,3,4]"], "2 letters");
    refuse(einsum("ij,k"), &["f32[2,3]"], "2 operands");
}

fn conv(f: impl FnOnce(&mut ConvAttributes)) -> ConvAttributes {
    let mut a = ConvAttributes::default();
    f(&mut a);
    a
}

#[test]
fn convolution() {
    let plain = || Op::Conv(ConvAttributes::default());
    check(plain(), &["f32[n,3,224,224]", "f32[32,3,3,3]", "f32[32]"], "f32[n,32,222,222]");
    let strided = conv(|a| (a.strides, a.padding) = (vec![2, 2], Padding::SameUpper));
    check(Op::Conv(strided), &["f32[1,3,7,8]", "f32[8,3,3,3]"], "f32[1,8,4,4]");
    let same = || conv(|a| a.padding = Padding::Explicit(vec![1; 4]));
    check(Op::Conv(same()), &["f32[1,3,h,w]", "f32[8,3,3,3]"], "f32[1,8,h,w]");
    check(Op::Conv(same()), &["f32[1,3,?,6]", "f32[8,3,5,3]"], "f32[1,8,?,6]");
    let last = conv(|a| (a.layout, a.groups) = (Layout::ChannelsLast, 4));
    check(
        Op::Conv(last.clone()),
        &["f32[1,5,5,4]", "f32[8,1,3,3]", "_", "f32[1,3,3,8]", "f32[8]"],
        "f32[1,3,3,8]",
    );
    refuse(Op::Conv(last), &["f32[1,5,5,4]", "f32[8,1,3,3]", "_", "f32[1,8,3,3]"], "residual");
    refuse(plain(), &["f32[1,4,5,5]", "f32[8,3,3,3]"], "x has 4 channels in 1 groups");
    refuse(plain(), &["f32[1,3,5,5]", "f32[8,3,3]"], "expected the same rank");
    refuse(plain(), &["f32[1,3,2,2]", "f32[8,3,3,3]"], "does not fit");
    refuse(plain(), &["f32[1,3,5,5]", "f32[8,3,3,3]", "f32[9]"], "bias");
    refuse(Op::Conv(conv(|a| a.kernel = vec![5, 5])), &["f32[1,3,9,9]", "f32[8,3,3,3]"], "contradicts");
    refuse(Op::Conv(conv(|a| a.groups = 3)), &["f32[1,3,9,9]", "f32[8,1,3,3]"], "multiple of 3");
    check(
        Op::ConvInteger(ConvAttributes::default()),
        &["u8[1,1,3,3]", "u8[1,1,2,2]", "u8[]"],
        "i32[1,1,2,2]",
    );
    let operands =
        ["u8[1,3,5,5]", "f32[]", "u8[]", "i8[8,3,3,3]", "f32[8]", "i8[8]", "f32[]", "u8[]", "i32[8]"];
    check(Op::QLinearConv(ConvAttributes::default()), &operands, "u8[1,8,3,3]");
    let transposed = |f: &dyn Fn(&mut ConvTransposeAttributes)| {
        let mut a = ConvTransposeAttributes {
            conv: ConvAttributes::default(),
            output_padding: Vec::new(),
            output_shape: Vec::new(),
        };
        f(&mut a);
        Op::ConvTranspose(a)
    };
    check(transposed(&|_| ()), &["f32[1,1,3,3]", "f32[1,2,3,3]"], "f32[1,2,5,5]");
    let shape = transposed(&|a| (a.conv.strides, a.output_shape) = (vec![3, 2], vec![10, 8]));
    check(shape, &["f32[1,1,3,3]", "f32[1,2,3,3]"], "f32[1,2,10,8]");
    let grouped = transposed(&|a| (a.conv.groups, a.conv.layout) = (2, Layout::ChannelsLast));
    check(grouped, &["f32[1,3,3,4]", "f32[4,2,3,3]", "f32[4]"], "f32[1,5,5,4]");
    refuse(transposed(&|_| ()), &["f32[1,2,3,3]", "f32[1,2,3,3]"], "x has 2 channels");
    let deform = Op::DeformConv { conv: ConvAttributes::default(), offset_groups: 1 };
    check(
        deform.clone(),
        &["f32[1,1,3,3]", "f32[1,1,2,2]", "f32[1,8,2,2]", "f32[1]", "f32[1,4,2,2]"],
        "f32[1,1,2,2]",
    );
    refuse(deform, &["f32[1,1,3,3]", "f32[1,1,2,2]", "f32[1,4,2,2]"], "offset");
    let col2im = Op::Col2Im { dilations: vec![], pads: vec![], strides: vec![] };
    check(col2im.clone(), &["f32[1,5,5]", "i64[2]=[5,5]", "i64[2]=[1,5]"], "f32[1,1,5,5]");
    refuse(col2im, &["f32[1,5,4]", "i64[2]=[5,5]", "i64[2]=[1,5]"], "4 columns");
}

fn max_pool(f: impl FnOnce(&mut PoolAttributes)) -> Op {
    let mut a = PoolAttributes {
        kind: PoolKind::Max,
        kernel: vec![2, 2],
        strides: vec![2, 2],
        dilations: Vec::new(),
        padding: Padding::Valid,
        ceil_mode: false,
        count_include_pad: false,
        storage_order_column: false,
        layout: Layout::ChannelsFirst,
    };
    f(&mut a);
    Op::Pool(a)
}

#[test]
fn pooling() {
    check(max_pool(|_| ()), &["f32[n,3,7,8]"], "f32[n,3,3,4] i64[n,3,3,4]");
    check(max_pool(|a| a.ceil_mode = true), &["u8[n,3,7,8]"], "u8[n,3,4,4]");
    check(max_pool(|a| a.layout = Layout::ChannelsLast), &["f32[1,7,8,3]"], "f32[1,3,4,3]");
    refuse(max_pool(|a| a.kind = PoolKind::Average), &["i8[1,1,4,4]"], "floating-point");
    refuse(max_pool(|_| ()), &["f32[1,3,7]"], "expected rank 4");
    refuse(max_pool(|a| a.strides = vec![1]), &["f32[1,3,7,7]"], "1 strides");
    let global = |layout| Op::GlobalPool { kind: PoolKind::Average, layout };
    check(global(Layout::ChannelsFirst), &["f32[n,c,7,w]"], "f32[n,c,1,1]");
    check(global(Layout::ChannelsLast), &["f32[n,7,w,c]"], "f32[n,1,1,c]");
    let unpool = Op::MaxUnpool { kernel: vec![2, 2], strides: vec![2, 2], pads: vec![0; 4] };
    check(unpool.clone(), &["f32[1,1,2,2]", "i64[1,1,2,2]"], "f32[1,1,4,4]");
    check(unpool, &["f32[1,1,2,2]", "i64[1,1,2,2]", "i64[4]=[1,1,5,5]"], "f32[1,1,5,5]");
    let roi = Op::MaxRoiPool { pooled_shape: [2, 3], spatial_scale: 1.0 };
    check(roi, &["f32[1,7,9,9]", "f32[r,5]"], "f32[r,7,2,3]");
}

#[test]
fn normalisation_and_reduction() {
    let bn = Op::BatchNorm { epsilon: 1e-5, momentum: 0.9, training: true };
    check(bn.clone(), &["f32[2,3,4]", "f32[3]", "f32[3]", "f32[3]", "f32[3]"], "f32[2,3,4] f32[3] f32[3]");
    refuse(bn, &["f32[2,3,4]", "f32[3]", "f32[4]", "f32[3]", "f32[3]"], "bias has shape [4], expected [3]");
    let ln = |axis| Op::LayerNorm { axis, epsilon: 1e-5 };
    check(ln(-1), &["f16[n,3,4]", "f16[4]", "f16[4]"], "f16[n,3,4] f32[n,3,1] f32[n,3,1]");
    refuse(ln(-1), &["f32[2,3,4]", "f32[3]"], "normalised dimensions [4]");
    refuse(ln(3), &["f32[2,3,4]", "f32[4]"], "axis is 3, expected -3 to 2");
    check(Op::RmsNorm { axis: 1, epsilon: 1e-5 }, &["f32[n,3,4]", "f32[3,4]"], "f32[n,3,4]");
    check(Op::GroupNorm { groups: 2, epsilon: 1e-5 }, &["f32[n,4,h]", "f32[4]", "f32[4]"], "f32[n,4,h]");
    refuse(Op::GroupNorm { groups: 3, epsilon: 1e-5 }, &["f32[n,4,h]", "f32[4]", "f32[4]"], "multiple of 3");
    check(Op::Softmax { axis: -1, log: false }, &["f32[n,3]"], "f32[n,3]");
    refuse(Op::Softmax { axis: 2, log: false }, &["f32[n,3]"], "axis is 2");
    let reduce = |keep_dims, noop| Op::Reduce { op: ReduceOp::Sum, keep_dims, noop_with_empty_axes: noop };
    check(reduce(true, false), &["f32[n,3,4]", "i64[2]=[0,-1]"], "f32[1,3,1]");
    check(reduce(false, false), &["f32[n,3,4]", "i64[1]=[1]"], "f32[n,4]");
    check(reduce(false, false), &["f32[n,3,4]"], "f32[]");
    check(reduce(true, true), &["f32[n,3]", "i64[0]=[]"], "f32[n,3]");
    check(reduce(true, false), &["f32[n,3]", "i64[k]"], "f32[?,?]");
    check(reduce(false, false), &["f32[n,3]", "i64[1]"], "f32[?]");
    check(reduce(false, false), &["f32[n,3]", "i64[k]"], "f32[*]");
    refuse(reduce(true, false), &["f32[2,3]", "i64[2]=[1,-1]"], "given twice");
    refuse(reduce(true, false), &["f32[2,3]", "f32[1]"], "integer");
    let arg = |keep_dims| Op::ArgReduce { largest: true, axis: 1, keep_dims, select_last_index: false };
    check(arg(false), &["f32[n,3]"], "i64[n]");
    check(arg(true), &["f32[n,3]"], "i64[n,1]");
    check(Op::CumSum { exclusive: false, reverse: false }, &["f32[n,3]", "i32[]=[1]"], "f32[n,3]");
}

#[test]
fn reshaping() {
    let reshape = |allow_zero| Op::Reshape { allow_zero };
    check(reshape(false), &["f32[n,3,4]", "i64[2]=[0,-1]"], "f32[n,12]");
    check(reshape(false), &["f32[n,12]", "i64[3]=[-1,3,4]"], "f32[n,3,4]");
    check(reshape(false), &["f32[2,3,4]", "i64[2]=[4,-1]"], "f32[4,6]");
    check(reshape(true), &["f32[0,3]", "i64[2]=[3,0]"], "f32[3,0]");
    check(reshape(false), &["f32[0,3]", "i64[2]=[0,-1]"], "f32[0,3]");
    check(reshape(false), &["f32[n,3]", "i64[1]=[-1]"], "f32[?]");
    check(reshape(false), &["f32[2,3]", "i64[3]"], "f32[?,?,?]");
    check(reshape(false), &["f32[2,3]", "i64[k]"], "f32[*]");
    check(
        reshape(false),
        &["f32[6]", "i64[0]=[]"].map(|t| if t == "f32[6]" { "f32[1]" } else { t }),
        "f32[]",
    );
    refuse(reshape(false), &["f32[2,3]", "i64[1]=[5]"], "has 6 elements");
    refuse(reshape(false), &["f32[2,3]", "i64[2]=[-1,-1]"], "two sizes of -1");
    refuse(reshape(false), &["f32[2,3]", "i64[2]=[-1,4]"], "do not divide");
    refuse(reshape(false), &["f32[2]", "i64[2]=[2,0]"], "copied from x");
    refuse(reshape(false), &["f32[2]", "i64[1]=[-2]"], "expected at least 0");
    check(Op::Flatten { axis: 1 }, &["f32[n,3,4]"], "f32[n,12]");
    check(Op::Flatten { axis: 0 }, &["f32[2,3]"], "f32[1,6]");
    check(Op::Flatten { axis: 2 }, &["f32[2,n]"], "f32[?,1]");
    check(Op::Squeeze, &["f32[1,3,1]", "i64[1]=[-1]"], "f32[1,3]");
    check(Op::Squeeze, &["f32[1,3,1]"], "f32[3]");
    check(Op::Squeeze, &["f32[1,n,1]"], "f32[*]");
    refuse(Op::Squeeze, &["f32[1,3]", "i64[1]=[1]"], "does not have size 1");
    check(Op::Unsqueeze, &["f32[n,3]", "i64[2]=[0,-1]"], "f32[1,n,3,1]");
    check(Op::Unsqueeze, &["f32[n,3]", "i64[2]"], "f32[?,?,?,?]");
    check(Op::Transpose { perm: Some(vec![0, 2, 1]) }, &["f32[n,2,3]"], "f32[n,3,2]");
    check(Op::Transpose { perm: None }, &["f32[n,2,3]"], "f32[3,2,n]");
    refuse(Op::Transpose { perm: Some(vec![0, 0]) }, &["f32[2,2]"], "not a permutation");
    check(Op::Expand, &["f32[3,1]", "i64[3]=[2,1,6]"], "f32[2,3,6]");
    check(Op::Expand, &["f32[3,1]", "i64[3]"], "f32[?,3,?]");
    check(Op::Tile, &["f32[2,n]", "i64[2]=[3,1]"], "f32[6,n]");
    refuse(Op::Tile, &["f32[2,3]", "i64[1]=[3]"], "1 repeats");
}

#[test]
fn joining_and_cutting() {
    let concat = |axis| Op::Concat { axis };
    check(concat(1), &["f32[n,2]", "f32[n,3]"], "f32[n,5]");
    check(concat(0), &["f32[n,2]", "f32[3,2]"], "f32[?,2]");
    check(concat(-1), &["f32[2,2]", "f32[*]"], "f32[2,?]");
    refuse(concat(0), &["f32[1,2]", "f32[1,3]"], "differ beside axis 0");
    check(Op::Split { axis: 0 }, &["f32[7]"], "f32[3] f32[3] f32[1]");
    check(Op::Split { axis: 1 }, &["f32[n,5]", "i64[2]=[2,3]"], "f32[n,2] f32[n,3]");
    refuse(Op::Split { axis: 0 }, &["f32[5]", "i64[1]=[4]"], "do not add up to 5");
    let slice = |inputs: &[&str], expected: &str| check(Op::Slice, inputs, expected);
    slice(&["f32[10,n]", "i64[1]=[2]", "i64[1]=[-1]"], "f32[7,n]");
    slice(
        &["f32[10]", "i64[1]=[-1]", "i64[1]=[-9223372036854775808]", "i64[1]=[0]", "i64[1]=[-2]"],
        "f32[5]",
    );
    slice(&["f32[n]", "i64[1]=[0]", "i64[1]=[9223372036854775807]"], "f32[n]");
    slice(&["f32[n,4]", "i64[1]=[1]", "i64[1]=[3]", "i64[1]=[1]"], "f32[n,2]");
    slice(&["f32[5,4]", "i64[1]", "i64[1]", "i64[1]=[1]"], "f32[5,?]");
    slice(&["f32[3]", "i64[1]=[5]", "i64[1]=[9]"], "f32[0]");
    slice(&["f32[0]", "i64[1]=[-1]", "i64[1]=[-9]", "_", "i64[1]=[-1]"], "f32[0]");
    refuse(Op::Slice, &["f32[3]", "i64[1]=[0]", "i64[1]=[3]", "_", "i64[1]=[0]"], "step is 0");
    let pad = |mode| Op::Pad { mode };
    check(pad(PadMode::Constant), &["f32[2,n]", "i64[4]=[1,0,2,0]"], "f32[5,n]");
    check(pad(PadMode::Edge), &["f32[2,3]", "i64[2]=[-1,2]", "_", "i64[1]=[1]"], "f32[2,4]");
    refuse(pad(PadMode::Constant), &["f32[2]", "i64[2]=[-3,0]"], "expected at least 0");
    refuse(pad(PadMode::Constant), &["f32[2]", "i64[3]=[0,0,0]"], "3 pads for 1 axes");
    let gather = |axis| Op::Gather { axis };
    check(gather(1), &["f32[n,5,6]", "i64[2,3]"], "f32[n,2,3,6]");
    check(gather(0), &["i64[4]", "i64[]"], "i64[]");
    refuse(gather(0), &["f32[3]", "i64[1]=[3]"], "index 3 is outside");
    check(Op::GatherElements { axis: 1 }, &["f32[3,5]", "i64[3,9]"], "f32[3,9]");
    check(Op::GatherNd { batch_dims: 1 }, &["f32[2,3,4]", "i64[2,5,1]"], "f32[2,5,4]");
    check(Op::GatherNd { batch_dims: 0 }, &["f32[2,3,4]", "i64[k]"], "f32[*]");
    refuse(Op::GatherNd { batch_dims: 0 }, &["f32[2,3]", "i64[5,3]"], "vectors of 3");
    let reduction = ScatterReduction::None;
    check(Op::ScatterNd { reduction }, &["f32[4,5]", "i64[3,1]", "f32[3,5]"], "f32[4,5]");
    refuse(Op::ScatterNd { reduction }, &["f32[4,5]", "i64[3,1]", "f32[3,4]"], "updates");
    let scatter = Op::ScatterElements { axis: 0, reduction };
    check(scatter, &["f32[4,5]", "i64[3,1]", "f32[3,1]"], "f32[4,5]");
    check(Op::DepthToSpace { block: 2, crd: true }, &["f32[n,8,2,3]"], "f32[n,2,4,6]");
    check(Op::SpaceToDepth { block: 2 }, &["f32[n,2,4,6]"], "f32[n,8,2,3]");
    refuse(Op::DepthToSpace { block: 3, crd: true }, &["f32[1,8,2,3]"], "multiple of 9");
    check(
        Op::TopK { axis: -1, largest: true, sorted: true },
        &["f32[n,9]", "i64[1]=[3]"],
        "f32[n,3] i64[n,3]",
    );
    refuse(Op::TopK { axis: 0, largest: true, sorted: true }, &["f32[2]", "i64[1]=[3]"], "k is 3");
    check(Op::OneHot { axis: -1 }, &["i64[n]", "i64[]=[5]", "f32[2]"], "f32[n,5]");
    check(Op::CenterCropPad { axes: Some(vec![1]) }, &["f32[n,9]", "i64[1]=[4]"], "f32[n,4]");
}

#[test]
fn sizes_from_values() {
    check(Op::Shape { start: 1, end: Some(-1) }, &["f32[n,3,4]"], "i64[1]");
    check(Op::Shape { start: 0, end: None }, &["f32[*]"], "i64[?]");
    check(Op::Size, &["f32[n]"], "i64[]");
    check(Op::Range, &["i64[]=[10]", "i64[]=[4]", "i64[]=[-2]"], "i64[3]");
    check(Op::Range, &["f32[]=[0]", "f32[]=[1]", "f32[]=[0.3]"], "f32[4]");
    check(Op::Range, &["i64[]", "i64[]=[4]", "i64[]=[1]"], "i64[?]");
    refuse(Op::Range, &["i64[]=[1]", "i64[]=[4]", "i64[]=[0]"], "delta is 0");
    let fill = Op::ConstantOfShape { value: Tensor::from_slice(&[1], &[1f32]) };
    check(fill.clone(), &["i64[2]=[2,3]"], "f32[2,3]");
    check(fill.clone(), &["i64[2]"], "f32[?,?]");
    refuse(fill.clone(), &["i64[1]=[-1]"], "expected at least 0");
    refuse(fill, &["i64[2]=[4611686018427387904,4]"], "too large");
    check(Op::NonZero, &["f32[2,n]"], "i64[2,?]");
    check(Op::Compress { axis: Some(1) }, &["f32[2,5]", "bool[5]"], "f32[2,?]");
    check(Op::Compress { axis: None }, &["f32[2,2]", "bool[5]=[1,0,1,1,1]"], "f32[3]");
    check(Op::Unique { axis: None, sorted: true }, &["f32[2,3]"], "f32[?] i64[?] i64[6] i64[?]");
    let nms = Op::NonMaxSuppression { center_point_box: false };
    check(nms.clone(), &["f32[1,6,4]", "f32[1,2,6]"], "i64[?,3]");
    refuse(nms, &["f32[1,6,4]", "f32[1,2,7]"], "number of boxes");
    let resize = |f: &dyn Fn(&mut ResizeAttributes)| {
        let mut a = ResizeAttributes {
            mode: ResizeMode::Nearest,
            coordinates: CoordinateMode::HalfPixel,
            nearest: NearestMode::Floor,
            cubic_coeff_a: -0.75,
            exclude_outside: false,
            extrapolation_value: 0.0,
            antialias: false,
            axes: None,
            aspect_ratio: AspectRatio::Stretch,
        };
        f(&mut a);
        Op::Resize(a)
    };
    check(resize(&|_| ()), &["f32[n,3,4,5]", "_", "f32[4]=[1,1,2,0.5]"], "f32[n,3,8,2]");
    check(resize(&|_| ()), &["f32[1,1,4,5]", "_", "_", "i64[4]=[1,1,7,8]"], "f32[1,1,7,8]");
    check(
        resize(&|a| a.axes = Some(vec![2, 3])),
        &["f32[n,c,4,5]", "_", "_", "i64[2]=[7,8]"],
        "f32[n,c,7,8]",
    );
    let keep = |a: &mut ResizeAttributes| {
        (a.axes, a.aspect_ratio) = (Some(vec![2, 3]), AspectRatio::NotLarger);
    };
    check(resize(&keep), &["f32[1,1,2,4]", "_", "_", "i64[2]=[7,8]"], "f32[1,1,4,8]");
    refuse(resize(&|_| ()), &["f32[1,2]", "_", "f32[2]=[-1,1]"], "expected above 0");
    refuse(resize(&|_| ()), &["f32[1,2]"], "either scales or sizes");
}

#[test]
fn attention() {
    let a = |q_num_heads, kv_num_heads| {
        Op::Attention(AttentionAttributes {
            causal: false,
            q_num_heads,
            kv_num_heads,
            scale: None,
            softcap: 0.0,
            qk_output: QkOutput::Raw,
            softmax_precision: None,
        })
    };
    check(
        a(0, 0),
        &["f32[n,4,5,8]", "f32[n,2,6,8]", "f32[n,2,6,10]", "f32[5,9]", "f32[n,2,3,8]", "f32[n,2,3,10]"],
        "f32[n,4,5,10] f32[n,2,9,8] f32[n,2,9,10] f32[n,4,5,9]",
    );
    check(a(4, 2), &["f32[1,5,32]", "f32[1,6,16]", "f32[1,6,20]"], "f32[1,5,40] f32[1,2,6,8]");
    refuse(a(0, 0), &["f32[1,3,5,8]", "f32[1,2,6,8]", "f32[1,2,6,8]"], "not a multiple");
    refuse(a(0, 0), &["f32[1,2,5,8]", "f32[1,2,6,9]", "f32[1,2,6,8]"], "head sizes");
    refuse(a(0, 0), &["f32[1,5,8]", "f32[1,6,8]", "f32[1,6,8]"], "heads is not given");
    refuse(a(0, 0), &["f32[1,2,5,8]", "f32[1,2,6,8]", "f32[1,2,6,8]", "f32[4,6]"], "mask");
    let rope = Op::RotaryEmbedding { interleaved: false, num_heads: 0, rotary_dim: 0 };
    check(rope, &["f32[2,4,3,8]", "f32[50,4]", "f32[50,4]", "i64[2,3]"], "f32[2,4,3,8]");
}

#[test]
fn recurrent_layers() {
    let a = |direction, batch_first| RecurrentAttributes {
        hidden_size: 5,
        direction,
        activations: Vec::new(),
        clip: None,
        batch_first,
        input_forget: false,
        linear_before_reset: false,
    };
    let lstm = Op::Lstm(a(Direction::Bidirectional, false));
    check(
        lstm.clone(),
        &["f32[t,b,3]", "f32[2,20,3]", "f32[2,20,5]", "f32[2,40]", "i32[b]"],
        "f32[t,2,b,5] f32[2,b,5] f32[2,b,5]",
    );
    refuse(lstm, &["f32[t,b,3]", "f32[1,20,3]", "f32[2,20,5]"], "w has shape [1,20,3], expected [2,20,3]");
    let gru = Op::Gru(a(Direction::Forward, true));
    check(gru, &["f32[2,7,3]", "f32[1,15,3]", "f32[1,15,5]"], "f32[2,7,1,5] f32[2,1,5]");
    let rnn = Op::Rnn(a(Direction::Reverse, false));
    check(
        rnn,
        &["f32[7,2,3]", "f32[1,5,3]", "f32[1,5,5]", "_", "_", "f32[1,2,5]"],
        "f32[7,1,2,5] f32[1,2,5]",
    );
}

#[test]
fn quantisation() {
    let a = QuantizeAttributes { axis: 1, block_size: 0, output_dtype: None, saturate: true };
    let q = || Op::QuantizeLinear(a.clone());
    check(q(), &["f32[n,3]", "f32[3]", "i8[3]"], "i8[n,3]");
    check(q(), &["f32[n,3]", "f32[]"], "u8[n,3]");
    refuse(q(), &["f32[n,3]", "f32[4]"], "scale");
    let blocked = QuantizeAttributes { block_size: 2, ..a.clone() };
    check(Op::DequantizeLinear(blocked), &["u4[4,3]", "f16[4,2]", "u4[4,2]"], "f16[4,3]");
    check(Op::DynamicQuantizeLinear, &["f32[n]"], "u8[n] f32[] u8[]");
    let operands = ["u8[2,1]", "f32[]", "u8[]", "u8[3]", "f32[]", "u8[]", "f32[]", "u8[]"];
    check(Op::QLinearBinary { op: BinaryOp::Add, activation: None }, &operands, "u8[2,3]");
    check(Op::QLinearUnary(UnaryOp::Sigmoid), &["i8[2]", "f32[]", "i8[]", "f32[]", "i8[]"], "i8[2]");
}

#[test]
fn the_rest() {
    let loss = |reduction| LossAttributes { reduction, ignore_index: None };
    check(Op::NllLoss(loss(LossReduction::None)), &["f32[n,5,6]", "i64[n,6]"], "f32[n,6]");
    let ce = Op::SoftmaxCrossEntropyLoss(loss(LossReduction::Mean));
    check(ce.clone(), &["f32[n,5]", "i64[n]", "f32[5]"], "f32[] f32[n,5]");
    refuse(ce, &["f32[2,5]", "i64[3]"], "labels");
    check(json(r#""StringConcat""#), &["string[2,1]", "string[3]"], "string[2,3]");
    check(Op::StringSplit { delimiter: None, maxsplit: None }, &["string[n]"], "string[n,?] i64[n]");
    check(Op::ImageDecode { format: PixelFormat::Gray }, &["u8[n]"], "u8[?,?,1]");
    check(Op::Dft { inverse: false, onesided: true }, &["f32[1,10,1]"], "f32[1,6,2]");
    check(
        Op::Dft { inverse: false, onesided: false },
        &["f32[1,10,2]", "i64[]=[8]", "i64[]=[1]"],
        "f32[1,8,2]",
    );
    check(Op::Stft { onesided: true }, &["f32[1,128,1]", "i64[]=[8]", "f32[16]"], "f32[1,15,9,2]");
    check(Op::Window { kind: WindowKind::Hann, periodic: true, dtype: DType::F32 }, &["i32[]=[9]"], "f32[9]");
    let grid = Op::GridSample { mode: ResizeMode::Linear, padding: GridPadding::Zeros, align_corners: false };
    check(grid, &["f32[n,c,4,4]", "f32[n,6,7,2]"], "f32[n,c,6,7]");
    check(Op::AffineGrid { align_corners: true }, &["f32[n,2,3]", "i64[4]=[2,3,5,6]"], "f32[2,5,6,2]");
    let scaler = MlOp::Scaler { offset: vec![0.0; 3], scale: vec![1.0] };
    check(Op::Ml(Box::new(scaler)), &["i64[n,3]"], "f32[n,3]");
    let zip = MlOp::ZipMap { labels: Labels::Ints(vec![1, 2]) };
    check(Op::Ml(Box::new(zip)), &["f32[n,2]"], "seq(map(i64,f32))");
    let linear = MlOp::LinearClassifier {
        coefficients: vec![0.0; 6],
        intercepts: vec![0.0; 3],
        labels: Labels::Strings(vec!["a".into(), "b".into(), "c".into()]),
        post_transform: PostTransform::None,
    };
    check(Op::Ml(Box::new(linear)), &["f32[n,2]"], "string[n] f32[n,3]");
}

#[test]
fn sequences_and_optionals() {
    check(Op::SequenceConstruct, &["f32[2,3]", "f32[4,3]"], "seq(f32[?,3])");
    refuse(Op::SequenceConstruct, &["f32[2]", "i64[2]"], "expected one type");
    check(Op::SequenceAt, &["seq(f32[n])", "i64[]"], "f32[n]");
    check(Op::SequenceInsert, &["seq(f32[*])", "f32[2]"], "seq(f32[*])");
    check(Op::SequenceLength, &["seq(f32[*])"], "i64[]");
    check(Op::ConcatFromSequence { axis: 0, new_axis: true }, &["seq(f32[2,3])"], "f32[?,2,3]");
    check(Op::SplitToSequence { axis: 0, keep_dims: false }, &["f32[n,3]"], "seq(f32[3])");
    check(Op::SplitToSequence { axis: 1, keep_dims: true }, &["f32[n,6]", "i64[]=[2]"], "seq(f32[n,2])");
    check(Op::OptionalConstruct { ty: None }, &["f32[2]"], "opt(f32[2])");
    check(Op::OptionalGetElement, &["opt(seq(f32[2]))"], "seq(f32[2])");
    check(Op::OptionalHasElement, &["opt(f32[2])"], "bool[]");
}

#[test]
fn control_flow() {
    // then: x + x; else: the shape of the captured constant.
    let branch = |shape: &[i64]| {
        let mut g = Graph::new("branch");
        let x = g.add_input("x", ValueType::Unknown);
        let s = g.add_constant("s", Tensor::from_slice(&[shape.len()], shape));
        let y = g.add_node("y", Op::Reshape { allow_zero: false }, &[x, s], 1)[0];
        g.outputs.push(y);
        Box::new(g)
    };
    let op = || Op::If { then_body: branch(&[2, -1]), else_body: branch(&[3, -1]) };
    check(op(), &["bool[]", "f32[12]"], "f32[?,?]");
    check(op(), &["bool[]=[1]", "f32[12]"], "f32[2,6]");
    refuse(op(), &["f32[]", "f32[12]"], "expected one bool");
    refuse(op(), &["bool[]"], "1 inputs, expected 0");

    // The carried value grows by one row a round; the scanned one keeps its shape.
    let mut body = Graph::new("body");
    let _iteration = body.add_input("i", ValueType::Unknown);
    let condition = body.add_input("c", ValueType::Unknown);
    let acc = body.add_input("acc", ValueType::Unknown);
    let row = body.add_input("row", ValueType::Unknown);
    let grown = body.add_node("grown", Op::Concat { axis: 0 }, &[acc, row], 1)[0];
    body.outputs = vec![condition, grown, row];
    let op = || Op::Loop { carried: 1, body: Box::new(body.clone()) };
    check(op(), &["i64[]=[7]", "_", "f32[0,3]", "f32[1,3]"], "f32[?,3] f32[7,1,3]");
    check(op(), &["i64[]", "bool[]", "f32[0,3]", "f32[1,3]"], "f32[?,3] f32[?,1,3]");
    let error = infer(op(), &["i64[]", "_", "f32[0,3]", "i64[1,3]"], 2).unwrap_err().to_string();
    assert!(error.contains("node \"grown\"") && error.contains("expected the same"), "{error}");

    let mut body = Graph::new("body");
    let state = body.add_input("state", ValueType::Unknown);
    let x = body.add_input("x", ValueType::Unknown);
    let sum = body.add_node("sum", Op::Binary(BinaryOp::Add), &[state, x], 1)[0];
    body.outputs = vec![sum, sum];
    let attributes = ScanAttributes {
        states: 1,
        scan_inputs: 1,
        input_axes: vec![1],
        input_reverse: vec![false],
        output_axes: vec![-1],
        output_reverse: vec![false],
    };
    let op = Op::Scan { attributes, body: Box::new(body) };
    check(op, &["f32[4]", "f32[4,t]"], "f32[4] f32[4,t]");
}

#[test]
fn bounds_of_data_dependent_results() {
    let bound = |op: Op, inputs: &[&str], outputs: usize| {
        let operands: Vec<_> = inputs.iter().map(|t| operand(t)).collect();
        let facts: Vec<Option<Fact<'_>>> =
            operands.iter().map(|o| o.as_ref().map(|(ty, value)| Fact::new(ty, value.as_ref()))).collect();
        let node =
            Node { name: "n".into(), op, inputs: vec![None; inputs.len()], outputs: vec![None; outputs] };
        super::upper_bound(&node, &facts)
            .map(|b| b.iter().map(TensorType::to_string).collect::<Vec<_>>().join(" "))
    };
    let some = |s: &str| Some(s.to_owned());
    assert_eq!(bound(Op::NonZero, &["f32[2,3]"], 1), some("i64[2,6]"));
    assert_eq!(bound(Op::NonZero, &["f32[2,n]"], 1), None);
    assert_eq!(bound(Op::Compress { axis: Some(-1) }, &["f32[2,5]", "bool[3]"], 1), some("f32[2,3]"));
    assert_eq!(bound(Op::Compress { axis: None }, &["f32[2,5]", "bool[n]"], 1), some("f32[10]"));
    let unique = Op::Unique { axis: Some(1), sorted: true };
    assert_eq!(bound(unique, &["f32[2,5]"], 4), some("f32[2,5] i64[5] i64[5] i64[5]"));
    let nms = |inputs: &[&str]| bound(Op::NonMaxSuppression { center_point_box: false }, inputs, 1);
    assert_eq!(nms(&["f32[1,6,4]", "f32[1,2,6]", "i64[]=[4]"]), some("i64[8,3]"));
    assert_eq!(nms(&["f32[1,6,4]", "f32[1,2,6]", "i64[]=[400]"]), some("i64[12,3]"));
    assert_eq!(nms(&["f32[1,6,4]", "f32[1,2,6]", "i64[]"]), some("i64[12,3]"));
    assert_eq!(bound(Op::Size, &["f32[2]"], 1), None);
}

/// Numbers that look random and are the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % sides.max(1) as u64) as usize
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.roll(from.len())].clone()
    }

    /// Mostly small, sometimes absurd.
    fn size(&mut self) -> usize {
        match self.roll(12) {
            0 => self.pick(&[0, usize::MAX, usize::MAX / 2, 1 << 33, 1 << 62, i64::MAX as usize]),
            _ => self.roll(5),
        }
    }

    fn int(&mut self) -> i64 {
        match self.roll(12) {
            0 => self.pick(&[i64::MIN, i64::MAX, i64::MIN + 1, -1 << 40, 1 << 40]),
            _ => self.roll(8) as i64 - 3,
        }
    }

    fn sizes(&mut self) -> Vec<usize> {
        (0..self.roll(5)).map(|_| self.size()).collect()
    }

    fn ints(&mut self) -> Vec<i64> {
        (0..self.roll(5)).map(|_| self.int()).collect()
    }

    fn flag(&mut self) -> bool {
        self.roll(2) == 0
    }

    fn float(&mut self) -> f32 {
        self.pick(&[0.0, 1.0, -1.0, 0.5, f32::NAN, f32::INFINITY, 1e30])
    }

    fn dtype(&mut self) -> DType {
        if self.flag() { self.pick(&[DType::F32, DType::I64]) } else { self.pick(&DType::ALL) }
    }

    fn dim(&mut self) -> Dim {
        match self.roll(6) {
            0 => Dim::UNKNOWN,
            1 => Dim::Symbol(self.pick(&["n", "m"]).into()),
            _ => Dim::Fixed(self.size()),
        }
    }

    fn ty(&mut self) -> ValueType {
        match self.roll(20) {
            0 => ValueType::Unknown,
            1 => ValueType::Sequence(Box::new(self.ty())),
            2 => ValueType::Optional(Box::new(self.ty())),
            3 => ValueType::Map { key: DType::I64, value: DType::F32 },
            4 => TensorType::unranked(self.dtype()).into(),
            _ => {
                let shape = (0..self.roll(6)).map(|_| self.dim()).collect();
                TensorType { dtype: self.dtype(), shape: Some(shape) }.into()
            }
        }
    }

    fn tensor(&mut self) -> Tensor {
        let n = self.roll(5);
        match self.roll(5) {
            0 => Tensor::from_slice(&[n], &(0..n).map(|_| self.float()).collect::<Vec<_>>()),
            1 => Tensor::scalar(self.int()),
            2 => Tensor::from_bools(&[n], &vec![true; n]),
            _ => Tensor::from_slice(&[n], &(0..n).map(|_| self.int()).collect::<Vec<_>>()),
        }
    }

    fn padding(&mut self) -> Padding {
        match self.roll(4) {
            0 => Padding::SameUpper,
            1 => Padding::SameLower,
            2 => Padding::Valid,
            _ => Padding::Explicit(self.ints()),
        }
    }

    fn conv(&mut self) -> ConvAttributes {
        ConvAttributes {
            kernel: if self.flag() { Vec::new() } else { self.sizes() },
            strides: if self.flag() { Vec::new() } else { self.sizes() },
            dilations: if self.flag() { Vec::new() } else { self.sizes() },
            padding: self.padding(),
            groups: self.size(),
            layout: self.pick(&[Layout::ChannelsFirst, Layout::ChannelsLast]),
            activation: None,
        }
    }

    fn pool(&mut self) -> PoolAttributes {
        PoolAttributes {
            kind: self.pick(&[PoolKind::Max, PoolKind::Average]),
            kernel: self.sizes(),
            strides: self.sizes(),
            dilations: Vec::new(),
            padding: self.padding(),
            ceil_mode: self.flag(),
            count_include_pad: false,
            storage_order_column: false,
            layout: self.pick(&[Layout::ChannelsFirst, Layout::ChannelsLast]),
        }
    }

    fn body(&mut self) -> Box<Graph> {
        let mut g = Graph::new("body");
        let inputs: Vec<ValueId> =
            (0..self.roll(5)).map(|i| g.add_input(format!("i{i}"), ValueType::Unknown)).collect();
        if let Some(&x) = inputs.first() {
            let op = self.op(false);
            let outputs = g.add_node("inner", op, &[x, x], 1 + self.roll(2));
            g.outputs.extend(outputs);
        }
        g.outputs.extend(inputs.iter().take(self.roll(3)));
        Box::new(g)
    }

    fn op(&mut self, bodies: bool) -> Op {
        let (axis, flag, size) = (self.int(), self.flag(), self.size());
        let quantize = QuantizeAttributes {
            axis,
            block_size: size,
            output_dtype: if flag { Some(self.dtype()) } else { None },
            saturate: true,
        };
        let recurrent = RecurrentAttributes {
            hidden_size: size,
            direction: self.pick(&[Direction::Forward, Direction::Bidirectional]),
            activations: Vec::new(),
            clip: None,
            batch_first: flag,
            input_forget: false,
            linear_before_reset: false,
        };
        let reduction = ScatterReduction::Add;
        let loss = LossAttributes {
            reduction: self.pick(&[LossReduction::None, LossReduction::Sum]),
            ignore_index: None,
        };
        let labels = Labels::Ints(self.ints());
        let trees = TreeEnsemble {
            roots: Vec::new(),
            branches: Vec::new(),
            leaves: Vec::new(),
            weights: Vec::new(),
            members: Vec::new(),
            targets: size,
            aggregate: Aggregate::Sum,
            base_values: Vec::new(),
            post_transform: PostTransform::None,
        };
        let floats = vec![0.0; self.roll(7)];
        let step = match self.roll(2) {
            0 => ElementwiseStep::Unary(UnaryOp::IsNan),
            _ => ElementwiseStep::Binary { op: BinaryOp::Add, operand: size, swapped: false },
        };
        let last = if bodies { 98 } else { 94 };
        match self.roll(last) {
            0 => Op::Unary(self.pick(&[UnaryOp::Exp, UnaryOp::Not, UnaryOp::Identity, UnaryOp::IsNan])),
            1 => Op::Binary(self.pick(&[BinaryOp::Add, BinaryOp::Equal, BinaryOp::PRelu, BinaryOp::Pow])),
            2 => Op::Variadic(VariadicOp::Sum),
            3 => Op::Where,
            4 => Op::Clip,
            5 => Op::Cast { to: self.dtype(), saturate: flag },
            6 => Op::Elementwise(vec![step]),
            7 => Op::Dropout { seed: None },
            8 => Op::MatMul(MatMulAttributes { trans_a: flag, trans_b: self.flag(), ..Default::default() }),
            9 => Op::Gemm(GemmAttributes { alpha: 1.0, beta: 1.0, trans_a: flag, trans_b: self.flag() }),
            10 => Op::Einsum {
                equation: self.pick(&["ij,jk", "...i,...i->...", "ii->i", "->", ",", "a...b"]).into(),
            },
            11 => Op::Det,
            12 => Op::MatMulInteger,
            13 => Op::QLinearMatMul(MatMulAttributes::default()),
            14 => Op::Conv(self.conv()),
            15 => Op::ConvTranspose(ConvTransposeAttributes {
                conv: self.conv(),
                output_padding: if flag { Vec::new() } else { self.sizes() },
                output_shape: if self.flag() { Vec::new() } else { self.sizes() },
            }),
            16 => Op::DeformConv { conv: self.conv(), offset_groups: size },
            17 => Op::ConvInteger(self.conv()),
            18 => Op::QLinearConv(self.conv()),
            19 => Op::Col2Im { dilations: self.sizes(), pads: self.sizes(), strides: self.sizes() },
            20 => Op::Pool(self.pool()),
            21 => Op::GlobalPool {
                kind: PoolKind::Max,
                layout: self.pick(&[Layout::ChannelsFirst, Layout::ChannelsLast]),
            },
            22 => Op::MaxUnpool { kernel: self.sizes(), strides: self.sizes(), pads: self.sizes() },
            23 => Op::MaxRoiPool { pooled_shape: [size, 2], spatial_scale: 1.0 },
            24 => Op::RoiAlign(RoiAlignAttributes {
                max: flag,
                output_height: size,
                output_width: 1,
                sampling_ratio: 0,
                spatial_scale: 1.0,
                half_pixel: flag,
            }),
            25 => Op::BatchNorm { epsilon: 0.0, momentum: 0.0, training: flag },
            26 => Op::InstanceNorm { epsilon: 0.0 },
            27 => Op::GroupNorm { groups: size, epsilon: 0.0 },
            28 => Op::LayerNorm { axis, epsilon: 0.0 },
            29 => Op::RmsNorm { axis, epsilon: 0.0 },
            30 => Op::LpNorm { axis, p: 2 },
            31 => Op::MeanVarianceNorm { axes: self.ints() },
            32 => Op::Lrn { alpha: 1.0, beta: 1.0, bias: 1.0, size },
            33 => Op::Softmax { axis, log: flag },
            34 => Op::Hardmax { axis },
            35 => Op::Reduce { op: ReduceOp::Max, keep_dims: flag, noop_with_empty_axes: self.flag() },
            36 => Op::ArgReduce { largest: flag, axis, keep_dims: self.flag(), select_last_index: false },
            37 => Op::CumSum { exclusive: flag, reverse: flag },
            38 => Op::Attention(AttentionAttributes {
                causal: flag,
                q_num_heads: size,
                kv_num_heads: self.size(),
                scale: None,
                softcap: 0.0,
                qk_output: QkOutput::Raw,
                softmax_precision: None,
            }),
            39 => Op::RotaryEmbedding { interleaved: flag, num_heads: size, rotary_dim: self.size() },
            40 => Op::Reshape { allow_zero: flag },
            41 => Op::Flatten { axis },
            42 => Op::Squeeze,
            43 => Op::Unsqueeze,
            44 => Op::Transpose { perm: if flag { None } else { Some(self.sizes()) } },
            45 => Op::Expand,
            46 => Op::Tile,
            47 => Op::Concat { axis },
            48 => Op::Split { axis },
            49 => Op::Slice,
            50 => Op::Pad { mode: self.pick(&[PadMode::Constant, PadMode::Reflect]) },
            51 => Op::Gather { axis },
            52 => Op::GatherElements { axis },
            53 => Op::GatherNd { batch_dims: size },
            54 => Op::ScatterElements { axis, reduction },
            55 => Op::ScatterNd { reduction },
            56 => Op::TensorScatter { axis, circular: flag },
            57 => Op::DepthToSpace { block: size, crd: flag },
            58 => Op::SpaceToDepth { block: size },
            59 => Op::Resize(ResizeAttributes {
                mode: ResizeMode::Linear,
                coordinates: self.pick(&[CoordinateMode::HalfPixel, CoordinateMode::TfCropAndResize]),
                nearest: NearestMode::Floor,
                cubic_coeff_a: 0.0,
                exclude_outside: false,
                extrapolation_value: 0.0,
                antialias: false,
                axes: if flag { None } else { Some(self.ints()) },
                aspect_ratio: self.pick(&[AspectRatio::Stretch, AspectRatio::NotSmaller]),
            }),
            60 => {
                Op::GridSample { mode: ResizeMode::Cubic, padding: GridPadding::Border, align_corners: flag }
            }
            61 => Op::AffineGrid { align_corners: flag },
            62 => Op::CenterCropPad { axes: if flag { None } else { Some(self.ints()) } },
            63 => Op::ReverseSequence { batch_axis: size, time_axis: self.size() },
            64 => Op::Trilu { upper: flag },
            65 => Op::EyeLike { dtype: None, k: axis },
            66 => Op::OneHot { axis },
            67 => Op::Range,
            68 => Op::ConstantOfShape { value: self.tensor() },
            69 => Op::Shape { start: axis, end: if flag { None } else { Some(self.int()) } },
            70 => Op::Size,
            71 => Op::NonZero,
            72 => Op::Compress { axis: if flag { None } else { Some(axis) } },
            73 => Op::Unique { axis: if flag { None } else { Some(axis) }, sorted: flag },
            74 => Op::TopK { axis, largest: flag, sorted: flag },
            75 => Op::NonMaxSuppression { center_point_box: flag },
            76 => Op::Random(RandomAttributes {
                distribution: Distribution::Uniform { low: 0.0, high: 1.0 },
                dtype: None,
                dims: if flag { None } else { Some(self.sizes()) },
                seed: None,
            }),
            77 => Op::Multinomial { dtype: self.dtype(), sample_size: size, seed: None },
            78 => Op::Dft { inverse: flag, onesided: self.flag() },
            79 => Op::Stft { onesided: flag },
            80 => Op::MelWeightMatrix { dtype: DType::F32 },
            81 => Op::Window { kind: WindowKind::Hann, periodic: flag, dtype: DType::F32 },
            82 => Op::Rnn(recurrent),
            83 => Op::Lstm(recurrent),
            84 => Op::Gru(recurrent),
            85 => self.pick(&[
                Op::SequenceConstruct,
                Op::SequenceAt,
                Op::SequenceErase,
                Op::SequenceInsert,
                Op::SequenceLength,
                Op::ConcatFromSequence { axis, new_axis: flag },
                Op::SplitToSequence { axis, keep_dims: flag },
                Op::OptionalConstruct { ty: None },
                Op::OptionalGetElement,
                Op::OptionalHasElement,
            ]),
            86 => Op::QuantizeLinear(quantize),
            87 => Op::DequantizeLinear(quantize),
            88 => self.pick(&[
                Op::DynamicQuantizeLinear,
                Op::QLinearUnary(UnaryOp::Relu),
                Op::QLinearBinary { op: BinaryOp::Add, activation: None },
            ]),
            89 => Op::QLinearPool(self.pool()),
            90 => {
                if flag {
                    Op::NllLoss(loss)
                } else {
                    Op::SoftmaxCrossEntropyLoss(loss)
                }
            }
            91 => self.pick(&[
                Op::StringConcat,
                Op::StringSplit { delimiter: None, maxsplit: None },
                Op::RegexFullMatch { pattern: String::new() },
                Op::ImageDecode { format: PixelFormat::Rgb },
                Op::Bernoulli { dtype: None, seed: None },
            ]),
            92 => Op::TfIdfVectorizer(Box::new(TfIdfAttributes {
                mode: TfIdfMode::Tf,
                min_gram_length: 1,
                max_gram_length: 1,
                max_skip_count: 0,
                ngram_counts: Vec::new(),
                ngram_indexes: self.sizes(),
                pool: None,
                weights: Vec::new(),
            })),
            93 => {
                let (kernel, post_transform) = (SvmKernel::Linear, PostTransform::None);
                let all = [
                    MlOp::ArrayFeatureExtractor,
                    MlOp::Binarizer { threshold: 0.0 },
                    MlOp::DictVectorizer { vocabulary: labels.clone() },
                    MlOp::FeatureVectorizer { dimensions: self.sizes() },
                    MlOp::Imputer { values: self.tensor(), missing: self.tensor() },
                    MlOp::LabelEncoder { keys: self.tensor(), values: self.tensor(), default: self.tensor() },
                    MlOp::LinearClassifier {
                        coefficients: floats.clone(),
                        intercepts: vec![0.0; self.roll(3)],
                        labels: labels.clone(),
                        post_transform,
                    },
                    MlOp::LinearRegressor {
                        coefficients: floats.clone(),
                        intercepts: Vec::new(),
                        targets: size,
                        post_transform,
                    },
                    MlOp::Normalizer { norm: RowNorm::L1 },
                    MlOp::OneHotEncoder { categories: labels.clone(), zeros: flag },
                    MlOp::Scaler { offset: floats.clone(), scale: floats.clone() },
                    MlOp::SvmClassifier {
                        kernel,
                        support_vectors: floats.clone(),
                        vectors_per_class: self.sizes(),
                        coefficients: Vec::new(),
                        rho: Vec::new(),
                        prob_a: Vec::new(),
                        prob_b: Vec::new(),
                        labels: labels.clone(),
                        post_transform,
                    },
                    MlOp::SvmRegressor {
                        kernel,
                        support_vectors: floats,
                        vectors: size,
                        coefficients: Vec::new(),
                        rho: 0.0,
                        one_class: flag,
                        post_transform,
                    },
                    MlOp::TreeEnsembleClassifier {
                        trees: trees.clone(),
                        labels: labels.clone(),
                        binary_single_weight: flag,
                    },
                    MlOp::TreeEnsembleRegressor { trees },
                    MlOp::ZipMap { labels },
                ];
                Op::Ml(Box::new(self.pick(&all)))
            }
            94 => Op::If { then_body: self.body(), else_body: self.body() },
            95 => Op::Loop { carried: self.roll(3), body: self.body() },
            96 => Op::SequenceMap { operands: self.roll(3), body: self.body() },
            _ => Op::Scan {
                attributes: ScanAttributes {
                    states: self.size(),
                    scan_inputs: self.roll(3),
                    input_axes: self.ints(),
                    input_reverse: Vec::new(),
                    output_axes: self.ints(),
                    output_reverse: Vec::new(),
                },
                body: self.body(),
            },
        }
    }
}

/// No operands and attributes make inference, bounds or costs panic, and what is inferred from less knowledge never
/// contradicts what is inferred from more.
#[test]
fn anything_is_answered_or_refused() {
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let (mut answered, mut ranked) = (0, 0);
    for _ in 0..100_000 {
        let op = dice.op(true);
        let count = dice.roll(9);
        let operands: Vec<Option<(ValueType, Option<Tensor>)>> = (0..count)
            .map(|i| match dice.roll(10) {
                0 => None,
                1..5 => {
                    let t = dice.tensor();
                    Some((t.tensor_type().into(), Some(t)))
                }
                // Often the first operand again, so that operands fit together.
                _ if i > 0 && dice.flag() => None,
                _ => Some((dice.ty(), None)),
            })
            .collect();
        let first = operands.iter().flatten().next().cloned();
        let operands: Vec<_> = operands.into_iter().map(|o| o.or_else(|| first.clone())).collect();
        let node =
            Node { name: "n".into(), op, inputs: vec![None; count], outputs: vec![None; 1 + dice.roll(2)] };
        let facts: Vec<Option<Fact<'_>>> =
            operands.iter().map(|o| o.as_ref().map(|(ty, v)| Fact::new(ty, v.as_ref()))).collect();
        let exact = infer_node(&node, &facts);
        let _ = super::upper_bound(&node, &facts);
        let types: Vec<Option<&TensorType>> = operands.iter().map(|o| o.as_ref()?.0.tensor()).collect();
        let _ = cost::node_cost(&node, &types, &types);
        let Ok(exact) = exact else { continue };
        answered += 1;
        assert_eq!(exact.len(), node.outputs.len());
        if !node.op.bodies().is_empty() {
            continue;
        }
        // Without the constants' elements the answer is the same or vaguer.
        let vague: Vec<Option<Fact<'_>>> =
            operands.iter().map(|o| o.as_ref().map(|(ty, _)| Fact::of(ty))).collect();
        let vague = infer_node(&node, &vague).unwrap_or_else(|e| panic!("{node:?}: {e} without constants"));
        for (a, b) in exact.iter().zip(&vague) {
            let (Some(a), Some(b)) = (a.tensor(), b.tensor()) else { continue };
            assert_eq!(a.dtype, b.dtype, "{node:?}");
            if let (Some(s), Some(t)) = (&a.shape, &b.shape) {
                ranked += 1;
                let fits = s.len() == t.len()
                    && s.iter().zip(t).all(|(d, e)| super::operands::unify(d, e).is_some());
                assert!(fits, "{node:?} of {operands:?}: {a} with constants, {b} without");
            }
        }
    }
    assert!(answered > 5_000 && ranked > 3_000, "{answered} answered, {ranked} compared");
}
