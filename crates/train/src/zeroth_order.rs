//! Training from forward passes alone: MeZO (Malladi et al., arXiv 2305.17333), its weights moved once per step (ZO2,
//! arXiv 2503.12668).
//!
//! A step looks at the loss at `w + eps·z` and `w - eps·z` for a random direction `z` that is made again from a seed
//! wherever it is needed. [`dual_forward`] makes one graph of both forward passes: every node runs on both sides while its
//! parameters are at hand, and what is left of the step before is done when a parameter is visited, so that each
//! parameter comes into memory once per step. Per parameter the floating-point operations are those of MeZO in the same
//! order; so are the bits.

mod fit;
mod log;
mod trainer;

use std::collections::{BTreeSet, HashMap};
use std::str::FromStr;

use lightering_graph::passes::{BatchNormForTraining, BatchNormMode, Evaluate, Pass, Pipeline};
use lightering_graph::{
    DType, Graph, Node, NodeId, Op, PerturbPart, TensorType, TrainOp, Value, ValueId, ValueKind,
};

pub use fit::fit_zeroth_order;
pub use log::{LoggedStep, ZoHeader, ZoLog, ZoLogWriter, ZoParameter, apply_log};
pub use trainer::{ZoReport, ZoState, ZoTrainer};

use crate::schedule::Settings;
use crate::step::{LOSS, inference_of, trainable_parameters};
use crate::{LABEL, Loss, TrainError};

/// Input of a step: `[eps, rate, gradient, pending]`, see [`TrainOp::Perturb`].
pub const ZO: &str = "zo";
/// Input of a step: the seeds of the step before and of this one.
pub const ZO_SEEDS: &str = "zo/seeds";
/// Behind the names of what belongs to the side `w - eps·z`.
pub const MINUS: &str = " (minus)";

/// How a training from forward passes goes; written `eps=1e-3,decay=0,plain=0`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ZoSettings {
    /// How far from the parameters the loss is looked at.
    pub eps: f32,
    /// Weight decay of parameters with two dimensions or more.
    pub decay: f32,
    /// Plain MeZO: every parameter is visited five times per step and all of them stay in memory.
    pub plain: bool,
}

impl Default for ZoSettings {
    fn default() -> Self {
        ZoSettings { eps: 1e-3, decay: 0.0, plain: false }
    }
}

impl FromStr for ZoSettings {
    type Err = TrainError;

    fn from_str(text: &str) -> Result<ZoSettings, TrainError> {
        let mut s = Settings::parse("zeroth-order settings", text)?;
        let usual = ZoSettings::default();
        let settings = ZoSettings {
            eps: s.number("eps", usual.eps, 1e-9..=1.0)?,
            decay: s.number("decay", usual.decay, 0.0..=1.0)?,
            plain: s.number("plain", 0.0, 0.0..=1.0)? != 0.0,
        };
        s.finish("eps, decay or plain")?;
        Ok(settings)
    }
}

/// A step and what to call its parts.
#[derive(Clone, Debug)]
pub struct ZoStep {
    /// Both forward passes; types are inferred.
    pub graph: Graph,
    /// One forward pass with the loss, for plain MeZO.
    pub forward: Graph,
    /// The parameters that change; their numbers are those of their noise.
    pub parameters: Vec<ZoParameter>,
    /// Inputs of the model.
    pub inputs: Vec<String>,
    /// First output of the model, at `w + eps·z`.
    pub output: String,
    /// The losses at `w + eps·z` and `w - eps·z`.
    pub losses: [String; 2],
    /// How it goes.
    pub settings: ZoSettings,
}

