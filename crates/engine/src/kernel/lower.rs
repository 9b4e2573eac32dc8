//! The choice of kernels: from a node whose types are known to the fastest kernel that computes it.

use std::collections::HashSet;
use std::sync::Arc;

use lightering_graph::infer::window::resolve_window;
use lightering_graph::{
    AttentionAttributes, BinaryOp, ConvAttributes, ElementwiseStep, Graph, Layout, LmOp, MatMulAttributes,
    Node, NodeId, Op, Padding, PoolAttributes, UnaryOp, ValueId,
};
use lightering_kernels::{
    AttentionShape, Binary, ConvShape, HeadStrides, PoolShape, attention_scratch_len, conv_bytes_supported,
    conv_scratch_len, matmul_scratch_len,
};
use lightering_units::DType;

use super::packing::{Packing, Scale};
use super::{Broadcast, Bytes8, ChainStep, Columns, HeadPlaces, Kernel, MaskPlace, activation_of};
use crate::experts::ExpertsShape;

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

pub(super) fn dims_of(graph: &Graph, value: ValueId, dtype: DType) -> Option<Vec<usize>> {
    let t = graph.value(value).ty.tensor()?;
    (t.dtype == dtype).then(|| t.dims())?
}

pub(super) fn f32_dims(graph: &Graph, node: &Node, operand: usize) -> Option<Vec<usize>> {
    dims_of(graph, node.input(operand)?, DType::F32)
}

pub(super) fn is_constant(graph: &Graph, node: &Node, operand: usize) -> bool {
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
    if a.layout != Layout::ChannelsLast || !is_constant(graph, node, 1) {
        return None;
    }
    shape_of(&x, &w, &y, a)
}

/// One value per spatial axis; ones when none are given.
pub(super) fn pair(v: &[usize]) -> [usize; 2] {
    if v.len() == 2 { [v[0], v[1]] } else { [1, 1] }
}

/// The padding (top, left, bottom, right) of a window over a channels-last picture; `None` when it crops.
pub(super) fn window_pads(
    x: &[usize],
    kernel: [usize; 2],
    stride: [usize; 2],
    dilation: [usize; 2],
    padding: &Padding,
    ceil_mode: bool,
) -> Option<[usize; 4]> {
    let window = resolve_window(&x[1..3], &kernel, &stride, &dilation, padding, ceil_mode).ok()?;
    let pads: Vec<usize> = window.pads.iter().map(|&p| usize::try_from(p).ok()).collect::<Option<_>>()?;
    pads.try_into().ok()
}

/// The shape of a channels-last convolution of `x` with weights `w` to `y`; `None` when it is not two-dimensional or
/// crops.
pub(super) fn shape_of(x: &[usize], w: &[usize], y: &[usize], a: &ConvAttributes) -> Option<ConvShape> {
    if x.len() != 4 || w.len() != 4 {
        return None;
    }
    let kernel = [w[2], w[3]];
    let (stride, dilation) = (pair(&a.strides), pair(&a.dilations));
    let pads = window_pads(x, kernel, stride, dilation, &a.padding, false)?;
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
        pads,
        groups: a.groups,
    })
}

