//! Bodies: which of the bytes that come in belong to one, and when it ends.
//!
//! ```text
//! chunked:  size ──CRLF──▶ data ──CRLF──▶ size …  ──"0" CRLF──▶ trailers ──empty line──▶ done
//! ```

use super::{Framing, HeadError};

/// Longest chunk-size line, extensions included.
const SIZE_LINE_BYTES_MAX: usize = 256;
/// Longest trailer section.
const TRAILER_BYTES_MAX: usize = 8 * 1024;

/// What the next bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// So many bytes of content.
    Content(usize),
    /// So many bytes of chunked framing.
    Framing(usize),
    /// So many bytes of trailer section, its empty line included; the body ends with them.
    Trailers(usize),
    /// More input is needed.
    More,
    /// The body ended before.
    End,
}

/// A body being read.
#[derive(Debug)]
pub struct Body {
    state: State,
}

#[derive(Debug)]
enum State {
    Length(u64),
    UntilClose,
    Size,
    Chunk(u64),
    ChunkEnd,
    Trailers,
    Done,
}

impl Body {
    /// A body that starts with the next byte.
    pub fn new(framing: Framing) -> Self {
        let state = match framing {
            Framing::None | Framing::Length(0) => State::Done,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::Size,
            Framing::UntilClose => State::UntilClose,
        };
        Self { state }
    }

    /// Whether it has been read to its end.
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Whether the end of the input ends it in good order.
    pub fn may_end_by_close(&self) -> bool {
        matches!(self.state, State::Done | State::UntilClose)
    }

    /// Takes the next piece off `input`. The caller must then skip as many bytes as it says.
    pub fn next(&mut self, input: &[u8]) -> Result<Piece, HeadError> {
        if self.is_done() {
            return Ok(Piece::End);
        }
        if input.is_empty() {
            return Ok(Piece::More);
        }
        match self.state {
            State::Length(left) => Ok(self.content(input, left, State::Done, State::Length)),
            State::Chunk(left) => Ok(self.content(input, left, State::ChunkEnd, State::Chunk)),
            State::UntilClose => Ok(Piece::Content(input.len())),
            State::Size => self.size_line(input),
            State::ChunkEnd => self.chunk_end(input),
            State::Trailers => self.trailers(input),
            State::Done => Ok(Piece::End),
        }
    }

    fn content(&mut self, input: &[u8], left: u64, end: State, more: fn(u64) -> State) -> Piece {
        let count = left.min(input.len() as u64);
        self.state = if count == left { end } else { more(left - count) };
        Piece::Content(count as usize)
    }

    fn size_line(&mut self, input: &[u8]) -> Result<Piece, HeadError> {
        let window = &input[..input.len().min(SIZE_LINE_BYTES_MAX)];
        let Some(at) = memchr::memchr(b'\n', window) else {
            return if window.len() == SIZE_LINE_BYTES_MAX { Err(BAD_CHUNK) } else { Ok(Piece::More) };
        };
        let line = window[..at].strip_suffix(b"\r").ok_or(BAD_CHUNK)?;
        let size = chunk_size(line)?;
        self.state = if size == 0 { State::Trailers } else { State::Chunk(size) };
        Ok(Piece::Framing(at + 1))
    }

    fn chunk_end(&mut self, input: &[u8]) -> Result<Piece, HeadError> {
        match input {
            [b'\r', b'\n', ..] => {
                self.state = State::Size;
                Ok(Piece::Framing(2))
            }
            [b'\r'] => Ok(Piece::More),
            _ => Err(BAD_CHUNK),
        }
    }

    fn trailers(&mut self, input: &[u8]) -> Result<Piece, HeadError> {
        let len = match input {
            [b'\r', b'\n', ..] => Some(2),
            [b'\r'] => None,
            _ => super::find_end(input, 0, TRAILER_BYTES_MAX).map_err(|_| BAD_CHUNK)?,
        };
        Ok(len.map_or(Piece::More, |len| {
            self.state = State::Done;
            Piece::Trailers(len)
        }))
    }
}

const BAD_CHUNK: HeadError = HeadError::Malformed("The chunked body is malformed.");

/// Reads `size [;extension]`. Extensions may hold visible ASCII and blanks only.
fn chunk_size(line: &[u8]) -> Result<u64, HeadError> {
    let digits = line.iter().position(|b| !b.is_ascii_hexdigit()).unwrap_or(line.len());
    let (size, extension) = line.split_at(digits);
    let is_extension = extension.is_empty()
        || (extension[0] == b';' && extension.iter().all(|&b| b == b'\t' || (b' '..0x7f).contains(&b)));
    // 15 digits stay below 2^60: no overflow to think about.
    if digits == 0 || digits > 15 || !is_extension {
        return Err(BAD_CHUNK);
    }
    Ok(size.iter().fold(0, |sum, &b| sum * 16 + u64::from((b as char).to_digit(16).unwrap_or(0))))
}
