//! Small networks to start from, as graphs with seeded first weights.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use lightering_graph::{
    BinaryOp, ConvAttributes, DType, Dim, Direction, GemmAttributes, Graph, Layout, MatMulAttributes, Op,
    Padding, PoolAttributes, PoolKind, RecurrentAttributes, Tensor, TensorType, UnaryOp, ValueId,
};
use serde::{Deserialize, Serialize};

use crate::schedule::Settings;
use crate::{Feature, Random, TrainError};

/// Most weights of a model that is made here.
pub const MAX_WEIGHTS: usize = 1 << 31;
/// What a random draw is for; part of its seed.
const WEIGHTS: u64 = 0x0077_6569_6768;

/// A network.
///
/// Written as `name` or `name:key=value,…`: `resnet18:width=64`, `mobilenetv2:width=1`, `cnn:width=32`,
/// `mlp:hidden=256,layers=2`, `gpt:layers=6,dim=384,heads=6`, `lstm:hidden=128`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// Residual network of 18 layers for small pictures: a 3x3 stem without pooling (He et al., 2016; the CIFAR form).
    ResNet18 {
        /// Channels of the first stage.
        width: usize,
    },
    /// Inverted residual blocks (Sandler et al., 2018, table 2); below 96 pixels the first two strides are 1.
    MobileNetV2 {
        /// Factor for all channels.
        width: f32,
    },
    /// Two times two convolutions and two dense layers.
    Cnn {
        /// Channels of the first half; the second has twice as many.
        width: usize,
    },
    /// Dense layers with ReLU; any input of numbers.
    Mlp {
        /// Units of each hidden layer.
        hidden: usize,
        /// Hidden layers.
        layers: usize,
    },
    /// A decoder-only transformer over tokens, normalised before each part, learned positions (Radford et al., 2019).
    Gpt {
        /// Blocks.
        layers: usize,
        /// Width.
        dim: usize,
        /// Attention heads.
        heads: usize,
    },
    /// One LSTM layer: over tokens, predicting the next (or the class of the whole); over rows of numbers or the frames
    /// of a spectrogram, predicting the class.
    Lstm {
        /// Units.
        hidden: usize,
    },
}

impl Architecture {
    /// The network for samples of `input` (its first feature) and labels of `label`, with `outputs` classes or numbers.
    /// The graph has one input called as the feature, `[batch, …]`, and one output `logits`: `[batch, outputs]`, for
    /// token models with a label per token `[batch, time, outputs]`. `batch` is open (a symbol) when absent.
    ///
    /// # Errors
    /// The input is of the wrong kind or too small.
    pub fn build(
        &self,
        input: &Feature,
        label: &Feature,
        outputs: usize,
        batch: Option<usize>,
        seed: u64,
    ) -> Result<Graph, TrainError> {
        let place = format!("model {self}");
        if outputs == 0 {
            return Err(TrainError::invalid(place, "no classes", "data with classes or targets"));
        }
        let batch = batch.map_or_else(|| Dim::Symbol(Arc::from("batch")), Dim::Fixed);
        let shape = std::iter::once(batch).chain(input.dims.iter().map(|&d| Dim::Fixed(d))).collect();
        let mut graph = Graph::new(self.to_string());
        let ty = TensorType { dtype: input.dtype, shape: Some(shape) };
        let x = graph.add_input(input.name.clone(), ty);
        let mut b = Builder { graph, seed, count: 0, weights: 0, place };
        let logits = match *self {
            Architecture::ResNet18 { width } => resnet18(&mut b, x, input, width, outputs)?,
            Architecture::MobileNetV2 { width } => mobilenet_v2(&mut b, x, input, width, outputs)?,
            Architecture::Cnn { width } => cnn(&mut b, x, input, width, outputs)?,
            Architecture::Mlp { hidden, layers } => mlp(&mut b, x, input, hidden, layers, outputs)?,
            Architecture::Gpt { layers, dim, heads } => {
                gpt(&mut b, x, input, label, outputs, [layers, dim, heads])?
            }
            Architecture::Lstm { hidden } => lstm(&mut b, x, input, label, outputs, hidden)?,
        };
        let mut graph = b.graph;
        graph.value_mut(logits).name = "logits".into();
        graph.outputs.push(logits);
        graph.infer()?;
        graph.verify()?;
        Ok(graph)
    }
}

