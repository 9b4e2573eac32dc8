//! From the tensors and metadata of a file to the graph of a decoder.
//!
//! One builder serves all families: what differs between them shows in the metadata ([`HyperParameters`]), in which
//! tensors a file has, or in a small table of conventions (`family`).

mod family;
mod hyper_parameters;
mod layers;

use lightering_formats::gguf::{GgufFile, GgufTensor};
use lightering_graph::{
    BinaryOp, CacheFormat, DType, Dim, Graph, LmOp, Op, SourceId, StoredTensor, Tensor, TensorType, UnaryOp,
    ValueId,
};
use lightering_units::BlockFormat;

use crate::{Error, Result};
pub(crate) use family::{Family, Norm, Positions};
pub use hyper_parameters::{CompressedParameters, ExpertParameters, HyperParameters};

/// Names of the inputs and outputs of a decoder's graph.
pub mod ports {
    /// i32 `[tokens]`.
    pub const TOKENS: &str = "tokens";
    /// i32 `[tokens]`: place of each token in its sequence.
    pub const POSITIONS: &str = "positions";
    /// i32 `[tokens, pages]`: cache pages of each token's sequence.
    pub const PAGES: &str = "pages";
    /// i32 `[tokens, pages]`: the same for layers with a window, where those have pages of their own.
    pub const WINDOW_PAGES: &str = "window pages";
    /// i64 `[wanted]`: the rows whose results are wanted.
    pub const WANTED: &str = "wanted";
    /// f32 `[wanted, vocabulary]`.
    pub const LOGITS: &str = "logits";
    /// f32 `[tokens, width]`: the normalised last hidden state.
    pub const HIDDEN: &str = "hidden";
}

/// The cache of keys and values that a decoder is built with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheOptions {
    /// Of the cached elements.
    pub format: CacheFormat,
    /// Positions of a page.
    pub page_len: usize,
    /// Pages in all.
    pub pages: usize,
    /// Pages of layers that see only a window; 0 has them use the pages of the others.
    pub window_pages: usize,
    /// Most positions of one sequence.
    pub context: usize,
}

/// Builds the graph of the decoder in `file`, whose bytes are source 0.
///
/// # Errors
/// Tensors that are missing or have other shapes than the metadata says, and features that are not supported.
pub fn build(file: &GgufFile, cache: &CacheOptions) -> Result<(Graph, HyperParameters)> {
    let parameters = HyperParameters::of(file)?;
    let family = Family::named(&parameters.architecture)?;
    let mut graph = Graph::new(parameters.architecture.clone());
    graph.sources.push("model".to_owned());
    let symbol = |name: &str| Dim::Symbol(name.into());
    let rows = |dtype, shape: Vec<Dim>| TensorType { dtype, shape: Some(shape) };
    let tokens = graph.add_input(ports::TOKENS, rows(DType::I32, vec![symbol("tokens")]));
    let positions = graph.add_input(ports::POSITIONS, rows(DType::I32, vec![symbol("tokens")]));
    let pages_of_row = cache.context.div_ceil(cache.page_len);
    let table = || rows(DType::I32, vec![symbol("tokens"), Dim::Fixed(pages_of_row)]);
    let apart = cache.window_pages > 0 && parameters.cached_window().is_some();
    // Where all layers have a window, nothing reads the pages of the others.
    let (pages, window_pages) = if !apart {
        let pages = graph.add_input(ports::PAGES, table());
        (pages, pages)
    } else if (0..parameters.layers).all(|layer| parameters.has_window(layer)) {
        let pages = graph.add_input(ports::WINDOW_PAGES, table());
        (pages, pages)
    } else {
        (graph.add_input(ports::PAGES, table()), graph.add_input(ports::WINDOW_PAGES, table()))
    };
    let wanted = graph.add_input(ports::WANTED, rows(DType::I64, vec![symbol("wanted")]));
    let mut b = Builder {
        file,
        p: &parameters,
        family,
        cache,
        graph,
        positions,
        pages,
        window_pages,
        apart,
        angles: Vec::new(),
    };
    let logits = b.decoder(tokens, wanted)?;
    let graph = b.graph;
    let _ = logits;
    Ok((graph, parameters))
}

struct Builder<'a> {
    file: &'a GgufFile,
    p: &'a HyperParameters,
    family: &'static Family,
    cache: &'a CacheOptions,
    graph: Graph,
    positions: ValueId,
    pages: ValueId,
    /// For layers with a window; the same as `pages` where those have none of their own.
    window_pages: ValueId,
    /// Layers with a window have pages of their own.
    apart: bool,
    /// Rotation angles that were made already, by base and whether they are stretched.
    angles: Vec<((u32, bool), ValueId)>,
}

/// A weight in blocks.
#[derive(Clone, Copy)]
struct Matrix {
    value: ValueId,
    format: BlockFormat,
    /// Rows: outputs.
    n: usize,
}

