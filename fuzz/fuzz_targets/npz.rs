//! Any bytes as an archive of arrays.
#![no_main]

use std::io::Cursor;

use lightering_formats::npy;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(arrays) = npy::read_npz(Cursor::new(data)) else { return };
    let _ = npy::write_npz(arrays.iter().map(|(n, t)| (n.as_str(), t)), true, Cursor::new(Vec::new()));
});
