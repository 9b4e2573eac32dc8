//! The real executable in temporary folders: exit codes, messages, and one case for each kind of bad input.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

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

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, content).expect("a temporary file");
        path
    }

    /// Runs `lighter` here, with a configuration folder of its own so that no profile of this machine is found.
    fn lighter(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_lighter"))
            .args(arguments)
            .current_dir(self.folder.path())
            .env("XDG_CONFIG_HOME", self.path("config"))
            .stdin(Stdio::null())
            .output()
            .expect("the executable starts")
    }

    /// Runs, and checks the exit code and that stderr holds each of `parts`.
    fn check(&self, arguments: &[&str], exit: i32, parts: &[&str]) -> Output {
        let output = self.lighter(arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(exit), "{arguments:?}\n{error}");
        for part in parts {
            assert!(error.contains(part), "{arguments:?}: {part:?} is missing from\n{error}");
        }
        output
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", stdout(output)))
}

/// The repository's own model and picture.
fn asset(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets").join(name).to_string_lossy().into_owned()
}

const MODEL: &str = "mobilenet_v1_0.75_192_quant.onnx";

/// A .npy file of zeros (or of the given bytes) with this type and shape.
fn npy(descr: &str, shape: &str, bytes: &[u8]) -> Vec<u8> {
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.as_bytes());
    file.extend(bytes);
    file
}

#[test]
fn usage_errors_are_exit_2_and_help_is_exit_0() {
    let s = Sandbox::new();
    let help = s.check(&["--help"], 0, &[]);
    for command in [
        "run",
        "demo",
        "inspect",
        "plan",
        "bench",
        "serve",
        "tokenize",
        "convert",
        "tier",
        "doctor",
        "conformance",
        "completions",
        "man",
    ] {
        assert!(stdout(&help).contains(command), "{command}");
    }
    assert!(stdout(&s.check(&["--version"], 0, &[])).contains(env!("CARGO_PKG_VERSION")));
    s.check(&[], 2, &["Usage"]);
    s.check(&["frobnicate"], 2, &["frobnicate"]);
    s.check(&["run", "--memori", "1MiB"], 2, &["--memory"]);
    s.check(&["run", "m.onnx", "--memory", "5 parsecs"], 2, &["64MiB"]);
    s.check(&["run", "m.onnx", "--memory", "0"], 2, &["more than 0"]);
    s.check(&["run", "m.onnx", "--threads", "0"], 2, &["threads"]);
    s.check(&["run", "m.onnx", "--rtol", "nan"], 2, &["not negative"]);
    s.check(&["run", "m.onnx", "--labels", "l.txt"], 2, &["--top-k"]);
    s.check(&["run", "m.onnx", "--input", "=x"], 2, &["NAME=FILE"]);
    s.check(&["run", "m.onnx", "--dim", "batch"], 2, &["batch=1"]);
    s.check(&["run", "m.onnx", "--energy-model=-1"], 2, &["watts"]);
}