/// Chooses the kernel for a node whose types are all known.
pub(crate) fn lower(graph: &Graph, node: &Node, threads: usize, absorbed: &HashSet<NodeId>) -> Lowered {
    let special = match &node.op {
        Op::Conv(a) => lower_conv(graph, node, a, threads, absorbed),
        Op::MatMul(a) => lower_matmul(graph, node, a).or_else(|| lower_product(graph, node, a, threads)),
        Op::Pool(a) => lower_pool(graph, node, a),
        Op::GlobalPool { kind: lightering_graph::PoolKind::Average, layout: Layout::ChannelsLast } => {
            lower_global_average(graph, node)
        }
        Op::Binary(_) | Op::Elementwise(_) => lower_chain(graph, node),
        Op::Attention(a) => lower_attention(graph, node, a, threads),
        Op::Softmax { axis, log: false } => {
            last_axis_rows(graph, node, *axis).map(|(rows, n)| Lowered::generic(Kernel::Softmax { rows, n }))
        }
        Op::LayerNorm { axis, epsilon } => lower_norm(graph, node, *axis)
            .map(|(rows, n)| Lowered::generic(Kernel::LayerNorm { rows, n, epsilon: *epsilon })),
        Op::RmsNorm { axis, epsilon } => lower_norm(graph, node, *axis)
            .map(|(rows, n)| Lowered::generic(Kernel::RmsNorm { rows, n, epsilon: *epsilon })),
        Op::QLinearConv(a) => lower_byte_conv(graph, node, a),
        Op::QLinearMatMul(a) => lower_byte_matmul(graph, node, a),
        Op::Lm(op) => Some(lower_language(graph, node, op, threads)),
        Op::Unary(op) => f32_dims(graph, node, 0)
            .and_then(|_| activation_of(Some(op)))
            .map(|activation| Lowered::generic(Kernel::Activate { activation })),
        _ => None,
    };
    let special = special.or_else(|| super::training::lower(graph, node, threads));
    special.unwrap_or_else(|| Lowered::generic(Kernel::Generic))
}

fn lower_language(graph: &Graph, node: &Node, op: &LmOp, threads: usize) -> Lowered {
    let types: Vec<_> = node.inputs.iter().map(|v| v.and_then(|v| graph.value(v).ty.tensor())).collect();
    let workspace = crate::ops::workspace_bytes(&node.op, &types, &[], threads).to_usize();
    let kernel = match (op, f32_dims(graph, node, 0), types.get(1).and_then(|t| t.and_then(|t| t.dims()))) {
        (LmOp::BlockMatMul { format }, Some(x), Some(w)) => {
            Kernel::BlockMatMul { format: *format, k: x[1], n: w[0], columns: Columns::all(w[0]) }
        }
        (LmOp::Experts { formats, activation }, Some(x), _) => {
            let dims = |i: usize| types.get(i).and_then(|t| t.and_then(|t| t.dims()));
            match (dims(1), dims(3), activation_of(Some(activation))) {
                (Some(ids), Some(gate), Some(activation)) => {
                    let [count, hidden] = [gate[0], gate[1]];
                    let shape = ExpertsShape { count, width: x[1], hidden, formats: *formats, activation };
                    let workspace = shape.scratch_len(x[0], ids[1]) * size_of::<f32>();
                    return Lowered { workspace, ..Lowered::generic(Kernel::Experts { shape, group: None }) };
                }
                _ => Kernel::Language,
            }
        }
        _ => Kernel::Language,
    };
    Lowered { workspace, ..Lowered::generic(kernel) }
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
        kernel: Kernel::Conv { shape, batch, activation, planes, columns: Columns::all(shape.out_c) },
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
        kernel: Kernel::MatMul { rows, k, n, activation, columns: Columns::all(n) },
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
    let kernel = pair(&a.kernel);
    let (stride, dilation) = (pair(&a.strides), pair(&a.dilations));
    let pads = window_pads(&x, kernel, stride, dilation, &a.padding, a.ceil_mode)?;
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
        pads,
    };
    Some(Lowered::generic(Kernel::Pool { shape, batch: x[0], kind }))
}

fn lower_global_average(graph: &Graph, node: &Node) -> Option<Lowered> {
    let x = f32_dims(graph, node, 0)?;
    let (&batch, &channels) = (x.first()?, x.last()?);
    let pixels = x[1..x.len().max(2) - 1].iter().product();
    Some(Lowered::generic(Kernel::GlobalAverage { batch, pixels, channels }))
}

