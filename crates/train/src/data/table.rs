//! Tables of comma-separated values.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use lightering_graph::{DType, Tensor};
use lightering_meter::{MemoryPool, Reservation};
use lightering_units::Bytes;

use super::{ArrayDataset, LABEL};
use crate::TrainError;

/// Most columns of a table.
pub const MAX_COLUMNS: usize = 65_536;
/// Numbers up to which a column of whole numbers is taken for classes.
const MAX_NUMBERED_CLASSES: usize = 100;
/// Memory is asked for in pieces of this size.
const PIECE: u64 = 1 << 20;

/// How a table is read.
#[derive(Clone, Debug, Default)]
pub(super) struct TableOptions<'a> {
    /// Name of the column of labels.
    pub label: &'a str,
    /// Columns that are left out.
    pub without: &'a [String],
    /// Labels are numbers to be predicted even if they look like classes.
    pub regression: bool,
    /// Classes of the training part.
    pub classes: Option<&'a [String]>,
}

/// Reads a table: every other column is a number and becomes one of `features` `f32` `[columns]`; the label is a class
/// where it is text or a whole number of few, else a number `f32` `[1]`.
pub(super) fn read(
    place: &str,
    input: impl Read,
    options: &TableOptions<'_>,
    pool: &MemoryPool,
) -> Result<(ArrayDataset, Reservation), TrainError> {
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(input);
    let wrong = |e: csv::Error| TrainError::corrupt(place, e);
    let header = reader.headers().map_err(wrong)?.clone();
    if header.len() > MAX_COLUMNS {
        return Err(TrainError::limit(place, "number of columns", header.len() as u64, MAX_COLUMNS as u64));
    }
    let listed = || header.iter().take(20).collect::<Vec<_>>().join(", ");
    let label_at = header.iter().position(|h| h == options.label).ok_or_else(|| {
        TrainError::invalid(place, format!("no column {:?}", options.label), format!("one of {}", listed()))
    })?;
    if let Some(unknown) = options.without.iter().find(|w| !header.iter().any(|h| h == w.as_str())) {
        return Err(TrainError::invalid(
            place,
            format!("no column {unknown:?}"),
            format!("one of {}", listed()),
        ));
    }
    let columns: Vec<usize> = (0..header.len())
        .filter(|&c| c != label_at && !options.without.iter().any(|w| w == &header[c]))
        .collect();
    if columns.is_empty() {
        return Err(TrainError::invalid(place, "only a column of labels", "at least one column of numbers"));
    }
    let mut memory = pool.reserve(format!("table {place}"), Bytes(0))?;
    let mut used = 0u64;
    let mut values: Vec<f32> = Vec::new();
    // Labels as numbers of the different texts.
    let mut texts: BTreeMap<String, usize> = BTreeMap::new();
    let mut labels: Vec<usize> = Vec::new();
    let mut record = csv::StringRecord::new();
    while reader.read_record(&mut record).map_err(wrong)? {
        let line = record.position().map_or(0, csv::Position::line);
        for &c in &columns {
            let text = &record[c];
            let value = text.parse::<f32>().ok().filter(|v| v.is_finite()).ok_or_else(|| {
                TrainError::invalid(
                    format!("{place}, line {line}, column {:?}", &header[c]),
                    if text.is_empty() { "nothing".into() } else { format!("{text:?}") },
                    "a number; leave the column out if it holds none",
                )
            })?;
            values.push(value);
        }
        let text = &record[label_at];
        if text.is_empty() {
            return Err(TrainError::invalid(
                format!("{place}, line {line}"),
                "no label",
                "a class or a number",
            ));
        }
        let next = texts.len();
        if !texts.contains_key(text) {
            used += text.len() as u64 + 64;
        }
        labels.push(*texts.entry(text.to_owned()).or_insert(next));
        // Both the table and the arrays made of it, for a moment.
        used += 2 * (4 * columns.len() as u64 + 8);
        if used > memory.size().0 {
            memory.resize(Bytes(used.next_multiple_of(PIECE)))?;
        }
    }
    let rows = labels.len();
    let mut by_number = vec![String::new(); texts.len()];
    for (text, number) in texts {
        by_number[number] = text;
    }
    let numbers: Option<Vec<f32>> =
        by_number.iter().map(|t| t.parse::<f32>().ok().filter(|v| v.is_finite())).collect();
    let whole =
        |v: &[f32]| v.iter().all(|v| v.fract() == 0.0 && *v >= 0.0) && v.len() <= MAX_NUMBERED_CLASSES;
    let (label, classes) = match numbers {
        Some(numbers)
            if options.regression
                || (options.classes.is_none_or(<[String]>::is_empty) && !whole(&numbers)) =>
        {
            let column: Vec<f32> = labels.iter().map(|&l| numbers[l]).collect();
            (Tensor::from_slice(&[rows, 1], &column), Vec::new())
        }
        None if options.regression => {
            let text = by_number.iter().find(|t| t.parse::<f32>().is_err());
            return Err(TrainError::invalid(place, format!("label {text:?}"), "numbers, to predict numbers"));
        }
        _ => {
            let classes = match options.classes {
                Some(classes) if !classes.is_empty() => classes.to_vec(),
                _ => {
                    let mut classes = by_number.clone();
                    // Numbers in their order, texts in theirs.
                    classes.sort_by(|a, b| match (a.parse::<f32>(), b.parse::<f32>()) {
                        (Ok(a), Ok(b)) => a.total_cmp(&b),
                        _ => a.cmp(b),
                    });
                    classes
                }
            };
            let of = by_number
                .iter()
                .map(|t| classes.iter().position(|c| c == t).map(|p| p as i64).ok_or(t))
                .collect::<Result<Vec<i64>, _>>()
                .map_err(|t| {
                    TrainError::invalid(
                        place,
                        format!("class {t:?}"),
                        format!("one of {}", classes.join(", ")),
                    )
                })?;
            let column: Vec<i64> = labels.iter().map(|&l| of[l]).collect();
            (Tensor::from_slice(&[rows], &column), classes)
        }
    };
    let features = Tensor::from_slice(&[rows, columns.len()], &values);
    debug_assert_eq!(features.dtype(), DType::F32);
    drop((values, labels));
    memory.resize(Bytes(features.size_bytes().0 + label.size_bytes().0))?;
    let set = ArrayDataset::new(vec![("features".into(), features), (LABEL.into(), label)], classes)?;
    Ok((set, memory))
}

