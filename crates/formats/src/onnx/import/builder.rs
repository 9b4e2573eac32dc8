//! The graph that is being filled, with the names that are in scope.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use lightering_graph::{
    Constant, DType, Graph, Op, Tensor, TensorType, UnaryOp, Value, ValueId, ValueKind, ValueType,
};

use super::facts::{Fact, infer, output_count};
use super::node::NodeReader;
use crate::onnx::proto::GraphProto;
use crate::{Error, Result};

pub(super) struct GraphBuilder {
    pub graph: Graph,
    /// Values by the names of the current scope; `None` for a function's input that the call leaves out.
    pub names: HashMap<String, Option<ValueId>>,
    /// Versions of the operator sets by domain.
    pub opsets: Arc<HashMap<String, i64>>,
    /// Inside a function: what goes before the names of its values.
    pub prefix: Option<String>,
    /// What the file declares of the values inside.
    pub hints: HashMap<String, Fact>,
    /// All names of this graph, the future ones too.
    taken: HashSet<String>,
    facts: Vec<Fact>,
}

impl GraphBuilder {
    pub fn new(name: &str, opsets: Arc<HashMap<String, i64>>) -> GraphBuilder {
        GraphBuilder {
            graph: Graph::new(name),
            names: HashMap::new(),
            opsets,
            prefix: None,
            hints: HashMap::new(),
            taken: HashSet::new(),
            facts: Vec::new(),
        }
    }

    /// Keeps the names of a graph from being used for values that the import makes up.
    pub fn reserve(&mut self, proto: &GraphProto) {
        self.taken.extend(proto.initializer.iter().map(|t| t.name.clone()));
        self.taken.extend(proto.sparse_initializer.iter().map(|t| t.values.name.clone()));
        self.taken.extend(proto.input.iter().map(|v| v.name.clone()));
        self.taken.extend(proto.node.iter().flat_map(|n| n.output.iter().cloned()));
    }

    fn fresh(&mut self, wanted: String) -> String {
        let mut name = wanted.clone();
        let mut number = 1;
        while !self.taken.insert(name.clone()) {
            number += 1;
            name = format!("{wanted}#{number}");
        }
        name
    }

    pub fn fact(&self, id: ValueId) -> Fact {
        self.facts.get(id.index()).copied().unwrap_or_default()
    }

    pub fn set_fact(&mut self, id: ValueId, fact: Fact) {
        if self.facts.len() <= id.index() {
            self.facts.resize(id.index() + 1, Fact::default());
        }
        self.facts[id.index()] = fact;
    }

    /// Takes what is known of a value from its type.
    pub fn learn(&mut self, id: ValueId) {
        let fact = Fact::of(&self.graph.value(id).ty);
        self.set_fact(id, fact);
    }

    pub fn dtype(&self, id: ValueId) -> Option<DType> {
        self.fact(id).dtype
    }

    pub fn rank(&self, id: ValueId) -> Option<usize> {
        self.fact(id).rank
    }

    /// The fixed sizes of a value, if its type has them.
    pub fn dims(&self, id: ValueId) -> Option<Vec<usize>> {
        self.graph.value(id).ty.tensor()?.dims()
    }

    /// The tensor of a constant that is in memory.
    pub fn tensor(&self, id: ValueId) -> Option<&Tensor> {
        self.graph.value(id).tensor()
    }

    pub fn push_constant(&mut self, name: String, ty: ValueType, constant: Constant) -> ValueId {
        let id = ValueId(u32::try_from(self.graph.values.len()).expect("fewer than 2^32 values"));
        self.graph.values.push(Value { name, ty, kind: ValueKind::Constant(constant) });
        id
    }

    /// Defines a named constant of the model.
    pub fn define_constant(&mut self, name: &str, ty: TensorType, constant: Constant) -> Result<()> {
        let id = self.push_constant(name.to_owned(), ty.into(), constant);
        self.learn(id);
        self.define(&format!("constant {name:?}"), name, id)
    }