struct Builder {
    graph: Graph,
    seed: u64,
    /// Weights drawn so far, part of the seed of the next.
    count: u64,
    weights: usize,
    place: String,
}

/// How first weights are drawn.
#[derive(Clone, Copy)]
enum Fill {
    /// All the same.
    Constant(f32),
    /// Normal with this deviation.
    Normal(f64),
    /// Uniform within ± this.
    Uniform(f64),
}

impl Fill {
    /// Kaiming's for ReLU (He et al., 2015, equation 10), over what goes out of each weight.
    fn kaiming(fan_out: usize) -> Fill {
        Fill::Normal((2.0 / fan_out as f64).sqrt())
    }

    /// Xavier's (Glorot and Bengio, 2010, equation 16).
    fn xavier(fan_in: usize, fan_out: usize) -> Fill {
        Fill::Uniform((6.0 / (fan_in + fan_out) as f64).sqrt())
    }

    /// One over the root of what comes in, as dense and recurrent layers are usually started.
    fn dense(fan_in: usize) -> Fill {
        Fill::Uniform(1.0 / (fan_in as f64).sqrt())
    }
}

impl Builder {
    fn wrong(&self, input: &Feature, expected: &str) -> TrainError {
        let what = format!("input {} is {}{:?}", input.name, input.dtype, input.dims);
        TrainError::invalid(&self.place, what, expected)
    }

