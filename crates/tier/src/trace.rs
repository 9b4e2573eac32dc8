//! What a run needed, turn by turn, in a file.
//!
//! Little-endian. Header: `LTRC`, version u16 (1), 0 u16, number of groups u32, bytes of the largest chunk u64, slots of
//! the recorded store u64; then for each group its number u32 and its count of chunks u32. Records: 1 u8, place of the
//! group in the header u16, number of uses u16, microseconds of computing u32, then for each use the chunk's index u16
//! and its score u16 (the upper half of an f32); or 2 u8, a step has ended. A file that ends inside a record was cut off,
//! and is good up to there.

use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;

use lightering_units::{Bytes, Seconds};

use crate::TierError;
use crate::policy::Use;

const MAGIC: &[u8; 4] = b"LTRC";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 28;
const TURN: u8 = 1;
const END_OF_STEP: u8 = 2;

/// The largest trace that is read, which in memory takes about three times its bytes.
pub const TRACE_MAX_BYTES: Bytes = Bytes::mib(512);

/// Most groups of a trace, and most chunks of a group.
const COUNT_MAX: u32 = 1 << 16;

/// What a trace says before its records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceHeader {
    /// The groups in the order of a step, each with its number of chunks.
    pub groups: Vec<(u32, u32)>,
    /// Size of the largest chunk without padding.
    pub chunk_bytes: Bytes,
    /// Slots of the store that was recorded; 0 for a trace that no store recorded.
    pub slots: u64,
}

impl TraceHeader {
    /// Number of chunks.
    pub fn chunks(&self) -> u64 {
        self.groups.iter().map(|g| u64::from(g.1)).sum()
    }

    pub(crate) fn check(&self, offset: u64) -> Result<(), TierError> {
        let corrupt = |what: String| Err(TierError::Corrupt { offset, what });
        if self.groups.is_empty() || self.groups.len() > COUNT_MAX as usize {
            return corrupt(format!("{} groups; expected 1 to {COUNT_MAX}", self.groups.len()));
        }
        if let Some(pair) = self.groups.windows(2).find(|pair| pair[0].0 >= pair[1].0) {
            return corrupt(format!("group {} comes after group {}", pair[1].0, pair[0].0));
        }
        if let Some((group, count)) = self.groups.iter().find(|g| !(1..=COUNT_MAX).contains(&g.1)) {
            return corrupt(format!("group {group} has {count} chunks; expected 1 to {COUNT_MAX}"));
        }
        Ok(())
    }
}

/// Writes a trace, record by record.
#[derive(Debug)]
pub struct TraceWriter<W: Write> {
    out: W,
    groups: Vec<(u32, u32)>,
    written: u64,
    limit: Bytes,
    buffer: Vec<u8>,
}

/// Bytes that are collected before they are written.
const BUFFER_BYTES: usize = 16 << 10;

impl<W: Write> TraceWriter<W> {
    /// Writes the header; no more than `limit` bytes will be written in all.
    ///
    /// # Errors
    /// `Io`, or `Corrupt` for a header that no reader would take.
    pub fn new(out: W, header: &TraceHeader, limit: Bytes) -> Result<TraceWriter<W>, TierError> {
        header.check(0)?;
        let mut buffer = Vec::with_capacity(BUFFER_BYTES);
        buffer.extend_from_slice(MAGIC);
        buffer.extend_from_slice(&VERSION.to_le_bytes());
        buffer.extend_from_slice(&[0, 0]);
        buffer.extend_from_slice(&(header.groups.len() as u32).to_le_bytes());
        buffer.extend_from_slice(&header.chunk_bytes.0.to_le_bytes());
        buffer.extend_from_slice(&header.slots.to_le_bytes());
        for (group, count) in &header.groups {
            buffer.extend_from_slice(&group.to_le_bytes());
            buffer.extend_from_slice(&count.to_le_bytes());
        }
        let written = buffer.len() as u64;
        let mut writer = TraceWriter { out, groups: header.groups.clone(), written, limit, buffer };
        writer.flush()?;
        Ok(writer)
    }

    fn flush(&mut self) -> Result<(), TierError> {
        let result = self.out.write_all(&self.buffer);
        self.buffer.clear();
        result.map_err(|e| TierError::Io { what: "writing the chunk trace".to_owned(), error: Arc::new(e) })
    }

