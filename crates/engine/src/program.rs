//! A graph as a list of instructions over buffers: what the planner places and the session walks.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use lightering_graph::{
    Constant, Graph, Node, NodeId, Op, StoredTensor, Tensor, TensorType, ValueId, ValueKind, ValueType,
};
use lightering_tier::ARENA_ALIGNMENT;
use lightering_units::{Bytes, DType};

use crate::EngineError;
use crate::experts::ExpertSet;
use crate::kernel::{Kernel, Lowered, Packing, absorbed_transposes, lower};
use crate::ops;

/// Buffers start at multiples of this many bytes: a cache line, and one AVX-512 register.
pub(crate) const BUFFER_ALIGNMENT: usize = 64;

/// Rounds a size up to the alignment of buffers.
pub(crate) fn aligned(size: usize) -> usize {
    size.next_multiple_of(BUFFER_ALIGNMENT)
}

/// What a buffer is for; decides its colour in the picture and whether it may move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BufferKind {
    /// Given by the caller.
    Input,
    /// Between two instructions.
    Activation,
    /// Handed to the caller.
    Output,
    /// Kept between runs: caches of keys and values.
    State,
    /// Experts of a mixture, as many as fit.
    Experts,
    /// Scratch of one instruction.
    Workspace,
    /// Weights that stay for the whole run.
    Weight,
    /// Weights that are read when they are needed.
    Streamed,
    /// Where weights land before they are packed.
    Staging,
}

/// A range of the arena with a lifetime.
#[derive(Clone, Debug)]
pub(crate) struct Buffer {
    pub name: Arc<str>,
    pub size: usize,
    pub kind: BufferKind,
}

/// Where a tensor's bytes are.
#[derive(Clone, Debug)]
pub(crate) enum Storage {
    /// In the arena: a range of a buffer.
    Buffer { buffer: usize, offset: usize },
    /// A weight, packed as its kernel wants it.
    Weight(usize),
    /// A small constant in ordinary memory.
    Inline(Arc<Tensor>),
    /// A value on the counted heap, whose size is known when it is made.
    Heap(usize),
    /// Rows of a stored table that are read one by one; see [`Kernel::GatherStored`].
    Stored(StoredTensor),
}

/// A tensor of the program.
#[derive(Clone, Debug)]
pub(crate) struct TensorInfo {
    pub name: Arc<str>,
    pub dtype: DType,
    pub dims: Vec<usize>,
    pub storage: Storage,
}

impl TensorInfo {
    pub fn size_bytes(&self) -> usize {
        self.dims.iter().product::<usize>() * self.dtype.size_bytes()
    }
}

/// Where the original elements of a weight come from.
#[derive(Clone, Debug)]
pub(crate) enum WeightOrigin {
    Stored(StoredTensor),
    Inline(Arc<Tensor>),
}

/// A constant that takes room in the arena.
#[derive(Clone, Debug)]
pub(crate) struct Weight {
    pub name: Arc<str>,
    pub origin: WeightOrigin,
    pub packing: Packing,
    /// Bytes in the arena, packed.
    pub size: usize,
    /// It is a tensor of the run itself that waits on the disk for its next use; see [`crate::spill`].
    pub spilled: bool,
}

impl Weight {
    /// Bytes as the model stores them.
    pub fn stored_bytes(&self) -> usize {
        match &self.origin {
            WeightOrigin::Stored(s) => s.size.to_usize(),
            WeightOrigin::Inline(t) => t.size_bytes().to_usize(),
        }
    }
}

/// A tensor, or some rows of it, as an instruction sees it.
#[derive(Clone, Debug)]
pub(crate) struct Operand {
    pub tensor: usize,
    /// Sizes of the part.
    pub dims: Vec<usize>,
    /// Where the part is within the tensor's bytes.
    pub bytes: Range<usize>,
}

