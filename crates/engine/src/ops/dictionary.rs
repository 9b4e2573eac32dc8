//! Text in operators that only move or compare elements: each text is replaced by its rank among all texts of the
//! operands, the operator runs on the ranks, and ranks in the results turn back into texts.

use std::collections::BTreeSet;

use lightering_graph::{BinaryOp, DType, Op, Tensor};

use super::{OpContext, OpError};
use crate::RuntimeValue;
use crate::interpreter::execute_op;

/// Whether an operator treats text like any other elements.
pub(super) fn handles(op: &Op) -> bool {
    matches!(
        op,
        Op::Binary(BinaryOp::Equal)
            | Op::Where
            | Op::Reshape { .. }
            | Op::Flatten { .. }
            | Op::Squeeze
            | Op::Unsqueeze
            | Op::Transpose { .. }
            | Op::Expand
            | Op::Tile
            | Op::Concat { .. }
            | Op::Split { .. }
            | Op::Slice
            | Op::Pad { .. }
            | Op::Gather { .. }
            | Op::GatherElements { .. }
            | Op::GatherNd { .. }
            | Op::ScatterElements { .. }
            | Op::ScatterNd { .. }
            | Op::TensorScatter { .. }
            | Op::DepthToSpace { .. }
            | Op::SpaceToDepth { .. }
            | Op::CenterCropPad { .. }
            | Op::ReverseSequence { .. }
            | Op::Trilu { .. }
            | Op::OneHot { .. }
            | Op::ConstantOfShape { .. }
            | Op::Shape { .. }
            | Op::Size
            | Op::NonZero
            | Op::Compress { .. }
            | Op::Unique { .. }
    )
}

/// Computes such an operator.
pub(super) fn compute(
    op: &Op,
    inputs: &[Option<&RuntimeValue>],
    outputs_wanted: &[bool],
    context: &OpContext,
) -> Result<Vec<Option<RuntimeValue>>, OpError> {
    // The empty text is always there and comes first, because it is what zeros turn into.
    let mut texts: BTreeSet<&str> = BTreeSet::from([""]);
    let strings = |v: &RuntimeValue| matches!(v, RuntimeValue::Tensor(t) if t.dtype() == DType::String);
    let tensors: Vec<Option<&Tensor>> = inputs
        .iter()
        .map(|v| match v {
            None => Ok(None),
            Some(RuntimeValue::Tensor(t)) => Ok(Some(t)),
            Some(_) => {
                Err(OpError::Invalid("expected tensors, found a sequence, optional or map".to_owned()))
            }
        })
        .collect::<Result<_, _>>()?;
    for t in tensors.iter().flatten() {
        texts.extend(t.as_strings().iter().map(String::as_str));
    }
    let texts: Vec<&str> = texts.into_iter().collect();
    let rank = |s: &String| texts.binary_search(&s.as_str()).expect("every text was collected") as i64;
    let ranked: Vec<Option<RuntimeValue>> = inputs
        .iter()
        .zip(&tensors)
        .map(|(v, t)| {
            let t = (*t)?;
            Some(if strings((*v)?) {
                let ranks: Vec<i64> = t.as_strings().iter().map(rank).collect();
                Tensor::from_slice(t.dims(), &ranks).into()
            } else {
                t.clone().into()
            })
        })
        .collect();
    let ranked: Vec<Option<&RuntimeValue>> = ranked.iter().map(Option::as_ref).collect();
    let results = execute_op(op, &ranked, outputs_wanted, context)?;
    let keeps_numbers = matches!(op, Op::Binary(_) | Op::Shape { .. } | Op::Size | Op::NonZero);
    results
        .into_iter()
        .enumerate()
        .map(|(i, result)| {
            // Only the first result of `Unique` holds elements of the operand.
            let numbers = keeps_numbers || (i > 0 && matches!(op, Op::Unique { .. }));
            match result {
                Some(RuntimeValue::Tensor(t)) if !numbers && t.dtype() == DType::I64 => {
                    let back = |&r: &i64| {
                        usize::try_from(r)
                            .ok()
                            .and_then(|r| texts.get(r))
                            .map(|s| (*s).to_owned())
                            .ok_or_else(|| {
                                OpError::Unsupported(format!("{} of text with a reduction", op.name()))
                            })
                    };
                    let strings: Vec<String> =
                        t.as_slice::<i64>().iter().map(back).collect::<Result<_, _>>()?;
                    Ok(Some(Tensor::from_strings(t.dims(), strings).into()))
                }
                other => Ok(other),
            }
        })
        .collect()
}

/// Converts between text and numbers.
pub(super) fn cast(
    to: DType,
    saturate: bool,
    inputs: &[Option<&RuntimeValue>],
    context: &OpContext,
) -> Result<Vec<Option<RuntimeValue>>, OpError> {
    let Some(Some(RuntimeValue::Tensor(x))) = inputs.first() else {
        return Err(OpError::Invalid("Cast: expected a tensor".to_owned()));
    };
    let y = match (x.dtype(), to) {
        (DType::String, DType::String) => x.clone(),
        (DType::String, _) => from_text(x, to, saturate, context)?,
        (_, _) => Tensor::from_strings(x.dims(), to_text(x)?),
    };
    Ok(vec![Some(y.into())])
}

