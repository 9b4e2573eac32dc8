//! Layers split into stripes of rows, so that only some rows of a large intermediate result exist at a time.
//!
//! A *segment* is a run of consecutive instructions whose intermediate results nobody else reads. It is computed
//! stripe by stripe: for some rows of the last result, the rows that every earlier instruction must yield follow
//! from the shape of its window (a 3×3 convolution needs one row more on each side), and only those are computed,
//! into buffers of that size. Rows at the border of two stripes are computed twice; that is the price, and the
//! kernels yield the same bits for a row whichever stripe it is in.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use lightering_graph::infer::window::resolve_window;
use lightering_graph::{ConvAttributes, Layout, Op, Padding, PoolAttributes};
use lightering_kernels::{ConvShape, rows_under_window};
use lightering_units::Bytes;

use super::assign::{Owner, STAGING_BYTES_MIN, activation_requests};
use super::offsets::live_profile;
use super::{BOOKKEEPING_PER_ITEM, Decision};
use crate::kernel::{Broadcast, ChainStep, Kernel};
use crate::program::{
    Buffer, BufferKind, Instruction, Operand, Program, Storage, Stripe, TensorInfo, aligned,
};

/// A run of instructions of the unsplit program, computed in this many stripes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Split {
    pub segment: Range<usize>,
    pub stripes: usize,
}

/// Places that are tried in one round, worst first.
const PEAKS_MAX: usize = 6;
/// How far a segment may reach before and after the peak.
const REACH_MAX: usize = 10;
/// What one instruction of a stripe brings: itself, its result, and a buffer.
const ITEMS_PER_STRIPE: usize = 3;
/// Numbers of stripes that are tried.
const STRIPE_COUNTS: [usize; 6] = [2, 3, 4, 8, 14, 28];

/// The splitting of a program so far.
#[derive(Clone, Debug)]
pub(crate) struct Splitter {
    original: Program,
    lifetimes: Lifetimes,
    splits: Vec<Split>,
}

/// When the unsplit program first and last touches each buffer and each weight, and what it holds at each instruction
/// at least: activations, scratch, and the weights used there.
#[derive(Clone, Debug)]
struct Lifetimes {
    buffers: Vec<Option<(usize, usize)>>,
    weights: Vec<Option<(usize, usize)>>,
    live: Vec<usize>,
}

impl Lifetimes {
    fn of(program: &Program) -> Lifetimes {
        let mut buffers = vec![None; program.buffers.len()];
        let requests = activation_requests(program);
        for (owner, request) in &requests {
            if let Owner::Buffer(b) = owner {
                buffers[*b] = Some((*request.live.start(), *request.live.end()));
            }
        }
        let mut live = live_profile(&requests.into_iter().map(|(_, r)| r).collect::<Vec<_>>());
        live.resize(program.instructions.len(), 0);
        let mut weights: Vec<Option<(usize, usize)>> = vec![None; program.weights.len()];
        for (i, instruction) in program.instructions.iter().enumerate() {
            for w in program.weights_of(instruction) {
                let (first, _) = weights[w].unwrap_or((i, i));
                weights[w] = Some((first, i));
            }
        }
        for (weight, used) in program.weights.iter().zip(&weights) {
            if let Some((first, last)) = *used {
                live[first..=last].iter_mut().for_each(|l| *l += weight.size);
            }
        }
        Lifetimes { buffers, weights, live }
    }
}

impl Splitter {
    pub fn new(program: &Program) -> Splitter {
        let mut original = program.clone();
        for (i, instruction) in original.instructions.iter_mut().enumerate() {
            Arc::make_mut(instruction).origin = i;
        }
        let lifetimes = Lifetimes::of(&original);
        Splitter { original, lifetimes, splits: Vec::new() }
    }

    /// Splits around the instruction that exceeds `limit` most, in the way that helps most for the least work done
    /// twice; around the next worst where that one cannot be helped. `None` when nothing helps.
    pub fn improve(&mut self, limit: usize) -> Option<Program> {
        let before = self.score(&self.splits, limit)?;
        let mut worst: Vec<(usize, usize)> = before.excess.iter().map(|(&at, &bytes)| (bytes, at)).collect();
        worst.sort_unstable_by(|a, b| b.cmp(a));
        worst.iter().take(PEAKS_MAX).find_map(|&(_, at)| self.split_at(at, before.rank(), limit))
    }

