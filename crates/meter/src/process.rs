//! The kernel's own counts of this process: resident memory, page faults, CPU time.
//!
//! `/proc/self/status` keeps resident counts per CPU and adds them up lazily, so a value may lag by a few hundred
//! kilobytes on machines with many cores; [`exact_resident`] walks the page tables instead and does not.

use crate::MeterError;
use lightering_units::{Bytes, Seconds};
use std::path::{Path, PathBuf};

/// Resident memory of this process; `None` where the kernel does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ProcessMemory {
    /// Resident now (`VmRSS`).
    pub resident: Option<Bytes>,
    /// Highest resident since the start or the last [`reset_peak_resident`] (`VmHWM`).
    pub peak_resident: Option<Bytes>,
    /// The part that is not backed by a file: heap, stacks, arenas (`RssAnon`).
    pub anonymous: Option<Bytes>,
    /// The part that is pages of mapped files, the program's own code included (`RssFile`).
    pub file: Option<Bytes>,
    /// Swapped out (`VmSwap`).
    pub swapped: Option<Bytes>,
}

/// Page faults of this process since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PageFaults {
    /// Served without reading from a disk.
    pub minor: u64,
    /// Served by reading from a disk.
    pub major: u64,
}

/// Reads the resident counts of this process.
pub fn memory() -> ProcessMemory {
    std::fs::read_to_string("/proc/self/status")
        .map_or_else(|_| ProcessMemory::default(), |t| parse_status(&t))
}

fn parse_status(text: &str) -> ProcessMemory {
    let field = |name: &str| {
        text.lines().find_map(|line| {
            let rest = line.strip_prefix(name)?.strip_prefix(':')?;
            let kib: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
            Some(Bytes(kib.checked_mul(1024)?))
        })
    };
    ProcessMemory {
        resident: field("VmRSS"),
        peak_resident: field("VmHWM"),
        anonymous: field("RssAnon"),
        file: field("RssFile"),
        swapped: field("VmSwap"),
    }
}

/// Starts a new [`ProcessMemory::peak_resident`] at what is resident now.
///
/// # Errors
/// [`MeterError::Unavailable`] where the kernel does not allow it; the peak then stays that of the whole process.
pub fn reset_peak_resident() -> Result<(), MeterError> {
    std::fs::write("/proc/self/clear_refs", "5").map_err(|error| MeterError::Unavailable {
        what: "resetting the resident peak",
        reason: format!("/proc/self/clear_refs: {error}"),
    })
}

/// Resident memory counted page by page (`/proc/self/smaps_rollup`), slower than [`memory`] and exact.
pub fn exact_resident() -> Option<Bytes> {
    exact("Rss:")
}

/// The part of [`exact_resident`] that is not backed by a file: heap, stacks, arenas.
pub fn exact_anonymous() -> Option<Bytes> {
    exact("Anonymous:")
}

fn exact(field: &str) -> Option<Bytes> {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    text.lines().find_map(|line| {
        let kib: u64 = line.strip_prefix(field)?.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(Bytes(kib * 1024))
    })
}

/// Size of the program's file.
pub fn program_bytes() -> Option<Bytes> {
    let executable = std::env::current_exe().ok()?;
    Some(Bytes(std::fs::metadata(executable).ok()?.len()))
}

/// Resident pages of the program file itself and of its shared libraries, without other mapped files.
///
/// This is the part of [`ProcessMemory::file`] that belongs to the binary's fixed cost.
pub fn binary_resident() -> Option<Bytes> {
    let executable = std::fs::read_link("/proc/self/exe").ok()?;
    let text = std::fs::read_to_string("/proc/self/smaps").ok()?;
    Some(parse_binary_resident(&text, &executable))
}

fn parse_binary_resident(smaps: &str, executable: &Path) -> Bytes {
    let mut counts = false;
    let mut anonymous = 0;
    let (mut total, mut resident) = (0u64, 0u64);
    let kib =
        |rest: &str| rest.trim().strip_suffix("kB").and_then(|n| n.trim().parse::<u64>().ok()).unwrap_or(0);
    for line in smaps.lines() {
        let first = line.split_ascii_whitespace().next().unwrap_or("");
        if !first.ends_with(':') {
            // A mapping's head: "start-end perms offset dev inode path"; the path may hold spaces.
            total += resident.saturating_sub(anonymous);
            (resident, anonymous) = (0, 0);
            let path = head_path(line);
            counts = path == executable || is_shared_library(&path);
        } else if counts {
            if let Some(rest) = line.strip_prefix("Rss:") {
                resident = kib(rest);
            } else if let Some(rest) = line.strip_prefix("Anonymous:") {
                anonymous = kib(rest);
            }
        }
    }
    Bytes((total + resident.saturating_sub(anonymous)) * 1024)
}

