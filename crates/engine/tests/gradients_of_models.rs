//! Differentiation of graphs that others made: the ONNX backend cases, whose gradients are compared with differences,
//! and whole models, which must differentiate with respect to all of their weights.

use std::path::{Path, PathBuf};

use lightering_engine::{Evaluator, RuntimeValue, interpret};
use lightering_formats::HostValue;
use lightering_formats::onnx::{ModelFile, import, read_value};
use lightering_graph::passes::{BatchNormForTraining, BatchNormMode, DeadCode, Fold, Pipeline};
use lightering_graph::*;
use lightering_kernels::ThreadPool;
use lightering_meter::MemoryPool;

fn folder(name: &str) -> Option<PathBuf> {
    let root = std::env::var_os("LIGHTER_TEST_DATA").map(PathBuf::from).or_else(|| {
        std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/lighter-test-data"))
    })?;
    let folder = root.join(name);
    if folder.is_dir() {
        return Some(folder);
    }
    eprintln!("skipped: {} is not there (set LIGHTER_TEST_DATA)", folder.display());
    None
}

/// The inputs of a case by name.
fn inputs_of(file: &ModelFile, set: &Path) -> Vec<(String, Tensor)> {
    let declared = &file.model.graph.as_ref().unwrap().input;
    let mut found = Vec::new();
    for (index, info) in declared.iter().enumerate() {
        let Ok(bytes) = std::fs::read(set.join(format!("input_{index}.pb"))) else { continue };
        if let Ok(HostValue::Tensor(tensor)) = read_value(&bytes, &info.value_type) {
            found.push((info.name.clone(), tensor));
        }
    }
    found
}

fn widened(t: &Tensor) -> Tensor {
    match t.dtype() {
        DType::F32 => Tensor::from_slice(t.dims(), &t.to_f64s().unwrap()),
        _ => t.clone(),
    }
}

/// The graph in double precision.
fn in_double(graph: &mut Graph) -> Option<()> {
    for value in &mut graph.values {
        let Some(ty) = value.ty.tensor().cloned() else { continue };
        if let ValueKind::Constant(c) = &mut value.kind {
            let wide = widened(c.inline()?);
            value.ty = wide.tensor_type().into();
            *c = Constant::Inline(std::sync::Arc::new(wide));
        } else if ty.dtype == DType::F32 {
            value.ty = TensorType { dtype: DType::F64, ..ty }.into();
        }
    }
    for id in graph.node_ids() {
        match &mut graph.node_mut(id).op {
            Op::Cast { to, .. } if *to == DType::F32 => *to = DType::F64,
            Op::ConstantOfShape { value } => *value = widened(value),
            Op::EyeLike { dtype, .. } if *dtype == Some(DType::F32) => *dtype = Some(DType::F64),
            op if op.is_random() => return None,
            _ => {}
        }
    }
    graph.infer().ok()
}

/// Random numbers between −1 and 1.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    fn vector(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.next()).collect()
    }
}

enum Verdict {
    Right,
    /// Nothing to differentiate, or not run in double precision.
    Skipped,
    /// No derivative, which is said.
    Refused(String),
    Wrong(String),
}

