use super::Simplify;
use super::movement::reshape_groups;
use crate::passes::testing::{Builder, only, operators, settle, summary};
use crate::{
    BinaryOp, ConvAttributes, DType, GemmAttributes, Layout, Op, PadMode, Padding, PoolAttributes, PoolKind,
    QuantizeAttributes, ReduceOp, Tensor, UnaryOp, ValueId, VariadicOp,
};

/// Builds a graph whose only input is `x`, simplifies it, and compares what is left.
#[track_caller]
fn check(dims: &[usize], build: impl FnOnce(&mut Builder, ValueId) -> ValueId, expected: &str) {
    let mut b = Builder::new();
    let x = b.input("x", dims);
    let y = build(&mut b, x);
    b.output(y);
    let mut g = b.finish();
    let outputs: Vec<String> = g.outputs.iter().map(|&v| g.value(v).name.clone()).collect();
    settle(&Simplify, &mut g);
    assert_eq!(summary(&g), expected);
    let after: Vec<String> = g.outputs.iter().map(|&v| g.value(v).name.clone()).collect();
    assert_eq!(after, outputs, "outputs keep their names");
}

fn binary(b: &mut Builder, name: &str, op: BinaryOp, p: ValueId, q: ValueId) -> ValueId {
    b.node(name, Op::Binary(op), &[p, q])
}

fn relu(b: &mut Builder, name: &str, x: ValueId) -> ValueId {
    b.node(name, Op::Unary(UnaryOp::Relu), &[x])
}

#[test]
fn neutral_operands_vanish() {
    check(
        &[2, 3],
        |b, x| {
            let one = b.scalar(1.0);
            let zero = b.scalar(0.0);
            let y = binary(b, "a", BinaryOp::Mul, one, x);
            let y = binary(b, "b", BinaryOp::Add, y, zero);
            let y = binary(b, "c", BinaryOp::Sub, y, zero);
            let y = binary(b, "d", BinaryOp::Div, y, one);
            relu(b, "y", y)
        },
        "y: f32[2,3] = Relu(x)",
    );
}

#[test]
fn a_neutral_operand_that_broadcasts_stays() {
    check(
        &[3],
        |b, x| {
            let zeros = b.floats(&[1, 1], &[0.0]);
            binary(b, "y", BinaryOp::Add, x, zeros)
        },
        "y: f32[1,3] = Add(x, [0.0])",
    );
    check(
        &[3],
        |b, x| {
            let one = b.scalar(1.0);
            // 0 − x is no neutral operand, nor is 1/x.
            let zero = b.scalar(0.0);
            let y = binary(b, "neg", BinaryOp::Sub, zero, x);
            binary(b, "y", BinaryOp::Div, one, y)
        },
        "neg: f32[3] = Sub([0.0], x)\ny: f32[3] = Reciprocal(neg)",
    );
}

#[test]
fn an_output_keeps_its_name_when_its_node_goes() {
    check(
        &[4],
        |b, x| {
            let y = relu(b, "made", x);
            b.node("y", Op::Unary(UnaryOp::Identity), &[y])
        },
        "y: f32[4] = Relu(x)",
    );
    // An output that is an input has to be copied.
    check(&[4], |b, x| b.node("y", Op::Dropout { seed: None }, &[x]), "y: f32[4] = Identity(x)");
}

#[test]
fn powers_and_divisions() {
    check(
        &[2],
        |b, x| {
            let (two, half, three) = (b.scalar(2.0), b.scalar(0.5), b.scalar(3.0));
            let y = binary(b, "square", BinaryOp::Pow, x, two);
            let y = binary(b, "root", BinaryOp::Pow, y, half);
            let y = binary(b, "halved", BinaryOp::Div, y, two);
            binary(b, "third", BinaryOp::Div, y, three)
        },
        "square: f32[2] = Mul(x, x)\nroot: f32[2] = Sqrt(square)\nhalved: f32[2] = Mul(root, [0.5])\n\
         third: f32[2] = Div(halved, [3.0])",
    );
}

