//! The output of a process as an event stream: hostd's frames in, server-sent events out.
//!
//! ```text
//! order ──OPEN──▶ reply ──▶ running ──exit──▶ over
//!    └─ refused: the API's words for it   ├─ link breaks ─▶ ATTACH where it was ─▶ running
//!                                         └─ client leaves ─▶ the link is closed
//! ```
//!
//! The process is started once, however often the operation had to be sent: the agent knows it by its id. A slow client
//! holds up its own process, by credit, and nobody else. What becomes of the process of one that leaves is up to hostd,
//! for which a plane that is killed has left just as well.

use std::path::Path;
use std::pin::Pin;
use std::task::{Poll, ready};
use std::time::Duration;

use sandgate_frame::{CHANNEL_PTY, CHANNEL_STDERR, CHANNEL_STDOUT, Kind};
use serde_json::Value;
use tokio::io::AsyncWrite;
use tokio::time::timeout;

use super::asking::ask;
use super::chunk::Chunk;
use super::lines::Lines;
use super::machine::{Link, Trouble};
use super::wanted::{Refusal, Wanted};
use crate::pump::{Flow, PumpError};

/// Output without a line end is passed on after this pause, so that a progress bar moves.
const PARTIAL_PAUSE: Duration = Duration::from_millis(50);
/// Bytes of frames made before they are sent, and taken from hostd while the client takes nothing: more than the
/// credit of two channels never comes.
const OUT_BYTES: usize = 256 * 1024;
const BUFFERED_MAX: usize = 3 * 1024 * 1024;

/// A process whose output flows.
pub struct Output {
    wanted: Wanted,
    link: Option<Link>,
    id: String,
    /// Standard output, standard error, terminal.
    channels: [Lines; 3],
    offsets: [u64; 4],
}

/// What came of taking frames.
enum Taken {
    /// All that was here.
    All,
    /// As much as may wait to be sent.
    Enough,
    /// The process has ended, or is left by the agent.
    End,
}

impl Output {
    /// Asks for what is wanted; the process runs when this returns.
    pub async fn start(socket: &Path, wanted: Wanted) -> Result<Self, Refusal> {
        let (channels, op) = (wanted.channels(), wanted.open());
        let mut output = Self { wanted, link: None, id: String::new(), channels, offsets: [0; 4] };
        match output.open(socket, &op).await {
            Ok(()) => Ok(output),
            Err(trouble) => Err(output.wanted.refuse(&trouble)),
        }
    }

    /// Has a link that carries the operation.
    async fn open(&mut self, socket: &Path, op: &[u8]) -> Result<(), Trouble> {
        let reply = ask(socket, op, &mut self.link).await?;
        let id = reply.get("id").and_then(Value::as_str).ok_or_else(Trouble::violation)?;
        id.clone_into(&mut self.id);
        Ok(())
    }

    /// Makes frames of what is here, as many as are worth sending at once.
    fn take(&mut self, out: &mut Vec<u8>) -> Result<Taken, Trouble> {
        let Some(link) = &mut self.link else { return Err(Trouble::lost()) };
        while out.len() < OUT_BYTES {
            let Some(frame) = link.next_frame()? else {
                return if link.is_lost() { Err(Trouble::lost()) } else { Ok(Taken::All) };
            };
            match frame.kind {
                Kind::Data => {
                    let (offset, data) = frame.count().ok_or_else(Trouble::violation)?;
                    let channel = frame.channel;
                    let lines = match channel {
                        CHANNEL_STDOUT | CHANNEL_STDERR | CHANNEL_PTY => &mut self.channels[usize::from(channel) - 1],
                        _ => return Err(Trouble::violation()),
                    };
                    lines.feed(data, out);
                    let count = data.len() as u64;
                    self.offsets[usize::from(channel)] = offset + count;
                    link.used(channel, count);
                }
                Kind::Event => {
                    let event: Value = serde_json::from_slice(frame.payload).map_err(|_| Trouble::violation())?;
                    if event.get("type").and_then(Value::as_str) == Some("exit") {
                        self.channels.iter_mut().for_each(|lines| lines.flush(true, out));
                        out.extend(self.wanted.end(&event));
                        if let Some(link) = self.link.take() {
                            link.leave(&[(Kind::Ack, b"")]);
                        }
                        return Ok(Taken::End);
                    }
                }
                Kind::Close => {
                    self.channels.iter_mut().for_each(|lines| lines.flush(true, out));
                    self.link = None;
                    return Ok(Taken::End);
                }
                Kind::Error => return Err(Trouble::of(frame.payload)),
                _ => {}
            }
        }
        Ok(Taken::Enough)
    }

