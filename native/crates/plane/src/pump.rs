//! Moves one body from a reader to a writer, as it comes.

use std::cell::Cell;
use std::io;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::buf::{HeadBuf, Inbox};
use crate::config::ms;
use crate::http::HeadError;
use crate::http::body::{Body, Piece};
use crate::http::fields::{self, Name};
use crate::metrics::Count;
use crate::net::write_both;
use crate::pace::{Floor, Pace};
use crate::table::Sandbox;
use crate::watch::{Deadline, End, Phase, Watch};
use crate::worker::Worker;

/// Why a body could not be passed on whole.
pub enum PumpError {
    /// The sender broke off.
    Read,
    /// The receiver did.
    Write,
    /// The sender's framing is wrong.
    Malformed(HeadError),
    /// The body is larger than it may be.
    TooLarge,
}

/// One direction of an exchange: its deadlines and counters.
pub struct Flow<'a> {
    /// The worker.
    pub worker: &'a Worker,
    /// The connection's deadlines.
    pub watch: &'a Watch,
    /// Phase and seconds while waiting for the sender.
    pub read: (Phase, f64),
    /// Phase and seconds while waiting for the receiver.
    pub write: (Phase, f64),
    /// Bytes passed.
    pub count: &'a Count,
    /// Told of traffic.
    pub sandbox: Option<&'a Sandbox>,
    /// From the client, whose bytes wake the sandbox.
    pub is_up: bool,
    /// Most bytes of content that may pass.
    pub bytes_max: u64,
    /// Send the contents of chunks only, for a receiver that cannot read chunks.
    pub is_unchunked: bool,
    /// Set once the receiver has taken a byte.
    pub has_sent: &'a Cell<bool>,
    /// How fast the client is, at whichever end it is.
    pub pace: Pace,
}

impl Flow<'_> {
    /// Starts the clock for a wait.
    pub fn wait(&self, (phase, seconds): (Phase, f64)) {
        self.deadline().set(phase, self.worker.after(seconds));
    }

    /// The deadline of its direction.
    pub fn deadline(&self) -> &Deadline {
        if self.is_up { &self.watch.up } else { &self.watch.down }
    }

    /// Ends the connection of a client that has moved `bytes` at the end of too long a wait.
    pub fn judge(&self, bytes: usize, waiting_since_ms: u64) {
        let limits = &self.worker.config.limits;
        let floor = Floor { bytes_per_s: limits.client_bytes_per_s_min, window_ms: ms(limits.client_rate_window_s) };
        if self.pace.is_too_slow(bytes, self.worker.now_ms() - waiting_since_ms, floor) {
            self.watch.finish(End::Timeout(if self.is_up { Phase::SlowBody } else { Phase::SlowSend }));
        }
    }

    /// Reads more of the body; 0 at its end.
    async fn read<R: AsyncRead + Unpin>(&self, inbox: &mut Inbox, reader: &mut R) -> io::Result<usize> {
        self.wait(self.read);
        let since_ms = self.worker.now_ms();
        let count = inbox.fill(reader).await?;
        // A request that is answered before its end is a conversation, in which pauses are no offence.
        if self.is_up && !self.watch.is_answering.get() {
            self.judge(count, since_ms);
        }
        Ok(count)
    }

    /// Sends `head` and `body`.
    pub async fn write<W: AsyncWrite + Unpin>(
        &self,
        writer: &mut W,
        head: &[u8],
        body: &[u8],
    ) -> Result<(), PumpError> {
        self.wait(self.write);
        self.count.add(body.len() as u64);
        if let Some(sandbox) = self.sandbox {
            sandbox.touch();
            if self.is_up {
                self.worker.knock(sandbox);
            }
        }
        let since_ms = Cell::new(self.worker.now_ms());
        let on_progress = |count| {
            self.has_sent.set(true);
            self.wait(self.write);
            if !self.is_up {
                self.judge(count, since_ms.replace(self.worker.now_ms()));
            }
        };
        write_both(writer, head, body, on_progress).await.map_err(|_| PumpError::Write)
    }
}

/// What of the input can be passed on at once.
struct Span {
    len: usize,
    /// How much of it is not framing.
    content: usize,
    next: Next,
}

enum Next {
    Read,
    Trailers(usize),
    Skip(usize),
    End,
}

/// Finds the longest run of `input` that can be passed on as it is.
fn span(body: &mut Body, input: &[u8], is_unchunked: bool) -> Result<Span, HeadError> {
    let (mut len, mut content) = (0, 0);
    loop {
        let next = match body.next(&input[len..])? {
            Piece::Framing(count) if is_unchunked => Next::Skip(count),
            Piece::Framing(count) => {
                len += count;
                continue;
            }
            Piece::Content(count) => {
                len += count;
                content += count;
                continue;
            }
            Piece::Trailers(count) => Next::Trailers(count),
            Piece::More => Next::Read,
            Piece::End => Next::End,
        };
        return Ok(Span { len, content, next });
    }
}

/// Sends `head` and then the body that starts in `inbox` and goes on in `reader`.
pub async fn pump<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    flow: &Flow<'_>,
    head: &[u8],
    body: &mut Body,
    inbox: &mut Inbox,
    reader: &mut R,
    writer: &mut W,
) -> Result<(), PumpError> {
    let mut head = head;
    let mut bytes_left = flow.bytes_max;
    loop {
        let Span { len, content, next } = span(body, inbox.data(), flow.is_unchunked).map_err(PumpError::Malformed)?;
        bytes_left = bytes_left.checked_sub(content as u64).ok_or(PumpError::TooLarge)?;
        if len > 0 || !head.is_empty() {
            flow.write(writer, head, &inbox.data()[..len]).await?;
            inbox.consume(len);
            head = &[];
        }
        match next {
            Next::End => return Ok(()),
            Next::Skip(count) => inbox.consume(count),
            Next::Trailers(count) => {
                if !flow.is_unchunked {
                    let trailers = trailers(flow.worker, &inbox.data()[..count]).map_err(PumpError::Malformed)?;
                    flow.write(writer, &trailers.0, &[]).await?;
                }
                inbox.consume(count);
            }
            Next::Read => match flow.read(inbox, reader).await {
                Ok(0) if body.may_end_by_close() => return Ok(()),
                Ok(0) | Err(_) => return Err(PumpError::Read),
                Ok(_) => {}
            },
        }
    }
}

/// A trailer section without the fields that a proxy acts on: in a trailer they can only mislead.
fn trailers(worker: &Worker, section: &[u8]) -> Result<HeadBuf, HeadError> {
    let mut out = HeadBuf::take();
    let mut fields = worker.fields.take();
    fields.clear();
    let parsed = fields::parse(section, 0, &mut fields);
    for field in fields.iter().filter(|field| field.name == Name::Other) {
        out.0.extend_from_slice(field.line(section));
    }
    out.0.extend_from_slice(b"\r\n");
    worker.fields.replace(fields);
    parsed.map(|()| out)
}
