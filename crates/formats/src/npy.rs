//! NumPy files: `.npy` versions 1 to 3 and `.npz` archives.
//!
//! Element types that NumPy does not have (bf16, 8-bit and 4-bit floats, 4-bit integers) are written as raw bytes of
//! their size (`|V1`, `<V2`), as the `ml_dtypes` package does; reading such an array needs the type from the caller
//! ([`read_as`]).

use std::io::{Read, Seek, Write};

use lightering_graph::{DType, Tensor};

use crate::tensor::{checked_size, from_bytes};
use crate::{Error, Result};

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// Longest header that is read.
pub const MAX_HEADER_BYTES: usize = 64 * 1024;
/// Most dimensions of an array.
pub const MAX_RANK: usize = 64;
/// Most arrays in one archive.
pub const MAX_ENTRIES: usize = 65_536;
/// Most bytes that the arrays of one archive may take together, or a single array read from a stream.
pub const MAX_ARCHIVE_BYTES: u64 = 1 << 36;
/// Headers are padded so that the data starts at a multiple of this.
const ALIGNMENT: usize = 64;

/// An element type as a NumPy type string spells it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Plain(DType),
    /// Raw bytes of this size per element.
    Opaque(usize),
    /// UTF-32 texts of at most so many characters.
    Unicode(usize),
    /// Byte texts of at most so many bytes.
    Bytes(usize),
}

struct Header {
    kind: Kind,
    big_endian: bool,
    fortran: bool,
    shape: Vec<usize>,
}

/// Reads an array.
pub fn read(input: &mut dyn Read) -> Result<Tensor> {
    read_as(input, None)
}

/// Reads an array; one of raw bytes is taken to hold elements of type `opaque`.
pub fn read_as(input: &mut dyn Read, opaque: Option<DType>) -> Result<Tensor> {
    read_limited(input, opaque, MAX_ARCHIVE_BYTES)
}

fn read_limited(input: &mut dyn Read, opaque: Option<DType>, limit: u64) -> Result<Tensor> {
    let header = read_header(input)?;
    let (dtype, width) = match header.kind {
        Kind::Plain(dtype) => (dtype, dtype.size_bytes()),
        Kind::Unicode(length) => (DType::String, length * 4),
        Kind::Bytes(length) => (DType::String, length),
        Kind::Opaque(size) => match opaque {
            Some(dtype) if dtype.size_bytes() == size => (dtype, size),
            Some(dtype) => {
                return Err(Error::invalid(
                    "npy header",
                    format!("elements of {size} raw bytes"),
                    format!("{} bytes for {dtype}", dtype.size_bytes()),
                ));
            }
            None => {
                return Err(Error::invalid(
                    "npy header",
                    format!("elements of {size} raw bytes, which say nothing about their type"),
                    "a numeric type, or a declared type to read them as",
                ));
            }
        },
    };
    let (count, _) = checked_size("npy header", dtype, &header.shape)?;
    let size = (count as u64).saturating_mul(width as u64);
    if size > limit {
        return Err(Error::limit("npy header", "size of the array in bytes", size, limit));
    }
    // The buffer grows with what is really there, so a header that lies costs nothing.
    let mut bytes = Vec::new();
    input.take(size).read_to_end(&mut bytes).map_err(|e| Error::io("npy data", e))?;
    if bytes.len() as u64 != size {
        return Err(Error::corrupt(
            "npy data",
            format!("{} bytes where shape {:?} needs {size}", bytes.len(), header.shape),
        ));
    }
    let text = dtype == DType::String;
    let swap_width = match header.kind {
        Kind::Plain(DType::Complex64) | Kind::Unicode(_) => 4,
        Kind::Plain(DType::Complex128) => 8,
        Kind::Bytes(_) => 1,
        _ => width,
    };
    if header.big_endian && swap_width > 1 {
        bytes.chunks_exact_mut(swap_width).for_each(<[u8]>::reverse);
    }
    if header.fortran {
        bytes = to_row_major(&bytes, &header.shape, width);
    }
    if text {
        let strings = if width == 0 {
            vec![String::new(); count]
        } else {
            bytes.chunks_exact(width).map(|c| text_of(c, header.kind)).collect::<Result<_>>()?
        };
        return Ok(Tensor::from_strings(&header.shape, strings));
    }
    if dtype == DType::Bool {
        bytes.iter_mut().for_each(|b| *b = u8::from(*b != 0));
    }
    from_bytes("npy data", dtype, &header.shape, &bytes)
}

