use super::{
    ActivationFusion, AttentionFusion, BatchNormFusion, ElementwiseFusion, EpilogueFusion,
    NormalizationFusion, QuantizedFusion,
};
use crate::passes::Simplify;
use crate::passes::testing::{Builder, Counting, only, operators, settle, summary};
use crate::{
    BinaryOp, ConvAttributes, ConvTransposeAttributes, DType, ElementwiseStep, Graph, Layout,
    MatMulAttributes, Op, Padding, Pass, PoolKind, QuantizeAttributes, ReduceOp, Tensor, UnaryOp, ValueId,
};

const EPILOGUES: EpilogueFusion<'static> = EpilogueFusion { evaluate: &Counting };
const BATCH_NORM: BatchNormFusion<'static> = BatchNormFusion { evaluate: &Counting };
const QUANTIZED: QuantizedFusion<'static> = QuantizedFusion { evaluate: &Counting };

fn bin(b: &mut Builder, name: &str, op: BinaryOp, p: ValueId, q: ValueId) -> ValueId {
    b.node(name, Op::Binary(op), &[p, q])
}

fn un(b: &mut Builder, name: &str, op: UnaryOp, x: ValueId) -> ValueId {
    b.node(name, Op::Unary(op), &[x])
}

/// Builds on the input `x`, simplifies, runs `pass`.
fn run(dims: &[usize], pass: &dyn Pass, build: impl FnOnce(&mut Builder, ValueId) -> ValueId) -> Graph {
    let mut b = Builder::new();
    let x = b.input("x", dims);
    let y = build(&mut b, x);
    b.output(y);
    let mut g = b.finish();
    settle(&Simplify, &mut g);
    settle(pass, &mut g);
    g
}

fn conv(b: &mut Builder, name: &str, x: ValueId, channels: (usize, usize)) -> ValueId {
    let w = b.stored(&format!("{name}.w"), DType::F32, &[channels.1, channels.0, 1, 1]);
    b.node(name, Op::Conv(ConvAttributes::default()), &[x, w])
}

// ---- activations ----

#[track_caller]
fn activation(expected: UnaryOp, build: impl FnOnce(&mut Builder, ValueId) -> ValueId) {
    let g = run(&[2, 3], &ActivationFusion, build);
    assert_eq!(operators(&g), Op::Unary(expected).name(), "{}", summary(&g));
    assert_eq!(g.iter_nodes().next().unwrap().1.op, Op::Unary(expected));
}

#[test]
fn gelu_by_erf() {
    let erf = |b: &mut Builder, x: ValueId| {
        let root = b.scalar(2f32.sqrt());
        let y = bin(b, "scaled", BinaryOp::Div, x, root);
        let y = un(b, "erf", UnaryOp::Erf, y);
        let one = b.scalar(1.0);
        bin(b, "plus", BinaryOp::Add, y, one)
    };
    activation(UnaryOp::Gelu { tanh: false }, |b, x| {
        let g = erf(b, x);
        let half = b.scalar(0.5);
        let y = bin(b, "a", BinaryOp::Mul, x, g);
        bin(b, "y", BinaryOp::Mul, y, half)
    });
    activation(UnaryOp::Gelu { tanh: false }, |b, x| {
        let g = erf(b, x);
        let half = b.scalar(0.5);
        let y = bin(b, "a", BinaryOp::Mul, half, x);
        bin(b, "y", BinaryOp::Mul, y, g)
    });
    activation(UnaryOp::Gelu { tanh: false }, |b, x| {
        let g = erf(b, x);
        let half = b.scalar(0.5);
        let y = bin(b, "a", BinaryOp::Mul, g, half);
        bin(b, "y", BinaryOp::Mul, x, y)
    });
}

#[test]
fn gelu_by_tanh() {
    activation(UnaryOp::Gelu { tanh: true }, |b, x| {
        let three = b.scalar(3.0);
        let cube = bin(b, "cube", BinaryOp::Pow, x, three);
        let (c, s, one, half) = (b.scalar(0.044715), b.scalar(0.797_884_6), b.scalar(1.0), b.scalar(0.5));
        let y = bin(b, "small", BinaryOp::Mul, cube, c);
        let y = bin(b, "sum", BinaryOp::Add, x, y);
        let y = bin(b, "inner", BinaryOp::Mul, y, s);
        let y = un(b, "tanh", UnaryOp::Tanh, y);
        let y = bin(b, "plus", BinaryOp::Add, y, one);
        let z = bin(b, "half", BinaryOp::Mul, x, half);
        bin(b, "y", BinaryOp::Mul, z, y)
    });
    activation(UnaryOp::Gelu { tanh: true }, |b, x| {
        let (c, s, one, half) = (b.scalar(0.044715), b.scalar(0.797_884_6), b.scalar(1.0), b.scalar(0.5));
        let y = bin(b, "square", BinaryOp::Mul, x, x);
        let y = bin(b, "small", BinaryOp::Mul, y, c);
        let y = bin(b, "sum", BinaryOp::Add, y, one);
        let y = bin(b, "by_x", BinaryOp::Mul, x, y);
        let y = bin(b, "inner", BinaryOp::Mul, y, s);
        let y = un(b, "tanh", UnaryOp::Tanh, y);
        let y = bin(b, "plus", BinaryOp::Add, y, one);
        let y = bin(b, "whole", BinaryOp::Mul, x, y);
        bin(b, "y", BinaryOp::Mul, y, half)
    });
}

