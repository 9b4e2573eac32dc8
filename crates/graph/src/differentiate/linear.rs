//! Matrix products and sums of products.

use std::collections::BTreeMap;

use super::backward::{Backward, Step};
use super::elementwise::{give_reduced, through_activation};
use crate::infer::{Einsum, EinsumAxis};
use crate::{GemmAttributes, MatMulAttributes, Node, Op, Tensor, TrainOp, ValueId};

pub(super) fn rule(b: &mut Backward<'_>, n: &Node, dy: &[Option<ValueId>]) -> Step {
    let Some(dy) = dy.first().copied().flatten() else { return Ok(()) };
    match &n.op {
        Op::MatMul(a) => matmul(b, a, n, dy),
        Op::Gemm(a) => gemm(b, a, n, dy),
        Op::Einsum { equation } => einsum(b, equation, n, dy),
        Op::Det => {
            let x = b.node_input(n, 0)?;
            let dx = b.train(TrainOp::DetGrad, &[x, dy])?;
            b.give(0, dx)
        }
        _ => b.unsupported("it is no product"),
    }
}

fn matmul(b: &mut Backward<'_>, a: &MatMulAttributes, n: &Node, dy: ValueId) -> Step {
    let dy = through_activation(b, a.activation, n.out(), dy)?;
    if b.wants(3) {
        b.give(3, dy)?;
    }
    if b.wants(2) {
        give_reduced(b, n, 2, dy)?;
    }
    let (left, right) = (b.node_input(n, 0)?, b.node_input(n, 1)?);
    if b.wants(4) {
        let plain = Op::MatMul(MatMulAttributes { activation: None, ..a.clone() });
        let product = b.emit(plain, &[left, right])?;
        let share = b.mul(product, dy)?;
        give_reduced(b, n, 4, share)?;
    }
    if !b.wants(0) && !b.wants(1) {
        return Ok(());
    }
    let dy = match n.input(4) {
        Some(scale) => b.mul(dy, scale)?,
        None => dy,
    };
    products(b, [left, right], (a.trans_a, a.trans_b), a.alpha, dy)
}

fn gemm(b: &mut Backward<'_>, a: &GemmAttributes, n: &Node, dy: ValueId) -> Step {
    if b.wants(2) {
        let c = b.node_input(n, 2)?;
        let dims = b.dims(c)?;
        let sum = b.reduce_to(dy, &dims)?;
        let sum = b.scale(sum, f64::from(a.beta))?;
        b.give(2, sum)?;
    }
    let operands = [b.node_input(n, 0)?, b.node_input(n, 1)?];
    products(b, operands, (a.trans_a, a.trans_b), a.alpha, dy)
}

/// Gradients of both operands of `alpha · a' · b'` with broadcast leading dimensions.
fn products(
    b: &mut Backward<'_>,
    [left, right]: [ValueId; 2],
    (ta, tb): (bool, bool),
    alpha: f32,
    dy: ValueId,
) -> Step {
    let (left_dims, right_dims) = (b.dims(left)?, b.dims(right)?);
    // Vectors are a row or a column.
    let (row, column) = (left_dims.len() == 1, right_dims.len() == 1);
    let (ta, tb) = (ta && !row, tb && !column);
    let wide_left = if row { vec![1, left_dims[0]] } else { left_dims.clone() };
    let wide_right = if column { vec![right_dims[0], 1] } else { right_dims.clone() };
    let x = b.reshape(left, &wide_left)?;
    let w = b.reshape(right, &wide_right)?;
    let mut wide = b.dims(dy)?;
    if column {
        wide.push(1);
    }
    if row {
        wide.insert(wide.len() - 1, 1);
    }
    let g = b.reshape(dy, &wide)?;
    if b.wants(0) {
        let dx = if ta { b.matmul(w, g, (tb, true), alpha)? } else { b.matmul(g, w, (false, !tb), alpha)? };
        let dx = b.reduce_to(dx, &wide_left)?;
        let dx = b.reshape(dx, &left_dims)?;
        b.give(0, dx)?;
    }
    if b.wants(1) {
        // A matrix that many rows share: one product instead of one per batch entry and a sum.
        let (x, g) = if wide_right.len() == 2 && wide_left.len() > 2 && !ta {
            let flat = |dims: &[usize]| {
                let last = dims[dims.len() - 1];
                [dims[..dims.len() - 1].iter().product(), last]
            };
            (b.reshape(x, &flat(&wide_left))?, b.reshape(g, &flat(&wide))?)
        } else {
            (x, g)
        };
        let dw = if tb { b.matmul(g, x, (true, ta), alpha)? } else { b.matmul(x, g, (!ta, false), alpha)? };
        let dw = b.reduce_to(dw, &wide_right)?;
        let dw = b.reshape(dw, &right_dims)?;
        b.give(1, dw)?;
    }
    Ok(())
}

