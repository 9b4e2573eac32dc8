use std::io::Write;

use lightering_units::{BlockFormat, Bytes};

use super::reader::data_size;
use super::{
    ALIGNMENT_KEY, Array, DEFAULT_ALIGNMENT, GgufTensor, MAGIC, MAX_ALIGNMENT, MAX_NAME_BYTES, MAX_RANK,
    Metadata, Value, ggml_type,
};
use crate::{Error, Result};

/// Collects metadata and tensors of a file before [`begin`](Self::begin) writes its header.
#[derive(Clone, Debug, Default)]
pub struct GgufWriter {
    pub(super) metadata: Metadata,
    tensors: Vec<GgufTensor>,
    names: std::collections::HashSet<String>,
}

impl GgufWriter {
    /// A file without metadata and tensors.
    pub fn new() -> GgufWriter {
        GgufWriter::default()
    }

    /// A file with the metadata of another one.
    pub fn with_metadata(metadata: Metadata) -> GgufWriter {
        GgufWriter { metadata, ..GgufWriter::default() }
    }

    /// Sets a key of the metadata.
    ///
    /// # Errors
    /// The key is longer than [`MAX_NAME_BYTES`].
    pub fn set(&mut self, key: &str, value: Value) -> Result<()> {
        check_name("metadata key", key)?;
        self.metadata.set(key, value);
        Ok(())
    }

    /// Adds a tensor with `dims` in the order of the format, row length first.
    ///
    /// # Errors
    /// The name is taken or too long, there are too many dimensions, or a row is no whole number of blocks.
    pub fn tensor(&mut self, name: &str, dims: &[u64], format: BlockFormat) -> Result<()> {
        check_name("tensor", name)?;
        let place = format!("tensor {name:?}");
        if dims.len() > MAX_RANK as usize {
            return Err(Error::limit(place, "number of dimensions", dims.len() as u64, MAX_RANK.into()));
        }
        let size = data_size(format, dims)
            .map_err(|what| Error::invalid(&place, what, "rows of whole blocks, and sizes of at least 1"))?;
        if !self.names.insert(name.to_owned()) {
            return Err(Error::invalid(place, "the name is taken", "a new name"));
        }
        // Offsets are given out by `begin`, which knows the alignment.
        self.tensors.push(GgufTensor {
            name: name.to_owned(),
            dims: dims.to_vec(),
            format,
            offset: 0,
            size: Bytes(size),
        });
        Ok(())
    }

    /// Writes everything in front of the data to `out`, version 3, and returns what takes the data.
    ///
    /// # Errors
    /// `general.alignment` is set to something else than a power of two, the sizes overflow, or `out` fails.
    pub fn begin<W: Write>(mut self, mut out: W) -> Result<GgufDataWriter<W>> {
        let alignment = self.metadata.get_u64(ALIGNMENT_KEY)?.unwrap_or(DEFAULT_ALIGNMENT);
        if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
            return Err(Error::invalid(
                format!("metadata key {ALIGNMENT_KEY:?}"),
                format!("the value {alignment}"),
                format!("a power of two of at most {MAX_ALIGNMENT}"),
            ));
        }
        let mut header = MAGIC.to_vec();
        header.extend(3u32.to_le_bytes());
        header.extend((self.tensors.len() as u64).to_le_bytes());
        header.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in self.metadata.iter() {
            put_string(&mut header, key);
            put_value(&mut header, value);
        }
        let mut end = 0u64;
        for tensor in &mut self.tensors {
            tensor.offset = end;
            let next = end.checked_add(tensor.size.0).and_then(|e| e.checked_next_multiple_of(alignment));
            end = next.ok_or_else(|| {
                Error::invalid(format!("tensor {:?}", tensor.name), "the file's size overflows", "less data")
            })?;
            put_string(&mut header, &tensor.name);
            header.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|d| header.extend(d.to_le_bytes()));
            header.extend(ggml_type(tensor.format).to_le_bytes());
            header.extend(tensor.offset.to_le_bytes());
        }
        header.resize(header.len().next_multiple_of(alignment as usize), 0);
        for tensor in &mut self.tensors {
            tensor.offset += header.len() as u64;
        }
        out.write_all(&header).map_err(|e| Error::io("GGUF output", e))?;
        Ok(GgufDataWriter { out, tensors: self.tensors, alignment, current: 0, done: 0 })
    }
}

fn check_name(what: &str, name: &str) -> Result<()> {
    if name.len() as u64 > MAX_NAME_BYTES {
        return Err(Error::limit(what, "length of the name in bytes", name.len() as u64, MAX_NAME_BYTES));
    }
    Ok(())
}

/// Takes the data of the tensors in the order in which they were added, in pieces of any size.
#[derive(Debug)]
pub struct GgufDataWriter<W> {
    out: W,
    tensors: Vec<GgufTensor>,
    alignment: u64,
    current: usize,
    /// Bytes of the current tensor that are written.
    done: u64,
}

