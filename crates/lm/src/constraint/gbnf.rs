//! GBNF, the grammar notation of llama.cpp (`grammars/README.md` there): `root ::= "yes" | "no" [0-9]+ ws`.

use std::collections::BTreeMap;

use regex_syntax::hir::{ClassUnicode, ClassUnicodeRange};

use crate::{Error, Result};

use super::expression::{Expression, Rules};

/// The deepest nesting of parentheses.
const NESTING_MAX: usize = 60;

/// The expression of the rule `root` of a grammar.
pub(super) fn parse(text: &str, rules: &mut Rules) -> Result<Expression> {
    let mut parser = Parser { text, at: 0, names: BTreeMap::new(), defined: BTreeMap::new(), rules };
    parser.space(true);
    while parser.at < text.len() {
        parser.rule()?;
    }
    // Rules that are only named must not stay open, also when this ends in an error.
    let missing = parser.names.iter().find(|(name, _)| !parser.defined.contains_key(*name));
    if let Some((name, _)) = missing {
        return Err(Error::invalid("grammar", format!("no rule {name:?}"), "a rule for every name"));
    }
    let Some(root) = parser.names.get("root") else {
        return Err(Error::invalid(
            "grammar",
            "no rule \"root\"",
            "a rule with that name, where a text begins",
        ));
    };
    Ok(Expression::Rule(*root))
}

struct Parser<'t, 'r> {
    text: &'t str,
    at: usize,
    names: BTreeMap<String, usize>,
    defined: BTreeMap<String, ()>,
    rules: &'r mut Rules,
}