fn text_of(bytes: &[u8], kind: Kind) -> Result<String> {
    let bad = || Error::corrupt("npy data", "a text is not valid Unicode");
    match kind {
        Kind::Unicode(_) => {
            let mut text = String::new();
            for c in bytes.chunks_exact(4) {
                let code = u32::from_le_bytes([c[0], c[1], c[2], c[3]]);
                text.push(char::from_u32(code).ok_or_else(bad)?);
            }
            Ok(text.trim_end_matches('\0').to_owned())
        }
        _ => {
            let end = bytes.iter().rposition(|b| *b != 0).map_or(0, |i| i + 1);
            String::from_utf8(bytes[..end].to_vec()).map_err(|_| bad())
        }
    }
}

/// Reorders column-major elements of `width` bytes into row-major order.
fn to_row_major(bytes: &[u8], shape: &[usize], width: usize) -> Vec<u8> {
    if shape.len() < 2 || width == 0 || bytes.is_empty() {
        return bytes.to_vec();
    }
    let mut strides = vec![width; shape.len()];
    for i in 1..shape.len() {
        strides[i] = strides[i - 1] * shape[i - 1];
    }
    let mut out = Vec::with_capacity(bytes.len());
    let mut index = vec![0; shape.len()];
    let mut offset = 0;
    while out.len() < bytes.len() {
        out.extend_from_slice(&bytes[offset..offset + width]);
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            offset += strides[axis];
            if index[axis] < shape[axis] {
                break;
            }
            offset -= strides[axis] * shape[axis];
            index[axis] = 0;
        }
    }
    out
}

fn read_header(input: &mut dyn Read) -> Result<Header> {
    let mut exact = |buffer: &mut [u8]| {
        input.read_exact(buffer).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => Error::corrupt("npy header", "the file ends inside it"),
            _ => Error::io("npy header", e),
        })
    };
    let mut start = [0; 8];
    exact(&mut start)?;
    if &start[..6] != MAGIC {
        return Err(Error::corrupt("npy header", "the file does not start with \\x93NUMPY"));
    }
    let size = match start[6] {
        1 => {
            let mut size = [0; 2];
            exact(&mut size)?;
            u16::from_le_bytes(size) as usize
        }
        2 | 3 => {
            let mut size = [0; 4];
            exact(&mut size)?;
            u32::from_le_bytes(size) as usize
        }
        version => return Err(Error::unsupported("npy header", format!("format version {version}"))),
    };
    if size > MAX_HEADER_BYTES {
        return Err(Error::limit("npy header", "its length in bytes", size as u64, MAX_HEADER_BYTES as u64));
    }
    let mut text = vec![0; size];
    exact(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    HeaderParser { rest: text.trim() }.parse()
}

/// Parses the Python dictionary of a header: three keys, literals only.
struct HeaderParser<'a> {
    rest: &'a str,
}

