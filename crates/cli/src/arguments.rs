//! What can be typed. Each flag is declared once here; help, completions and the manual page are derived from it.

mod convert;
mod language;
mod train;

use crate::output::Output;
use clap::{Args, Parser, Subcommand, ValueHint};
use clap_complete::Shell;
use lightering_tier::policy::{ADMISSIONS, EVICTIONS, PREDICTORS};
use lightering_units::{Bytes, BytesPerSecond, Seconds, Watts};
use std::path::PathBuf;

pub use convert::ConvertArguments;
pub use language::{
    CacheFormatName, ChatArguments, DecoderArguments, ExpertArguments, GenerateArguments, LmCommand,
    LmSynthArguments, PerplexityArguments, ServeArguments,
};
pub use train::TrainArguments;

/// Run AI models inside a memory budget that is planned, kept and proven.
#[derive(Debug, Parser)]
#[command(name = "lighter", version, propagate_version = true, disable_help_subcommand = true)]
#[command(after_help = "Exit codes: 0 done, 1 a check was missed, 2 wrong usage or bad input, \
                        3 the budget cannot be met, 4 a peer failed, 70 a bug in this program.")]
pub struct Arguments {
    /// How to answer.
    #[command(flatten)]
    pub output: OutputArguments,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags that every command has.
#[derive(Clone, Copy, Debug, Args)]
pub struct OutputArguments {
    /// Write the result to stdout as JSON
    #[arg(long, global = true, help_heading = "Output")]
    pub json: bool,
    /// Write no progress and no notes to stderr
    #[arg(long, short, global = true, help_heading = "Output")]
    pub quiet: bool,
}

impl From<OutputArguments> for Output {
    fn from(arguments: OutputArguments) -> Output {
        Output { json: arguments.json, quiet: arguments.quiet }
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a model on inputs, inside a budget, and write outputs and a receipt
    Run(RunArguments),
    /// Run the embedded model on its embedded picture: resident, at half and at a quarter of that memory
    Demo(DemoArguments),
    /// Show what is inside a model: inputs, outputs, operators, costs; or architecture, tokenizer, weights
    Inspect(InspectArguments),
    /// Plan a run without running it: what lives where and when, and what sets the peak
    Plan(PlanArguments),
    /// Time a model: median and 95th percentile, predicted beside measured
    Bench(BenchArguments),
    /// Train a model on your data, inside a budget
    Train(TrainArguments),
    /// Fine-tune a trained model on your data inside a budget: train with kept statistics, a third of the usual rate and
    /// what learns chosen to fit
    Tune(TrainArguments),
    /// Continue a text with a language model, inside a budget
    Generate(GenerateArguments),
    /// Tell how well a language model foresees a text
    Perplexity(PerplexityArguments),
    /// Talk with a language model, inside a budget
    Chat(ChatArguments),
    /// Serve a language model over HTTP in OpenAI's interface, with a dashboard, inside a budget
    Serve(ServeArguments),
    /// Turn text into the tokens of a language model, and tokens into text
    Tokenize(TokenizeArguments),
    /// Convert a language model (safetensors or GGUF) to GGUF, in another format of weights
    Convert(ConvertArguments),
    /// Make language models for tests and measurements
    Lm {
        /// What to make.
        #[command(subcommand)]
        command: LmCommand,
    },
    /// Work with chunk traces: what a run needed of what does not fit, and what policies would make of it
    Tier {
        /// What to do with them.
        #[command(subcommand)]
        command: TierCommand,
    },
    /// Measure this machine and write the profile that the planner uses
    Doctor(DoctorArguments),
    /// Run ONNX backend test cases and count what passes
    Conformance(ConformanceArguments),
    /// Write a completion script for a shell to stdout
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the manual page to stdout, or one page per command into a folder
    Man {
        /// Folder for lighter.1, lighter-run.1, …
        #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
        output_dir: Option<PathBuf>,
    },
}

/// A file for a named tensor: `NAME=FILE`, or `FILE` alone where only one tensor can be meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedFile {
    /// The tensor's name; `None` for the only one.
    pub name: Option<String>,
    /// The file.
    pub file: PathBuf,
}

fn parse_named_file(text: &str) -> Result<NamedFile, String> {
    // The last '=' would split a file name, the first one a tensor name; tensor names of real models hold ':' and
    // '/', hardly ever '=', so the first one it is. A path that exists as it stands is taken as a path.
    match text.split_once('=') {
        _ if text.is_empty() => Err("expected NAME=FILE or FILE".to_owned()),
        Some((name, file))
            if !name.is_empty() && !file.is_empty() && !std::path::Path::new(text).exists() =>
        {
            Ok(NamedFile { name: Some(name.to_owned()), file: file.into() })
        }
        Some((name, file)) if name.is_empty() || file.is_empty() => {
            Err(format!("expected NAME=FILE or FILE, found {text:?}"))
        }
        _ => Ok(NamedFile { name: None, file: text.into() }),
    }
}

fn parse_bytes(text: &str) -> Result<Bytes, String> {
    let bytes: Bytes = text.parse().map_err(|error: lightering_units::ParseUnitError| error.to_string())?;
    if bytes == Bytes::ZERO { Err("the size must be more than 0".to_owned()) } else { Ok(bytes) }
}

fn parse_watts(text: &str) -> Result<Watts, String> {
    let number = text.trim_end_matches(['W', 'w']).trim();
    match number.parse::<f64>() {
        Ok(watts) if watts.is_finite() && watts > 0.0 => Ok(Watts(watts)),
        _ => Err(format!("expected watts of one busy core such as 4.5, found {text:?}")),
    }
}

fn parse_dimension(text: &str) -> Result<(String, usize), String> {
    let error = || format!("expected NAME=SIZE such as batch=1, found {text:?}");
    let (name, size) = text.split_once('=').ok_or_else(error)?;
    let size = size.parse().map_err(|_| error())?;
    if name.is_empty() { Err(error()) } else { Ok((name.to_owned(), size)) }
}

fn parse_tolerance(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err(format!("expected a number that is not negative, found {text:?}")),
    }
}

