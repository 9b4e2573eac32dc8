//! Which weights stay, which are streamed and when their reading starts; then the placement of everything.

use super::offsets::{Placement, Request, live_profile, place};
use super::predict::{Rates, timeline};
use crate::kernel::Kernel;
use crate::program::{BufferKind, Program, Storage, WeightOrigin, aligned};

/// When a streamed weight is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    /// Reading may start when this instruction starts: from then on the weight's place is free.
    pub issue: usize,
    /// The first instruction that needs it.
    pub needed: usize,
}

/// Whose bytes a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Owner {
    Buffer(usize),
    Workspace(usize),
    Weight(usize),
    Staging,
}

impl Owner {
    pub fn describe(self, program: &Program, assignment: &Assignment) -> (String, BufferKind) {
        match self {
            Owner::Buffer(b) => (program.buffers[b].name.to_string(), program.buffers[b].kind),
            Owner::Workspace(i) => {
                (format!("scratch of {}", program.instructions[i].node.name), BufferKind::Workspace)
            }
            Owner::Weight(w) => {
                let streamed = assignment.loads[w].is_some();
                let kind = if streamed { BufferKind::Streamed } else { BufferKind::Weight };
                (program.weights[w].name.to_string(), kind)
            }
            Owner::Staging => ("staging of weights".to_owned(), BufferKind::Staging),
        }
    }
}

/// All requests with their places, and the reading of streamed weights.
#[derive(Clone, Debug)]
pub(crate) struct Assignment {
    pub requests: Vec<(Owner, Request)>,
    pub placement: Placement,
    /// Per weight: `None` if it stays in memory.
    pub loads: Vec<Option<Load>>,
    /// Offset of each buffer, workspace (per instruction) and weight in the arena.
    pub buffer_offset: Vec<usize>,
    pub workspace_offset: Vec<usize>,
    pub weight_offset: Vec<usize>,
    /// Where weights land before they are packed.
    pub staging: std::ops::Range<usize>,
}

/// The least memory in which the program runs without further splitting.
pub(crate) struct Minimal {
    pub total: usize,
    pub peak_at: usize,
    pub assignment: Assignment,
}

/// Weights are read in pieces of about this size and packed from there.
pub(crate) const STAGING_BYTES: usize = 256 << 10;
/// Staging when memory is very scarce.
pub(crate) const STAGING_BYTES_MIN: usize = 32 << 10;

/// Size of the staging area: what is asked for, or the largest piece of a weight that cannot be divided; nothing when
/// no weight is packed on its way.
fn staging_bytes(program: &Program, wanted: usize) -> usize {
    let packed = program
        .weights
        .iter()
        .filter(|w| w.size > 0 && matches!(w.origin, WeightOrigin::Stored(_)) && !w.packing.is_plain());
    aligned(packed.map(|w| w.packing.piece_bytes(wanted).min(w.stored_bytes())).max().unwrap_or(0))
}

/// First and last instruction that uses each weight; `None` for an unused one.
fn weight_uses(program: &Program) -> Vec<Option<(usize, usize)>> {
    let mut uses: Vec<Option<(usize, usize)>> = vec![None; program.weights.len()];
    for (i, instruction) in program.instructions.iter().enumerate() {
        for w in program.weights_of(instruction) {
            let (first, _) = uses[w].unwrap_or((i, i));
            uses[w] = Some((first, i));
        }
    }
    // A weight that is itself an output of the graph is needed to the end.
    let end = program.instructions.len().saturating_sub(1);
    for port in &program.outputs {
        if let Storage::Weight(w) = program.tensors[port.tensor].storage {
            let (first, _) = uses[w].unwrap_or((end, end));
            uses[w] = Some((first, end));
        }
    }
    uses
}

/// Lifetimes of buffers and workspaces.
pub(crate) fn activation_requests(program: &Program) -> Vec<(Owner, Request)> {
    let end = program.instructions.len().saturating_sub(1);
    let mut live: Vec<Option<(usize, usize)>> = vec![None; program.buffers.len()];
    for (i, instruction) in program.instructions.iter().enumerate() {
        for b in program.buffers_of(instruction) {
            let (first, _) = live[b].unwrap_or((i, i));
            live[b] = Some((first, i));
        }
    }
    for port in &program.inputs {
        if let Storage::Buffer { buffer, .. } = program.tensors[port.tensor].storage {
            let (_, last) = live[buffer].unwrap_or((0, 0));
            live[buffer] = Some((0, last));
        }
    }
    for port in &program.outputs {
        if let Storage::Buffer { buffer, .. } = program.tensors[port.tensor].storage {
            let (first, _) = live[buffer].unwrap_or((0, end));
            live[buffer] = Some((first, end));
        }
    }
    for (b, live) in live.iter_mut().enumerate() {
        let kind = program.buffers[b].kind;
        if kind == BufferKind::Experts || (kind == BufferKind::State && live.is_some()) {
            *live = Some((0, end));
        }
    }
    let mut requests = Vec::new();
    for (b, live) in live.into_iter().enumerate() {
        if let Some((first, last)) = live
            && program.buffers[b].size > 0
        {
            requests.push((Owner::Buffer(b), Request { size: program.buffers[b].size, live: first..=last }));
        }
    }
    for (i, instruction) in program.instructions.iter().enumerate() {
        if instruction.workspace > 0 {
            requests.push((Owner::Workspace(i), Request { size: instruction.workspace, live: i..=i }));
        }
    }
    requests
}

