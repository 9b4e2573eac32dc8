//! The planner: which bytes are where, when, and why.
//!
//! Everything that a run needs is a buffer with a lifetime in instructions: tensors, scratch, resident weights,
//! weights that pass through. One placement puts all of them into one arena, so the plan's size *is* the memory
//! that the run takes. Under a budget the planner tries, in this order and combined: a better order, results in the
//! place of operands, layers split into stripes of rows where the peak is, and weights streamed from the file.

mod assign;
mod chunks;
mod offsets;
mod order;
mod predict;
mod spill;
mod stripes;
mod svg;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use lightering_graph::{LmOp, Op};
use lightering_meter::MachineProfile;
use lightering_units::{Bytes, Flops, Seconds};
use serde::{Deserialize, Serialize};

use crate::EngineError;
use crate::experts;
use crate::kernel::{Kernel, Packing};
use crate::program::{BufferKind, INLINE_MAX, Program, Storage, WeightOrigin, aligned};
use crate::rows::Rows;
pub(crate) use assign::{Assignment, Owner};

/// What a plan may assume.
#[derive(Clone, Debug)]
pub struct PlanOptions {
    /// Most memory that the run may hold beyond the binary's own fixed cost.
    pub budget: Option<Bytes>,
    /// Threads that compute.
    pub threads: usize,
    /// Rates of the machine.
    pub profile: MachineProfile,
    /// Weights are read past the page cache.
    pub direct_reads: bool,
    /// Folder on a disk where tensors may wait between two uses that are far apart; nowhere if not given.
    pub spill: Option<PathBuf>,
}

impl PlanOptions {
    /// A plan for this machine without a budget.
    pub fn new(profile: MachineProfile, threads: usize) -> PlanOptions {
        PlanOptions { budget: None, threads, profile, direct_reads: false, spill: None }
    }
}

/// A buffer of the plan, in the picture a box: bytes upwards, instructions to the right.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedBuffer {
    /// Name of the tensor or weight.
    pub name: String,
    /// What it is for.
    pub kind: BufferKind,
    /// First byte in the arena.
    pub offset: Bytes,
    /// Size.
    pub size: Bytes,
    /// First instruction that needs it.
    pub first: usize,
    /// Last instruction that needs it.
    pub last: usize,
}

/// An instruction of the plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedInstruction {
    /// The node's name, with the rows if it is one stripe of several.
    pub name: String,
    /// The operator.
    pub op: String,
    /// Which kernel computes it.
    pub kernel: String,
    /// Arithmetic operations.
    pub flops: Flops,
    /// Bytes of operands and results.
    pub bytes: Bytes,
    /// Predicted time, waiting for weights not counted.
    pub seconds: Seconds,
    /// Bytes of the arena in use while it runs.
    pub live: Bytes,
}

/// A weight and how it gets into memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedWeight {
    /// Name in the model.
    pub name: String,
    /// Bytes in the arena.
    pub size: Bytes,
    /// Bytes read from the store, at each run if streamed.
    pub stored: Bytes,
    /// `None` if it stays in memory; else the instruction before which reading starts.
    pub streamed_at: Option<usize>,
}

/// A decision and its reason.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// `order`, `in place`, `stripes`, `stream`, `rows from the file`.
    pub technique: String,
    /// The tensor, node or range of nodes it is about.
    pub what: String,
    /// Bytes that it concerns.
    pub bytes: Bytes,
    /// Why, as a sentence.
    pub why: String,
}

