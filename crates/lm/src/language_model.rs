//! A decoder from a file, planned inside a budget and ready to compute.

use std::sync::Arc;

use lightering_engine::{
    Bindings, EngineError, ExpertOptions, Feed, OutputView, Plan, PlanOptions, PrepareOptions, RuntimeValue,
    Session, SessionOptions, plan_graph, prepare,
};
use lightering_formats::gguf::GgufFile;
use lightering_graph::{DType, Graph, LmOp, Op, TensorType, ValueType};
use lightering_meter::MemoryPool;
use lightering_tier::{ByteSource, ChunkStore, Residency};

use crate::architecture::{CacheOptions, HyperParameters, build, ports};
use crate::{
    Error, ExpertResidency, ModelStatus, PageKind, Result, Row, StepReport, TokenModel, WindowCache,
};

/// What a decoder is made ready for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderOptions {
    /// The cache of keys and values.
    pub cache: CacheOptions,
    /// Most tokens of one step.
    pub rows: usize,
    /// Most tokens of one step whose logits may be wanted.
    pub wanted: usize,
}

/// A decoder's graph, bound to the sizes of its steps and not yet planned.
pub struct Decoder {
    graph: Graph,
    parameters: HyperParameters,
    options: DecoderOptions,
    source: Arc<dyn ByteSource>,
}

impl Decoder {
    /// Builds and rewrites the graph of the decoder in `file`, whose bytes are `source`. No weight is read.
    ///
    /// # Errors
    /// What is wrong with the file's metadata or tensors, and options that ask for nothing.
    pub fn new(file: &GgufFile, source: Arc<dyn ByteSource>, options: DecoderOptions) -> Result<Decoder> {
        let cache = options.cache;
        for (what, n) in [
            ("rows of a step", options.rows),
            ("wanted rows", options.wanted),
            ("cache pages", cache.pages),
            ("positions of a page", cache.page_len),
            ("positions of a sequence", cache.context),
        ] {
            if n == 0 || n > i32::MAX as usize {
                return Err(Error::invalid(what, n, "a number from 1 to 2147483647"));
            }
        }
        let (mut graph, parameters) = build(file, &cache)?;
        if let Some(window) = parameters.cached_window().filter(|_| cache.window_pages > 0) {
            let least = WindowCache::least_pages(window, cache.page_len);
            if cache.window_pages < least || cache.window_pages > i32::MAX as usize {
                let expected = format!("0, or {least} to 2147483647 for a window of {window} positions");
                return Err(Error::invalid("cache pages of windows", cache.window_pages, expected));
            }
        }
        let pages = cache.context.div_ceil(cache.page_len);
        let mut bindings = Bindings::default();
        for &input in &graph.inputs {
            let ty = match graph.value(input).name.as_str() {
                ports::PAGES | ports::WINDOW_PAGES => TensorType::fixed(DType::I32, &[options.rows, pages]),
                ports::WANTED => TensorType::fixed(DType::I64, &[options.wanted]),
                _ => TensorType::fixed(DType::I32, &[options.rows]),
            };
            bindings.types.push((input, ty));
        }
        let sources = [source.clone()];
        let memory = MemoryPool::unbounded();
        prepare(&mut graph, &bindings, &sources, &memory, &PrepareOptions::default())?;
        Ok(Decoder { graph, parameters, options, source })
    }

    /// The numbers that describe it.
    pub fn parameters(&self) -> &HyperParameters {
        &self.parameters
    }

    /// The graph.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The states that hold pages.
    fn cached(&self) -> Vec<CachedState> {
        let apart = self.options.cache.window_pages > 0 && self.parameters.cached_window().is_some();
        let mut states = Vec::new();
        for layer in 0..self.parameters.layers {
            let windowed = apart && self.parameters.has_window(layer);
            let kind = if windowed { PageKind::Window } else { PageKind::Shared };
            for part in ["keys", "values"] {
                let name = format!("blk.{layer}.{part} cache");
                let value = self.graph.find(&name);
                let dims = value.and_then(|value| self.graph.value(value).ty.tensor()?.dims());
                if let Some([_, page_bytes]) = dims.as_deref() {
                    states.push(CachedState { name, kind, page_bytes: *page_bytes });
                }
            }
        }
        states
    }

