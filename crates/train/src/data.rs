//! Data sets: what a sample is, and the sources that samples come from.

mod arrays;
mod audio;
mod bytes;
mod cifar;
mod idx;
mod image_folder;
mod open;
mod table;
mod tokens;

use std::sync::Arc;

use lightering_graph::DType;
use serde::{Deserialize, Serialize};

use crate::{Random, TrainError};

pub use arrays::ArrayDataset;
pub use audio::{MelSpectrogram, Sound, SoundFolder};
pub use cifar::Cifar;
pub use idx::{IdxArray, IdxDataset, check_idx};
pub use image_folder::ImageFolder;
pub use open::{Normalise, OpenOptions, Split, Vocabulary, open};
pub use table::check_table;
pub use tokens::TokenWindows;

/// Name of the feature that holds what a model shall predict.
pub const LABEL: &str = "label";

/// One tensor of a sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Feature {
    /// `image` (`f32`, `[channels, height, width]`, 0 to 1), `tokens` (`i64`, `[time]`), `features` (`f32`,
    /// `[columns]`), `spectrogram` (`f32`, `[1, bands, frames]`), and at last [`LABEL`]: `i64` of shape `[]` for a
    /// class, `i64` `[time]` for the next tokens, `f32` for numbers.
    pub name: String,
    /// Type of the elements.
    pub dtype: DType,
    /// Shape of one sample.
    pub dims: Vec<usize>,
    /// What the loader does to the feature after augmentation.
    pub normalisation: Option<Normalisation>,
}

impl Feature {
    /// A feature that is not normalised.
    pub fn new(name: impl Into<String>, dtype: DType, dims: &[usize]) -> Feature {
        Feature { name: name.into(), dtype, dims: dims.to_vec(), normalisation: None }
    }

    /// Bytes of one sample.
    pub fn size_bytes(&self) -> usize {
        self.dims.iter().product::<usize>() * self.dtype.size_bytes()
    }
}

/// `(x - mean) / std` along the first axis of a sample, one pair per index (or one for all).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Normalisation {
    /// What is subtracted.
    pub mean: Vec<f32>,
    /// What the difference is divided by.
    pub std: Vec<f32>,
}

impl Normalisation {
    /// Applies it to one sample.
    pub fn apply(&self, sample: &mut [f32]) {
        if self.mean.is_empty() {
            return;
        }
        let plane = (sample.len() / self.mean.len()).max(1);
        for (c, plane) in sample.chunks_mut(plane).enumerate() {
            let (mean, std) = (self.mean[c], self.std[c]);
            plane.iter_mut().for_each(|x| *x = (*x - mean) / std);
        }
    }
}

/// Samples that can be read in any order from any thread.
pub trait Dataset: Send + Sync {
    /// Number of samples.
    fn len(&self) -> usize;

    /// True without samples.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The tensors of a sample; the last one is the [`LABEL`].
    fn features(&self) -> &[Feature];

    /// Names of the classes (or of the tokens); empty when the label is no class.
    fn classes(&self) -> &[String];

    /// Writes the tensors of a sample, each as its elements in the machine's byte order. `random` is that of this
    /// sample in this epoch, for sources that draw (windows of text).
    ///
    /// # Errors
    /// The sample cannot be read.
    fn read(&self, index: usize, random: &mut Random, targets: &mut [&mut [u8]]) -> Result<(), TrainError>;

    /// What a sample is called in messages.
    fn describe(&self, index: usize) -> String {
        format!("sample {index}")
    }

