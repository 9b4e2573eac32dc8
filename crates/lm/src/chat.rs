//! Chat templates: how a conversation becomes the text that a model was trained to continue.
//!
//! Model files carry a template in the language of Jinja 2 with the environment of Hugging Face's
//! `apply_chat_template` (blocks trimmed, Python's methods on strings and dictionaries, `tojson` as Python writes it,
//! `raise_exception`, `strftime_now`); that is what is offered here.

mod clock;

use std::collections::BTreeMap;

use lightering_formats::gguf::Metadata;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Value};
use minijinja::{Environment, ErrorKind, State};
use serde::{Deserialize, Serialize};

use crate::json::{self, Json};
use crate::{Error, Result, Tokenizer};

/// The template that is used where a model file has none: ChatML.
pub const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + (message.content or '') + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// What a template may compute, in the engine's units (about one instruction or 64 bytes each).
const FUEL: u64 = 20_000_000;

/// The longest template that is accepted, in bytes.
pub const MAX_TEMPLATE_BYTES: usize = 1 << 20;

/// One message of a conversation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`, or what else the template knows.
    pub role: String,
    /// The text; absent where a message only calls tools.
    #[serde(default)]
    pub content: Option<String>,
    /// Whatever else the template looks at: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`.
    #[serde(flatten)]
    pub fields: BTreeMap<String, Json>,
}

impl Message {
    /// A message that is only text.
    #[must_use]
    pub fn new(role: &str, content: &str) -> Message {
        Message { role: role.to_owned(), content: Some(content.to_owned()), fields: BTreeMap::new() }
    }
}

/// A conversation and how to write it.
#[derive(Debug, Clone, Default)]
pub struct Conversation<'c> {
    /// The messages in order.
    pub messages: &'c [Message],
    /// Tools as in OpenAI's interface: a list of `{"type": "function", "function": {…}}`.
    pub tools: Option<&'c Json>,
    /// Ends the text where the model's answer begins.
    pub add_generation_prompt: bool,
    /// Further variables of the template (`enable_thinking` and the like).
    pub variables: BTreeMap<String, Json>,
    /// Keeps the messages' contents from becoming control tokens of this tokenizer ([`Tokenizer::guard`]), so that nobody
    /// can end a turn or speak as the system by writing so. The rendered text is then for this tokenizer only.
    pub guard: Option<&'c Tokenizer>,
    /// The time in seconds since 1970 (UTC) for templates that write the date; without it they have no `strftime_now`.
    pub now_unix_seconds: Option<i64>,
}

/// A template, ready to write conversations; it can be shared between threads.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Prepares the template of a model file, or [`CHATML`] where it has none.
    ///
    /// `bos` and `eos` are the texts of the model's tokens for the beginning and the end of a sequence (empty if none).
    ///
    /// # Errors
    /// [`Error::Template`] for a template with wrong syntax and [`Error::Limit`] for one beyond
    /// [`MAX_TEMPLATE_BYTES`].
    pub fn new(source: Option<&str>, bos: &str, eos: &str) -> Result<ChatTemplate> {
        let source = source.unwrap_or(CHATML);
        if source.len() > MAX_TEMPLATE_BYTES {
            let (found, limit) = (source.len() as u64, MAX_TEMPLATE_BYTES as u64);
            return Err(Error::limit("tokenizer.chat_template", "its size in bytes", found, limit));
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the usual delimiters are valid"));
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(100);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(methods);
        environment.add_filter("tojson", to_json);
        environment.add_filter("indent", indent);
        environment.add_function(
            "raise_exception",
            |message: String| -> std::result::Result<Value, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_template_owned(NAME, without_generation_tags(source)).map_err(template_error)?;
        Ok(ChatTemplate { environment, bos: bos.to_owned(), eos: eos.to_owned() })
    }

    /// The template of a GGUF file, with the tokens of its tokenizer; [`CHATML`] where it has none.
    ///
    /// # Errors
    /// Those of [`ChatTemplate::new`], and [`Error::Format`] for a template that is no text.
    pub fn from_gguf(metadata: &Metadata, tokenizer: &Tokenizer) -> Result<ChatTemplate> {
        let text = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id)).unwrap_or_default();
        let source = metadata.get_str("tokenizer.chat_template")?;
        ChatTemplate::new(source, text(tokenizer.bos()), text(tokenizer.eos()))
    }

    /// The text of a conversation. Encode it with `parse_special` on and `add_special` off if the template writes the
    /// beginning-of-sequence token itself.
    ///
    /// # Errors
    /// [`Error::Template`] when the template refuses the conversation (its own words are in the message), calls
    /// something unknown or computes too long.
    pub fn render(&self, conversation: &Conversation<'_>) -> Result<String> {
        match self.render_with(conversation, true) {
            Ok(text) => Ok(text),
            // Some templates want the arguments of a call as the text that the interface has, not as an object.
            Err(error) => self.render_with(conversation, false).map_err(|_| error),
        }
    }

    fn render_with(&self, conversation: &Conversation<'_>, parse_arguments: bool) -> Result<String> {
        let messages: Vec<Value> = conversation
            .messages
            .iter()
            .map(|message| {
                let content = match (&message.content, conversation.guard) {
                    (Some(text), Some(tokenizer)) => Value::from(tokenizer.guard(text)),
                    (content, _) => Value::from(content.as_deref()),
                };
                let mut fields = vec![
                    ("role".to_owned(), Value::from(message.role.as_str())),
                    ("content".to_owned(), content),
                ];
                for (name, value) in &message.fields {
                    let parse = parse_arguments && name == "tool_calls";
                    let value = if parse { value.with_parsed_arguments() } else { value.value().clone() };
                    fields.push((name.clone(), value));
                }
                Value::from_pairs(fields)
            })
            .collect();
        let mut context: BTreeMap<String, Value> = BTreeMap::new();
        for (name, value) in &conversation.variables {
            context.insert(name.clone(), value.value().clone());
        }
        if let Some(now) = conversation.now_unix_seconds {
            let strftime = move |format: String| {
                clock::strftime(&format, now).ok_or_else(|| {
                    minijinja::Error::new(ErrorKind::InvalidOperation, format!("date format {format:?}"))
                })
            };
            context.insert("strftime_now".to_owned(), Value::from_function(strftime));
        }
        if let Some(tools) = conversation.tools {
            context.insert("tools".to_owned(), tools.value().clone());
        }
        context.insert("messages".to_owned(), Value::from(messages));
        context.insert("add_generation_prompt".to_owned(), Value::from(conversation.add_generation_prompt));
        context.insert("bos_token".to_owned(), Value::from(self.bos.as_str()));
        context.insert("eos_token".to_owned(), Value::from(self.eos.as_str()));
        let template = self.environment.get_template(NAME).map_err(template_error)?;
        template.render(Value::from(context)).map_err(template_error)
    }
}

