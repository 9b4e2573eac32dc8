//! WordPiece: words are cut into the longest pieces that the vocabulary has, from the left (Devlin et al., 2019,
//! `BertTokenizer`). GGUF writes the piece that begins a word with a space mark and the others bare.

use regex_syntax::hir::{Class, ClassUnicodeRange, HirKind};
use unicode_normalization::UnicodeNormalization;

use crate::{Error, Result};

use super::vocabulary::Vocabulary;
use super::{Map, SPACE_MARK};

/// Longer words become the unknown token (`max_input_chars_per_word` of the original).
const WORD_CHARACTERS_MAX: usize = 100;

#[derive(Debug)]
pub(super) struct WordPieces {
    ids: Map<Box<str>, u32>,
    longest: usize,
    unknown: u32,
    lowercase: bool,
    strip_accents: bool,
    marks: CharacterClass,
    punctuation: CharacterClass,
    control: CharacterClass,
}

/// A set of characters as sorted ranges.
#[derive(Debug)]
struct CharacterClass(Vec<ClassUnicodeRange>);

impl CharacterClass {
    /// The class that `pattern` writes in the syntax of regular expressions.
    fn new(pattern: &str) -> CharacterClass {
        let parsed = regex_syntax::parse(pattern).expect("the pattern is one of this file");
        match parsed.into_kind() {
            HirKind::Class(Class::Unicode(class)) => CharacterClass(class.ranges().to_vec()),
            _ => unreachable!("the patterns of this file are classes"),
        }
    }

    fn contains(&self, character: char) -> bool {
        let after = self.0.partition_point(|range| range.start() <= character);
        after > 0 && character <= self.0[after - 1].end()
    }
}

impl WordPieces {
    pub fn new(vocabulary: &Vocabulary) -> Result<WordPieces> {
        let data = &vocabulary.data;
        let Some(unknown) = data.unknown else {
            return Err(Error::invalid("tokenizer.ggml.unknown_token_id", "no unknown token", "one"));
        };
        let mut ids = Map::default();
        let mut longest = 0;
        for (id, text) in data.tokens.iter().enumerate() {
            if vocabulary.is_text(id as u32) {
                longest = longest.max(text.len());
                ids.insert(text.as_str().into(), id as u32);
            }
        }
        let lowercase = data.lowercase.unwrap_or(true);
        Ok(WordPieces {
            ids,
            longest,
            unknown,
            lowercase,
            strip_accents: data.strip_accents.unwrap_or(lowercase),
            marks: CharacterClass::new(r"\p{Mn}"),
            punctuation: CharacterClass::new(r"[\p{P}!-/:-@\[-`{-~]"),
            control: CharacterClass::new(r"[\p{Cc}\p{Cf}\p{Co}]"),
        })
    }

    /// Appends the ids of `text`.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        let mut word = String::new();
        for character in text.chars() {
            if character.is_whitespace() {
                self.finish_word(&mut word, ids);
            } else if character == '\u{fffd}' || self.control.contains(character) {
                // Cleaned away, as the original does.
            } else if self.strip_accents {
                for part in character.nfd().filter(|c| !self.marks.contains(*c)) {
                    self.add(part, &mut word, ids);
                }
            } else {
                self.add(character, &mut word, ids);
            }
        }
        self.finish_word(&mut word, ids);
    }

    /// Adds a character to the word, or ends it: punctuation and ideographs are words of their own.
    fn add(&self, character: char, word: &mut String, ids: &mut Vec<u32>) {
        let alone = self.punctuation.contains(character) || is_ideograph(character);
        if alone {
            self.finish_word(word, ids);
        }
        if self.lowercase {
            word.extend(character.to_lowercase());
        } else {
            word.push(character);
        }
        if alone {
            self.finish_word(word, ids);
        }
    }

    /// Appends the pieces of `word` and empties it.
    fn finish_word(&self, word: &mut String, ids: &mut Vec<u32>) {
        if word.is_empty() {
            return;
        }
        if word.chars().count() > WORD_CHARACTERS_MAX {
            ids.push(self.unknown);
            word.clear();
            return;
        }
        word.insert(0, SPACE_MARK);
        let from = ids.len();
        let mut rest = word.as_str();
        while !rest.is_empty() {
            let mut end = rest.len().min(self.longest);
            let found = loop {
                if end == 0 {
                    break None;
                }
                if rest.is_char_boundary(end)
                    && let Some(id) = self.ids.get(&rest[..end])
                {
                    break Some(*id);
                }
                end -= 1;
            };
            let Some(id) = found else {
                ids.truncate(from);
                ids.push(self.unknown);
                break;
            };
            ids.push(id);
            rest = &rest[end..];
        }
        word.clear();
    }
}

/// The ideographs that the original sets apart, its gap in extension E included.
fn is_ideograph(character: char) -> bool {
    matches!(u32::from(character),
        0x4e00..=0x9fff
        | 0x3400..=0x4dbf
        | 0x20000..=0x2a6df
        | 0x2a700..=0x2b73f
        | 0x2b740..=0x2b81f
        | 0x2b920..=0x2ceaf
        | 0xf900..=0xfaff
        | 0x2f800..=0x2fa1f)
}
