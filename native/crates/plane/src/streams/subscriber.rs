//! One client of an event stream.
//!
//! It holds what there must be per client and nothing more: the connection, what it wants, how far it has got, and
//! events that its socket has not taken yet, by reference. The hub writes to it directly; its own task only wakes when
//! the socket takes bytes again, when the client leaves, or when it is told to end.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::event::Event;
use super::order::Selection;

/// Events given to one write.
const SLICES_MAX: usize = 32;
/// Room for waiting events that a subscriber keeps; what a slow one needed beyond it is given back.
const ROOM_KEPT: usize = 8;

/// A client connection, of whatever kind.
pub trait Transport: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Transport for T {}

/// Why a subscription ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The client has left.
    Left,
    /// It did not take what there was for it: too many events wait, or none was taken for too long.
    Slow,
    /// Events it should get are not here any more; it resumes by the id of its last one.
    Behind,
    /// Its API key is revoked or has expired.
    Revoked,
    /// The process is about to stop.
    Drain,
}

impl End {
    /// Every reason.
    pub const ALL: [Self; 5] = [Self::Left, Self::Slow, Self::Behind, Self::Revoked, Self::Drain];

    /// As metrics spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Slow => "slow",
            Self::Behind => "behind",
            Self::Revoked => "revoked",
            Self::Drain => "drain",
        }
    }
}

/// What waits for the socket.
#[derive(Default)]
struct Outbox {
    events: VecDeque<Arc<Event>>,
    /// Bytes of the first that are sent already.
    sent: usize,
}

/// See the module.
pub struct Subscriber {
    transport: RefCell<Box<dyn Transport>>,
    outbox: RefCell<Outbox>,
    /// What it gets.
    pub selection: Selection,
    is_unchunked: bool,
    cursor: Cell<u64>,
    active_ms: Cell<u64>,
    end: Cell<Option<End>>,
    waker: RefCell<Option<Waker>>,
}

impl Subscriber {
    /// Starts after `cursor`. `is_unchunked`: a client of HTTP/1.0.
    pub fn new(transport: Box<dyn Transport>, selection: Selection, is_unchunked: bool, cursor: u64) -> Self {
        Self {
            transport: RefCell::new(transport),
            outbox: RefCell::default(),
            selection,
            is_unchunked,
            cursor: Cell::new(cursor),
            active_ms: Cell::new(0),
            end: Cell::new(None),
            waker: RefCell::default(),
        }
    }

    /// How far in the log it is: what comes up to here is sent, waiting or not for it.
    pub fn cursor(&self) -> u64 {
        self.cursor.get()
    }

    /// Whether it has ended or will.
    pub fn is_ending(&self) -> bool {
        self.end.get().is_some()
    }

    /// When its socket last took something, or waiting began.
    pub fn active_ms(&self) -> u64 {
        self.active_ms.get()
    }

    /// Events that wait for the socket.
    pub fn waiting(&self) -> usize {
        self.outbox.borrow().events.len()
    }

    /// Ends it; the first reason counts.
    pub fn finish(&self, end: End) {
        if !self.is_ending() {
            self.end.set(Some(end));
        }
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// Takes what it wants of `events`, which end at `through`; returns how many. Sends nothing yet.
    pub fn offer<'a>(&self, events: impl Iterator<Item = &'a Arc<Event>>, through: u64, now_ms: u64) -> usize {
        let cursor = self.cursor.replace(self.cursor.get().max(through));
        let mut outbox = self.outbox.borrow_mut();
        let before = outbox.events.len();
        outbox.events.extend(events.filter(|event| event.seq > cursor && self.selection.takes(event)).cloned());
        self.note_waiting(before, now_ms);
        outbox.events.len() - before
    }

    /// Takes a comment.
    pub fn offer_comment(&self, comment: &Arc<Event>, now_ms: u64) {
        let mut outbox = self.outbox.borrow_mut();
        self.note_waiting(outbox.events.len(), now_ms);
        outbox.events.push_back(Arc::clone(comment));
    }

