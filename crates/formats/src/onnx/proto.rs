//! The messages of an ONNX file as plain structs, their reader and their writer.
//!
//! Reading is lazy where it matters: the payload of a tensor of more than [`INLINE_BYTES`] stays in the file and is
//! recorded as a [`Span`]. Documentation strings of nodes and values are dropped, because exporters put stack traces
//! into them. Unknown fields are skipped, as protobuf asks.

use std::sync::Arc;

use lightering_tier::ByteSource;

use super::AttributeKind;
use crate::protobuf::{Reader, Span, Value, Writer, push_varint};
use crate::{Error, Result};

/// A tensor payload of at most this many bytes is kept in memory; a longer one stays in the file. Enough for the scales
/// and zero points of two thousand channels, which 8-bit kernels need to know before they are chosen.
pub const INLINE_BYTES: u64 = 8 << 10;
/// Most nodes in one file, subgraphs and functions included.
pub const MAX_NODES: u64 = 1 << 20;
/// Longest name of a node, value, operator, domain or attribute.
pub const MAX_NAME_BYTES: u64 = 64 * 1024;
/// Longest documentation or metadata text.
pub const MAX_TEXT_BYTES: u64 = 64 << 20;
/// Most dimensions of a tensor.
pub const MAX_RANK: usize = 64;

/// A key with its value: metadata and external data entries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StringStringEntry {
    /// The key.
    pub key: String,
    /// The value.
    pub value: String,
}

/// An operator set that a model or function uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OperatorSetId {
    /// The domain; empty (or `ai.onnx`) is the standard one.
    pub domain: String,
    /// The version.
    pub version: i64,
}

/// The whole file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelProto {
    /// Version of the file format.
    pub ir_version: i64,
    /// The operator sets in use.
    pub opset_import: Vec<OperatorSetId>,
    /// The program that wrote the model.
    pub producer_name: String,
    /// Its version.
    pub producer_version: String,
    /// Reverse-DNS name of the model's owner.
    pub domain: String,
    /// The owner's version number.
    pub model_version: i64,
    /// Documentation.
    pub doc_string: String,
    /// The main graph.
    pub graph: Option<GraphProto>,
    /// Anything else that the producer noted.
    pub metadata_props: Vec<StringStringEntry>,
    /// True if the file holds training information, which is not read.
    pub has_training_info: bool,
    /// Model-local functions.
    pub functions: Vec<FunctionProto>,
}

/// A graph or subgraph.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GraphProto {
    /// The nodes, in topological order if the file keeps the rules.
    pub node: Vec<NodeProto>,
    /// The graph's name.
    pub name: String,
    /// Constant tensors by name.
    pub initializer: Vec<TensorProto>,
    /// Constant sparse tensors; the name is that of the values.
    pub sparse_initializer: Vec<SparseTensorProto>,
    /// Documentation.
    pub doc_string: String,
    /// The inputs (in old files the initialisers too).
    pub input: Vec<ValueInfoProto>,
    /// The outputs.
    pub output: Vec<ValueInfoProto>,
    /// Declared types of values inside.
    pub value_info: Vec<ValueInfoProto>,
    /// Quantisation parameters by tensor.
    pub quantization_annotation: Vec<TensorAnnotation>,
    /// Anything else.
    pub metadata_props: Vec<StringStringEntry>,
}

/// Quantisation parameters of a tensor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TensorAnnotation {
    /// The tensor.
    pub tensor_name: String,
    /// Which tensor holds which parameter.
    pub quant_parameter_tensor_names: Vec<StringStringEntry>,
}

/// One operation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeProto {
    /// Names of the inputs; empty for an optional input that is not given.
    pub input: Vec<String>,
    /// Names of the outputs; empty for an optional output that is not wanted.
    pub output: Vec<String>,
    /// The node's name; may be empty.
    pub name: String,
    /// The operator.
    pub op_type: String,
    /// Its domain; empty is the standard one.
    pub domain: String,
    /// Which overload of a function.
    pub overload: String,
    /// The attributes.
    pub attribute: Vec<AttributeProto>,
    /// Anything else.
    pub metadata_props: Vec<StringStringEntry>,
}

/// An attribute of a node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttributeProto {
    /// Its name.
    pub name: String,
    /// Inside a function: the function's attribute whose value this one takes.
    pub ref_attr_name: String,
    /// Its value.
    pub value: AttributeValue,
}

/// The value of an attribute.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs)]
pub enum AttributeValue {
    /// No value: a reference in a function body.
    #[default]
    Undefined,
    Float(f32),
    Int(i64),
    String(Vec<u8>),
    Tensor(Box<TensorProto>),
    Graph(Box<GraphProto>),
    SparseTensor(Box<SparseTensorProto>),
    Type(Box<TypeProto>),
    Floats(Vec<f32>),
    Ints(Vec<i64>),
    Strings(Vec<Vec<u8>>),
    Tensors(Vec<TensorProto>),
    Graphs(Vec<GraphProto>),
    SparseTensors(Vec<SparseTensorProto>),
    Types(Vec<TypeProto>),
}

impl AttributeValue {
    /// The kind of this value; `None` if it has none.
    pub fn kind(&self) -> Option<AttributeKind> {
        Some(match self {
            AttributeValue::Undefined => return None,
            AttributeValue::Float(_) => AttributeKind::Float,
            AttributeValue::Int(_) => AttributeKind::Int,
            AttributeValue::String(_) => AttributeKind::String,
            AttributeValue::Tensor(_) => AttributeKind::Tensor,
            AttributeValue::Graph(_) => AttributeKind::Graph,
            AttributeValue::SparseTensor(_) => AttributeKind::SparseTensor,
            AttributeValue::Type(_) => AttributeKind::Type,
            AttributeValue::Floats(_) => AttributeKind::Floats,
            AttributeValue::Ints(_) => AttributeKind::Ints,
            AttributeValue::Strings(_) => AttributeKind::Strings,
            AttributeValue::Tensors(_) => AttributeKind::Tensors,
            AttributeValue::Graphs(_) => AttributeKind::Graphs,
            AttributeValue::SparseTensors(_) => AttributeKind::SparseTensors,
            AttributeValue::Types(_) => AttributeKind::Types,
        })
    }
}

/// Bytes of a tensor: in memory, or still in the file that the message was read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// In memory.
    Inline(Vec<u8>),
    /// In the file.
    Span(Span),
    /// In some other store.
    Stored(Store, Span),
}

/// A shared store of bytes, equal to itself only.
#[derive(Clone)]
pub struct Store(pub Arc<dyn ByteSource>);

impl PartialEq for Store {
    fn eq(&self, other: &Store) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Store {}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Store").field(&self.0.name()).finish()
    }
}

