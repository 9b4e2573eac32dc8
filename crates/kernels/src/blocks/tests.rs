use lightering_units::BlockFormat;
use proptest::prelude::*;

use super::*;

const ISAS: [Isa; 3] = [Isa::Portable, Isa::Avx2, Isa::Avx512];

pub(super) fn numbers(len: usize, seed: u64) -> Vec<f32> {
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

/// Weights of any bits, their scales excepted, which are ordinary numbers.
pub(super) fn random_blocks(format: BlockFormat, rows: usize, k: usize, seed: u64) -> Vec<u8> {
    let bytes = format.row_bytes(k).unwrap();
    let mut w: Vec<u8> =
        numbers(rows * bytes, seed).iter().map(|x| (x.to_bits() >> 7 ^ x.to_bits()) as u8).collect();
    let scales: &[usize] = match format {
        BlockFormat::F32 | BlockFormat::F16 | BlockFormat::BF16 => {
            let values = numbers(rows * k, seed);
            w.chunks_exact_mut(bytes.max(1))
                .zip(values.chunks_exact(k.max(1)))
                .for_each(|(w, x)| quantize_row(format, x, w));
            return w;
        }
        BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q4_K | BlockFormat::Q5_K => &[0, 2],
        BlockFormat::Q2_K => &[80, 82],
        BlockFormat::Q3_K => &[108],
        BlockFormat::Q6_K => &[208],
        BlockFormat::MXFP4 => &[],
        _ => &[0],
    };
    for (i, block) in w.chunks_exact_mut(format.block_bytes()).enumerate() {
        for at in scales {
            let scale = half::f16::from_f32(((i * 7 + at) % 23) as f32 * 0.01 - 0.1);
            block[*at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
        if format == BlockFormat::MXFP4 {
            block[0] = 120 + block[0] % 10;
        }
    }
    w
}

fn product(
    isa: Isa,
    threads: usize,
    format: BlockFormat,
    w: &[u8],
    n: usize,
    k: usize,
    x: &[f32],
) -> Vec<f32> {
    let pool = ThreadPool::with_isa(threads, isa);
    let rows = x.len() / k;
    let mut scratch = vec![f32::NAN; block_matmul_scratch_len(format, k, rows)];
    let mut y = vec![f32::NAN; rows * n];
    block_matmul(&pool, format, w, n, k, x, rows, &mut y, &mut scratch);
    y
}

fn bits(y: &[f32]) -> Vec<u32> {
    y.iter().map(|y| y.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Near the product in double precision of the decoded weights and the activations, the same for every
    /// instruction set and number of threads, and for each row and each range of channels alone.
    #[test]
    fn products_are_right_and_do_not_depend_on_how_they_are_divided(
        format in prop::sample::select(BlockFormat::ALL.to_vec()),
        blocks in 1usize..40, n in 1usize..40, rows in prop_oneof![8 => 1usize..15, 1 => 120usize..140], seed in 0u64..1000, cut: prop::sample::Index,
    ) {
        let k = match format.block_len() { 256 => 256 * blocks.div_ceil(8), len => len * blocks };
        let w = random_blocks(format, n, k, seed);
        let x = numbers(rows * k, seed + 1);
        let bytes = format.row_bytes(k).unwrap();
        let y = product(Isa::Avx512, 1, format, &w, n, k, &x);
        let mut decoded = vec![0.0; k];
        for channel in 0..n {
            dequantize_row(format, &w[channel * bytes..][..bytes], &mut decoded);
            for row in 0..rows {
                let x = &x[row * k..][..k];
                let exact: f64 = x.iter().zip(&decoded).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                // Half a step of the activations, for each weight; far less in the mean, but this cannot fail.
                let step = if format.is_plain() { 1e-5 } else { 2.0 / 127.0 / 2.0 };
                let bound: f64 = decoded.iter().map(|w| f64::from(w.abs())).sum::<f64>() * step * 1.01 + 1e-4;
                let got = f64::from(y[row * n + channel]);
                prop_assert!((got - exact).abs() <= bound, "{format} {row} {channel}: {got}, not {exact} (± {bound})");
            }
        }
        for isa in ISAS {
            for threads in [1, 3] {
                prop_assert_eq!(bits(&product(isa, threads, format, &w, n, k, &x)), bits(&y), "{} {:?}", format, isa);
            }
        }
        for row in 0..rows {
            let alone = product(Isa::Avx512, 1, format, &w, n, k, &x[row * k..][..k]);
            prop_assert_eq!(bits(&alone), bits(&y[row * n..][..n]));
        }
        let cut = cut.index(n + 1);
        let pool = ThreadPool::new(1);
        let mut scratch = vec![f32::NAN; block_matmul_scratch_len(format, k, rows)];
        let activations = BlockActivations::new(&pool, format, k, &x, rows, &mut scratch);
        let mut parts = vec![f32::NAN; rows * n];
        activations.matmul(&pool, format, &w[..cut * bytes], cut, &mut parts, n);
        activations.matmul(&pool, format, &w[cut * bytes..], n - cut, &mut parts[cut.min(n)..], n);
        prop_assert_eq!(bits(&parts), bits(&y));
    }

    /// Encoding loses no more than the distance of neighbouring values explains.
    #[test]
    fn encoded_rows_are_near(format in prop::sample::select(BlockFormat::ALL.to_vec()), blocks in 1usize..9, seed in 0u64..1000) {
        if can_quantize(format) {
            let x = numbers(blocks * format.block_len(), seed);
            let mut bytes = vec![0; format.row_bytes(x.len()).unwrap()];
            quantize_row(format, &x, &mut bytes);
            let mut y = vec![0.0; x.len()];
            dequantize_row(format, &bytes, &mut y);
            // The elements lie within 2 of zero. The searches for scales trade the largest error for the sum of squares,
            // which is that of rounding to evenly spaced values, a twelfth of the squared distance each.
            let step = match format {
                BlockFormat::Q2_K => Some(4.0 / 3.0),
                BlockFormat::Q3_K => Some(4.0 / 7.0),
                BlockFormat::Q4_K => Some(4.0 / 15.0),
                BlockFormat::Q5_K => Some(4.0 / 31.0),
                BlockFormat::Q6_K => Some(2.0 / 31.0),
                _ => None,
            };
            if let Some(step) = step {
                let mean = x.iter().zip(&y).map(|(x, y)| (x - y) * (x - y)).sum::<f32>() / x.len() as f32;
                prop_assert!(mean <= step * step / 12.0 * 1.1, "{format}: mean square {mean}");
                return Ok(());
            }
            let bound = match format {
                BlockFormat::F32 => 0.0,
                BlockFormat::F16 => 0.001,
                BlockFormat::BF16 | BlockFormat::Q8_0 => 0.01,
                BlockFormat::Q4_0 => 0.27,
                BlockFormat::Q4_1 => 0.14,
                BlockFormat::Q5_0 => 0.14,
                _ => 0.07,
            };
            for (x, y) in x.iter().zip(&y) {
                prop_assert!((x - y).abs() <= bound, "{format}: {x} became {y}");
            }
        }
    }
}

#[test]
fn what_is_no_number_reaches_the_result() {
    for format in [BlockFormat::Q4_0, BlockFormat::Q4_K, BlockFormat::Q8_0, BlockFormat::F16] {
        let w = random_blocks(format, 3, 256, 5);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = numbers(512, 3);
            x[300] = bad;
            for isa in ISAS {
                let y = product(isa, 1, format, &w, 3, 256, &x);
                assert!(
                    y[..3].iter().all(|y| y.is_finite()) && y[3..].iter().all(|y| !y.is_finite()),
                    "{format}"
                );
            }
        }
    }
}

#[test]
fn zeros_give_zeros() {
    for format in BlockFormat::ALL.into_iter().filter(|f| can_quantize(*f)) {
        let mut w = vec![1; format.row_bytes(256).unwrap()];
        quantize_row(format, &[0.0; 256], &mut w);
        let mut decoded = [1.0; 256];
        dequantize_row(format, &w, &mut decoded);
        assert_eq!(decoded, [0.0; 256], "{format}");
        assert_eq!(product(Isa::Avx512, 1, format, &w, 1, 256, &[0.0; 256]), [0.0], "{format}");
    }
}
