//! Changes to the tree: make, move, remove, permissions, owners.

use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, RenameFlags, renameat2};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, mkdirat};
use nix::unistd::{UnlinkatFlags, fchownat, unlinkat};
use serde::Deserialize;
use serde_json::{Value, json};

use super::copy::move_across;
use super::entry::{Entry, MODE_BITS};
use super::path::{Links, Target, give, is_type, locate, make_directories};
use super::tree;
use crate::error::{Code, OpError, OpResult};
use crate::users::Users;

#[derive(Deserialize)]
pub struct Mkdir {
    path: String,
    mode: Option<u32>,
    #[serde(default)]
    parents: bool,
    user: Option<String>,
    roots: Option<Vec<String>>,
}

/// Make a directory. With `parents`, one that exists already is fine.
pub fn mkdir(arguments: &Mkdir, users: &Users) -> OpResult<Entry> {
    let owner = users.find(arguments.user.as_deref())?;
    let mode = checked_mode(arguments.mode.unwrap_or(0o755))?;
    let roots = arguments.roots.as_deref();
    if arguments.parents {
        super::checked_path(arguments.path.clone())?;
        make_directories(Path::new(&arguments.path), mode.bits(), roots, &owner)?;
        return Entry::of_target(&arguments.path, &locate(&arguments.path, Links::Follow, roots)?, users);
    }
    let target = locate(&arguments.path, Links::Keep, roots)?;
    mkdirat(&target.directory, target.name.as_os_str(), mode)
        // The umask is the agent's, not the caller's.
        .and_then(|()| fchmodat(&target.directory, target.name.as_os_str(), mode, FchmodatFlags::FollowSymlink))
        .and_then(|()| give(&target.directory, &target.name, &owner))
        .map_err(|errno| target.error(errno))?;
    Entry::of_target(&arguments.path, &target, users)
}

fn checked_mode(mode: u32) -> OpResult<Mode> {
    Mode::from_bits(mode).filter(|_| mode <= MODE_BITS).ok_or_else(|| OpError::bad_request("mode must be 0 to 0o7777"))
}

#[derive(Deserialize)]
pub struct Rename {
    #[serde(rename = "source")]
    from: String,
    #[serde(rename = "destination")]
    to: String,
    #[serde(default = "yes")]
    overwrite: bool,
    roots: Option<Vec<String>>,
}

fn yes() -> bool {
    true
}

/// Move, also between file systems. A link is moved itself.
pub fn rename(arguments: &Rename, users: &Users) -> OpResult<Entry> {
    let roots = arguments.roots.as_deref();
    let from = locate(&arguments.from, Links::Keep, roots)?;
    let to = locate(&arguments.to, Links::Keep, roots)?;
    from.require_name()?;
    to.require_name()?;
    from.stat_existing()?;
    let flags = if arguments.overwrite { RenameFlags::empty() } else { RenameFlags::RENAME_NOREPLACE };
    let (old, new) = (from.name.as_os_str(), to.name.as_os_str());
    match renameat2(&from.directory, old, &to.directory, new, flags) {
        Err(Errno::EXDEV) => move_across(&from, &to, arguments.overwrite)?,
        Err(Errno::EINVAL) => return Err(OpError::bad_request("a directory cannot be moved into itself")),
        other => other.map_err(|errno| to.error(errno))?,
    }
    Entry::of_target(&arguments.to, &to, users)
}

#[derive(Deserialize)]
pub struct Chmod {
    path: String,
    mode: u32,
    #[serde(default)]
    recursive: bool,
    roots: Option<Vec<String>>,
}

/// Change permissions, of what a link points to; below a directory, links are left alone.
pub fn chmod(arguments: &Chmod, users: &Users) -> OpResult<Entry> {
    let mode = checked_mode(arguments.mode)?;
    let target = locate(&arguments.path, Links::Follow, arguments.roots.as_deref())?;
    change(&target, arguments.recursive, &mut |directory, name, stat| {
        if is_type(stat, SFlag::S_IFLNK) {
            return Ok(());
        }
        fchmodat(directory, name, mode, FchmodatFlags::FollowSymlink)
    })?;
    Entry::of_target(&arguments.path, &target, users)
}

#[derive(Deserialize)]
pub struct Chown {
    path: String,
    user: String,
    #[serde(default)]
    recursive: bool,
    roots: Option<Vec<String>>,
}

/// Give to a user and its group, what a link points to; below a directory, links themselves.
pub fn chown(arguments: &Chown, users: &Users) -> OpResult<Entry> {
    let owner = users.find(Some(&arguments.user))?;
    let target = locate(&arguments.path, Links::Follow, arguments.roots.as_deref())?;
    let (uid, gid) = (owner.uid.into(), owner.gid.into());
    change(&target, arguments.recursive, &mut |directory, name, _| {
        fchownat(directory, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
    })?;
    Entry::of_target(&arguments.path, &target, users)
}

type Change<'a> = dyn FnMut(&std::os::fd::OwnedFd, &std::ffi::OsStr, &nix::sys::stat::FileStat) -> nix::Result<()> + 'a;

fn change(target: &Target, recursive: bool, apply: &mut Change<'_>) -> OpResult<()> {
    let result = if recursive {
        tree::visit(&target.directory, &target.name, apply).map(drop)
    } else {
        let stat = target.stat_existing()?;
        apply(&target.directory, &target.name, &stat)
    };
    result.map_err(|errno| target.error(errno))
}

#[derive(Deserialize)]
pub struct Remove {
    path: String,
    #[serde(default)]
    recursive: bool,
    roots: Option<Vec<String>>,
}

/// Remove a file, a link, an empty directory, or with `recursive` a whole one.
pub fn remove(arguments: &Remove, _users: &Users) -> OpResult<Value> {
    let target = locate(&arguments.path, Links::Keep, arguments.roots.as_deref())?;
    target.require_name()?;
    let mut unlink = |directory: &_, name: &std::ffi::OsStr, stat: &_| {
        let is_dir = is_type(stat, SFlag::S_IFDIR);
        let flags = if is_dir { UnlinkatFlags::RemoveDir } else { UnlinkatFlags::NoRemoveDir };
        unlinkat(directory, name, flags)
    };
    let result = if arguments.recursive {
        tree::visit(&target.directory, &target.name, &mut unlink)
    } else {
        let stat = target.stat_existing()?;
        unlink(&target.directory, &target.name, &stat).map(|()| 1)
    };
    match result {
        Ok(removed) => Ok(json!({"removed": removed})),
        Err(Errno::EBUSY) => Err(OpError::new(Code::PermissionDenied, format!("{} is in use", arguments.path))),
        Err(errno) => Err(target.error(errno)),
    }
}
