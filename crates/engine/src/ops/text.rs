//! Text.

use std::collections::{HashMap, HashSet};

use lightering_graph::{
    DType, Op, PixelFormat, StringNormalizerAttributes, Tensor, TfIdfAttributes, TfIdfMode,
};

use super::heap::{allocate, strings, tensor_input};
use super::operands::*;
use super::{OpContext, OpError, TensorView, TensorViewMut};
use crate::RuntimeValue;

/// Dispatch of this family.
pub(super) fn compute_dynamic(
    op: &Op,
    inputs: &[Option<&RuntimeValue>],
    outputs_wanted: &[bool],
    context: &OpContext,
) -> Result<Vec<Option<RuntimeValue>>, OpError> {
    let x = tensor_input(inputs, 0, "x")?;
    let one = |tensor: Tensor| Ok(vec![Some(tensor.into())]);
    match op {
        Op::StringNormalizer(a) => one(string_normalizer(a, x, context)?),
        Op::StringConcat => one(string_concat(x, tensor_input(inputs, 1, "y")?, context)?),
        Op::StringSplit { delimiter, maxsplit } => {
            let (parts, counts) = string_split(delimiter.as_deref(), *maxsplit, x, context)?;
            let wants = |i: usize| outputs_wanted.get(i).copied().unwrap_or(false);
            Ok(vec![wants(0).then(|| parts.into()), wants(1).then(|| counts.into())])
        }
        Op::RegexFullMatch { pattern } => {
            let regex = regex::RegexBuilder::new(&format!(r"\A(?:{pattern})\z"))
                .size_limit(1 << 22)
                .build()
                .map_err(|e| OpError::Invalid(format!("pattern {pattern:?}: {e}")))?;
            let mut out = allocate(context, DType::Bool, x.dims())?;
            for (out, s) in out.as_bytes_mut().iter_mut().zip(x.as_strings()) {
                *out = u8::from(regex.is_match(s));
            }
            one(out)
        }
        Op::TfIdfVectorizer(a) => {
            let (rows, items) = rows_and_items(x.dims())?;
            let columns = tf_idf_columns(a);
            let dims = if x.dims().len() == 2 { vec![rows, columns] } else { vec![columns] };
            let mut out = allocate(context, DType::F32, &dims)?;
            let words = x.as_strings();
            tf_idf(a, rows, items, |i| Gram::Word(&words[i]), out.as_mut_slice::<f32>())?;
            one(out)
        }
        Op::ImageDecode { format } => image_decode(*format, x, context),
        _ => Err(super::no_kernel(op)),
    }
}

/// TF-IDF of numbers.
pub(super) fn compute(
    op: &Op,
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
) -> Result<(), OpError> {
    let Op::TfIdfVectorizer(a) = op else { return Err(super::no_kernel(op)) };
    let Some(Some(out)) = outputs.first_mut() else { return Ok(()) };
    let x = required(inputs, 0, "x")?;
    let (rows, items) = rows_and_items(x.dims)?;
    expect_count(out.dims, rows * tf_idf_columns(a), "the result")?;
    if !x.dtype.is_integer() {
        return unsupported(format!("n-grams of element type {}", x.dtype));
    }
    // Integers of any width were checked above.
    tf_idf(a, rows, items, |i| Gram::Number(integer_at(&x, i).unwrap_or(i64::MIN)), out.as_mut_slice::<f32>())
}

fn image_decode(
    format: PixelFormat,
    bytes: &Tensor,
    context: &OpContext,
) -> Result<Vec<Option<RuntimeValue>>, OpError> {
    let Some(decoder) = context.images else {
        return unsupported("decoding pictures, as no decoder was given to the engine");
    };
    if bytes.dtype() != DType::U8 {
        return invalid(format!("a picture file of element type {}", bytes.dtype()));
    }
    let picture = decoder.decode(bytes.as_bytes(), format, context.memory)?;
    Ok(vec![Some(picture.into())])
}

fn string_normalizer(
    a: &StringNormalizerAttributes,
    x: &Tensor,
    context: &OpContext,
) -> Result<Tensor, OpError> {
    let columns = match *x.dims() {
        [n] => n,
        [1, n] => n,
        _ => return invalid(format!("text of shape {:?}, expected [n] or [1, n]", x.dims())),
    };
    let folded = |s: &str| match a.upper {
        Some(true) => s.to_uppercase(),
        _ => s.to_lowercase(),
    };
    let stop: HashSet<String> =
        a.stopwords.iter().map(|w| if a.case_sensitive { w.clone() } else { folded(w) }).collect();
    let is_stop = |s: &str| {
        !stop.is_empty() && if a.case_sensitive { stop.contains(s) } else { stop.contains(&folded(s)) }
    };
    let cased = |s: &String| match a.upper {
        Some(true) => s.to_uppercase(),
        Some(false) => s.to_lowercase(),
        None => s.clone(),
    };
    let mut kept: Vec<String> = x.as_strings()[..columns].iter().filter(|s| !is_stop(s)).map(cased).collect();
    if kept.is_empty() {
        kept.push(String::new());
    }
    let dims = if x.dims().len() == 2 { vec![1, kept.len()] } else { vec![kept.len()] };
    strings(context, &dims, kept)
}

