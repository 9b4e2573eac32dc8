//! Quantisation, and products and convolutions of quantised operands, for every type that ONNX allows.

use lightering_graph::{
    ConvAttributes, DType, Layout, MatMulAttributes, Op, Padding, QuantizeAttributes, TensorType, UnaryOp,
};
use lightering_kernels::ops::float8;
use lightering_kernels::ops::integer_product::{
    IntegerConvShape, integer_conv_plane, integer_product_row, integer_product_row_transposed, requantize_row,
};
use lightering_kernels::ops::quantize::{
    Granularity, QuantizedInteger, ScaleLayout, Scales, dequantize, dequantize_coded, dynamic_scale,
    quantize, quantize_coded, quantize_value,
};
use lightering_units::Bytes;

use super::operands::*;
use super::{OpError, TensorView, TensorViewMut};

/// Dispatch of this family.
pub(super) fn compute(
    op: &Op,
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
    workspace: &mut [u8],
) -> Result<(), OpError> {
    if let Op::DynamicQuantizeLinear = op {
        return dynamic_quantize_linear(inputs, outputs);
    }
    let Some(Some(out)) = outputs.first_mut() else { return Ok(()) };
    match op {
        Op::QuantizeLinear(a) => quantize_linear(a, inputs, out),
        Op::DequantizeLinear(a) => dequantize_linear(a, inputs, out),
        Op::MatMulInteger => matmul_integer(inputs, out),
        Op::QLinearMatMul(a) => qlinear_matmul(a, inputs, out, workspace),
        Op::ConvInteger(a) => conv_integer(a, inputs, out),
        Op::QLinearConv(a) => qlinear_conv(a, inputs, out, workspace),
        _ => Err(super::no_kernel(op)),
    }
}

/// Scratch of this family.
pub(super) fn workspace_bytes(
    op: &Op,
    inputs: &[Option<&TensorType>],
    outputs: &[Option<&TensorType>],
) -> Bytes {
    match op {
        Op::QLinearMatMul(_) => {
            let columns = inputs.get(3).copied().flatten().and_then(TensorType::dims);
            // The second operand may be transposed.
            let columns = columns.map_or(0, |d| match d.as_slice() {
                [.., rows, columns] => *rows.max(columns),
                _ => 1,
            });
            Bytes(8 * columns as u64)
        }
        // One plane of sums.
        Op::QLinearConv(a) => {
            let dims = outputs.first().copied().flatten().and_then(TensorType::dims).unwrap_or_default();
            let spatial = match (a.layout, dims.as_slice()) {
                (Layout::ChannelsFirst, [_, _, spatial @ ..]) => spatial,
                (Layout::ChannelsLast, [_, spatial @ .., _]) => spatial,
                _ => &[],
            };
            Bytes(4 * count(spatial) as u64)
        }
        _ => Bytes::ZERO,
    }
}

fn scales_of<'a>(view: &TensorView<'a>) -> Result<Scales<'a>, OpError> {
    Ok(match view.dtype {
        DType::F32 => Scales::F32(view.as_slice()),
        DType::F16 => Scales::F16(view.as_slice()),
        DType::BF16 => Scales::BF16(view.as_slice()),
        DType::F64 => Scales::F64(view.as_slice()),
        other => return unsupported(format!("scales of element type {other}")),
    })
}

fn scale_layout(a: &QuantizeAttributes, dims: &[usize], scale: &[usize]) -> Result<ScaleLayout, OpError> {
    if a.block_size == 0 && count(scale) == 1 {
        let n = count(dims);
        return Ok(ScaleLayout { outer: 1, axis: n, inner: 1, granularity: Granularity::Tensor });
    }
    let axis = normal_axis(a.axis, dims.len())?;
    let layout = ScaleLayout {
        outer: dims[..axis].iter().product(),
        axis: dims[axis],
        inner: dims[axis + 1..].iter().product(),
        granularity: if a.block_size == 0 { Granularity::Axis } else { Granularity::Block(a.block_size) },
    };
    if a.block_size == 0 {
        expect_dims(scale, &[dims[axis]], "the scale")?;
    } else {
        let mut expected = dims.to_vec();
        expected[axis] = dims[axis].div_ceil(a.block_size);
        expect_dims(scale, &expected, "the scale")?;
    }
    Ok(layout)
}

