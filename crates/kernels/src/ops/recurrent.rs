//! Recurrent layers: simple RNN, LSTM (Hochreiter and Schmidhuber, 1997, with peepholes) and GRU (Cho et al., 2014).

use super::rows::Shared;
use crate::ThreadPool;

/// Arithmetic of `f32` and `f64`, as the recurrent layers need it.
pub trait Compute: Copy + Send + Sync + PartialOrd + std::fmt::Debug + 'static {
    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;
    /// `a · b + c` with one or two roundings.
    fn multiply_add<const FUSED: bool>(a: Self, b: Self, c: Self) -> Self;
    /// Sum.
    fn add(self, b: Self) -> Self;
    /// Difference.
    fn sub(self, b: Self) -> Self;
    /// Product.
    fn mul(self, b: Self) -> Self;
    /// Limited to ±`limit`.
    fn clip(self, limit: Self) -> Self;
}

macro_rules! compute {
    ($t:ty) => {
        impl Compute for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            #[inline(always)]
            fn multiply_add<const FUSED: bool>(a: Self, b: Self, c: Self) -> Self {
                if FUSED { a.mul_add(b, c) } else { a * b + c }
            }
            #[inline(always)]
            fn add(self, b: Self) -> Self {
                self + b
            }
            #[inline(always)]
            fn sub(self, b: Self) -> Self {
                self - b
            }
            #[inline(always)]
            fn mul(self, b: Self) -> Self {
                self * b
            }
            #[inline(always)]
            fn clip(self, limit: Self) -> Self {
                self.max(-limit).min(limit)
            }
        }
    };
}
compute!(f32);
compute!(f64);

const LANES: usize = 8;
const TILE_ROWS: usize = 4;
const TILE_COLUMNS: usize = 2;

/// `c[i][j] = Σ_k a[i][k] · b[j][k]` for one tile; the sum of each element is formed in the same order in every
/// tile shape.
#[inline(always)]
fn tile<T: Compute, const R: usize, const C: usize, const FUSED: bool>(
    a: [&[T]; R],
    b: [&[T]; C],
    depth: usize,
    mut store: impl FnMut(usize, usize, T),
) {
    let mut sums = [[[T::ZERO; LANES]; C]; R];
    let whole = depth / LANES * LANES;
    for k in (0..whole).step_by(LANES) {
        let b: [&[T; LANES]; C] =
            std::array::from_fn(|j| b[j][k..k + LANES].try_into().expect("LANES elements"));
        for i in 0..R {
            let a: &[T; LANES] = a[i][k..k + LANES].try_into().expect("LANES elements");
            for j in 0..C {
                for l in 0..LANES {
                    sums[i][j][l] = T::multiply_add::<FUSED>(a[l], b[j][l], sums[i][j][l]);
                }
            }
        }
    }
    for i in 0..R {
        for j in 0..C {
            let s = &sums[i][j];
            let mut sum = s[0].add(s[4]).add(s[2].add(s[6])).add(s[1].add(s[5]).add(s[3].add(s[7])));
            for k in whole..depth {
                sum = T::multiply_add::<FUSED>(a[i][k], b[j][k], sum);
            }
            store(i, j, sum);
        }
    }
}

#[inline(always)]
fn product_columns<T: Compute, const FUSED: bool>(
    (rows, columns, depth): (usize, std::ops::Range<usize>, usize),
    a: &[T],
    b: &[T],
    mut store: impl FnMut(usize, usize, T),
) {
    let row = |i: usize| &a[i * depth..][..depth];
    let column = |j: usize| &b[j * depth..][..depth];
    let mut j = columns.start;
    while j < columns.end {
        let wide = j + TILE_COLUMNS <= columns.end;
        let mut i = 0;
        while i < rows {
            if wide && i + TILE_ROWS <= rows {
                let (a, b) = (std::array::from_fn(|r| row(i + r)), std::array::from_fn(|c| column(j + c)));
                tile::<T, TILE_ROWS, TILE_COLUMNS, FUSED>(a, b, depth, |r, c, s| store(i + r, j + c, s));
                i += TILE_ROWS;
            } else if wide {
                let b = std::array::from_fn(|c| column(j + c));
                tile::<T, 1, TILE_COLUMNS, FUSED>([row(i)], b, depth, |_, c, s| store(i, j + c, s));
                i += 1;
            } else {
                tile::<T, 1, 1, FUSED>([row(i)], [column(j)], depth, |_, _, s| store(i, j, s));
                i += 1;
            }
        }
        j += if wide { TILE_COLUMNS } else { 1 };
    }
}