/// Makes the step of `model`, a forward graph whose inputs have fixed shapes for the batch of training, whose types are
/// inferred and which no pass has fused. Batch normalisations use the statistics that they have; operators need no
/// derivative.
///
/// # Errors
/// The loss does not fit the output, or no parameter has an influence on it.
pub fn build_zo_step(
    model: &Graph,
    label: &TensorType,
    loss: Loss,
    settings: ZoSettings,
    evaluate: &dyn Evaluate,
) -> Result<ZoStep, TrainError> {
    let mut forward = model.clone();
    BatchNormForTraining { mode: BatchNormMode::Frozen }.run(&mut forward)?;
    for v in trainable_parameters(&forward) {
        let value = forward.value_mut(v);
        if let ValueKind::Constant(constant) = &value.kind {
            value.kind = ValueKind::State(Some(constant.clone()));
        }
    }
    Pipeline::before_differentiation(evaluate).run(&mut forward)?;
    forward.infer()?;
    let mut forward = inference_of(&forward);
    let inputs: Vec<String> = forward.inputs.iter().map(|v| forward.value(*v).name.clone()).collect();
    let label = forward.add_input(LABEL, label.clone());
    let outputs = forward.outputs.clone();
    let Some(&output) = outputs.first() else {
        return Err(TrainError::invalid("model", "no outputs", "an output"));
    };
    let loss = loss.append(&mut forward, &outputs, label)?;
    forward.value_mut(loss).name = LOSS.to_owned();
    forward.outputs = vec![loss, output];
    forward.infer()?;
    // All that is fused is fused before the sides part: afterwards no reader may pass a change of what it reads.
    Pipeline::after_differentiation(evaluate).run(&mut forward)?;
    forward.compact();
    forward.infer()?;
    forward.verify()?;
    let (loss, output) = (forward.outputs[0], forward.outputs[1]);
    let parameters = parameters_of(&forward, loss, settings.decay);
    if parameters.is_empty() {
        return Err(TrainError::invalid(
            "model",
            "the loss depends on no parameter that may change",
            "a model with weights",
        ));
    }
    let graph = dual_forward(&forward, loss, &parameters)?;
    let output = forward.value(output).name.clone();
    let loss = forward.value(loss).name.clone();
    let losses = [loss.clone(), format!("{loss}{MINUS}")];
    Ok(ZoStep { graph, forward, parameters, inputs, output, losses, settings })
}

/// The states of `forward` that have an influence on `loss`, in the order of their names; so they are numbered.
pub fn parameters_of(forward: &Graph, loss: ValueId, decay: f32) -> Vec<ZoParameter> {
    let mut needed = vec![false; forward.values.len()];
    needed[loss.index()] = true;
    for (_, node) in forward.iter_nodes().rev() {
        if node.outputs.iter().flatten().any(|v| needed[v.index()]) {
            for v in node.inputs.iter().flatten() {
                needed[v.index()] = true;
            }
        }
    }
    let mut list: Vec<ZoParameter> = forward
        .values
        .iter()
        .zip(&needed)
        .filter(|(v, needed)| **needed && matches!(v.kind, ValueKind::State(_)))
        .filter_map(|(v, _)| {
            let ty = v.ty.tensor().filter(|t| t.dtype == DType::F32)?;
            let dims = ty.dims()?;
            let matrix = dims.iter().filter(|d| **d != 1).count() >= 2;
            Some(ZoParameter { name: v.name.clone(), dims, decay: if matrix { decay } else { 0.0 } })
        })
        .collect();
    list.sort_by(|a, b| a.name.cmp(&b.name));
    list
}

/// What is known of a forward graph before it is doubled.
struct Analysis {
    /// Per value: whether it depends on a parameter.
    varied: Vec<bool>,
    /// The nodes in their new order.
    order: Vec<NodeId>,
    /// Per parameter: the place of its first use in `order`.
    first: Vec<usize>,
    /// Where the forward pass may not be divided, because all of it reads the same parameters: first and last place.
    blocks: Vec<(usize, usize)>,
    /// Gathers of rows of a table that is used elsewhere, too, with the number of the parameter.
    gathers: HashMap<NodeId, usize>,
}

