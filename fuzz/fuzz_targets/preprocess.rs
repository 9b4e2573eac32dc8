//! Any text as preprocessing, applied to pictures of several shapes.
#![no_main]

use lightering_formats::image::{Picture, Preprocess};

libfuzzer_sys::fuzz_target!(|text: &str| {
    let Ok(how) = text.parse::<Preprocess>() else { return };
    let again: Preprocess = how.to_string().parse().expect("what is printed can be read");
    assert_eq!(again, how);
    // Larger results are legal, but only slow the fuzzer down.
    let large = [how.resize, how.crop, how.short.map(|s| (s, s))].into_iter().flatten();
    if large.into_iter().any(|(w, h)| w > 300 || h > 300) {
        return;
    }
    for (width, height) in [(1, 1), (5, 3), (1, 9), (40, 2)] {
        let picture = Picture::from_rgb(width, height, vec![77; (width * height * 3) as usize]);
        let _ = how.apply(&picture.expect("a valid picture"));
    }
});
