//! Matrix products, Einstein sums and attention.

use super::broadcast::{broadcast, broadcasts_to, shown};
use super::einsum::Einsum;
use super::operands::*;
use crate::{AttentionAttributes, DType, Dim, GemmAttributes, MatMulAttributes, Shape, ValueType};

/// The shape of a batched matrix product.
fn product(a: &Known, b: &Known, trans_a: bool, trans_b: bool) -> Rule<Option<Shape>> {
    for (k, transposed) in [(a, trans_a), (b, trans_b)] {
        k.require_ranks(if transposed { 2 } else { 1 }, usize::MAX)?;
    }
    let (Some(s), Some(t)) = (&a.shape, &b.shape) else { return Ok(None) };
    let (mut s, mut t) = (s.clone(), t.clone());
    // A vector on the left is a row, one on the right a column; the added dimension does not show in the result.
    let (row, column) = (s.len() == 1, t.len() == 1);
    if row {
        s.insert(0, Dim::Fixed(1));
    }
    if column {
        t.push(Dim::Fixed(1));
    }
    let (m, n) = (s.len() - 2, t.len() - 2);
    if trans_a {
        s.swap(m, m + 1);
    }
    if trans_b {
        t.swap(n, n + 1);
    }
    if unify(&s[m + 1], &t[n]).is_none() {
        return Err(format!(
            "a {} times b {}: inner sizes {} and {} differ",
            shown(a.shape.as_deref().unwrap_or_default()),
            shown(b.shape.as_deref().unwrap_or_default()),
            s[m + 1],
            t[n]
        ));
    }
    let mut out = broadcast(&s[..m], &t[..n]).map_err(|e| e.to_string())?;
    if !row {
        out.push(s[m].clone());
    }
    if !column {
        out.push(t[n + 1].clone());
    }
    Ok(Some(out))
}

pub(super) fn matmul(o: &Operands<'_>, attributes: &MatMulAttributes) -> Rule<Vec<ValueType>> {
    let (a, b) = (o.tensor(0, "a")?, o.tensor(1, "b")?);
    a.require(Class::Numeric)?;
    let dtype = same_dtype(&[&a, &b])?;
    let shape = product(&a, &b, attributes.trans_a, attributes.trans_b)?;
    if let Some(bias) = o.optional(2, "bias")? {
        same_dtype(&[&a, &bias])?;
        if let (Some(s), Some(t)) = (&bias.shape, &shape)
            && !broadcasts_to(s, t)
        {
            return Err(format!("bias {} does not broadcast to the product {}", shown(s), shown(t)));
        }
    }
    if let Some(residual) = o.optional(3, "residual")? {
        same_dtype(&[&a, &residual])?;
        if let Some(t) = &shape {
            residual.require_shape(t)?;
        }
    }
    if let Some(scale) = o.optional(4, "weight_scale")? {
        same_dtype(&[&a, &scale])?;
        let last = b.rank().map_or(Dim::UNKNOWN, |r| b.dim(r - if attributes.trans_b { 2 } else { 1 }));
        scale.require_shape(&[last])?;
    }
    Ok(vec![typed(dtype, shape)])
}

pub(super) fn gemm(o: &Operands<'_>, attributes: &GemmAttributes) -> Rule<Vec<ValueType>> {
    let (a, b) = (o.tensor(0, "a")?, o.tensor(1, "b")?);
    a.require(Class::Numeric)?;
    a.require_rank(2)?;
    b.require_rank(2)?;
    let mut dtype = same_dtype(&[&a, &b])?;
    let shape = product(&a, &b, attributes.trans_a, attributes.trans_b)?.unwrap_or_else(|| {
        vec![a.dim(usize::from(attributes.trans_a)), b.dim(usize::from(!attributes.trans_b))]
    });
    if let Some(c) = o.optional(2, "c")? {
        dtype = same_dtype(&[&a, &b, &c])?;
        if let Some(s) = &c.shape
            && !broadcasts_to(s, &shape)
        {
            return Err(format!("c {} does not broadcast to the product {}", shown(s), shown(&shape)));
        }
    }
    Ok(vec![typed(dtype, Some(shape))])
}

pub(super) fn matmul_integer(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let (a, b) = (o.tensor(0, "a")?, o.tensor(1, "b")?);
    a.require(Class::Byte)?;
    b.require(Class::Byte)?;
    for (i, role, of) in [(2, "a_zero", &a), (3, "b_zero", &b)] {
        if let Some(zero) = o.optional(i, role)? {
            same_dtype(&[of, &zero])?;
        }
    }
    Ok(vec![typed(Some(DType::I32), product(&a, &b, false, false)?)])
}

