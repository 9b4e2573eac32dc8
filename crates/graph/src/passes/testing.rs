//! Small graphs for the tests of passes: built in a few words, printed in a few lines.

use crate::{
    DType, Evaluate, Graph, GraphError, Node, Op, Pass, SourceId, StoredTensor, Tensor, TensorType, ValueId,
};
use lightering_units::Bytes;

pub(crate) struct Builder {
    pub graph: Graph,
    count: usize,
}

impl Builder {
    pub fn new() -> Builder {
        Builder { graph: Graph::new("test"), count: 0 }
    }

    pub fn input(&mut self, name: &str, dims: &[usize]) -> ValueId {
        self.graph.add_input(name, TensorType::fixed(DType::F32, dims))
    }

    pub fn typed_input(&mut self, name: &str, dtype: DType, dims: &[usize]) -> ValueId {
        self.graph.add_input(name, TensorType::fixed(dtype, dims))
    }

    /// A weight that stays on disk.
    pub fn stored(&mut self, name: &str, dtype: DType, dims: &[usize]) -> ValueId {
        let size = dims.iter().product::<usize>() * dtype.size_bytes();
        let stored = StoredTensor { source: SourceId(0), offset: 0, size: Bytes(size as u64) };
        self.graph.add_stored(name, TensorType::fixed(dtype, dims), stored)
    }

    pub fn constant(&mut self, name: &str, tensor: Tensor) -> ValueId {
        self.graph.add_constant(name, tensor)
    }

    pub fn floats(&mut self, dims: &[usize], x: &[f32]) -> ValueId {
        self.count += 1;
        let name = format!("c{}", self.count);
        self.graph.add_constant(name, Tensor::from_slice(dims, x))
    }

    pub fn scalar(&mut self, x: f32) -> ValueId {
        self.floats(&[], &[x])
    }

    pub fn ints(&mut self, x: &[i64]) -> ValueId {
        self.count += 1;
        let name = format!("c{}", self.count);
        self.graph.add_constant(name, Tensor::from_slice(&[x.len()], x))
    }

    pub fn node(&mut self, name: &str, op: Op, inputs: &[ValueId]) -> ValueId {
        self.graph.add_node(name, op, inputs, 1)[0]
    }

    pub fn output(&mut self, v: ValueId) {
        self.graph.outputs.push(v);
    }

    /// The graph with the types of everything.
    pub fn finish(mut self) -> Graph {
        self.graph.sources.push("weights".to_owned());
        self.graph.infer().unwrap();
        self.graph.verify().unwrap();
        self.graph
    }
}

/// Knows stored vectors: element `i` of every store is `i + 1`.
pub(crate) struct Counting;

impl Evaluate for Counting {
    fn evaluate(&self, _: &Node, _: &[Option<&Tensor>]) -> Result<Option<Vec<Tensor>>, GraphError> {
        Ok(None)
    }

    fn load(&self, _: &StoredTensor, ty: &TensorType) -> Result<Option<Tensor>, GraphError> {
        let dims = ty.dims().unwrap();
        let n = dims.iter().product::<usize>();
        assert!(n <= 1 << 16, "weights are not to be loaded");
        Ok(match ty.dtype {
            DType::F32 => Some(Tensor::from_slice(&dims, &(1..=n).map(|i| i as f32).collect::<Vec<_>>())),
            DType::I32 => Some(Tensor::from_slice(&dims, &(1..=n).map(|i| i as i32).collect::<Vec<_>>())),
            _ => None,
        })
    }
}

/// Runs the pass until nothing changes; the result must verify, keep the types that inference finds, and read back
/// from its text.
pub(crate) fn settle(pass: &dyn Pass, graph: &mut Graph) -> usize {
    let mut all = 0;
    for round in 0.. {
        let changes = pass.run(graph).unwrap();
        graph.verify().unwrap();
        check_types(graph).unwrap();
        assert_eq!(Graph::from_text(&graph.to_text()).unwrap().to_text(), graph.to_text());
        all += changes;
        if changes == 0 {
            break;
        }
        assert!(round < 10, "the pass does not settle");
    }
    all
}

pub(crate) use super::pipeline::check_types;

/// One node a line: `result: type = Operator(operands)`; constants in memory of one element show it.
pub(crate) fn summary(graph: &Graph) -> String {
    let mut lines = Vec::new();
    for (_, node) in graph.iter_nodes() {
        let operand = |v: &Option<ValueId>| match v {
            None => "_".to_owned(),
            Some(v) => {
                let value = graph.value(*v);
                match value.tensor() {
                    Some(t) if t.len() <= 8 => match t.to_f64s() {
                        Some(x) => format!("{x:?}").replace(' ', ""),
                        None => value.name.clone(),
                    },
                    _ => value.name.clone(),
                }
            }
        };
        let inputs: Vec<String> = node.inputs.iter().map(operand).collect();
        let outputs: Vec<String> = node
            .outputs
            .iter()
            .flatten()
            .map(|&v| format!("{}: {}", graph.value(v).name, graph.value(v).ty))
            .collect();
        lines.push(format!("{} = {}({})", outputs.join(", "), node.op.name(), inputs.join(", ")));
    }
    lines.join("\n")
}

/// Names of the operators in order.
pub(crate) fn operators(graph: &Graph) -> String {
    graph.iter_nodes().map(|(_, n)| n.op.name()).collect::<Vec<_>>().join(" ")
}

/// The only node with this operator name.
#[track_caller]
pub(crate) fn only<'g>(graph: &'g Graph, name: &str) -> &'g Node {
    let found: Vec<&Node> = graph.iter_nodes().map(|(_, n)| n).filter(|n| n.op.name() == name).collect();
    assert_eq!(found.len(), 1, "{}", summary(graph));
    found[0]
}
