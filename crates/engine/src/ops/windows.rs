use lightering_graph::infer::{ResolvedWindow, resolve_transposed, resolve_window};
use lightering_graph::{ConvAttributes, Layout, Op, Padding, PoolAttributes, PoolKind};
use lightering_kernels::ops::{
    self, ConvolutionEpilogue, ConvolutionShape, Pooling, PoolingShape, RoiAlignShape, Window,
};

use super::elementwise::unary;
use super::operands::{optional, required};
use super::{OpContext, OpError, TensorView, TensorViewMut};

fn invalid(problem: impl std::fmt::Display) -> OpError {
    OpError::Invalid(problem.to_string())
}

/// Batch, channels and spatial sizes of a picture-like shape.
pub(crate) fn picture(dims: &[usize], layout: Layout) -> Result<(usize, usize, Vec<usize>), OpError> {
    match (dims, layout) {
        ([batch, channels, spatial @ ..], Layout::ChannelsFirst) => Ok((*batch, *channels, spatial.to_vec())),
        ([batch, spatial @ .., channels], Layout::ChannelsLast) => Ok((*batch, *channels, spatial.to_vec())),
        _ => Err(invalid(format!("expected batch, channels and spatial dimensions, found {dims:?}"))),
    }
}

fn or_ones(values: &[usize], rank: usize) -> Vec<usize> {
    if values.is_empty() { vec![1; rank] } else { values.to_vec() }
}

fn window(
    input: Vec<usize>,
    kernel: &[usize],
    strides: &[usize],
    dilations: &[usize],
    resolved: ResolvedWindow,
) -> Window {
    let rank = input.len();
    Window {
        input,
        kernel: kernel.to_vec(),
        strides: or_ones(strides, rank),
        dilations: or_ones(dilations, rank),
        pads: resolved.pads[..rank].to_vec(),
        output: resolved.output,
    }
}

fn shape(
    a: &ConvAttributes,
    x: &TensorView,
    out_channels: usize,
    window: Window,
) -> Result<ConvolutionShape, OpError> {
    let (batch, in_channels, _) = picture(x.dims, a.layout)?;
    Ok(ConvolutionShape {
        batch,
        groups: a.groups,
        in_channels,
        out_channels,
        window,
        channels_last: a.layout == Layout::ChannelsLast,
        activation: a.activation.map(unary),
    })
}

pub(super) fn convolution_shape(
    a: &ConvAttributes,
    x: &TensorView,
    w: &TensorView,
) -> Result<ConvolutionShape, OpError> {
    let (_, _, spatial) = picture(x.dims, a.layout)?;
    let [out_channels, _, kernel @ ..] = w.dims else {
        return Err(invalid(format!("weights of shape {:?}", w.dims)));
    };
    let resolved =
        resolve_window(&spatial, kernel, &a.strides, &a.dilations, &a.padding, false).map_err(invalid)?;
    shape(a, x, *out_channels, window(spatial, kernel, &a.strides, &a.dilations, resolved))
}

pub(super) fn pooling_shape(a: &PoolAttributes, x: &TensorView) -> Result<PoolingShape, OpError> {
    let (batch, channels, spatial) = picture(x.dims, a.layout)?;
    let rank = spatial.len();
    let resolved = resolve_window(&spatial, &a.kernel, &a.strides, &a.dilations, &a.padding, a.ceil_mode)
        .map_err(invalid)?;
    Ok(PoolingShape {
        kind: pooling_kind(a.kind),
        batch,
        channels,
        pads_end: resolved.pads[rank..].to_vec(),
        window: window(spatial, &a.kernel, &a.strides, &a.dilations, resolved),
        count_include_pad: a.count_include_pad,
        column_major: a.storage_order_column,
        channels_last: a.layout == Layout::ChannelsLast,
    })
}

fn pooling_kind(kind: PoolKind) -> Pooling {
    match kind {
        PoolKind::Max => Pooling::Max,
        PoolKind::Average => Pooling::Average,
        PoolKind::Lp(p) => Pooling::Lp(p),
    }
}