/// Compares the slope in a random direction with what the gradients say.
fn judge(mut graph: Graph, given: &[(String, Tensor)], noise: &mut Noise) -> Verdict {
    let (memory, threads) = (MemoryPool::unbounded(), ThreadPool::new(1));
    let evaluator = Evaluator::new(memory.clone(), Vec::new());
    let mut places = Vec::new();
    for (name, tensor) in given {
        let Some(id) = graph.inputs.iter().copied().find(|&v| graph.value(v).name == *name) else { continue };
        if tensor.dtype() == DType::F32 {
            if graph.bind(&[(id, tensor.tensor_type())]).is_err() {
                return Verdict::Skipped;
            }
            let spread = tensor.to_f64s().unwrap();
            // Off the kinks that round numbers like to sit on.
            places.push((name.clone(), spread.iter().map(|v| v + 0.01 * noise.next()).collect::<Vec<f64>>()));
        } else if graph.bind_value(id, tensor.clone()).is_err() {
            return Verdict::Skipped;
        }
    }
    if in_double(&mut graph).is_none() || Fold::new(&evaluator).run(&mut graph).is_err() {
        return Verdict::Skipped;
    }
    DeadCode.run(&mut graph).unwrap();
    let wrt: Vec<(ValueId, Vec<f64>)> = places
        .into_iter()
        .filter_map(|(name, at)| {
            Some((graph.inputs.iter().copied().find(|&v| graph.value(v).name == name)?, at))
        })
        .collect();
    let mut parts = Vec::new();
    for y in graph.outputs.clone() {
        let Some((DType::F64, Some(dims))) = graph.value(y).ty.tensor().map(|t| (t.dtype, t.dims())) else {
            continue;
        };
        let factors = noise.vector(dims.iter().product());
        let name = format!("factors{}", parts.len());
        let factors = graph.add_constant(name, Tensor::from_slice(&dims, &factors));
        let product =
            graph.add_node(format!("product{}", parts.len()), Op::Binary(BinaryOp::Mul), &[y, factors], 1)[0];
        let sum = Op::Reduce { op: ReduceOp::Sum, keep_dims: false, noop_with_empty_axes: false };
        parts.push(graph.add_node(format!("sum{}", parts.len()), sum, &[product], 1)[0]);
    }
    if parts.is_empty() || wrt.is_empty() {
        return Verdict::Skipped;
    }
    let loss = graph.add_node("total of all", Op::Variadic(VariadicOp::Sum), &parts, 1)[0];
    if graph.infer().is_err() {
        return Verdict::Skipped;
    }
    graph.outputs = vec![loss];
    let run = |graph: &Graph, shift: f64, directions: &[Vec<f64>]| -> Result<Vec<Vec<f64>>, String> {
        let inputs: Vec<(ValueId, RuntimeValue)> = wrt
            .iter()
            .zip(directions)
            .map(|((v, at), d)| {
                let values: Vec<f64> = at.iter().zip(d).map(|(a, d)| a + shift * d).collect();
                let dims = graph.value(*v).ty.tensor().unwrap().dims().unwrap();
                (*v, Tensor::from_slice(&dims, &values).into())
            })
            .collect();
        let out = interpret(graph, &inputs, &[], &memory, &threads).map_err(|e| e.to_string())?;
        Ok(out.iter().map(|v| v.tensor().and_then(Tensor::to_f64s).unwrap_or_default()).collect())
    };
    let directions: Vec<Vec<f64>> = wrt.iter().map(|(_, at)| noise.vector(at.len())).collect();
    let Ok(middle) = run(&graph, 0.0, &directions) else { return Verdict::Skipped };
    if !middle[0][0].is_finite() {
        return Verdict::Skipped;
    }
    let slope = |step: f64| {
        let at = |s: f64| run(&graph, s, &directions).map(|v| v[0][0]).unwrap_or(f64::NAN);
        (at(step) - at(-step)) / (2.0 * step)
    };
    let mut backward = graph.clone();
    let ids: Vec<ValueId> = wrt.iter().map(|(v, _)| *v).collect();
    let gradients = match differentiate(&mut backward, loss, &ids, &DifferentiateOptions::default()) {
        Ok(gradients) => gradients,
        Err(GraphError::Unsupported { what, .. }) => return Verdict::Refused(what),
        Err(e) => return Verdict::Wrong(e.to_string()),
    };
    if let Err(e) = backward.verify() {
        return Verdict::Wrong(e.to_string());
    }
    backward.outputs = gradients.iter().copied().flatten().collect();
    let found = match run(&backward, 0.0, &directions) {
        Ok(found) => found,
        Err(e) => return Verdict::Wrong(e),
    };
    let mut found = found.into_iter();
    let mut along = 0.0;
    for (gradient, direction) in gradients.iter().zip(&directions) {
        let Some(gradient) = gradient.and_then(|_| found.next()) else { continue };
        along += gradient.iter().zip(direction).map(|(g, d)| g * d).sum::<f64>();
    }
    // Attention and rotation compute in single precision whatever the element type is, and want a long step.
    let close = |step: f64, tolerance: f64| {
        let expected = slope(step);
        (along - expected).abs() <= tolerance * (1.0 + expected.abs())
    };
    let single =
        graph.iter_nodes().any(|(_, n)| matches!(n.op, Op::Attention(_) | Op::RotaryEmbedding { .. }));
    let right = if single { close(1e-2, 1e-2) } else { close(1e-6, 1e-5) };
    if right {
        Verdict::Right
    } else {
        Verdict::Wrong(format!("slope {along} by the graph, {} by differences", slope(1e-6)))
    }
}

