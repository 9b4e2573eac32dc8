//! The experts of a mixture: computed from weights that are all in memory, or from a store that holds some of them and
//! reads the others when the router asks for them.

use std::io::Write;
use std::ops::Range;
use std::sync::Arc;

use lightering_graph::{LmOp, Op, StoredTensor};
use lightering_kernels::{
    Activation, BlockActivations, BlockWeights, ExpertFfn, ThreadPool, block_matmul_scratch_len, expert_ffn,
    expert_ffn_scratch_len,
};
use lightering_tier::policy::{PolicyContext, PolicySet, Use};
use lightering_tier::{
    ARENA_ALIGNMENT, Arena, ByteSource, ChunkCatalog, ChunkId, ChunkStore, ChunkTrace, Extent, StoreOptions,
};
use lightering_units::{BlockFormat, Bytes};

use crate::EngineError;
use crate::kernel::Kernel;
use crate::program::{Buffer, BufferKind, Program, Storage, TensorInfo, WeightOrigin};

/// Sizes of one layer's experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ExpertsShape {
    /// Experts of the layer.
    pub count: usize,
    /// Elements of the rows that go in and come out.
    pub width: usize,
    /// Elements between.
    pub hidden: usize,
    /// Of gate, up and down.
    pub formats: [BlockFormat; 3],
    pub activation: Activation,
}

impl ExpertsShape {
    /// Bytes of the weights of all experts.
    pub fn weight_bytes(&self) -> usize {
        let size = |format: BlockFormat, k, n: usize| format.row_bytes(k).unwrap_or(0) * n;
        let [gate, up, down] = self.formats;
        let one = size(gate, self.width, self.hidden)
            + size(up, self.width, self.hidden)
            + size(down, self.hidden, self.width);
        one * self.count
    }

    /// Values of scratch for `rows` rows with `k` experts each.
    pub fn scratch_len(&self, rows: usize, k: usize) -> usize {
        let [gate, _, down] = self.formats;
        rows * k * self.width
            + block_matmul_scratch_len(gate, self.width, rows)
            + self.own_up(rows)
            + expert_ffn_scratch_len(down, self.width, self.hidden, rows)
    }

    /// Scratch of activations for `up`, where those for `gate` do not serve it.
    fn own_up(&self, rows: usize) -> usize {
        let [gate, up, _] = self.formats;
        if gate.block_len() == up.block_len() { 0 } else { block_matmul_scratch_len(up, self.width, rows) }
    }

    fn ffn<'a>(&self, parts: [&'a [u8]; 3]) -> ExpertFfn<'a> {
        let [gate, up, down] =
            std::array::from_fn(|i| BlockWeights { format: self.formats[i], bytes: parts[i] });
        let ExpertsShape { width, hidden, activation, .. } = *self;
        ExpertFfn { width, hidden, activation, gate, up, down }
    }
}