#[test]
fn gated_activations() {
    activation(UnaryOp::Swish { alpha: 1.0 }, |b, x| {
        let g = un(b, "g", UnaryOp::Sigmoid, x);
        bin(b, "y", BinaryOp::Mul, x, g)
    });
    activation(UnaryOp::Swish { alpha: 1.702 }, |b, x| {
        let c = b.scalar(1.702);
        let g = bin(b, "c", BinaryOp::Mul, x, c);
        let g = un(b, "g", UnaryOp::Sigmoid, g);
        bin(b, "y", BinaryOp::Mul, g, x)
    });
    activation(UnaryOp::HardSwish, |b, x| {
        let (three, six, zero) = (b.scalar(3.0), b.scalar(6.0), b.scalar(0.0));
        let g = bin(b, "p", BinaryOp::Add, x, three);
        let g = b.node("g", Op::Clip, &[g, zero, six]);
        let y = bin(b, "m", BinaryOp::Mul, x, g);
        bin(b, "y", BinaryOp::Div, y, six)
    });
    activation(UnaryOp::HardSwish, |b, x| {
        let (three, six) = (b.scalar(3.0), b.scalar(1.0 / 6.0));
        let g = bin(b, "p", BinaryOp::Add, x, three);
        let g = un(b, "g", UnaryOp::ClipTo { min: 0.0, max: 6.0 }, g);
        let g = bin(b, "d", BinaryOp::Mul, g, six);
        bin(b, "y", BinaryOp::Mul, x, g)
    });
    activation(UnaryOp::HardSwish, |b, x| {
        let g = un(b, "g", UnaryOp::HardSigmoid { alpha: 1.0 / 6.0, beta: 0.5 }, x);
        bin(b, "y", BinaryOp::Mul, x, g)
    });
    activation(UnaryOp::Mish, |b, x| {
        let g = un(b, "s", UnaryOp::Softplus, x);
        let g = un(b, "g", UnaryOp::Tanh, g);
        bin(b, "y", BinaryOp::Mul, x, g)
    });
    activation(UnaryOp::Softplus, |b, x| {
        let one = b.scalar(1.0);
        let y = un(b, "e", UnaryOp::Exp, x);
        let y = bin(b, "p", BinaryOp::Add, y, one);
        un(b, "y", UnaryOp::Log, y)
    });
}

#[test]
fn what_looks_like_an_activation_stays() {
    // The gate is of another value.
    let g = run(&[2], &ActivationFusion, |b, x| {
        let z = un(b, "z", UnaryOp::Exp, x);
        let g = un(b, "g", UnaryOp::Sigmoid, z);
        bin(b, "y", BinaryOp::Mul, x, g)
    });
    assert_eq!(operators(&g), "Exp Sigmoid Mul");
    // A wrong constant.
    let g = run(&[2], &ActivationFusion, |b, x| {
        let (three, seven) = (b.scalar(3.0), b.scalar(7.0));
        let g = bin(b, "p", BinaryOp::Add, x, three);
        let g = un(b, "g", UnaryOp::ClipTo { min: 0.0, max: 6.0 }, g);
        let y = bin(b, "m", BinaryOp::Mul, x, g);
        bin(b, "y", BinaryOp::Div, y, seven)
    });
    assert_eq!(operators(&g), "Add ClipTo Mul Div");
}

// ---- normalisations ----

fn mean(b: &mut Builder, name: &str, x: ValueId) -> ValueId {
    let axes = b.ints(&[-1]);
    let op = Op::Reduce { op: ReduceOp::Mean, keep_dims: true, noop_with_empty_axes: false };
    b.node(name, op, &[x, axes])
}