fn checked_zero<'a>(
    inputs: &[Option<TensorView<'a>>],
    scale: &TensorView<'_>,
    dtype: DType,
) -> Result<Option<TensorView<'a>>, OpError> {
    let zero = optional(inputs, 2);
    if let Some(zero) = &zero {
        expect_dtype(zero, dtype, "the zero point")?;
        expect_count(zero.dims, count(scale.dims), "the zero point")?;
    }
    Ok(zero)
}

fn integer_bounds(dtype: DType) -> Option<(i32, i32)> {
    Some(match dtype {
        DType::U8 => (0, 255),
        DType::I8 => (-128, 127),
        DType::U16 => (0, 65535),
        DType::I16 => (-32768, 32767),
        DType::U4 => (0, 15),
        DType::I4 => (-8, 7),
        _ => return None,
    })
}

fn is_coded(dtype: DType) -> bool {
    matches!(dtype, DType::F8E4M3FN | DType::F8E4M3FNUZ | DType::F8E5M2 | DType::F8E5M2FNUZ | DType::F4E2M1)
}

fn code_table(dtype: DType) -> [f32; 256] {
    std::array::from_fn(|code| float8::decode(dtype, code as u8))
}

fn quantize_linear(
    a: &QuantizeAttributes,
    inputs: &[Option<TensorView>],
    out: &mut TensorViewMut,
) -> Result<(), OpError> {
    let (x, scale) = (required(inputs, 0, "x")?, required(inputs, 1, "scale")?);
    let zero = checked_zero(inputs, &scale, out.dtype)?;
    let layout = scale_layout(a, x.dims, scale.dims)?;
    let scales = scales_of(&scale)?;
    expect_dims(out.dims, x.dims, "the result")?;
    macro_rules! with_source {
        ($t:ident => $body:expr) => {
            match x.dtype {
                DType::I32 => {
                    type $t = i32;
                    $body
                }
                _ => with_real!(x.dtype, $t => { $body; Ok(()) })?,
            }
        };
    }
    macro_rules! to_integer {
        ($q:ty) => {{
            let bounds = integer_bounds(out.dtype).expect("the type is one of those listed");
            let zeros = zero.map(|z| z.as_slice::<$q>());
            with_source!(X => quantize(&layout, x.as_slice::<X>(), scales, zeros, bounds, out.as_mut_slice::<$q>()))
        }};
    }
    match out.dtype {
        DType::U8 | DType::U4 => to_integer!(u8),
        DType::I8 | DType::I4 => to_integer!(i8),
        DType::U16 => to_integer!(u16),
        DType::I16 => to_integer!(i16),
        to if is_coded(to) => {
            let zeros = zero.map(|z| z.as_slice::<u8>());
            let (table, saturate) = (code_table(to), a.saturate);
            let encode = |v: f32| float8::encode(to, v, saturate);
            with_source!(X => quantize_coded(
                &layout, x.as_slice::<X>(), scales, zeros, &table, encode, out.as_mut_slice::<u8>()
            ))
        }
        other => return unsupported(format!("quantisation to {other}")),
    }
    Ok(())
}

fn dequantize_linear(
    a: &QuantizeAttributes,
    inputs: &[Option<TensorView>],
    out: &mut TensorViewMut,
) -> Result<(), OpError> {
    let (x, scale) = (required(inputs, 0, "x")?, required(inputs, 1, "scale")?);
    let zero = checked_zero(inputs, &scale, x.dtype)?;
    let layout = scale_layout(a, x.dims, scale.dims)?;
    let scales = scales_of(&scale)?;
    expect_dims(out.dims, x.dims, "the result")?;
    macro_rules! from_integer {
        ($q:ty) => {{
            let (x, zeros) = (x.as_slice::<$q>(), zero.map(|z| z.as_slice::<$q>()));
            with_real!(out.dtype, Y => { dequantize(&layout, x, scales, zeros, out.as_mut_slice::<Y>()); Ok(()) })
        }};
    }
    match x.dtype {
        DType::U8 | DType::U4 => from_integer!(u8),
        DType::I8 | DType::I4 => from_integer!(i8),
        DType::U16 => from_integer!(u16),
        DType::I16 => from_integer!(i16),
        DType::I32 => from_integer!(i32),
        from if is_coded(from) => {
            let (codes, zeros, table) = (x.as_slice(), zero.map(|z| z.as_slice::<u8>()), code_table(from));
            with_real!(out.dtype, Y => {
                dequantize_coded(&layout, codes, scales, zeros, &table, out.as_mut_slice::<Y>());
                Ok(())
            })
        }
        other => unsupported(format!("dequantisation from {other}")),
    }
}