/// Where the weights of a layer's experts are.
pub(crate) enum ExpertWeights<'a> {
    /// Gate, up and down of all of them.
    Resident([&'a [u8]; 3]),
    /// In a store, as the chunks of a group.
    Stored { store: &'a ChunkStore, group: u32 },
}

/// `y[row] = Σ weights[row, i] · expert(ids[row, i])(x[row])`, added up in the order of `i`, so that neither the order
/// in which experts arrive nor the rows beside it change the bits of a row.
pub(crate) fn compute(
    pool: &ThreadPool,
    shape: &ExpertsShape,
    source: &ExpertWeights<'_>,
    x: &[f32],
    ids: &[i32],
    weights: &[f32],
    y: &mut [f32],
    scratch: &mut [f32],
) -> Result<(), EngineError> {
    let rows = x.len() / shape.width.max(1);
    let k = ids.len() / rows.max(1);
    let mut chosen: Vec<Chosen> = Vec::new();
    for (place, (&id, &weight)) in ids.iter().zip(weights).enumerate() {
        let expert = usize::try_from(id)
            .ok()
            .filter(|&e| e < shape.count)
            .ok_or_else(|| EngineError::Invalid(format!("expert {id} of {} was chosen", shape.count)))?;
        let at = match chosen.iter().position(|c| c.expert == expert) {
            Some(at) => at,
            None => {
                chosen.push(Chosen { expert, ..Chosen::default() });
                chosen.len() - 1
            }
        };
        chosen[at].rows.push((place / k) as u32);
        chosen[at].places.push(place as u32);
        chosen[at].weights.push(weight);
    }
    let [gate, up, _] = shape.formats;
    let (results, rest) = scratch.split_at_mut(rows * k * shape.width);
    let (for_gate, rest) = rest.split_at_mut(block_matmul_scratch_len(gate, shape.width, rows));
    let (for_up, rest) = rest.split_at_mut(shape.own_up(rows));
    let ready = BlockActivations::new(pool, gate, shape.width, x, rows, for_gate);
    let own_up = gate.block_len() != up.block_len();
    let ready_up = own_up.then(|| BlockActivations::new(pool, up, shape.width, x, rows, for_up));
    let mut one = |c: &Chosen, parts: [&[u8]; 3]| {
        let ffn = shape.ffn(parts);
        let (rows, places) = (&c.rows, &c.places);
        expert_ffn(pool, &ffn, &ready, ready_up.as_ref(), rows, places, &c.weights, results, rest);
    };
    match source {
        ExpertWeights::Resident(whole) => {
            for c in &chosen {
                one(
                    c,
                    whole.map(|w| {
                        let size = w.len() / shape.count;
                        &w[c.expert * size..(c.expert + 1) * size]
                    }),
                );
            }
        }
        ExpertWeights::Stored { store, group } => {
            let mut uses: Vec<Use> = chosen
                .iter()
                .map(|c| Use {
                    index: c.expert as u32,
                    score: c.weights.iter().fold(0.0, |a: f32, &b| a.max(b)),
                })
                .collect();
            uses.sort_by(|a, b| b.score.total_cmp(&a.score));
            store.used(*group, &uses)?;
            let mut waiting: Vec<ChunkId> =
                chosen.iter().map(|c| ChunkId::new(*group, c.expert as u32)).collect();
            while !waiting.is_empty() {
                let (at, guard) = store.acquire_any(&waiting)?;
                one(&chosen[at], [guard.extent(0), guard.extent(1), guard.extent(2)]);
                waiting.swap_remove(at);
                chosen.swap_remove(at);
            }
        }
    }
    for (y, results) in y.chunks_exact_mut(shape.width).zip(results.chunks_exact(k * shape.width)) {
        let (first, others) = results.split_at(shape.width);
        y.copy_from_slice(first);
        for result in others.chunks_exact(shape.width) {
            y.iter_mut().zip(result).for_each(|(y, r)| *y += r);
        }
    }
    Ok(())
}

/// An expert of a step and what it is to compute.
#[derive(Default)]
struct Chosen {
    expert: usize,
    rows: Vec<u32>,
    /// Places of the results: row · k + rank.
    places: Vec<u32>,
    weights: Vec<f32>,
}

/// The experts of all layers as chunks of a store, and the part of the arena where it keeps some of them.
#[derive(Clone, Debug)]
pub(crate) struct ExpertSet {
    /// Per layer: gate, up and down of all experts as they lie in their source, and the number of experts.
    groups: Vec<([StoredTensor; 3], usize)>,
    /// Bytes that one expert takes in the store.
    pub slot_bytes: usize,
    /// Experts that fit into it.
    pub slots: usize,
    /// Its buffer.
    buffer: usize,
}

/// Fewest experts with which a store works: one that computes, and one on its way.
pub(crate) const SLOTS_MIN: usize = 2;

impl ExpertSet {
    /// Experts in all.
    pub fn total(&self) -> usize {
        self.groups.iter().map(|(_, count)| count).sum()
    }

    pub fn layers(&self) -> usize {
        self.groups.len()
    }

    /// Bytes of all experts as they are stored.
    pub fn stored_bytes(&self) -> Bytes {
        self.groups.iter().flat_map(|(parts, _)| parts.iter().map(|p| p.size)).sum()
    }

    fn chunks(&self) -> impl Iterator<Item = (ChunkId, Vec<Extent>)> + '_ {
        self.groups.iter().enumerate().flat_map(|(group, (parts, count))| {
            (0..*count).map(move |e| {
                let extents = parts.map(|part| {
                    let size = part.size.0 / *count as u64;
                    let offset = part.offset + e as u64 * size;
                    Extent { source: part.source.0, offset, size: Bytes(size) }
                });
                (ChunkId::new(group as u32, e as u32), extents.to_vec())
            })
        })
    }

    /// The part of the arena for the store: whole pages within the buffer.
    fn region(&self, offset: usize) -> Range<usize> {
        let start = offset.next_multiple_of(ARENA_ALIGNMENT);
        start..start + self.slots * self.slot_bytes
    }

    /// Opens the store in its part of the arena.
    pub fn open(
        &self,
        arena: &Arc<Arena>,
        buffer_offset: &[usize],
        sources: &[Arc<dyn ByteSource>],
        options: &ExpertOptions,
    ) -> Result<ChunkStore, EngineError> {
        let catalog = Arc::new(ChunkCatalog::new(sources.to_vec(), self.chunks())?);
        debug_assert!(
            catalog.slot_bytes().to_usize() <= self.slot_bytes,
            "slots are planned for direct reads"
        );
        let context = PolicyContext {
            groups: (0..self.groups.len() as u32).collect(),
            slots: self.slots,
            trace: options.recorded.clone(),
        };
        let policies = PolicySet::named(&options.eviction, &options.prefetch, &options.admission, &context)?;
        let trace = match &options.trace {
            None => None,
            Some(open) => {
                let out = open().map_err(|error| EngineError::Io {
                    weight: "the trace of chosen experts".to_owned(),
                    source_name: "its file".to_owned(),
                    error,
                })?;
                Some((out, lightering_tier::TRACE_MAX_BYTES))
            }
        };
        let store = StoreOptions { io_threads: options.io_threads, trace, ..StoreOptions::from(policies) };
        Ok(ChunkStore::new(catalog, arena, self.region(buffer_offset[self.buffer]), store)?)
    }
}

/// Opens what a trace is written to.
pub type OpenTrace = Arc<dyn Fn() -> std::io::Result<Box<dyn Write + Send>> + Send + Sync>;

/// How experts that do not all fit into memory are kept and fetched; names as in [`lightering_tier::policy`].
#[derive(Clone)]
pub struct ExpertOptions {
    /// Who leaves.
    pub eviction: String,
    /// What is predicted.
    pub prefetch: String,
    /// Which predictions are read ahead.
    pub admission: String,
    /// Reads under way at the same time.
    pub io_threads: usize,
    /// Where the choices of the routers are recorded.
    pub trace: Option<OpenTrace>,
    /// A recorded run, for policies that know the past or the future.
    pub recorded: Option<Arc<ChunkTrace>>,
}

impl Default for ExpertOptions {
    fn default() -> ExpertOptions {
        ExpertOptions {
            eviction: "lru".to_owned(),
            prefetch: "none".to_owned(),
            admission: "pays".to_owned(),
            io_threads: 4,
            trace: None,
            recorded: None,
        }
    }
}

impl std::fmt::Debug for ExpertOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {}, {}, {} reads", self.eviction, self.prefetch, self.admission, self.io_threads)
    }
}

