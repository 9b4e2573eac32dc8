//! Any bytes as an IDX file; every sample can be read.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = lightering_train::check_idx(data);
});
