//! The IDX files of MNIST and Fashion-MNIST.

use std::path::{Path, PathBuf};

use lightering_graph::DType;
use lightering_meter::MemoryPool;

use super::bytes::Store;
use super::{Dataset, Feature, LABEL, put};
use crate::{Random, TrainError};

/// Most dimensions of an array.
pub const MAX_RANK: usize = 4;

/// One IDX file: a 4-byte magic number (two zeros, the element type, the rank), the sizes as big-endian `u32`, then the
/// elements, big-endian and row-major.
#[derive(Clone)]
pub struct IdxArray {
    store: Store,
    kind: u8,
    dims: Vec<usize>,
    start: u64,
}

/// Bytes of an element of this type code.
fn width(kind: u8) -> Option<usize> {
    Some(match kind {
        0x08 | 0x09 => 1,
        0x0b => 2,
        0x0c | 0x0d => 4,
        0x0e => 8,
        _ => return None,
    })
}

impl IdxArray {
    /// Opens a file, unpacked into memory of the pool if it ends in `.gz`.
    ///
    /// # Errors
    /// It is no IDX file, or shorter than its header says.
    pub fn open(path: &Path, pool: &MemoryPool) -> Result<IdxArray, TrainError> {
        Self::from_store(Store::open(path, pool)?)
    }

    fn from_store(store: Store) -> Result<IdxArray, TrainError> {
        let corrupt = |what: String| TrainError::corrupt(&store.name, what);
        let mut magic = [0; 4];
        if store.len() < 4 {
            return Err(corrupt(format!("{} bytes are no IDX file", store.len())));
        }
        store.read_at(0, &mut magic)?;
        let [0, 0, kind, rank] = magic else {
            return Err(corrupt(format!("it starts with {magic:02x?}, an IDX file with two zeros")));
        };
        let width = width(kind).ok_or_else(|| corrupt(format!("element type {kind:#04x} is none of IDX")))?;
        let rank = usize::from(rank);
        if rank == 0 || rank > MAX_RANK {
            return Err(corrupt(format!("{rank} dimensions; 1 to {MAX_RANK} are read")));
        }
        let start = 4 + 4 * rank as u64;
        if store.len() < start {
            return Err(corrupt("it ends within its header".into()));
        }
        let mut sizes = [0; 4 * MAX_RANK];
        store.read_at(4, &mut sizes[..4 * rank])?;
        let dims: Vec<usize> = sizes[..4 * rank]
            .chunks_exact(4)
            .map(|c| u32::from_be_bytes([c[0], c[1], c[2], c[3]]) as usize)
            .collect();
        let needed = dims
            .iter()
            .try_fold(width as u64, |n, &d| n.checked_mul(d as u64))
            .and_then(|n| n.checked_add(start));
        match needed {
            Some(needed) if needed == store.len() => {}
            Some(needed) => {
                return Err(corrupt(format!(
                    "shape {dims:?} takes {needed} bytes, but it has {} (is it cut short?)",
                    store.len()
                )));
            }
            None => return Err(corrupt(format!("the size of shape {dims:?} overflows"))),
        }
        Ok(IdxArray { store, kind, dims, start })
    }

    /// Sizes, the samples first.
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// Elements of one sample.
    fn sample_len(&self) -> usize {
        self.dims[1..].iter().product()
    }

    /// The elements of sample `index` as numbers; bytes are those of pictures and become 0 to 1 if `unit`.
    fn read(&self, index: usize, unit: bool, out: &mut [f32]) -> Result<(), TrainError> {
        let width = width(self.kind).expect("the type was checked when the file was opened");
        let size = out.len() * width;
        let offset = self.start + (index * size) as u64;
        let scale = if unit && self.kind == 0x08 { 255.0 } else { 1.0 };
        // The bytes land at the end of the target and are widened from its start on, so no second buffer is needed.
        if width == 1 {
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(out);
            let at = bytes.len() - size;
            self.store.read_at(offset, &mut bytes[at..])?;
            for i in 0..size {
                let byte = bytes[at + i];
                let value = if self.kind == 0x09 { f32::from(byte as i8) } else { f32::from(byte) / scale };
                put(&mut bytes[4 * i..], value);
            }
            return Ok(());
        }
        let mut raw = vec![0; size];
        self.store.read_at(offset, &mut raw)?;
        for (value, bytes) in out.iter_mut().zip(raw.chunks_exact(width)) {
            *value = match (self.kind, bytes) {
                (0x0b, &[a, b]) => f32::from(i16::from_be_bytes([a, b])),
                (0x0c, &[a, b, c, d]) => i32::from_be_bytes([a, b, c, d]) as f32,
                (0x0d, &[a, b, c, d]) => f32::from_be_bytes([a, b, c, d]),
                (_, bytes) => f64::from_be_bytes(bytes.try_into().expect("eight bytes")) as f32,
            };
        }
        Ok(())
    }
}

