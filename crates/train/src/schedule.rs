//! Learning rates over steps.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::TrainError;

/// Largest learning rate that is taken for one rather than for a slip of the keyboard.
pub const RATE_MAX: f32 = 100.0;

/// How a learning rate changes from step to step.
///
/// Written as `kind:rate,key=value…`:
/// `constant:0.1`, `step:0.1,every=1000,gamma=0.1`, `cosine:0.1,min=0.001`, `onecycle:0.1,rise=0.3,div=25,final=1e4`,
/// `restarts:0.1,period=1000,factor=2,min=0`, `polynomial:0.1,power=2,min=0`, `linear:0.1` (a polynomial of power 1);
/// each with `warmup=500` (steps) or `warmup=5%` (of all steps). A number alone is a constant rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// The largest rate.
    pub rate: f32,
    /// How it changes.
    pub kind: ScheduleKind,
    /// A linear rise from near 0 before it.
    pub warmup: Warmup,
}

/// The shape of a [`Schedule`] after its warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// No change.
    Constant,
    /// Times `gamma` at every multiple of `every` steps.
    Step {
        /// Steps between two changes.
        every: u64,
        /// The factor.
        gamma: f32,
    },
    /// Half a cosine down to `min` at the last step (Loshchilov and Hutter, 2017, equation 5, one period).
    Cosine {
        /// The last rate.
        min: f32,
    },
    /// Up from `rate / div` in a share `rise` of the steps, then down to `rate / (div · final)`, both along half a
    /// cosine (Smith and Topin, 2018).
    OneCycle {
        /// Share of the steps that go up.
        rise: f32,
        /// Largest over first rate.
        div: f32,
        /// First over last rate.
        end: f32,
    },
    /// Half a cosine, again and again, each `factor` times as long as the one before.
    Restarts {
        /// Steps of the first.
        period: u64,
        /// Growth.
        factor: f32,
        /// The lowest rate.
        min: f32,
    },
    /// `min + (rate - min)·(1 - step/total)^power`.
    Polynomial {
        /// The exponent.
        power: f32,
        /// The last rate.
        min: f32,
    },
}

/// Length of a warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Warmup {
    /// So many steps.
    Steps(u64),
    /// A share of all steps, 0 to 1.
    Share(f32),
}

impl Schedule {
    /// A rate that never changes.
    pub fn constant(rate: f32) -> Schedule {
        Schedule { rate, kind: ScheduleKind::Constant, warmup: Warmup::Steps(0) }
    }

    /// Steps of the warm-up in a training of `total` steps.
    pub fn warmup_steps(&self, total: u64) -> u64 {
        match self.warmup {
            Warmup::Steps(steps) => steps,
            Warmup::Share(share) => (total as f64 * f64::from(share)).round() as u64,
        }
    }

    /// The learning rate of step `step` (from 0) of `total`. Beyond the last step it stays.
    pub fn rate_at(&self, step: u64, total: u64) -> f32 {
        let warmup = self.warmup_steps(total);
        if step < warmup {
            return (f64::from(self.rate) * (step + 1) as f64 / (warmup + 1) as f64) as f32;
        }
        let (step, total) = (step - warmup, total.saturating_sub(warmup).max(1));
        let rate = f64::from(self.rate);
        // Where we are, 0 at the first and 1 after the last step.
        let progress = (step as f64 / total as f64).min(1.0);
        let cosine = |from: f64, to: f64, at: f64| {
            to + (from - to) * 0.5 * (1.0 + libm::cos(std::f64::consts::PI * at))
        };
        let value = match self.kind {
            ScheduleKind::Constant => rate,
            ScheduleKind::Step { every, gamma } => {
                rate * libm::pow(f64::from(gamma), (step / every.max(1)) as f64)
            }
            ScheduleKind::Cosine { min } => cosine(rate, f64::from(min), progress),
            ScheduleKind::OneCycle { rise, div, end } => {
                let (rise, first) = (f64::from(rise), rate / f64::from(div));
                if progress < rise {
                    cosine(first, rate, progress / rise)
                } else {
                    cosine(rate, first / f64::from(end), (progress - rise) / (1.0 - rise))
                }
            }
            ScheduleKind::Restarts { period, factor, min } => {
                let (mut left, mut period) = (step as f64, period.max(1) as f64);
                if factor == 1.0 {
                    left %= period;
                }
                // With a factor above 1 the number of rounds is logarithmic in the steps.
                while left >= period {
                    left -= period;
                    period *= f64::from(factor);
                }
                cosine(rate, f64::from(min), left / period)
            }
            ScheduleKind::Polynomial { power, min } => {
                let min = f64::from(min);
                min + (rate - min) * libm::pow(1.0 - progress, f64::from(power))
            }
        };
        value as f32
    }
}

