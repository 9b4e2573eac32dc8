//! From the tensors and metadata of a file to a graph over whole sequences.

use std::collections::HashMap;
use std::sync::Arc;

use lightering_formats::gguf::{GgufFile, GgufTensor};
use lightering_graph::{
    BinaryOp, DType, Graph, LmOp, MatMulAttributes, Op, ReduceOp, RopeScaling, RouteScoring, SourceId,
    StoredTensor, Tensor, TensorType, UnaryOp, ValueId,
};
use lightering_kernels::rope_angles;
use lightering_tier::ByteSource;
use lightering_train::{AUXILIARY_LOSS, Change};
use lightering_units::{BlockFormat, Bytes};

use super::method::{LoraOptions, Method};
use super::new_model::Draw;
use super::weights::{Origin, Weights};
use crate::architecture::{Family, HyperParameters, Norm, Positions};
use crate::{Error, Result};

/// Most elements of one batch of logits.
const LOGITS_MAX: u64 = 1 << 33;
/// Hides a position from the softmax; finite, so that no row can become NaN.
const HIDDEN: f32 = -1e9;

/// A language model that is going to be trained: its description, and its weights wherever they are.
pub struct TrainingModel {
    pub(super) file: GgufFile,
    pub(super) source: Option<Arc<dyn ByteSource>>,
    pub(super) drawn: HashMap<String, Draw>,
    pub(super) parameters: HyperParameters,
    /// Weights of the terms that keep a router's choices even and its scores small.
    pub(super) router: [f32; 2],
}

/// The matrices beside a frozen one: `y += scale · B·(A·x)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// The tensor of the file.
    pub tensor: String,
    /// State of A, `[rank, elements of a row]`.
    pub a: String,
    /// State of B, `[rows, rank]`.
    pub b: String,
    /// Elements between both.
    pub rank: usize,
    /// Factor of the product.
    pub scale: f32,
}

/// A forward graph and where what is trained in it comes from and goes to.
pub struct TrainingGraph {
    /// From `tokens`, i64 `[batch, time]`, to f32 `[batch, time, vocabulary]`.
    pub graph: Graph,
    /// The stores of its weights.
    pub sources: Vec<Arc<dyn ByteSource>>,
    /// What changes, for [`lightering_train::StepOptions`].
    pub scheme: HashMap<String, Change>,
    /// The trained parts of the file's tensors: for each tensor the states that follow one another in it.
    pub trained: HashMap<String, Vec<String>>,
    /// The adapters, if those are trained.
    pub adapters: Vec<Adapter>,
}

impl TrainingModel {
    /// The model in a GGUF file. No weight is read.
    ///
    /// # Errors
    /// What is wrong with the file's header or metadata.
    pub fn open(source: Arc<dyn ByteSource>) -> Result<TrainingModel> {
        let file = GgufFile::read(&*source)?;
        let parameters = HyperParameters::of(&file)?;
        Ok(TrainingModel { file, source: Some(source), drawn: HashMap::new(), parameters, router: [0.0; 2] })
    }

    /// The numbers that describe it.
    pub fn parameters(&self) -> &HyperParameters {
        &self.parameters
    }

    /// Metadata and tensors.
    pub fn file(&self) -> &GgufFile {
        &self.file
    }

    /// Weights of the loss that evens out the use of experts, and of the loss that keeps the router's scores small.
    pub fn set_router_losses(&mut self, balance: f32, z: f32) {
        self.router = [balance, z];
    }

