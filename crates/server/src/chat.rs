//! `/v1/chat/completions`

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use lightering_lm::{Conversation, GenerationRequest, Json, MAX_LOGPROBS, Message};
use serde::Deserialize;

use crate::answer::{Choice, Flavour, Head};
use crate::completions::submit;
use crate::fields::{Fields, shortened};
use crate::refusal::Refusal;
use crate::state::Shared;

/// Most messages of a conversation.
const MESSAGES_MAX: usize = 4096;

#[derive(Debug, Deserialize)]
struct WireMessage {
    role: String,
    #[serde(default)]
    content: Option<Content>,
    #[serde(flatten)]
    fields: BTreeMap<String, Json>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    text: Option<String>,
}

fn message(index: usize, wire: WireMessage) -> Result<Message, Refusal> {
    let content = match wire.content {
        None => None,
        Some(Content::Text(text)) => Some(text),
        Some(Content::Parts(parts)) => {
            let mut text = String::new();
            for part in parts {
                match (part.kind.as_str(), part.text) {
                    ("text", Some(part)) => text.push_str(&part),
                    (kind, _) => {
                        let place = format!("messages[{index}].content");
                        let kind = shortened(kind);
                        let message = format!("`{place}` has a part of type {kind:?}; expected text only");
                        return Err(Refusal::field(place, message));
                    }
                }
            }
            Some(text)
        }
    };
    Ok(Message { role: wire.role, content, fields: wire.fields })
}

/// The names of the tools that a client offers.
fn tool_names(tools: &Json) -> Vec<String> {
    #[derive(Deserialize)]
    struct Tool {
        function: Option<Function>,
    }
    #[derive(Deserialize)]
    struct Function {
        name: String,
    }
    // Templates take tools of any form; those of another one cannot be called.
    let tools = serde_json::to_value(tools).unwrap_or_default();
    let tools = tools.as_array().cloned().unwrap_or_default();
    let tools = tools.into_iter().filter_map(|tool| serde_json::from_value::<Tool>(tool).ok());
    tools.filter_map(|tool| Some(tool.function?.name)).collect()
}

/// Understands a request and submits it.
pub(crate) fn prepare(shared: &Shared, body: &[u8]) -> Result<(Vec<Choice>, Head), Refusal> {
    let mut fields = Fields::parse(body)?;
    fields.model(&shared.options.model_id)?;
    let options = fields.answer_options()?;
    let wire: Vec<WireMessage> = fields.need("messages", "a list of objects with role and content")?;
    if wire.is_empty() || wire.len() > MESSAGES_MAX {
        let found = wire.len();
        return Err(Refusal::field(
            "messages",
            format!("`messages` has {found} entries; expected 1 to {MESSAGES_MAX}"),
        ));
    }
    let messages: Vec<Message> =
        wire.into_iter().enumerate().map(|(index, wire)| message(index, wire)).collect::<Result<_, _>>()?;
    let max_tokens = fields.take("max_tokens", "a whole number of at least 1")?;
    let max_tokens = fields.take("max_completion_tokens", "a whole number of at least 1")?.or(max_tokens);
    let wants_logprobs = fields.take("logprobs", "true or false")?.unwrap_or(false);
    let top: Option<usize> = fields.take("top_logprobs", "a whole number from 0 to 20")?;
    if top.is_some() && !wants_logprobs {
        return Err(Refusal::field(
            "top_logprobs",
            "`top_logprobs` is given; expected `logprobs` to be true then",
        ));
    }
    if let Some(count) = top.filter(|count| *count > MAX_LOGPROBS) {
        return Err(Refusal::field(
            "top_logprobs",
            format!("`top_logprobs` is {count}; expected 0 to {MAX_LOGPROBS}"),
        ));
    }
    let mut tools: Option<Json> = fields.take("tools", "a list of tools")?;
    let choice: Option<serde_json::Value> = fields.take("tool_choice", "auto or none")?;
    match choice.as_ref().map(serde_json::Value::as_str) {
        None | Some(Some("auto")) => {}
        Some(Some("none")) => tools = None,
        Some(_) => return Err(Refusal::unsupported("tool_choice", "a tool that has to be called")),
    }
    let variables = fields.take("chat_template_kwargs", "an object")?.unwrap_or_default();
    fields.refuse("functions", &["[]"])?;
    fields.refuse("function_call", &["\"none\""])?;
    fields.refuse("audio", &[])?;
    fields.refuse("modalities", &["[\"text\"]"])?;
    fields.refuse("web_search_options", &[])?;
    fields.refuse("reasoning_effort", &[])?;
    fields.finish()?;

    let tokenizer = shared.scheduler.tokenizer();
    let conversation = Conversation {
        messages: &messages,
        tools: tools.as_ref(),
        add_generation_prompt: true,
        variables,
        guard: Some(tokenizer),
        now_unix_seconds: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .ok()
            .and_then(|now| i64::try_from(now.as_secs()).ok()),
    };
    let from = |error: lightering_lm::Error| Refusal::from_lm(&error, Some("messages"));
    let rendered = shared.template.render(&conversation).map_err(from)?;
    let prompt = tokenizer.encode_rendered(&rendered).map_err(from)?;
    let request = GenerationRequest {
        prompt,
        max_tokens,
        sampler: options.sampler,
        stop: options.stop,
        constraint: options.constraint,
        logprobs: wants_logprobs.then(|| top.unwrap_or(0)),
        prompt_logprobs: None,
        ignore_end: options.ignore_end,
        draft_len_max: None,
    };
    let names = tools.as_ref().map(tool_names);
    let choices = submit(shared, &request, options.answers, 0)?
        .into_iter()
        .map(|choice| choice.with_tools(names.clone()))
        .collect();
    let head = Head::new(shared, Flavour::Chat, options.stream, options.include_usage, wants_logprobs);
    Ok((choices, head))
}
