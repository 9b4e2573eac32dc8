//! Several stores as one, for files that come in parts.

use std::io;
use std::sync::Arc;

use lightering_units::Bytes;

use crate::source::past_the_end;
use crate::{ARENA_ALIGNMENT, ByteSource};

/// Stores one behind the other. Each begins at a whole page, so that its pages are pages of the whole; what lies between
/// two of them is zero.
pub struct JoinedSource {
    parts: Vec<(u64, Arc<dyn ByteSource>)>,
    len: u64,
}

impl JoinedSource {
    /// Joins stores in this order.
    pub fn new(parts: Vec<Arc<dyn ByteSource>>) -> JoinedSource {
        let sizes: Vec<Bytes> = parts.iter().map(|part| part.len_bytes()).collect();
        let starts = JoinedSource::starts(&sizes);
        let len = starts.last().zip(sizes.last()).map_or(0, |(start, size)| start.saturating_add(size.0));
        JoinedSource { parts: starts.into_iter().zip(parts).collect(), len }
    }

    /// Where stores of these sizes begin when they are joined.
    pub fn starts(sizes: &[Bytes]) -> Vec<u64> {
        let mut next = 0u64;
        let start = |size: &Bytes| {
            let start = next;
            let end = start.saturating_add(size.0);
            next = end.checked_next_multiple_of(ARENA_ALIGNMENT as u64).unwrap_or(u64::MAX);
            start
        };
        sizes.iter().map(start).collect()
    }
}

impl ByteSource for JoinedSource {
    fn len_bytes(&self) -> Bytes {
        Bytes(self.len)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.len) {
            return Err(past_the_end(offset, buffer.len(), self.len));
        }
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let index = self.parts.partition_point(|(start, _)| *start <= at).saturating_sub(1);
            let (start, part) = &self.parts[index];
            let next = self.parts.get(index + 1).map_or(self.len, |(start, _)| *start);
            let until = |end: u64| usize::try_from(end - offset).unwrap_or(usize::MAX).min(buffer.len());
            let (inside, end) = (until((start + part.len_bytes().0).max(at)), until(next));
            if done < inside {
                part.read_at(at - start, &mut buffer[done..inside])?;
            }
            buffer[inside..end].fill(0);
            done = end;
        }
        Ok(())
    }

    fn is_direct(&self) -> bool {
        self.parts.iter().all(|(_, part)| part.is_direct())
    }

    fn read_pages(&self, offset: u64, pages: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let size = left.min(pages.len());
        // The last store gets whole pages as well, as it would alone.
        let whole = size.next_multiple_of(ARENA_ALIGNMENT).min(pages.len());
        let mut done = 0;
        while done < size {
            let at = offset + done as u64;
            let index = self.parts.partition_point(|(start, _)| *start <= at).saturating_sub(1);
            let (start, part) = &self.parts[index];
            let next = self.parts.get(index + 1).map(|(start, _)| *start);
            let end = next.map_or(whole, |next| usize::try_from(next - offset).unwrap_or(whole).min(whole));
            let filled = part.read_pages(at - start, &mut pages[done..end])?;
            if next.is_some() {
                pages[done + filled..end].fill(0);
            }
            done = end;
        }
        Ok(size)
    }

    fn bytes_read(&self) -> Bytes {
        self.parts.iter().map(|(_, part)| part.bytes_read()).sum()
    }

    fn name(&self) -> String {
        match self.parts.as_slice() {
            [] => "nothing".to_owned(),
            [(_, only)] => only.name(),
            [(_, first), rest @ ..] => format!("{} and {} more", first.name(), rest.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Arena, DirectFile};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn parts_read_like_one(
            sizes in prop::collection::vec(0usize..20_000, 1..5), from in 0usize..80_000, length in 0usize..80_000,
        ) {
            let folder = tempfile::tempdir().unwrap();
            let starts = JoinedSource::starts(&sizes.iter().map(|s| Bytes(*s as u64)).collect::<Vec<_>>());
            let mut all: Vec<u8> = Vec::new();
            let mut parts: Vec<Arc<dyn ByteSource>> = Vec::new();
            for (i, size) in sizes.iter().enumerate() {
                let bytes: Vec<u8> = (0..*size).map(|b| (b * 31 + i * 7 + 1) as u8).collect();
                all.resize(starts[i] as usize, 0);
                all.extend(&bytes);
                let path = folder.path().join(i.to_string());
                std::fs::write(&path, &bytes).unwrap();
                parts.push(if i % 2 == 0 { Arc::new(DirectFile::open(&path).unwrap()) } else { Arc::new(bytes) });
            }
            let joined = JoinedSource::new(parts);
            prop_assert_eq!(joined.len_bytes(), Bytes(all.len() as u64));
            let from = from % (all.len() + 1);
            let length = length % (all.len() - from + 1);
            let mut buffer = vec![9; length];
            joined.read_at(from as u64, &mut buffer).unwrap();
            prop_assert_eq!(&buffer[..], &all[from..from + length]);
            prop_assert!(joined.read_at(from as u64, &mut vec![0; all.len() - from + 1]).is_err());
            let page = from / ARENA_ALIGNMENT * ARENA_ALIGNMENT;
            let size = length.next_multiple_of(ARENA_ALIGNMENT).max(ARENA_ALIGNMENT);
            let arena = Arena::new(Bytes(size as u64)).unwrap();
            let mut pages = arena.write(0..size).unwrap();
            let filled = joined.read_pages(page as u64, &mut pages).unwrap();
            prop_assert_eq!(filled, size.min(all.len() - page));
            prop_assert_eq!(&pages[..filled], &all[page..page + filled]);
        }
    }
}
