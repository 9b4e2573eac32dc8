//! The numbers that describe a decoder, as the metadata of its file gives them.

use lightering_formats::gguf::{Array, GgufFile, Metadata, Value};
use lightering_graph::{RopeScaling, RouteScoring};

use super::family::Family;
use crate::{Error, Result};

/// Most layers, heads, experts that are believed.
const LAYERS_MAX: u64 = 4096;
const WIDTH_MAX: u64 = 1 << 20;

/// Everything about a decoder but its weights.
#[derive(Clone, Debug, PartialEq)]
pub struct HyperParameters {
    /// What `general.architecture` says.
    pub architecture: String,
    /// Decoder blocks.
    pub layers: usize,
    /// Width of the hidden state.
    pub width: usize,
    /// Query heads of each layer.
    pub heads: Vec<usize>,
    /// Heads of keys and values of each layer.
    pub kv_heads: Vec<usize>,
    /// Elements of a key.
    pub key_len: usize,
    /// Elements of a value.
    pub value_len: usize,
    /// Positions that the model was trained on.
    pub context: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// Added under the square root of normalisations.
    pub epsilon: f32,
    /// Turned elements of each head.
    pub rope_dims: usize,
    /// Base of the rotary frequencies.
    pub rope_base: f32,
    /// Base in layers with a window, where it differs.
    pub rope_base_local: Option<f32>,
    /// Stretching of rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Multiplies the rotation.
    pub rope_magnitude: f32,
    /// Positions that layers with a window see.
    pub window: Option<usize>,
    /// The layers that see only so many, where there is a window.
    pub local: Vec<bool>,
    /// Factor of attention scores.
    pub attention_scale: f32,
    /// Soft cap of attention scores.
    pub attention_softcap: Option<f32>,
    /// Soft cap of logits.
    pub logit_softcap: Option<f32>,
    /// Factor of embeddings.
    pub embedding_scale: f32,
    /// Factor of what each half of a layer adds.
    pub residual_scale: f32,
    /// Divisor of logits.
    pub logit_divisor: f32,
    /// Compressed keys and values, in models that have them.
    pub compressed: Option<CompressedParameters>,
    /// The experts, in models that have them.
    pub experts: Option<ExpertParameters>,
}

/// Keys and values that are computed from one compressed row (multi-head latent attention: DeepSeek-V2,
/// arXiv 2405.04434, §2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressedParameters {
    /// Elements of the compressed row.
    pub rank: usize,
    /// Elements of a key, of which the last are turned.
    pub key_len: usize,
    /// Elements of a value.
    pub value_len: usize,
}

/// The experts of a mixture.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertParameters {
    /// Experts of a layer.
    pub count: usize,
    /// Experts of a token.
    pub used: usize,
    /// Layers at the start that have none.
    pub leading_dense: usize,
    /// How scores become weights.
    pub scoring: RouteScoring,
    /// Whether the weights of a token's experts are divided by their sum.
    pub normalise: bool,
    /// Factor of the weights.
    pub scale: f32,
}

/// Reads keys below the architecture's name.
struct Keys<'a> {
    metadata: &'a Metadata,
    architecture: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn size(&self, name: &str, most: u64) -> Result<Option<usize>> {
        let key = self.key(name);
        let Some(found) = self.metadata.get_u64(&key)? else { return Ok(None) };
        if found > most {
            return Err(Error::limit(key, "the number", found, most));
        }
        Ok(Some(found as usize))
    }

    fn required(&self, name: &str, most: u64) -> Result<usize> {
        match self.size(name, most)? {
            Some(0) => Err(Error::invalid(self.key(name), 0, "a positive number")),
            Some(n) => Ok(n),
            None => Err(Error::invalid(self.key(name), "no such key in the metadata", "a positive number")),
        }
    }

    fn float(&self, name: &str) -> Result<Option<f32>> {
        let key = self.key(name);
        match self.metadata.get_f32(&key)? {
            Some(x) if !x.is_finite() => Err(Error::invalid(key, x, "a finite number")),
            other => Ok(other),
        }
    }

    /// One number for all layers, or one for each.
    fn per_layer(&self, name: &str, layers: usize) -> Result<Option<Vec<usize>>> {
        let key = self.key(name);
        match self.metadata.get(&key) {
            None => Ok(None),
            Some(Value::Array(_)) => {
                let list = self.metadata.get_u64s(&key)?.unwrap_or_default();
                if list.len() < layers || list.iter().any(|&n| n > WIDTH_MAX) {
                    let what = format!("{} numbers", list.len());
                    return Err(Error::invalid(key, what, format!("one for each of {layers} layers")));
                }
                Ok(Some(list[..layers].iter().map(|&n| n as usize).collect()))
            }
            Some(_) => Ok(Some(vec![self.required(name, WIDTH_MAX)?; layers])),
        }
    }

    /// Which layers see only a window: said for each, by a period, or not at all.
    fn local_layers(&self, layers: usize, window: Option<usize>, family: &Family) -> Result<Vec<bool>> {
        if window.is_none() {
            return Ok(vec![false; layers]);
        }
        let key = self.key("attention.sliding_window_pattern");
        let listed = match self.metadata.get(&key) {
            Some(Value::Array(Array::Bool(list))) => Some(list.clone()),
            Some(Value::Array(_)) => {
                let list = self.metadata.get_u64s(&key)?.unwrap_or_default();
                Some(list.into_iter().map(|n| n != 0).collect())
            }
            _ => None,
        };
        if let Some(mut list) = listed {
            if list.len() < layers {
                let what = format!("{} entries", list.len());
                return Err(Error::invalid(key, what, format!("one for each of {layers} layers")));
            }
            list.truncate(layers);
            return Ok(list);
        }
        let name = "attention.sliding_window_pattern";
        let period = self.size(name, LAYERS_MAX)?.unwrap_or(family.window_period);
        let whole = |layer: usize| match family.window_last {
            true => layer.is_multiple_of(period),
            false => (layer + 1).is_multiple_of(period),
        };
        Ok((0..layers).map(|layer| period == 0 || !whole(layer)).collect())
    }
}

