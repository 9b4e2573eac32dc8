use super::Editor;
use crate::{BinaryOp, Evaluate, Graph, GraphError, NodeId, Op, Pass, Tensor, ValueId};

/// Batch normalisation at inference is a scale and a shift per channel: both go into the convolution (or matrix
/// product) before it, the scale as `weight_scale` where the weights are stored and must not be touched. Without
/// such a node before it, it becomes a product and a sum that join element-wise chains.
///
/// A constant product per channel after a convolution goes the same way.
pub struct BatchNormFusion<'a> {
    /// Reads the statistics where they are stored.
    pub evaluate: &'a dyn Evaluate,
}

impl Pass for BatchNormFusion<'_> {
    fn name(&self) -> &'static str {
        "batch normalisation"
    }

    fn run(&self, graph: &mut Graph) -> Result<usize, GraphError> {
        let mut e = Editor::new(graph);
        for id in e.ids() {
            if e.get(id).is_none() {
                continue;
            }
            let Some((x, scale, shift)) = self.affine(&e, id)? else { continue };
            if !self.fold(&mut e, id, x, &scale, &shift)? && matches!(e.node(id).op, Op::BatchNorm { .. }) {
                spell_out(&mut e, id, x, &scale, &shift);
            }
        }
        e.finish()
    }
}

impl BatchNormFusion<'_> {
    /// `out = scale·x + shift` per channel.
    fn affine(&self, e: &Editor, id: NodeId) -> Result<Option<(ValueId, Vec<f64>, Vec<f64>)>, GraphError> {
        let node = e.node(id);
        match &node.op {
            Op::BatchNorm { epsilon, training: false, .. } => {
                let alone = node.outputs.iter().flatten().count() == 1;
                let Some(x) = node.input(0).filter(|&x| alone && e.is_f32(x)) else { return Ok(None) };
                let mut parts = Vec::new();
                for i in 1..5 {
                    let Some(v) = node.input(i) else { return Ok(None) };
                    let Some(values) = e.load_f64s(v, self.evaluate)? else { return Ok(None) };
                    parts.push(values);
                }
                let channels = e.dims(x).and_then(|d| d.get(1).copied());
                if parts.iter().any(|p| Some(p.len()) != channels) {
                    return Ok(None);
                }
                let [gamma, beta, mean, variance] = &parts[..] else { return Ok(None) };
                let scale: Vec<f64> =
                    gamma.iter().zip(variance).map(|(g, v)| g / (v + f64::from(*epsilon)).sqrt()).collect();
                let shift = beta.iter().zip(mean).zip(&scale).map(|((b, m), s)| b - m * s).collect();
                Ok(Some((x, scale, shift)))
            }
            Op::Binary(BinaryOp::Mul) => {
                let (Some(a), Some(b)) = (node.input(0), node.input(1)) else { return Ok(None) };
                let (x, c) = if e.is_constant(b) { (a, b) } else { (b, a) };
                let out = node.out();
                let product_like = e.maker(x).is_some_and(|n| channel_axis(e, &n.op, x).is_some());
                if !e.is_constant(c) || !product_like || !e.is_f32(x) || !e.same_dims(x, out) {
                    return Ok(None);
                }
                let (Some(dims), Some(c_dims)) = (e.dims(x), e.dims(c)) else { return Ok(None) };
                let Some(maker) = e.maker(x) else { return Ok(None) };
                let Some(axis) = channel_axis(e, &maker.op, x) else { return Ok(None) };
                if !is_per_channel(&c_dims, &dims, axis) {
                    return Ok(None);
                }
                let Some(values) = e.load_f64s(c, self.evaluate)? else { return Ok(None) };
                let channels = dims[axis];
                let scale: Vec<f64> =
                    (0..channels).map(|i| values[if values.len() == 1 { 0 } else { i }]).collect();
                Ok(Some((x, scale, vec![0.0; channels])))
            }
            _ => Ok(None),
        }
    }

    fn fold(
        &self,
        e: &mut Editor,
        id: NodeId,
        x: ValueId,
        scale: &[f64],
        shift: &[f64],
    ) -> Result<bool, GraphError> {
        let Some((product, node)) = e.producer(x) else { return Ok(false) };
        let op = node.op.clone();
        let node_inputs = node.inputs.clone();
        let input = |i: usize| node_inputs.get(i).copied().flatten();
        let (Some(axis), Some(dims)) = (channel_axis(e, &op, x), e.dims(x)) else { return Ok(false) };
        let plain = op.activation() == Some(&None) && input(3).is_none();
        let bn_axis = if matches!(e.node(id).op, Op::BatchNorm { .. }) { 1 } else { axis };
        if !e.private(x) || !plain || axis != bn_axis || dims[axis] != scale.len() {
            return Ok(false);
        }
        let (Some(w), Some(_)) = (input(1), input(0)) else { return Ok(false) };
        if !e.is_constant(w) {
            return Ok(false);
        }
        let bias = match input(2) {
            None => vec![0.0; scale.len()],
            Some(b) => match e.load_f64s(b, self.evaluate)? {
                Some(b) if b.len() == scale.len() => b,
                _ => return Ok(false),
            },
        };
        let bias: Vec<f32> =
            bias.iter().zip(scale).zip(shift).map(|((b, s), t)| (b * s + t) as f32).collect();
        let old_scale = match input(4) {
            None => vec![1.0; scale.len()],
            Some(s) => match e.load_f64s(s, self.evaluate)? {
                Some(s) => s,
                None => return Ok(false),
            },
        };
        let scale: Vec<f64> = old_scale.iter().zip(scale).map(|(a, b)| a * b).collect();
        let name = e.node(product).name.clone();
        let channels = scale.len();
        let mut inputs = vec![input(0), Some(w), None, None, None];
        match scaled_weights(e, &op, w, &scale) {
            Some(tensor) => inputs[1] = Some(e.add_constant(&format!("{name}.weight"), tensor)),
            None => {
                let scale: Vec<f32> = scale.iter().map(|&s| s as f32).collect();
                let tensor = Tensor::from_slice(&[channels], &scale);
                inputs[4] = Some(e.add_constant(&format!("{name}.weight_scale"), tensor));
            }
        }
        if bias.iter().any(|&b| b != 0.0) || input(2).is_some() {
            let tensor = Tensor::from_slice(&[channels], &bias);
            inputs[2] = Some(e.add_constant(&format!("{name}.bias"), tensor));
        }
        while inputs.last() == Some(&None) {
            inputs.pop();
        }
        e.absorb(id, product, op, inputs);
        Ok(true)
    }
}

