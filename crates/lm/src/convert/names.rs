//! What the tensors of a checkpoint are called in a GGUF file.

use super::config::Naming;

/// Where a tensor of a checkpoint goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Into a tensor of its own.
    Tensor(Target),
    /// Into the matrices of all experts, at this one's place.
    Expert(Target, u64),
    /// Nowhere: it can be computed from the configuration.
    Nowhere,
}

/// A tensor of the converted file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// 0 for the embeddings, then each layer, then the rest: the order of the file.
    pub section: u64,
    pub name: String,
    /// Whether it makes queries or keys, whose rows some architectures order differently.
    pub turned: bool,
    /// Whether the checkpoint holds it transposed.
    pub transposed: bool,
    /// Whether it is the gain of a norm.
    pub gain: bool,
}

/// Parts of a layer: the checkpoint's names and the file's.
const LLAMA: [(&str, &str); 21] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("block_sparse_moe.gate", "ffn_gate_inp"),
    ("mlp.gate", "ffn_gate_inp"),
    ("mlp.shared_expert.gate_proj", "ffn_gate_shexp"),
    ("mlp.shared_expert.up_proj", "ffn_up_shexp"),
    ("mlp.shared_expert.down_proj", "ffn_down_shexp"),
    ("mlp.shared_expert_gate", "ffn_gate_inp_shexp"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];

const GPT2: [(&str, &str); 6] = [
    ("ln_1", "attn_norm"),
    ("ln_2", "ffn_norm"),
    ("attn.c_attn", "attn_qkv"),
    ("attn.c_proj", "attn_output"),
    ("mlp.c_fc", "ffn_up"),
    ("mlp.c_proj", "ffn_down"),
];

const TOP: [(&str, &str); 6] = [
    ("embed_tokens", "token_embd"),
    ("norm", "output_norm"),
    ("lm_head", "output"),
    ("wte", "token_embd"),
    ("wpe", "position_embd"),
    ("ln_f", "output_norm"),
];

const EXPERT: [(&str, &str); 6] = [
    ("w1", "ffn_gate_exps"),
    ("w2", "ffn_down_exps"),
    ("w3", "ffn_up_exps"),
    ("gate_proj", "ffn_gate_exps"),
    ("down_proj", "ffn_down_exps"),
    ("up_proj", "ffn_up_exps"),
];

fn find(table: &[(&str, &'static str)], name: &str) -> Option<&'static str> {
    table.iter().find(|(from, _)| *from == name).map(|(_, to)| *to)
}

/// A number as checkpoints write it, without signs or leading zeros.
fn index(text: &str) -> Option<u64> {
    let n: u64 = text.parse().ok()?;
    (n.to_string() == text).then_some(n)
}

/// Where the tensor `name` goes; `None` if the family has no such tensor.
pub(super) fn place(naming: Naming, tied: bool, name: &str) -> Option<Place> {
    // Models that see pictures keep their decoder below a name of its own; the rest of them is left out.
    if name.starts_with("vision_tower.") || name.starts_with("multi_modal_projector.") {
        return Some(Place::Nowhere);
    }
    let name = name.strip_prefix("language_model.").unwrap_or(name);
    let name = name.strip_prefix("model.").or(name.strip_prefix("transformer.")).unwrap_or(name);
    let name = name.strip_prefix("language_model.").unwrap_or(name);
    let layers = if naming == Naming::Gpt2 { "h." } else { "layers." };
    let Some(rest) = name.strip_prefix(layers) else {
        let (part, kind) = name.rsplit_once('.')?;
        if part == "lm_head" && tied {
            return Some(Place::Nowhere);
        }
        let to = find(&TOP, part)?;
        let section = if to == "token_embd" || to == "position_embd" { 0 } else { u64::MAX };
        let gain = to == "output_norm" && kind == "weight";
        let name = format!("{to}.{kind}");
        return matches!(kind, "weight" | "bias").then_some(Place::Tensor(Target {
            section,
            name,
            turned: false,
            transposed: false,
            gain,
        }));
    };
    let (layer, rest) = rest.split_once('.')?;
    let layer = index(layer)?;
    if rest.ends_with("rotary_emb.inv_freq")
        || naming == Naming::Gpt2 && matches!(rest, "attn.bias" | "attn.masked_bias")
    {
        return Some(Place::Nowhere);
    }
    let (part, kind) = rest.rsplit_once('.')?;
    if !matches!(kind, "weight" | "bias") {
        return None;
    }
    let target = |to: &str| Target {
        section: layer.saturating_add(1),
        name: format!("blk.{layer}.{to}.{kind}"),
        turned: matches!(to, "attn_q" | "attn_k"),
        transposed: naming == Naming::Gpt2 && kind == "weight" && !to.ends_with("norm"),
        gain: to.ends_with("norm") && kind == "weight",
    };
    if naming == Naming::Gpt2 {
        return find(&GPT2, part).map(|to| Place::Tensor(target(to)));
    }
    for experts in ["block_sparse_moe.experts.", "mlp.experts."] {
        if let Some((expert, part)) = part.strip_prefix(experts).and_then(|rest| rest.split_once('.')) {
            return Some(Place::Expert(target(find(&EXPERT, part)?), index(expert)?));
        }
    }
    let to = match part {
        "post_attention_layernorm" if naming == Naming::Gemma => "post_attention_norm",
        part => find(&LLAMA, part)?,
    };
    Some(Place::Tensor(target(to)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(naming: Naming, tied: bool, from: &str) -> Option<String> {
        match place(naming, tied, from)? {
            Place::Tensor(target) => Some(target.name),
            Place::Expert(target, expert) => Some(format!("{} {expert}", target.name)),
            Place::Nowhere => Some(String::new()),
        }
    }

    #[test]
    fn names_of_the_families() {
        let check = |naming, from: &str, to: Option<&str>| {
            assert_eq!(name(naming, false, from).as_deref(), to, "{from}");
        };
        check(Naming::Llama, "model.layers.12.self_attn.q_proj.bias", Some("blk.12.attn_q.bias"));
        check(Naming::Llama, "model.layers.0.post_attention_layernorm.weight", Some("blk.0.ffn_norm.weight"));
        check(
            Naming::Gemma,
            "language_model.model.layers.0.post_attention_layernorm.weight",
            Some("blk.0.post_attention_norm.weight"),
        );
        check(Naming::Gemma, "vision_tower.encoder.layers.0.weight", Some(""));
        check(
            Naming::Llama,
            "model.layers.3.block_sparse_moe.experts.7.w2.weight",
            Some("blk.3.ffn_down_exps.weight 7"),
        );
        check(Naming::Llama, "model.layers.3.mlp.gate.weight", Some("blk.3.ffn_gate_inp.weight"));
        check(Naming::Gpt2, "h.1.attn.c_attn.weight", Some("blk.1.attn_qkv.weight"));
        check(Naming::Gpt2, "transformer.h.1.attn.bias", Some(""));
        check(Naming::Gpt2, "wpe.weight", Some("position_embd.weight"));
        check(Naming::Llama, "lm_head.weight", Some("output.weight"));
        assert_eq!(name(Naming::Llama, true, "lm_head.weight").as_deref(), Some(""));
        for strange in [
            "model.layers.x.mlp.gate.weight",
            "model.layers.01.mlp.gate.weight",
            "x",
            "",
            "model.layers.1",
            "model.layers.0.mlp.up_proj.scales",
        ] {
            check(Naming::Llama, strange, None);
        }
    }
}