    fn weight(&mut self, name: &str, dims: &[usize], fill: Fill) -> Result<ValueId, TrainError> {
        let elements = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).unwrap_or(usize::MAX);
        self.weights = self.weights.saturating_add(elements);
        if self.weights > MAX_WEIGHTS {
            let found = self.weights as u64;
            return Err(TrainError::limit(&self.place, "number of weights", found, MAX_WEIGHTS as u64));
        }
        let mut tensor = Tensor::zeros(DType::F32, dims);
        let mut random = Random::derived(self.seed, &[WEIGHTS, self.count]);
        self.count += 1;
        let values = tensor.as_mut_slice::<f32>();
        match fill {
            Fill::Constant(value) => values.fill(value),
            Fill::Normal(std) => values.iter_mut().for_each(|v| *v = (random.normal() * std) as f32),
            Fill::Uniform(bound) => values.iter_mut().for_each(|v| *v = random.between(-bound, bound) as f32),
        }
        Ok(self.graph.add_constant(name, tensor))
    }

    fn fixed(&mut self, name: &str, tensor: Tensor) -> ValueId {
        self.graph.add_constant(name, tensor)
    }

    fn node(&mut self, name: &str, op: Op, inputs: &[ValueId]) -> ValueId {
        self.graph.add_node(name, op, inputs, 1)[0]
    }

    fn unary(&mut self, name: &str, op: UnaryOp, x: ValueId) -> ValueId {
        self.node(name, Op::Unary(op), &[x])
    }

    fn add(&mut self, name: &str, a: ValueId, b: ValueId) -> ValueId {
        self.node(name, Op::Binary(BinaryOp::Add), &[a, b])
    }

    /// A square convolution without bias.
    fn conv(
        &mut self,
        name: &str,
        x: ValueId,
        [channels, out, kernel, stride, groups]: [usize; 5],
    ) -> Result<ValueId, TrainError> {
        let fill = Fill::kaiming(out * kernel * kernel / groups);
        let w = self.weight(&format!("{name}.weight"), &[out, channels / groups, kernel, kernel], fill)?;
        let pad = (kernel / 2) as i64;
        let attributes = ConvAttributes {
            kernel: vec![kernel; 2],
            strides: vec![stride; 2],
            dilations: vec![1; 2],
            padding: Padding::Explicit(vec![pad; 4]),
            groups,
            layout: Layout::ChannelsFirst,
            activation: None,
        };
        Ok(self.node(name, Op::Conv(attributes), &[x, w]))
    }

    fn batch_norm(&mut self, name: &str, x: ValueId, channels: usize) -> Result<ValueId, TrainError> {
        let mut inputs = vec![x];
        for (part, value) in [("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)] {
            inputs.push(self.weight(&format!("{name}.{part}"), &[channels], Fill::Constant(value))?);
        }
        Ok(self.node(name, Op::BatchNorm { epsilon: 1e-5, momentum: 0.9, training: false }, &inputs))
    }

    /// Convolution, normalisation and, if given, activation.
    fn conv_norm(
        &mut self,
        name: &str,
        x: ValueId,
        sizes: [usize; 5],
        activation: Option<UnaryOp>,
    ) -> Result<ValueId, TrainError> {
        let y = self.conv(&format!("{name}.conv"), x, sizes)?;
        let y = self.batch_norm(&format!("{name}.bn"), y, sizes[1])?;
        Ok(match activation {
            Some(op) => self.unary(&format!("{name}.act"), op, y),
            None => y,
        })
    }

    /// A dense layer over rows `[batch, n]`.
    fn dense(&mut self, name: &str, x: ValueId, from: usize, to: usize) -> Result<ValueId, TrainError> {
        let w = self.weight(&format!("{name}.weight"), &[to, from], Fill::dense(from))?;
        let bias = self.weight(&format!("{name}.bias"), &[to], Fill::dense(from))?;
        let gemm = GemmAttributes { alpha: 1.0, beta: 1.0, trans_a: false, trans_b: true };
        Ok(self.node(name, Op::Gemm(gemm), &[x, w, bias]))
    }

    /// A dense layer over the last axis of any tensor.
    fn linear(
        &mut self,
        name: &str,
        x: ValueId,
        [from, to]: [usize; 2],
        fill: Fill,
    ) -> Result<ValueId, TrainError> {
        let w = self.weight(&format!("{name}.weight"), &[from, to], fill)?;
        let bias = self.weight(&format!("{name}.bias"), &[to], Fill::Constant(0.0))?;
        let y = self.node(&format!("{name}.product"), Op::MatMul(MatMulAttributes::default()), &[x, w]);
        Ok(self.add(name, y, bias))
    }

    fn layer_norm(&mut self, name: &str, x: ValueId, dim: usize) -> Result<ValueId, TrainError> {
        let scale = self.weight(&format!("{name}.weight"), &[dim], Fill::Constant(1.0))?;
        let bias = self.weight(&format!("{name}.bias"), &[dim], Fill::Constant(0.0))?;
        Ok(self.node(name, Op::LayerNorm { axis: -1, epsilon: 1e-5 }, &[x, scale, bias]))
    }

    fn reshape(&mut self, name: &str, x: ValueId, dims: &[i64]) -> ValueId {
        let shape = self.fixed(&format!("{name}.shape"), Tensor::from_slice(&[dims.len()], dims));
        self.node(name, Op::Reshape { allow_zero: false }, &[x, shape])
    }

    fn transpose(&mut self, name: &str, x: ValueId, perm: &[usize]) -> ValueId {
        self.node(name, Op::Transpose { perm: Some(perm.to_vec()) }, &[x])
    }

    fn max_pool(&mut self, name: &str, x: ValueId) -> ValueId {
        let pool = PoolAttributes {
            kind: PoolKind::Max,
            kernel: vec![2; 2],
            strides: vec![2; 2],
            dilations: vec![1; 2],
            padding: Padding::Explicit(vec![0; 4]),
            ceil_mode: false,
            count_include_pad: false,
            storage_order_column: false,
            layout: Layout::ChannelsFirst,
        };
        self.node(name, Op::Pool(pool), &[x])
    }

    fn global_pool(&mut self, x: ValueId) -> ValueId {
        let op = Op::GlobalPool { kind: PoolKind::Average, layout: Layout::ChannelsFirst };
        let y = self.node("pool", op, &[x]);
        self.node("flatten", Op::Flatten { axis: 1 }, &[y])
    }

    /// Channels, height and width of a picture of at least `least` pixels.
    fn picture(&self, input: &Feature, least: usize) -> Result<[usize; 3], TrainError> {
        match *input.dims {
            [c, h, w] if input.dtype == DType::F32 && c > 0 && h >= least && w >= least => Ok([c, h, w]),
            _ => {
                Err(self
                    .wrong(input, &format!("pictures [channels, height, width] of at least {least}x{least}")))
            }
        }
    }
}

