//! What the metadata does not say: how the layers of each model family are put together.

use lightering_graph::{RouteScoring, UnaryOp};

use crate::{Error, Result};

/// Normalisation of the hidden state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Norm {
    /// Root mean square, with a gain.
    Rms,
    /// Mean and variance, with gain and bias.
    Layer,
}

/// How positions enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Positions {
    /// Rotary; pairs are halves of a head.
    RopeHalves,
    /// Rotary; pairs are neighbours.
    RopeNeighbours,
    /// A table that is added to the embeddings.
    Learned,
}

/// The conventions of an architecture. Whatever shows in the tensors that a file has (biases, norms of queries and
/// keys, fused projections, gates, norms after a half layer, shared experts) is taken from there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Family {
    pub names: &'static [&'static str],
    pub norm: Norm,
    pub positions: Positions,
    /// Of the feed-forward network.
    pub activation: UnaryOp,
    /// Embeddings are multiplied by the root of their width.
    pub scales_embeddings: bool,
    /// Every so many layers one sees everything; the others have a window. 0: all have it.
    pub window_period: usize,
    /// That layer is the first of the period rather than the last.
    pub window_last: bool,
    /// Positions of the window where the metadata names none; 0: there is none.
    pub window: usize,
    /// Whether layers without a window have no positions (NoPE), in models where others have one.
    pub rope_only_in_windows: bool,
    /// The router reads the hidden state before the attention.
    pub early_router: bool,
    pub rope_base_local: Option<f32>,
    pub scoring: RouteScoring,
    pub normalise_experts: bool,
}

const SILU: UnaryOp = UnaryOp::Swish { alpha: 1.0 };
const GELU: UnaryOp = UnaryOp::Gelu { tanh: true };

const LLAMA: Family = Family {
    names: &["llama", "mistral", "granite", "granitemoe", "smollm3"],
    norm: Norm::Rms,
    positions: Positions::RopeNeighbours,
    activation: SILU,
    scales_embeddings: false,
    window_period: 0,
    window_last: false,
    window: 0,
    rope_only_in_windows: false,
    early_router: false,
    rope_base_local: None,
    scoring: RouteScoring::Softmax,
    normalise_experts: true,
};

const FAMILIES: [Family; 10] = [
    LLAMA,
    Family { names: &["qwen2", "qwen3", "qwen3moe", "phi3"], positions: Positions::RopeHalves, ..LLAMA },
    Family { names: &["phimoe"], norm: Norm::Layer, positions: Positions::RopeHalves, ..LLAMA },
    Family {
        names: &["qwen2moe", "olmoe"],
        positions: Positions::RopeHalves,
        normalise_experts: false,
        ..LLAMA
    },
    Family { names: &["deepseek2"], normalise_experts: false, ..LLAMA },
    Family {
        names: &["gemma"],
        positions: Positions::RopeHalves,
        activation: GELU,
        scales_embeddings: true,
        ..LLAMA
    },
    Family {
        names: &["gemma2"],
        positions: Positions::RopeHalves,
        activation: GELU,
        scales_embeddings: true,
        window_period: 2,
        window: 4096,
        ..LLAMA
    },
    Family {
        names: &["gemma3"],
        positions: Positions::RopeHalves,
        activation: GELU,
        scales_embeddings: true,
        window_period: 6,
        rope_base_local: Some(10_000.0),
        ..LLAMA
    },
    Family { names: &["gpt2"], norm: Norm::Layer, positions: Positions::Learned, activation: GELU, ..LLAMA },
    Family {
        names: &["smallthinker"],
        positions: Positions::RopeHalves,
        activation: UnaryOp::Relu,
        window_period: 4,
        window_last: true,
        rope_only_in_windows: true,
        early_router: true,
        scoring: RouteScoring::Sigmoid,
        normalise_experts: true,
        ..LLAMA
    },
];

impl Family {
    /// The conventions of the architecture with this name.
    pub fn named(architecture: &str) -> Result<&'static Family> {
        FAMILIES.iter().find(|f| f.names.contains(&architecture)).ok_or_else(|| {
            let known: Vec<&str> = FAMILIES.iter().flat_map(|f| f.names.iter().copied()).collect();
            Error::unsupported(
                "general.architecture",
                format!("{architecture:?} (known are {})", known.join(", ")),
            )
        })
    }

    /// Factor of attention scores where the metadata gives none.
    pub fn attention_scale(&self, width: usize, heads: usize, key_len: usize, layers: usize) -> f32 {
        // The largest Gemma 2 and 3 (27B) scale by the share of a head in the width instead of by its length.
        let by_share = match self.names[0] {
            "gemma2" => layers == 46,
            "gemma3" => layers == 62,
            _ => false,
        };
        1.0 / (if by_share { width / heads } else { key_len } as f32).sqrt()
    }
}
