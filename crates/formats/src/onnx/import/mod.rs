//! From an ONNX model to a graph.
//!
//! Every node is brought to the newest spelling of its operator: attributes that later became inputs turn into
//! constants, old broadcasting becomes explicit, operators that the graph does not have are written with those that it
//! has, and calls of model-local functions are replaced by their bodies. Whatever is not understood (an operator, an
//! attribute, an attribute's type, a missing input) is an error that names the node; nothing is skipped.

mod builder;
mod control;
mod facts;
mod microsoft;
mod ml;
mod node;
mod order;
mod recurrent;
mod standard;
mod trees;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use lightering_graph::{
    Constant, DType, Dim, Graph, GraphError, SourceId, StoredTensor, Tensor, TensorType, ValueId, ValueKind,
    ValueType,
};
use lightering_tier::ByteSource;
use lightering_units::Bytes;

use self::builder::GraphBuilder;
use self::facts::Fact;
use self::node::NodeReader;
use super::proto::{
    AttributeProto, AttributeValue, Dimension, FunctionProto, GraphProto, INLINE_BYTES, MAX_NODES, NodeProto,
    OperatorSetId, SparseTensorProto, TensorProto, TypeProto,
};
use super::{ModelFile, dtype_from_onnx};
use crate::tensor::checked_size;
use crate::{Error, Result};

/// Newest version of the standard operator set that is understood.
pub const MAX_OPSET: i64 = 25;
/// Deepest nesting of subgraphs and function calls.
const MAX_DEPTH: usize = 32;

/// A graph, and the stores that its stored constants refer to by index.
pub struct Imported {
    /// The graph; it verifies.
    pub graph: Graph,
    /// The stores, in the order of [`Graph::sources`].
    pub sources: Vec<Arc<dyn ByteSource>>,
}

impl std::fmt::Debug for Imported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Imported").field("graph", &self.graph).finish_non_exhaustive()
    }
}

/// Turns a model into a graph. Weights of more than [`INLINE_BYTES`] stay in their files.
///
/// # Errors
/// Naming the node, the value or the tensor that is wrong or not supported.
pub fn import(file: &ModelFile) -> Result<Imported> {
    import_limited(file, MAX_NODES)
}

fn import_limited(file: &ModelFile, node_limit: u64) -> Result<Imported> {
    let model = &file.model;
    let proto = model
        .graph
        .as_ref()
        .ok_or_else(|| Error::invalid("model", "no graph", "a model with a graph (is this an ONNX file?)"))?;
    let mut functions = HashMap::new();
    for function in &model.functions {
        let key = (domain(&function.domain), function.name.as_str(), function.overload.as_str());
        if functions.insert(key, function).is_some() {
            return Err(Error::invalid(
                "model",
                format!("two functions called {:?} in domain {:?}", function.name, function.domain),
                "one function of each name",
            ));
        }
    }
    let mut importer = Importer { file, functions, sources: Vec::new(), node_count: 0, node_limit, depth: 0 };
    let opsets = opset_versions("model", &model.opset_import)?;
    let mut builder = GraphBuilder::new(&proto.name, Arc::new(opsets));
    importer.fill(&mut builder, proto, None)?;
    let mut graph = builder.graph;
    set_sources(&mut graph, &importer.sources.iter().map(|s| s.name()).collect::<Vec<_>>());
    graph.compact();
    graph.verify().map_err(graph_error)?;
    Ok(Imported { graph, sources: importer.sources })
}

/// The stores of the whole model are numbered once, so every body knows all of them.
fn set_sources(graph: &mut Graph, sources: &[String]) {
    graph.sources = sources.to_vec();
    for node in graph.nodes.iter_mut().flatten() {
        for body in node.op.bodies_mut() {
            set_sources(body, sources);
        }
    }
}

fn graph_error(error: GraphError) -> Error {
    match error {
        GraphError::Unsupported { node, op, what } => {
            Error::unsupported(format!("node {node:?} ({op})"), what)
        }
        error => Error::invalid("graph", error, "a graph in which every operand is made before its use"),
    }
}