    /// Bytes of a page of the cache over all layers, the larger ones where layers with a window have their own.
    pub fn page_bytes(&self) -> usize {
        let sum = |kind| self.cached().iter().filter(|s| s.kind == kind).map(|s| s.page_bytes).sum::<usize>();
        sum(PageKind::Shared).max(sum(PageKind::Window))
    }

    /// Plans without allocating.
    ///
    /// # Errors
    /// [`EngineError::Budget`] when nothing fits.
    pub fn plan(&self, options: &PlanOptions) -> std::result::Result<Plan, EngineError> {
        plan_graph(&self.graph, &row_classes(&self.graph), &direct(options))
    }

    /// Plans, allocates and loads the weights that stay.
    ///
    /// # Errors
    /// [`EngineError::Budget`] when nothing fits; [`EngineError::Io`] when a weight cannot be read.
    pub fn start(
        &self,
        options: &PlanOptions,
        experts: &ExpertOptions,
        profile: bool,
    ) -> std::result::Result<LanguageModel, EngineError> {
        let options = SessionOptions {
            profile,
            rows: row_classes(&self.graph),
            experts: experts.clone(),
            repeats: true,
            ..SessionOptions::new(direct(options))
        };
        let session = Session::new(&self.graph, vec![self.source.clone()], &options)?;
        Ok(LanguageModel {
            session,
            source: self.source.clone(),
            parameters: self.parameters.clone(),
            options: self.options,
            instruction_seconds: Vec::new(),
            weight_bytes: weight_bytes(&self.graph),
            cached: self.cached(),
        })
    }
}

/// The inputs whose leading dimension differs from step to step.
fn row_classes(graph: &Graph) -> Vec<Vec<String>> {
    let names = graph.inputs.iter().map(|&input| graph.value(input).name.to_string());
    let (wanted, tokens) = names.partition(|name| name == ports::WANTED);
    vec![tokens, wanted]
}

/// Models are read past the page cache.
fn direct(options: &PlanOptions) -> PlanOptions {
    PlanOptions { direct_reads: true, ..options.clone() }
}

/// Bytes of the weights that one token passes.
fn weight_bytes(graph: &Graph) -> lightering_units::Bytes {
    let mut sum = 0;
    for (_, node) in graph.iter_nodes() {
        let Op::Lm(op) = &node.op else { continue };
        let size = |i: usize| {
            let ty = node.input(i).and_then(|v| graph.value(v).ty.tensor());
            ty.and_then(TensorType::size_bytes).unwrap_or(0)
        };
        sum += match **op {
            LmOp::BlockMatMul { .. } | LmOp::HeadMatMul { .. } => size(1),
            LmOp::Experts { .. } => {
                let dims = |i: usize| node.input(i).and_then(|v| graph.value(v).ty.tensor()?.dims());
                match (dims(1).as_deref(), dims(3).as_deref()) {
                    (Some([_, used]), Some([count, ..])) => (3..6).map(|i| size(i) / count * used).sum(),
                    _ => 0,
                }
            }
            _ => 0,
        };
    }
    lightering_units::Bytes(sum as u64)
}

/// A planned decoder with its cache and the weights that stay in memory.
pub struct LanguageModel {
    session: Session,
    source: Arc<dyn ByteSource>,
    parameters: HyperParameters,
    options: DecoderOptions,
    instruction_seconds: Vec<f64>,
    weight_bytes: lightering_units::Bytes,
    cached: Vec<CachedState>,
}

/// A state that holds the keys or the values of a layer, page behind page.
struct CachedState {
    name: String,
    kind: PageKind,
    page_bytes: usize,
}

/// The inputs of a step.
struct Step<'a> {
    rows: &'a [Row<'a>],
    wanted: &'a [i64],
    pages: usize,
}

