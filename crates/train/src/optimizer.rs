use std::str::FromStr;

use lightering_graph::UpdateRule;
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::schedule::Settings;

/// An optimizer by name, written as `name` or `name:key=value,…`: `sgd:momentum=0.9,nesterov=1,decay=5e-4`,
/// `adam:beta1=0.9,beta2=0.999,eps=1e-8,decay=0`, `adamw:decay=0.01`, `adam8` (moments in 8 bits, decoupled decay),
/// `lion:beta1=0.9,beta2=0.99,decay=0`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Optimizer {
    /// How parameters follow their gradients.
    pub rule: UpdateRule,
    /// A learning rate to start from when none is given.
    pub usual_rate: f32,
}

impl FromStr for Optimizer {
    type Err = TrainError;

    fn from_str(text: &str) -> Result<Optimizer, TrainError> {
        const PLACE: &str = "optimizer";
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        let mut s = Settings::parse(PLACE, rest)?;
        let share = |s: &mut Settings<'_>, key, default| s.number(key, default, 0.0..=0.999_999_9);
        let (rule, usual_rate, known) = match name.trim() {
            "sgd" => {
                let momentum = share(&mut s, "momentum", 0.9)?;
                let nesterov = s.number("nesterov", 0.0, 0.0..=1.0)? != 0.0;
                let weight_decay = s.number("decay", 0.0, 0.0..=1.0)?;
                (UpdateRule::Sgd { momentum, nesterov, weight_decay }, 0.1, "momentum, nesterov or decay")
            }
            name @ ("adam" | "adamw" | "adam8") => {
                let (beta1, beta2) = (share(&mut s, "beta1", 0.9)?, share(&mut s, "beta2", 0.999)?);
                let epsilon = s.number("eps", 1e-8, 1e-12..=1.0)?;
                let usual = if name == "adam" { 0.0 } else { 0.01 };
                let weight_decay = s.number("decay", usual, 0.0..=1.0)?;
                let rule = match name {
                    "adam8" => UpdateRule::Adam8 { beta1, beta2, epsilon, weight_decay },
                    _ => UpdateRule::Adam { beta1, beta2, epsilon, weight_decay, decoupled: name == "adamw" },
                };
                (rule, 1e-3, "beta1, beta2, eps or decay")
            }
            "lion" => {
                let (beta1, beta2) = (share(&mut s, "beta1", 0.9)?, share(&mut s, "beta2", 0.99)?);
                let weight_decay = s.number("decay", 0.0, 0.0..=1.0)?;
                (UpdateRule::Lion { beta1, beta2, weight_decay }, 1e-4, "beta1, beta2 or decay")
            }
            other => {
                return Err(TrainError::invalid(
                    PLACE,
                    format!("{other:?}"),
                    "sgd, adam, adamw, adam8 or lion",
                ));
            }
        };
        s.finish(known)?;
        Ok(Optimizer { rule, usual_rate })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_slips() {
        let sgd: Optimizer = "sgd:momentum=0.8,nesterov=1,decay=0.001".parse().unwrap();
        assert_eq!(sgd.rule, UpdateRule::Sgd { momentum: 0.8, nesterov: true, weight_decay: 0.001 });
        let adamw: Optimizer = "adamw".parse().unwrap();
        assert!(matches!(adamw.rule, UpdateRule::Adam { decoupled: true, weight_decay: 0.01, .. }));
        for (text, part) in [("sdg", "sgd"), ("adam:beta=1", "beta"), ("sgd:momentum=1", "momentum")] {
            let error = text.parse::<Optimizer>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
