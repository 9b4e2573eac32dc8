//! Times of the kernels of training at the shapes of small networks.
//!
//! `cargo run --release -p lightering-kernels --example training [threads]`; prints the best of several timed runs, one
//! line per kernel: name, milliseconds, GFLOP/s or GB/s.

use lightering_kernels::training::{
    AdamRule, AttentionGradients, LossShape, LstmGradients, LstmOperands, LstmShape, Schedule, Target,
    TrainConv, Transposed, UnaryGrad, UpdatePlace, adam_step, adam8_step, attention_grad,
    attention_grad_scratch_len, batch_scratch_len, batch_statistics, channel_sum, conv_forward,
    conv_forward_scratch_len, conv_input_grad, conv_input_grad_scratch_len, conv_weight_grad,
    conv_weight_grad_scratch_len, cross_entropy, cross_entropy_grad, layer_norm_grad, lstm_grad,
    lstm_grad_scratch_len, mask_above, mask_grad, norm_grad_scratch_len, normalise, normalise_grad, product,
    product_scratch_len, sgd_step, softmax_grad, swap_middle_axes, unary_grad,
};
use lightering_kernels::{
    Activation, AttentionShape, ConvShape, Epilogue, HeadStrides, Matrices, ThreadPool, gemm, pack_kn,
    packed_len,
};
use std::time::{Duration, Instant};

fn best_seconds(mut f: impl FnMut()) -> f64 {
    f();
    let (mut best, start) = (f64::MAX, Instant::now());
    while start.elapsed() < Duration::from_millis(150) {
        let t = Instant::now();
        f();
        best = best.min(t.elapsed().as_secs_f64());
    }
    best
}

fn filled(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i * 7 % 13) as f32 * 0.01 - 0.05).collect()
}

fn report(name: &str, seconds: f64, work: f64, unit: &str) {
    println!("{name}\t{:.3}\t{:.1} {unit}", seconds * 1e3, work / seconds / 1e9);
}

fn conv(
    pool: &ThreadPool,
    name: &str,
    batch: usize,
    h: usize,
    c: usize,
    o: usize,
    k: usize,
    s: usize,
    groups: usize,
) {
    let pad = (k - 1) / 2;
    let out = (h + 2 * pad - k) / s + 1;
    let shape = ConvShape {
        in_h: h,
        in_w: h,
        in_c: c,
        out_h: out,
        out_w: out,
        out_c: o,
        kernel: [k, k],
        stride: [s, s],
        dilation: [1, 1],
        pads: [pad; 4],
        groups,
    };
    let conv = TrainConv { shape, batch };
    let (mut x, mut w) = (filled(batch * h * h * c), filled(o * c / groups * k * k));
    let mut y = filled(batch * out * out * o);
    let flops = 2.0 * (shape.multiply_adds() * batch) as f64;
    let mut scratch = vec![0.0; conv_forward_scratch_len(&conv, pool.threads())];
    let t = best_seconds(|| {
        conv_forward(pool, &conv, &x, &w, None, None, Activation::None, &mut y, &mut scratch)
    });
    report(&format!("conv forward {name}"), t, flops, "GFLOP/s");
    let y = filled(y.len());
    let mut scratch = vec![0.0; conv_input_grad_scratch_len(&conv, pool.threads())];
    let t = best_seconds(|| conv_input_grad(pool, &conv, &y, &w, &mut x, &mut scratch));
    report(&format!("conv input {name}"), t, flops, "GFLOP/s");
    let x = filled(x.len());
    let mut scratch = vec![0.0; conv_weight_grad_scratch_len(&conv, pool.threads())];
    let t = best_seconds(|| conv_weight_grad(pool, &conv, &x, &y, &mut w, &mut scratch));
    report(&format!("conv weight {name}"), t, flops, "GFLOP/s");
}

