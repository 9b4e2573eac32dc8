//! If, Loop, Scan and SequenceMap: bodies become graphs whose captured values are explicit inputs.

use std::sync::Arc;

use lightering_graph::{Graph, Op, ScanAttributes, ValueId, ValueType};

use super::builder::GraphBuilder;
use super::facts::Fact;
use super::node::NodeReader;
use super::order::free_names;
use super::{Captured, Importer};
use crate::Result;
use crate::onnx::proto::GraphProto;

/// The values that bodies take from outside.
struct Captures {
    /// As the bodies see them, constants included.
    seen: Vec<(String, Captured)>,
    /// As operands of the node, constants not included.
    operands: Vec<Option<ValueId>>,
}

fn captures(b: &GraphBuilder, n: &NodeReader, bodies: &[&GraphProto]) -> Result<Captures> {
    let mut out = Captures { seen: Vec::new(), operands: Vec::new() };
    for name in free_names(bodies) {
        let id = b.names.get(&name).copied().flatten().ok_or_else(|| {
            n.invalid(
                format!("its subgraph reads {name:?}, which nothing makes"),
                "the name of a value inside or around the subgraph",
            )
        })?;
        let captured = Captured::of(b, id);
        if let Captured::Input(..) = captured {
            out.operands.push(Some(id));
        }
        out.seen.push((name, captured));
    }
    Ok(out)
}

struct Body {
    graph: Graph,
    inputs: usize,
    outputs: Vec<Fact>,
}

fn body(
    im: &mut Importer,
    b: &GraphBuilder,
    n: &NodeReader,
    proto: &GraphProto,
    captures: &Captures,
) -> Result<Body> {
    im.nested(n.place().to_owned(), |im| {
        let mut inner = GraphBuilder::new(&proto.name, Arc::clone(&b.opsets));
        im.fill(&mut inner, proto, Some(&captures.seen)).map_err(|e| e.within(n.place()))?;
        let outputs = inner.graph.outputs.iter().map(|id| inner.fact(*id)).collect();
        let inputs = inner.graph.inputs.len() - captures.operands.len();
        inner.graph.compact();
        Ok(Body { graph: inner.graph, inputs, outputs })
    })
}

fn finish(
    b: &mut GraphBuilder,
    n: &NodeReader,
    op: Op,
    inputs: Vec<Option<ValueId>>,
    facts: &[Fact],
) -> Result<()> {
    let outputs = b.finish(n, op, inputs)?;
    for (id, fact) in outputs.iter().zip(facts) {
        if let Some(id) = id {
            let known = b.fact(*id);
            b.set_fact(*id, Fact { dtype: fact.dtype.or(known.dtype), rank: fact.rank.or(known.rank) });
        }
    }
    Ok(())
}

fn check_outputs(n: &NodeReader, yields: usize) -> Result<()> {
    if n.output_count() > yields {
        return Err(n.invalid(
            format!("{} outputs", n.output_count()),
            format!("at most {yields}, which its subgraph yields"),
        ));
    }
    Ok(())
}

pub(super) fn convert_if(im: &mut Importer, b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let (then_proto, else_proto) = (n.graph("then_branch")?, n.graph("else_branch")?);
    n.max_inputs(1)?;
    let condition = n.required(0, "cond")?;
    let captures = captures(b, n, &[then_proto, else_proto])?;
    let then_body = body(im, b, n, then_proto, &captures)?;
    let else_body = body(im, b, n, else_proto, &captures)?;
    if then_body.inputs != 0 || else_body.inputs != 0 {
        return Err(n.invalid("a branch has inputs", "branches without inputs"));
    }
    if then_body.outputs.len() != else_body.outputs.len() {
        return Err(n.invalid(
            format!("branches with {} and {} outputs", then_body.outputs.len(), else_body.outputs.len()),
            "as many in both",
        ));
    }
    check_outputs(n, then_body.outputs.len())?;
    let facts: Vec<Fact> = then_body
        .outputs
        .iter()
        .zip(&else_body.outputs)
        .map(|(a, b)| Fact { dtype: a.dtype.or(b.dtype), rank: a.rank.filter(|_| a.rank == b.rank) })
        .collect();
    let mut inputs = vec![Some(condition)];
    inputs.extend(captures.operands);
    let op = Op::If { then_body: Box::new(then_body.graph), else_body: Box::new(else_body.graph) };
    finish(b, n, op, inputs, &facts)
}

pub(super) fn convert_loop(im: &mut Importer, b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let proto = n.graph("body")?;
    let captures = captures(b, n, &[proto])?;
    let body = body(im, b, n, proto, &captures)?;
    let mut inputs = n.inputs.clone();
    inputs.resize(inputs.len().max(2), None);
    let carried = inputs.len() - 2;
    if inputs[2..].contains(&None) {
        return Err(n.invalid("a carried value is missing", "every carried value to be given"));
    }
    if body.inputs != carried + 2 || body.outputs.len() < carried + 1 {
        return Err(n.invalid(
            format!("a body of {} inputs and {} outputs", body.inputs, body.outputs.len()),
            format!(
                "{} inputs and at least {} outputs for {carried} carried values",
                carried + 2,
                carried + 1
            ),
        ));
    }
    check_outputs(n, body.outputs.len() - 1)?;
    let facts: Vec<Fact> = body.outputs[1..]
        .iter()
        .enumerate()
        .map(|(i, f)| if i < carried { Fact { rank: None, ..*f } } else { stacked(*f) })
        .collect();
    inputs.extend(captures.operands);
    finish(b, n, Op::Loop { carried, body: Box::new(body.graph) }, inputs, &facts)
}

