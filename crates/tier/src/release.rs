//! Giving freed memory back to the system.

/// Asks the allocator to return freed memory to the system, so that what planning needed for a moment does not count
/// beside what the run holds. Does nothing where the allocator offers no such call.
pub fn release_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn malloc_trim(pad: usize) -> i32;
        }
        // SAFETY: glibc's `malloc_trim` takes a number, touches only free memory and may be called at any time.
        unsafe { malloc_trim(0) };
    }
}

/// Makes the allocator give large blocks and the free end of each heap back as soon as they are freed, for the whole
/// process. Does nothing where the allocator offers no such call.
///
/// By default glibc raises both thresholds to the size of what was freed last, so that what a search freed stays
/// resident, megabytes of it, by the order in which blocks happen to come. A budget needs a heap that is small every
/// time.
pub fn keep_heap_small() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn mallopt(parameter: i32, value: i32) -> i32;
        }
        const M_TRIM_THRESHOLD: i32 = -1;
        const M_MMAP_THRESHOLD: i32 = -3;
        const M_ARENA_MAX: i32 = -8;
        // SAFETY: mallopt(3) takes any numbers and may be called at any time; the parameters only say how much memory
        // is asked from the system at once and when it is given back.
        unsafe {
            mallopt(M_MMAP_THRESHOLD, 128 << 10);
            mallopt(M_TRIM_THRESHOLD, 64 << 10);
            // One heap for all threads: they compute in memory that is given to them and hardly allocate.
            mallopt(M_ARENA_MAX, 1);
        }
    }
}

#[cfg(test)]
mod tests {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[test]
    fn freed_memory_goes_back() {
        let resident = || {
            let text = std::fs::read_to_string("/proc/self/status").expect("Linux tells");
            let line = text.lines().find(|l| l.starts_with("RssAnon:")).expect("Linux tells");
            line.split_ascii_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).expect("a number")
        };
        // Blocks below the threshold for mappings of their own, with survivors in between: nothing of this is given
        // back by freeing alone.
        let mut blocks: Vec<Vec<u8>> = (0..1000).map(|_| vec![1u8; 60_000]).collect();
        let last = blocks.pop();
        drop(blocks);
        let before = resident();
        super::release_freed_memory();
        assert!(resident() + 30_000 < before, "{before} kB before, {} kB after", resident());
        drop(last);
    }
}
