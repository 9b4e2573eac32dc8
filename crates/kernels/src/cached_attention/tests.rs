use lightering_units::BlockFormat;
use proptest::prelude::*;

use super::*;
use crate::gemm::tests::values;
use crate::{Isa, dequantize_row, quantize_row};

/// What a cache gives back for a head's elements.
fn cached(format: CacheFormat, x: &[f32]) -> Vec<f32> {
    match format {
        CacheFormat::F32 => x.to_vec(),
        CacheFormat::F16 => x.iter().map(|x| half::f16::from_f32(*x).to_f32()).collect(),
        CacheFormat::Q8 => {
            let mut padded = x.to_vec();
            padded.resize(x.len().next_multiple_of(32), 0.0);
            let mut bytes = vec![0; BlockFormat::Q8_0.row_bytes(padded.len()).unwrap()];
            quantize_row(BlockFormat::Q8_0, &padded, &mut bytes);
            dequantize_row(BlockFormat::Q8_0, &bytes, &mut padded);
            padded.truncate(x.len());
            padded
        }
    }
}

/// Sequences and the pages that hold them.
struct World {
    shape: CachedAttentionShape,
    lengths: Vec<usize>,
    /// For each sequence `[positions, heads · dim]`.
    q: Vec<Vec<f32>>,
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
    pages_per_row: usize,
    /// For each sequence.
    pages: Vec<Vec<i32>>,
    k_cache: Vec<u8>,
    v_cache: Vec<u8>,
    sinks: Option<Vec<f32>>,
}

impl World {
    fn new(shape: CachedAttentionShape, lengths: &[usize], sinks: bool, seed: u64) -> World {
        let CachedAttentionShape { heads, kv_heads, key_dim, value_dim, format, page_len, .. } = shape;
        let make = |width: usize, salt: u64| -> Vec<Vec<f32>> {
            lengths.iter().zip(salt..).map(|(len, salt)| values(len * width, seed * 31 + salt)).collect()
        };
        let pages_per_row = lengths.iter().max().unwrap().div_ceil(page_len) + 1;
        let count = lengths.len() * pages_per_row;
        // Pages in an order that depends on the seed, and nonsense where nothing is.
        let mut order: Vec<i32> = (0..count as i32).collect();
        order.sort_by_key(|p| (*p as u64 + 1).wrapping_mul(seed * 2 + 0x9e37_79b9_7f4a_7c15));
        let pages = lengths.iter().zip(order.chunks(pages_per_row)).map(|(len, pages)| {
            let mut pages = pages.to_vec();
            pages[len.div_ceil(page_len)..].fill(-7);
            pages
        });
        let bytes = |dim| count * cache_page_bytes(format, kv_heads, dim, page_len);
        World {
            lengths: lengths.to_vec(),
            q: make(heads * key_dim, 100),
            k: make(kv_heads * key_dim, 200),
            v: make(kv_heads * value_dim, 300),
            pages_per_row,
            pages: pages.collect(),
            // All ones: no number in any format of floats.
            k_cache: vec![255; bytes(key_dim)],
            v_cache: vec![255; bytes(value_dim)],
            sinks: sinks.then(|| values(heads, seed + 5)),
            shape,
        }
    }

    fn gather(rows: &[(usize, usize)], from: &[Vec<f32>], width: usize) -> Vec<f32> {
        rows.iter().flat_map(|&(s, p)| from[s][p * width..(p + 1) * width].iter().copied()).collect()
    }

    fn table(&self, rows: &[(usize, usize)]) -> (Vec<i32>, Vec<i32>) {
        let positions = rows.iter().map(|r| r.1 as i32).collect();
        (positions, rows.iter().flat_map(|r| self.pages[r.0].iter().copied()).collect())
    }