/// As [`product_columns`], compiled for wider vectors.
///
/// # Safety
/// The processor must have AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn product_columns_avx2<T: Compute>(
    shape: (usize, std::ops::Range<usize>, usize),
    a: &[T],
    b: &[T],
    store: impl FnMut(usize, usize, T),
) {
    product_columns::<T, true>(shape, a, b, store);
}

/// Multiply-adds below which a product is not worth a second thread.
const PARALLEL_WORK: usize = 1 << 17;

/// `c = a · bᵀ` for `a [rows, depth]`, `b [columns, depth]`, `c [rows, columns]`. The bits do not depend on the
/// number of threads nor on the number of rows.
pub fn product_nt<T: Compute>(
    pool: &ThreadPool,
    (rows, columns, depth): (usize, usize, usize),
    a: &[T],
    b: &[T],
    c: &mut [T],
) {
    assert!(a.len() >= rows * depth && b.len() >= columns * depth && c.len() >= rows * columns);
    let wanted = if rows * columns * depth < PARALLEL_WORK { 1 } else { 4 * pool.threads() };
    let per_task = columns.div_ceil(wanted).next_multiple_of(TILE_COLUMNS * 8).max(1);
    let shared = Shared::new(c);
    pool.parallel_for(columns.div_ceil(per_task), &|task, _| {
        let range = task * per_task..((task + 1) * per_task).min(columns);
        // SAFETY: tasks write different columns, one element at a time.
        let store = |i: usize, j: usize, sum: T| unsafe { shared.slice(i * columns + j, 1)[0] = sum };
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            // SAFETY: both features were found.
            return unsafe { product_columns_avx2((rows, range, depth), a, b, store) };
        }
        product_columns::<T, false>((rows, range, depth), a, b, store);
    });
}

/// Which recurrent layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// `h = f(Wx + Rh + b)`.
    Rnn,
    /// Gates in the order input, output, forget, cell.
    Lstm {
        /// The forget gate is one minus the input gate.
        input_forget: bool,
    },
    /// Gates in the order update, reset, hidden.
    Gru {
        /// The reset gate is applied after the linear transformation.
        linear_before_reset: bool,
    },
}

impl Cell {
    /// Rows of the weights per hidden element.
    pub const fn gates(self) -> usize {
        match self {
            Cell::Rnn => 1,
            Cell::Lstm { .. } => 4,
            Cell::Gru { .. } => 3,
        }
    }
}

/// Sizes of a recurrent layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecurrentShape {
    /// Which layer.
    pub cell: Cell,
    /// Longest sequence.
    pub steps: usize,
    /// Sequences.
    pub batch: usize,
    /// Features per step.
    pub input: usize,
    /// Size of the state.
    pub hidden: usize,
    /// 1, or 2 for forward and reverse.
    pub directions: usize,
    /// The only direction is the reverse one.
    pub reverse: bool,
    /// `[batch, steps, …]` rather than `[steps, batch, …]`, states `[batch, directions, …]`.
    pub batch_first: bool,
}

impl RecurrentShape {
    /// Steps whose input products are computed together.
    fn chunk_steps(&self) -> usize {
        (64 / self.batch.max(1)).clamp(1, self.steps.max(1))
    }

    /// Elements of scratch that [`recurrent`] needs.
    pub fn scratch_len(&self) -> usize {
        let (gates, state) = (self.cell.gates() * self.hidden, self.batch * self.hidden);
        self.chunk_steps() * self.batch * (self.input + gates) + self.batch * gates + 3 * state
    }

    pub(super) fn x_row(&self, step: usize, sequence: usize) -> usize {
        if self.batch_first { sequence * self.steps + step } else { step * self.batch + sequence }
    }

    pub(super) fn y_row(&self, step: usize, direction: usize, sequence: usize) -> usize {
        if self.batch_first {
            (sequence * self.steps + step) * self.directions + direction
        } else {
            (step * self.directions + direction) * self.batch + sequence
        }
    }

