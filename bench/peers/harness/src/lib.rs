//! What every peer binary shares: values, the ONNX backend cases, and the two measurements.
//!
//! A peer implements [`Engine`]; [`main`] then gives it three commands:
//! `latency` (one process, one model, times of each run, peak memory, outputs as .npy),
//! `conformance` (all backend cases of a folder, each in a process of its own), and
//! `case` (one of those cases; used by `conformance`).

mod cases;
mod latency;
mod npy;
mod onnx;
mod value;

pub use npy::{read_npy, write_npy};
pub use value::{Dtype, Tensor, Value};

use anyhow::{Result, bail};
use std::path::Path;

/// One inference engine under measurement.
pub trait Engine: Sized {
    /// Name in reports.
    const NAME: &'static str;
    /// Version in reports.
    const VERSION: &'static str;
    /// Whether outputs must carry the declared element type.
    /// An engine that documents that it narrows 64-bit integers and booleans is compared by value alone.
    const STRICT_DTYPES: bool;

    /// Loads `model` and binds `inputs`, converted once, so that [`Engine::run`] measures inference alone.
    /// `attempt` counts up from 0 while `load` or `run` fails, up to [`Engine::ATTEMPTS`].
    fn load(model: &Path, inputs: &[(String, Value)], threads: usize, attempt: usize) -> Result<Self>;

    /// How many ways of loading there are; a case passes if one of them passes.
    const ATTEMPTS: usize = 1;

    /// One inference.
    fn run(&mut self) -> Result<()>;

    /// Outputs of the last run in the graph's order.
    fn outputs(&self) -> Result<Vec<(String, Value)>>;
}

/// Entry point of a peer binary.
pub fn main<E: Engine>() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("latency") => latency::main::<E>(&arguments[1..]),
        Some("conformance") => cases::main::<E>(&arguments[1..]),
        Some("case") => cases::one::<E>(&arguments[1..]),
        _ => bail!(
            "usage:\n  latency MODEL --input NAME=FILE.npy… [--threads N] [--warmup N] [--runs N] [--output-dir DIR]\n  conformance --onnx DIR [--timeout SECONDS] [--json FILE]"
        ),
    }
}

/// Reads `--name value` pairs; everything else is positional.
pub(crate) fn options(arguments: &[String]) -> Result<(Vec<String>, Vec<(String, String)>)> {
    let mut positional = Vec::new();
    let mut named = Vec::new();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.strip_prefix("--") {
            Some(name) => match rest.next() {
                Some(value) => named.push((name.to_owned(), value.clone())),
                None => bail!("--{name} needs a value"),
            },
            None => positional.push(argument.clone()),
        }
    }
    Ok((positional, named))
}
