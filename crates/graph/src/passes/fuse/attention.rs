use super::Editor;
use super::product::product;
use crate::{
    AttentionAttributes, BinaryOp, Graph, GraphError, NodeId, Op, Pass, QkOutput, TensorType, ValueId,
};

/// Scaled dot-product attention: `softmax(scale·q·kᵀ + mask)·v`.
///
/// The scale may be a product or division anywhere before the mask, also on q and k by themselves; k may be
/// transposed in any way. When q, k and v are split into heads by reshape and transposition, the fused operator
/// reads the tokens as they are (`[batch, tokens, heads·size]`) and these movements vanish.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttentionFusion;

impl Pass for AttentionFusion {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn run(&self, graph: &mut Graph) -> Result<usize, GraphError> {
        let mut e = Editor::new(graph);
        for id in e.ids() {
            if e.get(id).is_some()
                && let Some(found) = find(&e, id)
            {
                emit(&mut e, id, found);
            }
        }
        e.finish()
    }
}

/// A value that holds `[batch, heads, tokens, size]` in some order of its axes.
struct Heads {
    /// As `[batch, heads, tokens, size]` in memory.
    by_head: Option<ValueId>,
    /// As `[batch, tokens, heads, size]` in memory.
    by_token: Option<ValueId>,
}

struct Found {
    q: Heads,
    k: Heads,
    v: Heads,
    mask: Option<ValueId>,
    scale: f64,
    batch: usize,
    heads: usize,
    q_tokens: usize,
    kv_tokens: usize,
    size: usize,
    v_size: usize,
}

/// The operands of a plain matrix product, each with whether its last two axes are read transposed.
fn plain_product(e: &Editor, id: NodeId) -> Option<(ValueId, bool, ValueId, bool, f64)> {
    let node = e.node(id);
    let Op::MatMul(a) = &node.op else { return None };
    let plain = a.activation.is_none() && node.inputs.len() == 2;
    plain.then_some((node.input(0)?, a.trans_a, node.input(1)?, a.trans_b, a.alpha.into()))
}

fn find(e: &Editor, id: NodeId) -> Option<Found> {
    let (weights, false, v, v_transposed, 1.0) = plain_product(e, id)? else { return None };
    let out_dims = e.dims(e.node(id).out())?;
    let rank = out_dims.len();
    if !e.is_f32(v) || rank != 3 && rank != 4 || !e.private(weights) {
        return None;
    }
    let softmax = e.maker(weights)?;
    let Op::Softmax { axis, log: false } = softmax.op else { return None };
    if axis != -1 && axis != rank as i64 - 1 {
        return None;
    }
    let mut scores = softmax.input(0).filter(|&s| e.private(s))?;
    let score_dims = e.dims(scores)?;
    if score_dims.len() != rank {
        return None;
    }
    let mut scale = 1.0;
    let mut mask = None;
    // Outermost first: the mask, then factors, then the product.
    let product_id = loop {
        let (maker, node) = e.producer(scores)?;
        let operands = (node.input(0), node.input(1));
        match (&node.op, operands) {
            (Op::MatMul(_), _) => break maker,
            (Op::Binary(BinaryOp::Add), (Some(a), Some(b))) if mask.is_none() && scale == 1.0 => {
                let is_score = |s: ValueId| e.private(s) && e.dims(s).as_ref() == Some(&score_dims);
                let by_product = |s: ValueId| {
                    e.maker(s).is_some_and(|n| {
                        matches!(n.op, Op::MatMul(_) | Op::Binary(BinaryOp::Mul | BinaryOp::Div))
                    })
                };
                let (s, m) = if is_score(a) && by_product(a) {
                    (a, b)
                } else if is_score(b) && by_product(b) {
                    (b, a)
                } else {
                    return None;
                };
                (scores, mask) = (s, Some(m));
            }
            (Op::Binary(BinaryOp::Mul), (Some(a), Some(b))) => {
                let (s, c) = match (e.scalar(a), e.scalar(b)) {
                    (None, Some(c)) => (a, c),
                    (Some(c), None) => (b, c),
                    _ => return None,
                };
                scale *= f64::from(c);
                scores = s;
            }
            (Op::Binary(BinaryOp::Div), (Some(a), Some(b))) => {
                scale /= f64::from(e.scalar(b)?);
                scores = a;
            }
            _ => return None,
        }
        if !e.private(scores) {
            return None;
        }
    };
    let (q, q_transposed, k, k_transposed, alpha) = plain_product(e, product_id)?;
    scale *= alpha;
    let factor = |v: ValueId, scale: &mut f64| {
        let p = product(e, v, &[]);
        match p.factors[..] {
            [x] if e.same_dims(x, v) => {
                *scale *= p.scale;
                x
            }
            _ => v,
        }
    };
    let (q, k) = (factor(q, &mut scale), factor(k, &mut scale));
    let lead = |dims: &[usize]| if rank == 4 { (dims[0], dims[1]) } else { (1, dims[0]) };
    let (batch, heads) = lead(&out_dims);
    let (q_tokens, v_size) = (out_dims[rank - 2], out_dims[rank - 1]);
    let kv_tokens = score_dims[rank - 1];
    let q_dims = e.dims(q)?;
    if q_dims.len() != rank || lead(&q_dims) != (batch, heads) || lead(&score_dims) != (batch, heads) {
        return None;
    }
    let size = q_dims[if q_transposed { rank - 2 } else { rank - 1 }];
    if [batch, heads, q_tokens, kv_tokens, size, v_size].contains(&0) {
        return None;
    }
    if let Some(m) = mask {
        let dims = e.dims(m)?;
        let full = [batch, heads, q_tokens, kv_tokens];
        // Three-dimensional scores have their heads and batch in one axis, which a mask cannot follow.
        let fits = e.is_f32(m)
            && dims.len() <= rank
            && dims.last() == Some(&kv_tokens)
            && dims.iter().rev().zip(full.iter().rev()).all(|(&d, &f)| d == 1 || d == f);
        if !fits {
            return None;
        }
    }
    let q = heads_of(e, q, [batch, heads, q_tokens, size], q_transposed)?;
    let k = heads_of(e, k, [batch, heads, kv_tokens, size], !k_transposed)?;
    let v = heads_of(e, v, [batch, heads, kv_tokens, v_size], v_transposed)?;
    Some(Found { q, k, v, mask, scale, batch, heads, q_tokens, kv_tokens, size, v_size })
}

