//! Against the obvious loops, at sizes that do not fit tiles, blocks and threads evenly; small cases with known
//! answers are those of ONNX, which the engine runs.

use half::f16;
use lightering_units::{DType, Element};

use super::*;
use crate::ThreadPool;

/// Numbers that look random and are the same in every run.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % 2001) as f32 / 1000.0 - 1.0
        })
        .collect()
}

fn view<'a, T: Element>(dims: &'a [usize], data: &'a [T]) -> TensorView<'a> {
    TensorView { dtype: T::DTYPE, dims, bytes: bytemuck::cast_slice(data) }
}

fn view_mut<'a, T: Element>(dims: &'a [usize], data: &'a mut [T]) -> TensorViewMut<'a> {
    TensorViewMut { dtype: T::DTYPE, dims, bytes: bytemuck::cast_slice_mut(data) }
}

#[track_caller]
fn close(got: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(got.len(), expected.len());
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!((g - e).abs() <= tolerance * (1.0 + e.abs()), "element {i} is {g}, expected {e}");
    }
}

#[test]
fn broadcasting_agrees_with_indices() {
    let pool = ThreadPool::new(3);
    let shapes: [(&[usize], &[usize], &[usize]); 6] = [
        (&[7, 1, 300], &[5, 1], &[7, 5, 300]),
        (&[1], &[3, 700], &[3, 700]),
        (&[2, 3, 4, 50], &[3, 1, 50], &[2, 3, 4, 50]),
        (&[], &[], &[]),
        (&[40000], &[1], &[40000]),
        (&[0, 3], &[1, 3], &[0, 3]),
    ];
    for (a_dims, b_dims, y_dims) in shapes {
        let count = |d: &[usize]| d.iter().product::<usize>();
        let (a, b) = (numbers(count(a_dims), 1), numbers(count(b_dims), 2));
        let at = |dims: &[usize], index: usize| {
            let (mut rest, mut offset, mut step) = (index, 0, 1);
            for axis in (0..y_dims.len()).rev() {
                let i = rest % y_dims[axis];
                rest /= y_dims[axis];
                if let Some(own) = (axis + dims.len()).checked_sub(y_dims.len()) {
                    offset += if dims[own] == 1 { 0 } else { i * step };
                    step *= dims[own];
                }
            }
            offset
        };
        for op in [Binary::Sub, Binary::PRelu] {
            let mut y = vec![0f32; count(y_dims)];
            let mut out = view_mut(y_dims, &mut y);
            binary(&pool, op, &view(a_dims, &a), &view(b_dims, &b), &mut out).unwrap();
            let expected: Vec<f32> = (0..y.len())
                .map(|i| {
                    let (a, b) = (a[at(a_dims, i)], b[at(b_dims, i)]);
                    if op == Binary::Sub {
                        a - b
                    } else if a < 0.0 {
                        a * b
                    } else {
                        a
                    }
                })
                .collect();
            assert_eq!(y, expected, "{op:?} {a_dims:?} {b_dims:?}");
        }
    }
}

#[test]
fn integers_wrap_and_do_not_divide_by_zero() {
    let pool = ThreadPool::new(1);
    let run = |op, a: &[i8], b: &[i8]| {
        let mut y = vec![0i8; a.len()];
        let dims = [a.len()];
        let result = binary(&pool, op, &view(&dims, a), &view(&dims, b), &mut view_mut(&dims, &mut y));
        result.map(|()| y)
    };
    assert_eq!(run(Binary::Add, &[127, -128], &[1, -1]).unwrap(), [-128, 127]);
    assert_eq!(run(Binary::Div, &[-128, -7], &[-1, 2]).unwrap(), [-128, -3]);
    assert_eq!(run(Binary::Mod, &[-7, 7], &[3, -3]).unwrap(), [2, -2]);
    assert_eq!(run(Binary::FMod, &[-7, 7], &[3, -3]).unwrap(), [-1, 1]);
    assert_eq!(run(Binary::Pow, &[-2, 2], &[3, -1]).unwrap(), [-8, 0]);
    assert!(matches!(run(Binary::Mod, &[1], &[0]), Err(OpError::Invalid(_))));
}

