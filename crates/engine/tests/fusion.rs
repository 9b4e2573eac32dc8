//! The promise of the passes: a graph that is simplified, fused and laid out gives the answers of the graph as it was
//! written. Both are run by the interpreter.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use lightering_engine::{Evaluator, RuntimeValue, interpret};
use lightering_formats::HostValue;
use lightering_formats::onnx::{ModelFile, import, read_value};
use lightering_graph::passes::Pipeline;
use lightering_graph::{
    AspectRatio, BinaryOp, ConvAttributes, ConvTransposeAttributes, CoordinateMode, DType, GemmAttributes,
    Graph, Layout, NearestMode, Op, PadMode, Padding, PoolAttributes, PoolKind, QuantizeAttributes, ReduceOp,
    ResizeAttributes, ResizeMode, SourceId, StoredTensor, Tensor, TensorType, UnaryOp, ValueId,
};
use lightering_kernels::ThreadPool;
use lightering_meter::MemoryPool;
use lightering_tier::ByteSource;
use lightering_units::Bytes;

fn test_data(folder: &str) -> Option<PathBuf> {
    let root = std::env::var_os("LIGHTER_TEST_DATA").map(PathBuf::from).or_else(|| {
        std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/lighter-test-data"))
    })?;
    let folder = root.join(folder);
    if folder.is_dir() {
        return Some(folder);
    }
    eprintln!("skipped: {} is not there (set LIGHTER_TEST_DATA)", folder.display());
    None
}

/// Numbers that look random and are the same in every run (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn pick<T: Clone>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())].clone()
    }

    /// Roughly normal.
    fn float(&mut self) -> f32 {
        let mut sum = 0.0;
        for _ in 0..6 {
            sum += (self.next() >> 40) as f32 / (1u64 << 24) as f32;
        }
        (sum - 3.0) * 1.4
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    fn tensor(&mut self, ty: &TensorType) -> Tensor {
        let dims = ty.dims().unwrap();
        let n = dims.iter().product();
        match ty.dtype {
            DType::F32 => Tensor::from_slice(&dims, &self.floats(n)),
            DType::U8 => Tensor::from_slice(&dims, &(0..n).map(|_| self.next() as u8).collect::<Vec<_>>()),
            DType::I8 => Tensor::from_slice(&dims, &(0..n).map(|_| self.next() as i8).collect::<Vec<_>>()),
            DType::I64 => {
                Tensor::from_slice(&dims, &(0..n).map(|_| self.below(2) as i64).collect::<Vec<_>>())
            }
            other => panic!("no random {other}"),
        }
    }
}

type Sources = Vec<Arc<dyn ByteSource>>;

fn run(graph: &Graph, inputs: &[Tensor], sources: &Sources) -> Result<Vec<RuntimeValue>, String> {
    let inputs: Vec<(ValueId, RuntimeValue)> =
        graph.inputs.iter().copied().zip(inputs.iter().cloned().map(RuntimeValue::from)).collect();
    let (pool, threads) = (MemoryPool::unbounded(), ThreadPool::new(2));
    interpret(graph, &inputs, sources, &pool, &threads).map_err(|e| e.to_string())
}

fn fuse(graph: &Graph, sources: &Sources) -> Graph {
    let mut fused = graph.clone();
    let evaluator = Evaluator::new(MemoryPool::unbounded(), sources.clone());
    Pipeline::standard(&evaluator)
        .verified()
        .run(&mut fused)
        .unwrap_or_else(|e| panic!("{}: {e}", graph.name));
    let ends =
        |g: &Graph, v: &[ValueId]| -> Vec<String> { v.iter().map(|&v| g.value(v).name.clone()).collect() };
    assert_eq!(ends(graph, &graph.inputs), ends(&fused, &fused.inputs));
    assert_eq!(ends(graph, &graph.outputs), ends(&fused, &fused.outputs));
    fused
}

