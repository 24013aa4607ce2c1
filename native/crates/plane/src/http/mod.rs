//! HTTP/1.1 messages: strict parsers for what comes in.
//!
//! Anything two servers could read differently is refused: bare CR or LF, folded lines, spaces around names,
//! duplicate or conflicting framing, odd chunk sizes. Nothing here reads or writes sockets.

pub mod body;
pub mod fields;
pub mod request;
pub mod response;

use std::fmt;

/// Most header fields in one head, whatever the limits say.
pub const FIELDS_MAX: usize = 256;

/// Why a message head cannot be accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadError {
    /// Not HTTP, or not unambiguous; the text says what.
    Malformed(&'static str),
    /// More bytes or fields than the limits allow.
    TooLarge,
    /// A protocol version that is not spoken here.
    Version,
    /// A method that a gateway does not serve.
    Method,
}

impl fmt::Display for HeadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Malformed(what) => what,
            Self::TooLarge => "The request's header is too large.",
            Self::Version => "This HTTP version is not supported.",
            Self::Method => "This method is not supported.",
        })
    }
}

/// How a message's body is delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// No body.
    None,
    /// This many bytes.
    Length(u64),
    /// Chunked transfer coding.
    Chunked,
    /// Everything until the connection closes (responses only).
    UntilClose,
}

/// Looks for the end of a head in `data`, of which the first `seen` bytes were searched before.
///
/// Returns the head's length, its empty line included. Fails early for line ends without CR, which would otherwise
/// look like a head that never ends.
pub fn find_end(data: &[u8], seen: usize, bytes_max: usize) -> Result<Option<usize>, HeadError> {
    let from = seen.saturating_sub(3);
    if let Some(at) = memchr::memmem::find(&data[from..], b"\r\n\r\n") {
        let len = from + at + 4;
        return if len > bytes_max { Err(HeadError::TooLarge) } else { Ok(Some(len)) };
    }
    if data.len() >= bytes_max {
        return Err(HeadError::TooLarge);
    }
    match memchr::memchr(b'\n', data) {
        Some(at) if at == 0 || data[at - 1] != b'\r' => Err(HeadError::Malformed("A line does not end with CR LF.")),
        _ => Ok(None),
    }
}
