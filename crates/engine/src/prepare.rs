//! From a graph as it was imported to one that can be planned: inputs bound, shapes known, operators fused.

use std::sync::Arc;

use lightering_graph::passes::{PassReport, Pipeline};
use lightering_graph::{Graph, Tensor, TensorType, ValueId};
use lightering_meter::MemoryPool;
use lightering_tier::ByteSource;

use crate::EngineError;
use crate::interpreter::Evaluator;

/// What is known of the inputs before planning.
#[derive(Clone, Debug, Default)]
pub struct Bindings {
    /// Types of inputs, with every dimension known.
    pub types: Vec<(ValueId, TensorType)>,
    /// Inputs whose value decides the shape of something; they become constants.
    pub values: Vec<(ValueId, Tensor)>,
}

/// Which rewrites are done.
#[derive(Clone, Debug, Default)]
pub struct PrepareOptions {
    /// Passes left out, by name.
    pub without: Vec<String>,
    /// Stops after the first run of this pass.
    pub stop_after: Option<String>,
}

/// Binds the inputs and rewrites the graph into the form that the kernels want. Returns what each pass did.
///
/// # Errors
/// When an input does not fit the graph, or the graph contradicts itself.
pub fn prepare(
    graph: &mut Graph,
    bindings: &Bindings,
    sources: &[Arc<dyn ByteSource>],
    memory: &MemoryPool,
    options: &PrepareOptions,
) -> Result<Vec<PassReport>, EngineError> {
    graph.bind(&bindings.types)?;
    for (input, tensor) in &bindings.values {
        graph.bind_value(*input, tensor.clone())?;
    }
    let evaluator = Evaluator::new(memory.clone(), sources.to_vec());
    let mut pipeline = Pipeline::standard(&evaluator);
    for name in &options.without {
        pipeline = pipeline.without(name);
    }
    if let Some(name) = &options.stop_after {
        pipeline = pipeline.stop_after(name.clone());
    }
    let reports = pipeline.run(graph)?;
    graph.compact();
    graph.infer()?;
    graph.verify()?;
    Ok(reports)
}
