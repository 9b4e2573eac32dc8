//! Recurrent layers: back-propagation through time, one sequence after another.

use super::add_to;
use crate::ops::real::Real;
use crate::ops::recurrent::{Cell, RecurrentOperands, RecurrentShape};

/// An activation: its value, and its derivative from operand and value.
pub trait RecurrentActivation {
    /// The value.
    fn value(&self, x: f64) -> f64;
    /// The derivative.
    fn slope(&self, x: f64, value: f64) -> f64;
}

/// Results of [`recurrent_grad`], as far as they are wanted, laid out as the operands.
#[derive(Debug)]
pub struct RecurrentGradients<'a, T> {
    /// Of the sequences.
    pub x: Option<&'a mut [T]>,
    /// Of the input weights.
    pub w: Option<&'a mut [T]>,
    /// Of the recurrent weights.
    pub r: Option<&'a mut [T]>,
    /// Of both biases.
    pub bias: Option<&'a mut [T]>,
    /// Of the first state.
    pub initial_h: Option<&'a mut [T]>,
    /// Of the first cell state.
    pub initial_c: Option<&'a mut [T]>,
    /// Of the peepholes.
    pub peepholes: Option<&'a mut [T]>,
}

/// Elements of scratch that [`recurrent_grad`] needs.
pub fn recurrent_grad_scratch_len(shape: &RecurrentShape) -> usize {
    let (gates, hidden) = (shape.cell.gates() * shape.hidden, shape.hidden);
    shape.steps * (2 * gates + 3 * hidden) + 2 * hidden + 2 * gates + 4 * hidden
}

fn add<T: Real>(to: &mut Option<&mut [T]>, at: usize, value: f64) {
    if let Some(to) = to {
        add_to(&mut to[at], value);
    }
}

/// `to[i] += Σ_k a[k] · m[k][i]` for rows of `m`.
fn add_transposed<T: Real>(to: &mut [f64], a: &[f64], m: &[T]) {
    let width = to.len();
    for (k, a) in a.iter().enumerate() {
        for (to, m) in to.iter_mut().zip(&m[k * width..]) {
            *to += a * m.to_f64();
        }
    }
}