impl Default for Payload {
    fn default() -> Self {
        Payload::Inline(Vec::new())
    }
}

impl Payload {
    /// The number of bytes.
    pub fn size_bytes(&self) -> u64 {
        match self {
            Payload::Inline(bytes) => bytes.len() as u64,
            Payload::Span(span) | Payload::Stored(_, span) => span.size_bytes,
        }
    }
}

/// Where the elements of a tensor stand.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum TensorData {
    /// Nowhere: right for a tensor without elements only.
    #[default]
    Empty,
    /// `raw_data`: little-endian elements, 4-bit types packed in pairs, low half first.
    Raw(Payload),
    /// `float_data`: little-endian f32.
    Floats(Payload),
    /// `double_data`: little-endian f64.
    Doubles(Payload),
    /// `int32_data`: varints.
    Int32s(Payload),
    /// `int64_data`: varints.
    Int64s(Payload),
    /// `uint64_data`: varints.
    Uint64s(Payload),
    /// `string_data`.
    Strings(Vec<Vec<u8>>),
    /// In another file.
    External(ExternalData),
}

/// A range of another file that holds a tensor as raw data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExternalData {
    /// Path relative to the model's folder.
    pub location: String,
    /// First byte.
    pub offset: u64,
    /// Number of bytes, if given.
    pub length: Option<u64>,
    /// SHA-1 of the file, if given; not checked.
    pub checksum: Option<String>,
}

/// A constant tensor.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TensorProto {
    /// Its shape.
    pub dims: Vec<i64>,
    /// Its element type as ONNX numbers them.
    pub data_type: i32,
    /// Its name.
    pub name: String,
    /// Its elements.
    pub data: TensorData,
    /// Anything else.
    pub metadata_props: Vec<StringStringEntry>,
}

/// A constant sparse tensor.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SparseTensorProto {
    /// The values, `[nnz]`.
    pub values: TensorProto,
    /// Where they stand: `[nnz]` linear or `[nnz, rank]`.
    pub indices: TensorProto,
    /// The dense shape.
    pub dims: Vec<i64>,
}

/// One dimension of a declared shape.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Dimension {
    /// Neither a number nor a name.
    #[default]
    Unknown,
    /// A number.
    Value(i64),
    /// A name.
    Param(String),
}

/// The type of a value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum TypeProto {
    /// Not given.
    #[default]
    Unset,
    /// A dense tensor; without a shape the rank is unknown.
    Tensor {
        elem_type: i32,
        shape: Option<Vec<Dimension>>,
    },
    Sequence(Box<TypeProto>),
    Map {
        key_type: i32,
        value_type: Box<TypeProto>,
    },
    Optional(Box<TypeProto>),
    SparseTensor {
        elem_type: i32,
        shape: Option<Vec<Dimension>>,
    },
}

/// A named value with its type.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ValueInfoProto {
    /// The name.
    pub name: String,
    /// The type.
    pub value_type: TypeProto,
    /// Anything else.
    pub metadata_props: Vec<StringStringEntry>,
}

/// A model-local function.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FunctionProto {
    /// Its name, used as an operator type.
    pub name: String,
    /// Names of its inputs.
    pub input: Vec<String>,
    /// Names of its outputs.
    pub output: Vec<String>,
    /// Attributes without a default.
    pub attribute: Vec<String>,
    /// Attributes with their defaults.
    pub attribute_proto: Vec<AttributeProto>,
    /// The body.
    pub node: Vec<NodeProto>,
    /// The operator sets that the body uses.
    pub opset_import: Vec<OperatorSetId>,
    /// Its domain.
    pub domain: String,
    /// Which overload it is.
    pub overload: String,
    /// Declared types of values inside.
    pub value_info: Vec<ValueInfoProto>,
    /// Anything else.
    pub metadata_props: Vec<StringStringEntry>,
}

/// A sequence, map or optional from a test data file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SequenceProto {
    /// Its name.
    pub name: String,
    /// What its elements are, as `SequenceProto.DataType` numbers them.
    pub elem_type: i32,
    /// Its elements if they are tensors.
    pub tensor_values: Vec<TensorProto>,
    /// Its elements if they are sparse tensors.
    pub sparse_tensor_values: Vec<SparseTensorProto>,
    /// Its elements if they are sequences.
    pub sequence_values: Vec<SequenceProto>,
    /// Its elements if they are maps.
    pub map_values: Vec<MapProto>,
    /// Its elements if they are optionals.
    pub optional_values: Vec<OptionalProto>,
}

/// A map from integers or strings.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MapProto {
    /// Its name.
    pub name: String,
    /// The type of the keys as ONNX numbers element types.
    pub key_type: i32,
    /// Integer keys.
    pub keys: Vec<i64>,
    /// String keys.
    pub string_keys: Vec<Vec<u8>>,
    /// The values, in the order of the keys.
    pub values: SequenceProto,
}

/// A value that may be absent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptionalProto {
    /// Its name.
    pub name: String,
    /// What it holds, as `OptionalProto.DataType` numbers them; 0 if nothing.
    pub elem_type: i32,
    /// The value, if there is one.
    pub value: OptionalValue,
}

/// What an [`OptionalProto`] holds.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs)]
pub enum OptionalValue {
    #[default]
    None,
    Tensor(Box<TensorProto>),
    SparseTensor(Box<SparseTensorProto>),
    Sequence(Box<SequenceProto>),
    Map(Box<MapProto>),
    Optional(Box<OptionalProto>),
}

// ---------------------------------------------------------------------------------------------------- reading

/// A reader with the count of nodes seen so far.
struct Parser {
    nodes: u64,
}

/// Reads a message type from a whole source.
pub trait Message: Sized {
    /// Reads the message that `source` holds.
    fn read(source: &dyn ByteSource) -> Result<Self>;
    /// The message, ready to be written. Payloads that are spans are copied from `source`.
    fn to_writer<'a>(&'a self, source: Option<&'a dyn ByteSource>) -> Result<Writer<'a>>;
}

macro_rules! messages {
    ($($t:ident $read:ident $write:ident),* $(,)?) => { $(
        impl Message for $t {
            fn read(source: &dyn ByteSource) -> Result<Self> {
                let mut reader = Reader::new(source);
                let mut parser = Parser { nodes: 0 };
                let span = Span { offset: 0, size_bytes: source.len_bytes().0 };
                reader.nested(stringify!($t), span, |r| parser.$read(r))
            }

            fn to_writer<'a>(&'a self, source: Option<&'a dyn ByteSource>) -> Result<Writer<'a>> {
                Composer { source }.$write(self)
            }
        }
    )* };
}
messages! {
    ModelProto model model, TensorProto tensor tensor, SequenceProto sequence sequence,
    OptionalProto optional optional, MapProto map map, GraphProto graph graph, TypeProto value_type value_type,
}

