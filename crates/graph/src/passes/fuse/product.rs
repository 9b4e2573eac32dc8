use super::Editor;
use crate::{BinaryOp, Op, UnaryOp, ValueId};

/// A product taken apart: `scale · factors…`.
pub struct Product {
    /// Product of the constant scalars.
    pub scale: f64,
    /// The rest, in order of appearance.
    pub factors: Vec<ValueId>,
}

/// Most factors that are looked at.
const FACTORS_MAX: usize = 8;

/// Takes the product that makes `v` apart, through multiplications and divisions by constants whose results nobody
/// else reads. `stop` is never taken apart.
pub fn product(e: &Editor, v: ValueId, stop: &[ValueId]) -> Product {
    let mut p = Product { scale: 1.0, factors: Vec::new() };
    collect(e, v, stop, true, &mut p);
    p
}

fn collect(e: &Editor, v: ValueId, stop: &[ValueId], root: bool, p: &mut Product) {
    if let Some(c) = e.scalar(v) {
        p.scale *= f64::from(c);
        return;
    }
    let open = !stop.contains(&v) && (root || e.private(v)) && p.factors.len() < FACTORS_MAX;
    if let Some(node) = e.maker(v).filter(|_| open) {
        match (&node.op, node.input(0), node.input(1)) {
            (Op::Binary(BinaryOp::Mul), Some(a), Some(b)) => {
                // A square is read twice by one node and would not count as private.
                collect(e, a, stop, false, p);
                collect(e, b, stop, false, p);
                return;
            }
            (Op::Binary(BinaryOp::Div), Some(a), Some(b)) => {
                if let Some(c) = e.scalar(b) {
                    p.scale /= f64::from(c);
                    collect(e, a, stop, false, p);
                    return;
                }
            }
            (Op::Binary(BinaryOp::Pow), Some(a), Some(b)) if e.scalar(b) == Some(3.0) => {
                p.factors.extend([a, a, a]);
                return;
            }
            (Op::Unary(UnaryOp::Neg), Some(a), None) => {
                p.scale = -p.scale;
                collect(e, a, stop, false, p);
                return;
            }
            _ => {}
        }
    }
    p.factors.push(v);
}

/// Whether two numbers are the same up to the rounding of exporters.
pub fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-4 * b.abs()
}

/// `v = x + c` with a constant scalar.
pub fn plus_scalar(e: &Editor, v: ValueId) -> Option<(ValueId, f64)> {
    let node = e.maker(v)?;
    let (Op::Binary(op), Some(a), Some(b)) = (&node.op, node.input(0), node.input(1)) else { return None };
    match op {
        BinaryOp::Add => match (e.scalar(a), e.scalar(b)) {
            (None, Some(c)) => Some((a, c.into())),
            (Some(c), None) => Some((b, c.into())),
            _ => None,
        },
        BinaryOp::Sub => e.scalar(b).map(|c| (a, -f64::from(c))),
        _ => None,
    }
}

/// The operand of the unary operator that makes `v`.
pub fn unary(e: &Editor, v: ValueId, op: UnaryOp) -> Option<ValueId> {
    let node = e.maker(v)?;
    if node.op == Op::Unary(op) { node.input(0) } else { None }
}

/// The operands of the binary operator that makes `v`.
pub fn binary(e: &Editor, v: ValueId, op: BinaryOp) -> Option<(ValueId, ValueId)> {
    let node = e.maker(v)?;
    if node.op == Op::Binary(op) { Some((node.input(0)?, node.input(1)?)) } else { None }
}
