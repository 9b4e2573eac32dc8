//! What of a model is trained.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// Most elements of a row between the two matrices of an adapter.
const RANK_MAX: usize = 4096;

/// What of a model changes.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    /// All of it.
    Full,
    /// The last layers with the norm and, where it has weights of its own, the matrix behind them.
    Last(usize),
    /// Low-rank matrices beside frozen ones (Hu et al., "LoRA", 2021).
    Lora(LoraOptions),
}

/// Which matrices of a layer have an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoraTarget {
    /// Those of the attention.
    Attention,
    /// Those of the feed-forward network.
    FeedForward,
    /// Both.
    All,
}

/// The adapters.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraOptions {
    /// Elements between both matrices.
    pub rank: usize,
    /// The product counts `alpha / rank`.
    pub alpha: f32,
    /// The matrices that have one.
    pub targets: LoraTarget,
    /// Only the last so many layers; all if not given.
    pub layers: Option<usize>,
}

impl Default for LoraOptions {
    fn default() -> Self {
        LoraOptions { rank: 8, alpha: 16.0, targets: LoraTarget::All, layers: None }
    }
}

impl LoraOptions {
    pub(super) fn check(&self) -> Result<()> {
        if self.rank == 0 || self.rank > RANK_MAX {
            return Err(Error::invalid("rank of LoRA", self.rank, format!("from 1 to {RANK_MAX}")));
        }
        if !self.alpha.is_finite() || self.alpha <= 0.0 {
            return Err(Error::invalid("alpha of LoRA", self.alpha, "a number above 0"));
        }
        Ok(())
    }

    /// Whether a matrix of a layer has an adapter.
    pub(super) fn wants(&self, matrix: &str) -> bool {
        match self.targets {
            LoraTarget::Attention => matrix.starts_with("attn"),
            LoraTarget::FeedForward => matrix.starts_with("ffn"),
            LoraTarget::All => true,
        }
    }
}

impl FromStr for LoraTarget {
    type Err = Error;

    fn from_str(text: &str) -> Result<LoraTarget> {
        match text {
            "attention" => Ok(LoraTarget::Attention),
            "ffn" => Ok(LoraTarget::FeedForward),
            "all" => Ok(LoraTarget::All),
            other => Err(Error::invalid("matrices of LoRA", format!("{other:?}"), "attention, ffn or all")),
        }
    }
}

impl FromStr for Method {
    type Err = Error;

    /// `full`, `last:K` or `lora`, the latter with settings such as `lora:rank=8,alpha=16,matrices=attention,layers=4`.
    fn from_str(text: &str) -> Result<Method> {
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        let wrong = |what: &str, expected: &str| Error::invalid("method", format!("{what:?}"), expected);
        match name {
            "full" if rest.is_empty() => Ok(Method::Full),
            "last" => match rest.parse() {
                Ok(layers) if layers > 0 => Ok(Method::Last(layers)),
                _ => Err(wrong(text, "last:K with a number of layers, such as last:2")),
            },
            "lora" => {
                let mut options = LoraOptions::default();
                let mut alpha = None;
                for setting in rest.split(',').filter(|s| !s.is_empty()) {
                    let (key, value) = setting.split_once('=').unwrap_or((setting, ""));
                    let number = || {
                        value.parse::<usize>().map_err(|_| wrong(setting, "a whole number, such as rank=8"))
                    };
                    match key {
                        "rank" => options.rank = number()?,
                        "layers" => options.layers = Some(number()?),
                        "alpha" => {
                            let value =
                                value.parse().map_err(|_| wrong(setting, "a number, such as alpha=16"))?;
                            alpha = Some(value);
                        }
                        "matrices" => options.targets = value.parse()?,
                        _ => return Err(wrong(setting, "rank, alpha, matrices or layers")),
                    }
                }
                options.alpha = alpha.unwrap_or(2.0 * options.rank as f32);
                options.check()?;
                Ok(Method::Lora(options))
            }
            _ => Err(wrong(text, "full, lora or last:K")),
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Method::Full => f.write_str("full"),
            Method::Last(layers) => write!(f, "last:{layers}"),
            Method::Lora(o) => {
                let matrices = match o.targets {
                    LoraTarget::Attention => "attention",
                    LoraTarget::FeedForward => "ffn",
                    LoraTarget::All => "all",
                };
                write!(f, "lora:rank={},alpha={},matrices={matrices}", o.rank, o.alpha)?;
                o.layers.map_or(Ok(()), |layers| write!(f, ",layers={layers}"))
            }
        }
    }
}