fn charge<T>(r: &mut Reader) -> Result<()> {
    r.charge(size_of::<T>() as u64)
}

fn name(r: &mut Reader, span: Span) -> Result<String> {
    r.string(span, MAX_NAME_BYTES)
}

fn names(r: &mut Reader, span: Span, out: &mut Vec<String>) -> Result<()> {
    charge::<String>(r)?;
    out.push(name(r, span)?);
    Ok(())
}

fn text(r: &mut Reader, span: Span) -> Result<String> {
    if span.size_bytes > MAX_TEXT_BYTES {
        return Err(Error::limit(r.place(), "length of a text in bytes", span.size_bytes, MAX_TEXT_BYTES));
    }
    // Free text is shown, never compared, so broken UTF-8 in it is no reason to refuse a model.
    Ok(String::from_utf8_lossy(&r.bytes(span)?).into_owned())
}

fn push_int(r: &mut Reader, value: Value, out: &mut Vec<i64>) -> Result<()> {
    match value {
        Value::Varint(v) => {
            charge::<i64>(r)?;
            out.push(v as i64);
            Ok(())
        }
        Value::Span(span) => r.packed_varints(span, |r, v| {
            charge::<i64>(r)?;
            out.push(v as i64);
            Ok(())
        }),
        _ => Err(Error::corrupt(r.place(), "an integer field has a fixed-width wire type")),
    }
}

fn push_dim(r: &mut Reader, value: Value, out: &mut Vec<i64>) -> Result<()> {
    push_int(r, value, out)?;
    if out.len() > MAX_RANK {
        return Err(Error::limit(r.place(), "rank of a tensor", out.len() as u64, MAX_RANK as u64));
    }
    Ok(())
}

fn push_floats(r: &mut Reader, value: Value, out: &mut Vec<f32>) -> Result<()> {
    match value {
        Value::Fixed32(bits) => {
            charge::<f32>(r)?;
            out.push(f32::from_bits(bits));
            Ok(())
        }
        Value::Span(span) if span.size_bytes % 4 == 0 => {
            let bytes = r.bytes(span)?;
            out.extend(bytes.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])));
            Ok(())
        }
        _ => Err(Error::corrupt(r.place(), "a float field is not made of 4-byte numbers")),
    }
}

/// Takes a payload in, keeping a long one in the file. A field that comes in several parts (which protobuf allows and
/// no exporter does) is put together in memory.
fn payload(r: &mut Reader, value: Value, so_far: Option<Payload>, single: usize) -> Result<Payload> {
    let mut so_far = match so_far {
        None => match value {
            Value::Span(span) if span.size_bytes > INLINE_BYTES => return Ok(Payload::Span(span)),
            _ => Vec::new(),
        },
        Some(Payload::Inline(bytes)) => bytes,
        Some(Payload::Span(span) | Payload::Stored(_, span)) => r.bytes(span)?,
    };
    match (value, single) {
        (Value::Span(span), _) => so_far.extend(r.bytes(span)?),
        (Value::Varint(v), 0) => push_varint(&mut so_far, v),
        (Value::Fixed32(v), 4) => so_far.extend(v.to_le_bytes()),
        (Value::Fixed64(v), 8) => so_far.extend(v.to_le_bytes()),
        _ => return Err(Error::corrupt(r.place(), "tensor data has the wrong wire type")),
    }
    r.charge(single.max(1) as u64)?;
    Ok(Payload::Inline(so_far))
}

fn int32(value: u64) -> i32 {
    // Negative int32 values are sign-extended to 64 bits on the wire; the low half is the value.
    value as i32
}

impl Parser {
    fn entry(&mut self, r: &mut Reader, span: Span) -> Result<StringStringEntry> {
        charge::<StringStringEntry>(r)?;
        r.nested("StringStringEntryProto", span, |r| {
            let mut out = StringStringEntry::default();
            while let Some(field) = r.next_field()? {
                match (field.number, field.value) {
                    (1, Value::Span(s)) => out.key = text(r, s)?,
                    (2, Value::Span(s)) => out.value = text(r, s)?,
                    _ => {}
                }
            }
            Ok(out)
        })
    }

    fn opset(&mut self, r: &mut Reader, span: Span) -> Result<OperatorSetId> {
        charge::<OperatorSetId>(r)?;
        r.nested("OperatorSetIdProto", span, |r| {
            let mut out = OperatorSetId::default();
            while let Some(field) = r.next_field()? {
                match (field.number, field.value) {
                    (1, Value::Span(s)) => out.domain = name(r, s)?,
                    (2, Value::Varint(v)) => out.version = v as i64,
                    _ => {}
                }
            }
            Ok(out)
        })
    }

    fn model(&mut self, r: &mut Reader) -> Result<ModelProto> {
        let mut out = ModelProto::default();
        while let Some(field) = r.next_field()? {
            match (field.number, field.value) {
                (1, Value::Varint(v)) => out.ir_version = v as i64,
                (2, Value::Span(s)) => out.producer_name = text(r, s)?,
                (3, Value::Span(s)) => out.producer_version = text(r, s)?,
                (4, Value::Span(s)) => out.domain = text(r, s)?,
                (5, Value::Varint(v)) => out.model_version = v as i64,
                (6, Value::Span(s)) => out.doc_string = text(r, s)?,
                (7, Value::Span(s)) => {
                    if out.graph.is_some() {
                        return Err(Error::corrupt(r.place(), "the model has two graphs"));
                    }
                    out.graph = Some(r.nested("GraphProto", s, |r| self.graph(r))?);
                }
                (8, Value::Span(s)) => out.opset_import.push(self.opset(r, s)?),
                (14, Value::Span(s)) => out.metadata_props.push(self.entry(r, s)?),
                (20, Value::Span(_)) => out.has_training_info = true,
                (25, Value::Span(s)) => {
                    charge::<FunctionProto>(r)?;
                    out.functions.push(r.nested("FunctionProto", s, |r| self.function(r))?);
                }
                _ => {}
            }
        }
        Ok(out)
    }

