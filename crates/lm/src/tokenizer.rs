//! Text to token ids and back, for the vocabularies that GGUF files carry.

pub(crate) mod byte_alphabet;
mod byte_pairs;
mod merging;
mod metadata;
pub(crate) mod pre_tokenizer;
mod sentence_pieces;
mod special_tokens;
mod stream;
mod vocabulary;
mod word_pieces;

use lightering_formats::gguf::Metadata;

use crate::{Error, Result};

use byte_pairs::BytePairs;
use sentence_pieces::SentencePieces;
use special_tokens::{Fragment, SpecialTokens};
use vocabulary::Vocabulary;
use word_pieces::WordPieces;

pub use stream::StreamDecoder;
pub use vocabulary::{MAX_TOKENS, TokenKind, VocabularyData};

/// The longest text that [`Tokenizer::encode`] takes, in bytes.
pub const MAX_TEXT_BYTES: usize = 1 << 30;

/// The mark that stands for a space inside the tokens of SentencePiece vocabularies (U+2581).
pub(crate) const SPACE_MARK: char = '\u{2581}';

/// A map whose hash is seeded, so that a vocabulary cannot be written to collide in it.
pub(crate) type Map<K, V> = std::collections::HashMap<K, V, foldhash::fast::RandomState>;

/// What turns a piece of text without special tokens into ids.
#[derive(Debug)]
enum Model {
    BytePairs(BytePairs),
    SentencePieces(SentencePieces),
    WordPieces(WordPieces),
}

/// A vocabulary with its rules: encodes text into token ids and decodes them.
///
/// It is immutable and can be shared between threads.
#[derive(Debug)]
pub struct Tokenizer {
    vocabulary: Vocabulary,
    model: Model,
    specials: SpecialTokens,
}

impl Tokenizer {
    /// Checks a vocabulary and prepares it; the work is linear in its size.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a vocabulary that contradicts itself (duplicate tokens, merges of unknown tokens, ids beyond
    /// the end), [`Error::Unsupported`] for a model or pre-tokenizer that is not known, and
    /// [`Error::Limit`] for more than [`MAX_TOKENS`] tokens.
    pub fn new(data: VocabularyData) -> Result<Tokenizer> {
        let vocabulary = Vocabulary::new(data)?;
        let model = match vocabulary.data.model.as_str() {
            "gpt2" | "gemma4" => Model::BytePairs(BytePairs::new(&vocabulary)?),
            "llama" => Model::SentencePieces(SentencePieces::new(&vocabulary)?),
            "bert" => Model::WordPieces(WordPieces::new(&vocabulary)?),
            other => {
                return Err(Error::unsupported(
                    "tokenizer.ggml.model",
                    format!("the tokenizer model \"{other}\""),
                ));
            }
        };
        let specials = SpecialTokens::new(&vocabulary)?;
        Ok(Tokenizer { vocabulary, model, specials })
    }

    /// The tokenizer of a GGUF file.
    ///
    /// # Errors
    /// Those of [`VocabularyData::from_gguf`] and [`Tokenizer::new`].
    pub fn from_gguf(metadata: &Metadata) -> Result<Tokenizer> {
        Tokenizer::new(VocabularyData::from_gguf(metadata)?)
    }

