//! Classical machine learning.

use std::collections::HashMap;

use lightering_graph::{
    DType, Labels, MlOp, PostTransform, RowNorm, SvmKernel, Tensor, TensorType, TreeEnsemble, ValueType,
};
use lightering_kernels::ThreadPool;
use lightering_kernels::ops::real::Real;

use super::heap::{allocate, as_view, as_view_mut, tensor_input};
use super::operands::*;
use super::{OpContext, OpError, TensorView, TensorViewMut, trees};
use crate::RuntimeValue;

/// Whether an operator takes or yields text or maps.
pub(super) fn is_dynamic(op: &MlOp, inputs: &[Option<&ValueType>]) -> bool {
    let text_labels = |labels: &Labels| matches!(labels, Labels::Strings(_));
    let text_in = inputs
        .iter()
        .flatten()
        .any(|t| !matches!(t, ValueType::Tensor(TensorType { dtype, .. }) if *dtype != DType::String));
    text_in
        || match op {
            MlOp::CategoryMapper { .. } | MlOp::DictVectorizer { .. } | MlOp::ZipMap { .. } => true,
            MlOp::LabelEncoder { keys, values, .. } => {
                keys.dtype() == DType::String || values.dtype() == DType::String
            }
            MlOp::OneHotEncoder { categories, .. } => text_labels(categories),
            MlOp::LinearClassifier { labels, .. }
            | MlOp::SvmClassifier { labels, .. }
            | MlOp::TreeEnsembleClassifier { labels, .. } => text_labels(labels),
            _ => false,
        }
}

/// Runs `$body` with `$t` standing for the Rust type of a table's elements.
macro_rules! with_feature {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            DType::F32 => {
                type $t = f32;
                $body
            }
            DType::F64 => {
                type $t = f64;
                $body
            }
            DType::I64 => {
                type $t = i64;
                $body
            }
            DType::I32 => {
                type $t = i32;
                $body
            }
            other => unsupported(format!("a table of element type {other}")),
        }
    };
}

/// Rows and columns of a table; a vector is one row.
fn table(x: &TensorView) -> Result<(usize, usize), OpError> {
    match *x.dims {
        [columns] => Ok((1, columns)),
        [rows, columns] => Ok((rows, columns)),
        _ => invalid(format!("a table of shape {:?}, expected 1 or 2 dimensions", x.dims)),
    }
}

