//! Byte-pair encoding: the pair that stands first in the list of merges merges first (Sennrich et al., 2016), on bytes
//! (Radford et al., 2019) or, for the `gemma4` family, on characters with bytes as a fall-back.

use crate::{Error, Result};

use super::merging::{Merger, NONE, Pairs, Symbol};
use super::pre_tokenizer::{self, PreTokenizer};
use super::sentence_pieces::{escape_spaces, reaches_over_word, words_of};
use super::vocabulary::Vocabulary;
use super::{Map, byte_alphabet};

#[derive(Debug)]
pub(super) struct BytePairs {
    words: PreTokenizer,
    merges: Merges,
    /// The token for each byte, the unknown token where there is none, or [`NONE`] without even that.
    bytes: [u32; 256],
    /// The tokens of one character, for vocabularies that are not byte-level.
    characters: Option<Map<char, u32>>,
    /// Words that are tokens are taken whole, without merging.
    whole_words: Map<Box<[u8]>, u32>,
    words_stand_alone: bool,
}

#[derive(Debug)]
struct Merges(Map<(u32, u32), (u32, u32)>);

impl Pairs for Merges {
    fn pair(&self, _: &[u8], left: &Symbol, right: &Symbol) -> Option<(u32, u32)> {
        self.0.get(&(left.token, right.token)).copied()
    }
}

/// Buffers that are kept within one text.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    merger: Merger,
    escaped: String,
    words: WordCache,
}

/// The ids of words that have been seen in this text.
#[derive(Debug, Default)]
pub(super) struct WordCache {
    places: Map<Box<str>, (u32, u32)>,
    ids: Vec<u32>,
}

/// Words of more bytes than this are rare, so that keeping them only costs memory.
const CACHED_WORD_BYTES: usize = 48;
/// The most words that are kept.
const CACHED_WORDS: usize = 1 << 16;

impl WordCache {
    pub fn encode(&mut self, word: &str, ids: &mut Vec<u32>, encode: impl FnOnce(&mut Vec<u32>)) {
        if word.len() > CACHED_WORD_BYTES {
            return encode(ids);
        }
        if let Some((start, end)) = self.places.get(word) {
            ids.extend_from_slice(&self.ids[*start as usize..*end as usize]);
            return;
        }
        let from = ids.len();
        encode(ids);
        if self.places.len() < CACHED_WORDS {
            let start = self.ids.len() as u32;
            self.ids.extend_from_slice(&ids[from..]);
            self.places.insert(word.into(), (start, self.ids.len() as u32));
        }
    }
}

impl BytePairs {
    pub fn new(vocabulary: &Vocabulary) -> Result<BytePairs> {
        let data = &vocabulary.data;
        let rule = pre_tokenizer::rule(data)?;
        if data.merges.is_empty() {
            return Err(Error::invalid(
                "tokenizer.ggml.merges",
                "no merges",
                "the merges of a byte-pair vocabulary",
            ));
        }
        let merges = merges(vocabulary)?;
        let spelled: [Option<u32>; 256] = if rule.byte_level {
            let mut buffer = [0; 4];
            std::array::from_fn(|byte| {
                let text = byte_alphabet::character(byte as u8).encode_utf8(&mut buffer);
                vocabulary.ids.get(&*text).copied()
            })
        } else {
            vocabulary.hexadecimal_bytes()
        };
        let bytes = spelled.map(|id| id.or(data.unknown).unwrap_or(NONE));
        let texts = || (0..data.tokens.len() as u32).filter(|id| vocabulary.is_text(*id));
        let mut whole_words = Map::default();
        let mut characters = None;
        let mut words_stand_alone = false;
        if rule.byte_level {
            if rule.whole_words {
                let bytes_of = |id| vocabulary.bytes_of(id).expect("the id is one of the vocabulary");
                whole_words.extend(texts().map(|id| (bytes_of(id).into(), id)));
            }
        } else {
            let mut singles = Map::default();
            words_stand_alone = true;
            for id in texts() {
                let text = data.tokens[id as usize].as_str();
                let mut all = text.chars();
                if let (Some(character), None) = (all.next(), all.next()) {
                    singles.insert(character, id);
                }
                if text.bytes().all(|b| b == b'\n') {
                    whole_words.insert(text.as_bytes().into(), id);
                }
                words_stand_alone &= !reaches_over_word(text);
            }
            characters = Some(singles);
        }
        let words = PreTokenizer::new(rule)?;
        Ok(BytePairs { words, merges, bytes, characters, whole_words, words_stand_alone })
    }

    /// Appends the ids of `text`, [`NONE`] for bytes that cannot be written.
    pub fn encode(&self, text: &str, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        let Scratch { merger, escaped, words } = scratch;
        if self.characters.is_none() {
            self.words.split(text, &mut |word| {
                words.encode(word, ids, |ids| self.encode_word(word, merger, ids));
            });
            return;
        }
        escaped.clear();
        escape_spaces(text, escaped);
        self.words.split(escaped, &mut |line| {
            if self.words_stand_alone {
                for word in words_of(line) {
                    words.encode(word, ids, |ids| self.encode_word(word, merger, ids));
                }
            } else {
                self.encode_word(line, merger, ids);
            }
        });
    }

    fn encode_word(&self, word: &str, merger: &mut Merger, ids: &mut Vec<u32>) {
        if let Some(id) = self.whole_words.get(word.as_bytes()) {
            ids.push(*id);
            return;
        }
        merger.clear();
        if let Some(characters) = &self.characters {
            for (start, character) in word.char_indices() {
                let token = characters.get(&character).copied().unwrap_or(NONE);
                merger.push(start, start + character.len_utf8(), token);
            }
        } else {
            for (start, byte) in word.bytes().enumerate() {
                merger.push(start, start + 1, self.bytes[usize::from(byte)]);
            }
        }
        merger.merge(&self.merges, word.as_bytes(), |symbol| {
            if symbol.token != NONE {
                ids.push(symbol.token);
                return;
            }
            let bytes = &word.as_bytes()[symbol.start as usize..symbol.end as usize];
            ids.extend(bytes.iter().map(|byte| self.bytes[usize::from(*byte)]));
        });
    }
}

fn merges(vocabulary: &Vocabulary) -> Result<Merges> {
    let list = &vocabulary.data.merges;
    let mut merges = Map::with_capacity_and_hasher(list.len(), foldhash::fast::RandomState::default());
    let mut joint = String::new();
    for (rank, merge) in list.iter().enumerate() {
        let place = || format!("tokenizer.ggml.merges, entry {rank}");
        // The first character belongs to the left token even where it is a space.
        let from = merge.chars().next().map_or(0, char::len_utf8);
        let Some(space) = merge[from..].find(' ').map(|at| at + from) else {
            return Err(Error::invalid(place(), format!("{merge:?}"), "two tokens separated by a space"));
        };
        let (left, right) = (&merge[..space], &merge[space + 1..]);
        joint.clear();
        joint.push_str(left);
        joint.push_str(right);
        let id = |text: &str| {
            let expected = "merges of tokens of the vocabulary into one of its tokens";
            let missing = || Error::invalid(place(), format!("{text:?}, which is no token"), expected);
            vocabulary.ids.get(text).copied().ok_or_else(missing)
        };
        let (left, right, joint) = (id(left)?, id(right)?, id(&joint)?);
        merges.entry((left, right)).or_insert((rank as u32, joint));
    }
    Ok(Merges(merges))
}
