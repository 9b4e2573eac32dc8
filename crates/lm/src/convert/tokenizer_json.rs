//! `tokenizer.json` as the keys `tokenizer.ggml.*` of a GGUF file.

use std::collections::HashMap;
use std::fmt;
use std::io::{BufReader, Read};

use lightering_formats::gguf::{Array, Value};
use lightering_tier::ByteSource;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value as Json};

use super::files::{CheckpointFiles, read_all, read_object};
use crate::tokenizer::{SPACE_MARK, pre_tokenizer};
use crate::{Error, MAX_TEMPLATE_BYTES, MAX_TOKENS, Result};

/// Largest `tokenizer.json` that is read.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
/// Most merges that are read.
const MERGES_MAX: usize = 1 << 23;

#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Json,
    #[serde(default)]
    pre_tokenizer: Json,
    #[serde(default)]
    post_processor: Json,
    model: Model,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type", default)]
    kind: Option<String>,
    #[serde(default)]
    vocab: Vocab,
    #[serde(default)]
    merges: Merges,
    #[serde(default)]
    unk_token: Option<String>,
    #[serde(default)]
    byte_fallback: Option<bool>,
    #[serde(default)]
    ignore_merges: Option<bool>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
}

/// Tokens and their ids; empty for vocabularies that are lists, which belong to models that cannot be converted.
#[derive(Default)]
struct Vocab(Vec<(String, u32)>);

impl<'de> Deserialize<'de> for Vocab {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Vocab, D::Error> {
        struct Tokens;
        impl<'de> Visitor<'de> for Tokens {
            type Value = Vocab;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tokens and their ids")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Vocab, A::Error> {
                let mut tokens = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    if tokens.len() >= MAX_TOKENS {
                        return Err(A::Error::custom(format!("more than {MAX_TOKENS} tokens")));
                    }
                    tokens.push(entry);
                }
                Ok(Vocab(tokens))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Vocab, A::Error> {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Vocab::default())
            }
        }
        deserializer.deserialize_any(Tokens)
    }
}

/// Merges as GGUF writes them, the parts separated by a space.
#[derive(Default)]
struct Merges(Vec<String>);

struct Merge(String);

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Merge, D::Error> {
        struct Pair;
        impl<'de> Visitor<'de> for Pair {
            type Value = Merge;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a pair of tokens")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> std::result::Result<Merge, E> {
                Ok(Merge(text.to_owned()))
            }
            fn visit_string<E: serde::de::Error>(self, text: String) -> std::result::Result<Merge, E> {
                Ok(Merge(text))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Merge, A::Error> {
                let first: Option<String> = list.next_element()?;
                let second: Option<String> = list.next_element()?;
                let (Some(mut first), Some(second), None) =
                    (first, second, list.next_element::<IgnoredAny>()?)
                else {
                    return Err(A::Error::custom("a merge that is no pair"));
                };
                if first.contains(' ') || second.contains(' ') {
                    return Err(A::Error::custom("a merge of tokens with spaces"));
                }
                first.reserve_exact(1 + second.len());
                first.push(' ');
                first.push_str(&second);
                Ok(Merge(first))
            }
        }
        deserializer.deserialize_any(Pair)
    }
}

impl<'de> Deserialize<'de> for Merges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Merges, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Merges;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of merges")
            }
            fn visit_unit<E: serde::de::Error>(self) -> std::result::Result<Merges, E> {
                Ok(Merges::default())
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Merges, A::Error> {
                let mut merges = Vec::new();
                while let Some(Merge(merge)) = list.next_element()? {
                    if merges.len() >= MERGES_MAX {
                        return Err(A::Error::custom(format!("more than {MERGES_MAX} merges")));
                    }
                    merges.push(merge);
                }
                Ok(Merges(merges))
            }
        }
        deserializer.deserialize_any(Pairs)
    }
}

/// A source as a stream, so that the text of a large file is never held as a whole.
struct Stream<'a> {
    source: &'a dyn ByteSource,
    at: u64,
}

