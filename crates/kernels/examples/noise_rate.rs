//! Normals per second: `cargo run --release -p lightering-kernels --example noise_rate`.
use lightering_kernels::{Noise, ThreadPool, add_noise};
use std::time::Instant;

fn main() {
    let mut w = vec![0f32; 1 << 22];
    for threads in [1usize, 2] {
        let pool = ThreadPool::new(threads);
        let mut best = f64::INFINITY;
        for key in 0..20 {
            let start = Instant::now();
            add_noise(&pool, Noise { key, stream: 1 }, 0, 1e-3, &mut w);
            best = best.min(start.elapsed().as_secs_f64());
        }
        println!("{threads} threads: {:.2} G normals/s", w.len() as f64 / best / 1e9);
    }
}
