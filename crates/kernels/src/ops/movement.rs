//! Operators that move elements without reading them: they work for every element type by its width.

use lightering_units::DType;

use super::binary::{Binary, BinaryCompute};
use super::block::{Class, Compute, class};
use super::normalisation::Along;
use super::{OpError, TensorView, TensorViewMut};
use crate::ThreadPool;

fn typed(x: &TensorView, y: &TensorViewMut, what: &str) -> Result<usize, OpError> {
    match (x.dtype == y.dtype, y.dtype.size_bytes()) {
        (true, size @ 1..) => Ok(size),
        _ => Err(OpError::Invalid(format!("{what} of {} as {}", x.dtype, y.dtype))),
    }
}

/// Copies `x` where only the shape changes.
///
/// # Errors
/// [`OpError::Invalid`] when the sizes differ.
pub fn copy(x: &TensorView, y: &mut TensorViewMut) -> Result<(), OpError> {
    if x.bytes.len() != y.bytes.len() || x.dtype != y.dtype {
        return Err(OpError::Invalid(format!("{:?} does not reshape to {:?}", x.dims, y.dims)));
    }
    y.bytes.copy_from_slice(x.bytes);
    Ok(())
}

/// Element `index` of an integer tensor.
pub(crate) fn integer(x: &TensorView, index: usize) -> i64 {
    match x.dtype {
        DType::I64 => x.as_slice::<i64>()[index],
        _ => {
            let mut v = [0i64];
            i64::load(x.dtype, x.bytes, index, &mut v);
            v[0]
        }
    }
}

/// `index` counted from the end when negative.
fn wrap_index(index: i64, size: usize, what: &str) -> Result<usize, OpError> {
    let wrapped = if index < 0 { index + size as i64 } else { index };
    usize::try_from(wrapped)
        .ok()
        .filter(|&i| i < size)
        .ok_or_else(|| OpError::Invalid(format!("{what}: index {index} is out of range for size {size}")))
}

fn expect_integers(x: &TensorView, what: &str) -> Result<(), OpError> {
    match class(x.dtype) {
        Some(Class::I64 | Class::U64) => Ok(()),
        _ => Err(OpError::Invalid(format!("{what}: indices are {}, expected integers", x.dtype))),
    }
}

/// Element `i` of the result (row-major in `dims`) is element `base + Σ index·stride` of `x`: transposition, slices,
/// expansion, tiling.
///
/// # Errors
/// [`OpError::Invalid`] when the walk leaves `x` or does not fill `y`.
pub fn strided(
    pool: &ThreadPool,
    x: &TensorView,
    base: usize,
    dims: &[usize],
    strides: &[isize],
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let size = typed(x, y, "a copy")?;
    let total: usize = dims.iter().product();
    if total != y.len() {
        return Err(OpError::Invalid(format!("a walk over {dims:?} does not fill {:?}", y.dims)));
    }
    if total == 0 {
        return Ok(());
    }
    let (mut low, mut high) = (base as isize, base as isize);
    for (&d, &s) in dims.iter().zip(strides) {
        let reach = (d as isize - 1) * s;
        if reach < 0 { low += reach } else { high += reach }
    }
    if low < 0 || high >= x.len() as isize {
        return Err(OpError::Invalid(format!(
            "a walk over {dims:?} leaves the operand of shape {:?}",
            x.dims
        )));
    }
    // Merged dimensions, outermost first.
    let mut walk: Vec<(usize, isize)> = Vec::with_capacity(dims.len());
    for (&d, &s) in dims.iter().zip(strides) {
        match walk.last_mut() {
            _ if d == 1 => {}
            Some((size, stride)) if *stride == s * d as isize => (*size, *stride) = (*size * d, s),
            _ => walk.push((d, s)),
        }
    }
    let (inner, stride) = walk.pop().unwrap_or((1, 1));
    let row_bytes = inner * size;
    let rows_per_task = ((64 << 10) / row_bytes).max(1);
    super::block::parallel_parts(pool, y.bytes, rows_per_task * row_bytes, &|start, part| {
        for (row, out) in part.chunks_mut(row_bytes).enumerate() {
            let (mut rest, mut at) = (start / row_bytes + row, base as isize);
            for &(d, s) in walk.iter().rev() {
                at += (rest % d) as isize * s;
                rest /= d;
            }
            run(size, x.bytes, at as usize, stride, out);
        }
    });
    Ok(())
}

