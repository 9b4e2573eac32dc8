use minijinja::value::{Value, ValueKind};
use minijinja::{Error as TemplateError, ErrorKind};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A JSON value whose objects keep the order in which they were written, since templates write them out again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Json(Value);

impl Json {
    /// Reads a JSON text.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a text that is no JSON.
    pub fn from_text(text: &str) -> Result<Json> {
        serde_json::from_str(text).map_err(|e| Error::invalid("JSON", e, "a JSON value"))
    }

    pub(crate) fn value(&self) -> &Value {
        &self.0
    }

    /// A list of tool calls in which arguments that are written as JSON text are objects.
    pub(crate) fn with_parsed_arguments(&self) -> Value {
        let parsed = |arguments: &Value| -> Option<Value> {
            let object: Value = serde_json::from_str(arguments.as_str()?).ok()?;
            (object.kind() == ValueKind::Map).then_some(object)
        };
        let replace = |map: &Value, key: &str, to: Value| -> Option<Value> {
            let mut fields = Vec::new();
            for name in map.try_iter().ok()? {
                let value = if name.as_str() == Some(key) { to.clone() } else { map.get_item(&name).ok()? };
                fields.push((name, value));
            }
            Some(Value::from_pairs(fields))
        };
        let call = |call: &Value| -> Option<Value> {
            let function = call.get_attr("function").ok()?;
            let arguments = parsed(&function.get_attr("arguments").ok()?)?;
            replace(call, "function", replace(&function, "arguments", arguments)?)
        };
        match self.0.try_iter() {
            Ok(calls) if self.0.kind() == ValueKind::Seq => calls.map(|c| call(&c).unwrap_or(c)).collect(),
            _ => self.0.clone(),
        }
    }
}

/// How `json.dumps` writes.
pub(crate) struct Style {
    indent: Option<usize>,
    item: String,
    key: String,
    ascii: bool,
    sorted: bool,
}

impl Style {
    pub fn new(indent: Option<usize>, separators: Option<Vec<String>>, ascii: bool, sorted: bool) -> Style {
        let usual = [if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()];
        let separators = separators.and_then(|s| <[String; 2]>::try_from(s).ok()).unwrap_or(usual);
        let [item, key] = separators;
        Style { indent, item, key, ascii, sorted }
    }

    fn line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }
}

/// Deeper values than this are refused.
const DEPTH_MAX: usize = 100;

/// Writes a value as JSON.
pub(crate) fn write(value: &Value, style: &Style) -> std::result::Result<String, TemplateError> {
    let mut out = String::new();
    write_value(value, style, 0, &mut out)?;
    Ok(out)
}

fn refuse(what: impl std::fmt::Display) -> TemplateError {
    TemplateError::new(ErrorKind::BadSerialization, format!("{what} cannot be written as JSON"))
}

fn write_value(
    value: &Value,
    style: &Style,
    depth: usize,
    out: &mut String,
) -> std::result::Result<(), TemplateError> {
    if depth > DEPTH_MAX {
        return Err(refuse(format!("a value nested deeper than {DEPTH_MAX}")));
    }
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&value.to_string()),
        ValueKind::String => write_string(value.as_str().unwrap_or_default(), style, out),
        ValueKind::Seq | ValueKind::Iterable => {
            let mut empty = true;
            out.push('[');
            for item in value.try_iter()? {
                if !std::mem::take(&mut empty) {
                    out.push_str(&style.item);
                }
                style.line(depth + 1, out);
                write_value(&item, style, depth + 1, out)?;
            }
            if !empty {
                style.line(depth, out);
            }
            out.push(']');
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sorted {
                keys.sort();
            }
            out.push('{');
            for (index, key) in keys.iter().enumerate() {
                if index > 0 {
                    out.push_str(&style.item);
                }
                style.line(depth + 1, out);
                write_string(&key.to_string(), style, out);
                out.push_str(&style.key);
                write_value(&value.get_item(key)?, style, depth + 1, out)?;
            }
            if !keys.is_empty() {
                style.line(depth, out);
            }
            out.push('}');
        }
        kind => return Err(refuse(kind)),
    }
    Ok(())
}

fn write_string(text: &str, style: &Style, out: &mut String) {
    let quoted = serde_json::Value::from(text).to_string();
    if !style.ascii {
        return out.push_str(&quoted);
    }
    for character in quoted.chars() {
        if character.is_ascii() {
            out.push(character);
        } else {
            let mut units = [0; 2];
            for unit in character.encode_utf16(&mut units) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
}
