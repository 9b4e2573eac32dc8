//! Which sparse scheme is best inside a budget: contributions of single layers, measured or foreseen, are taken to add up,
//! and an evolutionary search maximises their sum under the planner's own peak (Zhu et al., "PockEngine", 2023).

use std::collections::{BTreeMap, HashMap, HashSet};

use lightering_graph::passes::Evaluate;
use lightering_units::Bytes;
use serde::{Deserialize, Serialize};

use super::layers::{Anatomy, Layer};
use super::sparse::{SparseScheme, channel_norms};
use crate::{Change, Loader, Random, TrainError, Trainer};

/// Shares of input channels that are looked at.
pub const RATIOS: [f64; 4] = [0.125, 0.25, 0.5, 1.0];
/// What a random draw is for; part of its seed.
const EVOLUTION: u64 = 0x0065_766f_6c76;
/// Rounds of evolution; each ends with plans of its best schemes.
const ROUNDS: usize = 12;
/// Schemes that are planned at most while the best is improved step by step.
const CLIMB_PLANS_MAX: usize = 160;
/// Schemes of a round that are planned.
const PLANNED_PER_ROUND: usize = 3;

/// What single parts of a scheme gain, in whatever unit they were measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Contributions {
    /// Gain when the last k layers learn their biases, for k from 0.
    pub bias: Vec<f64>,
    /// Gain of layer i's weight at each of [`RATIOS`], beside the biases.
    pub weight: BTreeMap<usize, [f64; 4]>,
}

impl Contributions {
    /// Sum of the contributions of a scheme; parts that were not measured gain nothing.
    pub fn gain(&self, scheme: &SparseScheme) -> f64 {
        let bias = self.bias.get(scheme.n_bias_update).or(self.bias.last()).copied().unwrap_or(0.0);
        let weights = scheme.weight_idx.iter().zip(&scheme.weight_ratio).filter_map(|(i, ratio)| {
            let at = RATIOS.iter().position(|r| r == ratio)?;
            Some(self.weight.get(i)?[at])
        });
        bias + weights.sum::<f64>()
    }

    /// Measures by training: `measure` tells how good a model is that was trained for a short while with a scheme. Biases
    /// are measured for the counts `biases` and interpolated between, weights for the layers `weights`, each beside the
    /// largest of `biases`.
    ///
    /// # Errors
    /// What `measure` fails with.
    pub fn measured(
        anatomy: &Anatomy,
        biases: &[usize],
        weights: &[usize],
        measure: &mut dyn FnMut(&SparseScheme) -> Result<f64, TrainError>,
    ) -> Result<Contributions, TrainError> {
        let scheme = |k: usize| SparseScheme { n_bias_update: k, head: true, ..SparseScheme::default() };
        let base = measure(&scheme(0))?;
        let mut points = vec![(0usize, 0.0)];
        let mut counts: Vec<usize> =
            biases.iter().map(|k| (*k).min(anatomy.layers.len())).filter(|k| *k > 0).collect();
        counts.sort_unstable();
        counts.dedup();
        for k in counts {
            points.push((k, measure(&scheme(k))? - base));
        }
        let (most, with_biases) = points[points.len() - 1];
        let mut bias = Vec::new();
        for pair in points.windows(2) {
            let ((from, low), (to, high)) = (pair[0], pair[1]);
            for k in from..to {
                bias.push(low + (high - low) * (k - from) as f64 / (to - from) as f64);
            }
        }
        bias.push(with_biases);
        let mut table = BTreeMap::new();
        for &i in weights {
            let mut row = [0.0; 4];
            for (gain, ratio) in row.iter_mut().zip(RATIOS) {
                let whole = anatomy.layers.get(i).is_some_and(|l| l.axis.is_none());
                if whole && ratio < 1.0 {
                    *gain = f64::NEG_INFINITY;
                    continue;
                }
                let tried = SparseScheme { weight_idx: vec![i], weight_ratio: vec![ratio], ..scheme(most) };
                *gain = measure(&tried)? - base - with_biases;
            }
            table.insert(i, row);
        }
        Ok(Contributions { bias, weight: table })
    }
}

