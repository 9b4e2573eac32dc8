//! Writing keys and values into pages.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::{CacheFormat, CacheRows, STRIP, cache_page_bytes};
use crate::threads::{Shareable, ThreadPool};

/// Which part of a cache: their layouts differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CachePart {
    /// Keys.
    Keys,
    /// Values.
    Values,
}

/// Where the elements of one head at one position lie.
struct Cell<'a> {
    page: &'a mut [u8],
    /// Where the strip of the position, or its row, begins.
    from: usize,
    /// Bytes of an element's place, and the position's place among its neighbours: 16 and `p % 16` for keys, else 1
    /// and 0.
    width: usize,
    lane: usize,
}

impl Cell<'_> {
    /// Puts elements of `N` bytes from element `first` on; `start` bytes lie before the strip's elements.
    #[inline(always)]
    fn put<const N: usize>(&mut self, start: usize, elements: &[[u8; N]]) {
        let from = self.from + start + self.lane * N;
        for (place, element) in self.page[from..].chunks_mut(self.width * N).zip(elements) {
            place[..N].copy_from_slice(element);
        }
    }
}

fn store_head(format: CacheFormat, mut cell: Cell<'_>, x: &[f32]) {
    match format {
        CacheFormat::F32 => {
            for (i, x) in x.chunks(32).enumerate() {
                let mut words = [[0u8; 4]; 32];
                words.iter_mut().zip(x).for_each(|(word, x)| *word = x.to_le_bytes());
                cell.put(32 * i * 4 * cell.width, &words[..x.len()]);
            }
        }
        CacheFormat::F16 => {
            for (i, x) in x.chunks(32).enumerate() {
                let mut halves = [f16::ZERO; 32];
                halves[..x.len()].convert_from_f32_slice(x);
                let words = halves.map(f16::to_le_bytes);
                cell.put(32 * i * 2 * cell.width, &words[..x.len()]);
            }
        }
        CacheFormat::Q8 => {
            for (i, x) in x.chunks(32).enumerate() {
                let (scale, codes) = quantize(x);
                let start = 34 * i * cell.width;
                cell.put(start, &[scale.to_le_bytes()]);
                let codes: [[u8; 1]; 32] = codes.map(|code| [code as u8]);
                cell.put(start + 2 * cell.width, &codes);
            }
        }
    }
}

/// Scale and codes of up to 32 elements, as in ggml's Q8_0; a scale of NaN if one of them is not finite.
fn quantize(x: &[f32]) -> (f16, [i8; 32]) {
    // As integers, magnitudes are ordered as the numbers are, and infinities and NaN come last.
    let largest = f32::from_bits(x.iter().fold(0, |m, x| m.max(x.to_bits() & 0x7fff_ffff)));
    let mut codes = [0; 32];
    if !largest.is_finite() {
        return (f16::NAN, codes);
    }
    let scale = largest / 127.0;
    let inverse = if scale > 0.0 { (1.0 / scale).min(f32::MAX) } else { 0.0 };
    for (code, x) in codes.iter_mut().zip(x) {
        *code = (x * inverse).round() as i8;
    }
    (f16::from_f32(scale), codes)
}

/// Writes the keys or values `x`, `[rows, kv_heads · dim]`, of each row at its own position of its sequence. If several
/// rows name one place, the last of them is kept.
///
/// # Panics
/// Panics before anything is written when a slice is too short, `page_len` is no multiple of 16, a position is negative
/// or beyond its table, or its page is none of the cache.
pub fn store_in_cache(
    pool: &ThreadPool,
    part: CachePart,
    format: CacheFormat,
    kv_heads: usize,
    dim: usize,
    page_len: usize,
    x: &[f32],
    rows: CacheRows<'_>,
    cache: &mut [u8],
) {
    let count = rows.positions.len();
    let page_bytes = cache_page_bytes(format, kv_heads, dim, page_len);
    assert!(
        x.len() >= count * kv_heads * dim,
        "x has {} values, {count} rows of {kv_heads} x {dim} needed",
        x.len()
    );
    assert!(rows.pages.len() / rows.pages_per_row.max(1) >= count, "the table of pages has not {count} rows");
    let page_count = cache.len().checked_div(page_bytes).unwrap_or(usize::MAX);
    for row in 0..count {
        rows.check(row, |position| position, page_len, page_count);
    }
    if page_bytes == 0 {
        return;
    }
    let row_bytes = format.row_bytes(dim);
    // Each page belongs to one task, which goes through the rows in order.
    let owners = if count * kv_heads * dim < 50_000 { 1 } else { pool.threads() };
    let cache = Shareable(cache.as_mut_ptr());
    pool.parallel_for(owners, &|owner, _| {
        for row in 0..count {
            let position = rows.positions[row] as usize;
            let page = rows.table(row)[position / page_len] as usize;
            if page % owners != owner {
                continue;
            }
            // SAFETY: the page was checked to lie in the cache, and only this task touches it.
            let page =
                unsafe { std::slice::from_raw_parts_mut(cache.get().add(page * page_bytes), page_bytes) };
            for (head, x) in x[row * kv_heads * dim..][..kv_heads * dim].chunks_exact(dim).enumerate() {
                let place = position % page_len;
                let head_from = head * page_len * row_bytes;
                let page = &mut *page;
                let cell = match part {
                    CachePart::Keys => Cell {
                        page,
                        from: head_from + place / STRIP * STRIP * row_bytes,
                        width: STRIP,
                        lane: place % STRIP,
                    },
                    CachePart::Values => {
                        Cell { page, from: head_from + place * row_bytes, width: 1, lane: 0 }
                    }
                };
                store_head(format, cell, x);
            }
        }
    });
}
