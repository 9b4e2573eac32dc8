//! The one place where the command line meets formats, passes, planner and executor.

use crate::embedded;
use crate::failure::{Exit, Failure, Outcome};
use crate::usage::Baseline;
use crate::values::{LoadedInput, Port};
use anyhow::Context;
use lightering_engine::{
    Bindings, EngineError, Feed, Plan, PlanOptions, PlannedInstruction, PrepareOptions, RuntimeValue,
    Session, SessionOptions, plan_graph, prepare,
};
use lightering_formats::onnx::{self, ModelFile};
use lightering_graph::{Dim, Graph, TensorType, ValueId, ValueType, cost::graph_cost};
use lightering_kernels::Isa;
use lightering_meter::{
    MachineProfile, MemoryPool, MeterError, ModelIdentity, PlanStep, PlanSummary, Reservation, Tier,
    sha256_file, sha256_hex,
};
use lightering_tier::{ByteSource, release_freed_memory};
use lightering_units::{Bytes, Flops, Seconds};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where a model comes from.
#[derive(Clone, Debug)]
pub enum ModelSource {
    /// A file.
    File(PathBuf),
    /// The model that the binary carries.
    Embedded,
}

impl ModelSource {
    /// What the receipt says of it; the checksum only when asked for, since it reads the whole file.
    pub fn identity(&self, with_checksum: bool) -> Outcome<ModelIdentity> {
        Ok(match self {
            ModelSource::File(path) => ModelIdentity {
                path: path.display().to_string(),
                size_bytes: Bytes(
                    std::fs::metadata(path).with_context(|| format!("opening {}", path.display()))?.len(),
                ),
                sha256: if with_checksum { Some(sha256_file(path)?) } else { None },
            },
            ModelSource::Embedded => ModelIdentity {
                path: format!("embedded:{}", embedded::MODEL_NAME),
                size_bytes: Bytes(embedded::MODEL.len() as u64),
                sha256: with_checksum.then(|| sha256_hex(embedded::MODEL)),
            },
        })
    }

    /// Bytes of the program file that are this model.
    pub fn embedded_bytes(&self) -> Bytes {
        match self {
            ModelSource::File(_) => Bytes::ZERO,
            ModelSource::Embedded => Bytes(embedded::MODEL.len() as u64),
        }
    }
}

/// The machine profile at `path`, else the user's, else conservative figures.
pub fn load_profile(path: Option<&Path>) -> Outcome<MachineProfile> {
    let hint = "lighter doctor, which writes a new profile";
    match path {
        Some(path) => MachineProfile::load(path),
        None => MachineProfile::load_or_conservative(),
    }
    .map_err(|error| Failure::from(error).context("reading the machine profile").or_hint(hint))
}

/// What one run of a model costs, whatever the order and the place of its tensors.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Costs {
    /// Operations; a multiply-add counts as two.
    pub flops: Flops,
    /// Bytes read by all nodes, weights included.
    pub bytes_read: Bytes,
    /// Bytes written by all nodes.
    pub bytes_written: Bytes,
}

/// A model that was read and not yet planned.
pub struct Model {
    graph: Graph,
    sources: Vec<Arc<dyn ByteSource>>,
    from_file: bool,
    producer: String,
    opsets: BTreeMap<String, i64>,
}

/// What the allocator, the stacks and the tables of threads take beside everything that is counted, and how coarse the
/// kernel's own count is (it sums up pages in batches per processor): a part that does not depend on the number of
/// threads, and a part for each.
const UNCOUNTED: Bytes = Bytes::kib(160);
const UNCOUNTED_PER_THREAD: Bytes = Bytes::kib(24);

/// A session is planned at most so many times, each time with what the last search left on the heap in mind.
const PLANS_MAX: u32 = 4;
/// Heap that an attempt at a plan leaves in use at most.
const LEFT_BY_ATTEMPT: Bytes = Bytes::kib(48);

/// What a plan may use; see the fields of the command line.
#[derive(Clone, Copy)]
pub struct Means<'a> {
    /// Threads that compute.
    pub threads: u32,
    /// The machine.
    pub profile: &'a MachineProfile,
    /// The budget, with what is held of it.
    pub pool: &'a MemoryPool,
    /// What the process held before it read anything.
    pub baseline: &'a Baseline,
}

