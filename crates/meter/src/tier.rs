//! Bytes read by the tier that they came from.

use lightering_units::Bytes;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Where bytes live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// An accelerator's own memory.
    Accelerator,
    /// This machine's memory.
    Ram,
    /// A local disk.
    Ssd,
    /// Another machine.
    Peer,
}

impl Tier {
    /// Every tier, fastest first.
    pub const ALL: [Tier; 4] = [Tier::Accelerator, Tier::Ram, Tier::Ssd, Tier::Peer];

    /// The name used in receipts.
    pub const fn name(self) -> &'static str {
        match self {
            Tier::Accelerator => "accelerator",
            Tier::Ram => "ram",
            Tier::Ssd => "ssd",
            Tier::Peer => "peer",
        }
    }
}

/// Counters of bytes read per tier, to be shared between threads by reference.
#[derive(Debug, Default)]
pub struct TierBytes([AtomicU64; Tier::ALL.len()]);

impl TierBytes {
    /// All zero.
    pub fn new() -> TierBytes {
        TierBytes::default()
    }

    /// Counts `read` bytes from `tier`.
    pub fn add(&self, tier: Tier, read: Bytes) {
        self.0[tier as usize].fetch_add(read.0, Ordering::Relaxed);
    }

    /// Bytes read from `tier` so far.
    pub fn get(&self, tier: Tier) -> Bytes {
        Bytes(self.0[tier as usize].load(Ordering::Relaxed))
    }

    /// The tiers from which anything was read, by name, for a receipt.
    pub fn by_name(&self) -> BTreeMap<String, Bytes> {
        Tier::ALL
            .into_iter()
            .map(|t| (t.name().to_owned(), self.get(t)))
            .filter(|(_, bytes)| *bytes > Bytes::ZERO)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_from_many_threads() {
        let bytes = TierBytes::new();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..100).for_each(|_| bytes.add(Tier::Ssd, Bytes(3))));
            }
        });
        assert_eq!(bytes.get(Tier::Ssd), Bytes(1200));
        assert_eq!(bytes.by_name().into_iter().collect::<Vec<_>>(), [("ssd".to_owned(), Bytes(1200))]);
    }
}
