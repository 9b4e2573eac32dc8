//! `If`, `Loop`, `Scan` and `SequenceMap`: their bodies run through the interpreter.

use lightering_graph::{DType, Graph, Op, ScanAttributes, Tensor, TensorType, ValueType};
use lightering_meter::Reservation;
use lightering_units::Bytes;

use super::heap::{optional_input, required_input, tensor_input};
use super::joining::{stack, take};
use super::operands::*;
use super::{OpContext, OpError};
use crate::RuntimeValue;
use crate::interpreter::run_graph;

/// Most iterations of a loop; one that needs more is taken for endless.
const ITERATIONS_MAX: i64 = 1 << 31;

/// Dispatch of this family.
pub(super) fn compute_dynamic(
    op: &Op,
    inputs: &[Option<&RuntimeValue>],
    outputs_wanted: &[bool],
    context: &OpContext,
) -> Result<Vec<Option<RuntimeValue>>, OpError> {
    if context.nesting >= OpContext::NESTING_MAX {
        return unsupported(format!("more than {} bodies inside each other", OpContext::NESTING_MAX));
    }
    let inner = &OpContext { nesting: context.nesting + 1, ..*context };
    let results = match op {
        Op::If { then_body, else_body } => {
            let condition = truth(tensor_input(inputs, 0, "the condition")?)?;
            let captures = all(inputs, 1)?;
            interpret(if condition { then_body } else { else_body }, &captures, inner)?
        }
        Op::Loop { carried, body } => run_loop(*carried, body, inputs, inner)?,
        Op::Scan { attributes, body } => run_scan(attributes, body, inputs, inner)?,
        Op::SequenceMap { operands, body } => run_map(*operands, body, inputs, inner)?,
        _ => return Err(super::no_kernel(op)),
    };
    let mut results = results.into_iter();
    Ok(outputs_wanted.iter().map(|&wanted| results.next().filter(|_| wanted)).collect())
}

fn truth(t: &Tensor) -> Result<bool, OpError> {
    match t.to_i64s().as_deref() {
        Some(&[value]) => Ok(value != 0),
        _ => invalid(format!("a condition of shape {:?}, expected one bool", t.dims())),
    }
}

/// Runs a body on its formal inputs and captured values.
fn interpret(
    body: &Graph,
    values: &[&RuntimeValue],
    context: &OpContext,
) -> Result<Vec<RuntimeValue>, OpError> {
    if values.len() != body.inputs.len() {
        return invalid(format!(
            "{} values for the {} inputs of body {:?}",
            values.len(),
            body.inputs.len(),
            body.name
        ));
    }
    let inputs: Vec<_> = body.inputs.iter().copied().zip(values.iter().copied()).collect();
    run_graph(body, &inputs, context)
}

/// All operands from `first` on, which must be there.
fn all<'a>(inputs: &[Option<&'a RuntimeValue>], first: usize) -> Result<Vec<&'a RuntimeValue>, OpError> {
    (first..inputs.len()).map(|i| required_input(inputs, i, "a captured or carried value")).collect()
}

/// The bytes of the tensors in a value.
fn size_of_value(value: &RuntimeValue) -> u64 {
    match value {
        RuntimeValue::Tensor(t) => t.size_bytes().0,
        RuntimeValue::Sequence(_, items) => items.iter().map(size_of_value).sum(),
        RuntimeValue::Optional(_, content) => content.as_deref().map_or(0, size_of_value),
        RuntimeValue::Map(k, v) => k.size_bytes().0 + v.size_bytes().0,
    }
}

/// Results of iterations that wait to be joined, counted as they grow.
struct Collected {
    parts: Vec<Vec<Tensor>>,
    held: Reservation,
    size: u64,
}

impl Collected {
    fn new(context: &OpContext, count: usize) -> Result<Collected, OpError> {
        let held = context
            .memory
            .reserve("results of iterations", Bytes::ZERO)
            .map_err(|e| OpError::Budget(e.to_string()))?;
        Ok(Collected { parts: vec![Vec::new(); count], held, size: 0 })
    }

