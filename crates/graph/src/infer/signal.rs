//! Signals, random numbers, losses, text and pictures.

use super::broadcast::shown;
use super::operands::*;
use crate::{
    DType, Dim, LossAttributes, LossReduction, PixelFormat, RandomAttributes, Shape,
    StringNormalizerAttributes, TfIdfAttributes, ValueType,
};

pub(super) fn random(o: &Operands<'_>, a: &RandomAttributes) -> Rule<Vec<ValueType>> {
    let like = o.optional(0, "like")?;
    let shape = match (&a.dims, &like) {
        (Some(dims), _) => Some(dims.iter().map(|&d| Dim::Fixed(d)).collect()),
        (None, Some(k)) => k.shape.clone(),
        (None, None) => return Err("has neither a shape nor an operand to take it from".to_owned()),
    };
    let dtype = match (a.dtype, &like) {
        (Some(d), _) => Some(d),
        (None, Some(k)) => k.dtype,
        (None, None) => Some(DType::F32),
    };
    if let Some(d) = dtype.filter(|d| !d.is_float()) {
        return Err(format!("the result type is {d}, expected a floating-point type"));
    }
    Ok(vec![typed(dtype, shape)])
}

pub(super) fn bernoulli(o: &Operands<'_>, dtype: Option<DType>) -> Rule<Vec<ValueType>> {
    let p = o.tensor(0, "p")?;
    p.require(Class::Float)?;
    Ok(vec![typed(dtype.or(p.dtype), p.shape)])
}

pub(super) fn multinomial(o: &Operands<'_>, dtype: DType, samples: usize) -> Rule<Vec<ValueType>> {
    let logits = o.tensor(0, "logits")?;
    logits.require(Class::Float)?;
    logits.require_rank(2)?;
    Ok(vec![typed(Some(dtype), Some(vec![logits.dim(0), Dim::Fixed(samples)]))])
}

/// Half of a spectrum: the bins that are not mirror images.
fn onesided_bins(length: &Dim) -> Dim {
    length.fixed().map_or(Dim::UNKNOWN, |n| Dim::Fixed(n / 2 + 1))
}

fn fixed_size(n: Option<i64>, what: &str) -> Rule<Dim> {
    n.map_or(Ok(Dim::UNKNOWN), |n| size_of(n, what).map(Dim::Fixed))
}

pub(super) fn dft(o: &Operands<'_>, inverse: bool, onesided: bool) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require(Class::Float)?;
    x.require_ranks(2, usize::MAX)?;
    let length = o.int(1, "length")?;
    let axis = match o.has(2) {
        true => o.int(2, "axis")?,
        false => Some(-2),
    };
    let Some(s) = &x.shape else { return Ok(vec![typed(x.dtype, None)]) };
    let last = s.len() - 1;
    if let Some(n) = s[last].fixed().filter(|n| *n != 1 && *n != 2) {
        return Err(format!("the last size of x is {n}, expected 1 (real) or 2 (complex)"));
    }
    let mut shape = s.clone();
    // The backward half-spectrum transform yields real numbers.
    shape[last] = Dim::Fixed(if inverse && onesided { 1 } else { 2 });
    match axis {
        None => (0..last).for_each(|i| shape[i] = Dim::UNKNOWN),
        Some(axis) => {
            let axis = axis_of(axis, s.len(), "axis")?;
            if axis == last {
                return Err(format!("axis {axis} is that of real and imaginary parts"));
            }
            let size = match o.has(1) {
                true => fixed_size(length, "length")?,
                false if inverse && onesided => match &s[axis] {
                    Dim::Fixed(n) => times(&Dim::Fixed(n.saturating_sub(1)), 2)?,
                    _ => Dim::UNKNOWN,
                },
                false => s[axis].clone(),
            };
            shape[axis] = if onesided && !inverse { onesided_bins(&size) } else { size };
        }
    }
    Ok(vec![typed(x.dtype, Some(shape))])
}

pub(super) fn stft(o: &Operands<'_>, onesided: bool) -> Rule<Vec<ValueType>> {
    let signal = o.tensor(0, "signal")?;
    signal.require(Class::Float)?;
    signal.require_ranks(2, 3)?;
    let step = o.int(1, "step")?;
    if step.is_some_and(|n| n <= 0) {
        return Err(format!("step is {}, expected at least 1", step.unwrap_or_default()));
    }
    let window = o.optional(2, "window")?;
    if let Some(w) = &window {
        w.require_rank(1)?;
    }
    let frame = match (o.has(3), &window) {
        (true, _) => fixed_size(o.int(3, "length")?, "length")?,
        (false, Some(w)) => w.dim(0),
        (false, None) => return Err("has neither a window nor a frame length".to_owned()),
    };
    let frames = match (signal.dim(1), &frame, step) {
        (Dim::Fixed(n), Dim::Fixed(f), Some(step)) => {
            let room = n
                .checked_sub(*f)
                .ok_or_else(|| format!("a frame of {f} is longer than the signal of {n}"))?;
            Dim::Fixed(room / step as usize + 1)
        }
        _ => Dim::UNKNOWN,
    };
    let bins = if onesided { onesided_bins(&frame) } else { frame };
    Ok(vec![typed(signal.dtype, Some(vec![signal.dim(0), frames, bins, Dim::Fixed(2)]))])
}