/// Per weight: the first instruction before which its reading may start. Only what is spilled has to wait.
fn earliest_issue(program: &Program) -> Vec<usize> {
    let mut earliest = vec![0; program.weights.len()];
    for (i, instruction) in program.instructions.iter().enumerate() {
        if let Kernel::SpillEnd(spill) = instruction.kernel
            && program.spills[spill].state.is_none()
        {
            earliest[program.spills[spill].weight] = i + 1;
        }
    }
    earliest
}

/// Places everything for the given reading schedule.
fn assignment(program: &Program, mut loads: Vec<Option<Load>>, staging: usize) -> Assignment {
    let end = program.instructions.len().saturating_sub(1);
    let uses = weight_uses(program);
    for (w, load) in loads.iter_mut().enumerate() {
        if program.weights[w].spilled
            && let (None, Some((first, _))) = (&load, uses[w])
        {
            *load = Some(Load { issue: first, needed: first });
        }
    }
    let mut requests = activation_requests(program);
    // Loading the resident weights needs the staging area, too, but only before the first instruction; inputs that
    // are given before that moment must not lie there, so it is alive during instruction 0.
    let any_streamed = loads.iter().any(Option::is_some);
    let staging = staging_bytes(program, staging);
    if staging > 0 {
        let last = if any_streamed { end } else { 0 };
        requests.push((Owner::Staging, Request { size: staging, live: 0..=last }));
    }
    for (w, weight) in program.weights.iter().enumerate() {
        let live = match (&loads[w], uses[w]) {
            (Some(load), Some((_, last))) => load.issue..=last,
            _ => 0..=end,
        };
        requests.push((Owner::Weight(w), Request { size: weight.size, live }));
    }
    let plain: Vec<Request> = requests.iter().map(|(_, r)| r.clone()).collect();
    let placement = place(&plain);
    let mut a = Assignment {
        buffer_offset: vec![0; program.buffers.len()],
        workspace_offset: vec![0; program.instructions.len()],
        weight_offset: vec![0; program.weights.len()],
        staging: 0..0,
        requests,
        placement,
        loads,
    };
    for ((owner, request), &offset) in a.requests.iter().zip(&a.placement.offsets) {
        match *owner {
            Owner::Buffer(b) => a.buffer_offset[b] = offset,
            Owner::Workspace(i) => a.workspace_offset[i] = offset,
            Owner::Weight(w) => a.weight_offset[w] = offset,
            Owner::Staging => a.staging = offset..offset + request.size,
        }
    }
    a
}

/// Everything in memory for the whole run.
pub(crate) fn resident(program: &Program) -> Assignment {
    assignment(program, vec![None; program.weights.len()], STAGING_BYTES)
}

/// Every weight from a store, read just before it is needed.
fn all_streamed(program: &Program) -> Vec<Option<Load>> {
    let uses = weight_uses(program);
    program
        .weights
        .iter()
        .zip(uses)
        .map(|(w, used)| match (&w.origin, used) {
            (WeightOrigin::Stored(_), Some((first, _))) if w.size > 0 => {
                Some(Load { issue: first, needed: first })
            }
            _ => None,
        })
        .collect()
}

/// Bytes alive during each instruction when every weight is streamed.
pub(super) fn minimal_live(program: &Program) -> Vec<usize> {
    let end = program.instructions.len().saturating_sub(1);
    let uses = weight_uses(program);
    let mut requests: Vec<Request> = activation_requests(program).into_iter().map(|(_, r)| r).collect();
    requests.push(Request { size: staging_bytes(program, STAGING_BYTES_MIN), live: 0..=end });
    for ((load, weight), used) in all_streamed(program).iter().zip(&program.weights).zip(&uses) {
        let live = match (load, used) {
            (Some(load), Some((_, last))) => load.issue..=*last,
            _ => 0..=end,
        };
        requests.push(Request { size: weight.size, live });
    }
    live_profile(&requests)
}

pub(crate) fn minimal(program: &Program) -> Minimal {
    let a = assignment(program, all_streamed(program), STAGING_BYTES_MIN);
    let live = live_profile(&a.requests.iter().map(|(_, r)| r.clone()).collect::<Vec<_>>());
    let peak_at = (0..live.len()).max_by_key(|&i| live[i]).unwrap_or(0);
    Minimal { total: a.placement.total, peak_at, assignment: a }
}

/// The largest holders at an instruction, for the error message.
pub(crate) fn holders_at(program: &Program, at: usize) -> String {
    let a = assignment(program, all_streamed(program), STAGING_BYTES_MIN);
    let mut alive: Vec<_> = a.requests.iter().filter(|(_, r)| r.live.contains(&at)).collect();
    alive.sort_by_key(|(_, r)| std::cmp::Reverse(r.size));
    let names: Vec<String> = alive
        .iter()
        .take(4)
        .map(|(owner, r)| {
            format!("{:?} ({})", owner.describe(program, &a).0, lightering_units::Bytes(r.size as u64))
        })
        .collect();
    names.join(", ")
}

