//! `lighter tokenize`

use crate::arguments::TokenizeArguments;
use crate::container::{self, Container};
use crate::failure::{Exit, Failure, Outcome};
use crate::output::{Output, Table};
use crate::text_input::read_text;
use lightering_formats::gguf::Metadata;
use lightering_lm::{ChatTemplate, Conversation, Json, MAX_TEXT_BYTES, Message, TokenKind, Tokenizer};
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// The longest file of messages.
const MESSAGES_MAX_BYTES: u64 = 64 << 20;

/// `--json`
#[derive(Debug, Serialize)]
struct TokenizeReport<'t> {
    schema: &'static str,
    model: String,
    tokens: usize,
    ids: &'t [u32],
    pieces: Vec<Piece>,
    /// What was decoded, or the conversation as the chat template wrote it.
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'t str>,
}

#[derive(Debug, Serialize)]
struct Piece {
    id: u32,
    /// What the token adds to a text; null where that is only a part of a character.
    text: Option<String>,
    /// The bytes where there is no text.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<Vec<u8>>,
    kind: &'static str,
}

/// The messages of `--chat`: a list, or a request as in OpenAI's interface, of which the tools count as well.
#[derive(Debug, Default, Deserialize)]
struct Request {
    messages: Vec<Message>,
    #[serde(default)]
    tools: Option<Json>,
}

/// Turns text into tokens or tokens into text.
pub fn run(arguments: &TokenizeArguments, output: Output) -> Outcome {
    let path = arguments.model.as_path();
    let place = path.display();
    let kind = Container::of(path);
    if kind != Container::Gguf && path.is_file() {
        return Err(Failure::input(
            format!("{place}: is no GGUF file; expected a language model with its tokenizer (.gguf)"),
            format!("lighter inspect {place}, which tells what it is"),
        ));
    }
    let metadata = container::read_gguf(path)?.metadata;
    let tokenizer = Tokenizer::from_gguf(&metadata).map_err(|error| {
        Failure::from(error)
            .context(format!("{place}: preparing its tokenizer"))
            .or_hint(format!("lighter inspect {place}, which lists what the file says about it"))
    })?;
    let mut text = None;
    let ids = if let Some(ids) = &arguments.decode {
        text = Some(tokenizer.decode(&ids.0).map_err(|error| {
            let last = tokenizer.token_count().saturating_sub(1);
            Failure::from(error).context("decoding").or_hint(format!("ids from 0 to {last}"))
        })?);
        ids.0.clone()
    } else if let Some(file) = &arguments.chat {
        let (ids, rendered) = chat(arguments, output, file, &metadata, &tokenizer)?;
        text = Some(rendered);
        ids
    } else {
        let given;
        let given = match (&arguments.text, &arguments.file) {
            (Some(text), _) => text.as_str(),
            (None, file) => {
                given = read_text(file.as_deref(), MAX_TEXT_BYTES as u64)?;
                given.as_str()
            }
        };
        tokenizer
            .encode(given, !arguments.no_special, arguments.parse_special)
            .map_err(|error| Failure::from(error).context("tokenizing"))?
    };
    write(arguments, output, &tokenizer, &ids, text.as_deref())?;
    if !output.json && !output.quiet {
        // Nothing depends on this line, so that it does not matter where stderr goes.
        let _ = writeln!(io::stderr(), "{} tokens", ids.len());
    }
    Ok(Exit::Done)
}