fn string_concat(a: &Tensor, b: &Tensor, context: &OpContext) -> Result<Tensor, OpError> {
    let rank = a.dims().len().max(b.dims().len());
    let size = |d: &[usize], i: usize| if i + d.len() < rank { 1 } else { d[i + d.len() - rank] };
    let mut dims = Vec::with_capacity(rank);
    for i in 0..rank {
        let (x, y) = (size(a.dims(), i), size(b.dims(), i));
        if x != y && x != 1 && y != 1 {
            return invalid(format!("text of shapes {:?} and {:?} does not broadcast", a.dims(), b.dims()));
        }
        dims.push(if x == 1 { y } else { x });
    }
    let source = |d: &[usize], mut index: usize| {
        let (mut at, mut stride) = (0, 1);
        for i in (0..rank).rev() {
            let n = size(d, i);
            at += if n == 1 { 0 } else { index % dims[i] * stride };
            stride *= n;
            index /= dims[i];
        }
        at
    };
    let (left, right) = (a.as_strings(), b.as_strings());
    let joined = (0..count(&dims))
        .map(|i| format!("{}{}", left[source(a.dims(), i)], right[source(b.dims(), i)]))
        .collect();
    strings(context, &dims, joined)
}

fn string_split(
    delimiter: Option<&str>,
    maxsplit: Option<i64>,
    x: &Tensor,
    context: &OpContext,
) -> Result<(Tensor, Tensor), OpError> {
    let limit = maxsplit.and_then(|m| usize::try_from(m).ok());
    let split = |s: &str| -> Vec<String> {
        match delimiter.filter(|d| !d.is_empty()) {
            Some(d) => match limit {
                Some(n) => s.splitn(n + 1, d).map(str::to_owned).collect(),
                None => s.split(d).map(str::to_owned).collect(),
            },
            None => {
                let (mut parts, mut rest) = (Vec::new(), s.trim_start());
                while !rest.is_empty() {
                    if limit.is_some_and(|n| parts.len() >= n) {
                        parts.push(rest.to_owned());
                        break;
                    }
                    let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
                    parts.push(rest[..end].to_owned());
                    rest = rest[end..].trim_start();
                }
                parts
            }
        }
    };
    let split: Vec<Vec<String>> = x.as_strings().iter().map(|s| split(s)).collect();
    let widest = split.iter().map(Vec::len).max().unwrap_or(0);
    let mut counts = allocate(context, DType::I64, x.dims())?;
    for (count, parts) in counts.as_mut_slice::<i64>().iter_mut().zip(&split) {
        *count = parts.len() as i64;
    }
    let mut dims = x.dims().to_vec();
    dims.push(widest);
    // Every row is padded to the widest one, which the pool must allow before it is made.
    super::heap::ask(context, count(&dims).saturating_mul(size_of::<String>()))?;
    let padded = split
        .into_iter()
        .flat_map(|mut parts| {
            parts.resize(widest, String::new());
            parts
        })
        .collect();
    Ok((strings(context, &dims, padded)?, counts))
}

fn rows_and_items(dims: &[usize]) -> Result<(usize, usize), OpError> {
    match *dims {
        [] => Ok((1, 1)),
        [n] => Ok((1, n)),
        [rows, n] => Ok((rows, n)),
        _ => invalid(format!("items of shape {dims:?}, expected at most 2 dimensions")),
    }
}

/// Columns of the result.
fn tf_idf_columns(a: &TfIdfAttributes) -> usize {
    a.ngram_indexes.iter().max().map_or(0, |m| m + 1)
}

/// An item of an n-gram.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Gram<'a> {
    Number(i64),
    Word(&'a str),
}

/// Counts n-grams, skipping up to `max_skip_count` items between two of one, and weighs the counts.
fn tf_idf<'a>(
    a: &'a TfIdfAttributes,
    rows: usize,
    items: usize,
    item: impl Fn(usize) -> Gram<'a>,
    out: &mut [f32],
) -> Result<(), OpError> {
    let columns = tf_idf_columns(a);
    let pool: Vec<Gram> = match &a.pool {
        Some(t) if t.dtype() == DType::String => t.as_strings().iter().map(|s| Gram::Word(s)).collect(),
        Some(t) => t.to_i64s().unwrap_or_default().into_iter().map(Gram::Number).collect(),
        None => Vec::new(),
    };
    let mut grams: HashMap<&[Gram], usize> = HashMap::new();
    let mut id = 0;
    for (i, &first) in a.ngram_counts.iter().enumerate() {
        let size = i + 1;
        let end = a.ngram_counts.get(i + 1).copied().unwrap_or(pool.len());
        let Some(part) = pool.get(first..end) else {
            return invalid(format!("n-grams {first}..{end} of a pool of {}", pool.len()));
        };
        for gram in part.chunks_exact(size) {
            let Some(&column) = a.ngram_indexes.get(id) else {
                return invalid(format!("n-gram {id} has no column"));
            };
            id += 1;
            if (a.min_gram_length..=a.max_gram_length).contains(&size) {
                grams.insert(gram, column);
            }
        }
    }
    out.fill(0.0);
    let mut window: Vec<Gram> = Vec::new();
    for row in 0..rows {
        let out = &mut out[row * columns..][..columns];
        for skip in 1..=a.max_skip_count.saturating_add(1).min(items) {
            for size in a.min_gram_length.max(1)..=a.max_gram_length {
                // Single items have nothing to skip and count once.
                if size == 1 && skip > 1 {
                    continue;
                }
                let Some(reach) = (size - 1).checked_mul(skip).filter(|&r| r < items) else { break };
                for start in 0..items - reach {
                    window.clear();
                    window.extend((0..size).map(|i| item(row * items + start + i * skip)));
                    if let Some(&column) = grams.get(window.as_slice()) {
                        out[column] += 1.0;
                    }
                }
            }
        }
        for (column, value) in out.iter_mut().enumerate() {
            let weight = a.weights.get(column).copied().unwrap_or(1.0);
            match a.mode {
                TfIdfMode::Tf => {}
                TfIdfMode::Idf => *value = if *value > 0.0 { weight } else { 0.0 },
                TfIdfMode::TfIdf => *value *= weight,
            }
        }
    }
    Ok(())
}
