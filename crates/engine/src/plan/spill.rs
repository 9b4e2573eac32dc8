//! Which tensors wait on the disk between two uses.

use std::sync::Arc;

use lightering_graph::{Node, Op, SourceId, StoredTensor, UnaryOp};
use lightering_units::Bytes;

use super::Decision;
use super::assign::minimal_live;
use super::predict::Rates;
use crate::kernel::{Kernel, Packing};
use crate::program::{
    BufferKind, Instruction, Operand, Program, Spill, Storage, TensorInfo, Weight, WeightOrigin, aligned,
};

/// Smaller tensors are not worth a request.
const SPILL_BYTES_MIN: usize = 128 << 10;
/// A tensor must be back this many instructions before its use, and gone this many after it, for the spill to help.
const MARGIN: usize = 2;

/// A buffer between two uses.
struct Gap {
    buffer: usize,
    /// Last instruction that uses it before, first that uses it after.
    before: usize,
    after: usize,
    /// First instruction that runs when it is on the disk, if the disk is as fast as the profile says.
    written: usize,
}

/// Spills tensors until no instruction needs more than `limit` bytes, or nothing more can be spilled.
pub(super) fn spill(program: &mut Program, limit: usize, rates: &Rates) -> Vec<Decision> {
    let mut bytes = 0;
    let mut count = 0;
    // What has been tried at a peak in vain is not tried again.
    let mut hopeless = vec![false; program.instructions.len()];
    loop {
        let live = minimal_live(program);
        let peak = (0..live.len()).filter(|&i| !hopeless[i] && live[i] > limit).max_by_key(|&i| live[i]);
        let Some(peak) = peak else { break };
        let gaps = gaps_at(program, peak, rates);
        // The largest first: fewest requests; of equal ones, the one that is away longest.
        let Some(gap) = gaps.into_iter().max_by_key(|g| (program.buffers[g.buffer].size, g.after - g.before))
        else {
            hopeless[peak] = true;
            continue;
        };
        bytes += program.buffers[gap.buffer].size;
        count += 1;
        apply(program, &gap);
        // Two instructions more, behind the last use and where the tensor has to be on the disk.
        hopeless.insert(gap.before + 1, false);
        hopeless.insert(gap.written + 1, false);
    }
    if count == 0 {
        return Vec::new();
    }
    vec![Decision {
        technique: "spill".to_owned(),
        what: format!("{count} tensors"),
        bytes: Bytes(bytes as u64),
        why: "wait on the disk between two uses that are far apart, written and read while others compute"
            .to_owned(),
    }]
}

/// Buffers that nobody uses around `peak` and that could be away there.
fn gaps_at(program: &Program, peak: usize, rates: &Rates) -> Vec<Gap> {
    let n = program.buffers.len();
    let mut before: Vec<Option<usize>> = vec![None; n];
    let mut after: Vec<Option<usize>> = vec![None; n];
    let mut written_last = vec![0; n];
    for (i, instruction) in program.instructions.iter().enumerate() {
        for b in program.buffers_of(instruction) {
            if i <= peak {
                before[b] = Some(i);
            } else if after[b].is_none() {
                after[b] = Some(i);
            }
        }
        for output in instruction.outputs.iter().flatten() {
            if let Storage::Buffer { buffer, .. } = program.tensors[output.tensor].storage {
                written_last[buffer] = i;
            }
        }
    }
    for port in &program.inputs {
        if let Storage::Buffer { buffer, .. } = program.tensors[port.tensor].storage {
            before[buffer].get_or_insert(0);
        }
    }
    let mut whole = vec![true; n];
    for tensor in &program.tensors {
        if let Storage::Buffer { buffer, offset } = tensor.storage {
            whole[buffer] &= offset == 0 && aligned(tensor.size_bytes()) == program.buffers[buffer].size;
        }
    }
    let compute: Vec<f64> = program.instructions.iter().map(|i| rates.cost(&i.kernel, &i.cost)).collect();
    (0..n)
        .filter_map(|b| {
            let (before, after, buffer) = (before[b]?, after[b]?, &program.buffers[b]);
            let may = matches!(buffer.kind, BufferKind::Activation | BufferKind::Input)
                && buffer.size >= SPILL_BYTES_MIN
                && whole[b]
                && written_last[b] <= before;
            // The disk works while the next instructions compute; only then is the place free.
            let mut written = before + 1;
            let mut left = rates.writing(buffer.size);
            while written < peak && left > compute[written] {
                left -= compute[written];
                written += 1;
            }
            (may && before < peak && written < peak && peak + MARGIN <= after).then_some(Gap {
                buffer: b,
                before,
                after,
                written,
            })
        })
        .collect()
}

