//! Pages that the system provides now instead of at their first use, and large ones where it has them.

/// What the pages are for; the values are those of madvise(2).
#[derive(Clone, Copy, Debug)]
pub(crate) enum Populate {
    /// Mapped files are read in.
    Read = 22,
    /// Pages of their own are provided.
    Write = 23,
    /// Pages of their own are to be large ones.
    Large = 14,
}

/// Tells the system about the pages of a range; an older kernel refuses, which changes nothing.
///
/// # Safety
/// The range is mapped, and stays mapped during the call.
pub(crate) unsafe fn populate(start: *mut u8, length: usize, how: Populate) {
    unsafe extern "C" {
        fn madvise(address: *mut std::ffi::c_void, length: usize, advice: i32) -> i32;
    }
    // SAFETY: the caller promises the mapping, whose bytes this advice leaves as they are.
    unsafe { madvise(start.cast(), length, how as i32) };
}
