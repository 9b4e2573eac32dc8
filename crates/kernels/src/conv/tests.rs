use super::*;
use crate::arch::Isa;
use crate::epilogue::{Activation, Residual};
use crate::gemm::tests::{close, values};
use proptest::prelude::*;

const ISAS: [Isa; 3] = [Isa::Portable, Isa::Avx2, Isa::Avx512];

fn shapes() -> impl Strategy<Value = ConvShape> {
    let channels = prop_oneof![
        4 => (1usize..5, 1usize..40).prop_map(|(i, o)| (i, o, 1)),
        4 => (8usize..40, 1usize..90).prop_map(|(i, o)| (i, o, 1)),
        4 => (2usize..70).prop_map(|c| (c, c, c)),
        2 => (1usize..4, 1usize..4, 2usize..6).prop_map(|(i, o, g)| (i * g, o * g, g)),
    ];
    let kernel =
        prop_oneof![Just([1, 1]), Just([3, 3]), Just([5, 5]), Just([7, 7]), Just([1, 3]), Just([4, 2])];
    let steps = (1usize..3, 1usize..3, prop_oneof![3 => Just([1, 1]), 1 => Just([2, 1]), 1 => Just([2, 3])]);
    let pads = prop_oneof![Just([0; 4]), Just([1; 4]), Just([2, 1, 0, 3]), Just([3, 3, 3, 3])];
    (channels, kernel, steps, pads, 1usize..20, 1usize..20).prop_filter_map(
        "the kernel must fit",
        |((in_c, out_c, groups), kernel, (sy, sx, dilation), pads, in_h, in_w)| {
            let out = |size: usize, i: usize, stride: usize| {
                let all = size + pads[i] + pads[i + 2];
                let reach = (kernel[i] - 1) * dilation[i] + 1;
                (all >= reach).then(|| (all - reach) / stride + 1)
            };
            let (out_h, out_w) = (out(in_h, 0, sy)?, out(in_w, 1, sx)?);
            Some(ConvShape {
                in_h,
                in_w,
                in_c,
                out_h,
                out_w,
                out_c,
                kernel,
                stride: [sy, sx],
                dilation,
                pads,
                groups,
            })
        },
    )
}