/// Pictures and their labels in two IDX files.
pub struct IdxDataset {
    images: IdxArray,
    labels: Vec<u32>,
    features: Vec<Feature>,
    classes: Vec<String>,
}

const FASHION: [&str; 10] = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
];

impl IdxDataset {
    /// Pictures `[n, height, width]` (or `[n, channels, height, width]`) and labels `[n]`.
    ///
    /// # Errors
    /// The files do not fit together.
    pub fn new(images: IdxArray, labels: &IdxArray) -> Result<IdxDataset, TrainError> {
        let place = &images.store.name;
        let dims = match *images.dims() {
            [_, h, w] => vec![1, h, w],
            [_, c, h, w] => vec![c, h, w],
            [_, n] => vec![n],
            _ => return Err(TrainError::invalid(place, "an array of one dimension", "pictures")),
        };
        if dims.contains(&0) {
            return Err(TrainError::invalid(
                place,
                format!("pictures of shape {dims:?}"),
                "at least a pixel",
            ));
        }
        if labels.dims().len() != 1 || labels.dims()[0] != images.dims()[0] {
            return Err(TrainError::invalid(
                &labels.store.name,
                format!("labels {:?} for pictures {:?}", labels.dims(), images.dims()),
                "one label for each picture",
            ));
        }
        let mut values = vec![0f32; 4096.min(labels.dims()[0])];
        let mut numbers = Vec::with_capacity(labels.dims()[0]);
        // Labels as a table of rows, so that they are read in pieces.
        let flat = |from: usize, out: &mut [f32]| -> Result<(), TrainError> {
            let width = width(labels.kind).expect("the type was checked when the file was opened");
            let part = IdxArray {
                start: labels.start + (from * width) as u64,
                dims: vec![1, out.len()],
                ..labels.clone()
            };
            part.read(0, false, out)
        };
        let mut from = 0;
        while from < labels.dims()[0] {
            let count = values.len().min(labels.dims()[0] - from);
            flat(from, &mut values[..count])?;
            for (i, &v) in values[..count].iter().enumerate() {
                if v < 0.0 || v.fract() != 0.0 || v >= super::tokens::MAX_VOCABULARY as f32 {
                    return Err(TrainError::invalid(
                        &labels.store.name,
                        format!("label {v} of sample {}", from + i),
                        "a whole number from 0 on",
                    ));
                }
                numbers.push(v as u32);
            }
            from += count;
        }
        let count = numbers.iter().max().map_or(0, |&m| m as usize + 1);
        let classes = if count == 10 && place.contains("fashion") {
            FASHION.map(str::to_owned).to_vec()
        } else {
            (0..count).map(|c| c.to_string()).collect()
        };
        let name = if dims.len() == 1 { "features" } else { "image" };
        let features = vec![Feature::new(name, DType::F32, &dims), Feature::new(LABEL, DType::I64, &[])];
        Ok(IdxDataset { images, labels: numbers, features, classes })
    }

    /// Uses the class names of another set, if it has at least as many.
    pub(super) fn with_classes(mut self, classes: &[String]) -> IdxDataset {
        if classes.len() >= self.classes.len() {
            self.classes = classes.to_vec();
        }
        self
    }
}

impl Dataset for IdxDataset {
    fn len(&self) -> usize {
        self.labels.len()
    }

