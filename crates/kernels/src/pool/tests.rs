use super::*;
use crate::arch::Isa;
use crate::gemm::tests::{close, values};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn agrees_with_the_definition(
        in_h in 1usize..12, in_w in 1usize..12, channels in 1usize..80, kernel in (1usize..4, 1usize..4), stride in (1usize..4, 1usize..4),
        dilation in 1usize..3, pad in 0usize..3, ceil: bool, kind in prop_oneof![Just(PoolKind::Max), Just(PoolKind::Average { count_include_pad: true }), Just(PoolKind::Average { count_include_pad: false })],
        seed in 0u64..1000, cut in 0usize..10,
    ) {
        let pad = [pad.min(kernel.0 - 1), pad.min(kernel.1 - 1)];
        let out = |size: usize, kernel: usize, stride: usize, pad: usize| {
            let span = (size + 2 * pad).checked_sub((kernel - 1) * dilation + 1)?;
            Some(if ceil { span.div_ceil(stride) } else { span / stride } + 1)
        };
        let (Some(out_h), Some(out_w)) = (out(in_h, kernel.0, stride.0, pad[0]), out(in_w, kernel.1, stride.1, pad[1])) else {
            return Ok(());
        };
        let shape = PoolShape {
            in_h, in_w, channels, out_h, out_w, kernel: [kernel.0, kernel.1], stride: [stride.0, stride.1],
            dilation: [dilation; 2], pads: [pad[0], pad[1], pad[0], pad[1]],
        };
        let x = values(in_h * in_w * channels, seed);
        for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
            let run = |threads: usize, rows: Range<usize>| {
                let pool = ThreadPool::with_isa(threads, isa);
                let mut y = vec![9.0; rows.len() * out_w * channels];
                let need = shape.input_rows(rows.clone());
                let line = in_w * channels;
                pool2d(&pool, &shape, kind, &x[need.start * line..need.end * line], channels, need.start, &mut y, channels, rows);
                y
            };
            let y = run(2, 0..out_h);
            let cut = cut.min(out_h);
            let mut parts = run(1, 0..cut);
            parts.extend(run(1, cut..out_h));
            prop_assert_eq!(&parts, &y);
            for (i, &got) in y.iter().enumerate() {
                let (oy, ox, c) = (i / channels / out_w, i / channels % out_w, i % channels);
                let (mut sum, mut best, mut count, mut padded) = (0.0, f64::NEG_INFINITY, 0, 0);
                for ky in 0..kernel.0 {
                    for kx in 0..kernel.1 {
                        let (py, px) = (oy * stride.0 + ky * dilation, ox * stride.1 + kx * dilation);
                        padded += usize::from(py < in_h + 2 * pad[0] && px < in_w + 2 * pad[1]);
                        let (iy, ix) = (py.wrapping_sub(pad[0]), px.wrapping_sub(pad[1]));
                        if iy < in_h && ix < in_w {
                            let v = f64::from(x[(iy * in_w + ix) * channels + c]);
                            sum += v;
                            best = best.max(v);
                            count += 1;
                        }
                    }
                }
                let want = match kind {
                    PoolKind::Max => best,
                    PoolKind::Average { count_include_pad: true } => sum / padded.max(1) as f64,
                    PoolKind::Average { .. } => sum / count.max(1) as f64,
                };
                prop_assert!(want == f64::from(got) || close(got, want, 9.0), "{isa:?} {shape:?} {kind:?} {i}: {got}, not {want}");
            }
        }
    }
}