/// The largest difference, in units of the largest element (of `floor`, where all are smaller); integers differ by
/// their distance.
fn distance(a: &RuntimeValue, b: &RuntimeValue, floor: f64) -> f64 {
    let (Some(a), Some(b)) = (a.tensor(), b.tensor()) else {
        return if a == b { 0.0 } else { f64::INFINITY };
    };
    assert_eq!((a.dtype(), a.dims()), (b.dtype(), b.dims()));
    let (Some(x), Some(y)) = (a.to_f64s(), b.to_f64s()) else {
        return if a == b { 0.0 } else { f64::INFINITY };
    };
    let unit = match a.dtype().is_float() {
        true => x.iter().filter(|x| x.is_finite()).fold(floor, |m, x| m.max(x.abs())),
        false => 1.0,
    };
    let differ = |(x, y): (&f64, &f64)| {
        if x == y || x.is_nan() && y.is_nan() { 0.0 } else { (x - y).abs() / unit }
    };
    x.iter().zip(&y).map(differ).fold(0.0, |m, d| if d.is_nan() { f64::INFINITY } else { m.max(d) })
}

fn histogram(graph: &Graph) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, node) in graph.iter_nodes() {
        *counts.entry(node.op.name()).or_default() += 1;
    }
    counts.iter().map(|(name, n)| format!("{name} {n}")).collect::<Vec<_>>().join(", ")
}

// ---- real models ----

/// A model of the measured set: operators that must be gone after fusion, and the largest difference.
fn check_model(name: &str, gone: &[&str], tolerance: f64) {
    let Some(folder) = test_data("models") else { return };
    let path = folder.join(name);
    if !path.is_file() {
        eprintln!("skipped: {} is not there", path.display());
        return;
    }
    let imported = import(&ModelFile::open(&path).unwrap()).unwrap();
    let mut graph = imported.graph;
    let mut given = Vec::new();
    for &input in &graph.inputs {
        let ty = graph.value(input).ty.tensor().unwrap();
        let dims: Vec<usize> = ty.shape.as_ref().unwrap().iter().map(|d| d.fixed().unwrap_or(1)).collect();
        given.push((input, TensorType::fixed(ty.dtype, &dims)));
    }
    graph.bind(&given).unwrap();
    let mut numbers = Numbers(7);
    let inputs: Vec<Tensor> = given.iter().map(|(_, ty)| numbers.tensor(ty)).collect();
    graph.infer().unwrap();
    let fused = fuse(&graph, &imported.sources);
    println!("{name}: {}\n  becomes {}", histogram(&graph), histogram(&fused));
    let left = histogram(&fused);
    for op in gone {
        assert!(!left.contains(op), "{name}: {op} is left in {left}");
    }
    let plain = run(&graph, &inputs, &imported.sources).unwrap();
    let quick = run(&fused, &inputs, &imported.sources).unwrap();
    for (a, b) in plain.iter().zip(&quick) {
        let d = distance(a, b, 1e-30);
        println!("  differs by {d:.1e}");
        assert!(d <= tolerance, "{name} differs by {d}");
    }
}

const POINTWISE: &[&str] = &["Relu", "Clip", "Add", "BatchNorm", "HardS", "Elementwise"];

#[test]
fn convolutional_networks_fuse_whole() {
    check_model("squeezenet-1.1.onnx", POINTWISE, 1e-5);
    check_model("mobilenet-v2.onnx", POINTWISE, 1e-5);
    check_model("mobilenet-v3-small.onnx", POINTWISE, 1e-5);
    check_model("efficientnet-lite0.onnx", POINTWISE, 1e-5);
    check_model("nanodet-coco-416.onnx", &["Leaky", "Pad", "ScatterNd", "Expand", "Cast"], 1e-5);
}

#[test]
fn transformers_fuse_whole() {
    let spelled = &["Softmax", "Erf", "Gelu", "Sqrt", "Pow", "ReduceMean", "Div"];
    check_model("vit-tiny.onnx", spelled, 1e-5);
    check_model("minilm-l6.onnx", &[&spelled[..], &["Transpose"]].concat(), 1e-5);
}

#[test]
fn quantised_networks_compute_on_integers() {
    // Rounding each sum once instead of several times moves some elements by one step, which later layers carry on;
    // onnxruntime with and without its own fusion of this model differ as much.
    check_model("mobilenet_v2_quant.onnx", &["Conv 1", "Clip", "Relu", "AveragePool", "Transpose"], 4.0);
}

#[test]
fn residual_networks_fuse_whole() {
    if std::env::var_os("LIGHTER_SLOW").is_none() {
        eprintln!("skipped: the ResNets take a while (set LIGHTER_SLOW)");
        return;
    }
    check_model("resnet-18.onnx", POINTWISE, 1e-5);
    check_model("resnet-50.onnx", POINTWISE, 1e-5);
}

// ---- all spellings that the onnx package tests ----