#[test]
fn layer_norm_as_pytorch_exports_it() {
    let g = run(&[2, 5, 8], &NormalizationFusion, |b, x| {
        let m = mean(b, "m", x);
        let d = bin(b, "d", BinaryOp::Sub, x, m);
        let two = b.scalar(2.0);
        let s = bin(b, "s", BinaryOp::Pow, d, two);
        let v = mean(b, "v", s);
        let eps = b.scalar(1e-5);
        let v = bin(b, "ve", BinaryOp::Add, v, eps);
        let r = un(b, "r", UnaryOp::Sqrt, v);
        let y = bin(b, "n", BinaryOp::Div, d, r);
        let (scale, bias) = (b.stored("scale", DType::F32, &[8]), b.stored("bias", DType::F32, &[1, 1, 8]));
        let y = bin(b, "scaled", BinaryOp::Mul, scale, y);
        bin(b, "y", BinaryOp::Add, y, bias)
    });
    assert_eq!(summary(&g), "y: f32[2,5,8] = LayerNorm(x, scale, bias.2)");
    assert_eq!(only(&g, "LayerNorm").op, Op::LayerNorm { axis: 2, epsilon: 1e-5 });
}

#[test]
fn layer_norm_as_keras_exports_it() {
    let g = run(&[2, 8], &NormalizationFusion, |b, x| {
        let m = mean(b, "m", x);
        let d = bin(b, "d", BinaryOp::Sub, x, m);
        let s = bin(b, "s", BinaryOp::Mul, d, d);
        let v = mean(b, "v", s);
        let eps = b.scalar(1e-3);
        let v = bin(b, "ve", BinaryOp::Add, v, eps);
        let r = un(b, "r", UnaryOp::Rsqrt, v);
        let (scale, bias) = (b.stored("scale", DType::F32, &[8]), b.stored("bias", DType::F32, &[8]));
        let a = bin(b, "a", BinaryOp::Mul, r, scale);
        let xa = bin(b, "xa", BinaryOp::Mul, x, a);
        let ma = bin(b, "ma", BinaryOp::Mul, m, a);
        let rest = bin(b, "rest", BinaryOp::Sub, bias, ma);
        bin(b, "y", BinaryOp::Add, xa, rest)
    });
    assert_eq!(summary(&g), "y: f32[2,8] = LayerNorm(x, scale, bias)");
}

#[test]
fn rms_norm() {
    let g = run(&[2, 8], &NormalizationFusion, |b, x| {
        let s = bin(b, "s", BinaryOp::Mul, x, x);
        let v = mean(b, "v", s);
        let eps = b.scalar(1e-6);
        let v = bin(b, "ve", BinaryOp::Add, v, eps);
        let r = un(b, "r", UnaryOp::Sqrt, v);
        let r = un(b, "i", UnaryOp::Reciprocal, r);
        let y = bin(b, "n", BinaryOp::Mul, x, r);
        let scale = b.stored("scale", DType::F32, &[8]);
        bin(b, "y", BinaryOp::Mul, scale, y)
    });
    assert_eq!(summary(&g), "y: f32[2,8] = RmsNorm(x, scale)");
}

#[test]
fn a_mean_over_other_axes_is_no_layer_norm() {
    let g = run(&[2, 4, 8], &NormalizationFusion, |b, x| {
        let axes = b.ints(&[1]);
        let op = Op::Reduce { op: ReduceOp::Mean, keep_dims: true, noop_with_empty_axes: false };
        let s = bin(b, "s", BinaryOp::Mul, x, x);
        let v = b.node("v", op, &[s, axes]);
        let eps = b.scalar(1e-6);
        let v = bin(b, "ve", BinaryOp::Add, v, eps);
        let r = un(b, "r", UnaryOp::Sqrt, v);
        bin(b, "y", BinaryOp::Div, x, r)
    });
    assert!(operators(&g).ends_with("Sqrt Div"), "{}", summary(&g));
}

// ---- batch normalisation ----

fn batch_norm(b: &mut Builder, name: &str, x: ValueId, channels: usize) -> ValueId {
    let parts: Vec<ValueId> =
        ["g", "b", "m", "v"].map(|p| b.stored(&format!("{name}.{p}"), DType::F32, &[channels])).to_vec();
    let op = Op::BatchNorm { epsilon: 0.0, momentum: 0.9, training: false };
    b.node(name, op, &[&[x], &parts[..]].concat())
}

