//! Recurrent layers.

use bytemuck::Pod;
use lightering_graph::{DType, Direction, Op, RecurrentAttributes, TensorType, UnaryOp};
use lightering_kernels::ops::real::{Real, narrow, widen};
use lightering_kernels::ops::recurrent::{
    ActivationFn, Cell, Compute, RecurrentOperands, RecurrentResults, RecurrentShape, recurrent,
};
use lightering_kernels::{Activation, ThreadPool, activate};
use lightering_units::Bytes;

use super::operands::*;
use super::{OpError, TensorView, TensorViewMut};

fn cell_of(op: &Op) -> Option<(Cell, &RecurrentAttributes)> {
    Some(match op {
        Op::Rnn(a) => (Cell::Rnn, a),
        Op::Lstm(a) => (Cell::Lstm { input_forget: a.input_forget }, a),
        Op::Gru(a) => (Cell::Gru { linear_before_reset: a.linear_before_reset }, a),
        _ => return None,
    })
}

/// Sizes of a recurrent layer whose operands have these shapes.
pub(super) fn shape_of(
    cell: Cell,
    a: &RecurrentAttributes,
    x: &[usize],
    w: &[usize],
) -> Result<RecurrentShape, OpError> {
    let (&[first, second, input], &[directions, gates, _]) = (x, w) else {
        return invalid(format!(
            "a recurrent layer of operands {x:?} and weights {w:?}, expected 3 dimensions each"
        ));
    };
    let (steps, batch) = if a.batch_first { (second, first) } else { (first, second) };
    let hidden = gates / cell.gates();
    let expected = if a.direction == Direction::Bidirectional { 2 } else { 1 };
    if directions != expected {
        return invalid(format!("weights {w:?} for {expected} directions"));
    }
    Ok(RecurrentShape {
        cell,
        steps,
        batch,
        input,
        hidden,
        directions,
        reverse: a.direction == Direction::Reverse,
        batch_first: a.batch_first,
    })
}

/// Elements of all operands and results, which half-precision layers hold once more in single precision.
fn widened_len(dims: impl Iterator<Item = Option<usize>>) -> usize {
    dims.flatten().sum()
}

/// Scratch of this family.
pub(super) fn workspace_bytes(
    op: &Op,
    inputs: &[Option<&TensorType>],
    outputs: &[Option<&TensorType>],
) -> Bytes {
    let (Some((cell, a)), [Some(x), Some(w), ..]) = (cell_of(op), inputs) else { return Bytes::ZERO };
    let (Some(x_dims), Some(w_dims)) = (x.dims(), w.dims()) else { return Bytes::ZERO };
    let Ok(shape) = shape_of(cell, a, &x_dims, &w_dims) else { return Bytes::ZERO };
    let elements = shape.scratch_len();
    Bytes(match x.dtype {
        DType::F64 => 8 * elements as u64,
        DType::F32 => 4 * elements as u64,
        _ => {
            let float = |t: &&TensorType| t.dtype.is_float();
            let operands = inputs.iter().flatten().filter(|t| float(t)).map(|t| t.elements());
            let results = outputs.iter().flatten().map(|t| t.elements());
            4 * (elements + widened_len(operands.chain(results))) as u64
        }
    })
}

/// The activations that ONNX allows in recurrent layers, one element at a time.
pub(super) fn scalar_activation(op: UnaryOp, x: f64) -> Option<f64> {
    Some(match op {
        UnaryOp::Identity => x,
        UnaryOp::Relu => x.max(0.0),
        UnaryOp::Tanh => x.tanh(),
        UnaryOp::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        UnaryOp::LeakyRelu { alpha } => {
            if x < 0.0 {
                f64::from(alpha) * x
            } else {
                x
            }
        }
        UnaryOp::ThresholdedRelu { alpha } => {
            if x > f64::from(alpha) {
                x
            } else {
                0.0
            }
        }
        UnaryOp::HardSigmoid { alpha, beta } => (f64::from(alpha) * x + f64::from(beta)).clamp(0.0, 1.0),
        UnaryOp::Elu { alpha } => {
            if x < 0.0 {
                f64::from(alpha) * x.exp_m1()
            } else {
                x
            }
        }
        UnaryOp::Softsign => x / (1.0 + x.abs()),
        UnaryOp::Softplus => x.max(0.0) + (-x.abs()).exp().ln_1p(),
        UnaryOp::ClipTo { min, max } => x.clamp(f64::from(min), f64::from(max)),
        UnaryOp::Abs => x.abs(),
        UnaryOp::Sin => x.sin(),
        UnaryOp::Cos => x.cos(),
        _ => return None,
    })
}

/// Element types that recurrent layers compute in.
trait Scalar: Compute + Pod {
    fn from_wide(x: f64) -> Self;
    fn wide(self) -> f64;
    fn apply(pool: &ThreadPool, op: UnaryOp, values: &mut [Self]);
}

