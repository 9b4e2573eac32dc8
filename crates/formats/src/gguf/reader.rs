use lightering_tier::ByteSource;
use lightering_units::{BlockFormat, Bytes};

use super::{
    ALIGNMENT_KEY, Array, DEFAULT_ALIGNMENT, MAGIC, MAX_ALIGNMENT, MAX_ARRAY_DEPTH, MAX_HEADER_BYTES,
    MAX_NAME_BYTES, MAX_RANK, Metadata, Value, format_of,
};
use crate::{Error, Result};

/// Bytes that the reader keeps in memory at a time.
const WINDOW_BYTES: u64 = 64 * 1024;

/// A tensor of the file and where its data lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    /// The name, unique in the file.
    pub name: String,
    /// Sizes as the file gives them: the elements of a row first, at most four.
    pub dims: Vec<u64>,
    /// How each row is stored.
    pub format: BlockFormat,
    /// Offset of the data from the start of the file.
    pub offset: u64,
    /// Size of the data.
    pub size: Bytes,
}

impl GgufTensor {
    /// Elements of one row; 1 without dimensions.
    pub fn row_len(&self) -> u64 {
        self.dims.first().copied().unwrap_or(1)
    }

    /// Number of rows, over all further dimensions.
    pub fn rows(&self) -> u64 {
        self.dims.iter().skip(1).product()
    }
}

/// What a GGUF file holds, its tensors' data excepted.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufFile {
    /// Version of the format, 2 or 3.
    pub version: u32,
    /// The keys and values.
    pub metadata: Metadata,
    /// The tensors, in the order of the file.
    pub tensors: Vec<GgufTensor>,
    /// Offset of the data section.
    pub data_offset: u64,
    /// Alignment of every tensor within the data section.
    pub alignment: u64,
    by_name: Vec<u32>,
}

impl GgufFile {
    /// Reads the header of a file.
    ///
    /// # Errors
    /// Whatever is wrong with the header, with its place; tensors that overlap or lie outside of the file; formats of
    /// weights that [`BlockFormat`] does not have.
    pub fn read(source: &dyn ByteSource) -> Result<GgufFile> {
        let mut cursor =
            Cursor { source, total: source.len_bytes().0, at: 0, start: 0, window: Vec::new(), charged: 0 };
        read(&mut cursor).map_err(|e| e.within(source.name()))
    }

    /// One file of the parts of a model, with where each part begins when their bytes are joined. The metadata is that of
    /// the first.
    ///
    /// # Errors
    /// Parts that are not those of one model in order, or too few of them, as `split.no`, `split.count` and
    /// `split.tensors.count` tell; a tensor in two parts.
    pub fn joined(parts: Vec<(GgufFile, u64)>) -> Result<GgufFile> {
        let count = parts.len() as u64;
        let mut joined: Option<GgufFile> = None;
        for (index, (mut part, start)) in parts.into_iter().enumerate() {
            for (key, expected) in [("split.no", index as u64), ("split.count", count)] {
                let found = part.metadata.get_u64(key)?;
                if found != Some(expected) {
                    let what = found.map_or("missing".to_owned(), |found| found.to_string());
                    let place = format!("part {} of a model, {key}", index + 1);
                    return Err(Error::invalid(place, what, expected));
                }
            }
            for tensor in &mut part.tensors {
                tensor.offset = tensor.offset.checked_add(start).ok_or_else(|| {
                    Error::invalid(
                        &tensor.name,
                        format!("a part that begins at {start}"),
                        "fewer than 2^64 bytes",
                    )
                })?;
            }
            match &mut joined {
                None => joined = Some(part),
                Some(all) => all.tensors.append(&mut part.tensors),
            }
        }
        let mut all = joined.ok_or_else(|| Error::invalid("parts of a model", 0, "at least 1"))?;
        if let Some(expected) = all.metadata.get_u64("split.tensors.count")?
            && expected != all.tensors.len() as u64
        {
            let what = format!("{} tensors in all parts", all.tensors.len());
            return Err(Error::invalid("split.tensors.count", what, expected));
        }
        let name = |i: &u32| all.tensors[*i as usize].name.as_str();
        let mut by_name: Vec<u32> = (0..all.tensors.len() as u32).collect();
        by_name.sort_by(|a, b| name(a).cmp(name(b)));
        if let Some(pair) = by_name.windows(2).find(|pair| name(&pair[0]) == name(&pair[1])) {
            return Err(Error::invalid(name(&pair[0]), "the tensor is in two parts", "one of each name"));
        }
        all.by_name = by_name;
        Ok(all)
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        let found = self.by_name.binary_search_by(|i| self.tensors[*i as usize].name.as_str().cmp(name));
        found.ok().map(|at| &self.tensors[self.by_name[at] as usize])
    }
}

