//! Any bytes as a picture, which is then made ready for a model.
#![no_main]

use lightering_formats::image::{Picture, Preprocess};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(picture) = Picture::decode(data) else { return };
    if u64::from(picture.width()) * u64::from(picture.height()) > 1 << 20 {
        return;
    }
    let how: Preprocess = "resize=9x7,fit=letterbox,filter=bicubic".parse().expect("a valid text");
    how.apply(&picture).expect("a small result");
});
