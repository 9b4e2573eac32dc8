use crate::{Error, Result};

use super::{Model, TokenKind, Tokenizer};

/// Turns ids into text one by one; a character that is spread over several tokens appears with its last.
///
/// Control tokens give no text; [`StreamDecoder::showing_control_tokens`] writes them out. Bytes that are no UTF-8 become
/// U+FFFD, one for each maximal invalid run, as `String::from_utf8_lossy` does.
#[derive(Debug)]
pub struct StreamDecoder<'t> {
    tokenizer: &'t Tokenizer,
    /// At most three bytes of an unfinished character.
    pending: Vec<u8>,
    text: String,
    show_control: bool,
    /// The space that encoding put in front has not been removed yet.
    at_start: bool,
}

impl<'t> StreamDecoder<'t> {
    /// A decoder at the start of a text.
    #[must_use]
    pub fn new(tokenizer: &'t Tokenizer) -> StreamDecoder<'t> {
        let at_start = match tokenizer.model {
            Model::SentencePieces(_) => tokenizer.vocabulary.add_space_prefix,
            Model::WordPieces(_) => true,
            Model::BytePairs(_) => false,
        };
        StreamDecoder { tokenizer, pending: Vec::new(), text: String::new(), show_control: false, at_start }
    }

    /// A decoder in the middle of a text, which keeps a leading space: for what a model adds to a prompt.
    #[must_use]
    pub fn continuing(tokenizer: &'t Tokenizer) -> StreamDecoder<'t> {
        StreamDecoder { at_start: false, ..StreamDecoder::new(tokenizer) }
    }

    /// Writes control tokens as the vocabulary spells them.
    #[must_use]
    pub fn showing_control_tokens(self) -> StreamDecoder<'t> {
        StreamDecoder { show_control: true, ..self }
    }

    /// The text that `id` completes; valid until the next call.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an id beyond the vocabulary.
    pub fn push(&mut self, id: u32) -> Result<&str> {
        self.text.clear();
        let (Some(mut bytes), Some(kind)) = (self.tokenizer.token_bytes(id), self.tokenizer.token_kind(id))
        else {
            let count = self.tokenizer.token_count();
            return Err(Error::invalid("token ids", format!("token {id}"), format!("a token below {count}")));
        };
        if matches!(kind, TokenKind::Control | TokenKind::Unknown) {
            if !self.show_control {
                return Ok("");
            }
        } else if std::mem::take(&mut self.at_start) {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.pending.extend_from_slice(bytes);
        let mut kept = 0;
        for chunk in self.pending.utf8_chunks() {
            self.text.push_str(chunk.valid());
            kept += chunk.valid().len();
            let invalid = chunk.invalid();
            // Only the last run can still become a character, and only if it is a proper beginning of one.
            if invalid.is_empty() || (kept + invalid.len() == self.pending.len() && begins_character(invalid))
            {
                break;
            }
            self.text.push(char::REPLACEMENT_CHARACTER);
            kept += invalid.len();
        }
        self.pending.drain(..kept);
        Ok(&self.text)
    }

    /// What is left at the end: U+FFFD if a character was never completed, else nothing.
    pub fn finish(&mut self) -> &str {
        self.text.clear();
        if !self.pending.is_empty() {
            self.pending.clear();
            self.text.push(char::REPLACEMENT_CHARACTER);
        }
        &self.text
    }
}

/// Whether more bytes could turn `bytes` into a character.
fn begins_character(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|e| e.valid_up_to() == 0 && e.error_len().is_none())
}
