//! Matrix products, sums of products, determinants.

use super::block::{BLOCK, Broadcast, Class, Compute, Walk, class};
use super::tile::{COLS, LeftTile, Operands, RightTile, SharedResult, Sizes, product};
use super::{OpError, TensorView, TensorViewMut, Unary, activate_tensor};
use crate::ThreadPool;

/// A batched matrix inside a tensor, with any strides.
struct Matrix<'a> {
    view: TensorView<'a>,
    /// Element where each batch starts.
    batches: Vec<usize>,
    row_stride: usize,
    column_stride: usize,
}

impl Matrix<'_> {
    fn run<C: Compute>(&self, batch: usize, row: usize, column: usize, along_row: bool, out: &mut [C]) {
        let start = self.batches[batch] + row * self.row_stride + column * self.column_stride;
        let stride = if along_row { self.column_stride } else { self.row_stride };
        let bytes = &self.view.bytes[start * self.view.dtype.size_bytes()..];
        C::gather(self.view.dtype, bytes, &Walk { dims: &[out.len()], strides: &[stride] }, 0, out);
    }
}

struct TwoMatrices<'a> {
    a: Matrix<'a>,
    b: Matrix<'a>,
}

impl<C: Compute> Operands<C> for TwoMatrices<'_> {
    fn left(&self, batch: usize, row: usize, rows: usize, k: usize, depth: usize, tile: &mut LeftTile<C>) {
        for r in 0..rows {
            self.a.run(batch, row + r, k, true, &mut tile[r][..depth]);
        }
    }

    fn right(
        &self,
        batch: usize,
        k: usize,
        depth: usize,
        column: usize,
        columns: usize,
        tile: &mut RightTile<C>,
    ) {
        if self.b.column_stride == 1 || self.b.row_stride != 1 {
            for d in 0..depth {
                self.b.run(batch, k + d, column, true, &mut tile[d][..columns]);
            }
            return;
        }
        let mut run = [C::ZERO; super::tile::DEPTH];
        for c in 0..columns {
            self.b.run(batch, k, column + c, false, &mut run[..depth]);
            for d in 0..depth {
                tile[d][c] = run[d];
            }
        }
    }
}

