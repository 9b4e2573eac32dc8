//! Every derivative against central differences, through the interpreter.

use std::collections::{BTreeSet, HashMap};

use lightering_engine::{Evaluator, PlanOptions, RuntimeValue, Session, SessionOptions, interpret};
use lightering_graph::passes::Pipeline;
use lightering_graph::*;
use lightering_kernels::ThreadPool;
use lightering_meter::{MachineProfile, MemoryPool};
use lightering_units::BlockFormat;

/// A graph under test and the values of its parameters.
struct Bench {
    graph: Graph,
    dtype: DType,
    given: Vec<(ValueId, Vec<f64>)>,
    fixed: Vec<(ValueId, Tensor)>,
    seed: u64,
}

impl Bench {
    fn new(dtype: DType) -> Bench {
        Bench { graph: Graph::new("case"), dtype, given: Vec::new(), fixed: Vec::new(), seed: 0x9e37_79b9 }
    }

    fn random(&mut self) -> f64 {
        self.seed = self.seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.seed >> 11) as f64 / (1u64 << 53) as f64
    }

    /// An operand whose gradient is checked, with elements between two bounds.
    fn p(&mut self, dims: &[usize], low: f64, high: f64) -> ValueId {
        let values: Vec<f64> =
            (0..dims.iter().product()).map(|_| low + (high - low) * self.random()).collect();
        self.given(dims, values)
    }

    fn given(&mut self, dims: &[usize], values: Vec<f64>) -> ValueId {
        let name = format!("p{}", self.given.len());
        let v = self.graph.add_input(name, TensorType::fixed(self.dtype, dims));
        self.given.push((v, values));
        v
    }

    fn ints(&mut self, ints: &[i64]) -> ValueId {
        self.int_tensor(&[ints.len()], ints)
    }

    fn int_tensor(&mut self, dims: &[usize], ints: &[i64]) -> ValueId {
        let name = format!("c{}", self.graph.values.len());
        self.graph.add_constant(name, Tensor::from_slice(dims, ints))
    }

    fn floats(&mut self, dims: &[usize], values: &[f64]) -> ValueId {
        let name = format!("c{}", self.graph.values.len());
        self.graph.add_constant(name, tensor(self.dtype, dims, values))
    }

    fn constant(&mut self, t: Tensor) -> ValueId {
        let name = format!("c{}", self.graph.values.len());
        self.graph.add_constant(name, t)
    }

    fn op(&mut self, op: Op, inputs: &[ValueId]) -> Vec<ValueId> {
        self.ops(op, inputs, 1)
    }

    fn ops(&mut self, op: Op, inputs: &[ValueId], outputs: usize) -> Vec<ValueId> {
        let name = format!("n{}", self.graph.nodes.len());
        self.graph.add_node(name, op, inputs, outputs)
    }

    fn op_with(&mut self, op: Op, inputs: &[Option<ValueId>], outputs: usize) -> Vec<ValueId> {
        let name = format!("n{}", self.graph.nodes.len());
        let names = (0..outputs).map(|i| format!("{name}:{i}")).collect();
        self.graph.add_node_named(name, op, inputs.to_vec(), names)
    }
}

fn tensor(dtype: DType, dims: &[usize], values: &[f64]) -> Tensor {
    match dtype {
        DType::F64 => Tensor::from_slice(dims, values),
        _ => Tensor::from_slice(dims, &values.iter().map(|&v| v as f32).collect::<Vec<f32>>()),
    }
}

/// How close the two gradients must be, and the step of the differences.
#[derive(Clone, Copy)]
struct Precision {
    dtype: DType,
    step: f64,
    tolerance: f64,
}

const DOUBLE: Precision = Precision { dtype: DType::F64, step: 1e-5, tolerance: 1e-7 };
/// Attention computes its scores in single precision whatever the element type is.
const SINGLE: Precision = Precision { dtype: DType::F64, step: 2e-2, tolerance: 2e-3 };
/// Rotations are linear but computed in single precision.
const LINEAR: Precision = Precision { dtype: DType::F64, step: 1.0, tolerance: 1e-5 };

fn run(graph: &Graph, bench: &Bench, values: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let mut inputs: Vec<(ValueId, RuntimeValue)> = bench
        .given
        .iter()
        .zip(values)
        .map(|((v, _), values)| {
            let dims = graph.value(*v).ty.tensor().unwrap().dims().unwrap();
            (*v, tensor(bench.dtype, &dims, values).into())
        })
        .collect();
    inputs.extend(bench.fixed.iter().map(|(v, t)| (*v, t.clone().into())));
    let out = interpret(graph, &inputs, &[], &MemoryPool::unbounded(), &ThreadPool::new(1)).unwrap();
    out.iter().map(|v| v.tensor().unwrap().to_f64s().unwrap()).collect()
}

/// Puts one number on top of the results.
fn with_loss(bench: &mut Bench, results: &[ValueId]) -> ValueId {
    bench.graph.infer().unwrap();
    let mut parts = Vec::new();
    for &y in results {
        let dims = bench.graph.value(y).ty.tensor().unwrap().dims().unwrap();
        let n = dims.iter().product();
        let factors: Vec<f64> = (0..n).map(|_| 0.5 + bench.random()).collect();
        let factors = bench.floats(&dims, &factors);
        let product = bench.op(Op::Binary(BinaryOp::Mul), &[y, factors])[0];
        let sum = Op::Reduce { op: ReduceOp::Sum, keep_dims: false, noop_with_empty_axes: false };
        parts.push(bench.op(sum, &[product])[0]);
    }
    let loss = bench.op(Op::Variadic(VariadicOp::Sum), &parts)[0];
    bench.graph.infer().unwrap();
    loss
}

/// Compares the gradients of all parameters; returns the names of the operators under test.
fn check(name: &str, precision: Precision, build: &dyn Fn(&mut Bench) -> Vec<ValueId>) -> BTreeSet<String> {
    let mut bench = Bench::new(precision.dtype);
    let results = build(&mut bench);
    let tested = bench.graph.iter_nodes().map(|(_, n)| n.op.name().to_owned()).collect();
    let loss = with_loss(&mut bench, &results);
    let mut forward = bench.graph.clone();
    forward.outputs = vec![loss];
    let mut graph = bench.graph.clone();
    let wrt: Vec<ValueId> = bench.given.iter().map(|(v, _)| *v).collect();
    let gradients = differentiate(&mut graph, loss, &wrt, &DifferentiateOptions::default())
        .unwrap_or_else(|e| panic!("{name}: {e}"));
    graph.verify().unwrap_or_else(|e| panic!("{name}: {e}"));
    graph.outputs = gradients
        .iter()
        .enumerate()
        .map(|(i, g)| g.unwrap_or_else(|| panic!("{name}: no gradient for parameter {i}")))
        .collect();
    let mut again = graph.clone();
    again.infer().unwrap_or_else(|e| panic!("{name}: {e}"));
    let values: Vec<Vec<f64>> = bench.given.iter().map(|(_, v)| v.clone()).collect();
    let found = run(&graph, &bench, &values);
    for (p, found) in found.iter().enumerate() {
        assert_eq!(found.len(), values[p].len(), "{name}: parameter {p}");
        for i in 0..found.len() {
            let at = |delta: f64| {
                let mut moved = values.clone();
                moved[p][i] += delta;
                run(&forward, &bench, &moved)[0][0]
            };
            let expected = (at(precision.step) - at(-precision.step)) / (2.0 * precision.step);
            assert!(
                (found[i] - expected).abs() <= precision.tolerance * (1.0 + expected.abs()),
                "{name}: parameter {p}, element {i}: {} by the graph, {expected} by differences",
                found[i]
            );
        }
    }
    tested
}

type Build = Box<dyn Fn(&mut Bench) -> Vec<ValueId>>;

/// The table: name, precision, graph.
#[derive(Default)]
struct Cases(Vec<(String, Precision, Build)>);

impl Cases {
    fn add(&mut self, name: impl Into<String>, build: impl Fn(&mut Bench) -> Vec<ValueId> + 'static) {
        self.with(name, DOUBLE, build);
    }

