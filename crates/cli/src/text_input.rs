//! Text from a file or from stdin.

use crate::failure::{Failure, Outcome};
use anyhow::Context;
use lightering_units::Bytes;
use std::io::{self, Read};
use std::path::Path;

/// The text in a file, or on stdin for `-` and without a file.
pub fn read_text(file: Option<&Path>, limit: u64) -> Outcome<String> {
    let file = file.filter(|file| *file != Path::new("-"));
    let place = file.map_or("stdin".to_owned(), |file| file.display().to_string());
    let source: Box<dyn Read> = match file {
        Some(file) => Box::new(std::fs::File::open(file).with_context(|| format!("opening {place}"))?),
        None => Box::new(io::stdin().lock()),
    };
    let mut bytes = Vec::new();
    source.take(limit + 1).read_to_end(&mut bytes).with_context(|| format!("reading {place}"))?;
    if bytes.len() as u64 > limit {
        let what = format!("{place}: longer than {}, the limit", Bytes(limit));
        return Err(Failure::input(what, "the text in several parts"));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Failure::input(format!("{place}: byte {at} is not UTF-8; expected a text in UTF-8"), "iconv -t UTF-8")
    })
}
