//! Model files on disk: the lazily read model, its external data, and test data files.

use std::collections::BTreeMap;
use std::io::{BufWriter, Read, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex};

use lightering_graph::{DType, Tensor};
use lightering_tier::{ByteSource, FileSource};

use super::proto::{
    ExternalData, INLINE_BYTES, MapProto, Message, ModelProto, OptionalProto, OptionalValue, Payload,
    SequenceProto, SparseTensorProto, TensorData, TensorProto, TypeProto,
};
use super::tensor::{ReadExternal, decode_tensor, direct_span, encode_tensor, raw_size, tensor_type};
use crate::protobuf::Span;
use crate::tensor::checked_size;
use crate::{Error, HostValue, Result};

/// A model whose weights are still in its file.
pub struct ModelFile {
    /// The model's structure.
    pub model: ModelProto,
    source: Arc<dyn ByteSource>,
    folder: Option<PathBuf>,
    external: Mutex<BTreeMap<String, Arc<dyn ByteSource>>>,
}

impl std::fmt::Debug for ModelFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelFile").field("source", &self.source.name()).finish_non_exhaustive()
    }
}

impl ModelFile {
    /// Opens a model; its structure is read, its weights are not.
    pub fn open(path: impl AsRef<Path>) -> Result<ModelFile> {
        let path = path.as_ref();
        let source = FileSource::open(path).map_err(|e| Error::io("opening the model", e))?;
        let folder = match path.parent() {
            Some(parent) if parent.as_os_str().is_empty() => PathBuf::from("."),
            Some(parent) => parent.to_owned(),
            None => PathBuf::from("."),
        };
        let mut file = Self::from_source(Arc::new(source)).map_err(|e| e.within(path.display()))?;
        file.folder = Some(folder);
        Ok(file)
    }

    /// A model in memory. It cannot have external data.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<ModelFile> {
        Self::from_source(Arc::new(bytes))
    }

    /// A model in any store of bytes. It cannot have external data.
    pub fn from_source(source: Arc<dyn ByteSource>) -> Result<ModelFile> {
        let model = ModelProto::read(&*source)?;
        Ok(ModelFile { model, source, folder: None, external: Mutex::default() })
    }

    /// The store that the model was read from.
    pub fn source(&self) -> &Arc<dyn ByteSource> {
        &self.source
    }

    /// Decodes a tensor of this model.
    pub fn tensor(&self, proto: &TensorProto) -> Result<Tensor> {
        decode_tensor(proto, &*self.source, &|proto, out| {
            let (source, span) = self.external(proto, out.len())?;
            source.read_at(span.offset, out).map_err(|e| Error::io(source.name(), e))
        })
    }

    /// Where a tensor's elements stand in a store exactly as they are in memory, if they do: then nothing needs to be
    /// decoded, and they can be read, or streamed, when they are needed.
    pub fn locate(&self, proto: &TensorProto) -> Result<Option<(Arc<dyn ByteSource>, Span)>> {
        let (dtype, shape) = tensor_type(proto)?;
        let place = format!("tensor {:?}", proto.name);
        let (count, size_bytes) = checked_size(&place, dtype, &shape)?;
        if let TensorData::External(_) = proto.data {
            let raw = raw_size(dtype, count);
            let found = self.external(proto, raw)?;
            let direct = raw == size_bytes && dtype != DType::Bool;
            return Ok(direct.then_some(found));
        }
        let Some(span) = direct_span(proto, dtype) else { return Ok(None) };
        if span.size_bytes != size_bytes as u64 {
            return Err(Error::invalid(
                place,
                format!("{} bytes for {dtype} elements of shape {shape:?}", span.size_bytes),
                format!("{size_bytes} bytes"),
            ));
        }
        if span.offset.checked_add(span.size_bytes).is_none_or(|end| end > self.source.len_bytes().0) {
            return Err(Error::corrupt(place, "its data lies outside of the file"));
        }
        Ok(Some((Arc::clone(&self.source), span)))
    }

    fn external(&self, proto: &TensorProto, size_bytes: usize) -> Result<(Arc<dyn ByteSource>, Span)> {
        let TensorData::External(external) = &proto.data else {
            unreachable!("only called for external tensors");
        };
        let place = format!("tensor {:?}", proto.name);
        let source = self.external_source(external).map_err(|e| e.within(&place))?;
        let size_bytes = size_bytes as u64;
        if external.length.is_some_and(|length| length != size_bytes) {
            return Err(Error::invalid(
                place,
                format!("external data of {} bytes", external.length.unwrap_or(0)),
                format!("{size_bytes} bytes for its type and shape"),
            ));
        }
        let available = source.len_bytes().0;
        if external.offset.checked_add(size_bytes).is_none_or(|end| end > available) {
            return Err(Error::invalid(
                place,
                format!("external data of {size_bytes} bytes at offset {}", external.offset),
                format!("a range inside {:?}, which has {available} bytes", external.location),
            ));
        }
        Ok((source, Span { offset: external.offset, size_bytes }))
    }

    fn external_source(&self, external: &ExternalData) -> Result<Arc<dyn ByteSource>> {
        let mut opened = self.external.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(source) = opened.get(&external.location) {
            return Ok(Arc::clone(source));
        }
        let Some(folder) = &self.folder else {
            return Err(Error::unsupported("external data", "a second file for a model that is not a file"));
        };
        let path = inside(folder, &external.location)?;
        let source: Arc<dyn ByteSource> =
            Arc::new(FileSource::open(&path).map_err(|e| Error::io("external data", e))?);
        opened.insert(external.location.clone(), Arc::clone(&source));
        Ok(source)
    }

    /// Writes the model (as its fields stand now), copying weights that are still in the source.
    pub fn write_to(&self, out: &mut dyn Write) -> Result<()> {
        self.model.to_writer(Some(&*self.source))?.write_to(out)
    }
}

