//! From a checkpoint, or another GGUF file, to a GGUF file, in other formats of weights.
//!
//! A [`Conversion`] is planned from headers and descriptions alone and checked against the builder of decoders; writing
//! it reads rows, converts them and hands them on, so that what it holds does not grow with the model.

mod config;
mod files;
mod names;
mod recipe;
mod rows;
mod tokenizer_json;

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

use lightering_formats::gguf::{Array, GgufFile, GgufWriter, Metadata, Value};
use lightering_formats::safetensors::SafetensorsFile;
use lightering_graph::CacheFormat;
use lightering_tier::ByteSource;
use lightering_units::{BlockFormat, Bytes, DType};

use crate::{CacheOptions, Error, Result};
use config::{Description, Naming};
use names::{Place, Target};
use rows::{Order, Origin, Output, Part, Rows, Sums};

pub use files::CheckpointFiles;
pub use recipe::{ParseRecipeError, Recipe};

/// Memory for rows where none is given.
const ROWS_MEMORY_DEFAULT: u64 = 4 << 20;
/// Memory for the output's buffer and whatever is small.
const SMALL_MEMORY: u64 = 512 << 10;

/// What is going to be written, and where it comes from.
pub struct Conversion {
    architecture: String,
    metadata: Metadata,
    outputs: Vec<Output>,
    sources: Vec<Arc<dyn ByteSource>>,
    layers: u64,
    /// Whether tensors that are small keep their format.
    keeps: bool,
    notes: Vec<String>,
}

impl std::fmt::Debug for Conversion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Conversion")
            .field("architecture", &self.architecture)
            .field("tensors", &self.outputs.len())
            .finish_non_exhaustive()
    }
}

/// What may be used to write a conversion.
#[derive(Clone, Copy, Debug, Default)]
pub struct ConversionOptions {
    /// Most memory that is held, the tokenizer included; without it, what the tokenizer takes and 4 MiB.
    pub memory: Option<Bytes>,
    /// Threads that convert rows; 0 counts as 1.
    pub threads: usize,
}

/// Tensors that went from one format to another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ConvertedFormat {
    /// What they were stored in.
    pub from: BlockFormat,
    /// What they are stored in.
    pub to: BlockFormat,
    /// How many they are.
    pub tensors: usize,
    /// Their elements.
    pub elements: u64,
    /// Their size before.
    pub before: Bytes,
    /// Their size now.
    pub after: Bytes,
    /// Mean of the squared differences of the elements; 0 where they were copied.
    pub mean_squared_error: f64,
    /// Root of the squared differences' sum over that of the squares: 0.01 is one per cent. Not known (none) where the
    /// tensors were copied.
    pub relative_error: Option<f64>,
}

/// What became what.
#[derive(Clone, Debug, PartialEq)]
pub struct ConversionReport {
    /// By format before and after.
    pub formats: Vec<ConvertedFormat>,
    /// Size of the weights before.
    pub before: Bytes,
    /// Size of the weights now.
    pub after: Bytes,
    /// Size of the file.
    pub file: Bytes,
}

fn plain(dtype: DType) -> Option<BlockFormat> {
    match dtype {
        DType::F32 => Some(BlockFormat::F32),
        DType::F16 => Some(BlockFormat::F16),
        DType::BF16 => Some(BlockFormat::BF16),
        _ => None,
    }
}

/// A header in front of data that is not there yet.
pub(crate) struct HeaderOnly {
    pub header: Vec<u8>,
    pub total: u64,
}

impl ByteSource for HeaderOnly {
    fn len_bytes(&self) -> Bytes {
        Bytes(self.total)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        buffer.fill(0);
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(self.header.len());
        let n = buffer.len().min(self.header.len() - from);
        buffer[..n].copy_from_slice(&self.header[from..from + n]);
        Ok(())
    }

    fn name(&self) -> String {
        "the converted model".to_owned()
    }
}

