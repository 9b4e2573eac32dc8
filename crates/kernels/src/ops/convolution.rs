//! Convolutions of any number of spatial dimensions, in both layouts, as products over operands read in place.

use super::tile::{
    LeftTile, Operands, Real, RealCompute, RightTile, SharedResult, Sizes, product, with_real,
};
use super::{OpError, TensorView, TensorViewMut, Unary, activate_tensor};
use crate::ThreadPool;

/// Positions of a window over spatial dimensions.
#[derive(Clone, Debug, PartialEq)]
pub struct Window {
    /// Spatial sizes of the input.
    pub input: Vec<usize>,
    /// Spatial sizes of the result.
    pub output: Vec<usize>,
    /// Spatial sizes of the window.
    pub kernel: Vec<usize>,
    /// Per spatial axis.
    pub strides: Vec<usize>,
    /// Per spatial axis.
    pub dilations: Vec<usize>,
    /// Padding before the first element, per spatial axis; negative crops.
    pub pads: Vec<i64>,
}

impl Window {
    /// Elements of the window.
    pub fn taps(&self) -> usize {
        self.kernel.iter().product()
    }

    /// Spatial positions of the result.
    pub fn positions(&self) -> usize {
        self.output.iter().product()
    }

    /// Spatial positions of the input.
    pub fn pixels(&self) -> usize {
        self.input.iter().product()
    }

    /// Calls `visit` with every input pixel under the window for result position `position`, in row-major order.
    /// The padding costs nothing, however large the window is.
    #[inline]
    pub fn for_pixels(&self, position: usize, mut visit: impl FnMut(usize)) {
        const RANK_FAST: usize = 8;
        /// One axis: first pixel, distance between pixels, how many, elements between rows.
        #[derive(Clone, Copy, Default)]
        struct Run {
            first: usize,
            step: usize,
            count: usize,
            stride: usize,
        }
        let rank = self.input.len();
        let (mut fast, mut slow) = ([Run::default(); RANK_FAST], Vec::new());
        let runs = if rank <= RANK_FAST {
            &mut fast[..rank]
        } else {
            slow.resize(rank, Run::default());
            &mut slow[..]
        };
        let (mut rest, mut stride) = (position, 1);
        for axis in (0..rank).rev() {
            let (size, step) = (self.input[axis] as i64, self.dilations[axis] as i64);
            let origin = (rest % self.output[axis] * self.strides[axis]) as i64 - self.pads[axis];
            rest /= self.output[axis];
            let skipped = if origin < 0 { (-origin + step - 1) / step } else { 0 };
            let end = if origin < size { (size - origin + step - 1) / step } else { 0 };
            let count = end.min(self.kernel[axis] as i64) - skipped;
            if count <= 0 {
                return;
            }
            let first = (origin + skipped * step) as usize;
            runs[axis] = Run { first, step: step as usize, count: count as usize, stride };
            stride *= self.input[axis];
        }
        let Some((inner, outer)) = runs.split_last() else { return visit(0) };
        let rows: usize = outer.iter().map(|r| r.count).product();
        for row in 0..rows {
            let (mut rest, mut at) = (row, inner.first);
            for run in outer.iter().rev() {
                at += (run.first + rest % run.count * run.step) * run.stride;
                rest /= run.count;
            }
            for k in 0..inner.count {
                visit(at + k * inner.step);
            }
        }
    }

    /// Input pixel under tap `tap` of the window for result position `position`, or `None` in the padding.
    #[inline]
    pub fn pixel(&self, position: usize, tap: usize) -> Option<usize> {
        let (mut position, mut tap, mut pixel, mut step) = (position, tap, 0, 1);
        for axis in (0..self.input.len()).rev() {
            let o = position % self.output[axis];
            position /= self.output[axis];
            let k = tap % self.kernel[axis];
            tap /= self.kernel[axis];
            let i = (o * self.strides[axis] + k * self.dilations[axis]) as i64 - self.pads[axis];
            if i < 0 || i >= self.input[axis] as i64 {
                return None;
            }
            pixel += i as usize * step;
            step *= self.input[axis];
        }
        Some(pixel)
    }

