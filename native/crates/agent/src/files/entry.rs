//! How a file is described to clients (docs/protocol.md, "entry").

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use nix::fcntl::readlinkat;
use nix::sys::stat::{FileStat, SFlag};
use serde::{Deserialize, Serialize};

use super::path::{Links, Target, is_type, locate};
use crate::error::OpResult;
use crate::users::Users;

/// Permission bits, without the type.
pub const MODE_BITS: u32 = 0o7777;

#[derive(Debug, Serialize)]
pub struct Entry {
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    name_base64: Option<String>,
    pub path: String,
    #[serde(rename = "type")]
    kind: &'static str,
    pub size: u64,
    mode: u32,
    is_dir: bool,
    is_symlink: bool,
    modified_at: f64,
    owner: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    resolved_path: Option<String>,
}

impl Entry {
    /// Describe `name` in `directory`, shown to the client as `path`.
    pub fn new(path: &Path, directory: &OwnedFd, name: &OsStr, stat: &FileStat, users: &Users) -> Self {
        let is_symlink = is_type(stat, SFlag::S_IFLNK);
        let is_dir = is_type(stat, SFlag::S_IFDIR);
        let kind = match (is_dir, is_symlink) {
            (true, _) => "dir",
            (_, true) => "symlink",
            _ if is_type(stat, SFlag::S_IFREG) => "file",
            _ => "other",
        };
        // A link may be gone by now; then it points nowhere.
        let target = is_symlink.then(|| readlinkat(directory, name).unwrap_or_default());
        let shown = path.file_name().unwrap_or(OsStr::new("/"));
        Self {
            name: shown.to_string_lossy().into_owned(),
            name_base64: shown.to_str().is_none().then(|| BASE64.encode(shown.as_bytes())),
            path: path.to_string_lossy().into_owned(),
            kind,
            size: stat.st_size as u64,
            mode: stat.st_mode & MODE_BITS,
            is_dir,
            is_symlink,
            modified_at: modified_at(stat),
            owner: users.name_of(stat.st_uid),
            target: target.map(|target| target.to_string_lossy().into_owned()),
            resolved_path: None,
        }
    }

    /// Describe what lies at `target`, asked for as `path`, with the place it really has.
    pub fn of_target(path: &str, target: &Target, users: &Users) -> OpResult<Self> {
        let stat = target.stat_existing()?;
        let mut entry = Self::new(&tidy(path), &target.directory, &target.name, &stat, users);
        let resolved = locate(path, Links::Follow, None).map_or_else(|_| target.path(), |target| target.path());
        entry.resolved_path = Some(resolved.to_string_lossy().into_owned());
        Ok(entry)
    }
}

/// The path without repeated slashes and dots that say nothing.
fn tidy(path: &str) -> PathBuf {
    Path::new(path).components().collect()
}

/// Unix seconds.
pub fn modified_at(stat: &FileStat) -> f64 {
    stat.st_mtime as f64 + stat.st_mtime_nsec as f64 / 1e9
}

#[derive(Deserialize)]
pub struct Stat {
    path: String,
    roots: Option<Vec<String>>,
}

/// The entry of a path; a link is described itself.
pub fn stat(arguments: &Stat, users: &Users) -> OpResult<Entry> {
    let target = locate(&arguments.path, Links::Keep, None)?;
    if arguments.roots.is_some() {
        locate(&arguments.path, Links::Follow, arguments.roots.as_deref())?;
    }
    Entry::of_target(&arguments.path, &target, users)
}