/// The conversation in `file` as the model's template writes it, in tokens and as text.
fn chat(
    arguments: &TokenizeArguments,
    output: Output,
    file: &Path,
    metadata: &Metadata,
    tokenizer: &Tokenizer,
) -> Outcome<(Vec<u32>, String)> {
    let text = read_text(Some(file), MESSAGES_MAX_BYTES)?;
    let place = file.display();
    let request = if text.trim_start().starts_with('[') {
        serde_json::from_str(&text).map(|messages| Request { messages, tools: None })
    } else {
        serde_json::from_str(&text)
    };
    let request = request.map_err(|error| {
        Failure::input(
            format!("{place}: {error}; expected a list of messages with role and content"),
            r#"[{"role": "user", "content": "Hello"}]"#,
        )
    })?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok();
    if metadata.get("tokenizer.chat_template").is_none() && !output.quiet {
        let model = arguments.model.display();
        // A note that cannot be written is no reason to stop.
        let _ = writeln!(io::stderr(), "note: {model} has no chat template; ChatML is used");
    }
    let template = ChatTemplate::from_gguf(metadata, tokenizer)?;
    let conversation = Conversation {
        messages: &request.messages,
        tools: request.tools.as_ref(),
        add_generation_prompt: !arguments.no_generation_prompt,
        guard: Some(tokenizer),
        now_unix_seconds: now.and_then(|now| i64::try_from(now.as_secs()).ok()),
        ..Conversation::default()
    };
    let hint = "messages as this model's template wants them: often user and assistant in turns";
    let rendered = template.render(&conversation).map_err(|error| {
        Failure::from(error).context(format!("{place}: writing it as a prompt")).or_hint(hint)
    })?;
    let ids = match arguments.no_special {
        true => tokenizer.encode(&rendered, false, true),
        false => tokenizer.encode_rendered(&rendered),
    };
    let ids = ids.map_err(|error| Failure::from(error).context("tokenizing"))?;
    // The marks of the guard are for the tokenizer only.
    Ok((ids, rendered.replace('\u{fdd0}', "")))
}

fn write(
    arguments: &TokenizeArguments,
    output: Output,
    tokenizer: &Tokenizer,
    ids: &[u32],
    text: Option<&str>,
) -> Outcome<()> {
    let mut plain = String::new();
    if arguments.pieces && !output.json {
        if let Some(text) = text {
            plain.push_str(text);
            plain.push_str("\n\n");
        }
        let mut table = Table::new(&[">id", "piece", "kind"]);
        for piece in ids.iter().map(|id| piece(tokenizer, *id)) {
            let kind = if piece.kind == "normal" { "" } else { piece.kind };
            table.row([piece.id.to_string(), quoted(&piece), kind.to_owned()]);
        }
        plain.push_str(&table.text());
    } else if let (Some(text), true) = (text, arguments.decode.is_some()) {
        plain.push_str(text);
        plain.push('\n');
    } else if !output.json {
        let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
        plain = ids.join(" ");
        plain.push('\n');
    }
    let pieces = if output.json { ids.iter().map(|id| piece(tokenizer, *id)).collect() } else { Vec::new() };
    let report = TokenizeReport {
        schema: "lightering.tokenize/1",
        model: arguments.model.display().to_string(),
        tokens: ids.len(),
        ids,
        pieces,
        text,
    };
    output.result(&report, &plain)
}

fn piece(tokenizer: &Tokenizer, id: u32) -> Piece {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    let text = std::str::from_utf8(bytes).ok().map(str::to_owned);
    let bytes = if text.is_none() { Some(bytes.to_vec()) } else { None };
    let kind = match tokenizer.token_kind(id) {
        Some(TokenKind::Unknown) => "unknown",
        Some(TokenKind::Control) => "control",
        Some(TokenKind::UserDefined) => "user-defined",
        Some(TokenKind::Unused) => "unused",
        Some(TokenKind::Byte) => "byte",
        _ => "normal",
    };
    Piece { id, text, bytes, kind }
}

/// A piece as a literal, so that spaces and control characters are seen.
fn quoted(piece: &Piece) -> String {
    match (&piece.text, &piece.bytes) {
        (Some(text), _) => format!("{text:?}"),
        (None, Some(bytes)) => format!("b\"{}\"", bytes.escape_ascii()),
        (None, None) => String::new(),
    }
}
