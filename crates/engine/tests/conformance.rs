//! The cases that the Python package `onnx` ships for its operators, on the interpreter.
//!
//! They are looked for under `$LIGHTER_TEST_DATA` (default `~/.cache/lighter-test-data`); `tools/fetch_test_data.sh`
//! puts them there. `LIGHTER_CONFORMANCE=text` runs only the cases whose names contain the text and prints what is
//! wrong with each.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use lightering_engine::RuntimeValue;
use lightering_engine::conformance::{Outcome, Tolerance, run_case};
use lightering_engine::ops::{ImageDecoder, OpError};
use lightering_formats::HostValue;
use lightering_formats::image::Picture;
use lightering_formats::onnx::proto::TypeProto;
use lightering_formats::onnx::{ModelFile, dtype_from_onnx, import, read_value};
use lightering_graph::{DType, PixelFormat, Tensor, TensorType, ValueType};
use lightering_kernels::ThreadPool;
use lightering_meter::MemoryPool;
use lightering_tier::FileSource;

/// Decodes with the pictures crate of the formats.
struct Pictures;

impl ImageDecoder for Pictures {
    fn decode(&self, file: &[u8], format: PixelFormat, _: &MemoryPool) -> Result<Tensor, OpError> {
        let picture = Picture::decode(file).map_err(|e| match e {
            lightering_formats::Error::Unsupported { .. } => OpError::Unsupported(e.to_string()),
            other => OpError::Invalid(other.to_string()),
        })?;
        let (height, width) = (picture.height() as usize, picture.width() as usize);
        let rgb = picture.rgb();
        Ok(match format {
            PixelFormat::Rgb => Tensor::from_slice(&[height, width, 3], rgb),
            PixelFormat::Bgr => {
                let bgr: Vec<u8> = rgb.chunks(3).flat_map(|p| [p[2], p[1], p[0]]).collect();
                Tensor::from_slice(&[height, width, 3], &bgr)
            }
            PixelFormat::Gray => {
                // ITU-R BT.601, as Pillow computes it.
                let luma = |p: &[u8]| {
                    let sum = u32::from(p[0]) * 19595 + u32::from(p[1]) * 38470 + u32::from(p[2]) * 7471;
                    ((sum + 0x8000) >> 16) as u8
                };
                let gray: Vec<u8> = rgb.chunks(3).map(luma).collect();
                Tensor::from_slice(&[height, width, 1], &gray)
            }
        })
    }
}

fn cases(suite: &str) -> Option<Vec<PathBuf>> {
    let root = std::env::var_os("LIGHTER_TEST_DATA").map(PathBuf::from).or_else(|| {
        std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/lighter-test-data"))
    })?;
    let folder = root.join("onnx-1.18.0/onnx/backend/test/data").join(suite);
    let mut cases: Vec<PathBuf> = std::fs::read_dir(folder)
        .ok()?
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.join("model.onnx").exists())
        .collect();
    cases.sort();
    Some(cases)
}

/// A value from a file; `ty` is the type that the model declares, which a sequence without items needs.
fn runtime(value: HostValue, ty: Option<&ValueType>) -> RuntimeValue {
    let unknown = ValueType::Tensor(TensorType::unranked(DType::F32));
    match value {
        HostValue::Tensor(t) => t.into(),
        HostValue::Sequence(items) => {
            let element = match ty {
                Some(ValueType::Sequence(e)) => (**e).clone(),
                Some(ValueType::Optional(o)) => match &**o {
                    ValueType::Sequence(e) => (**e).clone(),
                    _ => unknown,
                },
                _ => unknown,
            };
            let items = items.into_iter().map(|i| runtime(i, Some(&element))).collect();
            RuntimeValue::Sequence(element, items)
        }
        HostValue::Optional(content) => {
            let inner = match ty {
                Some(ValueType::Optional(o)) => (**o).clone(),
                _ => unknown,
            };
            let content = content.map(|c| Box::new(runtime(*c, Some(&inner))));
            RuntimeValue::Optional(inner, content)
        }
        HostValue::Map(keys, values) => {
            let tensors: Vec<Tensor> = values
                .into_iter()
                .map(|v| match v {
                    HostValue::Tensor(t) => t,
                    other => panic!("a map to {other:?}"),
                })
                .collect();
            let dtype = tensors.first().map_or(DType::F32, Tensor::dtype);
            let bytes: Vec<u8> = tensors.iter().flat_map(|t| t.as_bytes().to_vec()).collect();
            let values = Tensor::from_bytes(dtype, &[tensors.len()], &bytes).expect("scalars of one type");
            RuntimeValue::Map(keys, values)
        }
    }
}