/// Where every byte of a run is and when: printable, JSON, and a picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Version of this layout.
    pub schema: String,
    /// What was asked for.
    pub budget: Option<Bytes>,
    /// Threads that compute.
    pub threads: usize,
    /// Size of the arena.
    pub arena: Bytes,
    /// The largest set of buffers alive at once; no arena can be smaller.
    pub arena_lower_bound: Bytes,
    /// Small constants and bookkeeping outside the arena.
    pub outside_arena: Bytes,
    /// Most that values of unknown size may take; refused beyond.
    pub heap_limit: Option<Bytes>,
    /// Arena and what lies outside: what a budget bounds.
    pub predicted_peak: Bytes,
    /// Time of one run, waiting for weights included.
    pub predicted_seconds: Seconds,
    /// Part of that time spent waiting for weights.
    pub predicted_stall: Seconds,
    /// Time of a run for one row of each class, in a plan whose runs may have fewer rows: of one token.
    pub predicted_row_seconds: Option<Seconds>,
    /// Bytes of weights as the model stores them.
    pub weights_total: Bytes,
    /// Bytes read from the store at each run.
    pub streamed_per_run: Bytes,
    /// The instruction at which most memory is in use.
    pub peak_at: usize,
    /// All buffers.
    pub buffers: Vec<PlannedBuffer>,
    /// All instructions in order.
    pub instructions: Vec<PlannedInstruction>,
    /// All weights.
    pub weights: Vec<PlannedWeight>,
    /// What was done and why.
    pub decisions: Vec<Decision>,
}

/// Version of the plan's JSON.
pub const PLAN_SCHEMA: &str = "lightering.plan/1";
/// Bytes of bookkeeping per instruction, tensor and weight: names, shapes, operators on the ordinary heap.
const BOOKKEEPING_PER_ITEM: usize = 450;
/// Under a budget no single weight that can be divided takes more than this part of it.
const CHUNKS_PER_BUDGET: usize = 8;
/// Smaller chunks cost more requests than they save memory.
const CHUNK_BYTES_MIN: usize = 64 << 10;
/// Fractions of the limit that are aimed at, one after the other, until a plan fits.
const AIMS: [f64; 4] = [1.0, 0.92, 0.82, 0.7];
/// Tensors are spilled until this part of the limit is free at every instruction.
const SPILL_ROOM: usize = 16;
/// Stripes are introduced at most so many times.
const STRIPE_ROUNDS_MAX: usize = 24;

/// Everything the session needs: the program as it will be walked, and where its buffers are.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub program: Program,
    pub assignment: Assignment,
    pub plan: Plan,
}

/// Bytes that live outside the arena: inline constants and bookkeeping.
fn outside_arena(program: &Program) -> usize {
    let inline: BTreeMap<*const lightering_graph::Tensor, usize> = program
        .tensors
        .iter()
        .filter_map(|t| match &t.storage {
            Storage::Inline(c) => Some((std::sync::Arc::as_ptr(c), c.size_bytes().to_usize())),
            _ => None,
        })
        .collect();
    let items =
        program.instructions.len() + program.tensors.len() + program.weights.len() + program.buffers.len();
    // Names are kept by the program, the loader and the plan; those of converted models take hundreds of bytes each.
    let names = 2 * program.instructions.iter().map(|i| i.node.name.len()).sum::<usize>()
        + program.tensors.iter().map(|t| t.name.len()).sum::<usize>()
        + 2 * program.buffers.iter().map(|b| b.name.len()).sum::<usize>()
        + 4 * program.weights.iter().map(|w| w.name.len()).sum::<usize>();
    inline.values().map(|&size| size.min(INLINE_MAX)).sum::<usize>() + items * BOOKKEEPING_PER_ITEM + names
}

