//! Models with the shape of known ones and random weights: for measuring what depends on shapes, and for tests.
//!
//! Nothing that depends on what a model has learned can be told from them: neither text nor the routing of experts is
//! that of the model whose shape they have.

mod preset;
mod weights;

use std::io::Write;

use lightering_formats::gguf::{Array, GgufWriter, Value};
use lightering_kernels::{can_quantize, llama3_rope_factors};
use lightering_units::{BlockFormat, Bytes};

use crate::tokenizer::byte_alphabet;
use crate::{Error, Result};
use preset::{HeadNorm, PRESETS, Preset, Rope};
use weights::{Balance, Pools, Random};

/// Most layers that can be asked for.
const LAYERS_MAX: usize = 4096;
/// Tokens that every vocabulary has: the bytes, two that begin and end, and one that is merged.
const VOCABULARY_MIN: usize = 259;

/// What a synthetic model is to be like.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct SyntheticOptions {
    /// The model whose shape it has; see [`synthetic_names`].
    pub like: String,
    /// The same structure at the size of a toy.
    pub tiny: bool,
    /// Layers, instead of the model's own.
    pub layers: Option<usize>,
    /// As many of the model's layers as fit into a file of this size.
    pub size_max: Option<Bytes>,
    /// Tokens of the vocabulary, instead of the model's own.
    pub vocabulary: Option<usize>,
    /// Of matrices; those whose rows are no whole number of its blocks are Q8_0 or F16.
    pub format: BlockFormat,
    /// Where the random numbers begin.
    pub seed: u64,
}

impl SyntheticOptions {
    /// The shape of a model, in Q4_K.
    pub fn like(name: impl Into<String>) -> SyntheticOptions {
        SyntheticOptions {
            like: name.into(),
            tiny: false,
            layers: None,
            size_max: None,
            vocabulary: None,
            format: BlockFormat::Q4_K,
            seed: 0,
        }
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq)]
pub struct SyntheticModel {
    /// As in `general.architecture`.
    pub architecture: String,
    /// Layers that it has, and those of the model whose shape it has.
    pub layers: [usize; 2],
    /// Weights in all.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub size: Bytes,
}

/// The models whose shapes are known.
pub fn synthetic_names() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|p| p.name)
}

/// Writes a GGUF file with random weights and a tokenizer of single bytes; holds a few MiB.
///
/// # Errors
/// A model that is not known, a size that not even one layer fits into, a format that cannot be written, and whatever
/// `out` reports.
pub fn write_synthetic(options: &SyntheticOptions, out: impl Write) -> Result<SyntheticModel> {
    let known = PRESETS.iter().find(|p| p.name == options.like).ok_or_else(|| {
        let names: Vec<&str> = synthetic_names().collect();
        Error::invalid("model to be like", format!("{:?}", options.like), names.join(", "))
    })?;
    if !can_quantize(options.format) {
        return Err(Error::unsupported("format of weights", format!("writing {}", options.format)));
    }
    let mut preset = if options.tiny { known.clone().tiny() } else { known.clone() };
    let layers_of_model = preset.layers;
    if let Some(vocabulary) = options.vocabulary {
        preset.vocabulary = vocabulary;
    }
    if !(VOCABULARY_MIN..=crate::MAX_TOKENS).contains(&preset.vocabulary) {
        let expected = format!("from {VOCABULARY_MIN} to {}", crate::MAX_TOKENS);
        return Err(Error::invalid("vocabulary", preset.vocabulary, expected));
    }
    if let Some(layers) = options.layers {
        if layers == 0 || layers > LAYERS_MAX {
            return Err(Error::invalid("layers", layers, format!("from 1 to {LAYERS_MAX}")));
        }
        preset.layers = layers;
    }
    if let Some(most) = options.size_max {
        preset.layers = layers_within(&preset, options.format, most)?;
    }
    let tensors = tensors(&preset, options.format);
    let mut writer = GgufWriter::new();
    for (key, value) in metadata(&preset) {
        writer.set(&key, value)?;
    }
    let mut parameters = 0;
    let mut size = 0;
    for t in &tensors {
        let dims: Vec<u64> = t.dims.iter().map(|&d| d as u64).collect();
        writer.tensor(&t.name, &dims, t.format)?;
        parameters += dims.iter().product::<u64>();
        size += t.bytes();
    }
    let mut data = writer.begin(out)?;
    let mut pools = Pools::default();
    for (index, t) in tensors.iter().enumerate() {
        let mut random = Random::new(options.seed, index as u64 + 1);
        match &t.fill {
            Fill::Values(values) => {
                data.write(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())?;
            }
            Fill::Around { mean, deviation, balance } => {
                let mut last = 0.0;
                for i in 0..t.dims[0] {
                    let noise = random.normal() * deviation;
                    last = if *balance == Balance::Rows && i % 2 == 1 { -last } else { noise };
                    data.write(&(mean + last).to_le_bytes())?;
                }
            }
            Fill::Matrix { deviation, balance } => {
                let shape = [t.dims[0], t.dims[1..].iter().product()];
                let mut give = |piece: &[u8]| data.write(piece);
                pools.rows(t.format, *deviation, *balance, shape, &mut random, &mut give)?;
            }
        }
    }
    data.finish()?;
    Ok(SyntheticModel {
        architecture: preset.architecture.to_owned(),
        layers: [preset.layers, layers_of_model],
        parameters,
        size: Bytes(size),
    })
}