/// What is known of a value that is stacked along a new axis.
fn stacked(fact: Fact) -> Fact {
    Fact { rank: fact.rank.map(|r| r + 1), ..fact }
}

/// Axes or directions, one for each of `count` values, 0 if the attribute is not there.
fn per_value(n: &NodeReader, name: &str, count: usize) -> Result<Vec<i64>> {
    match n.ints(name)? {
        None => Ok(vec![0; count]),
        Some(values) if values.len() == count => Ok(values.to_vec()),
        Some(values) => {
            Err(n.invalid(format!("attribute {name:?} of {} entries", values.len()), format!("{count}")))
        }
    }
}

fn directions(n: &NodeReader, name: &str, count: usize) -> Result<Vec<bool>> {
    per_value(n, name, count)?
        .into_iter()
        .map(|v| match v {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(n.invalid(format!("attribute {name:?} holds {other}"), "0 or 1")),
        })
        .collect()
}

pub(super) fn convert_scan(im: &mut Importer, b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let proto = n.graph("body")?;
    let scan_inputs = n.size("num_scan_inputs", 0)?;
    let mut given = n.inputs.clone();
    let batched = n.opset < 9;
    if batched {
        // Version 8 has a batch dimension in everything, and lengths of the sequences as the first operand.
        if n.input(0).is_some() {
            return Err(n.unsupported("the sequence lengths of Scan, version 8"));
        }
        if given.is_empty() {
            return Err(n.invalid("no inputs", "at least one scanned input"));
        }
        given.remove(0);
    }
    if given.contains(&None) {
        return Err(n.invalid("an input is missing", "every input to be given"));
    }
    if scan_inputs == 0 || scan_inputs > given.len() {
        return Err(n.invalid(
            format!("{scan_inputs} scanned inputs of {} in all", given.len()),
            "at least one, and no more than there are",
        ));
    }
    let states = given.len() - scan_inputs;
    let captures = captures(b, n, &[proto])?;
    let body = body(im, b, n, proto, &captures)?;
    if body.inputs != given.len() || body.outputs.len() < states {
        return Err(n.invalid(
            format!("a body of {} inputs and {} outputs", body.inputs, body.outputs.len()),
            format!("{} inputs and at least {states} outputs", given.len()),
        ));
    }
    check_outputs(n, body.outputs.len())?;
    let scan_outputs = body.outputs.len() - states;
    let attributes = if batched {
        ScanAttributes {
            states,
            scan_inputs,
            input_axes: vec![0; scan_inputs],
            input_reverse: directions(n, "directions", scan_inputs)?,
            output_axes: vec![0; scan_outputs],
            output_reverse: vec![false; scan_outputs],
        }
    } else {
        ScanAttributes {
            states,
            scan_inputs,
            input_axes: per_value(n, "scan_input_axes", scan_inputs)?,
            input_reverse: directions(n, "scan_input_directions", scan_inputs)?,
            output_axes: per_value(n, "scan_output_axes", scan_outputs)?,
            output_reverse: directions(n, "scan_output_directions", scan_outputs)?,
        }
    };
    let facts: Vec<Fact> =
        body.outputs.iter().enumerate().map(|(i, f)| if i < states { *f } else { stacked(*f) }).collect();
    let yields = body.outputs.len();
    let inner = Op::Scan { attributes, body: Box::new(body.graph) };
    if !batched {
        given.extend(captures.operands);
        return finish(b, n, inner, given, &facts);
    }
    // The batch is a scan of its own, without states, around the scan of each sample.
    let mut around = Graph::new(format!("{}/batch", n.name()));
    let outer_count = given.len();
    let mut operands = Vec::new();
    for i in 0..outer_count {
        operands.push(Some(around.add_input(format!("{}/sample {i}", n.name()), ValueType::Unknown)));
    }
    for (name, captured) in &captures.seen {
        if let Captured::Input(ty, _) = captured {
            operands.push(Some(around.add_input(name.as_str(), ty.clone())));
        }
    }
    let names = (0..yields).map(|i| format!("{}/result {i}", n.name())).collect();
    around.outputs = around.add_node_named(n.name(), inner, operands, names);
    let batch = ScanAttributes {
        states: 0,
        scan_inputs: outer_count,
        input_axes: vec![0; outer_count],
        input_reverse: vec![false; outer_count],
        output_axes: vec![0; yields],
        output_reverse: vec![false; yields],
    };
    given.extend(captures.operands);
    let facts: Vec<Fact> = facts.into_iter().map(stacked).collect();
    finish(b, n, Op::Scan { attributes: batch, body: Box::new(around) }, given, &facts)
}

pub(super) fn convert_sequence_map(im: &mut Importer, b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let proto = n.graph("body")?;
    n.required(0, "input_sequence")?;
    let captures = captures(b, n, &[proto])?;
    let body = body(im, b, n, proto, &captures)?;
    let operands = n.inputs.len();
    if body.inputs != operands {
        return Err(
            n.invalid(format!("a body of {} inputs", body.inputs), format!("{operands}, one per operand"))
        );
    }
    check_outputs(n, body.outputs.len())?;
    let mut inputs = n.inputs.clone();
    inputs.extend(captures.operands);
    let facts: Vec<Fact> = body.outputs.iter().map(|f| Fact { rank: None, ..*f }).collect();
    finish(b, n, Op::SequenceMap { operands, body: Box::new(body.graph) }, inputs, &facts)
}