    fn with(
        &mut self,
        name: impl Into<String>,
        precision: Precision,
        build: impl Fn(&mut Bench) -> Vec<ValueId> + 'static,
    ) {
        self.0.push((name.into(), precision, Box::new(build)));
    }
}

fn elementwise(c: &mut Cases) {
    let wide = (-2.5, 2.5);
    let unary = [
        (UnaryOp::Abs, wide),
        (UnaryOp::Acos, (-0.9, 0.9)),
        (UnaryOp::Acosh, (1.2, 3.0)),
        (UnaryOp::Asin, (-0.9, 0.9)),
        (UnaryOp::Asinh, wide),
        (UnaryOp::Atan, wide),
        (UnaryOp::Atanh, (-0.9, 0.9)),
        (UnaryOp::Celu { alpha: 1.5 }, wide),
        (UnaryOp::ClipTo { min: -1.0, max: 1.25 }, wide),
        (UnaryOp::Cos, wide),
        (UnaryOp::Cosh, wide),
        (UnaryOp::Elu { alpha: 0.7 }, wide),
        (UnaryOp::Erf, wide),
        (UnaryOp::Exp, wide),
        (UnaryOp::Gelu { tanh: false }, wide),
        (UnaryOp::Gelu { tanh: true }, wide),
        (UnaryOp::HardSigmoid { alpha: 0.3, beta: 0.5 }, wide),
        (UnaryOp::HardSwish, (-4.0, 4.0)),
        (UnaryOp::Identity, wide),
        (UnaryOp::LeakyRelu { alpha: 0.1 }, wide),
        (UnaryOp::LeakyRelu { alpha: 0.0 }, wide),
        (UnaryOp::LeakyRelu { alpha: -0.3 }, wide),
        (UnaryOp::Log, (0.3, 3.0)),
        (UnaryOp::Mish, wide),
        (UnaryOp::Neg, wide),
        (UnaryOp::Reciprocal, (0.5, 2.0)),
        (UnaryOp::Relu, wide),
        (UnaryOp::Rsqrt, (0.4, 2.0)),
        (UnaryOp::Selu { alpha: 1.7, gamma: 1.05 }, wide),
        (UnaryOp::Shrink { bias: 0.3, lambd: 0.5 }, wide),
        (UnaryOp::Sigmoid, wide),
        (UnaryOp::Sin, wide),
        (UnaryOp::Sinh, wide),
        (UnaryOp::Softplus, wide),
        (UnaryOp::Softsign, wide),
        (UnaryOp::Sqrt, (0.4, 2.0)),
        (UnaryOp::Swish { alpha: 1.0 }, wide),
        (UnaryOp::Swish { alpha: 1.702 }, wide),
        (UnaryOp::Tan, (-1.2, 1.2)),
        (UnaryOp::Tanh, wide),
        (UnaryOp::ThresholdedRelu { alpha: 0.8 }, wide),
    ];
    for (op, (low, high)) in unary {
        c.add(format!("{op:?}"), move |b| {
            let x = b.p(&[3, 5], low, high);
            b.op(Op::Unary(op), &[x])
        });
    }
    let binary = [
        (BinaryOp::Add, wide, wide),
        (BinaryOp::Sub, wide, wide),
        (BinaryOp::Mul, wide, wide),
        (BinaryOp::Div, wide, (0.5, 2.0)),
        (BinaryOp::Mod, (-5.0, 5.0), (0.7, 1.6)),
        (BinaryOp::FMod, (-5.0, 5.0), (0.7, 1.6)),
        (BinaryOp::Pow, (0.3, 2.0), wide),
        (BinaryOp::PRelu, wide, (0.1, 0.5)),
        (BinaryOp::Max, wide, wide),
        (BinaryOp::Min, wide, wide),
    ];
    for (op, x, z) in binary {
        let mut shapes: Vec<(Vec<usize>, Vec<usize>)> =
            vec![(vec![2, 3], vec![2, 3]), (vec![2, 3, 4], vec![3, 1]), (vec![2, 3, 4], vec![])];
        if op != BinaryOp::PRelu {
            shapes.push((vec![3, 1], vec![2, 1, 4]));
        }
        for (s, t) in shapes {
            c.add(format!("{op:?} {s:?} {t:?}"), move |b| {
                let (x, z) = (b.p(&s, x.0, x.1), b.p(&t, z.0, z.1));
                b.op(Op::Binary(op), &[x, z])
            });
        }
    }
    for power in [2.0, 3.0] {
        c.add(format!("Pow {power}"), move |b| {
            let x = b.p(&[7], -2.0, 2.0);
            let two = b.floats(&[], &[power]);
            b.op(Op::Binary(BinaryOp::Pow), &[x, two])
        });
    }
    c.add("Pow with an integer", |b| {
        let x = b.p(&[7], -2.0, 2.0);
        let three = b.int_tensor(&[], &[3]);
        b.op(Op::Binary(BinaryOp::Pow), &[x, three])
    });
    for op in [VariadicOp::Sum, VariadicOp::Mean, VariadicOp::Max, VariadicOp::Min] {
        c.add(format!("{op:?}Of"), move |b| {
            let operands = [b.p(&[2, 3], -1.0, 1.0), b.p(&[3], -1.0, 1.0), b.p(&[2, 1], -1.0, 1.0)];
            b.op(Op::Variadic(op), &operands)
        });
    }
    c.add("Where", |b| {
        let condition = b.constant(Tensor::from_bools(&[2, 1], &[true, false]));
        let operands = [condition, b.p(&[2, 3], -1.0, 1.0), b.p(&[3], -1.0, 1.0)];
        b.op(Op::Where, &operands)
    });
    c.add("Clip", |b| {
        let x = b.p(&[20], -3.0, 3.0);
        let (low, high) = (b.given(&[], vec![-1.1]), b.given(&[], vec![0.9]));
        b.op(Op::Clip, &[x, low, high])
    });
    c.add("Clip to constants", |b| {
        let x = b.p(&[20], -3.0, 3.0);
        let high = b.floats(&[], &[0.9]);
        b.op_with(Op::Clip, &[Some(x), None, Some(high)], 1)
    });
    c.with("Cast", Precision { step: 0.5, tolerance: 1e-5, ..DOUBLE }, |b| {
        let x = b.p(&[4], -1.0, 1.0);
        let low = b.op(Op::Cast { to: DType::F32, saturate: true }, &[x])[0];
        b.op(Op::Cast { to: DType::F64, saturate: true }, &[low])
    });
    c.add("Elementwise", |b| {
        let operands = [b.p(&[2, 3], -1.0, 1.0), b.p(&[3], 0.5, 1.0), b.p(&[2, 1], -1.0, 1.0)];
        let steps = vec![
            ElementwiseStep::Unary(UnaryOp::HardSwish),
            ElementwiseStep::Binary { op: BinaryOp::Div, operand: 1, swapped: false },
            ElementwiseStep::Unary(UnaryOp::Tanh),
            ElementwiseStep::Binary { op: BinaryOp::Sub, operand: 2, swapped: true },
        ];
        b.op(Op::Elementwise(steps), &operands)
    });
    for training in [None, Some(false), Some(true)] {
        c.add(format!("Dropout {training:?}"), move |b| {
            let x = b.p(&[40], -1.0, 1.0);
            let ratio = b.floats(&[], &[0.4]);
            let training = training.map(|t| b.constant(Tensor::from_bools(&[], &[t])));
            b.op_with(Op::Dropout { seed: Some(7) }, &[Some(x), Some(ratio), training], 1)
        });
    }
}

