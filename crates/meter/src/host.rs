//! Facts about the machine that need no measuring: its name, cores, memory and caches.

use crate::machine_profile::CacheLevel;
use lightering_units::Bytes;

/// The processor's own name, or the architecture's when it does not tell.
pub fn cpu_name() -> String {
    std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|l| l.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        })
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

/// Cores that this process may use (affinity and control group considered), at least 1.
pub fn cores() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX))
}

/// Physical memory of the machine.
pub fn memory_total() -> Option<Bytes> {
    meminfo("MemTotal")
}

/// Memory that could be given out without swapping.
pub fn memory_available() -> Option<Bytes> {
    meminfo("MemAvailable")
}

fn meminfo(name: &str) -> Option<Bytes> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    text.lines().find_map(|line| {
        let rest = line.strip_prefix(name)?.strip_prefix(':')?;
        let kib: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(Bytes(kib.checked_mul(1024)?))
    })
}

/// Operating system and architecture, such as `linux x86_64`.
pub fn system() -> String {
    format!("{} {}", std::env::consts::OS, std::env::consts::ARCH)
}

/// The data and unified caches that the first core sees, nearest first; empty where the kernel does not tell.
pub fn caches() -> Vec<CacheLevel> {
    let mut caches: Vec<CacheLevel> = (0..8)
        .filter_map(|index| {
            let read = |name: &str| {
                std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{name}"))
                    .ok()
                    .map(|text| text.trim().to_owned())
            };
            if read("type")? == "Instruction" {
                return None;
            }
            let level = read("level")?.parse().ok()?;
            let size = read("size")?;
            let (number, factor) = match size.strip_suffix('K') {
                Some(n) => (n, 1024),
                None => match size.strip_suffix('M') {
                    Some(n) => (n, 1 << 20),
                    None => (size.as_str(), 1),
                },
            };
            let size = Bytes(number.parse::<u64>().ok()?.checked_mul(factor)?);
            let shared_by = read("shared_cpu_list").map_or(1, |list| cpu_list_count(&list));
            Some(CacheLevel { level, size, shared_by })
        })
        .collect();
    caches.sort_by_key(|c| c.level);
    caches
}

/// How many CPUs a kernel list such as `0-3,8` names.
fn cpu_list_count(list: &str) -> u32 {
    list.split(',')
        .map(|part| match part.split_once('-') {
            Some((low, high)) => match (low.trim().parse::<u32>(), high.trim().parse::<u32>()) {
                (Ok(low), Ok(high)) if high >= low => high - low + 1,
                _ => 0,
            },
            None => u32::from(part.trim().parse::<u32>().is_ok()),
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists() {
        assert_eq!(cpu_list_count("0-3,8"), 5);
        assert_eq!(cpu_list_count("0"), 1);
        assert_eq!(cpu_list_count("nonsense"), 0);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_machine_has_memory_and_cores() {
        assert!(memory_total().expect("told") >= memory_available().expect("told"));
        assert!(cores() >= 1 && !cpu_name().is_empty());
    }
}
