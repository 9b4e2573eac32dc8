use std::sync::Arc;

use lightering_kernels::ThreadPool;
use lightering_meter::MemoryPool;
use lightering_tier::ByteSource;

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
    /// How many bodies of control flow lie around this node; bounded by [`NESTING_MAX`](Self::NESTING_MAX).
    pub nesting: usize,
}

impl OpContext<'_> {
    /// Deepest nesting of control-flow bodies that is run.
    pub const NESTING_MAX: usize = 32;
}
