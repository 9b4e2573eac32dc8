use crate::{Error, Result};

use super::{Map, SPACE_MARK, byte_alphabet, pre_tokenizer};

/// The largest vocabulary that is accepted, in tokens.
pub const MAX_TOKENS: usize = 1 << 22;

/// A vocabulary as a model file states it, not yet checked.
///
/// Fields that a file leaves out stay `None` or empty; [`Tokenizer::new`](crate::Tokenizer::new) then takes what is usual
/// for the model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct VocabularyData {
    /// The algorithm: `llama` (SentencePiece), `gpt2` (byte-level pairs), `gemma4` (character pairs) or `bert`.
    pub model: String,
    /// The rule by which byte-level models cut text into words (`qwen2`, `llama-bpe`, …); may be empty.
    pub pre: String,
    /// The name of the model, by which a few vocabularies with rules of their own are told.
    pub name: String,
    /// The tokens' spellings; the place in this list is the id.
    pub tokens: Vec<String>,
    /// A score for each token (SentencePiece only).
    pub scores: Vec<f32>,
    /// The kind of each token, numbered as in GGUF: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_types: Vec<i32>,
    /// Pairs of tokens, separated by a space, in the order in which they merge (byte pairs only).
    pub merges: Vec<String>,
    /// The token that begins a sequence.
    pub bos: Option<u32>,
    /// The token that ends a sequence.
    pub eos: Option<u32>,
    /// The token that ends a turn of a conversation.
    pub eot: Option<u32>,
    /// The token that ends a message inside a turn.
    pub eom: Option<u32>,
    /// The token for text that no other token covers.
    pub unknown: Option<u32>,
    /// The token between two texts (BERT).
    pub separator: Option<u32>,
    /// The token that fills up batches.
    pub padding: Option<u32>,
    /// Whether encoding puts `bos` in front.
    pub add_bos: Option<bool>,
    /// Whether encoding puts `eos` at the end.
    pub add_eos: Option<bool>,
    /// Whether encoding puts a space in front of a text (SentencePiece).
    pub add_space_prefix: Option<bool>,
    /// Whether text is put into lower case (BERT).
    pub lowercase: Option<bool>,
    /// Whether accents are dropped (BERT); as `lowercase` when not stated.
    pub strip_accents: Option<bool>,
}

/// What a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TokenKind {
    /// A piece of text.
    Normal,
    /// Stands for what the vocabulary cannot write.
    Unknown,
    /// Steers the model and is no text: begin, end, roles.
    Control,
    /// Text that is always cut out as a whole, before anything else.
    UserDefined,
    /// A place that the model never uses.
    Unused,
    /// One byte, for characters that have no token.
    Byte,
}

/// Spellings that end generation wherever they are control tokens or name the end of a turn.
const END_TEXTS: [&str; 18] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<EOT>",
    "[EOT]",
    "<eos>",
    "<turn|>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
];

/// A checked vocabulary.
#[derive(Debug)]
pub(super) struct Vocabulary {
    pub data: VocabularyData,
    pub kinds: Vec<TokenKind>,
    pub ids: Map<String, u32>,
    /// Ids that end generation, ascending.
    pub ends: Vec<u32>,
    /// Put in front of and behind an encoded text on request.
    pub first: Option<u32>,
    pub last: Option<u32>,
    pub add_space_prefix: bool,
    /// White space after these tokens belongs to them.
    pub specials_take_space: bool,
    /// All tokens' bytes, one after the other, and where each ends.
    bytes: Vec<u8>,
    byte_ends: Vec<usize>,
}

