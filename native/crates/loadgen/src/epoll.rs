//! The event loop's heart.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::time::Timespec;

/// Events taken at once.
const BATCH: usize = 1024;

/// Readiness of sockets, each known by a number of the caller's.
pub struct Epoll {
    fd: OwnedFd,
    events: Vec<Event>,
}

impl Epoll {
    pub fn new() -> io::Result<Self> {
        Ok(Self { fd: epoll::create(CreateFlags::CLOEXEC)?, events: Vec::with_capacity(BATCH) })
    }

    /// Watches `socket` for input; for room to write too if `is_writing`.
    pub fn add(&self, socket: impl AsFd, token: usize, is_writing: bool) -> io::Result<()> {
        Ok(epoll::add(&self.fd, socket, EventData::new_u64(token as u64), flags(is_writing))?)
    }

    /// Watches for room to write, or no longer.
    pub fn modify(&self, socket: impl AsFd, token: usize, is_writing: bool) -> io::Result<()> {
        Ok(epoll::modify(&self.fd, socket, EventData::new_u64(token as u64), flags(is_writing))?)
    }

    /// Forgets a socket. Closing does so too, unless somebody else holds it open.
    pub fn remove(&self, socket: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.fd, socket)?)
    }

    /// Waits until something is ready or `until` has come; returns the tokens of what is.
    pub fn wait(&mut self, until: Option<Instant>) -> io::Result<impl Iterator<Item = usize> + use<>> {
        let timeout = until.map(|until| timespec(until.saturating_duration_since(Instant::now())));
        self.events.clear();
        match epoll::wait(&self.fd, spare_capacity(&mut self.events), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let tokens: Vec<usize> = self.events.iter().map(|event| event.data.u64() as usize).collect();
        Ok(tokens.into_iter())
    }
}

fn flags(is_writing: bool) -> EventFlags {
    if is_writing { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: duration.subsec_nanos().into() }
}
