//! Gradients, statistics of batches and losses.

use lightering_graph::{
    ConvAttributes, DType, MaskRule, RecurrentAttributes, RecurrentCell, TensorType, TrainOp, UnaryOp,
};
use lightering_kernels::ops::attention::{AttentionOperands, AttentionShape};
use lightering_kernels::ops::gradient::{
    self, AttentionGradients, ChannelStatistics, CrossEntropy, ElementRule, Labels, RecurrentActivation,
    RecurrentGradients,
};
use lightering_kernels::ops::real::Real;
use lightering_kernels::ops::recurrent::{Cell, RecurrentOperands, RecurrentShape};
use lightering_kernels::ops::{Along, ConvolutionShape};
use lightering_units::Bytes;

use super::elementwise::unary;
use super::operands::*;
use super::{OpContext, OpError, TensorView, TensorViewMut};
use super::{attention, recurrent, resampling, statistics, windows};

/// A view of a tensor of which only the shape matters.
fn shape_only(dtype: DType, dims: &[usize]) -> TensorView<'_> {
    TensorView { dtype, dims, bytes: &[] }
}

/// The results as slices, those that nobody wants as `None`.
fn slices<'o, T: Real, const N: usize>(
    outputs: &'o mut [Option<TensorViewMut>],
) -> Result<[Option<&'o mut [T]>; N], OpError> {
    if let Some(bad) = outputs.iter().flatten().find(|o| o.dtype != T::DTYPE) {
        return invalid(format!("a result has element type {}, expected {}", bad.dtype, T::DTYPE));
    }
    let mut all = outputs.iter_mut();
    Ok(std::array::from_fn(|_| all.next().and_then(Option::as_mut).map(|o| o.as_mut_slice::<T>())))
}

/// The convolution that weights of shape `weight` do to a picture of shape `input`.
fn convolution(
    conv: &ConvAttributes,
    dtype: DType,
    input: &[usize],
    weight: &[usize],
    dy: &[usize],
) -> Result<ConvolutionShape, OpError> {
    let (x, w) = (shape_only(dtype, input), shape_only(dtype, weight));
    let shape = windows::convolution_shape(conv, &x, &w)?;
    let (batch, channels, spatial) = windows::picture(dy, conv.layout)?;
    let fits = conv.groups > 0
        && shape.in_channels == weight[1] * conv.groups
        && shape.out_channels.is_multiple_of(conv.groups)
        && (batch, channels) == (shape.batch, shape.out_channels)
        && spatial == shape.window.output;
    if !fits {
        return invalid(format!(
            "a convolution of {input:?} with weights {weight:?} in {} groups does not give {dy:?}",
            conv.groups
        ));
    }
    Ok(shape)
}

/// Sizes around the channels of `x`, whose statistics must have one element per channel.
fn channels(x: &TensorView, axis: usize, vectors: &[Option<TensorView>]) -> Result<Along, OpError> {
    let axis = normal_axis(axis as i64, x.dims.len())?;
    for v in vectors.iter().flatten() {
        expect_dtype(v, x.dtype, "a vector of channels")?;
        expect_count(v.dims, x.dims[axis], "a vector of channels")?;
    }
    Ok(Along::new(x.dims, axis))
}

/// Elements of an axis that stands first, or all of them.
fn row_of(dims: &[usize], axis: i64) -> Result<usize, OpError> {
    Ok(count(&dims[normal_axis(axis, dims.len())?..]))
}

/// Dispatch of this family.
pub(super) fn compute(
    op: &TrainOp,
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
    workspace: &mut [u8],
    context: &OpContext,
) -> Result<(), OpError> {
    // The operand that says which type is computed in.
    let dtype = match op {
        TrainOp::MaskGrad | TrainOp::GatherGrad { .. } => required(inputs, 1, "dy")?.dtype,
        _ => required(inputs, 0, "the first operand")?.dtype,
    };
    with_real!(dtype, T => run::<T>(op, inputs, outputs, workspace, context))
}

