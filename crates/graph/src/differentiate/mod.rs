//! Reverse-mode differentiation at compile time: from a graph to the same graph with its backward pass.
//!
//! ```
//! use lightering_graph::{
//!     BinaryOp, DType, DifferentiateOptions, Graph, Op, ReduceOp, TensorType, differentiate,
//! };
//! let mut graph = Graph::new("squares");
//! let x = graph.add_input("x", TensorType::fixed(DType::F32, &[3]));
//! let square = graph.add_node("square", Op::Binary(BinaryOp::Mul), &[x, x], 1)[0];
//! let sum = Op::Reduce { op: ReduceOp::Sum, keep_dims: false, noop_with_empty_axes: false };
//! let loss = graph.add_node("loss", sum, &[square], 1)[0];
//! graph.infer().unwrap();
//! let gradient = differentiate(&mut graph, loss, &[x], &DifferentiateOptions::default()).unwrap();
//! assert_eq!(graph.value(gradient[0].unwrap()).name, "grad/x");
//! graph.outputs = vec![loss, gradient[0].unwrap()];
//! graph.verify().unwrap();
//! ```
//!
//! The rule of each family of operators is a function in a file of its own. A rule gets the forward node and the
//! gradients of its results and hands gradients of its operands back with [`Backward::give`], only of those that
//! [`Backward::wants`] says are asked for, so that the backward graph holds nothing that nobody wants.

mod backward;
mod elementwise;
mod language;
mod linear;
mod loss;
mod movement;
mod norm;
mod prepare;
mod recurrent;
mod reduce;
mod resample;
#[cfg(test)]
mod tests;
mod window;

use std::collections::HashSet;

use crate::{Graph, GraphError, MaskRule, Node, Op, TrainOp, UnaryOp, ValueId, ValueKind};
use backward::{Backward, Step};

/// What [`differentiate`] does besides the plain derivative.
#[derive(Clone, Debug, Default)]
pub struct DifferentiateOptions {
    /// Values whose gradient does not go on to what they are made from. One that is itself asked for is still
    /// answered.
    pub stop: HashSet<ValueId>,
    /// Other derivatives than the exact one; the first that fits a node counts.
    pub rules: Vec<(Selector, GradientRule)>,
}

/// Which nodes a [`GradientRule`] is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// The node of this name.
    Node(String),
    /// All nodes whose operator has this name, as [`Op::name`] spells it.
    Operator(String),
}

impl Selector {
    fn fits(&self, node: &Node) -> bool {
        match self {
            Selector::Node(name) => node.name == *name,
            Selector::Operator(name) => node.op.name() == name,
        }
    }
}

/// A derivative that is put in place of the exact one. All but [`GradientRule::Exact`] hand the gradient of the first
/// result to the first operand and nothing to the others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum GradientRule {
    /// The true derivative; shields a node from a rule further down the list.
    Exact,
    /// As if the operator were the identity (Bengio et al., 2013): roundings, signs, quantisers.
    StraightThrough,
    /// The identity where the operand lies strictly between two bounds, else zero.
    StraightThroughWithin {
        /// Lower bound.
        min: f32,
        /// Upper bound.
        max: f32,
    },
    /// The identity where the rule holds for the operand, of which only one bit per element is kept for the backward
    /// pass (MobileTL, Chiang et al., 2023).
    Mask(MaskRule),
    /// The identity where the result lies above zero, else zero: the sign of the result is all that is needed, and
    /// where another gradient keeps the result anyway nothing is kept for this one.
    Positive,
}

/// Names ([`Op::name`]) of the operators that pass a gradient on.
pub const DIFFERENTIABLE: &[&str] = &[
    "Abs",
    "Acos",
    "Acosh",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "Celu",
    "ClipTo",
    "Cos",
    "Cosh",
    "Elu",
    "Erf",
    "Exp",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "LeakyRelu",
    "Log",
    "Mish",
    "Neg",
    "Reciprocal",
    "Relu",
    "Rsqrt",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Swish",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Mod",
    "FMod",
    "Pow",
    "PRelu",
    "Max",
    "Min",
    "SumOf",
    "MeanOf",
    "MaxOf",
    "MinOf",
    "Where",
    "Clip",
    "Cast",
    "Elementwise",
    "Dropout",
    "MatMul",
    "Gemm",
    "Einsum",
    "Det",
    "Conv",
    "ConvTranspose",
    "Col2Im",
    "MaxPool",
    "AveragePool",
    "LpPool",
    "GlobalMaxPool",
    "GlobalAveragePool",
    "GlobalLpPool",
    "MaxUnpool",
    "BatchNorm",
    "InstanceNorm",
    "GroupNorm",
    "LayerNorm",
    "RmsNorm",
    "LpNorm",
    "MeanVarianceNorm",
    "Lrn",
    "Softmax",
    "LogSoftmax",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
    "CumSum",
    "Attention",
    "RotaryEmbedding",
    "Reshape",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
    "Expand",
    "Tile",
    "Concat",
    "Split",
    "Slice",
    "Pad",
    "Gather",
    "GatherElements",
    "GatherNd",
    "ScatterElements",
    "ScatterNd",
    "DepthToSpace",
    "SpaceToDepth",
    "Resize",
    "GridSample",
    "AffineGrid",
    "CenterCropPad",
    "ReverseSequence",
    "Trilu",
    "TopK",
    "Rnn",
    "Gru",
    "Lstm",
    "NllLoss",
    "SoftmaxCrossEntropyLoss",
    "Normalise",
    "BatchStatistics",
    "CrossEntropy",
    "ChannelSum",
    "BlockMatMul",
    "Rope",
];