    fn reserve(&mut self, bytes: usize) -> Result<(), TierError> {
        if self.written + bytes as u64 > self.limit.0 {
            // Nothing shorter may follow what was left out.
            self.limit = Bytes::ZERO;
            return Err(TierError::Invalid(format!(
                "the chunk trace ended at its limit after {}",
                Bytes(self.written)
            )));
        }
        self.written += bytes as u64;
        if self.buffer.len() + bytes > BUFFER_BYTES { self.flush() } else { Ok(()) }
    }

    /// Writes what a group needed and how long it was computed on.
    ///
    /// # Errors
    /// `Io`; `Invalid` when the limit is reached, and for a group or index that the header does not have.
    pub fn turn(&mut self, group: u32, uses: &[Use], computing: Seconds) -> Result<(), TierError> {
        let rank = self.groups.binary_search_by_key(&group, |g| g.0).ok();
        let fits = |count: u32| uses.len() <= usize::from(u16::MAX) && uses.iter().all(|u| u.index < count);
        let Some(rank) = rank.filter(|&rank| fits(self.groups[rank].1)) else {
            return Err(TierError::Invalid(format!(
                "the chunk trace has no group {group} with so many chunks as are used"
            )));
        };
        self.reserve(9 + 4 * uses.len())?;
        self.buffer.push(TURN);
        self.buffer.extend_from_slice(&(rank as u16).to_le_bytes());
        self.buffer.extend_from_slice(&(uses.len() as u16).to_le_bytes());
        let micros = (computing.0 * 1e6).clamp(0.0, f64::from(u32::MAX)) as u32;
        self.buffer.extend_from_slice(&micros.to_le_bytes());
        for choice in uses {
            self.buffer.extend_from_slice(&(choice.index as u16).to_le_bytes());
            let score = if choice.score.is_finite() { choice.score.max(0.0) } else { 0.0 };
            self.buffer.extend_from_slice(&((score.to_bits() >> 16) as u16).to_le_bytes());
        }
        Ok(())
    }

    /// Writes that a step has ended.
    ///
    /// # Errors
    /// As for [`TraceWriter::turn`].
    pub fn end_step(&mut self) -> Result<(), TierError> {
        self.reserve(1)?;
        self.buffer.push(END_OF_STEP);
        Ok(())
    }

