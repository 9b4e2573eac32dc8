//! `lighter train` as a user types it.

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

fn lighter(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lighter"));
    command.args(arguments);
    command
}

fn json(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn losses(report: &serde_json::Value) -> Vec<f64> {
    report["losses"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// Pictures of bars that lie or stand, in the files of MNIST.
fn bars(folder: &Path, count: usize) {
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    images.extend([0, 0, 8, 3]);
    labels.extend([0, 0, 8, 1]);
    for n in [count, 28, 28] {
        images.extend((n as u32).to_be_bytes());
    }
    labels.extend((count as u32).to_be_bytes());
    let mut state = 1u32;
    for i in 0..count {
        let class = i % 2;
        labels.push(class as u8);
        for pixel in 0..28 * 28 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let along = if class == 0 { pixel / 28 } else { pixel % 28 };
            let bar = along / 4 % 2 == 0;
            images.push((state >> 25) as u8 + if bar { 120 } else { 0 });
        }
    }
    for part in ["train", "t10k"] {
        std::fs::write(folder.join(format!("{part}-images-idx3-ubyte")), &images).unwrap();
        std::fs::write(folder.join(format!("{part}-labels-idx1-ubyte")), &labels).unwrap();
    }
}

#[test]
fn a_network_learns_and_the_written_model_runs() {
    let folder = tempfile::tempdir().unwrap();
    bars(folder.path(), 128);
    let model = folder.path().join("bars.onnx");
    let (data, model) = (folder.path().to_str().unwrap(), model.to_str().unwrap());
    let page = folder.path().join("curves.html");
    let arguments = [
        "train",
        "cnn:width=8",
        "--data",
        data,
        "--epochs",
        "4",
        "--batch",
        "16",
        "--lr",
        "0.01",
        "--json",
        "--report",
        page.to_str().unwrap(),
        "-o",
        model,
    ];
    let report = json(&lighter(&arguments).output().unwrap());
    assert_eq!(report["steps"], 32);
    let all = losses(&report);
    assert!(all[31] < all[0] / 4.0, "{all:?}");
    assert_eq!(report["epochs"][3]["validation_accuracy"], 1.0);
    assert!(std::fs::read_to_string(&page).unwrap().contains("<svg"));
    let again = json(&lighter(&arguments).output().unwrap());
    assert_eq!(losses(&again), all, "another sequence for the same seed");
    // What was written is a model like any other, and can be trained on.
    let inspected = lighter(&["inspect", model, "--json"]).output().unwrap();
    assert!(inspected.status.success());
    let on = json(
        &lighter(&["train", model, "--data", data, "--steps", "2", "--json", "-o", model]).output().unwrap(),
    );
    assert!(losses(&on)[0] < all[0] / 2.0, "it began anew: {:?}", losses(&on));
}

#[test]
fn a_budget_changes_no_loss() {
    let folder = tempfile::tempdir().unwrap();
    bars(folder.path(), 128);
    let data = folder.path().to_str().unwrap();
    let out = folder.path().join("o.onnx");
    let spill = folder.path().to_str().unwrap();
    let run = |memory: &str| {
        let mut command = lighter(&[
            "train",
            "resnet18:width=16",
            "--data",
            data,
            "--steps",
            "3",
            "--batch",
            "128",
            "--json",
            "-o",
            out.to_str().unwrap(),
            "--spill",
            spill,
        ]);
        if !memory.is_empty() {
            command.args(["--memory", memory]);
        }
        command.output().unwrap()
    };
    let free = json(&run(""));
    let peak = free["predicted_peak_bytes"].as_u64().unwrap();
    for percent in [70, 50] {
        let output = run(&format!("{}B", peak * percent / 100 + (4 << 20)));
        let report = json(&output);
        assert_eq!(losses(&report), losses(&free), "at {percent} %");
        assert!(report["predicted_peak_bytes"].as_u64().unwrap() < peak);
        let techniques: Vec<&str> = report["decisions"]
            .as_array()
            .unwrap()
            .iter()
            .map(|d| d["technique"].as_str().unwrap())
            .collect();
        assert!(
            techniques.iter().any(|t| ["recompute", "spill", "states on the disk"].contains(t)),
            "{techniques:?}"
        );
    }
    let refused = run("2MiB");
    assert_eq!(refused.status.code(), Some(3), "{}", String::from_utf8_lossy(&refused.stderr));
}

#[test]
fn killed_at_any_time_it_goes_on_with_the_same_losses() {
    let folder = tempfile::tempdir().unwrap();
    bars(folder.path(), 64);
    let data = folder.path().to_str().unwrap().to_owned();
    let out = folder.path().join("o.onnx").to_str().unwrap().to_owned();
    let run = |checkpoints: &Path, resume: bool| {
        let mut command =
            lighter(&["train", "cnn:width=8", "--data", &data, "--steps", "90", "--epochs", "60"]);
        command.args([
            "--batch",
            "16",
            "--augment",
            "flip,crop=2",
            "--optimizer",
            "adam",
            "--json",
            "-o",
            &out,
        ]);
        command.arg("--checkpoints").arg(checkpoints).args(["--checkpoint-every", "3"]);
        if resume {
            command.arg("--resume");
        }
        command
    };
    let whole = folder.path().join("whole");
    let expected = losses(&json(&run(&whole, false).output().unwrap()));
    let broken = folder.path().join("broken");
    let mut child = run(&broken, false).stdout(std::process::Stdio::null()).spawn().unwrap();
    let began = Instant::now();
    let steps = || {
        let entries = std::fs::read_dir(&broken).into_iter().flatten().flatten();
        entries
            .filter_map(|e| {
                e.file_name().to_str()?.strip_prefix("step-")?.strip_suffix(".safetensors")?.parse().ok()
            })
            .max()
            .unwrap_or(0u64)
    };
    while steps() < 20 && began.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let report = json(&run(&broken, true).output().unwrap());
    let tail = losses(&report);
    assert!(!tail.is_empty() && tail.len() < expected.len(), "{} steps were left", tail.len());
    assert_eq!(tail[..], expected[expected.len() - tail.len()..]);
    // Other options would give other losses.
    let other = run(&broken, true).args(["--seed", "5"]).output().unwrap();
    assert_eq!(other.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&other.stderr).contains("seed"));
}

#[test]
fn slips_are_told() {
    let folder = tempfile::tempdir().unwrap();
    bars(folder.path(), 32);
    let data = folder.path().to_str().unwrap();
    let fails = |arguments: &[&str], code: i32, part: &str| {
        let mut all = vec!["train"];
        all.extend(arguments);
        let output = lighter(&all).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        assert!(text.contains(part), "{arguments:?}: {text}");
    };
    fails(&["cnn", "--data", "/no/such/folder"], 2, "/no/such/folder");
    fails(&["cn", "--data", data], 2, "cnn");
    fails(&["cnn", "--data", data, "--optimizer", "sdg"], 2, "adam");
    fails(&["cnn", "--data", data, "--lr", "1e9"], 2, "learning rate");
    fails(&["cnn", "--data", data, "--batch", "1000"], 2, "smaller");
    fails(&["cnn", "--data", data, "--resume", "--checkpoints", data], 2, "no checkpoint");
    let out = folder.path().join("o.onnx");
    let rate =
        ["cnn", "--data", data, "--batch", "8", "--optimizer", "sgd", "--lr", "100", "--epochs", "40", "-o"];
    fails(&[&rate[..], &[out.to_str().unwrap()]].concat(), 1, "the loss is");
}
