//! Inference over a whole graph.

use std::collections::HashMap;

use super::control::control;
use super::movement::symbolic_result;
use super::operands::{Fact, Operands, SymbolicInt};
use super::{finish, rule};
use crate::{Graph, GraphError, NodeId, Tensor, ValueId, ValueType};

/// What the caller knows of a body's input.
#[derive(Clone)]
pub(super) struct Argument<'a> {
    pub ty: ValueType,
    pub value: Option<&'a Tensor>,
    pub symbolic: Option<&'a [SymbolicInt]>,
}

/// One pass over the nodes of a graph in order, and what it has learned about integers on the way.
#[derive(Default)]
pub(crate) struct Sweep<'a> {
    /// Elements of body inputs that the caller knows.
    values: HashMap<ValueId, &'a Tensor>,
    /// Results of shape arithmetic.
    symbolic: HashMap<ValueId, Vec<SymbolicInt>>,
    depth: usize,
}

impl Sweep<'_> {
    /// The sweep of a body that is `depth` levels down.
    pub(crate) fn at_depth(depth: usize) -> Self {
        Sweep { depth, ..Sweep::default() }
    }

    /// What shape arithmetic knows of a value.
    pub(crate) fn symbolic(&self, value: ValueId) -> Option<&[SymbolicInt]> {
        self.symbolic.get(&value).map(Vec::as_slice)
    }

    /// Infers one node, whose operands have been inferred, and stores the types of its results.
    pub(crate) fn visit(&mut self, graph: &mut Graph, id: NodeId) -> Result<(), GraphError> {
        let Some(mut node) = graph.nodes.get_mut(id.index()).and_then(Option::take) else { return Ok(()) };
        let facts: Vec<Option<Fact<'_>>> = node
            .inputs
            .iter()
            .map(|input| {
                let id = (*input)?;
                let value = graph.values.get(id.index())?;
                Some(Fact {
                    ty: &value.ty,
                    value: value.tensor().or(self.values.get(&id).copied()),
                    symbolic: self.symbolic.get(&id).map(Vec::as_slice),
                })
            })
            .collect();
        let has_bodies = !node.op.bodies().is_empty();
        let inferred = match has_bodies {
            true => control(&mut node, &facts, self.depth),
            false => rule(&Operands { node: &node, facts: &facts }).map_err(|p| GraphError::at(&node, p)),
        };
        let types = inferred.and_then(|types| finish(&node, types));
        let symbolic = match &types {
            Ok(_) if !has_bodies => symbolic_result(&Operands { node: &node, facts: &facts }),
            _ => None,
        };
        if let (Some(list), Some(out)) = (symbolic, node.output(0)) {
            self.symbolic.insert(out, list);
        }
        let result = types.map(|types| {
            for (output, ty) in node.outputs.iter().zip(types) {
                if let Some(value) = output.and_then(|v| graph.values.get_mut(v.index())) {
                    value.ty = ty;
                }
            }
        });
        graph.nodes[id.index()] = Some(node);
        result
    }
}

/// Infers a body whose inputs are given.
pub(super) fn infer_body(graph: &mut Graph, inputs: &[Argument<'_>], depth: usize) -> Result<(), GraphError> {
    let mut sweep = Sweep::at_depth(depth);
    for (&id, argument) in graph.inputs.iter().zip(inputs) {
        if let Some(value) = argument.value {
            sweep.values.insert(id, value);
        }
        if let Some(symbolic) = argument.symbolic {
            sweep.symbolic.insert(id, symbolic.to_vec());
        }
        if let Some(v) = graph.values.get_mut(id.index()).filter(|_| argument.ty != ValueType::Unknown) {
            v.ty = argument.ty.clone();
        }
    }
    for id in graph.node_ids() {
        sweep.visit(graph, id)?;
    }
    Ok(())
}

impl Graph {
    /// Infers the types of all values in order, bodies included, from those of the inputs, the states and the
    /// constants. Whatever stood there before is replaced.
    ///
    /// Only constants are looked at, not computed ones, but simple shape arithmetic is followed, symbols included;
    /// [`Fold`](crate::passes::Fold) resolves the rest.
    ///
    /// # Errors
    /// The first node whose operands contradict its operator.
    pub fn infer(&mut self) -> Result<(), GraphError> {
        infer_body(self, &[], 0)
    }
}
