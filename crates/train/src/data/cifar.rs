//! The binary files of CIFAR-10 and CIFAR-100.

use std::path::{Path, PathBuf};

use lightering_graph::DType;
use lightering_meter::MemoryPool;

use super::bytes::Store;
use super::{Dataset, Feature, LABEL, put};
use crate::{Random, TrainError};

/// Red, green and blue planes of 32x32.
const PIXELS: usize = 3 * 32 * 32;

/// Pictures `image` `f32` `[3, 32, 32]`, 0 to 1, and their classes. A record is one label byte (CIFAR-100: two, the
/// second counts) and 3,072 bytes of pixels; pictures stay on disk.
pub struct Cifar {
    stores: Vec<(Store, usize)>,
    label_bytes: usize,
    classes: Vec<String>,
    features: Vec<Feature>,
    len: usize,
}

impl Cifar {
    /// Opens files of one part.
    ///
    /// # Errors
    /// A file is no whole number of records.
    pub fn open(
        paths: &[PathBuf],
        label_bytes: usize,
        classes: Vec<String>,
        pool: &MemoryPool,
    ) -> Result<Cifar, TrainError> {
        let stores = paths.iter().map(|p| Store::open(p, pool)).collect::<Result<Vec<_>, _>>()?;
        Cifar::from_stores(stores, label_bytes, classes)
    }

    fn from_stores(
        stores: Vec<Store>,
        label_bytes: usize,
        classes: Vec<String>,
    ) -> Result<Cifar, TrainError> {
        let record = (label_bytes + PIXELS) as u64;
        let mut len = 0;
        let mut counted = Vec::new();
        for store in stores {
            if store.len() == 0 || !store.len().is_multiple_of(record) {
                return Err(TrainError::corrupt(
                    &store.name,
                    format!(
                        "{} bytes are no whole number of records of {record} (is it cut short?)",
                        store.len()
                    ),
                ));
            }
            let records = (store.len() / record) as usize;
            len += records;
            counted.push((store, records));
        }
        let features =
            vec![Feature::new("image", DType::F32, &[3, 32, 32]), Feature::new(LABEL, DType::I64, &[])];
        Ok(Cifar { stores: counted, label_bytes, classes, features, len })
    }
}

impl Dataset for Cifar {
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
        let [image, label] = targets else { panic!("a picture has two features") };
        let mut left = index;
        for (store, records) in &self.stores {
            if left >= *records {
                left -= records;
                continue;
            }
            let offset = (left * (self.label_bytes + PIXELS)) as u64;
            let mut labels = [0; 2];
            store.read_at(offset, &mut labels[..self.label_bytes])?;
            // The bytes land at the end of the target and are widened from its start on.
            let at = image.len() - PIXELS;
            store.read_at(offset + self.label_bytes as u64, &mut image[at..])?;
            for i in 0..PIXELS {
                let value = f32::from(image[at + i]) / 255.0;
                put(&mut image[4 * i..], value);
            }
            put(label, i64::from(labels[self.label_bytes - 1]));
            return Ok(());
        }
        panic!("sample {index} is none of the {} of the set", self.len)
    }
}

/// The parts of a folder, if it holds such files: training, test, bytes of labels, names of the classes.
pub(super) fn find(
    folder: &Path,
) -> Result<Option<(Vec<PathBuf>, Vec<PathBuf>, usize, Vec<String>)>, TrainError> {
    let there = |name: &str| Some(folder.join(name)).filter(|p| p.is_file());
    let names = |file: &str, count: usize| -> Result<Vec<String>, TrainError> {
        let lines: Vec<String> = match there(file) {
            Some(path) => std::fs::read_to_string(&path)
                .map_err(|e| TrainError::io(&path, e))?
                .lines()
                .map(|l| l.trim().to_owned())
                .filter(|l| !l.is_empty())
                .collect(),
            None => (0..count).map(|c| c.to_string()).collect(),
        };
        if lines.len() != count {
            return Err(TrainError::corrupt(
                folder.join(file).display(),
                format!("{} names, and there are {count} classes", lines.len()),
            ));
        }
        Ok(lines)
    };
    let batches: Vec<PathBuf> = (1..=5).filter_map(|i| there(&format!("data_batch_{i}.bin"))).collect();
    if !batches.is_empty() {
        let test = there("test_batch.bin").into_iter().collect();
        return Ok(Some((batches, test, 1, names("batches.meta.txt", 10)?)));
    }
    match (there("train.bin"), there("fine_label_names.txt")) {
        (Some(train), Some(_)) => {
            let test = there("test.bin").into_iter().collect();
            Ok(Some((vec![train], test, 2, names("fine_label_names.txt", 100)?)))
        }
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn records(label_bytes: usize, count: usize) -> Vec<u8> {
        (0..count)
            .flat_map(|i| {
                let mut record = vec![i as u8; label_bytes + PIXELS];
                record[0] = 7;
                record[label_bytes - 1] = i as u8;
                record
            })
            .collect()
    }

    fn read(set: &Cifar, index: usize) -> (Vec<f32>, i64) {
        let (mut image, mut label) = (vec![0f32; PIXELS], [0i64]);
        set.read(
            index,
            &mut Random::new(0),
            &mut [bytemuck::cast_slice_mut(&mut image), bytemuck::cast_slice_mut(&mut label)],
        )
        .unwrap();
        (image, label[0])
    }

    #[test]
    fn both_kinds_are_read_across_files() {
        for label_bytes in [1, 2] {
            let stores = vec![
                Store::from_bytes("a", records(label_bytes, 3)),
                Store::from_bytes("b", records(label_bytes, 2)),
            ];
            let set = Cifar::from_stores(stores, label_bytes, Vec::new()).unwrap();
            assert_eq!(set.len(), 5);
            for (index, value) in [(0, 0), (2, 2), (4, 1)] {
                let (image, label) = read(&set, index);
                assert_eq!(label, value);
                assert!(image.iter().all(|v| *v == value as f32 / 255.0));
            }
        }
        let folder = tempfile::tempdir().unwrap();
        assert!(find(folder.path()).unwrap().is_none());
        std::fs::write(folder.path().join("data_batch_2.bin"), records(1, 1)).unwrap();
        std::fs::write(folder.path().join("batches.meta.txt"), "a\nb\n").unwrap();
        assert!(find(folder.path()).unwrap_err().to_string().contains("2 names"));
    }

    proptest! {
        #[test]
        fn damaged_files_end_in_a_result(end in 0usize..2 * (1 + PIXELS) + 5, label: u8) {
            let mut bytes = records(1, 2);
            bytes[0] = label;
            bytes.truncate(end);
            if let Ok(set) = Cifar::from_stores(vec![Store::from_bytes("a", bytes)], 1, Vec::new()) {
                prop_assert_eq!(read(&set, 0).1, i64::from(label));
                prop_assert_eq!(set.len() * (1 + PIXELS), end.min(2 * (1 + PIXELS)));
            }
        }
    }
}
