//! Files in, files out: what a model eats and what it makes, as the files that users have.

use crate::arguments::NamedFile;
use crate::array::{ArrayView, Comparison, Tolerance, compare};
use crate::failure::{Failure, Outcome};
use anyhow::Context;
use lightering_engine::RuntimeValue;
use lightering_formats::image::{Picture, Preprocess};
use lightering_formats::onnx::proto::TypeProto;
use lightering_formats::{HostValue, npy, onnx};
use lightering_graph::{DType, Dim, Tensor, TensorType, ValueType};
use lightering_meter::{Checksum, MemoryPool, OutputReceipt, Reservation};
use lightering_tier::FileSource;
use lightering_units::Bytes;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

/// A named opening of a model: an input or an output, with its declared type.
#[derive(Clone, Debug)]
pub struct Port {
    /// Its name in the model.
    pub name: String,
    /// What it holds.
    pub ty: ValueType,
}

/// A value that was read for an input, with the memory that it takes.
#[derive(Debug)]
pub struct LoadedInput {
    /// The input's name.
    pub name: String,
    /// What was read.
    pub value: RuntimeValue,
    /// Keeps the value's bytes counted for as long as it lives.
    pub held: Reservation,
}

const PICTURE_ENDINGS: [&str; 6] = ["png", "jpg", "jpeg", "bmp", "gif", "webp"];

/// Where the bytes of a file input are.
pub enum InputBytes<'a> {
    /// In a file.
    File(&'a Path),
    /// In this program (the embedded picture), under a file name that tells the format.
    Embedded(&'static [u8], &'static str),
}

/// Matches `files` with the inputs of a model and reads them; `name=` may be left out where one input is left.
pub fn load_inputs(
    files: &[NamedFile],
    ports: &[Port],
    preprocess: Option<&str>,
    pool: &MemoryPool,
) -> Outcome<Vec<LoadedInput>> {
    let names = || ports.iter().map(|p| format!("{} {}", p.name, p.ty)).collect::<Vec<_>>().join(", ");
    let mut loaded: Vec<LoadedInput> = Vec::new();
    for file in files {
        if file.name.is_none() && ending(&file.file) == "npz" {
            for (name, tensor) in read_npz(&file.file, pool)? {
                let port = ports.iter().find(|p| p.name == name).ok_or_else(|| {
                    Failure::input(
                        format!("{} holds {name:?}, which is no input of the model", file.file.display()),
                        format!("one of its inputs: {}", names()),
                    )
                })?;
                push_input(&mut loaded, port, RuntimeValue::Tensor(tensor), pool)?;
            }
            continue;
        }
        let port = match &file.name {
            Some(name) => ports.iter().find(|p| p.name == *name).ok_or_else(|| {
                Failure::input(
                    format!("the model has no input {name:?}"),
                    format!("one of its inputs: {}", names()),
                )
            })?,
            None => match ports {
                [only] => only,
                _ => {
                    return Err(Failure::input(
                        format!("which of the {} inputs is {}?", ports.len(), file.file.display()),
                        format!("--input NAME={}, where NAME is one of: {}", file.file.display(), names()),
                    ));
                }
            },
        };
        let what = || format!("reading input {:?} from {}", port.name, file.file.display());
        let value =
            read(&InputBytes::File(&file.file), port, preprocess, pool).map_err(|f| f.context(what()))?;
        push_input(&mut loaded, port, value, pool)?;
    }
    Ok(loaded)
}

fn push_input(
    loaded: &mut Vec<LoadedInput>,
    port: &Port,
    value: RuntimeValue,
    pool: &MemoryPool,
) -> Outcome<()> {
    if loaded.iter().any(|l| l.name == port.name) {
        return Err(Failure::input(
            format!("input {:?} was given twice", port.name),
            "each input once".to_owned(),
        ));
    }
    check_type(port, &value)?;
    let held = pool.reserve(format!("input {}", port.name), size_of_value(&value))?;
    loaded.push(LoadedInput { name: port.name.clone(), value, held });
    Ok(())
}

