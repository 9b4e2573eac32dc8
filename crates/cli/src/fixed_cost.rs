//! What the program itself costs: a whole run on a model of a few bytes, in a process of its own.

use crate::failure::{Failure, Outcome};
use anyhow::Context;
use lightering_meter::Receipt;
use lightering_units::Bytes;
use std::process::{Command, Stdio};

/// One Identity node over one number.
const IDENTITY: &[u8] = include_bytes!("../../../assets/identity.onnx");

/// Runs this program on a model of a few bytes and tells the peak that the kernel saw.
pub fn measure() -> Outcome<Bytes> {
    let folder = TemporaryFolder::new()?;
    let model = folder.path().join("identity.onnx");
    let receipt = folder.path().join("receipt.json");
    std::fs::write(&model, IDENTITY).with_context(|| format!("writing {}", model.display()))?;
    let program = std::env::current_exe().context("finding this program's own file")?;
    let child = Command::new(&program)
        .arg("bench")
        .arg(&model)
        .args(["--quiet", "--warmup", "0", "--runs", "1", "--receipt"])
        .arg(&receipt)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .with_context(|| format!("running {}", program.display()))?;
    if !child.status.success() {
        return Err(Failure {
            exit: crate::failure::Exit::Internal,
            error: anyhow::anyhow!(
                "the run that measures the fixed cost failed: {}",
                String::from_utf8_lossy(&child.stderr).trim()
            ),
            hint: None,
        });
    }
    let text = std::fs::read_to_string(&receipt).with_context(|| format!("reading {}", receipt.display()))?;
    let receipt: Receipt =
        serde_json::from_str(&text).context("reading the receipt of the run that measures")?;
    receipt.measured.peak_resident_bytes.ok_or_else(|| {
        Failure::input("this system does not tell the peak resident memory of a process", "Linux")
    })
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