#[test]
fn completions_and_manual_pages_come_from_the_same_declarations() {
    let s = Sandbox::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = stdout(&s.check(&["completions", shell], 0, &[]));
        assert!(script.contains("conformance") && script.contains("output-dir"), "{shell}");
    }
    assert!(stdout(&s.check(&["man"], 0, &[])).contains(".TH lighter"));
    s.check(&["man", "--output-dir", "pages"], 0, &[]);
    let page = std::fs::read_to_string(s.path("pages/lighter-run.1")).expect("a page for run");
    assert!(page.contains("memory"));
    s.write("file", "");
    s.check(&["man", "--output-dir", "file/pages"], 2, &["file/pages"]);
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let s = Sandbox::new();
    for arguments in [&["completions", "zsh"][..], &["--help"], &["man"]] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_lighter"))
            .args(arguments)
            .current_dir(s.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the executable starts");
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn errors_are_json_too() {
    let s = Sandbox::new();
    let output = s.check(&["inspect", "absent.onnx", "--json"], 2, &["absent.onnx"]);
    let error = json(&output);
    assert_eq!(error["schema"], "lightering.error/1");
    assert_eq!(error["exit"], 2);
    assert!(error["error"].as_str().unwrap().contains("absent.onnx"));
    // What the message says already is not told again as its cause.
    assert!(error["because"].as_array().expect("a list").is_empty());
}

#[test]
fn bad_models() {
    let s = Sandbox::new();
    s.write("empty.onnx", "");
    s.write("text.onnx", "this is not a model");
    let whole = std::fs::read(asset(MODEL)).expect("the repository's model");
    s.write("half.onnx", &whole[..whole.len() / 2]);
    for command in ["run", "inspect", "plan", "bench"] {
        s.check(&[command, "absent.onnx"], 2, &["absent.onnx", "No such file"]);
        s.check(&[command, "."], 2, &["error: "]);
        for file in ["empty.onnx", "text.onnx", "half.onnx"] {
            s.check(&[command, file], 2, &[file]);
        }
    }
}

#[test]
fn bad_inputs() {
    let s = Sandbox::new();
    let identity = asset("identity.onnx");
    let run = |arguments: &[&str], parts: &[&str]| {
        let mut all = vec!["run", identity.as_str()];
        all.extend(arguments);
        s.check(&all, 2, parts);
    };
    s.write("good.npy", npy("<f4", "(1,)", &1f32.to_le_bytes()));
    s.write("long.npy", npy("<f4", "(2,)", &[0; 8]));
    s.write("wrong.npy", npy("<i8", "(1,)", &[0; 8]));
    s.write("short.npy", npy("<f4", "(1,)", &[0; 3]));
    s.write("huge.npy", npy("<f4", "(99999999999,)", &[0; 4]));
    s.write("three.raw", [0u8; 3]);
    s.write("bad.pb", [0xffu8; 40]);
    s.write("bad.png", "no picture");
    run(&[], &["no file for input x (f32[1])", "--input x=FILE"]);
    run(&["--input", "z=good.npy"], &["no input \"z\"", "x f32[1]"]);
    run(&["--input", "x=absent.npy"], &["absent.npy"]);
    run(&["--input", "good.npy", "--input", "x=good.npy"], &["given twice"]);
    run(&["--input", "long.npy"], &["has shape [2]", "x"]);
    run(&["--input", "wrong.npy"], &["i64", "f32"]);
    run(&["--input", "short.npy"], &["short.npy"]);
    run(&["--input", "huge.npy"], &["huge.npy"]);
    run(&["--input", "three.raw"], &["3 bytes", "4 bytes"]);
    run(&["--input", "bad.pb"], &["bad.pb"]);
    run(&["--input", "bad.png"], &["--preprocess"]);
    run(&["--input", "bad.png", "--preprocess", "scale=255"], &["bad.png"]);
    run(&["--input", "good.npy", "--expect", "q=good.npy"], &["no output \"q\"", "y"]);
    run(&["--input", "good.npy", "--expect", "absent.npy"], &["absent.npy"]);
    run(&["--input", "good.npy", "--top-k", "1", "--labels", "absent.txt"], &["absent.txt"]);
    run(&["--input", "good.npy", "--machine", "absent.json"], &["absent.json", "lighter doctor"]);
    s.write("machine.json", "{}");
    run(&["--input", "good.npy", "--machine", "machine.json"], &["machine.json", "lighter doctor"]);
    run(&["--input", "good.npy", "--output-dir", "good.npy/inside"], &["good.npy/inside"]);
    run(&["--input", "good.npy", "--receipt", "absent/receipt.json"], &["absent/receipt.json"]);
    let conformance = s.check(&["conformance", "--onnx", "."], 2, &["no test case"]);
    assert!(stdout(&conformance).is_empty());
    s.check(&["conformance", "--onnx", "absent"], 2, &["absent"]);
}

#[test]
fn a_run_writes_outputs_compares_and_gives_a_receipt() {
    let s = Sandbox::new();
    let identity = asset("identity.onnx");
    s.write("x.npy", npy("<f4", "(1,)", &1.5f32.to_le_bytes()));
    s.write("other.npy", npy("<f4", "(1,)", &1.75f32.to_le_bytes()));
    let output = s.check(
        &[
            "run",
            &identity,
            "--input",
            "x=x.npy",
            "--output-dir",
            "out",
            "--receipt",
            "r.json",
            "--json",
            "--expect",
            "y=x.npy",
        ],
        0,
        &[],
    );
    let report = json(&output);
    assert_eq!(report["schema"], "lightering.run/1");
    assert_eq!(report["outputs"][0]["first"][0], 1.5);
    assert_eq!(report["expect"][0]["equal"], true);
    let receipt: serde_json::Value =
        serde_json::from_slice(&std::fs::read(s.path("r.json")).expect("the receipt")).expect("JSON");
    assert_eq!(receipt["schema"], "lightering.receipt/1");
    assert_eq!(receipt["budget"]["memory_bytes"], serde_json::Value::Null);
    assert!(receipt["measured"]["peak_resident_bytes"].as_u64().expect("Linux tells") > 0);
    assert_eq!(receipt["model"]["sha256"].as_str().expect("asked for").len(), 64);
    let written = std::fs::read(s.path("out/y.npy")).expect("the output");
    assert_eq!(written[written.len() - 4..], 1.5f32.to_le_bytes());
    let differs = ["run", &identity, "--input", "x.npy", "--expect", "other.npy"];
    s.check(&differs, 1, &["differs from other.npy", "element [0] is 1.5, expected 1.75"]);
    let output = s.check(&["run", &identity, "--input", "x.npy", "--expect", "other.npy", "--json"], 1, &[]);
    assert_eq!(json(&output)["expect"][0]["mismatched"], 1, "one document, the result");
    let tolerated = ["run", &identity, "--input", "x.npy", "--expect", "other.npy", "--atol", "0.3"];
    s.check(&tolerated, 0, &[]);
}

#[test]
fn an_impossible_budget_is_exit_3_and_names_the_smallest() {
    let s = Sandbox::new();
    let (model, picture) = (asset(MODEL), asset("coffee.jpg"));
    let arguments = ["run", &model, "--input", &picture, "--memory", "1kB"];
    let output = s.check(&arguments, 3, &["1000 B"]);
    assert!(output.stdout.is_empty());
    s.check(&["plan", &model, "--memory", "20kB"], 3, &["--memory"]);
    let refused = json(&s.check(&["bench", &model, "--memory", "1B", "--json"], 3, &["--memory"]));
    assert!(refused["smallest_memory_bytes"].as_u64().expect("it is known") > 100_000);
}

#[test]
fn plans_are_text_json_and_pictures() {
    let s = Sandbox::new();
    let model = asset(MODEL);
    let plan = json(&s.check(&["plan", &model, "--json", "--svg", "plan.svg"], 0, &[]));
    assert_eq!(plan["schema"], "lightering.plan/1");
    assert!(plan["predicted_peak"].as_u64().expect("bytes") > 0);
    let svg = std::fs::read_to_string(s.path("plan.svg")).expect("the picture");
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    s.check(&["plan", &model, "--svg", "absent/plan.svg"], 2, &["absent/plan.svg"]);
}

#[test]
fn an_8_bit_model_computes_on_bytes_from_end_to_end() {
    let s = Sandbox::new();
    let plan = json(&s.check(&["plan", &asset(MODEL), "--json"], 0, &[]));
    let ops: Vec<&str> =
        plan["instructions"].as_array().expect("a list").iter().filter_map(|i| i["op"].as_str()).collect();
    assert!(ops.contains(&"QLinearConv") && !ops.contains(&"Conv"), "{ops:?}");
}

#[test]
fn inspecting_tells_ports_operators_and_costs() {
    let s = Sandbox::new();
    let report = json(&s.check(&["inspect", &asset(MODEL), "--json"], 0, &[]));
    assert_eq!(report["inputs"][0]["type"], "u8[1,192,192,3]");
    assert!(report["ops"]["Conv"].as_u64().expect("a count") > 10);
    assert!(report["costs"]["flops"].as_f64().expect("known sizes") > 1e8);
}

#[test]
fn the_embedded_model_knows_its_espresso() {
    let s = Sandbox::new();
    let output = s.check(&["run", "--threads", "1"], 0, &[]);
    let text = stdout(&output);
    let first = text.lines().nth(2).unwrap_or_default();
    assert!(first.contains("968") && first.contains("espresso"), "{text}");
}

#[test]
fn traces_are_made_inspected_and_replayed() {
    let s = Sandbox::new();
    let synth = "tier synth t.trace --groups 4 --chunks 16 --per-step 2 --steps 60 --seed 3";
    s.check(&synth.split(' ').collect::<Vec<_>>(), 0, &[]);
    let told = json(&s.check(&["tier", "inspect", "t.trace", "--json"], 0, &[]));
    assert_eq!((&told["steps"], &told["chunks"], &told["uses"]), (&60.into(), &64.into(), &480.into()));
    let text = stdout(&s.check(&["tier", "inspect", "t.trace"], 0, &[]));
    assert!(text.contains("60 steps") && text.contains("64 chunks"), "{text}");
    let replay = ["tier", "replay", "t.trace", "--capacity", "50%,8", "--disk-rate", "1GB/s"];
    let text = stdout(&s.check(&replay, 0, &[]));
    for part in ["load-on-demand", "lru", "lfu", "static-hot", "belady", "repeat-last", "oracle"] {
        assert!(text.contains(part), "{part} is missing from\n{text}");
    }
    let report =
        json(&s.check(&[&replay[..], &["--json", "--policy", "lru", "--prefetch", "none"]].concat(), 0, &[]));
    let rows = report["rows"].as_array().expect("rows");
    // For each capacity the wanted one and the two controls, and the baseline.
    assert_eq!((report["schema"].as_str(), rows.len()), (Some("lightering.tier-replay/1"), 7));
    let hits = |policy: &str, slots: u64| {
        let row =
            rows.iter().find(|r| r["eviction"] == policy && r["prefetch"] == "none" && r["slots"] == slots);
        row.and_then(|r| r["hit_rate"].as_f64()).expect("a row")
    };
    assert!(hits("belady", 8) >= hits("lru", 8) && hits("lru", 32) > hits("lru", 8));
    // The same with real reads: chunks of 5000 bytes from a file that holds twenty of them.
    let small =
        "tier synth s.trace --groups 2 --chunks 8 --per-step 2 --steps 9 --chunk-size 5000 --computing 0";
    s.check(&small.split(' ').collect::<Vec<_>>(), 0, &[]);
    s.write("data", vec![7u8; 100_000]);
    let live = ["tier", "live", "s.trace", "--data", "data", "--capacity", "50%", "--policy", "lru"];
    let report =
        json(&s.check(&[&live[..], &["--prefetch", "none", "--json", "--steps", "8"]].concat(), 0, &[]));
    assert_eq!(
        (report["schema"].as_str(), report["steps"].as_u64()),
        (Some("lightering.tier-live/1"), Some(8))
    );
    for row in report["rows"].as_array().expect("rows").iter().take(2) {
        assert_eq!(row["live_hit_rate"], row["replayed"]["hit_rate"]);
        assert_eq!(row["live"]["accesses"], 32);
    }
    s.check(&[&live[..], &["--buffered", "--disk-rate", "1GB/s"]].concat(), 0, &[]);
    s.write("data", "small");
    s.check(&live, 2, &["less than one chunk", "try: "]);
    s.check(&["tier", "replay", "t.trace", "--policy", "fifo"], 2, &["lru-global"]);
    s.check(&["tier", "replay", "t.trace", "--capacity", "0"], 2, &["25%"]);
    s.check(&["tier", "replay", "none.trace"], 2, &["none.trace"]);
    s.check(&["tier", "synth", "u.trace", "--chunks", "4", "--per-step", "5"], 2, &["5 of 4 chunks"]);
    s.write("bad.trace", b"LTRC\x09\0");
    s.check(&["tier", "inspect", "bad.trace"], 2, &["bad.trace", "version 9"]);
}
