//! From a graph to an ONNX model.
//!
//! Operators that fusion made are written as the standard operators that they stand for. What has no spelling (a
//! state, a channels-last convolution) is an error that names the node.

mod attributes;
mod ml;
mod operators;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use lightering_graph::{
    Constant, DType, Dim, Graph, Node, Tensor, TensorType, ValueId, ValueKind, ValueType,
};
use lightering_tier::ByteSource;

use self::attributes::NodeWriter;
use super::proto::{
    Dimension, GraphProto, ModelProto, NodeProto, OperatorSetId, Payload, Store, TensorData, TensorProto,
    TypeProto, ValueInfoProto,
};
use super::{dtype_to_onnx, encode_tensor};
use crate::protobuf::Span;
use crate::{Error, Result};

/// Version of the file format that is written.
const IR_VERSION: i64 = 10;
/// Version of the standard operator set that is written, unless an operator needs a newer one.
const OPSET: i64 = 23;

/// Turns a graph into a model. `sources` are the stores of the graph's stored constants, in the order of
/// [`Graph::sources`]; nothing is read from them before the model is written.
///
/// # Errors
/// Naming the node that has no ONNX spelling.
pub fn export(graph: &Graph, sources: &[Arc<dyn ByteSource>]) -> Result<ModelProto> {
    let mut exporter =
        Exporter { sources, taken: HashSet::new(), opsets: BTreeMap::from([(String::new(), OPSET)]) };
    let proto = exporter.graph(graph, &[])?;
    let opset_import =
        exporter.opsets.into_iter().map(|(domain, version)| OperatorSetId { domain, version }).collect();
    Ok(ModelProto {
        ir_version: IR_VERSION,
        opset_import,
        producer_name: "lightering".to_owned(),
        graph: Some(proto),
        ..Default::default()
    })
}

struct Exporter<'a> {
    sources: &'a [Arc<dyn ByteSource>],
    /// Every name in the model: a subgraph may not use one of the graph around it.
    taken: HashSet<String>,
    opsets: BTreeMap<String, i64>,
}

/// What is being written: one graph or body.
struct Scope<'g> {
    graph: &'g Graph,
    names: HashMap<ValueId, String>,
    nodes: Vec<NodeProto>,
    initializers: Vec<TensorProto>,
}

impl Scope<'_> {
    fn ty(&self, id: ValueId) -> Option<&TensorType> {
        self.graph.value(id).ty.tensor()
    }

    fn dtype(&self, id: ValueId) -> Option<DType> {
        self.ty(id).map(|t| t.dtype)
    }

    fn rank(&self, id: ValueId) -> Option<usize> {
        self.ty(id)?.shape.as_ref().map(Vec::len)
    }

    /// Name of operand `index`; empty if it is absent.
    fn input(&self, node: &Node, index: usize) -> String {
        node.input(index).map(|id| self.names[&id].clone()).unwrap_or_default()
    }

    fn inputs(&self, node: &Node) -> Vec<String> {
        (0..node.inputs.len()).map(|i| self.input(node, i)).collect()
    }

    fn outputs(&self, node: &Node) -> Vec<String> {
        (0..node.outputs.len())
            .map(|i| node.output(i).map(|id| self.names[&id].clone()).unwrap_or_default())
            .collect()
    }

    fn output(&self, node: &Node) -> String {
        node.output(0).map(|id| self.names[&id].clone()).unwrap_or_default()
    }
}