#[test]
fn batch_norm_into_stored_weights() {
    let g = run(&[1, 3, 4, 4], &BATCH_NORM, |b, x| {
        let y = conv(b, "conv", x, (3, 4));
        batch_norm(b, "y", y, 4)
    });
    assert_eq!(operators(&g), "Conv");
    let node = only(&g, "Conv");
    // Every statistic counts 1, 2, 3, 4: the scale is n/√n, the shift n − n·√n.
    let floats = |i: usize| g.value(node.input(i).unwrap()).tensor().unwrap().as_slice::<f32>().to_vec();
    let expected: Vec<f32> = (1..=4).map(|n| (n as f32).sqrt()).collect();
    assert_eq!(floats(4), expected);
    for (n, shift) in floats(2).iter().enumerate() {
        let n = n as f32 + 1.0;
        assert!((shift - (n - n * n.sqrt())).abs() < 1e-5);
    }
}

#[test]
fn batch_norm_into_weights_in_memory() {
    let g = run(&[1, 1, 4, 4], &BATCH_NORM, |b, x| {
        let w = b.floats(&[2, 1, 1, 1], &[10.0, 20.0]);
        let bias = b.floats(&[2], &[1.0, 1.0]);
        let y = b.node("conv", Op::Conv(ConvAttributes::default()), &[x, w, bias]);
        batch_norm(b, "y", y, 2)
    });
    let node = only(&g, "Conv");
    let root = 2f32.sqrt();
    let floats = |i: usize| g.value(node.input(i).unwrap()).tensor().unwrap().as_slice::<f32>().to_vec();
    assert_eq!(floats(1), [10.0, 20.0 * root]);
    assert_eq!(floats(2), [1.0, (1.0f64 * f64::sqrt(2.0) + 2.0 - 2.0 * f64::sqrt(2.0)) as f32]);
    assert_eq!(node.inputs.len(), 3);
}

#[test]
fn batch_norm_into_grouped_transposed_weights() {
    let mut b = Builder::new();
    let x = b.input("x", &[1, 4, 2, 2]);
    let w = b.floats(&[4, 2, 1, 1], &[1.0; 8]);
    let attributes = ConvTransposeAttributes {
        conv: ConvAttributes { groups: 2, ..ConvAttributes::default() },
        output_padding: Vec::new(),
        output_shape: Vec::new(),
    };
    let y = b.node("up", Op::ConvTranspose(attributes), &[x, w]);
    let y = batch_norm(&mut b, "y", y, 4);
    b.output(y);
    let mut g = b.finish();
    settle(&BATCH_NORM, &mut g);
    let node = only(&g, "ConvTranspose");
    let w = g.value(node.input(1).unwrap()).tensor().unwrap().as_slice::<f32>().to_vec();
    // Inputs 0 and 1 make outputs 0 and 1; inputs 2 and 3 make outputs 2 and 3.
    let [a, b, c, d] = [1f32, 2f32.sqrt(), 3f32.sqrt(), 2.0];
    assert_eq!(w, [a, b, a, b, c, d, c, d]);
}

#[test]
fn batch_norm_alone_becomes_arithmetic() {
    let g = run(&[1, 3, 4, 4], &BATCH_NORM, |b, x| batch_norm(b, "y", x, 3));
    assert_eq!(operators(&g), "Mul Add");
    // A convolution whose result is wanted elsewhere keeps it.
    let g = run(&[1, 3, 4, 4], &BATCH_NORM, |b, x| {
        let c = conv(b, "conv", x, (3, 3));
        let y = batch_norm(b, "bn", c, 3);
        bin(b, "y", BinaryOp::Add, c, y)
    });
    assert_eq!(operators(&g), "Conv Mul Add Add");
}

// ---- epilogues ----

#[test]
fn convolution_with_residual_and_activation() {
    let g = run(&[1, 3, 4, 4], &EPILOGUES, |b, x| {
        let first = conv(b, "first", x, (3, 8));
        let r = un(b, "r", UnaryOp::Relu, first);
        let second = conv(b, "second", r, (8, 8));
        let bias = b.stored("bias", DType::F32, &[1, 8, 1, 1]);
        let y = bin(b, "biased", BinaryOp::Add, second, bias);
        let y = bin(b, "sum", BinaryOp::Add, y, r);
        un(b, "y", UnaryOp::ClipTo { min: 0.0, max: 6.0 }, y)
    });
    assert_eq!(
        summary(&g),
        "r: f32[1,8,4,4] = Conv(x, first.w)\ny: f32[1,8,4,4] = Conv(r, second.w, bias.2, r)"
    );
    let activations: Vec<_> = g.iter_nodes().map(|(_, n)| *n.op.activation().unwrap()).collect();
    assert_eq!(activations, [Some(UnaryOp::Relu), Some(UnaryOp::ClipTo { min: 0.0, max: 6.0 })]);
    assert_eq!(g.iter_nodes().last().unwrap().1.name, "second", "profiles name the convolution");
}

