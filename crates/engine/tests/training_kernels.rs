//! Nodes of training through the choice of kernels of a session give what the interpreter's reference gives.

use std::collections::HashMap;

use lightering_engine::{PlanOptions, RuntimeValue, Session, SessionOptions, interpret};
use lightering_graph::*;
use lightering_kernels::ThreadPool;
use lightering_meter::{MachineProfile, MemoryPool};

struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }
    fn floats(&mut self, dims: &[usize]) -> Tensor {
        let values: Vec<f32> =
            (0..dims.iter().product()).map(|_| self.next() as f32 / (1u64 << 30) as f32 - 1.0).collect();
        Tensor::from_slice(dims, &values)
    }
    fn ints(&mut self, dims: &[usize], below: usize) -> Tensor {
        let values: Vec<i64> = (0..dims.iter().product()).map(|_| self.below(below) as i64).collect();
        Tensor::from_slice(dims, &values)
    }
}

fn session(graph: &Graph, threads: usize) -> Session {
    let plan = PlanOptions::new(MachineProfile::conservative(), threads);
    Session::new(graph, Vec::new(), &SessionOptions::new(plan)).unwrap()
}

/// Runs one node both ways and compares; operands are all inputs of the graph, `None` where one is absent.
fn check(op: Op, operands: Vec<Option<Tensor>>, results: usize) {
    let name = op.name();
    let mut graph = Graph::new("case");
    let mut feed = HashMap::new();
    let mut given = Vec::new();
    let mut inputs = Vec::new();
    for (i, operand) in operands.into_iter().enumerate() {
        inputs.push(operand.map(|t| {
            let v = graph.add_input(format!("x{i}"), t.tensor_type());
            feed.insert(format!("x{i}"), RuntimeValue::from(t.clone()));
            given.push((v, RuntimeValue::from(t)));
            v
        }));
    }
    let names = (0..results).map(|i| format!("y{i}")).collect();
    let outputs = graph.add_node_named("node", op.clone(), inputs, names);
    graph.outputs.clone_from(&outputs);
    graph.infer().unwrap();
    let want = interpret(&graph, &given, &[], &MemoryPool::unbounded(), &ThreadPool::new(1)).unwrap();
    for threads in [1, 2] {
        let mut session = session(&graph, threads);
        let got = session.run_to_values(&mut feed).unwrap();
        for (i, (want, got)) in want.iter().zip(&got).enumerate() {
            let (want, got) = (want.tensor().unwrap(), got.tensor().unwrap());
            assert_eq!(want.tensor_type(), got.tensor_type(), "{name}");
            for (j, (w, g)) in want.to_f64s().unwrap().iter().zip(got.to_f64s().unwrap()).enumerate() {
                assert!((w - g).abs() <= 2e-4 * (1.0 + w.abs()), "{op:?}: result {i} [{j}] is {g}, not {w}");
            }
        }
    }
}

fn train(op: TrainOp) -> Op {
    Op::Train(Box::new(op))
}

