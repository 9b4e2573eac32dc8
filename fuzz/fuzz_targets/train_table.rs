//! Any bytes as a table of comma-separated values: refused, or samples whose labels are classes.
#![no_main]

use lightering_train::{Dataset, check_table};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(set) = check_table(data) {
        assert_eq!(set.features().len(), 2);
    }
});