/// Refuses a model input for which no file was given.
pub fn require_all(loaded: &[LoadedInput], ports: &[Port]) -> Outcome<()> {
    let missing: Vec<String> = ports
        .iter()
        .filter(|p| loaded.iter().all(|l| l.name != p.name))
        .map(|p| format!("{} ({})", p.name, p.ty))
        .collect();
    match missing.first() {
        None => Ok(()),
        Some(first) => Err(Failure::input(
            format!("no file for input {}", missing.join(", ")),
            format!(
                "--input {}=FILE with a .npy, .npz, .pb, picture or raw file",
                first.split(' ').next().unwrap_or("NAME")
            ),
        )),
    }
}

/// Sizes of symbolic dimensions: those given by `--dim` and those that the inputs show.
pub fn bind_dimensions(
    given: &[(String, usize)],
    loaded: &[LoadedInput],
    ports: &[Port],
) -> Outcome<BTreeMap<String, usize>> {
    let mut bound: BTreeMap<String, usize> = BTreeMap::new();
    for (name, size) in given {
        if let Some(old) = bound.insert(name.clone(), *size)
            && old != *size
        {
            return Err(Failure::input(
                format!("dimension {name:?} was given as {old} and as {size}"),
                "one --dim for each name",
            ));
        }
    }
    for input in loaded {
        let Some(port) = ports.iter().find(|p| p.name == input.name) else { continue };
        let (Some(tensor), Some(TensorType { shape: Some(shape), .. })) =
            (input.value.tensor(), port.ty.tensor())
        else {
            continue;
        };
        for (dim, size) in shape.iter().zip(tensor.dims()) {
            if let Dim::Symbol(name) = dim
                && let Some(old) = bound.insert(name.to_string(), *size)
                && old != *size
            {
                return Err(Failure::input(
                    format!("dimension {name:?} of input {:?} is {size}, but {old} elsewhere", port.name),
                    "inputs whose named dimensions agree",
                ));
            }
        }
    }
    Ok(bound)
}

/// Checks a value against the declared type of an input, as far as that is known.
fn check_type(port: &Port, value: &RuntimeValue) -> Outcome<()> {
    let (Some(tensor), Some(declared)) = (value.tensor(), port.ty.tensor()) else {
        return Ok(());
    };
    if tensor.dtype() != declared.dtype {
        return Err(Failure::input(
            format!("input {:?} holds {}, but the model takes {}", port.name, tensor.dtype(), port.ty),
            format!("the same numbers stored as {}", declared.dtype),
        ));
    }
    let Some(shape) = &declared.shape else { return Ok(()) };
    let fits = shape.len() == tensor.dims().len()
        && shape.iter().zip(tensor.dims()).all(|(dim, size)| dim.fixed().is_none_or(|fixed| fixed == *size));
    if fits {
        return Ok(());
    }
    Err(Failure::input(
        format!("input {:?} has shape {:?}, but the model takes {}", port.name, tensor.dims(), port.ty),
        "an input of that shape",
    ))
}

fn ending(path: &Path) -> String {
    path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase()).unwrap_or_default()
}

fn file_size(path: &Path) -> Outcome<Bytes> {
    Ok(Bytes(std::fs::metadata(path).with_context(|| format!("opening {}", path.display()))?.len()))
}

