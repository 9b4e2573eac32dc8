//! Choosing the next token from a model's logits.
//!
//! The rules apply in the order of llama.cpp's default chain: logit bias; repetition, frequency and presence penalties;
//! then either mirostat, or top-k, locally typical, top-p and min-p truncation and last the temperature. Every rule keeps
//! at least one token. Ties go to the smaller id, so that the same seed gives the same tokens everywhere.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How tokens are chosen. The default changes nothing: one draw from the model's own distribution.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplerOptions {
    /// Divides the logits; below 1 the likely become likelier. 0 takes the likeliest token (greedy).
    pub temperature: f32,
    /// Keeps the `top_k` likeliest tokens (Fan et al., 2018); 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest likeliest tokens that have this probability together (nucleus sampling; Holtzman et al., 2020,
    /// section 3.1); 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens that are at least this fraction as likely as the likeliest (Nguyen et al., 2024, section 3); 0 keeps
    /// all.
    pub min_p: f32,
    /// Keeps the tokens whose surprise is nearest to the entropy, until they have this probability together (locally
    /// typical sampling; Meister et al., 2023, section 4); 1 keeps all.
    pub typical_p: f32,
    /// Divides positive logits of tokens in the history by this and multiplies negative ones (Keskar et al., 2019,
    /// section 4.1); 1 changes nothing.
    pub repetition_penalty: f32,
    /// Taken from a token's logit for every time it occurs in the history (OpenAI's interface).
    pub frequency_penalty: f32,
    /// Taken from a token's logit if it occurs in the history at all (OpenAI's interface).
    pub presence_penalty: f32,
    /// How many of the last tokens the penalties look at.
    pub penalty_window: usize,
    /// Holds the surprise of the text at a target instead of truncating by a fixed rule.
    pub mirostat: Option<Mirostat>,
    /// Added to the logits of these tokens before anything else.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Where the random numbers begin.
    pub seed: u64,
}

/// Mirostat 2.0 (Basu et al., 2021, algorithm 2).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mirostat {
    /// The surprise that is aimed at, in bits per token.
    pub tau: f32,
    /// How fast the threshold follows.
    pub eta: f32,
}

impl Default for SamplerOptions {
    fn default() -> SamplerOptions {
        SamplerOptions {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            penalty_window: 64,
            mirostat: None,
            logit_bias: BTreeMap::new(),
            seed: 0,
        }
    }
}

impl SamplerOptions {
    /// The likeliest token, always.
    #[must_use]
    pub fn greedy() -> SamplerOptions {
        SamplerOptions { temperature: 0.0, ..SamplerOptions::default() }
    }

    fn check(&self) -> Result<()> {
        let in_range = |name: &str, value: f32, lowest: f32, highest: f32, expected: &str| {
            if (lowest..=highest).contains(&value) {
                return Ok(());
            }
            Err(Error::invalid(format!("sampler option {name}"), value, expected))
        };
        in_range("temperature", self.temperature, 0.0, 100.0, "a number from 0 to 100")?;
        in_range("top_p", self.top_p, 0.0, 1.0, "a number from 0 to 1")?;
        in_range("min_p", self.min_p, 0.0, 1.0, "a number from 0 to 1")?;
        in_range("typical_p", self.typical_p, 0.0, 1.0, "a number from 0 to 1")?;
        in_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0, "a number from 0.01 to 100")?;
        in_range("frequency_penalty", self.frequency_penalty, -100.0, 100.0, "a number from -100 to 100")?;
        in_range("presence_penalty", self.presence_penalty, -100.0, 100.0, "a number from -100 to 100")?;
        if let Some(Mirostat { tau, eta }) = self.mirostat {
            in_range("mirostat.tau", tau, 0.0, 100.0, "bits from 0 to 100")?;
            in_range("mirostat.eta", eta, 0.0, 1.0, "a number from 0 to 1")?;
        }
        for (token, bias) in &self.logit_bias {
            in_range(&format!("logit_bias.{token}"), *bias, -1e4, 1e4, "a number from -10000 to 10000")?;
        }
        Ok(())
    }
}

/// A token that could have been chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// The token.
    pub token: u32,
    /// Its probability in the final draw, after all rules.
    pub probability: f32,
    logit: f32,
}

/// A token and the natural logarithm of its probability.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct TokenLogProbability {
    /// The token.
    pub token: u32,
    /// The logarithm of its probability.
    pub log_probability: f32,
}

/// Chooses tokens for one sequence; its buffers are allocated by the first call and kept.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplerOptions,
    random: SplitMix,
    /// Mirostat's threshold in bits.
    mu: f32,
    candidates: Vec<Candidate>,
    window: Vec<u32>,
}

/// SplitMix64 (Steele et al., 2014).
#[derive(Debug, Clone)]
struct SplitMix(u64);

