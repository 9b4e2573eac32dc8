//! Gradients of depthwise convolutions: vectors run over channels.

use super::{conv::TrainConv, get, put};
use crate::arch::{Kernel, Simd, dispatch};
use crate::conv::{ConvInput, ConvShape, conv2d};
use crate::epilogue::Epilogue;
use crate::threads::{Shareable, ThreadPool};

/// Packs the weights as `[taps][channels]`, the taps in order or backwards.
fn pack(w: &[f32], taps: usize, channels: usize, backwards: bool, out: &mut [f32]) {
    for (tap, row) in out[..taps * channels].chunks_exact_mut(channels.max(1)).enumerate() {
        let from = if backwards { taps - 1 - tap } else { tap };
        for (c, v) in row.iter_mut().enumerate() {
            *v = w[c * taps + from];
        }
    }
}

/// `dx`; `scratch` holds the packed weights.
pub(super) fn depthwise_input_grad(
    pool: &ThreadPool,
    conv: &TrainConv,
    dy: &[f32],
    w: &[f32],
    dx: &mut [f32],
    scratch: &mut [f32],
) {
    let s = &conv.shape;
    let taps = s.kernel[0] * s.kernel[1];
    let (image_in, image_out) = (s.in_h * s.in_w * s.in_c, s.out_h * s.out_w * s.out_c);
    let out = Shareable(dx.as_mut_ptr());
    let reach = |axis: usize| (s.kernel[axis] - 1) * s.dilation[axis];
    // With stride 1 it is a convolution with the taps backwards.
    let same = s.stride == [1, 1] && s.pads[0] <= reach(0) && s.pads[1] <= reach(1);
    pack(w, taps, s.in_c, same, scratch);
    let packed = &scratch[..taps * s.in_c];
    let turned = ConvShape {
        in_h: s.out_h,
        in_w: s.out_w,
        out_h: s.in_h,
        out_w: s.in_w,
        pads: [reach(0) - s.pads[0].min(reach(0)), reach(1) - s.pads[1].min(reach(1)), 0, 0],
        ..*s
    };
    pool.parallel_for(conv.batch, &|image, _| {
        let dy = &dy[image * image_out..][..image_out];
        // SAFETY: images are disjoint parts of `dx`.
        let dx = unsafe { std::slice::from_raw_parts_mut(out.get().add(image * image_in), image_in) };
        if same {
            let input = ConvInput::Nhwc { data: dy, pixel_stride: s.out_c, first_row: 0 };
            let rows = 0..turned.out_h;
            return conv2d(pool, &turned, input, packed, dx, s.in_c, rows, &Epilogue::NONE, &mut []);
        }
        dispatch(pool.isa(), InputGrad { s, dy: dy.as_ptr(), w: packed.as_ptr(), dx: dx.as_mut_ptr() });
    });
}

/// One image of any stride.
struct InputGrad<'a> {
    s: &'a ConvShape,
    dy: *const f32,
    w: *const f32,
    dx: *mut f32,
}

/// Taps that reach a pixel, gathered at a time.
const TAPS: usize = 64;

impl Kernel for InputGrad<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let s = self.s;
        let c = s.in_c;
        let mut from = [(std::ptr::null::<f32>(), std::ptr::null::<f32>()); TAPS];
        for y in 0..s.in_h {
            for x in 0..s.in_w {
                let to = self.dx.wrapping_add((y * s.in_w + x) * c);
                let (mut count, mut started) = (0, false);
                let last = s.kernel[0] * s.kernel[1] - 1;
                for tap in 0..=last {
                    let (ky, kx) = (tap / s.kernel[1], tap % s.kernel[1]);
                    let oy = (y + s.pads[0]).wrapping_sub(ky * s.dilation[0]);
                    let ox = (x + s.pads[1]).wrapping_sub(kx * s.dilation[1]);
                    let (sy, sx) = (s.stride[0], s.stride[1]);
                    // Differences below zero wrap to values beyond every picture.
                    let fits = oy < usize::MAX / 2
                        && ox < usize::MAX / 2
                        && oy.is_multiple_of(sy)
                        && ox.is_multiple_of(sx)
                        && oy / sy < s.out_h
                        && ox / sx < s.out_w;
                    if fits {
                        let at = (oy / sy * s.out_w + ox / sx) * c;
                        from[count] = (self.dy.wrapping_add(at), self.w.wrapping_add(tap * c));
                        count += 1;
                    }
                    if count < TAPS && tap < last {
                        continue;
                    }
                    let mut i = 0;
                    while i < c {
                        let n = S::LANES.min(c - i);
                        // SAFETY: pixels have `c` channels.
                        unsafe {
                            let mut sum = if started { get(simd, to.add(i), n) } else { simd.splat(0.0) };
                            for &(d, w) in &from[..count] {
                                sum = simd.fma(get(simd, d.add(i), n), get(simd, w.add(i), n), sum);
                            }
                            put(simd, to.add(i), n, sum);
                        }
                        i += S::LANES;
                    }
                    (count, started) = (0, true);
                }
            }
        }
    }
}