fn matrices(pool: &ThreadPool, name: &str, batch: usize, m: usize, n: usize, k: usize) {
    let (a, b, mut c) = (filled(batch * m * k), filled(batch * k * n), vec![0.0; batch * m * n]);
    let flops = 2.0 * (batch * m * n * k) as f64;
    if batch == 1 {
        let mut packed = vec![0.0; packed_len(k, n)];
        pack_kn(k, n, &b, n, &mut packed);
        let t = best_seconds(|| gemm(pool, m, n, k, &a, k, &packed, &mut c, n, &Epilogue::NONE));
        report(&format!("constant {name}"), t, flops, "GFLOP/s");
    }
    for (kind, a_t, b_t) in [("nn", false, false), ("nt", false, true), ("tn", true, false)] {
        let transposed = Transposed { a: a_t, b: b_t };
        let at = |rows: usize, columns: usize, turned: bool| Matrices {
            batch_stride: rows * columns,
            row_stride: if turned { rows } else { columns },
        };
        let mut scratch = vec![0.0; product_scratch_len(batch, [m, n, k], transposed, pool.threads())];
        let t = best_seconds(|| {
            product(
                pool,
                batch,
                [m, n, k],
                1.0,
                &a,
                at(m, k, a_t),
                &b,
                at(k, n, b_t),
                transposed,
                &mut c,
                at(m, n, false),
                None,
                None,
                Activation::None,
                &mut scratch,
            );
        });
        report(&format!("product {kind} {name}"), t, flops, "GFLOP/s");
    }
}

fn normalisations(pool: &ThreadPool, rows: usize, c: usize) {
    let (x, dy, mut y) = (filled(rows * c), filled(rows * c), vec![0.0; rows * c]);
    let (mut mean, mut variance, mut ds, mut db) = (vec![0.0; c], vec![1.0; c], vec![0.0; c], vec![0.0; c]);
    let scale = filled(c);
    let mut scratch = vec![0.0; batch_scratch_len(rows, c)];
    let bytes = (rows * c * 4) as f64;
    let name = format!("{rows}x{c}");
    let t = best_seconds(|| batch_statistics(pool, rows, c, &x, &mut mean, &mut variance, &mut scratch));
    report(&format!("batch statistics {name}"), t, bytes, "GB/s");
    let t = best_seconds(|| {
        normalise(
            pool,
            rows,
            c,
            1e-5,
            &x,
            &mean,
            &variance,
            Some(&scale),
            Some(&scale),
            &mut y,
            &mut scratch,
        );
    });
    report(&format!("normalise {name}"), t, 2.0 * bytes, "GB/s");
    let t = best_seconds(|| {
        let (ds, db) = (Some(&mut ds[..]), Some(&mut db[..]));
        let dx = Some(&mut y[..]);
        normalise_grad(
            pool,
            rows,
            c,
            1e-5,
            true,
            &x,
            &dy,
            &mean,
            &variance,
            Some(&scale),
            dx,
            ds,
            db,
            &mut scratch,
        );
    });
    report(&format!("normalise grad {name}"), t, 5.0 * bytes, "GB/s");
    let t = best_seconds(|| channel_sum(pool, rows, c, 1.0, &dy, &mut db, &mut scratch));
    report(&format!("channel sum {name}"), t, bytes, "GB/s");
    let t = best_seconds(|| unary_grad(pool, UnaryGrad::Relu, &x, &dy, &mut y));
    report(&format!("relu grad {name}"), t, 3.0 * bytes, "GB/s");
    let mut bits = vec![0u8; (rows * c).div_ceil(8)];
    let t = best_seconds(|| mask_above(pool, 0.0, &x, &mut bits));
    report(&format!("sign mask {name}"), t, bytes, "GB/s");
    let t = best_seconds(|| mask_grad(pool, &bits, &dy, &mut y));
    report(&format!("mask grad {name}"), t, 2.0 * bytes, "GB/s");
}