impl Parser<'_, '_> {
    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.at += next.len_utf8();
        Some(next)
    }

    fn take(&mut self, text: &str) -> bool {
        let found = self.rest().starts_with(text);
        if found {
            self.at += text.len();
        }
        found
    }

    fn error<T>(&self, expected: &str) -> Result<T> {
        let line = self.text[..self.at].matches('\n').count() + 1;
        let what = match self.peek() {
            Some(character) => format!("{character:?}"),
            None => "its end".to_owned(),
        };
        Err(Error::invalid(format!("grammar, line {line}"), what, expected))
    }

    /// Skips blanks and comments, and line breaks too if they mean nothing here.
    fn space(&mut self, lines: bool) {
        loop {
            match self.peek() {
                Some(' ' | '\t') => self.at += 1,
                Some('\n' | '\r') if lines => self.at += 1,
                Some('#') => {
                    let length = self.rest().find(['\n', '\r']).unwrap_or(self.rest().len());
                    self.at += length;
                }
                _ => return,
            }
        }
    }

    fn name(&mut self) -> Result<String> {
        let of_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let length = self.rest().find(|c| !of_name(c)).unwrap_or(self.rest().len());
        if length == 0 {
            return self.error("the name of a rule");
        }
        let name = self.rest()[..length].to_owned();
        self.at += length;
        Ok(name)
    }

    fn numbered(&mut self, name: &str) -> usize {
        if let Some(rule) = self.names.get(name) {
            return *rule;
        }
        let rule = self.rules.declare();
        self.names.insert(name.to_owned(), rule);
        rule
    }

    fn rule(&mut self) -> Result<()> {
        let name = self.name()?;
        self.space(false);
        if !self.take("::=") {
            return self.error("\"::=\" behind the name of a rule");
        }
        self.space(true);
        if self.defined.insert(name.clone(), ()).is_some() {
            return self.error(&format!("one rule {name:?}, not two"));
        }
        let rule = self.numbered(&name);
        let expression = self.alternatives(0)?;
        self.rules.define(rule, expression);
        if !matches!(self.peek(), None | Some('\n' | '\r')) {
            return self.error("the end of the rule");
        }
        self.space(true);
        Ok(())
    }

    fn alternatives(&mut self, depth: usize) -> Result<Expression> {
        let mut ways = vec![self.sequence(depth)?];
        loop {
            // An alternative may stand on the next line.
            let before = self.at;
            self.space(true);
            if !self.take("|") {
                self.at = before;
                break;
            }
            self.space(true);
            ways.push(self.sequence(depth)?);
        }
        Ok(Expression::Choice(ways))
    }

    fn sequence(&mut self, depth: usize) -> Result<Expression> {
        let mut parts: Vec<Expression> = Vec::new();
        loop {
            self.space(depth > 0);
            let part = match self.peek() {
                Some('"') => self.literal()?,
                Some('[') => self.class()?,
                Some('.') => {
                    self.at += 1;
                    Expression::ranges(&[('\0', char::MAX)])
                }
                Some('(') => {
                    if depth >= NESTING_MAX {
                        return self.error("parentheses nested less deeply");
                    }
                    self.at += 1;
                    self.space(true);
                    let inside = self.alternatives(depth + 1)?;
                    self.space(true);
                    if !self.take(")") {
                        return self.error("\")\"");
                    }
                    inside
                }
                Some(c) if c.is_ascii_alphanumeric() || c == '-' || c == '_' => {
                    let name = self.name()?;
                    Expression::Rule(self.numbered(&name))
                }
                Some('<' | '!') => return Err(Error::unsupported("grammar", "a token in the place of text")),
                _ => return Ok(Expression::Sequence(parts)),
            };
            parts.push(self.repeated(part)?);
        }
    }

    fn repeated(&mut self, part: Expression) -> Result<Expression> {
        Ok(match self.peek() {
            Some('*') => {
                self.at += 1;
                part.repeat(0, None)
            }
            Some('+') => {
                self.at += 1;
                part.repeat(1, None)
            }
            Some('?') => {
                self.at += 1;
                part.optional()
            }
            Some('{') => {
                self.at += 1;
                self.space(false);
                let least = if self.peek() == Some(',') { 0 } else { self.number()? };
                self.space(false);
                let mut most = Some(least);
                if self.take(",") {
                    self.space(false);
                    most = if self.peek() == Some('}') { None } else { Some(self.number()?) };
                    self.space(false);
                }
                if !self.take("}") || most.is_some_and(|most| most < least) {
                    return self.error("a repetition like {2}, {2,} or {2,5}");
                }
                part.repeat(least, most)
            }
            _ => part,
        })
    }

    fn number(&mut self) -> Result<u32> {
        let length = self.rest().find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest().len());
        match self.rest()[..length].parse() {
            Ok(number) => {
                self.at += length;
                Ok(number)
            }
            Err(_) => self.error("a number"),
        }
    }

    fn literal(&mut self) -> Result<Expression> {
        self.at += 1;
        let mut text = String::new();
        loop {
            match self.peek() {
                Some('"') => {
                    self.at += 1;
                    return Ok(Expression::text(&text));
                }
                Some('\n') | None => return self.error("a closing quotation mark"),
                Some(_) => text.push(self.character()?),
            }
        }
    }

    fn class(&mut self) -> Result<Expression> {
        self.at += 1;
        let negated = self.take("^");
        let mut ranges = Vec::new();
        loop {
            match self.peek() {
                Some(']') => {
                    self.at += 1;
                    break;
                }
                Some('\n') | None => return self.error("a closing bracket"),
                Some(_) => (),
            }
            let from = self.character()?;
            let mut to = from;
            let ends_class = self.rest().starts_with("-]");
            if !ends_class && self.take("-") {
                to = self.character()?;
            }
            if to < from {
                return self.error("a range in ascending order");
            }
            ranges.push(ClassUnicodeRange::new(from, to));
        }
        let mut class = ClassUnicode::new(ranges);
        if negated {
            class.negate();
        }
        Ok(Expression::Characters(class))
    }

    /// A character, spelled out or escaped.
    fn character(&mut self) -> Result<char> {
        if !self.take("\\") {
            let Some(character) = self.next() else { return self.error("a character") };
            return Ok(character);
        }
        let digits = match self.peek() {
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some(letter @ ('"' | '\\' | '[' | ']' | '-' | '^' | '/')) => {
                self.at += 1;
                return Ok(letter);
            }
            Some(letter @ ('n' | 'r' | 't')) => {
                self.at += 1;
                return Ok(match letter {
                    'n' => '\n',
                    'r' => '\r',
                    _ => '\t',
                });
            }
            _ => return self.error("an escape like \\n, \\\" or \\u00e9"),
        };
        self.at += 1;
        let code = self.rest().get(..digits).filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
        let character = code.and_then(|d| u32::from_str_radix(d, 16).ok()).and_then(char::from_u32);
        match character {
            Some(character) => {
                self.at += digits;
                Ok(character)
            }
            None => self.error("the number of a character"),
        }
    }
}
