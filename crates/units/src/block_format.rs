use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How the weights of one row are stored: as plain floats, or in blocks that share scales, laid out bit for bit as in
/// GGUF files.
///
/// A row is a whole number of blocks, and blocks lie one behind the other without gaps. The plain formats have blocks
/// of one element.
#[allow(missing_docs)]
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum BlockFormat {
    F32,
    F16,
    BF16,
    /// 32 elements of 4 bits, one scale.
    Q4_0,
    /// 32 elements of 4 bits, one scale and one minimum.
    Q4_1,
    /// 32 elements of 5 bits, one scale.
    Q5_0,
    /// 32 elements of 5 bits, one scale and one minimum.
    Q5_1,
    /// 32 elements of 8 bits, one scale.
    Q8_0,
    /// 256 elements of 2 bits; 16 groups with scale and minimum of 4 bits each.
    Q2_K,
    /// 256 elements of 3 bits; 16 groups with scales of 6 bits.
    Q3_K,
    /// 256 elements of 4 bits; 8 groups with scale and minimum of 6 bits each.
    Q4_K,
    /// 256 elements of 5 bits; 8 groups with scale and minimum of 6 bits each.
    Q5_K,
    /// 256 elements of 6 bits; 16 groups with scales of 8 bits.
    Q6_K,
    /// 32 elements of 4 bits that index a table of unevenly spaced values, one scale.
    IQ4_NL,
    /// 32 elements of 4-bit floats (E2M1), one scale that is a power of two.
    MXFP4,
}

/// A text that names no [`BlockFormat`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no weight format; expected one of F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, MXFP4"
)]
pub struct ParseBlockFormatError {
    text: String,
}

impl BlockFormat {
    /// Every format, in declaration order.
    pub const ALL: [BlockFormat; 15] = [
        BlockFormat::F32,
        BlockFormat::F16,
        BlockFormat::BF16,
        BlockFormat::Q4_0,
        BlockFormat::Q4_1,
        BlockFormat::Q5_0,
        BlockFormat::Q5_1,
        BlockFormat::Q8_0,
        BlockFormat::Q2_K,
        BlockFormat::Q3_K,
        BlockFormat::Q4_K,
        BlockFormat::Q5_K,
        BlockFormat::Q6_K,
        BlockFormat::IQ4_NL,
        BlockFormat::MXFP4,
    ];

    /// The name as GGUF spells it: `F16`, `Q4_K`, `MXFP4`, …
    pub const fn name(self) -> &'static str {
        match self {
            BlockFormat::F32 => "F32",
            BlockFormat::F16 => "F16",
            BlockFormat::BF16 => "BF16",
            BlockFormat::Q4_0 => "Q4_0",
            BlockFormat::Q4_1 => "Q4_1",
            BlockFormat::Q5_0 => "Q5_0",
            BlockFormat::Q5_1 => "Q5_1",
            BlockFormat::Q8_0 => "Q8_0",
            BlockFormat::Q2_K => "Q2_K",
            BlockFormat::Q3_K => "Q3_K",
            BlockFormat::Q4_K => "Q4_K",
            BlockFormat::Q5_K => "Q5_K",
            BlockFormat::Q6_K => "Q6_K",
            BlockFormat::IQ4_NL => "IQ4_NL",
            BlockFormat::MXFP4 => "MXFP4",
        }
    }

    /// The format with this [`name`](Self::name), if there is one.
    pub fn from_name(name: &str) -> Option<BlockFormat> {
        Self::ALL.into_iter().find(|f| f.name() == name)
    }

    /// Elements in one block.
    pub const fn block_len(self) -> usize {
        match self {
            BlockFormat::F32 | BlockFormat::F16 | BlockFormat::BF16 => 1,
            BlockFormat::Q4_0
            | BlockFormat::Q4_1
            | BlockFormat::Q5_0
            | BlockFormat::Q5_1
            | BlockFormat::Q8_0
            | BlockFormat::IQ4_NL
            | BlockFormat::MXFP4 => 32,
            BlockFormat::Q2_K
            | BlockFormat::Q3_K
            | BlockFormat::Q4_K
            | BlockFormat::Q5_K
            | BlockFormat::Q6_K => 256,
        }
    }

    /// Bytes that one block takes.
    pub const fn block_bytes(self) -> usize {
        match self {
            BlockFormat::F32 => 4,
            BlockFormat::F16 | BlockFormat::BF16 => 2,
            BlockFormat::Q4_0 | BlockFormat::IQ4_NL => 18,
            BlockFormat::Q4_1 => 20,
            BlockFormat::Q5_0 => 22,
            BlockFormat::Q5_1 => 24,
            BlockFormat::Q8_0 => 34,
            BlockFormat::Q2_K => 84,
            BlockFormat::Q3_K => 110,
            BlockFormat::Q4_K => 144,
            BlockFormat::Q5_K => 176,
            BlockFormat::Q6_K => 210,
            BlockFormat::MXFP4 => 17,
        }
    }

    /// Bytes of a row of `len` elements; `None` when `len` is not a whole number of blocks or the size overflows.
    pub const fn row_bytes(self, len: usize) -> Option<usize> {
        if !len.is_multiple_of(self.block_len()) {
            return None;
        }
        (len / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Mean bits per element, scales included.
    pub const fn bits_per_element(self) -> f64 {
        (self.block_bytes() * 8) as f64 / self.block_len() as f64
    }

    /// True for the formats that store plain floats, one by one.
    pub const fn is_plain(self) -> bool {
        self.block_len() == 1
    }
}

impl fmt::Display for BlockFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for BlockFormat {
    type Err = ParseBlockFormatError;

    /// Reads a name in any case (`q4_k`, `Q4_K`).
    fn from_str(text: &str) -> Result<BlockFormat, ParseBlockFormatError> {
        Self::ALL
            .into_iter()
            .find(|f| f.name().eq_ignore_ascii_case(text))
            .ok_or_else(|| ParseBlockFormatError { text: text.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for format in BlockFormat::ALL {
            assert_eq!(BlockFormat::from_name(format.name()), Some(format));
            assert_eq!(format.name().to_lowercase().parse(), Ok(format));
            assert_eq!(format.to_string(), format.name());
        }
        assert_eq!(BlockFormat::from_name("q4_k"), None);
        assert!("Q4_2".parse::<BlockFormat>().unwrap_err().to_string().contains("Q4_2"));
    }

    #[test]
    fn rows_are_whole_blocks() {
        assert_eq!(BlockFormat::Q4_K.row_bytes(4096), Some(16 * 144));
        assert_eq!(BlockFormat::Q4_K.row_bytes(4097), None);
        assert_eq!(BlockFormat::Q8_0.row_bytes(64), Some(68));
        assert_eq!(BlockFormat::F16.row_bytes(3), Some(6));
        assert_eq!(BlockFormat::Q6_K.row_bytes(0), Some(0));
        assert_eq!(BlockFormat::F32.row_bytes(usize::MAX), None);
        assert_eq!(BlockFormat::Q4_0.bits_per_element(), 4.5);
    }
}
