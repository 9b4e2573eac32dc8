//! Operators of decoder language models.

use lightering_units::BlockFormat;

use super::operands::*;
use crate::{CachedAttentionAttributes, DType, Dim, HeadPiece, LmOp, ValueType};

/// The elements of rows in blocks whose bytes are the last dimension of `w`.
fn row_len(w: &Known, format: BlockFormat) -> Rule<Dim> {
    let Some(last) = w.rank().map(|r| w.dim(r - 1)) else { return Ok(Dim::UNKNOWN) };
    let Dim::Fixed(bytes) = last else { return Ok(last) };
    if !bytes.is_multiple_of(format.block_bytes()) {
        return Err(format!("{} has rows of {bytes} bytes, no whole number of {format} blocks", w.role));
    }
    Ok(Dim::Fixed(bytes / format.block_bytes() * format.block_len()))
}

fn require(known: &Known, dtype: DType, rank: usize) -> Rule<()> {
    if known.dtype.is_some_and(|d| d != dtype) {
        return Err(format!("{} is {}, expected elements of type {dtype}", known.role, known.to_type()));
    }
    known.require_rank(rank)
}

fn same_size(what: &str, a: &Dim, b: &Dim) -> Rule<()> {
    match unify(a, b) {
        Some(_) => Ok(()),
        None => Err(format!("{what}: {a} and {b} differ")),
    }
}

fn rows_of(o: &Operands<'_>, at: usize, role: &'static str) -> Rule<Known> {
    let x = o.tensor(at, role)?;
    require(&x, DType::F32, 2)?;
    Ok(x)
}

fn weight(o: &Operands<'_>, at: usize, role: &'static str, rank: usize) -> Rule<Known> {
    let w = o.tensor(at, role)?;
    require(&w, DType::U8, rank)?;
    Ok(w)
}

fn places(o: &Operands<'_>, at: usize, rows: &Dim) -> Rule<()> {
    let (positions, pages) = (o.tensor(at, "positions")?, o.tensor(at + 1, "pages")?);
    require(&positions, DType::I32, 1)?;
    require(&pages, DType::I32, 2)?;
    same_size("rows and positions", rows, &positions.dim(0))?;
    same_size("rows and lists of pages", rows, &pages.dim(0))
}

fn floats(rows: Dim, columns: Dim) -> ValueType {
    typed(Some(DType::F32), Some(vec![rows, columns]))
}

fn attention(o: &Operands<'_>, a: &CachedAttentionAttributes) -> Rule<Vec<ValueType>> {
    if a.kv_heads == 0 || !a.heads.is_multiple_of(a.kv_heads) || a.page_len == 0 {
        return Err(format!("{} heads do not share {} of keys and values", a.heads, a.kv_heads));
    }
    let q = rows_of(o, 0, "q")?;
    same_size("the length of q and its heads", &q.dim(1), &Dim::Fixed(a.heads * a.key_len))?;
    for (at, role, len) in [(1, "keys", a.key_len), (2, "values", a.value_len)] {
        let cache = weight(o, at, role, 2)?;
        let head = a.format.head_bytes(len).ok_or_else(|| format!("heads of {len} do not fill blocks"))?;
        same_size(
            "a cache page and its contents",
            &cache.dim(1),
            &Dim::Fixed(head * a.kv_heads * a.page_len),
        )?;
    }
    places(o, 3, &q.dim(0))?;
    if let Some(sinks) = o.optional(5, "sinks")? {
        sinks.require_shape(&[Dim::Fixed(a.heads)])?;
    }
    Ok(vec![floats(q.dim(0), Dim::Fixed(a.heads * a.value_len))])
}