fn binary_of(op: BinaryOp, swapped: bool) -> Option<Binary> {
    Some(match (op, swapped) {
        (BinaryOp::Add, _) => Binary::Add,
        (BinaryOp::Mul, _) => Binary::Mul,
        (BinaryOp::Sub, false) => Binary::Sub,
        (BinaryOp::Sub, true) => Binary::SubFrom,
        (BinaryOp::Div, false) => Binary::Div,
        (BinaryOp::Div, true) => Binary::DivInto,
        _ => return None,
    })
}

/// Element-wise steps as one sweep, if every operand lies in one of four ways against the same rows.
fn lower_chain(graph: &Graph, node: &Node) -> Option<Lowered> {
    let result = dims_of(graph, node.output(0)?, DType::F32)?;
    let mut dims = Vec::new();
    for i in 0..node.inputs.len() {
        dims.push(f32_dims(graph, node, i)?);
    }
    let mut lowered = Lowered::generic(Kernel::Generic);
    let steps: Vec<ElementwiseStep> = match &node.op {
        Op::Elementwise(steps) => steps.clone(),
        Op::Binary(op) => {
            let swapped = dims[0] != result;
            if swapped {
                dims.swap(0, 1);
                lowered.replaced = vec![(0, node.input(1)?), (1, node.input(0)?)];
            }
            vec![ElementwiseStep::Binary { op: *op, operand: 1, swapped }]
        }
        _ => return None,
    };
    if dims[0] != result {
        return None;
    }
    let total: usize = result.iter().product();
    // The split of the result into rows and columns that the first broadcast operand asks for.
    let mut split = None;
    let mut ways = vec![Broadcast::Full; dims.len()];
    for (i, d) in dims.iter().enumerate().skip(1) {
        let count: usize = d.iter().product();
        if *d == result {
            continue;
        }
        if count == 1 {
            ways[i] = Broadcast::Scalar;
            continue;
        }
        // Dimensions lined up from the right.
        let mut full = vec![1; result.len().checked_sub(d.len())?];
        full.extend_from_slice(d);
        let first = full.iter().position(|&x| x != 1)?;
        let last = full.iter().rposition(|&x| x != 1)?;
        let ones = (0..full.len()).find(|&i| full[i] != result[i]).map_or(0..0, |start| {
            let end = (start..full.len()).find(|&i| full[i] != 1).unwrap_or(full.len());
            start..end
        });
        let (way, n) = if full[first..] == result[first..] {
            (Broadcast::Column, result[first..].iter().product::<usize>())
        } else if full[..=last] == result[..=last] {
            (Broadcast::Row, result[last + 1..].iter().product::<usize>())
        } else if full[ones.end..] == result[ones.end..] {
            // Equal before and behind a run of ones.
            let repeat = result[ones.clone()].iter().product();
            (Broadcast::Shared(repeat), result[ones.end..].iter().product::<usize>())
        } else {
            return None;
        };
        if split.is_some_and(|s| s != n) {
            return None;
        }
        split = Some(n);
        ways[i] = way;
    }
    let n = split.unwrap_or(total).max(1);
    let steps = steps
        .iter()
        .map(|step| match *step {
            ElementwiseStep::Unary(op) => activation_of(Some(&op)).map(ChainStep::Unary),
            ElementwiseStep::Binary { op, operand, swapped } => {
                Some(ChainStep::Binary(binary_of(op, swapped)?, operand, *ways.get(operand)?))
            }
        })
        .collect::<Option<Vec<_>>>()?;
    lowered.kernel = Kernel::Chain { n, steps };
    Some(lowered)
}

/// Rows and row length when `axis` is the last one of an f32 operand.
fn last_axis_rows(graph: &Graph, node: &Node, axis: i64) -> Option<(usize, usize)> {
    let x = f32_dims(graph, node, 0)?;
    let last = axis == -1 || axis == x.len() as i64 - 1;
    let n = *x.last()?;
    (last && n > 0).then(|| (x.iter().product::<usize>() / n, n))
}