fn linear(c: &mut Cases) {
    let shapes: [(&[usize], &[usize]); 9] = [
        (&[2, 3], &[3, 4]),
        (&[2, 3, 4], &[4, 5]),
        (&[5, 2, 3, 4], &[2, 4, 2]),
        (&[3, 4], &[2, 4, 2]),
        (&[4], &[4, 3]),
        (&[2, 3], &[3]),
        (&[4], &[4]),
        (&[2, 1, 3, 4], &[3, 4, 2]),
        (&[2, 3, 4], &[4]),
    ];
    for (s, t) in shapes {
        for (ta, tb) in [(false, false), (true, false), (false, true), (true, true)] {
            if s.len() < 2 && ta || t.len() < 2 && tb {
                continue;
            }
            c.add(format!("MatMul {s:?} {t:?} {ta} {tb}"), move |b| {
                let flip = |d: &[usize], yes: bool| {
                    let (mut d, n) = (d.to_vec(), d.len());
                    if yes {
                        d.swap(n - 1, n - 2);
                    }
                    d
                };
                let (x, w) = (b.p(&flip(s, ta), -1.0, 1.0), b.p(&flip(t, tb), -1.0, 1.0));
                let a = MatMulAttributes { trans_a: ta, trans_b: tb, alpha: 0.7, activation: None };
                b.op(Op::MatMul(a), &[x, w])
            });
        }
    }
    for activation in [UnaryOp::Tanh, UnaryOp::Swish { alpha: 1.0 }, UnaryOp::Relu, UnaryOp::HardSwish] {
        c.add(format!("MatMul with everything and {activation:?}"), move |b| {
            let operands = [
                b.p(&[2, 3, 4], -1.0, 1.0),
                b.p(&[4, 5], -1.0, 1.0),
                b.p(&[5], -1.0, 1.0),
                b.p(&[2, 3, 5], -1.0, 1.0),
                b.p(&[5], 0.5, 1.5),
            ];
            let a =
                MatMulAttributes { alpha: 1.3, activation: Some(activation), ..MatMulAttributes::default() };
            b.op(Op::MatMul(a), &operands)
        });
    }
    for (ta, tb) in [(false, false), (true, false), (false, true), (true, true)] {
        c.add(format!("Gemm {ta} {tb}"), move |b| {
            let operands = [
                b.p(if ta { &[3, 2] } else { &[2, 3] }, -1.0, 1.0),
                b.p(if tb { &[4, 3] } else { &[3, 4] }, -1.0, 1.0),
                b.p(&[4], -1.0, 1.0),
            ];
            b.op(Op::Gemm(GemmAttributes { alpha: 0.5, beta: 2.0, trans_a: ta, trans_b: tb }), &operands)
        });
    }
    let equations: [(&str, &[&[usize]]); 9] = [
        ("bij,bjk->bik", &[&[2, 3, 4], &[2, 4, 2]]),
        ("ij->ji", &[&[2, 3]]),
        ("ij->j", &[&[2, 3]]),
        ("ii->i", &[&[3, 3]]),
        ("ii->", &[&[3, 3]]),
        ("...ij,...jk->...ik", &[&[2, 3, 4], &[1, 4, 2]]),
        ("bhqd,bhkd->bhqk", &[&[1, 2, 3, 2], &[1, 2, 2, 2]]),
        ("i,j,k->ijk", &[&[2], &[3], &[2]]),
        ("ij,j", &[&[2, 3], &[3]]),
    ];
    for (equation, shapes) in equations {
        c.add(format!("Einsum {equation}"), move |b| {
            let operands: Vec<ValueId> = shapes.iter().map(|s| b.p(s, -1.0, 1.0)).collect();
            b.op(Op::Einsum { equation: equation.to_owned() }, &operands)
        });
    }
    c.add("Det", |b| {
        let x = b.p(&[2, 3, 3], -1.0, 1.0);
        b.op(Op::Det, &[x])
    });
}

fn windows(c: &mut Cases) {
    for layout in [Layout::ChannelsFirst, Layout::ChannelsLast] {
        let picture = move |n: usize, channels: usize, spatial: &[usize]| {
            let mut dims = vec![n];
            match layout {
                Layout::ChannelsFirst => {
                    dims.push(channels);
                    dims.extend(spatial);
                }
                Layout::ChannelsLast => {
                    dims.extend(spatial);
                    dims.push(channels);
                }
            }
            dims
        };
        for (groups, strides, dilations, padding) in [
            (1, vec![], vec![], Padding::Valid),
            (1, vec![2, 2], vec![], Padding::Explicit(vec![1, 1, 1, 1])),
            (2, vec![1, 2], vec![2, 1], Padding::SameUpper),
            (4, vec![], vec![], Padding::Explicit(vec![1, 0, 2, 1])),
            (4, vec![2, 2], vec![], Padding::SameLower),
        ] {
            c.add(format!("Conv {layout:?} {groups} {strides:?} {dilations:?} {padding:?}"), move |b| {
                let a = ConvAttributes {
                    strides: strides.clone(),
                    dilations: dilations.clone(),
                    padding: padding.clone(),
                    groups,
                    layout,
                    ..ConvAttributes::default()
                };
                let x = b.p(&picture(2, 4, &[5, 4]), -1.0, 1.0);
                let operands = [x, b.p(&[4, 4 / groups, 2, 2], -1.0, 1.0), b.p(&[4], -1.0, 1.0)];
                b.op(Op::Conv(a), &operands)
            });
        }
        for activation in [UnaryOp::Relu, UnaryOp::HardSwish] {
            c.add(format!("Conv {layout:?} with everything and {activation:?}"), move |b| {
                let a = ConvAttributes { layout, activation: Some(activation), ..ConvAttributes::default() };
                let operands = [
                    b.p(&picture(1, 2, &[3, 4]), -1.0, 1.0),
                    b.p(&[3, 2, 2, 2], -1.0, 1.0),
                    b.p(&[3], -1.0, 1.0),
                    b.p(&picture(1, 3, &[2, 3]), -1.0, 1.0),
                    b.p(&[3], 0.5, 1.5),
                ];
                b.op(Op::Conv(a), &operands)
            });
        }
        for (groups, strides, output_padding, output_shape, padding) in [
            (1, vec![], vec![], vec![], Padding::Valid),
            (2, vec![2, 2], vec![1, 0], vec![], Padding::Explicit(vec![1, 0, 0, 1])),
            (2, vec![2, 3], vec![], vec![6, 7], Padding::SameUpper),
        ] {
            c.add(format!("ConvTranspose {layout:?} {groups} {strides:?} {padding:?}"), move |b| {
                let conv = ConvAttributes {
                    strides: strides.clone(),
                    padding: padding.clone(),
                    groups,
                    layout,
                    activation: Some(UnaryOp::Tanh),
                    ..ConvAttributes::default()
                };
                let a = ConvTransposeAttributes {
                    conv,
                    output_padding: output_padding.clone(),
                    output_shape: output_shape.clone(),
                };
                let x = b.p(&picture(1, 4, &[3, 2]), -1.0, 1.0);
                let operands = [x, b.p(&[4, 3, 2, 3], -1.0, 1.0), b.p(&[3 * groups], -1.0, 1.0)];
                b.op(Op::ConvTranspose(a), &operands)
            });
        }
        for (kind, include, ceil) in [
            (PoolKind::Max, false, false),
            (PoolKind::Average, false, true),
            (PoolKind::Average, true, false),
            (PoolKind::Average, true, true),
            (PoolKind::Lp(1), false, false),
            (PoolKind::Lp(2), false, false),
            (PoolKind::Lp(3), false, false),
        ] {
            c.add(format!("Pool {layout:?} {kind:?} {include} {ceil}"), move |b| {
                let a = PoolAttributes {
                    kind,
                    kernel: vec![2, 3],
                    strides: vec![2, 1],
                    dilations: vec![1, 1],
                    padding: Padding::Explicit(vec![0, 1, 0, 1]),
                    ceil_mode: ceil,
                    count_include_pad: include,
                    storage_order_column: false,
                    layout,
                };
                let x = b.p(&picture(2, 2, &[5, 4]), 0.2, 1.0);
                b.op(Op::Pool(a), &[x])
            });
        }
        for kind in [PoolKind::Max, PoolKind::Average, PoolKind::Lp(2)] {
            c.add(format!("GlobalPool {layout:?} {kind:?}"), move |b| {
                let x = b.p(&picture(2, 3, &[2, 3]), -1.0, 1.0);
                b.op(Op::GlobalPool { kind, layout }, &[x])
            });
        }
    }
    c.add("Conv in one dimension", |b| {
        let operands = [b.p(&[2, 3, 6], -1.0, 1.0), b.p(&[2, 3, 3], -1.0, 1.0)];
        b.op(Op::Conv(ConvAttributes { strides: vec![2], ..ConvAttributes::default() }), &operands)
    });
    c.add("Col2Im", |b| {
        let x = b.p(&[2, 8, 6], -1.0, 1.0);
        let (image, block) = (b.ints(&[4, 5]), b.ints(&[2, 2]));
        let op = Op::Col2Im { dilations: vec![1, 1], pads: vec![0, 1, 0, 0], strides: vec![2, 2] };
        b.op(op, &[x, image, block])
    });
    for shape in [None, Some([1, 2, 5, 5])] {
        c.add(format!("MaxUnpool {shape:?}"), move |b| {
            let x = b.p(&[1, 2, 2, 2], -1.0, 1.0);
            let indices = b.int_tensor(&[1, 2, 2, 2], &[0, 3, 9, 14, 17, 18, 28, 31]);
            let shape = shape.map(|s| b.ints(&s));
            let op = Op::MaxUnpool { kernel: vec![2, 2], strides: vec![2, 2], pads: vec![] };
            b.op_with(op, &[Some(x), Some(indices), shape], 1)
        });
    }
}