impl Analysis {
    fn of(forward: &Graph, number: &HashMap<ValueId, usize>) -> Analysis {
        let n = forward.values.len();
        let mut varied = vec![false; n];
        // Values made of parameters and constants alone, such as a transposed weight, which may be the very bytes of the
        // parameter under another shape: who reads them reads these parameters.
        let mut made_of: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); n];
        for (&v, &p) in number {
            varied[v.index()] = true;
            made_of[v.index()].insert(p);
        }
        let mut derived = vec![false; forward.nodes.len()];
        for (id, node) in forward.iter_nodes() {
            if !node.inputs.iter().flatten().any(|v| varied[v.index()]) {
                continue;
            }
            let alone = node.inputs.iter().flatten().all(|v| {
                !made_of[v.index()].is_empty() || matches!(forward.value(*v).kind, ValueKind::Constant(_))
            });
            let parts: BTreeSet<usize> = match alone {
                true => node.inputs.iter().flatten().flat_map(|v| made_of[v.index()].clone()).collect(),
                false => BTreeSet::new(),
            };
            derived[id.index()] = alone;
            for v in node.outputs.iter().flatten() {
                varied[v.index()] = true;
                made_of[v.index()].clone_from(&parts);
            }
        }
        let order = order_of(forward, &derived);
        let gathers = shared_gathers(forward, number, &made_of);
        let mut spans: Vec<Option<(usize, usize)>> = vec![None; number.len()];
        for (place, id) in order.iter().enumerate() {
            if gathers.contains_key(id) {
                continue;
            }
            for v in forward.node(*id).inputs.iter().flatten() {
                for &p in &made_of[v.index()] {
                    let span = spans[p].get_or_insert((place, place));
                    span.1 = place;
                }
            }
        }
        let first = spans.iter().map(|s| s.map_or(usize::MAX, |s| s.0)).collect();
        let mut sorted: Vec<(usize, usize)> = spans.into_iter().flatten().collect();
        sorted.sort_unstable();
        let mut blocks: Vec<(usize, usize)> = Vec::new();
        for (start, end) in sorted {
            match blocks.last_mut().filter(|b| start <= b.1) {
                Some(block) => block.1 = block.1.max(end),
                None => blocks.push((start, end)),
            }
        }
        Analysis { varied, order, first, blocks, gathers }
    }
}

/// The order of nodes in which what is derived from parameters alone comes right before its first reader.
fn order_of(forward: &Graph, derived: &[bool]) -> Vec<NodeId> {
    let mut order = Vec::new();
    let mut emitted = vec![false; forward.nodes.len()];
    let outputs: BTreeSet<ValueId> = forward.outputs.iter().copied().collect();
    for (id, node) in forward.iter_nodes() {
        let is_output = node.outputs.iter().flatten().any(|v| outputs.contains(v));
        if derived[id.index()] && !is_output {
            continue;
        }
        // Depth first, without recursion: chains of derived values are short, but nobody promises that.
        let mut stack = vec![(id, false)];
        while let Some((id, ready)) = stack.pop() {
            if emitted[id.index()] {
                continue;
            }
            if ready {
                emitted[id.index()] = true;
                order.push(id);
                continue;
            }
            stack.push((id, true));
            for v in forward.node(id).inputs.iter().flatten().rev() {
                if let Some(producer) = forward.producer(*v)
                    && !emitted[producer.index()]
                {
                    stack.push((producer, false));
                }
            }
        }
    }
    order
}

/// Gathers of rows of a parameter of two dimensions that others use, too (an embedding tied to the last layer): they take
/// the rows as they are without changing the table, which is then visited where the others use it.
fn shared_gathers(
    forward: &Graph,
    number: &HashMap<ValueId, usize>,
    made_of: &[BTreeSet<usize>],
) -> HashMap<NodeId, usize> {
    let is_gather = |node: &Node| {
        let table = node.input(0)?;
        let rank = forward.value(table).ty.tensor()?.dims()?.len();
        let gather = matches!(node.op, Op::Gather { axis: 0 | -2 })
            && rank == 2
            && node.output(0).is_some()
            && node.input(1).is_some_and(|v| made_of[v.index()].is_empty());
        if gather { number.get(&table).copied() } else { None }
    };
    let mut gathers: HashMap<NodeId, usize> = HashMap::new();
    let mut others = BTreeSet::new();
    for (id, node) in forward.iter_nodes() {
        match is_gather(node) {
            Some(p) => {
                gathers.insert(id, p);
            }
            None => {
                others.extend(node.inputs.iter().flatten().flat_map(|v| made_of[v.index()].iter().copied()));
            }
        }
    }
    gathers.retain(|_, p| others.contains(p));
    gathers
}

