//! Checkpoints: what a training needs to go on, in files that survive being interrupted.
//!
//! A checkpoint is one safetensors file, `step-0000001000.safetensors`. Its tensors are those of the training; the state
//! is JSON under `state` in the metadata; and the last 32 bytes, a tensor called [`CHECKSUM`], are the SHA-256 of
//! everything before them.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use lightering_formats::safetensors::{self, NewTensor, SafetensorsFile, SafetensorsTensor};
use lightering_tier::{ByteSource, FileSource};
use lightering_units::DType;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::durable::{self, Open, PARTIAL};
use crate::{EarlyStopping, Position, TrainError};

/// Version of the state.
pub const STATE_SCHEMA: u32 = 1;
/// Name of the tensor that holds the checksum.
pub const CHECKSUM: &str = "lighter.checksum";
const STATE: &str = "state";
const PIECE: usize = 1 << 18;

/// Where a training stands, beside its tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Version of this record, [`STATE_SCHEMA`].
    pub schema: u32,
    /// Updates done.
    pub step: u64,
    /// Updates in the whole training, as the schedule has it.
    pub total_steps: u64,
    /// The batch that comes next.
    pub position: Position,
    /// The seed of everything random.
    pub seed: u64,
    /// The schedule, as it is written on the command line.
    pub schedule: String,
    /// The validation metric of this checkpoint, if it was measured.
    pub metric: Option<f64>,
    /// Whether a larger metric is better.
    pub larger_is_better: bool,
    /// What has been seen for early stopping.
    pub early_stopping: Option<EarlyStopping>,
    /// Whatever else the training loop keeps.
    #[serde(default)]
    pub extra: BTreeMap<String, serde_json::Value>,
}

impl Default for TrainState {
    fn default() -> Self {
        TrainState {
            schema: STATE_SCHEMA,
            step: 0,
            total_steps: 0,
            position: Position::default(),
            seed: 0,
            schedule: String::new(),
            metric: None,
            larger_is_better: false,
            early_stopping: None,
            extra: BTreeMap::new(),
        }
    }
}

impl TrainState {
    /// Reads the JSON form.
    ///
    /// # Errors
    /// It is no state, or one of another version.
    pub fn from_json(text: &str) -> Result<TrainState, TrainError> {
        #[derive(Deserialize)]
        struct Version {
            schema: u32,
        }
        let wrong = |e: serde_json::Error| TrainError::corrupt("state of a checkpoint", e);
        let version: Version = serde_json::from_str(text).map_err(wrong)?;
        if version.schema != STATE_SCHEMA {
            return Err(TrainError::unsupported(
                "state of a checkpoint",
                format!("version {} (this program reads {STATE_SCHEMA})", version.schema),
            ));
        }
        serde_json::from_str(text).map_err(wrong)
    }
}

/// The checkpoints of one training in a folder.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    folder: PathBuf,
    keep: usize,
}

/// The newest checkpoint that is whole, and those that are not.
#[derive(Debug)]
pub struct Found {
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    /// Newer ones that are damaged, each with the reason.
    pub damaged: Vec<String>,
}

/// An opened checkpoint, of which only the header is in memory.
pub struct Checkpoint {
    path: PathBuf,
    /// Where the training stood.
    pub state: TrainState,
    file: SafetensorsFile,
    source: FileSource,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint").field("path", &self.path).field("state", &self.state).finish()
    }
}

/// Hashes what passes.
struct Hashed<'a> {
    out: &'a mut dyn Write,
    hash: Sha256,
}

impl Write for Hashed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Where a hash of everything so far can be had while the writer is lent to someone else.
struct Shared<'a, 'b>(&'a std::cell::RefCell<Hashed<'b>>);

impl Write for Shared<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.borrow_mut().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.borrow_mut().flush()
    }
}

fn write_checkpoint(
    state: &TrainState,
    tensors: &[NewTensor],
    out: &mut dyn Write,
    data: &mut dyn FnMut(&NewTensor, &mut dyn Write) -> io::Result<()>,
) -> Result<(), TrainError> {
    let json = serde_json::to_string(state)
        .map_err(|e| TrainError::invalid("state of a checkpoint", e, "a state that has a JSON form"))?;
    let metadata =
        BTreeMap::from([("format".to_owned(), "lighter.checkpoint".to_owned()), (STATE.to_owned(), json)]);
    let mut all = tensors.to_vec();
    all.push(NewTensor { name: CHECKSUM.into(), dtype: DType::U8, dims: vec![32] });
    let hashed = std::cell::RefCell::new(Hashed { out, hash: Sha256::new() });
    safetensors::write(&metadata, &all, &mut Shared(&hashed), &mut |index, out| match tensors.get(index) {
        Some(tensor) => data(tensor, out),
        None => {
            let sum = hashed.borrow().hash.clone().finalize();
            out.write_all(&sum)
        }
    })?;
    Ok(())
}

