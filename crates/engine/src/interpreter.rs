//! A plain interpreter: node by node on the counted heap.
//!
//! It runs what the planner cannot plan (bodies of control flow, graphs whose shapes depend on data), and it is what
//! planned execution is compared with in tests.

use std::sync::Arc;

use lightering_graph::infer::{Fact, infer_node};
use lightering_graph::{
    Constant, Evaluate, Graph, GraphError, Node, Op, StoredTensor, Tensor, TensorType, ValueId, ValueKind,
    ValueType,
};
use lightering_kernels::ThreadPool;
use lightering_meter::{MemoryPool, Reservation};
use lightering_tier::ByteSource;
use lightering_units::Bytes;

use crate::RuntimeValue;
use crate::ops::{
    OpContext, OpError, TensorView, TensorViewMut, compute, compute_dynamic, is_dynamic, workspace_bytes,
};

/// Results larger than this are not folded into the graph.
const FOLDED_BYTES_MAX: usize = 16 << 20;

fn budget(e: lightering_meter::MeterError) -> OpError {
    OpError::Budget(e.to_string())
}

/// Bytes that a value holds.
fn held(value: &RuntimeValue) -> Bytes {
    match value {
        RuntimeValue::Tensor(t) => t.size_bytes(),
        RuntimeValue::Sequence(_, items) => items.iter().map(held).sum(),
        RuntimeValue::Optional(_, content) => content.as_deref().map_or(Bytes::ZERO, held),
        RuntimeValue::Map(k, v) => k.size_bytes() + v.size_bytes(),
    }
}

/// Computes one operator on heap values: infers the results, allocates them, computes.
///
/// # Errors
/// As [`compute`].
pub fn execute_op(
    op: &Op,
    inputs: &[Option<&RuntimeValue>],
    outputs_wanted: &[bool],
    context: &OpContext,
) -> Result<Vec<Option<RuntimeValue>>, OpError> {
    let types: Vec<Option<ValueType>> = inputs.iter().map(|v| v.map(RuntimeValue::value_type)).collect();
    let type_refs: Vec<Option<&ValueType>> = types.iter().map(Option::as_ref).collect();
    if is_dynamic(op, &type_refs) {
        return compute_dynamic(op, inputs, outputs_wanted, context);
    }
    // Inference wants a node; only its operator and the numbers of operands and results matter.
    let node = Node {
        name: String::new(),
        op: op.clone(),
        inputs: inputs.iter().map(|v| v.map(|_| ValueId(0))).collect(),
        outputs: vec![None; outputs_wanted.len()],
    };
    let facts: Vec<Option<Fact>> =
        inputs.iter().zip(&types).map(|(v, ty)| Some(Fact::new(ty.as_ref()?, (*v)?.tensor()))).collect();
    let result_types = infer_node(&node, &facts).map_err(|e| match e {
        GraphError::Node { problem, .. } => OpError::Invalid(problem),
        GraphError::Unsupported { what, .. } => OpError::Unsupported(what),
        other => OpError::Invalid(other.to_string()),
    })?;
    let mut results: Vec<Option<Tensor>> = Vec::with_capacity(outputs_wanted.len());
    let mut reservations = Vec::new();
    for (ty, &wanted) in result_types.iter().zip(outputs_wanted) {
        if !wanted {
            results.push(None);
            continue;
        }
        let size = ty.tensor().and_then(TensorType::size_bytes);
        let dims = ty.tensor().and_then(|t| Some((t.dtype, t.dims()?)));
        let (Some(size), Some((dtype, dims))) = (size, dims) else {
            return Err(OpError::Unsupported(format!("{}: the result type {ty} stays open", op.name())));
        };
        reservations.push(context.memory.reserve("result", Bytes(size as u64)).map_err(budget)?);
        results.push(Some(Tensor::zeros(dtype, &dims)));
    }
    let tensor_types: Vec<Option<&TensorType>> =
        types.iter().map(|t| t.as_ref().and_then(ValueType::tensor)).collect();
    let out_types: Vec<Option<&TensorType>> =
        result_types.iter().zip(outputs_wanted).map(|(t, &wanted)| t.tensor().filter(|_| wanted)).collect();
    let scratch = workspace_bytes(op, &tensor_types, &out_types, context.threads.threads());
    let _scratch = context.memory.reserve("workspace", scratch).map_err(budget)?;
    // Words keep the workspace aligned.
    let mut workspace = vec![0u64; scratch.to_usize().div_ceil(8)];
    let views: Vec<Option<TensorView>> = inputs
        .iter()
        .map(|v| {
            let t = v.and_then(RuntimeValue::tensor)?;
            Some(TensorView { dtype: t.dtype(), dims: t.dims(), bytes: t.as_bytes() })
        })
        .collect();
    let all_dims: Vec<Vec<usize>> =
        results.iter().map(|t| t.as_ref().map_or(Vec::new(), |t| t.dims().to_vec())).collect();
    let mut outputs: Vec<Option<TensorViewMut>> = results
        .iter_mut()
        .zip(&all_dims)
        .map(|(t, dims)| {
            let t = t.as_mut()?;
            Some(TensorViewMut { dtype: t.dtype(), dims, bytes: t.as_bytes_mut() })
        })
        .collect();
    compute(op, &views, &mut outputs, bytemuck::cast_slice_mut(&mut workspace), context)?;
    drop(outputs);
    Ok(results.into_iter().map(|t| t.map(RuntimeValue::from)).collect())
}