    fn graph(&mut self, r: &mut Reader) -> Result<GraphProto> {
        let mut out = GraphProto::default();
        while let Some(field) = r.next_field()? {
            match (field.number, field.value) {
                (1, Value::Span(s)) => out.node.push(self.node(r, s)?),
                (2, Value::Span(s)) => out.name = text(r, s)?,
                (5, Value::Span(s)) => {
                    charge::<TensorProto>(r)?;
                    out.initializer.push(r.nested("TensorProto", s, |r| self.tensor(r))?);
                }
                (10, Value::Span(s)) => out.doc_string = text(r, s)?,
                (11, Value::Span(s)) => out.input.push(self.value_info(r, s)?),
                (12, Value::Span(s)) => out.output.push(self.value_info(r, s)?),
                (13, Value::Span(s)) => out.value_info.push(self.value_info(r, s)?),
                (14, Value::Span(s)) => {
                    charge::<TensorAnnotation>(r)?;
                    let annotation = r.nested("TensorAnnotation", s, |r| {
                        let mut out = TensorAnnotation::default();
                        while let Some(field) = r.next_field()? {
                            match (field.number, field.value) {
                                (1, Value::Span(s)) => out.tensor_name = name(r, s)?,
                                (2, Value::Span(s)) => {
                                    out.quant_parameter_tensor_names.push(self.entry(r, s)?);
                                }
                                _ => {}
                            }
                        }
                        Ok(out)
                    })?;
                    out.quantization_annotation.push(annotation);
                }
                (15, Value::Span(s)) => {
                    charge::<SparseTensorProto>(r)?;
                    out.sparse_initializer.push(r.nested("SparseTensorProto", s, |r| self.sparse(r))?);
                }
                (16, Value::Span(s)) => out.metadata_props.push(self.entry(r, s)?),
                _ => {}
            }
        }
        Ok(out)
    }

