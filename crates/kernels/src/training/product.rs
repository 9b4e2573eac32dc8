//! Products of two matrices neither of which is a constant.

use super::outer::{Outer, Plain, plain_scratch_len};
use crate::arch::dispatch;
use crate::epilogue::{ActivateRows, Activation, check_rows};
use crate::gemm::{GRAIN, PANEL, Panels, Product, Strided, packed_len};
use crate::matmul::Matrices;
use crate::threads::{Shareable, ThreadPool};

/// Which operands of a product lie transposed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Transposed {
    /// A is stored as `[k, m]`.
    pub a: bool,
    /// B is stored as `[n, k]`.
    pub b: bool,
}

/// Values of packed B that are made at a time.
const CHUNK: usize = 1 << 20;
/// Below this many rows packing costs more than it brings.
const ROWS_MIN: usize = 32;
/// Values of K per packing task.
const PACK_ROWS: usize = 256;

fn chunk_columns(n: usize, k: usize) -> usize {
    ((CHUNK / k.max(1)) / PANEL * PANEL).max(PANEL).min(n.next_multiple_of(PANEL))
}

fn reads_plain(m: usize, n: usize, transposed: Transposed, alpha: f32) -> bool {
    !transposed.b && alpha == 1.0 && n.is_multiple_of(GRAIN) && m < ROWS_MIN
}

/// Products that are shared out matrix by matrix rather than cut.
fn by_matrix(batch: usize, [m, n, k]: [usize; 3], threads: usize) -> bool {
    batch >= 2 * threads && packed_len(k, n) <= CHUNK / 4 && m * n * k <= 64 << 20
}

/// A batch that shares B is one tall product.
fn folded(
    batch: usize,
    [m, n, k]: [usize; 3],
    a_at: Matrices,
    b_at: Matrices,
    c_at: Matrices,
    transposed: Transposed,
) -> (usize, [usize; 3]) {
    let tall = !transposed.a
        && b_at.batch_stride == 0
        && a_at.batch_stride == m * a_at.row_stride
        && c_at.batch_stride == m * c_at.row_stride;
    if tall { (1, [m * batch, n, k]) } else { (batch, [m, n, k]) }
}

/// Values of scratch that [`product`] needs on a pool of `threads` threads.
pub fn product_scratch_len(batch: usize, shape: [usize; 3], transposed: Transposed, threads: usize) -> usize {
    let [m, n, k] = shape;
    // A product that is folded needs no more than one that is not.
    let tall = if transposed.a { 0 } else { packed_len(k, chunk_columns(n, k)) };
    let outer = if transposed.a {
        let turned = if transposed.b { n * k } else { 0 };
        let one = if transposed.b { plain_scratch_len(1, m, n, k, threads) } else { 0 };
        turned + plain_scratch_len(batch, m, n, k, threads).max(one)
    } else {
        0
    };
    let each = if by_matrix(batch, shape, threads) && !transposed.a { threads * packed_len(k, n) } else { 0 };
    tall.max(outer).max(each)
}

