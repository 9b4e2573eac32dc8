//! The memory control group of this process, version 1 or 2: what a container is charged, and its limit.

use lightering_units::Bytes;
use std::path::{Path, PathBuf};

/// What the control group says; `None` per value that it does not tell.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CgroupMemory {
    /// 1 or 2.
    pub version: u8,
    /// Charged now, page cache included.
    pub current: Option<Bytes>,
    /// Most that was ever charged, page cache included.
    pub peak: Option<Bytes>,
    /// The limit; `None` when unlimited.
    pub limit: Option<Bytes>,
}

/// A version 1 limit at or above this means "no limit"; the kernel rounds `i64::MAX` down to a page.
const V1_UNLIMITED: u64 = 1 << 62;

/// Reads the memory control group of this process; `None` when there is none (not Linux, or not mounted).
pub fn memory() -> Option<CgroupMemory> {
    let membership = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let (version, folder) = locate(&membership, &mounts)?;
    Some(read(version, &folder))
}

fn read(version: u8, folder: &Path) -> CgroupMemory {
    let number = |name: &str| {
        let text = std::fs::read_to_string(folder.join(name)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    if version == 1 {
        CgroupMemory {
            version,
            current: number("memory.usage_in_bytes").map(Bytes),
            peak: number("memory.max_usage_in_bytes").map(Bytes),
            limit: number("memory.limit_in_bytes").filter(|n| *n < V1_UNLIMITED).map(Bytes),
        }
    } else {
        // "max" does not parse as a number and so reads as "no limit".
        CgroupMemory {
            version,
            current: number("memory.current").map(Bytes),
            peak: number("memory.peak").map(Bytes),
            limit: number("memory.max").map(Bytes),
        }
    }
}

/// Finds the folder of the memory controller: version 1 when it is mounted there, else version 2.
fn locate(membership: &str, mounts: &str) -> Option<(u8, PathBuf)> {
    let mut v2 = None;
    for line in membership.lines() {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        if controllers.split(',').any(|c| c == "memory") {
            return folder(mounts, path, |kind, options| {
                kind == "cgroup" && options.split(',').any(|o| o == "memory")
            })
            .map(|f| (1, f));
        }
        if controllers.is_empty() {
            v2 = folder(mounts, path, |kind, _| kind == "cgroup2").map(|f| (2, f));
        }
    }
    v2
}

/// Joins the mount point of the wanted file system with the group's path, less the part that the mount hides.
fn folder(mounts: &str, path: &str, wanted: impl Fn(&str, &str) -> bool) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut right = right.split(' ');
        let (kind, _, options) = (right.next()?, right.next()?, right.next()?);
        if !wanted(kind, options) {
            return None;
        }
        let mut left = left.split(' ').skip(3);
        let (root, mount_point) = (left.next()?, left.next()?);
        let inside = path.strip_prefix(root.trim_end_matches('/')).unwrap_or(path);
        Some(Path::new(mount_point).join(inside.trim_start_matches('/')))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";

    #[test]
    fn version_1_wins_when_it_holds_the_controller() {
        let got = locate("4:cpu:/x\n3:memory:/job/7\n0::/\n", V1);
        assert_eq!(got, Some((1, PathBuf::from("/sys/fs/cgroup/memory/job/7"))));
    }

    #[test]
    fn version_2_inside_a_container_whose_root_is_hidden() {
        let mounts = "30 29 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw,nsdelegate\n";
        let got = locate("0::/docker/abc/inner\n", mounts);
        assert_eq!(got, Some((2, PathBuf::from("/sys/fs/cgroup/inner"))));
        assert_eq!(locate("0::/\n", "nothing mounted"), None);
    }

    #[test]
    fn unlimited_reads_as_none_in_both_versions() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        put("memory.usage_in_bytes", "4096\n");
        put("memory.limit_in_bytes", "9223372036854771712\n");
        put("memory.current", "8192\n");
        put("memory.max", "max\n");
        put("memory.peak", "16384\n");
        let v1 = read(1, dir.path());
        assert_eq!((v1.current, v1.peak, v1.limit), (Some(Bytes(4096)), None, None));
        let v2 = read(2, dir.path());
        assert_eq!((v2.current, v2.peak, v2.limit), (Some(Bytes(8192)), Some(Bytes(16384)), None));
        put("memory.max", "1048576\n");
        assert_eq!(read(2, dir.path()).limit, Some(Bytes::mib(1)));
    }
}
