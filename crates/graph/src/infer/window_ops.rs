//! Convolution and pooling.

use super::broadcast::shown;
use super::operands::*;
use super::window::{Axis, axes, transposed_dim, window_dim};
use crate::{
    ConvAttributes, ConvTransposeAttributes, DType, Dim, Layout, PoolAttributes, PoolKind,
    RoiAlignAttributes, Shape, ValueType,
};

/// Batch, channels and spatial dimensions of a picture-like shape.
fn take_apart(shape: &[Dim], layout: Layout) -> (Dim, Dim, Shape) {
    let rank = shape.len();
    match layout {
        Layout::ChannelsFirst => (shape[0].clone(), shape[1].clone(), shape[2..].to_vec()),
        Layout::ChannelsLast => (shape[0].clone(), shape[rank - 1].clone(), shape[1..rank - 1].to_vec()),
    }
}

fn put_together(batch: Dim, channels: Dim, spatial: Shape, layout: Layout) -> Shape {
    let mut shape = vec![batch];
    match layout {
        Layout::ChannelsFirst => {
            shape.push(channels);
            shape.extend(spatial);
        }
        Layout::ChannelsLast => {
            shape.extend(spatial);
            shape.push(channels);
        }
    }
    shape
}

/// Kernel sizes from the attributes or the weights, which must agree; unknown ones are `None`.
fn kernel_sizes(attribute: &[usize], w: &Known, spatial_rank: Option<usize>) -> Rule<Vec<Option<usize>>> {
    let from_weights = w.shape.as_ref().map(|s| &s[2..]);
    let rank = match (attribute.len(), from_weights, spatial_rank) {
        (0, Some(s), _) => s.len(),
        (0, None, Some(r)) => r,
        (n, ..) => n,
    };
    if let Some(s) = from_weights
        && s.len() != rank
    {
        return Err(format!("the kernel {attribute:?} has {rank} sizes, but w has shape {}", shown_of(w)));
    }
    (0..rank)
        .map(|i| {
            let weights = from_weights.and_then(|s| s[i].fixed());
            match (attribute.get(i), weights) {
                (Some(a), Some(b)) if *a != b => {
                    Err(format!("the kernel {attribute:?} contradicts w of shape {}", shown_of(w)))
                }
                (a, b) => Ok(a.copied().or(b)),
            }
        })
        .collect()
}

fn shown_of(k: &Known) -> String {
    shown(k.shape.as_deref().unwrap_or_default())
}

/// The result shape of a convolution and the checks that all kinds share.
fn conv_shape(x: &Known, w: &Known, a: &ConvAttributes) -> Rule<Option<Shape>> {
    x.require_ranks(3, usize::MAX)?;
    w.require_ranks(3, usize::MAX)?;
    if let (Some(r), Some(s)) = (x.rank(), w.rank())
        && r != s
    {
        return Err(format!("x has shape {} and w {}, expected the same rank", shown_of(x), shown_of(w)));
    }
    if a.groups == 0 {
        return Err("groups is 0, expected at least 1".to_owned());
    }
    divided(&w.dim(0), a.groups, "the number of output channels")?;
    let rank = x.rank().or(w.rank());
    let Some(rank) = rank else { return Ok(None) };
    let kernel = kernel_sizes(&a.kernel, w, Some(rank - 2))?;
    if kernel.len() != rank - 2 {
        return Err(format!("the kernel {:?} does not fit {} spatial dimensions", a.kernel, rank - 2));
    }
    let Some(shape) = &x.shape else { return Ok(Some(open(rank))) };
    let (batch, channels, spatial) = take_apart(shape, a.layout);
    let per_group = divided(&channels, a.groups, "the number of input channels")?;
    if unify(&per_group, &w.dim(1)).is_none() {
        return Err(format!(
            "x has {channels} channels in {} groups, but w has shape {}: expected {} channels",
            a.groups,
            shown_of(w),
            times(&w.dim(1), a.groups)?
        ));
    }
    let known: Option<Vec<usize>> = kernel.iter().copied().collect();
    let spatial = match known {
        Some(kernel) => axes(&kernel, &a.strides, &a.dilations)
            .and_then(|windows| {
                let one = |(i, window): (usize, Axis)| {
                    window_dim(&spatial[i], window, &a.padding, i, rank - 2, false)
                };
                windows.into_iter().enumerate().map(one).collect()
            })
            .map_err(|e| e.to_string())?,
        None => open(rank - 2),
    };
    Ok(Some(put_together(batch, w.dim(0), spatial, a.layout)))
}

/// A list with one element per channel.
fn require_channels(k: &Known, channels: &Dim) -> Rule<()> {
    k.require_shape(std::slice::from_ref(channels))
}

