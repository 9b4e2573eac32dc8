//! A planned graph, ready to run.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use lightering_graph::{Constant, Graph, Tensor, TensorType, ValueType};
use lightering_kernels::ThreadPool;
use lightering_meter::{MemoryPool, Reservation};
use lightering_tier::{Arena, ArenaRead, ArenaWrite, ByteSource, ChunkStore, release_freed_memory};
use lightering_units::{Bytes, Seconds};

use crate::ExpertOptions;
use crate::kernel::{Call, Kernel};
use crate::loader::Loader;
use crate::ops::{OpContext, TensorView, TensorViewMut};
use crate::plan::{self, Layout, Plan, PlanOptions};
use crate::program::{Instruction, Operand, Port, Program, StateInfo, Storage};
use crate::rows::Rows;
use crate::spill::Spiller;
use crate::{EngineError, RuntimeValue};

/// Where the inputs of a run come from.
pub trait Feed {
    /// Writes the elements of input `name`, which has type `ty`, into `target`.
    ///
    /// # Errors
    /// A sentence that says what is wrong with the input.
    fn fill(&mut self, name: &str, ty: &TensorType, target: &mut [u8]) -> Result<(), String>;

    /// Input `name` as a value, for inputs whose size the plan does not know (text, sequences, unknown shapes).
    ///
    /// # Errors
    /// A sentence that says what is wrong with the input.
    fn value(&mut self, name: &str, ty: &ValueType) -> Result<RuntimeValue, String>;
}

impl Feed for HashMap<String, RuntimeValue> {
    fn fill(&mut self, name: &str, ty: &TensorType, target: &mut [u8]) -> Result<(), String> {
        match self.get(name) {
            Some(RuntimeValue::Tensor(t)) if t.tensor_type() == *ty => {
                target.copy_from_slice(t.as_bytes());
                Ok(())
            }
            Some(other) => Err(format!("has type {}, but the plan was made for {ty}", other.value_type())),
            None => Err("is missing".to_owned()),
        }
    }

    fn value(&mut self, name: &str, _ty: &ValueType) -> Result<RuntimeValue, String> {
        self.get(name).cloned().ok_or_else(|| "is missing".to_owned())
    }
}

/// A result as the session lends it: still in the arena if it can be.
#[derive(Clone, Copy, Debug)]
pub enum OutputView<'a> {
    /// A tensor in the arena or a constant.
    Tensor(TensorView<'a>),
    /// A value on the heap.
    Value(&'a RuntimeValue),
}

impl OutputView<'_> {
    /// A copy that lives on.
    pub fn to_value(&self) -> RuntimeValue {
        match self {
            OutputView::Value(v) => (*v).clone(),
            OutputView::Tensor(t) => {
                let tensor =
                    Tensor::from_bytes(t.dtype, t.dims, t.bytes).expect("a view has the size of its type");
                RuntimeValue::Tensor(tensor)
            }
        }
    }
}

/// What one run took.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunReport {
    /// From the first input to the last output.
    pub seconds: Seconds,
    /// Part of it spent waiting for weights.
    pub stall: Seconds,
    /// Weight bytes read from their stores.
    pub bytes_streamed: Bytes,
    /// Time of each instruction, in plan order; empty unless asked for.
    pub instruction_seconds: Vec<Seconds>,
}

/// How a session is made.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Budget, threads and machine.
    pub plan: PlanOptions,
    /// Times every instruction.
    pub profile: bool,
    /// Classes of inputs whose leading dimension may be smaller than planned; see [`Session::run_rows`].
    pub rows: Vec<Vec<String>>,
    /// How experts are kept and fetched that do not all fit into memory.
    pub experts: ExpertOptions,
    /// What can be run by itself; see [`Session::run_part`].
    pub parts: Vec<Part>,
    /// There will be many runs, so that weights for the next one may be read while this one ends.
    pub repeats: bool,
}

impl SessionOptions {
    /// A plain session of this plan.
    pub fn new(plan: PlanOptions) -> SessionOptions {
        SessionOptions {
            plan,
            profile: false,
            rows: Vec::new(),
            experts: ExpertOptions::default(),
            parts: Vec::new(),
            repeats: false,
        }
    }
}

/// Some results of a graph, with everything that they need and nothing else: of a graph that holds a training step and an
/// evaluation over the same parameters, one of the two.
#[derive(Clone, Debug, Default)]
pub struct Part {
    /// Names of the outputs.
    pub outputs: Vec<String>,
    /// Also carries out what updates states.
    pub updates: bool,
}

/// What a run of a [`Part`] touches.
struct PartOfProgram {
    /// Per instruction, input and output of the program.
    instructions: Vec<bool>,
    inputs: Vec<bool>,
    outputs: Vec<bool>,
    /// Per weight.
    weights: Vec<bool>,
}

