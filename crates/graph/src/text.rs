//! A stable text form of graphs that people can read and diff, and that reads back to an equal graph.
//!
//! ```text
//! graph "double" {
//!   %0 "x": f32[batch,3] = input
//!   %1 "w": f32[3,3] = stored 0 128 36
//!   "mm" {"MatMul":{…}} (%0, %1, _) -> (%2 "y": f32[batch,3])
//!   return (%2)
//! }
//! ```
//! One node a line: its name, its operator as JSON, its operands, its results with their types. The bodies of
//! control-flow nodes follow their node as nested blocks.

use std::fmt::Write as _;
use std::sync::Arc;

use crate::graph::Value;
use crate::{
    Constant, DType, Dim, Graph, GraphError, Node, NodeId, Op, SourceId, StoredTensor, TensorType, ValueId,
    ValueKind, ValueType,
};

/// JSON has no infinities, which clip bounds may be; they are written as text.
pub(crate) mod float {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Repr {
        Number(f32),
        Text(String),
    }

    pub fn serialize<S: Serializer>(x: &f32, s: S) -> Result<S::Ok, S::Error> {
        if x.is_finite() { x.serialize(s) } else { x.to_string().serialize(s) }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<f32, D::Error> {
        match Repr::deserialize(d)? {
            Repr::Number(x) => Ok(x),
            Repr::Text(t) => t.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// Deepest nesting of bodies that the reader accepts.
const BODY_DEPTH_MAX: usize = 32;
/// Largest value index that the reader accepts, so that a short text cannot ask for a large table.
const VALUE_INDEX_MAX: usize = 1 << 24;

fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("a string serialises")
}

impl Graph {
    /// The text form; constants in memory are written out.
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        self.write_text(&mut out, 0);
        out
    }

    fn write_text(&self, out: &mut String, depth: usize) {
        let pad = "  ".repeat(depth);
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{pad}graph {} {{", quoted(&self.name));
        for source in &self.sources {
            let _ = writeln!(out, "{pad}  source {}", quoted(source));
        }
        for &input in &self.inputs {
            let v = self.value(input);
            let _ = writeln!(out, "{pad}  %{} {}: {} = input", input.0, quoted(&v.name), TypeText(&v.ty));
        }
        for (i, v) in self.values.iter().enumerate() {
            let (word, constant) = match &v.kind {
                ValueKind::Constant(c) => ("", Some(c)),
                ValueKind::State(c) => ("state ", c.as_ref()),
                _ => continue,
            };
            let content = match constant {
                None => "zeros".to_owned(),
                Some(Constant::Stored(s)) => format!("stored {} {} {}", s.source.0, s.offset, s.size.0),
                Some(Constant::Inline(t)) => {
                    format!("constant {}", serde_json::to_string(&**t).expect("a tensor serialises"))
                }
            };
            let _ = writeln!(out, "{pad}  %{i} {}: {} = {word}{content}", quoted(&v.name), TypeText(&v.ty));
        }
        for (_, node) in self.iter_nodes() {
            let op = serde_json::to_string(&node.op).expect("an operator serialises");
            let inputs: Vec<String> =
                node.inputs.iter().map(|v| v.map_or("_".to_owned(), |v| format!("%{}", v.0))).collect();
            let outputs: Vec<String> = node
                .outputs
                .iter()
                .map(|v| match v {
                    None => "_".to_owned(),
                    Some(v) => {
                        let value = self.value(*v);
                        format!("%{} {}: {}", v.0, quoted(&value.name), TypeText(&value.ty))
                    }
                })
                .collect();
            let _ = writeln!(
                out,
                "{pad}  {} {op} ({}) -> ({})",
                quoted(&node.name),
                inputs.join(", "),
                outputs.join(", ")
            );
            for body in node.op.bodies() {
                body.write_text(out, depth + 1);
            }
        }
        let outputs: Vec<String> = self.outputs.iter().map(|v| format!("%{}", v.0)).collect();
        let _ = writeln!(out, "{pad}  return ({})", outputs.join(", "));
        let _ = writeln!(out, "{pad}}}");
    }

    /// Reads a text form back.
    ///
    /// # Errors
    /// [`GraphError::Text`] with the line and what was expected; then whatever [`verify`](Self::verify) finds.
    pub fn from_text(text: &str) -> Result<Graph, GraphError> {
        let mut lines = Lines { text: text.lines().enumerate(), line: 0 };
        let first = lines.next().ok_or_else(|| lines.error("expected `graph \"name\" {`"))?;
        let graph = read_graph(&mut lines, first, 0)?;
        graph.verify()?;
        Ok(graph)
    }
}

struct TypeText<'a>(&'a ValueType);

impl std::fmt::Display for TypeText<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            ValueType::Tensor(TensorType { dtype, shape: Some(dims) }) => {
                write!(f, "{dtype}[")?;
                for (i, d) in dims.iter().enumerate() {
                    if i > 0 {
                        f.write_str(",")?;
                    }
                    match d {
                        Dim::Symbol(s) if !plain_symbol(s) => f.write_str(&quoted(s))?,
                        d => write!(f, "{d}")?,
                    }
                }
                f.write_str("]")
            }
            ValueType::Sequence(t) => write!(f, "seq({})", TypeText(t)),
            ValueType::Optional(t) => write!(f, "opt({})", TypeText(t)),
            other => write!(f, "{other}"),
        }
    }
}

