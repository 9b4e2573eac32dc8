//! The ONNX files of the `onnx` package: every model and every test data file is read.

use std::path::PathBuf;

use lightering_formats::onnx::{ModelFile, proto::TypeProto, read_value};

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

#[test]
fn every_case_is_read_and_written_back() {
    let Some(folder) = data_folder() else { return };
    let (mut models, mut values) = (0, 0);
    for suite in ["node", "simple", "pytorch-converted", "pytorch-operator"] {
        for case in std::fs::read_dir(folder.join(suite)).unwrap() {
            let case = case.unwrap().path();
            let file = ModelFile::open(case.join("model.onnx")).unwrap();
            models += 1;
            let mut again = Vec::new();
            file.write_to(&mut again).unwrap();
            let reread = ModelFile::from_bytes(again).unwrap();
            let graph = file.model.graph.as_ref().unwrap();
            assert_eq!(graph.node, reread.model.graph.as_ref().unwrap().node, "{}", case.display());
            for tensor in &graph.initializer {
                file.tensor(tensor).unwrap_or_else(|e| panic!("{}: {e}", case.display()));
            }
            for set in std::fs::read_dir(&case).unwrap() {
                let set = set.unwrap().path();
                if !set.is_dir() {
                    continue;
                }
                for (prefix, declared) in [("input", &graph.input), ("output", &graph.output)] {
                    for (index, info) in declared.iter().enumerate() {
                        let path = set.join(format!("{prefix}_{index}.pb"));
                        let Ok(bytes) = std::fs::read(&path) else { continue };
                        if let TypeProto::SparseTensor { .. } = info.value_type {
                            continue;
                        }
                        if let Err(e) = read_value(&bytes, &info.value_type) {
                            panic!("{}: {e}", path.display());
                        }
                        values += 1;
                    }
                }
            }
        }
    }
    assert!(models > 1500 && values > 4000, "{models} models, {values} values");
}

#[test]
fn every_model_is_imported() {
    use std::collections::BTreeMap;

    use lightering_formats::{Error, onnx::import};
    let Some(folder) = data_folder() else { return };
    let mut refused: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let (mut imported, mut all) = (0, 0);
    for suite in ["node", "simple", "pytorch-converted", "pytorch-operator", "light"] {
        for case in std::fs::read_dir(folder.join(suite)).unwrap() {
            let case = case.unwrap().path();
            let path = if case.is_dir() { case.join("model.onnx") } else { case };
            if path.extension().is_none_or(|e| e != "onnx") {
                continue;
            }
            all += 1;
            let file = ModelFile::open(&path).unwrap();
            match import(&file) {
                Ok(_) => imported += 1,
                Err(Error::Unsupported { what, .. }) => {
                    refused.entry(what).or_default().push(path.display().to_string());
                }
                Err(e) => panic!("{}: {e}", path.display()),
            }
        }
    }
    for (what, paths) in &refused {
        eprintln!("{} x {what}: {}", paths.len(), paths[0]);
    }
    let expected = |what: &str| what.contains("preview.training");
    let surprising: Vec<_> = refused.keys().filter(|what| !expected(what)).collect();
    eprintln!("{imported} of {all} imported");
    assert!(surprising.is_empty(), "{surprising:?}");
    assert!(imported + 9 == all, "{imported} of {all}");
}
