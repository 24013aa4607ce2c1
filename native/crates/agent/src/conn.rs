//! One connection: who is there, its frames, its open streams, and their turns.

use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use crate::core::{Core, Outcome};
use crate::error::{Code, OpError};
use crate::ops::{self, Opened};
use crate::poller::{Interest, Token};
use crate::process::StreamKey;
use crate::sender::Sender;
use crate::streams::{Advance, Stream};
use crate::timers::Timer;
use sandgate_frame::{Decoder, Frame, Kind, PAYLOAD_BYTES_MAX, VERSION};

const READ_BYTES: usize = 64 * 1024;
/// Read per turn of the loop, so that one flood does not starve the others.
const TURN_BYTES: usize = 1024 * 1024;
/// Any process inside the machine can connect; until it shows the token it gets next to nothing.
const HELLO_BYTES_MAX: usize = 4096;
const HELLO_WAIT: Duration = Duration::from_secs(10);
const WRONG_TOKENS_MAX: u8 = 3;
const STREAMS_MAX: usize = 1024;
/// Streams that ended with an exit status which may still be acknowledged.
const UNACKED_MAX: usize = 1024;
/// How long a reply may wait for the output it is likely to leave with. Below what anybody notices.
const LAZY_WAIT: Duration = Duration::from_millis(10);

struct Slot {
    stream: Stream,
    ready: bool,
}

#[derive(Deserialize)]
struct Hello {
    version: u32,
    #[serde(default)]
    token: String,
}

/// The connection cannot go on; nothing more is said on it.
pub struct Lost;

// Four independent facts, not a state machine in disguise.
#[allow(clippy::struct_excessive_bools)]
pub struct Conn {
    pub id: u64,
    sender: Sender,
    decoder: Decoder,
    trusted: bool,
    wrong_tokens: u8,
    streams: HashMap<u32, Slot>,
    ready: VecDeque<u32>,
    unacked: VecDeque<(u32, u64)>,
    readable: bool,
    hung_up: bool,
    flush_planned: bool,
}