/// Symbols that need no quotes: a letter or underscore, then letters, digits, underscores, dots, slashes.
fn plain_symbol(s: &str) -> bool {
    s.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && s.chars().all(|c| c.is_ascii_alphanumeric() || "_./".contains(c))
}

struct Lines<'a> {
    text: std::iter::Enumerate<std::str::Lines<'a>>,
    line: usize,
}

impl<'a> Lines<'a> {
    fn next(&mut self) -> Option<&'a str> {
        for (i, line) in self.text.by_ref() {
            self.line = i + 1;
            let line = line.trim();
            if !line.is_empty() && !line.starts_with("//") {
                return Some(line);
            }
        }
        None
    }

    fn error(&self, problem: impl Into<String>) -> GraphError {
        GraphError::Text { line: self.line, problem: problem.into() }
    }
}

/// A cursor over one line.
struct Cursor<'a> {
    rest: &'a str,
}

impl<'a> Cursor<'a> {
    fn eat(&mut self, token: &str) -> Result<(), String> {
        self.rest = self.rest.trim_start();
        self.rest = self
            .rest
            .strip_prefix(token)
            .ok_or_else(|| format!("expected `{token}` at `{}`", self.near()))?;
        Ok(())
    }

    fn try_eat(&mut self, token: &str) -> bool {
        self.eat(token).is_ok()
    }

    fn near(&self) -> String {
        self.rest.chars().take(30).collect()
    }

    /// One JSON value.
    fn json<T: serde::de::DeserializeOwned>(&mut self) -> Result<T, String> {
        let mut stream = serde_json::Deserializer::from_str(self.rest).into_iter::<T>();
        let value = stream.next().ok_or("expected a JSON value")?.map_err(|e| e.to_string())?;
        let end = stream.byte_offset();
        self.rest = &self.rest[end..];
        Ok(value)
    }

