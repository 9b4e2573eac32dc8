//! Packing a weight piece by piece, as it arrives from a disk, with a factor per output channel.
//!
//! The panels are those of [`pack_conv`](crate::pack_conv), [`pack_kn`](crate::pack_kn) and
//! [`pack_nk`](crate::pack_nk): packing all rows in any number of pieces gives the same bytes as packing at once.

use crate::conv::{ConvShape, conv_packed_len};
use crate::gemm::{GRAIN, PANEL, packed_len};

/// Side of the squares in which rows are transposed: a cache line.
const SQUARE: usize = 16;

/// Where panels of a `[k, n]` matrix start, and how wide they are.
fn panel(k: usize, n: usize, column: usize) -> (usize, usize, usize) {
    let first = column / PANEL * PANEL;
    let columns = PANEL.min(n - first);
    (first * k, columns.next_multiple_of(GRAIN), columns)
}

/// Packs output columns `first..first + count` of a `[n, k]` matrix, given row by row; `place(i)` is the packed row of
/// stored element `i`.
fn pack_columns(
    k: usize,
    n: usize,
    first: usize,
    rows: &[f32],
    scale: impl Fn(usize) -> f32,
    place: impl Fn(usize) -> usize,
    out: &mut [f32],
) {
    let count = rows.len() / k.max(1);
    let mut done = 0;
    while done < count {
        let column = first + done;
        let (start, width, columns) = panel(k, n, column);
        let inside = column % PANEL;
        // All columns of this call that lie in this panel, together, so that writes are runs.
        let run = (count - done).min(columns - inside);
        let factors: [f32; PANEL] = std::array::from_fn(|j| if j < run { scale(column + j) } else { 0.0 });
        // Square by square, so that every cache line of the rows is read once: rows a power of two apart would push
        // each other out of the cache.
        for i in (0..k).step_by(SQUARE) {
            let depth = SQUARE.min(k - i);
            for j in (0..run).step_by(SQUARE) {
                let across = SQUARE.min(run - j);
                let mut square = [[0f32; SQUARE]; SQUARE];
                for (j, line) in (done + j..).zip(&mut square[..across]) {
                    line[..depth].copy_from_slice(&rows[j * k + i..][..depth]);
                }
                let factors = &factors[j..j + across];
                for depth in 0..depth {
                    let target = &mut out[start + place(i + depth) * width + inside + j..][..across];
                    for ((t, line), factor) in target.iter_mut().zip(&square).zip(factors) {
                        *t = line[depth] * factor;
                    }
                }
            }
        }
        if inside + run == columns {
            for row in out[start..][..k * width].chunks_exact_mut(width) {
                row[columns..].fill(0.0);
            }
        }
        done += run;
    }
}

/// Packs output channels `first_row..` of weights given as `[out_c, in_c / groups, kernel_h, kernel_w]`: `rows` holds
/// whole output channels, each multiplied by its `scale` if there is one. `out` is the whole packed weight, of
/// [`conv_packed_len`] values.
///
/// # Panics
/// Panics when a slice is too short or `rows` does not end at a channel.
pub fn pack_conv_rows(
    shape: &ConvShape,
    first_row: usize,
    rows: &[f32],
    scale: Option<&[f32]>,
    out: &mut [f32],
) {
    let taps = shape.kernel[0] * shape.kernel[1];
    let in_c = shape.in_c / shape.groups;
    let k = taps * in_c;
    assert!(out.len() >= conv_packed_len(shape), "{} packed values for {shape:?}", out.len());
    assert!(rows.len().is_multiple_of(k.max(1)), "{} values are no whole rows of {k}", rows.len());
    let scale = |channel: usize| scale.map_or(1.0, |s| s[channel]);
    if shape.is_depthwise() {
        for (i, row) in rows.chunks_exact(taps).enumerate() {
            let channel = first_row + i;
            for (tap, w) in row.iter().enumerate() {
                out[tap * shape.out_c + channel] = w * scale(channel);
            }
        }
        return;
    }
    let out_c = shape.out_c / shape.groups;
    let len = packed_len(k, out_c);
    let mut done = 0;
    let count = rows.len() / k.max(1);
    while done < count {
        let row = first_row + done;
        let (group, column) = (row / out_c, row % out_c);
        let run = (count - done).min(out_c - column);
        pack_columns(
            k,
            out_c,
            column,
            &rows[done * k..(done + run) * k],
            |column| scale(group * out_c + column),
            // Stored as (channel, tap), packed as (tap, channel).
            |i| (i % taps) * in_c + i / taps,
            &mut out[group * len..][..len],
        );
        done += run;
    }
}

