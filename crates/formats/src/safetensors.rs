//! Safetensors files: reading of headers (names, types, shapes and where the data lies), and writing.
//!
//! ```
//! use lightering_formats::safetensors::SafetensorsFile;
//! let header = br#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
//! let mut file = (header.len() as u64).to_le_bytes().to_vec();
//! file.extend(header);
//! file.extend([0; 8]);
//! let read = SafetensorsFile::read(&file).unwrap();
//! assert_eq!(read.tensor("w").unwrap().offset, 8 + header.len() as u64);
//! ```

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io::{self, Write};

use lightering_tier::ByteSource;
use lightering_units::{Bytes, DType};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::{Error, Result};

/// Longest header, the limit of the format's own reader.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Most dimensions of a tensor.
pub const MAX_RANK: usize = 32;

/// A tensor and where its data lies, little-endian and row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SafetensorsTensor {
    /// The name, unique in the file.
    pub name: String,
    /// Type of the elements.
    pub dtype: DType,
    /// Sizes, the longest stride first.
    pub shape: Vec<u64>,
    /// Offset of the data from the start of the file.
    pub offset: u64,
    /// Size of the data.
    pub size: Bytes,
}

/// The header of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SafetensorsFile {
    /// The texts under `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// The tensors in the order of their names.
    pub tensors: Vec<SafetensorsTensor>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

#[derive(Default)]
struct Header {
    metadata: BTreeMap<String, String>,
    entries: BTreeMap<String, Entry>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Header, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Header;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let mut header = Header::default();
                let mut described = false;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        if std::mem::replace(&mut described, true) {
                            return Err(A::Error::custom("__metadata__ stands twice"));
                        }
                        header.metadata = map.next_value()?;
                        continue;
                    }
                    let entry =
                        map.next_value().map_err(|e| A::Error::custom(format!("tensor {name:?}: {e}")))?;
                    if header.entries.contains_key(&name) {
                        return Err(A::Error::custom(format!("tensor {name:?} stands twice")));
                    }
                    header.entries.insert(name, entry);
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

fn dtype_of(name: &str) -> Option<DType> {
    Some(match name {
        "F64" => DType::F64,
        "F32" => DType::F32,
        "F16" => DType::F16,
        "BF16" => DType::BF16,
        "I64" => DType::I64,
        "I32" => DType::I32,
        "I16" => DType::I16,
        "I8" => DType::I8,
        "U64" => DType::U64,
        "U32" => DType::U32,
        "U16" => DType::U16,
        "U8" => DType::U8,
        "BOOL" => DType::Bool,
        "F8_E4M3" => DType::F8E4M3FN,
        "F8_E5M2" => DType::F8E5M2,
        _ => return None,
    })
}

fn name_of(dtype: DType) -> Option<&'static str> {
    const NAMES: [&str; 15] = [
        "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "F8_E4M3",
        "F8_E5M2",
    ];
    NAMES.into_iter().find(|name| dtype_of(name) == Some(dtype))
}

/// A tensor that is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewTensor {
    /// The name, unique in the file.
    pub name: String,
    /// Type of the elements.
    pub dtype: DType,
    /// Sizes, the longest stride first.
    pub dims: Vec<usize>,
}

