//! What was learned, as files.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use lightering_formats::gguf::{GgufDataWriter, GgufTensor, GgufWriter, Value};
use lightering_formats::safetensors::{self, NewTensor};
use lightering_graph::TensorType;
use lightering_kernels::{can_quantize, dequantize_row, quantize_row};
use lightering_train::Trainer;
use lightering_units::{BlockFormat, Bytes, DType};

use super::graph::{Adapter, TrainingGraph, TrainingModel};
use crate::{Error, Result};

/// Bytes that are copied at a time.
const PIECE: usize = 1 << 20;

/// What was written.
#[derive(Clone, Debug, PartialEq)]
pub struct ExportReport {
    /// Tensors that are no longer what they were.
    pub changed: usize,
    /// Size of the file.
    pub size: Bytes,
    /// What could not be kept as it was, for people.
    pub notes: Vec<String>,
}

/// A tensor and how it is written.
struct Planned<'a> {
    tensor: &'a GgufTensor,
    to: BlockFormat,
    states: Option<&'a [String]>,
    adapter: Option<&'a Adapter>,
}

fn io_error(path: &Path, source: io::Error) -> Error {
    lightering_formats::Error::Io { place: path.display().to_string(), source }.into()
}

/// Writes a file beside its place and moves it there when it is complete and on the medium.
fn replace(path: &Path, write: &mut dyn FnMut(&mut BufWriter<File>) -> Result<()>) -> Result<Bytes> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let failed = |e| io_error(path, e);
    let written = File::create(&partial).map_err(failed).and_then(|file| {
        let mut out = BufWriter::with_capacity(PIECE, file);
        write(&mut out)?;
        out.flush().map_err(failed)?;
        out.get_ref().sync_all().map_err(failed)?;
        out.get_ref().metadata().map(|m| Bytes(m.len())).map_err(failed)
    });
    let moved = written.and_then(|size| fs::rename(&partial, path).map(|()| size).map_err(failed));
    if moved.is_err() {
        // What failed is the error to report; the rest of it may not even exist.
        let _ = fs::remove_file(&partial);
    }
    moved
}

/// The first of the formats that fits rows of this length and can be written.
fn writable(wanted: BlockFormat, row_len: usize) -> BlockFormat {
    [wanted, BlockFormat::Q8_0, BlockFormat::F16]
        .into_iter()
        .find(|f| can_quantize(*f) && f.row_bytes(row_len).is_some())
        .unwrap_or(BlockFormat::F32)
}

/// Encodes rows as they come, in pieces of any size.
struct RowEncoder {
    to: BlockFormat,
    pending: Vec<u8>,
    values: Vec<f32>,
    encoded: Vec<u8>,
}

impl RowEncoder {
    fn new(to: BlockFormat, row_len: usize) -> RowEncoder {
        let bytes = to.row_bytes(row_len).unwrap_or(0);
        RowEncoder { to, pending: Vec::new(), values: vec![0.0; row_len], encoded: vec![0; bytes] }
    }

    fn row<W: Write>(&mut self, name: &str, data: &mut GgufDataWriter<W>) -> Result<()> {
        if self.values.iter().any(|x| !x.is_finite()) {
            return Err(Error::invalid(
                format!("tensor {name:?}"),
                "values that are not finite after training",
                "a smaller learning rate, or --clip 1",
            ));
        }
        quantize_row(self.to, &self.values, &mut self.encoded);
        Ok(data.write(&self.encoded)?)
    }

    fn push<W: Write>(&mut self, name: &str, mut piece: &[u8], data: &mut GgufDataWriter<W>) -> Result<()> {
        let row = self.values.len() * 4;
        while !piece.is_empty() {
            let take = (row - self.pending.len()).min(piece.len());
            self.pending.extend_from_slice(&piece[..take]);
            piece = &piece[take..];
            if self.pending.len() == row {
                for (value, bytes) in self.values.iter_mut().zip(self.pending.as_chunks::<4>().0) {
                    *value = f32::from_ne_bytes(*bytes);
                }
                self.pending.clear();
                self.row(name, data)?;
            }
        }
        Ok(())
    }
}

/// All values of a state.
fn state(trainer: &Trainer, name: &str) -> Result<Vec<f32>> {
    let mut bytes = Vec::new();
    trainer.read_state(name, &mut |piece| bytes.extend_from_slice(piece))?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_ne_bytes(*b)).collect())
}

