//! Constant folding with the real kernels: the ONNX backend cases and whole models get the shapes that they have.

use std::path::{Path, PathBuf};

use lightering_engine::Evaluator;
use lightering_formats::HostValue;
use lightering_formats::onnx::{ModelFile, import, read_value};
use lightering_graph::cost::graph_cost;
use lightering_graph::passes::{CommonSubexpression, DeadCode, Fold};
use lightering_graph::{DType, Graph, Op, Pass, Tensor, TensorType, ValueType};
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

/// The tensors of `prefix_0.pb`, … of a case, by declared name.
fn tensors(file: &ModelFile, set: &Path, prefix: &str) -> Vec<(String, Tensor)> {
    let graph = file.model.graph.as_ref().unwrap();
    let declared = if prefix == "input" { &graph.input } else { &graph.output };
    let mut found = Vec::new();
    for (index, info) in declared.iter().enumerate() {
        let Ok(bytes) = std::fs::read(set.join(format!("{prefix}_{index}.pb"))) else { continue };
        if let Ok(HostValue::Tensor(tensor)) = read_value(&bytes, &info.value_type) {
            found.push((info.name.clone(), tensor));
        }
    }
    found
}

/// The package writes bf16 test data as the u16 of its bits.
fn as_declared(tensor: Tensor, declared: &ValueType) -> Tensor {
    match declared.tensor() {
        Some(t) if t.dtype == DType::BF16 && tensor.dtype() == DType::U16 => tensor.into_dtype(DType::BF16),
        _ => tensor,
    }
}

fn bind_and_fold(
    graph: &mut Graph,
    inputs: &[(String, Tensor)],
    evaluator: &Evaluator,
) -> Result<(), String> {
    let inputs: Vec<_> = inputs
        .iter()
        .filter_map(|(name, tensor)| {
            let id = graph.inputs.iter().copied().find(|&v| graph.value(v).name == *name)?;
            Some((id, as_declared(tensor.clone(), &graph.value(id).ty)))
        })
        .collect();
    for (id, tensor) in &inputs {
        graph.bind(&[(*id, tensor.tensor_type())]).map_err(|e| e.to_string())?;
    }
    let fold = Fold::new(evaluator);
    fold.run(graph).map_err(|e| e.to_string())?;
    let controlling = graph.shape_controlling_inputs();
    for (id, tensor) in inputs {
        if controlling.contains(&id) {
            graph.bind_value(id, tensor).map_err(|e| e.to_string())?;
        }
    }
    fold.run(graph).map_err(|e| e.to_string())?;
    CommonSubexpression.run(graph).map_err(|e| e.to_string())?;
    DeadCode.run(graph).map_err(|e| e.to_string())?;
    graph.verify().map_err(|e| e.to_string())?;
    // What is inferred afresh says the same.
    let before: Vec<ValueType> = graph.outputs.iter().map(|&v| graph.value(v).ty.clone()).collect();
    graph.infer().map_err(|e| e.to_string())?;
    for (&v, ty) in graph.outputs.iter().zip(before) {
        if graph.value(v).ty != ty {
            return Err(format!("{} after folding, {} inferred", ty, graph.value(v).ty));
        }
    }
    Ok(())
}

/// Cases whose result shapes depend on the data.
const DATA_DEPENDENT: [&str; 11] = [
    "test_compress_",
    "test_image_decoder_",
    "test_loop11",
    "test_nonmaxsuppression_",
    "test_nonzero_",
    "test_range_",
    "test_sequence_model",
    "test_string_split_",
    "test_strnorm_",
    "test_strnormalizer_",
    "test_unique_",
];

