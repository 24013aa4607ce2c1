//! A client connection from accept to close.
//!
//! ```text
//! idle ──first byte──▶ head ──▶ answered here, or exchanged with an upstream ──▶ idle | tunnel | close
//! ```
//!
//! Deadlines, revoked accesses and the drain end it from outside, through its [`Watch`].

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use crate::access_log::Record;
use crate::buf::{HeadBuf, Inbox};
use crate::compose::{Peer, split_query};
use crate::exchange::{Broken, Done, exchange};
use crate::failure::{Audience, Code, Failure};
use crate::hold::hold;
use crate::http::fields::{self, Field};
use crate::http::{Framing, find_end};
use crate::metrics::Class;
use crate::net::{Shared, Transport, write_both};
use crate::prepare::{Answer, AnswerKind, Decision, Forward, Hold, Plan, prepare};
use crate::streams::hub::Joining;
use crate::table::Sandbox;
use crate::trust::client_of;
use crate::tunnel::tunnel;
use crate::watch::{End, Phase, Watch};
use crate::worker::Worker;

/// How long the client may take to read a last answer and close; how much of what it still sends is thrown away.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES_MAX: usize = 1024 * 1024;

/// Whether anything remains to be done when the requests are over.
enum Exit {
    /// Close.
    Closed,
    /// Close, but first let the client read the last answer: it may still be sending.
    Linger,
    /// The connection goes on as a subscriber's.
    Join(Box<Joining>),
}

/// A connection that turns into a subscriber's.
pub struct Joined<C> {
    /// The connection.
    pub stream: C,
    /// What it is to get.
    pub joining: Joining,
}

/// Serves one connection, or anything else that speaks HTTP/1.1, until it ends or becomes a subscriber's.
pub async fn serve<C: Transport>(worker: &Worker, watch: &Watch, stream: C, peer: Peer) -> Option<Joined<C>> {
    let session = Session {
        worker,
        watch,
        client: Shared::new(stream),
        peer,
        audience: RefCell::default(),
        class: Cell::new(Class::None),
        record: RefCell::default(),
        is_open: Cell::new(false),
    };
    let exit = {
        let mut requests = pin!(session.requests());
        tokio::select! {
            biased;
            exit = &mut requests => Ok(exit),
            end = watch.ended() => Err(end),
        }
    };
    let exit = match exit {
        Ok(exit) => exit,
        Err(end) => session.cut(end).await,
    };
    let stream = session.client.into_inner();
    match exit {
        Exit::Closed => None,
        Exit::Linger => {
            linger(stream).await;
            None
        }
        Exit::Join(joining) => Some(Joined { stream, joining: *joining }),
    }
}

/// Answers a connection that is one too many.
pub async fn turn_away<C: AsyncRead + AsyncWrite + Unpin>(worker: &Worker, mut stream: C) {
    let bytes = Failure::from(Code::TooManyConnections).render(&Audience::default(), &worker.request_id());
    worker.counters.failure(Code::TooManyConnections);
    worker.counters.request(Class::None, Code::TooManyConnections.status());
    if matches!(timeout(LINGER, stream.write_all(&bytes)).await, Ok(Ok(()))) {
        linger(stream).await;
    }
}

/// Closes our side and waits a little for the other. Closing at once while the client still sends would reset the
/// connection, and the client might never see its answer.
async fn linger<C: AsyncRead + AsyncWrite + Unpin>(mut stream: C) {
    let drain = async {
        stream.shutdown().await?;
        let mut scrap = [0; 4096];
        let mut left = LINGER_BYTES_MAX;
        while left > 0 {
            let count = stream.read(&mut scrap).await?;
            if count == 0 {
                break;
            }
            left = left.saturating_sub(count);
        }
        std::io::Result::Ok(())
    };
    // However it ends, the connection is closed next.
    let _ = timeout(LINGER, drain).await;
}

struct Session<'a, C> {
    worker: &'a Worker,
    watch: &'a Watch,
    client: Shared<C>,
    peer: Peer,
    audience: RefCell<Audience>,
    class: Cell<Class>,
    record: RefCell<Option<Record>>,
    /// Whether the current request is not finished yet.
    is_open: Cell<bool>,
}

