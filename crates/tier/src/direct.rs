//! A file read past the page cache.
//!
//! Reading a model through the page cache fills a memory cgroup with pages that nobody asked for and costs a copy.
//! `O_DIRECT` brings whole pages straight to their place. What is wanted rarely begins at a page, so the aligned
//! superset is read and, unless the place was chosen to fit, moved down by less than two pages.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use lightering_units::Bytes;

use crate::source::{past_the_end, read_exact_at};
use crate::{ARENA_ALIGNMENT, ByteSource};

const PAGE: usize = ARENA_ALIGNMENT;

/// The rest of a read that does not fill whole pages of its buffer.
#[repr(align(4096))]
struct Edge([u8; 3 * PAGE]);

/// A file read by position, past the page cache where the file system allows that; elsewhere through it, and what
/// was read is dropped from it at once, so that it does not fill a memory cgroup. Counts the bytes it hands out.
#[derive(Debug)]
pub struct DirectFile {
    buffered: File,
    direct: Option<File>,
    refused: AtomicBool,
    path: PathBuf,
    size: Bytes,
    bytes_read: AtomicU64,
}

impl DirectFile {
    /// Opens `path` for reading.
    ///
    /// # Errors
    /// What the operating system reports, with the path in the message; a refused `O_DIRECT` is no error.
    pub fn open(path: &Path) -> io::Result<DirectFile> {
        let mut file = DirectFile::open_buffered(path)?;
        file.direct = open_direct(path, file.size);
        Ok(file)
    }

    /// Opens `path` for reading through the page cache, whatever the file system offers.
    ///
    /// # Errors
    /// As for [`DirectFile::open`].
    pub fn open_buffered(path: &Path) -> io::Result<DirectFile> {
        let with_path = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
        let buffered = File::open(path).map_err(with_path)?;
        let metadata = buffered.metadata().map_err(with_path)?;
        if metadata.is_dir() {
            return Err(io::Error::new(
                io::ErrorKind::IsADirectory,
                format!("{}: is a folder, expected a file", path.display()),
            ));
        }
        Ok(DirectFile {
            buffered,
            direct: None,
            refused: AtomicBool::new(false),
            path: path.to_owned(),
            size: Bytes(metadata.len()),
            bytes_read: AtomicU64::new(0),
        })
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn direct(&self) -> Option<&File> {
        self.direct.as_ref().filter(|_| !self.refused.load(Ordering::Relaxed))
    }

    fn read_buffered(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        read_exact_at(&self.buffered, buffer, offset)?;
        forget(&self.buffered, offset, buffer.len());
        Ok(())
    }

    /// Fills whole pages, or as much of them as the file has.
    fn fill_pages(&self, offset: u64, pages: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.size.0.saturating_sub(offset)).unwrap_or(usize::MAX);
        let wanted = left.min(pages.len());
        let mut filled = 0;
        while let Some(file) = self.direct()
            && filled < wanted
            // A short read that ends inside of a page can only be continued through the cache.
            && filled % PAGE == 0
        {
            match read_some_at(file, &mut pages[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The file system changed its mind, or wants a larger alignment; the cache always works.
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
                    self.refused.store(true, Ordering::Relaxed);
                }
                Err(e) => return Err(e),
            }
        }
        if filled < wanted {
            self.read_buffered(offset + filled as u64, &mut pages[filled..wanted])?;
        }
        Ok(wanted)
    }

