//! The data of one tensor: rows are read, converted and handed on, a few at a time.

use std::sync::Arc;

use lightering_formats::gguf::GgufDataWriter;
use lightering_kernels::{dequantize_row, quantize_row};
use lightering_tier::ByteSource;
use lightering_units::BlockFormat;

use super::files::io;
use crate::{Error, Result};

/// In which order the rows of a part are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// As they lie.
    AsIs,
    /// Within each head of this many rows, those of the two halves by turns.
    Paired(u64),
    /// A row is a column of what is stored.
    Transposed,
}

/// Rows that lie together in one source.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub source: usize,
    pub offset: u64,
    pub rows: u64,
    pub order: Order,
}

/// Where the values of a tensor come from.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    /// Parts one below the other.
    Stored(Vec<Part>),
    /// Values that were computed.
    Computed(Vec<f32>),
}

/// A tensor of the converted file.
#[derive(Clone, Debug)]
pub(super) struct Output {
    pub name: String,
    pub dims: Vec<u64>,
    /// Elements of a row as it is read; 1 for a vector whose elements change places.
    pub row_len: u64,
    /// What it is stored in now, and what it is going to be stored in.
    pub from: BlockFormat,
    pub to: BlockFormat,
    /// Added to each element.
    pub shift: f32,
    pub origin: Origin,
}

impl Output {
    pub fn elements(&self) -> u64 {
        self.dims.iter().product()
    }

    /// The bytes of the tensor in a format; the sizes were checked when it was planned.
    pub fn bytes_in(&self, format: BlockFormat) -> u64 {
        let row = usize::try_from(self.row_len).ok().and_then(|n| format.row_bytes(n)).unwrap_or(0) as u64;
        row * (self.elements() / self.row_len.max(1))
    }

    fn is_copied(&self) -> bool {
        self.from == self.to && self.shift == 0.0
    }

    /// Bytes that each row takes while it is under way.
    pub fn row_memory(&self) -> u64 {
        let row = |format: BlockFormat| format.row_bytes(self.row_len as usize).unwrap_or(0) as u64;
        match self.is_copied() {
            true => row(self.from),
            // Transposed rows are gathered from stretches of at most 4 bytes an element.
            false => row(self.from) + row(self.to) + 8 * self.row_len + 4 + size_of::<Sums>() as u64,
        }
    }
}

/// What was lost: sums over elements.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sums {
    pub squared_error: f64,
    pub squares: f64,
    bad: bool,
}

/// Most bytes under way at a time, however much memory there is: larger pieces are no faster.
const PIECE_BYTES_MAX: u64 = 16 << 20;

/// Converts one tensor after the other.
pub(super) struct Rows<'a> {
    pub sources: &'a [Arc<dyn ByteSource>],
    pub memory: u64,
    pub threads: usize,
}

