//! Inverted residual blocks (Sandler et al., 2018) in any graph: a pointwise convolution that widens, a depthwise one, a
//! pointwise one that narrows and has no activation.

use lightering_graph::{Graph, Node, NodeId, Op, UnaryOp, ValueId};

use super::layers::{dims, is_parameter, only_reader};

/// What the search looks for, as a message tells it.
pub const PATTERN: &str = "Conv 1x1 -> [BatchNormalization] -> activation -> depthwise Conv -> [BatchNormalization] -> [activation] -> \
     [squeeze and excitation] -> Conv 1x1 -> [BatchNormalization] without activation -> [Add]";

/// A convolution with what follows it.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// The convolution's node.
    pub node: String,
    /// Its weight.
    pub weight: Option<String>,
    /// Its bias and the shift of its normalisation.
    pub shifts: Vec<String>,
    /// The scale of its normalisation.
    pub scale: Option<String>,
    /// The normalisation's node.
    pub norm: Option<String>,
    /// The activation's node and function.
    pub activation: Option<(String, UnaryOp)>,
}

/// An inverted residual block.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// Position of its first node.
    pub at: usize,
    /// Widens; absent where the expansion is 1.
    pub expand: Option<Part>,
    /// Filters each channel.
    pub depthwise: Part,
    /// Narrows.
    pub project: Part,
    /// Parameters of squeeze and excitation.
    pub squeeze: Vec<String>,
    /// Its input is added to its result.
    pub residual: bool,
}

/// All blocks, in order.
pub fn find(graph: &Graph) -> Vec<Block> {
    let finder = Finder { graph, consumers: graph.consumers() };
    let positions: std::collections::HashMap<NodeId, usize> =
        graph.iter_nodes().enumerate().map(|(at, (id, _))| (id, at)).collect();
    graph.iter_nodes().filter_map(|(id, _)| finder.around(id, &positions)).collect()
}

struct Finder<'a> {
    graph: &'a Graph,
    consumers: Vec<Vec<NodeId>>,
}

fn is_activation(node: &Node) -> Option<UnaryOp> {
    match node.op {
        Op::Unary(
            op @ (UnaryOp::Relu
            | UnaryOp::ClipTo { .. }
            | UnaryOp::HardSwish
            | UnaryOp::Swish { .. }
            | UnaryOp::LeakyRelu { .. }),
        ) => Some(op),
        _ => None,
    }
}

impl Finder<'_> {
    fn conv(&self, id: NodeId) -> Option<(&Node, Vec<usize>, usize)> {
        let node = self.graph.node(id);
        let Op::Conv(a) = &node.op else { return None };
        let w = dims(self.graph, node.input(1)?);
        (w.len() == 4).then_some((node, w, a.groups))
    }

    fn is_depthwise(&self, id: NodeId) -> bool {
        self.conv(id).is_some_and(|(_, w, groups)| groups > 1 && groups == w[0] && w[1] == 1)
    }

    fn is_pointwise(&self, id: NodeId) -> bool {
        self.conv(id).is_some_and(|(_, w, groups)| groups == 1 && w[2..] == [1, 1])
    }

    fn reader(&self, v: ValueId) -> Option<NodeId> {
        only_reader(self.graph, &self.consumers, v)
    }

    /// A convolution, its normalisation and its activation; and the value behind them.
    fn part(&self, id: NodeId) -> (Part, ValueId) {
        let node = self.graph.node(id);
        let name = |v: ValueId| self.graph.value(v).name.clone();
        let learnt = |node: &Node, i: usize| node.input(i).filter(|&v| is_parameter(self.graph, v)).map(name);
        let mut part = Part {
            node: node.name.clone(),
            weight: learnt(node, 1),
            shifts: learnt(node, 2).into_iter().collect(),
            scale: None,
            norm: None,
            activation: None,
        };
        let mut out = node.out();
        if let Some(next) = self.reader(out).map(|id| self.graph.node(id))
            && matches!(next.op, Op::BatchNorm { .. })
        {
            part.scale = learnt(next, 1);
            part.shifts.extend(learnt(next, 2));
            part.norm = Some(next.name.clone());
            out = next.out();
        }
        if let Some(next) = self.reader(out).map(|id| self.graph.node(id))
            && let Some(op) = is_activation(next)
        {
            part.activation = Some((next.name.clone(), op));
            out = next.out();
        }
        (part, out)
    }

    /// Behind squeeze and excitation of `v`, if that is what reads it: the scaled value and the parameters on the way.
    fn squeeze(&self, v: ValueId) -> Option<(ValueId, Vec<String>)> {
        let readers = &self.consumers[v.index()];
        let product = readers
            .iter()
            .copied()
            .find(|&id| matches!(self.graph.node(id).op, Op::Binary(lightering_graph::BinaryOp::Mul)))?;
        let node = self.graph.node(product);
        let gate = node.inputs.iter().flatten().copied().find(|&x| x != v)?;
        let mut parameters = Vec::new();
        let mut pools = false;
        let (mut stack, mut seen) = (vec![gate], std::collections::HashSet::new());
        while let Some(x) = stack.pop() {
            if x == v || !seen.insert(x) {
                continue;
            }
            if is_parameter(self.graph, x) {
                parameters.push(self.graph.value(x).name.clone());
            }
            if let Some(id) = self.graph.producer(x) {
                let maker = self.graph.node(id);
                pools |= matches!(maker.op, Op::GlobalPool { .. } | Op::Reduce { .. } | Op::Pool(_));
                // A gate is a few nodes; anything longer is something else.
                if seen.len() > 64 {
                    return None;
                }
                stack.extend(maker.inputs.iter().flatten());
            }
        }
        parameters.reverse();
        (pools && readers.len() == 2).then_some((node.out(), parameters))
    }

    fn around(&self, id: NodeId, positions: &std::collections::HashMap<NodeId, usize>) -> Option<Block> {
        if !self.is_depthwise(id) {
            return None;
        }
        let (depthwise, mut out) = self.part(id);
        let mut squeeze = Vec::new();
        if let Some((scaled, parameters)) = self.squeeze(out) {
            (out, squeeze) = (scaled, parameters);
            // Networks that put the activation behind the gate.
            if let Some(next) = self.reader(out).map(|id| self.graph.node(id))
                && is_activation(next).is_some()
            {
                out = next.out();
            }
        }
        let last = self.reader(out).filter(|&id| self.is_pointwise(id))?;
        let (project, result) = self.part(last);
        if project.activation.is_some() {
            return None;
        }
        // In front: activation, normalisation, pointwise convolution.
        let mut from = self.graph.producer(self.graph.node(id).input(0)?);
        let mut first = None;
        for _ in 0..3 {
            let Some(maker) = from else { break };
            if self.is_pointwise(maker) {
                first = Some(maker);
                break;
            }
            let node = self.graph.node(maker);
            if is_activation(node).is_none() && !matches!(node.op, Op::BatchNorm { .. }) {
                break;
            }
            from = node.input(0).and_then(|v| self.graph.producer(v));
        }
        let expand = first.map(|id| self.part(id).0).filter(|p| p.activation.is_some());
        let first = first.filter(|_| expand.is_some()).unwrap_or(id);
        let residual = self
            .reader(result)
            .is_some_and(|id| matches!(self.graph.node(id).op, Op::Binary(lightering_graph::BinaryOp::Add)));
        Some(Block { at: positions[&first], expand, depthwise, project, squeeze, residual })
    }
}