/// The file at `location` below `folder`; an error if it leads out of it in any way.
fn inside(folder: &Path, location: &str) -> Result<PathBuf> {
    let relative = Path::new(location);
    let escape = || {
        Error::invalid(
            "external data",
            format!("the location {location:?}"),
            "a relative path that stays inside the model's folder",
        )
    };
    if location.is_empty()
        || location.contains('\0')
        || !relative.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir))
    {
        return Err(escape());
    }
    let resolve =
        |path: &Path| path.canonicalize().map_err(|e| Error::io(format!("external data {location:?}"), e));
    let folder = resolve(folder)?;
    let path = resolve(&folder.join(relative))?;
    if !path.starts_with(&folder) {
        return Err(escape());
    }
    // A pipe or a device would block, or never end.
    if !path.metadata().map_err(|e| Error::io(format!("external data {location:?}"), e))?.is_file() {
        return Err(Error::invalid("external data", format!("{location:?}"), "an ordinary file"));
    }
    Ok(path)
}

/// Largest message that other readers accept; a larger model needs its weights in a second file.
pub const MAX_MESSAGE_BYTES: u64 = i32::MAX as u64;
/// Weights in a second file start at multiples of this, so that they can be mapped and read directly.
const EXTERNAL_ALIGNMENT: u64 = 4096;
/// A single copy moves at most this many bytes.
const COPY_BYTES: u64 = 256 * 1024;

/// Writes a model to one file, copying weights that are spans from `source`.
///
/// # Errors
/// A model of more than [`MAX_MESSAGE_BYTES`], for which there is [`save_model_external`].
pub fn save_model(model: &ModelProto, source: Option<&dyn ByteSource>, path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    let message = model.to_writer(source)?;
    if message.size_bytes() > MAX_MESSAGE_BYTES {
        return Err(Error::limit(
            path.display(),
            "size in bytes of a model in one file (weights may stand in a second one)",
            message.size_bytes(),
            MAX_MESSAGE_BYTES,
        ));
    }
    replace_file(path, &mut |out| message.write_to(out))
}

/// Writes a model to `path` and its weights of more than [`INLINE_BYTES`] to a second file beside it, whose name is
/// that of the first with `.data` behind it.
pub fn save_model_external(
    model: &ModelProto,
    source: Option<&dyn ByteSource>,
    path: impl AsRef<Path>,
) -> Result<()> {
    let path = path.as_ref();
    let mut data_path = path.as_os_str().to_owned();
    data_path.push(".data");
    let data_path = PathBuf::from(data_path);
    let location = data_path
        .file_name()
        .and_then(|name| name.to_str())
        .ok_or_else(|| Error::invalid(path.display(), "a file name that is not text", "a UTF-8 file name"))?
        .to_owned();
    let mut model = model.clone();
    // The payloads move out of the structs into this list, so that nothing is in memory twice.
    let mut payloads: Vec<(u64, Payload)> = Vec::new();
    let mut end = 0u64;
    if let Some(graph) = &mut model.graph {
        for tensor in &mut graph.initializer {
            let TensorData::Raw(payload) = &mut tensor.data else { continue };
            let size = payload.size_bytes();
            if size <= INLINE_BYTES {
                continue;
            }
            let offset = end.next_multiple_of(EXTERNAL_ALIGNMENT);
            end = offset + size;
            payloads.push((offset, std::mem::take(payload)));
            let (location, length) = (location.clone(), Some(size));
            tensor.data = TensorData::External(ExternalData { location, offset, length, checksum: None });
        }
    }
    replace_file(&data_path, &mut |out| {
        let failed = |e| Error::io(data_path.display(), e);
        let mut position = 0;
        for (offset, payload) in &payloads {
            std::io::copy(&mut std::io::repeat(0).take(offset - position), out).map_err(failed)?;
            position = offset + payload.size_bytes();
            let (store, span) = match (payload, source) {
                (Payload::Inline(bytes), _) => {
                    out.write_all(bytes).map_err(failed)?;
                    continue;
                }
                (Payload::Stored(store, span), _) => (&*store.0, span),
                (Payload::Span(span), Some(source)) => (source, span),
                (Payload::Span(_), None) => {
                    return Err(Error::invalid(
                        path.display(),
                        "weights in the file that they were read from, which is not at hand",
                        "the source of the model",
                    ));
                }
            };
            let mut done = 0;
            let mut buffer = Vec::new();
            while done < span.size_bytes {
                buffer.resize((span.size_bytes - done).min(COPY_BYTES) as usize, 0);
                store.read_at(span.offset + done, &mut buffer).map_err(|e| Error::io(store.name(), e))?;
                out.write_all(&buffer).map_err(failed)?;
                done += buffer.len() as u64;
            }
        }
        Ok(())
    })?;
    save_model(&model, source, path)
}