fn template_error(error: minijinja::Error) -> Error {
    let what = match error.detail() {
        Some(detail) if error.kind() == ErrorKind::InvalidOperation => detail.to_owned(),
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    Error::Template { line: error.line().unwrap_or(0), what }
}

/// Turns the tags with which training code marks the assistant's words into blocks that always apply.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        rest = tag;
        let body = tag.trim_start_matches(['-', '+']).trim_start();
        for (name, replacement) in [("generation", "if true"), ("endgeneration", "endif")] {
            if let Some(tail) = body.strip_prefix(name)
                && let end = tail.trim_start().trim_start_matches(['-', '+'])
                && end.starts_with("%}")
            {
                out.push_str(&tag[..tag.len() - body.len()]);
                out.push_str(replacement);
                rest = tail;
            }
        }
    }
    out.push_str(rest);
    out
}

/// Python's methods that templates call.
fn methods(
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> std::result::Result<Value, minijinja::Error> {
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, arguments)
}

/// `json.dumps` as Hugging Face's environment calls it.
fn to_json(
    value: Value,
    _positional: Rest<Value>,
    options: Kwargs,
) -> std::result::Result<Value, minijinja::Error> {
    let indent: Option<Value> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let sorted: Option<bool> = options.get("sort_keys")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;
    let indent = match indent {
        Some(value) if !value.is_none() && !value.is_undefined() => Some(usize::try_from(value)?.min(16)),
        _ => None,
    };
    let style = json::Style::new(indent, separators, ascii.unwrap_or(false), sorted.unwrap_or(false));
    json::write(&value, &style).map(Value::from)
}

/// Jinja 2's `indent`, which keeps a final line break.
fn indent(
    text: String,
    width: Option<Value>,
    options: Kwargs,
) -> std::result::Result<Value, minijinja::Error> {
    let width: Option<Value> = width.or(options.get("width")?);
    let first: Option<bool> = options.get("first")?;
    let blank: Option<bool> = options.get("blank")?;
    options.assert_all_used()?;
    let indention = match width {
        None => "    ".to_owned(),
        Some(width) => match width.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(width)?.min(256)),
        },
    };
    let mut out = String::with_capacity(text.len());
    for (index, line) in text.split('\n').enumerate() {
        if index > 0 {
            out.push('\n');
        }
        let wanted =
            if index == 0 { first.unwrap_or(false) } else { blank.unwrap_or(false) || !line.is_empty() };
        if wanted {
            out.push_str(&indention);
        }
        out.push_str(line);
    }
    Ok(Value::from(out))
}
