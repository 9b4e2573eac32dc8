use std::sync::Arc;

use lightering_graph::{PixelFormat, Tensor};
use lightering_kernels::ThreadPool;
use lightering_meter::MemoryPool;
use lightering_tier::ByteSource;

use super::OpError;

/// Turns the bytes of a picture file into pixels; the engine itself knows no file formats.
pub trait ImageDecoder: Sync {
    /// Pixels `[height, width, channels]` as u8. Implementations ask `memory` before they allocate.
    ///
    /// # Errors
    /// [`OpError::Invalid`] for broken files, [`OpError::Unsupported`] for unknown formats.
    fn decode(&self, file: &[u8], format: PixelFormat, memory: &MemoryPool) -> Result<Tensor, OpError>;
}

/// What an operator may use besides its operands.
pub struct OpContext<'a> {
    /// Who does the work.
    pub threads: &'a ThreadPool,
    /// Where heap values are counted.
    pub memory: &'a MemoryPool,
    /// The stores that weights of control-flow bodies are read from.
    pub sources: &'a [Arc<dyn ByteSource>],
    /// Random operators without a seed of their own start from this, mixed with something of the node's.
    pub seed: u64,
    /// Decoder of pictures for `ImageDecode`, if the caller has one.
    pub images: Option<&'a dyn ImageDecoder>,
    /// How many bodies of control flow lie around this node; bounded by [`NESTING_MAX`](Self::NESTING_MAX).
    pub nesting: usize,
}

impl OpContext<'_> {
    /// Deepest nesting of control-flow bodies that is run.
    pub const NESTING_MAX: usize = 32;
}
