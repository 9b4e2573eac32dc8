//! Tokens that are cut out of a text as a whole, before the model's own rules.

use aho_corasick::{AhoCorasick, MatchKind};

use crate::{Error, Result};

use super::vocabulary::{TokenKind, Vocabulary};

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
        let keep_space = ["<unk>", "<s>", "<|endoftext|>"].map(|text| vocabulary.ids.get(text).copied());
        Ok(SpecialTokens { all, user_defined, take_space: vocabulary.specials_take_space, keep_space })
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