/// Parts into which the images are cut.
fn parts(conv: &TrainConv) -> usize {
    conv.batch.clamp(1, 16)
}

/// Scratch of [`depthwise_weight_grad`].
pub(super) fn depthwise_weight_grad_scratch_len(conv: &TrainConv) -> usize {
    let taps = conv.shape.kernel[0] * conv.shape.kernel[1];
    parts(conv) * (taps * conv.shape.in_c).next_multiple_of(16)
}

/// `dw`, summed over images in parts.
pub(super) fn depthwise_weight_grad(
    pool: &ThreadPool,
    conv: &TrainConv,
    x: &[f32],
    dy: &[f32],
    dw: &mut [f32],
    scratch: &mut [f32],
) {
    let s = &conv.shape;
    let taps = s.kernel[0] * s.kernel[1];
    let len = (taps * s.in_c).next_multiple_of(16);
    let parts = parts(conv);
    let per_part = conv.batch.div_ceil(parts);
    let sums = Shareable(scratch[..parts * len].as_mut_ptr());
    let (image_in, image_out) = (s.in_h * s.in_w * s.in_c, s.out_h * s.out_w * s.out_c);
    pool.parallel_for(parts, &|part, _| {
        let images = (part * per_part).min(conv.batch)..conv.batch.min((part + 1) * per_part);
        let sums = sums.get().wrapping_add(part * len);
        // SAFETY: every part has its own sums.
        unsafe { std::ptr::write_bytes(sums, 0, len) };
        for image in images {
            let x = x[image * image_in..][..image_in].as_ptr();
            let dy = dy[image * image_out..][..image_out].as_ptr();
            dispatch(pool.isa(), WeightGrad { s, x, dy, sums });
        }
    });
    for c in 0..s.in_c {
        for tap in 0..taps {
            dw[c * taps + tap] = (0..parts).map(|p| scratch[p * len + tap * s.in_c + c]).sum();
        }
    }
}

/// One image.
struct WeightGrad<'a> {
    s: &'a ConvShape,
    x: *const f32,
    dy: *const f32,
    /// `[taps][channels]`
    sums: *mut f32,
}

impl Kernel for WeightGrad<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let plain = self.s.dilation == [1, 1] && self.s.stride[0] == self.s.stride[1];
        match (self.s.kernel, self.s.stride[1], plain) {
            ([3, 3], 1, true) => s.vectorize(Fixed::<3, 1, 4>(self)),
            ([3, 3], 2, true) => s.vectorize(Fixed::<3, 2, 4>(self)),
            ([5, 5], 1, true) => s.vectorize(Fixed::<5, 1, 1>(self)),
            ([5, 5], 2, true) => s.vectorize(Fixed::<5, 2, 1>(self)),
            _ => any(s, &self),
        }
    }
}

static ZERO: [f32; 16] = [0.0; 16];

/// A `K` by `K` kernel; tiles of `COLUMNS` output columns.
struct Fixed<'a, const K: usize, const STRIDE: usize, const COLUMNS: usize>(WeightGrad<'a>);