    pub(super) fn state_row(&self, direction: usize, sequence: usize) -> usize {
        if self.batch_first {
            sequence * self.directions + direction
        } else {
            direction * self.batch + sequence
        }
    }
}

/// Operands of [`recurrent`], with `G` gates.
#[derive(Clone, Copy, Debug)]
pub struct RecurrentOperands<'a, T> {
    /// `[steps, batch, input]`.
    pub x: &'a [T],
    /// `[directions, G · hidden, input]`.
    pub w: &'a [T],
    /// `[directions, G · hidden, hidden]`.
    pub r: &'a [T],
    /// `[directions, 2 · G · hidden]`: of the input products, then of the recurrent ones.
    pub bias: Option<&'a [T]>,
    /// `[batch]`; steps beyond count neither in the state nor in the result, which is zero there.
    pub lengths: Option<&'a [i32]>,
    /// `[directions, batch, hidden]`; zeros when absent.
    pub initial_h: Option<&'a [T]>,
    /// `[directions, batch, hidden]`, LSTM only; zeros when absent.
    pub initial_c: Option<&'a [T]>,
    /// `[directions, 3 · hidden]` for input, output and forget gate, LSTM only.
    pub peepholes: Option<&'a [T]>,
    /// Limit of the activations' operands.
    pub clip: Option<T>,
}

/// Results of [`recurrent`]; those that nobody wants are `None`.
#[derive(Debug)]
pub struct RecurrentResults<'a, T> {
    /// `[steps, directions, batch, hidden]`.
    pub y: Option<&'a mut [T]>,
    /// `[directions, batch, hidden]`.
    pub h: Option<&'a mut [T]>,
    /// `[directions, batch, hidden]`, LSTM only.
    pub c: Option<&'a mut [T]>,
}

/// An activation, applied to a slice in place.
pub type ActivationFn<'a, T> = &'a (dyn Fn(&mut [T]) + Sync);