/// Turns gathers from a stored table into reads of single rows, where nothing else needs the table; true if there
/// were any.
fn read_rows_from_file(program: &mut Program) -> bool {
    let mut changed = false;
    for i in 0..program.instructions.len() {
        let instruction = &program.instructions[i];
        let kernel = match (&instruction.node.op, &instruction.kernel) {
            (Op::Gather { axis: 0 }, Kernel::Generic) => Kernel::GatherStored,
            (Op::Lm(op), Kernel::Language) => match **op {
                LmOp::BlockGather { format } => Kernel::BlockGatherStored { format },
                _ => continue,
            },
            _ => continue,
        };
        let Some(Some(table)) = instruction.inputs.first() else { continue };
        let tensor = table.tensor;
        let Storage::Weight(w) = program.tensors[tensor].storage else { continue };
        let WeightOrigin::Stored(stored) = program.weights[w].origin else { continue };
        let shared = program.instructions.iter().enumerate().any(|(j, other)| {
            j != i
                && other
                    .inputs
                    .iter()
                    .flatten()
                    .any(|o| matches!(program.tensors[o.tensor].storage, Storage::Weight(x) if x == w))
        });
        let output = program.outputs.iter().any(|p| p.tensor == tensor);
        if output || !program.weights[w].packing.is_plain() {
            continue;
        }
        if let Kernel::BlockGatherStored { .. } = kernel {
            // Tied to the last layer, the table stays that layer's weight; the gather no longer needs all of it.
            let mut by_row = (*program.tensors[tensor]).clone();
            let row_bytes = by_row.dims[1];
            by_row.storage = Storage::Stored(stored);
            program.tensors.push(Arc::new(by_row));
            let operand = program.whole(program.tensors.len() - 1);
            let instruction = Arc::make_mut(&mut program.instructions[i]);
            instruction.inputs[0] = Some(operand);
            instruction.workspace = aligned(row_bytes);
        } else if shared {
            continue;
        } else {
            Arc::make_mut(&mut program.tensors[tensor]).storage = Storage::Stored(stored);
        }
        if !shared {
            program.weights[w].packing = Packing::Stored;
            program.weights[w].size = 0;
        }
        Arc::make_mut(&mut program.instructions[i]).kernel = kernel;
        changed = true;
    }
    changed
}

/// Makes a plan for a program.
///
/// # Errors
/// [`EngineError::Budget`] when nothing fits, naming the smallest budget found that does.
pub(crate) fn plan(mut program: Program, options: &PlanOptions) -> Result<Layout, EngineError> {
    let mut decisions = Vec::new();
    if let Some(saved) = order::improve(&mut program) {
        decisions.push(Decision {
            technique: "order".to_owned(),
            what: "instructions".to_owned(),
            bytes: Bytes(saved as u64),
            why: "another order of the same instructions keeps fewer bytes alive at the peak".to_owned(),
        });
    }
    let outside = outside_arena(&program);
    let rates = predict::Rates::new(options);
    let Some(budget) = options.budget else {
        let assignment = assign::resident(&program);
        return Ok(finish(program, assignment, decisions, options, outside, &rates));
    };
    let limit = budget.to_usize().saturating_sub(outside);
    let resident = assign::resident(&program);
    if resident.placement.total <= limit {
        return Ok(finish(program, resident, decisions, options, outside, &rates));
    }
    if read_rows_from_file(&mut program) {
        let assignment = assign::resident(&program);
        if assignment.placement.total <= limit {
            return Ok(finish(program, assignment, decisions, options, outside, &rates));
        }
    }
    if experts::move_to_store(&mut program).is_some() {
        // What the layers share is needed by every token, an expert only by those that are sent to it: the experts
        // get what is left.
        experts::set_slots(&mut program, experts::SLOTS_MIN);
        let (total, slot) = program.experts.as_ref().map_or((0, 1), |set| (set.total(), set.slot_bytes));
        let outside = outside_arena(&program);
        let least = assign::resident(&program).placement.total;
        if let Some(left) = budget.to_usize().checked_sub(least + outside) {
            experts::set_slots(&mut program, total.min(experts::SLOTS_MIN + left / slot.max(1)));
            let assignment = assign::resident(&program);
            if assignment.placement.total + outside <= budget.to_usize() {
                return Ok(finish(program, assignment, decisions, options, outside, &rates));
            }
            experts::set_slots(&mut program, experts::SLOTS_MIN);
        }
    }
    let mut streamings = vec![(program, Vec::new())];
    if options.spill.is_some() {
        // A little room for fragmentation, which the live bytes do not show.
        let room = limit.saturating_sub(limit / SPILL_ROOM);
        let (mut plain, _) = streamings.remove(0);
        // Between forward and backward pass activations wait long; where there is none, parameters do.
        let states_first = order::perturbs(&plain);
        if !states_first {
            decisions.extend(spill::spill(&mut plain, room, &rates));
        }
        for how in &spill::STREAMINGS {
            let mut program = plain.clone();
            let mut more = spill::stream_states(&mut program, room, how, &rates);
            let none = more.is_empty();
            if states_first {
                more.extend(spill::spill(&mut program, room, &rates));
            }
            streamings.push((program, more));
            if none {
                break;
            }
        }
    }
    let mut best: Option<(f64, Fitting)> = None;
    for (i, (program, streamed)) in streamings.iter().enumerate() {
        let fitted = fit(program, budget, &rates);
        let mut fitting = match fitted {
            Ok(fitting) => fitting,
            // The first one needs least; where it does not fit, none does.
            Err(shortage) if i == 0 => shortage.look_further(program, budget, &rates)?,
            Err(_) => continue,
        };
        fitting.decisions.splice(0..0, streamed.iter().cloned());
        let seconds = predict::timeline(&fitting.program, &fitting.assignment, &rates).total;
        if best.as_ref().is_none_or(|(s, _)| seconds < *s) {
            best = Some((seconds, fitting));
        }
    }
    let Some((_, Fitting { program, assignment, decisions: more, outside })) = best else {
        return Err(EngineError::Internal("no way to keep states was looked at".to_owned()));
    };
    decisions.extend(more);
    Ok(finish(program, assignment, decisions, options, outside, &rates))
}