fn lower_norm(graph: &Graph, node: &Node, axis: i64) -> Option<(usize, usize)> {
    let (rows, n) = last_axis_rows(graph, node, axis)?;
    let only_result = node.outputs.iter().skip(1).all(Option::is_none);
    let fits = (1..node.inputs.len()).all(|i| {
        node.input(i).is_none() || f32_dims(graph, node, i).is_some_and(|d| d.iter().product::<usize>() == n)
    });
    (only_result && fits).then_some((rows, n))
}

fn lower_product(graph: &Graph, node: &Node, a: &MatMulAttributes, threads: usize) -> Option<Lowered> {
    let (x, w) = (f32_dims(graph, node, 0)?, f32_dims(graph, node, 1)?);
    if a.trans_a
        || a.alpha != 1.0
        || x.len() < 2
        || w.len() < 2
        || node.input(3).is_some()
        || node.input(4).is_some()
    {
        return None;
    }
    let (m, k) = (x[x.len() - 2], x[x.len() - 1]);
    let n = if a.trans_b { w[w.len() - 2] } else { w[w.len() - 1] };
    let (lead_x, lead_w) = (&x[..x.len() - 2], &w[..w.len() - 2]);
    let (count_x, count_w) = (lead_x.iter().product::<usize>(), lead_w.iter().product::<usize>());
    let (batch, a_step, b_step) = if lead_x == lead_w {
        (count_x, m * k, k * n)
    } else if count_w == 1 {
        (count_x, m * k, 0)
    } else if count_x == 1 {
        (count_w, 0, k * n)
    } else {
        return None;
    };
    if node.input(2).is_some() && f32_dims(graph, node, 2)? != [n] {
        return None;
    }
    // With more rows packing pays, once for the whole batch and on all threads: see the kernels of training.
    if batch * m >= 32 && !is_constant(graph, node, 1) {
        return None;
    }
    let activation = activation_of(a.activation.as_ref())?;
    Some(Lowered {
        workspace: matmul_scratch_len(n, k, a.trans_b, threads) * size_of::<f32>(),
        ..Lowered::generic(Kernel::Product {
            batch,
            shape: [m, n, k],
            a_step,
            b_step,
            transposed: a.trans_b,
            activation,
        })
    })
}

fn lower_attention(graph: &Graph, node: &Node, a: &AttentionAttributes, threads: usize) -> Option<Lowered> {
    let plain = node.inputs.iter().skip(4).all(Option::is_none)
        && node.outputs.iter().skip(1).all(Option::is_none)
        && a.softmax_precision.is_none_or(|p| p == DType::F32);
    let (batch, shape, at, mask) = plain.then(|| attention_of(graph, node, a))??;
    Some(Lowered {
        workspace: attention_scratch_len(&shape, threads) * size_of::<f32>(),
        ..Lowered::generic(Kernel::Attention { batch, shape, at, mask })
    })
}

