//! The fields of a request's JSON object, taken out one by one, so that what is wrong or left over can be named.

use std::collections::BTreeMap;

use lightering_lm::{Grammar, Json, SamplerOptions};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use crate::refusal::Refusal;

/// Most tokens of which a request may change the bias.
const LOGIT_BIAS_MAX: usize = 1024;

/// Fields that say nothing about the answer.
const IGNORED: [&str; 9] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
    "prediction",
    "verbosity",
];

#[derive(Debug)]
pub(crate) struct Fields<'b> {
    fields: BTreeMap<String, &'b RawValue>,
}

/// One value, or a list of them.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

#[derive(Debug, Deserialize)]
struct ResponseFormat {
    #[serde(rename = "type")]
    kind: String,
    json_schema: Option<NamedSchema>,
}

#[derive(Debug, Deserialize)]
struct NamedSchema {
    schema: Option<Json>,
}

/// What requests for answers have in common.
#[derive(Debug)]
pub(crate) struct AnswerOptions {
    pub sampler: SamplerOptions,
    pub stop: Vec<String>,
    pub stream: bool,
    pub include_usage: bool,
    pub constraint: Option<Grammar>,
    pub ignore_end: bool,
    /// How many answers are wanted of each prompt.
    pub answers: usize,
}

/// Most answers to one prompt.
const ANSWERS_MAX: usize = 8;

impl<'b> Fields<'b> {
    pub fn parse(body: &'b [u8]) -> Result<Fields<'b>, Refusal> {
        let fields = serde_json::from_slice(body).map_err(|error| {
            Refusal::new(
                axum::http::StatusCode::BAD_REQUEST,
                format!("the body is no JSON object in UTF-8: {error}"),
            )
        })?;
        Ok(Fields { fields })
    }

    /// Takes a field; `null` counts as absent.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str, expected: &str) -> Result<Option<T>, Refusal> {
        let Some(raw) = self.fields.remove(name) else { return Ok(None) };
        serde_json::from_str::<Option<T>>(raw.get())
            .map_err(|error| Refusal::field(name, format!("`{name}`: {error}; expected {expected}")))
    }

    /// Takes a field that has to be there.
    pub fn need<T: DeserializeOwned>(&mut self, name: &str, expected: &str) -> Result<T, Refusal> {
        self.take(name, expected)?
            .ok_or_else(|| Refusal::field(name, format!("`{name}` is missing; expected {expected}")))
    }

    /// Refuses a field that is there and means something.
    pub fn refuse(&mut self, name: &str, harmless: &[&str]) -> Result<(), Refusal> {
        match self.fields.remove(name) {
            Some(raw) if raw.get() != "null" && !harmless.contains(&raw.get()) => {
                Err(Refusal::unsupported(name, &format!("`{name}` = {}", shortened(raw.get()))))
            }
            _ => Ok(()),
        }
    }

    /// Checks the name of the model.
    pub fn model(&mut self, id: &str) -> Result<(), Refusal> {
        let asked: Option<String> = self.take("model", "the name of the model")?;
        match asked {
            Some(asked) if !asked.is_empty() && asked != id => Err(Refusal {
                status: axum::http::StatusCode::NOT_FOUND,
                code: Some("model_not_found"),
                ..Refusal::field(
                    "model",
                    format!("the model {:?} does not exist; this server has {id:?}", shortened(&asked)),
                )
            }),
            _ => Ok(()),
        }
    }

