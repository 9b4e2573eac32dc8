use lightering_graph::{BinaryOp, Op, UnaryOp, ValueKind};

use super::*;
use crate::onnx::proto::{
    AttributeProto, Message, ModelProto, Payload, StringStringEntry, TensorData, ValueInfoProto,
};

fn node(op_type: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    NodeProto {
        op_type: op_type.into(),
        input: inputs.iter().map(|s| (*s).into()).collect(),
        output: outputs.iter().map(|s| (*s).into()).collect(),
        ..Default::default()
    }
}

fn with(mut node: NodeProto, name: &str, value: AttributeValue) -> NodeProto {
    node.attribute.push(AttributeProto { name: name.into(), value, ..Default::default() });
    node
}

fn value(name: &str, dims: &[i64]) -> ValueInfoProto {
    let shape = Some(dims.iter().map(|d| Dimension::Value(*d)).collect());
    ValueInfoProto {
        name: name.into(),
        value_type: TypeProto::Tensor { elem_type: 1, shape },
        ..Default::default()
    }
}

fn graph(nodes: Vec<NodeProto>, inputs: &[&str], outputs: &[&str]) -> GraphProto {
    GraphProto {
        name: "g".into(),
        node: nodes,
        input: inputs.iter().map(|n| value(n, &[2, 3])).collect(),
        output: outputs.iter().map(|n| value(n, &[])).collect(),
        ..Default::default()
    }
}

fn floats(name: &str, values: &[f32]) -> TensorProto {
    TensorProto {
        dims: vec![values.len() as i64],
        data_type: 1,
        name: name.into(),
        data: TensorData::Raw(Payload::Inline(values.iter().flat_map(|v| v.to_le_bytes()).collect())),
        ..Default::default()
    }
}

fn model(opset: i64, graph: GraphProto) -> ModelProto {
    ModelProto {
        ir_version: 8,
        opset_import: vec![
            OperatorSetId { domain: String::new(), version: opset },
            OperatorSetId { domain: "com.microsoft".into(), version: 1 },
            OperatorSetId { domain: "ai.onnx.ml".into(), version: 3 },
        ],
        graph: Some(graph),
        ..Default::default()
    }
}

fn imported(model: &ModelProto) -> Result<Imported> {
    let bytes = model.to_writer(None).unwrap().into_bytes().unwrap();
    import(&ModelFile::from_bytes(bytes).unwrap())
}

fn ops(graph: &Graph) -> Vec<&'static str> {
    graph.iter_nodes().map(|(_, n)| n.op.name()).collect()
}

fn check_error(model: &ModelProto, parts: &[&str]) {
    let error = imported(model).unwrap_err().to_string();
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in {error:?}");
    }
}

#[test]
fn attributes_that_became_inputs() {
    let squeeze = with(node("Unsqueeze", &["x"], &["y"]), "axes", AttributeValue::Ints(vec![0]));
    let out = imported(&model(11, graph(vec![squeeze.clone()], &["x"], &["y"]))).unwrap().graph;
    let (_, n) = out.iter_nodes().next().unwrap();
    assert_eq!(out.value(n.input(1).unwrap()).tensor().unwrap().to_i64s(), Some(vec![0]));
    // Since version 13 the attribute does not exist.
    check_error(&model(13, graph(vec![squeeze], &["x"], &["y"])), &["Unsqueeze", "input 1 is missing"]);

    let clip = with(node("Clip", &["x"], &["y"]), "max", AttributeValue::Float(6.0));
    let out = imported(&model(7, graph(vec![clip], &["x"], &["y"]))).unwrap().graph;
    let (_, n) = out.iter_nodes().next().unwrap();
    assert_eq!(n.op, Op::Unary(UnaryOp::ClipTo { min: f32::MIN, max: 6.0 }));
}

#[test]
fn softmax_before_13_flattens() {
    let softmax = |axis| with(node("Softmax", &["x"], &["y"]), "axis", AttributeValue::Int(axis));
    let out = imported(&model(11, graph(vec![softmax(0)], &["x"], &["y"]))).unwrap().graph;
    assert_eq!(ops(&out), ["Shape", "Flatten", "Softmax", "Reshape"]);
    let out = imported(&model(11, graph(vec![softmax(1)], &["x"], &["y"]))).unwrap().graph;
    assert_eq!(ops(&out), ["Softmax"]);
}

