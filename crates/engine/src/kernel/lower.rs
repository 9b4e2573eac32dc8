//! The choice of kernels: from a node whose types are known to the fastest kernel that computes it.

use std::collections::HashSet;
use std::sync::Arc;

use lightering_graph::infer::window::resolve_window;
use lightering_graph::{
    ConvAttributes, Graph, Layout, MatMulAttributes, Node, NodeId, Op, PoolAttributes, ValueId,
};
use lightering_kernels::{ConvShape, PoolShape, conv_scratch_len};
use lightering_units::DType;

use super::packing::{Packing, Scale};
use super::{Kernel, activation_of};

/// The choice for one node.
pub(crate) struct Lowered {
    pub kernel: Kernel,
    /// Operands that are weights packed in a special way.
    pub packings: Vec<(usize, Packing)>,
    /// Operands that the kernel holds already (constants turned into parameters).
    pub absorbed: Vec<usize>,
    /// Operands read in place of the node's own.
    pub replaced: Vec<(usize, ValueId)>,
    pub workspace: usize,
}

impl Lowered {
    pub fn generic(kernel: Kernel) -> Lowered {
        Lowered { kernel, packings: Vec::new(), absorbed: Vec::new(), replaced: Vec::new(), workspace: 0 }
    }
}

fn dims_of(graph: &Graph, value: ValueId, dtype: DType) -> Option<Vec<usize>> {
    let t = graph.value(value).ty.tensor()?;
    (t.dtype == dtype).then(|| t.dims())?
}

fn f32_dims(graph: &Graph, node: &Node, operand: usize) -> Option<Vec<usize>> {
    dims_of(graph, node.input(operand)?, DType::F32)
}

fn is_constant(graph: &Graph, node: &Node, operand: usize) -> bool {
    node.input(operand).is_some_and(|v| graph.value(v).constant().is_some())
}

/// Values of a small f32 constant; `Some(None)` when the operand is absent.
fn optional_scale(
    graph: &Graph,
    node: &Node,
    operand: usize,
    factor: f32,
    n: usize,
) -> Option<Option<Scale>> {
    match node.input(operand) {
        None if factor == 1.0 => Some(None),
        None => Some(Some(Scale(vec![factor; n].into()))),
        Some(v) => {
            let t = graph.value(v).tensor()?;
            let same = t.dtype() == DType::F32 && t.len() == n;
            same.then(|| Some(Scale(t.as_slice::<f32>().iter().map(|x| x * factor).collect::<Arc<[f32]>>())))
        }
    }
}

/// From planes to channels last.
const TO_CHANNELS_LAST: [usize; 4] = [0, 2, 3, 1];

/// Transpositions to channels last that only feed convolutions which can read planes themselves.
pub(crate) fn absorbed_transposes(graph: &Graph) -> HashSet<NodeId> {
    let consumers = graph.consumers();
    graph
        .iter_nodes()
        .filter(|(_, node)| {
            let Op::Transpose { perm: Some(perm) } = &node.op else { return false };
            let result = node.out();
            *perm == TO_CHANNELS_LAST
                && !graph.outputs.contains(&result)
                && !consumers[result.index()].is_empty()
                && consumers[result.index()].iter().all(|&c| reads_planes(graph, graph.node(c), result))
        })
        .map(|(id, _)| id)
        .collect()
}

fn reads_planes(graph: &Graph, node: &Node, operand: ValueId) -> bool {
    let Op::Conv(a) = &node.op else { return false };
    let few_channels = f32_dims(graph, node, 0).is_some_and(|d| d.len() == 4 && d[3] < 8) && a.groups == 1;
    let others = node.inputs.iter().skip(1).flatten().all(|&v| v != operand);
    node.input(0) == Some(operand)
        && others
        && few_channels
        && conv_shape(graph, node, a).is_some_and(|s| s.dilation[1] == 1)
}

/// The shape of a channels-last convolution with constant f32 weights; `None` when it is none.
fn conv_shape(graph: &Graph, node: &Node, a: &ConvAttributes) -> Option<ConvShape> {
    let (x, w) = (f32_dims(graph, node, 0)?, f32_dims(graph, node, 1)?);
    let y = dims_of(graph, node.output(0)?, DType::F32)?;
    if a.layout != Layout::ChannelsLast || x.len() != 4 || w.len() != 4 || !is_constant(graph, node, 1) {
        return None;
    }
    let kernel = [w[2], w[3]];
    let pair = |v: &[usize]| -> [usize; 2] { if v.len() == 2 { [v[0], v[1]] } else { [1, 1] } };
    let (stride, dilation) = (pair(&a.strides), pair(&a.dilations));
    let window = resolve_window(&x[1..3], &kernel, &stride, &dilation, &a.padding, false).ok()?;
    let pads: Vec<usize> = window.pads.iter().map(|&p| usize::try_from(p).ok()).collect::<Option<_>>()?;
    Some(ConvShape {
        in_h: x[1],
        in_w: x[2],
        in_c: x[3],
        out_h: y[1],
        out_w: y[2],
        out_c: y[3],
        kernel,
        stride,
        dilation,
        pads: [pads[0], pads[1], pads[2], pads[3]],
        groups: a.groups,
    })
}