/// Mean gradients of a step whose rule is plain gradient descent, over some batches; the parameters stay as they are.
///
/// # Errors
/// A sample cannot be read, or a node fails.
pub(crate) fn mean_gradients(
    trainer: &mut Trainer,
    loader: &mut Loader,
    batches: usize,
) -> Result<HashMap<String, Vec<f64>>, TrainError> {
    let names = trainer.names().parameters.clone();
    let read = |trainer: &Trainer, name: &str| -> Result<Vec<u8>, TrainError> {
        let mut bytes = Vec::new();
        trainer.read_state(name, &mut |piece| bytes.extend_from_slice(piece))?;
        Ok(bytes)
    };
    let floats = |bytes: &[u8]| -> Vec<f64> {
        bytes
            .chunks_exact(4)
            .map(|b| f64::from(f32::from_ne_bytes(b.try_into().expect("four bytes"))))
            .collect()
    };
    let mut first = HashMap::new();
    for name in &names {
        first.insert(name.clone(), read(trainer, name)?);
    }
    let mut sums: HashMap<String, Vec<f64>> = HashMap::new();
    let mut count = 0;
    while count < batches {
        let Some(batch) = loader.next_batch()? else { break };
        trainer.step(batch.tensors(), 1.0, |_| ())?;
        count += 1;
        for name in &names {
            let (old, new) = (floats(&first[name]), floats(&read(trainer, name)?));
            let sum = sums.entry(name.clone()).or_insert_with(|| vec![0.0; old.len()]);
            for ((s, o), n) in sum.iter_mut().zip(&old).zip(&new) {
                *s += o - n;
            }
            let mut at = 0;
            trainer.write_state(name, &mut |piece| {
                piece.copy_from_slice(&first[name][at..at + piece.len()]);
                at += piece.len();
            })?;
        }
    }
    for sum in sums.values_mut() {
        sum.iter_mut().for_each(|s| *s /= count.max(1) as f64);
    }
    Ok(sums)
}

/// Contributions without training: to first order a step along a gradient lowers the loss by the square of its norm, so
/// that of the parts that a scheme takes. `trainer` holds a step of plain gradient descent.
///
/// # Errors
/// A sample or a weight cannot be read, or a node fails.
pub fn contributions_from_gradients(
    anatomy: &Anatomy,
    evaluate: &dyn Evaluate,
    trainer: &mut Trainer,
    loader: &mut Loader,
    batches: usize,
) -> Result<Contributions, TrainError> {
    let gradients = mean_gradients(trainer, loader, batches)?;
    let square = |name: &String| gradients.get(name).map_or(0.0, |g| g.iter().map(|x| x * x).sum::<f64>());
    let mut bias = vec![0.0];
    for layer in anatomy.layers.iter().rev() {
        let own: f64 = layer.shifts.iter().map(square).sum();
        bias.push(bias[bias.len() - 1] + own);
    }
    let mut weight = BTreeMap::new();
    for (i, layer) in anatomy.layers.iter().enumerate() {
        let Some(gradient) = gradients.get(&layer.weight) else { continue };
        let norms = channel_norms(gradient, layer);
        let whole: f64 = norms.iter().sum();
        let mut row = [f64::NEG_INFINITY, f64::NEG_INFINITY, f64::NEG_INFINITY, whole];
        if layer.axis.is_some() {
            for (gain, ratio) in row.iter_mut().zip(RATIOS).take(3) {
                let tried = SparseScheme {
                    weight_idx: vec![i],
                    weight_ratio: vec![ratio],
                    ..SparseScheme::default()
                };
                *gain = match tried.changes(anatomy, evaluate)?.get(&layer.weight) {
                    Some(Change::Channels { channels, .. }) => channels.iter().map(|&c| norms[c]).sum(),
                    _ => whole,
                };
            }
        }
        weight.insert(i, row);
    }
    Ok(Contributions { bias, weight })
}

/// How a search goes.
#[derive(Clone, Copy, Debug)]
pub struct SearchOptions {
    /// Schemes at a time.
    pub population: usize,
    /// Schemes in all.
    pub evaluations: usize,
    /// Decides every choice.
    pub seed: u64,
}

impl Default for SearchOptions {
    fn default() -> Self {
        SearchOptions { population: 100, evaluations: 5000, seed: 0 }
    }
}

/// What a search found.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The scheme.
    pub scheme: SparseScheme,
    /// Sum of its contributions.
    pub gain: f64,
    /// Its planned peak.
    pub peak: Bytes,
    /// Schemes that were planned in full.
    pub plans: usize,
}

/// A scheme as it evolves: how many biases, and for each candidate layer 0 or 1 + the number of its ratio.
type Genome = (usize, Vec<u8>);

struct Evolution<'a> {
    contributions: &'a Contributions,
    candidates: Vec<usize>,
    layers: &'a [Layer],
    random: Random,
}

