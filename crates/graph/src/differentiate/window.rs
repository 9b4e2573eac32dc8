//! Convolution and pooling.

use super::backward::{Backward, Step};
use super::elementwise::through_activation;
use crate::infer::resolve_transposed;
use crate::{
    ConvAttributes, ConvTransposeAttributes, Layout, Node, Op, Padding, PoolAttributes, PoolKind, Tensor,
    TrainOp, ValueId,
};

pub(super) fn rule(b: &mut Backward<'_>, n: &Node, dy: &[Option<ValueId>]) -> Step {
    let Some(g) = dy.first().copied().flatten() else { return Ok(()) };
    match &n.op {
        Op::Conv(a) => convolution(b, a, None, n, g),
        Op::ConvTranspose(a) => convolution(b, &a.conv, Some(a), n, g),
        Op::Col2Im { dilations, pads, strides } => col2im(b, dilations, pads, strides, n, g),
        Op::Pool(a) => pool(b, a.clone(), n, g),
        Op::GlobalPool { kind, layout } => global_pool(b, *kind, *layout, n, g),
        Op::MaxUnpool { kernel, strides, pads } => max_unpool(b, kernel, strides, pads, n, g),
        _ => b.unsupported("it is no window operator"),
    }
}

fn channel_axis(layout: Layout, rank: usize) -> usize {
    match layout {
        Layout::ChannelsFirst => 1,
        Layout::ChannelsLast => rank - 1,
    }
}

/// Spatial sizes of a picture.
fn spatial(dims: &[usize], layout: Layout) -> Vec<usize> {
    match layout {
        Layout::ChannelsFirst => dims[2..].to_vec(),
        Layout::ChannelsLast => dims[1..dims.len() - 1].to_vec(),
    }
}

/// `g` times a factor per channel.
fn per_channel(b: &mut Backward<'_>, g: ValueId, scale: ValueId, axis: usize) -> Step<ValueId> {
    let rank = b.dims(g)?.len();
    let mut dims = vec![1; rank];
    dims[axis] = b.dims(scale)?[0];
    let scale = b.reshape(scale, &dims)?;
    b.mul(g, scale)
}

/// Both kinds of convolution; their gradients are each other's.
fn convolution(
    b: &mut Backward<'_>,
    a: &ConvAttributes,
    transposed: Option<&ConvTransposeAttributes>,
    n: &Node,
    dy: ValueId,
) -> Step {
    let g = through_activation(b, a.activation, n.out(), dy)?;
    let (x, w) = (b.node_input(n, 0)?, b.node_input(n, 1)?);
    let (x_dims, w_dims, g_dims) = (b.dims(x)?, b.dims(w)?, b.dims(g)?);
    let axis = channel_axis(a.layout, g_dims.len());
    if b.wants(3) {
        b.give(3, g)?;
    }
    if b.wants(2) {
        let db = b.train(TrainOp::ChannelSum { axis }, &[g])?;
        b.give(2, db)?;
    }
    if b.wants(4) {
        let mut plain = n.op.clone();
        match &mut plain {
            Op::Conv(a) => a.activation = None,
            Op::ConvTranspose(a) => a.conv.activation = None,
            _ => {}
        }
        let product = b.emit(plain, &[x, w])?;
        let share = b.mul(product, g)?;
        let ds = b.train(TrainOp::ChannelSum { axis }, &[share])?;
        b.give(4, ds)?;
    }
    if !b.wants(0) && !b.wants(1) {
        return Ok(());
    }
    let g = match n.input(4) {
        Some(scale) => per_channel(b, g, scale, axis)?,
        None => g,
    };
    let mut conv = ConvAttributes { activation: None, kernel: w_dims[2..].to_vec(), ..a.clone() };
    let Some(transposed) = transposed else {
        if b.wants(1) {
            let dw = b.train(TrainOp::ConvWeightGrad { conv: conv.clone(), weight: w_dims }, &[x, g])?;
            b.give(1, dw)?;
        }
        if b.wants(0) {
            let dx = b.train(TrainOp::ConvInputGrad { conv, input: x_dims }, &[g, w])?;
            b.give(0, dx)?;
        }
        return Ok(());
    };
    // The adjoint is the convolution of the large picture that gives the small one.
    let (small, large) = (spatial(&x_dims, a.layout), spatial(&g_dims, a.layout));
    let resolved = match resolve_transposed(&small, &w_dims[2..], transposed) {
        Ok(resolved) => resolved,
        Err(e) => return b.unsupported(e),
    };
    let rank = small.len();
    let or_one = |v: &[usize], i: usize| v.get(i).copied().unwrap_or(1) as i64;
    let mut pads = resolved.pads[..rank].to_vec();
    for i in 0..rank {
        let extent = (w_dims[2 + i] as i64 - 1) * or_one(&a.dilations, i) + 1;
        let reach = (small[i] as i64 - 1) * or_one(&a.strides, i) + extent;
        pads.push(reach - large[i] as i64 - pads[i]);
    }
    conv.padding = Padding::Explicit(pads);
    if b.wants(1) {
        let dw = b.train(TrainOp::ConvWeightGrad { conv: conv.clone(), weight: w_dims }, &[g, x])?;
        b.give(1, dw)?;
    }
    if b.wants(0) {
        let dx = b.emit(Op::Conv(conv), &[g, w])?;
        b.give(0, dx)?;
    }
    Ok(())
}

