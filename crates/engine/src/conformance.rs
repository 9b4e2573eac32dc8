//! Runs a graph on given values and compares with expected ones: the cases that ONNX publishes for its operators.

use std::sync::Arc;

use lightering_graph::{DType, Graph, Tensor, ValueId};
use lightering_kernels::ThreadPool;
use lightering_kernels::ops::float8;
use lightering_meter::MemoryPool;
use lightering_tier::ByteSource;

use crate::ops::{ImageDecoder, OpContext, OpError};
use crate::{RuntimeValue, run_graph};

/// How far a number may be from the expected one: `|got − expected| ≤ absolute + relative·|expected|`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Share of the expected number.
    pub relative: f64,
    /// In any case.
    pub absolute: f64,
}

impl Tolerance {
    /// What ONNX's own runner of its cases allows.
    pub const ONNX: Tolerance = Tolerance { relative: 1e-3, absolute: 1e-7 };
}

/// How a case ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// All results as expected.
    Passed,
    /// A wrong result, and what is wrong with it; or a legal model that was refused as contradictory.
    Failed(String),
    /// Refused as not supported, and why.
    Unsupported(String),
}

/// Runs one case: `inputs` in the order of the graph's inputs (`None` for one that is not given), `expected` in the
/// order of its outputs.
pub fn run_case(
    graph: &Graph,
    sources: &[Arc<dyn ByteSource>],
    inputs: Vec<Option<RuntimeValue>>,
    expected: &[RuntimeValue],
    tolerance: Tolerance,
    threads: &ThreadPool,
    images: Option<&dyn ImageDecoder>,
) -> Outcome {
    let bound: Vec<(ValueId, &RuntimeValue)> =
        graph.inputs.iter().zip(&inputs).filter_map(|(&id, v)| Some((id, v.as_ref()?))).collect();
    let memory = MemoryPool::unbounded();
    let context = OpContext { threads, memory: &memory, sources, seed: 0, images, nesting: 0 };
    let got = match run_graph(graph, &bound, &context) {
        Ok(got) => got,
        Err(OpError::Unsupported(what)) => return Outcome::Unsupported(what),
        Err(e) => return Outcome::Failed(e.to_string()),
    };
    if got.len() != expected.len() {
        return Outcome::Failed(format!("{} results instead of {}", got.len(), expected.len()));
    }
    for (i, (e, g)) in expected.iter().zip(&got).enumerate() {
        if let Err(problem) = compare(e, g, tolerance) {
            return Outcome::Failed(format!("result {i}: {problem}"));
        }
    }
    Outcome::Passed
}

/// Compares two values; types and shapes must be equal.
///
/// # Errors
/// The first difference, as a sentence.
pub fn compare(expected: &RuntimeValue, got: &RuntimeValue, tolerance: Tolerance) -> Result<(), String> {
    match (expected, got) {
        (RuntimeValue::Tensor(e), RuntimeValue::Tensor(g)) => compare_tensors(e, g, tolerance),
        (RuntimeValue::Sequence(_, e), RuntimeValue::Sequence(_, g)) => {
            if e.len() != g.len() {
                return Err(format!("a sequence of {} instead of {}", g.len(), e.len()));
            }
            e.iter()
                .zip(g)
                .enumerate()
                .try_for_each(|(i, (e, g))| compare(e, g, tolerance).map_err(|p| format!("item {i}: {p}")))
        }
        (RuntimeValue::Optional(_, e), RuntimeValue::Optional(_, g)) => match (e, g) {
            (None, None) => Ok(()),
            (Some(e), Some(g)) => compare(e, g, tolerance),
            _ => Err("one of two optional values is absent".to_owned()),
        },
        // Files of test data do not tell a present optional from its content.
        (e, RuntimeValue::Optional(_, Some(g))) => compare(e, g, tolerance),
        (RuntimeValue::Optional(_, Some(e)), g) => compare(e, g, tolerance),
        (RuntimeValue::Map(ek, ev), RuntimeValue::Map(gk, gv)) => {
            compare_tensors(ek, gk, tolerance)?;
            compare_tensors(ev, gv, tolerance)
        }
        _ => Err("another kind of value".to_owned()),
    }
}

/// Every element as a number; complex ones as two.
fn numbers(t: &Tensor) -> Vec<f64> {
    match t.dtype() {
        DType::F8E4M3FN | DType::F8E4M3FNUZ | DType::F8E5M2 | DType::F8E5M2FNUZ | DType::F4E2M1 => {
            t.as_slice::<u8>().iter().map(|&b| f64::from(float8::decode(t.dtype(), b))).collect()
        }
        DType::Complex64 => t.as_slice::<[f32; 2]>().iter().flatten().map(|&v| f64::from(v)).collect(),
        DType::Complex128 => t.as_slice::<[f64; 2]>().iter().flatten().copied().collect(),
        _ => t.to_f64s().unwrap_or_default(),
    }
}

fn compare_tensors(expected: &Tensor, got: &Tensor, tolerance: Tolerance) -> Result<(), String> {
    if expected.tensor_type() != got.tensor_type() {
        return Err(format!("{} instead of {}", got.tensor_type(), expected.tensor_type()));
    }
    if expected.dtype() == DType::String {
        let wrong = expected.as_strings().iter().zip(got.as_strings()).position(|(e, g)| e != g);
        return wrong.map_or(Ok(()), |i| {
            Err(format!("text {i} is {:?}, expected {:?}", got.as_strings()[i], expected.as_strings()[i]))
        });
    }
    let (mut wrong, mut first) = (0, None);
    for (i, (e, g)) in numbers(expected).into_iter().zip(numbers(got)).enumerate() {
        let near = (g - e).abs() <= tolerance.absolute + tolerance.relative * e.abs();
        if !(e == g || near || (e.is_nan() && g.is_nan())) {
            wrong += 1;
            first.get_or_insert((i, e, g));
        }
    }
    match first {
        None => Ok(()),
        Some((i, e, g)) => {
            Err(format!("{wrong} of {} elements differ; element {i} is {g}, expected {e}", expected.len()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_named() {
        let a = RuntimeValue::from(Tensor::from_slice(&[3], &[1f32, f32::NAN, 3.0]));
        let b = RuntimeValue::from(Tensor::from_slice(&[3], &[1.0005f32, f32::NAN, 4.0]));
        assert_eq!(compare(&a, &a, Tolerance::ONNX), Ok(()));
        let problem = compare(&a, &b, Tolerance::ONNX).unwrap_err();
        assert!(problem.starts_with("1 of 3 elements differ; element 2 is 4"), "{problem}");
        let c = RuntimeValue::from(Tensor::from_slice(&[1, 3], &[1f32, 2.0, 3.0]));
        assert!(compare(&a, &c, Tolerance::ONNX).unwrap_err().contains("instead of"));
    }
}
