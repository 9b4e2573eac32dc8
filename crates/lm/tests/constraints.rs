//! Constrained output: what keeps to a schema is allowed, what does not is not, and nothing takes without bound.

use std::sync::Arc;

use lightering_lm::{Constraint, Error, Grammar, Json, TokenTable, Tokenizer, VocabularyData};
use proptest::prelude::*;

/// Bytes, and pieces of JSON that reach over its parts.
fn tokenizer() -> Tokenizer {
    let codes = (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff).chain(0x100..0x144);
    let mut tokens: Vec<String> = codes.map(|code| char::from_u32(code).unwrap().to_string()).collect();
    let pieces = [
        "{\"", "\":", "\",", "\"}", "},", "}]", "[{", "[]", "{}", "tr", "true", "fa", "null", "10", "12",
        "na", "name", "Ã©", "Ã¤b", "ðŁĺ", "Ġ\"", ":Ġ", ",Ġ", "ĊĠ", "ĊĊ", "ĠĠ", "a\"b", "\\n", "\\u", "d8",
        "-0", "e+", ".5", "}}", "]]", "a1",
    ];
    let merges = pieces.iter().map(|piece| {
        let at = piece.char_indices().nth(1).map_or(0, |(at, _)| at);
        format!("{} {}", &piece[..at], &piece[at..])
    });
    // Only pairs of known tokens may merge; the longer pieces are reached by walking the table, not by encoding.
    let merges: Vec<String> = merges.filter(|merge| merge.chars().count() == 3).collect();
    tokens.extend(pieces.map(String::from));
    tokens.extend(["<|im_end|>", "<|begin|>"].map(String::from));
    let mut token_types = vec![1; tokens.len()];
    let count = token_types.len();
    token_types[count - 2..].fill(3);
    let eos = Some(count as u32 - 2);
    let (model, pre) = ("gpt2".into(), "gpt-2".into());
    Tokenizer::new(VocabularyData {
        model,
        pre,
        tokens,
        token_types,
        merges,
        eos,
        ..VocabularyData::default()
    })
    .unwrap()
}

struct Bench {
    tokenizer: Tokenizer,
    table: Arc<TokenTable>,
}

impl Bench {
    fn new() -> Bench {
        let tokenizer = tokenizer();
        let table = Arc::new(TokenTable::new(&tokenizer));
        Bench { tokenizer, table }
    }

    fn keeps(&self, grammar: &Grammar, text: &str) -> bool {
        let mut constraint = Constraint::new(grammar, &self.table).unwrap();
        for id in self.tokenizer.encode(text, false, false).unwrap() {
            let allowed = constraint.allows(id).unwrap();
            assert_eq!(allowed, constraint.accept(id).is_ok(), "{text:?}, token {id}");
            if !allowed {
                return false;
            }
        }
        constraint.may_end()
    }

    fn check(&self, grammar: &Grammar, good: &[&str], bad: &[&str]) {
        good.iter().for_each(|text| assert!(self.keeps(grammar, text), "refused: {text}"));
        bad.iter().for_each(|text| assert!(!self.keeps(grammar, text), "allowed: {text}"));
    }

    fn schema(&self, schema: &str, good: &[&str], bad: &[&str]) {
        let grammar = Grammar::from_json_schema(&Json::from_text(schema).unwrap()).unwrap();
        self.check(&grammar, good, bad);
    }
}