/// Dispatch of the operators whose operands and results are tensors of numbers.
pub(super) fn compute(
    op: &MlOp,
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
    pool: &ThreadPool,
) -> Result<(), OpError> {
    let x = required(inputs, 0, "x")?;
    if let Some(labels) = classifier_labels(op) {
        let Labels::Ints(names) = labels else { return unsupported("text labels among planned tensors") };
        let mut all = outputs.iter_mut();
        let (label_out, score_out) =
            (all.next().and_then(Option::as_mut), all.next().and_then(Option::as_mut));
        let scores = score_out.map(|s| s.as_mut_slice::<f32>());
        let mut label_out = label_out.map(|l| l.as_mut_slice::<i64>());
        return classify(op, &x, scores, pool, |row, class| {
            if let Some(out) = label_out.as_deref_mut() {
                out[row] = match class {
                    Class::Index(i) => names.get(i).copied().unwrap_or(i as i64),
                    Class::Positive => names.first().copied().unwrap_or(1),
                    Class::Negative => 0,
                };
            }
        });
    }
    let Some(Some(out)) = outputs.first_mut() else { return Ok(()) };
    match op {
        MlOp::ArrayFeatureExtractor => {
            let indices = feature_indices(&x, &required(inputs, 1, "the indices")?, out.dims)?;
            let (size, columns) = (x.dtype.size_bytes(), *x.dims.last().unwrap_or(&1));
            let mut to = out.bytes.chunks_exact_mut(size);
            for row in x.bytes.chunks_exact((columns * size).max(1)) {
                for (&column, to) in indices.iter().zip(&mut to) {
                    to.copy_from_slice(&row[column * size..][..size]);
                }
            }
            Ok(())
        }
        MlOp::Binarizer { threshold } => {
            for i in 0..count(x.dims) {
                store_number(out, i, f64::from(u8::from(number_at(&x, i)? > f64::from(*threshold))))?;
            }
            Ok(())
        }
        MlOp::FeatureVectorizer { dimensions } => feature_vectorizer(dimensions, inputs, out),
        MlOp::Imputer { values, missing } => imputer(&x, values, missing, out),
        MlOp::LabelEncoder { keys, values, default } => {
            let (keys, values, default) = (as_view(keys), as_view(values), as_view(default));
            let index = NumberIndex::new(&keys)?;
            for i in 0..count(x.dims) {
                let value = match index.find(number_at(&x, i)?) {
                    Some(at) => number_at(&values, at)?,
                    None => number_at(&default, 0)?,
                };
                store_number(out, i, value)?;
            }
            Ok(())
        }
        MlOp::LinearRegressor { coefficients, intercepts, targets, post_transform } => {
            let (rows, columns) = table(&x)?;
            expect_count(&[coefficients.len()], targets * columns, "the coefficients")?;
            expect_count(out.dims, rows * targets, "the result")?;
            let out = out.as_mut_slice::<f32>();
            for (row, out) in out.chunks_exact_mut((*targets).max(1)).enumerate() {
                linear_scores(&x, row, columns, coefficients, intercepts, out)?;
                transform(*post_transform, out);
            }
            Ok(())
        }
        MlOp::Normalizer { norm } => normalizer(*norm, &x, out),
        MlOp::OneHotEncoder { categories: Labels::Ints(categories), zeros } => {
            let index: HashMap<i64, usize> = categories.iter().enumerate().map(|(i, &c)| (c, i)).collect();
            let out = out.as_mut_slice::<f32>();
            out.fill(0.0);
            for i in 0..count(x.dims) {
                let value = number_at(&x, i)? as i64;
                match index.get(&value) {
                    Some(at) => out[i * categories.len() + at] = 1.0,
                    None if *zeros => {}
                    None => return invalid(format!("{value} is not among the categories")),
                }
            }
            Ok(())
        }
        MlOp::Scaler { offset, scale } => {
            let (_, columns) = table(&x)?;
            for v in [offset, scale] {
                if v.len() != 1 && v.len() != columns {
                    return invalid(format!("{} offsets or scales for {columns} columns", v.len()));
                }
            }
            let pick = |v: &[f32], i: usize| f64::from(v[if v.len() == 1 { 0 } else { i % columns }]);
            let out = out.as_mut_slice::<f32>();
            for (i, out) in out.iter_mut().enumerate() {
                *out = ((number_at(&x, i)? - pick(offset, i)) * pick(scale, i)) as f32;
            }
            Ok(())
        }
        MlOp::SvmRegressor {
            kernel,
            support_vectors,
            vectors,
            coefficients,
            rho,
            one_class,
            post_transform,
        } => {
            let (rows, columns) = table(&x)?;
            expect_count(out.dims, rows, "the result")?;
            let out = out.as_mut_slice::<f32>();
            let kernel = if *vectors == 0 { SvmKernel::Linear } else { *kernel };
            let supports = if *vectors == 0 { coefficients } else { support_vectors };
            let count_of = (*vectors).max(1);
            expect_count(&[supports.len()], count_of * columns, "the support vectors")?;
            for (row, out) in out.iter_mut().enumerate() {
                let mut sum = f64::from(*rho);
                for (v, support) in supports.chunks_exact(columns.max(1)).enumerate() {
                    let weight = if *vectors == 0 {
                        1.0
                    } else {
                        f64::from(coefficients.get(v).copied().unwrap_or(0.0))
                    };
                    sum += weight * similarity(kernel, &x, row, columns, support)?;
                }
                if *one_class {
                    sum = if sum > 0.0 { 1.0 } else { -1.0 };
                }
                *out = sum as f32;
                transform(*post_transform, std::slice::from_mut(out));
            }
            Ok(())
        }
        MlOp::TreeEnsembleRegressor { trees } => {
            let (rows, columns) = table(&x)?;
            expect_count(out.dims, rows * trees.targets, "the result")?;
            let targets = trees.targets.max(1);
            with_feature!(x.dtype, X => {
                let x = x.as_slice::<X>();
                with_real!(out.dtype, Y => {
                    let out = out.as_mut_slice::<Y>();
                    trees::evaluate(pool, trees, columns, x, out)?;
                    out.chunks_exact_mut(targets).for_each(|row| transform(trees.post_transform, row));
                    Ok(())
                })
            })
        }
        other => unsupported(format!("{other:?} among planned tensors").chars().take(80).collect::<String>()),
    }
}

/// The columns that an operand picks, checked against the table and the result.
fn feature_indices(x: &TensorView, indices: &TensorView, out: &[usize]) -> Result<Vec<usize>, OpError> {
    let columns = x.dims.last().copied().unwrap_or(1);
    let picked: Vec<usize> = (0..count(indices.dims))
        .map(|i| {
            let at = integer_at(indices, i)?;
            usize::try_from(at)
                .ok()
                .filter(|&a| a < columns)
                .map_or_else(|| invalid(format!("column {at} of {columns}")), Ok)
        })
        .collect::<Result<_, _>>()?;
    let rows = count(x.dims) / columns.max(1);
    expect_count(out, rows * picked.len(), "the result")?;
    Ok(picked)
}

fn feature_vectorizer(
    dimensions: &[usize],
    inputs: &[Option<TensorView>],
    out: &mut TensorViewMut,
) -> Result<(), OpError> {
    let width: usize = dimensions.iter().sum();
    let rows = count(out.dims).checked_div(width).unwrap_or(0);
    let mut first = 0;
    for (i, &columns) in dimensions.iter().enumerate() {
        let x = required(inputs, i, "a part")?;
        let (x_rows, x_columns) = match *x.dims {
            [n] if rows == n => (n, 1),
            _ => table(&x)?,
        };
        if x_rows != rows {
            return invalid(format!("a part of {x_rows} rows beside one of {rows}"));
        }
        for row in 0..rows {
            for column in 0..columns {
                let value = if column < x_columns { number_at(&x, row * x_columns + column)? } else { 0.0 };
                store_number(out, row * width + first + column, value)?;
            }
        }
        first += columns;
    }
    Ok(())
}