    fn split_at(&mut self, at: usize, before: (usize, f64), limit: usize) -> Option<Program> {
        let mut best: Option<((usize, f64), Vec<Split>)> = None;
        for start in at.saturating_sub(REACH_MAX)..=at {
            for end in at + 1..=(at + 1 + REACH_MAX).min(self.original.instructions.len()) {
                if end - start < 2 {
                    continue;
                }
                let segment = start..end;
                let Some(kept) = self.without_inner(&segment) else { continue };
                let Some(shape) = Segment::of(&self.original, &self.lifetimes, segment.clone()) else {
                    continue;
                };
                let Some(others) = self.score(&kept, limit) else { continue };
                for stripes in STRIPE_COUNTS {
                    if stripes > shape.rows {
                        break;
                    }
                    let split = Split { segment: segment.clone(), stripes };
                    let Some(rank) = others.with(&self.original, &self.lifetimes, &split, &shape, limit)
                    else {
                        continue;
                    };
                    if rank.rank() < before && best.as_ref().is_none_or(|(b, _)| rank.rank() < *b) {
                        let mut splits = kept.clone();
                        splits.push(split);
                        best = Some((rank.rank(), splits));
                    }
                }
            }
        }
        let splits = best?.1;
        let program = apply(&self.original, &self.lifetimes, &splits)?;
        self.splits = splits;
        Some(program)
    }

    /// How far the program with these splits is from fitting, told without making that program.
    fn score(&self, splits: &[Split], limit: usize) -> Option<Score> {
        let room = Score::room(limit);
        let mut score = Score::default();
        for (i, &live) in self.lifetimes.live.iter().enumerate() {
            if live > room {
                score.excess.insert(i, live - room);
            }
            score.work += self.original.instructions[i].cost.flops.0;
        }
        for split in splits {
            let segment = Segment::of(&self.original, &self.lifetimes, split.segment.clone())?;
            score = score.with(&self.original, &self.lifetimes, split, &segment, limit)?;
        }
        Some(score)
    }

    /// The splits that lie outside `segment`; `None` when one overlaps it in part.
    fn without_inner(&self, segment: &Range<usize>) -> Option<Vec<Split>> {
        let mut kept = Vec::new();
        for s in &self.splits {
            let apart = s.segment.end <= segment.start || segment.end <= s.segment.start;
            let inside = segment.start <= s.segment.start && s.segment.end <= segment.end;
            if apart {
                kept.push(s.clone());
            } else if !inside {
                return None;
            }
        }
        Some(kept)
    }

    /// The decisions in words.
    pub fn decisions(&self, program: &Program) -> Vec<Decision> {
        let before: f64 = self.original.instructions.iter().map(|i| i.cost.flops.0).sum();
        let after: f64 = program.instructions.iter().map(|i| i.cost.flops.0).sum();
        let mut splits = self.splits.clone();
        splits.sort_by_key(|s| s.segment.start);
        splits
            .iter()
            .map(|s| {
                let name = |i: usize| self.original.instructions[i].node.name.as_str();
                let bytes: usize = self.original.instructions[s.segment.start..s.segment.end - 1]
                    .iter()
                    .flat_map(|i| i.outputs.iter().flatten())
                    .map(|o| self.original.tensors[o.tensor].size_bytes())
                    .sum();
                Decision {
                    technique: "stripes".to_owned(),
                    what: format!("{} to {} in {} stripes", name(s.segment.start), name(s.segment.end - 1), s.stripes),
                    bytes: Bytes(bytes as u64),
                    why: format!(
                        "the results between them never exist as a whole; work done twice adds {:.1} % to the model",
                        (after / before.max(1.0) - 1.0) * 100.0
                    ),
                }
            })
            .collect()
    }
}

/// How far a program is from fitting.
#[derive(Clone, Debug, Default)]
struct Score {
    /// Bytes above the limit, for every instruction of the unsplit program that exceeds it.
    excess: HashMap<usize, usize>,
    /// Instructions that the splits add.
    added: usize,
    work: f64,
}

impl Score {
    /// Smaller is better: the sum of what is above the limit and of what stripes take to keep in mind, then the work.
    /// The sum, not the largest, so that mending one place counts even while another is worse.
    fn rank(&self) -> (usize, f64) {
        let bookkeeping = self.added * ITEMS_PER_STRIPE * BOOKKEEPING_PER_ITEM;
        (self.excess.values().sum::<usize>() + bookkeeping, self.work)
    }

