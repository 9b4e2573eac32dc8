//! Grammars before they are an automaton.

use regex_syntax::hir::{Class, ClassUnicode, ClassUnicodeRange, Hir, HirKind, Look};

use crate::{Error, Result};

/// What a piece of text may be.
#[derive(Debug, Clone)]
pub(super) enum Expression {
    Literal(Vec<u8>),
    Characters(ClassUnicode),
    Sequence(Vec<Expression>),
    Choice(Vec<Expression>),
    /// At least and at most so many times.
    Repeat(Box<Expression>, u32, Option<u32>),
    Rule(usize),
}

/// Expressions with a number, which may name each other and themselves.
#[derive(Debug, Default)]
pub(super) struct Rules(Vec<Option<Expression>>);

impl Rules {
    /// A rule whose expression follows later.
    pub fn declare(&mut self) -> usize {
        self.0.push(None);
        self.0.len() - 1
    }

    pub fn define(&mut self, rule: usize, expression: Expression) {
        self.0[rule] = Some(expression);
    }

    /// A rule with its expression.
    pub fn add(&mut self, expression: Expression) -> Expression {
        self.0.push(Some(expression));
        Expression::Rule(self.0.len() - 1)
    }

    pub fn into_expressions(self) -> Vec<Option<Expression>> {
        self.0
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }
}

impl Expression {
    pub fn empty() -> Expression {
        Expression::Sequence(Vec::new())
    }

    pub fn text(text: &str) -> Expression {
        Expression::Literal(text.as_bytes().to_vec())
    }

    pub fn optional(self) -> Expression {
        Expression::Choice(vec![self, Expression::empty()])
    }

    pub fn repeat(self, least: u32, most: Option<u32>) -> Expression {
        Expression::Repeat(Box::new(self), least, most)
    }

    /// The characters of these ranges, ends included.
    pub fn ranges(ranges: &[(char, char)]) -> Expression {
        Expression::Characters(ClassUnicode::new(
            ranges.iter().map(|(from, to)| ClassUnicodeRange::new(*from, *to)),
        ))
    }
}

/// Characters that stand for themselves.
pub(super) fn plain_characters(class: ClassUnicode) -> Expression {
    Expression::Characters(class)
}

/// An expression for a regular expression that is anchored at both ends; `characters` says how a character of the
/// content is written.
pub(super) fn from_regex(
    pattern: &str,
    characters: &dyn Fn(ClassUnicode) -> Expression,
) -> Result<Expression> {
    let (expression, _, _) = from_regex_with_anchors(pattern, characters)?;
    Ok(expression)
}

/// The same, and whether the regular expression began and ended with an anchor.
pub(super) fn from_regex_with_anchors(
    pattern: &str,
    characters: &dyn Fn(ClassUnicode) -> Expression,
) -> Result<(Expression, bool, bool)> {
    let place = || format!("pattern {pattern:?}");
    let hir = regex_syntax::ParserBuilder::new()
        .nest_limit(100)
        .build()
        .parse(pattern)
        .map_err(|e| Error::invalid(place(), e.to_string().replace('\n', " "), "a regular expression"))?;
    let mut parts: Vec<&Hir> = match hir.kind() {
        HirKind::Concat(parts) => parts.iter().collect(),
        _ => vec![&hir],
    };
    let is_look = |part: Option<&&Hir>, look: Look| {
        part.is_some_and(|p| matches!(p.kind(), HirKind::Look(l) if *l == look))
    };
    let start = is_look(parts.first(), Look::Start);
    if start {
        parts.remove(0);
    }
    let end = is_look(parts.last(), Look::End);
    if end {
        parts.pop();
    }
    let sequence =
        parts.into_iter().map(|part| from_hir(part, characters, pattern)).collect::<Result<_>>()?;
    Ok((Expression::Sequence(sequence), start, end))
}

fn from_hir(hir: &Hir, characters: &dyn Fn(ClassUnicode) -> Expression, pattern: &str) -> Result<Expression> {
    let unsupported = |what: &str| Err(Error::unsupported(format!("pattern {pattern:?}"), what));
    let all = |parts: &[Hir]| {
        parts.iter().map(|part| from_hir(part, characters, pattern)).collect::<Result<Vec<_>>>()
    };
    Ok(match hir.kind() {
        HirKind::Empty => Expression::empty(),
        HirKind::Literal(literal) => {
            let Ok(text) = std::str::from_utf8(&literal.0) else {
                return unsupported("a byte that is no character");
            };
            let single = |c: char| characters(ClassUnicode::new([ClassUnicodeRange::new(c, c)]));
            Expression::Sequence(text.chars().map(single).collect())
        }
        HirKind::Class(Class::Unicode(class)) => characters(class.clone()),
        HirKind::Class(Class::Bytes(_)) => return unsupported("a class of bytes"),
        HirKind::Look(_) => return unsupported("an anchor or a word boundary inside"),
        HirKind::Repetition(repetition) => {
            let inner = from_hir(&repetition.sub, characters, pattern)?;
            inner.repeat(repetition.min, repetition.max)
        }
        HirKind::Capture(capture) => from_hir(&capture.sub, characters, pattern)?,
        HirKind::Concat(parts) => Expression::Sequence(all(parts)?),
        HirKind::Alternation(parts) => Expression::Choice(all(parts)?),
    })
}
