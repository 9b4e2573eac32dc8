//! Layout choice: pictures in channels-last order, which the fast kernels want.

use std::collections::HashMap;

use super::editor::{Editor, axis_index};
use super::simplify::{reduced_axes, reshape_groups};
use crate::{DType, Graph, GraphError, Layout, Node, NodeId, Op, Pass, Tensor, TensorType, TrainOp, ValueId};

/// Brings convolutions and everything around them to [`Layout::ChannelsLast`].
///
/// Each value may get *twins*: the same elements with the axes in another order. A convolution asks for the
/// channels-last twin of its picture and makes one of its result; operators that do not care about the order of axes
/// (element-wise ones, pools, `Concat`, `Slice`, `Resize`, …) follow their operands, with their axes renumbered;
/// transpositions and reshapes turn into relations between twins. A real `Transpose` stays only where somebody needs
/// an order that does not exist, such as at the inputs and outputs of the graph, whose names, shapes and order of
/// elements do not change.
///
/// Graphs without convolutions stay as they are.
#[derive(Clone, Copy, Debug, Default)]
pub struct LayoutChoice;

impl Pass for LayoutChoice {
    fn name(&self) -> &'static str {
        "layout"
    }

    fn run(&self, graph: &mut Graph) -> Result<usize, GraphError> {
        if !graph.iter_nodes().any(|(_, n)| wants_channels_last(&n.op)) {
            return Ok(0);
        }
        let mut l = Layouts { e: Editor::new(graph), twins: HashMap::new() };
        for id in l.e.ids() {
            if l.e.get(id).is_some() {
                l.visit(id);
            }
        }
        l.e.finish()
    }
}

/// Convolutions that are still channels-first.
fn wants_channels_last(op: &Op) -> bool {
    match op {
        Op::Conv(a) | Op::QLinearConv(a) => a.layout == Layout::ChannelsFirst,
        Op::ConvTranspose(a) => a.conv.layout == Layout::ChannelsFirst,
        _ => false,
    }
}

/// Source axis of each axis of a channels-last tensor.
fn channels_last(rank: usize) -> Vec<usize> {
    let mut perm: Vec<usize> = (0..rank).collect();
    perm[1..].rotate_left(1);
    perm
}

fn is_identity(perm: &[usize]) -> bool {
    perm.iter().enumerate().all(|(i, &p)| i == p)
}

fn inverse(perm: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; perm.len()];
    for (i, &p) in perm.iter().enumerate() {
        inverse[p] = i;
    }
    inverse
}

fn permuted(dims: &[usize], perm: &[usize]) -> Vec<usize> {
    perm.iter().map(|&p| dims[p]).collect()
}

/// Where an axis has gone.
fn position(perm: &[usize], axis: usize) -> Option<usize> {
    perm.iter().position(|&p| p == axis)
}

/// How a twin relates to its value.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The value is made from the twin, by a transposition that vanishes when nobody needs it.
    Origin,
    /// The value is made from the twin by a transposition of the model.
    Source,
    /// The twin was made from the value.
    Copy,
}

#[derive(Clone)]
struct Twin {
    /// Axis of the value for each axis of the twin.
    perm: Vec<usize>,
    value: ValueId,
    kind: Kind,
}

struct Layouts<'g> {
    e: Editor<'g>,
    twins: HashMap<ValueId, Vec<Twin>>,
}