/// Which rows an instruction computes when its layer is split into stripes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stripe {
    /// Rows of the whole result.
    pub output_rows: Range<usize>,
    /// For each operand: the first row, in the whole operand, of the part that is given.
    pub input_first_rows: Vec<usize>,
}

/// One call of a kernel.
#[derive(Clone, Debug)]
pub(crate) struct Instruction {
    pub node: Arc<Node>,
    pub kernel: Kernel,
    pub inputs: Vec<Option<Operand>>,
    pub outputs: Vec<Option<Operand>>,
    /// Scratch bytes.
    pub workspace: usize,
    pub stripe: Option<Stripe>,
    pub cost: lightering_graph::Cost,
    /// How many of the first results stand in the place of the operands of the same number, which are then not given.
    pub in_place: usize,
    /// Position in the program before it was split into stripes.
    pub origin: usize,
}

/// Instructions over tensors, buffers and weights.
///
/// The planner looks at many programs that differ in a few instructions, so copies share what they have in common.
#[derive(Clone, Debug, Default)]
pub(crate) struct Program {
    pub tensors: Vec<Arc<TensorInfo>>,
    pub buffers: Vec<Buffer>,
    pub weights: Vec<Weight>,
    pub instructions: Vec<Arc<Instruction>>,
    /// Graph inputs: name, tensor (or heap slot), declared type.
    pub inputs: Vec<Port>,
    /// Graph outputs.
    pub outputs: Vec<Port>,
    /// Tensors that wait on the disk between two uses.
    pub spills: Vec<Spill>,
    /// What is kept between runs.
    pub states: Vec<StateInfo>,
    pub heap_slots: usize,
    /// The experts that a store holds.
    pub experts: Option<Arc<ExpertSet>>,
}

/// A tensor that is written to the disk after one use and comes back as a weight for the next: later in the same run, or,
/// if it is a state, in the next one.
#[derive(Clone, Debug)]
pub(crate) struct Spill {
    pub tensor: usize,
    pub weight: usize,
    /// Number of the state whose home the disk is.
    pub state: Option<usize>,
}

/// A tensor that is kept between runs, and what it holds before the first; zeros when nothing is said.
#[derive(Clone, Debug)]
pub(crate) struct StateInfo {
    pub tensor: usize,
    pub initial: Option<Constant>,
}

/// A value that crosses the border of the program.
#[derive(Clone, Debug)]
pub(crate) struct Port {
    pub name: String,
    pub ty: ValueType,
    pub tensor: usize,
}

/// Constants up to this size stay in ordinary memory; larger ones are weights and take room in the arena.
pub(crate) const INLINE_MAX: usize = 16 << 10;

struct Builder<'a> {
    graph: &'a Graph,
    program: Program,
    /// Per value: its tensor, once it has one.
    tensor_of: Vec<Option<usize>>,
    weight_of: HashMap<(ValueId, Packing), usize>,
    threads: usize,
    /// Transpositions whose readers take the untransposed operand.
    absorbed: HashSet<NodeId>,
}

/// The tensor type with every dimension known, if it has one.
fn static_type(ty: &ValueType) -> Option<(DType, Vec<usize>)> {
    let t = ty.tensor()?;
    if t.dtype == DType::String {
        return None;
    }
    let dims = t.dims()?;
    t.size_bytes()?;
    Some((t.dtype, dims))
}

/// How a node only gives another name or shape to the bytes of its operand.
enum View {
    /// All of them.
    Whole,
    /// A contiguous part from this byte on.
    Part(usize),
}

