//! What `config.json` says about a model, as the metadata of a GGUF file says it.

use lightering_formats::gguf::Value;
use serde_json::{Map, Value as Json};

use crate::{Error, Result};

/// How a family names its tensors and stores them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Naming {
    /// Llama and those that follow it.
    Llama,
    /// As Llama, with norms before and after each half of a layer, and gains that lack 1.
    Gemma,
    /// As Gemma with the norms of Llama (the first Gemma).
    FirstGemma,
    /// GPT-2, whose matrices are transposed.
    Gpt2,
}

struct Family {
    /// `model_type` of the configuration.
    model_type: &'static str,
    /// `general.architecture` of the file.
    architecture: &'static str,
    naming: Naming,
    /// Whether the architecture turns neighbouring elements where the checkpoint turns halves.
    paired: bool,
    /// Whether the embeddings are the output matrix where the configuration says nothing.
    tied: bool,
}

const fn family(model_type: &'static str, architecture: &'static str) -> Family {
    Family { model_type, architecture, naming: Naming::Llama, paired: false, tied: false }
}

const FAMILIES: [Family; 15] = [
    Family { paired: true, ..family("llama", "llama") },
    Family { paired: true, ..family("mistral", "llama") },
    Family { paired: true, ..family("mixtral", "llama") },
    Family { paired: true, ..family("granite", "granite") },
    family("qwen2", "qwen2"),
    family("qwen2_moe", "qwen2moe"),
    family("qwen3", "qwen3"),
    family("qwen3_moe", "qwen3moe"),
    family("olmoe", "olmoe"),
    family("phi3", "phi3"),
    Family { naming: Naming::FirstGemma, tied: true, ..family("gemma", "gemma") },
    Family { naming: Naming::Gemma, tied: true, ..family("gemma2", "gemma2") },
    Family { naming: Naming::Gemma, tied: true, ..family("gemma3_text", "gemma3") },
    Family { naming: Naming::Gemma, tied: true, ..family("gemma3", "gemma3") },
    Family { naming: Naming::Gpt2, tied: true, ..family("gpt2", "gpt2") },
];

/// A model as its configuration describes it.
#[derive(Debug)]
pub(super) struct Description {
    pub architecture: &'static str,
    pub naming: Naming,
    pub layers: u64,
    pub experts: u64,
    pub tied: bool,
    /// Elements of a head whose rows change places, where the architecture asks for that.
    pub paired: Option<u64>,
    /// Keys below the architecture's name.
    pub keys: Vec<(&'static str, Value)>,
    /// Factors of rotary frequencies, which files carry as tensors.
    pub factors: Vec<(&'static str, Vec<f32>)>,
    pub notes: Vec<String>,
}

/// An object of the configuration, with errors that name it.
#[derive(Clone, Copy)]
struct Object<'a> {
    place: &'a str,
    map: &'a Map<String, Json>,
}

impl<'a> Object<'a> {
    fn get(&self, key: &str) -> Option<&'a Json> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, expected: &str) -> Error {
        let found = self.get(key).map_or("is missing".to_owned(), |value| {
            let text: String = value.to_string().chars().take(60).collect();
            format!("is {text}")
        });
        Error::invalid(self.place, format!("{key:?} {found}"), expected)
    }

    fn size(&self, key: &str) -> Result<Option<u64>> {
        match self.get(key) {
            None => Ok(None),
            // Numbers of GGUF's metadata have 32 bits.
            Some(value) => match value.as_u64().filter(|n| *n <= u64::from(u32::MAX)) {
                Some(n) => Ok(Some(n)),
                None => Err(self.wrong(key, "a number from 0 to 4294967295")),
            },
        }
    }

    fn required(&self, key: &str) -> Result<u64> {
        match self.size(key)? {
            Some(n) if n > 0 => Ok(n),
            _ => Err(self.wrong(key, "a positive number")),
        }
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64().filter(|x| (*x as f32).is_finite()) {
                Some(x) => Ok(Some(x)),
                None => Err(self.wrong(key, "a finite number")),
            },
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => value.as_bool().map(Some).ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| self.wrong(key, "a text")),
        }
    }

    fn object(&self, key: &str) -> Result<Option<Object<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Json::Object(map)) => Ok(Some(Object { place: self.place, map })),
            Some(_) => Err(self.wrong(key, "an object")),
        }
    }

    fn floats(&self, key: &str, count: u64) -> Result<Vec<f32>> {
        let list = match self.get(key) {
            Some(Json::Array(list)) if list.len() as u64 == count => list,
            _ => return Err(self.wrong(key, &format!("a list of {count} numbers"))),
        };
        let number = |x: &Json| x.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
        list.iter()
            .map(|x| number(x).ok_or_else(|| self.wrong(key, &format!("a list of {count} finite numbers"))))
            .collect()
    }

    fn unsupported(&self, what: impl std::fmt::Display) -> Error {
        Error::unsupported(self.place, what)
    }
}

