//! What one command used, from its first moment to its receipt.

use crate::failure::Outcome;
use lightering_meter::{
    Budget, Energy, MachineProfile, MachineSummary, Measured, ModelIdentity, OutputReceipt, PlanSummary,
    Predicted, PredictionError, RECEIPT_SCHEMA, Receipt, cgroup, process,
};
use lightering_units::{Bytes, Seconds};
use std::collections::BTreeMap;

/// Constants of the program, such as tables and messages, that the rest of a run may still touch; its code is resident
/// from the start.
const CONSTANTS_TO_COME: Bytes = Bytes::kib(96);

/// Heap, stacks and arenas now: counted page by page where the kernel offers that.
fn anonymous() -> Option<Bytes> {
    process::exact_anonymous().or_else(|| process::memory().anonymous)
}

/// What the process held before it opened anything.
#[derive(Clone, Copy, Debug)]
pub struct Baseline {
    anonymous: Option<Bytes>,
    faults: Option<process::PageFaults>,
    cpu: Option<Seconds>,
    /// Code that was resident at the start. A control group that is nearly full may take some of it away before the end.
    code: Option<Bytes>,
}

impl Baseline {
    /// Makes the program's code resident and reads the kernel's counts; call it first thing.
    pub fn now() -> Baseline {
        lightering_tier::make_code_resident();
        Baseline {
            anonymous: anonymous(),
            faults: process::page_faults(),
            cpu: process::cpu_time(),
            code: process::binary_resident(),
        }
    }

    /// Heap that came since: what readers and optimizers left behind.
    pub fn anonymous_since(&self) -> Bytes {
        anonymous().zip(self.anonymous).map_or(Bytes::ZERO, |(now, then)| now.saturating_sub(then))
    }

    /// The fixed cost as assumed just before a run: the code that is resident with what a run adds, or what was told
    /// about the program where the kernel does not say.
    pub fn fixed_cost_assumed(&self, profile: &MachineProfile, not_code: Bytes) -> Bytes {
        let now = self.fixed_cost_now(not_code).map(|now| now + CONSTANTS_TO_COME);
        now.unwrap_or(profile.fixed_cost_bytes)
    }

    /// By how much this run's fixed cost may exceed what `lighter doctor` told about the program. A budget is beyond
    /// the told figure, so the difference counts against it.
    pub fn beyond_told_fixed_cost(&self, profile: &MachineProfile) -> Bytes {
        match (profile.measured_fixed_cost(), self.fixed_cost_now(Bytes::ZERO)) {
            (Some(told), Some(now)) => (now + CONSTANTS_TO_COME).saturating_sub(told),
            _ => Bytes::ZERO,
        }
    }

    /// The most that was held beyond the fixed cost so far; zero where the kernel does not tell.
    pub fn peak_so_far(&self) -> Bytes {
        let peak = process::memory().peak_resident.zip(self.fixed_cost_now(Bytes::ZERO));
        peak.map_or(Bytes::ZERO, |(peak, fixed)| peak.saturating_sub(fixed))
    }

    /// Code pages that are resident, and what was held before anything was read.
    pub fn fixed_cost_now(&self, not_code: Bytes) -> Option<Bytes> {
        let (binary, anonymous) = process::binary_resident().zip(self.anonymous)?;
        let code = binary.saturating_sub(not_code).max(self.code.unwrap_or(Bytes::ZERO));
        Some(code + anonymous)
    }

    /// The kernel's and the clock's counts up to now. `not_code` are bytes of the program file that are data of this
    /// run (an embedded model) and so belong to the budget, not to the fixed cost.
    pub fn measured(&self, seconds: Seconds, load_seconds: Option<Seconds>, not_code: Bytes) -> Measured {
        let faults = process::page_faults().zip(self.faults);
        Measured {
            peak_resident_bytes: process::memory().peak_resident,
            fixed_bytes: self.fixed_cost_now(not_code),
            peak_beyond_fixed_bytes: None,
            pool_peak_bytes: None,
            cgroup_peak_bytes: cgroup::memory().and_then(|group| group.peak),
            seconds,
            load_seconds,
            cpu_seconds: process::cpu_time().zip(self.cpu).map(|(now, then)| now - then),
            minor_faults: faults.map(|(now, then)| now.minor - then.minor),
            major_faults: faults.map(|(now, then)| now.major - then.major),
        }
    }
}

