use super::LayoutChoice;
use crate::passes::Simplify;
use crate::passes::testing::{Builder, only, operators, settle, summary};
use crate::{
    BinaryOp, ConvAttributes, CoordinateMode, DType, Graph, Layout, NearestMode, Op, PadMode, Padding,
    PoolAttributes, PoolKind, ReduceOp, ResizeAttributes, ResizeMode, Tensor, UnaryOp, ValueId,
};

fn run(dims: &[usize], build: impl FnOnce(&mut Builder, ValueId) -> ValueId) -> Graph {
    let mut b = Builder::new();
    let x = b.input("x", dims);
    let y = build(&mut b, x);
    b.output(y);
    let mut g = b.finish();
    let ends = |g: &Graph| {
        let of = |v: &[ValueId]| -> Vec<_> {
            v.iter().map(|&v| (g.value(v).name.clone(), g.value(v).ty.clone())).collect()
        };
        (of(&g.inputs), of(&g.outputs))
    };
    let before = ends(&g);
    settle(&Simplify, &mut g);
    settle(&LayoutChoice, &mut g);
    settle(&Simplify, &mut g);
    assert_eq!(ends(&g), before, "inputs and outputs keep their names and shapes");
    g
}

fn conv(b: &mut Builder, name: &str, x: ValueId, channels: (usize, usize)) -> ValueId {
    let w = b.stored(&format!("{name}.w"), DType::F32, &[channels.1, channels.0, 1, 1]);
    b.node(name, Op::Conv(ConvAttributes::default()), &[x, w])
}

fn relu(b: &mut Builder, name: &str, x: ValueId) -> ValueId {
    b.node(name, Op::Unary(UnaryOp::Relu), &[x])
}

fn transpose(b: &mut Builder, name: &str, x: ValueId, perm: &[usize]) -> ValueId {
    b.node(name, Op::Transpose { perm: Some(perm.to_vec()) }, &[x])
}

fn reshape(b: &mut Builder, name: &str, x: ValueId, dims: &[i64]) -> ValueId {
    let shape = b.ints(dims);
    b.node(name, Op::Reshape { allow_zero: false }, &[x, shape])
}

/// Convolution, what `build` adds, convolution: nothing but the ends may be transposed.
#[track_caller]
fn between(build: impl FnOnce(&mut Builder, ValueId) -> ValueId, expected: &str) -> Graph {
    let g = run(&[2, 3, 4, 6], |b, x| {
        let y = conv(b, "first", x, (3, 8));
        let y = build(b, y);
        let channels = {
            // The builder infers types at the end only; a copy tells them now.
            let mut g = b.graph.clone();
            g.infer().unwrap();
            g.value(y).ty.tensor().unwrap().dims().unwrap()[1]
        };
        conv(b, "last", y, (channels, 5))
    });
    assert_eq!(operators(&g), format!("Transpose Conv {expected} Conv Transpose"), "{}", summary(&g));
    let all = g.iter_nodes().filter_map(|(_, n)| match &n.op {
        Op::Conv(a) => Some(a.layout),
        _ => None,
    });
    assert!(all.into_iter().all(|l| l == Layout::ChannelsLast));
    g
}

#[test]
fn convolutions_meet_without_transpositions() {
    let g = between(|b, y| relu(b, "r", y), "Relu");
    assert_eq!(
        summary(&g),
        "x.moved: f32[2,4,6,3] = Transpose(x)\n\
         first.2: f32[2,4,6,8] = Conv(x.moved, first.w)\n\
         r.2: f32[2,4,6,8] = Relu(first.2)\n\
         last.2: f32[2,4,6,5] = Conv(r.2, last.w)\n\
         last: f32[2,5,4,6] = Transpose(last.2)"
    );
}

