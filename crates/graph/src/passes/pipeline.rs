use super::{
    ActivationFusion, AttentionFusion, BatchNormFusion, CommonSubexpression, DeadCode, ElementwiseFusion,
    EpilogueFusion, Fold, LayoutChoice, NormalizationFusion, PlaceUpdates, QuantizedFusion, Simplify,
};
use crate::infer::{Fact, infer_node};
use crate::{Evaluate, Graph, GraphError, Node, Op, Pass, StoredTensor, Tensor, TensorType};

/// Folds everything but what quantised operators are recognised by.
struct KeepQuantized<'a>(&'a dyn Evaluate);

impl Evaluate for KeepQuantized<'_> {
    fn evaluate(&self, node: &Node, inputs: &[Option<&Tensor>]) -> Result<Option<Vec<Tensor>>, GraphError> {
        match node.op {
            Op::DequantizeLinear(_) | Op::QuantizeLinear(_) => Ok(None),
            _ => self.0.evaluate(node, inputs),
        }
    }

    fn load(&self, stored: &StoredTensor, ty: &TensorType) -> Result<Option<Tensor>, GraphError> {
        self.0.load(stored, ty)
    }
}

/// [`Fold`] that owns its evaluator.
struct FoldAround<'a>(KeepQuantized<'a>);

impl Pass for FoldAround<'_> {
    fn name(&self) -> &'static str {
        Fold::new(&self.0).name()
    }

    fn run(&self, graph: &mut Graph) -> Result<usize, GraphError> {
        Fold::new(&self.0).run(graph)
    }
}

/// What one pass has done in one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassReport {
    /// [`Pass::name`].
    pub name: &'static str,
    /// Places that changed.
    pub changes: usize,
}

/// Most rounds of one stage; real models settle in two or three.
const ROUNDS_MAX: usize = 10;

/// An ordered list of passes in stages; each stage runs round after round until nothing changes.
///
/// Stages exist because some rewrites hide what others look for: quantised operators are recognised before
/// activations move into convolutions, attention before its scale moves into a product, chains of element-wise
/// operators are taken when nothing better can take them, and axes are renumbered at the very end.
pub struct Pipeline<'a> {
    stages: Vec<Vec<Box<dyn Pass + 'a>>>,
    stop_after: Option<String>,
    verify: bool,
}