impl HyperParameters {
    /// Reads them from the metadata of a file.
    ///
    /// # Errors
    /// Keys that are missing or contradict each other, and architectures that are not known.
    pub fn of(file: &GgufFile) -> Result<HyperParameters> {
        let metadata = &file.metadata;
        let architecture = metadata.require_str("general.architecture")?;
        let family = Family::named(architecture)?;
        let keys = Keys { metadata, architecture };
        let layers = keys.required("block_count", LAYERS_MAX)?;
        let width = keys.required("embedding_length", WIDTH_MAX)?;
        let heads = keys.per_layer("attention.head_count", layers)?.ok_or_else(|| {
            Error::invalid(
                keys.key("attention.head_count"),
                "no such key in the metadata",
                "a positive number",
            )
        })?;
        let kv_heads = keys.per_layer("attention.head_count_kv", layers)?.unwrap_or_else(|| heads.clone());
        for (layer, (&h, &kv)) in heads.iter().zip(&kv_heads).enumerate() {
            if h == 0 || kv == 0 || h % kv != 0 {
                return Err(Error::invalid(
                    keys.key("attention.head_count_kv"),
                    format!("{kv} heads of keys for {h} of queries in layer {layer}"),
                    "a divisor of the number of heads",
                ));
            }
        }
        let key_len = match keys.size("attention.key_length", WIDTH_MAX)? {
            Some(n) => n,
            None => width / heads[0],
        };
        let value_len = keys.size("attention.value_length", WIDTH_MAX)?.unwrap_or(width / heads[0]);
        if key_len == 0 || value_len == 0 {
            return Err(Error::invalid(keys.key("attention.key_length"), 0, "a positive number"));
        }
        let rope_dims = keys.size("rope.dimension_count", WIDTH_MAX)?.unwrap_or(key_len);
        if rope_dims > key_len || !rope_dims.is_multiple_of(2) {
            return Err(Error::invalid(
                keys.key("rope.dimension_count"),
                rope_dims,
                format!("an even number of at most the {key_len} elements of a head"),
            ));
        }
        let epsilon = match keys.float("attention.layer_norm_rms_epsilon")? {
            Some(e) => e,
            None => keys.float("attention.layer_norm_epsilon")?.unwrap_or(1e-5),
        };
        let context = keys.required("context_length", 1 << 31)?;
        let vocabulary = match file.tensor("token_embd.weight") {
            Some(t) => usize::try_from(t.rows()).unwrap_or(usize::MAX),
            None => {
                return Err(Error::invalid("token_embd.weight", "no such tensor", "the token embeddings"));
            }
        };
        let window = keys.size("attention.sliding_window", 1 << 31)?.unwrap_or(family.window);
        let window = Some(window).filter(|&w| w > 0);
        let experts = match keys.size("expert_count", WIDTH_MAX)?.filter(|&n| n > 0) {
            None => None,
            Some(count) => {
                let used = keys.required("expert_used_count", WIDTH_MAX)?;
                if used > count {
                    return Err(Error::invalid(
                        keys.key("expert_used_count"),
                        used,
                        format!("at most the {count} experts that there are"),
                    ));
                }
                if let Some(groups) = keys.size("expert_group_count", WIDTH_MAX)?.filter(|&n| n > 1) {
                    let what = format!("a choice among {groups} groups of experts");
                    return Err(Error::unsupported(keys.key("expert_group_count"), what));
                }
                let scoring = match keys.size("expert_gating_func", 16)? {
                    None | Some(0) => family.scoring,
                    Some(1) => RouteScoring::Softmax,
                    Some(2) => RouteScoring::Sigmoid,
                    Some(3) => RouteScoring::SoftmaxOfChosen,
                    Some(other) => {
                        let what = format!("router function {other}");
                        return Err(Error::unsupported(keys.key("expert_gating_func"), what));
                    }
                };
                let normalise = metadata.get_bool(&keys.key("expert_weights_norm"))?;
                Some(ExpertParameters {
                    count,
                    used,
                    leading_dense: keys.size("leading_dense_block_count", LAYERS_MAX)?.unwrap_or(0),
                    scoring,
                    normalise: normalise.unwrap_or(family.normalise_experts),
                    scale: keys.float("expert_weights_scale")?.filter(|&s| s != 0.0).unwrap_or(1.0),
                })
            }
        };
        let embedding_scale = match keys.float("embedding_scale")? {
            Some(scale) => scale,
            None if family.scales_embeddings => (width as f32).sqrt(),
            None => 1.0,
        };
        let compressed = compressed(&keys, key_len, value_len, rope_dims)?;
        let rope_scaling = rope_scaling(&keys, context)?;
        let mut rope_magnitude = keys.float("rope.scaling.attn_factor")?.filter(|&m| m > 0.0).unwrap_or(1.0);
        let mut attention_scale = match keys.float("attention.scale")?.filter(|&s| s != 0.0) {
            Some(scale) => scale,
            None => {
                let key_len = compressed.map_or(key_len, |c| c.key_len);
                family.attention_scale(width, heads[0], key_len, layers)
            }
        };
        if let (Some(_), RopeScaling::Yarn { factor, .. }) = (compressed, rope_scaling) {
            // DeepSeek stretches the scores instead of the rotation, where it says by how much.
            let usual = 1.0 + 0.1 * factor.ln();
            let stretch = match keys.float("rope.scaling.yarn_log_multiplier")?.filter(|&m| m != 0.0) {
                Some(multiplier) => {
                    rope_magnitude /= usual;
                    1.0 + multiplier * factor.ln()
                }
                None => usual,
            };
            attention_scale *= stretch * stretch;
        }
        Ok(HyperParameters {
            layers,
            width,
            key_len,
            value_len,
            context,
            vocabulary,
            epsilon,
            rope_dims,
            rope_base: keys.float("rope.freq_base")?.unwrap_or(10_000.0),
            rope_base_local: keys.float("rope.freq_base_swa")?.or(family.rope_base_local),
            rope_scaling,
            rope_magnitude,
            local: keys.local_layers(layers, window, family)?,
            window,
            attention_scale,
            attention_softcap: keys.float("attn_logit_softcapping")?.filter(|&c| c > 0.0),
            logit_softcap: keys.float("final_logit_softcapping")?.filter(|&c| c > 0.0),
            embedding_scale,
            residual_scale: keys.float("residual_scale")?.filter(|&s| s != 0.0).unwrap_or(1.0),
            logit_divisor: keys.float("logit_scale")?.filter(|&s| s != 0.0).unwrap_or(1.0),
            compressed,
            experts,
            heads,
            kv_heads,
            architecture: architecture.to_owned(),
        })
    }

