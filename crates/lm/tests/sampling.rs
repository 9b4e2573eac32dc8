//! Each sampling rule against its definition, written out plainly.

use std::collections::{BTreeMap, BTreeSet};

use lightering_lm::{
    Error, Mirostat, Sampler, SamplerOptions, TokenLogProbability, log_probability, top_log_probabilities,
};
use proptest::prelude::*;

fn softmax(logits: &[f32]) -> Vec<f64> {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponentials: Vec<f64> = logits.iter().map(|l| f64::from(l - highest).exp()).collect();
    let sum: f64 = exponentials.iter().sum();
    exponentials.iter().map(|e| e / sum).collect()
}

/// The tokens that a sampler with these options chooses among.
fn kept(options: SamplerOptions, logits: &[f32]) -> BTreeSet<u32> {
    let mut sampler = Sampler::new(options).unwrap();
    let token = sampler.sample(&mut logits.to_vec(), &[]).unwrap();
    let kept: BTreeSet<u32> = sampler.candidates().iter().map(|c| c.token).collect();
    assert!(kept.contains(&token));
    assert_eq!(kept.len(), sampler.candidates().len());
    kept
}

/// Tokens from the likeliest to the least likely.
fn ranked(logits: &[f32]) -> Vec<u32> {
    let mut tokens: Vec<u32> = (0..logits.len() as u32).collect();
    tokens.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
    tokens
}

fn logits() -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(
        prop_oneof![8 => -12.0f32..12.0, 1 => Just(f32::NEG_INFINITY), 1 => Just(0.5)],
        1..700,
    )
    .prop_filter("a token is allowed", |l| l.iter().any(|x| x.is_finite()))
}

/// The shortest beginning of `order` that has the mass `target`; sums so close to it that rounding decides are skipped.
fn shortest(order: &[u32], probabilities: &[f64], target: f64) -> Option<BTreeSet<u32>> {
    let mut mass = 0.0;
    let mut set = BTreeSet::new();
    for token in order {
        mass += probabilities[*token as usize];
        set.insert(*token);
        if (mass - target).abs() < 1e-4 {
            return None;
        }
        if mass > target {
            break;
        }
    }
    Some(set)
}

fn finite(order: Vec<u32>, logits: &[f32]) -> Vec<u32> {
    order.into_iter().filter(|t| logits[*t as usize].is_finite()).collect()
}