/// Counts what passes.
struct Counted<'a> {
    out: &'a mut dyn Write,
    written: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.written += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Writes a file: the header, then the tensors one after the other, each as `data` writes it (little-endian,
/// row-major), so that no tensor has to be in memory twice.
///
/// # Errors
/// A name stands twice, a type has no spelling, `data` fails or writes too much or too little, or the output fails.
pub fn write(
    metadata: &BTreeMap<String, String>,
    tensors: &[NewTensor],
    out: &mut dyn Write,
    data: &mut dyn FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let failed = |e| Error::io("safetensors output", e);
    let text = |value: &dyn fmt::Display| serde_json::Value::String(value.to_string()).to_string();
    let mut header = String::from("{");
    let mut names = HashSet::new();
    if !metadata.is_empty() {
        let pairs: Vec<String> = metadata.iter().map(|(k, v)| format!("{}:{}", text(k), text(v))).collect();
        header.push_str(&format!("\"__metadata__\":{{{}}}", pairs.join(",")));
    }
    let mut sizes = Vec::with_capacity(tensors.len());
    let mut at = 0u64;
    for tensor in tensors {
        let place = format!("tensor {:?}", tensor.name);
        if tensor.name == "__metadata__" || !names.insert(&tensor.name) {
            return Err(Error::invalid(place, "a name that is taken", "a name of its own for each tensor"));
        }
        let dtype = name_of(tensor.dtype)
            .ok_or_else(|| Error::unsupported(&place, format!("element type {}", tensor.dtype)))?;
        let size = tensor
            .dims
            .iter()
            .try_fold(tensor.dtype.size_bytes() as u64, |n, &d| n.checked_mul(d as u64))
            .filter(|n| at.checked_add(*n).is_some())
            .ok_or_else(|| Error::invalid(&place, format!("shape {:?}", tensor.dims), "a size that fits"))?;
        if header.len() > 1 {
            header.push(',');
        }
        let dims: Vec<String> = tensor.dims.iter().map(ToString::to_string).collect();
        header.push_str(&format!(
            "{}:{{\"dtype\":\"{dtype}\",\"shape\":[{}],\"data_offsets\":[{at},{}]}}",
            text(&tensor.name),
            dims.join(","),
            at + size
        ));
        at += size;
        sizes.push(size);
    }
    header.push('}');
    // The data starts at a multiple of 8, as the format's own writer has it.
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    if header.len() as u64 > MAX_HEADER_BYTES {
        let found = header.len() as u64;
        return Err(Error::limit(
            "safetensors output",
            "size of the header in bytes",
            found,
            MAX_HEADER_BYTES,
        ));
    }
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
    out.write_all(header.as_bytes()).map_err(failed)?;
    for (index, size) in sizes.into_iter().enumerate() {
        let mut counted = Counted { out, written: 0 };
        data(index, &mut counted).map_err(failed)?;
        if counted.written != size {
            return Err(Error::invalid(
                format!("tensor {:?}", tensors[index].name),
                format!("{} bytes of data were given", counted.written),
                format!("{size}"),
            ));
        }
    }
    Ok(())
}

impl SafetensorsFile {
    /// Reads the header of a file.
    ///
    /// # Errors
    /// The header is damaged or too long, a tensor's range does not fit its type and shape, or ranges overlap or lie
    /// outside of the file.
    pub fn read(source: &dyn ByteSource) -> Result<SafetensorsFile> {
        read(source).map_err(|e| e.within(source.name()))
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<&SafetensorsTensor> {
        self.tensors.binary_search_by(|t| t.name.as_str().cmp(name)).ok().map(|at| &self.tensors[at])
    }
}

fn read(source: &dyn ByteSource) -> Result<SafetensorsFile> {
    let total = source.len_bytes().0;
    let failed = |e| Error::io("safetensors header", e);
    if total < 8 {
        return Err(Error::corrupt("byte 0", format!("a file of {total} bytes has no header")));
    }
    let mut size = [0; 8];
    source.read_at(0, &mut size).map_err(failed)?;
    let size = u64::from_le_bytes(size);
    if size > MAX_HEADER_BYTES {
        return Err(Error::limit("byte 0", "size of the header in bytes", size, MAX_HEADER_BYTES));
    }
    if size > total - 8 {
        return Err(Error::corrupt(
            "byte 0",
            format!("a header of {size} bytes, but only {} are left (is the file cut short?)", total - 8),
        ));
    }
    let mut text = vec![0; size as usize];
    source.read_at(8, &mut text).map_err(failed)?;
    let header: Header =
        serde_json::from_slice(&text).map_err(|e| Error::corrupt("safetensors header", e))?;
    let start = 8 + size;
    let data = total - start;
    let mut tensors = Vec::with_capacity(header.entries.len());
    for (name, entry) in header.entries {
        let place = format!("tensor {name:?}");
        let dtype = dtype_of(&entry.dtype)
            .ok_or_else(|| Error::unsupported(&place, format!("element type {:?}", entry.dtype)))?;
        if entry.shape.len() > MAX_RANK {
            let rank = entry.shape.len() as u64;
            return Err(Error::limit(place, "number of dimensions", rank, MAX_RANK as u64));
        }
        let needed = entry
            .shape
            .iter()
            .try_fold(1u64, |product, d| product.checked_mul(*d))
            .and_then(|count| count.checked_mul(dtype.size_bytes() as u64))
            .ok_or_else(|| {
                Error::corrupt(&place, format!("the size of shape {:?} overflows", entry.shape))
            })?;
        let [from, to] = entry.data_offsets;
        if from > to || to > data {
            return Err(Error::corrupt(
                place,
                format!(
                    "the range {from}..{to} lies outside of the {data} bytes of data (is the file cut short?)"
                ),
            ));
        }
        if to - from != needed {
            return Err(Error::corrupt(
                place,
                format!(
                    "{} bytes of data for {dtype} of shape {:?}, which takes {needed}",
                    to - from,
                    entry.shape
                ),
            ));
        }
        let size = Bytes(needed);
        tensors.push(SafetensorsTensor { name, dtype, shape: entry.shape, offset: start + from, size });
    }
    let mut order: Vec<&SafetensorsTensor> = tensors.iter().filter(|t| t.size.0 > 0).collect();
    order.sort_by_key(|t| t.offset);
    for pair in order.windows(2) {
        if pair[0].offset + pair[0].size.0 > pair[1].offset {
            return Err(Error::corrupt(
                format!("tensor {:?}", pair[1].name),
                format!("its data overlaps that of tensor {:?}", pair[0].name),
            ));
        }
    }
    Ok(SafetensorsFile { metadata: header.metadata, tensors })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut out = (header.len() as u64).to_le_bytes().to_vec();
        out.extend(header.as_bytes());
        out.resize(out.len() + data, 0);
        out
    }

    const GOOD: &str = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"e":{"dtype":"I8","shape":[0],"data_offsets":[4,4]}}"#;

    #[test]
    fn headers_are_read() {
        let read = SafetensorsFile::read(&file(GOOD, 16)).unwrap();
        assert_eq!(read.metadata["format"], "pt");
        let b = read.tensor("b").unwrap();
        assert_eq!((b.dtype, b.shape.as_slice(), b.size), (DType::BF16, &[2u64, 3][..], Bytes(12)));
        assert_eq!(b.offset, 8 + GOOD.len() as u64 + 4);
        assert!(read.tensor("c").is_none());
    }

    #[test]
    fn lying_headers_are_refused() {
        let refused = |header: &str, data: usize, part: &str| {
            let error = SafetensorsFile::read(&file(header, data)).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        refused(GOOD, 15, "cut short");
        refused("[]", 0, "object of tensors");
        refused(r#"{"a":{"dtype":"F4","shape":[],"data_offsets":[0,4]}}"#, 4, "element type \"F4\"");
        refused(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4, "takes 8");
        refused(r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4, "tensor \"a\"");
        refused(
            r#"{"a":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]}}"#,
            4,
            "overflows",
        );
        refused(
            r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#,
            4,
            "overlaps",
        );
        refused(
            r#"{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[],"data_offsets":[1,2]}}"#,
            4,
            "stands twice",
        );
        let mut huge = file(GOOD, 16);
        huge[7] = 1;
        assert!(matches!(SafetensorsFile::read(&huge), Err(Error::Limit { .. })));
    }

    #[test]
    fn what_is_written_is_read() {
        let tensor =
            |name: &str, dtype, dims: &[usize]| NewTensor { name: name.into(), dtype, dims: dims.to_vec() };
        let tensors = [
            tensor("z \"1\"", DType::F32, &[2]),
            tensor("a", DType::U8, &[3]),
            tensor("e", DType::I64, &[0, 4]),
        ];
        let metadata = BTreeMap::from([("k".to_owned(), "{\"a\": 1}\n".to_owned())]);
        let mut out = Vec::new();
        let data: [&[u8]; 3] = [&[1; 8], &[2; 3], &[]];
        write(&metadata, &tensors, &mut out, &mut |i, out| out.write_all(data[i])).unwrap();
        let read = SafetensorsFile::read(&out).unwrap();
        assert_eq!(read.metadata, metadata);
        for (tensor, data) in tensors.iter().zip(data) {
            let found = read.tensor(&tensor.name).unwrap();
            assert_eq!((found.dtype, found.shape.len()), (tensor.dtype, tensor.dims.len()));
            assert_eq!(&out[found.offset as usize..][..found.size.0 as usize], data);
        }
        assert_eq!(read.tensors.iter().map(|t| t.offset).min().unwrap() % 8, 0);
        for name in DType::ALL.into_iter().filter_map(name_of) {
            assert!(dtype_of(name).is_some());
        }
        let short = write(&metadata, &tensors, &mut Vec::new(), &mut |_, out| out.write_all(&[0; 8]));
        assert!(short.unwrap_err().to_string().contains("8 bytes of data were given"));
        let twice = [tensor("a", DType::U8, &[]), tensor("a", DType::U8, &[])];
        assert!(write(&metadata, &twice, &mut Vec::new(), &mut |_, o| o.write_all(&[0])).is_err());
    }

    proptest! {
        #[test]
        fn damaged_files_end_in_a_result(flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 0..4), end: prop::sample::Index) {
            let mut bytes = file(GOOD, 16);
            for (at, bit) in &flips {
                let at = at.index(bytes.len());
                bytes[at] ^= 1 << bit;
            }
            bytes.truncate(end.index(bytes.len() * 2).min(bytes.len()));
            if let Ok(read) = SafetensorsFile::read(&bytes) {
                for tensor in &read.tensors {
                    prop_assert!(tensor.offset + tensor.size.0 <= bytes.len() as u64);
                }
            }
        }
    }
}