    /// Gives the output of a constant node its value.
    pub fn define_model_constant(
        &mut self,
        n: &NodeReader,
        name: &str,
        ty: TensorType,
        constant: Constant,
    ) -> Result<()> {
        let full_name = self.value_name(name);
        let id = self.push_constant(full_name, ty.into(), constant);
        self.learn(id);
        self.define(n.place(), name, id)
    }

    pub fn define_tensor(&mut self, name: &str, tensor: Tensor) -> Result<()> {
        self.define_constant(name, tensor.tensor_type(), Constant::Inline(Arc::new(tensor)))
    }

    fn define(&mut self, place: &str, name: &str, id: ValueId) -> Result<()> {
        if self.names.insert(name.to_owned(), Some(id)).is_some() {
            return Err(Error::invalid(
                place,
                format!("{name:?} is defined twice"),
                "one definition of each name",
            ));
        }
        Ok(())
    }

    /// Name in the graph of the model's value `name`.
    fn value_name(&mut self, name: &str) -> String {
        match &self.prefix {
            Some(prefix) => {
                let wanted = format!("{prefix}{name}");
                self.fresh(wanted)
            }
            None => name.to_owned(),
        }
    }

    /// A constant that the import makes up.
    pub fn constant(&mut self, n: &NodeReader, what: &str, tensor: Tensor) -> ValueId {
        let name = self.fresh(format!("{}{}/{what}", self.prefix.clone().unwrap_or_default(), n.name()));
        let id = self.graph.add_constant(name, tensor);
        self.learn(id);
        id
    }

    pub fn ints(&mut self, n: &NodeReader, what: &str, values: &[i64]) -> ValueId {
        self.constant(n, what, Tensor::from_slice(&[values.len()], values))
    }

    /// The number `value` as a scalar of the type of `like`; an error if that type is not known.
    pub fn scalar_like(&mut self, n: &NodeReader, what: &str, value: f32, like: ValueId) -> Result<ValueId> {
        let dtype =
            self.dtype(like).ok_or_else(|| n.unsupported("an operand whose element type is not known"))?;
        let tensor = match dtype {
            DType::F32 => Tensor::scalar(value),
            DType::F64 => Tensor::scalar(f64::from(value)),
            DType::F16 => Tensor::scalar(half::f16::from_f32(value)),
            DType::BF16 => Tensor::scalar(half::bf16::from_f32(value)),
            other => return Err(n.unsupported(format!("an operand of type {other}"))),
        };
        Ok(self.constant(n, what, tensor))
    }

    /// A node that the import makes up, with `count` results.
    pub fn emit_many(
        &mut self,
        n: &NodeReader,
        what: &str,
        op: Op,
        inputs: &[Option<ValueId>],
        count: usize,
    ) -> Vec<ValueId> {
        let base = format!("{}{}/{what}", self.prefix.clone().unwrap_or_default(), n.name());
        let names: Vec<String> = (0..count)
            .map(|i| if i == 0 { base.clone() } else { format!("{base}:{i}") })
            .map(|name| self.fresh(name))
            .collect();
        let facts = self.infer_all(&op, inputs, count);
        let out = self.graph.add_node_named(base, op, inputs.to_vec(), names);
        for (id, fact) in out.iter().zip(facts) {
            self.set_fact(*id, fact);
        }
        out
    }

    /// A node that the import makes up, with one result.
    pub fn emit(&mut self, n: &NodeReader, what: &str, op: Op, inputs: &[ValueId]) -> ValueId {
        let inputs: Vec<_> = inputs.iter().map(|v| Some(*v)).collect();
        self.emit_many(n, what, op, &inputs, 1)[0]
    }

    fn infer_all(&self, op: &Op, inputs: &[Option<ValueId>], count: usize) -> Vec<Fact> {
        let inputs: Vec<Fact> = inputs.iter().map(|v| v.map_or(Fact::default(), |v| self.fact(v))).collect();
        (0..count).map(|i| infer(op, &inputs, i)).collect()
    }