impl PartOfProgram {
    fn everything(program: &Program) -> PartOfProgram {
        PartOfProgram {
            instructions: vec![true; program.instructions.len()],
            inputs: vec![true; program.inputs.len()],
            outputs: vec![true; program.outputs.len()],
            weights: vec![true; program.weights.len()],
        }
    }

    fn of(program: &Program, part: &Part) -> Result<PartOfProgram, EngineError> {
        let mut outputs = vec![false; program.outputs.len()];
        for name in &part.outputs {
            let found = program.outputs.iter().position(|p| p.name == *name);
            outputs[found.ok_or_else(|| EngineError::Invalid(format!("there is no output {name:?}")))?] =
                true;
        }
        // What a tensor is kept in; whoever writes there belongs to it.
        let place = |tensor: usize| match program.tensors[tensor].storage {
            Storage::Buffer { buffer, .. } => Some((0, buffer)),
            Storage::Heap(slot) => Some((1, slot)),
            Storage::Weight(w) if program.weights[w].spilled => Some((2, w)),
            _ => None,
        };
        let mut needed: HashSet<(u8, usize)> = HashSet::new();
        for (port, _) in program.outputs.iter().zip(&outputs).filter(|(_, wanted)| **wanted) {
            needed.extend(place(port.tensor));
        }
        let mut instructions = vec![false; program.instructions.len()];
        for (i, instruction) in program.instructions.iter().enumerate().rev() {
            let spill = match instruction.kernel {
                Kernel::SpillStart(s) | Kernel::SpillEnd(s) => Some((2, program.spills[s].weight)),
                _ => None,
            };
            let updates = instruction.node.op.updated_states() > 0
                || matches!(instruction.kernel, Kernel::SpillStart(s) | Kernel::SpillEnd(s) if program.spills[s].state.is_some());
            let wanted = spill.is_some_and(|s| needed.contains(&s))
                || instruction
                    .outputs
                    .iter()
                    .flatten()
                    .any(|o| place(o.tensor).is_some_and(|p| needed.contains(&p)));
            let runs = if updates { part.updates } else { wanted };
            if runs {
                instructions[i] = true;
                needed.extend(instruction.inputs.iter().flatten().filter_map(|o| place(o.tensor)));
            }
        }
        let inputs =
            program.inputs.iter().map(|p| place(p.tensor).is_some_and(|p| needed.contains(&p))).collect();
        let mut weights = vec![false; program.weights.len()];
        for (instruction, _) in program.instructions.iter().zip(&instructions).filter(|(_, run)| **run) {
            for w in program.weights_of(instruction) {
                weights[w] = true;
            }
        }
        Ok(PartOfProgram { instructions, inputs, outputs, weights })
    }
}

/// A planned graph with its arena allocated and its resident weights in place.
pub struct Session {
    program: Program,
    layout: plan::Assignment,
    plan: Plan,
    arena: Arc<Arena>,
    loader: Loader,
    threads: ThreadPool,
    memory: MemoryPool,
    profile: bool,
    rows: Rows,
    /// Everything first, then the parts that were asked for.
    parts: Vec<PartOfProgram>,
    experts: Option<ChunkStore>,
    spiller: Option<Spiller>,
    /// Per instruction: the weights whose reading starts before it, and those that it needs.
    issue: Vec<Vec<usize>>,
    needed: Vec<Vec<usize>>,
    /// Per instruction, and at last behind the outputs: the weights of the next run whose place is free from there on.
    ahead: Vec<Vec<usize>>,
    /// Per instruction: heap slots that nobody needs afterwards.
    heap_dead: Vec<Vec<usize>>,
    _reserved: Vec<Reservation>,
}

/// Plans a graph without allocating anything; `rows` as in [`SessionOptions::rows`].
///
/// # Errors
/// As [`Session::new`], less what the store or the system may say.
pub fn plan_graph(graph: &Graph, rows: &[Vec<String>], options: &PlanOptions) -> Result<Plan, EngineError> {
    let program = Program::build(graph, options.threads)?;
    let mut layout = search(program, options)?;
    if !rows.is_empty() {
        let rows = Rows::of(&layout.program, rows)?;
        layout.plan.predicted_row_seconds = Some(plan::predict_row(&layout, &rows, options));
    }
    Ok(layout.plan)
}

/// Plans, and gives what the search took back to the system instead of keeping it resident beside the arena.
fn search(program: Program, options: &PlanOptions) -> Result<Layout, EngineError> {
    let layout = plan::plan(program, options);
    release_freed_memory();
    layout
}