/// Gradients of a recurrent layer from those of its results (`[y, h, c]`, absent ones are zero); the forward pass is
/// computed anew. `activations` holds `f`, `g` and `h` of each direction. `scratch` has
/// [`recurrent_grad_scratch_len`] elements.
pub fn recurrent_grad<T: Real>(
    shape: &RecurrentShape,
    operands: &RecurrentOperands<'_, T>,
    activations: &[[&dyn RecurrentActivation; 3]],
    [dy, dy_h, dy_c]: [Option<&[T]>; 3],
    results: &mut RecurrentGradients<'_, T>,
    scratch: &mut [f64],
) {
    let r = results;
    for out in
        [&mut r.x, &mut r.w, &mut r.r, &mut r.bias, &mut r.initial_h, &mut r.initial_c, &mut r.peepholes]
            .into_iter()
            .flatten()
    {
        out.fill(T::from_f64(0.0));
    }
    let (hidden, input) = (shape.hidden, shape.input);
    let gates = shape.cell.gates() * hidden;
    let mut rest = scratch;
    let mut take = |len: usize| -> &mut [f64] {
        let (part, tail) = std::mem::take(&mut rest).split_at_mut(len);
        rest = tail;
        part
    };
    let (pre, post) = (take(shape.steps * gates), take(shape.steps * gates));
    let (hs, cs) = (take((shape.steps + 1) * hidden), take((shape.steps + 1) * hidden));
    let inner = take(shape.steps * hidden);
    let (dh, dc, previous, work) = (take(hidden), take(hidden), take(hidden), take(hidden));
    let (dpre, drec) = (take(gates), take(gates));
    let at = |v: Option<&[T]>, i: usize| v.map_or(0.0, |v| v[i].to_f64());
    for direction in 0..shape.directions {
        let reverse = shape.reverse || direction == 1;
        let [f, g, out] = activations[direction];
        let limit = operands.clip.map_or(f64::INFINITY, Real::to_f64);
        let clip = |v: f64| v.max(-limit).min(limit);
        let inside = |v: f64| if v.abs() > limit { 0.0 } else { 1.0 };
        let (w_at, r_at) = (direction * gates * input, direction * gates * hidden);
        let (b_at, p_at) = (direction * 2 * gates, direction * 3 * hidden);
        let w = |k: usize, i: usize| operands.w[w_at + k * input + i].to_f64();
        let rw = |k: usize, i: usize| operands.r[r_at + k * hidden + i].to_f64();
        let peephole = |which: usize, i: usize| at(operands.peepholes, p_at + which * hidden + i);
        for b in 0..shape.batch {
            let length =
                operands.lengths.map_or(shape.steps, |l| usize::try_from(l[b]).unwrap_or(0).min(shape.steps));
            let place = |s: usize| if reverse { length - 1 - s } else { s };
            let state = shape.state_row(direction, b) * hidden;
            for i in 0..hidden {
                hs[i] = at(operands.initial_h, state + i);
                cs[i] = at(operands.initial_c, state + i);
            }
            // ---- forward ----
            for s in 0..length {
                let x_at = shape.x_row(place(s), b) * input;
                let (before, after) = hs.split_at_mut((s + 1) * hidden);
                let (h, h_new) = (&before[s * hidden..], &mut after[..hidden]);
                let (before, after) = cs.split_at_mut((s + 1) * hidden);
                let (c, c_new) = (&before[s * hidden..], &mut after[..hidden]);
                let pre = &mut pre[s * gates..][..gates];
                let post = &mut post[s * gates..][..gates];
                let inner = &mut inner[s * hidden..][..hidden];
                let recurrent = |k: usize, h: &[f64]| {
                    (0..hidden).map(|i| rw(k, i) * h[i]).sum::<f64>() + at(operands.bias, b_at + gates + k)
                };
                for (k, pre) in pre.iter_mut().enumerate() {
                    *pre = (0..input).map(|i| w(k, i) * operands.x[x_at + i].to_f64()).sum::<f64>()
                        + at(operands.bias, b_at + k);
                }
                match shape.cell {
                    Cell::Rnn => {
                        for k in 0..hidden {
                            pre[k] += recurrent(k, h);
                            post[k] = f.value(clip(pre[k]));
                            h_new[k] = post[k];
                        }
                    }
                    Cell::Lstm { input_forget } => {
                        (0..gates).for_each(|k| pre[k] += recurrent(k, h));
                        for i in 0..hidden {
                            let (ii, oo, ff, cc) = (i, hidden + i, 2 * hidden + i, 3 * hidden + i);
                            pre[ii] += peephole(0, i) * c[i];
                            pre[ff] += peephole(2, i) * c[i];
                            post[ii] = f.value(clip(pre[ii]));
                            post[ff] = if input_forget { 1.0 - post[ii] } else { f.value(clip(pre[ff])) };
                            post[cc] = g.value(clip(pre[cc]));
                            c_new[i] = post[ff] * c[i] + post[ii] * post[cc];
                            pre[oo] += peephole(1, i) * c_new[i];
                            post[oo] = f.value(clip(pre[oo]));
                            h_new[i] = post[oo] * out.value(c_new[i]);
                        }
                    }
                    Cell::Gru { linear_before_reset } => {
                        for k in 0..2 * hidden {
                            pre[k] += recurrent(k, h);
                            post[k] = f.value(clip(pre[k]));
                        }
                        for i in 0..hidden {
                            inner[i] = if linear_before_reset {
                                recurrent(2 * hidden + i, h)
                            } else {
                                post[hidden + i] * h[i]
                            };
                        }
                        for i in 0..hidden {
                            let k = 2 * hidden + i;
                            pre[k] += if linear_before_reset {
                                post[hidden + i] * inner[i]
                            } else {
                                recurrent(k, inner)
                            };
                            post[k] = g.value(clip(pre[k]));
                            h_new[i] = (1.0 - post[i]) * post[k] + post[i] * h[i];
                        }
                    }
                }
            }
            // ---- backward ----
            for i in 0..hidden {
                dh[i] = at(dy_h, state + i);
                dc[i] = at(dy_c, state + i);
            }
            for s in (0..length).rev() {
                let x_at = shape.x_row(place(s), b) * input;
                let y_at = shape.y_row(place(s), direction, b) * hidden;
                (0..hidden).for_each(|i| dh[i] += at(dy, y_at + i));
                let (h, c) = (&hs[s * hidden..][..hidden], &cs[s * hidden..][..hidden]);
                let c_new = &cs[(s + 1) * hidden..][..hidden];
                let (pre, post) = (&pre[s * gates..][..gates], &post[s * gates..][..gates]);
                let inner = &inner[s * hidden..][..hidden];
                let slope =
                    |a: &dyn RecurrentActivation, k: usize| inside(pre[k]) * a.slope(clip(pre[k]), post[k]);
                previous.fill(0.0);
                match shape.cell {
                    Cell::Rnn => {
                        (0..hidden).for_each(|k| dpre[k] = dh[k] * slope(f, k));
                        drec.copy_from_slice(dpre);
                    }
                    Cell::Lstm { input_forget } => {
                        for i in 0..hidden {
                            let (ii, oo, ff, cc) = (i, hidden + i, 2 * hidden + i, 3 * hidden + i);
                            let shown = out.value(c_new[i]);
                            dpre[oo] = dh[i] * shown * slope(f, oo);
                            let d = dc[i]
                                + dh[i] * post[oo] * out.slope(c_new[i], shown)
                                + dpre[oo] * peephole(1, i);
                            let (mut di, df) = (d * post[cc], d * c[i]);
                            if input_forget {
                                di -= df;
                                dpre[ff] = 0.0;
                            } else {
                                dpre[ff] = df * slope(f, ff);
                            }
                            dpre[ii] = di * slope(f, ii);
                            dpre[cc] = d * post[ii] * slope(g, cc);
                            dc[i] = d * post[ff] + dpre[ii] * peephole(0, i) + dpre[ff] * peephole(2, i);
                            add(&mut r.peepholes, p_at + i, dpre[ii] * c[i]);
                            add(&mut r.peepholes, p_at + hidden + i, dpre[oo] * c_new[i]);
                            add(&mut r.peepholes, p_at + 2 * hidden + i, dpre[ff] * c[i]);
                        }
                        drec.copy_from_slice(dpre);
                    }
                    Cell::Gru { linear_before_reset } => {
                        for i in 0..hidden {
                            let k = 2 * hidden + i;
                            dpre[k] = dh[i] * (1.0 - post[i]) * slope(g, k);
                            dpre[i] = dh[i] * (h[i] - post[k]) * slope(f, i);
                            previous[i] += dh[i] * post[i];
                        }
                        work.fill(0.0);
                        if !linear_before_reset {
                            add_transposed(
                                work,
                                &dpre[2 * hidden..],
                                &operands.r[r_at + 2 * hidden * hidden..],
                            );
                        }
                        for i in 0..hidden {
                            let k = 2 * hidden + i;
                            let dreset = if linear_before_reset {
                                drec[k] = dpre[k] * post[hidden + i];
                                dpre[k] * inner[i]
                            } else {
                                drec[k] = dpre[k];
                                previous[i] += work[i] * post[hidden + i];
                                work[i] * h[i]
                            };
                            dpre[hidden + i] = dreset * slope(f, hidden + i);
                        }
                        drec[..2 * hidden].copy_from_slice(&dpre[..2 * hidden]);
                    }
                }
                // A GRU that resets before the product has had its last third above.
                let reset_first = matches!(shape.cell, Cell::Gru { linear_before_reset: false });
                let plain = if reset_first { 2 * hidden } else { gates };
                add_transposed(previous, &drec[..plain], &operands.r[r_at..]);
                for k in 0..gates {
                    let source = if k < plain { h } else { inner };
                    for i in 0..hidden {
                        add(&mut r.r, r_at + k * hidden + i, drec[k] * source[i]);
                    }
                    for i in 0..input {
                        add(&mut r.w, w_at + k * input + i, dpre[k] * operands.x[x_at + i].to_f64());
                        add(&mut r.x, x_at + i, dpre[k] * w(k, i));
                    }
                    add(&mut r.bias, b_at + k, dpre[k]);
                    add(&mut r.bias, b_at + gates + k, drec[k]);
                }
                dh.copy_from_slice(previous);
            }
            for i in 0..hidden {
                add(&mut r.initial_h, state + i, dh[i]);
                add(&mut r.initial_c, state + i, dc[i]);
            }
        }
    }
}