fn run(size: usize, x: &[u8], start: usize, stride: isize, out: &mut [u8]) {
    fn each<T: bytemuck::Pod>(x: &[u8], start: usize, stride: isize, out: &mut [u8]) {
        let (x, out): (&[T], &mut [T]) = (bytemuck::cast_slice(x), bytemuck::cast_slice_mut(out));
        let mut at = start as isize;
        for o in out {
            *o = x[at as usize];
            at += stride;
        }
    }
    match (stride, size) {
        (1, _) => out.copy_from_slice(&x[start * size..start * size + out.len()]),
        (_, 1) => each::<u8>(x, start, stride, out),
        (_, 2) => each::<u16>(x, start, stride, out),
        (_, 4) => each::<u32>(x, start, stride, out),
        (_, 8) => each::<u64>(x, start, stride, out),
        _ => each::<[u64; 2]>(x, start, stride, out),
    }
}

/// Row-major strides of a shape.
pub fn row_major(dims: &[usize]) -> Vec<isize> {
    let mut strides = vec![1; dims.len()];
    for axis in (0..dims.len().saturating_sub(1)).rev() {
        strides[axis] = strides[axis + 1] * dims[axis + 1] as isize;
    }
    strides
}

/// Per axis, the source index of each result index; −1 takes `fill`: pads and crops.
///
/// # Errors
/// [`OpError::Invalid`] when types or sizes do not fit.
pub fn mapped(x: &TensorView, maps: &[Vec<i64>], fill: &[u8], y: &mut TensorViewMut) -> Result<(), OpError> {
    let size = typed(x, y, "Pad")?;
    let fits = maps.len() == x.dims.len()
        && maps.len() == y.dims.len()
        && fill.len() == size
        && maps.iter().zip(y.dims).all(|(m, &d)| m.len() == d)
        && maps.iter().zip(x.dims).all(|(m, &d)| m.iter().all(|&i| i < d as i64));
    if !fits {
        return Err(OpError::Invalid(format!("padding {:?} does not give {:?}", x.dims, y.dims)));
    }
    let strides = row_major(x.dims);
    let Some((inner_map, outer_maps)) = maps.split_last() else { return copy(x, y) };
    let row = inner_map.len();
    if row == 0 {
        return Ok(());
    }
    for (r, out) in y.bytes.chunks_mut(row * size).enumerate() {
        let (mut rest, mut base) = (r, Some(0usize));
        for (map, &stride) in outer_maps.iter().zip(&strides).rev() {
            let index = map[rest % map.len()];
            rest /= map.len();
            base = base.filter(|_| index >= 0).map(|b| b + index as usize * stride as usize);
        }
        for (out, &index) in out.chunks_mut(size).zip(inner_map) {
            match base {
                Some(base) if index >= 0 => {
                    let at = (base + index as usize) * size;
                    out.copy_from_slice(&x.bytes[at..at + size]);
                }
                _ => out.copy_from_slice(fill),
            }
        }
    }
    Ok(())
}

/// Source indices along an axis that is padded with `before` and `after` elements.
///
/// # Errors
/// [`OpError::Invalid`] when the size comes out negative or an empty axis is to be mirrored.
pub fn pad_map(size: usize, before: i64, after: i64, mode: Padding) -> Result<Vec<i64>, OpError> {
    let n = size as i64;
    let length = n.checked_add(before).and_then(|l| l.checked_add(after)).filter(|&l| l >= 0);
    let length = length
        .ok_or_else(|| OpError::Invalid(format!("Pad takes {before} and {after} off an axis of {size}")))?;
    if mode != Padding::Constant && size == 0 && length > 0 {
        return Err(OpError::Invalid("Pad cannot repeat elements of an empty axis".to_owned()));
    }
    Ok((0..length)
        .map(|i| {
            let at = i - before;
            match mode {
                _ if (0..n).contains(&at) => at,
                Padding::Constant => -1,
                Padding::Edge => at.clamp(0, n - 1),
                Padding::Reflect if n == 1 => 0,
                Padding::Reflect => {
                    let at = at.rem_euclid(2 * (n - 1));
                    if at < n { at } else { 2 * (n - 1) - at }
                }
                Padding::Wrap => at.rem_euclid(n),
            }
        })
        .collect())
}