fn from_text(x: &Tensor, to: DType, saturate: bool, context: &OpContext) -> Result<Tensor, OpError> {
    let wrong = |s: &str| OpError::Invalid(format!("Cast: {s:?} is no {to}"));
    let integer =
        matches!(to, DType::I64 | DType::I32 | DType::I16 | DType::I8 | DType::U32 | DType::U16 | DType::U8);
    let parsed = if integer && x.as_strings().iter().all(|s| s.trim().parse::<i64>().is_ok()) {
        let values: Vec<i64> = x.as_strings().iter().filter_map(|s| s.trim().parse().ok()).collect();
        Tensor::from_slice(x.dims(), &values)
    } else if to == DType::U64 && x.as_strings().iter().all(|s| s.trim().parse::<u64>().is_ok()) {
        let values: Vec<u64> = x.as_strings().iter().filter_map(|s| s.trim().parse().ok()).collect();
        Tensor::from_slice(x.dims(), &values)
    } else {
        let number = |s: &String| s.trim().parse::<f64>().map_err(|_| wrong(s));
        let values: Vec<f64> = x.as_strings().iter().map(number).collect::<Result<_, _>>()?;
        Tensor::from_slice(x.dims(), &values)
    };
    if parsed.dtype() == to {
        return Ok(parsed);
    }
    let op = Op::Cast { to, saturate };
    match execute_op(&op, &[Some(&parsed.into())], &[true], context)?.into_iter().next().flatten() {
        Some(RuntimeValue::Tensor(t)) => Ok(t),
        _ => Err(OpError::Unsupported(format!("Cast from text to {to}"))),
    }
}

fn to_text(x: &Tensor) -> Result<Vec<String>, OpError> {
    Ok(match x.dtype() {
        DType::F32 => {
            x.as_slice::<f32>().iter().map(|v| float_text(f64::from(*v), &format!("{v:e}"))).collect()
        }
        DType::F64 => x.as_slice::<f64>().iter().map(|v| float_text(*v, &format!("{v:e}"))).collect(),
        DType::F16 => x
            .as_slice::<half::f16>()
            .iter()
            .map(|v| {
                float_text(f64::from(*v), &half_digits(f64::from(*v), |t| half::f16::from_f64(t).into()))
            })
            .collect(),
        DType::BF16 => x
            .as_slice::<half::bf16>()
            .iter()
            .map(|v| {
                float_text(f64::from(*v), &half_digits(f64::from(*v), |t| half::bf16::from_f64(t).into()))
            })
            .collect(),
        DType::Bool => {
            x.as_slice::<u8>().iter().map(|v| if *v == 0 { "False" } else { "True" }.to_owned()).collect()
        }
        DType::U64 => x.as_slice::<u64>().iter().map(u64::to_string).collect(),
        other => x
            .to_i64s()
            .ok_or_else(|| OpError::Unsupported(format!("Cast from {other} to text")))?
            .iter()
            .map(i64::to_string)
            .collect(),
    })
}

/// Fewest digits, in `1.5e2` form, that round back to the value.
fn half_digits(v: f64, round: impl Fn(f64) -> f64) -> String {
    (0..8)
        .map(|digits| format!("{v:.digits$e}"))
        .find(|text| text.parse::<f64>().is_ok_and(|t| round(t) == v))
        .unwrap_or_else(|| format!("{v:e}"))
}

/// The way NumPy writes a float, from its shortest digits in the form `1.5e2`.
fn float_text(v: f64, shortest: &str) -> String {
    if v.is_nan() {
        return "nan".to_owned();
    }
    if v.is_infinite() {
        return if v > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let (mantissa, exponent) = shortest.split_once('e').unwrap_or((shortest, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let (sign, mantissa) = mantissa.strip_prefix('-').map_or(("", mantissa), |m| ("-", m));
    let digits: String = mantissa.chars().filter(char::is_ascii_digit).collect();
    if v != 0.0 && !(-4..16).contains(&exponent) {
        let direction = if exponent < 0 { '-' } else { '+' };
        return format!("{sign}{mantissa}e{direction}{:02}", exponent.abs());
    }
    if exponent < 0 {
        return format!("{sign}0.{}{digits}", "0".repeat(exponent.unsigned_abs() as usize - 1));
    }
    let whole = exponent as usize + 1;
    if digits.len() <= whole {
        return format!("{sign}{digits}{}.0", "0".repeat(whole - digits.len()));
    }
    format!("{sign}{}.{}", &digits[..whole], &digits[whole..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_numpy_does() {
        let text = |v: f32| float_text(f64::from(v), &format!("{v:e}"));
        assert_eq!(
            [0.0, 1.0, -1.5, 0.479, 100.0, 1e-4, 1e-5, 1.5e20, 1e16].map(text),
            ["0.0", "1.0", "-1.5", "0.479", "100.0", "0.0001", "1e-05", "1.5e+20", "1e+16"]
        );
        assert_eq!(float_text(f64::INFINITY, "inf"), "inf");
    }
}
