//! Two-dimensional convolution, channels last.
//!
//! A convolution is a product whose rows of A are gathered in place: output pixel `m` reads, for every kernel
//! tap, the `in_c` contiguous channels of one input pixel (after Dukhan, "The Indirect Convolution Algorithm",
//! 2019), or a row of zeros outside the image. Depthwise layers have their own kernel; layers with a few input
//! channels, the first of most networks, go through a small padded copy in which a whole kernel row is
//! contiguous.

mod transposed;

pub use transposed::{ConvTransposeShape, conv_transpose_packed_len, conv_transpose2d, pack_conv_transpose};

use crate::depthwise::depthwise;
use crate::epilogue::{Epilogue, check_rows};
use crate::gemm::{Panels, Product, RowSource, Strided, pack_with, packed_len, zeros};
use crate::threads::{Shareable, ThreadPool};
use std::ops::Range;

/// Sizes of a two-dimensional convolution of one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConvShape {
    /// Input height.
    pub in_h: usize,
    /// Input width.
    pub in_w: usize,
    /// Input channels.
    pub in_c: usize,
    /// Output height.
    pub out_h: usize,
    /// Output width.
    pub out_w: usize,
    /// Output channels.
    pub out_c: usize,
    /// Kernel height and width.
    pub kernel: [usize; 2],
    /// Vertical and horizontal stride.
    pub stride: [usize; 2],
    /// Vertical and horizontal dilation.
    pub dilation: [usize; 2],
    /// Padding: top, left, bottom, right.
    pub pads: [usize; 4],
    /// Groups; divides `in_c` and `out_c`.
    pub groups: usize,
}

/// The input rows, of `in_h`, that the output rows `rows` of a window of `kernel` rows read, with `pad` rows of padding
/// above; empty when they read padding alone.
pub fn rows_under_window(
    rows: Range<usize>,
    in_h: usize,
    kernel: usize,
    stride: usize,
    dilation: usize,
    pad: usize,
) -> Range<usize> {
    if rows.is_empty() || in_h == 0 {
        return 0..0;
    }
    let start = (rows.start * stride).saturating_sub(pad).min(in_h);
    let end = (rows.end - 1) * stride + (kernel - 1) * dilation + 1;
    start..end.saturating_sub(pad).clamp(start, in_h)
}

impl ConvShape {
    /// Whether every channel is convolved with one kernel of its own.
    pub fn is_depthwise(&self) -> bool {
        self.groups > 1 && self.groups == self.in_c && self.groups == self.out_c
    }

    /// Whether the layer is a plain matrix product over pixels.
    pub fn is_pointwise(&self) -> bool {
        let same = [self.out_h, self.out_w] == [self.in_h, self.in_w];
        self.kernel == [1, 1] && self.stride == [1, 1] && self.pads == [0; 4] && self.groups == 1 && same
    }

    /// Multiply-adds of the whole layer.
    pub fn multiply_adds(&self) -> usize {
        self.out_h * self.out_w * self.out_c * self.kernel[0] * self.kernel[1] * self.in_c
            / self.groups.max(1)
    }

    /// The input rows that the output rows `rows` read; empty when they read padding alone.
    pub fn input_rows(&self, rows: Range<usize>) -> Range<usize> {
        rows_under_window(rows, self.in_h, self.kernel[0], self.stride[0], self.dilation[0], self.pads[0])
    }

    pub(crate) fn check(&self) {
        let g = self.groups;
        assert!(
            g > 0 && self.in_c.is_multiple_of(g) && self.out_c.is_multiple_of(g),
            "groups must divide the channels: {self:?}"
        );
        let positive = self.kernel.iter().chain(&self.stride).chain(&self.dilation).all(|&x| x > 0);
        assert!(positive, "kernel, stride and dilation must be positive: {self:?}");
    }

    pub(crate) fn k(&self) -> usize {
        self.kernel[0] * self.kernel[1] * (self.in_c / self.groups)
    }
}

