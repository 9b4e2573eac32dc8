//! What a model consists of, as update schemes speak of it: layers with weights, parameters by their role, blocks.

use std::collections::HashMap;

use lightering_graph::passes::{Evaluate, LayoutChoice, Pass, Pipeline};
use lightering_graph::{BinaryOp, Constant, Graph, NodeId, Op, Tensor, TensorType, ValueId, ValueKind};

use super::blocks::{self, Block};
use crate::TrainError;
use crate::step::{is_learnt, trainable_parameters};

/// What a parameter does in its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A matrix or filters.
    Weight,
    /// Added per channel: a bias, the shift of a normalisation.
    Shift,
    /// Multiplied per channel: the scale of a normalisation.
    Scale,
    /// A table, an embedding of positions.
    Other,
}

/// A parameter tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// It belongs to a normalisation.
    pub norm: bool,
    /// Position of the first node that reads it.
    pub at: usize,
    /// Elements.
    pub elements: usize,
}

/// A layer with a weight: a convolution or a product.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// Its node.
    pub node: String,
    /// Position of the node.
    pub at: usize,
    /// Its weight.
    pub weight: String,
    /// Sizes of the weight.
    pub dims: Vec<usize>,
    /// Axis of the weight that counts input channels (of a depthwise layer its channels); `None` where channels cannot be
    /// chosen one by one, as in grouped convolutions.
    pub axis: Option<usize>,
    /// Biases, and the shift of a normalisation behind it.
    pub shifts: Vec<String>,
    /// Elements of its input.
    pub inputs: usize,
    /// Elements of its result.
    pub outputs: usize,
}

/// A model as schemes see it.
#[derive(Clone, Debug)]
pub struct Anatomy {
    /// The graph that positions refer to: that of the model, its operators spelled in the plainest way.
    pub graph: Graph,
    /// All parameters, in order of first use.
    pub parameters: Vec<Parameter>,
    /// Layers with weights, in order.
    pub layers: Vec<Layer>,
    /// Inverted residual blocks, in order.
    pub blocks: Vec<Block>,
}

impl Anatomy {
    /// Looks at a forward graph with inferred types, as [`build_step`](crate::build_step) gets it.
    ///
    /// # Errors
    /// When the graph turns out to be contradictory.
    pub fn of(model: &Graph, evaluate: &dyn Evaluate) -> Result<Anatomy, TrainError> {
        let mut graph = model.clone();
        for v in trainable_parameters(model) {
            let value = graph.value_mut(v);
            if let ValueKind::Constant(constant) = &value.kind {
                value.kind = ValueKind::State(Some(constant.clone()));
            }
        }
        Pipeline::before_differentiation(evaluate).without(LayoutChoice.name()).run(&mut graph)?;
        let parameters = parameters(&graph);
        let layers = layers(&graph);
        let blocks = blocks::find(&graph);
        Ok(Anatomy { graph, parameters, layers, blocks })
    }

    /// A parameter's elements, read from where it is stored.
    ///
    /// # Errors
    /// There is no such parameter, or its file cannot be read.
    pub fn read(&self, name: &str, evaluate: &dyn Evaluate) -> Result<Tensor, TrainError> {
        let missing =
            || TrainError::invalid("update scheme", format!("no values of {name:?}"), "a parameter");
        let value = self.graph.find(name).map(|v| self.graph.value(v)).ok_or_else(missing)?;
        let ValueKind::State(Some(constant)) = &value.kind else { return Err(missing()) };
        match (constant, value.ty.tensor()) {
            (Constant::Inline(tensor), _) => Ok((**tensor).clone()),
            (Constant::Stored(stored), Some(ty)) => evaluate.load(stored, ty)?.ok_or_else(missing),
            _ => Err(missing()),
        }
    }

    /// Samples of a batch, where the first input tells.
    pub fn batch(&self) -> Option<usize> {
        let input = self.graph.inputs.first()?;
        self.graph.value(*input).ty.tensor()?.dims()?.first().copied()
    }

    /// Position of the `count`-th last layer, 0 if there are fewer.
    pub fn start_of_last(&self, count: usize) -> usize {
        match self.layers.len().checked_sub(count) {
            Some(i) => self.layers.get(i).map_or(usize::MAX, |l| l.at),
            None => 0,
        }
    }
}

pub(super) fn dims(graph: &Graph, v: ValueId) -> Vec<usize> {
    graph.value(v).ty.tensor().and_then(TensorType::dims).unwrap_or_default()
}

