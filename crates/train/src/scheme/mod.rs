//! Update schemes: which parameters learn, how batch normalisations behave meanwhile, and which derivatives are replaced
//! by cheaper ones. A scheme works on any model; what it leaves out has no backward pass at all.

mod blocks;
mod layers;
mod search;
mod sparse;
mod summary;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use lightering_graph::passes::{BatchNormMode, Evaluate};
use lightering_graph::{GradientRule, MaskRule, Selector, UnaryOp};
use lightering_units::Bytes;

pub use blocks::{Block, PATTERN, Part};
pub use layers::{Anatomy, Layer, Parameter, Role};
pub use search::{Contributions, Found, RATIOS, SearchOptions, contributions_from_gradients, search};
pub use sparse::{Portion, Select, SparseScheme};
pub use summary::StepSummary;

use crate::{Change, StepOptions, TrainError};

/// Layers that `bias`, `last` and the blocks of MobileTL count are at most so many.
const COUNT_MAX: usize = 100_000;

/// Which derivative the activations inside of MobileTL's blocks get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ActMask {
    /// 1 above zero, for all of them.
    #[default]
    AboveZero,
    /// That of ReLU6 is exact, the others' is 1 above zero.
    Relu6Exact,
    /// That of Hard-Swish is 1 above -1.5, where its derivative changes sign; the others' is 1 above zero.
    HardSwishAbove,
    /// The true one.
    Exact,
}

/// MobileTL (Chiang et al., 2023).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MobileTl {
    /// The last so many blocks learn; as many as fit the budget if not given.
    pub blocks: Option<usize>,
    /// Derivatives inside.
    pub mask: ActMask,
    /// Squeeze and excitation learn too.
    pub train_squeeze: bool,
}

/// Where a sparse scheme comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Sparse {
    /// Searched for, inside the budget.
    Auto,
    /// [`SparseScheme::preset`].
    Preset,
    /// Read from a file.
    File(PathBuf),
    /// As given.
    Given(SparseScheme),
}

/// What learns. As text: `full`, `last:K`, `bias`, `bias:K`, `head`, `norm`, `sparse:auto`, `sparse:preset`,
/// `sparse:FILE.json`, `mobiletl:K`, `mobiletl:auto`.
#[derive(Clone, Debug, PartialEq)]
pub enum Scheme {
    /// Everything.
    Full,
    /// All parameters from the K-th last layer on.
    Last(usize),
    /// Biases and shifts, of the last K layers or of all.
    Bias(Option<usize>),
    /// The last layer.
    Head,
    /// Scales and shifts of normalisations, and the last layer.
    Norm,
    /// Weights, channels and biases by a scheme.
    Sparse(Sparse),
    /// Shifts and convolutions of the last blocks, with one bit for each activation.
    MobileTl(MobileTl),
}

impl FromStr for Scheme {
    type Err = TrainError;

    fn from_str(text: &str) -> Result<Scheme, TrainError> {
        let (name, rest) = match text.split_once(':') {
            Some((name, rest)) => (name, Some(rest)),
            None => (text, None),
        };
        let wrong = || {
            TrainError::invalid(
                "--method",
                format!("{text:?}"),
                "full, last:K, bias, bias:K, head, norm, sparse:auto, sparse:preset, sparse:FILE.json, mobiletl:K or mobiletl:auto",
            )
        };
        let count =
            |text: &str| text.parse::<usize>().ok().filter(|n| (1..=COUNT_MAX).contains(n)).ok_or_else(wrong);
        Ok(match (name, rest) {
            ("full", None) => Scheme::Full,
            ("last", rest) => Scheme::Last(count(rest.unwrap_or("1"))?),
            ("bias", rest) => Scheme::Bias(rest.map(count).transpose()?),
            ("head", None) => Scheme::Head,
            ("norm", None) => Scheme::Norm,
            ("sparse", None | Some("auto")) => Scheme::Sparse(Sparse::Auto),
            ("sparse", Some("preset")) => Scheme::Sparse(Sparse::Preset),
            ("sparse", Some(file)) if !file.is_empty() => Scheme::Sparse(Sparse::File(file.into())),
            ("mobiletl", rest) => Scheme::MobileTl(MobileTl {
                blocks: rest.filter(|r| *r != "auto").map(count).transpose()?,
                mask: ActMask::default(),
                train_squeeze: true,
            }),
            _ => return Err(wrong()),
        })
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Scheme::Full => f.write_str("full"),
            Scheme::Last(k) => write!(f, "last:{k}"),
            Scheme::Bias(None) => f.write_str("bias"),
            Scheme::Bias(Some(k)) => write!(f, "bias:{k}"),
            Scheme::Head => f.write_str("head"),
            Scheme::Norm => f.write_str("norm"),
            Scheme::Sparse(Sparse::Auto) => f.write_str("sparse:auto"),
            Scheme::Sparse(Sparse::Preset) => f.write_str("sparse:preset"),
            Scheme::Sparse(Sparse::File(path)) => write!(f, "sparse:{}", path.display()),
            Scheme::Sparse(Sparse::Given(_)) => f.write_str("sparse"),
            Scheme::MobileTl(MobileTl { blocks: Some(k), .. }) => write!(f, "mobiletl:{k}"),
            Scheme::MobileTl(_) => f.write_str("mobiletl:auto"),
        }
    }
}

