//! Any bytes as a model: reading, importing, exporting again and importing that.
#![no_main]

use lightering_formats::onnx::proto::Message;
use lightering_formats::onnx::{ModelFile, export, import};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(file) = ModelFile::from_bytes(data.to_vec()) else { return };
    let _ = file.write_to(&mut Vec::new());
    let Ok(imported) = import(&file) else { return };
    imported.graph.verify().expect("an imported graph verifies");
    let Ok(model) = export(&imported.graph, &imported.sources) else { return };
    let bytes = model.to_writer(None).and_then(|w| w.into_bytes());
    let Ok(bytes) = bytes else { return };
    let again = ModelFile::from_bytes(bytes).expect("what was written can be read");
    let _ = import(&again);
});
