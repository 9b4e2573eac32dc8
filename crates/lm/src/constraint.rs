//! Output that keeps to a grammar: which tokens may follow, and whether the text may end.
//!
//! A [`Grammar`] comes from a JSON Schema, a GBNF grammar, a regular expression or nothing but "a JSON object". It is a pushdown
//! automaton over bytes; the sets of places where a text can stand in it become states that are made when they are first
//! met and remembered, so that following a token is a few look-ups. A [`TokenTable`] holds the vocabulary's bytes in
//! order, so that all tokens are tried in one walk that leaves what cannot follow early.

mod automaton;
mod expression;
mod gbnf;
mod json_schema;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::tokenizer::TokenKind;
use crate::{Error, Json, Result, Tokenizer};

use automaton::{Automaton, DEAD, Program, StateId};
use expression::{Expression, Rules};

/// What a text may look like.
#[derive(Debug, Clone)]
pub struct Grammar {
    program: Arc<Program>,
}

impl Grammar {
    /// Texts that are JSON values of this schema.
    ///
    /// Supported: `type` (also a list), `properties` (written in the order in which they stand), `required`,
    /// `additionalProperties`, `items`, `prefixItems`, `minItems`, `maxItems`, `minLength`, `maxLength`, `pattern`,
    /// `minimum`/`maximum`/`exclusiveMinimum`/`exclusiveMaximum` of integers, `enum`, `const`, `anyOf`, `oneOf` (as
    /// `anyOf`), `allOf` of one, `$ref` within the schema, `$defs`, `definitions`. Annotations (`title`, `format`, …) say
    /// nothing about the text. White space is at most a line break with an indentation in each place.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other keywords, which would otherwise be broken silently, [`Error::Invalid`] for a
    /// schema that contradicts itself, [`Error::Limit`] for one that is too large.
    pub fn from_json_schema(schema: &Json) -> Result<Grammar> {
        let mut rules = Rules::default();
        let root = json_schema::translate(schema, &mut rules)?;
        Grammar::compile(root, rules)
    }

