//! Bytes from one socket to another by splice(2): the kernel moves pages, and nobody copies them.
//!
//! Worth it for a stream that fills large buffers, where copying is half of the work. For small pieces the two further
//! system calls cost more than the copies, so whoever uses it changes over only in the middle of a stream.

use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;

use crate::net::{Shared, Transport};

/// What one call asks for, at most.
const SPLICE_BYTES: usize = 512 * 1024;
/// Asked of the pipe. What it holds is counted in pieces, a page of this each, and a piece may be much longer.
const PIPE_BYTES: usize = 256 * 1024;
/// A call that moves less than this has caught up with the sender.
const SLACK_BYTES: usize = 32 * 1024;
/// So many of these in a row: the stream no longer is one that fills buffers.
const SLACK_MAX: u32 = 16;

/// A pipe for one direction of a tunnel.
pub struct Pipe {
    entry: OwnedFd,
    exit: OwnedFd,
}

/// Why bytes are no longer spliced; none are left in the pipe.
pub enum Pause {
    /// The sender has closed its side.
    End,
    /// The pieces have become small.
    Slack,
}

impl Pipe {
    /// A pipe, unless the process has no room for one.
    pub fn open() -> Option<Self> {
        let (exit, entry) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
        // An unprivileged process may have used up what its user is granted: smaller pipes do as well.
        let _ = fcntl_setpipe_size(&entry, PIPE_BYTES);
        Some(Self { entry, exit })
    }

    /// Moves bytes for as long as it pays. `on_received` is told how many come in, `on_sent` whenever some have gone
    /// out.
    pub async fn carry<R: Transport, W: Transport>(
        &self,
        reader: &Shared<R>,
        writer: &Shared<W>,
        on_received: impl Fn(usize),
        on_sent: impl Fn(),
    ) -> io::Result<Pause> {
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        let mut slack = 0;
        while slack < SLACK_MAX {
            let receive = |socket: &_| Ok(splice(socket, None, &self.entry, None, SPLICE_BYTES, flags)?);
            let received = poll_fn(|cx| reader.poll_io(cx, Interest::READABLE, receive)).await?;
            if received == 0 {
                return Ok(Pause::End);
            }
            on_received(received);
            let mut left = received;
            while left > 0 {
                let send = |socket: &_| Ok(splice(&self.exit, None, socket, None, left, flags)?);
                left -= poll_fn(|cx| writer.poll_io(cx, Interest::WRITABLE, send)).await?;
                on_sent();
            }
            slack = if received < SLACK_BYTES { slack + 1 } else { 0 };
        }
        Ok(Pause::Slack)
    }
}
