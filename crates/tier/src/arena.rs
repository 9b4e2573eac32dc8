//! One block of memory whose ranges are lent out under a check at run time.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use lightering_units::Bytes;

#[cfg(target_os = "linux")]
use crate::populate::{Populate, populate};

/// Alignment of the block and of every range that the planner hands out: a page, so that direct I/O can read
/// straight into it.
pub const ARENA_ALIGNMENT: usize = 4096;

/// Two holders wanted the same bytes and at least one of them wanted to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaConflict {
    /// What was asked for.
    pub wanted: Range<usize>,
    /// What is lent out already, or the whole arena when the range passes its end.
    pub held: Range<usize>,
}

impl std::fmt::Display for ArenaConflict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "bytes {}..{} of the arena were asked for while {}..{} are held",
            self.wanted.start, self.wanted.end, self.held.start, self.held.end
        )
    }
}

impl std::error::Error for ArenaConflict {}

#[derive(Debug)]
struct Loan {
    range: Range<usize>,
    /// Number of readers, or -1 for a writer.
    readers: isize,
}

/// A block of memory, zero at first, from which disjoint ranges are borrowed at the same time by several threads:
/// a kernel writes one tensor while another thread fills the next layer's weights.
///
/// The planner promises that what is used at the same time does not overlap; the arena checks that promise at
/// every loan, so that a wrong plan is an error and never a wrong answer.
///
/// ```
/// use lightering_tier::Arena;
/// use lightering_units::Bytes;
/// let arena = Arena::new(Bytes::kib(64)).unwrap();
/// let mut a = arena.write(0..100).unwrap();
/// a[0] = 7;
/// assert!(arena.read(50..60).is_err());
/// let b = arena.read(100..200).unwrap();
/// assert_eq!((a[0], b[0]), (7, 0));
/// ```
#[derive(Debug)]
pub struct Arena {
    allocation: NonNull<u8>,
    layout: Layout,
    base: NonNull<u8>,
    size: usize,
    loans: Mutex<Vec<Loan>>,
}

// SAFETY: the memory is reached only through guards, and `loans` (behind a mutex) lets no writer overlap anybody.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// Allocates `size` bytes; the system provides the pages when they are first written.
    ///
    /// # Errors
    /// `OutOfMemory` when the system refuses.
    pub fn new(size: Bytes) -> std::io::Result<Arena> {
        let refused = || {
            std::io::Error::new(
                std::io::ErrorKind::OutOfMemory,
                format!("the system refused an arena of {size}"),
            )
        };
        let size = usize::try_from(size.0).map_err(|_| refused())?;
        // A large alignment would make the allocator zero the pages by hand, and thereby touch them all; so the
        // block is over-allocated and aligned here.
        let padded = size.checked_add(ARENA_ALIGNMENT).ok_or_else(refused)?;
        let layout = Layout::from_size_align(padded, 16).map_err(|_| refused())?;
        // SAFETY: the layout is not empty.
        let allocation = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(refused)?;
        let skip = allocation.as_ptr().align_offset(ARENA_ALIGNMENT);
        // SAFETY: `skip` is less than the alignment, which the allocation has in excess.
        let base = unsafe { allocation.add(skip) };
        Ok(Arena { allocation, layout, base, size, loans: Mutex::new(Vec::with_capacity(64)) })
    }

    /// Has the system provide all pages now instead of one by one in the middle of the first run. Does nothing where
    /// the system offers no such call.
    pub fn populate(&self) {
        #[cfg(target_os = "linux")]
        {
            let length = self.size & !(ARENA_ALIGNMENT - 1);
            // Weights that pass by once for each token are bound by the rate of memory, and small pages would halve it:
            // the processor's prefetchers stop at their borders.
            // SAFETY: MADV_HUGEPAGE concerns the size of pages only; the range is as below.
            unsafe { populate(self.base.as_ptr(), length, Populate::Large) };
            // SAFETY: madvise(2) with MADV_POPULATE_WRITE faults in the pages of a range of this block, which starts
            // at a page, and leaves their bytes as they are; an older kernel refuses, which changes nothing.
            unsafe { populate(self.base.as_ptr(), length, Populate::Write) };
        }
    }

    /// Size of the block.
    pub fn size(&self) -> Bytes {
        Bytes(self.size as u64)
    }

    fn lend(&self, wanted: Range<usize>, write: bool) -> Result<(), ArenaConflict> {
        if wanted.start > wanted.end || wanted.end > self.size {
            return Err(ArenaConflict { wanted, held: 0..self.size });
        }
        if wanted.is_empty() {
            return Ok(());
        }
        let mut loans = self.loans.lock().unwrap_or_else(PoisonError::into_inner);
        let mut same = None;
        for (i, loan) in loans.iter().enumerate() {
            let apart = loan.range.end <= wanted.start || wanted.end <= loan.range.start;
            if apart {
                continue;
            }
            if write || loan.readers < 0 {
                return Err(ArenaConflict { wanted, held: loan.range.clone() });
            }
            if loan.range == wanted {
                same = Some(i);
            }
        }
        match same {
            Some(i) => loans[i].readers += 1,
            None => loans.push(Loan { range: wanted, readers: if write { -1 } else { 1 } }),
        }
        Ok(())
    }

    fn give_back(&self, range: &Range<usize>) {
        if range.is_empty() {
            return;
        }
        let mut loans = self.loans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(i) = loans.iter().position(|l| l.range == *range) {
            loans[i].readers -= 1;
            if loans[i].readers <= 0 {
                loans.swap_remove(i);
            }
        }
    }

    /// Borrows a range for reading; others may read it, too.
    ///
    /// # Errors
    /// When somebody is writing to a part of it or it passes the end.
    pub fn read(&self, range: Range<usize>) -> Result<ArenaRead<'_>, ArenaConflict> {
        self.lend(range.clone(), false)?;
        Ok(ArenaRead { arena: self, range })
    }

    /// Borrows a range for writing; nobody else may hold any part of it.
    ///
    /// # Errors
    /// When somebody holds a part of it or it passes the end.
    pub fn write(&self, range: Range<usize>) -> Result<ArenaWrite<'_>, ArenaConflict> {
        self.lend(range.clone(), true)?;
        Ok(ArenaWrite { arena: self, range })
    }
}

