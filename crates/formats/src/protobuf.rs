//! A small reader and writer of the protobuf wire format.
//!
//! Why not a general crate: the weights of a model must stay on disk and be found again by their offset, loading must
//! cost a few megabytes whatever the size of the file, and hostile input must meet named limits before it meets the
//! allocator. Code generators of the usual kind materialise every byte of the message.
//!
//! [`Reader`] walks the fields of a message through a small window over a [`ByteSource`]; a length-delimited field is
//! reported as a [`Span`] and costs nothing until it is entered or read. [`Writer`] builds a message from segments, so
//! that large payloads are borrowed or copied from their source while the file is written.
//!
//! ```
//! use lightering_formats::protobuf::{Reader, Value, Writer};
//! let mut inner = Writer::new();
//! inner.string(1, "add");
//! let mut outer = Writer::new();
//! outer.varint(3, 150);
//! outer.message(4, inner);
//! let bytes = outer.into_bytes().unwrap();
//!
//! let mut reader = Reader::new(&bytes);
//! assert_eq!(reader.next_field().unwrap().unwrap().value, Value::Varint(150));
//! let Value::Span(span) = reader.next_field().unwrap().unwrap().value else { panic!() };
//! reader.nested("Inner", span, |r| { assert_eq!(r.next_field()?.unwrap().number, 1); Ok(()) }).unwrap();
//! ```

use std::io::Write;

use lightering_tier::ByteSource;

use crate::{Error, Result};

/// Deepest nesting of messages that a reader enters.
pub const MAX_DEPTH: u32 = 64;
/// Most memory, in bytes, that the structures read from one file may take (weights excluded: they stay in the file).
pub const MAX_STRUCTURE_BYTES: u64 = 1 << 30;
/// Bytes that a reader keeps in memory at a time.
const WINDOW_BYTES: usize = 32 * 1024;
/// A single copy from a source while writing moves at most this many bytes.
const COPY_BYTES: usize = 256 * 1024;

/// A range of bytes in a [`ByteSource`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    /// Offset of the first byte.
    pub offset: u64,
    /// Number of bytes.
    pub size_bytes: u64,
}

/// The value of a field as the wire carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// Wire type 0.
    Varint(u64),
    /// Wire type 1.
    Fixed64(u64),
    /// Wire type 2: a string, bytes, a message or packed numbers.
    Span(Span),
    /// Wire type 5.
    Fixed32(u32),
}

/// One field of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// The field number.
    pub number: u32,
    /// Its value.
    pub value: Value,
}

/// Walks the fields of a message, holding a small window of the source in memory.
pub struct Reader<'a> {
    source: &'a dyn ByteSource,
    /// Size of the source; no span reaches past it.
    total: u64,
    window: Vec<u8>,
    window_start: u64,
    position: u64,
    end: u64,
    depth: u32,
    message: &'static str,
    charged: u64,
}

