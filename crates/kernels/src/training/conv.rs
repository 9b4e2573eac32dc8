//! Convolutions whose weights change from step to step, and their gradients; all images of a batch in one product.

use super::depthwise::{depthwise_input_grad, depthwise_weight_grad, depthwise_weight_grad_scratch_len};
use super::outer::{Columns, Outer, outer_scratch_len};
use crate::arch::Simd;
use crate::conv::{ConvInput, ConvShape, conv_packed_len, conv_scratch_len, conv2d, pack_conv};
use crate::epilogue::{Activation, Epilogue, Residual, check_rows};
use crate::gemm::{GRAIN, PANEL, Panels, Product, RowSource, Strided, packed_len, zeros};
use crate::threads::{Shareable, ThreadPool};
use std::ops::Range;

/// A channels-last convolution of a batch of images with weights `[out, in/groups, height, width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainConv {
    /// Sizes of one image.
    pub shape: ConvShape,
    /// Images.
    pub batch: usize,
}

impl TrainConv {
    fn input_len(&self) -> usize {
        self.batch * self.shape.in_h * self.shape.in_w * self.shape.in_c
    }
    fn output_len(&self) -> usize {
        self.batch * self.shape.out_h * self.shape.out_w * self.shape.out_c
    }
    fn weight_len(&self) -> usize {
        self.shape.out_c * (self.shape.in_c / self.shape.groups) * self.taps()
    }
    fn taps(&self) -> usize {
        self.shape.kernel[0] * self.shape.kernel[1]
    }
    /// Few input channels go image by image through the padded copy.
    fn by_image(&self) -> bool {
        let s = &self.shape;
        s.is_depthwise() || (s.in_c < 8 && s.kernel[1] > 1 && s.groups == 1 && s.dilation[1] == 1)
    }
    fn check(&self, x: usize, w: usize, y: usize) {
        self.shape.check();
        assert!(x >= self.input_len(), "{x} input values for {self:?}");
        assert!(w >= self.weight_len(), "{w} weights for {self:?}");
        assert!(y >= self.output_len(), "{y} output values for {self:?}");
    }
}

/// Rows of A gathered from several pictures: row `(image, y, x)`, tap `(ky, kx)` is the pixel
/// `(y·stride + first + ky·step, …)` of that image, or zeros outside.
#[derive(Clone, Copy)]
struct Pictures {
    data: *const f32,
    image_stride: usize,
    pixel_stride: usize,
    h: usize,
    w: usize,
    rows_h: usize,
    rows_w: usize,
    stride: [usize; 2],
    first: [isize; 2],
    step: [isize; 2],
    kernel: [usize; 2],
    run: usize,
}

// SAFETY: the data is only read.
unsafe impl Sync for Pictures {}

impl Pictures {
    /// The same pixels from another channel on.
    fn moved(&self, channels: usize) -> Pictures {
        Pictures { data: self.data.wrapping_add(channels), ..*self }
    }
}

impl RowSource<f32> for Pictures {
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
        true
    }
    #[inline(always)]
    unsafe fn pointers(
        &self,
        row: usize,
        rows: usize,
        tap: usize,
        taps: usize,
        offset: usize,
        out: *mut *const f32,
    ) {
        let (line, mut x) = (row / self.rows_w, row % self.rows_w);
        let (mut image, mut y) = (line / self.rows_h, line % self.rows_h);
        let kernel_w = self.kernel[1];
        let (first_ky, first_kx) = if tap == 0 { (0, 0) } else { (tap / kernel_w, tap % kernel_w) };
        for r in 0..rows {
            let top = (y * self.stride[0]) as isize + self.first[0];
            let left = (x * self.stride[1]) as isize + self.first[1];
            let data = self.data.wrapping_add(image * self.image_stride + offset);
            let (mut ky, mut kx) = (first_ky, first_kx);
            for t in 0..taps {
                // Coordinates left of or above the image wrap to huge values and fail the comparison.
                let iy = (top + ky as isize * self.step[0]) as usize;
                let ix = (left + kx as isize * self.step[1]) as usize;
                let index = iy.wrapping_mul(self.w).wrapping_add(ix).wrapping_mul(self.pixel_stride);
                let pointer = if iy < self.h && ix < self.w { data.wrapping_add(index) } else { zeros() };
                // SAFETY: the caller vouches for `out`.
                unsafe { *out.add(t * rows + r) = pointer };
                kx += 1;
                if kx == kernel_w {
                    kx = 0;
                    ky += 1;
                }
            }
            x += 1;
            if x == self.rows_w {
                x = 0;
                y += 1;
                if y == self.rows_h {
                    y = 0;
                    image += 1;
                }
            }
        }
    }
}

