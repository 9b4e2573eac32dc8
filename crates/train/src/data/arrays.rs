//! Samples that lie in memory.

use std::path::Path;

use lightering_formats::npy;
use lightering_graph::{DType, Tensor};
use lightering_meter::{MemoryPool, Reservation};
use lightering_units::Bytes;

use super::{Dataset, Feature, LABEL};
use crate::{Random, TrainError};

/// Arrays whose first dimension counts the samples; the last one is the label.
#[derive(Debug)]
pub struct ArrayDataset {
    arrays: Vec<Tensor>,
    features: Vec<Feature>,
    classes: Vec<String>,
    len: usize,
    _memory: Option<Reservation>,
}

impl ArrayDataset {
    /// A data set of named arrays. Integer labels become `i64`, other numbers `f32`; bytes of pictures (a feature called
    /// `image` of `u8`) become 0 to 1.
    ///
    /// # Errors
    /// The arrays have no or different first dimensions, or hold text.
    pub fn new(arrays: Vec<(String, Tensor)>, classes: Vec<String>) -> Result<ArrayDataset, TrainError> {
        let place = "arrays";
        let Some((first, _)) = arrays.first() else {
            return Err(TrainError::invalid(place, "none", "at least one feature and a label"));
        };
        let first = first.clone();
        let mut len = None;
        let (mut tensors, mut features) = (Vec::new(), Vec::new());
        for (name, tensor) in arrays {
            let Some((&count, dims)) = tensor.dims().split_first() else {
                return Err(TrainError::invalid(
                    place,
                    format!("{name:?} is a single number"),
                    "one row per sample",
                ));
            };
            if *len.get_or_insert(count) != count {
                return Err(TrainError::invalid(
                    place,
                    format!("{name:?} has {count} rows and {first:?} has {}", len.unwrap_or(0)),
                    "as many rows in each array",
                ));
            }
            let dims = dims.to_vec();
            // A column of class numbers is a class per sample.
            let dims = if name == LABEL && dims == [1] && tensor.to_i64s().is_some() { vec![] } else { dims };
            let tensor = convert(&name, tensor)?;
            features.push(Feature::new(name, tensor.dtype(), &dims));
            tensors.push(tensor);
        }
        let len = len.unwrap_or(0);
        Ok(ArrayDataset { arrays: tensors, features, classes, len, _memory: None })
    }

    /// Keeps a reservation as long as the arrays.
    pub(super) fn within(mut self, memory: Reservation) -> ArrayDataset {
        self._memory = Some(memory);
        self
    }

    /// Reads an `.npz` archive with the arrays `x` (or `image`, `images`, `features`, `x_train`) and `y` (or `label`,
    /// `labels`, `target`, `y_train`), for `part` `train` or `test`. Other names of inputs are kept.
    pub(super) fn open(
        path: &Path,
        part: &str,
        pool: &MemoryPool,
    ) -> Result<Option<ArrayDataset>, TrainError> {
        let place = path.display().to_string();
        let size = std::fs::metadata(path).map_err(|e| TrainError::io(path, e))?.len();
        let limit = pool.available().map_or(npy::MAX_ARCHIVE_BYTES, |b| b.0);
        let file = std::fs::File::open(path).map_err(|e| TrainError::io(path, e))?;
        let arrays = npy::read_npz_within(std::io::BufReader::new(file), limit.max(size))
            .map_err(|e| e.within(&place))?;
        let split = arrays.iter().any(|(n, _)| n.ends_with("_test") || n.ends_with("_train"));
        let mut inputs = Vec::new();
        let mut label = None;
        for (name, tensor) in arrays {
            let name = match (name.strip_suffix(&format!("_{part}")), split) {
                (Some(name), _) => name.to_owned(),
                (None, true) => continue,
                (None, false) => name,
            };
            match name.as_str() {
                "y" | "label" | "labels" | "target" | "targets" => label = Some(tensor),
                "x" if tensor.dims().len() == 4 => inputs.push(("image".to_owned(), pictures(tensor))),
                "image" | "images" => inputs.push(("image".to_owned(), pictures(tensor))),
                "x" => inputs.push(("features".to_owned(), tensor)),
                _ => inputs.push((name, tensor)),
            }
        }
        if split && part == "test" && inputs.is_empty() {
            return Ok(None);
        }
        if !split && part == "test" {
            return Ok(None);
        }
        let Some(label) = label else {
            return Err(TrainError::invalid(
                place,
                "no array called y or label",
                "the labels of the samples",
            ));
        };
        if inputs.is_empty() {
            return Err(TrainError::invalid(place, "no array beside the labels", "an array called x"));
        }
        let classes = match label.to_i64s() {
            Some(labels) if label.dims().iter().skip(1).product::<usize>() == 1 => {
                class_numbers(&place, labels.iter().copied())?
            }
            _ => Vec::new(),
        };
        inputs.push((LABEL.into(), label));
        let mut set = ArrayDataset::new(inputs, classes)?;
        let bytes = set.arrays.iter().map(|t| t.size_bytes().0).sum();
        set._memory = Some(pool.reserve(format!("arrays of {place}"), Bytes(bytes))?);
        Ok(Some(set))
    }
}