/// Flags about what a run may use, shared by `run`, `plan` and `bench`.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Budget and machine")]
pub struct ResourceArguments {
    /// Most memory that may be held, such as 64MiB; without it, no limit
    ///
    /// Counts everything that the process holds beyond the program's own fixed cost, which `lighter doctor` prints:
    /// weights, activations, scratch, buffers and inputs. When no plan fits, the exit code is 3 and the smallest
    /// budget that would do is named.
    #[arg(long, short, value_name = "SIZE", value_parser = parse_bytes)]
    pub memory: Option<Bytes>,
    /// Threads that compute [default: all cores]
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Machine profile to plan with [default: what `lighter doctor` wrote]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub machine: Option<PathBuf>,
    /// Size of a symbolic dimension of the model, may be repeated
    #[arg(long = "dim", value_name = "NAME=SIZE", value_parser = parse_dimension)]
    pub dimensions: Vec<(String, usize)>,
}

/// Flags about what goes in, shared by `run` and `bench`.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Inputs")]
pub struct InputArguments {
    /// File for an input (.npy, .npz, .pb, picture, or raw bytes), may be repeated; NAME may be left out when the
    /// model has one input
    #[arg(long = "input", short = 'i', value_name = "NAME=FILE", value_parser = parse_named_file)]
    pub inputs: Vec<NamedFile>,
    /// How a picture becomes an input, such as size=224,mean=127,std=128
    #[arg(long, value_name = "SPEC")]
    pub preprocess: Option<String>,
}

/// Flags about the receipt, shared by `run` and `bench`.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Receipt")]
pub struct ReceiptArguments {
    /// Write the receipt to this file as JSON
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub receipt: Option<PathBuf>,
    /// Estimate energy as this many watts times CPU seconds where the processor's counter cannot be read
    #[arg(long, value_name = "WATTS", value_parser = parse_watts)]
    pub energy_model: Option<Watts>,
}