/// The parts of a text such as `name:0.1,key=value`, each key once.
pub(crate) struct Settings<'a> {
    place: &'static str,
    pairs: Vec<(&'a str, &'a str)>,
}

impl<'a> Settings<'a> {
    /// Cuts `text` at commas; every part must be `key=value`.
    pub(crate) fn parse(place: &'static str, text: &'a str) -> Result<Settings<'a>, TrainError> {
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let (key, value) = part.split_once('=').ok_or_else(|| {
                TrainError::invalid(place, format!("{part:?}"), "key=value pairs joined by commas")
            })?;
            let (key, value) = (key.trim(), value.trim());
            if pairs.iter().any(|(k, _)| *k == key) {
                return Err(TrainError::invalid(place, format!("{key:?} twice"), "each key once"));
            }
            pairs.push((key, value));
        }
        Ok(Settings { place, pairs })
    }

    /// Takes a key out.
    pub(crate) fn take(&mut self, key: &str) -> Option<&'a str> {
        let at = self.pairs.iter().position(|(k, _)| *k == key)?;
        Some(self.pairs.remove(at).1)
    }

    /// Takes a number out that must lie in `range`.
    pub(crate) fn number(
        &mut self,
        key: &str,
        default: f32,
        range: std::ops::RangeInclusive<f32>,
    ) -> Result<f32, TrainError> {
        let Some(text) = self.take(key) else { return Ok(default) };
        text.parse::<f32>().ok().filter(|v| range.contains(v)).ok_or_else(|| {
            TrainError::invalid(
                self.place,
                format!("{key}={text:?}"),
                format!("a number from {} to {}", range.start(), range.end()),
            )
        })
    }

    /// Takes a positive integer out.
    pub(crate) fn count(&mut self, key: &str) -> Result<Option<u64>, TrainError> {
        let Some(text) = self.take(key) else { return Ok(None) };
        text.parse::<u64>().ok().filter(|v| *v > 0).map(Some).ok_or_else(|| {
            TrainError::invalid(self.place, format!("{key}={text:?}"), "a whole number above 0")
        })
    }

    /// Fails when a key is left.
    pub(crate) fn finish(self, known: &str) -> Result<(), TrainError> {
        match self.pairs.first() {
            None => Ok(()),
            Some((key, _)) => Err(TrainError::invalid(self.place, format!("unknown key {key:?}"), known)),
        }
    }
}

fn rate(text: &str) -> Result<f32, TrainError> {
    text.trim().parse::<f32>().ok().filter(|r| *r > 0.0 && *r <= RATE_MAX).ok_or_else(|| {
        TrainError::invalid(
            "learning rate",
            format!("{text:?}"),
            format!("a number above 0 and at most {RATE_MAX}, such as 0.001"),
        )
    })
}

impl FromStr for Schedule {
    type Err = TrainError;