fn norms(c: &mut Cases) {
    for training in [false, true] {
        c.add(format!("BatchNorm {training}"), move |b| {
            let x = b.p(&[3, 2, 2, 2], -1.0, 1.0);
            let (scale, bias) = (b.p(&[2], 0.5, 1.5), b.p(&[2], -1.0, 1.0));
            let (mean, variance) = if training {
                (b.floats(&[2], &[0.0, 0.0]), b.floats(&[2], &[1.0, 1.0]))
            } else {
                (b.p(&[2], -0.5, 0.5), b.p(&[2], 0.5, 1.5))
            };
            b.op(Op::BatchNorm { epsilon: 1e-3, momentum: 0.9, training }, &[x, scale, bias, mean, variance])
        });
    }
    c.add("InstanceNorm", |b| {
        let operands = [b.p(&[2, 3, 2, 2], -1.0, 1.0), b.p(&[3], 0.5, 1.5), b.p(&[3], -1.0, 1.0)];
        b.op(Op::InstanceNorm { epsilon: 1e-3 }, &operands)
    });
    c.add("GroupNorm", |b| {
        let operands = [b.p(&[2, 4, 3], -1.0, 1.0), b.p(&[4], 0.5, 1.5), b.p(&[4], -1.0, 1.0)];
        b.op(Op::GroupNorm { groups: 2, epsilon: 1e-3 }, &operands)
    });
    for (axis, scale) in [(-1, vec![4]), (1, vec![3, 4]), (1, vec![4]), (-1, vec![1])] {
        let s = scale.clone();
        c.add(format!("LayerNorm {axis} {scale:?}"), move |b| {
            let operands = [b.p(&[2, 3, 4], -1.0, 1.0), b.p(&s, 0.5, 1.5), b.p(&s, -1.0, 1.0)];
            b.op(Op::LayerNorm { axis, epsilon: 1e-3 }, &operands)
        });
        c.add(format!("RmsNorm {axis} {scale:?}"), move |b| {
            let operands = [b.p(&[2, 3, 4], -1.0, 1.0), b.p(&scale, 0.5, 1.5)];
            b.op(Op::RmsNorm { axis, epsilon: 1e-3 }, &operands)
        });
    }
    for p in [1, 2] {
        c.add(format!("LpNorm {p}"), move |b| {
            let x = b.p(&[2, 3, 2], -1.0, 1.0);
            b.op(Op::LpNorm { axis: 1, p }, &[x])
        });
    }
    c.add("MeanVarianceNorm", |b| {
        let x = b.p(&[2, 3, 2], -1.0, 1.0);
        b.op(Op::MeanVarianceNorm { axes: vec![0, -1] }, &[x])
    });
    for size in [3, 4] {
        c.add(format!("Lrn {size}"), move |b| {
            let x = b.p(&[2, 5, 2, 2], -1.0, 1.0);
            b.op(Op::Lrn { alpha: 0.5, beta: 0.75, bias: 1.5, size }, &[x])
        });
    }
    for axis in [1, 2] {
        c.add(format!("Normalise with own statistics {axis}"), move |b| {
            let x = b.p(&[3, 4, 4], -1.0, 1.0);
            let s = b.ops(Op::Train(Box::new(TrainOp::BatchStatistics { axis })), &[x], 2);
            let (scale, bias) = (b.p(&[4], 0.5, 1.5), b.p(&[4], -1.0, 1.0));
            let op = Op::Train(Box::new(TrainOp::Normalise { axis, epsilon: 1e-3 }));
            b.op(op, &[x, s[0], s[1], scale, bias])
        });
    }
    c.add("Normalise with the statistics of something else", |b| {
        let (x, z) = (b.p(&[3, 2, 2], -1.0, 1.0), b.p(&[2, 2, 3], -1.0, 1.0));
        let s = b.ops(Op::Train(Box::new(TrainOp::BatchStatistics { axis: 1 })), &[z], 2);
        let scale = b.p(&[2], 0.5, 1.5);
        let op = Op::Train(Box::new(TrainOp::Normalise { axis: 1, epsilon: 1e-3 }));
        b.op(op, &[x, s[0], s[1], scale])
    });
    c.add("ChannelSum", |b| {
        let x = b.p(&[2, 3, 2], -1.0, 1.0);
        b.op(Op::Train(Box::new(TrainOp::ChannelSum { axis: 1 })), &[x])
    });
}

fn reductions(c: &mut Cases) {
    for axis in [-1, 0, 1] {
        for log in [false, true] {
            c.add(format!("Softmax {axis} {log}"), move |b| {
                let x = b.p(&[2, 3, 2], -1.0, 1.0);
                b.op(Op::Softmax { axis, log }, &[x])
            });
        }
    }
    let all = [
        ReduceOp::L1,
        ReduceOp::L2,
        ReduceOp::LogSum,
        ReduceOp::LogSumExp,
        ReduceOp::Max,
        ReduceOp::Mean,
        ReduceOp::Min,
        ReduceOp::Prod,
        ReduceOp::Sum,
        ReduceOp::SumSquare,
    ];
    for op in all {
        for (axes, keep_dims) in [(None, false), (Some(vec![1i64]), true), (Some(vec![-1, 0]), false)] {
            c.add(format!("Reduce {op:?} {axes:?} {keep_dims}"), move |b| {
                let x = b.p(&[2, 3, 2], 0.2, 1.5);
                let axes = axes.as_ref().map(|a| b.ints(a));
                b.op_with(Op::Reduce { op, keep_dims, noop_with_empty_axes: false }, &[Some(x), axes], 1)
            });
        }
    }
    for zeros in [1, 2] {
        c.add(format!("Reduce Prod with {zeros} zeros"), move |b| {
            let mut values = vec![1.5, -0.5, 2.0, 0.7];
            values[..zeros].fill(0.0);
            let x = b.given(&[4], values);
            b.op(Op::Reduce { op: ReduceOp::Prod, keep_dims: false, noop_with_empty_axes: false }, &[x])
        });
    }
    for (exclusive, reverse) in [(false, false), (true, false), (false, true), (true, true)] {
        c.add(format!("CumSum {exclusive} {reverse}"), move |b| {
            let x = b.p(&[2, 4], -1.0, 1.0);
            let axis = b.int_tensor(&[], &[1]);
            b.op(Op::CumSum { exclusive, reverse }, &[x, axis])
        });
    }
}

