//! Small files of the daemon's own: whole and on the disk, or as they were.

use std::fs::{self, File};
use std::io::{Result, Write};
use std::path::Path;

/// Replaces a file in a folder.
///
/// # Errors
/// What the system says; the file is as it was.
pub fn replace(folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let temporary = folder.join(format!("{name}.tmp"));
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, folder.join(name))?;
    File::open(folder)?.sync_all()
}
