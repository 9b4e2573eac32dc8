//! What a model can tell of itself while it serves.

use lightering_units::Bytes;
use serde::Serialize;

/// Where a model's memory and weights are; whatever it does not know stays `None`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct ModelStatus {
    /// Most memory that it may hold.
    pub memory_budget: Option<Bytes>,
    /// Memory that it holds.
    pub memory_used: Option<Bytes>,
    /// Weight bytes read since the start, reading ahead included.
    pub bytes_read: Option<Bytes>,
    /// Where its experts are.
    pub experts: Option<ExpertResidency>,
}

/// Where the experts of a model are.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct ExpertResidency {
    /// Layers that have experts.
    pub layers: usize,
    /// Experts of each of them.
    pub experts: usize,
    /// `[layers, experts]`: the tier in which each one is, 0 for memory, 1 and up for slower ones.
    pub tiers: Vec<u8>,
    /// Look-ups of experts since the start.
    pub lookups: u64,
    /// Part of them that were in memory.
    pub hits: u64,
}