impl Builder<'_> {
    fn has(&self, name: &str) -> bool {
        self.file.tensor(name).is_some()
    }

    fn tensor(&self, name: &str) -> Result<&GgufTensor> {
        self.file.tensor(name).ok_or_else(|| {
            Error::invalid(
                name,
                "no such tensor in the file",
                format!("a tensor of the {} architecture", self.p.architecture),
            )
        })
    }

    /// A tensor with the dimensions that it must have, the elements of a row first; 0 admits any.
    fn checked(&self, name: &str, dims: &[usize]) -> Result<&GgufTensor> {
        let tensor = self.tensor(name)?;
        let mut found: Vec<usize> = tensor.dims.iter().map(|&d| d as usize).collect();
        while found.len() > dims.len() && found.last() == Some(&1) {
            found.pop();
        }
        // Dimensions of 1 at the end may be left out.
        found.resize(found.len().max(dims.len()), 1);
        let fits = found.len() == dims.len() && found.iter().zip(dims).all(|(f, d)| *d == 0 || f == d);
        if !fits {
            return Err(Error::invalid(name, format!("shape {found:?}"), format!("shape {dims:?}")));
        }
        Ok(tensor)
    }

    /// Rows `first..first+n` of a matrix of `total` rows of `k` elements.
    fn matrix_part(&mut self, name: &str, k: usize, total: usize, first: usize, n: usize) -> Result<Matrix> {
        let t = self.checked(name, &[k, total])?.clone();
        let row = t.format.row_bytes(k).ok_or_else(|| {
            Error::invalid(name, format!("rows of {k} elements"), format!("whole blocks of {}", t.format))
        })?;
        let total = usize::try_from(t.rows()).unwrap_or(0);
        let n = if n == 0 { total } else { n };
        let stored = StoredTensor {
            source: SourceId(0),
            offset: t.offset + (first * row) as u64,
            size: lightering_units::Bytes((n * row) as u64),
        };
        let whole = n == total;
        let label = if whole { name.to_owned() } else { format!("{name} rows {first}..{}", first + n) };
        if let Some(value) = self.graph.find(&label) {
            return Ok(Matrix { value, format: t.format, n });
        }
        let value = self.graph.add_stored(label, TensorType::fixed(DType::U8, &[n, row]), stored);
        Ok(Matrix { value, format: t.format, n })
    }

    /// A matrix of `n` rows of `k` elements; 0 admits any number of rows.
    fn matrix(&mut self, name: &str, k: usize, n: usize) -> Result<Matrix> {
        self.matrix_part(name, k, n, 0, 0)
    }

    /// The matrices of all experts of a layer: `count` of `n` rows of `k` elements.
    fn expert_matrices(&mut self, name: &str, k: usize, n: usize, count: usize) -> Result<Matrix> {
        let t = self.checked(name, &[k, n, count])?.clone();
        let row = t.format.row_bytes(k).ok_or_else(|| {
            Error::invalid(name, format!("rows of {k} elements"), format!("whole blocks of {}", t.format))
        })?;
        let n = t.dims.get(1).map_or(1, |&d| d as usize);
        let stored = StoredTensor { source: SourceId(0), offset: t.offset, size: t.size };
        let ty = TensorType::fixed(DType::U8, &[count, n, row]);
        Ok(Matrix { value: self.graph.add_stored(name, ty, stored), format: t.format, n })
    }

    /// The matrices of all heads of a layer, one below the other: `heads` of `n` rows of `k` elements.
    fn head_matrices(&mut self, name: &str, k: usize, n: usize, heads: usize) -> Result<Matrix> {
        let t = self.checked(name, &[k, n, heads])?.clone();
        let row = t.format.row_bytes(k).ok_or_else(|| {
            Error::invalid(name, format!("rows of {k} elements"), format!("whole blocks of {}", t.format))
        })?;
        let stored = StoredTensor { source: SourceId(0), offset: t.offset, size: t.size };
        let ty = TensorType::fixed(DType::U8, &[heads * n, row]);
        Ok(Matrix { value: self.graph.add_stored(name, ty, stored), format: t.format, n: heads * n })
    }

    /// A vector of f32 values.
    fn vector(&mut self, name: &str, n: usize) -> Result<ValueId> {
        self.vector_part(name, n, 0, n)
    }

    fn vector_part(&mut self, name: &str, total: usize, first: usize, n: usize) -> Result<ValueId> {
        let t = self.checked(name, &[total])?;
        if t.format != BlockFormat::F32 {
            return Err(Error::invalid(name, format!("elements of type {}", t.format), "F32"));
        }
        let size = lightering_units::Bytes(n as u64 * 4);
        let stored = StoredTensor { source: SourceId(0), offset: t.offset + first as u64 * 4, size };
        let label = if n == total { name.to_owned() } else { format!("{name} {first}..{}", first + n) };
        Ok(self.graph.add_stored(label, TensorType::fixed(DType::F32, &[n]), stored))
    }

    fn optional_vector(&mut self, name: &str, n: usize) -> Result<Option<ValueId>> {
        if self.has(name) { self.vector(name, n).map(Some) } else { Ok(None) }
    }

    fn node(&mut self, name: impl Into<String>, op: Op, inputs: &[ValueId]) -> ValueId {
        self.graph.add_node(name, op, inputs, 1)[0]
    }

    fn lm(&mut self, name: impl Into<String>, op: LmOp, inputs: &[ValueId]) -> ValueId {
        self.node(name, Op::Lm(Box::new(op)), inputs)
    }

    fn product(&mut self, name: &str, x: ValueId, w: Matrix, bias: Option<ValueId>) -> ValueId {
        let inputs: Vec<ValueId> = [x, w.value].into_iter().chain(bias).collect();
        self.lm(name, LmOp::BlockMatMul { format: w.format }, &inputs)
    }

    /// `w·x`, with the bias if the file has one.
    fn linear(&mut self, name: &str, x: ValueId, k: usize, n: usize) -> Result<ValueId> {
        let w = self.matrix(&format!("{name}.weight"), k, n)?;
        let bias = self.optional_vector(&format!("{name}.bias"), w.n)?;
        Ok(self.product(name, x, w, bias))
    }

    fn add(&mut self, name: impl Into<String>, a: ValueId, b: ValueId) -> ValueId {
        self.node(name, Op::Binary(BinaryOp::Add), &[a, b])
    }

    fn scaled(&mut self, name: &str, x: ValueId, factor: f32) -> ValueId {
        if factor == 1.0 {
            return x;
        }
        let factor = self.graph.add_constant(format!("{name} factor"), Tensor::scalar(factor));
        self.node(name, Op::Binary(BinaryOp::Mul), &[x, factor])
    }

    fn unary(&mut self, name: impl Into<String>, op: UnaryOp, x: ValueId) -> ValueId {
        self.node(name, Op::Unary(op), &[x])
    }

    /// The family's normalisation with the weights `name.weight` and, where there is one, `name.bias`.
    fn norm(&mut self, name: &str, x: ValueId, n: usize) -> Result<ValueId> {
        let gain = self.vector(&format!("{name}.weight"), n)?;
        let epsilon = self.p.epsilon;
        Ok(match self.family.norm {
            Norm::Rms => self.node(name, Op::RmsNorm { axis: -1, epsilon }, &[x, gain]),
            Norm::Layer => {
                let bias = self.optional_vector(&format!("{name}.bias"), n)?;
                let inputs: Vec<ValueId> = [x, gain].into_iter().chain(bias).collect();
                self.node(name, Op::LayerNorm { axis: -1, epsilon }, &inputs)
            }
        })
    }

    fn reshaped(&mut self, name: String, x: ValueId, columns: usize) -> ValueId {
        let shape = Tensor::from_slice(&[2], &[-1i64, columns as i64]);
        let shape = self.graph.add_constant(format!("{name} shape"), shape);
        self.node(name, Op::Reshape { allow_zero: false }, &[x, shape])
    }

    fn softcapped(&mut self, name: &str, x: ValueId, cap: f32) -> ValueId {
        let small = self.scaled(&format!("{name} divided"), x, 1.0 / cap);
        let capped = self.unary(format!("{name} tanh"), UnaryOp::Tanh, small);
        self.scaled(&format!("{name} capped"), capped, cap)
    }

    fn decoder(&mut self, tokens: ValueId, wanted: ValueId) -> Result<ValueId> {
        let d = self.p.width;
        let table = self.matrix("token_embd.weight", d, self.p.vocabulary)?;
        let gather = LmOp::BlockGather { format: table.format };
        let mut x = self.lm("embeddings", gather, &[table.value, tokens]);
        x = self.scaled("scaled embeddings", x, self.p.embedding_scale);
        if self.family.positions == Positions::Learned {
            let table = self.matrix("position_embd.weight", d, 0)?;
            if table.n < self.cache.context {
                return Err(Error::limit(
                    "position_embd.weight",
                    "the number of positions asked for",
                    self.cache.context as u64,
                    table.n as u64,
                ));
            }
            let gather = LmOp::BlockGather { format: table.format };
            let places = self.lm("position embeddings", gather, &[table.value, self.positions]);
            x = self.add("placed embeddings", x, places);
        }
        if self.has("token_embd_norm.weight") {
            x = self.norm("token_embd_norm", x, d)?;
        }
        for layer in 0..self.p.layers {
            x = self.layer(layer, x)?;
        }
        // Embeddings need this of every row, which is cheap; logits are not.
        let hidden = self.norm("output_norm", x, d)?;
        let rows = self.node("wanted rows", Op::Gather { axis: 0 }, &[hidden, wanted]);
        let name = if self.has("output.weight") { "output.weight" } else { "token_embd.weight" };
        let head = self.matrix(name, d, self.p.vocabulary)?;
        let bias = self.optional_vector("output.bias", self.p.vocabulary)?;
        let mut logits = self.product("output", rows, head, bias);
        logits = self.scaled("divided logits", logits, 1.0 / self.p.logit_divisor);
        if let Some(cap) = self.p.logit_softcap {
            logits = self.softcapped("logits", logits, cap);
        }
        for (value, name) in [(logits, ports::LOGITS), (hidden, ports::HIDDEN)] {
            self.graph.value_mut(value).name = name.to_owned();
            self.graph.outputs.push(value);
        }
        Ok(logits)
    }
}
