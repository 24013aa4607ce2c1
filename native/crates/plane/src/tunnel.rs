//! An upgraded connection: bytes both ways until both sides have closed.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::task::Poll;

use tokio::io::AsyncWriteExt;

use crate::buf::{BUFFER_BYTES, Inbox};
use crate::exchange::Switch;
use crate::metrics::Count;
use crate::net::{Shared, Transport, write_both};
use crate::splice::{Pause, Pipe};
use crate::table::Sandbox;
use crate::watch::{Phase, Watch};
use crate::worker::Worker;

/// A read that fills half of a buffer; after so many in a row a direction is worth a pipe of its own.
const FULL_BYTES: usize = BUFFER_BYTES / 2;
const FULL_MIN: u32 = 8;

/// Carries a tunnel to its end. `inbox` and `switch.reply` hold what was received ahead.
pub async fn tunnel<C: Transport>(
    worker: &Worker,
    watch: &Watch,
    client: &Shared<C>,
    inbox: &mut Inbox,
    switch: Switch,
    sandbox: Option<&Sandbox>,
) {
    let Switch { upstream, mut reply } = switch;
    let upstream = Shared::new(upstream);
    let side = |count, is_up| Side { worker, watch, sandbox, count, is_up };
    let (up, down) = (side(&worker.counters.bytes_up, true), side(&worker.counters.bytes_down, false));
    worker.counters.tunnels.add(1);
    {
        let mut up = pin!(up.copy(inbox, client, &upstream));
        let mut down = pin!(down.copy(&mut reply, &upstream, client));
        let (mut is_up, mut is_down) = (true, true);
        poll_fn(|cx| {
            if is_up && let Poll::Ready(outcome) = up.as_mut().poll(cx) {
                is_up = false;
                if outcome.is_err() {
                    return Poll::Ready(());
                }
            }
            if is_down && let Poll::Ready(outcome) = down.as_mut().poll(cx) {
                is_down = false;
                if outcome.is_err() {
                    return Poll::Ready(());
                }
            }
            if is_up || is_down { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
    }
    watch.down.clear();
    worker.counters.tunnels.sub(1);
}

struct Side<'a> {
    worker: &'a Worker,
    watch: &'a Watch,
    sandbox: Option<&'a Sandbox>,
    count: &'a Count,
    /// From the client, whose bytes wake the sandbox.
    is_up: bool,
}

impl Side<'_> {
    async fn copy<R: Transport, W: Transport>(
        &self,
        inbox: &mut Inbox,
        mut reader: &Shared<R>,
        mut writer: &Shared<W>,
    ) -> io::Result<()> {
        let can_splice = reader.is_socket() && writer.is_socket();
        let mut full = 0;
        self.note_traffic();
        loop {
            if inbox.is_empty() && inbox.fill(&mut reader).await? == 0 {
                return writer.shutdown().await;
            }
            let len = inbox.data().len();
            self.note_received(len);
            write_both(&mut writer, inbox.data(), &[], |_| self.note_traffic()).await?;
            inbox.consume(len);
            full = if len >= FULL_BYTES { full + 1 } else { 0 };
            if can_splice
                && full == FULL_MIN
                && let Some(pipe) = Pipe::open()
            {
                let on_received = |count| {
                    self.worker.counters.bytes_spliced.add(count as u64);
                    self.note_received(count);
                };
                if matches!(pipe.carry(reader, writer, on_received, || self.note_traffic()).await?, Pause::End) {
                    return writer.shutdown().await;
                }
            }
        }
    }

    fn note_received(&self, count: usize) {
        self.note_traffic();
        if self.is_up
            && let Some(sandbox) = self.sandbox
        {
            self.worker.knock(sandbox);
        }
        self.count.add(count as u64);
    }

    /// One deadline for both directions: a tunnel that only talks one way is not idle.
    fn note_traffic(&self) {
        self.watch.down.set(Phase::Stream, self.worker.after(self.worker.config.limits.stream_timeout_s));
        if let Some(sandbox) = self.sandbox {
            sandbox.touch();
        }
    }
}