fn layers_within(preset: &Preset, format: BlockFormat, most: Bytes) -> Result<usize> {
    let size = |layers: usize| {
        let preset = Preset { layers, ..preset.clone() };
        let names: u64 = 24 * preset.vocabulary as u64;
        names + tensors(&preset, format).iter().map(Planned::bytes).sum::<u64>()
    };
    let least = size(1);
    if least > most.0 {
        return Err(Error::invalid("size of the file", most, format!("at least {}", Bytes(least))));
    }
    Ok((1..=preset.layers).take_while(|&layers| size(layers) <= most.0).last().unwrap_or(1))
}

/// A tensor of the file.
struct Planned {
    name: String,
    /// The elements of a row first.
    dims: Vec<usize>,
    format: BlockFormat,
    fill: Fill,
}

enum Fill {
    Values(Vec<f32>),
    /// A vector.
    Around {
        mean: f32,
        deviation: f32,
        balance: Balance,
    },
    Matrix {
        deviation: f32,
        balance: Balance,
    },
}

impl Planned {
    fn bytes(&self) -> u64 {
        let rows: u64 = self.dims[1..].iter().map(|&d| d as u64).product();
        self.format.row_bytes(self.dims[0]).unwrap_or(0) as u64 * rows
    }
}

/// The tensors of a model, in the order of the file.
struct List<'a> {
    preset: &'a Preset,
    format: BlockFormat,
    tensors: Vec<Planned>,
    /// Deviation of what a half layer adds, relative to the deviation of what comes out of its last matrix.
    branch: f32,
}

