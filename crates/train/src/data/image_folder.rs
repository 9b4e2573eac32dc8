//! Pictures in folders, one folder per class.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use lightering_formats::image::{Layout, Order, Picture, Preprocess};
use lightering_graph::DType;

use super::{Dataset, Feature, LABEL, put};
use crate::{Random, TrainError};

/// Endings of files that are taken for pictures.
const ENDINGS: [&str; 6] = ["png", "jpg", "jpeg", "bmp", "gif", "webp"];
/// Largest file that is read.
const MAX_FILE_BYTES: u64 = 256 << 20;
/// Up to this share of the pictures may be broken.
pub(super) const BROKEN_PERCENT: u32 = 5;
/// Broken files whose reason is kept.
const REASONS_KEPT: usize = 100;
/// Deepest folder below that of a class.
const MAX_DEPTH: usize = 16;

/// Pictures, `image` `f32` `[channels, height, width]` from 0 to 1, and the class that their folder stands for.
///
/// Broken files are left out: those that are found when the folder is opened disappear from the set, and one whose
/// pixels turn out to be broken later is replaced by the next picture, whoever reads it.
pub struct ImageFolder {
    root: PathBuf,
    files: Vec<(PathBuf, u32)>,
    classes: Vec<String>,
    features: Vec<Feature>,
    preprocess: Preprocess,
    found: usize,
    broken: Mutex<Vec<(PathBuf, String)>>,
}

/// Folders in a folder, in the order of their names.
pub(super) fn subfolders(path: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let mut out: Vec<PathBuf> = entries(path)?.into_iter().filter(|p| p.is_dir()).collect();
    out.sort();
    Ok(out)
}

/// What lies in a folder, hidden files left out.
pub(super) fn entries(path: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let mut out = Vec::new();
    for entry in fs::read_dir(path).map_err(|e| TrainError::io(path, e))? {
        let path = entry.map_err(|e| TrainError::io(path, e))?.path();
        if !name_of(&path).starts_with('.') {
            out.push(path);
        }
    }
    out.sort();
    Ok(out)
}

pub(super) fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

pub(super) fn is_picture(path: &Path) -> bool {
    path.extension().is_some_and(|e| ENDINGS.iter().any(|x| e.eq_ignore_ascii_case(x)))
}

fn collect(folder: &Path, depth: usize, out: &mut Vec<PathBuf>) -> Result<(), TrainError> {
    for path in entries(folder)? {
        if path.is_dir() {
            if depth < MAX_DEPTH {
                collect(&path, depth + 1, out)?;
            }
        } else if is_picture(&path) {
            out.push(path);
        }
    }
    Ok(())
}

fn read_file(path: &Path) -> Result<Vec<u8>, String> {
    let size = fs::metadata(path).map_err(|e| e.to_string())?.len();
    if size > MAX_FILE_BYTES {
        return Err(format!("{size} bytes, more than the {MAX_FILE_BYTES} that are read"));
    }
    fs::read(path).map_err(|e| e.to_string())
}