impl Feed for Step<'_> {
    fn fill(&mut self, name: &str, ty: &TensorType, target: &mut [u8]) -> std::result::Result<(), String> {
        let ints = |target: &mut [u8], values: &mut dyn Iterator<Item = i32>| {
            for (target, value) in target.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                *target = value.to_ne_bytes();
            }
        };
        match name {
            ports::TOKENS => ints(target, &mut self.rows.iter().map(|r| r.token as i32)),
            ports::POSITIONS => ints(target, &mut self.rows.iter().map(|r| r.position as i32)),
            ports::PAGES | ports::WINDOW_PAGES => {
                for (target, row) in target.chunks_exact_mut(4 * self.pages).zip(self.rows) {
                    let pages = if name == ports::PAGES { row.pages } else { row.window_pages };
                    let there = pages.iter().map(|&p| p as i32);
                    ints(target, &mut there.chain(std::iter::repeat(-1)));
                }
            }
            ports::WANTED => {
                for (target, value) in target.as_chunks_mut::<8>().0.iter_mut().zip(self.wanted) {
                    *target = value.to_ne_bytes();
                }
            }
            _ => return Err(format!("is no input of a decoder ({ty:?})")),
        }
        Ok(())
    }

    fn value(&mut self, _name: &str, _ty: &ValueType) -> std::result::Result<RuntimeValue, String> {
        Err("has no fixed size".to_owned())
    }
}

impl LanguageModel {
    /// The plan that it keeps.
    pub fn plan(&self) -> &Plan {
        self.session.plan()
    }

    /// The session below.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The numbers that describe it.
    pub fn parameters(&self) -> &HyperParameters {
        &self.parameters
    }

    /// What it was made ready for.
    pub fn options(&self) -> &DecoderOptions {
        &self.options
    }

    /// Bytes read from the file so far.
    pub fn bytes_read(&self) -> lightering_units::Bytes {
        self.source.bytes_read()
    }

    /// Bytes of weights that one token passes on its way: all of the layers, of the experts only those that are used.
    pub fn weight_bytes_per_token(&self) -> lightering_units::Bytes {
        self.weight_bytes
    }

    /// Seconds of each instruction over all steps, in the plan's order; empty unless profiled.
    pub fn instruction_seconds(&self) -> &[f64] {
        &self.instruction_seconds
    }

    fn check_page(&self, kind: PageKind, page: u32, len: usize) -> Result<()> {
        let count = match kind {
            PageKind::Shared => self.options.cache.pages,
            PageKind::Window => self.options.cache.window_pages,
        };
        let size = self.page_bytes(kind);
        if page as usize >= count || len != size {
            let expected = format!("a page below {count} and {size} bytes");
            return Err(Error::invalid(
                "page of the cache",
                format!("page {page} and {len} bytes"),
                expected,
            ));
        }
        Ok(())
    }

