//! Models that do not exist yet: their description, as the header of the file that they are going to be.

use std::collections::HashMap;
use std::str::FromStr;

use lightering_formats::gguf::{Array, GgufFile, GgufWriter, Value};
use lightering_units::BlockFormat;

use super::graph::TrainingModel;
use crate::architecture::HyperParameters;
use crate::convert::HeaderOnly;
use crate::{Error, Result, VocabularyData};

/// How a tensor begins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Draw {
    Normal { deviation: f32, number: u64 },
    Constant(f32),
}

/// The shape of a model of the Llama family, written `lm:llama` or `lm:moe` with settings such as
/// `lm:llama:layers=4,width=256,heads=8`.
#[derive(Clone, Debug, PartialEq)]
pub struct NewModel {
    /// Decoder blocks.
    pub layers: usize,
    /// Width of the hidden state.
    pub width: usize,
    /// Query heads.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Width within the feed-forward network, or of each expert.
    pub hidden: usize,
    /// The embeddings serve as the last matrix, too.
    pub tied: bool,
    /// Experts of a layer and of a token; 0 for none.
    pub experts: [usize; 2],
    /// Weights of the losses that even out the use of experts and keep the router's scores small.
    pub router: [f32; 2],
}

/// Largest numbers that are believed.
const LAYERS_MAX: usize = 1024;
const WIDTH_MAX: usize = 1 << 16;

/// Conversations are a text like any other: a paragraph for each message.
const TEMPLATE: &str = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}";

impl FromStr for NewModel {
    type Err = Error;

    fn from_str(text: &str) -> Result<NewModel> {
        let mut parts = text.splitn(3, ':');
        let wrong = |what: &str, expected: &str| Error::invalid("model", format!("{what:?}"), expected);
        let (Some("lm"), Some(kind)) = (parts.next(), parts.next()) else {
            return Err(wrong(text, "lm:llama or lm:moe"));
        };
        let experts = match kind {
            "llama" => [0, 0],
            "moe" => [8, 2],
            other => return Err(wrong(other, "llama or moe")),
        };
        let mut model = NewModel {
            layers: 4,
            width: 256,
            heads: 8,
            kv_heads: 0,
            hidden: 0,
            tied: true,
            experts,
            router: if experts[0] > 0 { [0.01, 0.001] } else { [0.0; 2] },
        };
        for setting in parts.next().unwrap_or_default().split(',').filter(|s| !s.is_empty()) {
            let (key, value) = setting.split_once('=').unwrap_or((setting, ""));
            let number = |most: usize| match value.parse::<usize>() {
                Ok(n) if n > 0 && n <= most => Ok(n),
                _ => Err(wrong(setting, &format!("a number from 1 to {most}, such as {key}=4"))),
            };
            let share = || match value.parse::<f32>() {
                Ok(x) if x.is_finite() && x >= 0.0 => Ok(x),
                _ => Err(wrong(setting, &format!("a number such as {key}=0.01"))),
            };
            match key {
                "layers" => model.layers = number(LAYERS_MAX)?,
                "width" => model.width = number(WIDTH_MAX)?,
                "heads" => model.heads = number(WIDTH_MAX)?,
                "kv_heads" => model.kv_heads = number(WIDTH_MAX)?,
                "hidden" => model.hidden = number(WIDTH_MAX)?,
                "tied" => {
                    model.tied = match value {
                        "yes" | "1" | "true" => true,
                        "no" | "0" | "false" => false,
                        _ => return Err(wrong(setting, "tied=yes or tied=no")),
                    }
                }
                "experts" if kind == "moe" => model.experts[0] = number(1024)?,
                "used" if kind == "moe" => model.experts[1] = number(1024)?,
                "balance" if kind == "moe" => model.router[0] = share()?,
                "z" if kind == "moe" => model.router[1] = share()?,
                _ => {
                    let more = if kind == "moe" { ", experts, used, balance, z" } else { "" };
                    return Err(wrong(
                        setting,
                        &format!("layers, width, heads, kv_heads, hidden, tied{more}"),
                    ));
                }
            }
        }
        if model.kv_heads == 0 {
            model.kv_heads = model.heads;
        }
        if model.hidden == 0 {
            // Two thirds of four times the width; an expert is as wide as the model.
            let plain = if experts[0] > 0 { model.width } else { model.width * 8 / 3 };
            model.hidden = plain.next_multiple_of(32);
        }
        let head = model.width / model.heads;
        if !model.width.is_multiple_of(model.heads) || !head.is_multiple_of(2) {
            let what = format!("{} heads of a width of {}", model.heads, model.width);
            return Err(wrong(&what, "heads that divide the width into an even number of elements each"));
        }
        if !model.heads.is_multiple_of(model.kv_heads) {
            return Err(wrong(&format!("kv_heads={}", model.kv_heads), "a divisor of the number of heads"));
        }
        if model.experts[1] > model.experts[0] {
            return Err(wrong(&format!("used={}", model.experts[1]), "at most the number of experts"));
        }
        Ok(model)
    }
}