fn tensor_of(value: HostValue) -> Option<Tensor> {
    match value {
        HostValue::Tensor(t) => Some(t),
        _ => None,
    }
}

#[test]
fn cases_of_the_onnx_package_keep_their_answers() {
    let Some(folder) = test_data("onnx-1.18.0/onnx/backend/test/data") else { return };
    let (mut compared, mut changed) = (0, 0);
    for suite in ["node", "simple", "pytorch-converted", "pytorch-operator"] {
        for case in std::fs::read_dir(folder.join(suite)).unwrap() {
            let case = case.unwrap().path();
            let file = ModelFile::open(case.join("model.onnx")).unwrap();
            let Ok(imported) = import(&file) else { continue };
            let mut graph = imported.graph;
            let proto = file.model.graph.as_ref().unwrap();
            let mut inputs = Vec::new();
            for (i, declared) in proto.input.iter().enumerate() {
                let path = case.join(format!("test_data_set_0/input_{i}.pb"));
                let Ok(bytes) = lightering_tier::FileSource::open(&path) else { break };
                let Ok(value) = read_value(&bytes, &declared.value_type) else { break };
                inputs.extend(tensor_of(value));
            }
            if inputs.len() != graph.inputs.len() {
                continue;
            }
            let given: Vec<(ValueId, TensorType)> =
                graph.inputs.iter().copied().zip(inputs.iter().map(Tensor::tensor_type)).collect();
            if graph.bind(&given).is_err() {
                continue;
            }
            if graph.iter_nodes().any(|(_, n)| n.op.is_random()) || graph.infer().is_err() {
                continue;
            }
            let Ok(plain) = run(&graph, &inputs, &imported.sources) else { continue };
            let mut fused = graph.clone();
            let evaluator = Evaluator::new(MemoryPool::unbounded(), imported.sources.clone());
            Pipeline::standard(&evaluator)
                .verified()
                .run(&mut fused)
                .unwrap_or_else(|e| panic!("{}: {e}", case.display()));
            let quick = run(&fused, &inputs, &imported.sources)
                .unwrap_or_else(|e| panic!("{}: {e}\n{}", case.display(), fused.to_text()));
            compared += 1;
            changed += usize::from(histogram(&graph) != histogram(&fused));
            for (a, b) in plain.iter().zip(&quick) {
                let d = distance(a, b, 1e-30);
                assert!(d <= 2e-6, "{} differs by {d}\n{}", case.display(), fused.to_text());
            }
        }
    }
    println!("{compared} cases compared, {changed} of them rewritten");
    assert!(compared > 500 && changed > 100, "{compared} compared, {changed} rewritten");
}

// ---- random networks ----

struct Network {
    graph: Graph,
    numbers: Numbers,
    store: Vec<u8>,
    count: usize,
}

impl Network {
    /// Without nodes, whose weights will lie in one store.
    fn new(seed: u64) -> Network {
        let mut graph = Graph::new(format!("seed {seed}"));
        graph.sources.push("memory".to_owned());
        Network { graph, numbers: Numbers(seed), store: Vec::new(), count: 0 }
    }

    fn name(&mut self, kind: &str) -> String {
        self.count += 1;
        format!("{kind}{}", self.count)
    }

    /// A constant, in memory or in the store.
    fn weight(&mut self, dims: &[usize]) -> ValueId {
        let n: usize = dims.iter().product();
        let scale = 1.0 / (n as f32 / *dims.first().unwrap_or(&1) as f32).sqrt().max(1.0);
        let values: Vec<f32> = self.numbers.floats(n).iter().map(|x| x * scale).collect();
        self.constant(dims, &values)
    }

    fn constant(&mut self, dims: &[usize], values: &[f32]) -> ValueId {
        let name = self.name("w");
        if self.numbers.below(2) == 0 {
            return self.graph.add_constant(name, Tensor::from_slice(dims, values));
        }
        let offset = self.store.len() as u64;
        self.store.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        let size = Bytes(values.len() as u64 * 4);
        let stored = StoredTensor { source: SourceId(0), offset, size };
        self.graph.add_stored(name, TensorType::fixed(DType::F32, dims), stored)
    }

    fn scalar(&mut self, x: f32) -> ValueId {
        let name = self.name("s");
        self.graph.add_constant(name, Tensor::scalar(x))
    }