    /// Takes what requests for answers have in common.
    pub fn answer_options(&mut self) -> Result<AnswerOptions, Refusal> {
        let answers: usize = self.take("n", "a whole number of at least 1")?.unwrap_or(1);
        if !(1..=ANSWERS_MAX).contains(&answers) {
            let message = format!("`n` is {answers}; expected 1 to {ANSWERS_MAX}");
            return Err(Refusal::field("n", message));
        }
        let mut sampler = SamplerOptions { seed: random(), ..SamplerOptions::default() };
        let mut number = |name: &str, value: &mut f32| -> Result<(), Refusal> {
            if let Some(given) = self.take(name, "a number")? {
                *value = given;
            }
            Ok(())
        };
        number("temperature", &mut sampler.temperature)?;
        number("top_p", &mut sampler.top_p)?;
        number("min_p", &mut sampler.min_p)?;
        number("typical_p", &mut sampler.typical_p)?;
        number("repetition_penalty", &mut sampler.repetition_penalty)?;
        number("frequency_penalty", &mut sampler.frequency_penalty)?;
        number("presence_penalty", &mut sampler.presence_penalty)?;
        if let Some(top_k) = self.take::<i64>("top_k", "a whole number")? {
            // Clients write 0 or -1 for "all".
            sampler.top_k = usize::try_from(top_k).unwrap_or(0);
        }
        if let Some(seed) = self.take::<i64>("seed", "a whole number")? {
            sampler.seed = seed.cast_unsigned();
        }
        let bias: Option<BTreeMap<String, f32>> =
            self.take("logit_bias", "an object of token ids and numbers")?;
        for (token, bias) in bias.unwrap_or_default() {
            let token = token.parse().map_err(|_| {
                let token = shortened(&token);
                Refusal::field(
                    "logit_bias",
                    format!("`logit_bias`: {token:?} is no token id; expected a number"),
                )
            })?;
            sampler.logit_bias.insert(token, bias);
        }
        if sampler.logit_bias.len() > LOGIT_BIAS_MAX {
            let found = sampler.logit_bias.len();
            let message = format!("`logit_bias` has {found} entries, and the limit is {LOGIT_BIAS_MAX}");
            return Err(Refusal::field("logit_bias", message));
        }
        let stop = match self.take("stop", "a string or a list of strings")? {
            None => Vec::new(),
            Some(OneOrMany::One(stop)) => vec![stop],
            Some(OneOrMany::Many(stops)) => stops,
        };
        let stream = self.take("stream", "true or false")?.unwrap_or(false);
        let stream_options: Option<StreamOptions> = self.take("stream_options", "an object")?;
        let format: Option<ResponseFormat> = self.take("response_format", "an object with a `type`")?;
        Ok(AnswerOptions {
            sampler,
            stop,
            stream,
            include_usage: stream_options.is_some_and(|options| options.include_usage),
            constraint: format.map(grammar).transpose()?.flatten(),
            answers,
            ignore_end: self.take("ignore_eos", "true or false")?.unwrap_or(false),
        })
    }

    /// Refuses what is left over and not known to be harmless.
    pub fn finish(self) -> Result<(), Refusal> {
        match self
            .fields
            .into_iter()
            .find(|(name, raw)| !IGNORED.contains(&name.as_str()) && raw.get() != "null")
        {
            None => Ok(()),
            Some((name, _)) => {
                let name = shortened(&name);
                let message = format!("`{name}` is not a field that this server knows; leave it out");
                Err(Refusal { code: Some("unknown_parameter"), ..Refusal::field(name, message) })
            }
        }
    }
}

fn grammar(format: ResponseFormat) -> Result<Option<Grammar>, Refusal> {
    let param = Some("response_format");
    let from = |error: lightering_lm::Error| Refusal::from_lm(&error, param);
    match format.kind.as_str() {
        "text" => Ok(None),
        "json_object" => Grammar::json_object().map(Some).map_err(from),
        "json_schema" => {
            let schema = format.json_schema.and_then(|named| named.schema).ok_or_else(|| {
                Refusal::field(
                    "response_format",
                    "`response_format.json_schema.schema` is missing; expected a JSON Schema",
                )
            })?;
            Grammar::from_json_schema(&schema).map(Some).map_err(from)
        }
        other => Err(Refusal::field(
            "response_format",
            format!(
                "`response_format.type` is {:?}; expected text, json_object or json_schema",
                shortened(other)
            ),
        )),
    }
}

/// The beginning of what a client wrote, for a message.
pub(crate) fn shortened(text: &str) -> String {
    let mut out: String = text.chars().take(80).collect();
    if out.len() < text.len() {
        out.push('…');
    }
    out
}

/// A number that nobody can foresee, from the seeds of the standard library's hash maps.
pub(crate) fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}