/// The adjoint reads every block from the picture: a convolution whose weights pick one element each.
fn col2im(
    b: &mut Backward<'_>,
    dilations: &[usize],
    pads: &[usize],
    strides: &[usize],
    n: &Node,
    dy: ValueId,
) -> Step {
    let x = b.node_input(n, 0)?;
    let x_dims = b.dims(x)?;
    let block = b.ints(2, "block_shape")?.unwrap_or_default();
    let block: Vec<usize> = block.iter().map(|&k| k.max(0) as usize).collect();
    let taps: usize = block.iter().product();
    let channels = b.dims(dy)?[1];
    let mut w_dims = vec![channels * taps, 1];
    w_dims.extend(&block);
    let mut weights = vec![0f64; channels * taps * taps];
    for row in 0..channels * taps {
        weights[row * taps + row % taps] = 1.0;
    }
    let weights = b.constant("grad/blocks", Tensor::from_slice(&w_dims, &weights));
    let weights = b.cast_like(weights, dy)?;
    let padding = match pads {
        [] => Padding::Valid,
        pads => Padding::Explicit(pads.iter().map(|&p| p as i64).collect()),
    };
    let conv = ConvAttributes {
        kernel: block,
        strides: strides.to_vec(),
        dilations: dilations.to_vec(),
        padding,
        groups: channels,
        ..ConvAttributes::default()
    };
    let dx = b.emit(Op::Conv(conv), &[dy, weights])?;
    let dx = b.reshape(dx, &x_dims)?;
    b.give(0, dx)
}

fn pool(b: &mut Backward<'_>, pool: PoolAttributes, n: &Node, dy: ValueId) -> Step {
    let x = b.node_input(n, 0)?;
    let input = b.dims(x)?;
    let operands = match pool.kind {
        PoolKind::Average => vec![dy],
        PoolKind::Max | PoolKind::Lp(_) => vec![dy, x, n.out()],
    };
    let dx = b.train(TrainOp::PoolGrad { pool, input }, &operands)?;
    b.give(0, dx)
}

fn global_pool(b: &mut Backward<'_>, kind: PoolKind, layout: Layout, n: &Node, dy: ValueId) -> Step {
    let x = b.node_input(n, 0)?;
    let dims = b.dims(x)?;
    let kernel = spatial(&dims, layout);
    if kind == PoolKind::Average {
        let pixels: usize = kernel.iter().product();
        let share = b.scale(dy, 1.0 / pixels.max(1) as f64)?;
        let dx = b.expand(share, &dims)?;
        return b.give(0, dx);
    }
    let whole = PoolAttributes {
        kind,
        kernel,
        strides: Vec::new(),
        dilations: Vec::new(),
        padding: Padding::Valid,
        ceil_mode: false,
        count_include_pad: false,
        storage_order_column: false,
        layout,
    };
    pool(b, whole, n, dy)
}

/// Every element comes back from where it was put.
fn max_unpool(
    b: &mut Backward<'_>,
    kernel: &[usize],
    strides: &[usize],
    pads: &[usize],
    n: &Node,
    dy: ValueId,
) -> Step {
    let (x, indices) = (b.node_input(n, 0)?, b.node_input(n, 1)?);
    let (x_dims, mut dims) = (b.dims(x)?, b.dims(dy)?);
    // The shape that the indices count in; the result may be larger.
    let rank = kernel.len();
    let mut g = dy;
    for i in 0..rank {
        let stride = strides.get(i).copied().unwrap_or(1);
        let cut = if pads.is_empty() { 0 } else { pads[i] + pads[i + rank] };
        let counted = ((x_dims[2 + i].max(1) - 1) * stride + kernel[i]).saturating_sub(cut);
        if counted < dims[2 + i] {
            g = b.slice(g, 2 + i, 0, counted)?;
            dims[2 + i] = counted;
        } else if counted > dims[2 + i] {
            return b.unsupported("its result is smaller than what its indices count in");
        }
    }
    let flat = b.reshape(g, &[dims.iter().product()])?;
    let dx = b.emit(Op::Gather { axis: 0 }, &[flat, indices])?;
    b.give(0, dx)
}
