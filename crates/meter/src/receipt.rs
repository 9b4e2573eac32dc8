//! The receipt: what was planned, what was used, and how far apart the two are. Its schema is `docs/receipt.md`.

use crate::{Energy, MachineProfile, MeterError, host};
use lightering_units::{Bytes, Seconds};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// The schema name that a receipt carries.
pub const RECEIPT_SCHEMA: &str = "lightering.receipt/1";

/// Which model ran.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelIdentity {
    /// The path as the user gave it, or `embedded:NAME`.
    pub path: String,
    /// Size of the file.
    pub size_bytes: Bytes,
    /// SHA-256 of the file; `null` when it was not computed.
    pub sha256: Option<String>,
}

/// Which machine ran it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineSummary {
    /// The processor's name.
    pub cpu: String,
    /// Operating system and architecture.
    pub system: String,
    /// Cores that the process may use.
    pub cores: u32,
    /// Physical memory; `null` when unknown.
    pub memory_bytes: Option<Bytes>,
    /// `measured` when the planner used a profile of `lighter doctor`, else `default`.
    pub profile: String,
}

impl MachineSummary {
    /// This machine, with the profile that the planner used.
    pub fn of_this_machine(profile: &MachineProfile) -> MachineSummary {
        MachineSummary {
            cpu: host::cpu_name(),
            system: host::system(),
            cores: host::cores(),
            memory_bytes: host::memory_total(),
            profile: match profile.source {
                crate::ProfileSource::Measured => "measured".to_owned(),
                crate::ProfileSource::Default => "default".to_owned(),
            },
        }
    }
}

/// What the user allowed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Budget {
    /// `--memory`; `null` when none was given.
    pub memory_bytes: Option<Bytes>,
    /// Whether the measured peak beyond the fixed cost stayed inside; `null` without a budget or a measurement.
    pub held: Option<bool>,
}

/// What the plan said before the run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Predicted {
    /// Peak resident memory of the whole process: `fixed_bytes` plus everything planned.
    pub peak_bytes: Bytes,
    /// Everything planned: weights, activations, scratch, buffers. A budget bounds this.
    pub planned_bytes: Bytes,
    /// The program's own fixed cost as assumed before the run.
    pub fixed_bytes: Bytes,
    /// Time of one run; `null` when the plan makes no prediction.
    pub seconds: Option<Seconds>,
}

/// What the kernel and the clock said after it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Peak resident memory of the whole process (`VmHWM`); `null` when unavailable.
    pub peak_resident_bytes: Option<Bytes>,
    /// The program's own fixed cost: its code pages and what it held before it opened the model.
    pub fixed_bytes: Option<Bytes>,
    /// `peak_resident_bytes` less `fixed_bytes`: what the budget is about.
    pub peak_beyond_fixed_bytes: Option<Bytes>,
    /// Peak of the program's own count of its reservations.
    pub pool_peak_bytes: Option<Bytes>,
    /// Peak of the memory control group, page cache and other processes in it included.
    pub cgroup_peak_bytes: Option<Bytes>,
    /// Wall time of the run, the model being loaded (median when there were several runs).
    pub seconds: Seconds,
    /// Wall time of reading, optimizing and planning the model.
    pub load_seconds: Option<Seconds>,
    /// CPU time of the whole process.
    pub cpu_seconds: Option<Seconds>,
    /// Page faults without a disk read.
    pub minor_faults: Option<u64>,
    /// Page faults with a disk read.
    pub major_faults: Option<u64>,
}

/// How far the prediction was off, in percent of the measured value; positive when too high.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PredictionError {
    /// Of `predicted.peak_bytes` against `measured.peak_resident_bytes`.
    pub peak_percent: Option<f64>,
    /// Of `predicted.seconds` against `measured.seconds`.
    pub seconds_percent: Option<f64>,
}