    /// The positions that layers with a window see and have to keep, where there are such layers.
    pub fn cached_window(&self) -> Option<usize> {
        self.window.filter(|_| self.compressed.is_none() && self.local.contains(&true))
    }

    /// Whether a layer sees only the last positions.
    pub fn has_window(&self, layer: usize) -> bool {
        self.local.get(layer).copied().unwrap_or(false)
    }
}

fn compressed(
    keys: &Keys<'_>,
    key_len: usize,
    value_len: usize,
    rope_dims: usize,
) -> Result<Option<CompressedParameters>> {
    let Some(rank) = keys.size("attention.kv_lora_rank", WIDTH_MAX)?.filter(|&n| n > 0) else {
        return Ok(None);
    };
    // Files whose caches hold the compressed row say the lengths of a head apart.
    let of_head =
        |name, other| Ok::<_, Error>(keys.size(name, WIDTH_MAX)?.filter(|&n| n > 0).unwrap_or(other));
    let key_len = of_head("attention.key_length_mla", key_len)?;
    let value_len = of_head("attention.value_length_mla", value_len)?;
    if rope_dims == 0 || rope_dims >= key_len {
        return Err(Error::invalid(
            keys.key("rope.dimension_count"),
            rope_dims,
            format!("fewer than the {key_len} elements of a key, and some"),
        ));
    }
    Ok(Some(CompressedParameters { rank, key_len, value_len }))
}

fn rope_scaling(keys: &Keys<'_>, context: usize) -> Result<RopeScaling> {
    let kind = keys.metadata.get_str(&keys.key("rope.scaling.type"))?;
    let factor = match keys.float("rope.scaling.factor")? {
        Some(f) => Some(f),
        None => keys.float("rope.scale_linear")?,
    };
    let factor = factor.filter(|&f| f > 0.0);
    Ok(match (kind, factor) {
        (Some("none"), _) | (_, None) => RopeScaling::None,
        (Some("linear") | None, Some(factor)) => RopeScaling::Linear { factor },
        (Some("yarn"), Some(factor)) => {
            let original = keys.size("rope.scaling.original_context_length", 1 << 31)?;
            RopeScaling::Yarn {
                factor,
                original_context: original.unwrap_or(context),
                beta_fast: keys.float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: keys.float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            }
        }
        // Their factors come as a tensor.
        (Some("longrope" | "llama3"), _) => RopeScaling::None,
        (Some(other), _) => {
            return Err(Error::unsupported(keys.key("rope.scaling.type"), format!("{other:?}")));
        }
    })
}
