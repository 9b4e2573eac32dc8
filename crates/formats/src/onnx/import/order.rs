//! The order of nodes, and which names a subgraph takes from outside.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

use super::node::place;
use crate::onnx::proto::{AttributeValue, GraphProto, NodeProto};
use crate::{Error, Result};

/// Indices of the nodes in an order in which every value is made before it is read; the file's own order if it is one.
pub(super) fn sorted(nodes: &[NodeProto]) -> Result<Vec<usize>> {
    let mut producer: HashMap<&str, usize> = HashMap::new();
    for (index, node) in nodes.iter().enumerate() {
        for name in node.output.iter().filter(|n| !n.is_empty()) {
            if let Some(first) = producer.insert(name, index) {
                return Err(Error::invalid(
                    place(node),
                    format!("{name:?} is also made by {}", place(&nodes[first])),
                    "one definition of each name",
                ));
            }
        }
    }
    let mut waiting = vec![0usize; nodes.len()];
    let mut readers: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
    let mut in_order = true;
    for (index, node) in nodes.iter().enumerate() {
        let mut read = |name: &str| {
            if let Some(&made_by) = producer.get(name) {
                in_order &= made_by < index;
                waiting[index] += 1;
                readers[made_by].push(index);
            }
        };
        node.input.iter().for_each(|name| read(name));
        for graph in subgraphs(node) {
            free_names(&[graph]).iter().for_each(|name| read(name));
        }
    }
    if in_order {
        return Ok((0..nodes.len()).collect());
    }
    let mut ready: BinaryHeap<Reverse<usize>> =
        (0..nodes.len()).filter(|i| waiting[*i] == 0).map(Reverse).collect();
    let mut order = Vec::with_capacity(nodes.len());
    while let Some(Reverse(index)) = ready.pop() {
        order.push(index);
        for &reader in &readers[index] {
            waiting[reader] -= 1;
            if waiting[reader] == 0 {
                ready.push(Reverse(reader));
            }
        }
    }
    if let Some(stuck) = (0..nodes.len()).find(|i| waiting[*i] > 0) {
        return Err(Error::invalid(
            place(&nodes[stuck]),
            "it depends on its own result",
            "a graph without cycles (control flow is in subgraphs)",
        ));
    }
    Ok(order)
}

fn subgraphs(node: &NodeProto) -> impl Iterator<Item = &GraphProto> {
    node.attribute.iter().flat_map(|a| match &a.value {
        AttributeValue::Graph(graph) => std::slice::from_ref(&**graph),
        AttributeValue::Graphs(graphs) => graphs.as_slice(),
        _ => &[],
    })
}

/// Names that the graphs read and do not define, in order of first use.
pub(super) fn free_names(graphs: &[&GraphProto]) -> Vec<String> {
    let mut out = Vec::new();
    let mut seen = HashSet::new();
    for graph in graphs {
        collect(graph, &mut |name| {
            if seen.insert(name.to_owned()) {
                out.push(name.to_owned());
            }
        });
    }
    out
}

fn collect(graph: &GraphProto, found: &mut dyn FnMut(&str)) {
    let mut defined: HashSet<&str> = HashSet::new();
    defined.extend(graph.input.iter().map(|v| v.name.as_str()));
    defined.extend(graph.initializer.iter().map(|t| t.name.as_str()));
    defined.extend(graph.sparse_initializer.iter().map(|t| t.values.name.as_str()));
    defined.extend(graph.node.iter().flat_map(|n| n.output.iter().map(String::as_str)));
    let mut free = |name: &str| {
        if !name.is_empty() && !defined.contains(name) {
            found(name);
        }
    };
    for node in &graph.node {
        node.input.iter().for_each(|name| free(name));
        for inner in subgraphs(node) {
            collect(inner, &mut free);
        }
    }
    graph.output.iter().for_each(|v| free(&v.name));
}
