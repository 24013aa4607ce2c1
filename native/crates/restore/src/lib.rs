//! Files of saved machines: hashed once, packed into chunks that images share, sent as one stream.
//!
//! Knows nothing of what is in the files, of manifests or of who may delete what: that is `vmm.images`. Every function
//! blocks, uses all processors for work on large files, and leaves no half-written file under its final name.

mod chunk;
pub mod fuzz;
mod hash;
mod pack;
mod parallel;
mod stream;

use std::fmt;
use std::io;

pub use hash::{FileHash, hash_file};
pub use pack::{INDEX, Packed, collect, pack, parse_index, unpack};
pub use stream::{export, import};

/// Why an image could not be read or written.
#[derive(Debug)]
pub enum Error {
    /// The host's: a full disk, a missing file.
    Io(io::Error),
    /// The bytes are not what they should be; says which.
    Corrupt(String),
    /// More bytes than were allowed.
    TooLarge,
}

impl Error {
    pub(crate) fn corrupt(what: impl Into<String>) -> Self {
        Self::Corrupt(what.into())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => error.fmt(formatter),
            Self::Corrupt(what) => formatter.write_str(what),
            Self::TooLarge => formatter.write_str("larger than allowed"),
        }
    }
}

impl std::error::Error for Error {}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        // What ends too early was cut off; that is not the host's fault.
        if error.kind() == io::ErrorKind::UnexpectedEof { Self::corrupt("cut off") } else { Self::Io(error) }
    }
}

/// What this crate's functions give.
pub type Result<T> = std::result::Result<T, Error>;

/// A name that a file of an image may have, wherever it comes from.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'_' | b'.' | b'-');
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.bytes().all(is_plain) {
        return Err(Error::corrupt("a file with an improper name"));
    }
    Ok(())
}