/// `lighter run`
#[derive(Clone, Debug, Args)]
pub struct RunArguments {
    /// The model (.onnx); without it, the embedded default model runs on its embedded picture
    #[arg(value_name = "MODEL", value_hint = ValueHint::FilePath)]
    pub model: Option<PathBuf>,
    /// What goes in.
    #[command(flatten)]
    pub input: InputArguments,
    /// What may be used.
    #[command(flatten)]
    pub resources: ResourceArguments,
    /// Folder for the outputs, each as NAME.npy
    #[arg(long, short, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub output_dir: Option<PathBuf>,
    /// What is told about it.
    #[command(flatten)]
    pub receipt: ReceiptArguments,
    /// Print the K largest elements of each output
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    pub top_k: Option<u32>,
    /// Names of the classes, one a line, for --top-k
    #[arg(long, value_name = "FILE", requires = "top_k", value_hint = ValueHint::FilePath)]
    pub labels: Option<PathBuf>,
    /// Compare an output with a file (.npy or .pb) and exit with 1 when they differ, may be repeated
    #[arg(long, value_name = "NAME=FILE", value_parser = parse_named_file)]
    pub expect: Vec<NamedFile>,
    /// Relative tolerance of --expect
    #[arg(long, value_name = "X", default_value = "1e-3", value_parser = parse_tolerance)]
    pub rtol: f64,
    /// Absolute tolerance of --expect
    #[arg(long, value_name = "X", default_value = "1e-7", value_parser = parse_tolerance)]
    pub atol: f64,
    /// Print the time of every node
    #[arg(long)]
    pub profile: bool,
}

/// `lighter demo`
#[derive(Clone, Debug, Args)]
pub struct DemoArguments {
    /// Threads that compute [default: all cores]
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
}

/// `lighter inspect`
#[derive(Clone, Debug, Args)]
pub struct InspectArguments {
    /// The model (.onnx, .gguf or .safetensors, told by its content)
    #[arg(value_name = "MODEL", value_hint = ValueHint::FilePath)]
    pub model: PathBuf,
    /// Size of a symbolic dimension of the model (.onnx), may be repeated
    #[arg(long = "dim", value_name = "NAME=SIZE", value_parser = parse_dimension)]
    pub dimensions: Vec<(String, usize)>,
    /// Print the graph (.onnx) as text, node by node
    #[arg(long)]
    pub graph: bool,
}

/// `lighter plan`
#[derive(Clone, Debug, Args)]
pub struct PlanArguments {
    /// The model (.onnx, or a language model as .gguf)
    #[arg(value_name = "MODEL", value_hint = ValueHint::FilePath)]
    pub model: PathBuf,
    /// What may be used.
    #[command(flatten)]
    pub resources: ResourceArguments,
    /// How a language model (.gguf) is set up.
    #[command(flatten)]
    pub decoder: DecoderArguments,
    /// Draw the plan as a timeline: which tensor occupies which bytes when
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub svg: Option<PathBuf>,
}

/// `lighter bench`
#[derive(Clone, Debug, Args)]
pub struct BenchArguments {
    /// The model (.onnx, or a language model as .gguf)
    #[arg(value_name = "MODEL", value_hint = ValueHint::FilePath)]
    pub model: PathBuf,
    /// What goes in; an input without a file is filled with numbers from a fixed seed.
    #[command(flatten)]
    pub input: InputArguments,
    /// What may be used.
    #[command(flatten)]
    pub resources: ResourceArguments,
    /// How a language model (.gguf) is set up.
    #[command(flatten)]
    pub decoder: DecoderArguments,
    /// Tokens of the prompt of a language model
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub prompt_tokens: u32,
    /// Tokens of the answer of a language model
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub tokens: u32,
    /// Text whose beginning is the prompt of a language model, instead of tokens at random
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub text: Option<PathBuf>,
    /// Runs before the timed ones [default: 3, for a language model 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=100_000))]
    pub warmup: Option<u32>,
    /// Timed runs [default: 20, for a language model 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub runs: Option<u32>,
    /// Print the time of every node, measured beside predicted
    #[arg(long)]
    pub profile: bool,
    /// Write a page with plots of a language model's run (.html), with nothing in it from elsewhere
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub report: Option<PathBuf>,
    /// After the rounds, have a language model answer for so long, such as 60s, and warn when it gets slower
    #[arg(long, value_name = "TIME", value_parser = parse_positive_seconds)]
    pub sustained: Option<Seconds>,
    /// What is told about it.
    #[command(flatten)]
    pub receipt: ReceiptArguments,
}