#[test]
fn a_chain_rounds_like_its_steps() {
    let pool = ThreadPool::new(2);
    let dims = [3, 700];
    let x: Vec<f16> = numbers(2100, 3).into_iter().map(f16::from_f32).collect();
    let b: Vec<f16> = numbers(700, 4).into_iter().map(f16::from_f32).collect();
    let (bv, xv) = (view(&dims[1..], &b), view(&dims, &x));
    let steps = [
        Step::Binary { op: Binary::Mul, operand: 1, swapped: false },
        Step::Unary(Unary::Sigmoid),
        Step::Binary { op: Binary::Sub, operand: 1, swapped: true },
    ];
    let mut fused = vec![f16::ZERO; 2100];
    chain(&pool, &steps, &[Some(xv), Some(bv)], &mut view_mut(&dims, &mut fused)).unwrap();
    let (mut one, mut two) = (vec![f16::ZERO; 2100], vec![f16::ZERO; 2100]);
    binary(&pool, Binary::Mul, &xv, &bv, &mut view_mut(&dims, &mut one)).unwrap();
    unary(&pool, Unary::Sigmoid, &view(&dims, &one), &mut view_mut(&dims, &mut two)).unwrap();
    binary(&pool, Binary::Sub, &bv, &view(&dims, &two), &mut view_mut(&dims, &mut one)).unwrap();
    assert_eq!(fused, one);
}

#[test]
fn products_agree_with_the_three_loops() {
    let pool = ThreadPool::new(3);
    for (m, k, n) in [(1, 1, 1), (17, 65, 63), (33, 130, 129), (5, 0, 7), (64, 64, 64)] {
        for (trans_a, trans_b) in [(false, false), (true, false), (false, true), (true, true)] {
            let (a, b, bias) = (numbers(2 * m * k, 5), numbers(k * n, 6), numbers(n, 7));
            let scale = numbers(n, 8);
            let a_dims = if trans_a { [2, k, m] } else { [2, m, k] };
            let b_dims = if trans_b { [n, k] } else { [k, n] };
            let mut expected = vec![0f32; 2 * m * n];
            for (i, e) in expected.iter_mut().enumerate() {
                let (batch, row, column) = (i / (m * n), i / n % m, i % n);
                let sum: f64 = (0..k)
                    .map(|d| {
                        let a = a[batch * m * k + if trans_a { d * m + row } else { row * k + d }];
                        let b = b[if trans_b { column * k + d } else { d * n + column }];
                        f64::from(a) * f64::from(b)
                    })
                    .sum();
                let y = 0.5 * sum * f64::from(scale[column]) + f64::from(bias[column]);
                *e = y.max(0.0) as f32;
            }
            let (y_dims, n_dims) = ([2, m, n], [n]);
            let mut y = vec![0f32; 2 * m * n];
            let epilogue = MatMulEpilogue {
                alpha: 0.5,
                column_scale: Some(view(&n_dims, &scale)),
                added: [Some((1.0, view(&n_dims, &bias))), None],
                activation: Some(Unary::Relu),
            };
            let (av, bv) = (view(&a_dims, &a), view(&b_dims, &b));
            matmul(&pool, &av, trans_a, &bv, trans_b, &epilogue, &mut view_mut(&y_dims, &mut y)).unwrap();
            close(&y, &expected, 1e-5);
        }
    }
}

/// `[batch, channels, pixels]` to `[batch, pixels, channels]`.
fn channels_last(x: &[f32], channels: usize, pixels: usize) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    for (i, &v) in x.iter().enumerate() {
        let (batch, c, p) = (i / (channels * pixels), i / pixels % channels, i % pixels);
        y[(batch * pixels + p) * channels + c] = v;
    }
    y
}