/// One decision of the planner.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanStep {
    /// The tensor or node that it is about.
    pub what: String,
    /// Bytes that it concerns: streamed, split or computed again.
    pub bytes: Bytes,
    /// Why, as a sentence.
    pub why: String,
}

/// What the planner decided.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PlanSummary {
    /// Name of the strategy, such as `resident` or `streamed weights`.
    pub strategy: String,
    /// Size of the activation arena.
    pub arena_bytes: Bytes,
    /// The largest set of activations that live at once: no arena can be smaller.
    pub arena_lower_bound_bytes: Bytes,
    /// Weights that stay in memory.
    pub weights_resident_bytes: Bytes,
    /// The tensor or node that sets the peak; empty when unknown.
    pub peak_at: String,
    /// Weights read from the file while running.
    pub streamed: Vec<PlanStep>,
    /// Nodes computed in pieces.
    pub split: Vec<PlanStep>,
    /// Tensors computed again rather than kept.
    pub recomputed: Vec<PlanStep>,
}

/// One output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OutputReceipt {
    /// The graph's name for it.
    pub name: String,
    /// Element type.
    pub dtype: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// SHA-256 of the elements as little-endian bytes in row-major order.
    pub sha256: String,
}

/// What one command used. Written by `--receipt FILE` and inside `--json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Receipt {
    /// [`RECEIPT_SCHEMA`].
    pub schema: String,
    /// Version of the program.
    pub version: String,
    /// The command, such as `run` or `bench`.
    pub command: String,
    /// The model.
    pub model: ModelIdentity,
    /// The machine.
    pub machine: MachineSummary,
    /// Instruction set that the kernels used.
    pub isa: String,
    /// Threads that computed.
    pub threads: u32,
    /// The budget.
    pub budget: Budget,
    /// What was predicted.
    pub predicted: Predicted,
    /// What was measured.
    pub measured: Measured,
    /// How far apart the two are.
    pub error: PredictionError,
    /// Bytes read, by tier (`ram`, `ssd`, …); a tier that was not used is absent.
    pub bytes_read_by_tier: BTreeMap<String, Bytes>,
    /// Energy and how it was obtained.
    pub energy: Energy,
    /// What the planner decided.
    pub plan: PlanSummary,
    /// The outputs.
    pub outputs: Vec<OutputReceipt>,
}

/// (predicted − measured) / measured in percent; `None` when `measured` is not positive.
pub fn percent_error(predicted: f64, measured: f64) -> Option<f64> {
    (measured > 0.0 && predicted.is_finite()).then(|| (predicted - measured) / measured * 100.0)
}

impl Receipt {
    /// Fills in `error`, `measured.peak_beyond_fixed_bytes` and `budget.held` from the other fields.
    pub fn settle(&mut self) {
        let measured = &mut self.measured;
        measured.peak_beyond_fixed_bytes = measured
            .peak_resident_bytes
            .zip(measured.fixed_bytes)
            .map(|(peak, fixed)| peak.saturating_sub(fixed));
        self.budget.held =
            self.budget.memory_bytes.zip(measured.peak_beyond_fixed_bytes).map(|(limit, peak)| peak <= limit);
        self.error.peak_percent = measured
            .peak_resident_bytes
            .and_then(|peak| percent_error(self.predicted.peak_bytes.0 as f64, peak.0 as f64));
        self.error.seconds_percent =
            self.predicted.seconds.and_then(|seconds| percent_error(seconds.0, measured.seconds.0));
    }