#[test]
fn convolutions_and_pools() {
    let mut r = Numbers(1);
    for _ in 0..25 {
        let (n, groups) = (1 + r.below(3), r.pick(&[1, 1, 2, 6]));
        let (h, w) = (3 + r.below(6), 3 + r.below(6));
        let in_c = 6 * (1 + r.below(3));
        let out_c = if groups == 6 { in_c } else { 6 * (1 + r.below(4)) };
        let groups = if groups == 6 { in_c } else { groups };
        let kernel = r.pick(&[[1, 1], [3, 3], [3, 2]]);
        let conv = ConvAttributes {
            kernel: kernel.to_vec(),
            strides: r.pick(&[[1, 1], [2, 2], [1, 2]]).to_vec(),
            padding: Padding::Explicit(r.pick(&[[0i64; 4], [1, 1, 1, 1], [0, 1, 1, 0]]).to_vec()),
            groups,
            layout: Layout::ChannelsLast,
            ..ConvAttributes::default()
        };
        let input = vec![n, h, w, in_c];
        let weight = vec![out_c, in_c / groups, kernel[0], kernel[1]];
        let mut graph = Graph::new("shape");
        let x = graph.add_input("x", TensorType::fixed(DType::F32, &input));
        let k = graph.add_input("w", TensorType::fixed(DType::F32, &weight));
        let y = graph.add_node("conv", Op::Conv(conv.clone()), &[x, k], 1)[0];
        graph.infer().unwrap();
        let output = graph.value(y).ty.tensor().unwrap().dims().unwrap();
        let (x, k, dy) = (r.floats(&input), r.floats(&weight), r.floats(&output));
        check(Op::Conv(conv.clone()), vec![Some(x.clone()), Some(k.clone()), Some(r.floats(&[out_c]))], 1);
        let grad = TrainOp::ConvInputGrad { conv: conv.clone(), input: input.clone() };
        check(train(grad), vec![Some(dy.clone()), Some(k)], 1);
        check(train(TrainOp::ConvWeightGrad { conv, weight }), vec![Some(x), Some(dy)], 1);

        let kind = r.pick(&[PoolKind::Max, PoolKind::Average]);
        let pool = PoolAttributes {
            kernel: vec![2, 3],
            strides: r.pick(&[[1, 1], [2, 2]]).to_vec(),
            padding: Padding::Explicit(r.pick(&[[0i64; 4], [1, 1, 0, 1]]).to_vec()),
            count_include_pad: r.below(2) == 0,
            layout: Layout::ChannelsLast,
            kind,
            dilations: vec![1, 1],
            ceil_mode: false,
            storage_order_column: false,
        };
        let mut graph = Graph::new("shape");
        let x = r.floats(&input);
        let v = graph.add_input("x", x.tensor_type());
        let y = graph.add_node("pool", Op::Pool(pool.clone()), &[v], 1)[0];
        graph.outputs.push(y);
        graph.infer().unwrap();
        let given = [(v, RuntimeValue::from(x.clone()))];
        let y = interpret(&graph, &given, &[], &MemoryPool::unbounded(), &ThreadPool::new(1)).unwrap();
        let y = y[0].tensor().unwrap().clone();
        let dy = r.floats(y.dims());
        let max = kind == PoolKind::Max;
        let operands = vec![Some(dy), max.then_some(x), max.then_some(y)];
        check(train(TrainOp::PoolGrad { pool, input }), operands, 1);
    }
}

#[test]
fn products_sums_and_transpositions() {
    let mut r = Numbers(2);
    for _ in 0..40 {
        let (b, m, n, k) = (1 + r.below(3), 1 + r.below(70), 1 + r.below(70), 1 + r.below(40));
        let (trans_a, trans_b) = (r.below(2) == 0, r.below(2) == 0);
        let a = MatMulAttributes { trans_a, trans_b, alpha: r.pick(&[1.0, -0.25]), ..Default::default() };
        let side = |rows: usize, columns: usize, turned: bool| {
            if turned { vec![b, columns, rows] } else { vec![b, rows, columns] }
        };
        let (x, w) = (side(m, k, trans_a), side(k, n, trans_b));
        let w = if r.below(2) == 0 { w[1..].to_vec() } else { w };
        check(Op::MatMul(a), vec![Some(r.floats(&x)), Some(r.floats(&w)), Some(r.floats(&[n]))], 1);
        let a = GemmAttributes { alpha: 0.5, beta: 1.0, trans_a, trans_b };
        let bias = (r.below(2) == 0).then(|| r.floats(&[n]));
        let x = side(m, k, trans_a)[1..].to_vec();
        let w = side(k, n, trans_b)[1..].to_vec();
        check(Op::Gemm(a), vec![Some(r.floats(&x)), Some(r.floats(&w)), bias], 1);
    }
    for perm in [
        vec![0, 2, 1, 3],
        vec![0, 3, 1, 2],
        vec![0, 2, 3, 1],
        vec![0, 1, 3, 2],
        vec![3, 2, 1, 0],
        vec![1, 0, 2, 3],
    ] {
        check(Op::Transpose { perm: Some(perm) }, vec![Some(r.floats(&[2, 3, 5, 8]))], 1);
    }
    for axes in [vec![0], vec![1, 2], vec![-1], vec![0, 1], vec![0, 2], vec![2, 3]] {
        for op in [ReduceOp::Sum, ReduceOp::Mean] {
            let mut graph = Graph::new("reduce");
            let x = r.floats(&[3, 4, 5, 6]);
            let v = graph.add_input("x", x.tensor_type());
            let list = graph.add_constant("axes", Tensor::from_slice(&[axes.len()], &axes));
            let reduce = Op::Reduce { op, keep_dims: true, noop_with_empty_axes: false };
            let y = graph.add_node("reduce", reduce, &[v, list], 1)[0];
            graph.outputs.push(y);
            graph.infer().unwrap();
            let given = [(v, RuntimeValue::from(x.clone()))];
            let want = interpret(&graph, &given, &[], &MemoryPool::unbounded(), &ThreadPool::new(1)).unwrap();
            let mut feed = HashMap::from([("x".to_owned(), RuntimeValue::from(x))]);
            let got = session(&graph, 2).run_to_values(&mut feed).unwrap();
            let (want, got) = (want[0].tensor().unwrap(), got[0].tensor().unwrap());
            for (w, g) in want.as_slice::<f32>().iter().zip(got.as_slice::<f32>()) {
                assert!((w - g).abs() < 1e-4, "{op:?} over {axes:?}: {g}, not {w}");
            }
        }
    }
    // A picture times a factor per image and channel.
    for dims in [[2, 1, 1, 5], [1, 1, 1, 5], [2, 1, 4, 5], [2, 3, 4, 1], [2, 1, 4, 1]] {
        check(Op::Binary(BinaryOp::Mul), vec![Some(r.floats(&[2, 3, 4, 5])), Some(r.floats(&dims))], 1);
    }
}