#[test]
fn convolutions_agree_with_their_definition_in_both_layouts() {
    let pool = ThreadPool::new(2);
    let window = Window {
        input: vec![9, 8],
        output: vec![5, 6],
        kernel: vec![3, 2],
        strides: vec![2, 1],
        dilations: vec![1, 2],
        pads: vec![1, 0],
    };
    for (groups, per_in, per_out) in [(1, 5, 70), (3, 2, 1), (2, 70, 3)] {
        let (batch, in_channels, out_channels) = (2, groups * per_in, groups * per_out);
        let (pixels, positions, taps) = (window.pixels(), window.positions(), window.taps());
        let x = numbers(batch * in_channels * pixels, 9);
        let w = numbers(out_channels * per_in * taps, 10);
        let (bias, residual) = (numbers(out_channels, 11), numbers(batch * out_channels * positions, 12));
        let mut expected = vec![0f32; batch * out_channels * positions];
        for (i, e) in expected.iter_mut().enumerate() {
            let (sample, c, o) =
                (i / (out_channels * positions), i / positions % out_channels, i % positions);
            let mut sum = f64::from(bias[c]) + f64::from(residual[i]);
            for d in 0..per_in {
                for ky in 0..3 {
                    for kx in 0..2 {
                        let (row, column) = ((o / 6 * 2 + ky) as i64 - 1, (o % 6 + 2 * kx) as i64);
                        if (0..9).contains(&row) && (0..8).contains(&column) {
                            let channel = c / per_out * per_in + d;
                            let pixel = (row * 8 + column) as usize;
                            let v = x[(sample * in_channels + channel) * pixels + pixel];
                            sum += f64::from(v) * f64::from(w[(c * per_in + d) * taps + ky * 2 + kx]);
                        }
                    }
                }
            }
            *e = sum as f32;
        }
        let mut shape = ConvolutionShape {
            batch,
            groups,
            in_channels,
            out_channels,
            window: window.clone(),
            channels_last: false,
            activation: None,
        };
        let w_dims = [out_channels, per_in, 3, 2];
        let (x_dims, y_dims) = ([batch, in_channels, 9, 8], [batch, out_channels, 5, 6]);
        let c_dims = [out_channels];
        let mut y = vec![0f32; expected.len()];
        let epilogue = ConvolutionEpilogue {
            bias: Some(view(&c_dims, &bias)),
            residual: Some(view(&y_dims, &residual)),
            scale: None,
        };
        let wv = view(&w_dims, &w);
        convolution(&pool, &shape, &view(&x_dims, &x), &wv, &epilogue, &mut view_mut(&y_dims, &mut y))
            .unwrap();
        close(&y, &expected, 1e-5);

        shape.channels_last = true;
        let x = channels_last(&x, in_channels, pixels);
        let residual = channels_last(&residual, out_channels, positions);
        let (x_dims, y_dims) = ([batch, 9, 8, in_channels], [batch, 5, 6, out_channels]);
        let epilogue = ConvolutionEpilogue { residual: Some(view(&y_dims, &residual)), ..epilogue };
        convolution(&pool, &shape, &view(&x_dims, &x), &wv, &epilogue, &mut view_mut(&y_dims, &mut y))
            .unwrap();
        close(&y, &channels_last(&expected, out_channels, positions), 1e-5);
    }
}

#[test]
fn a_transposed_convolution_is_the_transpose_of_the_convolution() {
    // <conv(x), y> = <x, transposed(y)> for the same weights and window.
    let pool = ThreadPool::new(2);
    let forward = Window {
        input: vec![7, 6],
        output: vec![4, 3],
        kernel: vec![3, 3],
        strides: vec![2, 2],
        dilations: vec![1, 1],
        pads: vec![1, 1],
    };
    let backward = Window { input: forward.output.clone(), output: forward.input.clone(), ..forward.clone() };
    let (c_in, c_out, groups) = (4, 6, 2);
    let shape = |window, in_channels, out_channels| ConvolutionShape {
        batch: 1,
        groups,
        in_channels,
        out_channels,
        window,
        channels_last: false,
        activation: None,
    };
    let (x, y) = (numbers(c_in * 42, 13), numbers(c_out * 12, 14));
    let w = numbers(c_out * c_in / groups * 9, 15);
    let (x_dims, y_dims, w_dims) = ([1, c_in, 7, 6], [1, c_out, 4, 3], [c_out, c_in / groups, 3, 3]);
    let (mut cx, mut ty) = (vec![0f32; y.len()], vec![0f32; x.len()]);
    let (none, wv) = (ConvolutionEpilogue::default(), view(&w_dims, &w));
    let out = &mut view_mut(&y_dims, &mut cx);
    convolution(&pool, &shape(forward, c_in, c_out), &view(&x_dims, &x), &wv, &none, out).unwrap();
    let out = &mut view_mut(&x_dims, &mut ty);
    convolution_transposed(&pool, &shape(backward, c_out, c_in), &view(&y_dims, &y), &wv, &none, out)
        .unwrap();
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
    assert!((dot(&cx, &y) - dot(&x, &ty)).abs() < 1e-4, "{} {}", dot(&cx, &y), dot(&x, &ty));
}

