use super::Editor;
use crate::{Layout, NodeId, Op, PadMode, Padding, PoolAttributes, PoolKind, ReduceOp, TensorType, ValueId};

/// Window, strides, dilations and padding of an operator, to be changed.
struct Window<'a> {
    kernel: &'a mut Vec<usize>,
    strides: &'a mut Vec<usize>,
    dilations: &'a mut Vec<usize>,
    padding: &'a mut Padding,
    layout: Layout,
}

fn window(op: &mut Op) -> Option<Window<'_>> {
    match op {
        Op::Conv(a) | Op::QLinearConv(a) | Op::ConvInteger(a) => Some(Window {
            kernel: &mut a.kernel,
            strides: &mut a.strides,
            dilations: &mut a.dilations,
            padding: &mut a.padding,
            layout: a.layout,
        }),
        Op::Pool(a) => Some(Window {
            kernel: &mut a.kernel,
            strides: &mut a.strides,
            dilations: &mut a.dilations,
            padding: &mut a.padding,
            layout: a.layout,
        }),
        _ => None,
    }
}

/// Spatial sizes of a tensor.
pub fn spatial(dims: &[usize], layout: Layout) -> &[usize] {
    match layout {
        Layout::ChannelsFirst => dims.get(2..).unwrap_or_default(),
        Layout::ChannelsLast => dims.get(1..dims.len().saturating_sub(1)).unwrap_or_default(),
    }
}

/// Writes out what a window operator leaves to defaults.
pub fn explicit(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let mut op = node.op.clone();
    let w_at = if matches!(op, Op::QLinearConv(_)) { 3 } else { 1 };
    let is_pool = matches!(op, Op::Pool(_));
    let Some(w) = window(&mut op) else { return false };
    let Some(x) = node.input(0).and_then(|x| e.dims(x)) else { return false };
    let sizes = spatial(&x, w.layout);
    let n = sizes.len();
    if w.kernel.is_empty() && !is_pool {
        let Some(dims) = node.input(w_at).and_then(|v| e.dims(v)) else { return false };
        *w.kernel = dims.get(2..).unwrap_or_default().to_vec();
    }
    for list in [&mut *w.strides, &mut *w.dilations] {
        if list.is_empty() {
            *list = vec![1; n];
        }
    }
    if w.kernel.len() != n || w.strides.len() != n || w.dilations.len() != n || w.strides.contains(&0) {
        return false;
    }
    let same = |upper: bool| {
        let mut pads = vec![0i64; 2 * n];
        for i in 0..n {
            let out = sizes[i].div_ceil(w.strides[i]);
            let span = (w.kernel[i].max(1) - 1) * w.dilations[i] + 1;
            let total = (out.max(1) - 1) * w.strides[i] + span;
            let total = total.saturating_sub(sizes[i]) as i64;
            let (small, large) = (total / 2, total - total / 2);
            (pads[i], pads[n + i]) = if upper { (small, large) } else { (large, small) };
        }
        Padding::Explicit(pads)
    };
    match w.padding {
        Padding::Explicit(p) if p.is_empty() => *p = vec![0; 2 * n],
        Padding::Explicit(_) => {}
        Padding::Valid => *w.padding = Padding::Explicit(vec![0; 2 * n]),
        Padding::SameUpper => *w.padding = same(true),
        Padding::SameLower => *w.padding = same(false),
    }
    if op == e.node(id).op {
        return false;
    }
    let inputs = e.node(id).inputs.clone();
    e.set(id, op, inputs);
    true
}

/// A `Pad` that the following window operator can do itself.
pub fn padded(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let Some(x) = node.input(0) else { return false };
    let Some(pad) = e.maker(x) else { return false };
    let (Op::Pad { mode: PadMode::Constant }, Some(source), Some(pads)) =
        (&pad.op, pad.input(0), pad.input(1))
    else {
        return false;
    };
    let (Some(dims), Some(pads)) = (e.dims(x), e.ints(pads)) else { return false };
    let Some(axes) = e.optional_ints(pad.input(3)) else { return false };
    let rank = dims.len();
    let fill = match pad.input(2) {
        None => Some(0.0),
        Some(v) => e.scalar(v),
    };
    let Some(fill) = fill else { return false };
    let axes = axes.unwrap_or_else(|| (0..rank as i64).collect());
    if pads.len() != 2 * axes.len() {
        return false;
    }
    let mut all = vec![0i64; 2 * rank];
    for (i, &a) in axes.iter().enumerate() {
        let Some(a) = super::super::editor::axis_index(a, rank) else { return false };
        (all[a], all[rank + a]) = (pads[i], pads[axes.len() + i]);
    }
    if all.iter().any(|&p| p < 0) {
        return false;
    }
    let mut op = node.op.clone();
    let layout = match window(&mut op) {
        Some(w) => w.layout,
        None => return false,
    };
    let is_spatial = |a: usize| match layout {
        Layout::ChannelsFirst => a >= 2,
        Layout::ChannelsLast => a >= 1 && a + 1 < rank,
    };
    if (0..rank).any(|a| !is_spatial(a) && (all[a] != 0 || all[rank + a] != 0)) {
        return false;
    }
    let spatial_axes: Vec<usize> = (0..rank).filter(|&a| is_spatial(a)).collect();
    let n = spatial_axes.len();
    let fits = match &mut op {
        Op::Conv(_) => fill == 0.0,
        Op::Pool(PoolAttributes { kind: PoolKind::Max, kernel, dilations, storage_order_column, .. }) => {
            // Every window must touch the picture, or the fill itself would be a result.
            let whole = spatial_axes.iter().enumerate().all(|(i, &a)| {
                let dilation = dilations.get(i).copied().unwrap_or(1);
                kernel.get(i).is_some_and(|&k| dilation == 1 && all[a] < k as i64 && all[rank + a] < k as i64)
            });
            let alone = node.outputs.iter().flatten().count() == 1 && !*storage_order_column;
            whole && alone && fill <= f32::MIN
        }
        Op::Pool(PoolAttributes {
            kind: PoolKind::Average, count_include_pad, ceil_mode, padding, ..
        }) => {
            let unpadded = matches!(padding, Padding::Explicit(p) if p.iter().all(|&p| p == 0));
            let fits = fill == 0.0 && !*ceil_mode && (unpadded || *count_include_pad);
            *count_include_pad = true;
            fits
        }
        _ => false,
    };
    let Some(w) = window(&mut op) else { return false };
    let Padding::Explicit(own) = w.padding else { return false };
    if !fits || own.len() != 2 * n {
        return false;
    }
    for (i, &a) in spatial_axes.iter().enumerate() {
        own[i] += all[a];
        own[n + i] += all[rank + a];
    }
    let mut inputs = e.node(id).inputs.clone();
    inputs[0] = Some(source);
    e.set(id, op, inputs);
    true
}