fn movement(c: &mut Cases) {
    let shaped: [(&str, Op, &[usize], &[i64]); 5] = [
        ("Reshape", Op::Reshape { allow_zero: false }, &[2, 6], &[3, -1]),
        ("Unsqueeze", Op::Unsqueeze, &[2, 3], &[0, 2]),
        ("Squeeze", Op::Squeeze, &[1, 3, 1], &[0]),
        ("Expand", Op::Expand, &[3, 1], &[2, 3, 4]),
        ("Tile", Op::Tile, &[2, 3], &[2, 3]),
    ];
    for (name, op, dims, ints) in shaped {
        c.add(name, move |b| {
            let x = b.p(dims, -1.0, 1.0);
            let ints = b.ints(ints);
            b.op(op.clone(), &[x, ints])
        });
    }
    c.add("Flatten", |b| {
        let x = b.p(&[2, 3, 2], -1.0, 1.0);
        b.op(Op::Flatten { axis: 2 }, &[x])
    });
    for perm in [None, Some(vec![1, 2, 0])] {
        c.add(format!("Transpose {perm:?}"), move |b| {
            let x = b.p(&[2, 3, 2], -1.0, 1.0);
            b.op(Op::Transpose { perm: perm.clone() }, &[x])
        });
    }
    c.add("Concat", |b| {
        let operands = [b.p(&[2, 1], -1.0, 1.0), b.p(&[2, 3], -1.0, 1.0), b.p(&[2, 2], -1.0, 1.0)];
        b.op(Op::Concat { axis: -1 }, &operands)
    });
    c.add("Split", |b| {
        let x = b.p(&[2, 5], -1.0, 1.0);
        let parts = b.ops(Op::Split { axis: 1 }, &[x], 2);
        vec![b.op(Op::Unary(UnaryOp::Tanh), &[parts[0]])[0], parts[1]]
    });
    c.add("Split by sizes, one part unused", |b| {
        let x = b.p(&[6, 2], -1.0, 1.0);
        let sizes = b.ints(&[1, 2, 3]);
        let parts = b.ops(Op::Split { axis: 0 }, &[x, sizes], 3);
        vec![parts[0], parts[2]]
    });
    for (starts, ends, axes, steps) in [
        (vec![1, 0], vec![3, 2], vec![0, 1], vec![1, 1]),
        (vec![1], vec![i64::MAX], vec![1], vec![2]),
        (vec![-1, 4], vec![i64::MIN, 0], vec![0, 1], vec![-1, -2]),
        (vec![-3], vec![-1], vec![-1], vec![1]),
    ] {
        c.add(format!("Slice {starts:?} {ends:?} {axes:?} {steps:?}"), move |b| {
            let x = b.p(&[4, 6], -1.0, 1.0);
            let operands = [x, b.ints(&starts), b.ints(&ends), b.ints(&axes), b.ints(&steps)];
            b.op(Op::Slice, &operands)
        });
    }
    for mode in [PadMode::Constant, PadMode::Edge, PadMode::Reflect, PadMode::Wrap] {
        c.add(format!("Pad {mode:?}"), move |b| {
            let x = b.p(&[3, 4], -1.0, 1.0);
            let pads = b.ints(&[1, 2, 2, 3]);
            if mode == PadMode::Constant {
                let value = b.p(&[], -1.0, 1.0);
                return b.op(Op::Pad { mode }, &[x, pads, value]);
            }
            b.op(Op::Pad { mode }, &[x, pads])
        });
        c.add(format!("Pad {mode:?}, cropping"), move |b| {
            let x = b.p(&[4, 4], -1.0, 1.0);
            let (pads, axes) = (b.ints(&[-1, 2]), b.ints(&[-1]));
            b.op_with(Op::Pad { mode }, &[Some(x), Some(pads), None, Some(axes)], 1)
        });
    }
    for axis in [0, 1] {
        c.add(format!("Gather {axis}"), move |b| {
            let x = b.p(&[3, 3, 2], -1.0, 1.0);
            let indices = b.int_tensor(&[2, 2], &[0, 2, -1, 0]);
            b.op(Op::Gather { axis }, &[x, indices])
        });
    }
    c.add("Gather one", |b| {
        let x = b.p(&[3, 2], -1.0, 1.0);
        let index = b.int_tensor(&[], &[1]);
        b.op(Op::Gather { axis: 0 }, &[x, index])
    });
    c.add("GatherElements", |b| {
        let x = b.p(&[3, 2], -1.0, 1.0);
        let indices = b.int_tensor(&[3, 3], &[0, 1, 1, -1, 0, 0, 1, 1, 0]);
        b.op(Op::GatherElements { axis: 1 }, &[x, indices])
    });
    c.add("GatherNd", |b| {
        let x = b.p(&[3, 2, 2], -1.0, 1.0);
        let indices = b.int_tensor(&[3, 2], &[0, 1, 2, 0, 0, 1]);
        b.op(Op::GatherNd { batch_dims: 0 }, &[x, indices])
    });
    c.add("GatherNd with batch", |b| {
        let x = b.p(&[2, 3, 2], -1.0, 1.0);
        let indices = b.int_tensor(&[2, 2, 1], &[0, 2, 1, 1]);
        b.op(Op::GatherNd { batch_dims: 1 }, &[x, indices])
    });
    for reduction in [
        ScatterReduction::None,
        ScatterReduction::Add,
        ScatterReduction::Mul,
        ScatterReduction::Max,
        ScatterReduction::Min,
    ] {
        c.add(format!("ScatterElements {reduction:?}"), move |b| {
            let x = b.p(&[3, 3], -1.0, 1.0);
            let twice = reduction != ScatterReduction::None;
            let rows = if twice { [2, 2, 0, -1] } else { [2, 1, 0, 2] };
            let indices = b.int_tensor(&[2, 2], &rows);
            let updates = b.p(&[2, 2], -1.0, 1.0);
            b.op(Op::ScatterElements { axis: 0, reduction }, &[x, indices, updates])
        });
        c.add(format!("ScatterNd {reduction:?}"), move |b| {
            let x = b.p(&[4, 2], -1.0, 1.0);
            let second = if reduction == ScatterReduction::None { 0 } else { 3 };
            let indices = b.int_tensor(&[2, 1], &[3, second]);
            let updates = b.p(&[2, 2], -1.0, 1.0);
            b.op(Op::ScatterNd { reduction }, &[x, indices, updates])
        });
    }
    for crd in [false, true] {
        c.add(format!("DepthToSpace {crd}"), move |b| {
            let x = b.p(&[1, 8, 2, 3], -1.0, 1.0);
            b.op(Op::DepthToSpace { block: 2, crd }, &[x])
        });
    }
    c.add("SpaceToDepth", |b| {
        let x = b.p(&[1, 2, 4, 6], -1.0, 1.0);
        b.op(Op::SpaceToDepth { block: 2 }, &[x])
    });
    c.add("CenterCropPad", |b| {
        let x = b.p(&[5, 4], -1.0, 1.0);
        let shape = b.ints(&[2, 7]);
        b.op(Op::CenterCropPad { axes: None }, &[x, shape])
    });
    c.add("ReverseSequence", |b| {
        let x = b.p(&[4, 3], -1.0, 1.0);
        let lengths = b.ints(&[4, 1, 3]);
        b.op(Op::ReverseSequence { batch_axis: 1, time_axis: 0 }, &[x, lengths])
    });
    for upper in [false, true] {
        c.add(format!("Trilu {upper}"), move |b| {
            let x = b.p(&[3, 4], -1.0, 1.0);
            let k = b.int_tensor(&[], &[1]);
            b.op(Op::Trilu { upper }, &[x, k])
        });
    }
    c.add("TopK", |b| {
        let x = b.p(&[3, 5], -1.0, 1.0);
        let k = b.ints(&[2]);
        b.op(Op::TopK { axis: 1, largest: true, sorted: true }, &[x, k])
    });
}