impl Layouts<'_> {
    fn twins(&self, v: ValueId) -> &[Twin] {
        self.twins.get(&v).map_or(&[], Vec::as_slice)
    }

    fn record(&mut self, v: ValueId, perm: Vec<usize>, value: ValueId, kind: Kind) {
        let twins = self.twins.entry(v).or_default();
        if !twins.iter().any(|t| t.perm == perm) {
            twins.push(Twin { perm, value, kind });
        }
    }

    /// Whether an operator that does not care should follow this twin.
    fn leads(twin: &Twin) -> bool {
        match twin.kind {
            Kind::Origin => true,
            Kind::Source => twin.perm.len() == 4 && twin.perm == channels_last(4),
            Kind::Copy => false,
        }
    }

    fn lead(&self, v: ValueId) -> Option<&Twin> {
        self.twins(v).iter().find(|t| Self::leads(t))
    }

    /// The elements of `v` in the order of `perm`, for a node at `anchor`.
    fn ensure(&mut self, anchor: NodeId, v: ValueId, perm: &[usize]) -> Option<ValueId> {
        if is_identity(perm) {
            return Some(v);
        }
        if let Some(t) = self.twins(v).iter().find(|t| t.perm == perm) {
            return Some(t.value);
        }
        let dims = self.e.dims(v)?;
        let out_dims = permuted(&dims, perm);
        if self.e.is_constant(v) {
            let moved = self.permute_constant(v, &dims, perm);
            if let Some(c) = moved {
                self.record(v, perm.to_vec(), c, Kind::Copy);
                return Some(c);
            }
        }
        // From where the elements are by now.
        let (source, from) = match self.twins(v).iter().find(|t| t.kind == Kind::Origin) {
            Some(t) => {
                let back = inverse(&t.perm);
                (t.value, perm.iter().map(|&p| back[p]).collect())
            }
            None => (v, perm.to_vec()),
        };
        let base = format!("{}.moved", self.e.value(v).name);
        let source_dims = self.e.dims(source)?;
        let moving: Vec<usize> = from.iter().copied().filter(|&p| source_dims[p] != 1).collect();
        let twin = if moving.is_sorted() {
            self.e.insert_reshape(anchor, &base, source, &out_dims)
        } else {
            self.e.insert_transpose(anchor, &base, source, &from)
        };
        self.record(v, perm.to_vec(), twin, Kind::Copy);
        Some(twin)
    }

    /// A constant with its axes in another order, when that needs no run-time work.
    fn permute_constant(&mut self, v: ValueId, dims: &[usize], perm: &[usize]) -> Option<ValueId> {
        let out_dims = permuted(dims, perm);
        let moving: Vec<usize> = perm.iter().copied().filter(|&p| dims[p] != 1).collect();
        if moving.is_sorted() {
            return self.e.view_constant(v, &out_dims);
        }
        let t = self.e.tensor(v)?;
        let size = t.dtype().size_bytes();
        let bytes = t.as_bytes();
        if size == 0 || bytes.len() != t.len() * size {
            return None;
        }
        let mut strides = vec![1; dims.len()];
        for i in (0..dims.len().saturating_sub(1)).rev() {
            strides[i] = strides[i + 1] * dims[i + 1];
        }
        let mut moved = Vec::with_capacity(bytes.len());
        let mut index = vec![0; dims.len()];
        for _ in 0..t.len() {
            let at: usize = index.iter().zip(perm).map(|(i, &p)| i * strides[p]).sum();
            moved.extend_from_slice(&bytes[at * size..(at + 1) * size]);
            for axis in (0..index.len()).rev() {
                index[axis] += 1;
                if index[axis] < out_dims[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
        let tensor = Tensor::from_bytes(t.dtype(), &out_dims, &moved).ok()?;
        let base = self.e.value(v).name.clone();
        Some(self.e.add_constant(&base, tensor))
    }

    /// An operand that broadcasts to `rank` axes, in the order of `perm`.
    fn operand(&mut self, anchor: NodeId, v: ValueId, rank: usize, perm: &[usize]) -> Option<ValueId> {
        let dims = self.e.dims(v)?;
        if dims.iter().product::<usize>() == 1 && dims.len() <= rank {
            return Some(v);
        }
        if dims.len() > rank {
            return None;
        }
        if dims.len() == rank {
            return self.ensure(anchor, v, perm);
        }
        let mut padded = vec![1; rank - dims.len()];
        padded.extend(&dims);
        let wide = if self.e.is_constant(v) {
            self.e.view_constant(v, &padded)?
        } else {
            let base = format!("{}.wide", self.e.value(v).name);
            self.e.insert_reshape(anchor, &base, v, &padded)
        };
        self.ensure(anchor, wide, perm)
    }

    /// The order that most elements of these operands are in already; `None` for the order of the model.
    fn choose(&self, operands: &[ValueId], rank: usize) -> Option<Vec<usize>> {
        let mut scores: Vec<(Vec<usize>, usize)> = Vec::new();
        let mut plain = 0;
        for &v in operands {
            let Some(dims) = self.e.dims(v).filter(|d| d.len() == rank) else { continue };
            let elements: usize = dims.iter().product();
            match self.lead(v) {
                Some(t) => match scores.iter_mut().find(|(p, _)| *p == t.perm) {
                    Some((_, n)) => *n += elements,
                    None => scores.push((t.perm.clone(), elements)),
                },
                // What moves nothing, or has a copy already, does not matter.
                None if self.e.is_constant(v) || !self.twins(v).is_empty() => {}
                None => plain += elements,
            }
        }
        let (perm, score) = scores.into_iter().max_by_key(|(_, n)| *n)?;
        (score >= plain && score > 0).then_some(perm)
    }

    /// Puts `op` in place of the node `id`; its results are in the orders of `perms`.
    fn replace(&mut self, id: NodeId, op: Op, inputs: Vec<Option<ValueId>>, perms: Vec<Vec<usize>>) {
        let node = self.e.node(id);
        let (name, outputs) = (node.name.clone(), node.outputs.clone());
        if perms.iter().all(|p| is_identity(p)) {
            self.e.set(id, op, inputs);
            return;
        }
        let mut types = Vec::new();
        for (v, perm) in outputs.iter().flatten().zip(&perms) {
            let (Some(dims), Some(dtype)) = (self.e.dims(*v), self.e.dtype(*v)) else { return };
            types.push(TensorType::fixed(dtype, &permuted(&dims, perm)));
        }
        let moved = self.e.insert_with(id, &name, op, inputs, types);
        if let Some((made, _)) = self.e.producer(moved[0]) {
            self.e.rename(made, &name);
        }
        if let ([new], [perm]) = (&moved[..], &perms[..]) {
            let out = self.e.node(id).out();
            self.e.rename(id, &format!("{name}.back"));
            self.e.set_all(id, Op::Transpose { perm: Some(inverse(perm)) }, &[*new]);
            self.record(out, perm.clone(), *new, Kind::Origin);
            return;
        }
        for ((old, new), perm) in outputs.into_iter().flatten().zip(moved).zip(perms) {
            let base = self.e.value(old).name.clone();
            let back = self.e.insert_transpose(id, &base, new, &inverse(&perm));
            self.e.redirect(old, back);
            let key = if self.e.is_output(old) { old } else { back };
            self.record(key, perm, new, Kind::Origin);
        }
    }

    fn visit(&mut self, id: NodeId) {
        let node = self.e.node(id).clone();
        if node.output(0).is_none() {
            return;
        }
        if wants_channels_last(&node.op) {
            self.convolution(id, &node);
            return;
        }
        // Whatever is not handled stays as it is, reading the order of the model.
        let _ = match &node.op {
            Op::Transpose { .. } => self.transpose(id, &node),
            Op::Reshape { .. } => self.reshape(id, &node),
            _ => self.follower(id, &node),
        };
    }

    fn convolution(&mut self, id: NodeId, node: &Node) -> Option<()> {
        let perm = channels_last(4);
        let (x, out) = (node.input(0)?, node.out());
        let rank = self.e.dims(x)?.len();
        let kernel_type = match node.op {
            Op::QLinearConv(_) => matches!(self.e.dtype(x)?, DType::U8 | DType::I8),
            _ => self.e.dtype(x)? == DType::F32,
        };
        if rank != 4 || !kernel_type || self.e.dims(out)?.len() != 4 {
            return None;
        }
        let mut inputs = node.inputs.clone();
        inputs[0] = Some(self.ensure(id, x, &perm)?);
        let mut op = node.op.clone();
        match &mut op {
            Op::Conv(a) => a.layout = Layout::ChannelsLast,
            Op::ConvTranspose(a) => a.conv.layout = Layout::ChannelsLast,
            Op::QLinearConv(a) => a.layout = Layout::ChannelsLast,
            _ => return None,
        }
        if !matches!(op, Op::QLinearConv(_))
            && let Some(residual) = node.input(3)
        {
            inputs[3] = Some(self.ensure(id, residual, &perm)?);
        }
        self.replace(id, op, inputs, vec![perm]);
        Some(())
    }

    fn transpose(&mut self, id: NodeId, node: &Node) -> Option<()> {
        let Op::Transpose { perm: Some(perm) } = &node.op else { return None };
        let (x, out) = (node.input(0)?, node.out());
        let back = inverse(perm);
        let twins = self.twins(x).to_vec();
        for t in &twins {
            let of_out: Vec<usize> = t.perm.iter().map(|&p| back[p]).collect();
            if is_identity(&of_out) && t.kind != Kind::Copy {
                let is_output = self.e.is_output(out);
                if self.e.redirect(out, t.value) {
                    if is_output {
                        // The twin goes by the name of the output now.
                        for t2 in self.twins.values_mut().flatten() {
                            if t2.value == t.value {
                                t2.value = out;
                            }
                        }
                        if let Some(own) = self.twins.remove(&t.value) {
                            self.twins.insert(out, own);
                        }
                    }
                    return Some(());
                }
            }
        }
        for t in twins.iter().filter(|t| t.kind != Kind::Copy) {
            let of_out = t.perm.iter().map(|&p| back[p]).collect();
            self.record(out, of_out, t.value, t.kind);
        }
        if let Some(t) = twins.iter().find(|t| t.kind == Kind::Origin) {
            let from = inverse(&t.perm);
            let direct = perm.iter().map(|&p| from[p]).collect();
            self.e.set_all(id, Op::Transpose { perm: Some(direct) }, &[t.value]);
        } else {
            self.record(out, back, x, Kind::Source);
        }
        Some(())
    }

    fn reshape(&mut self, id: NodeId, node: &Node) -> Option<()> {
        let (x, out) = (node.input(0)?, node.out());
        let (from, to) = (self.e.dims(x)?, self.e.dims(out)?);
        let groups = reshape_groups(&from, &to)?;
        let twin = self
            .twins(x)
            .iter()
            .find(|t| t.kind == Kind::Origin)
            .or_else(|| self.twins(x).iter().find(|t| t.kind == Kind::Source))?;
        let twin = twin.clone();
        // Groups in the order in which the twin has them, each group's axes in their own order.
        let mut ordered = groups;
        ordered.sort_by_key(|g| g.from.iter().filter_map(|&a| position(&twin.perm, a)).min());
        let wanted: Vec<usize> = ordered.iter().flat_map(|g| g.from.iter().copied()).collect();
        let solid = |perm: &[usize], dims: &[usize]| -> Vec<usize> {
            perm.iter().copied().filter(|&p| dims[p] != 1).collect()
        };
        let source_perm = if solid(&twin.perm, &from) == wanted {
            twin.perm.clone()
        } else {
            let mut p: Vec<usize> = (0..from.len()).filter(|&a| from[a] == 1).collect();
            p.extend(&wanted);
            p
        };
        let moves = source_perm != twin.perm;
        if moves && (twin.kind == Kind::Source || wanted.is_sorted()) {
            return None;
        }
        let order: Vec<usize> = ordered.iter().flat_map(|g| g.to.iter().copied()).collect();
        let rank = to.len();
        let out_perm = if order.is_sorted() {
            (0..rank).collect()
        } else if rank >= 3 && solid(&channels_last(rank), &to) == order {
            channels_last(rank)
        } else {
            let mut p: Vec<usize> = (0..rank).filter(|&a| to[a] == 1).collect();
            p.extend(&order);
            p
        };
        let source = self.ensure(id, x, &source_perm)?;
        let dims = permuted(&to, &out_perm);
        if twin.kind == Kind::Origin {
            let shape = self.e.add_dims(&format!("{}.shape", node.name), &dims);
            let op = Op::Reshape { allow_zero: true };
            self.replace(id, op, vec![Some(source), Some(shape)], vec![out_perm]);
        } else if !is_identity(&out_perm) {
            let base = format!("{}.moved", node.name);
            let moved = self.e.insert_reshape(id, &base, source, &dims);
            self.record(out, out_perm, moved, Kind::Source);
        }
        Some(())
    }

    /// Operators that go along with the order of their operands.
    fn follower(&mut self, id: NodeId, node: &Node) -> Option<()> {
        let out = node.out();
        let mut op = node.op.clone();
        let mut inputs = node.inputs.clone();
        let x = node.input(0)?;
        let rank = self.e.dims(x)?.len();
        let outputs = node.outputs.iter().flatten().count();
        if outputs != node.outputs.len() {
            return None;
        }
        match &mut op {
            Op::Train(train) => {
                let perm = self.choose(&[x], rank)?;
                return self.statistics(id, node, train.as_ref().clone(), &perm);
            }
            // ---- several operands that broadcast ----
            Op::Binary(_) | Op::Where | Op::Variadic(_) | Op::Elementwise(_) | Op::QLinearBinary { .. } => {
                let places: Vec<usize> = if matches!(op, Op::QLinearBinary { .. }) {
                    vec![0, 3]
                } else {
                    (0..inputs.len()).collect()
                };
                let rank = self.e.dims(out)?.len();
                let operands: Vec<ValueId> = places.iter().filter_map(|&i| inputs[i]).collect();
                let perm = self.choose(&operands, rank)?;
                for i in places {
                    if let Some(v) = inputs[i] {
                        inputs[i] = Some(self.operand(id, v, rank, &perm)?);
                    }
                }
                self.replace(id, op, inputs, vec![perm]);
                return Some(());
            }
            Op::Concat { axis } => {
                let operands: Vec<ValueId> = inputs.iter().copied().collect::<Option<_>>()?;
                let perm = self.choose(&operands, rank)?;
                *axis = position(&perm, axis_index(*axis, rank)?)? as i64;
                for v in inputs.iter_mut().flatten() {
                    *v = self.ensure(id, *v, &perm)?;
                }
                self.replace(id, op, inputs, vec![perm]);
                return Some(());
            }
            _ => {}
        }
        // ---- one operand ----
        let perm = self.choose(&[x], rank)?;
        let new_axis = |axis: i64| Some(position(&perm, axis_index(axis, rank)?)? as i64);
        let mut out_perms = vec![perm.clone(); outputs];
        match &mut op {
            Op::Unary(_) | Op::Cast { .. } | Op::Clip | Op::QLinearUnary(_) => {}
            Op::QuantizeLinear(a) | Op::DequantizeLinear(a) => {
                let scalar = self.e.ty(node.input(1)?)?.elements()? == 1;
                if a.block_size != 0 {
                    return None;
                }
                a.axis = if scalar { 0 } else { new_axis(a.axis)? };
            }
            Op::Pool(a) | Op::QLinearPool(a) if perm == channels_last(4) && outputs == 1 => {
                (a.layout == Layout::ChannelsFirst).then_some(())?;
                a.layout = Layout::ChannelsLast;
            }
            Op::GlobalPool { layout, .. } if perm == channels_last(4) => {
                (*layout == Layout::ChannelsFirst).then_some(())?;
                *layout = Layout::ChannelsLast;
            }
            Op::Softmax { axis, .. }
            | Op::Hardmax { axis }
            | Op::LpNorm { axis, .. }
            | Op::Split { axis } => {
                *axis = new_axis(*axis)?;
            }
            Op::ArgReduce { axis, keep_dims, .. } => {
                let old = axis_index(*axis, rank)?;
                *axis = new_axis(*axis)?;
                if !*keep_dims {
                    out_perms = vec![without(&perm, &[old])];
                }
            }
            Op::Reduce { keep_dims, .. } => {
                let axes = reduced_axes(&self.e, id)?;
                if !*keep_dims {
                    out_perms = vec![without(&perm, &axes)];
                }
                let moved: Option<Vec<i64>> =
                    axes.iter().map(|&a| Some(position(&perm, a)? as i64)).collect();
                let mut moved = moved?;
                moved.sort_unstable();
                let axes = self.e.add_ints(&format!("{}.axes", node.name), &moved);
                inputs = vec![inputs[0], Some(axes)];
            }
            Op::Slice => {
                let count = self.e.ints(node.input(1)?)?.len();
                let axes = self.e.optional_ints(node.input(3))?;
                let axes = axes.unwrap_or_else(|| (0..count as i64).collect());
                let axes: Vec<i64> = axes.iter().map(|&a| new_axis(a)).collect::<Option<_>>()?;
                if inputs.len() < 4 {
                    inputs.resize(4, None);
                }
                inputs[3] = Some(self.e.add_ints(&format!("{}.axes", node.name), &axes));
            }
            Op::Pad { .. } => {
                let pads = self.e.ints(node.input(1)?)?;
                match self.e.optional_ints(node.input(3))? {
                    Some(axes) => {
                        let axes: Vec<i64> = axes.iter().map(|&a| new_axis(a)).collect::<Option<_>>()?;
                        inputs[3] = Some(self.e.add_ints(&format!("{}.axes", node.name), &axes));
                    }
                    None => {
                        (pads.len() == 2 * rank).then_some(())?;
                        let ends = perm.iter().map(|&p| pads[rank + p]);
                        let pads: Vec<i64> = perm.iter().map(|&p| pads[p]).chain(ends).collect();
                        inputs[1] = Some(self.e.add_ints(&format!("{}.pads", node.name), &pads));
                    }
                }
            }
            Op::Resize(a) => match &mut a.axes {
                Some(axes) => {
                    *axes = axes.iter().map(|&a| new_axis(a)).collect::<Option<_>>()?;
                }
                None => {
                    for i in 1..inputs.len() {
                        let Some(v) = inputs[i] else { continue };
                        let t = self.e.tensor(v)?;
                        if t.is_empty() {
                            continue;
                        }
                        let order: Vec<usize> = match t.len() {
                            n if n == rank => perm.clone(),
                            n if n == 2 * rank => {
                                perm.iter().copied().chain(perm.iter().map(|p| p + rank)).collect()
                            }
                            _ => return None,
                        };
                        let size = t.dtype().size_bytes();
                        let bytes: Vec<u8> = order
                            .iter()
                            .flat_map(|&p| t.as_bytes()[p * size..(p + 1) * size].to_vec())
                            .collect();
                        let moved = Tensor::from_bytes(t.dtype(), &[t.len()], &bytes).ok()?;
                        inputs[i] = Some(self.e.add_constant(&format!("{}.sizes", node.name), moved));
                    }
                }
            },
            Op::DepthToSpace { block, crd } if perm == channels_last(4) => {
                let (b, crd) = (*block, *crd);
                return self.depth_to_space(id, node, b, crd);
            }
            Op::SpaceToDepth { block } if perm == channels_last(4) => {
                let b = *block;
                return self.space_to_depth(id, node, b);
            }
            _ => return None,
        }
        inputs[0] = Some(self.ensure(id, x, &perm)?);
        self.replace(id, op, inputs, out_perms);
        Some(())
    }

    /// Operators of training on channels, which know where these are; their other operands and the statistics are vectors.
    fn statistics(&mut self, id: NodeId, node: &Node, mut op: TrainOp, perm: &[usize]) -> Option<()> {
        let mut inputs = node.inputs.clone();
        inputs[0] = Some(self.ensure(id, node.input(0)?, perm)?);
        match &mut op {
            TrainOp::Normalise { axis, .. } => {
                *axis = position(perm, *axis)?;
                self.replace(id, Op::Train(Box::new(op)), inputs, vec![perm.to_vec()]);
            }
            TrainOp::BatchStatistics { axis } => {
                *axis = position(perm, *axis)?;
                self.e.set(id, Op::Train(Box::new(op)), inputs);
            }
            _ => return None,
        }
        Some(())
    }

    fn depth_to_space(&mut self, id: NodeId, node: &Node, b: usize, crd: bool) -> Option<()> {
        let perm = channels_last(4);
        let x = node.input(0)?;
        let [n, c, h, w] = self.e.dims(x)?[..] else { return None };
        let depth = c / (b * b);
        let twin = self.ensure(id, x, &perm)?;
        let base = format!("{}.blocks", node.name);
        let (dims, order) = if crd {
            ([n, h, w, depth, b, b], [0, 1, 4, 2, 5, 3])
        } else {
            ([n, h, w, b, b, depth], [0, 1, 3, 2, 4, 5])
        };
        let blocks = self.e.insert_reshape(id, &base, twin, &dims);
        let moved = self.e.insert_transpose(id, &base, blocks, &order);
        let shape = self.e.add_dims(&format!("{base}.shape"), &[n, h * b, w * b, depth]);
        self.replace(id, Op::Reshape { allow_zero: true }, vec![Some(moved), Some(shape)], vec![perm]);
        Some(())
    }

    fn space_to_depth(&mut self, id: NodeId, node: &Node, b: usize) -> Option<()> {
        let perm = channels_last(4);
        let x = node.input(0)?;
        let [n, c, h, w] = self.e.dims(x)?[..] else { return None };
        let twin = self.ensure(id, x, &perm)?;
        let base = format!("{}.blocks", node.name);
        let blocks = self.e.insert_reshape(id, &base, twin, &[n, h / b, b, w / b, b, c]);
        let moved = self.e.insert_transpose(id, &base, blocks, &[0, 1, 3, 2, 4, 5]);
        let shape = self.e.add_dims(&format!("{base}.shape"), &[n, h / b, w / b, b * b * c]);
        self.replace(id, Op::Reshape { allow_zero: true }, vec![Some(moved), Some(shape)], vec![perm]);
        Some(())
    }
}

/// The order of the axes that stay when some go.
fn without(perm: &[usize], gone: &[usize]) -> Vec<usize> {
    let left = |a: usize| (0..a).filter(|b| !gone.contains(b)).count();
    perm.iter().copied().filter(|a| !gone.contains(a)).map(left).collect()
}

#[cfg(test)]
mod tests;
