//! Any bytes as a chunk trace; what is taken names only chunks that its header has.
#![no_main]

use lightering_tier::{ChunkTrace, TRACE_MAX_BYTES, TraceWriter};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(trace) = ChunkTrace::parse(data) else { return };
    let mut out = Vec::new();
    let mut writer =
        TraceWriter::new(&mut out, trace.header(), TRACE_MAX_BYTES).expect("what was read can be written");
    let mut step = 0;
    for turn in trace.turns() {
        while step < turn.step {
            writer.end_step().expect("it fits");
            step += 1;
        }
        writer.turn(turn.group, turn.uses, turn.computing).expect("it fits");
    }
    while step < trace.steps() {
        writer.end_step().expect("it fits");
        step += 1;
    }
    writer.finish().expect("memory can be written");
    let again = ChunkTrace::parse(&out).expect("what was written can be read");
    assert_eq!((again.turn_count(), again.use_count()), (trace.turn_count(), trace.use_count()));
});