/// The standard domain has two names.
fn domain(name: &str) -> &str {
    if name == "ai.onnx" { "" } else { name }
}

fn opset_versions(place: &str, opsets: &[OperatorSetId]) -> Result<HashMap<String, i64>> {
    let mut out = HashMap::new();
    for opset in opsets {
        let name = domain(&opset.domain);
        if opset.version < 1 {
            return Err(Error::invalid(
                place,
                format!("version {} of the operator set {name:?}", opset.version),
                "a version of 1 or more",
            ));
        }
        if name.is_empty() && opset.version > MAX_OPSET {
            return Err(Error::unsupported(
                place,
                format!("version {} of the standard operator set (newest known: {MAX_OPSET})", opset.version),
            ));
        }
        if out.insert(name.to_owned(), opset.version).is_some_and(|old| old != opset.version) {
            return Err(Error::invalid(place, format!("two versions of the operator set {name:?}"), "one"));
        }
    }
    // The first version of the format did not name operator sets. A file that names some and leaves this one out has no
    // say about what the standard operators in it mean.
    if opsets.is_empty() {
        out.insert(String::new(), 1);
    }
    Ok(out)
}

struct Importer<'a> {
    file: &'a ModelFile,
    functions: HashMap<(&'a str, &'a str, &'a str), &'a FunctionProto>,
    sources: Vec<Arc<dyn ByteSource>>,
    /// Nodes converted so far, the bodies of functions once per call.
    node_count: u64,
    node_limit: u64,
    depth: usize,
}

/// The value type that a declaration stands for.
fn value_type(place: &str, proto: &TypeProto) -> Result<ValueType> {
    let dtype = |number: i32| {
        dtype_from_onnx(number).ok_or_else(|| {
            Error::invalid(place, format!("element type {number}"), "an element type from 1 to 23")
        })
    };
    Ok(match proto {
        TypeProto::Unset => ValueType::Unknown,
        TypeProto::Tensor { elem_type, shape } => {
            let shape = shape.as_ref().map(|dims| dims.iter().map(dimension).collect());
            ValueType::Tensor(TensorType { dtype: dtype(*elem_type)?, shape })
        }
        TypeProto::Sequence(element) => ValueType::Sequence(Box::new(value_type(place, element)?)),
        TypeProto::Optional(element) => ValueType::Optional(Box::new(value_type(place, element)?)),
        TypeProto::Map { key_type, value_type: value } => match value_type(place, value)? {
            ValueType::Tensor(value) => ValueType::Map { key: dtype(*key_type)?, value: value.dtype },
            other => return Err(Error::unsupported(place, format!("a map to {other}"))),
        },
        TypeProto::SparseTensor { .. } => return Err(Error::unsupported(place, "a sparse tensor")),
    })
}

fn dimension(dim: &Dimension) -> Dim {
    match dim {
        Dimension::Unknown => Dim::UNKNOWN,
        Dimension::Param(name) => Dim::Symbol(name.as_str().into()),
        // Some exporters write -1 for a dimension that they do not know.
        Dimension::Value(value) => usize::try_from(*value).map_or(Dim::UNKNOWN, Dim::Fixed),
    }
}