#[test]
fn of_two_convolutions_the_later_takes_the_sum() {
    let g = run(&[1, 3, 4, 4], &EPILOGUES, |b, x| {
        let early = conv(b, "early", x, (3, 3));
        let late = conv(b, "late", x, (3, 3));
        bin(b, "y", BinaryOp::Add, early, late)
    });
    assert_eq!(
        summary(&g),
        "early: f32[1,3,4,4] = Conv(x, early.w)\ny: f32[1,3,4,4] = Conv(x, late.w, _, early)"
    );
}

#[test]
fn nothing_follows_an_activation() {
    let g = run(&[1, 3, 4, 4], &EPILOGUES, |b, x| {
        let y = conv(b, "conv", x, (3, 3));
        let y = un(b, "a", UnaryOp::Relu, y);
        bin(b, "y", BinaryOp::Add, y, x)
    });
    assert_eq!(operators(&g), "Conv Add");
    // Nor does what is wanted without it, or what changes the shape.
    let g = run(&[1, 3, 1, 1], &EPILOGUES, |b, x| {
        let y = conv(b, "conv", x, (3, 3));
        let wide = b.stored("wide", DType::F32, &[1, 3, 5, 5]);
        bin(b, "y", BinaryOp::Add, y, wide)
    });
    assert_eq!(operators(&g), "Conv Add");
}

#[test]
fn biases_add_up() {
    let g = run(&[1, 2, 4, 4], &EPILOGUES, |b, x| {
        let w = b.stored("w", DType::F32, &[2, 2, 1, 1]);
        let bias = b.floats(&[2], &[10.0, 20.0]);
        let y = b.node("conv", Op::Conv(ConvAttributes::default()), &[x, w, bias]);
        let more = b.stored("more", DType::F32, &[2, 1, 1]);
        bin(b, "y", BinaryOp::Add, y, more)
    });
    assert_eq!(summary(&g), "y: f32[1,2,4,4] = Conv(x, w, [11.0,22.0])");
}

#[test]
fn matrix_product_with_everything() {
    let g = run(&[4, 8], &EPILOGUES, |b, x| {
        let w = b.stored("w", DType::F32, &[8, 8]);
        let c = b.scalar(0.25);
        let y = b.node("mm", Op::MatMul(MatMulAttributes::default()), &[x, w]);
        let y = bin(b, "scaled", BinaryOp::Mul, y, c);
        let bias = b.stored("bias", DType::F32, &[8]);
        let y = bin(b, "biased", BinaryOp::Add, bias, y);
        let y = bin(b, "sum", BinaryOp::Add, x, y);
        un(b, "y", UnaryOp::Gelu { tanh: false }, y)
    });
    assert_eq!(summary(&g), "y: f32[4,8] = MatMul(x, w, bias, x)");
    assert!(matches!(&only(&g, "MatMul").op, Op::MatMul(a) if a.alpha == 0.25
        && a.activation == Some(UnaryOp::Gelu { tanh: false })));
}

// ---- attention ----

fn reshape(b: &mut Builder, name: &str, x: ValueId, dims: &[i64]) -> ValueId {
    let shape = b.ints(dims);
    b.node(name, Op::Reshape { allow_zero: false }, &[x, shape])
}

fn transpose(b: &mut Builder, name: &str, x: ValueId, perm: &[usize]) -> ValueId {
    b.node(name, Op::Transpose { perm: Some(perm.to_vec()) }, &[x])
}

fn matmul(b: &mut Builder, name: &str, p: ValueId, q: ValueId) -> ValueId {
    b.node(name, Op::MatMul(MatMulAttributes::default()), &[p, q])
}

fn simplify_again(mut g: Graph) -> Graph {
    settle(&Simplify, &mut g);
    g
}

#[test]
fn attention_as_bert_exports_it() {
    let g = run(&[2, 5, 12], &AttentionFusion, |b, x| {
        let heads = |b: &mut Builder, name: &str, perm: &[usize]| {
            let y = un(b, &format!("{name}.f"), UnaryOp::Exp, x);
            let y = reshape(b, &format!("{name}.r"), y, &[2, 5, 3, 4]);
            transpose(b, name, y, perm)
        };
        let q = heads(b, "q", &[0, 2, 1, 3]);
        let k = heads(b, "k", &[0, 2, 3, 1]);
        let v = heads(b, "v", &[0, 2, 1, 3]);
        let s = matmul(b, "s", q, k);
        let two = b.scalar(2.0);
        let s = bin(b, "scaled", BinaryOp::Div, s, two);
        let mask = b.input("mask", &[2, 1, 1, 5]);
        let s = bin(b, "masked", BinaryOp::Add, s, mask);
        let w = b.node("w", Op::Softmax { axis: -1, log: false }, &[s]);
        let y = matmul(b, "wv", w, v);
        let y = transpose(b, "t", y, &[0, 2, 1, 3]);
        reshape(b, "y", y, &[2, 5, 12])
    });
    let g = simplify_again(g);
    assert_eq!(operators(&g), "Exp Exp Exp Attention", "{}", summary(&g));
    let node = only(&g, "Attention");
    let Op::Attention(a) = &node.op else { panic!() };
    assert_eq!((a.scale, a.q_num_heads, a.kv_num_heads), (Some(0.5), 3, 3));
    assert_eq!(g.value(node.input(3).unwrap()).name, "mask");
    assert_eq!(g.value(node.out()).name, "y");
}

