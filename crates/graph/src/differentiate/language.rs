//! Operators of decoder language models that a fine-tuning passes through; their weights in blocks stay as they are.

use lightering_units::BlockFormat;

use super::backward::{Backward, Step};
use crate::{LmOp, Node, Op, Tensor, TrainOp, ValueId};

/// Elements of weights that lie decoded at a time: a whole matrix of a layer, a part of the matrix behind a vocabulary.
const DECODED: usize = 8 << 20;

pub(super) fn rule(b: &mut Backward<'_>, op: &LmOp, n: &Node, dy: &[Option<ValueId>]) -> Step {
    let Some(dy) = dy.first().copied().flatten() else { return Ok(()) };
    match op {
        LmOp::BlockMatMul { format } => {
            if b.wants(2) {
                let db = b.train(TrainOp::ChannelSum { axis: 1 }, &[dy])?;
                b.give(2, db)?;
            }
            if b.wants(0) {
                let dx = through_blocks(b, *format, n, dy)?;
                b.give(0, dx)?;
            }
            Ok(())
        }
        LmOp::Rope { .. } => {
            b.refuse(1, "angles")?;
            // The rotation back is by the opposite angle: the same cosines, the sines negated.
            let angles = b.node_input(n, 1)?;
            let dims = b.dims(angles)?[1];
            let signs: Vec<f32> = (0..dims).map(|i| if i < dims / 2 { 1.0 } else { -1.0 }).collect();
            let signs = b.constant("grad/signs", Tensor::from_slice(&[dims], &signs));
            let back = b.mul(angles, signs)?;
            let dx = b.emit(n.op.clone(), &[dy, back])?;
            b.give(0, dx)
        }
        _ => b.unsupported("it has no derivative"),
    }
}

/// `dy · w`, for which the weights are decoded some rows at a time, so that their f32 form is never held as a whole.
fn through_blocks(b: &mut Backward<'_>, format: BlockFormat, n: &Node, dy: ValueId) -> Step<ValueId> {
    let w = b.node_input(n, 1)?;
    let x = b.node_input(n, 0)?;
    let (rows, columns) = (b.dims(w)?[0], b.dims(x)?.last().copied().unwrap_or(1));
    if i32::try_from(rows).is_err() {
        return b.unsupported("its weights have too many rows");
    }
    let together = (DECODED / columns.max(1)).max(1);
    let mut sum = None;
    let mut first = 0;
    while first < rows || sum.is_none() {
        let end = (first + together).min(rows);
        let ids: Vec<i32> = (first as i32..end as i32).collect();
        let ids = b.constant("grad/rows", Tensor::from_slice(&[ids.len()], &ids));
        let table = b.emit(Op::Lm(Box::new(LmOp::BlockGather { format })), &[w, ids])?;
        let part = if end - first == rows { dy } else { b.slice(dy, 1, first, end)? };
        let dx = b.matmul(part, table, (false, false), 1.0)?;
        sum = Some(match sum {
            None => dx,
            Some(sum) => b.add(sum, dx)?,
        });
        first = end;
    }
    Ok(sum.expect("the loop runs at least once"))
}
