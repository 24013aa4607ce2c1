//! Standard input of a process: bytes accepted from clients and not yet taken by it.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::unistd::write;

use super::StreamKey;
use sandgate_frame::WINDOW_BYTES;

/// Credit is returned in lumps of this size, not per keystroke.
const CREDIT_BYTES: u64 = WINDOW_BYTES / 4;
/// Streams remembered as due some credit; beyond it the oldest has long ended.
const DUE_MAX: usize = 8;
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
    /// Whose credit the queued bytes have used, oldest first. Frames of a connection that has broken can arrive between
    /// those of the one that replaced it, so each stream's account is its own.
    senders: VecDeque<(Option<StreamKey>, u64)>,
    due: VecDeque<(StreamKey, u64)>,
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
        if self.unpaid(sender) + bytes.len() as u64 > WINDOW_BYTES {
            return Err("more input than the credit allows".to_owned());
        }
        let known = ((self.received - offset) as usize).min(bytes.len());
        let fresh = &bytes[known..];
        self.received += fresh.len() as u64;
        self.owe(sender, known as u64);
        if self.is_open() {
            self.enqueue(Some(sender), fresh);
        } else {
            self.owe(sender, fresh.len() as u64);
        }
        Ok(())
    }

    /// Accept as many of `bytes` as there is room for, outside the channel's offsets.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let room = (WINDOW_BYTES as usize).saturating_sub(self.queue.len());
        let taken = &bytes[..bytes.len().min(room)];
        self.enqueue(None, taken);
        taken.len()
    }

    /// No more input will come: the process sees end of file after what is queued.
    pub fn end(&mut self) {
        if self.is_pty && !self.ended {
            self.enqueue(None, &[END_OF_TRANSMISSION]);
        }
        self.ended = true;
        self.flush();
    }

    /// Nobody takes input any more.
    pub fn close(&mut self) {
        (self.fd, self.closed) = (None, true);
        self.taken(self.queue.len() as u64);
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
                    self.taken(bytes as u64);
                }
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => {}
                // It closed its input; the rest has no taker, which is no error of the sender.
                Err(_) => self.close(),
            }
        }
    }

    /// Credit to return to `stream` for its bytes that were taken.
    pub fn take_credit(&mut self, stream: StreamKey) -> Option<u64> {
        let at = self.due.iter().position(|(key, bytes)| *key == stream && *bytes >= CREDIT_BYTES)?;
        self.due.remove(at).map(|(_, bytes)| bytes)
    }

    fn enqueue(&mut self, sender: Option<StreamKey>, bytes: &[u8]) {
        self.queue.extend(bytes);
        match self.senders.back_mut().filter(|(last, _)| *last == sender) {
            Some((_, queued)) => *queued += bytes.len() as u64,
            None => self.senders.push_back((sender, bytes.len() as u64)),
        }
        self.flush();
    }

    /// The oldest `bytes` of the queue have left it.
    fn taken(&mut self, mut bytes: u64) {
        while let Some((sender, queued)) = self.senders.front_mut().filter(|_| bytes > 0) {
            let part = bytes.min(*queued);
            let sender = *sender;
            *queued -= part;
            bytes -= part;
            if *queued == 0 {
                self.senders.pop_front();
            }
            if let Some(sender) = sender {
                self.owe(sender, part);
            }
        }
    }

    /// What a stream has sent beyond the credit it got back. A client that returns after a break starts with a window
    /// of its own, while what it sent before may still be queued.
    fn unpaid(&self, sender: StreamKey) -> u64 {
        let queued = self.senders.iter().filter(|(key, _)| *key == Some(sender)).map(|(_, bytes)| bytes);
        let due = self.due.iter().filter(|(key, _)| *key == sender).map(|(_, bytes)| bytes);
        queued.chain(due).sum()
    }

    fn owe(&mut self, sender: StreamKey, bytes: u64) {
        if let Some((_, due)) = self.due.iter_mut().find(|(key, _)| *key == sender) {
            *due += bytes;
            return;
        }
        if self.due.len() == DUE_MAX {
            self.due.pop_front();
        }
        self.due.push_back((sender, bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BROKEN: StreamKey = StreamKey { conn: 1, stream: 1 };
    const FRESH: StreamKey = StreamKey { conn: 2, stream: 1 };
    const PART: usize = CREDIT_BYTES as usize;

    /// Input whose reader takes nothing yet.
    fn stalled() -> Input {
        Input::default()
    }

    #[test]
    fn every_stream_gets_back_the_credit_it_used_however_they_interleave() {
        let mut input = stalled();
        input.receive(FRESH, 0, &vec![0; PART]).unwrap();
        input.receive(BROKEN, 0, &vec![0; 2 * PART]).unwrap();
        input.receive(FRESH, PART as u64, &vec![0; 3 * PART]).unwrap();
        assert_eq!(input.received(), 4 * CREDIT_BYTES);
        assert_eq!(input.take_credit(FRESH), Some(CREDIT_BYTES));
        input.close();
        assert_eq!(input.take_credit(FRESH), Some(3 * CREDIT_BYTES));
        assert_eq!(input.take_credit(BROKEN), Some(2 * CREDIT_BYTES));
        assert_eq!(input.take_credit(FRESH), None);
    }

    #[test]
    fn what_was_accepted_before_is_not_taken_twice_and_a_gap_is_refused() {
        let mut input = stalled();
        input.receive(FRESH, 0, b"abc").unwrap();
        input.receive(FRESH, 1, b"bcde").unwrap();
        assert_eq!(input.queue, b"abcde");
        assert!(input.receive(FRESH, 6, b"g").is_err());
    }

    #[test]
    fn a_client_that_returns_has_a_window_of_its_own() {
        let mut input = stalled();
        let window = vec![0; WINDOW_BYTES as usize];
        input.receive(BROKEN, 0, &window).unwrap();
        input.receive(FRESH, WINDOW_BYTES, &window).unwrap();
        assert_eq!(input.received(), 2 * WINDOW_BYTES);
    }
}