impl SplitMix {
    /// A number in [0, 1).
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Likelier first, then smaller ids.
fn by_logit(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

impl Sampler {
    /// A sampler at the beginning of its random numbers.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an option outside of its range.
    pub fn new(options: SamplerOptions) -> Result<Sampler> {
        options.check()?;
        let mu = options.mirostat.map_or(0.0, |m| 2.0 * m.tau);
        let random = SplitMix(options.seed);
        Ok(Sampler { options, random, mu, candidates: Vec::new(), window: Vec::new() })
    }

    /// The options.
    #[must_use]
    pub fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// Chooses a token.
    ///
    /// `logits` has one entry for each token of the vocabulary; minus infinity forbids a token. Bias and penalties are
    /// applied in place. `history` are the tokens so far, the last one last. The time is linear in the vocabulary, plus
    /// sorting what top-p and typical sampling keep.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a logit is not a number or plus infinity, if all tokens are forbidden, or if a bias names a
    /// token beyond the vocabulary.
    pub fn sample(&mut self, logits: &mut [f32], history: &[u32]) -> Result<u32> {
        self.bias(logits)?;
        self.penalise(logits, history);
        // Afterwards, since a penalty can carry a huge logit out of range; what was wrong before still is.
        check_logits(logits)?;
        self.candidates.clear();
        if self.options.temperature == 0.0 {
            let best = argmax(logits)?;
            self.candidates.push(Candidate { token: best, probability: 1.0, logit: logits[best as usize] });
            return Ok(best);
        }
        self.candidates.extend(
            logits
                .iter()
                .enumerate()
                .filter(|(_, logit)| **logit > f32::NEG_INFINITY)
                .map(|(token, logit)| Candidate { token: token as u32, probability: 0.0, logit: *logit }),
        );
        if self.candidates.is_empty() {
            return Err(all_forbidden());
        }
        if let Some(mirostat) = self.options.mirostat {
            return Ok(self.mirostat(mirostat));
        }
        self.top_k();
        self.typical();
        self.top_p();
        self.min_p();
        self.temper();
        Ok(self.draw().token)
    }

    /// The tokens among which the last call chose, with the probabilities that it used.
    #[must_use]
    pub fn candidates(&self) -> &[Candidate] {
        &self.candidates
    }

    fn bias(&self, logits: &mut [f32]) -> Result<()> {
        for (token, bias) in &self.options.logit_bias {
            let count = logits.len();
            let Some(logit) = logits.get_mut(*token as usize) else {
                let what = format!("token {token}");
                return Err(Error::invalid(
                    "sampler option logit_bias",
                    what,
                    format!("a token below {count}"),
                ));
            };
            *logit += bias;
        }
        Ok(())
    }

    fn penalise(&mut self, logits: &mut [f32], history: &[u32]) {
        let SamplerOptions {
            repetition_penalty, frequency_penalty, presence_penalty, penalty_window, ..
        } = self.options;
        if repetition_penalty == 1.0 && frequency_penalty == 0.0 && presence_penalty == 0.0 {
            return;
        }
        self.window.clear();
        self.window.extend_from_slice(&history[history.len().saturating_sub(penalty_window)..]);
        self.window.sort_unstable();
        for run in self.window.chunk_by(|a, b| a == b) {
            // A history from a larger vocabulary is none of ours.
            let Some(logit) = logits.get_mut(run[0] as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
            *logit -= run.len() as f32 * frequency_penalty + presence_penalty;
        }
    }

    fn top_k(&mut self) {
        let k = self.options.top_k;
        if k > 0 && k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, by_logit);
            self.candidates.truncate(k);
        }
    }

    fn typical(&mut self) {
        let target = f64::from(self.options.typical_p);
        if target >= 1.0 {
            return;
        }
        softmax(&mut self.candidates, 1.0);
        let entropy: f64 = self
            .candidates
            .iter()
            .map(|c| f64::from(c.probability))
            .filter(|p| *p > 0.0)
            .map(|p| -p * p.ln())
            .sum();
        let distance = |c: &Candidate| (-f64::from(c.probability).ln() - entropy).abs();
        self.candidates
            .sort_unstable_by(|a, b| distance(a).total_cmp(&distance(b)).then_with(|| by_logit(a, b)));
        let kept = kept_for(&self.candidates, target);
        self.candidates.truncate(kept);
    }

    fn top_p(&mut self) {
        let target = f64::from(self.options.top_p);
        if target >= 1.0 {
            return;
        }
        softmax(&mut self.candidates, 1.0);
        // The nucleus is usually small: sort ever larger heads instead of the whole vocabulary.
        let mut head = 256;
        while head < self.candidates.len() {
            self.candidates.select_nth_unstable_by(head - 1, by_logit);
            let mass: f64 = self.candidates[..head].iter().map(|c| f64::from(c.probability)).sum();
            if mass >= target {
                break;
            }
            head *= 8;
        }
        let head = head.min(self.candidates.len());
        self.candidates[..head].sort_unstable_by(by_logit);
        let kept = kept_for(&self.candidates[..head], target);
        self.candidates.truncate(kept);
    }

    fn min_p(&mut self) {
        let least = self.options.min_p;
        if least <= 0.0 {
            return;
        }
        // p / p_max is the exponential of the difference of the logits.
        let threshold = highest(&self.candidates) + least.ln();
        self.candidates.retain(|c| c.logit >= threshold);
    }

    fn temper(&mut self) {
        softmax(&mut self.candidates, self.options.temperature);
    }

    fn mirostat(&mut self, Mirostat { tau, eta }: Mirostat) -> u32 {
        self.temper();
        let likeliest = *self.candidates.iter().min_by(|a, b| by_logit(a, b)).expect("there are candidates");
        let mu = self.mu;
        self.candidates.retain(|c| -c.probability.log2() <= mu);
        if self.candidates.is_empty() {
            self.candidates.push(likeliest);
        }
        let total: f32 = self.candidates.iter().map(|c| c.probability).sum();
        self.candidates.iter_mut().for_each(|c| c.probability /= total);
        let chosen = self.draw();
        let error = -chosen.probability.log2() - tau;
        self.mu -= eta * error;
        chosen.token
    }

    /// One of the candidates by their probabilities.
    fn draw(&mut self) -> Candidate {
        let total: f64 = self.candidates.iter().map(|c| f64::from(c.probability)).sum();
        let mut left = self.random.uniform() * total;
        let mut last = self.candidates[0];
        for candidate in self.candidates.iter().filter(|c| c.probability > 0.0) {
            last = *candidate;
            left -= f64::from(candidate.probability);
            if left < 0.0 {
                break;
            }
        }
        last
    }
}

/// How many of these, in order, have the probability `target` together; at least one.
fn kept_for(candidates: &[Candidate], target: f64) -> usize {
    let mut mass = 0.0;
    for (index, candidate) in candidates.iter().enumerate() {
        mass += f64::from(candidate.probability);
        if mass >= target {
            return index + 1;
        }
    }
    candidates.len()
}

fn highest(candidates: &[Candidate]) -> f32 {
    candidates.iter().map(|c| c.logit).fold(f32::NEG_INFINITY, f32::max)
}

/// Fills in the probabilities of the logits divided by `temperature`.
fn softmax(candidates: &mut [Candidate], temperature: f32) {
    let highest = highest(candidates);
    let mut sum = 0.0f64;
    for candidate in candidates.iter_mut() {
        candidate.probability = ((candidate.logit - highest) / temperature).exp();
        sum += f64::from(candidate.probability);
    }
    for candidate in candidates {
        candidate.probability = (f64::from(candidate.probability) / sum) as f32;
    }
}

fn check_logits(logits: &[f32]) -> Result<()> {
    let wrong = |logit: &f32| logit.is_nan() || *logit == f32::INFINITY;
    match logits.iter().position(wrong) {
        Some(token) => {
            let place = format!("logits, token {token}");
            Err(Error::invalid(
                place,
                logits[token],
                "a finite number, or minus infinity for a forbidden token",
            ))
        }
        None => Ok(()),
    }
}

fn all_forbidden() -> Error {
    Error::invalid("logits", "every token is forbidden", "at least one that may follow")
}

/// The token with the largest logit, the first of several.
fn argmax(logits: &[f32]) -> Result<u32> {
    let mut best = None;
    let mut highest = f32::NEG_INFINITY;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > highest {
            highest = *logit;
            best = Some(token as u32);
        }
    }
    best.ok_or_else(all_forbidden)
}