/// Packs rows `first_row..` of a `[k, n]` matrix; columns are multiplied by `scale` if there is one. `out` is the whole
/// packed weight, of [`packed_len`]`(k, n)` values.
///
/// # Panics
/// Panics when a slice is too short.
pub fn pack_kn_rows(
    k: usize,
    n: usize,
    first_row: usize,
    rows: &[f32],
    scale: Option<&[f32]>,
    out: &mut [f32],
) {
    assert!(out.len() >= packed_len(k, n), "{} packed values for {k} x {n}", out.len());
    for (i, row) in rows.chunks_exact(n.max(1)).enumerate() {
        for column in (0..n).step_by(PANEL) {
            let (start, width, columns) = panel(k, n, column);
            let target = &mut out[start + (first_row + i) * width..][..width];
            let source = &row[column..column + columns];
            match scale {
                None => target[..columns].copy_from_slice(source),
                Some(s) => {
                    for ((t, x), f) in target.iter_mut().zip(source).zip(&s[column..]) {
                        *t = x * f;
                    }
                }
            }
            target[columns..].fill(0.0);
        }
    }
}

/// Packs rows `first_row..` of a matrix given transposed, as `[n, k]`; each row is multiplied by its `scale` if there
/// is one. `out` is the whole packed weight, of [`packed_len`]`(k, n)` values.
///
/// # Panics
/// Panics when a slice is too short.
pub fn pack_nk_rows(
    k: usize,
    n: usize,
    first_row: usize,
    rows: &[f32],
    scale: Option<&[f32]>,
    out: &mut [f32],
) {
    assert!(out.len() >= packed_len(k, n), "{} packed values for {k} x {n}", out.len());
    pack_columns(k, n, first_row, rows, |column| scale.map_or(1.0, |s| s[column]), |i| i, out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{pack_conv, pack_kn, pack_nk};

    fn values(len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919) % 1013) as f32 - 500.0).collect()
    }

    #[test]
    fn pieces_pack_like_the_whole() {
        for (k, n) in [(1, 1), (3, 64), (5, 65), (17, 130), (9, 16), (4, 200), (50, 77)] {
            let w = values(k * n);
            for piece in [1, 2, 3, 7, 1000] {
                let (mut whole, mut pieces) = (vec![9.0; packed_len(k, n)], vec![7.0; packed_len(k, n)]);
                pack_kn(k, n, &w, n, &mut whole);
                for (i, rows) in w.chunks(piece * n).enumerate() {
                    pack_kn_rows(k, n, i * piece, rows, None, &mut pieces);
                }
                assert_eq!(whole, pieces, "kn {k} {n} {piece}");
                let (mut whole, mut pieces) = (vec![9.0; packed_len(k, n)], vec![7.0; packed_len(k, n)]);
                pack_nk(k, n, &w, k, &mut whole);
                for (i, rows) in w.chunks(piece * k).enumerate() {
                    pack_nk_rows(k, n, i * piece, rows, None, &mut pieces);
                }
                assert_eq!(whole, pieces, "nk {k} {n} {piece}");
            }
        }
    }

    #[test]
    fn bytes_pack_like_the_whole() {
        use crate::{
            conv_packed_bytes_len, pack_bytes, pack_bytes_rows, pack_conv_bytes, pack_conv_bytes_rows,
            packed_bytes_len,
        };
        for (k, n) in [(1, 1), (5, 65), (18, 130), (4, 16), (150, 70), (128, 33)] {
            let w: Vec<u8> = (0..k * n).map(|i| ((i * 7919) % 251) as u8).collect();
            let (mut whole, mut sums) = (vec![9; packed_bytes_len(k, n)], vec![9; n]);
            pack_bytes(k, n, &w, false, true, &mut whole, &mut sums);
            for piece in [1, 3, 64, 1000] {
                let (mut pieces, mut piece_sums) = (vec![7; packed_bytes_len(k, n)], vec![7; n]);
                for (i, rows) in w.chunks(piece * k).enumerate() {
                    pack_bytes_rows(k, n, i * piece, rows, false, &mut pieces, &mut piece_sums);
                }
                assert_eq!((&whole, &sums), (&pieces, &piece_sums), "{k} {n} {piece}");
            }
        }
        for (in_c, out_c, kernel, groups) in
            [(3, 70, [3, 3], 1), (8, 12, [1, 1], 2), (150, 70, [1, 1], 1), (6, 6, [5, 3], 6)]
        {
            let shape = ConvShape {
                in_h: 9,
                in_w: 9,
                in_c,
                out_h: 9,
                out_w: 9,
                out_c,
                kernel,
                stride: [1, 1],
                dilation: [1, 1],
                pads: [1, 1, 1, 1],
                groups,
            };
            let row = in_c / groups * kernel[0] * kernel[1];
            let w: Vec<u8> = (0..out_c * row).map(|i| ((i * 7919) % 251) as u8).collect();
            let len = conv_packed_bytes_len(&shape);
            let (mut whole, mut sums) = (vec![9; len], vec![9; out_c]);
            pack_conv_bytes(&shape, &w, true, &mut whole, &mut sums);
            for piece in [1, 5, 1000] {
                let (mut pieces, mut piece_sums) = (vec![7; len], vec![7; out_c]);
                for (i, rows) in w.chunks(piece * row).enumerate() {
                    pack_conv_bytes_rows(&shape, i * piece, rows, true, &mut pieces, &mut piece_sums);
                }
                assert_eq!((&whole, &sums), (&pieces, &piece_sums), "{shape:?} {piece}");
            }
        }
    }

    #[test]
    fn convolutions_pack_like_the_whole() {
        for (in_c, out_c, kernel, groups) in
            [(3, 70, [3, 3], 1), (8, 12, [1, 1], 2), (6, 6, [5, 3], 6), (4, 130, [1, 3], 2)]
        {
            let shape = ConvShape {
                in_h: 9,
                in_w: 9,
                in_c,
                out_h: 9,
                out_w: 9,
                out_c,
                kernel,
                stride: [1, 1],
                dilation: [1, 1],
                pads: [1, 1, 1, 1],
                groups,
            };
            let row = in_c / groups * kernel[0] * kernel[1];
            let w = values(out_c * row);
            let mut whole = vec![9.0; conv_packed_len(&shape)];
            pack_conv(&shape, &w, &mut whole);
            for piece in [1, 3, 64, 1000] {
                let mut pieces = vec![7.0; conv_packed_len(&shape)];
                for (i, rows) in w.chunks(piece * row).enumerate() {
                    pack_conv_rows(&shape, i * piece, rows, None, &mut pieces);
                }
                assert_eq!(whole, pieces, "{shape:?} {piece}");
                let scale: Vec<f32> = (0..out_c).map(|c| c as f32).collect();
                let scaled: Vec<f32> = w.iter().enumerate().map(|(i, x)| x * scale[i / row]).collect();
                let mut expected = vec![9.0; conv_packed_len(&shape)];
                pack_conv(&shape, &scaled, &mut expected);
                for (i, rows) in w.chunks(piece * row).enumerate() {
                    pack_conv_rows(&shape, i * piece, rows, Some(&scale), &mut pieces);
                }
                assert_eq!(expected, pieces, "{shape:?} {piece} scaled");
            }
        }
    }
}
