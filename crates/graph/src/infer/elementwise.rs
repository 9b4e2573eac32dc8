//! Element by element.

use super::broadcast::{broadcast, broadcasts_to, shown};
use super::operands::*;
use crate::{BinaryOp, DType, ElementwiseStep, Shape, UnaryOp, ValueType};

/// The element types that a unary operator takes.
fn unary_class(op: &UnaryOp) -> Class {
    use UnaryOp::*;
    match op {
        Abs | ClipTo { .. } | Erf | Neg | Relu | Shrink { .. } | Sign => Class::Numeric,
        BitwiseNot => Class::Integer,
        Not => Class::Bool,
        // 8-bit floats can be infinite or not a number, too.
        Identity | IsInf { .. } | IsNan => Class::Any,
        _ => Class::Float,
    }
}

fn unary_result(op: &UnaryOp, dtype: Option<DType>) -> Option<DType> {
    match op {
        UnaryOp::IsInf { .. } | UnaryOp::IsNan => Some(DType::Bool),
        _ => dtype,
    }
}

pub(super) fn unary(o: &Operands<'_>, op: &UnaryOp) -> Rule<Vec<ValueType>> {
    if *op == UnaryOp::Identity {
        return Ok(vec![o.required(0, "x")?.clone()]);
    }
    let x = o.tensor(0, "x")?;
    x.require(unary_class(op))?;
    if let (UnaryOp::IsInf { .. } | UnaryOp::IsNan, Some(DType::Bool | DType::String)) = (op, x.dtype) {
        return x.require(Class::Float).map(|()| Vec::new());
    }
    Ok(vec![typed(unary_result(op, x.dtype), x.shape)])
}

fn binary_class(op: BinaryOp) -> Class {
    use BinaryOp::*;
    match op {
        Add | Sub | Mul | Div | Mod | FMod | Pow | PRelu | Max | Min => Class::Numeric,
        And | Or | Xor => Class::Bool,
        BitAnd | BitOr | BitXor | ShiftLeft | ShiftRight => Class::Integer,
        Equal => Class::Any,
        Greater | GreaterOrEqual | Less | LessOrEqual => Class::Numeric,
    }
}

fn is_comparison(op: BinaryOp) -> bool {
    use BinaryOp::*;
    matches!(op, Equal | Greater | GreaterOrEqual | Less | LessOrEqual)
}

/// The shape that all operands broadcast to.
fn broadcast_all(operands: &[&Known]) -> Rule<Option<Shape>> {
    let mut shape: Option<Shape> = Some(Vec::new());
    for k in operands {
        shape = match (shape, &k.shape) {
            (Some(s), Some(t)) => Some(broadcast(&s, t).map_err(|e| e.to_string())?),
            _ => None,
        };
    }
    Ok(shape)
}

pub(super) fn binary(o: &Operands<'_>, op: BinaryOp) -> Rule<Vec<ValueType>> {
    let (a, b) = (o.tensor(0, "a")?, o.tensor(1, "b")?);
    a.require(binary_class(op))?;
    b.require(binary_class(op))?;
    let dtype = if op == BinaryOp::Pow { a.dtype } else { same_dtype(&[&a, &b])? };
    let shape = broadcast_all(&[&a, &b])?;
    if op == BinaryOp::PRelu
        && let (Some(x), Some(slope)) = (&a.shape, &b.shape)
        && !broadcasts_to(slope, x)
    {
        return Err(format!("the slope {} does not broadcast to x {}", shown(slope), shown(x)));
    }
    Ok(vec![typed(if is_comparison(op) { Some(DType::Bool) } else { dtype }, shape)])
}

pub(super) fn variadic(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let operands = (0..o.facts.len()).map(|i| o.tensor(i, "operand")).collect::<Rule<Vec<_>>>()?;
    if operands.is_empty() {
        return Err("has no operands, expected at least 1".to_owned());
    }
    operands.iter().try_for_each(|k| k.require(Class::Numeric))?;
    let all: Vec<&Known> = operands.iter().collect();
    Ok(vec![typed(same_dtype(&all)?, broadcast_all(&all)?)])
}

pub(super) fn select(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let (c, a, b) = (o.tensor(0, "condition")?, o.tensor(1, "a")?, o.tensor(2, "b")?);
    c.require(Class::Bool)?;
    Ok(vec![typed(same_dtype(&[&a, &b])?, broadcast_all(&[&c, &a, &b])?)])
}

pub(super) fn clip(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require(Class::Numeric)?;
    for (i, role) in [(1, "min"), (2, "max")] {
        if let Some(bound) = o.optional(i, role)? {
            bound.require_single()?;
            same_dtype(&[&x, &bound])?;
        }
    }
    Ok(vec![x.to_type()])
}

pub(super) fn cast(o: &Operands<'_>, to: DType) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    let is_complex = |d| matches!(d, DType::Complex64 | DType::Complex128);
    if let Some(from) = x.dtype
        && from != to
        && (is_complex(from) || is_complex(to))
    {
        return Err(format!("cannot cast {from} to {to}"));
    }
    Ok(vec![typed(Some(to), x.shape)])
}

/// The running value has the shape and type of operand 0 throughout.
pub(super) fn chain(o: &Operands<'_>, steps: &[ElementwiseStep]) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    for step in steps {
        match step {
            ElementwiseStep::Unary(op) => {
                x.require(unary_class(op))?;
                if unary_result(op, x.dtype) != x.dtype {
                    return Err(format!("step {op:?} changes the element type, which a chain cannot"));
                }
            }
            ElementwiseStep::Binary { op, operand, .. } => {
                let other = o.tensor(*operand, "extra operand")?;
                x.require(binary_class(*op))?;
                same_dtype(&[&x, &other])?;
                if is_comparison(*op) {
                    return Err(format!("step {op:?} changes the element type, which a chain cannot"));
                }
                if let (Some(s), Some(t)) = (&other.shape, &x.shape)
                    && !broadcasts_to(s, t)
                {
                    return Err(format!(
                        "operand {operand} has shape {}, which does not broadcast to {}",
                        shown(s),
                        shown(t)
                    ));
                }
            }
        }
    }
    Ok(vec![x.to_type()])
}

pub(super) fn dropout(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require(Class::Float)?;
    if let Some(ratio) = o.optional(1, "ratio")? {
        ratio.require(Class::Float)?;
        ratio.require_single()?;
    }
    if let Some(training) = o.optional(2, "training")? {
        training.require(Class::Bool)?;
        training.require_single()?;
    }
    Ok(vec![x.to_type(), typed(Some(DType::Bool), x.shape)])
}
