//! A stream of a machine: one connection to hostd that carries one operation (docs/protocol.md, "Frames").

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use sandgate_frame::{CHANNEL_INPUT, Decoder, Frame, Kind, VERSION, WINDOW_BYTES, push, push_count, push_data};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::UnixStream;

/// The only stream of the connection.
const STREAM: u32 = 1;
const READ_BYTES: usize = 128 * 1024;
/// Credit goes back in steps: often enough that the sender never waits for it, seldom enough to cost nothing.
const CREDIT_STEP: u64 = WINDOW_BYTES / 4;

/// What hostd or the agent says went wrong, or what we say of the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// One of the protocol's codes.
    pub code: String,
    /// A sentence.
    pub message: String,
    /// Its cause.
    pub detail: Option<String>,
}

impl Trouble {
    /// Trouble of our own.
    pub fn new(code: &str, message: &str) -> Self {
        Self { code: code.to_owned(), message: message.to_owned(), detail: None }
    }

    /// The connection to hostd is gone.
    pub fn lost() -> Self {
        Self::new("link_lost", "the connection broke")
    }

    /// The peer does not keep to the protocol.
    pub fn violation() -> Self {
        Self::new("bad_frame", "the peer broke the protocol")
    }

    /// Whether a connection failed, here or between hostd and the agent, rather than the operation.
    pub fn is_break(&self) -> bool {
        matches!(&*self.code, "link_lost" | "agent_unreachable")
    }

    /// Reads an `ERROR` frame.
    pub fn of(payload: &[u8]) -> Self {
        let Ok(message) = serde_json::from_slice::<Value>(payload) else { return Self::violation() };
        let text = |name: &str| message.get(name).and_then(|value| value.as_str()).map(str::to_owned);
        let code = text("code").unwrap_or_else(|| "bad_frame".to_owned());
        Self { code, message: text("message").unwrap_or_default(), detail: text("detail") }
    }
}

/// See the module.
pub struct Link {
    stream: UnixStream,
    decoder: Decoder,
    outgoing: Vec<u8>,
    sent: usize,
    consumed: [u64; 4],
    is_lost: bool,
}

impl Link {
    /// Connects and asks for an operation.
    pub async fn open(socket: &Path, op: &[u8]) -> io::Result<Self> {
        let stream = UnixStream::connect(socket).await?;
        let mut outgoing = Vec::with_capacity(op.len() + 128);
        let hello = json!({"version": VERSION, "role": "api"}).to_string();
        push(&mut outgoing, Kind::Hello, 0, 0, hello.as_bytes());
        push(&mut outgoing, Kind::Open, 0, STREAM, op);
        let decoder = Decoder::default();
        Ok(Self { stream, decoder, outgoing, sent: 0, consumed: [0; 4], is_lost: false })
    }

    /// Bytes that have come and were not looked at yet.
    pub fn buffered(&self) -> usize {
        self.decoder.buffered()
    }

    /// Bytes that were not sent yet.
    pub fn unsent(&self) -> usize {
        self.outgoing.len() - self.sent
    }

    /// Whether nothing more will come than what has.
    pub fn is_lost(&self) -> bool {
        self.is_lost
    }

    /// Sends what there is to be sent and reads once.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.is_lost {
            return Poll::Ready(());
        }
        let outcome = self.poll_io(cx);
        if let Poll::Ready(Err(_)) = outcome {
            self.is_lost = true;
        }
        outcome.map(|_| ())
    }

    fn poll_io(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.unsent() > 0 {
            match self.stream.poll_write_ready(cx) {
                Poll::Ready(ready) => ready?,
                Poll::Pending => break,
            }
            self.send_now()?;
        }
        let mut space = ReadBuf::new(self.decoder.space(READ_BYTES));
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut space))?;
        let count = space.filled().len();
        self.decoder.advance(count);
        if count == 0 { Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())) } else { Poll::Ready(Ok(())) }
    }

    fn send_now(&mut self) -> io::Result<()> {
        match self.stream.try_write(&self.outgoing[self.sent..]) {
            Ok(count) => self.sent += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if self.unsent() == 0 {
            self.outgoing.clear();
            self.sent = 0;
        }
        Ok(())
    }

    /// The next frame of the operation, if it is here.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, Trouble> {
        match self.decoder.next_frame() {
            Ok(frame) => Ok(frame),
            Err(_) => Err(Trouble::violation()),
        }
    }

    /// Waits for the operation's reply.
    pub async fn reply(&mut self) -> Result<Value, Trouble> {
        loop {
            while let Some(frame) = self.next_frame()? {
                match frame.kind {
                    Kind::Reply => return serde_json::from_slice(frame.payload).map_err(|_| Trouble::violation()),
                    Kind::Error => return Err(Trouble::of(frame.payload)),
                    Kind::Close => return Err(Trouble::violation()),
                    _ => {}
                }
            }
            if self.is_lost {
                return Err(Trouble::lost());
            }
            std::future::poll_fn(|cx| self.poll(cx)).await;
        }
    }

    /// Sends input; what of it may be sent at once is up to the caller.
    pub fn put(&mut self, offset: u64, content: &[u8]) {
        push_data(&mut self.outgoing, CHANNEL_INPUT, STREAM, offset, content);
    }

    /// Says that the input had so many bytes.
    pub fn put_end(&mut self, total: u64) {
        push_count(&mut self.outgoing, Kind::End, CHANNEL_INPUT, STREAM, total);
    }

    /// Gives credit back for bytes that were used.
    pub fn used(&mut self, channel: u8, bytes: u64) {
        let consumed = &mut self.consumed[usize::from(channel & 3)];
        *consumed += bytes;
        if *consumed >= CREDIT_STEP {
            push_count(&mut self.outgoing, Kind::Credit, channel, STREAM, std::mem::take(consumed));
        }
    }

    /// Sends last words, as far as they can be sent at once, and leaves.
    pub fn leave(mut self, words: &[(Kind, &[u8])]) {
        for (kind, payload) in words {
            push(&mut self.outgoing, *kind, 0, STREAM, payload);
        }
        // A hostd that takes nothing more learns of it by the end of the connection.
        let _ = self.send_now();
    }
}