/// Packs a matrix `[k, n]` per group on all threads; `fill(group, first column, columns, rows, out)` writes some rows of
/// a panel.
fn pack_groups(
    pool: &ThreadPool,
    groups: usize,
    k: usize,
    n: usize,
    out: &mut [f32],
    fill: &(dyn Fn(usize, usize, usize, Range<usize>, &mut [f32]) + Sync),
) {
    let len = packed_len(k, n);
    let panels = n.div_ceil(PANEL);
    let piece = 288;
    let pieces = k.div_ceil(piece).max(1);
    let base = Shareable(out[..groups * len].as_mut_ptr());
    pool.parallel_for(groups * panels * pieces, &|index, _| {
        let (group, rest) = (index / (panels * pieces), index % (panels * pieces));
        let (panel, part) = (rest / pieces, rest % pieces);
        let columns = PANEL.min(n - panel * PANEL);
        let width = columns.next_multiple_of(GRAIN);
        let rows = part * piece..k.min((part + 1) * piece);
        let at = group * len + panel * PANEL * k + rows.start * width;
        // SAFETY: tasks write disjoint parts of the packed matrices.
        let to = unsafe { std::slice::from_raw_parts_mut(base.get().add(at), rows.len() * width) };
        fill(group, panel * PANEL, columns, rows, to);
    });
}

/// Packs `[out, in/groups, height, width]` into the panels of a convolution, on all threads.
fn pack_forward(pool: &ThreadPool, s: &ConvShape, w: &[f32], packed: &mut [f32]) {
    const SQUARE: usize = 16;
    let (in_c, out_c, taps) = (s.in_c / s.groups, s.out_c / s.groups, s.kernel[0] * s.kernel[1]);
    let k = s.k();
    let len = packed_len(k, out_c);
    let (panels, pieces) = (out_c.div_ceil(PANEL), in_c.div_ceil(32));
    let base = Shareable(packed[..s.groups * len].as_mut_ptr());
    pool.parallel_for(s.groups * panels * pieces, &|index, _| {
        let (group, rest) = (index / (panels * pieces), index % (panels * pieces));
        let (panel, piece) = (rest / pieces, rest % pieces);
        let columns = PANEL.min(out_c - panel * PANEL);
        let width = columns.next_multiple_of(GRAIN);
        let out = base.get().wrapping_add(group * len + panel * PANEL * k);
        let w = &w[(group * out_c + panel * PANEL) * k..];
        // Stored as (channel, tap), packed as (tap, channel); square by square, so that each cache line is read once.
        let values = piece * 32 * taps..in_c.min((piece + 1) * 32) * taps;
        for i in values.clone().step_by(SQUARE) {
            let depth = SQUARE.min(values.end - i);
            for j in (0..width).step_by(SQUARE) {
                let mut square = [[0f32; SQUARE]; SQUARE];
                for (column, line) in (j..columns.min(j + SQUARE)).zip(&mut square) {
                    line[..depth].copy_from_slice(&w[column * k + i..][..depth]);
                }
                for d in 0..depth {
                    let row = ((i + d) % taps) * in_c + (i + d) / taps;
                    let values: [f32; SQUARE] = std::array::from_fn(|j| square[j][d]);
                    // SAFETY: tasks write disjoint rows of disjoint panels.
                    unsafe {
                        std::ptr::copy_nonoverlapping(values.as_ptr(), out.add(row * width + j), SQUARE);
                    }
                }
            }
        }
    });
}

