//! Who stays, what is fetched ahead, and whether that pays: policies by name behind small traits.
//!
//! The same objects decide in the live store and in the replay of a trace. Sockets for what is to come:
//!
//! - A predictor outside of the store (the gate of the next layer applied to this layer's input, as in Fate, section
//!   "cross-layer gate"; a router before attention, as in SmallThinker, section 3) calls
//!   [`ChunkStore::prefetch`](crate::ChunkStore::prefetch) with what it knows; a router that has spoken calls
//!   [`ChunkStore::used`](crate::ChunkStore::used), which demands.
//! - A plan of whole paths before the batch (ExpertFlow, section 3) is a [`Predictor`] whose predictions name any
//!   coming position, or prefetches with their positions, nearest first; eviction by farthest predicted use is an
//!   [`EvictionPolicy`] that was given that plan.
//! - Nested bit levels (D²MoE, section 3) are chunks of their own: `index` counts levels of experts, and level n of
//!   an expert is predicted, resident and evicted by itself, so the first n levels can be there without the others.

mod admission;
mod belady;
mod frequency;
mod lfu;
mod lru;
mod named;
mod oracle;
mod repeat_last;
mod static_hot;

use crate::ChunkId;
use lightering_units::Seconds;

pub use admission::{Always, Never, Pays};
pub use belady::Belady;
pub use frequency::{FrequencyPredictor, FrequencyTable};
pub use lfu::Lfu;
pub use lru::{GlobalLru, GroupLru};
pub use named::{ADMISSIONS, EVICTIONS, PREDICTORS, PolicyContext, PolicySet};
pub use oracle::Oracle;
pub use repeat_last::RepeatLast;
pub use static_hot::StaticHot;

/// A chunk that the router chose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Use {
    /// Which of the group.
    pub index: u32,
    /// Its weight, between 0 and 1; 1 where there is none.
    pub score: f32,
}

/// A point in the sequence of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// Steps since the start: a step passes all groups once.
    pub step: u64,
    /// The group.
    pub group: u32,
}

/// A chunk that is probably needed soon.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// Which.
    pub chunk: ChunkId,
    /// How probable, between 0 and 1.
    pub score: f32,
    /// When it will be needed.
    pub at: Position,
}

/// Decides which chunk leaves when another one needs its slot.
///
/// Calls come in the order of the run and from one thread at a time.
pub trait EvictionPolicy: Send {
    /// Name, as on the command line.
    fn name(&self) -> &'static str;

    /// A slot was given to the chunk, which is being read; `ahead` when nobody has asked for it yet.
    fn inserted(&mut self, chunk: ChunkId, ahead: bool);

    /// The chunk left its slot, or could not be read.
    fn removed(&mut self, chunk: ChunkId);

    /// The router chose the chunk, resident or not.
    fn used(&mut self, chunk: ChunkId, score: f32);

    /// All chosen ones of a group have been told.
    fn group_used(&mut self, _at: Position) {}

    /// The step is over.
    fn end_step(&mut self) {}

    /// Which of the chunks that `evictable` accepts should make room for `incoming`; `None` if none is accepted.
    fn victim(&mut self, incoming: ChunkId, evictable: &dyn Fn(ChunkId) -> bool) -> Option<ChunkId>;
}

/// Says which chunks a coming group will probably need.
pub trait Predictor: Send {
    /// Name, as on the command line.
    fn name(&self) -> &'static str;

    /// What the router chose at `at`.
    fn observed(&mut self, at: Position, used: &[Use]);

    /// Appends what will probably be needed at `coming`, the most probable first.
    fn predict(&mut self, coming: Position, predictions: &mut Vec<Prediction>);
}

/// What is known when a prefetch is to be admitted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdmissionView {
    /// Share of the store's own predictions that came true lately, whether they were admitted or not; `None` before
    /// the first.
    pub precision: Option<f64>,
    /// Share of the time, lately, in which demanded chunks were being read: what a prefetch would delay.
    pub demand_share: f64,
    /// Prefetches that are waiting or being read.
    pub prefetches_under_way: usize,
    /// Time that reading one chunk takes.
    pub read: Seconds,
    /// Time that usually passes until the prediction's position is reached.
    pub window: Seconds,
}

/// Decides whether a prediction is worth reading ahead.
pub trait AdmissionPolicy: Send {
    /// Name, as on the command line.
    fn name(&self) -> &'static str;

    /// True if the chunk should be read ahead.
    fn admits(&mut self, prediction: &Prediction, view: &AdmissionView) -> bool;
}

/// `none`: nothing is predicted.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoPrediction;

impl Predictor for NoPrediction {
    fn name(&self) -> &'static str {
        "none"
    }

    fn observed(&mut self, _at: Position, _used: &[Use]) {}

    fn predict(&mut self, _coming: Position, _predictions: &mut Vec<Prediction>) {}
}