    fn ints(&mut self, x: &[i64]) -> ValueId {
        let name = self.name("i");
        self.graph.add_constant(name, Tensor::from_slice(&[x.len()], x))
    }

    fn node(&mut self, op: Op, inputs: &[ValueId]) -> ValueId {
        self.nodes(op, inputs.iter().map(|&v| Some(v)).collect(), 1)[0]
    }

    fn nodes(&mut self, op: Op, inputs: Vec<Option<ValueId>>, outputs: usize) -> Vec<ValueId> {
        let name = self.name("n");
        let names = (0..outputs).map(|i| format!("{name}.{i}")).collect();
        let out = self.graph.add_node_named(name, op, inputs, names);
        self.graph.infer().unwrap();
        out
    }

    fn dims(&self, v: ValueId) -> Vec<usize> {
        self.graph.value(v).ty.tensor().unwrap().dims().unwrap()
    }

    fn unary(&mut self, op: UnaryOp, x: ValueId) -> ValueId {
        self.node(Op::Unary(op), &[x])
    }

    fn binary(&mut self, op: BinaryOp, a: ValueId, b: ValueId) -> ValueId {
        self.node(Op::Binary(op), &[a, b])
    }

    fn convolution(&mut self, x: ValueId) -> ValueId {
        let [_, c, h, w] = self.dims(x)[..] else { panic!() };
        let (groups, out) = self.numbers.pick(&[(1, 4), (1, 6), (2, 4), (c, c), (c, 2 * c)]);
        let (groups, out) = if c % groups == 0 { (groups, out) } else { (1, out) };
        let k = if h >= 3 && w >= 3 { self.numbers.pick(&[1, 3]) } else { 1 };
        let weight = self.weight(&[out, c / groups, k, k]);
        let padding = match self.numbers.below(4) {
            0 => Padding::SameUpper,
            1 => Padding::Valid,
            2 => Padding::Explicit(vec![(k / 2) as i64; 4]),
            _ => Padding::Explicit(vec![0, (k / 2) as i64, (k / 2) as i64, 0]),
        };
        let stride = self.numbers.pick(&[1, 1, 2]);
        let a = ConvAttributes { strides: vec![stride; 2], padding, groups, ..ConvAttributes::default() };
        let mut inputs = vec![x, weight];
        if self.numbers.below(2) == 0 {
            inputs.push(self.weight(&[out]));
        }
        self.node(Op::Conv(a), &inputs)
    }

