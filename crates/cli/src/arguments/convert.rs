use clap::{Args, ValueHint};
use lightering_lm::Recipe;
use lightering_units::Bytes;
use std::path::PathBuf;

/// `lighter convert`
#[derive(Clone, Debug, Args)]
pub struct ConvertArguments {
    /// Folder with safetensors weights, config.json and tokenizer.json; or one of its weight files; or a GGUF file
    #[arg(value_name = "SOURCE", value_hint = ValueHint::AnyPath)]
    pub source: PathBuf,
    /// The GGUF file to write
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub output: PathBuf,
    /// Format of the weights: F32, F16, BF16, Q8_0, Q6_K, Q5_1, Q5_0, Q4_K, Q4_1, Q4_0; or q4_k_m, which mixes Q4_K
    /// and Q6_K
    ///
    /// Vectors and routers stay as precise as they are. A matrix whose rows are no whole number of blocks gets the next
    /// wider format that fits.
    #[arg(long, value_name = "FORMAT", default_value = "F16")]
    pub format: Recipe,
    /// Most memory that may be held, such as 16MiB [default: 4MiB and what the tokenizer takes]
    ///
    /// Rows are read, converted and written, a few at a time, so that the size of the model does not matter. When it is
    /// less than the tokenizer and one row take, the exit code is 3 and the smallest budget that would do is named.
    #[arg(long, short, value_name = "SIZE", value_parser = super::parse_bytes)]
    pub memory: Option<Bytes>,
    /// Threads that convert [default: all cores]
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Replace the output if it exists
    #[arg(long)]
    pub force: bool,
}
