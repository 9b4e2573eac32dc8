//! Calls of tools in the text that a model writes: `<tool_call>{…}</tool_call>`, or JSON and nothing else.

use serde::Deserialize;
use serde_json::value::RawValue;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// A call of a tool that the client offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Call {
    pub name: String,
    /// The text of a JSON object.
    pub arguments: String,
}

/// What a text turns out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece {
    Text(String),
    Call(Call),
}

/// Finds calls in a text that arrives bit by bit. What may still become one is held back.
#[derive(Debug)]
pub(crate) struct CallFinder {
    /// Names of the tools that were offered; whatever calls another one stays text.
    names: Vec<String>,
    held: String,
    /// Nothing but whitespace came so far.
    at_start: bool,
    calls: usize,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireCall<'t> {
    name: String,
    #[serde(borrow)]
    arguments: Option<&'t RawValue>,
    #[serde(borrow)]
    parameters: Option<&'t RawValue>,
}

impl CallFinder {
    pub fn new(names: Vec<String>) -> CallFinder {
        CallFinder { names, held: String::new(), at_start: true, calls: 0 }
    }

    /// Takes more text and gives what is certain.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        let mut pieces = Vec::new();
        loop {
            let trimmed = self.held.trim_start();
            if self.at_start && (trimmed.is_empty() || trimmed.starts_with(['{', '['])) {
                // Only the end tells whether this is a call.
                return pieces;
            }
            let Some(open) = self.held.find(OPEN) else { break };
            let Some(close) = self.held[open..].find(CLOSE).map(|at| open + at) else {
                self.say(open, &mut pieces);
                return pieces;
            };
            let calls = self.calls_in(&self.held[open + OPEN.len()..close]);
            if let Some(calls) = calls {
                self.say(open, &mut pieces);
                // What is left before the tag is whitespace.
                let tag = self.held.find(OPEN).unwrap_or(0);
                self.held.drain(..tag + (close - open) + CLOSE.len());
                self.at_start = false;
                self.calls += calls.len();
                pieces.extend(calls.into_iter().map(Piece::Call));
            } else {
                let all = self.held.drain(..close + CLOSE.len()).collect();
                self.at_start = false;
                pieces.push(Piece::Text(all));
            }
        }
        let end = self.held.len();
        let begun = (1..OPEN.len()).rev().find(|&n| self.held.ends_with(&OPEN[..n])).unwrap_or(0);
        self.say(end - begun, &mut pieces);
        pieces
    }

    /// The rest.
    pub fn finish(&mut self) -> Vec<Piece> {
        let held = std::mem::take(&mut self.held);
        let inside = match held.trim_start().strip_prefix(OPEN) {
            Some(inside) => Some(inside),
            None => self.at_start.then_some(held.as_str()),
        };
        if let Some(calls) = inside.and_then(|inside| self.calls_in(inside)) {
            self.calls += calls.len();
            return calls.into_iter().map(Piece::Call).collect();
        }
        // Whitespace behind calls says nothing.
        let silent = held.is_empty() || (self.calls > 0 && held.trim().is_empty());
        if silent { Vec::new() } else { vec![Piece::Text(held)] }
    }

    /// Gives the first `end` bytes of what is held, without the whitespace behind them, which may stand before a call.
    fn say(&mut self, end: usize, pieces: &mut Vec<Piece>) {
        let certain = self.held[..end].trim_end().len();
        if certain > 0 {
            let text: String = self.held.drain(..certain).collect();
            self.at_start = false;
            pieces.push(Piece::Text(text));
        }
    }

    /// The calls that a JSON text is.
    fn calls_in(&self, text: &str) -> Option<Vec<Call>> {
        let text = text.trim();
        let wire: Vec<WireCall<'_>> = match text.starts_with('[') {
            true => serde_json::from_str(text).ok()?,
            false => vec![serde_json::from_str(text).ok()?],
        };
        let call = |wire: WireCall<'_>| {
            let arguments = match (wire.arguments, wire.parameters) {
                (Some(arguments), None) | (None, Some(arguments)) => arguments.get().to_owned(),
                (None, None) => "{}".to_owned(),
                (Some(_), Some(_)) => return None,
            };
            // Some models write the object as a text.
            let arguments = match arguments.starts_with('"') {
                true => serde_json::from_str::<String>(&arguments).ok()?,
                false => arguments,
            };
            let is_object = serde_json::from_str::<serde_json::Map<_, _>>(&arguments).is_ok();
            (is_object && self.names.contains(&wire.name)).then_some(Call { name: wire.name, arguments })
        };
        let calls: Vec<Call> = wire.into_iter().map(call).collect::<Option<_>>()?;
        (!calls.is_empty()).then_some(calls)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(name: &str, arguments: &str) -> Piece {
        Piece::Call(Call { name: name.to_owned(), arguments: arguments.to_owned() })
    }

    fn text(text: &str) -> Piece {
        Piece::Text(text.to_owned())
    }

    /// The pieces of a text that comes `step` characters at a time, neighbouring texts as one.
    fn pieces(all: &str, step: usize) -> Vec<Piece> {
        let mut finder = CallFinder::new(vec!["f".into(), "g".into()]);
        let letters: Vec<char> = all.chars().collect();
        let mut found: Vec<Piece> = Vec::new();
        let mut add = |piece| match (found.last_mut(), piece) {
            (Some(Piece::Text(before)), Piece::Text(more)) => before.push_str(&more),
            (_, piece) => found.push(piece),
        };
        for part in letters.chunks(step) {
            finder.push(&part.iter().collect::<String>()).into_iter().for_each(&mut add);
        }
        finder.finish().into_iter().for_each(&mut add);
        found
    }

    #[test]
    fn calls_are_found_however_the_text_arrives() {
        let f = r#"{"name": "f", "arguments": {"a": [1, 2]}}"#;
        let cases = [
            ("Hello.\n", vec![text("Hello.\n")]),
            (r#"{"answer": 42}"#, vec![text(r#"{"answer": 42}"#)]),
            (r#"{"name": "other", "arguments": {}}"#, vec![text(r#"{"name": "other", "arguments": {}}"#)]),
            (r#"{"name": "f", "arguments": 7}"#, vec![text(r#"{"name": "f", "arguments": 7}"#)]),
            (f, vec![call("f", r#"{"a": [1, 2]}"#)]),
            (r#" {"name": "g"}"#, vec![call("g", "{}")]),
            (r#"{"name": "g", "parameters": {"x": 1}}"#, vec![call("g", r#"{"x": 1}"#)]),
            (r#"{"name": "g", "arguments": "{\"x\": 1}"}"#, vec![call("g", r#"{"x": 1}"#)]),
            (r#"[{"name": "f", "arguments": {}}, {"name": "g"}]"#, vec![call("f", "{}"), call("g", "{}")]),
            ("a < b <tool> c", vec![text("a < b <tool> c")]),
            ("<tool_call>nonsense</tool_call> so", vec![text("<tool_call>nonsense</tool_call> so")]),
            ("<tool_call>{\"name\":", vec![text("<tool_call>{\"name\":")]),
        ];
        for (all, expected) in cases {
            for step in [1, 2, 3, 7, 1000] {
                assert_eq!(pieces(all, step), expected, "{all:?} by {step}");
            }
        }
        let one = format!("Let me see.\n<tool_call>\n{f}\n</tool_call>");
        let several = format!("{one}\n<tool_call>{{\"name\": \"g\"}}</tool_call>\n");
        let open = format!("<tool_call>\n{f}\n");
        for step in [1, 2, 5, 1000] {
            let first = vec![text("Let me see."), call("f", r#"{"a": [1, 2]}"#)];
            assert_eq!(pieces(&one, step), first);
            assert_eq!(pieces(&several, step), [first, vec![call("g", "{}")]].concat());
            // An end token in place of the closing tag.
            assert_eq!(pieces(&open, step), [call("f", r#"{"a": [1, 2]}"#)]);
        }
    }

    #[test]
    fn text_is_not_held_back_for_long() {
        let mut finder = CallFinder::new(vec!["f".into()]);
        assert_eq!(finder.push("Well, "), [text("Well,")]);
        assert_eq!(finder.push("a <to"), [text(" a")]);
        assert_eq!(finder.push("p>"), [text(" <top>")]);
        assert_eq!(finder.calls, 0);
    }
}