/// Follows `v`, which holds `dims` (with the last two exchanged when `transposed`), back through transpositions and
/// reshapes that only add or drop axes of size 1.
fn heads_of(e: &Editor, v: ValueId, dims: [usize; 4], transposed: bool) -> Option<Heads> {
    let [batch, heads, tokens, size] = dims;
    let axes: [usize; 4] = if transposed { [0, 1, 3, 2] } else { [0, 1, 2, 3] };
    // Axes of [batch, heads, tokens, size] in the order of v's own axes, without those of size 1.
    let mut order: Vec<usize> = axes.into_iter().filter(|&a| dims[a] != 1).collect();
    let own: Vec<usize> = e.dims(v)?.into_iter().filter(|&d| d != 1).collect();
    if own != order.iter().map(|&a| dims[a]).collect::<Vec<_>>() {
        return None;
    }
    let sorted = |wanted: [usize; 4], order: &[usize]| {
        wanted.into_iter().filter(|&a| dims[a] != 1).eq(order.iter().copied())
    };
    let mut found = Heads { by_head: None, by_token: None };
    let mut at = v;
    for _ in 0..8 {
        if sorted([0, 1, 2, 3], &order) {
            found.by_head.get_or_insert(at);
        }
        if sorted([0, 2, 1, 3], &order) {
            found.by_token.get_or_insert(at);
        }
        let Some(maker) = e.maker(at) else { break };
        let Some(source) = maker.input(0) else { break };
        let Some(source_dims) = e.dims(source) else { break };
        let solid: Vec<usize> = (0..source_dims.len()).filter(|&a| source_dims[a] != 1).collect();
        match &maker.op {
            Op::Reshape { .. } => {
                let sizes: Vec<usize> = solid.iter().map(|&a| source_dims[a]).collect();
                if sizes != order.iter().map(|&a| dims[a]).collect::<Vec<_>>() {
                    break;
                }
            }
            Op::Transpose { perm: Some(perm) } => {
                // Result axis i (of those not 1) is source axis perm[i].
                let moved: Vec<usize> = perm.iter().copied().filter(|&p| source_dims[p] != 1).collect();
                let mut before = vec![0; order.len()];
                for (i, p) in moved.iter().enumerate() {
                    before[solid.iter().position(|s| s == p)?] = order[i];
                }
                order = before;
            }
            _ => break,
        }
        at = source;
    }
    let _ = (batch, heads, tokens, size);
    (found.by_head.is_some() || found.by_token.is_some()).then_some(found)
}

