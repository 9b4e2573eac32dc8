//! An order of the instructions that keeps fewer bytes alive at the peak.

use std::collections::HashMap;

use super::assign::activation_requests;
use super::offsets::max_live;
use crate::kernel::{Kernel, TrainKernel};
use crate::program::{BufferKind, Instruction, Program, Storage};

fn peak(program: &Program) -> usize {
    let requests: Vec<_> = activation_requests(program).into_iter().map(|(_, r)| r).collect();
    max_live(&requests)
}

/// Whether a program is a step from forward passes alone, which visits one parameter after the other.
pub(crate) fn perturbs(program: &Program) -> bool {
    let perturb =
        |kernel: &Kernel| matches!(kernel, Kernel::Train(k) if matches!(**k, TrainKernel::Perturb { .. }));
    program.instructions.iter().any(|i| perturb(&i.kernel))
}

/// Reorders the instructions if that lowers the peak of the activations; returns the bytes saved.
///
/// Instructions that perturb parameters stay where they are: they add nothing to what is alive, so that all of them would
/// come first, and a parameter would have to stay in memory from the beginning to its use.
pub(crate) fn improve(program: &mut Program) -> Option<usize> {
    if perturbs(program) {
        return None;
    }
    let before = peak(program);
    let order = greedy(program)?;
    let instructions: Vec<_> = order.iter().map(|&i| program.instructions[i].clone()).collect();
    let old = std::mem::replace(&mut program.instructions, instructions);
    let after = peak(program);
    if after < before {
        Some(before - after)
    } else {
        program.instructions = old;
        None
    }
}

/// Which resource an instruction reads or writes: a buffer or a heap slot.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Resource {
    Buffer(usize),
    Heap(usize),
}

/// Runs, among the instructions whose operands are there, the one that adds least to what is alive; equal ones in
/// the given order. `None` when the order is the given one.
fn greedy(program: &Program) -> Option<Vec<usize>> {
    let n = program.instructions.len();
    let resource = |tensor: usize| match program.tensors[tensor].storage {
        Storage::Buffer { buffer, .. } => Some(Resource::Buffer(buffer)),
        Storage::Heap(slot) => Some(Resource::Heap(slot)),
        _ => None,
    };
    // Every access depends on the accesses before it that it conflicts with: reads on the writes, writes on both.
    let mut after: Vec<Vec<usize>> = vec![Vec::new(); n];
    let mut waiting = vec![0usize; n];
    let mut writers: HashMap<Resource, Vec<usize>> = HashMap::new();
    let mut readers: HashMap<Resource, Vec<usize>> = HashMap::new();
    for (i, instruction) in program.instructions.iter().enumerate() {
        let mut before = Vec::new();
        for r in instruction.inputs.iter().flatten().filter_map(|o| resource(o.tensor)) {
            before.extend(writers.get(&r).into_iter().flatten().copied());
            readers.entry(r).or_default().push(i);
        }
        for r in instruction.outputs.iter().flatten().filter_map(|o| resource(o.tensor)) {
            // Parts of one buffer that are written by different instructions do not conflict with each other, but
            // overwriting what somebody still reads does.
            if instruction.in_place > 0 {
                before.extend(writers.get(&r).into_iter().flatten().copied());
            }
            before.extend(readers.get(&r).into_iter().flatten().copied().filter(|&j| j != i));
            writers.entry(r).or_default().push(i);
        }
        before.sort_unstable();
        before.dedup();
        for j in before {
            if j != i {
                after[j].push(i);
                waiting[i] += 1;
            }
        }
    }
    let mut uses_left: HashMap<usize, usize> = HashMap::new();
    for instruction in &program.instructions {
        let buffers = distinct_buffers(program, instruction);
        for b in buffers {
            *uses_left.entry(b).or_default() += 1;
        }
    }
    for port in program.outputs.iter().chain(&program.inputs) {
        if let Some(Resource::Buffer(b)) = resource(port.tensor)
            && program.outputs.iter().any(|o| resource(o.tensor) == Some(Resource::Buffer(b)))
        {
            // Outputs are never freed.
            *uses_left.entry(b).or_default() += n;
        }
    }
    let mut alive = vec![false; program.buffers.len()];
    for port in &program.inputs {
        if let Some(Resource::Buffer(b)) = resource(port.tensor) {
            alive[b] = true;
        }
    }
    for (b, buffer) in program.buffers.iter().enumerate() {
        if buffer.kind == BufferKind::State {
            alive[b] = true;
            *uses_left.entry(b).or_default() += n;
        }
    }
    let mut ready: Vec<usize> = (0..n).filter(|&i| waiting[i] == 0).collect();
    let mut order = Vec::with_capacity(n);
    while !ready.is_empty() {
        let change = |i: usize| -> isize {
            let buffers = distinct_buffers(program, &program.instructions[i]);
            buffers
                .iter()
                .map(|&b| {
                    let size = program.buffers[b].size as isize;
                    let born = if alive[b] { 0 } else { size };
                    let dies = if uses_left.get(&b) == Some(&1) { size } else { 0 };
                    born - dies
                })
                .sum()
        };
        let (position, &i) = ready.iter().enumerate().min_by_key(|&(_, &i)| (change(i), i))?;
        ready.swap_remove(position);
        order.push(i);
        let buffers = distinct_buffers(program, &program.instructions[i]);
        for b in buffers {
            alive[b] = true;
            if let Some(left) = uses_left.get_mut(&b) {
                *left = left.saturating_sub(1);
            }
        }
        for &j in &after[i] {
            waiting[j] -= 1;
            if waiting[j] == 0 {
                ready.push(j);
            }
        }
    }
    let changed = order.iter().enumerate().any(|(i, &j)| i != j);
    (changed && order.len() == n).then_some(order)
}

/// The buffers that an instruction touches, each once.
fn distinct_buffers(program: &Program, instruction: &Instruction) -> Vec<usize> {
    let mut buffers: Vec<usize> = program.buffers_of(instruction).collect();
    buffers.sort_unstable();
    buffers.dedup();
    buffers
}