fn resnet18(
    b: &mut Builder,
    x: ValueId,
    input: &Feature,
    width: usize,
    outputs: usize,
) -> Result<ValueId, TrainError> {
    let [channels, ..] = b.picture(input, 8)?;
    let relu = Some(UnaryOp::Relu);
    let mut y = b.conv_norm("stem", x, [channels, width, 3, 1, 1], relu)?;
    let mut from = width;
    for stage in 0..4 {
        let to = width << stage;
        for block in 0..2 {
            let name = format!("layer{}.{block}", stage + 1);
            let stride = if stage > 0 && block == 0 { 2 } else { 1 };
            let z = b.conv_norm(&format!("{name}.0"), y, [from, to, 3, stride, 1], relu)?;
            let z = b.conv_norm(&format!("{name}.1"), z, [to, to, 3, 1, 1], None)?;
            if stride != 1 || from != to {
                y = b.conv_norm(&format!("{name}.shortcut"), y, [from, to, 1, stride, 1], None)?;
            }
            let sum = b.add(&format!("{name}.add"), z, y);
            y = b.unary(&format!("{name}.act"), UnaryOp::Relu, sum);
            from = to;
        }
    }
    let y = b.global_pool(y);
    b.dense("fc", y, from, outputs)
}

/// The nearest multiple of 8 that is not more than a tenth below.
fn of_eight(channels: f32) -> usize {
    let rounded = (((channels + 4.0) / 8.0) as usize * 8).max(8);
    if (rounded as f32) < 0.9 * channels { rounded + 8 } else { rounded }
}

fn mobilenet_v2(
    b: &mut Builder,
    x: ValueId,
    input: &Feature,
    width: f32,
    outputs: usize,
) -> Result<ValueId, TrainError> {
    let [channels, height, side] = b.picture(input, 8)?;
    let small = height.min(side) < 96;
    let relu6 = Some(UnaryOp::ClipTo { min: 0.0, max: 6.0 });
    let scaled = |c: usize| of_eight(c as f32 * width);
    let early = if small { 1 } else { 2 };
    let mut from = scaled(32);
    let mut y = b.conv_norm("stem", x, [channels, from, 3, early, 1], relu6)?;
    let stages = [
        (1, 16, 1, 1),
        (6, 24, 2, early),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ];
    let mut index = 0;
    for (expansion, channels, repeats, stride) in stages {
        let to = scaled(channels);
        for repeat in 0..repeats {
            let stride = if repeat == 0 { stride } else { 1 };
            let name = format!("block{index}");
            let inner = from * expansion;
            let mut z = y;
            if expansion != 1 {
                z = b.conv_norm(&format!("{name}.expand"), z, [from, inner, 1, 1, 1], relu6)?;
            }
            z = b.conv_norm(&format!("{name}.depthwise"), z, [inner, inner, 3, stride, inner], relu6)?;
            z = b.conv_norm(&format!("{name}.project"), z, [inner, to, 1, 1, 1], None)?;
            y = if stride == 1 && from == to { b.add(&format!("{name}.add"), z, y) } else { z };
            from = to;
            index += 1;
        }
    }
    let last = of_eight(1280.0 * width.max(1.0));
    let y = b.conv_norm("head", y, [from, last, 1, 1, 1], relu6)?;
    let y = b.global_pool(y);
    b.dense("fc", y, last, outputs)
}

fn cnn(
    b: &mut Builder,
    x: ValueId,
    input: &Feature,
    width: usize,
    outputs: usize,
) -> Result<ValueId, TrainError> {
    let [channels, height, side] = b.picture(input, 4)?;
    let relu = Some(UnaryOp::Relu);
    let mut y = x;
    let mut from = channels;
    for (i, to) in [width, 2 * width].into_iter().enumerate() {
        y = b.conv_norm(&format!("conv{}", 2 * i + 1), y, [from, to, 3, 1, 1], relu)?;
        y = b.conv_norm(&format!("conv{}", 2 * i + 2), y, [to, to, 3, 1, 1], relu)?;
        y = b.max_pool(&format!("pool{}", i + 1), y);
        from = to;
    }
    let y = b.node("flatten", Op::Flatten { axis: 1 }, &[y]);
    let y = b.dense("fc1", y, from * (height / 4) * (side / 4), 4 * width)?;
    let y = b.unary("fc1.act", UnaryOp::Relu, y);
    b.dense("fc2", y, 4 * width, outputs)
}