/// A tensor of the checkpoint that goes into one of the file.
struct Stored {
    source: usize,
    offset: u64,
    format: BlockFormat,
    shape: Vec<u64>,
}

/// Heap that a text takes beside the value itself.
fn heap_of(text: &str) -> u64 {
    (text.len() as u64 + 8).next_multiple_of(16).max(32)
}

/// What metadata takes in memory and in the file.
fn sizes(metadata: &Metadata) -> (u64, u64) {
    metadata.iter().fold((0, 0), |(memory, file), (key, value)| {
        let (held, written) = match value {
            Value::Array(Array::Strings(texts)) => texts.iter().fold((0, 0), |(held, written), text| {
                (held + 24 + heap_of(text), written + 8 + text.len() as u64)
            }),
            Value::Array(array) => (8 * array.len() as u64, 8 * array.len() as u64),
            Value::String(text) => (heap_of(text), text.len() as u64 + 8),
            _ => (0, 8),
        };
        (memory + held + 80 + heap_of(key), file + written + 32 + key.len() as u64)
    })
}

impl Conversion {
    /// Plans the conversion of a GGUF file.
    ///
    /// # Errors
    /// The file's header is damaged, or it is one part of several.
    pub fn of_gguf(source: Arc<dyn ByteSource>) -> Result<Conversion> {
        let file = GgufFile::read(&*source)?;
        if file.metadata.get_u64("split.count")?.is_some_and(|parts| parts > 1) {
            return Err(Error::unsupported(source.name(), "a model in several GGUF files"));
        }
        let architecture = file.metadata.get_str("general.architecture")?.unwrap_or_default().to_owned();
        let layers = file.metadata.get_u64(&format!("{architecture}.block_count"))?.unwrap_or(0);
        let outputs = file.tensors.into_iter().map(|t| Output {
            row_len: t.row_len(),
            from: t.format,
            to: t.format,
            shift: 0.0,
            origin: Origin::Stored(vec![Part {
                source: 0,
                offset: t.offset,
                rows: t.rows(),
                order: Order::AsIs,
            }]),
            name: t.name,
            dims: t.dims,
        });
        Ok(Conversion {
            architecture,
            outputs: outputs.collect(),
            metadata: file.metadata,
            sources: vec![source],
            layers,
            keeps: true,
            notes: Vec::new(),
        })
    }

    /// Plans the conversion of a checkpoint, which is checked to be complete.
    ///
    /// # Errors
    /// A family, a feature or a type of weights that is not supported; files that are damaged or contradict each other;
    /// tensors that are missing or that the family does not have.
    pub fn of_checkpoint(files: &CheckpointFiles) -> Result<Conversion> {
        let config = files::read_object(&*files.config)?;
        let mut description = config::describe(&files.config.name(), &config)?;
        let mut notes = std::mem::take(&mut description.notes);
        let mut outputs = outputs(files, &description)?;
        let rows = outputs.iter().find(|o| o.name == "token_embd.weight").map(|o| o.dims[1]);
        let rows = rows.ok_or_else(|| {
            Error::invalid("token_embd.weight", "no such tensor in the checkpoint", "the token embeddings")
        })?;
        for (name, factors) in std::mem::take(&mut description.factors) {
            outputs.push(Output {
                name: name.to_owned(),
                dims: vec![factors.len() as u64],
                row_len: factors.len() as u64,
                from: BlockFormat::F32,
                to: BlockFormat::F32,
                shift: 0.0,
                origin: Origin::Computed(factors),
            });
        }
        let mut metadata = Metadata::default();
        metadata.set("general.architecture", Value::from(description.architecture));
        metadata.set("general.type", Value::from("model"));
        if !files.name.is_empty() {
            metadata.set("general.name", Value::from(files.name.as_str()));
        }
        for (key, value) in std::mem::take(&mut description.keys) {
            metadata.set(&format!("{}.{key}", description.architecture), value);
        }
        let size = Value::U32(u32::try_from(rows).unwrap_or(u32::MAX));
        metadata.set(&format!("{}.vocab_size", description.architecture), size);
        let mut conversion = Conversion {
            architecture: description.architecture.to_owned(),
            metadata,
            outputs,
            sources: files.weights.clone(),
            layers: description.layers,
            keeps: false,
            notes: Vec::new(),
        };
        conversion.check()?;
        for (key, value) in tokenizer_json::keys(files, &config, rows, &mut notes)? {
            conversion.metadata.set(&key, value);
        }
        conversion.notes = notes;
        Ok(conversion)
    }