/// What fills the border.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// One value.
    Constant,
    /// The nearest element.
    Edge,
    /// Mirrored without the edge.
    Reflect,
    /// From the other end.
    Wrap,
}

/// Copies one operand of a concatenation to its place: `offset` elements along the axis of `y`.
///
/// # Errors
/// [`OpError::Invalid`] when sizes do not fit.
pub fn concat_part(x: &TensorView, axis: usize, offset: usize, y: &mut TensorViewMut) -> Result<(), OpError> {
    let size = typed(x, y, "Concat")?;
    let (from, to) = (Along::new(x.dims, axis), Along::new(y.dims, axis));
    if from.outer != to.outer || from.inner != to.inner || offset + from.size > to.size {
        return Err(OpError::Invalid(format!("Concat of {:?} into {:?}", x.dims, y.dims)));
    }
    let (row, step, first) =
        (from.size * from.inner * size, to.size * to.inner * size, offset * to.inner * size);
    if row == 0 {
        return Ok(());
    }
    for (o, source) in x.bytes.chunks(row).enumerate() {
        y.bytes[o * step + first..][..row].copy_from_slice(source);
    }
    Ok(())
}

/// Copies one part of a split: from `offset` elements along the axis of `x` on.
///
/// # Errors
/// [`OpError::Invalid`] when sizes do not fit.
pub fn split_part(x: &TensorView, axis: usize, offset: usize, y: &mut TensorViewMut) -> Result<(), OpError> {
    let size = typed(x, y, "Split")?;
    let (from, to) = (Along::new(x.dims, axis), Along::new(y.dims, axis));
    if from.outer != to.outer || from.inner != to.inner || offset + to.size > from.size {
        return Err(OpError::Invalid(format!("Split of {:?} into {:?}", x.dims, y.dims)));
    }
    let (row, step, first) =
        (to.size * to.inner * size, from.size * from.inner * size, offset * to.inner * size);
    if row == 0 {
        return Ok(());
    }
    for (o, out) in y.bytes.chunks_mut(row).enumerate() {
        out.copy_from_slice(&x.bytes[o * step + first..][..row]);
    }
    Ok(())
}

/// Whole slices along an axis, chosen by `indices`.
///
/// # Errors
/// [`OpError::Invalid`] when an index is out of range or sizes do not fit.
pub fn gather(
    x: &TensorView,
    indices: &TensorView,
    axis: usize,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let size = typed(x, y, "Gather")?;
    expect_integers(indices, "Gather")?;
    let along = Along::new(x.dims, axis);
    let count = indices.len();
    if along.outer * count * along.inner != y.len() {
        return Err(OpError::Invalid(format!("Gather from {:?} does not give {:?}", x.dims, y.dims)));
    }
    let row = along.inner * size;
    for i in 0..count {
        let index = wrap_index(integer(indices, i), along.size, "Gather")?;
        for o in 0..along.outer {
            y.bytes[(o * count + i) * row..][..row]
                .copy_from_slice(&x.bytes[(o * along.size + index) * row..][..row]);
        }
    }
    Ok(())
}

/// Visits the elements of a tensor of indices: `visit(i, offset, index)`, where `offset` is the element of a tensor
/// of shape `dims` at the coordinates of `i` with those along `axis` taken as 0.
fn elements_along(
    dims: &[usize],
    indices: &TensorView,
    axis: usize,
    what: &str,
    mut visit: impl FnMut(usize, usize),
) -> Result<(), OpError> {
    expect_integers(indices, what)?;
    let fits = dims.len() == indices.dims.len()
        && axis < dims.len()
        && dims.iter().zip(indices.dims).enumerate().all(|(a, (&d, &i))| a == axis || i <= d);
    if !fits {
        return Err(OpError::Invalid(format!(
            "{what}: indices of shape {:?} for shape {dims:?}",
            indices.dims
        )));
    }
    let strides = row_major(dims);
    for i in 0..indices.len() {
        let (mut rest, mut at) = (i, 0);
        for a in (0..dims.len()).rev() {
            let coordinate = rest % indices.dims[a];
            rest /= indices.dims[a];
            let coordinate =
                if a == axis { wrap_index(integer(indices, i), dims[axis], what)? } else { coordinate };
            at += coordinate * strides[a] as usize;
        }
        visit(i, at);
    }
    Ok(())
}