/// What is added to a product `[…, rows, columns]`, and what happens then.
#[derive(Clone, Copy, Debug)]
pub struct MatMulEpilogue<'a> {
    /// Scale of the product.
    pub alpha: f32,
    /// One factor per column of the product.
    pub column_scale: Option<TensorView<'a>>,
    /// Each with its scale; broadcast to the shape of the result.
    pub added: [Option<(f32, TensorView<'a>)>; 2],
    /// Applied last.
    pub activation: Option<Unary>,
}

/// `y = activation(alpha·a·b·column_scale + Σ scale·added)`: NumPy's `matmul` with optional transposition of the last two
/// dimensions. One-dimensional operands are a row or a column.
///
/// # Errors
/// [`OpError::Invalid`] when shapes or types do not fit.
pub fn matmul(
    pool: &ThreadPool,
    a: &TensorView,
    trans_a: bool,
    b: &TensorView,
    trans_b: bool,
    epilogue: &MatMulEpilogue,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let wrong =
        || OpError::Invalid(format!("the product of {:?} and {:?} is no {:?}", a.dims, b.dims, y.dims));
    if a.dtype != b.dtype || a.dtype != y.dtype {
        return Err(OpError::Invalid(format!("the product of {} and {} as {}", a.dtype, b.dtype, y.dtype)));
    }
    if a.dims.is_empty() || b.dims.is_empty() {
        return Err(wrong());
    }
    let (a_rank, b_rank) = (a.dims.len(), b.dims.len());
    // (rows, depth, row stride, column stride)
    let (rows, depth, a_row, a_column) = match (a_rank, trans_a) {
        (1, _) => (1, a.dims[0], a.dims[0], 1),
        (_, false) => (a.dims[a_rank - 2], a.dims[a_rank - 1], a.dims[a_rank - 1], 1),
        (_, true) => (a.dims[a_rank - 1], a.dims[a_rank - 2], 1, a.dims[a_rank - 1]),
    };
    let (b_depth, columns, b_row, b_column) = match (b_rank, trans_b) {
        (1, _) => (b.dims[0], 1, 1, 1),
        (_, false) => (b.dims[b_rank - 2], b.dims[b_rank - 1], b.dims[b_rank - 1], 1),
        (_, true) => (b.dims[b_rank - 1], b.dims[b_rank - 2], 1, b.dims[b_rank - 1]),
    };
    let matrix_dims = usize::from(a_rank > 1) + usize::from(b_rank > 1);
    let batch_rank = y.dims.len().checked_sub(matrix_dims).ok_or_else(wrong)?;
    let batch_dims = &y.dims[..batch_rank];
    let batches: usize = batch_dims.iter().product();
    if depth != b_depth || batches * rows * columns != y.len() {
        return Err(wrong());
    }
    let starts = |dims: &[usize], rank: usize, matrix: usize| -> Option<Vec<usize>> {
        let outer = &dims[..rank.saturating_sub(2)];
        let walk = Broadcast::new(batch_dims, &[outer])?;
        let mut starts = vec![0; batches];
        for (i, start) in starts.iter_mut().enumerate() {
            let mut rest = i;
            for axis in (0..walk.dims.len()).rev() {
                *start += rest % walk.dims[axis] * walk.strides[0][axis];
                rest /= walk.dims[axis];
            }
            *start *= matrix;
        }
        Some(starts)
    };
    let operands = TwoMatrices {
        a: Matrix {
            view: *a,
            batches: starts(a.dims, a_rank, rows * depth).ok_or_else(wrong)?,
            row_stride: a_row,
            column_stride: a_column,
        },
        b: Matrix {
            view: *b,
            batches: starts(b.dims, b_rank, depth * columns).ok_or_else(wrong)?,
            row_stride: b_row,
            column_stride: b_column,
        },
    };
    let sizes = Sizes { batches, rows, columns, depth };
    match class(y.dtype) {
        Some(Class::F32) => finish::<f32>(pool, sizes, &operands, epilogue, y)?,
        Some(Class::F64) => finish::<f64>(pool, sizes, &operands, epilogue, y)?,
        Some(Class::I64) => finish::<i64>(pool, sizes, &operands, epilogue, y)?,
        Some(Class::U64) => finish::<u64>(pool, sizes, &operands, epilogue, y)?,
        None => return Err(OpError::Unsupported(format!("a product of {}", y.dtype))),
    }
    activate_tensor(pool, epilogue.activation, y)
}

fn finish<C: Compute>(
    pool: &ThreadPool,
    sizes: Sizes,
    operands: &TwoMatrices,
    epilogue: &MatMulEpilogue,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let added: Vec<(f32, TensorView, Broadcast)> = epilogue
        .added
        .iter()
        .flatten()
        .map(|&(scale, view)| {
            let walk = Broadcast::new(y.dims, &[view.dims]).ok_or_else(|| {
                OpError::Invalid(format!("what is added has shape {:?}, the product {:?}", view.dims, y.dims))
            })?;
            Ok((scale, view, walk))
        })
        .collect::<Result<_, OpError>>()?;
    if let Some(scale) = epilogue.column_scale
        && scale.len() != sizes.columns
    {
        return Err(OpError::Invalid(format!(
            "scales of shape {:?} for {} columns",
            scale.dims, sizes.columns
        )));
    }
    let scaled = |x: C, scale: f32| {
        if scale == 1.0 { x } else { C::from_f64(x.to_f64() * f64::from(scale)) }
    };
    let (dtype, size) = (y.dtype, y.dtype.size_bytes());
    let result = SharedResult::new(y.bytes);
    product::<C>(pool, sizes, operands, &|batch, row, rows, column, columns, tile| {
        for r in 0..rows {
            let values = &mut tile[r][..columns];
            let start = (batch * sizes.rows + row + r) * sizes.columns + column;
            if epilogue.alpha != 1.0 {
                values.iter_mut().for_each(|v| *v = scaled(*v, epilogue.alpha));
            }
            if let Some(scale) = epilogue.column_scale {
                let mut factors = [C::ZERO; COLS];
                C::load(scale.dtype, scale.bytes, column, &mut factors[..columns]);
                values.iter_mut().zip(&factors).for_each(|(v, &f)| *v = v.times(f));
            }
            for (scale, view, walk) in &added {
                let mut other = [C::ZERO; COLS];
                C::gather(view.dtype, view.bytes, &walk.walk(0), start, &mut other[..columns]);
                values.iter_mut().zip(&other).for_each(|(v, &o)| *v = v.plus(scaled(o, *scale)));
            }
            // SAFETY: each task has its own tile, so its own parts of rows.
            C::store(dtype, values, unsafe { result.part(start * size, columns * size) });
        }
    });
    Ok(())
}

/// A parsed Einstein summation: for each operand the label of each of its axes.
#[derive(Clone, Debug, PartialEq)]
pub struct EinsumPlan {
    /// Size of each label: first those of the result in order, then the summed ones.
    sizes: Vec<usize>,
    /// Number of labels of the result.
    kept: usize,
    /// Per operand, per label.
    strides: Vec<Vec<usize>>,
}

impl EinsumPlan {
    /// Reads an equation such as `"...ij,jk->...ik"` for operands of these shapes.
    ///
    /// # Errors
    /// [`OpError::Invalid`] when the equation and the shapes do not fit together.
    pub fn new(equation: &str, shapes: &[&[usize]]) -> Result<EinsumPlan, OpError> {
        let wrong = |what: &str| OpError::Invalid(format!("equation {equation:?}: {what}"));
        let text: String = equation.chars().filter(|c| !c.is_whitespace()).collect();
        let (left, right) = match text.split_once("->") {
            Some((l, r)) => (l.to_owned(), Some(r.to_owned())),
            None => (text, None),
        };
        let terms: Vec<&str> = left.split(',').collect();
        if terms.len() != shapes.len() {
            return Err(wrong(&format!("{} terms for {} operands", terms.len(), shapes.len())));
        }
        // Labels: characters, and for the ellipsis numbers counted from its right end.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        enum Label {
            Dots(usize),
            Letter(char),
        }
        let expand = |term: &str, dots: usize| -> Result<Vec<Label>, OpError> {
            let mut labels = Vec::new();
            let mut rest = term;
            let mut seen = false;
            while let Some(c) = rest.chars().next() {
                if rest.starts_with("...") && !seen {
                    seen = true;
                    labels.extend((0..dots).rev().map(Label::Dots));
                    rest = &rest[3..];
                } else if c.is_ascii_alphabetic() {
                    labels.push(Label::Letter(c));
                    rest = &rest[1..];
                } else {
                    return Err(wrong(&format!("{c:?} is no label")));
                }
            }
            Ok(labels)
        };
        let mut most_dots = 0;
        let mut operand_labels = Vec::new();
        for (term, shape) in terms.iter().zip(shapes) {
            let letters = term.chars().filter(|c| c.is_ascii_alphabetic()).count();
            let dots = if term.contains("...") {
                shape.len().checked_sub(letters).ok_or_else(|| wrong("more labels than axes"))?
            } else {
                0
            };
            most_dots = most_dots.max(dots);
            let labels = expand(term, dots)?;
            if labels.len() != shape.len() {
                return Err(wrong(&format!("{} labels for {} axes", labels.len(), shape.len())));
            }
            operand_labels.push(labels);
        }
        let result = match right {
            Some(right) => expand(&right, most_dots)?,
            None => {
                let mut all: Vec<Label> = operand_labels.iter().flatten().copied().collect();
                all.sort_unstable();
                let mut result: Vec<Label> = (0..most_dots).rev().map(Label::Dots).collect();
                result.extend(
                    all.iter()
                        .filter(|l| matches!(l, Label::Letter(_)))
                        .filter(|l| all.iter().filter(|o| o == l).count() == 1),
                );
                result
            }
        };
        let mut labels = result.clone();
        for (i, label) in result.iter().enumerate() {
            if result[..i].contains(label) {
                return Err(wrong("the result repeats a label"));
            }
        }
        for label in operand_labels.iter().flatten() {
            if !labels.contains(label) {
                labels.push(*label);
            }
        }
        let mut sizes = vec![1; labels.len()];
        let mut known = vec![false; labels.len()];
        let mut strides = Vec::new();
        for (own, shape) in operand_labels.iter().zip(shapes) {
            let mut own_strides = vec![0; labels.len()];
            let mut step = 1;
            for (label, &size) in own.iter().zip(*shape).rev() {
                let l = labels.iter().position(|x| x == label).expect("every label was listed");
                if !known[l] || (sizes[l] == 1 && size != 1) {
                    sizes[l] = size;
                } else if size != sizes[l] && size != 1 {
                    return Err(wrong(&format!("a label is {} and {size} long", sizes[l])));
                }
                known[l] = true;
                if size != 1 {
                    own_strides[l] += step;
                }
                step *= size;
            }
            strides.push(own_strides);
        }
        if known[..result.len()].contains(&false) {
            return Err(wrong("the result has a label that no operand has"));
        }
        Ok(EinsumPlan { sizes, kept: result.len(), strides })
    }

    /// Shape of the result.
    pub fn result_dims(&self) -> &[usize] {
        &self.sizes[..self.kept]
    }
}

