//! What there is to be read: chunks, where their bytes lie, and where they land in a slot.

use std::fmt;
use std::sync::Arc;

use lightering_units::Bytes;
use serde::Serialize;

use crate::{ARENA_ALIGNMENT, ByteSource, TierError};

const PAGE: u64 = ARENA_ALIGNMENT as u64;

/// Alignment of every extent in its slot, in bytes: a cache line, and the widest vector register.
pub const EXTENT_ALIGNMENT: usize = 64;

/// Extents that lie no further apart than this are fetched by one read.
const MERGED_GAP_MAX: u64 = PAGE;

/// Names a chunk: the unit that is resident or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct ChunkId {
    /// What is computed together, such as a layer.
    pub group: u32,
    /// Which one of the group, such as an expert. Nested bit levels of an expert are chunks of their own: a level is
    /// resident, wanted and evicted by itself.
    pub index: u32,
}

impl ChunkId {
    /// The chunk `index` of `group`.
    pub const fn new(group: u32, index: u32) -> ChunkId {
        ChunkId { group, index }
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "chunk {} of group {}", self.index, self.group)
    }
}

/// A range of bytes of one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Index into the catalog's sources.
    pub source: u32,
    /// First byte.
    pub offset: u64,
    /// How many.
    pub size: Bytes,
}

/// Where an extent lies in its slot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Landing {
    pub start: u32,
    pub size: u32,
}

/// Neighbouring extents that one read brings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub source: u32,
    pub offset: u64,
    pub size: u32,
    /// Where in the slot the first byte comes to lie.
    pub place: u32,
    /// The pages around it come straight to their place: `place` and `offset` agree within a page.
    pub in_place: bool,
}

impl Run {
    /// First byte and size of the pages around the run, in the source.
    fn pages(&self) -> (u64, u64) {
        let first = self.offset / PAGE * PAGE;
        (first, (self.offset + u64::from(self.size)).next_multiple_of(PAGE) - first)
    }

    /// The part of the slot that is written while the run is read.
    fn part(&self, direct: bool) -> std::ops::Range<usize> {
        let place = u64::from(self.place);
        let (start, end) = match (direct, self.in_place) {
            (true, true) => {
                let start = place / PAGE * PAGE;
                (start, start + self.pages().1)
            }
            (true, false) => (place, place.next_multiple_of(PAGE) + self.pages().1),
            (false, _) => (place, place + u64::from(self.size)),
        };
        start as usize..end as usize
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    id: ChunkId,
    extents: (u32, u32),
    runs: (u32, u32),
    payload_bytes: u64,
    /// The runs write to parts of the slot that do not overlap.
    apart: bool,
}

/// All chunks of a store, in the order of their names. Holds about 24 bytes for each chunk and 40 for each extent.
pub struct ChunkCatalog {
    sources: Vec<Arc<dyn ByteSource>>,
    entries: Vec<Entry>,
    extents: Vec<Landing>,
    runs: Vec<Run>,
    slot_bytes: u64,
}

impl fmt::Debug for ChunkCatalog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.sources.iter().map(|s| s.name()).collect();
        f.debug_struct("ChunkCatalog")
            .field("sources", &names)
            .field("chunks", &self.entries.len())
            .field("slot_bytes", &self.slot_bytes)
            .finish_non_exhaustive()
    }
}

impl ChunkCatalog {
    /// Lists the chunks, each with its extents in the order in which they land.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use lightering_tier::{ByteSource, ChunkCatalog, ChunkId, Extent};
    /// use lightering_units::Bytes;
    /// let source: Arc<dyn ByteSource> = Arc::new(vec![0u8; 1000]);
    /// let expert = |i: u64| vec![Extent { source: 0, offset: 100 * i, size: Bytes(100) }];
    /// let chunks = (0..10).map(|i| (ChunkId::new(0, i), expert(i.into())));
    /// let catalog = ChunkCatalog::new(vec![source], chunks).unwrap();
    /// assert_eq!((catalog.len(), catalog.slot_bytes()), (10, Bytes(4096)));
    /// ```
    ///
    /// # Errors
    /// `Invalid` for a chunk without bytes, of 4 GiB or more, or listed twice, and for an extent that passes the end
    /// of its source.
    pub fn new(
        sources: Vec<Arc<dyn ByteSource>>,
        chunks: impl IntoIterator<Item = (ChunkId, Vec<Extent>)>,
    ) -> Result<ChunkCatalog, TierError> {
        let mut catalog = ChunkCatalog {
            sources,
            entries: Vec::new(),
            extents: Vec::new(),
            runs: Vec::new(),
            slot_bytes: PAGE,
        };
        for (id, extents) in chunks {
            catalog.add(id, &extents)?;
        }
        catalog.entries.sort_unstable_by_key(|e| e.id);
        if let Some(pair) = catalog.entries.windows(2).find(|pair| pair[0].id == pair[1].id) {
            return Err(TierError::Invalid(format!("{} is listed twice", pair[0].id)));
        }
        if catalog.entries.is_empty() {
            return Err(TierError::Invalid("a catalog needs at least one chunk".to_owned()));
        }
        Ok(catalog)
    }