fn mlp(
    b: &mut Builder,
    x: ValueId,
    input: &Feature,
    hidden: usize,
    layers: usize,
    outputs: usize,
) -> Result<ValueId, TrainError> {
    let mut from: usize = input.dims.iter().product();
    if input.dtype != DType::F32 || from == 0 {
        return Err(b.wrong(input, "numbers (f32)"));
    }
    let mut y = if input.dims.len() == 1 { x } else { b.node("flatten", Op::Flatten { axis: 1 }, &[x]) };
    for i in 0..layers {
        y = b.dense(&format!("fc{}", i + 1), y, from, hidden)?;
        y = b.unary(&format!("fc{}.act", i + 1), UnaryOp::Relu, y);
        from = hidden;
    }
    b.dense("out", y, from, outputs)
}

/// The context of a model over tokens.
fn context(b: &Builder, input: &Feature) -> Result<usize, TrainError> {
    match *input.dims {
        [time] if !input.dtype.is_float() && time > 0 => Ok(time),
        _ => Err(b.wrong(input, "tokens (i64) [time]")),
    }
}

fn gpt(
    b: &mut Builder,
    x: ValueId,
    input: &Feature,
    label: &Feature,
    outputs: usize,
    [layers, dim, heads]: [usize; 3],
) -> Result<ValueId, TrainError> {
    let time = context(b, input)?;
    if heads == 0 || !dim.is_multiple_of(heads) {
        return Err(TrainError::invalid(
            &b.place,
            format!("{heads} heads of a width of {dim}"),
            "heads that divide the width",
        ));
    }
    if label.dims != input.dims {
        return Err(TrainError::invalid(
            &b.place,
            format!("labels of shape {:?}", label.dims),
            "the next token for each token",
        ));
    }
    let head = (dim / heads) as i64;
    let normal = Fill::Normal(0.02);
    let residual = Fill::Normal(0.02 / (2.0 * layers as f64).sqrt());
    let table = b.weight("wte.weight", &[outputs, dim], normal)?;
    let places = b.weight("wpe.weight", &[time, dim], normal)?;
    let y = b.node("wte", Op::Gather { axis: 0 }, &[table, x]);
    let mut y = b.add("wpe", y, places);
    let mut mask = Tensor::zeros(DType::F32, &[time, time]);
    for (at, v) in mask.as_mut_slice::<f32>().iter_mut().enumerate() {
        // Finite, so that no row can become NaN; exp of it is 0 all the same.
        *v = if at % time > at / time { -1e9 } else { 0.0 };
    }
    let mask = b.fixed("causal_mask", mask);
    let scale = b.fixed("attention_scale", Tensor::scalar((1.0 / (head as f64).sqrt()) as f32));
    for layer in 0..layers {
        let name = |part: &str| format!("h{layer}.{part}");
        let z = b.layer_norm(&name("ln1"), y, dim)?;
        let qkv = b.linear(&name("attn.qkv"), z, [dim, 3 * dim], normal)?;
        let sizes = b.fixed(&name("attn.sizes"), Tensor::from_slice(&[3], &[dim as i64; 3]));
        let parts = ["q", "k", "v"].map(|p| name(&format!("attn.{p}")));
        let inputs = vec![Some(qkv), Some(sizes)];
        let parts =
            b.graph.add_node_named(name("attn.split"), Op::Split { axis: -1 }, inputs, parts.to_vec());
        let heads_of = |b: &mut Builder, at: usize, part: &str, perm: &[usize]| {
            let rows =
                b.reshape(&name(&format!("attn.{part}_heads")), parts[at], &[0, 0, heads as i64, head]);
            b.transpose(&name(&format!("attn.{part}_turned")), rows, perm)
        };
        let q = heads_of(b, 0, "q", &[0, 2, 1, 3]);
        let k = heads_of(b, 1, "k", &[0, 2, 3, 1]);
        let v = heads_of(b, 2, "v", &[0, 2, 1, 3]);
        let product = Op::MatMul(MatMulAttributes::default());
        let s = b.node(&name("attn.scores"), product.clone(), &[q, k]);
        let s = b.node(&name("attn.scaled"), Op::Binary(BinaryOp::Mul), &[s, scale]);
        let s = b.add(&name("attn.masked"), s, mask);
        let s = b.node(&name("attn.softmax"), Op::Softmax { axis: -1, log: false }, &[s]);
        let s = b.node(&name("attn.mixed"), product, &[s, v]);
        let s = b.transpose(&name("attn.back"), s, &[0, 2, 1, 3]);
        let s = b.reshape(&name("attn.joined"), s, &[0, 0, dim as i64]);
        let s = b.linear(&name("attn.proj"), s, [dim, dim], residual)?;
        y = b.add(&name("attn.add"), y, s);
        let z = b.layer_norm(&name("ln2"), y, dim)?;
        let z = b.linear(&name("mlp.fc"), z, [dim, 4 * dim], normal)?;
        let z = b.unary(&name("mlp.act"), UnaryOp::Gelu { tanh: false }, z);
        let z = b.linear(&name("mlp.proj"), z, [4 * dim, dim], residual)?;
        y = b.add(&name("mlp.add"), y, z);
    }
    let y = b.layer_norm("ln_f", y, dim)?;
    let head = b.weight("head.weight", &[dim, outputs], normal)?;
    Ok(b.node("head", Op::MatMul(MatMulAttributes::default()), &[y, head]))
}