/// The definition; returns the value and the sum of magnitudes.
fn reference(s: &ConvShape, x: &[f32], w: &[f32], y: usize, z: usize, o: usize) -> (f64, f64) {
    let (ci, co) = (s.in_c / s.groups, s.out_c / s.groups);
    let (mut sum, mut size) = (0.0, 0.0);
    for ky in 0..s.kernel[0] {
        for kx in 0..s.kernel[1] {
            let iy = (y * s.stride[0] + ky * s.dilation[0]).wrapping_sub(s.pads[0]);
            let ix = (z * s.stride[1] + kx * s.dilation[1]).wrapping_sub(s.pads[1]);
            if iy >= s.in_h || ix >= s.in_w {
                continue;
            }
            for c in 0..ci {
                let a = x[(iy * s.in_w + ix) * s.in_c + o / co * ci + c];
                let b = w[((o * ci + c) * s.kernel[0] + ky) * s.kernel[1] + kx];
                sum += f64::from(a) * f64::from(b);
                size += f64::from(a * b).abs();
            }
        }
    }
    (sum, size)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn agrees_with_the_definition(s in shapes(), seed in 0u64..1000, extra in 0usize..4, with_residual: bool) {
        let x = values(s.in_h * s.in_w * s.in_c, seed);
        let w = values(s.out_c * (s.in_c / s.groups) * s.kernel[0] * s.kernel[1], seed + 1);
        let bias = values(s.out_c, seed + 2);
        let stride = s.out_c + extra;
        let residual = values(s.out_h * s.out_w * stride, seed + 3);
        let mut packed = vec![f32::NAN; conv_packed_len(&s)];
        pack_conv(&s, &w, &mut packed);
        let pixel_stride = s.in_c + extra;
        let mut strided = vec![f32::NAN; s.in_h * s.in_w * pixel_stride];
        let mut planes = vec![0.0; x.len()];
        for (i, pixel) in x.chunks(s.in_c).enumerate() {
            strided[i * pixel_stride..][..s.in_c].copy_from_slice(pixel);
            for (c, v) in pixel.iter().enumerate() {
                planes[c * s.in_h * s.in_w + i] = *v;
            }
        }
        for isa in ISAS {
            let pool = ThreadPool::with_isa(2, isa);
            let epilogue = Epilogue {
                bias: Some(&bias),
                residual: with_residual.then_some(Residual { data: &residual, stride }),
                activation: Activation::Clip { min: -0.5, max: 0.75 },
            };
            let mut scratch = vec![f32::NAN; conv_scratch_len(&s, true, 2)];
            let mut y = vec![9.0; s.out_h * s.out_w * stride];
            let input = ConvInput::Nhwc { data: &strided, pixel_stride, first_row: 0 };
            conv2d(&pool, &s, input, &packed, &mut y, stride, 0..s.out_h, &epilogue, &mut scratch);
            for i in 0..s.out_h * s.out_w {
                for o in 0..stride {
                    let got = y[i * stride + o];
                    if o >= s.out_c {
                        prop_assert_eq!(got, 9.0);
                        continue;
                    }
                    let (mut want, size) = reference(&s, &x, &w, i / s.out_w, i % s.out_w, o);
                    want += f64::from(bias[o]) + if with_residual { f64::from(residual[i * stride + o]) } else { 0.0 };
                    prop_assert!(close(got, want.clamp(-0.5, 0.75), size + 2.0), "{isa:?} pixel {i} channel {o}: {got}, not {want}");
                }
            }
            if s.groups == 1 && s.dilation[1] == 1 {
                let mut from_planes = vec![9.0; y.len()];
                let input = ConvInput::Nchw { data: &planes, channel_stride: s.in_h * s.in_w, first_row: 0 };
                conv2d(&pool, &s, input, &packed, &mut from_planes, stride, 0..s.out_h, &epilogue, &mut scratch);
                prop_assert_eq!(&from_planes, &y);
            }
        }
    }

    #[test]
    fn stripes_have_the_bits_of_the_whole(s in shapes(), seed in 0u64..1000, cut in 0usize..20, activation in prop_oneof![Just(Activation::None), Just(Activation::HardSwish)]) {
        let x = values(s.in_h * s.in_w * s.in_c, seed);
        let w = values(s.out_c * (s.in_c / s.groups) * s.kernel[0] * s.kernel[1], seed + 1);
        let mut packed = vec![f32::NAN; conv_packed_len(&s)];
        pack_conv(&s, &w, &mut packed);
        let epilogue = Epilogue { activation, ..Epilogue::NONE };
        for isa in ISAS {
            let run = |threads: usize, rows: Range<usize>| {
                let pool = ThreadPool::with_isa(threads, isa);
                let mut scratch = vec![f32::NAN; conv_scratch_len(&s, false, threads)];
                let mut y = vec![9.0; rows.len() * s.out_w * s.out_c];
                let need = s.input_rows(rows.clone());
                let line = s.in_w * s.in_c;
                let input = ConvInput::Nhwc { data: &x[need.start * line..need.end * line], pixel_stride: s.in_c, first_row: need.start };
                conv2d(&pool, &s, input, &packed, &mut y, s.out_c, rows, &epilogue, &mut scratch);
                y
            };
            let whole = run(1, 0..s.out_h);
            prop_assert_eq!(&run(3, 0..s.out_h), &whole);
            let cut = cut.min(s.out_h);
            let mut parts = run(1, 0..cut);
            parts.extend(run(2, cut..s.out_h));
            prop_assert_eq!(&parts, &whole);
        }
    }
}

#[test]
fn more_channels_than_the_row_of_zeros() {
    let s = ConvShape {
        in_h: 4,
        in_w: 4,
        in_c: 2500,
        out_h: 4,
        out_w: 4,
        out_c: 3,
        kernel: [3, 3],
        stride: [1, 1],
        dilation: [1, 1],
        pads: [1; 4],
        groups: 1,
    };
    for s in [s, ConvShape { out_c: 2500, groups: 2500, ..s }] {
        let x = values(s.in_h * s.in_w * s.in_c, 1);
        let w = values(s.out_c * (s.in_c / s.groups) * 9, 2);
        let mut packed = vec![0.0; conv_packed_len(&s)];
        pack_conv(&s, &w, &mut packed);
        for isa in ISAS {
            let pool = ThreadPool::with_isa(1, isa);
            let mut y = vec![0.0; 16 * s.out_c];
            let input = ConvInput::Nhwc { data: &x, pixel_stride: s.in_c, first_row: 0 };
            conv2d(&pool, &s, input, &packed, &mut y, s.out_c, 0..4, &Epilogue::NONE, &mut []);
            for (i, &got) in y.iter().enumerate() {
                let (want, size) = reference(&s, &x, &w, i / s.out_c / 4, i / s.out_c % 4, i % s.out_c);
                assert!(close(got, want, size), "{isa:?} {i}: {got}, not {want}");
            }
        }
    }
}