impl Arena {
    /// Takes a range for a long time: until the lease drops, nobody else may hold any part of it. The holder divides
    /// the range and lends out its parts by rules of its own.
    ///
    /// # Errors
    /// When somebody holds a part of it or it passes the end.
    pub fn lease(self: &Arc<Self>, range: Range<usize>) -> Result<ArenaLease, ArenaConflict> {
        self.lend(range.clone(), true)?;
        Ok(ArenaLease { arena: self.clone(), range })
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout; guards borrow the arena, so none is left.
        unsafe { dealloc(self.allocation.as_ptr(), self.layout) }
    }
}

/// A range of an [`Arena`] borrowed for reading.
#[derive(Debug)]
pub struct ArenaRead<'a> {
    arena: &'a Arena,
    range: Range<usize>,
}

/// A range of an [`Arena`] borrowed for writing.
#[derive(Debug)]
pub struct ArenaWrite<'a> {
    arena: &'a Arena,
    range: Range<usize>,
}

/// A range of an [`Arena`] that belongs to its holder alone; see [`Arena::lease`].
#[derive(Debug)]
pub struct ArenaLease {
    arena: Arc<Arena>,
    range: Range<usize>,
}

impl ArenaLease {
    /// Where in the arena the range lies.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// The first byte of the range, for those in this crate who keep account of who uses which part.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        // SAFETY: `lend` has checked that the range lies in the block.
        unsafe { self.arena.base.as_ptr().add(self.range.start) }
    }
}

impl Drop for ArenaLease {
    fn drop(&mut self) {
        self.arena.give_back(&self.range);
    }
}

impl Deref for ArenaRead<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the range is inside the block, initialised (zeroed), and lent for reading until the guard drops.
        unsafe {
            std::slice::from_raw_parts(self.arena.base.as_ptr().add(self.range.start), self.range.len())
        }
    }
}

impl Deref for ArenaWrite<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: as for reading; the writer is alone.
        unsafe {
            std::slice::from_raw_parts(self.arena.base.as_ptr().add(self.range.start), self.range.len())
        }
    }
}

impl DerefMut for ArenaWrite<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: the range is inside the block and lent to this guard alone.
        unsafe {
            std::slice::from_raw_parts_mut(self.arena.base.as_ptr().add(self.range.start), self.range.len())
        }
    }
}

impl Drop for ArenaRead<'_> {
    fn drop(&mut self) {
        self.arena.give_back(&self.range);
    }
}

impl Drop for ArenaWrite<'_> {
    fn drop(&mut self) {
        self.arena.give_back(&self.range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loans_exclude_each_other() {
        let arena = Arena::new(Bytes(1000)).unwrap();
        let r1 = arena.read(0..100).unwrap();
        let r2 = arena.read(50..150).unwrap();
        let r3 = arena.read(0..100).unwrap();
        assert!(arena.write(99..101).is_err());
        drop((r1, r2));
        assert!(arena.write(0..1).is_err());
        drop(r3);
        let w = arena.write(0..1000).unwrap();
        assert!(arena.read(10..20).is_err());
        assert!(arena.read(10..10).is_ok());
        drop(w);
        assert!(arena.read(10..20).is_ok());
        assert!(arena.read(990..1001).is_err());
        let arena = std::sync::Arc::new(arena);
        let lease = arena.lease(100..200).unwrap();
        assert!(arena.read(150..160).is_err() && arena.lease(0..101).is_err() && arena.write(0..100).is_ok());
        drop(lease);
        assert!(arena.write(150..160).is_ok() && arena.lease(900..1001).is_err());
    }

    #[test]
    fn threads_fill_disjoint_ranges() {
        let arena = Arena::new(Bytes::kib(64)).unwrap();
        std::thread::scope(|s| {
            for i in 0..8usize {
                let arena = &arena;
                s.spawn(move || arena.write(i * 8192..(i + 1) * 8192).unwrap().fill(i as u8 + 1));
            }
        });
        let all = arena.read(0..65536).unwrap();
        assert!((0..8).all(|i| all[i * 8192..(i + 1) * 8192].iter().all(|&b| b == i as u8 + 1)));
    }
}
