//! Weights into panels.

use super::{GRAIN, PANEL};

/// Values that the panels of a `[k, n]` matrix take.
pub fn packed_len(k: usize, n: usize) -> usize {
    k * n.next_multiple_of(GRAIN)
}

/// Packs B given as `[k, n]` with row distance `stride` into `out` of [`packed_len`]`(k, n)` values.
///
/// # Panics
/// Panics when a slice is too short.
pub fn pack_kn(k: usize, n: usize, b: &[f32], stride: usize, out: &mut [f32]) {
    crate::epilogue::check_rows("B", b.len(), k, n, stride);
    let mut rest = &mut out[..packed_len(k, n)];
    for column in (0..n).step_by(PANEL) {
        let columns = PANEL.min(n - column);
        let width = columns.next_multiple_of(GRAIN);
        let (panel, tail) = rest.split_at_mut(k * width);
        for (row, to) in panel.chunks_exact_mut(width).enumerate() {
            to[..columns].copy_from_slice(&b[row * stride + column..][..columns]);
            to[columns..].fill(0.0);
        }
        rest = tail;
    }
}

/// Packs B given transposed, as `[n, k]` with row distance `stride`, into `out` of [`packed_len`]`(k, n)` values.
///
/// # Panics
/// Panics when a slice is too short.
pub fn pack_nk(k: usize, n: usize, b: &[f32], stride: usize, out: &mut [f32]) {
    crate::epilogue::check_rows("B", b.len(), n, k, stride);
    pack_with(k, n, &mut out[..packed_len(k, n)], |row, column| b[column * stride + row]);
}

/// Packs the matrix whose element (row of K, column) is `at(row, column)`. Works through blocks of rows, so
/// that a transposed source is read by whole cache lines.
pub(crate) fn pack_with<T: Copy + Default>(
    k: usize,
    n: usize,
    out: &mut [T],
    at: impl Fn(usize, usize) -> T,
) {
    const BLOCK: usize = 16;
    let mut rest = out;
    for column in (0..n).step_by(PANEL) {
        let columns = PANEL.min(n - column);
        let width = columns.next_multiple_of(GRAIN);
        let (panel, tail) = rest.split_at_mut(k * width);
        for (block, to) in panel.chunks_mut(width * BLOCK).enumerate() {
            let rows = to.len() / width;
            for j in 0..columns {
                for i in 0..rows {
                    to[i * width + j] = at(block * BLOCK + i, column + j);
                }
            }
            for i in 0..rows {
                to[i * width + columns..(i + 1) * width].fill(T::default());
            }
        }
        rest = tail;
    }
}
