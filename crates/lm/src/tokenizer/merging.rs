//! Repeatedly merging the best pair of neighbours, which is what byte pairs and SentencePiece have in common.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// The token of a symbol that has none.
pub(super) const NONE: u32 = u32::MAX;

/// A run of bytes of the text that is one token so far.
#[derive(Debug, Clone, Copy)]
pub(super) struct Symbol {
    pub start: u32,
    pub end: u32,
    pub token: u32,
    previous: u32,
    next: u32,
}

/// Which pairs merge: smaller priorities first, the left-most of equal ones.
pub(super) trait Pairs {
    /// The priority and the token of `left` and `right` together, if they merge.
    fn pair(&self, text: &[u8], left: &Symbol, right: &Symbol) -> Option<(u32, u32)>;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    priority: u32,
    left: u32,
    right: u32,
    /// Where the right symbol ended when the candidate was made; it is stale when it has grown since.
    end: u32,
    token: u32,
}

/// Buffers that are kept from word to word.
#[derive(Debug, Default)]
pub(super) struct Merger {
    symbols: Vec<Symbol>,
    heap: BinaryHeap<Reverse<Candidate>>,
    ranks: Vec<(u32, u32)>,
}

/// Up to this many symbols looking through all pairs is faster than a heap.
const SCAN_MAX: usize = 24;

impl Merger {
    pub fn clear(&mut self) {
        self.symbols.clear();
    }

    /// Adds a symbol behind those that are there.
    pub fn push(&mut self, start: usize, end: usize, token: u32) {
        let index = self.symbols.len() as u32;
        let previous = index.wrapping_sub(1);
        if let Some(last) = self.symbols.last_mut() {
            last.next = index;
        }
        let (start, end) = (start as u32, end as u32);
        self.symbols.push(Symbol { start, end, token, previous, next: NONE });
    }

    /// Merges until no pair is left and gives the symbols that remain, in order.
    pub fn merge(&mut self, pairs: &impl Pairs, text: &[u8], emit: impl FnMut(&Symbol)) {
        if self.symbols.len() <= SCAN_MAX {
            self.merge_by_scan(pairs, text);
            self.symbols.iter().for_each(emit);
        } else {
            self.merge_by_heap(pairs, text, emit);
        }
    }

    fn merge_by_scan(&mut self, pairs: &impl Pairs, text: &[u8]) {
        let symbols = &mut self.symbols;
        let rank = |left: &Symbol, right: &Symbol| pairs.pair(text, left, right).unwrap_or((NONE, NONE));
        self.ranks.clear();
        self.ranks.extend(symbols.windows(2).map(|pair| rank(&pair[0], &pair[1])));
        loop {
            let Some((at, (priority, token))) =
                self.ranks.iter().copied().enumerate().min_by_key(|(_, (priority, _))| *priority)
            else {
                return;
            };
            if priority == NONE {
                return;
            }
            symbols[at].end = symbols[at + 1].end;
            symbols[at].token = token;
            symbols.remove(at + 1);
            self.ranks.remove(at);
            if at > 0 {
                self.ranks[at - 1] = rank(&symbols[at - 1], &symbols[at]);
            }
            if at < self.ranks.len() {
                self.ranks[at] = rank(&symbols[at], &symbols[at + 1]);
            }
        }
    }

    fn merge_by_heap(&mut self, pairs: &impl Pairs, text: &[u8], mut emit: impl FnMut(&Symbol)) {
        let Merger { symbols, heap, .. } = self;
        let candidate = |symbols: &[Symbol], left: u32, right: u32| {
            let (l, r) = (&symbols[left as usize], &symbols[right as usize]);
            pairs
                .pair(text, l, r)
                .map(|(priority, token)| Reverse(Candidate { priority, left, right, end: r.end, token }))
        };
        heap.clear();
        heap.extend((1..symbols.len() as u32).filter_map(|right| candidate(symbols, right - 1, right)));
        while let Some(Reverse(best)) = heap.pop() {
            let left = symbols[best.left as usize];
            // A symbol that was merged away is empty; one that grew makes new candidates of its own.
            let stale = left.end == left.start
                || left.next != best.right
                || symbols[best.right as usize].end != best.end;
            if stale {
                continue;
            }
            let right = symbols[best.right as usize];
            symbols[best.right as usize].end = right.start;
            let merged = &mut symbols[best.left as usize];
            merged.end = right.end;
            merged.token = best.token;
            merged.next = right.next;
            if right.next != NONE {
                symbols[right.next as usize].previous = best.left;
                heap.extend(candidate(symbols, best.left, right.next));
            }
            if left.previous != NONE {
                heap.extend(candidate(symbols, left.previous, best.left));
            }
        }
        let mut at = 0;
        while at != NONE {
            emit(&symbols[at as usize]);
            at = symbols[at as usize].next;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Letters merge when the table says so; the token is a hash of what was merged.
    struct Table(Vec<u32>);

    impl Pairs for Table {
        fn pair(&self, _: &[u8], left: &Symbol, right: &Symbol) -> Option<(u32, u32)> {
            let token = (left.token.wrapping_mul(31) ^ right.token.wrapping_mul(17)) % 64;
            let priority = self.0[token as usize];
            (priority < 40).then_some((priority, token))
        }
    }

    proptest! {
        #[test]
        fn heap_and_scan_agree(
            letters in prop::collection::vec(0u32..64, 1..200),
            table in prop::collection::vec(0u32..64, 64),
        ) {
            let pairs = Table(table);
            let fill = |merger: &mut Merger| {
                merger.clear();
                letters.iter().enumerate().for_each(|(i, t)| merger.push(i, i + 1, *t));
            };
            let mut merger = Merger::default();
            fill(&mut merger);
            merger.merge_by_scan(&pairs, &[]);
            let scanned: Vec<_> = merger.symbols.iter().map(|s| (s.start, s.end, s.token)).collect();
            fill(&mut merger);
            let mut heaped = Vec::new();
            merger.merge_by_heap(&pairs, &[], |s| heaped.push((s.start, s.end, s.token)));
            prop_assert_eq!(heaped, scanned);
        }
    }
}