impl NewModel {
    /// The model with first weights, for a vocabulary and sequences of up to `context` tokens.
    ///
    /// # Errors
    /// The vocabulary is none.
    pub fn describe(&self, vocabulary: &VocabularyData, context: usize) -> Result<TrainingModel> {
        let mut writer = GgufWriter::new();
        for (key, value) in self.keys(vocabulary.tokens.len(), context) {
            writer.set(&key, value)?;
        }
        for (key, value) in tokenizer_keys(vocabulary) {
            writer.set(&key, value)?;
        }
        let mut drawn = HashMap::new();
        let mut total = 0;
        for (number, (name, dims, draw)) in self.tensors(vocabulary.tokens.len()).into_iter().enumerate() {
            let dims: Vec<u64> = dims.into_iter().map(|d| d as u64).collect();
            writer.tensor(&name, &dims, BlockFormat::F32)?;
            total += (4 * dims.iter().product::<u64>()).next_multiple_of(32);
            let draw = match draw {
                Draw::Normal { deviation, .. } => {
                    Draw::Normal { deviation, number: number as u64 + (1 << 20) }
                }
                constant => constant,
            };
            drawn.insert(name, draw);
        }
        let mut header = Vec::new();
        drop(writer.begin(&mut header)?);
        let total = header.len() as u64 + total;
        let file = GgufFile::read(&HeaderOnly { header, total })?;
        let parameters = HyperParameters::of(&file)?;
        Ok(TrainingModel { file, source: None, drawn, parameters, router: self.router })
    }

    fn keys(&self, vocabulary: usize, context: usize) -> Vec<(String, Value)> {
        let number = |n: usize| Value::U32(u32::try_from(n).unwrap_or(u32::MAX));
        let mut keys = vec![
            ("general.architecture".to_owned(), Value::from("llama")),
            ("general.type".to_owned(), Value::from("model")),
        ];
        let head = self.width / self.heads;
        let mut numbers = vec![
            ("block_count", self.layers),
            ("context_length", context),
            ("embedding_length", self.width),
            ("feed_forward_length", self.hidden),
            ("vocab_size", vocabulary),
            ("attention.head_count", self.heads),
            ("attention.head_count_kv", self.kv_heads),
            ("rope.dimension_count", head),
        ];
        if self.experts[0] > 0 {
            numbers.extend([("expert_count", self.experts[0]), ("expert_used_count", self.experts[1])]);
        }
        keys.extend(numbers.into_iter().map(|(key, n)| (format!("llama.{key}"), number(n))));
        keys.push(("llama.attention.layer_norm_rms_epsilon".to_owned(), Value::F32(1e-5)));
        keys.push(("llama.rope.freq_base".to_owned(), Value::F32(10_000.0)));
        keys
    }

    /// Names, dimensions (the elements of a row first) and beginnings.
    fn tensors(&self, vocabulary: usize) -> Vec<(String, Vec<usize>, Draw)> {
        let normal = |deviation: f32| Draw::Normal { deviation, number: 0 };
        let one = Draw::Constant(1.0);
        // As GPT-2 begins: what is added to the hidden state grows with the root of the number of additions.
        let plain = normal(0.02f32.max(1.0 / (self.width as f32).sqrt() / 2.0).min(0.05));
        let added = match plain {
            Draw::Normal { deviation, .. } => normal(deviation / (2.0 * self.layers as f32).sqrt()),
            constant => constant,
        };
        let (d, h) = (self.width, self.hidden);
        let kv = d / self.heads * self.kv_heads;
        let mut list = vec![("token_embd.weight".to_owned(), vec![d, vocabulary], normal(0.02))];
        for layer in 0..self.layers {
            let mut add = |part: &str, dims: Vec<usize>, draw: Draw| {
                list.push((format!("blk.{layer}.{part}.weight"), dims, draw));
            };
            add("attn_norm", vec![d], one);
            add("attn_q", vec![d, d], plain);
            add("attn_k", vec![d, kv], plain);
            add("attn_v", vec![d, kv], plain);
            add("attn_output", vec![d, d], added);
            add("ffn_norm", vec![d], one);
            match self.experts {
                [0, _] => {
                    add("ffn_gate", vec![d, h], plain);
                    add("ffn_up", vec![d, h], plain);
                    add("ffn_down", vec![h, d], added);
                }
                [count, _] => {
                    add("ffn_gate_inp", vec![d, count], normal(0.02));
                    add("ffn_gate_exps", vec![d, h, count], plain);
                    add("ffn_up_exps", vec![d, h, count], plain);
                    add("ffn_down_exps", vec![h, d, count], added);
                }
            }
        }
        list.push(("output_norm.weight".to_owned(), vec![d], one));
        if !self.tied {
            list.push(("output.weight".to_owned(), vec![d, vocabulary], normal(0.02)));
        }
        list
    }
}

fn tokenizer_keys(data: &VocabularyData) -> Vec<(String, Value)> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let mut keys = vec![
        (key("model"), Value::from(data.model.as_str())),
        (key("pre"), Value::from(data.pre.as_str())),
        (key("tokens"), Value::Array(Array::Strings(data.tokens.clone()))),
        (key("token_type"), Value::Array(Array::I32(data.token_types.clone()))),
        (key("merges"), Value::Array(Array::Strings(data.merges.clone()))),
    ];
    for (name, id) in [("bos_token_id", data.bos), ("eos_token_id", data.eos)] {
        keys.extend(id.map(|id| (key(name), Value::U32(id))));
    }
    keys.extend(data.add_bos.map(|flag| (key("add_bos_token"), Value::Bool(flag))));
    keys.push(("tokenizer.chat_template".to_owned(), Value::from(TEMPLATE)));
    keys
}