/// Both sides of a graph that is being doubled.
struct Doubling<'a> {
    forward: &'a Graph,
    graph: Graph,
    zo: ValueId,
    seeds: ValueId,
    parameters: &'a [ZoParameter],
    number: &'a HashMap<ValueId, usize>,
    analysis: &'a Analysis,
    /// Per value of the forward graph, its values here: at `w + eps·z` and at `w - eps·z`.
    here: [Vec<Option<ValueId>>; 2],
}

impl Doubling<'_> {
    fn op(&self, p: usize, part: PerturbPart) -> Op {
        let stream = p as u32;
        Op::Train(Box::new(TrainOp::Perturb { stream, part, decay: self.parameters[p].decay }))
    }

    fn perturb(&mut self, p: usize, state: ValueId, part: PerturbPart) {
        let side = usize::from(part == PerturbPart::Cross);
        // Nothing is there yet of the other side; it goes on from what the first one left.
        let current = self.here[0][state.index()].expect("states have their values from the start");
        let name = match part {
            PerturbPart::Begin => format!("begin/{}", self.parameters[p].name),
            PerturbPart::Cross => format!("cross/{}", self.parameters[p].name),
        };
        let op = self.op(p, part);
        let new = self.graph.add_node(name, op, &[current, self.zo, self.seeds], 1)[0];
        self.here[side][state.index()] = Some(new);
    }

    /// Runs a node of the forward graph on one side; what depends on no parameter runs once.
    fn run(&mut self, id: NodeId, side: usize) {
        let node = self.forward.node(id);
        let varied = node.outputs.iter().flatten().any(|v| self.analysis.varied[v.index()]);
        if side == 1 && !varied {
            return;
        }
        if let Some(&p) = self.analysis.gathers.get(&id) {
            if side == 0 {
                self.gather(id, p);
            }
            return;
        }
        let value = |v: ValueId| {
            let found = self.here[side][v.index()].or(self.here[0][v.index()]);
            found.expect("operands come before their readers")
        };
        let inputs = node.inputs.iter().map(|v| v.map(value)).collect();
        let suffix = if side == 1 { MINUS } else { "" };
        let new = NodeId(self.graph.nodes.len() as u32);
        let mut outputs = Vec::with_capacity(node.outputs.len());
        for (i, v) in node.outputs.iter().enumerate() {
            outputs.push(v.map(|v| {
                let old = self.forward.value(v);
                self.graph.values.push(Value {
                    name: format!("{}{suffix}", old.name),
                    ty: old.ty.clone(),
                    kind: ValueKind::Output { node: new, output: i as u32 },
                });
                ValueId(self.graph.values.len() as u32 - 1)
            }));
        }
        for (old, new) in node.outputs.iter().zip(&outputs) {
            if let Some(old) = old {
                self.here[side][old.index()] = *new;
            }
        }
        let name = format!("{}{suffix}", node.name);
        self.graph.nodes.push(Some(Node { name, op: node.op.clone(), inputs, outputs }));
    }

    fn gather(&mut self, id: NodeId, p: usize) {
        let node = self.forward.node(id);
        let (Some(table), Some(indices)) = (node.input(0), node.input(1)) else { return };
        let at = |v: ValueId| self.here[0][v.index()].expect("operands come before their readers");
        let inputs = vec![Some(at(table)), Some(at(indices)), Some(self.zo), Some(self.seeds)];
        let op = TrainOp::GatherPerturbed { stream: p as u32, decay: self.parameters[p].decay };
        let result = &self.forward.value(node.out()).name;
        let names = vec![result.clone(), format!("{result}{MINUS}")];
        let rows = self.graph.add_node_named(node.name.clone(), Op::Train(Box::new(op)), inputs, names);
        self.here[0][node.out().index()] = Some(rows[0]);
        self.here[1][node.out().index()] = Some(rows[1]);
    }

    fn begin_of(&mut self, place: usize, part: PerturbPart) {
        let forward = self.forward;
        let mut due: Vec<(usize, ValueId)> = Vec::new();
        for v in forward.node(self.analysis.order[place]).inputs.iter().flatten() {
            if let Some(&p) = self.number.get(v)
                && self.analysis.first[p] == place
                && !due.iter().any(|(q, _)| *q == p)
            {
                due.push((p, *v));
            }
        }
        for (p, v) in due {
            self.perturb(p, v, part);
        }
    }

    fn all(&mut self) {
        let places = self.analysis.order.len();
        let mut blocks = self.analysis.blocks.iter().peekable();
        let mut place = 0;
        while place < places {
            let end = match blocks.next_if(|b| b.0 == place) {
                Some(block) => block.1 + 1,
                None => place + 1,
            };
            for part in [PerturbPart::Begin, PerturbPart::Cross] {
                for at in place..end {
                    self.begin_of(at, part);
                    self.run(self.analysis.order[at], usize::from(part == PerturbPart::Cross));
                }
            }
            place = end;
        }
    }
}