/// Scratch of this family.
pub(super) fn workspace_bytes(op: &TrainOp, inputs: &[Option<&TensorType>]) -> Bytes {
    let dims = |i: usize| inputs.get(i).copied().flatten().and_then(TensorType::dims);
    let elements = match op {
        TrainOp::DetGrad => dims(0).and_then(|d| d.last().map(|n| 2 * n * n)),
        TrainOp::AttentionGrad(a) => match (dims(0), dims(1), dims(2)) {
            (Some(q), Some(k), Some(v)) => attention::shape_of(a, &q, &k, &v, None)
                .ok()
                .map(|shape| gradient::attention_grad_scratch_len(&shape)),
            _ => None,
        },
        TrainOp::RecurrentGrad { cell, attributes } => match (dims(0), dims(1)) {
            (Some(x), Some(w)) => recurrent::shape_of(cell_of(*cell, attributes), attributes, &x, &w)
                .ok()
                .map(|shape| gradient::recurrent_grad_scratch_len(&shape)),
            _ => None,
        },
        _ => None,
    };
    Bytes(8 * elements.unwrap_or(0) as u64)
}

fn run<T: Real>(
    op: &TrainOp,
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
    workspace: &mut [u8],
    context: &OpContext,
) -> Result<(), OpError> {
    let pool = context.threads;
    // A floating-point operand of the type that is computed in.
    let float = |index: usize, name: &str| -> Result<TensorView, OpError> {
        let view = required(inputs, index, name)?;
        expect_dtype(&view, T::DTYPE, name)?;
        Ok(view)
    };
    let maybe = |index: usize, name: &str| -> Result<Option<TensorView>, OpError> {
        match optional(inputs, index) {
            Some(_) => float(index, name).map(Some),
            None => Ok(None),
        }
    };
    match op {
        TrainOp::ConvInputGrad { conv, input } => {
            let (dy, w) = (float(0, "dy")?, float(1, "w")?);
            let shape = convolution(conv, T::DTYPE, input, w.dims, dy.dims)?;
            gradient::convolution_input_grad(pool, &shape, &dy, &w, super::only(outputs)?)
        }
        TrainOp::ConvWeightGrad { conv, weight } => {
            let (x, dy) = (float(0, "x")?, float(1, "dy")?);
            let shape = convolution(conv, T::DTYPE, x.dims, weight, dy.dims)?;
            let dw = super::only(outputs)?;
            expect_dims(dw.dims, weight, "dw")?;
            gradient::convolution_weight_grad(
                pool,
                &shape,
                x.as_slice(),
                dy.as_slice(),
                dw.as_mut_slice::<T>(),
            );
            Ok(())
        }
        TrainOp::PoolGrad { pool: window, input } => {
            let (dy, x, y) = (float(0, "dy")?, maybe(1, "x")?, maybe(2, "y")?);
            let shape = windows::pooling_shape(window, &shape_only(T::DTYPE, input))?;
            let dx = super::only(outputs)?;
            expect_dims(dx.dims, input, "dx")?;
            expect_count(dy.dims, shape.batch * shape.channels * shape.window.positions(), "dy")?;
            if let (Some(x), Some(y)) = (x, y) {
                expect_dims(x.dims, input, "x")?;
                expect_dims(y.dims, dy.dims, "y")?;
            }
            let (x, y) = (x.map(|v| v.as_slice::<T>()), y.map(|v| v.as_slice::<T>()));
            gradient::pooling_grad(pool, &shape, dy.as_slice(), x, y, dx.as_mut_slice())
        }
        TrainOp::GatherGrad { axis, input } => {
            let (indices, dy) = (required(inputs, 0, "indices")?, float(1, "dy")?);
            let axis = normal_axis(*axis as i64, input.len())?;
            let table = Along::new(input, axis);
            let taken = count(indices.dims);
            expect_count(dy.dims, table.outer * taken * table.inner, "dy")?;
            for i in 0..taken {
                let index = integer_at(&indices, i)?;
                if index < -(table.size as i64) || index >= table.size as i64 {
                    return invalid(format!("index {index} is out of range for size {}", table.size));
                }
            }
            let place = |i: usize| {
                // Checked above.
                let index = integer_at(&indices, i).unwrap_or(0);
                (if index < 0 { index + table.size as i64 } else { index }) as usize
            };
            let dx = super::only(outputs)?;
            expect_dims(dx.dims, input, "dx")?;
            gradient::gather_grad(pool, table, taken, &place, dy.as_slice(), dx.as_mut_slice::<T>());
            Ok(())
        }
        TrainOp::ResizeGrad { resize, input, scales } => {
            let dy = float(0, "dy")?;
            let roi = vec![(0.0, 1.0); scales.len()];
            let shape = resampling::kernel_shape(resize, scales.clone(), roi);
            let dx = super::only(outputs)?;
            expect_dims(dx.dims, input, "dx")?;
            gradient::resize_grad(&shape, dy.dims, input, dy.as_slice(), dx.as_mut_slice::<T>())
        }
        TrainOp::GridSampleGrad { mode, padding, align_corners } => {
            let (x, grid, dy) = (float(0, "x")?, float(1, "grid")?, float(2, "dy")?);
            let fits = x.dims.len() >= 3
                && grid.dims.len() == x.dims.len()
                && grid.dims[0] == x.dims[0]
                && grid.dims[grid.dims.len() - 1] == x.dims.len() - 2
                && dy.dims.len() == x.dims.len()
                && dy.dims[..2] == x.dims[..2]
                && dy.dims[2..] == grid.dims[1..grid.dims.len() - 1];
            if !fits {
                return invalid(format!("samples {:?} of {:?} at {:?}", dy.dims, x.dims, grid.dims));
            }
            let (mode, outside) = (resampling::interpolation(*mode), resampling::outside(*padding));
            let [dx, dgrid] = slices::<T, 2>(outputs)?;
            let operands = (x.as_slice(), grid.as_slice(), dy.as_slice());
            gradient::grid_sample_grad(mode, outside, *align_corners, x.dims, operands, dx, dgrid)
        }
        TrainOp::DetGrad => {
            let (x, dy) = (float(0, "x")?, float(1, "dy")?);
            let &[.., rows, columns] = x.dims else { return invalid("a determinant of no matrix") };
            if rows != columns || rows == 0 || count(dy.dims) * rows * columns != count(x.dims) {
                return invalid(format!("determinants {:?} of {:?}", dy.dims, x.dims));
            }
            let scratch = scratch::<f64>(workspace, 2 * rows * rows)?;
            let dx = super::only(outputs)?;
            expect_dims(dx.dims, x.dims, "dx")?;
            gradient::det_grad(rows, x.as_slice::<T>(), dy.as_slice(), dx.as_mut_slice(), scratch);
            Ok(())
        }
        TrainOp::UnaryGrad(op) => {
            let (saved, dy) = (float(0, "saved")?, float(1, "dy")?);
            let dx = super::only(outputs)?;
            expect_count(saved.dims, count(dy.dims), "saved")?;
            expect_count(dx.dims, count(dy.dims), "dx")?;
            let (saved, dy) = (saved.as_slice(), dy.as_slice());
            gradient::unary_grad(pool, unary(*op), saved, dy, dx.as_mut_slice::<T>());
            Ok(())
        }
        TrainOp::SoftmaxGrad { axis, log } => {
            let (y, dy) = (float(0, "y")?, float(1, "dy")?);
            let along = statistics::along(&y, *axis)?;
            let dx = super::only(outputs)?;
            expect_dims(dy.dims, y.dims, "dy")?;
            expect_count(dx.dims, count(y.dims), "dx")?;
            gradient::softmax_grad(pool, along, *log, y.as_slice(), dy.as_slice(), dx.as_mut_slice::<T>());
            Ok(())
        }
        TrainOp::LayerNormGrad { axis, epsilon } | TrainOp::RmsNormGrad { axis, epsilon } => {
            let (x, scale, dy) = (float(0, "x")?, maybe(1, "scale")?, float(2, "dy")?);
            let row = row_of(x.dims, *axis)?;
            expect_dims(dy.dims, x.dims, "dy")?;
            if let Some(scale) = &scale {
                expect_count(scale.dims, row, "scale")?;
            }
            let results = slices::<T, 3>(outputs)?;
            for (out, len) in results.iter().zip([count(x.dims), row, row]) {
                if let Some(out) = out
                    && out.len() != len
                {
                    return invalid(format!("a result has {} elements, expected {len}", out.len()));
                }
            }
            if row > 0 {
                let rms = matches!(op, TrainOp::RmsNormGrad { .. });
                let scale = scale.map(|s| s.as_slice());
                gradient::layer_norm_grad(row, rms, *epsilon, x.as_slice(), scale, dy.as_slice(), results);
            }
            Ok(())
        }
        TrainOp::BatchStatistics { axis } => {
            let x = float(0, "x")?;
            let sizes = channels(&x, *axis, &[])?;
            let [mean, variance] = slices::<T, 2>(outputs)?;
            gradient::batch_statistics(sizes, x.as_slice(), mean, variance);
            Ok(())
        }
        TrainOp::Normalise { axis, epsilon } => {
            let (x, mean, variance) = (float(0, "x")?, float(1, "mean")?, float(2, "variance")?);
            let (scale, bias) = (maybe(3, "scale")?, maybe(4, "bias")?);
            let sizes = channels(&x, *axis, &[Some(mean), Some(variance), scale, bias])?;
            let known = ChannelStatistics {
                mean: mean.as_slice(),
                variance: variance.as_slice(),
                scale: scale.map(|v| v.as_slice()),
                epsilon: *epsilon,
            };
            let y = super::only(outputs)?;
            expect_dims(y.dims, x.dims, "y")?;
            let bias = bias.map(|v| v.as_slice());
            if !y.is_empty() {
                gradient::normalise(pool, sizes, &known, bias, x.as_slice(), y.as_mut_slice::<T>());
            }
            Ok(())
        }
        TrainOp::NormaliseGrad { axis, epsilon, batch } => {
            let (x, dy) = (float(0, "x")?, float(1, "dy")?);
            let (mean, variance, scale) = (float(2, "mean")?, float(3, "variance")?, maybe(4, "scale")?);
            expect_dims(dy.dims, x.dims, "dy")?;
            let sizes = channels(&x, *axis, &[Some(mean), Some(variance), scale])?;
            let known = ChannelStatistics {
                mean: mean.as_slice(),
                variance: variance.as_slice(),
                scale: scale.map(|v| v.as_slice()),
                epsilon: *epsilon,
            };
            let results = slices::<T, 3>(outputs)?;
            gradient::normalise_grad(sizes, &known, *batch, x.as_slice(), dy.as_slice(), results);
            Ok(())
        }
        TrainOp::ChannelSum { axis } => {
            let dy = float(0, "dy")?;
            let sizes = channels(&dy, *axis, &[])?;
            gradient::channel_sum(sizes, dy.as_slice(), super::only(outputs)?.as_mut_slice::<T>());
            Ok(())
        }
        TrainOp::CrossEntropy { label_smoothing, ignore } => {
            let logits = float(0, "logits")?;
            let classes = Classes::<T>::of(&logits, inputs, 2)?;
            let what = classes.what(&logits, *label_smoothing, *ignore);
            let [loss, rows] = slices::<T, 2>(outputs)?;
            if rows.as_ref().is_some_and(|r| r.len() * what.classes != count(logits.dims)) {
                return invalid("the losses do not have one element per row");
            }
            let mean =
                gradient::cross_entropy(&what, logits.as_slice(), rows).map_err(|l| no_class(l, &what))?;
            if let Some([loss]) = loss {
                *loss = T::from_f64(mean);
            }
            Ok(())
        }
        TrainOp::CrossEntropyGrad { label_smoothing, ignore } => {
            let logits = float(0, "logits")?;
            let classes = Classes::<T>::of(&logits, inputs, 3)?;
            let what = classes.what(&logits, *label_smoothing, *ignore);
            let dloss = number_scalar(&required(inputs, 2, "dloss")?, "dloss")?;
            let dx = super::only(outputs)?;
            expect_dims(dx.dims, logits.dims, "dlogits")?;
            gradient::cross_entropy_grad(&what, logits.as_slice(), dloss, dx.as_mut_slice())
                .map_err(|l| no_class(l, &what))
        }
        TrainOp::SignMask(rule) => {
            let x = float(0, "x")?;
            let bits = super::only(outputs)?;
            expect_count(bits.dims, count(x.dims).div_ceil(8), "the bits")?;
            let rule = match *rule {
                MaskRule::Above(t) => ElementRule::Above(t),
                MaskRule::Between(low, high) => ElementRule::Between(low, high),
            };
            gradient::sign_mask(pool, rule, x.as_slice::<T>(), bits.as_mut_slice::<u8>());
            Ok(())
        }
        TrainOp::MaskGrad => {
            let (bits, dy) = (required(inputs, 0, "bits")?, float(1, "dy")?);
            expect_dtype(&bits, DType::U8, "bits")?;
            expect_count(bits.dims, count(dy.dims).div_ceil(8), "bits")?;
            let dx = super::only(outputs)?;
            expect_count(dx.dims, count(dy.dims), "dx")?;
            gradient::mask_grad(pool, bits.as_slice(), dy.as_slice(), dx.as_mut_slice::<T>());
            Ok(())
        }
        TrainOp::RecurrentGrad { cell, attributes } => {
            recurrent_grad::<T>(*cell, attributes, inputs, outputs, workspace)
        }
        TrainOp::AttentionGrad(a) => {
            let (q, k, v, dy) = (float(0, "q")?, float(1, "k")?, float(2, "v")?, float(4, "dy")?);
            let shape = attention::shape_of(a, q.dims, k.dims, v.dims, None)?;
            let full = [shape.batch, shape.query.heads, shape.query.sequence, shape.keys()];
            let mask = match optional(inputs, 3) {
                Some(m) => Some(attention::mask_of::<T>(&m, full)?),
                None => None,
            };
            attention_grad(&shape, [q, k, v], mask, &dy, outputs, workspace)
        }
        TrainOp::Update { .. }
        | TrainOp::TrackStatistics { .. }
        | TrainOp::Perturb { .. }
        | TrainOp::GatherPerturbed { .. } => unsupported("updates of parameters outside a planned step"),
    }
}