    /// Chooses the format of each tensor.
    pub fn set_recipe(&mut self, recipe: Recipe) {
        let tied = !self.outputs.iter().any(|o| o.name == "output.weight");
        for output in &mut self.outputs {
            // Formats of blocks of one element only, where elements change places.
            if output.row_len != output.dims.first().copied().unwrap_or(1) {
                output.to = BlockFormat::F32;
                continue;
            }
            let (name, dims) = (&output.name, &output.dims);
            output.to = recipe.format_of(name, dims, output.from, self.keeps, self.layers, tied);
        }
        self.metadata.set("general.file_type", Value::U32(recipe.file_type()));
        self.metadata.set("general.quantization_version", Value::U32(2));
    }

    /// The architecture of the model.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// What the file will say about the model, its tokenizer included.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// What could not be carried over exactly, for people.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Size of the weights once they are converted.
    pub fn data_size(&self) -> Bytes {
        Bytes(self.outputs.iter().map(|o| o.bytes_in(o.to)).sum())
    }

    /// What is held beside the rows that are under way.
    fn held(&self) -> u64 {
        let (memory, file) = sizes(&self.metadata);
        let list: u64 = self.outputs.iter().map(|o| 320 + 3 * heap_of(&o.name)).sum();
        let parts: u64 = self
            .outputs
            .iter()
            .map(|o| match &o.origin {
                Origin::Stored(parts) => parts.len() * size_of::<Part>(),
                Origin::Computed(values) => 4 * values.len(),
            } as u64)
            .sum();
        memory + file + list + parts + SMALL_MEMORY
    }

    /// The smallest memory that [`write`](Self::write) can do with: the header with the tokenizer, and the longest row.
    pub fn smallest_memory(&self) -> Bytes {
        Bytes(self.held() + self.outputs.iter().map(Output::row_memory).max().unwrap_or(0))
    }

    fn writer(&self, metadata: Metadata) -> Result<GgufWriter> {
        let mut writer = GgufWriter::with_metadata(metadata);
        for output in &self.outputs {
            writer.tensor(&output.name, &output.dims, output.to)?;
        }
        Ok(writer)
    }

    /// Has the decoder's graph built from what the file is going to say, so that nothing is missing in it.
    fn check(&mut self) -> Result<()> {
        self.set_recipe(Recipe::Uniform(BlockFormat::F16));
        let mut header = Vec::new();
        let writer = self.writer(self.metadata.clone())?;
        let begun = writer.begin(&mut header)?;
        drop(begun);
        let aligned: u64 = self.outputs.iter().map(|o| o.bytes_in(o.to).next_multiple_of(32)).sum();
        let total = header.len() as u64 + aligned;
        let file = GgufFile::read(&HeaderOnly { header, total })?;
        let cache =
            CacheOptions { format: CacheFormat::F16, page_len: 16, pages: 1, window_pages: 0, context: 16 };
        crate::build(&file, &cache)?;
        Ok(())
    }