/// Writes a file beside `path` and puts it in its place when it is whole: the target may be the file that the weights
/// come from.
fn replace_file(path: &Path, write: &mut dyn FnMut(&mut dyn Write) -> Result<()>) -> Result<()> {
    let failed = |e| Error::io(path.display(), e);
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let written = std::fs::File::create(&partial).map_err(failed).and_then(|file| {
        let mut out = BufWriter::new(file);
        write(&mut out)?;
        out.flush().map_err(failed)
    });
    match written.and_then(|()| std::fs::rename(&partial, path).map_err(failed)) {
        Ok(()) => Ok(()),
        Err(error) => {
            // The error that matters is the one above.
            let _ = std::fs::remove_file(&partial);
            Err(error)
        }
    }
}

const NO_EXTERNAL: ReadExternal = &|proto, _| {
    Err(Error::unsupported(format!("tensor {:?}", proto.name), "external data in a test data file"))
};

/// Reads a `.pb` file of test data (`input_0.pb`), which holds a tensor, a sequence or an optional: which one is known
/// only from the type that the model declares for it. [`TypeProto::Unset`] means a tensor.
pub fn read_value(source: &dyn ByteSource, declared: &TypeProto) -> Result<HostValue> {
    match declared {
        TypeProto::Sequence(_) => sequence_value(&SequenceProto::read(source)?, source),
        TypeProto::Optional(_) => optional_value(&OptionalProto::read(source)?, source),
        TypeProto::Map { .. } => map_value(&MapProto::read(source)?, source),
        TypeProto::SparseTensor { .. } => Err(Error::unsupported("test data", "a sparse tensor")),
        TypeProto::Tensor { .. } | TypeProto::Unset => tensor_value(&TensorProto::read(source)?, source),
    }
}

fn tensor_value(proto: &TensorProto, source: &dyn ByteSource) -> Result<HostValue> {
    decode_tensor(proto, source, NO_EXTERNAL).map(HostValue::Tensor)
}

fn sparse_value(proto: &SparseTensorProto) -> Result<HostValue> {
    Err(Error::unsupported(format!("value {:?}", proto.values.name), "a sparse tensor"))
}

fn sequence_value(proto: &SequenceProto, source: &dyn ByteSource) -> Result<HostValue> {
    let mut out = Vec::new();
    for v in &proto.tensor_values {
        out.push(tensor_value(v, source)?);
    }
    for v in &proto.sparse_tensor_values {
        out.push(sparse_value(v)?);
    }
    for v in &proto.sequence_values {
        out.push(sequence_value(v, source)?);
    }
    for v in &proto.map_values {
        out.push(map_value(v, source)?);
    }
    for v in &proto.optional_values {
        out.push(optional_value(v, source)?);
    }
    Ok(HostValue::Sequence(out))
}

fn map_value(proto: &MapProto, source: &dyn ByteSource) -> Result<HostValue> {
    let keys = if proto.string_keys.is_empty() {
        Tensor::from_slice(&[proto.keys.len()], &proto.keys)
    } else {
        let texts = proto
            .string_keys
            .iter()
            .map(|k| {
                String::from_utf8(k.clone()).map_err(|_| Error::corrupt("map", "a key is not valid UTF-8"))
            })
            .collect::<Result<Vec<_>>>()?;
        Tensor::from_strings(&[texts.len()], texts)
    };
    let HostValue::Sequence(values) = sequence_value(&proto.values, source)? else {
        unreachable!("sequence_value returns a sequence");
    };
    if values.len() != keys.len() {
        return Err(Error::invalid(
            format!("map {:?}", proto.name),
            format!("{} values", values.len()),
            format!("one for each of {} keys", keys.len()),
        ));
    }
    Ok(HostValue::Map(keys, values))
}