fn no_class<T>(label: i64, what: &CrossEntropy<'_, T>) -> OpError {
    OpError::Invalid(format!("label {label} is not one of {} classes", what.classes))
}

/// Labels of either kind.
struct Classes<'a, T> {
    classes: Option<Vec<i64>>,
    probabilities: &'a [T],
    weights: Option<&'a [T]>,
}

impl<'a, T: Real> Classes<'a, T> {
    fn of(
        logits: &TensorView<'a>,
        inputs: &[Option<TensorView<'a>>],
        weights: usize,
    ) -> Result<Classes<'a, T>, OpError> {
        let labels = required(inputs, 1, "labels")?;
        let Some((&classes, rows)) = logits.dims.split_last() else {
            return invalid("the logits have no classes");
        };
        if classes == 0 {
            return invalid("there are no classes");
        }
        let weights = match optional(inputs, weights) {
            None => None,
            Some(w) => {
                expect_dtype(&w, T::DTYPE, "weights")?;
                expect_count(w.dims, count(rows), "weights")?;
                Some(w.as_slice::<T>())
            }
        };
        if labels.dtype.is_float() {
            expect_dtype(&labels, T::DTYPE, "labels")?;
            expect_dims(labels.dims, logits.dims, "labels")?;
            return Ok(Classes { classes: None, probabilities: labels.as_slice(), weights });
        }
        expect_count(labels.dims, count(rows), "labels")?;
        let classes = (0..count(rows)).map(|i| integer_at(&labels, i)).collect::<Result<_, _>>()?;
        Ok(Classes { classes: Some(classes), probabilities: &[], weights })
    }

