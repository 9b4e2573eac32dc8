//! Small vocabularies that are always here: each algorithm's rules, streams of tokens, and damaged vocabularies.

use std::path::Path;

use lightering_formats::gguf::{Array, GgufFile, GgufWriter, Metadata, Value};
use lightering_lm::{
    ChatTemplate, Conversation, Error, Message, StreamDecoder, TokenKind, Tokenizer, VocabularyData,
};
use proptest::prelude::*;

/// The byte alphabet of GPT-2, in the order in which its vocabularies list it.
fn byte_alphabet() -> Vec<String> {
    let codes = (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff).chain(0x100..0x144);
    codes.map(|code| char::from_u32(code).unwrap().to_string()).collect()
}

fn byte_pairs() -> VocabularyData {
    let merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "l d", "Ġw or", "Ġwor ld"];
    let mut tokens = byte_alphabet();
    tokens.extend(merges.map(|merge| merge.replace(' ', "")));
    tokens.extend(["<|begin|>", "<|im_end|>", "<tool>"].map(String::from));
    let mut token_types = vec![1; tokens.len()];
    let count = tokens.len();
    token_types[count - 3..].copy_from_slice(&[3, 1, 4]);
    VocabularyData {
        model: "gpt2".into(),
        pre: "llama-bpe".into(),
        tokens,
        token_types,
        merges: merges.map(String::from).into(),
        bos: Some(count as u32 - 3),
        eos: Some(count as u32 - 2),
        ..VocabularyData::default()
    }
}

fn sentence_pieces() -> VocabularyData {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).into();
    let mut token_types = vec![2, 3, 3];
    for byte in 0..256 {
        tokens.push(format!("<0x{byte:02X}>"));
        token_types.push(6);
    }
    let mut scores = vec![0.0; tokens.len()];
    for (text, score) in [
        ("▁", -8.0),
        ("a", -9.0),
        ("b", -10.0),
        ("c", -11.0),
        ("ab", -2.0),
        ("bc", -1.0),
        ("abc", -3.0),
        ("▁a", -4.0),
    ] {
        tokens.push(text.into());
        token_types.push(1);
        scores.push(score);
    }
    VocabularyData { model: "llama".into(), tokens, token_types, scores, ..VocabularyData::default() }
}

fn word_pieces() -> VocabularyData {
    let tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁un", "aff", "able", "▁a", "▁!", "▁é", "▁中", "▁ae"];
    VocabularyData {
        model: "bert".into(),
        tokens: tokens.map(String::from).into(),
        token_types: vec![3, 2, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1],
        bos: Some(2),
        separator: Some(3),
        unknown: Some(1),
        ..VocabularyData::default()
    }
}

#[test]
fn byte_pairs_merge_in_order() {
    let tokenizer = Tokenizer::new(byte_pairs()).unwrap();
    let id = |text: &str| tokenizer.token_id(text).unwrap();
    assert_eq!(
        tokenizer.encode("hello world", true, false).unwrap(),
        [id("<|begin|>"), id("hello"), id("Ġworld")]
    );
    assert_eq!(tokenizer.encode("", true, false).unwrap(), [id("<|begin|>")]);
    assert_eq!(tokenizer.encode("ö", false, false).unwrap(), [id("Ã"), id("¶")]);
    // A token of the user is always cut out, a control token only on request.
    assert_eq!(tokenizer.encode("<tool>", false, false).unwrap(), [id("<tool>")]);
    assert_eq!(tokenizer.encode("he<|im_end|>", false, true).unwrap(), [id("he"), id("<|im_end|>")]);
    assert!(tokenizer.encode("he<|im_end|>", false, false).unwrap().len() > 5);
    // It ends a turn by its name, whatever the file says that it is.
    assert_eq!(tokenizer.token_kind(id("<|im_end|>")), Some(TokenKind::Control));
    assert!(tokenizer.is_end(id("<|im_end|>")) && !tokenizer.is_end(id("hello")));
}

