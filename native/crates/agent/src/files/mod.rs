//! Files of the sandbox: look, read, write, change. Everything here may block and runs on worker threads.

mod change;
mod copy;
mod entry;
mod list;
mod path;
mod read;
mod replace;
mod tree;
mod write;

pub use change::{chmod, chown, mkdir, remove, rename};
pub use copy::copy;
pub use entry::stat;
pub use list::list;
pub use path::{check_place, checked_path};
pub use read::{FileReader, ReadStep};
pub use replace::replace;
pub use write::{FileWriter, WriteStep};

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{SystemTime, UNIX_EPOCH};

/// Directory entries, not what they point to, without the kernel's `.` and `..`.
pub fn names_in(directory: &OwnedFd) -> nix::Result<Vec<OsString>> {
    use std::os::unix::ffi::OsStringExt;
    let own = nix::fcntl::openat(
        directory,
        ".",
        nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_DIRECTORY | nix::fcntl::OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )?;
    let mut names = Vec::new();
    for entry in nix::dir::Dir::from_fd(own)?.iter() {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name));
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// A name no program of the sandbox will hit upon, for a file on its way to another name.
pub fn temporary_name(fd: &OwnedFd) -> String {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_nanos());
    format!(".sandgate-{nanos:x}-{:x}.tmp", fd.as_raw_fd())
}
