//! Control flow, sequences and optionals.

use super::movement::concat_sequence;
use super::operands::*;
use super::sweep::{Argument, infer_body};
use crate::{DType, Dim, Graph, GraphError, Node, Op, ScanAttributes, TensorType, ValueType};

/// Deepest nesting of bodies that is followed.
pub(super) const BODY_DEPTH_MAX: usize = 32;
/// Up to this depth, the types that a loop carries are refined by repeated passes over its body; below it they are
/// taken as open at once, so that nesting does not multiply the work.
const REFINED_DEPTH_MAX: usize = 4;

/// Types of the results of a node with bodies, whose values get their types as well.
pub(super) fn control(
    node: &mut Node,
    facts: &[Option<Fact<'_>>],
    depth: usize,
) -> Result<Vec<ValueType>, GraphError> {
    if depth >= BODY_DEPTH_MAX {
        return Err(GraphError::at(node, format!("bodies are nested more than {BODY_DEPTH_MAX} deep")));
    }
    // The operator is taken out, so that its bodies can be changed while errors name the node.
    let mut op = std::mem::replace(&mut node.op, Op::Size);
    let result = match &mut op {
        Op::If { then_body, else_body } => choice(facts, then_body, else_body, depth),
        Op::Loop { carried, body } => repeat(facts, *carried, body, depth),
        Op::Scan { attributes, body } => scan(facts, attributes, body, depth),
        Op::SequenceMap { operands, body } => map(facts, *operands, body, depth),
        _ => Ok(Vec::new()),
    };
    node.op = op;
    result.map_err(|e| match e {
        Failure::Here(problem) => GraphError::at(node, problem),
        Failure::Inside(error) => error,
    })
}

/// A problem of the node itself, or one inside its body that already names a node.
enum Failure {
    Here(String),
    Inside(GraphError),
}

impl From<String> for Failure {
    fn from(problem: String) -> Failure {
        Failure::Here(problem)
    }
}

impl From<GraphError> for Failure {
    fn from(error: GraphError) -> Failure {
        Failure::Inside(error)
    }
}

fn require_count(found: usize, expected: usize, what: &str) -> Result<(), Failure> {
    match found == expected {
        true => Ok(()),
        false => Err(Failure::Here(format!("the body has {found} {what}, expected {expected}"))),
    }
}

fn argument<'a>(fact: &Option<Fact<'a>>) -> Argument<'a> {
    match fact {
        Some(f) => Argument { ty: f.ty.clone(), value: f.value, symbolic: f.symbolic },
        None => Argument { ty: ValueType::Unknown, value: None, symbolic: None },
    }
}

fn of_type<'a>(ty: ValueType) -> Argument<'a> {
    Argument { ty, value: None, symbolic: None }
}

fn require_bool(fact: &Option<Fact<'_>>) -> Result<Option<bool>, Failure> {
    let Some(fact) = fact else { return Ok(None) };
    match fact.ty {
        ValueType::Tensor(t) if t.dtype == DType::Bool => {}
        ValueType::Unknown => return Ok(None),
        other => return Err(Failure::Here(format!("condition is {other}, expected one bool"))),
    }
    Ok(fact.value.and_then(|t| t.to_i64s()).and_then(|v| v.first().copied()).map(|b| b != 0))
}

fn output_types(body: &Graph) -> Vec<ValueType> {
    body.outputs.iter().map(|&v| body.value(v).ty.clone()).collect()
}