#[test]
fn normalisations_losses_and_masks() {
    let mut r = Numbers(3);
    for _ in 0..12 {
        let dims = [2 + r.below(4), 1 + r.below(9), 3 + r.below(30)];
        let c = dims[2];
        let (x, dy) = (Some(r.floats(&dims)), Some(r.floats(&dims)));
        let scale = (r.below(2) == 0).then(|| r.floats(&[c]));
        let positive = |t: Tensor| {
            Tensor::from_slice(&[c], &t.as_slice::<f32>().iter().map(|v| v + 1.5).collect::<Vec<_>>())
        };
        let (mean, variance) = (Some(r.floats(&[c])), Some(positive(r.floats(&[c]))));
        check(train(TrainOp::BatchStatistics { axis: 2 }), vec![x.clone()], 2);
        let bias = scale.clone();
        let operands = vec![x.clone(), mean.clone(), variance.clone(), scale.clone(), bias];
        check(train(TrainOp::Normalise { axis: 2, epsilon: 1e-3 }), operands, 1);
        let operands = vec![x.clone(), dy.clone(), mean, variance, scale.clone()];
        check(train(TrainOp::NormaliseGrad { axis: 2, epsilon: 1e-3, batch: false }), operands.clone(), 3);
        check(train(TrainOp::NormaliseGrad { axis: 2, epsilon: 1e-3, batch: true }), operands, 3);
        let operands = vec![x.clone(), scale, dy.clone()];
        check(train(TrainOp::LayerNormGrad { axis: -1, epsilon: 1e-3 }), operands, 3);
        let operands = vec![x.clone(), Some(r.floats(&[c])), dy.clone()];
        check(train(TrainOp::RmsNormGrad { axis: -1, epsilon: 1e-3 }), operands, 2);
        check(train(TrainOp::ChannelSum { axis: 2 }), vec![dy.clone()], 1);
        check(train(TrainOp::SoftmaxGrad { axis: -1, log: r.below(2) == 0 }), vec![x.clone(), dy.clone()], 1);
        check(train(TrainOp::SignMask(MaskRule::Above(0.1))), vec![x.clone()], 1);
        check(train(TrainOp::SignMask(MaskRule::Between(-0.5, 0.5))), vec![x.clone()], 1);
        let bits: Vec<u8> =
            (0..(dims.iter().product::<usize>()).div_ceil(8)).map(|_| r.next() as u8).collect();
        let bits = Tensor::from_slice(&[bits.len()], &bits);
        check(train(TrainOp::MaskGrad), vec![Some(bits), dy.clone()], 1);
        let (smooth, ignore) = (r.pick(&[0.0, 0.1]), r.pick(&[None, Some(1)]));
        let labels = match r.below(2) {
            0 => r.ints(&dims[..2], c),
            _ => r.floats(&dims),
        };
        let weights = (r.below(2) == 0).then(|| r.floats(&dims[..2]));
        let operands = vec![x.clone(), Some(labels.clone()), weights.clone()];
        check(train(TrainOp::CrossEntropy { label_smoothing: smooth, ignore }), operands, 2);
        let dloss = Some(Tensor::from_slice(&[], &[1.5f32]));
        let operands = vec![x.clone(), Some(labels), dloss, weights];
        check(train(TrainOp::CrossEntropyGrad { label_smoothing: smooth, ignore }), operands, 1);
        let indices = r.ints(&dims[..2], 7);
        check(train(TrainOp::GatherGrad { axis: 0, input: vec![7, c] }), vec![Some(indices), dy.clone()], 1);
        let saved = positive_like(&r.floats(&dims));
        for op in [
            UnaryOp::Relu,
            UnaryOp::ClipTo { min: 0.8, max: 1.7 },
            UnaryOp::HardSwish,
            UnaryOp::HardSigmoid { alpha: 0.3, beta: 0.5 },
            UnaryOp::Sigmoid,
            UnaryOp::Swish { alpha: 1.0 },
            UnaryOp::Gelu { tanh: false },
            UnaryOp::Gelu { tanh: true },
            UnaryOp::LeakyRelu { alpha: 0.1 },
            UnaryOp::Elu { alpha: 1.2 },
            UnaryOp::Tanh,
            UnaryOp::Erf,
            UnaryOp::Exp,
            UnaryOp::Sqrt,
            UnaryOp::Rsqrt,
            UnaryOp::Reciprocal,
            UnaryOp::Abs,
            UnaryOp::Neg,
            UnaryOp::Log,
            UnaryOp::Softplus,
            UnaryOp::Softsign,
            UnaryOp::Cos,
        ] {
            check(train(TrainOp::UnaryGrad(op)), vec![Some(saved.clone()), dy.clone()], 1);
            if !matches!(op, UnaryOp::Sqrt | UnaryOp::Rsqrt | UnaryOp::Log | UnaryOp::Reciprocal) {
                check(train(TrainOp::UnaryGrad(op)), vec![x.clone(), dy.clone()], 1);
            }
        }
    }
}

