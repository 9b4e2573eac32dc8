//! The commands for language models on a trained one that is always here: what they answer, and that budgets hold.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../lm/tests/data/moe-tiny-q4_0.gguf")
}

fn run(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lighter"))
        .args(arguments)
        .current_dir(folder)
        .env("XDG_CONFIG_HOME", folder.join("config"))
        .stdin(Stdio::null())
        .output()
        .expect("the executable starts")
}

/// Runs what must end with this exit code, and gives its JSON.
fn json(folder: &Path, exit: i32, arguments: &[&str]) -> Value {
    let output = run(folder, &[arguments, &["--json"]].concat());
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(exit), "{arguments:?}\n{error}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{arguments:?}: {e}\n{error}"))
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::copy(model(), folder.path().join("m.gguf")).expect("a copy of the model");
    folder
}

const PROMPT: &str = "First Citizen:\n";

fn generate(folder: &Path, more: &[&str]) -> Value {
    let fixed = [
        "generate",
        "m.gguf",
        PROMPT,
        "--temperature",
        "0",
        "--tokens",
        "24",
        "--context",
        "64",
        "--threads",
        "2",
    ];
    json(folder, 0, &[&fixed[..], more].concat())
}

fn ids(report: &Value) -> Vec<u64> {
    report["tokens"].as_array().expect("a list").iter().map(|t| number(&t["id"])).collect()
}

#[test]
fn generating_holds_any_budget_that_it_accepts_and_answers_the_same() {
    let folder = folder();
    let resident = generate(folder.path(), &[]);
    assert_eq!(resident["schema"], "lightering.generate/1");
    assert_eq!(resident["finish_reason"], "length");
    assert_eq!(number(&resident["usage"]["generated_tokens"]), 24);
    assert_eq!(ids(&resident).len(), 24);
    let told: String =
        resident["tokens"].as_array().expect("a list").iter().filter_map(|t| t["text"].as_str()).collect();
    assert_eq!(resident["text"], told);
    assert_eq!(resident["receipt"]["budget"]["held"], Value::Null, "there was none");

    // Far too little: the smallest budget that does is told.
    let refused = json(
        folder.path(),
        3,
        &["generate", "m.gguf", PROMPT, "--context", "64", "--threads", "2", "--memory", "64KiB"],
    );
    assert_eq!(refused["schema"], "lightering.error/1");
    let smallest = number(&refused["smallest_memory_bytes"]);
    let all = number(&resident["receipt"]["predicted"]["planned_bytes"]);
    assert!((1 << 16..all).contains(&smallest), "{smallest} of {all}");
    for share in [1, 2] {
        let budget = smallest + (all - smallest) * share / 2;
        let limited = generate(folder.path(), &["--memory", &budget.to_string()]);
        let receipt = &limited["receipt"];
        assert_eq!(ids(&limited), ids(&resident), "in {budget} bytes");
        assert_eq!(number(&receipt["budget"]["memory_bytes"]), budget);
        assert_eq!(receipt["budget"]["held"], true, "{receipt}");
        assert!(number(&receipt["measured"]["peak_beyond_fixed_bytes"]) <= budget, "{receipt}");
    }
}

#[test]
fn what_the_other_commands_tell_about_it() {
    let folder = folder();
    let inspected = json(folder.path(), 0, &["inspect", "m.gguf"]);
    assert_eq!(inspected["schema"], "lightering.inspect-weights/1");
    assert_eq!(
        (&inspected["model"]["architecture"], &inspected["model"]["experts"]),
        (&"llama".into(), &8.into())
    );
    assert_eq!(number(&inspected["parameters"]), 3_609_728);
    assert_eq!(inspected["tokenizer"]["problem"], Value::Null);
    assert!(inspected["formats"].as_array().expect("a list").iter().any(|f| f["format"] == "Q4_0"));

    let tokens = json(folder.path(), 0, &["tokenize", "m.gguf", "First Citizen:"]);
    assert_eq!(tokens["schema"], "lightering.tokenize/1");
    let list: Vec<String> =
        tokens["ids"].as_array().expect("a list").iter().map(|id| id.to_string()).collect();
    let back = json(folder.path(), 0, &["tokenize", "m.gguf", "--decode", &list.join(",")]);
    assert_eq!(back["text"], "First Citizen:");

    let budget = 3 << 20;
    let plan = json(folder.path(), 0, &["plan", "m.gguf", "--context", "64", "--memory", "3MiB"]);
    assert_eq!(plan["schema"], "lightering.plan/1");
    assert!(number(&plan["predicted_peak"]) <= budget);
    assert!(number(&plan["weights_total"]) > 1_900_000);
    json(folder.path(), 3, &["plan", "m.gguf", "--context", "64", "--memory", "64KiB"]);

    let fixed = ["bench", "m.gguf", "--context", "64", "--prompt-tokens", "16", "--tokens", "4"];
    let bench =
        json(folder.path(), 0, &[&fixed[..], &["--runs", "2", "--warmup", "1", "--memory", "3MiB"]].concat());
    assert_eq!(bench["schema"], "lightering.bench-language/1");
    assert_eq!((number(&bench["prompt_tokens"]), number(&bench["tokens"])), (16, 4));
    assert_eq!(bench["first_token_seconds"].as_array().expect("one for each run").len(), 2);
    assert!(bench["tokens_per_second"].as_f64().expect("a rate") > 0.0);
    let receipt = &bench["receipt"];
    assert_eq!(receipt["budget"]["held"], true, "{receipt}");
    assert!(number(&receipt["measured"]["peak_beyond_fixed_bytes"]) <= budget, "{receipt}");
}

#[test]
fn a_copy_that_was_cut_short_is_refused_by_every_command() {
    let folder = folder();
    let whole = std::fs::read(model()).expect("the model");
    for size in [3, 700, 40_000, whole.len() / 2, whole.len() - 1] {
        std::fs::write(folder.path().join("cut.gguf"), &whole[..size]).expect("a file");
        for command in [
            &["generate", "cut.gguf", "x"][..],
            &["plan", "cut.gguf"],
            &["bench", "cut.gguf"],
            &["inspect", "cut.gguf"],
            &["tokenize", "cut.gguf", "x"],
            &["convert", "cut.gguf", "--output", "out.gguf"],
        ] {
            let output = run(folder.path(), command);
            let error = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{command:?}, {size} bytes: {error}");
            assert!(
                error.contains("cut.gguf") && error.contains("try: "),
                "{command:?}, {size} bytes: {error}"
            );
            let told = error.contains("cut short") || error.contains("are left");
            assert!(told, "{command:?}, {size} bytes: {error}");
        }
    }
    assert!(!folder.path().join("out.gguf").exists());
}
