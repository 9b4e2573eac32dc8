//! Drafts by n-gram lookup: what followed the last tokens the last time they occurred (Saxena, 2023, prompt lookup
//! decoding).

/// The longest n-gram that is looked up, and the shortest.
const NGRAM_MAX: usize = 4;
const NGRAM_MIN: usize = 2;

/// How far back an occurrence is looked for.
const WINDOW: usize = 16 << 10;

/// Up to `count` tokens that may follow `tokens`.
pub(super) fn draft(tokens: &[u32], count: usize) -> &[u32] {
    let tokens = &tokens[tokens.len().saturating_sub(WINDOW)..];
    for length in (NGRAM_MIN..=NGRAM_MAX).rev() {
        let Some(start) = tokens.len().checked_sub(length) else { continue };
        let ngram = &tokens[start..];
        // The latest occurrence that has a follower; it may reach into the n-gram itself.
        if let Some(at) = (0..start).rev().find(|at| &tokens[*at..at + length] == ngram) {
            let from = at + length;
            return &tokens[from..tokens.len().min(from + count)];
        }
    }
    &[]
}

#[cfg(test)]
mod tests {
    use super::draft;

    #[test]
    fn the_latest_occurrence_of_the_longest_ngram_is_continued() {
        assert_eq!(draft(&[1, 2, 3, 9, 1, 2], 2), [3, 9]);
        assert_eq!(draft(&[1, 2, 3, 1, 2, 4, 1, 2], 1), [4]);
        // 5 1 2 is longer than 1 2, though older.
        assert_eq!(draft(&[5, 1, 2, 3, 1, 2, 4, 5, 1, 2], 1), [3]);
        assert_eq!(draft(&[7, 7, 7, 7], 8), [7]);
        assert_eq!(draft(&[1, 2, 3, 4], 8), [0; 0]);
        assert_eq!(draft(&[], 8), [0; 0]);
        assert_eq!(draft(&[1, 2, 1, 2], 0), [0; 0]);
    }
}