fn rows(pool: &ThreadPool) {
    let (m, d) = (2048, 384);
    let (x, dy, mut dx) = (filled(m * d), filled(m * d), vec![0.0; m * d]);
    let (scale, mut ds, mut db) = (filled(d), vec![0.0; d], vec![0.0; d]);
    let mut scratch = vec![0.0; norm_grad_scratch_len(m, d)];
    let bytes = (m * d * 4) as f64;
    let t = best_seconds(|| {
        let (dx, ds, db) = (Some(&mut dx[..]), Some(&mut ds[..]), Some(&mut db[..]));
        layer_norm_grad(pool, m, d, 1e-5, &x, Some(&scale), &dy, dx, ds, db, &mut scratch);
    });
    report("layer norm grad 2048x384", t, 3.0 * bytes, "GB/s");
    let t = best_seconds(|| swap_middle_axes(pool, [8, 256, 6, 64], &x, &mut dx));
    report("swap heads 8x256x6x64", t, 2.0 * bytes, "GB/s");
    let n = 8 * 6 * 256;
    let (y, dy, mut dx) = (filled(n * 256), filled(n * 256), vec![0.0; n * 256]);
    let t = best_seconds(|| softmax_grad(pool, n, 256, false, &y, &dy, &mut dx));
    report("softmax grad 12288x256", t, (n * 256 * 12) as f64, "GB/s");
    let (x, dy, mut dx) = (filled(2048 * 1536), filled(2048 * 1536), vec![0.0; 2048 * 1536]);
    let t = best_seconds(|| unary_grad(pool, UnaryGrad::Gelu, &x, &dy, &mut dx));
    report("gelu grad 2048x1536", t, (2048 * 1536 * 12) as f64, "GB/s");
    let shape = LossShape { rows: 2048, classes: 8192, label_smoothing: 0.0, ignore: None };
    let (x, mut dx) = (filled(2048 * 8192), vec![0.0; 2048 * 8192]);
    let mut per_row = vec![0.0; 2048];
    let label = |r: usize| (r % 8192) as i64;
    let t = best_seconds(|| {
        let mut loss = 0.0;
        cross_entropy(pool, &shape, &x, Target::Class(&label), None, &mut loss, &mut per_row)
            .expect("labels");
        cross_entropy_grad(pool, &shape, &x, Target::Class(&label), 1.0, None, &mut dx).expect("labels");
    });
    report("cross entropy and grad 2048x8192", t, (2048 * 8192 * 12) as f64, "GB/s");
}

fn attention(pool: &ThreadPool) {
    let shape = AttentionShape {
        heads: 6,
        kv_heads: 6,
        q_len: 256,
        kv_len: 256,
        head_dim: 64,
        value_dim: 64,
        scale: 0.125,
        causal: Some(0),
    };
    let len = 256 * 384;
    let [q, k, v, dy] = std::array::from_fn(|_| filled(8 * len));
    let [mut dq, mut dk, mut dv] = std::array::from_fn(|_| vec![0.0; 8 * len]);
    let at = HeadStrides { position: 384, head: 64 };
    let mut scratch = vec![0.0; attention_grad_scratch_len(&shape, pool.threads())];
    let t = best_seconds(|| {
        let results = AttentionGradients { q: Some(&mut dq[..]), k: Some(&mut dk[..]), v: Some(&mut dv[..]) };
        let operands = [&q[..], &k[..], &v[..], &dy[..]];
        attention_grad(pool, &shape, 8, [len; 4], operands, [at; 4], &|_| None, results, &mut scratch);
    });
    report("attention grad 8x6x256x64", t, (8 * 6 * 256 * 256 * 64 * 10) as f64, "GFLOP/s");
}