/// Reads the value of one input or expected output.
pub fn read(
    from: &InputBytes<'_>,
    port: &Port,
    preprocess: Option<&str>,
    pool: &MemoryPool,
) -> Outcome<RuntimeValue> {
    let (path, kind, size) = match from {
        InputBytes::File(path) => (*path, ending(path), file_size(path)?),
        InputBytes::Embedded(bytes, name) => {
            (Path::new(name), ending(Path::new(name)), Bytes(bytes.len() as u64))
        }
    };
    // Reading holds the file's bytes and, for a moment, a second copy in the model's own layout. Pictures and
    // archives unpack to more and ask again.
    let _reading = pool.reserve(format!("reading {}", path.display()), Bytes(size.0.saturating_mul(2)))?;
    let open = || File::open(path).map(BufReader::new).with_context(|| format!("opening {}", path.display()));
    match kind.as_str() {
        "npy" => {
            let opaque = port.ty.tensor().map(|t| t.dtype);
            Ok(RuntimeValue::Tensor(npy::read_as(&mut open()?, opaque)?))
        }
        "npz" => {
            let arrays = read_npz(path, pool)?;
            let count = arrays.len();
            let by_name = |wanted: &str| arrays.iter().position(|(name, _)| name == wanted);
            let index = by_name(&port.name).or((count == 1).then_some(0)).ok_or_else(|| {
                let names: Vec<&str> = arrays.iter().map(|(name, _)| name.as_str()).collect();
                Failure::input(
                    format!("no array is called {:?}; there are {}", port.name, names.join(", ")),
                    "an archive with an array of that name, or with only one",
                )
            })?;
            let (_, tensor) = arrays.into_iter().nth(index).expect("the index was just found");
            Ok(RuntimeValue::Tensor(tensor))
        }
        "pb" => {
            let source = FileSource::open(path).with_context(|| format!("opening {}", path.display()))?;
            read_pb(&source, &port.ty)
        }
        kind if PICTURE_ENDINGS.contains(&kind) => {
            let bytes = match from {
                InputBytes::File(path) => {
                    std::fs::read(path).with_context(|| format!("reading {}", path.display()))?
                }
                InputBytes::Embedded(bytes, _) => bytes.to_vec(),
            };
            let tensor = read_picture(&bytes, port, preprocess, pool)?;
            Ok(RuntimeValue::Tensor(tensor))
        }
        _ => read_raw(path, size, port),
    }
}

/// Reads a file of ONNX test data whose kind is `ty`.
pub fn read_pb(source: &FileSource, ty: &ValueType) -> Outcome<RuntimeValue> {
    let value = match (onnx::read_value(source, &declared(ty)), ty) {
        (Ok(value), _) => value,
        // A file for an optional may hold the content alone.
        (Err(_), ValueType::Optional(content)) => onnx::read_value(source, &declared(content))?,
        (Err(error), _) => return Err(error.into()),
    };
    let mut value = into_runtime(value, ty)?;
    // NumPy has no bfloat16, so test data holds its bits as integers.
    if let (RuntimeValue::Tensor(tensor), Some(DType::BF16)) = (&mut value, ty.tensor().map(|t| t.dtype))
        && tensor.dtype() == DType::U16
    {
        *tensor = std::mem::replace(tensor, Tensor::zeros(DType::U16, &[0])).into_dtype(DType::BF16);
    }
    Ok(value)
}

fn declared(ty: &ValueType) -> TypeProto {
    match ty {
        ValueType::Sequence(element) => TypeProto::Sequence(Box::new(declared(element))),
        ValueType::Optional(content) => TypeProto::Optional(Box::new(declared(content))),
        ValueType::Map { key, .. } => {
            TypeProto::Map { key_type: onnx::dtype_to_onnx(*key), value_type: Box::new(TypeProto::Unset) }
        }
        ValueType::Tensor(_) | ValueType::Unknown => TypeProto::Unset,
    }
}

fn read_npz(path: &Path, pool: &MemoryPool) -> Outcome<Vec<(String, Tensor)>> {
    let _reading = pool.reserve(format!("reading {}", path.display()), file_size(path)?)?;
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    // Each array exists twice while it is read.
    let limit = pool.available().map_or(u64::MAX, |free| free.0 / 2);
    let arrays = npy::read_npz_within(BufReader::new(file), limit)
        .with_context(|| format!("reading {}", path.display()))?;
    Ok(arrays)
}

fn read_picture(bytes: &[u8], port: &Port, preprocess: Option<&str>, pool: &MemoryPool) -> Outcome<Tensor> {
    let shape = port.ty.tensor().and_then(|t| t.shape.as_deref()).unwrap_or_default();
    let dtype = port.ty.tensor().map(|t| t.dtype);
    let spec = match (preprocess, dtype) {
        (Some(spec), _) => spec.to_owned(),
        // Bytes go in as they are; which axis is the channel can be read off the shape.
        (None, Some(DType::U8)) => "dtype=u8".to_owned(),
        (None, _) => {
            return Err(Failure::input(
                format!("input {:?} is {}: how does a picture become that?", port.name, port.ty),
                "--preprocess scale=255,mean=0.485:0.456:0.406,std=0.229:0.224:0.225 (or what the model was trained with)",
            ));
        }
    };
    let spec = complete_spec(&spec, shape);
    let steps: Preprocess = spec.parse()?;
    let _decoding = pool.reserve("decoding a picture", Bytes(Picture::decoding_bytes(bytes)?))?;
    let picture = Picture::decode(bytes)?;
    let _working = pool.reserve("resizing a picture", Bytes(steps.working_bytes(&picture)?))?;
    Ok(steps.apply(&picture)?.tensor)
}

