//! The ONNX files of the `onnx` package: every model and every test data file is read.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use lightering_formats::Error;
use lightering_formats::onnx::proto::{Message, TypeProto};
use lightering_formats::onnx::{ModelFile, export, import, read_value};
use lightering_graph::{Graph, Node, Op, UnaryOp, ValueId};

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

/// Whether two graphs do the same in the same order; names may differ, and identities do not count.
fn same(a: &Graph, b: &Graph) -> Result<(), String> {
    let steps = |g: &Graph| -> Vec<Node> {
        let nodes = g.iter_nodes().map(|(_, n)| n.clone());
        nodes.filter(|n| n.op != Op::Unary(UnaryOp::Identity)).collect()
    };
    // The value behind identities.
    let behind = |g: &Graph, mut id: ValueId| -> ValueId {
        while let Some(node) =
            g.producer(id).map(|n| g.node(n)).filter(|n| n.op == Op::Unary(UnaryOp::Identity))
        {
            id = node.input(0).unwrap();
        }
        id
    };
    let mut partner: HashMap<ValueId, ValueId> =
        a.inputs.iter().copied().zip(b.inputs.iter().copied()).collect();
    let (x_steps, y_steps) = (steps(a), steps(b));
    if a.inputs.len() != b.inputs.len() || x_steps.len() != y_steps.len() {
        return Err(format!("{} and {} nodes", x_steps.len(), y_steps.len()));
    }
    let same_value = |p: ValueId, q: ValueId, partner: &HashMap<ValueId, ValueId>| {
        let (p, q) = (behind(a, p), behind(b, q));
        match (a.value(p).tensor(), b.value(q).tensor()) {
            // Bytes, because NaN is not equal to itself.
            (Some(s), Some(t)) => {
                s.dims() == t.dims() && s.as_bytes() == t.as_bytes() && s.as_strings() == t.as_strings()
            }
            (None, None) => a.value(p).constant().is_some() || partner.get(&p) == Some(&q),
            _ => false,
        }
    };
    for (x, y) in x_steps.iter().zip(&y_steps) {
        let (mut x_op, mut y_op) = (x.op.clone(), y.op.clone());
        for (x_body, y_body) in x_op.bodies_mut().into_iter().zip(y_op.bodies_mut()) {
            same(x_body, y_body).map_err(|e| format!("{}: {e}", x.name))?;
            *x_body = Graph::default();
            *y_body = Graph::default();
        }
        // Printed, because NaN is not equal to itself. The leaves of trees are numbered anew.
        let is_forest = x_op.name().starts_with("TreeEnsemble") && x_op.name() == y_op.name();
        if !is_forest && format!("{x_op:?}") != format!("{y_op:?}") {
            return Err(format!("{x_op:?} became {y_op:?}"));
        }
        for i in 0..x.inputs.len().max(y.inputs.len()) {
            let equal = match (x.input(i), y.input(i)) {
                (Some(p), Some(q)) => same_value(p, q, &partner),
                (p, q) => p == q,
            };
            if !equal {
                return Err(format!("operand {i} of {} differs", x.name));
            }
        }
        for (p, q) in x.outputs.iter().zip(&y.outputs) {
            if let (Some(p), Some(q)) = (p, q) {
                partner.insert(*p, *q);
            }
        }
    }
    let outputs = a.outputs.iter().zip(&b.outputs).all(|(p, q)| same_value(*p, *q, &partner));
    if outputs && a.outputs.len() == b.outputs.len() { Ok(()) } else { Err("outputs differ".to_owned()) }
}

#[test]
fn every_graph_survives_export_and_import() {
    let Some(folder) = data_folder() else { return };
    let mut count = 0;
    for suite in ["node", "simple", "pytorch-converted", "pytorch-operator"] {
        for case in std::fs::read_dir(folder.join(suite)).unwrap() {
            let case = case.unwrap().path();
            let file = ModelFile::open(case.join("model.onnx")).unwrap();
            let Ok(first) = import(&file) else { continue };
            let model =
                export(&first.graph, &first.sources).unwrap_or_else(|e| panic!("{}: {e}", case.display()));
            let bytes = model.to_writer(None).unwrap().into_bytes().unwrap();
            let second = import(&ModelFile::from_bytes(bytes).unwrap())
                .unwrap_or_else(|e| panic!("{}: {e}", case.display()));
            if let Err(e) = same(&first.graph, &second.graph) {
                panic!("{}: {e}", case.display());
            }
            count += 1;
        }
    }
    assert!(count > 1500, "{count}");
}