/// One element per index, along an axis.
///
/// # Errors
/// As [`gather`].
pub fn gather_elements(
    x: &TensorView,
    indices: &TensorView,
    axis: usize,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let size = typed(x, y, "GatherElements")?;
    if y.len() != indices.len() {
        return Err(OpError::Invalid(format!("GatherElements of {:?} as {:?}", indices.dims, y.dims)));
    }
    elements_along(x.dims, indices, axis, "GatherElements", |i, at| {
        y.bytes[i * size..(i + 1) * size].copy_from_slice(&x.bytes[at * size..(at + 1) * size]);
    })
}

/// Element where the slice named by tuple `tuple` of `indices` starts, in a tensor of shape `dims`.
fn tuple_start(
    dims: &[usize],
    indices: &TensorView,
    tuple: usize,
    depth: usize,
    batch_dims: usize,
    what: &str,
) -> Result<usize, OpError> {
    let strides = row_major(dims);
    let mut at = 0;
    for d in 0..depth {
        let axis = batch_dims + d;
        at += wrap_index(integer(indices, tuple * depth + d), dims[axis], what)? * strides[axis] as usize;
    }
    Ok(at)
}

/// Slices named by tuples of indices.
///
/// # Errors
/// As [`gather`].
pub fn gather_nd(
    x: &TensorView,
    indices: &TensorView,
    batch_dims: usize,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let size = typed(x, y, "GatherND")?;
    expect_integers(indices, "GatherND")?;
    let depth = indices.dims.last().copied().unwrap_or(0);
    let tuples: usize = indices.dims.iter().rev().skip(1).product();
    let wrong = || OpError::Invalid(format!("GatherND of {:?} with indices {:?}", x.dims, indices.dims));
    if batch_dims + depth > x.dims.len() || batch_dims >= indices.dims.len() {
        return Err(wrong());
    }
    let batches: usize = x.dims[..batch_dims].iter().product();
    let slice: usize = x.dims[batch_dims + depth..].iter().product();
    if batches == 0 || !tuples.is_multiple_of(batches) || tuples * slice != y.len() {
        return if y.is_empty() { Ok(()) } else { Err(wrong()) };
    }
    let per_batch = x.len() / batches;
    for tuple in 0..tuples {
        let batch = tuple / (tuples / batches);
        let at = batch * per_batch + tuple_start(x.dims, indices, tuple, depth, batch_dims, "GatherND")?;
        y.bytes[tuple * slice * size..][..slice * size]
            .copy_from_slice(&x.bytes[at * size..(at + slice) * size]);
    }
    Ok(())
}

/// `target = op(target, update)` for elements of any type; without an operator the update replaces it.
fn merge(op: Option<Binary>, dtype: DType, target: &mut [u8], update: &[u8]) {
    fn one<C: BinaryCompute>(op: Binary, dtype: DType, target: &mut [u8], update: &[u8]) {
        let (mut a, mut b) = ([C::ZERO], [C::ZERO]);
        for (target, update) in target.chunks_mut(dtype.size_bytes()).zip(update.chunks(dtype.size_bytes())) {
            C::load(dtype, target, 0, &mut a);
            C::load(dtype, update, 0, &mut b);
            C::combine(op, &mut a, &b, 64);
            C::store(dtype, &a, target);
        }
    }
    match (op, class(dtype)) {
        (Some(op), Some(Class::F32)) => one::<f32>(op, dtype, target, update),
        (Some(op), Some(Class::F64)) => one::<f64>(op, dtype, target, update),
        (Some(op), Some(Class::I64)) => one::<i64>(op, dtype, target, update),
        (Some(op), Some(Class::U64)) => one::<u64>(op, dtype, target, update),
        _ => target.copy_from_slice(update),
    }
}

fn start_scatter(
    x: &TensorView,
    updates: &TensorView,
    op: Option<Binary>,
    y: &mut TensorViewMut,
) -> Result<usize, OpError> {
    let size = typed(x, y, "a scatter")?;
    if updates.dtype != x.dtype {
        return Err(OpError::Invalid(format!("scattering {} into {}", updates.dtype, x.dtype)));
    }
    if op.is_some() && class(x.dtype).is_none() {
        return Err(OpError::Unsupported(format!("a scatter with reduction of {}", x.dtype)));
    }
    copy(x, y)?;
    Ok(size)
}

