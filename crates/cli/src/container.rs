//! What kind of model a file is, told by its first bytes.

use crate::failure::{Failure, Outcome};
use lightering_formats::gguf::GgufFile;
use lightering_formats::safetensors::{self, SafetensorsFile};
use lightering_tier::{ByteSource, DirectFile, FileSource, JoinedSource};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The kinds of model files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// A graph with its weights; also whatever is no other kind.
    Onnx,
    /// A language model: metadata, tokenizer, weights in blocks.
    Gguf,
    /// Named weights.
    Safetensors,
}

impl Container {
    /// Looks at the first bytes of the file; its ending counts only where these belong to no kind.
    ///
    /// A file that cannot be opened counts as ONNX, whose reader then tells why.
    pub fn of(path: &Path) -> Container {
        // Opening a pipe would take what the reader needs.
        if !path.is_file() {
            return Container::Onnx;
        }
        let Ok(source) = FileSource::open(path) else { return Container::Onnx };
        let mut first = [0; 9];
        let size = first.len().min(usize::try_from(source.len_bytes().0).unwrap_or(first.len()));
        if source.read_at(0, &mut first[..size]).is_err() {
            return Container::Onnx;
        }
        Container::of_bytes(&first[..size]).unwrap_or_else(|| {
            let ends_with = |ending| path.extension().is_some_and(|e| e.eq_ignore_ascii_case(ending));
            match () {
                () if ends_with("gguf") => Container::Gguf,
                () if ends_with("safetensors") => Container::Safetensors,
                () => Container::Onnx,
            }
        })
    }

    /// The kind that begins so. A safetensors file begins with the length of a JSON object and the object; no
    /// protobuf message has zeros where the upper bytes of that length are.
    fn of_bytes(first: &[u8]) -> Option<Container> {
        if first.starts_with(b"GGUF") {
            return Some(Container::Gguf);
        }
        let size = u64::from_le_bytes(first.get(..8)?.try_into().ok()?);
        let object = first.get(8) == Some(&b'{');
        (object && (2..=safetensors::MAX_HEADER_BYTES).contains(&size)).then_some(Container::Safetensors)
    }
}

/// Ends a command that runs graphs when it is given something else.
pub fn refuse_what_is_no_graph(path: &Path, command: &str) -> Outcome<()> {
    let place = path.display();
    match Container::of(path) {
        Container::Onnx => Ok(()),
        Container::Gguf => Err(Failure::input(
            format!("{place}: is a language model (GGUF); expected an ONNX model for `lighter {command}`"),
            format!("lighter generate {place} TEXT, or lighter chat {place}"),
        )),
        Container::Safetensors => Err(Failure::input(
            format!(
                "{place}: weights without a graph (safetensors) cannot be run; expected an ONNX model for `lighter {command}`"
            ),
            format!(
                "lighter inspect {place}, or lighter convert, which makes a language model of a checkpoint"
            ),
        )),
    }
}

fn explained(error: lightering_formats::Error, format: &str) -> Failure {
    use lightering_formats::Error;
    let hint = match &error {
        Error::Corrupt { .. } => "getting the file again, since it is damaged or not complete",
        Error::Unsupported { .. } => "another quantization of the same model",
        _ => "a file as the tools of its format write it",
    };
    Failure::from(error).context(format!("reading a {format} file")).or_hint(hint)
}

/// Most parts of a model.
const PARTS_MAX: u64 = 1000;

/// Reads the header of a GGUF file, of a model in parts those of all parts.
pub fn read_gguf(path: &Path) -> Outcome<GgufFile> {
    Ok(read_parts(path)?.0)
}

/// Reads the header of a GGUF file, and opens its bytes for direct reads; those of a model in parts are joined.
pub fn open_gguf(path: &Path) -> Outcome<(GgufFile, Arc<dyn ByteSource>)> {
    let (file, paths) = read_parts(path)?;
    if let [only] = paths.as_slice() {
        return Ok((file, Arc::new(DirectFile::open(only)?)));
    }
    let mut parts: Vec<Arc<dyn ByteSource>> = Vec::new();
    for path in &paths {
        parts.push(Arc::new(DirectFile::open(path)?));
    }
    Ok((file, Arc::new(JoinedSource::new(parts))))
}