/// A value of a running graph and what it holds of the pool.
enum Slot<'v> {
    Empty,
    Lent(&'v RuntimeValue),
    /// The reservation is given back when the slot is emptied.
    Own(RuntimeValue, #[allow(dead_code)] Option<Reservation>),
}

impl Slot<'_> {
    fn get(&self) -> Option<&RuntimeValue> {
        match self {
            Slot::Empty => None,
            Slot::Lent(v) => Some(v),
            Slot::Own(v, _) => Some(v),
        }
    }
}

fn read_stored(
    stored: &StoredTensor,
    ty: &TensorType,
    sources: &[Arc<dyn ByteSource>],
) -> Result<Tensor, OpError> {
    let source = sources
        .get(stored.source.0 as usize)
        .ok_or_else(|| OpError::Invalid(format!("store {} of a weight is not there", stored.source.0)))?;
    let dims = ty.dims().ok_or_else(|| OpError::Invalid(format!("a weight has the open type {ty}")))?;
    if ty.size_bytes().map(|n| n as u64) != Some(stored.size.0) {
        return Err(OpError::Invalid(format!(
            "a weight of type {ty} takes {} bytes in its store",
            stored.size
        )));
    }
    let mut tensor = Tensor::zeros(ty.dtype, &dims);
    source
        .read_at(stored.offset, tensor.as_bytes_mut())
        .map_err(|e| OpError::Invalid(format!("{}: {e}", source.name())))?;
    Ok(tensor)
}

/// Runs a graph node by node. Every value is counted in `pool` and freed after its last use.
///
/// `inputs` gives the graph's inputs; states without a given value start from their first content.
///
/// # Errors
/// An [`OpError`] whose message names the node.
pub fn interpret(
    graph: &Graph,
    inputs: &[(ValueId, RuntimeValue)],
    sources: &[Arc<dyn ByteSource>],
    pool: &MemoryPool,
    threads: &ThreadPool,
) -> Result<Vec<RuntimeValue>, OpError> {
    let context = OpContext { threads, memory: pool, sources, seed: 0, images: None, nesting: 0 };
    let lent: Vec<(ValueId, &RuntimeValue)> = inputs.iter().map(|(id, v)| (*id, v)).collect();
    run_graph(graph, &lent, &context)
}

/// As [`interpret`], inside a running operator: bodies of control flow.
///
/// # Errors
/// As [`interpret`].
pub fn run_graph(
    graph: &Graph,
    inputs: &[(ValueId, &RuntimeValue)],
    context: &OpContext,
) -> Result<Vec<RuntimeValue>, OpError> {
    if context.nesting > OpContext::NESTING_MAX {
        return Err(OpError::Unsupported(format!("more than {} nested bodies", OpContext::NESTING_MAX)));
    }
    let mut uses = vec![0usize; graph.values.len()];
    for (_, node) in graph.iter_nodes() {
        for input in node.inputs.iter().flatten() {
            uses[input.index()] += 1;
        }
    }
    for output in &graph.outputs {
        uses[output.index()] += 1;
    }
    let mut slots: Vec<Slot> = graph.values.iter().map(|_| Slot::Empty).collect();
    for &(id, value) in inputs {
        slots[id.index()] = Slot::Lent(value);
    }
    for (_, node) in graph.iter_nodes() {
        let fail = |e: OpError| {
            let place = |m: String| format!("node {:?} ({}): {m}", node.name, node.op.name());
            match e {
                OpError::Invalid(m) => OpError::Invalid(place(m)),
                OpError::Unsupported(m) => OpError::Unsupported(place(m)),
                OpError::Budget(m) => OpError::Budget(place(m)),
                other => other,
            }
        };
        for &input in node.inputs.iter().flatten() {
            fetch(graph, input, &mut slots, context).map_err(fail)?;
        }
        let operands: Vec<Option<&RuntimeValue>> =
            node.inputs.iter().map(|id| id.and_then(|id| slots[id.index()].get())).collect();
        let wanted: Vec<bool> = node.outputs.iter().map(Option::is_some).collect();
        let inner = OpContext { seed: node_seed(context.seed, &node.name), ..*context };
        let results = execute_op(&node.op, &operands, &wanted, &inner).map_err(fail)?;
        for &input in node.inputs.iter().flatten() {
            uses[input.index()] -= 1;
            if uses[input.index()] == 0 {
                slots[input.index()] = Slot::Empty;
            }
        }
        for (result, output) in results.into_iter().zip(&node.outputs) {
            let (Some(result), Some(output)) = (result, output) else { continue };
            if uses[output.index()] > 0 {
                let reservation =
                    context.memory.reserve("value", held(&result)).map_err(budget).map_err(fail)?;
                slots[output.index()] = Slot::Own(result, Some(reservation));
            }
        }
    }
    graph
        .outputs
        .iter()
        .map(|&output| {
            fetch(graph, output, &mut slots, context)?;
            uses[output.index()] -= 1;
            let last = uses[output.index()] == 0;
            let slot = &mut slots[output.index()];
            match (last, std::mem::replace(slot, Slot::Empty)) {
                (true, Slot::Own(value, _)) => Ok(value),
                (_, kept) => {
                    let value = kept.get().cloned();
                    *slot = kept;
                    value.ok_or_else(|| {
                        OpError::Invalid(format!("nothing made the output {:?}", graph.value(output).name))
                    })
                }
            }
        })
        .collect()
}