#[test]
fn limits_have_one_spelling() {
    check(
        &[2],
        |b, x| {
            let (zero, six) = (b.scalar(0.0), b.scalar(6.0));
            let y = binary(b, "max", BinaryOp::Max, zero, x);
            binary(b, "y", BinaryOp::Min, y, six)
        },
        "y: f32[2] = ClipTo(x)",
    );
    check(
        &[2],
        |b, x| {
            let zero = b.scalar(0.0);
            let y = b.graph.add_node_named("y", Op::Clip, vec![Some(x), Some(zero), None], vec!["y".into()]);
            y[0]
        },
        "y: f32[2] = Relu(x)",
    );
    check(
        &[2],
        |b, x| {
            let a = b.scalar(0.1);
            let scaled = binary(b, "scaled", BinaryOp::Mul, a, x);
            binary(b, "y", BinaryOp::Max, x, scaled)
        },
        "y: f32[2] = LeakyRelu(x)",
    );
    // Limits whose result somebody else reads cannot be merged.
    check(
        &[2],
        |b, x| {
            let y = relu(b, "a", x);
            let z = b.node("b", Op::Unary(UnaryOp::ClipTo { min: -1.0, max: 1.0 }), &[y]);
            binary(b, "y", BinaryOp::Add, y, z)
        },
        "a: f32[2] = Relu(x)\nb: f32[2] = ClipTo(a)\ny: f32[2] = Add(a, b)",
    );
}

#[test]
fn variadic_of_two() {
    check(
        &[2],
        |b, x| {
            let y = relu(b, "r", x);
            b.node("y", Op::Variadic(VariadicOp::Sum), &[x, y])
        },
        "r: f32[2] = Relu(x)\ny: f32[2] = Add(x, r)",
    );
}

#[test]
fn gemm_becomes_matmul() {
    check(
        &[2, 3],
        |b, x| {
            let w = b.stored("w", DType::F32, &[4, 3]);
            let c = b.stored("c", DType::F32, &[1, 4]);
            let op = Op::Gemm(GemmAttributes { alpha: 0.5, beta: 1.0, trans_a: false, trans_b: true });
            b.node("y", op, &[x, w, c])
        },
        "y: f32[2,4] = MatMul(x, w, c.2)",
    );
    check(
        &[2, 3],
        |b, x| {
            let w = b.stored("w", DType::F32, &[3, 4]);
            let c = b.scalar(3.0);
            let op = Op::Gemm(GemmAttributes { alpha: 1.0, beta: 2.0, trans_a: false, trans_b: false });
            b.node("y", op, &[x, w, c])
        },
        "y: f32[2,4] = MatMul(x, w, [6.0,6.0,6.0,6.0])",
    );
}

#[test]
fn products_read_transposed_operands() {
    check(
        &[2, 5, 3],
        |b, x| {
            let k = relu(b, "k", x);
            let t = b.node("t", Op::Transpose { perm: Some(vec![0, 2, 1]) }, &[k]);
            b.node("y", Op::MatMul(Default::default()), &[x, t])
        },
        "k: f32[2,5,3] = Relu(x)\ny: f32[2,5,5] = MatMul(x, k)",
    );
}

#[test]
fn reshapes_of_all_kinds() {
    check(
        &[2, 3, 1, 1],
        |b, x| {
            let y = b.node("flat", Op::Flatten { axis: 1 }, &[x]);
            let axes = b.ints(&[0]);
            let y = b.node("wide", Op::Unsqueeze, &[y, axes]);
            let y = relu(b, "r", y);
            let y = b.node("narrow", Op::Squeeze, &[y, axes]);
            let shape = b.ints(&[-1]);
            b.node("y", Op::Reshape { allow_zero: false }, &[y, shape])
        },
        "wide: f32[1,2,3] = Reshape(x, [1.0,2.0,3.0])\nr: f32[1,2,3] = Relu(wide)\ny: f32[6] = Reshape(r, [6.0])",
    );
}

#[test]
fn transpositions_merge_and_vanish() {
    check(
        &[2, 3, 4],
        |b, x| {
            let y = b.node("a", Op::Transpose { perm: Some(vec![1, 2, 0]) }, &[x]);
            let y = b.node("b", Op::Transpose { perm: Some(vec![2, 0, 1]) }, &[y]);
            relu(b, "y", y)
        },
        "y: f32[2,3,4] = Relu(x)",
    );
    check(
        &[1, 3, 4],
        |b, x| b.node("y", Op::Transpose { perm: Some(vec![1, 0, 2]) }, &[x]),
        "y: f32[3,1,4] = Reshape(x, [3.0,1.0,4.0])",
    );
}

