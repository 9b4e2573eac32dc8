//! JSON Schema (draft 2020-12) as a grammar.

use std::collections::BTreeMap;

use minijinja::value::{Value, ValueKind};
use regex_syntax::hir::{ClassUnicode, ClassUnicodeRange};

use crate::json::{self, Json};
use crate::{Error, Result};

use super::expression::{Expression, Rules, from_regex_with_anchors};

/// Keywords that say something about the text.
const KEYWORDS: [&str; 21] = [
    "$ref",
    "additionalProperties",
    "allOf",
    "anyOf",
    "const",
    "enum",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "items",
    "maxItems",
    "maxLength",
    "maximum",
    "minItems",
    "minLength",
    "minimum",
    "oneOf",
    "pattern",
    "prefixItems",
    "properties",
    "required",
    "type",
];
/// Keywords that say nothing about it.
const ANNOTATIONS: [&str; 15] = [
    "$anchor",
    "$comment",
    "$defs",
    "$id",
    "$schema",
    "$vocabulary",
    "default",
    "definitions",
    "deprecated",
    "description",
    "examples",
    "format",
    "readOnly",
    "title",
    "writeOnly",
];

/// The deepest nesting of schemas.
const SCHEMA_DEPTH_MAX: usize = 64;
/// Integers without a bound have at most this many digits, so that a model cannot write digits for ever.
const INTEGER_MAX: i64 = 999_999_999_999_999;
/// The largest list of values or keywords.
const LIST_MAX: usize = 1 << 14;

pub(super) fn translate(schema: &Json, rules: &mut Rules) -> Result<Expression> {
    let space = rules.add(Expression::Choice(vec![
        Expression::empty(),
        Expression::text(" "),
        Expression::Sequence(vec![
            Expression::text("\n").repeat(1, Some(2)),
            Expression::ranges(&[(' ', ' '), ('\t', '\t')]).repeat(0, Some(20)),
        ]),
    ]));
    let character = rules.add(string_character());
    let mut schema_of =
        Schema { root: schema.value(), rules, space, character, any: None, references: BTreeMap::new() };
    schema_of.expression(schema.value(), "schema", 0)
}

struct Schema<'s> {
    root: &'s Value,
    rules: &'s mut Rules,
    space: Expression,
    character: Expression,
    any: Option<usize>,
    references: BTreeMap<String, usize>,
}

/// A character inside a string, spelled out or escaped.
fn string_character() -> Expression {
    let hexadecimal = || Expression::ranges(&[('0', '9'), ('A', 'F'), ('a', 'f')]);
    Expression::Choice(vec![
        Expression::Characters(plain()),
        Expression::Sequence(vec![
            Expression::text("\\"),
            Expression::Choice(vec![
                Expression::Characters(ClassUnicode::new(
                    "\"\\/bfnrt".chars().map(|c| ClassUnicodeRange::new(c, c)),
                )),
                // No halves of surrogate pairs, which are no characters.
                Expression::Sequence(vec![
                    Expression::text("u"),
                    Expression::ranges(&[('0', '9'), ('A', 'C'), ('E', 'F'), ('a', 'c'), ('e', 'f')]),
                    hexadecimal().repeat(3, Some(3)),
                ]),
                Expression::Sequence(vec![
                    Expression::text("u"),
                    Expression::ranges(&[('D', 'D'), ('d', 'd')]),
                    Expression::ranges(&[('0', '7')]),
                    hexadecimal().repeat(2, Some(2)),
                ]),
            ]),
        ]),
    ])
}

/// Characters that stand for themselves inside a JSON string.
fn plain() -> ClassUnicode {
    ClassUnicode::new(
        [(' ', '!'), ('#', '['), (']', '~'), ('\u{80}', char::MAX)]
            .map(|(from, to)| ClassUnicodeRange::new(from, to)),
    )
}

/// Characters of a class as they are written inside a JSON string.
fn written(class: ClassUnicode) -> Expression {
    let mut ways = Vec::new();
    for (character, escape) in [
        ('"', "\\\""),
        ('\\', "\\\\"),
        ('\n', "\\n"),
        ('\r', "\\r"),
        ('\t', "\\t"),
        ('\u{8}', "\\b"),
        ('\u{c}', "\\f"),
    ] {
        if class.ranges().iter().any(|r| (r.start()..=r.end()).contains(&character)) {
            ways.push(Expression::text(escape));
        }
    }
    let mut spelled = class;
    spelled.intersect(&plain());
    if !spelled.ranges().is_empty() {
        ways.push(Expression::Characters(spelled));
    }
    Expression::Choice(ways)
}