impl Session {
    /// Plans `graph`, whose types must be inferred for the inputs at hand, allocates the arena and loads the weights
    /// that stay.
    ///
    /// # Errors
    /// [`EngineError::Budget`] before anything is allocated when no plan fits; [`EngineError::Io`] when a weight
    /// cannot be read.
    pub fn new(
        graph: &Graph,
        sources: Vec<Arc<dyn ByteSource>>,
        options: &SessionOptions,
    ) -> Result<Session, EngineError> {
        let program = Program::build(graph, options.plan.threads)?;
        let mut layout = search(program, &options.plan)?;
        let rows = Rows::of(&layout.program, &options.rows)?;
        if !options.rows.is_empty() {
            layout.plan.predicted_row_seconds = Some(plan::predict_row(&layout, &rows, &options.plan));
        }
        let Layout { mut program, assignment, plan } = layout;
        let memory = MemoryPool::new(options.plan.budget);
        let refused = |e: lightering_meter::MeterError| EngineError::Internal(e.to_string());
        let reserved = vec![
            memory.reserve("arena", plan.arena).map_err(refused)?,
            memory.reserve("constants and bookkeeping", plan.outside_arena).map_err(refused)?,
        ];
        let arena = Arc::new(Arena::new(plan.arena).map_err(EngineError::Memory)?);
        arena.populate();
        let mut sources = sources;
        let spiller = match &options.plan.spill {
            Some(folder) if !program.spills.is_empty() => {
                let at = sources.len();
                let (spiller, file) = Spiller::new(&mut program, &assignment, arena.clone(), folder, at)?;
                sources.push(file);
                Some(spiller)
            }
            _ => None,
        };
        let loader = Loader::new(&program, &assignment, arena.clone(), sources)?;
        for (i, state) in program.states.iter().enumerate() {
            let spill = program.spills.iter().position(|s| s.state == Some(i));
            let mut initial = Initial::of(&program, state, loader.sources())?;
            match (spill, &spiller) {
                (Some(spill), Some(spiller)) => spiller.fill(spill, |piece| initial.next(piece))?,
                _ => {
                    let info = &program.tensors[state.tensor];
                    let Storage::Buffer { buffer, offset } = info.storage else { continue };
                    let start = assignment.buffer_offset[buffer] + offset;
                    let place = arena.write(start..start + info.size_bytes());
                    let mut place =
                        place.map_err(|e| EngineError::Internal(format!("{}: {e}", info.name)))?;
                    initial.next(&mut place)?;
                }
            }
        }
        let n = program.instructions.len();
        let (mut issue, mut needed) = (vec![Vec::new(); n], vec![Vec::new(); n]);
        for (w, load) in assignment.loads.iter().enumerate() {
            if let Some(load) = load {
                issue[load.issue].push(w);
                needed[load.needed].push(w);
            }
        }
        for list in &mut issue {
            // The reader works in the order of need.
            list.sort_by_key(|&w| assignment.loads[w].as_ref().map_or(0, |l| l.needed));
        }
        let ahead = if options.repeats { free_for_next_run(&assignment, n) } else { vec![Vec::new(); n + 1] };
        let heap_dead = heap_lifetimes(&program);
        let experts = match &program.experts {
            Some(set) => {
                Some(set.open(&arena, &assignment.buffer_offset, loader.sources(), &options.experts)?)
            }
            None => None,
        };
        let mut parts = vec![PartOfProgram::everything(&program)];
        for part in &options.parts {
            parts.push(PartOfProgram::of(&program, part)?);
        }
        Ok(Session {
            rows,
            parts,
            experts,
            spiller,
            program,
            layout: assignment,
            plan,
            arena,
            loader,
            threads: ThreadPool::new(options.plan.threads),
            memory,
            profile: options.profile,
            issue,
            needed,
            ahead,
            heap_dead,
            _reserved: reserved,
        })
    }

    /// The plan that this session keeps.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The store of experts, if they are not all in memory for good.
    pub fn experts(&self) -> Option<&ChunkStore> {
        self.experts.as_ref()
    }

    /// The pool that counts every large buffer.
    pub fn memory(&self) -> &MemoryPool {
        &self.memory
    }

    /// Names and types of the inputs.
    pub fn inputs(&self) -> impl Iterator<Item = (&str, &ValueType)> {
        self.program.inputs.iter().map(|p| (p.name.as_str(), &p.ty))
    }

    /// Names and types of the outputs.
    pub fn outputs(&self) -> impl Iterator<Item = (&str, &ValueType)> {
        self.program.outputs.iter().map(|p| (p.name.as_str(), &p.ty))
    }

    /// Names and types of what is kept between runs.
    pub fn states(&self) -> impl Iterator<Item = (&str, TensorType)> {
        self.program.states.iter().map(|s| {
            let info = &self.program.tensors[s.tensor];
            (&*info.name, TensorType::fixed(info.dtype, &info.dims))
        })
    }

