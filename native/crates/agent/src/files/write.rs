//! Writing a file so that nobody ever sees half of it.
//!
//! Content goes to a temporary file beside the target, which takes its name once everything is there. An append is
//! staged the same way and added at the end; if that fails the file is cut back. Dropping an unfinished write removes
//! the temporary file.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::{FileStat, Mode, fchmod};
use nix::unistd::{UnlinkatFlags, fchown, unlinkat};
use serde::Deserialize;

use super::entry::{Entry, MODE_BITS};
use super::path::{Links, Target, locate, locate_making_parents};
use super::read::require_regular;
use super::temporary_name;
use crate::error::{OpError, OpResult};
use crate::process::Host;

const MODE_DEFAULT: u32 = 0o644;

#[derive(Deserialize)]
pub struct Write {
    path: String,
    mode: Option<u32>,
    #[serde(default = "yes")]
    parents: bool,
    #[serde(default)]
    append: bool,
    user: Option<String>,
    roots: Option<Vec<String>>,
}

fn yes() -> bool {
    true
}

/// A write under way.
pub struct FileWriter {
    arguments: Write,
    host: Arc<Host>,
    staged: Option<Staged>,
}

/// What one step came to.
pub struct WriteStep {
    /// `None` once it is finished.
    pub writer: Option<FileWriter>,
    pub written: u64,
    /// JSON of the reply, from the last step.
    pub reply: Option<Vec<u8>>,
}

impl FileWriter {
    pub fn new(arguments: Write, host: Arc<Host>) -> Self {
        Self { arguments, host, staged: None }
    }

    /// Write `chunks`, opening first if need be; with `ended`, give the file its name.
    pub fn step(mut self, chunks: &[Vec<u8>], ended: bool) -> OpResult<WriteStep> {
        let mut staged = match self.staged.take() {
            Some(staged) => staged,
            None => self.open()?,
        };
        let mut written = 0;
        for chunk in chunks {
            staged.file.write_all(chunk).map_err(|error| OpError::of_io(&error, &self.arguments.path))?;
            written += chunk.len() as u64;
        }
        if !ended {
            self.staged = Some(staged);
            return Ok(WriteStep { writer: Some(self), written, reply: None });
        }
        let entry = self.finish(staged)?;
        let reply = serde_json::to_vec(&entry).map_err(|error| OpError::bad_request(error.to_string()))?;
        Ok(WriteStep { writer: None, written, reply: Some(reply) })
    }

    fn open(&self) -> OpResult<Staged> {
        let Write { path, parents, roots, .. } = &self.arguments;
        let owner = self.host.users.find(self.arguments.user.as_deref())?;
        let roots = roots.as_deref();
        let target = if *parents {
            locate_making_parents(path, Links::Follow, roots, &owner)?
        } else {
            locate(path, Links::Follow, roots)?
        };
        let existing = target.stat().map_err(|errno| target.error(errno))?;
        if let Some(stat) = &existing {
            require_regular(stat, path)?;
        }
        target.require_name()?;
        Staged::create(target, existing, (owner.uid, owner.gid))
    }

    fn finish(&self, mut staged: Staged) -> OpResult<Entry> {
        let failed = |errno| OpError::of_errno(errno, &self.arguments.path);
        match (&staged.existing, self.arguments.append) {
            (Some(_), true) => staged.append().map_err(|error| OpError::of_io(&error, &self.arguments.path))?,
            _ => staged.replace(self.arguments.mode).map_err(failed)?,
        }
        Entry::of_target(&self.arguments.path, &staged.target, &self.host.users)
    }
}

/// Content on its way to `target`.
struct Staged {
    target: Target,
    existing: Option<FileStat>,
    owner: (u32, u32),
    file: File,
    name: String,
    named: bool,
}

impl Staged {
    fn create(target: Target, existing: Option<FileStat>, owner: (u32, u32)) -> OpResult<Self> {
        let name = temporary_name(&target.directory);
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(&target.directory, name.as_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(|errno| target.error(errno))?;
        Ok(Self { target, existing, owner, file: fd.into(), name, named: true })
    }

    /// Take the target's name, keeping mode and owner of the file that had it.
    fn replace(&mut self, mode: Option<u32>) -> nix::Result<()> {
        let kept = self.existing.as_ref().map(|stat| stat.st_mode & MODE_BITS);
        let (uid, gid) = self.existing.as_ref().map_or(self.owner, |stat| (stat.st_uid, stat.st_gid));
        if nix::unistd::geteuid().is_root() {
            fchown(&self.file, Some(uid.into()), Some(gid.into()))?;
        }
        // After the change of owner, which clears set-user-id.
        fchmod(&self.file, Mode::from_bits_truncate(mode.or(kept).unwrap_or(MODE_DEFAULT)))?;
        renameat(&self.target.directory, self.name.as_str(), &self.target.directory, self.target.name.as_os_str())?;
        self.named = false;
        Ok(())
    }

    /// Add the content to the target, all of it or nothing.
    fn append(&mut self) -> std::io::Result<()> {
        let flags = OFlag::O_WRONLY | OFlag::O_APPEND | OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd: OwnedFd = openat(&self.target.directory, self.target.name.as_os_str(), flags, Mode::empty())?;
        let mut file = File::from(fd);
        let before = file.metadata()?.len();
        std::io::Seek::rewind(&mut self.file)?;
        let copied = std::io::copy(&mut self.file, &mut file).and_then(|_| file.flush());
        if copied.is_err() {
            file.set_len(before)?;
        }
        copied
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if self.named {
            // It may have been removed with its directory; there is nobody to tell anything else.
            let _ = unlinkat(self.target.directory.as_fd(), self.name.as_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}