impl Means<'_> {
    /// How a plan is made within `budget`.
    pub fn plan_options(&self, budget: Option<Bytes>) -> PlanOptions {
        PlanOptions { budget, ..PlanOptions::new(self.profile.clone(), self.threads as usize) }
    }
}

impl Model {
    /// Reads a model's structure; weights stay in the file.
    pub fn open(source: &ModelSource) -> Outcome<Model> {
        let file = match source {
            ModelSource::File(path) => ModelFile::open(path)?,
            ModelSource::Embedded => ModelFile::from_source(Arc::new(embedded::MODEL))?,
        };
        let place = match source {
            ModelSource::File(path) => path.display().to_string(),
            ModelSource::Embedded => embedded::MODEL_NAME.to_owned(),
        };
        let opsets = file
            .model
            .opset_import
            .iter()
            .map(|set| {
                let domain = if set.domain.is_empty() { "ai.onnx" } else { &set.domain };
                (domain.to_owned(), set.version)
            })
            .collect();
        let producer = [file.model.producer_name.as_str(), file.model.producer_version.as_str()].join(" ");
        let imported =
            onnx::import(&file).map_err(|e| Failure::from(e).context(format!("importing {place}")))?;
        let mut graph = imported.graph;
        // Types of outputs and the like, as far as they are known before the inputs are; what contradicts itself is
        // told when it is planned.
        let _ = graph.infer();
        Ok(Model {
            graph,
            sources: imported.sources,
            from_file: matches!(source, ModelSource::File(_)),
            producer: producer.trim().to_owned(),
            opsets,
        })
    }

    /// A graph that was built here; it holds its own weights.
    pub fn of_graph(graph: Graph) -> Model {
        Model {
            graph,
            sources: Vec::new(),
            from_file: false,
            producer: String::new(),
            opsets: BTreeMap::new(),
        }
    }

    /// The operators that a model file uses, by name, each once.
    pub fn operators(path: &Path) -> Outcome<Vec<String>> {
        let file = ModelFile::open(path)?;
        let nodes = file.model.graph.iter().flat_map(|g| &g.node);
        Ok(nodes.map(|n| n.op_type.clone()).collect::<BTreeSet<_>>().into_iter().collect())
    }

    /// The graph as imported.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// True when a node draws random numbers, so that the answer is another one each time.
    pub fn is_random(&self) -> bool {
        self.graph.iter_nodes().any(|(_, node)| node.op.is_random())
    }

    /// The program that wrote the model.
    pub fn producer(&self) -> &str {
        &self.producer
    }

    /// Versions of the operator sets, by domain.
    pub fn opsets(&self) -> &BTreeMap<String, i64> {
        &self.opsets
    }

    /// What goes in.
    pub fn inputs(&self) -> Vec<Port> {
        self.graph.inputs.iter().map(|&v| self.port(v)).collect()
    }

    /// What comes out.
    pub fn outputs(&self) -> Vec<Port> {
        self.graph.outputs.iter().map(|&v| self.port(v)).collect()
    }

    fn port(&self, id: ValueId) -> Port {
        let value = self.graph.value(id);
        Port { name: value.name.clone(), ty: value.ty.clone() }
    }

    /// Types of the inputs with every dimension known: from the loaded values, else from `dimensions`, else 1.
    fn bindings(&self, dimensions: &BTreeMap<String, usize>, inputs: &[LoadedInput]) -> Bindings {
        let mut bindings = Bindings::default();
        for &id in &self.graph.inputs {
            let value = self.graph.value(id);
            let Some(declared) = value.ty.tensor() else { continue };
            let loaded = inputs.iter().find(|i| i.name == value.name).and_then(|i| i.value.tensor());
            let ty = match (loaded, &declared.shape) {
                (Some(tensor), _) => tensor.tensor_type(),
                (None, Some(shape)) => {
                    let dims: Vec<usize> = shape
                        .iter()
                        .map(|dim| match dim {
                            Dim::Fixed(size) => *size,
                            Dim::Symbol(name) => dimensions.get(name.as_ref()).copied().unwrap_or(1),
                            Dim::Unknown(()) => 1,
                        })
                        .collect();
                    TensorType::fixed(declared.dtype, &dims)
                }
                (None, None) => continue,
            };
            bindings.types.push((id, ty));
        }
        bindings
    }