impl ImageFolder {
    /// The pictures under `root`, one folder per class. Without a `size` (width, height) they must all have the same
    /// one; with it they are scaled. `channels` is 1 (grey) or 3. `classes` of another part of the same data, if it is
    /// given, gives the numbers of the classes.
    ///
    /// # Errors
    /// A class has no picture, the sizes differ and none is asked for, or more than 5 % are broken.
    pub fn open(
        root: &Path,
        size: Option<(u32, u32)>,
        channels: usize,
        classes: Option<&[String]>,
    ) -> Result<ImageFolder, TrainError> {
        let place = root.display().to_string();
        if !matches!(channels, 1 | 3) {
            return Err(TrainError::invalid(
                place,
                format!("{channels} channels asked for"),
                "1 (grey) or 3 (colour)",
            ));
        }
        let folders = subfolders(root)?;
        let names: Vec<String> = match classes {
            Some(names) => names.to_vec(),
            None => folders.iter().map(|f| name_of(f)).collect(),
        };
        let (mut files, mut broken, mut sizes) = (Vec::new(), Vec::new(), BTreeMap::new());
        let mut found = 0;
        let mut empty = Vec::new();
        for folder in &folders {
            let name = name_of(folder);
            let Some(label) = names.iter().position(|n| *n == name) else {
                return Err(TrainError::invalid(
                    place,
                    format!("class folder {name:?}, which the training part does not have"),
                    format!("folders among {}", names.join(", ")),
                ));
            };
            let mut pictures = Vec::new();
            collect(folder, 0, &mut pictures)?;
            if pictures.is_empty() {
                empty.push(name);
            }
            found += pictures.len();
            for path in pictures {
                let header =
                    read_file(&path).and_then(|bytes| Picture::dimensions(&bytes).map_err(|e| e.to_string()));
                match header {
                    Ok(size) => {
                        *sizes.entry(size).or_insert(0usize) += 1;
                        files.push((path, label as u32));
                    }
                    Err(reason) => broken.push((path, reason)),
                }
            }
        }
        if !empty.is_empty() {
            return Err(TrainError::invalid(
                place,
                format!("class without pictures: {}", empty.join(", ")),
                "at least one picture in each folder; remove folders that are no class",
            ));
        }
        let size = match (size, sizes.len()) {
            (Some(size), _) => size,
            (None, 1) => *sizes.keys().next().expect("there is one size"),
            (None, 0) => (1, 1),
            (None, _) => {
                let list: Vec<String> =
                    sizes.iter().take(4).map(|((w, h), n)| format!("{n} of {w}x{h}")).collect();
                return Err(TrainError::invalid(
                    place,
                    format!("pictures of {} sizes ({})", sizes.len(), list.join(", ")),
                    "one size; ask for the size that all shall be scaled to",
                ));
            }
        };
        let preprocess = Preprocess {
            resize: Some(size),
            scale: 255.0,
            layout: Layout::Chw,
            order: if channels == 1 { Order::Gray } else { Order::Rgb },
            ..Preprocess::default()
        };
        let image = Feature::new("image", DType::F32, &[channels, size.1 as usize, size.0 as usize]);
        let set = ImageFolder {
            root: root.to_owned(),
            files,
            classes: names,
            features: vec![image, Feature::new(LABEL, DType::I64, &[])],
            preprocess,
            found,
            broken: Mutex::new(broken),
        };
        set.check_broken()?;
        if set.files.is_empty() {
            return Err(TrainError::invalid(place, "no pictures", "folders with pictures, one per class"));
        }
        Ok(set)
    }

    fn relative(&self, path: &Path) -> String {
        path.strip_prefix(&self.root).unwrap_or(path).display().to_string()
    }

    /// Fails when too many pictures are broken.
    fn check_broken(&self) -> Result<(), TrainError> {
        let broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        // One broken file of a few is no reason to stop.
        if broken.len() <= 1 || broken.len() * 100 <= self.found * BROKEN_PERCENT as usize {
            return Ok(());
        }
        Err(TrainError::Broken {
            place: self.root.display().to_string(),
            broken: broken.len(),
            total: self.found,
            allowed_percent: BROKEN_PERCENT,
            first: broken.iter().take(3).map(|(p, why)| format!("{}: {why}", self.relative(p))).collect(),
        })
    }

    fn quarantine(&self, path: &Path, reason: String) -> Result<(), TrainError> {
        let mut broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        if !broken.iter().any(|(p, _)| p == path) {
            broken.push((path.to_owned(), reason));
            drop(broken);
            self.check_broken()?;
        }
        Ok(())
    }

    fn pixels(&self, path: &Path) -> Result<lightering_graph::Tensor, String> {
        let picture = Picture::decode(&read_file(path)?).map_err(|e| e.to_string())?;
        Ok(self.preprocess.apply(&picture).map_err(|e| e.to_string())?.tensor)
    }
}

impl Dataset for ImageFolder {
    fn len(&self) -> usize {
        self.files.len()
    }

