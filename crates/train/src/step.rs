//! A training step as one graph: forward pass, loss, backward pass and updates, beside an evaluation over the same
//! parameters. What the engine plans, it plans for all of it.

use std::collections::{HashMap, HashSet};

use lightering_graph::passes::{
    BatchNormForTraining, BatchNormFusion, BatchNormMode, Evaluate, Pass, Pipeline, PlaceUpdates, keep_signs,
    slice_weight_gradient,
};
use lightering_graph::{
    BinaryOp, DType, DifferentiateOptions, EIGHT_BIT_BLOCK, EIGHT_BIT_LEN, Graph, Node, Op, ReduceOp, Tensor,
    TensorType, TrainOp, UnaryOp, UpdateRule, ValueId, ValueKind, differentiate,
};

use crate::{LABEL, Loss, TrainError};

/// Input of a step: `[rate, scale, correction1, correction2]`, see [`TrainOp::Update`].
pub const SCHEDULE: &str = "schedule";
/// Output of a step: the mean loss of the batch.
pub const LOSS: &str = "loss";
/// Name of an output of a model that is added to the loss of a step: a single number, such as the evenness of a router.
pub const AUXILIARY_LOSS: &str = "auxiliary_loss";
/// Before the names of everything that belongs to the evaluation.
pub const EVALUATION: &str = "eval/";
/// Before the names of an optimizer's moments.
const MOMENTS: [&str; 2] = ["moment1/", "moment2/"];

/// What becomes of a parameter tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// All of it is trained.
    Whole,
    /// These channels along the axis are trained, ascending (PockEngine: slices of input channels).
    Channels {
        /// Axis of the parameter.
        axis: usize,
        /// Which of them.
        channels: Vec<usize>,
    },
}

/// How a step is made.
#[derive(Clone, Debug)]
pub struct StepOptions {
    /// What is minimised.
    pub loss: Loss,
    /// How parameters follow their gradients.
    pub rule: UpdateRule,
    /// Parameters with fewer than two dimensions (biases, scales of normalisations) keep out of weight decay.
    pub decay_matrices_only: bool,
    /// Largest norm of all gradients together; larger ones are scaled down.
    pub clip: Option<f32>,
    /// Statistics of batches are computed and tracked, or the trained ones are kept.
    pub batch_norm: BatchNormMode,
    /// Batch normalisations, by name of their node, that do otherwise.
    pub batch_norm_of: HashMap<String, BatchNormMode>,
    /// Which parameters change; all if not given.
    pub scheme: Option<HashMap<String, Change>>,
    /// Other derivatives.
    pub differentiate: DifferentiateOptions,
    /// Every parameter changes as soon as its gradient is there, so that no two gradients are kept (PockEngine). Clipping
    /// needs all of them first, whatever this says.
    pub early_apply: bool,
}

impl StepOptions {
    /// All parameters change, statistics of batches are tracked, nothing is clipped.
    pub fn new(loss: Loss, rule: UpdateRule) -> StepOptions {
        StepOptions {
            loss,
            rule,
            decay_matrices_only: false,
            clip: None,
            batch_norm: BatchNormMode::Train,
            batch_norm_of: HashMap::new(),
            scheme: None,
            differentiate: DifferentiateOptions::default(),
            early_apply: true,
        }
    }
}

/// A training step and what to call its parts.
#[derive(Clone, Debug)]
pub struct Step {
    /// All of it; types are inferred.
    pub graph: Graph,
    /// The parameters that change, by name.
    pub parameters: Vec<String>,
    /// The optimizer's moments, by name; with the parameters, everything that a checkpoint holds but running statistics.
    pub moments: Vec<String>,
    /// Statistics that batch normalisations track.
    pub statistics: Vec<String>,
    /// Inputs of the model.
    pub inputs: Vec<String>,
    /// First output of the model for the batch of the step.
    pub output: String,
    /// The same for the batch of the evaluation, and its loss.
    pub evaluation: [String; 2],
    /// The scalar loss within the graph.
    pub loss: ValueId,
}

