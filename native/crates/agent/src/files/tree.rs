//! Doing something to everything below a directory, links not followed.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat};

use super::names_in;
use super::path::is_type;

/// Deeper trees would use up descriptors and stack; `rm -rf` in the sandbox can still handle them.
const DEPTH_MAX: usize = 1000;
const DIRECTORY: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC).union(OFlag::O_NOFOLLOW);

/// Call `visit` for `name` and all below it, a directory's content before the directory. Returns how many there were.
pub fn visit(
    directory: &OwnedFd,
    name: &OsStr,
    visit: &mut dyn FnMut(&OwnedFd, &OsStr, &FileStat) -> nix::Result<()>,
) -> nix::Result<u64> {
    let stat = fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    descend(directory, name, &stat, visit, 0)
}

fn descend(
    directory: &OwnedFd,
    name: &OsStr,
    stat: &FileStat,
    visit: &mut dyn FnMut(&OwnedFd, &OsStr, &FileStat) -> nix::Result<()>,
    depth: usize,
) -> nix::Result<u64> {
    let mut count = 1;
    if is_type(stat, SFlag::S_IFDIR) {
        if depth > DEPTH_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        let inner = openat(directory, name, DIRECTORY, Mode::empty())?;
        for child in names_in(&inner)? {
            match fstatat(&inner, child.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(stat) => count += descend(&inner, &child, &stat, visit, depth + 1)?,
                Err(Errno::ENOENT) => {} // somebody else was faster
                Err(errno) => return Err(errno),
            }
        }
    }
    visit(directory, name, stat)?;
    Ok(count)
}
