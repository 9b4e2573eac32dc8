//! Finding out what lies at a path.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lightering_meter::MemoryPool;
use lightering_units::Bytes;

use super::bytes::Store;
use super::image_folder::{entries, is_picture, name_of, subfolders};
use super::table::{self, TableOptions};
use super::tokens::{TokenStore, Width, width_of};
use super::{
    ArrayDataset, Cifar, Dataset, IdxArray, IdxDataset, ImageFolder, Normalisation, SoundFolder, Subset,
    TokenWindows, cifar, idx, normalised, statistics,
};
use crate::{Random, TrainError};

/// How data is read.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Width and height that pictures are scaled to; without it they must have one size.
    pub size: Option<(u32, u32)>,
    /// Channels of pictures in folders, 1 (grey) or 3.
    pub channels: usize,
    /// What is done to numbers before a model sees them.
    pub normalise: Normalise,
    /// Decides which samples are set aside for validation.
    pub seed: u64,
    /// Share of the training samples that is set aside for validation; without it, the test part validates if there is
    /// one, else a tenth of the training samples.
    pub validation: Option<f64>,
    /// Tokens of a window of text.
    pub context: usize,
    /// What a token of a plain text is.
    pub vocabulary: Vocabulary,
    /// Bands of the spectrograms that sounds become.
    pub bands: usize,
    /// Length that sounds are cut or filled up to.
    pub seconds: f32,
    /// The column of a table that holds the labels.
    pub label: String,
    /// Columns of a table that are left out.
    pub without: Vec<String>,
    /// The labels of a table are numbers to be predicted, even if they look like classes.
    pub regression: bool,
    /// What memory is asked of.
    pub pool: MemoryPool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions {
            size: None,
            channels: 3,
            normalise: Normalise::Measured,
            seed: 0,
            validation: None,
            context: 128,
            vocabulary: Vocabulary::Characters,
            bands: 40,
            seconds: 1.0,
            label: super::LABEL.into(),
            without: Vec::new(),
            regression: false,
            pool: MemoryPool::unbounded(),
        }
    }
}

/// Where the normalisation of the first feature comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Normalise {
    /// There is none.
    None,
    /// Measured on some of the training samples ([`statistics`]).
    Measured,
    /// Given.
    Given(Normalisation),
}

/// What a token of a plain text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vocabulary {
    /// One of 256 bytes.
    Bytes,
    /// One of the characters of the training text.
    Characters,
}

/// The parts of a data set.
#[derive(Clone)]
pub struct Split {
    /// What a model learns from.
    pub train: Arc<dyn Dataset>,
    /// What it is watched on meanwhile.
    pub validation: Arc<dyn Dataset>,
    /// What it is judged on at the end, if there is a part that is not the validation part.
    pub test: Option<Arc<dyn Dataset>>,
    /// What was found, for people.
    pub found: String,
}

/// Samples that a normalisation is measured on.
const MEASURED_SAMPLES: usize = 1_000;

/// Parts as they were found, before any is set aside.
pub(super) struct Parts {
    pub train: Arc<dyn Dataset>,
    pub validation: Option<Arc<dyn Dataset>>,
    pub test: Option<Arc<dyn Dataset>>,
    pub found: String,
}

/// Opens the data at `path`, whatever it is: folders of sounds, of pictures (also `train/` and `val/` or `test/`), IDX and CIFAR
/// files, tables (`.csv`, also `train.csv` and `test.csv` in a folder), `.npz` archives, text (`.txt`, `.md`) or token files (`.bin`), alone or as `train` and `val` or `test` in a folder.
///
/// # Errors
/// Nothing known lies there, or what lies there is damaged.
pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Split, TrainError> {
    let path = path.as_ref();
    let place = path.display();
    if !path.exists() {
        return Err(TrainError::invalid(place, "no such file or folder", "a data set"));
    }
    if let Some(share) = options.validation
        && !(0.0..1.0).contains(&share)
    {
        return Err(TrainError::invalid("validation", share, "a share from 0 to below 1"));
    }
    let cifar = if path.is_dir() { cifar_files(path, options)? } else { None };
    let parts = match cifar {
        Some(parts) => parts,
        None => match tokens(path, options)? {
            Some(split) => return Ok(split),
            None => find(path, options)?,
        },
    };
    if parts.train.is_empty() {
        return Err(TrainError::invalid(place, "no samples", "at least one"));
    }
    set_aside(parts, options)
}