fn apply_scalar<T: Scalar>(op: UnaryOp, values: &mut [T]) {
    for v in values {
        // Other operators were refused before the layer ran.
        *v = T::from_wide(scalar_activation(op, v.wide()).unwrap_or(f64::NAN));
    }
}

impl Scalar for f64 {
    fn from_wide(x: f64) -> f64 {
        x
    }
    fn wide(self) -> f64 {
        self
    }
    fn apply(_: &ThreadPool, op: UnaryOp, values: &mut [f64]) {
        apply_scalar(op, values);
    }
}

impl Scalar for f32 {
    fn from_wide(x: f64) -> f32 {
        x as f32
    }
    fn wide(self) -> f64 {
        self.into()
    }
    fn apply(pool: &ThreadPool, op: UnaryOp, values: &mut [f32]) {
        match op {
            UnaryOp::Sigmoid => activate(pool, Activation::Sigmoid, values),
            UnaryOp::Tanh => activate(pool, Activation::Tanh, values),
            _ => apply_scalar(op, values),
        }
    }
}

/// Operands in the element type of the computation.
struct Floats<'a, T> {
    operands: [Option<&'a [T]>; 8],
    lengths: Option<&'a [i32]>,
}

/// Dispatch of this family.
pub(super) fn compute(
    op: &Op,
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
    workspace: &mut [u8],
    pool: &ThreadPool,
) -> Result<(), OpError> {
    let Some((cell, a)) = cell_of(op) else { return Err(super::no_kernel(op)) };
    let (x, w, r) = (required(inputs, 0, "x")?, required(inputs, 1, "w")?, required(inputs, 2, "r")?);
    let shape = shape_of(cell, a, x.dims, w.dims)?;
    let (gates, hidden) = (cell.gates() * shape.hidden, shape.hidden);
    if a.hidden_size != 0 && a.hidden_size != hidden {
        return invalid(format!("hidden_size is {}, but the weights have {hidden}", a.hidden_size));
    }
    expect_dims(w.dims, &[shape.directions, gates, shape.input], "w")?;
    expect_dims(r.dims, &[shape.directions, gates, hidden], "r")?;
    let state = shape.directions * shape.batch * hidden;
    let sizes = [
        (3, shape.directions * 2 * gates, "the bias"),
        (5, state, "the initial state"),
        (6, state, "the initial cell state"),
        (7, shape.directions * 3 * hidden, "the peepholes"),
    ];
    for (index, size, name) in sizes {
        if let Some(v) = optional(inputs, index) {
            expect_count(v.dims, size, name)?;
        }
    }
    for view in inputs.iter().enumerate().filter(|(i, _)| *i != 4).filter_map(|(_, v)| v.as_ref()) {
        expect_dtype(view, x.dtype, "an operand")?;
    }
    let lengths = match optional(inputs, 4) {
        None => None,
        Some(l) => {
            expect_dtype(&l, DType::I32, "the sequence lengths")?;
            expect_count(l.dims, shape.batch, "the sequence lengths")?;
            let lengths: &[i32] = l.as_slice();
            if let Some(bad) = lengths.iter().find(|&&l| l < 0 || l as usize > shape.steps) {
                return invalid(format!("sequence length {bad} of {} steps", shape.steps));
            }
            Some(lengths)
        }
    };
    let result_sizes = [shape.steps * state, state, state];
    for (out, size) in outputs.iter().zip(result_sizes) {
        if let Some(out) = out {
            expect_count(out.dims, size, "a result")?;
        }
    }
    match x.dtype {
        DType::F32 => direct::<f32>(a, &shape, inputs, lengths, outputs, workspace, pool),
        DType::F64 => direct::<f64>(a, &shape, inputs, lengths, outputs, workspace, pool),
        DType::F16 => through_f32::<half::f16>(a, &shape, inputs, lengths, outputs, workspace, pool),
        DType::BF16 => through_f32::<half::bf16>(a, &shape, inputs, lengths, outputs, workspace, pool),
        other => unsupported(format!("recurrent layers of element type {other}")),
    }
}

/// The activation `f`, `g` or `h` (0, 1, 2) of one direction.
pub(super) fn activation_at(a: &RecurrentAttributes, cell: Cell, direction: usize, which: usize) -> UnaryOp {
    let (defaults, per_direction) = match cell {
        Cell::Rnn => ([UnaryOp::Tanh; 3], 1),
        Cell::Gru { .. } => ([UnaryOp::Sigmoid, UnaryOp::Tanh, UnaryOp::Tanh], 2),
        Cell::Lstm { .. } => ([UnaryOp::Sigmoid, UnaryOp::Tanh, UnaryOp::Tanh], 3),
    };
    let given = (which < per_direction).then(|| a.activations.get(direction * per_direction + which));
    given.flatten().copied().unwrap_or(defaults[which])
}