    /// Binds the inputs and rewrites the graph for the kernels; tells what is held besides what the plan will count.
    fn prepared(
        mut self,
        dimensions: &BTreeMap<String, usize>,
        inputs: &[LoadedInput],
        means: Means<'_>,
    ) -> Outcome<(Graph, Vec<Arc<dyn ByteSource>>, Bytes)> {
        let bindings = self.bindings(dimensions, inputs);
        prepare(&mut self.graph, &bindings, &self.sources, means.pool, &PrepareOptions::default())?;
        release_freed_memory();
        let inputs: Bytes = inputs.iter().map(|i| i.held.size()).sum();
        let copies = self
            .graph
            .outputs
            .iter()
            .filter_map(|&v| self.graph.value(v).ty.tensor()?.size_bytes())
            .fold(Bytes::ZERO, |sum, size| sum + Bytes(size as u64));
        Ok((self.graph, self.sources, held_beside(means, inputs) + copies))
    }

    /// Adds the smallest budget that would do to the refusal of an input that did not even fit by itself.
    pub fn with_smallest(
        self,
        mut failure: Failure,
        dimensions: &BTreeMap<String, usize>,
        means: Means<'_>,
    ) -> Failure {
        if failure.exit != Exit::Budget || failure.smallest.is_some() {
            return failure;
        }
        let bindings = self.bindings(dimensions, &[]);
        let inputs: u64 = bindings.types.iter().filter_map(|(_, ty)| Some(ty.size_bytes()? as u64)).sum();
        let unbounded = MemoryPool::unbounded();
        let means = Means { pool: &unbounded, ..means };
        let Ok((graph, _, held)) = self.prepared(dimensions, &[], means) else { return failure };
        let options = means.plan_options(Some(Bytes::ZERO));
        let peak_so_far = means.baseline.peak_so_far();
        if let Err(EngineError::Budget { smallest, .. }) = plan_graph(&graph, &[], &options) {
            let reading = match failure.error.chain().find_map(|cause| cause.downcast_ref()) {
                Some(MeterError::Budget { asked, available, limit, .. }) => {
                    limit.saturating_sub(*available) + *asked
                }
                _ => Bytes::ZERO,
            };
            let smallest = (smallest + held + Bytes(inputs)).max(reading).max(peak_so_far);
            failure.name_smallest(smallest);
        }
        failure
    }

    /// The stores of the weights.
    pub fn sources(&self) -> &[Arc<dyn ByteSource>] {
        &self.sources
    }

    /// The graph with inputs of these shapes, which may differ from the declared ones where these are symbolic, and in
    /// their first dimension, the batch.
    pub fn for_training(mut self, dims: &[Vec<usize>]) -> Outcome<Graph> {
        let inputs = self.graph.inputs.clone();
        if inputs.len() != dims.len() {
            let names: Vec<_> = self.inputs().into_iter().map(|p| p.name).collect();
            return Err(Failure::input(
                format!(
                    "the model has {} inputs ({}), the data has {}",
                    inputs.len(),
                    names.join(", "),
                    dims.len()
                ),
                "a model whose inputs are the features of the data, in their order",
            ));
        }
        let mut types = Vec::new();
        for (&input, dims) in inputs.iter().zip(dims) {
            let value = self.graph.value_mut(input);
            let Some(declared) = value.ty.tensor().cloned() else { continue };
            if let Some(shape) = &declared.shape
                && let (Some(Dim::Fixed(own)), Some(&batch)) = (shape.first(), dims.first())
                && *own != batch
            {
                let mut shape = shape.clone();
                shape[0] = Dim::Fixed(batch);
                value.ty = TensorType { dtype: declared.dtype, shape: Some(shape) }.into();
            }
            types.push((input, TensorType::fixed(declared.dtype, dims)));
        }
        // Types that were inferred for the declared batch no longer hold.
        for value in &mut self.graph.values {
            if matches!(value.kind, lightering_graph::ValueKind::Output { .. }) {
                value.ty = ValueType::Unknown;
            }
        }
        self.graph.bind(&types)?;
        self.graph.infer()?;
        Ok(self.graph)
    }