/// `C[i] = activation(alpha · A[i]' B[i]' + bias + residual[i])` for `i < batch`: A is `[m, k]`, B is `[k, n]`, C is
/// `[m, n]`, and what is `transposed` is stored the other way round; the residual lies as C. `scratch` has
/// [`product_scratch_len`] values. A batch stride of 0 repeats a matrix.
///
/// # Panics
/// Panics when a slice is too short for its shape, and for a residual with A transposed.
pub fn product(
    pool: &ThreadPool,
    batch: usize,
    shape: [usize; 3],
    alpha: f32,
    a: &[f32],
    a_at: Matrices,
    b: &[f32],
    b_at: Matrices,
    transposed: Transposed,
    c: &mut [f32],
    c_at: Matrices,
    bias: Option<&[f32]>,
    residual: Option<&[f32]>,
    activation: Activation,
    scratch: &mut [f32],
) {
    let check = |what: &str, len: usize, rows: usize, columns: usize, at: Matrices| {
        if batch > 0 {
            check_rows(what, len.saturating_sub((batch - 1) * at.batch_stride), rows, columns, at.row_stride);
        }
    };
    let [m, n, k] = shape;
    let (a_rows, a_columns) = if transposed.a { (k, m) } else { (m, k) };
    let (b_rows, b_columns) = if transposed.b { (n, k) } else { (k, n) };
    check("A", a.len(), a_rows, a_columns, a_at);
    check("B", b.len(), b_rows, b_columns, b_at);
    check("C", c.len(), m, n, c_at);
    assert!(
        batch <= 1 || m == 0 || c_at.batch_stride >= (m - 1) * c_at.row_stride + n,
        "matrices of C overlap"
    );
    assert!(bias.is_none_or(|b| b.len() >= n), "bias is shorter than a row of {n}");
    if let Some(residual) = residual {
        check("residual", residual.len(), m, n, c_at);
        assert!(!transposed.a, "a product with A transposed takes no residual");
    }
    let need = product_scratch_len(batch, shape, transposed, pool.threads());
    assert!(scratch.len() >= need, "scratch has {} values, {need} needed", scratch.len());
    let (batch, [m, n, k]) = folded(batch, shape, a_at, b_at, c_at, transposed);
    if batch == 0 || m == 0 || n == 0 {
        return;
    }
    if transposed.a {
        return transposed_a(
            pool,
            batch,
            [m, n, k],
            alpha,
            a,
            a_at,
            b,
            b_at,
            transposed.b,
            c,
            c_at,
            bias,
            activation,
            scratch,
        );
    }
    let c = Shareable(c.as_mut_ptr());
    let bias = bias.map_or(std::ptr::null(), <[f32]>::as_ptr);
    let at = |p: *const f32, n: usize| if p.is_null() { p } else { p.wrapping_add(n) };
    let bias = Shareable(bias.cast_mut());
    let residual = Shareable(residual.map_or(std::ptr::null(), <[f32]>::as_ptr).cast_mut());
    let build = |index: usize, first: usize, columns: usize, panels: Panels| Product {
        source: Strided { data: a[index * a_at.batch_stride..].as_ptr(), stride: a_at.row_stride, k },
        rows: m,
        columns,
        panels,
        c: Shareable(c.get().wrapping_add(index * c_at.batch_stride + first)),
        c_stride: c_at.row_stride,
        bias: at(bias.get(), first),
        residual: at(residual.get(), index * c_at.batch_stride + first),
        residual_stride: c_at.row_stride,
        activation,
    };
    let plain = reads_plain(m, n, transposed, alpha);
    let source = |index: usize| Source {
        data: &b[index * b_at.batch_stride..],
        stride: b_at.row_stride,
        transposed: transposed.b,
        alpha,
    };
    if by_matrix(batch, [m, n, k], pool.threads()) {
        let len = packed_len(k, n);
        let scratch = Shareable(scratch.as_mut_ptr());
        pool.parallel_for(batch, &|index, worker| {
            let panels = if plain {
                Panels { data: b[index * b_at.batch_stride..].as_ptr(), plain_stride: b_at.row_stride.max(1) }
            } else {
                // SAFETY: every worker has a part of the scratch of its own.
                let packed = unsafe { std::slice::from_raw_parts_mut(scratch.get().add(worker * len), len) };
                for panel in 0..n.div_ceil(PANEL) {
                    let width = PANEL.min(n - panel * PANEL).next_multiple_of(GRAIN);
                    let panel_out = &mut packed[panel * PANEL * k..][..k * width];
                    source(index).pack(panel * PANEL, PANEL.min(n - panel * PANEL), 0..k, panel_out);
                }
                Panels { data: packed.as_ptr(), plain_stride: 0 }
            };
            build(index, 0, n, panels).run_part(pool, 0..m, 0..n.div_ceil(PANEL));
        });
        return;
    }
    for index in 0..batch {
        if plain {
            let data = b[index * b_at.batch_stride..].as_ptr();
            build(index, 0, n, Panels { data, plain_stride: b_at.row_stride.max(1) }).run(pool);
            continue;
        }
        let step = chunk_columns(n, k);
        for first in (0..n).step_by(step) {
            let columns = step.min(n - first);
            pack_parallel(pool, &source(index), first, columns, k, scratch);
            build(index, first, columns, Panels { data: scratch.as_ptr(), plain_stride: 0 }).run(pool);
        }
    }
}

/// A matrix to be packed, times a factor.
#[derive(Clone, Copy)]
struct Source<'a> {
    data: &'a [f32],
    stride: usize,
    transposed: bool,
    alpha: f32,
}

impl Source<'_> {
    /// Rows `rows` of the panel of `columns` columns from `first` on, into `out`.
    fn pack(&self, first: usize, columns: usize, rows: std::ops::Range<usize>, out: &mut [f32]) {
        let width = columns.next_multiple_of(GRAIN);
        if self.transposed {
            pack_turned(self.data, self.stride, first, columns, rows.clone(), self.alpha, out);
        } else {
            for (row, to) in rows.zip(out.chunks_exact_mut(width)) {
                let from = &self.data[row * self.stride + first..][..columns];
                if self.alpha == 1.0 {
                    to[..columns].copy_from_slice(from);
                } else {
                    for (t, f) in to.iter_mut().zip(from) {
                        *t = f * self.alpha;
                    }
                }
                to[columns..].fill(0.0);
            }
        }
    }
}