impl<'a> Reader<'a> {
    /// A reader over the whole source as one message.
    pub fn new(source: &'a dyn ByteSource) -> Reader<'a> {
        let total = source.len_bytes().0;
        Reader {
            source,
            total,
            window: Vec::new(),
            window_start: 0,
            position: 0,
            end: total,
            depth: 0,
            message: "file",
            charged: 0,
        }
    }

    /// The place of the next byte, for messages.
    pub fn place(&self) -> String {
        format!("{} at byte {}", self.message, self.position)
    }

    /// Counts memory that the caller is about to keep, and refuses when the file asks for too much.
    pub fn charge(&mut self, size_bytes: u64) -> Result<()> {
        self.charged = self.charged.saturating_add(size_bytes);
        if self.charged > MAX_STRUCTURE_BYTES {
            return Err(Error::limit(
                self.place(),
                "memory for the model's structure in bytes",
                self.charged,
                MAX_STRUCTURE_BYTES,
            ));
        }
        Ok(())
    }

    /// The next field of the current message, or `None` at its end.
    pub fn next_field(&mut self) -> Result<Option<Field>> {
        if self.position >= self.end {
            return Ok(None);
        }
        let key = self.varint()?;
        let number = u32::try_from(key >> 3)
            .ok()
            .filter(|n| (1..1 << 29).contains(n))
            .ok_or_else(|| Error::corrupt(self.place(), format!("field number {}", key >> 3)))?;
        let value = match key & 7 {
            0 => Value::Varint(self.varint()?),
            1 => Value::Fixed64(u64::from_le_bytes(self.array()?)),
            2 => {
                let size_bytes = self.varint()?;
                if size_bytes > self.end - self.position {
                    return Err(Error::corrupt(
                        self.place(),
                        format!(
                            "field {number} claims {size_bytes} bytes, but {} are left",
                            self.end - self.position
                        ),
                    ));
                }
                let span = Span { offset: self.position, size_bytes };
                self.position += size_bytes;
                Value::Span(span)
            }
            5 => Value::Fixed32(u32::from_le_bytes(self.array()?)),
            wire => return Err(Error::corrupt(self.place(), format!("wire type {wire}"))),
        };
        Ok(Some(Field { number, value }))
    }

    /// Runs `f` with the reader confined to the message at `span`, then returns to where it was.
    pub fn nested<T>(
        &mut self,
        message: &'static str,
        span: Span,
        f: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        if self.depth >= MAX_DEPTH {
            return Err(Error::limit(
                self.place(),
                "nesting of messages",
                u64::from(self.depth) + 1,
                u64::from(MAX_DEPTH),
            ));
        }
        self.check(span)?;
        let outer = (self.position, self.end, self.message);
        self.position = span.offset;
        self.end = span.offset + span.size_bytes;
        self.message = message;
        self.depth += 1;
        let result = f(self);
        (self.position, self.end, self.message) = outer;
        self.depth -= 1;
        result
    }

    /// The bytes at `span`, counted against the structure limit.
    pub fn bytes(&mut self, span: Span) -> Result<Vec<u8>> {
        self.check(span)?;
        self.charge(span.size_bytes)?;
        let mut out = vec![0; span.size_bytes as usize];
        self.copy(span.offset, &mut out)?;
        Ok(out)
    }

    /// The text at `span`; at most `size_limit` bytes.
    pub fn string(&mut self, span: Span, size_limit: u64) -> Result<String> {
        if span.size_bytes > size_limit {
            return Err(Error::limit(
                self.place(),
                "length of a string in bytes",
                span.size_bytes,
                size_limit,
            ));
        }
        let bytes = self.bytes(span)?;
        String::from_utf8(bytes).map_err(|_| Error::corrupt(self.place(), "a name is not valid UTF-8"))
    }

    /// Calls `f` with each varint of a packed field.
    pub fn packed_varints(
        &mut self,
        span: Span,
        mut f: impl FnMut(&mut Self, u64) -> Result<()>,
    ) -> Result<()> {
        self.nested("packed numbers", span, |r| {
            while r.position < r.end {
                let value = r.varint()?;
                f(r, value)?;
            }
            Ok(())
        })
    }

    fn check(&self, span: Span) -> Result<()> {
        match span.offset.checked_add(span.size_bytes) {
            Some(end) if end <= self.total => Ok(()),
            _ => Err(Error::corrupt(self.place(), "a range of bytes lies outside of the file")),
        }
    }

    fn varint(&mut self) -> Result<u64> {
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let byte = self.byte()?;
            // The tenth byte holds the last bit of 64; what does not fit is an error, not a silent truncation.
            if shift == 63 && byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Error::corrupt(self.place(), "a varint is longer than 64 bits"))
    }

    fn byte(&mut self) -> Result<u8> {
        if self.position >= self.end {
            return Err(Error::corrupt(self.place(), "the message ends inside a field"));
        }
        let start = self.window_start;
        if self.position < start || self.position - start >= self.window.len() as u64 {
            self.fill(self.position)?;
        }
        let byte = self.window[(self.position - self.window_start) as usize];
        self.position += 1;
        Ok(byte)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        for byte in &mut out {
            *byte = self.byte()?;
        }
        Ok(out)
    }

    fn fill(&mut self, offset: u64) -> Result<()> {
        let size_bytes = (self.total - offset).min(WINDOW_BYTES as u64) as usize;
        self.window.resize(size_bytes, 0);
        let result = self.source.read_at(offset, &mut self.window);
        if result.is_err() {
            self.window.clear();
        }
        self.window_start = offset;
        result.map_err(|e| Error::io(self.place(), e))
    }

    fn copy(&mut self, offset: u64, out: &mut [u8]) -> Result<()> {
        if out.len() < WINDOW_BYTES / 2 && !out.is_empty() {
            let end = offset + out.len() as u64;
            if offset < self.window_start || end > self.window_start + self.window.len() as u64 {
                self.fill(offset)?;
            }
            let start = (offset - self.window_start) as usize;
            out.copy_from_slice(&self.window[start..start + out.len()]);
            return Ok(());
        }
        self.source.read_at(offset, out).map_err(|e| Error::io(self.place(), e))
    }
}

