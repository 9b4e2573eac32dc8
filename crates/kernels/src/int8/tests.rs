use super::*;
use crate::arch::Isa;
use proptest::prelude::*;

const ISAS: [Isa; 3] = [Isa::Portable, Isa::Avx2, Isa::Avx512];

fn bytes(len: usize, seed: u64) -> Vec<u8> {
    crate::gemm::tests::values(len, seed)
        .into_iter()
        // Extremes are frequent, for they are what saturates.
        .map(|x| {
            if x > 0.8 {
                255
            } else if x < -0.8 {
                128
            } else {
                ((x + 1.0) * 127.0) as u8
            }
        })
        .collect()
}

fn value(byte: u8, signed: bool) -> i32 {
    if signed { i32::from(byte as i8) } else { i32::from(byte) }
}

fn requantized(sum: i32, scale: f32, zero: i32, signed: bool) -> u8 {
    let (low, high) = if signed { (-128, 127) } else { (0, 255) };
    let y = (f64::from(sum as f32 * scale).round_ties_even() as i64 + i64::from(zero)).clamp(low, high);
    y as u8
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn products_are_exact(
        m in 1usize..30, n in 1usize..150, k in prop_oneof![4 => 1usize..50, 1 => 3000usize..3010], a_signed: bool, w_signed: bool, transposed: bool,
        symmetric: bool, zero in -128i32..128, seed in 0u64..1000,
    ) {
        let a = bytes(m * k, seed);
        let b = bytes(k * n, seed + 1);
        let a_zero = if a_signed { zero } else { zero + 128 };
        let w_zeros: Vec<i32> = (0..n as i32).map(|j| if symmetric { 0 } else { j % 7 - 3 }).collect();
        let mut packed = vec![77; packed_bytes_len(k, n)];
        let mut sums = vec![77; n];
        pack_bytes(k, n, &b, w_signed, transposed, &mut packed, &mut sums);
        let weights = ByteWeights { packed: &packed, sums: &sums, zeros: (!symmetric).then_some(&w_zeros) };
        let bias: Vec<i32> = (0..n as i32).map(|j| j * 1000 - 5000).collect();
        let scale: Vec<f32> = (0..n).map(|j| 0.001 + 0.0001 * j as f32).collect();
        for isa in ISAS {
            let pool = ThreadPool::with_isa(2, isa);
            let input = ByteInput { data: &a, signed: a_signed, zero: a_zero, stride: k };
            let mut exact = vec![0; m * n];
            gemm_bytes(&pool, m, n, k, input, weights, Some(&bias), ByteOutput::I32 { data: &mut exact, stride: n });
            let mut y = vec![0; m * n];
            let output = ByteOutput::Bytes { data: &mut y, stride: n, signed: a_signed, scale: &scale, zero: 3, limits: None };
            gemm_bytes(&pool, m, n, k, input, weights, Some(&bias), output);
            let mut z = vec![0.0; m * n];
            let output = ByteOutput::F32 { data: &mut z, stride: n, scale: &scale[..1], bias: Some(&scale), activation: crate::Activation::Relu };
            gemm_bytes(&pool, m, n, k, input, weights, Some(&bias), output);
            for i in 0..m {
                for j in 0..n {
                    let mut want = bias[j];
                    for l in 0..k {
                        let w = value(b[if transposed { j * k + l } else { l * n + j }], w_signed) - if w_signed { 0 } else { 128 };
                        want += (value(a[i * k + l], a_signed) - a_zero) * (w - w_zeros[j]);
                    }
                    prop_assert_eq!(exact[i * n + j], want);
                    prop_assert_eq!(y[i * n + j], requantized(want, scale[j], 3, a_signed));
                    prop_assert_eq!(z[i * n + j], (want as f32 * scale[0] + scale[j]).max(0.0));
                }
            }
        }
    }

    #[test]
    fn convolutions_are_exact(
        kind in 0usize..4, c in 1usize..150, o in 1usize..70, kernel in prop_oneof![Just([1, 1]), Just([3, 3]), Just([5, 5]), Just([2, 3])],
        stride in 1usize..3, dilation in 1usize..3, pad in 0usize..3, h in 1usize..9, w in 1usize..14, signed: bool, zeros in 0usize..4,
        zero in -128i32..128, cut in 0usize..9, seed in 0u64..1000,
    ) {
        let (in_c, out_c, groups) = match kind { 0 => (c, o, 1), 1 => (c, c, c), 2 => (c % 5 * 2 + 2, o % 5 * 2 + 2, 2), _ => (c % 7 + 1, o, 1) };
        let out = |size: usize, kernel: usize| Some((size + 2 * pad).checked_sub((kernel - 1) * dilation + 1)? / stride + 1);
        let (Some(out_h), Some(out_w)) = (out(h, kernel[0]), out(w, kernel[1])) else { return Ok(()) };
        let shape = ConvShape {
            in_h: h, in_w: w, in_c, out_h, out_w, out_c, kernel, stride: [stride; 2], dilation: [dilation; 2], pads: [pad; 4], groups,
        };
        let (ci, co) = (in_c / groups, out_c / groups);
        let x = bytes(h * w * in_c, seed);
        let weights = bytes(out_c * ci * kernel[0] * kernel[1], seed + 1);
        let x_zero = if signed { zero } else { zero + 128 };
        // The largest differences of a weight and its zero point are 255 and -255.
        let zero_of = |j: i32| match zeros { 0 => 0, 1 => j % 5 - 2, 2 => if j % 70 == 0 { -128 } else { -60 }, _ => 127 };
        let w_zeros: Vec<i32> = (0..out_c as i32).map(zero_of).collect();
        let symmetric = zeros == 0;
        let mut packed = vec![77; conv_packed_bytes_len(&shape)];
        let mut sums = vec![77; out_c];
        pack_conv_bytes(&shape, &weights, true, &mut packed, &mut sums);
        let parts = ByteWeights { packed: &packed, sums: &sums, zeros: (!symmetric).then_some(&w_zeros) };
        let bias: Vec<i32> = (0..out_c as i32).map(|j| j * 100).collect();
        let scale: Vec<f32> = (0..out_c).map(|j| 0.0007 + 0.0001 * j as f32).collect();
        let limits = (zeros % 2 == 1).then_some((-7, 90));
        for isa in ISAS {
            let run = |threads: usize, rows: Range<usize>| {
                let pool = ThreadPool::with_isa(threads, isa);
                let need = shape.input_rows(rows.clone());
                let data = &x[need.start * w * in_c..need.end * w * in_c];
                let input = ByteInput { data, signed, zero: x_zero, stride: in_c };
                let mut y = vec![0; rows.len() * out_w * out_c];
                let output = ByteOutput::I32 { data: &mut y, stride: out_c };
                conv2d_bytes(&pool, &shape, input, need.start, parts, Some(&bias), output, rows.clone());
                let mut z = vec![0; y.len()];
                let output = ByteOutput::Bytes { data: &mut z, stride: out_c, signed, scale: &scale, zero: 3, limits };
                conv2d_bytes(&pool, &shape, input, need.start, parts, Some(&bias), output, rows);
                for (i, (z, y)) in z.into_iter().zip(&y).enumerate() {
                    let (low, high) = limits.unwrap_or((-128, 255));
                    let want = value(requantized(*y, scale[i % out_c], 3, signed), signed);
                    assert_eq!(value(z, signed), want.clamp(low, high), "{isa:?} {shape:?} {i}");
                }
                y
            };
            let cut = cut.min(out_h);
            let mut y = run(2, 0..cut);
            y.extend(run(1, cut..out_h));
            for (i, &got) in y.iter().enumerate() {
                let (oy, ox, j) = (i / out_c / out_w, i / out_c % out_w, i % out_c);
                let mut want = bias[j];
                for ky in 0..kernel[0] {
                    for kx in 0..kernel[1] {
                        let iy = (oy * stride + ky * dilation).wrapping_sub(pad);
                        let ix = (ox * stride + kx * dilation).wrapping_sub(pad);
                        if iy < h && ix < w {
                            for l in 0..ci {
                                let a = value(x[(iy * w + ix) * in_c + j / co * ci + l], signed) - x_zero;
                                want += a * (value(weights[((j * ci + l) * kernel[0] + ky) * kernel[1] + kx], true) - w_zeros[j]);
                            }
                        }
                    }
                }
                prop_assert_eq!(got, want, "{:?} {:?} {}", isa, shape, i);
            }
        }
    }
}
