//! Losses as parts of a graph.

use std::fmt;
use std::str::FromStr;

use lightering_graph::{
    BinaryOp, DType, Dim, Graph, MatMulAttributes, Op, ReduceOp, Tensor, TrainOp, UnaryOp, ValueId,
};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::schedule::Settings;

/// What a training makes small. All are means over the samples (and over elements, where a sample has several).
///
/// Written as `name` or `name:key=value,…`: `crossentropy:smoothing=0.1,ignore=-100`, `focal:gamma=2`, `bce`, `mse`,
/// `l1`, `huber:delta=1`, `kl:temperature=4`, `reversekl:temperature=4`, `cosine`, `triplet:margin=0.2`,
/// `infonce:temperature=0.07`, `ctc`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Loss {
    /// Cross-entropy of softmax, logits `[…, classes]` with classes `i64` `[…]` or probabilities `[…, classes]`; also
    /// logits `[batch, classes, height, width]` with classes `[batch, height, width]`.
    CrossEntropy {
        /// Part of the target that is spread over all classes, 0 to 1.
        smoothing: f32,
        /// A class that does not count.
        ignore: Option<i64>,
    },
    /// `-(1 - p)^gamma · ln p` of the right class (Lin et al., 2017, equation 4); shapes as for cross-entropy.
    Focal {
        /// How little well-classified samples count.
        gamma: f32,
    },
    /// Binary cross-entropy of logits; targets 0 to 1 of the same shape, or classes of the last axis.
    BinaryCrossEntropy,
    /// Mean squared error.
    MeanSquared,
    /// Mean absolute error.
    MeanAbsolute,
    /// Squared (half of it) up to `delta`, absolute beyond.
    Huber {
        /// Where it changes.
        delta: f32,
    },
    /// `T²·KL(teacher ‖ student)` of softmaxes at temperature T; the label is the teacher's logits (Hinton et al.,
    /// 2015).
    Kl {
        /// The temperature.
        temperature: f32,
        /// `KL(student ‖ teacher)` instead.
        reverse: bool,
    },
    /// `1 - cos` between rows of output and label.
    Cosine,
    /// `max(0, |a - p|² - |a - n|² + margin)`; outputs anchor, positive, negative, or one output of which they are the
    /// first, second and last third of the rows. The label is not used.
    Triplet {
        /// How much farther the negative must be.
        margin: f32,
    },
    /// Cross-entropy of cosines over temperature between two views of each sample, the right partner against the rest
    /// of the batch, in both directions (van den Oord et al., 2018). The views are two outputs, or the first and second
    /// half of the rows of one. The label is not used.
    InfoNce {
        /// The temperature.
        temperature: f32,
    },
    /// Connectionist temporal classification.
    Ctc,
}

/// Added under roots of norms.
const EPSILON: f32 = 1e-8;