fn imputer(
    x: &TensorView,
    values: &Tensor,
    missing: &Tensor,
    out: &mut TensorViewMut,
) -> Result<(), OpError> {
    let (_, columns) = table(x)?;
    let (values, missing) = (as_view(values), as_view(missing));
    let n = count(values.dims);
    if n != 1 && n != columns {
        return invalid(format!("{n} imputed values for {columns} columns"));
    }
    let missing = number_at(&missing, 0)?;
    for i in 0..count(x.dims) {
        let value = number_at(x, i)?;
        let gone = value == missing || (value.is_nan() && missing.is_nan());
        let filled = if gone { number_at(&values, if n == 1 { 0 } else { i % columns })? } else { value };
        store_number(out, i, filled)?;
    }
    Ok(())
}

fn normalizer(norm: RowNorm, x: &TensorView, out: &mut TensorViewMut) -> Result<(), OpError> {
    let (rows, columns) = table(x)?;
    let out = out.as_mut_slice::<f32>();
    for row in 0..rows {
        let mut total = 0f64;
        for column in 0..columns {
            let value = number_at(x, row * columns + column)?;
            total = match norm {
                RowNorm::Max => total.max(value.abs()),
                RowNorm::L1 => total + value.abs(),
                RowNorm::L2 => total + value * value,
            };
        }
        let divisor = if norm == RowNorm::L2 { total.sqrt() } else { total };
        for column in 0..columns {
            let value = number_at(x, row * columns + column)?;
            out[row * columns + column] = (if divisor == 0.0 { value } else { value / divisor }) as f32;
        }
    }
    Ok(())
}

/// Numbers by their bits, −0 and 0 being the same and all NaN one key.
struct NumberIndex(HashMap<u64, usize>);

fn number_key(value: f64) -> u64 {
    if value.is_nan() { f64::NAN.to_bits() } else { (value + 0.0).to_bits() }
}

impl NumberIndex {
    fn new(keys: &TensorView) -> Result<NumberIndex, OpError> {
        let pairs = (0..count(keys.dims)).map(|i| Ok((number_key(number_at(keys, i)?), i)));
        Ok(NumberIndex(pairs.collect::<Result<_, OpError>>()?))
    }

    fn find(&self, value: f64) -> Option<usize> {
        self.0.get(&number_key(value)).copied()
    }
}

/// `1 / (1 + e^−x)`.
fn logistic(x: f64) -> f64 {
    let v = 1.0 / (1.0 + (-x.abs()).exp());
    if x < 0.0 { 1.0 - v } else { v }
}

/// Inverse of the normal distribution's sum function, after Winitzki's approximation of the inverse error function,
/// which ONNX prescribes by example.
fn probit(x: f64) -> f64 {
    let y = x * 2.0 - 1.0;
    let sign = if y < 0.0 { -1.0 } else { 1.0 };
    // Infinite at 0 and 1, not-a-number for what is no probability.
    let log = ((1.0 - y) * (1.0 + y)).ln();
    let a = 2.0 / (std::f64::consts::PI * 0.147) + 0.5 * log;
    let root = (-a + (a * a - log / 0.147).sqrt()).sqrt();
    std::f64::consts::SQRT_2 * sign * root
}

/// Applies the last step to one row of scores. A single score is changed by none but the probit step, as
/// onnxruntime has it.
fn transform<T: Real>(kind: PostTransform, row: &mut [T]) {
    if row.len() == 1 && kind != PostTransform::Probit {
        return;
    }
    match kind {
        PostTransform::None => {}
        PostTransform::Logistic => row.iter_mut().for_each(|v| *v = T::from_f64(logistic(v.to_f64()))),
        PostTransform::Probit => row.iter_mut().for_each(|v| *v = T::from_f64(probit(v.to_f64()))),
        PostTransform::Softmax | PostTransform::SoftmaxZero => {
            let largest = row.iter().map(|v| v.to_f64()).fold(f64::NEG_INFINITY, f64::max);
            let weight = |v: f64| {
                if kind == PostTransform::SoftmaxZero && v.abs() <= 1e-7 {
                    // Zeros stay (almost) zero.
                    v * (-largest).exp()
                } else {
                    (v - largest).exp()
                }
            };
            let total: f64 = row.iter().map(|v| weight(v.to_f64())).sum();
            for v in row.iter_mut() {
                *v = T::from_f64(if total == 0.0 { 0.5 } else { weight(v.to_f64()) / total });
            }
        }
    }
}

/// `coefficients · x + intercepts` for one row.
fn linear_scores(
    x: &TensorView,
    row: usize,
    columns: usize,
    coefficients: &[f32],
    intercepts: &[f32],
    out: &mut [f32],
) -> Result<(), OpError> {
    for (j, out) in out.iter_mut().enumerate() {
        let mut sum = f64::from(intercepts.get(j).copied().unwrap_or(0.0));
        for (column, &c) in coefficients[j * columns..][..columns].iter().enumerate() {
            sum += f64::from(c) * number_at(x, row * columns + column)?;
        }
        *out = sum as f32;
    }
    Ok(())
}

