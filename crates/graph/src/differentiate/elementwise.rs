//! Element-wise operators.

use super::backward::{Backward, Step};
use super::prepare::from_result;
use crate::{BinaryOp, DType, Node, Op, TrainOp, UnaryOp, ValueId, VariadicOp};

pub(super) fn rule(b: &mut Backward<'_>, n: &Node, dy: &[Option<ValueId>]) -> Step {
    let Some(dy) = dy.first().copied().flatten() else { return Ok(()) };
    match &n.op {
        Op::Unary(op) => {
            let dx = unary(b, op, n, dy)?;
            b.give(0, dx)
        }
        Op::Binary(op) => binary(b, *op, n, dy),
        Op::Variadic(op) => variadic(b, *op, n, dy),
        Op::Where => {
            let condition = b.node_input(n, 0)?;
            let zero = b.scalar(0.0, b.dtype(dy)?)?;
            if b.wants(1) {
                let da = b.select(condition, dy, zero)?;
                give_reduced(b, n, 1, da)?;
            }
            if b.wants(2) {
                let db = b.select(condition, zero, dy)?;
                give_reduced(b, n, 2, db)?;
            }
            Ok(())
        }
        Op::Clip => clip(b, n, dy),
        Op::Cast { .. } => {
            let x = b.node_input(n, 0)?;
            let dx = b.cast_like(dy, x)?;
            b.give(0, dx)
        }
        Op::Dropout { .. } => dropout(b, n, dy),
        _ => b.unsupported("it is no element-wise operator"),
    }
}

/// The gradient of an activation that is part of another operator, from the result `y`.
pub(super) fn through_activation(
    b: &mut Backward<'_>,
    activation: Option<UnaryOp>,
    y: ValueId,
    dy: ValueId,
) -> Step<ValueId> {
    match activation {
        None | Some(UnaryOp::Identity) => Ok(dy),
        Some(op) => b.train(TrainOp::UnaryGrad(op), &[y, dy]),
    }
}

fn unary(b: &mut Backward<'_>, op: &UnaryOp, n: &Node, dy: ValueId) -> Step<ValueId> {
    let x = b.node_input(n, 0)?;
    match op {
        UnaryOp::Identity => Ok(dy),
        UnaryOp::Neg => b.neg(dy),
        UnaryOp::LeakyRelu { alpha } if !from_result(op) => {
            let zero = b.scalar(0.0, b.dtype(x)?)?;
            let negative = b.binary(BinaryOp::Less, x, zero)?;
            let sloped = b.scale(dy, f64::from(*alpha))?;
            b.select(negative, sloped, dy)
        }
        _ => {
            let saved = if TrainOp::unary_saves_result(op) { n.out() } else { x };
            b.train(TrainOp::UnaryGrad(*op), &[saved, dy])
        }
    }
}

/// Sums a gradient of the shape of the result up to that of operand `index`.
pub(super) fn give_reduced(b: &mut Backward<'_>, n: &Node, index: usize, gradient: ValueId) -> Step {
    let x = b.node_input(n, index)?;
    let dims = b.dims(x)?;
    let gradient = b.reduce_to(gradient, &dims)?;
    b.give(index, gradient)
}

fn binary(b: &mut Backward<'_>, op: BinaryOp, n: &Node, dy: ValueId) -> Step {
    let (x, z) = (b.node_input(n, 0)?, b.node_input(n, 1)?);
    let dtype = b.dtype(dy)?;
    if b.wants(0) {
        let dx = match op {
            BinaryOp::Add | BinaryOp::Sub | BinaryOp::Mod | BinaryOp::FMod => dy,
            BinaryOp::Mul => b.mul(dy, z)?,
            BinaryOp::Div => b.div(dy, z)?,
            BinaryOp::Pow => {
                // z · x^(z - 1)
                let z = b.cast(z, dtype)?;
                let constant = b.graph().value(z).tensor().filter(|t| t.len() == 1).and_then(|t| t.to_f64s());
                let slope = match constant.as_deref() {
                    Some([two]) if *two == 2.0 => b.scale(x, 2.0)?,
                    _ => {
                        let one = b.scalar(1.0, dtype)?;
                        let less = b.sub(z, one)?;
                        let power = b.binary(BinaryOp::Pow, x, less)?;
                        b.mul(power, z)?
                    }
                };
                b.mul(dy, slope)?
            }
            BinaryOp::PRelu => {
                let zero = b.scalar(0.0, dtype)?;
                let negative = b.binary(BinaryOp::Less, x, zero)?;
                let sloped = b.mul(dy, z)?;
                b.select(negative, sloped, dy)?
            }
            BinaryOp::Max | BinaryOp::Min => {
                let first =
                    if op == BinaryOp::Max { BinaryOp::GreaterOrEqual } else { BinaryOp::LessOrEqual };
                let mine = b.binary(first, x, z)?;
                let zero = b.scalar(0.0, dtype)?;
                b.select(mine, dy, zero)?
            }
            _ => return b.unsupported("it has no derivative"),
        };
        give_reduced(b, n, 0, dx)?;
    }
    if b.wants(1) {
        let dz = match op {
            BinaryOp::Add => dy,
            BinaryOp::Sub => {
                let dims = b.dims(z)?;
                let sum = b.reduce_to(dy, &dims)?;
                b.neg(sum)?
            }
            BinaryOp::Mul => b.mul(dy, x)?,
            BinaryOp::Div => {
                // -dy · y / z
                let slope = b.div(n.out(), z)?;
                let product = b.mul(dy, slope)?;
                b.neg(product)?
            }
            BinaryOp::Mod | BinaryOp::FMod => {
                // The remainder is x - z · whole.
                let multiple = b.sub(x, n.out())?;
                let quotient = b.div(multiple, z)?;
                let whole = b.unary(UnaryOp::Round, quotient)?;
                let product = b.mul(dy, whole)?;
                b.neg(product)?
            }
            BinaryOp::Pow => {
                // y · ln x; a base of 0 or less has no derivative and gets none.
                let zero = b.scalar(0.0, dtype)?;
                let one = b.scalar(1.0, dtype)?;
                let positive = b.binary(BinaryOp::Greater, x, zero)?;
                let base = b.select(positive, x, one)?;
                let log = b.unary(UnaryOp::Log, base)?;
                let slope = b.mul(n.out(), log)?;
                b.mul(dy, slope)?
            }
            BinaryOp::PRelu => {
                let zero = b.scalar(0.0, dtype)?;
                let negative = b.unary(UnaryOp::Neg, x)?;
                let negative = b.unary(UnaryOp::Relu, negative)?;
                let slope = b.sub(zero, negative)?;
                b.mul(dy, slope)?
            }
            BinaryOp::Max | BinaryOp::Min => {
                let second = if op == BinaryOp::Max { BinaryOp::Less } else { BinaryOp::Greater };
                let mine = b.binary(second, x, z)?;
                let zero = b.scalar(0.0, dtype)?;
                b.select(mine, dy, zero)?
            }
            _ => return b.unsupported("it has no derivative"),
        };
        give_reduced(b, n, 1, dz)?;
    }
    Ok(())
}