impl Loss {
    /// Appends the loss of `outputs` (most losses take one) to a graph and yields the scalar.
    ///
    /// # Errors
    /// Types and shapes do not fit, as far as they are known, or the loss is not implemented.
    pub fn append(
        &self,
        graph: &mut Graph,
        outputs: &[ValueId],
        label: ValueId,
    ) -> Result<ValueId, TrainError> {
        let mut b = Builder { graph, place: format!("loss {self}") };
        let Some(&output) = outputs.first() else {
            return Err(b.invalid("a model without outputs", "an output"));
        };
        match *self {
            Loss::CrossEntropy { smoothing, ignore } => {
                let output = b.classes_last(output, label);
                b.check_head(output, label)?;
                let op = TrainOp::CrossEntropy { label_smoothing: smoothing, ignore };
                let names = b.names("cross_entropy", 2);
                let inputs = vec![Some(output), Some(label)];
                let outputs =
                    b.graph.add_node_named(names[0].clone(), Op::Train(Box::new(op)), inputs, names);
                Ok(outputs[0])
            }
            Loss::Focal { gamma } => {
                let output = b.classes_last(output, label);
                b.check_head(output, label)?;
                let target = b.probabilities(output, label)?;
                let log = b.softmax(output, true);
                let p = b.unary(UnaryOp::Exp, log);
                let one = b.number(1.0);
                let rest = b.binary(BinaryOp::Sub, one, p);
                // Keeps the power's derivative finite where the rest rounds to 0 or below.
                let rest = b.unary(UnaryOp::ClipTo { min: 1e-6, max: 1.0 }, rest);
                let gamma = b.number(gamma);
                let factor = b.binary(BinaryOp::Pow, rest, gamma);
                let weighted = b.binary(BinaryOp::Mul, target, log);
                let weighted = b.binary(BinaryOp::Mul, weighted, factor);
                let rows = b.sum_last(weighted);
                let mean = b.mean(rows);
                Ok(b.unary(UnaryOp::Neg, mean))
            }
            Loss::BinaryCrossEntropy => {
                let target = b.aligned(output, label)?;
                // ln(1 + e^x) - x·y is the stable form of -y·ln σ(x) - (1 - y)·ln(1 - σ(x)).
                let soft = b.unary(UnaryOp::Softplus, output);
                let product = b.binary(BinaryOp::Mul, output, target);
                let elements = b.binary(BinaryOp::Sub, soft, product);
                Ok(b.mean(elements))
            }
            Loss::MeanSquared => {
                let target = b.aligned(output, label)?;
                let d = b.binary(BinaryOp::Sub, output, target);
                let square = b.binary(BinaryOp::Mul, d, d);
                Ok(b.mean(square))
            }
            Loss::MeanAbsolute => {
                let target = b.aligned(output, label)?;
                let d = b.binary(BinaryOp::Sub, output, target);
                let size = b.unary(UnaryOp::Abs, d);
                Ok(b.mean(size))
            }
            Loss::Huber { delta } => {
                let target = b.aligned(output, label)?;
                let d = b.binary(BinaryOp::Sub, output, target);
                let size = b.unary(UnaryOp::Abs, d);
                // With c = min(|d|, delta), c·(|d| - c/2) is both branches in one.
                let c = b.unary(UnaryOp::ClipTo { min: 0.0, max: delta }, size);
                let half = b.number(0.5);
                let half = b.binary(BinaryOp::Mul, c, half);
                let rest = b.binary(BinaryOp::Sub, size, half);
                let elements = b.binary(BinaryOp::Mul, c, rest);
                Ok(b.mean(elements))
            }
            Loss::Kl { temperature, reverse } => {
                b.check_same(output, label)?;
                let scale = b.number(1.0 / temperature);
                let student = b.binary(BinaryOp::Mul, output, scale);
                let teacher = b.binary(BinaryOp::Mul, label, scale);
                let (from, to) = if reverse { (student, teacher) } else { (teacher, student) };
                let (log_from, log_to) = (b.softmax(from, true), b.softmax(to, true));
                let p = b.unary(UnaryOp::Exp, log_from);
                let ratio = b.binary(BinaryOp::Sub, log_from, log_to);
                let elements = b.binary(BinaryOp::Mul, p, ratio);
                let rows = b.sum_last(elements);
                let mean = b.mean(rows);
                let square = b.number(temperature * temperature);
                Ok(b.binary(BinaryOp::Mul, mean, square))
            }
            Loss::Cosine => {
                b.check_same(output, label)?;
                let (x, y) = (b.unit(output), b.unit(label));
                let product = b.binary(BinaryOp::Mul, x, y);
                let cosines = b.sum_last(product);
                let mean = b.mean(cosines);
                let one = b.number(1.0);
                Ok(b.binary(BinaryOp::Sub, one, mean))
            }
            Loss::Triplet { margin } => {
                let parts = b.parts(outputs, 3)?;
                let distance = |b: &mut Builder<'_>, x, y| {
                    let d = b.binary(BinaryOp::Sub, x, y);
                    let square = b.binary(BinaryOp::Mul, d, d);
                    b.sum_last(square)
                };
                let near = distance(&mut b, parts[0], parts[1]);
                let far = distance(&mut b, parts[0], parts[2]);
                let d = b.binary(BinaryOp::Sub, near, far);
                let margin = b.number(margin);
                let d = b.binary(BinaryOp::Add, d, margin);
                let d = b.unary(UnaryOp::Relu, d);
                Ok(b.mean(d))
            }
            Loss::InfoNce { temperature } => {
                let parts = b.parts(outputs, 2)?;
                let rows = match outputs {
                    [one] => b.dims(*one).and_then(|d| d.first()?.fixed()).map(|n| n / 2),
                    _ => b.dims(parts[0]).and_then(|d| d.first()?.fixed()),
                };
                let rows = rows.ok_or_else(|| b.invalid("a batch of unknown size", "a fixed batch"))?;
                let (x, y) = (b.unit(parts[0]), b.unit(parts[1]));
                let right = Tensor::from_slice(&[rows], &(0..rows as i64).collect::<Vec<_>>());
                let right = b.constant("right", right);
                let half = b.number(0.5);
                let mut total = None;
                for (x, y) in [(x, y), (y, x)] {
                    let attributes = MatMulAttributes {
                        trans_b: true,
                        alpha: 1.0 / temperature,
                        ..MatMulAttributes::default()
                    };
                    let logits = b.node("similarity", Op::MatMul(attributes), &[x, y]);
                    let op = TrainOp::CrossEntropy { label_smoothing: 0.0, ignore: None };
                    let names = b.names("cross_entropy", 2);
                    let inputs = vec![Some(logits), Some(right)];
                    let loss =
                        b.graph.add_node_named(names[0].clone(), Op::Train(Box::new(op)), inputs, names)[0];
                    let loss = b.binary(BinaryOp::Mul, loss, half);
                    total = Some(match total {
                        Some(sum) => b.binary(BinaryOp::Add, sum, loss),
                        None => loss,
                    });
                }
                Ok(total.expect("two directions were added"))
            }
            Loss::Ctc => Err(TrainError::unsupported(
                "loss ctc",
                "connectionist temporal classification (it needs an operator of its own)",
            )),
        }
    }
}