/// Size of a tensor's data in bytes, or what is wrong with its dimensions.
pub(super) fn data_size(format: BlockFormat, dims: &[u64]) -> std::result::Result<u64, String> {
    if let Some(at) = dims.iter().position(|d| *d == 0) {
        return Err(format!("dimension {at} of {dims:?} is 0"));
    }
    let row = dims.first().copied().unwrap_or(1);
    let bytes = usize::try_from(row).ok().and_then(|row| format.row_bytes(row)).ok_or_else(|| {
        format!("a row of {row} elements is no whole number of {format} blocks of {}", format.block_len())
    })?;
    dims.iter()
        .skip(1)
        .try_fold(bytes as u64, |product, d| product.checked_mul(*d))
        .filter(|_| dims.iter().try_fold(1u64, |product, d| product.checked_mul(*d)).is_some())
        .ok_or_else(|| format!("the size of dimensions {dims:?} overflows"))
}

struct Cursor<'a> {
    source: &'a dyn ByteSource,
    total: u64,
    at: u64,
    /// The window holds the bytes from here on.
    start: u64,
    window: Vec<u8>,
    charged: u64,
}

impl Cursor<'_> {
    fn left(&self) -> u64 {
        self.total - self.at
    }

    fn short(&self, what: &str, wanted: u64) -> Error {
        Error::corrupt(
            format!("byte {}", self.at),
            format!(
                "{what} takes {wanted} bytes, but only {} are left (is the file cut short?)",
                self.left()
            ),
        )
    }

    fn fill(&mut self, what: &str, out: &mut [u8]) -> Result<()> {
        let wanted = out.len() as u64;
        if wanted > self.left() {
            return Err(self.short(what, wanted));
        }
        let failed = |source: &dyn ByteSource, e| Error::io(source.name(), e);
        if wanted > WINDOW_BYTES {
            self.source.read_at(self.at, out).map_err(|e| failed(self.source, e))?;
        } else {
            if self.at < self.start || self.at + wanted > self.start + self.window.len() as u64 {
                self.start = self.at;
                self.window.resize(WINDOW_BYTES.min(self.left()) as usize, 0);
                let read = self.source.read_at(self.at, &mut self.window);
                if let Err(e) = read {
                    self.window.clear();
                    return Err(failed(self.source, e));
                }
            }
            let from = (self.at - self.start) as usize;
            out.copy_from_slice(&self.window[from..from + out.len()]);
        }
        self.at += wanted;
        Ok(())
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(what, &mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A number of things that take at least `least` bytes each.
    fn count(&mut self, what: &str, least: u64) -> Result<usize> {
        let count = self.u64(what)?;
        if count > self.left() / least {
            return Err(Error::corrupt(
                format!("byte {}", self.at - 8),
                format!(
                    "{what} is {count}, which takes at least {least} bytes each, but only {} are left",
                    self.left()
                ),
            ));
        }
        usize::try_from(count).map_err(|_| Error::limit("header", what, count, usize::MAX as u64))
    }

    /// Counts memory that is about to be kept.
    fn charge(&mut self, size_bytes: u64) -> Result<()> {
        self.charged = self.charged.saturating_add(size_bytes);
        if self.charged > MAX_HEADER_BYTES {
            return Err(Error::limit(
                format!("byte {}", self.at),
                "memory for metadata and tensor names in bytes",
                self.charged,
                MAX_HEADER_BYTES,
            ));
        }
        Ok(())
    }

    fn string(&mut self, what: &str, limit: u64) -> Result<String> {
        let at = self.at;
        let size = self.u64(what)?;
        if size > limit {
            return Err(Error::limit(
                format!("byte {at}"),
                format!("length in bytes of {what}"),
                size,
                limit,
            ));
        }
        if size > self.left() {
            return Err(self.short(what, size));
        }
        self.charge(size + size_of::<String>() as u64)?;
        let mut bytes = vec![0; size as usize];
        self.fill(what, &mut bytes)?;
        String::from_utf8(bytes)
            .map_err(|_| Error::corrupt(format!("byte {at}"), format!("{what} is not valid UTF-8")))
    }

    fn numbers<T, const N: usize>(&mut self, count: usize, from: fn([u8; N]) -> T) -> Result<Vec<T>> {
        self.charge((count * size_of::<T>()) as u64)?;
        let mut out = Vec::with_capacity(count);
        for _ in 0..count {
            out.push(from(self.array("an element")?));
        }
        Ok(out)
    }

    fn bool(&mut self) -> Result<bool> {
        match self.array("a bool")? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => {
                Err(Error::corrupt(format!("byte {}", self.at - 1), format!("a bool of value {other}")))
            }
        }
    }

    fn elements(&mut self, depth: u32) -> Result<Array> {
        let kind = self.u32("an element type")?;
        let least = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            _ => return Err(self.unknown_kind(kind)),
        };
        let count = self.count("number of elements", least)?;
        Ok(match kind {
            0 => Array::U8(self.numbers(count, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(count, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(count, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(count, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(count, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(count, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(count, f32::from_le_bytes)?),
            10 => Array::U64(self.numbers(count, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(count, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(count, f64::from_le_bytes)?),
            7 => {
                self.charge(count as u64)?;
                Array::Bool((0..count).map(|_| self.bool()).collect::<Result<_>>()?)
            }
            8 => {
                // The headers are charged before the vector is made, the texts one by one.
                self.charge((count * size_of::<String>()) as u64)?;
                let mut texts = Vec::with_capacity(count);
                for _ in 0..count {
                    texts.push(self.string("a text of an array", MAX_HEADER_BYTES)?);
                }
                Array::Strings(texts)
            }
            _ => {
                if depth >= MAX_ARRAY_DEPTH {
                    return Err(Error::limit(
                        format!("byte {}", self.at),
                        "nesting of arrays",
                        u64::from(depth) + 1,
                        u64::from(MAX_ARRAY_DEPTH),
                    ));
                }
                self.charge((count * size_of::<Array>()) as u64)?;
                let mut arrays = Vec::with_capacity(count);
                for _ in 0..count {
                    arrays.push(self.elements(depth + 1)?);
                }
                Array::Arrays(arrays)
            }
        })
    }

    fn unknown_kind(&self, kind: u32) -> Error {
        Error::corrupt(format!("byte {}", self.at - 4), format!("value type {kind}, which does not exist"))
    }

    fn value(&mut self) -> Result<Value> {
        let kind = self.u32("a value type")?;
        let what = "a value";
        Ok(match kind {
            0 => Value::U8(self.array(what).map(u8::from_le_bytes)?),
            1 => Value::I8(self.array(what).map(i8::from_le_bytes)?),
            2 => Value::U16(self.array(what).map(u16::from_le_bytes)?),
            3 => Value::I16(self.array(what).map(i16::from_le_bytes)?),
            4 => Value::U32(self.u32(what)?),
            5 => Value::I32(self.array(what).map(i32::from_le_bytes)?),
            6 => Value::F32(self.array(what).map(f32::from_le_bytes)?),
            7 => Value::Bool(self.bool()?),
            8 => Value::String(self.string("a text", MAX_HEADER_BYTES)?),
            9 => Value::Array(self.elements(1)?),
            10 => Value::U64(self.u64(what)?),
            11 => Value::I64(self.array(what).map(i64::from_le_bytes)?),
            12 => Value::F64(self.array(what).map(f64::from_le_bytes)?),
            _ => return Err(self.unknown_kind(kind)),
        })
    }
}

fn read(cursor: &mut Cursor<'_>) -> Result<GgufFile> {
    let magic: [u8; 4] = cursor.array("the file's signature")?;
    if magic != MAGIC {
        return Err(Error::invalid(
            "byte 0",
            format!("the signature {:?}", magic.escape_ascii().to_string()),
            "\"GGUF\"",
        ));
    }
    let version = cursor.u32("the version")?;
    if version.swap_bytes() <= 0xffff && version > 0xffff {
        return Err(Error::unsupported("byte 4", "a big-endian GGUF file"));
    }
    if !(2..=3).contains(&version) {
        return Err(Error::unsupported("byte 4", format!("GGUF version {version} (2 and 3 are)")));
    }
    let tensor_count = cursor.u64("the number of tensors")?;
    let entry_count = cursor.count("the number of metadata keys", 13)?;
    if tensor_count > cursor.left() / 24 {
        return Err(Error::corrupt(
            "byte 8",
            format!("{tensor_count} tensors do not fit into the {} bytes that are left", cursor.left()),
        ));
    }
    cursor.charge((entry_count * (size_of::<(String, Value)>() + 4)) as u64)?;
    let mut entries = Vec::with_capacity(entry_count);
    for index in 0..entry_count {
        let key = cursor
            .string("a key", MAX_NAME_BYTES)
            .map_err(|e| e.within(format_args!("metadata entry {index}")))?;
        let value = cursor.value().map_err(|e| e.within(format_args!("metadata key {key:?}")))?;
        entries.push((key, value));
    }
    let metadata = Metadata::from_entries(entries)
        .map_err(|key| Error::corrupt(format!("metadata key {key:?}"), "it stands twice"))?;
    let alignment = metadata.get_u64(ALIGNMENT_KEY)?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        return Err(Error::invalid(
            format!("metadata key {ALIGNMENT_KEY:?}"),
            format!("the value {alignment}"),
            format!("a power of two of at most {MAX_ALIGNMENT}"),
        ));
    }
    cursor.charge(tensor_count * (size_of::<GgufTensor>() as u64 + 4 + 8 * u64::from(MAX_RANK)))?;
    let mut tensors = Vec::with_capacity(tensor_count as usize);
    for index in 0..tensor_count {
        tensors.push(read_tensor(cursor, index, alignment)?);
    }
    let data_offset = cursor.at.next_multiple_of(alignment);
    place(&mut tensors, data_offset, cursor.total)?;
    let mut by_name: Vec<u32> = (0..tensors.len() as u32).collect();
    let name = |i: u32| &tensors[i as usize].name;
    by_name.sort_by(|a, b| name(*a).cmp(name(*b)));
    if let Some(w) = by_name.windows(2).find(|w| name(w[0]) == name(w[1])) {
        return Err(Error::corrupt(format!("tensor {:?}", name(w[0])), "two tensors have this name"));
    }
    Ok(GgufFile { version, metadata, tensors, data_offset, alignment, by_name })
}

/// Reads the description of a tensor; its offset still counts from the start of the data.
fn read_tensor(cursor: &mut Cursor<'_>, index: u64, alignment: u64) -> Result<GgufTensor> {
    let name = cursor
        .string("a tensor's name", MAX_NAME_BYTES)
        .map_err(|e| e.within(format_args!("tensor {index}")))?;
    let place = format!("tensor {name:?}");
    let rest = |cursor: &mut Cursor<'_>| {
        let rank = cursor.u32("the number of dimensions")?;
        if rank > MAX_RANK {
            let at = format!("byte {}", cursor.at - 4);
            return Err(Error::limit(at, "number of dimensions", rank.into(), MAX_RANK.into()));
        }
        let dims = (0..rank).map(|_| cursor.u64("a dimension")).collect::<Result<Vec<u64>>>()?;
        Ok((dims, cursor.u32("a tensor's type")?, cursor.u64("a tensor's offset")?))
    };
    let (dims, ggml, offset) = rest(cursor).map_err(|e| e.within(&place))?;
    let format = format_of(ggml).map_err(|what| Error::unsupported(&place, what))?;
    let size = Bytes(data_size(format, &dims).map_err(|what| Error::corrupt(&place, what))?);
    if !offset.is_multiple_of(alignment) {
        return Err(Error::corrupt(place, format!("offset {offset} is no multiple of {alignment}")));
    }
    Ok(GgufTensor { name, dims, format, offset, size })
}

/// Turns offsets into absolute ones, and refuses tensors outside of the file or on top of each other.
fn place(tensors: &mut [GgufTensor], data_offset: u64, total: u64) -> Result<()> {
    for tensor in &mut *tensors {
        let start = data_offset.checked_add(tensor.offset);
        let end = start.and_then(|start| start.checked_add(tensor.size.0));
        match (start, end) {
            (Some(start), Some(end)) if end <= total => tensor.offset = start,
            _ => {
                return Err(Error::corrupt(
                    format!("tensor {:?}", tensor.name),
                    format!(
                        "its {} bytes at offset {} of the data pass the end of the file, which has {total} bytes (is it \
                         cut short?)",
                        tensor.size.0, tensor.offset
                    ),
                ));
            }
        }
    }
    let mut order: Vec<&GgufTensor> = tensors.iter().collect();
    order.sort_by_key(|t| t.offset);
    for pair in order.windows(2) {
        if pair[0].offset + pair[0].size.0 > pair[1].offset {
            return Err(Error::corrupt(
                format!("tensor {:?}", pair[1].name),
                format!("its data at byte {} overlaps that of tensor {:?}", pair[1].offset, pair[0].name),
            ));
        }
    }
    Ok(())
}