#[test]
fn every_case_folds_to_the_expected_types() {
    let Some(folder) = folder("onnx-1.18.0/onnx/backend/test/data") else { return };
    let evaluator = Evaluator::new(MemoryPool::unbounded(), Vec::new());
    let (mut wrong, mut exact) = (Vec::new(), 0);
    for suite in ["node", "simple", "pytorch-converted", "pytorch-operator"] {
        for case in std::fs::read_dir(folder.join(suite)).unwrap() {
            let case = case.unwrap().path();
            let name = case.file_name().unwrap().to_string_lossy().into_owned();
            let file = ModelFile::open(case.join("model.onnx")).unwrap();
            let Ok(imported) = import(&file) else { continue };
            for set in std::fs::read_dir(&case).unwrap() {
                let set = set.unwrap().path();
                if !set.is_dir() {
                    continue;
                }
                let mut graph = imported.graph.clone();
                if let Err(e) = bind_and_fold(&mut graph, &tensors(&file, &set, "input"), &evaluator) {
                    wrong.push(format!("{name}: {e}"));
                    continue;
                }
                for (output, expected) in tensors(&file, &set, "output") {
                    let Some(&id) = graph.outputs.iter().find(|&&v| graph.value(v).name == output) else {
                        wrong.push(format!("{name}: the output {output:?} has lost its name"));
                        continue;
                    };
                    let ty = &graph.value(id).ty;
                    let expected = as_declared(expected, ty).tensor_type();
                    if *ty == ValueType::from(expected.clone()) {
                        exact += 1;
                    } else if !DATA_DEPENDENT.iter().any(|prefix| name.starts_with(prefix)) {
                        wrong.push(format!("{name}: {output}: {ty}, expected {expected}"));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong, {exact} exact:\n{}", wrong.len(), wrong.join("\n"));
    assert!(exact > 1_700, "{exact} results are exact");
}

/// Folds a model at batch 1 and checks that every shape is known and no shape arithmetic is left.
#[track_caller]
fn check_model(
    name: &str,
    inputs: &[(&str, DType, &[usize])],
    gigaflops: (f64, f64),
    parameters: (u64, u64),
) {
    let Some(folder) = folder("models") else { return };
    let path = folder.join(format!("{name}.onnx"));
    if !path.is_file() {
        eprintln!("skipped: {} is not there", path.display());
        return;
    }
    let file = ModelFile::open(&path).unwrap();
    let imported = import(&file).unwrap();
    let mut graph = imported.graph;
    for (input, dtype, dims) in inputs {
        let id = graph.find(input).unwrap_or_else(|| {
            let names: Vec<_> = graph.inputs.iter().map(|&v| &graph.value(v).name).collect();
            panic!("{name}: no input {input:?} among {names:?}")
        });
        graph.bind(&[(id, TensorType::fixed(*dtype, dims))]).unwrap();
    }
    let evaluator = Evaluator::new(MemoryPool::unbounded(), imported.sources);
    Fold::new(&evaluator).run(&mut graph).unwrap();
    DeadCode.run(&mut graph).unwrap();
    graph.verify().unwrap();
    for (_, node) in graph.iter_nodes() {
        assert!(!matches!(node.op, Op::Shape { .. } | Op::ConstantOfShape { .. }), "{} is left", node.name);
        for v in node.outputs.iter().flatten() {
            let ty = &graph.value(*v).ty;
            assert!(ty.tensor().is_some_and(|t| t.dims().is_some()), "{}: {ty}", node.name);
        }
    }
    let cost = graph_cost(&graph);
    let flops = cost.flops.0 / 1e9;
    assert!(!cost.is_lower_bound);
    assert!((gigaflops.0..gigaflops.1).contains(&flops), "{name}: {flops} GFLOP");
    assert!(
        (parameters.0..parameters.1).contains(&cost.parameters),
        "{name}: {} parameters",
        cost.parameters
    );
}

const PICTURE: &[usize] = &[1, 3, 224, 224];

#[test]
fn residual_networks_cost_what_their_paper_says() {
    // He et al., 2015, table 1: 1.8 and 3.8 billion multiply-adds (4.1 with the stride in the 3×3 convolutions).
    check_model("resnet-18", &[("input", DType::F32, PICTURE)], (3.5, 3.8), (11_600_000, 11_800_000));
    check_model("resnet-50", &[("input", DType::F32, PICTURE)], (7.6, 8.4), (25_400_000, 25_700_000));
}

#[test]
fn mobile_networks_cost_what_their_paper_says() {
    // Sandler et al., 2018, table 4: 300 million multiply-adds, 3.4 million parameters.
    check_model("mobilenet-v2", &[("input", DType::F32, PICTURE)], (0.58, 0.68), (3_400_000, 3_600_000));
}

#[test]
fn transformers_cost_what_their_paper_says() {
    // Touvron et al., 2021, table 1: 5 million parameters for DeiT-Ti; 1.3 billion multiply-adds at 224.
    check_model("vit-tiny", &[("input", DType::F32, PICTURE)], (2.0, 2.8), (5_500_000, 5_900_000));
}