impl Conn {
    pub fn new(id: u64, socket: TcpStream, core: &mut Core) -> std::io::Result<Self> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        core.poller.watch(socket.as_fd(), Interest::Both, Token::Conn { id });
        core.timers.after(HELLO_WAIT, Timer::Auth(id));
        Ok(Self {
            id,
            sender: Sender::new(socket),
            decoder: Decoder::new(HELLO_BYTES_MAX),
            trusted: false,
            wrong_tokens: 0,
            streams: HashMap::new(),
            ready: VecDeque::new(),
            unacked: VecDeque::new(),
            readable: false,
            hung_up: false,
            flush_planned: false,
        })
    }

    pub fn is_trusted(&self) -> bool {
        self.trusted
    }

    /// There is something to read. `hung_up`: nothing follows it, and no further report will come.
    pub fn on_readable(&mut self, hung_up: bool) {
        self.readable = true;
        self.hung_up |= hung_up;
    }

    /// Requests wait that were left unread while too much was waiting to be sent, and may be read now.
    pub fn can_receive(&self) -> bool {
        self.readable && !self.sender.is_choked()
    }

    fn key(&self, stream: u32) -> StreamKey {
        StreamKey { conn: self.id, stream }
    }

    /// Read and handle what has come. Whether there is more to read, next turn.
    pub fn receive(&mut self, core: &mut Core) -> Result<bool, Lost> {
        let mut total = 0;
        while self.can_receive() {
            if total > TURN_BYTES {
                return Ok(true);
            }
            let space = self.decoder.space(READ_BYTES);
            let asked = space.len();
            match self.sender.socket().read(space) {
                Ok(0) => return Err(Lost),
                Ok(bytes) => {
                    self.readable = bytes == asked || self.hung_up;
                    self.decoder.advance(bytes);
                    total += bytes;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(Lost),
            }
            self.handle_buffered(core)?;
        }
        Ok(false)
    }

    fn handle_buffered(&mut self, core: &mut Core) -> Result<(), Lost> {
        let mut decoder = std::mem::take(&mut self.decoder);
        let result = loop {
            match decoder.next_frame() {
                Ok(None) => break Ok(()),
                Ok(Some(frame)) if self.trusted => {
                    if let Err(lost) = self.handle(&frame, core) {
                        break Err(lost);
                    }
                }
                Ok(Some(frame)) => {
                    if let Err(lost) = self.greet(&frame, core) {
                        break Err(lost);
                    }
                    if self.trusted {
                        decoder.set_payload_bytes_max(PAYLOAD_BYTES_MAX);
                    }
                }
                Err(_) => break Err(Lost),
            }
        };
        self.decoder = decoder;
        result
    }

    fn greet(&mut self, frame: &Frame<'_>, core: &Core) -> Result<(), Lost> {
        if frame.kind != Kind::Hello || frame.stream != 0 {
            return Err(Lost);
        }
        let hello: Hello = serde_json::from_slice(frame.payload).map_err(|_| Lost)?;
        if !same_secret(hello.token.as_bytes(), core.token.as_bytes()) {
            self.wrong_tokens += 1;
            if self.wrong_tokens >= WRONG_TOKENS_MAX {
                return Err(Lost);
            }
            self.fail(0, &OpError::new(Code::Unauthorized, "wrong token"));
        } else if hello.version == VERSION {
            self.trusted = true;
            let ours = json!({"version": VERSION, "role": "agent", "boot_id": core.boot_id});
            self.sender.frame(Kind::Hello, 0, ours.to_string().as_bytes());
        } else {
            let message = format!("version {} is not {VERSION}", hello.version);
            self.fail(0, &OpError::new(Code::Unsupported, message));
        }
        Ok(())
    }

    fn handle(&mut self, frame: &Frame<'_>, core: &mut Core) -> Result<(), Lost> {
        let stream = frame.stream;
        match (frame.kind, stream) {
            (Kind::Ping, 0) => {
                self.sender.frame(Kind::Pong, 0, frame.payload);
                return Ok(());
            }
            (Kind::Pong, 0) => return Ok(()),
            (_, 0) => return Err(Lost),
            (Kind::Open, _) => return self.open(stream, frame.payload, core),
            (Kind::Close, _) => {
                self.unacked.retain(|(other, _)| *other != stream);
                self.drop_stream(stream, core);
                return Ok(());
            }
            (Kind::Ack, _) => {
                self.acknowledge(stream, core);
                return Ok(());
            }
            _ => {}
        }
        let key = self.key(stream);
        // A frame for a stream that has just ended here was sent before the client knew.
        let Some(slot) = self.streams.get_mut(&stream) else { return Ok(()) };
        let (count, content) = frame.count().unwrap_or((0, &[]));
        let result = match frame.kind {
            Kind::Data => slot.stream.on_data(key, core, count, content),
            Kind::End => slot.stream.on_end(core, count),
            Kind::Control => slot.stream.on_control(core, frame.payload),
            Kind::Credit => {
                slot.stream.on_credit(key, core, frame.channel, count);
                Ok(())
            }
            // Only a server sends the rest.
            _ => return Err(Lost),
        };
        match result {
            Ok(()) => self.wake(stream),
            Err(error) => self.abort(stream, &error, core),
        }
        Ok(())
    }

    fn open(&mut self, stream: u32, payload: &[u8], core: &mut Core) -> Result<(), Lost> {
        if self.streams.contains_key(&stream) {
            return Err(Lost);
        }
        if self.streams.len() >= STREAMS_MAX {
            self.fail(stream, &OpError::new(Code::TooMany, format!("{STREAMS_MAX} streams are open")));
            return Ok(());
        }
        match ops::open(self.key(stream), payload, core) {
            Ok(Opened::Stream(opened)) => {
                self.streams.insert(stream, Slot { stream: *opened, ready: false });
                self.wake(stream);
            }
            Ok(Opened::Reply(reply)) => self.finish(stream, &reply),
            Err(error) => self.fail(stream, &error),
        }
        Ok(())
    }

    fn acknowledge(&mut self, stream: u32, core: &mut Core) {
        if let Some(at) = self.unacked.iter().position(|(other, _)| *other == stream) {
            if let Some((_, serial)) = self.unacked.remove(at) {
                core.processes.acknowledged(serial);
                self.sender.frame(Kind::Close, stream, &[]);
            }
        }
    }

    fn fail(&mut self, stream: u32, error: &OpError) {
        self.sender.frame(Kind::Error, stream, &error.to_json());
    }

    fn finish(&mut self, stream: u32, reply: &[u8]) {
        if reply.len() > PAYLOAD_BYTES_MAX {
            return self.fail(stream, &OpError::new(Code::TooLarge, "the result is too large for one frame"));
        }
        self.sender.frame(Kind::Reply, stream, reply);
        self.sender.frame(Kind::Close, stream, &[]);
    }

    /// End a stream with an error, on this side and on the client's.
    pub fn abort(&mut self, stream: u32, error: &OpError, core: &mut Core) {
        self.drop_stream(stream, core);
        self.fail(stream, error);
    }

    /// The process that a stream is to follow could not be started.
    pub fn on_start_failed(&mut self, stream: u32, error: &OpError, core: &mut Core) {
        match self.streams.get_mut(&stream) {
            Some(Slot { stream: Stream::Setup(setup), .. }) => {
                setup.on_start_failed(error);
                self.wake(stream);
            }
            _ => self.abort(stream, error, core),
        }
    }

    fn drop_stream(&mut self, stream: u32, core: &mut Core) {
        let key = self.key(stream);
        if let Some(slot) = self.streams.remove(&stream) {
            slot.stream.abandon(key, core);
        }
    }

    /// The stream may have something to do.
    pub fn wake(&mut self, stream: u32) {
        if let Some(slot) = self.streams.get_mut(&stream).filter(|slot| !slot.ready) {
            slot.ready = true;
            self.ready.push_back(stream);
        }
    }

    /// The kernel has changes for a watch.
    pub fn on_watch(&mut self, stream: u32) {
        if let Some(Slot { stream: Stream::Watch(watch), .. }) = self.streams.get_mut(&stream) {
            watch.on_readable();
            self.wake(stream);
        }
    }

    /// A worker thread is done with something for the stream.
    pub fn on_outcome(&mut self, stream: u32, outcome: Outcome, core: &mut Core) {
        let key = self.key(stream);
        let Some(slot) = self.streams.get_mut(&stream) else { return };
        let result = match outcome {
            Outcome::Reply(result) => {
                self.streams.remove(&stream);
                return match result {
                    Ok(reply) => self.finish(stream, &reply),
                    Err(error) => self.fail(stream, &error),
                };
            }
            other => slot.stream.on_outcome(key, other, core),
        };
        match result {
            Ok(()) => self.wake(stream),
            Err(error) => self.abort(stream, &error, core),
        }
    }

    /// Give every ready stream its turns, then write. Called once per turn of the loop.
    pub fn settle(&mut self, core: &mut Core) -> Result<(), Lost> {
        while !self.ready.is_empty() && !self.sender.is_backed_up() {
            while let Some(stream) = self.ready.pop_front() {
                self.advance(stream, core);
                if self.sender.is_backed_up() {
                    break;
                }
            }
            if self.sender.is_urgent() {
                self.write()?;
            }
        }
        if self.sender.is_urgent() {
            self.write()?;
        }
        if !self.sender.is_empty() && !self.flush_planned {
            self.flush_planned = true;
            core.timers.after(LAZY_WAIT, Timer::Flush(self.id));
        }
        Ok(())
    }

    fn advance(&mut self, stream: u32, core: &mut Core) {
        let key = self.key(stream);
        let Some(slot) = self.streams.get_mut(&stream) else { return };
        slot.ready = false;
        match slot.stream.advance(key, &mut self.sender, core) {
            Ok(Advance::Idle) => {}
            Ok(Advance::Again) => self.wake(stream),
            Ok(Advance::Done) => {
                if let Some(Slot { stream: Stream::Exec(exec), .. }) = self.streams.remove(&stream) {
                    self.unacked.push_back((stream, exec.serial));
                    if self.unacked.len() > UNACKED_MAX {
                        if let Some((oldest, _)) = self.unacked.pop_front() {
                            self.sender.frame(Kind::Close, oldest, &[]);
                        }
                    }
                }
            }
            Err(error) => self.abort(stream, &error, core),
        }
    }

    /// The socket takes bytes again.
    pub fn on_writable(&mut self) -> Result<(), Lost> {
        self.write()
    }

    fn write(&mut self) -> Result<(), Lost> {
        if self.sender.flush() { Ok(()) } else { Err(Lost) }
    }

    /// Frames have waited long enough for company.
    pub fn on_flush_due(&mut self) -> Result<(), Lost> {
        self.flush_planned = false;
        self.on_writable()
    }

    /// The connection is over: let its streams go.
    pub fn close(mut self, core: &mut Core) {
        let id = self.id;
        for (stream, slot) in self.streams.drain() {
            slot.stream.abandon(StreamKey { conn: id, stream }, core);
        }
    }
}

/// Compare without telling by the time taken how much agreed.
fn same_secret(given: &[u8], expected: &[u8]) -> bool {
    let differences = given.iter().zip(expected).fold(0, |all, (a, b)| all | (a ^ b));
    given.len() == expected.len() && std::hint::black_box(differences) == 0
}