fn resampling(c: &mut Cases) {
    let plain = || ResizeAttributes {
        mode: ResizeMode::Linear,
        coordinates: CoordinateMode::HalfPixel,
        nearest: NearestMode::RoundPreferFloor,
        cubic_coeff_a: -0.75,
        exclude_outside: false,
        extrapolation_value: 0.0,
        antialias: false,
        axes: None,
        aspect_ratio: AspectRatio::Stretch,
    };
    for mode in [ResizeMode::Nearest, ResizeMode::Linear, ResizeMode::Cubic] {
        for coordinates in [
            CoordinateMode::HalfPixel,
            CoordinateMode::HalfPixelSymmetric,
            CoordinateMode::PytorchHalfPixel,
            CoordinateMode::AlignCorners,
            CoordinateMode::Asymmetric,
        ] {
            c.add(format!("Resize {mode:?} {coordinates:?}"), move |b| {
                let x = b.p(&[1, 2, 3, 4], -1.0, 1.0);
                let sizes = b.ints(&[7, 3]);
                let a = ResizeAttributes { mode, coordinates, axes: Some(vec![2, 3]), ..plain() };
                b.op_with(Op::Resize(a), &[Some(x), None, None, Some(sizes)], 1)
            });
        }
        c.add(format!("Resize {mode:?} by scales"), move |b| {
            let x = b.p(&[1, 1, 4, 5], -1.0, 1.0);
            let scales = b.constant(Tensor::from_slice(&[4], &[1f32, 1.0, 0.6, 1.7]));
            let a = ResizeAttributes { mode, antialias: mode != ResizeMode::Nearest, ..plain() };
            b.op_with(Op::Resize(a), &[Some(x), None, Some(scales)], 1)
        });
    }
    for mode in [ResizeMode::Nearest, ResizeMode::Linear, ResizeMode::Cubic] {
        for padding in [GridPadding::Zeros, GridPadding::Border, GridPadding::Reflection] {
            for align_corners in [false, true] {
                c.add(format!("GridSample {mode:?} {padding:?} {align_corners}"), move |b| {
                    let operands = [b.p(&[2, 2, 3, 4], -1.0, 1.0), b.p(&[2, 2, 3, 2], -1.5, 1.5)];
                    b.op(Op::GridSample { mode, padding, align_corners }, &operands)
                });
            }
        }
    }
    c.add("GridSample of a volume", |b| {
        let operands = [b.p(&[1, 1, 2, 3, 2], -1.0, 1.0), b.p(&[1, 2, 1, 2, 3], -1.2, 1.2)];
        let (mode, padding) = (ResizeMode::Linear, GridPadding::Zeros);
        b.op(Op::GridSample { mode, padding, align_corners: false }, &operands)
    });
    for (rows, size) in [(2, vec![2i64, 1, 3, 2]), (3, vec![2, 1, 2, 3, 2])] {
        c.add(format!("AffineGrid {rows}"), move |b| {
            let theta = b.p(&[2, rows, rows + 1], -1.0, 1.0);
            let size = b.ints(&size);
            b.op(Op::AffineGrid { align_corners: rows == 3 }, &[theta, size])
        });
    }
}

fn sequences(c: &mut Cases) {
    let plain = || AttentionAttributes {
        causal: false,
        q_num_heads: 0,
        kv_num_heads: 0,
        scale: None,
        softcap: 0.0,
        qk_output: QkOutput::Raw,
        softmax_precision: None,
    };
    for (causal, softcap, masked) in [(false, 0.0, false), (true, 0.0, false), (false, 0.7, true)] {
        c.with(format!("Attention {causal} {softcap} {masked}"), SINGLE, move |b| {
            let mut operands = vec![
                b.p(&[1, 4, 3, 2], -1.0, 1.0),
                b.p(&[1, 2, 3, 2], -1.0, 1.0),
                b.p(&[1, 2, 3, 3], -1.0, 1.0),
            ];
            if masked {
                operands
                    .push(b.floats(&[3, 3], &[0.0, 0.3, -0.4, f64::NEG_INFINITY, 0.0, 0.1, 0.2, 0.0, 0.0]));
            }
            b.op(
                Op::Attention(AttentionAttributes { causal, softcap, scale: Some(0.9), ..plain() }),
                &operands,
            )
        });
    }
    for (causal, softcap, packed) in [(false, 0.0, false), (true, 0.6, false), (true, 0.0, true)] {
        c.with(format!("Attention with a learned bias {causal} {softcap} {packed}"), SINGLE, move |b| {
            let (shared, heads) = if packed { (0, 0) } else { (2, 4) };
            let operands = if packed {
                [b.p(&[2, 3, 4], -1.0, 1.0), b.p(&[2, 3, 4], -1.0, 1.0), b.p(&[2, 3, 4], -1.0, 1.0)]
            } else {
                [&[1, heads, 3, 2], &[1, shared, 3, 2], &[1, shared, 3, 2]].map(|d| b.p(d, -1.0, 1.0))
            };
            let bias = b.p(&[if packed { 2 } else { 1 }, 1, 3, 3], -0.5, 0.5);
            let count = if packed { 2 } else { 0 };
            let a =
                AttentionAttributes { causal, softcap, q_num_heads: count, kv_num_heads: count, ..plain() };
            b.op(Op::Attention(a), &[operands[0], operands[1], operands[2], bias])
        });
    }
    c.with("Attention of packed heads", SINGLE, move |b| {
        let operands = [b.p(&[2, 3, 4], -1.0, 1.0), b.p(&[2, 2, 4], -1.0, 1.0), b.p(&[2, 2, 4], -1.0, 1.0)];
        b.op(Op::Attention(AttentionAttributes { q_num_heads: 2, kv_num_heads: 2, ..plain() }), &operands)
    });
    for interleaved in [false, true] {
        c.with(format!("RotaryEmbedding {interleaved}"), LINEAR, move |b| {
            let x = b.p(&[1, 2, 3, 6], -1.0, 1.0);
            let angles: Vec<f64> = (0..6).map(|i| i as f64 * 0.7).collect();
            let cos = b.floats(&[1, 3, 2], &angles.iter().map(|a| a.cos()).collect::<Vec<f64>>());
            let sin = b.floats(&[1, 3, 2], &angles.iter().map(|a| a.sin()).collect::<Vec<f64>>());
            b.op(Op::RotaryEmbedding { interleaved, num_heads: 0, rotary_dim: 4 }, &[x, cos, sin])
        });
    }
    for direction in [Direction::Forward, Direction::Reverse, Direction::Bidirectional] {
        for batch_first in [false, true] {
            for (gates, cell) in [(1, RecurrentCell::Rnn), (3, RecurrentCell::Gru), (4, RecurrentCell::Lstm)]
            {
                for variant in [false, true] {
                    c.add(format!("{cell:?} {direction:?} {batch_first} {variant}"), move |b| {
                        let d = if direction == Direction::Bidirectional { 2 } else { 1 };
                        let (steps, batch, input, hidden) = (3, 2, 2, 2);
                        let a = RecurrentAttributes {
                            hidden_size: hidden,
                            direction,
                            activations: Vec::new(),
                            clip: variant.then_some(0.8),
                            batch_first,
                            input_forget: variant,
                            linear_before_reset: variant,
                        };
                        let swap = |x: usize, y: usize| if batch_first { (y, x) } else { (x, y) };
                        let (first, second) = swap(steps, batch);
                        let state = swap(d, batch);
                        let mut operands = vec![
                            Some(b.p(&[first, second, input], -1.0, 1.0)),
                            Some(b.p(&[d, gates * hidden, input], -1.0, 1.0)),
                            Some(b.p(&[d, gates * hidden, hidden], -1.0, 1.0)),
                            Some(b.p(&[d, 2 * gates * hidden], -1.0, 1.0)),
                            variant.then(|| b.constant(Tensor::from_slice(&[2], &[3i32, 2]))),
                            Some(b.p(&[state.0, state.1, hidden], -1.0, 1.0)),
                        ];
                        if cell == RecurrentCell::Lstm {
                            operands.push(Some(b.p(&[state.0, state.1, hidden], -1.0, 1.0)));
                            operands.push(variant.then(|| b.p(&[d, 3 * hidden], -1.0, 1.0)));
                        }
                        match cell {
                            RecurrentCell::Rnn => b.op_with(Op::Rnn(a), &operands, 2),
                            RecurrentCell::Gru => b.op_with(Op::Gru(a), &operands, 2),
                            RecurrentCell::Lstm => b.op_with(Op::Lstm(a), &operands, 3),
                        }
                    });
                }
            }
        }
    }
}

