//! Training: what stands around the step. Data and loaders, augmentation, losses, schedules, metrics, checkpoints,
//! event files and reports, and small models to start from.
//!
//! ```
//! use std::sync::Arc;
//! use lightering_graph::Tensor;
//! use lightering_meter::MemoryPool;
//! use lightering_train::{ArrayDataset, Loader, LoaderOptions};
//! let images = Tensor::from_slice(&[4, 1, 2, 2], &[0.5f32; 16]);
//! let labels = Tensor::from_slice(&[4], &[0i64, 1, 0, 1]);
//! let data = ArrayDataset::new(vec![("image".into(), images), ("label".into(), labels)], vec!["a".into(), "b".into()])?;
//! let options = LoaderOptions { batch: 2, epochs: Some(1), ..LoaderOptions::default() };
//! let mut loader = Loader::new(Arc::new(data), options, &MemoryPool::unbounded())?;
//! while let Some(batch) = loader.next_batch()? {
//!     assert_eq!(batch.tensor("image").unwrap().dims(), [2, 1, 2, 2]);
//! }
//! # Ok::<(), lightering_train::TrainError>(())
//! ```
//!
//! Invariants: every random choice is a function of the seed and of what it is for (epoch, sample, step), never of
//! which thread made it when; memory that grows with the data is asked of a [`MemoryPool`](lightering_meter::MemoryPool)
//! first; knows no command line and no language models.
#![forbid(unsafe_code)]

mod augment;
pub mod checkpoint;
mod data;
mod durable;
mod error;
mod events;
mod export;
mod fit;
mod loader;
mod loss;
mod metrics;
mod models;
mod optimizer;
mod random;
mod report;
mod schedule;
pub mod scheme;
mod step;
mod trainer;
mod zeroth_order;

pub use augment::{Augmentation, Mixing};
pub use checkpoint::{Checkpoint, Checkpoints, Found, TrainState};
pub use data::*;
pub use error::TrainError;
pub use events::{EventWriter, crc32c};
pub use export::{StateReader, export_onnx, write_onnx};
pub use fit::{Control, Epoch, Event, FitOptions, RightAnswers, evaluate, fit};
pub use loader::{Batch, Loader, LoaderOptions, Position};
pub use loss::Loss;
pub use metrics::{Classification, EarlyStopping, MAX_CONFUSION_CLASSES, Regression, RunningMean, TOP_MAX};
pub use models::Architecture;
pub use optimizer::Optimizer;
pub use random::Random;
pub use report::{Report, ReportFile};
pub use schedule::{Schedule, ScheduleKind, Warmup};
pub use step::{
    AUXILIARY_LOSS, Change, EVALUATION, LOSS, SCHEDULE, Step, StepOptions, build_step, trainable_parameters,
};
pub use trainer::{ChosenStep, Prediction, StepReport, Trainer, choose};
pub use zeroth_order::*;
