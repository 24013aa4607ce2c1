//! The kernel's readiness reports (epoll, edge-triggered) with names instead of numbers.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// What a report is about. Ids are never reused, so a late report finds nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    Listener,
    Signals,
    Pool,
    Conn { id: u64 },
    Input { serial: u64 },
    Output { serial: u64, channel: u8 },
    Watch { serial: u64 },
}

/// Low bits say what, the rest which.
const TAG_BITS: u32 = 4;
const TAG_OUTPUT: u64 = 8;

impl Token {
    fn encode(self) -> u64 {
        let (tag, id) = match self {
            Self::Listener => (0, 0),
            Self::Signals => (1, 0),
            Self::Pool => (2, 0),
            Self::Conn { id } => (3, id),
            Self::Input { serial } => (4, serial),
            Self::Watch { serial } => (5, serial),
            Self::Output { serial, channel } => (TAG_OUTPUT + u64::from(channel), serial),
        };
        id << TAG_BITS | tag
    }

    fn decode(data: u64) -> Self {
        let id = data >> TAG_BITS;
        match data & ((1 << TAG_BITS) - 1) {
            0 => Self::Listener,
            1 => Self::Signals,
            2 => Self::Pool,
            3 => Self::Conn { id },
            4 => Self::Input { serial: id },
            5 => Self::Watch { serial: id },
            tag => Self::Output { serial: id, channel: (tag - TAG_OUTPUT) as u8 },
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub enum Interest {
    Reading,
    Writing,
    Both,
}

/// One report.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    pub token: Token,
    pub readable: bool,
    pub writable: bool,
    pub hung_up: bool,
}

pub struct Poller {
    epoll: Epoll,
}

const EVENTS_PER_TURN: usize = 256;

impl Poller {
    pub fn new() -> nix::Result<Self> {
        Ok(Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)? })
    }

    /// Report changes of `fd` until it is closed. What is ready now is reported as well.
    pub fn watch(&self, fd: impl AsFd, interest: Interest, token: Token) {
        let flags = match interest {
            Interest::Reading => EpollFlags::EPOLLIN,
            Interest::Writing => EpollFlags::EPOLLOUT,
            Interest::Both => EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT,
        };
        let event = EpollEvent::new(flags | EpollFlags::EPOLLET | EpollFlags::EPOLLRDHUP, token.encode());
        if let Err(errno) = self.epoll.add(fd, event) {
            eprintln!("agent: cannot watch {token:?}: {errno}");
        }
    }

    /// Wait for reports, at most `timeout`.
    pub fn wait(&self, timeout: Option<Duration>) -> nix::Result<Vec<Event>> {
        // Rounded up: waking a little early would find the timer not yet due and spin until it is.
        let millis = timeout.map(|timeout| timeout.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32);
        let timeout =
            millis.map_or(EpollTimeout::NONE, |millis| EpollTimeout::try_from(millis).unwrap_or(EpollTimeout::ZERO));
        let mut events = [EpollEvent::empty(); EVENTS_PER_TURN];
        let count = match self.epoll.wait(&mut events, timeout) {
            Err(Errno::EINTR) => 0,
            other => other?,
        };
        Ok(events[..count].iter().map(report).collect())
    }
}

fn report(event: &EpollEvent) -> Event {
    let flags = event.events();
    let hung_up = flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR | EpollFlags::EPOLLRDHUP);
    Event {
        token: Token::decode(event.data()),
        readable: flags.contains(EpollFlags::EPOLLIN) || hung_up,
        writable: flags.contains(EpollFlags::EPOLLOUT) || hung_up,
        hung_up,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_kernel() {
        let serial = (1 << 60) - 1;
        let tokens = [
            Token::Listener,
            Token::Signals,
            Token::Pool,
            Token::Conn { id: serial },
            Token::Input { serial },
            Token::Watch { serial },
            Token::Output { serial, channel: 3 },
            Token::Output { serial: 0, channel: 1 },
        ];
        for token in tokens {
            assert_eq!(Token::decode(token.encode()), token);
        }
    }
}