/// Puts or merges one element per index into a copy of `x`.
///
/// # Errors
/// As [`gather`].
pub fn scatter_elements(
    x: &TensorView,
    indices: &TensorView,
    updates: &TensorView,
    axis: usize,
    op: Option<Binary>,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let size = start_scatter(x, updates, op, y)?;
    if updates.dims != indices.dims {
        return Err(OpError::Invalid(format!("indices {:?} and updates {:?}", indices.dims, updates.dims)));
    }
    let dtype = y.dtype;
    elements_along(x.dims, indices, axis, "ScatterElements", |i, at| {
        let target = &mut y.bytes[at * size..(at + 1) * size];
        merge(op, dtype, target, &updates.bytes[i * size..(i + 1) * size]);
    })
}

/// Puts or merges slices named by tuples of indices into a copy of `x`.
///
/// # Errors
/// As [`gather`].
pub fn scatter_nd(
    x: &TensorView,
    indices: &TensorView,
    updates: &TensorView,
    op: Option<Binary>,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    expect_integers(indices, "ScatterND")?;
    let size = start_scatter(x, updates, op, y)?;
    let depth = indices.dims.last().copied().unwrap_or(0);
    let tuples: usize = indices.dims.iter().rev().skip(1).product();
    if depth > x.dims.len() {
        return Err(OpError::Invalid(format!("ScatterND of {:?} with indices {:?}", x.dims, indices.dims)));
    }
    let slice: usize = x.dims[depth..].iter().product();
    if updates.len() != tuples * slice {
        return Err(OpError::Invalid(format!("ScatterND: {tuples} slices, updates of {:?}", updates.dims)));
    }
    let dtype = y.dtype;
    for tuple in 0..tuples {
        let at = tuple_start(x.dims, indices, tuple, depth, 0, "ScatterND")?;
        let target = &mut y.bytes[at * size..(at + slice) * size];
        merge(op, dtype, target, &updates.bytes[tuple * slice * size..][..slice * size]);
    }
    Ok(())
}

/// Writes `update` into a copy of `cache` along `axis`, per sample from `starts` on (0 when absent).
///
/// # Errors
/// [`OpError::Invalid`] when the update does not fit.
pub fn tensor_scatter(
    cache: &TensorView,
    update: &TensorView,
    starts: Option<&TensorView>,
    axis: usize,
    circular: bool,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let size = start_scatter(cache, update, None, y)?;
    let (to, from) = (Along::new(cache.dims, axis), Along::new(update.dims, axis));
    let batch = cache.dims.first().copied().unwrap_or(1);
    if axis == 0
        || to.outer != from.outer
        || to.inner != from.inner
        || starts.is_some_and(|s| s.len() != batch)
    {
        return Err(OpError::Invalid(format!("TensorScatter of {:?} into {:?}", update.dims, cache.dims)));
    }
    let row = to.inner * size;
    for o in 0..to.outer {
        let sample = o / (to.outer / batch).max(1);
        let first = starts.map_or(0, |s| integer(s, sample));
        for k in 0..from.size {
            let at = first + k as i64;
            let at = if circular { at.rem_euclid(to.size.max(1) as i64) } else { at };
            if at < 0 || at >= to.size as i64 {
                return Err(OpError::Invalid(format!("TensorScatter: position {at} of {}", to.size)));
            }
            y.bytes[(o * to.size + at as usize) * row..][..row]
                .copy_from_slice(&update.bytes[(o * from.size + k) * row..][..row]);
        }
    }
    Ok(())
}