impl<const K: usize, const STRIDE: usize, const COLUMNS: usize> Kernel for Fixed<'_, K, STRIDE, COLUMNS> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let WeightGrad { s, x, dy, sums } = self.0;
        let c = s.in_c;
        // Output columns whose taps all lie inside the row.
        let inner_start = s.pads[1].div_ceil(STRIDE).min(s.out_w);
        let reach = (s.in_w + s.pads[1]).checked_sub(K).map_or(0, |r| r / STRIDE + 1);
        let inner_end = reach.clamp(inner_start, s.out_w);
        for oy in 0..s.out_h {
            let top = (oy * STRIDE).wrapping_sub(s.pads[0]);
            let mut channel = 0;
            while channel < c {
                let n = S::LANES.min(c - channel);
                // Rows outside the picture are one vector of zeros that no column moves on from.
                let rows: [(*const f32, usize); K] = std::array::from_fn(|k| {
                    let y = top.wrapping_add(k);
                    if y < s.in_h {
                        (x.wrapping_add(y * s.in_w * c + channel), c)
                    } else {
                        (ZERO.as_ptr(), 0)
                    }
                });
                let dy = dy.wrapping_add(oy * s.out_w * c + channel);
                // SAFETY: pixels have `c` channels; the columns lie inside the rows.
                unsafe {
                    let mut acc = [[simd.splat(0.0); K]; K];
                    for ky in 0..K {
                        for kx in 0..K {
                            acc[ky][kx] = get(simd, sums.add((ky * K + kx) * c + channel), n);
                        }
                    }
                    let mut ox = inner_start;
                    while ox + COLUMNS <= inner_end {
                        let left = ox * STRIDE - s.pads[1];
                        let g: [S::F; COLUMNS] =
                            std::array::from_fn(|j| get(simd, dy.wrapping_add((ox + j) * c), n));
                        for ky in 0..K {
                            let (row, step) = rows[ky];
                            for column in 0..(COLUMNS - 1) * STRIDE + K {
                                let v = get(simd, row.wrapping_add((left + column) * step), n);
                                for j in 0..COLUMNS {
                                    if column >= j * STRIDE && column < j * STRIDE + K {
                                        let kx = column - j * STRIDE;
                                        acc[ky][kx] = simd.fma(v, g[j], acc[ky][kx]);
                                    }
                                }
                            }
                        }
                        ox += COLUMNS;
                    }
                    for ox in (0..inner_start).chain(ox..s.out_w) {
                        let left = (ox * STRIDE).wrapping_sub(s.pads[1]);
                        let g = get(simd, dy.wrapping_add(ox * c), n);
                        for ky in 0..K {
                            for kx in 0..K {
                                let column = left.wrapping_add(kx);
                                if column < s.in_w {
                                    let (row, step) = rows[ky];
                                    let v = get(simd, row.wrapping_add(column * step), n);
                                    acc[ky][kx] = simd.fma(v, g, acc[ky][kx]);
                                }
                            }
                        }
                    }
                    for ky in 0..K {
                        for kx in 0..K {
                            put(simd, sums.add((ky * K + kx) * c + channel), n, acc[ky][kx]);
                        }
                    }
                }
                channel += S::LANES;
            }
        }
    }
}

/// Any kernel, one tap at a time.
#[inline(always)]
fn any<S: Simd>(simd: S, grad: &WeightGrad<'_>) {
    let s = grad.s;
    let c = s.in_c;
    for tap in 0..s.kernel[0] * s.kernel[1] {
        let (ky, kx) = (tap / s.kernel[1], tap % s.kernel[1]);
        let mut channel = 0;
        while channel < c {
            let n = S::LANES.min(c - channel);
            // SAFETY: pixels have `c` channels.
            unsafe {
                let place = grad.sums.add(tap * c + channel);
                let mut sum = get(simd, place, n);
                for oy in 0..s.out_h {
                    let y = (oy * s.stride[0] + ky * s.dilation[0]).wrapping_sub(s.pads[0]);
                    if y >= s.in_h {
                        continue;
                    }
                    for ox in 0..s.out_w {
                        let x = (ox * s.stride[1] + kx * s.dilation[1]).wrapping_sub(s.pads[1]);
                        if x < s.in_w {
                            let v = get(simd, grad.x.add((y * s.in_w + x) * c + channel), n);
                            let g = get(simd, grad.dy.add((oy * s.out_w + ox) * c + channel), n);
                            sum = simd.fma(v, g, sum);
                        }
                    }
                }
                put(simd, place, n, sum);
            }
            channel += S::LANES;
        }
    }
}