impl List<'_> {
    fn push(&mut self, name: String, dims: &[usize], format: BlockFormat, fill: Fill) {
        self.tensors.push(Planned { name: format!("{name}.weight"), dims: dims.to_vec(), format, fill });
    }

    /// `n` rows of `k` elements, and so for each of `count`. What they make of normalised rows has deviation `gain`.
    fn matrix(&mut self, name: String, [k, n, count]: [usize; 3], gain: f32, balance: Balance) {
        let format = [self.format, BlockFormat::Q8_0, BlockFormat::F16]
            .into_iter()
            .find(|f| f.row_bytes(k).is_some())
            .unwrap_or(BlockFormat::F32);
        let dims = if count == 1 { vec![k, n] } else { vec![k, n, count] };
        let deviation = gain / (k as f32).sqrt();
        self.push(name, &dims, format, Fill::Matrix { deviation, balance });
    }

    fn vector(&mut self, name: String, n: usize, mean: f32) {
        let fill = Fill::Around { mean, deviation: 0.1 * mean, balance: Balance::None };
        self.push(name, &[n], BlockFormat::F32, fill);
    }

    fn bias(&mut self, name: String, n: usize, balance: Balance) {
        let fill = Fill::Around { mean: 0.0, deviation: 0.2, balance };
        let tensor = Planned { name: format!("{name}.bias"), dims: vec![n], format: BlockFormat::F32, fill };
        self.tensors.push(tensor);
    }

    /// A norm of the hidden state.
    fn norm(&mut self, name: String) {
        let d = self.preset.width;
        self.vector(name.clone(), d, 1.0);
        if self.preset.biases {
            self.bias(name, d, Balance::None);
        }
    }

    /// What is added to the hidden state. For models that subtract the mean of it, it has none, so that those who leave
    /// out that step compute the same.
    fn balance(&self) -> Balance {
        if self.preset.architecture == "phimoe" { Balance::Rows } else { Balance::None }
    }

    fn attention(&mut self, layer: usize) {
        let p = self.preset;
        let name = |part: &str| format!("blk.{layer}.{part}");
        let none = Balance::None;
        let d = p.width;
        let (q, kv) = (p.heads * p.head_len, p.kv_heads * p.head_len);
        let mut value_len = p.head_len;
        // Scores of deviation 2, so that attention prefers some positions to others.
        let score = 1.5;
        if let Some(c) = p.compressed {
            value_len = c.value_len;
            self.matrix(name("attn_q"), [d, q, 1], score, none);
            self.matrix(name("attn_kv_a_mqa"), [d, c.rank + c.turned, 1], score, none);
            self.vector(name("attn_kv_a_norm"), c.rank, 1.0);
            if c.absorbed {
                // Columns rather than rows of it make an element of a key.
                let gain = (c.plain as f32 / c.rank as f32).sqrt();
                self.matrix(name("attn_k_b"), [c.plain, c.rank, p.heads], gain, none);
                self.matrix(name("attn_v_b"), [c.rank, c.value_len, p.heads], 1.0, none);
            } else {
                self.matrix(name("attn_kv_b"), [c.rank, p.heads * (c.plain + c.value_len), 1], 1.0, none);
            }
        } else if p.fused_qkv {
            self.matrix(name("attn_qkv"), [d, q + 2 * kv, 1], score, none);
            if p.qkv_bias {
                self.bias(name("attn_qkv"), q + 2 * kv, none);
            }
        } else {
            for (part, n, gain) in [("attn_q", q, score), ("attn_k", kv, score), ("attn_v", kv, 1.0)] {
                self.matrix(name(part), [d, n, 1], gain, none);
                if p.qkv_bias {
                    self.bias(name(part), n, none);
                }
            }
        }
        let lens = match p.head_norm {
            HeadNorm::None => None,
            HeadNorm::Each => Some([p.head_len; 2]),
            HeadNorm::Together => Some([q, kv]),
        };
        for (part, len) in ["attn_q_norm", "attn_k_norm"].into_iter().zip(lens.into_iter().flatten()) {
            self.vector(name(part), len, score);
        }
        let balance = self.balance();
        self.matrix(name("attn_output"), [p.heads * value_len, d, 1], self.branch, balance);
        if p.biases {
            self.bias(name("attn_output"), d, balance);
        }
    }

    fn feed_forward(&mut self, layer: usize, suffix: &str, hidden: usize) {
        let p = self.preset;
        let name = |part: &str| format!("blk.{layer}.ffn_{part}{suffix}");
        let none = Balance::None;
        if p.fused_gate {
            self.matrix(name("up"), [p.width, 2 * hidden, 1], 1.0, none);
        } else {
            // GPT-2 has no gate.
            if p.rope != Rope::Learned {
                self.matrix(name("gate"), [p.width, hidden, 1], 1.0, none);
            }
            self.matrix(name("up"), [p.width, hidden, 1], 1.0, none);
        }
        let balance = self.balance();
        self.matrix(name("down"), [hidden, p.width, 1], self.branch, balance);
        if p.biases {
            self.bias(name("up"), hidden, none);
            self.bias(name("down"), p.width, balance);
        }
    }

    fn experts(&mut self, layer: usize, e: preset::Experts) {
        let d = self.preset.width;
        let name = |part: &str| format!("blk.{layer}.ffn_{part}");
        let none = Balance::None;
        // Scores of deviation 2: neither always the same experts nor all alike.
        let router = Fill::Matrix { deviation: 2.0 / (d as f32).sqrt(), balance: none };
        self.push(name("gate_inp"), &[d, e.count], BlockFormat::F32, router);
        self.matrix(name("gate_exps"), [d, e.hidden, e.count], 1.0, none);
        self.matrix(name("up_exps"), [d, e.hidden, e.count], 1.0, none);
        let balance = self.balance();
        self.matrix(name("down_exps"), [e.hidden, d, e.count], 2.0 * self.branch, balance);
        if e.shared > 0 {
            if e.shared_gate {
                let fill = Fill::Around { mean: 0.0, deviation: 2.0 / (d as f32).sqrt(), balance: none };
                self.push(name("gate_inp_shexp"), &[d], BlockFormat::F32, fill);
            }
            self.feed_forward(layer, "_shexp", e.shared);
        }
    }
}