/// Values of scratch that [`conv_forward`] needs on a pool of `threads` threads.
pub fn conv_forward_scratch_len(conv: &TrainConv, threads: usize) -> usize {
    let padded = if conv.by_image() { conv_scratch_len(&conv.shape, false, threads) } else { 0 };
    conv_packed_len(&conv.shape).next_multiple_of(16) + padded
}

/// `y = activation(conv(x, w) + bias + residual)`: packs the weights, then convolves all images.
///
/// # Panics
/// Panics when a slice is too short or the shape is not consistent.
pub fn conv_forward(
    pool: &ThreadPool,
    conv: &TrainConv,
    x: &[f32],
    w: &[f32],
    bias: Option<&[f32]>,
    residual: Option<&[f32]>,
    activation: Activation,
    y: &mut [f32],
    scratch: &mut [f32],
) {
    conv.check(x.len(), w.len(), y.len());
    let s = &conv.shape;
    let (packed, rest) = scratch.split_at_mut(conv_packed_len(s).next_multiple_of(16));
    let pixels = s.out_h * s.out_w;
    let (image_in, image_out) = (s.in_h * s.in_w * s.in_c, pixels * s.out_c);
    if conv.batch == 0 || image_out == 0 {
        return;
    }
    let epilogue_of = |image: usize| Epilogue {
        bias,
        residual: residual.map(|r| Residual { data: &r[image * image_out..], stride: s.out_c }),
        activation,
    };
    if conv.by_image() {
        pack_conv(s, w, packed);
        let packed = &*packed;
        let input = |image: usize| ConvInput::Nhwc {
            data: &x[image * image_in..][..image_in],
            pixel_stride: s.in_c,
            first_row: 0,
        };
        if !s.is_depthwise() {
            for (image, y) in y[..conv.output_len()].chunks_exact_mut(image_out).enumerate() {
                conv2d(pool, s, input(image), packed, y, s.out_c, 0..s.out_h, &epilogue_of(image), rest);
            }
            return;
        }
        let out = Shareable(y.as_mut_ptr());
        pool.parallel_for(conv.batch, &|image, _| {
            // SAFETY: images are disjoint parts of the result.
            let y = unsafe { std::slice::from_raw_parts_mut(out.get().add(image * image_out), image_out) };
            conv2d(pool, s, input(image), packed, y, s.out_c, 0..s.out_h, &epilogue_of(image), &mut []);
        });
        return;
    }
    let (in_c, out_c) = (s.in_c / s.groups, s.out_c / s.groups);
    let k = s.k();
    pack_forward(pool, s, w, packed);
    let rows = conv.batch * pixels;
    if let Some(bias) = bias {
        assert!(bias.len() >= s.out_c, "bias has {} values for {} channels", bias.len(), s.out_c);
    }
    if let Some(residual) = residual {
        check_rows("residual", residual.len(), rows, s.out_c, s.out_c);
    }
    let c = Shareable(y.as_mut_ptr());
    let len = packed_len(k, out_c);
    let panels = |group: usize| Panels { data: packed[group * len..].as_ptr(), plain_stride: 0 };
    if s.is_pointwise() {
        let source = Strided { data: x.as_ptr(), stride: s.in_c, k: s.in_c };
        return finished(source, rows, panels(0), c, s, 0, bias, residual, activation).run(pool);
    }
    let source = Pictures {
        data: x.as_ptr(),
        image_stride: image_in,
        pixel_stride: s.in_c,
        h: s.in_h,
        w: s.in_w,
        rows_h: s.out_h,
        rows_w: s.out_w,
        stride: s.stride,
        first: [-(s.pads[0] as isize), -(s.pads[1] as isize)],
        step: [s.dilation[0] as isize, s.dilation[1] as isize],
        kernel: s.kernel,
        run: in_c,
    };
    for group in 0..s.groups {
        let source = source.moved(group * in_c);
        finished(source, rows, panels(group), c, s, group, bias, residual, activation).run(pool);
    }
}