    /// The state of this name, and the spill that is its home.
    fn state(&self, name: &str) -> Result<(Operand, Option<usize>), EngineError> {
        let states = &self.program.states;
        let found = states.iter().position(|s| *self.program.tensors[s.tensor].name == *name);
        let state = found.ok_or_else(|| EngineError::Invalid(format!("there is no state {name:?}")))?;
        let spill = self.program.spills.iter().position(|s| s.state == Some(state));
        let operand = self.program.whole(states[state].tensor);
        Ok((Operand { bytes: 0..self.program.tensors[operand.tensor].size_bytes(), ..operand }, spill))
    }

    /// Lends the bytes of a state, in one or several pieces from the first to the last.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] when there is no such state; [`EngineError::Spill`] when the disk fails where it waits.
    pub fn read_state(&self, name: &str, read: &mut dyn FnMut(&[u8])) -> Result<(), EngineError> {
        match (self.state(name)?, &self.spiller) {
            ((_, Some(spill)), Some(spiller)) => spiller.read(spill, read),
            ((operand, _), _) => {
                read(&self.read(&operand)?);
                Ok(())
            }
        }
    }

    /// The operand of a part of a state that stays in memory.
    fn state_part(&self, name: &str, start: usize, len: usize) -> Result<Operand, EngineError> {
        let (whole, spill) = self.state(name)?;
        let end = start.checked_add(len).filter(|end| *end <= whole.bytes.end && spill.is_none());
        let end = end.ok_or_else(|| {
            EngineError::Invalid(format!("{len} bytes from {start} on of state {name:?} are not in memory"))
        })?;
        Ok(Operand { bytes: start..end, ..whole })
    }

    /// Copies bytes of a state that stays in memory, from `start` on.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] when there is no such state, or no such part of it in memory.
    pub fn read_state_part(&self, name: &str, start: usize, part: &mut [u8]) -> Result<(), EngineError> {
        let operand = self.state_part(name, start, part.len())?;
        part.copy_from_slice(&self.read(&operand)?);
        Ok(())
    }

    /// Overwrites bytes of a state that stays in memory, from `start` on.
    ///
    /// # Errors
    /// As [`read_state_part`](Self::read_state_part).
    pub fn write_state_part(&mut self, name: &str, start: usize, part: &[u8]) -> Result<(), EngineError> {
        let operand = self.state_part(name, start, part.len())?;
        self.write(&operand)?.copy_from_slice(part);
        Ok(())
    }

    /// Lends the bytes of a state to be overwritten, in one or several pieces from the first to the last.
    ///
    /// # Errors
    /// As [`read_state`](Self::read_state).
    pub fn write_state(&mut self, name: &str, write: &mut dyn FnMut(&mut [u8])) -> Result<(), EngineError> {
        match (self.state(name)?, &self.spiller) {
            ((_, Some(spill)), Some(spiller)) => spiller.fill(spill, |piece| {
                write(piece);
                Ok(())
            }),
            ((operand, _), _) => {
                write(&mut self.write(&operand)?);
                Ok(())
            }
        }
    }

    /// Lends the bytes of a state to be changed, in pieces from the first to the last; `change` gets the place of the piece
    /// within the state, too. What is read and written is counted by [`bytes_spilled`](Self::bytes_spilled) as in a run.
    ///
    /// # Errors
    /// As [`read_state`](Self::read_state).
    pub fn change_state(
        &mut self,
        name: &str,
        change: &mut dyn FnMut(usize, &mut [u8]),
    ) -> Result<(), EngineError> {
        match (self.state(name)?, &self.spiller) {
            ((_, Some(spill)), Some(spiller)) => spiller.change(spill, change),
            ((operand, _), _) => {
                change(0, &mut self.write(&operand)?);
                Ok(())
            }
        }
    }