#[test]
fn slices_move_before_the_split_into_heads() {
    check(
        &[1, 7, 24],
        |b, x| {
            let shape = b.ints(&[1, 7, 3, 2, 4]);
            let y = b.node("split", Op::Reshape { allow_zero: false }, &[x, shape]);
            let y = b.node("t", Op::Transpose { perm: Some(vec![2, 0, 3, 1, 4]) }, &[y]);
            let one = b.constant("one", Tensor::scalar(1i64));
            b.node("k", Op::Gather { axis: 0 }, &[y, one])
        },
        "k.slice.slice.slice: f32[1,7,8] = Slice(x, [8.0], [16.0], [2.0])\n\
         k.slice.slice: f32[1,7,1,2,4] = Reshape(k.slice.slice.slice, [1.0,7.0,1.0,2.0,4.0])\n\
         k.slice: f32[1,1,2,7,4] = Transpose(k.slice.slice)\n\
         k: f32[1,2,7,4] = Reshape(k.slice, [1.0,2.0,7.0,4.0])",
    );
}

#[test]
fn nothing_moves() {
    check(
        &[2, 3],
        |b, x| {
            let shape = b.ints(&[1, 3]);
            let y = b.node("e", Op::Expand, &[x, shape]);
            let (starts, ends, axes) = (b.ints(&[0]), b.ints(&[i64::MAX]), b.ints(&[1]));
            let y = b.node("s", Op::Slice, &[y, starts, ends, axes]);
            let pads = b.ints(&[0, 0, 0, 0]);
            let y = b.node("p", Op::Pad { mode: PadMode::Constant }, &[y, pads]);
            let y = b.node("c", Op::Concat { axis: 0 }, &[y]);
            relu(b, "y", y)
        },
        "y: f32[2,3] = Relu(x)",
    );
    // As many elements, but backwards.
    check(
        &[3],
        |b, x| {
            let (starts, ends, axes, steps) = (b.ints(&[-1]), b.ints(&[-4]), b.ints(&[0]), b.ints(&[-1]));
            b.node("y", Op::Slice, &[x, starts, ends, axes, steps])
        },
        "y: f32[3] = Slice(x, [-1.0], [-4.0], [0.0], [-1.0])",
    );
}

fn conv(padding: Padding) -> Op {
    Op::Conv(ConvAttributes { padding, strides: vec![2, 2], ..ConvAttributes::default() })
}

fn padding_of(op: &Op) -> Padding {
    match op {
        Op::Conv(a) => a.padding.clone(),
        Op::Pool(a) => a.padding.clone(),
        _ => panic!("{op:?} has no padding"),
    }
}

#[test]
fn paddings_are_written_out_and_taken_over() {
    let mut b = Builder::new();
    let x = b.input("x", &[1, 3, 6, 7]);
    let w = b.stored("w", DType::F32, &[4, 3, 3, 3]);
    let y = b.node("y", conv(Padding::SameUpper), &[x, w]);
    b.output(y);
    let mut g = b.finish();
    settle(&Simplify, &mut g);
    let node = only(&g, "Conv");
    assert_eq!(padding_of(&node.op), Padding::Explicit(vec![0, 1, 1, 1]));
    assert!(matches!(&node.op, Op::Conv(a) if a.kernel == [3, 3] && a.dilations == [1, 1]));

    let mut b = Builder::new();
    let x = b.input("x", &[1, 3, 6, 7]);
    let w = b.stored("w", DType::F32, &[4, 3, 3, 3]);
    let pads = b.ints(&[0, 0, 1, 2, 0, 0, 3, 4]);
    let p = b.node("p", Op::Pad { mode: PadMode::Constant }, &[x, pads]);
    let y = b.node("y", conv(Padding::Explicit(vec![1, 0, 0, 0])), &[p, w]);
    b.output(y);
    let mut g = b.finish();
    settle(&Simplify, &mut g);
    assert_eq!(operators(&g), "Conv");
    assert_eq!(padding_of(&only(&g, "Conv").op), Padding::Explicit(vec![2, 2, 3, 4]));
}

fn pool(kind: PoolKind, kernel: usize) -> PoolAttributes {
    PoolAttributes {
        kind,
        kernel: vec![kernel, kernel],
        strides: vec![2, 2],
        dilations: Vec::new(),
        padding: Padding::Valid,
        ceil_mode: false,
        count_include_pad: false,
        storage_order_column: false,
        layout: Layout::ChannelsFirst,
    }
}