/// Different nodes draw different random numbers from one seed.
fn node_seed(seed: u64, name: &str) -> u64 {
    // FNV-1a, which does not change between releases of the standard library.
    name.bytes().fold(seed ^ 0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

/// Makes sure that a value is there: constants are read at their first use.
fn fetch(graph: &Graph, id: ValueId, slots: &mut [Slot], context: &OpContext) -> Result<(), OpError> {
    if slots[id.index()].get().is_some() {
        return Ok(());
    }
    let value = graph.value(id);
    let constant = match &value.kind {
        ValueKind::Constant(c) | ValueKind::State(Some(c)) => c,
        ValueKind::State(None) => {
            let ty = value.ty.tensor().and_then(|t| Some((t.dtype, t.dims()?, t.size_bytes()?)));
            let (dtype, dims, size) =
                ty.ok_or_else(|| OpError::Invalid(format!("state {:?} has an open type", value.name)))?;
            let reservation = context.memory.reserve("state", Bytes(size as u64)).map_err(budget)?;
            slots[id.index()] = Slot::Own(Tensor::zeros(dtype, &dims).into(), Some(reservation));
            return Ok(());
        }
        ValueKind::Input => return Err(OpError::Invalid(format!("no value was given for {:?}", value.name))),
        ValueKind::Output { .. } => {
            return Err(OpError::Invalid(format!("nothing has made {:?} yet", value.name)));
        }
    };
    let slot = match constant {
        Constant::Inline(t) => Slot::Own(t.as_ref().clone().into(), None),
        Constant::Stored(stored) => {
            let ty = value
                .ty
                .tensor()
                .ok_or_else(|| OpError::Invalid(format!("{:?} is no tensor", value.name)))?;
            let reservation = context.memory.reserve("weight", stored.size).map_err(budget)?;
            Slot::Own(read_stored(stored, ty, context.sources)?.into(), Some(reservation))
        }
    };
    slots[id.index()] = slot;
    Ok(())
}

/// Computes nodes for constant folding.
#[derive(Debug)]
pub struct Evaluator {
    memory: MemoryPool,
    threads: ThreadPool,
    sources: Sources,
}

/// Stores of weights; printed by name.
struct Sources(Vec<Arc<dyn ByteSource>>);

impl std::fmt::Debug for Sources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|s| s.name())).finish()
    }
}

impl Evaluator {
    /// An evaluator whose values are counted in `memory` and whose stored constants are in `sources`.
    pub fn new(memory: MemoryPool, sources: Vec<Arc<dyn ByteSource>>) -> Evaluator {
        Evaluator { memory, threads: ThreadPool::new(1), sources: Sources(sources) }
    }
}

