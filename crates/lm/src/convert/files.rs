//! The files of a model as Hugging Face lays them out.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lightering_tier::{ByteSource, FileSource};

use serde_json::Value as Json;

use crate::{Error, Result};

/// Largest JSON file that is read, tokenizers excepted.
const JSON_BYTES_MAX: u64 = 16 << 20;
/// Largest list of shards.
const INDEX_BYTES_MAX: u64 = 64 << 20;

/// The files of a checkpoint: weights, and what describes them.
#[derive(Clone)]
pub struct CheckpointFiles {
    /// Its name, for the converted file; may be empty.
    pub name: String,
    /// One safetensors file, or the shards of one model.
    pub weights: Vec<Arc<dyn ByteSource>>,
    /// `config.json`
    pub config: Arc<dyn ByteSource>,
    /// `tokenizer.json`; without it, the converted file has no tokenizer.
    pub tokenizer: Option<Arc<dyn ByteSource>>,
    /// `tokenizer_config.json`
    pub tokenizer_config: Option<Arc<dyn ByteSource>>,
    /// `generation_config.json`
    pub generation_config: Option<Arc<dyn ByteSource>>,
    /// `chat_template.jinja`
    pub chat_template: Option<Arc<dyn ByteSource>>,
}

impl std::fmt::Debug for CheckpointFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CheckpointFiles")
            .field("name", &self.name)
            .field("weights", &self.weights.iter().map(|w| w.name()).collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

pub(super) fn io(place: impl std::fmt::Display, source: std::io::Error) -> Error {
    lightering_formats::Error::Io { place: place.to_string(), source }.into()
}

fn open(path: &Path) -> Result<Arc<dyn ByteSource>> {
    Ok(Arc::new(FileSource::open(path).map_err(|e| io("opening", e))?))
}

/// All of a file that must not be larger than `limit`.
pub(super) fn read_all(source: &dyn ByteSource, limit: u64) -> Result<Vec<u8>> {
    let size = source.len_bytes().0;
    if size > limit {
        return Err(Error::limit(source.name(), "its size in bytes", size, limit));
    }
    let mut bytes = vec![0; size as usize];
    source.read_at(0, &mut bytes).map_err(|e| io(source.name(), e))?;
    Ok(bytes)
}

/// The object in a JSON file.
pub(super) fn read_object(source: &dyn ByteSource) -> Result<serde_json::Map<String, Json>> {
    let bytes = read_all(source, JSON_BYTES_MAX)?;
    match serde_json::from_slice(&bytes) {
        Ok(Json::Object(object)) => Ok(object),
        Ok(_) => Err(Error::invalid(source.name(), "no object", "a JSON object")),
        Err(e) => Err(Error::invalid(source.name(), format!("is no JSON ({e})"), "a JSON object")),
    }
}

/// The shards that an index names.
fn shards(index: &Path, folder: &Path) -> Result<Vec<PathBuf>> {
    let source = open(index)?;
    let bytes = read_all(&*source, INDEX_BYTES_MAX)?;
    let place = source.name();
    let parsed: Json = serde_json::from_slice(&bytes)
        .map_err(|e| Error::invalid(&place, format!("is no JSON ({e})"), "an index of shards"))?;
    let mut names = BTreeSet::new();
    if let Json::Object(index) = &parsed
        && let Some(Json::Object(map)) = index.get("weight_map")
    {
        for file in map.values() {
            let Json::String(file) = file else { continue };
            // The index may come from anywhere; it names files beside it and nothing else.
            if file.contains(['/', '\\']) || file.is_empty() || file.starts_with('.') {
                return Err(Error::invalid(
                    &place,
                    format!("the shard {file:?}"),
                    "the name of a file beside it",
                ));
            }
            names.insert(file.clone());
        }
    }
    if names.is_empty() {
        return Err(Error::invalid(place, "no shards", "an object weight_map of tensors and files"));
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

impl CheckpointFiles {
    /// Finds the files: `path` is a folder, a safetensors file, or the index of several.
    ///
    /// # Errors
    /// There are no weights or no `config.json`, or a file cannot be opened.
    pub fn find(path: &Path) -> Result<CheckpointFiles> {
        let place = path.display();
        let is_folder = path.is_dir();
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let folder = if is_folder { path.to_owned() } else { parent };
        let weights = if is_folder {
            let index = folder.join("model.safetensors.index.json");
            let single = folder.join("model.safetensors");
            if single.is_file() {
                vec![single]
            } else if index.is_file() {
                shards(&index, &folder)?
            } else {
                let mut found: Vec<PathBuf> = std::fs::read_dir(&folder)
                    .map_err(|e| io(&place, e))?
                    .filter_map(|entry| entry.ok().map(|entry| entry.path()))
                    .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
                    .collect();
                found.sort();
                if found.len() != 1 {
                    let what = format!("{} safetensors files and no index of them", found.len());
                    return Err(Error::invalid(
                        place,
                        what,
                        "model.safetensors or model.safetensors.index.json",
                    ));
                }
                found
            }
        } else if path.extension().is_some_and(|e| e == "json") {
            shards(path, &folder)?
        } else {
            vec![path.to_owned()]
        };
        let optional = |name: &str| {
            let path = folder.join(name);
            path.is_file().then(|| open(&path)).transpose()
        };
        let Some(config) = optional("config.json")? else {
            return Err(Error::invalid(place, "there is no config.json", "config.json beside the weights"));
        };
        let name = folder.canonicalize().unwrap_or_else(|_| folder.clone());
        Ok(CheckpointFiles {
            name: name.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default(),
            weights: weights.iter().map(|path| open(path)).collect::<Result<_>>()?,
            config,
            tokenizer: optional("tokenizer.json")?,
            tokenizer_config: optional("tokenizer_config.json")?,
            generation_config: optional("generation_config.json")?,
            chat_template: optional("chat_template.jinja")?,
        })
    }
}