    /// Any range to any address, with at most two reads and no memory but the buffer and three pages of stack.
    fn read_range(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let lead = buffer.as_ptr().align_offset(PAGE);
        let head = (offset % PAGE as u64) as usize;
        // Pages land at the first page of the buffer; what is wanted of them lies `head` bytes in and moves to the
        // buffer's start.
        let whole = buffer.len().saturating_sub(lead) / PAGE * PAGE;
        let mut done = 0;
        if whole >= 2 * PAGE {
            let filled = self.fill_pages(offset - head as u64, &mut buffer[lead..lead + whole])?;
            if filled < head {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if lead + head > 0 {
                buffer.copy_within(lead + head..lead + filled, 0);
            }
            done = filled - head;
        }
        let mut edge = Edge([0; 3 * PAGE]);
        while done < buffer.len() {
            let at = offset + done as u64;
            let head = (at % PAGE as u64) as usize;
            let size = (buffer.len() - done).min(edge.0.len() - head);
            let pages = (head + size).next_multiple_of(PAGE);
            let filled = self.fill_pages(at - head as u64, &mut edge.0[..pages])?;
            if filled < head + size {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            buffer[done..done + size].copy_from_slice(&edge.0[head..head + size]);
            done += size;
        }
        Ok(())
    }
}

impl ByteSource for DirectFile {
    fn len_bytes(&self) -> Bytes {
        self.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.size.0) {
            return Err(past_the_end(offset, buffer.len(), self.size.0));
        }
        match self.direct() {
            Some(_) => self.read_range(offset, buffer)?,
            None => self.read_buffered(offset, buffer)?,
        }
        self.bytes_read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn is_direct(&self) -> bool {
        self.direct().is_some()
    }

    fn read_pages(&self, offset: u64, pages: &mut [u8]) -> io::Result<usize> {
        let filled = self.fill_pages(offset, pages)?;
        self.bytes_read.fetch_add(filled as u64, Ordering::Relaxed);
        Ok(filled)
    }

    fn bytes_read(&self) -> Bytes {
        Bytes(self.bytes_read.load(Ordering::Relaxed))
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}

#[cfg(target_os = "linux")]
fn open_direct(path: &Path, size: Bytes) -> Option<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).ok()?;
    let file = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
    // Some file systems accept the flag and refuse the reads.
    if size > Bytes::ZERO {
        let mut edge = Edge([0; 3 * PAGE]);
        read_some_at(&file, &mut edge.0[..PAGE], 0).ok()?;
    }
    Some(file)
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_: &Path, _: Bytes) -> Option<File> {
    None
}

#[cfg(unix)]
pub(crate) fn read_some_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, buffer, offset)
}

#[cfg(windows)]
pub(crate) fn read_some_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, buffer, offset)
}

/// Drops a range from the page cache; advice that may be refused.
#[cfg(target_os = "linux")]
pub(crate) fn forget(file: &File, offset: u64, size: usize) {
    let size = std::num::NonZeroU64::new(size as u64);
    let _ = rustix::fs::fadvise(file, offset, size, rustix::fs::Advice::DontNeed);
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn forget(_: &File, _: u64, _: usize) {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn content(size: usize) -> Vec<u8> {
        (0..size).map(|i| (i as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(150))]
        #[test]
        fn any_range_lands_at_any_address(
            size in 1usize..60_000, from in 0usize..60_000, length in 0usize..60_000, shift in 0usize..5000,
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("f");
            let bytes = content(size);
            std::fs::write(&path, &bytes).unwrap();
            let from = from % size;
            let length = length % (size - from + 1);
            for file in [DirectFile::open(&path).unwrap(), DirectFile::open_buffered(&path).unwrap()] {
                let mut memory = vec![7u8; shift + length + 10];
                file.read_at(from as u64, &mut memory[shift..shift + length]).unwrap();
                prop_assert_eq!(&memory[shift..shift + length], &bytes[from..from + length]);
                prop_assert!(memory[shift + length..].iter().all(|&b| b == 7));
                prop_assert_eq!(file.bytes_read(), Bytes(length as u64));
                let past = file.read_at(from as u64, &mut vec![0; size - from + 1]);
                prop_assert_eq!(past.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
            }
        }
    }

    #[test]
    fn pages_end_where_the_file_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let bytes = content(PAGE + 100);
        std::fs::write(&path, &bytes).unwrap();
        let file = DirectFile::open(&path).unwrap();
        let mut edge = Edge([0; 3 * PAGE]);
        assert_eq!(file.read_pages(0, &mut edge.0).unwrap(), PAGE + 100);
        assert_eq!(edge.0[..PAGE + 100], bytes);
        assert_eq!(file.read_pages(PAGE as u64, &mut edge.0[..PAGE]).unwrap(), 100);
        assert!(DirectFile::open(folder.path()).unwrap_err().to_string().contains("folder"));
        assert!(DirectFile::open(&folder.path().join("none")).unwrap_err().to_string().contains("none"));
    }
}