fn lstm(
    b: &mut Builder,
    x: ValueId,
    input: &Feature,
    label: &Feature,
    outputs: usize,
    hidden: usize,
) -> Result<ValueId, TrainError> {
    // To [time, batch, columns].
    let (y, columns) = match *input.dims {
        [_] if !input.dtype.is_float() => {
            context(b, input)?;
            // Labels that are not tokens say nothing of how many tokens there are.
            if label.dims != input.dims {
                return Err(TrainError::unsupported(&b.place, "classifying token sequences"));
            }
            let table = b.weight("embedding.weight", &[outputs, hidden], Fill::Normal(1.0))?;
            let y = b.node("embedding", Op::Gather { axis: 0 }, &[table, x]);
            (b.transpose("time_first", y, &[1, 0, 2]), hidden)
        }
        [time, columns] if input.dtype == DType::F32 && time > 0 && columns > 0 => {
            (b.transpose("time_first", x, &[1, 0, 2]), columns)
        }
        // The last axis of a picture is time, as in spectrograms.
        [c, h, w] if input.dtype == DType::F32 && c * h * w > 0 => {
            let y = b.reshape("columns", x, &[0, (c * h) as i64, w as i64]);
            (b.transpose("time_first", y, &[2, 0, 1]), c * h)
        }
        _ => return Err(b.wrong(input, "tokens [time], rows [time, columns] or [channels, bands, frames]")),
    };
    let fill = Fill::dense(hidden);
    let w = b.weight("lstm.weight_ih", &[1, 4 * hidden, columns], Fill::xavier(columns, hidden))?;
    let r = b.weight("lstm.weight_hh", &[1, 4 * hidden, hidden], fill)?;
    let bias = b.weight("lstm.bias", &[1, 8 * hidden], fill)?;
    let attributes = RecurrentAttributes {
        hidden_size: hidden,
        direction: Direction::Forward,
        activations: vec![UnaryOp::Sigmoid, UnaryOp::Tanh, UnaryOp::Tanh],
        clip: None,
        batch_first: false,
        input_forget: false,
        linear_before_reset: false,
    };
    let inputs = vec![Some(y), Some(w), Some(r), Some(bias)];
    let names = vec!["lstm.y".to_owned(), "lstm.h".to_owned()];
    let results = b.graph.add_node_named("lstm", Op::Lstm(attributes), inputs, names);
    if label.dims == input.dims && !input.dtype.is_float() {
        // [time, 1, batch, hidden]
        let axis = b.fixed("direction", Tensor::from_slice(&[1], &[1i64]));
        let y = b.node("steps", Op::Squeeze, &[results[0], axis]);
        let y = b.transpose("batch_first", y, &[1, 0, 2]);
        return b.linear("out", y, [hidden, outputs], fill);
    }
    // [1, batch, hidden]
    let axis = b.fixed("direction", Tensor::from_slice(&[1], &[0i64]));
    let y = b.node("last", Op::Squeeze, &[results[1], axis]);
    b.dense("out", y, hidden, outputs)
}

impl FromStr for Architecture {
    type Err = TrainError;

