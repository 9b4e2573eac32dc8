//! ONNX files: messages, tensors, and the way from and to a graph.
//!
//! [`ModelFile`] reads a model's structure and leaves its weights in the file; [`import`] turns it into a graph with
//! the weights as stored constants; [`export`] and [`save_model`] (or [`save_model_external`], for what does not fit
//! into one message) are the way back. [`read_value`] and [`write_value`] are for the `.pb` files of test cases.

mod export;
mod file;
mod import;
pub mod proto;
mod tensor;

pub use export::export;
pub use file::{MAX_MESSAGE_BYTES, ModelFile, read_value, save_model, save_model_external, write_value};
pub use import::{Imported, MAX_OPSET, import};
pub use tensor::{ReadExternal, decode_tensor, dtype_from_onnx, dtype_to_onnx, encode_tensor};

/// The kinds of attribute values, numbered as ONNX numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
#[repr(i32)]
pub enum AttributeKind {
    Float = 1,
    Int = 2,
    String = 3,
    Tensor = 4,
    Graph = 5,
    Floats = 6,
    Ints = 7,
    Strings = 8,
    Tensors = 9,
    Graphs = 10,
    SparseTensor = 11,
    SparseTensors = 12,
    Type = 13,
    Types = 14,
}

impl AttributeKind {
    const ALL: [AttributeKind; 14] = [
        AttributeKind::Float,
        AttributeKind::Int,
        AttributeKind::String,
        AttributeKind::Tensor,
        AttributeKind::Graph,
        AttributeKind::Floats,
        AttributeKind::Ints,
        AttributeKind::Strings,
        AttributeKind::Tensors,
        AttributeKind::Graphs,
        AttributeKind::SparseTensor,
        AttributeKind::SparseTensors,
        AttributeKind::Type,
        AttributeKind::Types,
    ];

    /// The kind with this number.
    pub fn from_onnx(number: i32) -> Option<AttributeKind> {
        Self::ALL.into_iter().find(|k| *k as i32 == number)
    }

    /// The number of this kind.
    pub fn to_onnx(self) -> i32 {
        self as i32
    }

    /// Its name as ONNX writes it.
    pub fn name(self) -> &'static str {
        match self {
            AttributeKind::Float => "float",
            AttributeKind::Int => "int",
            AttributeKind::String => "string",
            AttributeKind::Tensor => "tensor",
            AttributeKind::Graph => "graph",
            AttributeKind::Floats => "floats",
            AttributeKind::Ints => "ints",
            AttributeKind::Strings => "strings",
            AttributeKind::Tensors => "tensors",
            AttributeKind::Graphs => "graphs",
            AttributeKind::SparseTensor => "sparse tensor",
            AttributeKind::SparseTensors => "sparse tensors",
            AttributeKind::Type => "type",
            AttributeKind::Types => "types",
        }
    }
}

#[cfg(test)]
mod tests;
