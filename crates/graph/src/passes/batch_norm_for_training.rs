use super::Pass;
use super::editor::Editor;
use crate::{Graph, GraphError, NodeId, Op, TensorType, TrainOp, ValueId, ValueKind};

/// What batch normalisations do while a model is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchNormMode {
    /// Normalise by the statistics of the batch and track them: the running statistics become states of the same
    /// name.
    Train,
    /// Normalise by the running statistics, which stay as they are.
    Frozen,
}

/// Spells batch normalisation out in operators of training, which know any layout.
#[derive(Clone, Copy, Debug)]
pub struct BatchNormForTraining {
    /// What they do.
    pub mode: BatchNormMode,
}

impl Pass for BatchNormForTraining {
    fn name(&self) -> &'static str {
        "batch normalisation for training"
    }

    fn run(&self, graph: &mut Graph) -> Result<usize, GraphError> {
        self.run_on(graph, |_| true)
    }
}

impl BatchNormForTraining {
    /// [`run`](Pass::run) on the nodes with the names that `these` picks.
    ///
    /// # Errors
    /// As [`run`](Pass::run).
    pub fn run_on(&self, graph: &mut Graph, these: impl Fn(&str) -> bool) -> Result<usize, GraphError> {
        let ids: Vec<NodeId> = graph
            .iter_nodes()
            .filter(|(_, n)| matches!(n.op, Op::BatchNorm { .. }) && these(&n.name))
            .map(|(id, _)| id)
            .collect();
        if self.mode == BatchNormMode::Train {
            for &id in &ids {
                running_to_states(graph, id)?;
            }
        }
        let mut e = Editor::new(graph);
        for id in ids {
            rewrite(&mut e, id, self.mode)?;
        }
        e.finish()
    }
}

/// Makes states of the running statistics of a node.
fn running_to_states(graph: &mut Graph, id: NodeId) -> Result<(), GraphError> {
    for index in [3, 4] {
        let Some(v) = graph.node(id).input(index) else { continue };
        match &graph.value(v).kind {
            ValueKind::Constant(c) => graph.value_mut(v).kind = ValueKind::State(Some(c.clone())),
            ValueKind::State(_) => {}
            _ => {
                let name = &graph.value(v).name;
                let problem =
                    format!("running statistics {name:?} are computed, expected constants to train them");
                return Err(GraphError::at(graph.node(id), problem));
            }
        }
    }
    Ok(())
}