    fn features(&self) -> &[Feature] {
        &self.features
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn read(&self, index: usize, _: &mut Random, targets: &mut [&mut [u8]]) -> Result<(), TrainError> {
        let [image, label] = targets else { panic!("an IDX sample has two features") };
        debug_assert_eq!(self.images.sample_len() * 4, image.len());
        self.images.read(index, true, bytemuck::cast_slice_mut(image))?;
        put(label, i64::from(self.labels[index]));
        Ok(())
    }
}

/// Any bytes as an IDX file whose last sample is read, for the tests of damaged files.
///
/// # Errors
/// They are none, or damaged.
pub fn check_idx(bytes: &[u8]) -> Result<(), TrainError> {
    /// Most elements of the sample.
    const ELEMENTS_MAX: usize = 1 << 20;
    let array = IdxArray::from_store(Store::from_bytes("bytes", bytes.to_vec()))?;
    if array.dims()[0] > 0 && array.sample_len() <= ELEMENTS_MAX {
        array.read(array.dims()[0] - 1, true, &mut vec![0f32; array.sample_len()])?;
    }
    Ok(())
}

/// The pair of files of `part` (`train`, or `t10k` and `test`) in a folder.
pub(super) fn find(folder: &Path, parts: &[&str]) -> Option<(PathBuf, PathBuf)> {
    let mut names: Vec<PathBuf> = std::fs::read_dir(folder)
        .ok()?
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.is_file())
        .collect();
    names.sort();
    let find = |what: &str| {
        names.iter().find(|p| {
            let name = p.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
            let idx = name.contains("idx") || name.contains("ubyte");
            idx && name.contains(what) && parts.iter().any(|part| name.starts_with(part))
        })
    };
    Some((find("image")?.clone(), find("label")?.clone()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn file(kind: u8, dims: &[u32], data: &[u8]) -> Vec<u8> {
        let mut out = vec![0, 0, kind, dims.len() as u8];
        dims.iter().for_each(|d| out.extend(d.to_be_bytes()));
        out.extend(data);
        out
    }

    fn array(bytes: Vec<u8>) -> Result<IdxArray, TrainError> {
        IdxArray::from_store(Store::from_bytes("test.idx", bytes))
    }

    #[test]
    fn pictures_and_labels_are_read_also_packed() {
        let folder = tempfile::tempdir().unwrap();
        let images = file(8, &[2, 2, 3], &[0, 51, 102, 153, 204, 255, 1, 2, 3, 4, 5, 6]);
        let labels = file(8, &[2], &[4, 1]);
        let packed = folder.path().join("train-images-idx3-ubyte.gz");
        let mut gz = flate2::write::GzEncoder::new(
            std::fs::File::create(&packed).unwrap(),
            flate2::Compression::fast(),
        );
        gz.write_all(&images).unwrap();
        gz.finish().unwrap();
        std::fs::write(folder.path().join("train-labels-idx1-ubyte"), labels).unwrap();
        let (images, labels) = find(folder.path(), &["train"]).unwrap();
        let pool = MemoryPool::unbounded();
        let set = IdxDataset::new(
            IdxArray::open(&images, &pool).unwrap(),
            &IdxArray::open(&labels, &pool).unwrap(),
        )
        .unwrap();
        assert_eq!((set.len(), set.classes().len()), (2, 5));
        assert_eq!(set.features()[0].dims, [1, 2, 3]);
        let (mut image, mut label) = ([0f32; 6], [0i64; 1]);
        let mut targets: [&mut [u8]; 2] =
            [bytemuck::cast_slice_mut(&mut image), bytemuck::cast_slice_mut(&mut label)];
        set.read(0, &mut Random::new(0), &mut targets).unwrap();
        assert_eq!((image, label), ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [4]));
    }

    #[test]
    fn wider_elements_are_big_endian() {
        let mut out = [0f32; 2];
        array(file(0x0b, &[1, 2], &[0xff, 0xfe, 1, 0])).unwrap().read(0, true, &mut out).unwrap();
        assert_eq!(out, [-2.0, 256.0]);
        let data: Vec<u8> = [1.5f64, -3.0].iter().flat_map(|v| v.to_be_bytes()).collect();
        array(file(0x0e, &[1, 2], &data)).unwrap().read(0, true, &mut out).unwrap();
        assert_eq!(out, [1.5, -3.0]);
    }

    #[test]
    fn lying_headers_are_refused() {
        for (bytes, part) in [
            (vec![0, 0], "no IDX"),
            (file(8, &[3], &[1, 2]), "cut short"),
            (file(7, &[1], &[1]), "element type"),
            (vec![1, 0, 8, 1], "two zeros"),
            (file(8, &[u32::MAX; 4], &[]), "overflows"),
            (file(14, &[u32::MAX; 3], &[]), "overflows"),
            (file(8, &[1; 5], &[1]), "dimensions"),
        ] {
            let Err(error) = array(bytes) else { panic!("{part} was accepted") };
            assert!(error.to_string().contains(part), "{error}");
        }
        let pair = IdxDataset::new(
            array(file(8, &[2, 1, 1], &[1, 2])).unwrap(),
            &array(file(8, &[1], &[1])).unwrap(),
        );
        assert!(pair.err().unwrap().to_string().contains("one label for each"));
    }

    proptest! {
        #[test]
        fn damaged_files_end_in_a_result(flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 0..4), end: prop::sample::Index) {
            let mut bytes = file(8, &[2, 2, 2], &[1, 2, 3, 4, 5, 6, 7, 8]);
            for (at, bit) in &flips {
                let at = at.index(bytes.len());
                bytes[at] ^= 1 << bit;
            }
            bytes.truncate(end.index(bytes.len() * 2).min(bytes.len()));
            if let Ok(array) = array(bytes)
                && array.dims()[0] > 0
            {
                let mut out = vec![0f32; array.sample_len()];
                array.read(array.dims()[0] - 1, true, &mut out).unwrap();
            }
        }
    }
}
