//! The gradient of a long short-term memory, time first: one product over all steps on either side of the chain.

use super::product::{Transposed, product, product_scratch_len};
use super::{batch::batch_scratch_len, batch::channel_sum, get, over_rows, put};
use crate::arch::{Kernel, Simd, dispatch};
use crate::epilogue::Activation;
use crate::gemm::{Panels, Product, Strided, pack_kn, pack_nk, packed_len};
use crate::math;
use crate::matmul::Matrices;
use crate::threads::{Shareable, ThreadPool};

/// Sizes of a layer that reads forwards: `x` is `[steps, batch, input]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LstmShape {
    /// Steps.
    pub steps: usize,
    /// Sequences.
    pub batch: usize,
    /// Values per step.
    pub input: usize,
    /// Size of the state.
    pub hidden: usize,
}

/// Operands: weights `[4 · hidden, input]` and `[4 · hidden, hidden]` in the order input, output, forget, cell; both
/// biases beside each other; gradients of the results of every step, of the last state and of the last cell.
#[derive(Clone, Copy, Debug)]
pub struct LstmOperands<'a> {
    /// The sequences.
    pub x: &'a [f32],
    /// Input weights.
    pub w: &'a [f32],
    /// Recurrent weights.
    pub r: &'a [f32],
    /// Biases, zero when absent.
    pub bias: Option<&'a [f32]>,
    /// First state, zero when absent.
    pub initial_h: Option<&'a [f32]>,
    /// First cell, zero when absent.
    pub initial_c: Option<&'a [f32]>,
    /// Gradient of all steps.
    pub dy: Option<&'a [f32]>,
    /// Gradient of the last state.
    pub dy_h: Option<&'a [f32]>,
    /// Gradient of the last cell.
    pub dy_c: Option<&'a [f32]>,
}

/// Results, as far as they are wanted, laid out as the operands.
#[derive(Debug, Default)]
pub struct LstmGradients<'a> {
    /// Of the sequences.
    pub x: Option<&'a mut [f32]>,
    /// Of the input weights.
    pub w: Option<&'a mut [f32]>,
    /// Of the recurrent weights.
    pub r: Option<&'a mut [f32]>,
    /// Of both biases.
    pub bias: Option<&'a mut [f32]>,
    /// Of the first state.
    pub initial_h: Option<&'a mut [f32]>,
    /// Of the first cell.
    pub initial_c: Option<&'a mut [f32]>,
}

impl LstmShape {
    fn rows(&self) -> usize {
        self.steps * self.batch
    }

    /// Gates, states, cells, packed weights, gradients of state and cell, sum of biases.
    fn parts(&self) -> [usize; 7] {
        let (h, gates) = (self.hidden, 4 * self.hidden);
        let states = (self.rows() + self.batch) * h;
        let packed = packed_len(h, gates).max(packed_len(gates, h));
        [self.rows() * gates, states, states, packed, self.batch * h, self.batch * h, gates]
    }

    fn products(&self) -> [([usize; 3], Transposed); 4] {
        let (rows, gates) = (self.rows(), 4 * self.hidden);
        let (plain, left) = (Transposed::default(), Transposed { a: true, b: false });
        [
            ([rows, gates, self.input], Transposed { a: false, b: true }),
            ([rows, self.input, gates], plain),
            ([gates, self.input, rows], left),
            ([gates, self.hidden, rows], left),
        ]
    }
}

/// Values of scratch that [`lstm_grad`] needs on a pool of `threads` threads.
pub fn lstm_grad_scratch_len(shape: &LstmShape, threads: usize) -> usize {
    let products = shape.products().map(|(s, t)| product_scratch_len(1, s, t, threads));
    let most = products.into_iter().fold(batch_scratch_len(shape.rows(), 4 * shape.hidden), usize::max);
    shape.parts().iter().map(|n| n.next_multiple_of(16)).sum::<usize>() + most
}

/// One step forwards: sums of the gates become their values.
struct Forward {
    gates: *mut f32,
    cell: *const f32,
    new_cell: *mut f32,
    new_state: *mut f32,
    rows: usize,
    n: usize,
}