#[test]
fn messages_name_the_node_and_what_was_expected() {
    let mut relu = node("Relu", &["x"], &["y"]);
    relu.name = "act".into();
    let unknown = with(relu.clone(), "alpha", AttributeValue::Float(1.0));
    check_error(&model(13, graph(vec![unknown], &["x"], &["y"])), &["act", "Relu", "alpha"]);
    let wrong = with(node("Flatten", &["x"], &["y"]), "axis", AttributeValue::Float(1.0));
    check_error(&model(13, graph(vec![wrong], &["x"], &["y"])), &["Flatten", "axis", "float", "int"]);
    check_error(&model(13, graph(vec![node("Add", &["x"], &["y"])], &["x"], &["y"])), &["Add", "input 1"]);
    check_error(&model(13, graph(vec![node("Relu", &["q"], &["y"])], &["x"], &["y"])), &["Relu", "\"q\""]);
    check_error(
        &model(13, graph(vec![node("Fly", &["x"], &["y"])], &["x"], &["y"])),
        &["Fly", "not supported"],
    );
    check_error(&model(13, graph(vec![relu.clone()], &["x"], &["z"])), &["output \"z\""]);
    check_error(&model(13, graph(vec![relu.clone(), relu.clone()], &["x"], &["y"])), &["\"y\"", "also made"]);
    check_error(&model(99, graph(vec![relu.clone()], &["x"], &["y"])), &["99", "not supported"]);
    check_error(&model(13, graph(vec![relu.clone()], &["x", "x"], &["y"])), &["input \"x\"", "twice"]);
    let mut twice = graph(vec![relu.clone()], &["x"], &["y"]);
    twice.initializer = vec![floats("w", &[1.0]), floats("w", &[1.0])];
    check_error(&model(13, twice), &["initializer \"w\"", "twice"]);
    let mut no_graph = model(13, GraphProto::default());
    no_graph.graph = None;
    check_error(&no_graph, &["no graph"]);
    let mut undeclared = model(13, graph(vec![relu.clone()], &["x"], &["y"]));
    undeclared.opset_import.remove(0);
    check_error(&undeclared, &["act", "operator sets"]);
    relu.domain = "nowhere".into();
    check_error(&model(13, graph(vec![relu], &["x"], &["y"])), &["nowhere"]);
}

#[test]
fn nodes_out_of_order_are_sorted_and_cycles_are_found() {
    let nodes = vec![node("Exp", &["a"], &["y"]), node("Relu", &["x"], &["a"])];
    let out = imported(&model(13, graph(nodes, &["x"], &["y"]))).unwrap().graph;
    assert_eq!(ops(&out), ["Relu", "Exp"]);
    let nodes = vec![node("Add", &["x", "b"], &["a"]), node("Relu", &["a"], &["b"])];
    check_error(&model(13, graph(nodes, &["x"], &["b"])), &["Add", "own result"]);
}

#[test]
fn bodies_get_their_captures_as_inputs_and_constants_as_constants() {
    let branch = |op: &str| {
        let nodes = vec![node(op, &["x", "w"], &["t"])];
        AttributeValue::Graph(Box::new(graph(nodes, &[], &["t"])))
    };
    let choice =
        with(with(node("If", &["c"], &["y"]), "then_branch", branch("Add")), "else_branch", branch("Mul"));
    let mut g = graph(vec![choice], &["x"], &["y"]);
    g.input.push(ValueInfoProto {
        name: "c".into(),
        value_type: TypeProto::Tensor { elem_type: 9, shape: Some(vec![]) },
        ..Default::default()
    });
    g.initializer.push(floats("w", &[1.0, 2.0, 3.0]));
    let out = imported(&model(13, g.clone())).unwrap().graph;
    let (_, n) = out.iter_nodes().next().unwrap();
    assert_eq!(n.inputs.len(), 2, "the condition and x");
    for body in n.op.bodies() {
        assert_eq!(body.inputs.len(), 1);
        let (_, inner) = body.iter_nodes().next().unwrap();
        let w = body.value(inner.input(1).unwrap());
        assert!(matches!(w.kind, ValueKind::Constant(_)), "{w:?}");
    }
    g.initializer.clear();
    check_error(&model(13, g), &["If", "\"w\"", "nothing makes"]);
}