    fn from_str(text: &str) -> Result<Schedule, TrainError> {
        const PLACE: &str = "schedule";
        let Some((name, rest)) = text.split_once(':') else {
            return Ok(Schedule::constant(rate(text)?));
        };
        let (first, rest) = rest.split_once(',').unwrap_or((rest, ""));
        let rate = rate(first)?;
        let mut s = Settings::parse(PLACE, rest)?;
        let warmup = match s.take("warmup") {
            None => Warmup::Steps(0),
            Some(text) => match text.strip_suffix('%') {
                Some(percent) => {
                    { percent.parse::<f32>().ok().filter(|p| (0.0..100.0).contains(p)).map(|p| p / 100.0) }
                        .map(Warmup::Share)
                }
                None => text.parse::<u64>().ok().map(Warmup::Steps),
            }
            .ok_or_else(|| {
                TrainError::invalid(
                    PLACE,
                    format!("warmup={text:?}"),
                    "a number of steps or a share such as 5%",
                )
            })?,
        };
        let (kind, known) = match name.trim() {
            "constant" => (ScheduleKind::Constant, "warmup"),
            "step" => {
                let every = s.count("every")?.ok_or_else(|| {
                    TrainError::invalid(PLACE, "step without every", "every=N, steps between two changes")
                })?;
                let gamma = s.number("gamma", 0.1, 0.0..=1.0)?;
                (ScheduleKind::Step { every, gamma }, "every, gamma or warmup")
            }
            "cosine" => (ScheduleKind::Cosine { min: s.number("min", 0.0, 0.0..=rate)? }, "min or warmup"),
            "onecycle" => (
                ScheduleKind::OneCycle {
                    rise: s.number("rise", 0.3, 0.01..=0.99)?,
                    div: s.number("div", 25.0, 1.0..=1e6)?,
                    end: s.number("final", 1e4, 1.0..=1e9)?,
                },
                "rise, div, final or warmup",
            ),
            "restarts" => {
                let period = s.count("period")?.ok_or_else(|| {
                    TrainError::invalid(PLACE, "restarts without period", "period=N, steps of the first")
                })?;
                let factor = s.number("factor", 1.0, 1.0..=100.0)?;
                let min = s.number("min", 0.0, 0.0..=rate)?;
                (ScheduleKind::Restarts { period, factor, min }, "period, factor, min or warmup")
            }
            "polynomial" | "linear" => {
                let power = if name.trim() == "linear" { 1.0 } else { s.number("power", 1.0, 0.01..=100.0)? };
                let min = s.number("min", 0.0, 0.0..=rate)?;
                (ScheduleKind::Polynomial { power, min }, "power, min or warmup")
            }
            other => {
                return Err(TrainError::invalid(
                    PLACE,
                    format!("{other:?}"),
                    "constant, step, cosine, onecycle, restarts, polynomial or linear",
                ));
            }
        };
        s.finish(known)?;
        Ok(Schedule { rate, kind, warmup })
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = self.rate;
        match self.kind {
            ScheduleKind::Constant => write!(f, "constant:{rate}")?,
            ScheduleKind::Step { every, gamma } => write!(f, "step:{rate},every={every},gamma={gamma}")?,
            ScheduleKind::Cosine { min } => write!(f, "cosine:{rate},min={min}")?,
            ScheduleKind::OneCycle { rise, div, end } => {
                write!(f, "onecycle:{rate},rise={rise},div={div},final={end}")?;
            }
            ScheduleKind::Restarts { period, factor, min } => {
                write!(f, "restarts:{rate},period={period},factor={factor},min={min}")?;
            }
            ScheduleKind::Polynomial { power, min } => {
                write!(f, "polynomial:{rate},power={power},min={min}")?;
            }
        }
        match self.warmup {
            Warmup::Steps(0) => Ok(()),
            Warmup::Steps(steps) => write!(f, ",warmup={steps}"),
            Warmup::Share(share) => write!(f, ",warmup={}%", share * 100.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(text: &str, total: u64, at: &[u64]) -> Vec<f32> {
        let schedule: Schedule = text.parse().unwrap();
        let back: Schedule = schedule.to_string().parse().unwrap();
        assert_eq!(back, schedule);
        let json = serde_json::to_string(&schedule).unwrap();
        assert_eq!(serde_json::from_str::<Schedule>(&json).unwrap(), schedule);
        at.iter().map(|&s| schedule.rate_at(s, total)).collect()
    }

    fn close(a: &[f32], b: &[f32]) {
        assert!(a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6), "{a:?} {b:?}");
    }

    #[test]
    fn shapes() {
        close(&rates("0.5", 10, &[0, 9, 99]), &[0.5, 0.5, 0.5]);
        close(&rates("step:1,every=3,gamma=0.5", 10, &[0, 2, 3, 6]), &[1.0, 1.0, 0.5, 0.25]);
        close(&rates("cosine:0.1,min=0.02", 100, &[0, 50, 100, 200]), &[0.1, 0.06, 0.02, 0.02]);
        close(
            &rates("onecycle:1,rise=0.5,div=4,final=10", 100, &[0, 25, 50, 100]),
            &[0.25, 0.625, 1.0, 0.025],
        );
        close(
            &rates("restarts:1,period=4,factor=2", 100, &[0, 2, 4, 8, 12, 20]),
            &[1.0, 0.5, 1.0, 0.5, 1.0, 0.5],
        );
        close(&rates("restarts:1,period=4", 100, &[2, 4, 4_000_002]), &[0.5, 1.0, 0.5]);
        close(&rates("polynomial:1,power=2", 10, &[0, 5, 10]), &[1.0, 0.25, 0.0]);
        close(&rates("linear:1,warmup=3", 13, &[0, 1, 2, 3, 8]), &[0.25, 0.5, 0.75, 1.0, 0.5]);
        close(&rates("constant:1,warmup=10%", 90, &[0, 8, 9]), &[0.1, 0.9, 1.0]);
    }

    #[test]
    fn slips_are_refused() {
        for (text, part) in [
            ("0", "above 0"),
            ("-0.1", "above 0"),
            ("nan", "above 0"),
            ("1e3", "at most 100"),
            ("0,1", "above 0"),
            ("cosin:0.1", "cosine"),
            ("cosine:0.1,warmpu=5", "warmpu"),
            ("cosine:0.1,min=0.2", "from 0 to 0.1"),
            ("step:0.1", "every"),
            ("restarts:0.1,period=0", "above 0"),
            ("cosine:0.1,min=0,min=0", "twice"),
            ("cosine:0.1,warmup=-3", "share"),
        ] {
            let error = text.parse::<Schedule>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
