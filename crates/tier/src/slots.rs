//! A leased range of the arena cut into slots of one size, with account of who reads and who writes each.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::{ArenaLease, TierError};

#[derive(Debug, Default)]
struct Loans {
    readers: usize,
    writers: Vec<Range<usize>>,
}

/// The slots. As the arena does for the engine, it checks at every loan that no writer overlaps anybody: a wrong
/// decision of the store above ends in an error, never in wrong bytes.
#[derive(Debug)]
pub(crate) struct SlotPool {
    lease: ArenaLease,
    slot_bytes: usize,
    loans: Vec<Mutex<Loans>>,
}

// SAFETY: the memory belongs to the lease, and is reached only through loans, which let no writer overlap anybody.
unsafe impl Send for SlotPool {}
// SAFETY: as above.
unsafe impl Sync for SlotPool {}

impl SlotPool {
    pub fn new(lease: ArenaLease, slot_bytes: usize) -> SlotPool {
        let count = lease.range().len() / slot_bytes.max(1);
        SlotPool { lease, slot_bytes, loans: (0..count).map(|_| Mutex::default()).collect() }
    }

    pub fn count(&self) -> usize {
        self.loans.len()
    }

    fn loans(&self, slot: usize) -> std::sync::MutexGuard<'_, Loans> {
        self.loans[slot].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Borrows a slot for reading.
    pub fn read(self: &Arc<Self>, slot: usize) -> Result<SlotRead, TierError> {
        let mut loans = self.loans(slot);
        if !loans.writers.is_empty() {
            return Err(TierError::Internal(format!("slot {slot} is read while it is being filled")));
        }
        loans.readers += 1;
        Ok(SlotRead { pool: self.clone(), slot })
    }

    /// Borrows a part of a slot for writing.
    pub fn write(&self, slot: usize, part: Range<usize>) -> Result<SlotWrite<'_>, TierError> {
        let mut loans = self.loans(slot);
        let overlaps = |w: &Range<usize>| w.start < part.end && part.start < w.end;
        if part.start > part.end || part.end > self.slot_bytes {
            return Err(TierError::Internal(format!("{part:?} passes a slot of {} bytes", self.slot_bytes)));
        }
        if loans.readers > 0 || loans.writers.iter().any(overlaps) {
            return Err(TierError::Internal(format!("slot {slot} is filled while it is in use")));
        }
        loans.writers.push(part.clone());
        Ok(SlotWrite { pool: self, slot, part })
    }

    fn start_of(&self, slot: usize) -> *mut u8 {
        // SAFETY: every slot lies in the lease, because `new` divides its size by that of a slot.
        unsafe { self.lease.as_ptr().add(slot * self.slot_bytes) }
    }
}

/// A slot borrowed for reading.
#[derive(Debug)]
pub(crate) struct SlotRead {
    pool: Arc<SlotPool>,
    slot: usize,
}

impl SlotRead {
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the slot lies in the lease, is initialised (the arena is zeroed), and has no writer until this
        // loan drops.
        unsafe { std::slice::from_raw_parts(self.pool.start_of(self.slot), self.pool.slot_bytes) }
    }
}

impl Drop for SlotRead {
    fn drop(&mut self) {
        self.pool.loans(self.slot).readers -= 1;
    }
}

/// A part of a slot borrowed for writing.
#[derive(Debug)]
pub(crate) struct SlotWrite<'a> {
    pool: &'a SlotPool,
    slot: usize,
    part: Range<usize>,
}

impl SlotWrite<'_> {
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the part lies in the slot (checked by `write`), and this loan is the only one that overlaps it.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.pool.start_of(self.slot).add(self.part.start),
                self.part.len(),
            )
        }
    }
}

impl Drop for SlotWrite<'_> {
    fn drop(&mut self) {
        let mut loans = self.pool.loans(self.slot);
        if let Some(i) = loans.writers.iter().position(|w| *w == self.part) {
            loans.writers.swap_remove(i);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Arena;
    use lightering_units::Bytes;

    #[test]
    fn loans_of_a_slot_exclude_each_other() {
        let arena = Arc::new(Arena::new(Bytes::kib(64)).unwrap());
        let pool = Arc::new(SlotPool::new(arena.lease(4096..61440).unwrap(), 16384));
        assert_eq!(pool.count(), 3);
        let mut a = pool.write(1, 0..100).unwrap();
        let mut b = pool.write(1, 100..16384).unwrap();
        a.bytes().fill(1);
        b.bytes().fill(2);
        assert!(pool.write(1, 50..60).is_err() && pool.read(1).is_err() && pool.read(0).is_ok());
        drop((a, b));
        let read = pool.read(1).unwrap();
        assert_eq!((read.bytes()[99], read.bytes()[100], read.bytes().len()), (1, 2, 16384));
        assert!(pool.write(1, 0..1).is_err() && pool.write(2, 0..16385).is_err());
        drop(read);
        assert!(pool.write(1, 0..1).is_ok());
        assert!(arena.read(5000..5001).is_err(), "the whole range belongs to the pool");
    }
}
