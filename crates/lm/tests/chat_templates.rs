//! Chat templates: what real ones write, and what becomes of wrong ones.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lightering_lm::{ChatTemplate, Conversation, Error, Json, Message};
use sha2::{Digest, Sha256};

/// When the golden texts were made: 2024-07-26 09:05:03.
const NOW: i64 = 1_721_984_703;

fn templates() -> Option<PathBuf> {
    let root = std::env::var_os("LIGHTER_TEST_DATA")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/lighter-test-data")))?;
    let folder = root.join("tokenizers/templates");
    if folder.is_dir() {
        return Some(folder);
    }
    eprintln!("skipped: {} is not there (tools/fetch_test_data.sh, LIGHTER_TEST_DATA)", folder.display());
    None
}

#[derive(serde::Deserialize)]
struct Case {
    messages: Vec<Message>,
    #[serde(default)]
    tools: Option<Json>,
    add_generation_prompt: bool,
}

#[derive(serde::Deserialize)]
struct Golden {
    cases: BTreeMap<String, Case>,
    expected: BTreeMap<String, BTreeMap<String, Option<String>>>,
}

/// What is known to differ: this template marks text as safe HTML and adds plain text to it, which the original then
/// escapes, so that quotation marks become `&#34;`. Here they stay.
const DEVIATIONS: [(&str, &str); 2] =
    [("meetkai-functionary-medium-v3.1", "tools"), ("meetkai-functionary-medium-v3.1", "called")];