impl Kernel for Forward {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let one = s.splat(1.0);
        for row in 0..self.rows {
            let mut i = 0;
            while i < self.n {
                let n = S::LANES.min(self.n - i);
                // SAFETY: who builds the kernel vouches for `rows` rows of four times `n` gates and `n` values.
                unsafe {
                    let gates = self.gates.add(row * 4 * self.n + i);
                    let at = row * self.n + i;
                    let sigmoid =
                        |gate: usize| math::scaled_sigmoid(s, get(s, gates.add(gate * self.n), n), one);
                    let (input, output, forget) = (sigmoid(0), sigmoid(1), sigmoid(2));
                    let fresh = math::tanh(s, get(s, gates.add(3 * self.n), n));
                    let cell = s.fma(forget, get(s, self.cell.add(at), n), s.mul(input, fresh));
                    put(s, gates, n, input);
                    put(s, gates.add(self.n), n, output);
                    put(s, gates.add(2 * self.n), n, forget);
                    put(s, gates.add(3 * self.n), n, fresh);
                    put(s, self.new_cell.add(at), n, cell);
                    put(s, self.new_state.add(at), n, s.mul(output, math::tanh(s, cell)));
                }
                i += S::LANES;
            }
        }
    }
}

/// One step backwards: values of the gates become gradients of their sums.
struct Backward {
    gates: *mut f32,
    cell: *const f32,
    new_cell: *const f32,
    dh: *const f32,
    /// Null for none.
    dy: *const f32,
    dc: *mut f32,
    rows: usize,
    n: usize,
}

impl Kernel for Backward {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let one = s.splat(1.0);
        for row in 0..self.rows {
            let mut i = 0;
            while i < self.n {
                let n = S::LANES.min(self.n - i);
                // SAFETY: as for the step forwards.
                unsafe {
                    let gates = self.gates.add(row * 4 * self.n + i);
                    let at = row * self.n + i;
                    let gate = |g: usize| get(s, gates.add(g * self.n), n);
                    let (input, output, forget, fresh) = (gate(0), gate(1), gate(2), gate(3));
                    let mut dh = get(s, self.dh.add(at), n);
                    if !self.dy.is_null() {
                        dh = s.add(dh, get(s, self.dy.add(at), n));
                    }
                    let shown = math::tanh(s, get(s, self.new_cell.add(at), n));
                    let slope = s.sub(one, s.mul(shown, shown));
                    let dc = s.fma(s.mul(dh, output), slope, get(s, self.dc.add(at), n));
                    let bend = |g: S::F| s.mul(g, s.sub(one, g));
                    let before = get(s, self.cell.add(at), n);
                    put(s, gates, n, s.mul(s.mul(dc, fresh), bend(input)));
                    put(s, gates.add(self.n), n, s.mul(s.mul(dh, shown), bend(output)));
                    put(s, gates.add(2 * self.n), n, s.mul(s.mul(dc, before), bend(forget)));
                    let curve = s.sub(one, s.mul(fresh, fresh));
                    put(s, gates.add(3 * self.n), n, s.mul(s.mul(dc, input), curve));
                    put(s, self.dc.add(at), n, s.mul(dc, forget));
                }
                i += S::LANES;
            }
        }
    }
}

