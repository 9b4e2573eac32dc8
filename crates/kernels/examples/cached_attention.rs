//! Speed of attention over a cache of pages: one row at a long context, and chunks of a prompt.
//!
//! `cargo run --release -p lightering-kernels --example cached_attention`; best of several runs.

use lightering_kernels::{
    CacheFormat, CachePart, CacheRows, CachedAttentionShape, ThreadPool, cache_page_bytes, cached_attention,
    cached_attention_scratch_len, store_in_cache,
};
use std::hint::black_box;
use std::time::{Duration, Instant};

fn best_seconds(mut f: impl FnMut()) -> f64 {
    f();
    let (mut best, start) = (f64::MAX, Instant::now());
    while start.elapsed() < Duration::from_millis(200) {
        let t = Instant::now();
        f();
        best = best.min(t.elapsed().as_secs_f64());
    }
    best
}

fn main() {
    let models = [("gemma-3-270m", 4, 1, 256), ("qwen2.5-0.5b", 14, 2, 64), ("qwen3-8b", 32, 8, 128)];
    println!("model         format threads   rows  context        ms    GB/s  GFLOP/s  store ms");
    for (name, heads, kv_heads, dim) in models {
        for format in [CacheFormat::F16, CacheFormat::Q8] {
            for threads in [1, 2] {
                for (rows, context) in [(1, 512), (1, 4096), (512, 512), (512, 4096)] {
                    let pool = ThreadPool::new(threads);
                    let page_len = 64;
                    let pages_per_row = context / page_len;
                    let shape = CachedAttentionShape {
                        heads,
                        kv_heads,
                        key_dim: dim,
                        value_dim: dim,
                        scale: 0.1,
                        softcap: None,
                        window: None,
                        format,
                        page_len,
                    };
                    let bytes = pages_per_row * cache_page_bytes(format, kv_heads, dim, page_len);
                    let (mut k, mut v) = (vec![0u8; bytes], vec![0u8; bytes]);
                    let table: Vec<i32> = (0..pages_per_row as i32).collect();
                    let positions: Vec<i32> = (context - rows..context).map(|p| p as i32).collect();
                    let pages = table.repeat(rows);
                    let at = CacheRows { positions: &positions, pages: &pages, pages_per_row };
                    let q: Vec<f32> =
                        (0..rows * heads * dim).map(|i| (i * 7 % 13) as f32 * 0.01 - 0.05).collect();
                    let store = best_seconds(|| {
                        for (part, cache) in [(CachePart::Keys, &mut k), (CachePart::Values, &mut v)] {
                            store_in_cache(&pool, part, format, kv_heads, dim, page_len, &q, at, cache);
                        }
                    });
                    let mut y = vec![0.0; rows * heads * dim];
                    let mut scratch = vec![0.0; cached_attention_scratch_len(&shape, rows, context, threads)];
                    let seconds = best_seconds(|| {
                        cached_attention(&pool, &shape, &q, at, &k, &v, None, &mut y, &mut scratch);
                        black_box(&y);
                    });
                    let seen: usize = positions.iter().map(|p| *p as usize + 1).sum();
                    println!(
                        "{name:13} {:6} {threads:7} {rows:6} {context:8} {:9.3} {:7.1} {:8.1} {:9.3}",
                        format!("{format:?}"),
                        seconds * 1e3,
                        2.0 * bytes as f64 / seconds / 1e9,
                        4.0 * (seen * heads * dim) as f64 / seconds / 1e9,
                        store * 1e3,
                    );
                }
            }
        }
    }
}