/// Adds to a preprocessing declaration what the model's input shape says: layout and size.
fn complete_spec(spec: &str, shape: &[Dim]) -> String {
    let has = |key: &str| spec.split(',').any(|pair| pair.trim().split('=').next() == Some(key));
    let sizes: Vec<Option<usize>> = shape.iter().map(Dim::fixed).collect();
    let is_channel = |size: Option<usize>| matches!(size, Some(1 | 3));
    let mut spec = spec.to_owned();
    let mut add = |text: String| {
        if !spec.is_empty() {
            spec.push(',');
        }
        spec.push_str(&text);
    };
    let (layout, height, width) = match sizes[..] {
        [_, h, w, c] if is_channel(c) && !is_channel(sizes[1]) => ("nhwc", h, w),
        [_, c, h, w] if is_channel(c) => ("nchw", h, w),
        [h, w, c] if is_channel(c) && !is_channel(sizes[0]) => ("hwc", h, w),
        [c, h, w] if is_channel(c) => ("chw", h, w),
        _ => return spec,
    };
    if !has("layout") {
        add(format!("layout={layout}"));
    }
    if let (Some(height), Some(width), false) = (height, width, has("resize") || has("crop")) {
        add(format!("resize={width}x{height}"));
    }
    spec
}

fn read_raw(path: &Path, size: Bytes, port: &Port) -> Outcome<RuntimeValue> {
    let fixed = port.ty.tensor().and_then(|t| Some((t.dtype, t.dims()?, t.size_bytes()?)));
    let Some((dtype, dims, expected)) = fixed.filter(|(dtype, ..)| *dtype != DType::String) else {
        return Err(Failure::input(
            format!(
                "{} has no known ending, and raw bytes need an input of fixed size, not {}",
                path.display(),
                port.ty
            ),
            "a .npy file, which tells its own shape",
        ));
    };
    if size.0 != expected as u64 {
        return Err(Failure::input(
            format!(
                "{} has {} bytes, but raw bytes for {} are {expected} bytes",
                path.display(),
                size.0,
                port.ty
            ),
            "a file of that size, or a .npy, .npz, .pb or picture file with its usual ending",
        ));
    }
    let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    Ok(RuntimeValue::Tensor(Tensor::from_bytes(dtype, &dims, &bytes)?))
}

/// From the form that files have to the form that the engine takes.
fn into_runtime(value: HostValue, ty: &ValueType) -> Outcome<RuntimeValue> {
    Ok(match value {
        HostValue::Tensor(tensor) => RuntimeValue::Tensor(tensor),
        HostValue::Sequence(elements) => {
            let element = match ty {
                ValueType::Sequence(element) => (**element).clone(),
                _ => ValueType::Unknown,
            };
            let values =
                elements.into_iter().map(|v| into_runtime(v, &element)).collect::<Outcome<Vec<_>>>()?;
            RuntimeValue::Sequence(element, values)
        }
        HostValue::Optional(content) => {
            let inner = match ty {
                ValueType::Optional(inner) => (**inner).clone(),
                _ => ValueType::Unknown,
            };
            let content = content.map(|v| into_runtime(*v, &inner).map(Box::new)).transpose()?;
            RuntimeValue::Optional(inner, content)
        }
        HostValue::Map(keys, values) => {
            let mut bytes = Vec::new();
            let mut dtype = DType::F32;
            for value in values {
                let HostValue::Tensor(tensor) = value else {
                    return Err(Failure::input(
                        "a map of other things than numbers",
                        "a map from keys to numbers",
                    ));
                };
                dtype = tensor.dtype();
                bytes.extend_from_slice(tensor.as_bytes());
            }
            let values = Tensor::from_bytes(dtype, keys.dims(), &bytes)?;
            RuntimeValue::Map(keys, values)
        }
    })
}

