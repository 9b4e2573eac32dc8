use lightering_graph::{BinaryOp, ElementwiseStep, Op, UnaryOp, VariadicOp};
use lightering_kernels::ops::{self, Binary, Step, Unary};

use super::operands::{optional, required};
use super::{OpContext, OpError, TensorView, TensorViewMut};

/// The kernels' name of a unary operator.
pub(crate) fn unary(op: UnaryOp) -> Unary {
    match op {
        UnaryOp::Abs => Unary::Abs,
        UnaryOp::Acos => Unary::Acos,
        UnaryOp::Acosh => Unary::Acosh,
        UnaryOp::Asin => Unary::Asin,
        UnaryOp::Asinh => Unary::Asinh,
        UnaryOp::Atan => Unary::Atan,
        UnaryOp::Atanh => Unary::Atanh,
        UnaryOp::BitwiseNot => Unary::BitwiseNot,
        UnaryOp::Ceil => Unary::Ceil,
        UnaryOp::Celu { alpha } => Unary::Celu { alpha },
        UnaryOp::ClipTo { min, max } => Unary::ClipTo { min, max },
        UnaryOp::Cos => Unary::Cos,
        UnaryOp::Cosh => Unary::Cosh,
        UnaryOp::Elu { alpha } => Unary::Elu { alpha },
        UnaryOp::Erf => Unary::Erf,
        UnaryOp::Exp => Unary::Exp,
        UnaryOp::Floor => Unary::Floor,
        UnaryOp::Gelu { tanh } => Unary::Gelu { tanh },
        UnaryOp::HardSigmoid { alpha, beta } => Unary::HardSigmoid { alpha, beta },
        UnaryOp::HardSwish => Unary::HardSwish,
        UnaryOp::Identity => Unary::Identity,
        UnaryOp::IsInf { negative, positive } => Unary::IsInf { negative, positive },
        UnaryOp::IsNan => Unary::IsNan,
        UnaryOp::LeakyRelu { alpha } => Unary::LeakyRelu { alpha },
        UnaryOp::Log => Unary::Log,
        UnaryOp::Mish => Unary::Mish,
        UnaryOp::Neg => Unary::Neg,
        UnaryOp::Not => Unary::Not,
        UnaryOp::Reciprocal => Unary::Reciprocal,
        UnaryOp::Relu => Unary::Relu,
        UnaryOp::Round => Unary::Round,
        UnaryOp::Rsqrt => Unary::Rsqrt,
        UnaryOp::Selu { alpha, gamma } => Unary::Selu { alpha, gamma },
        UnaryOp::Shrink { bias, lambd } => Unary::Shrink { bias, lambd },
        UnaryOp::Sigmoid => Unary::Sigmoid,
        UnaryOp::Sign => Unary::Sign,
        UnaryOp::Sin => Unary::Sin,
        UnaryOp::Sinh => Unary::Sinh,
        UnaryOp::Softplus => Unary::Softplus,
        UnaryOp::Softsign => Unary::Softsign,
        UnaryOp::Sqrt => Unary::Sqrt,
        UnaryOp::Swish { alpha } => Unary::Swish { alpha },
        UnaryOp::Tan => Unary::Tan,
        UnaryOp::Tanh => Unary::Tanh,
        UnaryOp::ThresholdedRelu { alpha } => Unary::ThresholdedRelu { alpha },
    }
}

/// The kernels' name of a binary operator.
pub(crate) fn binary(op: BinaryOp) -> Binary {
    match op {
        BinaryOp::Add => Binary::Add,
        BinaryOp::Sub => Binary::Sub,
        BinaryOp::Mul => Binary::Mul,
        BinaryOp::Div => Binary::Div,
        BinaryOp::Mod => Binary::Mod,
        BinaryOp::FMod => Binary::FMod,
        BinaryOp::Pow => Binary::Pow,
        BinaryOp::PRelu => Binary::PRelu,
        BinaryOp::And => Binary::And,
        BinaryOp::Or => Binary::Or,
        BinaryOp::Xor => Binary::Xor,
        BinaryOp::BitAnd => Binary::BitAnd,
        BinaryOp::BitOr => Binary::BitOr,
        BinaryOp::BitXor => Binary::BitXor,
        BinaryOp::ShiftLeft => Binary::ShiftLeft,
        BinaryOp::ShiftRight => Binary::ShiftRight,
        BinaryOp::Equal => Binary::Equal,
        BinaryOp::Greater => Binary::Greater,
        BinaryOp::GreaterOrEqual => Binary::GreaterOrEqual,
        BinaryOp::Less => Binary::Less,
        BinaryOp::LessOrEqual => Binary::LessOrEqual,
        BinaryOp::Max => Binary::Max,
        BinaryOp::Min => Binary::Min,
    }
}

/// Computes the operators that go element by element.
pub(super) fn compute(
    op: &Op,
    inputs: &[Option<TensorView>],
    y: &mut TensorViewMut,
    context: &OpContext,
) -> Result<(), OpError> {
    let pool = context.threads;
    let x = required(inputs, 0, "x")?;
    match op {
        Op::Unary(op) => ops::unary(pool, unary(*op), &x, y),
        Op::Binary(op) => ops::binary(pool, binary(*op), &x, &required(inputs, 1, "b")?, y),
        Op::Variadic(op) => {
            let operands: Vec<TensorView> = inputs.iter().flatten().copied().collect();
            let (op, mean) = match op {
                VariadicOp::Sum => (Binary::Add, false),
                VariadicOp::Mean => (Binary::Add, true),
                VariadicOp::Max => (Binary::Max, false),
                VariadicOp::Min => (Binary::Min, false),
            };
            ops::variadic(pool, op, mean, &operands, y)
        }
        Op::Where => ops::select(pool, &x, &required(inputs, 1, "a")?, &required(inputs, 2, "b")?, y),
        Op::Clip => {
            let (min, max) = (optional(inputs, 1), optional(inputs, 2));
            ops::clip(pool, &x, min.as_ref(), max.as_ref(), y)
        }
        Op::Cast { saturate, .. } => ops::cast(pool, &x, *saturate, y),
        Op::Elementwise(steps) => {
            let steps: Vec<Step> = steps
                .iter()
                .map(|step| match *step {
                    ElementwiseStep::Unary(op) => Step::Unary(unary(op)),
                    ElementwiseStep::Binary { op, operand, swapped } => {
                        Step::Binary { op: binary(op), operand, swapped }
                    }
                })
                .collect();
            ops::chain(pool, &steps, inputs, y)
        }
        other => Err(super::no_kernel(other)),
    }
}