/// The logarithm of the sum of the exponentials of the logits, which turns a logit into a log-probability.
fn log_sum(logits: &[f32]) -> f64 {
    let highest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    highest + logits.iter().map(|l| (f64::from(*l) - highest).exp()).sum::<f64>().ln()
}

/// The log-probability that the model itself gives `token`; take it from the logits before sampling changes them.
///
/// # Errors
/// [`Error::Invalid`] for a token beyond the vocabulary and for logits that [`Sampler::sample`] would refuse.
pub fn log_probability(logits: &[f32], token: u32) -> Result<f32> {
    check_logits(logits)?;
    argmax(logits)?;
    let Some(logit) = logits.get(token as usize) else {
        let count = logits.len();
        return Err(Error::invalid("token ids", format!("token {token}"), format!("a token below {count}")));
    };
    Ok((f64::from(*logit) - log_sum(logits)) as f32)
}

/// The `count` likeliest tokens with their log-probabilities, likeliest first, into `out`.
///
/// # Errors
/// [`Error::Invalid`] for logits that [`Sampler::sample`] would refuse.
pub fn top_log_probabilities(logits: &[f32], count: usize, out: &mut Vec<TokenLogProbability>) -> Result<()> {
    out.clear();
    check_logits(logits)?;
    argmax(logits)?;
    let total = log_sum(logits);
    let order = |a: &TokenLogProbability, b: &TokenLogProbability| {
        b.log_probability.total_cmp(&a.log_probability).then(a.token.cmp(&b.token))
    };
    // A short sorted list of the best so far: `count` is small, and most tokens fail against its last entry.
    for (token, logit) in logits.iter().enumerate() {
        let entry =
            TokenLogProbability { token: token as u32, log_probability: (f64::from(*logit) - total) as f32 };
        if out.len() < count || out.last().is_some_and(|last| order(&entry, last).is_lt()) {
            let at = out.partition_point(|other| order(other, &entry).is_lt());
            out.insert(at, entry);
            out.truncate(count);
        }
    }
    Ok(())
}