/// Checks `(…, bias?, residual?, weight_scale?)` of a convolution or its transpose.
fn fused_operands(o: &Operands<'_>, x: &Known, channels: &Dim, shape: Option<&[Dim]>) -> Rule<()> {
    for (i, role) in [(2, "bias"), (4, "weight_scale")] {
        if let Some(k) = o.optional(i, role)? {
            same_dtype(&[x, &k])?;
            require_channels(&k, channels)?;
        }
    }
    if let Some(residual) = o.optional(3, "residual")? {
        same_dtype(&[x, &residual])?;
        if let Some(s) = shape {
            residual.require_shape(s)?;
        }
    }
    Ok(())
}

pub(super) fn conv(o: &Operands<'_>, a: &ConvAttributes) -> Rule<Vec<ValueType>> {
    let (x, w) = (o.tensor(0, "x")?, o.tensor(1, "w")?);
    x.require(Class::Float)?;
    let dtype = same_dtype(&[&x, &w])?;
    let shape = conv_shape(&x, &w, a)?;
    fused_operands(o, &x, &w.dim(0), shape.as_deref())?;
    Ok(vec![typed(dtype, shape)])
}

pub(super) fn conv_integer(o: &Operands<'_>, a: &ConvAttributes) -> Rule<Vec<ValueType>> {
    let (x, w) = (o.tensor(0, "x")?, o.tensor(1, "w")?);
    for (i, role, k) in [(2, "x_zero", &x), (3, "w_zero", &w)] {
        k.require(Class::Byte)?;
        if let Some(zero) = o.optional(i, role)? {
            same_dtype(&[k, &zero])?;
        }
    }
    Ok(vec![typed(Some(DType::I32), conv_shape(&x, &w, a)?)])
}

pub(super) fn qlinear_conv(o: &Operands<'_>, a: &ConvAttributes) -> Rule<Vec<ValueType>> {
    let (x, w, y_zero) = (o.tensor(0, "x")?, o.tensor(3, "w")?, o.tensor(7, "y_zero")?);
    for (k, scale, zero) in [(&x, (1, "x_scale"), (2, "x_zero")), (&w, (4, "w_scale"), (5, "w_zero"))] {
        k.require(Class::Byte)?;
        o.tensor(scale.0, scale.1)?.require(Class::Float)?;
        same_dtype(&[k, &o.tensor(zero.0, zero.1)?])?;
    }
    o.tensor(6, "y_scale")?.require(Class::Float)?;
    if let Some(bias) = o.optional(8, "bias")? {
        if bias.dtype.is_some_and(|d| d != DType::I32) {
            return Err(format!("bias is {}, expected i32", bias.to_type()));
        }
        require_channels(&bias, &w.dim(0))?;
    }
    Ok(vec![typed(y_zero.dtype, conv_shape(&x, &w, a)?)])
}

pub(super) fn conv_transpose(o: &Operands<'_>, a: &ConvTransposeAttributes) -> Rule<Vec<ValueType>> {
    let (x, w) = (o.tensor(0, "x")?, o.tensor(1, "w")?);
    x.require(Class::Float)?;
    let dtype = same_dtype(&[&x, &w])?;
    x.require_ranks(3, usize::MAX)?;
    w.require_ranks(3, usize::MAX)?;
    if let (Some(r), Some(s)) = (x.rank(), w.rank())
        && r != s
    {
        return Err(format!("x has shape {} and w {}, expected the same rank", shown_of(&x), shown_of(&w)));
    }
    let groups = a.conv.groups;
    divided(&w.dim(0), groups, "the number of input channels")?;
    let channels = times(&w.dim(1), groups)?;
    let Some(shape) = &x.shape else {
        fused_operands(o, &x, &channels, None)?;
        return Ok(vec![typed(dtype, w.rank().map(open))]);
    };
    let (batch, in_channels, spatial) = take_apart(shape, a.conv.layout);
    if unify(&in_channels, &w.dim(0)).is_none() {
        return Err(format!("x has {in_channels} channels, but w has shape {}", shown_of(&w)));
    }
    let rank = spatial.len();
    let kernel = kernel_sizes(&a.conv.kernel, &w, Some(rank))?;
    if kernel.len() != rank {
        return Err(format!("the kernel {:?} does not fit {rank} spatial dimensions", a.conv.kernel));
    }
    let known: Option<Vec<usize>> = kernel.iter().copied().collect();
    let spatial = match known {
        Some(kernel) => axes(&kernel, &a.conv.strides, &a.conv.dilations)
            .and_then(|windows| {
                let one = |(i, window): (usize, Axis)| transposed_dim(&spatial[i], window, a, i, rank);
                windows.into_iter().enumerate().map(one).collect()
            })
            .map_err(|e| e.to_string())?,
        None => open(rank),
    };
    let shape = put_together(batch, channels.clone(), spatial, a.conv.layout);
    fused_operands(o, &x, &channels, Some(&shape))?;
    Ok(vec![typed(dtype, Some(shape))])
}

