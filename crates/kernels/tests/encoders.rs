//! Encoders of weights, beside those of ggml.

use lightering_kernels::{dequantize_row, quantize_row};
use lightering_units::BlockFormat;

fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * 2.0
        })
        .collect()
}

/// The mean squares of the errors that ggml's own encoders (`quantize_row_*_ref` of ggml-quants.c, without an importance
/// matrix) make on the same numbers.
#[test]
fn encoders_of_256_are_as_good_as_those_of_ggml() {
    let parts = numbers(4 * 64 * 256, 11);
    let x: Vec<f32> = parts.as_chunks::<4>().0.iter().map(|p| p[0] + p[1] + p[2] + p[3]).collect();
    let reference = [
        (BlockFormat::Q2_K, 0.448_344_22),
        (BlockFormat::Q3_K, 0.113_822_33),
        (BlockFormat::Q4_K, 0.025_685_943),
        (BlockFormat::Q5_K, 0.006_504_822),
        (BlockFormat::Q6_K, 0.001_566_401),
    ];
    for (format, expected) in reference {
        let mut bytes = vec![0; format.row_bytes(x.len()).unwrap()];
        quantize_row(format, &x, &mut bytes);
        let mut y = vec![0.0; x.len()];
        dequantize_row(format, &bytes, &mut y);
        let square = |(x, y): (&f32, &f32)| (f64::from(*x) - f64::from(*y)).powi(2);
        let mean = x.iter().zip(&y).map(square).sum::<f64>() / x.len() as f64;
        // Within a hundredth of the root.
        assert!((mean / expected).sqrt() < 1.01, "{format}: {mean}, that of ggml is {expected}");
    }
}