fn find(path: &Path, options: &OpenOptions) -> Result<Parts, TrainError> {
    let place = path.display();
    if path.is_dir() {
        if let Some(parts) = idx_files(path, options)? {
            return Ok(parts);
        }
        if let Some(parts) = tables(path, options)? {
            return Ok(parts);
        }
        if let Some(parts) = picture_folders(path, options)? {
            return Ok(parts);
        }
        if let Some(parts) = sounds(path, options)? {
            return Ok(parts);
        }
    } else if table::is_table(path) {
        let train = read_table(path, options, None)?;
        return Ok(Parts { train, validation: None, test: None, found: "table".into() });
    } else if path.extension().is_some_and(|e| e == "npz")
        && let Some(train) = ArrayDataset::open(path, "train", &options.pool)?
    {
        let test = ArrayDataset::open(path, "test", &options.pool)?.map(|t| Arc::new(t) as Arc<dyn Dataset>);
        let found = "NumPy arrays".to_owned();
        return Ok(Parts { train: Arc::new(train), validation: None, test, found });
    }
    Err(TrainError::invalid(
        place,
        "no data set that is known",
        "folders of pictures or sounds, IDX or CIFAR files, tables (.csv), a .npz archive, or text (.txt, .bin)",
    ))
}

fn idx_files(folder: &Path, options: &OpenOptions) -> Result<Option<Parts>, TrainError> {
    let Some((images, labels)) = idx::find(folder, &["train"]) else { return Ok(None) };
    let open = |(images, labels): (PathBuf, PathBuf)| -> Result<IdxDataset, TrainError> {
        IdxDataset::new(IdxArray::open(&images, &options.pool)?, &IdxArray::open(&labels, &options.pool)?)
    };
    let train = open((images, labels))?;
    let test = match idx::find(folder, &["t10k", "test"]) {
        Some(pair) => Some(Arc::new(open(pair)?.with_classes(train.classes())) as Arc<dyn Dataset>),
        None => None,
    };
    Ok(Some(Parts { train: Arc::new(train), validation: None, test, found: "IDX files".into() }))
}

/// Sounds in a folder or in folders of classes, but not among other files.
fn sounds(root: &Path, options: &OpenOptions) -> Result<Option<Parts>, TrainError> {
    let mut there = entries(root)?.iter().any(|p| p.is_file() && super::audio::is_sound(p));
    for folder in subfolders(root)? {
        there = there || entries(&folder)?.iter().any(|p| super::audio::is_sound(p));
    }
    if !there {
        return Ok(None);
    }
    let set = SoundFolder::open(root, options.bands, options.seconds)?;
    let found = format!("sounds of {} Hz", set.rate());
    Ok(Some(Parts { train: Arc::new(set), validation: None, test: None, found }))
}

fn cifar_files(folder: &Path, options: &OpenOptions) -> Result<Option<Parts>, TrainError> {
    let Some((train, test, label_bytes, classes)) = cifar::find(folder)? else { return Ok(None) };
    let found = format!("CIFAR-{} files", classes.len());
    let open = |files: &[PathBuf]| -> Result<Arc<dyn Dataset>, TrainError> {
        Ok(Arc::new(Cifar::open(files, label_bytes, classes.clone(), &options.pool)?))
    };
    let test = if test.is_empty() { None } else { Some(open(&test)?) };
    Ok(Some(Parts { train: open(&train)?, validation: None, test, found }))
}

fn read_table(
    path: &Path,
    options: &OpenOptions,
    classes: Option<&[String]>,
) -> Result<Arc<dyn Dataset>, TrainError> {
    let file = std::fs::File::open(path).map_err(|e| TrainError::io(path, e))?;
    let file = std::io::BufReader::new(file);
    let input: Box<dyn std::io::Read> = if path.extension().is_some_and(|e| e == "gz") {
        Box::new(flate2::read::MultiGzDecoder::new(file))
    } else {
        Box::new(file)
    };
    let table = TableOptions {
        label: &options.label,
        without: &options.without,
        regression: options.regression,
        classes,
    };
    let (set, memory) = table::read(&path.display().to_string(), input, &table, &options.pool)?;
    Ok(Arc::new(set.within(memory)))
}