impl<W: Write> GgufDataWriter<W> {
    /// The tensor whose data is expected next; `None` when all are written.
    pub fn next_tensor(&self) -> Option<&GgufTensor> {
        self.tensors.get(self.current)
    }

    /// Writes a piece of the current tensor.
    ///
    /// # Errors
    /// The piece is longer than what the tensor lacks, or the output fails.
    pub fn write(&mut self, piece: &[u8]) -> Result<()> {
        let lacking = self.next_tensor().map_or(0, |t| t.size.0 - self.done);
        if piece.len() as u64 > lacking {
            return Err(Error::invalid(
                self.next_tensor().map_or("GGUF output".to_owned(), |t| format!("tensor {:?}", t.name)),
                format!("a piece of {} bytes", piece.len()),
                format!("at most the {lacking} bytes that are lacking"),
            ));
        }
        let failed = |e| Error::io("GGUF output", e);
        self.out.write_all(piece).map_err(failed)?;
        self.done += piece.len() as u64;
        if piece.len() as u64 == lacking
            && let Some(tensor) = self.tensors.get(self.current)
        {
            let padding = tensor.size.0.next_multiple_of(self.alignment) - tensor.size.0;
            std::io::copy(&mut std::io::Read::take(std::io::repeat(0), padding), &mut self.out)
                .map_err(failed)?;
            self.current += 1;
            self.done = 0;
        }
        Ok(())
    }

    /// Ends the file and returns the output.
    ///
    /// # Errors
    /// A tensor's data is missing, or the output cannot be flushed.
    pub fn finish(mut self) -> Result<W> {
        if let Some(tensor) = self.next_tensor() {
            return Err(Error::invalid(
                format!("tensor {:?}", tensor.name),
                format!("{} bytes of data", self.done),
                format!("{} bytes", tensor.size.0),
            ));
        }
        self.out.flush().map_err(|e| Error::io("GGUF output", e))?;
        Ok(self.out)
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    fn put<const N: usize>(out: &mut Vec<u8>, kind: u32, bytes: [u8; N]) {
        out.extend(kind.to_le_bytes());
        out.extend(bytes);
    }
    match value {
        Value::U8(v) => put(out, 0, v.to_le_bytes()),
        Value::I8(v) => put(out, 1, v.to_le_bytes()),
        Value::U16(v) => put(out, 2, v.to_le_bytes()),
        Value::I16(v) => put(out, 3, v.to_le_bytes()),
        Value::U32(v) => put(out, 4, v.to_le_bytes()),
        Value::I32(v) => put(out, 5, v.to_le_bytes()),
        Value::F32(v) => put(out, 6, v.to_le_bytes()),
        Value::Bool(v) => put(out, 7, [u8::from(*v)]),
        Value::U64(v) => put(out, 10, v.to_le_bytes()),
        Value::I64(v) => put(out, 11, v.to_le_bytes()),
        Value::F64(v) => put(out, 12, v.to_le_bytes()),
        Value::String(v) => {
            out.extend(8u32.to_le_bytes());
            put_string(out, v);
        }
        Value::Array(v) => {
            out.extend(9u32.to_le_bytes());
            put_array(out, v);
        }
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    fn put<T: Copy, const N: usize>(out: &mut Vec<u8>, kind: u32, values: &[T], to: fn(T) -> [u8; N]) {
        out.extend(kind.to_le_bytes());
        out.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|v| out.extend(to(*v)));
    }
    match array {
        Array::U8(v) => put(out, 0, v, u8::to_le_bytes),
        Array::I8(v) => put(out, 1, v, i8::to_le_bytes),
        Array::U16(v) => put(out, 2, v, u16::to_le_bytes),
        Array::I16(v) => put(out, 3, v, i16::to_le_bytes),
        Array::U32(v) => put(out, 4, v, u32::to_le_bytes),
        Array::I32(v) => put(out, 5, v, i32::to_le_bytes),
        Array::F32(v) => put(out, 6, v, f32::to_le_bytes),
        Array::Bool(v) => put(out, 7, v, |b| [u8::from(b)]),
        Array::U64(v) => put(out, 10, v, u64::to_le_bytes),
        Array::I64(v) => put(out, 11, v, i64::to_le_bytes),
        Array::F64(v) => put(out, 12, v, f64::to_le_bytes),
        Array::Strings(v) => {
            out.extend(8u32.to_le_bytes());
            out.extend((v.len() as u64).to_le_bytes());
            v.iter().for_each(|text| put_string(out, text));
        }
        Array::Arrays(v) => {
            out.extend(9u32.to_le_bytes());
            out.extend((v.len() as u64).to_le_bytes());
            v.iter().for_each(|array| put_array(out, array));
        }
    }
}
