//! Weights as f32 that nobody has written down: decoded from the blocks of a file, or drawn, when they are read.

use std::io;
use std::sync::Arc;

use lightering_kernels::dequantize_row;
use lightering_tier::ByteSource;
use lightering_train::Random;
use lightering_units::{BlockFormat, Bytes};

/// Elements that share a generator of random numbers, so that any of them can be drawn without all before it.
const DRAWN_TOGETHER: u64 = 1024;

/// Where the elements of a piece come from.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Origin {
    /// Rows in the blocks of a file.
    Stored { offset: u64, format: BlockFormat, row_len: usize },
    /// Normal, of mean 0 and this deviation; the number makes each piece another one.
    Normal { deviation: f32, number: u64 },
    /// All the same.
    Constant(f32),
}

#[derive(Clone, Debug)]
struct Piece {
    /// Elements before it.
    first: u64,
    len: u64,
    origin: Origin,
}

/// All of them, one behind the other, as f32.
#[derive(Clone, Default)]
pub(super) struct Weights {
    file: Option<Arc<dyn ByteSource>>,
    seed: u64,
    pieces: Vec<Piece>,
}

impl Weights {
    pub fn new(file: Option<Arc<dyn ByteSource>>, seed: u64) -> Weights {
        Weights { file, seed, pieces: Vec::new() }
    }

    fn elements(&self) -> u64 {
        self.pieces.last().map_or(0, |p| p.first + p.len)
    }

    /// Adds a tensor; returns the byte at which it begins.
    pub fn add(&mut self, len: usize, origin: Origin) -> u64 {
        let first = self.elements();
        self.pieces.push(Piece { first, len: len as u64, origin });
        first * 4
    }

    fn fill(&self, piece: &Piece, from: u64, out: &mut [f32]) -> io::Result<()> {
        match piece.origin {
            Origin::Constant(value) => out.fill(value),
            Origin::Normal { deviation, number } => {
                let mut at = from;
                let mut out = out;
                while !out.is_empty() {
                    let (group, skipped) = (at / DRAWN_TOGETHER, at % DRAWN_TOGETHER);
                    let take = ((DRAWN_TOGETHER - skipped) as usize).min(out.len());
                    let (now, later) = out.split_at_mut(take);
                    let mut random = Random::derived(self.seed, &[number, group]);
                    for _ in 0..skipped {
                        random.normal();
                    }
                    now.iter_mut().for_each(|x| *x = random.normal() as f32 * deviation);
                    at += take as u64;
                    out = later;
                }
            }
            Origin::Stored { offset, format, row_len } => {
                let file =
                    self.file.as_ref().ok_or_else(|| io::Error::other("there is no file of weights"))?;
                let bytes =
                    format.row_bytes(row_len).ok_or_else(|| io::Error::other("rows of broken blocks"))?;
                let (mut stored, mut row) = (vec![0; bytes], vec![0.0; row_len]);
                let mut at = from;
                let mut out = out;
                while !out.is_empty() {
                    let (index, skipped) = (at / row_len as u64, (at % row_len as u64) as usize);
                    let take = (row_len - skipped).min(out.len());
                    let (now, later) = out.split_at_mut(take);
                    file.read_at(offset + index * bytes as u64, &mut stored)?;
                    if take == row_len {
                        dequantize_row(format, &stored, now);
                    } else {
                        dequantize_row(format, &stored, &mut row);
                        now.copy_from_slice(&row[skipped..skipped + take]);
                    }
                    at += take as u64;
                    out = later;
                }
            }
        }
        Ok(())
    }

    /// Elements from `first` on.
    fn values(&self, mut first: u64, mut out: &mut [f32]) -> io::Result<()> {
        while !out.is_empty() {
            let at = self.pieces.partition_point(|p| p.first + p.len <= first);
            let piece = self.pieces.get(at).ok_or(io::ErrorKind::UnexpectedEof)?;
            let take = usize::try_from(piece.first + piece.len - first).unwrap_or(usize::MAX).min(out.len());
            let (now, later) = out.split_at_mut(take);
            self.fill(piece, first - piece.first, now)?;
            first += take as u64;
            out = later;
        }
        Ok(())
    }
}

impl ByteSource for Weights {
    fn len_bytes(&self) -> Bytes {
        Bytes(self.elements() * 4)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        // A window of a few values, so that what is decoded is never held twice.
        const WINDOW: usize = 16 << 10;
        let (mut at, mut rest) = (offset, buffer);
        let mut values = vec![0f32; WINDOW.min(rest.len() / 4 + 2)];
        while !rest.is_empty() {
            let (element, skipped) = (at / 4, (at % 4) as usize);
            let take = rest.len().min(values.len() * 4 - skipped);
            let count = (skipped + take).div_ceil(4);
            self.values(element, &mut values[..count])?;
            let (now, later) = rest.split_at_mut(take);
            let bytes: &[u8] = bytemuck::cast_slice(&values[..count]);
            now.copy_from_slice(&bytes[skipped..skipped + take]);
            at += take as u64;
            rest = later;
        }
        Ok(())
    }

    fn name(&self) -> String {
        self.file.as_ref().map_or_else(|| "first weights".to_owned(), |f| f.name())
    }
}