impl<'a> Importer<'a> {
    /// Converts a whole graph into `b`. `captured` are the values of the surrounding graph that a body reads.
    fn fill(
        &mut self,
        b: &mut GraphBuilder,
        proto: &GraphProto,
        captured: Option<&[(String, Captured)]>,
    ) -> Result<()> {
        b.reserve(proto);
        for info in &proto.value_info {
            // Only a hint, so a strange one is no reason to refuse the model.
            if let Ok(ValueType::Tensor(t)) = value_type("", &info.value_type) {
                let rank = t.shape.as_ref().map(Vec::len);
                b.hints.insert(info.name.clone(), Fact { dtype: Some(t.dtype), rank });
            }
        }
        let sparse_name = |s: &SparseTensorProto| s.values.name.clone();
        let mut constants = HashSet::new();
        let names = proto.initializer.iter().map(|t| t.name.clone());
        for name in names.chain(proto.sparse_initializer.iter().map(sparse_name)) {
            if name.is_empty() {
                return Err(Error::invalid("initializer", "an empty name", "a name"));
            }
            if constants.contains(&name) {
                return Err(Error::invalid(
                    format!("initializer {name:?}"),
                    "it is defined twice",
                    "one definition",
                ));
            }
            constants.insert(name);
        }
        for info in &proto.input {
            let place = format!("input {:?}", info.name);
            if info.name.is_empty() {
                return Err(Error::invalid(place, "an empty name", "a name"));
            }
            // Files of the first versions list the constants among the inputs.
            if constants.contains(&info.name) {
                continue;
            }
            let ty = value_type(&place, &info.value_type)?;
            if captured.is_none() && ty == ValueType::Unknown {
                return Err(Error::invalid(place, "no type", "a declared type"));
            }
            if b.names.contains_key(&info.name) {
                return Err(Error::invalid(place, "it is defined twice", "one definition"));
            }
            let id = b.graph.add_input(info.name.as_str(), ty);
            b.names.insert(info.name.clone(), Some(id));
            b.learn(id);
        }
        for (name, value) in captured.unwrap_or(&[]) {
            let id = match value {
                Captured::Input(ty, fact) => {
                    let id = b.graph.add_input(name.as_str(), ty.clone());
                    b.set_fact(id, *fact);
                    id
                }
                Captured::Constant(ty, constant) => {
                    let id = b.push_constant(name.clone(), ty.clone(), constant.clone());
                    b.learn(id);
                    id
                }
            };
            b.names.insert(name.clone(), Some(id));
        }
        for tensor in &proto.initializer {
            let (ty, constant) = self.constant(tensor)?;
            b.define_constant(&tensor.name, ty, constant)?;
        }
        for sparse in &proto.sparse_initializer {
            let tensor = self.dense(sparse)?;
            b.define_tensor(&sparse.values.name, tensor)?;
        }
        for index in order::sorted(&proto.node)? {
            self.node(b, &proto.node[index])?;
        }
        for info in &proto.output {
            let id = b.names.get(&info.name).copied().flatten().ok_or_else(|| {
                Error::invalid(
                    format!("output {:?}", info.name),
                    "nothing makes it",
                    "the name of an input, an initializer or a node's output",
                )
            })?;
            b.graph.outputs.push(id);
        }
        Ok(())
    }

    /// The constant that a tensor message stands for: left in its file if it is large and stands there as is.
    fn constant(&mut self, proto: &TensorProto) -> Result<(TensorType, Constant)> {
        if let Some((source, span)) = self.file.locate(proto)?
            && span.size_bytes > INLINE_BYTES
        {
            let (dtype, dims) = super::tensor::tensor_type(proto)?;
            let found = self.sources.iter().position(|s| Arc::ptr_eq(s, &source));
            let index = found.unwrap_or_else(|| {
                self.sources.push(source);
                self.sources.len() - 1
            });
            let stored = StoredTensor {
                source: SourceId(u32::try_from(index).expect("there are fewer files than tensors")),
                offset: span.offset,
                size: Bytes(span.size_bytes),
            };
            return Ok((TensorType::fixed(dtype, &dims), Constant::Stored(stored)));
        }
        let tensor = self.file.tensor(proto)?;
        Ok((tensor.tensor_type(), Constant::Inline(Arc::new(tensor))))
    }