impl Exporter<'_> {
    fn fresh(&mut self, wanted: &str) -> String {
        let wanted = if wanted.is_empty() { "value" } else { wanted };
        let mut name = wanted.to_owned();
        let mut number = 1;
        while !self.taken.insert(name.clone()) {
            number += 1;
            name = format!("{wanted}#{number}");
        }
        name
    }

    /// Writes a graph. The last inputs of a body are the values `captured` of the graph around it, by their names there.
    fn graph(&mut self, graph: &Graph, captured: &[String]) -> Result<GraphProto> {
        let mut scope = Scope { graph, names: HashMap::new(), nodes: Vec::new(), initializers: Vec::new() };
        let own = graph.inputs.len() - captured.len();
        // What the caller knows by name comes first, so that it keeps it.
        for &id in graph.inputs[..own].iter().chain(&graph.outputs) {
            if !scope.names.contains_key(&id) && !graph.inputs[own..].contains(&id) {
                let name = self.fresh(&graph.value(id).name);
                scope.names.insert(id, name);
            }
        }
        for (&id, name) in graph.inputs[own..].iter().zip(captured) {
            scope.names.insert(id, name.clone());
        }
        for (_, node) in graph.iter_nodes() {
            for &id in node.inputs.iter().chain(&node.outputs).flatten() {
                scope.names.entry(id).or_insert_with(|| self.fresh(&graph.value(id).name));
            }
        }
        let mut constants: Vec<ValueId> = scope.names.keys().copied().collect();
        constants.sort_unstable();
        for id in constants {
            match &graph.value(id).kind {
                ValueKind::Constant(constant) => {
                    let tensor = self.constant(graph, id, constant, &scope.names[&id])?;
                    scope.initializers.push(tensor);
                }
                ValueKind::State(_) => {
                    return Err(Error::unsupported(
                        format!("value {:?}", graph.value(id).name),
                        "a state that is kept between runs (an ONNX model has none)",
                    ));
                }
                _ => {}
            }
        }
        for (_, node) in graph.iter_nodes() {
            self.node(&mut scope, node)?;
        }
        let input = graph.inputs[..own]
            .iter()
            .map(|&id| value_info(&scope.names[&id], &graph.value(id).ty))
            .collect();
        let mut output = Vec::new();
        let mut written = HashSet::new();
        for &id in &graph.outputs {
            let value = graph.value(id);
            let mut name = scope.names[&id].clone();
            // An output must be the result of a node, and no other output.
            if !matches!(value.kind, ValueKind::Output { .. }) || !written.insert(id) {
                let source = name;
                name = self.fresh(&format!("{source}/out"));
                NodeWriter::new("Identity", vec![source], vec![name.clone()]).push(&mut scope);
            }
            output.push(value_info(&name, &value.ty));
        }
        Ok(GraphProto {
            name: if graph.name.is_empty() { "graph".to_owned() } else { graph.name.clone() },
            node: scope.nodes,
            initializer: scope.initializers,
            input,
            output,
            ..Default::default()
        })
    }

    fn constant(&self, graph: &Graph, id: ValueId, constant: &Constant, name: &str) -> Result<TensorProto> {
        match constant {
            Constant::Inline(tensor) => Ok(encode_tensor(name, tensor)),
            Constant::Stored(stored) => {
                let place = format!("value {name:?}");
                let dims = graph.value(id).ty.tensor().and_then(|t| Some((t.dtype, t.dims()?)));
                let (Some((dtype, dims)), Some(source)) = (dims, self.sources.get(stored.source.0 as usize))
                else {
                    return Err(Error::invalid(
                        place,
                        "a stored constant without a shape or a store",
                        "both",
                    ));
                };
                let span = Span { offset: stored.offset, size_bytes: stored.size.0 };
                Ok(TensorProto {
                    dims: dims.iter().map(|d| *d as i64).collect(),
                    data_type: dtype_to_onnx(dtype),
                    name: name.to_owned(),
                    data: TensorData::Raw(Payload::Stored(Store(Arc::clone(source)), span)),
                    metadata_props: Vec::new(),
                })
            }
        }
    }

    /// A constant that the export makes up.
    fn new_constant(&mut self, scope: &mut Scope, what: &str, tensor: &Tensor) -> String {
        let name = self.fresh(what);
        scope.initializers.push(encode_tensor(&name, tensor));
        name
    }

    fn ints(&mut self, scope: &mut Scope, what: &str, values: &[i64]) -> String {
        self.new_constant(scope, what, &Tensor::from_slice(&[values.len()], values))
    }

    /// A body, whose inputs after its own are operands of the node from `captures_from` on.
    fn body(&mut self, scope: &Scope, node: &Node, body: &Graph, captures_from: usize) -> Result<GraphProto> {
        let captured: Vec<String> =
            (captures_from..node.inputs.len()).map(|i| scope.input(node, i)).collect();
        if captured.len() > body.inputs.len() {
            return Err(unsupported(node, "a body with fewer inputs than captured values"));
        }
        self.graph(body, &captured)
    }

    fn need(&mut self, domain: &str, version: i64) {
        let entry = self.opsets.entry(domain.to_owned()).or_insert(version);
        *entry = (*entry).max(version);
    }
}

fn unsupported(node: &Node, what: &str) -> Error {
    Error::unsupported(format!("node {:?} ({})", node.name, node.op.name()), format!("writing {what}"))
}

fn type_proto(ty: &ValueType) -> TypeProto {
    match ty {
        ValueType::Unknown => TypeProto::Unset,
        ValueType::Tensor(t) => TypeProto::Tensor {
            elem_type: dtype_to_onnx(t.dtype),
            shape: t.shape.as_ref().map(|dims| {
                dims.iter()
                    .map(|d| match d {
                        Dim::Fixed(n) => Dimension::Value(*n as i64),
                        Dim::Symbol(name) => Dimension::Param(name.to_string()),
                        Dim::Unknown(()) => Dimension::Unknown,
                    })
                    .collect()
            }),
        },
        ValueType::Sequence(inner) => TypeProto::Sequence(Box::new(type_proto(inner))),
        ValueType::Optional(inner) => TypeProto::Optional(Box::new(type_proto(inner))),
        ValueType::Map { key, value } => TypeProto::Map {
            key_type: dtype_to_onnx(*key),
            value_type: Box::new(TypeProto::Tensor {
                elem_type: dtype_to_onnx(*value),
                shape: Some(Vec::new()),
            }),
        },
    }
}

fn value_info(name: &str, ty: &ValueType) -> ValueInfoProto {
    ValueInfoProto { name: name.to_owned(), value_type: type_proto(ty), metadata_props: Vec::new() }
}