impl<'a> HeaderParser<'a> {
    fn parse(mut self) -> Result<Header> {
        let (mut descr, mut fortran, mut shape) = (None, None, None);
        self.expect('{')?;
        loop {
            if self.accept('}') {
                break;
            }
            let key = self.quoted()?;
            self.expect(':')?;
            match key {
                "descr" => descr = Some(self.quoted()?),
                "fortran_order" => {
                    fortran = Some(if self.word("True") {
                        true
                    } else if self.word("False") {
                        false
                    } else {
                        return Err(self.bad("True or False"));
                    });
                }
                "shape" => shape = Some(self.shape()?),
                _ => return Err(self.bad("one of the keys descr, fortran_order, shape")),
            }
            if !self.accept(',') {
                self.expect('}')?;
                break;
            }
        }
        if !self.rest.trim().is_empty() {
            return Err(self.bad("nothing after the dictionary"));
        }
        match (descr, fortran, shape) {
            (Some(descr), Some(fortran), Some(shape)) => {
                let (kind, big_endian) = parse_descr(descr)?;
                Ok(Header { kind, big_endian, fortran, shape })
            }
            _ => Err(Error::corrupt("npy header", "descr, fortran_order or shape is missing")),
        }
    }

    fn bad(&self, expected: &str) -> Error {
        let found: String = self.rest.chars().take(24).collect();
        Error::invalid("npy header", format!("{found:?}"), expected)
    }

    fn accept(&mut self, c: char) -> bool {
        self.rest = self.rest.trim_start();
        match self.rest.strip_prefix(c) {
            Some(rest) => {
                self.rest = rest.trim_start();
                true
            }
            None => false,
        }
    }

    fn expect(&mut self, c: char) -> Result<()> {
        if self.accept(c) { Ok(()) } else { Err(self.bad(&format!("{c:?}"))) }
    }

    fn word(&mut self, word: &str) -> bool {
        match self.rest.strip_prefix(word) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn quoted(&mut self) -> Result<&'a str> {
        let quote = if self.rest.starts_with('\'') { '\'' } else { '"' };
        let inner = self.rest.strip_prefix(quote).ok_or_else(|| {
            // A list here is a record type.
            if self.rest.starts_with('[') {
                Error::unsupported("npy header", "an array of records")
            } else {
                self.bad("a quoted text")
            }
        })?;
        let end = inner.find(quote).ok_or_else(|| self.bad("a closing quote"))?;
        self.rest = inner[end + 1..].trim_start();
        Ok(&inner[..end])
    }

    fn shape(&mut self) -> Result<Vec<usize>> {
        self.expect('(')?;
        let mut shape = Vec::new();
        while !self.accept(')') {
            let end = self.rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest.len());
            let number = self.rest[..end].parse().map_err(|_| self.bad("a dimension"))?;
            // Python 2 wrote a trailing L.
            self.rest = self.rest[end..].trim_start_matches('L').trim_start();
            shape.push(number);
            if shape.len() > MAX_RANK {
                return Err(Error::limit("npy header", "rank", shape.len() as u64, MAX_RANK as u64));
            }
            if !self.accept(',') {
                self.expect(')')?;
                break;
            }
        }
        Ok(shape)
    }
}

fn parse_descr(descr: &str) -> Result<(Kind, bool)> {
    let unknown = || Error::unsupported("npy header", format!("the element type {descr:?}"));
    let mut chars = descr.chars();
    let order = chars.next().ok_or_else(unknown)?;
    let kind = chars.next().ok_or_else(unknown)?;
    let size: usize = chars.as_str().parse().map_err(|_| unknown())?;
    let big_endian = match order {
        '<' | '|' | '=' => false,
        '>' => true,
        _ => return Err(unknown()),
    };
    if size > MAX_HEADER_BYTES {
        return Err(Error::limit("npy header", "size of an element", size as u64, MAX_HEADER_BYTES as u64));
    }
    let kind = match (kind, size) {
        ('f', 2) => Kind::Plain(DType::F16),
        ('f', 4) => Kind::Plain(DType::F32),
        ('f', 8) => Kind::Plain(DType::F64),
        ('i', 1) => Kind::Plain(DType::I8),
        ('i', 2) => Kind::Plain(DType::I16),
        ('i', 4) => Kind::Plain(DType::I32),
        ('i', 8) => Kind::Plain(DType::I64),
        ('u', 1) => Kind::Plain(DType::U8),
        ('u', 2) => Kind::Plain(DType::U16),
        ('u', 4) => Kind::Plain(DType::U32),
        ('u', 8) => Kind::Plain(DType::U64),
        ('b', 1) => Kind::Plain(DType::Bool),
        ('c', 8) => Kind::Plain(DType::Complex64),
        ('c', 16) => Kind::Plain(DType::Complex128),
        ('U', n) => Kind::Unicode(n),
        ('S', n) => Kind::Bytes(n),
        ('V', n) if n == 1 || n == 2 => Kind::Opaque(n),
        _ => return Err(unknown()),
    };
    Ok((kind, big_endian))
}