impl Program {
    /// Turns a bound, verified graph with inferred types into instructions.
    pub fn build(graph: &Graph, threads: usize) -> Result<Program, EngineError> {
        let mut b = Builder {
            graph,
            program: Program::default(),
            tensor_of: vec![None; graph.values.len()],
            weight_of: HashMap::new(),
            threads,
            absorbed: absorbed_transposes(graph),
        };
        for &input in &graph.inputs {
            let tensor = match static_type(&graph.value(input).ty) {
                Some(_) => b.new_buffer_tensor(input, BufferKind::Input)?,
                None => b.new_heap_tensor(input),
            };
            b.program.inputs.push(Port {
                name: graph.value(input).name.clone(),
                ty: graph.value(input).ty.clone(),
                tensor,
            });
        }
        for (id, node) in graph.iter_nodes() {
            if !b.absorbed.contains(&id) {
                b.add(node)?;
            }
        }
        for &output in &graph.outputs {
            let tensor = b.tensor(output)?;
            if let Storage::Buffer { buffer, .. } = b.program.tensors[tensor].storage
                && b.program.buffers[buffer].kind == BufferKind::Activation
            {
                b.program.buffers[buffer].kind = BufferKind::Output;
            }
            b.program.outputs.push(Port {
                name: graph.value(output).name.clone(),
                ty: graph.value(output).ty.clone(),
                tensor,
            });
        }
        b.place_concatenations();
        b.mark_in_place();
        Ok(b.program)
    }

    /// The buffers that an instruction touches.
    pub fn buffers_of(&self, instruction: &Instruction) -> impl Iterator<Item = usize> + '_ {
        let operands: Vec<usize> =
            instruction.inputs.iter().chain(&instruction.outputs).flatten().map(|o| o.tensor).collect();
        operands.into_iter().filter_map(|t| match self.tensors[t].storage {
            Storage::Buffer { buffer, .. } => Some(buffer),
            _ => None,
        })
    }

    /// Bytes of the states that an instruction touches.
    pub fn state_bytes_of(&self, instruction: &Instruction) -> usize {
        let mut states: Vec<usize> =
            self.buffers_of(instruction).filter(|&b| self.buffers[b].kind == BufferKind::State).collect();
        states.sort_unstable();
        states.dedup();
        states.into_iter().map(|b| self.buffers[b].size).sum()
    }

    /// The weights that an instruction reads.
    pub fn weights_of(&self, instruction: &Instruction) -> impl Iterator<Item = usize> + '_ {
        let operands: Vec<usize> = instruction.inputs.iter().flatten().map(|o| o.tensor).collect();
        operands.into_iter().filter_map(|t| match self.tensors[t].storage {
            Storage::Weight(w) => Some(w),
            _ => None,
        })
    }

    /// The whole of a tensor as an operand.
    pub fn whole(&self, tensor: usize) -> Operand {
        let info = &self.tensors[tensor];
        let size = match info.storage {
            Storage::Weight(w) => self.weights[w].size,
            Storage::Heap(_) => 0,
            _ => info.size_bytes(),
        };
        Operand { tensor, dims: info.dims.clone(), bytes: 0..size }
    }
}

