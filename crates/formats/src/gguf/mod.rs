//! GGUF files (versions 2 and 3, little-endian): metadata, and weights in blocks that stay in the file.
//!
//! [`GgufFile::read`] reads the metadata and where each tensor lies, never the tensors themselves. [`GgufWriter`] takes
//! the metadata and the list of tensors first and then streams the data, so that writing a file needs no more memory
//! than its header.
//!
//! ```
//! use lightering_formats::gguf::{GgufFile, GgufWriter, Value};
//! use lightering_units::BlockFormat;
//! let mut writer = GgufWriter::new();
//! writer.set("general.architecture", Value::from("llama")).unwrap();
//! writer.tensor("output.weight", &[32, 2], BlockFormat::Q8_0).unwrap();
//! let mut file = Vec::new();
//! let mut data = writer.begin(&mut file).unwrap();
//! data.write(&[0; 68]).unwrap();
//! data.finish().unwrap();
//!
//! let read = GgufFile::read(&file).unwrap();
//! assert_eq!(read.metadata.require_str("general.architecture").unwrap(), "llama");
//! assert_eq!(read.tensor("output.weight").unwrap().size.0, 68);
//! ```
//!
//! The format is specified in `docs/gguf.md` of the ggml project.

mod metadata;
mod reader;
#[cfg(test)]
mod tests;
mod writer;

pub use metadata::{Array, Metadata, Value};
pub use reader::{GgufFile, GgufTensor};
pub use writer::{GgufDataWriter, GgufWriter};

use lightering_units::BlockFormat;

const MAGIC: [u8; 4] = *b"GGUF";
/// The key that sets the alignment of tensors in the file, and its value where it is absent.
const ALIGNMENT_KEY: &str = "general.alignment";
const DEFAULT_ALIGNMENT: u64 = 32;
/// Largest alignment that is accepted.
const MAX_ALIGNMENT: u64 = 1 << 24;
/// Longest key or tensor name in bytes.
pub const MAX_NAME_BYTES: u64 = 65_535;
/// Most dimensions of a tensor.
pub const MAX_RANK: u32 = 4;
/// Deepest nesting of arrays in the metadata.
pub const MAX_ARRAY_DEPTH: u32 = 4;
/// Most memory that the metadata and the list of tensors of one file may take.
pub const MAX_HEADER_BYTES: u64 = 1 << 29;

/// The number that ggml gives to a format.
fn ggml_type(format: BlockFormat) -> u32 {
    match format {
        BlockFormat::F32 => 0,
        BlockFormat::F16 => 1,
        BlockFormat::Q4_0 => 2,
        BlockFormat::Q4_1 => 3,
        BlockFormat::Q5_0 => 6,
        BlockFormat::Q5_1 => 7,
        BlockFormat::Q8_0 => 8,
        BlockFormat::Q2_K => 10,
        BlockFormat::Q3_K => 11,
        BlockFormat::Q4_K => 12,
        BlockFormat::Q5_K => 13,
        BlockFormat::Q6_K => 14,
        BlockFormat::IQ4_NL => 20,
        BlockFormat::BF16 => 30,
        BlockFormat::MXFP4 => 39,
    }
}

/// The format that ggml numbers so, or else what a message should call it.
fn format_of(ggml: u32) -> Result<BlockFormat, String> {
    if let Some(format) = BlockFormat::ALL.into_iter().find(|f| ggml_type(*f) == ggml) {
        return Ok(format);
    }
    let name = match ggml {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        40 => "NVFP4",
        _ => return Err(format!("ggml type {ggml}")),
    };
    Err(format!("ggml type {ggml} ({name})"))
}
