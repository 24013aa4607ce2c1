//! Handing the listening sockets to a successor, over the control socket.
//!
//! ```text
//! successor                              predecessor
//!   hand_over            ──▶               ends its control connections, so the routes file is complete
//!                        ◀──               listener (with descriptors) …, handed_over
//!   reads the routes file, listens,
//!   serves; done         ──▶               accepts no more; what is under way ends within the drain's time-out
//! ```
//!
//! The sockets themselves pass from one process to the other: no connection that waits in them is lost. A successor
//! that ends before `done` has changed nothing: the predecessor takes up its work again.

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use crate::listen::{self, Address, Listening};

/// Descriptors in one message; the kernel permits 253.
const DESCRIPTORS_MAX: usize = 64;
/// For the other side to say the next thing.
const PATIENCE: Duration = Duration::from_secs(10);
const RECEIVE_BYTES: usize = 4096;

/// What a listener is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Public, without TLS.
    Plain,
    /// Public, with TLS.
    Tls,
    /// For operators.
    Admin,
}

/// The sockets that share an address.
pub struct Group {
    /// What they are for.
    pub kind: Kind,
    /// The address.
    pub address: Address,
    /// One per worker.
    pub sockets: Vec<Listening>,
}

impl Group {
    /// The sockets `all` lead to, once more.
    pub fn copy(kind: Kind, all: &[Listening]) -> io::Result<Self> {
        let sockets = all.iter().map(Listening::try_clone).collect::<io::Result<Vec<_>>>()?;
        let address = sockets.first().map_or_else(|| Err(io::ErrorKind::NotFound.into()), Listening::address)?;
        Ok(Self { kind, address, sockets })
    }
}

/// What the two processes say to each other.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "t", rename_all = "snake_case")]
pub enum Line {
    /// From the successor: the request. The control connection knows it as one of its messages.
    HandOver,
    /// From the predecessor: so many sockets come with this line.
    Listener {
        /// What they are for.
        kind: Kind,
        /// Their address.
        address: Address,
        /// How many.
        count: usize,
    },
    /// From the predecessor: that was all.
    HandedOver,
    /// From the successor: it serves.
    Done,
    /// Whatever else is said on a control connection.
    #[serde(other)]
    Other,
}

fn encode(line: &Line) -> io::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(line)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Sends all sockets.
pub async fn send(stream: &tokio::net::UnixStream, groups: &[Group]) -> io::Result<()> {
    for group in groups {
        for batch in group.sockets.chunks(DESCRIPTORS_MAX) {
            let line = Line::Listener { kind: group.kind, address: group.address.clone(), count: batch.len() };
            send_line(stream, &line, batch).await?;
        }
    }
    send_line(stream, &Line::HandedOver, &[]).await
}

async fn send_line(stream: &tokio::net::UnixStream, line: &Line, sockets: &[Listening]) -> io::Result<()> {
    let bytes = encode(line)?;
    let descriptors: Vec<BorrowedFd<'_>> = sockets.iter().map(AsFd::as_fd).collect();
    let give = || {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        Ok(sendmsg(stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?)
    };
    // So short a line is taken whole or not at all by an empty socket.
    match stream.async_io(tokio::io::Interest::WRITABLE, give).await? {
        sent if sent == bytes.len() => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// The process whose work is taken over.
pub struct Predecessor {
    stream: UnixStream,
    groups: Vec<Group>,
}

impl Predecessor {
    /// Asks the plane at the control socket for its listeners; none if there is no plane.
    pub fn find(control_socket: &Path) -> io::Result<Option<Self>> {
        let stream = match UnixStream::connect(control_socket) {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut predecessor = Self { stream, groups: Vec::new() };
        predecessor.say(&Line::HandOver)?;
        predecessor.receive()?;
        Ok(Some(predecessor))
    }

    /// The sockets of one address, if there are any. Port 0 takes whatever port there is.
    pub fn take(&mut self, kind: Kind, address: &Address) -> Option<Group> {
        let is_same = |found: &Address| match (found, address) {
            (Address::Tcp(found), Address::Tcp(wanted)) if wanted.port() == 0 => found.ip() == wanted.ip(),
            _ => found == address,
        };
        let at = self.groups.iter().position(|group| group.kind == kind && is_same(&group.address))?;
        Some(self.groups.remove(at))
    }

    /// Tells it that this process serves now. What it had and was not taken ends.
    pub fn dismiss(mut self) -> io::Result<()> {
        listen::forget(self.groups.iter().map(|group| &group.address));
        self.say(&Line::Done)
    }

    fn say(&mut self, line: &Line) -> io::Result<()> {
        self.stream.write_all(&encode(line)?)
    }

    fn receive(&mut self) -> io::Result<()> {
        let mut waiting = Vec::new();
        let mut descriptors = std::collections::VecDeque::new();
        loop {
            while let Some(end) = memchr::memchr(b'\n', &waiting) {
                let line: Line = serde_json::from_slice(&waiting[..end])?;
                waiting.drain(..=end);
                match line {
                    Line::HandedOver => return Ok(()),
                    Line::Listener { kind, address, count } => {
                        let received = descriptors.drain(..count.min(descriptors.len()));
                        let sockets = received.map(|descriptor| Listening::inherited(&address, descriptor)).collect();
                        self.keep(Group { kind, address, sockets });
                    }
                    Line::HandOver | Line::Done | Line::Other => {}
                }
            }
            if receive_some(&self.stream, &mut waiting, &mut descriptors)? == 0 {
                let message = "the running plane does not hand over its listeners";
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
            }
        }
    }

    /// Puts the batches of one address together.
    fn keep(&mut self, batch: Group) {
        match self.groups.iter_mut().find(|group| group.kind == batch.kind && group.address == batch.address) {
            Some(group) => group.sockets.extend(batch.sockets),
            None => self.groups.push(batch),
        }
    }
}

fn receive_some(stream: &UnixStream, bytes: &mut Vec<u8>, descriptors: &mut impl Extend<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffer = [0; RECEIVE_BYTES];
    let received = recvmsg(stream, &mut [IoSliceMut::new(&mut buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            descriptors.extend(fds);
        }
    }
    bytes.extend_from_slice(&buffer[..received.bytes]);
    Ok(received.bytes)
}