fn lstm(pool: &ThreadPool) {
    let shape = LstmShape { steps: 64, batch: 32, input: 256, hidden: 256 };
    let (x, w, r) = (filled(64 * 32 * 256), filled(1024 * 256), filled(1024 * 256));
    let (bias, dy) = (filled(2048), filled(64 * 32 * 256));
    let [mut dx, mut dw, mut dr, mut db] = [x.len(), w.len(), r.len(), 2048].map(|n| vec![0.0; n]);
    let mut scratch = vec![0.0; lstm_grad_scratch_len(&shape, pool.threads())];
    let operands = LstmOperands {
        x: &x,
        w: &w,
        r: &r,
        bias: Some(&bias),
        initial_h: None,
        initial_c: None,
        dy: Some(&dy),
        dy_h: None,
        dy_c: None,
    };
    let t = best_seconds(|| {
        let results = LstmGradients {
            x: Some(&mut dx),
            w: Some(&mut dw),
            r: Some(&mut dr),
            bias: Some(&mut db),
            ..LstmGradients::default()
        };
        lstm_grad(pool, &shape, &operands, results, &mut scratch);
    });
    report("lstm grad with forward 64x32x256-256", t, (64 * 32 * 1024 * 512) as f64 * 6.0, "GFLOP/s");
}

fn updates(pool: &ThreadPool) {
    let len = 11_000_000;
    let (mut p, g) = (filled(len), filled(len));
    let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
    let s = Schedule { rate: 1e-3, scale: 1.0, correction1: 0.1, correction2: 0.01 };
    let place = UpdatePlace::all(len);
    let t = best_seconds(|| sgd_step(pool, 0.9, false, 1e-4, s, &place, &mut p, Some(&mut m), &g));
    report("sgd 11M", t, (len * 20) as f64, "GB/s");
    let rule = AdamRule { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01, decoupled: true };
    let t = best_seconds(|| adam_step(pool, &rule, s, &place, &mut p, &mut m, &mut v, &g));
    report("adamw 11M", t, (len * 28) as f64, "GB/s");
    let bytes = len.div_ceil(256) * 260;
    let (mut m, mut v) = (vec![0u8; bytes], vec![0u8; bytes]);
    let t = best_seconds(|| adam8_step(pool, &rule, s, &place, &mut p, &mut m, &mut v, &g));
    report("adam8 11M", t, (len * 16) as f64, "GB/s");
}

fn main() {
    let threads = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(2);
    let pool = ThreadPool::new(threads);
    matrices(&pool, "2048x1536x384", 1, 2048, 1536, 384);
    matrices(&pool, "2048x384x1536", 1, 2048, 384, 1536);
    matrices(&pool, "2048x8192x384", 1, 2048, 8192, 384);
    matrices(&pool, "48 of 256x256x64", 48, 256, 256, 64);
    matrices(&pool, "48 of 256x64x256", 48, 256, 64, 256);
    conv(&pool, "32x32 3-64", 32, 32, 3, 64, 3, 1, 1);
    conv(&pool, "32x32 64-64", 32, 32, 64, 64, 3, 1, 1);
    conv(&pool, "32x32 64-128 s2", 32, 32, 64, 128, 3, 2, 1);
    conv(&pool, "16x16 128-128", 32, 16, 128, 128, 3, 1, 1);
    conv(&pool, "8x8 256-256", 32, 8, 256, 256, 3, 1, 1);
    conv(&pool, "4x4 512-512", 32, 4, 512, 512, 3, 1, 1);
    conv(&pool, "32x32 64-128 1x1 s2", 32, 32, 64, 128, 1, 2, 1);
    conv(&pool, "32x32 16-96 1x1", 32, 32, 16, 96, 1, 1, 1);
    conv(&pool, "16x16 144-24 1x1", 32, 16, 144, 24, 1, 1, 1);
    conv(&pool, "4x4 960-160 1x1", 32, 4, 960, 160, 1, 1, 1);
    conv(&pool, "32x32 dw96 s1", 32, 32, 96, 96, 3, 1, 96);
    conv(&pool, "32x32 dw96 s2", 32, 32, 96, 96, 3, 2, 96);
    conv(&pool, "8x8 dw384 s1", 32, 8, 384, 384, 3, 1, 384);
    conv(&pool, "4x4 dw960 s1", 32, 4, 960, 960, 3, 1, 960);
    normalisations(&pool, 32 * 32 * 32, 64);
    normalisations(&pool, 32 * 8 * 8, 384);
    rows(&pool);
    attention(&pool);
    lstm(&pool);
    updates(&pool);
}
