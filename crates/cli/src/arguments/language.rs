//! Flags of the commands that run language models.

use super::{ReceiptArguments, parse_bytes};
use clap::{Args, Subcommand, ValueEnum, ValueHint};
use lightering_lm::SamplerOptions;
use lightering_units::{BlockFormat, Bytes};
use std::path::PathBuf;

/// Format of the cache of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CacheFormatName {
    /// 32-bit floats
    F32,
    /// 16-bit floats
    F16,
    /// 8-bit blocks
    Q8,
}

/// Flags about what a language model may use.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Budget and machine")]
pub struct LanguageArguments {
    /// Most memory that may be held, such as 2GiB; without it, no limit
    ///
    /// Counts everything that the process holds beyond the program's own fixed cost, which `lighter doctor` prints:
    /// weights, cache, activations, scratch, tokenizer. What does not fit is read from the file while it is needed;
    /// experts of a mixture are kept as far as there is room. The answer stays the same. When no plan fits, the exit
    /// code is 3 and the smallest budget that would do is named.
    #[arg(long, short, value_name = "SIZE", value_parser = parse_bytes)]
    pub memory: Option<Bytes>,
    /// Threads that compute [default: all cores]
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Machine profile to plan with [default: what `lighter doctor` wrote]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub machine: Option<PathBuf>,
    /// How the model is set up.
    #[command(flatten)]
    pub decoder: DecoderArguments,
}

/// Flags about how a language model is set up.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Language model")]
pub struct DecoderArguments {
    /// Most tokens of a conversation, prompt and answer together [default: what the model was trained on, at most 4096]
    #[arg(long, short, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    pub context: Option<u32>,
    /// Format of the cache of keys and values
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "f16")]
    pub cache: CacheFormatName,
    /// Tokens that the cache has room for, of all conversations together [default: --context for each of them]
    ///
    /// Conversations that find no room wait, and are computed again later from what is left of them.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=1_073_741_824))]
    pub cache_tokens: Option<u32>,
    /// Most tokens that are computed in one step; more are faster for long prompts and take more memory
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub step_tokens: u32,
    /// How experts are kept and fetched.
    #[command(flatten)]
    pub experts: ExpertArguments,
}

/// Flags about the experts of a mixture that do not all fit into memory.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Experts that do not fit")]
pub struct ExpertArguments {
    /// Which expert leaves when another one needs its place: lru, lru-global, lfu, static-hot or belady
    #[arg(long = "experts", value_name = "POLICY", default_value = "lru")]
    pub eviction: String,
    /// What is read ahead: none, repeat-last, frequency or oracle
    #[arg(long, value_name = "POLICY", default_value = "none")]
    pub prefetch: String,
    /// When reading ahead is allowed: pays, always or never
    #[arg(long, value_name = "POLICY", default_value = "pays")]
    pub admission: String,
    /// Record which experts the routers choose; `lighter tier replay` tells what other policies would make of it
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub chunk_trace: Option<PathBuf>,
    /// A recorded run, for the policies that learn from one (static-hot) or know the future (belady, oracle)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub recorded: Option<PathBuf>,
    /// Reads under way at the same time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub reads: u32,
}

/// Flags about how tokens are chosen.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Choice of tokens")]
pub struct SamplerArguments {
    /// Below 1 the likely become likelier; 0 always takes the likeliest
    #[arg(long, value_name = "X", default_value_t = 0.8)]
    pub temperature: f32,
    /// Only the K likeliest tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 40)]
    pub top_k: usize,
    /// Only the likeliest tokens that have this probability together
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    pub top_p: f32,
    /// Only tokens at least this fraction as likely as the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    pub min_p: f32,
    /// Above 1, tokens that were used become less likely
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// Where the random numbers begin
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

impl From<&SamplerArguments> for SamplerOptions {
    fn from(a: &SamplerArguments) -> SamplerOptions {
        SamplerOptions {
            temperature: a.temperature,
            top_k: a.top_k,
            top_p: a.top_p,
            min_p: a.min_p,
            repetition_penalty: a.repetition_penalty,
            seed: a.seed,
            ..SamplerOptions::default()
        }
    }
}

/// `lighter generate`
#[derive(Clone, Debug, Args)]
pub struct GenerateArguments {
    /// The language model (.gguf)
    #[arg(value_name = "MODEL", value_hint = ValueHint::FilePath)]
    pub model: PathBuf,
    /// The text to continue; without it and without --file, stdin
    #[arg(value_name = "PROMPT", conflicts_with = "file")]
    pub prompt: Option<String>,
    /// File with the text to continue; - for stdin
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: Option<PathBuf>,
    /// Take the prompt as a user's message and answer it, by the model's chat template
    #[arg(long)]
    pub chat: bool,
    /// Most tokens of the answer [default: what fits]
    #[arg(long, short = 'n', value_name = "N")]
    pub tokens: Option<usize>,
    /// Go on after the model has ended its answer
    #[arg(long)]
    pub ignore_end: bool,
    /// End before this text, may be repeated
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// The answer is JSON that fits this schema
    #[arg(long, value_name = "FILE", conflicts_with_all = ["grammar", "regex"], value_hint = ValueHint::FilePath)]
    pub json_schema: Option<PathBuf>,
    /// The answer follows this grammar (GBNF)
    #[arg(long, value_name = "FILE", conflicts_with = "regex", value_hint = ValueHint::FilePath)]
    pub grammar: Option<PathBuf>,
    /// The answer matches this regular expression
    #[arg(long, value_name = "PATTERN")]
    pub regex: Option<String>,
    /// Tell each token with its probability and this many of the likeliest, 20 at most
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=20))]
    pub logprobs: Option<u8>,
    /// Most tokens that are guessed ahead from earlier text and checked in one step; the answer stays the same
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub draft: usize,
    /// How tokens are chosen.
    #[command(flatten)]
    pub sampler: SamplerArguments,
    /// What may be used.
    #[command(flatten)]
    pub resources: LanguageArguments,
    /// What is told about it.
    #[command(flatten)]
    pub receipt: ReceiptArguments,
}