fn similarity(
    kernel: SvmKernel,
    x: &TensorView,
    row: usize,
    columns: usize,
    support: &[f32],
) -> Result<f64, OpError> {
    let mut sum = 0.0;
    for (column, &s) in support.iter().enumerate() {
        let (a, b) = (number_at(x, row * columns + column)?, f64::from(s));
        sum += if matches!(kernel, SvmKernel::Rbf { .. }) { (a - b) * (a - b) } else { a * b };
    }
    Ok(match kernel {
        SvmKernel::Linear => sum,
        SvmKernel::Poly { gamma, coef0, degree } => {
            (f64::from(gamma) * sum + f64::from(coef0)).powf(degree.into())
        }
        SvmKernel::Rbf { gamma } => (-f64::from(gamma) * sum).exp(),
        SvmKernel::Sigmoid { gamma, coef0 } => (f64::from(gamma) * sum + f64::from(coef0)).tanh(),
    })
}

/// What a classifier decides for one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// The label with this index.
    Index(usize),
    /// The only label there is.
    Positive,
    /// Not the only label there is.
    Negative,
}

fn label_count(labels: &Labels) -> usize {
    match labels {
        Labels::Ints(l) => l.len(),
        Labels::Strings(l) => l.len(),
    }
}

fn classifier_labels(op: &MlOp) -> Option<&Labels> {
    match op {
        MlOp::LinearClassifier { labels, .. }
        | MlOp::SvmClassifier { labels, .. }
        | MlOp::TreeEnsembleClassifier { labels, .. } => Some(labels),
        _ => None,
    }
}

/// Columns of a classifier's scores.
fn score_columns(op: &MlOp, columns: usize) -> usize {
    match op {
        MlOp::LinearClassifier { coefficients, labels, .. } => {
            let classes = coefficients.len() / columns.max(1);
            if classes == 1 && label_count(labels) == 2 { 2 } else { classes }
        }
        MlOp::SvmClassifier { labels, prob_a, support_vectors, .. } => {
            let classes = label_count(labels).max(1);
            let raw = if prob_a.is_empty() && !support_vectors.is_empty() {
                classes * (classes - 1) / 2
            } else {
                classes
            };
            if raw == 1 && classes == 2 { 2 } else { raw }
        }
        MlOp::TreeEnsembleClassifier { labels, binary_single_weight, .. } => {
            if *binary_single_weight {
                2
            } else {
                label_count(labels)
            }
        }
        _ => 0,
    }
}

fn argmax(values: impl Iterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (i, v) in values.enumerate() {
        if v > best.1 {
            best = (i, v);
        }
    }
    best.0
}

/// How one score becomes the scores of two classes: a score is completed to one (`complement`) or to zero, and no
/// step but the logistic and the probit one applies, as onnxruntime has it.
fn two_scores(score: f64, complement: bool, kind: PostTransform) -> [f32; 2] {
    let pair = match kind {
        PostTransform::Logistic => [logistic(-score), logistic(score)],
        PostTransform::Probit => [1.0 - probit(score), probit(score)],
        _ if complement => [1.0 - score, score],
        _ => [-score, score],
    };
    pair.map(|p| p as f32)
}

/// Scores `[rows, columns]` (if wanted) and decisions of a classifier.
fn classify(
    op: &MlOp,
    x: &TensorView,
    mut scores: Option<&mut [f32]>,
    pool: &ThreadPool,
    mut decide: impl FnMut(usize, Class),
) -> Result<(), OpError> {
    let (rows, columns) = table(x)?;
    let width = score_columns(op, columns);
    if let Some(scores) = &scores
        && scores.len() != rows * width
    {
        return invalid(format!("{} scores for {rows} rows of {width}", scores.len()));
    }
    let mut store = |row: usize, values: &[f32]| {
        if let Some(scores) = scores.as_deref_mut() {
            scores[row * width..][..width].copy_from_slice(values);
        }
    };
    match op {
        MlOp::LinearClassifier { coefficients, intercepts, labels, post_transform } => {
            let classes = coefficients.len().checked_div(columns).unwrap_or(0);
            expect_count(&[coefficients.len()], classes * columns, "the coefficients")?;
            let mut raw = vec![0f32; classes];
            for row in 0..rows {
                linear_scores(x, row, columns, coefficients, intercepts, &mut raw)?;
                if classes == 1 {
                    let score = f64::from(raw[0]);
                    if label_count(labels) == 2 {
                        decide(row, Class::Index(usize::from(score > 0.0)));
                        store(row, &two_scores(score, true, *post_transform));
                    } else {
                        transform(*post_transform, &mut raw);
                        let threshold = if *post_transform == PostTransform::None { 0.0 } else { 0.5 };
                        decide(row, if raw[0] >= threshold { Class::Positive } else { Class::Negative });
                        store(row, &raw);
                    }
                } else {
                    decide(row, Class::Index(argmax(raw.iter().map(|&v| v.into()))));
                    transform(*post_transform, &mut raw);
                    store(row, &raw);
                }
            }
            Ok(())
        }
        MlOp::TreeEnsembleClassifier { trees, labels, binary_single_weight } => classify_trees(
            trees,
            label_count(labels),
            *binary_single_weight,
            x,
            columns,
            rows,
            pool,
            decide,
            store,
        ),
        MlOp::SvmClassifier { .. } => classify_svm(op, x, rows, columns, decide, store),
        _ => invalid("not a classifier"),
    }
}