/// Sum of products in Einstein's notation.
///
/// # Errors
/// [`OpError::Invalid`] when the types differ or the result has another shape.
pub fn einsum(
    pool: &ThreadPool,
    plan: &EinsumPlan,
    operands: &[TensorView],
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    if y.dims != plan.result_dims() || operands.iter().any(|x| x.dtype != y.dtype) {
        return Err(OpError::Invalid(format!("Einsum gives {:?}, not {:?}", plan.result_dims(), y.dims)));
    }
    match class(y.dtype) {
        Some(Class::F32) => einsum_in::<f32>(pool, plan, operands, y),
        Some(Class::F64) => einsum_in::<f64>(pool, plan, operands, y),
        Some(Class::I64) => einsum_in::<i64>(pool, plan, operands, y),
        Some(Class::U64) => einsum_in::<u64>(pool, plan, operands, y),
        None => return Err(OpError::Unsupported(format!("Einsum of {}", y.dtype))),
    }
    Ok(())
}

fn einsum_in<C: Compute>(
    pool: &ThreadPool,
    plan: &EinsumPlan,
    operands: &[TensorView],
    y: &mut TensorViewMut,
) {
    let summed = &plan.sizes[plan.kept..];
    let sum_strides: Vec<&[usize]> = plan.strides.iter().map(|s| &s[plan.kept..]).collect();
    let sums = Broadcast::from_strides(summed, &sum_strides);
    let terms: usize = summed.iter().product();
    let dtype = y.dtype;
    super::block::for_blocks(pool, y, &|start, bytes| {
        let mut results = [C::ZERO; BLOCK];
        let count = bytes.len() / dtype.size_bytes();
        let mut offsets = vec![0; operands.len()];
        for (i, result) in results[..count].iter_mut().enumerate() {
            offsets.fill(0);
            let mut rest = start + i;
            for axis in (0..plan.kept).rev() {
                let index = rest % plan.sizes[axis];
                rest /= plan.sizes[axis];
                for (offset, strides) in offsets.iter_mut().zip(&plan.strides) {
                    *offset += index * strides[axis];
                }
            }
            let mut done = 0;
            while done < terms {
                let mut products = [C::ZERO; BLOCK];
                let mut factor = [C::ZERO; BLOCK];
                let run = BLOCK.min(terms - done);
                for (o, x) in operands.iter().enumerate() {
                    let bytes = &x.bytes[offsets[o] * dtype.size_bytes()..];
                    let target = if o == 0 { &mut products[..run] } else { &mut factor[..run] };
                    C::gather(dtype, bytes, &sums.walk(o), done, target);
                    if o > 0 {
                        products[..run].iter_mut().zip(&factor).for_each(|(p, &f)| *p = p.times(f));
                    }
                }
                *result = products[..run].iter().fold(*result, |s, &p| s.plus(p));
                done += run;
            }
        }
        C::store(dtype, &results[..count], bytes);
    });
}

