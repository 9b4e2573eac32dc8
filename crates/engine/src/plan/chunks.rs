//! Large weights read in chunks of output channels, so that no single weight has to fit beside everything else.
//!
//! A layer whose weight is large becomes several instructions, each with the weights of some output channels, which
//! write side by side into the same result. An output channel is one chain of operations whichever chunk it is in, so
//! the bits stay the same; the operand is read once per chunk.

use std::ops::Range;
use std::sync::Arc;

use lightering_graph::StoredTensor;
use lightering_units::Bytes;

use super::Decision;
use crate::kernel::{Columns, Kernel, Packing, Scale};
use crate::program::{Instruction, Program, Storage, Weight, WeightOrigin, aligned};

/// Chunks hold a multiple of this many channels: the width of a panel, so that panels are the same as in the whole.
const CHANNELS: usize = 64;

/// Divides every stored weight of more than `largest` bytes whose kernel can compute some output channels at a time.
pub(super) fn split(program: &mut Program, largest: usize) -> Option<Decision> {
    let (mut layers, mut bytes) = (0, 0);
    let instructions = std::mem::take(&mut program.instructions);
    let readers = |w: usize| {
        let reads = |i: &Instruction| {
            i.inputs
                .iter()
                .flatten()
                .any(|o| matches!(program.tensors[o.tensor].storage, Storage::Weight(x) if x == w))
        };
        instructions.iter().filter(|i| reads(i)).count()
    };
    let shared: Vec<bool> = (0..program.weights.len()).map(|w| readers(w) != 1).collect();
    let mut out = Vec::with_capacity(instructions.len());
    for instruction in instructions {
        match chunks(program, &instruction, largest, &shared) {
            Some(parts) => {
                layers += 1;
                bytes +=
                    part_weight(program, &instruction).map_or(0, |(_, w)| program.weights[w].stored_bytes());
                emit(program, instruction, &parts, &mut out);
            }
            None => out.push(instruction),
        }
    }
    program.instructions = out;
    (layers > 0).then(|| Decision {
        technique: "chunks".to_owned(),
        what: format!("the weights of {layers} layers"),
        bytes: Bytes(bytes as u64),
        why: "come in groups of output channels, so that none has to be in memory as a whole".to_owned(),
    })
}

/// Which operand the weight is.
fn weight_operand(instruction: &Instruction) -> usize {
    if matches!(instruction.kernel, Kernel::ByteConv { .. }) { 3 } else { 1 }
}

/// The packed weight of an instruction: its tensor and itself.
fn part_weight(program: &Program, instruction: &Instruction) -> Option<(usize, usize)> {
    let tensor = instruction.inputs.get(weight_operand(instruction))?.as_ref()?.tensor;
    match program.tensors[tensor].storage {
        Storage::Weight(w) => Some((tensor, w)),
        _ => None,
    }
}

/// The ranges of channels, if the instruction can and should be divided.
fn chunks(
    program: &Program,
    instruction: &Instruction,
    largest: usize,
    shared: &[bool],
) -> Option<Vec<Range<usize>>> {
    let (_, w) = part_weight(program, instruction)?;
    let weight = &program.weights[w];
    let channels = match (&instruction.kernel, &weight.packing) {
        (Kernel::Conv { shape, .. }, Packing::Conv { .. }) if shape.groups == 1 => shape.out_c,
        (Kernel::ByteConv { shape, .. }, Packing::ByteConv { .. }) if shape.groups == 1 => shape.out_c,
        (Kernel::MatMul { n, .. }, Packing::Nk { .. }) => *n,
        (Kernel::BlockMatMul { n, .. }, Packing::Plain) => *n,
        _ => return None,
    };
    let stored = matches!(weight.origin, WeightOrigin::Stored(_));
    if !stored || shared[w] || weight.size <= largest || channels < 2 * CHANNELS {
        return None;
    }
    let parts = weight.size.div_ceil(largest.max(1));
    let step = channels.div_ceil(parts).next_multiple_of(CHANNELS);
    let ranges: Vec<_> = (0..channels).step_by(step).map(|c| c..channels.min(c + step)).collect();
    (ranges.len() > 1).then_some(ranges)
}