/// A program that fits, and the bytes that it takes outside the arena.
struct Fitting {
    program: Program,
    assignment: Assignment,
    decisions: Vec<Decision>,
    outside: usize,
}

/// Fits a program into a budget, bookkeeping included.
///
/// The search is a greedy one: aiming lower sometimes finds a plan where aiming at the limit found none. What such a
/// plan needs is within the budget all the same.
fn fit(program: &Program, budget: Bytes, rates: &predict::Rates) -> Result<Fitting, Shortage> {
    let budget = budget.to_usize();
    let mut outside = outside_arena(program);
    let mut shortage: Option<Shortage> = None;
    for aim in AIMS {
        let limit = (budget.saturating_sub(outside) as f64 * aim) as usize;
        match squeeze(program, limit, rates) {
            Ok((program, assignment, decisions)) => {
                // Stripes and chunks are instructions and buffers of their own, and have to be kept in mind, too.
                let now = outside_arena(&program);
                if assignment.placement.total + now <= budget {
                    return Ok(Fitting { program, assignment, decisions, outside: now });
                }
                outside = outside.max(now);
            }
            Err(mut found) => {
                found.bytes += outside;
                if shortage.as_ref().is_none_or(|s| found.bytes < s.bytes) {
                    shortage = Some(found);
                }
            }
        }
    }
    Err(shortage.unwrap_or_else(|| {
        // Plans were found, but none with room for its own bookkeeping.
        let minimal = assign::minimal(program);
        Shortage::of(program, minimal.peak_at, budget + outside / 8)
    }))
}

/// The least that was reached when nothing fits: bytes of the arena, or of all that a budget bounds.
struct Shortage {
    bytes: usize,
    at: String,
    holders: String,
}

