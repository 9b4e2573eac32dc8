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
//! unsafe code is the arena and the calls to the system that keep the resident memory known.

mod arena;
mod code;
#[cfg(target_os = "linux")]
mod populate;
mod release;
mod source;

pub use arena::{ARENA_ALIGNMENT, Arena, ArenaConflict, ArenaRead, ArenaWrite};
pub use code::make_code_resident;
pub use release::{keep_heap_small, release_freed_memory};
pub use source::{ByteSource, FileSource};