/// A piece of a message that is being written.
enum Segment<'a> {
    Owned(Vec<u8>),
    Borrowed(&'a [u8]),
    Copied(&'a dyn ByteSource, Span),
}

/// Builds a message; payloads may be borrowed, or copied from a source only when the message is written out.
#[derive(Default)]
pub struct Writer<'a> {
    segments: Vec<Segment<'a>>,
    size_bytes: u64,
}

impl<'a> Writer<'a> {
    /// An empty message.
    pub fn new() -> Self {
        Self::default()
    }

    /// The encoded size so far.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Appends a varint field.
    pub fn varint(&mut self, number: u32, value: u64) {
        self.key(number, 0);
        self.raw_varint(value);
    }

    /// Appends a signed varint field in the plain (not zigzag) encoding of `int32` and `int64`.
    pub fn int(&mut self, number: u32, value: i64) {
        self.varint(number, value as u64);
    }

    /// Appends a 32-bit field.
    pub fn fixed32(&mut self, number: u32, value: u32) {
        self.key(number, 5);
        self.push(&value.to_le_bytes());
    }

    /// Appends a string field.
    pub fn string(&mut self, number: u32, text: &str) {
        self.bytes(number, text.as_bytes());
    }

    /// Appends a string field unless the text is empty.
    pub fn string_if_any(&mut self, number: u32, text: &str) {
        if !text.is_empty() {
            self.string(number, text);
        }
    }

    /// Appends a bytes field by copying it.
    pub fn bytes(&mut self, number: u32, bytes: &[u8]) {
        self.key(number, 2);
        self.raw_varint(bytes.len() as u64);
        self.push(bytes);
    }

    /// Appends a bytes field that is borrowed until the message is written.
    pub fn borrowed(&mut self, number: u32, bytes: &'a [u8]) {
        self.key(number, 2);
        self.raw_varint(bytes.len() as u64);
        self.size_bytes += bytes.len() as u64;
        self.segments.push(Segment::Borrowed(bytes));
    }

    /// Appends a bytes field that is copied from `source` while the message is written.
    pub fn copied(&mut self, number: u32, source: &'a dyn ByteSource, span: Span) {
        self.key(number, 2);
        self.raw_varint(span.size_bytes);
        self.size_bytes += span.size_bytes;
        self.segments.push(Segment::Copied(source, span));
    }

    /// Appends packed varints.
    pub fn packed_varints(&mut self, number: u32, values: impl IntoIterator<Item = u64>) {
        let mut packed = Vec::new();
        for value in values {
            push_varint(&mut packed, value);
        }
        self.bytes(number, &packed);
    }

    /// Appends a nested message.
    pub fn message(&mut self, number: u32, message: Writer<'a>) {
        self.key(number, 2);
        self.raw_varint(message.size_bytes);
        self.size_bytes += message.size_bytes;
        for segment in message.segments {
            match (self.segments.last_mut(), segment) {
                (Some(Segment::Owned(last)), Segment::Owned(bytes)) => last.extend_from_slice(&bytes),
                (_, segment) => self.segments.push(segment),
            }
        }
    }

    /// Writes the message.
    pub fn write_to(&self, out: &mut dyn Write) -> Result<()> {
        let failed = |e| Error::io("output", e);
        let mut buffer = Vec::new();
        for segment in &self.segments {
            match segment {
                Segment::Owned(bytes) => out.write_all(bytes).map_err(failed)?,
                Segment::Borrowed(bytes) => out.write_all(bytes).map_err(failed)?,
                Segment::Copied(source, span) => {
                    let mut done = 0;
                    while done < span.size_bytes {
                        let step = (span.size_bytes - done).min(COPY_BYTES as u64);
                        buffer.resize(step as usize, 0);
                        source
                            .read_at(span.offset + done, &mut buffer)
                            .map_err(|e| Error::io("weights of the source model", e))?;
                        out.write_all(&buffer).map_err(failed)?;
                        done += step;
                    }
                }
            }
        }
        Ok(())
    }

    /// The message as one buffer.
    pub fn into_bytes(self) -> Result<Vec<u8>> {
        let mut out = Vec::with_capacity(self.size_bytes as usize);
        self.write_to(&mut out)?;
        Ok(out)
    }

    fn key(&mut self, number: u32, wire: u32) {
        self.raw_varint(u64::from(number << 3 | wire));
    }

