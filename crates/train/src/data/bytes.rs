//! Files as byte stores, unpacked when they are gzip.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use lightering_meter::{MemoryPool, Reservation};
use lightering_tier::{ByteSource, FileSource};
use lightering_units::Bytes;

use crate::TrainError;

/// Most bytes that one packed file may unpack to.
pub const MAX_UNPACKED_BYTES: u64 = 1 << 36;
const PIECE: usize = 1 << 20;

/// A file that is read by offset: plain files stay on disk, packed ones are unpacked into memory of the pool.
#[derive(Clone)]
pub struct Store {
    pub source: Arc<dyn ByteSource>,
    pub name: String,
    pub _memory: Option<Arc<Reservation>>,
}

impl Store {
    pub fn open(path: &Path, pool: &MemoryPool) -> Result<Store, TrainError> {
        let name = path.display().to_string();
        if path.extension().is_some_and(|e| e == "gz") {
            let (bytes, memory) = read_packed(path, pool)?;
            return Ok(Store { source: Arc::new(bytes), name, _memory: Some(Arc::new(memory)) });
        }
        let source = FileSource::open(path).map_err(|e| TrainError::corrupt(&name, e))?;
        Ok(Store { source: Arc::new(source), name, _memory: None })
    }

    /// Bytes that lie in memory already.
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Store {
        Store { source: Arc::new(bytes), name: name.into(), _memory: None }
    }

    pub fn len(&self) -> u64 {
        self.source.len_bytes().0
    }

    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), TrainError> {
        self.source
            .read_at(offset, buffer)
            .map_err(|source| TrainError::Io { place: format!("{} at byte {offset}", self.name), source })
    }
}

fn read_packed(path: &Path, pool: &MemoryPool) -> Result<(Vec<u8>, Reservation), TrainError> {
    let name = path.display().to_string();
    let file = File::open(path).map_err(|e| TrainError::io(path, e))?;
    let mut reader = flate2::read::MultiGzDecoder::new(BufReader::new(file));
    let mut memory = pool.reserve(format!("unpacked {name}"), Bytes(0))?;
    let mut bytes = Vec::new();
    loop {
        if bytes.capacity() - bytes.len() < PIECE {
            let more = PIECE.max(bytes.len() / 4);
            memory.grow(Bytes(more as u64))?;
            bytes.reserve_exact(more);
        }
        let read = reader
            .by_ref()
            .take(PIECE as u64)
            .read_to_end(&mut bytes)
            .map_err(|e| TrainError::corrupt(&name, format!("cannot be unpacked: {e}")))?;
        if read == 0 {
            break;
        }
        if bytes.len() as u64 > MAX_UNPACKED_BYTES {
            return Err(TrainError::limit(
                &name,
                "its unpacked size in bytes",
                bytes.len() as u64,
                MAX_UNPACKED_BYTES,
            ));
        }
    }
    bytes.shrink_to_fit();
    memory.resize(Bytes(bytes.len() as u64))?;
    Ok((bytes, memory))
}