#[allow(clippy::too_many_arguments)]
fn classify_trees(
    trees: &TreeEnsemble,
    labels: usize,
    binary_single_weight: bool,
    x: &TensorView,
    columns: usize,
    rows: usize,
    pool: &ThreadPool,
    mut decide: impl FnMut(usize, Class),
    mut store: impl FnMut(usize, &[f32]),
) -> Result<(), OpError> {
    if trees.targets != labels && !(binary_single_weight && trees.targets <= 2) {
        return invalid(format!("trees with {} targets for {labels} classes", trees.targets));
    }
    let all_positive = trees.weights.iter().all(|&(_, w)| w >= 0.0);
    let width = trees.targets;
    // Classes that no leaf talks of are never chosen, unless they have a base value of their own.
    let mut scored = vec![trees.base_values.len() == width; width];
    for &(target, _) in &trees.weights {
        if let Some(scored) = scored.get_mut(target as usize) {
            *scored = true;
        }
    }
    let shared_base = if trees.base_values.len() == 1 { trees.base_values[0] } else { 0.0 };
    // A block of rows at a time, so that nothing as large as the table is needed beside it.
    const BLOCK: usize = 256;
    let mut block = vec![0f32; BLOCK.min(rows.max(1)) * width];
    for first in (0..rows).step_by(BLOCK) {
        let n = BLOCK.min(rows - first);
        let raw = &mut block[..n * width];
        with_feature!(x.dtype, X => {
            trees::evaluate(pool, trees, columns, &x.as_slice::<X>()[first * columns..(first + n) * columns], raw)
        })?;
        for (i, raw) in raw.chunks_exact_mut(width.max(1)).enumerate() {
            let row = first + i;
            if binary_single_weight {
                // As onnxruntime has it: weights of the first class are those of the second one, whose complement
                // the first then is; weights of the second class leave the first one at zero.
                let second = width == 2 && trees.weights.first().is_some_and(|&(target, _)| target == 1);
                let score = if second { f64::from(raw[1]) - shared_base } else { f64::from(raw[0]) };
                let hit = score > if all_positive { 0.5 } else { 0.0 };
                decide(
                    row,
                    if labels < 2 {
                        if hit { Class::Positive } else { Class::Negative }
                    } else {
                        Class::Index(usize::from(hit))
                    },
                );
                if second {
                    (raw[0], raw[1]) = (0.0, score as f32);
                    transform(trees.post_transform, raw);
                    store(row, raw);
                } else {
                    store(row, &two_scores(score, all_positive, trees.post_transform));
                }
            } else {
                let candidates =
                    raw.iter().zip(&scored).map(|(&v, &s)| if s { v.into() } else { f64::NEG_INFINITY });
                decide(row, Class::Index(argmax(candidates)));
                transform(trees.post_transform, raw);
                store(row, raw);
            }
        }
    }
    Ok(())
}

