//! Transposition, and with it the way between planes and channels last.

use crate::threads::{Shareable, ThreadPool};

/// Transposes `input`, `[rows, columns]` with row distance `in_stride`, into `output`, `[columns, rows]` with row
/// distance `out_stride`. `[C, H * W]` to `[H * W, C]` turns planes into channels last.
///
/// # Panics
/// Panics when a slice is too short.
pub fn transpose<T: Copy + Send + Sync>(
    pool: &ThreadPool,
    rows: usize,
    columns: usize,
    input: &[T],
    in_stride: usize,
    output: &mut [T],
    out_stride: usize,
) {
    const BLOCK: usize = 16;
    crate::epilogue::check_rows("input", input.len(), rows, columns, in_stride);
    crate::epilogue::check_rows("output", output.len(), columns, rows, out_stride);
    let few = pool.threads() == 1 || rows * columns < 50_000;
    let step =
        if few { columns } else { columns.div_ceil(pool.threads() * 4).next_multiple_of(BLOCK) }.max(1);
    let out = Shareable(output.as_mut_ptr());
    pool.parallel_for(columns.div_ceil(step), &|index, _| {
        let end = columns.min((index + 1) * step);
        for column in (index * step..end).step_by(BLOCK) {
            let width = BLOCK.min(end - column);
            for row in (0..rows).step_by(BLOCK) {
                let height = BLOCK.min(rows - row);
                for j in 0..width {
                    // SAFETY: column `column + j` of the input is row `column + j` of the output, which holds
                    // `rows` values and belongs to this task alone.
                    let to = unsafe {
                        std::slice::from_raw_parts_mut(out.get().add((column + j) * out_stride + row), height)
                    };
                    for (i, to) in to.iter_mut().enumerate() {
                        *to = input[(row + i) * in_stride + column + j];
                    }
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_value_finds_its_place(rows in 1usize..300, columns in 1usize..300, a in 0usize..3, b in 0usize..3) {
            let (in_stride, out_stride) = (columns + a, rows + b);
            let x: Vec<u32> = (0..(rows * in_stride) as u32).collect();
            let mut y = vec![u32::MAX; columns * out_stride];
            transpose(&ThreadPool::new(2), rows, columns, &x, in_stride, &mut y, out_stride);
            for j in 0..columns {
                for i in 0..rows {
                    prop_assert_eq!(y[j * out_stride + i], x[i * in_stride + j]);
                }
                prop_assert!(y[j * out_stride + rows..(j + 1) * out_stride].iter().all(|&v| v == u32::MAX));
            }
        }
    }
}