/// Where the channels of the result are, for operators whose weights can take a scale.
pub fn channel_axis(e: &Editor, op: &Op, out: ValueId) -> Option<usize> {
    let rank = e.dims(out)?.len();
    match op {
        Op::Conv(a) if a.layout == crate::Layout::ChannelsFirst => Some(1),
        Op::ConvTranspose(a) if a.conv.layout == crate::Layout::ChannelsFirst => Some(1),
        Op::MatMul(_) if rank >= 2 => Some(rank - 1),
        _ => None,
    }
}

/// Whether a constant holds one element, or one per index of `axis`.
pub fn is_per_channel(constant: &[usize], dims: &[usize], axis: usize) -> bool {
    let count: usize = constant.iter().product();
    if count == 1 {
        return constant.len() <= dims.len();
    }
    let from_end = dims.len() - axis;
    constant.len() <= dims.len()
        && count == dims[axis]
        && constant.len() >= from_end
        && constant[constant.len() - from_end] == count
}

/// The weights times the scale, when they are in memory.
fn scaled_weights(e: &Editor, op: &Op, w: ValueId, scale: &[f64]) -> Option<Tensor> {
    let mut tensor = e.tensor(w).filter(|t| t.dtype() == crate::DType::F32)?.clone();
    let dims = tensor.dims().to_vec();
    let channel: Box<dyn Fn(usize) -> usize> = match op {
        Op::Conv(_) => {
            let row = tensor.len() / dims.first()?.max(&1);
            Box::new(move |i| i / row.max(1))
        }
        Op::ConvTranspose(a) => {
            let (ins, outs) = (*dims.first()?, *dims.get(1)?);
            let window: usize = dims[2..].iter().product();
            let per_group = ins / a.conv.groups.max(1);
            Box::new(move |i| (i / window / outs / per_group.max(1)) * outs + i / window % outs)
        }
        Op::MatMul(a) if dims.len() == 2 => {
            let columns = dims[1];
            if a.trans_b { Box::new(move |i| i / columns) } else { Box::new(move |i| i % columns) }
        }
        _ => return None,
    };
    for (i, x) in tensor.as_mut_slice::<f32>().iter_mut().enumerate() {
        *x = (f64::from(*x) * scale.get(channel(i))?) as f32;
    }
    Some(tensor)
}

/// `x·scale + shift` as two operators that broadcast over the picture.
fn spell_out(e: &mut Editor, id: NodeId, x: ValueId, scale: &[f64], shift: &[f64]) {
    let Some(ty) = e.ty(x).cloned() else { return };
    let rank = ty.shape.as_ref().map_or(0, Vec::len);
    let mut dims = vec![1; rank.saturating_sub(1)];
    if let Some(first) = dims.first_mut() {
        *first = scale.len();
    }
    let name = e.node(id).name.clone();
    let vector = |v: &[f64]| {
        let v: Vec<f32> = v.iter().map(|&x| x as f32).collect();
        Tensor::from_slice(&dims, &v)
    };
    let (scale, shift) = (vector(scale), vector(shift));
    let scale = e.add_constant(&format!("{name}.scale"), scale);
    let shift = e.add_constant(&format!("{name}.shift"), shift);
    let y = e.insert(id, &format!("{name}.scaled"), Op::Binary(BinaryOp::Mul), &[x, scale], ty);
    e.set_all(id, Op::Binary(BinaryOp::Add), &[y, shift]);
}
