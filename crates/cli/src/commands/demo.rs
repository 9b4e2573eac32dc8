//! `lighter demo`: the embedded model on its embedded picture: resident, at half and at a quarter of that memory.

use crate::arguments::DemoArguments;
use crate::embedded;
use crate::failure::{Exit, Failure, Outcome};
use crate::fixed_cost::TemporaryFolder;
use crate::output::{Output, Table};
use anyhow::Context;
use lightering_meter::Receipt;
use lightering_units::Bytes;
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// The smallest budget is rounded up to a multiple of this, because what the heap holds varies a little.
const ROUNDING: u64 = 128 << 10;

/// What this command reads of the answer of `lighter run --json`.
#[derive(Debug, Deserialize)]
struct Answer {
    outputs: Vec<AnswerOutput>,
    receipt: Receipt,
}

#[derive(Debug, Deserialize)]
struct AnswerOutput {
    top_k: Vec<AnswerRank>,
}

#[derive(Debug, Deserialize)]
struct AnswerRank {
    value: f64,
    label: Option<String>,
}

#[derive(Debug, Serialize)]
struct DemoReport {
    schema: &'static str,
    answer: String,
    same_bits: bool,
    receipts: Vec<Receipt>,
}

/// Runs three times, each in a process of its own so that the kernel's peak is that of one run.
pub fn run(arguments: &DemoArguments, output: Output) -> Outcome {
    let folder = TemporaryFolder::new()?;
    let place = |name: &str| folder.path().join(name);
    let put = |name: &str, bytes: &[u8]| {
        std::fs::write(place(name), bytes).with_context(|| format!("writing {}", place(name).display()))
    };
    put(embedded::MODEL_NAME, embedded::MODEL)?;
    put(embedded::PICTURE_NAME, embedded::PICTURE)?;
    put("labels.txt", embedded::LABELS.as_bytes())?;
    let progress = output.progress(3);

    progress.set_message("resident");
    let resident = answer(arguments, folder.path(), None)?;
    let peak =
        resident.receipt.measured.peak_beyond_fixed_bytes.unwrap_or(resident.receipt.predicted.planned_bytes);
    let mut answers = vec![resident];
    let mut names = vec!["resident"];
    let mut refusals = String::new();
    for (divisor, name) in [(2, "half"), (4, "quarter")] {
        progress.inc(1);
        progress.set_message(name);
        let budget = Bytes(peak.0 / divisor);
        match answer(arguments, folder.path(), Some(budget)) {
            // A refusal names the smallest budget that does: say so, and show that one rather than nothing.
            Err(Failure { exit: Exit::Budget, smallest: Some(smallest), .. }) => {
                // Writing to a String cannot fail.
                let _ = writeln!(
                    refusals,
                    "{name} ({budget}) is refused before anything runs: the smallest budget with a plan is {smallest}"
                );
                if !names.contains(&"smallest") {
                    answers.push(answer(arguments, folder.path(), Some(smallest.align_up(ROUNDING)))?);
                    names.push("smallest");
                }
            }
            other => {
                answers.push(other?);
                names.push(name);
            }
        }
    }
    progress.finish_and_clear();

    let checksums = |answer: &Answer| -> Vec<String> {
        answer.receipt.outputs.iter().map(|o| o.sha256.clone()).collect()
    };
    let same_bits = answers.iter().all(|a| checksums(a) == checksums(&answers[0]));
    let best = answers[0].outputs.first().and_then(|o| o.top_k.first());
    let said = best.map_or("no answer".to_owned(), |rank| {
        format!("{} ({})", rank.label.clone().unwrap_or_default(), rank.value)
    });

    let mut table = Table::new(&["run", ">budget", ">planned", ">measured", ">time", "bits", "plan"]);
    for (answer, name) in answers.iter().zip(names) {
        let receipt = &answer.receipt;
        table.row([
            name.to_owned(),
            receipt.budget.memory_bytes.map_or("none".to_owned(), |b| b.to_string()),
            receipt.predicted.planned_bytes.to_string(),
            receipt.measured.peak_beyond_fixed_bytes.map_or("unavailable".to_owned(), |b| b.to_string()),
            receipt.measured.seconds.to_string(),
            checksums(answer).first().map_or(String::new(), |sum| sum.chars().take(12).collect()),
            receipt.plan.strategy.clone(),
        ]);
    }
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{} on {}: {said}\n", embedded::MODEL_NAME, embedded::PICTURE_NAME);
    text.push_str(&table.text());
    text.push_str(&refusals);
    let fixed = answers[0].receipt.measured.fixed_bytes.unwrap_or_default();
    let _ = writeln!(
        text,
        "\nMemory is what the process held beyond the program's own fixed cost ({fixed}), as the kernel counted it."
    );
    let report = DemoReport {
        schema: "lightering.demo/1",
        answer: said,
        same_bits,
        receipts: answers.into_iter().map(|a| a.receipt).collect(),
    };
    output.result(&report, &text)?;
    if !same_bits {
        return Err(Failure {
            exit: Exit::Missed,
            error: anyhow::anyhow!("the runs do not give the same bits"),
            hint: Some("this is a bug; please report it with the receipts (--json)".to_owned()),
            smallest: None,
        });
    }
    Ok(Exit::Done)
}

fn answer(arguments: &DemoArguments, folder: &Path, memory: Option<Bytes>) -> Outcome<Answer> {
    let program = std::env::current_exe().context("finding this program's own file")?;
    let mut command = Command::new(&program);
    command
        .arg("run")
        .arg(folder.join(embedded::MODEL_NAME))
        .arg("--input")
        .arg(folder.join(embedded::PICTURE_NAME))
        .args(["--json", "--quiet", "--top-k", "5", "--labels"])
        .arg(folder.join("labels.txt"));
    if let Some(memory) = memory {
        command.arg("--memory").arg(memory.0.to_string());
    }
    if let Some(threads) = arguments.threads {
        command.arg("--threads").arg(threads.to_string());
    }
    let child =
        command.stdin(Stdio::null()).output().with_context(|| format!("running {}", program.display()))?;
    let budget = memory.map_or("without a budget".to_owned(), |m| format!("in {m}"));
    if !child.status.success() {
        let exit = match child.status.code() {
            Some(1) => Exit::Missed,
            Some(2) => Exit::Input,
            Some(3) => Exit::Budget,
            _ => Exit::Internal,
        };
        let why = String::from_utf8_lossy(&child.stderr).trim().trim_start_matches("error: ").to_owned();
        let mut failure = Failure::new(exit, anyhow::anyhow!("the run {budget} failed: {why}"));
        let told: Option<serde_json::Value> = serde_json::from_slice(&child.stdout).ok();
        failure.smallest = told.and_then(|t| t["smallest_memory_bytes"].as_u64()).map(Bytes);
        return Err(failure);
    }
    let answer = serde_json::from_slice(&child.stdout)
        .with_context(|| format!("reading the answer of the run {budget}"))?;
    Ok(answer)
}