/// Batch, sizes, places and mask of an attention whose first operands are `(q, k, v, mask?)`.
pub(super) fn attention_of(
    graph: &Graph,
    node: &Node,
    a: &AttentionAttributes,
) -> Option<(usize, AttentionShape, HeadPlaces, Option<MaskPlace>)> {
    let (q, k, v) = (f32_dims(graph, node, 0)?, f32_dims(graph, node, 1)?, f32_dims(graph, node, 2)?);
    if a.softcap != 0.0 || q.len() != k.len() || q.len() != v.len() || q[0] != k[0] || q[0] != v[0] {
        return None;
    }
    let batch = q[0];
    // `[batch, position, head·dim]` or `[batch, head, position, dim]`.
    let (heads, kv_heads, q_len, kv_len, head_dim, value_dim, packed) = match q.len() {
        3 if a.q_num_heads > 0 && a.kv_num_heads > 0 => {
            (a.q_num_heads, a.kv_num_heads, q[1], k[1], q[2] / a.q_num_heads, v[2] / a.kv_num_heads, true)
        }
        4 => (q[1], k[1], q[2], k[2], q[3], v[3], false),
        _ => return None,
    };
    if kv_heads == 0 || heads % kv_heads != 0 || head_dim == 0 || kv_len == 0 || q_len == 0 {
        return None;
    }
    let place = |heads: usize, length: usize, dim: usize| {
        if packed {
            HeadStrides { position: heads * dim, head: dim }
        } else {
            HeadStrides { position: dim, head: length * dim }
        }
    };
    let mask = match node.input(3) {
        None => None,
        Some(_) => {
            let m = f32_dims(graph, node, 3)?;
            if m.len() < 2 || m.len() > 4 || m[m.len() - 1] != kv_len {
                return None;
            }
            let mut full = vec![1; 4 - m.len()];
            full.extend_from_slice(&m);
            let fits =
                [(full[0], batch), (full[1], heads), (full[2], q_len)].iter().all(|&(d, n)| d == 1 || d == n);
            if !fits {
                return None;
            }
            let step = |d: usize, size: usize| if d == 1 { 0 } else { size };
            Some(MaskPlace {
                row: step(full[2], kv_len),
                head: step(full[1], full[2] * kv_len),
                batch: step(full[0], full[1] * full[2] * kv_len),
            })
        }
    };
    let shape = AttentionShape {
        heads,
        kv_heads,
        q_len,
        kv_len,
        head_dim,
        value_dim,
        scale: a.scale.unwrap_or(1.0 / (head_dim as f32).sqrt()),
        causal: a.causal.then_some(0),
    };
    let at = HeadPlaces {
        q: place(heads, q_len, head_dim),
        k: place(kv_heads, kv_len, head_dim),
        v: place(kv_heads, kv_len, value_dim),
        y: place(heads, q_len, value_dim),
        batch: [
            heads * q_len * head_dim,
            kv_heads * kv_len * head_dim,
            kv_heads * kv_len * value_dim,
            heads * q_len * value_dim,
        ],
    };
    Some((batch, shape, at, mask))
}

/// A small constant of f32 values.
fn constant_f32(graph: &Graph, node: &Node, operand: usize) -> Option<Vec<f32>> {
    let t = graph.value(node.input(operand)?).tensor()?;
    (t.dtype() == DType::F32).then(|| t.as_slice::<f32>().to_vec())
}

/// A small constant of integers.
fn constant_i32(graph: &Graph, node: &Node, operand: usize) -> Option<Vec<i32>> {
    let t = graph.value(node.input(operand)?).tensor()?;
    t.to_i64s()?.into_iter().map(|x| i32::try_from(x).ok()).collect()
}

fn is_signed_byte(graph: &Graph, value: Option<ValueId>) -> Option<bool> {
    match graph.value(value?).ty.tensor()?.dtype {
        DType::I8 => Some(true),
        DType::U8 => Some(false),
        _ => None,
    }
}

