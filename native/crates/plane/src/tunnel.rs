//! An upgraded connection: bytes both ways until both sides have closed.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::task::Poll;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use crate::buf::Inbox;
use crate::exchange::Switch;
use crate::metrics::Count;
use crate::net::{Shared, write_both};
use crate::table::Sandbox;
use crate::watch::{Phase, Watch};
use crate::worker::Worker;

/// Carries a tunnel to its end. `inbox` and `switch.reply` hold what was received ahead.
pub async fn tunnel<C: AsyncRead + AsyncWrite + Unpin>(
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
    let (mut client_in, mut client_out, mut upstream_in, mut upstream_out) = (client, client, &upstream, &upstream);
    let (up, down) = (side(&worker.counters.bytes_up, true), side(&worker.counters.bytes_down, false));
    worker.counters.tunnels.add(1);
    {
        let mut up = pin!(up.copy(inbox, &mut client_in, &mut upstream_out));
        let mut down = pin!(down.copy(&mut reply, &mut upstream_in, &mut client_out));
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
    async fn copy<R, W>(&self, inbox: &mut Inbox, reader: &mut R, writer: &mut W) -> io::Result<()>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        self.note_traffic();
        loop {
            if inbox.is_empty() && inbox.fill(reader).await? == 0 {
                return writer.shutdown().await;
            }
            self.note_traffic();
            if self.is_up
                && let Some(sandbox) = self.sandbox
            {
                self.worker.knock(sandbox);
            }
            self.count.add(inbox.data().len() as u64);
            write_both(writer, inbox.data(), &[], || self.note_traffic()).await?;
            inbox.consume(inbox.data().len());
        }
    }

    /// One deadline for both directions: a tunnel that only talks one way is not idle.
    fn note_traffic(&self) {
        self.watch.down.set(Phase::Stream, self.worker.after(self.worker.config.limits.stream_timeout_s));
        if let Some(sandbox) = self.sandbox {
            sandbox.touch();
        }
    }
}
