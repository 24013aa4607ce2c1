//! The last table on disk, so that a restarted plane serves before the API is back.
//!
//! The file holds control messages, one per line. A change is appended before it is acknowledged (it survives the
//! process, not the machine: after a reboot no sandbox is left anyway), and the file is rewritten once it has doubled.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::message::{self, Message};
use crate::table::Table;

/// A file smaller than this is not worth rewriting.
const REWRITE_BYTES_MIN: u64 = 1024 * 1024;

/// The open journal.
pub struct Journal {
    path: PathBuf,
    file: File,
    bytes: u64,
    bytes_after_rewrite: u64,
}

impl Journal {
    /// Reads the file into `table`, if there is one, and starts a fresh one. A line that cannot be read (cut off by a
    /// crash, say) is left out: the API's sync brings it again. Returns the number of such lines too.
    pub fn open(path: &Path, table: &Table, now: u64) -> io::Result<(Self, usize)> {
        let mut bad = 0;
        match File::open(path) {
            Ok(file) => {
                for line in BufReader::new(file).split(b'\n') {
                    bad += usize::from(!replay(&line?, table, now));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let (file, bytes) = rewrite(path, table)?;
        Ok((Self { path: path.to_owned(), file, bytes, bytes_after_rewrite: bytes }, bad))
    }

    /// Appends one message.
    pub fn append(&mut self, line: &str) -> io::Result<()> {
        let mut text = String::with_capacity(line.len() + 1);
        text.push_str(line);
        text.push('\n');
        self.file.write_all(text.as_bytes())?;
        self.bytes += text.len() as u64;
        Ok(())
    }

    /// Rewrites the file if it has grown much, or at all when it `is_due`.
    pub fn compact(&mut self, table: &Table, is_due: bool) -> io::Result<()> {
        let has_grown = self.bytes > self.bytes_after_rewrite;
        if (is_due && has_grown) || self.bytes > REWRITE_BYTES_MIN.max(2 * self.bytes_after_rewrite) {
            (self.file, self.bytes) = rewrite(&self.path, table)?;
            self.bytes_after_rewrite = self.bytes;
        }
        Ok(())
    }
}

/// A reader of a file that another process keeps.
pub struct Follower {
    path: PathBuf,
    inode: u64,
    offset: u64,
}

impl Follower {
    /// Of the file at `path`, from its beginning.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), inode: 0, offset: 0 }
    }

    /// Applies what has been written since the last time. Reading a message twice changes nothing.
    pub fn read(&mut self, table: &Table, now: u64) -> io::Result<()> {
        let mut file = File::open(&self.path)?;
        let inode = file.metadata()?.ino();
        if inode != self.inode {
            (self.inode, self.offset) = (inode, 0);
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        // A line without its end is still being written.
        while reader.read_until(b'\n', &mut line)? > 0 && line.ends_with(b"\n") {
            self.offset += line.len() as u64;
            // One that cannot be read is the other process's to report.
            replay(&line[..line.len() - 1], table, now);
            line.clear();
        }
        Ok(())
    }
}

fn replay(line: &[u8], table: &Table, now: u64) -> bool {
    let Ok(text) = std::str::from_utf8(line) else { return false };
    if text.is_empty() {
        return true;
    }
    serde_json::from_str::<Message>(text)
        .is_ok_and(|message| message::apply(message.body, text, table, &mut None, now).is_ok())
}

fn rewrite(path: &Path, table: &Table) -> io::Result<(File, u64)> {
    let temporary = path.with_extension("new");
    let bytes = message::dump(table);
    // Hashes of secrets: for our own eyes only.
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
    file.write_all(&bytes)?;
    fs::rename(&temporary, path)?;
    Ok((file, bytes.len() as u64))
}