#[test]
fn attention_of_packed_projections() {
    // One product makes q, k and v; scale on both sides; k transposed apart.
    let g = run(&[1, 7, 24], &AttentionFusion, |b, x| {
        let y = reshape(b, "split", x, &[1, 7, 3, 2, 4]);
        let y = transpose(b, "t", y, &[2, 0, 3, 1, 4]);
        let part = |b: &mut Builder, name: &str, i: i64| {
            let index = b.constant(&format!("{name}.i"), Tensor::scalar(i));
            b.node(name, Op::Gather { axis: 0 }, &[y, index])
        };
        let (q, k, v) = (part(b, "q", 0), part(b, "k", 1), part(b, "v", 2));
        let c = b.scalar(0.5);
        let q = bin(b, "qs", BinaryOp::Mul, q, c);
        let k = transpose(b, "kt", k, &[0, 1, 3, 2]);
        let k = bin(b, "ks", BinaryOp::Mul, k, c);
        let s = matmul(b, "s", q, k);
        let w = b.node("w", Op::Softmax { axis: -1, log: false }, &[s]);
        let y = matmul(b, "wv", w, v);
        let y = transpose(b, "tt", y, &[0, 2, 1, 3]);
        reshape(b, "y", y, &[1, 7, 8])
    });
    let g = simplify_again(g);
    assert_eq!(operators(&g), "Slice Slice Slice Attention", "{}", summary(&g));
    assert!(matches!(&only(&g, "Attention").op, Op::Attention(a) if a.scale == Some(0.25)));
}

#[test]
fn attention_by_head_without_reshapes() {
    let g = run(&[2, 3, 5, 4], &AttentionFusion, |b, x| {
        let k = b.input("k", &[2, 3, 6, 4]);
        let v = b.input("v", &[2, 3, 6, 8]);
        let k = transpose(b, "kt", k, &[0, 1, 3, 2]);
        let s = matmul(b, "s", x, k);
        let w = b.node("w", Op::Softmax { axis: 3, log: false }, &[s]);
        matmul(b, "y", w, v)
    });
    let g = simplify_again(g);
    assert_eq!(summary(&g), "y: f32[2,3,5,8] = Attention(x, k, v)");
}

#[test]
fn what_is_no_attention_stays() {
    // The weights are an output, too.
    let mut b = Builder::new();
    let x = b.input("x", &[2, 3, 5, 4]);
    let k = transpose(&mut b, "kt", x, &[0, 1, 3, 2]);
    let s = matmul(&mut b, "s", x, k);
    let w = b.node("w", Op::Softmax { axis: -1, log: false }, &[s]);
    let y = matmul(&mut b, "y", w, x);
    b.output(y);
    b.output(w);
    let mut g = b.finish();
    assert_eq!(settle(&AttentionFusion, &mut g), 0);
    // A softmax over queries.
    let g = run(&[2, 3, 5, 5], &AttentionFusion, |b, x| {
        let s = matmul(b, "s", x, x);
        let w = b.node("w", Op::Softmax { axis: 2, log: false }, &[s]);
        matmul(b, "y", w, x)
    });
    assert_eq!(operators(&g), "MatMul Softmax MatMul");
}

// ---- element-wise chains ----

#[test]
fn chains_become_one_sweep() {
    let g = run(&[2, 3], &ElementwiseFusion, |b, x| {
        let s = b.stored("s", DType::F32, &[3]);
        let t = b.stored("t", DType::F32, &[2, 3]);
        let y = bin(b, "a", BinaryOp::Sub, s, x);
        let y = un(b, "b", UnaryOp::Exp, y);
        let y = bin(b, "c", BinaryOp::Mul, y, t);
        bin(b, "y", BinaryOp::Add, y, x)
    });
    assert_eq!(summary(&g), "y: f32[2,3] = Elementwise(x, s, t)");
    let step = |op, operand, swapped| ElementwiseStep::Binary { op, operand, swapped };
    assert_eq!(
        only(&g, "Elementwise").op,
        Op::Elementwise(vec![
            step(BinaryOp::Sub, 1, true),
            ElementwiseStep::Unary(UnaryOp::Exp),
            step(BinaryOp::Mul, 2, false),
            step(BinaryOp::Add, 0, false),
        ])
    );
}

