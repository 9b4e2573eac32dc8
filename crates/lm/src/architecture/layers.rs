//! One block of a decoder: attention, then a feed-forward network or experts.

use lightering_graph::{
    BinaryOp, CachedAttentionAttributes, DType, HeadPiece, LmOp, Op, RopeScaling, RouteScoring, TensorType,
    UnaryOp, ValueId,
};

use super::family::Positions;
use super::{Builder, CompressedParameters, Matrix};
use crate::{Error, Result};

/// Queries, keys and values of a layer.
struct Projected {
    q: ValueId,
    k: ValueId,
    v: ValueId,
}

impl Builder<'_> {
    pub(super) fn layer(&mut self, layer: usize, x: ValueId) -> Result<ValueId> {
        let d = self.p.width;
        let name = |part: &str| format!("blk.{layer}.{part}");
        let early = match self.family.early_router && self.p.experts.is_some() {
            true => Some(x),
            false => None,
        };
        let mut y = x;
        // OLMo 2 normalises only what a half layer adds.
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
        let x = self.add(name("after attention"), x, y);
        let mut y = x;
        if self.has(&name("ffn_norm.weight")) {
            y = self.norm(&name("ffn_norm"), x, d)?;
        }
        y = match &self.p.experts {
            Some(e) if layer >= e.leading_dense => self.experts(layer, y, early)?,
            _ => self.feed_forward(&name("ffn"), y, None)?,
        };
        for after in ["post_ffw_norm", "ffn_post_norm"] {
            if self.has(&name(&format!("{after}.weight"))) {
                y = self.norm(&name(after), y, d)?;
            }
        }
        y = self.scaled(&name("feed-forward share"), y, self.p.residual_scale);
        Ok(self.add(name("output"), x, y))
    }

    fn attention(&mut self, layer: usize, x: ValueId) -> Result<ValueId> {
        if let Some(compressed) = self.p.compressed {
            return self.compressed_attention(layer, x, compressed);
        }
        let name = |part: &str| format!("blk.{layer}.{part}");
        let (heads, kv_heads) = (self.p.heads[layer], self.p.kv_heads[layer]);
        let (key_len, value_len) = (self.p.key_len, self.p.value_len);
        let Projected { mut q, mut k, v } = self.projections(layer, x)?;
        q = self.head_norm(&name("attn_q_norm"), q, heads, key_len)?;
        k = self.head_norm(&name("attn_k_norm"), k, kv_heads, key_len)?;
        let local = self.p.has_window(layer);
        let turned = local || !self.family.rope_only_in_windows || self.p.window.is_none();
        if self.family.positions != Positions::Learned && turned {
            let angles = self.rope_angles(layer, local)?;
            let interleaved = self.family.positions == Positions::RopeNeighbours;
            q = self.lm(name("q turned"), LmOp::Rope { heads, offset: 0, interleaved }, &[q, angles]);
            k = self.lm(
                name("k turned"),
                LmOp::Rope { heads: kv_heads, offset: 0, interleaved },
                &[k, angles],
            );
        }
        let keys = self.cached(&name("keys"), k, false, kv_heads, key_len, local)?;
        let values = self.cached(&name("values"), v, true, kv_heads, value_len, local)?;
        let pages = if local { self.window_pages } else { self.pages };
        let attributes = CachedAttentionAttributes {
            format: self.cache.format,
            heads,
            kv_heads,
            key_len,
            value_len,
            page_len: self.cache.page_len,
            scale: self.p.attention_scale,
            softcap: self.p.attention_softcap,
            window: self.p.window.filter(|_| local),
        };
        let mut inputs = vec![q, keys, values, self.positions, pages];
        inputs.extend(self.optional_vector(&name("attn_sinks.weight"), heads)?);
        let y = self.lm(name("attention"), LmOp::CachedAttention(attributes), &inputs);
        self.linear(&name("attn_output"), y, heads * value_len, self.p.width)
    }

    /// Multi-head latent attention: keys and values of all heads come from one compressed row, beside which a key has
    /// turned elements that all heads share.
    ///
    /// Where the file has the matrices of keys and values apart, the cache holds the compressed row: queries pass
    /// through the matrix of keys instead, and the weighted sum of rows through that of values. Where it has them as
    /// one, the cache holds keys and values of each head.
    fn compressed_attention(
        &mut self,
        layer: usize,
        x: ValueId,
        CompressedParameters { rank, key_len, value_len }: CompressedParameters,
    ) -> Result<ValueId> {
        let (d, heads, turned) = (self.p.width, self.p.heads[layer], self.p.rope_dims);
        let plain = key_len - turned;
        let name = |part: &str| format!("blk.{layer}.{part}");
        let mut q = x;
        let mut q_len = d;
        let mut q_matrix = "attn_q";
        if self.has(&name("attn_q_a.weight")) {
            let w = self.matrix(&name("attn_q_a.weight"), d, 0)?;
            q_len = w.n;
            q = self.product(&name("attn_q_a"), x, w, None);
            q = self.norm(&name("attn_q_a_norm"), q, q_len)?;
            q_matrix = "attn_q_b";
        }
        q = self.linear(&name(q_matrix), q, q_len, heads * key_len)?;
        let down = name("attn_kv_a_mqa.weight");
        let w = self.matrix_part(&down, d, rank + turned, 0, rank)?;
        let row = self.product(&name("compressed"), x, w, None);
        let row = self.norm(&name("attn_kv_a_norm"), row, rank)?;
        let w = self.matrix_part(&down, d, rank + turned, rank, turned)?;
        let shared = self.product(&name("shared key"), x, w, None);
        let angles = self.rope_angles(layer, false)?;
        let interleaved = self.family.positions == Positions::RopeNeighbours;
        let rope = LmOp::Rope { heads, offset: plain, interleaved };
        q = self.lm(name("q turned"), rope, &[q, angles]);
        let rope = LmOp::Rope { heads: 1, offset: 0, interleaved };
        let shared = self.lm(name("shared key turned"), rope, &[shared, angles]);
        let piece = |input, shared, offset, len| HeadPiece { input, shared, offset, len };
        let absorbed = !self.has(&name("attn_kv_b.weight"));
        let (k, v, kv_heads, cached_key, cached_value);
        if absorbed {
            let w = self.head_matrices(&name("attn_k_b.weight"), plain, rank, heads)?;
            let op = LmOp::HeadMatMul { format: w.format, heads };
            let through = self.lm(name("q through keys"), op, &[q, w.value]);
            let pieces = vec![piece(0, false, 0, rank), piece(1, false, plain, turned)];
            q = self.lm(name("q joined"), LmOp::JoinHeads { heads, pieces }, &[through, q]);
            let pieces = vec![piece(0, true, 0, rank), piece(1, true, 0, turned)];
            k = self.lm(name("k joined"), LmOp::JoinHeads { heads: 1, pieces }, &[row, shared]);
            v = row;
            (kv_heads, cached_key, cached_value) = (1, rank + turned, rank);
        } else {
            let both = self.linear(&name("attn_kv_b"), row, rank, heads * (plain + value_len))?;
            let pieces = vec![piece(0, false, 0, plain), piece(1, true, 0, turned)];
            k = self.lm(name("k joined"), LmOp::JoinHeads { heads, pieces }, &[both, shared]);
            let pieces = vec![piece(0, false, plain, value_len)];
            v = self.lm(name("v apart"), LmOp::JoinHeads { heads, pieces }, &[both]);
            (kv_heads, cached_key, cached_value) = (heads, key_len, value_len);
        }
        let keys = self.cached(&name("keys"), k, false, kv_heads, cached_key, false)?;
        let values = self.cached(&name("values"), v, true, kv_heads, cached_value, false)?;
        let attributes = CachedAttentionAttributes {
            format: self.cache.format,
            heads,
            kv_heads,
            key_len: cached_key,
            value_len: cached_value,
            page_len: self.cache.page_len,
            scale: self.p.attention_scale,
            softcap: self.p.attention_softcap,
            window: None,
        };
        let inputs = [q, keys, values, self.positions, self.pages];
        let mut y = self.lm(name("attention"), LmOp::CachedAttention(attributes), &inputs);
        if absorbed {
            let w = self.head_matrices(&name("attn_v_b.weight"), rank, value_len, heads)?;
            let op = LmOp::HeadMatMul { format: w.format, heads };
            y = self.lm(name("values of heads"), op, &[y, w.value]);
        }
        self.linear(&name("attn_output"), y, heads * value_len, d)
    }

    /// Queries, keys and values: of three matrices, or of one that holds them one below the other.
    fn projections(&mut self, layer: usize, x: ValueId) -> Result<Projected> {
        let d = self.p.width;
        let name = |part: &str| format!("blk.{layer}.{part}");
        let sizes = [
            self.p.heads[layer] * self.p.key_len,
            self.p.kv_heads[layer] * self.p.key_len,
            self.p.kv_heads[layer] * self.p.value_len,
        ];
        let mut parts = Vec::new();
        if self.has(&name("attn_qkv.weight")) {
            let total = sizes.iter().sum();
            let mut first = 0;
            for (n, part) in sizes.into_iter().zip(["q", "k", "v"]) {
                let w = self.matrix_part(&name("attn_qkv.weight"), d, total, first, n)?;
                let bias = match self.has(&name("attn_qkv.bias")) {
                    true => Some(self.vector_part(&name("attn_qkv.bias"), total, first, n)?),
                    false => None,
                };
                parts.push(self.product(&name(part), x, w, bias));
                first += n;
            }
        } else {
            for (n, part) in sizes.into_iter().zip(["attn_q", "attn_k", "attn_v"]) {
                parts.push(self.linear(&name(part), x, d, n)?);
            }
        }
        Ok(Projected { q: parts[0], k: parts[1], v: parts[2] })
    }

    /// Normalises each head, or all of them together, where the file has a norm for it.
    fn head_norm(&mut self, name: &str, x: ValueId, heads: usize, len: usize) -> Result<ValueId> {
        let weight = format!("{name}.weight");
        let Some(t) = self.file.tensor(&weight) else { return Ok(x) };
        if t.dims.first() == Some(&(len as u64)) {
            let split = self.reshaped(format!("{name} by head"), x, len);
            let y = self.norm(name, split, len)?;
            return Ok(self.reshaped(format!("{name} together"), y, heads * len));
        }
        self.norm(name, x, heads * len)
    }

    fn rope_angles(&mut self, layer: usize, local: bool) -> Result<ValueId> {
        let base = match self.p.rope_base_local {
            Some(base) if local => base,
            _ => self.p.rope_base,
        };
        // Where local layers have a base of their own, they were not stretched to longer contexts.
        let stretched = !(local && self.p.rope_base_local.is_some());
        let key = (base.to_bits(), stretched);
        if let Some((_, angles)) = self.angles.iter().find(|(k, _)| *k == key) {
            return Ok(*angles);
        }
        let dims = self.p.rope_dims;
        let scaling = if stretched { self.p.rope_scaling } else { RopeScaling::None };
        let mut inputs = vec![self.positions];
        for name in ["rope_freqs.weight".to_owned(), format!("blk.{layer}.rope_freqs.weight")] {
            if inputs.len() == 1 && self.has(&name) {
                inputs.push(self.vector(&name, dims / 2)?);
            }
        }
        if inputs.len() == 1 && self.has("rope_factors_short.weight") {
            // Phi-3 has factors for contexts beyond the one it was first trained on, and others for those within.
            let key = format!("{}.rope.scaling.original_context_length", self.p.architecture);
            let original = self.file.metadata.get_u64(&key)?.unwrap_or(u64::MAX);
            let long = self.cache.context as u64 > original;
            let which = if long { "rope_factors_long.weight" } else { "rope_factors_short.weight" };
            inputs.push(self.vector(which, dims / 2)?);
        }
        let magnitude = if stretched { self.p.rope_magnitude } else { 1.0 };
        let op = LmOp::RopeAngles { dims, base, scaling, magnitude };
        let angles = self.lm(format!("angles of base {base}"), op, &inputs);
        self.angles.push((key, angles));
        Ok(angles)
    }

    /// A cache of rows, with the rows of this step in it.
    fn cached(
        &mut self,
        name: &str,
        rows: ValueId,
        values: bool,
        heads: usize,
        len: usize,
        local: bool,
    ) -> Result<ValueId> {
        let format = self.cache.format;
        let (pages, count) = match local && self.apart {
            true => (self.window_pages, self.cache.window_pages),
            false => (self.pages, self.cache.pages),
        };
        let head = format.head_bytes(len).ok_or_else(|| {
            let what = format!("heads of {len} elements, which are no whole number of blocks of 32");
            Error::unsupported("a cache of 8 bits", what)
        })?;
        let page = head * heads * self.cache.page_len;
        let ty = TensorType::fixed(DType::U8, &[count, page]);
        let state = self.graph.add_state(format!("{name} cache"), ty, None);
        let op = LmOp::CacheStore { values, format, heads, page_len: self.cache.page_len };
        Ok(self.lm(name, op, &[state, rows, self.positions, pages]))
    }

    /// `down · (activation(gate·x) ∘ up·x)`, or without a gate `down · activation(up·x)`.
    fn feed_forward(&mut self, name: &str, x: ValueId, suffix: Option<&str>) -> Result<ValueId> {
        let d = self.p.width;
        let suffix = suffix.unwrap_or_default();
        let part = |which: &str| format!("{name}_{which}{suffix}");
        let gated = self.has(&format!("{}.weight", part("gate")));
        let (inner, hidden) = if gated {
            let gate_name = part("gate");
            let gate = self.linear(&gate_name, x, d, 0)?;
            let n = self.rows_of(&format!("{gate_name}.weight"))?;
            let up = self.linear(&part("up"), x, d, n)?;
            (self.gated(name, suffix, gate, up), n)
        } else {
            let up_name = format!("{}.weight", part("up"));
            let n = self.rows_of(&up_name)?;
            let down = self.tensor(&format!("{}.weight", part("down")))?;
            let hidden = down.row_len() as usize;
            if n == 2 * hidden {
                // Gate and up in one matrix, the gate first.
                let gate = self.matrix_part(&up_name, d, n, 0, hidden)?;
                let gate = self.product(&part("gate"), x, gate, None);
                let up = self.matrix_part(&up_name, d, n, hidden, hidden)?;
                let up = self.product(&part("up"), x, up, None);
                (self.gated(name, suffix, gate, up), hidden)
            } else {
                let up = self.linear(&part("up"), x, d, n)?;
                (self.unary(format!("{name} activation{suffix}"), self.family.activation, up), n)
            }
        };
        self.linear(&part("down"), inner, hidden, d)
    }

    fn gated(&mut self, name: &str, suffix: &str, gate: ValueId, up: ValueId) -> ValueId {
        let gate = self.unary(format!("{name} activation{suffix}"), self.family.activation, gate);
        self.node(format!("{name} gated{suffix}"), Op::Binary(BinaryOp::Mul), &[gate, up])
    }

    fn rows_of(&self, name: &str) -> Result<usize> {
        Ok(usize::try_from(self.tensor(name)?.rows()).unwrap_or(usize::MAX))
    }

    fn experts(&mut self, layer: usize, x: ValueId, early: Option<ValueId>) -> Result<ValueId> {
        let d = self.p.width;
        let e = self.p.experts.clone().expect("only called for models with experts");
        let name = |part: &str| format!("blk.{layer}.{part}");
        let scores = self.linear(&name("ffn_gate_inp"), early.unwrap_or(x), d, e.count)?;
        let route = LmOp::Route {
            k: e.used,
            scoring: e.scoring,
            normalise: e.normalise && e.scoring != RouteScoring::SoftmaxOfChosen,
            scale: e.scale,
        };
        let mut inputs = vec![scores];
        inputs.extend(self.optional_vector(&name("exp_probs_b.bias"), e.count)?);
        let route = self.graph.add_node(name("route"), Op::Lm(Box::new(route)), &inputs, 2);
        let gate = self.expert_matrices(&name("ffn_gate_exps.weight"), d, 0, e.count)?;
        let Matrix { n: hidden, .. } = gate;
        let up = self.expert_matrices(&name("ffn_up_exps.weight"), d, hidden, e.count)?;
        let down = self.expert_matrices(&name("ffn_down_exps.weight"), hidden, d, e.count)?;
        let op = LmOp::Experts {
            formats: [gate.format, up.format, down.format],
            activation: self.family.activation,
        };
        let inputs = [x, route[0], route[1], gate.value, up.value, down.value];
        let mut y = self.lm(name("experts"), op, &inputs);
        if self.has(&name("ffn_up_shexp.weight")) {
            let mut shared = self.feed_forward(&name("ffn"), x, Some("_shexp"))?;
            if self.has(&name("ffn_gate_inp_shexp.weight")) {
                let gate = self.shared_gate(&name("ffn_gate_inp_shexp"), x)?;
                let gate = self.unary(name("shared gate"), UnaryOp::Sigmoid, gate);
                shared = self.node(name("shared expert"), Op::Binary(BinaryOp::Mul), &[shared, gate]);
            }
            y = self.add(name("with shared expert"), y, shared);
        }
        Ok(y)
    }

    /// A gate of one value for each row: files store its weight as a vector.
    fn shared_gate(&mut self, name: &str, x: ValueId) -> Result<ValueId> {
        self.linear(name, x, self.p.width, 1)
    }
}
