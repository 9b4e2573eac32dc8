//! Language models: tokenizers, chat templates, samplers, constrained output, the scheduler.
//!
//! ```
//! use lightering_lm::{Tokenizer, VocabularyData};
//! // A vocabulary of single bytes and one merge, in the byte alphabet of GPT-2.
//! let mut tokens: Vec<String> = (b'!'..=b'~').map(|b| char::from(b).to_string()).collect();
//! tokens.extend((0xa1..=0xac).chain(0xae..=0xff).chain(0x100..0x144).map(|c| char::from_u32(c).unwrap().to_string()));
//! tokens.push("hi".into());
//! let data = VocabularyData { model: "gpt2".into(), pre: "gpt-2".into(), tokens, merges: vec!["h i".into()],
//!     ..VocabularyData::default() };
//! let tokenizer = Tokenizer::new(data).unwrap();
//! let ids = tokenizer.encode("hi!", false, false).unwrap();
//! assert_eq!(ids, [256, 0]);
//! assert_eq!(tokenizer.decode(&ids).unwrap(), "hi!");
//! ```
//!
//! Invariants: vocabularies and templates come out of other people's files, so whatever is wrong with them is an
//! [`Error`] and never a panic; text that a user wrote never turns into a control token unless the caller asks for it;
//! no module knows of terminals or sockets. The floors are in the repository's ARCHITECTURE.md.
#![forbid(unsafe_code)]

mod architecture;
mod chat;
mod constraint;
mod convert;
mod error;
mod json;
mod language_model;
mod model;
mod sampler;
mod scheduler;
mod status;
mod synthetic;
mod tokenizer;
pub mod training;

pub use architecture::{CacheOptions, CompressedParameters, ExpertParameters, HyperParameters, build, ports};
pub use chat::{CHATML, ChatTemplate, Conversation, MAX_TEMPLATE_BYTES, Message};
pub use constraint::{Constraint, Grammar, TokenTable};
pub use convert::{
    CheckpointFiles, Conversion, ConversionOptions, ConversionReport, ConvertedFormat, ParseRecipeError,
    Recipe,
};
pub use error::{Error, Result};
pub use json::Json;
pub use language_model::{Decoder, DecoderOptions, LanguageModel};
pub use model::{PageKind, Row, SoleSequence, StepReport, TokenModel, WindowCache};
pub use sampler::{
    Candidate, Mirostat, Sampler, SamplerOptions, TokenLogProbability, log_probability, top_log_probabilities,
};
pub use scheduler::{
    Counters, Done, Event, Events, FinishReason, GeneratedToken, GenerationRequest, LatencyHistogram,
    MAX_LOGPROBS, MAX_STOP_BYTES, MAX_STOPS, ModelLimits, Scheduler, SchedulerOptions, SchedulerState,
    SpillFile, SpillStore, SpillWarning, Timings, Usage,
};
pub use status::{ExpertResidency, ModelStatus};
pub use synthetic::{SyntheticModel, SyntheticOptions, synthetic_names, write_synthetic};
pub use tokenizer::{MAX_TEXT_BYTES, MAX_TOKENS, StreamDecoder, TokenKind, Tokenizer, VocabularyData};