    /// Writes the file to `out` and returns both it and what became of the weights; `progress` hears how many bytes of
    /// the weights are written.
    ///
    /// # Errors
    /// The memory is less than [`smallest_memory`](Self::smallest_memory), a source cannot be read, weights are not
    /// finite, or `out` fails.
    pub fn write<W: Write>(
        mut self,
        out: W,
        options: ConversionOptions,
        progress: &mut dyn FnMut(Bytes),
    ) -> Result<(W, ConversionReport)> {
        let smallest = self.smallest_memory();
        let held = self.held();
        let memory = match options.memory {
            None => ROWS_MEMORY_DEFAULT.max(smallest.0 - held),
            Some(memory) if memory >= smallest => memory.0 - held,
            Some(memory) => {
                return Err(Error::invalid("memory", memory, format!("at least {smallest}")));
            }
        };
        // The texts of the tokenizer are gone once they are written.
        let metadata = std::mem::take(&mut self.metadata);
        let mut data = self.writer(metadata)?.begin(out)?;
        let header = data.next_tensor().map_or(0, |t| t.offset);
        let rows = Rows { sources: &self.sources, memory, threads: options.threads.max(1) };
        let mut groups: BTreeMap<(BlockFormat, BlockFormat), (ConvertedFormat, Sums)> = BTreeMap::new();
        let mut done = 0;
        for output in &self.outputs {
            let sums = rows.convert(output, &mut data, &mut |bytes| {
                done += bytes;
                progress(Bytes(done));
            })?;
            let (group, of_group) = groups.entry((output.from, output.to)).or_insert_with(|| {
                let empty = ConvertedFormat {
                    from: output.from,
                    to: output.to,
                    tensors: 0,
                    elements: 0,
                    before: Bytes::ZERO,
                    after: Bytes::ZERO,
                    mean_squared_error: 0.0,
                    relative_error: None,
                };
                (empty, Sums::default())
            });
            group.tensors += 1;
            group.elements += output.elements();
            group.before = Bytes(group.before.0 + output.bytes_in(output.from));
            group.after = Bytes(group.after.0 + output.bytes_in(output.to));
            of_group.squared_error += sums.squared_error;
            of_group.squares += sums.squares;
        }
        let out = data.finish()?;
        let formats: Vec<ConvertedFormat> = groups
            .into_values()
            .map(|(group, sums)| ConvertedFormat {
                mean_squared_error: sums.squared_error / group.elements.max(1) as f64,
                relative_error: (group.from != group.to && sums.squares > 0.0)
                    .then(|| (sums.squared_error / sums.squares).sqrt()),
                ..group
            })
            .collect();
        let sum = |of: fn(&ConvertedFormat) -> Bytes| Bytes(formats.iter().map(|f| of(f).0).sum());
        let padded: u64 = self.outputs.iter().map(|o| o.bytes_in(o.to).next_multiple_of(32)).sum();
        let report = ConversionReport {
            before: sum(|f| f.before),
            after: sum(|f| f.after),
            file: Bytes(header + padded),
            formats,
        };
        Ok((out, report))
    }
}

/// The tensors of the file, from those of the checkpoint.
fn outputs(files: &CheckpointFiles, d: &Description) -> Result<Vec<Output>> {
    // By place in the file; experts by their number.
    let mut singles: BTreeMap<(u64, String), (Target, Stored)> = BTreeMap::new();
    let mut experts: BTreeMap<(u64, String), (Target, BTreeMap<u64, Stored>)> = BTreeMap::new();
    for (source, weights) in files.weights.iter().enumerate() {
        let file = SafetensorsFile::read(&**weights)?;
        for tensor in file.tensors {
            let place = format!("{}: tensor {:?}", weights.name(), tensor.name);
            let target = names::place(d.naming, d.tied, &tensor.name).ok_or_else(|| {
                Error::unsupported(
                    &place,
                    format!("a tensor that models of type {} do not have", d.architecture),
                )
            })?;
            if target == Place::Nowhere {
                continue;
            }
            let format = plain(tensor.dtype)
                .ok_or_else(|| Error::unsupported(&place, format!("weights of type {}", tensor.dtype)))?;
            if tensor.shape.is_empty() || tensor.shape.len() > 2 || tensor.shape.contains(&0) {
                let what = format!("shape {:?}", tensor.shape);
                return Err(Error::invalid(place, what, "a vector or a matrix with elements"));
            }
            let stored = Stored { source, offset: tensor.offset, format, shape: tensor.shape };
            let taken = match target {
                Place::Nowhere => false,
                Place::Tensor(target) => {
                    singles.insert((target.section, target.name.clone()), (target, stored)).is_some()
                }
                Place::Expert(target, expert) => {
                    let key = (target.section, target.name.clone());
                    let (_, of) = experts.entry(key).or_insert_with(|| (target, BTreeMap::new()));
                    of.insert(expert, stored).is_some()
                }
            };
            if taken {
                return Err(Error::invalid(place, "it stands twice", "every tensor once"));
            }
        }
    }
    let mut outputs: BTreeMap<(u64, String), Output> = BTreeMap::new();
    for (key, (target, stored)) in singles {
        outputs.insert(key, single(d, target, stored)?);
    }
    for (key, (target, of)) in experts {
        let output = stacked(d, target, of)?;
        if outputs.insert(key, output).is_some() {
            return Err(Error::invalid("experts", "a tensor that is there twice", "every tensor once"));
        }
    }
    Ok(outputs.into_values().collect())
}