/// Names of the operators on floats whose derivative is zero wherever there is one: nothing passes them.
pub const ZERO_GRADIENT: &[&str] =
    &["Ceil", "Floor", "Round", "Sign", "Hardmax", "EyeLike", "ConstantOfShape", "Random"];

/// Appends the backward pass of `loss`, a single number, and returns its gradient with respect to each value of `wrt`:
/// states, constants, inputs, or values in the middle (feature taps). `None` where the loss does not depend on it.
///
/// The backward nodes come in reverse order of the forward nodes, contributions to one gradient are added up at once,
/// and only nodes on a path from a value of `wrt` to the loss have one: below the earliest wanted value nothing is
/// computed, and no gradient of a weight that is not asked for (Zhu et al., "PockEngine", 2023). Forward nodes that hide
/// what their gradient needs (chains of element-wise steps, activations whose derivative needs their operand) are split.
/// Names are `grad/` and the name of the value that a gradient belongs to.
///
/// # Errors
/// [`GraphError::Unsupported`] when an operator on a path has no derivative, naming the node and the value that asked
/// for it; [`GraphError::Node`] when a shape on a path is not fixed. The graph is then not to be used.
pub fn differentiate(
    graph: &mut Graph,
    loss: ValueId,
    wrt: &[ValueId],
    options: &DifferentiateOptions,
) -> Result<Vec<Option<ValueId>>, GraphError> {
    if let Some(id) = wrt.iter().chain([&loss]).find(|v| v.index() >= graph.values.len()) {
        return Err(GraphError::structure(graph, crate::error::missing_value(*id)));
    }
    if graph
        .iter_nodes()
        .any(|(_, n)| n.outputs.iter().flatten().any(|&v| graph.value(v).ty == crate::ValueType::Unknown))
    {
        graph.infer()?;
    }
    let asked = dependence(graph, loss, wrt, options);
    prepare::split(graph, &asked, options)?;
    let asked = dependence(graph, loss, wrt, options);
    let nodes = graph.node_ids();
    let mut b = Backward::new(graph, asked);
    b.seed(loss)?;
    for id in nodes.into_iter().rev() {
        let node = b.graph().node(id).clone();
        let dy: Vec<Option<ValueId>> = node
            .outputs
            .iter()
            .map(|o| o.filter(|v| !options.stop.contains(v)).and_then(|v| b.gradient(v)))
            .collect();
        if dy.iter().all(Option::is_none) || !node.inputs.iter().flatten().any(|&v| b.wanted(v)) {
            continue;
        }
        b.enter(id);
        match rule_of(&node, options) {
            GradientRule::Exact => exact(&mut b, &node, &dy)?,
            other => surrogate(&mut b, &node, &dy, other)?,
        }
    }
    let gradients = wrt.iter().map(|&v| b.gradient(v)).collect();
    b.finish();
    Ok(gradients)
}

/// For each value the first of `wrt` that it depends on, if the loss depends on the value in turn.
fn dependence(
    graph: &Graph,
    loss: ValueId,
    wrt: &[ValueId],
    options: &DifferentiateOptions,
) -> Vec<Option<ValueId>> {
    let mut asked: Vec<Option<ValueId>> = vec![None; graph.values.len()];
    let float = |v: ValueId| graph.value(v).ty.tensor().is_none_or(|t| t.dtype.is_float());
    for &v in wrt {
        asked[v.index()] = float(v).then_some(v);
    }
    for (_, node) in graph.iter_nodes() {
        let Some(by) = node.inputs.iter().flatten().find_map(|v| asked[v.index()]) else { continue };
        // The integers of a quantiser carry the gradient of a straight-through rule.
        let quantised =
            matches!(node.op, Op::QuantizeLinear(_)) || rule_of(node, options) != GradientRule::Exact;
        for &v in node.outputs.iter().flatten() {
            if asked[v.index()].is_none() && !options.stop.contains(&v) && (quantised || float(v)) {
                asked[v.index()] = Some(by);
            }
        }
    }
    let mut reaches = vec![false; graph.values.len()];
    reaches[loss.index()] = true;
    for (_, node) in graph.iter_nodes().rev() {
        if node.outputs.iter().flatten().any(|v| reaches[v.index()]) {
            for v in node.inputs.iter().flatten() {
                reaches[v.index()] = true;
            }
        }
    }
    asked.into_iter().zip(reaches).map(|(by, reaches)| by.filter(|_| reaches)).collect()
}

