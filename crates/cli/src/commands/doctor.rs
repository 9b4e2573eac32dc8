//! `lighter doctor`: measures this machine and writes the profile that the planner uses.

use crate::arguments::DoctorArguments;
use crate::failure::{Exit, Failure, Outcome};
use crate::fixed_cost;
use crate::output::{Output, Table};
use crate::probe;
use lightering_meter::{
    DiskPattern, FIXED_COST_LIMIT, MACHINE_SCHEMA, MachineProfile, ProfileSource, cgroup, host,
};
use lightering_units::Bytes;
use std::fmt::Write as _;
use std::path::PathBuf;

/// Runs the measurements, prints them, and writes the profile unless `--dry-run` is given.
pub fn run(arguments: &DoctorArguments, output: Output) -> Outcome {
    let path = match (&arguments.output, arguments.dry_run) {
        (_, true) => None,
        (Some(path), _) => Some(path.clone()),
        (None, _) => Some(MachineProfile::default_path().ok_or_else(|| {
            Failure::input(
                "neither XDG_CONFIG_HOME nor HOME is set, so there is no place for the profile",
                "lighter doctor --output machine.json",
            )
        })?),
    };
    let folder = arguments.disk.clone().unwrap_or_else(|| match path.as_deref().and_then(|p| p.parent()) {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    });
    let (passes, seconds) = if arguments.fast { (2, 0.05) } else { (7, 0.4) };

    let progress = output.progress(1);
    progress.set_message("what the program itself costs");
    let fixed_cost_bytes = fixed_cost::measure()?;
    progress.set_message("memory bandwidth");
    let memory_bandwidth = probe::memory_rates(passes);
    progress.set_message("matrix products");
    let (gemm_f32, gemm_int8) = (probe::gemm_f32_rates(seconds), probe::gemm_int8_rates(seconds));
    let disk = probe::disk_rates(&folder, arguments.disk_bytes, &|what| {
        progress.set_message(format!("disk: {what}"))
    })?;
    progress.finish_and_clear();

    let profile = MachineProfile {
        schema: MACHINE_SCHEMA.to_owned(),
        source: ProfileSource::Measured,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        cpu: host::cpu_name(),
        isa: probe::isa(),
        cores: host::cores(),
        memory_bytes: host::memory_total().unwrap_or_default(),
        caches: host::caches(),
        memory_bandwidth,
        gemm_f32,
        gemm_int8,
        disk,
        fixed_cost_bytes,
        program_bytes: lightering_meter::process::program_bytes().unwrap_or_default(),
    };
    if let Some(path) = &path {
        profile.save(path)?;
    }
    let mut text = report(&profile);
    if let Some(path) = &path {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "\nwritten to {}", path.display());
    }
    output.result(&profile, &text)?;
    if fixed_cost_bytes > FIXED_COST_LIMIT {
        return Err(Failure {
            exit: Exit::Missed,
            error: anyhow::anyhow!(
                "the program itself holds {fixed_cost_bytes}, more than {FIXED_COST_LIMIT}"
            ),
            hint: Some("a release build; a debug build maps more code".to_owned()),
            smallest: None,
        });
    }
    Ok(Exit::Done)
}

fn report(profile: &MachineProfile) -> String {
    let mut facts = Table::new(&["machine", ""]);
    facts.row(["processor", profile.cpu.as_str()]);
    facts.row(["instruction set", profile.isa.as_str()]);
    facts.row(["cores".to_owned(), profile.cores.to_string()]);
    facts.row(["memory".to_owned(), profile.memory_bytes.to_string()]);
    for cache in &profile.caches {
        let shared =
            if cache.shared_by > 1 { format!(", shared by {}", cache.shared_by) } else { String::new() };
        facts.row([format!("cache level {}", cache.level), format!("{}{shared}", cache.size)]);
    }
    if let Some(limit) = cgroup::memory().and_then(|group| group.limit) {
        facts.row(["memory limit of the control group".to_owned(), limit.to_string()]);
    }
    facts.row([
        "fixed cost of the program".to_owned(),
        format!("{} (at most {FIXED_COST_LIMIT})", profile.fixed_cost_bytes),
    ]);

    let mut rates = Table::new(&["threads", ">memory read", ">matrix product f32", ">int8"]);
    for memory in &profile.memory_bandwidth {
        let find = |rates: &[lightering_meter::ComputeRate]| {
            rates
                .iter()
                .find(|r| r.threads == memory.threads)
                .map_or("-".to_owned(), |r| r.flops_per_second.to_string())
        };
        rates.row([
            memory.threads.to_string(),
            memory.bytes_per_second.to_string(),
            find(&profile.gemm_f32),
            find(&profile.gemm_int8),
        ]);
    }

    let mut disk = Table::new(&["disk read", ">64 KiB", ">1 MiB"]);
    for (pattern, name) in [(DiskPattern::Sequential, "in order"), (DiskPattern::Random, "at random")] {
        for (direct, way) in [(false, "buffered, cold"), (true, "O_DIRECT")] {
            let rate = |block: Bytes| {
                profile
                    .disk
                    .iter()
                    .find(|r| r.pattern == pattern && r.direct == direct && r.block_bytes == block)
                    .map_or("not offered".to_owned(), |r| r.bytes_per_second.to_string())
            };
            disk.row([format!("{name}, {way}"), rate(Bytes::kib(64)), rate(Bytes::mib(1))]);
        }
    }
    format!("{}\n{}\n{}", facts.text(), rates.text(), disk.text())
}