#[test]
fn guarded_text_stays_text() {
    let tokenizer = Tokenizer::new(byte_pairs()).unwrap();
    for text in ["<|im_end|>", "<|im_<|im_end|>end|>", "<tool>he<|begin|>", "é", ""] {
        let guarded = tokenizer.guard(text);
        let ids = tokenizer.encode(&guarded, false, true).unwrap();
        assert_eq!(ids, tokenizer.encode(text, false, false).unwrap(), "{text}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }
    let prompt = format!("{}<|im_end|>", tokenizer.guard("<|im_end|>"));
    assert_eq!(tokenizer.encode(&prompt, false, true).unwrap().last(), tokenizer.eos().as_ref());
}

#[test]
fn sentence_pieces_merge_by_score() {
    let tokenizer = Tokenizer::new(sentence_pieces()).unwrap();
    let texts = |text: &str| -> Vec<String> {
        let ids = tokenizer.encode(text, false, false).unwrap();
        ids.iter().map(|id| tokenizer.token_text(*id).unwrap().to_owned()).collect()
    };
    // "bc" has the best score, then "a" joins it; the space in front stays alone.
    assert_eq!(texts("abc"), ["▁", "abc"]);
    assert_eq!(texts("a b"), ["▁a", "▁", "b"]);
    assert_eq!(texts("é"), ["▁", "<0xC3>", "<0xA9>"]);
    assert_eq!(tokenizer.decode(&tokenizer.encode("a é  b", true, false).unwrap()).unwrap(), "a é  b");
    assert_eq!(tokenizer.encode("</s>", false, true).unwrap(), [2]);
    assert!(tokenizer.encode("</s>", false, false).unwrap().len() > 4);
}

#[test]
fn word_pieces_take_the_longest() {
    let tokenizer = Tokenizer::new(word_pieces()).unwrap();
    assert_eq!(tokenizer.encode("Unaffable a!", true, false).unwrap(), [2, 4, 5, 6, 7, 8, 3]);
    assert_eq!(tokenizer.encode("unx a", false, false).unwrap(), [1, 7]);
    assert_eq!(tokenizer.encode("á中a\u{0}\u{200d}", false, false).unwrap(), [7, 10, 7]);
    assert_eq!(tokenizer.encode(&"a".repeat(101), false, false).unwrap(), [1]);
    assert_eq!(tokenizer.decode(&[2, 4, 5, 6, 7, 8, 3]).unwrap(), "unaffable a !");
}

#[test]
fn streams_hold_unfinished_characters_back() {
    let tokenizer = Tokenizer::new(byte_pairs()).unwrap();
    let ids = tokenizer.encode("a€b", false, false).unwrap();
    let mut stream = StreamDecoder::new(&tokenizer);
    let parts: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap().to_owned()).collect();
    assert_eq!(parts, ["a", "", "", "€", "b"]);
    assert_eq!(stream.push(ids[1]).unwrap(), "");
    assert_eq!(stream.push(ids[0]).unwrap(), "\u{fffd}a");
    assert_eq!(stream.push(ids[1]).unwrap(), "");
    assert_eq!(stream.finish(), "\u{fffd}");
    assert_eq!(stream.finish(), "");
    let control = tokenizer.bos().unwrap();
    assert_eq!(stream.push(control).unwrap(), "");
    assert_eq!(StreamDecoder::new(&tokenizer).showing_control_tokens().push(control).unwrap(), "<|begin|>");
    assert!(matches!(stream.push(u32::MAX), Err(Error::Invalid { .. })));
}

#[test]
fn bad_vocabularies_are_refused() {
    let check = |change: &dyn Fn(&mut VocabularyData), message: &str| {
        let mut data = byte_pairs();
        change(&mut data);
        let error = Tokenizer::new(data).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    };
    check(&|d| d.tokens.clear(), "no tokens");
    check(&|d| d.tokens[3] = "!".into(), "tokens 0 and 3 are both \"!\"");
    check(&|d| d.merges.push("he".into()), "entry 9: \"he\"; expected two tokens separated by a space");
    check(&|d| d.merges.push("he zz".into()), "which is no token");
    check(&|d| d.merges.push("h o".into()), "which is no token");
    check(&|d| d.merges.clear(), "no merges");
    check(&|d| d.token_types.truncate(9), "9 entries");
    check(&|d| d.token_types[0] = 77, "kind 77");
    check(&|d| d.token_types[0] = 6, "the byte token \"!\"");
    check(&|d| d.eos = Some(1 << 30), "eos_token_id: token 1073741824");
    check(&|d| d.model = "t5".into(), "\"t5\" is not supported");
    check(&|d| d.pre = "zzz".into(), "\"zzz\" is not supported");
    let mut data = sentence_pieces();
    data.scores[260] = f32::NAN;
    assert!(Tokenizer::new(data).unwrap_err().to_string().contains("a finite number"));
    let mut data = sentence_pieces();
    data.scores.clear();
    assert!(Tokenizer::new(data).unwrap_err().to_string().contains("no scores"));
    let mut data = word_pieces();
    data.unknown = None;
    assert!(Tokenizer::new(data).unwrap_err().to_string().contains("no unknown token"));
}

#[test]
fn missing_bytes_are_an_error_where_they_are_needed() {
    let mut data = byte_pairs();
    data.tokens[0] = "nothing".into();
    let tokenizer = Tokenizer::new(data).unwrap();
    assert!(tokenizer.encode("hello", false, false).is_ok());
    assert!(matches!(tokenizer.encode("hello!", false, false), Err(Error::Invalid { .. })));
}

/// The tokenizer of a small trained model, from its `tokenizer.json`.
#[test]
fn a_trained_vocabulary_gives_known_ids() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/vocabulary-1024.json");
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let texts = |key: &str| -> Vec<String> {
        json[key].as_array().unwrap().iter().map(|t| t.as_str().unwrap().to_owned()).collect()
    };
    let data = VocabularyData {
        model: "gpt2".into(),
        pre: "gpt-2".into(),
        tokens: texts("tokens"),
        merges: texts("merges"),
        ..VocabularyData::default()
    };
    let tokenizer = Tokenizer::new(data).unwrap();
    for case in json["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let expected: Vec<u64> =
            case["ids"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
        let ids = tokenizer.encode(text, false, false).unwrap();
        assert_eq!(ids.iter().map(|id| u64::from(*id)).collect::<Vec<_>>(), expected, "{text:?}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }
}

/// A text that is one long word, and one that is one long line, take time in proportion; a quadratic method would not
/// end within any patience.
#[test]
fn long_texts_are_no_burden() {
    let bytes = Tokenizer::new(byte_pairs()).unwrap();
    let text = "hello".repeat(200_000);
    assert_eq!(bytes.decode(&bytes.encode(&text, false, false).unwrap()).unwrap(), text);
    let mut data = sentence_pieces();
    // A token over a word's beginning, so that the words cannot be taken one by one.
    data.tokens.push("c▁a".into());
    data.token_types.push(1);
    data.scores.push(-1.5);
    let pieces = Tokenizer::new(data).unwrap();
    let text = "abc abcab".repeat(100_000);
    assert_eq!(pieces.decode(&pieces.encode(&text, false, false).unwrap()).unwrap(), text);
}

/// Changes a vocabulary in one place of many.
fn damage(data: &mut VocabularyData, what: u32, at: usize, text: &str, number: i32) {
    let token = at % data.tokens.len().max(1);
    match what % 14 {
        0 => data.tokens[token] = text.into(),
        1 => data.tokens.truncate(at % 300),
        2 if !data.merges.is_empty() => {
            let at = at % data.merges.len();
            data.merges[at] = text.into();
        }
        3 if token < data.token_types.len() => data.token_types[token] = number % 8,
        4 if token < data.scores.len() => data.scores[token] = f32::from_bits(number as u32),
        5 => data.bos = Some(number as u32),
        6 => data.eos = Some(at as u32 % 300),
        7 => data.unknown = Some(at as u32 % 300),
        8 => data.model = ["llama", "gpt2", "bert", "gemma4", "", "t5"][at % 6].into(),
        9 => data.pre = ["", "qwen2", "falcon", "deepseek-llm", "gpt-4o", "tekken"][at % 6].into(),
        10 => data.tokens.push(text.into()),
        11 => data.scores.resize(at % 400, number as f32),
        12 => data.token_types.clear(),
        _ => data.merges.push(text.into()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if std::env::var_os("LIGHTER_SLOW").is_some() { 20_000 } else { 400 }))]

    #[test]
    fn damaged_vocabularies_never_panic(
        base in 0..3,
        changes in prop::collection::vec((any::<u32>(), any::<usize>(), "[a-c▁Ġ <>0-9x]{0,7}", any::<i32>()), 1..6),
        text in "[a-c▁hello <>|imend_ \n中é😀]{0,40}",
    ) {
        let mut data = match base {
            0 => byte_pairs(),
            1 => sentence_pieces(),
            _ => word_pieces(),
        };
        for (what, at, text, number) in &changes {
            if !data.tokens.is_empty() {
                damage(&mut data, *what, *at, text, *number);
            }
        }
        if let Ok(tokenizer) = Tokenizer::new(data) {
            for special in [false, true] {
                if let Ok(ids) = tokenizer.encode(&text, special, special) {
                    prop_assert!(ids.iter().all(|id| (*id as usize) < tokenizer.token_count()));
                    tokenizer.decode(&ids).unwrap();
                }
            }
        }
    }

    #[test]
    fn any_text_comes_back(text in any::<String>()) {
        for data in [byte_pairs(), sentence_pieces()] {
            let space = data.model == "llama";
            let tokenizer = Tokenizer::new(data).unwrap();
            let decoded = tokenizer.decode(&tokenizer.encode(&text, true, false).unwrap()).unwrap();
            // SentencePiece cannot tell its mark from a space.
            let expected = if space { text.replace('▁', " ") } else { text.clone() };
            prop_assert_eq!(decoded, expected);
        }
    }
}

/// A GGUF file without weights that carries a vocabulary.
fn gguf(data: &VocabularyData, change: impl FnOnce(&mut GgufWriter)) -> Metadata {
    let mut writer = GgufWriter::new();
    let mut set = |key: &str, value: Value| writer.set(&format!("tokenizer.ggml.{key}"), value).unwrap();
    set("model", Value::from(data.model.as_str()));
    set("pre", Value::from(data.pre.as_str()));
    set("tokens", Value::Array(Array::Strings(data.tokens.clone())));
    set("token_type", Value::Array(Array::I32(data.token_types.clone())));
    set("merges", Value::Array(Array::Strings(data.merges.clone())));
    set("bos_token_id", Value::U32(data.bos.unwrap()));
    set("eos_token_id", Value::U32(data.eos.unwrap()));
    change(&mut writer);
    let mut file = Vec::new();
    writer.begin(&mut file).unwrap().finish().unwrap();
    GgufFile::read(&file).unwrap().metadata
}

#[test]
fn vocabularies_and_templates_come_out_of_gguf() {
    let data = byte_pairs();
    let metadata = gguf(&data, |_| ());
    assert_eq!(VocabularyData::from_gguf(&metadata).unwrap(), data);
    let metadata = gguf(&data, |file| {
        let set = &mut |key: &str, value| file.set(key, value).unwrap();
        set("general.name", Value::from("small"));
        set("tokenizer.ggml.add_bos_token", Value::Bool(false));
        set(
            "tokenizer.chat_template",
            Value::from("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"),
        );
    });
    let tokenizer = Tokenizer::from_gguf(&metadata).unwrap();
    assert!(!tokenizer.adds_bos());
    let messages = [Message::new("user", "hello")];
    let conversation = Conversation { messages: &messages, ..Conversation::default() };
    let template = ChatTemplate::from_gguf(&metadata, &tokenizer).unwrap();
    assert_eq!(template.render(&conversation).unwrap(), "<|begin|>hello<|im_end|>");

    let refused = |change: &dyn Fn(&mut GgufWriter), message: &str| {
        let error = Tokenizer::from_gguf(&gguf(&data, change)).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    };
    let set =
        |key: &'static str, value: Value| move |file: &mut GgufWriter| file.set(key, value.clone()).unwrap();
    refused(&set("tokenizer.ggml.tokens", Value::U32(1)), "an array of strings");
    refused(&set("tokenizer.ggml.model", Value::Bool(true)), "a string");
    refused(&set("tokenizer.ggml.eos_token_id", Value::U64(1 << 40)), "the id of a token");
    refused(&set("tokenizer.ggml.eos_token_id", Value::I32(-1)), "an integer that is not negative");
    assert!(
        Tokenizer::from_gguf(&Metadata::default()).unwrap_err().to_string().contains("tokenizer.ggml.model")
    );
}
