//! `lighter man`

use crate::arguments::Arguments;
use crate::failure::{Exit, Outcome};
use anyhow::Context;
use clap::CommandFactory;
use std::io::Write;
use std::path::Path;

/// Writes the manual page to stdout, or one page per command into `folder`.
pub fn run(folder: Option<&Path>) -> Outcome {
    let command = Arguments::command();
    match folder {
        Some(folder) => {
            std::fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
            clap_mangen::generate_to(command, folder)
                .with_context(|| format!("writing the manual pages to {}", folder.display()))?;
        }
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command).render(&mut page)?;
            std::io::stdout().write_all(&page)?;
        }
    }
    Ok(Exit::Done)
}