struct Builder<'a> {
    graph: &'a mut Graph,
    place: String,
}

impl Builder<'_> {
    fn invalid(&self, what: impl fmt::Display, expected: impl fmt::Display) -> TrainError {
        TrainError::invalid(&self.place, what, expected)
    }

    fn names(&self, name: &str, count: usize) -> Vec<String> {
        // The number of values makes the names unique.
        (0..count).map(|i| format!("loss/{name}_{}", self.graph.values.len() + i)).collect()
    }

    fn constant(&mut self, name: &str, tensor: Tensor) -> ValueId {
        let name = self.names(name, 1).remove(0);
        self.graph.add_constant(name, tensor)
    }

    fn number(&mut self, value: f32) -> ValueId {
        self.constant("constant", Tensor::scalar(value))
    }

    fn node(&mut self, name: &str, op: Op, inputs: &[ValueId]) -> ValueId {
        let name = self.names(name, 1).remove(0);
        self.graph.add_node(name, op, inputs, 1)[0]
    }

    fn unary(&mut self, op: UnaryOp, x: ValueId) -> ValueId {
        self.node("unary", Op::Unary(op), &[x])
    }

    fn binary(&mut self, op: BinaryOp, a: ValueId, b: ValueId) -> ValueId {
        self.node("binary", Op::Binary(op), &[a, b])
    }

    fn softmax(&mut self, x: ValueId, log: bool) -> ValueId {
        self.node("softmax", Op::Softmax { axis: -1, log }, &[x])
    }

    fn reduce(&mut self, op: ReduceOp, inputs: &[ValueId], keep_dims: bool) -> ValueId {
        self.node("reduce", Op::Reduce { op, keep_dims, noop_with_empty_axes: false }, inputs)
    }

    fn mean(&mut self, x: ValueId) -> ValueId {
        self.reduce(ReduceOp::Mean, &[x], false)
    }

    fn last_axis(&mut self) -> ValueId {
        self.constant("axis", Tensor::from_slice(&[1], &[-1i64]))
    }

    fn sum_last(&mut self, x: ValueId) -> ValueId {
        let axis = self.last_axis();
        self.reduce(ReduceOp::Sum, &[x, axis], false)
    }

    /// Rows of length 1.
    fn unit(&mut self, x: ValueId) -> ValueId {
        let square = self.binary(BinaryOp::Mul, x, x);
        let axis = self.last_axis();
        let sum = self.reduce(ReduceOp::Sum, &[square, axis], true);
        let epsilon = self.number(EPSILON);
        let sum = self.binary(BinaryOp::Add, sum, epsilon);
        let scale = self.unary(UnaryOp::Rsqrt, sum);
        self.binary(BinaryOp::Mul, x, scale)
    }

    fn dims(&self, value: ValueId) -> Option<Vec<Dim>> {
        self.graph.value(value).ty.tensor()?.shape.clone()
    }

    fn dtype(&self, value: ValueId) -> Option<DType> {
        Some(self.graph.value(value).ty.tensor()?.dtype)
    }

    fn describe(&self, value: ValueId) -> String {
        let v = self.graph.value(value);
        match v.ty.tensor() {
            Some(ty) => format!("{} {ty}", v.name),
            None => v.name.clone(),
        }
    }

    fn is_class(&self, label: ValueId) -> bool {
        self.dtype(label).is_some_and(|d| !d.is_float())
    }

    /// Logits with the classes as second axis, as segmentation networks have them, turned.
    fn classes_last(&mut self, output: ValueId, label: ValueId) -> ValueId {
        let (Some(o), Some(l)) = (self.dims(output), self.dims(label)) else { return output };
        let second = o.len() >= 3
            && self.is_class(label)
            && l.len() + 1 == o.len()
            && l[1..] == o[2..]
            && l[..] != o[..o.len() - 1];
        if !second {
            return output;
        }
        let perm = std::iter::once(0).chain(2..o.len()).chain([1]).collect();
        let turned = self.node("classes_last", Op::Transpose { perm: Some(perm) }, &[output]);
        let mut dims = o.clone();
        let classes = dims.remove(1);
        dims.push(classes);
        if let Some(dtype) = self.dtype(output) {
            self.graph.value_mut(turned).ty =
                lightering_graph::TensorType { dtype, shape: Some(dims) }.into();
        }
        turned
    }

    /// Fails when labels do not fit logits.
    fn check_head(&self, output: ValueId, label: ValueId) -> Result<(), TrainError> {
        let (Some(o), Some(l)) = (self.dims(output), self.dims(label)) else { return Ok(()) };
        let expected = if self.is_class(label) { &o[..o.len().saturating_sub(1)] } else { &o[..] };
        if o.is_empty() || !fit(expected, &l) {
            return Err(self.invalid(
                format!("output {} for label {}", self.describe(output), self.describe(label)),
                "scores [batch, …, classes] for classes [batch, …] or probabilities of the scores' shape",
            ));
        }
        Ok(())
    }

    fn check_same(&self, output: ValueId, label: ValueId) -> Result<(), TrainError> {
        match (self.dims(output), self.dims(label)) {
            (Some(o), Some(l)) if !fit(&o, &l) => Err(self.invalid(
                format!("output {} for label {}", self.describe(output), self.describe(label)),
                "one shape",
            )),
            _ => Ok(()),
        }
    }

    /// The label as probabilities `[…, classes]`.
    fn probabilities(&mut self, output: ValueId, label: ValueId) -> Result<ValueId, TrainError> {
        if !self.is_class(label) {
            return Ok(label);
        }
        let classes = self
            .dims(output)
            .and_then(|d| d.last()?.fixed())
            .ok_or_else(|| self.invalid("an output of unknown width", "a known number of classes"))?;
        let depth = self.constant("depth", Tensor::scalar(classes as i64));
        let values = self.constant("values", Tensor::from_slice(&[2], &[0f32, 1.0]));
        Ok(self.node("one_hot", Op::OneHot { axis: -1 }, &[label, depth, values]))
    }

    /// The label as floats of the output's shape: never broadcast, which would compare every sample with every other.
    fn aligned(&mut self, output: ValueId, label: ValueId) -> Result<ValueId, TrainError> {
        let (Some(o), Some(l)) = (self.dims(output), self.dims(label)) else {
            return Err(self.invalid("an output or label of unknown shape", "known shapes"));
        };
        let float = |b: &mut Self, label| {
            if b.is_class(label) {
                b.node("cast", Op::Cast { to: DType::F32, saturate: true }, &[label])
            } else {
                label
            }
        };
        if fit(&o, &l) {
            return Ok(float(self, label));
        }
        if let Some((last, rest)) = o.split_last()
            && fit(rest, &l)
        {
            if last.fixed() == Some(1) {
                let label = float(self, label);
                let axis = self.last_axis();
                return Ok(self.node("column", Op::Unsqueeze, &[label, axis]));
            }
            if self.is_class(label) {
                return self.probabilities(output, label);
            }
        }
        Err(self.invalid(
            format!("output {} for label {}", self.describe(output), self.describe(label)),
            "one shape (does the last layer have as many outputs as the data has targets?)",
        ))
    }

    /// Several outputs, or equal parts of the rows of one.
    fn parts(&mut self, outputs: &[ValueId], count: usize) -> Result<Vec<ValueId>, TrainError> {
        if outputs.len() == count {
            return Ok(outputs.to_vec());
        }
        let rows = self.dims(outputs[0]).and_then(|d| d.first()?.fixed());
        match (outputs, rows) {
            (&[one], Some(rows)) if rows > 0 && rows % count == 0 => {
                let names = self.names("part", count);
                let sizes = vec![(rows / count) as i64; count];
                let sizes = self.constant("sizes", Tensor::from_slice(&[count], &sizes));
                let inputs = vec![Some(one), Some(sizes)];
                let names: Vec<String> = names.iter().map(|n| format!("{n}_of_{count}")).collect();
                Ok(self.graph.add_node_named(names[0].clone(), Op::Split { axis: 0 }, inputs, names))
            }
            _ => Err(self.invalid(
                format!("{} outputs, the first with {rows:?} rows", outputs.len()),
                format!("{count} outputs, or one whose rows divide into {count} parts"),
            )),
        }
    }
}

