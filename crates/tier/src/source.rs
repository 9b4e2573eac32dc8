use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use lightering_units::Bytes;

/// A read-only store of bytes that several threads may read at once.
pub trait ByteSource: Send + Sync {
    /// Size of the store.
    fn len_bytes(&self) -> Bytes;

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// `UnexpectedEof` when the range passes the end, or what the medium reports.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// True where [`ByteSource::read_pages`] brings whole pages from the medium straight to their place, past the
    /// system's page cache.
    fn is_direct(&self) -> bool {
        false
    }

    /// Fills whole pages: `offset`, the buffer's size and its address are multiples of
    /// [`ARENA_ALIGNMENT`](crate::ARENA_ALIGNMENT). Returns the number of bytes filled, which is less than the buffer
    /// only where the store ends.
    ///
    /// # Errors
    /// What the medium reports.
    fn read_pages(&self, offset: u64, pages: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.len_bytes().0.saturating_sub(offset)).unwrap_or(usize::MAX);
        let size = left.min(pages.len());
        self.read_at(offset, &mut pages[..size])?;
        Ok(size)
    }

    /// Bytes handed out so far by a medium that is slower than memory; 0 for memory itself.
    fn bytes_read(&self) -> Bytes {
        Bytes::ZERO
    }

    /// What a message should call this store, such as a file's path.
    fn name(&self) -> String;
}

pub(crate) fn past_the_end(offset: u64, wanted: usize, size: u64) -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        format!("{wanted} bytes at offset {offset} pass the end of {size} bytes"),
    )
}

impl ByteSource for [u8] {
    fn len_bytes(&self) -> Bytes {
        Bytes(self.len() as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let range =
            usize::try_from(offset).ok().and_then(|start| self.get(start..start.checked_add(buffer.len())?));
        let source = range.ok_or_else(|| past_the_end(offset, buffer.len(), self.len() as u64))?;
        buffer.copy_from_slice(source);
        Ok(())
    }

    fn name(&self) -> String {
        "memory".to_owned()
    }
}

macro_rules! forward_to_slice {
    ($($t:ty),*) => { $(
        impl ByteSource for $t {
            fn len_bytes(&self) -> Bytes { Bytes(self.len() as u64) }
            fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> { self[..].read_at(offset, buffer) }
            fn name(&self) -> String { self[..].name() }
        }
    )* };
}
forward_to_slice!(Vec<u8>, &'static [u8]);

/// A file read by position, without moving a shared cursor; counts the bytes it hands out.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    path: PathBuf,
    size: Bytes,
    bytes_read: AtomicU64,
}

impl FileSource {
    /// Opens `path` for reading.
    ///
    /// # Errors
    /// What the operating system reports, with the path in the message.
    pub fn open(path: &Path) -> io::Result<FileSource> {
        let with_path = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
        let file = File::open(path).map_err(with_path)?;
        let metadata = file.metadata().map_err(with_path)?;
        if metadata.is_dir() {
            return Err(io::Error::new(
                io::ErrorKind::IsADirectory,
                format!("{}: is a folder, expected a file", path.display()),
            ));
        }
        Ok(FileSource {
            file,
            path: path.to_owned(),
            size: Bytes(metadata.len()),
            bytes_read: AtomicU64::new(0),
        })
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl ByteSource for FileSource {
    fn len_bytes(&self) -> Bytes {
        self.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.size.0) {
            return Err(past_the_end(offset, buffer.len(), self.size.0));
        }
        read_exact_at(&self.file, buffer, offset)?;
        self.bytes_read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn bytes_read(&self) -> Bytes {
        Bytes(self.bytes_read.load(Ordering::Relaxed))
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}

#[cfg(unix)]
pub(crate) fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(windows)]
pub(crate) fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buffer, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => {
                buffer = &mut buffer[n..];
                offset += n as u64;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_past_the_end_are_refused() {
        let store = vec![0u8; 10];
        assert!(store.read_at(8, &mut [0; 2]).is_ok());
        assert!(store.read_at(9, &mut [0; 2]).is_err());
        assert!(store.read_at(u64::MAX, &mut [0; 2]).is_err());
    }
}