pub(super) fn qlinear_matmul(o: &Operands<'_>, attributes: &MatMulAttributes) -> Rule<Vec<ValueType>> {
    let (a, b) = (o.tensor(0, "a")?, o.tensor(3, "b")?);
    let y_zero = o.tensor(7, "y_zero")?;
    for (k, scale, zero) in [(&a, (1, "a_scale"), (2, "a_zero")), (&b, (4, "b_scale"), (5, "b_zero"))] {
        o.tensor(scale.0, scale.1)?.require(Class::Float)?;
        same_dtype(&[k, &o.tensor(zero.0, zero.1)?])?;
    }
    o.tensor(6, "y_scale")?.require(Class::Float)?;
    let shape = product(&a, &b, attributes.trans_a, attributes.trans_b)?;
    if let Some(bias) = o.optional(8, "bias")? {
        if bias.dtype.is_some_and(|d| d != DType::I32) {
            return Err(format!("bias is {}, expected i32", bias.to_type()));
        }
        if let Some(last) = shape.as_ref().and_then(|s| s.last()) {
            bias.require_shape(std::slice::from_ref(last))?;
        }
    }
    Ok(vec![typed(y_zero.dtype, shape)])
}

pub(super) fn det(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require(Class::Float)?;
    x.require_ranks(2, usize::MAX)?;
    let shape = match &x.shape {
        None => None,
        Some(s) => {
            let batch = s.len() - 2;
            if unify(&s[batch], &s[batch + 1]).is_none() {
                return Err(format!("x has shape {}, expected square matrices", shown(s)));
            }
            Some(s[..batch].to_vec())
        }
    };
    Ok(vec![typed(x.dtype, shape)])
}

pub(super) fn einsum(o: &Operands<'_>, equation: &str) -> Rule<Vec<ValueType>> {
    let parsed = Einsum::parse(equation)?;
    if parsed.inputs.len() != o.facts.len() {
        return Err(format!(
            "the equation {equation:?} has {} operands, but {} are given",
            parsed.inputs.len(),
            o.facts.len()
        ));
    }
    let operands = (0..o.facts.len()).map(|i| o.tensor(i, "operand")).collect::<Rule<Vec<_>>>()?;
    operands.iter().try_for_each(|k| k.require(Class::Numeric))?;
    let dtype = same_dtype(&operands.iter().collect::<Vec<_>>())?;
    let shapes: Option<Vec<&Shape>> = operands.iter().map(|k| k.shape.as_ref()).collect();
    let shape = match shapes {
        Some(shapes) => Some(parsed.shape(&shapes)?),
        None if parsed.output_has_ellipsis() => None,
        None => Some(open(parsed.output.len())),
    };
    Ok(vec![typed(dtype, shape)])
}

/// Splits `[batch, seq, heads·size]` into the four dimensions that attention works on, or takes them as they are:
/// `[batch, heads, seq, size]`.
fn heads_apart(x: &Known, heads: usize) -> Rule<[Dim; 4]> {
    x.require_ranks(3, 4)?;
    Ok(match x.rank() {
        Some(4) => [x.dim(0), x.dim(1), x.dim(2), x.dim(3)],
        Some(3) if heads == 0 => {
            return Err(format!("{} has rank 3, but the number of its heads is not given", x.role));
        }
        Some(3) => [
            x.dim(0),
            Dim::Fixed(heads),
            x.dim(1),
            divided(&x.dim(2), heads, &format!("the last size of {}", x.role))?,
        ],
        _ => [Dim::UNKNOWN, Dim::UNKNOWN, Dim::UNKNOWN, Dim::UNKNOWN],
    })
}

fn agree(a: &Dim, b: &Dim, what: &str) -> Rule<Dim> {
    unify(a, b).ok_or_else(|| format!("{what} differ: {a} and {b}"))
}