/// Bytes that a value's elements take.
pub fn size_of_value(value: &RuntimeValue) -> Bytes {
    match value {
        RuntimeValue::Tensor(tensor) => tensor.size_bytes(),
        RuntimeValue::Sequence(_, elements) => elements.iter().map(size_of_value).sum(),
        RuntimeValue::Optional(_, content) => content.as_deref().map_or(Bytes::ZERO, size_of_value),
        RuntimeValue::Map(keys, values) => keys.size_bytes() + values.size_bytes(),
    }
}

/// The tensors inside a value, each with a suffix for its name: none for a tensor itself.
pub fn tensors_of(value: &RuntimeValue) -> Vec<(String, &Tensor)> {
    match value {
        RuntimeValue::Tensor(tensor) => vec![(String::new(), tensor)],
        RuntimeValue::Sequence(_, elements) => elements
            .iter()
            .enumerate()
            .flat_map(|(i, e)| tensors_of(e).into_iter().map(move |(suffix, t)| (format!(".{i}{suffix}"), t)))
            .collect(),
        RuntimeValue::Optional(_, content) => content.as_deref().map_or(Vec::new(), tensors_of),
        RuntimeValue::Map(keys, values) => vec![(".keys".to_owned(), keys), (".values".to_owned(), values)],
    }
}

/// What the receipt says of an output.
pub fn receipts_of(name: &str, value: &RuntimeValue) -> Vec<OutputReceipt> {
    tensors_of(value)
        .into_iter()
        .map(|(suffix, tensor)| {
            let mut checksum = Checksum::new();
            checksum.update(tensor.as_bytes());
            for text in tensor.as_strings() {
                checksum.update(text.as_bytes());
                checksum.update(&[0]);
            }
            OutputReceipt {
                name: format!("{name}{suffix}"),
                dtype: tensor.dtype().name().to_owned(),
                shape: tensor.dims().to_vec(),
                sha256: checksum.finish(),
            }
        })
        .collect()
}

/// A file name for a tensor name: letters that could leave the folder or confuse a shell become `_`.
pub fn file_name(name: &str) -> String {
    let safe: String = name
        .chars()
        .map(|c| if c.is_alphanumeric() || matches!(c, '.' | '-' | '_') { c } else { '_' })
        .collect();
    let safe = safe.trim_start_matches('.');
    if safe.is_empty() { "output".to_owned() } else { safe.to_owned() }
}

/// Writes an output as NAME.npy (parts of sequences as NAME.0.npy, …) and tells the files.
pub fn write_output(
    folder: &Path,
    name: &str,
    value: &RuntimeValue,
    taken: &mut Vec<PathBuf>,
) -> Outcome<Vec<PathBuf>> {
    let mut written = Vec::new();
    for (suffix, tensor) in tensors_of(value) {
        let path = folder.join(format!("{}.npy", file_name(&format!("{name}{suffix}"))));
        if taken.contains(&path) {
            return Err(Failure::input(
                format!("two outputs would both be written to {}", path.display()),
                "a model whose output names differ in letters or digits",
            ));
        }
        let place = || format!("writing {}", path.display());
        let mut file = BufWriter::new(File::create(&path).with_context(place)?);
        npy::write(tensor, &mut file).with_context(place)?;
        file.flush().with_context(place)?;
        taken.push(path.clone());
        written.push(path);
    }
    Ok(written)
}

/// The numbers of a tensor, to be compared or ranked; `None` for text.
pub fn view(tensor: &Tensor) -> Option<ArrayView<'_>> {
    (tensor.dtype() != DType::String).then(|| ArrayView {
        dtype: tensor.dtype(),
        shape: tensor.dims(),
        bytes: tensor.as_bytes(),
    })
}