/// Names `0`, `1`, … up to the largest label.
pub(super) fn class_numbers(
    place: &str,
    labels: impl Iterator<Item = i64>,
) -> Result<Vec<String>, TrainError> {
    let mut largest = -1;
    for label in labels {
        if !(0..super::tokens::MAX_VOCABULARY as i64).contains(&label) {
            return Err(TrainError::invalid(
                place,
                format!("label {label}"),
                format!("classes counted from 0, at most {}", super::tokens::MAX_VOCABULARY),
            ));
        }
        largest = largest.max(label);
    }
    Ok((0..=largest).map(|c| c.to_string()).collect())
}

/// Grey pictures `[n, h, w]` get a channel axis.
fn pictures(tensor: Tensor) -> Tensor {
    match *tensor.dims() {
        [n, h, w] => tensor.into_shape(&[n, 1, h, w]),
        _ => tensor,
    }
}

fn convert(name: &str, tensor: Tensor) -> Result<Tensor, TrainError> {
    let dims = tensor.dims().to_vec();
    if matches!(tensor.dtype(), DType::F32 | DType::I64) {
        return Ok(tensor);
    }
    if (name == LABEL || name == "tokens")
        && let Some(labels) = tensor.to_i64s()
    {
        return Ok(Tensor::from_slice(&dims, &labels));
    }
    let scale = if name == "image" && tensor.dtype() == DType::U8 { 255.0 } else { 1.0 };
    let values = tensor.to_f64s().ok_or_else(|| {
        TrainError::invalid("arrays", format!("{name:?} holds {}", tensor.dtype()), "an array of numbers")
    })?;
    let values: Vec<f32> = values.iter().map(|v| (v / scale) as f32).collect();
    Ok(Tensor::from_slice(&dims, &values))
}

impl Dataset for ArrayDataset {
    fn len(&self) -> usize {
        self.len
    }

    fn features(&self) -> &[Feature] {
        &self.features
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn read(&self, index: usize, _: &mut Random, targets: &mut [&mut [u8]]) -> Result<(), TrainError> {
        for ((array, feature), target) in self.arrays.iter().zip(&self.features).zip(targets) {
            let size = feature.size_bytes();
            target.copy_from_slice(&array.as_bytes()[index * size..(index + 1) * size]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archives_are_read_with_their_parts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set.npz");
        let x = Tensor::from_slice(&[2, 2, 2], &[0u8, 51, 102, 255, 1, 2, 3, 4]);
        let y = Tensor::from_slice(&[2, 1], &[1u8, 0]);
        let file = std::fs::File::create(&path).unwrap();
        npy::write_npz(
            [("images_train", &x), ("y_train", &y), ("images_test", &x), ("y_test", &y)],
            true,
            file,
        )
        .unwrap();
        let pool = MemoryPool::unbounded();
        let set = ArrayDataset::open(&path, "train", &pool).unwrap().unwrap();
        assert_eq!(set.features()[0].dims, [1, 2, 2]);
        assert_eq!(set.features()[1].dims, [0usize; 0]);
        assert_eq!(set.classes(), ["0", "1"]);
        assert!(pool.used().0 > 0);
        let (mut image, mut label) = ([0f32; 4], [0i64; 1]);
        set.read(
            0,
            &mut Random::new(0),
            &mut [bytemuck::cast_slice_mut(&mut image), bytemuck::cast_slice_mut(&mut label)],
        )
        .unwrap();
        assert_eq!((image, label), ([0.0, 0.2, 0.4, 1.0], [1]));
        assert!(ArrayDataset::open(&path, "test", &pool).unwrap().is_some());
    }

    #[test]
    fn arrays_that_do_not_fit_together_are_refused() {
        let error = ArrayDataset::new(
            vec![
                ("x".into(), Tensor::zeros(DType::F32, &[2, 3])),
                (LABEL.into(), Tensor::zeros(DType::I64, &[3])),
            ],
            vec![],
        )
        .unwrap_err();
        assert!(error.to_string().contains("as many rows"), "{error}");
    }
}