    /// Runs the graph once: `feed` gives the inputs, `fetch` gets the outputs one after the other.
    ///
    /// # Errors
    /// What is wrong with an input or a node, by name; the session can be used again afterwards.
    pub fn run(
        &mut self,
        feed: &mut dyn Feed,
        fetch: &mut dyn FnMut(&str, OutputView<'_>) -> Result<(), EngineError>,
    ) -> Result<RunReport, EngineError> {
        self.rows.begin_full();
        let result = self.run_inner(0, feed, fetch);
        if result.is_err() {
            self.settle();
        }
        result
    }

    /// Runs part `part` of [`SessionOptions::parts`] once: asks for the inputs that it needs, gives its outputs.
    ///
    /// # Errors
    /// As [`run`](Self::run), and when there is no such part.
    pub fn run_part(
        &mut self,
        part: usize,
        feed: &mut dyn Feed,
        fetch: &mut dyn FnMut(&str, OutputView<'_>) -> Result<(), EngineError>,
    ) -> Result<RunReport, EngineError> {
        if part + 1 >= self.parts.len() {
            return Err(EngineError::Invalid(format!("there is no part {part} of this session")));
        }
        self.rows.begin_full();
        let result = self.run_inner(part + 1, feed, fetch);
        if result.is_err() {
            self.settle();
        }
        result
    }

    /// As [`run`](Self::run), for `rows[i]` rows of class `i` of [`SessionOptions::rows`]: inputs of that class are
    /// asked for with that leading dimension, and outputs that follow from them have it, too.
    ///
    /// # Errors
    /// As [`run`](Self::run), and when a class has no rows or more than planned.
    pub fn run_rows(
        &mut self,
        rows: &[usize],
        feed: &mut dyn Feed,
        fetch: &mut dyn FnMut(&str, OutputView<'_>) -> Result<(), EngineError>,
    ) -> Result<RunReport, EngineError> {
        self.rows.begin(rows)?;
        let result = self.run_inner(0, feed, fetch);
        if result.is_err() {
            self.settle();
        }
        result
    }

    /// Runs the graph once and returns copies of the outputs, in order.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_to_values(&mut self, feed: &mut dyn Feed) -> Result<Vec<RuntimeValue>, EngineError> {
        let mut values = Vec::new();
        self.run(feed, &mut |_, view| {
            values.push(view.to_value());
            Ok(())
        })?;
        Ok(values)
    }

    fn run_inner(
        &mut self,
        part: usize,
        feed: &mut dyn Feed,
        fetch: &mut dyn FnMut(&str, OutputView<'_>) -> Result<(), EngineError>,
    ) -> Result<RunReport, EngineError> {
        let part = &self.parts[part];
        let start = Instant::now();
        let read_before = self.bytes_read();
        let mut heap = Heap::new(self.program.heap_slots, &self.memory);
        let wrong = |port: &Port, problem: String| {
            EngineError::Invalid(format!("input {:?} ({}) {problem}", port.name, port.ty))
        };
        for (port, _) in self.program.inputs.iter().zip(&part.inputs).filter(|(_, wanted)| **wanted) {
            match &self.program.tensors[port.tensor].storage {
                Storage::Heap(slot) => {
                    let value = feed.value(&port.name, &port.ty).map_err(|e| wrong(port, e))?;
                    heap.put(*slot, value).map_err(|e| wrong(port, e))?;
                }
                _ => {
                    let whole = self.program.whole(port.tensor);
                    let ty = port.ty.tensor().expect("an input in the arena is a tensor");
                    match self.rows.part(&self.program, &whole) {
                        None => feed.fill(&port.name, ty, &mut self.write(&whole)?),
                        Some(part) => {
                            let ty = TensorType::fixed(ty.dtype, &part.dims);
                            feed.fill(&port.name, &ty, &mut self.write(&part)?)
                        }
                    }
                    .map_err(|e| wrong(port, e))?;
                }
            }
        }
        self.loader.begin_run(self.needed.iter().flatten().copied());
        let mut report = RunReport::default();
        let mut stall = 0.0;
        let expert_stall = self.experts.as_ref().map_or(Seconds(0.0), |s| s.stats().stall);
        for i in 0..self.program.instructions.len() {
            let wanted = |w: &&usize| part.weights[**w];
            for &w in &self.ahead[i] {
                self.loader.request_ahead(w);
            }
            for &w in self.issue[i].iter().filter(wanted) {
                self.loader.request(w);
            }
            if !self.needed[i].is_empty() {
                let waiting = Instant::now();
                for &w in self.needed[i].iter().filter(wanted) {
                    self.loader.wait(w)?;
                }
                stall += waiting.elapsed().as_secs_f64();
            }
            if !part.instructions[i] {
                if self.profile {
                    report.instruction_seconds.push(Seconds(0.0));
                }
                continue;
            }
            let began = self.profile.then(Instant::now);
            self.execute(i, &mut heap)?;
            if let Some(began) = began {
                report.instruction_seconds.push(Seconds(began.elapsed().as_secs_f64()));
            }
            for &slot in &self.heap_dead[i] {
                heap.drop_value(slot);
            }
        }
        for (port, _) in self.program.outputs.iter().zip(&part.outputs).filter(|(_, wanted)| **wanted) {
            let info = &self.program.tensors[port.tensor];
            match &info.storage {
                Storage::Heap(slot) => {
                    let value = heap.get(*slot).ok_or_else(|| {
                        EngineError::Internal(format!("output {:?} was never made", port.name))
                    })?;
                    fetch(&port.name, OutputView::Value(value))?;
                }
                Storage::Inline(t) => {
                    let value = RuntimeValue::Tensor((**t).clone());
                    fetch(&port.name, OutputView::Value(&value))?;
                }
                _ => {
                    let operand = self.program.whole(port.tensor);
                    let whole = Operand { bytes: 0..info.size_bytes(), ..operand };
                    let operand = self.rows.part(&self.program, &whole).unwrap_or(whole);
                    let guard = self.read(&operand)?;
                    let view = TensorView { dtype: info.dtype, dims: &operand.dims, bytes: &guard };
                    fetch(&port.name, OutputView::Tensor(view))?;
                }
            }
        }
        for &w in self.ahead.last().into_iter().flatten() {
            self.loader.request_ahead(w);
        }
        if let Some(store) = &self.experts {
            store.end_step();
            stall += (store.stats().stall - expert_stall).0;
        }
        report.stall = Seconds(stall);
        report.seconds = Seconds(start.elapsed().as_secs_f64());
        report.bytes_streamed = self.bytes_read().saturating_sub(read_before);
        Ok(report)
    }

    /// Waits for everything that is under way, so that the session can be used again.
    fn settle(&self) {
        if let Some(spiller) = &self.spiller {
            spiller.settle();
        }
        self.loader.settle();
    }

    /// Bytes written to the disk so far for tensors that wait there.
    pub fn bytes_spilled(&self) -> Bytes {
        self.spiller.as_ref().map_or(Bytes::ZERO, Spiller::bytes_written)
    }

    fn bytes_read(&self) -> Bytes {
        self.loader.sources().iter().map(|s| s.bytes_read()).sum()
    }

    /// The operand's range of the arena, if it lies there.
    fn range(&self, operand: &Operand) -> Option<std::ops::Range<usize>> {
        let base = match &self.program.tensors[operand.tensor].storage {
            Storage::Buffer { buffer, offset } => self.layout.buffer_offset[*buffer] + offset,
            Storage::Weight(w) => self.layout.weight_offset[*w],
            _ => return None,
        };
        Some(base + operand.bytes.start..base + operand.bytes.end)
    }

    fn conflict(&self, operand: &Operand, error: &lightering_tier::ArenaConflict) -> EngineError {
        EngineError::Internal(format!("{}: {error}", self.program.tensors[operand.tensor].name))
    }

    fn read(&self, operand: &Operand) -> Result<ArenaRead<'_>, EngineError> {
        let range = self.range(operand).unwrap_or(0..0);
        self.arena.read(range).map_err(|e| self.conflict(operand, &e))
    }

    fn write(&self, operand: &Operand) -> Result<ArenaWrite<'_>, EngineError> {
        let range = self.range(operand).unwrap_or(0..0);
        self.arena.write(range).map_err(|e| self.conflict(operand, &e))
    }

    /// The instruction for the rows of this run.
    fn for_rows(&self, instruction: &Arc<Instruction>) -> Option<Instruction> {
        let mut changed: Option<Instruction> = None;
        let operands = instruction.inputs.iter().chain(&instruction.outputs).enumerate();
        for (i, operand) in operands {
            let Some(part) = operand.as_ref().and_then(|o| self.rows.part(&self.program, o)) else {
                continue;
            };
            let copy = changed.get_or_insert_with(|| (**instruction).clone());
            let inputs = copy.inputs.len();
            *(if i < inputs { &mut copy.inputs[i] } else { &mut copy.outputs[i - inputs] }) = Some(part);
        }
        changed
    }

    fn execute(&self, index: usize, heap: &mut Heap<'_>) -> Result<(), EngineError> {
        let instruction = &self.program.instructions[index];
        match (&instruction.kernel, &self.spiller) {
            (Kernel::Dynamic, _) => return self.execute_dynamic(instruction, heap),
            (Kernel::SpillStart(spill), Some(spiller)) => return spiller.start(*spill),
            (Kernel::SpillEnd(spill), Some(spiller)) => return spiller.finish(*spill),
            _ => {}
        }
        let for_rows = self.for_rows(instruction);
        let instruction = for_rows.as_ref().unwrap_or(instruction);
        // Guards first, then views that borrow them.
        let mut input_guards: Vec<Option<ArenaRead<'_>>> = Vec::with_capacity(instruction.inputs.len());
        for (i, operand) in instruction.inputs.iter().enumerate() {
            let skip = i < instruction.in_place;
            input_guards.push(match operand {
                Some(operand) if !skip && self.range(operand).is_some() => Some(self.read(operand)?),
                _ => None,
            });
        }
        let mut output_guards: Vec<Option<ArenaWrite<'_>>> = Vec::with_capacity(instruction.outputs.len());
        for operand in &instruction.outputs {
            output_guards.push(match operand {
                Some(operand) => Some(self.write(operand)?),
                None => None,
            });
        }
        let workspace_start = self.layout.workspace_offset[index];
        let mut workspace = self
            .arena
            .write(workspace_start..workspace_start + instruction.workspace)
            .map_err(|e| EngineError::Internal(format!("scratch of {}: {e}", instruction.node.name)))?;
        let mut inputs = Vec::with_capacity(instruction.inputs.len());
        for (i, operand) in instruction.inputs.iter().enumerate() {
            let skip = i < instruction.in_place;
            inputs.push(match operand {
                Some(operand) if !skip => {
                    let info = &self.program.tensors[operand.tensor];
                    match (&info.storage, &input_guards[i]) {
                        (Storage::Inline(t), _) => {
                            Some(TensorView { dtype: info.dtype, dims: &operand.dims, bytes: t.as_bytes() })
                        }
                        (Storage::Heap(slot), _) => heap
                            .get(*slot)
                            .and_then(RuntimeValue::tensor)
                            .map(|t| TensorView { dtype: t.dtype(), dims: t.dims(), bytes: t.as_bytes() }),
                        (_, Some(guard)) => {
                            Some(TensorView { dtype: info.dtype, dims: &operand.dims, bytes: guard })
                        }
                        _ => None,
                    }
                }
                _ => None,
            });
        }
        let mut outputs: Vec<Option<TensorViewMut<'_>>> = instruction
            .outputs
            .iter()
            .zip(&mut output_guards)
            .map(|(operand, guard)| {
                let (operand, guard) = (operand.as_ref()?, guard.as_mut()?);
                let dtype = self.program.tensors[operand.tensor].dtype;
                Some(TensorViewMut { dtype, dims: &operand.dims, bytes: guard })
            })
            .collect();
        let stored =
            instruction.inputs.iter().flatten().find_map(|o| match self.program.tensors[o.tensor].storage {
                Storage::Stored(s) => Some((s, self.loader.source(s.source.0 as usize)?)),
                _ => None,
            });
        let call = Call {
            instruction,
            inputs: &inputs,
            stored: stored.map(|(s, source)| (s, &**source)),
            experts: self.experts.as_ref(),
            threads: &self.threads,
            context: &self.context(),
        };
        call.run(&mut outputs, &mut workspace)
    }

    fn context(&self) -> OpContext<'_> {
        OpContext {
            threads: &self.threads,
            memory: &self.memory,
            sources: self.loader.sources(),
            seed: 0,
            images: None,
            nesting: 0,
        }
    }