/// Reverses the first `lengths[sample]` elements along `time_axis` of each sample along `batch_axis`.
///
/// # Errors
/// [`OpError::Invalid`] when a length is out of range.
pub fn reverse_sequence(
    x: &TensorView,
    lengths: &TensorView,
    batch_axis: usize,
    time_axis: usize,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let size = typed(x, y, "ReverseSequence")?;
    if x.dims.len() < 2 || batch_axis + time_axis != 1 || lengths.len() != x.dims[batch_axis] {
        return Err(OpError::Invalid(format!("ReverseSequence of {:?} by {:?}", x.dims, lengths.dims)));
    }
    let row = x.dims[2..].iter().product::<usize>() * size;
    let place = |sample: usize, time: usize| {
        let index = if batch_axis == 0 { sample * x.dims[1] + time } else { time * x.dims[1] + sample };
        index * row
    };
    for sample in 0..x.dims[batch_axis] {
        let steps = x.dims[time_axis];
        let length = integer(lengths, sample);
        let length = usize::try_from(length)
            .ok()
            .filter(|&l| l <= steps)
            .ok_or_else(|| OpError::Invalid(format!("ReverseSequence: length {length} of {steps} steps")))?;
        for time in 0..steps {
            let from = if time < length { length - 1 - time } else { time };
            y.bytes[place(sample, time)..][..row].copy_from_slice(&x.bytes[place(sample, from)..][..row]);
        }
    }
    Ok(())
}

/// Keeps the upper (or lower) triangle of the last two dimensions, counted from diagonal `k`.
///
/// # Errors
/// [`OpError::Invalid`] for fewer than two dimensions.
pub fn triangle(upper: bool, k: i64, x: &TensorView, y: &mut TensorViewMut) -> Result<(), OpError> {
    let size = typed(x, y, "Trilu")?;
    let [.., rows, columns] = *x.dims else {
        return Err(OpError::Invalid(format!("Trilu of shape {:?}", x.dims)));
    };
    copy(x, y)?;
    if columns == 0 {
        return Ok(());
    }
    for (i, row) in y.bytes.chunks_mut(columns * size).enumerate() {
        let diagonal = ((i % rows) as i64).saturating_add(k);
        let clear = if upper {
            0..diagonal.clamp(0, columns as i64) as usize
        } else {
            diagonal.saturating_add(1).clamp(0, columns as i64) as usize..columns
        };
        row[clear.start * size..clear.end * size].fill(0);
    }
    Ok(())
}

/// A matrix with ones on diagonal `k`.
///
/// # Errors
/// [`OpError::Invalid`] when the result is no matrix of numbers.
pub fn eye(k: i64, y: &mut TensorViewMut) -> Result<(), OpError> {
    let [rows, columns] = *y.dims else {
        return Err(OpError::Invalid(format!("EyeLike of shape {:?}", y.dims)));
    };
    if class(y.dtype).is_none() {
        return Err(OpError::Unsupported(format!("EyeLike of {}", y.dtype)));
    }
    let size = y.dtype.size_bytes();
    y.bytes.fill(0);
    for row in 0..rows {
        let column = (row as i64).saturating_add(k);
        if (0..columns as i64).contains(&column) {
            let at = (row * columns + column as usize) * size;
            f64::store(y.dtype, &[1.0], &mut y.bytes[at..at + size]);
        }
    }
    Ok(())
}

/// `on` at each index along a new axis, `off` elsewhere; `values` holds off, then on.
///
/// # Errors
/// [`OpError::Invalid`] when sizes do not fit.
pub fn one_hot(
    indices: &TensorView,
    values: &TensorView,
    axis: usize,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let size = typed(values, y, "OneHot")?;
    let along = Along::new(y.dims, axis);
    if values.len() != 2 || along.outer * along.inner != indices.len() || class(indices.dtype).is_none() {
        return Err(OpError::Invalid(format!("OneHot of {:?} does not give {:?}", indices.dims, y.dims)));
    }
    let (off, on) = values.bytes.split_at(size);
    for out in y.bytes.chunks_mut(size) {
        out.copy_from_slice(off);
    }
    for i in 0..indices.len() {
        let index = integer(indices, i);
        let index = if index < 0 { index + along.size as i64 } else { index };
        if (0..along.size as i64).contains(&index) {
            let (o, j) = (i / along.inner, i % along.inner);
            let at = ((o * along.size + index as usize) * along.inner + j) * size;
            y.bytes[at..at + size].copy_from_slice(on);
        }
    }
    Ok(())
}