impl Read for Stream<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let left = self.source.len_bytes().0.saturating_sub(self.at);
        let n = (out.len() as u64).min(left) as usize;
        self.source.read_at(self.at, &mut out[..n])?;
        self.at += n as u64;
        Ok(n)
    }
}

/// The elements of a sequence of rules, or the one rule.
fn flattened<'a>(rule: &'a Json, list: &str) -> Vec<&'a Json> {
    if rule.is_null() {
        return Vec::new();
    }
    match (rule["type"].as_str(), rule[list].as_array()) {
        (Some("Sequence"), Some(rules)) => rules.iter().flat_map(|r| flattened(r, list)).collect(),
        _ => vec![rule],
    }
}

struct Reader<'a> {
    place: String,
    file: &'a TokenizerFile,
    notes: Vec<String>,
}

impl Reader<'_> {
    fn unsupported(&self, what: impl fmt::Display) -> Error {
        Error::unsupported(&self.place, what)
    }

    fn short(value: &Json) -> String {
        value.to_string().chars().take(80).collect()
    }

    /// The rule by which a byte-level vocabulary cuts words.
    fn word_rule(&mut self) -> Result<&'static str> {
        let mut steps = Vec::new();
        for rule in flattened(&self.file.pre_tokenizer, "pretokenizers") {
            match rule["type"].as_str() {
                Some("ByteLevel") => {
                    if rule["add_prefix_space"].as_bool() == Some(true) {
                        return Err(self.unsupported("a byte-level pre-tokenizer that adds a space"));
                    }
                    if rule["use_regex"].as_bool() != Some(false) {
                        steps.push(pre_tokenizer::BYTE_LEVEL.to_owned());
                    }
                }
                Some("Digits") => {
                    let each = rule["individual_digits"].as_bool() == Some(true);
                    steps.push(if each { r"\p{N}" } else { r"\p{N}+" }.to_owned());
                }
                Some("Split") => {
                    let Some(expression) = rule["pattern"]["Regex"].as_str() else {
                        return Err(self.unsupported(format!("the pre-tokenizer {}", Self::short(rule))));
                    };
                    let invert = rule["invert"].as_bool() == Some(true);
                    match (rule["behavior"].as_str(), invert) {
                        (Some("Isolated"), false) | (Some("Removed"), true) => {
                            steps.push(expression.to_owned())
                        }
                        _ => return Err(self.unsupported(format!("the pre-tokenizer {}", Self::short(rule)))),
                    }
                }
                _ => return Err(self.unsupported(format!("the pre-tokenizer {}", Self::short(rule)))),
            }
        }
        for rule in flattened(&self.file.normalizer, "normalizers") {
            if rule["type"].as_str() != Some("NFC") {
                return Err(self.unsupported(format!("the normalizer {}", Self::short(rule))));
            }
            self.notes.push(
                "the tokenizer composes characters (NFC), which GGUF cannot say; text is taken as it is"
                    .to_owned(),
            );
        }
        let whole_words = self.file.model.ignore_merges == Some(true);
        pre_tokenizer::name_of(&steps, whole_words)
            .or_else(|| pre_tokenizer::name_of(&steps, !whole_words))
            .ok_or_else(|| self.unsupported(format!("a pre-tokenizer that cuts words by {steps:?}")))
    }

    /// Whether a vocabulary of characters puts a space in front of a text.
    fn adds_space(&self) -> Result<bool> {
        let mark = SPACE_MARK.to_string();
        let mut adds = false;
        let mut marks = false;
        for rule in flattened(&self.file.normalizer, "normalizers") {
            match rule["type"].as_str() {
                Some("Prepend") if rule["prepend"] == mark.as_str() => adds = true,
                Some("Replace") if rule["pattern"]["String"] == " " && rule["content"] == mark.as_str() => {
                    marks = true;
                }
                _ => return Err(self.unsupported(format!("the normalizer {}", Self::short(rule)))),
            }
        }
        for rule in flattened(&self.file.pre_tokenizer, "pretokenizers") {
            match rule["type"].as_str() {
                Some("Metaspace") if rule["replacement"] == mark.as_str() => {
                    marks = true;
                    let never = rule["prepend_scheme"] == "never"
                        || rule["prepend_scheme"].is_null() && rule["add_prefix_space"] == false;
                    adds |= !never;
                }
                // The normalizer left no spaces.
                Some("Split") if marks && rule["pattern"]["String"] == " " => {}
                _ => return Err(self.unsupported(format!("the pre-tokenizer {}", Self::short(rule)))),
            }
        }
        if !marks {
            return Err(self.unsupported("a vocabulary of characters whose spaces have no mark"));
        }
        Ok(adds)
    }
}