    fn node(&mut self, r: &mut Reader, span: Span) -> Result<NodeProto> {
        charge::<NodeProto>(r)?;
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            return Err(Error::limit(r.place(), "number of nodes", self.nodes, MAX_NODES));
        }
        r.nested("NodeProto", span, |r| {
            let mut out = NodeProto::default();
            while let Some(field) = r.next_field()? {
                match (field.number, field.value) {
                    (1, Value::Span(s)) => names(r, s, &mut out.input)?,
                    (2, Value::Span(s)) => names(r, s, &mut out.output)?,
                    (3, Value::Span(s)) => out.name = name(r, s)?,
                    (4, Value::Span(s)) => out.op_type = name(r, s)?,
                    (5, Value::Span(s)) => out.attribute.push(self.attribute(r, s)?),
                    (7, Value::Span(s)) => out.domain = name(r, s)?,
                    (8, Value::Span(s)) => out.overload = name(r, s)?,
                    (9, Value::Span(s)) => out.metadata_props.push(self.entry(r, s)?),
                    _ => {}
                }
            }
            Ok(out)
        })
    }

    fn function(&mut self, r: &mut Reader) -> Result<FunctionProto> {
        let mut out = FunctionProto::default();
        while let Some(field) = r.next_field()? {
            match (field.number, field.value) {
                (1, Value::Span(s)) => out.name = name(r, s)?,
                (4, Value::Span(s)) => names(r, s, &mut out.input)?,
                (5, Value::Span(s)) => names(r, s, &mut out.output)?,
                (6, Value::Span(s)) => names(r, s, &mut out.attribute)?,
                (7, Value::Span(s)) => out.node.push(self.node(r, s)?),
                (9, Value::Span(s)) => out.opset_import.push(self.opset(r, s)?),
                (10, Value::Span(s)) => out.domain = name(r, s)?,
                (11, Value::Span(s)) => out.attribute_proto.push(self.attribute(r, s)?),
                (12, Value::Span(s)) => out.value_info.push(self.value_info(r, s)?),
                (13, Value::Span(s)) => out.overload = name(r, s)?,
                (14, Value::Span(s)) => out.metadata_props.push(self.entry(r, s)?),
                _ => {}
            }
        }
        Ok(out)
    }

    fn attribute(&mut self, r: &mut Reader, span: Span) -> Result<AttributeProto> {
        charge::<AttributeProto>(r)?;
        r.nested("AttributeProto", span, |r| self.attribute_body(r))
    }

    fn attribute_body(&mut self, r: &mut Reader) -> Result<AttributeProto> {
        let mut out = AttributeProto::default();
        let mut declared = 0;
        let (mut float, mut int, mut string) = (None, None, None);
        let (mut tensor, mut graph, mut sparse, mut value_type) = (None, None, None, None);
        let (mut floats, mut ints, mut strings) = (Vec::new(), Vec::new(), Vec::new());
        let (mut tensors, mut graphs, mut sparses, mut types) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        while let Some(field) = r.next_field()? {
            match (field.number, field.value) {
                (1, Value::Span(s)) => out.name = name(r, s)?,
                (2, Value::Fixed32(v)) => float = Some(f32::from_bits(v)),
                (3, Value::Varint(v)) => int = Some(v as i64),
                (4, Value::Span(s)) => string = Some(r.bytes(s)?),
                (5, Value::Span(s)) => tensor = Some(r.nested("TensorProto", s, |r| self.tensor(r))?),
                (6, Value::Span(s)) => graph = Some(r.nested("GraphProto", s, |r| self.graph(r))?),
                (7, v) => push_floats(r, v, &mut floats)?,
                (8, v) => push_int(r, v, &mut ints)?,
                (9, Value::Span(s)) => {
                    charge::<Vec<u8>>(r)?;
                    strings.push(r.bytes(s)?);
                }
                (10, Value::Span(s)) => {
                    charge::<TensorProto>(r)?;
                    tensors.push(r.nested("TensorProto", s, |r| self.tensor(r))?);
                }
                (11, Value::Span(s)) => {
                    charge::<GraphProto>(r)?;
                    graphs.push(r.nested("GraphProto", s, |r| self.graph(r))?);
                }
                (14, Value::Span(s)) => {
                    value_type = Some(r.nested("TypeProto", s, |r| self.value_type(r))?);
                }
                (15, Value::Span(s)) => {
                    charge::<TypeProto>(r)?;
                    types.push(r.nested("TypeProto", s, |r| self.value_type(r))?);
                }
                (20, Value::Varint(v)) => declared = int32(v),
                (21, Value::Span(s)) => out.ref_attr_name = name(r, s)?,
                (22, Value::Span(s)) => {
                    sparse = Some(r.nested("SparseTensorProto", s, |r| self.sparse(r))?);
                }
                (23, Value::Span(s)) => {
                    charge::<SparseTensorProto>(r)?;
                    sparses.push(r.nested("SparseTensorProto", s, |r| self.sparse(r))?);
                }
                _ => {}
            }
        }
        if !out.ref_attr_name.is_empty() {
            return Ok(out);
        }
        // The first version of the format had no discriminator: then whichever field is there decides.
        let kind = match declared {
            0 => [
                (float.is_some(), AttributeKind::Float),
                (int.is_some(), AttributeKind::Int),
                (string.is_some(), AttributeKind::String),
                (tensor.is_some(), AttributeKind::Tensor),
                (graph.is_some(), AttributeKind::Graph),
                (sparse.is_some(), AttributeKind::SparseTensor),
                (value_type.is_some(), AttributeKind::Type),
                (!floats.is_empty(), AttributeKind::Floats),
                (!ints.is_empty(), AttributeKind::Ints),
                (!strings.is_empty(), AttributeKind::Strings),
                (!tensors.is_empty(), AttributeKind::Tensors),
                (!graphs.is_empty(), AttributeKind::Graphs),
                (!sparses.is_empty(), AttributeKind::SparseTensors),
                (!types.is_empty(), AttributeKind::Types),
            ]
            .into_iter()
            .find_map(|(there, kind)| there.then_some(kind)),
            declared => Some(AttributeKind::from_onnx(declared).ok_or_else(|| {
                Error::invalid(
                    r.place(),
                    format!("attribute {:?} is of type {declared}", out.name),
                    "an attribute type from 1 to 14",
                )
            })?),
        };
        let missing = |what: &str| {
            Error::invalid(r.place(), format!("attribute {:?} has no value", out.name), format!("a {what}"))
        };
        out.value = match kind {
            None => AttributeValue::Undefined,
            // Writers of the newer protobuf syntax leave out scalars that are zero or empty.
            Some(AttributeKind::Float) => AttributeValue::Float(float.unwrap_or(0.0)),
            Some(AttributeKind::Int) => AttributeValue::Int(int.unwrap_or(0)),
            Some(AttributeKind::String) => AttributeValue::String(string.unwrap_or_default()),
            Some(AttributeKind::Tensor) => {
                AttributeValue::Tensor(Box::new(tensor.ok_or_else(|| missing("tensor"))?))
            }
            Some(AttributeKind::Graph) => {
                AttributeValue::Graph(Box::new(graph.ok_or_else(|| missing("graph"))?))
            }
            Some(AttributeKind::SparseTensor) => {
                AttributeValue::SparseTensor(Box::new(sparse.ok_or_else(|| missing("sparse tensor"))?))
            }
            Some(AttributeKind::Type) => {
                AttributeValue::Type(Box::new(value_type.ok_or_else(|| missing("type"))?))
            }
            Some(AttributeKind::Floats) => AttributeValue::Floats(floats),
            Some(AttributeKind::Ints) => AttributeValue::Ints(ints),
            Some(AttributeKind::Strings) => AttributeValue::Strings(strings),
            Some(AttributeKind::Tensors) => AttributeValue::Tensors(tensors),
            Some(AttributeKind::Graphs) => AttributeValue::Graphs(graphs),
            Some(AttributeKind::SparseTensors) => AttributeValue::SparseTensors(sparses),
            Some(AttributeKind::Types) => AttributeValue::Types(types),
        };
        Ok(out)
    }

    fn value_info(&mut self, r: &mut Reader, span: Span) -> Result<ValueInfoProto> {
        charge::<ValueInfoProto>(r)?;
        r.nested("ValueInfoProto", span, |r| {
            let mut out = ValueInfoProto::default();
            while let Some(field) = r.next_field()? {
                match (field.number, field.value) {
                    (1, Value::Span(s)) => out.name = name(r, s)?,
                    (2, Value::Span(s)) => {
                        out.value_type = r.nested("TypeProto", s, |r| self.value_type(r))?;
                    }
                    (4, Value::Span(s)) => out.metadata_props.push(self.entry(r, s)?),
                    _ => {}
                }
            }
            Ok(out)
        })
    }

    fn value_type(&mut self, r: &mut Reader) -> Result<TypeProto> {
        let mut out = TypeProto::default();
        while let Some(field) = r.next_field()? {
            let Value::Span(s) = field.value else { continue };
            match field.number {
                1 | 8 => {
                    let (elem_type, shape) = r.nested("TypeProto.Tensor", s, |r| self.tensor_type(r))?;
                    out = if field.number == 1 {
                        TypeProto::Tensor { elem_type, shape }
                    } else {
                        TypeProto::SparseTensor { elem_type, shape }
                    };
                }
                4 | 9 => {
                    let inner = r.nested("TypeProto.Sequence", s, |r| {
                        let mut inner = TypeProto::Unset;
                        while let Some(field) = r.next_field()? {
                            if let (1, Value::Span(s)) = (field.number, field.value) {
                                charge::<TypeProto>(r)?;
                                inner = r.nested("TypeProto", s, |r| self.value_type(r))?;
                            }
                        }
                        Ok(inner)
                    })?;
                    out = if field.number == 4 {
                        TypeProto::Sequence(Box::new(inner))
                    } else {
                        TypeProto::Optional(Box::new(inner))
                    };
                }
                5 => {
                    out = r.nested("TypeProto.Map", s, |r| {
                        let (mut key_type, mut value_type) = (0, TypeProto::Unset);
                        while let Some(field) = r.next_field()? {
                            match (field.number, field.value) {
                                (1, Value::Varint(v)) => key_type = int32(v),
                                (2, Value::Span(s)) => {
                                    charge::<TypeProto>(r)?;
                                    value_type = r.nested("TypeProto", s, |r| self.value_type(r))?;
                                }
                                _ => {}
                            }
                        }
                        Ok(TypeProto::Map { key_type, value_type: Box::new(value_type) })
                    })?;
                }
                _ => {}
            }
        }
        Ok(out)
    }

    fn tensor_type(&mut self, r: &mut Reader) -> Result<(i32, Option<Vec<Dimension>>)> {
        let (mut elem_type, mut shape) = (0, None);
        while let Some(field) = r.next_field()? {
            match (field.number, field.value) {
                (1, Value::Varint(v)) => elem_type = int32(v),
                (2, Value::Span(s)) => {
                    let dims = r.nested("TensorShapeProto", s, |r| {
                        let mut dims = Vec::new();
                        while let Some(field) = r.next_field()? {
                            let (1, Value::Span(s)) = (field.number, field.value) else { continue };
                            charge::<Dimension>(r)?;
                            dims.push(r.nested("Dimension", s, |r| {
                                let mut dim = Dimension::Unknown;
                                while let Some(field) = r.next_field()? {
                                    match (field.number, field.value) {
                                        (1, Value::Varint(v)) => dim = Dimension::Value(v as i64),
                                        (2, Value::Span(s)) => {
                                            let param = name(r, s)?;
                                            dim = if param.is_empty() {
                                                Dimension::Unknown
                                            } else {
                                                Dimension::Param(param)
                                            };
                                        }
                                        _ => {}
                                    }
                                }
                                Ok(dim)
                            })?);
                            if dims.len() > MAX_RANK {
                                return Err(Error::limit(
                                    r.place(),
                                    "rank of a tensor",
                                    dims.len() as u64,
                                    MAX_RANK as u64,
                                ));
                            }
                        }
                        Ok(dims)
                    })?;
                    shape = Some(dims);
                }
                _ => {}
            }
        }
        Ok((elem_type, shape))
    }

    fn tensor(&mut self, r: &mut Reader) -> Result<TensorProto> {
        let mut out = TensorProto::default();
        let mut external = false;
        let mut entries = Vec::new();
        let mut strings = Vec::new();
        // One slot for each numeric data field: raw, float, double, int32, int64, uint64.
        let mut slots: [Option<Payload>; 6] = Default::default();
        while let Some(field) = r.next_field()? {
            match (field.number, field.value) {
                (1, v) => push_dim(r, v, &mut out.dims)?,
                (2, Value::Varint(v)) => out.data_type = int32(v),
                (3, Value::Span(_)) => {
                    return Err(Error::unsupported(r.place(), "a tensor in segments"));
                }
                (4, v) => slots[1] = Some(payload(r, v, slots[1].take(), 4)?),
                (5, v) => slots[3] = Some(payload(r, v, slots[3].take(), 0)?),
                (6, Value::Span(s)) => {
                    charge::<Vec<u8>>(r)?;
                    strings.push(r.bytes(s)?);
                }
                (7, v) => slots[4] = Some(payload(r, v, slots[4].take(), 0)?),
                (8, Value::Span(s)) => out.name = name(r, s)?,
                // The last one wins, as for every field that is not repeated.
                (9, v) => slots[0] = Some(payload(r, v, None, 1)?),
                (10, v) => slots[2] = Some(payload(r, v, slots[2].take(), 8)?),
                (11, v) => slots[5] = Some(payload(r, v, slots[5].take(), 0)?),
                (13, Value::Span(s)) => entries.push(self.entry(r, s)?),
                (14, Value::Varint(v)) => external = v == 1,
                (16, Value::Span(s)) => out.metadata_props.push(self.entry(r, s)?),
                _ => {}
            }
        }
        let given = slots.iter().flatten().filter(|p| p.size_bytes() > 0).count()
            + usize::from(!strings.is_empty())
            + usize::from(external);
        if given > 1 {
            return Err(Error::invalid(
                r.place(),
                format!("tensor {:?} has its data in {given} places", out.name),
                "one of raw_data, the typed fields and external data",
            ));
        }
        out.data = if external {
            TensorData::External(external_data(&out.name, &entries)?)
        } else if !strings.is_empty() {
            TensorData::Strings(strings)
        } else {
            let found = slots.iter_mut().position(|s| s.as_ref().is_some_and(|p| p.size_bytes() > 0));
            match found.and_then(|i| Some((i, slots[i].take()?))) {
                None => TensorData::Empty,
                Some((0, p)) => TensorData::Raw(p),
                Some((1, p)) => TensorData::Floats(p),
                Some((2, p)) => TensorData::Doubles(p),
                Some((3, p)) => TensorData::Int32s(p),
                Some((4, p)) => TensorData::Int64s(p),
                Some((_, p)) => TensorData::Uint64s(p),
            }
        };
        Ok(out)
    }

    fn sparse(&mut self, r: &mut Reader) -> Result<SparseTensorProto> {
        let mut out = SparseTensorProto::default();
        while let Some(field) = r.next_field()? {
            match (field.number, field.value) {
                (1, Value::Span(s)) => out.values = r.nested("TensorProto", s, |r| self.tensor(r))?,
                (2, Value::Span(s)) => out.indices = r.nested("TensorProto", s, |r| self.tensor(r))?,
                (3, v) => push_dim(r, v, &mut out.dims)?,
                _ => {}
            }
        }
        Ok(out)
    }

    fn sequence(&mut self, r: &mut Reader) -> Result<SequenceProto> {
        let mut out = SequenceProto::default();
        while let Some(field) = r.next_field()? {
            match (field.number, field.value) {
                (1, Value::Span(s)) => out.name = name(r, s)?,
                (2, Value::Varint(v)) => out.elem_type = int32(v),
                (3, Value::Span(s)) => {
                    charge::<TensorProto>(r)?;
                    out.tensor_values.push(r.nested("TensorProto", s, |r| self.tensor(r))?);
                }
                (4, Value::Span(s)) => {
                    charge::<SparseTensorProto>(r)?;
                    out.sparse_tensor_values.push(r.nested("SparseTensorProto", s, |r| self.sparse(r))?);
                }
                (5, Value::Span(s)) => {
                    charge::<SequenceProto>(r)?;
                    out.sequence_values.push(r.nested("SequenceProto", s, |r| self.sequence(r))?);
                }
                (6, Value::Span(s)) => {
                    charge::<MapProto>(r)?;
                    out.map_values.push(r.nested("MapProto", s, |r| self.map(r))?);
                }
                (7, Value::Span(s)) => {
                    charge::<OptionalProto>(r)?;
                    out.optional_values.push(r.nested("OptionalProto", s, |r| self.optional(r))?);
                }
                _ => {}
            }
        }
        Ok(out)
    }

    fn map(&mut self, r: &mut Reader) -> Result<MapProto> {
        let mut out = MapProto::default();
        while let Some(field) = r.next_field()? {
            match (field.number, field.value) {
                (1, Value::Span(s)) => out.name = name(r, s)?,
                (2, Value::Varint(v)) => out.key_type = int32(v),
                (3, v) => push_int(r, v, &mut out.keys)?,
                (4, Value::Span(s)) => {
                    charge::<Vec<u8>>(r)?;
                    out.string_keys.push(r.bytes(s)?);
                }
                (5, Value::Span(s)) => out.values = r.nested("SequenceProto", s, |r| self.sequence(r))?,
                _ => {}
            }
        }
        Ok(out)
    }

    fn optional(&mut self, r: &mut Reader) -> Result<OptionalProto> {
        let mut out = OptionalProto::default();
        while let Some(field) = r.next_field()? {
            match (field.number, field.value) {
                (1, Value::Span(s)) => out.name = name(r, s)?,
                (2, Value::Varint(v)) => out.elem_type = int32(v),
                (3, Value::Span(s)) => {
                    let value = r.nested("TensorProto", s, |r| self.tensor(r))?;
                    out.value = OptionalValue::Tensor(Box::new(value));
                }
                (4, Value::Span(s)) => {
                    let value = r.nested("SparseTensorProto", s, |r| self.sparse(r))?;
                    out.value = OptionalValue::SparseTensor(Box::new(value));
                }
                (5, Value::Span(s)) => {
                    let value = r.nested("SequenceProto", s, |r| self.sequence(r))?;
                    out.value = OptionalValue::Sequence(Box::new(value));
                }
                (6, Value::Span(s)) => {
                    let value = r.nested("MapProto", s, |r| self.map(r))?;
                    out.value = OptionalValue::Map(Box::new(value));
                }
                (7, Value::Span(s)) => {
                    let value = r.nested("OptionalProto", s, |r| self.optional(r))?;
                    out.value = OptionalValue::Optional(Box::new(value));
                }
                _ => {}
            }
        }
        Ok(out)
    }
}

