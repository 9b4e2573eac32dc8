//! Text as windows of tokens.

use std::path::Path;
use std::sync::Arc;

use lightering_graph::DType;
use lightering_meter::{MemoryPool, Reservation};
use lightering_units::Bytes;

use super::bytes::Store;
use super::{Dataset, Feature, LABEL, Vocabulary};
use crate::{Random, TrainError};

/// Most tokens of a vocabulary.
pub const MAX_VOCABULARY: usize = 1 << 20;
/// Bytes that are looked through at a time.
const PIECE: usize = 1 << 16;

/// How tokens lie in a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    U8,
    U16,
    U32,
}

impl Width {
    fn bytes(self) -> usize {
        match self {
            Width::U8 => 1,
            Width::U16 => 2,
            Width::U32 => 4,
        }
    }

    fn token(self, b: &[u8]) -> u32 {
        match self {
            Width::U8 => b[0].into(),
            Width::U16 => u16::from_le_bytes([b[0], b[1]]).into(),
            Width::U32 => u32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        }
    }
}

/// A sequence of tokens: on disk, or in memory where text had to be translated.
pub(super) struct TokenStore {
    store: Store,
    width: Width,
    /// In tokens.
    len: u64,
    /// A character set in place of tokens that stand in the file.
    vocabulary: Arc<[String]>,
    _memory: Option<Reservation>,
}

fn byte_names() -> Arc<[String]> {
    (0..=255u8)
        .map(|b| {
            if b.is_ascii_graphic() || b == b' ' { char::from(b).to_string() } else { format!("\\x{b:02x}") }
        })
        .collect()
}

impl TokenStore {
    /// A text of bytes or of characters. `known` is the vocabulary of another part of the same data.
    pub fn text(
        store: Store,
        vocabulary: Vocabulary,
        known: Option<&Arc<[String]>>,
        pool: &MemoryPool,
    ) -> Result<TokenStore, TrainError> {
        if vocabulary == Vocabulary::Bytes {
            let len = store.len();
            return Ok(TokenStore { store, width: Width::U8, len, vocabulary: byte_names(), _memory: None });
        }
        let characters: Arc<[String]> = match known {
            Some(known) => known.clone(),
            None => {
                let mut set = std::collections::BTreeSet::new();
                each_character(&store, &mut |c| {
                    set.insert(c);
                    Ok(())
                })?;
                set.into_iter().map(String::from).collect()
            }
        };
        if characters.len() > usize::from(u16::MAX) {
            return Err(TrainError::limit(
                &store.name,
                "number of different characters",
                characters.len() as u64,
                u16::MAX.into(),
            ));
        }
        let numbers: std::collections::HashMap<&str, u16> =
            characters.iter().zip(0..).map(|(c, i)| (c.as_str(), i)).collect();
        let memory = pool.reserve(format!("tokens of {}", store.name), Bytes(store.len() * 2))?;
        let mut tokens: Vec<u8> = Vec::with_capacity(store.len() as usize * 2);
        let mut text = [0; 4];
        each_character(&store, &mut |c| match numbers.get(&*c.encode_utf8(&mut text)) {
            Some(number) => {
                tokens.extend(number.to_le_bytes());
                Ok(())
            }
            None => Err(TrainError::invalid(
                &store.name,
                format!("character {c:?}"),
                "only characters that the training text has, or a vocabulary of bytes",
            )),
        })?;
        let len = tokens.len() as u64 / 2;
        let store = Store { source: Arc::new(tokens), name: store.name.clone(), _memory: None };
        Ok(TokenStore { store, width: Width::U16, len, vocabulary: characters, _memory: Some(memory) })
    }