/// The tokens that the post-processor puts in front of and behind a text.
fn around(post_processor: &Json) -> (Option<&str>, Option<&str>) {
    let mut around = (None, None);
    for rule in flattened(post_processor, "processors") {
        let Some(single) = rule["single"].as_array() else { continue };
        around.0 = single.first().and_then(|part| part["SpecialToken"]["id"].as_str()).or(around.0);
        if single.len() > 1 {
            around.1 = single.last().and_then(|part| part["SpecialToken"]["id"].as_str()).or(around.1);
        }
    }
    around
}

/// Scores by which SentencePiece's rule merges in the order of the merges: the earlier a token comes out of one, the
/// higher its score.
fn scores(tokens: &[String], merges: &[String], notes: &mut Vec<String>) -> Vec<f32> {
    let ids: HashMap<&str, u32> = tokens.iter().enumerate().map(|(id, t)| (t.as_str(), id as u32)).collect();
    // Whatever no merge makes comes after everything else.
    let mut scores: Vec<f32> = (0..tokens.len()).map(|id| -((merges.len() + id) as f32)).collect();
    let mut ranked = vec![false; tokens.len()];
    let (mut last, mut disorder) = (None, 0u64);
    for (rank, merge) in merges.iter().enumerate() {
        let Some(id) = ids.get(merge.replacen(' ', "", 1).as_str()).copied() else { continue };
        if !std::mem::replace(&mut ranked[id as usize], true) {
            scores[id as usize] = -(rank as f32);
        } else if last != Some(id) {
            disorder += 1;
        }
        last = Some(id);
    }
    if disorder > 0 {
        notes.push(format!(
            "{disorder} merges are not in the order of their tokens, which GGUF cannot say; some words may be cut differently"
        ));
    }
    scores
}

/// The text of a special token, which is written as a text or as an object.
fn special<'a>(config: Option<&'a Map<String, Json>>, key: &str) -> Option<&'a str> {
    let value = config?.get(key)?;
    value.as_str().or_else(|| value["content"].as_str())
}

