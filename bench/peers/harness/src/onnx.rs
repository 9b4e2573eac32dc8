//! The part of ONNX's protobuf messages that the backend cases need.

use crate::value::{Dtype, Tensor, Value};
use anyhow::{Context, Result, bail};
use prost::Message;

#[derive(Clone, PartialEq, Message)]
pub struct ModelProto {
    #[prost(message, optional, tag = "7")]
    pub graph: Option<GraphProto>,
}

#[derive(Clone, PartialEq, Message)]
pub struct GraphProto {
    #[prost(message, repeated, tag = "1")]
    pub node: Vec<NodeProto>,
    #[prost(message, repeated, tag = "5")]
    pub initializer: Vec<InitializerName>,
    #[prost(message, repeated, tag = "11")]
    pub input: Vec<ValueInfoProto>,
    #[prost(message, repeated, tag = "12")]
    pub output: Vec<ValueInfoProto>,
}

#[derive(Clone, PartialEq, Message)]
pub struct InitializerName {
    #[prost(string, tag = "8")]
    pub name: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct NodeProto {
    #[prost(string, tag = "4")]
    pub op_type: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct ValueInfoProto {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(message, optional, tag = "2")]
    pub r#type: Option<TypeProto>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Anything {}

#[derive(Clone, PartialEq, Message)]
pub struct TypeProto {
    #[prost(message, optional, tag = "4")]
    pub sequence_type: Option<Anything>,
    #[prost(message, optional, tag = "9")]
    pub optional_type: Option<Anything>,
}

#[derive(Clone, PartialEq, Message)]
pub struct TensorProto {
    #[prost(int64, repeated, tag = "1")]
    pub dims: Vec<i64>,
    #[prost(int32, tag = "2")]
    pub data_type: i32,
    #[prost(float, repeated, tag = "4")]
    pub float_data: Vec<f32>,
    #[prost(int32, repeated, tag = "5")]
    pub int32_data: Vec<i32>,
    #[prost(bytes = "vec", repeated, tag = "6")]
    pub string_data: Vec<Vec<u8>>,
    #[prost(int64, repeated, tag = "7")]
    pub int64_data: Vec<i64>,
    #[prost(bytes = "vec", optional, tag = "9")]
    pub raw_data: Option<Vec<u8>>,
    #[prost(double, repeated, tag = "10")]
    pub double_data: Vec<f64>,
    #[prost(uint64, repeated, tag = "11")]
    pub uint64_data: Vec<u64>,
}

#[derive(Clone, PartialEq, Message)]
pub struct SequenceProto {
    #[prost(message, repeated, tag = "3")]
    pub tensor_values: Vec<TensorProto>,
    #[prost(message, repeated, tag = "5")]
    pub sequence_values: Vec<SequenceProto>,
}

#[derive(Clone, PartialEq, Message)]
pub struct OptionalProto {
    #[prost(int32, tag = "2")]
    pub elem_type: i32,
    #[prost(message, optional, tag = "3")]
    pub tensor_value: Option<TensorProto>,
    #[prost(message, optional, tag = "5")]
    pub sequence_value: Option<SequenceProto>,
}

impl TensorProto {
    pub fn to_tensor(&self) -> Result<Tensor> {
        let dtype = Dtype::from_onnx(self.data_type)?;
        let shape: Vec<usize> = self.dims.iter().map(|&d| usize::try_from(d)).collect::<Result<_, _>>()?;
        let count: usize = shape.iter().product();
        if dtype == Dtype::String {
            let strings = self.string_data.iter().map(|s| String::from_utf8_lossy(s).into_owned()).collect();
            return Ok(Tensor { dtype, shape, bytes: Vec::new(), strings });
        }
        let bytes: Vec<u8> = match &self.raw_data {
            Some(raw) if !raw.is_empty() || count == 0 => raw.clone(),
            _ => match dtype {
                Dtype::F32 => self.float_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
                Dtype::F64 => self.double_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
                Dtype::I64 => self.int64_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
                Dtype::U64 => self.uint64_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
                Dtype::U32 => self.uint64_data.iter().flat_map(|&x| (x as u32).to_le_bytes()).collect(),
                Dtype::I32 => self.int32_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
                Dtype::U16 | Dtype::I16 | Dtype::F16 | Dtype::Bf16 => {
                    self.int32_data.iter().flat_map(|&x| (x as u16).to_le_bytes()).collect()
                }
                Dtype::U8 | Dtype::I8 | Dtype::Bool => self.int32_data.iter().map(|&x| x as u8).collect(),
                Dtype::String => Vec::new(),
            },
        };
        if bytes.len() != count * dtype.size() {
            bail!("tensor of shape {shape:?} has {} bytes", bytes.len());
        }
        Ok(Tensor { dtype, shape, bytes, strings: Vec::new() })
    }
}

impl SequenceProto {
    pub fn to_value(&self) -> Result<Value> {
        let mut items = Vec::new();
        for tensor in &self.tensor_values {
            items.push(Value::Tensor(tensor.to_tensor()?));
        }
        for sequence in &self.sequence_values {
            items.push(sequence.to_value()?);
        }
        Ok(Value::Sequence(items))
    }
}

/// Reads `input_K.pb` or `output_K.pb` with the type that the graph declares for it.
pub fn read_value(path: &std::path::Path, info: &ValueInfoProto) -> Result<Value> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    let bytes = bytes.as_slice();
    let declared = info.r#type.clone().unwrap_or_default();
    if declared.optional_type.is_some() {
        let optional = OptionalProto::decode(bytes)?;
        return match (&optional.tensor_value, &optional.sequence_value) {
            (Some(tensor), _) => Ok(Value::Tensor(tensor.to_tensor()?)),
            (_, Some(sequence)) => sequence.to_value(),
            _ => Ok(Value::Absent),
        };
    }
    if declared.sequence_type.is_some() {
        return SequenceProto::decode(bytes)?.to_value();
    }
    Ok(Value::Tensor(TensorProto::decode(bytes)?.to_tensor()?))
}
