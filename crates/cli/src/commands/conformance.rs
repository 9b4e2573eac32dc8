//! `lighter conformance`: ONNX backend test cases as the package `onnx` ships them.

use crate::arguments::ConformanceArguments;
use crate::array::Tolerance;
use crate::failure::{Exit, Failure, Outcome};
use crate::model::{Means, Model, ModelSource};
use crate::output::{Output, Table};
use crate::usage::Baseline;
use crate::values::{self, LoadedInput};
use anyhow::Context;
use lightering_graph::ValueType;
use lightering_meter::{MachineProfile, MemoryPool};
use lightering_tier::FileSource;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Folders below the given one in which cases are looked for.
const DEPTH_MAX: usize = 6;

/// Most cases that are run.
const CASES_MAX: usize = 100_000;

/// How a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Passed,
    Failed,
    Unsupported,
}

#[derive(Debug, Serialize)]
struct Case {
    name: String,
    op: String,
    status: Status,
    reason: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
struct Counts {
    passed: usize,
    failed: usize,
    unsupported: usize,
}

impl Counts {
    fn add(&mut self, status: Status) {
        match status {
            Status::Passed => self.passed += 1,
            Status::Failed => self.failed += 1,
            Status::Unsupported => self.unsupported += 1,
        }
    }
}

#[derive(Debug, Serialize)]
struct ConformanceReport {
    schema: &'static str,
    passed: usize,
    failed: usize,
    unsupported: usize,
    per_op: BTreeMap<String, Counts>,
    cases: Vec<Case>,
}

/// Runs every case below the folder.
pub fn run(arguments: &ConformanceArguments, output: Output) -> Outcome {
    let mut folders = Vec::new();
    find_cases(&arguments.onnx, 0, &mut folders)?;
    folders.sort();
    let name = |folder: &Path| {
        let inside = folder.strip_prefix(&arguments.onnx).unwrap_or(folder);
        let name = inside.to_string_lossy().replace('\\', "/");
        if name.is_empty() { folder.to_string_lossy().into_owned() } else { name }
    };
    if let Some(filter) = &arguments.filter {
        folders.retain(|folder| name(folder).contains(filter.as_str()));
    }
    if folders.is_empty() {
        return Err(Failure::input(
            format!("no test case (a folder with model.onnx) below {}", arguments.onnx.display()),
            "the folder onnx/backend/test/data of the Python package onnx==1.18.0",
        ));
    }
    let profile = MachineProfile::conservative();
    let progress = output.progress(folders.len() as u64);
    let mut cases = Vec::with_capacity(folders.len());
    for folder in &folders {
        progress.set_message(name(folder));
        // A panic is a bug of ours and must not hide the other cases.
        let ran = std::panic::catch_unwind(|| run_case(folder, arguments, &profile));
        let (op, result) = ran.unwrap_or_else(|_| {
            let what = crate::take_panic();
            ("(panic)".to_owned(), Err(Trouble { unsupported: false, reason: format!("panic: {what}") }))
        });
        let (status, reason) = match result {
            Ok(()) => (Status::Passed, String::new()),
            Err(Trouble { unsupported: true, reason }) => (Status::Unsupported, reason),
            Err(Trouble { unsupported: false, reason }) => (Status::Failed, reason),
        };
        cases.push(Case { name: name(folder), op, status, reason });
        progress.inc(1);
    }
    progress.finish_and_clear();

    let mut total = Counts::default();
    let mut per_op: BTreeMap<String, Counts> = BTreeMap::new();
    for case in &cases {
        total.add(case.status);
        per_op.entry(case.op.clone()).or_default().add(case.status);
    }
    let report = ConformanceReport {
        schema: "lightering.conformance/1",
        passed: total.passed,
        failed: total.failed,
        unsupported: total.unsupported,
        per_op,
        cases,
    };
    output.result(&report, &text(&report))?;
    let required = arguments.require.unwrap_or(0);
    if report.passed < required {
        return Err(Failure {
            exit: Exit::Missed,
            error: anyhow::anyhow!("{} cases passed, but {required} were required", report.passed),
            hint: None,
            smallest: None,
        });
    }
    if report.failed > 0 && arguments.require.is_none() {
        return Ok(Exit::Missed);
    }
    Ok(Exit::Done)
}

fn text(report: &ConformanceReport) -> String {
    let mut table = Table::new(&["op", ">passed", ">failed", ">unsupported"]);
    for (op, counts) in &report.per_op {
        table.row([
            op.clone(),
            counts.passed.to_string(),
            counts.failed.to_string(),
            counts.unsupported.to_string(),
        ]);
    }
    let mut text = table.text();
    // Writing to a String cannot fail.
    let bad: Vec<&Case> = report.cases.iter().filter(|c| c.status != Status::Passed).collect();
    if !bad.is_empty() {
        text.push('\n');
    }
    for case in bad {
        let word = if case.status == Status::Failed { "failed" } else { "unsupported" };
        let _ = writeln!(text, "{word} {}: {}", case.name, case.reason);
    }
    let _ = writeln!(
        text,
        "\npassed {}, failed {}, unsupported {} of {}",
        report.passed,
        report.failed,
        report.unsupported,
        report.cases.len()
    );
    text
}

fn find_cases(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Outcome<()> {
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("reading the folder {}", folder.display()))?;
    if folder.join("model.onnx").is_file() {
        found.push(folder.to_owned());
    }
    if found.len() > CASES_MAX {
        return Err(Failure::input(format!("more than {CASES_MAX} test cases"), "a smaller folder"));
    }
    for entry in entries {
        let entry = entry.with_context(|| format!("reading the folder {}", folder.display()))?;
        // The file type of the entry itself, so that a link to a folder above cannot lead round in a circle.
        let is_folder = entry.file_type().map(|t| t.is_dir()).unwrap_or(false);
        if is_folder && depth < DEPTH_MAX {
            find_cases(&entry.path(), depth + 1, found)?;
        }
    }
    Ok(())
}

/// Why a case did not pass.
struct Trouble {
    unsupported: bool,
    reason: String,
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Trouble {
        Trouble { unsupported: failure.is_unsupported(), reason: format!("{:#}", failure.error) }
    }
}

/// Runs one case; also tells the operator that it is about.
fn run_case(
    folder: &Path,
    arguments: &ConformanceArguments,
    profile: &MachineProfile,
) -> (String, Result<(), Trouble>) {
    let pool = MemoryPool::with_limit(arguments.memory);
    let baseline = Baseline::now();
    let path = folder.join("model.onnx");
    let op = Model::operators(&path).map_or("(unreadable)".to_owned(), |ops| match &ops[..] {
        [only] => only.clone(),
        _ => "(several)".to_owned(),
    });
    let run = || -> Result<(), Trouble> {
        let sets = data_sets(folder)?;
        if sets.is_empty() {
            return Err(Failure::input("no test_data_set_N folder", "").into());
        }
        for set in sets {
            let model = Model::open(&ModelSource::File(path.clone()))?;
            let (ports, out_ports) = (model.inputs(), model.outputs());
            let random = model.is_random();
            let mut inputs = Vec::new();
            for (index, port) in ports.iter().enumerate() {
                let file = set.join(format!("input_{index}.pb"));
                if !file.is_file() {
                    return Err(Failure::input(format!("{} is missing", file.display()), "").into());
                }
                let source = FileSource::open(&file).map_err(Failure::from)?;
                let value = values::read_pb(&source, &port.ty)?;
                let held = pool
                    .reserve(format!("input {}", port.name), values::size_of_value(&value))
                    .map_err(Failure::from)?;
                inputs.push(LoadedInput { name: port.name.clone(), value, held });
            }
            let dimensions = values::bind_dimensions(&[], &inputs, &ports)?;
            let means = Means { threads: arguments.threads, profile, pool: &pool, baseline: &baseline };
            let mut session = model.plan(&dimensions, &inputs, means, false)?;
            let outputs = session.run(&inputs)?;
            for (index, port) in out_ports.iter().enumerate() {
                let file = set.join(format!("output_{index}.pb"));
                let source = FileSource::open(&file).map_err(Failure::from)?;
                let (_, actual) = outputs
                    .iter()
                    .find(|(name, _)| *name == port.name)
                    .ok_or_else(|| Failure::input(format!("no output {:?}", port.name), ""))?;
                // The actual value tells what kind of value the file holds, where the model leaves it open.
                let ty = match (&port.ty, actual) {
                    (ValueType::Unknown, actual) => actual.value_type(),
                    (ty, _) => ty.clone(),
                };
                let expected = values::read_pb(&source, &ty)?;
                let tolerance = Tolerance { relative: arguments.rtol, absolute: arguments.atol };
                let comparison = values::compare_values(actual, &expected, tolerance);
                if !comparison.equal && comparison.elements > 0 && random {
                    let reason = "random numbers: type and shape agree, values cannot be compared".to_owned();
                    return Err(Trouble { unsupported: true, reason });
                }
                if !comparison.equal {
                    let reason = format!(
                        "output {:?}: {} ({} of {} elements differ)",
                        port.name, comparison.difference, comparison.mismatched, comparison.elements
                    );
                    return Err(Trouble { unsupported: false, reason });
                }
            }
        }
        Ok(())
    };
    let result = run();
    (op, result)
}

/// The folders `test_data_set_0`, `test_data_set_1`, … of a case.
fn data_sets(folder: &Path) -> Outcome<Vec<PathBuf>> {
    let mut sets: Vec<PathBuf> =
        (0..).map(|n| folder.join(format!("test_data_set_{n}"))).take_while(|p| p.is_dir()).collect();
    sets.truncate(CASES_MAX);
    Ok(sets)
}