pub(super) fn language(o: &Operands<'_>, op: &LmOp) -> Rule<Vec<ValueType>> {
    Ok(match op {
        LmOp::BlockMatMul { format } => {
            let (x, w) = (rows_of(o, 0, "x")?, weight(o, 1, "w", 2)?);
            same_size("the length of x and of a row of weights", &x.dim(1), &row_len(&w, *format)?)?;
            if let Some(bias) = o.optional(2, "bias")? {
                bias.require_shape(&[w.dim(0)])?;
            }
            vec![floats(x.dim(0), w.dim(0))]
        }
        LmOp::BlockGather { format } => {
            let (table, ids) = (weight(o, 0, "table", 2)?, o.tensor(1, "ids")?);
            require(&ids, DType::I32, 1)?;
            vec![floats(ids.dim(0), row_len(&table, *format)?)]
        }
        LmOp::RopeAngles { dims, .. } => {
            let positions = o.tensor(0, "positions")?;
            require(&positions, DType::I32, 1)?;
            if !dims.is_multiple_of(2) {
                return Err(format!("{dims} elements are no pairs"));
            }
            if let Some(factors) = o.optional(1, "factors")? {
                factors.require_shape(&[Dim::Fixed(dims / 2)])?;
            }
            vec![floats(positions.dim(0), Dim::Fixed(*dims))]
        }
        LmOp::Rope { heads, offset, .. } => {
            let (x, angles) = (rows_of(o, 0, "x")?, rows_of(o, 1, "angles")?);
            same_size("rows of x and of angles", &x.dim(0), &angles.dim(0))?;
            let head = divided(&x.dim(1), *heads, "the length of x by its heads")?;
            if let (Dim::Fixed(head), Dim::Fixed(dims)) = (head, angles.dim(1))
                && offset.checked_add(dims).is_none_or(|end| end > head)
            {
                return Err(format!("{dims} elements from {offset} on of a head of {head} cannot be turned"));
            }
            vec![x.to_type()]
        }
        LmOp::HeadMatMul { format, heads } => {
            let (x, w) = (rows_of(o, 0, "x")?, weight(o, 1, "w", 2)?);
            let head = divided(&x.dim(1), *heads, "the length of x by its heads")?;
            divided(&w.dim(0), *heads, "rows of weights by heads")?;
            if let (Dim::Fixed(head), Dim::Fixed(k)) = (head, row_len(&w, *format)?)
                && k > head
            {
                return Err(format!("rows of {k} weights for heads of {head}"));
            }
            vec![floats(x.dim(0), w.dim(0))]
        }
        LmOp::JoinHeads { heads, pieces } => {
            let a = rows_of(o, 0, "a")?;
            let mut len = 0usize;
            for piece in pieces {
                let from = rows_of(o, piece.input, "a piece's operand")?;
                same_size("rows of the operands", &a.dim(0), &from.dim(0))?;
                let of = if piece.shared { 1 } else { *heads };
                let head = divided(&from.dim(1), of, "the length of a piece's operand by its heads")?;
                let end = piece.offset.checked_add(piece.len);
                if let Dim::Fixed(head) = head
                    && end.is_none_or(|end| end > head)
                {
                    let HeadPiece { offset, len, .. } = piece;
                    return Err(format!("a piece of {len} elements from {offset} on of heads of {head}"));
                }
                len = len.saturating_add(piece.len);
            }
            vec![floats(a.dim(0), Dim::Fixed(heads.saturating_mul(len)))]
        }
        LmOp::CacheStore { format, heads, page_len, .. } => {
            let (cache, rows) = (weight(o, 0, "cache", 2)?, rows_of(o, 1, "rows")?);
            if let Dim::Fixed(n) = divided(&rows.dim(1), *heads, "the length of a row by its heads")? {
                let head = format.head_bytes(n).ok_or_else(|| format!("heads of {n} do not fill blocks"))?;
                same_size(
                    "a cache page and its contents",
                    &cache.dim(1),
                    &Dim::Fixed(head * heads * page_len),
                )?;
            }
            places(o, 2, &rows.dim(0))?;
            vec![cache.to_type()]
        }
        LmOp::CachedAttention(a) => return attention(o, a),
        LmOp::Route { k, .. } => {
            let scores = rows_of(o, 0, "scores")?;
            if let Dim::Fixed(n) = scores.dim(1)
                && (*k == 0 || *k > n)
            {
                return Err(format!("{k} of {n} experts cannot be chosen"));
            }
            if let Some(bias) = o.optional(1, "bias")? {
                bias.require_shape(&[scores.dim(1)])?;
            }
            let shape = vec![scores.dim(0), Dim::Fixed(*k)];
            vec![typed(Some(DType::I32), Some(shape.clone())), typed(Some(DType::F32), Some(shape))]
        }
        LmOp::Experts { formats, .. } => {
            let x = rows_of(o, 0, "x")?;
            let (ids, weights) = (o.tensor(1, "ids")?, rows_of(o, 2, "weights")?);
            require(&ids, DType::I32, 2)?;
            for (what, a, b) in [
                ("rows and their experts", x.dim(0), ids.dim(0)),
                ("rows and their weights", x.dim(0), weights.dim(0)),
                ("experts and their weights", ids.dim(1), weights.dim(1)),
            ] {
                same_size(what, &a, &b)?;
            }
            let (gate, up, down) =
                (weight(o, 3, "gate", 3)?, weight(o, 4, "up", 3)?, weight(o, 5, "down", 3)?);
            for (what, a, b) in [
                ("experts of gate and up", gate.dim(0), up.dim(0)),
                ("experts of gate and down", gate.dim(0), down.dim(0)),
                ("rows of gate and up", gate.dim(1), up.dim(1)),
                ("the length of x and of a row of gate", x.dim(1), row_len(&gate, formats[0])?),
                ("the length of x and of a row of up", x.dim(1), row_len(&up, formats[1])?),
                ("rows of gate and the length of a row of down", gate.dim(1), row_len(&down, formats[2])?),
                ("the length of x and rows of down", x.dim(1), down.dim(1)),
            ] {
                same_size(what, &a, &b)?;
            }
            vec![x.to_type()]
        }
    })
}