fn emit(e: &mut Editor, id: NodeId, f: Found) {
    let name = e.node(id).name.clone();
    let out = e.node(id).out();
    let Some(out_dims) = e.dims(out) else { return };
    let dtype = crate::DType::F32;
    let mut attributes = AttentionAttributes {
        causal: false,
        q_num_heads: 0,
        kv_num_heads: 0,
        scale: Some(f.scale as f32),
        softcap: 0.0,
        qk_output: QkOutput::Raw,
        softmax_precision: None,
    };
    let mut operands = Vec::new();
    let parts = [(&f.q, f.q_tokens, f.size), (&f.k, f.kv_tokens, f.size), (&f.v, f.kv_tokens, f.v_size)];
    let by_token = parts.iter().all(|(h, ..)| h.by_token.is_some());
    let by_head = parts.iter().all(|(h, ..)| h.by_head.is_some());
    if by_token {
        attributes.q_num_heads = f.heads;
        attributes.kv_num_heads = f.heads;
        for (h, tokens, size) in parts {
            let Some(v) = h.by_token else { return };
            let dims = [f.batch, tokens, f.heads * size];
            operands.push(Some(e.insert_reshape(id, &format!("{name}.tokens"), v, &dims)));
        }
    } else if by_head {
        for (h, tokens, size) in parts {
            let Some(v) = h.by_head else { return };
            let dims = [f.batch, f.heads, tokens, size];
            operands.push(Some(e.insert_reshape(id, &format!("{name}.heads"), v, &dims)));
        }
    } else {
        // One of them exists only by token, another only by head: move the former, which the product did, too.
        for (h, tokens, size) in parts {
            let dims = [f.batch, f.heads, tokens, size];
            let v = match (h.by_head, h.by_token) {
                (Some(v), _) => e.insert_reshape(id, &format!("{name}.heads"), v, &dims),
                (None, Some(v)) => {
                    let dims = [f.batch, tokens, f.heads, size];
                    let v = e.insert_reshape(id, &format!("{name}.tokens"), v, &dims);
                    e.insert_transpose(id, &format!("{name}.heads"), v, &[0, 2, 1, 3])
                }
                (None, None) => return,
            };
            operands.push(Some(v));
        }
    }
    if let Some(m) = f.mask {
        // At least two dimensions, as the operator wants it.
        let dims = e.dims(m).unwrap_or_default();
        let m = if dims.len() < 2 {
            let dims = [1, dims.last().copied().unwrap_or(1)];
            e.insert_reshape(id, &format!("{name}.mask"), m, &dims)
        } else {
            m
        };
        operands.push(Some(m));
    }
    let op = Op::Attention(attributes);
    if !by_token {
        let ty = TensorType::fixed(dtype, &[f.batch, f.heads, f.q_tokens, f.v_size]);
        let y = e.insert_with(id, &format!("{name}.attention"), op, operands, vec![ty])[0];
        let shape = e.add_dims(&format!("{name}.shape"), &out_dims);
        e.set_all(id, Op::Reshape { allow_zero: true }, &[y, shape]);
        return;
    }
    let ty = TensorType::fixed(dtype, &[f.batch, f.q_tokens, f.heads * f.v_size]);
    let y = e.insert_with(id, &format!("{name}.attention"), op, operands, vec![ty])[0];
    let split = [f.batch, f.q_tokens, f.heads, f.v_size];
    // The usual next step puts the heads back beside each other, which they are already.
    if let Some(next) = e.only_reader(out)
        && let Op::Transpose { perm: Some(perm) } = &e.node(next).op
        && out_dims.len() == 4
        && *perm == [0, 2, 1, 3]
    {
        let shape = e.add_dims(&format!("{name}.shape"), &split);
        e.set_all(next, Op::Reshape { allow_zero: true }, &[y, shape]);
        return;
    }
    let y = e.insert_reshape(id, &format!("{name}.split"), y, &split);
    if out_dims.len() == 4 {
        e.set_all(id, Op::Transpose { perm: Some(vec![0, 2, 1, 3]) }, &[y]);
    } else {
        let y = e.insert_transpose(id, &format!("{name}.heads"), y, &[0, 2, 1, 3]);
        let shape = e.add_dims(&format!("{name}.out"), &out_dims);
        e.set_all(id, Op::Reshape { allow_zero: true }, &[y, shape]);
    }
}
