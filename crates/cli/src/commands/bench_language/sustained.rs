//! A long run that watches itself: does a model get slower, and is it the machine?

use crate::failure::Outcome;
use lightering_lm::{LanguageModel, SoleSequence, TokenModel};
use lightering_meter::Stopwatch;
use serde::Serialize;
use std::hint::black_box;

/// Windows that a run is cut into, as far as tokens are short enough for that.
const WINDOWS: f64 = 60.0;
/// The shortest window, in seconds.
const WINDOW_MIN: f64 = 0.1;
/// A loss of speed that is worth a warning.
const SLOWER: f64 = 0.05;
/// Numbers that the fixed work goes over, which stay in the nearest cache, and how often it does.
const FIXED_NUMBERS: usize = 2048;
const FIXED_ROUNDS: usize = 1500;

/// `sustained` in the report.
#[derive(Debug, Serialize)]
pub struct Sustained {
    /// What was measured, in order.
    pub windows: Vec<Window>,
    /// Change of speed in a minute, as a part of the mean: the slope of a straight line through the windows.
    pub slope_per_minute: f64,
    /// How much slower the last third was than the first; negative when it was faster.
    pub slowdown: f64,
    /// The same of the fixed work.
    pub fixed_slowdown: f64,
    /// What that says.
    pub verdict: Verdict,
}

/// Some of the tokens, and the fixed work behind them.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Window {
    /// Its middle, from the beginning of the run.
    pub at_seconds: f64,
    /// Tokens of the answer.
    pub tokens: usize,
    /// Their rate.
    pub tokens_per_second: f64,
    /// How often a second the fixed work was done.
    pub fixed_per_second: f64,
}

/// What a long run says about its speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The last third was not more than 5 % slower than the first.
    Steady,
    /// It was, and so was work that is the same every time: the processor slowed down or is shared.
    Throttling,
    /// It was, while work that is the same every time was as fast as before.
    Noise,
}

impl Verdict {
    /// As a sentence.
    pub fn text(self) -> &'static str {
        match self {
            Verdict::Steady => "the speed held",
            Verdict::Throttling => {
                "warning: the end was slower, and fixed work as well: the processor throttles or is shared"
            }
            Verdict::Noise => {
                "warning: the end was slower, fixed work was not: noise, or what only the model waits for (memory, disk)"
            }
        }
    }
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0u32), |(sum, count), value| (sum + value, count + 1));
    sum / f64::from(count.max(1))
}

/// How much less the last third of the windows has than the first.
fn slowdown(windows: &[Window], rate: impl Fn(&Window) -> f64) -> f64 {
    let third = windows.len().div_ceil(3);
    let first = mean(windows[..third].iter().map(&rate));
    let last = mean(windows[windows.len() - third..].iter().map(&rate));
    if first > 0.0 { 1.0 - last / first } else { 0.0 }
}

impl Sustained {
    /// Judges windows.
    pub fn of(windows: Vec<Window>) -> Sustained {
        let (at, speed) =
            (mean(windows.iter().map(|w| w.at_seconds)), mean(windows.iter().map(|w| w.tokens_per_second)));
        let spread: f64 = windows.iter().map(|w| (w.at_seconds - at).powi(2)).sum();
        let common: f64 = windows.iter().map(|w| (w.at_seconds - at) * (w.tokens_per_second - speed)).sum();
        let slope = if spread > 0.0 && speed > 0.0 { common / spread / speed * 60.0 } else { 0.0 };
        let (model, fixed) =
            (slowdown(&windows, |w| w.tokens_per_second), slowdown(&windows, |w| w.fixed_per_second));
        let verdict = match model > SLOWER {
            false => Verdict::Steady,
            // What the processor lost explains at least half of it.
            true if fixed > model / 2.0 => Verdict::Throttling,
            true => Verdict::Noise,
        };
        Sustained { windows, slope_per_minute: slope, slowdown: model, fixed_slowdown: fixed, verdict }
    }
}

/// Work that takes the same instructions every time and hardly any memory; gives how often a second it is done.
fn fixed_work(numbers: &mut [f32]) -> f64 {
    let watch = Stopwatch::start();
    for _ in 0..FIXED_ROUNDS {
        for number in black_box(&mut *numbers) {
            *number = *number * 0.999 + 0.001;
        }
    }
    black_box(&numbers);
    1.0 / watch.elapsed().0.max(1e-9)
}

/// Answers for `seconds`, again and again from behind the prompt, whose tokens are in the cache.
pub fn run(
    model: &mut LanguageModel,
    prompt_len: usize,
    count: usize,
    seconds: f64,
    mut step: impl FnMut(&mut LanguageModel, &SoleSequence, usize) -> Outcome<()>,
) -> Outcome<Sustained> {
    let sole = SoleSequence::of(model);
    let end = (prompt_len + count).min(model.context_len());
    let (mut numbers, mut windows) = (vec![1.0f32; FIXED_NUMBERS], Vec::new());
    let least = (seconds / WINDOWS).max(WINDOW_MIN);
    let (watch, mut position) = (Stopwatch::start(), prompt_len);
    while watch.elapsed().0 < seconds || windows.is_empty() {
        let begin = watch.elapsed().0;
        let (window, mut tokens) = (Stopwatch::start(), 0);
        while tokens == 0 || window.elapsed().0 < least {
            step(model, &sole, position)?;
            tokens += 1;
            position = if position + 1 < end { position + 1 } else { prompt_len };
        }
        let took = window.elapsed().0;
        windows.push(Window {
            at_seconds: begin + took / 2.0,
            tokens,
            tokens_per_second: tokens as f64 / took.max(1e-9),
            fixed_per_second: fixed_work(&mut numbers),
        });
    }
    Ok(Sustained::of(windows))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(speed: impl Fn(usize) -> f64, fixed: impl Fn(usize) -> f64) -> Sustained {
        let window = |i: usize| Window {
            at_seconds: i as f64,
            tokens: 10,
            tokens_per_second: speed(i),
            fixed_per_second: fixed(i),
        };
        Sustained::of((0..60).map(window).collect())
    }

    #[test]
    fn a_loss_of_speed_is_told_and_the_processor_is_blamed_only_where_it_slowed_down() {
        let steady = judged(|i| 20.0 + (i % 3) as f64 * 0.1, |_| 100.0);
        assert_eq!(steady.verdict, Verdict::Steady);
        assert!(steady.slope_per_minute.abs() < 0.01, "{steady:?}");
        let falling = |i: usize| 20.0 - i as f64 * 0.1;
        let hot = judged(falling, |i| 100.0 - i as f64 * 0.5);
        assert_eq!(hot.verdict, Verdict::Throttling);
        assert!((hot.slope_per_minute + 6.0 / 17.05).abs() < 1e-6, "{hot:?}");
        assert!((hot.slowdown - 4.0 / 19.05).abs() < 1e-9, "{hot:?}");
        assert_eq!(judged(falling, |_| 100.0).verdict, Verdict::Noise);
        assert_eq!(judged(|i| 10.0 + i as f64, |_| 100.0).verdict, Verdict::Steady, "faster is no loss");
        assert_eq!(Sustained::of(Vec::new()).verdict, Verdict::Steady);
    }

    #[test]
    fn fixed_work_takes_time() {
        let rate = fixed_work(&mut [1.0; FIXED_NUMBERS]);
        assert!(rate.is_finite() && rate > 0.0);
    }
}
