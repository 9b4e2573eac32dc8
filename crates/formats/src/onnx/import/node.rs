//! One node of the model: its operands by position and its attributes by name, each read at most as what it is.

use std::cell::RefCell;

use lightering_graph::{DType, ValueId};

use super::builder::GraphBuilder;
use crate::onnx::proto::{AttributeValue, GraphProto, NodeProto, SparseTensorProto, TensorProto, TypeProto};
use crate::onnx::{AttributeKind, dtype_from_onnx};
use crate::{Error, Result};

/// How messages name a node.
pub(super) fn place(node: &NodeProto) -> String {
    let first = node.output.iter().find(|o| !o.is_empty());
    match (node.name.as_str(), first) {
        ("", Some(output)) => format!("node that makes {output:?} ({})", node.op_type),
        (name, _) => format!("node {name:?} ({})", node.op_type),
    }
}

pub(super) struct NodeReader<'p> {
    proto: &'p NodeProto,
    place: String,
    /// Version of the operator set of the node's domain.
    pub opset: i64,
    /// The operands; trailing absent ones are dropped.
    pub inputs: Vec<Option<ValueId>>,
    read: RefCell<Vec<bool>>,
}

macro_rules! scalar_attribute {
    ($(#[$doc:meta])* $name:ident, $variant:ident, $type:ty) => {
        $(#[$doc])*
        pub fn $name(&self, name: &str) -> Result<Option<$type>> {
            match self.attribute(name) {
                None => Ok(None),
                Some(AttributeValue::$variant(v)) => Ok(Some(v)),
                Some(other) => Err(self.wrong_kind(name, other, AttributeKind::$variant)),
            }
        }
    };
}

impl<'p> NodeReader<'p> {
    pub fn new(proto: &'p NodeProto, opset: i64, b: &GraphBuilder) -> Result<NodeReader<'p>> {
        let mut reader = NodeReader {
            proto,
            place: place(proto),
            opset,
            inputs: Vec::new(),
            read: RefCell::new(vec![false; proto.attribute.len()]),
        };
        for name in &proto.input {
            let id = if name.is_empty() {
                None
            } else {
                *b.names.get(name).ok_or_else(|| {
                    reader.invalid(
                        format!("input {name:?} is made by nothing"),
                        "the name of an input, an initializer or a node's output",
                    )
                })?
            };
            reader.inputs.push(id);
        }
        while reader.inputs.last() == Some(&None) {
            reader.inputs.pop();
        }
        for (i, attribute) in proto.attribute.iter().enumerate() {
            if proto.attribute[..i].iter().any(|a| a.name == attribute.name) {
                return Err(
                    reader.invalid(format!("attribute {:?} twice", attribute.name), "each attribute once")
                );
            }
            if !attribute.ref_attr_name.is_empty() {
                return Err(reader.invalid(
                    format!("attribute {:?} refers to an attribute of a function", attribute.name),
                    "such references inside of functions only",
                ));
            }
        }
        Ok(reader)
    }

    pub fn op_type(&self) -> &'p str {
        &self.proto.op_type
    }

    pub fn place(&self) -> &str {
        &self.place
    }

    /// What values made for this node are named after.
    pub fn name(&self) -> &'p str {
        if !self.proto.name.is_empty() {
            return &self.proto.name;
        }
        self.proto.output.iter().find(|o| !o.is_empty()).map_or(self.proto.op_type.as_str(), String::as_str)
    }

    /// Names of the outputs; trailing unwanted ones are dropped.
    pub fn outputs(&self) -> impl Iterator<Item = &'p str> {
        let count = self.proto.output.iter().rposition(|o| !o.is_empty()).map_or(0, |i| i + 1);
        self.proto.output[..count].iter().map(String::as_str)
    }

    pub fn output_count(&self) -> usize {
        self.outputs().count()
    }

    pub fn input(&self, index: usize) -> Option<ValueId> {
        self.inputs.get(index).copied().flatten()
    }

    /// Operand `index`, which must be there; `name` is what the operator calls it.
    pub fn required(&self, index: usize, name: &str) -> Result<ValueId> {
        self.input(index).ok_or_else(|| {
            self.invalid(format!("input {index} is missing"), format!("the operand {name:?} there"))
        })
    }

    pub fn max_inputs(&self, most: usize) -> Result<()> {
        if self.inputs.len() > most {
            return Err(self.invalid(format!("{} inputs", self.inputs.len()), format!("at most {most}")));
        }
        Ok(())
    }

    pub fn invalid(&self, what: impl std::fmt::Display, expected: impl std::fmt::Display) -> Error {
        Error::invalid(&self.place, what, expected)
    }

    pub fn unsupported(&self, what: impl std::fmt::Display) -> Error {
        Error::unsupported(&self.place, what)
    }

    pub fn unknown_operator(&self) -> Error {
        let domain = if self.proto.domain.is_empty() { "ai.onnx" } else { &self.proto.domain };
        self.unsupported(format!(
            "the operator {} of domain {domain}, version {}",
            self.op_type(),
            self.opset
        ))
    }

    fn attribute(&self, name: &str) -> Option<&'p AttributeValue> {
        let index = self.proto.attribute.iter().position(|a| a.name == name)?;
        self.read.borrow_mut()[index] = true;
        match &self.proto.attribute[index].value {
            AttributeValue::Undefined => None,
            value => Some(value),
        }
    }

    pub fn has(&self, name: &str) -> bool {
        self.proto.attribute.iter().any(|a| a.name == name)
    }

    fn wrong_kind(&self, name: &str, found: &AttributeValue, expected: AttributeKind) -> Error {
        let found = found.kind().map_or("nothing", AttributeKind::name);
        self.invalid(format!("attribute {name:?} is of type {found}"), expected.name())
    }

    /// Every attribute must have been read by now; one that was not is not understood.
    pub fn check_all_read(&self) -> Result<()> {
        let read = self.read.borrow();
        match (0..read.len()).find(|i| !read[*i]) {
            None => Ok(()),
            Some(i) => Err(self.invalid(
                format!("attribute {:?}", self.proto.attribute[i].name),
                format!("an attribute of {}, version {}", self.op_type(), self.opset),
            )),
        }
    }

    /// Marks an attribute as read that has no effect here.
    pub fn ignore(&self, name: &str) {
        let _ = self.attribute(name);
    }

    scalar_attribute!(int_ref, Int, &'p i64);
    scalar_attribute!(float_ref, Float, &'p f32);
    scalar_attribute!(string_ref, String, &'p Vec<u8>);
    scalar_attribute!(ints_ref, Ints, &'p Vec<i64>);
    scalar_attribute!(floats_ref, Floats, &'p Vec<f32>);
    scalar_attribute!(strings_ref, Strings, &'p Vec<Vec<u8>>);
    scalar_attribute!(tensor_ref, Tensor, &'p Box<TensorProto>);
    scalar_attribute!(graph_ref, Graph, &'p Box<GraphProto>);
    scalar_attribute!(sparse_ref, SparseTensor, &'p Box<SparseTensorProto>);
    scalar_attribute!(type_ref, Type, &'p Box<TypeProto>);

    pub fn int_if_any(&self, name: &str) -> Result<Option<i64>> {
        Ok(self.int_ref(name)?.copied())
    }

    pub fn int(&self, name: &str, default: i64) -> Result<i64> {
        Ok(self.int_if_any(name)?.unwrap_or(default))
    }

    pub fn int_required(&self, name: &str) -> Result<i64> {
        self.int_if_any(name)?.ok_or_else(|| self.no_attribute(name))
    }

    pub fn no_attribute(&self, name: &str) -> Error {
        self.invalid(format!("no attribute {name:?}"), "this attribute, which has no default")
    }

    pub fn flag(&self, name: &str, default: bool) -> Result<bool> {
        match self.int(name, i64::from(default))? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.invalid(format!("attribute {name:?} is {other}"), "0 or 1")),
        }
    }

    /// An attribute that counts something.
    pub fn size(&self, name: &str, default: usize) -> Result<usize> {
        match self.int_if_any(name)? {
            None => Ok(default),
            Some(value) => self.to_size(name, value),
        }
    }

    fn to_size(&self, name: &str, value: i64) -> Result<usize> {
        // No dimension, count or index of a model that fits into memory is larger.
        usize::try_from(value)
            .ok()
            .filter(|v| *v <= i32::MAX as usize)
            .ok_or_else(|| self.invalid(format!("attribute {name:?} holds {value}"), "0 to 2147483647"))
    }

    pub fn float(&self, name: &str, default: f32) -> Result<f32> {
        Ok(self.float_ref(name)?.copied().unwrap_or(default))
    }

    pub fn float_if_any(&self, name: &str) -> Result<Option<f32>> {
        Ok(self.float_ref(name)?.copied())
    }

    pub fn ints(&self, name: &str) -> Result<Option<&'p [i64]>> {
        match self.attribute(name) {
            // Some exporters write a list of one as a number.
            Some(AttributeValue::Int(v)) => Ok(Some(std::slice::from_ref(v))),
            Some(AttributeValue::Floats(v)) if v.is_empty() => Ok(Some(&[])),
            _ => Ok(self.ints_ref(name)?.map(Vec::as_slice)),
        }
    }

    pub fn ints_required(&self, name: &str) -> Result<&'p [i64]> {
        self.ints(name)?.ok_or_else(|| self.no_attribute(name))
    }

    /// Non-negative numbers; none if the attribute is not there.
    pub fn sizes(&self, name: &str) -> Result<Vec<usize>> {
        self.ints(name)?.unwrap_or(&[]).iter().map(|v| self.to_size(name, *v)).collect()
    }

    /// Positive numbers; none if the attribute is not there.
    pub fn positive(&self, name: &str) -> Result<Vec<usize>> {
        let sizes = self.sizes(name)?;
        if sizes.contains(&0) {
            return Err(self.invalid(format!("attribute {name:?} holds 0"), "1 or more"));
        }
        Ok(sizes)
    }

    pub fn floats(&self, name: &str) -> Result<Vec<f32>> {
        match self.attribute(name) {
            Some(AttributeValue::Ints(v)) if v.is_empty() => Ok(Vec::new()),
            _ => Ok(self.floats_ref(name)?.cloned().unwrap_or_default()),
        }
    }

    fn text(&self, name: &str, bytes: &'p [u8]) -> Result<&'p str> {
        std::str::from_utf8(bytes)
            .map_err(|_| self.invalid(format!("attribute {name:?} is not valid UTF-8"), "UTF-8"))
    }

    pub fn string_if_any(&self, name: &str) -> Result<Option<&'p str>> {
        self.string_ref(name)?.map(|bytes| self.text(name, bytes)).transpose()
    }

    pub fn string(&self, name: &str, default: &'static str) -> Result<&'p str> {
        Ok(self.string_if_any(name)?.unwrap_or(default))
    }

    pub fn strings(&self, name: &str) -> Result<Option<Vec<String>>> {
        if let Some(AttributeValue::Ints(v)) = self.attribute(name)
            && v.is_empty()
        {
            return Ok(None);
        }
        let Some(values) = self.strings_ref(name)? else { return Ok(None) };
        values.iter().map(|bytes| Ok(self.text(name, bytes)?.to_owned())).collect::<Result<_>>().map(Some)
    }

    pub fn graph(&self, name: &str) -> Result<&'p GraphProto> {
        self.graph_ref(name)?.map(|g| &**g).ok_or_else(|| self.no_attribute(name))
    }

    /// One of a few spellings.
    pub fn choice<T: Copy>(&self, name: &str, default: &'static str, choices: &[(&str, T)]) -> Result<T> {
        let value = self.string(name, default)?;
        choices.iter().find(|(spelling, _)| *spelling == value).map(|(_, choice)| *choice).ok_or_else(|| {
            let expected: Vec<_> = choices.iter().map(|(spelling, _)| *spelling).collect();
            self.invalid(
                format!("attribute {name:?} is {value:?}"),
                format!("one of {}", expected.join(", ")),
            )
        })
    }

    pub fn dtype_if_any(&self, name: &str) -> Result<Option<DType>> {
        let Some(number) = self.int_if_any(name)? else { return Ok(None) };
        let dtype = i32::try_from(number).ok().and_then(dtype_from_onnx).ok_or_else(|| {
            self.invalid(format!("attribute {name:?} is {number}"), "an element type from 1 to 23")
        })?;
        Ok(Some(dtype))
    }

    pub fn dtype(&self, name: &str, default: DType) -> Result<DType> {
        Ok(self.dtype_if_any(name)?.unwrap_or(default))
    }
}
