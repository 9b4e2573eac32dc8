//! Any vocabulary: refused, or it encodes any text to its own tokens and decodes what it encoded.
#![no_main]

use lightering_lm::{Tokenizer, VocabularyData};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((head, rest)) = data.split_first_chunk::<8>() else { return };
    let text = String::from_utf8_lossy(rest);
    let mut parts = text.split('\u{1}');
    let mut lines = || -> Vec<String> { parts.next().unwrap_or("").split('\n').map(String::from).collect() };
    let (mut tokens, merges, sample) = (lines(), lines(), lines().join("\n"));
    // Most vocabularies get the bytes that they need, so that the fuzzer comes past the first checks.
    let alphabet =
        (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff).chain(0x100..0x144).filter_map(char::from_u32);
    let wanted =
        alphabet.map(|c| (1, c.to_string())).chain((0..=255).map(|byte| (2, format!("<0x{byte:02X}>"))));
    for (bit, token) in wanted {
        if head[0] & bit != 0 && !tokens.contains(&token) {
            tokens.push(token);
        }
    }
    let id = |byte: u8| (byte & 0x80 == 0).then_some(u32::from(byte));
    let vocabulary = VocabularyData {
        model: ["llama", "gpt2", "bert", "gemma4"][usize::from(head[1] % 4)].into(),
        pre: ["", "gpt-2", "llama-bpe", "qwen2", "deepseek-llm", "gpt-4o", "tiny_aya"]
            [usize::from(head[1] / 4 % 7)]
        .into(),
        scores: (0..tokens.len()).map(|i| -f32::from(head[i % 8])).collect(),
        token_types: (0..tokens.len()).map(|i| if i % 5 == 0 { i32::from(head[2] % 8) } else { 1 }).collect(),
        merges,
        tokens,
        bos: id(head[3]),
        eos: id(head[4]),
        unknown: id(head[5]),
        separator: id(head[6]),
        ..VocabularyData::default()
    };
    let Ok(tokenizer) = Tokenizer::new(vocabulary) else { return };
    for special in [false, true] {
        let Ok(ids) = tokenizer.encode(&sample, special, special) else { continue };
        assert!(ids.iter().all(|id| (*id as usize) < tokenizer.token_count()));
        tokenizer.decode(&ids).expect("its own tokens can be decoded");
    }
});
