//! Any config.json, tokenizer.json, tokenizer_config.json and safetensors file, separated by the byte 0: refused, or
//! converted into a GGUF file that can be read.
#![no_main]

use std::sync::Arc;

use lightering_formats::gguf::GgufFile;
use lightering_lm::{CheckpointFiles, Conversion, ConversionOptions, Tokenizer};
use lightering_tier::ByteSource;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut parts = data.splitn(4, |byte| *byte == 0);
    let mut next = || -> Arc<dyn ByteSource> { Arc::new(parts.next().unwrap_or_default().to_vec()) };
    let files = CheckpointFiles {
        name: String::new(),
        config: next(),
        tokenizer: Some(next()),
        tokenizer_config: Some(next()),
        weights: vec![next()],
        generation_config: None,
        chat_template: None,
    };
    let Ok(mut conversion) = Conversion::of_checkpoint(&files) else { return };
    conversion.set_recipe("q8_0".parse().expect("a format that can be written"));
    let Ok((bytes, _)) = conversion.write(Vec::new(), ConversionOptions::default(), &mut |_| ()) else { return };
    let file = GgufFile::read(&bytes).expect("what was written can be read");
    let _ = Tokenizer::from_gguf(&file.metadata);
});