/// Constants of a forward graph that training may change: the operands that are weights by the meaning of their operator,
/// and what is added to or multiplied with activations as a learnt bias, scale or table.
pub fn trainable_parameters(graph: &Graph) -> Vec<ValueId> {
    let mut found = HashSet::new();
    for (_, node) in graph.iter_nodes() {
        for (operand, value) in node.inputs.iter().enumerate() {
            let Some(value) = *value else { continue };
            let source = stored_form(graph, value);
            if is_float_constant(graph, source) && is_learnt(graph, node, operand, source) {
                found.insert(source);
            }
        }
    }
    let mut list: Vec<ValueId> = found.into_iter().collect();
    list.sort_unstable();
    list
}

/// What a value is made from by only moving elements: exporters store weights transposed.
fn stored_form(graph: &Graph, value: ValueId) -> ValueId {
    let mut at = value;
    while let Some(id) = graph.producer(at) {
        let node = graph.node(id);
        match (&node.op, node.input(0)) {
            (
                Op::Transpose { .. }
                | Op::Reshape { .. }
                | Op::Flatten { .. }
                | Op::Squeeze
                | Op::Unsqueeze
                | Op::Unary(UnaryOp::Identity),
                Some(source),
            ) => at = source,
            _ => break,
        }
    }
    at
}

pub(crate) fn is_float_constant(graph: &Graph, value: ValueId) -> bool {
    let v = graph.value(value);
    matches!(v.kind, ValueKind::Constant(_)) && v.ty.tensor().is_some_and(|t| t.dtype == DType::F32)
}

/// Whether an operand is a weight by the meaning of its operator.
pub(crate) fn is_learnt(graph: &Graph, node: &Node, operand: usize, value: ValueId) -> bool {
    match &node.op {
        Op::Conv(_) | Op::ConvTranspose(_) | Op::Gemm(_) => operand == 1 || operand == 2,
        Op::MatMul(_) => operand <= 2,
        Op::BatchNorm { .. } => operand == 1 || operand == 2,
        Op::Train(op) => matches!(**op, TrainOp::Normalise { .. }) && (operand == 3 || operand == 4),
        Op::InstanceNorm { .. } | Op::GroupNorm { .. } | Op::LayerNorm { .. } | Op::RmsNorm { .. } => {
            operand > 0
        }
        Op::Rnn(_) | Op::Gru(_) | Op::Lstm(_) => (1..=3).contains(&operand) || operand == 7,
        Op::Gather { .. } => operand == 0,
        Op::Binary(BinaryOp::PRelu) => operand == 1,
        // A number alone is a constant of the formula; numbers far below zero are a mask.
        Op::Binary(BinaryOp::Add | BinaryOp::Sub | BinaryOp::Mul | BinaryOp::Div) => {
            let v = graph.value(value);
            let elements = v.ty.tensor().and_then(TensorType::elements).unwrap_or(0);
            let mask = v.tensor().is_some_and(|t| t.as_slice::<f32>().iter().any(|x| *x < MASKED));
            elements > 1 && !mask
        }
        _ => false,
    }
}

/// Makes constants of their own of the copies that exporters put between a constant and its users where two parameters
/// happen to start with the same values; trained, they part.
pub fn separate_copies(graph: &mut Graph) {
    for id in graph.node_ids() {
        let node = graph.node(id);
        if let (Op::Unary(UnaryOp::Identity), Some(source)) = (&node.op, node.input(0))
            && matches!(graph.value(source).kind, ValueKind::Constant(_))
        {
            let (copy, value) = (node.out(), graph.value(source).clone());
            graph.value_mut(copy).ty = value.ty;
            graph.value_mut(copy).kind = value.kind;
            graph.remove_node(id);
        }
    }
}

/// Elements below this are no learnt values but hide positions.
const MASKED: f32 = -1e4;