    /// The forward graph for batches of `batch` sequences of `time` tokens. `seed` decides first weights.
    ///
    /// # Errors
    /// Tensors that are missing or have other shapes than the metadata says; features through which no gradient passes; a
    /// sequence that is longer than the model's context; a method that does not suit the model.
    pub fn graph(&self, batch: usize, time: usize, method: &Method, seed: u64) -> Result<TrainingGraph> {
        let p = &self.parameters;
        let architecture = p.architecture.as_str();
        if time == 0 || time > p.context {
            let expected = format!("from 1 to the {} that the model has", p.context);
            return Err(Error::invalid("context", format!("{time} tokens"), expected));
        }
        let elements = (batch as u64).saturating_mul(time as u64).saturating_mul(p.vocabulary as u64);
        if batch == 0 || elements > LOGITS_MAX {
            return Err(Error::limit("batch", "the number of logits", elements, LOGITS_MAX));
        }
        if p.compressed.is_some() {
            return Err(Error::unsupported(
                architecture,
                "training of models with compressed keys and values",
            ));
        }
        match method {
            Method::Full => {}
            Method::Last(layers) if *layers <= p.layers => {}
            Method::Last(layers) => {
                return Err(Error::invalid(
                    "method",
                    format!("the last {layers} layers"),
                    format!("at most the {} of the model", p.layers),
                ));
            }
            Method::Lora(options) => {
                options.check()?;
                if p.experts.is_some() {
                    return Err(Error::unsupported(architecture, "LoRA beside experts"));
                }
            }
        }
        let mut graph = Graph::new(architecture);
        graph.sources.extend(["model".to_owned(), "weights".to_owned()]);
        let tokens = graph.add_input("tokens", TensorType::fixed(DType::I64, &[batch, time]));
        let mut b = Builder {
            model: self,
            p,
            family: Family::named(architecture)?,
            graph,
            weights: Weights::new(self.source.clone(), seed),
            batch,
            time,
            method,
            rotations: Vec::new(),
            auxiliary: Vec::new(),
            result: Parts::default(),
        };
        let logits = b.decoder(tokens)?;
        b.graph.outputs = vec![logits];
        if let Some(&first) = b.auxiliary.first() {
            let rest = b.auxiliary[1..].to_vec();
            let mut sum = first;
            for (i, &term) in rest.iter().enumerate() {
                sum = b.binary(format!("router losses {i}"), BinaryOp::Add, sum, term);
            }
            // A name of its own, whatever the term was called.
            let sum = b.node(AUXILIARY_LOSS, Op::Unary(UnaryOp::Identity), &[sum]);
            b.graph.outputs.push(sum);
        }
        let Builder { mut graph, weights, result, .. } = b;
        graph.infer().map_err(lightering_train::TrainError::from)?;
        let nothing: Arc<dyn ByteSource> = Arc::new(Vec::<u8>::new());
        let sources = vec![self.source.clone().unwrap_or(nothing), Arc::new(weights) as Arc<dyn ByteSource>];
        let Parts { scheme, trained, adapters } = result;
        if scheme.is_empty() {
            return Err(Error::invalid("method", method, "a method that changes some matrix of the model"));
        }
        Ok(TrainingGraph { graph, sources, scheme, trained, adapters })
    }
}

#[derive(Default)]
struct Parts {
    scheme: HashMap<String, Change>,
    trained: HashMap<String, Vec<String>>,
    adapters: Vec<Adapter>,
}

struct Builder<'a> {
    model: &'a TrainingModel,
    p: &'a HyperParameters,
    family: &'static Family,
    graph: Graph,
    weights: Weights,
    batch: usize,
    time: usize,
    method: &'a Method,
    /// Cosines, sines and positions that were made already, by base and whether they are stretched.
    rotations: Vec<((u32, bool), [ValueId; 3])>,
    auxiliary: Vec<ValueId>,
    result: Parts,
}

/// The layer that a tensor belongs to.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