/// Token ids: `1,2,3`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenIds(pub Vec<u32>);

fn parse_token_ids(text: &str) -> Result<TokenIds, String> {
    let id = |id: &str| {
        id.parse().map_err(|_| format!("expected token ids such as 1,2,3 or \"1 2 3\", found {id:?}"))
    };
    let ids = text.split([',', ' ', '\n', '\t']).filter(|part| !part.is_empty());
    ids.map(id).collect::<Result<_, _>>().map(TokenIds)
}

/// `lighter tokenize`
#[derive(Clone, Debug, Args)]
pub struct TokenizeArguments {
    /// The language model (.gguf); of it, only the tokenizer is read
    #[arg(value_name = "MODEL", value_hint = ValueHint::FilePath)]
    pub model: PathBuf,
    /// The text; without it and without the flags below, stdin
    #[arg(value_name = "TEXT", conflicts_with_all = ["file", "decode", "chat"])]
    pub text: Option<String>,
    /// File with the text; - for stdin
    #[arg(long, short, value_name = "FILE", conflicts_with_all = ["decode", "chat"], value_hint = ValueHint::FilePath)]
    pub file: Option<PathBuf>,
    /// Turn these token ids into text
    #[arg(long, value_name = "IDS", conflicts_with = "chat", value_parser = parse_token_ids)]
    pub decode: Option<TokenIds>,
    /// File with messages, which the model's chat template turns into a prompt; - for stdin
    ///
    /// A list such as [{"role": "user", "content": "Hello"}], or an object with "messages" and "tools" as in OpenAI's
    /// interface. What the messages say never becomes a control token. A model without a template gets ChatML.
    #[arg(long, value_name = "MESSAGES", value_hint = ValueHint::FilePath)]
    pub chat: Option<PathBuf>,
    /// End the prompt of --chat after the last message, not where the answer begins
    #[arg(long, requires = "chat")]
    pub no_generation_prompt: bool,
    /// Leave out the tokens that the model wants around a text
    #[arg(long)]
    pub no_special: bool,
    /// Turn the spelling of a control token in the text into that token
    #[arg(long, conflicts_with = "chat")]
    pub parse_special: bool,
    /// Print a table of ids and pieces
    #[arg(long, short = 'v')]
    pub pieces: bool,
}

/// `lighter tier`
#[derive(Clone, Debug, Subcommand)]
pub enum TierCommand {
    /// Run a trace again without its model: hit rate, bytes and stall for each policy and capacity
    Replay(TierReplayArguments),
    /// Run a trace with real reads, and sleep in the place of computing: measured beside replayed
    Live(TierLiveArguments),
    /// Show what is in a trace
    Inspect {
        /// The trace
        #[arg(value_name = "TRACE", value_hint = ValueHint::FilePath)]
        trace: PathBuf,
    },
    /// Write a trace without a model, for trying policies
    Synth(TierSynthArguments),
}

/// How many chunks fit: a number, or a share of all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Capacity {
    /// This many.
    Slots(u64),
    /// This share of all, between 0 and 1.
    Share(f64),
}

fn parse_capacity(text: &str) -> Result<Capacity, String> {
    let error = || format!("expected a number of chunks such as 96, or a share such as 25%, found {text:?}");
    match text.strip_suffix('%') {
        Some(percent) => match percent.trim().parse::<f64>() {
            Ok(percent) if percent > 0.0 && percent <= 100.0 => Ok(Capacity::Share(percent / 100.0)),
            _ => Err(error()),
        },
        None => match text.parse::<u64>() {
            Ok(slots) if slots > 0 => Ok(Capacity::Slots(slots)),
            _ => Err(error()),
        },
    }
}

fn parse_rate(text: &str) -> Result<BytesPerSecond, String> {
    let size = text.strip_suffix("/s").unwrap_or(text);
    parse_bytes(size)
        .map(|bytes| BytesPerSecond(bytes.0 as f64))
        .map_err(|_| format!("expected bytes a second such as 1.3GB/s, found {text:?}"))
}