fn tables(folder: &Path, options: &OpenOptions) -> Result<Option<Parts>, TrainError> {
    let files: Vec<PathBuf> = entries(folder)?.into_iter().filter(|p| table::is_table(p)).collect();
    let starts = |name: &str| files.iter().find(|p| name_of(p).to_lowercase().starts_with(name));
    let train = match (starts("train"), &files[..]) {
        (Some(train), _) => train,
        (None, [one]) => one,
        _ => return Ok(None),
    };
    let set = read_table(train, options, None)?;
    let part = |name: &str| -> Result<Option<Arc<dyn Dataset>>, TrainError> {
        match starts(name) {
            Some(path) => Ok(Some(read_table(path, options, Some(set.classes()))?)),
            None => Ok(None),
        }
    };
    let (validation, test) = (part("val")?, part("test")?);
    Ok(Some(Parts { train: set, validation, test, found: "tables".into() }))
}

fn picture_folders(root: &Path, options: &OpenOptions) -> Result<Option<Parts>, TrainError> {
    let folders = subfolders(root)?;
    let named = |names: &[&str]| {
        folders.iter().find(|f| names.iter().any(|n| name_of(f).eq_ignore_ascii_case(n))).cloned()
    };
    let open = |path: &Path, size: Option<(u32, u32)>, classes: Option<&[String]>| {
        ImageFolder::open(path, size, options.channels, classes)
    };
    if let Some(train) = named(&["train", "training"]) {
        if !has_pictures(&train)? {
            return Ok(None);
        }
        let train = open(&train, options.size, None)?;
        let dims = &train.features()[0].dims;
        let size = Some((dims[2] as u32, dims[1] as u32));
        let part = |names: &[&str]| -> Result<Option<Arc<dyn Dataset>>, TrainError> {
            match named(names) {
                Some(path) => Ok(Some(Arc::new(open(&path, size, Some(train.classes()))?))),
                None => Ok(None),
            }
        };
        let validation = part(&["val", "valid", "validation"])?;
        let test = part(&["test", "testing"])?;
        let found = "folders of pictures".to_owned();
        return Ok(Some(Parts { validation, test, train: Arc::new(train), found }));
    }
    if folders.is_empty() || !has_pictures(root)? {
        return Ok(None);
    }
    let train = Arc::new(open(root, options.size, None)?);
    Ok(Some(Parts { train, validation: None, test: None, found: "folders of pictures".into() }))
}