    /// A sparse constant as a dense one.
    fn dense(&self, proto: &SparseTensorProto) -> Result<Tensor> {
        let place = format!("sparse tensor {:?}", proto.values.name);
        let values = self.file.tensor(&proto.values)?;
        let indices = self.file.tensor(&proto.indices)?;
        let dims = proto
            .dims
            .iter()
            .map(|&d| {
                usize::try_from(d)
                    .map_err(|_| Error::invalid(&place, format!("dimension {d}"), "a dimension of 0 or more"))
            })
            .collect::<Result<Vec<_>>>()?;
        let (count, _) = checked_size(&place, values.dtype(), &dims)?;
        let rank = dims.len();
        let width = match indices.dims() {
            [n] if *n == values.len() => 1,
            [n, r] if *n == values.len() && *r == rank => rank,
            other => {
                return Err(Error::invalid(
                    &place,
                    format!("indices of shape {other:?} for {} values", values.len()),
                    "[values] or [values, rank]",
                ));
            }
        };
        let linear = indices.dims().len() == 1;
        let numbers = indices
            .to_i64s()
            .ok_or_else(|| Error::invalid(&place, format!("indices of type {}", indices.dtype()), "i64"))?;
        if values.dtype() == DType::String {
            return Err(Error::unsupported(place, "text"));
        }
        let mut out = Tensor::zeros(values.dtype(), &dims);
        let size = values.dtype().size_bytes();
        for (i, value) in values.as_bytes().chunks_exact(size).enumerate() {
            let index = &numbers[i * width..][..width];
            let at = if linear {
                usize::try_from(index[0]).ok().filter(|at| *at < count)
            } else {
                index.iter().zip(&dims).try_fold(0usize, |at, (&i, &d)| {
                    Some(at * d + usize::try_from(i).ok().filter(|i| *i < d)?)
                })
            };
            let at = at.ok_or_else(|| {
                Error::invalid(&place, format!("index {index:?}"), format!("an index inside {dims:?}"))
            })?;
            out.as_bytes_mut()[at * size..][..size].copy_from_slice(value);
        }
        Ok(out)
    }

    /// Converts one node, or the body of the function that it calls.
    fn node(&mut self, b: &mut GraphBuilder, proto: &NodeProto) -> Result<()> {
        self.node_count += 1;
        if self.node_count > self.node_limit {
            return Err(Error::limit(
                node::place(proto),
                "number of nodes with functions expanded",
                self.node_count,
                self.node_limit,
            ));
        }
        let name = domain(&proto.domain);
        if let Some(function) =
            self.functions.get(&(name, proto.op_type.as_str(), proto.overload.as_str())).copied()
        {
            return self.nested(node::place(proto), |im| im.call(b, proto, function));
        }
        let opset = b.opsets.get(name).copied();
        let reader = NodeReader::new(proto, opset.unwrap_or(1), b)?;
        if opset.is_none() && name != "com.microsoft" {
            return Err(reader.invalid(
                format!("domain {name:?} is not among the model's operator sets"),
                "a domain that the model declares",
            ));
        }
        match name {
            "" => standard::convert(self, b, &reader)?,
            "ai.onnx.ml" => ml::convert(self, b, &reader)?,
            "com.microsoft" => microsoft::convert(self, b, &reader)?,
            _ => return Err(reader.unknown_operator()),
        }
        reader.check_all_read()
    }

    fn nested<T>(&mut self, place: String, f: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.depth >= MAX_DEPTH {
            return Err(Error::limit(
                place,
                "nesting of subgraphs and function calls",
                self.depth as u64 + 1,
                MAX_DEPTH as u64,
            ));
        }
        self.depth += 1;
        let result = f(self);
        self.depth -= 1;
        result
    }