#[test]
fn real_templates_write_what_the_original_writes() {
    let Some(folder) = templates() else { return };
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat_templates.json");
    let golden: Golden = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
    let (mut same, mut wrong) = (0, Vec::new());
    for (name, expected) in &golden.expected {
        let source = std::fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
        let template = match ChatTemplate::new(Some(&source), "<s>", "</s>") {
            Ok(template) => template,
            Err(error) => {
                wrong.push(format!("{name}: {error}"));
                continue;
            }
        };
        for (case, expected) in expected {
            let case_of = &golden.cases[case];
            let conversation = Conversation {
                messages: &case_of.messages,
                tools: case_of.tools.as_ref(),
                add_generation_prompt: case_of.add_generation_prompt,
                now_unix_seconds: Some(NOW),
                ..Conversation::default()
            };
            let text = template.render(&conversation);
            let digest = |text: &String| {
                let hash: String =
                    Sha256::digest(text.as_bytes()).iter().map(|b| format!("{b:02x}")).collect();
                hash[..32].to_owned()
            };
            match (&text, expected.as_deref()) {
                (Ok(text), Some(expected)) if digest(text) == expected => same += 1,
                (Err(Error::Template { .. }), Some("refused")) => same += 1,
                // The original stumbles over a mistake in the template; either is right.
                (_, None) => same += 1,
                (Ok(_), _) if DEVIATIONS.contains(&(name.as_str(), case.as_str())) => (),
                (text, _) => {
                    let text = text.as_ref().map(|_| "another text");
                    wrong.push(format!("{name}, {case}: {text:?}, expected {expected:?}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{same} right, {} wrong:\n{}", wrong.len(), wrong.join("\n"));
    assert!(same >= 300, "only {same} texts");
}

fn render(source: &str, messages: &[Message]) -> lightering_lm::Result<String> {
    let conversation = Conversation { messages, add_generation_prompt: true, ..Conversation::default() };
    ChatTemplate::new(Some(source), "<s>", "</s>")?.render(&conversation)
}

#[test]
fn models_without_a_template_speak_chatml() {
    let template = ChatTemplate::new(None, "", "").unwrap();
    let mut messages = vec![Message::new("system", "Be brief."), Message::new("user", "Hi")];
    let mut conversation = Conversation { messages: &messages, ..Conversation::default() };
    let text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n";
    assert_eq!(template.render(&conversation).unwrap(), text);
    conversation.add_generation_prompt = true;
    assert_eq!(template.render(&conversation).unwrap(), format!("{text}<|im_start|>assistant\n"));
    messages[1].content = None;
    let conversation = Conversation { messages: &messages[1..], ..Conversation::default() };
    assert_eq!(template.render(&conversation).unwrap(), "<|im_start|>user\n<|im_end|>\n");
}

#[test]
fn values_are_written_as_python_writes_them() {
    let check = |source: &str, expected: &str| assert_eq!(render(source, &[]).unwrap(), expected, "{source}");
    check(
        "{{ {'b': [1, 0.5, none, true], 'a': '<é\\n>'} | tojson }}",
        r#"{"b": [1, 0.5, null, true], "a": "<é\n>"}"#,
    );
    check(
        "{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true, ensure_ascii=true) }}",
        "{\"a\": \"<\\u00e9>\", \"b\": 1}",
    );
    check("{{ {'b': [], 'a': [1]} | tojson(indent=2) }}", "{\n  \"b\": [],\n  \"a\": [\n    1\n  ]\n}");
    check("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]");
    check("{{ 'a\n\nb\n' | indent(2, first=true) }}", "  a\n\n  b\n");
    check("{{ ' x '.strip() + 'a,b'.split(',')[1] }}{% if 'ab'.startswith('a') %}!{% endif %}", "xb!");
    check("{{ bos_token }}{{ missing }}{{ eos_token }}", "<s></s>");
    check("{%- generation -%} a {% endgeneration %}", "a ");
}

#[test]
fn arguments_of_calls_are_objects_to_the_template() {
    let calls = r#"[{"type": "function", "function": {"name": "f", "arguments": "{\"z\": 1, \"a\": 2}"}}]"#;
    let mut message = Message::new("assistant", "");
    message.fields.insert("tool_calls".into(), Json::from_text(calls).unwrap());
    let source = "{% for call in messages[0].tool_calls %}{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}";
    assert_eq!(render(source, &[message.clone()]).unwrap(), r#"f {"z": 1, "a": 2}"#);
    // A template that wants text gets text.
    let source = "{{ 'a ' + messages[0].tool_calls[0].function.arguments.strip() }}";
    assert_eq!(render(source, &[message]).unwrap(), r#"a {"z": 1, "a": 2}"#);
}

#[test]
fn wrong_templates_are_refused() {
    let check = |source: &str, message: &str| {
        let error = render(source, &[Message::new("user", "x")]).unwrap_err();
        assert!(matches!(error, Error::Template { .. } | Error::Limit { .. }), "{error:?}");
        assert!(error.to_string().contains(message), "{source:.60}: {error}");
    };
    check("\n\n{% if %}", "line 3");
    check(
        "{{ raise_exception('only the user may speak') }}",
        "chat template, line 1: only the user may speak",
    );
    check("{{ unknown_function() }}", "unknown_function");
    check("{{ strftime_now('%Y') }}", "strftime_now");
    check("{{ messages[7].role.name }}", "undefined");
    // Neither time nor memory without a bound.
    check("{% for i in range(100000) %}{% for j in range(100000) %}{{ i }}{% endfor %}{% endfor %}", "fuel");
    check(
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(90) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "fuel",
    );
    check("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion");
    check(&"{{ x }}".repeat(200_000), "the limit is 1048576");
    check(&format!("{}1{}", "{{ ".to_owned() + &"(".repeat(5000), ")".repeat(5000)), "");
    check(&"{% if true %}".repeat(50_000), "");
}

/// Damage in every place of a small template, and pieces of templates put together at random.
#[test]
fn damaged_templates_never_panic() {
    let source = lightering_lm::CHATML;
    let messages = [Message::new("user", "x")];
    for at in 0..source.len() {
        let _ = render(&source[..at], &messages);
        for with in ["{", "}", "%", "(", "'", "|", "-", "", "é"] {
            let _ = render(&format!("{}{with}{}", &source[..at], &source[at + 1..]), &messages);
        }
    }
    let pieces = [
        "{{",
        "}}",
        "{%",
        "%}",
        "{%-",
        "-%}",
        " if ",
        " for x in messages ",
        " endfor ",
        " endif ",
        " set y = ",
        " generation ",
        "messages",
        "[0]",
        "[-1:]",
        ".content",
        ".items()",
        "|tojson",
        "|indent(3)",
        "(",
        ")",
        "'a'",
        " 1 ",
        "+",
        "~",
        "\n",
        "{#",
        "#}",
        "*99999999",
        "**9",
        "%0",
        ".split('')",
        "|join",
        " macro m() ",
        " endmacro ",
    ];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let rounds = if std::env::var_os("LIGHTER_SLOW").is_some() { 300_000 } else { 5_000 };
    for _ in 0..rounds {
        let mut source = String::new();
        for _ in 0..12 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            source.push_str(pieces[(state % pieces.len() as u64) as usize]);
        }
        let _ = render(&source, &messages);
    }
}