pub(super) fn is_parameter(graph: &Graph, v: ValueId) -> bool {
    matches!(graph.value(v).kind, ValueKind::State(Some(_)))
}

fn role_of(op: &Op, operand: usize, dims: &[usize]) -> (Role, bool) {
    let vector = dims.iter().filter(|d| **d != 1).count() <= 1;
    match (op, operand) {
        (Op::Conv(_) | Op::ConvTranspose(_) | Op::Gemm(_) | Op::MatMul(_), 1) => (Role::Weight, false),
        (Op::Conv(_) | Op::ConvTranspose(_) | Op::Gemm(_) | Op::MatMul(_), 2) => (Role::Shift, false),
        (Op::MatMul(_), 0) | (Op::Rnn(_) | Op::Gru(_) | Op::Lstm(_), 1 | 2) => (Role::Weight, false),
        (Op::Rnn(_) | Op::Gru(_) | Op::Lstm(_), 3) => (Role::Shift, false),
        (
            Op::BatchNorm { .. }
            | Op::InstanceNorm { .. }
            | Op::GroupNorm { .. }
            | Op::LayerNorm { .. }
            | Op::RmsNorm { .. },
            _,
        ) => (if operand == 1 { Role::Scale } else { Role::Shift }, true),
        (Op::Binary(BinaryOp::Add | BinaryOp::Sub), _) if vector => (Role::Shift, false),
        (Op::Binary(BinaryOp::Mul | BinaryOp::Div), _) if vector => (Role::Scale, false),
        _ => (Role::Other, false),
    }
}

fn parameters(graph: &Graph) -> Vec<Parameter> {
    let mut seen = HashMap::new();
    let mut list = Vec::new();
    for (at, (_, node)) in graph.iter_nodes().enumerate() {
        for (operand, v) in node.inputs.iter().enumerate() {
            let Some(v) = *v else { continue };
            if !is_parameter(graph, v) || !is_learnt(graph, node, operand, v) || seen.insert(v, ()).is_some()
            {
                continue;
            }
            let dims = dims(graph, v);
            let (role, norm) = role_of(&node.op, operand, &dims);
            let elements = dims.iter().product();
            list.push(Parameter { name: graph.value(v).name.clone(), role, norm, at, elements });
        }
    }
    list
}

fn layers(graph: &Graph) -> Vec<Layer> {
    let consumers = graph.consumers();
    let mut list = Vec::new();
    for (at, (_, node)) in graph.iter_nodes().enumerate() {
        let Some(weight) = node.input(1).filter(|&w| is_parameter(graph, w)) else { continue };
        let dims = dims(graph, weight);
        let axis = match &node.op {
            Op::Conv(a) if a.groups == 1 => Some(1),
            Op::Conv(a) if dims.len() > 1 && a.groups == dims[0] && dims[1] == 1 => Some(0),
            Op::Gemm(a) if dims.len() == 2 => Some(usize::from(a.trans_b)),
            Op::MatMul(a) if dims.len() == 2 => Some(usize::from(a.trans_b)),
            Op::Conv(_) | Op::ConvTranspose(_) | Op::Gemm(_) | Op::MatMul(_) => None,
            _ => continue,
        };
        let name = |v: ValueId| graph.value(v).name.clone();
        let mut shifts: Vec<String> =
            node.input(2).filter(|&b| is_parameter(graph, b)).map(name).into_iter().collect();
        if let Some(next) = only_reader(graph, &consumers, node.out()) {
            let next = graph.node(next);
            let operands: &[usize] = match &next.op {
                Op::BatchNorm { .. } => &[2],
                Op::Binary(BinaryOp::Add) => &[0, 1],
                _ => &[],
            };
            for v in operands.iter().filter_map(|&i| next.input(i)) {
                if is_parameter(graph, v) && role_of(&next.op, 2, &self::dims(graph, v)).0 == Role::Shift {
                    shifts.push(name(v));
                }
            }
        }
        let elements = |v: Option<ValueId>| v.map_or(0, |v| self::dims(graph, v).iter().product());
        list.push(Layer {
            node: node.name.clone(),
            at,
            weight: name(weight),
            dims,
            axis,
            shifts,
            inputs: elements(node.input(0)),
            outputs: elements(node.output(0)),
        });
    }
    list
}

/// The node that alone reads `v`.
pub(super) fn only_reader(graph: &Graph, consumers: &[Vec<NodeId>], v: ValueId) -> Option<NodeId> {
    match consumers[v.index()][..] {
        [one] if !graph.outputs.contains(&v) => Some(one),
        _ => None,
    }
}
