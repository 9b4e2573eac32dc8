//! Training of language models.

use super::{Ending, Prepared};
use crate::arguments::TrainArguments;
use crate::container::Container;
use crate::failure::{Failure, Outcome};
use crate::text_input::read_text;
use lightering_lm::training::{
    ExportReport, Method, NewModel, TokenText, TrainingGraph, TrainingModel, train_byte_pairs, write_adapter,
    write_gguf,
};
use lightering_lm::{Error, MAX_TEXT_BYTES, Tokenizer};
use lightering_meter::MemoryPool;
use lightering_tier::{ByteSource, FileSource};
use lightering_train::{Split, Trainer};
use lightering_units::Bytes;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A language model under training.
pub(super) struct LanguageTraining {
    model: TrainingModel,
    graph: TrainingGraph,
}

/// Learning rates that are usual when none is given: of a new model, of adapters, and of weights that know something.
const USUAL_RATES: [f32; 3] = [1e-3, 2e-4, 2e-5];
/// The share of a text that is set aside where none is named.
const VALIDATION: f64 = 0.1;

/// Whether the model on the command line is a language model: a GGUF file, or `lm:` and a kind.
pub(super) fn is_one(model: &str) -> bool {
    let path = Path::new(model);
    model.starts_with("lm:")
        || path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
        || (path.is_file() && Container::of(path) == Container::Gguf)
}

/// Reads the text and the model, or thinks one up.
pub(super) fn prepare(arguments: &TrainArguments, pool: &MemoryPool) -> Outcome<Prepared> {
    let (learning, words) = (&arguments.learning, &arguments.language);
    let method: Method = arguments.learning.method.as_deref().unwrap_or("full").parse()?;
    let text = read_text(Some(&arguments.data), MAX_TEXT_BYTES as u64)?;
    let context = arguments.samples.context as usize;
    let (model, tokenizer, fresh) = if arguments.model.starts_with("lm:") {
        let shape: NewModel = arguments.model.parse()?;
        if method != Method::Full {
            return Err(Failure::input(
                format!("--method {method} of a model that knows nothing yet"),
                "--method full, or a GGUF file to start from",
            ));
        }
        let vocabulary = train_byte_pairs(&text, words.vocabulary_size as usize)?;
        let longest = words.model_context.map_or(context, |n| n as usize);
        let model = shape.describe(&vocabulary, longest.max(context))?;
        (model, Tokenizer::new(vocabulary)?, true)
    } else {
        let path = Path::new(&arguments.model);
        let source: Arc<dyn ByteSource> =
            Arc::new(FileSource::open(path).map_err(|e| Failure::from(e).context(arguments.model.clone()))?);
        let mut model = TrainingModel::open(source)?;
        model.set_router_losses(0.01, 0.001);
        let tokenizer = Tokenizer::from_gguf(&model.file().metadata)?;
        (model, tokenizer, false)
    };
    let tokens = tokenizer.encode(&text, false, true)?;
    drop(text);
    let vocabulary = model.parameters().vocabulary;
    if let Some(token) = tokens.iter().find(|t| **t as usize >= vocabulary) {
        return Err(Error::Invalid {
            place: arguments.model.clone(),
            what: format!("its tokenizer yields token {token}, its embeddings have {vocabulary} rows"),
            expected: "a tokenizer and weights of the same model".to_owned(),
        }
        .into());
    }
    let reserved = pool.reserve("tokens of the text", Bytes(4 * tokens.len() as u64))?;
    let count = tokens.len();
    let validation = arguments.samples.validation.unwrap_or(VALIDATION);
    let [train, held_back] = TokenText::split(tokens, context, validation, vocabulary)?;
    let graph = model.graph(learning.batch as usize, context, &method, learning.seed)?;
    let parameters = model.parameters();
    let kind = match &parameters.experts {
        Some(e) => format!("{} with {} experts, {} for a token", parameters.architecture, e.count, e.used),
        None => parameters.architecture.clone(),
    };
    let found = format!(
        "{}: {count} tokens of a vocabulary of {vocabulary}; {kind}, {} layers of width {}, {method}",
        arguments.data.display(),
        parameters.layers,
        parameters.width,
    );
    let rate = match (fresh, &method) {
        (true, _) => USUAL_RATES[0],
        (false, Method::Lora(_)) => USUAL_RATES[1],
        (false, _) => USUAL_RATES[2],
    };
    let split = Split { train: Arc::new(train), validation: Arc::new(held_back), test: None, found };
    Ok(Prepared {
        split,
        graph: graph.graph.clone(),
        sources: graph.sources.clone(),
        scheme: Some(graph.scheme.clone()),
        usual_rate: Some(rate),
        ending: Ending::Language(Box::new(LanguageTraining { model, graph })),
        _reserved: Some(reserved),
    })
}

impl LanguageTraining {
    /// What the trained model is called where nothing is said.
    pub fn name(model: &str) -> PathBuf {
        let stem = match model.strip_prefix("lm:") {
            Some(kind) => kind.split(':').next().unwrap_or("model").into(),
            None => Path::new(model).file_stem().unwrap_or_default().to_string_lossy(),
        };
        PathBuf::from(format!("{stem}-trained.gguf"))
    }

    /// Writes the model, and the adapters apart if that was asked for.
    pub fn export(
        &self,
        arguments: &TrainArguments,
        trainer: &Trainer,
        target: &Path,
    ) -> Outcome<ExportReport> {
        let words = &arguments.language;
        if let Some(path) = &words.adapter {
            write_adapter(&self.graph, trainer, path)?;
        }
        Ok(write_gguf(&self.model, &self.graph, trainer, words.format, target)?)
    }
}