    /// Writes what is still collected.
    ///
    /// # Errors
    /// `Io`.
    pub fn finish(&mut self) -> Result<(), TierError> {
        self.flush()?;
        let error = |e| TierError::Io { what: "writing the chunk trace".to_owned(), error: Arc::new(e) };
        self.out.flush().map_err(error)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct StoredTurn {
    group: u32,
    step: u32,
    first: u32,
    computing_micros: u32,
}

/// A recorded run.
#[derive(Clone, Debug, PartialEq)]
pub struct ChunkTrace {
    header: TraceHeader,
    turns: Vec<StoredTurn>,
    uses: Vec<Use>,
    steps: u64,
    cut: bool,
}

/// What one group needed in one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Turn<'a> {
    /// Steps that ended before.
    pub step: u64,
    /// The group.
    pub group: u32,
    /// What the router chose.
    pub uses: &'a [Use],
    /// Time until the next turn, without waiting for chunks.
    pub computing: Seconds,
}

/// Takes numbers off the front of a file's bytes.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let bytes = self.bytes.get(self.at..)?.first_chunk::<N>()?;
        self.at += N;
        Some(*bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

impl ChunkTrace {
    /// Reads the bytes of a trace file.
    ///
    /// # Errors
    /// `Corrupt`, with the place.
    pub fn parse(bytes: &[u8]) -> Result<ChunkTrace, TierError> {
        let corrupt = |offset: usize, what: String| TierError::Corrupt { offset: offset as u64, what };
        if bytes.len() as u64 > TRACE_MAX_BYTES.0 {
            return Err(corrupt(0, format!("the file is larger than {TRACE_MAX_BYTES}")));
        }
        let mut cursor = Cursor { bytes, at: 0 };
        if cursor.take::<4>().as_ref() != Some(MAGIC) {
            return Err(corrupt(0, "is no chunk trace; expected a file that begins with LTRC".to_owned()));
        }
        let short = || corrupt(bytes.len(), "the file ends inside of its header".to_owned());
        let version = cursor.u16().ok_or_else(short)?;
        if version != VERSION {
            return Err(corrupt(4, format!("has version {version}; expected {VERSION}")));
        }
        cursor.u16().ok_or_else(short)?;
        let count = cursor.u32().ok_or_else(short)?;
        let chunk_bytes = Bytes(cursor.u64().ok_or_else(short)?);
        let slots = cursor.u64().ok_or_else(short)?;
        // Eight bytes of the file for each group, so this allocates no more than the file's size.
        if u64::from(count) * 8 > (bytes.len() - HEADER_BYTES) as u64 {
            return Err(short());
        }
        let groups = (0..count)
            .map(|_| Some((cursor.u32()?, cursor.u32()?)))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(short)?;
        let header = TraceHeader { groups, chunk_bytes, slots };
        header.check(HEADER_BYTES as u64)?;
        let mut trace = ChunkTrace { header, turns: Vec::new(), uses: Vec::new(), steps: 0, cut: false };
        while cursor.at < bytes.len() {
            let start = cursor.at;
            if trace.record(&mut cursor).map_err(|what| corrupt(start, what))?.is_none() {
                trace.cut = true;
                break;
            }
        }
        Ok(trace)
    }

    /// Reads one record; `None` when the file ends inside of it.
    fn record(&mut self, cursor: &mut Cursor<'_>) -> Result<Option<()>, String> {
        match cursor.take::<1>() {
            Some([END_OF_STEP]) => {
                self.steps += 1;
                Ok(Some(()))
            }
            Some([TURN]) => {
                let (Some(rank), Some(count), Some(computing_micros)) =
                    (cursor.u16(), cursor.u16(), cursor.u32())
                else {
                    return Ok(None);
                };
                let groups = self.header.groups.len();
                let Some(&(group, chunks)) = self.header.groups.get(usize::from(rank)) else {
                    return Err(format!("names group {rank} of {groups}"));
                };
                let first = self.uses.len();
                for _ in 0..count {
                    let (Some(index), Some(score)) = (cursor.u16(), cursor.u16()) else {
                        self.uses.truncate(first);
                        return Ok(None);
                    };
                    let score = f32::from_bits(u32::from(score) << 16);
                    if u32::from(index) >= chunks || !(score.is_finite() && score >= 0.0) {
                        return Err(format!(
                            "names chunk {index} of {chunks} in group {group} with the score {score}"
                        ));
                    }
                    self.uses.push(Use { index: index.into(), score });
                }
                // The file's size bounds both counts.
                let (step, first) = (self.steps as u32, first as u32);
                self.turns.push(StoredTurn { group, step, first, computing_micros });
                Ok(Some(()))
            }
            Some([tag]) => Err(format!("a record of kind {tag}; expected 1 or 2")),
            None => Ok(None),
        }
    }

    /// Reads a trace file.
    ///
    /// # Errors
    /// `Io` and `Corrupt`.
    pub fn open(path: &Path) -> Result<ChunkTrace, TierError> {
        let io =
            |e: io::Error| TierError::Io { what: format!("reading {}", path.display()), error: Arc::new(e) };
        let file = std::fs::File::open(path).map_err(io)?;
        let mut bytes = Vec::new();
        // One byte more than is taken, so that what is too large is known to be.
        file.take(TRACE_MAX_BYTES.0 + 1).read_to_end(&mut bytes).map_err(io)?;
        ChunkTrace::parse(&bytes)
    }

    /// What the file says before its records.
    pub fn header(&self) -> &TraceHeader {
        &self.header
    }

    /// Steps that have ended.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The trace up to the end of its first `steps` steps.
    pub fn truncated(mut self, steps: u64) -> ChunkTrace {
        let turns = self.turns.partition_point(|turn| u64::from(turn.step) < steps);
        if let Some(next) = self.turns.get(turns) {
            self.uses.truncate(next.first as usize);
            self.turns.truncate(turns);
        }
        self.steps = self.steps.min(steps);
        self
    }

    /// The file ended inside of a record.
    pub fn is_cut(&self) -> bool {
        self.cut
    }

    /// Number of turns.
    pub fn turn_count(&self) -> usize {
        self.turns.len()
    }

    /// Number of uses in all turns.
    pub fn use_count(&self) -> usize {
        self.uses.len()
    }

    /// The turn at `index`.
    ///
    /// # Panics
    /// When there is no such turn.
    pub fn turn(&self, index: usize) -> Turn<'_> {
        let turn = self.turns[index];
        let end = self.turns.get(index + 1).map_or(self.uses.len(), |next| next.first as usize);
        Turn {
            step: turn.step.into(),
            group: turn.group,
            uses: &self.uses[turn.first as usize..end],
            computing: Seconds(f64::from(turn.computing_micros) * 1e-6),
        }
    }

    /// All turns in order.
    pub fn turns(&self) -> impl ExactSizeIterator<Item = Turn<'_>> + '_ {
        (0..self.turns.len()).map(|i| self.turn(i))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> TraceHeader {
        TraceHeader { groups: vec![(1, 4), (3, 300)], chunk_bytes: Bytes(1000), slots: 7 }
    }

    fn written(limit: Bytes) -> (Vec<u8>, Result<(), TierError>) {
        let mut bytes = Vec::new();
        let mut writer = TraceWriter::new(&mut bytes, &header(), limit).unwrap();
        let mut write = || {
            for step in 0..3u32 {
                let uses = [Use { index: step, score: 0.75 }, Use { index: 3, score: 0.25 }];
                writer.turn(1, &uses, Seconds(1e-3))?;
                writer.turn(3, &[Use { index: 299, score: f32::NAN }], Seconds(-1.0))?;
                writer.end_step()?;
            }
            Ok(())
        };
        let result = write();
        writer.finish().unwrap();
        (bytes, result)
    }

    #[test]
    fn what_is_written_is_read() {
        let (bytes, result) = written(TRACE_MAX_BYTES);
        result.unwrap();
        let trace = ChunkTrace::parse(&bytes).unwrap();
        assert_eq!(*trace.header(), header());
        assert_eq!((trace.steps(), trace.turn_count(), trace.use_count(), trace.is_cut()), (3, 6, 9, false));
        let turn = trace.turn(2);
        assert_eq!((turn.step, turn.group, turn.computing), (1, 1, Seconds(1e-3)));
        assert_eq!(turn.uses, [Use { index: 1, score: 0.75 }, Use { index: 3, score: 0.25 }]);
        assert_eq!(trace.turn(5).uses, [Use { index: 299, score: 0.0 }]);
        let first = trace.clone().truncated(1);
        assert_eq!((first.steps(), first.turn_count(), first.use_count()), (1, 2, 3));
        assert_eq!(first.turn(1), trace.turn(1));
        assert_eq!(trace.clone().truncated(9), trace);
        // At its limit the trace ends with a whole record.
        let (short, result) = written(Bytes(bytes.len() as u64 - 2));
        assert!(result.unwrap_err().to_string().contains("limit"));
        let trace = ChunkTrace::parse(&short).unwrap();
        assert_eq!((trace.steps(), trace.turn_count(), trace.is_cut()), (2, 5, false));
        let mut writer = TraceWriter::new(Vec::new(), &header(), TRACE_MAX_BYTES).unwrap();
        assert!(writer.turn(2, &[], Seconds(0.0)).is_err());
        assert!(writer.turn(1, &[Use { index: 4, score: 0.0 }], Seconds(0.0)).is_err());
    }

    #[test]
    fn damage_is_named_with_its_place() {
        let (bytes, _) = written(TRACE_MAX_BYTES);
        let check = |at: usize, byte: u8, expected: &str| {
            let mut bytes = bytes.clone();
            bytes[at] = byte;
            let message = ChunkTrace::parse(&bytes).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        check(0, b'X', "no chunk trace");
        check(4, 9, "version 9");
        check(8, 0, "0 groups");
        check(11, 0xff, "ends inside of its header");
        check(28, 3, "group 3 comes after group 3");
        check(32, 0, "group 1 has 0 chunks");
        check(44, 7, "byte 44: a record of kind 7");
        check(45, 2, "names group 2 of 2");
        check(53, 4, "names chunk 4 of 4");
        check(56, 0xff, "score");
        let cut = ChunkTrace::parse(&bytes[..bytes.len() - 3]).unwrap();
        assert_eq!((cut.steps(), cut.turn_count(), cut.use_count(), cut.is_cut()), (2, 5, 8, true));
    }

    proptest! {
        #[test]
        fn damaged_files_are_refused_or_good(
            flips in prop::collection::vec((0usize..200, any::<u8>()), 0..6), size in 0usize..200,
        ) {
            let (mut bytes, _) = written(TRACE_MAX_BYTES);
            for (at, value) in flips {
                let length = bytes.len();
                bytes[at % length] = value;
            }
            bytes.truncate(size);
            if let Ok(trace) = ChunkTrace::parse(&bytes) {
                let uses: usize = trace.turns().map(|t| t.uses.len()).sum();
                prop_assert_eq!(uses, trace.use_count());
                for turn in trace.turns() {
                    let count = trace.header().groups.iter().find(|g| g.0 == turn.group).unwrap().1;
                    prop_assert!(turn.uses.iter().all(|u| u.index < count && u.score.is_finite()));
                }
            }
        }
    }
}
