//! Random numbers; see [`Philox`] for how they are made.

use lightering_graph::{Distribution, Op};
use lightering_kernels::ops::random::Philox;

use super::operands::*;
use super::{OpContext, OpError, TensorView, TensorViewMut};

/// The stream of a node: that of its own seed, or one that the run chooses.
fn stream(seed: Option<u64>, context: &OpContext) -> Philox {
    Philox::new(seed.unwrap_or(context.seed))
}

fn float_seed(seed: Option<f32>) -> Option<u64> {
    seed.map(|s| u64::from(s.to_bits()))
}

/// Dispatch of this family.
pub(super) fn compute(
    op: &Op,
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
    context: &OpContext,
) -> Result<(), OpError> {
    if let Op::Dropout { seed } = op {
        return dropout(seed.map(|s| s as u64), inputs, outputs, context);
    }
    let Some(Some(out)) = outputs.first_mut() else { return Ok(()) };
    match op {
        Op::Random(a) => {
            let stream = stream(float_seed(a.seed), context);
            for i in 0..count(out.dims) {
                let value = match a.distribution {
                    Distribution::Normal { mean, scale } => {
                        f64::from(mean) + f64::from(scale) * stream.normal(i as u64)
                    }
                    Distribution::Uniform { low, high } => {
                        f64::from(low) + (f64::from(high) - f64::from(low)) * stream.uniform(i as u64)
                    }
                };
                store_number(out, i, value)?;
            }
            Ok(())
        }
        Op::Bernoulli { seed, .. } => {
            let p = required(inputs, 0, "p")?;
            expect_count(out.dims, count(p.dims), "the result")?;
            let stream = stream(float_seed(*seed), context);
            for i in 0..count(out.dims) {
                let hit = stream.uniform(i as u64) < number_at(&p, i)?;
                store_number(out, i, f64::from(u8::from(hit)))?;
            }
            Ok(())
        }
        Op::Multinomial { sample_size, seed, .. } => {
            multinomial(*sample_size, stream(float_seed(*seed), context), inputs, out)
        }
        _ => Err(super::no_kernel(op)),
    }
}

/// Samples classes whose unnormalised logarithms of probabilities are given, by inverting the running sum.
fn multinomial(
    samples: usize,
    stream: Philox,
    inputs: &[Option<TensorView>],
    out: &mut TensorViewMut,
) -> Result<(), OpError> {
    let logits = required(inputs, 0, "the logits")?;
    let &[batch, classes] = logits.dims else {
        return invalid(format!("the logits have shape {:?}, expected 2 dimensions", logits.dims));
    };
    expect_dims(out.dims, &[batch, samples], "the result")?;
    if classes == 0 {
        return invalid("samples of no classes");
    }
    for row in 0..batch {
        let logit = |class: usize| number_at(&logits, row * classes + class);
        let mut largest = f64::NEG_INFINITY;
        for class in 0..classes {
            largest = largest.max(logit(class)?);
        }
        let mut total = 0.0;
        for class in 0..classes {
            total += (logit(class)? - largest).exp();
        }
        for sample in 0..samples {
            let at = row * samples + sample;
            let mut rest = stream.uniform(at as u64) * total;
            let mut class = 0;
            while class + 1 < classes {
                rest -= (logit(class)? - largest).exp();
                if rest < 0.0 {
                    break;
                }
                class += 1;
            }
            store_number(out, at, class as f64)?;
        }
    }
    Ok(())
}

/// `y = x` at inference; in training mode, elements are dropped with probability `ratio` and the others scaled.
fn dropout(
    seed: Option<u64>,
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
    context: &OpContext,
) -> Result<(), OpError> {
    let x = required(inputs, 0, "x")?;
    let ratio = optional(inputs, 1).map_or(Ok(0.5), |r| number_scalar(&r, "the ratio"))?;
    let training = optional(inputs, 2).map_or(Ok(0), |t| integer_scalar(&t, "training_mode"))? != 0;
    let ratio = if training { ratio } else { 0.0 };
    if !(0.0..=1.0).contains(&ratio) {
        return invalid(format!("a dropout ratio of {ratio}"));
    }
    let stream = stream(seed, context);
    let kept = |i: usize| ratio == 0.0 || stream.uniform(i as u64) >= ratio;
    if let Some(Some(out)) = outputs.get_mut(0) {
        expect_dims(out.dims, x.dims, "the result")?;
        if ratio == 0.0 {
            out.bytes.copy_from_slice(x.bytes);
        } else {
            let scale = if ratio < 1.0 { 1.0 / (1.0 - ratio) } else { 0.0 };
            for i in 0..count(x.dims) {
                let value = if kept(i) { number_at(&x, i)? * scale } else { 0.0 };
                store_number(out, i, value)?;
            }
        }
    }
    if let Some(Some(mask)) = outputs.get_mut(1) {
        expect_dims(mask.dims, x.dims, "the mask")?;
        for (i, m) in mask.as_mut_slice::<u8>().iter_mut().enumerate() {
            *m = u8::from(kept(i));
        }
    }
    Ok(())
}
