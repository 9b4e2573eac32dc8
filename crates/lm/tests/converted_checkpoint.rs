//! A real checkpoint, converted: the same tensors as in the file that its authors made.
//!
//! The model is `moe-tiny` in the folder that `LIGHTER_TEST_DATA` names (else `~/.cache/lighter-test-data`).

use std::path::PathBuf;

use lightering_formats::gguf::GgufFile;
use lightering_lm::{CheckpointFiles, Conversion, ConversionOptions, Tokenizer};

fn folder() -> Option<PathBuf> {
    let data = std::env::var_os("LIGHTER_TEST_DATA").map(PathBuf::from).or_else(|| {
        std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/lighter-test-data"))
    })?;
    let folder = data.join("moe-tiny");
    if folder.join("model.safetensors").is_file() {
        return Some(folder);
    }
    eprintln!("skipped: there is no {}", folder.display());
    None
}

fn convert(folder: &std::path::Path, recipe: &str) -> Vec<u8> {
    let mut conversion = Conversion::of_checkpoint(&CheckpointFiles::find(folder).unwrap()).unwrap();
    conversion.set_recipe(recipe.parse().unwrap());
    conversion.write(Vec::new(), ConversionOptions::default(), &mut |_| ()).unwrap().0
}

#[test]
fn the_tensors_are_those_of_the_authors_file() {
    let Some(folder) = folder() else { return };
    let ours = convert(&folder, "F16");
    let theirs = std::fs::read(folder.join("moe-tiny-f16.gguf")).unwrap();
    let (our_file, their_file) = (GgufFile::read(&ours).unwrap(), GgufFile::read(&theirs).unwrap());
    assert_eq!(our_file.tensors.len(), their_file.tensors.len());
    for theirs_t in &their_file.tensors {
        let t = our_file.tensor(&theirs_t.name).unwrap_or_else(|| panic!("{} is missing", theirs_t.name));
        assert_eq!((&t.dims, t.format), (&theirs_t.dims, theirs_t.format), "{}", t.name);
        let bytes = |all: &[u8], offset: u64| all[offset as usize..][..t.size.0 as usize].to_vec();
        assert!(bytes(&ours, t.offset) == bytes(&theirs, theirs_t.offset), "{}", t.name);
    }
    let said =
        ["tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type", "tokenizer.ggml.pre"];
    let described = their_file.metadata.iter().map(|(key, _)| key).filter(|key| key.starts_with("llama."));
    for key in described.chain(said) {
        assert_eq!(our_file.metadata.get(key), their_file.metadata.get(key), "{key}");
    }
    let text = std::fs::read_to_string(folder.join("val-gsm.txt")).unwrap();
    let ids =
        |file: &GgufFile| Tokenizer::from_gguf(&file.metadata).unwrap().encode(&text, true, false).unwrap();
    assert_eq!(ids(&our_file), ids(&their_file));
}

#[test]
fn the_model_of_the_tests_is_what_the_checkpoint_gives() {
    let Some(folder) = folder() else { return };
    let kept = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/moe-tiny-q4_0.gguf");
    assert!(convert(&folder, "Q4_0") == std::fs::read(kept).unwrap());
}