    /// Stores and attends the given rows, each a sequence and a position.
    fn call(&mut self, pool: &ThreadPool, rows: &[(usize, usize)]) -> Vec<f32> {
        let CachedAttentionShape { kv_heads, key_dim, value_dim, format, page_len, .. } = self.shape;
        let (positions, pages) = self.table(rows);
        let table = CacheRows { positions: &positions, pages: &pages, pages_per_row: self.pages_per_row };
        let k = World::gather(rows, &self.k, kv_heads * key_dim);
        let v = World::gather(rows, &self.v, kv_heads * value_dim);
        store_in_cache(
            pool,
            CachePart::Keys,
            format,
            kv_heads,
            key_dim,
            page_len,
            &k,
            table,
            &mut self.k_cache,
        );
        store_in_cache(
            pool,
            CachePart::Values,
            format,
            kv_heads,
            value_dim,
            page_len,
            &v,
            table,
            &mut self.v_cache,
        );
        self.attend(pool, rows)
    }

    fn attend(&self, pool: &ThreadPool, rows: &[(usize, usize)]) -> Vec<f32> {
        let CachedAttentionShape { heads, key_dim, value_dim, .. } = self.shape;
        let (positions, pages) = self.table(rows);
        let table = CacheRows { positions: &positions, pages: &pages, pages_per_row: self.pages_per_row };
        let q = World::gather(rows, &self.q, heads * key_dim);
        let context = self.lengths.iter().max().unwrap();
        let len = cached_attention_scratch_len(&self.shape, rows.len(), *context, pool.threads());
        let mut scratch = vec![f32::NAN; len];
        let mut y = vec![f32::NAN; rows.len() * heads * value_dim];
        let sinks = self.sinks.as_deref();
        cached_attention(
            pool,
            &self.shape,
            &q,
            table,
            &self.k_cache,
            &self.v_cache,
            sinks,
            &mut y,
            &mut scratch,
        );
        y
    }

    fn all_rows(&self) -> Vec<(usize, usize)> {
        self.lengths.iter().enumerate().flat_map(|(s, len)| (0..*len).map(move |p| (s, p))).collect()
    }

    /// The definition, in double precision.
    fn expected(&self, (sequence, position): (usize, usize)) -> Vec<f64> {
        let CachedAttentionShape {
            heads, kv_heads, key_dim, value_dim, scale, softcap, window, format, ..
        } = self.shape;
        let first = window.map_or(0, |w| (position + 1).saturating_sub(w));
        let row = |x: &[Vec<f32>], p: usize, heads: usize, h: usize, dim: usize| {
            x[sequence][(p * heads + h) * dim..][..dim].to_vec()
        };
        let mut y = Vec::new();
        for h in 0..heads {
            let q = row(&self.q, position, heads, h, key_dim);
            let kv = h / (heads / kv_heads);
            let weights: Vec<f64> = (first..=position)
                .map(|p| {
                    let k = cached(format, &row(&self.k, p, kv_heads, kv, key_dim));
                    let dot: f64 = q.iter().zip(&k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                    let score = dot * f64::from(scale);
                    softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh()).exp()
                })
                .collect();
            let sink = self.sinks.as_ref().map_or(0.0, |sinks| f64::from(sinks[h]).exp());
            let sum = weights.iter().sum::<f64>() + sink;
            let mut out = vec![0.0; value_dim];
            for (p, weight) in (first..=position).zip(weights) {
                let v = cached(format, &row(&self.v, p, kv_heads, kv, value_dim));
                out.iter_mut().zip(v).for_each(|(o, v)| *o += weight / sum * f64::from(v));
            }
            y.extend(out);
        }
        y
    }
}

fn bits(y: &[f32]) -> Vec<u32> {
    y.iter().map(|y| y.to_bits()).collect()
}