    fn push(&mut self, index: usize, value: RuntimeValue) -> Result<(), OpError> {
        let RuntimeValue::Tensor(tensor) = value else {
            return invalid(format!(
                "result {index} of an iteration is {}, expected a tensor",
                value.value_type()
            ));
        };
        self.size += tensor.size_bytes().0;
        self.held.resize(Bytes(self.size)).map_err(|e| OpError::Budget(e.to_string()))?;
        self.parts[index].push(tensor);
        Ok(())
    }

    /// Each list stacked along its axis, in the order of the iterations or against it. Without iterations, the
    /// body's own types tell the shape as far as they can.
    fn join(
        self,
        context: &OpContext,
        types: impl Fn(usize) -> ValueType,
        axis: impl Fn(usize) -> (i64, bool),
    ) -> Result<Vec<RuntimeValue>, OpError> {
        let mut results = Vec::with_capacity(self.parts.len());
        for (i, mut parts) in self.parts.into_iter().enumerate() {
            let (axis, reverse) = axis(i);
            if reverse {
                parts.reverse();
            }
            let Some(first) = parts.first() else {
                let ValueType::Tensor(TensorType { dtype, shape }) = types(i) else {
                    return unsupported("the result of a loop without iterations whose type is not known");
                };
                let mut dims: Vec<usize> =
                    shape.unwrap_or_default().iter().map(|d| d.fixed().unwrap_or(0)).collect();
                dims.insert(normal_axis(axis, dims.len() + 1)?, 0);
                results.push(Tensor::zeros(dtype, &dims).into());
                continue;
            };
            let axis = normal_axis(axis, first.dims().len() + 1)?;
            results.push(stack(context, &parts.iter().collect::<Vec<_>>(), axis)?.into());
        }
        Ok(results)
    }
}

fn output_type(body: &Graph, index: usize) -> ValueType {
    body.outputs.get(index).map_or(ValueType::Unknown, |&v| body.value(v).ty.clone())
}

fn run_loop(
    carried: usize,
    body: &Graph,
    inputs: &[Option<&RuntimeValue>],
    context: &OpContext,
) -> Result<Vec<RuntimeValue>, OpError> {
    let trips = match optional_input(inputs, 0) {
        None => None,
        Some(_) => match tensor_input(inputs, 0, "the trip count")?.to_i64s().as_deref() {
            Some(&[n]) => Some(n.max(0)),
            _ => return invalid("the trip count is not one integer"),
        },
    };
    let mut condition = match optional_input(inputs, 1) {
        None => true,
        Some(_) => truth(tensor_input(inputs, 1, "the condition")?)?,
    };
    let scans = body.outputs.len().checked_sub(1 + carried);
    let Some(scans) = scans else {
        return invalid(format!("a loop body with too few results for {carried} states"));
    };
    let mut states: Vec<RuntimeValue> = (0..carried)
        .map(|i| required_input(inputs, 2 + i, "an initial state").cloned())
        .collect::<Result<_, _>>()?;
    let captures = all(inputs, 2 + carried)?;
    let mut collected = Collected::new(context, scans)?;
    let mut held: Option<Reservation> = None;
    let mut iteration = 0i64;
    while condition && trips.is_none_or(|n| iteration < n) {
        if iteration >= ITERATIONS_MAX {
            return unsupported(format!("loops of more than {ITERATIONS_MAX} iterations"));
        }
        let count: RuntimeValue = Tensor::scalar(iteration).into();
        let go: RuntimeValue = Tensor::from_slice(&[], &[1u8]).into_dtype(DType::Bool).into();
        let mut formal = vec![&count, &go];
        formal.extend(&states);
        formal.extend(&captures);
        let mut results = interpret(body, &formal, context)?.into_iter();
        let next = results.next().ok_or_else(|| OpError::Invalid("a loop body without results".into()))?;
        let Some(next) = next.tensor() else { return invalid("the condition of a loop body is no tensor") };
        condition = truth(next)?;
        states = results.by_ref().take(carried).collect();
        // Carried values may grow with every iteration (sequences do), so they are counted while they live.
        let size = Bytes(states.iter().map(size_of_value).sum());
        drop(held.take());
        held = Some(context.memory.reserve("loop state", size).map_err(|e| OpError::Budget(e.to_string()))?);
        for (i, value) in results.enumerate() {
            collected.push(i, value)?;
        }
        iteration += 1;
    }
    let joined = collected.join(context, |i| output_type(body, 1 + carried + i), |_| (0, false))?;
    states.extend(joined);
    Ok(states)
}