/// The input image, or the rows of it that are at hand.
#[derive(Clone, Copy, Debug)]
pub enum ConvInput<'a> {
    /// Channels last: pixel `(y, x)` starts at `data[((y - first_row) * in_w + x) * pixel_stride]`.
    Nhwc {
        /// The pixels.
        data: &'a [f32],
        /// Distance between pixels, at least `in_c`.
        pixel_stride: usize,
        /// The image row that `data` starts with.
        first_row: usize,
    },
    /// Planes: channel `c` of pixel `(y, x)` is `data[c * channel_stride + (y - first_row) * in_w + x]`.
    /// Only for layers with `groups == 1` and a horizontal dilation of 1.
    Nchw {
        /// The planes.
        data: &'a [f32],
        /// Distance between planes.
        channel_stride: usize,
        /// The image row that each plane starts with.
        first_row: usize,
    },
}

/// Values that the packed weights of this layer take.
pub fn conv_packed_len(shape: &ConvShape) -> usize {
    if shape.is_depthwise() {
        return shape.kernel[0] * shape.kernel[1] * shape.out_c;
    }
    shape.groups * packed_len(shape.k(), shape.out_c / shape.groups)
}

/// Packs weights given as `[out_c, in_c / groups, kernel_h, kernel_w]` (the ONNX layout) into `out` of
/// [`conv_packed_len`] values.
///
/// # Panics
/// Panics when a slice is too short or the shape is not consistent.
pub fn pack_conv(shape: &ConvShape, weights: &[f32], out: &mut [f32]) {
    shape.check();
    let out = &mut out[..conv_packed_len(shape)];
    let taps = shape.kernel[0] * shape.kernel[1];
    let (in_c, out_c) = (shape.in_c / shape.groups, shape.out_c / shape.groups);
    assert!(weights.len() >= shape.out_c * in_c * taps, "{} weights for {shape:?}", weights.len());
    if shape.is_depthwise() {
        for (tap, row) in out.chunks_exact_mut(shape.out_c.max(1)).enumerate() {
            for (channel, w) in row.iter_mut().enumerate() {
                *w = weights[channel * taps + tap];
            }
        }
        return;
    }
    let k = shape.k();
    let len = packed_len(k, out_c);
    for group in 0..shape.groups {
        let weights = &weights[group * out_c * k..];
        // A row of K is (tap, channel); ONNX has (channel, tap).
        pack_with(k, out_c, &mut out[group * len..][..len], |row, column| {
            weights[column * k + (row % in_c) * taps + row / in_c]
        });
    }
}

/// Values of scratch per thread: rows of the padded copy that a block of output rows reads, some 64 KiB.
const BLOCK: usize = 16 << 10;

/// A layer that goes through the padded copy.
#[derive(Clone, Copy)]
struct Padded {
    width: usize,
    rows: usize,
    block: usize,
}

impl Padded {
    fn of(shape: &ConvShape) -> Padded {
        let width = (shape.out_w.max(1) - 1) * shape.stride[1] + shape.kernel[1];
        let reach = (shape.kernel[0] - 1) * shape.dilation[0] + 1;
        let fit = BLOCK / (width * shape.in_c).max(1);
        let block = (fit.saturating_sub(reach) / shape.stride[0] + 1).min(shape.out_h.max(1));
        Padded { width, rows: (block - 1) * shape.stride[0] + reach, block }
    }

    fn len(&self, shape: &ConvShape) -> usize {
        self.rows * self.width * shape.in_c
    }
}

fn goes_padded(shape: &ConvShape, planes: bool) -> bool {
    let small = shape.in_c < 8 && shape.kernel[1] > 1 && shape.groups == 1 && shape.dilation[1] == 1;
    planes || small
}

/// Values of scratch that [`conv2d`] needs for this layer on a pool of `threads` threads; `planes` says that
/// the input is [`ConvInput::Nchw`].
pub fn conv_scratch_len(shape: &ConvShape, planes: bool, threads: usize) -> usize {
    if goes_padded(shape, planes) { threads * Padded::of(shape).len(shape) } else { 0 }
}