fn pool(kind: PoolKind) -> Op {
    Op::Pool(PoolAttributes {
        kind,
        kernel: vec![2, 2],
        strides: vec![1, 1],
        dilations: Vec::new(),
        padding: Padding::Valid,
        ceil_mode: false,
        count_include_pad: false,
        storage_order_column: false,
        layout: Layout::ChannelsFirst,
    })
}

#[test]
fn pools_follow() {
    let g = between(|b, y| b.node("pool", pool(PoolKind::Max), &[y]), "MaxPool");
    assert!(matches!(&only(&g, "MaxPool").op, Op::Pool(a) if a.layout == Layout::ChannelsLast));
}

#[test]
fn operands_that_broadcast_are_moved() {
    let g = between(
        |b, y| {
            let scale: Vec<f32> = (0..8).map(|i| i as f32).collect();
            let scale = b.floats(&[8, 1, 1], &scale);
            let y = b.node("scaled", Op::Binary(BinaryOp::Mul), &[y, scale]);
            let map = b.stored("map", DType::F32, &[4, 6]);
            let y = b.node("sum", Op::Binary(BinaryOp::Add), &[map, y]);
            let half = b.scalar(0.5);
            let y = b.node("half", Op::Binary(BinaryOp::Mul), &[y, half]);
            let slope = b.stored("slope", DType::F32, &[8, 1, 1]);
            b.node("prelu", Op::Binary(BinaryOp::PRelu), &[y, slope])
        },
        "Mul Add Mul PRelu",
    );
    let operand = |op: &str, i: usize| g.value(only(&g, op).input(i).unwrap()).ty.to_string();
    // A stored vector needs another shape only; a stored picture keeps the order of its rows.
    assert_eq!(operand("PRelu", 1), "f32[1,1,1,8]");
    assert_eq!(operand("Add", 0), "f32[1,4,6,1]");
}

#[test]
fn axes_are_renumbered() {
    let g = between(
        |b, y| {
            let z = relu(b, "r", y);
            b.node("cat", Op::Concat { axis: 1 }, &[y, z])
        },
        "Relu Concat",
    );
    assert_eq!(only(&g, "Concat").op, Op::Concat { axis: 3 });
    let g = between(|b, y| b.node("s", Op::Softmax { axis: -3, log: false }, &[y]), "Softmax");
    assert_eq!(only(&g, "Softmax").op, Op::Softmax { axis: 3, log: false });
    let g = between(
        |b, y| {
            let pads = b.ints(&[0, 1, 2, 3, 0, 4, 5, 6]);
            b.node("p", Op::Pad { mode: PadMode::Edge }, &[y, pads])
        },
        "Pad",
    );
    let pads = only(&g, "Pad").input(1).unwrap();
    assert_eq!(g.value(pads).tensor().unwrap().to_i64s().unwrap(), [0, 2, 3, 1, 0, 5, 6, 4]);
    let g = between(
        |b, y| {
            let (starts, ends, axes) = (b.ints(&[1, 2]), b.ints(&[3, 5]), b.ints(&[1, -1]));
            b.node("s", Op::Slice, &[y, starts, ends, axes])
        },
        "Slice",
    );
    let axes = only(&g, "Slice").input(3).unwrap();
    assert_eq!(g.value(axes).tensor().unwrap().to_i64s().unwrap(), [3, 2]);
}

#[test]
fn resizing_follows() {
    let g = between(
        |b, y| {
            let scales = b.floats(&[4], &[1.0, 1.0, 2.0, 3.0]);
            let op = Op::Resize(ResizeAttributes {
                mode: ResizeMode::Nearest,
                coordinates: CoordinateMode::Asymmetric,
                nearest: NearestMode::Floor,
                cubic_coeff_a: -0.75,
                exclude_outside: false,
                extrapolation_value: 0.0,
                antialias: false,
                axes: None,
                aspect_ratio: crate::AspectRatio::Stretch,
            });
            let inputs = vec![Some(y), None, Some(scales)];
            b.graph.add_node_named("resize", op, inputs, vec!["resize".into()])[0]
        },
        "Resize",
    );
    let scales = only(&g, "Resize").input(2).unwrap();
    assert_eq!(g.value(scales).tensor().unwrap().as_slice::<f32>(), [1.0, 2.0, 3.0, 1.0]);
}