fn classify_svm(
    op: &MlOp,
    x: &TensorView,
    rows: usize,
    columns: usize,
    mut decide: impl FnMut(usize, Class),
    mut store: impl FnMut(usize, &[f32]),
) -> Result<(), OpError> {
    let MlOp::SvmClassifier {
        kernel,
        support_vectors,
        vectors_per_class,
        coefficients,
        rho,
        prob_a,
        prob_b,
        labels,
        post_transform,
    } = op
    else {
        return invalid("not a support vector machine");
    };
    let classes = label_count(labels).max(1);
    let all_positive = coefficients.iter().all(|&c| c >= 0.0);
    let vectors: usize = vectors_per_class.iter().sum();
    let pairs = classes * (classes - 1) / 2;
    let linear = vectors == 0;
    if linear {
        expect_count(&[coefficients.len()], classes * columns, "the coefficients")?;
    } else {
        expect_count(&[support_vectors.len()], vectors * columns, "the support vectors")?;
        expect_count(&[coefficients.len()], (classes - 1) * vectors, "the coefficients")?;
        if vectors_per_class.len() != classes || rho.len() < pairs {
            return invalid(format!(
                "{} offsets and {} counts for {classes} classes",
                rho.len(),
                vectors_per_class.len()
            ));
        }
    }
    let probabilities = !prob_a.is_empty() && !linear;
    if probabilities && (prob_a.len() < pairs || prob_b.len() < pairs) {
        return invalid(format!("{} probability fits for {pairs} pairs of classes", prob_a.len()));
    }
    let starts: Vec<usize> =
        vectors_per_class.iter().scan(0, |at, &n| Some(std::mem::replace(at, *at + n))).collect();
    let mut similarities = vec![0f64; vectors];
    let mut votes = vec![0usize; classes];
    let mut scores: Vec<f64> = Vec::new();
    for row in 0..rows {
        scores.clear();
        votes.fill(0);
        if linear {
            for class in coefficients.chunks_exact(columns.max(1)) {
                let offset = f64::from(rho.first().copied().unwrap_or(0.0));
                scores.push(offset + similarity(SvmKernel::Linear, x, row, columns, class)?);
            }
        } else {
            for (s, support) in similarities.iter_mut().zip(support_vectors.chunks_exact(columns.max(1))) {
                *s = similarity(*kernel, x, row, columns, support)?;
            }
            let part = |list: usize, class: usize| -> f64 {
                (starts[class]..starts[class] + vectors_per_class[class])
                    .map(|v| f64::from(coefficients[list * vectors + v]) * similarities[v])
                    .sum()
            };
            for i in 0..classes {
                for j in i + 1..classes {
                    let score = f64::from(rho[scores.len()]) + part(j - 1, i) + part(i, j);
                    votes[if score > 0.0 { i } else { j }] += 1;
                    scores.push(score);
                }
            }
        }
        let best =
            if linear { argmax(scores.iter().copied()) } else { argmax(votes.iter().map(|&v| v as f64)) };
        let largest = if linear { scores[best] } else { votes[best] as f64 };
        if probabilities {
            scores = pairwise_probabilities(classes, &scores, prob_a, prob_b);
        }
        let single = rho.len() == 1;
        let class = match (single, classes) {
            (true, 2) if !probabilities && all_positive && largest >= 0.5 => Class::Index(1),
            (true, 1) if largest > 0.0 => Class::Positive,
            (true, 1) => Class::Negative,
            _ => Class::Index(best),
        };
        decide(row, class);
        if scores.len() == 1 && classes == 2 {
            // As onnxruntime has it, which completes raw scores to zero and those with a last step to one.
            store(row, &two_scores(scores[0], *post_transform != PostTransform::None, *post_transform));
        } else {
            let mut row_scores: Vec<f32> = scores.iter().map(|&s| s as f32).collect();
            transform(*post_transform, &mut row_scores);
            store(row, &row_scores);
        }
    }
    Ok(())
}

/// Class probabilities from those of each pair (Wu, Lin and Weng, "Probability estimates for multi-class
/// classification by pairwise coupling", 2004, second method).
fn pairwise_probabilities(classes: usize, scores: &[f64], a: &[f32], b: &[f32]) -> Vec<f64> {
    let k = classes;
    let mut r = vec![0f64; k * k];
    let mut index = 0;
    for i in 0..k {
        for j in i + 1..k {
            let p = 1.0 - logistic(scores[index] * f64::from(a[index]) + f64::from(b[index]));
            let p = p.clamp(1e-7, 1.0 - 1e-7);
            r[i * k + j] = p;
            r[j * k + i] = 1.0 - p;
            index += 1;
        }
    }
    let mut q = vec![0f64; k * k];
    for t in 0..k {
        for j in (0..k).filter(|&j| j != t) {
            q[t * k + t] += r[j * k + t] * r[j * k + t];
            q[t * k + j] = -r[j * k + t] * r[t * k + j];
        }
    }
    let mut p = vec![1.0 / k as f64; k];
    let mut qp = vec![0f64; k];
    let limit = 0.005 / k as f64;
    for _ in 0..100.max(k) {
        let mut pqp = 0.0;
        for t in 0..k {
            qp[t] = (0..k).map(|j| q[t * k + j] * p[j]).sum();
            pqp += p[t] * qp[t];
        }
        if qp.iter().all(|v| (v - pqp).abs() < limit) {
            break;
        }
        for t in 0..k {
            let step = (pqp - qp[t]) / q[t * k + t];
            p[t] += step;
            pqp = (pqp + step * (step * q[t * k + t] + 2.0 * qp[t])) / (1.0 + step) / (1.0 + step);
            for j in 0..k {
                qp[j] = (qp[j] + step * q[t * k + j]) / (1.0 + step);
                p[j] /= 1.0 + step;
            }
        }
    }
    p
}

