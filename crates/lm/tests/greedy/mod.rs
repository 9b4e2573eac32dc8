//! Greedy text of small models, step by step, for the tests that compare its tokens and bits.

use std::sync::Arc;

use lightering_engine::{ExpertOptions, PlanOptions};
use lightering_formats::gguf::GgufFile;
use lightering_graph::CacheFormat;
use lightering_lm::{CacheOptions, Decoder, DecoderOptions, LanguageModel, Row, SoleSequence, TokenModel};
use lightering_meter::MachineProfile;
use lightering_tier::ByteSource;
use lightering_units::Bytes;

const PAGE: usize = 16;

/// The model in `source` for one sequence of at most `context` tokens, planned for steps of `rows` tokens.
pub fn model(
    source: Arc<dyn ByteSource>,
    context: usize,
    budget: Option<Bytes>,
    threads: usize,
    rows: usize,
    experts: &ExpertOptions,
) -> LanguageModel {
    let file = GgufFile::read(&*source).unwrap();
    let cache = CacheOptions {
        format: CacheFormat::F32,
        page_len: PAGE,
        pages: context / PAGE,
        window_pages: 0,
        context,
    };
    let decoder = Decoder::new(&file, source, DecoderOptions { cache, rows, wanted: 1 }).unwrap();
    let options = PlanOptions { budget, ..PlanOptions::new(MachineProfile::conservative(), threads) };
    decoder.start(&options, experts, false).unwrap()
}

/// How a model goes on.
pub struct Greedy {
    pub tokens: Vec<u32>,
    /// Logits after the prompt.
    pub first: Vec<f32>,
    /// Logits of which the last token was the largest.
    pub last: Vec<f32>,
}

/// Logits as bits, so that equal means equal.
pub fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// `count` greedy tokens after a prompt.
pub fn greedy(model: &mut LanguageModel, prompt: &[u32], count: usize) -> Greedy {
    let sole = SoleSequence::of(model);
    let mut tokens = prompt.to_vec();
    let (mut at, mut first, mut last) = (0, Vec::new(), Vec::new());
    while tokens.len() < prompt.len() + count {
        let end = tokens.len().min(at + model.rows_max());
        let rows: Vec<Row<'_>> = (at..end).map(|i| sole.row(tokens[i], i, i + 1 == tokens.len())).collect();
        let mut best = None;
        model
            .step(&rows, &mut |_, logits| {
                let top = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
                best = Some(top.0 as u32);
                last = logits.to_vec();
                if first.is_empty() {
                    first.clone_from(&last);
                }
            })
            .unwrap();
        at = end;
        tokens.extend(best);
    }
    Greedy { tokens: tokens.split_off(prompt.len()), first, last }
}