#[track_caller]
fn padded_pool(attributes: PoolAttributes, value: f32, pad: i64, expected: &str) -> Op {
    let mut b = Builder::new();
    let x = b.input("x", &[1, 3, 8, 8]);
    let (pads, value) = (b.ints(&[0, 0, pad, pad, 0, 0, pad, pad]), b.scalar(value));
    let p = b.node("p", Op::Pad { mode: PadMode::Constant }, &[x, pads, value]);
    let y = b.node("y", Op::Pool(attributes), &[p]);
    b.output(y);
    let mut g = b.finish();
    settle(&Simplify, &mut g);
    assert_eq!(operators(&g), expected);
    g.iter_nodes().last().unwrap().1.op.clone()
}

#[test]
fn pools_take_the_padding_that_means_the_same() {
    padded_pool(pool(PoolKind::Max, 3), f32::NEG_INFINITY, 1, "MaxPool");
    padded_pool(pool(PoolKind::Max, 3), 0.0, 1, "Pad MaxPool");
    // A window of nothing but padding would have no maximum.
    padded_pool(pool(PoolKind::Max, 3), f32::NEG_INFINITY, 3, "Pad MaxPool");
    let op = padded_pool(pool(PoolKind::Average, 3), 0.0, 1, "AveragePool");
    assert!(matches!(op, Op::Pool(a) if a.count_include_pad));
    padded_pool(pool(PoolKind::Average, 3), 1.0, 1, "Pad AveragePool");
}

#[test]
fn means_over_the_picture() {
    let mut b = Builder::new();
    let x = b.input("x", &[2, 3, 8, 8]);
    let w = b.stored("w", DType::F32, &[4, 3, 1, 1]);
    let y = b.node("conv", Op::Conv(ConvAttributes::default()), &[x, w]);
    let axes = b.ints(&[-1, -2]);
    let mean = Op::Reduce { op: ReduceOp::Mean, keep_dims: false, noop_with_empty_axes: false };
    let m = b.node("mean", mean.clone(), &[y, axes]);
    let p = b.node("pool", Op::Pool(pool(PoolKind::Average, 8)), &[y]);
    // Not over the whole picture.
    let rows = b.ints(&[2]);
    let r = b.node("rows", mean, &[y, rows]);
    for v in [m, p, r] {
        b.output(v);
    }
    let mut g = b.finish();
    settle(&Simplify, &mut g);
    assert_eq!(operators(&g), "Conv GlobalAveragePool Reshape GlobalAveragePool ReduceMean");
}

#[test]
fn quantising_again_with_the_same_parameters() {
    let quantize = QuantizeAttributes { axis: 1, block_size: 0, output_dtype: None, saturate: true };
    for (again, expected) in [(0.5, "Transpose"), (0.25, "Transpose DequantizeLinear QuantizeLinear")] {
        let mut b = Builder::new();
        let x = b.typed_input("x", DType::U8, &[2, 3]);
        let (s, t) = (b.scalar(0.5), b.scalar(again));
        let z = b.constant("z", Tensor::scalar(7u8));
        let y = b.node("t", Op::Transpose { perm: Some(vec![1, 0]) }, &[x]);
        let y = b.node("d", Op::DequantizeLinear(quantize.clone()), &[y, s, z]);
        let y = b.node("q", Op::QuantizeLinear(quantize.clone()), &[y, t, z]);
        b.output(y);
        let mut g = b.finish();
        settle(&Simplify, &mut g);
        assert_eq!(operators(&g), expected);
    }
}

#[test]
fn groups_of_reshaped_axes() {
    let groups = |from: &[usize], to: &[usize]| {
        reshape_groups(from, to).map(|g| g.into_iter().map(|g| (g.from, g.to)).collect::<Vec<_>>())
    };
    assert_eq!(
        groups(&[1, 6, 4, 4], &[1, 2, 3, 16]),
        Some(vec![(vec![1], vec![1, 2]), (vec![2, 3], vec![3])])
    );
    assert_eq!(groups(&[2, 3], &[3, 2]), Some(vec![(vec![0, 1], vec![0, 1])]));
    assert_eq!(groups(&[1, 1], &[]), Some(vec![]));
    assert_eq!(groups(&[0, 3], &[3, 0]), None);
}