fn function(name: &str, nodes: Vec<NodeProto>) -> FunctionProto {
    FunctionProto {
        name: name.into(),
        domain: "local".into(),
        input: vec!["a".into()],
        output: vec!["b".into()],
        attribute: vec!["slope".into()],
        node: nodes,
        opset_import: vec![
            OperatorSetId { domain: String::new(), version: 13 },
            OperatorSetId { domain: "local".into(), version: 1 },
        ],
        ..Default::default()
    }
}

fn call(name: &str, input: &str, output: &str) -> NodeProto {
    NodeProto { domain: "local".into(), ..node(name, &[input], &[output]) }
}

#[test]
fn functions_are_put_in_place_of_their_calls() {
    let mut leaky = node("LeakyRelu", &["a"], &["t"]);
    leaky.attribute.push(AttributeProto {
        name: "alpha".into(),
        ref_attr_name: "slope".into(),
        value: AttributeValue::Undefined,
    });
    let f = function("F", vec![leaky, node("Exp", &["t"], &["b"])]);
    let first = with(call("F", "x", "t"), "slope", AttributeValue::Float(0.5));
    let mut m = model(13, graph(vec![first, call("F", "t", "y")], &["x"], &["y"]));
    m.functions.push(f);
    let out = imported(&m).unwrap().graph;
    let steps: Vec<_> = out.iter_nodes().map(|(_, n)| n.op.clone()).collect();
    assert_eq!(steps[0], Op::Unary(UnaryOp::LeakyRelu { alpha: 0.5 }));
    assert_eq!(steps[2], Op::Unary(UnaryOp::LeakyRelu { alpha: 0.01 }), "the operator's own default");
    assert_eq!(out.value(out.outputs[0]).name, "y");
    let bad = with(call("F", "x", "y"), "other", AttributeValue::Float(0.5));
    m.graph = Some(graph(vec![bad], &["x"], &["y"]));
    check_error(&m, &["other", "an attribute that the function has"]);
}

#[test]
fn endless_and_explosive_functions_meet_a_limit() {
    let mut m = model(13, graph(vec![call("F", "x", "y")], &["x"], &["y"]));
    m.functions.push(function("F", vec![call("F", "a", "b")]));
    check_error(&m, &["nesting"]);
    // Each function calls the next one eight times: 8^12 nodes.
    m.functions.clear();
    for level in 0..12 {
        let name = if level == 0 { "F".to_owned() } else { format!("F{level}") };
        let next = format!("F{}", level + 1);
        let mut nodes = Vec::new();
        for i in 0..8 {
            let input = if i == 0 { "a".to_owned() } else { format!("t{i}") };
            let output = if i == 7 { "b".to_owned() } else { format!("t{}", i + 1) };
            nodes.push(if level == 11 {
                node("Relu", &[&input], &[&output])
            } else {
                call(&next, &input, &output)
            });
        }
        m.functions.push(function(&name, nodes));
    }
    let bytes = m.to_writer(None).unwrap().into_bytes().unwrap();
    let error = import_limited(&ModelFile::from_bytes(bytes).unwrap(), 10_000).unwrap_err();
    assert!(error.to_string().contains("number of nodes"), "{error}");
}

#[test]
fn weights_stay_in_the_file() {
    let mut g = graph(vec![node("Add", &["x", "w"], &["y"])], &["x"], &["y"]);
    g.initializer.push(floats("w", &[1.5; 3000]));
    let out = imported(&model(13, g)).unwrap();
    let (_, n) = out.graph.iter_nodes().next().unwrap();
    let Some(Constant::Stored(stored)) = out.graph.value(n.input(1).unwrap()).constant() else { panic!() };
    let mut bytes = [0; 4];
    out.sources[stored.source.0 as usize].read_at(stored.offset + 4, &mut bytes).unwrap();
    assert_eq!((f32::from_le_bytes(bytes), stored.size.0), (1.5, 12_000));
    assert_eq!(out.graph.sources.len(), out.sources.len());
}

#[test]
fn old_broadcasting_becomes_explicit() {
    let add = |axis| {
        let n = with(node("Add", &["x", "w"], &["y"]), "broadcast", AttributeValue::Int(1));
        with(n, "axis", AttributeValue::Int(axis))
    };
    let mut g = graph(vec![add(0)], &["x"], &["y"]);
    g.initializer.push(floats("w", &[1.0, 2.0]));
    let out = imported(&model(6, g.clone())).unwrap().graph;
    assert_eq!(ops(&out), ["Unsqueeze", "Add"]);
    g.node = vec![add(1)];
    let out = imported(&model(6, g.clone())).unwrap().graph;
    assert_eq!(ops(&out), ["Add"]);
    g.node = vec![add(2)];
    check_error(&model(6, g), &["Add", "axis 2"]);
}