fn external_data(tensor: &str, entries: &[StringStringEntry]) -> Result<ExternalData> {
    let number = |entry: &StringStringEntry| {
        entry.value.parse::<u64>().map_err(|_| {
            Error::invalid(
                format!("tensor {tensor:?}"),
                format!("external data {} is {:?}", entry.key, entry.value),
                "a number of bytes",
            )
        })
    };
    let mut out = ExternalData::default();
    for entry in entries {
        match entry.key.as_str() {
            "location" => out.location.clone_from(&entry.value),
            "offset" => out.offset = number(entry)?,
            "length" => out.length = Some(number(entry)?),
            "checksum" => out.checksum = Some(entry.value.clone()),
            // `basepath` and keys of other tools do not change where the data is.
            _ => {}
        }
    }
    if out.location.is_empty() {
        return Err(Error::invalid(
            format!("tensor {tensor:?}"),
            "external data without a location",
            "a path relative to the model's folder",
        ));
    }
    Ok(out)
}

// ---------------------------------------------------------------------------------------------------- writing

struct Composer<'a> {
    source: Option<&'a dyn ByteSource>,
}

impl<'a> Composer<'a> {
    fn entries(&self, w: &mut Writer<'a>, number: u32, entries: &'a [StringStringEntry]) {
        for entry in entries {
            let mut inner = Writer::new();
            inner.string(1, &entry.key);
            inner.string(2, &entry.value);
            w.message(number, inner);
        }
    }

