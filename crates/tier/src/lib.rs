//! Stores of bytes that are slower or larger than memory.
//!
//! ```
//! use lightering_tier::ByteSource;
//! let store = vec![1u8, 2, 3, 4];
//! let mut window = [0u8; 2];
//! store.read_at(1, &mut window).unwrap();
//! assert_eq!(window, [2, 3]);
//! ```
//!
//! Invariants: this crate knows nothing of graphs, tensors or file formats; it moves ranges of bytes. Its only
//! unsafe code is the arena, the slots that the chunk store cuts out of it, and the calls to the system that keep the
//! resident memory known.

mod arena;
mod cache;
mod chunk;
mod code;
mod direct;
mod drive;
mod error;
mod joined;
pub mod policy;
#[cfg(target_os = "linux")]
mod populate;
mod release;
mod replay;
mod scratch;
mod slots;
mod source;
mod spill;
mod stats;
mod store;
mod synthetic;
mod throttled;
mod trace;

pub use arena::{ARENA_ALIGNMENT, Arena, ArenaConflict, ArenaLease, ArenaRead, ArenaWrite};
pub use chunk::{ChunkCatalog, ChunkId, EXTENT_ALIGNMENT, Extent};
pub use code::make_code_resident;
pub use direct::DirectFile;
pub use drive::drive;
pub use error::TierError;
pub use joined::JoinedSource;
pub use release::{keep_heap_small, release_freed_memory};
pub use replay::{DiskModel, ReplayReport, replay, replay_load_on_demand};
pub use scratch::ScratchFile;
pub use source::{ByteSource, FileSource};
pub use spill::SpillFile;
pub use stats::{ChunkResidency, Residency, StoreStats};
pub use store::{ChunkGuard, ChunkStore, IO_THREADS_MAX, StoreOptions, Urgency};
pub use synthetic::SyntheticTrace;
pub use throttled::ThrottledSource;
pub use trace::{ChunkTrace, TRACE_MAX_BYTES, TraceHeader, TraceWriter, Turn};
