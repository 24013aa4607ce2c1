//! Copying files and trees. The copy appears under its name only when it is complete.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::{OFlag, RenameFlags, openat, readlinkat, renameat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, symlinkat, unlinkat};
use serde::Deserialize;

use super::entry::{Entry, MODE_BITS};
use super::path::{Links, Target, give, is_type, locate};
use super::{names_in, temporary_name, tree};
use crate::error::{Code, OpError, OpResult};
use crate::users::{User, Users};

/// Deeper trees would use up descriptors and stack.
const DEPTH_MAX: usize = 1000;
const SOURCE: OFlag = OFlag::O_RDONLY.union(OFlag::O_NONBLOCK).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

#[derive(Deserialize)]
pub struct Copy {
    #[serde(rename = "source")]
    from: String,
    #[serde(rename = "destination")]
    to: String,
    #[serde(default)]
    recursive: bool,
    user: Option<String>,
    roots: Option<Vec<String>>,
}

/// Copy a file over or beside another, or with `recursive` a tree to a new name. Links in a tree stay links.
pub fn copy(arguments: &Copy, users: &Users) -> OpResult<Entry> {
    let roots = arguments.roots.as_deref();
    let owner = users.find(arguments.user.as_deref())?;
    let from = locate(&arguments.from, Links::Follow, roots)?;
    let to = locate(&arguments.to, Links::Follow, roots)?;
    to.require_name()?;
    let source = from.stat_existing()?;
    let is_dir = is_type(&source, SFlag::S_IFDIR);
    if is_dir && !arguments.recursive {
        return Err(OpError::new(Code::IsADirectory, format!("{} is a directory", arguments.from)));
    }
    if to.path().starts_with(from.path()) {
        return Err(OpError::bad_request("a copy cannot be made over or inside of its original"));
    }
    if let Some(existing) = to.stat().map_err(|errno| to.error(errno))? {
        if is_dir || is_type(&existing, SFlag::S_IFDIR) {
            return Err(OpError::new(Code::Exists, format!("{} exists", arguments.to)));
        }
        super::read::require_regular(&existing, &arguments.to)?;
    }
    copy_to(&from, &to, Some(&owner), true)?;
    Entry::of_target(&arguments.to, &to, users)
}

/// What `rename` cannot do between file systems: copy with owners, then remove the original.
pub fn move_across(from: &Target, to: &Target, overwrite: bool) -> OpResult<()> {
    copy_to(from, to, None, overwrite)?;
    remove_tree(&from.directory, &from.name).map_err(|errno| from.error(errno))
}

fn copy_to(from: &Target, to: &Target, owner: Option<&User>, overwrite: bool) -> OpResult<()> {
    let name = temporary_name(&to.directory);
    let temporary = OsStr::new(&name);
    let flags = if overwrite { RenameFlags::empty() } else { RenameFlags::RENAME_NOREPLACE };
    let result = copy_node((&from.directory, &from.name), (&to.directory, temporary), owner, 0)
        .and_then(|()| renameat2(&to.directory, temporary, &to.directory, to.name.as_os_str(), flags));
    result.map_err(|errno| {
        // Half a copy is worth nothing; if even removing it fails, the first error is the one to tell.
        let _ = remove_tree(&to.directory, temporary);
        match errno {
            Errno::ENXIO => {
                OpError::new(Code::NotRegular, format!("{} holds a device, socket or FIFO", from.path().display()))
            }
            errno => to.error(errno),
        }
    })
}

fn remove_tree(directory: &OwnedFd, name: &OsStr) -> nix::Result<()> {
    tree::visit(directory, name, &mut |directory, name, stat| {
        let is_dir = is_type(stat, SFlag::S_IFDIR);
        unlinkat(directory, name, if is_dir { UnlinkatFlags::RemoveDir } else { UnlinkatFlags::NoRemoveDir })
    })
    .map(drop)
}

type Place<'a> = (&'a OwnedFd, &'a OsStr);

fn copy_node(from: Place<'_>, to: Place<'_>, owner: Option<&User>, depth: usize) -> nix::Result<()> {
    let stat = fstatat(from.0, from.1, nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if depth > DEPTH_MAX {
        return Err(Errno::ENAMETOOLONG);
    }
    if is_type(&stat, SFlag::S_IFDIR) {
        copy_directory(from, to, &stat, owner, depth)
    } else if is_type(&stat, SFlag::S_IFLNK) {
        symlinkat(readlinkat(from.0, from.1)?.as_os_str(), to.0, to.1)?;
        own(to, &stat, owner)
    } else if is_type(&stat, SFlag::S_IFREG) {
        copy_file(from, to, &stat, owner)
    } else {
        Err(Errno::ENXIO)
    }
}

fn copy_directory(
    from: Place<'_>,
    to: Place<'_>,
    stat: &FileStat,
    owner: Option<&User>,
    depth: usize,
) -> nix::Result<()> {
    let source = openat(from.0, from.1, SOURCE | OFlag::O_DIRECTORY, Mode::empty())?;
    mkdirat(to.0, to.1, Mode::S_IRWXU)?;
    let target = openat(to.0, to.1, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    for name in names_in(&source)? {
        copy_node((&source, &name), (&target, &name), owner, depth + 1)?;
    }
    own(to, stat, owner)?;
    fchmod(&target, Mode::from_bits_truncate(stat.st_mode & MODE_BITS))
}

fn copy_file(from: Place<'_>, to: Place<'_>, stat: &FileStat, owner: Option<&User>) -> nix::Result<()> {
    let mut source = File::from(openat(from.0, from.1, SOURCE, Mode::empty())?);
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut target = File::from(openat(to.0, to.1, flags, Mode::S_IRUSR | Mode::S_IWUSR)?);
    std::io::copy(&mut source, &mut target)
        .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    own(to, stat, owner)?;
    fchmod(&target, Mode::from_bits_truncate(stat.st_mode & MODE_BITS))
}

/// A copy belongs to who asked for it; a move keeps the owner.
fn own(place: Place<'_>, stat: &FileStat, owner: Option<&User>) -> nix::Result<()> {
    if let Some(owner) = owner {
        return give(place.0, place.1, owner);
    }
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let (uid, gid) = (stat.st_uid.into(), stat.st_gid.into());
    nix::unistd::fchownat(place.0, place.1, Some(uid), Some(gid), nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW)
}