#[test]
fn operators_of_onnxruntime() {
    let ms =
        |op: &str, inputs: &[&str]| NodeProto { domain: "com.microsoft".into(), ..node(op, inputs, &["y"]) };
    let run = |n: NodeProto| {
        let mut g = graph(vec![n], &["x"], &["y"]);
        g.initializer.push(floats("w", &[1.0, 2.0, 3.0]));
        imported(&model(13, g)).unwrap().graph
    };
    assert_eq!(ops(&run(ms("SkipLayerNormalization", &["x", "x", "w"]))), ["Add", "LayerNorm"]);
    assert_eq!(ops(&run(ms("BiasGelu", &["x", "w"]))), ["Add", "Gelu"]);
    assert_eq!(ops(&run(ms("QuickGelu", &["x"]))), ["Swish"]);
    let product = with(ms("FusedMatMul", &["x", "x"]), "transB", AttributeValue::Int(1));
    let out = run(product);
    let (_, n) = out.iter_nodes().next().unwrap();
    assert!(matches!(&n.op, Op::MatMul(a) if a.trans_b && !a.trans_a));
}

#[test]
fn a_forest_must_be_made_of_trees() {
    let tree = |true_id: i64| {
        let mut n = node("TreeEnsembleRegressor", &["x"], &["y"]);
        n.domain = "ai.onnx.ml".into();
        let ints = |v: &[i64]| AttributeValue::Ints(v.to_vec());
        for (name, value) in [
            ("nodes_treeids", ints(&[0, 0, 0])),
            ("nodes_nodeids", ints(&[0, 1, 2])),
            ("nodes_featureids", ints(&[0, 0, 0])),
            ("nodes_truenodeids", ints(&[true_id, 0, 0])),
            ("nodes_falsenodeids", ints(&[2, 0, 0])),
            ("nodes_values", AttributeValue::Floats(vec![0.5, 0.0, 0.0])),
            (
                "nodes_modes",
                AttributeValue::Strings(vec![b"BRANCH_LEQ".to_vec(), b"LEAF".to_vec(), b"LEAF".to_vec()]),
            ),
            ("target_treeids", ints(&[0, 0])),
            ("target_nodeids", ints(&[1, 2])),
            ("target_ids", ints(&[0, 0])),
            ("target_weights", AttributeValue::Floats(vec![1.0, 2.0])),
        ] {
            n = with(n, name, value);
        }
        model(13, graph(vec![n], &["x"], &["y"]))
    };
    imported(&tree(1)).unwrap();
    // A branch whose child is itself would be walked for ever.
    check_error(&tree(0), &["TreeEnsembleRegressor"]);
    check_error(&tree(7), &["child 7"]);
}

#[test]
fn sparse_constants_become_dense() {
    let sparse = SparseTensorProto {
        values: floats("s", &[5.0, 7.0]),
        indices: TensorProto {
            dims: vec![2],
            data_type: 7,
            data: TensorData::Raw(Payload::Inline([1i64, 4].map(i64::to_le_bytes).concat())),
            ..Default::default()
        },
        dims: vec![2, 3],
    };
    let mut g = graph(vec![node("Add", &["x", "s"], &["y"])], &["x"], &["y"]);
    g.sparse_initializer.push(sparse.clone());
    let out = imported(&model(13, g.clone())).unwrap().graph;
    let s = out.find("s").unwrap();
    assert_eq!(out.value(s).tensor().unwrap().as_slice::<f32>(), [0.0, 5.0, 0.0, 0.0, 7.0, 0.0]);
    g.sparse_initializer[0].dims = vec![2, 2];
    check_error(&model(13, g), &["sparse tensor \"s\"", "index"]);
}

#[test]
fn metadata_is_no_obstacle() {
    let mut m = model(13, graph(vec![node("Add", &["x", "x"], &["y"])], &["x"], &["y"]));
    m.metadata_props.push(StringStringEntry { key: "k".into(), value: "v".into() });
    let out = imported(&m).unwrap().graph;
    let (_, n) = out.iter_nodes().next().unwrap();
    assert_eq!(n.op, Op::Binary(BinaryOp::Add));
}