impl Evolution<'_> {
    fn scheme(&self, genome: &Genome) -> SparseScheme {
        let taken = || self.candidates.iter().zip(&genome.1).filter(|(_, r)| **r > 0);
        SparseScheme {
            n_bias_update: genome.0,
            weight_idx: taken().map(|(i, _)| *i).collect(),
            weight_ratio: taken().map(|(_, r)| RATIOS[usize::from(*r) - 1]).collect(),
            head: true,
            ..SparseScheme::default()
        }
    }

    fn gain(&self, genome: &Genome) -> f64 {
        let bias = self.contributions.bias.get(genome.0).copied().unwrap_or(0.0);
        let weights = self.candidates.iter().zip(&genome.1).filter(|(_, r)| **r > 0);
        bias + weights.map(|(i, r)| self.contributions.weight[i][usize::from(*r) - 1]).sum::<f64>()
    }

    /// Bytes by the additive model of PockEngine's code: signs of the outputs where biases learn, the chosen part of the
    /// inputs and of the gradient where weights do. Only the order of schemes matters; the planner has the last word.
    fn estimate(&self, genome: &Genome) -> f64 {
        let biases = self.layers.iter().rev().take(genome.0).map(|l| l.outputs as f64 / 8.0).sum::<f64>();
        let weights = self.candidates.iter().zip(&genome.1).filter(|(_, r)| **r > 0).map(|(i, r)| {
            let (layer, ratio) = (&self.layers[*i], RATIOS[usize::from(*r) - 1]);
            let elements: usize = layer.dims.iter().product();
            4.0 * ratio * (layer.inputs as f64 + elements as f64)
        });
        biases + weights.sum::<f64>()
    }

    fn random_genome(&mut self) -> Genome {
        let most = self.contributions.bias.len().saturating_sub(1);
        let k = self.random.below(most + 1);
        let density = self.random.uniform();
        let genes = (0..self.candidates.len())
            .map(|_| if self.random.chance(density) { 1 + self.random.below(4) as u8 } else { 0 })
            .collect();
        (k, genes)
    }

    /// One child of two parents: each gene from either, then one change.
    fn child(&mut self, a: &Genome, b: &Genome) -> Genome {
        let mut k = if self.random.chance(0.5) { a.0 } else { b.0 };
        let mut genes: Vec<u8> =
            a.1.iter().zip(&b.1).map(|(x, y)| if self.random.chance(0.5) { *x } else { *y }).collect();
        let changes = 1 + self.random.below(2);
        for _ in 0..changes {
            let at = self.random.below(genes.len() + 1);
            match genes.get_mut(at) {
                Some(gene) => *gene = self.random.below(5) as u8,
                None => k = self.random.below(self.contributions.bias.len().max(1)),
            }
        }
        (k, genes)
    }

    /// Some generations within `allowed` bytes of the estimate.
    fn evolve(&mut self, people: &mut Vec<Genome>, allowed: f64, evaluations: usize, population: usize) {
        let fitness = |e: &Self, g: &Genome| {
            let over = e.estimate(g) - allowed;
            // What is too large ranks behind everything that is not, the smaller the better.
            let fits = over <= 0.0;
            (fits, if fits { e.gain(g) } else { -over })
        };
        let order = |a: &(bool, f64), b: &(bool, f64)| b.0.cmp(&a.0).then(b.1.total_cmp(&a.1));
        let sort = |e: &Self, people: &mut Vec<Genome>| {
            let mut rated: Vec<((bool, f64), Genome)> =
                people.drain(..).map(|g| (fitness(e, &g), g)).collect();
            rated.sort_by(|a, b| order(&a.0, &b.0).then_with(|| a.1.cmp(&b.1)));
            rated.dedup_by(|a, b| a.1 == b.1);
            people.extend(rated.into_iter().map(|r| r.1).take(population));
        };
        sort(self, people);
        let mut left = evaluations;
        while left > 0 {
            let elite = (people.len() / 2).max(2).min(people.len());
            let births = population.min(left);
            left -= births;
            for _ in 0..births {
                let (a, b) = (self.random.below(elite), self.random.below(elite));
                let child = self.child(&people[a].clone(), &people[b].clone());
                people.push(child);
            }
            sort(self, people);
        }
    }
}