/// Dispatch of the operators that take or yield text or maps; numbers take the other road.
pub(super) fn compute_dynamic(
    op: &MlOp,
    inputs: &[Option<&RuntimeValue>],
    outputs_wanted: &[bool],
    context: &OpContext,
) -> Result<Vec<Option<RuntimeValue>>, OpError> {
    let one = |value: RuntimeValue| Ok(vec![Some(value)]);
    let strings = |dims: &[usize], values: Vec<String>| super::heap::strings(context, dims, values);
    match op {
        MlOp::ZipMap { labels } => {
            let scores = tensor_input(inputs, 0, "the scores")?;
            let view = as_view(scores);
            let (rows, columns) = table(&view)?;
            if columns != label_count(labels) {
                return invalid(format!("{columns} scores for {} labels", label_count(labels)));
            }
            let keys = match labels {
                Labels::Ints(l) => Tensor::from_slice(&[l.len()], l),
                Labels::Strings(l) => strings(&[l.len()], l.clone())?,
            };
            let mut maps = Vec::with_capacity(rows);
            for row in 0..rows {
                let mut values = allocate(context, DType::F32, &[columns])?;
                for (j, v) in values.as_mut_slice::<f32>().iter_mut().enumerate() {
                    *v = number_at(&view, row * columns + j)? as f32;
                }
                maps.push(RuntimeValue::Map(keys.clone(), values));
            }
            one(RuntimeValue::Sequence(ValueType::Map { key: keys.dtype(), value: DType::F32 }, maps))
        }
        MlOp::DictVectorizer { vocabulary } => {
            let Some(Some(RuntimeValue::Map(keys, values))) = inputs.first() else {
                return invalid("operand 0 is not a map");
            };
            let mut out = allocate(context, values.dtype(), &[1, label_count(vocabulary)])?;
            let mut put = |column: usize, at: Option<usize>| -> Result<(), OpError> {
                let Some(at) = at else { return Ok(()) };
                if values.dtype() == DType::String {
                    out.as_mut_strings()[column].clone_from(&values.as_strings()[at]);
                    return Ok(());
                }
                store_number(&mut as_view_mut(&mut out), column, number_at(&as_view(values), at)?)
            };
            match vocabulary {
                Labels::Ints(words) => {
                    let keys = keys.to_i64s().unwrap_or_default();
                    for (column, word) in words.iter().enumerate() {
                        put(column, keys.iter().position(|k| k == word))?;
                    }
                }
                Labels::Strings(words) => {
                    for (column, word) in words.iter().enumerate() {
                        put(column, keys.as_strings().iter().position(|k| k == word))?;
                    }
                }
            }
            one(out.into())
        }
        MlOp::CategoryMapper { ints, strings: names, default_int, default_string } => {
            let x = tensor_input(inputs, 0, "x")?;
            if x.dtype() == DType::String {
                let index: HashMap<&str, i64> =
                    names.iter().map(String::as_str).zip(ints.iter().copied()).collect();
                let mut out = allocate(context, DType::I64, x.dims())?;
                for (out, s) in out.as_mut_slice::<i64>().iter_mut().zip(x.as_strings()) {
                    *out = index.get(s.as_str()).copied().unwrap_or(*default_int);
                }
                return one(out.into());
            }
            let index: HashMap<i64, &String> = ints.iter().copied().zip(names).collect();
            let Some(values) = x.to_i64s() else {
                return invalid("categories that are neither i64 nor text");
            };
            let mapped = values.iter().map(|v| (*index.get(v).unwrap_or(&default_string)).clone()).collect();
            one(strings(x.dims(), mapped)?.into())
        }
        MlOp::LabelEncoder { keys, values, default } => {
            let x = tensor_input(inputs, 0, "x")?;
            one(label_encoder(x, keys, values, default, context)?.into())
        }
        MlOp::OneHotEncoder { categories: Labels::Strings(categories), zeros } => {
            let x = tensor_input(inputs, 0, "x")?;
            let index: HashMap<&str, usize> =
                categories.iter().enumerate().map(|(i, c)| (c.as_str(), i)).collect();
            let mut dims = x.dims().to_vec();
            dims.push(categories.len());
            let mut out = allocate(context, DType::F32, &dims)?;
            for (i, s) in x.as_strings().iter().enumerate() {
                match index.get(s.as_str()) {
                    Some(at) => out.as_mut_slice::<f32>()[i * categories.len() + at] = 1.0,
                    None if *zeros => {}
                    None => return invalid(format!("{s:?} is not among the categories")),
                }
            }
            one(out.into())
        }
        MlOp::ArrayFeatureExtractor => {
            let (x, indices) = (tensor_input(inputs, 0, "x")?, tensor_input(inputs, 1, "the indices")?);
            let columns = x.dims().last().copied().unwrap_or(1);
            let (rows, picked) = (x.len() / columns.max(1), indices.len());
            let mut dims = x.dims()[..x.dims().len().saturating_sub(1)].to_vec();
            if dims.is_empty() {
                dims.push(1);
            }
            dims.push(picked);
            let view = TensorView { dtype: DType::U8, dims: x.dims(), bytes: &[] };
            let at = feature_indices(&view, &as_view(indices), &[rows * picked])?;
            let words = x.as_strings();
            let values =
                (0..rows).flat_map(|r| at.iter().map(move |c| words[r * columns + c].clone())).collect();
            one(strings(&dims, values)?.into())
        }
        _ if classifier_labels(op).is_some() => {
            let x = tensor_input(inputs, 0, "x")?;
            let view = as_view(x);
            let (rows, columns) = table(&view)?;
            let names = match classifier_labels(op) {
                Some(Labels::Strings(names)) => names,
                _ => return unsupported("number labels outside planned tensors"),
            };
            let wants = |i: usize| outputs_wanted.get(i).copied().unwrap_or(false);
            let mut scores = allocate(context, DType::F32, &[rows, score_columns(op, columns)])?;
            let mut labels = vec![String::new(); rows];
            classify(op, &view, Some(scores.as_mut_slice::<f32>()), context.threads, |row, class| {
                let name = match class {
                    Class::Index(i) => names.get(i),
                    Class::Positive => names.first(),
                    Class::Negative => None,
                };
                labels[row] = name.cloned().unwrap_or_default();
            })?;
            let labels = strings(&[rows], labels)?;
            Ok(vec![wants(0).then(|| labels.into()), wants(1).then(|| scores.into())])
        }
        other => unsupported(format!("{other:?} of text").chars().take(80).collect::<String>()),
    }
}