fn run<T: Scalar>(
    a: &RecurrentAttributes,
    shape: &RecurrentShape,
    floats: &Floats<'_, T>,
    results: &mut RecurrentResults<'_, T>,
    workspace: &mut [T],
    pool: &ThreadPool,
) -> Result<(), OpError> {
    let op_at = |direction: usize, which: usize| activation_at(a, shape.cell, direction, which);
    for direction in 0..shape.directions {
        for which in 0..3 {
            let op = op_at(direction, which);
            if scalar_activation(op, 0.0).is_none() {
                return unsupported(format!("activation {op:?} in a recurrent layer"));
            }
        }
    }
    let closures: [[_; 3]; 2] = std::array::from_fn(|direction| {
        std::array::from_fn(|which| {
            let op = op_at(direction, which);
            move |values: &mut [T]| T::apply(pool, op, values)
        })
    });
    let activations: [[ActivationFn<'_, T>; 3]; 2] =
        std::array::from_fn(|d| std::array::from_fn(|w| &closures[d][w] as ActivationFn<'_, T>));
    let o = &floats.operands;
    let operands = RecurrentOperands {
        x: o[0].unwrap_or_default(),
        w: o[1].unwrap_or_default(),
        r: o[2].unwrap_or_default(),
        bias: o[3],
        lengths: floats.lengths,
        initial_h: o[5],
        initial_c: o[6],
        peepholes: o[7],
        clip: a.clip.map(|c| T::from_wide(c.into())),
    };
    recurrent(pool, shape, &operands, &activations, results, workspace);
    Ok(())
}

fn direct<T: Scalar>(
    a: &RecurrentAttributes,
    shape: &RecurrentShape,
    inputs: &[Option<TensorView>],
    lengths: Option<&[i32]>,
    outputs: &mut [Option<TensorViewMut>],
    workspace: &mut [u8],
    pool: &ThreadPool,
) -> Result<(), OpError> {
    let operands =
        std::array::from_fn(|i| if i == 4 { None } else { optional(inputs, i).map(|v| v.as_slice::<T>()) });
    let mut slices = outputs.iter_mut().map(|o| o.as_mut().map(|o| o.as_mut_slice::<T>()));
    let mut next = || slices.next().flatten();
    let mut results = RecurrentResults { y: next(), h: next(), c: next() };
    let scratch = scratch::<T>(workspace, shape.scratch_len())?;
    run(a, shape, &Floats { operands, lengths }, &mut results, scratch, pool)
}

fn through_f32<T: Real>(
    a: &RecurrentAttributes,
    shape: &RecurrentShape,
    inputs: &[Option<TensorView>],
    lengths: Option<&[i32]>,
    outputs: &mut [Option<TensorViewMut>],
    workspace: &mut [u8],
    pool: &ThreadPool,
) -> Result<(), OpError> {
    let len = |i: usize| optional(inputs, i).filter(|_| i != 4).map_or(0, |v| count(v.dims));
    let results_len: usize = outputs.iter().flatten().map(|o| count(o.dims)).sum();
    let operands_len: usize = (0..8).map(len).sum();
    let all = scratch::<f32>(workspace, shape.scratch_len() + operands_len + results_len)?;
    let (scratch, rest) = all.split_at_mut(shape.scratch_len());
    let (wide_operands, mut rest) = rest.split_at_mut(operands_len);
    let mut first = 0;
    for i in 0..8 {
        if let Some(v) = optional(inputs, i).filter(|_| i != 4) {
            widen(v.as_slice::<T>(), &mut wide_operands[first..first + len(i)]);
            first += len(i);
        }
    }
    let mut first = 0;
    let operands = std::array::from_fn(|i| {
        let slice = optional(inputs, i).filter(|_| i != 4).map(|_| &wide_operands[first..first + len(i)]);
        first += len(i);
        slice
    });
    let mut wide: [Option<&mut [f32]>; 3] = [None, None, None];
    for (wide, out) in wide.iter_mut().zip(outputs.iter()) {
        if let Some(out) = out {
            let (slice, tail) = rest.split_at_mut(count(out.dims));
            (*wide, rest) = (Some(slice), tail);
        }
    }
    let [y, h, c] = &mut wide;
    let mut results = RecurrentResults { y: y.as_deref_mut(), h: h.as_deref_mut(), c: c.as_deref_mut() };
    run(a, shape, &Floats { operands, lengths }, &mut results, scratch, pool)?;
    for (wide, out) in wide.iter().zip(outputs.iter_mut()) {
        if let (Some(wide), Some(out)) = (wide, out) {
            narrow(wide, out.as_mut_slice::<T>());
        }
    }
    Ok(())
}