/// Weights below this size are kept before all others: reading one costs more than its bytes.
const SMALL_WEIGHT: usize = 64 << 10;
/// Placements tried for one mixture, each with a lower target.
const PLACEMENT_TRIES_MAX: usize = 8;
/// How far ahead of its use the reading of a weight may start, in instructions.
const LEAD_MAX: usize = 64;

/// A reading schedule for which everything fits into `limit` bytes, the fastest of those tried; `None` if there is
/// none without splitting layers.
pub(crate) fn within(program: &Program, limit: usize, rates: &Rates) -> Option<Assignment> {
    let mut best: Option<(f64, Assignment)> = None;
    // Several mixtures of "keep as much as possible" and "start reading early"; the timeline decides.
    for staging in [STAGING_BYTES, STAGING_BYTES_MIN] {
        for lead_first in [4usize, 2, 1, 0] {
            let Some(candidate) = try_within(program, limit, staging, lead_first) else { continue };
            let seconds = timeline(program, &candidate, rates).total;
            if best.as_ref().is_none_or(|(s, _)| seconds < *s) {
                best = Some((seconds, candidate));
            }
        }
        if best.is_some() {
            break;
        }
    }
    best.map(|(_, a)| a)
}

fn try_within(program: &Program, limit: usize, staging: usize, lead_first: usize) -> Option<Assignment> {
    let uses = weight_uses(program);
    // Fragmentation can cost a little; what the placement exceeds is taken off the target and tried again.
    let mut target = limit;
    for _ in 0..PLACEMENT_TRIES_MAX {
        let mut loads = all_streamed(program);
        let fixed: Vec<Request> = activation_requests(program)
            .into_iter()
            .map(|(_, r)| r)
            .chain([Request {
                size: aligned(staging),
                live: 0..=program.instructions.len().saturating_sub(1),
            }])
            .chain(program.weights.iter().enumerate().map(|(w, weight)| Request {
                size: weight.size,
                live: match (&loads[w], uses[w]) {
                    (Some(l), Some((_, last))) => l.issue..=last,
                    _ => 0..=program.instructions.len().saturating_sub(1),
                },
            }))
            .collect();
        let mut live = live_profile(&fixed);
        if live.iter().any(|&l| l > target) {
            return None;
        }
        let mut streamed: Vec<usize> = (0..loads.len()).filter(|&w| loads[w].is_some()).collect();
        streamed.sort_by_key(|&w| uses[w].map_or(0, |u| u.0));
        extend_leads(program, &mut loads, &streamed, &mut live, target, lead_first);
        keep_resident(program, &mut loads, &uses, &mut live, target);
        extend_leads(program, &mut loads, &streamed, &mut live, target, LEAD_MAX);
        let a = assignment(program, loads, staging);
        if a.placement.total <= limit {
            return Some(a);
        }
        let excess = a.placement.total - limit;
        target = target.checked_sub(excess + excess / 4 + 4096)?;
    }
    None
}

/// Starts the reading of streamed weights earlier, where the memory between allows, at most `lead` instructions
/// ahead and never before the reading of the weight that is needed before it.
fn extend_leads(
    program: &Program,
    loads: &mut [Option<Load>],
    streamed: &[usize],
    live: &mut [usize],
    target: usize,
    lead: usize,
) {
    let bounds = earliest_issue(program);
    let mut earliest = 0;
    for &w in streamed {
        let size = program.weights[w].size;
        let Some(load) = &mut loads[w] else { continue };
        while load.issue > earliest.max(bounds[w])
            && load.needed - load.issue < lead
            && live[load.issue - 1] + size <= target
        {
            load.issue -= 1;
            live[load.issue] += size;
        }
        earliest = load.issue;
    }
}

/// Keeps weights in memory for the whole run as long as they fit: small ones first, then the largest.
fn keep_resident(
    program: &Program,
    loads: &mut [Option<Load>],
    uses: &[Option<(usize, usize)>],
    live: &mut [usize],
    target: usize,
) {
    let mut order: Vec<usize> =
        (0..loads.len()).filter(|&w| loads[w].is_some() && !program.weights[w].spilled).collect();
    order.sort_by_key(|&w| {
        let size = program.weights[w].size;
        if size < SMALL_WEIGHT { (0, size) } else { (1, usize::MAX - size) }
    });
    for w in order {
        let (Some(load), Some((_, last))) = (&loads[w], uses[w]) else { continue };
        let size = program.weights[w].size;
        let alive = load.issue..=last;
        let fits = live.iter().enumerate().all(|(i, &l)| alive.contains(&i) || l + size <= target);
        if fits {
            for (i, l) in live.iter_mut().enumerate() {
                if !alive.contains(&i) {
                    *l += size;
                }
            }
            loads[w] = None;
        }
    }
}