fn dynamic_quantize_linear(
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
) -> Result<(), OpError> {
    let x = required(inputs, 0, "x")?;
    expect_dtype(&x, DType::F32, "x")?;
    let x: &[f32] = x.as_slice();
    let (scale, zero) = dynamic_scale(x);
    if let Some(Some(y)) = outputs.get_mut(0) {
        let y = y.as_mut_slice::<u8>();
        let layout = ScaleLayout { outer: 1, axis: x.len(), inner: 1, granularity: Granularity::Tensor };
        quantize(&layout, x, Scales::F32(&[scale]), Some(&[zero]), (0, 255), y);
    }
    if let Some(Some(out)) = outputs.get_mut(1) {
        out.as_mut_slice::<f32>()[0] = scale;
    }
    if let Some(Some(out)) = outputs.get_mut(2) {
        out.as_mut_slice::<u8>()[0] = zero;
    }
    Ok(())
}

/// A batch of matrix products with NumPy's rules.
struct Product {
    rows: usize,
    columns: usize,
    depth: usize,
    a_batch: Vec<usize>,
    b_batch: Vec<usize>,
    batch: Vec<usize>,
}

impl Product {
    fn new(a: &[usize], b: &[usize], out: &[usize]) -> Result<Product, OpError> {
        let split = |d: &[usize], vector_is_row: bool| match d {
            [] => None,
            [n] if vector_is_row => Some((Vec::new(), 1, *n)),
            [n] => Some((Vec::new(), *n, 1)),
            [batch @ .., r, c] => Some((batch.to_vec(), *r, *c)),
        };
        let (Some((a_batch, rows, depth)), Some((b_batch, b_depth, columns))) =
            (split(a, true), split(b, false))
        else {
            return invalid("a matrix product of a scalar");
        };
        let rank = a_batch.len().max(b_batch.len());
        let at = |d: &[usize], i: usize| if i + d.len() < rank { 1 } else { d[i + d.len() - rank] };
        let mut batch = Vec::with_capacity(rank);
        for i in 0..rank {
            let (x, y) = (at(&a_batch, i), at(&b_batch, i));
            if x != y && x != 1 && y != 1 {
                return invalid(format!("batch dimensions of {a:?} and {b:?} do not match"));
            }
            batch.push(if x == 1 { y } else { x });
        }
        if depth != b_depth {
            return invalid(format!("inner dimensions of {a:?} and {b:?} do not match"));
        }
        expect_count(out, count(&batch) * rows * columns, "the result")?;
        Ok(Product { rows, columns, depth, a_batch, b_batch, batch })
    }

    /// Which matrix of an operand belongs to matrix `index` of the result.
    fn source(&self, operand: &[usize], mut index: usize) -> usize {
        let (mut at, mut stride) = (0, 1);
        for i in (0..self.batch.len()).rev() {
            let position = index % self.batch[i];
            index /= self.batch[i];
            let back = self.batch.len() - i;
            if back <= operand.len() {
                let size = operand[operand.len() - back];
                at += if size == 1 { 0 } else { position * stride };
                stride *= size;
            }
        }
        at
    }
}