/// Makes the step of `model`, a forward graph whose inputs have fixed shapes for the batch of training, whose types are
/// inferred and which no pass has fused. The last inputs of a batch are those of the model and [`LABEL`] of type `label`.
///
/// # Errors
/// When an operator above the earliest trained parameter has no derivative, the loss does not fit the output, or the scheme
/// names what is not there.
pub fn build_step(
    model: &Graph,
    label: &TensorType,
    evaluate: &dyn Evaluate,
    options: &StepOptions,
) -> Result<Step, TrainError> {
    let mut train = model.clone();
    separate_copies(&mut train);
    let learnt = trainable_parameters(&train);
    let names: HashSet<String> = learnt.iter().map(|&v| train.value(v).name.clone()).collect();
    if let Some(scheme) = &options.scheme
        && let Some(missing) = scheme.keys().find(|name| !names.contains(*name))
    {
        return Err(TrainError::invalid(
            "update scheme",
            format!("{missing:?} is no parameter of the model"),
            "names that `lighter inspect --weights` lists",
        ));
    }
    for v in learnt {
        let value = train.value_mut(v);
        let wanted = options.scheme.as_ref().is_none_or(|s| s.contains_key(&value.name));
        if wanted && let ValueKind::Constant(constant) = &value.kind {
            value.kind = ValueKind::State(Some(constant.clone()));
        }
    }
    let mode_of = |node: &str| options.batch_norm_of.get(node).copied().unwrap_or(options.batch_norm);
    BatchNormForTraining { mode: BatchNormMode::Train }
        .run_on(&mut train, |node| mode_of(node) == BatchNormMode::Train)?;
    // What neither learns nor tracks is part of the layer before it.
    BatchNormFusion { evaluate }.run(&mut train)?;
    BatchNormForTraining { mode: BatchNormMode::Frozen }.run(&mut train)?;
    Pipeline::before_differentiation(evaluate).run(&mut train)?;
    train.infer()?;
    let inference = inference_of(&train);
    // The evaluation comes first: it reads what the step then overwrites.
    let mut graph = Graph::new(&model.name);
    graph.sources.clone_from(&model.sources);
    let there = graph.embed(&inference, EVALUATION, &HashMap::new());
    let mut shared = HashMap::new();
    for (i, value) in train.values.iter().enumerate() {
        if matches!(value.kind, ValueKind::Constant(_) | ValueKind::State(_)) {
            graph.value_mut(there[i]).name.clone_from(&value.name);
            shared.insert(ValueId(i as u32), there[i]);
        }
    }
    let here = graph.embed(&train, "", &shared);
    let output_of = |map: &[ValueId]| train.outputs.iter().map(|v| map[v.index()]).collect::<Vec<_>>();
    let label_here = graph.add_input(LABEL, label.clone());
    let label_there = graph.add_input(format!("{EVALUATION}{LABEL}"), label.clone());
    let eval_loss = options.loss.append(&mut graph, &output_of(&there), label_there)?;
    let mut loss = options.loss.append(&mut graph, &output_of(&here), label_here)?;
    let auxiliary = train.outputs.iter().find(|v| train.value(**v).name == AUXILIARY_LOSS);
    if let Some(term) = auxiliary {
        let inputs = [loss, here[term.index()]];
        loss = graph.add_node("loss with auxiliary", Op::Binary(BinaryOp::Add), &inputs, 1)[0];
    }
    graph.infer()?;
    let parameters: Vec<ValueId> = graph
        .values
        .iter()
        .enumerate()
        .filter(|(_, v)| matches!(v.kind, ValueKind::State(_)) && names.contains(&v.name))
        .map(|(i, _)| ValueId(i as u32))
        .collect();
    let statistics = graph
        .values
        .iter()
        .filter(|v| matches!(v.kind, ValueKind::State(_)) && !names.contains(&v.name))
        .map(|v| v.name.clone())
        .collect();
    let gradients = differentiate(&mut graph, loss, &parameters, &options.differentiate)?;
    let mut pairs: Vec<(ValueId, ValueId)> =
        parameters.iter().zip(&gradients).filter_map(|(&p, g)| Some((p, (*g)?))).collect();
    if pairs.is_empty() {
        return Err(TrainError::invalid(
            "model",
            "the loss depends on no parameter that may change",
            "a model with weights, and a scheme that names some",
        ));
    }
    let schedule = graph.add_input(SCHEDULE, TensorType::fixed(DType::F32, &[4]));
    let trained: Vec<String> = pairs.iter().map(|(p, _)| graph.value(*p).name.clone()).collect();
    let changes: Vec<Change> = trained
        .iter()
        .map(|name| options.scheme.as_ref().and_then(|s| s.get(name)).cloned().unwrap_or(Change::Whole))
        .collect();
    let mut lists = Vec::new();
    for (i, change) in changes.iter().enumerate() {
        lists.push(match change {
            Change::Whole => None,
            Change::Channels { axis, channels } => {
                Some(slice_gradient(&mut graph, &trained[i], &mut pairs[i].1, *axis, channels)?)
            }
        });
    }
    let schedule = match options.clip {
        None => schedule,
        Some(most) => clipped(&mut graph, schedule, &pairs, most),
    };
    let mut moments = Vec::new();
    for (((parameter, gradient), list), (name, change)) in
        pairs.iter().zip(&lists).zip(trained.iter().zip(&changes))
    {
        let ty = graph.value(*gradient).ty.tensor().cloned();
        let ty =
            ty.ok_or_else(|| TrainError::invalid(name, "a gradient of no fixed type", "fixed shapes"))?;
        let dims = ty.dims().unwrap_or_default();
        let rule = if options.decay_matrices_only && dims.iter().filter(|d| **d != 1).count() < 2 {
            without_decay(options.rule)
        } else {
            options.rule
        };
        let mut inputs = vec![*parameter];
        for prefix in MOMENTS.iter().take(rule.moments()) {
            let ty = match rule {
                UpdateRule::Adam8 { .. } => {
                    let blocks = dims.iter().product::<usize>().div_ceil(EIGHT_BIT_LEN);
                    TensorType::fixed(DType::U8, &[blocks, EIGHT_BIT_BLOCK])
                }
                _ => ty.clone(),
            };
            let moment = format!("{prefix}{name}");
            inputs.push(graph.add_state(moment.clone(), ty, None));
            moments.push(moment);
        }
        inputs.extend([*gradient, schedule]);
        inputs.extend(*list);
        let axis = if let Change::Channels { axis, .. } = change { *axis } else { 0 };
        let results = 1 + rule.moments();
        graph.add_node(
            format!("update/{name}"),
            Op::Train(Box::new(TrainOp::Update { rule, axis })),
            &inputs,
            results,
        );
    }
    let (output, eval_output) = (output_of(&here)[0], output_of(&there)[0]);
    graph.value_mut(loss).name = LOSS.to_owned();
    graph.value_mut(eval_loss).name = format!("{EVALUATION}{LOSS}");
    graph.outputs = vec![eval_loss, eval_output, loss, output];
    let inputs = train.inputs.iter().map(|v| train.value(*v).name.clone()).collect();
    graph.infer()?;
    graph.verify()?;
    keep_signs(&mut graph, loss);
    graph.infer()?;
    let mut pipeline = Pipeline::after_differentiation(evaluate);
    if !options.early_apply {
        pipeline = pipeline.without(PlaceUpdates.name());
    }
    pipeline.run(&mut graph)?;
    graph.compact();
    graph.infer()?;
    graph.verify()?;
    let name_of = |i: usize| graph.value(graph.outputs[i]).name.clone();
    Ok(Step {
        parameters: trained,
        moments,
        statistics,
        inputs,
        output: name_of(3),
        evaluation: [name_of(1), name_of(0)],
        loss: graph.outputs[2],
        graph,
    })
}