    /// One more step on a picture `[n, c, h, w]`; another picture comes out.
    fn step(&mut self, x: ValueId, pictures: &[ValueId]) -> ValueId {
        let dims = self.dims(x);
        let [n, c, h, w] = dims[..] else { panic!("{dims:?}") };
        match self.numbers.below(26) {
            0..=3 => self.convolution(x),
            4 => {
                let parts: Vec<ValueId> = (0..4)
                    .map(|i| {
                        let mut v = self.numbers.floats(c);
                        if i == 3 {
                            v.iter_mut().for_each(|x| *x = x.abs() + 0.5);
                        }
                        self.constant(&[c], &v)
                    })
                    .collect();
                let op = Op::BatchNorm { epsilon: 1e-3, momentum: 0.9, training: false };
                self.node(op, &[&[x], &parts[..]].concat())
            }
            5 => {
                let op = self.numbers.pick(&[
                    UnaryOp::Relu,
                    UnaryOp::Sigmoid,
                    UnaryOp::LeakyRelu { alpha: 0.1 },
                    UnaryOp::ClipTo { min: -1.0, max: 1.0 },
                    UnaryOp::Tanh,
                    UnaryOp::Abs,
                ]);
                self.unary(op, x)
            }
            6 => {
                let gate = self.unary(UnaryOp::Sigmoid, x);
                self.binary(BinaryOp::Mul, x, gate)
            }
            7 => {
                let (three, six, zero) = (self.scalar(3.0), self.scalar(6.0), self.scalar(0.0));
                let y = self.binary(BinaryOp::Add, x, three);
                let y = self.node(Op::Clip, &[y, zero, six]);
                let y = self.binary(BinaryOp::Mul, y, x);
                self.binary(BinaryOp::Div, y, six)
            }
            8 => {
                let same: Vec<ValueId> = pictures.iter().copied().filter(|&p| self.dims(p) == dims).collect();
                let other = self.numbers.pick(&same);
                let op = self.numbers.pick(&[BinaryOp::Add, BinaryOp::Add, BinaryOp::Mul, BinaryOp::Sub]);
                self.binary(op, other, x)
            }
            9 => {
                let shape: Vec<usize> = self.numbers.pick(&[
                    vec![c, 1, 1],
                    vec![1, c, 1, 1],
                    vec![],
                    vec![1],
                    vec![w],
                    vec![h, w],
                    vec![1, c, h, w],
                    vec![c, h, 1],
                ]);
                let v = self.weight(&shape);
                let op = self.numbers.pick(&[BinaryOp::Mul, BinaryOp::Add, BinaryOp::PRelu, BinaryOp::Max]);
                self.binary(op, x, v)
            }
            10 => {
                let fit = |p: &ValueId| {
                    let d = self.dims(*p);
                    d[0] == n && d[2..] == [h, w]
                };
                let fit: Vec<ValueId> = pictures.iter().copied().filter(fit).collect();
                let other = self.numbers.pick(&fit);
                if self.dims(other)[1] + c > 24 {
                    return x;
                }
                self.node(Op::Concat { axis: 1 }, &[other, x])
            }
            11 if c >= 2 => {
                let parts = self.nodes(Op::Split { axis: 1 }, vec![Some(x)], 2);
                self.numbers.pick(&parts)
            }
            12 => {
                let axis = self.numbers.pick(&[1usize, 2, 3]);
                if dims[axis] < 2 {
                    return x;
                }
                let (starts, ends, axes) =
                    (self.ints(&[1]), self.ints(&[i64::MAX]), self.ints(&[axis as i64 - 4]));
                let step = self.numbers.pick(&[1, 1, 2]);
                let steps = self.ints(&[step]);
                self.node(Op::Slice, &[x, starts, ends, axes, steps])
            }
            13 => {
                let pads = self.numbers.pick(&[[0, 0, 1, 1], [0, 1, 0, 2], [0, 0, 2, 0]]);
                let pads = self.ints(&[pads, [0, 0, 1, 1]].concat());
                self.node(Op::Pad { mode: PadMode::Constant }, &[x, pads])
            }
            14 | 15 if h >= 2 && w >= 2 => {
                let kind = self.numbers.pick(&[PoolKind::Max, PoolKind::Average]);
                let whole = self.numbers.below(4) == 0;
                let op = Op::Pool(PoolAttributes {
                    kind,
                    kernel: if whole { vec![h, w] } else { vec![2, 2] },
                    strides: vec![self.numbers.pick(&[1, 2]); 2],
                    dilations: Vec::new(),
                    padding: Padding::Valid,
                    ceil_mode: false,
                    count_include_pad: self.numbers.below(2) == 0,
                    storage_order_column: false,
                    layout: Layout::ChannelsFirst,
                });
                self.node(op, &[x])
            }
            16 => {
                let s = self
                    .node(Op::GlobalPool { kind: PoolKind::Average, layout: Layout::ChannelsFirst }, &[x]);
                let weight = self.weight(&[c, c, 1, 1]);
                let s = self.node(Op::Conv(ConvAttributes::default()), &[s, weight]);
                let s = self.unary(UnaryOp::HardSigmoid { alpha: 0.2, beta: 0.5 }, s);
                self.binary(BinaryOp::Mul, s, x)
            }
            17 if h * w <= 64 => {
                let sizes = self.ints(&[n as i64, c as i64, 2 * h as i64, 2 * w as i64]);
                let op = Op::Resize(ResizeAttributes {
                    mode: self.numbers.pick(&[ResizeMode::Nearest, ResizeMode::Linear]),
                    coordinates: self.numbers.pick(&[CoordinateMode::HalfPixel, CoordinateMode::Asymmetric]),
                    nearest: NearestMode::Floor,
                    cubic_coeff_a: -0.75,
                    exclude_outside: false,
                    extrapolation_value: 0.0,
                    antialias: false,
                    axes: None,
                    aspect_ratio: AspectRatio::Stretch,
                });
                self.nodes(op, vec![Some(x), None, None, Some(sizes)], 1)[0]
            }
            18 => {
                let axis = self.numbers.pick(&[1, 2, 3, -1, -3]);
                self.node(Op::Softmax { axis, log: self.numbers.0.is_multiple_of(2) }, &[x])
            }
            19 => {
                let axis = self.numbers.pick(&[1i64, 2, 3]);
                let axes = self.ints(&[axis]);
                let op = self.numbers.pick(&[ReduceOp::Mean, ReduceOp::Max, ReduceOp::Sum]);
                let y =
                    self.node(Op::Reduce { op, keep_dims: true, noop_with_empty_axes: false }, &[x, axes]);
                self.binary(BinaryOp::Sub, x, y)
            }
            20 => {
                // There and back, with something on the way.
                let perm = self.numbers.pick(&[[0usize, 2, 3, 1], [0, 3, 1, 2], [0, 2, 1, 3], [0, 1, 3, 2]]);
                let mut back = vec![0; 4];
                for (i, &p) in perm.iter().enumerate() {
                    back[p] = i;
                }
                let y = self.node(Op::Transpose { perm: Some(perm.to_vec()) }, &[x]);
                let y = self.unary(UnaryOp::Abs, y);
                self.node(Op::Transpose { perm: Some(back) }, &[y])
            }
            21 if c % 2 == 0 => {
                let groups = self.ints(&[n as i64, 2, c as i64 / 2, h as i64, w as i64]);
                let y = self.node(Op::Reshape { allow_zero: false }, &[x, groups]);
                let y = self.node(Op::Transpose { perm: Some(vec![0, 2, 1, 3, 4]) }, &[y]);
                let shape = self.ints(&[n as i64, c as i64, h as i64, w as i64]);
                self.node(Op::Reshape { allow_zero: false }, &[y, shape])
            }
            22 if c % 4 == 0 => {
                self.node(Op::DepthToSpace { block: 2, crd: self.numbers.0.is_multiple_of(2) }, &[x])
            }
            23 if h % 2 == 0 && w % 2 == 0 && c <= 4 => self.node(Op::SpaceToDepth { block: 2 }, &[x]),
            24 => {
                // Tokens and back.
                let rows = self.ints(&[n as i64, c as i64, -1]);
                let y = self.node(Op::Reshape { allow_zero: false }, &[x, rows]);
                let y = self.node(Op::Transpose { perm: Some(vec![0, 2, 1]) }, &[y]);
                let weight = self.weight(&[c, c]);
                let y = self.node(Op::MatMul(Default::default()), &[y, weight]);
                let y = self.node(Op::Transpose { perm: Some(vec![0, 2, 1]) }, &[y]);
                let shape = self.ints(&[n as i64, c as i64, h as i64, w as i64]);
                self.node(Op::Reshape { allow_zero: false }, &[y, shape])
            }
            25 if h * w <= 64 => {
                let (groups, per_group) = if c % 2 == 0 { (2, 2) } else { (1, 3) };
                let weight = self.weight(&[c, per_group, 2, 2]);
                let conv = ConvAttributes { strides: vec![2, 2], groups, ..ConvAttributes::default() };
                let op = Op::ConvTranspose(ConvTransposeAttributes {
                    conv,
                    output_padding: Vec::new(),
                    output_shape: Vec::new(),
                });
                self.node(op, &[x, weight])
            }
            _ => self.convolution(x),
        }
    }
}