    fn number(&mut self) -> Result<u64, String> {
        self.rest = self.rest.trim_start();
        let end = self.rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest.len());
        let (digits, rest) = self.rest.split_at(end);
        let number = digits.parse().map_err(|_| format!("expected a number at `{}`", self.near()))?;
        self.rest = rest;
        Ok(number)
    }

    fn value_id(&mut self) -> Result<ValueId, String> {
        self.eat("%")?;
        let n = self.number()?;
        if n > VALUE_INDEX_MAX as u64 {
            return Err(format!("value index {n} is above the limit {VALUE_INDEX_MAX}"));
        }
        Ok(ValueId(n as u32))
    }

    fn word(&mut self) -> &'a str {
        self.rest = self.rest.trim_start();
        let end = self.rest.find(|c: char| !(c.is_ascii_alphanumeric() || "_./".contains(c)));
        let (word, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
        self.rest = rest;
        word
    }

    fn dtype(&mut self) -> Result<DType, String> {
        let word = self.word();
        DType::from_name(word).ok_or_else(|| format!("{word:?} is not an element type"))
    }

    fn value_type(&mut self, depth: usize) -> Result<ValueType, String> {
        if depth > BODY_DEPTH_MAX {
            return Err("types are nested too deeply".to_owned());
        }
        if self.try_eat("?") {
            return Ok(ValueType::Unknown);
        }
        for (word, make) in [("seq(", ValueType::Sequence as fn(_) -> _), ("opt(", ValueType::Optional)] {
            if self.try_eat(word) {
                let inner = self.value_type(depth + 1)?;
                self.eat(")")?;
                return Ok(make(Box::new(inner)));
            }
        }
        if self.try_eat("map(") {
            let key = self.dtype()?;
            self.eat(",")?;
            let value = self.dtype()?;
            self.eat(")")?;
            return Ok(ValueType::Map { key, value });
        }
        let dtype = self.dtype()?;
        self.eat("[")?;
        if self.try_eat("*") {
            self.eat("]")?;
            return Ok(TensorType::unranked(dtype).into());
        }
        let mut dims = Vec::new();
        while !self.try_eat("]") {
            if !dims.is_empty() {
                self.eat(",")?;
            }
            self.rest = self.rest.trim_start();
            dims.push(match self.rest.chars().next() {
                Some('0'..='9') => Dim::Fixed(self.number()? as usize),
                Some('?') => {
                    self.eat("?")?;
                    Dim::UNKNOWN
                }
                Some('"') => Dim::Symbol(Arc::from(self.json::<String>()?)),
                _ => match self.word() {
                    "" => return Err(format!("expected a dimension at `{}`", self.near())),
                    word => Dim::Symbol(Arc::from(word)),
                },
            });
        }
        Ok(TensorType { dtype, shape: Some(dims) }.into())
    }

    /// `%3 "name": f32[2]`.
    fn declaration(&mut self) -> Result<(ValueId, String, ValueType), String> {
        let id = self.value_id()?;
        self.rest = self.rest.trim_start();
        let name = self.json()?;
        self.eat(":")?;
        Ok((id, name, self.value_type(0)?))
    }

    fn list<T>(&mut self, mut item: impl FnMut(&mut Self) -> Result<T, String>) -> Result<Vec<T>, String> {
        self.eat("(")?;
        let mut items = Vec::new();
        while !self.try_eat(")") {
            if !items.is_empty() {
                self.eat(",")?;
            }
            items.push(item(self)?);
        }
        Ok(items)
    }

    fn optional<T>(
        &mut self,
        item: impl FnOnce(&mut Self) -> Result<T, String>,
    ) -> Result<Option<T>, String> {
        if self.try_eat("_") { Ok(None) } else { item(self).map(Some) }
    }
}

/// Values in the order of their text, before they are put at their index.
type Declared = Vec<(ValueId, Value)>;

fn read_graph(lines: &mut Lines<'_>, first: &str, depth: usize) -> Result<Graph, GraphError> {
    if depth > BODY_DEPTH_MAX {
        return Err(lines.error("bodies are nested too deeply"));
    }
    let mut graph = Graph::default();
    let mut declared: Declared = Vec::new();
    let mut cursor = Cursor { rest: first };
    let header = (|| {
        cursor.eat("graph")?;
        cursor.rest = cursor.rest.trim_start();
        let name = cursor.json()?;
        cursor.eat("{").map(|()| name)
    })();
    graph.name = header.map_err(|e: String| lines.error(e))?;
    loop {
        let line = lines.next().ok_or_else(|| lines.error("the text ends inside a graph"))?;
        if line == "}" {
            break;
        }
        if line.starts_with("graph") {
            let body = read_graph(lines, line, depth + 1)?;
            let node = graph.nodes.last_mut().and_then(Option::as_mut);
            let slot = node.and_then(|n| n.op.bodies_mut().into_iter().find(|b| **b == Graph::default()));
            *slot.ok_or_else(|| lines.error("a body without a control-flow node before it"))? = body;
            continue;
        }
        read_line(&mut graph, &mut declared, line).map_err(|e| lines.error(e))?;
    }
    declared.sort_by_key(|(id, _)| *id);
    for (i, (id, value)) in declared.into_iter().enumerate() {
        if id.index() != i {
            return Err(lines.error(format!("value %{i} is declared never or twice")));
        }
        graph.values.push(value);
    }
    let known = |v: &ValueId| v.index() < graph.values.len();
    let all_known = graph.nodes.iter().flatten().all(|n| n.inputs.iter().flatten().all(known));
    if !all_known || !graph.outputs.iter().all(known) {
        return Err(lines.error("a value is used but not declared"));
    }
    Ok(graph)
}

