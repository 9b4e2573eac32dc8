//! How fast memory can be read.

use super::{Scramble, thread_counts};
use lightering_meter::{MemoryRate, host};
use lightering_units::{Bytes, Seconds};
use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

/// Smallest and largest buffer that is read; it must be far larger than every cache.
const BUFFER_MIN: Bytes = Bytes::mib(128);
const BUFFER_MAX: Bytes = Bytes::mib(1024);

/// Measures the sum of the read rates of 1, 2, 4, … threads: the best of `passes` passes.
pub fn measure(passes: u32) -> Vec<MemoryRate> {
    let largest_cache = host::caches().iter().map(|c| c.size).max().unwrap_or_default();
    let spare = host::memory_available().map_or(BUFFER_MIN, |free| Bytes(free.0 / 8));
    let total = Bytes((largest_cache * 4).max(BUFFER_MIN).min(BUFFER_MAX).min(spare.max(Bytes::mib(8))).0);
    thread_counts(host::cores())
        .into_iter()
        .map(|threads| MemoryRate { threads, bytes_per_second: total / read_time(threads, total, passes) })
        .collect()
}

/// The shortest time in which `threads` threads together read `total` bytes once.
fn read_time(threads: u32, total: Bytes, passes: u32) -> Seconds {
    let words = total.to_usize() / 8 / threads as usize;
    let barrier = Barrier::new(threads as usize);
    let (passes, threads) = (passes as usize, threads as usize);
    // Each thread keeps its own times: a clock in a thread that only waits may be started too late.
    let times: Vec<Vec<(Instant, Instant)>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let barrier = &barrier;
                scope.spawn(move || {
                    // Every page gets its own content, so that no two can be merged or be the zero page.
                    let mut scramble = Scramble::new(thread as u64 + 7);
                    let buffer: Vec<u64> = (0..words).map(|_| scramble.next()).collect();
                    let pass = |_| {
                        barrier.wait();
                        let start = Instant::now();
                        black_box(sum(black_box(&buffer)));
                        (start, Instant::now())
                    };
                    (0..passes).map(pass).collect()
                })
            })
            .collect();
        workers.into_iter().filter_map(|worker| worker.join().ok()).collect()
    });
    let pass = |pass: usize| {
        let start = times.iter().map(|t| t[pass].0).min()?;
        let end = times.iter().map(|t| t[pass].1).max()?;
        Some((end - start).as_secs_f64())
    };
    Seconds((0..passes).filter_map(pass).fold(f64::INFINITY, f64::min))
}

fn sum(words: &[u64]) -> u64 {
    let mut lanes = [0u64; 16];
    let (chunks, rest) = words.as_chunks::<16>();
    for chunk in chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.iter().chain(rest).fold(0, |a, b| a.wrapping_add(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_everything_once() {
        let words: Vec<u64> = (0..1003).collect();
        assert_eq!(sum(&words), 1002 * 1003 / 2);
    }

    #[test]
    fn a_time_comes_out_for_every_number_of_threads() {
        for threads in [1, 3] {
            let time = read_time(threads, Bytes::mib(1), 2);
            assert!(time.0 > 0.0 && time.0.is_finite());
        }
    }
}
