//! One output channel: the pipe or terminal it comes from and the bytes kept of it.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::unistd::read;

use super::ring::Ring;

/// One read at most; larger ones gain nothing.
const READ_BYTES: usize = 256 * 1024;
/// Read per turn of the loop, so that one flood does not starve the others.
const TURN_BYTES: usize = 1024 * 1024;

/// What filling came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// The pipe is empty for now.
    Drained,
    /// There is more, next turn.
    More,
    /// There is more, but no room until a reader confirms or the wait is over.
    Blocked,
    /// Nothing will come any more.
    Ended,
}

// Four independent facts, not a state machine in disguise.
#[allow(clippy::struct_excessive_bools)]
#[derive(Debug)]
pub struct Output {
    pub channel: u8,
    pub ring: Ring,
    pub fd: Option<OwnedFd>,
    /// The kernel reported something to read that has not been read to its end.
    pub readable: bool,
    /// The writing side hung up; read on to the end, no further report will come.
    pub hung_up: bool,
    /// Overwrite the oldest bytes rather than let the process wait.
    pub lossy: bool,
    /// A timer runs that will make it lossy.
    pub waiting: bool,
    /// Once the process has exited: what lies beyond cannot be its own.
    pub last_offset: u64,
}

impl Output {
    pub fn new(channel: u8, fd: OwnedFd, limit: usize, lossy: bool) -> Self {
        Self {
            channel,
            ring: Ring::new(limit),
            fd: Some(fd),
            readable: false,
            hung_up: false,
            lossy,
            waiting: false,
            last_offset: u64::MAX,
        }
    }

    pub fn is_over(&self) -> bool {
        self.fd.is_none()
    }

    /// Read what is there. `confirmed`: offset before which every reader has everything. Returns the bytes read too.
    pub fn fill(&mut self, confirmed: Option<u64>, scratch: &mut [u8]) -> (Filled, usize) {
        let mut total = 0;
        while total < TURN_BYTES {
            match self.read_once(confirmed, scratch) {
                Step::Read { bytes, short } => {
                    total += bytes;
                    if short && !self.hung_up {
                        self.readable = false;
                        return (Filled::Drained, total);
                    }
                }
                Step::Empty => {
                    self.readable = false;
                    return (Filled::Drained, total);
                }
                Step::NoRoom => return (Filled::Blocked, total),
                Step::End => {
                    self.end();
                    return (Filled::Ended, total);
                }
            }
        }
        (Filled::More, total)
    }

    /// Stop reading for good; what is kept stays readable.
    pub fn end(&mut self) -> Option<OwnedFd> {
        self.readable = false;
        self.ring.seal();
        self.fd.take()
    }

    fn read_once(&mut self, confirmed: Option<u64>, scratch: &mut [u8]) -> Step {
        let Some(fd) = &self.fd else { return Step::End };
        // A ring that may overwrite cannot be read into: how much to drop is known only afterwards. And a channel that
        // never says anything (most of stderr) should not cost an allocation.
        if self.lossy || !self.ring.is_allocated() {
            let asked = if self.lossy { scratch.len() } else { scratch.len().min(self.ring.free()) };
            let result = read(fd, &mut scratch[..asked]);
            if let Ok(bytes) = result {
                self.ring.append(&scratch[..bytes]);
            }
            return Step::of(result, asked);
        }
        if self.ring.free() == 0 {
            // Make room where every reader has been, but keep the rest for who attaches later.
            let wanted = self.ring.start() + READ_BYTES as u64;
            self.ring.discard_to(confirmed.unwrap_or(0).min(wanted));
        }
        let space = self.ring.space();
        if space.is_empty() {
            return Step::NoRoom;
        }
        let asked = space.len().min(READ_BYTES);
        let result = read(fd, &mut space[..asked]);
        if let Ok(bytes) = result {
            self.ring.advance(bytes);
        }
        Step::of(result, asked)
    }
}

enum Step {
    Read { bytes: usize, short: bool },
    Empty,
    NoRoom,
    End,
}

impl Step {
    fn of(result: nix::Result<usize>, asked: usize) -> Self {
        match result {
            Ok(0) if asked > 0 => Self::End,
            Ok(bytes) => Self::Read { bytes, short: bytes < asked },
            Err(Errno::EAGAIN) => Self::Empty,
            Err(Errno::EINTR) => Self::Read { bytes: 0, short: false },
            // A terminal whose last program left answers EIO; anything else ends the channel as well.
            Err(_) => Self::End,
        }
    }
}