fn finished<R: RowSource<f32>>(
    source: R,
    rows: usize,
    panels: Panels,
    c: Shareable<f32>,
    s: &ConvShape,
    group: usize,
    bias: Option<&[f32]>,
    residual: Option<&[f32]>,
    activation: Activation,
) -> Product<R> {
    let columns = s.out_c / s.groups;
    let first = group * columns;
    Product {
        source,
        rows,
        columns,
        panels,
        c: Shareable(c.get().wrapping_add(first)),
        c_stride: s.out_c,
        bias: bias.map_or(std::ptr::null(), |b| b[first..].as_ptr()),
        residual: residual.map_or(std::ptr::null(), |r| r[first..].as_ptr()),
        residual_stride: s.out_c,
        activation,
    }
}

/// The input pixels of one residue modulo the stride, and the taps that reach them.
#[derive(Clone, Copy, Debug)]
struct Phase {
    /// First input coordinate.
    at: usize,
    /// Coordinates.
    count: usize,
    /// First tap, distance of taps, number of taps.
    tap: usize,
    tap_step: usize,
    taps: usize,
    /// Output coordinate that tap 0 of the phase reads at the first input coordinate.
    first: isize,
    /// Change of the output coordinate from tap to tap.
    step: isize,
}

fn phases(s: &ConvShape, axis: usize) -> impl Iterator<Item = Phase> + '_ {
    let (size, stride, dilation) = ([s.in_h, s.in_w][axis], s.stride[axis], s.dilation[axis]);
    let (pad, kernel) = (s.pads[axis], s.kernel[axis]);
    (0..stride.min(size)).map(move |at| {
        let offset = |tap: usize| (at + pad) as isize - (tap * dilation) as isize;
        let fits = |tap: &usize| offset(*tap).rem_euclid(stride as isize) == 0;
        let mut found = (0..kernel).filter(fits);
        let tap = found.next().unwrap_or(0);
        let next = found.next();
        let tap_step = next.map_or(1, |n| n - tap);
        let taps = (0..kernel).filter(fits).count();
        let at_out = |tap: usize| offset(tap).div_euclid(stride as isize);
        Phase {
            at,
            count: (size - at).div_ceil(stride),
            tap,
            tap_step,
            taps,
            first: at_out(tap),
            step: next.map_or(0, |n| at_out(n) - at_out(tap)),
        }
    })
}

/// Rows of a phase per task.
const PHASE_ROWS: usize = 96;

/// Values of scratch that [`conv_input_grad`] needs on a pool of `threads` threads.
pub fn conv_input_grad_scratch_len(conv: &TrainConv, threads: usize) -> usize {
    let s = &conv.shape;
    if s.is_depthwise() {
        return (conv.taps() * s.in_c).next_multiple_of(16);
    }
    let (in_c, out_c) = (s.in_c / s.groups, s.out_c / s.groups);
    let local = if s.stride == [1, 1] { 0 } else { threads * PHASE_ROWS * s.in_c.next_multiple_of(16) };
    s.groups * packed_len(conv.taps() * out_c, in_c) + local
}