/// Whether a folder below holds a picture.
fn has_pictures(root: &Path) -> Result<bool, TrainError> {
    for folder in subfolders(root)? {
        if entries(&folder)?.iter().any(|p| is_picture(p)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Decides which part validates, and normalises all parts alike.
fn set_aside(parts: Parts, options: &OpenOptions) -> Result<Split, TrainError> {
    let Parts { mut train, mut validation, mut test, mut found } = parts;
    let total = train.len();
    if validation.is_none() && options.validation.is_none() {
        validation = test.take();
    }
    if validation.is_none() {
        let share = options.validation.unwrap_or(0.1);
        let aside = ((total as f64 * share).round() as usize).min(total - 1);
        if aside == 0 {
            validation = Some(test.clone().unwrap_or_else(|| train.clone()));
        } else {
            let count = u32::try_from(total).map_err(|_| {
                TrainError::limit("data", "number of samples", total as u64, u64::from(u32::MAX))
            })?;
            let _working = options.pool.reserve("split of the data", Bytes(4 * total as u64))?;
            let mut order: Vec<u32> = (0..count).collect();
            Random::derived(options.seed, &[0x5e7]).shuffle(&mut order);
            let mut kept = order.split_off(aside);
            kept.sort_unstable();
            order.sort_unstable();
            validation = Some(Arc::new(Subset::new(train.clone(), order)));
            train = Arc::new(Subset::new(train, kept));
        }
    }
    let mut validation = validation.expect("one was chosen above");
    if train.features()[0].dims != validation.features()[0].dims {
        return Err(TrainError::invalid(
            "data",
            format!(
                "samples of shape {:?} to train on and {:?} to validate on",
                train.features()[0].dims,
                validation.features()[0].dims
            ),
            "one shape",
        ));
    }
    let normalisation = match &options.normalise {
        Normalise::None => None,
        Normalise::Given(given) => {
            let channels = train.features()[0].dims.first().copied().unwrap_or(1);
            let fits = |n: usize| n == 1 || n == channels;
            if given.mean.len() != given.std.len() || !fits(given.mean.len()) {
                return Err(TrainError::invalid(
                    "normalisation",
                    format!("{} means and {} deviations", given.mean.len(), given.std.len()),
                    format!("one of each, or {channels}"),
                ));
            }
            if given.std.iter().any(|s| !(*s > 0.0 && s.is_finite())) {
                return Err(TrainError::invalid(
                    "normalisation",
                    format!("std {:?}", given.std),
                    "numbers above 0",
                ));
            }
            Some(given.clone())
        }
        Normalise::Measured => match train.features()[0].dtype {
            lightering_graph::DType::F32 => Some(statistics(&*train, MEASURED_SAMPLES)?),
            _ => None,
        },
    };
    if normalisation.is_some() {
        train = normalised(train, normalisation.clone());
        validation = normalised(validation, normalisation.clone());
        test = test.map(|t| normalised(t, normalisation));
    }
    let shape: Vec<String> = train.features()[0].dims.iter().map(ToString::to_string).collect();
    found = format!(
        "{found}: {} samples of {} {}, {} classes; {} to validate on{}",
        train.len(),
        train.features()[0].name,
        shape.join("x"),
        train.classes().len(),
        validation.len(),
        test.as_ref().map_or(String::new(), |t| format!(", {} to test on", t.len()))
    );
    let broken = train.quarantined().len();
    if broken > 0 {
        found.push_str(&format!(", {broken} broken files left out"));
    }
    Ok(Split { train, validation, test, found })
}

fn is_text(path: &Path) -> bool {
    let name = name_of(path).to_lowercase();
    [".txt", ".txt.gz", ".md", ".text"].iter().any(|e| name.ends_with(e))
}

fn is_token_file(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "bin")
}

/// Text and token files, of which the end is set aside instead of samples from everywhere.
fn tokens(path: &Path, options: &OpenOptions) -> Result<Option<Split>, TrainError> {
    let fits = |p: &Path| p.is_file() && (is_text(p) || is_token_file(p)) && !super::is_cifar(p);
    let (train, validation, test) = if path.is_dir() {
        let files: Vec<PathBuf> = entries(path)?.into_iter().filter(|p| fits(p)).collect();
        let starts = |names: &[&str]| {
            files.iter().find(|p| names.iter().any(|n| name_of(p).to_lowercase().starts_with(n))).cloned()
        };
        let (validation, test) = (starts(&["val"]), starts(&["test"]));
        let only = || {
            let mut texts = files.iter().filter(|p| !name_of(p).to_lowercase().starts_with("readme"));
            match (texts.next(), texts.next()) {
                (Some(one), None) => Some(one.clone()),
                _ => None,
            }
        };
        match starts(&["train"]).or_else(only) {
            Some(train) => (train, validation, test),
            None => return Ok(None),
        }
    } else if fits(path) {
        (path.to_owned(), None, None)
    } else {
        return Ok(None);
    };
    let open = |path: &Path, known: Option<&Arc<[String]>>| -> Result<Arc<TokenStore>, TrainError> {
        let store = Store::open(path, &options.pool)?;
        Ok(Arc::new(if is_text(path) {
            TokenStore::text(store, options.vocabulary, known, &options.pool)?
        } else {
            TokenStore::numbers(store, width_of(path))?
        }))
    };
    let tokens = open(&train, None)?;
    let kind = match (is_text(&train), options.vocabulary) {
        (true, Vocabulary::Bytes) => "text as bytes",
        (true, Vocabulary::Characters) => "text as characters",
        (false, _) if width_of(&train) == Width::U32 => "32-bit tokens",
        (false, _) => "16-bit tokens",
    };
    let windows = |of: &Arc<TokenStore>, from: u64, to: u64, draws: bool| {
        Ok::<_, TrainError>(
            Arc::new(TokenWindows::new(of.clone(), from, to, options.context, draws)?) as Arc<dyn Dataset>
        )
    };
    let other = |path: Option<PathBuf>| -> Result<Option<Arc<dyn Dataset>>, TrainError> {
        let Some(path) = path else { return Ok(None) };
        let part = open(&path, Some(tokens.vocabulary()))?;
        if part.vocabulary().len() > tokens.vocabulary().len() {
            return Err(TrainError::invalid(
                path.display(),
                format!("tokens up to {}", part.vocabulary().len() - 1),
                format!("tokens below {}, as in the training part", tokens.vocabulary().len()),
            ));
        }
        Ok(Some(windows(&part, 0, part.len(), false)?))
    };
    let (mut validation, mut test) = (other(validation)?, other(test)?);
    if validation.is_none() && options.validation.is_none() {
        validation = test.take();
    }
    let share = if validation.is_some() { 0.0 } else { options.validation.unwrap_or(0.1) };
    let cut = tokens.len() - (tokens.len() as f64 * share) as u64;
    let train = windows(&tokens, 0, cut, true)?;
    let validation = match validation {
        Some(validation) => validation,
        None if cut == tokens.len() => windows(&tokens, 0, cut, false)?,
        None => windows(&tokens, cut, tokens.len(), false)?,
    };
    let found = format!(
        "{kind}: {} tokens of {} kinds, windows of {}; {} windows to train on, {} to validate on{}",
        tokens.len(),
        tokens.vocabulary().len(),
        options.context,
        train.len(),
        validation.len(),
        test.as_ref().map_or(String::new(), |t| format!(", {} to test on", t.len()))
    );
    Ok(Some(Split { train, validation, test, found }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_idx(folder: &Path, part: &str, count: u32) {
        let mut images = vec![0, 0, 8, 3];
        [count, 2, 2].iter().for_each(|d| images.extend(d.to_be_bytes()));
        (0..count * 4).for_each(|i| images.push(i as u8));
        let mut labels = vec![0, 0, 8, 1];
        labels.extend(count.to_be_bytes());
        (0..count).for_each(|i| labels.push((i % 3) as u8));
        std::fs::write(folder.join(format!("{part}-images-idx3-ubyte")), images).unwrap();
        std::fs::write(folder.join(format!("{part}-labels-idx1-ubyte")), labels).unwrap();
    }

    #[test]
    fn idx_folders_are_found_and_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        write_idx(folder.path(), "train", 20);
        let split = open(folder.path(), &OpenOptions::default()).unwrap();
        assert_eq!((split.train.len(), split.validation.len()), (18, 2));
        assert!(split.test.is_none() && split.found.contains("18 samples of image 1x2x2, 3 classes"));
        let norm = split.train.features()[0].normalisation.clone().unwrap();
        assert_eq!(split.validation.features()[0].normalisation, Some(norm));
        let again = open(folder.path(), &OpenOptions::default()).unwrap();
        assert_eq!(again.validation.describe(0), split.validation.describe(0));
        write_idx(folder.path(), "t10k", 6);
        let split = open(folder.path(), &OpenOptions::default()).unwrap();
        assert_eq!((split.train.len(), split.validation.len()), (20, 6));
        let options = OpenOptions { validation: Some(0.25), ..OpenOptions::default() };
        let split = open(folder.path(), &options).unwrap();
        assert_eq!((split.train.len(), split.validation.len(), split.test.unwrap().len()), (15, 5, 6));
    }

    #[test]
    fn texts_are_cut_at_their_end() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("input.txt"), "abcdefghij".repeat(100)).unwrap();
        std::fs::write(folder.path().join("README.md"), "nothing").unwrap();
        let options = OpenOptions { context: 10, ..OpenOptions::default() };
        let split = open(folder.path(), &options).unwrap();
        assert_eq!((split.train.len(), split.validation.len()), (88, 9));
        assert_eq!(split.train.classes().len(), 10);
        std::fs::write(folder.path().join("train.txt"), "abc".repeat(10)).unwrap();
        std::fs::write(folder.path().join("val.txt"), "abd".repeat(10)).unwrap();
        let error = open(folder.path(), &options).err().unwrap().to_string();
        assert!(error.contains("character 'd'"), "{error}");
    }

    #[test]
    fn what_is_no_data_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let error = open(folder.path(), &OpenOptions::default()).err().unwrap().to_string();
        assert!(error.contains("folders of pictures"), "{error}");
        assert!(open(folder.path().join("nope"), &OpenOptions::default()).is_err());
    }
}