fn rewrite(e: &mut Editor<'_>, id: NodeId, mode: BatchNormMode) -> Result<(), GraphError> {
    let node = e.node(id).clone();
    let Op::BatchNorm { epsilon, momentum, .. } = node.op else { return Ok(()) };
    if node.outputs.iter().skip(1).flatten().any(|&v| !e.readers(v).is_empty() || e.is_output(v)) {
        return Err(GraphError::at(&node, "its running statistics are read, expected them to be internal"));
    }
    let operand =
        |i: usize| node.input(i).ok_or_else(|| GraphError::at(&node, format!("operand {i} is missing")));
    let x = operand(0)?;
    let known = e.dims(x).filter(|d| d.len() >= 2).zip(e.dtype(x));
    let Some((dims, dtype)) = known else {
        let problem =
            format!("its operand {:?} is {}, expected fixed dimensions", e.value(x).name, e.value(x).ty);
        return Err(GraphError::at(&node, problem));
    };
    let (mean, variance) = match mode {
        BatchNormMode::Frozen => (operand(3)?, operand(4)?),
        BatchNormMode::Train => {
            let vector = TensorType::fixed(dtype, &[dims[1]]);
            let types = vec![vector.clone(), vector.clone()];
            let op = Op::Train(Box::new(TrainOp::BatchStatistics { axis: 1 }));
            let made = e.insert_with(id, &format!("{}.batch", node.name), op, vec![Some(x)], types);
            let count = dims.iter().product::<usize>().checked_div(dims[1]).unwrap_or(0);
            let op = TrainOp::TrackStatistics {
                rate: 1.0 - momentum,
                unbias: count as f32 / (count.max(2) - 1) as f32,
            };
            let inputs: Vec<Option<ValueId>> =
                vec![Some(operand(3)?), Some(operand(4)?), Some(made[0]), Some(made[1])];
            let base = format!("{}.running", node.name);
            e.insert_with(id, &base, Op::Train(Box::new(op)), inputs, vec![vector.clone(), vector]);
            (made[0], made[1])
        }
    };
    let inputs = vec![Some(x), Some(mean), Some(variance), node.input(1), node.input(2)];
    e.set(id, Op::Train(Box::new(TrainOp::Normalise { axis: 1, epsilon })), inputs);
    e.keep_first_output(id);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passes::testing::{Builder, operators, settle, summary};
    use crate::passes::{LayoutChoice, Simplify};
    use crate::{ConvAttributes, DType, UnaryOp};

    fn model(mode: BatchNormMode) -> Graph {
        let mut b = Builder::new();
        let x = b.input("x", &[2, 3, 4, 4]);
        let w = b.stored("w", DType::F32, &[2, 3, 1, 1]);
        let y = b.node("first", Op::Conv(ConvAttributes::default()), &[x, w]);
        let (scale, bias) = (b.floats(&[2], &[1.5, 0.5]), b.floats(&[2], &[0.1, 0.2]));
        let mean = b.constant("mean", crate::Tensor::from_slice(&[2], &[0.25f32, 0.75]));
        let variance = b.constant("variance", crate::Tensor::from_slice(&[2], &[1.25f32, 2.75]));
        let norm = Op::BatchNorm { epsilon: 1e-5, momentum: 0.9, training: false };
        let y = b.node("norm", norm, &[y, scale, bias, mean, variance]);
        let y = b.node("act", Op::Unary(UnaryOp::Relu), &[y]);
        let w = b.stored("v", DType::F32, &[5, 2, 1, 1]);
        let y = b.node("last", Op::Conv(ConvAttributes::default()), &[y, w]);
        b.output(y);
        let mut g = b.finish();
        settle(&BatchNormForTraining { mode }, &mut g);
        g
    }

    #[test]
    fn training_tracks_the_statistics_in_states_of_the_old_names() {
        let g = model(BatchNormMode::Train);
        assert_eq!(operators(&g), "Conv BatchStatistics TrackStatistics Normalise Relu Conv");
        for (name, first) in [("mean", 0.25), ("variance", 1.25)] {
            let ValueKind::State(Some(c)) = &g.value(g.find(name).unwrap()).kind else { panic!("{name}") };
            assert_eq!(c.inline().unwrap().to_f64s().unwrap()[0], first);
        }
        let track = g.iter_nodes().find_map(|(_, n)| match &n.op {
            Op::Train(op) => match **op {
                TrainOp::TrackStatistics { rate, unbias } => Some((rate, unbias)),
                _ => None,
            },
            _ => None,
        });
        let (rate, unbias) = track.unwrap();
        assert!((rate - 0.1).abs() < 1e-6 && (unbias - 32.0 / 31.0).abs() < 1e-6, "{rate} {unbias}");
    }

    #[test]
    fn frozen_ones_read_the_running_statistics() {
        let g = model(BatchNormMode::Frozen);
        assert_eq!(operators(&g), "Conv Normalise Relu Conv");
        assert!(
            summary(&g).contains("Normalise(first, [0.25,0.75], [1.25,2.75], [1.5,0.5]"),
            "{}",
            summary(&g)
        );
    }

    #[test]
    fn channels_last_goes_through_without_transpositions() {
        for (mode, expected) in [
            (
                BatchNormMode::Train,
                "Transpose Conv BatchStatistics TrackStatistics Normalise Relu Conv Transpose",
            ),
            (BatchNormMode::Frozen, "Transpose Conv Normalise Relu Conv Transpose"),
        ] {
            let mut g = model(mode);
            settle(&LayoutChoice, &mut g);
            settle(&Simplify, &mut g);
            assert_eq!(operators(&g), expected, "{}", summary(&g));
            for (_, node) in g.iter_nodes() {
                if let Op::Train(op) = &node.op
                    && let TrainOp::Normalise { axis, .. } | TrainOp::BatchStatistics { axis } = **op
                {
                    assert_eq!(axis, 3);
                }
            }
        }
    }
}