/// Rows of A gathered from the taps of a convolution.
#[derive(Clone, Copy)]
pub(crate) struct Taps<T> {
    /// Where pixel (0, 0) of the whole image would be.
    pub(crate) data: *const T,
    /// What pixels outside the image are: at least `ZEROS_LEN` values or a whole run.
    pub(crate) outside: *const T,
    pub(crate) pixel_stride: usize,
    pub(crate) h: usize,
    pub(crate) w: usize,
    pub(crate) out_w: usize,
    pub(crate) first_out_row: usize,
    pub(crate) kernel: [usize; 2],
    pub(crate) stride: [usize; 2],
    pub(crate) dilation: [usize; 2],
    pub(crate) pads: [usize; 2],
    pub(crate) run: usize,
    pub(crate) padded: bool,
}

// SAFETY: the data is only read.
unsafe impl<T: Sync> Sync for Taps<T> {}

impl<T: Sync> RowSource<T> for Taps<T> {
    fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }
    fn run(&self) -> usize {
        self.run
    }
    fn footprint(&self) -> usize {
        (self.run * self.stride[0] * self.stride[1]).min(self.run * self.taps())
    }
    fn padded(&self) -> bool {
        self.padded
    }
    #[inline(always)]
    unsafe fn pointers(
        &self,
        row: usize,
        rows: usize,
        tap: usize,
        taps: usize,
        offset: usize,
        out: *mut *const T,
    ) {
        let (mut y, mut x) = (row / self.out_w, row % self.out_w);
        let kernel_w = self.kernel[1];
        let (first_ky, first_kx) =
            if taps == self.taps() { (0, 0) } else { (tap / kernel_w, tap % kernel_w) };
        for r in 0..rows {
            // Coordinates left of or above the image wrap to huge values and fail the comparison below.
            let top = ((y + self.first_out_row) * self.stride[0]).wrapping_sub(self.pads[0]);
            let left = (x * self.stride[1]).wrapping_sub(self.pads[1]);
            let (mut ky, mut kx) = (first_ky, first_kx);
            for t in 0..taps {
                let iy = top.wrapping_add(ky * self.dilation[0]);
                let ix = left.wrapping_add(kx * self.dilation[1]);
                let index = iy.wrapping_mul(self.w).wrapping_add(ix).wrapping_mul(self.pixel_stride);
                let inside = self.data.wrapping_add(index.wrapping_add(offset));
                let pointer = if iy < self.h && ix < self.w { inside } else { self.outside };
                // SAFETY: the caller vouches for `out`.
                unsafe { *out.add(t * rows + r) = pointer };
                kx += 1;
                if kx == kernel_w {
                    kx = 0;
                    ky += 1;
                }
            }
            x += 1;
            if x == self.out_w {
                x = 0;
                y += 1;
            }
        }
    }
    #[inline(always)]
    unsafe fn gather(&self, row: usize, rows: usize, out: *mut T, stride: usize) {
        let (mut y, mut x) = (row / self.out_w, row % self.out_w);
        let [kernel_h, kernel_w] = self.kernel;
        let line = kernel_w * self.run;
        // A row of the kernel is one stretch of memory when nothing lies between its pixels.
        let joined = self.dilation[1] == 1 && self.pixel_stride == self.run;
        for r in 0..rows {
            let top = ((y + self.first_out_row) * self.stride[0]).wrapping_sub(self.pads[0]);
            let left = (x * self.stride[1]).wrapping_sub(self.pads[1]);
            let within = joined && left < self.w && left + kernel_w <= self.w;
            for ky in 0..kernel_h {
                let iy = top.wrapping_add(ky * self.dilation[0]);
                let start = self.data.wrapping_add(iy.wrapping_mul(self.w).wrapping_mul(self.pixel_stride));
                let to = out.wrapping_add(r * stride + ky * line);
                // SAFETY: by contract; what is read lies in the image, or stands for pixels outside.
                unsafe {
                    if iy >= self.h {
                        copy_short(self.outside, to, line);
                    } else if within {
                        copy_short(start.wrapping_add(left * self.pixel_stride), to, line);
                    } else {
                        for kx in 0..kernel_w {
                            let ix = left.wrapping_add(kx * self.dilation[1]);
                            let pixel = start.wrapping_add(ix.wrapping_mul(self.pixel_stride));
                            let from = if ix < self.w { pixel } else { self.outside };
                            copy_short(from, to.wrapping_add(kx * self.run), self.run);
                        }
                    }
                }
            }
            x += 1;
            if x == self.out_w {
                x = 0;
                y += 1;
            }
        }
    }
}