#[test]
fn walks_agree_with_indices() {
    let pool = ThreadPool::new(3);
    let dims = [20, 30, 50];
    let x = numbers(30_000, 16);
    let source = view(&dims, &x);
    // Transposed to [50, 20, 30].
    let mut y = vec![0f32; x.len()];
    strided(&pool, &source, 0, &[50, 20, 30], &[1, 1500, 50], &mut view_mut(&[50, 20, 30], &mut y)).unwrap();
    assert!((0..x.len()).all(|i| y[i] == x[(i / 30 % 20) * 1500 + i % 30 * 50 + i / 600]));
    // Backwards.
    strided(&pool, &source, 29_999, &[30_000], &[-1], &mut view_mut(&[30_000], &mut y)).unwrap();
    assert!(y.iter().rev().eq(&x));
    // What would leave the operand is refused.
    let out = &mut view_mut(&[30_000], &mut y);
    assert!(strided(&pool, &source, 1, &[30_000], &[1], out).is_err());
    assert!(strided(&pool, &source, 0, &[30_000], &[-1], out).is_err());
}

#[test]
fn reductions_agree_whichever_axes_are_reduced() {
    let pool = ThreadPool::new(2);
    let dims = [6, 70, 11];
    let x = numbers(6 * 70 * 11, 17);
    for mask in 0..8usize {
        let reduced: Vec<bool> = (0..3).map(|a| mask >> a & 1 == 1).collect();
        let kept: Vec<usize> = dims.iter().zip(&reduced).filter(|(_, r)| !**r).map(|(d, _)| *d).collect();
        let count: usize = kept.iter().product();
        let mut groups = vec![Vec::new(); count];
        for (i, &v) in x.iter().enumerate() {
            let at = [i / 770, i / 11 % 70, i % 11];
            let index = (0..3).filter(|&a| !reduced[a]).fold(0, |index, a| index * dims[a] + at[a]);
            groups[index].push(f64::from(v));
        }
        let run = |op| {
            let mut y = vec![0f32; count];
            reduce(&pool, op, &reduced, &view(&dims, &x), &mut view_mut(&kept, &mut y)).unwrap();
            y
        };
        let expected = |f: &dyn Fn(&[f64]) -> f64| groups.iter().map(|g| f(g) as f32).collect::<Vec<_>>();
        close(&run(Reduction::Sum), &expected(&|g| g.iter().sum()), 1e-5);
        close(&run(Reduction::L2), &expected(&|g| g.iter().map(|v| v * v).sum::<f64>().sqrt()), 1e-5);
        close(&run(Reduction::Max), &expected(&|g| g.iter().copied().fold(f64::MIN, f64::max)), 0.0);
        let log = run(Reduction::LogSumExp);
        close(&log, &expected(&|g| g.iter().map(|v| v.exp()).sum::<f64>().ln()), 1e-5);
    }
}