    /// Runs a node whose results live on the counted heap.
    fn execute_dynamic(&self, instruction: &Instruction, heap: &mut Heap<'_>) -> Result<(), EngineError> {
        let node = &*instruction.node;
        let mut owned: Vec<Option<RuntimeValue>> = Vec::with_capacity(instruction.inputs.len());
        for operand in &instruction.inputs {
            owned.push(match operand {
                None => None,
                Some(operand) => {
                    let info = &self.program.tensors[operand.tensor];
                    match &info.storage {
                        Storage::Heap(_) => None,
                        Storage::Inline(t) => Some(RuntimeValue::Tensor((**t).clone())),
                        _ => {
                            let guard = self.read(operand)?;
                            let size = operand.dims.iter().product::<usize>() * info.dtype.size_bytes();
                            let tensor = Tensor::from_bytes(info.dtype, &operand.dims, &guard[..size]);
                            Some(RuntimeValue::Tensor(tensor.map_err(EngineError::from)?))
                        }
                    }
                }
            });
        }
        let inputs: Vec<Option<&RuntimeValue>> = instruction
            .inputs
            .iter()
            .zip(&owned)
            .map(|(operand, owned)| {
                let operand = operand.as_ref()?;
                match self.program.tensors[operand.tensor].storage {
                    Storage::Heap(slot) => heap.get(slot),
                    _ => owned.as_ref(),
                }
            })
            .collect();
        let wanted: Vec<bool> = node.outputs.iter().map(Option::is_some).collect();
        let results = crate::interpreter::execute_op(&node.op, &inputs, &wanted, &self.context())
            .map_err(|e| EngineError::at(node, e))?;
        for (operand, result) in instruction.outputs.iter().zip(results) {
            if let (Some(operand), Some(value)) = (operand, result)
                && let Storage::Heap(slot) = self.program.tensors[operand.tensor].storage
            {
                heap.put(slot, value).map_err(|what| EngineError::OutOfBudget {
                    node: node.name.clone(),
                    op: node.op.name().to_owned(),
                    what,
                })?;
            }
        }
        Ok(())
    }
}