fn positive_like(t: &Tensor) -> Tensor {
    Tensor::from_slice(t.dims(), &t.as_slice::<f32>().iter().map(|v| v + 1.2).collect::<Vec<_>>())
}

#[test]
fn attention() {
    let mut r = Numbers(4);
    for case in 0..12 {
        let (b, kv, group, s, t, d) = (
            1 + r.below(2),
            1 + r.below(2),
            1 + r.below(2),
            1 + r.below(40),
            1 + r.below(70),
            r.pick(&[4, 16]),
        );
        let flat = case % 2 == 0;
        let attributes = AttentionAttributes {
            causal: r.below(2) == 0,
            q_num_heads: if flat { kv * group } else { 0 },
            kv_num_heads: if flat { kv } else { 0 },
            scale: None,
            softcap: 0.0,
            qk_output: QkOutput::Raw,
            softmax_precision: None,
        };
        let t = if attributes.causal { s } else { t };
        let dims = |heads: usize, length: usize| {
            if flat { vec![b, length, heads * d] } else { vec![b, heads, length, d] }
        };
        let (q, k, v) = (r.floats(&dims(kv * group, s)), r.floats(&dims(kv, t)), r.floats(&dims(kv, t)));
        let mask = (case % 3 == 0).then(|| r.floats(&[s, t]));
        let dy = r.floats(q.dims());
        check(train(TrainOp::AttentionGrad(attributes)), vec![Some(q), Some(k), Some(v), mask, Some(dy)], 3);
    }
}

