//! What ends a connection from outside: a deadline, a revoked access, a drain.
//!
//! Timers per request would cost more than the rest of the request. Instead each connection keeps its deadlines in
//! plain cells, and one sweep per worker, [`SWEEP_MS`] apart, looks at all of them.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use crate::admit::Admission;
use crate::worker::Drain;

/// Time between two sweeps; also the precision of every time-out.
pub const SWEEP_MS: u64 = 250;

/// What a direction of a connection is waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing that can time out.
    None,
    /// The first byte of a request on a connection that was used before.
    Idle,
    /// The rest of a request's head.
    Head,
    /// More of the request's body.
    Body,
    /// The sandbox to wake up.
    Wake,
    /// A connection to the upstream.
    Connect,
    /// The upstream to take bytes.
    Push,
    /// The head of the response.
    Response,
    /// More of the response's body, or traffic in a tunnel.
    Stream,
    /// The client to take bytes.
    Send,
    /// The end of a response whose client has closed its side.
    HalfClosed,
    /// A client that sends its body, but too slowly.
    SlowBody,
    /// One that takes what there is for it, but too slowly.
    SlowSend,
}

/// What a time-out is called in the metrics, by phase.
pub const TIMEOUTS: [(Phase, &str); 12] = [
    (Phase::Idle, "idle"),
    (Phase::Head, "head"),
    (Phase::Body, "body"),
    (Phase::Wake, "wake"),
    (Phase::Connect, "connect"),
    (Phase::Push, "push"),
    (Phase::Response, "response"),
    (Phase::Stream, "stream"),
    (Phase::Send, "send"),
    (Phase::HalfClosed, "half_closed"),
    (Phase::SlowBody, "slow_body"),
    (Phase::SlowSend, "slow_send"),
];

/// Why a connection must end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The wait named took too long.
    Timeout(Phase),
    /// What let the request in does so no more.
    Revoked,
    /// The process is about to stop.
    Drain,
}

/// One direction's deadline.
#[derive(Debug)]
pub struct Deadline {
    at_ms: Cell<u64>,
    phase: Cell<Phase>,
}

impl Default for Deadline {
    fn default() -> Self {
        Self { at_ms: Cell::new(u64::MAX), phase: Cell::new(Phase::None) }
    }
}

impl Deadline {
    /// Starts waiting for `phase`.
    pub fn set(&self, phase: Phase, at_ms: u64) {
        self.phase.set(phase);
        self.at_ms.set(at_ms);
    }

    /// Stops waiting.
    pub fn clear(&self) {
        self.set(Phase::None, u64::MAX);
    }

    /// What is waited for.
    pub fn phase(&self) -> Phase {
        self.phase.get()
    }
}

/// What the sweep sees of a connection.
#[derive(Debug, Default)]
pub struct Watch {
    /// Client towards upstream.
    pub up: Deadline,
    /// Upstream towards client.
    pub down: Deadline,
    /// When the current request began, and when its response did (0: not yet), in the worker's microseconds.
    pub began_us: Cell<u64>,
    /// See there.
    pub answered_us: Cell<u64>,
    /// Whether the first byte of a response has been sent.
    pub is_answering: Cell<bool>,
    /// The protocol can tell the client that the connection ends, before it does.
    pub can_be_told: Cell<bool>,
    /// What lets the current request in.
    pub admission: RefCell<Option<Admission>>,
    end: Cell<Option<End>>,
    waker: RefCell<Option<Waker>>,
}

impl Watch {
    /// Waits for the sweep to end this connection.
    pub async fn ended(&self) -> End {
        poll_fn(|cx| {
            if let Some(end) = self.end.take() {
                return Poll::Ready(end);
            }
            let mut waker = self.waker.borrow_mut();
            if !waker.as_ref().is_some_and(|known| known.will_wake(cx.waker())) {
                *waker = Some(cx.waker().clone());
            }
            Poll::Pending
        })
        .await
    }

    /// Whether the request of `began_us` waits for a sandbox that has not begun to answer.
    pub fn is_unanswered(&self) -> bool {
        matches!(self.down.phase(), Phase::Connect | Phase::Response)
    }

    /// Notes that a request begins.
    pub fn begin(&self, now_us: u64) {
        self.is_answering.set(false);
        self.began_us.set(now_us);
        self.answered_us.set(0);
    }

    /// Notes that its response begins.
    pub fn answer(&self, now_us: u64) {
        self.is_answering.set(true);
        self.answered_us.set(now_us);
    }

    /// Ends the connection, at the next opportunity.
    pub fn finish(&self, end: End) {
        self.end.set(Some(end));
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// Looks at this connection once.
    pub fn sweep(&self, now_ms: u64, drain: Drain, is_admitted: impl FnOnce(&Admission) -> bool) {
        for deadline in [&self.up, &self.down] {
            if deadline.at_ms.get() <= now_ms {
                let phase = deadline.phase();
                deadline.clear();
                return self.finish(End::Timeout(phase));
            }
        }
        let is_due = drain == Drain::Stop || (drain == Drain::HandedOver && self.can_be_told.get());
        if is_due && self.up.phase() == Phase::Idle {
            self.finish(End::Drain);
        } else if let Some(admission) = &*self.admission.borrow()
            && !is_admitted(admission)
        {
            self.finish(End::Revoked);
        }
    }
}

/// The connections of one worker.
#[derive(Default)]
pub struct Watches {
    all: RefCell<Vec<Rc<Watch>>>,
}

impl Watches {
    /// A watch for a new connection; it is watched as long as the caller keeps it.
    pub fn add(&self) -> Rc<Watch> {
        let watch = Rc::new(Watch::default());
        self.all.borrow_mut().push(Rc::clone(&watch));
        watch
    }

    /// Calls `visit` for each connection that still lives, and forgets the others.
    pub fn sweep(&self, mut visit: impl FnMut(&Watch)) {
        self.all.borrow_mut().retain(|watch| {
            let is_alive = Rc::strong_count(watch) > 1;
            if is_alive {
                visit(watch);
            }
            is_alive
        });
    }
}
