//! The commands for language models, by the real executable, on a small GGUF file that is written here.

use lightering_formats::gguf::{Array, GgufFile, GgufWriter, Value};
use lightering_units::BlockFormat;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// Ids of the vocabulary below: 94 visible ASCII characters, then these.
const SPACE: u32 = 94;
const LINE_BREAK: u32 = 95;
const HI: u32 = 96;
const BOS: u32 = 97;
const START: u32 = 98;
const END: u32 = 99;
const HALF: u32 = 100;

const TEMPLATE: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

struct Sandbox {
    folder: tempfile::TempDir,
}

impl Sandbox {
    fn new() -> Sandbox {
        Sandbox { folder: tempfile::tempdir().expect("a temporary folder") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), content).expect("a temporary file");
    }

    fn lighter(&self, arguments: &[&str], stdin: &[u8]) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_lighter"))
            .args(arguments)
            .current_dir(self.folder.path())
            .env("XDG_CONFIG_HOME", self.path("config"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the executable starts");
        // A command that reads no stdin may be gone already.
        let _ = child.stdin.take().expect("a pipe").write_all(stdin);
        child.wait_with_output().expect("it ends")
    }

    /// Runs and gives stdout.
    fn done(&self, arguments: &[&str]) -> String {
        let output = self.lighter(arguments, b"");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}\n{error}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    fn json(&self, arguments: &[&str]) -> serde_json::Value {
        let text = self.done(&[arguments, &["--json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }

    /// Runs what must end with exit code 2 and say each of `parts`.
    fn refused(&self, arguments: &[&str], parts: &[&str]) {
        let output = self.lighter(arguments, b"");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}\n{error}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
        for part in parts {
            assert!(error.contains(part), "{arguments:?}: {part:?} is missing from\n{error}");
        }
    }
}

fn tokens() -> (Vec<String>, Vec<i32>) {
    let mut tokens: Vec<String> = ('!'..='~').map(String::from).collect();
    // In GPT-2's alphabet of bytes: the space, the line break, a merge.
    tokens.extend(["\u{120}", "\u{10a}", "hi"].map(str::to_owned));
    tokens.extend(["<s>", "<|im_start|>", "<|im_end|>"].map(str::to_owned));
    // The byte 0xC3, half of many a character.
    tokens.push("\u{c3}".to_owned());
    let mut kinds = vec![1; tokens.len()];
    for id in [BOS, START, END] {
        kinds[id as usize] = 3;
    }
    (tokens, kinds)
}

/// A file with a vocabulary and two tensors whose data is zeros.
fn gguf(change: impl FnOnce(&mut GgufWriter)) -> Vec<u8> {
    let mut writer = GgufWriter::new();
    let (tokens, kinds) = tokens();
    let strings = |values: Vec<String>| Value::Array(Array::Strings(values));
    for (key, value) in [
        ("general.architecture", Value::from("qwen2")),
        ("general.name", Value::from("Tiny \u{1b}[2J")),
        ("qwen2.context_length", Value::U32(4096)),
        ("qwen2.block_count", Value::U32(2)),
        ("qwen2.attention.head_count", Value::Array(Array::U32(vec![4, 8]))),
        ("qwen2.attention.head_count_kv", Value::U32(2)),
        ("qwen2.rope.freq_base", Value::F32(0.1)),
        ("tokenizer.ggml.model", Value::from("gpt2")),
        ("tokenizer.ggml.pre", Value::from("gpt-2")),
        ("tokenizer.ggml.tokens", strings(tokens)),
        ("tokenizer.ggml.token_type", Value::Array(Array::I32(kinds))),
        ("tokenizer.ggml.merges", strings(vec!["h i".to_owned()])),
        ("tokenizer.ggml.bos_token_id", Value::U32(BOS)),
        ("tokenizer.ggml.eos_token_id", Value::U32(END)),
        ("tokenizer.ggml.add_bos_token", Value::Bool(true)),
        ("tokenizer.chat_template", Value::from(TEMPLATE)),
    ] {
        writer.set(key, value).expect("short keys");
    }
    change(&mut writer);
    writer.tensor("token_embd.weight", &[256, 101], BlockFormat::Q4_K).expect("whole blocks");
    writer.tensor("output_norm.weight", &[256], BlockFormat::F32).expect("whole blocks");
    let mut file = Vec::new();
    let mut data = writer.begin(&mut file).expect("memory");
    while let Some(size) = data.next_tensor().map(|t| t.size.0 as usize) {
        data.write(&vec![0; size]).expect("memory");
    }
    data.finish().expect("all data");
    file
}

fn safetensors() -> Vec<u8> {
    let header = br#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F16","shape":[4],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend([0; 32]);
    file
}

fn ids(text: &str) -> Vec<u32> {
    text.split_whitespace().map(|id| id.parse().expect("an id")).collect()
}

/// The ids of characters that have no merge.
fn characters(text: &str) -> Vec<u32> {
    let id = |c| match c {
        ' ' => SPACE,
        '\n' => LINE_BREAK,
        c => c as u32 - '!' as u32,
    };
    text.chars().map(id).collect()
}

#[test]
fn inspecting_a_gguf_file_tells_the_model_and_its_weights() {
    let s = Sandbox::new();
    // The ending does not matter.
    s.write("model.bin", gguf(|_| ()));
    let report = s.json(&["inspect", "model.bin"]);
    assert_eq!(report["schema"], "lightering.inspect-weights/1");
    assert_eq!((&report["container"], &report["version"]), (&"gguf".into(), &3.into()));
    let model = &report["model"];
    assert_eq!(model["architecture"], "qwen2");
    assert_eq!((&model["context_length"], &model["layers"]), (&4096.into(), &2.into()));
    assert_eq!(model["heads"], serde_json::json!([4, 8]), "one for each layer");
    assert_eq!((&model["vocabulary"], &model["experts"]), (&101.into(), &serde_json::Value::Null));
    assert_eq!(report["tokenizer"]["kind"], "gpt2");
    assert_eq!(report["tokenizer"]["chat_template"], true);
    assert_eq!(report["tokenizer"]["problem"], serde_json::Value::Null);
    assert_eq!(report["parameters"], 256 * 102);
    let formats = report["formats"].as_array().expect("a list");
    assert_eq!((&formats[0]["format"], &formats[0]["bytes"]), (&"Q4_K".into(), &(144 * 101).into()));
    assert_eq!(formats[0]["bits_per_weight"], 4.5);
    assert_eq!((&formats[1]["format"], &formats[1]["bits_per_weight"]), (&"F32".into(), &32.0.into()));
    let metadata = &report["metadata"];
    assert_eq!(metadata.as_object().expect("an object").len(), 16);
    assert_eq!(metadata["qwen2.rope.freq_base"], 0.1, "as it was written, not as f64 sees it");
    assert_eq!(metadata["tokenizer.ggml.tokens"]["length"], 101);
    assert_eq!(metadata["tokenizer.ggml.tokens"]["first"].as_array().expect("a list").len(), 8);
    assert_eq!(metadata["tokenizer.chat_template"], TEMPLATE);
    assert_eq!(report["tensors"][0]["shape"], serde_json::json!([256, 101]));
    let text = s.done(&["inspect", "model.bin"]);
    let of = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("{name} is missing from\n{text}")).trim().to_owned()
    };
    assert_eq!(of("name"), "Tiny \\u{1b}[2J", "the file must not steer the terminal");
    assert_eq!((of("heads"), of("key-value heads")), ("4, 8 by layer".to_owned(), "2".to_owned()));
    assert_eq!((of("tokenizer"), of("chat template")), ("gpt2, gpt-2".to_owned(), "yes".to_owned()));
    assert_eq!(of("Q4_K").split_whitespace().collect::<Vec<_>>(), ["1", "25856", "14.2", "KiB", "4.50"]);
    assert!(of("token_embd.weight").starts_with("[256, 101]"), "{text}");
    s.refused(&["inspect", "model.bin", "--graph"], &["--graph", "ONNX"]);
}

#[test]
fn inspecting_a_vocabulary_that_cannot_be_used_tells_why() {
    let s = Sandbox::new();
    s.write("m.gguf", gguf(|w| w.set("tokenizer.ggml.model", Value::from("t5")).expect("a short key")));
    let problem = s.json(&["inspect", "m.gguf"])["tokenizer"]["problem"].to_string();
    assert!(problem.contains("t5"), "{problem}");
    s.refused(&["tokenize", "m.gguf", "hi"], &["m.gguf", "t5", "lighter inspect"]);
    let mut empty = Vec::new();
    GgufWriter::new().begin(&mut empty).expect("memory").finish().expect("nothing is missing");
    s.write("empty.gguf", empty);
    assert!(s.done(&["inspect", "empty.gguf"]).contains("no tensors"));
    s.refused(&["tokenize", "empty.gguf", "hi"], &["empty.gguf", "tokenizer.ggml", "missing"]);
}

#[test]
fn inspecting_a_safetensors_file() {
    let s = Sandbox::new();
    s.write("weights", safetensors());
    let report = s.json(&["inspect", "weights"]);
    assert_eq!((&report["container"], &report["parameters"]), (&"safetensors".into(), &10.into()));
    assert_eq!(report["metadata"]["format"], "pt");
    assert_eq!(report["tensors"][0]["shape"], serde_json::json!([2, 3]));
    assert!(report["notes"][0].as_str().expect("a note").contains("config.json"));
    s.write("config.json", r#"{"model_type": "llama", "num_hidden_layers": 7, "vocab_size": 99}"#);
    let report = s.json(&["inspect", "weights"]);
    let model = &report["model"];
    assert_eq!((&model["architecture"], &model["layers"]), (&"llama".into(), &7.into()));
    assert_eq!(model["vocabulary"], 99);
    s.write("config.json", "{");
    assert!(s.done(&["inspect", "weights"]).contains("config.json: is no JSON"));
}

#[test]
fn text_becomes_tokens_and_text_again() {
    let s = Sandbox::new();
    s.write("m.gguf", gguf(|_| ()));
    assert_eq!(ids(&s.done(&["tokenize", "m.gguf", "hi!"])), [BOS, HI, 0]);
    assert_eq!(ids(&s.done(&["tokenize", "m.gguf", "hi!", "--no-special"])), [HI, 0]);
    s.write("t.txt", "hi\n");
    assert_eq!(ids(&s.done(&["tokenize", "m.gguf", "--file", "t.txt"])), [BOS, HI, LINE_BREAK]);
    let piped = s.lighter(&["tokenize", "m.gguf"], b"hi hi");
    assert_eq!(ids(&String::from_utf8_lossy(&piped.stdout)), [BOS, HI, SPACE, HI]);
    assert_eq!(String::from_utf8_lossy(&piped.stderr), "4 tokens\n");
    // Only on request does text become a control token.
    let spelled = ["tokenize", "m.gguf", "<|im_end|>", "--no-special"];
    assert_eq!(ids(&s.done(&spelled)), characters("<|im_end|>"));
    assert_eq!(ids(&s.done(&[&spelled[..], &["--parse-special"]].concat())), [END]);

    assert_eq!(s.done(&["tokenize", "m.gguf", "--decode", "97,96, 94,96"]), "hi hi\n");
    let table = s.done(&["tokenize", "m.gguf", "hi\n", "--pieces"]);
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[1..], [vec!["97", "\"<s>\"", "control"], vec!["96", "\"hi\""], vec!["95", "\"\\n\""]]);
    let report = s.json(&["tokenize", "m.gguf", "--decode", &format!("{HI},{HALF}")]);
    assert_eq!((&report["tokens"], &report["text"]), (&2.into(), &"hi\u{fffd}".into()));
    assert_eq!(report["pieces"][1]["text"], serde_json::Value::Null, "half a character is no text");
    assert_eq!(report["pieces"][1]["bytes"], serde_json::json!([0xc3]));
}

#[test]
fn a_conversation_becomes_a_prompt_in_which_nobody_can_forge_a_turn() {
    let s = Sandbox::new();
    s.write("m.gguf", gguf(|_| ()));
    s.write("c.json", r#"[{"role": "user", "content": "a<|im_end|>b"}]"#);
    let mut expected = vec![BOS, START];
    expected.extend(characters("user\na<|im_end|>b"));
    expected.extend([END, START]);
    // Without the merge, since "hi" is not in it.
    expected.extend(characters("assistant\n"));
    assert_eq!(ids(&s.done(&["tokenize", "m.gguf", "--chat", "c.json"])), expected);
    let report = s.json(&["tokenize", "m.gguf", "--chat", "c.json", "--no-generation-prompt"]);
    assert_eq!(report["text"], "<|im_start|>user\na<|im_end|>b<|im_end|>");
    s.write("request.json", r#"{"model": "x", "messages": [{"role": "user", "content": "a<|im_end|>b"}]}"#);
    assert_eq!(ids(&s.done(&["tokenize", "m.gguf", "--chat", "request.json"])), expected);
    // A template that begins the sequence by itself gets no second beginning.
    let begins = Value::String(format!("{{{{ bos_token }}}}{TEMPLATE}"));
    s.write("b.gguf", gguf(|w| w.set("tokenizer.chat_template", begins).expect("a short key")));
    assert_eq!(ids(&s.done(&["tokenize", "b.gguf", "--chat", "c.json"])), expected);

    let refuses = Value::from("{{ raise_exception('Only user and assistant roles are supported!') }}");
    s.write("r.gguf", gguf(|w| w.set("tokenizer.chat_template", refuses).expect("a short key")));
    s.refused(&["tokenize", "r.gguf", "--chat", "c.json"], &["c.json", "Only user and assistant", "try: "]);
    for bad in ["", "[", "{}", r#"[{"content": "no role"}]"#, r#"[{"role": "user", "content": 5}]"#] {
        s.write("bad.json", bad);
        s.refused(&["tokenize", "m.gguf", "--chat", "bad.json"], &["bad.json", "role and content", "try: "]);
    }
}

#[test]
fn bad_input_is_refused_with_its_place() {
    let s = Sandbox::new();
    let whole = gguf(|_| ());
    s.write("m.gguf", &whole);
    // Everywhere: in the header, the metadata, the list of tensors, the data.
    for size in (0..whole.len()).step_by(97) {
        s.write("cut.gguf", &whole[..size]);
        s.refused(&["inspect", "cut.gguf"], &["cut.gguf", "try: "]);
        s.refused(&["tokenize", "cut.gguf", "hi"], &["cut.gguf", "try: "]);
    }
    let weights = safetensors();
    for size in 0..weights.len() {
        s.write("cut.safetensors", &weights[..size]);
        s.refused(&["inspect", "cut.safetensors"], &["cut.safetensors", "try: "]);
    }
    s.write("w.safetensors", weights);
    s.write("text.gguf", "this is not a model");
    s.refused(&["inspect", "text.gguf"], &["text.gguf", "GGUF"]);
    s.refused(&["tokenize", "text.gguf", "hi"], &["text.gguf", "GGUF"]);
    s.refused(&["tokenize", "absent.gguf", "hi"], &["absent.gguf", "No such file"]);
    s.refused(&["tokenize", ".", "hi"], &["folder"]);
    s.refused(&["tokenize", "w.safetensors", "hi"], &["w.safetensors", "no GGUF file", "lighter inspect"]);
    s.refused(&["tokenize", "m.gguf", "\u{e9}"], &["without a token"]);
    s.refused(&["tokenize", "m.gguf", "--decode", "1,101"], &["101", "ids from 0 to 100"]);
    s.refused(&["tokenize", "m.gguf", "--decode", "1,x"], &["1,2,3"]);
    s.refused(&["tokenize", "m.gguf", "--file", "absent.txt"], &["absent.txt"]);
    s.refused(&["tokenize", "m.gguf", "text", "--decode", "1"], &["cannot be used with"]);
    s.write("latin1.txt", [b'a', 0xe9]);
    s.refused(&["tokenize", "m.gguf", "--file", "latin1.txt"], &["latin1.txt", "byte 1", "UTF-8"]);
}

#[test]
fn what_cannot_run_says_so_and_names_what_works() {
    let s = Sandbox::new();
    s.write("model", gguf(|_| ()));
    s.write("weights", safetensors());
    s.refused(&["run", "model"], &["a language model", "lighter generate model", "lighter chat model"]);
    for command in ["run", "plan", "bench"] {
        s.refused(&[command, "weights"], &["without a graph", "lighter inspect weights", "lighter convert"]);
    }
    // This file says nothing about the sizes of its layers.
    for command in ["plan", "bench", "generate", "chat", "perplexity", "serve"] {
        let arguments: &[&str] = match command {
            "perplexity" => &[command, "model", "weights"],
            "serve" => &[command, "model", "--port", "0"],
            _ => &[command, "model"],
        };
        s.refused(arguments, &["qwen2.embedding_length", "lighter inspect model"]);
    }
}

#[test]
fn benches_write_a_page_and_watch_their_speed() {
    let s = Sandbox::new();
    s.done(&["lm", "synth", "--like", "gemma-3-270m", "--tiny", "--output", "tiny.gguf"]);
    let report = s.json(&[
        "bench",
        "tiny.gguf",
        "--prompt-tokens",
        "40",
        "--tokens",
        "30",
        "--threads",
        "1",
        "--report",
        "r.html",
        "--sustained",
        "0.3s",
    ]);
    let count: u64 =
        report["token_histogram"].as_array().unwrap().iter().map(|b| b["count"].as_u64().unwrap()).sum();
    assert_eq!(count, 3 * 30);
    let windows = report["sustained"]["windows"].as_array().unwrap();
    assert!(!windows.is_empty() && windows.iter().all(|w| w["tokens"].as_u64().unwrap() > 0), "{windows:?}");
    let verdict = report["sustained"]["verdict"].as_str().unwrap();
    assert!(["steady", "throttling", "noise"].contains(&verdict), "{verdict}");
    let classes: u64 =
        report["memory"].as_array().unwrap().iter().map(|m| m["bytes"].as_u64().unwrap()).sum();
    assert_eq!(report["receipt"]["predicted"]["planned_bytes"].as_u64(), Some(classes));
    let page = std::fs::read_to_string(s.path("r.html")).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
    assert!(!page.contains("http"), "everything is in the page");
    for part in
        ["tiny.gguf", "token to token", "cache of keys and values", "Sustained run", "Operators", "<svg"]
    {
        assert!(page.contains(part), "{part}");
    }
    s.refused(&["bench", "tiny.gguf", "--sustained", "0s"], &["60s"]);
}

/// Writes the model of `file` as `parts` files, as llama.cpp's gguf-split names them.
fn split(s: &Sandbox, file: &str, stem: &str, parts: usize) {
    let bytes = std::fs::read(s.path(file)).unwrap();
    let whole = GgufFile::read(&bytes).unwrap();
    let each = whole.tensors.len().div_ceil(parts);
    for (number, tensors) in whole.tensors.chunks(each).enumerate() {
        let mut writer = match number {
            0 => GgufWriter::with_metadata(whole.metadata.clone()),
            _ => GgufWriter::new(),
        };
        writer.set("split.no", Value::U16(number as u16)).unwrap();
        writer.set("split.count", Value::U16(parts as u16)).unwrap();
        writer.set("split.tensors.count", Value::I32(whole.tensors.len() as i32)).unwrap();
        for t in tensors {
            writer.tensor(&t.name, &t.dims, t.format).unwrap();
        }
        let mut data = writer.begin(Vec::new()).unwrap();
        for t in tensors {
            data.write(&bytes[t.offset as usize..][..t.size.0 as usize]).unwrap();
        }
        s.write(&format!("{stem}-{:05}-of-{parts:05}.gguf", number + 1), data.finish().unwrap());
    }
}

#[test]
fn models_in_parts_run_like_whole_ones() {
    let s = Sandbox::new();
    for name in ["llama-3.2-1b", "qwen3-30b-a3b"] {
        s.done(&["lm", "synth", "--like", name, "--tiny", "--output", "whole.gguf"]);
        split(&s, "whole.gguf", "m", 3);
        let first = "m-00001-of-00003.gguf";
        let mut answers = Vec::new();
        for (model, memory) in [("whole.gguf", "64MiB"), (first, "64MiB"), (first, "3MiB")] {
            let answer = s.json(&[
                "generate",
                model,
                "Hello",
                "--tokens",
                "12",
                "--ignore-end",
                "--logprobs",
                "3",
                "--temperature",
                "0",
                "--context",
                "64",
                "--step-tokens",
                "8",
                "--memory",
                memory,
            ]);
            answers.push(answer["tokens"].clone());
        }
        assert_eq!(answers[0], answers[1], "{name}");
        assert_eq!(answers[0], answers[2], "{name}");
        std::fs::remove_file(s.path("whole.gguf")).unwrap();
    }
    s.refused(&["generate", "m-00002-of-00003.gguf", "x"], &["part 2 of 3", "m-00001-of-00003.gguf"]);
    std::fs::rename(s.path("m-00001-of-00003.gguf"), s.path("other.gguf")).unwrap();
    s.refused(&["generate", "other.gguf", "x"], &["-00001-of-00003.gguf"]);
    std::fs::rename(s.path("other.gguf"), s.path("m-00001-of-00003.gguf")).unwrap();
    std::fs::copy(s.path("m-00003-of-00003.gguf"), s.path("m-00002-of-00003.gguf")).unwrap();
    s.refused(&["generate", "m-00001-of-00003.gguf", "x"], &["part 2", "split.no"]);
    std::fs::remove_file(s.path("m-00002-of-00003.gguf")).unwrap();
    s.refused(&["generate", "m-00001-of-00003.gguf", "x"], &["m-00002-of-00003.gguf", "side by side"]);
}