#[test]
fn gradients_of_the_onnx_cases_agree_with_differences() {
    let Some(folder) = folder("onnx-1.18.0/onnx/backend/test/data") else { return };
    let (mut right, mut refused, mut wrong) = (0, Vec::new(), Vec::new());
    for suite in ["node", "simple", "pytorch-converted", "pytorch-operator"] {
        let mut cases: Vec<PathBuf> =
            std::fs::read_dir(folder.join(suite)).unwrap().map(|c| c.unwrap().path()).collect();
        cases.sort();
        for case in cases {
            let name = case.file_name().unwrap().to_string_lossy().into_owned();
            let file = ModelFile::open(case.join("model.onnx")).unwrap();
            let Ok(imported) = import(&file) else { continue };
            let set = case.join("test_data_set_0");
            let given = inputs_of(&file, &set);
            let judged = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                judge(imported.graph.clone(), &given, &mut Noise(7))
            }));
            match judged {
                Ok(Verdict::Right) => right += 1,
                Ok(Verdict::Skipped) => {}
                Ok(Verdict::Refused(what)) => refused.push(format!("{name}: {what}")),
                Ok(Verdict::Wrong(what)) => wrong.push(format!("{name}: {what}")),
                Err(_) => wrong.push(format!("{name}: panicked")),
            }
        }
    }
    eprintln!("{right} right; refused:\n{}", refused.join("\n"));
    assert!(wrong.is_empty(), "{} wrong, {right} right:\n{}", wrong.len(), wrong.join("\n"));
    assert!(right > 600, "{right} cases were compared");
}

/// Differentiates a model with respect to all of its weights, as a training would.
fn whole_model(name: &str) {
    let Some(folder) = folder("models") else { return };
    let path = folder.join(format!("{name}.onnx"));
    if !path.is_file() {
        eprintln!("skipped: {} is not there", path.display());
        return;
    }
    let file = ModelFile::open(&path).unwrap();
    let imported = import(&file).unwrap();
    let mut graph = imported.graph;
    for v in graph.inputs.clone() {
        let Some(ty) = graph.value(v).ty.tensor().cloned() else { continue };
        let dims: Vec<usize> = ty
            .shape
            .iter()
            .flatten()
            .enumerate()
            .map(|(i, d)| d.fixed().unwrap_or(if i == 0 { 2 } else { 16 }))
            .collect();
        graph.bind(&[(v, TensorType::fixed(ty.dtype, &dims))]).unwrap();
    }
    let evaluator = Evaluator::new(MemoryPool::unbounded(), imported.sources);
    Fold::new(&evaluator).run(&mut graph).unwrap();
    BatchNormForTraining { mode: BatchNormMode::Train }.run(&mut graph).unwrap();
    Pipeline::before_differentiation(&evaluator).run(&mut graph).unwrap();
    graph.verify().unwrap();
    let weights: Vec<ValueId> = graph
        .values
        .iter()
        .enumerate()
        .filter(|(_, v)| {
            let ty = v.ty.tensor();
            v.constant().is_some() && ty.is_some_and(|t| t.dtype == DType::F32 && t.elements() > Some(64))
        })
        .map(|(i, _)| ValueId(i as u32))
        .collect();
    let mut parts = Vec::new();
    for y in graph.outputs.clone() {
        let square = Op::Reduce { op: ReduceOp::SumSquare, keep_dims: false, noop_with_empty_axes: false };
        parts.push(graph.add_node(format!("square of {}", y.0), square, &[y], 1)[0]);
    }
    let loss = graph.add_node("total of all", Op::Variadic(VariadicOp::Sum), &parts, 1)[0];
    graph.infer().unwrap();
    graph.outputs = vec![loss];
    let gradients = differentiate(&mut graph, loss, &weights, &DifferentiateOptions::default())
        .unwrap_or_else(|e| panic!("{name}: {e}"));
    graph.outputs.extend(gradients.iter().flatten());
    graph.verify().unwrap();
    let wanted = gradients.iter().flatten().count();
    eprintln!("{name}: {wanted} gradients of {} weights, {} nodes", weights.len(), graph.node_count());
    assert!(wanted * 10 > weights.len() * 9, "{name}: {wanted} of {} weights", weights.len());
    Pipeline::after_differentiation(&evaluator).verified().run(&mut graph).unwrap();
}

#[test]
fn whole_models_differentiate() {
    for name in [
        "resnet-18",
        "mobilenet-v2",
        "mobilenet-v3-small",
        "efficientnet-lite0",
        "squeezenet-1.1",
        "vit-tiny",
        "minilm-l6",
        "nanodet-coco-416",
    ] {
        whole_model(name);
    }
}