    /// The limit less a little room for fragmentation and for the staging area.
    fn room(limit: usize) -> usize {
        limit.saturating_sub(limit / 32 + STAGING_BYTES_MIN)
    }

    /// The score once a segment is computed in stripes. `None` when it cannot be.
    fn with(
        &self,
        program: &Program,
        lifetimes: &Lifetimes,
        split: &Split,
        segment: &Segment,
        limit: usize,
    ) -> Option<Score> {
        let room = Score::room(limit);
        let mut score = self.clone();
        let range = split.segment.clone();
        for i in range.clone() {
            score.excess.remove(&i);
            score.work -= program.instructions[i].cost.flops.0;
        }
        score.added += range.len() * (split.stripes - 1);
        let outer = Outer::of(program, lifetimes, &range, segment);
        let instructions = &program.instructions[range.clone()];
        for stripe in 0..split.stripes {
            let Some(rows) = segment.rows_of_stripe(instructions, stripe, split.stripes) else { continue };
            if rows.iter().any(Range::is_empty) {
                return None;
            }
            let inner = segment.inner_live(program, instructions, &rows)?;
            for (i, instruction) in instructions.iter().enumerate() {
                let live = outer.live(stripe, split.stripes, i) + inner[i] + instruction.workspace;
                if live > room {
                    let most = score.excess.entry(range.start + i).or_default();
                    *most = (*most).max(live - room);
                }
                let share = rows[i].len() as f64 / segment.parts[i].rows as f64;
                score.work += instruction.cost.flops.0 * share;
            }
        }
        Some(score)
    }
}

/// Buffers and weights that a segment touches or that live across it, without those between its instructions.
struct Outer {
    /// Size; position in the segment of the first touch, `None` when it is alive before; of the last, `None` when it
    /// stays alive.
    entries: Vec<(usize, Option<usize>, Option<usize>)>,
}

impl Outer {
    fn of(program: &Program, lifetimes: &Lifetimes, range: &Range<usize>, segment: &Segment) -> Outer {
        let entry = |size: usize, first: usize, last: usize| {
            (first < range.end && last >= range.start && size > 0).then(|| {
                let first = (first >= range.start).then(|| first - range.start);
                (size, first, (last < range.end).then(|| last - range.start))
            })
        };
        let inner: Vec<usize> = segment
            .inner
            .iter()
            .filter_map(|&t| match program.tensors[t].storage {
                Storage::Buffer { buffer, .. } => Some(buffer),
                _ => None,
            })
            .collect();
        let buffers = lifetimes.buffers.iter().enumerate().filter_map(|(b, used)| {
            let (first, last) = (*used)?;
            if inner.contains(&b) { None } else { entry(program.buffers[b].size, first, last) }
        });
        let weights = lifetimes.weights.iter().enumerate().filter_map(|(w, used)| {
            let (first, last) = (*used)?;
            entry(program.weights[w].size, first, last)
        });
        Outer { entries: buffers.chain(weights).collect() }
    }

    /// Bytes alive while the instruction at `position` computes stripe `stripe` of `stripes`.
    fn live(&self, stripe: usize, stripes: usize, position: usize) -> usize {
        let alive = |&&(_, first, last): &&(usize, Option<usize>, Option<usize>)| {
            first.is_none_or(|first| stripe > 0 || position >= first)
                && last.is_none_or(|last| stripe + 1 < stripes || position <= last)
        };
        self.entries.iter().filter(alive).map(|&(size, ..)| size).sum()
    }
}

/// How the rows of an operand follow from the rows of the result.
#[derive(Clone, Copy, Debug)]
enum Rows {
    /// The operand is needed as a whole.
    Whole,
    /// The same rows.
    Same,
    /// The rows under a window.
    Window { kernel: usize, stride: usize, dilation: usize, pad: usize, rows: usize },
}

impl Rows {
    fn of(self, result: &Range<usize>) -> Option<Range<usize>> {
        match self {
            Rows::Whole => None,
            Rows::Same => Some(result.clone()),
            Rows::Window { kernel, stride, dilation, pad, rows } => {
                Some(rows_under_window(result.clone(), rows, kernel, stride, dilation, pad))
            }
        }
    }
}

/// An instruction that can be computed row by row.
struct Striped {
    /// Rows of the result.
    rows: usize,
    /// Per operand.
    operands: Vec<Rows>,
}