/// The values of matrix `index` of `matrices`, each with `per_matrix` rows (or columns): one for all, one per row, or
/// one per row of each matrix.
fn part_range(
    len: usize,
    per_matrix: usize,
    matrices: usize,
    index: usize,
) -> Result<std::ops::Range<usize>, OpError> {
    if len == 1 || len == per_matrix {
        return Ok(0..len);
    }
    if len == per_matrix * matrices {
        return Ok(index * per_matrix..(index + 1) * per_matrix);
    }
    invalid(format!("{len} scales or zero points, expected 1, {per_matrix} or {}", per_matrix * matrices))
}

macro_rules! with_bytes {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            DType::U8 => {
                type $t = u8;
                $body
            }
            DType::I8 => {
                type $t = i8;
                $body
            }
            other => unsupported(format!("integer products of element type {other}")),
        }
    };
}

fn zero_slice<'a, T: QuantizedInteger>(view: Option<TensorView<'a>>, none: &'a [T; 1]) -> &'a [T] {
    view.map_or(none, |z| z.as_slice())
}

fn check_zero_dtype(zero: Option<TensorView>, operand: &TensorView) -> Result<(), OpError> {
    zero.map_or(Ok(()), |z| expect_dtype(&z, operand.dtype, "the zero point"))
}

fn matmul_integer(inputs: &[Option<TensorView>], out: &mut TensorViewMut) -> Result<(), OpError> {
    let (a, b) = (required(inputs, 0, "a")?, required(inputs, 1, "b")?);
    let (a_zero, b_zero) = (optional(inputs, 2), optional(inputs, 3));
    check_zero_dtype(a_zero, &a)?;
    check_zero_dtype(b_zero, &b)?;
    let p = Product::new(a.dims, b.dims, out.dims)?;
    let out = out.as_mut_slice::<i32>();
    with_bytes!(a.dtype, A => with_bytes!(b.dtype, B => {
        let (az, bz) = (zero_slice::<A>(a_zero, &[0]), zero_slice::<B>(b_zero, &[0]));
        each_row(&p, a.as_slice::<A>(), az, b.as_slice::<B>(), bz, |matrix, row, a, a_zero, b, b_zeros| {
            let at = (matrix * p.rows + row) * p.columns;
            integer_product_row(a, a_zero, b, b_zeros, &mut out[at..at + p.columns]);
            Ok(())
        })
    }))
}

fn each_row<A: QuantizedInteger, B: QuantizedInteger>(
    p: &Product,
    a: &[A],
    a_zeros: &[A],
    b: &[B],
    b_zeros: &[B],
    mut run: impl FnMut(usize, usize, &[A], i32, &[B], &[B]) -> Result<(), OpError>,
) -> Result<(), OpError> {
    for matrix in 0..count(&p.batch) {
        let (am, bm) = (p.source(&p.a_batch, matrix), p.source(&p.b_batch, matrix));
        let az = &a_zeros[part_range(a_zeros.len(), p.rows, count(&p.a_batch), am)?];
        let bz = &b_zeros[part_range(b_zeros.len(), p.columns, count(&p.b_batch), bm)?];
        let b = &b[bm * p.depth * p.columns..][..p.depth * p.columns];
        for row in 0..p.rows {
            let a = &a[(am * p.rows + row) * p.depth..][..p.depth];
            run(matrix, row, a, az[if az.len() == 1 { 0 } else { row }].to_i32(), b, bz)?;
        }
    }
    Ok(())
}

/// Limits of a quantised result after an activation that limits the range of the real one.
pub(super) fn activated_bounds(
    activation: Option<UnaryOp>,
    bounds: (i32, i32),
    scale: f32,
    zero: i32,
) -> Result<(i32, i32), OpError> {
    let at = |real: f32| quantize_value(real, scale, zero, bounds.0, bounds.1);
    Ok(match activation {
        None | Some(UnaryOp::Identity) => bounds,
        Some(UnaryOp::Relu) => (at(0.0), bounds.1),
        Some(UnaryOp::ClipTo { min, max }) => (at(min), at(max)),
        Some(other) => return unsupported(format!("activation {other:?} of a quantised result")),
    })
}

