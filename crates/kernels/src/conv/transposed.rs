//! Transposed convolution, channels last.
//!
//! Output pixels whose coordinates have the same remainder by the stride read the same kernel taps; each such
//! phase is an ordinary product with the rows of A gathered in place. Weights are packed phase by phase.

use super::ConvInput;
use crate::epilogue::{Epilogue, check_rows};
use crate::gemm::{PANEL, Panels, Product, RowSource, pack_with, packed_len, zeros};
use crate::threads::{Shareable, ThreadPool};
use std::ops::Range;

/// Sizes of a two-dimensional transposed convolution of one image. Output pixel `y` receives input pixel `i`
/// through tap `k` where `y + pad = i * stride + k * dilation`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConvTransposeShape {
    /// Input height.
    pub in_h: usize,
    /// Input width.
    pub in_w: usize,
    /// Input channels.
    pub in_c: usize,
    /// Output height, output padding included.
    pub out_h: usize,
    /// Output width, output padding included.
    pub out_w: usize,
    /// Output channels.
    pub out_c: usize,
    /// Kernel height and width.
    pub kernel: [usize; 2],
    /// Vertical and horizontal stride.
    pub stride: [usize; 2],
    /// Vertical and horizontal dilation.
    pub dilation: [usize; 2],
    /// Rows and columns cut off at the top and the left.
    pub pads: [usize; 2],
    /// Groups; divides `in_c` and `out_c`.
    pub groups: usize,
}

/// Most kernel rows or columns.
const KERNEL_MAX: usize = 32;

impl ConvTransposeShape {
    fn check(&self) {
        let g = self.groups;
        let divides = g > 0 && self.in_c.is_multiple_of(g) && self.out_c.is_multiple_of(g);
        assert!(divides, "groups must divide the channels: {self:?}");
        let positive = self.kernel.iter().chain(&self.stride).chain(&self.dilation).all(|&x| x > 0);
        assert!(positive, "kernel, stride and dilation must be positive: {self:?}");
        assert!(self.kernel.iter().all(|&k| k <= KERNEL_MAX), "kernel above {KERNEL_MAX}: {self:?}");
    }

    /// The taps along `axis` that reach outputs with remainder `phase`, and how many there are.
    fn taps(&self, axis: usize, phase: usize) -> ([usize; KERNEL_MAX], usize) {
        let (mut taps, mut count) = ([0; KERNEL_MAX], 0);
        let stride = self.stride[axis];
        for k in 0..self.kernel[axis] {
            if (phase + self.pads[axis]) % stride == k * self.dilation[axis] % stride {
                taps[count] = k;
                count += 1;
            }
        }
        (taps, count)
    }

    /// The input rows that the output rows `rows` read.
    pub fn input_rows(&self, rows: Range<usize>) -> Range<usize> {
        if rows.is_empty() || self.in_h == 0 {
            return 0..0;
        }
        let reach = (self.kernel[0] - 1) * self.dilation[0];
        let start = (rows.start + self.pads[0]).saturating_sub(reach).div_ceil(self.stride[0]).min(self.in_h);
        let end = (rows.end - 1 + self.pads[0]) / self.stride[0] + 1;
        start..end.clamp(start, self.in_h)
    }
}

/// Values that the packed weights of this layer take.
///
/// # Panics
/// Panics when the shape is not consistent or the kernel is larger than 32.
pub fn conv_transpose_packed_len(shape: &ConvTransposeShape) -> usize {
    shape.check();
    let (run, columns) = (shape.in_c / shape.groups, shape.out_c / shape.groups);
    // Every tap belongs to one phase in each direction.
    shape.groups * packed_len(shape.kernel[0] * shape.kernel[1] * run, columns)
}

/// Packs weights given as `[in_c, out_c / groups, kernel_h, kernel_w]` (the ONNX layout) into `out` of
/// [`conv_transpose_packed_len`] values.
///
/// # Panics
/// Panics when a slice is too short or the shape is not consistent.
pub fn pack_conv_transpose(shape: &ConvTransposeShape, weights: &[f32], out: &mut [f32]) {
    let out = &mut out[..conv_transpose_packed_len(shape)];
    let [kernel_h, kernel_w] = shape.kernel;
    let (run, columns) = (shape.in_c / shape.groups, shape.out_c / shape.groups);
    let all = shape.in_c * columns * kernel_h * kernel_w;
    assert!(weights.len() >= all, "{} weights, {all} needed for {shape:?}", weights.len());
    out.fill(0.0);
    let mut rest = out;
    for group in 0..shape.groups {
        for phase_y in 0..shape.stride[0] {
            let (ys, y_count) = shape.taps(0, phase_y);
            for phase_x in 0..shape.stride[1] {
                let (xs, x_count) = shape.taps(1, phase_x);
                let k = y_count * x_count * run;
                let (panels, tail) = rest.split_at_mut(packed_len(k, columns));
                pack_with(k, columns, panels, |row, column| {
                    let (tap, channel) = (row / run, group * run + row % run);
                    let (ky, kx) = (ys[tap / x_count], xs[tap % x_count]);
                    weights[((channel * columns + column) * kernel_h + ky) * kernel_w + kx]
                });
                rest = tail;
            }
        }
    }
}