    /// Texts that are JSON objects.
    ///
    /// # Errors
    /// None in practice; the type is that of its siblings.
    pub fn json_object() -> Result<Grammar> {
        Grammar::from_json_schema(&Json::from_text(r#"{"type": "object"}"#)?)
    }

    /// Texts that match a regular expression as a whole (the syntax of the `regex` crate, without look-around and word
    /// boundaries).
    ///
    /// # Errors
    /// [`Error::Invalid`] for wrong syntax, [`Error::Unsupported`] for look-around, [`Error::Limit`] for a repetition
    /// that is too large.
    pub fn from_regex(pattern: &str) -> Result<Grammar> {
        let root = expression::from_regex(pattern, &expression::plain_characters)?;
        Grammar::compile(root, Rules::default())
    }

    /// Texts that keep to a grammar in GBNF, llama.cpp's notation, from its rule `root` on.
    ///
    /// # Errors
    /// [`Error::Invalid`] for wrong syntax, with its line, and for names without a rule; [`Error::Unsupported`] for tokens
    /// in the place of text; [`Error::Limit`] for a grammar that is too large.
    pub fn from_gbnf(text: &str) -> Result<Grammar> {
        let mut rules = Rules::default();
        let root = gbnf::parse(text, &mut rules)?;
        Grammar::compile(root, rules)
    }

    fn compile(root: Expression, rules: Rules) -> Result<Grammar> {
        Ok(Grammar { program: Arc::new(Program::new(&root, rules)?) })
    }
}

/// A vocabulary in the order of its bytes; made once for a model and shared by all requests.
#[derive(Debug)]
pub struct TokenTable {
    /// The bytes of all text tokens in ascending order, one after the other.
    bytes: Vec<u8>,
    entries: Vec<Entry>,
    /// The place of each token among the entries, or `u32::MAX`.
    places: Vec<u32>,
    ends: Vec<u32>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    token: u32,
    start: u32,
    length: u32,
    /// How many bytes it has in common with the entry before it.
    shared: u32,
}

impl TokenTable {
    /// The table of a tokenizer's vocabulary.
    #[must_use]
    pub fn new(tokenizer: &Tokenizer) -> TokenTable {
        let text = |id: &u32| {
            matches!(
                tokenizer.token_kind(*id),
                Some(TokenKind::Normal | TokenKind::UserDefined | TokenKind::Byte)
            ) && !tokenizer.is_end(*id)
        };
        let token_count = tokenizer.token_count();
        let bytes_of = |id: u32| tokenizer.token_bytes(id).unwrap_or_default();
        let mut order: Vec<u32> =
            (0..token_count as u32).filter(text).filter(|id| !bytes_of(*id).is_empty()).collect();
        order.sort_by_key(|id| bytes_of(*id));
        let mut table = TokenTable {
            bytes: Vec::new(),
            entries: Vec::with_capacity(order.len()),
            places: vec![u32::MAX; token_count],
            ends: tokenizer.end_tokens().to_vec(),
        };
        let mut before: &[u8] = &[];
        for token in order {
            let bytes = bytes_of(token);
            let shared = bytes.iter().zip(before).take_while(|(a, b)| a == b).count() as u32;
            let start = table.bytes.len() as u32;
            table.bytes.extend_from_slice(bytes);
            table.places[token as usize] = table.entries.len() as u32;
            table.entries.push(Entry { token, start, length: bytes.len() as u32, shared });
            before = bytes;
        }
        table
    }

    fn bytes_of(&self, entry: &Entry) -> &[u8] {
        &self.bytes[entry.start as usize..][..entry.length as usize]
    }
}

/// Follows one text through a grammar, token by token.
#[derive(Debug, Clone)]
pub struct Constraint {
    table: Arc<TokenTable>,
    automaton: Automaton,
    state: StateId,
    ended: bool,
    /// The tokens that may follow in states that were met before, one bit each.
    masks: BTreeMap<StateId, Arc<[u64]>>,
    walk: Vec<StateId>,
}

/// So many states' masks are remembered at a time.
const MASKS_MAX: usize = 128;

impl Constraint {
    /// A constraint at the beginning of a text.
    ///
    /// # Errors
    /// [`Error::Invalid`] if no text at all keeps to the grammar.
    pub fn new(grammar: &Grammar, table: &Arc<TokenTable>) -> Result<Constraint> {
        let mut automaton = Automaton::new(Arc::clone(&grammar.program));
        let state = automaton.start()?;
        if state == DEAD {
            return Err(Error::invalid("grammar", "no text keeps to it", "a grammar with at least one text"));
        }
        Ok(Constraint {
            table: Arc::clone(table),
            automaton,
            state,
            ended: false,
            masks: BTreeMap::new(),
            walk: Vec::new(),
        })
    }

    /// Whether the text may end here.
    #[must_use]
    pub fn may_end(&self) -> bool {
        self.automaton.accepts(self.state)
    }

    /// Forbids (with minus infinity) every token after which the text could no longer keep to the grammar. Tokens that
    /// end generation stay allowed where the text may end.
    ///
    /// # Errors
    /// [`Error::Invalid`] for fewer logits than tokens, and if no token is left: behind the end, and when the vocabulary cannot
    /// write what must follow; [`Error::Limit`] for a grammar with too many possibilities at once.
    pub fn mask(&mut self, logits: &mut [f32]) -> Result<()> {
        let count = self.table.places.len();
        if logits.len() < count {
            let expected = format!("one for each of {count} tokens");
            return Err(Error::invalid("logits", format!("{} logits", logits.len()), expected));
        }
        let mask = self.allowed()?;
        let mut left = false;
        for (token, logit) in logits.iter_mut().enumerate() {
            let allowed = token < count && mask[token / 64] >> (token % 64) & 1 == 1;
            if !allowed {
                *logit = f32::NEG_INFINITY;
            }
            left |= allowed;
        }
        if left {
            return Ok(());
        }
        let what = "no token of the vocabulary can follow";
        Err(Error::invalid("grammar", what, "a vocabulary that can write what the grammar asks for"))
    }

    /// Whether `token` may follow.
    ///
    /// # Errors
    /// [`Error::Limit`] for a grammar with too many possibilities at once.
    pub fn allows(&mut self, token: u32) -> Result<bool> {
        let mask = self.allowed()?;
        Ok(mask.get(token as usize / 64).is_some_and(|word| word >> (token % 64) & 1 == 1))
    }

    /// Goes on behind `token`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it may not follow.
    pub fn accept(&mut self, token: u32) -> Result<()> {
        let refused = |place: &str| {
            let what = format!("token {token} cannot follow");
            Err(Error::invalid(place, what, "a token that the constraint allows"))
        };
        if self.ended {
            return refused("grammar, behind its end");
        }
        if self.table.ends.binary_search(&token).is_ok() {
            if !self.may_end() {
                return refused("grammar, before its end");
            }
            self.ended = true;
            return Ok(());
        }
        let place = self.table.places.get(token as usize).copied().unwrap_or(u32::MAX);
        let Some(entry) = self.table.entries.get(place as usize) else {
            return refused("grammar, which allows text only");
        };
        self.automaton.begin_work();
        let mut state = self.state;
        for byte in self.table.bytes_of(entry) {
            state = self.automaton.step(state, *byte)?;
        }
        if state == DEAD {
            return refused("grammar");
        }
        self.state = state;
        if self.automaton.is_crowded() {
            self.state = self.automaton.restart(state)?;
            self.masks.clear();
        }
        Ok(())
    }

    /// The tokens that may follow, one bit each.
    fn allowed(&mut self) -> Result<Arc<[u64]>> {
        if let Some(mask) = self.masks.get(&self.state)
            && !self.ended
        {
            return Ok(Arc::clone(mask));
        }
        self.automaton.begin_work();
        let mut mask = vec![0u64; self.table.places.len().div_ceil(64)];
        let mut allow = |token: u32| mask[token as usize / 64] |= 1 << (token % 64);
        if !self.ended && self.may_end() {
            self.table.ends.iter().copied().for_each(&mut allow);
        }
        if !self.ended {
            // walk[n] is the state behind the first n bytes of the entry at hand; it ends where the text went wrong.
            self.walk.clear();
            self.walk.push(self.state);
            let mut failed_at = usize::MAX;
            for entry in &self.table.entries {
                let shared = entry.shared as usize;
                if shared >= failed_at {
                    continue;
                }
                failed_at = usize::MAX;
                self.walk.truncate(shared + 1);
                let bytes = self.table.bytes_of(entry);
                for (index, byte) in bytes.iter().enumerate().skip(self.walk.len() - 1) {
                    let next = self.automaton.step(self.walk[index], *byte)?;
                    if next == DEAD {
                        failed_at = index + 1;
                        break;
                    }
                    self.walk.push(next);
                }
                if failed_at == usize::MAX {
                    allow(entry.token);
                }
            }
        }
        let mask: Arc<[u64]> = mask.into();
        if !self.ended {
            if self.masks.len() >= MASKS_MAX {
                self.masks.clear();
            }
            self.masks.insert(self.state, Arc::clone(&mask));
        }
        Ok(mask)
    }
}
