use lightering_graph::{Op, TensorType};
use lightering_kernels::ops::{self, EinsumPlan, MatMulEpilogue};

use super::elementwise::unary;
use super::operands::{optional, required, scratch};
use super::{OpContext, OpError, TensorView, TensorViewMut};

/// Computes matrix products and their kin.
pub(super) fn compute(
    op: &Op,
    inputs: &[Option<TensorView>],
    y: &mut TensorViewMut,
    workspace: &mut [u8],
    context: &OpContext,
) -> Result<(), OpError> {
    let pool = context.threads;
    match op {
        Op::MatMul(a) => {
            let epilogue = MatMulEpilogue {
                alpha: a.alpha,
                column_scale: optional(inputs, 4),
                added: [optional(inputs, 2).map(|b| (1.0, b)), optional(inputs, 3).map(|r| (1.0, r))],
                activation: a.activation.map(unary),
            };
            let (left, right) = (required(inputs, 0, "a")?, required(inputs, 1, "b")?);
            ops::matmul(pool, &left, a.trans_a, &right, a.trans_b, &epilogue, y)
        }
        Op::Gemm(a) => {
            let epilogue = MatMulEpilogue {
                alpha: a.alpha,
                column_scale: None,
                added: [optional(inputs, 2).map(|c| (a.beta, c)), None],
                activation: None,
            };
            let (left, right) = (required(inputs, 0, "a")?, required(inputs, 1, "b")?);
            ops::matmul(pool, &left, a.trans_a, &right, a.trans_b, &epilogue, y)
        }
        Op::Einsum { equation } => {
            let operands: Vec<TensorView> = inputs.iter().flatten().copied().collect();
            let shapes: Vec<&[usize]> = operands.iter().map(|x| x.dims).collect();
            ops::einsum(pool, &EinsumPlan::new(equation, &shapes)?, &operands, y)
        }
        Op::Det => {
            let x = required(inputs, 0, "x")?;
            let n = x.dims.last().copied().unwrap_or(0);
            ops::det(&x, y, scratch(workspace, n * n)?)
        }
        other => Err(super::no_kernel(other)),
    }
}

/// Scratch bytes of these operators.
pub(super) fn workspace_bytes(op: &Op, inputs: &[Option<&TensorType>]) -> usize {
    match op {
        Op::Det => {
            let dims = inputs.first().copied().flatten().and_then(TensorType::dims).unwrap_or_default();
            let n = dims.last().copied().unwrap_or(0);
            n.saturating_mul(n).saturating_mul(8)
        }
        _ => 0,
    }
}
