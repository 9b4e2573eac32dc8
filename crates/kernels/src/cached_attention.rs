//! Attention of decoders: keys and values in a cache of pages, and queries that see the earlier positions of their
//! own sequence.
//!
//! A page holds [`page_len`](CachedAttentionShape::page_len) positions of one layer, its heads one after another. Keys
//! lie in strips of 16 positions with the positions of one element side by side, so that a vector holds as many scores
//! and no sum runs across lanes; values lie row by row. Both are decoded once for all the query heads and all the rows
//! that share them.
//!
//! Scores are taken together in spans of 128 positions, counted from position 0, each with a softmax of its own; the
//! spans of a row are merged from the first to the last. Hence a row of the result has the same bits in whatever call it
//! is computed, beside whatever other rows, on however many threads, and in whatever pages its positions lie. The bits
//! are also the same for AVX2 and AVX-512 (plain Rust has no fused operations).

mod span;
mod store;
#[cfg(test)]
mod tests;

use crate::arch::dispatch;
use crate::threads::{Shareable, ThreadPool};
pub use store::{CachePart, store_in_cache};

/// Positions of one softmax, counted from position 0.
const SPAN: usize = 128;
/// Positions of a strip of keys; pages hold whole strips.
const STRIP: usize = 16;
/// Most query vectors that share decoded keys and values, unless one position has more.
const LANES_MAX: usize = 64;
/// Most rows of a call whose spans are shared out over threads.
const SPLIT_ROWS: usize = 4;
/// Multiplications below which a call is not worth waking threads.
const FEW: usize = 200_000;

/// Element format of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheFormat {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// Signed bytes, every 32 elements of a head with an f16 scale.
    Q8,
}

impl CacheFormat {
    /// Bytes of the `dim` elements that a head has at one position.
    fn row_bytes(self, dim: usize) -> usize {
        match self {
            CacheFormat::F32 => 4 * dim,
            CacheFormat::F16 => 2 * dim,
            CacheFormat::Q8 => 34 * dim.div_ceil(32),
        }
    }
}

/// Bytes of one page that holds the keys, or the values, of `page_len` positions. `page_len` is a multiple of 16.
///
/// # Panics
/// Panics when `page_len` is 0 or no multiple of 16.
pub fn cache_page_bytes(format: CacheFormat, kv_heads: usize, dim: usize, page_len: usize) -> usize {
    assert!(
        page_len > 0 && page_len.is_multiple_of(STRIP),
        "pages of {page_len} positions, not whole {STRIP}"
    );
    kv_heads * page_len * format.row_bytes(dim)
}

/// What [`cached_attention`] computes, but for the operands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CachedAttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Heads of keys and values; a whole number of query heads share each.
    pub kv_heads: usize,
    /// Elements of a query or key of one head.
    pub key_dim: usize,
    /// Elements of a value of one head.
    pub value_dim: usize,
    /// Scale of the products.
    pub scale: f32,
    /// Scores become `cap · tanh(score / cap)` (Gemma 2).
    pub softcap: Option<f32>,
    /// A row sees only so many positions, its own included.
    pub window: Option<usize>,
    /// Format of keys and values.
    pub format: CacheFormat,
    /// Positions of a page, a multiple of 16.
    pub page_len: usize,
}

impl CachedAttentionShape {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Values of the result of a span, its maximum and its sum.
    fn partial_len(&self) -> usize {
        self.value_dim + 2
    }

    /// Most rows that share decoded keys and values.
    fn tile_rows(&self) -> usize {
        (LANES_MAX / self.group()).max(1)
    }

    /// Scratch of each thread: keys, values, then scores, results of a span and sums of spans for each query vector.
    fn worker_len(&self, rows: usize) -> usize {
        let lanes = self.tile_rows().min(rows) * self.group();
        SPAN * (self.key_dim + self.value_dim) + lanes * (SPAN + 2 * self.partial_len())
    }

    /// Rows of a call whose spans may be shared out over threads.
    fn split_rows(&self, rows: usize, threads: usize) -> usize {
        if threads == 1 { 0 } else { rows.min(SPLIT_ROWS).min((4 * threads - 1) / self.kv_heads) }
    }

    /// The first position that the row at `position` sees.
    pub fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// Spans that the row at `position` sees, from the first to the one behind the last.
    fn spans(&self, position: usize) -> std::ops::Range<usize> {
        self.first_seen(position) / SPAN..position / SPAN + 1
    }

    fn check(&self) {
        let CachedAttentionShape { heads, kv_heads, page_len, .. } = *self;
        assert!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads),
            "{kv_heads} key heads for {heads} query heads"
        );
        assert!(
            page_len > 0 && page_len.is_multiple_of(STRIP),
            "pages of {page_len} positions, not whole {STRIP}"
        );
        assert!(self.window != Some(0), "a window of no positions");
    }
}

