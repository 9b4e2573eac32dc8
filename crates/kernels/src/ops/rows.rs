//! Sharing the rows of a result out over threads.

use crate::ThreadPool;

/// A buffer that tasks on several threads write, each its own part.
pub(crate) struct Shared<T> {
    first: *mut T,
    len: usize,
}

// SAFETY: the pointer may move between threads; `slice` says who may follow it.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// Takes the place of `buffer` for as long as the caller keeps it borrowed.
    pub(crate) fn new(buffer: &mut [T]) -> Shared<T> {
        Shared { first: buffer.as_mut_ptr(), len: buffer.len() }
    }

    /// `count` elements from `from`.
    ///
    /// # Safety
    /// No two live slices may overlap, and the buffer must still be borrowed.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, from: usize, count: usize) -> &mut [T] {
        assert!(from <= self.len && count <= self.len - from);
        // SAFETY: in bounds by the assertion; unaliased and alive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(from), count) }
    }
}

/// Calls `task(first row, rows, scratch)` for stretches of `rows_per_task` rows of `out`, and gives each thread its
/// own equal part of `scratch`.
pub fn parallel_rows_with_scratch<T: Send, S: Send>(
    pool: &ThreadPool,
    out: &mut [T],
    row_len: usize,
    rows_per_task: usize,
    scratch: &mut [S],
    task: &(dyn Fn(usize, &mut [T], &mut [S]) + Sync),
) {
    let rows = out.len().checked_div(row_len).unwrap_or(0);
    let rows_per_task = rows_per_task.max(1);
    let per_thread = scratch.len() / pool.threads();
    let (out, scratch) = (Shared::new(&mut out[..rows * row_len]), Shared::new(scratch));
    pool.parallel_for(rows.div_ceil(rows_per_task), &|index, worker| {
        let first = index * rows_per_task;
        let count = rows_per_task.min(rows - first);
        // SAFETY: stretches of different tasks do not overlap, and calls that run at the same time have different
        // workers; both buffers stay borrowed until `parallel_for` returns.
        let (rows, scratch) = unsafe {
            (out.slice(first * row_len, count * row_len), scratch.slice(worker * per_thread, per_thread))
        };
        task(first, rows, scratch);
    });
}

/// Calls `task(first row, rows)` for stretches of `rows_per_task` rows of `out`.
pub fn parallel_rows<T: Send>(
    pool: &ThreadPool,
    out: &mut [T],
    row_len: usize,
    rows_per_task: usize,
    task: &(dyn Fn(usize, &mut [T]) + Sync),
) {
    parallel_rows_with_scratch::<T, u8>(pool, out, row_len, rows_per_task, &mut [], &|first, rows, _| {
        task(first, rows);
    });
}
