//! Any bytes as a GGUF file; every tensor lies inside, and header and data can be written and read again.
#![no_main]

use lightering_formats::gguf::{GgufFile, GgufWriter};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let bytes = data.to_vec();
    let Ok(file) = GgufFile::read(&bytes) else { return };
    let mut writer = GgufWriter::with_metadata(file.metadata.clone());
    for tensor in &file.tensors {
        writer.tensor(&tensor.name, &tensor.dims, tensor.format).expect("what was read can be written");
    }
    let mut out = writer.begin(Vec::new()).expect("the header can be written");
    for tensor in &file.tensors {
        let start = tensor.offset as usize;
        out.write(&bytes[start..start + tensor.size.0 as usize]).expect("the data fits");
    }
    let again = out.finish().expect("the file is whole");
    let again = GgufFile::read(&again).expect("what was written can be read");
    assert_eq!(again.tensors.len(), file.tensors.len());
});