/// The parameters of an 8-bit product whose operands are `(x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero)`.
fn bytes8(graph: &Graph, node: &Node, columns: usize, activation: Option<&UnaryOp>) -> Option<Bytes8> {
    let one = |v: Vec<f32>| (v.len() == 1).then(|| v[0]);
    let x_scale = one(constant_f32(graph, node, 1)?)?;
    let y_scale = one(constant_f32(graph, node, 6)?)?;
    let w_scale = constant_f32(graph, node, 4)?;
    if w_scale.len() != 1 && w_scale.len() != columns {
        return None;
    }
    let zero = |operand: usize| match node.input(operand) {
        None => Some(vec![0]),
        Some(_) => constant_i32(graph, node, operand),
    };
    let (x_zero, w_zero, y_zero) = (zero(2)?, zero(5)?, zero(7)?);
    if x_zero.len() != 1 || y_zero.len() != 1 || (w_zero.len() != 1 && w_zero.len() != columns) {
        return None;
    }
    let (x_signed, y_signed) =
        (is_signed_byte(graph, node.input(0))?, is_signed_byte(graph, node.output(0))?);
    let of_type = |zero: i32, signed: bool| {
        if signed { i8::try_from(zero).is_ok() } else { u8::try_from(zero).is_ok() }
    };
    if !of_type(x_zero[0], x_signed) || !of_type(y_zero[0], y_signed) {
        return None;
    }
    let w_signed = is_signed_byte(graph, node.input(3))?;
    // Unsigned weights are packed shifted into the signed range.
    let shift = if w_signed { 0 } else { 128 };
    let w_zeros: Vec<i32> = (0..columns).map(|c| w_zero[c.min(w_zero.len() - 1)] - shift).collect();
    let quantized = |real: f32| ((real / y_scale).round_ties_even().clamp(-1e6, 1e6)) as i32 + y_zero[0];
    let limits = match activation {
        None | Some(UnaryOp::Identity) => None,
        Some(UnaryOp::Relu) => Some((y_zero[0], 255)),
        Some(UnaryOp::ClipTo { min, max }) => Some((quantized(*min), quantized(*max))),
        Some(_) => return None,
    };
    Some(Bytes8 {
        x_signed,
        x_zero: x_zero[0],
        scale: w_scale.iter().map(|w| x_scale * w / y_scale).collect(),
        w_zeros: w_zeros.iter().any(|&z| z != 0).then_some(w_zeros),
        y_signed,
        y_zero: y_zero[0],
        limits,
    })
}

fn lower_byte_conv(graph: &Graph, node: &Node, a: &ConvAttributes) -> Option<Lowered> {
    let bytes_dims = |operand: usize| graph.value(node.input(operand)?).ty.tensor()?.dims();
    let (x, w) = (bytes_dims(0)?, bytes_dims(3)?);
    let y = graph.value(node.output(0)?).ty.tensor()?.dims()?;
    if a.layout != Layout::ChannelsLast || !is_constant(graph, node, 3) {
        return None;
    }
    let shape = shape_of(&x, &w, &y, a).filter(conv_bytes_supported)?;
    let bytes = bytes8(graph, node, shape.out_c, a.activation.as_ref())?;
    if node
        .input(8)
        .is_some_and(|b| graph.value(b).ty.tensor().and_then(|t| t.elements()) != Some(shape.out_c))
    {
        return None;
    }
    let signed = is_signed_byte(graph, node.input(3))?;
    Some(Lowered {
        kernel: Kernel::ByteConv {
            shape,
            batch: x[0],
            bytes: Arc::new(bytes),
            columns: Columns::all(shape.out_c),
        },
        packings: vec![(3, Packing::ByteConv { shape, signed })],
        absorbed: vec![1, 2, 4, 5, 6, 7],
        replaced: Vec::new(),
        workspace: 0,
    })
}

fn lower_byte_matmul(graph: &Graph, node: &Node, a: &MatMulAttributes) -> Option<Lowered> {
    let bytes_dims = |operand: usize| graph.value(node.input(operand)?).ty.tensor()?.dims();
    let (x, w) = (bytes_dims(0)?, bytes_dims(3)?);
    if a.trans_a || x.is_empty() || w.len() != 2 || a.alpha != 1.0 || !is_constant(graph, node, 3) {
        return None;
    }
    let (k, n) = if a.trans_b { (w[1], w[0]) } else { (w[0], w[1]) };
    let bytes = bytes8(graph, node, n, a.activation.as_ref())?;
    if node.input(8).is_some_and(|b| graph.value(b).ty.tensor().and_then(|t| t.elements()) != Some(n)) {
        return None;
    }
    let signed = is_signed_byte(graph, node.input(3))?;
    Some(Lowered {
        kernel: Kernel::ByteMatMul { rows: x[..x.len() - 1].iter().product(), k, n, bytes: Arc::new(bytes) },
        packings: vec![(3, Packing::ByteMatrix { k, n, signed, transposed: a.trans_b })],
        absorbed: vec![1, 2, 4, 5, 6, 7],
        replaced: Vec::new(),
        workspace: 0,
    })
}