/// Moves the experts of all layers out of the program's weights into a store without slots, whose buffer has no size
/// yet; `None` if there are none whose weights are stored.
pub(crate) fn move_to_store(program: &mut Program) -> Option<()> {
    let mut groups = Vec::new();
    let mut moved: Vec<(usize, [usize; 3])> = Vec::new();
    for (i, instruction) in program.instructions.iter().enumerate() {
        let Op::Lm(op) = &instruction.node.op else { continue };
        let LmOp::Experts { .. } = **op else { continue };
        let part = |operand: usize| {
            let tensor = instruction.inputs.get(operand)?.as_ref()?.tensor;
            let Storage::Weight(w) = program.tensors[tensor].storage else { return None };
            let WeightOrigin::Stored(stored) = program.weights[w].origin else { return None };
            Some((tensor, w, stored))
        };
        let parts = [part(3)?, part(4)?, part(5)?];
        let count = program.tensors[parts[0].0].dims[0];
        groups.push((parts.map(|(.., stored)| stored), count));
        moved.push((i, parts.map(|(_, w, _)| w)));
    }
    if groups.is_empty() {
        return None;
    }
    for (group, (i, weights)) in moved.into_iter().enumerate() {
        for w in weights {
            program.weights[w].packing = crate::kernel::Packing::Stored;
            program.weights[w].size = 0;
        }
        let instruction = Arc::make_mut(&mut program.instructions[i]);
        if let Kernel::Experts { group: in_store, .. } = &mut instruction.kernel {
            *in_store = Some(group as u32);
        }
        instruction.inputs.truncate(3);
    }
    program.buffers.push(Buffer { name: "experts".into(), size: 0, kind: BufferKind::Experts });
    let buffer = program.buffers.len() - 1;
    // The store's place belongs to no instruction, but is alive from the first to the last.
    program.tensors.push(Arc::new(TensorInfo {
        name: "experts".into(),
        dtype: lightering_units::DType::U8,
        dims: vec![0],
        storage: Storage::Buffer { buffer, offset: 0 },
    }));
    let mut set = ExpertSet { groups, slot_bytes: 0, slots: 0, buffer };
    set.slot_bytes = slot_bytes(&set);
    program.experts = Some(Arc::new(set));
    Some(())
}

/// Bytes of the slots of a catalog with these chunks.
fn slot_bytes(set: &ExpertSet) -> usize {
    // Sources play no part in the sizes but must reach far enough.
    let sources =
        set.groups.iter().flat_map(|(p, _)| p.iter()).map(|p| p.source.0 as usize).max().unwrap_or(0);
    let endless: Arc<dyn ByteSource> = Arc::new(Endless);
    ChunkCatalog::new(vec![endless; sources + 1], set.chunks()).map_or(0, |c| c.slot_bytes().to_usize())
}

/// A source that is only measured, never read.
struct Endless;

impl ByteSource for Endless {
    fn len_bytes(&self) -> Bytes {
        Bytes(u64::MAX)
    }

    fn read_at(&self, _offset: u64, _buffer: &mut [u8]) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    fn name(&self) -> String {
        "nothing".to_owned()
    }

    // Slots for whole pages are the larger ones; whether the real source is read so is known when it is opened.
    fn is_direct(&self) -> bool {
        true
    }
}

/// Gives the store room for `slots` experts.
pub(crate) fn set_slots(program: &mut Program, slots: usize) {
    let Some(set) = &mut program.experts else { return };
    let set = Arc::make_mut(set);
    set.slots = slots;
    // One page more, because buffers do not begin at pages.
    program.buffers[set.buffer].size = slots * set.slot_bytes + ARENA_ALIGNMENT;
}
