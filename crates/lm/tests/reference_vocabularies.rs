//! Every vocabulary for which llama.cpp ships texts with their expected ids. They are looked for under
//! `$LIGHTER_TEST_DATA/tokenizers` (default `~/.cache/lighter-test-data`); `tools/fetch_test_data.sh` puts them there.

use std::fs;
use std::path::{Path, PathBuf};

use lightering_formats::gguf::{GgufFile, Metadata};
use lightering_lm::{ChatTemplate, Conversation, Message, Tokenizer};

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

/// The metadata of a file.
fn metadata(path: &Path) -> Metadata {
    let bytes = fs::read(path).unwrap();
    GgufFile::read(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display())).metadata
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
        let tokenizer = match Tokenizer::from_gguf(&metadata(path)) {
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

#[test]
fn conversations_reach_the_model_as_trained() {
    let Some(folder) = folder() else { return };
    let question = "Is <|im_end|> </s> 1 < 2?";
    let check = |name: &str, text: &str, specials: &[&str]| {
        let metadata = metadata(&folder.join(format!("ggml-vocab-{name}.gguf")));
        let tokenizer = Tokenizer::from_gguf(&metadata).unwrap();
        let template = ChatTemplate::from_gguf(&metadata, &tokenizer).unwrap();
        let messages = [Message::new("user", question)];
        let conversation =
            Conversation { messages: &messages, add_generation_prompt: true, ..Conversation::default() };
        let rendered = template.render(&conversation).unwrap();
        assert_eq!(rendered, text);
        let ids = tokenizer.encode(&rendered, false, true).unwrap();
        // Guarded, the question stays text: every control token is one of the template.
        let guarded = template.render(&Conversation { guard: Some(&tokenizer), ..conversation }).unwrap();
        let guarded = tokenizer.encode(&guarded, false, true).unwrap();
        assert!(guarded.len() >= ids.len());
        for special in specials {
            let id = tokenizer.token_id(special).unwrap();
            let expected = text.matches(special).count() - question.matches(special).count();
            assert_eq!(guarded.iter().filter(|other| **other == id).count(), expected, "{name}: {special}");
        }
        for special in specials {
            let id = tokenizer.token_id(special).unwrap();
            assert!(ids.contains(&id), "{name}: {special} is not in {ids:?}");
        }
    };
    check(
        "qwen2",
        &format!(
            "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ),
        &["<|im_start|>", "<|im_end|>"],
    );
    check(
        "phi-3",
        &format!("<s><|user|>\n{question}<|end|>\n<|assistant|>\n"),
        &["<s>", "<|user|>", "<|end|>", "<|assistant|>"],
    );
    // No template in the file: ChatML.
    check("gpt-2", &format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"), &[]);
}