fn parse_seconds(text: &str) -> Result<Seconds, String> {
    text.parse().map_err(|error: lightering_units::ParseUnitError| error.to_string())
}

fn parse_positive_seconds(text: &str) -> Result<Seconds, String> {
    match parse_seconds(text)? {
        Seconds(s) if s > 0.0 && s <= 86_400.0 => Ok(Seconds(s)),
        _ => Err("expected more than 0 and at most 24 h, such as 60s".to_owned()),
    }
}

fn parse_fraction(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..=1.0).contains(&value) => Ok(value),
        _ => Err(format!("expected a number from 0 to 1, found {text:?}")),
    }
}

/// Flags about policies, shared by `tier replay` and `tier live`.
#[derive(Clone, Debug, Args)]
pub struct TierPolicyArguments {
    /// The trace
    #[arg(value_name = "TRACE", value_hint = ValueHint::FilePath)]
    pub trace: PathBuf,
    /// Who leaves when there is no room; belady, the bound, is printed beside them
    ///
    /// static-hot takes its frequencies from this very trace, which flatters it.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "lru,lfu,static-hot",
          value_parser = clap::builder::PossibleValuesParser::new(EVICTIONS))]
    pub policy: Vec<String>,
    /// What is read ahead; oracle, which knows the future, is printed beside them
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "none,repeat-last,frequency",
          value_parser = clap::builder::PossibleValuesParser::new(PREDICTORS))]
    pub prefetch: Vec<String>,
    /// Which predictions are read ahead
    #[arg(long, value_name = "NAME", default_value = "always",
          value_parser = clap::builder::PossibleValuesParser::new(ADMISSIONS))]
    pub admission: String,
    /// Chunks that fit, as a number or a share of all [default: those of the recorded store, else 50% and 25%]
    #[arg(long, value_name = "N|P%", value_delimiter = ',', value_parser = parse_capacity)]
    pub capacity: Vec<Capacity>,
    /// Only the first steps of the trace
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: Option<u64>,
}

/// `lighter tier replay`
#[derive(Clone, Debug, Args)]
pub struct TierReplayArguments {
    /// What is compared.
    #[command(flatten)]
    pub policies: TierPolicyArguments,
    /// Rate of the disk [default: that of random O_DIRECT reads in the machine profile]
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub disk_rate: Option<BytesPerSecond>,
    /// Time before each read begins to move bytes
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = parse_seconds)]
    pub disk_latency: Seconds,
    /// Machine profile to take the rate from [default: what `lighter doctor` wrote]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub machine: Option<PathBuf>,
}

/// `lighter tier live`
#[derive(Clone, Debug, Args)]
pub struct TierLiveArguments {
    /// What is compared.
    #[command(flatten)]
    pub policies: TierPolicyArguments,
    /// A large file on the disk in question, whose bytes stand for the chunks
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub data: PathBuf,
    /// Reads under way at the same time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub io_threads: u32,
    /// Read through the page cache, dropping what was read, instead of past it
    #[arg(long)]
    pub buffered: bool,
    /// Make the disk no faster than this, as a weaker disk would be
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub disk_rate: Option<BytesPerSecond>,
    /// Make each read take this much longer
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = parse_seconds)]
    pub disk_latency: Seconds,
}