/// Compares two values of any kind.
pub fn compare_values(actual: &RuntimeValue, expected: &RuntimeValue, tolerance: Tolerance) -> Comparison {
    let kinds = |difference: &str| Comparison::refused(difference.to_owned());
    match (actual, expected) {
        (RuntimeValue::Tensor(a), RuntimeValue::Tensor(e)) => compare_tensors(a, e, tolerance),
        (RuntimeValue::Sequence(_, a), RuntimeValue::Sequence(_, e)) => {
            if a.len() != e.len() {
                return Comparison::refused(format!(
                    "a sequence of {} elements, expected {}",
                    a.len(),
                    e.len()
                ));
            }
            let parts = a.iter().zip(e).map(|(a, e)| compare_values(a, e, tolerance));
            Comparison::all(parts)
        }
        (RuntimeValue::Optional(_, a), RuntimeValue::Optional(_, e)) => match (a, e) {
            (None, None) => Comparison::all([]),
            (Some(a), Some(e)) => compare_values(a, e, tolerance),
            (None, Some(_)) => kinds("absent, expected a value"),
            (Some(_), None) => kinds("a value, expected none"),
        },
        // A test file for an optional that is there may hold the content alone.
        (RuntimeValue::Optional(_, Some(a)), e) => compare_values(a, e, tolerance),
        (a, RuntimeValue::Optional(_, Some(e))) => compare_values(a, e, tolerance),
        (RuntimeValue::Map(ak, av), RuntimeValue::Map(ek, ev)) => {
            Comparison::all([compare_tensors(ak, ek, tolerance), compare_tensors(av, ev, tolerance)])
        }
        _ => Comparison::refused(format!("{}, expected {}", actual.value_type(), expected.value_type())),
    }
}