fn read_line(graph: &mut Graph, declared: &mut Declared, line: &str) -> Result<(), String> {
    let mut c = Cursor { rest: line };
    if line.starts_with('%') {
        let (id, name, ty) = c.declaration()?;
        c.eat("=")?;
        let state = c.try_eat("state");
        let constant = if c.try_eat("input") {
            graph.inputs.push(id);
            declared.push((id, Value { name, ty, kind: ValueKind::Input }));
            return Ok(());
        } else if c.try_eat("zeros") {
            None
        } else if c.try_eat("stored") {
            let source = SourceId(u32::try_from(c.number()?).map_err(|e| e.to_string())?);
            let (offset, size) = (c.number()?, lightering_units::Bytes(c.number()?));
            Some(Constant::Stored(StoredTensor { source, offset, size }))
        } else {
            c.eat("constant")?;
            c.rest = c.rest.trim_start();
            Some(Constant::Inline(Arc::new(c.json()?)))
        };
        let kind = match (state, constant) {
            (true, constant) => ValueKind::State(constant),
            (false, Some(constant)) => ValueKind::Constant(constant),
            (false, None) => return Err("only a state can start as zeros".to_owned()),
        };
        declared.push((id, Value { name, ty, kind }));
    } else if c.try_eat("source") {
        c.rest = c.rest.trim_start();
        graph.sources.push(c.json()?);
    } else if c.try_eat("return") {
        graph.outputs = c.list(Cursor::value_id)?;
    } else {
        let name = c.json()?;
        c.rest = c.rest.trim_start();
        let op: Op = c.json()?;
        let inputs = c.list(|c| c.optional(Cursor::value_id))?;
        c.eat("->")?;
        let results = c.list(|c| c.optional(Cursor::declaration))?;
        let node = NodeId(graph.nodes.len() as u32);
        let mut outputs = Vec::new();
        for (output, result) in (0u32..).zip(results) {
            outputs.push(result.map(|(id, name, ty)| {
                declared.push((id, Value { name, ty, kind: ValueKind::Output { node, output } }));
                id
            }));
        }
        graph.nodes.push(Some(Node { name, op, inputs, outputs }));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BinaryOp, MatMulAttributes, Tensor, UnaryOp};
    use lightering_units::Bytes;

    fn sample() -> Graph {
        let mut g = Graph::new("sample \"quoted\"");
        g.sources.push("model.onnx".to_owned());
        let dims = vec![Dim::Symbol("batch".into()), Dim::Fixed(3), Dim::Symbol("a, b".into()), Dim::UNKNOWN];
        let x = g.add_input("x", TensorType { dtype: DType::F32, shape: Some(dims) });
        let stored = StoredTensor { source: SourceId(0), offset: 128, size: Bytes(36) };
        let w = g.add_stored("w", TensorType::fixed(DType::F32, &[3, 3]), stored);
        let s = g.add_state("s", TensorType::unranked(DType::F64), None);
        let c = g.add_constant("c", Tensor::from_strings(&[1], vec!["a) -> %".to_owned()]));
        let y = g.add_node("mm", Op::MatMul(MatMulAttributes::default()), &[x, w], 1)[0];
        let clip = UnaryOp::ClipTo { min: 0.0, max: f32::INFINITY };
        let z = g.add_node("clip", Op::Unary(clip), &[y], 1)[0];
        let mut body = Graph::new("body");
        let b =
            body.add_input("b", ValueType::Sequence(Box::new(TensorType::unranked(DType::String).into())));
        body.outputs.push(b);
        let op = Op::If { then_body: Box::new(body.clone()), else_body: Box::new(body) };
        let i = g.add_node_named("if", op, vec![Some(s), Some(c)], vec!["i".into()])[0];
        let q = g.add_node("q", Op::Binary(BinaryOp::Add), &[z, i], 1)[0];
        g.outputs.push(q);
        g
    }

    #[test]
    fn text_round_trips() {
        let g = sample();
        let text = g.to_text();
        let again = Graph::from_text(&text).unwrap();
        assert_eq!(again, g, "{text}");
        assert_eq!(again.to_text(), text);
    }

    #[test]
    fn broken_text_names_the_line() {
        let text = sample().to_text();
        for (from, to) in [
            ("%2", "%99999999999"),
            ("f32", "f33"),
            (") -> (%", ") => (%"),
            ("return", "retrun"),
            ("}\n", ""),
        ] {
            let broken = text.replacen(from, to, 1);
            let error = Graph::from_text(&broken).unwrap_err();
            assert!(matches!(error, GraphError::Text { .. }), "{from} to {to}: {error}");
        }
        assert!(Graph::from_text("").is_err());
    }
}
