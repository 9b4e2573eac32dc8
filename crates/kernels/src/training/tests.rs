use super::*;
use crate::arch::Isa;
use crate::conv::ConvShape;
use crate::epilogue::Activation;
use crate::gemm::tests::{close, values};
use crate::matmul::{AttentionMask, AttentionShape, HeadStrides, Matrices};
use crate::pool::PoolShape;
use proptest::prelude::*;

const ISAS: [Isa; 3] = [Isa::Portable, Isa::Avx2, Isa::Avx512];

/// Runs `f` for every instruction set and 1, 2 and 3 threads; results of one instruction set must have the same bits.
fn everywhere(mut f: impl FnMut(&ThreadPool) -> Vec<f32>) -> Vec<(Isa, Vec<f32>)> {
    ISAS.iter()
        .map(|&isa| {
            let one = f(&ThreadPool::with_isa(1, isa));
            for threads in [2, 3] {
                let other = f(&ThreadPool::with_isa(threads, isa));
                let same = one.iter().zip(&other).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same && one.len() == other.len(), "{isa:?}: {threads} threads give other bits");
            }
            (isa, one)
        })
        .collect()
}

fn scratch(len: usize) -> Vec<f32> {
    vec![f32::NAN; len]
}

fn agree(what: &str, got: &[f32], want: &[f64], size: &[f64]) -> Result<(), TestCaseError> {
    prop_assert_eq!(got.len(), want.len());
    for (i, ((&g, &w), &m)) in got.iter().zip(want).zip(size).enumerate() {
        prop_assert!(close(g, w, m), "{what}[{i}] is {g}, not {w}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn products_agree_with_the_triple_loop(
        batch in 1usize..6, m in prop_oneof![1usize..40, 180usize..230], n in prop_oneof![1usize..150, Just(64)],
        k in prop_oneof![1usize..60, 500usize..700], ta: bool, tb: bool, shared: bool, near in 0usize..2,
        with_bias: bool, seed in 0u64..1000,
    ) {
        let (m, k) = if m * n * k * batch > 2_000_000 { (m.min(20), k.min(60)) } else { (m, k) };
        let transposed = Transposed { a: ta, b: tb };
        let (a_row, b_row) = (if ta { m } else { k } + near, if tb { k } else { n } + near);
        let a_size = if ta { k } else { m } * a_row;
        let b_size = if tb { n } else { k } * b_row;
        let a = values(batch * a_size, seed);
        let b = values(batch * b_size, seed + 1);
        let bias = values(n, seed + 2);
        let bias = with_bias.then_some(&bias[..]);
        let a_at = Matrices { batch_stride: a_size, row_stride: a_row };
        let b_at = Matrices { batch_stride: if shared { 0 } else { b_size }, row_stride: b_row };
        let c_at = Matrices { batch_stride: m * n, row_stride: n };
        let alpha = if near == 0 { 1.0 } else { -0.5 };
        let residual = values(batch * m * n, seed + 3);
        let residual = (!ta && seed % 2 == 0).then_some(&residual[..]);
        let (mut want, mut size) = (Vec::new(), Vec::new());
        for p in 0..batch {
            for i in 0..m {
                for j in 0..n {
                    let (mut sum, mut total) = (0.0, 1.0);
                    for l in 0..k {
                        let x = a[p * a_size + if ta { l * a_row + i } else { i * a_row + l }];
                        let w = b[p * b_at.batch_stride + if tb { j * b_row + l } else { l * b_row + j }];
                        sum += f64::from(x) * f64::from(w);
                        total += f64::from(x * w).abs();
                    }
                    let v = sum * f64::from(alpha) + bias.map_or(0.0, |b| f64::from(b[j]))
                        + residual.map_or(0.0, |r| f64::from(r[(p * m + i) * n + j]));
                    want.push(v.max(0.0));
                    size.push(total + 1.0);
                }
            }
        }
        for (isa, got) in everywhere(|pool| {
            let mut c = vec![f32::NAN; batch * m * n];
            let mut scratch = scratch(product_scratch_len(batch, [m, n, k], transposed, pool.threads()));
            product(pool, batch, [m, n, k], alpha, &a, a_at, &b, b_at, transposed, &mut c, c_at, bias, residual, Activation::Relu, &mut scratch);
            c
        }) {
            agree(&format!("{isa:?}"), &got, &want, &size)?;
        }
    }

    #[test]
    fn convolutions_agree_with_loops(
        batch in 1usize..5, in_h in 1usize..9, in_w in 1usize..9, kernel in prop_oneof![Just([1usize, 1]), Just([3, 3]), Just([5, 5]), Just([2, 3])],
        stride in prop_oneof![Just([1usize, 1]), Just([2, 2]), Just([1, 2]), Just([3, 3])], pads in proptest::array::uniform4(0usize..3),
        dilation in prop_oneof![4 => Just([1usize, 1]), 1 => Just([2, 1])],
        channels in prop_oneof![Just((3usize, 5usize, 1usize)), Just((17, 18, 1)), Just((40, 20, 1)), Just((4, 6, 2)), Just((20, 20, 20)), Just((33, 33, 33)), Just((32, 64, 2))],
        seed in 0u64..1000,
    ) {
        let (in_c, out_c, groups) = channels;
        let out = |size: usize, axis: usize| {
            let padded = size + pads[axis] + pads[axis + 2];
            padded.checked_sub((kernel[axis] - 1) * dilation[axis] + 1).map(|n| n / stride[axis] + 1)
        };
        let (Some(out_h), Some(out_w)) = (out(in_h, 0), out(in_w, 1)) else { return Ok(()) };
        let shape = ConvShape { in_h, in_w, in_c, out_h, out_w, out_c, kernel, stride, dilation, pads, groups };
        let conv = TrainConv { shape, batch };
        let (per, taps) = (in_c / groups, kernel[0] * kernel[1]);
        let x = values(batch * in_h * in_w * in_c, seed);
        let w = values(out_c * per * taps, seed + 1);
        let dy = values(batch * out_h * out_w * out_c, seed + 2);
        let bias = values(out_c, seed + 3);
        let (mut y, mut dx, mut dw) = (vec![0f64; dy.len()], vec![0f64; x.len()], vec![0f64; w.len()]);
        for b in 0..batch { for oy in 0..out_h { for ox in 0..out_w { for o in 0..out_c {
            let at = ((b * out_h + oy) * out_w + ox) * out_c + o;
            y[at] = f64::from(bias[o]);
            for ky in 0..kernel[0] { for kx in 0..kernel[1] {
                let iy = (oy * stride[0] + ky * dilation[0]).wrapping_sub(pads[0]);
                let ix = (ox * stride[1] + kx * dilation[1]).wrapping_sub(pads[1]);
                if iy >= in_h || ix >= in_w { continue; }
                for i in 0..per {
                    let from = ((b * in_h + iy) * in_w + ix) * in_c + o / (out_c / groups) * per + i;
                    let weight = (o * per + i) * taps + ky * kernel[1] + kx;
                    y[at] += f64::from(x[from]) * f64::from(w[weight]);
                    dx[from] += f64::from(dy[at]) * f64::from(w[weight]);
                    dw[weight] += f64::from(dy[at]) * f64::from(x[from]);
                }
            }}
        }}}}
        let size = |n: usize| vec![(per * taps * batch * 8) as f64; n];
        for (isa, got) in everywhere(|pool| {
            let mut out = vec![f32::NAN; y.len()];
            let mut scratch = scratch(conv_forward_scratch_len(&conv, pool.threads()));
            conv_forward(pool, &conv, &x, &w, Some(&bias), None, Activation::None, &mut out, &mut scratch);
            out
        }) {
            agree(&format!("y {isa:?}"), &got, &y, &size(y.len()))?;
        }
        for (isa, got) in everywhere(|pool| {
            let mut out = vec![f32::NAN; x.len()];
            let mut scratch = scratch(conv_input_grad_scratch_len(&conv, pool.threads()));
            conv_input_grad(pool, &conv, &dy, &w, &mut out, &mut scratch);
            out
        }) {
            agree(&format!("dx {isa:?}"), &got, &dx, &size(x.len()))?;
        }
        for (isa, got) in everywhere(|pool| {
            let mut out = vec![f32::NAN; w.len()];
            let mut scratch = scratch(conv_weight_grad_scratch_len(&conv, pool.threads()));
            conv_weight_grad(pool, &conv, &x, &dy, &mut out, &mut scratch);
            out
        }) {
            agree(&format!("dw {isa:?}"), &got, &dw, &size(w.len()))?;
        }
    }

    #[test]
    fn statistics_and_normalisation_agree_with_the_definition(
        rows in prop_oneof![1usize..50, 3000usize..4000], c in prop_oneof![1usize..40, Just(64usize)], shift in prop_oneof![Just(0f32), Just(100.0)],
        batch: bool, with_scale: bool, seed in 0u64..1000,
    ) {
        let x: Vec<f32> = values(rows * c, seed).iter().map(|v| v + shift).collect();
        let dy = values(rows * c, seed + 1);
        let (scale, bias) = (values(c, seed + 2), values(c, seed + 3));
        let scale_used = with_scale.then_some(&scale[..]);
        let epsilon = 1e-3f32;
        let column = |j: usize| (0..rows).map(move |r| r * c + j);
        let mut mean = vec![0.0; c];
        let mut variance = vec![0.0; c];
        for (isa, got) in everywhere(|pool| {
            let mut scratch = scratch(batch_scratch_len(rows, c));
            batch_statistics(pool, rows, c, &x, &mut mean, &mut variance, &mut scratch);
            mean.iter().chain(&variance).copied().collect()
        }) {
            for j in 0..c {
                let m: f64 = column(j).map(|i| f64::from(x[i])).sum::<f64>() / rows as f64;
                let v: f64 = column(j).map(|i| (f64::from(x[i]) - m).powi(2)).sum::<f64>() / rows as f64;
                prop_assert!((f64::from(got[j]) - m).abs() < 1e-6 * (1.0 + m.abs()), "{isa:?} {} {m}", got[j]);
                prop_assert!((f64::from(got[c + j]) - v).abs() < 1e-5, "{isa:?} {} {v}", got[c + j]);
            }
        }
        let mean: Vec<f32> = mean.clone();
        for (_, got) in everywhere(|pool| {
            let mut y = vec![f32::NAN; rows * c];
            normalise(pool, rows, c, epsilon, &x, &mean, &variance, scale_used, Some(&bias), &mut y, &mut scratch(c));
            y
        }) {
            for i in 0..rows * c {
                let j = i % c;
                let unit = (f64::from(x[i]) - f64::from(mean[j])) / (f64::from(variance[j]) + f64::from(epsilon)).sqrt();
                let want = unit * scale_used.map_or(1.0, |s| f64::from(s[j])) + f64::from(bias[j]);
                prop_assert!((f64::from(got[i]) - want).abs() < 1e-4, "{} {want}", got[i]);
            }
        }
        for (isa, got) in everywhere(|pool| {
            let (mut dx, mut ds, mut db) = (vec![f32::NAN; rows * c], vec![f32::NAN; c], vec![f32::NAN; c]);
            let mut scratch = scratch(batch_scratch_len(rows, c));
            normalise_grad(pool, rows, c, epsilon, batch, &x, &dy, &mean, &variance, scale_used, Some(&mut dx), Some(&mut ds), Some(&mut db), &mut scratch);
            dx.extend(ds);
            dx.extend(db);
            dx
        }) {
            for j in 0..c {
                let inverse = 1.0 / (f64::from(variance[j]) + f64::from(epsilon)).sqrt();
                let unit = |i: usize| (f64::from(x[i]) - f64::from(mean[j])) * inverse;
                let ds: f64 = column(j).map(|i| f64::from(dy[i]) * unit(i)).sum();
                let db: f64 = column(j).map(|i| f64::from(dy[i])).sum();
                let s = scale_used.map_or(1.0, |s| f64::from(s[j])) * inverse;
                for i in column(j) {
                    let g = f64::from(dy[i]);
                    let want = if batch { s * (g - db / rows as f64 - unit(i) * ds / rows as f64) } else { s * g };
                    prop_assert!((f64::from(got[i]) - want).abs() < 2e-3 * (1.0 + s.abs()), "{isa:?} {} {want}", got[i]);
                }
                prop_assert!((f64::from(got[rows * c + j]) - ds).abs() < 1e-3 * (1.0 + rows as f64).sqrt() * inverse.max(1.0));
                prop_assert!((f64::from(got[rows * c + c + j]) - db).abs() < 1e-4 * (1.0 + rows as f64).sqrt());
            }
        }
    }

    #[test]
    fn norm_gradients_agree_with_the_definition(rows in prop_oneof![1usize..20, 300usize..400], n in 1usize..100, centre: bool, with_scale: bool, seed in 0u64..1000) {
        let (x, dy, scale) = (values(rows * n, seed), values(rows * n, seed + 1), values(n, seed + 2));
        let scale = with_scale.then_some(&scale[..]);
        let epsilon = 1e-2f32;
        for (isa, got) in everywhere(|pool| {
            let (mut dx, mut ds, mut db) = (vec![f32::NAN; rows * n], vec![f32::NAN; n], vec![0.0; n]);
            let mut scratch = scratch(norm_grad_scratch_len(rows, n));
            if centre {
                layer_norm_grad(pool, rows, n, epsilon, &x, scale, &dy, Some(&mut dx), Some(&mut ds), Some(&mut db), &mut scratch);
            } else {
                rms_norm_grad(pool, rows, n, epsilon, &x, scale, &dy, Some(&mut dx), Some(&mut ds), &mut scratch);
            }
            dx.extend(ds);
            dx.extend(db);
            dx
        }) {
            let (mut ds, mut db) = (vec![0f64; n], vec![0f64; n]);
            for r in 0..rows {
                let at = |i: usize| r * n + i;
                let mean = if centre { (0..n).map(|i| f64::from(x[at(i)])).sum::<f64>() / n as f64 } else { 0.0 };
                let variance = (0..n).map(|i| (f64::from(x[at(i)]) - mean).powi(2)).sum::<f64>() / n as f64;
                let inverse = 1.0 / (variance + f64::from(epsilon)).sqrt();
                let unit = |i: usize| (f64::from(x[at(i)]) - mean) * inverse;
                let g = |i: usize| f64::from(dy[at(i)]) * scale.map_or(1.0, |s| f64::from(s[i]));
                let plain = if centre { (0..n).map(g).sum::<f64>() / n as f64 } else { 0.0 };
                let moved = (0..n).map(|i| g(i) * unit(i)).sum::<f64>() / n as f64;
                for i in 0..n {
                    let want = inverse * (g(i) - plain - unit(i) * moved);
                    prop_assert!((f64::from(got[at(i)]) - want).abs() < 1e-4 * inverse.max(1.0), "{isa:?} {} {want}", got[at(i)]);
                    ds[i] += f64::from(dy[at(i)]) * unit(i);
                    db[i] += f64::from(dy[at(i)]);
                }
            }
            for i in 0..n {
                prop_assert!((f64::from(got[rows * n + i]) - ds[i]).abs() < 1e-3);
                prop_assert!(!centre || (f64::from(got[rows * n + n + i]) - db[i]).abs() < 1e-3);
            }
        }
    }

    #[test]
    fn losses_agree_with_the_definition(rows in 1usize..30, n in 1usize..50, smooth in prop_oneof![Just(0f32), Just(0.1)], soft: bool, weighted: bool, ignore: bool, seed in 0u64..1000) {
        let logits: Vec<f32> = values(rows * n, seed).iter().map(|v| v * 5.0).collect();
        let labels: Vec<i64> = (0..rows).map(|r| if ignore && r % 3 == 1 { -7 } else { ((r * 31 + seed as usize) % n) as i64 }).collect();
        let probabilities: Vec<f32> = values(rows * n, seed + 1).iter().map(|v| v + 1.0).collect();
        let weights = values(rows, seed + 2);
        let weights = weighted.then_some(&weights[..]);
        let shape = LossShape { rows, classes: n, label_smoothing: smooth, ignore: Some(-7) };
        let label = |r: usize| labels[r];
        let target = if soft { Target::Probabilities(&probabilities) } else { Target::Class(&label) };
        let wanted = |r: usize, c: usize| -> f64 {
            let t = if soft { f64::from(probabilities[r * n + c]) } else { f64::from(u8::from(labels[r] == c as i64)) };
            t * (1.0 - f64::from(smooth)) + f64::from(smooth) / n as f64
        };
        let counts = |r: usize| soft || labels[r] >= 0;
        let count = (0..rows).filter(|&r| counts(r)).count().max(1) as f64;
        for (isa, got) in everywhere(|pool| {
            let mut out = vec![f32::NAN; 1 + rows + rows * n];
            let (losses, dx) = out.split_at_mut(1 + rows);
            let (loss, per_row) = losses.split_at_mut(1);
            cross_entropy(pool, &shape, &logits, target, weights, &mut loss[0], per_row).unwrap();
            cross_entropy_grad(pool, &shape, &logits, target, 2.0, weights, dx).unwrap();
            out
        }) {
            let mut total = 0.0;
            for r in 0..rows {
                let row: Vec<f64> = logits[r * n..][..n].iter().map(|&v| f64::from(v)).collect();
                let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let log = top + row.iter().map(|v| (v - top).exp()).sum::<f64>().ln();
                let weight = weights.map_or(1.0, |w| f64::from(w[r]));
                let used = f64::from(u8::from(counts(r)));
                let loss = -used * weight * (0..n).map(|c| wanted(r, c) * (row[c] - log)).sum::<f64>();
                prop_assert!((f64::from(got[1 + r]) - loss).abs() < 1e-4 * (1.0 + loss.abs()), "{isa:?} {} {loss}", got[1 + r]);
                total += loss;
                let mass: f64 = (0..n).map(|c| wanted(r, c)).sum();
                for c in 0..n {
                    let want = used * 2.0 * weight / count * ((row[c] - log).exp() * mass - wanted(r, c));
                    let g = f64::from(got[1 + rows + r * n + c]);
                    prop_assert!((g - want).abs() < 1e-5 * (1.0 + mass), "{isa:?} {g} {want}");
                }
            }
            prop_assert!((f64::from(got[0]) - total / count).abs() < 1e-4 * (1.0 + total.abs()));
        }
        let bad = |r: usize| if r == 0 { n as i64 } else { 0 };
        let pool = ThreadPool::new(1);
        let refused = cross_entropy(&pool, &shape, &logits, Target::Class(&bad), None, &mut 0.0, &mut vec![0.0; rows]);
        prop_assert_eq!(refused, Err(n as i64));
    }

    #[test]
    fn pools_send_back_what_they_took(batch in 1usize..4, in_h in 1usize..8, in_w in 1usize..8, c in 1usize..40, kernel in 1usize..4, stride in 1usize..4, pad in 0usize..2, include: bool, seed in 0u64..1000) {
        let pad = pad.min(kernel - 1);
        let out = |n: usize| (n + 2 * pad).checked_sub(kernel).map(|n| n / stride + 1);
        let (Some(out_h), Some(out_w)) = (out(in_h), out(in_w)) else { return Ok(()) };
        let shape = PoolShape { in_h, in_w, channels: c, out_h, out_w, kernel: [kernel; 2], stride: [stride; 2], dilation: [1, 1], pads: [pad; 4] };
        // Few different values, so that there are equal ones in a window.
        let x: Vec<f32> = values(batch * in_h * in_w * c, seed).iter().map(|v| (v * 3.0).round()).collect();
        let dy = values(batch * out_h * out_w * c, seed + 1);
        let (mut y, mut by_max, mut by_mean) = (vec![0f32; dy.len()], vec![0f64; x.len()], vec![0f64; x.len()]);
        for b in 0..batch { for oy in 0..out_h { for ox in 0..out_w { for ch in 0..c {
            let at = ((b * out_h + oy) * out_w + ox) * c + ch;
            let taps: Vec<usize> = (0..kernel * kernel).filter_map(|k| {
                let iy = (oy * stride + k / kernel).wrapping_sub(pad);
                let ix = (ox * stride + k % kernel).wrapping_sub(pad);
                (iy < in_h && ix < in_w).then(|| ((b * in_h + iy) * in_w + ix) * c + ch)
            }).collect();
            y[at] = taps.iter().map(|&i| x[i]).fold(f32::NEG_INFINITY, f32::max);
            let first = taps.iter().find(|&&i| x[i] == y[at]).unwrap();
            by_max[*first] += f64::from(dy[at]);
            let count = if include { kernel * kernel } else { taps.len() };
            for &i in &taps { by_mean[i] += f64::from(dy[at]) / count as f64; }
        }}}}
        let size = vec![4.0; x.len()];
        for (_, got) in everywhere(|pool| { let mut dx = vec![f32::NAN; x.len()]; max_pool_grad(pool, &shape, batch, &dy, &x, &y, &mut dx); dx }) {
            agree("max", &got, &by_max, &size)?;
        }
        for (_, got) in everywhere(|pool| { let mut dx = vec![f32::NAN; x.len()]; average_pool_grad(pool, &shape, batch, include, &dy, &mut dx); dx }) {
            agree("mean", &got, &by_mean, &size)?;
        }
    }

    #[test]
    fn sums_masks_and_moves_agree_with_loops(outer in 1usize..4, rows in prop_oneof![1usize..30, 900usize..1100], n in 1usize..50, seed in 0u64..1000) {
        let x = values(outer * rows * n, seed);
        let (mut want, mut trailing) = (vec![0f64; outer * n], vec![0f64; outer * rows]);
        for (i, v) in x.iter().enumerate() {
            want[i / (rows * n) * n + i % n] += f64::from(*v) * 0.5;
            trailing[i / n] += f64::from(*v) * 0.5;
        }
        for (_, got) in everywhere(|pool| {
            let mut y = vec![f32::NAN; outer * n];
            sum_leading(pool, [outer, rows, n], 0.5, &x, &mut y, &mut scratch(sum_leading_scratch_len(outer, rows, n)));
            y
        }) {
            agree("leading", &got, &want, &vec![rows as f64; outer * n])?;
        }
        for (_, got) in everywhere(|pool| { let mut y = vec![f32::NAN; outer * rows]; sum_trailing(pool, outer * rows, n, 0.5, &x, &mut y); y }) {
            agree("trailing", &got, &trailing, &vec![n as f64; outer * rows])?;
        }
        for isa in ISAS {
            let pool = ThreadPool::with_isa(2, isa);
            let (mut above, mut between) = (vec![255u8; x.len().div_ceil(8)], vec![255u8; x.len().div_ceil(8)]);
            mask_above(&pool, 0.1, &x, &mut above);
            mask_between(&pool, -0.5, 0.5, &x, &mut between);
            let mut dx = vec![f32::NAN; x.len()];
            mask_grad(&pool, &above, &x, &mut dx);
            for (i, &v) in x.iter().enumerate() {
                prop_assert_eq!(above[i / 8] >> (i % 8) & 1 == 1, v > 0.1);
                prop_assert_eq!(between[i / 8] >> (i % 8) & 1 == 1, v > -0.5 && v < 0.5);
                prop_assert_eq!(dx[i], if v > 0.1 { v } else { 0.0 });
            }
            let mut y = vec![f32::NAN; x.len()];
            swap_middle_axes(&pool, [1, outer, rows, n], &x, &mut y);
            for o in 0..outer { for r in 0..rows { for j in 0..n {
                prop_assert_eq!(y[(r * outer + o) * n + j], x[(o * rows + r) * n + j]);
            }}}
            let index = |i: usize| ((i * 7) % 5) as i64 - 2;
            let mut table = vec![f32::NAN; 5 * n];
            gather_grad(&pool, 5, n, &index, outer * rows, &x, &mut table).unwrap();
            let mut want = vec![0f32; 5 * n];
            for i in 0..outer * rows {
                let row = (index(i) + 5) as usize % 5;
                for j in 0..n { want[row * n + j] += x[i * n + j]; }
            }
            prop_assert_eq!(&table, &want);
            prop_assert_eq!(gather_grad(&pool, 2, n, &|_| 2, 1, &x, &mut table), Err(2));
        }
    }

    #[test]
    fn updates_follow_their_rules(len in prop_oneof![1usize..700, Just(70_000usize)], rows in 0usize..4, steps in 1usize..4, seed in 0u64..1000) {
        // With `rows` the parameter is `[5, inner]` and some of its five rows are updated.
        let inner = if rows == 0 { len } else { len.div_ceil(5) };
        let list: Vec<usize> = (0..rows).map(|i| i + 1).collect();
        let place = if rows == 0 { UpdatePlace::all(len) } else { UpdatePlace { outer: 1, axis: 5, inner, channels: Some(&list) } };
        let total = if rows == 0 { len } else { 5 * inner };
        let count = place.values();
        let target = |i: usize| if rows == 0 { i } else { list[i / inner] * inner + i % inner };
        let start = values(total, seed);
        let adam = AdamRule { beta1: 0.9, beta2: 0.99, epsilon: 1e-6, weight_decay: 0.1, decoupled: seed % 2 == 0 };
        for kind in 0..5 {
            let (mut p64, mut m64, mut v64): (Vec<f64>, _, _) = (start.iter().map(|&v| f64::from(v)).collect(), vec![0f64; count], vec![0f64; count]);
            let mut unsure = vec![false; total];
            let schedule = |t: i32| Schedule { rate: 0.01, scale: 0.5, correction1: 1.0 - 0.9f32.powi(t), correction2: 1.0 - 0.99f32.powi(t) };
            for t in 1..=steps {
                let g = values(count, seed + t as u64);
                let s = schedule(t as i32);
                for i in 0..count {
                    let at = target(i);
                    let (p, m, v) = (&mut p64[at], &mut m64[i], &mut v64[i]);
                    let mut g = f64::from(g[i]) * 0.5;
                    match kind {
                        0 => *p += g,
                        1 => *p -= 0.01 * (g + 0.1 * *p),
                        2 => { g += 0.1 * *p; *m = 0.9 * *m + g; *p -= 0.01 * (g + 0.9 * *m); }
                        3 => {
                            if adam.decoupled { *p -= 0.01 * 0.1 * *p } else { g += 0.1 * *p }
                            *m = 0.9 * *m + 0.1 * g;
                            *v = 0.99 * *v + 0.01 * g * g;
                            *p -= 0.01 * (*m / f64::from(s.correction1)) / ((*v / f64::from(s.correction2)).sqrt() + 1e-6);
                        }
                        _ => {
                            let u = 0.9 * *m + 0.1 * g;
                            // Rounding may turn the sign of what cancels.
                            unsure[at] |= u.abs() < 1e-6;
                            *p -= 0.01 * (0.1 * *p + if u == 0.0 { 0.0 } else { u.signum() });
                            *m = 0.99 * *m + 0.01 * g;
                        }
                    }
                }
            }
            for (isa, got) in everywhere(|pool| {
                let (mut p, mut m, mut v) = (start.clone(), vec![0f32; count], vec![0f32; count]);
                for t in 1..=steps {
                    let g = values(count, seed + t as u64);
                    let s = schedule(t as i32);
                    match kind {
                        0 => accumulate(pool, s, &place, &mut p, &g),
                        1 => sgd_step(pool, 0.0, false, 0.1, s, &place, &mut p, None, &g),
                        2 => sgd_step(pool, 0.9, true, 0.1, s, &place, &mut p, Some(&mut m), &g),
                        3 => adam_step(pool, &adam, s, &place, &mut p, &mut m, &mut v, &g),
                        _ => lion_step(pool, [0.9, 0.99], 0.1, s, &place, &mut p, &mut m, &g),
                    }
                }
                p
            }) {
                for i in 0..total {
                    prop_assert!(unsure[i] || (f64::from(got[i]) - p64[i]).abs() < 2e-4, "{kind} {isa:?} [{i}]: {} {}", got[i], p64[i]);
                }
            }
        }
    }
}

#[test]
fn eight_bit_moments_stay_near_those_of_adam() {
    let len = 1000;
    let rule = AdamRule { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.01, decoupled: true };
    let list: Vec<usize> = vec![0, 2];
    let place = UpdatePlace { outer: 1, axis: 3, inner: len / 2, channels: Some(&list) };
    let start = values(1500, 3);
    let mut bits = None;
    for isa in ISAS {
        for threads in [1, 2] {
            let pool = ThreadPool::with_isa(threads, isa);
            let (mut exact, mut m, mut v) = (start.clone(), vec![0.0; len], vec![0.0; len]);
            let mut rough = start.clone();
            let bytes = len.div_ceil(256) * 260;
            let (mut m8, mut v8) = (vec![0u8; bytes], vec![0u8; bytes]);
            for t in 1..30 {
                let g: Vec<f32> =
                    values(len, 5).iter().zip(values(len, t as u64)).map(|(a, b)| a + 0.3 * b).collect();
                let s = Schedule {
                    rate: 0.01,
                    scale: 1.0,
                    correction1: 1.0 - 0.9f32.powi(t),
                    correction2: 1.0 - 0.99f32.powi(t),
                };
                adam_step(&pool, &rule, s, &place, &mut exact, &mut m, &mut v, &g);
                adam8_step(&pool, &rule, s, &place, &mut rough, &mut m8, &mut v8, &g);
            }
            assert_eq!(rough[500..1000], start[500..1000], "channels that are not listed stay");
            let moved: f32 = exact.iter().zip(&start).map(|(a, b)| (a - b).abs()).sum();
            let apart: f32 = exact.iter().zip(&rough).map(|(a, b)| (a - b).abs()).sum();
            assert!(moved > 100.0 && apart < 0.05 * moved, "{isa:?}: {apart} of {moved}");
            if isa == Isa::Avx512 {
                assert!(bits.get_or_insert(rough.clone()) == &rough, "bits depend on the threads");
            }
        }
    }
}

#[test]
fn unary_gradients_are_slopes() {
    type Function = fn(f64) -> f64;
    fn erf(x: f64) -> f64 {
        f64::from(Activation::Erf.reference(x as f32))
    }
    let sigmoid: Function = |x| 1.0 / (1.0 + (-x).exp());
    // Function, its kind, whether the result is saved.
    let cases: Vec<(UnaryGrad, bool, Function)> = vec![
        (UnaryGrad::Identity, false, |x| x),
        (UnaryGrad::Neg, false, |x| -x),
        (UnaryGrad::Abs, false, f64::abs),
        (UnaryGrad::Relu, true, |x| x.max(0.0)),
        (UnaryGrad::Clip { min: -1.0, max: 1.5 }, true, |x| x.clamp(-1.0, 1.5)),
        (UnaryGrad::LeakyRelu { slope: 0.1 }, true, |x| if x < 0.0 { 0.1 * x } else { x }),
        (UnaryGrad::Sigmoid, true, sigmoid),
        (UnaryGrad::Tanh, true, f64::tanh),
        (UnaryGrad::Exp, true, f64::exp),
        (UnaryGrad::Sqrt, true, |x| (x + 4.0).sqrt()),
        (UnaryGrad::Rsqrt, true, |x| 1.0 / (x + 4.0).sqrt()),
        (UnaryGrad::Reciprocal, true, |x| 1.0 / (x + 4.0)),
        (UnaryGrad::HardSwish, false, |x| x * (x / 6.0 + 0.5).clamp(0.0, 1.0)),
        (UnaryGrad::HardSigmoid { alpha: 0.2, beta: 0.5 }, false, |x| (0.2 * x + 0.5).clamp(0.0, 1.0)),
        (UnaryGrad::Swish { alpha: 1.5 }, false, |x| x / (1.0 + (-1.5 * x).exp())),
        (UnaryGrad::GeluTanh, false, |x| {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
        }),
        (UnaryGrad::Elu { alpha: 0.7 }, false, |x| if x < 0.0 { 0.7 * x.exp_m1() } else { x }),
        (UnaryGrad::Softplus, false, |x| x.exp().ln_1p()),
        (UnaryGrad::Softsign, false, |x| x / (1.0 + x.abs())),
    ];
    // No point lies on a corner of any function.
    let xs: Vec<f32> = (-50..50).map(|i| i as f32 * 0.0717 + 0.0123).collect();
    let dy = values(xs.len(), 1);
    for isa in ISAS {
        let pool = ThreadPool::with_isa(2, isa);
        for &(kind, result, f) in &cases {
            let saved: Vec<f32> =
                xs.iter().map(|&x| if result { f(f64::from(x)) as f32 } else { x }).collect();
            let mut dx = vec![f32::NAN; xs.len()];
            unary_grad(&pool, kind, &saved, &dy, &mut dx);
            for i in 0..xs.len() {
                let (x, h) = (f64::from(xs[i]), 1e-5);
                let slope = (f(x + h) - f(x - h)) / (2.0 * h);
                let want = slope * f64::from(dy[i]);
                assert!(
                    (f64::from(dx[i]) - want).abs() < 2e-5 * (1.0 + slope.abs()),
                    "{isa:?} {kind:?}({x}): {} {want}",
                    dx[i]
                );
            }
        }
        // Functions whose reference has f32 results are compared with their formula.
        let mut dx = vec![f32::NAN; xs.len()];
        unary_grad(&pool, UnaryGrad::Gelu, &xs, &dy, &mut dx);
        for i in 0..xs.len() {
            let x = f64::from(xs[i]);
            let slope = 0.5 * (1.0 + erf(x / 2f64.sqrt()))
                + x * (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
            assert!((f64::from(dx[i]) - slope * f64::from(dy[i])).abs() < 2e-6);
        }
        unary_grad(&pool, UnaryGrad::Erf, &xs, &dy, &mut dx);
        let log: Vec<f32> = {
            let positive: Vec<f32> = xs.iter().map(|x| x.abs() + 0.1).collect();
            let mut dx = vec![f32::NAN; xs.len()];
            unary_grad(&pool, UnaryGrad::Log, &positive, &dy, &mut dx);
            dx
        };
        for i in 0..xs.len() {
            let x = f64::from(xs[i]);
            let want = std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * f64::from(dy[i]);
            assert!((f64::from(dx[i]) - want).abs() < 2e-6);
            assert!((log[i] - dy[i] / (xs[i].abs() + 0.1)).abs() < 1e-5);
        }
    }
}

#[test]
fn softmax_gradients_agree_with_the_definition() {
    for (rows, n) in [(1, 1), (3, 7), (5, 16), (2, 100)] {
        let dy = values(rows * n, 2);
        for log in [false, true] {
            let mut y = values(rows * n, 1);
            for row in y.chunks_exact_mut(n) {
                let sum: f64 = row.iter().map(|&v| f64::from(v).exp()).sum();
                row.iter_mut().for_each(|v| {
                    *v = if log {
                        (f64::from(*v) - sum.ln()) as f32
                    } else {
                        (f64::from(*v).exp() / sum) as f32
                    }
                });
            }
            for (isa, got) in everywhere(|pool| {
                let mut dx = vec![f32::NAN; rows * n];
                softmax_grad(pool, rows, n, log, &y, &dy, &mut dx);
                dx
            }) {
                for r in 0..rows {
                    let (y, dy) = (&y[r * n..][..n], &dy[r * n..][..n]);
                    let total: f64 = y
                        .iter()
                        .zip(dy)
                        .map(|(&y, &d)| if log { f64::from(d) } else { f64::from(y) * f64::from(d) })
                        .sum();
                    for i in 0..n {
                        let (v, d) = (f64::from(y[i]), f64::from(dy[i]));
                        let want = if log { d - v.exp() * total } else { v * (d - total) };
                        assert!(
                            (f64::from(got[r * n + i]) - want).abs() < 1e-5,
                            "{isa:?} {} {want}",
                            got[r * n + i]
                        );
                    }
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn attention_gradients_agree_with_the_definition(
        entries in 1usize..3, groups in 1usize..3, kv_heads in 1usize..3, q_len in 1usize..40, kv_len in prop_oneof![1usize..30, 60usize..140],
        head_dim in prop_oneof![1usize..20, Just(16usize)], value_dim in prop_oneof![1usize..20, Just(32usize)], masked: bool, causal: bool, seed in 0u64..1000,
    ) {
        let heads = groups * kv_heads;
        let scale = 0.3f32;
        let shape = AttentionShape { heads, kv_heads, q_len, kv_len, head_dim, value_dim, scale, causal: causal.then_some(0) };
        let at = |heads: usize, dim: usize| HeadStrides { position: heads * dim, head: dim };
        let places = [at(heads, head_dim), at(kv_heads, head_dim), at(kv_heads, value_dim), at(heads, value_dim)];
        let lens = [q_len, kv_len, kv_len, q_len];
        let batch: [usize; 4] = std::array::from_fn(|i| lens[i] * places[i].position);
        let [q, k, v, dy]: [Vec<f32>; 4] = std::array::from_fn(|i| values(entries * batch[i], seed + i as u64));
        let mut addends = values(entries * q_len * kv_len, seed + 5);
        // One query sees nothing.
        addends[..kv_len].fill(f32::NEG_INFINITY);
        let (mut dq, mut dk, mut dv) = (vec![0f64; q.len()], vec![0f64; k.len()], vec![0f64; v.len()]);
        for b in 0..entries { for h in 0..heads { for i in 0..q_len {
            let g = h / groups;
            let place = |n: usize, h: usize, i: usize| b * batch[n] + i * places[n].position + h * places[n].head;
            let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
            let (qi, gi) = (&q[place(0, h, i)..][..head_dim], &dy[place(3, h, i)..][..value_dim]);
            let score = |j: usize| {
                let hidden = causal && j > i;
                let bias = if hidden { f64::NEG_INFINITY } else if masked { f64::from(addends[(b * q_len + i) * kv_len + j]) } else { 0.0 };
                dot(qi, &k[place(1, g, j)..][..head_dim]) * f64::from(scale) + bias
            };
            let scores: Vec<f64> = (0..kv_len).map(score).collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            if top == f64::NEG_INFINITY { continue; }
            let sum: f64 = scores.iter().map(|s| (s - top).exp()).sum();
            let p: Vec<f64> = scores.iter().map(|s| (s - top).exp() / sum).collect();
            let dp: Vec<f64> = (0..kv_len).map(|j| dot(gi, &v[place(2, g, j)..][..value_dim])).collect();
            let along: f64 = p.iter().zip(&dp).map(|(p, d)| p * d).sum();
            for j in 0..kv_len {
                let ds = p[j] * (dp[j] - along) * f64::from(scale);
                for d in 0..head_dim {
                    dq[place(0, h, i) + d] += ds * f64::from(k[place(1, g, j) + d]);
                    dk[place(1, g, j) + d] += ds * f64::from(qi[d]);
                }
                for d in 0..value_dim { dv[place(2, g, j) + d] += p[j] * f64::from(gi[d]); }
            }
        }}}
        for (isa, got) in everywhere(|pool| {
            let mut out = [vec![f32::NAN; q.len()], vec![f32::NAN; k.len()], vec![f32::NAN; v.len()]];
            let [a, b, c] = &mut out;
            let mask = |e: usize| masked.then(|| AttentionMask { data: &addends[e * q_len * kv_len..], head_stride: 0, row_stride: kv_len });
            let results = AttentionGradients { q: Some(a), k: Some(b), v: Some(c) };
            let mut scratch = scratch(attention_grad_scratch_len(&shape, pool.threads()));
            attention_grad(pool, &shape, entries, batch, [&q, &k, &v, &dy], places, &mask, results, &mut scratch);
            out.concat()
        }) {
            let want: Vec<f64> = dq.iter().chain(&dk).chain(&dv).copied().collect();
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                prop_assert!((f64::from(*g) - w).abs() < 1e-4, "{isa:?} [{i}] {g} {w}");
            }
        }
    }
}

#[test]
fn running_statistics_follow() {
    let (mut mean, mut variance) = (vec![1.0, 2.0], vec![3.0, 4.0]);
    track_statistics(0.25, 2.0, &mut mean, &mut variance, &[5.0, 6.0], &[1.0, 2.0]);
    assert_eq!((mean, variance), (vec![2.0, 3.0], vec![2.75, 4.0]));
}