    fn add(&mut self, id: ChunkId, extents: &[Extent]) -> Result<(), TierError> {
        let invalid = |what: String| TierError::Invalid(format!("{id}: {what}"));
        let (first_extent, first_run) = (self.extents.len() as u32, self.runs.len() as u32);
        let mut cursor = 0u64;
        let mut end = 0u64;
        let mut payload_bytes = 0;
        let mut last: Option<Run> = None;
        for (i, extent) in extents.iter().enumerate() {
            let source = self.sources.get(extent.source as usize).ok_or_else(|| {
                invalid(format!("extent {i} names source {} of {}", extent.source, self.sources.len()))
            })?;
            let size = u32::try_from(extent.size.0)
                .ok()
                .filter(|&s| s > 0)
                .ok_or_else(|| invalid(format!("extent {i} has {}, expected 1 B to 4 GiB", extent.size)))?;
            if extent.offset.checked_add(extent.size.0).is_none_or(|e| e > source.len_bytes().0) {
                return Err(invalid(format!(
                    "extent {i} ({} at offset {}) passes the end of {}, which has {}",
                    extent.size,
                    extent.offset,
                    source.name(),
                    source.len_bytes()
                )));
            }
            payload_bytes += extent.size.0;
            // Behind the last one in the source, too: one read brings both.
            if let Some(run) = &mut last
                && run.source == extent.source
                && extent.offset >= run.offset + u64::from(run.size)
                && extent.offset - (run.offset + u64::from(run.size)) <= MERGED_GAP_MAX
                && (extent.offset - run.offset).is_multiple_of(EXTENT_ALIGNMENT as u64)
                && extent.offset - run.offset + extent.size.0 < u64::from(u32::MAX)
            {
                let start = u64::from(run.place) + (extent.offset - run.offset);
                run.size = (extent.offset - run.offset) as u32 + size;
                self.extents.push(Landing { start: start as u32, size });
                cursor = start + u64::from(size);
                end = end.max(run.part(source.is_direct()).end as u64);
                *self.runs.last_mut().expect("the run was pushed") = *run;
            } else {
                let packed = cursor.next_multiple_of(EXTENT_ALIGNMENT as u64);
                // The previous run's pages stay its own.
                let page = if last.is_some_and(|r| r.in_place) { end } else { packed }.next_multiple_of(PAGE);
                let matching = page + extent.offset % PAGE;
                let in_place = source.is_direct()
                    && extent.offset.is_multiple_of(EXTENT_ALIGNMENT as u64)
                    // The pages around a small extent would waste more memory than moving it costs time.
                    && matching - packed <= u64::from(size) / 8;
                let place = if in_place { matching } else { packed };
                let place = u32::try_from(place)
                    .map_err(|_| invalid("is larger than 4 GiB; divide it into several chunks".to_owned()))?;
                let run = Run { source: extent.source, offset: extent.offset, size, place, in_place };
                self.extents.push(Landing { start: place, size });
                cursor = u64::from(place) + u64::from(size);
                end = end.max(run.part(source.is_direct()).end as u64);
                self.runs.push(run);
                last = Some(run);
            }
        }
        if payload_bytes == 0 {
            return Err(invalid("has no extent".to_owned()));
        }
        if end > u64::from(u32::MAX) {
            return Err(invalid("is larger than 4 GiB; divide it into several chunks".to_owned()));
        }
        let runs = (first_run, self.runs.len() as u32);
        let parts: Vec<_> = self.runs[first_run as usize..]
            .iter()
            .map(|r| r.part(self.sources[r.source as usize].is_direct()))
            .collect();
        let apart = parts.windows(2).all(|pair| pair[0].end <= pair[1].start);
        self.slot_bytes = self.slot_bytes.max(end.next_multiple_of(PAGE));
        let extents = (first_extent, self.extents.len() as u32);
        self.entries.push(Entry { id, extents, runs, payload_bytes, apart });
        Ok(())
    }

    /// Number of chunks.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// False: a catalog has at least one chunk.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Size of a slot that holds any of the chunks, a multiple of [`ARENA_ALIGNMENT`].
    pub fn slot_bytes(&self) -> Bytes {
        Bytes(self.slot_bytes)
    }

    /// Size of a region with `slots` slots.
    pub fn region_bytes(&self, slots: usize) -> Bytes {
        Bytes(self.slot_bytes.saturating_mul(slots as u64))
    }

    /// Sum of all chunks without the padding of their slots.
    pub fn payload_bytes(&self) -> Bytes {
        self.entries.iter().map(|e| Bytes(e.payload_bytes)).sum()
    }