/// A pooling window that is the whole picture.
pub fn whole_picture(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let Op::Pool(a) = &node.op else { return false };
    let Some(dims) = node.input(0).and_then(|x| e.dims(x)) else { return false };
    let Some(out) = node.output(0).and_then(|x| e.dims(x)) else { return false };
    let sizes = spatial(&dims, a.layout);
    let whole = a.kernel == sizes
        && !sizes.is_empty()
        && spatial(&out, a.layout).iter().all(|&d| d == 1)
        && matches!(&a.padding, Padding::Explicit(p) if p.iter().all(|&p| p == 0))
        && a.dilations.iter().all(|&d| d == 1)
        && node.outputs.iter().flatten().count() == 1
        && node.input(0).is_some_and(|x| e.is_f32(x))
        && matches!(a.kind, PoolKind::Average | PoolKind::Max);
    if !whole {
        return false;
    }
    let op = Op::GlobalPool { kind: a.kind, layout: a.layout };
    let inputs = node.inputs.clone();
    e.set(id, op, inputs);
    true
}

/// The axes of a reduction, sorted.
pub fn reduced_axes(e: &Editor, id: NodeId) -> Option<Vec<usize>> {
    let node = e.node(id);
    let rank = e.dims(node.input(0)?)?.len();
    let axes = e.optional_ints(node.input(1))?.unwrap_or_default();
    if axes.is_empty() {
        return match node.op {
            Op::Reduce { noop_with_empty_axes: true, .. } => None,
            _ => Some((0..rank).collect()),
        };
    }
    let mut axes: Vec<usize> =
        axes.iter().map(|&a| super::super::editor::axis_index(a, rank)).collect::<Option<_>>()?;
    axes.sort_unstable();
    Some(axes)
}

/// The mean (or maximum) over the picture is a global pool.
pub fn spatial_mean(e: &mut Editor, id: NodeId) -> bool {
    let node = e.node(id);
    let (Op::Reduce { op, .. }, Some(x)) = (&node.op, node.input(0)) else { return false };
    let kind = match op {
        ReduceOp::Mean => PoolKind::Average,
        ReduceOp::Max => PoolKind::Max,
        _ => return false,
    };
    let (Some(dims), Some(axes)) = (e.dims(x), reduced_axes(e, id)) else { return false };
    if dims.len() != 4 || axes != [2, 3] || !e.is_f32(x) || dims.contains(&0) {
        return false;
    }
    // Only where pictures are: attention scores are averaged as matrices.
    let from_picture = e.maker(x).is_some_and(|n| feeds_picture(e, n, 8));
    if !from_picture {
        return false;
    }
    let pooled = [dims[0], dims[1], 1, 1];
    let op = Op::GlobalPool { kind, layout: Layout::ChannelsFirst };
    let out = e.node(id).out();
    let Some(out_dims) = e.dims(out) else { return false };
    if out_dims == pooled {
        e.set_all(id, op, &[x]);
        return true;
    }
    let name = e.node(id).name.clone();
    let ty = TensorType::fixed(crate::DType::F32, &pooled);
    let y = e.insert(id, &format!("{name}.pool"), op, &[x], ty);
    let shape = e.add_dims(&format!("{name}.shape"), &out_dims);
    e.set_all(id, Op::Reshape { allow_zero: true }, &[y, shape]);
    true
}

/// Whether a convolution or pool is a few element-wise steps before.
fn feeds_picture(e: &Editor, node: &crate::Node, depth: usize) -> bool {
    match &node.op {
        Op::Conv(_) | Op::QLinearConv(_) | Op::ConvTranspose(_) | Op::Pool(_) | Op::BatchNorm { .. } => true,
        Op::Unary(_) | Op::Binary(_) | Op::Clip | Op::Concat { .. } | Op::Elementwise(_) if depth > 0 => node
            .inputs
            .iter()
            .flatten()
            .filter_map(|&v: &ValueId| e.maker(v))
            .any(|n| feeds_picture(e, n, depth - 1)),
        _ => false,
    }
}
