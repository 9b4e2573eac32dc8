//! The log of a training from forward passes: 24 bytes a step, from which the trained weights can be made again bit for
//! bit.
//!
//! The file begins with [`MAGIC`], the size of a JSON header as `u32`, the header ([`ZoHeader`]) and its CRC-32C. A record
//! is the seed (`u64`), the projected gradient (`f32`, NaN for a step that was left out), the learning rate (`f32`), the
//! number of the step from 0 (`u32`), and the CRC-32C of these 20 bytes; all little-endian. A record that was cut off when
//! the program was killed ends the log.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lightering_graph::{Constant, DType, Graph, TensorType};
use lightering_kernels::{ReplayStep, ThreadPool, replay_steps};
use lightering_tier::ByteSource;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::events::crc32c;
use crate::export::{StateReader, write_onnx};

/// First bytes of a log.
const MAGIC: &[u8; 8] = b"LIGHTZO1";
/// Bytes of a record.
const RECORD: usize = 24;
/// Largest header that is read.
const HEADER_MAX: u64 = 64 << 20;
/// Largest log that is read, in records.
const STEPS_MAX: u64 = 1 << 28;

/// A parameter; its place in the list is the number of its noise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ZoParameter {
    /// Name in the model.
    pub name: String,
    /// Sizes.
    pub dims: Vec<usize>,
    /// Weight decay.
    pub decay: f32,
}

/// What stands at the beginning of a log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ZoHeader {
    /// How far the loss was looked at from the parameters.
    pub eps: f32,
    /// The seed that those of the steps come from.
    pub seed: u64,
    /// What was trained.
    pub parameters: Vec<ZoParameter>,
}

/// A step as it is logged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoggedStep {
    /// Seed of its noise.
    pub seed: u64,
    /// Projected gradient; `None` when the loss was no number and nothing was learnt.
    pub gradient: Option<f32>,
    /// Learning rate.
    pub rate: f32,
}

impl From<LoggedStep> for ReplayStep {
    fn from(step: LoggedStep) -> ReplayStep {
        ReplayStep { seed: step.seed, rate: step.rate, gradient: step.gradient }
    }
}

