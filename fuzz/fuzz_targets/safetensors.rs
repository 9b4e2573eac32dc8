//! Any bytes as a safetensors file; every tensor lies inside.
#![no_main]

use lightering_formats::safetensors::SafetensorsFile;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let bytes = data.to_vec();
    let Ok(file) = SafetensorsFile::read(&bytes) else { return };
    for tensor in &file.tensors {
        assert!(tensor.offset + tensor.size.0 <= bytes.len() as u64);
    }
});