fn conv_rows(s: &ConvShape) -> Rows {
    window_rows(s.kernel, s.stride, s.dilation, s.pads, s.in_h)
}

fn window_rows(
    kernel: [usize; 2],
    stride: [usize; 2],
    dilation: [usize; 2],
    pads: [usize; 4],
    rows: usize,
) -> Rows {
    Rows::Window { kernel: kernel[0], stride: stride[0], dilation: dilation[0], pad: pads[0], rows }
}

/// How an instruction splits by rows; `None` when it does not.
fn striped(instruction: &Instruction) -> Option<Striped> {
    if instruction.outputs.len() > 1 && instruction.outputs[1..].iter().any(Option::is_some) {
        return None;
    }
    let result = instruction.outputs.first()?.as_ref()?;
    let mut operands = vec![Rows::Whole; instruction.inputs.len()];
    let rows = match &instruction.kernel {
        Kernel::Conv { columns, shape, .. } if columns.total != shape.out_c => return None,
        Kernel::ByteConv { columns, shape, .. } if columns.total != shape.out_c => return None,
        Kernel::MatMul { columns, n, .. } if columns.total != *n => return None,
        Kernel::Conv { shape, batch: 1, planes, .. } => {
            if !planes {
                operands[0] = conv_rows(shape);
            }
            if operands.len() > 3 {
                operands[3] = Rows::Same;
            }
            shape.out_h
        }
        Kernel::Pool { shape, batch: 1, .. } => {
            operands[0] = window_rows(shape.kernel, shape.stride, shape.dilation, shape.pads, shape.in_h);
            shape.out_h
        }
        Kernel::MatMul { rows, .. } => {
            operands[0] = Rows::Same;
            if operands.len() > 3 {
                operands[3] = Rows::Same;
            }
            *rows
        }
        Kernel::Activate { .. } => {
            operands[0] = Rows::Same;
            row_count(&result.dims)?
        }
        Kernel::ByteConv { shape, batch: 1, .. } => {
            operands[0] = conv_rows(shape);
            shape.out_h
        }
        Kernel::ByteMatMul { rows, .. } => {
            operands[0] = Rows::Same;
            *rows
        }
        Kernel::LayerNorm { rows, .. } | Kernel::RmsNorm { rows, .. } | Kernel::Softmax { rows, .. } => {
            operands[0] = Rows::Same;
            *rows
        }
        Kernel::Chain { steps, n, .. } => {
            operands[0] = Rows::Same;
            for step in steps {
                if let ChainStep::Binary(_, operand, way) = step {
                    match way {
                        Broadcast::Full => operands[*operand] = Rows::Same,
                        Broadcast::Scalar | Broadcast::Column => {}
                        Broadcast::Row | Broadcast::Shared(_) => return None,
                    }
                }
            }
            let rows = row_count(&result.dims)?;
            // A stripe must hold whole rows of the chain, or broadcast operands would not line up.
            let broadcasts = steps.iter().any(|s| matches!(s, ChainStep::Binary(_, _, Broadcast::Column)));
            let row = result.dims.iter().product::<usize>() / rows;
            if broadcasts && row % n != 0 {
                return None;
            }
            rows
        }
        Kernel::Generic => match &instruction.node.op {
            Op::Unary(_)
            | Op::Binary(_)
            | Op::Elementwise(_)
            | Op::Clip
            | Op::QLinearUnary(_)
            | Op::QLinearBinary { .. } => {
                for (rows, operand) in operands.iter_mut().zip(&instruction.inputs) {
                    if operand.as_ref().is_some_and(|o| o.dims == result.dims) {
                        *rows = Rows::Same;
                    }
                }
                // An operand that broadcasts along the rows stays whole; one that varies along them, but not along
                // others, has rows of its own which the general kernel could not line up.
                let axis = result.dims.iter().position(|&d| d > 1)?;
                let ragged = instruction.inputs.iter().flatten().any(|o| {
                    o.dims != result.dims && {
                        let lead = result.dims.len() as isize - o.dims.len() as isize;
                        let at = axis as isize - lead;
                        at >= 0 && o.dims[at as usize] > 1
                    }
                });
                if ragged {
                    return None;
                }
                row_count(&result.dims)?
            }
            Op::QLinearConv(ConvAttributes { layout: Layout::ChannelsLast, .. })
            | Op::QLinearPool(PoolAttributes { layout: Layout::ChannelsLast, .. }) => {
                operands[0] = generic_window(instruction)?.0;
                result.dims[1]
            }
            _ => return None,
        },
        _ => return None,
    };
    (rows > 1).then_some(Striped { rows, operands })
}