/// Copies a few values; for 8 to 16 bytes without a call.
///
/// # Safety
/// As [`std::ptr::copy_nonoverlapping`].
#[inline(always)]
unsafe fn copy_short<T>(from: *const T, to: *mut T, n: usize) {
    let bytes = n * size_of::<T>();
    // SAFETY: by contract; both halves lie within the `bytes` bytes.
    unsafe {
        if (8..=16).contains(&bytes) {
            let (from, to) = (from.cast::<u8>(), to.cast::<u8>());
            let first = from.cast::<u64>().read_unaligned();
            let last = from.add(bytes - 8).cast::<u64>().read_unaligned();
            to.cast::<u64>().write_unaligned(first);
            to.add(bytes - 8).cast::<u64>().write_unaligned(last);
        } else {
            std::ptr::copy_nonoverlapping(from, to, n);
        }
    }
}

/// Convolves: computes the output rows `rows` of the layer into `output`, whose first pixel is `(rows.start, 0)`
/// and whose pixels lie `out_stride >= out_c` apart. `packed` comes from [`pack_conv`], `scratch` has
/// [`conv_scratch_len`] values. The input must hold at least [`ConvShape::input_rows`]`(rows)`.
///
/// # Panics
/// Panics when a slice is too short, when the shape is not consistent, and for planes with groups or a
/// horizontal dilation.
pub fn conv2d(
    pool: &ThreadPool,
    shape: &ConvShape,
    input: ConvInput<'_>,
    packed: &[f32],
    output: &mut [f32],
    out_stride: usize,
    rows: Range<usize>,
    epilogue: &Epilogue<'_>,
    scratch: &mut [f32],
) {
    shape.check();
    assert!(rows.end <= shape.out_h, "output rows {rows:?} of {}", shape.out_h);
    let pixels = rows.len() * shape.out_w;
    check_rows("output", output.len(), pixels, shape.out_c, out_stride);
    assert!(packed.len() >= conv_packed_len(shape), "{} packed weights for {shape:?}", packed.len());
    epilogue.check(pixels, shape.out_c);
    if pixels == 0 || shape.out_c == 0 {
        return;
    }
    let needed = shape.input_rows(rows.clone());
    let (data, first_row, pixel_stride) = match input {
        ConvInput::Nhwc { data, pixel_stride, first_row } => {
            let stored = needed.end.saturating_sub(first_row);
            check_rows("input", data.len(), stored * shape.in_w, shape.in_c, pixel_stride);
            (data, first_row, pixel_stride)
        }
        ConvInput::Nchw { data, channel_stride, first_row } => {
            assert!(shape.groups == 1 && shape.dilation[1] == 1, "planes with groups or dilation: {shape:?}");
            let stored = needed.end.saturating_sub(first_row);
            check_rows("input", data.len(), shape.in_c, stored * shape.in_w, channel_stride);
            (data, first_row, 0)
        }
    };
    assert!(
        needed.is_empty() || first_row <= needed.start,
        "input starts at row {first_row}, {needed:?} needed"
    );

    if pixel_stride == 0 || goes_padded(shape, false) {
        return padded(pool, shape, input, packed, output, out_stride, rows, epilogue, scratch);
    }
    // Where pixel (0, 0) would be; only rows that are stored are ever read.
    let origin = data.as_ptr().wrapping_sub(first_row * shape.in_w * pixel_stride);
    if shape.is_depthwise() {
        return depthwise(pool, shape, origin, pixel_stride, packed, output, out_stride, rows, epilogue);
    }
    let (in_c, out_c) = (shape.in_c / shape.groups, shape.out_c / shape.groups);
    let len = packed_len(shape.k(), out_c);
    let c = Shareable(output.as_mut_ptr());
    let bias = epilogue.bias.map_or(std::ptr::null(), <[f32]>::as_ptr);
    let residual = epilogue.residual.map_or(std::ptr::null(), |r| r.data.as_ptr());
    let offset = |p: *const f32, n: usize| if p.is_null() { p } else { p.wrapping_add(n) };
    if shape.is_pointwise() {
        let start = rows.start * shape.in_w * pixel_stride;
        let source = Strided { data: origin.wrapping_add(start), stride: pixel_stride, k: in_c };
        return Product {
            source,
            rows: pixels,
            columns: out_c,
            panels: Panels { data: packed.as_ptr(), plain_stride: 0 },
            c,
            c_stride: out_stride,
            bias,
            residual,
            residual_stride: epilogue.residual.map_or(0, |r| r.stride),
            activation: epilogue.activation,
        }
        .run(pool);
    }
    let panels = out_c.div_ceil(crate::gemm::PANEL);
    let source = Taps {
        data: origin,
        outside: zeros(),
        pixel_stride,
        h: shape.in_h,
        w: shape.in_w,
        out_w: shape.out_w,
        first_out_row: rows.start,
        kernel: shape.kernel,
        stride: shape.stride,
        dilation: shape.dilation,
        pads: [shape.pads[0], shape.pads[1]],
        run: in_c,
        padded: true,
    };
    let product = |group: usize| Product {
        source: Taps { data: source.data.wrapping_add(group * in_c), ..source },
        rows: pixels,
        columns: out_c,
        panels: Panels { data: packed[group * len..].as_ptr(), plain_stride: 0 },
        c: Shareable(c.get().wrapping_add(group * out_c)),
        c_stride: out_stride,
        bias: offset(bias, group * out_c),
        residual: offset(residual, group * out_c),
        residual_stride: epilogue.residual.map_or(0, |r| r.stride),
        activation: epilogue.activation,
    };
    if shape.groups == 1 {
        return product(0).run(pool);
    }
    if shape.groups < 2 * pool.threads() {
        return (0..shape.groups).for_each(|group| product(group).run(pool));
    }
    let product = AssertSync(product);
    let chunk = shape.groups.div_ceil(pool.threads() * 4);
    pool.parallel_for(shape.groups.div_ceil(chunk), &|index, _| {
        for group in index * chunk..shape.groups.min((index + 1) * chunk) {
            product.get()(group).run_part(pool, 0..pixels, 0..panels);
        }
    });
}