fn qlinear_matmul(
    attributes: &MatMulAttributes,
    inputs: &[Option<TensorView>],
    out: &mut TensorViewMut,
    workspace: &mut [u8],
) -> Result<(), OpError> {
    if attributes.trans_a || attributes.alpha != 1.0 {
        return unsupported("a quantised matrix product with a transposed first operand or a factor");
    }
    let (a, b) = (required(inputs, 0, "a")?, required(inputs, 3, "b")?);
    let (a_zero, b_zero) = (required(inputs, 2, "a_zero")?, required(inputs, 5, "b_zero")?);
    let (a_scale, b_scale) = (required(inputs, 1, "a_scale")?, required(inputs, 4, "b_scale")?);
    let (y_scale, y_zero) = (required(inputs, 6, "y_scale")?, required(inputs, 7, "y_zero")?);
    check_zero_dtype(Some(a_zero), &a)?;
    check_zero_dtype(Some(b_zero), &b)?;
    expect_dtype(&y_zero, out.dtype, "the zero point of the result")?;
    let mut b_dims = b.dims.to_vec();
    if let [.., rows, columns] = b_dims.as_mut_slice()
        && attributes.trans_b
    {
        std::mem::swap(rows, columns);
    }
    let p = Product::new(a.dims, &b_dims, out.dims)?;
    let (a_scales, b_scales, y_scales) = (scales_of(&a_scale)?, scales_of(&b_scale)?, scales_of(&y_scale)?);
    let bias = optional(inputs, 8);
    if let Some(bias) = &bias {
        expect_dtype(bias, DType::I32, "the bias")?;
        expect_count(bias.dims, p.columns, "the bias")?;
    }
    let (sums, multipliers) = scratch::<i32>(workspace, 2 * p.columns)?.split_at_mut(p.columns);
    let multipliers: &mut [f32] = bytemuck::cast_slice_mut(multipliers);
    let bounds = integer_bounds(out.dtype).filter(|_| matches!(out.dtype, DType::U8 | DType::I8));
    let Some(bounds) = bounds else {
        return unsupported(format!("quantised products of type {}", out.dtype));
    };
    with_bytes!(a.dtype, A => with_bytes!(b.dtype, B => with_bytes!(out.dtype, Y => {
        let out = out.as_mut_slice::<Y>();
        let y_zeros = y_zero.as_slice::<Y>();
        let (a_data, b_data) = (a.as_slice::<A>(), b.as_slice::<B>());
        each_row(&p, a_data, a_zero.as_slice::<A>(), b_data, b_zero.as_slice::<B>(), |matrix, row, a, az, b, bz| {
            if attributes.trans_b && b_dims.len() > 1 {
                integer_product_row_transposed(a, az, b, bz, sums);
            } else {
                integer_product_row(a, az, b, bz, sums);
            }
            if let Some(bias) = &bias {
                sums.iter_mut().zip(bias.as_slice::<i32>()).for_each(|(s, b)| *s = s.wrapping_add(*b));
            }
            let (am, bm) = (p.source(&p.a_batch, matrix), p.source(&p.b_batch, matrix));
            let a_at = part_range(a_scales.len(), p.rows, count(&p.a_batch), am)?;
            let b_at = part_range(b_scales.len(), p.columns, count(&p.b_batch), bm)?;
            let y_at = part_range(y_scales.len(), p.rows, count(&p.batch), matrix)?;
            let pick = |at: &std::ops::Range<usize>, i: usize| at.start + if at.len() == 1 { 0 } else { i };
            let y_scale = y_scales.get(pick(&y_at, row));
            let zero_at = part_range(y_zeros.len(), p.rows, count(&p.batch), matrix)?;
            let y_zero = y_zeros[pick(&zero_at, row)].to_i32();
            for (j, m) in multipliers.iter_mut().enumerate() {
                *m = a_scales.get(pick(&a_at, row)) * b_scales.get(pick(&b_at, j)) / y_scale;
            }
            let bounds = activated_bounds(attributes.activation, bounds, y_scale, y_zero)?;
            let at = (matrix * p.rows + row) * p.columns;
            requantize_row(sums, multipliers, y_zero, bounds, &mut out[at..at + p.columns]);
            Ok(())
        })
    })))
}

