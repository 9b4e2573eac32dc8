//! A small mixture of experts that was really trained, against the outputs that its authors recorded.
//!
//! The model is `moe-tiny` in the folder that `LIGHTER_TEST_DATA` names (else `~/.cache/lighter-test-data`).

mod greedy;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use greedy::{Greedy, bits, greedy};
use lightering_engine::ExpertOptions;
use lightering_lm::LanguageModel;
use lightering_tier::DirectFile;
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

fn model(folder: &Path, budget: Option<Bytes>, experts: &ExpertOptions) -> LanguageModel {
    let source = Arc::new(DirectFile::open(&folder.join("moe-tiny-f16.gguf")).unwrap());
    greedy::model(source, 256, budget, 2, 20, experts)
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
        let Greedy { tokens, first: logits, last } = greedy(&mut resident, &prompt, 60);
        assert_eq!(tokens, ids(&case["greedy_60"]), "{name}");
        for top in case["last_logits_top10"].as_array().unwrap() {
            let (id, expected) = (top[0].as_u64().unwrap() as usize, top[1].as_f64().unwrap() as f32);
            assert!((logits[id] - expected).abs() < 2e-3, "{name}: {id} has {}, not {expected}", logits[id]);
        }
        for model in &mut tight {
            let same = greedy(model, &prompt, 60);
            assert_eq!(bits(&same.first), bits(&logits), "{name}");
            assert_eq!(bits(&same.last), bits(&last), "{name}");
            assert_eq!(same.tokens, tokens, "{name}");
        }
    }
    for model in &tight {
        let stats = model.session().experts().expect("not all experts fit").stats();
        assert!(stats.hits > 0 && stats.misses > 0, "{stats:?}");
    }
}