fn head_path(line: &str) -> PathBuf {
    let mut rest = line;
    for _ in 0..5 {
        rest = rest.trim_start();
        rest = rest.find(' ').map_or("", |at| &rest[at..]);
    }
    PathBuf::from(rest.trim_start())
}

fn is_shared_library(path: &Path) -> bool {
    let name = path.file_name().map(|n| n.to_string_lossy()).unwrap_or_default();
    name.ends_with(".so") || name.contains(".so.")
}

/// Page faults so far; `None` where the kernel does not say.
pub fn page_faults() -> Option<PageFaults> {
    parse_stat(&std::fs::read_to_string("/proc/self/stat").ok()?)
}

fn parse_stat(text: &str) -> Option<PageFaults> {
    // The second field is the program's name in parentheses and may hold anything, so count from the last ')'.
    let mut fields = text[text.rfind(')')? + 1..].split_ascii_whitespace();
    let minor = fields.nth(7)?.parse().ok()?;
    let major = fields.nth(1)?.parse().ok()?;
    Some(PageFaults { minor, major })
}

/// CPU time that all threads of this process have used; `None` where the system has no such clock.
pub fn cpu_time() -> Option<Seconds> {
    #[cfg(unix)]
    {
        let t = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Some(Seconds(t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9))
    }
    #[cfg(not(unix))]
    {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_read_and_absence_is_none() {
        let text = "Name:\tVmRSS: 5 kB\nVmHWM:\t    2048 kB\nVmRSS:\t 1024 kB\nRssAnon:\t nonsense\n";
        let memory = parse_status(text);
        assert_eq!(memory.resident, Some(Bytes::kib(1024)));
        assert_eq!(memory.peak_resident, Some(Bytes::mib(2)));
        assert_eq!((memory.anonymous, memory.file), (None, None));
    }

    #[test]
    fn stat_with_a_hostile_program_name() {
        let faults = parse_stat("12 (a) b (c) S 1 2 3 4 5 6 700 8 9 10 11 12").unwrap();
        assert_eq!(faults, PageFaults { minor: 700, major: 9 });
        assert_eq!(parse_stat("12 (short) S 1"), None);
    }

    #[test]
    fn binary_pages_exclude_data_files_and_copied_pages() {
        let smaps = "\
00400000-00500000 r-xp 00000000 08:01 1   /opt/a b/lighter
Rss:                 100 kB
Anonymous:            10 kB
7f0000000000-7f0000100000 r--p 00000000 08:01 2   /models/big.onnx
Rss:                5000 kB
Anonymous:             0 kB
7f1000000000-7f1000100000 r-xp 00000000 08:01 3   /lib/libc.so.6
Rss:                  50 kB
Anonymous:             0 kB
7f2000000000-7f2000100000 rw-p 00000000 00:00 0
Rss:                 900 kB
Anonymous:           900 kB
";
        assert_eq!(parse_binary_resident(smaps, Path::new("/opt/a b/lighter")), Bytes::kib(140));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_touched_buffer_shows_in_the_kernel_counts() {
        let before = memory().resident.expect("Linux tells resident memory");
        let faults_before = page_faults().expect("Linux tells page faults");
        let buffer = vec![1u8; 64 << 20];
        let after = memory();
        assert!(after.resident.expect("told") >= before + Bytes::mib(60));
        assert!(after.peak_resident >= after.resident);
        assert!(exact_resident().is_none_or(|r| r >= Bytes::mib(60)));
        assert!(page_faults().expect("told").minor > faults_before.minor);
        assert!(binary_resident().expect("told") > Bytes::kib(100));
        drop(buffer);
        if reset_peak_resident().is_ok() {
            assert!(memory().peak_resident.expect("told") < before + Bytes::mib(60), "the peak starts anew");
        }
    }

    #[cfg(unix)]
    #[test]
    fn cpu_time_advances_with_work() {
        let before = cpu_time().expect("the clock is there");
        let mut x = 1u64;
        while cpu_time().expect("the clock is there").0 < before.0 + 0.005 {
            x = std::hint::black_box(x.wrapping_mul(6364136223846793005).wrapping_add(1));
        }
        assert!(cpu_time().expect("the clock is there") > before);
    }
}