proptest! {
    #[test]
    fn greedy_takes_the_first_of_the_likeliest(logits in logits()) {
        let token = Sampler::new(SamplerOptions::greedy()).unwrap().sample(&mut logits.clone(), &[]).unwrap();
        prop_assert_eq!(token, ranked(&logits)[0]);
    }

    #[test]
    fn top_k_keeps_the_k_likeliest(logits in logits(), k in 1usize..50) {
        let expected: BTreeSet<u32> = finite(ranked(&logits), &logits).into_iter().take(k).collect();
        prop_assert_eq!(kept(SamplerOptions { top_k: k, ..Default::default() }, &logits), expected);
    }

    #[test]
    fn top_p_keeps_the_smallest_nucleus(logits in logits(), top_p in 0.01f32..0.999) {
        let order = finite(ranked(&logits), &logits);
        if let Some(expected) = shortest(&order, &softmax(&logits), f64::from(top_p)) {
            prop_assert_eq!(kept(SamplerOptions { top_p, ..Default::default() }, &logits), expected);
        }
    }

    #[test]
    fn min_p_keeps_what_is_likely_beside_the_likeliest(logits in logits(), min_p in 0.001f32..1.0) {
        let probabilities = softmax(&logits);
        let highest = probabilities.iter().copied().fold(0.0, f64::max);
        let kept = kept(SamplerOptions { min_p, ..Default::default() }, &logits);
        for (token, probability) in probabilities.iter().enumerate() {
            let ratio = probability / highest / f64::from(min_p);
            if (ratio - 1.0).abs() > 1e-4 {
                prop_assert_eq!(kept.contains(&(token as u32)), ratio > 1.0, "{} {}", token, ratio);
            }
        }
    }

    #[test]
    fn typical_keeps_what_is_near_the_entropy(
        logits in prop::collection::vec(-6.0f32..6.0, 1..60),
        typical_p in 0.05f32..0.95,
    ) {
        let probabilities = softmax(&logits);
        let entropy: f64 = probabilities.iter().map(|p| -p * p.ln()).sum();
        let distance = |t: &u32| (-probabilities[*t as usize].ln() - entropy).abs();
        let mut order = ranked(&logits);
        order.sort_by(|a, b| distance(a).total_cmp(&distance(b)));
        let near = order.windows(2).any(|pair| (distance(&pair[0]) - distance(&pair[1])).abs() < 1e-5);
        if let (Some(expected), false) = (shortest(&order, &probabilities, f64::from(typical_p)), near) {
            prop_assert_eq!(kept(SamplerOptions { typical_p, ..Default::default() }, &logits), expected);
        }
    }

    #[test]
    fn temperature_divides_the_logits(logits in logits(), temperature in 0.1f32..5.0) {
        let mut sampler = Sampler::new(SamplerOptions { temperature, ..Default::default() }).unwrap();
        sampler.sample(&mut logits.clone(), &[]).unwrap();
        let scaled: Vec<f32> = logits.iter().map(|l| l / temperature).collect();
        let expected = softmax(&scaled);
        for candidate in sampler.candidates() {
            prop_assert!((f64::from(candidate.probability) - expected[candidate.token as usize]).abs() < 1e-5);
        }
    }

    #[test]
    fn penalties_are_as_defined(
        logits in prop::collection::vec(-5.0f32..5.0, 8..40),
        history in prop::collection::vec(0u32..50, 0..90),
        repetition_penalty in 0.5f32..2.0,
        frequency_penalty in -2.0f32..2.0,
        presence_penalty in -2.0f32..2.0,
        penalty_window in 0usize..100,
    ) {
        let options = SamplerOptions { repetition_penalty, frequency_penalty, presence_penalty, penalty_window, ..SamplerOptions::greedy() };
        let mut counts = BTreeMap::new();
        history.iter().rev().take(penalty_window).for_each(|t| *counts.entry(*t).or_insert(0u32) += 1);
        let mut changed = logits.clone();
        Sampler::new(options).unwrap().sample(&mut changed, &history).unwrap();
        for (token, (before, after)) in logits.iter().zip(&changed).enumerate() {
            let count = counts.get(&(token as u32)).copied().unwrap_or(0);
            let mut expected = *before;
            if count > 0 {
                expected = if expected > 0.0 { expected / repetition_penalty } else { expected * repetition_penalty };
                expected -= count as f32 * frequency_penalty + presence_penalty;
            }
            prop_assert!((expected - after).abs() < 1e-5);
        }
    }

    #[test]
    fn log_probabilities_are_those_of_the_softmax(logits in logits(), count in 0usize..12) {
        let probabilities = softmax(&logits);
        let mut top = vec![TokenLogProbability { token: 9, log_probability: 9.0 }];
        top_log_probabilities(&logits, count, &mut top).unwrap();
        let tokens: Vec<u32> = top.iter().map(|t| t.token).collect();
        prop_assert_eq!(&tokens[..], &ranked(&logits)[..count.min(logits.len())]);
        for entry in top {
            let expected = probabilities[entry.token as usize].ln();
            prop_assert!(entry.log_probability == f32::NEG_INFINITY || (f64::from(entry.log_probability) - expected).abs() < 1e-4);
            prop_assert_eq!(log_probability(&logits, entry.token).unwrap(), entry.log_probability);
        }
    }

    #[test]
    fn all_rules_together_choose_an_allowed_token(
        logits in logits(), seed in any::<u64>(), top_k in 0usize..50, top_p in 0.0f32..=1.0, min_p in 0.0f32..=1.0,
        typical_p in 0.0f32..=1.0, temperature in 0.0f32..3.0, mirostat in any::<bool>(),
    ) {
        let mirostat = mirostat.then_some(Mirostat { tau: 3.0, eta: 0.1 });
        let options = SamplerOptions { seed, top_k, top_p, min_p, typical_p, temperature, mirostat, ..Default::default() };
        let mut sampler = Sampler::new(options).unwrap();
        for _ in 0..3 {
            let token = sampler.sample(&mut logits.clone(), &[]).unwrap();
            prop_assert!(logits[token as usize].is_finite());
            let total: f64 = sampler.candidates().iter().map(|c| f64::from(c.probability)).sum();
            prop_assert!((total - 1.0).abs() < 1e-3);
        }
    }
}

#[test]
fn draws_follow_the_probabilities() {
    let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].map(f32::ln).into();
    let mut sampler = Sampler::new(SamplerOptions { seed: 7, ..Default::default() }).unwrap();
    let mut counts = [0.0f64; 4];
    let rounds = 40_000;
    for _ in 0..rounds {
        counts[sampler.sample(&mut logits.clone(), &[]).unwrap() as usize] += 1.0;
    }
    // Chi-squared with three degrees of freedom: 16.27 is exceeded once in a thousand seeds.
    let expected = [0.5, 0.3, 0.15, 0.05].map(|p| p * f64::from(rounds));
    let statistic: f64 = counts.iter().zip(expected).map(|(c, e)| (c - e) * (c - e) / e).sum();
    assert!(statistic < 16.27, "{statistic} {counts:?}");
}

