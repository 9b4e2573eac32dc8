use lightering_engine::{RuntimeValue, interpret};
use lightering_graph::{TensorType, ValueType};
use lightering_kernels::ThreadPool;
use lightering_meter::MemoryPool;

use super::*;

/// A graph of inputs of the given tensors' types, the last one the label.
fn inputs(tensors: &[Tensor]) -> (Graph, Vec<ValueId>) {
    let mut graph = Graph::new("loss");
    let ids =
        tensors.iter().enumerate().map(|(i, t)| graph.add_input(format!("x{i}"), t.tensor_type())).collect();
    (graph, ids)
}

fn value(loss: &str, tensors: &[Tensor]) -> f32 {
    let parsed: Loss = loss.parse().unwrap();
    assert_eq!(parsed.to_string().parse::<Loss>().unwrap(), parsed);
    let (mut graph, ids) = inputs(tensors);
    let (label, outputs) = ids.split_last().unwrap();
    let scalar = parsed.append(&mut graph, outputs, *label).unwrap();
    graph.outputs.push(scalar);
    graph.verify().unwrap();
    let given: Vec<(ValueId, RuntimeValue)> =
        ids.iter().zip(tensors).map(|(&id, t)| (id, RuntimeValue::Tensor(t.clone()))).collect();
    let result = interpret(&graph, &given, &[], &MemoryPool::unbounded(), &ThreadPool::new(1)).unwrap();
    let result = result[0].tensor().unwrap().clone();
    assert_eq!(result.dims(), [0usize; 0]);
    result.as_slice::<f32>()[0]
}

fn check(loss: &str, tensors: &[Tensor], expected: f32) {
    let value = value(loss, tensors);
    assert!((value - expected).abs() < 2e-5, "{loss}: {value}, expected {expected}");
}

fn t(dims: &[usize], values: &[f32]) -> Tensor {
    Tensor::from_slice(dims, values)
}

// The expected numbers are computed by hand or as in the comment beside them.

#[test]
fn differences() {
    let (x, y) = (t(&[2, 2], &[1.0, 2.0, 3.0, -4.0]), t(&[2, 2], &[1.5, 2.0, 1.0, -1.0]));
    check("mse", &[x.clone(), y.clone()], (0.25 + 0.0 + 4.0 + 9.0) / 4.0);
    check("l1", &[x.clone(), y.clone()], (0.5 + 0.0 + 2.0 + 3.0) / 4.0);
    check("huber:delta=2.5", &[x, y], (0.125 + 0.0 + 2.0 + 2.5 * (3.0 - 1.25)) / 4.0);
    check("mse", &[t(&[3, 1], &[1.0, 2.0, 3.0]), t(&[3], &[1.0, 2.0, 5.0])], 4.0 / 3.0);
    check("mse", &[t(&[2, 1], &[1.0, 2.0]), Tensor::from_slice(&[2], &[0i64, 2])], 0.5);
}

#[test]
fn classes() {
    let ln = |p: f32| -p.ln();
    // Logits ln 1, ln 3 have probabilities 1/4, 3/4.
    let logits = t(&[2, 2], &[0.0, 3f32.ln(), 3f32.ln(), 0.0]);
    let labels = Tensor::from_slice(&[2], &[1i64, 1]);
    let focal = (0.25f32.powi(2) * ln(0.75) + 0.75f32.powi(2) * ln(0.25)) / 2.0;
    check("focal:gamma=2", &[logits.clone(), labels.clone()], focal);
    check("focal:gamma=0", &[logits.clone(), labels], (ln(0.75) + ln(0.25)) / 2.0);
    check("focal:gamma=0", &[logits.clone(), t(&[2, 2], &[1.0, 0.0, 0.5, 0.5])], {
        (ln(0.25) + 0.5 * (ln(0.75) + ln(0.25))) / 2.0
    });
    let binary = t(&[2], &[3f32.ln(), -40.0]);
    check("bce", &[binary, t(&[2], &[1.0, 1.0])], (ln(0.75) + 40.0) / 2.0);
    let one_of = (ln(0.5) + ln(0.75) + ln(0.25) + ln(0.5)) / 4.0;
    check("bce", &[logits, Tensor::from_slice(&[2], &[1i64, 1])], one_of);
}