#[test]
fn long_short_term_memories() {
    let mut r = Numbers(6);
    for case in 0..10 {
        let (t, b, i, h) = (1 + r.below(6), 1 + r.below(5), 1 + r.below(20), 1 + r.below(20));
        let attributes = RecurrentAttributes {
            hidden_size: h,
            direction: Direction::Forward,
            activations: vec![UnaryOp::Sigmoid, UnaryOp::Tanh, UnaryOp::Tanh],
            clip: None,
            batch_first: case == 9,
            input_forget: false,
            linear_before_reset: false,
        };
        let first = case == 9;
        let x = if first { [b, t, i] } else { [t, b, i] };
        let y = if first { [b, t, 1, h] } else { [t, 1, b, h] };
        let state = if first { [b, 1, h] } else { [1, b, h] };
        let maybe = |r: &mut Numbers, dims: &[usize]| (r.below(3) > 0).then(|| r.floats(dims));
        let initial = case % 2 == 0;
        let operands = vec![
            Some(r.floats(&x)),
            Some(r.floats(&[1, 4 * h, i])),
            Some(r.floats(&[1, 4 * h, h])),
            Some(r.floats(&[1, 8 * h])),
            None,
            initial.then(|| r.floats(&state)),
            initial.then(|| r.floats(&state)),
            None,
            Some(r.floats(&y)),
            maybe(&mut r, &state),
            maybe(&mut r, &state),
        ];
        let results = if initial { 6 } else { 4 };
        let op = TrainOp::RecurrentGrad { cell: RecurrentCell::Lstm, attributes };
        check(train(op), operands, results);
    }
}

#[test]
fn states_are_updated_in_place() {
    let mut r = Numbers(5);
    let initial = r.floats(&[4, 3]);
    let gradient = r.floats(&[2, 3]);
    let mut graph = Graph::new("update");
    let p = graph.add_state("p", initial.tensor_type(), Some(Constant::Inline(initial.clone().into())));
    let v = graph.add_state("v", TensorType::fixed(DType::F32, &[2, 3]), None);
    let g = graph.add_input("g", gradient.tensor_type());
    let schedule = graph.add_input("schedule", TensorType::fixed(DType::F32, &[4]));
    let channels = graph.add_input("channels", TensorType::fixed(DType::I64, &[2]));
    let rule = UpdateRule::Sgd { momentum: 0.5, nesterov: false, weight_decay: 0.0 };
    let outputs =
        graph.add_node("update", train(TrainOp::Update { rule, axis: 0 }), &[p, v, g, schedule, channels], 2);
    graph.outputs.clone_from(&outputs);
    graph.infer().unwrap();
    let mut session = session(&graph, 2);
    let mut feed = HashMap::from([
        ("g".to_owned(), RuntimeValue::from(gradient.clone())),
        ("schedule".to_owned(), Tensor::from_slice(&[4], &[0.1f32, 2.0, 1.0, 1.0]).into()),
        ("channels".to_owned(), Tensor::from_slice(&[2], &[1i64, 3]).into()),
    ]);
    session.run_to_values(&mut feed).unwrap();
    session.run_to_values(&mut feed).unwrap();
    let mut got: Vec<f32> = Vec::new();
    session.read_state("p", &mut |b| got = bytemuck::pod_collect_to_vec(b)).unwrap();
    for row in 0..4 {
        for j in 0..3 {
            let before = initial.as_slice::<f32>()[row * 3 + j];
            // Twice the gradient, then that and half of the velocity.
            let moved = |i: usize| 0.1 * 2.0 * gradient.as_slice::<f32>()[i * 3 + j] * (1.0 + 1.5);
            let want = match row {
                1 => before - moved(0),
                3 => before - moved(1),
                _ => before,
            };
            assert!((got[row * 3 + j] - want).abs() < 1e-5, "[{row}, {j}]: {} {want}", got[row * 3 + j]);
        }
    }
    feed.insert("channels".to_owned(), Tensor::from_slice(&[2], &[3i64, 4]).into());
    let error = session.run_to_values(&mut feed).unwrap_err().to_string();
    assert!(error.contains("channels must ascend and be below 4"), "{error}");
}
