//! `lighter convert` by the real executable: budgets, names and files that are whole or not there.

use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../lm/tests/data/moe-tiny-q4_0.gguf")
}

fn command(folder: &Path, program: &str) -> Command {
    let mut command = Command::new(program);
    command.current_dir(folder).env("XDG_CONFIG_HOME", folder.join("config")).stdin(Stdio::null());
    command
}

fn run(folder: &Path, arguments: &[&str]) -> Output {
    let output = command(folder, env!("CARGO_BIN_EXE_lighter")).arg("convert").args(arguments).output();
    output.expect("the executable starts")
}

fn check(folder: &Path, exit: i32, arguments: &[&str], parts: &[&str]) -> Value {
    let output = run(folder, &[arguments, &["--json"]].concat());
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(exit), "{arguments:?}\n{error}");
    for part in parts {
        assert!(error.contains(part), "{part:?} is missing from\n{error}");
    }
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{arguments:?}: {e}\n{error}"))
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut names: Vec<String> =
        entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn a_gguf_file_becomes_another_one_and_nothing_is_overwritten_unasked() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path();
    std::fs::copy(model(), path.join("m.gguf")).expect("a copy");
    let report = check(path, 0, &["m.gguf", "-o", "out.gguf", "--format", "q8_0"], &[]);
    assert_eq!(report["schema"], "lightering.convert/1");
    assert_eq!((&report["architecture"], &report["format"]), (&"llama".into(), &"Q8_0".into()));
    let rows = report["formats"].as_array().expect("a list");
    let of =
        |from: &str| rows.iter().find(|f| f["from"] == from).unwrap_or_else(|| panic!("{from} is missing"));
    assert_eq!((&of("Q4_0")["to"], &of("Q4_0")["tensors"]), (&"Q8_0".into(), &30.into()));
    assert!(of("Q4_0")["relative_error"].as_f64().expect("a number") < 0.01);
    assert_eq!((&of("F32")["to"], &of("F32")["relative_error"]), (&"F32".into(), &Value::Null));
    let size = std::fs::metadata(path.join("out.gguf")).expect("the file").len();
    assert_eq!(number(&report["file_bytes"]), size);
    assert_eq!(names(path), ["m.gguf", "out.gguf"], "no draft is left");

    check(path, 2, &["m.gguf", "-o", "out.gguf"], &["out.gguf", "exists", "--force"]);
    assert_eq!(std::fs::metadata(path.join("out.gguf")).expect("the file").len(), size);
    // A file may take its own place.
    let text = run(path, &["out.gguf", "-o", "out.gguf", "--format", "F16", "--force"]);
    assert!(text.status.success());
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("together") && text.contains("mean squared error"), "{text}");
    let small = check(path, 3, &["m.gguf", "-o", "new.gguf", "--memory", "10KiB"], &["--memory"]);
    let smallest = number(&small["smallest_memory_bytes"]).to_string();
    let report = check(path, 0, &["m.gguf", "-o", "new.gguf", "--memory", &smallest], &[]);
    assert!(number(&report["peak_beyond_fixed_bytes"]) <= number(&report["memory_bytes"]), "{report}");

    check(path, 2, &["absent", "-o", "x.gguf"], &["absent", "no such file"]);
    check(path, 2, &["m.gguf", "-o", "."], &["folder"]);
    check(path, 2, &[".", "-o", "x.gguf"], &["safetensors"]);
    let bad = run(path, &["m.gguf", "-o", "x.gguf", "--format", "Q7"]);
    assert!(String::from_utf8_lossy(&bad.stderr).contains("q4_k_m"), "the formats are listed");
    std::fs::write(path.join("text"), "no model").expect("a file");
    check(path, 2, &["text", "-o", "x.gguf"], &["neither GGUF nor safetensors"]);
    assert_eq!(names(path), ["m.gguf", "new.gguf", "out.gguf", "text"]);
}

/// A checkpoint of zeros that takes 120 MiB as a file and nothing on the disk, in two shards.
fn large(folder: &Path) {
    let layer = |part: &str| format!("model.layers.0.{part}.weight");
    let embeddings = vec![("model.embed_tokens.weight".to_owned(), vec![16384u64, 2048])];
    let mut rest = vec![("model.norm.weight".to_owned(), vec![2048])];
    for part in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"] {
        rest.push((layer(part), vec![2048, 2048]));
    }
    for part in ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] {
        rest.push((layer(part), vec![2048, 2048]));
    }
    for part in ["input_layernorm", "post_attention_layernorm"] {
        rest.push((layer(part), vec![2048]));
    }
    let mut map = serde_json::Map::new();
    for (file, tensors) in [("a.safetensors", embeddings), ("b.safetensors", rest)] {
        let mut header = serde_json::Map::new();
        let mut at = 0;
        for (name, shape) in tensors {
            let end = at + 2 * shape.iter().product::<u64>();
            header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}));
            map.insert(name, json!(file));
            at = end;
        }
        let header = serde_json::to_vec(&header).expect("JSON");
        let mut out = std::fs::File::create(folder.join(file)).expect("a file");
        out.write_all(&(header.len() as u64).to_le_bytes()).expect("room");
        out.write_all(&header).expect("room");
        out.set_len(8 + header.len() as u64 + at).expect("room");
    }
    let index = json!({"metadata": {}, "weight_map": map});
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).expect("a file");
    let config = json!({
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 16,
        "intermediate_size": 2048, "max_position_embeddings": 128, "tie_word_embeddings": true,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).expect("a file");
}

#[test]
fn memory_does_not_grow_with_the_model() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    large(folder.path());
    let memory = (3u64 << 20).to_string();
    let arguments = [".", "-o", "out.gguf", "--format", "q4_0", "--memory", &memory, "--threads", "2"];
    let report = check(folder.path(), 0, &arguments, &["no tokenizer.json"]);
    assert!(number(&report["weights_before_bytes"]) > 100 << 20);
    assert!(number(&report["peak_beyond_fixed_bytes"]) <= 3 << 20, "{report}");
    assert!(number(&report["smallest_memory_bytes"]) < 1 << 20, "{report}");
    std::fs::remove_file(folder.path().join("b.safetensors")).expect("it is there");
    check(folder.path(), 2, &[".", "-o", "new.gguf"], &["b.safetensors"]);
    assert!(!folder.path().join("new.gguf").exists());
}

#[cfg(unix)]
#[test]
fn whatever_stops_it_leaves_no_half_file_under_the_final_name() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::copy(model(), folder.path().join("m.gguf")).expect("a copy");
    // Files may not grow beyond a limit. By default the process is killed at that moment; when it ignores the signal,
    // the write fails, as on a full disk.
    let limited = |before: &str| {
        let script = format!("{before} ulimit -f 1000; exec \"$0\" convert m.gguf -o out.gguf --format F16");
        let output =
            command(folder.path(), "sh").args(["-c", &script, env!("CARGO_BIN_EXE_lighter")]).output();
        output.expect("a shell")
    };
    let killed = limited("");
    assert_eq!(killed.status.code(), None, "{killed:?}");
    assert!(!folder.path().join("out.gguf").exists());
    for name in names(folder.path()).iter().filter(|name| name.ends_with(".part")) {
        std::fs::remove_file(folder.path().join(name)).expect("it is there");
    }
    let failed = limited("trap '' XFSZ;");
    let error = String::from_utf8_lossy(&failed.stderr);
    assert_eq!(failed.status.code(), Some(2), "{error}");
    assert!(error.contains("out.gguf: writing it") && error.contains("room on the disk"), "{error}");
    assert_eq!(names(folder.path()), ["m.gguf"]);
}