pub(super) fn deform_conv(
    o: &Operands<'_>,
    a: &ConvAttributes,
    offset_groups: usize,
) -> Rule<Vec<ValueType>> {
    let (x, w, offset) = (o.tensor(0, "x")?, o.tensor(1, "w")?, o.tensor(2, "offset")?);
    x.require(Class::Float)?;
    let dtype = same_dtype(&[&x, &w, &offset])?;
    let shape = conv_shape(&x, &w, a)?;
    if let Some(bias) = o.optional(3, "bias")? {
        same_dtype(&[&x, &bias])?;
        require_channels(&bias, &w.dim(0))?;
    }
    if offset_groups == 0 {
        return Err("offset_group is 0, expected at least 1".to_owned());
    }
    if let (Some(y), Some(weights)) = (&shape, &w.shape) {
        let mut taps = Dim::Fixed(offset_groups);
        for d in &weights[2..] {
            taps = match d {
                Dim::Fixed(n) => times(&taps, *n)?,
                _ => Dim::UNKNOWN,
            };
        }
        let expected = |per_tap: usize| -> Rule<Shape> {
            let mut s = vec![y[0].clone(), times(&taps, per_tap)?];
            s.extend_from_slice(&y[2..]);
            Ok(s)
        };
        offset.require_shape(&expected(y.len() - 2)?)?;
        if let Some(mask) = o.optional(4, "mask")? {
            mask.require_shape(&expected(1)?)?;
        }
    }
    Ok(vec![typed(dtype, shape)])
}

pub(super) fn col2im(
    o: &Operands<'_>,
    dilations: &[usize],
    pads: &[usize],
    strides: &[usize],
) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require_rank(3)?;
    let image = o.ints(1, "image_shape")?;
    let block = o.ints(2, "block_shape")?;
    let sizes = |v: Vec<i64>, what| v.iter().map(|&n| size_of(n, what)).collect::<Rule<Vec<usize>>>();
    let image = image.map(|v| sizes(v, "an image size")).transpose()?;
    let block = block.map(|v| sizes(v, "a block size")).transpose()?;
    let rank = image.as_ref().or(block.as_ref()).map(Vec::len).or(o.length(1)).or(o.length(2));
    let Some(rank) = rank.filter(|&r| r <= RANK_MAX) else { return Ok(vec![typed(x.dtype, None)]) };
    if o.length(1).is_some_and(|n| n != rank) || o.length(2).is_some_and(|n| n != rank) {
        return Err("image_shape and block_shape differ in length".to_owned());
    }
    let mut channels = Dim::UNKNOWN;
    if let Some(block) = &block {
        let taps = block.iter().try_fold(1usize, |n, &b| n.checked_mul(b));
        let taps = taps.ok_or("the block is too large")?;
        channels = divided(&x.dim(1), taps, "the middle size of x")?;
        if let Some(image) = &image {
            let padding =
                crate::Padding::Explicit(pads.iter().map(|&p| p.min(i64::MAX as usize) as i64).collect());
            let w = super::window::resolve_window(image, block, strides, dilations, &padding, false)
                .map_err(|e| e.to_string())?;
            let columns = w.output.iter().try_fold(1usize, |n, &b| n.checked_mul(b));
            if let (Some(n), Dim::Fixed(m)) = (columns, x.dim(2))
                && n != m
            {
                return Err(format!("x has {m} columns, but {n} blocks fit the image {image:?}"));
            }
        }
    }
    let mut shape = vec![x.dim(0), channels];
    match image {
        Some(image) => shape.extend(image.into_iter().map(Dim::Fixed)),
        None => shape.extend(open(rank)),
    }
    Ok(vec![typed(x.dtype, Some(shape))])
}

pub(super) fn pool(o: &Operands<'_>, a: &PoolAttributes) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require(if a.kind == PoolKind::Max { Class::Numeric } else { Class::Float })?;
    let shape = pool_shape(&x, a)?;
    let mut types = vec![typed(x.dtype, Some(shape.clone()))];
    if a.kind == PoolKind::Max {
        types.push(typed(Some(DType::I64), Some(shape)));
    }
    Ok(types)
}

pub(super) fn qlinear_pool(o: &Operands<'_>, a: &PoolAttributes) -> Rule<Vec<ValueType>> {
    let x = super::quantize::qlinear_operand(o, 0)?;
    let y_zero = super::quantize::qlinear_result(o, 3)?;
    Ok(vec![typed(y_zero, Some(pool_shape(&x, a)?))])
}