/// The outputs of one phase in one output row.
struct PhaseRow {
    data: *const f32,
    pixel_stride: usize,
    h: usize,
    w: usize,
    run: usize,
    /// Input row of each vertical tap; past the image where the tap falls outside.
    rows: [usize; KERNEL_MAX],
    y_count: usize,
    /// `x + pad - kx * dilation` of the first output, per horizontal tap; wraps below zero.
    columns: [usize; KERNEL_MAX],
    x_count: usize,
    stride: usize,
}

// SAFETY: the data is only read.
unsafe impl Sync for PhaseRow {}

impl RowSource<f32> for PhaseRow {
    fn taps(&self) -> usize {
        self.y_count * self.x_count
    }
    fn run(&self) -> usize {
        self.run
    }
    fn footprint(&self) -> usize {
        self.run * self.y_count
    }
    fn padded(&self) -> bool {
        true
    }
    unsafe fn pointers(
        &self,
        row: usize,
        rows: usize,
        tap: usize,
        taps: usize,
        offset: usize,
        out: *mut *const f32,
    ) {
        for t in 0..taps {
            let iy = self.rows[(tap + t) / self.x_count];
            for r in 0..rows {
                // A multiple of the stride, positive or wrapped.
                let position =
                    self.columns[(tap + t) % self.x_count] as isize + ((row + r) * self.stride) as isize;
                let ix = position / self.stride as isize;
                let inside = position >= 0 && (ix as usize) < self.w && iy < self.h;
                let index = iy.wrapping_mul(self.w).wrapping_add(ix as usize).wrapping_mul(self.pixel_stride);
                let p = if inside { self.data.wrapping_add(index.wrapping_add(offset)) } else { zeros() };
                // SAFETY: the caller vouches for `out`.
                unsafe { *out.add(t * rows + r) = p };
            }
        }
    }
}