fn run(folder: &Path, threads: &ThreadPool) -> Outcome {
    let file = match ModelFile::open(folder.join("model.onnx")) {
        Ok(file) => file,
        Err(e) => return Outcome::Failed(format!("reading: {e}")),
    };
    let imported = match import(&file) {
        Ok(imported) => imported,
        Err(e) => return Outcome::Unsupported(format!("import: {e}")),
    };
    let proto = file.model.graph.as_ref().expect("it was imported");
    let initializers: Vec<&str> = proto.initializer.iter().map(|t| t.name.as_str()).collect();
    let graph = &imported.graph;
    for set in 0.. {
        let folder = folder.join(format!("test_data_set_{set}"));
        if !folder.exists() {
            break;
        }
        let read = |name: String,
                    declared: &TypeProto,
                    ty: Option<&ValueType>|
         -> Result<Option<RuntimeValue>, String> {
            let path = folder.join(name);
            if !path.exists() {
                return Ok(None);
            }
            let source = FileSource::open(&path).map_err(|e| e.to_string())?;
            let value = match (read_value(&source, declared).map_err(|e| e.to_string())?, declared) {
                // The files of bfloat16 cases hold their bits as 16-bit integers.
                (HostValue::Tensor(t), TypeProto::Tensor { elem_type, .. })
                    if t.dtype() == DType::U16 && dtype_from_onnx(*elem_type) == Some(DType::BF16) =>
                {
                    HostValue::Tensor(t.into_dtype(DType::BF16))
                }
                (value, _) => value,
            };
            Ok(Some(runtime(value, ty)))
        };
        let mut inputs = vec![None; graph.inputs.len()];
        let declared = proto.input.iter().filter(|i| !initializers.contains(&i.name.as_str()));
        for (i, info) in declared.enumerate() {
            let Some(slot) = graph.inputs.iter().position(|&v| graph.value(v).name == info.name) else {
                continue;
            };
            let ty = &graph.value(graph.inputs[slot]).ty;
            match read(format!("input_{i}.pb"), &info.value_type, Some(ty)) {
                Ok(value) => inputs[slot] = value,
                Err(e) => return Outcome::Unsupported(format!("input {i}: {e}")),
            }
        }
        let mut expected = Vec::new();
        for (i, info) in proto.output.iter().enumerate() {
            match read(format!("output_{i}.pb"), &info.value_type, None) {
                Ok(Some(value)) => expected.push(value),
                Ok(None) => return Outcome::Failed(format!("output {i} has no file")),
                Err(e) => return Outcome::Unsupported(format!("output {i}: {e}")),
            }
        }
        match run_case(graph, &imported.sources, inputs, &expected, Tolerance::ONNX, threads, Some(&Pictures))
        {
            Outcome::Passed => {}
            other => return other,
        }
    }
    Outcome::Passed
}

/// Runs a suite; returns how many cases there are and what went wrong, by case.
fn run_suite(suite: &str) -> Option<(usize, Vec<(String, Outcome)>)> {
    let filter = std::env::var("LIGHTER_CONFORMANCE").unwrap_or_default();
    let threads = ThreadPool::new(2);
    let mut wrong = Vec::new();
    let mut count = 0;
    for folder in cases(suite)? {
        let name = folder.file_name().expect("a case has a name").to_string_lossy().into_owned();
        if !name.contains(&filter) {
            continue;
        }
        count += 1;
        let outcome = catch_unwind(AssertUnwindSafe(|| run(&folder, &threads))).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            Outcome::Failed(format!("PANIC {}", text.unwrap_or_default()))
        });
        if outcome != Outcome::Passed {
            eprintln!("{suite} {name}: {outcome:?}");
            wrong.push((name, outcome));
        }
    }
    eprintln!("{suite}: {} of {count} passed", count - wrong.len());
    Some((count, wrong))
}

fn check(suite: &str, passed_min: usize) {
    let Some((count, wrong)) = run_suite(suite) else {
        eprintln!("skipped: the ONNX cases are not there, run tools/fetch_test_data.sh");
        return;
    };
    if std::env::var_os("LIGHTER_CONFORMANCE").is_none() {
        assert!(
            count - wrong.len() >= passed_min,
            "{} of {count} passed, expected {passed_min}",
            count - wrong.len()
        );
    }
    let panics: Vec<_> = wrong
        .iter()
        .filter(|(_, o)| matches!(o, Outcome::Failed(m) if m.starts_with("PANIC")))
        .map(|(name, _)| name)
        .collect();
    assert!(panics.is_empty(), "these cases panic: {panics:?}");
}

#[test]
fn node_cases_pass() {
    check("node", 1391);
}

#[test]
fn simple_cases_pass() {
    check("simple", 21);
}

#[test]
fn pytorch_operator_cases_pass() {
    check("pytorch-operator", 35);
}

#[test]
fn pytorch_converted_cases_pass() {
    check("pytorch-converted", 82);
}