fn random_network(seed: u64) -> (Graph, Vec<Tensor>, Sources) {
    let mut net = Network::new(seed);
    let n = net.numbers.pick(&[1, 2]);
    let (h, w) = net.numbers.pick(&[(6, 8), (5, 5), (8, 4)]);
    let last = net.numbers.below(3) == 0;
    let dims = if last { [n, h, w, 3] } else { [n, 3, h, w] };
    let input = net.graph.add_input("input", TensorType::fixed(DType::F32, &dims));
    let mut x = input;
    if last {
        x = net.node(Op::Transpose { perm: Some(vec![0, 3, 1, 2]) }, &[x]);
    }
    let mut pictures = vec![x];
    for _ in 0..4 + net.numbers.below(12) {
        // Mostly straight on, sometimes from further back.
        let from = if net.numbers.below(4) == 0 { net.numbers.pick(&pictures) } else { x };
        let mut all = pictures.clone();
        all.push(from);
        x = net.step(from, &all);
        pictures.push(x);
    }
    let mut outputs = vec![x];
    if net.numbers.below(2) == 0 {
        outputs.push(net.numbers.pick(&pictures));
    }
    if net.numbers.below(2) == 0 {
        let c = net.dims(x)[1];
        let y = net.node(Op::GlobalPool { kind: PoolKind::Average, layout: Layout::ChannelsFirst }, &[x]);
        let y = net.node(Op::Flatten { axis: 1 }, &[y]);
        let weight = net.weight(&[c, 5]);
        outputs.push(net.node(Op::MatMul(Default::default()), &[y, weight]));
    }
    if net.numbers.below(3) == 0 {
        let op = Op::ArgReduce { largest: true, axis: 1, keep_dims: false, select_last_index: false };
        let y = net.unary(UnaryOp::Round, x);
        outputs.push(net.node(op, &[y]));
    }
    outputs.sort_unstable();
    outputs.dedup();
    outputs.retain(|v| *v != input);
    net.graph.outputs = outputs;
    net.graph.verify().unwrap();
    let tensor = net.numbers.tensor(&TensorType::fixed(DType::F32, &dims));
    let sources: Sources = vec![Arc::new(net.store)];
    (net.graph, vec![tensor], sources)
}