/// What a state holds before the first run, piece by piece.
struct Initial<'a> {
    name: &'a str,
    constant: Option<&'a Constant>,
    source: Option<&'a Arc<dyn ByteSource>>,
    at: usize,
}

impl<'a> Initial<'a> {
    fn of(
        program: &'a Program,
        state: &'a StateInfo,
        sources: &'a [Arc<dyn ByteSource>],
    ) -> Result<Initial<'a>, EngineError> {
        let info = &program.tensors[state.tensor];
        let source = match &state.initial {
            Some(Constant::Stored(stored)) if stored.size.to_usize() != info.size_bytes() => {
                let problem = format!(
                    "{:?} takes {} bytes but {} are stored",
                    info.name,
                    info.size_bytes(),
                    stored.size
                );
                return Err(EngineError::Invalid(problem));
            }
            Some(Constant::Stored(stored)) => {
                Some(sources.get(stored.source.0 as usize).ok_or_else(|| {
                    EngineError::Internal(format!("{:?} is in a file that was not given", info.name))
                })?)
            }
            _ => None,
        };
        Ok(Initial { name: &info.name, constant: state.initial.as_ref(), source, at: 0 })
    }

    /// Fills `piece` with what comes next.
    fn next(&mut self, piece: &mut [u8]) -> Result<(), EngineError> {
        match (self.constant, self.source) {
            (Some(Constant::Inline(tensor)), _) => {
                piece.copy_from_slice(&tensor.as_bytes()[self.at..self.at + piece.len()]);
            }
            (Some(Constant::Stored(stored)), Some(source)) => {
                source.read_at(stored.offset + self.at as u64, piece).map_err(|error| EngineError::Io {
                    weight: self.name.to_owned(),
                    source_name: source.name(),
                    error,
                })?;
            }
            _ => piece.fill(0),
        }
        self.at += piece.len();
        Ok(())
    }
}