/// Values of scratch that [`cached_attention`] needs for up to `rows_max` rows at positions below `context_max`, on a
/// pool of `threads` threads. It grows with each of them.
///
/// # Panics
/// Panics when `kv_heads` does not divide `heads`, `page_len` is no multiple of 16 or the window is 0.
pub fn cached_attention_scratch_len(
    shape: &CachedAttentionShape,
    rows_max: usize,
    context_max: usize,
    threads: usize,
) -> usize {
    shape.check();
    let threads = threads.max(1);
    let spans = context_max.div_ceil(SPAN);
    // Consecutive rows that see a window share the spans of all of them.
    let spans = shape.window.map_or(spans, |window| spans.min((window + SPLIT_ROWS) / SPAN + 2));
    threads * shape.worker_len(rows_max)
        + shape.split_rows(rows_max, threads) * shape.heads * spans * shape.partial_len()
}

/// Rows, each at a position of some sequence, and where that sequence's positions lie.
///
/// Position `p` of the sequence of row `r` lies in the cache's page `pages[r * pages_per_row + p / page_len]`, at place
/// `p % page_len`. Entries for positions that a call neither reads nor writes may hold anything.
#[derive(Clone, Copy, Debug)]
pub struct CacheRows<'a> {
    /// The position of each row.
    pub positions: &'a [i32],
    /// Pages, `[rows, pages_per_row]`.
    pub pages: &'a [i32],
    /// Entries of the table for each row.
    pub pages_per_row: usize,
}

impl CacheRows<'_> {
    fn table(&self, row: usize) -> &[i32] {
        &self.pages[row * self.pages_per_row..][..self.pages_per_row]
    }

    /// The position of `row`, or what is wrong with it or with the pages from that of position `first_seen` to its own.
    fn position(
        &self,
        row: usize,
        first_seen: impl Fn(usize) -> usize,
        page_len: usize,
        page_count: usize,
    ) -> Result<usize, String> {
        let position = usize::try_from(self.positions[row]).unwrap_or(usize::MAX);
        let last = position / page_len;
        if position > i32::MAX as usize || last >= self.pages_per_row {
            return Err(format!(
                "row {row} is at position {}, its table has {} pages of {page_len}",
                self.positions[row], self.pages_per_row
            ));
        }
        let seen = self.table(row).iter().enumerate().take(last + 1).skip(first_seen(position) / page_len);
        for (index, &page) in seen {
            if !usize::try_from(page).is_ok_and(|page| page < page_count) {
                return Err(format!("entry {index} of row {row} is page {page} of {page_count}"));
            }
        }
        Ok(position)
    }

    /// Checks that every row has its pages, from that of position `first_seen` of its position to its own, in a cache of
    /// `page_count` pages; the functions that take rows panic where this gives an error.
    ///
    /// # Errors
    /// A sentence that names the row.
    pub fn verify(
        &self,
        first_seen: impl Fn(usize) -> usize,
        page_len: usize,
        page_count: usize,
    ) -> Result<(), String> {
        (0..self.positions.len())
            .try_for_each(|row| self.position(row, &first_seen, page_len, page_count).map(|_| ()))
    }

    /// [`position`](Self::position) for those who have documented that they panic.
    fn check(&self, row: usize, first: impl Fn(usize) -> usize, page_len: usize, page_count: usize) -> usize {
        self.position(row, first, page_len, page_count).unwrap_or_else(|problem| panic!("{problem}"))
    }
}

/// Consecutive rows at consecutive positions of one sequence.
#[derive(Clone, Copy, Default)]
struct Run {
    row: usize,
    rows: usize,
    position: usize,
}

/// One call.
struct Call<'a> {
    shape: &'a CachedAttentionShape,
    rows: CacheRows<'a>,
    q: &'a [f32],
    k_cache: &'a [u8],
    v_cache: &'a [u8],
    isa: crate::Isa,
}