/// Runs a recurrent layer over all steps; see [`Cell`] for the order of the gates.
///
/// `activations` holds `f`, `g` and `h` of each direction (unused ones may be anything). The input products of
/// several steps are formed together; each step then costs one product with the recurrent weights.
/// `scratch` has [`RecurrentShape::scratch_len`] elements.
pub fn recurrent<T: Compute>(
    pool: &ThreadPool,
    shape: &RecurrentShape,
    operands: &RecurrentOperands<'_, T>,
    activations: &[[ActivationFn<'_, T>; 3]],
    results: &mut RecurrentResults<'_, T>,
    scratch: &mut [T],
) {
    let (batch, hidden) = (shape.batch, shape.hidden);
    let gates = shape.cell.gates() * hidden;
    let chunk = shape.chunk_steps();
    let (xs, rest) = scratch.split_at_mut(chunk * batch * shape.input);
    let (gate_rows, rest) = rest.split_at_mut(chunk * batch * gates);
    let (recurrent, rest) = rest.split_at_mut(batch * gates);
    let (h, rest) = rest.split_at_mut(batch * hidden);
    let (c, rest) = rest.split_at_mut(batch * hidden);
    let mut state = State { h, c, recurrent, work: &mut rest[..batch * hidden] };
    let length = |b: usize| {
        operands.lengths.map_or(shape.steps, |l| usize::try_from(l[b]).unwrap_or(0).min(shape.steps))
    };
    if let Some(y) = results.y.as_deref_mut()
        && operands.lengths.is_some()
    {
        y.fill(T::ZERO);
    }
    for direction in 0..shape.directions {
        let reverse = shape.reverse || direction == 1;
        let w = &operands.w[direction * gates * shape.input..][..gates * shape.input];
        let cell = CellWeights {
            r: &operands.r[direction * gates * hidden..][..gates * hidden],
            bias: operands.bias.map(|b| b[direction * 2 * gates..][..2 * gates].split_at(gates)),
            peepholes: operands.peepholes.map(|p| &p[direction * 3 * hidden..][..3 * hidden]),
            clip: operands.clip,
            activations: activations[direction],
        };
        for b in 0..batch {
            let from = shape.state_row(direction, b) * hidden;
            let initial = |values: Option<&[T]>, to: &mut [T]| match values {
                Some(values) => to.copy_from_slice(&values[from..from + hidden]),
                None => to.fill(T::ZERO),
            };
            initial(operands.initial_h, &mut state.h[b * hidden..][..hidden]);
            initial(operands.initial_c, &mut state.c[b * hidden..][..hidden]);
        }
        for first in (0..shape.steps).step_by(chunk) {
            let count = chunk.min(shape.steps - first);
            // The place in the sequence that each of its own steps reads and writes.
            let place = |step: usize, b: usize| {
                let length = length(b);
                (step < length).then(|| if reverse { length - 1 - step } else { step })
            };
            for step in 0..count {
                for b in 0..batch {
                    let to = &mut xs[(step * batch + b) * shape.input..][..shape.input];
                    match place(first + step, b) {
                        Some(t) => {
                            let from = shape.x_row(t, b) * shape.input;
                            to.copy_from_slice(&operands.x[from..from + shape.input]);
                        }
                        None => to.fill(T::ZERO),
                    }
                }
            }
            product_nt(pool, (count * batch, gates, shape.input), xs, w, gate_rows);
            for step in 0..count {
                let rows = &mut gate_rows[step * batch * gates..][..batch * gates];
                let live = |b: usize| first + step < length(b);
                cell_step(pool, shape, &cell, rows, &mut state, &live);
                if let Some(y) = results.y.as_deref_mut() {
                    for b in 0..batch {
                        if let Some(t) = place(first + step, b) {
                            let to = shape.y_row(t, direction, b) * hidden;
                            y[to..to + hidden].copy_from_slice(&state.h[b * hidden..][..hidden]);
                        }
                    }
                }
            }
        }
        for b in 0..batch {
            let to = shape.state_row(direction, b) * hidden;
            if let Some(h) = results.h.as_deref_mut() {
                h[to..to + hidden].copy_from_slice(&state.h[b * hidden..][..hidden]);
            }
            if let Some(c) = results.c.as_deref_mut() {
                c[to..to + hidden].copy_from_slice(&state.c[b * hidden..][..hidden]);
            }
        }
    }
}

struct State<'a, T> {
    h: &'a mut [T],
    c: &'a mut [T],
    recurrent: &'a mut [T],
    work: &'a mut [T],
}

struct CellWeights<'a, T> {
    r: &'a [T],
    bias: Option<(&'a [T], &'a [T])>,
    peepholes: Option<&'a [T]>,
    clip: Option<T>,
    activations: [ActivationFn<'a, T>; 3],
}

impl<T: Compute> CellWeights<'_, T> {
    /// Clips and applies activation `which`.
    fn activate(&self, which: usize, values: &mut [T]) {
        if let Some(limit) = self.clip {
            values.iter_mut().for_each(|v| *v = v.clip(limit));
        }
        self.activations[which](values);
    }
}

fn add_to<T: Compute>(to: &mut [T], from: &[T]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = to.add(from);
    }
}

fn add_product<T: Compute>(to: &mut [T], a: &[T], b: &[T]) {
    for ((to, &a), &b) in to.iter_mut().zip(a).zip(b) {
        *to = to.add(a.mul(b));
    }
}