/// A closure over pointers that are only read, or written by disjoint tasks.
struct AssertSync<T>(T);

impl<T> AssertSync<T> {
    fn get(&self) -> &T {
        &self.0
    }
}

// SAFETY: `conv2d` wraps a closure that only computes addresses; each group writes its own columns.
unsafe impl<T> Sync for AssertSync<T> {}

/// The path of layers with few input channels: per block of output rows, a padded channels-last copy, in which
/// the `kernel_w * in_c` values under a kernel row are contiguous.
fn padded(
    pool: &ThreadPool,
    shape: &ConvShape,
    input: ConvInput<'_>,
    packed: &[f32],
    output: &mut [f32],
    out_stride: usize,
    rows: Range<usize>,
    epilogue: &Epilogue<'_>,
    scratch: &mut [f32],
) {
    let plan = Padded::of(shape);
    let len = plan.len(shape);
    assert!(
        scratch.len() >= len * pool.threads(),
        "scratch has {} values, {len} per thread needed",
        scratch.len()
    );
    let scratch = Shareable(scratch.as_mut_ptr());
    let c = Shareable(output.as_mut_ptr());
    // Small stripes and many threads still get a task each.
    let block = plan.block.min(rows.len().div_ceil(pool.threads()));
    pool.parallel_for(rows.len().div_ceil(block), &|index, worker| {
        let start = rows.start + index * block;
        let part = start..rows.end.min(start + block);
        // SAFETY: every worker has a part of the scratch of its own.
        let copy = unsafe { std::slice::from_raw_parts_mut(scratch.get().add(worker * len), len) };
        copy_padded(shape, &input, part.start, plan.width, copy);
        let first_pixel = (part.start - rows.start) * shape.out_w;
        let product = Product {
            source: Taps {
                data: copy.as_ptr(),
                outside: zeros(),
                pixel_stride: shape.in_c,
                h: plan.rows,
                w: plan.width,
                out_w: shape.out_w,
                first_out_row: 0,
                kernel: [shape.kernel[0], 1],
                stride: shape.stride,
                dilation: shape.dilation,
                pads: [0, 0],
                run: shape.kernel[1] * shape.in_c,
                padded: false,
            },
            rows: part.len() * shape.out_w,
            columns: shape.out_c,
            panels: Panels { data: packed.as_ptr(), plain_stride: 0 },
            c: Shareable(c.get().wrapping_add(first_pixel * out_stride)),
            c_stride: out_stride,
            bias: epilogue.bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
            residual: epilogue
                .residual
                .map_or(std::ptr::null(), |r| r.data[first_pixel * r.stride..].as_ptr()),
            residual_stride: epilogue.residual.map_or(0, |r| r.stride),
            activation: epilogue.activation,
        };
        product.run_part(pool, 0..product.rows, 0..shape.out_c.div_ceil(crate::gemm::PANEL));
    });
}