fn tensors(preset: &Preset, format: BlockFormat) -> Vec<Planned> {
    let p = preset;
    let d = p.width;
    let gemma = p.architecture.starts_with("gemma");
    let [embedding, residual, _, divisor] = p.scales.unwrap_or([1.0; 4]);
    let embedding = if gemma { (d as f32).sqrt() } else { embedding };
    // Logits of deviation 3 from a normalised hidden state.
    let of_logits = 3.0 * divisor;
    let of_embeddings = if p.tied { of_logits } else { (d as f32).sqrt() };
    // Each half layer adds about as much as there is at the beginning.
    let at_first = of_embeddings / (d as f32).sqrt() * embedding;
    let branch = if p.post_norms { 1.0 } else { at_first.max(0.5) / residual };
    let mut list = List { preset, format, tensors: Vec::new(), branch };
    let rows = if p.architecture == "phimoe" { Balance::Row } else { Balance::None };
    list.matrix("token_embd".to_owned(), [d, p.vocabulary, 1], of_embeddings, rows);
    let factors = |name: &str, values: Vec<f32>| Planned {
        name: format!("{name}.weight"),
        dims: vec![values.len()],
        format: BlockFormat::F32,
        fill: Fill::Values(values),
    };
    match p.rope {
        Rope::Learned => {
            let deviation = 0.5 * at_first;
            let fill = Fill::Matrix { deviation, balance: Balance::None };
            list.push("position_embd".to_owned(), &[d, p.context], BlockFormat::F32, fill);
        }
        Rope::Llama3 { factor, original } => {
            let mut values = vec![0.0; p.head_len / 2];
            llama3_rope_factors(p.head_len, p.rope_base, factor, 1.0, 4.0, original, &mut values);
            list.tensors.push(factors("rope_freqs", values));
        }
        Rope::Long { .. } => {
            let pairs = p.head_len / 2;
            let long = (0..pairs).map(|i| 1.0 + i as f32 * 63.0 / pairs as f32).collect();
            list.tensors.push(factors("rope_factors_long", long));
            let short = (0..pairs).map(|i| 1.0 + i as f32 * 1.5 / pairs as f32).collect();
            list.tensors.push(factors("rope_factors_short", short));
        }
        Rope::Plain | Rope::Yarn { .. } => {}
    }
    for layer in 0..p.layers {
        let name = |part: &str| format!("blk.{layer}.{part}");
        list.norm(name("attn_norm"));
        list.attention(layer);
        if p.post_norms {
            list.vector(name("post_attention_norm"), d, at_first);
        }
        list.norm(name("ffn_norm"));
        match p.experts {
            Some(e) if layer >= e.leading_dense => list.experts(layer, e),
            _ => list.feed_forward(layer, "", p.hidden),
        }
        if p.post_norms {
            list.vector(name("post_ffw_norm"), d, at_first);
        }
    }
    list.norm("output_norm".to_owned());
    if !p.tied {
        list.matrix("output".to_owned(), [d, p.vocabulary, 1], of_logits, Balance::None);
        if p.biases {
            list.bias("output".to_owned(), p.vocabulary, Balance::None);
        }
    }
    list.tensors
}