    fn check(&self, rows: &[Row<'_>], output: &str) -> Result<Vec<i64>> {
        let (most, context) = (self.options.rows, self.options.cache.context);
        if rows.is_empty() || rows.len() > most {
            return Err(Error::invalid("step", format!("{} rows", rows.len()), format!("1 to {most} rows")));
        }
        for (i, row) in rows.iter().enumerate() {
            let place = || format!("row {i} of a step");
            if row.token as usize >= self.parameters.vocabulary {
                let expected = format!("a token of a vocabulary of {}", self.parameters.vocabulary);
                return Err(Error::invalid(place(), format!("token {}", row.token), expected));
            }
            if row.position as usize >= context {
                let what = format!("position {}", row.position);
                return Err(Error::invalid(place(), what, format!("a position below {context}")));
            }
        }
        let wanted: Vec<i64> =
            rows.iter().enumerate().filter(|(_, r)| r.wants_logits).map(|(i, _)| i as i64).collect();
        if output == ports::LOGITS && wanted.len() > self.options.wanted {
            let expected = format!("at most {}", self.options.wanted);
            return Err(Error::invalid("step", format!("{} wanted rows", wanted.len()), expected));
        }
        Ok(wanted)
    }

    /// Computes a step and gives the wanted rows of the output with this name.
    fn compute(
        &mut self,
        rows: &[Row<'_>],
        output: &str,
        give: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<StepReport> {
        let wanted = self.check(rows, output)?;
        // Hidden states are there of every row, and the graph ends in at least one row of logits.
        let only_one = wanted.is_empty() || output == ports::HIDDEN;
        let computed = if only_one { vec![rows.len() as i64 - 1] } else { wanted.clone() };
        let pages = self.options.cache.context.div_ceil(self.options.cache.page_len);
        let mut step = Step { rows, wanted: &computed, pages };
        let counts = [rows.len(), computed.len()];
        let report = self.session.run_rows(&counts, &mut step, &mut |name, view| {
            if name == output
                && let OutputView::Tensor(view) = view
            {
                let values: &[f32] = view.as_slice();
                if output == ports::HIDDEN {
                    let width = values.len() / rows.len();
                    wanted
                        .iter()
                        .for_each(|&row| give(row as usize, &values[row as usize * width..][..width]));
                } else {
                    let width = values.len() / computed.len();
                    for (row, values) in wanted.iter().zip(values.chunks_exact(width)) {
                        give(*row as usize, values);
                    }
                }
            }
            Ok(())
        })?;
        self.instruction_seconds.resize(report.instruction_seconds.len(), 0.0);
        for (sum, seconds) in self.instruction_seconds.iter_mut().zip(&report.instruction_seconds) {
            *sum += seconds.0;
        }
        Ok(StepReport { seconds: report.seconds, stall: report.stall, bytes_read: report.bytes_streamed })
    }
}

impl TokenModel for LanguageModel {
    fn vocabulary_len(&self) -> usize {
        self.parameters.vocabulary
    }

    fn embedding_len(&self) -> usize {
        self.parameters.width
    }

    fn context_len(&self) -> usize {
        self.options.cache.context
    }

    fn rows_max(&self) -> usize {
        self.options.rows
    }

    fn wanted_rows_max(&self) -> usize {
        self.options.wanted
    }

    fn page_len(&self) -> usize {
        self.options.cache.page_len
    }

    fn page_count(&self) -> usize {
        self.options.cache.pages
    }

    fn window(&self) -> Option<WindowCache> {
        let pages = self.options.cache.window_pages;
        let len = self.parameters.cached_window().filter(|_| pages > 0)?;
        Some(WindowCache { len, pages })
    }

    fn page_bytes(&self, kind: PageKind) -> usize {
        self.cached.iter().filter(|state| state.kind == kind).map(|state| state.page_bytes).sum()
    }

    fn read_page(&self, kind: PageKind, page: u32, mut bytes: &mut [u8]) -> Result<()> {
        self.check_page(kind, page, bytes.len())?;
        for state in self.cached.iter().filter(|state| state.kind == kind) {
            let (part, rest) = bytes.split_at_mut(state.page_bytes);
            let start = page as usize * state.page_bytes;
            self.session.read_state_part(&state.name, start, part)?;
            bytes = rest;
        }
        Ok(())
    }

    fn write_page(&mut self, kind: PageKind, page: u32, mut bytes: &[u8]) -> Result<()> {
        self.check_page(kind, page, bytes.len())?;
        for state in self.cached.iter().filter(|state| state.kind == kind) {
            let (part, rest) = bytes.split_at(state.page_bytes);
            let start = page as usize * state.page_bytes;
            self.session.write_state_part(&state.name, start, part)?;
            bytes = rest;
        }
        Ok(())
    }

    fn step(&mut self, rows: &[Row<'_>], logits: &mut dyn FnMut(usize, &mut [f32])) -> Result<StepReport> {
        // Samplers rewrite logits, and the arena's are only lent for reading.
        let mut copy = Vec::new();
        self.compute(rows, ports::LOGITS, &mut |row, values| {
            copy.clear();
            copy.extend_from_slice(values);
            logits(row, &mut copy);
        })
    }

    fn embed(&mut self, rows: &[Row<'_>], hidden: &mut dyn FnMut(usize, &[f32])) -> Result<StepReport> {
        self.compute(rows, ports::HIDDEN, hidden)
    }

    fn status(&self) -> ModelStatus {
        ModelStatus {
            memory_used: Some(self.plan().predicted_peak),
            bytes_read: Some(self.bytes_read()),
            experts: self.session.experts().map(expert_residency),
            ..ModelStatus::default()
        }
    }
}

/// The map of a store of experts; its groups are the layers.
fn expert_residency(store: &ChunkStore) -> ExpertResidency {
    let chunks = store.residency();
    let layers = chunks.iter().map(|c| c.chunk.group as usize + 1).max().unwrap_or(0);
    let experts = chunks.iter().map(|c| c.chunk.index as usize + 1).max().unwrap_or(0);
    let mut tiers = vec![1; layers * experts];
    for chunk in chunks.iter().filter(|c| matches!(c.residency, Residency::Resident | Residency::Pinned)) {
        tiers[chunk.chunk.group as usize * experts + chunk.chunk.index as usize] = 0;
    }
    let stats = store.stats();
    ExpertResidency { layers, experts, tiers, lookups: stats.accesses, hits: stats.hits }
}
