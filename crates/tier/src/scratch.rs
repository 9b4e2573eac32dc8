//! A file for what does not fit into memory for now: slots of one size, written and read past the page cache.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use lightering_units::Bytes;

use crate::direct::{forget, read_some_at};
use crate::{ARENA_ALIGNMENT, Arena};

/// A file of slots. It has no name where the system allows that, and is gone with the process.
///
/// One slot at a time is gathered in memory that is aligned for direct reads and writes; [`memory_for`](Self::memory_for)
/// tells how much that is. Where the file system refuses those, the page cache is used, and what was written is dropped
/// from it.
#[derive(Debug)]
pub struct ScratchFile {
    file: File,
    path: PathBuf,
    is_direct: bool,
    staging: Arena,
    slot_bytes: usize,
}

fn padded(slot_bytes: usize) -> usize {
    slot_bytes.max(1).next_multiple_of(ARENA_ALIGNMENT)
}

impl ScratchFile {
    /// Creates a file in `folder` whose slots hold `slot_bytes` each, and tries whether it can be written.
    ///
    /// # Errors
    /// What the operating system reports, with the folder in the message.
    pub fn create(folder: &Path, slot_bytes: usize) -> io::Result<ScratchFile> {
        // Some file systems refuse the flag, some take it and refuse the writes.
        ScratchFile::try_create(folder, slot_bytes, true)
            .or_else(|_| ScratchFile::try_create(folder, slot_bytes, false))
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", folder.display())))
    }

    fn try_create(folder: &Path, slot_bytes: usize, is_direct: bool) -> io::Result<ScratchFile> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!(".lighter-scratch-{}-{number}", std::process::id()));
        let file = create(&path, is_direct)?;
        let mut scratch = match Arena::new(Bytes(padded(slot_bytes) as u64)) {
            Ok(staging) => ScratchFile { file, path, is_direct, staging, slot_bytes },
            Err(error) => {
                let _ = std::fs::remove_file(&path);
                return Err(error);
            }
        };
        // Without a name nothing is left behind, however the process ends.
        #[cfg(unix)]
        std::fs::remove_file(&scratch.path)?;
        scratch.write(0, &mut |_| {})?;
        Ok(scratch)
    }

    /// Memory that a file with such slots holds.
    pub fn memory_for(slot_bytes: usize) -> Bytes {
        Bytes(padded(slot_bytes) as u64)
    }

    /// Whether the page cache is left out.
    pub fn is_direct(&self) -> bool {
        self.is_direct
    }

    /// Writes what `fill` puts into a slot.
    ///
    /// # Errors
    /// What the operating system reports, a full disk for one; the slot holds nothing of use then.
    pub fn write(&mut self, slot: u32, fill: &mut dyn FnMut(&mut [u8])) -> io::Result<()> {
        let size = padded(self.slot_bytes);
        let mut staging = self.staging.write(0..size).map_err(|e| io::Error::other(e.to_string()))?;
        fill(&mut staging[..self.slot_bytes]);
        let offset = u64::from(slot) * size as u64;
        let mut done = 0;
        while done < size {
            match write_some_at(&self.file, &staging[done..], offset + done as u64) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if !self.is_direct {
            self.file.sync_data()?;
            forget(&self.file, offset, size);
        }
        Ok(())
    }

    /// Reads a slot that was written and lends what it holds to `take`.
    ///
    /// # Errors
    /// What the operating system reports.
    pub fn read(&mut self, slot: u32, take: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        let size = padded(self.slot_bytes);
        let mut staging = self.staging.write(0..size).map_err(|e| io::Error::other(e.to_string()))?;
        let offset = u64::from(slot) * size as u64;
        let mut done = 0;
        while done < size {
            match read_some_at(&self.file, &mut staging[done..], offset + done as u64) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if !self.is_direct {
            forget(&self.file, offset, size);
        }
        take(&staging[..self.slot_bytes]);
        Ok(())
    }
}

impl Drop for ScratchFile {
    fn drop(&mut self) {
        if cfg!(not(unix)) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn create(path: &Path, is_direct: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    if is_direct {
        #[cfg(target_os = "linux")]
        if let Ok(flags) = i32::try_from(rustix::fs::OFlags::DIRECT.bits()) {
            std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags);
        }
        #[cfg(not(target_os = "linux"))]
        return Err(io::ErrorKind::Unsupported.into());
    }
    options.open(path)
}

#[cfg(unix)]
fn write_some_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::write_at(file, bytes, offset)
}

#[cfg(windows)]
fn write_some_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_write(file, bytes, offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_come_back_as_they_were_written_and_nothing_is_left() {
        let folder = tempfile::tempdir().unwrap();
        for (slot_bytes, is_direct) in [(10_000, true), (10_000, false), (4096, true), (1, false)] {
            let Ok(mut file) = ScratchFile::try_create(folder.path(), slot_bytes, is_direct) else {
                assert!(is_direct, "a file through the page cache is always possible");
                continue;
            };
            let byte = |slot: u32, i: usize| (slot as usize * 37 + i * 11) as u8;
            for slot in [5, 0, 2, 5] {
                let fill = &mut |bytes: &mut [u8]| {
                    assert_eq!(bytes.len(), slot_bytes);
                    bytes.iter_mut().enumerate().for_each(|(i, b)| *b = byte(slot, i));
                };
                file.write(slot, fill).unwrap();
            }
            for slot in [0, 2, 5] {
                let mut seen = 0;
                file.read(slot, &mut |bytes| {
                    seen = bytes.len();
                    assert!(bytes.iter().enumerate().all(|(i, b)| *b == byte(slot, i)));
                })
                .unwrap();
                assert_eq!(seen, slot_bytes);
            }
            assert_eq!(file.read(6, &mut |_| {}).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
            assert!(ScratchFile::memory_for(slot_bytes).0 >= slot_bytes as u64);
        }
        if cfg!(unix) {
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        }
        let missing = folder.path().join("missing");
        assert!(ScratchFile::create(&missing, 1).unwrap_err().to_string().contains("missing"));
    }
}