/// One step of all sequences; `rows` holds the input products `[batch, G · hidden]` and is overwritten.
fn cell_step<T: Compute>(
    pool: &ThreadPool,
    shape: &RecurrentShape,
    cell: &CellWeights<'_, T>,
    rows: &mut [T],
    state: &mut State<'_, T>,
    live: &dyn Fn(usize) -> bool,
) {
    let (batch, hidden) = (shape.batch, shape.hidden);
    let gates = shape.cell.gates() * hidden;
    let reset_first = matches!(shape.cell, Cell::Gru { linear_before_reset: false });
    // A GRU that resets before the product needs its last third only after the reset gate is known.
    let early = if reset_first { 2 * hidden } else { gates };
    product_nt(pool, (batch, early, hidden), state.h, cell.r, state.recurrent);
    for b in 0..batch {
        let row = &mut rows[b * gates..][..gates];
        if let Some((input, _)) = cell.bias {
            add_to(row, input);
        }
        let products = &mut state.recurrent[b * early..][..early];
        if let Some((_, recurrent)) = cell.bias {
            add_to(products, &recurrent[..early]);
        }
        // The hidden part of a GRU that resets afterwards stays apart until then.
        let joined = if matches!(shape.cell, Cell::Gru { .. }) { 2 * hidden } else { gates };
        add_to(&mut row[..joined], &products[..joined]);
    }
    match shape.cell {
        Cell::Rnn => {
            for b in (0..batch).filter(|&b| live(b)) {
                let row = &mut rows[b * gates..][..gates];
                cell.activate(0, row);
                state.h[b * hidden..][..hidden].copy_from_slice(row);
            }
        }
        Cell::Lstm { input_forget } => {
            for b in (0..batch).filter(|&b| live(b)) {
                let (h, c) = (&mut state.h[b * hidden..][..hidden], &mut state.c[b * hidden..][..hidden]);
                lstm_step(cell, input_forget, &mut rows[b * gates..][..gates], h, c);
            }
        }
        Cell::Gru { .. } => {
            for b in 0..batch {
                let (zr, candidate) = rows[b * gates..][..gates].split_at_mut(2 * hidden);
                cell.activate(0, zr);
                let reset = &zr[hidden..];
                if reset_first {
                    let h = &state.h[b * hidden..][..hidden];
                    for ((w, &r), &h) in state.work[b * hidden..][..hidden].iter_mut().zip(reset).zip(h) {
                        *w = r.mul(h);
                    }
                } else {
                    add_product(candidate, reset, &state.recurrent[b * gates + 2 * hidden..][..hidden]);
                }
            }
            if reset_first {
                let shape = (batch, hidden, hidden);
                product_nt(pool, shape, state.work, &cell.r[2 * hidden * hidden..], state.recurrent);
            }
            for b in (0..batch).filter(|&b| live(b)) {
                let (zr, candidate) = rows[b * gates..][..gates].split_at_mut(2 * hidden);
                if reset_first {
                    add_to(candidate, &state.recurrent[b * hidden..][..hidden]);
                    if let Some((_, recurrent)) = cell.bias {
                        add_to(candidate, &recurrent[2 * hidden..]);
                    }
                }
                cell.activate(1, candidate);
                for ((h, &z), &new) in state.h[b * hidden..][..hidden].iter_mut().zip(&*zr).zip(&*candidate) {
                    *h = T::ONE.sub(z).mul(new).add(z.mul(*h));
                }
            }
        }
    }
}

