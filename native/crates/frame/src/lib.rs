//! Codec of the frames in `docs/protocol.md`: the one message format between hostd, api and agent.
//!
//! It knows lengths, types and layout. What a JSON payload means, who may send what when, and how credit is
//! spent belong to the ends. Nothing here does I/O.
//!
//! ```text
//!  0        4      5         6        8           12
//!  +--------+------+---------+--------+-----------+---------------
//!  | length | type | channel | zero   | stream id | payload …
//!  |  u32   |  u8  |   u8    |  u16   |   u32     | length bytes
//!  +--------+------+---------+--------+-----------+---------------
//! ```
#![forbid(unsafe_code)]

mod decode;
mod encode;
pub mod fuzz;

pub use decode::{Decoder, Frame, FrameError};
pub use encode::{data_header, push, push_count, push_data};

/// Version carried by `HELLO`; any other is refused.
pub const VERSION: u32 = 1;
/// Bytes before each payload.
pub const HEADER_BYTES: usize = 12;
/// Bytes of content one `DATA` frame may carry.
pub const DATA_BYTES_MAX: usize = 256 * 1024;
/// Bytes of the offset that leads a `DATA` payload, and of the count in `END` and `CREDIT`.
pub const COUNT_BYTES: usize = 8;
/// Bytes of payload any frame but `DATA` may carry.
pub const PAYLOAD_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Credit each sender starts with, per stream and channel.
pub const WINDOW_BYTES: u64 = 1024 * 1024;

/// Channel of bytes towards the server: standard input, content of a file to write.
pub const CHANNEL_INPUT: u8 = 0;
/// Channel of standard output and of the content of a file that is read.
pub const CHANNEL_STDOUT: u8 = 1;
/// Channel of standard error.
pub const CHANNEL_STDERR: u8 = 2;
/// Channel of a terminal's output.
pub const CHANNEL_PTY: u8 = 3;

/// Type of a frame; the numbers go over the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// First frame of both ends, JSON.
    Hello = 1,
    /// The client asks for an operation, JSON.
    Open = 2,
    /// Its result, JSON.
    Reply = 3,
    /// Its failure, JSON; ends the stream.
    Error = 4,
    /// Content, led by the offset of its first byte.
    Data = 5,
    /// End of a channel: its total bytes.
    End = 6,
    /// How many more bytes the peer may send on a channel.
    Credit = 7,
    /// Something happened on the stream, JSON.
    Event = 8,
    /// The client steers an open stream, JSON.
    Control = 9,
    /// The stream is over (server) or unwanted (client).
    Close = 10,
    /// Are you there? Eight opaque bytes.
    Ping = 11,
    /// Yes: the same eight bytes.
    Pong = 12,
    /// The exit status has arrived and may be forgotten.
    Ack = 13,
}

impl Kind {
    /// The type a byte stands for, if any.
    pub fn from_byte(byte: u8) -> Option<Self> {
        use Kind::{Ack, Close, Control, Credit, Data, End, Error, Event, Hello, Open, Ping, Pong, Reply};
        const KINDS: [Kind; 13] =
            [Hello, Open, Reply, Error, Data, End, Credit, Event, Control, Close, Ping, Pong, Ack];
        KINDS.get(usize::from(byte).checked_sub(1)?).copied()
    }

    /// Payload lengths the type allows, as an inclusive range.
    pub const fn payload_range(self) -> (usize, usize) {
        match self {
            Kind::Data => (COUNT_BYTES, COUNT_BYTES + DATA_BYTES_MAX),
            Kind::End | Kind::Credit | Kind::Ping | Kind::Pong => (COUNT_BYTES, COUNT_BYTES),
            Kind::Close | Kind::Ack => (0, 0),
            _ => (0, PAYLOAD_BYTES_MAX),
        }
    }
}