impl Rows<'_> {
    /// Reads rows `first..first+n` of a part.
    fn read(&self, output: &Output, part: &Part, first: u64, n: u64, out: &mut [u8]) -> Result<()> {
        let source = &*self.sources[part.source];
        let row = out.len() / n as usize;
        let read = |offset: u64, out: &mut [u8]| {
            source.read_at(offset, out).map_err(|e| io(format!("{}: {}", source.name(), output.name), e))
        };
        match part.order {
            Order::AsIs => read(part.offset + first * row as u64, out),
            Order::Paired(head) => {
                for (i, out) in out.chunks_exact_mut(row).enumerate() {
                    let at = first + i as u64;
                    let within = at % head;
                    let from = at - within + within % 2 * (head / 2) + within / 2;
                    read(part.offset + from * row as u64, out)?;
                }
                Ok(())
            }
            Order::Transposed => {
                // What is stored has rows of `part.rows` elements, of which a stretch is read each time.
                let element = row / output.row_len as usize;
                let mut stretch = vec![0; n as usize * element];
                for k in 0..output.row_len {
                    read(part.offset + (k * part.rows + first) * element as u64, &mut stretch)?;
                    for (i, value) in stretch.chunks_exact(element).enumerate() {
                        let at = i * row + k as usize * element;
                        out[at..at + element].copy_from_slice(value);
                    }
                }
                Ok(())
            }
        }
    }

    /// Converts a tensor; `told` hears of the bytes that were written.
    pub fn convert<W: std::io::Write>(
        &self,
        output: &Output,
        data: &mut GgufDataWriter<W>,
        told: &mut dyn FnMut(u64),
    ) -> Result<Sums> {
        let parts = match &output.origin {
            Origin::Computed(values) => {
                let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                data.write(&bytes)?;
                told(bytes.len() as u64);
                let squares = values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
                return Ok(Sums { squares, ..Sums::default() });
            }
            Origin::Stored(parts) => parts,
        };
        let row_len = output.row_len as usize;
        let row_bytes = |format: BlockFormat| format.row_bytes(row_len).unwrap_or(0);
        let (from, to) = (row_bytes(output.from), row_bytes(output.to));
        let most = (self.memory.min(PIECE_BYTES_MAX) / output.row_memory().max(1)).max(1);
        let mut sums = Sums::default();
        let (mut stored, mut values, mut again, mut written) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut of_rows: Vec<Sums> = Vec::new();
        for part in parts {
            let mut first = 0;
            while first < part.rows {
                let n = most.min(part.rows - first);
                let count = n as usize;
                stored.resize(count * from, 0u8);
                self.read(output, part, first, n, &mut stored)?;
                if output.is_copied() {
                    data.write(&stored)?;
                    told(stored.len() as u64);
                    first += n;
                    continue;
                }
                values.resize(count * row_len, 0.0f32);
                again.resize(count * row_len, 0.0f32);
                written.resize(count * to, 0u8);
                of_rows.clear();
                of_rows.resize(count, Sums::default());
                let share = count.div_ceil(self.threads.max(1));
                let pieces = stored
                    .chunks(share * from)
                    .zip(values.chunks_mut(share * row_len))
                    .zip(again.chunks_mut(share * row_len))
                    .zip(written.chunks_mut(share * to))
                    .zip(of_rows.chunks_mut(share));
                std::thread::scope(|scope| {
                    for ((((stored, values), again), written), sums) in pieces {
                        let work = move || {
                            let rows = stored
                                .chunks_exact(from)
                                .zip(values.chunks_exact_mut(row_len))
                                .zip(again.chunks_exact_mut(row_len))
                                .zip(written.chunks_exact_mut(to))
                                .zip(sums);
                            for ((((stored, values), again), written), sums) in rows {
                                *sums = convert_row(output, stored, values, again, written);
                            }
                        };
                        if share >= count {
                            work();
                        } else {
                            scope.spawn(work);
                        }
                    }
                });
                // In the order of the rows, so that the sums are the same on any number of threads.
                for (row, of_row) in of_rows.iter().enumerate() {
                    if of_row.bad {
                        return Err(Error::invalid(
                            format!("tensor {:?}, row {}", output.name, first + row as u64),
                            format!("values that are not finite, or too large for {}", output.to),
                            "finite weights",
                        ));
                    }
                    sums.squared_error += of_row.squared_error;
                    sums.squares += of_row.squares;
                }
                data.write(&written)?;
                told(written.len() as u64);
                first += n;
            }
        }
        Ok(sums)
    }
}

fn convert_row(
    output: &Output,
    stored: &[u8],
    values: &mut [f32],
    again: &mut [f32],
    written: &mut [u8],
) -> Sums {
    dequantize_row(output.from, stored, values);
    if output.shift != 0.0 {
        values.iter_mut().for_each(|x| *x += output.shift);
    }
    let mut sums = Sums::default();
    if values.iter().any(|x| !x.is_finite()) {
        return Sums { bad: true, ..sums };
    }
    quantize_row(output.to, values, written);
    dequantize_row(output.to, written, again);
    for (value, again) in values.iter().zip(again) {
        let difference = f64::from(*value) - f64::from(*again);
        sums.squared_error += difference * difference;
        sums.squares += f64::from(*value) * f64::from(*value);
    }
    sums.bad = !sums.squared_error.is_finite();
    sums
}
