//! Which format each tensor of a converted file gets.

use std::fmt;
use std::str::FromStr;

use lightering_kernels::can_quantize;
use lightering_units::BlockFormat;

/// How the weights of a converted file are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recipe {
    /// All matrices in one format.
    Uniform(BlockFormat),
    /// Q4_K, and Q6_K where it costs the model most: the output matrix, and in half of the layers the values and the
    /// second matrix of the feed-forward network.
    Q4KM,
}

/// A text that names no [`Recipe`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no format to convert to; expected q4_k_m or one of {}", known())]
pub struct ParseRecipeError {
    text: String,
}

fn known() -> String {
    let names: Vec<&str> =
        BlockFormat::ALL.into_iter().filter(|f| can_quantize(*f)).map(BlockFormat::name).collect();
    names.join(", ")
}

impl FromStr for Recipe {
    type Err = ParseRecipeError;

    fn from_str(text: &str) -> Result<Recipe, ParseRecipeError> {
        let upper = text.to_ascii_uppercase();
        if upper == "Q4_K_M" {
            return Ok(Recipe::Q4KM);
        }
        match BlockFormat::from_name(&upper) {
            Some(format) if can_quantize(format) => Ok(Recipe::Uniform(format)),
            _ => Err(ParseRecipeError { text: text.to_owned() }),
        }
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Recipe::Uniform(format) => f.write_str(format.name()),
            Recipe::Q4KM => f.write_str("Q4_K_M"),
        }
    }
}

/// The next wider format whose blocks fit into rows of this length.
fn fitting(format: BlockFormat, row_len: u64) -> BlockFormat {
    use BlockFormat::{F16, Q2_K, Q3_K, Q4_0, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0};
    let fits = |format: BlockFormat| row_len.is_multiple_of(format.block_len() as u64);
    let mut format = format;
    while !fits(format) {
        format = match format {
            Q4_K => Q5_0,
            Q2_K | Q3_K => Q4_0,
            Q5_K => Q5_1,
            Q6_K => Q8_0,
            _ => F16,
        };
    }
    format
}

/// Half of the layers: the first and last eighth, and every third one between.
fn has_more_bits(layer: u64, layers: u64) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

impl Recipe {
    /// The number that `general.file_type` has for it.
    pub(super) fn file_type(self) -> u32 {
        match self {
            Recipe::Q4KM => 15,
            Recipe::Uniform(format) => match format {
                BlockFormat::F32 => 0,
                BlockFormat::F16 => 1,
                BlockFormat::Q4_0 => 2,
                BlockFormat::Q4_1 => 3,
                BlockFormat::Q8_0 => 7,
                BlockFormat::Q5_0 => 8,
                BlockFormat::Q5_1 => 9,
                BlockFormat::Q2_K => 10,
                BlockFormat::Q3_K => 12,
                BlockFormat::Q4_K => 14,
                BlockFormat::Q5_K => 16,
                BlockFormat::Q6_K => 18,
                BlockFormat::IQ4_NL => 25,
                BlockFormat::BF16 => 32,
                BlockFormat::MXFP4 => 38,
            },
        }
    }

    /// The format of a tensor, of which `source` is what it is stored in now. `tied` says that the embeddings are the
    /// output matrix as well.
    ///
    /// Vectors, routers and position tables are small and matter to every token: they stay as they are in a file with
    /// blocks, and become F32 when they come from a checkpoint (`keep` is false).
    pub(super) fn format_of(
        self,
        name: &str,
        dims: &[u64],
        source: BlockFormat,
        keep: bool,
        layers: u64,
        tied: bool,
    ) -> BlockFormat {
        let small = dims.len() < 2
            || name.contains("ffn_gate_inp")
            || name.contains("position_embd")
            || !name.ends_with(".weight");
        if small {
            return if keep { source } else { BlockFormat::F32 };
        }
        let format = match self {
            Recipe::Uniform(format) => format,
            Recipe::Q4KM => {
                let mut parts = name.split('.');
                let layer = match (parts.next(), parts.next().map(str::parse::<u64>)) {
                    (Some("blk"), Some(Ok(layer))) => Some((layer, parts.next().unwrap_or_default())),
                    _ => None,
                };
                let wide = match layer {
                    None => name == "output.weight" || tied && name == "token_embd.weight",
                    Some((layer, part)) => {
                        let matters = part == "attn_v" || part.starts_with("ffn_down");
                        matters && layer < layers && has_more_bits(layer, layers)
                    }
                };
                if wide { BlockFormat::Q6_K } else { BlockFormat::Q4_K }
            }
        };
        fitting(format, dims[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipes_are_read_in_any_case_and_others_are_refused_with_the_list() {
        assert_eq!("q4_k_m".parse(), Ok(Recipe::Q4KM));
        assert_eq!("q8_0".parse(), Ok(Recipe::Uniform(BlockFormat::Q8_0)));
        assert_eq!("F16".parse(), Ok(Recipe::Uniform(BlockFormat::F16)));
        for bad in ["", "q4", "MXFP4", "Q4_K_S"] {
            let error = bad.parse::<Recipe>().unwrap_err().to_string();
            assert!(
                error.contains("q4_k_m") && error.contains("Q8_0") && !error.contains("MXFP4,"),
                "{error}"
            );
        }
    }

    #[test]
    fn what_matters_most_gets_more_bits_and_short_rows_a_format_that_fits() {
        let of = |recipe: Recipe, name: &str, dims: &[u64]| {
            recipe.format_of(name, dims, BlockFormat::F16, false, 32, true)
        };
        let formats = |recipe, row| {
            ["blk.0.attn_v.weight", "blk.4.attn_v.weight", "blk.5.ffn_down.weight", "blk.0.attn_q.weight"]
                .map(|name| of(recipe, name, &[row, 8]))
        };
        use BlockFormat::*;
        assert_eq!(formats(Recipe::Q4KM, 256), [Q6_K, Q4_K, Q4_K, Q4_K]);
        assert_eq!(of(Recipe::Q4KM, "blk.6.ffn_down.weight", &[256, 8]), Q6_K);
        assert_eq!(formats(Recipe::Q4KM, 96), [Q8_0, Q5_0, Q5_0, Q5_0]);
        assert_eq!(formats(Recipe::Uniform(Q4_0), 40), [F16; 4]);
        assert_eq!(formats(Recipe::Uniform(Q2_K), 96), [Q4_0; 4]);
        assert_eq!(formats(Recipe::Uniform(Q5_K), 96), [Q5_1; 4]);
        assert_eq!(of(Recipe::Q4KM, "token_embd.weight", &[256, 8]), Q6_K);
        assert_eq!(of(Recipe::Q4KM, "blk.0.ffn_gate_inp.weight", &[256, 8]), F32);
        assert_eq!(of(Recipe::Uniform(Q8_0), "blk.0.attn_norm.weight", &[256]), F32);
    }
}
