//! The ONNX backend cases, each in a child process, so that a panic, an abort or an endless loop costs one case.

use crate::onnx::{ModelProto, read_value};
use crate::value::compare;
use crate::{Engine, Value, options};
use anyhow::{Context, Result, bail};
use prost::Message;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const SUITES: [&str; 4] = ["node", "simple", "pytorch-operator", "pytorch-converted"];
/// The tolerances of ONNX's own backend runner.
const RTOL: f64 = 1e-3;
const ATOL: f64 = 1e-7;

#[derive(Default, Serialize)]
struct Counts {
    passed: usize,
    failed: usize,
    unsupported: usize,
}

impl Counts {
    fn add(&mut self, status: &str) {
        match status {
            "passed" => self.passed += 1,
            "unsupported" => self.unsupported += 1,
            _ => self.failed += 1,
        }
    }
}

#[derive(Serialize)]
struct Case {
    name: String,
    suite: String,
    op: String,
    status: String,
    detail: String,
}

fn read_model(dir: &Path) -> Result<ModelProto> {
    Ok(ModelProto::decode(std::fs::read(dir.join("model.onnx"))?.as_slice())?)
}

/// The operator that a case is about: the only one in its graph; for a function's expansion, the function's;
/// else "(several)".
fn operator(dir: &Path) -> String {
    let ops = |dir: &Path| -> BTreeSet<String> {
        let nodes = read_model(dir).ok().and_then(|m| m.graph).map(|g| g.node).unwrap_or_default();
        nodes.into_iter().map(|n| n.op_type).collect()
    };
    let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let of = match name.split_once("_expanded") {
        Some((plain, _)) if dir.with_file_name(plain).exists() => ops(&dir.with_file_name(plain)),
        _ => ops(dir),
    };
    let mut of: Vec<String> = of.into_iter().filter(|op| op != "Constant").collect();
    match of.len() {
        0 => "Constant".to_owned(),
        1 => of.remove(0),
        _ => "(several)".to_owned(),
    }
}

/// Runs one case and prints `passed`, `failed` or `unsupported` with a reason.
/// An error that the engine reports itself is "unsupported"; a wrong answer or a panic is "failed".
pub fn one<E: Engine>(arguments: &[String]) -> Result<()> {
    let [dir] = arguments else { bail!("case DIR") };
    let (status, detail) = run_case::<E>(Path::new(dir));
    println!("{}", serde_json::json!({ "status": status, "detail": detail }));
    Ok(())
}

fn run_case<E: Engine>(dir: &Path) -> (&'static str, String) {
    let mut outcome = ("unsupported", String::new());
    for attempt in 0..E::ATTEMPTS {
        let result = std::panic::catch_unwind(|| attempt_case::<E>(dir, attempt));
        let now = match result {
            Ok(Ok(Ok(()))) => return ("passed", String::new()),
            Ok(Ok(Err(wrong))) => ("failed", wrong),
            Ok(Err(refused)) => ("unsupported", format!("{refused:#}")),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
                ("failed", format!("panic: {}", text.unwrap_or_default()))
            }
        };
        // A wrong answer outweighs a refusal, whichever attempt gave it.
        if attempt == 0 || now.0 == "failed" {
            outcome = now;
        }
    }
    outcome
}