    /// Samples that were left out because they cannot be read, with the reason.
    fn quarantined(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Some samples of another data set.
pub struct Subset {
    of: Arc<dyn Dataset>,
    features: Vec<Feature>,
    indices: Vec<u32>,
}

impl Subset {
    /// The samples of these indices.
    ///
    /// # Panics
    /// When an index is none of the set.
    pub fn new(of: Arc<dyn Dataset>, indices: Vec<u32>) -> Subset {
        assert!(indices.iter().all(|&i| (i as usize) < of.len()), "an index is outside of the data set");
        let features = of.features().to_vec();
        Subset { of, features, indices }
    }
}

impl Dataset for Subset {
    fn len(&self) -> usize {
        self.indices.len()
    }

    fn features(&self) -> &[Feature] {
        &self.features
    }

    fn classes(&self) -> &[String] {
        self.of.classes()
    }

    fn read(&self, index: usize, random: &mut Random, targets: &mut [&mut [u8]]) -> Result<(), TrainError> {
        self.of.read(self.indices[index] as usize, random, targets)
    }

    fn describe(&self, index: usize) -> String {
        self.of.describe(self.indices[index] as usize)
    }

    fn quarantined(&self) -> Vec<String> {
        self.of.quarantined()
    }
}

/// A data set whose features carry another normalisation.
struct Normalised {
    of: Arc<dyn Dataset>,
    features: Vec<Feature>,
}

impl Dataset for Normalised {
    fn len(&self) -> usize {
        self.of.len()
    }

    fn features(&self) -> &[Feature] {
        &self.features
    }

    fn classes(&self) -> &[String] {
        self.of.classes()
    }

    fn read(&self, index: usize, random: &mut Random, targets: &mut [&mut [u8]]) -> Result<(), TrainError> {
        self.of.read(index, random, targets)
    }

    fn describe(&self, index: usize) -> String {
        self.of.describe(index)
    }

    fn quarantined(&self) -> Vec<String> {
        self.of.quarantined()
    }
}

/// The same data set with this normalisation of its first feature.
pub fn normalised(of: Arc<dyn Dataset>, normalisation: Option<Normalisation>) -> Arc<dyn Dataset> {
    let mut features = of.features().to_vec();
    if let Some(first) = features.first_mut() {
        first.normalisation = normalisation;
    }
    Arc::new(Normalised { of, features })
}

/// Mean and standard deviation of the first feature along its first axis, over at most `samples` samples at even
/// distances. A constant channel gets a deviation of 1.
///
/// # Errors
/// A sample cannot be read or the feature is not `f32`.
pub fn statistics(dataset: &dyn Dataset, samples: usize) -> Result<Normalisation, TrainError> {
    let features = dataset.features();
    let first = &features[0];
    if first.dtype != DType::F32 {
        return Err(TrainError::invalid(
            "normalisation",
            format!("{} is {}", first.name, first.dtype),
            "a feature of f32",
        ));
    }
    let channels = first.dims.first().copied().unwrap_or(1).max(1);
    let (mut sum, mut squares, mut count) = (vec![0f64; channels], vec![0f64; channels], 0u64);
    let mut buffers: Vec<Vec<u64>> = features.iter().map(|f| vec![0; f.size_bytes().div_ceil(8)]).collect();
    let taken = samples.min(dataset.len());
    for i in 0..taken {
        let index = i * dataset.len() / taken;
        let mut targets: Vec<&mut [u8]> = buffers
            .iter_mut()
            .zip(features)
            .map(|(b, f)| &mut bytemuck::cast_slice_mut(b)[..f.size_bytes()])
            .collect();
        dataset.read(index, &mut Random::derived(0, &[index as u64]), &mut targets)?;
        let values: &[f32] = bytemuck::cast_slice(targets[0]);
        let plane = (values.len() / channels).max(1);
        for (c, plane) in values.chunks(plane).enumerate() {
            for &x in plane {
                sum[c] += f64::from(x);
                squares[c] += f64::from(x) * f64::from(x);
            }
        }
        count += plane as u64;
    }
    let n = count.max(1) as f64;
    let mean: Vec<f64> = sum.iter().map(|s| s / n).collect();
    let std = squares.iter().zip(&mean).map(|(s, m)| {
        let deviation = (s / n - m * m).max(0.0).sqrt();
        if deviation > 1e-6 { deviation as f32 } else { 1.0 }
    });
    Ok(Normalisation { std: std.collect(), mean: mean.iter().map(|&m| m as f32).collect() })
}

/// Writes one element into a target.
pub(crate) fn put<T: bytemuck::Pod>(target: &mut [u8], value: T) {
    target[..size_of::<T>()].copy_from_slice(bytemuck::bytes_of(&value));
}

/// Whether a `.bin` file is one of CIFAR's by its name.
pub(crate) fn is_cifar(path: &std::path::Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with("data_batch_") || name == "test_batch.bin"
}