/// Computes convolutions, pooling and regions of interest.
pub(super) fn compute(
    op: &Op,
    inputs: &[Option<TensorView>],
    outputs: &mut [Option<TensorViewMut>],
    context: &OpContext,
) -> Result<(), OpError> {
    let pool = context.threads;
    let x = required(inputs, 0, "x")?;
    let (first, rest) = outputs.split_at_mut(1);
    let Some(y) = first[0].as_mut() else {
        return Err(OpError::Unsupported("leaving out the first result of a window operator".to_owned()));
    };
    let epilogue = ConvolutionEpilogue {
        bias: optional(inputs, 2),
        residual: optional(inputs, 3),
        scale: optional(inputs, 4),
    };
    match op {
        Op::Conv(a) => {
            let w = required(inputs, 1, "w")?;
            ops::convolution(pool, &convolution_shape(a, &x, &w)?, &x, &w, &epilogue, y)
        }
        Op::ConvTranspose(a) => {
            let w = required(inputs, 1, "w")?;
            let (_, _, spatial) = picture(x.dims, a.conv.layout)?;
            let [_, per_group, kernel @ ..] = w.dims else {
                return Err(invalid(format!("weights of shape {:?}", w.dims)));
            };
            let resolved = resolve_transposed(&spatial, kernel, a).map_err(invalid)?;
            let window = window(spatial, kernel, &a.conv.strides, &a.conv.dilations, resolved);
            let shape = shape(&a.conv, &x, per_group * a.conv.groups, window)?;
            ops::convolution_transposed(pool, &shape, &x, &w, &epilogue, y)
        }
        Op::DeformConv { conv, offset_groups } => {
            let (w, offset) = (required(inputs, 1, "w")?, required(inputs, 2, "offset")?);
            let shape = convolution_shape(conv, &x, &w)?;
            let (bias, mask) = (optional(inputs, 3), optional(inputs, 4));
            let (bias, mask) = (bias.as_ref(), mask.as_ref());
            ops::convolution_deformed(pool, &shape, *offset_groups, &x, &w, &offset, bias, mask, y)
        }
        Op::Col2Im { dilations, pads, strides } => {
            let image = integers(inputs, 1, "image_shape")?;
            let block = integers(inputs, 2, "block_shape")?;
            let pads: Vec<i64> = pads.iter().map(|&p| p as i64).collect();
            let padding = if pads.is_empty() { Padding::Valid } else { Padding::Explicit(pads) };
            let resolved =
                resolve_window(&image, &block, strides, dilations, &padding, false).map_err(invalid)?;
            ops::col2im(&window(image, &block, strides, dilations, resolved), &x, y)
        }
        Op::Pool(a) => {
            let shape = pooling_shape(a, &x)?;
            let indices = rest.first_mut().and_then(Option::as_mut).map(|i| i.as_mut_slice::<i64>());
            ops::pooling(pool, &shape, &x, y, indices)
        }
        Op::GlobalPool { kind, layout } => {
            let (batch, channels, spatial) = picture(x.dims, *layout)?;
            let rank = spatial.len();
            let window = Window {
                kernel: spatial.clone(),
                input: spatial,
                output: vec![1; rank],
                strides: vec![1; rank],
                dilations: vec![1; rank],
                pads: vec![0; rank],
            };
            let shape = PoolingShape {
                kind: pooling_kind(*kind),
                batch,
                channels,
                pads_end: vec![0; rank],
                window,
                count_include_pad: false,
                column_major: false,
                channels_last: *layout == Layout::ChannelsLast,
            };
            ops::pooling(pool, &shape, &x, y, None)
        }
        Op::MaxUnpool { kernel, strides, pads } => {
            let (batch, channels, spatial) = picture(x.dims, Layout::ChannelsFirst)?;
            let rank = spatial.len();
            let strides = or_ones(strides, rank);
            if kernel.len() != rank || strides.len() != rank || (!pads.is_empty() && pads.len() != 2 * rank) {
                return Err(invalid("kernel, strides and pads do not fit the spatial dimensions"));
            }
            let mut inferred = vec![batch, channels];
            for axis in 0..rank {
                let pads = if pads.is_empty() { 0 } else { pads[axis].saturating_add(pads[axis + rank]) };
                let size = (spatial[axis].max(1) - 1).checked_mul(strides[axis]);
                let size = size.and_then(|s| s.checked_add(kernel[axis])).and_then(|s| s.checked_sub(pads));
                inferred.push(size.ok_or_else(|| invalid("strides, kernel and pads give no size"))?);
            }
            ops::max_unpool(&x, &required(inputs, 1, "indices")?, &inferred, y)
        }
        Op::MaxRoiPool { spatial_scale, .. } => {
            ops::max_roi_pool(*spatial_scale, &x, &required(inputs, 1, "rois")?, y)
        }
        Op::RoiAlign(a) => {
            let shape = RoiAlignShape {
                max: a.max,
                sampling_ratio: a.sampling_ratio,
                spatial_scale: a.spatial_scale,
                half_pixel: a.half_pixel,
            };
            let samples = required(inputs, 2, "batch_indices")?;
            let samples = ops::block::to_vec::<i64>(&samples);
            ops::roi_align(pool, shape, &x, &required(inputs, 1, "rois")?, &samples, y)
        }
        other => Err(super::no_kernel(other)),
    }
}

/// Operand `index` as sizes.
fn integers(inputs: &[Option<TensorView>], index: usize, name: &str) -> Result<Vec<usize>, OpError> {
    let x = required(inputs, index, name)?;
    ops::block::to_vec::<i64>(&x)
        .into_iter()
        .map(|v| usize::try_from(v).map_err(|_| invalid(format!("{name} holds {v}, expected a size"))))
        .collect()
}
