//! SHA-256 of models and outputs, so that a receipt can be checked with `sha256sum`.

use crate::MeterError;
use sha2::{Digest, Sha256};
use std::io::Read;
use std::path::Path;

/// Bytes read at a time, small enough to disappear in any budget.
const READ_BLOCK: usize = 64 << 10;

/// A SHA-256 that is fed in pieces.
#[derive(Clone, Debug, Default)]
pub struct Checksum(Sha256);

impl Checksum {
    /// Of nothing yet.
    pub fn new() -> Checksum {
        Checksum::default()
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The checksum as 64 hexadecimal digits.
    pub fn finish(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// SHA-256 of a buffer as 64 hexadecimal digits.
pub fn sha256_hex(bytes: &[u8]) -> String {
    let mut checksum = Checksum::new();
    checksum.update(bytes);
    checksum.finish()
}

/// SHA-256 of a file, read in blocks of 64 KiB.
///
/// # Errors
/// [`MeterError::Io`] when the file cannot be read.
pub fn sha256_file(path: &Path) -> Result<String, MeterError> {
    let io = |source| MeterError::Io { path: path.to_owned(), source };
    let mut file = std::fs::File::open(path).map_err(io)?;
    let mut block = vec![0u8; READ_BLOCK];
    let mut checksum = Checksum::new();
    loop {
        match file.read(&mut block).map_err(io)? {
            0 => return Ok(checksum.finish()),
            n => checksum.update(&block[..n]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answer_and_pieces() {
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_hex(b"abc"), expected);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, b"abc").unwrap();
        assert_eq!(sha256_file(&path).unwrap(), expected);
        assert!(sha256_file(&dir.path().join("absent")).unwrap_err().to_string().contains("absent"));
    }
}
