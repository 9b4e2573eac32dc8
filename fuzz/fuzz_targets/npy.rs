//! Any bytes as an array; what is read can be written and read again.
#![no_main]

use lightering_formats::npy;
use lightering_graph::DType;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    for opaque in [None, Some(DType::BF16), Some(DType::F8E4M3FN)] {
        let Ok(tensor) = npy::read_as(&mut &data[..], opaque) else { continue };
        let mut out = Vec::new();
        npy::write(&tensor, &mut out).expect("an array of few dimensions can be written");
        let again = npy::read_as(&mut &out[..], opaque).expect("what was written can be read");
        assert_eq!(again.as_bytes(), tensor.as_bytes());
        assert_eq!(again.dims(), tensor.dims());
    }
});