fn optional_value(proto: &OptionalProto, source: &dyn ByteSource) -> Result<HostValue> {
    let inner = match &proto.value {
        OptionalValue::None => None,
        OptionalValue::Tensor(v) => Some(tensor_value(v, source)?),
        OptionalValue::SparseTensor(v) => Some(sparse_value(v)?),
        OptionalValue::Sequence(v) => Some(sequence_value(v, source)?),
        OptionalValue::Map(v) => Some(map_value(v, source)?),
        OptionalValue::Optional(v) => Some(optional_value(v, source)?),
    };
    Ok(HostValue::Optional(inner.map(Box::new)))
}

/// Writes a value as test data, in the message that belongs to its kind.
pub fn write_value(name: &str, value: &HostValue, out: &mut dyn Write) -> Result<()> {
    match value {
        HostValue::Tensor(tensor) => encode_tensor(name, tensor).to_writer(None)?.write_to(out),
        HostValue::Sequence(_) => sequence_proto(name, value)?.to_writer(None)?.write_to(out),
        HostValue::Optional(_) => optional_proto(name, value)?.to_writer(None)?.write_to(out),
        HostValue::Map(..) => map_proto(name, value)?.to_writer(None)?.write_to(out),
    }
}

// The kinds of elements, numbered as SequenceProto and OptionalProto number them.
const KIND_TENSOR: i32 = 1;
const KIND_SEQUENCE: i32 = 3;
const KIND_MAP: i32 = 4;
const KIND_OPTIONAL: i32 = 5;

fn sequence_proto(name: &str, value: &HostValue) -> Result<SequenceProto> {
    let HostValue::Sequence(elements) = value else {
        return Err(Error::invalid(format!("value {name:?}"), "another kind of value", "a sequence"));
    };
    let mut out = SequenceProto { name: name.to_owned(), elem_type: KIND_TENSOR, ..Default::default() };
    for element in elements {
        match element {
            HostValue::Tensor(tensor) => out.tensor_values.push(encode_tensor("", tensor)),
            HostValue::Sequence(_) => {
                out.elem_type = KIND_SEQUENCE;
                out.sequence_values.push(sequence_proto("", element)?);
            }
            HostValue::Map(..) => {
                out.elem_type = KIND_MAP;
                out.map_values.push(map_proto("", element)?);
            }
            HostValue::Optional(_) => {
                out.elem_type = KIND_OPTIONAL;
                out.optional_values.push(optional_proto("", element)?);
            }
        }
    }
    Ok(out)
}

fn map_proto(name: &str, value: &HostValue) -> Result<MapProto> {
    let HostValue::Map(keys, values) = value else {
        return Err(Error::invalid(format!("value {name:?}"), "another kind of value", "a map"));
    };
    let mut out = MapProto {
        name: name.to_owned(),
        key_type: super::dtype_to_onnx(keys.dtype()),
        values: sequence_proto("", &HostValue::Sequence(values.clone()))?,
        ..Default::default()
    };
    match keys.dtype() {
        DType::String => out.string_keys = keys.as_strings().iter().map(|t| t.clone().into_bytes()).collect(),
        DType::I64 => out.keys = keys.as_slice::<i64>().to_vec(),
        _ => {
            return Err(Error::unsupported(
                format!("map {name:?}"),
                format!("a key of type {}", keys.dtype()),
            ));
        }
    }
    Ok(out)
}

fn optional_proto(name: &str, value: &HostValue) -> Result<OptionalProto> {
    let HostValue::Optional(inner) = value else {
        return Err(Error::invalid(format!("value {name:?}"), "another kind of value", "an optional"));
    };
    let (elem_type, value) = match inner.as_deref() {
        None => (0, OptionalValue::None),
        Some(HostValue::Tensor(t)) => (KIND_TENSOR, OptionalValue::Tensor(Box::new(encode_tensor("", t)))),
        Some(v @ HostValue::Sequence(_)) => {
            (KIND_SEQUENCE, OptionalValue::Sequence(Box::new(sequence_proto("", v)?)))
        }
        Some(v @ HostValue::Map(..)) => (KIND_MAP, OptionalValue::Map(Box::new(map_proto("", v)?))),
        Some(v @ HostValue::Optional(_)) => {
            (KIND_OPTIONAL, OptionalValue::Optional(Box::new(optional_proto("", v)?)))
        }
    };
    Ok(OptionalProto { name: name.to_owned(), elem_type, value })
}