#[test]
fn schemas_mean_what_they_say() {
    let bench = Bench::new();
    bench.schema(
        r#"{"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2}}, "required": ["name", "age"]}"#,
        &[
            r#"{"name":"é \" \u00e9","age":0}"#,
            "{\n  \"name\": \"\",\n  \"age\": 120,\n  \"tags\": [\"abc\", \"\"]\n}",
            r#"{"name": "x", "age": 7, "tags": []}"#,
        ],
        &[
            r#"{"name":"x"}"#,
            r#"{"age":1,"name":"x"}"#,
            r#"{"name":"x","age":121}"#,
            r#"{"name":"x","age":-1}"#,
            r#"{"name":"x","age":01}"#,
            r#"{"name":"x","age":1,"other":1}"#,
            r#"{"name":"x","age":1,"tags":["abcd"]}"#,
            r#"{"name":"x","age":1,"tags":["a","b","c"]}"#,
            r#"{"name":"x","age":1,}"#,
            "{\"name\":\"a\nb\",\"age\":1}",
            r#"{"name":"\ud800","age":1}"#,
            "",
        ],
    );
    bench.schema(
        r#"{"properties": {"a": {}, "b": {}, "c": {}}}"#,
        &["{}", r#"{"a":1}"#, r#"{"b":[{}]}"#, r#"{"a":null,"c":"x"}"#],
        &[r#"{"c":1,"a":1}"#, r#"{,"a":1}"#],
    );
    bench.schema(
        r#"{"properties": {"ab": {"type": "null"}, "a": {"type": "null"}}, "additionalProperties": {"type": "integer"}}"#,
        &["{}", r#"{"ab":null,"x":1,"abc":2,"":3}"#, r#"{"b":1,"a\"":2}"#],
        &[r#"{"ab":1}"#, r#"{"a":1}"#, r#"{"x":1,"ab":null}"#, r#"{"x":null}"#],
    );
    bench.schema(
        r#"{"enum": ["yes", "no", 1, null, {"a": [1]}]}"#,
        &[r#""yes""#, "1", "null", r#"{"a": [1]}"#],
        &["yes", "2", r#""y""#],
    );
    bench.schema(r#"{"const": "é\n"}"#, &[r#""é\n""#], &[r#""e""#]);
    bench.schema(
        r#"{"anyOf": [{"type": "boolean"}, {"type": ["null", "number"]}]}"#,
        &["true", "null", "-0.5e+3", "10"],
        &["tru", "1.", "-", "\"\""],
    );
    bench.schema(
        r#"{"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "minItems": 1}"#,
        &["[1]", "[1, true]"],
        &["[]", "[true]", "[1,true,1]"],
    );
    bench.schema(r#"{"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "null"}, "maxItems": 3}"#, &["[]", "[1]", "[1,null,null]"], &["[null]", "[1,null,null,null]"]);
    bench.schema(
        r#"{"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3}"#,
        &["[1,2]", "[1,2,3]"],
        &["[]", "[1]", "[1,2,3,4]"],
    );
    bench.schema(
        r##"{"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}, "required": ["v"]}}}"##,
        &[r#"{"v":1}"#, r#"{"v":1,"kids":[{"v":2,"kids":[]},{"v":3}]}"#],
        &[r#"{"v":1,"kids":[{}]}"#, r#"{"v":1,"kids":[{"v":2}}"#],
    );
    bench.schema(
        r#"{"type": "string", "pattern": "^\\d{3}-[a-c]+$"}"#,
        &[r#""123-abc""#],
        &[r#""12-a""#, r#""123-d""#, r#""x123-a""#],
    );
    bench.schema(
        r#"{"type": "string", "pattern": "a[\"\\\\]b"}"#,
        &[r#""xxa\"byy""#, r#""a\\b""#],
        &[r#""ab""#, r#""a"b""#],
    );
    bench.schema(
        r#"{"type": "string", "minLength": 2, "maxLength": 3}"#,
        &[r#""éé""#, r#""\u00e9\n😀""#],
        &[r#""é""#, r#""abcd""#],
    );
    bench.schema("true", &["1", r#"{"a":[true,false,null,"x",1.5e-3]}"#], &["[", "nul"]);
    let object = Grammar::json_object().unwrap();
    bench.check(&object, &["{}", r#"{"a": {"b": []}}"#], &["[]", "1", "{} "]);
}

#[test]
fn integers_keep_their_bounds() {
    let bench = Bench::new();
    for (least, most) in [(-12, 107), (5, 5), (0, 9), (-3, -3), (98, 1002), (-1000, -99)] {
        let schema =
            format!(r#"{{"type": "integer", "minimum": {least}, "exclusiveMaximum": {}}}"#, most + 1);
        let grammar = Grammar::from_json_schema(&Json::from_text(&schema).unwrap()).unwrap();
        for number in -1110..1110 {
            assert_eq!(
                bench.keeps(&grammar, &number.to_string()),
                (least..=most).contains(&number),
                "{number} in {least}..={most}"
            );
        }
        assert!(!bench.keeps(&grammar, "-0") && !bench.keeps(&grammar, "007"));
    }
}

#[test]
fn expressions_match_as_a_whole() {
    let bench = Bench::new();
    assert!(matches!(Grammar::from_regex("a^b"), Err(Error::Unsupported { .. })));
    assert!(matches!(Grammar::from_regex("a("), Err(Error::Invalid { .. })));
    let grammar = Grammar::from_regex("(?i:yes)|no( [a-zé]+){0,2}").unwrap();
    bench.check(&grammar, &["YES", "no", "no é", "no a bc"], &["", "yesyes", "no a b c", "no "]);
}

#[test]
fn gbnf_is_read_as_llama_cpp_reads_it() {
    let bench = Bench::new();
    // One sequence cannot go on in the next line unless parentheses hold it together.
    assert!(matches!(Grammar::from_gbnf("root ::=\n  [a-h]\n  [1-8]"), Err(Error::Invalid { .. })));
    let grammar = r#"
# A comment.
root  ::= move ("," ws
  move){0,2}
move ::= piece? square  # another
  | "O-O" "-O"?
piece ::= [KQR\u0042-] | "\x4e"
square ::=
  [a-h] [1-8]
ws ::= " "* | "\n"
"#;
    let grammar = Grammar::from_gbnf(&grammar.replace("[1-8]\n", "[1-8]\r\n")).unwrap();
    bench.check(
        &grammar,
        &["e4", "Ne4,  O-O", "-a1,\nBh8,O-O-O"],
        &["", "e9", "e4,", "e4,e4,e4,e4", "Me4", "O-O-"],
    );
    let list = Grammar::from_gbnf("root ::= item | root \",\" item\nitem ::= [^,\\]] . ").unwrap();
    bench.check(&list, &["ab", "é😀"], &["", ",a", "]a"]);
    let check = |text: &str, message: &str| {
        let error = Grammar::from_gbnf(text).map(drop).unwrap_err().to_string();
        assert!(error.contains(message), "{text}: {error}");
    };
    check("", "no rule \"root\"");
    check("root ::= a", "no rule \"a\"");
    check("root ::= \"a\"\nroot ::= \"b\"", "not two");
    check("root = 1", "line 1: '='; expected \"::=\"");
    check("root ::= \"a\"\nb ::= [a", "line 2: its end; expected a closing bracket");
    check("root ::= [z-a]", "ascending");
    check("root ::= \"\\ud800\"", "the number of a character");
    check("root ::= (\"a\"", "expected \")\"");
    check("root ::= \"a\"{3,2}", "a repetition");
    check("root ::= \"a\"{99999999999}", "a number");
    check("root ::= <think>", "a token in the place of text");
    check(&format!("root ::= {}", "(".repeat(1000)), "less deeply");
}

#[test]
fn damaged_grammars_never_panic() {
    let good = "root ::= a{2,3} (\"é\" | [^x-z\\n]+)* # c\na ::= \"\\u00e9\" | . b?\nb ::= \"q\"+\n";
    let bench = Bench::new();
    for (at, _) in good.char_indices() {
        for with in ["", "(", ")", "{", "[", "\"", "\\", "\n", "|", "*", "::=", "é", "9"] {
            for skip in [0, 1] {
                let rest: String = good[at..].chars().skip(skip).collect();
                let Ok(grammar) = Grammar::from_gbnf(&format!("{}{with}{rest}", &good[..at])) else {
                    continue;
                };
                let Ok(mut constraint) = Constraint::new(&grammar, &bench.table) else { continue };
                let _ = constraint.mask(&mut vec![0.0; bench.tokenizer.token_count()]);
            }
        }
        let _ = Grammar::from_gbnf(&good[..at]);
    }
}

/// What is allowed is exactly what can be accepted.
fn check_mask(constraint: &mut Constraint, count: u32) {
    let mut logits = vec![0.0; count as usize + 3];
    constraint.mask(&mut logits).unwrap();
    for token in 0..count {
        let accepted = constraint.clone().accept(token).is_ok();
        assert_eq!(accepted, logits[token as usize] == 0.0, "token {token}");
    }
    assert!(logits[count as usize..].iter().all(|l| *l == f32::NEG_INFINITY), "padding is allowed");
}

const SCHEMAS: [&str; 5] = [
    r#"{"type": "object", "properties": {"name": {"type": "string"}, "a": {"type": "number"}, "ä": {"enum": ["x", true]}}, "required": ["a"]}"#,
    r#"{"type": "array", "items": {"type": ["string", "null"], "maxLength": 9}, "minItems": 1}"#,
    r#"{"type": "object"}"#,
    r##"{"type": "object", "properties": {"next": {"$ref": "#"}, "n": {"type": "integer"}}}"##,
    r#"{"type": "string", "pattern": "^(é|ab?){2,}😀*$"}"#,
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Whatever a model writes under a constraint, it is JSON in the end.
    #[test]
    fn random_texts_are_json(which in 0..SCHEMAS.len(), choices in prop::collection::vec(any::<u32>(), 400)) {
        let bench = Bench::new();
        let grammar = Grammar::from_json_schema(&Json::from_text(SCHEMAS[which]).unwrap()).unwrap();
        let mut constraint = Constraint::new(&grammar, &bench.table).unwrap();
        let count = bench.tokenizer.token_count() as u32;
        // To come to an end: these first, when the random choices are used up.
        let closing: Vec<u32> = ["\"", "}", "]", "a", "Ġ", ":", "1", "0", "t", "r", "u", "e", "x", "n", "l", "b", "Ã", "©", "Ł"].iter().map(|t| bench.tokenizer.token_id(t).unwrap()).collect();
        let mut ids = Vec::new();
        let mut ended = false;
        for round in 0..1500 {
            let allowed: Vec<u32> = (0..count).filter(|t| constraint.allows(*t).unwrap()).collect();
            prop_assert!(!allowed.is_empty());
            let end = allowed.iter().copied().find(|t| bench.tokenizer.is_end(*t));
            prop_assert_eq!(end.is_some(), constraint.may_end());
            let chosen = match choices.get(round) {
                Some(choice) => allowed[*choice as usize % allowed.len()],
                None => end.or_else(|| closing.iter().copied().find(|t| allowed.contains(t))).unwrap_or(allowed[0]),
            };
            if round % 40 == 0 {
                check_mask(&mut constraint, count);
            }
            constraint.accept(chosen).unwrap();
            if bench.tokenizer.is_end(chosen) {
                ended = true;
                prop_assert!(constraint.mask(&mut vec![0.0; count as usize]).is_err());
                break;
            }
            ids.push(chosen);
        }
        if ended {
            let text = bench.tokenizer.decode(&ids).unwrap();
            let value: serde_json::Value = serde_json::from_str(&text).map_err(|e| TestCaseError::fail(format!("{text:?}: {e}")))?;
            let shape = match which {
                0 => value["a"].is_number(),
                1 => value.as_array().is_some_and(|a| !a.is_empty() && a.iter().all(|v| v.is_string() || v.is_null())),
                4 => value.is_string(),
                _ => value.is_object(),
            };
            prop_assert!(shape, "{}", text);
        }
    }

    #[test]
    fn any_json_object_is_allowed(value in json(), spaces in any::<bool>()) {
        let bench = Bench::new();
        let value = serde_json::json!({ "k": value });
        let text = if spaces { serde_json::to_string_pretty(&value).unwrap() } else { value.to_string() };
        prop_assert!(bench.keeps(&Grammar::json_object().unwrap(), &text), "{}", text);
    }
}

fn json() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        (-999_999i64..999_999).prop_map(Into::into),
        (-1e3..1e3f64).prop_map(|x| ((x * 64.0).round() / 64.0).into()),
        any::<String>().prop_map(|s| s.replace('\u{7f}', "").into()),
    ];
    leaf.prop_recursive(4, 24, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Into::into),
            prop::collection::btree_map("[a-zé\"\\\\\n]{0,6}", inner, 0..5)
                .prop_map(|m| serde_json::Value::Object(m.into_iter().collect())),
        ]
    })
}

#[test]
fn wrong_schemas_are_refused() {
    let bench = Bench::new();
    let check = |schema: &str, message: &str| {
        let grammar = Grammar::from_json_schema(&Json::from_text(schema).unwrap());
        let error =
            grammar.and_then(|g| Constraint::new(&g, &bench.table).map(drop)).unwrap_err().to_string();
        assert!(error.contains(message), "{schema:.80}: {error}");
    };
    check("1", "expected an object");
    check(r#"{"type": "strange"}"#, "a type of JSON Schema");
    check(r#"{"not": {}}"#, "the keyword \"not\" is not supported");
    check(r#"{"properties": {"a": {"properties": {"b": {"if": 1}}}}}"#, "schema.properties.a.properties.b");
    check(r#"{"type": "number", "minimum": 0}"#, "no integers");
    check(r#"{"type": "integer", "minimum": 3, "maximum": 2}"#, "at least one integer");
    check(r#"{"type": "string", "minLength": -1}"#, "minLength");
    check(r#"{"type": "string", "minLength": 3, "maxLength": 2}"#, "maxLength below minLength");
    check(r#"{"type": "string", "pattern": "("}"#, "pattern");
    check(r#"{"type": "string", "pattern": "a\\b"}"#, "word boundary");
    check(r##"{"$ref": "#/$defs/missing"}"##, "a place in this schema");
    check(r#"{"$ref": "http://example.invalid"}"#, "out of the schema");
    check(r##"{"$ref": "#"}"##, "no text keeps to it");
    check("false", "no text keeps to it");
    check(r#"{"enum": []}"#, "no text keeps to it");
    check(r#"{"type": "object", "required": ["a"]}"#, "which has no schema");
    check(r#"{"anyOf": [{}], "properties": {}}"#, "together with");
    check(r#"{"type": "string", "maxLength": 4000000}"#, "repetitions");
    check(&format!("{}1{}", r#"{"items":"#.repeat(70), "}".repeat(70)), "the nesting of schemas");
    // Repetitions of repetitions are there once.
    let nested = r#"{"type": "string", "pattern": "^((((a{900}){900}){900}){900}){900}$"}"#;
    bench.schema(nested, &[], &[r#""aaa""#]);
    // A grammar that begins with itself, in two ways at once.
    let recursive = r##"{"anyOf": [{"type": "array", "items": {"$ref": "#"}}, {"$ref": "#"}]}"##;
    bench.schema(recursive, &["[]", "[[],[[]]]"], &["[1]"]);
}

#[test]
fn constraints_refuse_what_they_forbid() {
    let bench = Bench::new();
    let grammar = Grammar::from_regex("ab").unwrap();
    let mut constraint = Constraint::new(&grammar, &bench.table).unwrap();
    let id = |text: &str| bench.tokenizer.token_id(text).unwrap();
    assert!(matches!(constraint.accept(id("b")), Err(Error::Invalid { .. })));
    assert!(matches!(constraint.accept(id("<|im_end|>")), Err(Error::Invalid { .. })));
    assert!(matches!(constraint.accept(id("<|begin|>")), Err(Error::Invalid { .. })));
    assert!(matches!(constraint.accept(u32::MAX), Err(Error::Invalid { .. })));
    assert!(!constraint.allows(u32::MAX).unwrap());
    assert!(matches!(constraint.mask(&mut [0.0; 5]), Err(Error::Invalid { .. })));
    constraint.accept(id("a")).unwrap();
    constraint.accept(id("b")).unwrap();
    constraint.accept(id("<|im_end|>")).unwrap();
    assert!(constraint.accept(id("<|im_end|>")).is_err());
    // Deep nesting ends somewhere instead of growing for ever.
    let mut constraint =
        Constraint::new(&Grammar::from_json_schema(&Json::from_text("true").unwrap()).unwrap(), &bench.table)
            .unwrap();
    let depth = (0..1000).take_while(|_| constraint.accept(id("[")).is_ok()).count();
    assert!((50..1000).contains(&depth), "{depth}");
}

/// Grammars put together at random: refused or followed, never a panic, and every step has its bound.
#[test]
fn random_schemas_never_panic() {
    let bench = Bench::new();
    let pieces = [
        r#""type": "object""#,
        r#""type": "string""#,
        r#""type": ["integer", "array"]"#,
        r#""type": 7"#,
        r##""$ref": "#""##,
        r##""$ref": "#/properties/a""##,
        r##""$ref": "#/anyOf/0""##,
        r#""properties": {"a": {@}, "ab": {@}}"#,
        r#""additionalProperties": {@}"#,
        r#""additionalProperties": false"#,
        r#""items": {@}"#,
        r#""anyOf": [{@}, {@}]"#,
        r#""allOf": [{@}]"#,
        r#""prefixItems": [{@}, {@}]"#,
        r#""minItems": 3"#,
        r#""maxItems": 2"#,
        r#""minItems": 4294967295"#,
        r#""maxItems": 0"#,
        r#""required": ["a"]"#,
        r#""required": [1]"#,
        r#""enum": [1, {"a": 1}]"#,
        r#""const": null"#,
        r#""minimum": -3"#,
        r#""maximum": 999999999999999"#,
        r#""exclusiveMinimum": 1.5"#,
        r#""pattern": "a*b+(c|d){2,}""#,
        r#""pattern": "\\p{L}{50}[^\"]$""#,
        r#""minLength": 2"#,
        r#""maxLength": 2000"#,
        r#""title": 1"#,
    ];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % n as u64) as usize
    };
    let rounds = if std::env::var_os("LIGHTER_SLOW").is_some() { 60_000 } else { 1500 };
    let mut followed = 0;
    for _ in 0..rounds {
        let mut schema = "{@}".to_owned();
        for _ in 0..9 {
            let Some(at) = schema.find('@') else { break };
            let first = pieces[random(pieces.len())];
            let second = pieces[random(pieces.len())];
            let inside = if random(2) == 0 { first.to_owned() } else { format!("{first}, {second}") };
            schema.replace_range(at..=at, &inside);
        }
        let schema = schema.replace('@', "");
        let Ok(schema) = Json::from_text(&schema) else { continue };
        let Ok(grammar) = Grammar::from_json_schema(&schema) else { continue };
        let Ok(mut constraint) = Constraint::new(&grammar, &bench.table) else { continue };
        followed += 1;
        for _ in 0..12 {
            let allowed: Vec<u32> = (0..bench.tokenizer.token_count() as u32)
                .filter(|t| constraint.allows(*t).unwrap_or(false))
                .collect();
            if allowed.is_empty() || constraint.accept(allowed[random(allowed.len())]).is_err() {
                break;
            }
        }
    }
    assert!(followed * 10 > rounds / 5, "only {followed} of {rounds} schemas could be followed");
}
