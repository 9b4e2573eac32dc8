//! Every vocabulary for which llama.cpp ships texts with their expected ids. They are looked for under
//! `$LIGHTER_TEST_DATA/tokenizers` (default `~/.cache/lighter-test-data`); `tools/fetch_test_data.sh` puts them there.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use lightering_lm::{Tokenizer, VocabularyData};

fn folder() -> Option<PathBuf> {
    let root = std::env::var_os("LIGHTER_TEST_DATA")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/lighter-test-data")))?;
    let folder = root.join("tokenizers");
    if folder.is_dir() {
        return Some(folder);
    }
    eprintln!("skipped: {} is not there (tools/fetch_test_data.sh, LIGHTER_TEST_DATA)", folder.display());
    None
}

#[derive(Debug)]
enum Value {
    Number(f64),
    Text(String),
    Many(Vec<Value>),
}

/// The metadata of a good GGUF file.
struct Gguf<'b>(&'b [u8]);

impl Gguf<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.0.split_at(N);
        self.0 = rest;
        head.try_into().unwrap()
    }

    fn long(&mut self) -> usize {
        u64::from_le_bytes(self.take()) as usize
    }

    fn text(&mut self) -> String {
        let length = self.long();
        let (head, rest) = self.0.split_at(length);
        self.0 = rest;
        String::from_utf8_lossy(head).into_owned()
    }

    fn value(&mut self, kind: u32) -> Value {
        Value::Number(match kind {
            0 | 7 => f64::from(self.take::<1>()[0]),
            1 => f64::from(i8::from_le_bytes(self.take())),
            2 => f64::from(u16::from_le_bytes(self.take())),
            3 => f64::from(i16::from_le_bytes(self.take())),
            4 => f64::from(u32::from_le_bytes(self.take())),
            5 => f64::from(i32::from_le_bytes(self.take())),
            6 => f64::from(f32::from_le_bytes(self.take())),
            8 => return Value::Text(self.text()),
            9 => {
                let kind = u32::from_le_bytes(self.take());
                let count = self.long();
                return Value::Many((0..count).map(|_| self.value(kind)).collect());
            }
            _ => self.long() as f64,
        })
    }

    fn metadata(bytes: &[u8]) -> HashMap<String, Value> {
        let mut file = Gguf(bytes);
        assert_eq!(&file.take::<4>(), b"GGUF");
        file.take::<12>();
        let count = file.long();
        (0..count)
            .map(|_| {
                let key = file.text();
                let kind = u32::from_le_bytes(file.take());
                (key, file.value(kind))
            })
            .collect()
    }
}

fn vocabulary(path: &Path) -> VocabularyData {
    let metadata = Gguf::metadata(&fs::read(path).unwrap());
    let get = |key: &str| metadata.get(&format!("tokenizer.ggml.{key}"));
    let text = |value: Option<&Value>| match value {
        Some(Value::Text(text)) => text.clone(),
        _ => String::new(),
    };
    let texts = |key: &str| match get(key) {
        Some(Value::Many(all)) => all.iter().map(|v| text(Some(v))).collect(),
        _ => Vec::new(),
    };
    let numbers = |key: &str| match get(key) {
        Some(Value::Many(all)) => {
            all.iter().map(|v| if let Value::Number(n) = v { *n } else { panic!("{key}") }).collect()
        }
        _ => Vec::new(),
    };
    let number = |key: &str| match get(key) {
        Some(Value::Number(n)) => Some(*n as u32),
        _ => None,
    };
    VocabularyData {
        model: text(get("model")),
        pre: text(get("pre")),
        name: text(metadata.get("general.name")),
        tokens: texts("tokens"),
        scores: numbers("scores").into_iter().map(|n| n as f32).collect(),
        token_types: numbers("token_type").into_iter().map(|n| n as i32).collect(),
        merges: texts("merges"),
        bos: number("bos_token_id").or(number("cls_token_id")),
        eos: number("eos_token_id"),
        eot: number("eot_token_id"),
        eom: number("eom_token_id"),
        unknown: number("unknown_token_id"),
        separator: number("seperator_token_id"),
        padding: number("padding_token_id"),
        add_bos: number("add_bos_token").map(|n| n != 0),
        add_eos: number("add_eos_token").map(|n| n != 0),
        add_space_prefix: number("add_space_prefix").map(|n| n != 0),
        lowercase: None,
        strip_accents: None,
    }
}

#[test]
fn ids_are_those_of_the_reference() {
    let Some(folder) = folder() else { return };
    let mut paths: Vec<_> = fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|e| e == "gguf"));
    paths.sort();
    let (mut exact, mut wrong) = (0, Vec::new());
    for path in &paths {
        let name = path.file_stem().unwrap().to_str().unwrap().trim_start_matches("ggml-vocab-");
        let tokenizer = match Tokenizer::new(vocabulary(path)) {
            Ok(tokenizer) => tokenizer,
            Err(error) if name == "nomic-bert-moe" => {
                assert!(error.to_string().contains("\"t5\" is not supported"), "{error}");
                continue;
            }
            Err(error) => {
                wrong.push(format!("{name}: {error}"));
                continue;
            }
        };
        let Ok(texts) = fs::read_to_string(path.with_extension("gguf.inp")) else { continue };
        let expected = fs::read_to_string(path.with_extension("gguf.out")).unwrap();
        let texts: Vec<_> = texts.split("\n__ggml_vocab_test__\n").collect();
        // The file ends with a line break of its own.
        let expected: Vec<Vec<u32>> = expected
            .lines()
            .map(|line| line.split_whitespace().map(|n| n.parse().unwrap()).collect())
            .collect();
        assert!(texts.len() >= expected.len() && expected.len() > 20, "{name}");
        let before = wrong.len();
        for (text, expected) in texts.iter().zip(&expected) {
            let ids = tokenizer.encode(text, false, false).unwrap();
            if &ids != expected {
                wrong.push(format!("{name}: {text:?}\n  is       {ids:?}\n  expected {expected:?}"));
            }
            if tokenizer.token_kind(0).is_some() && name != "bert-bge" {
                let again = tokenizer.decode(&ids).unwrap();
                if &again != text {
                    wrong.push(format!("{name}: {text:?} decodes to {again:?}"));
                }
            }
        }
        exact += usize::from(wrong.len() == before);
    }
    assert!(wrong.is_empty(), "{} differences, {exact} exact:\n{}", wrong.len(), wrong.join("\n"));
    assert!(exact >= 15, "only {exact} vocabularies with expected ids");
}
