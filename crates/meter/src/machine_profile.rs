//! What `lighter doctor` measures once and the planner uses ever after.

use crate::{MeterError, host};
use lightering_units::{Bytes, BytesPerSecond, FlopsPerSecond};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The schema name that a profile file carries.
pub const MACHINE_SCHEMA: &str = "lightering.machine/1";

/// The most that the program itself may hold before it holds any model: its code, its stacks, its runtime.
pub const FIXED_COST_LIMIT: Bytes = Bytes::mib(24);

/// Largest profile file that is read.
const PROFILE_BYTES_MAX: u64 = 1 << 20;

/// Where a profile's figures come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProfileSource {
    /// Built-in conservative figures; this machine was never measured.
    Default,
    /// Measured on this machine by `lighter doctor`.
    Measured,
}

/// One cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheLevel {
    /// 1, 2, 3, ….
    pub level: u32,
    /// Its size.
    pub size: Bytes,
    /// How many CPUs share it.
    pub shared_by: u32,
}

/// Sustained read rate from memory with this many threads.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemoryRate {
    /// Threads that read at once.
    pub threads: u32,
    /// Their sum.
    pub bytes_per_second: BytesPerSecond,
}

/// Sustained matrix-product rate with this many threads; a multiply-add counts as two.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ComputeRate {
    /// Threads that compute at once.
    pub threads: u32,
    /// Their sum.
    pub flops_per_second: FlopsPerSecond,
}

/// How a file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskPattern {
    /// One block after the other.
    Sequential,
    /// Blocks in random order.
    Random,
}

/// Sustained read rate from the disk, one request at a time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskRate {
    /// Order of the blocks.
    pub pattern: DiskPattern,
    /// True with `O_DIRECT`, past the page cache.
    pub direct: bool,
    /// Bytes per request.
    pub block_bytes: Bytes,
    /// The rate.
    pub bytes_per_second: BytesPerSecond,
}

/// The machine as the planner sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineProfile {
    /// [`MACHINE_SCHEMA`].
    pub schema: String,
    /// Measured or default.
    pub source: ProfileSource,
    /// Version of the program that wrote it.
    pub version: String,
    /// The processor's name.
    pub cpu: String,
    /// Best instruction set that the kernels use, such as `avx512-vnni`; `portable` when unknown.
    pub isa: String,
    /// Cores that a process may use.
    pub cores: u32,
    /// Physical memory.
    pub memory_bytes: Bytes,
    /// Data caches, nearest first.
    pub caches: Vec<CacheLevel>,
    /// Memory bandwidth, by threads ascending.
    pub memory_bandwidth: Vec<MemoryRate>,
    /// Single-precision matrix product, by threads ascending.
    pub gemm_f32: Vec<ComputeRate>,
    /// 8-bit integer matrix product, by threads ascending; empty where it was not measured.
    pub gemm_int8: Vec<ComputeRate>,
    /// Disk reads.
    pub disk: Vec<DiskRate>,
    /// Resident memory of the program itself, its code and what it holds before it reads a model: the part that no
    /// budget counts.
    pub fixed_cost_bytes: Bytes,
    /// Size of the program's file when that was measured: another build has another fixed cost.
    #[serde(default)]
    pub program_bytes: Bytes,
}

impl MachineProfile {
    /// The fixed cost as measured for this very build; `None` when it was assumed, or measured for another one.
    pub fn measured_fixed_cost(&self) -> Option<Bytes> {
        let same =
            self.program_bytes != Bytes::ZERO && crate::process::program_bytes() == Some(self.program_bytes);
        (self.source == ProfileSource::Measured && same).then_some(self.fixed_cost_bytes)
    }

    /// Figures that nearly every machine reaches, with this machine's own cores, memory and caches.
    pub fn conservative() -> MachineProfile {
        let disk = |pattern, direct, block_bytes, megabytes: f64| DiskRate {
            pattern,
            direct,
            block_bytes,
            bytes_per_second: BytesPerSecond(megabytes * 1e6),
        };
        use DiskPattern::{Random, Sequential};
        MachineProfile {
            schema: MACHINE_SCHEMA.to_owned(),
            source: ProfileSource::Default,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            cpu: host::cpu_name(),
            isa: "portable".to_owned(),
            cores: host::cores(),
            memory_bytes: host::memory_total().unwrap_or(Bytes::mib(1024)),
            caches: host::caches(),
            memory_bandwidth: vec![MemoryRate { threads: 1, bytes_per_second: BytesPerSecond(6e9) }],
            gemm_f32: vec![ComputeRate { threads: 1, flops_per_second: FlopsPerSecond(20e9) }],
            gemm_int8: Vec::new(),
            disk: vec![
                disk(Sequential, false, Bytes::kib(64), 150.0),
                disk(Sequential, false, Bytes::mib(1), 200.0),
                disk(Sequential, true, Bytes::kib(64), 100.0),
                disk(Sequential, true, Bytes::mib(1), 200.0),
                disk(Random, false, Bytes::kib(64), 20.0),
                disk(Random, false, Bytes::mib(1), 100.0),
                disk(Random, true, Bytes::kib(64), 20.0),
                disk(Random, true, Bytes::mib(1), 100.0),
            ],
            fixed_cost_bytes: FIXED_COST_LIMIT,
            program_bytes: Bytes::ZERO,
        }
    }

