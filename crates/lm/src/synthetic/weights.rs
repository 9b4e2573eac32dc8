//! Random weights at the speed of the disk: rows are put together from a pool of encoded blocks.

use std::collections::HashMap;

use lightering_kernels::quantize_row;
use lightering_units::BlockFormat;

/// Blocks of a pool. A row picks each of its blocks at random, so rows differ, while only these are encoded.
const POOL_BLOCKS: usize = 2048;

/// SplitMix64 (Steele et al., 2014).
#[derive(Clone)]
pub(super) struct Random(u64);

impl Random {
    pub fn new(seed: u64, stream: u64) -> Random {
        let mut random = Random(seed ^ stream.wrapping_mul(0xd134_2543_de82_ef95));
        random.next();
        random
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Mean 0 and deviation 1, nearly normal: the sum of four uniform numbers.
    pub fn normal(&mut self) -> f32 {
        let bits = self.next();
        let sum: f32 = (0..4).map(|i| ((bits >> (16 * i)) & 0xffff) as f32 / 65_536.0).sum();
        (sum - 2.0) * 3f32.sqrt()
    }
}

/// Which sums of weights vanish.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Balance {
    None,
    /// Over the elements of each row.
    Row,
    /// Over the rows: each odd one is the negative of the one before.
    Rows,
}

/// Encoded blocks by format and deviation; each odd one is the negative of the one before.
#[derive(Default)]
pub(super) struct Pools(HashMap<(BlockFormat, u32), Vec<u8>>);

impl Pools {
    /// Gives the bytes of `rows` rows of `k` elements of this deviation, in pieces.
    pub fn rows<E>(
        &mut self,
        format: BlockFormat,
        deviation: f32,
        balance: Balance,
        [k, rows]: [usize; 2],
        random: &mut Random,
        give: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let len = if k.is_multiple_of(32) { format.block_len().max(32) } else { format.block_len() };
        let bytes = format.row_bytes(len).expect("a pool's block is a whole number of the format's");
        let pool = self.0.entry((format, deviation.to_bits())).or_insert_with(|| {
            let mut random = Random::new(u64::from(deviation.to_bits()), 1);
            let mut pool = vec![0; POOL_BLOCKS * bytes];
            let mut block = vec![0.0; len];
            for (i, out) in pool.chunks_exact_mut(bytes).enumerate() {
                if i % 2 == 0 {
                    block.fill_with(|| random.normal() * deviation);
                } else {
                    block.iter_mut().for_each(|x| *x = -*x);
                }
                quantize_row(format, &block, out);
            }
            pool
        });
        let blocks = k / len;
        let mut picks = vec![0; blocks];
        let mut buffer = Vec::with_capacity(PIECE_BYTES + blocks * bytes);
        for row in 0..rows {
            for i in 0..blocks {
                picks[i] = match balance {
                    Balance::Rows if row % 2 == 1 => picks[i] ^ 1,
                    Balance::Row if i % 2 == 1 => picks[i - 1] ^ 1,
                    _ => (random.next() >> 40) as usize % POOL_BLOCKS,
                };
                buffer.extend_from_slice(&pool[picks[i] * bytes..][..bytes]);
            }
            if buffer.len() >= PIECE_BYTES || row + 1 == rows {
                give(&buffer)?;
                buffer.clear();
            }
        }
        Ok(())
    }
}

/// What is written at once.
const PIECE_BYTES: usize = 1 << 20;
