//! Standard input of a process: bytes accepted from clients and not yet taken by it.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::unistd::write;

use super::StreamKey;
use sandgate_frame::WINDOW_BYTES;

/// Credit is returned in lumps of this size, not per keystroke.
const CREDIT_BYTES: u64 = WINDOW_BYTES / 4;
/// End-of-file character of a terminal in its usual mode.
const END_OF_TRANSMISSION: u8 = 4;

/// The writing side of a process's standard input. What comes while the process is starting waits for [`Input::open`].
#[derive(Debug, Default)]
pub struct Input {
    fd: Option<OwnedFd>,
    is_pty: bool,
    closed: bool,
    queue: VecDeque<u8>,
    /// Bytes of the channel accepted so far; a client that returns continues here.
    received: u64,
    ended: bool,
    /// The stream whose credit the queued bytes have used, and how much of it is due back.
    sender: Option<StreamKey>,
    owed: u64,
    drained: u64,
}

impl Input {
    /// The process has started; without `fd` it reads nothing.
    pub fn open(&mut self, fd: Option<OwnedFd>, is_pty: bool) {
        (self.fd, self.is_pty) = (fd, is_pty);
        if self.fd.is_none() {
            self.close();
        } else if self.ended {
            self.ended = false;
            self.end();
        } else {
            self.flush();
        }
    }

    pub fn received(&self) -> u64 {
        self.received
    }

    /// Whether bytes can still reach the process.
    pub fn is_open(&self) -> bool {
        !self.closed && !self.ended
    }

    /// Accept `bytes` at `offset` of the channel from a stream. What was accepted before is not taken twice.
    pub fn receive(&mut self, sender: StreamKey, offset: u64, bytes: &[u8]) -> Result<(), String> {
        if offset > self.received {
            return Err(format!("input at offset {offset}, expected {}", self.received));
        }
        if self.queue.len() as u64 + bytes.len() as u64 > WINDOW_BYTES {
            return Err("more input than the credit allows".to_owned());
        }
        if self.sender != Some(sender) {
            (self.sender, self.owed, self.drained) = (Some(sender), 0, 0);
        }
        self.owed += bytes.len() as u64;
        let known = ((self.received - offset) as usize).min(bytes.len());
        let fresh = &bytes[known..];
        self.received += fresh.len() as u64;
        self.drained += known as u64;
        if self.is_open() {
            self.queue.extend(fresh);
            self.flush();
        } else {
            self.drained += fresh.len() as u64;
        }
        Ok(())
    }

    /// Accept as many of `bytes` as there is room for, outside the channel's offsets.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let room = (WINDOW_BYTES as usize).saturating_sub(self.queue.len());
        let taken = &bytes[..bytes.len().min(room)];
        self.queue.extend(taken);
        self.flush();
        taken.len()
    }

    /// No more input will come: the process sees end of file after what is queued.
    pub fn end(&mut self) {
        if self.is_pty && !self.ended {
            self.queue.push_back(END_OF_TRANSMISSION);
        }
        self.ended = true;
        self.flush();
    }

    /// Nobody takes input any more.
    pub fn close(&mut self) {
        (self.fd, self.closed) = (None, true);
        self.drained += self.queue.len() as u64;
        self.queue = VecDeque::new();
    }

    /// Write what the process takes now.
    pub fn flush(&mut self) {
        while let Some(fd) = &self.fd {
            let (front, _) = self.queue.as_slices();
            if front.is_empty() {
                // A terminal's descriptor has to live on, its end of file is only a character.
                if self.ended && !self.is_pty {
                    self.close();
                }
                return;
            }
            match write(fd, front) {
                Ok(bytes) => {
                    self.queue.drain(..bytes);
                    self.drained += bytes as u64;
                }
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => {}
                // It closed its input; the rest has no taker, which is no error of the sender.
                Err(_) => self.close(),
            }
        }
    }

    /// Credit to return to `stream`, if it is the one whose bytes were taken.
    pub fn take_credit(&mut self, stream: StreamKey) -> Option<u64> {
        let due = self.drained.min(self.owed);
        if self.sender != Some(stream) || due < CREDIT_BYTES {
            return None;
        }
        self.owed -= due;
        self.drained = 0;
        Some(due)
    }
}
