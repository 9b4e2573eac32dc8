//! Sparse updates: some weights, some of their channels, and the biases of the last layers (Zhu et al., "PockEngine", 2023).

use std::collections::{BTreeMap, HashMap};

use lightering_graph::passes::Evaluate;
use serde::{Deserialize, Serialize};

use super::layers::{Anatomy, Layer, Role};
use crate::{Change, TrainError};

/// Which channels of a weight are taken for a share of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Select {
    /// Those with the largest norm.
    #[default]
    #[serde(rename = "magnitude+")]
    Largest,
    /// Those with the smallest norm.
    #[serde(rename = "magnitude-")]
    Smallest,
}

/// How much of a parameter changes, in a scheme by name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Portion {
    /// A share of its input channels; 1 is all of it.
    Share(f64),
    /// These channels along an axis.
    Channels {
        /// The axis.
        axis: usize,
        /// Ascending.
        channels: Vec<usize>,
    },
}

/// An update scheme as it is written: by number of layer, as PockEngine's code has it, and by name of parameter.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SparseScheme {
    /// The last so many layers learn their biases and shifts.
    pub n_bias_update: usize,
    /// Layers that learn their weight, by number from 0 at the input.
    pub weight_idx: Vec<usize>,
    /// The share of input channels of each of them.
    pub weight_ratio: Vec<f64>,
    /// Which channels these are.
    pub select: Select,
    /// The last layer, the classifier, learns everything.
    pub head: bool,
    /// Further parameters by name.
    pub parameters: BTreeMap<String, Portion>,
}

impl SparseScheme {
    /// Reads a scheme.
    ///
    /// # Errors
    /// It is none.
    pub fn from_json(place: &str, text: &str) -> Result<SparseScheme, TrainError> {
        serde_json::from_str(text).map_err(|e| {
            TrainError::invalid(
                place,
                e.to_string(),
                "{\"n_bias_update\": 22, \"weight_idx\": [21, 24], \"weight_ratio\": [1, 0.25], \"select\": \"magnitude+\", \"head\": true} or {\"parameters\": {\"NAME\": 0.5}}",
            )
        })
    }

    /// For networks of the kind of MobileNetV2 (blocks that widen and narrow): biases of the last half and the first
    /// pointwise convolution of each of the last seven blocks; for others of the last seven layers that are no depthwise
    /// ones.
    pub fn preset(anatomy: &Anatomy) -> SparseScheme {
        let names: Vec<&str> = if anatomy.blocks.is_empty() {
            let dense = anatomy.layers.iter().filter(|l| l.axis == Some(1) || l.dims.len() == 2);
            dense.map(|l| l.weight.as_str()).collect()
        } else {
            let first = anatomy.blocks.iter().filter_map(|b| b.expand.as_ref()?.weight.as_deref());
            first.collect()
        };
        let taken = &names[names.len().saturating_sub(7)..];
        let weight_idx: Vec<usize> = anatomy
            .layers
            .iter()
            .enumerate()
            .filter(|(_, l)| taken.contains(&l.weight.as_str()))
            .map(|(i, _)| i)
            .collect();
        SparseScheme {
            n_bias_update: anatomy.layers.len() / 2,
            weight_ratio: vec![1.0; weight_idx.len()],
            weight_idx,
            head: true,
            ..SparseScheme::default()
        }
    }

