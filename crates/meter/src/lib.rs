//! What was used, by whom: memory, time, bytes, energy, receipts.
//!
//! Three questions are answered here. *May I have it?* A [`MemoryPool`] hands out named [`Reservation`]s under a
//! limit; no large buffer exists without one. *What did the kernel see?* [`process`], [`cgroup`] and [`energy`] read
//! the operating system's own counts and say "unavailable" (`None`) where there are none. *What do we tell the user?*
//! A [`Receipt`] sets predicted beside measured, as JSON whose schema is `docs/receipt.md`; a [`MachineProfile`] holds
//! what `lighter doctor` measured, for the planner.
//!
//! ```
//! use lightering_meter::MemoryPool;
//! use lightering_units::Bytes;
//!
//! let pool = MemoryPool::with_limit(Bytes::mib(64));
//! let weights = pool.reserve("weights", Bytes::mib(40))?;
//! let refused = pool.reserve("arena", Bytes::mib(30)).unwrap_err();
//! assert!(refused.to_string().contains("weights"));
//! drop(weights);
//! assert_eq!((pool.used(), pool.peak()), (Bytes::ZERO, Bytes::mib(40)));
//! # Ok::<(), lightering_meter::MeterError>(())
//! ```
//!
//! Invariants: knows no crate but `units`; never decides anything (policies live above); never guesses: a value that
//! was not measured is absent, and a modelled value names its model. See ARCHITECTURE.md for the floors.
#![forbid(unsafe_code)]

pub mod cgroup;
mod checksum;
pub mod energy;
mod error;
pub mod host;
mod machine_profile;
mod memory_pool;
pub mod process;
mod receipt;
mod span;
mod tier;

pub use checksum::{Checksum, sha256_file, sha256_hex};
pub use energy::{Energy, EnergyMeter, EnergyModel};
pub use error::MeterError;
pub use machine_profile::{
    CacheLevel, ComputeRate, DiskPattern, DiskRate, FIXED_COST_LIMIT, MACHINE_SCHEMA, MachineProfile,
    MemoryRate, ProfileSource,
};
pub use memory_pool::{Holder, LOG_EVENTS_MAX, MemoryPool, PoolEvent, Reservation};
pub use receipt::{
    Budget, MachineSummary, Measured, ModelIdentity, OutputReceipt, PlanStep, PlanSummary, Predicted,
    PredictionError, RECEIPT_SCHEMA, Receipt, percent_error,
};
pub use span::{Label, SpanRecorder, SpanTotal, Stopwatch};
pub use tier::{Tier, TierBytes};