fn number(n: u64) -> Value {
    Value::U32(u32::try_from(n).unwrap_or(u32::MAX))
}

fn float(x: f64) -> Value {
    Value::F32(x as f32)
}

/// Reads a configuration.
pub(super) fn describe(place: &str, map: &Map<String, Json>) -> Result<Description> {
    let outer = Object { place, map };
    let model_type =
        outer.text("model_type")?.ok_or_else(|| outer.wrong("model_type", "the model's family"))?;
    let family = FAMILIES.iter().find(|f| f.model_type == model_type).ok_or_else(|| {
        let known: Vec<&str> = FAMILIES.iter().map(|f| f.model_type).collect();
        outer.unsupported(format!("the model type {model_type:?} (known are {})", known.join(", ")))
    })?;
    if outer.get("quantization_config").is_some() {
        return Err(
            outer.unsupported("a checkpoint whose weights are quantised already (quantization_config)")
        );
    }
    // Models that also see pictures describe their decoder apart.
    let config = outer.object("text_config")?.unwrap_or(outer);
    let mut d = Description {
        architecture: family.architecture,
        naming: family.naming,
        layers: 0,
        experts: 0,
        tied: outer.flag("tie_word_embeddings")?.unwrap_or(family.tied),
        paired: None,
        keys: Vec::new(),
        factors: Vec::new(),
        notes: Vec::new(),
    };
    let activation = match config.text("hidden_activation")? {
        Some(activation) => Some(activation),
        None => config.text("hidden_act")?.or(config.text("activation_function")?),
    };
    let expected: &[&str] = match family.naming {
        Naming::Llama => &["silu", "swish"],
        Naming::Gemma | Naming::FirstGemma => &["gelu_pytorch_tanh", "gelu"],
        Naming::Gpt2 => &["gelu_new", "gelu_pytorch_tanh"],
    };
    if let Some(activation) = activation.filter(|a| !expected.contains(a)) {
        return Err(
            config.unsupported(format!("the activation {activation:?} in a model of type {model_type:?}"))
        );
    }
    match family.naming {
        Naming::Gpt2 => gpt2(&config, &mut d)?,
        _ => llama(&config, family, &mut d)?,
    }
    Ok(d)
}

fn gpt2(config: &Object<'_>, d: &mut Description) -> Result<()> {
    let width = config.required("n_embd")?;
    d.layers = config.required("n_layer")?;
    let context = match config.size("n_positions")? {
        Some(n) => n,
        None => config.required("n_ctx")?,
    };
    for odd in ["scale_attn_by_inverse_layer_idx", "add_cross_attention"] {
        if config.flag(odd)? == Some(true) {
            return Err(config.unsupported(format!("{odd:?}")));
        }
    }
    let hidden = config.size("n_inner")?.unwrap_or(4 * width);
    d.keys.extend([
        ("context_length", number(context)),
        ("embedding_length", number(width)),
        ("block_count", number(d.layers)),
        ("feed_forward_length", number(hidden)),
        ("attention.head_count", number(config.required("n_head")?)),
        ("attention.layer_norm_epsilon", float(config.float("layer_norm_epsilon")?.unwrap_or(1e-5))),
    ]);
    Ok(())
}

