//! Recurrent layers.

use super::operands::*;
use crate::{Dim, Direction, RecurrentAttributes, ValueType};

/// Rnn, Gru and Lstm differ in the number of gates (1, 3, 4) and in the second state of the Lstm.
pub(super) fn recurrent(o: &Operands<'_>, a: &RecurrentAttributes, gates: usize) -> Rule<Vec<ValueType>> {
    let (x, w, r) = (o.tensor(0, "x")?, o.tensor(1, "w")?, o.tensor(2, "r")?);
    x.require(Class::Float)?;
    let dtype = same_dtype(&[&x, &w, &r])?;
    x.require_rank(3)?;
    let directions = if a.direction == Direction::Bidirectional { 2 } else { 1 };
    let too_large = || format!("hidden_size {} is too large", a.hidden_size);
    let hidden = Dim::Fixed(a.hidden_size);
    let rows = a.hidden_size.checked_mul(gates).ok_or_else(too_large)?;
    let d = Dim::Fixed(directions);
    let (batch_axis, time_axis) = if a.batch_first { (0, 1) } else { (1, 0) };
    let (mut batch, time) = (x.dim(batch_axis), x.dim(time_axis));
    w.require_shape(&[d.clone(), Dim::Fixed(rows), x.dim(2)])?;
    r.require_shape(&[d.clone(), Dim::Fixed(rows), hidden.clone()])?;
    if let Some(b) = o.optional(3, "b")? {
        same_dtype(&[&x, &b])?;
        b.require_shape(&[d.clone(), Dim::Fixed(rows.checked_mul(2).ok_or_else(too_large)?)])?;
    }
    if let Some(lengths) = o.optional(4, "lengths")? {
        lengths.require(Class::Integer)?;
        lengths.require_shape(std::slice::from_ref(&batch))?;
        batch = unify(&batch, &lengths.dim(0)).unwrap_or(batch);
    }
    let state = |batch: &Dim| match a.batch_first {
        true => vec![batch.clone(), d.clone(), hidden.clone()],
        false => vec![d.clone(), batch.clone(), hidden.clone()],
    };
    for (i, role) in [(5, "h0"), (6, "c0")] {
        if let Some(k) = o.optional(i, role)? {
            same_dtype(&[&x, &k])?;
            k.require_shape(&state(&batch))?;
            batch = unify(&batch, &k.dim(usize::from(!a.batch_first))).unwrap_or(batch);
        }
    }
    if let Some(p) = o.optional(7, "peepholes")? {
        same_dtype(&[&x, &p])?;
        p.require_shape(&[d.clone(), Dim::Fixed(a.hidden_size.checked_mul(3).ok_or_else(too_large)?)])?;
    }
    let y = match a.batch_first {
        true => vec![batch.clone(), time, d.clone(), hidden.clone()],
        false => vec![time, d.clone(), batch.clone(), hidden.clone()],
    };
    let h = typed(dtype, Some(state(&batch)));
    let mut types = vec![typed(dtype, Some(y)), h.clone()];
    if gates == 4 {
        types.push(h);
    }
    Ok(types)
}
