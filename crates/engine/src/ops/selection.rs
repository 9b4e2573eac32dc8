use lightering_graph::{DType, Op, Tensor};
use lightering_kernels::ops;
use lightering_units::Bytes;

use super::operands::normal_axis;
use super::{OpContext, OpError, TensorView};
use crate::RuntimeValue;

fn tensor<'a>(inputs: &[Option<&'a RuntimeValue>], index: usize) -> Result<&'a Tensor, OpError> {
    match inputs.get(index).copied().flatten() {
        Some(RuntimeValue::Tensor(t)) => Ok(t),
        _ => Err(OpError::Invalid(format!("operand {index}: expected a tensor"))),
    }
}

/// Asks for the bytes of a result before it is made; the caller counts the value itself.
fn ask(context: &OpContext, count: usize, size: usize) -> Result<(), OpError> {
    let bytes = Bytes(count as u64 * size as u64);
    match context.memory.reserve("data-dependent result", bytes) {
        Ok(_) => Ok(()),
        Err(e) => Err(OpError::Budget(e.to_string())),
    }
}

/// Computes the operators whose result size depends on the elements.
pub(super) fn compute(
    op: &Op,
    inputs: &[Option<&RuntimeValue>],
    outputs_wanted: &[bool],
    context: &OpContext,
) -> Result<Vec<Option<RuntimeValue>>, OpError> {
    let x = tensor(inputs, 0)?;
    match op {
        Op::NonZero => Ok(vec![Some(non_zero(x, context)?.into())]),
        Op::Compress { axis } => Ok(vec![Some(compress(*axis, x, tensor(inputs, 1)?, context)?.into())]),
        Op::Unique { axis, sorted } => {
            let results = unique(*axis, *sorted, x, context)?;
            Ok(results.into_iter().zip(outputs_wanted).map(|(t, &wanted)| wanted.then(|| t.into())).collect())
        }
        other => Err(super::no_kernel(other)),
    }
}

fn non_zero(x: &Tensor, context: &OpContext) -> Result<Tensor, OpError> {
    let size = x.dtype().size_bytes();
    let float = x.dtype().is_float();
    // −0 has a bit set and still is zero.
    let nonzero = |e: &[u8]| {
        let (last, rest) = e.split_last().expect("elements have bytes");
        rest.iter().any(|&b| b != 0) || if float { last & 0x7f != 0 } else { *last != 0 }
    };
    let found = x.as_bytes().chunks(size).filter(|e| nonzero(e)).count();
    // A scalar counts as a vector of one element with no coordinates.
    let rank = x.dims().len();
    ask(context, found * rank, 8)?;
    let mut y = Tensor::zeros(DType::I64, &[rank, found]);
    let out = y.as_mut_slice::<i64>();
    for (k, (i, _)) in x.as_bytes().chunks(size).enumerate().filter(|(_, e)| nonzero(e)).enumerate() {
        let mut rest = i;
        for axis in (0..rank).rev() {
            out[axis * found + k] = (rest % x.dims()[axis]) as i64;
            rest /= x.dims()[axis];
        }
    }
    Ok(y)
}

/// Copies the slices `picked` along an axis; `None` flattens.
fn pick(axis: Option<usize>, picked: &[usize], x: &Tensor, context: &OpContext) -> Result<Tensor, OpError> {
    let flat = [x.len()];
    let (dims, axis) = match axis {
        Some(axis) => (x.dims(), axis),
        None => (&flat[..], 0),
    };
    let along = ops::Along::new(dims, axis);
    let mut result = dims.to_vec();
    result[axis] = picked.len();
    ask(context, along.outer * picked.len() * along.inner, x.dtype().size_bytes())?;
    let mut y = Tensor::zeros(x.dtype(), &result);
    let row = along.inner * x.dtype().size_bytes();
    let out = y.as_bytes_mut();
    for o in 0..along.outer {
        for (k, &p) in picked.iter().enumerate() {
            out[(o * picked.len() + k) * row..][..row]
                .copy_from_slice(&x.as_bytes()[(o * along.size + p) * row..][..row]);
        }
    }
    Ok(y)
}

fn compress(
    axis: Option<i64>,
    x: &Tensor,
    condition: &Tensor,
    context: &OpContext,
) -> Result<Tensor, OpError> {
    let axis = axis.map(|a| normal_axis(a, x.dims().len())).transpose()?;
    let size = axis.map_or(x.len(), |a| x.dims()[a]);
    if condition.dtype() != DType::Bool || condition.len() > size {
        return Err(OpError::Invalid(format!(
            "the condition is {}, expected at most {size} bools",
            condition.tensor_type()
        )));
    }
    let picked: Vec<usize> =
        condition.as_slice::<u8>().iter().enumerate().filter(|(_, c)| **c != 0).map(|(i, _)| i).collect();
    pick(axis, &picked, x, context)
}

/// `(values, first positions, inverse, counts)`.
fn unique(axis: Option<i64>, sorted: bool, x: &Tensor, context: &OpContext) -> Result<[Tensor; 4], OpError> {
    let axis = axis.map(|a| normal_axis(a, x.dims().len())).transpose()?;
    let flat = [x.len()];
    let along = match axis {
        Some(axis) => ops::Along::new(x.dims(), axis),
        None => ops::Along::new(&flat, 0),
    };
    ask(context, x.len() + 3 * along.size, 8)?;
    let view = TensorView { dtype: x.dtype(), dims: x.dims(), bytes: x.as_bytes() };
    let keys: Vec<u64> = (0..x.len()).map(|i| ops::sort_key(&view, i)).collect::<Result<_, _>>()?;
    let slice = |k: usize| {
        let keys = &keys;
        (0..along.outer)
            .flat_map(move |o| (0..along.inner).map(move |j| keys[(o * along.size + k) * along.inner + j]))
    };
    let mut order: Vec<usize> = (0..along.size).collect();
    order.sort_by(|&a, &b| slice(a).cmp(slice(b)));
    // Groups of equal slices in ascending order; the first member is the first occurrence, as sorting is stable.
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for k in order {
        match groups.last_mut() {
            Some(group) if slice(group[0]).eq(slice(k)) => group.push(k),
            _ => groups.push(vec![k]),
        }
    }
    if !sorted {
        groups.sort_by_key(|g| g[0]);
    }
    let firsts: Vec<usize> = groups.iter().map(|g| g[0]).collect();
    let mut inverse = vec![0i64; along.size];
    for (i, group) in groups.iter().enumerate() {
        group.iter().for_each(|&k| inverse[k] = i as i64);
    }
    let counts: Vec<i64> = groups.iter().map(|g| g.len() as i64).collect();
    let positions: Vec<i64> = firsts.iter().map(|&f| f as i64).collect();
    Ok([
        pick(axis, &firsts, x, context)?,
        Tensor::from_slice(&[positions.len()], &positions),
        Tensor::from_slice(&[inverse.len()], &inverse),
        Tensor::from_slice(&[counts.len()], &counts),
    ])
}