/// The rows of a tensor: its first dimension that is not 1.
fn row_count(dims: &[usize]) -> Option<usize> {
    dims.iter().copied().find(|&d| d > 1)
}

/// The window of an operator that goes through the general kernel: how its rows follow, and all its padding (top, left,
/// bottom, right).
fn generic_window(instruction: &Instruction) -> Option<(Rows, [i64; 4])> {
    let x = &instruction.inputs.first()?.as_ref()?.dims;
    if x.len() != 4 || x[0] != 1 {
        return None;
    }
    let (kernel, strides, dilations, padding, ceil_mode) = match &instruction.node.op {
        Op::QLinearConv(a) => {
            let w = &instruction.inputs.get(3)?.as_ref()?.dims;
            (w[2..].to_vec(), &a.strides, &a.dilations, &a.padding, false)
        }
        Op::QLinearPool(a) => (a.kernel.clone(), &a.strides, &a.dilations, &a.padding, a.ceil_mode),
        _ => return None,
    };
    let pair = |v: &[usize]| if v.is_empty() { vec![1; 2] } else { v.to_vec() };
    let (strides, dilations) = (pair(strides), pair(dilations));
    let window = resolve_window(&x[1..3], &kernel, &strides, &dilations, padding, ceil_mode).ok()?;
    let pads: [i64; 4] = window.pads.try_into().ok()?;
    let rows = Rows::Window {
        kernel: kernel[0],
        stride: strides[0],
        dilation: dilations[0],
        pad: usize::try_from(pads[0]).ok()?,
        rows: x[1],
    };
    Some((rows, pads))
}

/// The operator of one stripe: the same window with the padding that is left at the top and bottom.
fn stripe_op(instruction: &Instruction, rows: &Range<usize>, given: &Range<usize>) -> Option<Op> {
    let (Rows::Window { kernel, stride, dilation, pad, .. }, pads) = generic_window(instruction)? else {
        return None;
    };
    let top = (given.start + pad) as i64 - (rows.start * stride) as i64;
    let need = (rows.len() - 1) * stride + (kernel - 1) * dilation + 1;
    let bottom = need as i64 - top - given.len() as i64;
    let mut op = instruction.node.op.clone();
    let padding = match &mut op {
        Op::QLinearConv(a) => &mut a.padding,
        // Rounding up may let a window pass the end, which explicit padding would not show.
        Op::QLinearPool(a) if !a.ceil_mode => &mut a.padding,
        _ => return None,
    };
    *padding = Padding::Explicit(vec![top, pads[1], bottom, pads[3]]);
    Some(op)
}

/// A segment that can be computed in stripes.
struct Segment {
    /// Rows of the last result.
    rows: usize,
    /// Per instruction.
    parts: Vec<Striped>,
    /// Tensors that are made and read inside only.
    inner: Vec<usize>,
}