    /// `$XDG_CONFIG_HOME/lightering/machine.json`, else `$HOME/.config/lightering/machine.json`; `None` without either.
    pub fn default_path() -> Option<PathBuf> {
        let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let config = variable("XDG_CONFIG_HOME").or_else(|| Some(variable("HOME")?.join(".config")))?;
        Some(config.join("lightering").join("machine.json"))
    }

    /// Reads a profile and checks that its figures can be planned with.
    ///
    /// # Errors
    /// [`MeterError::Io`] when it cannot be read, [`MeterError::Corrupt`] when it is not a profile.
    pub fn load(path: &Path) -> Result<MachineProfile, MeterError> {
        let io = |source| MeterError::Io { path: path.to_owned(), source };
        let corrupt = |reason: String| MeterError::Corrupt {
            path: path.to_owned(),
            expected: "machine profile",
            reason,
        };
        let size = std::fs::metadata(path).map_err(io)?.len();
        if size > PROFILE_BYTES_MAX {
            return Err(corrupt(format!("it has {size} bytes, more than {PROFILE_BYTES_MAX}")));
        }
        let text = std::fs::read_to_string(path).map_err(io)?;
        let profile: MachineProfile =
            serde_json::from_str(&text).map_err(|error| corrupt(error.to_string()))?;
        profile.check().map_err(corrupt)?;
        Ok(profile)
    }

    /// The profile at [`default_path`](Self::default_path), or [`conservative`](Self::conservative) figures when there
    /// is no file.
    ///
    /// # Errors
    /// [`MeterError`] when a file is there but cannot be used.
    pub fn load_or_conservative() -> Result<MachineProfile, MeterError> {
        match Self::default_path() {
            Some(path) if path.exists() => Self::load(&path),
            _ => Ok(Self::conservative()),
        }
    }

    /// Writes the profile as JSON, by way of a temporary file so that a reader never sees half of it.
    ///
    /// # Errors
    /// [`MeterError::Io`] when the folder or the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), MeterError> {
        let io = |source| MeterError::Io { path: path.to_owned(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(io)?;
        }
        let mut text = serde_json::to_string_pretty(self).expect("a profile has only plain fields");
        text.push('\n');
        let temporary = path.with_extension(format!("json.{}", std::process::id()));
        std::fs::write(&temporary, text).map_err(io)?;
        std::fs::rename(&temporary, path).map_err(|source| {
            // The rename's error is the one that matters; a leftover temporary file is harmless.
            let _ = std::fs::remove_file(&temporary);
            io(source)
        })
    }

    fn check(&self) -> Result<(), String> {
        if self.schema != MACHINE_SCHEMA {
            return Err(format!(
                "schema is {:?}, expected {MACHINE_SCHEMA:?}; run `lighter doctor` again",
                self.schema
            ));
        }
        let mut rates = Vec::new();
        rates.extend(
            self.memory_bandwidth.iter().map(|r| ("memory_bandwidth", r.threads, r.bytes_per_second.0)),
        );
        rates.extend(self.gemm_f32.iter().map(|r| ("gemm_f32", r.threads, r.flops_per_second.0)));
        rates.extend(self.gemm_int8.iter().map(|r| ("gemm_int8", r.threads, r.flops_per_second.0)));
        rates.extend(self.disk.iter().map(|r| ("disk", 1, r.bytes_per_second.0)));
        for (name, threads, rate) in rates {
            if !(rate.is_finite() && rate > 0.0) || threads == 0 {
                return Err(format!(
                    "{name} has the rate {rate} with {threads} threads; it must be positive"
                ));
            }
        }
        for (name, empty) in [
            ("memory_bandwidth", self.memory_bandwidth.is_empty()),
            ("gemm_f32", self.gemm_f32.is_empty()),
            ("disk", self.disk.is_empty()),
        ] {
            if empty {
                return Err(format!("{name} is empty"));
            }
        }
        if self.cores == 0 {
            return Err("cores is 0".to_owned());
        }
        Ok(())
    }