/// Everything that a receipt is made of.
#[derive(Debug)]
pub struct Account<'a> {
    /// The command.
    pub command: &'a str,
    /// The model.
    pub model: ModelIdentity,
    /// The profile that was planned with.
    pub profile: &'a MachineProfile,
    /// Instruction set of the kernels.
    pub isa: String,
    /// Threads that computed.
    pub threads: u32,
    /// `--memory`.
    pub memory: Option<Bytes>,
    /// Bytes that the plan holds at its peak.
    pub planned: Bytes,
    /// Fixed cost as assumed before the run.
    pub fixed_assumed: Bytes,
    /// Time that the plan predicts.
    pub predicted_seconds: Option<Seconds>,
    /// The kernel's counts.
    pub measured: Measured,
    /// Bytes read by tier.
    pub bytes_read_by_tier: BTreeMap<String, Bytes>,
    /// Energy.
    pub energy: Energy,
    /// The planner's decisions.
    pub plan: PlanSummary,
    /// Outputs.
    pub outputs: Vec<OutputReceipt>,
}

impl Account<'_> {
    /// The receipt.
    pub fn settle(self) -> Receipt {
        let mut receipt = Receipt {
            schema: RECEIPT_SCHEMA.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            command: self.command.to_owned(),
            model: self.model,
            machine: MachineSummary::of_this_machine(self.profile),
            isa: self.isa,
            threads: self.threads,
            budget: Budget { memory_bytes: self.memory, held: None },
            predicted: Predicted {
                peak_bytes: self.planned + self.fixed_assumed,
                planned_bytes: self.planned,
                fixed_bytes: self.fixed_assumed,
                seconds: self.predicted_seconds,
            },
            measured: self.measured,
            error: PredictionError::default(),
            bytes_read_by_tier: self.bytes_read_by_tier,
            energy: self.energy,
            plan: self.plan,
            outputs: self.outputs,
        };
        receipt.settle();
        receipt
    }
}

/// A receipt in a few lines for people.
pub fn summary(receipt: &Receipt) -> String {
    let unknown = || "unavailable".to_owned();
    let bytes = |value: Option<Bytes>| value.map_or_else(unknown, |b| b.to_string());
    let percent = |value: Option<f64>| value.map_or(String::new(), |p| format!(" ({p:+.1} %)"));
    let mut table = crate::output::Table::new(&["", ">predicted", ">measured"]);
    table.row([
        "memory beyond the fixed cost".to_owned(),
        receipt.predicted.planned_bytes.to_string(),
        bytes(receipt.measured.peak_beyond_fixed_bytes),
    ]);
    table.row([
        "memory of the process".to_owned(),
        format!("{}{}", receipt.predicted.peak_bytes, percent(receipt.error.peak_percent)),
        bytes(receipt.measured.peak_resident_bytes),
    ]);
    table.row([
        "time".to_owned(),
        format!(
            "{}{}",
            receipt.predicted.seconds.map_or_else(unknown, |s| s.to_string()),
            percent(receipt.error.seconds_percent)
        ),
        receipt.measured.seconds.to_string(),
    ]);
    let mut text = table.text();
    let mut line = |name: &str, value: String| {
        text.push_str(&format!("{name}: {value}\n"));
    };
    if let Some(limit) = receipt.budget.memory_bytes {
        let verdict = match receipt.budget.held {
            Some(true) => "held",
            Some(false) => "EXCEEDED",
            None => "not checked, the kernel does not tell the peak",
        };
        line("budget", format!("{limit}, {verdict}"));
    }
    if !receipt.bytes_read_by_tier.is_empty() {
        let tiers: Vec<String> =
            receipt.bytes_read_by_tier.iter().map(|(t, b)| format!("{b} from {t}")).collect();
        line("read", tiers.join(", "));
    }
    line(
        "energy",
        match receipt.energy.joules {
            Some(joules) => format!("{joules} ({})", receipt.energy.method),
            None => receipt.energy.method.clone(),
        },
    );
    let plan = &receipt.plan;
    let counts: Vec<String> =
        [("streamed", &plan.streamed), ("split", &plan.split), ("recomputed", &plan.recomputed)]
            .iter()
            .filter(|(_, steps)| !steps.is_empty())
            .map(|(name, steps)| {
                format!("{} {name} ({})", steps.len(), steps.iter().map(|s| s.bytes).sum::<Bytes>())
            })
            .collect();
    let details = if counts.is_empty() { String::new() } else { format!("; {}", counts.join(", ")) };
    line("plan", format!("{}{details}", plan.strategy));
    text
}

/// Fails with exit code 1 when the budget was exceeded although the plan fitted.
pub fn check_budget(receipt: &Receipt) -> Outcome<()> {
    if receipt.budget.held != Some(false) {
        return Ok(());
    }
    let peak = receipt.measured.peak_beyond_fixed_bytes.unwrap_or_default();
    let limit = receipt.budget.memory_bytes.unwrap_or_default();
    Err(crate::failure::Failure {
        exit: crate::failure::Exit::Missed,
        error: anyhow::anyhow!("the run held {peak}, more than the budget of {limit}"),
        hint: Some("report this with the receipt: a plan that fits must hold".to_owned()),
        smallest: None,
    })
}