#[test]
fn random_networks_keep_their_answers() {
    let mut rewritten = 0;
    for seed in 0..400 {
        let (graph, inputs, sources) = random_network(seed);
        let fused = fuse(&graph, &sources);
        rewritten += usize::from(histogram(&graph) != histogram(&fused));
        let plain = run(&graph, &inputs, &sources).unwrap();
        let quick = run(&fused, &inputs, &sources)
            .unwrap_or_else(|e| panic!("seed {seed}: {e}\n{}\n{}", graph.to_text(), fused.to_text()));
        for (a, b) in plain.iter().zip(&quick) {
            // Inputs are about 1; of means of what was centred nothing but rounding is left.
            let d = distance(a, b, 1e-2);
            // Positions of the largest element may change where two are equal up to rounding.
            let integers = a.tensor().is_some_and(|t| t.dtype() == DType::I64);
            assert!(
                d <= 2e-5 || integers,
                "seed {seed} differs by {d}\n{}\n{}",
                graph.to_text(),
                fused.to_text()
            );
        }
    }
    assert!(rewritten > 350, "only {rewritten} networks were rewritten");
}

// ---- quantised operators, one at a time ----

fn byte_constant(net: &mut Network, dims: &[usize], signed: bool) -> ValueId {
    let name = net.name("q");
    let n = dims.iter().product();
    let bytes: Vec<u8> = (0..n).map(|_| net.numbers.next() as u8).collect();
    let signed_bytes: Vec<i8> = bytes.iter().map(|&b| b as i8).collect();
    let tensor =
        if signed { Tensor::from_slice(dims, &signed_bytes) } else { Tensor::from_slice(dims, &bytes) };
    net.graph.add_constant(name, tensor)
}

fn quantise_attributes() -> QuantizeAttributes {
    QuantizeAttributes { axis: 0, block_size: 0, output_dtype: None, saturate: true }
}

fn dequantised(net: &mut Network, q: ValueId, scale: f32, zero: u8, signed: bool) -> ValueId {
    let name = net.name("z");
    let zero = if signed { Tensor::scalar(zero as i8) } else { Tensor::scalar(zero) };
    let (scale, zero) = (net.scalar(scale), net.graph.add_constant(name, zero));
    net.node(Op::DequantizeLinear(quantise_attributes()), &[q, scale, zero])
}

