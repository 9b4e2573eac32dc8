//! The promise that a budget is a contract, checked on the real executable by the kernel's own count: whatever fits
//! holds and gives the same bits, whatever does not fit ends in exit code 3 with a budget that does.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Models of the test data folder that are tried besides the repository's own.
const MORE_MODELS: [&str; 3] =
    ["cifar10-resnet20.onnx", "efficientnet-lite0.onnx", "tiny-vww-mobilenet-fp32.onnx"];

fn repository_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/mobilenet_v1_0.75_192_quant.onnx")
}

fn test_data() -> Option<PathBuf> {
    let named = std::env::var_os("LIGHTER_TEST_DATA").map(PathBuf::from);
    let usual = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/lighter-test-data"));
    named.or_else(usual).filter(|folder| folder.is_dir())
}

struct Run {
    exit: i32,
    report: Value,
    error: String,
}

fn bench(model: &Path, memory: Option<u64>) -> Run {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut command = Command::new(env!("CARGO_BIN_EXE_lighter"));
    command.arg("bench").arg(model).args(["--json", "--warmup", "0", "--runs", "2", "--threads", "2"]);
    if let Some(memory) = memory {
        command.arg("--memory").arg(memory.to_string());
    }
    let output = command
        .env("XDG_CONFIG_HOME", folder.path())
        .stdin(Stdio::null())
        .output()
        .expect("the executable starts");
    Run {
        exit: output.status.code().expect("it was not killed"),
        report: serde_json::from_slice(&output.stdout).expect("JSON on stdout"),
        error: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// Runs resident, then under `tries` budgets drawn between a tenth of the resident peak and all of it.
fn check(model: &Path, tries: u64) {
    let resident = bench(model, None);
    assert_eq!(resident.exit, 0, "{}: {}", model.display(), resident.error);
    let receipt = &resident.report["receipt"];
    let peak = number(&receipt["measured"]["peak_beyond_fixed_bytes"]);
    let mut random = 0x9e37_79b9_7f4a_7c15u64 ^ peak;
    let mut fitted = 0;
    for _ in 0..tries {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let budget = peak / 10 + random % (peak - peak / 10);
        let run = bench(model, Some(budget));
        let place = format!("{} in {budget} bytes", model.display());
        match run.exit {
            0 => {
                fitted += 1;
                let got = &run.report["receipt"];
                assert_eq!(got["budget"]["held"], true, "{place}: {got}");
                assert_eq!(got["outputs"], receipt["outputs"], "{place}: other bits");
                let whole = number(&got["measured"]["peak_resident_bytes"]);
                assert!(whole <= budget + number(&got["measured"]["fixed_bytes"]), "{place}");
            }
            3 => assert!(run.error.contains("--memory"), "{place}: {}", run.error),
            other => panic!("{place}: exit code {other}: {}", run.error),
        }
    }
    assert!(fitted > 0, "{}: no budget below the resident peak fitted", model.display());
}

#[cfg(target_os = "linux")]
#[test]
fn every_budget_that_fits_holds_and_gives_the_same_bits() {
    let slow = std::env::var_os("LIGHTER_SLOW").is_some();
    check(&repository_model(), if slow { 30 } else { 6 });
    let Some(folder) = test_data() else {
        eprintln!(
            "skipped: more models, because LIGHTER_TEST_DATA is not set (see tools/fetch_test_data.sh)"
        );
        return;
    };
    for name in MORE_MODELS {
        match [folder.join("models").join(name), folder.join(name)].into_iter().find(|p| p.is_file()) {
            Some(model) => check(&model, if slow { 20 } else { 3 }),
            None => eprintln!("skipped: {name} is not in {}", folder.display()),
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn the_named_smallest_budget_is_enough() {
    let model = repository_model();
    let refused = bench(&model, Some(100_000));
    assert_eq!(refused.exit, 3, "{}", refused.error);
    let hint = refused.report["try"].as_str().expect("a next step");
    let mib: u64 = hint
        .trim_start_matches("--memory ")
        .trim_end_matches("MiB")
        .parse()
        .unwrap_or_else(|_| panic!("{hint:?} names no budget"));
    let enough = bench(&model, Some(mib << 20));
    assert_eq!(enough.exit, 0, "{}", enough.error);
}
