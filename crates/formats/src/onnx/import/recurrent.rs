//! RNN, LSTM and GRU.

use lightering_graph::{Direction, Op, RecurrentAttributes, UnaryOp};

use super::builder::GraphBuilder;
use super::node::NodeReader;
use super::standard::done;
use crate::Result;

pub(super) fn convert(b: &mut GraphBuilder, n: &NodeReader) -> Result<()> {
    let direction = n.choice(
        "direction",
        "forward",
        &[
            ("forward", Direction::Forward),
            ("reverse", Direction::Reverse),
            ("bidirectional", Direction::Bidirectional),
        ],
    )?;
    if n.opset < 7 {
        n.ignore("output_sequence");
    }
    let directions = if direction == Direction::Bidirectional { 2 } else { 1 };
    let defaults: &[&str] = match n.op_type() {
        "RNN" => &["Tanh"],
        "GRU" => &["Sigmoid", "Tanh"],
        _ => &["Sigmoid", "Tanh", "Tanh"],
    };
    let names = match n.strings("activations")? {
        Some(names) if !names.is_empty() => names,
        _ => defaults.iter().cycle().take(defaults.len() * directions).map(|s| (*s).to_owned()).collect(),
    };
    if names.len() != defaults.len() * directions {
        return Err(n.invalid(
            format!("{} activations", names.len()),
            format!("{} for each of {directions} directions", defaults.len()),
        ));
    }
    // Parameters are given only for those functions that have some, in order.
    let (alphas, betas) = (n.floats("activation_alpha")?, n.floats("activation_beta")?);
    let (mut alphas, mut betas) = (alphas.into_iter(), betas.into_iter());
    let mut activations = Vec::new();
    for name in &names {
        let mut alpha = |default: f32| alphas.next().unwrap_or(default);
        activations.push(match name.to_ascii_lowercase().as_str() {
            "relu" => UnaryOp::Relu,
            "tanh" => UnaryOp::Tanh,
            "sigmoid" => UnaryOp::Sigmoid,
            "softsign" => UnaryOp::Softsign,
            "softplus" => UnaryOp::Softplus,
            "leakyrelu" => UnaryOp::LeakyRelu { alpha: alpha(0.01) },
            "thresholdedrelu" => UnaryOp::ThresholdedRelu { alpha: alpha(1.0) },
            "elu" => UnaryOp::Elu { alpha: alpha(1.0) },
            "hardsigmoid" => UnaryOp::HardSigmoid { alpha: alpha(0.2), beta: betas.next().unwrap_or(0.5) },
            _ => return Err(n.unsupported(format!("the activation {name:?}"))),
        });
    }
    let hidden_size = match n.size("hidden_size", 0)? {
        0 => {
            let r = n.required(2, "R")?;
            let last = b.graph.value(r).ty.tensor().and_then(|t| t.shape.as_ref()?.last()?.fixed());
            last.filter(|size| *size > 0).ok_or_else(|| n.no_attribute("hidden_size"))?
        }
        size => size,
    };
    let clip = n.float_if_any("clip")?;
    if clip.is_some_and(|c| c.is_nan() || c < 0.0) {
        return Err(n.invalid(format!("attribute \"clip\" is {clip:?}"), "0 or more"));
    }
    let attributes = RecurrentAttributes {
        hidden_size,
        direction,
        activations,
        clip,
        batch_first: n.opset >= 14 && n.flag("layout", false)?,
        input_forget: n.op_type() == "LSTM" && n.flag("input_forget", false)?,
        linear_before_reset: n.op_type() == "GRU" && n.flag("linear_before_reset", false)?,
    };
    let op = match n.op_type() {
        "RNN" => Op::Rnn(attributes),
        "GRU" => Op::Gru(attributes),
        _ => Op::Lstm(attributes),
    };
    done(b.finish(n, op, n.inputs.clone()))
}