impl Checkpoints {
    /// The checkpoints in `folder`, which is made if it is not there. The last `keep` (at least 1) and the best one are
    /// kept.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn new(folder: impl Into<PathBuf>, keep: usize) -> Result<Checkpoints, TrainError> {
        let folder = folder.into();
        fs::create_dir_all(&folder).map_err(|e| TrainError::io(&folder, e))?;
        Ok(Checkpoints { folder, keep: keep.max(1) })
    }

    /// Where they are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes a checkpoint, tensor by tensor as `data` gives them (little-endian, row-major), and removes those that are
    /// no longer kept. Until it is complete on the medium, nothing of the older ones is touched.
    ///
    /// # Errors
    /// What the medium reports (it is full, say); the older checkpoints are then as they were.
    pub fn save(
        &self,
        state: &TrainState,
        tensors: &[NewTensor],
        data: &mut dyn FnMut(&NewTensor, &mut dyn Write) -> io::Result<()>,
    ) -> Result<PathBuf, TrainError> {
        self.save_through(&durable::create, state, tensors, data)
    }

    fn save_through(
        &self,
        open: Open<'_>,
        state: &TrainState,
        tensors: &[NewTensor],
        data: &mut dyn FnMut(&NewTensor, &mut dyn Write) -> io::Result<()>,
    ) -> Result<PathBuf, TrainError> {
        let path = self.folder.join(format!("step-{:010}.safetensors", state.step));
        durable::replace(&path, open, &mut |out| write_checkpoint(state, tensors, out, data)).map_err(
            |e| match e {
                TrainError::Format(e) => TrainError::Format(e.within(path.display())),
                e => e,
            },
        )?;
        self.remove_old(state.step, &path)?;
        Ok(path)
    }

    /// The checkpoints by step, the newest first; not checked.
    pub fn list(&self) -> Result<Vec<(u64, PathBuf)>, TrainError> {
        let mut out = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(|e| TrainError::io(&self.folder, e))? {
            let path = entry.map_err(|e| TrainError::io(&self.folder, e))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let step = name.strip_prefix("step-").and_then(|n| n.strip_suffix(".safetensors"));
            if let Some(step) = step.and_then(|s| s.parse().ok()) {
                out.push((step, path));
            }
        }
        out.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
        Ok(out)
    }

    fn remove_old(&self, step: u64, newest: &Path) -> Result<(), TrainError> {
        let best = self.best()?.map(|b| b.path);
        let mut kept = 0;
        for (other, path) in self.list()? {
            // Of a future that was given up, because its checkpoints were damaged.
            if other > step {
                continue;
            }
            if path != newest && Some(&path) != best.as_ref() && kept >= self.keep {
                fs::remove_file(&path).map_err(|e| TrainError::io(&path, e))?;
            } else {
                kept += 1;
            }
        }
        for entry in fs::read_dir(&self.folder).map_err(|e| TrainError::io(&self.folder, e))?.flatten() {
            let path = entry.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with("step-") && path.extension().is_some_and(|e| e == PARTIAL) {
                // Left by a training that was killed; it is in nobody's way if it stays.
                let _ = fs::remove_file(&path);
            }
        }
        Ok(())
    }

    /// The checkpoint with the best metric, of those whose header can be read.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn best(&self) -> Result<Option<Checkpoint>, TrainError> {
        let mut best: Option<Checkpoint> = None;
        for (_, path) in self.list()? {
            let Ok(other) = Checkpoint::open(&path) else { continue };
            let Some(metric) = other.state.metric else { continue };
            let better = best
                .as_ref()
                .and_then(|b| b.state.metric)
                .is_none_or(|b| if other.state.larger_is_better { metric > b } else { metric < b });
            if better {
                best = Some(other);
            }
        }
        Ok(best)
    }

    /// The newest checkpoint whose checksum is right; `None` in a folder without checkpoints.
    ///
    /// # Errors
    /// All of them are damaged, or the folder cannot be read.
    pub fn latest_good(&self) -> Result<Option<Found>, TrainError> {
        let mut damaged = Vec::new();
        for (_, path) in self.list()? {
            match Checkpoint::open(&path).and_then(|c| c.verify().map(|()| c)) {
                Ok(checkpoint) => return Ok(Some(Found { checkpoint, damaged })),
                Err(e) => damaged.push(format!("{}: {e}", path.display())),
            }
        }
        if damaged.is_empty() {
            return Ok(None);
        }
        Err(TrainError::NoCheckpoint { folder: self.folder.display().to_string(), damaged })
    }
}