fn pool_shape(x: &Known, a: &PoolAttributes) -> Rule<Shape> {
    x.require_rank(a.kernel.len() + 2)?;
    let rank = a.kernel.len();
    let windows = axes(&a.kernel, &a.strides, &a.dilations).map_err(|e| e.to_string())?;
    let shape = match &x.shape {
        None => open(rank + 2),
        Some(s) => {
            let (batch, channels, spatial) = take_apart(s, a.layout);
            let one = |(i, window): (usize, Axis)| {
                window_dim(&spatial[i], window, &a.padding, i, rank, a.ceil_mode)
            };
            let spatial = windows.into_iter().enumerate().map(one).collect::<Result<Shape, _>>();
            put_together(batch, channels, spatial.map_err(|e| e.to_string())?, a.layout)
        }
    };
    Ok(shape)
}

pub(super) fn global_pool(o: &Operands<'_>, layout: Layout) -> Rule<Vec<ValueType>> {
    let x = o.tensor(0, "x")?;
    x.require(Class::Numeric)?;
    x.require_ranks(2, usize::MAX)?;
    let shape = x.shape.map(|s| {
        let (batch, channels, spatial) = take_apart(&s, layout);
        put_together(batch, channels, vec![Dim::Fixed(1); spatial.len()], layout)
    });
    Ok(vec![typed(x.dtype, shape)])
}

pub(super) fn max_unpool(
    o: &Operands<'_>,
    kernel: &[usize],
    strides: &[usize],
    pads: &[usize],
) -> Rule<Vec<ValueType>> {
    let (x, indices) = (o.tensor(0, "x")?, o.tensor(1, "indices")?);
    indices.require(Class::Integer)?;
    x.require_rank(kernel.len() + 2)?;
    if let Some(s) = &x.shape {
        indices.require_shape(s)?;
    }
    let rank = kernel.len() + 2;
    if o.has(2) {
        let shape = match o.ints(2, "output_shape")? {
            Some(v) if v.len() != rank => {
                return Err(format!("output_shape has {} sizes, expected {rank}", v.len()));
            }
            Some(v) => {
                v.iter().map(|&n| size_of(n, "an output size").map(Dim::Fixed)).collect::<Rule<Shape>>()?
            }
            None => open(rank),
        };
        return Ok(vec![typed(x.dtype, Some(shape))]);
    }
    let windows = axes(kernel, strides, &[]).map_err(|e| e.to_string())?;
    let padding = crate::Padding::Explicit(pads.iter().map(|&p| p.min(i64::MAX as usize) as i64).collect());
    let attributes = ConvTransposeAttributes {
        conv: ConvAttributes { padding, ..ConvAttributes::default() },
        output_padding: Vec::new(),
        output_shape: Vec::new(),
    };
    let mut shape = vec![x.dim(0), x.dim(1)];
    for (i, window) in windows.into_iter().enumerate() {
        let dim = transposed_dim(&x.dim(i + 2), window, &attributes, i, kernel.len());
        shape.push(dim.map_err(|e| e.to_string())?);
    }
    Ok(vec![typed(x.dtype, Some(shape))])
}

pub(super) fn max_roi_pool(o: &Operands<'_>, pooled: [usize; 2]) -> Rule<Vec<ValueType>> {
    let (x, rois) = (o.tensor(0, "x")?, o.tensor(1, "rois")?);
    let dtype = same_dtype(&[&x, &rois])?;
    x.require(Class::Float)?;
    x.require_rank(4)?;
    rois.require_shape(&[Dim::UNKNOWN, Dim::Fixed(5)])?;
    let shape = vec![rois.dim(0), x.dim(1), Dim::Fixed(pooled[0]), Dim::Fixed(pooled[1])];
    Ok(vec![typed(dtype, Some(shape))])
}

pub(super) fn roi_align(o: &Operands<'_>, a: &RoiAlignAttributes) -> Rule<Vec<ValueType>> {
    let (x, rois, batch) = (o.tensor(0, "x")?, o.tensor(1, "rois")?, o.tensor(2, "batch_indices")?);
    let dtype = same_dtype(&[&x, &rois])?;
    x.require(Class::Float)?;
    x.require_rank(4)?;
    rois.require_shape(&[Dim::UNKNOWN, Dim::Fixed(4)])?;
    batch.require(Class::Integer)?;
    batch.require_shape(&[rois.dim(0)])?;
    let count = unify(&rois.dim(0), &batch.dim(0)).unwrap_or(Dim::UNKNOWN);
    let shape = vec![count, x.dim(1), Dim::Fixed(a.output_height), Dim::Fixed(a.output_width)];
    Ok(vec![typed(dtype, Some(shape))])
}