/// One step of one sequence; `row` holds the gates' operands in the order input, output, forget, cell.
fn lstm_step<T: Compute>(
    cell: &CellWeights<'_, T>,
    input_forget: bool,
    row: &mut [T],
    h: &mut [T],
    c: &mut [T],
) {
    let hidden = h.len();
    let (input, rest) = row.split_at_mut(hidden);
    let (output, rest) = rest.split_at_mut(hidden);
    let (forget, candidate) = rest.split_at_mut(hidden);
    if let Some(p) = cell.peepholes {
        add_product(input, &p[..hidden], c);
        add_product(forget, &p[2 * hidden..], c);
    }
    cell.activate(0, input);
    if input_forget {
        for (f, &i) in forget.iter_mut().zip(&*input) {
            *f = T::ONE.sub(i);
        }
    } else {
        cell.activate(0, forget);
    }
    cell.activate(1, candidate);
    for (((c, &f), &i), &new) in c.iter_mut().zip(&*forget).zip(&*input).zip(&*candidate) {
        *c = f.mul(*c).add(i.mul(new));
    }
    if let Some(p) = cell.peepholes {
        add_product(output, &p[hidden..2 * hidden], c);
    }
    cell.activate(0, output);
    h.copy_from_slice(c);
    (cell.activations[2])(h);
    for (h, &o) in h.iter_mut().zip(&*output) {
        *h = h.mul(o);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn wave(n: usize, seed: f64) -> Vec<f64> {
        (0..n).map(|i| ((i as f64 + seed) * 1.37).sin() * 0.7).collect()
    }

    fn sigmoid(v: &mut [f64]) {
        v.iter_mut().for_each(|v| *v = 1.0 / (1.0 + (-*v).exp()));
    }

    fn tanh(v: &mut [f64]) {
        v.iter_mut().for_each(|v| *v = v.tanh());
    }

    struct Case {
        shape: RecurrentShape,
        x: Vec<f64>,
        w: Vec<f64>,
        r: Vec<f64>,
        bias: Vec<f64>,
        peepholes: Vec<f64>,
        lengths: Vec<i32>,
    }

    impl Case {
        fn new(cell: Cell, steps: usize, batch: usize, directions: usize) -> Case {
            let (input, hidden) = (5, 3);
            let shape = RecurrentShape {
                cell,
                steps,
                batch,
                input,
                hidden,
                directions,
                reverse: false,
                batch_first: false,
            };
            let gates = cell.gates() * hidden;
            Case {
                shape,
                x: wave(steps * batch * input, 1.0),
                w: wave(directions * gates * input, 2.0),
                r: wave(directions * gates * hidden, 3.0),
                bias: wave(directions * 2 * gates, 4.0),
                peepholes: wave(directions * 3 * hidden, 5.0),
                lengths: (0..batch).map(|b| (b * 7 % (steps + 1)) as i32).collect(),
            }
        }

        /// Result, last hidden state, last cell state.
        fn run(&self, threads: usize) -> [Vec<f64>; 3] {
            let s = &self.shape;
            let lstm = matches!(s.cell, Cell::Lstm { .. });
            let gru = matches!(s.cell, Cell::Gru { .. });
            let operands = RecurrentOperands {
                x: &self.x,
                w: &self.w,
                r: &self.r,
                bias: Some(&self.bias),
                lengths: Some(&self.lengths),
                initial_h: None,
                initial_c: None,
                peepholes: lstm.then_some(&self.peepholes[..]),
                clip: None,
            };
            let f: ActivationFn<f64> = if lstm || gru { &sigmoid } else { &tanh };
            let acts = [[f, &tanh, &tanh], [f, &tanh, &tanh]];
            let mut y = vec![9.0; s.steps * s.directions * s.batch * s.hidden];
            let mut h = vec![9.0; s.directions * s.batch * s.hidden];
            let mut c = h.clone();
            let mut scratch = vec![7.0; s.scratch_len()];
            let mut results = RecurrentResults { y: Some(&mut y), h: Some(&mut h), c: Some(&mut c) };
            recurrent(&ThreadPool::new(threads), s, &operands, &acts, &mut results, &mut scratch);
            [y, h, c]
        }

        /// One sequence in one direction, spelled out scalar by scalar.
        fn naive(&self, direction: usize, b: usize) -> (Vec<Option<Vec<f64>>>, Vec<f64>) {
            let s = &self.shape;
            let (g, n) = (s.cell.gates(), s.hidden);
            let sig = |x: f64| 1.0 / (1.0 + (-x).exp());
            let (mut h, mut c) = (vec![0.0; n], vec![0.0; n]);
            let mut y = vec![None; s.steps];
            let length = self.lengths[b] as usize;
            for step in 0..length {
                let t = if s.reverse || direction == 1 { length - 1 - step } else { step };
                let wx = |row: usize| -> f64 {
                    let row = row + direction * g * n;
                    (0..s.input)
                        .map(|k| self.w[row * s.input + k] * self.x[(t * s.batch + b) * s.input + k])
                        .sum::<f64>()
                        + self.bias[direction * 2 * g * n + row - direction * g * n]
                };
                let rh = |row: usize, h: &[f64]| -> f64 {
                    (0..n).map(|k| self.r[(row + direction * g * n) * n + k] * h[k]).sum::<f64>()
                };
                let rb = |row: usize| self.bias[direction * 2 * g * n + g * n + row];
                let p = |which: usize, j: usize| self.peepholes[direction * 3 * n + which * n + j];
                let mut next = vec![0.0; n];
                let reset: Vec<f64> = match s.cell {
                    Cell::Gru { .. } => {
                        (0..n).map(|j| sig(wx(n + j) + rh(n + j, &h) + rb(n + j)) * h[j]).collect()
                    }
                    _ => Vec::new(),
                };
                for j in 0..n {
                    next[j] = match s.cell {
                        Cell::Rnn => (wx(j) + rh(j, &h) + rb(j)).tanh(),
                        Cell::Lstm { input_forget } => {
                            let i = sig(wx(j) + rh(j, &h) + rb(j) + p(0, j) * c[j]);
                            let f = if input_forget {
                                1.0 - i
                            } else {
                                sig(wx(2 * n + j) + rh(2 * n + j, &h) + rb(2 * n + j) + p(2, j) * c[j])
                            };
                            let new = (wx(3 * n + j) + rh(3 * n + j, &h) + rb(3 * n + j)).tanh();
                            c[j] = f * c[j] + i * new;
                            let o = sig(wx(n + j) + rh(n + j, &h) + rb(n + j) + p(1, j) * c[j]);
                            o * c[j].tanh()
                        }
                        Cell::Gru { linear_before_reset } => {
                            let z = sig(wx(j) + rh(j, &h) + rb(j));
                            let r = sig(wx(n + j) + rh(n + j, &h) + rb(n + j));
                            let k = 2 * n + j;
                            let new = if linear_before_reset {
                                (wx(k) + r * (rh(k, &h) + rb(k))).tanh()
                            } else {
                                (wx(k) + rh(k, &reset) + rb(k)).tanh()
                            };
                            (1.0 - z) * new + z * h[j]
                        }
                    };
                }
                h = next;
                y[t] = Some(h.clone());
            }
            (y, h)
        }
    }

    fn cells() -> impl Strategy<Value = Cell> {
        prop_oneof![
            Just(Cell::Rnn),
            any::<bool>().prop_map(|input_forget| Cell::Lstm { input_forget }),
            any::<bool>().prop_map(|linear_before_reset| Cell::Gru { linear_before_reset }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn every_layer_matches_its_equations(
            cell in cells(), steps in 1usize..80, batch in 1usize..6, directions in 1usize..3, reverse in any::<bool>()
        ) {
            let mut case = Case::new(cell, steps, batch, directions);
            case.shape.reverse = reverse && directions == 1;
            let [y, h, _] = case.run(1);
            let n = case.shape.hidden;
            for d in 0..directions {
                for b in 0..batch {
                    let (expected, last) = case.naive(d, b);
                    for (t, expected) in expected.iter().enumerate() {
                        let row = &y[((t * directions + d) * batch + b) * n..][..n];
                        for j in 0..n {
                            let e = expected.as_ref().map_or(0.0, |e| e[j]);
                            prop_assert!((row[j] - e).abs() < 1e-9, "{t} {d} {b} {j}: {} {e}", row[j]);
                        }
                    }
                    for j in 0..n {
                        prop_assert!((h[(d * batch + b) * n + j] - last[j]).abs() < 1e-9);
                    }
                }
            }
        }

        #[test]
        fn two_directions_are_the_forward_and_the_reverse_one(cell in cells(), steps in 1usize..20, batch in 1usize..4) {
            let both = Case::new(cell, steps, batch, 2);
            let [y, ..] = both.run(2);
            let n = both.shape.hidden;
            for d in 0..2 {
                let mut one = Case::new(cell, steps, batch, 1);
                let half = |v: &[f64]| v[d * v.len() / 2..][..v.len() / 2].to_vec();
                (one.w, one.r, one.bias, one.peepholes) =
                    (half(&both.w), half(&both.r), half(&both.bias), half(&both.peepholes));
                one.shape.reverse = d == 1;
                let [single, ..] = one.run(1);
                for t in 0..steps {
                    prop_assert_eq!(
                        &y[(t * 2 + d) * batch * n..][..batch * n],
                        &single[t * batch * n..][..batch * n]
                    );
                }
            }
        }
    }

    #[test]
    fn products_have_the_same_bits_for_any_threads_and_rows() {
        let (rows, columns, depth) = (9, 37, 333);
        let a: Vec<f32> = wave(rows * depth, 0.0).iter().map(|&x| x as f32).collect();
        let b: Vec<f32> = wave(columns * depth, 8.0).iter().map(|&x| x as f32).collect();
        let mut all = vec![0f32; rows * columns];
        product_nt(&ThreadPool::new(3), (rows, columns, depth), &a, &b, &mut all);
        for row in 0..rows {
            let mut one = vec![0f32; columns];
            product_nt(&ThreadPool::new(1), (1, columns, depth), &a[row * depth..], &b, &mut one);
            assert_eq!(one, all[row * columns..][..columns]);
            let exact: f64 = (0..depth).map(|k| f64::from(a[row * depth + k]) * f64::from(b[k])).sum();
            assert!((exact - f64::from(one[0])).abs() < 1e-4);
        }
    }
}
