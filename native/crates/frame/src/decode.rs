//! Reading frames out of a growing buffer, without copying payloads.

use std::fmt;

use crate::{COUNT_BYTES, HEADER_BYTES, Kind, PAYLOAD_BYTES_MAX};

/// A buffer that one huge frame has grown is given back once it is empty.
const KEEP_BYTES: usize = 256 * 1024;

/// Why a byte sequence is not a frame. After one, nothing on the connection can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// No frame has this type.
    UnknownType(u8),
    /// The reserved field is not zero.
    ReservedField(u16),
    /// The type does not allow a payload of this length.
    BadLength(Kind, usize),
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownType(byte) => write!(f, "unknown frame type {byte}"),
            Self::ReservedField(value) => write!(f, "reserved field is {value}, not 0"),
            Self::BadLength(kind, length) => write!(f, "a {kind:?} frame of {length} bytes"),
        }
    }
}

impl std::error::Error for FrameError {}

/// One frame; its payload lies in the decoder's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Type.
    pub kind: Kind,
    /// Channel within the stream.
    pub channel: u8,
    /// Stream id, 0 for the connection itself.
    pub stream: u32,
    /// Bytes after the header.
    pub payload: &'a [u8],
}

impl<'a> Frame<'a> {
    /// The leading count of `DATA` (offset), `END` (total) and `CREDIT` (bytes), and the bytes after it.
    /// `None` for other types, whose payload is something else.
    pub fn count(&self) -> Option<(u64, &'a [u8])> {
        if !matches!(self.kind, Kind::Data | Kind::End | Kind::Credit) {
            return None;
        }
        let (count, rest) = self.payload.split_first_chunk::<COUNT_BYTES>()?;
        Some((u64::from_le_bytes(*count), rest))
    }
}

/// Cuts a byte stream into frames.
///
/// Fill [`Decoder::space`] and [`Decoder::advance`] by what was read, or [`Decoder::feed`] bytes; then take frames
/// until there are none. The buffer grows with bytes received, never with a length merely announced.
#[derive(Debug)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    payload_bytes_max: usize,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new(PAYLOAD_BYTES_MAX)
    }
}

impl Decoder {
    /// A decoder that also refuses payloads over `payload_bytes_max`, for peers not yet trusted.
    pub fn new(payload_bytes_max: usize) -> Self {
        Self { buffer: Vec::new(), start: 0, end: 0, payload_bytes_max }
    }

    /// Change the bound given to [`Decoder::new`]; holds for frames not yet taken.
    pub fn set_payload_bytes_max(&mut self, payload_bytes_max: usize) {
        self.payload_bytes_max = payload_bytes_max;
    }

    /// At least `bytes` of room to read into.
    pub fn space(&mut self, bytes: usize) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if self.buffer.len() > KEEP_BYTES.max(bytes) {
                self.buffer = Vec::new();
            }
        }
        if self.buffer.len() - self.end < bytes {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            // Doubling keeps the copying linear while a long frame arrives in small pieces.
            let needed = self.end + bytes;
            if self.buffer.len() < needed {
                self.buffer.resize(needed.max(self.end * 2), 0);
            }
        }
        &mut self.buffer[self.end..]
    }

    /// The first `bytes` of [`Decoder::space`] are filled.
    ///
    /// # Panics
    /// If there was not that much space.
    pub fn advance(&mut self, bytes: usize) {
        assert!(bytes <= self.buffer.len() - self.end, "advanced past the buffer");
        self.end += bytes;
    }

    /// Append a copy of `bytes`.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.space(bytes.len())[..bytes.len()].copy_from_slice(bytes);
        self.advance(bytes.len());
    }

    /// Bytes held that no frame has been taken from yet.
    pub fn buffered(&self) -> usize {
        self.end - self.start
    }

    /// The next complete frame, or `None` until more bytes come. A bad header is reported before its payload is read.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        let bytes = &self.buffer[self.start..self.end];
        let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let [l0, l1, l2, l3, kind, channel, r0, r1, s0, s1, s2, s3] = *header;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let kind = Kind::from_byte(kind).ok_or(FrameError::UnknownType(kind))?;
        let reserved = u16::from_le_bytes([r0, r1]);
        if reserved != 0 {
            return Err(FrameError::ReservedField(reserved));
        }
        let (shortest, longest) = kind.payload_range();
        if length < shortest || length > longest.min(self.payload_bytes_max) {
            return Err(FrameError::BadLength(kind, length));
        }
        let Some(payload) = bytes.get(HEADER_BYTES..HEADER_BYTES + length) else {
            return Ok(None);
        };
        self.start += HEADER_BYTES + length;
        Ok(Some(Frame { kind, channel, stream: u32::from_le_bytes([s0, s1, s2, s3]), payload }))
    }
}