fn choice(
    facts: &[Option<Fact<'_>>],
    then_body: &mut Graph,
    else_body: &mut Graph,
    depth: usize,
) -> Result<Vec<ValueType>, Failure> {
    let condition = match facts.first() {
        Some(Some(_)) => require_bool(&facts[0])?,
        _ => return Err(Failure::Here("the condition is missing".to_owned())),
    };
    let arguments: Vec<Argument<'_>> = facts[1..].iter().map(argument).collect();
    for body in [&mut *then_body, &mut *else_body] {
        require_count(body.inputs.len(), arguments.len(), "inputs")?;
    }
    require_count(else_body.outputs.len(), then_body.outputs.len(), "results")?;
    match condition {
        Some(true) => {
            infer_body(then_body, &arguments, depth + 1)?;
            Ok(output_types(then_body))
        }
        Some(false) => {
            infer_body(else_body, &arguments, depth + 1)?;
            Ok(output_types(else_body))
        }
        None => {
            let first = infer_body(then_body, &arguments, depth + 1);
            let second = infer_body(else_body, &arguments, depth + 1);
            // Models choose between branches of which one cannot run for the shape at hand (squeeze this axis if its
            // size is 1): the results are then those of the other.
            match (first, second) {
                (Err(e), Err(_)) => return Err(e.into()),
                (Ok(()), Err(_)) => return Ok(output_types(then_body)),
                (Err(_), Ok(())) => return Ok(output_types(else_body)),
                (Ok(()), Ok(())) => {}
            }
            let branches = output_types(then_body).into_iter().zip(output_types(else_body));
            branches
                .map(|(a, b)| {
                    join(&a, &b).ok_or_else(|| {
                        Failure::Here(format!("one branch yields {a} and the other {b}, expected one type"))
                    })
                })
                .collect()
        }
    }
}

/// Forgets shapes.
fn opened(ty: &ValueType) -> ValueType {
    match ty {
        ValueType::Tensor(t) => TensorType::unranked(t.dtype).into(),
        ValueType::Sequence(t) => ValueType::Sequence(Box::new(opened(t))),
        ValueType::Optional(t) => ValueType::Optional(Box::new(opened(t))),
        other => other.clone(),
    }
}

/// Runs `pass` over a body until the types that it carries from one round to the next are stable: types only ever
/// get wider, and after two rounds those that still change lose their shape. `pass` takes the carried types and
/// returns those after one round.
fn carry(
    mut types: Vec<ValueType>,
    depth: usize,
    mut pass: impl FnMut(&[ValueType]) -> Result<Vec<ValueType>, Failure>,
) -> Result<Vec<ValueType>, Failure> {
    const ROUNDS_MAX: usize = 4;
    for round in 0..ROUNDS_MAX {
        let after = pass(&types)?;
        let mut stable = true;
        for (ty, next) in types.iter_mut().zip(&after) {
            let joined = match ty {
                // A first content of unknown type tells nothing.
                ValueType::Unknown => ValueType::Unknown,
                _ => join(ty, next).ok_or_else(|| {
                    Failure::Here(format!("carries {ty} into the body, which yields {next} for it"))
                })?,
            };
            if joined != *ty {
                stable = false;
                *ty = if round >= 1 || depth > REFINED_DEPTH_MAX { opened(&joined) } else { joined };
            }
        }
        if stable {
            return Ok(types);
        }
    }
    // Without shapes only an unknown type can still have changed, and nothing is wider than that.
    Ok(types.iter().map(opened).collect())
}

/// Adds a leading (or other) dimension to what a body yields per round.
fn stacked(ty: &ValueType, count: Dim, axis: i64) -> Result<ValueType, Failure> {
    match ty {
        ValueType::Tensor(t) => {
            let shape = match &t.shape {
                None => None,
                Some(s) => {
                    let at = axis_of(axis, s.len() + 1, "output axis")?;
                    let mut s = s.clone();
                    s.insert(at, count);
                    Some(s)
                }
            };
            Ok(TensorType { dtype: t.dtype, shape }.into())
        }
        ValueType::Unknown => Ok(ValueType::Unknown),
        other => Err(Failure::Here(format!("a scanned result is {other}, expected a tensor"))),
    }
}

fn repeat(
    facts: &[Option<Fact<'_>>],
    carried: usize,
    body: &mut Graph,
    depth: usize,
) -> Result<Vec<ValueType>, Failure> {
    if facts.len() < 2 || facts.len() - 2 < carried {
        return Err(Failure::Here(format!(
            "has {} operands, expected 2 and {carried} carried ones",
            facts.len()
        )));
    }
    require_count(body.inputs.len(), facts.len(), "inputs")?;
    if body.outputs.len() < 1 + carried {
        return Err(Failure::Here(format!(
            "the body has {} results, expected a condition and {carried} carried ones",
            body.outputs.len()
        )));
    }
    let condition = require_bool(&facts[1])?;
    let scalar = |d| ValueType::from(TensorType::fixed(d, &[]));
    let iteration = scalar(DType::I64);
    let mut first = vec![match &facts[1] {
        Some(f) => f.ty.clone(),
        None => scalar(DType::Bool),
    }];
    for fact in &facts[2..2 + carried] {
        match fact {
            Some(f) => first.push(f.ty.clone()),
            None => return Err(Failure::Here("a carried value is missing".to_owned())),
        }
    }
    let captures: Vec<Argument<'_>> = facts[2 + carried..].iter().map(argument).collect();
    let types = carry(first, depth, |types| {
        let mut arguments = vec![of_type(iteration.clone())];
        arguments.extend(types.iter().cloned().map(of_type));
        arguments.extend(captures.iter().cloned());
        infer_body(body, &arguments, depth + 1)?;
        Ok(output_types(body)[..1 + carried].to_vec())
    })?;
    // The number of rounds is known only when nothing can end the loop early.
    let goes_on = {
        let out = body.value(body.outputs[0]);
        let always = out.tensor().and_then(|t| t.to_i64s()).is_some_and(|v| v.iter().all(|&b| b != 0));
        let passed_on = is_passed_on(body, 1, 0) && (condition == Some(true) || facts[1].is_none());
        (always && condition != Some(false)) && (facts[1].is_none() || condition == Some(true)) || passed_on
    };
    let count = match &facts[0] {
        Some(f) if goes_on => f.value.and_then(|t| t.to_i64s()).and_then(|v| v.first().copied()),
        _ => None,
    };
    let count = count.map_or(Dim::UNKNOWN, |n| Dim::Fixed(n.max(0) as usize));
    // A loop may start from a value that can be absent and always yield one that is there.
    let result = |(ty, yielded): (&ValueType, &ValueType)| match (ty, yielded) {
        (_, ValueType::Optional(_)) => ty.clone(),
        (ValueType::Optional(content), _) => (**content).clone(),
        _ => ty.clone(),
    };
    let yielded = output_types(body);
    let mut results: Vec<ValueType> = types[1..].iter().zip(&yielded[1..]).map(result).collect();
    for ty in &yielded[1 + carried..] {
        results.push(stacked(ty, count.clone(), 0)?);
    }
    Ok(results)
}

/// Whether result `output` of a body is its input `input`, possibly through copies.
fn is_passed_on(body: &Graph, input: usize, output: usize) -> bool {
    let mut value = body.outputs[output];
    for _ in 0..body.nodes.len() + 1 {
        if body.inputs.get(input) == Some(&value) {
            return true;
        }
        let Some(producer) = body.producer(value).and_then(|id| body.nodes.get(id.index())?.as_ref()) else {
            return false;
        };
        match (&producer.op, producer.input(0)) {
            (Op::Unary(crate::UnaryOp::Identity), Some(x)) => value = x,
            _ => return false,
        }
    }
    false
}

fn scan(
    facts: &[Option<Fact<'_>>],
    a: &ScanAttributes,
    body: &mut Graph,
    depth: usize,
) -> Result<Vec<ValueType>, Failure> {
    let formal = a.states.checked_add(a.scan_inputs).filter(|&n| n <= facts.len());
    let Some(formal) = formal else {
        return Err(Failure::Here(format!(
            "has {} operands, expected {} states and {} scanned ones",
            facts.len(),
            a.states,
            a.scan_inputs
        )));
    };
    require_count(body.inputs.len(), facts.len(), "inputs")?;
    if body.outputs.len() < a.states {
        return Err(Failure::Here(format!(
            "the body has {} results for {} states",
            body.outputs.len(),
            a.states
        )));
    }
    let mut length = Dim::UNKNOWN;
    let mut elements = Vec::new();
    for (i, fact) in facts[a.states..formal].iter().enumerate() {
        let Some(fact) = fact else { return Err(Failure::Here("a scanned operand is missing".to_owned())) };
        elements.push(of_type(match fact.ty {
            ValueType::Tensor(t) => {
                let shape = match &t.shape {
                    None => None,
                    Some(s) => {
                        let at = axis_of(a.input_axes.get(i).copied().unwrap_or(0), s.len(), "input axis")?;
                        let mut s = s.clone();
                        let d = s.remove(at);
                        length = unify(&length, &d).ok_or_else(|| {
                            Failure::Here(format!("scanned operands have lengths {length} and {d}"))
                        })?;
                        Some(s)
                    }
                };
                TensorType { dtype: t.dtype, shape }.into()
            }
            ValueType::Unknown => ValueType::Unknown,
            other => return Err(Failure::Here(format!("a scanned operand is {other}, expected a tensor"))),
        }));
    }
    let mut first = Vec::new();
    for fact in &facts[..a.states] {
        match fact {
            Some(f) => first.push(f.ty.clone()),
            None => return Err(Failure::Here("a state is missing".to_owned())),
        }
    }
    let captures: Vec<Argument<'_>> = facts[formal..].iter().map(argument).collect();
    let states = carry(first, depth, |types| {
        let mut arguments: Vec<Argument<'_>> = types.iter().cloned().map(of_type).collect();
        arguments.extend(elements.iter().cloned());
        arguments.extend(captures.iter().cloned());
        infer_body(body, &arguments, depth + 1)?;
        Ok(output_types(body)[..a.states].to_vec())
    })?;
    let mut results = states;
    for (i, ty) in output_types(body)[a.states..].iter().enumerate() {
        results.push(stacked(ty, length.clone(), a.output_axes.get(i).copied().unwrap_or(0))?);
    }
    Ok(results)
}

fn map(
    facts: &[Option<Fact<'_>>],
    operands: usize,
    body: &mut Graph,
    depth: usize,
) -> Result<Vec<ValueType>, Failure> {
    if operands == 0 || operands > facts.len() {
        return Err(Failure::Here(format!("maps {operands} of {} operands", facts.len())));
    }
    require_count(body.inputs.len(), facts.len(), "inputs")?;
    let mut arguments = Vec::new();
    for (i, fact) in facts.iter().enumerate() {
        arguments.push(match fact {
            Some(Fact { ty: ValueType::Sequence(element), .. }) if i < operands => {
                of_type((**element).clone())
            }
            Some(Fact { ty: ValueType::Tensor(t), .. }) if i == 0 => {
                return Err(Failure::Here(format!("operand 0 is {t}, expected a sequence")));
            }
            other => argument(other),
        });
    }
    infer_body(body, &arguments, depth + 1)?;
    Ok(output_types(body).into_iter().map(|t| ValueType::Sequence(Box::new(t))).collect())
}

/// The element type of the sequence operand 0.
fn element(o: &Operands<'_>) -> Rule<ValueType> {
    match o.required(0, "sequence")? {
        ValueType::Sequence(t) => Ok((**t).clone()),
        ValueType::Unknown => Ok(ValueType::Unknown),
        other => Err(format!("operand 0 is {other}, expected a sequence")),
    }
}

fn check_position(o: &Operands<'_>, i: usize) -> Rule<()> {
    o.int(i, "position").map(|_| ())
}

pub(super) fn sequence(o: &Operands<'_>) -> Rule<Vec<ValueType>> {
    let list = |t: ValueType| vec![ValueType::Sequence(Box::new(t))];
    Ok(match &o.node.op {
        Op::SequenceConstruct => {
            let mut all: Option<ValueType> = None;
            for i in 0..o.facts.len() {
                let ty = o.tensor(i, "element")?.to_type();
                all = Some(match all {
                    None => ty,
                    Some(t) => join(&t, &ty)
                        .ok_or_else(|| format!("elements are {t} and {ty}, expected one type"))?,
                });
            }
            list(all.ok_or("has no operands, expected at least 1")?)
        }
        Op::SequenceEmpty { dtype } => list(TensorType::unranked(*dtype).into()),
        Op::SequenceAt => {
            check_position(o, 1)?;
            vec![element(o)?]
        }
        Op::SequenceErase => {
            check_position(o, 1)?;
            list(element(o)?)
        }
        Op::SequenceInsert => {
            check_position(o, 2)?;
            let (t, x) = (element(o)?, o.required(1, "x")?);
            list(join(&t, x).ok_or_else(|| format!("x is {x}, but the elements are {t}"))?)
        }
        Op::SequenceLength => {
            element(o)?;
            vec![TensorType::fixed(DType::I64, &[]).into()]
        }
        Op::ConcatFromSequence { axis, new_axis } => match element(o)? {
            ValueType::Tensor(t) => {
                let known = Known { role: "element", dtype: Some(t.dtype), shape: t.shape };
                concat_sequence(Some(&known), *axis, *new_axis, Some(t.dtype))?
            }
            ValueType::Unknown => vec![ValueType::Unknown],
            other => return Err(format!("the elements are {other}, expected tensors")),
        },
        Op::SplitToSequence { axis, keep_dims } => {
            let x = o.tensor(0, "x")?;
            let sizes = o.ints(1, "split")?;
            let single = o.fact(1).and_then(|f| f.ty.tensor()?.shape.as_ref().map(Vec::is_empty));
            let shape = match x.shape {
                None => None,
                Some(mut s) => {
                    let axis = axis_of(*axis, s.len(), "axis")?;
                    if !o.has(1) && !keep_dims {
                        s.remove(axis);
                    } else if !o.has(1) {
                        s[axis] = Dim::Fixed(1);
                    } else {
                        s[axis] = part(sizes.as_deref(), single, &s[axis])?;
                    }
                    Some(s)
                }
            };
            list(typed(x.dtype, shape))
        }
        Op::OptionalConstruct { ty } => {
            let inner = match (o.fact(0), ty) {
                (Some(f), Some(t)) => {
                    join(f.ty, t).ok_or_else(|| format!("the content is {}, expected {t}", f.ty))?;
                    f.ty.clone()
                }
                (Some(f), None) => f.ty.clone(),
                (None, Some(t)) => t.clone(),
                (None, None) => return Err("an empty optional needs a type".to_owned()),
            };
            vec![ValueType::Optional(Box::new(inner))]
        }
        Op::OptionalGetElement => match o.required(0, "x")? {
            ValueType::Optional(t) => vec![(**t).clone()],
            other => vec![other.clone()],
        },
        Op::OptionalHasElement => vec![TensorType::fixed(DType::Bool, &[]).into()],
        _ => return Err("is not a sequence operator".to_owned()),
    })
}

/// The size that all parts of a split have, if they have one.
fn part(sizes: Option<&[i64]>, single: Option<bool>, whole: &Dim) -> Rule<Dim> {
    let Some(sizes) = sizes else { return Ok(Dim::UNKNOWN) };
    for &n in sizes {
        size_of(n, "a part")?;
    }
    match (single, sizes, whole) {
        (Some(true), [n], Dim::Fixed(w)) => {
            let n = *n as usize;
            match n {
                0 => Err("a part is 0, expected at least 1".to_owned()),
                _ => Ok(if w % n == 0 { Dim::Fixed(n) } else { Dim::UNKNOWN }),
            }
        }
        (Some(false), [first, rest @ ..], whole) => {
            let sum = sizes.iter().try_fold(0i64, |a, &b| a.checked_add(b));
            if let Dim::Fixed(w) = whole
                && sum.and_then(|s| usize::try_from(s).ok()) != Some(*w)
            {
                return Err(format!("the parts {sizes:?} do not add up to {w}"));
            }
            Ok(if rest.iter().all(|n| n == first) { Dim::Fixed(*first as usize) } else { Dim::UNKNOWN })
        }
        _ => Ok(Dim::UNKNOWN),
    }
}
