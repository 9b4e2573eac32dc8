//! Operators of decoder language models that a fine-tuning passes through; their weights in blocks stay as they are.

use super::backward::{Backward, Step};
use crate::{LmOp, Node, Op, Tensor, TrainOp, ValueId};

pub(super) fn rule(b: &mut Backward<'_>, op: &LmOp, n: &Node, dy: &[Option<ValueId>]) -> Step {
    let Some(dy) = dy.first().copied().flatten() else { return Ok(()) };
    match op {
        LmOp::BlockMatMul { format } => {
            if b.wants(2) {
                let db = b.train(TrainOp::ChannelSum { axis: 1 }, &[dy])?;
                b.give(2, db)?;
            }
            if b.wants(0) {
                // All rows of the weights as numbers, for the time of one product.
                let w = b.node_input(n, 1)?;
                let rows = i32::try_from(b.dims(w)?[0]);
                let Ok(rows) = rows else { return b.unsupported("its weights have too many rows") };
                let ids: Vec<i32> = (0..rows).collect();
                let ids = b.constant("grad/rows", Tensor::from_slice(&[ids.len()], &ids));
                let table = b.emit(Op::Lm(Box::new(LmOp::BlockGather { format: *format })), &[w, ids])?;
                let dx = b.matmul(dy, table, (false, false), 1.0)?;
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