fn without_decay(rule: UpdateRule) -> UpdateRule {
    let mut rule = rule;
    match &mut rule {
        UpdateRule::Sgd { weight_decay, .. }
        | UpdateRule::Adam { weight_decay, .. }
        | UpdateRule::Adam8 { weight_decay, .. }
        | UpdateRule::Lion { weight_decay, .. } => *weight_decay = 0.0,
        UpdateRule::Accumulate => {}
    }
    rule
}

/// The forward pass as it is evaluated: batch normalisations use what they track. Values keep their numbers.
pub(crate) fn inference_of(train: &Graph) -> Graph {
    let mut graph = train.clone();
    // The running statistics that belong to those of a batch.
    let mut tracked = HashMap::new();
    for (id, node) in train.iter_nodes() {
        let Op::Train(op) = &node.op else { continue };
        if let (TrainOp::TrackStatistics { .. }, [mean, variance, batch_mean, batch_variance]) =
            (&**op, &node.inputs[..])
        {
            tracked.insert(*batch_mean, *mean);
            tracked.insert(*batch_variance, *variance);
            graph.remove_node(id);
        }
    }
    for node in graph.nodes.iter_mut().flatten() {
        if let Op::Train(op) = &node.op
            && matches!(**op, TrainOp::Normalise { .. })
        {
            for input in &mut node.inputs {
                if let Some(running) = tracked.get(input) {
                    *input = *running;
                }
            }
        }
        if let Op::Dropout { .. } = node.op {
            node.op = Op::Unary(UnaryOp::Identity);
            node.inputs.truncate(1);
        }
    }
    graph
}