impl Segment {
    fn of(program: &Program, lifetimes: &Lifetimes, range: Range<usize>) -> Option<Segment> {
        let instructions = &program.instructions[range.clone()];
        let parts: Vec<Striped> = instructions.iter().map(|i| striped(i)).collect::<Option<_>>()?;
        let last = instructions.last()?;
        let result = last.outputs.first()?.as_ref()?.tensor;
        let inner: Vec<usize> = instructions[..instructions.len() - 1]
            .iter()
            .map(|i| i.outputs.first().and_then(Option::as_ref).map(|o| o.tensor))
            .collect::<Option<_>>()?;
        let buffer = |t: usize| match program.tensors[t].storage {
            Storage::Buffer { buffer, .. } => Some(buffer),
            _ => None,
        };
        let result_buffer = buffer(result)?;
        for &t in &inner {
            // The whole of a buffer of its own, which nobody outside touches.
            let b = buffer(t)?;
            let Storage::Buffer { offset: 0, .. } = program.tensors[t].storage else { return None };
            let exact = program.buffers[b].kind == BufferKind::Activation
                && program.buffers[b].size == aligned(program.tensors[t].size_bytes());
            let outside =
                lifetimes.buffers[b].is_some_and(|(first, last)| first < range.start || last >= range.end);
            let views = program.tensors.iter().enumerate().any(|(other, info)| {
                !inner.contains(&other)
                    && matches!(info.storage, Storage::Buffer { buffer, .. } if buffer == b)
                    && program.instructions[range.clone()]
                        .iter()
                        .any(|i| i.inputs.iter().chain(&i.outputs).flatten().any(|o| o.tensor == other))
            });
            if !exact || outside || views || b == result_buffer {
                return None;
            }
        }
        // Every instruction but the last feeds the segment, and the rows of producer and consumer must agree.
        let rows_of: HashMap<usize, usize> =
            inner.iter().copied().zip(parts.iter().map(|p| p.rows)).collect();
        for (instruction, part) in instructions.iter().zip(&parts) {
            if instruction.in_place > 0 {
                let source = instruction.inputs.first()?.as_ref()?.tensor;
                if !inner.contains(&source) {
                    return None;
                }
            }
            for (operand, rows) in instruction.inputs.iter().zip(&part.operands) {
                let Some(operand) = operand else { continue };
                let count = match rows {
                    Rows::Whole if inner.contains(&operand.tensor) => return None,
                    Rows::Whole => continue,
                    Rows::Same => part.rows,
                    Rows::Window { rows, .. } => *rows,
                };
                if rows_of.get(&operand.tensor).is_some_and(|&r| r != count) {
                    return None;
                }
                let whole = operand.bytes == (0..program.tensors[operand.tensor].size_bytes());
                if !whole || operand.bytes.len() % count != 0 {
                    return None;
                }
            }
        }
        for &t in &inner {
            let read = instructions.iter().any(|i| i.inputs.iter().flatten().any(|o| o.tensor == t));
            if !read {
                return None;
            }
        }
        Some(Segment { rows: parts.last()?.rows, parts, inner })
    }

    /// For each instruction the rows that it computes in one stripe; `None` for a stripe without rows.
    fn rows_of_stripe(
        &self,
        instructions: &[Arc<Instruction>],
        stripe: usize,
        count: usize,
    ) -> Option<Vec<Range<usize>>> {
        let rows = self.rows * stripe / count..self.rows * (stripe + 1) / count;
        if rows.is_empty() {
            return None;
        }
        // Backwards: what an instruction must yield is the hull of what those after it read.
        let mut result_rows = vec![0..0; instructions.len()];
        *result_rows.last_mut()? = rows;
        for i in (0..instructions.len()).rev() {
            let own = result_rows[i].clone();
            if own.is_empty() {
                continue;
            }
            for (operand, map) in instructions[i].inputs.iter().zip(&self.parts[i].operands) {
                let (Some(operand), Some(range)) = (operand, map.of(&own)) else { continue };
                if let Some(producer) = self.inner.iter().position(|&t| t == operand.tensor) {
                    let hull = &mut result_rows[producer];
                    *hull = if Range::is_empty(hull) {
                        range
                    } else {
                        hull.start.min(range.start)..hull.end.max(range.end)
                    };
                }
            }
        }
        Some(result_rows)
    }

    /// Bytes between the instructions of a stripe that are alive at each of them.
    fn inner_live(
        &self,
        program: &Program,
        instructions: &[Arc<Instruction>],
        rows: &[Range<usize>],
    ) -> Option<Vec<usize>> {
        let mut live = vec![0; instructions.len()];
        // Position of the instruction whose result made the buffer that a result lies in.
        let mut home: Vec<usize> = (0..self.inner.len()).collect();
        let mut last: Vec<usize> = home.clone();
        for (i, instruction) in instructions.iter().enumerate() {
            for operand in instruction.inputs.iter().flatten() {
                if let Some(producer) = self.inner.iter().position(|&t| t == operand.tensor) {
                    last[home[producer]] = i;
                }
            }
            if instruction.in_place > 0 && i < self.inner.len() {
                let source = instruction.inputs.first()?.as_ref()?.tensor;
                home[i] = home[self.inner.iter().position(|&t| t == source)?];
            }
        }
        for (i, &tensor) in self.inner.iter().enumerate() {
            if home[i] == i {
                let row_bytes = program.tensors[tensor].size_bytes() / self.parts[i].rows;
                let size = aligned(rows[i].len() * row_bytes);
                live[i..=last[i]].iter_mut().for_each(|l| *l += size);
            }
        }
        Some(live)
    }
}