fn descr_of(tensor: &Tensor) -> String {
    match tensor.dtype() {
        DType::F16 => "<f2".into(),
        DType::F32 => "<f4".into(),
        DType::F64 => "<f8".into(),
        DType::I8 => "|i1".into(),
        DType::I16 => "<i2".into(),
        DType::I32 => "<i4".into(),
        DType::I64 => "<i8".into(),
        DType::U8 => "|u1".into(),
        DType::U16 => "<u2".into(),
        DType::U32 => "<u4".into(),
        DType::U64 => "<u8".into(),
        DType::Bool => "|b1".into(),
        DType::Complex64 => "<c8".into(),
        DType::Complex128 => "<c16".into(),
        DType::String => format!("<U{}", longest(tensor)),
        DType::BF16 => "<V2".into(),
        DType::F8E4M3FN
        | DType::F8E4M3FNUZ
        | DType::F8E5M2
        | DType::F8E5M2FNUZ
        | DType::F4E2M1
        | DType::I4
        | DType::U4 => "|V1".into(),
    }
}

fn longest(tensor: &Tensor) -> usize {
    tensor.as_strings().iter().map(|s| s.chars().count()).max().unwrap_or(0).max(1)
}

/// Writes an array, version 1, row-major, little-endian.
pub fn write(tensor: &Tensor, out: &mut dyn Write) -> Result<()> {
    let dims: Vec<String> = tensor.dims().iter().map(ToString::to_string).collect();
    let shape = match dims.as_slice() {
        [one] => format!("({one},)"),
        _ => format!("({})", dims.join(", ")),
    };
    let descr = descr_of(tensor);
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    let unpadded = MAGIC.len() + 2 + 2 + header.len() + 1;
    header.push_str(&" ".repeat(unpadded.next_multiple_of(ALIGNMENT) - unpadded));
    header.push('\n');
    let size = u16::try_from(header.len()).map_err(|_| {
        Error::limit("npy header", "its length in bytes", header.len() as u64, u64::from(u16::MAX))
    })?;
    let mut start = MAGIC.to_vec();
    start.extend([1, 0]);
    start.extend(size.to_le_bytes());
    start.extend(header.as_bytes());
    let failed = |e| Error::io("npy output", e);
    out.write_all(&start).map_err(failed)?;
    if tensor.dtype() != DType::String {
        return out.write_all(tensor.as_bytes()).map_err(failed);
    }
    let width = longest(tensor);
    for text in tensor.as_strings() {
        let mut cell: Vec<u8> = text.chars().flat_map(|c| u32::from(c).to_le_bytes()).collect();
        cell.resize(width * 4, 0);
        out.write_all(&cell).map_err(failed)?;
    }
    Ok(())
}

fn zip_error(error: zip::result::ZipError) -> Error {
    match error {
        zip::result::ZipError::Io(e) => Error::io("npz archive", e),
        zip::result::ZipError::UnsupportedArchive(what) => Error::unsupported("npz archive", what),
        other => Error::corrupt("npz archive", other),
    }
}

/// Reads all arrays of an archive, in its order, each with its name (without `.npy`).
pub fn read_npz<R: Read + Seek>(input: R) -> Result<Vec<(String, Tensor)>> {
    read_npz_within(input, MAX_ARCHIVE_BYTES)
}

