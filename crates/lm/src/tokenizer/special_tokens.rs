//! Tokens that are cut out of a text as a whole, before the model's own rules.

use aho_corasick::{AhoCorasick, MatchKind};

use crate::{Error, Result};

use super::vocabulary::{TokenKind, Vocabulary};

/// A character that is none (U+FDD0, which Unicode reserves for uses like this): it keeps special tokens in the text of a
/// user apart and is dropped when that text is encoded.
pub(super) const GUARD: char = '\u{fdd0}';

/// A part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fragment<'t> {
    Token(u32),
    Text(&'t str),
}

#[derive(Debug)]
struct Finder {
    automaton: AhoCorasick,
    ids: Vec<u32>,
}

/// Finds special tokens in one pass, the longest of those that begin at a place.
#[derive(Debug)]
pub(super) struct SpecialTokens {
    /// Control and unknown tokens and those of the user.
    all: Option<Finder>,
    /// Those of the user only: they hold even where text must not become control tokens.
    user_defined: Option<Finder>,
    /// Control and unknown tokens only: what the text of a user must not turn into.
    reserved: Option<Finder>,
    /// Tokens that swallow the white space behind them.
    take_space: bool,
    keep_space: [Option<u32>; 3],
}

impl Finder {
    fn new(vocabulary: &Vocabulary, wanted: impl Fn(TokenKind) -> bool) -> Result<Option<Finder>> {
        let ids: Vec<u32> = (0..vocabulary.kinds.len())
            .filter(|id| wanted(vocabulary.kinds[*id]))
            .map(|id| id as u32)
            .collect();
        if ids.is_empty() {
            return Ok(None);
        }
        let texts = ids.iter().map(|id| vocabulary.data.tokens[*id as usize].as_bytes());
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(texts)
            .map_err(|e| Error::invalid("tokenizer.ggml.tokens", e, "special tokens of moderate size"))?;
        Ok(Some(Finder { automaton, ids }))
    }
}

impl SpecialTokens {
    pub fn new(vocabulary: &Vocabulary) -> Result<SpecialTokens> {
        use TokenKind::{Control, Unknown, UserDefined};
        let all = Finder::new(vocabulary, |kind| matches!(kind, Control | Unknown | UserDefined))?;
        let user_defined = Finder::new(vocabulary, |kind| kind == UserDefined)?;
        let reserved = Finder::new(vocabulary, |kind| matches!(kind, Control | Unknown))?;
        let keep_space = ["<unk>", "<s>", "<|endoftext|>"].map(|text| vocabulary.ids.get(text).copied());
        Ok(SpecialTokens {
            all,
            user_defined,
            reserved,
            take_space: vocabulary.specials_take_space,
            keep_space,
        })
    }

    /// `text` with a [`GUARD`] behind the first character of everything that would become a control token.
    pub fn guard(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        let mut at = 0;
        if let Some(finder) = &self.reserved {
            // Also inside of what was found, since the guard breaks only that.
            while let Some(found) = finder.automaton.find(aho_corasick::Input::new(text).range(at..)) {
                let first = text[found.start()..].chars().next().map_or(1, char::len_utf8);
                out.push_str(&text[at..found.start() + first]);
                out.push(GUARD);
                at = found.start() + first;
            }
        }
        out.push_str(&text[at..]);
        out
    }

    /// Gives the parts of `text` in order; no part of text is empty.
    pub fn split<'t>(&self, text: &'t str, parse_special: bool, emit: &mut impl FnMut(Fragment<'t>)) {
        let finder = if parse_special { &self.all } else { &self.user_defined };
        let mut at = 0;
        if let Some(finder) = finder {
            for found in finder.automaton.find_iter(text) {
                // White space that the token before took is gone.
                if found.start() < at {
                    continue;
                }
                if at < found.start() {
                    emit(Fragment::Text(&text[at..found.start()]));
                }
                let id = finder.ids[found.pattern().as_usize()];
                emit(Fragment::Token(id));
                at = found.end();
                if self.take_space && !self.keep_space.contains(&Some(id)) {
                    let rest = &text[at..];
                    at += rest.len()
                        - rest.trim_start_matches(|c: char| c.is_ascii_whitespace() || c == '\u{b}').len();
                }
            }
        }
        if at < text.len() {
            emit(Fragment::Text(&text[at..]));
        }
    }
}