/// Looks for the scheme with the largest sum of contributions among those whose planned peak, told by `peak` (`None`: it
/// does not fit), is within the budget. The same seed gives the same scheme.
///
/// # Errors
/// What `peak` fails with; the smallest scheme, the head alone, does not fit.
pub fn search(
    anatomy: &Anatomy,
    contributions: &Contributions,
    options: SearchOptions,
    peak: &mut dyn FnMut(&SparseScheme) -> Result<Option<Bytes>, TrainError>,
) -> Result<Found, TrainError> {
    let candidates: Vec<usize> =
        contributions.weight.keys().copied().filter(|i| *i < anatomy.layers.len()).collect();
    let random = Random::derived(options.seed, &[EVOLUTION]);
    let mut e = Evolution { contributions, candidates, layers: &anatomy.layers, random };
    let smallest: Genome = (0, vec![0; e.candidates.len()]);
    let least = peak(&e.scheme(&smallest))?.ok_or_else(|| {
        TrainError::invalid("sparse:auto", "not even the last layer alone fits the budget", "more memory")
    })?;
    let mut best = Found { scheme: e.scheme(&smallest), gain: e.gain(&smallest), peak: least, plans: 1 };
    let everything: Genome = (e.contributions.bias.len().saturating_sub(1), vec![4; e.candidates.len()]);
    let mut people = vec![smallest.clone(), everything.clone()];
    let population = options.population.max(4);
    while people.len() < population {
        people.push(e.random_genome());
    }
    // What the estimate may come to: between what is known to fit and what is known not to.
    let (mut low, mut high) = (0.0, e.estimate(&everything));
    let mut allowed = high;
    let mut planned: HashSet<Genome> = HashSet::from([smallest]);
    for _ in 0..ROUNDS {
        e.evolve(&mut people, allowed, options.evaluations / ROUNDS, population);
        let mut fitted = None;
        let tried: Vec<Genome> = people
            .iter()
            .filter(|g| e.estimate(g) <= allowed && e.gain(g) > best.gain && !planned.contains(*g))
            .take(PLANNED_PER_ROUND)
            .cloned()
            .collect();
        for genome in tried {
            planned.insert(genome.clone());
            best.plans += 1;
            let scheme = e.scheme(&genome);
            if let Some(bytes) = peak(&scheme)? {
                let (gain, plans) = (e.gain(&genome), best.plans);
                best = Found { scheme, gain, peak: bytes, plans };
                fitted = Some(e.estimate(&genome));
                break;
            }
        }
        match fitted {
            Some(estimate) => {
                low = f64::max(low, estimate);
                // The first round tries everything at once.
                if allowed >= high {
                    break;
                }
            }
            None => high = allowed,
        }
        allowed = (low + high) / 2.0;
    }
    let start = candidate_genome(&e, &best.scheme);
    climb(&e, &mut best, &start, peak)?;
    Ok(best)
}

/// The genome of a scheme that was made from one.
fn candidate_genome(e: &Evolution<'_>, scheme: &SparseScheme) -> Genome {
    let gene = |i: &usize| {
        let at = scheme.weight_idx.iter().position(|j| j == i)?;
        let ratio = RATIOS.iter().position(|r| *r == scheme.weight_ratio[at])?;
        Some(1 + ratio as u8)
    };
    (scheme.n_bias_update, e.candidates.iter().map(|i| gene(i).unwrap_or(0)).collect())
}

/// Improves the best scheme by single changes under the planner's peak, each with as many biases as then fit: what the
/// estimate got wrong is made up for here.
fn climb(
    e: &Evolution<'_>,
    best: &mut Found,
    start: &Genome,
    peak: &mut dyn FnMut(&SparseScheme) -> Result<Option<Bytes>, TrainError>,
) -> Result<(), TrainError> {
    let mut genes = start.1.clone();
    let most = e.contributions.bias.len().saturating_sub(1);
    let mut left = CLIMB_PLANS_MAX;
    loop {
        let mut neighbours = vec![genes.clone()];
        for at in 0..genes.len() {
            for value in (0..=4).filter(|v| *v != genes[at]) {
                let mut other = genes.clone();
                other[at] = value;
                neighbours.push(other);
            }
        }
        let mut better = None;
        for other in neighbours {
            // The fewest biases with which it gains more, and the most that fit.
            let Some(mut low) = (0..=most).find(|&k| e.gain(&(k, other.clone())) > best.gain) else {
                continue;
            };
            let (mut high, mut first) = (most + 1, true);
            while low < high && left > 0 {
                left -= 1;
                best.plans += 1;
                // The fewest first: mostly nothing fits.
                let k = if std::mem::take(&mut first) { low } else { (low + high) / 2 };
                let genome = (k, other.clone());
                let (scheme, gain) = (e.scheme(&genome), e.gain(&genome));
                match peak(&scheme)? {
                    Some(bytes) => {
                        if gain > best.gain {
                            *best = Found { scheme, gain, peak: bytes, plans: best.plans };
                            better = Some(other.clone());
                        }
                        low = k + 1;
                    }
                    None => high = k,
                }
            }
        }
        match better {
            Some(other) if left > 0 => genes = other,
            _ => return Ok(()),
        }
    }
}