    /// Plans without allocating.
    pub fn plan_only(self, dimensions: &BTreeMap<String, usize>, means: Means<'_>) -> Outcome<Plan> {
        let (graph, _, held) = self.prepared(dimensions, &[], means)?;
        planned(means, held, |options| plan_graph(&graph, &[], options))
    }

    /// Plans, allocates and loads what stays in memory.
    pub fn plan(
        self,
        dimensions: &BTreeMap<String, usize>,
        inputs: &[LoadedInput],
        means: Means<'_>,
        profile: bool,
    ) -> Outcome<Planned> {
        let from_file = self.from_file;
        let (graph, sources, held) = self.prepared(dimensions, inputs, means)?;
        let inputs: Bytes = inputs.iter().map(|i| i.held.size()).sum();
        let start = |plan: &PlanOptions| {
            let options = SessionOptions { profile, ..SessionOptions::new(plan.clone()) };
            Session::new(&graph, sources.clone(), &options)
        };
        let (session, held) = within_budget(means, held, inputs, start, Session::plan)?;
        drop(graph);
        release_freed_memory();
        let held = means.pool.reserve("graph, readers and copies of the outputs", held)?;
        let before = means.pool.used();
        Ok(Planned { session, sources, from_file, held_before: before, _held: held, times: Vec::new() })
    }

    /// What one run costs; `None` where sizes stay unknown.
    pub fn costs(self, dimensions: &BTreeMap<String, usize>) -> Outcome<Option<Costs>> {
        let bindings = self.bindings(dimensions, &[]);
        let symbolic = self.graph.inputs.iter().any(|&id| {
            let shape = self.graph.value(id).ty.tensor().and_then(|t| t.shape.as_ref());
            shape.is_none_or(|shape| {
                shape.iter().any(|dim| match dim {
                    Dim::Fixed(_) => false,
                    Dim::Symbol(name) => !dimensions.contains_key(name.as_ref()),
                    Dim::Unknown(()) => true,
                })
            })
        });
        if symbolic {
            return Ok(None);
        }
        let mut graph = self.graph;
        prepare(&mut graph, &bindings, &self.sources, &MemoryPool::unbounded(), &PrepareOptions::default())?;
        let cost = graph_cost(&graph);
        let costs =
            Costs { flops: cost.flops, bytes_read: cost.bytes_read, bytes_written: cost.bytes_written };
        Ok(Some(costs))
    }
}

/// See [`UNCOUNTED`].
fn uncounted(means: Means<'_>) -> Bytes {
    UNCOUNTED + UNCOUNTED_PER_THREAD * u64::from(means.threads)
}

/// The refusal of a budget that names one that is enough.
fn refused(means: Means<'_>, smallest: Bytes, why: String) -> Failure {
    // Reading and rewriting the model have already taken what they need at most.
    let smallest = smallest.max(means.baseline.peak_so_far());
    let limit = means.pool.limit().unwrap_or_default();
    let mut failure = Failure::new(
        Exit::Budget,
        anyhow::anyhow!("no plan fits into {limit}: the smallest budget that does is {smallest}; {why}"),
    );
    failure.name_smallest(smallest);
    failure
}

/// Heap that came since `before` and cannot be given back.
fn left_behind(means: Means<'_>, before: Bytes) -> Bytes {
    release_freed_memory();
    means.baseline.anonymous_since().saturating_sub(before)
}

/// What is held besides what a plan counts: what readers and passes left on the heap, which is known only by measuring
/// it, and what nobody counts. Inputs are already counted.
pub fn held_beside(means: Means<'_>, inputs: Bytes) -> Bytes {
    let heap = means.baseline.anonymous_since().saturating_sub(inputs);
    heap + uncounted(means) + means.baseline.beyond_told_fixed_cost(means.profile)
}