/// Whether a file is a table by its name.
pub(super) fn is_table(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    name.ends_with(".csv") || name.ends_with(".csv.gz")
}

/// Any bytes as a table with a column `label`, for the tests of damaged files.
///
/// # Errors
/// They are none.
pub fn check_table(bytes: &[u8]) -> Result<ArrayDataset, TrainError> {
    let options = TableOptions { label: LABEL, ..TableOptions::default() };
    Ok(read("table", bytes, &options, &MemoryPool::with_limit(Bytes(64 << 20)))?.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Dataset, Random};

    fn table(text: &str) -> Result<ArrayDataset, TrainError> {
        check_table(text.as_bytes())
    }

    fn labels(set: &ArrayDataset) -> Vec<i64> {
        (0..set.len())
            .map(|i| {
                let (mut x, mut y) = (vec![0f32; set.features()[0].dims[0]], [0i64]);
                let targets = &mut [bytemuck::cast_slice_mut(&mut x[..]), bytemuck::cast_slice_mut(&mut y)];
                set.read(i, &mut Random::new(0), targets).unwrap();
                y[0]
            })
            .collect()
    }

    #[test]
    fn texts_are_classes_and_numbers_are_numbers() {
        let set = table("a, label ,b\n1,dog,2\n3,cat,\"4\"\n5,dog,6\n").unwrap();
        assert_eq!((set.classes(), set.features()[0].dims[0]), (&["cat".to_owned(), "dog".into()][..], 2));
        assert_eq!(labels(&set), [1, 0, 1]);
        let numbered = table("x,label\n1,10\n1,2\n").unwrap();
        assert_eq!((numbered.classes(), labels(&numbered)), (&["2".to_owned(), "10".into()][..], vec![1, 0]));
        let real = table("x,label\n1,1.5\n1,2\n").unwrap();
        assert_eq!((real.classes().len(), real.features()[1].dims.as_slice()), (0, &[1][..]));
        let options = TableOptions { label: "y", regression: true, without: &["t".into()], classes: None };
        let (set, _) = read("t", "x,t,y\n1,a,3\n".as_bytes(), &options, &MemoryPool::unbounded()).unwrap();
        assert_eq!((set.features()[0].dims[0], set.features()[1].dtype), (1, DType::F32));
        let known = ["a".to_owned()];
        let options = TableOptions { label: "label", classes: Some(&known), ..TableOptions::default() };
        let error = read("t", "x,label\n1,b\n".as_bytes(), &options, &MemoryPool::unbounded()).err().unwrap();
        assert!(error.to_string().contains("class \"b\""), "{error}");
    }

    #[test]
    fn bad_tables_say_where() {
        for (text, part) in [
            ("a,b\n1,2\n", "no column \"label\"; expected one of a, b"),
            ("a,label\n1,x\nfoo,x\n", "line 3, column \"a\": \"foo\""),
            ("a,label\n,x\n", "line 2, column \"a\": nothing"),
            ("a,label\nnan,x\n", "line 2, column \"a\""),
            ("a,label\n1,\n", "line 2: no label"),
            ("a,label\n1\n", "2 fields"),
            ("label\nx\n", "only a column of labels"),
        ] {
            let error = table(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text:?}: {error}");
        }
        let small = MemoryPool::with_limit(Bytes(1000));
        let options = TableOptions { label: "label", ..TableOptions::default() };
        let error = read("t", "x,label\n1,b\n".as_bytes(), &options, &small).err().unwrap();
        assert!(matches!(error, TrainError::Budget(_)), "{error}");
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_a_result(bytes in prop::collection::vec(any::<u8>(), 0..200), flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4)) {
            let _ = check_table(&bytes);
            let mut good = b"a,b,label\n1,2,x\n3,4,y\n\"5\",6,\"z\"\n".to_vec();
            for (at, byte) in flips {
                let at = at.index(good.len());
                good[at] = byte;
            }
            if let Ok(set) = check_table(&good) {
                prop_assert!(labels_fit(&set));
            }
        }
    }

    fn labels_fit(set: &ArrayDataset) -> bool {
        set.classes().is_empty() || labels(set).iter().all(|l| (*l as usize) < set.classes().len())
    }
}