/// `start + i·delta`.
///
/// # Errors
/// [`OpError::Invalid`] when the operands are no single numbers of the result's type.
pub fn range(start: &TensorView, delta: &TensorView, y: &mut TensorViewMut) -> Result<(), OpError> {
    if start.len() != 1 || delta.len() != 1 || start.dtype != y.dtype || delta.dtype != y.dtype {
        return Err(OpError::Invalid("Range: start and delta must be single numbers".to_owned()));
    }
    fn fill<C: Compute>(
        start: &TensorView,
        delta: &TensorView,
        y: &mut TensorViewMut,
        number: impl Fn(usize) -> C,
    ) {
        let (mut s, mut d) = ([C::ZERO], [C::ZERO]);
        C::load(start.dtype, start.bytes, 0, &mut s);
        C::load(delta.dtype, delta.bytes, 0, &mut d);
        let (dtype, size) = (y.dtype, y.dtype.size_bytes());
        for (i, out) in y.bytes.chunks_mut(size).enumerate() {
            C::store(dtype, &[s[0].plus(number(i).times(d[0]))], out);
        }
    }
    match class(y.dtype) {
        Some(Class::F32 | Class::F64) => fill::<f64>(start, delta, y, |i| i as f64),
        Some(_) => fill::<i64>(start, delta, y, |i| i as i64),
        None => return Err(OpError::Unsupported(format!("Range of {}", y.dtype))),
    }
    Ok(())
}

/// Numbers that sort like the elements of a tensor: NaN above everything, −0 equal to 0.
///
/// # Errors
/// [`OpError::Unsupported`] for types without an order.
pub fn sort_key(x: &TensorView, index: usize) -> Result<u64, OpError> {
    Ok(match class(x.dtype) {
        Some(Class::F32 | Class::F64) => {
            let mut v = [0f64];
            f64::load(x.dtype, x.bytes, index, &mut v);
            let bits = if v[0].is_nan() { f64::NAN.abs().to_bits() } else { (v[0] + 0.0).to_bits() };
            if bits >> 63 != 0 { !bits } else { bits | 1 << 63 }
        }
        Some(Class::I64) => integer(x, index) as u64 ^ 1 << 63,
        Some(Class::U64) => {
            let mut v = [0u64];
            u64::load(x.dtype, x.bytes, index, &mut v);
            v[0]
        }
        None => return Err(OpError::Unsupported(format!("sorting {}", x.dtype))),
    })
}

/// The `k` largest (or smallest) elements along an axis, in order; equal ones by position. `workspace` holds two
/// words per element of the axis.
///
/// # Errors
/// [`OpError::Invalid`] when sizes do not fit.
pub fn top_k(
    largest: bool,
    along: Along,
    x: &TensorView,
    values: &mut TensorViewMut,
    indices: Option<&mut TensorViewMut>,
    workspace: &mut [[u64; 2]],
) -> Result<(), OpError> {
    let size = typed(x, values, "TopK")?;
    let rows = along.outer * along.inner;
    let k = values.len().checked_div(rows).unwrap_or(0);
    if k > along.size || k * rows != values.len() {
        return Err(OpError::Invalid(format!("TopK of {:?} does not give {:?}", x.dims, values.dims)));
    }
    let mut indices = match indices {
        Some(i) if i.dtype == DType::I64 && i.len() == values.len() => Some(i.as_mut_slice::<i64>()),
        Some(i) => return Err(OpError::Invalid(format!("TopK: indices as {}{:?}", i.dtype, i.dims))),
        None => None,
    };
    if k == 0 {
        return Ok(());
    }
    let keys = &mut workspace[..along.size];
    for o in 0..along.outer {
        for j in 0..along.inner {
            for (i, key) in keys.iter_mut().enumerate() {
                let value = sort_key(x, (o * along.size + i) * along.inner + j)?;
                *key = [if largest { !value } else { value }, i as u64];
            }
            if k < keys.len() {
                keys.select_nth_unstable(k - 1);
            }
            keys[..k].sort_unstable();
            for (rank, key) in keys[..k].iter().enumerate() {
                let from = (o * along.size + key[1] as usize) * along.inner + j;
                let to = (o * k + rank) * along.inner + j;
                values.bytes[to * size..(to + 1) * size]
                    .copy_from_slice(&x.bytes[from * size..(from + 1) * size]);
                if let Some(indices) = &mut indices {
                    indices[to] = key[1] as i64;
                }
            }
        }
    }
    Ok(())
}