impl FromStr for ActMask {
    type Err = TrainError;

    fn from_str(text: &str) -> Result<ActMask, TrainError> {
        Ok(match text {
            "gt0" => ActMask::AboveZero,
            "relu6-exact" => ActMask::Relu6Exact,
            "hs-1.5" => ActMask::HardSwishAbove,
            "exact" => ActMask::Exact,
            _ => {
                return Err(TrainError::invalid(
                    "--act-mask",
                    format!("{text:?}"),
                    "gt0, relu6-exact, hs-1.5 or exact",
                ));
            }
        })
    }
}

/// What a scheme means for one model.
#[derive(Clone, Debug, Default)]
pub struct Updates {
    /// What changes of which parameter; everything if not given.
    pub changes: Option<HashMap<String, Change>>,
    /// What batch normalisations do; as they would otherwise if not given.
    pub batch_norm: Option<BatchNormMode>,
    /// Those that do otherwise.
    pub batch_norm_of: HashMap<String, BatchNormMode>,
    /// Derivatives in place of the exact ones.
    pub rules: Vec<(Selector, GradientRule)>,
    /// What a user should know: fallbacks, counts that were cut.
    pub notes: Vec<String>,
}

impl Updates {
    /// Puts it into the options of a step.
    pub fn install(&self, options: &mut StepOptions) {
        if self.changes.is_some() {
            options.scheme.clone_from(&self.changes);
        }
        if let Some(mode) = self.batch_norm {
            options.batch_norm = mode;
        }
        options.batch_norm_of.clone_from(&self.batch_norm_of);
        options.differentiate.rules.extend(self.rules.iter().cloned());
    }

    fn of(names: impl Iterator<Item = String>) -> Updates {
        Updates {
            changes: Some(names.map(|name| (name, Change::Whole)).collect()),
            batch_norm: Some(BatchNormMode::Frozen),
            ..Updates::default()
        }
    }
}

/// Finds out what a set of updates takes: the planned peak of its step, or `None` when it fits no budget.
pub type Peak<'a> = dyn FnMut(&Updates) -> Result<Option<Bytes>, TrainError> + 'a;

impl Scheme {
    /// What the scheme means for the model. Those with `auto` take the most that `fits` says yes to.
    ///
    /// # Errors
    /// A file cannot be read or names what is not there; nothing fits.
    pub fn updates(
        &self,
        anatomy: &Anatomy,
        evaluate: &dyn Evaluate,
        fits: &mut Peak<'_>,
    ) -> Result<Updates, TrainError> {
        let named = |keep: &dyn Fn(&Parameter) -> bool| {
            Updates::of(anatomy.parameters.iter().filter(|p| keep(p)).map(|p| p.name.clone()))
        };
        let last_layer = anatomy.start_of_last(1);
        let sparse = |scheme: &SparseScheme| -> Result<Updates, TrainError> {
            Ok(Updates {
                changes: Some(scheme.changes(anatomy, evaluate)?),
                batch_norm: Some(BatchNormMode::Frozen),
                ..Updates::default()
            })
        };
        Ok(match self {
            Scheme::Full => Updates::default(),
            Scheme::Last(k) => {
                let start = anatomy.start_of_last(*k);
                let mut updates = named(&|p| p.at >= start);
                if *k > anatomy.layers.len() {
                    updates.notes.push(format!("the model has {} layers; all learn", anatomy.layers.len()));
                }
                updates
            }
            Scheme::Bias(k) => {
                let start = k.map_or(0, |k| anatomy.start_of_last(k));
                named(&|p| p.role == Role::Shift && p.at >= start || p.at >= last_layer)
            }
            Scheme::Head => named(&|p| p.at >= last_layer),
            Scheme::Norm => named(&|p| p.norm || p.at >= last_layer),
            Scheme::Sparse(Sparse::Given(scheme)) => sparse(scheme)?,
            Scheme::Sparse(Sparse::Preset) => sparse(&SparseScheme::preset(anatomy))?,
            Scheme::Sparse(Sparse::File(path)) => {
                let text = std::fs::read_to_string(path).map_err(|e| TrainError::io(path, e))?;
                sparse(&SparseScheme::from_json(&path.display().to_string(), &text)?)?
            }
            Scheme::Sparse(Sparse::Auto) => {
                return Err(TrainError::invalid(
                    "sparse:auto",
                    "no contributions were measured",
                    "a search before the step is made",
                ));
            }
            Scheme::MobileTl(settings) => return mobile_tl(*settings, anatomy, fits),
        })
    }
}