/// Packs columns `first..` of a matrix that is stored transposed: value `(row, column)` lies at
/// `data[column * stride + row]`. Square by square, so that each cache line is read once.
fn pack_turned(
    data: &[f32],
    stride: usize,
    first: usize,
    columns: usize,
    rows: std::ops::Range<usize>,
    alpha: f32,
    out: &mut [f32],
) {
    const SQUARE: usize = 16;
    let width = columns.next_multiple_of(GRAIN);
    for i in rows.clone().step_by(SQUARE) {
        let depth = SQUARE.min(rows.end - i);
        for j in (0..width).step_by(SQUARE) {
            let mut square = [[0f32; SQUARE]; SQUARE];
            for (column, line) in (j..columns.min(j + SQUARE)).zip(&mut square) {
                line[..depth].copy_from_slice(&data[(first + column) * stride + i..][..depth]);
            }
            for d in 0..depth {
                let to = &mut out[(i - rows.start + d) * width + j..][..SQUARE];
                for (t, line) in to.iter_mut().zip(&square) {
                    *t = line[d] * alpha;
                }
            }
        }
    }
}

/// Packs columns `first..first + columns` on all threads.
fn pack_parallel(
    pool: &ThreadPool,
    source: &Source<'_>,
    first: usize,
    columns: usize,
    k: usize,
    scratch: &mut [f32],
) {
    let out = Shareable(scratch[..packed_len(k, columns)].as_mut_ptr());
    let pieces = k.div_ceil(PACK_ROWS).max(1);
    pool.parallel_for(columns.div_ceil(PANEL) * pieces, &|index, _| {
        let (panel, piece) = (index / pieces, index % pieces);
        let here = PANEL.min(columns - panel * PANEL);
        let width = here.next_multiple_of(GRAIN);
        let rows = piece * PACK_ROWS..k.min((piece + 1) * PACK_ROWS);
        let at = panel * PANEL * k + rows.start * width;
        // SAFETY: tasks write disjoint parts of the packed matrix.
        let to = unsafe { std::slice::from_raw_parts_mut(out.get().add(at), rows.len() * width) };
        source.pack(first + panel * PANEL, here, rows, to);
    });
}

fn transposed_a(
    pool: &ThreadPool,
    batch: usize,
    [m, n, k]: [usize; 3],
    alpha: f32,
    a: &[f32],
    a_at: Matrices,
    b: &[f32],
    b_at: Matrices,
    b_transposed: bool,
    c: &mut [f32],
    c_at: Matrices,
    bias: Option<&[f32]>,
    activation: Activation,
    scratch: &mut [f32],
) {
    let out = Shareable(c.as_mut_ptr());
    let isa = pool.isa();
    let sink = |base: usize| {
        move |index: usize, rows: std::ops::Range<usize>, block: usize, values: *mut f32, stride: usize| {
            let first = block * 128;
            let columns = 128.min(n - first);
            for (i, row) in rows.clone().enumerate() {
                // SAFETY: blocks are disjoint parts of C; the values of the block are this call's.
                let (from, to) = unsafe {
                    let at = base + index * c_at.batch_stride + row * c_at.row_stride + first;
                    (
                        std::slice::from_raw_parts(values.add(i * stride), columns),
                        std::slice::from_raw_parts_mut(out.get().add(at), columns),
                    )
                };
                match bias {
                    None => to.iter_mut().zip(from).for_each(|(t, f)| *t = f * alpha),
                    Some(bias) => {
                        for ((t, f), b) in to.iter_mut().zip(from).zip(&bias[first..]) {
                            *t = f * alpha + b;
                        }
                    }
                }
                if activation != Activation::None {
                    let data = to.as_mut_ptr();
                    dispatch(isa, ActivateRows { activation, data, rows: 1, n: columns, stride: columns });
                }
            }
        }
    };
    if !b_transposed {
        let columns =
            Plain { data: b.as_ptr(), batch_stride: b_at.batch_stride, row_stride: b_at.row_stride, n };
        let outer = Outer {
            a: a.as_ptr(),
            a_batch: a_at.batch_stride,
            a_stride: a_at.row_stride,
            batch,
            m,
            k,
            columns: &columns,
        };
        return outer.run(pool, scratch, &sink(0));
    }
    // Both transposed: B is turned first; this form does not occur in gradients of layers.
    for index in 0..batch {
        let (turned, rest) = scratch.split_at_mut(n * k);
        crate::transpose(pool, n, k, &b[index * b_at.batch_stride..], b_at.row_stride, turned, n);
        let columns = Plain { data: turned.as_ptr(), batch_stride: 0, row_stride: n, n };
        let a = a[index * a_at.batch_stride..].as_ptr();
        let outer = Outer { a, a_batch: 0, a_stride: a_at.row_stride, batch: 1, m, k, columns: &columns };
        outer.run(pool, rest, &sink(index * c_at.batch_stride));
    }
}