/// Fits a program into `limit` bytes by streaming weights, in chunks where they are large, and splitting layers into
/// stripes.
fn squeeze(
    program: &Program,
    limit: usize,
    rates: &predict::Rates,
) -> Result<(Program, Assignment, Vec<Decision>), Shortage> {
    let mut program = program.clone();
    let mut decisions = Vec::new();
    decisions.extend(chunks::split(&mut program, (limit / CHUNKS_PER_BUDGET).max(CHUNK_BYTES_MIN)));
    let mut splitter = stripes::Splitter::new(&program);
    let mut shortage: Option<Shortage> = None;
    for _ in 0..STRIPE_ROUNDS_MAX {
        let minimal = assign::minimal(&program);
        let fitting = match assign::within(&program, limit, rates) {
            None if minimal.total <= limit => Some(minimal.assignment),
            other => other,
        };
        if let Some(assignment) = fitting {
            decisions.extend(splitter.decisions(&program));
            return Ok((program, assignment, decisions));
        }
        if shortage.as_ref().is_none_or(|s| minimal.total < s.bytes) {
            shortage = Some(Shortage::of(&program, minimal.peak_at, minimal.total));
        }
        let Some(split) = splitter.improve(limit) else { break };
        program = split;
    }
    Err(shortage.expect("at least one round was run"))
}

/// How often the smallest budget is looked for; each try makes a plan.
const SMALLEST_TRIES_MAX: usize = 12;
/// How often the gap between a refused budget and the smallest one that is known is halved.
const SMALLEST_HALVINGS: usize = 5;

impl Shortage {
    fn of(program: &Program, peak_at: usize, bytes: usize) -> Shortage {
        Shortage {
            bytes,
            at: program.instructions.get(peak_at).map_or(String::new(), |i| i.node.name.clone()),
            holders: assign::holders_at(program, peak_at),
        }
    }

    /// The error with a smallest budget for which a plan was really made; or, since the search is a greedy one, a
    /// plan after all, where aiming elsewhere finds one.
    fn look_further(
        self,
        program: &Program,
        budget: Bytes,
        rates: &predict::Rates,
    ) -> Result<Fitting, EngineError> {
        let fits = |bytes: usize| fit(program, Bytes(bytes as u64), rates);
        let mut enough = self.bytes;
        for _ in 0..SMALLEST_TRIES_MAX {
            match fits(enough) {
                Ok(found) if enough <= budget.to_usize() => return Ok(found),
                Ok(_) => break,
                Err(more) => enough = more.bytes.max(enough + enough / 16),
            }
        }
        // What was reached on the way to an impossible limit is not the least: look between the two.
        let mut refused = budget.to_usize();
        for _ in 0..SMALLEST_HALVINGS {
            let between = refused.midpoint(enough);
            if between < enough && fits(between).is_ok() {
                enough = between;
            } else {
                refused = between;
            }
        }
        let smallest = Bytes(enough as u64);
        Err(EngineError::Budget {
            budget,
            smallest,
            smallest_mib: smallest.0.div_ceil(1 << 20),
            at: self.at,
            holders: self.holders,
        })
    }
}

/// Predicted time of a run for one row of each class of `rows`.
pub(crate) fn predict_row(layout: &Layout, rows: &Rows, options: &PlanOptions) -> Seconds {
    let (program, rates) = (&layout.program, predict::Rates::new(options));
    let compute = program.instructions.iter().map(|i| {
        let share = rows.one_row_share(program, i);
        let mut cost = i.cost;
        let weights: usize = program.weights_of(i).map(|w| program.weights[w].stored_bytes()).sum();
        // Of a cache, a run for one row touches what its sequence holds, which nobody knows; of experts, those chosen.
        let (fixed, passing) = match i.kernel {
            Kernel::Experts { shape, .. } => {
                let chosen = i.inputs[1].as_ref().map_or(0, |ids| ids.dims.last().copied().unwrap_or(0));
                (shape.weight_bytes() * chosen / shape.count.max(1), shape.weight_bytes())
            }
            _ => (weights, weights + program.state_bytes_of(i)),
        };
        let others = (cost.bytes_read.0 as f64 - passing as f64).max(0.0);
        cost.bytes_read = Bytes((fixed as f64 + others * share) as u64);
        cost.bytes_written = Bytes((cost.bytes_written.0 as f64 * share) as u64);
        cost.flops = cost.flops * share;
        rates.cost(&i.kernel, &cost)
    });
    let timeline = predict::timeline_of(program, &layout.assignment, &rates, compute.collect());
    let experts = program.experts.as_ref().map_or(0.0, |set| {
        // Every expert is taken to be as likely as the others.
        let chosen = program.instructions.iter().filter_map(|i| match i.kernel {
            Kernel::Experts { .. } => i.inputs[1].as_ref()?.dims.last().copied(),
            _ => None,
        });
        let missing = chosen.sum::<usize>() as f64 * (1.0 - set.slots as f64 / set.total().max(1) as f64);
        missing * rates.reading(set.slot_bytes)
    });
    Seconds(timeline.total + experts)
}

