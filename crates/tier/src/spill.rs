//! A file that takes what memory has no room for, for as long as a run lasts.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use lightering_units::Bytes;

use crate::source::past_the_end;
use crate::{ARENA_ALIGNMENT, ByteSource, DirectFile};

const PAGE: usize = ARENA_ALIGNMENT;
/// Pages that are copied at a time where a range cannot be written from where it lies.
const BOUNCE_PAGES: usize = 16;

/// Whole pages to write what does not lie as the file wants it.
#[repr(align(4096))]
struct Bounce([u8; BOUNCE_PAGES * PAGE]);

/// A nameless file of a fixed size, written and read past the page cache. Its room on the disk is taken when it is made,
/// so that a full disk is told before anything has been computed; it is gone when it is dropped, also after `kill -9`.
#[derive(Debug)]
pub struct SpillFile {
    reader: DirectFile,
    writer: File,
    written: AtomicU64,
}

impl SpillFile {
    /// Makes a file of `size` bytes in `folder`.
    ///
    /// # Errors
    /// What the operating system reports, with the folder in the message; a full disk above all.
    pub fn create(folder: &Path, size: Bytes) -> io::Result<SpillFile> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!(".lighter-spill-{}-{number}", std::process::id()));
        let in_folder = |e: io::Error| {
            io::Error::new(e.kind(), format!("{size} to spill to in {}: {e}", folder.display()))
        };
        let file = File::options().read(true).write(true).create_new(true).open(&path).map_err(in_folder)?;
        let made = reserve(&file, size).and_then(|()| DirectFile::open(&path)).map(|reader| {
            let direct = reader.is_direct().then(|| open_direct_writer(&path)).flatten();
            SpillFile { reader, writer: direct.unwrap_or(file), written: AtomicU64::new(0) }
        });
        // Nobody else needs the name.
        let removed = std::fs::remove_file(&path);
        let made = made.map_err(in_folder)?;
        removed.map_err(in_folder)?;
        Ok(made)
    }

    /// Writes `bytes` at `offset`. The pages of the file that the range touches belong to it alone: what lies beside it
    /// in them is lost. Nothing is copied where `bytes` lie at the same place in a page as `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` past the end; what the operating system reports.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > self.len_bytes().0) {
            return Err(past_the_end(offset, bytes.len(), self.len_bytes().0));
        }
        self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let mut bounce = Bounce([0; BOUNCE_PAGES * PAGE]);
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let (head, left) = ((at % PAGE as u64) as usize, &bytes[done..]);
            let lies_well = head == 0 && left.as_ptr().align_offset(PAGE) == 0;
            if lies_well && left.len() >= PAGE {
                let whole = left.len() / PAGE * PAGE;
                write_all_at(&self.writer, at, &left[..whole])?;
                done += whole;
                continue;
            }
            // Up to the next page if the rest can go without a copy from there, else as much as there is room for.
            let same = left.as_ptr() as usize % PAGE == head;
            let room = if same { PAGE - head } else { bounce.0.len() - head };
            let size = left.len().min(room);
            bounce.0[head..head + size].copy_from_slice(&left[..size]);
            let pages = (head + size).next_multiple_of(PAGE);
            // The last page may pass the end of the file by what nobody reads.
            write_all_at(&self.writer, at - head as u64, &bounce.0[..pages])?;
            done += size;
        }
        Ok(())
    }

    /// Bytes written so far.
    pub fn bytes_written(&self) -> Bytes {
        Bytes(self.written.load(Ordering::Relaxed))
    }
}

impl ByteSource for SpillFile {
    fn len_bytes(&self) -> Bytes {
        self.reader.len_bytes()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.reader.read_at(offset, buffer)
    }

    fn is_direct(&self) -> bool {
        self.reader.is_direct()
    }

    fn read_pages(&self, offset: u64, pages: &mut [u8]) -> io::Result<usize> {
        self.reader.read_pages(offset, pages)
    }

    fn bytes_read(&self) -> Bytes {
        self.reader.bytes_read()
    }

    fn name(&self) -> String {
        "the spill file".to_owned()
    }
}

#[cfg(target_os = "linux")]
fn reserve(file: &File, size: Bytes) -> io::Result<()> {
    if size == Bytes::ZERO {
        return Ok(());
    }
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, size.0) {
        Ok(()) => Ok(()),
        // Some file systems cannot promise room; then it is taken when it is needed.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => file.set_len(size.0),
        Err(e) => Err(e.into()),
    }
}

#[cfg(not(target_os = "linux"))]
fn reserve(file: &File, size: Bytes) -> io::Result<()> {
    file.set_len(size.0)
}

#[cfg(target_os = "linux")]
fn open_direct_writer(path: &Path) -> Option<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).ok()?;
    std::fs::OpenOptions::new().write(true).custom_flags(flags).open(path).ok()
}

#[cfg(not(target_os = "linux"))]
fn open_direct_writer(_: &Path) -> Option<File> {
    None
}

#[cfg(unix)]
fn write_all_at(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
fn write_all_at(file: &File, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_write(file, bytes, offset)?;
        (offset, bytes) = (offset + n as u64, &bytes[n..]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        #[test]
        fn what_is_written_is_read(
            size in 1usize..200_000, page in 0u64..4, head in 0u64..5000, shift in 0usize..5000, same: bool,
        ) {
            let folder = tempfile::tempdir().unwrap();
            let offset = page * PAGE as u64 + head;
            let total = (offset + size as u64).next_multiple_of(PAGE as u64) + PAGE as u64;
            let file = SpillFile::create(folder.path(), Bytes(total)).unwrap();
            prop_assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the file has no name");
            let mut memory = vec![0u8; shift + size + 2 * PAGE];
            let start = if same {
                memory.as_ptr().align_offset(PAGE) + (offset % PAGE as u64) as usize
            } else {
                shift
            };
            for (i, b) in memory[start..].iter_mut().take(size).enumerate() {
                *b = (i as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0];
            }
            file.write_at(offset, &memory[start..start + size]).unwrap();
            let mut back = vec![0u8; size];
            file.read_at(offset, &mut back).unwrap();
            prop_assert_eq!(&back[..], &memory[start..start + size]);
            prop_assert_eq!(file.bytes_written(), Bytes(size as u64));
            prop_assert!(file.write_at(total, &[1]).is_err());
        }
    }

    #[test]
    fn a_full_disk_and_a_missing_folder_are_told_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let too_much = SpillFile::create(folder.path(), Bytes(1 << 60)).unwrap_err();
        assert!(too_much.to_string().contains("to spill to in"), "{too_much}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(SpillFile::create(&folder.path().join("none"), Bytes(4096)).is_err());
    }
}
