//! Files that are either the old or the new ones, whatever happens meanwhile.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::TrainError;

/// What a file is called until it is complete.
pub(crate) const PARTIAL: &str = "partial";

/// A file that is being written.
pub(crate) trait Output: Write {
    /// Waits until everything is on the medium.
    fn sync(&mut self) -> io::Result<()>;
}

impl Output for BufWriter<File> {
    fn sync(&mut self) -> io::Result<()> {
        self.flush()?;
        self.get_ref().sync_all()
    }
}

/// Opens a file for writing; tests open ones that fail.
pub(crate) type Open<'a> = &'a dyn Fn(&Path) -> io::Result<Box<dyn Output>>;

pub(crate) fn create(path: &Path) -> io::Result<Box<dyn Output>> {
    Ok(Box::new(BufWriter::with_capacity(1 << 18, File::create(path)?)))
}

/// Writes a file under another name in the same folder, brings it to the medium, and only then gives it its name. If
/// anything fails, the file that was there stays.
pub(crate) fn replace(
    path: &Path,
    open: Open<'_>,
    write: &mut dyn FnMut(&mut dyn Write) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".");
    partial.push(PARTIAL);
    let partial = PathBuf::from(partial);
    let failed = |e| TrainError::io(path, e);
    let written = open(&partial).map_err(failed).and_then(|mut out| {
        write(&mut *out)?;
        out.sync().map_err(failed)
    });
    let renamed = written.and_then(|()| fs::rename(&partial, path).map_err(failed));
    if renamed.is_err() {
        // What failed is the error to report; the rest of it may not even exist.
        let _ = fs::remove_file(&partial);
        return renamed;
    }
    // The new name is on the medium only when the folder is.
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|f| f.sync_all()).map_err(failed)
}