fn compare_tensors(actual: &Tensor, expected: &Tensor, tolerance: Tolerance) -> Comparison {
    if let (Some(a), Some(e)) = (view(actual), view(expected)) {
        return compare(a, e, tolerance);
    }
    if actual.dtype() != expected.dtype() || actual.dims() != expected.dims() {
        return Comparison::refused(format!("{}, expected {}", actual.tensor_type(), expected.tensor_type()));
    }
    let differ = |(a, e): &(&String, &String)| a != e;
    let pairs = || actual.as_strings().iter().zip(expected.as_strings());
    let mismatched = pairs().filter(differ).count();
    Comparison {
        equal: mismatched == 0,
        elements: expected.len(),
        mismatched,
        max_absolute: 0.0,
        max_relative: 0.0,
        difference: pairs()
            .find(differ)
            .map_or(String::new(), |(a, e)| format!("text {a:?}, expected {e:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(name: &str, dtype: DType, dims: &[usize]) -> Port {
        Port { name: name.into(), ty: TensorType::fixed(dtype, dims).into() }
    }

    fn write_npy(path: &Path, tensor: &Tensor) {
        npy::write(tensor, &mut File::create(path).unwrap()).unwrap();
    }

    fn named(name: Option<&str>, file: PathBuf) -> NamedFile {
        NamedFile { name: name.map(str::to_owned), file }
    }

    #[test]
    fn inputs_are_matched_checked_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.npy");
        write_npy(&file, &Tensor::from_slice(&[2], &[1.0f32, 2.0]));
        let pool = MemoryPool::with_limit(Bytes(10_000));
        let ports = [port("x", DType::F32, &[2])];
        let loaded = load_inputs(&[named(None, file.clone())], &ports, None, &pool).unwrap();
        assert_eq!(loaded[0].value.tensor().unwrap().as_slice::<f32>(), [1.0, 2.0]);
        assert_eq!(pool.used(), Bytes(8), "what stays is counted, what was needed to read is not");
        let message = |files: &[NamedFile], ports: &[Port]| {
            load_inputs(files, ports, None, &pool).err().map(|f| f.message()).unwrap_or_default()
        };
        let two = [port("a", DType::F32, &[2]), port("b", DType::F32, &[2])];
        assert!(message(&[named(None, file.clone())], &two).contains("--input NAME="));
        assert!(message(&[named(Some("z"), file.clone())], &two).contains("a f32[2], b f32[2]"));
        let wrong = [port("x", DType::F32, &[3])];
        assert!(message(&[named(None, file.clone())], &wrong).contains("has shape [2]"));
        let wrong = [port("x", DType::I64, &[2])];
        assert!(message(&[named(None, file.clone())], &wrong).contains("stored as i64"));
        let twice = [named(Some("x"), file.clone()), named(Some("x"), file.clone())];
        assert!(message(&twice, &ports).contains("given twice"));
        let missing = require_all(&[], &two).unwrap_err().message();
        assert!(
            missing.contains("a (f32[2]), b (f32[2])") && missing.contains("--input a=FILE"),
            "{missing}"
        );
        let pool = MemoryPool::with_limit(Bytes(10));
        let refused = load_inputs(&[named(None, file)], &ports, None, &pool).unwrap_err();
        assert_eq!(refused.exit, crate::failure::Exit::Budget);
    }

    #[test]
    fn raw_bytes_need_the_exact_size() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.raw");
        std::fs::write(&file, [1u8, 0, 2, 0]).unwrap();
        let pool = MemoryPool::unbounded();
        let good =
            load_inputs(&[named(None, file.clone())], &[port("x", DType::I16, &[2])], None, &pool).unwrap();
        assert_eq!(good[0].value.tensor().unwrap().as_slice::<i16>(), [1, 2]);
        let bad = load_inputs(&[named(None, file)], &[port("x", DType::I16, &[3])], None, &pool).unwrap_err();
        assert!(bad.message().contains("4 bytes") && bad.message().contains("6 bytes"), "{}", bad.message());
    }

    #[test]
    fn dimensions_are_bound_once() {
        let symbol = Dim::Symbol("batch".into());
        let ty = TensorType { dtype: DType::F32, shape: Some(vec![symbol, Dim::Fixed(1)]) };
        let ports =
            [Port { name: "a".into(), ty: ty.clone().into() }, Port { name: "b".into(), ty: ty.into() }];
        let pool = MemoryPool::unbounded();
        let input = |name: &str, batch: usize| LoadedInput {
            name: name.into(),
            value: Tensor::zeros(DType::F32, &[batch, 1]).into(),
            held: pool.reserve("x", Bytes(0)).unwrap(),
        };
        let bound = bind_dimensions(&[], &[input("a", 3), input("b", 3)], &ports).unwrap();
        assert_eq!(bound.get("batch"), Some(&3));
        assert!(bind_dimensions(&[], &[input("a", 3), input("b", 4)], &ports).is_err());
        assert!(bind_dimensions(&[("batch".into(), 2)], &[input("a", 3)], &ports).is_err());
    }

    #[test]
    fn the_shape_completes_the_preprocessing() {
        let dims = |sizes: &[usize]| sizes.iter().map(|s| Dim::Fixed(*s)).collect::<Vec<_>>();
        assert_eq!(complete_spec("scale=255", &dims(&[1, 3, 20, 30])), "scale=255,layout=nchw,resize=30x20");
        assert_eq!(complete_spec("dtype=u8", &dims(&[1, 20, 30, 3])), "dtype=u8,layout=nhwc,resize=30x20");
        assert_eq!(complete_spec("layout=nchw,crop=8", &dims(&[1, 3, 8, 8])), "layout=nchw,crop=8");
        assert_eq!(complete_spec("scale=1", &dims(&[5])), "scale=1");
    }

    #[test]
    fn file_names_stay_in_their_folder() {
        assert_eq!(file_name("../../etc/passwd"), "_.._etc_passwd");
        assert_eq!(file_name("scores:0"), "scores_0");
        assert_eq!(file_name(".."), "output");
        assert_eq!(file_name("logits"), "logits");
    }

    #[test]
    fn values_of_different_kinds_differ() {
        let tolerance = Tolerance { relative: 0.0, absolute: 0.0 };
        let one = RuntimeValue::from(Tensor::scalar(1i64));
        let list = RuntimeValue::tensor_sequence(DType::I64, vec![Tensor::scalar(1i64)]);
        assert!(compare_values(&list, &list, tolerance).equal);
        assert!(!compare_values(&one, &list, tolerance).equal);
        let longer =
            RuntimeValue::tensor_sequence(DType::I64, vec![Tensor::scalar(1i64), Tensor::scalar(2i64)]);
        assert!(compare_values(&longer, &list, tolerance).difference.contains("expected 1"));
        let text = |s: &str| RuntimeValue::from(Tensor::from_strings(&[1], vec![s.into()]));
        assert!(compare_values(&text("a"), &text("b"), tolerance).difference.contains("expected \"b\""));
    }
}
