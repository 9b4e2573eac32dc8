//! Rows added up in a table, and axes that change places while rows stay whole.

use super::over_rows;
use crate::threads::{Shareable, ThreadPool};

/// Adds row `i` of `dy` to row `indices[i]` of `dx`, `[rows, n]`, which is zero before; in the order of the indices.
///
/// # Errors
/// The first index that is not in the table.
///
/// # Panics
/// Panics when a slice is too short.
pub fn gather_grad(
    pool: &ThreadPool,
    rows: usize,
    n: usize,
    index: &(dyn Fn(usize) -> i64 + Sync),
    count: usize,
    dy: &[f32],
    dx: &mut [f32],
) -> Result<(), i64> {
    assert!(dy.len() >= count * n && dx.len() >= rows * n, "operands are too short");
    let place = |i: usize| {
        let at = index(i);
        let at = if at < 0 { at + rows as i64 } else { at };
        usize::try_from(at).ok().filter(|&at| at < rows).ok_or(index(i))
    };
    for i in 0..count {
        place(i)?;
    }
    let out = Shareable(dx.as_mut_ptr());
    // Each task owns some rows of the table and looks through all indices.
    let tasks = if pool.threads() == 1 || (rows + count) * n < 65_536 { 1 } else { pool.threads() * 2 };
    let step = rows.div_ceil(tasks).max(1);
    pool.parallel_for(rows.div_ceil(step), &|task, _| {
        let mine = task * step..rows.min((task + 1) * step);
        // SAFETY: tasks own disjoint rows of the table.
        let table = unsafe { std::slice::from_raw_parts_mut(out.get().add(mine.start * n), mine.len() * n) };
        table.fill(0.0);
        for i in 0..count {
            if let Ok(at) = place(i)
                && mine.contains(&at)
            {
                for (t, d) in table[(at - mine.start) * n..][..n].iter_mut().zip(&dy[i * n..]) {
                    *t += d;
                }
            }
        }
    });
    Ok(())
}

/// `[a, b, c, n]` to `[a, c, b, n]`: positions and heads of an attention change places.
///
/// # Panics
/// Panics when a slice is too short.
pub fn swap_middle_axes(pool: &ThreadPool, [a, b, c, n]: [usize; 4], x: &[f32], y: &mut [f32]) {
    assert!(x.len() >= a * b * c * n && y.len() >= a * b * c * n, "operands are too short");
    let out = Shareable(y.as_mut_ptr());
    over_rows(pool, a * c * b, n, &|first, count| {
        let (mut line, mut j) = (first / b, first % b);
        for row in first..first + count {
            let (i, k) = (line / c, line % c);
            let from = &x[((i * b + j) * c + k) * n..][..n];
            // SAFETY: rows of the result are disjoint.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), out.get().add(row * n), n) };
            j += 1;
            if j == b {
                j = 0;
                line += 1;
            }
        }
    });
}
