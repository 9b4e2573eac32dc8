//! `lighter inspect`

mod weights;

use crate::arguments::InspectArguments;
use crate::container::Container;
use crate::failure::{Exit, Outcome};
use crate::model::{Costs, Model, ModelSource};
use crate::output::{Output, Table};
use lightering_graph::Graph;
use lightering_units::Bytes;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// `--json`
#[derive(Debug, Serialize)]
struct InspectReport {
    schema: &'static str,
    path: String,
    size_bytes: Bytes,
    producer: String,
    opsets: BTreeMap<String, i64>,
    graph: String,
    inputs: Vec<PortReport>,
    outputs: Vec<PortReport>,
    nodes: usize,
    ops: BTreeMap<String, usize>,
    constants: BTreeMap<String, ConstantReport>,
    /// Absent where sizes are symbolic and no --dim binds them.
    costs: Option<Costs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
}

#[derive(Debug, Serialize)]
struct PortReport {
    name: String,
    #[serde(rename = "type")]
    ty: String,
}

#[derive(Debug, Default, Serialize)]
struct ConstantReport {
    tensors: usize,
    elements: u64,
    bytes: Bytes,
}

/// Prints what is inside a model.
pub fn run(arguments: &InspectArguments, output: Output) -> Outcome {
    let container = Container::of(&arguments.model);
    if container != Container::Onnx {
        return weights::run(arguments, container, output);
    }
    let source = ModelSource::File(arguments.model.clone());
    let model = Model::open(&source)?;
    let dimensions = crate::values::bind_dimensions(&arguments.dimensions, &[], &[])?;
    let identity = source.identity(false)?;
    let graph = model.graph();
    let port = |p: crate::values::Port| PortReport { name: p.name, ty: p.ty.to_string() };
    let mut ops: BTreeMap<String, usize> = BTreeMap::new();
    for (_, node) in graph.iter_nodes() {
        *ops.entry(node.op.name().to_owned()).or_default() += 1;
    }
    let text_form = arguments.graph.then(|| graph.to_text());
    let mut report = InspectReport {
        schema: "lightering.inspect/1",
        path: identity.path,
        size_bytes: identity.size_bytes,
        producer: model.producer().to_owned(),
        opsets: model.opsets().clone(),
        graph: graph.name.clone(),
        inputs: model.inputs().into_iter().map(port).collect(),
        outputs: model.outputs().into_iter().map(port).collect(),
        nodes: graph.node_count(),
        ops,
        constants: constants(graph),
        costs: None,
        text: text_form,
    };
    report.costs = model.costs(&dimensions)?;
    output.result(&report, &text(&report))?;
    Ok(Exit::Done)
}

fn constants(graph: &Graph) -> BTreeMap<String, ConstantReport> {
    let mut by_type: BTreeMap<String, ConstantReport> = BTreeMap::new();
    for value in &graph.values {
        let (Some(_), Some(ty)) = (value.constant(), value.ty.tensor()) else { continue };
        let entry = by_type.entry(ty.dtype.name().to_owned()).or_default();
        let elements = ty.elements().unwrap_or(0) as u64;
        entry.tensors += 1;
        entry.elements += elements;
        entry.bytes += Bytes(elements.saturating_mul(ty.dtype.size_bytes() as u64));
    }
    by_type
}

fn text(report: &InspectReport) -> String {
    let mut facts = Table::new(&["model", &report.path]);
    facts.row(["size", report.size_bytes.to_string().as_str()]);
    facts.row(["made by", report.producer.as_str()]);
    let opsets: Vec<String> =
        report.opsets.iter().map(|(domain, version)| format!("{domain} {version}")).collect();
    facts.row(["operator sets", opsets.join(", ").as_str()]);
    for input in &report.inputs {
        facts.row(["input".to_owned(), format!("{} {}", input.name, input.ty)]);
    }
    for output in &report.outputs {
        facts.row(["output".to_owned(), format!("{} {}", output.name, output.ty)]);
    }
    for (dtype, constant) in &report.constants {
        facts.row([
            format!("constants {dtype}"),
            format!("{} in {} tensors, {}", constant.elements, constant.tensors, constant.bytes),
        ]);
    }
    facts.row(["nodes".to_owned(), report.nodes.to_string()]);
    match &report.costs {
        Some(costs) => {
            facts.row(["operations".to_owned(), costs.flops.to_string()]);
            facts.row(["activations written".to_owned(), costs.bytes_written.to_string()]);
        }
        None => facts.row(["operations", "unknown: sizes are symbolic, give --dim NAME=SIZE"]),
    }
    let mut text = facts.text();
    text.push('\n');
    let mut sorted: Vec<(&String, &usize)> = report.ops.iter().collect();
    sorted.sort_by(|a, b| b.1.cmp(a.1).then(a.0.cmp(b.0)));
    let mut histogram = Table::new(&["op", ">count"]);
    for (op, count) in sorted {
        histogram.row([op.clone(), count.to_string()]);
    }
    text.push_str(&histogram.text());
    if let Some(graph) = &report.text {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n{graph}");
    }
    text
}