    /// As [`pixel`](Self::pixel), for the transposed convolution: the input pixel whose window puts tap `tap` on
    /// result position `position`.
    #[inline]
    pub fn transposed_pixel(&self, position: usize, tap: usize) -> Option<usize> {
        let (mut position, mut tap, mut pixel, mut step) = (position, tap, 0, 1);
        for axis in (0..self.input.len()).rev() {
            let o = position % self.output[axis];
            position /= self.output[axis];
            let k = tap % self.kernel[axis];
            tap /= self.kernel[axis];
            let at = o as i64 + self.pads[axis] - (k * self.dilations[axis]) as i64;
            let stride = self.strides[axis] as i64;
            if at < 0 || at % stride != 0 || at / stride >= self.input[axis] as i64 {
                return None;
            }
            pixel += (at / stride) as usize * step;
            step *= self.input[axis];
        }
        Some(pixel)
    }
}

/// Everything about a convolution but its data.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvolutionShape {
    /// Samples.
    pub batch: usize,
    /// Independent groups of channels.
    pub groups: usize,
    /// Channels of the input, all groups together.
    pub in_channels: usize,
    /// Channels of the result, all groups together.
    pub out_channels: usize,
    /// The spatial part.
    pub window: Window,
    /// `[batch, spatial…, channels]` rather than `[batch, channels, spatial…]`.
    pub channels_last: bool,
    /// Applied last.
    pub activation: Option<Unary>,
}

impl ConvolutionShape {
    fn input_index(&self, sample: usize, channel: usize, pixel: usize) -> usize {
        let pixels = self.window.pixels();
        if self.channels_last {
            (sample * pixels + pixel) * self.in_channels + channel
        } else {
            (sample * self.in_channels + channel) * pixels + pixel
        }
    }

    fn check(&self, x: &TensorView, w: usize, w_expected: usize, y: &TensorViewMut) -> Result<(), OpError> {
        let fits = self.groups > 0
            && self.in_channels.is_multiple_of(self.groups)
            && self.out_channels.is_multiple_of(self.groups)
            && x.len() == self.batch * self.in_channels * self.window.pixels()
            && y.len() == self.batch * self.out_channels * self.window.positions()
            && w == w_expected
            && x.dtype == y.dtype;
        if fits {
            return Ok(());
        }
        Err(OpError::Invalid(format!(
            "a convolution of {:?} with {w} weights in {} groups does not give {:?}",
            x.dims, self.groups, y.dims
        )))
    }
}

/// Taps up to which the pixels of a window are found once per row of a tile.
const TAPS_KEPT: usize = 64;

struct Plain<'a, S> {
    shape: &'a ConvolutionShape,
    x: &'a [S],
    w: &'a [S],
    transposed: bool,
}