pub(super) fn attention(o: &Operands<'_>, attributes: &AttentionAttributes) -> Rule<Vec<ValueType>> {
    let (q, k, v) = (o.tensor(0, "q")?, o.tensor(1, "k")?, o.tensor(2, "v")?);
    for x in [&q, &k, &v] {
        x.require(Class::Float)?;
    }
    let dtype = same_dtype(&[&q, &k])?;
    if let (Some(a), Some(b), Some(c)) = (q.rank(), k.rank(), v.rank())
        && (a != b || b != c)
    {
        return Err(format!("q, k and v have ranks {a}, {b} and {c}, expected the same"));
    }
    let [batch, q_heads, q_len, size] = heads_apart(&q, attributes.q_num_heads)?;
    let [k_batch, kv_heads, k_len, k_size] = heads_apart(&k, attributes.kv_num_heads)?;
    let [v_batch, v_heads, v_len, v_size] = heads_apart(&v, attributes.kv_num_heads)?;
    let batch =
        agree(&agree(&batch, &k_batch, "the batches of q and k")?, &v_batch, "the batches of q and v")?;
    let kv_heads = agree(&kv_heads, &v_heads, "the heads of k and v")?;
    let k_len = agree(&k_len, &v_len, "the lengths of k and v")?;
    let size = agree(&size, &k_size, "the head sizes of q and k")?;
    if let (Dim::Fixed(n), Dim::Fixed(m)) = (&q_heads, &kv_heads)
        && (*m == 0 || n % m != 0)
    {
        return Err(format!("{n} query heads are not a multiple of {m} key heads"));
    }
    let mut past = Dim::Fixed(0);
    for (i, role, content) in [(4, "past_key", &size), (5, "past_value", &v_size)] {
        if let Some(cache) = o.optional(i, role)? {
            cache.require_shape(&[batch.clone(), kv_heads.clone(), Dim::UNKNOWN, content.clone()])?;
            past =
                if i == 4 { cache.dim(2) } else { agree(&past, &cache.dim(2), "the lengths of the caches")? };
        }
    }
    if o.has(4) != o.has(5) {
        return Err("past_key and past_value must be given together".to_owned());
    }
    let total = plus(&past, &k_len)?;
    if let Some(mask) = o.optional(3, "mask")? {
        mask.require(Class::NumericOrBool)?;
        mask.require_ranks(1, 4)?;
        if let Some(s) = &mask.shape {
            let scores = [batch.clone(), q_heads.clone(), q_len.clone(), Dim::UNKNOWN];
            // A mask may be shorter than the keys (ONNX 24): what it does not cover is masked.
            let longer = match (s.last(), &total) {
                (Some(Dim::Fixed(n)), Dim::Fixed(m)) => n > m,
                _ => false,
            };
            if longer || !broadcasts_to(s, &scores) {
                let all = [batch, q_heads, q_len, total];
                return Err(format!("mask {} does not broadcast to the scores {}", shown(s), shown(&all)));
            }
        }
    }
    let y = match q.rank() {
        Some(4) => Some(vec![batch.clone(), q_heads.clone(), q_len.clone(), v_size.clone()]),
        Some(_) => Some(vec![batch.clone(), q_len.clone(), times(&v_size, attributes.q_num_heads)?]),
        None => None,
    };
    let present = |last: &Dim| Some(vec![batch.clone(), kv_heads.clone(), total.clone(), last.clone()]);
    Ok(vec![
        typed(dtype, y),
        typed(dtype, present(&size)),
        typed(v.dtype, present(&v_size)),
        typed(dtype, Some(vec![batch.clone(), q_heads, q_len, total.clone()])),
    ])
}

pub(super) fn rotary_embedding(o: &Operands<'_>, heads: usize, rotary_dim: usize) -> Rule<Vec<ValueType>> {
    let (x, cos, sin) = (o.tensor(0, "x")?, o.tensor(1, "cos_cache")?, o.tensor(2, "sin_cache")?);
    x.require(Class::Float)?;
    let dtype = same_dtype(&[&x, &cos, &sin])?;
    let [batch, _, length, size] = heads_apart(&x, heads)?;
    if let Dim::Fixed(n) = size
        && rotary_dim > n
    {
        return Err(format!("rotary_dim is {rotary_dim}, but a head has {n} elements"));
    }
    let half = match (rotary_dim, &size) {
        (0, size) => divided(size, 2, "the head size")?,
        (n, _) => Dim::Fixed(n / 2),
    };
    let positions = o.optional(3, "position_ids")?;
    if let Some(p) = &positions {
        p.require(Class::Integer)?;
        p.require_shape(&[batch.clone(), length.clone()])?;
    }
    for cache in [&cos, &sin] {
        match &positions {
            Some(_) => cache.require_rank(2)?,
            None => cache.require_shape(&[batch.clone(), length.clone(), Dim::UNKNOWN])?,
        }
        // A cache may be wider than the rotated part.
        let width = cache.rank().and_then(|r| r.checked_sub(1)).map_or(Dim::UNKNOWN, |last| cache.dim(last));
        if let (Dim::Fixed(n), Dim::Fixed(needed)) = (&width, &half)
            && n < needed
        {
            return Err(format!("{} has rows of {n}, expected at least {needed}", cache.role));
        }
    }
    Ok(vec![typed(dtype, x.shape)])
}