impl Call<'_> {
    /// The rows from `row` on, but before `end`, that follow each other in one sequence.
    fn run_from(&self, row: usize, end: usize) -> Run {
        let CacheRows { positions, .. } = self.rows;
        let position = positions[row] as usize;
        let mut rows = 1;
        while row + rows < end && positions[row + rows] as usize == position + rows {
            // All that the first row sees, for the pages of the last row serve them all.
            let page_len = self.shape.page_len;
            let seen = self.shape.first_seen(position) / page_len..(position + rows - 1) / page_len + 1;
            if self.rows.table(row + rows - 1)[seen.clone()] != self.rows.table(row + rows)[seen] {
                break;
            }
            rows += 1;
        }
        Run { row, rows, position }
    }

    /// The spans of all rows of a run.
    fn spans(&self, run: Run) -> std::ops::Range<usize> {
        self.shape.spans(run.position).start..self.shape.spans(run.position + run.rows - 1).end
    }

    /// Computes one span of a run, into partial results at `out`: those of row `r` and head `h` of the group at
    /// `out[r * row_stride + h * head_stride..]`.
    ///
    /// # Safety
    /// `out` has room for these, and nobody else uses it.
    unsafe fn span(
        &self,
        run: Run,
        kv_head: usize,
        span: usize,
        scratch: &mut [f32],
        out: *mut f32,
        row_stride: usize,
        head_stride: usize,
    ) {
        let shape = self.shape;
        let (keys, rest) = scratch.split_at_mut(SPAN * shape.key_dim);
        let (values, scores) = rest.split_at_mut(SPAN * shape.value_dim);
        assert!(scores.len() >= run.rows * shape.group() * SPAN);
        let kernel = span::Span {
            shape,
            k_cache: self.k_cache,
            v_cache: self.v_cache,
            table: self.rows.table(run.row + run.rows - 1),
            kv_head,
            span,
            position: run.position,
            rows: run.rows,
            q: &self.q[run.row * shape.heads * shape.key_dim..][..run.rows * shape.heads * shape.key_dim],
            keys,
            values,
            scores,
            out,
            row_stride,
            head_stride,
        };
        dispatch(self.isa, kernel);
    }
}