fn language(c: &mut Cases) {
    // Operators of language models are of single precision, and linear in what a gradient is asked for.
    let precision = Precision { dtype: DType::F32, step: 1.0, tolerance: 1e-4 };
    c.with("BlockMatMul", precision, |b| {
        let (x, bias) = (b.p(&[3, 4], -1.0, 1.0), b.p(&[5], -1.0, 1.0));
        let w: Vec<u8> = (0..20).flat_map(|_| (2.0 * b.random() as f32 - 1.0).to_le_bytes()).collect();
        let w = b.constant(Tensor::from_slice(&[5, 16], &w));
        b.op(Op::Lm(Box::new(LmOp::BlockMatMul { format: BlockFormat::F32 })), &[x, w, bias])
    });
    for interleaved in [false, true] {
        c.with(format!("Rope {interleaved}"), precision, move |b| {
            let x = b.p(&[3, 12], -1.0, 1.0);
            let angles: Vec<f64> = (0..6).map(|i| i as f64 * 0.7).collect();
            let row = |at: usize| {
                let part = &angles[2 * at..2 * at + 2];
                part.iter().map(|a| a.cos()).chain(part.iter().map(|a| a.sin())).collect::<Vec<f64>>()
            };
            let all: Vec<f64> = (0..3).flat_map(row).collect();
            let angles = b.floats(&[3, 4], &all);
            b.op(Op::Lm(Box::new(LmOp::Rope { heads: 2, offset: 1, interleaved })), &[x, angles])
        });
    }
}

fn losses(c: &mut Cases) {
    for reduction in [LossReduction::None, LossReduction::Mean, LossReduction::Sum] {
        for (weighted, ignore_index) in [(false, None), (true, None), (false, Some(2)), (true, Some(-1))] {
            for scores in [false, true] {
                let name = if scores { "SoftmaxCrossEntropyLoss" } else { "NllLoss" };
                c.add(format!("{name} {reduction:?} {weighted} {ignore_index:?}"), move |b| {
                    let x = b.p(&[2, 3, 2], -2.0, 2.0);
                    let last = ignore_index.unwrap_or(1);
                    let target = b.int_tensor(&[2, 2], &[0, 2, 1, last]);
                    let mut operands = vec![x, target];
                    if weighted {
                        operands.push(b.floats(&[3], &[0.5, 1.5, 1.0]));
                    }
                    let a = LossAttributes { reduction, ignore_index };
                    if scores {
                        b.ops(Op::SoftmaxCrossEntropyLoss(a), &operands, 2)
                    } else {
                        b.op(Op::NllLoss(a), &operands)
                    }
                });
            }
        }
    }
    for (smoothing, ignore, weighted) in [(0.0, None, false), (0.1, Some(-1), true)] {
        c.add(format!("CrossEntropy {smoothing} {ignore:?} {weighted}"), move |b| {
            let x = b.p(&[2, 2, 4], -2.0, 2.0);
            let labels = b.int_tensor(&[2, 2], &[0, 3, ignore.unwrap_or(1), 2]);
            let weights = weighted.then(|| b.floats(&[2, 2], &[0.5, 1.0, 2.0, 1.5]));
            let op = TrainOp::CrossEntropy { label_smoothing: smoothing, ignore };
            b.op_with(Op::Train(Box::new(op)), &[Some(x), Some(labels), weights], 1)
        });
    }
    c.add("CrossEntropy of probabilities", |b| {
        let x = b.p(&[2, 3], -2.0, 2.0);
        let labels = b.floats(&[2, 3], &[0.2, 0.3, 0.5, 0.0, 1.0, 0.0]);
        let op = TrainOp::CrossEntropy { label_smoothing: 0.1, ignore: None };
        b.op(Op::Train(Box::new(op)), &[x, labels])
    });
}

fn all_cases() -> Cases {
    let mut c = Cases::default();
    elementwise(&mut c);
    linear(&mut c);
    windows(&mut c);
    norms(&mut c);
    reductions(&mut c);
    movement(&mut c);
    resampling(&mut c);
    sequences(&mut c);
    losses(&mut c);
    language(&mut c);
    c
}

#[test]
fn every_differentiable_operator_agrees_with_differences() {
    let mut tested = BTreeSet::new();
    let mut failed = Vec::new();
    for (name, precision, build) in &all_cases().0 {
        match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(name, *precision, build))) {
            Ok(names) => tested.extend(names),
            Err(_) => failed.push(name.clone()),
        }
    }
    assert!(failed.is_empty(), "{} cases failed: {failed:#?}", failed.len());
    let missing: Vec<&&str> = DIFFERENTIABLE.iter().filter(|n| !tested.contains(**n)).collect();
    assert!(missing.is_empty(), "declared differentiable, but without a case here: {missing:?}");
}

/// Every case in the type that is trained in: by the interpreter and as a planned step, after the passes.
#[test]
fn planned_steps_in_single_precision_agree() {
    let evaluator = Evaluator::new(MemoryPool::unbounded(), Vec::new());
    let (mut failed, mut compared) = (Vec::new(), 0);
    for (name, precision, build) in &all_cases().0 {
        if name == "Cast" {
            continue;
        }
        let gradients = |dtype: DType| {
            let mut bench = Bench::new(dtype);
            let results = build(&mut bench);
            let loss = with_loss(&mut bench, &results);
            let mut graph = bench.graph.clone();
            let wrt: Vec<ValueId> = bench.given.iter().map(|(v, _)| *v).collect();
            let made = differentiate(&mut graph, loss, &wrt, &DifferentiateOptions::default()).unwrap();
            // Several parameters may share one gradient, which a graph gives out once.
            graph.outputs = vec![loss];
            for v in made.into_iter().flatten() {
                if !graph.outputs.contains(&v) {
                    graph.outputs.push(v);
                }
            }
            let values: Vec<Vec<f64>> = bench.given.iter().map(|(_, v)| v.clone()).collect();
            let found = run(&graph, &bench, &values);
            (bench, graph, values, found)
        };
        let close = |a: &[Vec<f64>], b: &[Vec<f64>], tolerance: f64| {
            a.iter().zip(b).all(|(a, b)| {
                let size = b.iter().fold(1.0f64, |m, v| m.max(v.abs()));
                a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= tolerance * size)
            })
        };
        let (_, _, _, double) = gradients(precision.dtype);
        let (bench, mut graph, values, single) = gradients(DType::F32);
        if !close(&single, &double, 1e-4) {
            failed.push(format!("{name}: {single:?} in single precision, {double:?} in double"));
            continue;
        }
        let outputs: Vec<String> = graph.outputs.iter().map(|&v| graph.value(v).name.clone()).collect();
        Pipeline::after_differentiation(&evaluator).run(&mut graph).unwrap();
        let after: Vec<String> = graph.outputs.iter().map(|&v| graph.value(v).name.clone()).collect();
        assert_eq!(outputs, after, "{name}");
        let options = SessionOptions::new(PlanOptions::new(MachineProfile::conservative(), 2));
        let planned = Session::new(&graph, Vec::new(), &options).and_then(|mut session| {
            let mut feed: HashMap<String, RuntimeValue> = bench
                .given
                .iter()
                .zip(&values)
                .map(|((v, _), values)| {
                    let value = bench.graph.value(*v);
                    let dims = value.ty.tensor().unwrap().dims().unwrap();
                    (value.name.clone(), tensor(DType::F32, &dims, values).into())
                })
                .collect();
            session.run_to_values(&mut feed)
        });
        match planned {
            Ok(values) => {
                let planned: Vec<Vec<f64>> =
                    values.iter().map(|v| v.tensor().unwrap().to_f64s().unwrap()).collect();
                if !close(&planned, &single, 1e-4) {
                    failed.push(format!("{name}: {planned:?} planned, {single:?} interpreted"));
                }
                compared += 1;
            }
            Err(e) => failed.push(format!("{name}: {e}")),
        }
    }
    assert!(failed.is_empty(), "{} failed, {compared} compared:\n{}", failed.len(), failed.join("\n"));
    assert!(compared > 300, "{compared} cases were compared");
}