fn record(number: u32, step: &LoggedStep) -> [u8; RECORD] {
    let mut bytes = [0; RECORD];
    bytes[..8].copy_from_slice(&step.seed.to_le_bytes());
    bytes[8..12].copy_from_slice(&step.gradient.unwrap_or(f32::NAN).to_le_bytes());
    bytes[12..16].copy_from_slice(&step.rate.to_le_bytes());
    bytes[16..20].copy_from_slice(&number.to_le_bytes());
    let crc = crc32c(&bytes[..20]);
    bytes[20..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn word(bytes: &[u8], at: usize) -> [u8; 4] {
    [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]
}

fn step_of(number: u32, bytes: &[u8]) -> Option<LoggedStep> {
    let whole = u32::from_le_bytes(word(bytes, 20)) == crc32c(&bytes[..20])
        && u32::from_le_bytes(word(bytes, 16)) == number;
    let (low, high) = (u32::from_le_bytes(word(bytes, 0)), u32::from_le_bytes(word(bytes, 4)));
    let gradient = f32::from_le_bytes(word(bytes, 8));
    whole.then(|| LoggedStep {
        seed: u64::from(low) | u64::from(high) << 32,
        gradient: gradient.is_finite().then_some(gradient),
        rate: f32::from_le_bytes(word(bytes, 12)),
    })
}

/// A log that was read.
#[derive(Clone, Debug, PartialEq)]
pub struct ZoLog {
    /// Its beginning.
    pub header: ZoHeader,
    /// Its steps.
    pub steps: Vec<LoggedStep>,
    /// Bytes at the end that are no whole record, as a killed program leaves them.
    pub torn: u64,
    /// Where the whole records end.
    end: u64,
}

impl ZoLog {
    /// Reads a log.
    ///
    /// # Errors
    /// It is none, its header is damaged, or a record in the middle is.
    pub fn read(path: &Path) -> Result<ZoLog, TrainError> {
        let file = File::open(path).map_err(|e| TrainError::io(path, e))?;
        let size = file.metadata().map_err(|e| TrainError::io(path, e))?.len();
        ZoLog::parse(&path.display().to_string(), &mut std::io::BufReader::new(file), size)
    }

    /// Reads a log of `size` bytes; `place` is for messages.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(place: &str, from: &mut dyn Read, size: u64) -> Result<ZoLog, TrainError> {
        let cut = |_| TrainError::corrupt(place, "it ends within the header");
        let mut start = [0; 12];
        from.read_exact(&mut start).map_err(cut)?;
        if start[..8] != *MAGIC {
            return Err(TrainError::corrupt(place, "it does not begin as a log of steps (.zo) does"));
        }
        let len = u64::from(u32::from_le_bytes(word(&start, 8)));
        if len > HEADER_MAX {
            return Err(TrainError::limit(place, "header in bytes", len, HEADER_MAX));
        }
        if len + 16 > size {
            return Err(TrainError::corrupt(place, "it ends within the header"));
        }
        let mut json = vec![0; len as usize];
        let mut crc = [0; 4];
        from.read_exact(&mut json).and_then(|()| from.read_exact(&mut crc)).map_err(cut)?;
        if u32::from_le_bytes(crc) != crc32c(&json) {
            return Err(TrainError::corrupt(place, "the checksum of the header is wrong"));
        }
        let header: ZoHeader =
            serde_json::from_slice(&json).map_err(|e| TrainError::corrupt(place, format!("header: {e}")))?;
        let records = (size - 16 - len) / RECORD as u64;
        if records > STEPS_MAX {
            return Err(TrainError::limit(place, "steps", records, STEPS_MAX));
        }
        let mut steps = Vec::new();
        let mut bytes = [0; RECORD];
        while from.read_exact(&mut bytes).is_ok() {
            match step_of(steps.len() as u32, &bytes) {
                Some(step) => steps.push(step),
                None if steps.len() as u64 + 1 >= records => break,
                None => {
                    let what = format!("record {} is damaged", steps.len());
                    return Err(TrainError::corrupt(place, what));
                }
            }
        }
        let end = 16 + len + (steps.len() * RECORD) as u64;
        Ok(ZoLog { header, steps, torn: size.saturating_sub(end), end })
    }
}

/// Appends steps to a log.
#[derive(Debug)]
pub struct ZoLogWriter {
    path: PathBuf,
    file: File,
    steps: u32,
}

impl ZoLogWriter {
    /// Begins a log; an older file of that name is lost.
    ///
    /// # Errors
    /// What the medium reports.
    pub fn create(path: &Path, header: &ZoHeader) -> Result<ZoLogWriter, TrainError> {
        let failed = |e| TrainError::io(path, e);
        let json = serde_json::to_vec(header).map_err(|e| TrainError::corrupt("header of a log", e))?;
        let len = u32::try_from(json.len()).ok().filter(|l| u64::from(*l) <= HEADER_MAX);
        let len = len.ok_or_else(|| {
            TrainError::limit(path.display(), "header in bytes", json.len() as u64, HEADER_MAX)
        })?;
        let mut file = File::create(path).map_err(failed)?;
        let mut bytes = Vec::with_capacity(json.len() + 16);
        bytes.extend(MAGIC);
        bytes.extend(len.to_le_bytes());
        bytes.extend(&json);
        bytes.extend(crc32c(&json).to_le_bytes());
        file.write_all(&bytes).map_err(failed)?;
        Ok(ZoLogWriter { path: path.to_owned(), file, steps: 0 })
    }

    /// Goes on behind the whole records of a log that was read from `path`.
    ///
    /// # Errors
    /// What the medium reports.
    pub fn resume(path: &Path, log: &ZoLog) -> Result<ZoLogWriter, TrainError> {
        let failed = |e| TrainError::io(path, e);
        let mut file = OpenOptions::new().write(true).open(path).map_err(failed)?;
        file.set_len(log.end).map_err(failed)?;
        file.seek(SeekFrom::Start(log.end)).map_err(failed)?;
        Ok(ZoLogWriter { path: path.to_owned(), file, steps: log.steps.len() as u32 })
    }

    /// Adds a step.
    ///
    /// # Errors
    /// What the medium reports.
    pub fn append(&mut self, step: &LoggedStep) -> Result<(), TrainError> {
        let bytes = record(self.steps, step);
        self.file.write_all(&bytes).map_err(|e| TrainError::io(&self.path, e))?;
        self.steps += 1;
        Ok(())
    }

    /// Waits until everything is on the medium.
    ///
    /// # Errors
    /// What it reports.
    pub fn sync(&self) -> Result<(), TrainError> {
        self.file.sync_all().map_err(|e| TrainError::io(&self.path, e))
    }
}

/// The weights of a model after the steps of a log, made again from those before, as a [`StateReader`].
struct Replayed<'a> {
    model: &'a Graph,
    sources: &'a [Arc<dyn ByteSource>],
    log: &'a ZoLog,
    steps: Vec<ReplayStep>,
    threads: &'a ThreadPool,
}

