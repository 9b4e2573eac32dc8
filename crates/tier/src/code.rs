//! The program's own code in memory.

#[cfg(target_os = "linux")]
use crate::populate::{Populate, populate};

/// Makes all code of the program and of its shared libraries resident at once, so that what the program itself costs
/// is the same figure before the first run and after it, whichever kernels a model needs. Does nothing where the
/// system offers no such call.
///
/// Code becomes resident page by page as it runs otherwise, and a budget would have to guess how much of it is still
/// to come.
pub fn make_code_resident() {
    #[cfg(target_os = "linux")]
    {
        let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return };
        for line in maps.lines() {
            let mut fields = line.split_ascii_whitespace();
            let (Some(range), Some(permissions)) = (fields.next(), fields.next()) else { continue };
            // Only mapped files: a path follows offset, device and inode.
            if permissions != "r-xp" || !fields.nth(3).is_some_and(|path| path.starts_with('/')) {
                continue;
            }
            let bound = |text: &str| usize::from_str_radix(text, 16).ok();
            let Some((start, end)) = range.split_once('-') else { continue };
            let (Some(start), Some(end)) = (bound(start), bound(end)) else { continue };
            // SAFETY: madvise(2) with MADV_POPULATE_READ only reads the pages of a mapping in; the range is a
            // mapping of code that stays as long as the process. An older kernel refuses, which changes nothing.
            unsafe { populate(start as *mut u8, end.saturating_sub(start), Populate::Read) };
        }
    }
}