#[test]
fn squeeze_and_excitation() {
    let g = between(
        |b, y| {
            let global = Op::GlobalPool { kind: PoolKind::Average, layout: Layout::ChannelsFirst };
            let s = b.node("pool", global, &[y]);
            let s = conv(b, "fc1", s, (8, 2));
            let s = conv(b, "fc2", s, (2, 8));
            b.node("gate", Op::Binary(BinaryOp::Mul), &[s, y])
        },
        "GlobalAveragePool Conv Conv Mul",
    );
    let gate = only(&g, "Mul");
    assert_eq!(g.value(gate.input(0).unwrap()).ty.to_string(), "f32[2,1,1,8]");
}

#[test]
fn several_outputs_follow() {
    let mut b = Builder::new();
    let x = b.input("x", &[2, 3, 4, 6]);
    let y = conv(&mut b, "first", x, (3, 8));
    let sizes = b.ints(&[2, 6]);
    let parts = b.graph.add_node("split", Op::Split { axis: 1 }, &[y, sizes], 2);
    let z = conv(&mut b, "last", parts[0], (2, 5));
    b.output(z);
    b.output(parts[1]);
    let mut g = b.finish();
    settle(&LayoutChoice, &mut g);
    assert_eq!(operators(&g), "Transpose Conv Split Transpose Conv Transpose", "{}", summary(&g));
    assert_eq!(only(&g, "Split").op, Op::Split { axis: 3 });
    let names: Vec<&str> = g.outputs.iter().map(|&v| g.value(v).name.as_str()).collect();
    assert_eq!(names, ["last", "split:1"]);
}

#[test]
fn the_last_transposition_of_a_vector_costs_nothing() {
    let g = run(&[2, 3, 4, 6], |b, x| {
        let y = conv(b, "conv", x, (3, 8));
        let global = Op::GlobalPool { kind: PoolKind::Average, layout: Layout::ChannelsFirst };
        let y = b.node("pool", global, &[y]);
        let y = b.node("flat", Op::Flatten { axis: 1 }, &[y]);
        let w = b.stored("w", DType::F32, &[8, 10]);
        b.node("y", Op::MatMul(Default::default()), &[y, w])
    });
    assert_eq!(operators(&g), "Transpose Conv GlobalAveragePool Reshape MatMul");
    // Neither does a mean that drops the picture.
    let g = run(&[2, 3, 4, 6], |b, x| {
        let y = conv(b, "conv", x, (3, 8));
        let axes = b.ints(&[2, 3]);
        let op = Op::Reduce { op: ReduceOp::Sum, keep_dims: false, noop_with_empty_axes: false };
        b.node("y", op, &[y, axes])
    });
    assert_eq!(operators(&g), "Transpose Conv ReduceSum");
}

#[test]
fn transpositions_of_the_model_are_used() {
    // As TensorFlow exporters write it: channels last outside.
    let g = run(&[2, 4, 6, 3], |b, x| {
        let y = transpose(b, "in", x, &[0, 3, 1, 2]);
        let y = relu(b, "r", y);
        let y = conv(b, "conv", y, (3, 8));
        transpose(b, "y", y, &[0, 2, 3, 1])
    });
    assert_eq!(summary(&g), "r.2: f32[2,4,6,3] = Relu(x)\ny: f32[2,4,6,8] = Conv(r.2, conv.w)");
    // Pictures to tokens and back.
    let g = run(&[2, 3, 4, 6], |b, x| {
        let y = conv(b, "patches", x, (3, 8));
        let y = reshape(b, "rows", y, &[2, 8, 24]);
        let y = transpose(b, "tokens", y, &[0, 2, 1]);
        let w = b.stored("w", DType::F32, &[8, 8]);
        let y = b.node("mm", Op::MatMul(Default::default()), &[y, w]);
        let y = transpose(b, "back", y, &[0, 2, 1]);
        let y = reshape(b, "picture", y, &[2, 8, 4, 6]);
        let y = conv(b, "last", y, (8, 3));
        transpose(b, "y", y, &[0, 2, 3, 1])
    });
    assert_eq!(operators(&g), "Transpose Conv Reshape MatMul Reshape Conv");
}

