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