/// Applies splits of disjoint segments to a program.
fn apply(original: &Program, lifetimes: &Lifetimes, splits: &[Split]) -> Option<Program> {
    let mut order: Vec<&Split> = splits.iter().collect();
    order.sort_by_key(|s| s.segment.start);
    let mut program = original.clone();
    program.instructions.clear();
    let mut at = 0;
    for split in order {
        program.instructions.extend_from_slice(&original.instructions[at..split.segment.start]);
        let segment = Segment::of(original, lifetimes, split.segment.clone())?;
        emit(original, &mut program, split, &segment)?;
        at = split.segment.end;
    }
    program.instructions.extend_from_slice(&original.instructions[at..]);
    Some(program)
}

/// Appends the instructions of all stripes of one segment.
fn emit(original: &Program, program: &mut Program, split: &Split, segment: &Segment) -> Option<()> {
    let instructions = &original.instructions[split.segment.clone()];
    let count = split.stripes;
    for stripe in 0..count {
        let Some(result_rows) = segment.rows_of_stripe(instructions, stripe, count) else { continue };
        // Forwards: tensors of the stripe's size, and the instructions.
        let mut tensor_of: HashMap<usize, (usize, usize)> = HashMap::new();
        for (i, (instruction, part)) in instructions.iter().zip(&segment.parts).enumerate() {
            let own = result_rows[i].clone();
            if own.is_empty() {
                // Nothing of it is needed: the window reads padding alone.
                return None;
            }
            let mut copy = (**instruction).clone();
            let mut first_rows = vec![0; instruction.inputs.len()];
            let mut node_rows = 0..0;
            for (o, (operand, map)) in copy.inputs.iter_mut().zip(&part.operands).enumerate() {
                let (Some(operand), Some(range)) = (operand.as_mut(), map.of(&own)) else { continue };
                let total = match map {
                    Rows::Window { rows, .. } => *rows,
                    _ => part.rows,
                };
                let inner = tensor_of.get(&operand.tensor).map(|&(t, producer)| (t, &result_rows[producer]));
                let row_bytes = original.tensors[operand.tensor].size_bytes() / total;
                // What the kernel is given: all rows of an inner tensor, or the rows it needs of an outer one; an
                // element-wise kernel wants exactly its own.
                let (tensor, base) = match &inner {
                    Some((tensor, held)) => (*tensor, held.start),
                    None => (operand.tensor, 0),
                };
                first_rows[o] = range.start;
                if o == 0 {
                    node_rows = range.clone();
                }
                *operand = Operand {
                    tensor,
                    dims: with_rows(&operand.dims, total, range.len())?,
                    bytes: (range.start - base) * row_bytes..(range.end - base) * row_bytes,
                };
            }
            let result = copy.outputs.first_mut()?.as_mut()?;
            let row_bytes = original.tensors[result.tensor].size_bytes() / part.rows;
            let dims = with_rows(&result.dims, part.rows, own.len())?;
            if i + 1 == instructions.len() {
                *result = Operand {
                    tensor: result.tensor,
                    dims,
                    bytes: own.start * row_bytes..own.end * row_bytes,
                };
            } else {
                let old = &original.tensors[result.tensor];
                let size = own.len() * row_bytes;
                let storage = if instruction.in_place > 0 {
                    let source = copy.inputs.first()?.as_ref()?.tensor;
                    program.tensors[source].storage.clone()
                } else {
                    program.buffers.push(Buffer {
                        name: format!("{} rows {}..{}", old.name, own.start, own.end).into(),
                        size: aligned(size),
                        kind: BufferKind::Activation,
                    });
                    Storage::Buffer { buffer: program.buffers.len() - 1, offset: 0 }
                };
                program.tensors.push(Arc::new(TensorInfo {
                    name: old.name.clone(),
                    dtype: old.dtype,
                    dims: dims.clone(),
                    storage,
                }));
                let tensor = program.tensors.len() - 1;
                tensor_of.insert(result.tensor, (tensor, i));
                *result = Operand { tensor, dims, bytes: 0..size };
            }
            if matches!(copy.kernel, Kernel::Generic)
                && matches!(part.operands.first(), Some(Rows::Window { .. }))
            {
                let mut node = (*instruction.node).clone();
                node.op = stripe_op(instruction, &own, &node_rows)?;
                copy.node = Arc::new(node);
            }
            let share = own.len() as f64 / part.rows as f64;
            copy.cost.flops = copy.cost.flops * share;
            copy.cost.bytes_read = Bytes((copy.cost.bytes_read.0 as f64 * share) as u64);
            copy.cost.bytes_written = Bytes((copy.cost.bytes_written.0 as f64 * share) as u64);
            copy.stripe = Some(Stripe { output_rows: own, input_first_rows: first_rows });
            program.instructions.push(Arc::new(copy));
        }
    }
    Some(())
}