fn variadic(b: &mut Backward<'_>, op: VariadicOp, n: &Node, dy: ValueId) -> Step {
    let dtype = b.dtype(dy)?;
    match op {
        VariadicOp::Sum | VariadicOp::Mean => {
            let share = if op == VariadicOp::Mean { 1.0 / n.inputs.len().max(1) as f64 } else { 1.0 };
            let part = b.scale(dy, share)?;
            for i in 0..n.inputs.len() {
                if b.wants(i) {
                    give_reduced(b, n, i, part)?;
                }
            }
        }
        VariadicOp::Max | VariadicOp::Min => {
            // The first of several equal operands takes all.
            let zero = b.scalar(0.0, dtype)?;
            let mut rest = dy;
            for i in 0..n.inputs.len() {
                let x = b.node_input(n, i)?;
                let mine = b.binary(BinaryOp::Equal, x, n.out())?;
                if b.wants(i) {
                    let dx = b.select(mine, rest, zero)?;
                    give_reduced(b, n, i, dx)?;
                }
                if (i + 1..n.inputs.len()).any(|j| b.wants(j)) {
                    rest = b.select(mine, zero, rest)?;
                }
            }
        }
    }
    Ok(())
}

fn clip(b: &mut Backward<'_>, n: &Node, dy: ValueId) -> Step {
    let x = b.node_input(n, 0)?;
    let zero = b.scalar(0.0, b.dtype(dy)?)?;
    // What lies above `max`, be it x or min, goes to max; of the rest, what lies below `min` goes to min.
    let mut rest = dy;
    if let Some(max) = n.input(2) {
        let raised = match n.input(1) {
            Some(min) => b.binary(BinaryOp::Max, x, min)?,
            None => x,
        };
        let above = b.binary(BinaryOp::Greater, raised, max)?;
        if b.wants(2) {
            let dmax = b.select(above, rest, zero)?;
            give_reduced(b, n, 2, dmax)?;
        }
        if !b.wants(0) && !b.wants(1) {
            return Ok(());
        }
        rest = b.select(above, zero, rest)?;
    }
    if let Some(min) = n.input(1) {
        let below = b.binary(BinaryOp::Less, x, min)?;
        if b.wants(1) {
            let dmin = b.select(below, rest, zero)?;
            give_reduced(b, n, 1, dmin)?;
        }
        if b.wants(0) {
            rest = b.select(below, zero, rest)?;
        }
    }
    b.give(0, rest)
}

fn dropout(b: &mut Backward<'_>, n: &Node, dy: ValueId) -> Step {
    b.refuse(1, "ratio")?;
    let Some(training) = n.input(2) else { return b.give(0, dy) };
    let known = b.graph().value(training).tensor().and_then(|t| t.to_i64s());
    if known.as_deref() == Some(&[0]) {
        return b.give(0, dy);
    }
    let dtype = b.dtype(dy)?;
    let mask = b.result(1)?;
    let ratio = match n.input(1) {
        Some(ratio) => {
            let ratio = b.cast(ratio, dtype)?;
            b.reshape(ratio, &[])?
        }
        None => b.scalar(0.5, dtype)?,
    };
    let one = b.scalar(1.0, dtype)?;
    let kept = b.sub(one, ratio)?;
    let mut scaled = b.div(dy, kept)?;
    if known.is_none() {
        let training = b.cast(training, DType::Bool)?;
        let training = b.reshape(training, &[])?;
        scaled = b.select(training, scaled, dy)?;
    }
    let zero = b.scalar(0.0, dtype)?;
    let dx = b.select(mask, scaled, zero)?;
    b.give(0, dx)
}