fn rule_of(node: &Node, options: &DifferentiateOptions) -> GradientRule {
    options.rules.iter().find(|(s, _)| s.fits(node)).map_or(GradientRule::Exact, |(_, rule)| *rule)
}

/// A rule in place of the derivative.
fn surrogate(b: &mut Backward<'_>, node: &Node, dy: &[Option<ValueId>], rule: GradientRule) -> Step {
    let (Some(dy), Some(x)) = (dy.first().copied().flatten(), node.input(0)) else { return Ok(()) };
    if !b.wants(0) {
        return Ok(());
    }
    let dims = b.dims(x)?;
    let dy = b.reduce_to(dy, &dims)?;
    let dx = match rule {
        GradientRule::Exact | GradientRule::StraightThrough => dy,
        GradientRule::StraightThroughWithin { min, max } => {
            let clip = TrainOp::UnaryGrad(UnaryOp::ClipTo { min, max });
            let x = b.cast_like(x, dy)?;
            b.train(clip, &[x, dy])?
        }
        GradientRule::Positive => b.train(TrainOp::UnaryGrad(UnaryOp::Relu), &[node.out(), dy])?,
        GradientRule::Mask(rule) => {
            let bits = b.sign_mask(rule, x)?;
            b.train(TrainOp::MaskGrad, &[bits, dy])?
        }
    };
    b.give(0, dx)
}

/// The true derivative.
fn exact(b: &mut Backward<'_>, n: &Node, dy: &[Option<ValueId>]) -> Step {
    let name = n.op.name();
    if ZERO_GRADIENT.contains(&name) {
        return Ok(());
    }
    if !DIFFERENTIABLE.contains(&name) {
        let hint = match n.op {
            Op::QuantizeLinear(_) | Op::DequantizeLinear(_) | Op::QLinearConv(_) | Op::QLinearMatMul(_) => {
                "; give it a straight-through rule"
            }
            _ => "; give it a rule, stop the gradient before it, or ask for later values only",
        };
        return b.unsupported(format!("it has no derivative{hint}"));
    }
    match &n.op {
        Op::Unary(_)
        | Op::Binary(_)
        | Op::Variadic(_)
        | Op::Where
        | Op::Clip
        | Op::Cast { .. }
        | Op::Dropout { .. } => elementwise::rule(b, n, dy),
        Op::MatMul(_) | Op::Gemm(_) | Op::Einsum { .. } | Op::Det => linear::rule(b, n, dy),
        Op::Conv(_)
        | Op::ConvTranspose(_)
        | Op::Col2Im { .. }
        | Op::Pool(_)
        | Op::GlobalPool { .. }
        | Op::MaxUnpool { .. } => window::rule(b, n, dy),
        Op::BatchNorm { .. }
        | Op::InstanceNorm { .. }
        | Op::GroupNorm { .. }
        | Op::LayerNorm { .. }
        | Op::RmsNorm { .. }
        | Op::LpNorm { .. }
        | Op::MeanVarianceNorm { .. }
        | Op::Lrn { .. } => norm::rule(b, n, dy),
        Op::Softmax { .. } | Op::Reduce { .. } | Op::CumSum { .. } => reduce::rule(b, n, dy),
        Op::Attention(_) | Op::RotaryEmbedding { .. } | Op::Rnn(_) | Op::Gru(_) | Op::Lstm(_) => {
            recurrent::rule(b, n, dy)
        }
        Op::Resize(_) | Op::GridSample { .. } | Op::AffineGrid { .. } => resample::rule(b, n, dy),
        Op::NllLoss(_) | Op::SoftmaxCrossEntropyLoss(_) => loss::rule(b, n, dy),
        Op::Lm(op) => language::rule(b, op, n, dy),
        Op::Train(op) => match &**op {
            TrainOp::CrossEntropy { .. } => loss::rule(b, n, dy),
            _ => norm::rule(b, n, dy),
        },
        _ => movement::rule(b, n, dy),
    }
}

/// Makes states of the constants that `filter` picks by name and type, with their value as first content, so that
/// updates can write them; returns them in order. Only floats are picked.
pub fn parameters_to_states(
    graph: &mut Graph,
    mut filter: impl FnMut(&str, &crate::TensorType) -> bool,
) -> Vec<ValueId> {
    let mut states = Vec::new();
    for (i, value) in graph.values.iter_mut().enumerate() {
        let (ValueKind::Constant(constant), Some(ty)) = (&value.kind, value.ty.tensor()) else { continue };
        if ty.dtype.is_float() && filter(&value.name, ty) {
            value.kind = ValueKind::State(Some(constant.clone()));
            states.push(ValueId(i as u32));
        }
    }
    states
}