fn apply(program: &mut Program, gap: &Gap) {
    let name: Arc<str> = format!("{} (spilled)", program.buffers[gap.buffer].name).into();
    let size = program.buffers[gap.buffer].size;
    let weight = program.weights.len();
    let in_buffer = |tensor: &TensorInfo| matches!(tensor.storage, Storage::Buffer { buffer, .. } if buffer == gap.buffer);
    let tensor = (0..program.tensors.len())
        .find(|&t| in_buffer(&program.tensors[t]))
        .expect("a buffer that is used holds a tensor");
    // The session says where in the file it lies.
    let stored = StoredTensor {
        source: SourceId(u32::MAX),
        offset: 0,
        size: Bytes(program.tensors[tensor].size_bytes() as u64),
    };
    program.weights.push(Weight {
        name,
        origin: WeightOrigin::Stored(stored),
        packing: Packing::Plain,
        size,
        spilled: true,
    });
    // Whoever reads a tensor of the buffer after the gap reads the weight.
    let mut moved: Vec<Option<usize>> = vec![None; program.tensors.len()];
    for i in gap.after..program.instructions.len() {
        let uses = |o: &Option<Operand>| o.as_ref().is_some_and(|o| in_buffer(&program.tensors[o.tensor]));
        if !program.instructions[i].inputs.iter().any(uses) {
            continue;
        }
        let mut inputs = program.instructions[i].inputs.clone();
        for operand in inputs.iter_mut().flatten() {
            if !in_buffer(&program.tensors[operand.tensor]) {
                continue;
            }
            let new = moved[operand.tensor].unwrap_or_else(|| {
                let mut info = (*program.tensors[operand.tensor]).clone();
                info.storage = Storage::Weight(weight);
                program.tensors.push(Arc::new(info));
                program.tensors.len() - 1
            });
            moved[operand.tensor] = Some(new);
            operand.tensor = new;
        }
        // What is spilled once more later is written from where it then lies.
        if let (Kernel::SpillStart(other), Some(Some(operand))) =
            (&program.instructions[i].kernel, inputs.first())
        {
            program.spills[*other].tensor = operand.tensor;
        }
        Arc::make_mut(&mut program.instructions[i]).inputs = inputs;
    }
    let spill = program.spills.len();
    program.spills.push(Spill { tensor, weight, state: None });
    insert_writing(program, spill, gap.before, gap.written);
}

/// Inserts what has a tensor written behind instruction `before`, and what waits for that at `written`.
fn insert_writing(program: &mut Program, spill: usize, before: usize, written: usize) {
    let tensor = program.spills[spill].tensor;
    let operand = program.whole(tensor);
    let instruction = |kernel: Kernel, word: &str| {
        Arc::new(Instruction {
            node: Arc::new(Node {
                name: format!("{word} {}", program.tensors[tensor].name),
                op: Op::Unary(UnaryOp::Identity),
                inputs: Vec::new(),
                outputs: Vec::new(),
            }),
            kernel,
            inputs: vec![Some(operand.clone())],
            outputs: Vec::new(),
            workspace: 0,
            stripe: None,
            cost: lightering_graph::Cost::default(),
            in_place: 0,
            origin: 0,
        })
    };
    let (start, end) =
        (instruction(Kernel::SpillStart(spill), "spill"), instruction(Kernel::SpillEnd(spill), "spilled"));
    program.instructions.insert(before + 1, start);
    program.instructions.insert(written + 1, end);
}

/// How states are streamed: the more room is kept free for reading ahead, the later a write is waited for.
pub(super) struct Streaming {
    /// States of the largest size that there is to be room for besides what is in use.
    ahead: usize,
    /// Instructions at most between the last use of a state and the wait until it is on the disk.
    distance: usize,
}

/// From the least memory to the most overlap.
pub(super) const STREAMINGS: [Streaming; 4] = [
    Streaming { ahead: 0, distance: 0 },
    Streaming { ahead: 1, distance: 2 },
    Streaming { ahead: 2, distance: 8 },
    Streaming { ahead: 3, distance: usize::MAX },
];