/// `dx` of a convolution: for every residue of the input coordinates modulo the stride a convolution of `dy` with the
/// taps that reach it.
///
/// # Panics
/// Panics when a slice is too short or the shape is not consistent.
pub fn conv_input_grad(
    pool: &ThreadPool,
    conv: &TrainConv,
    dy: &[f32],
    w: &[f32],
    dx: &mut [f32],
    scratch: &mut [f32],
) {
    conv.check(dx.len(), w.len(), dy.len());
    let s = &conv.shape;
    if conv.input_len() == 0 {
        return;
    }
    if conv.output_len() == 0 {
        return dx[..conv.input_len()].fill(0.0);
    }
    if s.is_depthwise() {
        return depthwise_input_grad(pool, conv, dy, w, dx, scratch);
    }
    let (in_c, out_c, taps) = (s.in_c / s.groups, s.out_c / s.groups, conv.taps());
    let (packed, local) = scratch.split_at_mut(s.groups * packed_len(taps * out_c, in_c));
    let out = Shareable(dx.as_mut_ptr());
    let mut offset = 0;
    for py in phases(s, 0) {
        for px in phases(s, 1) {
            let here = py.taps * px.taps;
            let k = here * out_c;
            let len = packed_len(k, in_c);
            let packed = &mut packed[offset..][..s.groups * len];
            offset += s.groups * len;
            pack_groups(pool, s.groups, k, in_c, packed, &|group, first, columns, rows, to| {
                // A row of K is (tap of the phase, output channel).
                let width = columns.next_multiple_of(GRAIN);
                for (i, to) in rows.clone().zip(to.chunks_exact_mut(width)) {
                    let (tap, o) = (i / out_c, i % out_c);
                    let ky = py.tap + tap / px.taps * py.tap_step;
                    let kx = px.tap + tap % px.taps * px.tap_step;
                    let from = &w[((group * out_c + o) * in_c + first) * taps + ky * s.kernel[1] + kx..];
                    if taps == 1 {
                        to[..columns].copy_from_slice(&from[..columns]);
                    } else {
                        for (t, f) in to[..columns].iter_mut().zip(from.iter().step_by(taps)) {
                            *t = *f;
                        }
                    }
                    to[columns..].fill(0.0);
                }
            });
            let rows = conv.batch * py.count * px.count;
            let source = Pictures {
                data: dy.as_ptr(),
                image_stride: s.out_h * s.out_w * s.out_c,
                pixel_stride: s.out_c,
                h: s.out_h,
                w: s.out_w,
                rows_h: py.count,
                rows_w: px.count,
                stride: [1, 1],
                first: [py.first, px.first],
                step: [py.step, px.step],
                kernel: [py.taps, px.taps],
                run: out_c,
            };
            let panel_count = in_c.div_ceil(PANEL);
            let whole = s.stride == [1, 1];
            let packed = &*packed;
            let product = |group: usize, c: *mut f32| Product {
                source: source.moved(group * out_c),
                rows,
                columns: in_c,
                panels: Panels { data: packed[group * len..].as_ptr(), plain_stride: 0 },
                c: Shareable(c.wrapping_add(group * in_c)),
                c_stride: s.in_c,
                bias: std::ptr::null(),
                residual: std::ptr::null(),
                residual_stride: 0,
                activation: Activation::None,
            };
            if whole && s.kernel == [1, 1] && s.pads == [0; 4] && s.groups == 1 && s.in_h == s.out_h {
                let plain = Product {
                    source: Strided { data: dy.as_ptr(), stride: s.out_c, k: s.out_c },
                    rows,
                    columns: in_c,
                    panels: Panels { data: packed.as_ptr(), plain_stride: 0 },
                    c: out,
                    c_stride: s.in_c,
                    bias: std::ptr::null(),
                    residual: std::ptr::null(),
                    residual_stride: 0,
                    activation: Activation::None,
                };
                plain.run(pool);
                continue;
            }
            if whole {
                for group in 0..s.groups {
                    product(group, out.get()).run(pool);
                }
                continue;
            }
            // The pixels of a phase do not lie at one distance, so a block of them is made in scratch first.
            let block_len = PHASE_ROWS * s.in_c;
            let local = Shareable(local.as_mut_ptr());
            let packed = Shareable(packed.as_ptr().cast_mut());
            pool.parallel_for(rows.div_ceil(PHASE_ROWS), &|index, worker| {
                let rows = index * PHASE_ROWS..rows.min((index + 1) * PHASE_ROWS);
                let mine = local.get().wrapping_add(worker * block_len.next_multiple_of(16));
                for group in 0..s.groups {
                    if here == 0 {
                        break;
                    }
                    let c = mine.wrapping_sub(rows.start * s.in_c);
                    let product = Product {
                        source: source.moved(group * out_c),
                        rows: rows.end,
                        columns: in_c,
                        panels: Panels { data: packed.get().wrapping_add(group * len), plain_stride: 0 },
                        c: Shareable(c.wrapping_add(group * in_c)),
                        c_stride: s.in_c,
                        bias: std::ptr::null(),
                        residual: std::ptr::null(),
                        residual_stride: 0,
                        activation: Activation::None,
                    };
                    product.run_part(pool, rows.clone(), 0..panel_count);
                }
                for row in rows.clone() {
                    let (line, x) = (row / px.count, row % px.count);
                    let (image, y) = (line / py.count, line % py.count);
                    let (y, x) = (py.at + y * s.stride[0], px.at + x * s.stride[1]);
                    let at = ((image * s.in_h + y) * s.in_w + x) * s.in_c;
                    // SAFETY: pixels of phases are disjoint parts of `dx`; the block holds this row.
                    unsafe {
                        let to = out.get().add(at);
                        if here == 0 {
                            std::ptr::write_bytes(to, 0, s.in_c);
                        } else {
                            let from = mine.add((row - rows.start) * s.in_c);
                            std::ptr::copy_nonoverlapping(from, to, s.in_c);
                        }
                    }
                }
            });
        }
    }
}