fn finish(
    program: Program,
    assignment: Assignment,
    mut decisions: Vec<Decision>,
    options: &PlanOptions,
    outside: usize,
    rates: &predict::Rates,
) -> Layout {
    let timeline = predict::timeline(&program, &assignment, rates);
    let requests = &assignment.requests;
    let live = offsets::live_profile(&requests.iter().map(|(_, r)| r.clone()).collect::<Vec<_>>());
    let peak_at = (0..live.len()).max_by_key(|&i| (live[i], std::cmp::Reverse(i))).unwrap_or(0);
    let weights: Vec<PlannedWeight> = program
        .weights
        .iter()
        .zip(&assignment.loads)
        .map(|(w, load)| PlannedWeight {
            name: w.name.to_string(),
            size: Bytes(w.size as u64),
            stored: Bytes(w.stored_bytes() as u64),
            streamed_at: load.as_ref().map(|l| l.issue),
        })
        .collect();
    let in_place = program.instructions.iter().filter(|i| i.in_place > 0).count();
    if in_place > 0 {
        decisions.push(Decision {
            technique: "in place".to_owned(),
            what: format!("{in_place} results"),
            bytes: Bytes::ZERO,
            why: "take the place of an operand that nobody needs any more".to_owned(),
        });
    }
    let streamed: Bytes = weights.iter().filter(|w| w.streamed_at.is_some()).map(|w| w.stored).sum();
    if streamed > Bytes::ZERO {
        decisions.push(Decision {
            technique: "stream".to_owned(),
            what: format!("{} weights", weights.iter().filter(|w| w.streamed_at.is_some()).count()),
            bytes: streamed,
            why: "do not fit beside the rest, so they are read at each run while earlier layers compute"
                .to_owned(),
        });
    }
    if let Some(set) = &program.experts {
        decisions.push(Decision {
            technique: "experts".to_owned(),
            what: format!("{} of {} in {} layers", set.slots, set.total(), set.layers()),
            bytes: Bytes((set.slots * set.slot_bytes) as u64),
            why: format!(
                "stay in memory; of {} in all, others are read when a router asks",
                set.stored_bytes()
            ),
        });
    }
    let by_row: Vec<&str> = program
        .tensors
        .iter()
        .filter(|t| matches!(t.storage, Storage::Stored(_)))
        .map(|t| &*t.name)
        .collect();
    if !by_row.is_empty() {
        decisions.push(Decision {
            technique: "rows from the file".to_owned(),
            what: by_row.join(", "),
            bytes: Bytes::ZERO,
            why: "only the rows that are asked for are read".to_owned(),
        });
    }
    let buffers = requests
        .iter()
        .zip(&assignment.placement.offsets)
        .filter(|((_, r), _)| r.size > 0)
        .map(|((owner, r), &offset)| {
            let (name, kind) = owner.describe(&program, &assignment);
            PlannedBuffer {
                name,
                kind,
                offset: Bytes(offset as u64),
                size: Bytes(r.size as u64),
                first: *r.live.start(),
                last: *r.live.end(),
            }
        })
        .collect();
    let instructions = program
        .instructions
        .iter()
        .enumerate()
        .map(|(i, instruction)| PlannedInstruction {
            name: match &instruction.stripe {
                None => instruction.node.name.clone(),
                Some(s) => {
                    format!("{} rows {}..{}", instruction.node.name, s.output_rows.start, s.output_rows.end)
                }
            },
            op: instruction.node.op.name().to_owned(),
            kernel: instruction.kernel.name().to_owned(),
            flops: instruction.cost.flops,
            bytes: instruction.cost.bytes_read + instruction.cost.bytes_written,
            seconds: Seconds(timeline.compute[i]),
            live: Bytes(live.get(i).copied().unwrap_or(0) as u64),
        })
        .collect();
    let peak = assignment.placement.total + outside;
    let plan = Plan {
        schema: PLAN_SCHEMA.to_owned(),
        budget: options.budget,
        threads: options.threads,
        arena: Bytes(assignment.placement.total as u64),
        arena_lower_bound: Bytes(live.iter().copied().max().unwrap_or(0) as u64),
        outside_arena: Bytes(outside as u64),
        heap_limit: options.budget.map(|b| b.saturating_sub(Bytes(peak as u64))),
        predicted_peak: Bytes(peak as u64),
        predicted_seconds: Seconds(timeline.total),
        predicted_stall: Seconds(timeline.stall),
        predicted_row_seconds: None,
        weights_total: Bytes(program.weights.iter().map(|w| w.stored_bytes() as u64).sum()),
        streamed_per_run: streamed,
        peak_at,
        buffers,
        instructions,
        weights,
        decisions,
    };
    Layout { program, assignment, plan }
}