/// As [`read_npz`], refusing arrays whose unpacked elements take more than `limit` bytes together.
pub fn read_npz_within<R: Read + Seek>(input: R, limit: u64) -> Result<Vec<(String, Tensor)>> {
    let mut archive = zip::ZipArchive::new(input).map_err(zip_error)?;
    if archive.len() > MAX_ENTRIES {
        return Err(Error::limit(
            "npz archive",
            "number of arrays",
            archive.len() as u64,
            MAX_ENTRIES as u64,
        ));
    }
    let mut left = limit.min(MAX_ARCHIVE_BYTES);
    let mut out: Vec<(String, Tensor)> = Vec::new();
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(zip_error)?;
        if entry.is_dir() {
            continue;
        }
        let name = entry.name().map_err(zip_error)?.into_owned();
        let name = name.strip_suffix(".npy").unwrap_or(&name).to_owned();
        let tensor =
            read_limited(&mut entry, None, left).map_err(|e| e.within(format_args!("array {name:?}")))?;
        left = left.saturating_sub(tensor.size_bytes().0);
        out.push((name, tensor));
    }
    Ok(out)
}

/// Writes an archive of named arrays, deflated if `compress`.
pub fn write_npz<'a, W: Write + Seek>(
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    compress: bool,
    out: W,
) -> Result<()> {
    let method = if compress { zip::CompressionMethod::Deflated } else { zip::CompressionMethod::Stored };
    // A fixed date: the same arrays give the same file.
    let options = zip::write::SimpleFileOptions::default()
        .compression_method(method)
        .last_modified_time(zip::DateTime::default())
        .large_file(true);
    let mut archive = zip::ZipWriter::new(out);
    for (name, tensor) in tensors {
        archive.start_file(format!("{name}.npy"), options).map_err(zip_error)?;
        write(tensor, &mut archive)?;
    }
    archive.finish().map_err(zip_error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend([1, 0]);
        out.extend((header.len() as u16).to_le_bytes());
        out.extend(header.as_bytes());
        out.extend(data);
        out
    }

    fn check(header: &str, data: &[u8]) -> Result<Tensor> {
        read(&mut &file(header, data)[..])
    }

    #[test]
    fn fortran_order_is_turned() {
        let header = "{'descr': '|u1', 'fortran_order': True, 'shape': (2, 3), }\n";
        let tensor = check(header, &[1, 4, 2, 5, 3, 6]).unwrap();
        assert_eq!(tensor.as_bytes(), [1, 2, 3, 4, 5, 6]);
        let header = "{'descr': '|u1', 'fortran_order': True, 'shape': (2, 2, 2)}";
        let tensor = check(header, &[0, 4, 2, 6, 1, 5, 3, 7]).unwrap();
        assert_eq!(tensor.as_bytes(), [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn big_endian_is_turned() {
        let tensor =
            check("{\"descr\": \">i2\", 'fortran_order': False, 'shape': (2,)}", &[1, 2, 0xff, 0xfe])
                .unwrap();
        assert_eq!(tensor.as_slice::<i16>(), [0x0102, -2]);
        let tensor = check(
            "{'descr': '>c8', 'fortran_order': False, 'shape': ()}",
            &[0x3f, 0x80, 0, 0, 0x40, 0, 0, 0],
        )
        .unwrap();
        assert_eq!(tensor.as_bytes(), [0, 0, 0x80, 0x3f, 0, 0, 0, 0x40]);
    }

    #[test]
    fn versions_2_and_3_have_long_headers() {
        for version in [2, 3] {
            let header = "{'descr': '<f4', 'fortran_order': False, 'shape': ()}";
            let mut bytes = MAGIC.to_vec();
            bytes.extend([version, 0]);
            bytes.extend((header.len() as u32).to_le_bytes());
            bytes.extend(header.as_bytes());
            bytes.extend(1.5f32.to_le_bytes());
            assert_eq!(read(&mut &bytes[..]).unwrap().as_slice::<f32>(), [1.5]);
        }
    }

    #[test]
    fn texts_round_trip() {
        let texts = vec!["a".to_owned(), "größer".to_owned(), String::new()];
        let tensor = Tensor::from_strings(&[3, 1], texts);
        let mut bytes = Vec::new();
        write(&tensor, &mut bytes).unwrap();
        assert_eq!(read(&mut &bytes[..]).unwrap(), tensor);
    }

    #[test]
    fn a_lying_header_is_refused_without_allocating() {
        let huge = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000, 1000000000, 1000)}";
        assert!(matches!(check(huge, &[]), Err(Error::Limit { .. })));
        let short = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000,)}";
        assert!(matches!(check(short, &[0; 16]), Err(Error::Corrupt { .. })));
        let objects = "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}";
        assert!(matches!(check(objects, &[0; 16]), Err(Error::Unsupported { .. })));
        let records = "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}";
        assert!(matches!(check(records, &[0; 16]), Err(Error::Unsupported { .. })));
    }

    #[test]
    fn opaque_elements_need_a_type() {
        let tensor = Tensor::from_bytes(DType::BF16, &[2], &[0, 1, 2, 3]).unwrap();
        let mut bytes = Vec::new();
        write(&tensor, &mut bytes).unwrap();
        assert!(matches!(read(&mut &bytes[..]), Err(Error::Invalid { .. })));
        assert_eq!(read_as(&mut &bytes[..], Some(DType::BF16)).unwrap(), tensor);
        assert!(read_as(&mut &bytes[..], Some(DType::F32)).is_err());
    }

    #[test]
    fn archives_round_trip() {
        let a = Tensor::from_slice(&[3], &[1i64, -2, 3]);
        let b = Tensor::from_slice(&[2, 0], &[0f32; 0]);
        for compress in [false, true] {
            let mut file = Cursor::new(Vec::new());
            write_npz([("a", &a), ("layer/b", &b)], compress, &mut file).unwrap();
            let read = read_npz(Cursor::new(file.into_inner())).unwrap();
            assert_eq!(read, [("a".to_owned(), a.clone()), ("layer/b".to_owned(), b.clone())]);
        }
    }

    #[test]
    fn an_archive_that_unpacks_to_more_than_the_limit_is_refused() {
        let zeros = Tensor::from_slice(&[100_000], &[0u8; 100_000]);
        let mut file = Cursor::new(Vec::new());
        write_npz([("a", &zeros), ("b", &zeros)], true, &mut file).unwrap();
        let bytes = file.into_inner();
        assert!(bytes.len() < 10_000, "it is packed");
        assert_eq!(read_npz_within(Cursor::new(&bytes), 200_000).unwrap().len(), 2);
        let error = read_npz_within(Cursor::new(&bytes), 199_999).unwrap_err();
        assert!(matches!(error, Error::Limit { .. }), "{error}");
    }

    fn any_tensor() -> impl Strategy<Value = Tensor> {
        let dtypes: Vec<DType> =
            DType::ALL.into_iter().filter(|d| *d != DType::String && *d != DType::Bool).collect();
        (prop::collection::vec(0usize..5, 0..4), prop::sample::select(dtypes), any::<u8>()).prop_map(
            |(shape, dtype, seed)| {
                let size = shape.iter().product::<usize>() * dtype.size_bytes();
                let bytes: Vec<u8> =
                    (0..size).map(|i| (i as u8).wrapping_mul(37).wrapping_add(seed)).collect();
                Tensor::from_bytes(dtype, &shape, &bytes).unwrap()
            },
        )
    }

    proptest! {
        #[test]
        fn arrays_round_trip(tensor in any_tensor()) {
            let mut bytes = Vec::new();
            write(&tensor, &mut bytes).unwrap();
            prop_assert_eq!((bytes.len() - tensor.as_bytes().len()) % ALIGNMENT, 0);
            prop_assert_eq!(read_as(&mut &bytes[..], Some(tensor.dtype())).unwrap(), tensor);
        }

        #[test]
        fn any_header_ends_in_a_result(header in "[{}()':, 0-9a-zA-Z<>|_]{0,80}") {
            let _ = check(&header, &[0; 64]);
        }
    }
}