impl Vocabulary {
    pub fn new(mut data: VocabularyData) -> Result<Vocabulary> {
        let count = data.tokens.len();
        if count == 0 {
            return Err(Error::invalid("tokenizer.ggml.tokens", "no tokens", "at least one"));
        }
        if count > MAX_TOKENS {
            let what = "the number of tokens";
            return Err(Error::limit("tokenizer.ggml.tokens", what, count as u64, MAX_TOKENS as u64));
        }
        for (key, length) in [("scores", data.scores.len()), ("token_type", data.token_types.len())] {
            // Some converters pad these lists; more than tokens is harmless, fewer is not.
            if length != 0 && length < count {
                let place = format!("tokenizer.ggml.{key}");
                return Err(Error::invalid(
                    place,
                    format!("{length} entries"),
                    format!("one for each of {count} tokens"),
                ));
            }
        }
        let mut kinds = kinds(&data)?;
        let mut ids = Map::with_capacity_and_hasher(count, foldhash::fast::RandomState::default());
        for (id, text) in data.tokens.iter_mut().enumerate() {
            if text.is_empty() {
                // A padded place: give it a name of its own, as other readers of GGUF do.
                *text = format!("[EMPTY_{id}]");
                kinds[id] = TokenKind::Unused;
            }
            if let Some(first) = ids.insert(text.clone(), id as u32) {
                let what = format!("tokens {first} and {id} are both {text:?}");
                return Err(Error::invalid("tokenizer.ggml.tokens", what, "every token once"));
            }
        }
        special_ids(&mut data)?;
        let ends = ends(&data, &mut kinds, &ids);

        let byte_pairs = matches!(data.model.as_str(), "gpt2" | "gemma4");
        let rule = if byte_pairs { Some(pre_tokenizer::rule(&data)?) } else { None };
        let default_bos = match data.model.as_str() {
            "llama" | "bert" | "gemma4" => true,
            _ => rule.is_some_and(|r| r.add_bos),
        };
        let bert = data.model == "bert";
        let first = if data.add_bos.unwrap_or(default_bos) { data.bos } else { None };
        let last = if bert {
            data.separator
        } else if data.add_eos.unwrap_or(false) {
            data.eos
        } else {
            None
        };
        let add_space_prefix = data.add_space_prefix.unwrap_or(data.model == "llama");
        let name = data.name.to_lowercase();
        let specials_take_space = name.contains("phi-3") || name.contains("phi3");

        let (bytes, byte_ends) = bytes(&data, &kinds, rule.is_some_and(|r| r.byte_level))?;
        Ok(Vocabulary {
            data,
            kinds,
            ids,
            ends,
            first,
            last,
            add_space_prefix,
            specials_take_space,
            bytes,
            byte_ends,
        })
    }

    /// The bytes that token `id` adds to a text.
    pub fn bytes_of(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        let end = *self.byte_ends.get(id)?;
        let start = if id == 0 { 0 } else { self.byte_ends[id - 1] };
        Some(&self.bytes[start..end])
    }

    /// Whether `id` can come out of ordinary text.
    pub fn is_text(&self, id: u32) -> bool {
        matches!(self.kinds[id as usize], TokenKind::Normal | TokenKind::UserDefined | TokenKind::Unused)
    }

    /// The tokens for the 256 bytes as `<0x00>` … `<0xFF>`, where the vocabulary has them.
    pub fn hexadecimal_bytes(&self) -> [Option<u32>; 256] {
        std::array::from_fn(|byte| self.ids.get(format!("<0x{byte:02X}>").as_str()).copied())
    }
}

fn kinds(data: &VocabularyData) -> Result<Vec<TokenKind>> {
    if data.token_types.is_empty() {
        let kind =
            |text: &String| if hexadecimal(text).is_some() { TokenKind::Byte } else { TokenKind::Normal };
        return Ok(data.tokens.iter().map(kind).collect());
    }
    let mut kinds = Vec::with_capacity(data.tokens.len());
    for (id, kind) in data.token_types.iter().take(data.tokens.len()).enumerate() {
        kinds.push(match kind {
            1 => TokenKind::Normal,
            2 => TokenKind::Unknown,
            3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            // 0 is "undefined" in GGUF: written by converters that did not care.
            0 | 5 => TokenKind::Unused,
            6 => TokenKind::Byte,
            _ => {
                let place = format!("tokenizer.ggml.token_type, token {id}");
                return Err(Error::invalid(place, format!("kind {kind}"), "a number from 0 to 6"));
            }
        });
    }
    Ok(kinds)
}