fn digits(least: u32, most: Option<u32>) -> Expression {
    Expression::ranges(&[('0', '9')]).repeat(least, most)
}

fn integer() -> Expression {
    Expression::Sequence(vec![
        Expression::text("-").optional(),
        Expression::Choice(vec![
            Expression::text("0"),
            Expression::Sequence(vec![Expression::ranges(&[('1', '9')]), digits(0, Some(14))]),
        ]),
    ])
}

fn number() -> Expression {
    let fraction = Expression::Sequence(vec![Expression::text("."), digits(1, Some(16))]);
    let sign = Expression::ranges(&[('+', '+'), ('-', '-')]).optional();
    let exponent =
        Expression::Sequence(vec![Expression::ranges(&[('E', 'E'), ('e', 'e')]), sign, digits(1, Some(2))]);
    Expression::Sequence(vec![integer(), fraction.optional(), exponent.optional()])
}

/// The integers from `least` to `most`.
fn integers_between(least: i64, most: i64) -> Expression {
    let mut ways = Vec::new();
    if least < 0 {
        let (from, to) = ((-most).max(1), -least);
        ways.push(Expression::Sequence(vec![Expression::text("-"), naturals_between(from, to)]));
    }
    if most >= 0 {
        ways.push(naturals_between(least.max(0), most));
    }
    Expression::Choice(ways)
}

fn naturals_between(least: i64, most: i64) -> Expression {
    let mut ways = Vec::new();
    let mut from = least;
    while from <= most {
        // The largest number with as many digits as `from`.
        let length = from.to_string().len() as u32;
        let to = most.min(10i64.pow(length) - 1);
        ways.push(same_length(from.to_string().as_bytes(), to.to_string().as_bytes()));
        from = to + 1;
    }
    Expression::Choice(ways)
}

/// The numbers between two of equally many digits.
fn same_length(least: &[u8], most: &[u8]) -> Expression {
    let (Some((low, low_rest)), Some((high, high_rest))) = (least.split_first(), most.split_first()) else {
        return Expression::empty();
    };
    let digit = |from: u8, to: u8| Expression::ranges(&[(char::from(from), char::from(to))]);
    if low == high {
        return Expression::Sequence(vec![digit(*low, *high), same_length(low_rest, high_rest)]);
    }
    let rest = low_rest.len();
    let mut ways = vec![
        Expression::Sequence(vec![digit(*low, *low), same_length(low_rest, &vec![b'9'; rest])]),
        Expression::Sequence(vec![digit(*high, *high), same_length(&vec![b'0'; rest], high_rest)]),
    ];
    if high - low > 1 {
        ways.push(Expression::Sequence(vec![
            digit(low + 1, high - 1),
            digits(rest as u32, Some(rest as u32)),
        ]));
    }
    Expression::Choice(ways)
}

/// What stands under a key, if anything.
fn get(map: &Value, key: &str) -> Option<Value> {
    map.get_attr(key).ok().filter(|value| !value.is_undefined())
}

fn list(value: &Value, place: &str) -> Result<Vec<Value>> {
    if value.kind() != ValueKind::Seq {
        return Err(Error::invalid(place, value.kind(), "a list"));
    }
    let all: Vec<Value> = value.try_iter().map_err(|e| Error::invalid(place, e, "a list"))?.collect();
    if all.len() > LIST_MAX {
        return Err(Error::limit(place, "the length of the list", all.len() as u64, LIST_MAX as u64));
    }
    Ok(all)
}

/// The entries of an object in order.
fn entries(value: &Value, place: &str) -> Result<Vec<(String, Value)>> {
    if value.kind() != ValueKind::Map {
        return Err(Error::invalid(place, value.kind(), "an object"));
    }
    let keys: Vec<Value> = value.try_iter().map_err(|e| Error::invalid(place, e, "an object"))?.collect();
    if keys.len() > LIST_MAX {
        return Err(Error::limit(place, "the size of the object", keys.len() as u64, LIST_MAX as u64));
    }
    Ok(keys.into_iter().map(|key| (key.to_string(), value.get_item(&key).unwrap_or_default())).collect())
}

