//! What the program itself costs: its part of a whole run of the embedded model, in a process of its own.

use crate::embedded;
use crate::failure::{Exit, Failure, Outcome};
use anyhow::Context;
use lightering_meter::Receipt;
use lightering_units::Bytes;
use std::process::{Command, Stdio};

/// Steps of the figure that is told.
const ROUNDING: u64 = 256 << 10;

/// Runs this program on the embedded model and picture, and tells what of the peak that the kernel saw is the program
/// and not the model.
pub fn measure() -> Outcome<Bytes> {
    let folder = TemporaryFolder::new()?;
    let put = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).with_context(|| format!("writing {}", path.display())).map(|()| path)
    };
    let model = put(embedded::MODEL_NAME, embedded::MODEL)?;
    let picture = put(embedded::PICTURE_NAME, embedded::PICTURE)?;
    let receipt = folder.path().join("receipt.json");
    let program = std::env::current_exe().context("finding this program's own file")?;
    let child = Command::new(&program)
        .args(["run", "--quiet", "--input"])
        .arg(&picture)
        .arg("--receipt")
        .arg(&receipt)
        .arg(&model)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .with_context(|| format!("running {}", program.display()))?;
    if !child.status.success() {
        let said = String::from_utf8_lossy(&child.stderr);
        return Err(Failure::new(
            Exit::Internal,
            anyhow::anyhow!("the run that measures the fixed cost failed: {}", said.trim()),
        ));
    }
    let text = std::fs::read_to_string(&receipt).with_context(|| format!("reading {}", receipt.display()))?;
    let receipt: Receipt =
        serde_json::from_str(&text).context("reading the receipt of the run that measures")?;
    // Rounded up: runs differ by some pages.
    let told = |fixed: Bytes| Bytes(fixed.0 + ROUNDING).align_up(ROUNDING);
    receipt
        .measured
        .fixed_bytes
        .map(told)
        .ok_or_else(|| Failure::input("this system does not tell the resident memory of a process", "Linux"))
}

/// A folder that is removed with its content.
#[derive(Debug)]
pub struct TemporaryFolder(std::path::PathBuf);

impl TemporaryFolder {
    /// A new folder that only this user can read.
    pub fn new() -> Outcome<TemporaryFolder> {
        let base = std::env::temp_dir();
        for attempt in 0..100u32 {
            let path = base.join(format!("lighter-{}-{attempt}", std::process::id()));
            let mut builder = std::fs::DirBuilder::new();
            #[cfg(unix)]
            std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
            match builder.create(&path) {
                Ok(()) => return Ok(TemporaryFolder(path)),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    return Err(Failure::from(error).context(format!("creating {}", path.display())));
                }
            }
        }
        Err(Failure::input(
            format!("{} is full of folders of earlier runs", base.display()),
            "removing the folders lighter-* there",
        ))
    }

    /// The folder.
    pub fn path(&self) -> &std::path::Path {
        &self.0
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        // A folder that cannot be removed harms nobody.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
