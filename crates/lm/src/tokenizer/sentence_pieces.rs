//! SentencePiece's byte-pair model: the neighbours whose joint token has the best score merge first; characters that no
//! token covers are written as bytes (Kudo and Richardson, 2018; `sentencepiece`'s `bpe_model.cc`).

use crate::{Error, Result};

use super::merging::{Merger, NONE, Pairs, Symbol};
use super::vocabulary::Vocabulary;
use super::{Map, SPACE_MARK};

#[derive(Debug)]
pub(super) struct SentencePieces {
    pieces: Pieces,
    /// The token for each byte, the unknown token where there is none, or [`NONE`] without even that.
    bytes: [u32; 256],
    /// No token reaches over the beginning of a word, so that words can be encoded one by one.
    words_stand_alone: bool,
}

#[derive(Debug)]
struct Pieces {
    /// The priority (smaller is better) and the id of every token that can come out of text.
    ids: Map<Box<[u8]>, (u32, u32)>,
    longest: usize,
}

/// Buffers that are kept within one text.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    merger: Merger,
    escaped: String,
    words: super::byte_pairs::WordCache,
}

impl Pairs for Pieces {
    fn pair(&self, text: &[u8], left: &Symbol, right: &Symbol) -> Option<(u32, u32)> {
        let piece = &text[left.start as usize..right.end as usize];
        if piece.len() > self.longest {
            return None;
        }
        self.ids.get(piece).copied()
    }
}

/// An order-reversing map of a score to integers.
fn priority(score: f32) -> u32 {
    // Adding zero makes both zeros one.
    let bits = (score + 0.0).to_bits();
    let ascending = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    !ascending
}

impl SentencePieces {
    pub fn new(vocabulary: &Vocabulary) -> Result<SentencePieces> {
        let data = &vocabulary.data;
        if data.scores.is_empty() {
            return Err(Error::invalid("tokenizer.ggml.scores", "no scores", "one for each token"));
        }
        let mut ids = Map::default();
        let mut longest = 0;
        let mut words_stand_alone = true;
        for (id, text) in data.tokens.iter().enumerate() {
            if !vocabulary.is_text(id as u32) {
                continue;
            }
            let score = data.scores[id];
            if !score.is_finite() {
                let place = format!("tokenizer.ggml.scores, token {id}");
                return Err(Error::invalid(place, score, "a finite number"));
            }
            longest = longest.max(text.len());
            words_stand_alone &= !reaches_over_word(text);
            ids.insert(text.as_bytes().into(), (priority(score), id as u32));
        }
        let mut bytes = vocabulary.hexadecimal_bytes().map(|id| id.unwrap_or(NONE));
        for (byte, id) in bytes.iter_mut().enumerate().filter(|(_, id)| **id == NONE) {
            // As a last resort a one-character token, then the unknown token.
            let single = ids.get(&[byte as u8][..]).map(|(_, id)| *id);
            *id = single.or(data.unknown).unwrap_or(NONE);
        }
        Ok(SentencePieces { pieces: Pieces { ids, longest }, bytes, words_stand_alone })
    }

    /// Appends the ids of `text`, with a space in front of it if `space_prefix` says so; [`NONE`] for bytes that cannot
    /// be written.
    pub fn encode(&self, text: &str, space_prefix: bool, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        let Scratch { merger, escaped, words } = scratch;
        escaped.clear();
        if space_prefix {
            escaped.push(SPACE_MARK);
        }
        escape_spaces(text, escaped);
        if !self.words_stand_alone {
            return self.encode_word(escaped, merger, ids);
        }
        for word in words_of(escaped) {
            words.encode(word, ids, |ids| self.encode_word(word, merger, ids));
        }
    }

    fn encode_word(&self, word: &str, merger: &mut Merger, ids: &mut Vec<u32>) {
        merger.clear();
        for (start, character) in word.char_indices() {
            let end = start + character.len_utf8();
            let token = self.pieces.ids.get(&word.as_bytes()[start..end]).map_or(NONE, |(_, id)| *id);
            merger.push(start, end, token);
        }
        merger.merge(&self.pieces, word.as_bytes(), |symbol| {
            if symbol.token != NONE {
                ids.push(symbol.token);
                return;
            }
            let bytes = &word.as_bytes()[symbol.start as usize..symbol.end as usize];
            ids.extend(bytes.iter().map(|byte| self.bytes[usize::from(*byte)]));
        });
    }
}

/// Appends `text` with marks in the place of spaces.
pub(super) fn escape_spaces(text: &str, escaped: &mut String) {
    escaped.reserve(text.len() + text.len() / 4);
    for (index, part) in text.split(' ').enumerate() {
        if index > 0 {
            escaped.push(SPACE_MARK);
        }
        escaped.push_str(part);
    }
}

/// Whether a token has a space mark behind another character.
pub(super) fn reaches_over_word(token: &str) -> bool {
    token.trim_start_matches(SPACE_MARK).contains(SPACE_MARK)
}

/// Cuts an escaped text before every run of space marks.
pub(super) fn words_of(escaped: &str) -> impl Iterator<Item = &str> {
    let mut rest = escaped;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let body = rest.trim_start_matches(SPACE_MARK);
        let marks = rest.len() - body.len();
        let end = marks + body.find(SPACE_MARK).unwrap_or(body.len());
        let (word, left) = rest.split_at(end);
        rest = left;
        Some(word)
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn better_scores_come_first() {
        let scores = [3.5, 0.0, -0.5, -1e9];
        for pair in scores.windows(2) {
            assert!(super::priority(pair[0]) < super::priority(pair[1]), "{pair:?}");
        }
        assert_eq!(super::priority(0.0), super::priority(-0.0));
    }

    #[test]
    fn words_begin_with_their_spaces() {
        let words: Vec<_> = super::words_of("a▁▁b▁cd▁").collect();
        assert_eq!(words, ["a", "▁▁b", "▁cd", "▁"]);
    }
}