impl Builder<'_> {
    fn new_tensor(&mut self, value: ValueId, storage: Storage) -> usize {
        let v = self.graph.value(value);
        let (dtype, dims) =
            static_type(&v.ty).unwrap_or_else(|| (v.ty.tensor().map_or(DType::U8, |t| t.dtype), Vec::new()));
        let name = v.name.as_str().into();
        self.program.tensors.push(Arc::new(TensorInfo { name, dtype, dims, storage }));
        let tensor = self.program.tensors.len() - 1;
        self.tensor_of[value.index()] = Some(tensor);
        tensor
    }

    fn new_buffer_tensor(&mut self, value: ValueId, kind: BufferKind) -> Result<usize, EngineError> {
        let v = self.graph.value(value);
        let size = v.ty.tensor().and_then(TensorType::size_bytes).filter(|&s| s < isize::MAX as usize / 2);
        let size =
            size.ok_or_else(|| EngineError::Invalid(format!("{:?} ({}) is too large", v.name, v.ty)))?;
        self.program.buffers.push(Buffer { name: v.name.as_str().into(), size: aligned(size), kind });
        let buffer = self.program.buffers.len() - 1;
        Ok(self.new_tensor(value, Storage::Buffer { buffer, offset: 0 }))
    }

    fn new_heap_tensor(&mut self, value: ValueId) -> usize {
        let slot = self.program.heap_slots;
        self.program.heap_slots += 1;
        self.new_tensor(value, Storage::Heap(slot))
    }

    /// The tensor of a value; constants get theirs when they are first asked for.
    fn tensor(&mut self, value: ValueId) -> Result<usize, EngineError> {
        if let Some(tensor) = self.tensor_of[value.index()] {
            return Ok(tensor);
        }
        match &self.graph.value(value).kind {
            ValueKind::Constant(Constant::Inline(t))
                if t.size_bytes().to_usize() <= INLINE_MAX || t.dtype() == DType::String =>
            {
                Ok(self.new_tensor(value, Storage::Inline(t.clone())))
            }
            ValueKind::State(initial) => {
                let tensor = self.new_buffer_tensor(value, BufferKind::State)?;
                let initial = initial.clone();
                self.program.states.push(StateInfo { tensor, initial });
                Ok(tensor)
            }
            ValueKind::Constant(_) => {
                let tensor = self.weight(value, Packing::Plain)?;
                self.tensor_of[value.index()] = Some(tensor);
                Ok(tensor)
            }
            _ => Err(EngineError::Internal(format!("{:?} has no storage", self.graph.value(value).name))),
        }
    }

    /// The tensor of a constant packed in a certain way.
    fn weight(&mut self, value: ValueId, packing: Packing) -> Result<usize, EngineError> {
        if let Some(&tensor) = self.weight_of.get(&(value, packing.clone())) {
            return Ok(tensor);
        }
        let v = self.graph.value(value);
        let origin = match v.constant() {
            Some(Constant::Inline(t)) => WeightOrigin::Inline(t.clone()),
            Some(Constant::Stored(s)) => WeightOrigin::Stored(*s),
            None => return Err(EngineError::Internal(format!("{:?} is not a constant", v.name))),
        };
        let (dtype, dims) = static_type(&v.ty).ok_or_else(|| {
            EngineError::Invalid(format!("weight {:?} has no fixed type: {}", v.name, v.ty))
        })?;
        let plain = dims.iter().product::<usize>() * dtype.size_bytes();
        if let WeightOrigin::Stored(s) = &origin
            && s.size != Bytes(plain as u64)
        {
            let problem =
                format!("weight {:?} takes {} but {} are stored", v.name, Bytes(plain as u64), s.size);
            return Err(EngineError::Invalid(problem));
        }
        let size = aligned(packing.packed_bytes(plain));
        let name: Arc<str> = v.name.as_str().into();
        self.program.weights.push(Weight {
            name: name.clone(),
            origin,
            packing: packing.clone(),
            size,
            spilled: false,
        });
        let storage = Storage::Weight(self.program.weights.len() - 1);
        self.program.tensors.push(Arc::new(TensorInfo { name, dtype, dims, storage }));
        let tensor = self.program.tensors.len() - 1;
        self.weight_of.insert((value, packing), tensor);
        Ok(tensor)
    }

    fn add(&mut self, node: &Node) -> Result<(), EngineError> {
        let graph = self.graph;
        let input_types: Vec<Option<&ValueType>> =
            node.inputs.iter().map(|v| v.map(|v| &graph.value(v).ty)).collect();
        let outputs_static =
            node.outputs.iter().flatten().all(|&v| static_type(&graph.value(v).ty).is_some());
        let dynamic = !outputs_static || ops::is_dynamic(&node.op, &input_types);
        if !dynamic && let Some(()) = self.add_view(node)? {
            return Ok(());
        }
        let lowered = if dynamic {
            Lowered::generic(Kernel::Dynamic)
        } else {
            let heap_operand = node.inputs.iter().flatten().any(|v| {
                self.tensor_of[v.index()]
                    .is_some_and(|t| matches!(self.program.tensors[t].storage, Storage::Heap(_)))
            });
            if heap_operand {
                // The operand's shape is known to the graph only if inference said so; the kernel checks again.
                Lowered::generic(Kernel::Generic)
            } else {
                lower(graph, node, self.threads, &self.absorbed)
            }
        };
        let mut inputs = Vec::with_capacity(node.inputs.len());
        for (i, &value) in node.inputs.iter().enumerate() {
            let value = lowered.replaced.iter().find(|(o, _)| *o == i).map_or(value, |(_, v)| Some(*v));
            inputs.push(match value {
                None => None,
                Some(_) if lowered.absorbed.contains(&i) => None,
                Some(value) => {
                    let tensor = match lowered.packings.iter().find(|(operand, _)| *operand == i) {
                        Some((_, packing)) => self.weight(value, packing.clone())?,
                        None => self.tensor(value)?,
                    };
                    Some(self.program.whole(tensor))
                }
            });
        }
        // A result that updates a state is the state.
        let updated = node.op.updated_states();
        let states = (0..updated)
            .map(|i| self.state_of(node, inputs.get(i).and_then(Option::as_ref)))
            .collect::<Result<Vec<_>, _>>()?;
        let mut outputs = Vec::with_capacity(node.outputs.len());
        for (i, &value) in node.outputs.iter().enumerate() {
            outputs.push(match value {
                None => None,
                Some(value) => {
                    let tensor = if let Some(storage) = states.get(i).cloned() {
                        self.new_tensor(value, storage)
                    } else if dynamic {
                        self.new_heap_tensor(value)
                    } else {
                        self.new_buffer_tensor(value, BufferKind::Activation)?
                    };
                    Some(self.program.whole(tensor))
                }
            });
        }
        let tensor_type = |v: &Option<ValueId>| v.and_then(|v| graph.value(v).ty.tensor());
        let input_tensors: Vec<_> = node.inputs.iter().map(tensor_type).collect();
        let output_tensors: Vec<_> = node.outputs.iter().map(tensor_type).collect();
        let workspace = match &lowered.kernel {
            Kernel::Generic => {
                ops::workspace_bytes(&node.op, &input_tensors, &output_tensors, self.threads).to_usize()
            }
            _ => lowered.workspace,
        };
        let cost = lightering_graph::cost::node_cost(node, &input_tensors, &output_tensors);
        self.program.instructions.push(Arc::new(Instruction {
            node: Arc::new(node.clone()),
            kernel: lowered.kernel,
            inputs,
            outputs,
            workspace: aligned(workspace),
            stripe: None,
            cost,
            in_place: updated,
            origin: 0,
        }));
        Ok(())
    }

    /// Where the state lies that a node updates.
    fn state_of(&self, node: &Node, operand: Option<&Operand>) -> Result<Storage, EngineError> {
        let storage = operand.map(|o| self.program.tensors[o.tensor].storage.clone());
        match storage {
            Some(Storage::Buffer { buffer, offset })
                if self.program.buffers[buffer].kind == BufferKind::State =>
            {
                Ok(Storage::Buffer { buffer, offset })
            }
            _ => Err(EngineError::Invalid(format!("{}: what it updates is no state", node.name))),
        }
    }

    /// Gives the result of a node that moves nothing the bytes of its operand. `None` when the node does move.
    fn add_view(&mut self, node: &Node) -> Result<Option<()>, EngineError> {
        let Some((source, view)) = self.view_of(node) else { return Ok(None) };
        let Some(result) = node.output(0) else { return Ok(None) };
        if matches!(node.op, Op::Split { .. }) {
            return self.add_split(node, source);
        }
        let tensor = self.tensor(source)?;
        let skip = match view {
            View::Whole => 0,
            View::Part(skip) => skip,
        };
        let storage = match &self.program.tensors[tensor].storage {
            Storage::Buffer { buffer, offset } => Storage::Buffer { buffer: *buffer, offset: offset + skip },
            Storage::Weight(w) if skip == 0 && self.program.weights[*w].packing == Packing::Plain => {
                Storage::Weight(*w)
            }
            // A view of a small constant would have been folded; of a heap value, it is computed.
            _ => return Ok(None),
        };
        self.new_tensor(result, storage);
        Ok(Some(()))
    }

    fn add_split(&mut self, node: &Node, source: ValueId) -> Result<Option<()>, EngineError> {
        let tensor = self.tensor(source)?;
        let Storage::Buffer { buffer, offset } = self.program.tensors[tensor].storage else {
            return Ok(None);
        };
        let mut at = offset;
        for &output in &node.outputs {
            // An unwanted part has no type to skip by, so the node is computed instead.
            let Some(output) = output else { return Ok(None) };
            let Some(size) = self.graph.value(output).ty.tensor().and_then(TensorType::size_bytes) else {
                return Ok(None);
            };
            if at % BUFFER_ALIGNMENT != 0 {
                return Ok(None);
            }
            at += size;
        }
        let mut at = offset;
        for &output in node.outputs.iter().flatten() {
            let tensor = self.new_tensor(output, Storage::Buffer { buffer, offset: at });
            at += self.program.tensors[tensor].size_bytes();
        }
        Ok(Some(()))
    }

    /// The operand whose bytes the node's result can share.
    fn view_of(&self, node: &Node) -> Option<(ValueId, View)> {
        let source = node.input(0)?;
        let (dtype, dims) = static_type(&self.graph.value(source).ty)?;
        match &node.op {
            Op::Reshape { .. }
            | Op::Flatten { .. }
            | Op::Squeeze
            | Op::Unsqueeze
            | Op::Unary(lightering_graph::UnaryOp::Identity) => Some((source, View::Whole)),
            Op::Transpose { perm } => {
                let reversed: Vec<usize> = (0..dims.len()).rev().collect();
                let perm = perm.as_ref().unwrap_or(&reversed);
                // Only dimensions of size 1 change place.
                let moving: Vec<usize> = perm.iter().copied().filter(|&a| dims[a] != 1).collect();
                moving.is_sorted().then_some((source, View::Whole))
            }
            Op::Slice => {
                let (_, result) = static_type(&self.graph.value(node.out()).ty)?;
                let constant = |i: usize| self.graph.value(node.input(i)?).tensor()?.to_i64s();
                let starts = constant(1)?;
                let axes = match node.input(3) {
                    None => (0..starts.len() as i64).collect(),
                    Some(_) => constant(3)?,
                };
                if node.input(4).is_some() && constant(4)?.iter().any(|&s| s != 1) {
                    return None;
                }
                let cut: Vec<usize> = (0..dims.len()).filter(|&a| dims[a] != result[a]).collect();
                let [axis] = cut[..] else { return cut.is_empty().then_some((source, View::Whole)) };
                if dims[..axis].iter().any(|&d| d != 1) {
                    return None;
                }
                let which = axes.iter().position(|&a| a.rem_euclid(dims.len() as i64) == axis as i64)?;
                let size = dims[axis] as i64;
                let start = starts[which];
                let start = if start < 0 { start + size } else { start }.clamp(0, size) as usize;
                let skip = start * dims[axis + 1..].iter().product::<usize>() * dtype.size_bytes();
                skip.is_multiple_of(BUFFER_ALIGNMENT).then_some((source, View::Part(skip)))
            }
            Op::Split { axis } => {
                let axis = axis.rem_euclid(dims.len().max(1) as i64) as usize;
                dims[..axis].iter().all(|&d| d == 1).then_some((source, View::Whole))
            }
            _ => None,
        }
    }

    /// Lets the operands of a concatenation be made where they belong in its result, if they lie there in one
    /// piece; the concatenation then does nothing.
    fn place_concatenations(&mut self) {
        let mut index = 0;
        while index < self.program.instructions.len() {
            if self.place_concatenation(index) {
                self.program.instructions.remove(index);
            } else {
                index += 1;
            }
        }
    }

    fn place_concatenation(&mut self, index: usize) -> bool {
        let p = &self.program;
        let instruction = &p.instructions[index];
        let (Op::Concat { axis }, Kernel::Generic, Some(Some(result))) =
            (&instruction.node.op, &instruction.kernel, instruction.outputs.first())
        else {
            return false;
        };
        let axis = axis.rem_euclid(result.dims.len().max(1) as i64) as usize;
        let Storage::Buffer { buffer: target, offset: 0 } = p.tensors[result.tensor].storage else {
            return false;
        };
        if result.dims[..axis].iter().any(|&d| d != 1) {
            return false;
        }
        let mut parts = Vec::new();
        let mut at = 0;
        for operand in &instruction.inputs {
            let Some(operand) = operand else { return false };
            let Storage::Buffer { buffer, offset: 0 } = p.tensors[operand.tensor].storage else {
                return false;
            };
            let whole = aligned(p.tensors[operand.tensor].size_bytes()) == p.buffers[buffer].size;
            let own = p.buffers[buffer].kind == BufferKind::Activation
                && !parts.iter().any(|&(b, _)| b == buffer)
                && buffer != target;
            if !whole || !own || at % BUFFER_ALIGNMENT != 0 {
                return false;
            }
            parts.push((buffer, at));
            at += p.tensors[operand.tensor].size_bytes();
        }
        for (buffer, at) in parts {
            for tensor in &mut self.program.tensors {
                if let Storage::Buffer { buffer: b, offset } = &mut Arc::make_mut(tensor).storage
                    && *b == buffer
                {
                    *b = target;
                    *offset += at;
                }
            }
            self.program.buffers[buffer].size = 0;
        }
        true
    }

    /// Marks instructions whose first result can take the place of an operand that nobody needs any more.
    fn mark_in_place(&mut self) {
        let p = &mut self.program;
        let mut last_use = vec![0; p.buffers.len()];
        for (i, instruction) in p.instructions.iter().enumerate() {
            for buffer in p.buffers_of(instruction) {
                last_use[buffer] = i;
            }
        }
        for port in &p.outputs {
            if let Storage::Buffer { buffer, .. } = p.tensors[port.tensor].storage {
                last_use[buffer] = usize::MAX;
            }
        }
        for i in 0..p.instructions.len() {
            let instruction = &p.instructions[i];
            if !instruction.kernel.works_in_place() {
                continue;
            }
            let (Some(Some(source)), Some(Some(result))) =
                (instruction.inputs.first(), instruction.outputs.first())
            else {
                continue;
            };
            let (source_tensor, result_tensor) = (source.tensor, result.tensor);
            let Storage::Buffer { buffer: from, offset } = p.tensors[source_tensor].storage else { continue };
            let Storage::Buffer { buffer: to, offset: 0 } = p.tensors[result_tensor].storage else {
                continue;
            };
            let same_size = p.tensors[source_tensor].size_bytes() == p.tensors[result_tensor].size_bytes()
                && p.buffers[to].size == aligned(p.tensors[result_tensor].size_bytes());
            let others = instruction.inputs.iter().skip(1).flatten().any(
                |o| matches!(p.tensors[o.tensor].storage, Storage::Buffer { buffer, .. } if buffer == from),
            );
            let free = last_use[from] == i
                && matches!(p.buffers[from].kind, BufferKind::Activation | BufferKind::Input)
                && p.buffers[to].kind != BufferKind::Output;
            if !same_size || others || !free {
                continue;
            }
            last_use[from] = last_use[to];
            for tensor in &mut p.tensors {
                if let Storage::Buffer { buffer, offset: o } = &mut Arc::make_mut(tensor).storage
                    && *buffer == to
                {
                    *buffer = from;
                    *o += offset;
                }
            }
            p.buffers[to].size = 0;
            Arc::make_mut(&mut p.instructions[i]).in_place = 1;
        }
    }
}

const _: () = assert!(ARENA_ALIGNMENT.is_multiple_of(BUFFER_ALIGNMENT));
