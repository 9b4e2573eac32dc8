use super::*;
use crate::arch::Isa;
use crate::epilogue::Residual;
use proptest::prelude::*;

const ISAS: [Isa; 3] = [Isa::Portable, Isa::Avx2, Isa::Avx512];

/// Values in `[-1, 1)`, the same for the same seed.
pub(crate) fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// `|got - want|` within 1e-5 of the sum of magnitudes that went into `want`.
pub(crate) fn close(got: f32, want: f64, magnitude: f64) -> bool {
    (f64::from(got) - want).abs() <= 1e-5 * magnitude.max(1e-30)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn agrees_with_the_triple_loop(
        m in 1usize..40, n in 1usize..150, k in 0usize..70, big_k in proptest::bool::weighted(0.1),
        extra in 0usize..5, seed in 0u64..1000, transposed: bool, with_bias: bool, with_residual: bool,
    ) {
        let k = if big_k { k + 2500 } else { k };
        let (a_stride, b_stride, c_stride) = (k + extra, if transposed { k } else { n } + extra, n + extra);
        let a = values(m * a_stride, seed);
        let b = values(if transposed { n } else { k } * b_stride, seed + 1);
        let bias = values(n, seed + 2);
        let residual = values(m * c_stride, seed + 3);
        let mut packed = vec![f32::NAN; packed_len(k, n)];
        if transposed { pack_nk(k, n, &b, b_stride, &mut packed) } else { pack_kn(k, n, &b, b_stride, &mut packed) }
        let epilogue = Epilogue {
            bias: with_bias.then_some(&bias[..]),
            residual: with_residual.then_some(Residual { data: &residual, stride: c_stride }),
            activation: Activation::Relu,
        };
        for isa in ISAS {
            let pool = ThreadPool::with_isa(1, isa);
            let mut c = vec![7.0; m * c_stride];
            gemm(&pool, m, n, k, &a, a_stride, &packed, &mut c, c_stride, &epilogue);
            for i in 0..m {
                for j in 0..c_stride {
                    let got = c[i * c_stride + j];
                    if j >= n {
                        prop_assert_eq!(got, 7.0);
                        continue;
                    }
                    let (mut want, mut size) = (0.0, 0.0);
                    for l in 0..k {
                        let w = if transposed { b[j * b_stride + l] } else { b[l * b_stride + j] };
                        want += f64::from(a[i * a_stride + l]) * f64::from(w);
                        size += f64::from(a[i * a_stride + l] * w).abs();
                    }
                    want += if with_bias { f64::from(bias[j]) } else { 0.0 };
                    want += if with_residual { f64::from(residual[i * c_stride + j]) } else { 0.0 };
                    prop_assert!(close(got, want.max(0.0), size + 2.0), "{isa:?} [{i}, {j}]: {got}, not {want}");
                }
            }
        }
    }

    #[test]
    fn bits_depend_neither_on_threads_nor_on_rows(
        m in 1usize..200, n in 1usize..200, k in 1usize..40, deep in proptest::bool::weighted(0.2), cut in 0usize..200, seed in 0u64..1000,
    ) {
        let k = if deep { k * 100 } else { k };
        let (a, b) = (values(m * k, seed), values(k * n, seed + 1));
        let mut packed = vec![0.0; packed_len(k, n)];
        pack_kn(k, n, &b, n, &mut packed);
        let epilogue = Epilogue { activation: Activation::Silu, ..Epilogue::NONE };
        for isa in ISAS {
            let run = |threads: usize, rows: Range<usize>| {
                let pool = ThreadPool::with_isa(threads, isa);
                let mut c = vec![0.0; rows.len() * n];
                gemm(&pool, rows.len(), n, k, &a[rows.start * k..], k, &packed, &mut c, n, &epilogue);
                c
            };
            let whole = run(1, 0..m);
            prop_assert_eq!(&run(2, 0..m), &whole);
            prop_assert_eq!(&run(3, 0..m), &whole);
            let cut = cut.min(m);
            let mut parts = run(1, 0..cut);
            parts.extend(run(2, cut..m));
            prop_assert_eq!(&parts, &whole);
        }
    }
}

#[test]
fn nan_and_denormals_pass() {
    for isa in ISAS {
        let pool = ThreadPool::with_isa(1, isa);
        let mut packed = vec![0.0; packed_len(2, 3)];
        pack_kn(2, 3, &[1.0, 2.0, 3.0, 1.0, 1.0, 1.0], 3, &mut packed);
        let a = [f32::NAN, 1.0, 1e-40, 0.0];
        let mut c = [0.0; 6];
        let epilogue = Epilogue { activation: Activation::Relu, ..Epilogue::NONE };
        gemm(&pool, 2, 3, 2, &a, 2, &packed, &mut c, 3, &epilogue);
        assert!(c[..3].iter().all(|x| x.is_nan()), "{isa:?} {c:?}");
        assert_eq!(&c[3..], &[1e-40, 2.0 * 1e-40, 3.0 * 1e-40]);
    }
}

#[test]
#[should_panic(expected = "C: 5 values")]
fn a_short_slice_is_refused() {
    let pool = ThreadPool::new(1);
    gemm(&pool, 2, 3, 1, &[1.0; 2], 1, &[0.0; 16], &mut [0.0; 5], 3, &Epilogue::NONE);
}
