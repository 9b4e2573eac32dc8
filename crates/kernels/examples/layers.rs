//! GFLOP/s of the f32 kernels on layers of real networks.
//!
//! `cargo run --release -p lightering-kernels --example layers [threads]`; prints the best of several timed runs.

use lightering_kernels::{
    Activation, AttentionShape, ByteInput, ByteOutput, ByteWeights, ConvInput, ConvShape, Epilogue,
    HeadStrides, ThreadPool, activate, attention, attention_scratch_len, conv_packed_bytes_len,
    conv_packed_len, conv_scratch_len, conv2d, conv2d_bytes, gemm, layer_norm, pack_conv, pack_conv_bytes,
    pack_kn, packed_len, softmax, transpose,
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

fn conv(
    pool: &ThreadPool,
    name: &str,
    h: usize,
    c: usize,
    o: usize,
    k: usize,
    s: usize,
    groups: usize,
    planes: bool,
) -> f64 {
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
    let x = filled(h * h * c);
    let mut packed = vec![0.0; conv_packed_len(&shape)];
    pack_conv(&shape, &filled(o * c / groups * k * k), &mut packed);
    let mut y = vec![0.0; out * out * o];
    let bias = filled(o);
    let mut scratch = vec![0.0; conv_scratch_len(&shape, planes, pool.threads())];
    let epilogue = Epilogue { bias: Some(&bias), ..Epilogue::NONE };
    let input = if planes {
        ConvInput::Nchw { data: &x, channel_stride: h * h, first_row: 0 }
    } else {
        ConvInput::Nhwc { data: &x, pixel_stride: c, first_row: 0 }
    };
    let seconds =
        best_seconds(|| conv2d(pool, &shape, input, &packed, &mut y, o, 0..out, &epilogue, &mut scratch));
    report(name, 2.0 * shape.multiply_adds() as f64, seconds, (x.len() + y.len() + packed.len()) * 4);
    seconds
}

fn product(pool: &ThreadPool, name: &str, m: usize, k: usize, n: usize) {
    let (a, mut c) = (filled(m * k), vec![0.0; m * n]);
    let mut packed = vec![0.0; packed_len(k, n)];
    pack_kn(k, n, &filled(k * n), n, &mut packed);
    let seconds = best_seconds(|| gemm(pool, m, n, k, &a, k, &packed, &mut c, n, &Epilogue::NONE));
    report(name, 2.0 * (m * n * k) as f64, seconds, (m * k + m * n + packed.len()) * 4);
}

fn conv_bytes(
    pool: &ThreadPool,
    name: &str,
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
    let x: Vec<u8> = (0..h * h * c).map(|i| (i * 7 % 251) as u8).collect();
    let w: Vec<u8> = (0..o * c / groups * k * k).map(|i| (i * 5 % 253) as u8).collect();
    let (mut packed, mut sums) = (vec![0; conv_packed_bytes_len(&shape)], vec![0; o]);
    pack_conv_bytes(&shape, &w, true, &mut packed, &mut sums);
    let mut y = vec![0; out * out * o];
    let seconds = best_seconds(|| {
        let input = ByteInput { data: &x, signed: false, zero: 128, stride: c };
        let weights = ByteWeights { packed: &packed, sums: &sums, zeros: None };
        let output = ByteOutput::Bytes {
            data: &mut y,
            stride: o,
            signed: false,
            scale: &[0.001],
            zero: 3,
            limits: None,
        };
        conv2d_bytes(pool, &shape, input, 0, weights, None, output, 0..out);
    });
    report(name, 2.0 * shape.multiply_adds() as f64, seconds, x.len() + y.len() + packed.len());
}

fn heads(pool: &ThreadPool, name: &str, heads: usize, len: usize, dim: usize) {
    let shape = AttentionShape {
        heads,
        kv_heads: heads,
        q_len: len,
        kv_len: len,
        head_dim: dim,
        value_dim: dim,
        scale: 0.125,
        causal: None,
    };
    let width = heads * dim;
    let (qkv, mut out) = (filled(len * width * 3), vec![0.0; len * width]);
    let mut scratch = vec![0.0; attention_scratch_len(&shape, pool.threads())];
    let at = HeadStrides { position: 3 * width, head: dim };
    let out_at = HeadStrides { position: width, head: dim };
    let seconds = best_seconds(|| {
        attention(
            pool,
            &shape,
            &qkv,
            at,
            &qkv[width..],
            at,
            &qkv[2 * width..],
            at,
            None,
            &mut out,
            out_at,
            &mut scratch,
        );
    });
    report(name, 4.0 * (len * len * width) as f64, seconds, len * width * 16);
}

fn rows(pool: &ThreadPool) {
    let (m, n) = (197, 768);
    let (x, mut y) = (filled(m * n), vec![0.0; m * n]);
    let size = (m * n) as f64;
    let seconds = best_seconds(|| activate(pool, Activation::Gelu, &mut y));
    report("gelu 197 x 768 (per value)", size, seconds, m * n * 8);
    let seconds = best_seconds(|| activate(pool, Activation::Silu, &mut y));
    report("silu 197 x 768 (per value)", size, seconds, m * n * 8);
    let seconds = best_seconds(|| layer_norm(pool, m, n, &x, n, None, None, 1e-5, &mut y, n));
    report("layer norm 197 x 768 (per value)", size, seconds, m * n * 8);
    let seconds = best_seconds(|| softmax(pool, m, n, &x, n, &mut y, n));
    report("softmax 197 x 768 (per value)", size, seconds, m * n * 8);
    let seconds = best_seconds(|| transpose(pool, m, n, &x, n, &mut y, m));
    report("transpose 197 x 768 (per value)", size, seconds, m * n * 8);
}

fn report(name: &str, flops: f64, seconds: f64, bytes: usize) {
    println!(
        "{name:<44} {:>9.1} us {:>7.1} GFLOP/s {:>7.1} GB/s",
        seconds * 1e6,
        flops / seconds * 1e-9,
        bytes as f64 / seconds * 1e-9
    );
}

fn main() {
    let threads = std::env::args().nth(1).and_then(|s| s.parse().ok()).unwrap_or(1);
    let pool = ThreadPool::new(threads);
    println!("{pool:?}");
    conv(&pool, "first 224 3->32 k3 s2 planes", 224, 3, 32, 3, 2, 1, true);
    conv(&pool, "first 224 3->64 k7 s2 planes", 224, 3, 64, 7, 2, 1, true);
    for (h, c, o) in [
        (112, 32, 16),
        (112, 16, 96),
        (56, 96, 24),
        (56, 24, 144),
        (28, 144, 32),
        (28, 32, 192),
        (14, 192, 64),
        (14, 64, 384),
        (14, 384, 96),
        (14, 576, 96),
        (14, 96, 576),
        (7, 576, 160),
        (7, 160, 960),
        (7, 960, 320),
        (7, 320, 1280),
    ] {
        conv(&pool, &format!("mobilenetv2 1x1 {h} {c}->{o}"), h, c, o, 1, 1, 1, false);
    }
    for (h, c, k, s) in [
        (112, 32, 3, 1),
        (112, 96, 3, 2),
        (56, 144, 3, 1),
        (28, 192, 3, 1),
        (14, 384, 3, 1),
        (14, 576, 3, 2),
        (7, 960, 3, 1),
        (28, 240, 5, 1),
        (14, 672, 5, 1),
    ] {
        conv(&pool, &format!("depthwise {h} {c} k{k} s{s}"), h, c, c, k, s, c, false);
    }
    for (h, c, o, k, s) in [
        (56, 64, 64, 3, 1),
        (28, 128, 128, 3, 1),
        (14, 256, 256, 3, 1),
        (7, 512, 512, 3, 1),
        (56, 64, 256, 1, 1),
        (56, 256, 64, 1, 1),
        (28, 512, 128, 1, 1),
        (14, 256, 1024, 1, 1),
        (14, 1024, 256, 1, 1),
        (7, 512, 2048, 1, 1),
        (7, 2048, 512, 1, 1),
        (56, 256, 512, 1, 2),
        (56, 128, 128, 3, 2),
    ] {
        conv(&pool, &format!("resnet {h} {c}->{o} k{k} s{s}"), h, c, o, k, s, 1, false);
    }
    for (m, k, n) in [
        (197, 192, 576),
        (197, 192, 192),
        (197, 192, 768),
        (197, 768, 192),
        (128, 384, 384),
        (128, 384, 1536),
        (128, 1536, 384),
        (1, 1280, 1000),
        (1, 2048, 1000),
        (1024, 1024, 1024),
    ] {
        product(&pool, &format!("product {m} x {k} x {n}"), m, k, n);
    }
    heads(&pool, "attention ViT-Tiny 3 heads 197 x 64", 3, 197, 64);
    heads(&pool, "attention MiniLM 12 heads 128 x 32", 12, 128, 32);
    rows(&pool);
    for (h, c, o, k, s, g) in [
        (224, 3, 32, 3, 2, 1),
        (112, 32, 16, 1, 1, 1),
        (56, 24, 144, 1, 1, 1),
        (14, 96, 576, 1, 1, 1),
        (14, 576, 96, 1, 1, 1),
        (7, 960, 320, 1, 1, 1),
        (14, 256, 256, 3, 1, 1),
        (112, 32, 32, 3, 1, 32),
        (28, 192, 192, 3, 1, 192),
        (14, 576, 576, 3, 1, 576),
    ] {
        conv_bytes(&pool, &format!("bytes {h} {c}->{o} k{k} s{s} g{g}"), h, c, o, k, s, g);
    }
}