fn llama(config: &Object<'_>, family: &Family, d: &mut Description) -> Result<()> {
    let gemma = matches!(family.naming, Naming::Gemma | Naming::FirstGemma);
    let width = config.required("hidden_size")?;
    d.layers = config.required("num_hidden_layers")?;
    let heads = config.required("num_attention_heads")?;
    let kv_heads = config.size("num_key_value_heads")?.unwrap_or(heads);
    let explicit_head = config.size("head_dim")?;
    let head = match explicit_head {
        Some(head) => head,
        None if gemma => 256,
        None => width / heads,
    };
    if head == 0 || head % 2 != 0 {
        return Err(config.wrong("head_dim", "an even number of elements in each head"));
    }
    let context = config.required("max_position_embeddings")?;
    let epsilon = config.float("rms_norm_eps")?.unwrap_or(1e-6);
    d.keys.extend([
        ("context_length", number(context)),
        ("embedding_length", number(width)),
        ("block_count", number(d.layers)),
        ("feed_forward_length", number(config.size("intermediate_size")?.unwrap_or(4 * width))),
        ("attention.head_count", number(heads)),
        ("attention.head_count_kv", number(kv_heads)),
        ("attention.layer_norm_rms_epsilon", float(epsilon)),
    ]);
    if explicit_head.is_some_and(|head| head != width / heads)
        || gemma
        || family.architecture.starts_with("qwen3")
    {
        d.keys.extend([("attention.key_length", number(head)), ("attention.value_length", number(head))]);
    }
    // Newer configurations keep everything about rotary positions in one object.
    let rope = match config.object("rope_parameters")? {
        Some(rope) => Some(rope.object("full_attention")?.unwrap_or(rope)),
        None => config.object("rope_scaling")?,
    };
    let from_either = |key: &str| -> Result<Option<f64>> {
        match config.float(key)? {
            Some(x) => Ok(Some(x)),
            None => rope.map_or(Ok(None), |rope| rope.float(key)),
        }
    };
    let default_base = match family.architecture {
        "gemma3" => 1_000_000.0,
        _ => 10_000.0,
    };
    let base = from_either("rope_theta")?.unwrap_or(default_base);
    let share = from_either("partial_rotary_factor")?.unwrap_or(1.0);
    if !(0.0..=1.0).contains(&share) || base <= 0.0 {
        return Err(config.wrong("partial_rotary_factor", "a share of at most 1, and a positive rope_theta"));
    }
    if family.paired && share != 1.0 {
        return Err(config.unsupported(format!("rotary positions of a part of each head ({share})")));
    }
    let turned = (share * head as f64) as u64;
    d.keys.extend([("rope.freq_base", float(base)), ("rope.dimension_count", number(turned))]);
    if family.paired {
        d.paired = Some(head);
    }
    if let Some(rope) = rope {
        scaling(&rope, base, turned, context, config, d)?;
    }
    experts(config, family, d)?;
    windows(config, family, d)?;
    for (from, to) in [
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("embedding_multiplier", "embedding_scale"),
        ("residual_multiplier", "residual_scale"),
        ("attention_multiplier", "attention.scale"),
        ("logits_scaling", "logit_scale"),
    ] {
        if let Some(x) = config.float(from)? {
            d.keys.push((to, float(x)));
        }
    }
    if let Some(scalar) = config.float("query_pre_attn_scalar")?.filter(|s| *s > 0.0 && *s != head as f64) {
        d.keys.push(("attention.scale", float(1.0 / scalar.sqrt())));
    }
    Ok(())
}