impl<S: Real> Operands<S::C> for Plain<'_, S> {
    fn left(&self, group: usize, row: usize, rows: usize, k: usize, depth: usize, tile: &mut LeftTile<S::C>) {
        let window = &self.shape.window;
        let (positions, taps) = (window.positions(), window.taps());
        let first_channel = group * (self.shape.in_channels / self.shape.groups);
        let channel_step = if self.shape.channels_last { 1 } else { window.pixels() };
        for r in 0..rows {
            let (sample, position) = ((row + r) / positions, (row + r) % positions);
            let find = |tap| {
                if self.transposed {
                    window.transposed_pixel(position, tap)
                } else {
                    window.pixel(position, tap)
                }
            };
            let mut kept = [usize::MAX; TAPS_KEPT];
            let keep = taps <= TAPS_KEPT;
            if keep {
                // Only the taps that this range of k touches.
                let touched = depth.min(taps);
                for i in 0..touched {
                    let tap = (k + i) % taps;
                    kept[tap] =
                        find(tap).map_or(usize::MAX, |p| self.shape.input_index(sample, first_channel, p));
                }
            }
            let (mut channel, mut tap) = (k / taps, k % taps);
            for value in &mut tile[r][..depth] {
                let base = if keep {
                    kept[tap]
                } else {
                    find(tap).map_or(usize::MAX, |p| self.shape.input_index(sample, first_channel, p))
                };
                *value = if base == usize::MAX {
                    <S::C as super::block::Compute>::ZERO
                } else {
                    self.x[base + channel * channel_step].up()
                };
                tap += 1;
                if tap == taps {
                    tap = 0;
                    channel += 1;
                }
            }
        }
    }

    fn right(
        &self,
        group: usize,
        k: usize,
        depth: usize,
        column: usize,
        columns: usize,
        tile: &mut RightTile<S::C>,
    ) {
        let taps = self.shape.window.taps();
        let per_group_in = self.shape.in_channels / self.shape.groups;
        let per_group_out = self.shape.out_channels / self.shape.groups;
        if self.transposed {
            for d in 0..depth {
                let (channel, tap) = ((k + d) / taps, (k + d) % taps);
                let base = (group * per_group_in + channel) * per_group_out * taps + tap;
                for c in 0..columns {
                    tile[d][c] = self.w[base + (column + c) * taps].up();
                }
            }
        } else {
            for c in 0..columns {
                let base = (group * per_group_out + column + c) * per_group_in * taps + k;
                for d in 0..depth {
                    tile[d][c] = self.w[base + d].up();
                }
            }
        }
    }
}

/// What is done to the sums of a convolution before they are stored.
#[derive(Clone, Copy, Debug, Default)]
pub struct ConvolutionEpilogue<'a> {
    /// One factor per channel of the result.
    pub scale: Option<TensorView<'a>>,
    /// One summand per channel of the result.
    pub bias: Option<TensorView<'a>>,
    /// Added; has the shape of the result.
    pub residual: Option<TensorView<'a>>,
}

fn run<S: Real>(
    pool: &ThreadPool,
    shape: &ConvolutionShape,
    operands: &impl Operands<S::C>,
    epilogue: &ConvolutionEpilogue,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let scale = optional::<S>(epilogue.scale, shape.out_channels, y)?;
    let bias = optional::<S>(epilogue.bias, shape.out_channels, y)?;
    let residual = optional::<S>(epilogue.residual, y.len(), y)?;
    let y = y.as_mut_slice::<S>();
    let positions = shape.window.positions();
    let per_group = shape.out_channels / shape.groups;
    let sizes = Sizes {
        batches: shape.groups,
        rows: shape.batch * positions,
        columns: per_group,
        depth: shape.in_channels / shape.groups * shape.window.taps(),
    };
    let result = SharedResult::new(y);
    product::<S::C>(pool, sizes, operands, &|group, row, rows, column, columns, tile| {
        for c in 0..columns {
            let channel = group * per_group + column + c;
            for r in 0..rows {
                let (sample, position) = ((row + r) / positions, (row + r) % positions);
                let index = if shape.channels_last {
                    (sample * positions + position) * shape.out_channels + channel
                } else {
                    (sample * shape.out_channels + channel) * positions + position
                };
                let mut value = tile[r][c];
                if let Some(scale) = scale {
                    value = value * scale[channel].up();
                }
                if let Some(bias) = bias {
                    value += bias[channel].up();
                }
                if let Some(residual) = residual {
                    value += residual[index].up();
                }
                // SAFETY: every (row, channel) belongs to one tile, and a tile to one task.
                unsafe { result.set(index, S::down(value)) };
            }
        }
    });
    Ok(())
}

fn optional<'a, S: Real>(
    x: Option<TensorView<'a>>,
    len: usize,
    y: &TensorViewMut,
) -> Result<Option<&'a [S]>, OpError> {
    match x {
        None => Ok(None),
        Some(x) if x.len() == len && x.dtype == y.dtype => Ok(Some(x.as_slice())),
        Some(x) => Err(OpError::Invalid(format!(
            "what is added to the convolution is {}{:?}, expected {len} elements of {}",
            x.dtype, x.dims, y.dtype
        ))),
    }
}