    /// Tokens of a file of little-endian numbers.
    pub fn numbers(store: Store, width: Width) -> Result<TokenStore, TrainError> {
        let size = width.bytes();
        if !store.len().is_multiple_of(size as u64) {
            return Err(TrainError::corrupt(
                &store.name,
                format!("{} bytes are no whole number of {size}-byte tokens", store.len()),
            ));
        }
        let mut largest = 0;
        each_piece(&store, &mut |piece| {
            largest = piece.chunks_exact(size).map(|b| width.token(b)).fold(largest, u32::max);
            Ok(())
        })?;
        if largest as usize >= MAX_VOCABULARY {
            return Err(TrainError::limit(
                &store.name,
                "largest token (is this a file of another width?)",
                largest.into(),
                MAX_VOCABULARY as u64 - 1,
            ));
        }
        let vocabulary = (0..=largest).map(|t| t.to_string()).collect();
        let len = store.len() / size as u64;
        Ok(TokenStore { store, width, len, vocabulary, _memory: None })
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn vocabulary(&self) -> &Arc<[String]> {
        &self.vocabulary
    }
}

fn each_piece(
    store: &Store,
    visit: &mut dyn FnMut(&[u8]) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while at < store.len() {
        let size = (store.len() - at).min(PIECE as u64) as usize;
        store.read_at(at, &mut piece[..size])?;
        visit(&piece[..size])?;
        at += size as u64;
    }
    Ok(())
}

fn each_character(
    store: &Store,
    visit: &mut dyn FnMut(char) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    let mut pending: Vec<u8> = Vec::new();
    let mut at = 0u64;
    let bad = |at: u64| {
        TrainError::invalid(
            &store.name,
            format!("byte {at} is no UTF-8"),
            "UTF-8 text, or a vocabulary of bytes",
        )
    };
    each_piece(store, &mut |piece| {
        pending.extend(piece);
        let valid = match std::str::from_utf8(&pending) {
            Ok(text) => text.len(),
            // A character may be cut by the end of the piece.
            Err(e) if e.error_len().is_none() => e.valid_up_to(),
            Err(e) => return Err(bad(at + e.valid_up_to() as u64)),
        };
        let text = std::str::from_utf8(&pending[..valid]).expect("this part was checked");
        for c in text.chars() {
            visit(c)?;
        }
        pending.drain(..valid);
        at += valid as u64;
        Ok(())
    })?;
    if pending.is_empty() { Ok(()) } else { Err(bad(at)) }
}

/// Windows of `context` tokens (`tokens`, `i64` `[context]`) and the tokens that follow them (`label`, `i64`
/// `[context]`).
pub struct TokenWindows {
    of: Arc<TokenStore>,
    from: u64,
    count: u64,
    context: usize,
    draws: bool,
    features: Vec<Feature>,
}

impl TokenWindows {
    /// The windows within the tokens `from..to`. If `draws`, each starts up to a window later in each epoch.
    pub(super) fn new(
        of: Arc<TokenStore>,
        from: u64,
        to: u64,
        context: usize,
        draws: bool,
    ) -> Result<TokenWindows, TrainError> {
        let count = to.saturating_sub(from + 1) / (context.max(1) as u64);
        if context == 0 || count == 0 {
            return Err(TrainError::invalid(
                &of.store.name,
                format!("{} tokens for windows of {context}", to.saturating_sub(from)),
                "a text that is longer than a window; ask for a shorter context",
            ));
        }
        // The first of the room that the drawn offset needs is the rest behind the last window.
        let tokens = Feature::new("tokens", DType::I64, &[context]);
        let label = Feature::new(LABEL, DType::I64, &[context]);
        Ok(TokenWindows {
            of,
            from,
            count,
            context,
            draws: draws && count > 1,
            features: vec![tokens, label],
        })
    }
}

impl Dataset for TokenWindows {
    fn len(&self) -> usize {
        // Drawn windows reach into the next one, so the last has none of its own.
        (self.count - u64::from(self.draws)) as usize
    }

    fn features(&self) -> &[Feature] {
        &self.features
    }

    fn classes(&self) -> &[String] {
        &self.of.vocabulary
    }

    fn read(&self, index: usize, random: &mut Random, targets: &mut [&mut [u8]]) -> Result<(), TrainError> {
        let [tokens, label] = targets else { panic!("a window has two features") };
        let shift = if self.draws { random.below(self.context) } else { 0 };
        let start = self.from + (index * self.context + shift) as u64;
        let width = self.of.width;
        let size = width.bytes();
        // The bytes land at the end of the label and are widened from its start on; the first token is read alone.
        let read = |target: &mut [u8], start: u64| -> Result<(), TrainError> {
            let at = target.len() - self.context * size;
            self.of.store.read_at(start * size as u64, &mut target[at..])?;
            for i in 0..self.context {
                let token = width.token(&target[at + i * size..]);
                target[8 * i..8 * i + 8].copy_from_slice(&i64::from(token).to_ne_bytes());
            }
            Ok(())
        };
        read(label, start + 1)?;
        let mut first = [0; 4];
        self.of.store.read_at(start * size as u64, &mut first[..size])?;
        tokens[..8].copy_from_slice(&i64::from(width.token(&first)).to_ne_bytes());
        let rest = (self.context - 1) * 8;
        tokens[8..].copy_from_slice(&label[..rest]);
        Ok(())
    }