fn metadata(p: &Preset) -> Vec<(String, Value)> {
    let mut keys: Vec<(String, Value)> = vec![
        ("general.architecture".to_owned(), Value::from(p.architecture)),
        // Programs give some models' vocabularies rules of their own by this name, so it is not the model's.
        ("general.name".to_owned(), Value::from("synthetic")),
        (
            "general.description".to_owned(),
            Value::String(format!("random weights in the shape of {}", p.name)),
        ),
    ];
    let mut set = |name: &str, value: Value| keys.push((format!("{}.{name}", p.architecture), value));
    let number = |n: usize| Value::U32(u32::try_from(n).unwrap_or(u32::MAX));
    let learned = p.rope == Rope::Learned;
    set("block_count", number(p.layers));
    set("context_length", number(p.context));
    set("embedding_length", number(p.width));
    set("feed_forward_length", number(p.hidden));
    set("vocab_size", number(p.vocabulary));
    set("attention.head_count", number(p.heads));
    let absorbed = p.compressed.filter(|c| c.absorbed);
    set("attention.head_count_kv", number(if absorbed.is_some() { 1 } else { p.kv_heads }));
    set(
        if learned { "attention.layer_norm_epsilon" } else { "attention.layer_norm_rms_epsilon" },
        Value::F32(p.epsilon),
    );
    let turned = match p.compressed {
        None => p.head_len,
        Some(c) => c.turned,
    };
    if !learned {
        set("rope.dimension_count", number(turned));
        set("rope.freq_base", Value::F32(p.rope_base));
    }
    match p.compressed {
        None if learned => {}
        None => {
            set("attention.key_length", number(p.head_len));
            set("attention.value_length", number(p.head_len));
        }
        Some(c) => {
            set("attention.kv_lora_rank", number(c.rank));
            // Other programs tell the model without compressed queries by its number of layers, unless they read this.
            set("attention.q_lora_rank", number(0));
            if c.absorbed {
                set("attention.key_length", number(c.rank + c.turned));
                set("attention.value_length", number(c.rank));
                set("attention.key_length_mla", number(c.plain + c.turned));
                set("attention.value_length_mla", number(c.value_len));
            } else {
                set("attention.key_length", number(c.plain + c.turned));
                set("attention.value_length", number(c.value_len));
            }
        }
    }
    match p.rope {
        Rope::Long { original, magnitude } => {
            set("rope.scaling.original_context_length", number(original));
            set("rope.scaling.attn_factor", Value::F32(magnitude));
        }
        Rope::Yarn { factor, original, log_multiplier } => {
            set("rope.scaling.type", Value::from("yarn"));
            set("rope.scaling.factor", Value::F32(factor));
            set("rope.scaling.original_context_length", number(original));
            set("rope.scaling.yarn_log_multiplier", Value::F32(log_multiplier));
        }
        Rope::Plain | Rope::Llama3 { .. } | Rope::Learned => {}
    }
    if p.window > 0 {
        set("attention.sliding_window", number(p.window));
    }
    if let Some([attention, logits]) = p.softcaps {
        set("attn_logit_softcapping", Value::F32(attention));
        set("final_logit_softcapping", Value::F32(logits));
    }
    if let Some([embedding, residual, attention, logits]) = p.scales {
        set("embedding_scale", Value::F32(embedding));
        set("residual_scale", Value::F32(residual));
        set("attention.scale", Value::F32(attention));
        set("logit_scale", Value::F32(logits));
    }
    if let Some(e) = p.experts {
        set("expert_count", number(e.count));
        set("expert_used_count", number(e.used));
        set("expert_feed_forward_length", number(e.hidden));
        if e.gating > 0 {
            set("expert_gating_func", Value::U32(e.gating));
        }
        if e.leading_dense > 0 {
            set("leading_dense_block_count", number(e.leading_dense));
        }
        if e.shared > 0 && e.shared_gate {
            set("expert_shared_feed_forward_length", number(e.shared));
        } else if e.shared > 0 {
            set("expert_shared_count", number(e.shared.div_ceil(e.hidden)));
        }
    }
    keys.extend(tokenizer(p.vocabulary));
    keys
}

/// A tokenizer of single bytes and one merge, its vocabulary filled up with tokens that stand for nothing.
fn tokenizer(vocabulary: usize) -> Vec<(String, Value)> {
    let mut tokens: Vec<String> = (0..=255).map(|b| byte_alphabet::character(b).to_string()).collect();
    let mut kinds = vec![1; 256];
    for control in ["<|begin|>", "<|endoftext|>"] {
        tokens.push(control.to_owned());
        kinds.push(3);
    }
    tokens.push("th".to_owned());
    kinds.push(1);
    for id in tokens.len()..vocabulary {
        tokens.push(format!("<|unused{id}|>"));
        kinds.push(5);
    }
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    vec![
        (key("model"), Value::from("gpt2")),
        (key("pre"), Value::from("gpt-2")),
        (key("tokens"), Value::Array(Array::Strings(tokens))),
        (key("token_type"), Value::Array(Array::I32(kinds))),
        (key("merges"), Value::Array(Array::Strings(vec!["t h".to_owned()]))),
        (key("bos_token_id"), Value::U32(256)),
        (key("eos_token_id"), Value::U32(257)),
        (key("add_bos_token"), Value::Bool(false)),
    ]
}