/// Fills in the ids that are usual for the model and checks all of them.
fn special_ids(data: &mut VocabularyData) -> Result<()> {
    let count = data.tokens.len();
    let usual: (Option<u32>, Option<u32>, Option<u32>, Option<u32>) = match data.model.as_str() {
        "llama" => (Some(1), Some(2), Some(0), None),
        "bert" => (Some(101), None, Some(100), Some(102)),
        _ => (None, None, None, None),
    };
    let present = |id: &u32| (*id as usize) < count;
    data.bos = data.bos.or(usual.0.filter(present));
    data.eos = data.eos.or(usual.1.filter(present));
    data.unknown = data.unknown.or(usual.2.filter(present));
    data.separator = data.separator.or(usual.3.filter(present));
    let named = [
        ("bos_token_id", data.bos),
        ("eos_token_id", data.eos),
        ("eot_token_id", data.eot),
        ("eom_token_id", data.eom),
        ("unknown_token_id", data.unknown),
        ("seperator_token_id", data.separator),
        ("padding_token_id", data.padding),
    ];
    for (key, id) in named {
        if let Some(id) = id.filter(|id| !present(id)) {
            let place = format!("tokenizer.ggml.{key}");
            return Err(Error::invalid(place, format!("token {id}"), format!("a token below {count}")));
        }
    }
    Ok(())
}

/// The tokens that end generation, and their kinds put right where a converter called them text.
fn ends(data: &VocabularyData, kinds: &mut [TokenKind], ids: &Map<String, u32>) -> Vec<u32> {
    let mut ends: Vec<u32> = [data.eos, data.eot, data.eom].into_iter().flatten().collect();
    let harmony = ["<|return|>", "<|call|>"].iter().all(|text| ids.contains_key(*text));
    for text in END_TEXTS {
        // In the harmony format "<|end|>" only separates messages.
        if text == "<|end|>" && harmony {
            continue;
        }
        if let Some(id) = ids.get(text) {
            ends.push(*id);
            if kinds[*id as usize] == TokenKind::Normal {
                kinds[*id as usize] = TokenKind::Control;
            }
        }
    }
    ends.sort_unstable();
    ends.dedup();
    ends
}

/// The byte that a token spelled `<0x41>` stands for.
fn hexadecimal(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

fn bytes(data: &VocabularyData, kinds: &[TokenKind], byte_level: bool) -> Result<(Vec<u8>, Vec<usize>)> {
    let mut bytes = Vec::with_capacity(data.tokens.iter().map(String::len).sum());
    let mut ends = Vec::with_capacity(kinds.len());
    for (id, (text, kind)) in data.tokens.iter().zip(kinds).enumerate() {
        match kind {
            TokenKind::Byte => match hexadecimal(text) {
                Some(byte) => bytes.push(byte),
                None => {
                    let place = format!("tokenizer.ggml.tokens, token {id}");
                    return Err(Error::invalid(
                        place,
                        format!("the byte token {text:?}"),
                        "a spelling like <0x41>",
                    ));
                }
            },
            TokenKind::Unknown | TokenKind::Control | TokenKind::UserDefined => bytes.extend(text.bytes()),
            TokenKind::Normal | TokenKind::Unused if byte_level => {
                let start = bytes.len();
                bytes.extend(text.chars().map_while(byte_alphabet::byte));
                if bytes.len() - start != text.chars().count() {
                    bytes.truncate(start);
                    bytes.extend(text.bytes());
                }
            }
            TokenKind::Normal | TokenKind::Unused => {
                let mut buffer = [0; 4];
                for character in text.chars() {
                    let character = if character == SPACE_MARK { ' ' } else { character };
                    bytes.extend(character.encode_utf8(&mut buffer).bytes());
                }
            }
        }
        ends.push(bytes.len());
    }
    Ok((bytes, ends))
}