impl Planned<'_> {
    fn write<W: Write>(
        &self,
        model: &TrainingModel,
        trainer: &Trainer,
        data: &mut GgufDataWriter<W>,
    ) -> Result<()> {
        let t = self.tensor;
        let row_len = t.row_len() as usize;
        if let Some(states) = self.states {
            let mut encoder = RowEncoder::new(self.to, row_len);
            for name in states {
                let mut result = Ok(());
                trainer.read_state(name, &mut |piece| {
                    if result.is_ok() {
                        result = encoder.push(&t.name, piece, data);
                    }
                })?;
                result?;
            }
            return Ok(());
        }
        let source = model.source.as_ref().ok_or_else(|| {
            Error::invalid(
                &t.name,
                "a tensor that was neither read nor trained",
                "a model that is all trained",
            )
        })?;
        let failed = |e| io_error(Path::new(&source.name()), e);
        if let Some(adapter) = self.adapter {
            let (a, b) = (state(trainer, &adapter.a)?, state(trainer, &adapter.b)?);
            let bytes = t.format.row_bytes(row_len).unwrap_or(0);
            let mut stored = vec![0; bytes];
            let mut encoder = RowEncoder::new(self.to, row_len);
            for (row, b) in (0..t.rows()).zip(b.chunks_exact(adapter.rank)) {
                source.read_at(t.offset + row * bytes as u64, &mut stored).map_err(failed)?;
                dequantize_row(t.format, &stored, &mut encoder.values);
                for (b, a) in b.iter().zip(a.chunks_exact(row_len)) {
                    let factor = adapter.scale * b;
                    encoder.values.iter_mut().zip(a).for_each(|(w, a)| *w += factor * a);
                }
                encoder.row(&t.name, data)?;
            }
            return Ok(());
        }
        let mut piece = vec![0; PIECE.min(t.size.0 as usize)];
        let mut at = 0;
        while at < t.size.0 {
            let n = (t.size.0 - at).min(PIECE as u64) as usize;
            source.read_at(t.offset + at, &mut piece[..n]).map_err(failed)?;
            data.write(&piece[..n])?;
            at += n as u64;
        }
        Ok(())
    }
}

/// Writes the trained model as a GGUF file: what was trained in place of what was there, adapters merged into their
/// matrices, in `format` or, where none is given, in the formats of the file (F16 for a new model). Rows pass through
/// memory one by one. An older file of that name is only replaced at the end.
///
/// # Errors
/// The disk refuses, or what was learned is not finite.
pub fn write_gguf(
    model: &TrainingModel,
    graph: &TrainingGraph,
    trainer: &Trainer,
    format: Option<BlockFormat>,
    path: &Path,
) -> Result<ExportReport> {
    if let Some(format) = format.filter(|f| !can_quantize(*f)) {
        return Err(Error::unsupported("format of weights", format!("writing {format}")));
    }
    let adapters: HashMap<&str, &Adapter> = graph.adapters.iter().map(|a| (a.tensor.as_str(), a)).collect();
    let mut notes = Vec::new();
    let mut changed = 0;
    let mut planned = Vec::new();
    let mut metadata = model.file.metadata.clone();
    if model.source.is_none() {
        let name = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        metadata.set("general.name", Value::String(name));
    }
    let mut writer = GgufWriter::with_metadata(metadata);
    for tensor in &model.file.tensors {
        let (states, adapter) =
            (graph.trained.get(&tensor.name), adapters.get(tensor.name.as_str()).copied());
        let row_len = tensor.row_len() as usize;
        let matrix = tensor.dims.len() > 1 && !tensor.name.ends_with("ffn_gate_inp.weight");
        let to = if states.is_none() && adapter.is_none() {
            tensor.format
        } else {
            changed += 1;
            let usual = if model.source.is_some() { tensor.format } else { BlockFormat::F16 };
            if matrix { writable(format.unwrap_or(usual), row_len) } else { BlockFormat::F32 }
        };
        if model.source.is_some() && format.is_none() && to != tensor.format {
            notes.push(format!("{} is {to}, because {} cannot be written", tensor.name, tensor.format));
        }
        writer.tensor(&tensor.name, &tensor.dims, to)?;
        planned.push(Planned { tensor, to, states: states.map(Vec::as_slice), adapter });
    }
    let size = replace(path, &mut |out| {
        let mut data = writer.clone().begin(out)?;
        for tensor in &planned {
            tensor.write(model, trainer, &mut data)?;
        }
        data.finish()?;
        Ok(())
    })?;
    Ok(ExportReport { changed, size, notes })
}

/// Writes the adapters alone, as safetensors: `NAME.lora_a` `[rank, in]` and `NAME.lora_b` `[out, rank]` for each tensor
/// `NAME.weight` of the model; `scale` in the metadata multiplies their product.
///
/// # Errors
/// There are none, or the disk refuses.
pub fn write_adapter(graph: &TrainingGraph, trainer: &Trainer, path: &Path) -> Result<Bytes> {
    let Some(first) = graph.adapters.first() else {
        return Err(Error::invalid("adapter file", "no adapters were trained", "--method lora"));
    };
    let metadata = BTreeMap::from([
        ("format".to_owned(), "lighter.lora".to_owned()),
        ("architecture".to_owned(), graph.graph.name.clone()),
        ("rank".to_owned(), first.rank.to_string()),
        ("scale".to_owned(), first.scale.to_string()),
    ]);
    let types: HashMap<&str, TensorType> = trainer.states().collect();
    let mut tensors = Vec::new();
    for name in graph.adapters.iter().flat_map(|a| [&a.a, &a.b]) {
        let dims = types.get(name.as_str()).and_then(TensorType::dims).unwrap_or_default();
        tensors.push(NewTensor { name: name.clone(), dtype: DType::F32, dims });
    }
    replace(path, &mut |out| {
        safetensors::write(&metadata, &tensors, out, &mut |index, out| {
            let mut result = Ok(());
            let read = trainer.read_state(&tensors[index].name, &mut |piece| {
                if result.is_ok() {
                    result = out.write_all(piece);
                }
            });
            read.map_err(io::Error::other).and(result)
        })?;
        Ok(())
    })
}