impl<C: Transport> Session<'_, C> {
    async fn requests(&self) -> Exit {
        let mut inbox = Inbox::default();
        loop {
            self.audience.replace(Audience::default());
            self.class.set(Class::None);
            let head_len = match self.read_head(&mut inbox).await {
                Ok(Some(len)) => len,
                Ok(None) => return Exit::Closed,
                Err(failure) => return self.refuse(failure).await,
            };
            let plan = match self.plan(&inbox.data()[..head_len]) {
                Ok(Decision::Hold(hold)) => match self.hold(hold, &mut inbox, head_len).await {
                    Some(plan) => plan,
                    None => return self.give_up(),
                },
                Ok(Decision::Now(plan)) => {
                    inbox.consume(head_len);
                    Ok(plan)
                }
                Err(failure) => Err(failure),
            };
            let exit = match plan {
                Err(failure) => Some(self.refuse(failure).await),
                Ok(Plan::Answer(answer)) => self.answer(answer).await,
                Ok(Plan::Forward(forward)) => self.forward(*forward, &mut inbox).await,
            };
            if let Some(exit) = exit {
                return exit;
            }
        }
    }

    /// Waits for a complete head; none if the client closed before it began one.
    async fn read_head(&self, inbox: &mut Inbox) -> Result<Option<usize>, Failure> {
        let limits = &self.worker.config.limits;
        let bytes_max = limits.head_bytes_max as usize;
        let mut seen = 0;
        loop {
            // One empty line before a request is an old client's habit (RFC 9112, 2.2).
            if seen == 0 && inbox.data().starts_with(b"\r\n") {
                inbox.consume(2);
            }
            if inbox.is_empty() {
                self.watch.up.set(Phase::Idle, self.worker.after(limits.idle_timeout_s));
            } else {
                if let Some(len) = find_end(inbox.data(), seen, bytes_max)? {
                    self.watch.up.clear();
                    return Ok(Some(len));
                }
                seen = inbox.data().len();
                if self.watch.up.phase() != Phase::Head {
                    self.watch.up.set(Phase::Head, self.worker.after(limits.head_timeout_s));
                }
            }
            match inbox.fill(&mut &self.client).await {
                Ok(0) | Err(_) => return Ok(None),
                Ok(_) => {}
            }
        }
    }

    fn plan(&self, head: &[u8]) -> Result<Decision, Failure> {
        self.watch.begin(self.worker.now_us());
        self.is_open.set(true);
        self.decide(head, |fields| {
            if self.worker.access_log.is_some() {
                self.record.replace(Some(self.record(head, fields)));
            }
        })
    }

    /// Decides on the request; `note` is shown its fields.
    fn decide(&self, head: &[u8], note: impl FnOnce(&[Field])) -> Result<Decision, Failure> {
        let mut fields = self.worker.fields.take();
        let plan = prepare(self.worker, &self.peer, head, &mut fields);
        note(&fields);
        self.worker.fields.replace(fields);
        plan
    }

    /// Holds the request at the front of `inbox` until its sandbox is awake. None if the client left.
    async fn hold(&self, asleep: Hold, inbox: &mut Inbox, head_len: usize) -> Option<Result<Plan, Failure>> {
        // A copy: a buffer is much larger than a head, and many may be held.
        let mut head = HeadBuf::take();
        head.0.extend_from_slice(&inbox.data()[..head_len]);
        inbox.consume(head_len);
        self.class.set(Class::Preview);
        self.audience.replace(asleep.audience.clone());
        self.note_sandbox(&asleep.sandbox);
        hold(self.worker, self.watch, &mut &self.client, inbox, asleep, || self.decide(&head.0, |_| ())).await
    }

    fn note_sandbox(&self, sandbox: &Sandbox) {
        if let Some(record) = &mut *self.record.borrow_mut() {
            record.sandbox = Some(sandbox.id.clone().into());
        }
    }

    /// What the access log will say; a head that could not be read leaves it nearly empty.
    fn record(&self, head: &[u8], fields: &[Field]) -> Record {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let line = head[..fields::line_len(head).unwrap_or(0)].trim_ascii_end();
        let mut words = line.split(|&b| b == b' ');
        let method = words.next().unwrap_or_default();
        let (path, _) = split_query(words.next().unwrap_or_default());
        let host = fields.iter().find(|field| field.name == fields::Name::Host).map(|field| field.value(head));
        Record {
            method: text(method),
            host: text(host.unwrap_or_default()),
            path: text(path),
            client: self.client_address(head, fields),
            ..Record::default()
        }
    }

    fn client_address(&self, head: &[u8], fields: &[Field]) -> String {
        if self.peer.is_trusted {
            return client_of(&self.worker.config.trusted_proxy, &self.peer, head, fields).address.into();
        }
        self.peer.address.clone().into()
    }

    fn finished(&self, status: u16, code: Option<Code>, request_id: Option<String>) {
        let class = self.class.get();
        let (whole_us, first_byte_us) = self.took_us();
        self.is_open.set(false);
        self.worker.counters.request(class, status);
        self.worker.counters.took(class, first_byte_us, whole_us);
        if let Some(code) = code {
            self.worker.counters.failure(code);
        }
        if let (Some(log), Some(mut record)) = (&self.worker.access_log, self.record.take()) {
            record.ts = self.worker.wall_s();
            record.class = class.name();
            record.status = status;
            record.code = code.map(Code::name);
            record.request_id = request_id;
            record.duration_ms = whole_us as f64 / 1e3;
            record.first_byte_ms = first_byte_us as f64 / 1e3;
            log.borrow_mut().push(&record);
        }
    }

    /// How long the current request has taken so far, and how long until its response began.
    fn took_us(&self) -> (u64, u64) {
        let (began, answered) = (self.watch.began_us.get(), self.watch.answered_us.get());
        let whole = self.worker.now_us() - began;
        (whole, if answered == 0 { whole } else { answered - began })
    }

    async fn write(&self, bytes: &[u8]) -> std::io::Result<()> {
        self.watch.answer(self.worker.now_us());
        self.watch.down.set(Phase::Send, self.worker.after(self.worker.config.limits.send_timeout_s));
        let outcome = write_both(&mut &self.client, bytes, &[], |_| ()).await;
        self.watch.down.clear();
        outcome
    }

    /// Answers a request after which the connection cannot go on.
    async fn refuse(&self, failure: Failure) -> Exit {
        let request_id = self.worker.request_id();
        let audience = Audience { is_keep_alive: false, ..self.audience.borrow().clone() };
        let bytes = failure.render(&audience, &request_id);
        self.finished(failure.code.status(), Some(failure.code), Some(request_id));
        if self.write(&bytes).await.is_ok() { Exit::Linger } else { Exit::Closed }
    }

    async fn answer(&self, answer: Answer) -> Option<Exit> {
        let is_keep_alive = answer.audience.is_keep_alive;
        let can_go_on = answer.framing == Framing::None && is_keep_alive && !self.worker.is_draining.get();
        self.class.set(answer.class);
        self.audience.replace(answer.audience);
        match answer.kind {
            AnswerKind::Failure(failure) if !can_go_on => Some(self.refuse(failure).await),
            AnswerKind::Failure(failure) => {
                let request_id = self.worker.request_id();
                let bytes = failure.render(&self.audience.borrow(), &request_id);
                self.finished(failure.code.status(), Some(failure.code), Some(request_id));
                self.write(&bytes).await.is_err().then_some(Exit::Closed)
            }
            AnswerKind::Whole { status, head } => {
                self.finished(status, None, None);
                let outcome = self.write(&head).await;
                if outcome.is_err() {
                    return Some(Exit::Closed);
                }
                (!can_go_on).then_some(Exit::Linger)
            }
        }
    }

    async fn forward(&self, mut forward: Forward, inbox: &mut Inbox) -> Option<Exit> {
        self.class.set(if forward.address.is_some() { Class::Preview } else { Class::Api });
        self.audience.replace(forward.audience.clone());
        if let Some(sandbox) = &forward.sandbox {
            self.note_sandbox(sandbox);
        }
        self.watch.admission.replace(forward.admission.take());
        let outcome = exchange(self.worker, self.watch, &self.client, inbox, &mut forward).await;
        if let Some(sandbox) = &forward.sandbox {
            sandbox.live.seconds.observe(self.took_us().0);
        }
        let exit = match outcome {
            Ok(Done::KeepAlive(status)) => {
                self.finished(status, None, None);
                None
            }
            Ok(Done::Close(status)) => {
                self.finished(status, None, None);
                Some(Exit::Linger)
            }
            Ok(Done::Switch(switch)) => {
                self.finished(101, None, None);
                tunnel(self.worker, self.watch, &self.client, inbox, *switch, forward.sandbox.as_deref()).await;
                Some(Exit::Closed)
            }
            Ok(Done::Join(status, joining)) => {
                self.finished(status, None, None);
                Some(Exit::Join(joining))
            }
            Err(Broken::Failed(failure)) => Some(self.refuse(failure).await),
            Err(Broken::Aborted | Broken::Stale) => {
                self.finished(0, None, None);
                Some(Exit::Closed)
            }
        };
        self.watch.admission.replace(None);
        exit
    }

    /// Closes in the middle of whatever it was.
    fn give_up(&self) -> Exit {
        if self.is_open.get() {
            self.finished(0, None, None);
        }
        Exit::Closed
    }

    /// Ends the connection for a reason from outside.
    async fn cut(&self, end: End) -> Exit {
        self.watch.admission.replace(None);
        if let End::Timeout(phase) = end {
            self.worker.counters.timeout(phase);
        }
        let code = match end {
            End::Timeout(Phase::Head | Phase::Body | Phase::SlowBody) => Code::RequestTimeout,
            End::Timeout(Phase::Wake) => Code::WakeTimeout,
            End::Timeout(Phase::Connect | Phase::Response | Phase::Push) if self.class.get() == Class::Api => {
                Code::ApiUnavailable
            }
            End::Timeout(Phase::Connect | Phase::Response | Phase::Push) => Code::UpstreamTimeout,
            End::Timeout(_) | End::Drain => return self.give_up(),
            End::Revoked => {
                self.worker.counters.revoked.add(1);
                return self.give_up();
            }
        };
        if self.watch.is_answering.get() {
            return self.give_up();
        }
        let last_words = timeout(LINGER, self.refuse(code.into()));
        last_words.await.unwrap_or(Exit::Closed)
    }
}