fn shapes() -> impl Strategy<Value = CachedAttentionShape> {
    let dims = prop_oneof![1usize..70, Just(32), Just(64), Just(80), Just(128)];
    let formats = prop::sample::select(vec![CacheFormat::F32, CacheFormat::F16, CacheFormat::Q8]);
    let windows = prop::option::of(prop_oneof![1usize..40, 100usize..300]);
    (1usize..9, 1usize..4, dims.clone(), dims, prop::option::of(2.0f32..50.0), windows, formats, 1usize..6)
        .prop_map(|(group, kv_heads, key_dim, value_dim, softcap, window, format, strips)| {
            CachedAttentionShape {
                heads: group * kv_heads,
                kv_heads,
                key_dim,
                value_dim,
                scale: 1.3 / (key_dim as f32).sqrt(),
                softcap,
                window,
                format,
                page_len: 16 * strips,
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Near the definition, and the same bits for any division into calls, neighbours, threads and pages, one row at a
    /// time included.
    #[test]
    fn rows_are_right_and_do_not_depend_on_how_they_are_computed(
        shape in shapes(), lengths in prop::collection::vec(1usize..330, 1..4), sinks: bool, seed in 0u64..1000,
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let mut world = World::new(shape, &lengths, sinks, seed);
        let rows = world.all_rows();
        let width = shape.heads * shape.value_dim;
        let y = world.call(&ThreadPool::with_isa(1, Isa::Avx512), &rows);
        for &row in [0, rows.len() / 2, rows.len() - 1].iter().chain(&[rows.len() / 3]) {
            for (got, want) in y[row * width..][..width].iter().zip(world.expected(rows[row])) {
                prop_assert!((f64::from(*got) - want).abs() <= 2e-5, "{:?}: {got}, not {want}", rows[row]);
            }
        }
        // Other threads and instruction sets.
        for (isa, threads) in [(Isa::Avx2, 3), (Isa::Avx512, 2), (Isa::Portable, 2)] {
            let other = world.attend(&ThreadPool::with_isa(threads, isa), &rows);
            if isa == Isa::Portable {
                let far = other.iter().zip(&y).any(|(a, b)| (a - b).abs() > 2e-5);
                prop_assert!(!far, "plain Rust computes something else");
            } else {
                prop_assert!(bits(&other) == bits(&y), "{isa:?}, {threads} threads");
            }
        }
        // Chunks of all sequences in turns, stored as they come, in other pages.
        let mut other = World::new(shape, &lengths, sinks, seed);
        other.pages.iter_mut().flatten().filter(|p| **p >= 0).for_each(|p| {
            *p = (lengths.len() * world.pages_per_row) as i32 - 1 - *p;
        });
        let mut ends: Vec<usize> = cuts.iter().map(|c| c.index(330)).chain([330]).collect();
        ends.sort_unstable();
        let mut from = 0;
        for (call, end) in ends.into_iter().enumerate() {
            let some: Vec<usize> = (0..rows.len()).filter(|r| (from..end).contains(&rows[*r].1)).collect();
            let chunk: Vec<_> = some.iter().map(|r| rows[*r]).collect();
            let pool = ThreadPool::with_isa(1 + call % 3, Isa::Avx512);
            let part = other.call(&pool, &chunk);
            for (i, row) in some.into_iter().enumerate() {
                prop_assert!(bits(&part[i * width..][..width]) == bits(&y[row * width..][..width]), "row {row}");
            }
            from = end;
        }
        // Alone, and among rows that do not follow each other.
        for threads in [1, 2] {
            let pool = ThreadPool::with_isa(threads, Isa::Avx512);
            let mixed = [rows.len() - 1, 0, rows.len() / 2, rows.len() / 2 + 1].map(|r| r % rows.len());
            let part = world.attend(&pool, &mixed.map(|r| rows[r]));
            for (i, row) in mixed.into_iter().enumerate() {
                prop_assert!(bits(&part[i * width..][..width]) == bits(&y[row * width..][..width]), "row {row}");
                let alone = world.attend(&pool, &[rows[row]]);
                prop_assert!(bits(&alone) == bits(&y[row * width..][..width]), "row {row} alone");
            }
        }
    }
}

fn small_shape() -> CachedAttentionShape {
    CachedAttentionShape {
        heads: 4,
        kv_heads: 1,
        key_dim: 256,
        value_dim: 256,
        scale: 0.06,
        softcap: None,
        window: None,
        format: CacheFormat::F16,
        page_len: 32,
    }
}

/// Long contexts take the path that shares spans out over threads.
#[test]
fn a_long_context_has_the_same_bits_on_any_number_of_threads() {
    for window in [None, Some(512)] {
        for format in [CacheFormat::F16, CacheFormat::Q8] {
            let mut world =
                World::new(CachedAttentionShape { window, format, ..small_shape() }, &[1500], false, 3);
            let rows = world.all_rows();
            let y = world.call(&ThreadPool::new(2), &rows);
            for threads in [1, 2, 4] {
                let pool = ThreadPool::new(threads);
                for first in [1499, 1497] {
                    let last = world.attend(&pool, &rows[first..]);
                    assert!(bits(&last) == bits(&y[first * 1024..]), "{threads} threads, {window:?}");
                }
            }
            for (got, want) in y[1499 * 1024..].iter().zip(world.expected((0, 1499))) {
                assert!((f64::from(*got) - want).abs() < 1e-5);
            }
        }
    }
}

/// A row of no numbers spoils the rows that see it, and no others.
#[test]
fn what_is_no_number_stays_where_it_is_seen() {
    for format in [CacheFormat::F32, CacheFormat::F16, CacheFormat::Q8] {
        let mut world =
            World::new(CachedAttentionShape { format, window: Some(20), ..small_shape() }, &[60], false, 7);
        let good = world.call(&ThreadPool::new(1), &world.all_rows());
        world.v[0][30 * 256 + 5] = f32::NAN;
        world.k[0][30 * 256 + 9] = f32::INFINITY;
        let bad = world.call(&ThreadPool::new(1), &world.all_rows());
        for row in 0..60 {
            let (good, bad) = (&good[row * 1024..][..1024], &bad[row * 1024..][..1024]);
            if (30..50).contains(&row) {
                assert!(bad[5].is_nan(), "row {row} {format:?}");
            } else {
                assert_eq!(bits(bad), bits(good), "row {row} {format:?}");
            }
        }
    }
}

#[test]
fn pages_and_positions_that_are_none_are_refused_before_anything_is_written() {
    let refused = |positions: [i32; 2], pages: [i32; 4]| {
        let mut world = World::new(small_shape(), &[64], false, 1);
        let rows = CacheRows { positions: &positions, pages: &pages, pages_per_row: 2 };
        let (q, k) = (vec![1.0; 2 * 1024], vec![1.0; 2 * 256]);
        let (mut y, mut scratch) = (vec![7.0; 2 * 1024], vec![0.0; 1 << 20]);
        let pool = ThreadPool::new(1);
        let before = world.k_cache.clone();
        let stored = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            store_in_cache(
                &pool,
                CachePart::Keys,
                CacheFormat::F16,
                1,
                256,
                32,
                &k,
                rows,
                &mut world.k_cache,
            );
        }));
        assert!(stored.is_ok() || world.k_cache == before);
        let attended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let (k, v) = (&before, &world.v_cache);
            cached_attention(&pool, &small_shape(), &q, rows, k, v, None, &mut y, &mut scratch);
        }));
        assert!(attended.is_ok() || y.iter().all(|y| *y == 7.0));
        (stored.is_err(), attended.is_err())
    };
    assert_eq!(refused([40, 0], [0, 1, 2, -1]), (false, false));
    assert_eq!(refused([40, 32], [0, 1, 2, -1]), (true, true));
    assert_eq!(refused([40, 64], [0, 1, 2, 0]), (true, true));
    assert_eq!(refused([40, -1], [0, 1, 2, 0]), (true, true));
    assert_eq!(refused([40, 1], [0, 1, 3, 0]), (true, true));
    // An earlier page is read, but not written.
    assert_eq!(refused([40, 0], [-1, 1, 2, 0]), (false, true));
}

#[test]
fn scratch_grows_with_rows_context_and_threads() {
    for shape in
        [small_shape(), CachedAttentionShape { heads: 32, kv_heads: 8, window: Some(100), ..small_shape() }]
    {
        let mut last = 0;
        for rows in 1..70 {
            let len = cached_attention_scratch_len(&shape, rows, 3000, 2);
            assert!(len >= last);
            last = len;
            assert!(cached_attention_scratch_len(&shape, rows, 4000, 2) >= len);
            assert!(cached_attention_scratch_len(&shape, rows, 3000, 3) >= len);
        }
    }
}