    /// Has a working link again after a break.
    async fn recover(&mut self, socket: &Path, trouble: Trouble) -> Result<(), Trouble> {
        self.link = None;
        if !trouble.is_break() {
            return Err(trouble);
        }
        let op = self.wanted.attach(&self.id, &self.offsets);
        self.open(socket, &op).await.map_err(|trouble| match &*trouble.code {
            "no_such_process" => Trouble::new("no_answer", "the process is not known any more, nor how it ended"),
            _ => trouble,
        })
    }

    /// Sends `head` and then the output to its end.
    pub async fn relay<W: AsyncWrite + Unpin>(
        mut self,
        socket: &Path,
        flow: &Flow<'_>,
        head: &[u8],
        writer: &mut W,
        heartbeat: Duration,
    ) -> Result<(), PumpError> {
        let mut out = Chunk::new(flow.is_unchunked);
        out.begin(head);
        out.bytes.extend_from_slice(self.wanted.opening.as_bytes());
        let (mut is_over, mut trouble) = (false, None);
        loop {
            out.end(is_over);
            if !out.bytes.is_empty() {
                self.send(flow, &out.bytes, writer).await?;
            }
            if is_over {
                return Ok(());
            }
            out.begin(b"");
            // What came before the trouble has gone out.
            if let Some(trouble) = trouble.take() {
                if let Err(trouble) = self.recover(socket, trouble).await {
                    out.bytes.extend(self.wanted.fail(&trouble));
                    is_over = true;
                }
                continue;
            }
            match self.take(&mut out.bytes) {
                Ok(Taken::End) => is_over = true,
                Ok(Taken::All) if out.is_empty() => self.wait(&mut out.bytes, heartbeat).await,
                Ok(Taken::All | Taken::Enough) => {}
                Err(found) => trouble = Some(found),
            }
        }
    }

    /// Waits for more; in a pause, appends what is to be sent then.
    async fn wait(&mut self, out: &mut Vec<u8>, heartbeat: Duration) {
        let Some(link) = &mut self.link else { return };
        let has_partial = self.channels.iter().any(Lines::has_partial);
        let pause = if has_partial { PARTIAL_PAUSE } else { heartbeat };
        if timeout(pause, std::future::poll_fn(|cx| link.poll(cx))).await.is_ok() {
            return;
        }
        if has_partial {
            self.channels.iter_mut().for_each(|lines| lines.flush(false, out));
        } else {
            out.extend_from_slice(self.wanted.heartbeat.as_bytes());
        }
    }

    /// Sends to the client, and takes from hostd meanwhile: a connection that is not read holds up others.
    async fn send<W: AsyncWrite + Unpin>(
        &mut self,
        flow: &Flow<'_>,
        data: &[u8],
        writer: &mut W,
    ) -> Result<(), PumpError> {
        let mut data = data;
        flow.wait(flow.write);
        flow.count.add(data.len() as u64);
        let sent = std::future::poll_fn(|cx| {
            while let Some(link) = self.link.as_mut().filter(|link| !link.is_lost() && link.buffered() < BUFFERED_MAX) {
                if link.poll(cx).is_pending() {
                    break;
                }
            }
            while !data.is_empty() {
                let count = ready!(Pin::new(&mut *writer).poll_write(cx, data))?;
                if count == 0 {
                    return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into()));
                }
                flow.has_sent.set(true);
                flow.wait(flow.write);
                data = &data[count..];
            }
            Pin::new(&mut *writer).poll_flush(cx)
        });
        let outcome = sent.await.map_err(|_| PumpError::Write);
        flow.deadline().clear();
        outcome
    }
}