#[test]
fn distributions_and_embeddings() {
    let (s, te) = (t(&[1, 2], &[0.0, 3f32.ln()]), t(&[1, 2], &[0.0, 0.0]));
    let forward = 0.5 * (0.5f32 / 0.25).ln() + 0.5 * (0.5f32 / 0.75).ln();
    let reverse = 0.25 * (0.25f32 / 0.5).ln() + 0.75 * (0.75f32 / 0.5).ln();
    check("kl", &[s.clone(), te.clone()], forward);
    check("reversekl", &[s, te.clone()], reverse);
    check("kl:temperature=2", &[t(&[1, 2], &[0.0, 2.0 * 3f32.ln()]), te], 4.0 * forward);
    check("cosine", &[t(&[2, 2], &[1.0, 0.0, 2.0, 2.0]), t(&[2, 2], &[0.0, 3.0, 1.0, 1.0])], 0.5);
    let rows = t(&[3, 2], &[0.0, 0.0, 1.0, 0.0, 0.0, 1.05]);
    check("triplet:margin=0.2", &[rows, t(&[1], &[0.0])], 1.0 - 1.1025 + 0.2);
}

#[test]
fn cross_entropy_has_the_right_types() {
    let types = |loss: &str, tensors: &[Tensor]| {
        let (mut graph, ids) = inputs(tensors);
        let (label, outputs) = ids.split_last().unwrap();
        let scalar = loss.parse::<Loss>().unwrap().append(&mut graph, outputs, *label)?;
        graph.outputs.push(scalar);
        graph.infer().unwrap();
        assert_eq!(graph.value(scalar).ty, ValueType::from(TensorType::fixed(DType::F32, &[])));
        graph.verify().unwrap();
        Ok::<Graph, TrainError>(graph)
    };
    let classes = |dims: &[usize]| Tensor::zeros(DType::I64, dims);
    let scores = |dims: &[usize]| Tensor::zeros(DType::F32, dims);
    types("crossentropy:smoothing=0.1", &[scores(&[4, 3]), classes(&[4])]).unwrap();
    types("ce", &[scores(&[4, 5, 3]), classes(&[4, 5])]).unwrap();
    types("ce", &[scores(&[4, 3]), scores(&[4, 3])]).unwrap();
    types("infonce", &[scores(&[8, 3]), classes(&[8])]).unwrap();
    types("infonce", &[scores(&[4, 3]), scores(&[4, 3]), classes(&[4])]).unwrap();
    let turned = types("ce", &[scores(&[2, 3, 5, 6]), classes(&[2, 5, 6])]).unwrap();
    assert!(turned.iter_nodes().any(|(_, n)| matches!(n.op, Op::Transpose { .. })));
    for (loss, tensors, part) in [
        ("ce", [scores(&[4, 3]), classes(&[3])], "classes [batch"),
        ("mse", [scores(&[4, 3]), scores(&[4])], "as many outputs"),
        ("kl", [scores(&[4, 3]), scores(&[4, 2])], "one shape"),
        ("triplet", [scores(&[4, 3]), classes(&[4])], "3 parts"),
        ("ctc", [scores(&[4, 3]), classes(&[4])], "not supported"),
    ] {
        let error = types(loss, &tensors).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn slips_are_refused() {
    for (text, part) in [
        ("crossentropie", "crossentropy, focal"),
        ("focal:gama=2", "gama"),
        ("ce:smoothing=1.5", "from 0"),
        ("huber:delta=0", "from"),
        ("kl:temperature", "key=value"),
    ] {
        let error = text.parse::<Loss>().unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
}