    /// Puts the body of a function in place of its call.
    fn call(&mut self, b: &mut GraphBuilder, call: &NodeProto, function: &FunctionProto) -> Result<()> {
        let place = node::place(call);
        let reader = NodeReader::new(call, 1, b)?;
        if call.input.len() > function.input.len() || call.output.len() > function.output.len() {
            return Err(reader.invalid(
                format!("{} inputs and {} outputs", call.input.len(), call.output.len()),
                format!("at most {} and {}", function.input.len(), function.output.len()),
            ));
        }
        let mut arguments: HashMap<&str, &AttributeProto> = HashMap::new();
        for default in &function.attribute_proto {
            arguments.insert(&default.name, default);
        }
        for attribute in &call.attribute {
            let known = function.attribute.contains(&attribute.name)
                || function.attribute_proto.iter().any(|a| a.name == attribute.name);
            if !known {
                return Err(reader.invalid(
                    format!("attribute {:?}", attribute.name),
                    "an attribute that the function has",
                ));
            }
            arguments.insert(&attribute.name, attribute);
        }
        let opsets = if function.opset_import.is_empty() {
            Arc::clone(&b.opsets)
        } else {
            Arc::new(opset_versions(&format!("function {:?}", function.name), &function.opset_import)?)
        };
        let mut names: HashMap<String, Option<ValueId>> = HashMap::new();
        for (i, formal) in function.input.iter().enumerate() {
            names.insert(formal.clone(), reader.input(i));
        }
        let outer_names = std::mem::replace(&mut b.names, names);
        let outer_opsets = std::mem::replace(&mut b.opsets, opsets);
        let outer_hints = std::mem::take(&mut b.hints);
        let prefix = format!("{}{}/", b.prefix.clone().unwrap_or_default(), reader.name());
        let outer_prefix = b.prefix.replace(prefix);
        let mut result = Ok(());
        for index in order::sorted(&function.node)? {
            result = self.node(b, &substitute(&function.node[index], &arguments));
            if result.is_err() {
                break;
            }
        }
        let inner = std::mem::replace(&mut b.names, outer_names);
        b.opsets = outer_opsets;
        b.hints = outer_hints;
        b.prefix = outer_prefix;
        result.map_err(|e| e.within(&place))?;
        for (formal, actual) in function.output.iter().zip(&call.output) {
            if actual.is_empty() {
                continue;
            }
            let value = inner.get(formal).copied().flatten().ok_or_else(|| {
                reader.invalid(
                    format!("the function's output {formal:?} is made by nothing"),
                    "a function body that makes its outputs",
                )
            })?;
            b.adopt(&reader, actual, value)?;
        }
        Ok(())
    }
}

/// A copy of a function's node with the call's attribute values in place of the references to them.
fn substitute(node: &NodeProto, arguments: &HashMap<&str, &AttributeProto>) -> NodeProto {
    let mut out = node.clone();
    out.attribute.retain_mut(|attribute| {
        if attribute.ref_attr_name.is_empty() {
            substitute_inside(&mut attribute.value, arguments);
            return true;
        }
        // A reference to an attribute that the call does not give is as if it were not there.
        let Some(argument) = arguments.get(attribute.ref_attr_name.as_str()) else { return false };
        attribute.value = argument.value.clone();
        attribute.ref_attr_name.clear();
        true
    });
    out
}

fn substitute_inside(value: &mut AttributeValue, arguments: &HashMap<&str, &AttributeProto>) {
    let each = |graph: &mut GraphProto| {
        for node in &mut graph.node {
            *node = substitute(node, arguments);
        }
    };
    match value {
        AttributeValue::Graph(graph) => each(graph),
        AttributeValue::Graphs(graphs) => graphs.iter_mut().for_each(each),
        _ => {}
    }
}

/// A value of the surrounding graph as a body sees it.
#[derive(Clone)]
enum Captured {
    /// Passed in.
    Input(ValueType, Fact),
    /// The same constant again.
    Constant(ValueType, Constant),
}

impl Captured {
    fn of(b: &GraphBuilder, id: ValueId) -> Captured {
        let value = b.graph.value(id);
        match &value.kind {
            ValueKind::Constant(constant) => Captured::Constant(value.ty.clone(), constant.clone()),
            _ => Captured::Input(value.ty.clone(), b.fact(id)),
        }
    }
}

#[cfg(test)]
mod tests;