/// Geometry of a convolution of `x [batch, channels, spatial…]` with `w [filters, channels/groups, kernel…]`.
fn conv_shape(
    a: &ConvAttributes,
    x: &[usize],
    w: &[usize],
    out: &[usize],
) -> Result<IntegerConvShape, OpError> {
    let spatial = x.len().saturating_sub(2);
    if spatial > 3 {
        return unsupported("an integer convolution with more than 3 spatial dimensions");
    }
    if x.len() < 3 || w.len() != x.len() || out.len() != x.len() {
        return invalid(format!("a convolution of {x:?} with weights {w:?} to {out:?}"));
    }
    let channels_last = a.layout == Layout::ChannelsLast;
    let split = |d: &[usize]| if channels_last { (d[d.len() - 1], 1) } else { (d[1], 2) };
    let ((channels, x_first), (filters, out_first)) = (split(x), split(out));
    let groups = a.groups.max(1);
    if w[1] * groups != channels || !w[0].is_multiple_of(groups) || out[0] != x[0] || filters != w[0] {
        return invalid(format!("channels of {x:?} and weights {w:?} do not match with {groups} groups"));
    }
    if !a.kernel.is_empty() {
        expect_dims(&w[2..], &a.kernel, "the window")?;
    }
    // Unused leading axes have one position.
    let padded = |values: &[usize]| -> [usize; 3] {
        std::array::from_fn(|i| {
            if i + spatial < 3 { 1 } else { values.get(i + spatial - 3).copied().unwrap_or(1) }
        })
    };
    let (input, output, kernel) =
        (padded(&x[x_first..][..spatial]), padded(&out[out_first..][..spatial]), padded(&w[2..]));
    let (strides, dilations) = (padded(&a.strides), padded(&a.dilations));
    let pads = std::array::from_fn(|i| {
        if i + spatial < 3 {
            return 0;
        }
        let reach = ((output[i].max(1) - 1) * strides[i] + (kernel[i].max(1) - 1) * dilations[i] + 1) as i64;
        let total = (reach - input[i] as i64).max(0);
        match &a.padding {
            Padding::Valid => 0,
            Padding::Explicit(p) => p.get(i + spatial - 3).copied().unwrap_or(0),
            Padding::SameUpper => total / 2,
            Padding::SameLower => total - total / 2,
        }
    });
    Ok(IntegerConvShape {
        channels,
        filters,
        groups,
        input,
        output,
        kernel,
        strides,
        dilations,
        pads,
        channels_last,
    })
}

/// A value per filter, or one for all.
fn per_filter(len: usize, filters: usize, filter: usize) -> Result<usize, OpError> {
    match len {
        1 => Ok(0),
        n if n == filters => Ok(filter),
        n => invalid(format!("{n} scales or zero points for {filters} filters")),
    }
}

fn conv_integer(
    a: &ConvAttributes,
    inputs: &[Option<TensorView>],
    out: &mut TensorViewMut,
) -> Result<(), OpError> {
    let (x, w) = (required(inputs, 0, "x")?, required(inputs, 1, "w")?);
    let (x_zero, w_zero) = (optional(inputs, 2), optional(inputs, 3));
    check_zero_dtype(x_zero, &x)?;
    check_zero_dtype(w_zero, &w)?;
    if a.layout != Layout::ChannelsFirst {
        return unsupported("an integer convolution with channels last");
    }
    let shape = conv_shape(a, x.dims, w.dims, out.dims)?;
    let plane: usize = shape.output.iter().product();
    let picture = count(&x.dims[1..]);
    let filter_len = count(&w.dims[1..]);
    let out = out.as_mut_slice::<i32>();
    with_bytes!(x.dtype, X => with_bytes!(w.dtype, W => {
        let (xz, wz) = (zero_slice::<X>(x_zero, &[0]), zero_slice::<W>(w_zero, &[0]));
        let (x_data, w_data) = (x.as_slice::<X>(), w.as_slice::<W>());
        for (index, out) in out.chunks_exact_mut(plane.max(1)).enumerate() {
            let (batch, filter) = (index / shape.filters, index % shape.filters);
            let wz = wz[per_filter(wz.len(), shape.filters, filter)?].to_i32();
            let (x, w) = (&x_data[batch * picture..][..picture], &w_data[filter * filter_len..][..filter_len]);
            integer_conv_plane(&shape, filter, x, xz[0].to_i32(), w, wz, out);
        }
        Ok(())
    }))
}