    fn describe(&self, index: usize) -> String {
        format!("{} from token {}", self.of.store.name, self.from + (index * self.context) as u64)
    }
}

/// The width of the tokens of a `.bin` file, from its name (`….u32.bin`) or else 16 bits.
pub(super) fn width_of(path: &Path) -> Width {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    if name.contains("u32") || name.contains("uint32") {
        Width::U32
    } else if name.contains("u8") || name.contains("uint8") {
        Width::U8
    } else {
        Width::U16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(set: &TokenWindows, index: usize, seed: u64) -> (Vec<i64>, Vec<i64>) {
        let (mut tokens, mut label) = (vec![0i64; set.context], vec![0i64; set.context]);
        set.read(
            index,
            &mut Random::new(seed),
            &mut [bytemuck::cast_slice_mut(&mut tokens), bytemuck::cast_slice_mut(&mut label)],
        )
        .unwrap();
        (tokens, label)
    }

    fn text(content: &str, vocabulary: Vocabulary) -> Result<TokenStore, TrainError> {
        let store = Store::from_bytes("text", content.as_bytes().to_vec());
        TokenStore::text(store, vocabulary, None, &MemoryPool::unbounded())
    }

    #[test]
    fn labels_are_the_next_tokens() {
        let store = Arc::new(text("abcäbc", Vocabulary::Characters).unwrap());
        assert_eq!(store.vocabulary().join(""), "abcä");
        let set = TokenWindows::new(store.clone(), 0, 6, 2, false).unwrap();
        assert_eq!(set.len(), 2);
        assert_eq!(read(&set, 0, 0), (vec![0, 1], vec![1, 2]));
        assert_eq!(read(&set, 1, 0), (vec![2, 3], vec![3, 1]));
        let bytes = Arc::new(text("abcä", Vocabulary::Bytes).unwrap());
        let set = TokenWindows::new(bytes, 1, 5, 3, false).unwrap();
        assert_eq!(read(&set, 0, 0), (vec![98, 99, 195], vec![99, 195, 164]));
        assert!(TokenWindows::new(store, 0, 6, 6, false).is_err());
    }

    #[test]
    fn drawn_windows_stay_inside_and_depend_on_the_seed() {
        let content: String = ('a'..='z').collect();
        let store = Arc::new(text(&content, Vocabulary::Characters).unwrap());
        let set = TokenWindows::new(store, 5, 26, 5, true).unwrap();
        assert_eq!(set.len(), 3);
        let mut starts = std::collections::BTreeSet::new();
        for seed in 0..100 {
            let (tokens, label) = read(&set, 2, seed);
            assert!(tokens[0] >= 15 && label[4] < 26);
            assert!(tokens[1..] == label[..4]);
            starts.insert(tokens[0]);
        }
        assert_eq!(starts.len(), 5);
        assert_eq!(read(&set, 1, 7), read(&set, 1, 7));
    }

    #[test]
    fn numbers_and_bad_texts() {
        let bytes: Vec<u8> = [3u16, 500, 2, 1].iter().flat_map(|t| t.to_le_bytes()).collect();
        let store = TokenStore::numbers(Store::from_bytes("a.bin", bytes.clone()), Width::U16).unwrap();
        assert_eq!((store.len(), store.vocabulary().len()), (4, 501));
        let set = TokenWindows::new(Arc::new(store), 0, 4, 3, false).unwrap();
        assert_eq!(read(&set, 0, 0), (vec![3, 500, 2], vec![500, 2, 1]));
        let error = TokenStore::numbers(Store::from_bytes("a.bin", bytes), Width::U32).err().unwrap();
        assert!(error.to_string().contains("another width"), "{error}");
        let odd = TokenStore::numbers(Store::from_bytes("a.bin", vec![1; 3]), Width::U16).err().unwrap();
        assert!(odd.to_string().contains("no whole number"), "{odd}");
        let store = Store::from_bytes("text", vec![b'a', 0xff, b'b']);
        let error = TokenStore::text(store, Vocabulary::Characters, None, &MemoryPool::unbounded());
        assert!(error.err().unwrap().to_string().contains("byte 1"));
        let cut = Store::from_bytes("text", vec![b'a', 0xc3]);
        assert!(TokenStore::text(cut, Vocabulary::Characters, None, &MemoryPool::unbounded()).is_err());
    }
}
