//! Any text as a grammar, a regular expression or a schema: refused, or followed along any tokens.
#![no_main]

use std::sync::{Arc, OnceLock};

use lightering_lm::{Constraint, Grammar, Json, TokenTable, Tokenizer, VocabularyData};

fn table() -> &'static Arc<TokenTable> {
    static TABLE: OnceLock<Arc<TokenTable>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let codes = (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff).chain(0x100..0x144);
        let mut tokens: Vec<String> = codes.filter_map(char::from_u32).map(String::from).collect();
        tokens.push("{\"".into());
        let (model, pre, merges) = ("gpt2".into(), "gpt-2".into(), vec!["{ \"".into()]);
        let data = VocabularyData { model, pre, tokens, merges, ..VocabularyData::default() };
        Arc::new(TokenTable::new(&Tokenizer::new(data).expect("the vocabulary is good")))
    })
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((kind, rest)) = data.split_first() else { return };
    let (choices, text) = rest.split_at(rest.len().min(8));
    let text = String::from_utf8_lossy(text);
    let grammar = match kind % 3 {
        0 => Grammar::from_gbnf(&text),
        1 => Grammar::from_regex(&text),
        _ => Json::from_text(&text).and_then(|schema| Grammar::from_json_schema(&schema)),
    };
    let Ok(mut constraint) = grammar.and_then(|grammar| Constraint::new(&grammar, table())) else { return };
    for choice in choices {
        let Ok(()) = constraint.accept(u32::from(*choice)) else { break };
        let mut logits = [0.0; 257];
        let _ = constraint.mask(&mut logits);
    }
});