/// Chooses the kernel for a node whose types are all known.
pub(crate) fn lower(graph: &Graph, node: &Node, threads: usize, absorbed: &HashSet<NodeId>) -> Lowered {
    let special = match &node.op {
        Op::Conv(a) => lower_conv(graph, node, a, threads, absorbed),
        Op::MatMul(a) => lower_matmul(graph, node, a),
        Op::Pool(a) => lower_pool(graph, node, a),
        Op::GlobalPool { kind: lightering_graph::PoolKind::Average, layout: Layout::ChannelsLast } => {
            lower_global_average(graph, node)
        }
        Op::Unary(op) => f32_dims(graph, node, 0)
            .and_then(|_| activation_of(Some(op)))
            .map(|activation| Lowered::generic(Kernel::Activate { activation })),
        _ => None,
    };
    special.unwrap_or_else(|| Lowered::generic(Kernel::Generic))
}

fn lower_conv(
    graph: &Graph,
    node: &Node,
    a: &ConvAttributes,
    threads: usize,
    absorbed: &HashSet<NodeId>,
) -> Option<Lowered> {
    let shape = conv_shape(graph, node, a)?;
    let activation = activation_of(a.activation.as_ref())?;
    let batch = f32_dims(graph, node, 0)?[0];
    let scale = optional_scale(graph, node, 4, 1.0, shape.out_c)?;
    if node.input(2).is_some() && f32_dims(graph, node, 2)?.iter().product::<usize>() != shape.out_c {
        return None;
    }
    let source = node.input(0)?;
    let transpose = graph.producer(source).filter(|id| absorbed.contains(id));
    let planes = transpose.is_some();
    Some(Lowered {
        kernel: Kernel::Conv { shape, batch, activation, planes },
        packings: vec![(1, Packing::Conv { shape, scale })],
        absorbed: vec![4],
        replaced: transpose.and_then(|t| Some((0, graph.node(t).input(0)?))).into_iter().collect(),
        workspace: conv_scratch_len(&shape, planes, threads) * size_of::<f32>(),
    })
}

fn lower_matmul(graph: &Graph, node: &Node, a: &MatMulAttributes) -> Option<Lowered> {
    let (x, w) = (f32_dims(graph, node, 0)?, f32_dims(graph, node, 1)?);
    if a.trans_a || x.is_empty() || w.len() != 2 || !is_constant(graph, node, 1) {
        return None;
    }
    let (k, n) = if a.trans_b { (w[1], w[0]) } else { (w[0], w[1]) };
    let rows = x[..x.len() - 1].iter().product();
    let activation = activation_of(a.activation.as_ref())?;
    let scale = optional_scale(graph, node, 4, a.alpha, n)?;
    if node.input(2).is_some() && f32_dims(graph, node, 2)?.iter().product::<usize>() != n {
        return None;
    }
    let packing = if a.trans_b { Packing::Nk { k, n, scale } } else { Packing::Kn { k, n, scale } };
    Some(Lowered {
        kernel: Kernel::MatMul { rows, k, n, activation },
        packings: vec![(1, packing)],
        absorbed: vec![4],
        replaced: Vec::new(),
        workspace: 0,
    })
}

fn lower_pool(graph: &Graph, node: &Node, a: &PoolAttributes) -> Option<Lowered> {
    let x = f32_dims(graph, node, 0)?;
    let y = dims_of(graph, node.output(0)?, DType::F32)?;
    if a.layout != Layout::ChannelsLast || x.len() != 4 || node.output(1).is_some() {
        return None;
    }
    let pair = |v: &[usize]| -> [usize; 2] { if v.len() == 2 { [v[0], v[1]] } else { [1, 1] } };
    let kernel = pair(&a.kernel);
    let (stride, dilation) = (pair(&a.strides), pair(&a.dilations));
    let window = resolve_window(&x[1..3], &kernel, &stride, &dilation, &a.padding, a.ceil_mode).ok()?;
    let pads: Vec<usize> = window.pads.iter().map(|&p| usize::try_from(p).ok()).collect::<Option<_>>()?;
    let kind = match a.kind {
        lightering_graph::PoolKind::Max => lightering_kernels::PoolKind::Max,
        // With rounding up, a window may pass the padded end, where ONNX counts differently from the kernel.
        lightering_graph::PoolKind::Average if !(a.ceil_mode && a.count_include_pad) => {
            lightering_kernels::PoolKind::Average { count_include_pad: a.count_include_pad }
        }
        _ => return None,
    };
    let shape = PoolShape {
        in_h: x[1],
        in_w: x[2],
        channels: x[3],
        out_h: y[1],
        out_w: y[2],
        kernel,
        stride,
        dilation,
        pads: [pads[0], pads[1], pads[2], pads[3]],
    };
    Some(Lowered::generic(Kernel::Pool { shape, batch: x[0], kind }))
}

fn lower_global_average(graph: &Graph, node: &Node) -> Option<Lowered> {
    let x = f32_dims(graph, node, 0)?;
    let (&batch, &channels) = (x.first()?, x.last()?);
    let pixels = x[1..x.len().max(2) - 1].iter().product();
    Some(Lowered::generic(Kernel::GlobalAverage { batch, pixels, channels }))
}