    /// The chunks in order.
    pub fn chunks(&self) -> impl ExactSizeIterator<Item = ChunkId> + '_ {
        self.entries.iter().map(|e| e.id)
    }

    /// The sources.
    pub fn sources(&self) -> &[Arc<dyn ByteSource>] {
        &self.sources
    }

    pub(crate) fn landings(&self, number: u32) -> &[Landing] {
        let (start, end) = self.entries[number as usize].extents;
        &self.extents[start as usize..end as usize]
    }

    /// Size of a chunk without padding.
    pub(crate) fn payload_of(&self, number: u32) -> u64 {
        self.entries[number as usize].payload_bytes
    }

    /// In how many parts, at most, several threads may read a chunk.
    pub(crate) fn pieces_of(&self, number: u32) -> u32 {
        let entry = &self.entries[number as usize];
        if entry.apart { entry.runs.1 - entry.runs.0 } else { 1 }
    }

    /// The runs of one piece.
    pub(crate) fn piece(&self, number: u32, piece: u32) -> &[Run] {
        let entry = &self.entries[number as usize];
        let runs = &self.runs[entry.runs.0 as usize..entry.runs.1 as usize];
        if entry.apart { &runs[piece as usize..=piece as usize] } else { runs }
    }

    /// The part of the slot that a piece writes.
    pub(crate) fn part_of(&self, number: u32, piece: u32) -> std::ops::Range<usize> {
        let runs = self.piece(number, piece);
        let part = |r: &Run| r.part(self.sources[r.source as usize].is_direct());
        let start = runs.iter().map(|r| part(r).start).min().unwrap_or(0);
        let end = runs.iter().map(|r| part(r).end).max().unwrap_or(0);
        // A source that turned direct after the slot was sized could ask for more; it reads by the other way then.
        start..end.min(self.slot_bytes as usize)
    }

    /// Reads a piece into its part of the slot.
    pub(crate) fn read_piece(&self, number: u32, piece: u32, part: &mut [u8]) -> Result<(), TierError> {
        let base = self.part_of(number, piece).start;
        for run in self.piece(number, piece) {
            let source = &self.sources[run.source as usize];
            read_run(&**source, run, base, part).map_err(|error| TierError::Read {
                chunk: self.entries[number as usize].id,
                source_name: source.name(),
                offset: run.offset,
                size: Bytes(u64::from(run.size)),
                error: Arc::new(error),
            })?;
        }
        Ok(())
    }
}

fn read_run(source: &dyn ByteSource, run: &Run, base: usize, part: &mut [u8]) -> std::io::Result<()> {
    let size = run.size as usize;
    let place = run.place as usize - base;
    let (first, pages) = run.pages();
    let head = (run.offset - first) as usize;
    let page = run.place as usize;
    let target = if run.in_place { page - head } else { page.next_multiple_of(PAGE as usize) };
    let target = target.checked_sub(base).filter(|t| t + pages as usize <= part.len());
    match target.filter(|_| source.is_direct()) {
        Some(target) => {
            let filled = source.read_pages(first, &mut part[target..target + pages as usize])?;
            if filled < head + size {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            if target + head != place {
                part.copy_within(target + head..target + head + size, place);
            }
            Ok(())
        }
        None => source.read_at(run.offset, &mut part[place..place + size]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(offset: u64, size: u64) -> Extent {
        Extent { source: 0, offset, size: Bytes(size) }
    }

    fn memory(size: usize) -> Vec<Arc<dyn ByteSource>> {
        vec![Arc::new(vec![0u8; size])]
    }

    #[test]
    fn neighbours_are_read_together_and_land_aligned() {
        let id = ChunkId::new(1, 2);
        let extents = vec![extent(64, 64), extent(128, 100), extent(500, 7), extent(5000, 10)];
        let catalog = ChunkCatalog::new(memory(10_000), [(id, extents)]).unwrap();
        let landings: Vec<_> = catalog.landings(0).iter().map(|l| (l.start, l.size)).collect();
        // 500 - 64 is no multiple of 64, so the third cannot be part of the first read.
        assert_eq!(landings, [(0, 64), (64, 100), (192, 7), (256, 10)]);
        assert_eq!(catalog.pieces_of(0), 3);
        assert_eq!(catalog.payload_of(0), 181);
    }

    #[test]
    fn wrong_catalogs_say_what_is_wrong() {
        let check = |chunks: Vec<(ChunkId, Vec<Extent>)>, expected: &str| {
            let message = ChunkCatalog::new(memory(100), chunks).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        let id = ChunkId::new(3, 4);
        check(vec![], "at least one");
        check(vec![(id, vec![])], "chunk 4 of group 3: has no extent");
        check(vec![(id, vec![extent(0, 0)])], "extent 0 has 0 B");
        check(vec![(id, vec![extent(90, 11)])], "passes the end of memory, which has 100 B");
        check(vec![(id, vec![extent(u64::MAX, 11)])], "passes the end");
        check(vec![(id, vec![Extent { source: 1, offset: 0, size: Bytes(1) }])], "source 1 of 1");
        check(vec![(id, vec![extent(0, 1)]), (id, vec![extent(0, 1)])], "twice");
    }
}