    fn raw_varint(&mut self, value: u64) {
        let before = self.owned().len();
        push_varint(self.owned(), value);
        self.size_bytes += (self.owned().len() - before) as u64;
    }

    fn push(&mut self, bytes: &[u8]) {
        self.owned().extend_from_slice(bytes);
        self.size_bytes += bytes.len() as u64;
    }

    fn owned(&mut self) -> &mut Vec<u8> {
        if !matches!(self.segments.last(), Some(Segment::Owned(_))) {
            self.segments.push(Segment::Owned(Vec::new()));
        }
        match self.segments.last_mut() {
            Some(Segment::Owned(bytes)) => bytes,
            _ => unreachable!("an owned segment was just pushed"),
        }
    }
}

/// Appends `value` in varint encoding.
pub fn push_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read_all(bytes: &[u8]) -> Result<Vec<Field>> {
        let bytes = bytes.to_vec();
        let mut reader = Reader::new(&bytes);
        let mut out = Vec::new();
        while let Some(field) = reader.next_field()? {
            out.push(field);
        }
        Ok(out)
    }

    #[test]
    fn over_long_varint_is_refused() {
        assert!(matches!(read_all(&[0x08; 1]), Err(Error::Corrupt { .. })));
        let mut bytes = vec![0x08];
        bytes.extend([0xff; 9]);
        bytes.push(0x02);
        assert!(matches!(read_all(&bytes), Err(Error::Corrupt { .. })));
        *bytes.last_mut().unwrap() = 0x01;
        assert_eq!(read_all(&bytes).unwrap()[0].value, Value::Varint(u64::MAX));
    }

    #[test]
    fn length_past_the_end_is_refused() {
        assert!(matches!(read_all(&[0x0a, 0x05, 1, 2]), Err(Error::Corrupt { .. })));
    }

    #[test]
    fn nesting_is_limited() {
        fn descend(reader: &mut Reader, levels: &mut u32) -> Result<()> {
            while let Some(field) = reader.next_field()? {
                if let Value::Span(span) = field.value {
                    *levels += 1;
                    reader.nested("level", span, |r| descend(r, levels))?;
                }
            }
            Ok(())
        }
        let mut message = Writer::new();
        for _ in 0..200 {
            let mut outer = Writer::new();
            outer.message(1, message);
            message = outer;
        }
        let bytes = message.into_bytes().unwrap();
        let mut levels = 0;
        let error = descend(&mut Reader::new(&bytes), &mut levels).unwrap_err();
        assert!(matches!(error, Error::Limit { .. }), "{error}");
        assert_eq!(levels, MAX_DEPTH + 1);
    }

    #[test]
    fn a_copied_payload_equals_a_borrowed_one() {
        let payload: Vec<u8> = (0..700_000u32).map(|i| i as u8).collect();
        let span = Span { offset: 100, size_bytes: 600_000 };
        let mut copied = Writer::new();
        copied.copied(9, &payload, span);
        let mut borrowed = Writer::new();
        borrowed.borrowed(9, &payload[100..600_100]);
        assert_eq!(copied.size_bytes(), borrowed.size_bytes());
        assert_eq!(copied.into_bytes().unwrap(), borrowed.into_bytes().unwrap());
    }

    proptest! {
        #[test]
        fn fields_round_trip(fields in prop::collection::vec((1u32..1000, any::<u64>(), prop::collection::vec(any::<u8>(), 0..100)), 0..40)) {
            let mut inner = Writer::new();
            for (number, value, bytes) in &fields {
                inner.varint(*number, *value);
                inner.bytes(*number, bytes);
                inner.fixed32(*number, *value as u32);
            }
            let mut outer = Writer::new();
            outer.message(7, inner);
            let encoded = outer.into_bytes().unwrap();
            let mut reader = Reader::new(&encoded);
            let Some(Field { number: 7, value: Value::Span(span) }) = reader.next_field().unwrap() else { panic!() };
            reader.nested("Inner", span, |r| {
                for (number, value, bytes) in &fields {
                    assert_eq!(r.next_field()?, Some(Field { number: *number, value: Value::Varint(*value) }));
                    let Some(Field { value: Value::Span(span), .. }) = r.next_field()? else { panic!() };
                    assert_eq!(&r.bytes(span)?, bytes);
                    assert_eq!(r.next_field()?.unwrap().value, Value::Fixed32(*value as u32));
                }
                assert_eq!(r.next_field()?, None);
                Ok(())
            }).unwrap();
        }

        #[test]
        fn any_bytes_end_in_a_result(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_all(&bytes);
        }
    }
}