/// Leaves the trained channels of a gradient; returns the list of them as a constant.
fn slice_gradient(
    graph: &mut Graph,
    name: &str,
    gradient: &mut ValueId,
    axis: usize,
    channels: &[usize],
) -> Result<ValueId, TrainError> {
    let dims = graph.value(*gradient).ty.tensor().and_then(TensorType::dims).unwrap_or_default();
    let size = dims.get(axis).copied().unwrap_or(0);
    if channels.is_empty() || !channels.is_sorted_by(|a, b| a < b) || channels.iter().any(|&c| c >= size) {
        return Err(TrainError::invalid(
            format!("update scheme of {name:?}"),
            format!("channels {channels:?} along axis {axis} of {size}"),
            "ascending numbers of channels that are there",
        ));
    }
    let list: Vec<i64> = channels.iter().map(|&c| c as i64).collect();
    let list = graph.add_constant(format!("channels/{name}"), Tensor::from_slice(&[list.len()], &list));
    if slice_weight_gradient(graph, *gradient, axis, list, channels.len())? {
        return Ok(list);
    }
    let op = Op::Gather { axis: axis as i64 };
    *gradient = graph.add_node(format!("slice/{name}"), op, &[*gradient, list], 1)[0];
    graph.infer()?;
    Ok(list)
}

/// The schedule with a scale that keeps the norm of all gradients at `most`.
fn clipped(graph: &mut Graph, schedule: ValueId, pairs: &[(ValueId, ValueId)], most: f32) -> ValueId {
    let mut squares = Vec::new();
    for (i, (_, gradient)) in pairs.iter().enumerate() {
        let op = Op::Reduce { op: ReduceOp::SumSquare, keep_dims: false, noop_with_empty_axes: false };
        squares.push(graph.add_node(format!("clip/square{i}"), op, &[*gradient], 1)[0]);
    }
    let sum = graph.add_node("clip/sum", Op::Variadic(lightering_graph::VariadicOp::Sum), &squares, 1)[0];
    let norm = graph.add_node("clip/norm", Op::Unary(UnaryOp::Sqrt), &[sum], 1)[0];
    let constant =
        |graph: &mut Graph, name: &str, x: f32| graph.add_constant(format!("clip/{name}"), Tensor::scalar(x));
    let most = constant(graph, "most", most);
    // Of what is within the bound nothing changes: max(norm, most) / most is 1 there.
    let above = graph.add_node("clip/above", Op::Binary(BinaryOp::Max), &[norm, most], 1)[0];
    let factor = graph.add_node("clip/factor", Op::Binary(BinaryOp::Div), &[most, above], 1)[0];
    let at = graph.add_constant("clip/at", Tensor::from_slice(&[4], &[0f32, 1.0, 0.0, 0.0]));
    let others = graph.add_constant("clip/others", Tensor::from_slice(&[4], &[1f32, 0.0, 1.0, 1.0]));
    let placed = graph.add_node("clip/placed", Op::Binary(BinaryOp::Mul), &[at, factor], 1)[0];
    let factors = graph.add_node("clip/factors", Op::Binary(BinaryOp::Add), &[others, placed], 1)[0];
    graph.add_node("clip/schedule", Op::Binary(BinaryOp::Mul), &[schedule, factors], 1)[0]
}
