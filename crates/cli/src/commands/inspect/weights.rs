//! What is inside a GGUF or a safetensors file.

use crate::arguments::InspectArguments;
use crate::container::{self, Container};
use crate::failure::{Exit, Failure, Outcome};
use crate::output::{Output, Table, printable};
use lightering_formats::gguf::{Array, GgufFile, Metadata, Value};
use lightering_lm::{ChatTemplate, Tokenizer};
use lightering_units::Bytes;
use serde::Serialize;
use serde_json::{Map, Value as Json, json};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

/// Arrays of the metadata are written out up to this length; of longer ones, so many elements.
const ARRAY_MAX: usize = 16;
const ARRAY_FIRST: usize = 8;
/// The largest tensors that are printed.
const LARGEST: usize = 8;
/// The longest `config.json` that is read.
const CONFIG_MAX_BYTES: u64 = 4 << 20;

/// `--json`
#[derive(Debug, Serialize)]
struct WeightsReport {
    schema: &'static str,
    path: String,
    container: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<u32>,
    size_bytes: Bytes,
    /// The part of a model that is split over several files.
    #[serde(skip_serializing_if = "Option::is_none")]
    part: Option<Part>,
    model: ModelFacts,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokenizer: Option<TokenizerFacts>,
    parameters: u64,
    formats: Vec<FormatFacts>,
    metadata: Map<String, Json>,
    tensors: Vec<TensorFacts>,
    /// What could not be read beside the file, for people.
    notes: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Part {
    number: u64,
    of: u64,
}

/// Each as the file states it: a number, or one number for each layer; null where it does not.
#[derive(Debug, Default, Serialize)]
struct ModelFacts {
    architecture: Option<String>,
    name: Option<String>,
    context_length: Json,
    layers: Json,
    embedding_length: Json,
    feed_forward_length: Json,
    heads: Json,
    kv_heads: Json,
    experts: Json,
    experts_used: Json,
    sliding_window: Json,
    vocabulary: Option<u64>,
}

#[derive(Debug, Serialize)]
struct TokenizerFacts {
    kind: String,
    pre_tokenizer: Option<String>,
    chat_template: bool,
    /// Why `lighter tokenize` cannot use it.
    problem: Option<String>,
}

#[derive(Debug, Serialize)]
struct FormatFacts {
    format: String,
    tensors: usize,
    parameters: u64,
    bytes: Bytes,
    bits_per_weight: f64,
}

#[derive(Debug, Serialize)]
struct TensorFacts {
    name: String,
    /// In the order of the file: rows' length first in GGUF, last in safetensors.
    shape: Vec<u64>,
    format: String,
    offset: u64,
    bytes: Bytes,
}

/// Prints what is inside a file of weights.
pub fn run(arguments: &InspectArguments, container: Container, output: Output) -> Outcome {
    let path = arguments.model.as_path();
    if arguments.graph || !arguments.dimensions.is_empty() {
        return Err(Failure::input(
            format!("{}: --graph and --dim are for ONNX models; this file has no graph", path.display()),
            format!("lighter inspect {}", path.display()),
        ));
    }
    let report = match container {
        Container::Safetensors => of_safetensors(path)?,
        _ => of_gguf(path)?,
    };
    output.result(&report, &text(&report))?;
    Ok(Exit::Done)
}

fn of_gguf(path: &Path) -> Outcome<WeightsReport> {
    let file = container::read_gguf(path)?;
    let tensors: Vec<TensorFacts> = file
        .tensors
        .iter()
        .map(|t| TensorFacts {
            name: t.name.clone(),
            shape: t.dims.clone(),
            format: t.format.to_string(),
            offset: t.offset,
            bytes: t.size,
        })
        .collect();
    let metadata = &file.metadata;
    let number = |key| metadata.get_u64(key).ok().flatten();
    let part = match (number("split.no"), number("split.count")) {
        (Some(at), Some(of)) if of > 1 => Some(Part { number: at.saturating_add(1), of }),
        _ => None,
    };
    let mut report = report(path, "gguf", tensors)?;
    report.version = Some(file.version);
    report.part = part;
    report.model = model_facts(metadata);
    report.tokenizer = tokenizer_facts(&file);
    report.metadata = metadata.iter().map(|(key, value)| (key.to_owned(), json_of(value))).collect();
    Ok(report)
}

fn model_facts(metadata: &Metadata) -> ModelFacts {
    let text = |key: &str| metadata.get_str(key).ok().flatten().map(str::to_owned);
    let architecture = text("general.architecture");
    let of = |key: &str| {
        let key = format!("{}.{key}", architecture.as_deref().unwrap_or_default());
        metadata.get(&key).map_or(Json::Null, json_of)
    };
    let vocabulary = match metadata.get("tokenizer.ggml.tokens") {
        Some(Value::Array(tokens)) => Some(tokens.len() as u64),
        _ => of("vocab_size").as_u64(),
    };
    ModelFacts {
        name: text("general.name"),
        context_length: of("context_length"),
        layers: of("block_count"),
        embedding_length: of("embedding_length"),
        feed_forward_length: of("feed_forward_length"),
        heads: of("attention.head_count"),
        kv_heads: of("attention.head_count_kv"),
        experts: of("expert_count"),
        experts_used: of("expert_used_count"),
        sliding_window: of("attention.sliding_window"),
        vocabulary,
        architecture,
    }
}

fn tokenizer_facts(file: &GgufFile) -> Option<TokenizerFacts> {
    let metadata = &file.metadata;
    let text = |key: &str| metadata.get_str(key).ok().flatten().map(str::to_owned);
    let kind = text("tokenizer.ggml.model")?;
    let usable = Tokenizer::from_gguf(metadata)
        .and_then(|tokenizer| ChatTemplate::from_gguf(metadata, &tokenizer).map(|_| ()));
    Some(TokenizerFacts {
        kind,
        pre_tokenizer: text("tokenizer.ggml.pre"),
        chat_template: metadata.get("tokenizer.chat_template").is_some(),
        problem: usable.err().map(|error| error.to_string()),
    })
}

fn of_safetensors(path: &Path) -> Outcome<WeightsReport> {
    let file = container::read_safetensors(path)?;
    let tensors = file
        .tensors
        .iter()
        .map(|t| TensorFacts {
            name: t.name.clone(),
            shape: t.shape.clone(),
            format: t.dtype.name().to_owned(),
            offset: t.offset,
            bytes: t.size,
        })
        .collect();
    let mut report = report(path, "safetensors", tensors)?;
    report.metadata = file.metadata.into_iter().map(|(key, value)| (key, Json::String(value))).collect();
    // The file itself knows only its tensors; Hugging Face puts the rest beside it.
    let config = path.with_file_name("config.json");
    match read_config(&config) {
        Ok(Some(config)) => report.model = facts_of_config(&config),
        Ok(None) => {
            report.notes.push("no config.json beside the file, which would tell about the model".to_owned())
        }
        Err(error) => report.notes.push(format!("{}: {error}", config.display())),
    }
    Ok(report)
}

fn read_config(path: &Path) -> Result<Option<Json>, String> {
    if !path.is_file() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(|e| e.to_string())?;
    file.take(CONFIG_MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    if bytes.len() as u64 > CONFIG_MAX_BYTES {
        return Err(format!("longer than {}, the limit", Bytes(CONFIG_MAX_BYTES)));
    }
    serde_json::from_slice(&bytes).map(Some).map_err(|e| format!("is no JSON: {e}"))
}

fn facts_of_config(config: &Json) -> ModelFacts {
    // Models that also see or hear keep the language part in a part of its own.
    let of = |keys: &[&str]| {
        let places = [Some(config), config.get("text_config")];
        let found = places.into_iter().flatten().find_map(|c| keys.iter().find_map(|key| c.get(key)));
        found.cloned().unwrap_or(Json::Null)
    };
    let text = |keys: &[&str]| of(keys).as_str().map(str::to_owned);
    ModelFacts {
        architecture: text(&["model_type"]),
        name: text(&["_name_or_path"]).filter(|name| !name.is_empty()),
        context_length: of(&["max_position_embeddings", "n_positions", "n_ctx"]),
        layers: of(&["num_hidden_layers", "n_layer", "n_layers"]),
        embedding_length: of(&["hidden_size", "n_embd"]),
        feed_forward_length: of(&["intermediate_size", "n_inner"]),
        heads: of(&["num_attention_heads", "n_head", "n_heads"]),
        kv_heads: of(&["num_key_value_heads"]),
        experts: of(&["num_local_experts", "num_experts", "n_routed_experts"]),
        experts_used: of(&["num_experts_per_tok"]),
        sliding_window: of(&["sliding_window"]),
        vocabulary: of(&["vocab_size"]).as_u64(),
    }
}

fn report(path: &Path, container: &'static str, tensors: Vec<TensorFacts>) -> Outcome<WeightsReport> {
    let size = std::fs::metadata(path)?.len();
    let mut formats: BTreeMap<&str, FormatFacts> = BTreeMap::new();
    let mut parameters = 0u64;
    for tensor in &tensors {
        let count = tensor.shape.iter().fold(1u64, |n, d| n.saturating_mul(*d));
        let entry = formats.entry(&tensor.format).or_insert_with(|| FormatFacts {
            format: tensor.format.clone(),
            tensors: 0,
            parameters: 0,
            bytes: Bytes::ZERO,
            bits_per_weight: 0.0,
        });
        entry.tensors += 1;
        entry.parameters = entry.parameters.saturating_add(count);
        entry.bytes += tensor.bytes;
        parameters = parameters.saturating_add(count);
    }
    let mut formats: Vec<FormatFacts> = formats.into_values().collect();
    for format in &mut formats {
        format.bits_per_weight = bits_per_weight(format.bytes, format.parameters);
    }
    formats.sort_by_key(|format| std::cmp::Reverse(format.bytes));
    Ok(WeightsReport {
        schema: "lightering.inspect-weights/1",
        path: path.display().to_string(),
        container,
        version: None,
        size_bytes: Bytes(size),
        part: None,
        model: ModelFacts::default(),
        tokenizer: None,
        parameters,
        formats,
        metadata: Map::new(),
        tensors,
        notes: Vec::new(),
    })
}

fn bits_per_weight(bytes: Bytes, parameters: u64) -> f64 {
    if parameters == 0 { 0.0 } else { bytes.0 as f64 * 8.0 / parameters as f64 }
}

/// A number that JSON can hold; what is not finite becomes a text.
fn float(shortest: String) -> Json {
    // The shortest decimal of an f32 is what a person wrote; its exact value in f64 is not.
    match shortest.parse::<f64>() {
        Ok(value) if value.is_finite() => json!(value),
        _ => Json::String(shortest),
    }
}

/// A value of the metadata, long arrays shortened.
fn json_of(value: &Value) -> Json {
    match value {
        Value::U8(v) => json!(v),
        Value::I8(v) => json!(v),
        Value::U16(v) => json!(v),
        Value::I16(v) => json!(v),
        Value::U32(v) => json!(v),
        Value::I32(v) => json!(v),
        Value::F32(v) => float(v.to_string()),
        Value::Bool(v) => json!(v),
        Value::String(v) => json!(v),
        Value::Array(array) => json_of_array(array),
        Value::U64(v) => json!(v),
        Value::I64(v) => json!(v),
        Value::F64(v) => float(v.to_string()),
    }
}

fn json_of_array(array: &Array) -> Json {
    let length = array.len();
    let shown = if length > ARRAY_MAX { ARRAY_FIRST } else { length };
    fn all<T>(values: &[T], shown: usize, to_json: impl Fn(&T) -> Json) -> Vec<Json> {
        values.iter().take(shown).map(to_json).collect()
    }
    let first = match array {
        Array::U8(v) => all(v, shown, |v| json!(v)),
        Array::I8(v) => all(v, shown, |v| json!(v)),
        Array::U16(v) => all(v, shown, |v| json!(v)),
        Array::I16(v) => all(v, shown, |v| json!(v)),
        Array::U32(v) => all(v, shown, |v| json!(v)),
        Array::I32(v) => all(v, shown, |v| json!(v)),
        Array::F32(v) => all(v, shown, |v| float(v.to_string())),
        Array::Bool(v) => all(v, shown, |v| json!(v)),
        Array::Strings(v) => all(v, shown, |v| json!(v)),
        Array::Arrays(v) => all(v, shown, json_of_array),
        Array::U64(v) => all(v, shown, |v| json!(v)),
        Array::I64(v) => all(v, shown, |v| json!(v)),
        Array::F64(v) => all(v, shown, |v| float(v.to_string())),
    };
    if length > ARRAY_MAX {
        json!({ "array_of": array.element_name(), "length": length, "first": first })
    } else {
        Json::Array(first)
    }
}

/// A fact on one line: a number as it is, an array as its length and its first elements.
fn line(fact: &Json) -> Option<String> {
    let joined = |values: &[Json]| values.iter().map(Json::to_string).collect::<Vec<_>>().join(", ");
    Some(match fact {
        Json::Null => return None,
        Json::String(text) => printable(text),
        Json::Array(values) => format!("{} by layer", joined(values)),
        Json::Object(object) => match (object.get("first"), object.get("length")) {
            (Some(Json::Array(first)), Some(length)) => {
                format!("{}, … ({length} values, one by layer)", joined(first))
            }
            _ => printable(&fact.to_string()),
        },
        other => other.to_string(),
    })
}

fn text(report: &WeightsReport) -> String {
    let mut facts = Table::new(&["model", &printable(&report.path)]);
    let mut fact = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            facts.row([name.to_owned(), value]);
        }
    };
    let version = report.version.map_or(String::new(), |version| format!(" version {version}"));
    fact("format", Some(format!("{}{version}", report.container)));
    fact("size", Some(report.size_bytes.to_string()));
    fact("part", report.part.as_ref().map(|part| format!("{} of {}", part.number, part.of)));
    let model = &report.model;
    fact("architecture", model.architecture.as_deref().map(printable));
    fact("name", model.name.as_deref().map(printable));
    fact("context length", line(&model.context_length));
    fact("layers", line(&model.layers));
    fact("embedding length", line(&model.embedding_length));
    fact("feed-forward length", line(&model.feed_forward_length));
    fact("heads", line(&model.heads));
    fact("key-value heads", line(&model.kv_heads));
    fact("experts", line(&model.experts));
    fact("experts used", line(&model.experts_used));
    fact("sliding window", line(&model.sliding_window));
    fact("vocabulary", model.vocabulary.map(|n| n.to_string()));
    if let Some(tokenizer) = &report.tokenizer {
        let pre = tokenizer.pre_tokenizer.as_deref().map_or(String::new(), |p| format!(", {}", printable(p)));
        fact("tokenizer", Some(format!("{}{pre}", printable(&tokenizer.kind))));
        fact("chat template", Some(if tokenizer.chat_template { "yes" } else { "no" }.to_owned()));
        fact("tokenizer unusable", tokenizer.problem.as_deref().map(printable));
    } else if report.container == "gguf" {
        fact("tokenizer", Some("none".to_owned()));
    }
    fact("parameters", Some(report.parameters.to_string()));
    fact("metadata keys", Some(report.metadata.len().to_string()));
    for note in &report.notes {
        fact("note", Some(printable(note)));
    }
    let mut text = facts.text();
    if report.tensors.is_empty() {
        text.push_str("\nno tensors: a vocabulary without a model\n");
        return text;
    }
    text.push('\n');
    let mut formats = Table::new(&["stored as", ">tensors", ">parameters", ">size", ">bits per weight"]);
    for f in &report.formats {
        let cells = [f.tensors.to_string(), f.parameters.to_string(), f.bytes.to_string()];
        let bits = format!("{:.2}", f.bits_per_weight);
        formats.row([f.format.clone()].into_iter().chain(cells).chain([bits]));
    }
    let bytes = report.formats.iter().fold(Bytes::ZERO, |sum, f| sum + f.bytes);
    formats.row([
        "together".to_owned(),
        report.tensors.len().to_string(),
        report.parameters.to_string(),
        bytes.to_string(),
        format!("{:.2}", bits_per_weight(bytes, report.parameters)),
    ]);
    text.push_str(&formats.text());
    text.push('\n');
    let mut largest: Vec<&TensorFacts> = report.tensors.iter().collect();
    largest.sort_by(|a, b| b.bytes.cmp(&a.bytes).then(a.name.cmp(&b.name)));
    let mut table = Table::new(&["largest tensors", "shape", "stored as", ">size"]);
    for tensor in largest.iter().take(LARGEST) {
        let shape = format!("{:?}", tensor.shape);
        table.row([printable(&tensor.name), shape, tensor.format.clone(), tensor.bytes.to_string()]);
    }
    text.push_str(&table.text());
    text
}