/// Plans and starts a session, and does so again in what is left where it took more heap than was foreseen; also tells
/// what is held beside its plan.
pub fn within_budget<S>(
    means: Means<'_>,
    mut held: Bytes,
    inputs: Bytes,
    start: impl Fn(&PlanOptions) -> Result<S, EngineError>,
    plan_of: impl Fn(&S) -> &Plan,
) -> Outcome<(S, Bytes)> {
    let limit = means.pool.limit();
    let mut attempts = 0;
    loop {
        attempts += 1;
        let session = planned(means, held, &start)?;
        release_freed_memory();
        let plan = plan_of(&session);
        // What came beside the arena is heap. A plan of many small steps may take more of it than was foreseen: then
        // plan again in what is left.
        let heap = means.baseline.anonymous_since().saturating_sub(inputs + plan.arena);
        // Half of what is set aside for it may be in use before the run begins.
        let expected = held + plan.outside_arena;
        let excess = (heap + Bytes(uncounted(means).0 / 2)).saturating_sub(expected);
        if limit.is_none() || excess == Bytes::ZERO {
            return Ok((session, held));
        }
        if attempts == PLANS_MAX {
            let enough = limit.unwrap_or_default() + excess * 2;
            return Err(refused(means, enough, format!("keeping the plan in mind takes {excess} more")));
        }
        // A little more each time, because an attempt leaves some pages behind.
        held += excess + LEFT_BY_ATTEMPT;
    }
}

/// Plans with what is left of the budget, and tells a refusal in terms of the whole budget.
pub fn planned<T>(
    means: Means<'_>,
    held: Bytes,
    plan: impl Fn(&PlanOptions) -> Result<T, EngineError>,
) -> Outcome<T> {
    let held = held + means.pool.used();
    let limit = means.pool.limit();
    let options = means.plan_options(limit.map(|limit| limit.saturating_sub(held)));
    let before = means.baseline.anonymous_since();
    let planned = plan(&options).map_err(|error| match error {
        EngineError::Budget { smallest, at, holders, .. } => refused(
            means,
            smallest + held + left_behind(means, before),
            format!(
                "{held} of it are the graph, the inputs and copies of the outputs; in the way at node {at:?} are {holders}"
            ),
        ),
        other => other.into(),
    })?;
    // The search for a plan takes memory, too, and under the smallest budgets more than the run itself.
    let taken = means.baseline.peak_so_far();
    if limit.is_some_and(|limit| taken > limit) {
        return Err(refused(means, taken, format!("reading and planning took {taken}")));
    }
    Ok(planned)
}

/// What one instruction took over all profiled runs, beside what was foreseen.
#[derive(Clone, Debug, Serialize)]
pub struct NodeTime {
    /// The node, with its rows if it is one stripe of several.
    pub name: String,
    /// The operator.
    pub op: String,
    /// The kernel that computes it.
    pub kernel: String,
    /// Arithmetic operations of one run.
    pub flops: Flops,
    /// Bytes of operands and results.
    pub bytes: Bytes,
    /// Predicted time of one run, waiting for weights not counted.
    pub predicted: Seconds,
    /// Runs.
    pub count: u64,
    /// Their sum.
    pub total: Seconds,
    /// The shortest.
    pub min: Seconds,
    /// The longest.
    pub max: Seconds,
}

/// A model that is planned, loaded and ready to run.
pub struct Planned {
    session: Session,
    sources: Vec<Arc<dyn ByteSource>>,
    from_file: bool,
    held_before: Bytes,
    _held: Reservation,
    times: Vec<NodeTime>,
}

struct Inputs<'a>(&'a [LoadedInput]);

impl Inputs<'_> {
    fn find(&self, name: &str) -> Result<&RuntimeValue, String> {
        self.0.iter().find(|i| i.name == name).map(|i| &i.value).ok_or_else(|| "is missing".to_owned())
    }
}

impl Feed for Inputs<'_> {
    fn fill(&mut self, name: &str, ty: &TensorType, target: &mut [u8]) -> Result<(), String> {
        match self.find(name)? {
            RuntimeValue::Tensor(tensor) if tensor.tensor_type() == *ty => {
                target.copy_from_slice(tensor.as_bytes());
                Ok(())
            }
            other => Err(format!("has type {}, but the plan was made for {ty}", other.value_type())),
        }
    }

    fn value(&mut self, name: &str, _ty: &ValueType) -> Result<RuntimeValue, String> {
        self.find(name).cloned()
    }
}

