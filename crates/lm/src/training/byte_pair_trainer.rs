//! A byte-level vocabulary learned from a text: the pair of neighbours that occurs most often becomes a token, again and
//! again (Sennrich et al., 2016; on bytes as Radford et al., 2019).

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::ops::RangeInclusive;

use crate::tokenizer::Map;
use crate::tokenizer::byte_alphabet;
use crate::tokenizer::pre_tokenizer::{self, PreTokenizer};
use crate::{Error, Result, VocabularyData};

/// Tokens that a trained vocabulary may have.
pub const VOCABULARY_RANGE: RangeInclusive<usize> = 258..=65_536;

/// The token that ends a text.
const END: &str = "<|endoftext|>";
/// A pair that occurs less often says nothing of the language.
const LEAST_COUNT: i64 = 2;

type Pair = (u32, u32);

/// Words of the text, as tokens, and how often they occur; for each pair, how often it occurs and where it may be found.
struct Words {
    words: Vec<(Vec<u32>, i64)>,
    counts: Map<Pair, i64>,
    places: Map<Pair, BTreeSet<u32>>,
    heap: BinaryHeap<(i64, Reverse<Pair>)>,
}

impl Words {
    fn of(text: &str, pre: &PreTokenizer) -> Words {
        let mut occurrences: Map<&str, i64> = Map::default();
        for part in text.split(END) {
            pre.split(part, &mut |word| *occurrences.entry(word).or_insert(0) += 1);
        }
        let mut list: Vec<(&str, i64)> = occurrences.into_iter().collect();
        list.sort_unstable();
        let mut all = Words {
            words: Vec::with_capacity(list.len()),
            counts: Map::default(),
            places: Map::default(),
            heap: BinaryHeap::new(),
        };
        for (at, (word, count)) in list.into_iter().enumerate() {
            let tokens: Vec<u32> = word.bytes().map(u32::from).collect();
            for pair in tokens.windows(2) {
                let pair = (pair[0], pair[1]);
                *all.counts.entry(pair).or_insert(0) += count;
                all.places.entry(pair).or_default().insert(at as u32);
            }
            all.words.push((tokens, count));
        }
        all.heap = all.counts.iter().map(|(&pair, &count)| (count, Reverse(pair))).collect();
        all
    }

    /// The pair that occurs most often; the one of the older tokens of equal ones.
    fn best(&mut self) -> Option<Pair> {
        while let Some((count, Reverse(pair))) = self.heap.pop() {
            let now = self.counts.get(&pair).copied().unwrap_or(0);
            if now == count && count >= LEAST_COUNT {
                return Some(pair);
            }
            // Counts only fall behind the heap's back; a pair that still occurs waits for its turn.
            if now >= LEAST_COUNT && now < count {
                self.heap.push((now, Reverse(pair)));
            }
        }
        None
    }

    fn merge(&mut self, pair: Pair, token: u32) {
        let places = self.places.remove(&pair).unwrap_or_default();
        self.counts.remove(&pair);
        let mut grown: BTreeSet<Pair> = BTreeSet::new();
        for at in places {
            let (tokens, count) = &mut self.words[at as usize];
            if !tokens.windows(2).any(|w| (w[0], w[1]) == pair) {
                continue;
            }
            for w in tokens.windows(2) {
                if let Some(n) = self.counts.get_mut(&(w[0], w[1])) {
                    *n -= *count;
                }
            }
            let mut merged = Vec::with_capacity(tokens.len());
            let mut i = 0;
            while i < tokens.len() {
                if i + 1 < tokens.len() && (tokens[i], tokens[i + 1]) == pair {
                    merged.push(token);
                    i += 2;
                } else {
                    merged.push(tokens[i]);
                    i += 1;
                }
            }
            for w in merged.windows(2) {
                let new = (w[0], w[1]);
                *self.counts.entry(new).or_insert(0) += *count;
                if new.0 == token || new.1 == token {
                    self.places.entry(new).or_default().insert(at);
                    grown.insert(new);
                }
            }
            *tokens = merged;
        }
        for pair in grown {
            if let Some(&count) = self.counts.get(&pair) {
                self.heap.push((count, Reverse(pair)));
            }
        }
    }
}

/// Learns a vocabulary of at most `size` tokens: the bytes, what is merged of them, and `<|endoftext|>`. A text that
/// repeats little yields fewer. The same text yields the same vocabulary.
///
/// # Errors
/// A size outside of [`VOCABULARY_RANGE`], and a text in which nothing repeats.
pub fn train_byte_pairs(text: &str, size: usize) -> Result<VocabularyData> {
    if !VOCABULARY_RANGE.contains(&size) {
        let expected = format!("from {} to {}", VOCABULARY_RANGE.start(), VOCABULARY_RANGE.end());
        return Err(Error::invalid("size of the vocabulary", size, expected));
    }
    let mut data = VocabularyData { model: "gpt2".into(), pre: "gpt-2".into(), ..VocabularyData::default() };
    let pre = PreTokenizer::new(pre_tokenizer::rule(&data)?)?;
    let mut words = Words::of(text, &pre);
    data.tokens = (0..=255).map(|b| byte_alphabet::character(b).to_string()).collect();
    let mut ids: Map<String, u32> = data.tokens.iter().cloned().zip(0..).collect();
    while data.tokens.len() + 1 < size {
        let Some(pair) = words.best() else { break };
        let (left, right) = (&data.tokens[pair.0 as usize], &data.tokens[pair.1 as usize]);
        let joint = format!("{left}{right}");
        data.merges.push(format!("{left} {right}"));
        // Different pairs may spell the same token.
        let token = *ids.entry(joint.clone()).or_insert_with(|| {
            data.tokens.push(joint);
            data.tokens.len() as u32 - 1
        });
        words.merge(pair, token);
    }
    if data.merges.is_empty() {
        return Err(Error::invalid("text", "nothing in it repeats", "a text to learn a vocabulary from"));
    }
    data.token_types = vec![1; data.tokens.len()];
    data.tokens.push(END.to_owned());
    data.token_types.push(3);
    let end = data.tokens.len() as u32 - 1;
    (data.bos, data.eos, data.add_bos) = (Some(end), Some(end), Some(false));
    Ok(data)
}
