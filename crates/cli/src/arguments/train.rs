use super::ResourceArguments;
use clap::{Args, ValueHint};
use lightering_units::BlockFormat;
use std::path::PathBuf;

/// `lighter train`
#[derive(Clone, Debug, Args)]
pub struct TrainArguments {
    /// The model (.onnx), trained or with first weights; or the name of one to start from nothing: cnn, mlp, resnet18,
    /// mobilenetv2, transformer, lstm
    #[arg(value_name = "MODEL", value_hint = ValueHint::FilePath)]
    pub model: String,
    /// What to learn from: a folder of pictures by class, IDX or CIFAR files, a table, text, sounds, or arrays
    #[arg(long, short, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    pub data: PathBuf,
    /// File for the trained model [default: MODEL-trained.onnx]
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub output: Option<PathBuf>,
    /// How it learns.
    #[command(flatten)]
    pub learning: LearningArguments,
    /// What the data looks like to the model.
    #[command(flatten)]
    pub samples: SampleArguments,
    /// What is particular to language models.
    #[command(flatten)]
    pub language: LanguageArguments,
    /// What may be used.
    #[command(flatten)]
    pub resources: ResourceArguments,
    /// Folder on a disk where tensors may wait that do not fit into the budget
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "Budget and machine")]
    pub spill: Option<PathBuf>,
    /// Keep what is needed to go on in this folder, after every epoch
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "Checkpoints and reports")]
    pub checkpoints: Option<PathBuf>,
    /// Also after so many steps
    #[arg(long, value_name = "N", requires = "checkpoints", help_heading = "Checkpoints and reports")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub checkpoint_every: Option<u64>,
    /// Go on where the newest good checkpoint stands
    #[arg(long, requires = "checkpoints", help_heading = "Checkpoints and reports")]
    pub resume: bool,
    /// Stop when the validation loss has not fallen for so many epochs
    #[arg(long, value_name = "EPOCHS", help_heading = "Learning")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub patience: Option<u64>,
    /// Draw loss, accuracy, rate, speed and memory into this page while it goes on
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Checkpoints and reports")]
    pub report: Option<PathBuf>,
    /// Write event files for TensorBoard into this folder
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "Checkpoints and reports")]
    pub events: Option<PathBuf>,
    /// Only plan: print what a step takes and what a budget makes of it
    #[arg(long)]
    pub plan: bool,
    /// Draw the plan's timeline into this file
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub svg: Option<PathBuf>,
    /// Print the time of every node, summed over the steps
    #[arg(long)]
    pub profile: bool,
}

/// How it learns.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Learning")]
pub struct LearningArguments {
    /// Passes over the data
    #[arg(long, value_name = "N", default_value = "5", value_parser = clap::value_parser!(u64).range(1..))]
    pub epochs: u64,
    /// Stop after so many steps
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: Option<u64>,
    /// Samples of a step
    #[arg(long, short, value_name = "N", default_value = "32", value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: u32,
    /// sgd, adam, adamw, adam8 or lion, with settings such as sgd:momentum=0.9,decay=5e-4
    #[arg(long, value_name = "NAME", default_value = "adamw")]
    pub optimizer: String,
    /// Learning rate, or how it changes: 0.1, cosine:0.1,warmup=5%, onecycle:0.1, step:0.1,every=1000 [default: cosine
    /// from a rate that is usual for the optimizer, with 5 % warm-up]
    #[arg(long, value_name = "RATE")]
    pub lr: Option<String>,
    /// crossentropy, focal, bce, mse, l1, huber, with settings such as crossentropy:smoothing=0.1
    #[arg(long, value_name = "NAME", default_value = "crossentropy")]
    pub loss: String,
    /// Largest norm of all gradients together
    #[arg(long, value_name = "NORM")]
    pub clip: Option<f32>,
    /// What learns: full, last:K, bias, bias:K, head, norm, sparse:auto, sparse:preset, sparse:FILE.json, mobiletl:K or
    /// mobiletl:auto; of a language model full, last:K (layers) or lora, such as
    /// lora:rank=8,alpha=16,matrices=attention,layers=4 [default: full; for tune the richest that fits the memory]
    #[arg(long, value_name = "METHOD")]
    pub method: Option<String>,
    /// Measure by short runs what sparse:auto chooses from, instead of foreseeing it from gradients
    #[arg(long)]
    pub search: bool,
    /// Write the scheme that sparse:auto found into this file
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub write_scheme: Option<PathBuf>,
    /// Derivative of activations inside of the blocks of mobiletl: gt0, relu6-exact, hs-1.5 or exact
    #[arg(long, value_name = "MASK", default_value = "gt0")]
    pub act_mask: String,
    /// Squeeze and excitation inside of the blocks of mobiletl
    #[arg(long, value_name = "WHAT", default_value = "train", value_parser = ["train", "freeze"])]
    pub se: String,
    /// Set by `lighter tune`.
    #[arg(skip)]
    pub tune: bool,
    /// Keep the statistics of batch normalisations as they are
    #[arg(long)]
    pub freeze_statistics: bool,
    /// Decides first weights, orders and random changes
    #[arg(long, value_name = "N", default_value = "0")]
    pub seed: u64,
}

/// What is particular to language models.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Language models")]
pub struct LanguageArguments {
    /// Tokens of a new model's vocabulary, which is learned from the text
    #[arg(long, value_name = "N", default_value = "2048", value_parser = clap::value_parser!(u32).range(258..=65536))]
    pub vocabulary_size: u32,
    /// Longest text of a new model, in tokens [default: --context]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    pub model_context: Option<u32>,
    /// Format of the trained matrices, such as F16, Q8_0 or Q4_K [default: that of the file, F16 for a new model]
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<BlockFormat>,
    /// Also write the adapters of --method lora alone into this file (.safetensors)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub adapter: Option<PathBuf>,
}

/// What the data looks like to the model.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Data")]
pub struct SampleArguments {
    /// Width and height that pictures are scaled to [default: as the model has it]
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(1..=8192))]
    pub size: Option<u32>,
    /// Tokens of a window of text
    #[arg(long, value_name = "N", default_value = "128", value_parser = clap::value_parser!(u32).range(2..))]
    pub context: u32,
    /// Column of a table that holds the labels
    #[arg(long, value_name = "NAME", default_value = "label")]
    pub label: String,
    /// Share of the training data that is set aside for validation [default: the test part, else a tenth]
    #[arg(long, value_name = "SHARE")]
    pub validation: Option<f64>,
    /// What is done to numbers before the model sees them: measured (mean 0 and deviation 1 over the training data) or none
    #[arg(long, value_name = "HOW", default_value = "measured", value_parser = ["measured", "none"])]
    pub normalise: String,
    /// What a token of a plain text is: characters of the training text, or bytes
    #[arg(long, value_name = "WHAT", default_value = "characters", value_parser = ["characters", "bytes"])]
    pub vocabulary: String,
    /// The label column of a table is a number to foretell, not a class
    #[arg(long)]
    pub regression: bool,
    /// Random changes of pictures, such as flip,crop=4,jitter=0.2
    #[arg(long, value_name = "CHANGES")]
    pub augment: Option<String>,
    /// Mixtures of samples, such as mixup=0.2 or cutmix=1
    #[arg(long, value_name = "MIXTURE")]
    pub mix: Option<String>,
}
