//! How fast a file can be read, in order and at random, through the page cache and past it.

use super::Scramble;
use anyhow::{Context, Result};
use lightering_meter::{DiskPattern, DiskRate, Stopwatch};
use lightering_units::{Bytes, Seconds};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

const BLOCKS: [Bytes; 2] = [Bytes::kib(64), Bytes::mib(1)];

/// Alignment that `O_DIRECT` asks of buffers, offsets and sizes on every common disk.
const DIRECT_ALIGNMENT: usize = 4096;

/// A measurement ends after this time even when the file was not read to its end.
const SECONDS_MAX: f64 = 2.0;

/// A file that removes itself.
struct TemporaryFile(PathBuf);

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        // Nothing better can be done about a file that cannot be removed.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Writes a file of `size` bytes into `folder`, measures reads of it, and removes it.
///
/// Rates with `O_DIRECT` are absent where the file system does not offer it.
pub fn measure(folder: &Path, size: Bytes, step: &dyn Fn(&str)) -> Result<Vec<DiskRate>> {
    std::fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let file = TemporaryFile(folder.join(format!("lighter-doctor-{}.tmp", std::process::id())));
    step("writing a file to read");
    let size = Bytes(size.0.max(BLOCKS[1].0).next_multiple_of(BLOCKS[1].0));
    write(&file.0, size).with_context(|| {
        format!("writing {size} to {} (choose another folder with --disk)", file.0.display())
    })?;
    let mut rates = Vec::new();
    for pattern in [DiskPattern::Sequential, DiskPattern::Random] {
        for direct in [false, true] {
            for block_bytes in BLOCKS {
                step(&format!(
                    "reading {block_bytes} blocks {}{}",
                    if pattern == DiskPattern::Sequential { "in order" } else { "at random" },
                    if direct { ", O_DIRECT" } else { "" }
                ));
                match read(&file.0, size, pattern, direct, block_bytes) {
                    Ok((bytes, time)) => {
                        rates.push(DiskRate { pattern, direct, block_bytes, bytes_per_second: bytes / time });
                    }
                    Err(_) if direct => {}
                    Err(error) => {
                        return Err(error).with_context(|| format!("reading {}", file.0.display()));
                    }
                }
            }
        }
    }
    Ok(rates)
}

fn write(path: &Path, size: Bytes) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    let mut scramble = Scramble::new(99);
    let mut block = vec![0u8; BLOCKS[1].to_usize()];
    for _ in 0..size.0 / BLOCKS[1].0 {
        // Fresh content for every block, so that a compressing or deduplicating disk has nothing to save.
        for word in block.chunks_exact_mut(8) {
            word.copy_from_slice(&scramble.next().to_le_bytes());
        }
        file.write_all(&block)?;
    }
    file.sync_all()
}

/// Opens for reading with nothing of the file in the page cache.
#[cfg(target_os = "linux")]
fn open_cold(path: &Path, direct: bool) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = if direct { rustix::fs::OFlags::DIRECT.bits() as i32 } else { 0 };
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(file)
}

#[cfg(not(target_os = "linux"))]
fn open_cold(path: &Path, direct: bool) -> std::io::Result<File> {
    if direct {
        return Err(std::io::Error::from(std::io::ErrorKind::Unsupported));
    }
    OpenOptions::new().read(true).open(path)
}

#[cfg(unix)]
fn read_block(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt;
    file.read_exact_at(buffer, offset)
}

#[cfg(not(unix))]
fn read_block(mut file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(buffer)
}

fn read(
    path: &Path,
    size: Bytes,
    pattern: DiskPattern,
    direct: bool,
    block: Bytes,
) -> std::io::Result<(Bytes, Seconds)> {
    let file = open_cold(path, direct)?;
    let mut storage = vec![0u8; block.to_usize() + DIRECT_ALIGNMENT];
    let start = storage.as_ptr().align_offset(DIRECT_ALIGNMENT).min(DIRECT_ALIGNMENT);
    let buffer = &mut storage[start..start + block.to_usize()];
    let mut order: Vec<u64> = (0..size.0 / block.0).collect();
    if pattern == DiskPattern::Random {
        let mut scramble = Scramble::new(block.0 + u64::from(direct));
        for i in (1..order.len()).rev() {
            order.swap(i, (scramble.next() % (i as u64 + 1)) as usize);
        }
    }
    let watch = Stopwatch::start();
    let mut done = Bytes::ZERO;
    for index in order {
        read_block(&file, buffer, index * block.0)?;
        done += block;
        if watch.elapsed().0 > SECONDS_MAX {
            break;
        }
    }
    Ok((done, watch.elapsed()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_every_buffered_pattern_and_cleans_up() {
        let dir = tempfile::tempdir().unwrap();
        let rates = measure(dir.path(), Bytes::mib(2), &|_| {}).unwrap();
        let buffered = rates.iter().filter(|r| !r.direct).count();
        assert_eq!(buffered, 4);
        assert!(rates.iter().all(|r| r.bytes_per_second.0 > 0.0 && r.bytes_per_second.0.is_finite()));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = measure(&file.join("inside"), Bytes::mib(1), &|_| {}).unwrap_err();
        assert!(format!("{error:#}").contains("inside"));
    }
}