    fn note_waiting(&self, before: usize, now_ms: u64) {
        if before == 0 {
            self.active_ms.set(now_ms);
        }
    }

    /// Sends what waits, as far as the socket takes it now; its task does the rest.
    pub fn push(&self, now_ms: u64) {
        let waker = self.waker.borrow();
        // Before its task has run for the first time, that run sends.
        let Some(waker) = &*waker else { return };
        if let Poll::Ready(Err(_)) = self.poll_send(&mut Context::from_waker(waker), now_ms) {
            self.end.set(self.end.get().or(Some(End::Left)));
            waker.wake_by_ref();
        }
    }

    fn poll_send(&self, cx: &mut Context<'_>, now_ms: u64) -> Poll<io::Result<()>> {
        let mut transport = self.transport.borrow_mut();
        let mut transport = Pin::new(&mut **transport);
        let mut outbox = self.outbox.borrow_mut();
        while !outbox.events.is_empty() {
            let count = {
                let mut slices = [IoSlice::new(&[]); SLICES_MAX];
                let mut used = 0;
                for (slice, event) in slices.iter_mut().zip(&outbox.events) {
                    let skipped = if used == 0 { outbox.sent } else { 0 };
                    *slice = IoSlice::new(&event.bytes(self.is_unchunked)[skipped..]);
                    used += 1;
                }
                ready!(transport.as_mut().poll_write_vectored(cx, &slices[..used]))?
            };
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.active_ms.set(now_ms);
            outbox.consume(count, self.is_unchunked);
        }
        if outbox.events.capacity() > ROOM_KEPT {
            outbox.events.shrink_to(ROOM_KEPT);
        }
        transport.poll_flush(cx)
    }

    /// Its task: done when the subscription is to end.
    pub fn poll_end(&self, cx: &mut Context<'_>, now_ms: u64) -> Poll<End> {
        let is_known = self.waker.borrow().as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
        if !is_known {
            self.waker.replace(Some(cx.waker().clone()));
        }
        if let Some(end) = self.end.get() {
            return Poll::Ready(end);
        }
        if let Poll::Ready(Err(_)) = self.poll_send(cx, now_ms) {
            return Poll::Ready(End::Left);
        }
        let mut scrap = [0; 256];
        loop {
            let mut space = ReadBuf::new(&mut scrap);
            let outcome = Pin::new(&mut **self.transport.borrow_mut()).poll_read(cx, &mut space);
            match ready!(outcome) {
                // What a client says to an event stream is of no interest, but that it has left is.
                Ok(()) if !space.filled().is_empty() => {}
                Ok(()) | Err(_) => return Poll::Ready(End::Left),
            }
        }
    }

    /// Ends the body in order, where that is possible without cutting an event. Errors are of no interest any more.
    pub async fn say_goodbye(&self) -> io::Result<()> {
        std::future::poll_fn(|cx| self.poll_send(cx, 0)).await?;
        let mut last: &[u8] = if self.is_unchunked { b"" } else { b"0\r\n\r\n" };
        std::future::poll_fn(|cx| {
            let mut transport = self.transport.borrow_mut();
            let mut transport = Pin::new(&mut **transport);
            while !last.is_empty() {
                let count = ready!(transport.as_mut().poll_write(cx, last))?;
                last = &last[count..];
            }
            ready!(transport.as_mut().poll_flush(cx))?;
            transport.poll_shutdown(cx)
        })
        .await
    }
}

impl Outbox {
    fn consume(&mut self, mut count: usize, is_unchunked: bool) {
        while let Some(first) = self.events.front() {
            let left = first.bytes(is_unchunked).len() - self.sent;
            if count < left {
                self.sent += count;
                return;
            }
            count -= left;
            self.sent = 0;
            self.events.pop_front();
        }
    }
}