/// "Dequantise, compute, quantise" with one operator in the middle, and how large its results are.
fn quantised_operator(seed: u64) -> (Graph, Vec<Tensor>, Sources) {
    let mut net = Network::new(seed);
    let signed = net.numbers.below(2) == 0;
    let dtype = if signed { DType::I8 } else { DType::U8 };
    let (c, h, w) = (net.numbers.pick(&[1, 3, 8]), 5, 6);
    let ty = TensorType::fixed(dtype, &[2, c, h, w]);
    let input = net.graph.add_input("input", ty.clone());
    let zero = net.numbers.next() as u8;
    let x = dequantised(&mut net, input, 0.02, zero, signed);
    let (y, size) = match net.numbers.below(8) {
        0 | 1 => {
            let depthwise = net.numbers.below(2) == 0;
            let (out, groups) = if depthwise { (c, c) } else { (4, 1) };
            let weights_signed = signed || net.numbers.below(2) == 0;
            let q = byte_constant(&mut net, &[out, c / groups, 3, 3], weights_signed);
            let scales: Vec<f32> = (0..out).map(|i| 0.01 + 0.003 * i as f32).collect();
            let scales = net.graph.add_constant("scales", Tensor::from_slice(&[out], &scales));
            let weight = net.node(Op::DequantizeLinear(quantise_attributes()), &[q, scales]);
            let bias = net.weight(&[out]);
            let conv = ConvAttributes {
                padding: Padding::Explicit(vec![1, 1, 1, 1]),
                strides: vec![net.numbers.pick(&[1, 2]); 2],
                groups,
                ..ConvAttributes::default()
            };
            (net.node(Op::Conv(conv), &[x, weight, bias]), 10.0)
        }
        2 => {
            let shape = net.ints(&[2 * c as i64, (h * w) as i64]);
            let x = net.node(Op::Reshape { allow_zero: false }, &[x, shape]);
            let q = byte_constant(&mut net, &[7, h * w], true);
            let weight = dequantised(&mut net, q, 0.01, 0, true);
            let c = net.weight(&[7]);
            let op = GemmAttributes { alpha: 1.0, beta: 1.0, trans_a: false, trans_b: true };
            (net.node(Op::Gemm(op), &[x, weight, c]), 20.0)
        }
        3 | 4 => {
            let shape = net.numbers.pick(&[vec![2, c, h, w], vec![c, 1, 1], vec![w], vec![]]);
            let q = byte_constant(&mut net, &shape, signed);
            let other = dequantised(&mut net, q, 0.03, 100, signed);
            let op = net.numbers.pick(&[BinaryOp::Add, BinaryOp::Sub, BinaryOp::Mul, BinaryOp::Max]);
            (net.binary(op, other, x), 5.0)
        }
        5 => {
            let op = net.numbers.pick(&[UnaryOp::Sigmoid, UnaryOp::HardSwish, UnaryOp::Tanh, UnaryOp::Exp]);
            (net.unary(op, x), 1.5)
        }
        6 => {
            let op = Op::Pool(PoolAttributes {
                kind: net.numbers.pick(&[PoolKind::Average, PoolKind::Max]),
                kernel: vec![3, 2],
                strides: vec![2, 1],
                dilations: Vec::new(),
                padding: Padding::Explicit(vec![1, 0, 1, 1]),
                ceil_mode: false,
                count_include_pad: net.numbers.below(2) == 0,
                storage_order_column: false,
                layout: Layout::ChannelsFirst,
            });
            (net.node(op, &[x]), 5.0)
        }
        _ => {
            let q = byte_constant(&mut net, &[2, 2, h, w], signed);
            let other = dequantised(&mut net, q, 0.01, 7, signed);
            (net.node(Op::Concat { axis: 1 }, &[x, other]), 5.0)
        }
    };
    let y = match net.numbers.below(3) {
        0 => net.unary(UnaryOp::Relu, y),
        1 => net.unary(UnaryOp::ClipTo { min: -0.5, max: 1.0 }, y),
        _ => y,
    };
    let scale = net.scalar(size / 255.0);
    let zero = if signed {
        Tensor::scalar(net.numbers.next() as i8)
    } else {
        Tensor::scalar(net.numbers.next() as u8)
    };
    let zero = net.graph.add_constant("y_zero", zero);
    let y = net.node(Op::QuantizeLinear(quantise_attributes()), &[y, scale, zero]);
    net.graph.outputs.push(y);
    let tensor = net.numbers.tensor(&ty);
    let sources: Sources = vec![Arc::new(net.store)];
    (net.graph, vec![tensor], sources)
}

#[test]
fn quantised_operators_are_within_one_step() {
    for seed in 0..400 {
        let (graph, inputs, sources) = quantised_operator(seed);
        let fused = fuse(&graph, &sources);
        // A limit after a table, a pool or a concatenation may stay spelled out; the heavy operators may not.
        let heavy = |op: &Op| matches!(op, Op::Conv(_) | Op::MatMul(_) | Op::Gemm(_) | Op::Binary(_));
        assert!(!fused.iter_nodes().any(|(_, n)| heavy(&n.op)), "seed {seed}: {}", histogram(&fused));
        let plain = run(&graph, &inputs, &sources).unwrap();
        let quick = run(&fused, &inputs, &sources)
            .unwrap_or_else(|e| panic!("seed {seed}: {e}\n{}\n{}", graph.to_text(), fused.to_text()));
        let d = distance(&plain[0], &quick[0], 1.0);
        assert!(d <= 1.0, "seed {seed} differs by {d} steps\n{}\n{}", graph.to_text(), fused.to_text());
    }
}