    fn opsets(&self, w: &mut Writer<'a>, number: u32, opsets: &'a [OperatorSetId]) {
        for opset in opsets {
            let mut inner = Writer::new();
            inner.string(1, &opset.domain);
            inner.int(2, opset.version);
            w.message(number, inner);
        }
    }

    fn model(&self, m: &'a ModelProto) -> Result<Writer<'a>> {
        let mut w = Writer::new();
        w.int(1, m.ir_version);
        w.string_if_any(2, &m.producer_name);
        w.string_if_any(3, &m.producer_version);
        w.string_if_any(4, &m.domain);
        if m.model_version != 0 {
            w.int(5, m.model_version);
        }
        w.string_if_any(6, &m.doc_string);
        if let Some(graph) = &m.graph {
            w.message(7, self.graph(graph)?);
        }
        self.opsets(&mut w, 8, &m.opset_import);
        self.entries(&mut w, 14, &m.metadata_props);
        for f in &m.functions {
            let mut inner = Writer::new();
            inner.string_if_any(1, &f.name);
            f.input.iter().for_each(|s| inner.string(4, s));
            f.output.iter().for_each(|s| inner.string(5, s));
            f.attribute.iter().for_each(|s| inner.string(6, s));
            for node in &f.node {
                inner.message(7, self.node(node)?);
            }
            self.opsets(&mut inner, 9, &f.opset_import);
            inner.string_if_any(10, &f.domain);
            for attribute in &f.attribute_proto {
                inner.message(11, self.attribute(attribute)?);
            }
            for value in &f.value_info {
                inner.message(12, self.value_info(value)?);
            }
            inner.string_if_any(13, &f.overload);
            self.entries(&mut inner, 14, &f.metadata_props);
            w.message(25, inner);
        }
        Ok(w)
    }

    fn graph(&self, g: &'a GraphProto) -> Result<Writer<'a>> {
        let mut w = Writer::new();
        for node in &g.node {
            w.message(1, self.node(node)?);
        }
        w.string_if_any(2, &g.name);
        for tensor in &g.initializer {
            w.message(5, self.tensor(tensor)?);
        }
        w.string_if_any(10, &g.doc_string);
        for value in &g.input {
            w.message(11, self.value_info(value)?);
        }
        for value in &g.output {
            w.message(12, self.value_info(value)?);
        }
        for value in &g.value_info {
            w.message(13, self.value_info(value)?);
        }
        for annotation in &g.quantization_annotation {
            let mut inner = Writer::new();
            inner.string(1, &annotation.tensor_name);
            self.entries(&mut inner, 2, &annotation.quant_parameter_tensor_names);
            w.message(14, inner);
        }
        for tensor in &g.sparse_initializer {
            w.message(15, self.sparse(tensor)?);
        }
        self.entries(&mut w, 16, &g.metadata_props);
        Ok(w)
    }

    fn node(&self, n: &'a NodeProto) -> Result<Writer<'a>> {
        let mut w = Writer::new();
        n.input.iter().for_each(|s| w.string(1, s));
        n.output.iter().for_each(|s| w.string(2, s));
        w.string_if_any(3, &n.name);
        w.string(4, &n.op_type);
        for attribute in &n.attribute {
            w.message(5, self.attribute(attribute)?);
        }
        w.string_if_any(7, &n.domain);
        w.string_if_any(8, &n.overload);
        self.entries(&mut w, 9, &n.metadata_props);
        Ok(w)
    }

    fn attribute(&self, a: &'a AttributeProto) -> Result<Writer<'a>> {
        let mut w = Writer::new();
        w.string(1, &a.name);
        match &a.value {
            AttributeValue::Undefined => {}
            AttributeValue::Float(v) => w.fixed32(2, v.to_bits()),
            AttributeValue::Int(v) => w.int(3, *v),
            AttributeValue::String(v) => w.bytes(4, v),
            AttributeValue::Tensor(v) => w.message(5, self.tensor(v)?),
            AttributeValue::Graph(v) => w.message(6, self.graph(v)?),
            AttributeValue::Floats(v) => v.iter().for_each(|f| w.fixed32(7, f.to_bits())),
            AttributeValue::Ints(v) => v.iter().for_each(|i| w.int(8, *i)),
            AttributeValue::Strings(v) => v.iter().for_each(|s| w.bytes(9, s)),
            AttributeValue::Tensors(v) => {
                for t in v {
                    w.message(10, self.tensor(t)?);
                }
            }
            AttributeValue::Graphs(v) => {
                for g in v {
                    w.message(11, self.graph(g)?);
                }
            }
            AttributeValue::Type(v) => w.message(14, self.value_type(v)?),
            AttributeValue::Types(v) => {
                for t in v {
                    w.message(15, self.value_type(t)?);
                }
            }
            AttributeValue::SparseTensor(v) => w.message(22, self.sparse(v)?),
            AttributeValue::SparseTensors(v) => {
                for t in v {
                    w.message(23, self.sparse(t)?);
                }
            }
        }
        if let Some(kind) = a.value.kind() {
            w.int(20, i64::from(kind.to_onnx()));
        }
        w.string_if_any(21, &a.ref_attr_name);
        Ok(w)
    }

    fn value_info(&self, v: &'a ValueInfoProto) -> Result<Writer<'a>> {
        let mut w = Writer::new();
        w.string(1, &v.name);
        if v.value_type != TypeProto::Unset {
            w.message(2, self.value_type(&v.value_type)?);
        }
        self.entries(&mut w, 4, &v.metadata_props);
        Ok(w)
    }

    fn value_type(&self, t: &'a TypeProto) -> Result<Writer<'a>> {
        let mut w = Writer::new();
        match t {
            TypeProto::Unset => {}
            TypeProto::Tensor { elem_type, shape } | TypeProto::SparseTensor { elem_type, shape } => {
                let mut inner = Writer::new();
                inner.int(1, i64::from(*elem_type));
                if let Some(dims) = shape {
                    let mut message = Writer::new();
                    for dim in dims {
                        let mut d = Writer::new();
                        match dim {
                            Dimension::Unknown => {}
                            Dimension::Value(v) => d.int(1, *v),
                            Dimension::Param(p) => d.string(2, p),
                        }
                        message.message(1, d);
                    }
                    inner.message(2, message);
                }
                w.message(if matches!(t, TypeProto::Tensor { .. }) { 1 } else { 8 }, inner);
            }
            TypeProto::Sequence(element) | TypeProto::Optional(element) => {
                let mut inner = Writer::new();
                if **element != TypeProto::Unset {
                    inner.message(1, self.value_type(element)?);
                }
                w.message(if matches!(t, TypeProto::Sequence(_)) { 4 } else { 9 }, inner);
            }
            TypeProto::Map { key_type, value_type } => {
                let mut inner = Writer::new();
                inner.int(1, i64::from(*key_type));
                if **value_type != TypeProto::Unset {
                    inner.message(2, self.value_type(value_type)?);
                }
                w.message(5, inner);
            }
        }
        Ok(w)
    }

    fn payload(&self, w: &mut Writer<'a>, number: u32, payload: &'a Payload) -> Result<()> {
        match (payload, self.source) {
            (Payload::Inline(bytes), _) if bytes.len() as u64 <= INLINE_BYTES => w.bytes(number, bytes),
            (Payload::Inline(bytes), _) => w.borrowed(number, bytes),
            (Payload::Span(span), Some(source)) => w.copied(number, source, *span),
            (Payload::Stored(store, span), _) => w.copied(number, &*store.0, *span),
            (Payload::Span(_), None) => {
                return Err(Error::invalid(
                    "writing a tensor",
                    "its data is in the file that it was read from, which is not at hand",
                    "the source of the model",
                ));
            }
        }
        Ok(())
    }

    fn tensor(&self, t: &'a TensorProto) -> Result<Writer<'a>> {
        let mut w = Writer::new();
        t.dims.iter().for_each(|d| w.int(1, *d));
        w.int(2, i64::from(t.data_type));
        match &t.data {
            TensorData::Empty | TensorData::External(_) => {}
            TensorData::Floats(p) => self.payload(&mut w, 4, p)?,
            TensorData::Int32s(p) => self.payload(&mut w, 5, p)?,
            TensorData::Strings(strings) => strings.iter().for_each(|s| w.bytes(6, s)),
            TensorData::Int64s(p) => self.payload(&mut w, 7, p)?,
            TensorData::Raw(p) => self.payload(&mut w, 9, p)?,
            TensorData::Doubles(p) => self.payload(&mut w, 10, p)?,
            TensorData::Uint64s(p) => self.payload(&mut w, 11, p)?,
        }
        w.string_if_any(8, &t.name);
        if let TensorData::External(external) = &t.data {
            let mut entry = |key: &str, value: &str| {
                let mut inner = Writer::new();
                inner.string(1, key);
                inner.string(2, value);
                w.message(13, inner);
            };
            entry("location", &external.location);
            entry("offset", &external.offset.to_string());
            if let Some(length) = external.length {
                entry("length", &length.to_string());
            }
            if let Some(checksum) = &external.checksum {
                entry("checksum", checksum);
            }
            w.int(14, 1);
        }
        self.entries(&mut w, 16, &t.metadata_props);
        Ok(w)
    }

    fn sparse(&self, t: &'a SparseTensorProto) -> Result<Writer<'a>> {
        let mut w = Writer::new();
        w.message(1, self.tensor(&t.values)?);
        w.message(2, self.tensor(&t.indices)?);
        t.dims.iter().for_each(|d| w.int(3, *d));
        Ok(w)
    }

    fn sequence(&self, s: &'a SequenceProto) -> Result<Writer<'a>> {
        let mut w = Writer::new();
        w.string_if_any(1, &s.name);
        w.int(2, i64::from(s.elem_type));
        for v in &s.tensor_values {
            w.message(3, self.tensor(v)?);
        }
        for v in &s.sparse_tensor_values {
            w.message(4, self.sparse(v)?);
        }
        for v in &s.sequence_values {
            w.message(5, self.sequence(v)?);
        }
        for v in &s.map_values {
            w.message(6, self.map(v)?);
        }
        for v in &s.optional_values {
            w.message(7, self.optional(v)?);
        }
        Ok(w)
    }

    fn map(&self, m: &'a MapProto) -> Result<Writer<'a>> {
        let mut w = Writer::new();
        w.string_if_any(1, &m.name);
        w.int(2, i64::from(m.key_type));
        m.keys.iter().for_each(|k| w.int(3, *k));
        m.string_keys.iter().for_each(|k| w.bytes(4, k));
        w.message(5, self.sequence(&m.values)?);
        Ok(w)
    }

    fn optional(&self, o: &'a OptionalProto) -> Result<Writer<'a>> {
        let mut w = Writer::new();
        w.string_if_any(1, &o.name);
        w.int(2, i64::from(o.elem_type));
        match &o.value {
            OptionalValue::None => {}
            OptionalValue::Tensor(v) => w.message(3, self.tensor(v)?),
            OptionalValue::SparseTensor(v) => w.message(4, self.sparse(v)?),
            OptionalValue::Sequence(v) => w.message(5, self.sequence(v)?),
            OptionalValue::Map(v) => w.message(6, self.map(v)?),
            OptionalValue::Optional(v) => w.message(7, self.optional(v)?),
        }
        Ok(w)
    }
}