/// Gradient of a long short-term memory with sigmoid and tanh, its forward pass computed anew. `scratch` has
/// [`lstm_grad_scratch_len`] values.
///
/// # Panics
/// Panics when a slice is too short.
pub fn lstm_grad(
    pool: &ThreadPool,
    shape: &LstmShape,
    operands: &LstmOperands<'_>,
    results: LstmGradients<'_>,
    scratch: &mut [f32],
) {
    let LstmShape { steps, batch, input, hidden } = *shape;
    let (rows, four, step) = (shape.rows(), 4 * hidden, batch * hidden);
    let LstmOperands { x, w, r, bias, initial_h, initial_c, dy, dy_h, dy_c } = *operands;
    assert!(x.len() >= rows * input && w.len() >= four * input && r.len() >= four * hidden, "{shape:?}");
    let long = |o: Option<&[f32]>, n: usize| o.is_none_or(|o| o.len() >= n);
    let states = [initial_h, initial_c, dy_h, dy_c].into_iter().all(|o| long(o, step));
    assert!(states && long(bias, 2 * four) && long(dy, rows * hidden), "operands are too short: {shape:?}");
    let mut rest = scratch;
    let [gates, hs, cs, packed, dh, dc, sums] = shape.parts().map(|n| {
        let (part, tail) = std::mem::take(&mut rest).split_at_mut(n.next_multiple_of(16));
        rest = tail;
        &mut part[..n]
    });
    let scratch = rest;
    let rows_of = |n: usize| Matrices { batch_stride: 0, row_stride: n };
    if let Some(bias) = bias {
        for (k, sum) in sums.iter_mut().enumerate() {
            *sum = bias[k] + bias[four + k];
        }
    }
    let first = |to: &mut [f32], from: Option<&[f32]>| match from {
        Some(from) => to.copy_from_slice(&from[..to.len()]),
        None => to.fill(0.0),
    };
    first(&mut hs[..step], initial_h);
    first(&mut cs[..step], initial_c);
    first(dh, dy_h);
    first(dc, dy_c);
    let [forwards, to_x, to_w, to_r] = shape.products();
    let none = Activation::None;
    let bias = bias.map(|_| &*sums);
    product(
        pool,
        1,
        forwards.0,
        1.0,
        x,
        rows_of(input),
        w,
        rows_of(input),
        forwards.1,
        gates,
        rows_of(four),
        bias,
        None,
        none,
        scratch,
    );
    pack_nk(hidden, four, r, hidden, packed);
    let isa = pool.isa();
    for t in 0..steps {
        let g = &mut gates[t * batch * four..][..batch * four];
        let (before, after) = hs.split_at_mut((t + 1) * step);
        let (cell, new_cell) = cs.split_at_mut((t + 1) * step);
        let (h, cell) = (&before[t * step..], &cell[t * step..]);
        // The sums of the inputs are there already.
        chain(pool, batch, four, hidden, h, packed, g, true);
        let g = Shareable(g.as_mut_ptr());
        let (new_cell, new_state) = (Shareable(new_cell.as_mut_ptr()), Shareable(after.as_mut_ptr()));
        over_rows(pool, batch, 8 * hidden, &|first, rows| {
            let at = first * hidden;
            let forward = Forward {
                gates: g.get().wrapping_add(first * four),
                cell: cell[at..].as_ptr(),
                new_cell: new_cell.get().wrapping_add(at),
                new_state: new_state.get().wrapping_add(at),
                rows,
                n: hidden,
            };
            dispatch(isa, forward);
        });
    }
    pack_kn(four, hidden, r, hidden, packed);
    for t in (0..steps).rev() {
        let g = &mut gates[t * batch * four..][..batch * four];
        let (cell, new_cell) = (&cs[t * step..][..step], &cs[(t + 1) * step..][..step]);
        let dy = dy.map(|dy| &dy[t * step..][..step]);
        let (pointer, dc) = (Shareable(g.as_mut_ptr()), Shareable(dc.as_mut_ptr()));
        let dh_now = &*dh;
        over_rows(pool, batch, 8 * hidden, &|first, rows| {
            let at = first * hidden;
            let backward = Backward {
                gates: pointer.get().wrapping_add(first * four),
                cell: cell[at..].as_ptr(),
                new_cell: new_cell[at..].as_ptr(),
                dh: dh_now[at..].as_ptr(),
                dy: dy.map_or(std::ptr::null(), |dy| dy[at..].as_ptr()),
                dc: dc.get().wrapping_add(at),
                rows,
                n: hidden,
            };
            dispatch(isa, backward);
        });
        chain(pool, batch, hidden, four, g, packed, dh, false);
    }
    if let Some(to) = results.initial_h {
        to[..step].copy_from_slice(dh);
    }
    if let Some(to) = results.initial_c {
        to[..step].copy_from_slice(dc);
    }
    let gates = &*gates;
    if let Some(dx) = results.x {
        let (shape, turned) = to_x;
        let (g, w_at) = (rows_of(four), rows_of(input));
        product(pool, 1, shape, 1.0, gates, g, w, w_at, turned, dx, w_at, None, None, none, scratch);
    }
    if let Some(dw) = results.w {
        let (shape, turned) = to_w;
        let (g, x_at) = (rows_of(four), rows_of(input));
        product(pool, 1, shape, 1.0, gates, g, x, x_at, turned, dw, x_at, None, None, none, scratch);
    }
    if let Some(dr) = results.r {
        let (shape, turned) = to_r;
        let (g, h_at) = (rows_of(four), rows_of(hidden));
        product(pool, 1, shape, 1.0, gates, g, hs, h_at, turned, dr, h_at, None, None, none, scratch);
    }
    if let Some(db) = results.bias {
        let (input, recurrent) = db[..2 * four].split_at_mut(four);
        channel_sum(pool, rows, four, 1.0, gates, input, scratch);
        recurrent.copy_from_slice(input);
    }
}

/// `c = a · packed`, or `c += a · packed`: one link of the chain over time.
fn chain(
    pool: &ThreadPool,
    rows: usize,
    columns: usize,
    k: usize,
    a: &[f32],
    packed: &[f32],
    c: &mut [f32],
    add: bool,
) {
    assert!(a.len() >= rows * k && packed.len() >= packed_len(k, columns) && c.len() >= rows * columns);
    let to = c.as_mut_ptr();
    Product {
        source: Strided { data: a.as_ptr(), stride: k, k },
        rows,
        columns,
        panels: Panels { data: packed.as_ptr(), plain_stride: 0 },
        c: Shareable(to),
        c_stride: columns,
        bias: std::ptr::null(),
        // A tile reads its part of the residual before it writes it.
        residual: if add { to.cast_const() } else { std::ptr::null() },
        residual_stride: columns,
        activation: Activation::None,
    }
    .run(pool);
}