    /// Memory bandwidth with `threads`: the measured value at the most threads that are not more.
    pub fn memory_bandwidth_at(&self, threads: u32) -> BytesPerSecond {
        let rate = at_threads(&self.memory_bandwidth, threads, |r| r.threads);
        rate.map_or(BytesPerSecond(6e9), |r| r.bytes_per_second)
    }

    /// Single-precision matrix rate with `threads`: the measured value at the most threads that are not more.
    pub fn gemm_f32_at(&self, threads: u32) -> FlopsPerSecond {
        at_threads(&self.gemm_f32, threads, |r| r.threads)
            .map_or(FlopsPerSecond(20e9), |r| r.flops_per_second)
    }

    /// 8-bit matrix rate with `threads`: the measured value at the most threads that are not more, else the
    /// single-precision rate, which every processor reaches with bytes too.
    pub fn gemm_int8_at(&self, threads: u32) -> FlopsPerSecond {
        at_threads(&self.gemm_int8, threads, |r| r.threads)
            .map_or_else(|| self.gemm_f32_at(threads), |r| r.flops_per_second)
    }

    /// Disk rate for requests of `block`: the measured value at the largest block that is not larger, else the
    /// smallest measured one; `None` when the pattern was never measured.
    pub fn disk_read_at(&self, pattern: DiskPattern, direct: bool, block: Bytes) -> Option<BytesPerSecond> {
        let mut rates: Vec<&DiskRate> =
            self.disk.iter().filter(|r| r.pattern == pattern && r.direct == direct).collect();
        rates.sort_by_key(|r| r.block_bytes);
        let rate = rates.iter().rfind(|r| r.block_bytes <= block).or(rates.first())?;
        Some(rate.bytes_per_second)
    }
}

fn at_threads<T>(rates: &[T], threads: u32, of: impl Fn(&T) -> u32) -> Option<&T> {
    rates.iter().filter(|r| of(r) <= threads.max(1)).max_by_key(|r| of(r)).or(rates.first())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn save_and_load_round_trip() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep").join("machine.json");
        let profile = MachineProfile::conservative();
        profile.save(&path).unwrap();
        assert_eq!(MachineProfile::load(&path).unwrap(), profile);
        let files: Vec<_> = std::fs::read_dir(path.parent().unwrap()).unwrap().collect();
        assert_eq!(files.len(), 1, "no temporary file stays behind");
    }

    #[test]
    fn a_profile_that_cannot_be_planned_with_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("machine.json");
        let check = |change: fn(&mut MachineProfile), expected: &str| {
            let mut profile = MachineProfile::conservative();
            change(&mut profile);
            profile.save(&path).unwrap();
            let error = MachineProfile::load(&path).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check(|p| p.schema = "lightering.machine/0".into(), "run `lighter doctor` again");
        check(|p| p.gemm_f32[0].flops_per_second.0 = 0.0, "gemm_f32");
        check(|p| p.memory_bandwidth[0].threads = 0, "memory_bandwidth");
        check(|p| p.disk.clear(), "disk is empty");
        check(|p| p.cores = 0, "cores");
        std::fs::write(&path, "{").unwrap();
        assert!(matches!(MachineProfile::load(&path), Err(MeterError::Corrupt { .. })));
        std::fs::write(&path, vec![b' '; (1 << 20) + 1]).unwrap();
        assert!(MachineProfile::load(&path).unwrap_err().to_string().contains("more than"));
    }

    #[test]
    fn rates_are_looked_up_conservatively() {
        let mut profile = MachineProfile::conservative();
        profile.gemm_f32 = [1, 2, 4]
            .map(|threads| ComputeRate { threads, flops_per_second: FlopsPerSecond(threads as f64) })
            .to_vec();
        assert_eq!(profile.gemm_f32_at(3), FlopsPerSecond(2.0));
        assert_eq!(profile.gemm_f32_at(64), FlopsPerSecond(4.0));
        assert_eq!(profile.gemm_f32_at(0), FlopsPerSecond(1.0));
        assert_eq!(profile.gemm_int8_at(2), FlopsPerSecond(2.0), "not measured, so the rate of f32");
        let random = |block| profile.disk_read_at(DiskPattern::Random, true, block);
        assert_eq!(random(Bytes::kib(512)), Some(BytesPerSecond(20e6)));
        assert_eq!(random(Bytes::kib(4)), Some(BytesPerSecond(20e6)));
        assert_eq!(random(Bytes::mib(8)), Some(BytesPerSecond(100e6)));
    }
}