fn single(d: &Description, target: Target, stored: Stored) -> Result<Output> {
    let Target { name, .. } = target;
    // Sizes go from the row's elements on; a vector is one row.
    let mut dims: Vec<u64> = stored.shape.iter().rev().copied().collect();
    let mut order = Order::AsIs;
    if target.transposed && dims.len() == 2 {
        dims.reverse();
        order = Order::Transposed;
    }
    // A router of one expert is a matrix of one row in the checkpoint and a vector in the file.
    if name.contains("ffn_gate_inp_shexp") && dims.len() == 2 && dims[1] == 1 {
        dims.pop();
    }
    let mut row_len = dims[0];
    let mut rows = dims.get(1).copied().unwrap_or(1);
    if let Some(head) = d.paired.filter(|_| target.turned) {
        if dims.len() == 1 {
            (row_len, rows) = (1, dims[0]);
        }
        if !rows.is_multiple_of(head) {
            let what = format!("{rows} rows");
            return Err(Error::invalid(name, what, format!("heads of {head} rows each")));
        }
        order = Order::Paired(head);
    }
    let gemma = matches!(d.naming, Naming::Gemma | Naming::FirstGemma);
    Ok(Output {
        name,
        dims,
        row_len,
        from: stored.format,
        to: BlockFormat::F32,
        shift: if gemma && target.gain { 1.0 } else { 0.0 },
        origin: Origin::Stored(vec![Part { source: stored.source, offset: stored.offset, rows, order }]),
    })
}

fn stacked(d: &Description, target: Target, of: BTreeMap<u64, Stored>) -> Result<Output> {
    let Target { name, .. } = target;
    if of.len() as u64 != d.experts || !of.keys().copied().eq(0..d.experts) {
        let what = format!("{} experts", of.len());
        return Err(Error::invalid(name, what, format!("one for each of {} experts", d.experts)));
    }
    let mut parts = Vec::with_capacity(of.len());
    let mut alike: Option<(Vec<u64>, BlockFormat)> = None;
    for (expert, stored) in of {
        let this = (stored.shape.clone(), stored.format);
        let first = alike.get_or_insert_with(|| this.clone());
        if *first != this || stored.shape.len() != 2 {
            let what = format!("expert {expert} of shape {:?} and type {}", stored.shape, stored.format);
            return Err(Error::invalid(name, what, "matrices, alike in all experts"));
        }
        let rows = stored.shape[0];
        parts.push(Part { source: stored.source, offset: stored.offset, rows, order: Order::AsIs });
    }
    let Some((shape, from)) = alike else {
        return Err(Error::invalid(name, "no experts", "at least one"));
    };
    Ok(Output {
        name,
        dims: vec![shape[1], shape[0], d.experts],
        row_len: shape[1],
        from,
        to: BlockFormat::F32,
        shift: 0.0,
        origin: Origin::Stored(parts),
    })
}
