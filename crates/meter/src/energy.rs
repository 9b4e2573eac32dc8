//! Energy: the processor's own counter where it can be read, a stated model where the user asks for one, else
//! "unavailable". Never a silent guess.

use crate::process;
use lightering_units::{Joules, Watts};
use std::path::{Path, PathBuf};

/// An amount of energy and how it was obtained.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Energy {
    /// The amount; `None` when unavailable.
    pub joules: Option<Joules>,
    /// `"rapl: …"`, `"model: …"` with the figure and its source, or `"unavailable"` with the reason.
    pub method: String,
}

impl Energy {
    /// No value, and why.
    pub fn unavailable(reason: &str) -> Energy {
        Energy { joules: None, method: format!("unavailable: {reason}") }
    }
}

/// A user's own figure: joules = watts × CPU seconds.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct EnergyModel {
    /// Power of one busy core.
    pub watts: Watts,
    /// Where the figure comes from.
    pub source: String,
}

#[derive(Debug)]
struct Domain {
    name: String,
    counter: PathBuf,
    range_microjoules: u64,
    start_microjoules: u64,
}

/// Measures energy from its creation to [`finish`](EnergyMeter::finish).
#[derive(Debug)]
pub struct EnergyMeter {
    domains: Vec<Domain>,
    reason: String,
    model: Option<EnergyModel>,
    cpu_start: Option<lightering_units::Seconds>,
}

impl EnergyMeter {
    /// Starts to measure; `model` is used only when the processor's counter cannot be read.
    pub fn start(model: Option<EnergyModel>) -> EnergyMeter {
        Self::start_at(Path::new("/sys/class/powercap"), model)
    }

    fn start_at(powercap: &Path, model: Option<EnergyModel>) -> EnergyMeter {
        let (domains, reason) = match package_domains(powercap) {
            Ok(domains) => (domains, String::new()),
            Err(reason) => (Vec::new(), reason),
        };
        EnergyMeter { domains, reason, model, cpu_start: process::cpu_time() }
    }

    /// The energy since the start. RAPL counts the whole processor package, other processes included.
    pub fn finish(self) -> Energy {
        if !self.domains.is_empty() {
            let mut total = 0u64;
            for domain in &self.domains {
                let Some(now) = read_number(&domain.counter) else {
                    return Energy::unavailable(
                        "the RAPL counter could be read at the start but not at the end",
                    );
                };
                total += elapsed(domain.start_microjoules, now, domain.range_microjoules);
            }
            let names: Vec<&str> = self.domains.iter().map(|d| d.name.as_str()).collect();
            return Energy {
                joules: Some(Joules(total as f64 * 1e-6)),
                method: format!("rapl: {} (whole package, other processes included)", names.join(" + ")),
            };
        }
        match (self.model, self.cpu_start, process::cpu_time()) {
            (Some(model), Some(start), Some(end)) => {
                let busy = end - start;
                Energy {
                    joules: Some(model.watts * busy),
                    method: format!(
                        "model: {} x {:.6} CPU seconds; watts from {}",
                        model.watts, busy.0, model.source
                    ),
                }
            }
            (Some(_), _, _) => Energy::unavailable("a model was given, but this system has no CPU clock"),
            (None, _, _) => Energy::unavailable(&self.reason),
        }
    }
}

/// Microjoules from `start` to `now` of a counter that wraps past `range`.
fn elapsed(start: u64, now: u64, range: u64) -> u64 {
    if now >= start { now - start } else { range.saturating_sub(start) + now }
}

fn read_number(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The top-level package domains (`intel-rapl:0`, `intel-rapl:1`, …; AMD uses the same names).
fn package_domains(powercap: &Path) -> Result<Vec<Domain>, String> {
    let entries = std::fs::read_dir(powercap)
        .map_err(|error| format!("no RAPL counter ({}: {error})", powercap.display()))?;
    let mut domains = Vec::new();
    for entry in entries.flatten() {
        let folder = entry.path();
        let file_name = entry.file_name().to_string_lossy().into_owned();
        // "intel-rapl:0" is a package; "intel-rapl:0:1" is a part of it and would be counted twice.
        if !file_name.starts_with("intel-rapl:") || file_name.matches(':').count() != 1 {
            continue;
        }
        let name = std::fs::read_to_string(folder.join("name")).unwrap_or_else(|_| file_name.clone());
        let counter = folder.join("energy_uj");
        let start = std::fs::read_to_string(&counter)
            .map_err(|error| format!("the RAPL counter cannot be read ({}: {error})", counter.display()))?;
        let start_microjoules =
            start.trim().parse().map_err(|_| format!("{} does not hold a number", counter.display()))?;
        let range_microjoules = read_number(&folder.join("max_energy_range_uj")).unwrap_or(u64::MAX);
        domains.push(Domain { name: name.trim().to_owned(), counter, range_microjoules, start_microjoules });
    }
    domains.sort_by(|a, b| a.counter.cmp(&b.counter));
    if domains.is_empty() { Err("no RAPL package domain on this machine".to_owned()) } else { Ok(domains) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fake_package(root: &Path, name: &str, microjoules: u64) -> PathBuf {
        let folder = root.join(name);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("name"), "package-0\n").unwrap();
        std::fs::write(folder.join("energy_uj"), microjoules.to_string()).unwrap();
        std::fs::write(folder.join("max_energy_range_uj"), "1000000").unwrap();
        folder.join("energy_uj")
    }

    #[test]
    fn counter_difference_and_wrap_around() {
        let dir = tempfile::tempdir().unwrap();
        let counter = fake_package(dir.path(), "intel-rapl:0", 900_000);
        fake_package(dir.path(), "intel-rapl:0:0", 5);
        let meter = EnergyMeter::start_at(dir.path(), None);
        std::fs::write(&counter, "400000").unwrap();
        let energy = meter.finish();
        assert!((energy.joules.unwrap().0 - 0.5).abs() < 1e-9, "{energy:?}");
        assert!(energy.method.starts_with("rapl: package-0"), "{}", energy.method);
    }

    #[test]
    fn without_counter_or_model_it_is_unavailable() {
        let dir = tempfile::tempdir().unwrap();
        let energy = EnergyMeter::start_at(&dir.path().join("absent"), None).finish();
        assert_eq!(energy.joules, None);
        assert!(energy.method.starts_with("unavailable: "), "{}", energy.method);
    }

    #[cfg(unix)]
    #[test]
    fn a_model_states_its_figure_and_source() {
        let dir = tempfile::tempdir().unwrap();
        let model = EnergyModel { watts: Watts(10.0), source: "data sheet".into() };
        let meter = EnergyMeter::start_at(dir.path(), Some(model));
        let start = process::cpu_time().unwrap();
        while process::cpu_time().unwrap().0 < start.0 + 0.002 {}
        let energy = meter.finish();
        assert!(energy.joules.unwrap().0 >= 0.02);
        assert!(energy.method.contains("data sheet") && energy.method.starts_with("model: 10.00 W"));
    }
}