/// Gives states a home on the disk until no instruction needs more than `limit` bytes: each is read before its first use
/// of a run and, if that changes it, written after the last.
///
/// A state that is being written takes its place until it is on the disk. In a program that computes for a shorter time
/// than the disk writes, waiting for as long as the disk needs would keep all of them in memory to the end; so the wait
/// comes right behind the last use, and later only as far as there is room.
pub(super) fn stream_states(
    program: &mut Program,
    limit: usize,
    how: &Streaming,
    rates: &Rates,
) -> Vec<Decision> {
    let n = program.instructions.len();
    let mut spans: Vec<(usize, usize, usize)> = Vec::new();
    for (state, info) in program.states.iter().enumerate() {
        let Storage::Buffer { buffer, .. } = program.tensors[info.tensor].storage else { continue };
        let used: Vec<usize> =
            (0..n).filter(|&i| program.buffers_of(&program.instructions[i]).any(|b| b == buffer)).collect();
        let whole = program.tensors.iter().all(|t| match t.storage {
            Storage::Buffer { buffer: b, offset } => {
                b != buffer || (offset == 0 && aligned(t.size_bytes()) == program.buffers[buffer].size)
            }
            _ => true,
        });
        if let (Some(first), Some(last)) = (used.first(), used.last())
            && whole
            && program.buffers[buffer].size >= SPILL_BYTES_MIN
        {
            spans.push((state, buffer, last - first));
        }
    }
    let largest = spans.iter().map(|&(_, buffer, _)| program.buffers[buffer].size).max().unwrap_or(0);
    let least = minimal_live(program).into_iter().max().unwrap_or(0);
    if least <= limit {
        return Vec::new();
    }
    let limit = limit.saturating_sub(how.ahead * largest);
    // Large ones that are needed for a short time help most for what they cost.
    spans.sort_by_key(|&(_, buffer, span)| std::cmp::Reverse(program.buffers[buffer].size / (span + 1)));
    let (mut count, mut bytes) = (0, 0);
    for (state, buffer, _) in spans {
        if minimal_live(program).into_iter().all(|l| l <= limit) {
            break;
        }
        count += 1;
        bytes += program.buffers[buffer].size;
        stream_state(program, state, buffer);
    }
    if count == 0 {
        return Vec::new();
    }
    wait_later(program, limit, how.distance, rates);
    vec![Decision {
        technique: "states on the disk".to_owned(),
        what: format!("{count} parameters and moments"),
        bytes: Bytes(bytes as u64),
        why: "are read before they are used and written once they have changed, while others compute"
            .to_owned(),
    }]
}

/// Moves the waits for states that are being written away from their last uses: up to where the disk is done, and as long
/// as their places are not needed.
fn wait_later(program: &mut Program, limit: usize, distance: usize, rates: &Rates) {
    let mut live = minimal_live(program);
    let (mut now, mut writer_free) = (0.0f64, 0.0f64);
    let mut i = 0;
    // Where each wait stood, so that one that was moved on is not moved again.
    let mut settled = vec![false; program.spills.len()];
    let mut done = vec![0.0f64; program.spills.len()];
    while i < program.instructions.len() {
        let instruction = program.instructions[i].clone();
        match instruction.kernel {
            Kernel::SpillStart(spill) if program.spills[spill].state.is_some() => {
                let size = program.weights[program.spills[spill].weight].size;
                writer_free = writer_free.max(now) + rates.writing(size);
                done[spill] = writer_free;
            }
            Kernel::SpillEnd(spill) if program.spills[spill].state.is_some() && !settled[spill] => {
                settled[spill] = true;
                let size = program.weights[program.spills[spill].weight].size;
                let (mut end, mut then) = (i, now);
                while end + 1 < program.instructions.len()
                    && end - i < distance
                    && then < done[spill]
                    && live[end + 1] + size <= limit
                {
                    end += 1;
                    let passed = &program.instructions[end];
                    then += rates.cost(&passed.kernel, &passed.cost);
                }
                if end > i {
                    program.instructions[i..=end].rotate_left(1);
                    live[i..=end].rotate_left(1);
                    live[i..end].iter_mut().for_each(|l| *l += size);
                    live[end] = live[end - 1];
                    // The instruction that now stands here has not been looked at.
                    continue;
                }
            }
            _ => {}
        }
        now += rates.cost(&instruction.kernel, &instruction.cost);
        i += 1;
    }
}

fn stream_state(program: &mut Program, state: usize, buffer: usize) {
    let tensor = program.states[state].tensor;
    let (size, weight) = (program.buffers[buffer].size, program.weights.len());
    let stored = StoredTensor {
        source: SourceId(u32::MAX),
        offset: 0,
        size: Bytes(program.tensors[tensor].size_bytes() as u64),
    };
    program.weights.push(Weight {
        name: program.tensors[tensor].name.clone(),
        origin: WeightOrigin::Stored(stored),
        packing: Packing::Plain,
        size,
        spilled: true,
    });
    let in_buffer = |storage: &Storage| matches!(storage, Storage::Buffer { buffer: b, .. } if *b == buffer);
    let holds = |o: &Operand| in_buffer(&program.tensors[o.tensor].storage);
    let writes = |i: &Instruction| i.outputs.iter().flatten().any(holds);
    let uses = |i: &Instruction| i.inputs.iter().chain(&i.outputs).flatten().any(holds);
    let last_write = program.instructions.iter().rposition(|i| writes(i));
    let last_use = program.instructions.iter().rposition(|i| uses(i));
    for tensor in &mut program.tensors {
        if in_buffer(&tensor.storage) {
            Arc::make_mut(tensor).storage = Storage::Weight(weight);
        }
    }
    program.buffers[buffer].size = 0;
    let spill = program.spills.len();
    program.spills.push(Spill { tensor, weight, state: Some(state) });
    if let (Some(write), Some(last)) = (last_write, last_use) {
        insert_writing(program, spill, write, last + 1);
    }
}