fn emit(
    program: &mut Program,
    instruction: Arc<Instruction>,
    parts: &[Range<usize>],
    out: &mut Vec<Arc<Instruction>>,
) {
    let Some((tensor, w)) = part_weight(program, &instruction) else { return out.push(instruction) };
    let whole = program.weights[w].clone();
    let info = (*program.tensors[tensor]).clone();
    let WeightOrigin::Stored(stored) = whole.origin else { return out.push(instruction) };
    let cut =
        |scale: &Option<Scale>, part: &Range<usize>| scale.as_ref().map(|s| Scale(s.0[part.clone()].into()));
    for (index, part) in parts.iter().enumerate() {
        let mut copy = (*instruction).clone();
        let n = part.len();
        let (packing, channels) = match (&mut copy.kernel, &whole.packing) {
            (Kernel::Conv { shape, columns, .. }, Packing::Conv { scale, .. }) => {
                *columns = Columns { first: part.start, total: shape.out_c };
                let channels = shape.out_c;
                shape.out_c = n;
                (Packing::Conv { shape: *shape, scale: cut(scale, part) }, channels)
            }
            (Kernel::MatMul { n: kernel_n, columns, .. }, Packing::Nk { k, scale, .. }) => {
                *columns = Columns { first: part.start, total: *kernel_n };
                let channels = *kernel_n;
                *kernel_n = n;
                (Packing::Nk { k: *k, n, scale: cut(scale, part) }, channels)
            }
            (Kernel::BlockMatMul { n: kernel_n, columns, .. }, Packing::Plain) => {
                *columns = Columns { first: part.start, total: *kernel_n };
                let channels = *kernel_n;
                *kernel_n = n;
                (Packing::Plain, channels)
            }
            (Kernel::ByteConv { shape, bytes, columns, .. }, Packing::ByteConv { signed, .. }) => {
                *columns = Columns { first: part.start, total: shape.out_c };
                let channels = shape.out_c;
                shape.out_c = n;
                let mut cut = (**bytes).clone();
                if cut.scale.len() > 1 {
                    cut.scale = cut.scale[part.clone()].to_vec();
                }
                cut.w_zeros = cut.w_zeros.map(|z| z[part.clone()].to_vec());
                *bytes = Arc::new(cut);
                (Packing::ByteConv { shape: *shape, signed: *signed }, channels)
            }
            _ => return out.push(instruction),
        };
        let row_bytes = stored.size.0 / channels as u64;
        let origin = WeightOrigin::Stored(StoredTensor {
            source: stored.source,
            offset: stored.offset + part.start as u64 * row_bytes,
            size: Bytes(n as u64 * row_bytes),
        });
        let size = aligned(packing.packed_bytes(n * row_bytes as usize));
        let name: Arc<str> = format!("{} channels {}..{}", whole.name, part.start, part.end).into();
        let chunk = Weight { name: name.clone(), origin, packing, size, spilled: false };
        // The first chunk takes the place of the whole.
        let index = if index == 0 {
            program.weights[w] = chunk;
            w
        } else {
            program.weights.push(chunk);
            program.weights.len() - 1
        };
        let mut chunk_info = info.clone();
        chunk_info.name = name;
        chunk_info.dims[0] = n;
        chunk_info.storage = Storage::Weight(index);
        program.tensors.push(Arc::new(chunk_info));
        copy.inputs[weight_operand(&instruction)] = Some(program.whole(program.tensors.len() - 1));
        let share = n as f64 / channels as f64;
        copy.cost.flops = copy.cost.flops * share;
        copy.cost.bytes_read = Bytes((copy.cost.bytes_read.0 as f64 * share) as u64);
        copy.cost.bytes_written = Bytes((copy.cost.bytes_written.0 as f64 * share) as u64);
        out.push(Arc::new(copy));
    }
}