/// Fills `copy`, `[rows, width, in_c]`, with the input rows under the output rows from `out_row` on.
fn copy_padded(shape: &ConvShape, input: &ConvInput<'_>, out_row: usize, width: usize, copy: &mut [f32]) {
    let channels = shape.in_c;
    let (pad_top, pad_left) = (shape.pads[0], shape.pads[1].min(width));
    let columns = shape.in_w.min(width - pad_left);
    for (row, to) in copy.chunks_exact_mut((width * channels).max(1)).enumerate() {
        let y = (out_row * shape.stride[0] + row).wrapping_sub(pad_top);
        let stored = y < shape.in_h
            && match *input {
                ConvInput::Nhwc { data, pixel_stride, first_row } => y
                    .checked_sub(first_row)
                    .is_some_and(|r| ((r + 1) * shape.in_w - 1) * pixel_stride + channels <= data.len()),
                ConvInput::Nchw { data, channel_stride, first_row } => y
                    .checked_sub(first_row)
                    .is_some_and(|r| (channels - 1) * channel_stride + (r + 1) * shape.in_w <= data.len()),
            };
        // Rows past the stripe are read by no output row, so zeros do.
        if columns == 0 || !stored {
            to.fill(0.0);
            continue;
        }
        let (left, middle) = to.split_at_mut(pad_left * channels);
        let (middle, right) = middle.split_at_mut(columns * channels);
        left.fill(0.0);
        right.fill(0.0);
        match *input {
            ConvInput::Nhwc { data, pixel_stride, first_row } => {
                let from = &data[(y - first_row) * shape.in_w * pixel_stride..];
                if pixel_stride == channels {
                    middle.copy_from_slice(&from[..columns * channels]);
                } else {
                    for (x, pixel) in middle.chunks_exact_mut(channels).enumerate() {
                        pixel.copy_from_slice(&from[x * pixel_stride..][..channels]);
                    }
                }
            }
            ConvInput::Nchw { data, channel_stride, first_row } => {
                let from = (y - first_row) * shape.in_w;
                let plane = |c: usize| &data[c * channel_stride + from..][..columns];
                if let [r, g, b] = std::array::from_fn(|c| if c < channels { plane(c) } else { &[] })
                    && channels == 3
                {
                    for ((pixel, r), (g, b)) in middle.chunks_exact_mut(3).zip(r).zip(g.iter().zip(b)) {
                        pixel.copy_from_slice(&[*r, *g, *b]);
                    }
                } else {
                    for c in 0..channels {
                        for (pixel, x) in middle.chunks_exact_mut(channels).zip(plane(c)) {
                            pixel[c] = *x;
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
