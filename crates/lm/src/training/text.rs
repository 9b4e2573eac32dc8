//! Texts as windows of tokens.

use std::sync::Arc;

use lightering_graph::DType;
use lightering_train::{Dataset, Feature, LABEL, Random, TrainError};

use crate::{Error, Result};

/// Windows of `context` tokens, and for each of them the token that follows.
pub struct TokenText {
    tokens: Arc<[u32]>,
    /// The tokens that belong to it.
    from: usize,
    to: usize,
    context: usize,
    /// Each window starts up to a window later, another time in each epoch.
    draws: bool,
    features: Vec<Feature>,
    names: Arc<[String]>,
}

impl TokenText {
    /// Windows for training, and for validation those of the last `validation` of the text.
    ///
    /// # Errors
    /// Either part is shorter than a window, or `validation` is no share.
    pub fn split(
        tokens: Vec<u32>,
        context: usize,
        validation: f64,
        vocabulary: usize,
    ) -> Result<[TokenText; 2]> {
        if !(validation > 0.0 && validation < 1.0) {
            return Err(Error::invalid("share for validation", validation, "a number between 0 and 1"));
        }
        let tokens: Arc<[u32]> = tokens.into();
        let names: Arc<[String]> = (0..vocabulary).map(|t| t.to_string()).collect();
        let len = tokens.len();
        // A window at least, however small the share.
        let held = ((len as f64 * validation) as usize).max(context + 1);
        let middle = len.saturating_sub(held);
        if context == 0 || middle < context + 1 {
            return Err(Error::invalid(
                "text",
                format!("{len} tokens, for training and validation in windows of {context}"),
                format!("at least {} tokens, or a shorter --context", 2 * (context + 1)),
            ));
        }
        let part = |from, to, draws| TokenText {
            tokens: tokens.clone(),
            from,
            to,
            context,
            draws,
            features: vec![
                Feature::new("tokens", DType::I64, &[context]),
                Feature::new(LABEL, DType::I64, &[context]),
            ],
            names: names.clone(),
        };
        Ok([part(0, middle, true), part(middle, len, false)])
    }
}

impl Dataset for TokenText {
    fn len(&self) -> usize {
        (self.to - self.from - 1) / self.context
    }

    fn features(&self) -> &[Feature] {
        &self.features
    }

    fn classes(&self) -> &[String] {
        &self.names
    }

    fn read(
        &self,
        index: usize,
        random: &mut Random,
        targets: &mut [&mut [u8]],
    ) -> std::result::Result<(), TrainError> {
        let last = self.to - self.context - 1;
        let mut start = self.from + index * self.context;
        if self.draws {
            start = (start + random.below(self.context)).min(last);
        }
        for (target, shift) in targets.iter_mut().zip(0..) {
            let tokens = &self.tokens[start + shift..][..self.context];
            for (bytes, token) in target.chunks_exact_mut(8).zip(tokens) {
                bytes.copy_from_slice(&i64::from(*token).to_ne_bytes());
            }
        }
        Ok(())
    }
}