fn mobile_tl(settings: MobileTl, anatomy: &Anatomy, fits: &mut Peak<'_>) -> Result<Updates, TrainError> {
    let count = anatomy.blocks.len();
    if count == 0 {
        let k = settings.blocks.unwrap_or(1).saturating_mul(3).min(anatomy.layers.len());
        let start = anatomy.start_of_last(k);
        let names = anatomy.parameters.iter().filter(|p| p.at >= start).map(|p| p.name.clone());
        let mut updates = Updates::of(names);
        updates.notes.push(format!(
            "mobiletl: no inverted residual block was found; looked for {PATTERN}. The last {k} layers learn instead, as with last:{k}"
        ));
        return Ok(updates);
    }
    let mut notes = Vec::new();
    let updates = match settings.blocks {
        Some(k) => {
            if k > count {
                notes.push(format!("mobiletl: the model has {count} blocks; all learn"));
            }
            mobile_tl_of(k.min(count), settings, anatomy)
        }
        None => {
            let mut chosen = None;
            for k in (1..=count).rev() {
                let updates = mobile_tl_of(k, settings, anatomy);
                if fits(&updates)?.is_some() {
                    notes.push(format!("mobiletl: the last {k} of {count} blocks fit the budget"));
                    chosen = Some(updates);
                    break;
                }
            }
            chosen.unwrap_or_else(|| mobile_tl_of(1, settings, anatomy))
        }
    };
    Ok(Updates { notes: notes.into_iter().chain(updates.notes.clone()).collect(), ..updates })
}

/// The rules of MobileTL for the last `k` blocks.
fn mobile_tl_of(k: usize, settings: MobileTl, anatomy: &Anatomy) -> Updates {
    let blocks = &anatomy.blocks[anatomy.blocks.len() - k..];
    let start = blocks.first().map_or(usize::MAX, |b| b.at);
    let mut frozen: Vec<&str> = Vec::new();
    let mut inner: Vec<&str> = Vec::new();
    let mut rules = Vec::new();
    for block in blocks {
        for part in block.expand.iter().chain([&block.depthwise]) {
            // Rule 1: shifts alone, so that the normalisation keeps nothing.
            frozen.extend(part.scale.as_deref());
            inner.extend(part.norm.as_deref());
            if let Some((node, op)) = &part.activation
                && let Some(rule) = mask_of(settings.mask, op)
            {
                rules.push((Selector::Node(node.clone()), rule));
            }
        }
        if !settings.train_squeeze {
            frozen.extend(block.squeeze.iter().map(String::as_str));
        }
    }
    let names = anatomy.parameters.iter().filter(|p| p.at >= start && !frozen.contains(&p.name.as_str()));
    let mut updates = Updates::of(names.map(|p| p.name.clone()));
    updates.rules = rules;
    if anatomy.batch() == Some(1) {
        updates.notes.push("batch 1: normalisations use their running statistics".to_owned());
        return updates;
    }
    // Rule 2: the last normalisation of a block and what follows the blocks are trained as usual.
    for (at, (_, node)) in anatomy.graph.iter_nodes().enumerate() {
        let norm = matches!(node.op, lightering_graph::Op::BatchNorm { .. });
        if norm && at >= start && !inner.contains(&node.name.as_str()) {
            updates.batch_norm_of.insert(node.name.clone(), BatchNormMode::Train);
        }
    }
    updates
}

/// Rule 3.
fn mask_of(mask: ActMask, op: &UnaryOp) -> Option<GradientRule> {
    match (mask, op) {
        (ActMask::Exact, _) | (ActMask::Relu6Exact, UnaryOp::ClipTo { .. }) => None,
        (ActMask::HardSwishAbove, UnaryOp::HardSwish) => Some(GradientRule::Mask(MaskRule::Above(-1.5))),
        _ => Some(GradientRule::Positive),
    }
}