    fn what(&self, logits: &TensorView, label_smoothing: f32, ignore: Option<i64>) -> CrossEntropy<'_, T> {
        CrossEntropy {
            classes: logits.dims.last().copied().unwrap_or(1),
            labels: match &self.classes {
                Some(classes) => Labels::Classes(classes),
                None => Labels::Probabilities(self.probabilities),
            },
            weights: self.weights,
            label_smoothing,
            ignore,
        }
    }
}

fn attention_grad<T: Real>(
    shape: &AttentionShape,
    [q, k, v]: [TensorView; 3],
    mask: Option<lightering_kernels::ops::attention::Mask<'_, T>>,
    dy: &TensorView,
    outputs: &mut [Option<TensorViewMut>],
    workspace: &mut [u8],
) -> Result<(), OpError> {
    let rows = shape.batch * shape.query.heads * shape.query.sequence;
    expect_count(dy.dims, rows * shape.value.size, "dy")?;
    let operands = AttentionOperands {
        query: q.as_slice::<T>(),
        key: k.as_slice(),
        value: v.as_slice(),
        past_key: &[],
        past_value: &[],
        mask,
        key_lengths: None,
    };
    let [query, key, value] = slices::<T, 3>(outputs)?;
    let mut results = AttentionGradients { query, key, value };
    let scratch = scratch::<f64>(workspace, gradient::attention_grad_scratch_len(shape))?;
    gradient::attention_grad(shape, &operands, dy.as_slice(), &mut results, scratch);
    Ok(())
}