impl Planned {
    /// Runs once; the outputs by name, in the model's order.
    pub fn run(&mut self, inputs: &[LoadedInput]) -> Outcome<Vec<(String, RuntimeValue)>> {
        let mut outputs = Vec::new();
        let report = self.session.run(&mut Inputs(inputs), &mut |name, view| {
            outputs.push((name.to_owned(), view.to_value()));
            Ok(())
        })?;
        if self.times.is_empty() && !report.instruction_seconds.is_empty() {
            let foreseen = |i: &PlannedInstruction| NodeTime {
                name: i.name.clone(),
                op: i.op.clone(),
                kernel: i.kernel.clone(),
                flops: i.flops,
                bytes: i.bytes,
                predicted: i.seconds,
                count: 0,
                total: Seconds(0.0),
                min: Seconds(f64::INFINITY),
                max: Seconds(0.0),
            };
            self.times = self.session.plan().instructions.iter().map(foreseen).collect();
        }
        for (time, &seconds) in self.times.iter_mut().zip(&report.instruction_seconds) {
            time.count += 1;
            time.total += seconds;
            time.min = Seconds(time.min.0.min(seconds.0));
            time.max = Seconds(time.max.0.max(seconds.0));
        }
        Ok(outputs)
    }

    /// The instruction set of the kernels.
    pub fn isa(&self) -> String {
        Isa::best().name().to_owned()
    }

    /// Everything that is planned: what the session holds and what is held beside it.
    pub fn planned(&self) -> Bytes {
        self.session.plan().predicted_peak + self.held_before
    }

    /// Predicted time of one run.
    pub fn predicted_seconds(&self) -> Option<Seconds> {
        Some(self.session.plan().predicted_seconds)
    }

    /// The peak of our own count, inside and beside the session.
    pub fn pool_peak(&self) -> Bytes {
        self.session.memory().peak() + self.held_before
    }

    /// Bytes read so far, by tier.
    pub fn bytes_read_by_tier(&self) -> BTreeMap<String, Bytes> {
        let read: Bytes = self.sources.iter().map(|s| s.bytes_read()).sum();
        let tier = if self.from_file { Tier::Ssd } else { Tier::Ram };
        if read == Bytes::ZERO { BTreeMap::new() } else { BTreeMap::from([(tier.name().to_owned(), read)]) }
    }

    /// The planner's decisions as the receipt tells them.
    pub fn plan_summary(&self) -> PlanSummary {
        plan_summary(self.session.plan())
    }

    /// The time of every instruction over all profiled runs.
    pub fn node_times(&self) -> Vec<NodeTime> {
        self.times.clone()
    }
}

/// A plan's decisions as the receipt tells them.
pub fn plan_summary(plan: &Plan) -> PlanSummary {
    let steps = |technique: &str| -> Vec<PlanStep> {
        plan.decisions
            .iter()
            .filter(|d| d.technique == technique)
            .map(|d| PlanStep { what: d.what.clone(), bytes: d.bytes, why: d.why.clone() })
            .collect()
    };
    let why = steps("stream").first().map_or(String::new(), |step| step.why.clone());
    let streamed: Vec<PlanStep> = plan
        .weights
        .iter()
        .filter(|w| w.streamed_at.is_some())
        .map(|w| PlanStep { what: w.name.clone(), bytes: w.stored, why: why.clone() })
        .chain(steps("rows from the file"))
        .collect();
    let (split, recomputed) = (steps("stripes"), steps("recompute"));
    let parts: Vec<&str> = [
        (!streamed.is_empty(), "weights streamed"),
        (plan.decisions.iter().any(|d| d.technique == "experts"), "experts on demand"),
        (!split.is_empty(), "layers split into stripes"),
        (!recomputed.is_empty(), "tensors recomputed"),
    ]
    .into_iter()
    .filter_map(|(used, name)| used.then_some(name))
    .collect();
    PlanSummary {
        strategy: if parts.is_empty() { "resident".to_owned() } else { parts.join(", ") },
        arena_bytes: plan.arena,
        arena_lower_bound_bytes: plan.arena_lower_bound,
        weights_resident_bytes: plan.weights.iter().filter(|w| w.streamed_at.is_none()).map(|w| w.size).sum(),
        peak_at: plan.instructions.get(plan.peak_at).map_or(String::new(), |i| i.name.clone()),
        streamed,
        split,
        recomputed,
    }
}