/// The gradient of the sum of `2·f(x)` under a rule for `f`.
fn under_rule(op: UnaryOp, rule: GradientRule, x: &[f64]) -> Vec<f64> {
    let mut b = Bench::new(DType::F64);
    let v = b.given(&[x.len()], x.to_vec());
    let y = b.op(Op::Unary(op), &[v])[0];
    let two = b.floats(&[], &[2.0]);
    let y = b.op(Op::Binary(BinaryOp::Mul), &[y, two])[0];
    let sum = Op::Reduce { op: ReduceOp::Sum, keep_dims: false, noop_with_empty_axes: false };
    let loss = b.op(sum, &[y])[0];
    b.graph.infer().unwrap();
    let options = DifferentiateOptions {
        rules: vec![(Selector::Operator(op_name(op)), rule)],
        ..DifferentiateOptions::default()
    };
    let gradient = differentiate(&mut b.graph, loss, &[v], &options).unwrap();
    b.graph.outputs = vec![gradient[0].unwrap()];
    b.graph.verify().unwrap();
    let graph = b.graph.clone();
    run(&graph, &b, &[x.to_vec()]).remove(0)
}

fn op_name(op: UnaryOp) -> String {
    Op::Unary(op).name().to_owned()
}

#[test]
fn rules_take_the_place_of_derivatives() {
    // More than one byte of bits, and one that is not full.
    let x: Vec<f64> = (0..19).map(|i| (i as f64 - 9.0) * 0.4).collect();
    let passed =
        |f: &dyn Fn(f64) -> bool| -> Vec<f64> { x.iter().map(|&v| if f(v) { 2.0 } else { 0.0 }).collect() };
    let through = under_rule(UnaryOp::Sign, GradientRule::StraightThrough, &x);
    assert_eq!(through, passed(&|_| true));
    let within = GradientRule::StraightThroughWithin { min: -1.0, max: 2.0 };
    assert_eq!(under_rule(UnaryOp::Round, within, &x), passed(&|v| v > -1.0 && v < 2.0));
    let above = GradientRule::Mask(MaskRule::Above(-0.5));
    assert_eq!(under_rule(UnaryOp::HardSwish, above, &x), passed(&|v| v > -0.5));
    let between = GradientRule::Mask(MaskRule::Between(0.0, 3.0));
    assert_eq!(under_rule(UnaryOp::HardSwish, between, &x), passed(&|v| v > 0.0 && v < 3.0));
    // A mask is the derivative of a ReLU6 itself.
    let six = UnaryOp::ClipTo { min: 0.0, max: 3.0 };
    assert_eq!(under_rule(six, between, &x), under_rule(six, GradientRule::Exact, &x));
}

mod random_shapes {
    use super::*;
    use proptest::prelude::*;

    fn dims(rank: std::ops::Range<usize>) -> impl Strategy<Value = Vec<usize>> {
        proptest::collection::vec(1usize..4, rank)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn broadcasting(full in dims(1..4), ones in any::<[bool; 6]>(), cut in 0usize..3, which in 0usize..4) {
            let op = [BinaryOp::Add, BinaryOp::Sub, BinaryOp::Mul, BinaryOp::Div][which];
            let narrow = |mask: &[bool], cut: usize| -> Vec<usize> {
                full.iter().zip(mask).map(|(&d, &one)| if one { 1 } else { d }).skip(cut).collect()
            };
            let (s, t) = (narrow(&ones[..3], 0), narrow(&ones[3..], cut.min(full.len())));
            check("broadcasting", DOUBLE, &|b| {
                let (x, z) = (b.p(&s, 0.5, 1.5), b.p(&t, 0.5, 1.5));
                b.op(Op::Binary(op), &[x, z])
            });
        }

        #[test]
        fn products(batch in dims(0..3), sizes in any::<[u8; 3]>(), flags in any::<[bool; 4]>()) {
            let [m, k, n] = sizes.map(|s| usize::from(s % 3) + 1);
            let [ta, tb, shared, bias] = flags;
            check("products", DOUBLE, &|b| {
                let with = |lead: &[usize], x: usize, y: usize| {
                    let mut d = lead.to_vec();
                    d.extend([x, y]);
                    d
                };
                let lead: &[usize] = if shared { &[] } else { &batch };
                let (left, right) = (if ta { (k, m) } else { (m, k) }, if tb { (n, k) } else { (k, n) });
                let mut operands = vec![
                    b.p(&with(&batch, left.0, left.1), -1.0, 1.0),
                    b.p(&with(lead, right.0, right.1), -1.0, 1.0),
                ];
                if bias {
                    operands.push(b.p(&[n], -1.0, 1.0));
                }
                let a = MatMulAttributes { trans_a: ta, trans_b: tb, alpha: 0.5, activation: None };
                b.op(Op::MatMul(a), &operands)
            });
        }

        #[test]
        fn convolutions(
            spatial in proptest::collection::vec(3usize..6, 1..3),
            (groups, per_in, per_out) in (1usize..3, 1usize..3, 1usize..3),
            (kernel, stride, dilation, pad) in (1usize..3, 1usize..4, 1usize..3, 0i64..2),
            last in any::<bool>(),
        ) {
            check("convolutions", DOUBLE, &|b| {
                let rank = spatial.len();
                let mut x = vec![2];
                if last {
                    x.extend(&spatial);
                    x.push(groups * per_in);
                } else {
                    x.push(groups * per_in);
                    x.extend(&spatial);
                }
                let mut w = vec![groups * per_out, per_in];
                w.extend(vec![kernel; rank]);
                let a = ConvAttributes {
                    strides: vec![stride; rank],
                    dilations: vec![dilation; rank],
                    padding: Padding::Explicit(vec![pad; 2 * rank]),
                    groups,
                    layout: if last { Layout::ChannelsLast } else { Layout::ChannelsFirst },
                    ..ConvAttributes::default()
                };
                let operands = [b.p(&x, -1.0, 1.0), b.p(&w, -1.0, 1.0), b.p(&[groups * per_out], -1.0, 1.0)];
                b.op(Op::Conv(a), &operands)
            });
        }

        #[test]
        fn reductions(shape in dims(1..4), marks in any::<[bool; 3]>(), keep_dims: bool, which in 0usize..4) {
            let op = [ReduceOp::Sum, ReduceOp::Mean, ReduceOp::L2, ReduceOp::LogSumExp][which];
            let axes: Vec<i64> = (0..shape.len() as i64).filter(|&i| marks[i as usize]).collect();
            check("reductions", DOUBLE, &|b| {
                let x = b.p(&shape, 0.5, 1.5);
                let axes = b.ints(&axes);
                b.op(Op::Reduce { op, keep_dims, noop_with_empty_axes: true }, &[x, axes])
            });
        }

        #[test]
        fn slices(size in 1usize..7, start in -8i64..8, end in -8i64..8, step in prop_oneof![-3i64..0, 1i64..4]) {
            // An empty slice has no gradient to compare.
            let wrap = |v: i64| if v < 0 { v + size as i64 } else { v };
            let taken = (0..size as i64).filter(|&i| {
                if step > 0 { i >= wrap(start) && i < wrap(end) } else { i <= wrap(start) && i > wrap(end) }
            });
            prop_assume!(taken.count() > 0);
            check("slices", DOUBLE, &|b| {
                let x = b.p(&[2, size], -1.0, 1.0);
                let operands = [x, b.ints(&[start]), b.ints(&[end]), b.ints(&[1]), b.ints(&[step])];
                b.op(Op::Slice, &operands)
            });
        }
    }
}