/// `y = activation(conv(x, w)·scale + bias + residual)`; weights `[out, in/groups, kernel…]`.
///
/// # Errors
/// [`OpError::Invalid`] when sizes do not fit, [`OpError::Unsupported`] for types that are no floats.
pub fn convolution(
    pool: &ThreadPool,
    shape: &ConvolutionShape,
    x: &TensorView,
    w: &TensorView,
    epilogue: &ConvolutionEpilogue,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let expected = shape.out_channels * (shape.in_channels / shape.groups.max(1)) * shape.window.taps();
    shape.check(x, w.len(), expected, y)?;
    with_real!(y.dtype, "Conv", S => {
        let operands = Plain::<S> { shape, x: x.as_slice(), w: w.as_slice(), transposed: false };
        run::<S>(pool, shape, &operands, epilogue, y)?;
    });
    activate_tensor(pool, shape.activation, y)
}

/// Transposed convolution; weights `[in, out/groups, kernel…]`, the window's pads crop the result.
///
/// # Errors
/// As [`convolution`].
pub fn convolution_transposed(
    pool: &ThreadPool,
    shape: &ConvolutionShape,
    x: &TensorView,
    w: &TensorView,
    epilogue: &ConvolutionEpilogue,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    let expected = shape.in_channels * (shape.out_channels / shape.groups.max(1)) * shape.window.taps();
    shape.check(x, w.len(), expected, y)?;
    with_real!(y.dtype, "ConvTranspose", S => {
        let operands = Plain::<S> { shape, x: x.as_slice(), w: w.as_slice(), transposed: true };
        run::<S>(pool, shape, &operands, epilogue, y)?;
    });
    activate_tensor(pool, shape.activation, y)
}

struct Deformed<'a, S> {
    plain: Plain<'a, S>,
    /// `[batch, offset_groups·taps·2, positions]`.
    offset: &'a [S],
    /// `[batch, offset_groups·taps, positions]`.
    mask: Option<&'a [S]>,
    offset_groups: usize,
}

impl<S: Real> Operands<S::C> for Deformed<'_, S> {
    fn left(&self, group: usize, row: usize, rows: usize, k: usize, depth: usize, tile: &mut LeftTile<S::C>) {
        let shape = self.plain.shape;
        let window = &shape.window;
        let (positions, taps) = (window.positions(), window.taps());
        let per_group = shape.in_channels / shape.groups;
        let per_offset_group = shape.in_channels / self.offset_groups;
        let of = <S::C as RealCompute>::of;
        for r in 0..rows {
            let (sample, position) = ((row + r) / positions, (row + r) % positions);
            let (oy, ox) = (position / window.output[1], position % window.output[1]);
            for d in 0..depth {
                let (channel, tap) = (group * per_group + (k + d) / taps, (k + d) % taps);
                let (ky, kx) = (tap / window.kernel[1], tap % window.kernel[1]);
                let place = (sample * self.offset_groups + channel / per_offset_group) * taps + tap;
                let shift = |axis: usize| self.offset[(place * 2 + axis) * positions + position].up();
                let origin = |o: usize, k: usize, axis: usize| {
                    (o * window.strides[axis] + k * window.dilations[axis]) as i64 - window.pads[axis]
                };
                let y = of(origin(oy, ky, 0) as f64) + shift(0);
                let x = of(origin(ox, kx, 1) as f64) + shift(1);
                let (fy, fx) = (y.floor(), x.floor());
                let mut value = of(0.0);
                for (dy, dx) in [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)] {
                    let (py, px) = (fy + of(dy), fx + of(dx));
                    let inside = py >= of(0.0)
                        && px >= of(0.0)
                        && py < of(window.input[0] as f64)
                        && px < of(window.input[1] as f64);
                    if inside {
                        let weight = (of(1.0) - (y - py).abs()) * (of(1.0) - (x - px).abs());
                        let to_index = |v: S::C| super::block::Compute::to_f64(v) as usize;
                        let pixel = to_index(py) * window.input[1] + to_index(px);
                        value += weight * self.plain.x[shape.input_index(sample, channel, pixel)].up();
                    }
                }
                if let Some(mask) = self.mask {
                    value = value * mask[place * positions + position].up();
                }
                tile[r][d] = value;
            }
        }
    }

    fn right(
        &self,
        group: usize,
        k: usize,
        depth: usize,
        column: usize,
        columns: usize,
        tile: &mut RightTile<S::C>,
    ) {
        self.plain.right(group, k, depth, column, columns, tile);
    }
}

