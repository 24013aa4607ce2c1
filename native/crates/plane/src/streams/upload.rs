//! A file on its way from a client into a sandbox: the body of a request in, hostd's frames out.
//!
//! ```text
//! order ──WRITE──▶ content, as fast as the agent gives credit ──END──▶ reply: the file has its new content
//!                    └─ link breaks, client leaves, body is no good ─▶ dropped: the old file stays
//! ```
//!
//! The agent takes a write that breaks off back, so there is no second try.

use std::path::Path;
use std::task::{Context, Poll};

use sandgate_frame::{CHANNEL_INPUT, DATA_BYTES_MAX, Kind, WINDOW_BYTES};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::asking;
use super::machine::{Link, Trouble};

/// Content that waits for hostd to take it.
const UNSENT_BYTES_MAX: usize = 256 * 1024;

/// What the API orders.
#[derive(Debug, Deserialize)]
pub struct Wanted {
    /// The operation that writes the file.
    op: Map<String, Value>,
    /// Largest content.
    pub bytes_max: u64,
}

/// A write under way.
pub struct Upload {
    link: Link,
    credit: u64,
    sent: u64,
}

impl Upload {
    /// Begins to write.
    pub async fn open(socket: &Path, wanted: &Wanted) -> Result<Self, Trouble> {
        let op = serde_json::to_vec(&wanted.op).map_err(|_| Trouble::violation())?;
        let link = asking::open(socket, &op).await?;
        Ok(Self { link, credit: WINDOW_BYTES, sent: 0 })
    }

    /// How many bytes can be taken now.
    pub fn room(&self) -> usize {
        if self.link.unsent() >= UNSENT_BYTES_MAX {
            return 0;
        }
        usize::try_from(self.credit).unwrap_or(usize::MAX).min(DATA_BYTES_MAX)
    }

    /// Takes content, no more than there is room for.
    pub fn put(&mut self, content: &[u8]) {
        self.link.put(self.sent, content);
        self.sent += content.len() as u64;
        self.credit -= content.len() as u64;
    }

    /// The content is complete.
    pub fn end(&mut self) {
        self.link.put_end(self.sent);
    }

    /// What the agent has said: its reply, once the file is there.
    pub fn answer(&mut self) -> Result<Option<Value>, Trouble> {
        while let Some(frame) = self.link.next_frame()? {
            match frame.kind {
                Kind::Credit if frame.channel == CHANNEL_INPUT => {
                    let (count, _) = frame.count().ok_or_else(Trouble::violation)?;
                    self.credit = self.credit.saturating_add(count);
                }
                Kind::Reply => {
                    return serde_json::from_slice(frame.payload).map(Some).map_err(|_| Trouble::violation());
                }
                Kind::Error => return Err(Trouble::of(frame.payload)),
                Kind::Close => return Err(Trouble::violation()),
                _ => {}
            }
        }
        if self.link.is_lost() { Err(Trouble::lost()) } else { Ok(None) }
    }

    /// Ready when something came of the link: hostd has taken bytes, or said some.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let before = self.link.unsent();
        let polled = self.link.poll(cx);
        if self.link.unsent() < before { Poll::Ready(()) } else { polled }
    }
}