/// Rotary positions that were stretched to longer contexts.
fn scaling(
    rope: &Object<'_>,
    base: f64,
    turned: u64,
    context: u64,
    config: &Object<'_>,
    d: &mut Description,
) -> Result<()> {
    let kind = match rope.text("rope_type")? {
        Some(kind) => kind,
        None => rope.text("type")?.unwrap_or("default"),
    };
    let original = match rope.size("original_max_position_embeddings")? {
        Some(n) => Some(n),
        None => config.size("original_max_position_embeddings")?,
    };
    let factor = || -> Result<f64> {
        rope.float("factor")?.filter(|f| *f > 0.0).ok_or_else(|| rope.wrong("factor", "a positive number"))
    };
    match kind {
        "default" => {}
        "linear" => d.keys.extend([
            ("rope.scaling.type", Value::from("linear")),
            ("rope.scaling.factor", float(factor()?)),
        ]),
        "yarn" => {
            d.keys.extend([
                ("rope.scaling.type", Value::from("yarn")),
                ("rope.scaling.factor", float(factor()?)),
                ("rope.scaling.original_context_length", number(original.unwrap_or(context))),
            ]);
            for (from, to) in
                [("beta_fast", "rope.scaling.yarn_beta_fast"), ("beta_slow", "rope.scaling.yarn_beta_slow")]
            {
                if let Some(beta) = rope.float(from)? {
                    d.keys.push((to, float(beta)));
                }
            }
        }
        "llama3" => {
            let factor = factor()?;
            let low = rope.float("low_freq_factor")?.unwrap_or(1.0);
            let high = rope.float("high_freq_factor")?.unwrap_or(4.0);
            let original = original.unwrap_or(8192) as f64;
            if !(low > 0.0 && high > low) {
                return Err(rope.wrong("high_freq_factor", "more than a positive low_freq_factor"));
            }
            let factors = (0..turned / 2).map(|i| {
                let length = 2.0 * std::f64::consts::PI * base.powf((2 * i) as f64 / turned as f64);
                if length < original / high {
                    1.0
                } else if length > original / low {
                    factor as f32
                } else {
                    let smooth = (original / length - low) / (high - low);
                    (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
                }
            });
            d.factors.push(("rope_freqs.weight", factors.collect()));
        }
        "longrope" | "su" => {
            let original = original
                .filter(|n| *n > 1)
                .ok_or_else(|| rope.wrong("original_max_position_embeddings", "the first context length"))?;
            let stretch = context as f64 / original as f64;
            let magnitude = match rope.float("attention_factor")? {
                Some(magnitude) => magnitude,
                None if stretch <= 1.0 => 1.0,
                None => (1.0 + stretch.ln() / (original as f64).ln()).sqrt(),
            };
            d.keys.extend([
                ("rope.scaling.original_context_length", number(original)),
                ("rope.scaling.attn_factor", float(magnitude)),
            ]);
            for (key, name) in
                [("long_factor", "rope_factors_long.weight"), ("short_factor", "rope_factors_short.weight")]
            {
                d.factors.push((name, rope.floats(key, turned / 2)?));
            }
        }
        other => return Err(rope.unsupported(format!("rotary positions of type {other:?}"))),
    }
    Ok(())
}

fn experts(config: &Object<'_>, family: &Family, d: &mut Description) -> Result<()> {
    let (count, hidden) = match family.model_type {
        "mixtral" => (config.required("num_local_experts")?, None),
        "olmoe" => (config.required("num_experts")?, None),
        "qwen2_moe" | "qwen3_moe" => {
            (config.required("num_experts")?, Some(config.required("moe_intermediate_size")?))
        }
        _ => return Ok(()),
    };
    let dense =
        config.get("mlp_only_layers").is_some_and(|list| list.as_array().is_none_or(|l| !l.is_empty()));
    if dense || config.size("decoder_sparse_step")?.is_some_and(|step| step != 1) {
        return Err(config.unsupported("a mixture of experts in some layers only"));
    }
    d.experts = count;
    d.keys.extend([
        ("expert_count", number(count)),
        ("expert_used_count", number(config.required("num_experts_per_tok")?)),
    ]);
    if let Some(hidden) = hidden {
        d.keys.push(("expert_feed_forward_length", number(hidden)));
    }
    if let Some(shared) = config.size("shared_expert_intermediate_size")? {
        d.keys.push(("expert_shared_feed_forward_length", number(shared)));
    }
    if let Some(normalise) = config.flag("norm_topk_prob")? {
        d.keys.push(("expert_weights_norm", Value::Bool(normalise)));
    }
    Ok(())
}

fn windows(config: &Object<'_>, family: &Family, d: &mut Description) -> Result<()> {
    let Some(window) = config.size("sliding_window")? else { return Ok(()) };
    match family.architecture {
        architecture if architecture.starts_with("qwen") => {
            if config.flag("use_sliding_window")? == Some(true) {
                return Err(config.unsupported("sliding windows in some layers (use_sliding_window)"));
            }
            return Ok(());
        }
        "gemma3" => {
            let usual = |layer: usize| {
                if (layer + 1).is_multiple_of(6) { "full_attention" } else { "sliding_attention" }
            };
            let every_sixth = match config.get("layer_types") {
                Some(Json::Array(types)) => {
                    types.iter().enumerate().all(|(layer, kind)| kind.as_str() == Some(usual(layer)))
                }
                _ => config.size("sliding_window_pattern")?.is_none_or(|period| period == 6),
            };
            if !every_sixth {
                return Err(config.unsupported("full attention in other layers than every sixth"));
            }
            if config.float("rope_local_base_freq")?.is_some_and(|base| base != 10_000.0) {
                return Err(config.unsupported("rope_local_base_freq other than 10000"));
            }
        }
        _ => {}
    }
    d.keys.push(("attention.sliding_window", number(window)));
    Ok(())
}
