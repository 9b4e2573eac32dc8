//! A small mixture of experts that was really trained, against the outputs that its authors recorded.
//!
//! The model is `moe-tiny` in the folder that `LIGHTER_TEST_DATA` names (else `~/.cache/lighter-test-data`).

use std::path::PathBuf;
use std::sync::Arc;

use lightering_engine::{ExpertOptions, PlanOptions};
use lightering_formats::gguf::GgufFile;
use lightering_graph::CacheFormat;
use lightering_lm::{CacheOptions, Decoder, DecoderOptions, LanguageModel, Row, TokenModel};
use lightering_meter::MachineProfile;
use lightering_tier::{ByteSource, DirectFile};
use lightering_units::Bytes;
use serde_json::Value;

fn folder() -> Option<PathBuf> {
    let data = std::env::var_os("LIGHTER_TEST_DATA").map(PathBuf::from).or_else(|| {
        std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/lighter-test-data"))
    })?;
    let folder = data.join("moe-tiny");
    if folder.join("moe-tiny-f16.gguf").is_file() {
        return Some(folder);
    }
    eprintln!("skipped: there is no {}", folder.display());
    None
}

const CONTEXT: usize = 256;
const PAGE: usize = 16;

fn model(folder: &std::path::Path, budget: Option<Bytes>, experts: &ExpertOptions) -> LanguageModel {
    let source: Arc<dyn ByteSource> = Arc::new(DirectFile::open(&folder.join("moe-tiny-f16.gguf")).unwrap());
    let file = GgufFile::read(&*source).unwrap();
    let cache =
        CacheOptions { format: CacheFormat::F32, page_len: PAGE, pages: CONTEXT / PAGE, context: CONTEXT };
    let decoder = Decoder::new(&file, source, DecoderOptions { cache, rows: 20, wanted: 1 }).unwrap();
    let profile = MachineProfile::conservative();
    decoder.start(&PlanOptions { budget, ..PlanOptions::new(profile, 2) }, experts, false).unwrap()
}

/// Greedy tokens after the prompt, and the logits after the prompt itself.
fn greedy(model: &mut LanguageModel, prompt: &[u32], count: usize) -> (Vec<u32>, Vec<f32>) {
    let pages: Vec<u32> = (0..(CONTEXT / PAGE) as u32).rev().collect();
    let mut tokens = prompt.to_vec();
    let (mut at, mut first) = (0, Vec::new());
    while tokens.len() < prompt.len() + count {
        let end = tokens.len().min(at + model.rows_max());
        let rows: Vec<Row<'_>> = (at..end)
            .map(|i| Row {
                token: tokens[i],
                position: i as u32,
                pages: &pages,
                wants_logits: i + 1 == tokens.len(),
            })
            .collect();
        let mut best = None;
        model
            .step(&rows, &mut |_, logits| {
                let top = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
                best = Some(top.0 as u32);
                if first.is_empty() {
                    first = logits.to_vec();
                }
            })
            .unwrap();
        at = end;
        tokens.extend(best);
    }
    (tokens.split_off(prompt.len()), first)
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn tokens_and_logits_are_those_of_the_reference_at_any_residency() {
    let Some(folder) = folder() else { return };
    let reference: Value =
        serde_json::from_slice(&std::fs::read(folder.join("reference.json")).unwrap()).unwrap();
    let mut resident = model(&folder, None, &ExpertOptions::default());
    assert!(resident.session().experts().is_none(), "without a budget, all experts stay");
    // Half of the experts, a quarter, and hardly any; 32 experts of 4 layers take 6 MiB.
    let mut tight: Vec<LanguageModel> = [(5.6, "lru"), (3.6, "lfu"), (2.4, "lru")]
        .into_iter()
        .map(|(mib, eviction)| {
            let budget = Bytes((mib * f64::from(1 << 20)) as u64);
            let experts = ExpertOptions {
                eviction: eviction.to_owned(),
                prefetch: "repeat-last".to_owned(),
                ..ExpertOptions::default()
            };
            let model = model(&folder, Some(budget), &experts);
            assert!(model.plan().predicted_peak <= budget);
            model
        })
        .collect();
    for (name, case) in reference.as_object().unwrap() {
        let prompt = ids(&case["prompt_ids"]);
        let (tokens, logits) = greedy(&mut resident, &prompt, 60);
        assert_eq!(tokens, ids(&case["greedy_60"]), "{name}");
        for top in case["last_logits_top10"].as_array().unwrap() {
            let (id, expected) = (top[0].as_u64().unwrap() as usize, top[1].as_f64().unwrap() as f32);
            assert!((logits[id] - expected).abs() < 2e-3, "{name}: {id} has {}, not {expected}", logits[id]);
        }
        for model in &mut tight {
            let (same_tokens, same_logits) = greedy(model, &prompt, 60);
            let bits = |logits: &[f32]| logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&same_logits), bits(&logits), "{name}");
            assert_eq!(same_tokens, tokens, "{name}");
        }
    }
    for model in &tight {
        let stats = model.session().experts().expect("not all experts fit").stats();
        assert!(stats.hits > 0 && stats.misses > 0, "{stats:?}");
    }
}