fn count(schema: &Value, key: &str, place: &str) -> Result<Option<u32>> {
    let Some(value) = get(schema, key) else { return Ok(None) };
    let number = u32::try_from(value.clone()).ok();
    number.map(Some).ok_or_else(|| Error::invalid(format!("{place}.{key}"), value, "a whole number from 0"))
}

fn literal(value: &Value, place: &str) -> Result<Expression> {
    let style = json::Style::new(None, None, false, false);
    let text = json::write(value, &style).map_err(|e| Error::invalid(place, e, "a JSON value"))?;
    Ok(Expression::text(&text))
}

impl Schema<'_> {
    fn quoted(&self, inside: Expression) -> Expression {
        Expression::Sequence(vec![Expression::text("\""), inside, Expression::text("\"")])
    }

    /// Any JSON value.
    fn any(&mut self) -> Expression {
        if let Some(rule) = self.any {
            return Expression::Rule(rule);
        }
        let rule = self.rules.declare();
        self.any = Some(rule);
        let string = self.quoted(self.character.clone().repeat(0, None));
        let ways = vec![
            self.map(string.clone(), Expression::Rule(rule)),
            self.list(Expression::Rule(rule), 0, None),
            string,
            number(),
            Expression::text("true"),
            Expression::text("false"),
            Expression::text("null"),
        ];
        self.rules.define(rule, Expression::Choice(ways));
        Expression::Rule(rule)
    }

    fn comma(&self) -> Expression {
        Expression::Sequence(vec![self.space.clone(), Expression::text(","), self.space.clone()])
    }

    fn pair(&self, key: Expression, value: Expression) -> Expression {
        Expression::Sequence(vec![key, Expression::text(":"), self.space.clone(), value])
    }

    fn enclosed(&self, open: &str, inside: Expression, close: &str) -> Expression {
        let space = || self.space.clone();
        Expression::Sequence(vec![Expression::text(open), space(), inside, space(), Expression::text(close)])
    }

    /// An object of any number of such pairs.
    fn map(&mut self, key: Expression, value: Expression) -> Expression {
        let pair = self.pair(key, value);
        let pair = self.rules.add(pair);
        let more = Expression::Sequence(vec![self.comma(), pair.clone()]).repeat(0, None);
        let pairs = Expression::Sequence(vec![pair, more]).optional();
        self.enclosed("{", pairs, "}")
    }

    fn list(&mut self, item: Expression, least: u32, most: Option<u32>) -> Expression {
        let inside = self.items(item, false, least, most);
        self.enclosed("[", inside, "]")
    }

    /// So many items, with commas before them if something stands in front.
    fn items(&mut self, item: Expression, behind: bool, least: u32, most: Option<u32>) -> Expression {
        if most == Some(0) {
            return Expression::empty();
        }
        let item = self.rules.add(item);
        let more = Expression::Sequence(vec![self.comma(), item.clone()]);
        if behind {
            return more.repeat(least, most);
        }
        let more = more.repeat(least.saturating_sub(1), most.map(|m| m - 1));
        let items = Expression::Sequence(vec![item, more]);
        if least == 0 { items.optional() } else { items }
    }

    fn expression(&mut self, schema: &Value, place: &str, depth: usize) -> Result<Expression> {
        if depth > SCHEMA_DEPTH_MAX {
            return Err(Error::limit(place, "the nesting of schemas", depth as u64, SCHEMA_DEPTH_MAX as u64));
        }
        match schema.kind() {
            ValueKind::Bool if schema.is_true() => return Ok(self.any()),
            ValueKind::Bool => return Ok(Expression::Choice(Vec::new())),
            _ => (),
        }
        let mut used: Vec<String> = Vec::new();
        for (key, _) in entries(schema, place)? {
            if KEYWORDS.contains(&key.as_str()) {
                used.push(key);
            } else if !ANNOTATIONS.contains(&key.as_str()) {
                return Err(Error::unsupported(place, format!("the keyword \"{key}\"")));
            }
        }
        // Keywords that choose among schemas stand alone here; together they would mean an intersection.
        let alone = |key: &str| {
            let other = used.iter().find(|other| other.as_str() != key && other.as_str() != "type");
            match other {
                Some(other) => Err(Error::unsupported(place, format!("\"{key}\" together with \"{other}\""))),
                None => Ok(()),
            }
        };
        if let Some(reference) = get(schema, "$ref") {
            alone("$ref")?;
            return self.reference(&reference, place, depth);
        }
        for key in ["anyOf", "oneOf", "allOf"] {
            let Some(schemas) = get(schema, key) else { continue };
            alone(key)?;
            let place = format!("{place}.{key}");
            let schemas = list(&schemas, &place)?;
            if key == "allOf" && schemas.len() != 1 {
                return Err(Error::unsupported(place, "more than one schema at once"));
            }
            let ways = schemas
                .iter()
                .enumerate()
                .map(|(index, schema)| self.expression(schema, &format!("{place}[{index}]"), depth + 1))
                .collect::<Result<_>>()?;
            return Ok(Expression::Choice(ways));
        }
        if let Some(value) = get(schema, "const") {
            alone("const")?;
            return literal(&value, place);
        }
        if let Some(values) = get(schema, "enum") {
            alone("enum")?;
            let place = format!("{place}.enum");
            let ways =
                list(&values, &place)?.iter().map(|value| literal(value, &place)).collect::<Result<_>>()?;
            return Ok(Expression::Choice(ways));
        }
        let types = match get(schema, "type") {
            Some(value) if value.kind() == ValueKind::Seq => list(&value, place)?,
            Some(value) => vec![value],
            None if get(schema, "properties").is_some() => vec![Value::from("object")],
            None if get(schema, "items").is_some() => vec![Value::from("array")],
            None if used.is_empty() => return Ok(self.any()),
            None => {
                let what = format!("\"{}\" without \"type\"", used[0]);
                return Err(Error::unsupported(place, what));
            }
        };
        let ways =
            types.iter().map(|name| self.of_type(name, schema, place, depth)).collect::<Result<_>>()?;
        Ok(Expression::Choice(ways))
    }

    fn of_type(&mut self, name: &Value, schema: &Value, place: &str, depth: usize) -> Result<Expression> {
        Ok(match name.as_str() {
            Some("null") => Expression::text("null"),
            Some("boolean") => Expression::Choice(vec![Expression::text("true"), Expression::text("false")]),
            Some("integer") => self.integer(schema, place)?,
            Some("number") => {
                for key in ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"] {
                    if get(schema, key).is_some() {
                        return Err(Error::unsupported(
                            place,
                            format!("\"{key}\" of numbers that are no integers"),
                        ));
                    }
                }
                number()
            }
            Some("string") => self.string(schema, place)?,
            Some("array") => self.array(schema, place, depth)?,
            Some("object") => self.object(schema, place, depth)?,
            _ => return Err(Error::invalid(format!("{place}.type"), name, "a type of JSON Schema")),
        })
    }

    fn reference(&mut self, reference: &Value, place: &str, depth: usize) -> Result<Expression> {
        let place = format!("{place}.$ref");
        let name = reference.as_str().unwrap_or_default().to_owned();
        if let Some(rule) = self.references.get(&name) {
            return Ok(Expression::Rule(*rule));
        }
        let Some(path) = name.strip_prefix('#') else {
            return Err(Error::unsupported(place, format!("the reference {name:?} out of the schema")));
        };
        let mut target = self.root.clone();
        for step in path.split('/').skip(1) {
            let step = step.replace("~1", "/").replace("~0", "~");
            let inner = match (target.kind(), step.parse::<usize>()) {
                (ValueKind::Seq, Ok(index)) => target.get_item_by_index(index).ok(),
                _ => get(&target, &step),
            };
            let missing = || Error::invalid(&place, &name, "a place in this schema");
            target = inner.filter(|value| !value.is_undefined()).ok_or_else(missing)?;
        }
        let rule = self.rules.declare();
        self.references.insert(name.clone(), rule);
        // Defined even if it turns out wrong, so that no rule stays open.
        let expression = self.expression(&target, &name, depth + 1);
        self.rules.define(rule, expression.as_ref().map_or_else(|_| Expression::empty(), Clone::clone));
        expression.map(|_| Expression::Rule(rule))
    }

    fn integer(&mut self, schema: &Value, place: &str) -> Result<Expression> {
        let bound = |key: &str| -> Result<Option<i64>> {
            let Some(value) = get(schema, key) else { return Ok(None) };
            let whole = value.as_i64().filter(|n| n.abs() <= INTEGER_MAX);
            let expected = "a whole number of at most 15 digits";
            whole.map(Some).ok_or_else(|| Error::invalid(format!("{place}.{key}"), value, expected))
        };
        let least =
            [bound("minimum")?, bound("exclusiveMinimum")?.map(|n| n + 1)].into_iter().flatten().max();
        let most = [bound("maximum")?, bound("exclusiveMaximum")?.map(|n| n - 1)].into_iter().flatten().min();
        if least.is_none() && most.is_none() {
            return Ok(integer());
        }
        let (least, most) = (least.unwrap_or(-INTEGER_MAX), most.unwrap_or(INTEGER_MAX));
        if least > most {
            return Err(Error::invalid(
                place,
                format!("integers from {least} to {most}"),
                "at least one integer",
            ));
        }
        Ok(integers_between(least, most))
    }

    fn string(&mut self, schema: &Value, place: &str) -> Result<Expression> {
        let least = count(schema, "minLength", place)?;
        let most = count(schema, "maxLength", place)?;
        let Some(pattern) = get(schema, "pattern") else {
            let least = least.unwrap_or(0);
            if most.is_some_and(|most| most < least) {
                return Err(Error::invalid(place, "maxLength below minLength", "a length that is possible"));
            }
            return Ok(self.quoted(self.character.clone().repeat(least, most)));
        };
        if least.is_some() || most.is_some() {
            return Err(Error::unsupported(place, "\"pattern\" together with a length"));
        }
        let Some(pattern) = pattern.as_str() else {
            return Err(Error::invalid(format!("{place}.pattern"), pattern, "a regular expression"));
        };
        let (inside, start, end) = from_regex_with_anchors(&ascii_classes(pattern), &written)?;
        let around = |anchored: bool| {
            if anchored { Expression::empty() } else { self.character.clone().repeat(0, None) }
        };
        Ok(self.quoted(Expression::Sequence(vec![around(start), inside, around(end)])))
    }

    fn array(&mut self, schema: &Value, place: &str, depth: usize) -> Result<Expression> {
        let least = count(schema, "minItems", place)?.unwrap_or(0);
        let most = count(schema, "maxItems", place)?;
        if most.is_some_and(|most| most < least) {
            return Err(Error::invalid(
                place,
                "maxItems below minItems",
                "a number of items that is possible",
            ));
        }
        let prefix = match get(schema, "prefixItems") {
            Some(schemas) => list(&schemas, &format!("{place}.prefixItems"))?,
            None => Vec::new(),
        };
        let other = match get(schema, "items") {
            Some(items) => Some(items).filter(|i| i.kind() != ValueKind::Bool || i.is_true()),
            // A tuple ends where its list ends, unless more is asked for.
            None if !prefix.is_empty() && least as usize <= prefix.len() => None,
            None => Some(Value::from(true)),
        };
        let listed = prefix.len() as u32;
        let mut inside = match &other {
            Some(items) if most.is_none_or(|most| most > listed) => {
                let item = self.expression(items, &format!("{place}.items"), depth + 1)?;
                self.items(item, listed > 0, least.saturating_sub(listed), most.map(|m| m - listed))
            }
            Some(_) => Expression::empty(),
            None if least > listed => {
                return Err(Error::invalid(
                    place,
                    format!("minItems {least}"),
                    "no more than there may be items",
                ));
            }
            None => Expression::empty(),
        };
        for (index, schema) in prefix.iter().enumerate().rev() {
            let position = index as u32;
            if most.is_some_and(|most| position >= most) {
                inside = Expression::empty();
                continue;
            }
            let item = self.expression(schema, &format!("{place}.prefixItems[{index}]"), depth + 1)?;
            let comma = if index > 0 { self.comma() } else { Expression::empty() };
            let from_here = Expression::Sequence(vec![comma, item, inside]);
            let from_here = if position >= least { from_here.optional() } else { from_here };
            inside = self.rules.add(from_here);
        }
        Ok(self.enclosed("[", inside, "]"))
    }

    fn object(&mut self, schema: &Value, place: &str, depth: usize) -> Result<Expression> {
        let properties = match get(schema, "properties") {
            Some(properties) => Some(entries(&properties, &format!("{place}.properties"))?),
            None => None,
        };
        let mut required = Vec::new();
        if let Some(names) = get(schema, "required") {
            for name in list(&names, &format!("{place}.required"))? {
                let Some(text) = name.as_str() else {
                    return Err(Error::invalid(format!("{place}.required"), name, "names of properties"));
                };
                required.push(text.to_owned());
            }
        }
        // Objects with stated properties have no others unless the schema says so: all of them satisfy it.
        let additional =
            get(schema, "additionalProperties").unwrap_or_else(|| Value::from(properties.is_none()));
        let properties = properties.unwrap_or_default();
        if let Some(name) = required.iter().find(|name| !properties.iter().any(|(n, _)| n == *name)) {
            let what = format!("the required property {name:?}, which has no schema");
            return Err(Error::unsupported(place, what));
        }
        let additional = if additional.kind() == ValueKind::Bool && !additional.is_true() {
            None
        } else {
            let value = self.expression(&additional, &format!("{place}.additionalProperties"), depth + 1)?;
            let names: Vec<Vec<char>> = properties.iter().map(|(name, _)| name.chars().collect()).collect();
            let names: Vec<&[char]> = names.iter().map(Vec::as_slice).collect();
            let other_names = self.string_except(&names, depth)?;
            let pair = self.pair(self.quoted(other_names), value);
            Some(self.rules.add(pair))
        };
        // The rest of the object from each property on, with and without something in front of it.
        let more = match &additional {
            Some(pair) => Expression::Sequence(vec![self.comma(), pair.clone()]).repeat(0, None),
            None => Expression::empty(),
        };
        let only = match &additional {
            Some(pair) => Expression::Sequence(vec![pair.clone(), more.clone()]).optional(),
            None => Expression::empty(),
        };
        let (mut behind, mut first) = (more, only);
        for (name, schema) in properties.iter().rev() {
            let value = self.expression(schema, &format!("{place}.properties.{name}"), depth + 1)?;
            let key = literal(&Value::from(name.as_str()), place)?;
            let pair = self.pair(key, value);
            let pair = self.rules.add(pair);
            let with_comma = Expression::Sequence(vec![self.comma(), pair.clone(), behind.clone()]);
            let without = Expression::Sequence(vec![pair, behind.clone()]);
            let (with_comma, without) = if required.contains(name) {
                (with_comma, without)
            } else {
                (Expression::Choice(vec![with_comma, behind]), Expression::Choice(vec![without, first]))
            };
            behind = self.rules.add(with_comma);
            first = self.rules.add(without);
        }
        Ok(self.enclosed("{", first, "}"))
    }

    /// The inside of a string that is none of `names`.
    fn string_except(&mut self, names: &[&[char]], depth: usize) -> Result<Expression> {
        // Names are compared as they are written, so these strings have no escapes by number.
        let all = ClassUnicode::new([ClassUnicodeRange::new('\0', char::MAX)]);
        let rest = self.rules.add(written(all.clone()).repeat(0, None));
        if names.is_empty() {
            return Ok(rest);
        }
        if depth > SCHEMA_DEPTH_MAX + 256 {
            return Err(Error::limit("schema", "the length of a property's name", depth as u64, 256));
        }
        let mut begins: BTreeMap<char, Vec<&[char]>> = BTreeMap::new();
        for name in names {
            if let Some((first, others)) = name.split_first() {
                begins.entry(*first).or_default().push(others);
            }
        }
        let known = ClassUnicode::new(begins.keys().map(|c| ClassUnicodeRange::new(*c, *c)));
        let mut unknown = all;
        unknown.difference(&known);
        let mut ways = vec![Expression::Sequence(vec![written(unknown), rest])];
        for (character, others) in begins {
            let single = ClassUnicode::new([ClassUnicodeRange::new(character, character)]);
            let tail = self.string_except(&others, depth + 1)?;
            let way = Expression::Sequence(vec![written(single), tail]);
            ways.push(self.rules.add(way));
        }
        if !names.iter().any(|name| name.is_empty()) {
            ways.push(Expression::empty());
        }
        Ok(Expression::Choice(ways))
    }
}

/// JSON Schema's expressions are those of ECMA-262, whose short classes are ASCII.
fn ascii_classes(pattern: &str) -> String {
    let mut out = String::with_capacity(pattern.len());
    let mut letters = pattern.chars();
    while let Some(letter) = letters.next() {
        if letter != '\\' {
            out.push(letter);
            continue;
        }
        match letters.next() {
            Some('d') => out.push_str("[0-9]"),
            Some('D') => out.push_str("[^0-9]"),
            Some('w') => out.push_str("[A-Za-z0-9_]"),
            Some('W') => out.push_str("[^A-Za-z0-9_]"),
            // The only escape of ECMA-262 that the other syntax does not know.
            Some('/') => out.push('/'),
            Some(other) => out.extend(['\\', other]),
            None => out.push('\\'),
        }
    }
    out
}
