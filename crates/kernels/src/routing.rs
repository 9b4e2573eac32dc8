//! The choice of experts: from a router's scores to the best experts of each row and their weights.

/// How scores become weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// Softmax over the chosen ones.
    SoftmaxOfChosen,
    /// Each by itself.
    Sigmoid,
}

/// Chooses `ids.len()` experts of one row by its `scores`, best first, equal ones by index, and gives their weights.
///
/// The bias takes part in the choice, not in the weights (DeepSeek-V3, arXiv 2412.19437, §2.1.2). `normalise` divides
/// the weights by their sum; `scale` multiplies them. `scratch` has `scores.len()` values.
///
/// # Panics
/// Panics when there are fewer experts than are to be chosen, or slices differ in length.
pub fn choose_experts(
    scores: &[f32],
    bias: Option<&[f32]>,
    scoring: Scoring,
    normalise: bool,
    scale: f32,
    ids: &mut [i32],
    weights: &mut [f32],
    scratch: &mut [f32],
) {
    let k = ids.len();
    assert!(k <= scores.len() && weights.len() == k, "{k} of {} experts", scores.len());
    let shares = &mut scratch[..scores.len()];
    match scoring {
        Scoring::Softmax => {
            let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut sum = 0.0;
            for (share, score) in shares.iter_mut().zip(scores) {
                *share = (score - largest).exp();
                sum += *share;
            }
            shares.iter_mut().for_each(|s| *s /= sum);
        }
        Scoring::Sigmoid => {
            for (share, score) in shares.iter_mut().zip(scores) {
                *share = 1.0 / (1.0 + (-score).exp());
            }
        }
        Scoring::SoftmaxOfChosen => shares.copy_from_slice(scores),
    }
    let preference = |e: usize| shares[e] + bias.map_or(0.0, |b| b[e]);
    for rank in 0..k {
        let mut best: Option<(usize, f32)> = None;
        for e in 0..scores.len() {
            let p = preference(e);
            // NaN never wins, so that a broken row still names experts that exist.
            let better = best.is_none_or(|(_, b)| p > b || (b.is_nan() && !p.is_nan()));
            if better && !ids[..rank].contains(&(e as i32)) {
                best = Some((e, p));
            }
        }
        let (expert, _) = best.expect("there are at least k experts");
        ids[rank] = expert as i32;
        weights[rank] = shares[expert];
    }
    if scoring == Scoring::SoftmaxOfChosen {
        let largest = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        weights.iter_mut().for_each(|w| *w = (*w - largest).exp());
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum);
    }
    if normalise {
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum);
    }
    weights.iter_mut().for_each(|w| *w *= scale);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(
        scores: &[f32],
        bias: Option<&[f32]>,
        scoring: Scoring,
        normalise: bool,
    ) -> (Vec<i32>, Vec<f32>) {
        let (mut ids, mut weights, mut scratch) = (vec![0; 2], vec![0.0; 2], vec![0.0; scores.len()]);
        choose_experts(scores, bias, scoring, normalise, 1.0, &mut ids, &mut weights, &mut scratch);
        (ids, weights)
    }

    #[test]
    fn the_best_come_first_and_ties_go_by_index() {
        let (ids, weights) = choose(&[1.0, 3.0, 3.0, 0.0], None, Scoring::Softmax, true);
        assert_eq!((ids, weights), (vec![1, 2], vec![0.5, 0.5]));
        let (ids, weights) = choose(&[0.0, 1.0, 2.0], None, Scoring::SoftmaxOfChosen, false);
        assert_eq!(ids, [2, 1]);
        assert!((weights[0] - 1.0 / (1.0 + (-1f32).exp())).abs() < 1e-6);
    }

    #[test]
    fn a_bias_moves_the_choice_but_not_the_weight() {
        let (ids, weights) = choose(&[0.0, 1.0, -1.0], Some(&[0.0, 0.0, 5.0]), Scoring::Sigmoid, false);
        assert_eq!(ids, [2, 1]);
        assert!((weights[0] - 1.0 / (1.0 + 1f32.exp())).abs() < 1e-6);
    }

    #[test]
    fn numbers_that_are_none_still_give_different_experts() {
        let (ids, _) = choose(&[f32::NAN, f32::NAN, f32::NAN], None, Scoring::Softmax, true);
        assert_eq!(ids, [0, 1]);
    }
}