#[test]
fn shuffled_channels_move_once() {
    let g = between(
        |b, y| {
            let y = reshape(b, "groups", y, &[2, 2, 4, 4, 6]);
            let y = transpose(b, "t", y, &[0, 2, 1, 3, 4]);
            reshape(b, "shuffled", y, &[2, 8, 4, 6])
        },
        "Reshape Transpose Reshape",
    );
    let nodes: Vec<_> = g.iter_nodes().map(|(_, n)| n).collect();
    assert_eq!(nodes[3].op, Op::Transpose { perm: Some(vec![0, 1, 2, 4, 3]) });
}

#[test]
fn depth_and_space() {
    between(
        |b, y| b.node("up", Op::DepthToSpace { block: 2, crd: false }, &[y]),
        "Reshape Transpose Reshape",
    );
    between(|b, y| b.node("down", Op::SpaceToDepth { block: 2 }, &[y]), "Reshape Transpose Reshape");
}

#[test]
fn the_channels_of_the_answer_are_reduced_last() {
    let g = run(&[2, 3, 4, 6], |b, x| {
        let y = conv(b, "conv", x, (3, 8));
        let op = Op::ArgReduce { largest: true, axis: 1, keep_dims: false, select_last_index: false };
        b.node("y", op, &[y])
    });
    assert_eq!(summary(&g).lines().last(), Some("y: i64[2,4,6] = ArgMax(conv.2)"));
}

#[test]
fn graphs_without_pictures_stay() {
    let mut b = Builder::new();
    let x = b.input("x", &[2, 3, 4, 6]);
    let y = transpose(&mut b, "t", x, &[0, 3, 1, 2]);
    let y = b.node("pool", pool(PoolKind::Max), &[y]);
    b.output(y);
    let mut g = b.finish();
    assert_eq!(settle(&LayoutChoice, &mut g), 0);
    // A one-dimensional convolution stays, too.
    let mut b = Builder::new();
    let x = b.input("x", &[2, 3, 4]);
    let w = b.stored("w", DType::F32, &[5, 3, 1]);
    let y = b.node("conv", Op::Conv(ConvAttributes::default()), &[x, w]);
    b.output(y);
    let mut g = b.finish();
    assert_eq!(settle(&LayoutChoice, &mut g), 0);
}

#[test]
fn quantised_pictures_follow() {
    let mut b = Builder::new();
    let x = b.typed_input("x", DType::U8, &[1, 3, 4, 4]);
    let s = b.scalar(0.5);
    let z = b.constant("z", Tensor::scalar(1u8));
    let w = b.stored("w", DType::U8, &[8, 3, 1, 1]);
    let conv = Op::QLinearConv(ConvAttributes::default());
    let y = b.node("conv", conv, &[x, s, z, w, s, z, s, z]);
    let y = b.node("table", Op::QLinearUnary(UnaryOp::Sigmoid), &[y, s, z, s, z]);
    let op = Op::QLinearBinary { op: BinaryOp::Add, activation: None };
    let y = b.node("sum", op, &[y, s, z, y, s, z, s, z]);
    b.output(y);
    let mut g = b.finish();
    settle(&LayoutChoice, &mut g);
    assert_eq!(operators(&g), "Transpose QLinearConv QLinearUnary QLinearBinary Transpose");
    let sum = only(&g, "QLinearBinary");
    assert_eq!(sum.input(1), Some(g.find("c1").unwrap()), "scales are no pictures");
}
