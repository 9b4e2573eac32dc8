//! Stop strings in a text that arrives in pieces.

/// Holds back what may be the beginning of a stop string.
#[derive(Debug)]
pub(super) struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

impl StopMatcher {
    pub fn new(stops: Vec<String>) -> StopMatcher {
        StopMatcher { stops, held: String::new() }
    }

    /// The text that is certain now, and whether a stop string was met behind it.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        if self.stops.is_empty() {
            return (piece.to_owned(), false);
        }
        self.held.push_str(piece);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        // A suffix that begins a stop string has to wait.
        let begins = |at: &usize| {
            let suffix = &self.held.as_bytes()[*at..];
            self.stops.iter().any(|stop| stop.as_bytes().starts_with(suffix))
        };
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest);
        // A stop string begins with a whole character, so such a suffix does as well.
        let at = (from..self.held.len()).find(begins).unwrap_or(self.held.len());
        let rest = self.held.split_off(at);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back when the text ends here.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn text_before_the_first_stop_comes_out() {
        let mut matcher = StopMatcher::new(vec!["END".into(), "é!".into()]);
        assert_eq!(matcher.push("a E"), ("a ".into(), false));
        assert_eq!(matcher.push("N"), (String::new(), false));
        assert_eq!(matcher.push("x é"), ("ENx ".into(), false));
        assert_eq!(matcher.finish(), "é");
        assert_eq!(matcher.push("EENDé!"), ("E".into(), true));
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(
            text in "[abé]{0,24}",
            stops in prop::collection::vec("[abé]{1,4}", 0..3),
            cuts in prop::collection::vec(0usize..24, 0..8),
        ) {
            let whole = stops.iter().filter_map(|s| text.find(s.as_str())).min();
            let mut matcher = StopMatcher::new(stops);
            let mut out = String::new();
            let mut stopped = false;
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|c| text.is_char_boundary(*c)).collect();
            cuts.push(text.len());
            cuts.sort_unstable();
            let mut from = 0;
            for cut in cuts {
                if stopped { break; }
                let (piece, met) = matcher.push(&text[from..cut]);
                out.push_str(&piece);
                stopped = met;
                from = cut;
            }
            // With several stop strings, the one that is complete first may begin later than another one.
            if !stopped { out.push_str(&matcher.finish()); }
            prop_assert_eq!(stopped, whole.is_some());
            prop_assert!(text.starts_with(out.as_str()));
            if whole.is_none() { prop_assert_eq!(out, text); }
        }
    }
}