fn attempt_case<E: Engine>(dir: &Path, attempt: usize) -> Result<Result<(), String>> {
    let graph = read_model(dir)?.graph.context("no graph")?;
    let initializers: BTreeSet<&str> = graph.initializer.iter().map(|i| i.name.as_str()).collect();
    let declared: Vec<_> = graph.input.iter().filter(|i| !initializers.contains(i.name.as_str())).collect();
    let mut data: Vec<PathBuf> = std::fs::read_dir(dir)?
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("test_data_set_")))
        .collect();
    data.sort();
    for set in data {
        let mut inputs = Vec::new();
        for (index, info) in declared.iter().enumerate() {
            let path = set.join(format!("input_{index}.pb"));
            if path.exists() {
                inputs.push((info.name.clone(), read_value(&path, info)?));
            }
        }
        let mut expected: Vec<Value> = Vec::new();
        for (index, info) in graph.output.iter().enumerate() {
            let path = set.join(format!("output_{index}.pb"));
            if path.exists() {
                expected.push(read_value(&path, info)?);
            }
        }
        let mut engine = E::load(&dir.join("model.onnx"), &inputs, 1, attempt)?;
        engine.run()?;
        let outputs = engine.outputs()?;
        if outputs.len() < expected.len() {
            return Ok(Err(format!("{} outputs instead of {}", outputs.len(), expected.len())));
        }
        for (index, (expected, (_, got))) in expected.iter().zip(&outputs).enumerate() {
            if let Err(why) = compare(expected, got, RTOL, ATOL, E::STRICT_DTYPES) {
                return Ok(Err(format!("output {index}: {why}")));
            }
        }
    }
    Ok(Ok(()))
}

fn child(dir: &Path, timeout: Duration) -> Result<(String, String)> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg("case")
        .arg(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let start = Instant::now();
    let exit = loop {
        match child.try_wait()? {
            Some(exit) => break exit,
            None if start.elapsed() > timeout => {
                child.kill()?;
                child.wait()?;
                return Ok(("failed".to_owned(), format!("no answer in {} s", timeout.as_secs())));
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    let mut text = String::new();
    child.stdout.take().context("no pipe")?.read_to_string(&mut text)?;
    match serde_json::from_str::<serde_json::Value>(text.lines().last().unwrap_or_default()) {
        Ok(v) if exit.success() => {
            let field =
                |name: &str| v[name].as_str().unwrap_or_default().chars().take(300).collect::<String>();
            Ok((field("status"), field("detail")))
        }
        _ => Ok(("failed".to_owned(), format!("process ended with {exit}"))),
    }
}

pub fn main<E: Engine>(arguments: &[String]) -> Result<()> {
    let (_, named) = options(arguments)?;
    let (mut root, mut timeout, mut json) = (None, 30u64, None);
    for (name, value) in &named {
        match name.as_str() {
            "onnx" => root = Some(PathBuf::from(value)),
            "timeout" => timeout = value.parse()?,
            "json" => json = Some(PathBuf::from(value)),
            other => bail!("unknown option --{other}"),
        }
    }
    let root = root.context("--onnx DIR is needed: the folder that holds node/, simple/ …")?;
    let mut cases = Vec::new();
    for suite in SUITES {
        let Ok(entries) = std::fs::read_dir(root.join(suite)) else { continue };
        let mut dirs: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
        dirs.retain(|d| d.join("model.onnx").exists());
        dirs.sort();
        for dir in dirs {
            let (status, detail) = child(&dir, Duration::from_secs(timeout))?;
            let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
            cases.push(Case { name, suite: suite.to_owned(), op: operator(&dir), status, detail });
        }
    }
    let mut total = Counts::default();
    let mut suites: BTreeMap<&str, Counts> = BTreeMap::new();
    let mut ops: BTreeMap<&str, Counts> = BTreeMap::new();
    for case in &cases {
        total.add(&case.status);
        suites.entry(&case.suite).or_default().add(&case.status);
        ops.entry(&case.op).or_default().add(&case.status);
    }
    let report = serde_json::json!({
        "engine": E::NAME, "version": E::VERSION, "rtol": RTOL, "atol": ATOL, "timeout_seconds": timeout,
        "meaning": "unsupported: the engine itself refused with an error; failed: wrong answer, panic, crash or timeout",
        "passed": total.passed, "failed": total.failed, "unsupported": total.unsupported,
        "suites": suites, "per_op": ops, "cases": cases,
    });
    match json {
        Some(path) => std::fs::write(path, serde_json::to_string_pretty(&report)?)?,
        None => println!("{}", serde_json::to_string_pretty(&report)?),
    }
    eprintln!(
        "{} {}: {} passed, {} failed, {} unsupported",
        E::NAME,
        E::VERSION,
        total.passed,
        total.failed,
        total.unsupported
    );
    Ok(())
}