    /// The token ids of a conversation as its chat template wrote it: what the template spells as control tokens becomes
    /// them, and the token for the beginning of a sequence is added where the vocabulary wants one and the template has
    /// not written it itself, as many do.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_rendered(&self, rendered: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(rendered, false, true)?;
        if let Some(bos) = self.bos()
            && self.adds_bos()
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// The token ids of `text`.
    ///
    /// `add_special` puts the tokens around it that the model was trained with (beginning of sequence and so on, as the
    /// vocabulary says). `parse_special` turns the spelling of a control token in the text into that token; leave it off
    /// for text that comes from a user. The time is `O(n log n)` in the bytes of `text`.
    ///
    /// # Errors
    /// [`Error::Limit`] for a text of more than [`MAX_TEXT_BYTES`], and [`Error::Invalid`] for a text with bytes for which
    /// the vocabulary has neither a token nor an unknown token.
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(Error::limit("text", "its size in bytes", text.len() as u64, MAX_TEXT_BYTES as u64));
        }
        let mut ids = Vec::with_capacity(text.len() / 4 + 2);
        if add_special {
            ids.extend(self.vocabulary.first);
        }
        // The start of a text counts like the place after a special token.
        let mut after_special = true;
        let mut byte_pairs = byte_pairs::Scratch::default();
        let mut sentence_pieces = sentence_pieces::Scratch::default();
        self.specials.split(text, parse_special, &mut |fragment| match fragment {
            Fragment::Token(id) => {
                ids.push(id);
                after_special = true;
            }
            Fragment::Text(piece) => {
                let unguarded;
                let piece = if parse_special && piece.contains(special_tokens::GUARD) {
                    unguarded = piece.replace(special_tokens::GUARD, "");
                    unguarded.as_str()
                } else {
                    piece
                };
                match &self.model {
                    Model::BytePairs(model) => model.encode(piece, &mut byte_pairs, &mut ids),
                    Model::SentencePieces(model) => {
                        let prefix = after_special && self.vocabulary.add_space_prefix;
                        model.encode(piece, prefix, &mut sentence_pieces, &mut ids);
                    }
                    Model::WordPieces(model) => model.encode(piece, &mut ids),
                }
                after_special = false;
            }
        });
        if ids.contains(&merging::NONE) {
            let what = "bytes without a token, in a vocabulary without an unknown token";
            return Err(Error::invalid("text", what, "text that the vocabulary can write"));
        }
        if add_special {
            ids.extend(self.vocabulary.last);
        }
        Ok(ids)
    }

    /// `text` for a place in a prompt that is encoded with `parse_special`: what is spelled like a control token in it stays
    /// text. It holds invisible marks (U+FDD0) for that, which encoding drops; the same character in `text` is lost.
    #[must_use]
    pub fn guard(&self, text: &str) -> String {
        self.specials.guard(text)
    }

    /// The text of `ids`, control tokens left out; bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an id beyond the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let mut decoder = StreamDecoder::new(self);
        let mut text = String::new();
        for id in ids {
            text.push_str(decoder.push(*id)?);
        }
        text.push_str(decoder.finish());
        Ok(text)
    }

    /// The number of tokens.
    #[must_use]
    pub fn token_count(&self) -> usize {
        self.vocabulary.data.tokens.len()
    }

    /// How the vocabulary spells token `id`, marks for spaces and bytes included.
    #[must_use]
    pub fn token_text(&self, id: u32) -> Option<&str> {
        self.vocabulary.data.tokens.get(id as usize).map(String::as_str)
    }

    /// The bytes that token `id` adds to a text; a control token adds its spelling.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.vocabulary.bytes_of(id)
    }

    /// What kind of token `id` is.
    #[must_use]
    pub fn token_kind(&self, id: u32) -> Option<TokenKind> {
        self.vocabulary.kinds.get(id as usize).copied()
    }

    /// The id of the token that the vocabulary spells exactly so.
    #[must_use]
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.vocabulary.ids.get(text).copied()
    }

    /// Whether generation ends with this token.
    #[must_use]
    pub fn is_end(&self, id: u32) -> bool {
        self.vocabulary.ends.binary_search(&id).is_ok()
    }

    /// The tokens that end generation, in ascending order.
    #[must_use]
    pub fn end_tokens(&self) -> &[u32] {
        &self.vocabulary.ends
    }

    /// The token at the beginning of a sequence, whether or not `encode` adds it.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.vocabulary.data.bos
    }

    /// The token at the end of a sequence.
    #[must_use]
    pub fn eos(&self) -> Option<u32> {
        self.vocabulary.data.eos
    }

    /// Whether `encode` with `add_special` puts the beginning-of-sequence token in front.
    #[must_use]
    pub fn adds_bos(&self) -> bool {
        self.vocabulary.first.is_some()
    }
}