pub(super) fn mel_weight_matrix(o: &Operands<'_>, dtype: DType) -> Rule<Vec<ValueType>> {
    let bins = fixed_size(o.int(0, "bins")?, "bins")?;
    let length = fixed_size(o.int(1, "dft_length")?, "dft_length")?;
    (0..5).try_for_each(|i| o.tensor(i, "operand")?.require_single())?;
    Ok(vec![typed(Some(dtype), Some(vec![onesided_bins(&length), bins]))])
}

pub(super) fn window(o: &Operands<'_>, dtype: DType) -> Rule<Vec<ValueType>> {
    o.tensor(0, "size")?.require_single()?;
    let size = fixed_size(o.int(0, "size")?, "size")?;
    Ok(vec![typed(Some(dtype), Some(vec![size]))])
}

/// Scores `[batch, classes, …]` against labels `[batch, …]`.
pub(super) fn loss(o: &Operands<'_>, a: &LossAttributes, with_scores: bool) -> Rule<Vec<ValueType>> {
    let (scores, labels) = (o.tensor(0, "scores")?, o.tensor(1, "labels")?);
    scores.require(Class::Float)?;
    labels.require(Class::Integer)?;
    scores.require_ranks(2, usize::MAX)?;
    let expected: Option<Shape> = scores.shape.as_ref().map(|s| [&s[..1], &s[2..]].concat());
    if let Some(expected) = &expected {
        labels.require_shape(expected)?;
    }
    if let Some(weight) = o.optional(2, "weight")? {
        same_dtype(&[&scores, &weight])?;
        weight.require_shape(&[scores.dim(1)])?;
    }
    let shape = match a.reduction {
        LossReduction::None => expected.or(labels.shape),
        _ => Some(Vec::new()),
    };
    let mut types = vec![typed(scores.dtype, shape)];
    if with_scores {
        types.push(scores.to_type());
    }
    Ok(types)
}

pub(super) fn string_normalizer(o: &Operands<'_>, a: &StringNormalizerAttributes) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require(Class::Text)?;
    x.require_ranks(1, 2)?;
    let shape = match x.shape {
        Some(s) if s.len() == 2 && s[0].fixed().is_some_and(|n| n != 1) => {
            return Err(format!("x has shape {}, expected [n] or [1,n]", shown(&s)));
        }
        Some(mut s) if !a.stopwords.is_empty() => {
            if let Some(last) = s.last_mut() {
                *last = Dim::UNKNOWN;
            }
            Some(s)
        }
        // Nothing left becomes one empty string, so an empty list grows.
        Some(mut s) => {
            if let Some(last) = s.last_mut().filter(|d| **d == Dim::Fixed(0)) {
                *last = Dim::Fixed(1);
            }
            Some(s)
        }
        None => None,
    };
    Ok(vec![typed(Some(DType::String), shape)])
}

pub(super) fn string_split(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require(Class::Text)?;
    let parts = x.shape.clone().map(|mut s| {
        s.push(Dim::UNKNOWN);
        s
    });
    Ok(vec![typed(Some(DType::String), parts), typed(Some(DType::I64), x.shape)])
}

pub(super) fn regex_full_match(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require(Class::Text)?;
    Ok(vec![typed(Some(DType::Bool), x.shape)])
}

pub(super) fn tf_idf(o: &Operands<'_>, a: &TfIdfAttributes) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    if let Some(d) = x.dtype.filter(|d| !matches!(d, DType::String | DType::I32 | DType::I64)) {
        return Err(format!("x has element type {d}, expected string, i32 or i64"));
    }
    x.require_ranks(0, 2)?;
    let columns = match a.ngram_indexes.iter().max() {
        Some(n) => n.checked_add(1).ok_or("an n-gram index is too large")?,
        None => 0,
    };
    let shape = x.shape.map(|s| match s.len() {
        2 => vec![s[0].clone(), Dim::Fixed(columns)],
        _ => vec![Dim::Fixed(columns)],
    });
    Ok(vec![typed(Some(DType::F32), shape)])
}

pub(super) fn image_decode(o: &Operands<'_>, format: PixelFormat) -> Rule<Vec<ValueType>> {
    let bytes = o.tensor(0, "bytes")?;
    bytes.require_rank(1)?;
    if let Some(d) = bytes.dtype.filter(|d| *d != DType::U8) {
        return Err(format!("bytes have element type {d}, expected u8"));
    }
    let channels = if format == PixelFormat::Gray { 1 } else { 3 };
    let shape = vec![Dim::UNKNOWN, Dim::UNKNOWN, Dim::Fixed(channels)];
    Ok(vec![typed(Some(DType::U8), Some(shape))])
}