/// Deformable convolution of pictures (Dai et al., 2017; with a mask, Zhu et al., 2019).
///
/// # Errors
/// As [`convolution`]; only two spatial dimensions are supported.
pub fn convolution_deformed(
    pool: &ThreadPool,
    shape: &ConvolutionShape,
    offset_groups: usize,
    x: &TensorView,
    w: &TensorView,
    offset: &TensorView,
    bias: Option<&TensorView>,
    mask: Option<&TensorView>,
    y: &mut TensorViewMut,
) -> Result<(), OpError> {
    if shape.window.input.len() != 2 {
        return Err(OpError::Unsupported(format!(
            "deformable convolution of {} spatial dimensions",
            shape.window.input.len()
        )));
    }
    let taps = shape.window.taps();
    let expected = shape.out_channels * (shape.in_channels / shape.groups.max(1)) * taps;
    shape.check(x, w.len(), expected, y)?;
    let offsets = shape.batch * offset_groups * taps * shape.window.positions();
    if offset_groups == 0 || !shape.in_channels.is_multiple_of(offset_groups) || offset.len() != 2 * offsets {
        return Err(OpError::Invalid(format!(
            "offsets of shape {:?} do not fit {offset_groups} groups and {taps} taps",
            offset.dims
        )));
    }
    with_real!(y.dtype, "DeformConv", S => {
        let offset = optional::<S>(Some(*offset), 2 * offsets, y)?.unwrap_or_default();
        let mask = optional::<S>(mask.copied(), offsets, y)?;
        let plain = Plain::<S> { shape, x: x.as_slice(), w: w.as_slice(), transposed: false };
        let operands = Deformed { plain, offset, mask, offset_groups };
        let epilogue = ConvolutionEpilogue { bias: bias.copied(), ..Default::default() };
        run::<S>(pool, shape, &operands, &epilogue, y)?;
    });
    activate_tensor(pool, shape.activation, y)
}

/// Sums columns `[batch, channels·taps, positions]` back into pictures `[batch, channels, spatial…]`. The window's
/// input is the picture and its output the grid of block positions.
///
/// # Errors
/// [`OpError::Invalid`] when sizes do not fit, [`OpError::Unsupported`] for types that are no floats.
pub fn col2im(window: &Window, x: &TensorView, y: &mut TensorViewMut) -> Result<(), OpError> {
    let (taps, positions, pixels) = (window.taps(), window.positions(), window.pixels());
    let planes = y.len() / pixels.max(1);
    if x.len() != planes * taps * positions || x.dtype != y.dtype {
        return Err(OpError::Invalid(format!("Col2Im of {:?} does not give {:?}", x.dims, y.dims)));
    }
    with_real!(y.dtype, "Col2Im", S => {
        let (x, y) = (x.as_slice::<S>(), y.as_mut_slice::<S>());
        y.fill(S::down(RealCompute::of(0.0)));
        for plane in 0..planes {
            for tap in 0..taps {
                for position in 0..positions {
                    if let Some(pixel) = window.pixel(position, tap) {
                        let out = &mut y[plane * pixels + pixel];
                        *out = S::down(out.up() + x[(plane * taps + tap) * positions + position].up());
                    }
                }
            }
        }
    });
    Ok(())
}