/// The taps of a block of input channels as columns of a product over pixels.
struct Patches<'a> {
    x: *const f32,
    s: &'a ConvShape,
    /// Channels of `x` per group, and per block.
    in_c: usize,
    block: usize,
    groups: usize,
}

// SAFETY: the data is only read.
unsafe impl Sync for Patches<'_> {}

/// Channels per block: some 128 columns, whole vectors.
fn patch_channels(in_c: usize, taps: usize) -> usize {
    if in_c <= 16 { in_c } else { (144 / taps.max(1) / 16 * 16).clamp(16, in_c.next_multiple_of(16)) }
}

impl Patches<'_> {
    fn channels(&self, block: usize) -> Range<usize> {
        block * self.block..self.in_c.min((block + 1) * self.block)
    }
}

impl Columns for Patches<'_> {
    fn blocks(&self) -> usize {
        self.in_c.div_ceil(self.block.max(1))
    }
    fn width(&self, block: usize) -> usize {
        self.channels(block).len() * self.s.kernel[0] * self.s.kernel[1]
    }
    #[inline(always)]
    unsafe fn fill<S: Simd>(
        &self,
        simd: S,
        group: usize,
        block: usize,
        pixels: Range<usize>,
        out: *mut f32,
        stride: usize,
    ) {
        let s = self.s;
        let channels = self.channels(block);
        let width = channels.len();
        let pixel_stride = self.in_c * self.groups;
        let x = self.x.wrapping_add(group * self.in_c + channels.start);
        for ky in 0..s.kernel[0] {
            for kx in 0..s.kernel[1] {
                let mut to = out.wrapping_add((ky * s.kernel[1] + kx) * width);
                let mut pixel = pixels.start;
                while pixel < pixels.end {
                    // As many pixels of this output row as there are.
                    let (line, first) = (pixel / s.out_w, pixel % s.out_w);
                    let (image, oy) = (line / s.out_h, line % s.out_h);
                    let count = (s.out_w - first).min(pixels.end - pixel);
                    let iy = (oy * s.stride[0] + ky * s.dilation[0]).wrapping_sub(s.pads[0]);
                    let row = x.wrapping_add((image * s.in_h + iy.min(s.in_h)) * s.in_w * pixel_stride);
                    for ox in first..first + count {
                        let ix = (ox * s.stride[1] + kx * s.dilation[1]).wrapping_sub(s.pads[1]);
                        let inside = iy < s.in_h && ix < s.in_w;
                        let from = row.wrapping_add(ix.wrapping_mul(pixel_stride));
                        // SAFETY: by contract; what is read lies in the picture.
                        unsafe {
                            let mut i = 0;
                            if inside {
                                while i + S::LANES <= width {
                                    simd.store(to.add(i), simd.load(from.add(i)));
                                    i += S::LANES;
                                }
                                if i < width {
                                    simd.store_n(to.add(i), width - i, simd.load_n(from.add(i), width - i));
                                }
                            } else {
                                while i + S::LANES <= width {
                                    simd.store(to.add(i), simd.splat(0.0));
                                    i += S::LANES;
                                }
                                if i < width {
                                    simd.store_n(to.add(i), width - i, simd.splat(0.0));
                                }
                            }
                        }
                        to = to.wrapping_add(stride);
                    }
                    pixel += count;
                }
            }
        }
    }
}