/// Makes one graph of the forward passes at `w + eps·z` and at `w - eps·z` of every state of `forward` that `parameters`
/// names. Node by node, in the order of `forward`: what is left of the step before, `+= eps·z`, the node, `-= 2·eps·z`,
/// the node again. The state stays at `w - eps·z`: going back is left, with the update, to the next visit or
/// [`ZoTrainer::flush`].
///
/// A parameter that several nodes read has one stream of noise and is changed once: everything between its first and its
/// last reader runs on one side and then on the other. Only where rows are gathered from a table that others read, too,
/// the rows are changed after they were taken, by the same operations, and the table is visited where the others read it.
///
/// The graph has the inputs of `forward`, [`ZO`] and [`ZO_SEEDS`]; its outputs are both losses, then the other outputs of
/// `forward` at `w + eps·z`. No pass may move its nodes, because they read what others overwrite.
///
/// # Errors
/// A parameter is no state of `forward`, or has more than 2^32 neighbours.
pub fn dual_forward(forward: &Graph, loss: ValueId, parameters: &[ZoParameter]) -> Result<Graph, TrainError> {
    let mut number = HashMap::new();
    for (p, parameter) in parameters.iter().enumerate() {
        let found = forward.values.iter().position(|v| v.name == parameter.name);
        let found = found.filter(|&v| matches!(forward.values[v].kind, ValueKind::State(_)));
        let v = found.ok_or_else(|| {
            TrainError::invalid("zeroth-order step", format!("{:?} is no state", parameter.name), "a state")
        })?;
        number.insert(ValueId(v as u32), p);
    }
    let analysis = Analysis::of(forward, &number);
    let mut graph = Graph::new(&forward.name);
    graph.sources.clone_from(&forward.sources);
    let mut plus = vec![None; forward.values.len()];
    for (i, value) in forward.values.iter().enumerate() {
        if !matches!(value.kind, ValueKind::Output { .. }) {
            graph.values.push(value.clone());
            plus[i] = Some(ValueId(graph.values.len() as u32 - 1));
        }
    }
    graph.inputs = forward.inputs.iter().filter_map(|v| plus[v.index()]).collect();
    let zo = graph.add_input(ZO, TensorType::fixed(DType::F32, &[4]));
    let seeds = graph.add_input(ZO_SEEDS, TensorType::fixed(DType::I64, &[2]));
    let minus = vec![None; forward.values.len()];
    let mut doubling = Doubling {
        forward,
        graph,
        zo,
        seeds,
        parameters,
        number: &number,
        analysis: &analysis,
        here: [plus, minus],
    };
    doubling.all();
    let Doubling { mut graph, here: [plus, minus], .. } = doubling;
    let unused = || TrainError::invalid("zeroth-order step", "a loss that nothing computes", "a loss");
    let loss_plus = plus[loss.index()].ok_or_else(unused)?;
    let loss_minus = minus[loss.index()].ok_or_else(unused)?;
    graph.outputs = vec![loss_plus, loss_minus];
    let others = forward.outputs.iter().filter(|v| **v != loss);
    graph.outputs.extend(others.filter_map(|v| plus[v.index()]));
    graph.compact();
    graph.infer()?;
    graph.verify()?;
    Ok(graph)
}

#[cfg(test)]
mod tests;
