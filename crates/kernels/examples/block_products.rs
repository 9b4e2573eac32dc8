//! Time of products with weights in blocks, beside that of reading their bytes.
//!
//! `cargo run --release -p lightering-kernels --example block_products [threads] [n] [k] [format]`; best of several runs.

use lightering_kernels::{BlockActivations, ThreadPool, block_matmul_scratch_len};
use lightering_units::BlockFormat;
use std::hint::black_box;
use std::time::{Duration, Instant};

fn best_seconds(mut f: impl FnMut()) -> f64 {
    f();
    let (mut best, start) = (f64::MAX, Instant::now());
    while start.elapsed() < Duration::from_millis(300) {
        let t = Instant::now();
        f();
        best = best.min(t.elapsed().as_secs_f64());
    }
    best
}

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let threads = numbers.first().copied().unwrap_or(1);
    let n = numbers.get(1).copied().unwrap_or(11008);
    let k = numbers.get(2).copied().unwrap_or(4096);
    let pool = ThreadPool::new(threads);
    println!("{n} x {k}, {threads} threads, {}", pool.isa().name());
    println!("format   MB   1 row ms  GB/s   64 rows ms  GFLOP/s");
    let only = std::env::args().nth(4);
    for format in BlockFormat::ALL {
        if only.as_ref().is_some_and(|name| name != format.name()) {
            continue;
        }
        let bytes = n * format.row_bytes(k).expect("k is a whole number of blocks");
        // Bytes that are no tiny scales in any format, since arithmetic with subnormal numbers is slow.
        let w: Vec<u8> = (0..bytes).map(|i| (i * 131 % 13 + 112) as u8).collect();
        let mut seconds = [0.0; 2];
        for (slot, rows) in [1usize, 64].into_iter().enumerate() {
            let x: Vec<f32> = (0..rows * k).map(|i| (i * 7 % 13) as f32 * 0.01 - 0.05).collect();
            let mut y = vec![0.0; rows * n];
            let mut scratch = vec![0.0; block_matmul_scratch_len(format, k, rows)];
            seconds[slot] = best_seconds(|| {
                let activations = BlockActivations::new(&pool, format, k, &x, rows, &mut scratch);
                activations.matmul(&pool, format, &w, n, &mut y, n);
                black_box(&y);
            });
        }
        println!(
            "{:6} {:5.1} {:9.2} {:6.1} {:11.1} {:8.0}",
            format.name(),
            bytes as f64 / 1e6,
            seconds[0] * 1e3,
            bytes as f64 / seconds[0] / 1e9,
            seconds[1] * 1e3,
            2.0 * (64 * n * k) as f64 / seconds[1] / 1e9,
        );
    }
}
