//! Any bytes as test data of each kind; what is read can be written and read again.
#![no_main]

use lightering_formats::onnx::proto::TypeProto;
use lightering_formats::onnx::{read_value, write_value};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let bytes = data.to_vec();
    let element = Box::new(TypeProto::Tensor { elem_type: 1, shape: None });
    for declared in [
        TypeProto::Unset,
        TypeProto::Sequence(element.clone()),
        TypeProto::Optional(element.clone()),
        TypeProto::Map { key_type: 7, value_type: element },
    ] {
        let Ok(value) = read_value(&bytes, &declared) else { continue };
        let mut out = Vec::new();
        if write_value("v", &value, &mut out).is_ok() {
            read_value(&out, &declared).expect("what was written can be read");
        }
    }
});