/// The dimensions with `rows` instead of `total` rows: the dimension of that size that comes first, or, for a
/// product over several leading dimensions, those dimensions in one.
fn with_rows(dims: &[usize], total: usize, rows: usize) -> Option<Vec<usize>> {
    let mut new = dims.to_vec();
    let axis = dims.iter().position(|&d| d > 1)?;
    if dims[axis] == total {
        new[axis] = rows;
        return Some(new);
    }
    let mut product = 1;
    for (i, &d) in dims.iter().enumerate() {
        product *= d;
        if product == total {
            let mut joined = vec![1; i];
            joined.push(rows);
            joined.extend_from_slice(&dims[i + 1..]);
            return Some(joined);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use lightering_graph::{BinaryOp, DType, Graph, Tensor, TensorType, UnaryOp, ValueId};
    use lightering_meter::MemoryPool;

    use super::*;
    use crate::{Bindings, PrepareOptions, prepare};

    /// A convolution of 3 × 3 with an activation.
    fn conv(graph: &mut Graph, x: ValueId, channels: [usize; 2], stride: usize) -> ValueId {
        let id = graph.nodes.len();
        let weights: Vec<f32> = (0..channels[0] * channels[1] * 9).map(|i| (i % 7) as f32 - 3.0).collect();
        let weight = Tensor::from_slice(&[channels[1], channels[0], 3, 3], &weights);
        let w = graph.add_constant(format!("w{id}"), weight);
        let attributes = ConvAttributes {
            kernel: vec![3; 2],
            strides: vec![stride; 2],
            padding: Padding::Explicit(vec![1; 4]),
            ..ConvAttributes::default()
        };
        let y = graph.add_node(format!("conv{id}"), Op::Conv(attributes), &[x, w], 1)[0];
        graph.add_node(format!("relu{id}"), Op::Unary(UnaryOp::Relu), &[y], 1)[0]
    }

    #[test]
    fn the_score_of_splits_is_that_of_the_program_made_of_them() {
        let mut graph = Graph::new("net");
        let x = graph.add_input("x", TensorType::fixed(DType::F32, &[1, 8, 41, 40]));
        let a = conv(&mut graph, x, [8, 16], 2);
        let b = conv(&mut graph, a, [16, 16], 1);
        let c = conv(&mut graph, b, [16, 16], 1);
        let d = graph.add_node("add", Op::Binary(BinaryOp::Add), &[c, a], 1)[0];
        let y = conv(&mut graph, d, [16, 24], 2);
        graph.outputs.push(y);
        prepare(&mut graph, &Bindings::default(), &[], &MemoryPool::unbounded(), &PrepareOptions::default())
            .unwrap();
        let program = Program::build(&graph, 1).unwrap();
        let splitter = Splitter::new(&program);
        let n = program.instructions.len();
        let limit = STAGING_BYTES_MIN;
        let mut compared = 0;
        for start in 0..n {
            for end in start + 2..=n {
                for stripes in STRIPE_COUNTS {
                    let splits = [Split { segment: start..end, stripes }];
                    let Some(split) = apply(&splitter.original, &splitter.lifetimes, &splits) else {
                        continue;
                    };
                    let mut excess: HashMap<usize, usize> = HashMap::new();
                    let room = Score::room(limit);
                    for (i, live) in Lifetimes::of(&split).live.into_iter().enumerate() {
                        if live > room {
                            let most = excess.entry(split.instructions[i].origin).or_default();
                            *most = (*most).max(live - room);
                        }
                    }
                    let work: f64 = split.instructions.iter().map(|i| i.cost.flops.0).sum();
                    let score = splitter.score(&splits, limit).unwrap();
                    assert_eq!(score.excess, excess, "{splits:?}");
                    assert!((score.work / work - 1.0).abs() < 1e-9, "{} is not {work}", score.work);
                    compared += 1;
                }
            }
        }
        assert!(compared > 10, "{compared} splits compared");
    }
}
