//! Inferred types agree with the results that the ONNX backend cases expect.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lightering_formats::HostValue;
use lightering_formats::onnx::{ModelFile, import, read_value};
use lightering_graph::{DType, Graph, Tensor, ValueType};

fn data_folder() -> Option<PathBuf> {
    let root = std::env::var_os("LIGHTER_TEST_DATA").map(PathBuf::from).or_else(|| {
        std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/lighter-test-data"))
    })?;
    let folder = root.join("onnx-1.18.0/onnx/backend/test/data");
    if folder.is_dir() {
        return Some(folder);
    }
    eprintln!("skipped: {} is not there (set LIGHTER_TEST_DATA)", folder.display());
    None
}

/// Cases whose shapes depend on the data, or on arithmetic that only evaluation resolves.
const OPEN: [&str; 16] = [
    "test_compress_",
    "test_image_decoder_",
    "test_loop11",
    "test_nonmaxsuppression_",
    "test_nonzero_",
    "test_sequence_model",
    "test_string_split_",
    "test_strnorm_",
    "test_strnormalizer_",
    "test_unique_",
    // The size of these is computed in floating point, or by a loop.
    "test_affine_grid_2d_",
    "test_affine_grid_3d_",
    "test_blackmanwindow_",
    "test_hammingwindow_",
    "test_hannwindow_",
    "test_range_",
];

/// The values of `prefix_0.pb`, … of a case, by declared name.
fn values(file: &ModelFile, set: &Path, prefix: &str) -> Vec<(String, HostValue)> {
    let graph = file.model.graph.as_ref().unwrap();
    let declared = if prefix == "input" { &graph.input } else { &graph.output };
    let mut found = Vec::new();
    for (index, info) in declared.iter().enumerate() {
        let Ok(bytes) = std::fs::read(set.join(format!("{prefix}_{index}.pb"))) else { continue };
        if let Ok(value) = read_value(&bytes, &info.value_type) {
            found.push((info.name.clone(), value));
        }
    }
    found
}

/// The package writes bf16 test data as the u16 of its bits.
fn as_declared(tensor: &Tensor, declared: &ValueType) -> Tensor {
    match declared.tensor() {
        Some(t) if t.dtype == DType::BF16 && tensor.dtype() == DType::U16 => {
            tensor.clone().into_dtype(DType::BF16)
        }
        _ => tensor.clone(),
    }
}

/// What is left open, or an error when the type is not that of the value.
fn compare(inferred: &ValueType, value: &HostValue) -> Result<bool, String> {
    match (inferred, value) {
        (ValueType::Tensor(t), HostValue::Tensor(found)) => {
            let found = as_declared(found, inferred);
            let fits = t.dtype == found.dtype()
                && t.shape.as_ref().is_none_or(|s| {
                    s.len() == found.dims().len()
                        && s.iter().zip(found.dims()).all(|(d, n)| d.fixed().is_none_or(|m| m == *n))
                });
            match fits {
                true => Ok(t.dims().is_some()),
                false => Err(format!("inferred {t}, expected {}", found.tensor_type())),
            }
        }
        (ValueType::Sequence(element), HostValue::Sequence(items)) => {
            items.iter().try_for_each(|item| compare(element, item).map(|_| ()))?;
            Ok(true)
        }
        (ValueType::Optional(inner), HostValue::Optional(Some(item))) => compare(inner, item),
        (ValueType::Optional(_), HostValue::Optional(None)) => Ok(true),
        (ValueType::Map { .. }, _) => Ok(true),
        (ValueType::Unknown, _) => Ok(false),
        (inferred, _) => Err(format!("inferred {inferred}, which is of another kind than expected")),
    }
}

/// Binds the inputs of a case: the types of all, and the elements of those that decide shapes.
fn bind(graph: &mut Graph, inputs: &[(String, HostValue)]) -> Result<(), String> {
    for pass in 0..2 {
        let controlling = graph.shape_controlling_inputs();
        for (name, value) in inputs {
            let Some(id) = graph.inputs.iter().copied().find(|&v| graph.value(v).name == *name) else {
                continue;
            };
            let HostValue::Tensor(tensor) = value else { continue };
            let tensor = as_declared(tensor, &graph.value(id).ty);
            match pass {
                0 => graph.bind(&[(id, tensor.tensor_type())]).map_err(|e| e.to_string())?,
                _ if controlling.contains(&id) => {
                    graph.bind_value(id, tensor).map_err(|e| e.to_string())?;
                }
                _ => {}
            }
        }
        graph.infer().map_err(|e| e.to_string())?;
    }
    Ok(())
}

#[test]
fn every_case_has_the_expected_types() {
    let Some(folder) = data_folder() else { return };
    let mut wrong: Vec<String> = Vec::new();
    let mut open: BTreeMap<String, usize> = BTreeMap::new();
    let (mut exact, mut cases) = (0, 0);
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
                cases += 1;
                let mut graph = imported.graph.clone();
                if let Err(e) = bind(&mut graph, &values(&file, &set, "input")) {
                    wrong.push(format!("{name}: {e}"));
                    continue;
                }
                let expected = values(&file, &set, "output");
                let mut all = true;
                for (output, value) in &expected {
                    let Some(id) = graph.outputs.iter().find(|&&v| graph.value(v).name == *output) else {
                        wrong.push(format!("{name}: no output {output:?}"));
                        continue;
                    };
                    match compare(&graph.value(*id).ty, value) {
                        Ok(known) => all &= known,
                        Err(e) => wrong.push(format!("{name}: {output}: {e}")),
                    }
                }
                if all {
                    exact += 1;
                } else {
                    *open.entry(name.clone()).or_default() += 1;
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {cases} cases:\n{}", wrong.len(), wrong.join("\n"));
    open.retain(|name, _| !OPEN.iter().any(|prefix| name.starts_with(prefix)));
    assert!(open.is_empty(), "left open: {:#?}", open.keys());
    // The folder has 1,581 sets of data; none of them may slip through the list above in numbers.
    assert!(exact >= 1_500, "{exact} of {cases} are exact");
}
