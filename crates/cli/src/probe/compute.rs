//! How fast matrices are multiplied.

use super::thread_counts;
use lightering_kernels::{
    ByteInput, ByteOutput, ByteWeights, Epilogue, Isa, ThreadPool, gemm, gemm_bytes, pack_bytes, pack_kn,
    packed_bytes_len, packed_len,
};
use lightering_meter::{ComputeRate, Stopwatch, host};
use lightering_units::{Flops, FlopsPerSecond, Seconds};
use std::hint::black_box;

/// Rows, columns and depth: large enough that packing and waking threads disappear, small enough for any machine.
const SIDE: usize = 768;

/// The instruction set that kernels use on this machine.
pub fn isa() -> String {
    Isa::best().name().to_owned()
}

/// Single-precision rate of 1, 2, 4, … threads: the fastest product within `seconds` for each.
pub fn gemm_f32(seconds: f64) -> Vec<ComputeRate> {
    // Small whole numbers: no denormals, and every sum is exact.
    let a: Vec<f32> = (0..SIDE * SIDE).map(|i| (i % 7) as f32 - 3.0).collect();
    let b: Vec<f32> = (0..SIDE * SIDE).map(|i| (i % 5) as f32 - 2.0).collect();
    let mut panels = vec![0.0; packed_len(SIDE, SIDE)];
    pack_kn(SIDE, SIDE, &b, SIDE, &mut panels);
    let mut c = vec![0.0; SIDE * SIDE];
    rates(seconds, &mut |pool| {
        gemm(pool, SIDE, SIDE, SIDE, black_box(&a), SIDE, &panels, &mut c, SIDE, &Epilogue::NONE);
        black_box(&c);
    })
}

/// The same for 8-bit integers with 32-bit sums.
pub fn gemm_int8(seconds: f64) -> Vec<ComputeRate> {
    let a: Vec<u8> = (0..SIDE * SIDE).map(|i| (i % 251) as u8).collect();
    let b: Vec<u8> = (0..SIDE * SIDE).map(|i| (i % 241) as u8).collect();
    let mut packed = vec![0i8; packed_bytes_len(SIDE, SIDE)];
    let mut sums = vec![0i32; SIDE];
    pack_bytes(SIDE, SIDE, &b, true, false, &mut packed, &mut sums);
    let mut c = vec![0i32; SIDE * SIDE];
    rates(seconds, &mut |pool| {
        let input = ByteInput { data: black_box(&a), signed: false, zero: 0, stride: SIDE };
        let weights = ByteWeights { packed: &packed, sums: &sums, zeros: None };
        let output = ByteOutput::I32 { data: &mut c, stride: SIDE };
        gemm_bytes(pool, SIDE, SIDE, SIDE, input, weights, None, output);
        black_box(&c);
    })
}

fn rates(seconds: f64, product: &mut dyn FnMut(&ThreadPool)) -> Vec<ComputeRate> {
    let work = Flops(2.0 * (SIDE * SIDE * SIDE) as f64);
    thread_counts(host::cores())
        .into_iter()
        .map(|threads| {
            let pool = ThreadPool::new(threads as usize);
            let all = Stopwatch::start();
            let mut best = Seconds(f64::INFINITY);
            while best.0.is_infinite() || all.elapsed().0 < seconds {
                let watch = Stopwatch::start();
                product(&pool);
                let time = watch.elapsed();
                if time < best {
                    best = time;
                }
            }
            ComputeRate { threads, flops_per_second: FlopsPerSecond(work.0 / best.0) }
        })
        .collect()
}
