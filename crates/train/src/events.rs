//! TensorBoard's event files, with scalars.
//!
//! A file is a sequence of records: the size as `u64`, a masked CRC-32C of it, the bytes, a masked CRC-32C of these;
//! all little-endian. The bytes are an `Event` of protocol buffers.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::TrainError;

/// Castagnoli's polynomial, reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut crc = i as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ POLYNOMIAL } else { crc >> 1 };
            bit += 1;
        }
        table[i] = crc;
        i += 1;
    }
    table
};

/// CRC-32C (RFC 3720, appendix B.4).
pub fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &b| TABLE[usize::from(crc as u8 ^ b)] ^ (crc >> 8))
}

/// The CRC as records hold it: rotated and shifted, so that a checksum of data with checksums is none by accident.
fn masked(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn bytes_field(out: &mut Vec<u8>, number: u8, bytes: &[u8]) {
    out.push(number << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

/// An event file that is being written.
pub struct EventWriter {
    out: BufWriter<File>,
    path: PathBuf,
}

impl EventWriter {
    /// Starts a new file in `folder`. `wall_time` is in seconds since 1970 and part of the name, so that a training that
    /// goes on adds a file.
    ///
    /// # Errors
    /// The file cannot be made, or is there already.
    pub fn create(folder: &Path, wall_time: f64) -> Result<EventWriter, TrainError> {
        std::fs::create_dir_all(folder).map_err(|e| TrainError::io(folder, e))?;
        // TensorBoard reads the files in the order of their names; the second number tells those of one second apart.
        let (seconds, micros) = (wall_time as u64, (wall_time.fract() * 1e6) as u64);
        let path = folder.join(format!("events.out.tfevents.{seconds:010}.lighter.{micros:06}"));
        let file = File::create_new(&path).map_err(|e| TrainError::io(&path, e))?;
        let mut writer = EventWriter { out: BufWriter::new(file), path };
        let mut event = vec![1 << 3 | 1];
        event.extend(wall_time.to_le_bytes());
        bytes_field(&mut event, 3, b"brain.Event:2");
        writer.record(&event)?;
        Ok(writer)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn record(&mut self, event: &[u8]) -> Result<(), TrainError> {
        let size = (event.len() as u64).to_le_bytes();
        let mut record = size.to_vec();
        record.extend(masked(&size).to_le_bytes());
        record.extend(event);
        record.extend(masked(event).to_le_bytes());
        self.out.write_all(&record).map_err(|e| TrainError::io(&self.path, e))
    }

    /// Adds values of one step. `wall_time` is in seconds since 1970.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn scalars(&mut self, step: u64, wall_time: f64, values: &[(&str, f32)]) -> Result<(), TrainError> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut entry = Vec::new();
            bytes_field(&mut entry, 1, tag.as_bytes());
            entry.push(2 << 3 | 5);
            entry.extend(value.to_le_bytes());
            bytes_field(&mut summary, 1, &entry);
        }
        let mut event = vec![1 << 3 | 1];
        event.extend(wall_time.to_le_bytes());
        event.push(2 << 3);
        varint(&mut event, step);
        bytes_field(&mut event, 5, &summary);
        self.record(&event)
    }

    /// Hands everything to the operating system, for who is watching.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn flush(&mut self) -> Result<(), TrainError> {
        self.out.flush().map_err(|e| TrainError::io(&self.path, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_standard() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn records_are_framed() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(folder.path(), 1_700_000_000.25).unwrap();
        writer.scalars(300, 1_700_000_001.0, &[("loss/train", 0.5), ("rate", 0.1)]).unwrap();
        writer.flush().unwrap();
        let path = writer.path().to_owned();
        assert!(path.to_string_lossy().ends_with("events.out.tfevents.1700000000.lighter.250000"));
        assert!(EventWriter::create(folder.path(), 1_700_000_000.25).is_err(), "nothing is overwritten");
        let bytes = std::fs::read(path).unwrap();
        let mut rest = &bytes[..];
        let mut events = Vec::new();
        while !rest.is_empty() {
            let size = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[8..12], masked(&rest[..8]).to_le_bytes());
            let event = &rest[12..12 + size];
            assert_eq!(rest[12 + size..16 + size], masked(event).to_le_bytes());
            events.push(event.to_vec());
            rest = &rest[16 + size..];
        }
        assert_eq!(events.len(), 2);
        let mut expected = vec![0x09];
        expected.extend(1_700_000_001f64.to_le_bytes());
        expected.extend([0x10, 0xac, 0x02, 0x2a, 17 + 2 + 11 + 2]);
        expected.extend([0x0a, 17, 0x0a, 10]);
        expected.extend(b"loss/train");
        expected.push(0x15);
        expected.extend(0.5f32.to_le_bytes());
        expected.extend([0x0a, 11, 0x0a, 4]);
        expected.extend(b"rate");
        expected.push(0x15);
        expected.extend(0.1f32.to_le_bytes());
        assert_eq!(events[1], expected);
    }
}
