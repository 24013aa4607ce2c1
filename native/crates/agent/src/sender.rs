//! The writing half of a connection: frames wait here until the socket takes them.
//!
//! Small frames are gathered and leave in one system call per turn of the loop; large content goes out straight from
//! where it lies, and only what the socket refuses is copied.

use std::io::{ErrorKind, IoSlice, Write};
use std::net::TcpStream;

use sandgate_frame::{Kind, data_header, push, push_count};

/// Content worth a system call of its own rather than a copy.
const DIRECT_BYTES: usize = 32 * 1024;
/// With more than this waiting, streams hold their content back.
const BACKLOG_BYTES: usize = 256 * 1024;
/// With more than this waiting, no more requests are read.
const CHOKE_BYTES: usize = 4 * 1024 * 1024;

pub struct Sender {
    socket: TcpStream,
    waiting: Vec<u8>,
    head: usize,
    /// Something waits that should leave at the end of this turn.
    urgent: bool,
    broken: bool,
}

impl Sender {
    pub fn new(socket: TcpStream) -> Self {
        Self { socket, waiting: Vec::new(), head: 0, urgent: false, broken: false }
    }

    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// A JSON or empty frame that leaves with this turn.
    pub fn frame(&mut self, kind: Kind, stream: u32, payload: &[u8]) {
        self.frame_lazily(kind, stream, payload);
        self.urgent = true;
    }

    /// A frame that may wait for the next urgent one.
    pub fn frame_lazily(&mut self, kind: Kind, stream: u32, payload: &[u8]) {
        push(&mut self.waiting, kind, 0, stream, payload);
    }

    /// `CREDIT`, which leaves with this turn.
    pub fn credit(&mut self, channel: u8, stream: u32, bytes: u64) {
        push_count(&mut self.waiting, Kind::Credit, channel, stream, bytes);
        self.urgent = true;
    }

    /// `END`, which may wait for what follows it.
    pub fn end_lazily(&mut self, channel: u8, stream: u32, total: u64) {
        push_count(&mut self.waiting, Kind::End, channel, stream, total);
    }

    /// `DATA` whose content lies in two pieces.
    pub fn data(&mut self, channel: u8, stream: u32, offset: u64, pieces: [&[u8]; 2]) {
        let length = pieces[0].len() + pieces[1].len();
        let header = data_header(channel, stream, offset, length);
        self.urgent = true;
        let written = if length < DIRECT_BYTES { 0 } else { self.write_with(&header, pieces) };
        let mut skip = written;
        for part in [&header[..], pieces[0], pieces[1]] {
            let skipped = skip.min(part.len());
            self.waiting.extend_from_slice(&part[skipped..]);
            skip -= skipped;
        }
    }

    /// Write what waits and then the frame; returns how much of the frame went out.
    fn write_with(&mut self, header: &[u8], pieces: [&[u8]; 2]) -> usize {
        let before = self.waiting.len() - self.head;
        let parts = [&self.waiting[self.head..], header, pieces[0], pieces[1]].map(IoSlice::new);
        let written = match self.socket.write_vectored(&parts) {
            Ok(written) => written,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => 0,
            Err(_) => {
                self.broken = true;
                0
            }
        };
        self.sent(written.min(before));
        written.saturating_sub(before)
    }

    fn sent(&mut self, bytes: usize) {
        self.head += bytes;
        if self.head == self.waiting.len() {
            self.head = 0;
            self.waiting.clear();
            self.waiting.shrink_to(BACKLOG_BYTES);
        }
    }

    pub fn is_urgent(&self) -> bool {
        self.urgent
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub fn is_backed_up(&self) -> bool {
        self.waiting.len() - self.head > BACKLOG_BYTES
    }

    pub fn is_choked(&self) -> bool {
        self.waiting.len() - self.head > CHOKE_BYTES
    }

    /// Write as much as the socket takes. `false`: the connection is lost.
    pub fn flush(&mut self) -> bool {
        while !self.is_empty() && !self.broken {
            match self.socket.write(&self.waiting[self.head..]) {
                Ok(0) => self.broken = true,
                Ok(written) => self.sent(written),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.broken = true,
            }
        }
        self.urgent = false;
        !self.broken
    }
}
