//! The model with what it has learnt.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use lightering_formats::onnx;
use lightering_graph::{Constant, Graph, SourceId, StoredTensor, TensorType, ValueKind};
use lightering_tier::{ByteSource, FileSource};
use lightering_units::Bytes;

use crate::{TrainError, Trainer};

/// Writes `model`, the graph that was trained as it was imported, as an ONNX file with the parameters and statistics of
/// `trainer` in place of its own. What was learnt passes through a file beside it, not through memory.
///
/// # Errors
/// The disk refuses, or an operator has no ONNX spelling. An older file of that name is only replaced at the end.
pub fn export_onnx(
    trainer: &Trainer,
    model: &Graph,
    sources: &[Arc<dyn ByteSource>],
    path: &Path,
) -> Result<(), TrainError> {
    write_onnx(trainer, model, sources, path)
}

/// Tensors of a training, lent one after the other.
pub trait StateReader {
    /// Names and types.
    fn states(&self) -> Vec<(String, TensorType)>;

    /// Lends the bytes of a tensor, in one or several pieces from the first to the last.
    ///
    /// # Errors
    /// There is no such tensor, or the disk fails where it waits.
    fn read(&self, name: &str, read: &mut dyn FnMut(&[u8])) -> Result<(), TrainError>;
}

impl StateReader for Trainer {
    fn states(&self) -> Vec<(String, TensorType)> {
        Trainer::states(self).map(|(name, ty)| (name.to_owned(), ty)).collect()
    }

    fn read(&self, name: &str, read: &mut dyn FnMut(&[u8])) -> Result<(), TrainError> {
        Ok(self.read_state(name, read)?)
    }
}

/// As [`export_onnx`], for anything that can lend what was learnt.
///
/// # Errors
/// As [`export_onnx`].
pub fn write_onnx(
    trainer: &dyn StateReader,
    model: &Graph,
    sources: &[Arc<dyn ByteSource>],
    path: &Path,
) -> Result<(), TrainError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".weights.tmp");
    let weights = path.with_file_name(name);
    let written = write(trainer, model, sources, &weights, path);
    // The first error counts.
    let _ = std::fs::remove_file(&weights);
    written
}

fn write(
    trainer: &dyn StateReader,
    model: &Graph,
    sources: &[Arc<dyn ByteSource>],
    weights: &Path,
    target: &Path,
) -> Result<(), TrainError> {
    let mut graph = model.clone();
    crate::step::separate_copies(&mut graph);
    let mut sources = sources.to_vec();
    let source = SourceId(u32::try_from(sources.len()).expect("fewer than 2^32 files"));
    let file = std::fs::File::create(weights).map_err(|e| TrainError::io(weights, e))?;
    let mut out = std::io::BufWriter::new(file);
    let mut offset = 0u64;
    for (name, ty) in trainer.states() {
        // Moments belong to the training, not to the model.
        let Some(at) = graph.values.iter().position(|v| v.name == name) else { continue };
        let value = &mut graph.values[at];
        if !matches!(value.kind, ValueKind::Constant(_)) {
            continue;
        }
        let same = value.ty.tensor().and_then(TensorType::size_bytes) == ty.size_bytes();
        if !same {
            return Err(TrainError::invalid(
                format!("parameter {name:?}"),
                format!("{ty} after training"),
                value.ty.to_string(),
            ));
        }
        let mut result = Ok(());
        trainer.read(&name, &mut |piece| {
            if result.is_ok() {
                result = out.write_all(piece);
            }
        })?;
        result.map_err(|e| TrainError::io(weights, e))?;
        let size = ty.size_bytes().unwrap_or(0) as u64;
        let stored = StoredTensor { source, offset, size: Bytes(size) };
        value.kind = ValueKind::Constant(Constant::Stored(stored));
        offset += size;
    }
    out.flush().map_err(|e| TrainError::io(weights, e))?;
    drop(out);
    let file = FileSource::open(weights).map_err(|e| TrainError::io(weights, e))?;
    sources.push(Arc::new(file));
    graph.sources.push(weights.display().to_string());
    let proto = onnx::export(&graph, &sources)?;
    onnx::save_model(&proto, None, target)?;
    Ok(())
}
