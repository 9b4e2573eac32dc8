//! Operators that move elements.

use super::add_to;
use crate::ThreadPool;
use crate::ops::Along;
use crate::ops::real::Real;
use crate::ops::rows::parallel_rows;

/// Adds rows of `dy` up where they were taken from. `table` has the sizes of the table around the axis; `index(i)` is the
/// place along it of the `i`-th of `count` taken slices, in range.
pub fn gather_grad<T: Real>(
    pool: &ThreadPool,
    table: Along,
    count: usize,
    index: &(dyn Fn(usize) -> usize + Sync),
    dy: &[T],
    dx: &mut [T],
) {
    let row = table.size * table.inner;
    parallel_rows(pool, dx, row, 1, &|first, dx| {
        for (r, dx) in dx.chunks_exact_mut(row).enumerate() {
            dx.fill(T::from_f64(0.0));
            let dy = &dy[(first + r) * count * table.inner..][..count * table.inner];
            for i in 0..count {
                let to = index(i) * table.inner;
                for (to, g) in dx[to..to + table.inner].iter_mut().zip(&dy[i * table.inner..]) {
                    add_to(to, g.to_f64());
                }
            }
        }
    });
}