#[test]
fn chains_keep_the_shape_of_their_result() {
    // The first sum is smaller than the second.
    let g = run(&[3], &ElementwiseFusion, |b, x| {
        let t = b.stored("t", DType::F32, &[2, 3]);
        let y = un(b, "a", UnaryOp::Exp, x);
        let y = bin(b, "b", BinaryOp::Add, y, t);
        un(b, "y", UnaryOp::Tanh, y)
    });
    assert_eq!(
        summary(&g),
        "a: f32[3] = Exp(x)\ny: f32[2,3] = Elementwise(t, a)",
        "the larger operand leads, the smaller broadcasts"
    );
    // A value that two read is stored.
    let g = run(&[3], &ElementwiseFusion, |b, x| {
        let y = un(b, "a", UnaryOp::Exp, x);
        let z = un(b, "b", UnaryOp::Tanh, y);
        bin(b, "y", BinaryOp::Add, y, z)
    });
    assert_eq!(summary(&g), "a: f32[3] = Exp(x)\ny: f32[3] = Elementwise(a)");
}

#[test]
fn long_chains_are_cut() {
    let g = run(&[3], &ElementwiseFusion, |b, x| {
        (0..40)
            .fold(x, |y, i| un(b, &format!("n{i}"), if i % 2 == 0 { UnaryOp::Exp } else { UnaryOp::Tanh }, y))
    });
    assert_eq!(operators(&g), "Elementwise Elementwise Elementwise");
}

// ---- quantised operators ----

fn qdq() -> QuantizeAttributes {
    QuantizeAttributes { axis: 0, block_size: 0, output_dtype: None, saturate: true }
}

/// A quantised constant or value, dequantised.
fn dequantize(b: &mut Builder, name: &str, q: ValueId, scale: f32) -> ValueId {
    let s = b.scalar(scale);
    b.node(name, Op::DequantizeLinear(qdq()), &[q, s])
}

fn quantize(b: &mut Builder, name: &str, x: ValueId, scale: f32, zero: u8) -> ValueId {
    let s = b.scalar(scale);
    let z = b.constant(&format!("{name}.z"), Tensor::scalar(zero));
    b.node(name, Op::QuantizeLinear(qdq()), &[x, s, z])
}

fn quantized(build: impl FnOnce(&mut Builder, ValueId) -> ValueId) -> Graph {
    let mut b = Builder::new();
    let q = b.typed_input("q", DType::U8, &[1, 2, 4, 4]);
    let x = dequantize(&mut b, "x", q, 0.5);
    let y = build(&mut b, x);
    b.output(y);
    let mut g = b.finish();
    settle(&Simplify, &mut g);
    settle(&QUANTIZED, &mut g);
    g
}

fn quantized_conv(b: &mut Builder, x: ValueId, bias_scale: f32) -> ValueId {
    let w = b.stored("wq", DType::I8, &[3, 2, 1, 1]);
    let w = dequantize(b, "w", w, 0.25);
    let bias = b.stored("bq", DType::I32, &[3]);
    let bias = dequantize(b, "bias", bias, bias_scale);
    b.node("conv", Op::Conv(ConvAttributes::default()), &[x, w, bias])
}

#[test]
fn quantized_convolution() {
    let g = quantized(|b, x| {
        let y = quantized_conv(b, x, 0.125);
        let y = un(b, "relu", UnaryOp::Relu, y);
        quantize(b, "y", y, 0.1, 0)
    });
    let node = only(&g, "QLinearConv");
    assert_eq!(operators(&g), "QLinearConv");
    assert_eq!(g.value(node.input(8).unwrap()).name, "bq", "the stored bias is used as it is");
    assert_eq!(node.op.activation(), Some(&None), "0 is the least that u8 with zero point 0 can be");
}

