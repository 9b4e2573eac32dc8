//! How long a plan will take on this machine.

use lightering_meter::DiskPattern;
use lightering_units::Bytes;

use super::{Assignment, PlanOptions};
use crate::kernel::Kernel;
use crate::program::{Program, Weight};
use lightering_graph::Cost;

/// What the machine does in a second, for the given number of threads.
#[derive(Clone, Debug)]
pub(crate) struct Rates {
    flops: f64,
    memory: f64,
    disk: f64,
    disk_write: f64,
    direct: bool,
    threads: f64,
    cores: f64,
}

/// Cost of calling a kernel at all: locks, loans, waking a second thread.
const CALL_SECONDS: f64 = 3e-6;
/// Cost of one request to the store.
const READ_SECONDS: f64 = 10e-6;
/// Rate of writing past the page cache as part of the rate of reading; the machine profile has no measurement of its own.
const WRITING_TO_READING: f64 = 0.5;
/// Bytes of a weight that one core copies out of the page cache and packs in a second.
const PACKED_PER_SECOND: f64 = 4e9;

impl Rates {
    pub fn new(options: &PlanOptions) -> Rates {
        let threads = options.threads as u32;
        let disk = options.profile.disk_read_at(DiskPattern::Sequential, options.direct_reads, Bytes::mib(1));
        let direct = options.profile.disk_read_at(DiskPattern::Sequential, true, Bytes::mib(1));
        Rates {
            flops: options.profile.gemm_f32_at(threads).0,
            memory: options.profile.memory_bandwidth_at(threads).0,
            disk: disk.map_or(200e6, |d| d.0),
            disk_write: direct.map_or(100e6, |d| d.0 * WRITING_TO_READING),
            direct: options.direct_reads,
            threads: options.threads as f64,
            cores: f64::from(options.profile.cores.max(1)),
        }
    }

    /// One call of a kernel.
    pub fn cost(&self, kernel: &Kernel, cost: &Cost) -> f64 {
        let compute = cost.flops.0 / (self.flops * kernel.efficiency());
        let move_bytes = (cost.bytes_read.0 + cost.bytes_written.0) as f64 / self.memory;
        compute.max(move_bytes) + CALL_SECONDS
    }

    /// Reading bytes that need no packing.
    pub fn reading(&self, bytes: usize) -> f64 {
        READ_SECONDS + bytes as f64 / self.disk
    }

    /// Writing bytes past the page cache.
    pub fn writing(&self, bytes: usize) -> f64 {
        READ_SECONDS + bytes as f64 / self.disk_write
    }

    /// What a core works on a weight: nothing where the disk puts it straight into its place.
    fn packing(&self, weight: &Weight) -> f64 {
        if self.direct && weight.packing.is_plain() {
            return 0.0;
        }
        weight.stored_bytes() as f64 / PACKED_PER_SECOND
    }

    /// Reading and packing a weight.
    fn load(&self, weight: &Weight) -> f64 {
        self.reading(weight.stored_bytes()) + self.packing(weight)
    }
}

pub(crate) struct Timeline {
    /// Per instruction, without waiting.
    pub compute: Vec<f64>,
    pub total: f64,
    pub stall: f64,
}

/// Walks the instructions with one reader beside them that loads weights in the order in which they are needed.
pub(crate) fn timeline(program: &Program, assignment: &Assignment, rates: &Rates) -> Timeline {
    let compute = program.instructions.iter().map(|i| rates.cost(&i.kernel, &i.cost)).collect();
    timeline_of(program, assignment, rates, compute)
}

/// The same for given times of the instructions.
pub(crate) fn timeline_of(
    program: &Program,
    assignment: &Assignment,
    rates: &Rates,
    compute: Vec<f64>,
) -> Timeline {
    let mut loads: Vec<(usize, usize, usize)> = assignment
        .loads
        .iter()
        .enumerate()
        .filter_map(|(w, l)| l.as_ref().map(|l| (l.needed, l.issue, w)))
        .collect();
    loads.sort_unstable();
    let (mut now, mut stall, mut reader_free) = (0.0f64, 0.0f64, 0.0f64);
    let mut writer_free = 0.0f64;
    let mut written = vec![0.0f64; program.spills.len()];
    let mut start = Vec::with_capacity(compute.len());
    let mut next = 0;
    for (i, seconds) in compute.iter().enumerate() {
        start.push(now);
        let mut ready = now;
        match program.instructions[i].kernel {
            Kernel::SpillStart(spill) => {
                let size = program.weights[program.spills[spill].weight].size;
                writer_free = writer_free.max(now) + rates.writing(size);
                written[spill] = writer_free;
            }
            Kernel::SpillEnd(spill) => ready = ready.max(written[spill]),
            _ => {}
        }
        while next < loads.len() && loads[next].0 == i {
            let (_, issue, w) = loads[next];
            reader_free = reader_free.max(start[issue.min(i)]) + rates.load(&program.weights[w]);
            ready = ready.max(reader_free);
            next += 1;
        }
        stall += ready - now;
        now = ready + seconds;
    }
    // The reader is a thread, too: where all cores compute already, what it works takes from them.
    let packing: f64 = loads.iter().map(|&(.., w)| rates.packing(&program.weights[w])).sum();
    let work = compute.iter().sum::<f64>() * rates.threads.min(rates.cores) + packing;
    let total = now.max(work / rates.cores);
    Timeline { compute, total, stall: stall + (total - now) }
}