impl<'a> Pipeline<'a> {
    /// All passes, for a graph whose shapes are known.
    pub fn standard(evaluate: &'a dyn Evaluate) -> Pipeline<'a> {
        let spellings: Vec<Box<dyn Pass + 'a>> = vec![
            Box::new(FoldAround(KeepQuantized(evaluate))),
            Box::new(DeadCode),
            Box::new(CommonSubexpression),
            Box::new(Simplify),
            Box::new(BatchNormFusion { evaluate }),
            Box::new(QuantizedFusion { evaluate }),
            Box::new(ActivationFusion),
            Box::new(NormalizationFusion),
        ];
        let operators: Vec<Box<dyn Pass + 'a>> = vec![
            Box::new(Fold::new(evaluate)),
            Box::new(AttentionFusion),
            Box::new(EpilogueFusion { evaluate }),
            Box::new(Simplify),
        ];
        let order: Vec<Box<dyn Pass + 'a>> = vec![
            Box::new(LayoutChoice),
            Box::new(Simplify),
            Box::new(Fold::new(evaluate)),
            Box::new(CommonSubexpression),
        ];
        let chains: Vec<Box<dyn Pass + 'a>> = vec![Box::new(ElementwiseFusion), Box::new(DeadCode)];
        Pipeline {
            stages: vec![spellings, operators, order, chains],
            stop_after: None,
            verify: cfg!(debug_assertions),
        }
    }

    /// What is done to a forward graph before it is differentiated: everything that makes it shorter without hiding an
    /// operand that its gradient needs, and channels last.
    pub fn before_differentiation(evaluate: &'a dyn Evaluate) -> Pipeline<'a> {
        let spellings: Vec<Box<dyn Pass + 'a>> = vec![
            Box::new(Fold::new(evaluate)),
            Box::new(DeadCode),
            Box::new(CommonSubexpression),
            Box::new(Simplify),
            Box::new(ActivationFusion),
            Box::new(NormalizationFusion),
        ];
        let order: Vec<Box<dyn Pass + 'a>> = vec![
            Box::new(LayoutChoice),
            Box::new(Simplify),
            Box::new(Fold::new(evaluate)),
            Box::new(CommonSubexpression),
            Box::new(DeadCode),
        ];
        Pipeline { stages: vec![spellings, order], stop_after: None, verify: cfg!(debug_assertions) }
    }

    /// What is done to a whole training step: fusion across forward and backward pass, and updates at their places.
    pub fn after_differentiation(evaluate: &'a dyn Evaluate) -> Pipeline<'a> {
        let clean: Vec<Box<dyn Pass + 'a>> = vec![
            Box::new(Fold::new(evaluate)),
            Box::new(DeadCode),
            Box::new(CommonSubexpression),
            Box::new(Simplify),
        ];
        let operators: Vec<Box<dyn Pass + 'a>> =
            vec![Box::new(EpilogueFusion { evaluate }), Box::new(Simplify)];
        let chains: Vec<Box<dyn Pass + 'a>> = vec![Box::new(ElementwiseFusion), Box::new(DeadCode)];
        let places: Vec<Box<dyn Pass + 'a>> = vec![Box::new(PlaceUpdates)];
        Pipeline {
            stages: vec![clean, operators, chains, places],
            stop_after: None,
            verify: cfg!(debug_assertions),
        }
    }

    /// Stops after the first run of the pass with this name.
    pub fn stop_after(mut self, name: impl Into<String>) -> Self {
        self.stop_after = Some(name.into());
        self
    }

    /// Leaves a pass out.
    pub fn without(mut self, name: &str) -> Self {
        for stage in &mut self.stages {
            stage.retain(|p| p.name() != name);
        }
        self
    }

    /// Verifies the graph and the types in it after each pass; debug builds do so anyway.
    pub fn verified(mut self) -> Self {
        self.verify = true;
        self
    }

    /// Names of the passes in order, each once.
    pub fn names(&self) -> Vec<&'static str> {
        let mut names = Vec::new();
        for pass in self.stages.iter().flatten() {
            if !names.contains(&pass.name()) {
                names.push(pass.name());
            }
        }
        names
    }

    /// Runs the passes on the graph, then on the bodies of its control-flow nodes; reports the runs that changed
    /// something, in order.
    ///
    /// # Errors
    /// What a pass or the verifier finds; the graph is then not to be used.
    pub fn run(&self, graph: &mut Graph) -> Result<Vec<PassReport>, GraphError> {
        let mut reports = Vec::new();
        let stopped = self.run_one(graph, &mut reports)?;
        if !stopped {
            for id in graph.node_ids() {
                for body in graph.node_mut(id).op.bodies_mut() {
                    reports.extend(self.run(body)?);
                }
            }
        }
        Ok(reports)
    }

    fn run_one(&self, graph: &mut Graph, reports: &mut Vec<PassReport>) -> Result<bool, GraphError> {
        for stage in &self.stages {
            for _ in 0..ROUNDS_MAX {
                let mut changed = false;
                for pass in stage {
                    let changes = pass.run(graph)?;
                    if self.verify {
                        graph.verify()?;
                        check_types(graph)?;
                    }
                    changed |= changes > 0;
                    if changes > 0 {
                        reports.push(PassReport { name: pass.name(), changes });
                    }
                    if self.stop_after.as_deref() == Some(pass.name()) {
                        return Ok(true);
                    }
                }
                if !changed {
                    break;
                }
            }
        }
        Ok(false)
    }
}

/// Runs [`Pipeline::standard`] to its end.
///
/// # Errors
/// As [`Pipeline::run`].
pub fn run_all(graph: &mut Graph, evaluate: &dyn Evaluate) -> Result<Vec<PassReport>, GraphError> {
    Pipeline::standard(evaluate).run(graph)
}

/// Checks that the types in the graph are those that inference finds, so that a pass that gets a shape wrong is
/// caught at once.
pub(crate) fn check_types(graph: &Graph) -> Result<(), GraphError> {
    for (_, node) in graph.iter_nodes() {
        let fact =
            |v: &Option<crate::ValueId>| v.map(|v| Fact::new(&graph.value(v).ty, graph.value(v).tensor()));
        let facts: Vec<Option<Fact<'_>>> = node.inputs.iter().map(fact).collect();
        let inferred = infer_node(node, &facts)?;
        for (v, ty) in node.outputs.iter().zip(inferred) {
            let Some(v) = v else { continue };
            let stated = graph.value(*v).ty.tensor();
            let (Some(stated), Some(inferred)) = (stated, ty.tensor()) else { continue };
            let differ = match (stated.dims(), inferred.dims()) {
                (Some(a), Some(b)) => a != b,
                _ => false,
            };
            if differ || stated.dtype != inferred.dtype {
                let name = &graph.value(*v).name;
                return Err(GraphError::at(
                    node,
                    format!("{name:?} is stated as {stated} but is {inferred}"),
                ));
            }
        }
    }
    Ok(())
}