/// The ids of a key that holds a number or a list of them.
fn ids_of(config: Option<&Map<String, Json>>, key: &str) -> Vec<u32> {
    let id = |value: &Json| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.and_then(|c| c.get(key)) {
        Some(Json::Array(list)) => list.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// A byte token as vocabularies with a fallback to bytes spell it.
fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|d| d.len() == 2 && d.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// The tokens by id, and the kind of each as GGUF numbers them, for embeddings of `rows` rows.
fn tokens(
    place: &str,
    file: &mut TokenizerFile,
    rows: u64,
    notes: &mut Vec<String>,
) -> Result<(Vec<String>, Vec<i32>)> {
    let rows = usize::try_from(rows).unwrap_or(usize::MAX);
    if rows > MAX_TOKENS {
        return Err(Error::limit(place, "rows of the embeddings", rows as u64, MAX_TOKENS as u64));
    }
    let (normal, unknown, control, user, unused, byte) = (1, 2, 3, 4, 5, 6);
    let mut tokens = vec![String::new(); rows];
    let mut kinds = vec![0; rows];
    let mut beyond = 0u64;
    let mut put = |text: String, id: u32, kind: i32| -> Result<()> {
        let at = id as usize;
        if at >= rows {
            beyond += 1;
            return Ok(());
        }
        if kinds[at] != 0 && tokens[at] != text {
            let what = format!("tokens {:?} and {text:?} both have the id {id}", tokens[at]);
            return Err(Error::invalid(place, what, "every id once"));
        }
        tokens[at] = text;
        kinds[at] = kind;
        Ok(())
    };
    let bytes = file.model.byte_fallback == Some(true);
    for (text, id) in std::mem::take(&mut file.model.vocab.0) {
        let kind = match () {
            () if file.model.unk_token.as_deref() == Some(text.as_str()) => unknown,
            () if bytes && is_byte(&text) => byte,
            () => normal,
        };
        put(text, id, kind)?;
    }
    for token in &file.added_tokens {
        let kind = match () {
            () if file.model.unk_token.as_deref() == Some(token.content.as_str()) => unknown,
            () if token.special => control,
            () => user,
        };
        put(token.content.clone(), token.id, kind)?;
    }
    if beyond > 0 {
        notes.push(format!("{beyond} tokens of the vocabulary have no embedding and are left out"));
    }
    for (id, (token, kind)) in tokens.iter_mut().zip(&mut kinds).enumerate() {
        if *kind == 0 {
            *token = format!("[PAD{id}]");
            *kind = unused;
        }
    }
    Ok((tokens, kinds))
}

/// The keys of the tokenizer, for embeddings of `rows` rows.
pub(super) fn keys(
    files: &CheckpointFiles,
    config: &Map<String, Json>,
    rows: u64,
    notes: &mut Vec<String>,
) -> Result<Vec<(String, Value)>> {
    let Some(source) = files.tokenizer.as_deref() else {
        notes.push("there is no tokenizer.json, so that the file has no tokenizer".to_owned());
        return Ok(Vec::new());
    };
    let place = source.name();
    let size = source.len_bytes().0;
    if size > TOKENIZER_BYTES_MAX {
        return Err(Error::limit(place, "its size in bytes", size, TOKENIZER_BYTES_MAX));
    }
    let mut file: TokenizerFile =
        serde_json::from_reader(BufReader::with_capacity(64 << 10, Stream { source, at: 0 }))
            .map_err(|e| Error::invalid(&place, format!("is no tokenizer ({e})"), "a tokenizer.json"))?;
    match file.model.kind.as_deref() {
        None | Some("BPE") => {}
        Some(other) => {
            let what = format!("a tokenizer of the kind {other:?} (BPE is, also with a fallback to bytes)");
            return Err(Error::unsupported(place, what));
        }
    }
    let odd = |text: &Option<String>| text.as_ref().is_some_and(|t| !t.is_empty());
    if odd(&file.model.continuing_subword_prefix) || odd(&file.model.end_of_word_suffix) {
        return Err(Error::unsupported(place, "a vocabulary with marks inside or at the end of words"));
    }
    if file.model.vocab.0.is_empty() {
        return Err(Error::invalid(place, "no tokens", "an object model.vocab"));
    }
    let (tokens, kinds) = tokens(&place, &mut file, rows, notes)?;
    let merges = std::mem::take(&mut file.model.merges.0);
    let mut reader = Reader { place, file: &file, notes: Vec::new() };
    let byte_level =
        flattened(&file.pre_tokenizer, "pretokenizers").iter().any(|rule| rule["type"] == "ByteLevel");
    let tokenizer_config = files.tokenizer_config.as_deref().map(read_object).transpose()?;
    let tokenizer_config = tokenizer_config.as_ref();
    let generation = files.generation_config.as_deref().map(read_object).transpose()?;
    let generation = generation.as_ref();

    let mut keys: Vec<(String, Value)> = Vec::new();
    let mut set = |name: &str, value: Value| keys.push((format!("tokenizer.ggml.{name}"), value));
    if byte_level {
        set("model", Value::from("gpt2"));
        set("pre", Value::from(reader.word_rule()?));
    } else {
        set("model", Value::from("llama"));
        set("pre", Value::from("default"));
        set("add_space_prefix", Value::Bool(reader.adds_space()?));
        let scores = scores(&tokens, &merges, &mut reader.notes);
        set("scores", Value::Array(Array::F32(scores)));
    }
    // The few ids that are asked for need no map.
    let id_of = |text: &str| tokens.iter().position(|t| t == text).map(|id| id as u32);
    let known = |id: &u32| (*id as usize) < tokens.len();
    let (first, last) = around(&file.post_processor);
    let template = !file.post_processor.is_null() && (first.is_some() || last.is_some());
    let bos = first.or(special(tokenizer_config, "bos_token")).and_then(id_of);
    let bos = bos.or(ids_of(Some(config), "bos_token_id").first().copied().filter(known));
    let eos = special(tokenizer_config, "eos_token").and_then(id_of);
    let mut ends = ids_of(generation, "eos_token_id");
    ends.extend(ids_of(Some(config), "eos_token_id"));
    ends.retain(known);
    let eos = eos.or(ends.first().copied());
    for (name, id) in [
        ("bos_token_id", bos),
        ("eos_token_id", eos),
        ("eot_token_id", ends.iter().copied().find(|id| Some(*id) != eos)),
        ("unknown_token_id", file.model.unk_token.as_deref().and_then(id_of)),
        ("padding_token_id", special(tokenizer_config, "pad_token").and_then(id_of)),
    ] {
        if let Some(id) = id {
            set(name, Value::U32(id));
        }
    }
    let flag = |key: &str| tokenizer_config.and_then(|c| c.get(key)).and_then(Json::as_bool).unwrap_or(false);
    let add_bos = if template { first.is_some() } else { flag("add_bos_token") };
    let add_eos =
        if template { last.is_some() && last.and_then(id_of) == eos } else { flag("add_eos_token") };
    set("add_bos_token", Value::Bool(add_bos && bos.is_some()));
    set("add_eos_token", Value::Bool(add_eos));
    set("token_type", Value::Array(Array::I32(kinds)));
    if byte_level {
        set("merges", Value::Array(Array::Strings(merges)));
    }
    notes.append(&mut reader.notes);
    set("tokens", Value::Array(Array::Strings(tokens)));
    templates(files, tokenizer_config, &mut keys)?;
    Ok(keys)
}

/// The chat templates: one, or several by name.
fn templates(
    files: &CheckpointFiles,
    config: Option<&Map<String, Json>>,
    keys: &mut Vec<(String, Value)>,
) -> Result<()> {
    let mut put = |name: &str, text: &str| {
        if text.len() > MAX_TEMPLATE_BYTES {
            let (found, limit) = (text.len() as u64, MAX_TEMPLATE_BYTES as u64);
            return Err(Error::limit("chat_template", "its size in bytes", found, limit));
        }
        let key = match name {
            "default" => "tokenizer.chat_template".to_owned(),
            name => format!("tokenizer.chat_template.{name}"),
        };
        if !keys.iter().any(|(k, _)| *k == key) {
            keys.push((key, Value::from(text)));
        }
        Ok(())
    };
    if let Some(source) = files.chat_template.as_deref() {
        let bytes = read_all(source, MAX_TEMPLATE_BYTES as u64)?;
        let text = String::from_utf8(bytes)
            .map_err(|_| Error::invalid(source.name(), "is no UTF-8", "a template as text"))?;
        put("default", &text)?;
    }
    match config.and_then(|c| c.get("chat_template")) {
        Some(Json::String(text)) => put("default", text)?,
        Some(Json::Array(list)) => {
            for entry in list {
                if let (Some(name), Some(text)) = (entry["name"].as_str(), entry["template"].as_str()) {
                    put(name, text)?;
                }
            }
        }
        _ => {}
    }
    Ok(())
}