fn label_encoder(
    x: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    default: &Tensor,
    context: &OpContext,
) -> Result<Tensor, OpError> {
    let text_index: HashMap<&str, usize> =
        keys.as_strings().iter().enumerate().map(|(i, k)| (k.as_str(), i)).collect();
    let number_index =
        if keys.dtype() == DType::String { None } else { Some(NumberIndex::new(&as_view(keys))?) };
    if (x.dtype() == DType::String) != number_index.is_none() {
        return invalid(format!("keys of type {} for an operand of type {}", keys.dtype(), x.dtype()));
    }
    let find = |i: usize| -> Result<Option<usize>, OpError> {
        Ok(match &number_index {
            None => text_index.get(x.as_strings()[i].as_str()).copied(),
            Some(index) => index.find(number_at(&as_view(x), i)?),
        })
    };
    if values.dtype() == DType::String {
        let fallback = default.as_strings().first().cloned().unwrap_or_default();
        let mapped = (0..x.len())
            .map(|i| Ok(find(i)?.map_or_else(|| fallback.clone(), |at| values.as_strings()[at].clone())))
            .collect::<Result<_, OpError>>()?;
        return super::heap::strings(context, x.dims(), mapped);
    }
    let mut out = allocate(context, values.dtype(), x.dims())?;
    for i in 0..x.len() {
        let value = match find(i)? {
            Some(at) => number_at(&as_view(values), at)?,
            None => number_at(&as_view(default), 0)?,
        };
        store_number(&mut as_view_mut(&mut out), i, value)?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lightering_graph::{Aggregate, TreeChild};

    /// Labels and scores of a one-leaf-per-tree forest whose leaf gives `weight` to class `class` of two.
    fn stump(class: u32, weight: f64, post_transform: PostTransform) -> (i64, Vec<f32>) {
        let trees = TreeEnsemble {
            roots: vec![TreeChild::Leaf(0)],
            branches: Vec::new(),
            leaves: vec![(0, 1)],
            weights: vec![(class, weight)],
            members: Vec::new(),
            targets: 2,
            aggregate: Aggregate::Sum,
            base_values: Vec::new(),
            post_transform,
        };
        let op = MlOp::TreeEnsembleClassifier {
            trees,
            labels: Labels::Ints(vec![10, 20]),
            binary_single_weight: true,
        };
        let x = [0f32; 1];
        let input = TensorView { dtype: DType::F32, dims: &[1, 1], bytes: bytemuck::cast_slice(&x) };
        let (mut label, mut scores) = ([0i64], [0f32; 2]);
        let mut outputs = [
            Some(TensorViewMut {
                dtype: DType::I64,
                dims: &[1],
                bytes: bytemuck::cast_slice_mut(&mut label),
            }),
            Some(TensorViewMut {
                dtype: DType::F32,
                dims: &[1, 2],
                bytes: bytemuck::cast_slice_mut(&mut scores),
            }),
        ];
        compute(&op, &[Some(input)], &mut outputs, &ThreadPool::new(1)).unwrap();
        (label[0], scores.to_vec())
    }

    #[test]
    fn one_weight_decides_between_two_classes() {
        // Weights that are all positive are probabilities, others lie around zero.
        assert_eq!(stump(0, 0.75, PostTransform::None), (20, vec![0.25, 0.75]));
        assert_eq!(stump(0, 0.25, PostTransform::None), (10, vec![0.75, 0.25]));
        assert_eq!(stump(0, -0.75, PostTransform::None), (10, vec![0.75, -0.75]));
        assert_eq!(stump(1, 0.75, PostTransform::None), (20, vec![0.0, 0.75]));
        let (label, scores) = stump(0, -2.0, PostTransform::Logistic);
        assert_eq!(label, 10);
        assert!((scores[0] + scores[1] - 1.0).abs() < 1e-6 && (scores[1] - 0.119_203).abs() < 1e-5);
    }

    #[test]
    fn last_steps_have_their_known_values() {
        let mut row = [1.0f64, 0.0, -1.0];
        transform(PostTransform::SoftmaxZero, &mut row);
        assert_eq!(row[1], 0.0);
        assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        assert!((probit(0.975) - 1.96).abs() < 0.01 && probit(0.5).abs() < 1e-12);
        assert_eq!(probit(1.0), f64::INFINITY);
    }

    #[test]
    fn probabilities_of_pairs_sum_to_one() {
        let p = pairwise_probabilities(4, &[0.3, -1.0, 2.0, 0.1, 0.7, -0.4], &[-1.0; 6], &[0.2; 6]);
        assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-9 && p.iter().all(|p| *p > 0.0));
    }
}