/// For every weight that is read from the first instruction on: when its place is free of what the run before needs.
fn free_for_next_run(assignment: &plan::Assignment, n: usize) -> Vec<Vec<usize>> {
    let mut ahead = vec![Vec::new(); n + 1];
    let places: Vec<_> = assignment
        .requests
        .iter()
        .zip(&assignment.placement.offsets)
        .map(|((owner, request), &offset)| (*owner, offset..offset + request.size, *request.live.end()))
        .collect();
    let mut first: Vec<_> = assignment.loads.iter().enumerate().collect();
    first.sort_by_key(|(_, load)| load.as_ref().map_or(0, |l| l.needed));
    for (w, load) in first {
        if load.as_ref().is_none_or(|l| l.issue != 0) {
            continue;
        }
        let Some((_, place, _)) = places.iter().find(|(owner, ..)| *owner == plan::Owner::Weight(w)) else {
            continue;
        };
        let overlapping = places.iter().filter(|(_, p, _)| p.start < place.end && place.start < p.end);
        let last = overlapping.map(|(.., last)| *last).max().unwrap_or(n);
        ahead[(last + 1).min(n)].push(w);
    }
    ahead
}

/// Values whose size nobody knew beforehand, each with its reservation.
struct Heap<'a> {
    slots: Vec<Option<(RuntimeValue, Reservation)>>,
    memory: &'a MemoryPool,
}

/// Bytes that a value holds.
fn value_bytes(value: &RuntimeValue) -> Bytes {
    match value {
        RuntimeValue::Tensor(t) => t.size_bytes(),
        RuntimeValue::Sequence(_, items) => items.iter().map(value_bytes).sum(),
        RuntimeValue::Optional(_, item) => item.as_deref().map_or(Bytes::ZERO, value_bytes),
        RuntimeValue::Map(k, v) => k.size_bytes() + v.size_bytes(),
    }
}

impl<'a> Heap<'a> {
    fn new(slots: usize, memory: &'a MemoryPool) -> Heap<'a> {
        Heap { slots: (0..slots).map(|_| None).collect(), memory }
    }

    fn put(&mut self, slot: usize, value: RuntimeValue) -> Result<(), String> {
        let reservation =
            self.memory.reserve("values of unknown size", value_bytes(&value)).map_err(|e| e.to_string())?;
        self.slots[slot] = Some((value, reservation));
        Ok(())
    }

    fn get(&self, slot: usize) -> Option<&RuntimeValue> {
        self.slots[slot].as_ref().map(|(value, _)| value)
    }

    fn drop_value(&mut self, slot: usize) {
        self.slots[slot] = None;
    }
}

/// Per instruction: the heap slots that are read there for the last time.
fn heap_lifetimes(program: &Program) -> Vec<Vec<usize>> {
    let mut last: Vec<Option<usize>> = vec![None; program.heap_slots];
    for (i, instruction) in program.instructions.iter().enumerate() {
        for operand in instruction.inputs.iter().chain(&instruction.outputs).flatten() {
            if let Storage::Heap(slot) = program.tensors[operand.tensor].storage {
                last[slot] = Some(i);
            }
        }
    }
    for port in &program.outputs {
        if let Storage::Heap(slot) = program.tensors[port.tensor].storage {
            last[slot] = None;
        }
    }
    let mut dead = vec![Vec::new(); program.instructions.len()];
    for (slot, last) in last.into_iter().enumerate() {
        if let Some(i) = last {
            dead[i].push(slot);
        }
    }
    dead
}
