//! A transport whose writes have a deadline: a client that stops reading must not hold a connection for ever.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::watch::{Phase, Watch};
use crate::worker::Worker;

/// See the module.
pub struct Timed<S> {
    stream: S,
    worker: Rc<Worker>,
    watch: Rc<Watch>,
}

impl<S> Timed<S> {
    /// Keeps the deadline in `watch.down`.
    pub fn new(stream: S, worker: Rc<Worker>, watch: Rc<Watch>) -> Self {
        Self { stream, worker, watch }
    }

    /// Starts the clock when the transport takes nothing, stops it when it does.
    fn note<T>(&self, outcome: Poll<T>) -> Poll<T> {
        let is_waiting = self.watch.down.phase() == Phase::Send;
        if outcome.is_ready() && is_waiting {
            self.watch.down.clear();
        } else if outcome.is_pending() && !is_waiting {
            self.watch.down.set(Phase::Send, self.worker.after(self.worker.config.limits.send_timeout_s));
        }
        outcome
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Timed<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Timed<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let outcome = Pin::new(&mut this.stream).poll_write(cx, data);
        this.note(outcome)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let outcome = Pin::new(&mut this.stream).poll_write_vectored(cx, data);
        this.note(outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let outcome = Pin::new(&mut this.stream).poll_flush(cx);
        this.note(outcome)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let outcome = Pin::new(&mut this.stream).poll_shutdown(cx);
        this.note(outcome)
    }
}