/// Elements that are changed at a time, a multiple of a block of noise.
const PIECE: usize = 1 << 18;

impl StateReader for Replayed<'_> {
    fn states(&self) -> Vec<(String, TensorType)> {
        let parameters = &self.log.header.parameters;
        parameters.iter().map(|p| (p.name.clone(), TensorType::fixed(DType::F32, &p.dims))).collect()
    }

    fn read(&self, name: &str, read: &mut dyn FnMut(&[u8])) -> Result<(), TrainError> {
        let parameters = &self.log.header.parameters;
        let found = parameters.iter().position(|p| p.name == name);
        let value = self.model.values.iter().find(|v| v.name == name);
        let (Some(stream), Some(constant)) = (found, value.and_then(|v| v.constant())) else {
            return Err(TrainError::invalid(
                "log",
                format!("{name:?} is no weight of this model"),
                "its base",
            ));
        };
        let elements: usize = parameters[stream].dims.iter().product();
        let mut piece = vec![0f32; PIECE.min(elements)];
        let mut at = 0;
        while at < elements {
            let len = PIECE.min(elements - at);
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut piece[..len]);
            match constant {
                Constant::Inline(tensor) => {
                    bytes.copy_from_slice(&tensor.as_bytes()[at * 4..(at + len) * 4]);
                }
                Constant::Stored(stored) => {
                    let source = self.sources.get(stored.source.0 as usize);
                    let source = source
                        .ok_or_else(|| TrainError::corrupt(name, "it is in a file that was not given"))?;
                    source
                        .read_at(stored.offset + at as u64 * 4, bytes)
                        .map_err(|e| TrainError::io(Path::new(&source.name()), e))?;
                }
            }
            let settings = [self.log.header.eps, parameters[stream].decay];
            replay_steps(self.threads, stream as u32, settings, &self.steps, at, &mut piece[..len]);
            read(bytemuck::cast_slice(&piece[..len]));
            at += len;
        }
        Ok(())
    }
}

/// Writes `model` as an ONNX file with its weights as they are after the steps `from..` of `log`.
///
/// # Errors
/// The log is one of another model, or the disk refuses.
pub fn apply_log(
    model: &Graph,
    sources: &[Arc<dyn ByteSource>],
    log: &ZoLog,
    from: usize,
    threads: &ThreadPool,
    path: &Path,
) -> Result<(), TrainError> {
    for p in &log.header.parameters {
        let value = model.values.iter().find(|v| v.name == p.name && v.constant().is_some());
        let fits = value.and_then(|v| v.ty.tensor()).is_some_and(|t| {
            t.dtype == DType::F32 && t.elements() == p.dims.iter().try_fold(1usize, |n, d| n.checked_mul(*d))
        });
        if !fits {
            return Err(TrainError::invalid(
                "log",
                format!("it changes {:?} of shape {:?}, which this model has not", p.name, p.dims),
                "the model that the training began with",
            ));
        }
    }
    let steps = log.steps.iter().skip(from).map(|s| ReplayStep::from(*s)).collect();
    write_onnx(&Replayed { model, sources, log, steps, threads }, model, sources, path)
}
