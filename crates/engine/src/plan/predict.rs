//! How long a plan will take on this machine.

use lightering_meter::DiskPattern;
use lightering_units::Bytes;

use super::{Assignment, PlanOptions};
use crate::program::Program;

/// What the machine does in a second, for the given number of threads.
#[derive(Clone, Debug)]
pub(crate) struct Rates {
    flops: f64,
    memory: f64,
    disk: f64,
    threads: f64,
    cores: f64,
}

/// Cost of calling a kernel at all: locks, loans, waking a second thread.
const CALL_SECONDS: f64 = 3e-6;
/// Cost of one request to the store.
const READ_SECONDS: f64 = 10e-6;
/// Bytes of a weight that one core copies out of the page cache and packs in a second.
const PACKED_PER_SECOND: f64 = 4e9;

impl Rates {
    pub fn new(options: &PlanOptions) -> Rates {
        let threads = options.threads as u32;
        let disk = options.profile.disk_read_at(DiskPattern::Sequential, false, Bytes::mib(1));
        Rates {
            flops: options.profile.gemm_f32_at(threads).0,
            memory: options.profile.memory_bandwidth_at(threads).0,
            disk: disk.map_or(200e6, |d| d.0),
            threads: options.threads as f64,
            cores: f64::from(options.profile.cores.max(1)),
        }
    }

    fn instruction(&self, i: &crate::program::Instruction) -> f64 {
        let efficiency = i.kernel.efficiency();
        let compute = i.cost.flops.0 / (self.flops * efficiency);
        let move_bytes = (i.cost.bytes_read.0 + i.cost.bytes_written.0) as f64 / self.memory;
        compute.max(move_bytes) + CALL_SECONDS
    }

    fn packing(&self, stored: usize) -> f64 {
        stored as f64 / PACKED_PER_SECOND
    }

    /// Reading and packing a weight.
    fn load(&self, stored: usize) -> f64 {
        READ_SECONDS + stored as f64 / self.disk + self.packing(stored)
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
    let compute: Vec<f64> = program.instructions.iter().map(|i| rates.instruction(i)).collect();
    let mut loads: Vec<(usize, usize, usize)> = assignment
        .loads
        .iter()
        .enumerate()
        .filter_map(|(w, l)| l.as_ref().map(|l| (l.needed, l.issue, w)))
        .collect();
    loads.sort_unstable();
    let (mut now, mut stall, mut reader_free) = (0.0f64, 0.0f64, 0.0f64);
    let mut start = Vec::with_capacity(compute.len());
    let mut next = 0;
    for (i, seconds) in compute.iter().enumerate() {
        start.push(now);
        let mut ready = now;
        while next < loads.len() && loads[next].0 == i {
            let (_, issue, w) = loads[next];
            reader_free =
                reader_free.max(start[issue.min(i)]) + rates.load(program.weights[w].stored_bytes());
            ready = ready.max(reader_free);
            next += 1;
        }
        stall += ready - now;
        now = ready + seconds;
    }
    // The reader is a thread, too: where all cores compute already, what it works takes from them.
    let packing: f64 = loads.iter().map(|&(.., w)| rates.packing(program.weights[w].stored_bytes())).sum();
    let work = compute.iter().sum::<f64>() * rates.threads.min(rates.cores) + packing;
    let total = now.max(work / rates.cores);
    Timeline { compute, total, stall: stall + (total - now) }
}