/// Computes the output rows `rows` of the layer into `output`, whose first pixel is `(rows.start, 0)` and whose
/// pixels lie `out_stride` apart. `packed` comes from [`pack_conv_transpose`]; the input is channels last and
/// holds at least [`ConvTransposeShape::input_rows`]`(rows)`.
///
/// # Panics
/// Panics when a slice is too short, when the shape is not consistent, and for planes as input.
pub fn conv_transpose2d(
    pool: &ThreadPool,
    shape: &ConvTransposeShape,
    input: ConvInput<'_>,
    packed: &[f32],
    output: &mut [f32],
    out_stride: usize,
    rows: Range<usize>,
    epilogue: &Epilogue<'_>,
) {
    let ConvInput::Nhwc { data, pixel_stride, first_row } = input else {
        panic!("a transposed convolution reads channels last");
    };
    assert!(rows.end <= shape.out_h, "output rows {rows:?} of {}", shape.out_h);
    assert!(
        packed.len() >= conv_transpose_packed_len(shape),
        "{} packed weights for {shape:?}",
        packed.len()
    );
    let pixels = rows.len() * shape.out_w;
    check_rows("output", output.len(), pixels, shape.out_c, out_stride);
    epilogue.check(pixels, shape.out_c);
    let needed = shape.input_rows(rows.clone());
    assert!(
        needed.is_empty() || first_row <= needed.start,
        "input starts at row {first_row}, {needed:?} needed"
    );
    let stored = needed.end.saturating_sub(first_row);
    check_rows("input", data.len(), stored * shape.in_w, shape.in_c, pixel_stride);
    if pixels == 0 || shape.out_c == 0 {
        return;
    }
    let (run, columns) = (shape.in_c / shape.groups, shape.out_c / shape.groups);
    let per_group = conv_transpose_packed_len(shape) / shape.groups;
    let origin = Shareable(data.as_ptr().wrapping_sub(first_row * shape.in_w * pixel_stride).cast_mut());
    let c = Shareable(output.as_mut_ptr());
    let work =
        pixels * shape.out_c * run * shape.kernel[0] * shape.kernel[1] / (shape.stride[0] * shape.stride[1]);
    let step = if pool.threads() == 1 || work < 200_000 {
        rows.len()
    } else {
        rows.len().div_ceil(pool.threads() * 4)
    };
    pool.parallel_for(rows.len().div_ceil(step), &|index, _| {
        let start = rows.start + index * step;
        for y in start..rows.end.min(start + step) {
            let phase_y = y % shape.stride[0];
            let (ys, y_count) = shape.taps(0, phase_y);
            // Taps above the image wrap to huge rows, those below are past the end; both read zeros.
            let in_rows = std::array::from_fn(|t| {
                let position = (y + shape.pads[0]).checked_sub(ys[t] * shape.dilation[0]);
                position.map_or(usize::MAX, |p| p / shape.stride[0])
            });
            for group in 0..shape.groups {
                let mut at = group * per_group;
                for phase in 0..shape.stride[0] * shape.stride[1] {
                    let (py, px) = (phase / shape.stride[1], phase % shape.stride[1]);
                    let (xs, x_count) = shape.taps(1, px);
                    let k = shape.taps(0, py).1 * x_count * run;
                    let panels = packed[at..].as_ptr();
                    at += packed_len(k, columns);
                    if py != phase_y || px >= shape.out_w {
                        continue;
                    }
                    let pixel = (y - rows.start) * shape.out_w + px;
                    let offset = group * columns;
                    let product = Product {
                        source: PhaseRow {
                            data: origin.get().cast_const().wrapping_add(group * run),
                            pixel_stride,
                            h: shape.in_h,
                            w: shape.in_w,
                            run,
                            rows: in_rows,
                            y_count,
                            columns: std::array::from_fn(|t| {
                                (px + shape.pads[1]).wrapping_sub(xs[t] * shape.dilation[1])
                            }),
                            x_count,
                            stride: shape.stride[1],
                        },
                        rows: (shape.out_w - px).div_ceil(shape.stride[1]),
                        columns,
                        panels: Panels { data: panels, plain_stride: 0 },
                        c: Shareable(c.get().wrapping_add(pixel * out_stride + offset)),
                        c_stride: out_stride * shape.stride[1],
                        bias: epilogue.bias.map_or(std::ptr::null(), |b| b[offset..].as_ptr()),
                        residual: epilogue
                            .residual
                            .map_or(std::ptr::null(), |r| r.data[pixel * r.stride + offset..].as_ptr()),
                        residual_stride: epilogue.residual.map_or(0, |r| r.stride * shape.stride[1]),
                        activation: epilogue.activation,
                    };
                    product.run_part(pool, 0..product.rows, 0..columns.div_ceil(PANEL));
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Isa;
    use crate::gemm::tests::{close, values};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn agrees_with_scattering(
            h in 1usize..7, w in 1usize..7, ci in 1usize..20, co in 1usize..20, groups in 1usize..3,
            kernel in (1usize..5, 1usize..5), stride in (1usize..4, 1usize..4), dilation in 1usize..3,
            pad in 0usize..3, extra in 0usize..2, cut in 0usize..9, seed in 0u64..1000,
        ) {
            let out = |size: usize, kernel: usize, stride: usize| {
                ((size - 1) * stride + (kernel - 1) * dilation + 1 + extra).checked_sub(2 * pad).filter(|&n| n > 0)
            };
            let (Some(out_h), Some(out_w)) = (out(h, kernel.0, stride.0), out(w, kernel.1, stride.1)) else { return Ok(()) };
            let shape = ConvTransposeShape {
                in_h: h, in_w: w, in_c: ci * groups, out_h, out_w, out_c: co * groups, kernel: [kernel.0, kernel.1],
                stride: [stride.0, stride.1], dilation: [dilation; 2], pads: [pad; 2], groups,
            };
            let x = values(h * w * shape.in_c, seed);
            let weights = values(shape.in_c * co * kernel.0 * kernel.1, seed + 1);
            let bias = values(shape.out_c, seed + 2);
            let mut packed = vec![f32::NAN; conv_transpose_packed_len(&shape)];
            pack_conv_transpose(&shape, &weights, &mut packed);
            let mut want: Vec<f64> = (0..out_h * out_w * shape.out_c).map(|i| f64::from(bias[i % shape.out_c])).collect();
            for iy in 0..h { for ix in 0..w { for c in 0..shape.in_c { for o in 0..co { for ky in 0..kernel.0 { for kx in 0..kernel.1 {
                let y = (iy * stride.0 + ky * dilation).wrapping_sub(pad);
                let z = (ix * stride.1 + kx * dilation).wrapping_sub(pad);
                if y < out_h && z < out_w {
                    let v = f64::from(x[(iy * w + ix) * shape.in_c + c]) * f64::from(weights[((c * co + o) * kernel.0 + ky) * kernel.1 + kx]);
                    want[(y * out_w + z) * shape.out_c + c / ci * co + o] += v;
                }
            }}}}}}
            for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
                let run = |threads: usize, rows: Range<usize>| {
                    let pool = ThreadPool::with_isa(threads, isa);
                    let need = shape.input_rows(rows.clone());
                    let line = w * shape.in_c;
                    let input = ConvInput::Nhwc { data: &x[need.start * line..need.end * line], pixel_stride: shape.in_c, first_row: need.start };
                    let mut y = vec![9.0; rows.len() * out_w * shape.out_c];
                    let epilogue = Epilogue { bias: Some(&bias), ..Epilogue::NONE };
                    conv_transpose2d(&pool, &shape, input, &packed, &mut y, shape.out_c, rows, &epilogue);
                    y
                };
                let whole = run(2, 0..out_h);
                for (i, &got) in whole.iter().enumerate() {
                    prop_assert!(close(got, want[i], (ci * kernel.0 * kernel.1) as f64), "{isa:?} {shape:?} {i}: {got}, not {}", want[i]);
                }
                let cut = cut.min(out_h);
                let mut parts = run(1, 0..cut);
                parts.extend(run(1, cut..out_h));
                prop_assert_eq!(&parts, &whole);
            }
        }
    }
}
