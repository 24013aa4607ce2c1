//! Small files of the system's own, replaced in as few system calls as that takes: in gVisor each costs some 50 µs, and a
//! claim waits for all of them.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{OpError, OpResult};

const MODE: u32 = 0o644;

static SERIAL: AtomicU64 = AtomicU64::new(0);

/// Give `path` this content, of ours and readable for all; whoever reads meanwhile finds the old or the new. A link
/// makes way for a file. The directory must exist.
pub fn replace(path: &str, text: &str) -> OpResult<()> {
    let draft = format!("{path}.sandgate-{}.tmp", SERIAL.fetch_add(1, Ordering::Relaxed));
    let written = create(&draft).and_then(|mut file| file.write_all(text.as_bytes()));
    written.and_then(|()| fs::rename(&draft, path)).map_err(|error| {
        // It may not be there at all.
        let _ = fs::remove_file(&draft);
        OpError::of_io(&error, path)
    })
}

fn create(path: &str) -> std::io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(MODE).custom_flags(libc::O_NOFOLLOW).open(path)
}