impl Builder<'_> {
    fn has(&self, name: &str) -> bool {
        self.model.file.tensor(name).is_some()
    }

    fn rows(&self) -> usize {
        self.batch * self.time
    }

    /// A tensor with the dimensions that it must have, the elements of a row first; 0 admits any.
    fn checked(&self, name: &str, dims: &[usize]) -> Result<GgufTensor> {
        let tensor = self.model.file.tensor(name).ok_or_else(|| {
            let expected = format!("a tensor of the {} architecture", self.p.architecture);
            Error::invalid(name, "no such tensor in the file", expected)
        })?;
        let mut found: Vec<usize> = tensor.dims.iter().map(|&d| d as usize).collect();
        while found.len() > dims.len() && found.last() == Some(&1) {
            found.pop();
        }
        found.resize(found.len().max(dims.len()), 1);
        if found.len() != dims.len() || found.iter().zip(dims).any(|(f, d)| *d != 0 && f != d) {
            return Err(Error::invalid(name, format!("shape {found:?}"), format!("shape {dims:?}")));
        }
        Ok(tensor.clone())
    }

    fn is_trained(&self, name: &str) -> bool {
        match self.method {
            Method::Full => true,
            Method::Lora(_) => false,
            Method::Last(count) => match layer_of(name) {
                Some(layer) => layer + count >= self.p.layers,
                None => name.starts_with("output"),
            },
        }
    }

    /// Part of a tensor as f32: `rows` rows from `first` on, of shape `dims`.
    fn floats(&mut self, t: &GgufTensor, part: Option<usize>, dims: &[usize]) -> Result<ValueId> {
        let label = part.map_or_else(|| t.name.clone(), |part| format!("{}#{part}", t.name));
        if let Some(value) = self.graph.find(&label) {
            return Ok(value);
        }
        let len: usize = dims.iter().product();
        let row_len = t.row_len() as usize;
        let row_bytes = t.format.row_bytes(row_len).ok_or_else(|| {
            Error::invalid(
                &t.name,
                format!("rows of {row_len} elements"),
                format!("whole blocks of {}", t.format),
            )
        })?;
        let first = part.unwrap_or(0) * len;
        let origin = match self.model.drawn.get(&t.name) {
            Some(Draw::Normal { deviation, number }) => {
                let number = number + ((part.unwrap_or(0) as u64 + 1) << 32);
                Origin::Normal { deviation: *deviation, number }
            }
            Some(Draw::Constant(value)) => Origin::Constant(*value),
            None => {
                let offset = t.offset + (first / row_len * row_bytes) as u64;
                Origin::Stored { offset, format: t.format, row_len }
            }
        };
        let value = self.stored_floats(&label, dims, origin);
        if self.is_trained(&t.name) {
            self.result.scheme.insert(label.clone(), Change::Whole);
            self.result.trained.entry(t.name.clone()).or_default().push(label);
        }
        Ok(value)
    }

    fn stored_floats(&mut self, label: &str, dims: &[usize], origin: Origin) -> ValueId {
        let len: usize = dims.iter().product();
        let offset = self.weights.add(len, origin);
        let stored = StoredTensor { source: SourceId(1), offset, size: Bytes(4 * len as u64) };
        self.graph.add_stored(label, TensorType::fixed(DType::F32, dims), stored)
    }

    /// A tensor in its blocks, `[rows, bytes of a row]`.
    fn blocks(&mut self, t: &GgufTensor) -> Result<ValueId> {
        if let Some(value) = self.graph.find(&t.name) {
            return Ok(value);
        }
        let row = t.format.row_bytes(t.row_len() as usize).ok_or_else(|| {
            Error::invalid(&t.name, format!("rows of {} elements", t.row_len()), "whole blocks of its format")
        })?;
        let stored = StoredTensor { source: SourceId(0), offset: t.offset, size: t.size };
        let ty = TensorType::fixed(DType::U8, &[t.rows() as usize, row]);
        Ok(self.graph.add_stored(t.name.clone(), ty, stored))
    }

    fn vector(&mut self, name: &str, n: usize) -> Result<ValueId> {
        let t = self.checked(name, &[n])?;
        self.floats(&t, None, &[n])
    }

    fn node(&mut self, name: impl Into<String>, op: Op, inputs: &[ValueId]) -> ValueId {
        self.graph.add_node(name, op, inputs, 1)[0]
    }

    fn binary(&mut self, name: impl Into<String>, op: BinaryOp, a: ValueId, b: ValueId) -> ValueId {
        self.node(name, Op::Binary(op), &[a, b])
    }

    fn constant(&mut self, name: impl Into<String>, tensor: Tensor) -> ValueId {
        self.graph.add_constant(name, tensor)
    }

    fn scaled(&mut self, name: &str, x: ValueId, factor: f32) -> ValueId {
        if factor == 1.0 {
            return x;
        }
        let factor = self.constant(format!("{name} factor"), Tensor::scalar(factor));
        self.binary(name, BinaryOp::Mul, x, factor)
    }

    fn reshaped(&mut self, name: impl Into<String>, x: ValueId, dims: &[usize]) -> ValueId {
        let name = name.into();
        let sizes: Vec<i64> = dims.iter().map(|&d| d as i64).collect();
        let shape = self.constant(format!("{name} shape"), Tensor::from_slice(&[sizes.len()], &sizes));
        self.node(name, Op::Reshape { allow_zero: false }, &[x, shape])
    }

    fn transposed(&mut self, name: impl Into<String>, x: ValueId, perm: &[usize]) -> ValueId {
        self.node(name, Op::Transpose { perm: Some(perm.to_vec()) }, &[x])
    }

    /// Columns `from..to` of rows.
    fn columns(&mut self, name: impl Into<String>, x: ValueId, from: usize, to: usize) -> ValueId {
        let name = name.into();
        let list = |b: &mut Self, what: &str, n: usize| {
            b.constant(format!("{name} {what}"), Tensor::from_slice(&[1], &[n as i64]))
        };
        let (from, to) = (list(self, "from", from), list(self, "to", to));
        let axis = list(self, "axis", 1);
        self.node(name, Op::Slice, &[x, from, to, axis])
    }

    fn product(&mut self, name: impl Into<String>, x: ValueId, w: ValueId) -> ValueId {
        let attributes = MatMulAttributes { trans_b: true, ..MatMulAttributes::default() };
        self.node(name, Op::MatMul(attributes), &[x, w])
    }

    /// `x·wᵀ` for a matrix of the file, with its adapter if it has one.
    fn matrix(
        &mut self,
        name: &str,
        tensor: &str,
        x: ValueId,
        k: usize,
        n: usize,
    ) -> Result<(ValueId, usize)> {
        let t = self.checked(tensor, &[k, n])?;
        let n = t.rows() as usize;
        if self.is_trained(tensor) || !self.model.drawn.is_empty() {
            let w = self.floats(&t, None, &[n, k])?;
            return Ok((self.product(name, x, w), n));
        }
        let w = self.blocks(&t)?;
        let op = Op::Lm(Box::new(LmOp::BlockMatMul { format: t.format }));
        let y = self.node(name, op, &[x, w]);
        let Method::Lora(options) = self.method else { return Ok((y, n)) };
        let Some(layer) = layer_of(tensor) else { return Ok((y, n)) };
        let matrix = tensor.splitn(3, '.').nth(2).unwrap_or_default();
        let within = options.layers.is_none_or(|count| layer + count >= self.p.layers);
        if !within || !options.wants(matrix) {
            return Ok((y, n));
        }
        Ok((self.adapted(name, tensor, x, y, [k, n], options), n))
    }

    fn adapted(
        &mut self,
        name: &str,
        tensor: &str,
        x: ValueId,
        y: ValueId,
        [k, n]: [usize; 2],
        options: &LoraOptions,
    ) -> ValueId {
        let base = tensor.strip_suffix(".weight").unwrap_or(tensor);
        let rank = options.rank;
        let number = self.result.adapters.len() as u64;
        let (a, b) = (format!("{base}.lora_a"), format!("{base}.lora_b"));
        let deviation = 1.0 / (k as f32).sqrt();
        let first = self.stored_floats(&a, &[rank, k], Origin::Normal { deviation, number });
        let second = self.stored_floats(&b, &[n, rank], Origin::Constant(0.0));
        let scale = options.alpha / rank as f32;
        let inner = self.product(format!("{name} lora inner"), x, first);
        let inner = self.scaled(&format!("{name} lora scaled"), inner, scale);
        let outer = self.product(format!("{name} lora outer"), inner, second);
        for state in [&a, &b] {
            self.result.scheme.insert(state.clone(), Change::Whole);
        }
        self.result.adapters.push(Adapter { tensor: tensor.to_owned(), a, b, rank, scale });
        self.binary(format!("{name} adapted"), BinaryOp::Add, y, outer)
    }

    /// `w·x`, with the bias if the file has one; also the number of elements of the result.
    fn linear(&mut self, name: &str, x: ValueId, k: usize, n: usize) -> Result<(ValueId, usize)> {
        let (y, n) = self.matrix(name, &format!("{name}.weight"), x, k, n)?;
        let bias = format!("{name}.bias");
        if !self.has(&bias) {
            return Ok((y, n));
        }
        let bias = self.vector(&bias, n)?;
        Ok((self.binary(format!("{name} with bias"), BinaryOp::Add, y, bias), n))
    }

    /// The family's normalisation over the last axis.
    fn norm(&mut self, name: &str, x: ValueId, n: usize) -> Result<ValueId> {
        let gain = self.vector(&format!("{name}.weight"), n)?;
        let epsilon = self.p.epsilon;
        Ok(match self.family.norm {
            Norm::Rms => self.node(name, Op::RmsNorm { axis: -1, epsilon }, &[x, gain]),
            Norm::Layer => {
                let mut inputs = vec![x, gain];
                if self.has(&format!("{name}.bias")) {
                    inputs.push(self.vector(&format!("{name}.bias"), n)?);
                }
                self.node(name, Op::LayerNorm { axis: -1, epsilon }, &inputs)
            }
        })
    }

    fn softcapped(&mut self, name: &str, x: ValueId, cap: f32) -> ValueId {
        let small = self.scaled(&format!("{name} divided"), x, 1.0 / cap);
        let capped = self.node(format!("{name} tanh"), Op::Unary(UnaryOp::Tanh), &[small]);
        self.scaled(&format!("{name} capped"), capped, cap)
    }

    fn decoder(&mut self, tokens: ValueId) -> Result<ValueId> {
        let (d, rows) = (self.p.width, self.rows());
        let ids = self.reshaped("ids", tokens, &[rows]);
        let mut x = self.table("embeddings", "token_embd.weight", ids, self.p.vocabulary)?;
        x = self.scaled("scaled embeddings", x, self.p.embedding_scale);
        if self.family.positions == Positions::Learned {
            let places: Vec<i64> = (0..rows).map(|row| (row % self.time) as i64).collect();
            let places = self.constant("positions", Tensor::from_slice(&[rows], &places));
            let places = self.table("position embeddings", "position_embd.weight", places, 0)?;
            x = self.binary("placed embeddings", BinaryOp::Add, x, places);
        }
        if self.has("token_embd_norm.weight") {
            x = self.norm("token_embd_norm", x, d)?;
        }
        for layer in 0..self.p.layers {
            x = self.layer(layer, x)?;
        }
        let x = self.norm("output_norm", x, d)?;
        let head = if self.has("output.weight") { "output.weight" } else { "token_embd.weight" };
        let (mut logits, n) = self.matrix("output", head, x, d, self.p.vocabulary)?;
        if self.has("output.bias") {
            let bias = self.vector("output.bias", n)?;
            logits = self.binary("output with bias", BinaryOp::Add, logits, bias);
        }
        logits = self.scaled("divided logits", logits, 1.0 / self.p.logit_divisor);
        if let Some(cap) = self.p.logit_softcap {
            logits = self.softcapped("capped logits", logits, cap);
        }
        Ok(self.reshaped("logits", logits, &[self.batch, self.time, n]))
    }

    /// Rows of a table.
    fn table(&mut self, name: &str, tensor: &str, ids: ValueId, n: usize) -> Result<ValueId> {
        let t = self.checked(tensor, &[self.p.width, n])?;
        if self.is_trained(tensor) || !self.model.drawn.is_empty() {
            let w = self.floats(&t, None, &[t.rows() as usize, self.p.width])?;
            return Ok(self.node(name, Op::Gather { axis: 0 }, &[w, ids]));
        }
        let w = self.blocks(&t)?;
        let ids = self.node(format!("{name} ids"), Op::Cast { to: DType::I32, saturate: true }, &[ids]);
        Ok(self.node(name, Op::Lm(Box::new(LmOp::BlockGather { format: t.format })), &[w, ids]))
    }

    fn layer(&mut self, layer: usize, x: ValueId) -> Result<ValueId> {
        let d = self.p.width;
        let name = |part: &str| format!("blk.{layer}.{part}");
        let mut y = x;
        if self.has(&name("attn_norm.weight")) {
            y = self.norm(&name("attn_norm"), x, d)?;
        }
        y = self.attention(layer, y)?;
        for after in ["post_attention_norm", "attn_post_norm"] {
            if self.has(&name(&format!("{after}.weight"))) {
                y = self.norm(&name(after), y, d)?;
            }
        }
        y = self.scaled(&name("attention share"), y, self.p.residual_scale);
        let early = x;
        let x = self.binary(name("after attention"), BinaryOp::Add, x, y);
        let mut y = x;
        if self.has(&name("ffn_norm.weight")) {
            y = self.norm(&name("ffn_norm"), x, d)?;
        }
        let leading = self.p.experts.as_ref().map_or(usize::MAX, |e| e.leading_dense);
        y = if layer >= leading {
            let routed = if self.family.early_router { early } else { y };
            self.experts(layer, y, routed)?
        } else {
            self.feed_forward(&name("ffn"), y, "")?
        };
        for after in ["post_ffw_norm", "ffn_post_norm"] {
            if self.has(&name(&format!("{after}.weight"))) {
                y = self.norm(&name(after), y, d)?;
            }
        }
        y = self.scaled(&name("feed-forward share"), y, self.p.residual_scale);
        Ok(self.binary(name("output"), BinaryOp::Add, x, y))
    }

    fn attention(&mut self, layer: usize, x: ValueId) -> Result<ValueId> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let (heads, kv_heads) = (self.p.heads[layer], self.p.kv_heads[layer]);
        let (key_len, value_len) = (self.p.key_len, self.p.value_len);
        let [batch, time] = [self.batch, self.time];
        if self.has(&name("attn_sinks.weight")) {
            return Err(Error::unsupported(name("attn_sinks.weight"), "training with attention sinks"));
        }
        let [q, k, v] = self.projections(layer, x)?;
        let q = self.head_norm(&name("attn_q_norm"), q, heads, key_len)?;
        let k = self.head_norm(&name("attn_k_norm"), k, kv_heads, key_len)?;
        let split = |b: &mut Self, part: &str, x, heads, len| {
            let apart = b.reshaped(name(&format!("{part} by head")), x, &[batch, time, heads, len]);
            b.transposed(name(&format!("{part} heads first")), apart, &[0, 2, 1, 3])
        };
        let mut q = split(self, "q", q, heads, key_len);
        let mut k = split(self, "k", k, kv_heads, key_len);
        let v = split(self, "v", v, kv_heads, value_len);
        let local = self.p.has_window(layer);
        let turned = local || !self.family.rope_only_in_windows || self.p.window.is_none();
        if self.family.positions != Positions::Learned && turned {
            let [cos, sin, places] = self.rotation(layer, local)?;
            let op = Op::RotaryEmbedding {
                interleaved: self.family.positions == Positions::RopeNeighbours,
                num_heads: 0,
                rotary_dim: self.p.rope_dims,
            };
            q = self.node(name("q turned"), op.clone(), &[q, cos, sin, places]);
            k = self.node(name("k turned"), op, &[k, cos, sin, places]);
        }
        // Queries that share keys stand below one another, so that one product serves them all.
        let group = heads / kv_heads;
        let q = self.reshaped(name("q by keys"), q, &[batch, kv_heads, group * time, key_len]);
        let mut scores = self.product(name("scores"), q, k);
        scores = self.scaled(&name("scaled scores"), scores, self.p.attention_scale);
        if let Some(cap) = self.p.attention_softcap {
            scores = self.softcapped(&name("capped scores"), scores, cap);
        }
        scores = self.reshaped(name("scores by head"), scores, &[batch, heads, time, time]);
        let mask = self.mask(self.p.window.filter(|_| local));
        scores = self.binary(name("masked scores"), BinaryOp::Add, scores, mask);
        let shares = self.node(name("shares"), Op::Softmax { axis: -1, log: false }, &[scores]);
        let shares = self.reshaped(name("shares by keys"), shares, &[batch, kv_heads, group * time, time]);
        let y = self.node(name("mixed"), Op::MatMul(MatMulAttributes::default()), &[shares, v]);
        let y = self.reshaped(name("mixed by head"), y, &[batch, heads, time, value_len]);
        let y = self.transposed(name("mixed positions first"), y, &[0, 2, 1, 3]);
        let y = self.reshaped(name("mixed together"), y, &[batch * time, heads * value_len]);
        Ok(self.linear(&name("attn_output"), y, heads * value_len, self.p.width)?.0)
    }

    /// What a position must not see: what comes later, and what lies before its window.
    fn mask(&mut self, window: Option<usize>) -> ValueId {
        let name = window.map_or_else(|| "causal mask".to_owned(), |w| format!("mask of a window of {w}"));
        if let Some(mask) = self.graph.find(&name) {
            return mask;
        }
        let time = self.time;
        let mut mask = Tensor::zeros(DType::F32, &[time, time]);
        for (at, x) in mask.as_mut_slice::<f32>().iter_mut().enumerate() {
            let (query, key) = (at / time, at % time);
            if key > query || window.is_some_and(|w| key + w <= query) {
                *x = HIDDEN;
            }
        }
        self.constant(name, mask)
    }

    /// Queries, keys and values: of three matrices, or of one that holds them one below the other.
    fn projections(&mut self, layer: usize, x: ValueId) -> Result<[ValueId; 3]> {
        let d = self.p.width;
        let name = |part: &str| format!("blk.{layer}.{part}");
        let q = self.p.heads[layer] * self.p.key_len;
        let k = self.p.kv_heads[layer] * self.p.key_len;
        let v = self.p.kv_heads[layer] * self.p.value_len;
        if self.has(&name("attn_qkv.weight")) {
            let (all, _) = self.linear(&name("attn_qkv"), x, d, q + k + v)?;
            return Ok([
                self.columns(name("q"), all, 0, q),
                self.columns(name("k"), all, q, q + k),
                self.columns(name("v"), all, q + k, q + k + v),
            ]);
        }
        Ok([
            self.linear(&name("attn_q"), x, d, q)?.0,
            self.linear(&name("attn_k"), x, d, k)?.0,
            self.linear(&name("attn_v"), x, d, v)?.0,
        ])
    }

    /// Normalises each head, or all of them together, where the file has a norm for it.
    fn head_norm(&mut self, name: &str, x: ValueId, heads: usize, len: usize) -> Result<ValueId> {
        let Some(t) = self.model.file.tensor(&format!("{name}.weight")) else { return Ok(x) };
        if t.dims.first() != Some(&(len as u64)) {
            return self.norm(name, x, heads * len);
        }
        let rows = self.rows();
        let split = self.reshaped(format!("{name} by head"), x, &[rows * heads, len]);
        let y = self.norm(name, split, len)?;
        Ok(self.reshaped(format!("{name} together"), y, &[rows, heads * len]))
    }

    /// Values of a vector that belongs to the description rather than to what is learned.
    fn known_vector(&self, name: &str, n: usize) -> Result<Vec<f32>> {
        let t = self.checked(name, &[n])?;
        let Some(source) = self.model.source.as_ref().filter(|_| t.format == BlockFormat::F32) else {
            return Err(Error::invalid(name, format!("elements of type {}", t.format), "F32"));
        };
        let mut values = vec![0f32; n];
        let failed = |e| lightering_formats::Error::Io { place: source.name(), source: e };
        source.read_at(t.offset, bytemuck::cast_slice_mut(&mut values)).map_err(failed)?;
        Ok(values)
    }

    /// Cosines, sines and positions of the rotation of queries and keys.
    fn rotation(&mut self, layer: usize, local: bool) -> Result<[ValueId; 3]> {
        let base = self.p.rope_base_local.filter(|_| local).unwrap_or(self.p.rope_base);
        let stretched = !(local && self.p.rope_base_local.is_some());
        let key = (base.to_bits(), stretched);
        if let Some((_, made)) = self.rotations.iter().find(|(k, _)| *k == key) {
            return Ok(*made);
        }
        let (dims, time) = (self.p.rope_dims, self.time);
        let magnitude = if stretched { self.p.rope_magnitude } else { 1.0 };
        // Phi-3 has other factors for contexts beyond the one it was first trained on; windows are within it.
        let names = [
            "rope_freqs.weight".to_owned(),
            format!("blk.{layer}.rope_freqs.weight"),
            "rope_factors_short.weight".to_owned(),
        ];
        let factors = match names.iter().find(|name| self.has(name)) {
            Some(name) => Some(self.known_vector(name, dims / 2)?),
            None => None,
        };
        let scaling = match (&factors, self.p.rope_scaling) {
            (Some(factors), _) => lightering_kernels::RopeScaling::Factors { factors, magnitude },
            (None, RopeScaling::Linear { factor }) if stretched => {
                lightering_kernels::RopeScaling::Linear { factor }
            }
            (None, RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow }) if stretched => {
                lightering_kernels::RopeScaling::Yarn {
                    factor,
                    original_context,
                    beta_fast,
                    beta_slow,
                    magnitude,
                }
            }
            _ => lightering_kernels::RopeScaling::None,
        };
        let positions: Vec<i32> = (0..time as i32).collect();
        let mut angles = vec![0.0; time * dims];
        rope_angles(&positions, dims, base, &scaling, &mut angles);
        let half = |from: usize| -> Vec<f32> {
            angles
                .chunks_exact(dims.max(1))
                .flat_map(|row| row[from..from + dims / 2].iter().copied())
                .collect()
        };
        let (cos, sin) = (half(0), half(dims / 2));
        let place = format!("of base {base}{}", if stretched { "" } else { ", local" });
        let cos = self.constant(format!("cosines {place}"), Tensor::from_slice(&[time, dims / 2], &cos));
        let sin = self.constant(format!("sines {place}"), Tensor::from_slice(&[time, dims / 2], &sin));
        let places: Vec<i64> = (0..self.rows()).map(|row| (row % time) as i64).collect();
        let places =
            self.constant(format!("places {place}"), Tensor::from_slice(&[self.batch, time], &places));
        self.rotations.push((key, [cos, sin, places]));
        Ok([cos, sin, places])
    }

    fn activated(&mut self, name: String, x: ValueId) -> ValueId {
        let op = Op::Unary(self.family.activation);
        self.node(name, op, &[x])
    }

    /// `down · (activation(gate·x) ∘ up·x)`, or without a gate `down · activation(up·x)`.
    fn feed_forward(&mut self, name: &str, x: ValueId, suffix: &str) -> Result<ValueId> {
        let d = self.p.width;
        let part = |which: &str| format!("{name}_{which}{suffix}");
        let (inner, hidden) = if self.has(&format!("{}.weight", part("gate"))) {
            let (gate, n) = self.linear(&part("gate"), x, d, 0)?;
            let (up, _) = self.linear(&part("up"), x, d, n)?;
            (self.gated(&format!("{name}{suffix}"), gate, up), n)
        } else {
            let (up, n) = self.linear(&part("up"), x, d, 0)?;
            let down = self.checked(&format!("{}.weight", part("down")), &[0, d])?;
            let hidden = down.row_len() as usize;
            if n == 2 * hidden {
                let gate = self.columns(part("gate"), up, 0, hidden);
                let up = self.columns(part("up half"), up, hidden, n);
                (self.gated(&format!("{name}{suffix}"), gate, up), hidden)
            } else {
                (self.activated(format!("{name} activation{suffix}"), up), n)
            }
        };
        Ok(self.linear(&part("down"), inner, hidden, d)?.0)
    }

    fn gated(&mut self, name: &str, gate: ValueId, up: ValueId) -> ValueId {
        let gate = self.activated(format!("{name} activation"), gate);
        self.binary(format!("{name} gated"), BinaryOp::Mul, gate, up)
    }

    fn mean(&mut self, name: String, x: ValueId, axis: i64) -> ValueId {
        let axes = self.constant(format!("{name} axes"), Tensor::from_slice(&[1], &[axis]));
        let op = Op::Reduce { op: ReduceOp::Mean, keep_dims: false, noop_with_empty_axes: false };
        self.node(name, op, &[x, axes])
    }

    /// All experts of a layer for all tokens, of which those count that the router chose.
    fn experts(&mut self, layer: usize, x: ValueId, routed: ValueId) -> Result<ValueId> {
        let d = self.p.width;
        let e = self.p.experts.clone().expect("only called for models with experts");
        let name = |part: &str| format!("blk.{layer}.{part}");
        if !self.is_trained(&name("ffn_gate_exps.weight")) && self.model.drawn.is_empty() {
            return Err(Error::unsupported(
                &self.p.architecture,
                "passing through experts that are not trained themselves (train all of it: --method full)",
            ));
        }
        if e.scoring != RouteScoring::Softmax || self.has(&name("exp_probs_b.bias")) {
            return Err(Error::unsupported(&self.p.architecture, "training of this kind of router"));
        }
        let (scores, _) = self.linear(&name("ffn_gate_inp"), routed, d, e.count)?;
        let shares = self.node(name("router shares"), Op::Softmax { axis: -1, log: false }, &[scores]);
        let k = self.constant(name("experts used"), Tensor::from_slice(&[1], &[e.used as i64]));
        let op = Op::TopK { axis: -1, largest: true, sorted: true };
        let best = self.graph.add_node(name("best"), op, &[shares, k], 2)[0];
        let least = self.columns(name("least of the best"), best, e.used - 1, e.used);
        let chosen = self.binary(name("chosen"), BinaryOp::GreaterOrEqual, shares, least);
        let chosen =
            self.node(name("chosen as numbers"), Op::Cast { to: DType::F32, saturate: true }, &[chosen]);
        let mut weights = self.binary(name("chosen shares"), BinaryOp::Mul, shares, chosen);
        if e.normalise {
            let axes = self.constant(name("shares axes"), Tensor::from_slice(&[1], &[1i64]));
            let op = Op::Reduce { op: ReduceOp::Sum, keep_dims: true, noop_with_empty_axes: false };
            let sum = self.node(name("sum of shares"), op, &[weights, axes]);
            weights = self.binary(name("expert weights"), BinaryOp::Div, weights, sum);
        }
        weights = self.scaled(&name("scaled expert weights"), weights, e.scale);
        self.router_losses(layer, scores, shares, chosen, e.count, e.used);
        let gate = self.checked(&name("ffn_gate_exps.weight"), &[d, 0, e.count])?;
        let hidden = gate.dims.get(1).map_or(1, |&h| h as usize);
        let up = self.checked(&name("ffn_up_exps.weight"), &[d, hidden, e.count])?;
        let down = self.checked(&name("ffn_down_exps.weight"), &[hidden, d, e.count])?;
        let mut sum: Option<ValueId> = None;
        for i in 0..e.count {
            let part = |what: &str| format!("blk.{layer}.expert {i} {what}");
            let (g, u) =
                (self.floats(&gate, Some(i), &[hidden, d])?, self.floats(&up, Some(i), &[hidden, d])?);
            let w = self.floats(&down, Some(i), &[d, hidden])?;
            let (g, u) = (self.product(part("gate"), x, g), self.product(part("up"), x, u));
            let inner = self.gated(&part("ffn"), g, u);
            let y = self.product(part("down"), inner, w);
            let share = self.columns(part("weight"), weights, i, i + 1);
            let y = self.binary(part("weighed"), BinaryOp::Mul, y, share);
            sum = Some(match sum {
                None => y,
                Some(sum) => self.binary(part("added"), BinaryOp::Add, sum, y),
            });
        }
        let mut y = sum.ok_or_else(|| Error::invalid(name("ffn_gate_exps.weight"), "no experts", "some"))?;
        if self.has(&name("ffn_up_shexp.weight")) {
            let mut shared = self.feed_forward(&name("ffn"), x, "_shexp")?;
            if self.has(&name("ffn_gate_inp_shexp.weight")) {
                let (gate, _) = self.linear(&name("ffn_gate_inp_shexp"), x, d, 1)?;
                let gate = self.node(name("shared gate"), Op::Unary(UnaryOp::Sigmoid), &[gate]);
                shared = self.binary(name("shared expert"), BinaryOp::Mul, shared, gate);
            }
            y = self.binary(name("with shared expert"), BinaryOp::Add, y, shared);
        }
        Ok(y)
    }

    /// Evenness of the experts' use, `N · Σ fᵢ·Pᵢ` (Fedus et al., "Switch Transformers", 2021, equation 4, with the
    /// frequency divided by the experts of a token), and `mean (ln Σ exp scores)²` (Zoph et al., "ST-MoE", 2022,
    /// equation 5).
    fn router_losses(
        &mut self,
        layer: usize,
        scores: ValueId,
        shares: ValueId,
        chosen: ValueId,
        count: usize,
        used: usize,
    ) {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let [balance, z] = self.model.router;
        if balance > 0.0 {
            let frequency = self.mean(name("frequency of experts"), chosen, 0);
            let probability = self.mean(name("probability of experts"), shares, 0);
            let both = self.binary(name("evenness of experts"), BinaryOp::Mul, frequency, probability);
            let mean = self.mean(name("mean evenness"), both, 0);
            // The mean over N experts, times N².
            let factor = balance * (count * count) as f32 / used as f32;
            let loss = self.scaled(&name("balance loss"), mean, factor);
            self.auxiliary.push(loss);
        }
        if z > 0.0 {
            let axes = self.constant(name("logsumexp axes"), Tensor::from_slice(&[1], &[1i64]));
            let op = Op::Reduce { op: ReduceOp::LogSumExp, keep_dims: false, noop_with_empty_axes: false };
            let size = self.node(name("size of scores"), op, &[scores, axes]);
            let square = self.binary(name("square of sizes"), BinaryOp::Mul, size, size);
            let mean = self.mean(name("mean square"), square, 0);
            let loss = self.scaled(&name("z loss"), mean, z);
            self.auxiliary.push(loss);
        }
    }
}