/// `y[row, h] = Σ_p softmax_p(cap(scale · q[row, h]·k[p, h'])) · v[p, h']` over the positions `p` that the row sees,
/// of its own sequence: its own and those before it, as far as the window reaches. `h'` is the key head that query head
/// `h` shares with its neighbours.
///
/// `q` is `[rows, heads · key_dim]`, `y` is `[rows, heads · value_dim]`; keys and values were written by
/// [`store_in_cache`], those of the rows themselves included. `sinks`, if given, are logits, one for each head, of a
/// position that is seen by all and has no value. Consecutive rows of one sequence are fastest when they are neighbours
/// in ascending order. `scratch` has [`cached_attention_scratch_len`] values.
///
/// # Panics
/// Panics before anything is written when a slice is too short, a position is negative or beyond its table, a page that
/// is needed is none of the cache, or the shape makes no sense, see [`cached_attention_scratch_len`].
pub fn cached_attention(
    pool: &ThreadPool,
    shape: &CachedAttentionShape,
    q: &[f32],
    rows: CacheRows<'_>,
    k_cache: &[u8],
    v_cache: &[u8],
    sinks: Option<&[f32]>,
    y: &mut [f32],
    scratch: &mut [f32],
) {
    shape.check();
    let CachedAttentionShape { heads, kv_heads, key_dim, value_dim, format, page_len, .. } = *shape;
    let count = rows.positions.len();
    let page_count = [(k_cache, key_dim), (v_cache, value_dim)]
        .map(|(cache, dim)| cache.len().checked_div(cache_page_bytes(format, kv_heads, dim, page_len)));
    let page_count = page_count.into_iter().flatten().min().unwrap_or(usize::MAX);
    assert!(
        q.len() >= count * heads * key_dim,
        "q has {} values, {count} rows of {heads} x {key_dim} needed",
        q.len()
    );
    assert!(
        y.len() >= count * heads * value_dim,
        "y has {} values, {count} rows of {heads} x {value_dim} needed",
        y.len()
    );
    assert!(rows.pages.len() / rows.pages_per_row.max(1) >= count, "the table of pages has not {count} rows");
    assert!(sinks.is_none_or(|sinks| sinks.len() >= heads), "sinks for fewer than {heads} heads");
    let mut positions_seen = 0;
    let mut positions_end = 0;
    for row in 0..count {
        let position = rows.check(row, |position| shape.first_seen(position), page_len, page_count);
        positions_seen += position + 1 - shape.first_seen(position);
        positions_end = positions_end.max(position + 1);
    }
    let threads = pool.threads();
    let need = cached_attention_scratch_len(shape, count, positions_end, threads);
    assert!(scratch.len() >= need, "scratch has {} values, {need} needed", scratch.len());
    if count == 0 || heads == 0 {
        return;
    }

    let call = Call { shape, rows, q, k_cache, v_cache, isa: pool.isa() };
    let (group, partial_len) = (shape.group(), shape.partial_len());
    let work = positions_seen * heads * (key_dim + value_dim);
    let few = work < FEW || threads == 1;
    let worker_len = shape.worker_len(count);
    let (own, partials) = scratch.split_at_mut(threads * worker_len);
    let (own, out) = (Shareable(own.as_mut_ptr()), Shareable(y.as_mut_ptr()));
    let finish = |row: usize, head: usize, sums: *mut f32| {
        let y = out.get().wrapping_add((row * heads + head) * value_dim);
        // SAFETY: `sums` has the result, the maximum and the sum of the row; `y` has room for each row and head, and
        // each is finished once.
        dispatch(pool.isa(), span::Finish { shape, sums, sink: sinks.map(|sinks| sinks[head]), y });
    };

    if !few && count <= shape.split_rows(count, threads) && count * kv_heads < 4 * threads {
        // Few rows: every span is a task.
        let mut runs = [Run::default(); SPLIT_ROWS];
        let (mut run_count, mut row, mut spans_max) = (0, 0, 0);
        while row < count {
            runs[run_count] = call.run_from(row, count);
            row += runs[run_count].rows;
            spans_max = spans_max.max(call.spans(runs[run_count]).len());
            run_count += 1;
        }
        let runs = &runs[..run_count];
        let need = count * heads * spans_max * partial_len;
        assert!(
            partials.len() >= need,
            "scratch has room for {} partial results, not {need}",
            partials.len()
        );
        let partials = Shareable(partials.as_mut_ptr());
        pool.parallel_for(run_count * kv_heads * spans_max, &|index, worker| {
            let (run, rest) = (runs[index / (kv_heads * spans_max)], index % (kv_heads * spans_max));
            let (kv_head, span) = (rest / spans_max, rest % spans_max);
            if span >= call.spans(run).len() {
                return;
            }
            // SAFETY: every worker has a part of the scratch of its own, and every row, head and span its place among
            // the partial results, which was checked to exist.
            unsafe {
                let scratch = std::slice::from_raw_parts_mut(own.get().add(worker * worker_len), worker_len);
                let first = ((run.row * heads + kv_head * group) * spans_max + span) * partial_len;
                let out = partials.get().add(first);
                let (row_stride, head_stride) = (heads * spans_max * partial_len, spans_max * partial_len);
                call.span(run, kv_head, call.spans(run).start + span, scratch, out, row_stride, head_stride);
            }
        });
        let merge = |index: usize, _: usize| {
            let (row, head) = (index / heads, index % heads);
            let run = runs.iter().find(|run| row < run.row + run.rows).expect("every row is in a run");
            let first = call.spans(*run).start;
            let spans = shape.spans(run.position + row - run.row);
            // SAFETY: the partial results of these spans were computed above; this task alone uses them.
            unsafe {
                let at = |span: usize| partials.get().add((index * spans_max + span - first) * partial_len);
                let sums = at(spans.start);
                for span in spans.skip(1) {
                    dispatch(pool.isa(), span::Merge { value_dim, into: sums, from: at(span) });
                }
                finish(row, head, sums);
            }
        };
        if need < 1 << 16 {
            (0..count * heads).for_each(|index| merge(index, 0));
        } else {
            pool.parallel_for(count * heads, &merge);
        }
        return;
    }

    let wanted = (count * kv_heads).div_ceil(4 * threads);
    let tile_rows = if threads == 1 { shape.tile_rows() } else { wanted.clamp(1, shape.tile_rows()) };
    let tiles = count.div_ceil(tile_rows);
    let task = |index: usize, worker: usize| {
        // Late rows see most, so they come first.
        let (tile, kv_head) = (tiles - 1 - index / kv_heads, index % kv_heads);
        let end = count.min((tile + 1) * tile_rows);
        // SAFETY: every worker has a part of the scratch of its own.
        let scratch =
            unsafe { std::slice::from_raw_parts_mut(own.get().add(worker * worker_len), worker_len) };
        let (scratch, both) =
            scratch.split_at_mut(worker_len - 2 * tile_rows.min(count) * group * partial_len);
        let (sums, parts) = both.split_at_mut(both.len() / 2);
        let (sums, parts) = (sums.as_mut_ptr(), parts.as_mut_ptr());
        let mut row = tile * tile_rows;
        while row < end {
            let run = call.run_from(row, end);
            for span in call.spans(run) {
                // SAFETY: sums and parts have room for every query vector of a tile; indices stay below that.
                unsafe {
                    call.span(run, kv_head, span, scratch, parts, group * partial_len, partial_len);
                    for r in 0..run.rows {
                        let spans = shape.spans(run.position + r);
                        for lane in r * group..(r + 1) * group {
                            let (into, from) = (sums.add(lane * partial_len), parts.add(lane * partial_len));
                            if span == spans.start {
                                std::ptr::copy_nonoverlapping(from, into, partial_len);
                            } else if spans.contains(&span) {
                                dispatch(pool.isa(), span::Merge { value_dim, into, from });
                            }
                        }
                    }
                }
            }
            for lane in 0..run.rows * group {
                // SAFETY: as above.
                finish(run.row + lane / group, kv_head * group + lane % group, unsafe {
                    sums.add(lane * partial_len)
                });
            }
            row += run.rows;
        }
    };
    if few {
        (0..tiles * kv_heads).for_each(|index| task(index, 0));
    } else {
        pool.parallel_for(tiles * kv_heads, &task);
    }
}
