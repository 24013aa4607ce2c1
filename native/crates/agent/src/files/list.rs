//! Listing a directory to some depth.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, SFlag, fstatat};
use serde::{Deserialize, Serialize};

use super::entry::Entry;
use super::names_in;
use super::path::{Links, is_type, locate};
use crate::error::{OpError, OpResult};
use crate::users::Users;

const LIMIT: usize = 20_000;
/// Room left in a frame for what surrounds the entries.
const REPLY_BYTES_MAX: usize = 7 * 1024 * 1024;
/// JSON of an entry beside its name and path.
const ENTRY_BYTES: usize = 300;
const DIRECTORY: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC).union(OFlag::O_NOFOLLOW);

#[derive(Deserialize)]
pub struct List {
    path: String,
    #[serde(default = "one")]
    depth: usize,
    #[serde(default = "limit")]
    limit: usize,
    roots: Option<Vec<String>>,
}

fn one() -> usize {
    1
}

fn limit() -> usize {
    LIMIT
}

#[derive(Serialize)]
pub struct Listing {
    path: String,
    entries: Vec<Entry>,
    truncated: bool,
    resolved_path: String,
}

struct Walk<'a> {
    users: &'a Users,
    limit: usize,
    bytes: usize,
    entries: Vec<Entry>,
    truncated: bool,
}

/// Entries below a directory, depth first, each directory's sorted by name. Links are not followed below `path`.
pub fn list(arguments: &List, users: &Users) -> OpResult<Listing> {
    if arguments.depth == 0 || arguments.limit == 0 {
        return Err(OpError::bad_request("depth and limit must be at least 1"));
    }
    let target = locate(&arguments.path, Links::Follow, arguments.roots.as_deref())?;
    let directory = openat(&target.directory, target.name.as_os_str(), DIRECTORY, Mode::empty())
        .map_err(|errno| target.error(errno))?;
    let shown: PathBuf = Path::new(&arguments.path).components().collect();
    let mut walk = Walk { users, limit: arguments.limit.min(LIMIT), bytes: 0, entries: Vec::new(), truncated: false };
    walk.descend(&directory, &shown, arguments.depth).map_err(|errno| target.error(errno))?;
    Ok(Listing {
        path: shown.to_string_lossy().into_owned(),
        entries: walk.entries,
        truncated: walk.truncated,
        resolved_path: target.path().to_string_lossy().into_owned(),
    })
}

impl Walk<'_> {
    fn descend(&mut self, directory: &OwnedFd, path: &Path, depth: usize) -> nix::Result<()> {
        for name in names_in(directory)? {
            let stat = match fstatat(directory, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
                Err(Errno::ENOENT) => continue, // removed since its name was read
                other => other?,
            };
            let path = path.join(&name);
            self.bytes += ENTRY_BYTES + path.as_os_str().len() * 2;
            if self.entries.len() >= self.limit || self.bytes > REPLY_BYTES_MAX {
                self.truncated = true;
                return Ok(());
            }
            self.entries.push(Entry::new(&path, directory, &name, &stat, self.users));
            if depth > 1 && is_type(&stat, SFlag::S_IFDIR) {
                match openat(directory, name.as_os_str(), DIRECTORY, Mode::empty()) {
                    Ok(inner) => self.descend(&inner, &path, depth - 1)?,
                    // Gone, replaced or closed to us: it is listed, its content is not.
                    Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::EACCES) => {}
                    Err(errno) => return Err(errno),
                }
            }
            if self.truncated {
                return Ok(());
            }
        }
        Ok(())
    }
}
