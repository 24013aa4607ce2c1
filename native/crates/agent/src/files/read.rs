//! Reading a file, one chunk per step.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use serde::Deserialize;
use serde_json::json;

use super::entry::{MODE_BITS, modified_at};
use super::path::{Links, is_type, locate};
use crate::error::{Code, OpError, OpResult};

#[derive(Deserialize)]
pub struct Read {
    path: String,
    #[serde(default)]
    offset: u64,
    length: Option<u64>,
    roots: Option<Vec<String>>,
}

/// A read under way.
pub struct FileReader {
    arguments: Read,
    file: Option<File>,
    position: u64,
    left: u64,
}

/// What one step brought.
pub struct ReadStep {
    pub reader: FileReader,
    /// JSON of the reply, from the first step.
    pub info: Option<Vec<u8>>,
    pub chunk: Vec<u8>,
    pub is_last: bool,
}

impl FileReader {
    pub fn new(arguments: Read) -> Self {
        let (position, left) = (arguments.offset, arguments.length.unwrap_or(u64::MAX));
        Self { arguments, file: None, position, left }
    }

    /// Read at most `bytes` more, opening the file first if need be.
    pub fn step(mut self, bytes: usize) -> OpResult<ReadStep> {
        let (file, info) = match self.file.take() {
            Some(file) => (file, None),
            None => self.open()?,
        };
        let wanted = self.left.min(bytes as u64) as usize;
        let mut chunk = vec![0; wanted];
        let mut filled = 0;
        let mut at_end = false;
        while filled < wanted {
            match file.read_at(&mut chunk[filled..], self.position + filled as u64) {
                Ok(0) => {
                    at_end = true;
                    break;
                }
                Ok(more) => filled += more,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(OpError::of_io(&error, &self.arguments.path)),
            }
        }
        chunk.truncate(filled);
        self.position += filled as u64;
        self.left -= filled as u64;
        self.file = Some(file);
        let is_last = at_end || self.left == 0;
        Ok(ReadStep { reader: self, info, chunk, is_last })
    }

    fn open(&self) -> OpResult<(File, Option<Vec<u8>>)> {
        let target = locate(&self.arguments.path, Links::Follow, self.arguments.roots.as_deref())?;
        require_regular(&target.stat_existing()?, &self.arguments.path)?;
        // It may have become something else since: opening a FIFO must not block, and a terminal must not become ours.
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let opened = openat(&target.directory, target.name.as_os_str(), flags, Mode::empty())
            .and_then(|fd| Ok((fstat(&fd)?, File::from(fd))));
        let (stat, file) = opened.map_err(|errno| target.error(errno))?;
        require_regular(&stat, &self.arguments.path)?;
        if i64::try_from(self.arguments.offset).is_err() {
            return Err(OpError::bad_request("offset is beyond any file"));
        }
        let info = json!({"size": stat.st_size, "mode": stat.st_mode & MODE_BITS, "modified_at": modified_at(&stat),
                          "resolved_path": target.path().to_string_lossy()});
        Ok((file, Some(info.to_string().into_bytes())))
    }
}

/// Content is read from and written to regular files only.
pub fn require_regular(stat: &FileStat, path: &str) -> OpResult<()> {
    if is_type(stat, SFlag::S_IFREG) {
        Ok(())
    } else if is_type(stat, SFlag::S_IFDIR) {
        Err(OpError::new(Code::IsADirectory, format!("{path} is a directory")))
    } else {
        Err(OpError::new(Code::NotRegular, format!("{path} is not a regular file")))
    }
}