/// `lighter tier synth`
#[derive(Clone, Debug, Args)]
pub struct TierSynthArguments {
    /// Where to write the trace
    #[arg(value_name = "TRACE", value_hint = ValueHint::FilePath)]
    pub trace: PathBuf,
    /// Groups, such as layers
    #[arg(long, value_name = "L", default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub groups: u32,
    /// Chunks of each group, such as experts
    #[arg(long, value_name = "E", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub chunks: u32,
    /// Chunks that a group needs in a step
    #[arg(long, value_name = "K", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=65535))]
    pub per_step: u32,
    /// Steps, such as tokens
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: u64,
    /// Exponent of Zipf's law by which each group prefers its chunks; 0 for equal preference
    #[arg(long, value_name = "S", default_value = "0.8", value_parser = parse_tolerance)]
    pub zipf: f64,
    /// Probability that a chunk is needed again because it was needed in the step before
    #[arg(long, value_name = "P", default_value = "0.3", value_parser = parse_fraction)]
    pub repeat: f64,
    /// Size of a chunk
    #[arg(long, value_name = "SIZE", default_value = "2MiB", value_parser = parse_bytes)]
    pub chunk_size: Bytes,
    /// Time that a group is computed on
    #[arg(long, value_name = "TIME", default_value = "2ms", value_parser = parse_seconds)]
    pub computing: Seconds,
    /// Same seed, same trace
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
}

/// `lighter doctor`
#[derive(Clone, Debug, Args)]
pub struct DoctorArguments {
    /// Where to write the profile [default: $XDG_CONFIG_HOME/lightering/machine.json]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub output: Option<PathBuf>,
    /// Measure and print, but write no profile
    #[arg(long, conflicts_with = "output")]
    pub dry_run: bool,
    /// Folder on the disk to measure [default: the profile's folder]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub disk: Option<PathBuf>,
    /// Size of the file that is written there to be read, removed afterwards
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = parse_bytes)]
    pub disk_bytes: Bytes,
    /// Measure for a fraction of the time; the figures are rougher
    #[arg(long)]
    pub fast: bool,
}

/// `lighter conformance`
#[derive(Clone, Debug, Args)]
pub struct ConformanceArguments {
    /// Folder of ONNX backend test cases: CASE/model.onnx with CASE/test_data_set_N/{input,output}_K.pb
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub onnx: PathBuf,
    /// Run only the cases whose name contains this
    #[arg(long, value_name = "TEXT")]
    pub filter: Option<String>,
    /// Relative tolerance
    #[arg(long, value_name = "X", default_value = "1e-3", value_parser = parse_tolerance)]
    pub rtol: f64,
    /// Absolute tolerance
    #[arg(long, value_name = "X", default_value = "1e-7", value_parser = parse_tolerance)]
    pub atol: f64,
    /// Memory that one case may hold
    #[arg(long, short, value_name = "SIZE", default_value = "2GiB", value_parser = parse_bytes)]
    pub memory: Bytes,
    /// Threads that compute
    #[arg(long, short, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: u32,
    /// Exit with 1 when fewer than this many cases pass
    #[arg(long, value_name = "N")]
    pub require: Option<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_declarations_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn named_files() {
        let check = |text: &str, name: Option<&str>, file: &str| {
            let expected = NamedFile { name: name.map(str::to_owned), file: file.into() };
            assert_eq!(parse_named_file(text), Ok(expected), "{text}");
        };
        check("data=x.npy", Some("data"), "x.npy");
        check("input:0=a=b.npy", Some("input:0"), "a=b.npy");
        check("photo.jpg", None, "photo.jpg");
        for bad in ["", "=x.npy", "data=", "="] {
            assert!(parse_named_file(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn token_ids() {
        assert_eq!(parse_token_ids("1,22, 3"), Ok(TokenIds(vec![1, 22, 3])));
        assert_eq!(parse_token_ids("4 5\n"), Ok(TokenIds(vec![4, 5])));
        for bad in ["1,x", "-1", "4294967296"] {
            assert!(parse_token_ids(bad).unwrap_err().contains("1,2,3"), "{bad}");
        }
    }

    #[test]
    fn quantities_are_refused_with_an_example() {
        assert!(parse_bytes("5 parsecs").unwrap_err().contains("64MiB"));
        assert!(parse_bytes("0").is_err());
        assert!(parse_watts("-3").is_err());
        assert_eq!(parse_watts("4.5W"), Ok(Watts(4.5)));
        assert_eq!(parse_dimension("batch=8"), Ok(("batch".to_owned(), 8)));
        for bad in ["batch", "=8", "batch=", "batch=-1"] {
            assert!(parse_dimension(bad).unwrap_err().contains("batch=1"), "{bad}");
        }
        assert!(parse_tolerance("nan").is_err());
    }
}
