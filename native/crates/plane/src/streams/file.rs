//! A file of a sandbox on its way to a client: hostd's frames in, the body of an answer out.
//!
//! ```text
//! order ──READ──▶ reply: how large it is ──▶ 200, 206 or 416 ──▶ as many bytes as were promised
//!    └─ refused: the API hears of it       ├─ link breaks ─▶ READ where it was, if the file is the same
//!                                          └─ file shrinks, or cannot be read on ─▶ the connection is cut
//! ```
//!
//! Bytes go from hostd's connection to the client's without a stop, so no more of them than the credit of one channel
//! are under way, and hostd never has to wait for the plane.

use std::fmt::Write as _;
use std::path::Path;

use sandgate_frame::{CHANNEL_STDOUT, Kind};
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::io::AsyncWrite;

use super::asking::ask;
use super::machine::{Link, Trouble};
use super::span::{Part, Span};
use super::time::iso;
use crate::pump::{Flow, PumpError};

/// What the API orders.
#[derive(Debug, Deserialize)]
pub struct Wanted {
    /// The operation that reads the file, without the part.
    op: Map<String, Value>,
    /// The part; none for all of it.
    span: Option<Span>,
    /// Header lines of an answer with the file, with places for what is not known before.
    fields: String,
}

/// A file as it was when it was opened.
#[derive(Debug, Deserialize, PartialEq)]
struct Info {
    size: u64,
    mode: u32,
    modified_at: f64,
    resolved_path: Option<String>,
}

/// Why the next bytes did not reach the client.
enum Stop {
    Trouble(Trouble),
    Pump(PumpError),
}

impl From<Trouble> for Stop {
    fn from(trouble: Trouble) -> Self {
        Self::Trouble(trouble)
    }
}

impl From<PumpError> for Stop {
    fn from(error: PumpError) -> Self {
        Self::Pump(error)
    }
}

/// A file that is open.
pub struct File {
    op: Map<String, Value>,
    info: Info,
    part: Option<Part>,
    is_partial: bool,
    fields: String,
    link: Option<Link>,
    /// Of the part.
    sent: u64,
}

impl File {
    /// Opens what is wanted.
    pub async fn open(socket: &Path, wanted: Wanted) -> Result<Self, Trouble> {
        let Wanted { op, span, fields } = wanted;
        let mut file = Self {
            op,
            info: Info { size: 0, mode: 0, modified_at: 0.0, resolved_path: None },
            part: None,
            is_partial: span.is_some(),
            fields,
            link: None,
            sent: 0,
        };
        let (offset, length) = match span {
            None => (0, None),
            Some(Span { first: Some(first), last }) => (first, last.map(|last| last - first + 1)),
            Some(Span { first: None, last }) => {
                // Where the end is, is not known before.
                let found = file.ask(socket, 0, Some(0)).await?;
                (found.size.saturating_sub(last.unwrap_or(0)), last)
            }
        };
        file.info = file.ask(socket, offset, length).await?;
        file.part = Part::of(offset, length, file.info.size);
        Ok(file)
    }

    /// Asks for a part; what the file is.
    async fn ask(&mut self, socket: &Path, offset: u64, length: Option<u64>) -> Result<Info, Trouble> {
        self.op.insert("offset".into(), offset.into());
        match length {
            Some(length) => self.op.insert("length".into(), length.into()),
            None => self.op.remove("length"),
        };
        let op = serde_json::to_vec(&self.op).map_err(|_| Trouble::violation())?;
        let reply = ask(socket, &op, &mut self.link).await?;
        serde_json::from_value(reply).map_err(|_| Trouble::violation())
    }

    /// Status of the answer.
    pub fn status(&self) -> u16 {
        match (&self.part, self.is_partial) {
            (_, false) => 200,
            (Some(_), true) => 206,
            (None, true) => 416,
        }
    }

    fn length(&self) -> u64 {
        self.part.map_or(0, |part| part.length)
    }

    /// Header lines of the answer.
    pub fn fields(&self) -> String {
        let Info { size, mode, modified_at, .. } = self.info;
        let mut out = format!("Content-Length: {}\r\n", self.length());
        match self.part {
            None if self.is_partial => {
                let _ = write!(out, "Content-Range: bytes */{size}\r\n");
                return out;
            }
            Some(part) if self.is_partial => {
                let last = part.offset + part.length - 1;
                let _ = write!(out, "Content-Range: bytes {}-{last}/{size}\r\n", part.offset);
            }
            _ => {}
        }
        out + &self.fields.replace("$mode", &format!("{mode:04o}")).replace("$modified_at", &iso(modified_at))
    }

    /// Sends `head` and the bytes it promises.
    pub async fn relay<W: AsyncWrite + Unpin>(
        mut self,
        socket: &Path,
        flow: &Flow<'_>,
        head: &[u8],
        writer: &mut W,
    ) -> Result<(), PumpError> {
        let mut head = head;
        while self.sent < self.length() {
            match self.pass(flow, &mut head, writer).await {
                Ok(()) => {}
                Err(Stop::Trouble(trouble)) => self.recover(socket, trouble).await.map_err(|_| PumpError::Read)?,
                Err(Stop::Pump(error)) => return Err(error),
            }
        }
        if !head.is_empty() {
            flow.write(writer, head, b"").await?;
        }
        flow.deadline().clear();
        Ok(())
    }

    /// Passes on what is here, or waits for more.
    async fn pass<W: AsyncWrite + Unpin>(
        &mut self,
        flow: &Flow<'_>,
        head: &mut &[u8],
        writer: &mut W,
    ) -> Result<(), Stop> {
        let left = self.length() - self.sent;
        let link = self.link.as_mut().ok_or_else(Trouble::lost)?;
        let Some(frame) = link.next_frame()? else {
            if link.is_lost() {
                return Err(Trouble::lost().into());
            }
            flow.wait(flow.read);
            std::future::poll_fn(|cx| link.poll(cx)).await;
            return Ok(());
        };
        match frame.kind {
            Kind::Data if frame.channel == CHANNEL_STDOUT => {
                let (_, data) = frame.count().ok_or_else(Trouble::violation)?;
                // A file that grows meanwhile has more than was promised.
                let data = &data[..data.len().min(usize::try_from(left).unwrap_or(usize::MAX))];
                flow.write(writer, head, data).await?;
                *head = &[];
                let count = data.len() as u64;
                self.sent += count;
                link.used(CHANNEL_STDOUT, count);
                Ok(())
            }
            Kind::Error => Err(Trouble::of(frame.payload).into()),
            // There is less than was promised.
            Kind::Data | Kind::End | Kind::Close => Err(PumpError::Read.into()),
            _ => Ok(()),
        }
    }

    /// Has a link that goes on where the last one broke.
    async fn recover(&mut self, socket: &Path, trouble: Trouble) -> Result<(), Trouble> {
        self.link = None;
        if !trouble.is_break() {
            return Err(trouble);
        }
        let offset = self.part.map_or(0, |part| part.offset) + self.sent;
        let found = self.ask(socket, offset, Some(self.length() - self.sent)).await?;
        if found == self.info { Ok(()) } else { Err(Trouble::new("link_lost", "the file changed meanwhile")) }
    }
}