    fn from_str(text: &str) -> Result<Architecture, TrainError> {
        const PLACE: &str = "model";
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        let mut s = Settings::parse(PLACE, rest)?;
        let mut count = |key: &str, default: u64, most: u64| -> Result<usize, TrainError> {
            let value = s.count(key)?.unwrap_or(default);
            if value > most {
                return Err(TrainError::limit(format!("model {text}"), "a size", value, most));
            }
            Ok(value as usize)
        };
        let (model, known) = match name.trim() {
            "resnet18" => (Architecture::ResNet18 { width: count("width", 64, 4096)? }, "width"),
            "cnn" => (Architecture::Cnn { width: count("width", 32, 4096)? }, "width"),
            "mlp" => {
                let hidden = count("hidden", 256, 1 << 20)?;
                (Architecture::Mlp { hidden, layers: count("layers", 2, 1000)? }, "hidden or layers")
            }
            "gpt" => {
                let (layers, dim) = (count("layers", 6, 1000)?, count("dim", 384, 1 << 16)?);
                let heads = count("heads", 6, 1 << 16)?;
                (Architecture::Gpt { layers, dim, heads }, "layers, dim or heads")
            }
            "lstm" => (Architecture::Lstm { hidden: count("hidden", 128, 1 << 16)? }, "hidden"),
            "mobilenetv2" => {
                (Architecture::MobileNetV2 { width: s.number("width", 1.0, 0.05..=8.0)? }, "width")
            }
            other => {
                return Err(TrainError::invalid(
                    PLACE,
                    format!("{other:?}"),
                    "resnet18, mobilenetv2, cnn, mlp, gpt or lstm, or a model file",
                ));
            }
        };
        s.finish(known)?;
        Ok(model)
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Architecture::ResNet18 { width } => write!(f, "resnet18:width={width}"),
            Architecture::MobileNetV2 { width } => write!(f, "mobilenetv2:width={width}"),
            Architecture::Cnn { width } => write!(f, "cnn:width={width}"),
            Architecture::Mlp { hidden, layers } => write!(f, "mlp:hidden={hidden},layers={layers}"),
            Architecture::Gpt { layers, dim, heads } => {
                write!(f, "gpt:layers={layers},dim={dim},heads={heads}")
            }
            Architecture::Lstm { hidden } => write!(f, "lstm:hidden={hidden}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use lightering_engine::{RuntimeValue, interpret};
    use lightering_formats::onnx;
    use lightering_kernels::ThreadPool;
    use lightering_meter::MemoryPool;

    use super::*;
    use crate::LABEL;

    fn image(dims: [usize; 3]) -> Feature {
        Feature::new("image", DType::F32, &dims)
    }

    fn class() -> Feature {
        Feature::new(LABEL, DType::I64, &[])
    }

    fn tokens(time: usize) -> Feature {
        Feature::new("tokens", DType::I64, &[time])
    }

    fn build(text: &str, input: &Feature, label: &Feature, outputs: usize) -> Graph {
        let model: Architecture = text.parse().unwrap();
        assert_eq!(model.to_string().parse::<Architecture>().unwrap(), model);
        model.build(input, label, outputs, None, 1).unwrap()
    }

    fn parameters(graph: &Graph) -> usize {
        let counts = |name: &str| {
            !name.contains("running_")
                && (name.ends_with("weight") || name.ends_with("bias") || name.contains("weight_"))
        };
        graph.values.iter().filter(|v| counts(&v.name)).filter_map(|v| v.tensor()).map(Tensor::len).sum()
    }

    fn run(graph: &Graph, input: &Tensor) -> Tensor {
        let given = [(graph.inputs[0], RuntimeValue::Tensor(input.clone()))];
        interpret(graph, &given, &[], &MemoryPool::unbounded(), &ThreadPool::new(1)).unwrap()[0]
            .tensor()
            .unwrap()
            .clone()
    }

    #[test]
    fn sizes_are_the_published_ones() {
        let small = image([3, 32, 32]);
        assert_eq!(parameters(&build("resnet18", &small, &class(), 10)), 11_173_962);
        let large = image([3, 224, 224]);
        assert_eq!(parameters(&build("mobilenetv2", &large, &class(), 1000)), 3_504_872);
        // 6 blocks of 384: 12·d² + 13·d each, tables, last norm, head.
        let next = Feature { name: LABEL.into(), ..tokens(256) };
        let gpt = build("gpt", &tokens(256), &next, 65);
        assert_eq!(parameters(&gpt), 6 * (12 * 384 * 384 + 13 * 384) + 384 * (65 + 256 + 2 + 65));
    }

    #[test]
    fn exported_models_compute_the_same() {
        let rows =
            |n: usize| Tensor::from_slice(&[2, n], &(0..2 * n as i64).map(|i| i % 7).collect::<Vec<_>>());
        let picture = |dims: [usize; 3]| {
            let mut r = Random::new(5);
            let n = 2 * dims.iter().product::<usize>();
            let values: Vec<f32> = (0..n).map(|_| r.normal() as f32).collect();
            Tensor::from_slice(&[2, dims[0], dims[1], dims[2]], &values)
        };
        let next = Feature { name: LABEL.into(), ..tokens(8) };
        let cases = [
            ("resnet18:width=8", image([3, 16, 16]), class(), picture([3, 16, 16]), vec![2, 10]),
            ("mobilenetv2:width=0.25", image([3, 32, 32]), class(), picture([3, 32, 32]), vec![2, 10]),
            ("cnn:width=8", image([1, 28, 28]), class(), picture([1, 28, 28]), vec![2, 10]),
            ("mlp:hidden=16", image([1, 4, 4]), class(), picture([1, 4, 4]), vec![2, 10]),
            ("gpt:layers=2,dim=16,heads=2", tokens(8), next.clone(), rows(8), vec![2, 8, 10]),
            ("lstm:hidden=8", image([1, 5, 6]), class(), picture([1, 5, 6]), vec![2, 10]),
            ("lstm:hidden=8", tokens(8), next, rows(8), vec![2, 8, 10]),
        ];
        let temporary = tempfile::tempdir().unwrap();
        for (at, (text, input, label, sample, dims)) in cases.into_iter().enumerate() {
            let graph = build(text, &input, &label, 10);
            let result = run(&graph, &sample);
            assert_eq!(result.dims(), dims, "{text}");
            assert!(result.as_slice::<f32>().iter().all(|v| v.is_finite()));
            let path = temporary.path().join(format!("model{at}.onnx"));
            onnx::save_model(&onnx::export(&graph, &[]).unwrap(), None, &path).unwrap();
            let back = onnx::import(&onnx::ModelFile::open(&path).unwrap()).unwrap();
            let given = [(back.graph.inputs[0], RuntimeValue::Tensor(sample))];
            let pool = MemoryPool::unbounded();
            let again = interpret(&back.graph, &given, &back.sources, &pool, &ThreadPool::new(1)).unwrap();
            assert_eq!(again[0].tensor().unwrap(), &result, "{text}");
        }
    }

    #[test]
    fn a_later_token_changes_nothing_before_it() {
        let next = Feature { name: LABEL.into(), ..tokens(4) };
        let graph = build("gpt:layers=2,dim=8,heads=2", &tokens(4), &next, 5);
        let one = run(&graph, &Tensor::from_slice(&[1, 4], &[1i64, 2, 3, 4]));
        let other = run(&graph, &Tensor::from_slice(&[1, 4], &[1i64, 2, 0, 4]));
        let (one, other) = (one.as_slice::<f32>(), other.as_slice::<f32>());
        assert_eq!(one[..10], other[..10]);
        assert_ne!(one[10..15], other[10..15]);
    }

    #[test]
    fn weights_follow_the_seed() {
        let model: Architecture = "mlp:hidden=64,layers=1".parse().unwrap();
        let of = |seed| {
            let graph = model.build(&image([1, 8, 8]), &class(), 3, Some(2), seed).unwrap();
            graph.value(graph.find("fc1.weight").unwrap()).tensor().unwrap().as_slice::<f32>().to_vec()
        };
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
        let bound = 1.0 / 8.0;
        assert!(of(1).iter().all(|w| w.abs() <= bound) && of(1).iter().any(|w| w.abs() > 0.9 * bound));
    }

    #[test]
    fn wrong_inputs_are_refused() {
        let error = |text: &str, input: &Feature, label: &Feature| {
            text.parse::<Architecture>().unwrap().build(input, label, 3, None, 0).unwrap_err().to_string()
        };
        assert!(error("resnet18", &tokens(8), &class()).contains("pictures"));
        assert!(error("gpt", &image([1, 8, 8]), &class()).contains("tokens"));
        assert!(error("gpt:dim=10,heads=3", &tokens(8), &tokens(8)).contains("divide"));
        assert!(error("mlp:hidden=1048576,layers=5", &image([1, 8, 8]), &class()).contains("limit"));
        assert!("resnet".parse::<Architecture>().is_err());
    }
}