#[test]
fn seeds_decide() {
    let run = |seed| -> Vec<u32> {
        let mut sampler = Sampler::new(SamplerOptions { seed, ..Default::default() }).unwrap();
        (0..50).map(|_| sampler.sample(&mut [0.0; 100], &[]).unwrap()).collect()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

/// The mean surprise of what is drawn, under the model's own distribution, comes to the target.
#[test]
fn mirostat_holds_the_surprise() {
    // Zipf's law over 5,000 tokens: more than 8 bits of entropy.
    let logits: Vec<f32> = (1..=5000).map(|rank| -(rank as f32).ln()).collect();
    for tau in [3.0f32, 5.0] {
        let options =
            SamplerOptions { mirostat: Some(Mirostat { tau, eta: 0.1 }), seed: 3, ..Default::default() };
        let mut sampler = Sampler::new(options).unwrap();
        let mut surprise = 0.0;
        for round in 0..6000 {
            let token = sampler.sample(&mut logits.clone(), &[]).unwrap();
            let chosen = sampler.candidates().iter().find(|c| c.token == token).unwrap();
            if round >= 1000 {
                surprise -= chosen.probability.log2();
            }
        }
        let mean = surprise / 5000.0;
        assert!((mean - tau).abs() < 0.1, "{mean} bits instead of {tau}");
    }
}

#[test]
fn bias_comes_first() {
    let options =
        SamplerOptions { logit_bias: BTreeMap::from([(1, 5.0), (2, -5.0)]), ..SamplerOptions::greedy() };
    let mut logits = [0.0, 0.0, 9.0];
    assert_eq!(Sampler::new(options).unwrap().sample(&mut logits, &[]).unwrap(), 1);
    assert_eq!(logits, [0.0, 5.0, 4.0]);
}

#[test]
fn wrong_input_is_refused() {
    let refused = |result: lightering_lm::Result<u32>, message: &str| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }) && error.to_string().contains(message), "{error}");
    };
    for options in [SamplerOptions::default(), SamplerOptions::greedy()] {
        let mut sampler = Sampler::new(options).unwrap();
        refused(sampler.sample(&mut [], &[]), "every token is forbidden");
        refused(sampler.sample(&mut [f32::NEG_INFINITY; 3], &[]), "every token is forbidden");
        refused(sampler.sample(&mut [0.0, f32::NAN], &[]), "token 1: NaN");
        refused(sampler.sample(&mut [f32::INFINITY], &[]), "token 0: inf");
    }
    let bias = SamplerOptions { logit_bias: BTreeMap::from([(9, 1.0)]), ..Default::default() };
    refused(Sampler::new(bias).unwrap().sample(&mut [0.0; 9], &[]), "token 9");
    refused(log_probability(&[0.0], 1).map(|_| 0), "token 1");
    let bad = |change: &dyn Fn(&mut SamplerOptions)| {
        let mut options = SamplerOptions::default();
        change(&mut options);
        assert!(Sampler::new(options).is_err());
    };
    bad(&|o| o.temperature = -1.0);
    bad(&|o| o.temperature = f32::NAN);
    bad(&|o| o.top_p = 1.5);
    bad(&|o| o.min_p = -0.1);
    bad(&|o| o.typical_p = f32::INFINITY);
    bad(&|o| o.repetition_penalty = 0.0);
    bad(&|o| o.frequency_penalty = f32::NAN);
    bad(&|o| o.mirostat = Some(Mirostat { tau: -1.0, eta: 0.1 }));
    bad(&|o| o.logit_bias = BTreeMap::from([(0, f32::NAN)]));
}

#[test]
fn options_read_as_written() {
    let options: SamplerOptions = serde_json::from_str(
        r#"{"temperature": 0.7, "logit_bias": {"50256": -100}, "mirostat": {"tau": 5, "eta": 0.1}}"#,
    )
    .unwrap();
    assert_eq!((options.temperature, options.top_p, options.logit_bias[&50256]), (0.7, 1.0, -100.0));
    let again: SamplerOptions = serde_json::from_str(&serde_json::to_string(&options).unwrap()).unwrap();
    assert_eq!(again, options);
    assert!(serde_json::from_str::<SamplerOptions>(r#"{"temprature": 1}"#).is_err());
}
