//! Vocabularies out of GGUF's metadata.

use lightering_formats::gguf::Metadata;

use crate::{Error, Result};

use super::VocabularyData;

impl VocabularyData {
    /// The vocabulary that a GGUF file carries under `tokenizer.ggml.*`.
    ///
    /// # Errors
    /// [`Error::Format`] for a key that is missing or of another type, and [`Error::Invalid`] for a token id that does not
    /// fit in 32 bits. Whether the vocabulary makes sense is checked by [`Tokenizer::new`](crate::Tokenizer::new).
    pub fn from_gguf(metadata: &Metadata) -> Result<VocabularyData> {
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        let id = |name: &str| -> Result<Option<u32>> {
            let Some(number) = metadata.get_u64(&key(name))? else { return Ok(None) };
            let too_large = |_| Error::invalid(key(name), number, "the id of a token");
            u32::try_from(number).map(Some).map_err(too_large)
        };
        let flag = |name: &str| metadata.get_bool(&key(name));
        let text =
            |name: &str| -> Result<String> { Ok(metadata.get_str(name)?.unwrap_or_default().to_owned()) };
        Ok(VocabularyData {
            model: metadata.require_str(&key("model"))?.to_owned(),
            pre: text(&key("pre"))?,
            name: text("general.name")?,
            tokens: metadata.require_strings(&key("tokens"))?.to_vec(),
            scores: metadata.get_f32s(&key("scores"))?.unwrap_or_default().to_vec(),
            token_types: metadata.get_i32s(&key("token_type"))?.unwrap_or_default().to_vec(),
            merges: metadata.get_strings(&key("merges"))?.unwrap_or_default().to_vec(),
            // BERT's first token has a name of its own in some files.
            bos: id("bos_token_id")?.or(id("cls_token_id")?),
            eos: id("eos_token_id")?,
            eot: id("eot_token_id")?,
            eom: id("eom_token_id")?,
            unknown: id("unknown_token_id")?,
            // Written so in the format.
            separator: id("seperator_token_id")?,
            padding: id("padding_token_id")?,
            add_bos: flag("add_bos_token")?,
            add_eos: flag("add_eos_token")?,
            add_space_prefix: flag("add_space_prefix")?,
            lowercase: flag("normalizer.lowercase")?,
            strip_accents: flag("normalizer.strip_accents")?,
        })
    }
}
