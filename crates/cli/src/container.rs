//! What kind of model a file is, told by its first bytes.

use crate::failure::{Failure, Outcome};
use lightering_formats::gguf::GgufFile;
use lightering_formats::safetensors::{self, SafetensorsFile};
use lightering_tier::{ByteSource, FileSource};
use std::path::Path;

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

/// Reads the header of a GGUF file.
pub fn read_gguf(path: &Path) -> Outcome<GgufFile> {
    let source = FileSource::open(path)?;
    GgufFile::read(&source).map_err(|e| explained(e, "GGUF"))
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