    /// Writes the receipt as JSON.
    ///
    /// # Errors
    /// [`MeterError::Io`] when the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), MeterError> {
        let mut text = serde_json::to_string_pretty(self).expect("a receipt has only plain fields");
        text.push('\n');
        std::fs::write(path, text).map_err(|source| MeterError::Io { path: path.to_owned(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::collections::BTreeSet;

    fn full_receipt() -> Receipt {
        let step = PlanStep { what: "fc.weight".into(), bytes: Bytes(1), why: "It is the largest.".into() };
        Receipt {
            schema: RECEIPT_SCHEMA.into(),
            version: "0.1.0".into(),
            command: "run".into(),
            model: ModelIdentity { path: "m.onnx".into(), size_bytes: Bytes(9), sha256: None },
            machine: MachineSummary::of_this_machine(&MachineProfile::conservative()),
            isa: "avx2".into(),
            threads: 2,
            budget: Budget { memory_bytes: Some(Bytes(100)), held: None },
            predicted: Predicted {
                peak_bytes: Bytes(103),
                planned_bytes: Bytes(93),
                fixed_bytes: Bytes(10),
                seconds: Some(Seconds(1.5)),
            },
            measured: Measured {
                peak_resident_bytes: Some(Bytes(100)),
                fixed_bytes: Some(Bytes(8)),
                seconds: Seconds(2.0),
                ..Measured::default()
            },
            error: PredictionError::default(),
            bytes_read_by_tier: BTreeMap::from([("ssd".to_owned(), Bytes(5))]),
            energy: Energy::unavailable("no counter"),
            plan: PlanSummary {
                strategy: "resident".into(),
                streamed: vec![step.clone()],
                split: vec![step.clone()],
                recomputed: vec![step],
                ..PlanSummary::default()
            },
            outputs: vec![OutputReceipt {
                name: "y".into(),
                dtype: "f32".into(),
                shape: vec![1, 2],
                sha256: "00".into(),
            }],
        }
    }

    #[test]
    fn settling_sets_predicted_beside_measured() {
        let mut receipt = full_receipt();
        receipt.settle();
        assert_eq!(receipt.measured.peak_beyond_fixed_bytes, Some(Bytes(92)));
        assert_eq!(receipt.budget.held, Some(true));
        assert!((receipt.error.peak_percent.unwrap() - 3.0).abs() < 1e-9);
        assert!((receipt.error.seconds_percent.unwrap() + 25.0).abs() < 1e-9);
        receipt.budget.memory_bytes = Some(Bytes(91));
        receipt.settle();
        assert_eq!(receipt.budget.held, Some(false));
        receipt.measured.peak_resident_bytes = None;
        receipt.settle();
        assert_eq!((receipt.budget.held, receipt.error.peak_percent), (None, None));
    }

    #[test]
    fn json_round_trip() {
        let mut receipt = full_receipt();
        receipt.settle();
        let text = serde_json::to_string(&receipt).unwrap();
        assert_eq!(serde_json::from_str::<Receipt>(&text).unwrap(), receipt);
    }

    /// Every path of the JSON, lists as `[]`; the tiers of `bytes_read_by_tier` are free names.
    fn paths(value: &Value, prefix: &str, out: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => {
                for (name, inner) in fields {
                    let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                    out.insert(path.clone());
                    if path != "bytes_read_by_tier" {
                        paths(inner, &path, out);
                    }
                }
            }
            Value::Array(items) => items.iter().for_each(|item| paths(item, &format!("{prefix}[]"), out)),
            _ => {}
        }
    }

    #[test]
    fn the_schema_document_names_exactly_these_fields() {
        let mut in_code = BTreeSet::new();
        paths(&serde_json::to_value(full_receipt()).unwrap(), "", &mut in_code);
        let document = include_str!("../../../docs/receipt.md");
        assert!(document.contains(RECEIPT_SCHEMA), "docs/receipt.md must name {RECEIPT_SCHEMA}");
        let in_document: BTreeSet<String> = document
            .lines()
            .filter_map(|line| Some(line.strip_prefix("| `")?.split_once('`')?.0.to_owned()))
            .collect();
        let missing: Vec<_> = in_code.difference(&in_document).collect();
        let stale: Vec<_> = in_document.difference(&in_code).collect();
        assert!(
            missing.is_empty() && stale.is_empty(),
            "not documented: {missing:?}; not in the code: {stale:?}"
        );
    }
}