    /// The node that yields what the model's node yields.
    pub fn finish(
        &mut self,
        n: &NodeReader,
        op: Op,
        mut inputs: Vec<Option<ValueId>>,
    ) -> Result<Vec<Option<ValueId>>> {
        while inputs.last() == Some(&None) {
            inputs.pop();
        }
        let (least, most) = op.input_count();
        // A loop is the one operator whose first inputs may be left out.
        if !matches!(op, Op::Loop { .. }) {
            if let Some(missing) = (0..least).find(|i| inputs.get(*i).copied().flatten().is_none()) {
                return Err(
                    n.invalid(format!("input {missing} is missing"), format!("at least {least} inputs"))
                );
            }
        } else {
            inputs.resize(inputs.len().max(least), None);
        }
        if inputs.len() > most {
            return Err(n.invalid(format!("{} inputs", inputs.len()), format!("at most {most}")));
        }
        let wanted: Vec<&str> = n.outputs().collect();
        let most = output_count(&op);
        if wanted.len() > most {
            return Err(n.invalid(format!("{} outputs", wanted.len()), format!("at most {most}")));
        }
        let names = wanted
            .iter()
            .map(|name| {
                if name.is_empty() {
                    self.fresh(format!("{}/unused", n.name()))
                } else {
                    self.value_name(name)
                }
            })
            .collect();
        let facts = self.infer_all(&op, &inputs, wanted.len());
        let node_name = format!("{}{}", self.prefix.clone().unwrap_or_default(), n.name());
        let ids = self.graph.add_node_named(node_name, op, inputs, names);
        let node = self.graph.nodes.len() - 1;
        let mut out = Vec::new();
        for (i, (id, mut fact)) in ids.into_iter().zip(facts).enumerate() {
            if wanted[i].is_empty() {
                if let Some(node) = self.graph.nodes[node].as_mut() {
                    node.outputs[i] = None;
                }
                out.push(None);
                continue;
            }
            if let Some(hint) = self.hints.get(wanted[i]) {
                fact.dtype = fact.dtype.or(hint.dtype);
                fact.rank = fact.rank.or(hint.rank);
            }
            self.set_fact(id, fact);
            self.define(n.place(), wanted[i], id)?;
            out.push(Some(id));
        }
        Ok(out)
    }

    /// A node that yields output `index` of the model's node; the others are made by other nodes.
    pub fn finish_part(
        &mut self,
        n: &NodeReader,
        index: usize,
        op: Op,
        inputs: Vec<Option<ValueId>>,
    ) -> Result<()> {
        let Some(name) = n.outputs().nth(index).filter(|name| !name.is_empty()) else { return Ok(()) };
        let full_name = self.value_name(name);
        let fact = self.infer_all(&op, &inputs, 1)[0];
        let node_name = format!("{}{}", self.prefix.clone().unwrap_or_default(), n.name());
        let id = self.graph.add_node_named(node_name, op, inputs, vec![full_name])[0];
        self.set_fact(id, fact);
        self.define(n.place(), name, id)
    }

    /// Gives a value that a function's body made the name that it has outside.
    pub fn adopt(&mut self, n: &NodeReader, name: &str, value: ValueId) -> Result<()> {
        let known = self.names.values().any(|v| *v == Some(value));
        let id = if !known && matches!(self.graph.value(value).kind, ValueKind::Output { .. }) {
            let renamed = self.value_name(name);
            self.graph.value_mut(value).name = renamed;
            value
        } else {
            let out_name = self.value_name(name);
            let fact = self.fact(value);
            let id = self.graph.add_node_named(
                n.name(),
                Op::Unary(UnaryOp::Identity),
                vec![Some(value)],
                vec![out_name],
            )[0];
            self.set_fact(id, fact);
            id
        };
        self.define(n.place(), name, id)
    }
}
