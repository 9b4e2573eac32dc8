//! Speed of products with weights in blocks: bytes read per second for one row, operations per second for many.
//!
//! `cargo run --release -p lightering-kernels --example block_products [format ...]`, for 1 and 2 threads, with weights
//! that are larger than any cache and with small ones; best of several runs.

use lightering_kernels::{BlockActivations, ThreadPool, block_matmul_scratch_len};
use lightering_units::BlockFormat;
use std::hint::black_box;
use std::time::{Duration, Instant};

fn best_seconds(mut f: impl FnMut()) -> f64 {
    f();
    let (mut best, start) = (f64::MAX, Instant::now());
    while start.elapsed() < Duration::from_millis(250) {
        let t = Instant::now();
        f();
        best = best.min(t.elapsed().as_secs_f64());
    }
    best
}

/// Bytes per second at which `threads` threads sum up what lies in memory.
fn read_rate(pool: &ThreadPool, words: &[u64]) -> f64 {
    let seconds = best_seconds(|| {
        let part = words.len().div_ceil(64);
        pool.parallel_for(64, &|task, _| {
            let part = &words[(task * part).min(words.len())..((task + 1) * part).min(words.len())];
            let mut lanes = [0u64; 32];
            for chunk in part.as_chunks::<32>().0 {
                lanes.iter_mut().zip(chunk).for_each(|(lane, word)| *lane ^= word);
            }
            black_box(lanes);
        });
    });
    (words.len() * 8) as f64 / seconds
}

fn main() {
    let names: Vec<String> = std::env::args().skip(1).collect();
    let words = vec![1u64; 32 << 20];
    for threads in [1, 2] {
        let pool = ThreadPool::new(threads);
        println!(
            "{threads} threads, {}: memory {:.1} GB/s",
            pool.isa().name(),
            read_rate(&pool, &words) / 1e9
        );
        println!(
            "format   large MB  1 row GB/s   short rows, MB, GB/s   small MB  1 row GB/s   2 rows  4 rows  8 rows  128 rows  512 rows GFLOP/s"
        );
        for format in BlockFormat::ALL {
            if !names.is_empty() && !names.iter().any(|name| name == format.name()) {
                continue;
            }
            let mut line = format!("{:6}", format.name());
            let mut many = String::new();
            let long = if format.block_len() == 32 { 640 } else { 2048 };
            for (n, k, rows_list) in [
                (65536, 2048, &[1usize][..]),
                // Rows that are no whole number of what the kernels take at a time.
                (131072, long, &[1][..]),
                (2048, 1024, &[1, 2, 4, 8, 128, 512][..]),
            ] {
                let bytes = n * format.row_bytes(k).expect("k is a whole number of blocks");
                // Bytes that are no tiny scales in any format, since arithmetic with subnormal numbers is slow.
                let w: Vec<u8> = (0..bytes).map(|i| (i * 131 % 13 + 112) as u8).collect();
                for &rows in rows_list {
                    let x: Vec<f32> = (0..rows * k).map(|i| (i * 7 % 13) as f32 * 0.01 - 0.05).collect();
                    let mut y = vec![0.0; rows * n];
                    let mut scratch = vec![0.0; block_matmul_scratch_len(format, k, rows)];
                    let seconds = best_seconds(|| {
                        let activations = BlockActivations::new(&pool, format, k, &x, rows, &mut scratch);
                        activations.matmul(&pool, format, &w, n, &mut y, n);
                        black_box(&y);
                    });
                    if rows == 1 {
                        line +=
                            &format!(" {:9.1} {:10.1}   ", bytes as f64 / 1e6, bytes as f64 / seconds / 1e9);
                    } else {
                        many += &format!("{:8.0}", 2.0 * (rows * n * k) as f64 / seconds / 1e9);
                    }
                }
            }
            println!("{line}{many}");
        }
    }
}