fn read_parts(path: &Path) -> Outcome<(GgufFile, Vec<PathBuf>)> {
    let source = FileSource::open(path)?;
    let read = |source: &FileSource| GgufFile::read(source).map_err(|e| explained(e, "GGUF"));
    let first = read(&source)?;
    let paths = part_paths(path, &first)?;
    if paths.len() == 1 {
        return Ok((first, paths));
    }
    let (mut files, mut sizes) = (vec![first], vec![source.len_bytes()]);
    for path in &paths[1..] {
        let source = FileSource::open(path).map_err(|e| {
            Failure::from(e).or_hint("all parts of the model side by side, as they were made")
        })?;
        sizes.push(source.len_bytes());
        files.push(read(&source)?);
    }
    let parts = files.into_iter().zip(JoinedSource::starts(&sizes)).collect();
    let file = GgufFile::joined(parts).map_err(|e| explained(e.within(path.display()), "GGUF"))?;
    Ok((file, paths))
}

/// The files of a model, of which `path` has to be the first: `NAME-00001-of-00003.gguf` and so on.
fn part_paths(path: &Path, file: &GgufFile) -> Outcome<Vec<PathBuf>> {
    let count = file.metadata.get_u64("split.count")?.unwrap_or(1);
    if count <= 1 {
        return Ok(vec![path.to_owned()]);
    }
    let place = path.display();
    if count > PARTS_MAX {
        let message = format!("{place}: split.count is {count}; expected at most {PARTS_MAX}");
        return Err(Failure::input(message, "the file as it was made"));
    }
    let number = file.metadata.get_u64("split.no")?.unwrap_or(0);
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let ending = |number: u64| format!("-{:05}-of-{count:05}.gguf", number.saturating_add(1));
    let Some(stem) = name.strip_suffix(&ending(number)) else {
        let message =
            format!("{place}: is part {} of {count} of a model, but not called so", number.saturating_add(1));
        return Err(Failure::input(message, format!("a name that ends in {}", ending(number))));
    };
    let part = |number: u64| path.with_file_name(format!("{stem}{}", ending(number)));
    if number != 0 {
        let message = format!("{place}: is part {} of {count} of a model; expected the first", number + 1);
        return Err(Failure::input(message, part(0).display().to_string()));
    }
    Ok((0..count).map(part).collect())
}

/// Reads the header of a safetensors file.
pub fn read_safetensors(path: &Path) -> Outcome<SafetensorsFile> {
    let source = FileSource::open(path)?;
    SafetensorsFile::read(&source).map_err(|e| explained(e, "safetensors"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_by_the_first_bytes() {
        assert_eq!(Container::of_bytes(b"GGUF\x03"), Some(Container::Gguf));
        assert_eq!(Container::of_bytes(b"\x20\0\0\0\0\0\0\0{"), Some(Container::Safetensors));
        // The first bytes of an ONNX model: its version, then its producer.
        assert_eq!(Container::of_bytes(b"\x08\x08\x12\x07pytor"), None);
        assert_eq!(Container::of_bytes(b"\xff\xff\xff\xff\0\0\0\0{"), None, "longer than any header");
        for size in 0..9 {
            assert_eq!(Container::of_bytes(&b"\x20\0\0\0\0\0\0\0{"[..size]), None, "{size} bytes");
        }
    }

    #[test]
    fn the_ending_counts_only_for_unknown_content() {
        let folder = tempfile::tempdir().unwrap();
        let kind = |name: &str, content: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            Container::of(&path)
        };
        assert_eq!(kind("model.bin", b"GGUF\x03\0\0\0\0\0"), Container::Gguf);
        assert_eq!(kind("model.onnx", b"\x20\0\0\0\0\0\0\0{}"), Container::Safetensors);
        assert_eq!(kind("empty.GGUF", b""), Container::Gguf);
        assert_eq!(kind("text.safetensors", b"some text of no use"), Container::Safetensors);
        assert_eq!(kind("model", b"\x08\x08\x12\x07pytorch"), Container::Onnx);
        assert_eq!(Container::of(folder.path()), Container::Onnx);
    }
}
