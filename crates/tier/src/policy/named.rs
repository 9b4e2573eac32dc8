use std::sync::Arc;

use super::{
    AdmissionPolicy, Always, Belady, EvictionPolicy, FrequencyPredictor, FrequencyTable, GlobalLru, GroupLru,
    Lfu, Never, NoPrediction, Oracle, Pays, Predictor, RepeatLast, StaticHot,
};
use crate::{ChunkTrace, TierError};

/// Names of the eviction policies.
pub const EVICTIONS: [&str; 5] = ["lru", "lru-global", "lfu", "static-hot", "belady"];

/// Names of the predictors.
pub const PREDICTORS: [&str; 4] = ["none", "repeat-last", "frequency", "oracle"];

/// Names of the admission policies.
pub const ADMISSIONS: [&str; 3] = ["always", "never", "pays"];

/// What a policy may need to be made.
#[derive(Clone, Debug)]
pub struct PolicyContext {
    /// The groups in order.
    pub groups: Vec<u32>,
    /// Slots of the store.
    pub slots: usize,
    /// A recorded run: an earlier one for `static-hot`, the very one for `belady` and `oracle`.
    pub trace: Option<Arc<ChunkTrace>>,
}

/// The policies of one store.
pub struct PolicySet {
    /// Who leaves.
    pub eviction: Box<dyn EvictionPolicy>,
    /// What is predicted.
    pub predictor: Box<dyn Predictor>,
    /// Which predictions are read ahead.
    pub admission: Box<dyn AdmissionPolicy>,
    /// For how many coming groups predictions are made.
    pub lookahead: usize,
}

impl std::fmt::Debug for PolicySet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}, {} for {} groups, {}",
            self.eviction.name(),
            self.predictor.name(),
            self.lookahead,
            self.admission.name()
        )
    }
}

impl PolicySet {
    /// Makes policies by their names; predictions are made for the next group.
    ///
    /// # Errors
    /// `Invalid` for a name that does not exist, with those that do, and for a policy that needs a trace without one.
    pub fn named(
        eviction: &str,
        predictor: &str,
        admission: &str,
        context: &PolicyContext,
    ) -> Result<PolicySet, TierError> {
        let unknown = |what: &str, name: &str, known: &[&str]| {
            TierError::Invalid(format!("there is no {what} called {name:?}; expected {}", known.join(", ")))
        };
        let trace = |name: &str| {
            context.trace.clone().ok_or_else(|| {
                TierError::Invalid(format!(
                    "{name} needs the trace of a recorded run; record one, or choose another"
                ))
            })
        };
        let eviction: Box<dyn EvictionPolicy> = match eviction {
            "lru" => Box::new(GroupLru::new(&context.groups, context.slots)),
            "lru-global" => Box::new(GlobalLru::default()),
            "lfu" => Box::new(Lfu::default()),
            "static-hot" => {
                let table = FrequencyTable::of(&*trace(eviction)?);
                Box::new(StaticHot::new(&table, &context.groups, context.slots))
            }
            "belady" => Box::new(Belady::new(&trace(eviction)?)),
            other => return Err(unknown("eviction policy", other, &EVICTIONS)),
        };
        let predictor: Box<dyn Predictor> = match predictor {
            "none" => Box::new(NoPrediction),
            "repeat-last" => Box::new(RepeatLast::default()),
            "frequency" => Box::new(FrequencyPredictor::default()),
            "oracle" => Box::new(Oracle::new(trace(predictor)?)),
            other => return Err(unknown("predictor", other, &PREDICTORS)),
        };
        let admission: Box<dyn AdmissionPolicy> = match admission {
            "always" => Box::new(Always),
            "never" => Box::new(Never),
            "pays" => Box::new(Pays),
            other => return Err(unknown("admission policy", other, &ADMISSIONS)),
        };
        Ok(PolicySet { eviction, predictor, admission, lookahead: 1 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SyntheticTrace;

    #[test]
    fn every_name_makes_the_policy_of_that_name() {
        let trace = Arc::new(SyntheticTrace { steps: 2, ..SyntheticTrace::default() }.make().unwrap());
        let context = PolicyContext { groups: vec![0, 1], slots: 4, trace: Some(trace) };
        for name in EVICTIONS {
            assert_eq!(PolicySet::named(name, "none", "never", &context).unwrap().eviction.name(), name);
        }
        for name in PREDICTORS {
            assert_eq!(PolicySet::named("lru", name, "never", &context).unwrap().predictor.name(), name);
        }
        for name in ADMISSIONS {
            assert_eq!(PolicySet::named("lru", "none", name, &context).unwrap().admission.name(), name);
        }
        let blind = PolicyContext { trace: None, ..context };
        let message = |e, p, a| PolicySet::named(e, p, a, &blind).unwrap_err().to_string();
        assert!(message("fifo", "none", "never").contains("lru, lru-global, lfu, static-hot, belady"));
        assert!(message("lru", "fate", "never").contains("repeat-last"));
        assert!(message("lru", "none", "often").contains("pays"));
        assert!(message("belady", "none", "never").contains("needs the trace"));
        assert!(message("lru", "oracle", "never").contains("needs the trace"));
    }
}