fn run_scan(
    a: &ScanAttributes,
    body: &Graph,
    inputs: &[Option<&RuntimeValue>],
    context: &OpContext,
) -> Result<Vec<RuntimeValue>, OpError> {
    let mut states: Vec<RuntimeValue> = (0..a.states)
        .map(|i| required_input(inputs, i, "an initial state").cloned())
        .collect::<Result<_, _>>()?;
    let mut length = None;
    let mut scanned = Vec::with_capacity(a.scan_inputs);
    for i in 0..a.scan_inputs {
        let x = tensor_input(inputs, a.states + i, "a scanned operand")?;
        let axis = normal_axis(a.input_axes.get(i).copied().unwrap_or(0), x.dims().len())?;
        let size = x.dims()[axis];
        if *length.get_or_insert(size) != size {
            return invalid(format!("scanned operands of {size} and {} steps", length.unwrap_or(0)));
        }
        scanned.push((x, axis, a.input_reverse.get(i).copied().unwrap_or(false)));
    }
    let captures = all(inputs, a.states + a.scan_inputs)?;
    let Some(outputs) = body.outputs.len().checked_sub(a.states) else {
        return invalid(format!("a scan body with too few results for {} states", a.states));
    };
    let mut collected = Collected::new(context, outputs)?;
    let steps = length.unwrap_or(0);
    for step in 0..steps {
        let slices: Vec<RuntimeValue> = scanned
            .iter()
            .map(|&(x, axis, reverse)| {
                Ok(take(context, x, axis, if reverse { steps - 1 - step } else { step })?.into())
            })
            .collect::<Result<_, OpError>>()?;
        let mut formal: Vec<&RuntimeValue> = states.iter().collect();
        formal.extend(&slices);
        formal.extend(&captures);
        let mut results = interpret(body, &formal, context)?.into_iter();
        states = results.by_ref().take(a.states).collect();
        for (i, value) in results.enumerate() {
            collected.push(i, value)?;
        }
    }
    let axis = |i: usize| {
        (a.output_axes.get(i).copied().unwrap_or(0), a.output_reverse.get(i).copied().unwrap_or(false))
    };
    let joined = collected.join(context, |i| output_type(body, a.states + i), axis)?;
    states.extend(joined);
    Ok(states)
}

fn run_map(
    operands: usize,
    body: &Graph,
    inputs: &[Option<&RuntimeValue>],
    context: &OpContext,
) -> Result<Vec<RuntimeValue>, OpError> {
    let RuntimeValue::Sequence(_, items) = required_input(inputs, 0, "the sequence")? else {
        return invalid("operand 0 is no sequence");
    };
    let all = all(inputs, 0)?;
    let (operands, captures) = all.split_at(operands.min(all.len()));
    let mut results: Vec<Vec<RuntimeValue>> = vec![Vec::new(); body.outputs.len()];
    let mut held =
        context.memory.reserve("mapped sequence", Bytes::ZERO).map_err(|e| OpError::Budget(e.to_string()))?;
    let mut size = 0;
    for i in 0..items.len() {
        let mut formal = Vec::with_capacity(all.len());
        for operand in operands {
            formal.push(match operand {
                RuntimeValue::Sequence(_, others) => others.get(i).ok_or_else(|| {
                    OpError::Invalid(format!("sequences of {} and {} elements", items.len(), others.len()))
                })?,
                other => *other,
            });
        }
        formal.extend(captures);
        for (list, value) in results.iter_mut().zip(interpret(body, &formal, context)?) {
            size += size_of_value(&value);
            held.resize(Bytes(size)).map_err(|e| OpError::Budget(e.to_string()))?;
            list.push(value);
        }
    }
    let sequence = |(i, items): (usize, Vec<RuntimeValue>)| {
        let ty = items.first().map_or_else(
            || output_type(body, i),
            |v| match v {
                RuntimeValue::Tensor(t) => TensorType::unranked(t.dtype()).into(),
                other => other.value_type(),
            },
        );
        RuntimeValue::Sequence(ty, items)
    };
    Ok(results.into_iter().enumerate().map(sequence).collect())
}