/// Letters of a term with the ellipsis spelled out, for an operand of `rank` dimensions.
fn letters(term: &[EinsumAxis], rank: usize, ellipsis: &[char]) -> Vec<char> {
    let named = term.iter().filter(|a| **a != EinsumAxis::Ellipsis).count();
    let covered = rank.saturating_sub(named).min(ellipsis.len());
    let mut out = Vec::new();
    for axis in term {
        match axis {
            EinsumAxis::Label(c) => out.push(*c),
            EinsumAxis::Ellipsis => out.extend(&ellipsis[ellipsis.len() - covered..]),
        }
    }
    out
}

fn einsum(b: &mut Backward<'_>, equation: &str, n: &Node, dy: ValueId) -> Step {
    let parsed = match Einsum::parse(equation) {
        Ok(parsed) => parsed,
        Err(e) => return b.unsupported(e),
    };
    let operands: Vec<ValueId> = (0..n.inputs.len()).map(|i| b.node_input(n, i)).collect::<Step<_>>()?;
    let shapes: Vec<Vec<usize>> = operands.iter().map(|&v| b.dims(v)).collect::<Step<_>>()?;
    let mut free: Vec<char> = ('a'..='z').chain('A'..='Z').filter(|&c| !equation.contains(c)).collect();
    let named = |term: &[EinsumAxis]| term.iter().filter(|a| **a != EinsumAxis::Ellipsis).count();
    let hidden =
        parsed.inputs.iter().zip(&shapes).map(|(t, s)| s.len().saturating_sub(named(t))).max().unwrap_or(0);
    if free.len() < hidden {
        return b.unsupported(format!("its equation {equation:?} uses too many letters"));
    }
    let ellipsis = free.split_off(free.len() - hidden);
    let terms: Vec<Vec<char>> =
        parsed.inputs.iter().zip(&shapes).map(|(t, s)| letters(t, s.len(), &ellipsis)).collect();
    let output = letters(&parsed.output, b.dims(dy)?.len(), &ellipsis);
    let mut sizes: BTreeMap<char, usize> = BTreeMap::new();
    for (term, shape) in terms.iter().zip(&shapes) {
        for (&c, &size) in term.iter().zip(shape) {
            let known = sizes.entry(c).or_insert(1);
            *known = (*known).max(size);
        }
    }
    let dtype = b.dtype(dy)?;
    let text = |term: &[char]| term.iter().collect::<String>();
    for i in 0..operands.len() {
        if !b.wants(i) {
            continue;
        }
        let mut inputs = vec![dy];
        let mut left = vec![text(&output)];
        for (j, term) in terms.iter().enumerate().filter(|(j, _)| *j != i) {
            inputs.push(operands[j]);
            left.push(text(term));
        }
        // A letter that occurs twice in this operand reads its diagonal: the gradient lies on the diagonal.
        let mut target: Vec<char> = Vec::new();
        for &c in &terms[i] {
            if target.contains(&c) {
                let Some(twin) = free.pop() else {
                    return b.unsupported(format!("its equation {equation:?} uses too many letters"));
                };
                let size = sizes[&c];
                let mut eye = vec![0.0; size * size];
                (0..size).for_each(|k| eye[k * size + k] = 1.0);
                let eye = b.constant("grad/eye", Tensor::from_slice(&[size, size], &eye));
                inputs.push(b.cast(eye, dtype)?);
                left.push(text(&[c, twin]));
                sizes.insert(twin, size);
                target.push(twin);
            } else {
                target.push(c);
            }
        }
        // A letter that only this operand has is summed over: its gradient is the same along it.
        for &c in &target {
            if !left.iter().any(|t| t.contains(c)) {
                inputs.push(b.full(1.0, &[sizes[&c]], dtype)?);
                left.push(c.to_string());
            }
        }
        let equation = format!("{}->{}", left.join(","), text(&target));
        let mut dx = b.emit(Op::Einsum { equation }, &inputs)?;
        // A letter of size 1 in the result and in the other operands still spreads over this operand.
        let full: Vec<usize> = target.iter().map(|c| sizes[c]).collect();
        dx = b.expand(dx, &full)?;
        dx = b.reduce_to(dx, &shapes[i])?;
        b.give(i, dx)?;
    }
    Ok(())
}
