//! Scaled dot-product attention.

use super::add_to;
use crate::ops::attention::{AttentionOperands, AttentionShape, bias_of};
use crate::ops::real::Real;

/// Results of [`attention_grad`], as far as they are wanted, laid out as the operands.
#[derive(Debug)]
pub struct AttentionGradients<'a, T> {
    /// Of the queries.
    pub query: Option<&'a mut [T]>,
    /// Of the keys.
    pub key: Option<&'a mut [T]>,
    /// Of the values.
    pub value: Option<&'a mut [T]>,
}

/// Elements of scratch that [`attention_grad`] needs.
pub fn attention_grad_scratch_len(shape: &AttentionShape) -> usize {
    3 * shape.keys()
}

/// Gradients of attention without a cache; its probabilities are computed anew. `scratch` has
/// [`attention_grad_scratch_len`] elements.
pub fn attention_grad<T: Real>(
    shape: &AttentionShape,
    operands: &AttentionOperands<'_, T>,
    dy: &[T],
    results: &mut AttentionGradients<'_, T>,
    scratch: &mut [f64],
) {
    let keys = shape.keys();
    for out in [&mut results.query, &mut results.key, &mut results.value].into_iter().flatten() {
        out.fill(T::from_f64(0.0));
    }
    let (p, rest) = scratch.split_at_mut(keys);
    let (bend, dp) = rest.split_at_mut(keys);
    let dp = &mut dp[..keys];
    let (output, group) = (shape.output(), shape.query.heads / shape.key.heads.max(1));
    let (scale, cap) = (f64::from(shape.scale), f64::from(shape.softcap));
    for row in 0..shape.batch * shape.query.heads * shape.query.sequence {
        let (batch, head, position) = shape.query.locate(row);
        let key_head = head / group.max(1);
        let q = &operands.query[shape.query.offset(batch, head, position)..][..shape.query.size];
        let g = &dy[output.offset(batch, head, position)..][..output.size];
        let key = |j: usize| shape.key.offset(batch, key_head, j);
        let value = |j: usize| shape.value.offset(batch, key_head, j);
        let mut largest = f64::NEG_INFINITY;
        for j in 0..keys {
            let k = &operands.key[key(j)..][..shape.query.size];
            let mut score = scale * q.iter().zip(k).map(|(q, k)| q.to_f64() * k.to_f64()).sum::<f64>();
            bend[j] = 1.0;
            if cap > 0.0 {
                let t = (score / cap).tanh();
                (score, bend[j]) = (cap * t, 1.0 - t * t);
            }
            let bias = f64::from(bias_of(shape, operands, [batch, head, position, j]));
            p[j] = if bias == f64::NEG_INFINITY { bias } else { score + bias };
            largest = largest.max(p[j]);
        }
        // A query that sees no key has a result of zeros whatever its operands are.
        if largest == f64::NEG_INFINITY {
            continue;
        }
        p.iter_mut().for_each(|s| *s = (*s - largest).exp());
        let total: f64 = p.iter().sum();
        let mut along = 0.0;
        for j in 0..keys {
            p[j] /= total;
            let v = &operands.value[value(j)..][..output.size];
            dp[j] = g.iter().zip(v).map(|(g, v)| g.to_f64() * v.to_f64()).sum();
            along += p[j] * dp[j];
        }
        for j in 0..keys {
            let ds = p[j] * (dp[j] - along) * bend[j] * scale;
            if let Some(dq) = results.query.as_deref_mut() {
                let dq = &mut dq[shape.query.offset(batch, head, position)..][..shape.query.size];
                dq.iter_mut().zip(&operands.key[key(j)..]).for_each(|(to, k)| add_to(to, ds * k.to_f64()));
            }
            if let Some(dk) = results.key.as_deref_mut() {
                let dk = &mut dk[key(j)..][..shape.query.size];
                dk.iter_mut().zip(q).for_each(|(to, q)| add_to(to, ds * q.to_f64()));
            }
            if let Some(dv) = results.value.as_deref_mut() {
                let dv = &mut dv[value(j)..][..output.size];
                dv.iter_mut().zip(g).for_each(|(to, g)| add_to(to, p[j] * g.to_f64()));
            }
        }
    }
}