#[test]
fn softmax_agrees_in_both_directions_and_precisions() {
    let pool = ThreadPool::new(2);
    let (outer, size, inner) = (9, 130, 3);
    let x = numbers(outer * size * inner, 18);
    let along = Along { outer, size, inner };
    let dims = [outer, size, inner];
    let mut expected = vec![0f32; x.len()];
    for o in 0..outer {
        for j in 0..inner {
            let at = |k: usize| (o * size + k) * inner + j;
            let total: f64 = (0..size).map(|k| f64::from(x[at(k)]).exp()).sum();
            (0..size).for_each(|k| expected[at(k)] = (f64::from(x[at(k)]).exp() / total) as f32);
        }
    }
    let mut y = vec![0f32; x.len()];
    softmax(&pool, SoftmaxKind::Plain, along, &view(&dims, &x), &mut view_mut(&dims, &mut y)).unwrap();
    close(&y, &expected, 1e-6);
    let half: Vec<f16> = x.iter().map(|&v| f16::from_f32(v)).collect();
    let mut y = vec![f16::ZERO; x.len()];
    softmax(&pool, SoftmaxKind::Plain, along, &view(&dims, &half), &mut view_mut(&dims, &mut y)).unwrap();
    close(&y.iter().map(|v| v.to_f32()).collect::<Vec<_>>(), &expected, 1e-3);
}

#[test]
fn casts_between_all_pairs_keep_small_integers() {
    let pool = ThreadPool::new(1);
    let number = |d: &DType| d.size_bytes() > 0 && !matches!(d, DType::Complex64 | DType::Complex128);
    let dims = [4];
    let small = [0f32, 1.0, 2.0, 3.0];
    for from in DType::ALL.into_iter().filter(number) {
        for to in DType::ALL.into_iter().filter(number) {
            let mut a = [0u64; 4];
            let mut b = [0u64; 4];
            let mut c = [0f32; 4];
            let a = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut a)[..4 * from.size_bytes()];
            let b = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut b)[..4 * to.size_bytes()];
            cast(
                &pool,
                &view(&dims, &small),
                true,
                &mut TensorViewMut { dtype: from, dims: &dims, bytes: a },
            )
            .unwrap();
            let x = TensorView { dtype: from, dims: &dims, bytes: a };
            cast(&pool, &x, true, &mut TensorViewMut { dtype: to, dims: &dims, bytes: b }).unwrap();
            let x = TensorView { dtype: to, dims: &dims, bytes: b };
            cast(&pool, &x, true, &mut view_mut(&dims, &mut c)).unwrap();
            let bools = from == DType::Bool || to == DType::Bool;
            let expected = if bools { [0.0, 1.0, 1.0, 1.0] } else { small };
            assert_eq!(c, expected, "{from} to {to}");
        }
    }
}

#[test]
fn top_k_orders_ties_and_nan() {
    let x = [2f32, f32::NAN, 3.0, 3.0, -1.0, 0.0, -0.0];
    let along = Along { outer: 1, size: 7, inner: 1 };
    let run = |largest| {
        let (mut values, mut indices, mut keys) = ([0f32; 4], [0i64; 4], [[0u64; 2]; 7]);
        let mut index_view = view_mut(&[4], &mut indices);
        let mut value_view = view_mut(&[4], &mut values);
        top_k(largest, along, &view(&[7], &x), &mut value_view, Some(&mut index_view), &mut keys).unwrap();
        indices
    };
    assert_eq!(run(true), [1, 2, 3, 0]);
    assert_eq!(run(false), [4, 5, 6, 0]);
}

#[test]
fn pixels_under_a_window_are_those_of_its_taps() {
    for (pads, dilations, strides) in
        [([2, 0], [1, 2], [1, 2]), ([-1, 3], [2, 1], [2, 3]), ([5, 0], [3, 1], [2, 1])]
    {
        let window = Window {
            input: vec![6, 5],
            output: vec![4, 3],
            kernel: vec![3, 2],
            strides: strides.to_vec(),
            dilations: dilations.to_vec(),
            pads: pads.to_vec(),
        };
        for position in 0..window.positions() {
            let expected: Vec<usize> = (0..window.taps()).filter_map(|t| window.pixel(position, t)).collect();
            let mut seen = Vec::new();
            window.for_pixels(position, |p| seen.push(p));
            assert_eq!(seen, expected, "{window:?} at {position}");
        }
    }
}