    /// What changes of which parameter.
    ///
    /// # Errors
    /// It names layers or parameters that are not there, or shares that cannot be.
    pub fn changes(
        &self,
        anatomy: &Anatomy,
        evaluate: &dyn Evaluate,
    ) -> Result<HashMap<String, Change>, TrainError> {
        let layers = &anatomy.layers;
        if self.weight_idx.len() != self.weight_ratio.len() {
            return Err(TrainError::invalid(
                "update scheme",
                format!("{} layers and {} ratios", self.weight_idx.len(), self.weight_ratio.len()),
                "one weight_ratio for each weight_idx",
            ));
        }
        let mut changes = HashMap::new();
        for layer in layers.iter().rev().take(self.n_bias_update) {
            changes.extend(layer.shifts.iter().map(|name| (name.clone(), Change::Whole)));
        }
        if self.head
            && let Some(layer) = layers.last()
        {
            let all = std::iter::once(&layer.weight).chain(&layer.shifts);
            changes.extend(all.map(|name| (name.clone(), Change::Whole)));
        }
        for (&index, &share) in self.weight_idx.iter().zip(&self.weight_ratio) {
            let layer = layers.get(index).ok_or_else(|| {
                TrainError::invalid(
                    "update scheme",
                    format!("weight_idx {index}"),
                    format!("a number below {}, that of the layers", layers.len()),
                )
            })?;
            changes.insert(layer.weight.clone(), self.part_of(layer, share, anatomy, evaluate)?);
        }
        for (name, portion) in &self.parameters {
            let parameter = anatomy.parameters.iter().find(|p| p.name == *name).ok_or_else(|| {
                TrainError::invalid(
                    "update scheme",
                    format!("{name:?} is no parameter of the model"),
                    "names that `lighter inspect --weights` lists",
                )
            })?;
            let layer = layers.iter().find(|l| l.weight == *name);
            let change = match portion {
                Portion::Share(1.0) => Change::Whole,
                Portion::Share(share) => match layer {
                    Some(layer) if parameter.role == Role::Weight => {
                        self.part_of(layer, *share, anatomy, evaluate)?
                    }
                    _ => return Err(wrong_share(name, *share, "1: it has no input channels")),
                },
                Portion::Channels { axis, channels } => {
                    Change::Channels { axis: *axis, channels: channels.clone() }
                }
            };
            changes.insert(name.clone(), change);
        }
        Ok(changes)
    }

    fn part_of(
        &self,
        layer: &Layer,
        share: f64,
        anatomy: &Anatomy,
        evaluate: &dyn Evaluate,
    ) -> Result<Change, TrainError> {
        if !(share > 0.0 && share <= 1.0) {
            return Err(wrong_share(&layer.weight, share, "a share above 0 and at most 1"));
        }
        if share == 1.0 {
            return Ok(Change::Whole);
        }
        let Some(axis) = layer.axis else {
            return Err(wrong_share(&layer.weight, share, "1: channels of a grouped layer cannot be chosen"));
        };
        let channels = layer.dims[axis];
        let count = ((channels as f64 * share).round() as usize).max(1);
        if count == channels {
            return Ok(Change::Whole);
        }
        let norms =
            channel_norms(&anatomy.read(&layer.weight, evaluate)?.to_f64s().unwrap_or_default(), layer);
        let mut order: Vec<usize> = (0..channels).collect();
        // Equal ones stay in order, so that the choice is the same everywhere.
        order.sort_by(|&a, &b| match self.select {
            Select::Largest => norms[b].total_cmp(&norms[a]),
            Select::Smallest => norms[a].total_cmp(&norms[b]),
        });
        order.truncate(count);
        order.sort_unstable();
        Ok(Change::Channels { axis, channels: order })
    }
}

fn wrong_share(name: &str, share: f64, expected: &str) -> TrainError {
    TrainError::invalid(format!("update scheme of {name:?}"), format!("share {share}"), expected)
}

/// Sums of squares per channel of a layer's weight, or of its gradient.
pub(super) fn channel_norms(values: &[f64], layer: &Layer) -> Vec<f64> {
    let Some(axis) = layer.axis else { return vec![values.iter().map(|v| v * v).sum()] };
    let channels = layer.dims[axis];
    let inner: usize = layer.dims[axis + 1..].iter().product();
    let mut norms = vec![0.0; channels];
    for (i, v) in values.iter().enumerate() {
        norms[i / inner.max(1) % channels.max(1)] += v * v;
    }
    norms
}