impl Evaluate for Evaluator {
    fn evaluate(&self, node: &Node, inputs: &[Option<&Tensor>]) -> Result<Option<Vec<Tensor>>, GraphError> {
        if node.op.is_random() || !node.op.bodies().is_empty() {
            return Ok(None);
        }
        let types: Vec<Option<ValueType>> =
            inputs.iter().map(|t| t.map(|t| t.tensor_type().into())).collect();
        let facts: Vec<Option<Fact>> =
            inputs.iter().zip(&types).map(|(t, ty)| Some(Fact::new(ty.as_ref()?, *t))).collect();
        let too_large = |ty: &ValueType| match ty.tensor().and_then(TensorType::size_bytes) {
            Some(size) => size > FOLDED_BYTES_MAX,
            None => !matches!(ty, ValueType::Tensor(_)),
        };
        if infer_node(node, &facts)?.iter().any(too_large) {
            return Ok(None);
        }
        let values: Vec<Option<RuntimeValue>> = inputs.iter().map(|t| t.map(|t| t.clone().into())).collect();
        let values: Vec<Option<&RuntimeValue>> = values.iter().map(Option::as_ref).collect();
        let context = OpContext {
            threads: &self.threads,
            memory: &self.memory,
            sources: &self.sources.0,
            seed: 0,
            images: None,
            nesting: 0,
        };
        let all = vec![true; node.outputs.len()];
        match execute_op(&node.op, &values, &all, &context) {
            Ok(results) => Ok(results
                .into_iter()
                .map(|r| match r {
                    Some(RuntimeValue::Tensor(t)) => Some(t),
                    _ => None,
                })
                .collect()),
            Err(OpError::Invalid(problem)) => Err(GraphError::at(node, problem)),
            // What cannot be computed here, or does not fit now, is left to the run.
            Err(_) => Ok(None),
        }
    }

    fn load(&self, stored: &StoredTensor, ty: &TensorType) -> Result<Option<Tensor>, GraphError> {
        if self.sources.0.get(stored.source.0 as usize).is_none() {
            return Ok(None);
        }
        read_stored(stored, ty, &self.sources.0).map(Some).map_err(|e| GraphError::Tensor(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lightering_graph::{BinaryOp, DType, UnaryOp};

    #[test]
    fn runs_a_chain_and_frees_what_is_dead() {
        let mut g = Graph::new("chain");
        let x = g.add_input("x", TensorType::fixed(DType::F32, &[1024]));
        let mut v = x;
        for i in 0..10 {
            v = g.add_node(format!("n{i}"), Op::Unary(UnaryOp::Neg), &[v], 1)[0];
        }
        let one = g.add_constant("one", Tensor::scalar(1f32));
        let y = g.add_node("y", Op::Binary(BinaryOp::Add), &[v, one], 1)[0];
        g.outputs.push(y);
        let (pool, threads) = (MemoryPool::unbounded(), ThreadPool::new(2));
        let input = Tensor::from_slice(&[1024], &vec![2f32; 1024]);
        let out = interpret(&g, &[(x, input.into())], &[], &pool, &threads).unwrap();
        assert_eq!(out[0].tensor().unwrap().as_slice::<f32>(), &[3f32; 1024]);
        assert_eq!(pool.used(), Bytes::ZERO);
        // Operand, result, and the result counted once more while it is handed over.
        assert!(pool.peak() <= Bytes(3 * 4096), "{}", pool.peak());
        let small = MemoryPool::with_limit(Bytes(5000));
        let input = Tensor::from_slice(&[1024], &vec![2f32; 1024]);
        assert!(matches!(
            interpret(&g, &[(x, input.into())], &[], &small, &threads),
            Err(OpError::Budget(_))
        ));
    }

    #[test]
    fn errors_name_the_node() {
        let mut g = Graph::new("bad");
        let x = g.add_input("x", TensorType::unranked(DType::F32));
        let i = g.add_constant("i", Tensor::from_slice(&[1], &[7i64]));
        let y = g.add_node("pick", Op::Gather { axis: 0 }, &[x, i], 1)[0];
        g.outputs.push(y);
        let (pool, threads) = (MemoryPool::unbounded(), ThreadPool::new(1));
        let input = Tensor::from_slice(&[2], &[1f32, 2.0]);
        let e = interpret(&g, &[(x, input.into())], &[], &pool, &threads).unwrap_err();
        assert!(e.to_string().contains("pick") && e.to_string().contains('7'), "{e}");
    }

    #[test]
    fn evaluator_folds_and_refuses() {
        let evaluator = Evaluator::new(MemoryPool::unbounded(), Vec::new());
        let node = |op: Op| Node {
            name: "n".into(),
            op,
            inputs: vec![Some(ValueId(0)); 1],
            outputs: vec![Some(ValueId(1))],
        };
        let x = Tensor::from_slice(&[2], &[1f32, -2.0]);
        let folded = evaluator.evaluate(&node(Op::Unary(UnaryOp::Abs)), &[Some(&x)]).unwrap().unwrap();
        assert_eq!(folded[0], Tensor::from_slice(&[2], &[1f32, 2.0]));
        let shape = Tensor::from_slice(&[1], &[1i64 << 40]);
        let huge = node(Op::ConstantOfShape { value: Tensor::from_slice(&[1], &[0u8]) });
        assert_eq!(evaluator.evaluate(&huge, &[Some(&shape)]).unwrap(), None);
    }
}