/// Values of scratch that [`conv_weight_grad`] needs on a pool of `threads` threads.
pub fn conv_weight_grad_scratch_len(conv: &TrainConv, threads: usize) -> usize {
    let s = &conv.shape;
    if s.is_depthwise() {
        return depthwise_weight_grad_scratch_len(conv);
    }
    let in_c = s.in_c / s.groups;
    let block = patch_channels(in_c, conv.taps()).max(1);
    let width = block.min(in_c) * conv.taps();
    let pixels = conv.batch * s.out_h * s.out_w;
    outer_scratch_len(s.groups, s.out_c / s.groups, pixels, in_c.div_ceil(block), width, threads)
}

/// `dw` of a convolution: the product of `dy'` and the patches of `x`, which are never all in memory.
///
/// # Panics
/// Panics when a slice is too short or the shape is not consistent.
pub fn conv_weight_grad(
    pool: &ThreadPool,
    conv: &TrainConv,
    x: &[f32],
    dy: &[f32],
    dw: &mut [f32],
    scratch: &mut [f32],
) {
    conv.check(x.len(), dw.len(), dy.len());
    let s = &conv.shape;
    if s.is_depthwise() {
        return depthwise_weight_grad(pool, conv, x, dy, dw, scratch);
    }
    let (in_c, out_c, taps) = (s.in_c / s.groups, s.out_c / s.groups, conv.taps());
    let columns =
        Patches { x: x.as_ptr(), s, in_c, block: patch_channels(in_c, taps).max(1), groups: s.groups };
    let outer = Outer {
        a: dy.as_ptr(),
        a_batch: out_c,
        a_stride: s.out_c,
        batch: s.groups,
        m: out_c,
        k: conv.batch * s.out_h * s.out_w,
        columns: &columns,
    };
    let out = Shareable(dw.as_mut_ptr());
    outer.run(pool, scratch, &|group, rows, block, values, stride| {
        let channels = columns.channels(block);
        for (i, o) in rows.enumerate() {
            // SAFETY: blocks are disjoint runs of the weights of an output channel; the values are this call's.
            let (from, to) = unsafe {
                let at = ((group * out_c + o) * in_c + channels.start) * taps;
                (
                    std::slice::from_raw_parts(values.add(i * stride), channels.len() * taps),
                    std::slice::from_raw_parts_mut(out.get().add(at), channels.len() * taps),
                )
            };
            if taps == 1 {
                to.copy_from_slice(from);
                continue;
            }
            for (c, to) in to.chunks_exact_mut(taps).enumerate() {
                for (t, from) in to.iter_mut().zip(from[c..].iter().step_by(channels.len())) {
                    *t = *from;
                }
            }
        }
    });
}