impl Plan {
    /// Fraction by which the arena exceeds its lower bound.
    pub fn arena_excess(&self) -> f64 {
        self.arena.0 as f64 / (self.arena_lower_bound.0 as f64).max(1.0) - 1.0
    }

    /// The buffers that are alive at the peak, largest first.
    pub fn peak_holders(&self) -> Vec<&PlannedBuffer> {
        let mut alive: Vec<&PlannedBuffer> =
            self.buffers.iter().filter(|b| (b.first..=b.last).contains(&self.peak_at)).collect();
        alive.sort_by_key(|b| std::cmp::Reverse(b.size));
        alive
    }

    /// The timeline as a picture: a self-contained SVG in which a person sees which tensor occupies which bytes
    /// when, and what sets the peak.
    pub fn to_svg(&self) -> String {
        svg::draw(self)
    }
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(budget) = self.budget {
            writeln!(f, "budget            {budget}")?;
        }
        writeln!(f, "predicted peak    {} (beyond the program's own fixed cost)", self.predicted_peak)?;
        writeln!(
            f,
            "arena             {} ({:.1} % above the largest live set, {})",
            self.arena,
            self.arena_excess() * 100.0,
            self.arena_lower_bound
        )?;
        let resident: Bytes = self.weights.iter().filter(|w| w.streamed_at.is_none()).map(|w| w.size).sum();
        writeln!(
            f,
            "weights           {} in the model, {resident} stay in memory, {} are read at each run",
            self.weights_total, self.streamed_per_run
        )?;
        writeln!(
            f,
            "predicted time    {} on {} thread{}, {} of it waiting for weights",
            self.predicted_seconds,
            self.threads,
            if self.threads == 1 { "" } else { "s" },
            self.predicted_stall
        )?;
        if let Some(seconds) = self.predicted_row_seconds {
            writeln!(f, "for one row       {seconds}")?;
        }
        if let Some(at) = self.instructions.get(self.peak_at) {
            writeln!(f, "peak at           {} ({})", at.name, at.op)?;
            for b in self.peak_holders().iter().take(5) {
                writeln!(f, "                  {:>10}  {}", b.size.to_string(), b.name)?;
            }
        }
        for d in &self.decisions {
            write!(f, "{:<17} {}", d.technique, d.what)?;
            if d.bytes > Bytes::ZERO {
                write!(f, " ({})", d.bytes)?;
            }
            writeln!(f, ": {}", d.why)?;
        }
        Ok(())
    }
}