#[test]
fn limits_that_integers_do_not_imply_stay() {
    let g = quantized(|b, x| {
        let y = quantized_conv(b, x, 0.125);
        let y = un(b, "relu", UnaryOp::Relu, y);
        quantize(b, "y", y, 0.1, 128)
    });
    assert_eq!(only(&g, "QLinearConv").op.activation(), Some(&Some(UnaryOp::Relu)));
    // 6/0.02 is above 255, so the upper limit goes; 6/0.1 is not.
    for (scale, expected) in [(0.02, None), (0.1, Some(UnaryOp::ClipTo { min: 0.0, max: 6.0 }))] {
        let g = quantized(|b, x| {
            let y = quantized_conv(b, x, 0.125);
            let y = un(b, "relu6", UnaryOp::ClipTo { min: 0.0, max: 6.0 }, y);
            quantize(b, "y", y, scale, 0)
        });
        assert_eq!(only(&g, "QLinearConv").op.activation(), Some(&expected));
    }
}

#[test]
fn a_bias_in_other_units_is_converted() {
    let g = quantized(|b, x| {
        let y = quantized_conv(b, x, 0.25);
        quantize(b, "y", y, 0.1, 0)
    });
    let node = only(&g, "QLinearConv");
    let bias = g.value(node.input(8).unwrap()).tensor().unwrap();
    assert_eq!(bias.as_slice::<i32>(), [2, 4, 6]);
}

#[test]
fn quantized_product_with_bias() {
    let mut b = Builder::new();
    let q = b.typed_input("q", DType::I8, &[4, 8]);
    let x = dequantize(&mut b, "x", q, 0.5);
    let w = b.stored("wq", DType::I8, &[8, 3]);
    let w = dequantize(&mut b, "w", w, 0.5);
    let bias = b.floats(&[3], &[1.0, -0.5, 0.1]);
    let y = matmul(&mut b, "mm", x, w);
    let y = bin(&mut b, "biased", BinaryOp::Add, y, bias);
    let y = quantize(&mut b, "y", y, 0.1, 3);
    b.output(y);
    let mut g = b.finish();
    settle(&QUANTIZED, &mut g);
    assert_eq!(operators(&g), "QLinearMatMul");
    let node = only(&g, "QLinearMatMul");
    let bias = g.value(node.input(8).unwrap()).tensor().unwrap();
    assert_eq!(bias.as_slice::<i32>(), [4, -2, 0]);
}

#[test]
fn quantized_sums_pools_and_tables() {
    let g = quantized(|b, x| {
        let y = un(b, "s", UnaryOp::Sigmoid, x);
        let y = quantize(b, "sq", y, 1.0 / 256.0, 0);
        let y = dequantize(b, "sd", y, 1.0 / 256.0);
        let y = bin(b, "sum", BinaryOp::Add, x, y);
        let y = quantize(b, "sumq", y, 0.6, 10);
        let y = dequantize(b, "sumd", y, 0.3);
        let y =
            b.node("pool", Op::GlobalPool { kind: PoolKind::Average, layout: Layout::ChannelsFirst }, &[y]);
        quantize(b, "y", y, 0.3, 0)
    });
    assert_eq!(operators(&g), "QLinearUnary QLinearBinary QLinearPool");
    assert!(matches!(&only(&g, "QLinearPool").op, Op::QLinearPool(a) if a.kernel == [4, 4]
        && a.padding == Padding::Explicit(vec![0; 4])));
}

#[test]
fn movement_moves_integers() {
    let g = quantized(|b, x| {
        let y = reshape(b, "r", x, &[2, 16]);
        let y = transpose(b, "t", y, &[1, 0]);
        let z = quantize(b, "z", y, 0.7, 9);
        let d = dequantize(b, "d", z, 0.7);
        un(b, "y", UnaryOp::Exp, d)
    });
    let after = operators(&simplify_again(g));
    assert_eq!(after, "Reshape Transpose QLinearUnary DequantizeLinear Exp");
}

#[test]
fn concatenation_rescales_what_differs() {
    let g = quantized(|b, x| {
        let p = b.typed_input("p", DType::U8, &[1, 2, 4, 4]);
        let p = dequantize(b, "pd", p, 0.25);
        let y = b.node("cat", Op::Concat { axis: 1 }, &[x, p]);
        quantize(b, "y", y, 0.5, 0)
    });
    assert_eq!(operators(&g), "QLinearUnary Concat");
    assert_eq!(g.value(only(&g, "Concat").input(0).unwrap()).name, "q");
}

#[test]
fn the_largest_of_integers() {
    let mut b = Builder::new();
    let q = b.typed_input("q", DType::U8, &[4, 8]);
    let x = dequantize(&mut b, "x", q, 0.5);
    let op = Op::ArgReduce { largest: true, axis: 1, keep_dims: false, select_last_index: false };
    let y = b.node("y", op, &[x]);
    b.output(y);
    let mut g = b.finish();
    settle(&QUANTIZED, &mut g);
    assert_eq!(summary(&g), "y: i64[4] = ArgMax(q)");
}
