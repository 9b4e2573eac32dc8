//! Any bytes as a training's checkpoint and as its state: refused, or with the right checksum.
#![no_main]

use lightering_train::checkpoint::{TrainState, check_checkpoint};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = check_checkpoint(data);
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = TrainState::from_json(text);
    }
});
