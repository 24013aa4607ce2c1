//! Writing frames into a buffer the caller owns.

use crate::{COUNT_BYTES, DATA_BYTES_MAX, HEADER_BYTES, Kind, PAYLOAD_BYTES_MAX};

fn header(kind: Kind, channel: u8, stream: u32, length: usize) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&(length as u32).to_le_bytes());
    header[4] = kind as u8;
    header[5] = channel;
    header[8..].copy_from_slice(&stream.to_le_bytes());
    header
}

/// Append one frame of any type to `out`.
///
/// # Panics
/// If the payload is longer than its type allows: senders bound what they build.
pub fn push(out: &mut Vec<u8>, kind: Kind, channel: u8, stream: u32, payload: &[u8]) {
    let (_, longest) = kind.payload_range();
    assert!(payload.len() <= longest && longest <= PAYLOAD_BYTES_MAX, "a {kind:?} of {} bytes", payload.len());
    out.reserve(HEADER_BYTES + payload.len());
    out.extend_from_slice(&header(kind, channel, stream, payload.len()));
    out.extend_from_slice(payload);
}

/// Append an `END` or `CREDIT` frame.
pub fn push_count(out: &mut Vec<u8>, kind: Kind, channel: u8, stream: u32, count: u64) {
    push(out, kind, channel, stream, &count.to_le_bytes());
}

/// Append a `DATA` frame; `content` holds at most [`DATA_BYTES_MAX`] bytes.
pub fn push_data(out: &mut Vec<u8>, channel: u8, stream: u32, offset: u64, content: &[u8]) {
    out.reserve(HEADER_BYTES + COUNT_BYTES + content.len());
    out.extend_from_slice(&data_header(channel, stream, offset, content.len()));
    out.extend_from_slice(content);
}

/// What precedes the `length` content bytes of a `DATA` frame, for senders that write the content in place.
///
/// # Panics
/// If `length` exceeds [`DATA_BYTES_MAX`].
pub fn data_header(channel: u8, stream: u32, offset: u64, length: usize) -> [u8; HEADER_BYTES + COUNT_BYTES] {
    assert!(length <= DATA_BYTES_MAX, "DATA of {length} bytes");
    let mut bytes = [0; HEADER_BYTES + COUNT_BYTES];
    bytes[..HEADER_BYTES].copy_from_slice(&header(Kind::Data, channel, stream, COUNT_BYTES + length));
    bytes[HEADER_BYTES..].copy_from_slice(&offset.to_le_bytes());
    bytes
}