    fn features(&self) -> &[Feature] {
        &self.features
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn read(&self, index: usize, _: &mut Random, targets: &mut [&mut [u8]]) -> Result<(), TrainError> {
        let [image, label] = targets else { panic!("a picture has two features") };
        // Which picture takes the place of a broken one depends on the files alone, so all threads agree.
        for step in 0..self.files.len() {
            let (path, class) = &self.files[(index + step) % self.files.len()];
            match self.pixels(path) {
                Ok(tensor) => {
                    image.copy_from_slice(tensor.as_bytes());
                    put(label, i64::from(*class));
                    return Ok(());
                }
                Err(reason) => self.quarantine(path, reason)?,
            }
        }
        Err(TrainError::corrupt(self.root.display(), "no picture can be decoded"))
    }

    fn describe(&self, index: usize) -> String {
        self.relative(&self.files[index].0)
    }

    fn quarantined(&self) -> Vec<String> {
        let broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        broken.iter().take(REASONS_KEPT).map(|(p, why)| format!("{}: {why}", self.relative(p))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A BMP of one colour, which needs no encoder.
    pub(crate) fn bmp(width: u32, height: u32, rgb: [u8; 3]) -> Vec<u8> {
        let row = (width * 3).next_multiple_of(4);
        let size = 54 + row * height;
        let mut out = b"BM".to_vec();
        out.extend(size.to_le_bytes());
        out.extend([0; 4]);
        out.extend(54u32.to_le_bytes());
        out.extend(40u32.to_le_bytes());
        out.extend(width.to_le_bytes());
        out.extend(height.to_le_bytes());
        out.extend([1, 0, 24, 0]);
        out.extend([0; 24]);
        for _ in 0..height {
            let mut line: Vec<u8> = (0..width).flat_map(|_| [rgb[2], rgb[1], rgb[0]]).collect();
            line.resize(row as usize, 0);
            out.extend(line);
        }
        out
    }

    fn folder(classes: &[(&str, usize)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (c, (name, count)) in classes.iter().enumerate() {
            let folder = root.path().join(name);
            fs::create_dir(&folder).unwrap();
            for i in 0..*count {
                fs::write(folder.join(format!("{i:03}.bmp")), bmp(3, 2, [255 * c as u8, 0, 51])).unwrap();
            }
        }
        root
    }

    fn read(set: &ImageFolder, index: usize) -> (Vec<f32>, i64) {
        let mut image = vec![0f32; set.features()[0].dims.iter().product()];
        let mut label = [0i64];
        set.read(
            index,
            &mut Random::new(0),
            &mut [bytemuck::cast_slice_mut(&mut image), bytemuck::cast_slice_mut(&mut label)],
        )
        .unwrap();
        (image, label[0])
    }

    #[test]
    fn folders_are_classes() {
        let root = folder(&[("cat", 2), ("dog", 3)]);
        let set = ImageFolder::open(root.path(), None, 3, None).unwrap();
        assert_eq!((set.len(), set.classes()), (5, &["cat".to_owned(), "dog".to_owned()][..]));
        assert_eq!(set.features()[0].dims, [3, 2, 3]);
        let (image, label) = read(&set, 4);
        assert_eq!((image[0], image[6], image[12], label), (1.0, 0.0, 0.2, 1));
        assert_eq!(set.describe(4), "dog/002.bmp");
        let grey = ImageFolder::open(root.path(), Some((4, 4)), 1, None).unwrap();
        assert_eq!(grey.features()[0].dims, [1, 4, 4]);
        assert_eq!(read(&grey, 0).0.len(), 16);
    }

    #[test]
    fn mixed_sizes_need_a_size() {
        let root = folder(&[("a", 1), ("b", 1)]);
        fs::write(root.path().join("a/x.bmp"), bmp(5, 5, [1, 2, 3])).unwrap();
        let error = ImageFolder::open(root.path(), None, 3, None).err().unwrap().to_string();
        assert!(error.contains("1 of 5x5") && error.contains("2 of 3x2"), "{error}");
        assert_eq!(ImageFolder::open(root.path(), Some((8, 8)), 3, None).unwrap().len(), 3);
    }

    #[test]
    fn empty_and_unknown_classes_are_named() {
        let root = folder(&[("a", 1), ("void", 0)]);
        let error = ImageFolder::open(root.path(), None, 3, None).err().unwrap().to_string();
        assert!(error.contains("void"), "{error}");
        let root = folder(&[("a", 1), ("b", 1)]);
        let error = ImageFolder::open(root.path(), None, 3, Some(&["a".into()])).err().unwrap().to_string();
        assert!(error.contains("\"b\""), "{error}");
    }

    #[test]
    fn broken_pictures_are_left_out_up_to_a_share() {
        let root = folder(&[("a", 30), ("b", 30)]);
        fs::write(root.path().join("a/bad.png"), b"no picture").unwrap();
        // Its header is right and its pixels are missing, which only decoding finds.
        let cut = bmp(3, 2, [9, 9, 9])[..60].to_vec();
        fs::write(root.path().join("a/005.bmp"), cut).unwrap();
        let set = ImageFolder::open(root.path(), None, 3, None).unwrap();
        assert_eq!((set.len(), set.quarantined().len()), (60, 1));
        assert_eq!(read(&set, 5), read(&set, 6), "the next picture takes its place");
        read(&set, 5);
        let listed = set.quarantined();
        assert_eq!(listed.len(), 2);
        assert!(listed[0].starts_with("a/bad.png: ") && listed[1].starts_with("a/005.bmp: "), "{listed:?}");
        for i in 0..4 {
            fs::write(root.path().join(format!("b/bad{i}.png")), b"no picture").unwrap();
        }
        let error = ImageFolder::open(root.path(), None, 3, None).err().unwrap().to_string();
        assert!(error.contains("5 of 65"), "{error}");
    }
}