impl Checkpoint {
    /// Reads the header of a checkpoint; see [`verify`](Self::verify) for the rest.
    ///
    /// # Errors
    /// It is none, or its header is damaged.
    pub fn open(path: &Path) -> Result<Checkpoint, TrainError> {
        let source = FileSource::open(path).map_err(|e| TrainError::io(path, e))?;
        let (file, state) = read_header(&source)?;
        Ok(Checkpoint { path: path.to_owned(), state, file, source })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Compares the checksum with the content, which reads the whole file.
    ///
    /// # Errors
    /// It is damaged.
    pub fn verify(&self) -> Result<(), TrainError> {
        verify(&self.file, &self.source)
    }

    /// The tensors of the training, in the order of their names.
    pub fn tensors(&self) -> impl Iterator<Item = &SafetensorsTensor> {
        self.file.tensors.iter().filter(|t| t.name != CHECKSUM)
    }

    /// The tensor of this name, which must have `size` bytes.
    ///
    /// # Errors
    /// There is none of this name and size.
    fn tensor(&self, name: &str, size: u64) -> Result<&SafetensorsTensor, TrainError> {
        let place = || self.path.display().to_string();
        let tensor = self.file.tensor(name).ok_or_else(|| {
            TrainError::invalid(
                place(),
                format!("no tensor {name:?}"),
                "a checkpoint of this model (was it made with other options?)",
            )
        })?;
        if tensor.size.0 != size {
            return Err(TrainError::invalid(
                place(),
                format!("tensor {name:?} of {} (shape {:?})", tensor.size, tensor.shape),
                format!("{size} bytes, as this model has"),
            ));
        }
        Ok(tensor)
    }

    /// Reads a tensor straight to its place.
    ///
    /// # Errors
    /// There is none of this name and size, or it cannot be read.
    pub fn read(&self, name: &str, target: &mut [u8]) -> Result<(), TrainError> {
        self.read_part(name, target.len() as u64, 0, target)
    }

    /// Reads the bytes from `start` on of a tensor of `size` bytes.
    ///
    /// # Errors
    /// There is none of this name and size, or it cannot be read.
    pub fn read_part(&self, name: &str, size: u64, start: u64, part: &mut [u8]) -> Result<(), TrainError> {
        let tensor = self.tensor(name, size)?;
        self.source.read_at(tensor.offset + start, part).map_err(|e| TrainError::io(&self.path, e))
    }
}

fn read_header(source: &dyn ByteSource) -> Result<(SafetensorsFile, TrainState), TrainError> {
    let file = SafetensorsFile::read(source)?;
    let corrupt = |what: &str| TrainError::corrupt(source.name(), what);
    let state = file.metadata.get(STATE).ok_or_else(|| corrupt("it holds no state of a training"))?;
    let state = TrainState::from_json(state)?;
    let sum = file.tensor(CHECKSUM).ok_or_else(|| corrupt("it holds no checksum"))?;
    if sum.size.0 != 32 || sum.offset + 32 != source.len_bytes().0 {
        return Err(corrupt("its checksum does not stand at its end"));
    }
    Ok((file, state))
}

fn verify(file: &SafetensorsFile, source: &dyn ByteSource) -> Result<(), TrainError> {
    let failed = |source_error| TrainError::Io { place: source.name().to_owned(), source: source_error };
    let end = file.tensor(CHECKSUM).expect("the header was checked to have one").offset;
    let mut hash = Sha256::new();
    let mut piece = vec![0; PIECE.min(end as usize)];
    let mut at = 0;
    while at < end {
        let size = (end - at).min(PIECE as u64) as usize;
        source.read_at(at, &mut piece[..size]).map_err(failed)?;
        hash.update(&piece[..size]);
        at += size as u64;
    }
    let mut sum = [0; 32];
    source.read_at(end, &mut sum).map_err(failed)?;
    if hash.finalize()[..] != sum[..] {
        return Err(TrainError::corrupt(source.name(), "its content does not match its checksum"));
    }
    Ok(())
}

/// Reads any bytes as a checkpoint, for the tests of damaged files.
///
/// # Errors
/// They are none, or damaged.
pub fn check_checkpoint(bytes: &[u8]) -> Result<TrainState, TrainError> {
    let bytes = bytes.to_vec();
    let (file, state) = read_header(&bytes)?;
    verify(&file, &bytes)?;
    Ok(state)
}

#[cfg(test)]
mod tests;