fn cell_of(cell: RecurrentCell, a: &RecurrentAttributes) -> Cell {
    match cell {
        RecurrentCell::Rnn => Cell::Rnn,
        RecurrentCell::Gru => Cell::Gru { linear_before_reset: a.linear_before_reset },
        RecurrentCell::Lstm => Cell::Lstm { input_forget: a.input_forget },
    }
}

/// An activation of a recurrent layer.
struct Gate(UnaryOp);

impl RecurrentActivation for Gate {
    fn value(&self, x: f64) -> f64 {
        // Others were refused before.
        recurrent::scalar_activation(self.0, x).unwrap_or(f64::NAN)
    }

    fn slope(&self, x: f64, value: f64) -> f64 {
        match unary(self.0) {
            // Its result says nothing of its operand when the slope is not positive.
            lightering_kernels::ops::Unary::LeakyRelu { alpha } if x < 0.0 => alpha.into(),
            op if gradient::saves_result(op) => gradient::derivative(op, value),
            op => gradient::derivative(op, x),
        }
    }
}

fn recurrent_grad<T: Real>(
    cell: RecurrentCell,
    a: &RecurrentAttributes,
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
    workspace: &mut [u8],
) -> Result<(), OpError> {
    let (x, w, r) = (required(inputs, 0, "x")?, required(inputs, 1, "w")?, required(inputs, 2, "r")?);
    let cell = cell_of(cell, a);
    let shape: RecurrentShape = recurrent::shape_of(cell, a, x.dims, w.dims)?;
    let (gates, hidden) = (cell.gates() * shape.hidden, shape.hidden);
    let state = shape.directions * shape.batch * hidden;
    expect_dims(w.dims, &[shape.directions, gates, shape.input], "w")?;
    expect_dims(r.dims, &[shape.directions, gates, hidden], "r")?;
    let sizes = [
        (3, shape.directions * 2 * gates, "the bias"),
        (5, state, "the initial state"),
        (6, state, "the initial cell state"),
        (7, shape.directions * 3 * hidden, "the peepholes"),
        (8, shape.steps * state, "dy"),
        (9, state, "dy_h"),
        (10, state, "dy_c"),
    ];
    for (index, size, name) in sizes {
        if let Some(v) = optional(inputs, index) {
            expect_count(v.dims, size, name)?;
        }
    }
    for view in inputs.iter().enumerate().filter(|(i, _)| *i != 4).filter_map(|(_, v)| v.as_ref()) {
        expect_dtype(view, T::DTYPE, "an operand")?;
    }
    let lengths = match optional(inputs, 4) {
        None => None,
        Some(l) => {
            expect_dtype(&l, DType::I32, "the sequence lengths")?;
            expect_count(l.dims, shape.batch, "the sequence lengths")?;
            Some(l.as_slice::<i32>())
        }
    };
    let gate = |direction: usize, which: usize| Gate(recurrent::activation_at(a, cell, direction, which));
    let all: [[Gate; 3]; 2] = std::array::from_fn(|d| std::array::from_fn(|i| gate(d, i)));
    if let Some(bad) = all.iter().flatten().find(|g| recurrent::scalar_activation(g.0, 0.0).is_none()) {
        return unsupported(format!("activation {:?} in a recurrent layer", bad.0));
    }
    let activations: [[&dyn RecurrentActivation; 3]; 2] =
        std::array::from_fn(|d| std::array::from_fn(|i| &all[d][i] as &dyn RecurrentActivation));
    let slice = |i: usize| optional(inputs, i).map(|v| v.as_slice::<T>());
    let operands = RecurrentOperands {
        x: x.as_slice(),
        w: w.as_slice(),
        r: r.as_slice(),
        bias: slice(3),
        lengths,
        initial_h: slice(5),
        initial_c: slice(6),
        peepholes: slice(7),
        clip: a.clip.map(|c| T::from_f64(c.into())),
    };
    let [x, w, r, bias, initial_h, initial_c, peepholes] = slices::<T, 7>(outputs)?;
    let mut results = RecurrentGradients { x, w, r, bias, initial_h, initial_c, peepholes };
    let scratch = scratch::<f64>(workspace, gradient::recurrent_grad_scratch_len(&shape))?;
    gradient::recurrent_grad(
        &shape,
        &operands,
        &activations,
        [slice(8), slice(9), slice(10)],
        &mut results,
        scratch,
    );
    Ok(())
}
