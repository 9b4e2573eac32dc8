//! A node that is being written.

use lightering_graph::{DType, Tensor};

use super::Scope;
use crate::onnx::proto::{AttributeProto, AttributeValue, GraphProto, NodeProto, TypeProto};
use crate::onnx::{dtype_to_onnx, encode_tensor};

pub(super) struct NodeWriter(NodeProto);

impl NodeWriter {
    pub fn new(op_type: &str, mut input: Vec<String>, mut output: Vec<String>) -> NodeWriter {
        for names in [&mut input, &mut output] {
            while names.last().is_some_and(String::is_empty) {
                names.pop();
            }
        }
        NodeWriter(NodeProto { op_type: op_type.to_owned(), input, output, ..Default::default() })
    }

    pub fn domain(mut self, domain: &str) -> Self {
        self.0.domain = domain.to_owned();
        self
    }

    pub fn named(mut self, name: &str) -> Self {
        self.0.name = name.to_owned();
        self
    }

    pub fn attribute(mut self, name: &str, value: AttributeValue) -> Self {
        self.0.attribute.push(AttributeProto { name: name.to_owned(), value, ..Default::default() });
        self
    }

    pub fn int(self, name: &str, value: i64) -> Self {
        self.attribute(name, AttributeValue::Int(value))
    }

    pub fn int_if(self, name: &str, value: Option<i64>) -> Self {
        match value {
            Some(value) => self.int(name, value),
            None => self,
        }
    }

    pub fn size(self, name: &str, value: usize) -> Self {
        self.int(name, value as i64)
    }

    pub fn flag(self, name: &str, value: bool) -> Self {
        self.int(name, i64::from(value))
    }

    pub fn dtype(self, name: &str, value: DType) -> Self {
        self.int(name, i64::from(dtype_to_onnx(value)))
    }

    pub fn dtype_if(self, name: &str, value: Option<DType>) -> Self {
        match value {
            Some(value) => self.dtype(name, value),
            None => self,
        }
    }

    pub fn float(self, name: &str, value: f32) -> Self {
        self.attribute(name, AttributeValue::Float(value))
    }

    pub fn float_if(self, name: &str, value: Option<f32>) -> Self {
        match value {
            Some(value) => self.float(name, value),
            None => self,
        }
    }

    pub fn string(self, name: &str, value: &str) -> Self {
        self.attribute(name, AttributeValue::String(value.as_bytes().to_vec()))
    }

    pub fn ints(self, name: &str, values: &[i64]) -> Self {
        self.attribute(name, AttributeValue::Ints(values.to_vec()))
    }

    pub fn sizes(self, name: &str, values: &[usize]) -> Self {
        self.attribute(name, AttributeValue::Ints(values.iter().map(|v| *v as i64).collect()))
    }

    pub fn sizes_if_any(self, name: &str, values: &[usize]) -> Self {
        if values.is_empty() { self } else { self.sizes(name, values) }
    }

    pub fn flags(self, name: &str, values: &[bool]) -> Self {
        self.attribute(name, AttributeValue::Ints(values.iter().map(|v| i64::from(*v)).collect()))
    }

    pub fn floats(self, name: &str, values: &[f32]) -> Self {
        self.attribute(name, AttributeValue::Floats(values.to_vec()))
    }

    pub fn floats_if_any(self, name: &str, values: &[f32]) -> Self {
        if values.is_empty() { self } else { self.floats(name, values) }
    }

    pub fn strings(self, name: &str, values: &[String]) -> Self {
        self.attribute(name, AttributeValue::Strings(values.iter().map(|v| v.clone().into_bytes()).collect()))
    }

    pub fn tensor(self, name: &str, value: &Tensor) -> Self {
        self.attribute(name, AttributeValue::Tensor(Box::new(encode_tensor("", value))))
    }

    pub fn graph(self, name: &str, value: GraphProto) -> Self {
        self.attribute(name, AttributeValue::Graph(Box::new(value)))
    }

    pub fn type_if(self, name: &str, value: Option<TypeProto>) -> Self {
        match value {
            Some(value) => self.attribute(name, AttributeValue::Type(Box::new(value))),
            None => self,
        }
    }

    pub fn push(self, scope: &mut Scope) {
        scope.nodes.push(self.0);
    }
}