/// Whether two shapes may be the same.
fn fit(a: &[Dim], b: &[Dim]) -> bool {
    let same = |(a, b): (&Dim, &Dim)| match (a.fixed(), b.fixed()) {
        (Some(a), Some(b)) => a == b,
        _ => true,
    };
    a.len() == b.len() && a.iter().zip(b).all(same)
}

impl FromStr for Loss {
    type Err = TrainError;

    fn from_str(text: &str) -> Result<Loss, TrainError> {
        const PLACE: &str = "loss";
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        let mut s = Settings::parse(PLACE, rest)?;
        let (loss, known) = match name.trim() {
            "crossentropy" | "ce" => {
                let ignore = match s.take("ignore") {
                    None => None,
                    Some(text) => Some(text.parse().map_err(|_| {
                        TrainError::invalid(PLACE, format!("ignore={text:?}"), "the number of a class")
                    })?),
                };
                let smoothing = s.number("smoothing", 0.0, 0.0..=0.99)?;
                (Loss::CrossEntropy { smoothing, ignore }, "smoothing or ignore")
            }
            "focal" => (Loss::Focal { gamma: s.number("gamma", 2.0, 0.0..=100.0)? }, "gamma"),
            "bce" => (Loss::BinaryCrossEntropy, "no key"),
            "mse" => (Loss::MeanSquared, "no key"),
            "l1" | "mae" => (Loss::MeanAbsolute, "no key"),
            "huber" => (Loss::Huber { delta: s.number("delta", 1.0, 1e-6..=1e6)? }, "delta"),
            "kl" | "reversekl" => {
                let temperature = s.number("temperature", 1.0, 0.01..=1000.0)?;
                (Loss::Kl { temperature, reverse: name.trim() == "reversekl" }, "temperature")
            }
            "cosine" => (Loss::Cosine, "no key"),
            "triplet" => (Loss::Triplet { margin: s.number("margin", 0.2, 0.0..=1e6)? }, "margin"),
            "infonce" => {
                (Loss::InfoNce { temperature: s.number("temperature", 0.07, 1e-3..=1000.0)? }, "temperature")
            }
            "ctc" => (Loss::Ctc, "no key"),
            other => {
                return Err(TrainError::invalid(
                    PLACE,
                    format!("{other:?}"),
                    "crossentropy, focal, bce, mse, l1, huber, kl, reversekl, cosine, triplet, infonce or ctc",
                ));
            }
        };
        s.finish(known)?;
        Ok(loss)
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Loss::CrossEntropy { smoothing, ignore: None } => write!(f, "crossentropy:smoothing={smoothing}"),
            Loss::CrossEntropy { smoothing, ignore: Some(class) } => {
                write!(f, "crossentropy:smoothing={smoothing},ignore={class}")
            }
            Loss::Focal { gamma } => write!(f, "focal:gamma={gamma}"),
            Loss::BinaryCrossEntropy => f.write_str("bce"),
            Loss::MeanSquared => f.write_str("mse"),
            Loss::MeanAbsolute => f.write_str("l1"),
            Loss::Huber { delta } => write!(f, "huber:delta={delta}"),
            Loss::Kl { temperature, reverse: false } => write!(f, "kl:temperature={temperature}"),
            Loss::Kl { temperature, reverse: true } => write!(f, "reversekl:temperature={temperature}"),
            Loss::Cosine => f.write_str("cosine"),
            Loss::Triplet { margin } => write!(f, "triplet:margin={margin}"),
            Loss::InfoNce { temperature } => write!(f, "infonce:temperature={temperature}"),
            Loss::Ctc => f.write_str("ctc"),
        }
    }
}

#[cfg(test)]
mod tests;