/// Determinants of the square matrices in the last two dimensions; `workspace` holds one matrix as f64.
///
/// # Errors
/// [`OpError::Invalid`] when the matrices are not square.
pub fn det(x: &TensorView, y: &mut TensorViewMut, workspace: &mut [f64]) -> Result<(), OpError> {
    let (n, columns) = match x.dims {
        [.., n, c] => (*n, *c),
        _ => return Err(OpError::Invalid(format!("Det of shape {:?}", x.dims))),
    };
    if n != columns || y.len() * n * n != x.len() {
        return Err(OpError::Invalid(format!("Det of matrices that are not square: {:?}", x.dims)));
    }
    if !x.dtype.is_float() {
        return Err(OpError::Unsupported(format!("Det of {}", x.dtype)));
    }
    let matrix = &mut workspace[..n * n];
    let (dtype, size) = (y.dtype, y.dtype.size_bytes());
    for (i, out) in y.bytes.chunks_mut(size).enumerate() {
        f64::load(x.dtype, x.bytes, i * n * n, matrix);
        let mut result = 1.0;
        for column in 0..n {
            let pivot = (column..n)
                .max_by(|&a, &b| matrix[a * n + column].abs().total_cmp(&matrix[b * n + column].abs()))
                .expect("the range is not empty");
            if matrix[pivot * n + column] == 0.0 {
                result = 0.0;
                break;
            }
            if pivot != column {
                result = -result;
                for c in 0..n {
                    matrix.swap(pivot * n + c, column * n + c);
                }
            }
            let head = matrix[column * n + column];
            result *= head;
            for row in column + 1..n {
                let factor = matrix[row * n + column] / head;
                for c in column..n {
                    matrix[row * n + c] -= factor * matrix[column * n + c];
                }
            }
        }
        f64::store(dtype, &[result], out);
    }
    Ok(())
}