fn qlinear_conv(
    a: &ConvAttributes,
    inputs: &[Option<TensorView>],
    out: &mut TensorViewMut,
    workspace: &mut [u8],
) -> Result<(), OpError> {
    let (x, w) = (required(inputs, 0, "x")?, required(inputs, 3, "w")?);
    let (x_zero, w_zero) = (required(inputs, 2, "x_zero")?, required(inputs, 5, "w_zero")?);
    let (x_scale, w_scale) = (required(inputs, 1, "x_scale")?, required(inputs, 4, "w_scale")?);
    let (y_scale, y_zero) = (required(inputs, 6, "y_scale")?, required(inputs, 7, "y_zero")?);
    check_zero_dtype(Some(x_zero), &x)?;
    check_zero_dtype(Some(w_zero), &w)?;
    expect_dtype(&y_zero, out.dtype, "the zero point of the result")?;
    let (x_scale, y_scale) =
        (number_scalar(&x_scale, "x_scale")? as f32, number_scalar(&y_scale, "y_scale")? as f32);
    expect_count(x_zero.dims, 1, "x_zero")?;
    expect_count(y_zero.dims, 1, "y_zero")?;
    let w_scales = scales_of(&w_scale)?;
    let shape = conv_shape(a, x.dims, w.dims, out.dims)?;
    let bias = optional(inputs, 8);
    if let Some(bias) = &bias {
        expect_dtype(bias, DType::I32, "the bias")?;
        expect_count(bias.dims, shape.filters, "the bias")?;
    }
    let plane: usize = shape.output.iter().product();
    let (picture, filter_len) = (count(&x.dims[1..]), count(&w.dims[1..]));
    let sums = scratch::<i32>(workspace, plane)?;
    let bounds = integer_bounds(out.dtype).filter(|_| matches!(out.dtype, DType::U8 | DType::I8));
    let Some(bounds) = bounds else {
        return unsupported(format!("quantised convolutions of type {}", out.dtype));
    };
    with_bytes!(x.dtype, X => with_bytes!(w.dtype, W => with_bytes!(out.dtype, Y => {
        let (xz, yz) = (x_zero.as_slice::<X>()[0].to_i32(), y_zero.as_slice::<Y>()[0].to_i32());
        let bounds = activated_bounds(a.activation, bounds, y_scale, yz)?;
        let (x_data, w_data, w_zeros) = (x.as_slice::<X>(), w.as_slice::<W>(), w_zero.as_slice::<W>());
        let out = out.as_mut_slice::<Y>();
        for index in 0..out.len().checked_div(plane).unwrap_or(0) {
            let (batch, filter) = (index / shape.filters, index % shape.filters);
            let wz = w_zeros[per_filter(w_zeros.len(), shape.filters, filter)?].to_i32();
            let (x, w) = (&x_data[batch * picture..][..picture], &w_data[filter * filter_len..][..filter_len]);
            integer_conv_plane(&shape, filter, x, xz, w, wz, sums);
            if let Some(bias) = &bias {
                let bias = bias.as_slice::<i32>()[filter];
                sums.iter_mut().for_each(|s| *s = s.wrapping_add(bias));
            }
            let w_scale = w_scales.get(per_filter(w_scales.len(), shape.filters, filter)?);
            let multiplier = [x_scale * w_scale / y_scale];
            if shape.channels_last {
                let pixels = out[batch * plane * shape.filters..].chunks_exact_mut(shape.filters);
                for (sum, pixel) in sums.iter().zip(pixels) {
                    requantize_row(&[*sum], &multiplier, yz, bounds, &mut pixel[filter..=filter]);
                }
            } else {
                requantize_row(sums, &multiplier, yz, bounds, &mut out[index * plane..][..plane]);
            }
        }
        Ok(())
    })))
}