/// `lighter perplexity`
#[derive(Clone, Debug, Args)]
pub struct PerplexityArguments {
    /// The language model (.gguf)
    #[arg(value_name = "MODEL", value_hint = ValueHint::FilePath)]
    pub model: PathBuf,
    /// The text
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// Tokens of a window; the second half of each is judged
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(4..=1_000_000))]
    pub window: u32,
    /// Most windows [default: all of the text]
    #[arg(long, value_name = "N")]
    pub windows: Option<usize>,
    /// What may be used.
    #[command(flatten)]
    pub resources: LanguageArguments,
}

/// `lighter serve`
#[derive(Clone, Debug, Args)]
pub struct ServeArguments {
    /// The language model (.gguf)
    #[arg(value_name = "MODEL", value_hint = ValueHint::FilePath)]
    pub model: PathBuf,
    /// Address to listen on; 0.0.0.0 for all
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1", help_heading = "Server")]
    pub host: String,
    /// Port to listen on; 0 for any that is free
    #[arg(long, short, value_name = "PORT", default_value_t = 8080, help_heading = "Server")]
    pub port: u16,
    /// Conversations that are computed side by side, each with room for --context tokens
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = "Server")]
    pub parallel: u32,
    /// Requests that may wait for a place; more are told to come back later
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536), help_heading = "Server")]
    pub queue: u32,
    /// Ask clients for this key, may be repeated [default: what LIGHTER_API_KEY says]
    ///
    /// Other users of this machine can see it in the list of processes; LIGHTER_API_KEY and --api-key-file do not show
    /// it.
    #[arg(long, value_name = "KEY", value_parser = parse_key, help_heading = "Server")]
    pub api_key: Vec<String>,
    /// File with keys, one a line
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Server")]
    pub api_key_file: Option<PathBuf>,
    /// Name by which clients ask for the model [default: the file's name without its ending]
    #[arg(long, value_name = "NAME", help_heading = "Server")]
    pub name: Option<String>,
    /// Most tokens that are guessed ahead from earlier text and checked in one step; answers stay the same
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=64), help_heading = "Server")]
    pub draft: u32,
    /// Write pages of the cache that have to make room to a file in this folder, and bring them back instead of
    /// computing them again; off for none
    ///
    /// The file has no name, and is gone when the server ends. When the disk is full, that is told, and pages are
    /// computed again.
    #[arg(long, value_name = "FOLDER", default_value = "off", value_hint = ValueHint::DirPath, help_heading = "Server")]
    pub kv_spill: PathBuf,
    /// Most that the file of --kv-spill may take
    #[arg(long, value_name = "SIZE", default_value = "4GiB", value_parser = parse_bytes, help_heading = "Server")]
    pub kv_spill_size: Bytes,
    /// Seconds for which answers may go on after SIGTERM or Ctrl-C
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=86_400), help_heading = "Server")]
    pub drain: u64,
    /// What may be used.
    #[command(flatten)]
    pub resources: LanguageArguments,
}

fn parse_key(text: &str) -> Result<String, String> {
    if text.trim().is_empty() || text.chars().any(char::is_control) {
        return Err("expected a key of visible characters".to_owned());
    }
    Ok(text.trim().to_owned())
}

/// `lighter chat`
#[derive(Clone, Debug, Args)]
pub struct ChatArguments {
    /// The language model (.gguf)
    #[arg(value_name = "MODEL", value_hint = ValueHint::FilePath)]
    pub model: PathBuf,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Most tokens of an answer [default: what fits]
    #[arg(long, short = 'n', value_name = "N")]
    pub tokens: Option<usize>,
    /// How tokens are chosen.
    #[command(flatten)]
    pub sampler: SamplerArguments,
    /// What may be used.
    #[command(flatten)]
    pub resources: LanguageArguments,
}

/// `lighter lm …`
#[derive(Clone, Debug, Subcommand)]
pub enum LmCommand {
    /// Write a model with the shape of a known one and random weights
    Synth(LmSynthArguments),
}

/// `lighter lm synth`
///
/// The weights are random: what depends on shapes can be measured with such a file, such as memory, reads and speed,
/// and nothing that depends on what a model has learned, such as its text or which experts it prefers.
#[derive(Clone, Debug, Args)]
pub struct LmSynthArguments {
    /// The model whose shape it has; any other word lists those that are known
    #[arg(long, value_name = "NAME")]
    pub like: String,
    /// Where the file goes (.gguf)
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub output: PathBuf,
    /// Layers [default: as many as the model has]
    #[arg(long, value_name = "N", conflicts_with = "disk")]
    pub layers: Option<usize>,
    /// As many of the model's layers as fit into a file of this size, such as 6GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub disk: Option<Bytes>,
    /// Format of the matrices, such as F16, Q8_0, Q4_K or Q6_K
    #[arg(long, value_name = "FORMAT", default_value = "Q4_K")]
    pub format: BlockFormat,
    /// Tokens of the vocabulary [default: as many as the model has]
    #[arg(long, value_name = "N")]
    pub vocabulary: Option<usize>,
    /// The same structure at the size of a toy, for tests
    #[arg(long)]
    pub tiny: bool,
    /// Where the random numbers begin
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}
